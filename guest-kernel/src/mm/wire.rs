//! Wired memory: a program's own image, stacks and words, which are not under test.
//!
//! With a soft TLB a run must be the same whatever executes the program: the processor at CPL 3, or a
//! host process in which the program's own memory is the host's. So accesses to it never fault:
//! it is populated when it is mapped and copied, not shared, when the process forks.

use core::sync::atomic::Ordering::Relaxed;

use abi::layout::PAGE_SIZE;
use abi::objects::{FrameKind, Mm, Pa, Vma, vma_flags};
use abi::param::TlbBackEnd;
use abi::pte::{Pte, PteFlags, fault};
use abi::syscall::Errno;

use super::{Field, Slot, is_page_aligned, page_align, pages};
use crate::Kernel;
use crate::arch::Arch;

impl<A: Arch> Kernel<A> {
    /// Populates `start..start + len` and marks it [`vma_flags::WIRED`]. Nothing without a soft TLB.
    ///
    /// # Errors
    /// EINVAL for a bad range, and for shared mappings of files on the disk, which write-back makes read-only; ENOMEM for a
    /// hole in it, or where memory runs out.
    pub(crate) fn wire(&self, mm: Pa<Mm>, start: u64, len: u64) -> Result<(), Errno> {
        if !is_page_aligned(start) || start.checked_add(page_align(len)).is_none() {
            return Err(Errno::EINVAL);
        }
        let end = start + page_align(len);
        let _guard = self.mmap_write_lock(self.obj(mm));
        self.wire_range(mm, start, end)
    }

    /// As [`Kernel::wire`], under the mmap_lock held for writing.
    pub(super) fn wire_range(&self, mm: Pa<Mm>, start: u64, end: u64) -> Result<(), Errno> {
        if self.config.tlb == TlbBackEnd::Hw {
            return Ok(());
        }
        let mut at = start;
        while at < end {
            let vma = self.vma_at(self.obj(mm), at).ok_or(Errno::ENOMEM)?;
            let area = self.obj(vma);
            let to = area.end.get().min(end);
            let flags = area.flags.get();
            if flags & vma_flags::NOTIFY != 0 {
                return Err(Errno::EINVAL);
            }
            let vma = self.vma_modify(mm, vma, (at, to), flags | vma_flags::WIRED)?;
            // Fork copies wired pages one by one.
            self.split_huge_range(mm, at, to);
            let access = match flags & vma_flags::WRITE {
                0 => fault::USER,
                _ => fault::USER | fault::WRITE,
            };
            while at < to {
                self.fault_in(mm, vma, at, access)
                    .map_err(|_| Errno::ENOMEM)?;
                at += PAGE_SIZE;
            }
        }
        Ok(())
    }

    /// True where fork copies the pages of a VMA with `flags`.
    pub(super) fn copies_at_fork(flags: u64) -> bool {
        flags & (vma_flags::WIRED | vma_flags::WRITE | vma_flags::SHARED)
            == vma_flags::WIRED | vma_flags::WRITE
    }

    /// Gives the child's `vma` copies of the parent's pages in it. Both mmap_locks are held for writing.
    ///
    /// # Errors
    /// ENOMEM.
    pub(super) fn copy_wired(
        &self,
        parent: Pa<Mm>,
        child: Pa<Mm>,
        vma: Pa<Vma>,
    ) -> Result<(), Errno> {
        self.anon_vma_prepare(child, vma)?;
        let (new, area) = (self.obj(child), self.obj(vma));
        let (start, end) = (area.start.get(), area.end.get());
        let mut gva = start;
        while gva < end {
            // The parent's pages stay as they are: nothing reclaims them, and its mmap_lock is held.
            let table = self
                .leaf_table(self.obj(parent), gva)
                .map_err(|_| Errno::ENOMEM)?;
            let entry = self.read_pte(Slot::new(table, 1, gva));
            if entry.is_present() {
                let copy = self.alloc_charged(child, 0, FrameKind::Anon)?;
                self.arch.copy_frame(entry.address(), copy);
                let table = self
                    .leaf_table_alloc(child, gva)
                    .inspect_err(|_| self.free_frames(copy))?;
                let _guard = self.lock_table(table);
                let index = area.pgoff.get() + pages(gva - start);
                self.folio_map_new(copy, area.anon_vma.load(Relaxed), index);
                let flags = entry.flags() | PteFlags::WRITE | PteFlags::DIRTY;
                let slot = Slot::new(table, 1, gva);
                self.set_pte(new, gva, slot, Pte::NONE, Pte::new(copy, flags));
            }
            gva += PAGE_SIZE;
        }
        Ok(())
    }
}
