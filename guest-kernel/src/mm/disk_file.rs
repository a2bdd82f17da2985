//! Files on the disk: a run of its sectors, as one of a partition (Linux's block/fops.c and the reading part of
//! mm/filemap.c). Their size does not change; pages come from the disk when they are first used, and go back there by
//! `writeback`.
//!
//! A page is in the page cache before it is read, [`FRESH`](folio_flags::FRESH) as long as it was not (Linux: not uptodate).
//! Whoever finds it so and locks it begins to read it, unless that is under way, and lets go of the lock to wait: the disk
//! needs none, and who takes the page out of the cache waits for the disk. A read that fails is an error for all who wait for
//! it; the page stays as it is, and the next one who wants it tries anew.

use core::ops::Range;
use core::sync::atomic::Ordering::{Acquire, Relaxed};

use abi::channel::cause;
use abi::disk::{DiskOp, SECTOR_BYTES};
use abi::layout::PAGE_SIZE;
use abi::objects::{File, FrameKind, Pa, folio_flags, folio_state};
use abi::syscall::Errno;

use super::file::LockedPage;
use super::page_cache::{Cached, Within};
use super::swap::IN_TRANSFER;
use super::swap_io::Waiting;
use super::{FaultError, Field, MAX_FILE_BYTES};
use crate::Kernel;
use crate::arch::Arch;

/// Sectors of a page.
const PAGE_SECTORS: u64 = PAGE_SIZE / SECTOR_BYTES;

/// A page that is being read, or could not be; the caller holds a reference, which [`Kernel::page_read_done`] gives up.
#[derive(Debug)]
pub(super) struct UnreadPage {
    file: Pa<File>,
    gpa: u64,
}

impl UnreadPage {
    /// Whose it was, and where it lies; the reference is the caller's.
    fn into_parts(self) -> (Pa<File>, u64) {
        (self.file, self.gpa)
    }
}

/// A page that somebody wants to use.
pub(super) enum Wanted<'k, A: Arch> {
    /// It holds what it should, and is locked.
    Page(LockedPage<'k, A>),
    /// It must be read first.
    Unread(UnreadPage),
}

impl<A: Arch> Kernel<A> {
    /// A file of `bytes` of the disk from `sector` on, with one reference.
    ///
    /// # Errors
    /// EINVAL where either is no multiple of a page, or there are none; EBUSY where the swap area lies there; ENOMEM.
    pub(crate) fn disk_file_create(&self, sector: u64, bytes: u64) -> Result<Pa<File>, Errno> {
        let whole = sector.is_multiple_of(PAGE_SECTORS) && bytes.is_multiple_of(PAGE_SIZE);
        let end = sector.checked_add(bytes / SECTOR_BYTES);
        let end = end.filter(|_| whole && bytes != 0 && bytes <= MAX_FILE_BYTES);
        let end = end.ok_or(Errno::EINVAL)?;
        let swap = &self.root().swap;
        let (first, sectors) = (swap.sector.get(), swap.nr_slots.get() * PAGE_SECTORS);
        if sectors != 0 && sector < first.saturating_add(sectors) && first < end {
            return Err(Errno::EBUSY);
        }
        let file = self.file_create()?;
        let object = self.obj(file);
        object.size.set(bytes);
        object.sector.set(sector);
        object.on_disk.set(1);
        Ok(file)
    }

    /// True for a file on the disk.
    #[inline]
    pub(crate) fn file_on_disk(&self, file: Pa<File>) -> bool {
        self.obj(file).on_disk.get() != 0
    }

    /// Where the page at `gpa`, which is locked or cannot leave its file, lies on the disk.
    pub(super) fn page_sector(&self, gpa: u64) -> u64 {
        let folio = self.folio(gpa);
        let file = self.obj(Pa::<File>::new(folio.owner.get()));
        file.sector.get() + folio.index.get() * PAGE_SECTORS
    }

