//! Faults on entries that name a swap slot (Linux's mm/memory.c, `do_swap_page`).
//!
//! The folio comes from the swap cache, or is read into it, with those of the slots around (parameter `swap_readahead`,
//! Linux's `swap_cluster_readahead`). Nobody sleeps under the mmap_lock, for which others spin: as in Linux (FAULT_FLAG_ALLOW_RETRY,
//! `folio_lock_or_retry`) a fault that has to wait lets go of the lock first, waits, and is over; the access is made again
//! and finds the folio. It sleeps meanwhile where its caller is a task ([`MAY_SLEEP`]). Where the mmap_lock must be kept,
//! as by calls that populate, the wait spins.
//!
//! A page that was exclusive when it went out is so again: its entry says so. One that was shared is its mapper's alone
//! when no other entry names its slot, and nobody else refers to it.

use core::ops::Range;
use core::sync::atomic::Ordering::{Acquire, Relaxed};

use abi::channel::cause;
use abi::objects::{AnonVma, FrameKind, Pa, folio_flags, folio_state, vma_flags};
use abi::point::Point;
use abi::pte::{Pte, PteFlags, fault};
use abi::syscall::Errno;

use super::disk_file::UnreadPage;
use super::fault::Faulting;
use super::group::Effort;
use super::swap::SlotContents;
use super::swap_io::Waiting;
use super::vma::leaf_flags;
use super::{FaultError, Field, pages};
use crate::Kernel;
use crate::arch::Arch;

/// In the code of a fault: its caller can let go of the mmap_lock and wait (Linux's FAULT_FLAG_ALLOW_RETRY). Beside the
/// architecture's bits.
pub(super) const MAY_RETRY: u64 = 1 << 33;
/// In the code of a fault: its caller is a task and holds no spin lock, so it may sleep. Beside the architecture's bits.
pub(crate) const MAY_SLEEP: u64 = 1 << 34;

/// Why a fault is not over yet, or never will be.
#[derive(Debug)]
pub(super) enum Unfinished {
    /// The access must not be made.
    Refused(FaultError),
    /// This slot is being read: to be [awaited](Kernel::swap_read_done) without the mmap_lock, and then the access is to be
    /// made again.
    Reading(u64),
    /// The same of a page of a file ([`Kernel::page_read_done`]).
    ReadingPage(UnreadPage),
    /// What its VMA's lock does not suffice for: to be done again under the mmap_lock
    /// ([`VMA_LOCKED`](super::fault_path::VMA_LOCKED)).
    NeedsMmapLock,
}

impl<E: Into<FaultError>> From<E> for Unfinished {
    fn from(error: E) -> Self {
        Self::Refused(error.into())
    }
}

impl<A: Arch> Kernel<A> {
    /// A fault on an entry that refers to `slot`, and says that the page was exclusive or not. The entry may have changed since it
    /// was read. Returns when the access may be tried again.
    ///
    /// # Errors
    /// Why it must not, or not yet, where `error` says that the fault may be retried.
    pub(super) fn swap_fault(
        &self,
        fault: Faulting,
        error: u64,
        (slot, exclusive): (u64, bool),
    ) -> Result<(), Unfinished> {
        loop {
            match self.swap_find(slot) {
                // The entry has changed.
                SlotContents::Free => return Ok(()),
                SlotContents::Disk => self.read_around(slot)?,
                SlotContents::Folio(gpa) if self.is_being_read(gpa) => {
                    self.folio_put(gpa, cause::HOLD);
                }
                SlotContents::Folio(gpa) => {
                    let result = self.map_swapped(fault, (slot, exclusive), error, gpa);
                    self.swap_put(gpa, cause::HOLD);
                    return Ok(result?);
                }
            }
            if error & MAY_RETRY != 0 {
                return Err(Unfinished::Reading(slot));
            }
            self.swap_read_done(slot, Waiting::Spinning);
        }
    }

    /// Waits until `slot` is read, and what was read with it, and lets go of what nobody needs any more. What is in `slot` is
    /// not reclaimed meanwhile: the caller comes back for it, and in too little memory might never find it.
    pub(super) fn swap_read_done(&self, slot: u64, how: Waiting) {
        let needed = self.swap_find(slot);
        for near in self.readahead_window(slot) {
            if let SlotContents::Folio(gpa) = self.swap_find(near) {
                self.swap_wait(gpa, how);
                self.swap_put(gpa, cause::HOLD);
            }
        }
        if let SlotContents::Folio(gpa) = needed {
            self.swap_put(gpa, cause::HOLD);
        }
    }

    fn is_being_read(&self, gpa: u64) -> bool {
        self.in_transfer(gpa) && self.folio(gpa).state.load(Acquire) & folio_state::READING != 0
    }

