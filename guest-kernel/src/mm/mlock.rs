//! mlock, munlock and their relatives (Linux 6.18's mm/mlock.c): pages are there, are counted, and stay: reclaim passes
//! by what a locked VMA maps (`unmap`).

use abi::layout::USER_END;
use abi::objects::{Mm, Pa, vma_flags};
use abi::syscall::{Errno, mlock, rlimit};

use super::populate::Populate;
use super::{Field, page_align, page_of, pages};
use crate::Kernel;
use crate::arch::Arch;

impl<A: Arch> Kernel<A> {
    /// mlock2; mlock is the one with no `flags`.
    ///
    /// # Errors
    /// EINVAL for unknown flags or a range that wraps; EPERM where nothing may be locked; ENOMEM for a hole, after what
    /// lies before it was locked, beyond RLIMIT_MEMLOCK, where VMAs cannot be split, and for memory without access;
    /// EAGAIN where memory runs out for what is locked then.
    pub fn mlock(&self, mm: Pa<Mm>, start: u64, len: u64, flags: u64) -> Result<(), Errno> {
        if flags & !mlock::ONFAULT != 0 {
            return Err(Errno::EINVAL);
        }
        let space = self.obj(mm);
        self.can_mlock(space)?;
        let (start, bytes) = whole_pages(start, len);
        let lock = match flags & mlock::ONFAULT {
            0 => vma_flags::LOCKED,
            _ => vma_flags::LOCKED_MASK,
        };
        {
            let _guard = self.mmap_write_lock(space);
            let limit = pages(self.limit(space, rlimit::MEMLOCK));
            let wanted = pages(bytes).saturating_add(self.counted_as_locked(space));
            // What is locked already does not count twice.
            if wanted > limit && wanted - self.locked_pages(space, start, bytes) > limit {
                return Err(Errno::ENOMEM);
            }
            self.lock_range(mm, start, bytes, lock)?;
        }
        self.populate(mm, (start, start + bytes), Populate::Strict)
    }

    /// munlock.
    ///
    /// # Errors
    /// EINVAL for a range that wraps; ENOMEM for a hole, after what lies before it was unlocked, and where VMAs cannot
    /// be split.
    pub fn munlock(&self, mm: Pa<Mm>, start: u64, len: u64) -> Result<(), Errno> {
        let (start, bytes) = whole_pages(start, len);
        let _guard = self.mmap_write_lock(self.obj(mm));
        self.lock_range(mm, start, bytes, 0)
    }

    /// mlockall.
    ///
    /// # Errors
    /// EINVAL for no flag, an unknown one, or MCL_ONFAULT alone; EPERM where nothing may be locked; ENOMEM where what is
    /// mapped exceeds RLIMIT_MEMLOCK.
    pub fn mlockall(&self, mm: Pa<Mm>, flags: u64) -> Result<(), Errno> {
        let known = mlock::ALL_CURRENT | mlock::ALL_FUTURE | mlock::ALL_ONFAULT;
        if flags == 0 || flags & !known != 0 || flags == mlock::ALL_ONFAULT {
            return Err(Errno::EINVAL);
        }
        let space = self.obj(mm);
        self.can_mlock(space)?;
        let current = flags & mlock::ALL_CURRENT != 0;
        {
            let _guard = self.mmap_write_lock(space);
            if current && space.total_vm.get() > pages(self.limit(space, rlimit::MEMLOCK)) {
                return Err(Errno::ENOMEM);
            }
            self.lock_all(mm, flags);
        }
        if current {
            // It has succeeded, whatever becomes of this.
            let _ = self.populate(mm, (0, USER_END), Populate::BestEffort);
        }
        Ok(())
    }

    /// munlockall.
    pub fn munlockall(&self, mm: Pa<Mm>) {
        let _guard = self.mmap_write_lock(self.obj(mm));
        self.lock_all(mm, 0);
    }

    /// Refuses a process that may lock nothing (Linux's `can_do_mlock`).
    ///
    /// # Errors
    /// EPERM.
    pub(super) fn can_mlock(&self, mm: &Mm) -> Result<(), Errno> {
        match self.limit(mm, rlimit::MEMLOCK) {
            0 => Err(Errno::EPERM),
            _ => Ok(()),
        }
    }

    /// Gives the VMAs of a range `lock` of [`vma_flags::LOCKED_MASK`] (Linux's `apply_vma_lock_flags`).
    fn lock_range(&self, mm: Pa<Mm>, start: u64, bytes: u64, lock: u64) -> Result<(), Errno> {
        let end = start.checked_add(bytes).ok_or(Errno::EINVAL)?;
        let mut at = start;
        while at < end {
            let vma = self.vma_at(self.obj(mm), at).ok_or(Errno::ENOMEM)?;
            let area = self.obj(vma);
            let to = area.end.get().min(end);
            let flags = area.flags.get() & !vma_flags::LOCKED_MASK | lock;
            if flags != area.flags.get() {
                self.vma_modify(mm, vma, (at, to), flags)?;
            }
            at = to;
        }
        Ok(())
    }

    /// Linux's `apply_mlockall_flags`.
    fn lock_all(&self, mm: Pa<Mm>, flags: u64) {
        let space = self.obj(mm);
        let lock = match flags & mlock::ALL_ONFAULT {
            0 => vma_flags::LOCKED,
            _ => vma_flags::LOCKED_MASK,
        };
        let given = |which: u64| if flags & which != 0 { lock } else { 0 };
        space.def_flags.set(given(mlock::ALL_FUTURE));
        if flags & mlock::ALL_FUTURE != 0 && flags & mlock::ALL_CURRENT == 0 {
            return;
        }
        let mut at = 0;
        while let Some(vma) = self.vma_find(space, at) {
            let area = self.obj(vma);
            at = area.end.get();
            let new = area.flags.get() & !vma_flags::LOCKED_MASK | given(mlock::ALL_CURRENT);
            if new != area.flags.get() {
                // A merge that memory does not suffice for is an error that Linux ignores too.
                let _ = self.vma_modify(mm, vma, (area.start.get(), at), new);
            }
        }
    }

    /// Pages of a range that are locked (Linux's `count_mm_mlocked_page_nr`).
    fn locked_pages(&self, mm: &Mm, start: u64, bytes: u64) -> u64 {
        let end = start.saturating_add(bytes);
        let (mut at, mut locked) = (start, 0);
        while at < end
            && let Some(vma) = self.vma_in(mm, at, end)
        {
            let area = self.obj(vma);
            let to = area.end.get().min(end);
            if area.flags.get() & vma_flags::LOCKED != 0 {
                locked += pages(to - at.max(area.start.get()));
            }
            at = to;
        }
        locked
    }
}

/// The pages that hold `len` bytes from `start`: first address, bytes (0 where that wraps, as in Linux).
fn whole_pages(start: u64, len: u64) -> (u64, u64) {
    let first = page_of(start);
    (first, page_align(len.wrapping_add(start - first)))
}
