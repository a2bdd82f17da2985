//! fork: a copy of an address space that shares every frame until one side writes (Linux's dup_mmap
//! and copy_page_range).

use core::sync::atomic::Ordering::Relaxed;

use abi::bug::Bug;
use abi::channel::Walker;
use abi::layout::PAGE_SIZE;
use abi::objects::{Mm, Pa, Vma};
use abi::point::Point;
use abi::pte::{Pte, PteFlags};
use abi::syscall::Errno;

use super::protect::takes_away;
use super::vma::Area;
use super::{Field, FreedTables, Slot};
use crate::Kernel;
use crate::arch::Arch;
use abi::lock::LockClass;

impl<A: Arch> Kernel<A> {
    /// A copy of `parent`, with one user and one reference. When it returns, no CPU can write a frame
    /// that the two share.
    ///
    /// # Errors
    /// ENOMEM; the parent's mappings are as they were, though its pages may have to fault once before
    /// they are written again.
    pub fn mm_fork(&self, parent: Pa<Mm>) -> Result<Pa<Mm>, Errno> {
        let child = self.mm_create()?;
        let (old, new) = (self.obj(parent), self.obj(child));
        let _parent = self.write_lock(&old.mmap_lock, LockClass::MmapWrite);
        let result = {
            let _child = self.write_lock(&new.mmap_lock, LockClass::MmapWrite);
            for (from, to) in [(&old.brk_start, &new.brk_start), (&old.brk, &new.brk)] {
                to.set(from.get());
            }
            for (from, to) in old.fixup.iter().zip(&new.fixup) {
                to.store(from.load(Relaxed), Relaxed);
            }
            self.copy_vmas(parent, child)
        };
        self.point(Point::ForkFlush, [old.id.get(), new.id.get()]);
        if !self.config.bugs.has(Bug::ForkNoWriteprotectFlush) {
            self.flush_mm(parent, FreedTables::No);
        }
        match result {
            Ok(()) => Ok(child),
            Err(error) => {
                self.mm_put(child);
                Err(error)
            }
        }
    }

    fn copy_vmas(&self, parent: Pa<Mm>, child: Pa<Mm>) -> Result<(), Errno> {
        let mut at = 0;
        while let Some(vma) = self.vma_find(self.obj(parent), at) {
            at = self.obj(vma).end.get();
            self.copy_vma(parent, child, vma)?;
        }
        Ok(())
    }

    fn copy_vma(&self, parent: Pa<Mm>, child: Pa<Mm>, vma: Pa<Vma>) -> Result<(), Errno> {
        let from = self.obj(vma);
        let (start, end) = (from.start.get(), from.end.get());
        let area = Area {
            start,
            end,
            flags: from.flags.get(),
            pgoff: from.pgoff.get(),
        };
        let copy = self.vma_create(child, area, None)?;
        // No anon_vma: no folio was ever mapped in it.
        if !from.anon_vma.get().is_null() {
            // Before the entries: every folio that the child maps must be found in the child.
            if Self::copies_at_fork(area.flags) {
                self.copy_wired(parent, child, copy)?;
            } else {
                self.anon_vma_fork(copy, vma)?;
                self.copy_entries(parent, child, (start, end))?;
            }
        }
        self.point(Point::ForkCopy, [self.obj(child).id.get(), start]);
        Ok(())
    }

    fn copy_entries(
        &self,
        parent: Pa<Mm>,
        child: Pa<Mm>,
        (start, end): (u64, u64),
    ) -> Result<(), Errno> {
        let (old, new) = (self.obj(parent), self.obj(child));
        self.for_each_leaf_table(old, Walker::Fork, (start, end), |table, from, to| {
            if self.folio(table).used.get() == 0 {
                return Ok(());
            }
            let copy = self.leaf_table_alloc(child, from)?;
            // Two page-table locks: nobody else can know the child's yet.
            let _parent = self.lock_table(table);
            let _child = self.lock_table(copy);
            let mut rest = from;
            while let Some((gva, entry)) = self.next_present((table, 1), rest, to) {
                let shared = entry.without(PteFlags::WRITE).with(PteFlags::COW);
                self.folio_share(entry.address());
                let entry = self.set_pte(old, gva, Slot::new(table, 1, gva), entry, shared);
                if takes_away(entry, shared) {
                    self.point(Point::PteProtect, [old.id.get(), gva]);
                }
                self.set_pte(new, gva, Slot::new(copy, 1, gva), Pte::NONE, shared);
                self.point(Point::PteInstall, [new.id.get(), gva]);
                rest = gva + PAGE_SIZE;
            }
            Ok(())
        })
    }
}
