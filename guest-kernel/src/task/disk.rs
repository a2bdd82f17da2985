//! The disk's driver, and direct I/O: the device moves data between its sectors and the pages of a program.
//!
//! A task has one request at a time, in [`Task::disk`], and sleeps until the device has answered: not even being killed
//! wakes it before, for the device still writes to its pages (Linux's TASK_UNINTERRUPTIBLE). The interrupt only wakes;
//! who waits looks at the answer under the scheduler's lock, so no wake-up is lost.

use core::sync::atomic::Ordering::{Acquire, Release};

use abi::channel::EventKind;
use abi::disk::{DiskOp, DiskRequest, DiskStatus, SECTOR_BYTES};
use abi::layout::PAGE_SIZE;
use abi::objects::{Pa, Task, TaskState};
use abi::point::Point;
use abi::syscall::Errno;

use crate::Kernel;
use crate::arch::Arch;
use crate::mm::Field;

/// Pages that are pinned at a time (Linux's BIO_MAX_VECS is 256; this bounds the kernel stack).
const BATCH: usize = 16;

impl<A: Arch> Kernel<A> {
    /// `direct_read(gva, len, sector)` and `direct_write` (Linux's block/fops.c, `blkdev_direct_IO`): alignment first, then
    /// the range, then page by page. What was moved before an error counts.
    pub(super) fn direct_io(
        &self,
        op: DiskOp,
        gva: u64,
        len: u64,
        sector: u64,
    ) -> Result<u64, Errno> {
        if !gva.is_multiple_of(SECTOR_BYTES) || !len.is_multiple_of(SECTOR_BYTES) {
            return Err(Errno::EINVAL);
        }
        self.check_user(gva, len)?;
        let mut done = 0;
        while done < len {
            let from = sector
                .checked_add(done / SECTOR_BYTES)
                .ok_or(Errno::EINVAL)?;
            match self.direct_batch(op, gva + done, len - done, from) {
                Ok(bytes) => done += bytes,
                Err(_) if done > 0 => break,
                Err(errno) => return Err(errno),
            }
        }
        Ok(done)
    }

    /// Moves as much as a batch of pages has room for; all of them stay pinned until the last is done.
    fn direct_batch(&self, op: DiskOp, gva: u64, len: u64, sector: u64) -> Result<u64, Errno> {
        let mm = self.current().mm.get();
        let mut frames = [0; BATCH];
        let span = (gva % PAGE_SIZE + len).div_ceil(PAGE_SIZE);
        let wanted = span.min(BATCH as u64) as usize;
        let pinned = self.pin_user_pages(
            mm,
            gva,
            op == DiskOp::Read,
            &mut frames[..wanted],
            |gva, code| self.fault_for_pin(gva, code),
        )?;
        let result = self.transfer_pages(op, (gva, len), sector, &frames[..pinned]);
        if op == DiskOp::Read {
            for &frame in &frames[..pinned] {
                self.page_written_by_device(frame);
            }
        }
        self.unpin_user_pages(gva, &frames[..pinned]);
        result
    }

    /// Moves the part of `gva..gva + len` that lies in `frames`, a request for each.
    fn transfer_pages(
        &self,
        op: DiskOp,
        (gva, len): (u64, u64),
        sector: u64,
        frames: &[u64],
    ) -> Result<u64, Errno> {
        let mut done = 0;
        for frame in frames {
            let offset = (gva + done) % PAGE_SIZE;
            let bytes = (PAGE_SIZE - offset).min(len - done);
            let at = (sector + done / SECTOR_BYTES, frame + offset);
            match self.disk_transfer(op, at, bytes) {
                Ok(()) => done += bytes,
                Err(_) if done > 0 => break,
                Err(errno) => return Err(errno),
            }
        }
        Ok(done)
    }

    /// Has the disk move `bytes` between a sector and memory, and sleeps until it has.
    ///
    /// # Errors
    /// EIO where the disk fails, EINVAL for sectors that it has not.
    fn disk_transfer(
        &self,
        op: DiskOp,
        (sector, gpa): (u64, u64),
        bytes: u64,
    ) -> Result<(), Errno> {
        let task = self.this_cpu().current.get();
        let request = &self.obj(task).disk;
        request.op.set(op as u32);
        request.sector.set(sector);
        request.gpa.set(gpa);
        request.bytes.set(bytes);
        // Release: a device that gets the request sees all of it.
        request.status.store(DiskStatus::Pending as u32, Release);
        event!(
            self,
            EventKind::DiskSubmit,
            [op as u64, sector, gpa, bytes, 0]
        );
        self.arch.disk_submit(request_gpa(task));
        point!(self, Point::DiskSubmit, [sector, gpa]);
        let status = self.disk_wait(request);
        event!(
            self,
            EventKind::DiskDone,
            [op as u64, sector, gpa, status as u64, 0]
        );
        match status {
            DiskStatus::Done => Ok(()),
            DiskStatus::Invalid => Err(Errno::EINVAL),
            DiskStatus::Error | DiskStatus::Busy | DiskStatus::Pending => Err(Errno::EIO),
        }
    }

    /// Sleeps until the disk has answered.
    fn disk_wait(&self, request: &DiskRequest) -> DiskStatus {
        loop {
            let lock = self.sched_lock();
            match answer(request) {
                DiskStatus::Pending => self.block(lock, Task::WAITS_FOR_DISK),
                status => return status,
            }
        }
    }

    /// Sleeps until the disk has answered any request, unless what is waited for `is_moved` no more: then the caller looks
    /// again. It holds no lock, and has called [`Kernel::swap_poll`]: an answer that nobody has taken in is followed by an
    /// interrupt.
    pub(crate) fn sleep_for_swap(&self, is_moved: impl Fn() -> bool) {
        let lock = self.sched_lock();
        if is_moved() {
            self.block(lock, Task::WAITS_FOR_SWAP);
        }
    }

    /// The disk has interrupted this CPU: wakes all that have their answer, and those that wait for the swap area, to look
    /// for theirs. In user mode, while idle, or while this CPU
    /// spins, when it may hold any lock but one that comes last as the scheduler's does.
    pub(super) fn disk_interrupt(&self) {
        self.swap_poll();
        let _lock = self.sched_lock();
        for task in self.tasks() {
            let object = self.obj(task);
            let looks = match object.waits_for.get() {
                Task::WAITS_FOR_DISK => answer(&object.disk) != DiskStatus::Pending,
                Task::WAITS_FOR_SWAP => true,
                _ => false,
            };
            if looks && object.state.get() == TaskState::Blocked as u32 {
                self.wake(task);
            }
        }
    }
}

/// Acquire: who sees the answer sees the data.
fn answer(request: &DiskRequest) -> DiskStatus {
    // A device of another kind may say anything; that is an error of the medium.
    DiskStatus::from_u32(request.status.load(Acquire)).unwrap_or(DiskStatus::Error)
}

fn request_gpa(task: Pa<Task>) -> u64 {
    task.0 + core::mem::offset_of!(Task, disk) as u64
}
