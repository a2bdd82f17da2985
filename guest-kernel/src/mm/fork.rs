//! fork: a copy of an address space that shares every frame until one side writes (Linux's dup_mmap
//! and copy_page_range).

use core::sync::atomic::Ordering::Relaxed;

use abi::bug::Bug;
use abi::channel::Walker;
use abi::layout::PAGE_SIZE;
use abi::objects::{FrameKind, Mm, Pa, Vma, vma_flags};
use abi::point::Point;
use abi::pte::{Pte, PteFlags};
use abi::syscall::Errno;

use super::group::Effort;
use super::protect::takes_away;
use super::vma::{Area, leaf_flags};
use super::zero::is_uncounted;
use super::{Field, FreedTables, Slot, pages};
use crate::Kernel;
use crate::arch::Arch;
use crate::sync::seqcount::SeqCount;

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
        let _parent = self.mmap_write_lock(old);
        let result = {
            let _child = self.mmap_write_lock(new);
            for (from, to) in [(&old.brk_start, &new.brk_start), (&old.brk, &new.brk)] {
                to.set(from.get());
            }
            for (from, to) in old.fixup.iter().zip(&new.fixup) {
                to.store(from.load(Relaxed), Relaxed);
            }
            self.copy_limits(old, new);
            // What the parent has registered for, as Linux's dup_mm copies all of an mm.
            new.membarrier.store(old.membarrier.get(), Relaxed);
            self.join_group(parent, child)
                .and_then(|()| self.copy_vmas(parent, child))
        };
        point!(self, Point::ForkFlush, [old.id.get(), new.id.get()]);
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

    /// The child is in its parent's memory group, which pays for what it has already.
    fn join_group(&self, parent: Pa<Mm>, child: Pa<Mm>) -> Result<(), Errno> {
        let (group, new) = (self.obj(parent).group.get(), self.obj(child));
        new.group.set(group);
        self.charge(group, new.pgd.get(), Effort::Reclaim)
    }

    fn copy_vmas(&self, parent: Pa<Mm>, child: Pa<Mm>) -> Result<(), Errno> {
        let mut at = 0;
        while let Some(vma) = self.vma_find(self.obj(parent), at) {
            at = self.obj(vma).end.get();
            if !self.config.bugs.has(Bug::ForkParentVmaUnlocked) {
                self.vma_start_write(vma);
            }
            if self.obj(vma).flags.get() & vma_flags::DONTCOPY == 0 {
                self.copy_vma(parent, child, vma)?;
            }
        }
        Ok(())
    }

    fn copy_vma(&self, parent: Pa<Mm>, child: Pa<Mm>, vma: Pa<Vma>) -> Result<(), Errno> {
        let from = self.obj(vma);
        let (start, end) = (from.start.get(), from.end.get());
        let area = Area {
            start,
            end,
            // Locks are not inherited (mlock(2)).
            flags: from.flags.get() & !vma_flags::LOCKED_MASK,
            pgoff: from.pgoff.get(),
            file: from.file.get(),
        };
        let copy = self.vma_inherit(child, area, vma)?;
        // Wiped: the child's gets an anon_vma of its own with its first folio.
        let is_wiped = area.flags & vma_flags::WIPEONFORK != 0;
        if Self::needs_copy(from) && !is_wiped {
            // Before the entries: every folio that the child maps must be found in the child.
            if Self::copies_at_fork(area.flags) {
                self.copy_wired(parent, child, copy)?;
            } else {
                self.anon_vma_fork(copy, vma)?;
                let forks = SeqCount::new(&self.obj(parent).write_protect_seq);
                let _forks = forks.write();
                self.copy_entries(parent, child, copy)?;
            }
        }
        point!(self, Point::ForkCopy, [self.obj(child).id.get(), start]);
        Ok(())
    }

    fn copy_entries(&self, parent: Pa<Mm>, child: Pa<Mm>, vma: Pa<Vma>) -> Result<(), Errno> {
        let (start, end) = (self.obj(vma).start.get(), self.obj(vma).end.get());
        self.copy_huge_range(parent, child, (start, end))?;
        let mut spare = None;
        let result = self.for_each_leaf_table(
            self.obj(parent),
            Walker::Fork,
            (start, end),
            |table, from, to| {
                if self.folio(table).used.get() == 0 {
                    return Ok(());
                }
                let copy = self.leaf_table_alloc(child, from)?;
                let mut rest = from;
                loop {
                    rest = self.copy_table(
                        (parent, table),
                        (child, copy),
                        vma,
                        (rest, to),
                        &mut spare,
                    );
                    if rest == to {
                        return Ok(());
                    }
                    // Not under a page-table lock.
                    spare = Some(self.alloc_charged(child, 0, FrameKind::Anon)?);
                }
            },
        );
        if let Some(frame) = spare {
            self.free_frames(frame);
        }
        result
    }

    /// Copies the entries of one table in `start..end` for the child's `vma`. Returns where it stopped, for want of a
    /// `spare` frame for a page that a device uses.
    fn copy_table(
        &self,
        (parent, table): (Pa<Mm>, u64),
        (child, copy): (Pa<Mm>, u64),
        vma: Pa<Vma>,
        (start, end): (u64, u64),
        spare: &mut Option<u64>,
    ) -> u64 {
        let (old, new) = (self.obj(parent), self.obj(child));
        // Two page-table locks: nobody else can know the child's yet.
        let _parent = self.lock_table(table);
        let _child = self.lock_table(copy);
        let mut rest = start;
        while let Some((gva, entry)) = self.next_entry((table, 1), rest, end) {
            let slot = Slot::new(copy, 1, gva);
            if entry.is_present() && self.copies_pinned(entry) {
                let Some(frame) = spare.take() else {
                    return gva;
                };
                self.copy_pinned(child, vma, slot, (gva, entry), frame);
            } else {
                let shared = self.share_entry(entry);
                if entry != shared {
                    let entry = self.set_pte(old, gva, Slot::new(table, 1, gva), entry, shared);
                    if takes_away(entry, shared) {
                        point!(self, Point::PteProtect, [old.id.get(), gva]);
                    }
                }
                self.set_pte(new, gva, slot, Pte::NONE, shared);
                point!(self, Point::PteInstall, [new.id.get(), gva]);
            }
            rest = gva + PAGE_SIZE;
        }
        end
    }

    /// Maps `frame` in the child with what the page of the parent's `entry` holds; the parent keeps its page as it is
    /// (Linux's `copy_present_page`). Under the page-table lock of both.
    fn copy_pinned(
        &self,
        child: Pa<Mm>,
        vma: Pa<Vma>,
        slot: Slot,
        (gva, entry): (u64, Pte),
        frame: u64,
    ) {
        self.arch.copy_frame(entry.address(), frame);
        let area = self.obj(vma);
        let index = area.pgoff.get() + pages(gva - area.start.get());
        self.folio_map_new(frame, area.anon_vma.get(), index);
        let mut flags = leaf_flags(area.flags.get()) | PteFlags::DIRTY;
        if area.flags.get() & vma_flags::WRITE != 0 {
            flags |= PteFlags::WRITE;
        }
        let new = self.obj(child);
        self.set_pte(new, gva, slot, Pte::NONE, Pte::new(frame, flags));
        point!(self, Point::PteInstall, [new.id.get(), gva]);
    }

    /// What parent and child both have after fork where the parent had `entry` (Linux's copy_present_ptes).
    #[inline]
    pub(super) fn share_entry(&self, entry: Pte) -> Pte {
        if !entry.is_present() {
            return self.share_non_present(entry);
        }
        if is_uncounted(entry) {
            return entry;
        }
        let page = self.folio(entry.address());
        self.folio_share(entry.address(), page);
        if page.kind.get() == FrameKind::File as u8 {
            return entry;
        }
        entry.without(PteFlags::WRITE).with(PteFlags::COW)
    }

    /// True where the child could not fault in by itself what the parent's VMA has (Linux's vma_needs_copy).
    fn needs_copy(area: &Vma) -> bool {
        !area.anon_vma.get().is_null() || area.flags.get() & vma_flags::WIRED != 0
    }
}
