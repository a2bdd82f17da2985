//! Faulting memory in ahead of its use (Linux 6.18's mm/gup.c: `__mm_populate`, `faultin_page_range`).

use abi::layout::PAGE_SIZE;
use abi::lock::LockClass;
use abi::objects::{Mm, Pa, vma_flags};
use abi::pte::fault;
use abi::syscall::Errno;

use super::vma::ACCESS;
use super::{FaultError, Field, page_of};
use crate::Kernel;
use crate::arch::Arch;

/// What a VMA that cannot be populated means.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Populate {
    /// Nothing: the call has succeeded already, and goes on as far as memory lasts (mmap, mlockall, brk, mremap).
    BestEffort,
    /// The call fails (mlock).
    Strict,
}

impl<A: Arch> Kernel<A> {
    /// Faults in what is mapped in `start..end`, for writing where a private mapping may be written (Linux's
    /// `populate_vma_page_range`). Mappings that lock pages as they are touched stay as they are.
    ///
    /// # Errors
    /// Where it is strict: ENOMEM for a mapping without access, EAGAIN where memory runs out (Linux's
    /// `__mlock_posix_error_return`).
    pub(super) fn populate(
        &self,
        mm: Pa<Mm>,
        (start, end): (u64, u64),
        how: Populate,
    ) -> Result<(), Errno> {
        let _guard = self.read_lock(&self.obj(mm).mmap_lock, LockClass::MmapRead);
        self.populate_range(mm, (start, end), how)
    }

    /// Locked memory that has become writable is made so at once: a later access shall not wait (Linux's
    /// `mprotect_fixup`). Under the mmap_lock held for writing.
    pub(super) fn populate_locked(&self, mm: Pa<Mm>, range: (u64, u64)) {
        // The change has succeeded, whatever becomes of this.
        let _ = self.populate_range(mm, range, Populate::BestEffort);
    }

    fn populate_range(
        &self,
        mm: Pa<Mm>,
        (start, end): (u64, u64),
        how: Populate,
    ) -> Result<(), Errno> {
        let space = self.obj(mm);
        let mut at = start;
        while at < end
            && let Some(vma) = self.vma_in(space, at, end)
        {
            let area = self.obj(vma);
            let (flags, to) = (area.flags.get(), area.end.get().min(end));
            at = at.max(area.start.get());
            let error = fault::USER
                | match flags & (vma_flags::WRITE | vma_flags::SHARED) {
                    vma_flags::WRITE => fault::WRITE,
                    _ => 0,
                };
            let skipped = flags & vma_flags::LOCKONFAULT != 0;
            while at < to && !skipped {
                match self.fault_in(mm, vma, at, error) {
                    Ok(()) => at += PAGE_SIZE,
                    Err(_) if how == Populate::BestEffort => break,
                    Err(FaultError::NoMemory) => return Err(Errno::EAGAIN),
                    Err(_) => return Err(Errno::ENOMEM),
                }
            }
            at = to;
        }
        Ok(())
    }

    /// Makes the access of page-fault `error` to the page of `gva`, as a program's would be made, but that no stack grows for it
    /// (Linux's `get_user_pages` of one page that nobody keeps). False where it is not permitted.
    pub(crate) fn fault_page(&self, mm: Pa<Mm>, gva: u64, error: u64) -> bool {
        let _guard = self.read_lock(&self.obj(mm).mmap_lock, LockClass::MmapRead);
        let page = page_of(gva);
        self.populate_access(mm, (page, page + PAGE_SIZE), error)
            .is_ok()
    }

    /// madvise's MADV_POPULATE_READ and MADV_POPULATE_WRITE: makes the accesses of page-fault `error` to all of
    /// `start..end` (Linux's `madvise_populate`). Under the mmap_lock held for reading.
    ///
    /// # Errors
    /// ENOMEM for a hole, after what lies before it was populated, and where memory runs out; EINVAL for a mapping that
    /// does not permit the access; EFAULT behind the end of a file.
    pub(super) fn populate_access(
        &self,
        mm: Pa<Mm>,
        (start, end): (u64, u64),
        error: u64,
    ) -> Result<(), Errno> {
        let needed = match error & fault::WRITE {
            0 => vma_flags::READ,
            _ => vma_flags::WRITE,
        };
        let mut at = start;
        while at < end {
            let vma = self.vma_at(self.obj(mm), at).ok_or(Errno::ENOMEM)?;
            let area = self.obj(vma);
            if area.flags.get() & ACCESS & needed == 0 {
                return Err(Errno::EINVAL);
            }
            let to = area.end.get().min(end);
            while at < to {
                self.fault_in(mm, vma, at, error)
                    .map_err(|error| match error {
                        FaultError::Bus => Errno::EFAULT,
                        _ => Errno::ENOMEM,
                    })?;
                at += PAGE_SIZE;
            }
        }
        Ok(())
    }
}
