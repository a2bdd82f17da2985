//! Moving folios of the swap cache from and to their slots, and pages of files from and to theirs (Linux's mm/page_io.c).
//!
//! The requests are the kernel's own ([`SwapRequest`]), not a task's, so several are under way at once, and their answers
//! are taken in by whoever sees them first: the interrupt, or a CPU that waits. What an answer changes is the state of the
//! folio; to let go of it is left to those who have asked for the transfer, who wait for it. An interrupt may come while
//! this CPU spins with any lock but the last ones held: it frees nothing.

use core::mem::offset_of;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use abi::channel::EventKind;
use abi::disk::{DiskOp, DiskRequest, DiskStatus};
use abi::layout::PAGE_SIZE;
use abi::objects::{FrameKind, SwapRequest, folio_state};
use abi::point::Point;

use super::Field;
use super::swap::{IN_TRANSFER, SLOT_SECTORS};
use crate::Kernel;
use crate::arch::Arch;

/// How to wait for the disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Waiting {
    /// By spinning, whatever locks the caller holds: the disk needs none of them.
    Spinning,
    /// Asleep, where the caller is a task. It holds no spin lock, for who spins for it would not give its CPU away.
    Asleep,
}

impl<A: Arch> Kernel<A> {
    /// Begins to write a dirty folio that nobody maps to its slot, if nobody but the cache and the caller refers to it
    /// (Linux's `pageout`). It is clean as of now: what is written to it later makes it dirty again. The caller waits.
    pub(super) fn swap_write(&self, gpa: u64) {
        let folio = self.folio(gpa);
        self.swap_transfer(DiskOp::Write, gpa, || {
            let state = folio.state.load(Acquire);
            let is_idle = folio.mapcount.load(Acquire) == 0 && folio.refcount.load(Acquire) == 2;
            let is_dirty = state & (folio_state::DIRTY | IN_TRANSFER) == folio_state::DIRTY;
            let slot = self.slot_of(gpa).filter(|_| is_idle && is_dirty)?;
            folio.state.fetch_or(folio_state::WRITEBACK, Relaxed);
            folio.state.fetch_and(!folio_state::DIRTY, Relaxed);
            Some(self.slot_sector(slot))
        });
    }

    /// Puts the frame at `gpa`, which the caller alone refers to, into the cache for `slot`, and begins to read it
    /// (Linux's `swap_read_folio`). False where another is there, or nobody needs it any more.
    pub(super) fn swap_read(&self, slot: u64, gpa: u64) -> bool {
        self.swap_transfer(DiskOp::Read, gpa, || {
            self.swap_add_unread(slot, gpa)
                .then(|| self.slot_sector(slot))
        })
    }

    fn slot_sector(&self, slot: u64) -> u64 {
        let first = self.root().swap.sector.get();
        first.wrapping_add(slot * SLOT_SECTORS)
    }

    /// Asks the disk to move the folio at `gpa` from or to the sector that `mark` names, which marks it as being moved: under
    /// the lock, together with the request, so that who finds the mark finds what to wait for. False where it names none.
    pub(super) fn swap_transfer(
        &self,
        op: DiskOp,
        gpa: u64,
        mark: impl Fn() -> Option<u64>,
    ) -> bool {
        let area = &self.root().swap;
        let request = loop {
            {
                let _guard = self.lock_swap();
                let free = area.requests.iter().find(|r| r.folio.get() == 0);
                if let Some(request) = free {
                    let Some(sector) = mark() else { return false };
                    fill_request(request, op, (sector, gpa));
                    break request;
                }
            }
            self.swap_poll();
            self.swap_spin(None);
        };
        let disk = &request.disk;
        let sector = disk.sector.get();
        event!(
            self,
            EventKind::DiskSubmit,
            [
                op as u64,
                sector,
                gpa,
                PAGE_SIZE,
                (self.folio(gpa).kind.get() == FrameKind::File as u8).into()
            ]
        );
        self.arch.disk_submit(self.request_gpa(request));
        point!(self, Point::DiskSubmit, [sector, gpa]);
        true
    }

