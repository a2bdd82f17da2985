//! What asks for migration: move_pages(2), which with one node only tells where pages are, and two calls of the testbed
//! that move them.

use abi::channel::Walker;
use abi::layout::{PAGE_SHIFT, PAGE_SIZE, USER_END};
use abi::lock::LockClass;
use abi::objects::{FrameKind, Mm, Pa};
use abi::syscall::Errno;

use super::migrate::Isolated;
use super::zero::is_uncounted;
use super::{Field, is_page_aligned, page_align, page_of};
use crate::Kernel;
use crate::arch::Arch;

impl<A: Arch> Kernel<A> {
    /// What move_pages tells of the page at `gva`: its node, or an error (Linux's `do_pages_stat_array` and
    /// `__add_folio_for_migration`).
    pub(crate) fn page_status(&self, mm: Pa<Mm>, gva: u64) -> Result<u32, Errno> {
        let space = self.obj(mm);
        let _guard = self.read_lock(&space.mmap_lock, LockClass::MmapRead);
        if self.vma_at(space, gva).is_none() {
            return Err(Errno::EFAULT);
        }
        match self.leaf_told(space, gva) {
            Some((_, entry)) if is_uncounted(entry) => Err(Errno::EFAULT),
            Some(_) => Ok(0),
            None => Err(Errno::ENOENT),
        }
    }

    /// Moves the folios that `start..start + len` maps to other frames; returns how many have moved. A folio that somebody
    /// uses stays.
    ///
    /// # Errors
    /// EINVAL for a bad range, ENOMEM where there is no frame for the first.
    pub(crate) fn migrate_range(&self, mm: Pa<Mm>, start: u64, len: u64) -> Result<u64, Errno> {
        let end = start.wrapping_add(page_align(len));
        if !is_page_aligned(start) || end < start || end > USER_END {
            return Err(Errno::EINVAL);
        }
        let (mut at, mut moved) = (start, 0);
        while let Some((gva, folio)) = self.isolate_next(mm, at, end) {
            at = gva + PAGE_SIZE;
            let kind = self.kind_of(&folio);
            match self.alloc_frames(0, kind) {
                Ok(to) => moved += u64::from(self.migrate_folio(folio, to).is_ok()),
                Err(error) => {
                    self.put_isolated(folio);
                    return if moved == 0 { Err(error) } else { Ok(moved) };
                }
            }
        }
        Ok(moved)
    }

    /// Moves the folios that `mm` maps to the lowest free frames, as far as those lie below them; returns how many have
    /// moved. The two scanners of Linux's mm/compaction.c, of which the one for folios goes along the page tables:
    /// what it finds there stays while it is looked at.
    pub(crate) fn compact(&self, mm: Pa<Mm>) -> u64 {
        let mut free = self.root().first_frame.get();
        let (mut at, mut moved) = (0, 0);
        while let Some((gva, folio)) = self.isolate_next(mm, at, USER_END) {
            at = gva + PAGE_SIZE;
            let frame = folio.gpa() >> PAGE_SHIFT;
            match self.take_lowest(free..frame, self.kind_of(&folio)) {
                Some(to) => {
                    free = (to >> PAGE_SHIFT) + 1;
                    moved += u64::from(self.migrate_folio(folio, to).is_ok());
                }
                None => self.put_isolated(folio),
            }
        }
        moved
    }

    fn kind_of(&self, folio: &Isolated) -> FrameKind {
        match self.folio(folio.gpa()).kind.get() {
            kind if kind == FrameKind::File as u8 => FrameKind::File,
            _ => FrameKind::Anon,
        }
    }

    /// Isolates the next folio that is mapped in `start..end`: its address there, and the folio.
    fn isolate_next(&self, mm: Pa<Mm>, start: u64, end: u64) -> Option<(u64, Isolated)> {
        let space = self.obj(mm);
        let _guard = self.read_lock(&space.mmap_lock, LockClass::MmapRead);
        let range = (page_of(start), end);
        let found = self.for_each_leaf_table(space, Walker::Migrate, range, |table, from, to| {
            let _guard = self.lock_table(table);
            let mut rest = from;
            while let Some((gva, entry)) = self.next_entry((table, 1), rest, to) {
                if let Some(folio) = self.isolate(entry) {
                    return Err((gva, folio));
                }
                rest = gva + PAGE_SIZE;
            }
            Ok(())
        });
        found.err()
    }
}
