//! What programs say of their pages' future: MADV_COLD and MADV_PAGEOUT, and MADV_WILLNEED of anonymous memory (Linux's
//! mm/madvise.c).

use core::convert::Infallible;
use core::sync::atomic::Ordering::{Acquire, Relaxed};

use abi::channel::Walker;
use abi::layout::{HUGE_PAGE_SIZE, PAGE_SIZE};
use abi::objects::{FrameKind, Mm, Pa, Vma, folio_state};
use abi::pte::{NonPresent, Pte, PteFlags};

use super::lru::Isolated;
use super::reclaim::Used;
use super::swap_io::Waiting;
use super::{Field, Slot};
use crate::Kernel;
use crate::arch::Arch;

/// What is to become of pages that will not be used soon.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Age {
    /// They are the next to be reclaimed (MADV_COLD).
    Cold,
    /// They are reclaimed now (MADV_PAGEOUT).
    PageOut,
}

/// What is forgotten of a folio that is aged.
const USED: u8 = folio_state::ACTIVE | folio_state::REFERENCED | folio_state::UNEVICTABLE;

/// Why a look at a table came to an end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stopped {
    /// The cluster is full, or the table at its end.
    Full,
    /// At a page of a folio of 2 MiB, which is to be split first (Linux's madvise_cold_or_pageout_pte_range).
    AtLarge,
}

impl<A: Arch> Kernel<A> {
    /// Ages the pages of `start..end` that nobody else maps (Linux's `madvise_cold_or_pageout_pte_range`). Under the
    /// mmap_lock held for reading.
    pub(super) fn age(&self, mm: Pa<Mm>, vma: Pa<Vma>, (start, end): (u64, u64), age: Age) {
        if !self.has_swap() {
            return;
        }
        let space = self.obj(mm);
        let Ok(()) = self.for_each_huge(space, (start, end), |gva| {
            let is_whole = gva >= start && gva + HUGE_PAGE_SIZE <= end;
            self.age_huge(mm, vma, (gva, gva.max(start)), is_whole, age);
            Ok::<(), Infallible>(())
        });
        let Ok(()) =
            self.for_each_leaf_table(space, Walker::Protect, (start, end), |table, from, to| {
                let mut gva = from;
                while gva < to {
                    let mut taken = Isolated::new();
                    let (next, stopped) = self.age_table(mm, (table, gva, to), age, &mut taken);
                    gva = next;
                    // Not under the page-table lock.
                    match age {
                        Age::PageOut => {
                            self.shrink_folios(&taken, Used::Ignored);
                        }
                        Age::Cold => taken
                            .frames()
                            .iter()
                            .for_each(|gpa| self.lru_put_back(*gpa)),
                    }
                    if stopped == Stopped::AtLarge && self.split_folio(mm, vma, gva).is_err() {
                        gva += PAGE_SIZE;
                    }
                }
                Ok::<(), Infallible>(())
            });
    }

    /// Ages what an entry of 2 MiB maps that nobody else does. It is split where its pages are to be reclaimed, each by
    /// itself, or a part of it is meant; else it stays whole.
    fn age_huge(
        &self,
        mm: Pa<Mm>,
        vma: Pa<Vma>,
        (base, gva): (u64, u64),
        is_whole: bool,
        age: Age,
    ) {
        let space = self.obj(mm);
        self.walk_begins(space, base, Walker::Protect);
        let is_alone = self.with_huge(space, base, |slot, entry| {
            let is_alone = self.is_aged_alone(entry);
            if is_alone && is_whole && age == Age::Cold && self.lru_isolate_one(entry.address()) {
                let state = &self.folio(entry.address()).state;
                state.fetch_and(!USED, Relaxed);
                let unused = entry.without(PteFlags::ACCESSED);
                if unused != entry {
                    self.set_pte(space, base, slot, entry, unused);
                }
                self.lru_put_back(entry.address());
            }
            is_alone
        });
        self.walk_ends(space, base, Walker::Protect);
        if is_alone == Some(true) && !(is_whole && age == Age::Cold) {
            let _ = self.split_folio(mm, vma, gva);
        }
    }

    /// Takes a cluster of pages off their lists; returns where it stopped, and why.
    fn age_table(
        &self,
        mm: Pa<Mm>,
        (table, start, end): (u64, u64, u64),
        age: Age,
        taken: &mut Isolated,
    ) -> (u64, Stopped) {
        let _guard = self.lock_table(table);
        self.flush_batched_pending(mm);
        let mut rest = start;
        while !taken.is_full() {
            let Some((gva, entry)) = self.next_entry((table, 1), rest, end) else {
                return (end, Stopped::Full);
            };
            if entry.is_present() && self.is_large(self.head(entry.address())) {
                return (gva, Stopped::AtLarge);
            }
            rest = gva + PAGE_SIZE;
            if !self.is_aged_alone(entry) || !self.lru_isolate_one(entry.address()) {
                continue;
            }
            let state = &self.folio(entry.address()).state;
            state.fetch_and(!USED, Relaxed);
            taken.push(entry.address());
            let unused = entry.without(PteFlags::ACCESSED);
            if age == Age::Cold && unused != entry {
                self.set_pte(self.obj(mm), gva, Slot::new(table, 1, gva), entry, unused);
            }
        }
        (rest, Stopped::Full)
    }

    /// True where `entry` maps a folio that can be reclaimed and nobody else maps: what others think of it is not known here.
    fn is_aged_alone(&self, entry: Pte) -> bool {
        if !entry.is_present() {
            return false;
        }
        let folio = self.folio(entry.address());
        let is_user = FrameKind::from_u8(folio.kind.get()).is_some_and(FrameKind::is_user);
        is_user && folio.mapcount.load(Acquire) == 1
    }

    /// Reads what of `start..end` is on the disk (Linux's `swapin_walk_pmd_entry`), as far as there are free frames.
    pub(super) fn read_ahead(&self, mm: Pa<Mm>, (start, end): (u64, u64)) {
        if !self.has_swap() {
            return;
        }
        let space = self.obj(mm);
        let Ok(()) =
            self.for_each_leaf_table(space, Walker::Fault, (start, end), |table, from, to| {
                let mut gva = from;
                while gva < to {
                    let entry = self.read_pte(Slot::new(table, 1, gva));
                    if let Some(NonPresent::Swap { slot, .. }) = entry.non_present()
                        && self.read_if_free(slot)
                    {
                        self.swap_read_done(slot, Waiting::Spinning);
                    }
                    gva += PAGE_SIZE;
                }
                Ok::<(), Infallible>(())
            });
    }
}