    fn request_gpa(&self, request: &SwapRequest) -> u64 {
        self.lock_id(&request.disk.sector) - offset_of!(DiskRequest, sector) as u64
    }

    /// Takes in the answers that have come.
    pub(crate) fn swap_poll(&self) {
        let requests = &self.root().swap.requests;
        if !requests.iter().any(is_answered) {
            return;
        }
        let _guard = self.lock_swap();
        for request in requests.iter().filter(|request| is_answered(request)) {
            self.swap_answered(request);
        }
    }

    /// Under the lock.
    fn swap_answered(&self, request: &SwapRequest) {
        let (disk, gpa) = (&request.disk, request.folio.get());
        let state = &self.folio(gpa).state;
        let is_done = disk.status.load(Acquire) == DiskStatus::Done as u32;
        let is_read = disk.op.get() == DiskOp::Read as u32;
        match (is_read, is_done) {
            (true, true) => state.fetch_or(folio_state::UPTODATE, Relaxed),
            // What it holds is nowhere else: it stays (Linux's end_swap_bio_write).
            (false, false) => state.fetch_or(folio_state::DIRTY, Relaxed),
            (true, false) | (false, true) => 0,
        };
        self.file_page_answered(gpa, is_read, is_done);
        // Release: who sees the transfer over sees what became of it.
        state.fetch_and(!IN_TRANSFER, Release);
        // Release: who sees the request unused sees the folio's state, and need not sleep for it.
        request.folio.store(0, Release);
        event!(
            self,
            EventKind::DiskDone,
            [
                disk.op.get().into(),
                disk.sector.get(),
                gpa,
                disk.status.get().into(),
                0
            ]
        );
    }

    /// True while the folio at `gpa`, to which the caller has a reference, is being moved.
    pub(crate) fn in_transfer(&self, gpa: u64) -> bool {
        self.swap_poll();
        self.folio(gpa).state.load(Acquire) & IN_TRANSFER != 0
    }

    /// Waits until the folio at `gpa`, to which the caller has a reference, is no longer being moved.
    pub(super) fn swap_wait(&self, gpa: u64, how: Waiting) {
        if how == Waiting::Asleep && self.runs_task() {
            return self.swap_sleep(&[gpa]);
        }
        while self.in_transfer(gpa) {
            self.swap_spin(Some(gpa));
        }
    }

    /// Sleeps until none of the folios is being moved. Without references to them it may be for others that have come in
    /// their places.
    pub(super) fn swap_sleep(&self, frames: &[u64]) {
        let is_moved = |gpa: &u64| self.folio(*gpa).state.load(Acquire) & IN_TRANSFER != 0;
        loop {
            self.swap_poll();
            if !frames.iter().any(is_moved) {
                return;
            }
            self.sleep_for_swap(|| frames.iter().any(is_moved));
        }
    }

    /// One turn of waiting for the transfer of `gpa`, or for any.
    fn swap_spin(&self, gpa: Option<u64>) {
        let under_way = self.root().swap.requests.iter().find(|request| {
            let folio = request.folio.get();
            folio != 0 && gpa.is_none_or(|gpa| gpa == folio)
        });
        // Answered since: look again.
        let Some(request) = under_way else { return };
        let at = self.request_gpa(request);
        self.spin(Point::DiskWait, [at, request.folio.get()]);
    }
}

fn fill_request(request: &SwapRequest, op: DiskOp, (sector, gpa): (u64, u64)) {
    let disk = &request.disk;
    disk.op.set(op as u32);
    disk.sector.set(sector);
    disk.gpa.set(gpa);
    disk.bytes.set(PAGE_SIZE);
    // Release: a device that gets the request sees all of it.
    disk.status.store(DiskStatus::Pending as u32, Release);
    request.folio.set(gpa);
}

/// True where the disk has done with a request that nobody has looked at since.
fn is_answered(request: &SwapRequest) -> bool {
    request.folio.load(Acquire) != 0
        && request.disk.status.load(Acquire) != DiskStatus::Pending as u32
}
