//! ftruncate and hole punching: taking pages away from a file and from everybody who maps it (Linux's
//! shmem_setattr, shmem_fallocate and mm/truncate.c).
//!
//! The order is Linux's: entries are cleared and flushed wherever the pages are mapped; then page by page, under
//! the folio lock, a page that was mapped again meanwhile is unmapped again and leaves the page cache; after a
//! truncate, private copies that were made meanwhile of pages behind the new end go too. A frame is given back
//! when the last reference goes, and each mapping holds its own until it is flushed.

use core::ops::Range;

use abi::bug::Bug;
use abi::channel::cause;
use abi::layout::{PAGE_SHIFT, PAGE_SIZE};
use abi::objects::{File, Pa};

use super::file::LockedPage;
use super::gather::Unmap;
use super::{Field, page_align, pages};
use crate::Kernel;
use crate::arch::Arch;

impl<A: Arch> Kernel<A> {
    /// Makes the file `size` bytes long.
    pub fn file_truncate(&self, file: Pa<File>, size: u64) {
        let _inode = self.lock_inode(file);
        let old = {
            let _guard = self.lock_cache(file);
            let field = &self.obj(file).size;
            let old = field.get();
            field.set(size);
            old
        };
        if size > old {
            return;
        }
        let behind = size.div_ceil(PAGE_SIZE)..u64::MAX;
        if old > page_align(size) {
            self.unmap_mapping(file, behind.clone(), Unmap::Truncate);
        }
        self.drop_bytes(file, size, u64::MAX);
        if old > page_align(size) {
            self.unmap_mapping(file, behind, Unmap::Truncate);
        }
    }

    /// fallocate(PUNCH_HOLE): `offset..end` reads as zeroes. Private copies stay.
    pub fn file_punch(&self, file: Pa<File>, offset: u64, end: u64) {
        let _inode = self.lock_inode(file);
        let whole = offset.div_ceil(PAGE_SIZE)..pages(end);
        if !whole.is_empty() && !self.config.bugs.has(Bug::PunchFreeBeforeFlush) {
            self.unmap_mapping(file, whole, Unmap::Hole);
        }
        self.drop_bytes(file, offset, end);
    }

    /// Clears the entries that map pages of `range`, and flushes (Linux's unmap_mapping_range).
    fn unmap_mapping(&self, file: Pa<File>, range: Range<u64>, by: Unmap) {
        let _guard = self.lock_i_mmap(file);
        self.for_each_mapping(file, &range, |vma, start, end| {
            let mut gather = self.gather(self.obj(vma).mm.get(), by);
            self.zap_range(&mut gather, start, end);
            self.gather_finish(gather);
        });
    }

    /// Takes the pages of `start..end` out of the cache, and fills those with zeroes of which it covers a part
    /// (Linux's shmem_undo_range).
    fn drop_bytes(&self, file: Pa<File>, start: u64, end: u64) {
        let (first, last) = (start.div_ceil(PAGE_SIZE), end >> PAGE_SHIFT);
        if first > last {
            return self.zero_part(file, start, end);
        }
        self.zero_part(file, start, first << PAGE_SHIFT);
        if end != u64::MAX {
            self.zero_part(file, last << PAGE_SHIFT, end);
        }
        self.remove_pages(file, first..last);
    }

    /// Fills `start..end`, which lies in one page, with zeroes.
    fn zero_part(&self, file: Pa<File>, start: u64, end: u64) {
        if start == end {
            return;
        }
        let index = pages(start);
        if let Some((found, gpa)) = self.cache_next(file, index, index + 1)
            && let Some(page) = self.lock_page(file, gpa)
        {
            debug_assert_eq!(found, index);
            self.zero_memory(gpa + start % PAGE_SIZE, end - start);
            self.page_release(page);
        }
    }

    /// Takes the pages of `range` out of the cache.
    pub(super) fn remove_pages(&self, file: Pa<File>, range: Range<u64>) {
        let mut from = range.start;
        while let Some((index, gpa)) = self.cache_next(file, from, range.end) {
            from = index + 1;
            if let Some(page) = self.lock_page(file, gpa) {
                self.remove_page(file, index, page);
            }
        }
    }

    /// Takes one page out of the cache, whoever maps it.
    pub(super) fn remove_page(&self, file: Pa<File>, index: u64, page: LockedPage<'_, A>) {
        let gpa = page.gpa;
        self.page_settle(&page);
        if self.config.bugs.has(Bug::PunchFreeBeforeFlush) {
            return self.remove_page_before_flush(file, index, page);
        }
        // Nobody maps it for the first time without the folio lock; fork maps it once more only where it is mapped.
        if self.folio(gpa).mapcount.get() > 0 {
            self.unmap_mapping(file, index..index + 1, Unmap::Hole);
        }
        self.cache_remove(file, index);
        self.folio(gpa).owner.set(0);
        self.folio_put(gpa, cause::CACHE);
        self.page_release(page);
    }

    /// The seeded bug: the page leaves the cache first, and its mappings give it back before they are flushed.
    fn remove_page_before_flush(&self, file: Pa<File>, index: u64, page: LockedPage<'_, A>) {
        let gpa = page.gpa;
        self.cache_remove(file, index);
        self.folio_put(gpa, cause::CACHE);
        self.page_release(page);
        self.unmap_mapping(file, index..index + 1, Unmap::Hole);
    }
}
