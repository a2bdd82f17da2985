//! msync (Linux's mm/msync.c).

use core::ops::Range;

use abi::lock::LockClass;
use abi::objects::{File, Mm, Pa, Vma, vma_flags};
use abi::syscall::{Errno, msync};

use super::{Field, is_page_aligned, page_align, pages};
use crate::Kernel;
use crate::arch::Arch;

/// What one look at the VMAs of a range comes to.
enum Found {
    /// Pages of a file, to which the caller has a reference now, that are to be written; the rest of the range begins here.
    File(Pa<File>, Range<u64>, u64),
    /// Nothing more.
    End,
}

impl<A: Arch> Kernel<A> {
    /// msync: with MS_SYNC, what shared mappings of files on the disk have there is written.
    ///
    /// # Errors
    /// EINVAL for unknown flags, MS_ASYNC with MS_SYNC, or an unaligned start; ENOMEM for a hole, after the whole range
    /// was looked at, and for a range that wraps; EBUSY for MS_INVALIDATE of locked memory; EIO where the disk fails.
    pub fn msync(&self, mm: Pa<Mm>, start: u64, len: u64, flags: u64) -> Result<(), Errno> {
        let known = msync::ASYNC | msync::INVALIDATE | msync::SYNC;
        let both = msync::ASYNC | msync::SYNC;
        if flags & !known != 0 || !is_page_aligned(start) || flags & both == both {
            return Err(Errno::EINVAL);
        }
        let end = start.wrapping_add(page_align(len));
        if end < start {
            return Err(Errno::ENOMEM);
        }
        let (mut at, mut result) = (start, Ok(()));
        loop {
            let found = {
                let _guard = self.read_lock(&self.obj(mm).mmap_lock, LockClass::MmapRead);
                self.msync_next(mm, (at, end), flags, &mut result)?
            };
            // Not under the mmap_lock: it takes a while.
            let Found::File(file, range, rest) = found else {
                return result;
            };
            let written = self.file_sync(file, range);
            self.file_put(file);
            written?;
            at = rest;
        }
    }

    /// The first pages of `at..end` that are to be written. `result` is ENOMEM once a hole was found.
    fn msync_next(
        &self,
        mm: Pa<Mm>,
        (mut at, end): (u64, u64),
        flags: u64,
        result: &mut Result<(), Errno>,
    ) -> Result<Found, Errno> {
        while at < end {
            let vma = self.vma_find(self.obj(mm), at).ok_or(Errno::ENOMEM)?;
            let area = self.obj(vma);
            if area.start.get() > at {
                *result = Err(Errno::ENOMEM);
                at = area.start.get();
                if at >= end {
                    break;
                }
            }
            if flags & msync::INVALIDATE != 0 && area.flags.get() & vma_flags::LOCKED != 0 {
                return Err(Errno::EBUSY);
            }
            let (from, to) = (at, area.end.get());
            at = to;
            if flags & msync::SYNC != 0 && area.flags.get() & vma_flags::NOTIFY != 0 {
                let file = area.file.get();
                self.file_get(file);
                return Ok(Found::File(file, mapped_pages(area, from, to.min(end)), to));
            }
        }
        Ok(Found::End)
    }
}

/// The pages of its file that a VMA maps at `from..to`.
fn mapped_pages(area: &Vma, from: u64, to: u64) -> Range<u64> {
    let page = |gva: u64| area.pgoff.get() + pages(gva - area.start.get());
    page(from)..page(to)
}
