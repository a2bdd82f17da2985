//! Dirty pages of files on the disk, and their way back there (Linux's mm/page-writeback.c, mm/filemap.c, and of mm/rmap.c
//! folio_mkclean).
//!
//! A page is dirty ([`DIRTY`](folio_state::DIRTY)) where it may differ from what the disk holds. Shared mappings map it
//! read-only; the first write faults, and marks it dirty before the entry becomes writable and dirty (Linux's page_mkwrite, for
//! which vma_wants_writenotify keeps the entries read-only). So every entry that is writable or dirty is one of a dirty page. Write-back
//! takes that back under the page's lock: entries first, each flushed under its page-table lock, then the mark, then the
//! disk is asked. A write after that faults, waits for the lock, and marks the page dirty again; the disk may get either value,
//! and gets the last one next time.
//!
//! An unmap that clears a dirty entry keeps it counted as a mapping until it has flushed, all under the page-table lock
//! (`zap_order`). Write-back looks at a page that is mapped, and so waits for that lock; it does not at one that is
//! not. (Linux's mmu_gather with delayed rmap, 5df397dec7c4.)
//!
//! A write that fails leaves the page dirty, so that nothing is lost and the next write-back tries again. (Linux's swap does
//! so; most of its file systems leave the page clean and the data lost.) Whoever syncs the file next learns of it, once
//! (Linux's AS_EIO; errseq_t tells every open file once).

use core::ops::Range;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};

use abi::bug::Bug;
use abi::channel::cause;
use abi::disk::DiskOp;
use abi::layout::PAGE_SIZE;
use abi::objects::{File, Pa, folio_state};
use abi::point::Point;
use abi::pte::PteFlags;
use abi::syscall::Errno;

use super::file::LockedPage;
use super::rmap::RmapOwner;
use super::swap::IN_TRANSFER;
use super::swap_io::Waiting;
use super::{Field, FreedTables};
use crate::Kernel;
use crate::arch::Arch;

/// What a write needs in an entry, and what is left of it there.
pub(super) const WRITTEN: PteFlags = PteFlags::WRITE.union(PteFlags::DIRTY);

impl<A: Arch> Kernel<A> {
    /// The page may differ from what the disk holds (Linux's folio_mark_dirty). Whoever makes it so has locked it, or holds
    /// the page-table lock of an entry that was dirty.
    pub(super) fn mark_page_dirty(&self, gpa: u64) {
        self.folio(gpa).state.fetch_or(folio_state::DIRTY, Relaxed);
    }

    /// A device has written to a page that the caller has pinned (Linux's unpin_user_pages_dirty_lock).
    pub(crate) fn page_written_by_device(&self, gpa: u64) {
        if self.is_disk_page(gpa) {
            let _lock = self.lock_folio(gpa);
            self.mark_page_dirty(gpa);
        }
    }

    /// Writes the dirty pages of `range` to the disk, and waits for all that are being written (Linux's
    /// file_write_and_wait_range). Nothing for a file in memory (noop_fsync).
    ///
    /// # Errors
    /// EIO where a page could not be written since somebody last asked.
    pub(crate) fn file_sync(&self, file: Pa<File>, range: Range<u64>) -> Result<(), Errno> {
        if !self.file_on_disk(file) {
            return Ok(());
        }
        self.file_begin_writing(file, range.clone());
        self.file_wait_written(file, range);
        match self.obj(file).write_failed.swap(0, AcqRel) {
            0 => Ok(()),
            _ => Err(Errno::EIO),
        }
    }

    /// Begins to write the dirty pages of `range` (Linux's filemap_fdatawrite_range, write_cache_pages).
    pub(crate) fn file_begin_writing(&self, file: Pa<File>, range: Range<u64>) {
        let mut from = range.start;
        while let Some((index, gpa)) = self.cache_next(file, from, range.end) {
            from = index + 1;
            if self.folio(gpa).state.load(Acquire) & folio_state::DIRTY == 0 {
                self.folio_put(gpa, cause::HOLD);
            } else if let Some(page) = self.lock_page(file, gpa) {
                self.write_page(&page);
                self.page_release(page);
            }
        }
    }

    /// Linux's filemap_fdatawait_range.
    fn file_wait_written(&self, file: Pa<File>, range: Range<u64>) {
        let mut from = range.start;
        while let Some((index, gpa)) = self.cache_next(file, from, range.end) {
            from = index + 1;
            if self.folio(gpa).state.load(Acquire) & folio_state::WRITEBACK != 0 {
                self.swap_wait(gpa, Waiting::Spinning);
            }
            self.folio_put(gpa, cause::HOLD);
        }
    }

    /// Begins to write the page if it is dirty, when the disk has done with it.
    fn write_page(&self, page: &LockedPage<'_, A>) {
        let gpa = page.gpa;
        self.page_settle(page);
        let state = &self.folio(gpa).state;
        if state.load(Acquire) & folio_state::DIRTY == 0 {
            return;
        }
        // In this order (Linux's folio_clear_dirty_for_io): an entry that is writable is a dirty page's at any time.
        self.clean_entries(page);
        self.begin_writing(gpa);
    }

    /// Has the disk take the page, which is locked, dirty and not being moved, and which no entry lets anybody write.
    fn begin_writing(&self, gpa: u64) {
        let state = &self.folio(gpa).state;
        self.swap_transfer(DiskOp::Write, gpa, || {
            debug_assert!(state.load(Acquire) & IN_TRANSFER == 0);
            state.fetch_or(folio_state::WRITEBACK, Relaxed);
            state.fetch_and(!folio_state::DIRTY, Relaxed);
            Some(self.page_sector(gpa))
        });
    }

    /// For reclaim, which has isolated the page and removed its entries: begins to write it if it is dirty and nobody has
    /// come to it since (Linux's `pageout`, while it did so for files).
    pub(super) fn write_reclaimed(&self, gpa: u64) {
        let folio = self.folio(gpa);
        let Some(_page) = self.try_lock_cached(gpa) else {
            return;
        };
        // Of the cache, and of who has isolated it.
        let is_alone = folio.mapcount.load(Acquire) == 0 && folio.refcount.load(Acquire) == 2;
        let is_dirty =
            folio.state.load(Acquire) & (folio_state::DIRTY | IN_TRANSFER) == folio_state::DIRTY;
        if is_alone && is_dirty {
            self.begin_writing(gpa);
        }
    }

    /// Takes the right to write away from every entry that maps the page: when it returns, no CPU writes it without a fault
    /// (Linux's folio_mkclean, page_vma_mkclean_one).
    fn clean_entries(&self, page: &LockedPage<'_, A>) {
        let gpa = page.gpa;
        let folio = self.folio(gpa);
        // Acquire: pairs with the release of the count by who has flushed.
        if folio.mapcount.load(Acquire) == 0 {
            return;
        }
        let owner = RmapOwner::File(Pa::new(folio.owner.get()));
        self.rmap_walk_places(owner, folio.index.get(), |at| {
            let maps = at.entry.is_present() && at.entry.address() == gpa;
            if !maps || !at.entry.flags().intersects(WRITTEN) {
                return;
            }
            let mm = self.obj(at.mm);
            self.set_pte(mm, at.gva, at.slot, at.entry, at.entry.without(WRITTEN));
            point!(self, Point::PteProtect, [mm.id.get(), at.gva]);
            if !self.config.bugs.has(Bug::MkcleanNoFlush) {
                self.flush_range(at.mm, at.gva, at.gva + PAGE_SIZE, FreedTables::No);
            }
        });
    }
}
