//! Page faults on mappings of files (Linux's do_read_fault, do_cow_fault and do_shared_fault, mm/memory.c).
//!
//! Memory is allocated first, then the page is locked, then the entry's table: as long as the page is locked, truncate
//! has not unmapped it for the last time.
//!
//! A page of a file on the disk may have to be read: who can lets go of the mmap_lock meanwhile, and makes the access again.

use abi::channel::cause;
use abi::layout::{PAGE_SHIFT, PAGE_SIZE};
use abi::objects::{FrameKind, vma_flags};
use abi::point::Point;
use abi::pte::{Pte, PteFlags, fault};

use super::disk_file::Wanted;
use super::fault::Faulting;
use super::file::LockedPage;
use super::page_cache::Within;
use super::swap_in::{MAY_RETRY, Unfinished};
use super::swap_io::Waiting;
use super::vma::{leaf_flags, shared_rights};
use super::{Field, Slot, pages};
use crate::Kernel;
use crate::arch::Arch;

impl<A: Arch> Kernel<A> {
    /// Maps the page of the file, or where a private mapping is written, a copy of it.
    pub(super) fn file_fault(&self, fault: Faulting, error: u64) -> Result<(), Unfinished> {
        let shared = self.obj(fault.vma).flags.get() & vma_flags::SHARED != 0;
        if error & fault::WRITE != 0 && !shared {
            return self.map_copy(fault, error);
        }
        let page = self.faulted_page(fault, error)?;
        self.map_page(fault, page.gpa, error);
        self.page_release(page);
        if error & fault::WRITE == 0 {
            self.map_around(fault);
        }
        Ok(())
    }

    /// The page of the file, locked.
    fn faulted_page(&self, fault: Faulting, error: u64) -> Result<LockedPage<'_, A>, Unfinished> {
        let (file, index) = (self.obj(fault.vma).file.get(), self.index_of(fault));
        loop {
            match self.file_page_if_read(file, index, Within::Size)? {
                Wanted::Page(page) => return Ok(page),
                Wanted::Unread(page) if error & MAY_RETRY != 0 => {
                    return Err(Unfinished::ReadingPage(page));
                }
                Wanted::Unread(page) => self.page_read_done(page, Waiting::Spinning)?,
            }
        }
    }

    /// Maps what the page cache has around a read fault too, inside the VMA, the file and the table (Linux's
    /// do_fault_around and filemap_map_pages; parameter `file_fault_around`).
    fn map_around(&self, fault: Faulting) {
        let window = self.config.file_fault_around << PAGE_SHIFT;
        if window == PAGE_SIZE {
            return;
        }
        let area = self.obj(fault.vma);
        let (file, base) = (area.file.get(), fault.gva & !(window - 1));
        let start = base.max(area.start.get());
        let end = (base + window).min(area.end.get());
        let first = area.pgoff.get() + pages(start - area.start.get());
        let last = (first + pages(end - start)).min(self.file_size(file).div_ceil(PAGE_SIZE));
        let mut from = first;
        while let Some((index, gpa)) = self.cache_next(file, from, last) {
            from = index + 1;
            let gva = start + ((index - first) << PAGE_SHIFT);
            let slot = Slot::new(fault.slot.table, 1, gva);
            let entry = self.read_pte(slot);
            let around = Faulting {
                gva,
                slot,
                entry,
                ..fault
            };
            // Nor what is not uptodate (Linux's next_uptodate_folio).
            if !entry.is_none() || self.is_fresh(gpa) {
                self.folio_put(gpa, cause::HOLD);
            } else if let Some(page) = self.lock_page(file, gpa) {
                self.map_page(around, gpa, 0);
                self.page_release(page);
            }
        }
    }

    /// A write to a present entry without W of a shared mapping that permits it: it lacked the right when it was
    /// installed, or has lost it since. More permission needs no flush.
    pub(super) fn shared_write(&self, fault: Faulting) {
        let area = self.obj(fault.vma);
        if area.flags.get() & vma_flags::NOTIFY == 0 {
            return self.make_writable(fault);
        }
        let gpa = fault.entry.address();
        {
            let _guard = self.lock_table(fault.slot.table);
            if self.read_pte(fault.slot) != fault.entry {
                return;
            }
            self.folio_get(gpa, cause::HOLD);
        }
        if let Some(page) = self.lock_page(area.file.get(), gpa) {
            self.mark_page_dirty(gpa);
            self.make_writable(fault);
            self.page_release(page);
        }
    }

    /// Unless the entry has changed. A page of a file on the disk is locked, and dirty (Linux's wp_page_shared and
    /// filemap_page_mkwrite).
    fn make_writable(&self, fault: Faulting) {
        let mm = self.obj(fault.mm);
        let _guard = self.lock_table(fault.slot.table);
        if self.read_pte(fault.slot) == fault.entry {
            let new = fault.entry.with(PteFlags::WRITE | PteFlags::DIRTY);
            self.set_pte(mm, fault.gva, fault.slot, fault.entry, new);
            point!(self, Point::PteInstall, [mm.id.get(), fault.gva]);
        }
    }

    /// Maps the file's page at `gpa`, which the caller has locked, for the access of page-fault `error`, unless somebody was
    /// faster.
    fn map_page(&self, fault: Faulting, gpa: u64, error: u64) {
        self.touched(gpa);
        let (mm, flags) = (self.obj(fault.mm), self.obj(fault.vma).flags.get());
        let mut leaf = leaf_flags(flags);
        if flags & vma_flags::SHARED != 0 {
            leaf |= shared_rights(flags);
        }
        if flags & vma_flags::NOTIFY != 0 && error & fault::WRITE != 0 {
            // Before anybody can write it: who cleans it waits for its lock (Linux's do_shared_fault).
            self.mark_page_dirty(gpa);
            leaf |= PteFlags::WRITE | PteFlags::DIRTY;
        }
        let _guard = self.lock_table(fault.slot.table);
        if self.read_pte(fault.slot).is_none() {
            self.folio_map_again(gpa, cause::MAP);
            self.set_pte(mm, fault.gva, fault.slot, Pte::NONE, Pte::new(gpa, leaf));
            point!(self, Point::PteInstall, [mm.id.get(), fault.gva]);
        }
    }

    /// Maps a private copy of the page, to be written.
    fn map_copy(&self, fault: Faulting, error: u64) -> Result<(), Unfinished> {
        let area = self.obj(fault.vma);
        let copy = self.alloc_charged(fault.mm, 0, FrameKind::Anon)?;
        let page = self
            .faulted_page(fault, error)
            .inspect_err(|_| self.free_frames(copy))?;
        self.touched(page.gpa);
        self.arch.copy_frame(page.gpa, copy);
        let leaf = leaf_flags(area.flags.get()) | PteFlags::WRITE | PteFlags::DIRTY;
        let mapped = {
            let _guard = self.lock_table(fault.slot.table);
            let free = self.read_pte(fault.slot).is_none();
            if free {
                self.install(fault, Pte::NONE, Pte::new(copy, leaf));
            }
            free
        };
        self.page_release(page);
        if !mapped {
            self.free_frames(copy);
        }
        Ok(())
    }

    /// The page of the file that a fault is about.
    fn index_of(&self, fault: Faulting) -> u64 {
        let area = self.obj(fault.vma);
        area.pgoff.get() + pages(fault.gva - area.start.get())
    }
}