    /// Page `index` of the file, locked, or what to wait for; made where there is none (Linux's filemap_fault and
    /// shmem_get_folio).
    ///
    /// # Errors
    /// Bus behind the end of the file, NoMemory.
    pub(super) fn file_page_if_read(
        &self,
        file: Pa<File>,
        index: u64,
        within: Within,
    ) -> Result<Wanted<'_, A>, FaultError> {
        loop {
            match self.cache_get(file, index, within) {
                Cached::Beyond => return Err(FaultError::Bus),
                Cached::Hole => self.fill_hole(file, index, within)?,
                Cached::Page(gpa) => {
                    let Some(page) = self.lock_page(file, gpa) else {
                        continue;
                    };
                    if !self.is_fresh(gpa) || !self.file_on_disk(file) {
                        return Ok(Wanted::Page(page));
                    }
                    self.page_begin_read(&page);
                    // The reference stays.
                    drop(page);
                    return Ok(Wanted::Unread(UnreadPage { file, gpa }));
                }
            }
        }
    }

    /// Has the disk read the page, unless it does (Linux's filemap_read_folio).
    fn page_begin_read(&self, page: &LockedPage<'_, A>) {
        let gpa = page.gpa;
        let state = &self.folio(gpa).state;
        self.swap_transfer(DiskOp::Read, gpa, || {
            let idle = state.load(Acquire) & IN_TRANSFER == 0 && self.is_fresh(gpa);
            idle.then(|| {
                state.fetch_or(folio_state::READING, Relaxed);
                self.page_sector(gpa)
            })
        });
    }

    /// Waits until the disk has read the page.
    ///
    /// # Errors
    /// Bus where it could not (Linux's filemap_fault, page_not_uptodate).
    pub(super) fn page_read_done(&self, page: UnreadPage, how: Waiting) -> Result<(), FaultError> {
        let (file, gpa) = page.into_parts();
        self.swap_wait(gpa, how);
        // Where it has left the cache since, there is another to find.
        let failed = self.is_fresh(gpa) && self.folio(gpa).owner.get() == file.0;
        self.folio_put(gpa, cause::HOLD);
        if failed { Err(FaultError::Bus) } else { Ok(()) }
    }

    /// What the disk has answered changes a page of a file: it holds what it should, or its file has something to tell.
    /// Before the transfer is over for others: until then the page is its file's ([`Kernel::page_settle`]).
    pub(super) fn file_page_answered(&self, gpa: u64, is_read: bool, is_done: bool) {
        let folio = self.folio(gpa);
        if folio.kind.get() != FrameKind::File as u8 {
            return;
        }
        match (is_read, is_done) {
            (true, true) => {
                folio.flags.fetch_and(!folio_flags::FRESH, Relaxed);
            }
            (false, false) => {
                let file = Pa::<File>::new(folio.owner.get());
                self.obj(file).write_failed.store(1, Relaxed);
            }
            (true, false) | (false, true) => {}
        }
    }

    /// Waits until the disk is done with the page, which is about to leave its file (Linux's folio_wait_writeback in
    /// truncate_inode_folio's callers). The caller has locked it, so the disk does not begin again.
    pub(super) fn page_settle(&self, page: &LockedPage<'_, A>) {
        if self.folio(page.gpa).state.load(Acquire) & IN_TRANSFER != 0 {
            self.swap_wait(page.gpa, Waiting::Spinning);
        }
    }

    /// True where the frame at `gpa` is a page of a file on the disk that was read: writes to it are to be told.
    #[inline]
    pub(super) fn is_disk_page(&self, gpa: u64) -> bool {
        let folio = self.folio(gpa);
        folio.kind.get() == FrameKind::File as u8 && folio.state.get() & folio_state::UPTODATE != 0
    }

    /// Takes the pages of `range` out of the cache that nobody uses and the disk has as they are (Linux's
    /// mapping_try_invalidate and mapping_evict_folio). Returns how many.
    pub(crate) fn file_evict(&self, file: Pa<File>, range: Range<u64>) -> u64 {
        let (mut from, mut evicted) = (range.start, 0);
        while let Some((index, gpa)) = self.cache_next(file, from, range.end) {
            from = index + 1;
            let Some(page) = self.lock_page(file, gpa) else {
                continue;
            };
            evicted += u64::from(self.page_evict(file, index, gpa));
            self.page_release(page);
        }
        evicted
    }

    /// Takes the page, which is locked and to which the caller alone refers but the cache, out of it. False where it stays.
    fn page_evict(&self, file: Pa<File>, index: u64, gpa: u64) -> bool {
        let evicted = self.cache_evict(file, index, gpa);
        if evicted {
            self.folio(gpa).owner.set(0);
            self.folio_put(gpa, cause::CACHE);
        }
        evicted
    }

    /// The same for reclaim, of a page that it has isolated. True where it is in no cache any more.
    pub(super) fn page_detach(&self, gpa: u64) -> bool {
        let folio = self.folio(gpa);
        match self.try_lock_cached(gpa) {
            Some(_page) => self.page_evict(Pa::new(folio.owner.get()), folio.index.get(), gpa),
            None => folio.owner.get() == 0,
        }
    }
}
