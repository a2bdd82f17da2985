//! mmap, munmap and brk, with Linux 6.18's rules and errno (mm/mmap.c, mm/vma.c).
//!
//! Memory is never accounted ahead (Linux's vm.overcommit_memory=1).

use abi::bug::Bug;
use abi::layout::{HUGE_PAGE_SIZE, MMAP_BASE, PAGE_SIZE, USER_END, USER_MIN};
use abi::lock::LockClass;
use abi::objects::{File, Mm, Pa, vma_flags};
use abi::syscall::{Errno, decode, map, rlimit};

use super::gather::{Gather, Unmap};
use super::merge::{Join, Origin};
use super::populate::Populate;
use super::vma::{Area, MAX_MAP_COUNT, Spare, prot_flags};
use super::vma_tree::STACK_GUARD;
use super::{Field, MAX_FILE_BYTES, is_page_aligned, page_align, page_of, pages};
use crate::Kernel;
use crate::arch::Arch;

/// Where MAP_32BIT maps (Linux's arch/x86/kernel/sys_x86_64.c, find_start_end), without its randomness.
const LOW_RANGE: (u64, u64) = (0x4000_0000, 0x8000_0000);
/// Where bottom-up searches begin (Linux's TASK_UNMAPPED_BASE).
const BOTTOM_UP_BASE: u64 = page_align(USER_END / 3);

impl<A: Arch> Kernel<A> {
    /// mmap of anonymous memory: private, or a file of its own where it is shared. `prot` and `flags` are
    /// Linux's. MAP_LOCKED populates, and what it maps is never paged out.
    ///
    /// # Errors
    /// As [`Kernel::mmap_of`].
    pub fn mmap(
        &self,
        mm: Pa<Mm>,
        address: u64,
        len: u64,
        prot: u64,
        flags: u64,
    ) -> Result<u64, Errno> {
        self.mmap_of(mm, address, len, (prot, flags), Backing::Anonymous)
    }

    /// mmap of `backing`, which MAP_ANONYMOUS in the flags agrees with.
    ///
    /// # Errors
    /// Linux's, in its order: EBADF where MAP_ANONYMOUS is missing, EINVAL for a zero length and MAP_HUGETLB, ENOMEM,
    /// EINVAL for bad alignment, EPERM below the least address, EEXIST for MAP_FIXED_NOREPLACE, EOVERFLOW for
    /// pages that no file can have, EINVAL for bad flags (a stack that is shared or of a file, too), EOPNOTSUPP for
    /// flags that MAP_SHARED_VALIDATE does not know, ENODEV for what cannot be mapped.
    pub fn mmap_of(
        &self,
        mm: Pa<Mm>,
        address: u64,
        len: u64,
        (prot, flags): (u64, u64),
        backing: Backing,
    ) -> Result<u64, Errno> {
        if flags & map::ANONYMOUS == 0 && backing == Backing::Anonymous {
            return Err(Errno::EBADF);
        }
        if len == 0 || flags & map::HUGETLB != 0 {
            return Err(Errno::EINVAL);
        }
        let bytes = page_align(len);
        let space = self.obj(mm);
        let (start, locked) = {
            let _guard = self.mmap_write_lock(space);
            let hint = round_hint(address, flags);
            let is_private = flags & map::SHARED == 0 && backing == Backing::Anonymous;
            let start = self.place(space, (hint, bytes), flags, is_private)?;
            if flags & map::LOCKED != 0 {
                self.can_mlock(space)?;
            }
            let vma = mmap_flags(prot, flags) | space.def_flags.get();
            self.may_lock(space, vma, bytes)?;
            let vma = accounted(vma | backing.check(flags, bytes)?);
            self.map_backing(mm, (start, start + bytes), vma, backing)?;
            (start, vma & vma_flags::LOCKED != 0)
        };
        if locked || flags & (map::POPULATE | map::NONBLOCK) == map::POPULATE {
            // It has succeeded, whatever becomes of this.
            let _ = self.populate(mm, (start, start + bytes), Populate::BestEffort);
        }
        Ok(start)
    }

