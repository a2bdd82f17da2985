//! mmap, munmap and brk, with Linux 6.18's rules and errno (mm/mmap.c, mm/vma.c).
//!
//! Memory is never accounted ahead (Linux's vm.overcommit_memory=1), and there are no resource limits
//! but that of the stack.

use abi::bug::Bug;
use abi::layout::{MMAP_BASE, PAGE_SIZE, USER_END, USER_MIN};
use abi::objects::{Mm, Pa, vma_flags};
use abi::pte::fault;
use abi::syscall::{Errno, map, prot};

use super::gather::{Gather, Unmap};
use super::merge::Join;
use super::vma::{ACCESS, Area, MAX_MAP_COUNT, Spare, prot_flags};
use super::vma_tree::STACK_GUARD;
use super::{Field, is_page_aligned, page_align, page_of};
use crate::Kernel;
use crate::arch::Arch;
use abi::lock::LockClass;

impl<A: Arch> Kernel<A> {
    /// mmap of private anonymous memory. `prot` and `flags` are Linux's. MAP_LOCKED populates, as
    /// nothing is ever paged out.
    ///
    /// # Errors
    /// Linux's: EBADF without MAP_ANONYMOUS, EINVAL for a zero length, bad alignment or bad flags
    /// (MAP_SHARED and MAP_HUGETLB are refused so too), EEXIST for MAP_FIXED_NOREPLACE, EPERM below the
    /// least address, ENOMEM.
    pub fn mmap(
        &self,
        mm: Pa<Mm>,
        address: u64,
        len: u64,
        prot: u64,
        flags: u64,
    ) -> Result<u64, Errno> {
        if flags & map::ANONYMOUS == 0 {
            return Err(Errno::EBADF);
        }
        if len == 0 || flags & map::HUGETLB != 0 {
            return Err(Errno::EINVAL);
        }
        let bytes = page_align(len);
        let start = {
            let _guard = self.write_lock(&self.obj(mm).mmap_lock, LockClass::MmapWrite);
            let start = self.place(self.obj(mm), address, bytes, flags)?;
            if flags & map::TYPE != map::PRIVATE {
                return Err(Errno::EINVAL);
            }
            let area = Area::anonymous(start, start + bytes, mmap_flags(prot, flags));
            self.map_area(mm, area)?;
            start
        };
        if flags & (map::POPULATE | map::LOCKED) != 0 && flags & map::NONBLOCK == 0 {
            self.populate(mm, start, start + bytes, prot);
        }
        Ok(start)
    }

    /// munmap.
    ///
    /// # Errors
    /// EINVAL for an unaligned, empty or overlong range; ENOMEM where a VMA cannot be split.
    pub fn munmap(&self, mm: Pa<Mm>, start: u64, len: u64) -> Result<(), Errno> {
        if !is_page_aligned(start) || start > USER_END || len > USER_END - start {
            return Err(Errno::EINVAL);
        }
        let end = start + page_align(len);
        if end == start {
            return Err(Errno::EINVAL);
        }
        let guard = self.write_lock(&self.obj(mm).mmap_lock, LockClass::MmapWrite);
        self.split_edges(mm, start, end)?;
        let mut gather = self.gather(mm, Unmap::Syscall);
        self.unmap_into(&mut gather, start, end);
        if self.config.bugs.has(Bug::MunmapFlushAfterUnlock) {
            drop(guard);
        }
        self.gather_finish(gather);
        Ok(())
    }

    /// brk: moves the end of the heap to `address` where that is possible. Returns where it is.
    pub fn brk(&self, mm: Pa<Mm>, address: u64) -> u64 {
        let space = self.obj(mm);
        let _guard = self.write_lock(&space.mmap_lock, LockClass::MmapWrite);
        if self.move_brk(mm, address).is_ok() {
            space.brk.set(address);
        }
        space.brk.get()
    }

    fn move_brk(&self, mm: Pa<Mm>, address: u64) -> Result<(), Errno> {
        let space = self.obj(mm);
        let brk = space.brk.get();
        if address < space.brk_start.get() || address > USER_END {
            return Err(Errno::EINVAL);
        }
        let (old, new) = (page_align(brk), page_align(address));
        if new == old {
            return Ok(());
        }
        if address <= brk {
            // The heap may have been unmapped behind its back.
            self.vma_in(space, new, old).ok_or(Errno::EINVAL)?;
            return self.unmap_range(mm, new, old);
        }
        // One page and the guard of a stack stay free above it.
        let limit = new + PAGE_SIZE;
        let above = self
            .vma_find(space, old)
            .is_some_and(|vma| self.guarded_start(vma) < limit);
        if new > USER_END || above {
            return Err(Errno::ENOMEM);
        }
        let flags = vma_flags::READ | vma_flags::WRITE | vma_flags::ACCOUNT | vma_flags::HEAP;
        let area = Area::anonymous(old, new, flags);
        if space.map_count.get() > MAX_MAP_COUNT {
            return Err(Errno::ENOMEM);
        }
        if self.merge_new(mm, area, Join::Before)?.is_none() {
            self.vma_create(mm, area, None)?;
        }
        Ok(())
    }

    /// Unmaps `start..end`, page aligned. Under the mmap_lock held for writing.
    ///
    /// # Errors
    /// ENOMEM where a VMA at an edge cannot be split; nothing is unmapped then.
    pub(super) fn unmap_range(&self, mm: Pa<Mm>, start: u64, end: u64) -> Result<(), Errno> {
        self.split_edges(mm, start, end)?;
        self.unmap_vmas(mm, start, end, Unmap::Syscall);
        Ok(())
    }

