//! Files: their life, their pages, read and write (Linux's mm/shmem.c; what is special about those on the disk is in
//! `disk_file` and `writeback`).
//!
//! A page of a file is mapped, and leaves the page cache, only under its folio lock: who finds a frame in the cache,
//! and then under that lock finds that it still is the file's, may map it before truncate goes on (Linux's
//! filemap_fault and truncate_inode_folio). Lock order: position, inode, mmap_lock, VMA, folio, i_mmap, anon_vma, page
//! table, cache (Linux's mm/filemap.c and mm/rmap.c, the lists at their tops).

use core::sync::atomic::Ordering::Relaxed;

use abi::channel::cause;
use abi::layout::{PAGE_SHIFT, PAGE_SIZE};
use abi::lock::LockClass;
use abi::objects::{File, FrameKind, Pa, folio_flags, folio_state};
use abi::syscall::Errno;

use super::disk_file::Wanted;
use super::page_cache::{Cached, Within};
use super::swap_io::Waiting;
use super::{FaultError, Field, pages};
use crate::Kernel;
use crate::arch::Arch;
use crate::sync::Guard;

/// Largest size of a file (Linux's MAX_LFS_FILESIZE).
pub const MAX_FILE_BYTES: u64 = i64::MAX as u64;

/// A page of a file that cannot be truncated away for now: the caller holds its folio lock, and a reference.
pub(super) struct LockedPage<'k, A: Arch> {
    pub(super) gpa: u64,
    _lock: Guard<'k, A>,
}

