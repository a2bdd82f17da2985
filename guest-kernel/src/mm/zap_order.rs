//! In which order an entry is cleared, flushed and counted off: the seam at which an unmap takes a mapping away from its
//! folio.
//!
//! A folio counts the entries that map it (the rmap), and who wants to reach them all asks no further where it counts none.
//! Between the entry's end and the flush other CPUs may still use the page. Where the mapping of a dirty page of a file
//! is counted off in between, write-back finds the page unmapped, waits for nobody, and writes it, and what another CPU
//! stores after that through its stale translation is lost (B7: Nadav Amit, 2022). Where all mappings are counted
//! off only when the frames are given back, an anonymous folio says that it is mapped when its anon_vma is gone, and walks back
//! from it meet what is free. So Linux debates which mappings wait, and for how long.
//!
//! The one implementation is the form that was merged (Linux 6.2, 5df397dec7c4, delayed rmap): what a file's dirty page
//! is mapped by is counted off after the flush, everything else when its entry is cleared, and all of it before the page-table lock
//! is dropped. Write-back looks under that lock at every page that counts a mapping, whether or not it finds an entry
//! there ([`super::writeback`]). Other forms replace these methods:
//!
//! | when | method | here | other forms |
//! |---|---|---|---|
//! | an entry was cleared | `zap_rmap`, `zap_rmap_huge` | dirty pages of files go on counting it | none does (Linux before 6.2); all do (its first attempt); each is flushed at once (s390) |
//! | the page-table lock is about to be dropped | `zap_flush_rmaps` | a flush where any goes on, then all are counted off | nothing (Linux before 6.2) |
//! | its frame is about to be given back | `zap_rmap_at_free` | nothing is left | what goes on is counted off here (its first attempt) |
//! | reclaim has cleared an entry of a file's page | `reclaim_rmap` | flushed first if it could be written | later, with the batch, under the folio's lock (Linux) |
//!
//! Linux's limits on how many pages may wait have no like here: a gather has one batch, whose flush counts off all of it.
//!
//! What must hold, whatever the form, and which rule says so (docs/seams.md has all): what the disk is asked to take nobody writes
//! without a fault (T-13); a folio that counts a mapping has a live anon_vma; what is counted is what is mapped
//! (R-01, and F-01 whenever the lock is dropped); no frame is given back before the flush (T-01).

use abi::bug::Bug;
use abi::layout::PAGE_SIZE;
use abi::objects::{Mm, Pa};
use abi::pte::{Pte, PteFlags};

use super::FreedTables;
use super::changed::Changed;
use super::gather::Gather;
use super::writeback::WRITTEN;
use crate::Kernel;
use crate::arch::Arch;

/// In a gathered frame's address: it still counts the mapping that is gone (Linux's ENCODED_PAGE_BIT_DELAY_RMAP).
const STILL_COUNTED: u64 = 1;

impl<A: Arch> Kernel<A> {
    /// The gather has cleared `entry` at `gva`, under its page-table lock.
    #[inline]
    pub(super) fn zap_rmap(&self, gather: &mut Gather, gva: u64, entry: Pte) {
        let (gpa, page) = (entry.address(), Changed::pages(gva, gva + PAGE_SIZE));
        if self.is_dirty_mapping(entry) {
            self.mark_page_dirty(gpa);
            gather.add_frame(gpa | STILL_COUNTED, page);
            gather.delayed_rmap = true;
        } else {
            if !self.config.bugs.has(Bug::MapcountAfterUnlock) {
                self.folio_unmap(gpa);
            }
            gather.add_frame(gpa, page);
        }
    }

    /// As [`Kernel::zap_rmap`], of an entry of 2 MiB, which is never a file's.
    pub(super) fn zap_rmap_huge(&self, gather: &mut Gather, gva: u64, entry: Pte) {
        self.folio_unmap_huge(entry.address());
        gather.add_frame(entry.address(), Changed::huge(gva));
    }

    /// The page-table lock is about to be dropped (Linux's tlb_flush_rmaps).
    #[inline]
    pub(super) fn zap_flush_rmaps(&self, gather: &mut Gather) {
        if gather.delayed_rmap {
            self.flush_delayed(gather);
        }
    }

    /// The gather is about to give a frame back. All its mappings are counted off, but with the seeded bug.
    #[inline]
    pub(super) fn zap_rmap_at_free(&self, gpa: u64) {
        if self.config.bugs.has(Bug::MapcountAfterUnlock) {
            self.folio_unmap(gpa);
        }
    }

    /// Reclaim has replaced `old` at `gva`, of a page of a file, under its page-table lock, and is about to count it off.
    pub(super) fn reclaim_rmap(&self, mm: Pa<Mm>, gva: u64, old: Pte) {
        let may_be_written = old.flags().intersects(WRITTEN);
        if may_be_written && !self.config.bugs.has(Bug::ReclaimLosesDirty) {
            self.flush_range(mm, gva, gva + PAGE_SIZE, FreedTables::No);
        }
    }

    /// True where write-back must know of the mapping that `entry` was until it is flushed.
    #[inline]
    fn is_dirty_mapping(&self, entry: Pte) -> bool {
        let bugs = self.config.bugs;
        entry.flags().contains(PteFlags::DIRTY)
            && self.is_disk_page(entry.address())
            && !bugs.has(Bug::ZapLosesDirty)
            && !bugs.has(Bug::MapcountAfterUnlock)
    }

    #[cold]
    fn flush_delayed(&self, gather: &mut Gather) {
        self.flush_gathered(gather);
        for frame in gather.frames() {
            if *frame & STILL_COUNTED != 0 {
                *frame &= !STILL_COUNTED;
                self.folio_unmap(*frame);
            }
        }
        gather.delayed_rmap = false;
    }
}