    /// Reads `slot`, and of those around it what has anything to read (Linux's `swap_cluster_readahead`). Only the first must
    /// succeed.
    fn read_around(&self, slot: u64) -> Result<(), Errno> {
        let frame = self.alloc_frames(0, FrameKind::Anon)?;
        self.charge_as_slot(slot, frame, Effort::Reclaim)?;
        if self.read_slot(slot, frame) {
            for near in self.readahead_window(slot) {
                if near != slot && self.is_on_disk(near) {
                    // Not worth reclaiming anything for.
                    let Ok(frame) = self.alloc_free_frame(FrameKind::Anon) else {
                        break;
                    };
                    if self.charge_as_slot(near, frame, Effort::None).is_err() {
                        break;
                    }
                    self.read_slot(near, frame);
                }
            }
        }
        Ok(())
    }

    /// Begins to read `slot`, and those around, where a frame is free for it.
    pub(super) fn read_if_free(&self, slot: u64) -> bool {
        self.is_on_disk(slot)
            && self.alloc_free_frame(FrameKind::Anon).is_ok_and(|frame| {
                self.charge_as_slot(slot, frame, Effort::None).is_ok()
                    && self.read_slot(slot, frame)
            })
    }

    fn readahead_window(&self, slot: u64) -> Range<u64> {
        let each = self.config.swap_readahead;
        let first = slot & !(each - 1);
        first..(first + each).min(self.root().swap.nr_slots.get())
    }

    /// A look without the lock, which decides nothing.
    fn is_on_disk(&self, slot: u64) -> bool {
        let slot = self.swap_slot(slot);
        slot.count.get() != 0 && slot.folio.get() == 0
    }

    /// Begins to read `slot` into a fresh frame. False where it need not be read any more.
    fn read_slot(&self, slot: u64, frame: u64) -> bool {
        let added = self.swap_read(slot, frame);
        if added {
            self.lru_add(frame);
            // The cache's reference remains.
            self.folio_put(frame, cause::HOLD);
        } else {
            self.free_frames(frame);
        }
        added
    }

    /// Maps the folio in the place of the entry that names its slot.
    fn map_swapped(
        &self,
        fault: Faulting,
        (slot, exclusive): (u64, bool),
        error: u64,
        gpa: u64,
    ) -> Result<(), FaultError> {
        let folio = self.folio(gpa);
        if folio.state.load(Acquire) & folio_state::UPTODATE == 0 {
            // The disk has failed: the page is lost, not replaced by another (Linux: VM_FAULT_SIGBUS).
            return Err(FaultError::Bus);
        }
        let (mm, area) = (self.obj(fault.mm), self.obj(fault.vma));
        let _guard = self.lock_table(fault.slot.table);
        if self.read_pte(fault.slot) != fault.entry {
            return Ok(());
        }
        let mut leaf = leaf_flags(area.flags.get());
        if exclusive {
            folio.flags.fetch_or(folio_flags::EXCLUSIVE, Relaxed);
            if error & fault::WRITE != 0 {
                leaf |= PteFlags::WRITE | PteFlags::DIRTY;
            }
        } else {
            leaf |= PteFlags::COW;
        }
        if folio.mapcount.load(Acquire) == 0 {
            self.adopt_swapped(fault, gpa, exclusive);
        }
        self.folio_map_again(gpa, cause::MAP);
        let entry = Pte::new(gpa, leaf);
        self.set_pte(mm, fault.gva, fault.slot, fault.entry, entry);
        folio.state.fetch_or(folio_state::REFERENCED, Relaxed);
        self.swap_slot_put(slot);
        point!(self, Point::PteInstall, [mm.id.get(), fault.gva]);
        // The slot is of no more use where the page will be written (Linux's should_try_to_free_swap).
        if error & fault::WRITE != 0 || area.flags.get() & vma_flags::LOCKED != 0 {
            self.swap_free_folio(gpa);
        }
        Ok(())
    }

    /// The anon_vma and index by which the folio's mappings are found. One that others may map too belongs to the root of
    /// the family, whose list has them all (Linux's `__folio_set_anon`).
    fn adopt_swapped(&self, fault: Faulting, gpa: u64, exclusive: bool) {
        let (folio, area) = (self.folio(gpa), self.obj(fault.vma));
        let own: Pa<AnonVma> = area.anon_vma.get();
        let owner = if exclusive {
            own
        } else {
            self.obj(own).root.get()
        };
        folio.owner.set(owner.0);
        folio
            .index
            .set(area.pgoff.get() + pages(fault.gva - area.start.get()));
    }
}