impl<A: Arch> Kernel<A> {
    /// An empty file with one reference.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn file_create(&self) -> Result<Pa<File>, Errno> {
        let file = self.slab_alloc::<File>()?;
        self.obj(file).refcount.set(1);
        Ok(file)
    }

    /// Takes a reference.
    pub fn file_get(&self, file: Pa<File>) {
        let _guard = self.lock_cache(file);
        let count = &self.obj(file).refcount;
        assert!(count.get() > 0, "file {file:?} used after its end");
        count.set(count.get() + 1);
    }

    /// Gives a reference up; with the last one the file goes, and its pages with it. What the disk is to hold is written
    /// before; who wants to know whether it was, syncs (Linux's bdev_release).
    pub fn file_put(&self, file: Pa<File>) {
        let left = {
            // The last one comes after all others have let go of the lock: nobody touches the file any more.
            let _guard = self.lock_cache(file);
            let count = &self.obj(file).refcount;
            assert!(count.get() > 0, "file {file:?} put once too often");
            count.set(count.get() - 1);
            count.get()
        };
        if left == 0 {
            assert!(self.obj(file).i_mmap.get().is_null());
            let _ = self.file_sync(file, 0..u64::MAX);
            self.remove_pages(file, 0..u64::MAX);
            self.slab_free(file);
        }
    }

    /// Bytes of the file.
    pub fn file_size(&self, file: Pa<File>) -> u64 {
        let _guard = self.lock_cache(file);
        self.obj(file).size.get()
    }

    /// Keeps others from changing the file's contents or size by system calls.
    pub(crate) fn lock_inode(&self, file: Pa<File>) -> Guard<'_, A> {
        self.mutex_lock(&self.obj(file).inode_lock, LockClass::Inode)
    }

    pub(super) fn lock_folio(&self, gpa: u64) -> Guard<'_, A> {
        self.lock(&self.folio(gpa).lock, LockClass::Folio)
    }

    /// Page `index` of the file, locked; made where there is none, read where it is on the disk.
    ///
    /// # Errors
    /// Bus behind the end of the file, and where the disk fails; NoMemory.
    pub(super) fn file_page(
        &self,
        file: Pa<File>,
        index: u64,
        within: Within,
    ) -> Result<LockedPage<'_, A>, FaultError> {
        loop {
            match self.file_page_if_read(file, index, within)? {
                Wanted::Page(page) => return Ok(page),
                Wanted::Unread(page) => self.page_read_done(page, Waiting::Asleep)?,
            }
        }
    }

    /// Locks the page at `gpa`, to which the caller holds a reference; none where it is no longer the file's, and the
    /// reference is given up then.
    pub(super) fn lock_page(&self, file: Pa<File>, gpa: u64) -> Option<LockedPage<'_, A>> {
        let lock = self.lock_folio(gpa);
        if self.folio(gpa).owner.get() == file.0 {
            return Some(LockedPage { gpa, _lock: lock });
        }
        drop(lock);
        self.folio_put(gpa, cause::HOLD);
        None
    }

    /// Unlocks the page and gives the caller's reference up.
    pub(super) fn page_release(&self, page: LockedPage<'_, A>) {
        let gpa = page.gpa;
        drop(page);
        self.folio_put(gpa, cause::HOLD);
    }

    /// Puts a page of zeroes at `index`, unless somebody was faster; on the disk one that is to be read.
    pub(super) fn fill_hole(
        &self,
        file: Pa<File>,
        index: u64,
        within: Within,
    ) -> Result<(), Errno> {
        let gpa = self.alloc_frames(0, FrameKind::File)?;
        self.charge_to_current(gpa)?;
        self.arch.zero_frame(gpa);
        let folio = self.folio(gpa);
        folio.owner.set(file.0);
        folio.index.set(index);
        if self.file_on_disk(file) {
            folio.flags.fetch_or(folio_flags::FRESH, Relaxed);
        }
        let result = self.cache_insert(file, index, within, gpa);
        if result == Ok(true) && self.file_on_disk(file) {
            self.lru_add(gpa);
        }
        // Without the cache's reference this is the last one.
        self.folio_put(gpa, cause::HOLD);
        result.map(|_| ())
    }

    /// Bytes from `position` on; fewer at the end of the file. Holes read as zeroes and stay holes (Linux's
    /// shmem_file_read_iter). `to` lies within one page of the file.
    ///
    /// # Errors
    /// Of a file on the disk: EIO where that fails, ENOMEM.
    pub fn file_read(&self, file: Pa<File>, position: u64, to: &mut [u8]) -> Result<usize, Errno> {
        let size = self.file_size(file);
        let bytes = to.len().min(size.saturating_sub(position) as usize);
        let to = &mut to[..bytes];
        if bytes == 0 {
            return Ok(0);
        }
        if self.file_on_disk(file) {
            let page = self
                .file_page(file, pages(position), Within::Size)
                .map_err(io_error)?;
            self.page_accessed(&page);
            self.load_memory(page.gpa + position % PAGE_SIZE, to);
            self.page_release(page);
            return Ok(bytes);
        }
        match self.cache_get(file, pages(position), Within::Size) {
            Cached::Page(gpa) => {
                self.load_memory(gpa + position % PAGE_SIZE, to);
                self.folio_put(gpa, cause::HOLD);
            }
            Cached::Hole => to.fill(0),
            Cached::Beyond => return Ok(0),
        }
        Ok(bytes)
    }

    /// Writes `from`, which lies within one page of the file, at `position`; the file grows where it ends before.
    /// Under the inode lock.
    ///
    /// # Errors
    /// ENOMEM; of a file on the disk ENOSPC at its end (Linux's blkdev_write_iter) and EIO where the rest of the page cannot be
    /// read. Nothing is written then.
    pub fn file_write(&self, file: Pa<File>, position: u64, from: &[u8]) -> Result<(), Errno> {
        let on_disk = self.file_on_disk(file);
        if on_disk && position >= self.file_size(file) {
            return Err(Errno::ENOSPC);
        }
        let page = self
            .file_page(file, pages(position), Within::Anything)
            .map_err(io_error)?;
        self.touched(page.gpa);
        self.store_memory(page.gpa + position % PAGE_SIZE, from);
        if on_disk {
            self.page_accessed(&page);
            if !from.is_empty() {
                self.mark_page_dirty(page.gpa);
            }
        } else {
            let _guard = self.lock_cache(file);
            let (size, end) = (&self.obj(file).size, position + from.len() as u64);
            size.set(size.get().max(end));
        }
        self.page_release(page);
        Ok(())
    }

    /// A call reads or writes a page of a file on the disk: reclaim passes it by once (of Linux's folio_mark_accessed the first
    /// step; there the second makes it active).
    fn page_accessed(&self, page: &LockedPage<'_, A>) {
        if self.has_swap() {
            let state = &self.folio(page.gpa).state;
            state.fetch_or(folio_state::REFERENCED, Relaxed);
        }
    }

    /// Somebody uses the page, which a fallocate may have made: it has contents now (Linux's folio_mark_uptodate). To read
    /// it by system call is no use, nor is to write zeroes into it.
    pub(super) fn touched(&self, gpa: u64) {
        if self.is_fresh(gpa) {
            let flags = &self.folio(gpa).flags;
            flags.fetch_and(!folio_flags::FRESH, Relaxed);
        }
    }

    /// True where a fallocate has made the page and nobody has used it.
    pub(super) fn is_fresh(&self, gpa: u64) -> bool {
        self.folio(gpa).flags.get() & folio_flags::FRESH != 0
    }

    /// fallocate without a mode, and with KEEP_SIZE: pages for `offset..end`. Those that another one has made count as used
    /// then (Linux's shmem_get_folio_gfp, which clears what is there and not uptodate).
    ///
    /// # Errors
    /// ENOMEM; the pages that it has made are gone again (Linux's shmem_fallocate).
    pub fn file_allocate(
        &self,
        file: Pa<File>,
        offset: u64,
        end: u64,
        size: Size,
    ) -> Result<(), Errno> {
        let _inode = self.lock_inode(file);
        let (first, last) = (offset >> PAGE_SHIFT, end.div_ceil(PAGE_SIZE));
        for index in first..last {
            let hole = matches!(self.cache_probe(file, index), Cached::Hole | Cached::Beyond);
            match self.file_page(file, index, Within::Anything) {
                Ok(page) => {
                    if hole {
                        self.folio(page.gpa)
                            .flags
                            .fetch_or(folio_flags::FRESH, Relaxed);
                    } else {
                        self.touched(page.gpa);
                    }
                    self.page_release(page);
                }
                Err(_) => {
                    self.remove_fresh(file, first..index);
                    return Err(Errno::ENOMEM);
                }
            }
        }
        if size == Size::Grows {
            let _guard = self.lock_cache(file);
            let size = &self.obj(file).size;
            size.set(size.get().max(end));
        }
        Ok(())
    }

    /// What is at page `index`, without a reference to it.
    fn cache_probe(&self, file: Pa<File>, index: u64) -> Cached {
        let found = self.cache_get(file, index, Within::Anything);
        if let Cached::Page(gpa) = found {
            self.folio_put(gpa, cause::HOLD);
        }
        found
    }

    /// Takes the pages of `range` away that nobody has used since a fallocate made them, this one or another (Linux's
    /// shmem_undo_range of what is not uptodate).
    fn remove_fresh(&self, file: Pa<File>, range: core::ops::Range<u64>) {
        let mut from = range.start;
        while let Some((index, gpa)) = self.cache_next(file, from, range.end) {
            from = index + 1;
            let Some(page) = self.lock_page(file, gpa) else {
                continue;
            };
            if self.is_fresh(gpa) {
                self.remove_page(file, index, page);
            } else {
                self.page_release(page);
            }
        }
    }
}

/// What a system call says where a page cannot be had.
fn io_error(error: FaultError) -> Errno {
    match error {
        FaultError::Bus => Errno::EIO,
        _ => Errno::ENOMEM,
    }
}

/// Whether fallocate makes a file longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// As far as it allocates.
    Grows,
    /// FALLOC_FL_KEEP_SIZE.
    Stays,
}