    /// Maps `start..end` of `backing`, in place of what is there.
    fn map_backing(
        &self,
        mm: Pa<Mm>,
        (start, end): (u64, u64),
        flags: u64,
        backing: Backing,
    ) -> Result<(), Errno> {
        let mut area = Area::anonymous(start, end, flags);
        match backing {
            Backing::File(file, pgoff) => {
                (area.file, area.pgoff) = (file, pgoff);
                if flags & vma_flags::SHARED != 0 && self.file_on_disk(file) {
                    area.flags |= vma_flags::NOTIFY;
                }
            }
            // A file without a name, of the mapping's size (Linux's shmem_zero_setup).
            _ if flags & vma_flags::SHARED != 0 => {
                (area.file, area.pgoff) = (self.file_create()?, 0);
                self.obj(area.file).size.set(end - start);
            }
            _ => {}
        }
        let result = self.map_area(mm, area);
        if backing == Backing::Anonymous && !area.file.is_null() {
            self.file_put(area.file);
        }
        result
    }

    /// munmap.
    ///
    /// # Errors
    /// EINVAL for an unaligned, empty or overlong range; ENOMEM where a VMA cannot be split.
    pub fn munmap(&self, mm: Pa<Mm>, start: u64, len: u64) -> Result<(), Errno> {
        let end = unmap_end(start, len)?;
        let guard = self.mmap_write_lock(self.obj(mm));
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
        let (old, new) = {
            let _guard = self.mmap_write_lock(space);
            let old = space.brk.get();
            if self.move_brk(mm, address).is_ok() {
                space.brk.set(address);
            }
            (old, space.brk.get())
        };
        if new > old && space.def_flags.get() & vma_flags::LOCKED != 0 {
            // It has succeeded, whatever becomes of this.
            let range = (page_align(old), page_align(new));
            let _ = self.populate(mm, range, Populate::BestEffort);
        }
        new
    }