    /// Makes VMAs end where `start..end` does.
    fn split_edges(&self, mm: Pa<Mm>, start: u64, end: u64) -> Result<(), Errno> {
        let space = self.obj(mm);
        if let Some(vma) = self.vma_at(space, start)
            && self.obj(vma).start.get() < start
        {
            if self.obj(vma).end.get() > end {
                self.check_map_count(mm)?;
            }
            self.vma_split(mm, vma, start)?;
        }
        if let Some(vma) = self.vma_at(space, end)
            && self.obj(vma).start.get() < end
        {
            self.vma_split(mm, vma, end)?;
        }
        Ok(())
    }

    /// Unmaps the VMAs of `start..end`, none of which reaches beyond it.
    pub(super) fn unmap_vmas(&self, mm: Pa<Mm>, start: u64, end: u64, by: Unmap) {
        let mut gather = self.gather(mm, by);
        self.unmap_into(&mut gather, start, end);
        self.gather_finish(gather);
    }

    fn unmap_into(&self, gather: &mut Gather, start: u64, end: u64) {
        let space = self.obj(gather.mm);
        let Some(first) = self.vma_in(space, start, end) else {
            return;
        };
        let from = self.obj(first).start.get();
        let mut to = from;
        while let Some(vma) = self.vma_in(space, start, end) {
            let area = self.obj(vma);
            to = area.end.get();
            self.vma_detach(space, vma);
            self.zap_range(gather, area.start.get(), to);
            // Off all lists before its tables go: a walk must not enter them any more.
            gather.chains = self.unlink_chains(vma, gather.chains);
            self.slab_free(vma);
        }
        let floor = self
            .vma_before(space, from)
            .map_or(0, |vma| self.obj(vma).end.get());
        let ceiling = self
            .vma_find(space, to)
            .map_or(USER_END + PAGE_SIZE, |vma| self.obj(vma).start.get());
        self.unlink_tables(gather, (from, to), (floor, ceiling));
    }

    /// Maps `area`, in place of what is there.
    fn map_area(&self, mm: Pa<Mm>, area: Area) -> Result<(), Errno> {
        let space = self.obj(mm);
        if space.map_count.get() > MAX_MAP_COUNT {
            return Err(Errno::ENOMEM);
        }
        let mut spare: Option<Spare> = None;
        if self.vma_in(space, area.start, area.end).is_some() {
            // What is there must not be lost to a failure that comes after.
            let set_aside = self.spare(space)?;
            if let Err(error) = self.unmap_range(mm, area.start, area.end) {
                self.free_spare(set_aside);
                return Err(error);
            }
            spare = Some(set_aside);
        }
        // Out of memory for a merge: the area becomes a VMA of its own, as in Linux.
        if let Ok(Some(_)) = self.merge_new(mm, area, Join::Both) {
            if let Some(spare) = spare {
                self.free_spare(spare);
            }
            return Ok(());
        }
        self.vma_create(mm, area, spare)?;
        Ok(())
    }

    /// Where a mapping goes (Linux's get_unmapped_area, top-down).
    fn place(&self, mm: &Mm, address: u64, bytes: u64, flags: u64) -> Result<u64, Errno> {
        if bytes == 0 || bytes > USER_END {
            return Err(Errno::ENOMEM);
        }
        if flags & (map::FIXED | map::FIXED_NOREPLACE) != 0 {
            if address > USER_END - bytes {
                return Err(Errno::ENOMEM);
            }
            if !is_page_aligned(address) {
                return Err(Errno::EINVAL);
            }
            if address < USER_MIN {
                return Err(Errno::EPERM);
            }
            let taken = flags & map::FIXED_NOREPLACE != 0
                && self.vma_in(mm, address, address + bytes).is_some();
            return if taken {
                Err(Errno::EEXIST)
            } else {
                Ok(address)
            };
        }
        let hint = page_of(address);
        if hint != 0 && hint.max(USER_MIN) <= USER_END - bytes {
            let hint = hint.max(USER_MIN);
            let free = self
                .vma_find(mm, hint)
                .is_none_or(|vma| hint + bytes <= self.guarded_start(vma));
            if free {
                return Ok(hint);
            }
        }
        self.find_hole(mm, bytes, USER_MIN, MMAP_BASE)
            .ok_or(Errno::ENOMEM)
    }

    /// The start of a VMA, or of the guard below it (Linux's vm_start_gap).
    fn guarded_start(&self, vma: Pa<abi::objects::Vma>) -> u64 {
        let area = self.obj(vma);
        if area.flags.get() & vma_flags::GROWSDOWN != 0 {
            area.start.get().saturating_sub(STACK_GUARD)
        } else {
            area.start.get()
        }
    }

    /// Faults `start..end` in, as far as memory lasts: mmap has succeeded already.
    fn populate(&self, mm: Pa<Mm>, start: u64, end: u64, prot: u64) {
        if prot_flags(prot) & ACCESS == 0 {
            return;
        }
        let error = if prot & prot::WRITE != 0 {
            fault::WRITE | fault::USER
        } else {
            fault::USER
        };
        let mut gva = start;
        while gva < end && self.handle_fault(mm, gva, error).is_ok() {
            gva += PAGE_SIZE;
        }
    }
}

/// The `vma_flags` of a new mapping.
fn mmap_flags(prot: u64, flags: u64) -> u64 {
    let mut vma = prot_flags(prot);
    for (given, means) in [
        (map::GROWSDOWN, vma_flags::GROWSDOWN),
        (map::NORESERVE, vma_flags::NORESERVE),
        (map::STACK, vma_flags::NOHUGEPAGE),
    ] {
        if flags & given != 0 {
            vma |= means;
        }
    }
    if vma & (vma_flags::WRITE | vma_flags::NORESERVE) == vma_flags::WRITE {
        vma |= vma_flags::ACCOUNT;
    }
    vma
}