    fn move_brk(&self, mm: Pa<Mm>, address: u64) -> Result<(), Errno> {
        let space = self.obj(mm);
        let brk = space.brk.get();
        if address < space.brk_start.get() || address > USER_END {
            return Err(Errno::EINVAL);
        }
        // Linux's check_data_rlimit; there is no data segment beside the heap.
        if address - space.brk_start.get() > self.limit(space, rlimit::DATA) {
            return Err(Errno::ENOMEM);
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
        self.may_lock(space, space.def_flags.get(), new - old)?;
        let flags = vma_flags::READ
            | vma_flags::WRITE
            | vma_flags::ACCOUNT
            | vma_flags::HEAP
            | space.def_flags.get();
        let area = Area::anonymous(old, new, flags);
        self.may_expand(space, flags, pages(new - old))?;
        if space.map_count.get() > MAX_MAP_COUNT {
            return Err(Errno::ENOMEM);
        }
        if self
            .merge_new(mm, area, Join::Before, Origin::Fresh)?
            .is_none()
        {
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
    pub(super) fn split_edges(&self, mm: Pa<Mm>, start: u64, end: u64) -> Result<(), Errno> {
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
            self.file_unlink(vma);
            self.slab_free(vma);
        }
        let hole = self.hole_around(space, from, to);
        self.unlink_tables(gather, (from, to), hole);
    }

    /// The hole that `start..end`, where nothing is mapped, is part of: tables that lie in it are nobody's.
    pub(super) fn hole_around(&self, mm: &Mm, start: u64, end: u64) -> (u64, u64) {
        let floor = self
            .vma_before(mm, start)
            .map_or(0, |vma| self.obj(vma).end.get());
        let ceiling = self
            .vma_find(mm, end)
            .map_or(USER_END + PAGE_SIZE, |vma| self.obj(vma).start.get());
        (floor, ceiling)
    }

    /// Maps `area`, in place of what is there.
    fn map_area(&self, mm: Pa<Mm>, area: Area) -> Result<(), Errno> {
        let space = self.obj(mm);
        if space.map_count.get() > MAX_MAP_COUNT {
            return Err(Errno::ENOMEM);
        }
        // In the order of Linux's __mmap_setup, which leaves VMAs split where the limit refuses the mapping then.
        self.split_edges(mm, area.start, area.end)?;
        // What is replaced does not count, whatever it was.
        let replaced = self.mapped_pages(space, area.start, area.end);
        let more = pages(area.end - area.start) - replaced;
        self.may_expand(space, area.flags, more)?;
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
        if let Ok(Some(_)) = self.merge_new(mm, area, Join::Both, Origin::Fresh) {
            if let Some(spare) = spare {
                self.free_spare(spare);
            }
            return Ok(());
        }
        self.vma_create(mm, area, spare)?;
        Ok(())
    }

    /// Pages of `start..end` that are mapped.
    fn mapped_pages(&self, mm: &Mm, start: u64, end: u64) -> u64 {
        let (mut at, mut mapped) = (start, 0);
        while at < end
            && let Some(vma) = self.vma_in(mm, at, end)
        {
            let area = self.obj(vma);
            let to = area.end.get().min(end);
            mapped += pages(to - at.max(area.start.get()));
            at = to;
        }
        mapped
    }

    /// Where a mapping of `bytes` goes, with a hint or a fixed address (Linux's get_unmapped_area). One of whole folios of
    /// 2 MiB that is private and anonymous begins with one, if there is no hint.
    pub(super) fn place(
        &self,
        mm: &Mm,
        (address, bytes): (u64, u64),
        flags: u64,
        is_private: bool,
    ) -> Result<u64, Errno> {
        if bytes == 0 || bytes > USER_END {
            return Err(Errno::ENOMEM);
        }
        if flags & (map::FIXED | map::FIXED_NOREPLACE) != 0 {
            // Linux's __get_unmapped_area takes such an address for the error that it looks like.
            decode(address)?;
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
        if is_private && hint == 0 && bytes.is_multiple_of(HUGE_PAGE_SIZE) {
            // In a hole that is larger by one folio, at the first boundary above its start, though that may be on one itself
            // (Linux's __thp_get_unmapped_area).
            let padded = bytes + HUGE_PAGE_SIZE;
            if let Ok(at) = self.search(mm, hint, padded, flags) {
                return Ok((at / HUGE_PAGE_SIZE + 1) * HUGE_PAGE_SIZE);
            }
        }
        self.search(mm, hint, bytes, flags)
    }

    /// A hole for `bytes`: at `hint`, or top-down, and bottom-up for MAP_32BIT and where that fails (Linux's
    /// arch_get_unmapped_area_topdown).
    fn search(&self, mm: &Mm, hint: u64, bytes: u64, flags: u64) -> Result<u64, Errno> {
        let (low, high) = match flags & map::BITS_32 {
            0 => (USER_MIN, USER_END),
            _ => LOW_RANGE,
        };
        if hint != 0 && hint.checked_add(bytes).is_some_and(|end| end <= high) {
            let free = self
                .vma_find(mm, hint)
                .is_none_or(|vma| hint + bytes <= self.guarded_start(vma));
            if free && hint < USER_MIN {
                return Err(Errno::EPERM);
            }
            if free {
                return Ok(hint);
            }
        }
        if flags & map::BITS_32 != 0 {
            return self.lowest_hole(mm, bytes, low, high);
        }
        self.find_hole(mm, bytes, low, MMAP_BASE)
            .ok_or(Errno::ENOMEM)
            .or_else(|_| self.lowest_hole(mm, bytes, BOTTOM_UP_BASE, high))
    }

    /// The lowest address of a hole of `bytes` in `low..high`, away from the guards below stacks (Linux's
    /// `vm_unmapped_area`, bottom-up). Looks at every VMA there: it is the last resort.
    fn lowest_hole(&self, mm: &Mm, bytes: u64, low: u64, high: u64) -> Result<u64, Errno> {
        let mut at = low;
        while bytes <= high.saturating_sub(at) {
            match self.vma_find(mm, at) {
                Some(vma) if at + bytes > self.guarded_start(vma) => at = self.obj(vma).end.get(),
                _ => return Ok(at),
            }
        }
        Err(Errno::ENOMEM)
    }

    /// Which byte of which file `gva` is: the file, its generation, as another may have its memory later, and the byte. In shared
    /// memory, and in a private mapping that cannot be written where it is the file's own page.
    pub(crate) fn file_place(&self, mm: Pa<Mm>, gva: u64, is_writable: bool) -> Option<[u64; 3]> {
        let space = self.obj(mm);
        let _guard = self.read_lock(&space.mmap_lock, LockClass::MmapRead);
        let area = self.obj(self.vma_at(space, gva)?);
        let file = area.file.get().some()?;
        let is_copied = || {
            is_writable
                || self
                    .leaf_at(space, gva)
                    .is_some_and(|(_, entry)| !self.is_file_page(entry))
        };
        if area.flags.get() & vma_flags::SHARED == 0 && is_copied() {
            return None;
        }
        let byte = area.pgoff.get() * PAGE_SIZE + (gva - area.start.get());
        Some([file.0, self.obj(file).generation.get().into(), byte])
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
}

/// The end of the range of a munmap.
///
/// # Errors
/// EINVAL for an unaligned, empty or overlong range.
pub(super) fn unmap_end(start: u64, len: u64) -> Result<u64, Errno> {
    if !is_page_aligned(start) || start > USER_END || len > USER_END - start {
        return Err(Errno::EINVAL);
    }
    let end = start + page_align(len);
    if end == start {
        return Err(Errno::EINVAL);
    }
    Ok(end)
}

/// What a hint below the least address is taken for (Linux's round_hint_to_min).
fn round_hint(address: u64, flags: u64) -> u64 {
    let hint = page_of(address);
    if flags & (map::FIXED | map::FIXED_NOREPLACE) != 0 || hint == 0 {
        return address;
    }
    hint.max(USER_MIN)
}

/// The `vma_flags` of a new mapping.
fn mmap_flags(prot: u64, flags: u64) -> u64 {
    let mut vma = prot_flags(prot);
    for (given, means) in [
        (map::GROWSDOWN, vma_flags::GROWSDOWN),
        (map::LOCKED, vma_flags::LOCKED),
        (map::NORESERVE, vma_flags::NORESERVE),
        (map::STACK, vma_flags::NOHUGEPAGE),
    ] {
        if flags & given != 0 {
            vma |= means;
        }
    }
    vma
}

/// `vma` with ACCOUNT where it counts against memory: private and writable, a file's too (Linux's
/// accountable_mapping).
fn accounted(vma: u64) -> u64 {
    let counts = vma_flags::WRITE | vma_flags::NORESERVE | vma_flags::SHARED;
    if vma & counts == vma_flags::WRITE {
        vma | vma_flags::ACCOUNT
    } else {
        vma
    }
}

/// What a mapping maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Memory of its own.
    Anonymous,
    /// A file, from this page on.
    File(Pa<File>, u64),
    /// What a descriptor refers to that cannot be mapped.
    Unmappable,
}

impl Backing {
    /// What do_mmap checks once it has a place: the `vma_flags` of the sharing that `flags` ask for.
    fn check(self, flags: u64, bytes: u64) -> Result<u64, Errno> {
        if let Self::File(_, pgoff) = self {
            let room = MAX_FILE_BYTES.checked_sub(bytes).ok_or(Errno::EOVERFLOW)?;
            if pgoff > pages(room) {
                return Err(Errno::EOVERFLOW);
            }
        }
        let sharing = match flags & map::TYPE {
            map::PRIVATE => 0,
            map::SHARED => vma_flags::SHARED,
            map::SHARED_VALIDATE if self != Self::Anonymous => {
                if flags & !LEGACY_MAP_MASK != 0 {
                    return Err(Errno::EOPNOTSUPP);
                }
                vma_flags::SHARED
            }
            _ => return Err(Errno::EINVAL),
        };
        if self == Self::Unmappable {
            return Err(Errno::ENODEV);
        }
        let special = sharing != 0 || self != Self::Anonymous;
        if special && flags & map::GROWSDOWN != 0 {
            return Err(Errno::EINVAL);
        }
        Ok(sharing)
    }
}

/// The flags that MAP_SHARED_VALIDATE knows (Linux's include/linux/mman.h).
const LEGACY_MAP_MASK: u64 = map::SHARED
    | map::PRIVATE
    | map::FIXED
    | map::ANONYMOUS
    | 0x40 // MAP_32BIT
    | 0x80 // MAP_ABOVE4G
    | map::GROWSDOWN
    | map::DENYWRITE
    | map::EXECUTABLE
    | map::LOCKED
    | map::NORESERVE
    | map::POPULATE
    | map::NONBLOCK
    | map::STACK
    | map::HUGETLB
    | 21 << 26 // MAP_HUGE_2MB
    | 30 << 26; // MAP_HUGE_1GB
