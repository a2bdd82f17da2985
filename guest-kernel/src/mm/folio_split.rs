//! Splitting a folio of 2 MiB into small ones, each with its own counts; what nothing maps is freed (Linux 6.18's
//! `__folio_split`): on request, as by /sys/kernel/debug/split_huge_pages, and by reclaim (`unmap`).
//!
//! Linux replaces the entries by migration entries, wherever they are, and then freezes the references. Here the entries
//! stay as they are, which works where one table has all of them: under its lock and that of the anon_vma's family nobody
//! else reaches the folio but who pins without a lock, and that one is kept out by a count of 0. A folio that several
//! tables map, of several mms or after a move, stays whole (EAGAIN), as does one that anybody else refers to.

use abi::channel::{EventKind, cause};
use abi::layout::{ENTRIES_PER_TABLE, HUGE_ORDER, HUGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE, USER_END};
use abi::lock::LockClass;
use abi::objects::{FrameKind, Mm, Pa, Vma, folio_state};
use abi::syscall::Errno;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Release};

use super::lru::Place;
use super::{Field, Slot, is_page_aligned, page_align};
use crate::Kernel;
use crate::arch::Arch;

/// Of [`folio_state`]: on which list a folio belongs, and whether it was used.
const OF_LISTS: u8 = folio_state::ACTIVE | folio_state::REFERENCED | folio_state::UNEVICTABLE;

/// Pages of a folio, one bit each.
pub(super) type Pages = [u64; ENTRIES_PER_TABLE / 64];

/// Whether who splits a folio has a reference to it beside those of its mappings.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum InHand {
    /// The first page's, afterwards.
    Yes,
    /// It relies on the lock of an entry.
    No,
}

impl<A: Arch> Kernel<A> {
    /// Splits the folios of 2 MiB that `mm` maps in `start..start + len`, and their entries. Returns how many.
    ///
    /// # Errors
    /// EINVAL for a bad range. A folio that cannot be split is none.
    pub(crate) fn split_folios(&self, mm: Pa<Mm>, start: u64, len: u64) -> Result<u64, Errno> {
        let end = start.checked_add(page_align(len)).ok_or(Errno::EINVAL)?;
        if !is_page_aligned(start) || end > USER_END {
            return Err(Errno::EINVAL);
        }
        let space = self.obj(mm);
        let _guard = self.read_lock(&space.mmap_lock, LockClass::MmapRead);
        let (mut at, mut split) = (start, 0);
        while at < end
            && let Some(vma) = self.vma_in(space, at, end)
        {
            let area = self.obj(vma);
            at = at.max(area.start.get());
            let to = end.min(area.end.get());
            while at < to {
                if self.maps_large(space, at) && self.split_folio(mm, vma, at).is_ok() {
                    split += 1;
                }
                at += PAGE_SIZE;
            }
        }
        Ok(split)
    }

    fn maps_large(&self, mm: &Mm, gva: u64) -> bool {
        self.leaf_at(mm, gva).is_some_and(|(_, entry)| {
            let head = self.head(entry.address());
            self.folio(head).order.get() == HUGE_ORDER
        })
    }

    /// Splits the folio that `vma` maps at `gva`.
    ///
    /// # Errors
    /// EAGAIN where others use it, or nothing is there any more.
    pub(super) fn split_folio(&self, mm: Pa<Mm>, vma: Pa<Vma>, gva: u64) -> Result<(), Errno> {
        let space = self.obj(mm);
        self.split_huge_entry(mm, gva);
        let table = self.leaf_table(space, gva).map_err(|_| Errno::EAGAIN)?;
        let (head, mapped) = {
            let _family = self.lock_vma_family(vma);
            let _guard = self.lock_table(table);
            let entry = self.read_pte(Slot::new(table, 1, gva));
            let head = self.head(entry.address());
            if !entry.is_present() || !self.is_large(head) {
                return Err(Errno::EAGAIN);
            }
            (head, self.split_mapped_by(table, head, InHand::No)?)
        };
        self.put_unmapped(head, &mapped, InHand::No);
        Ok(())
    }

    /// Splits the folio at `head`, all of whose entries are in `table`. Returns which of its pages are mapped: each other has
    /// a reference too, [for the caller](Kernel::put_unmapped). Under the lock of the table and that of the family.
    ///
    /// # Errors
    /// EAGAIN where others use it.
    pub(super) fn split_mapped_by(
        &self,
        table: u64,
        head: u64,
        in_hand: InHand,
    ) -> Result<Pages, Errno> {
        let mapped = self.pages_mapped_by(table, head);
        self.freeze(head, &mapped, in_hand)?;
        self.make_small(head, &mapped, in_hand);
        Ok(mapped)
    }

    /// Gives up the references with which the pages were left that nothing maps. Under no lock. Returns how many are free.
    pub(super) fn put_unmapped(&self, head: u64, mapped: &Pages, in_hand: InHand) -> u64 {
        let mut freed = 0;
        for page in pages_in(&mapped.map(|word| !word)) {
            self.folio_put(head + page * PAGE_SIZE, cause::UNMAP);
            freed += u64::from(page > 0 || in_hand == InHand::No);
        }
        freed
    }

    /// The pages of the folio at `head` that entries of `table` map, each at most once. Under its lock.
    fn pages_mapped_by(&self, table: u64, head: u64) -> Pages {
        let mut mapped = Pages::default();
        for index in 0..ENTRIES_PER_TABLE {
            let slot = Slot {
                table,
                level: 1,
                index,
            };
            let entry = self.read_pte(slot);
            let offset = entry.address().wrapping_sub(head);
            if entry.is_present() && offset < HUGE_PAGE_SIZE {
                let page = (offset >> PAGE_SHIFT) as usize;
                mapped[page / 64] |= 1 << (page % 64);
            }
        }
        mapped
    }

    /// Takes the references of a folio that nobody refers to but by `mapped`, and in hand (Linux's `folio_ref_freeze`).
    fn freeze(&self, head: u64, mapped: &Pages, in_hand: InHand) -> Result<(), Errno> {
        let folio = self.folio(head);
        let count: u32 = mapped.iter().map(|word| word.count_ones()).sum();
        let references = count + in_hand.references();
        if folio.mapcount.get() != count {
            return Err(Errno::EAGAIN);
        }
        // AcqRel: who pins without a lock either has its reference counted here, or finds none.
        let frozen = folio
            .refcount
            .compare_exchange(references, 0, AcqRel, Acquire)
            .is_ok();
        frozen.then_some(()).ok_or(Errno::EAGAIN)
    }

    /// Makes each page of a frozen folio one of its own, with a reference: of its entry, or the caller's; and lists them.
    fn make_small(&self, head: u64, mapped: &Pages, in_hand: InHand) {
        let folio = self.folio(head);
        let (owner, index) = (folio.owner.get(), folio.index.get());
        let held = u64::from(in_hand.references());
        event!(
            self,
            EventKind::FolioSplit,
            [head, u64::from(HUGE_ORDER), held, 0, 0]
        );
        // Nobody takes it off the queue who gets no reference to it.
        let is_queued = self.is_queued(head);
        let _lists = (self.has_swap() || is_queued).then(|| self.lock_lru());
        let place = self.lru_split(head);
        if is_queued {
            self.queue_unlink(head);
        }
        // What reclaim knows of the whole it knows of the parts.
        let known = folio.state.get() & OF_LISTS;
        for page in (0..ENTRIES_PER_TABLE).rev() {
            let gpa = head + page as u64 * PAGE_SIZE;
            let small = self.folio(gpa);
            let is_mapped = mapped[page / 64] >> (page % 64) & 1;
            small.order.set(0);
            small.owner.set(owner);
            small.index.set(index + page as u64);
            small.mapcount.set(is_mapped as u32);
            small.state.set(known);
            if page > 0 {
                small.generation.set(small.generation.get().wrapping_add(1));
                small.next.set(0);
                small.kind.set(FrameKind::Anon as u8);
            }
            self.charge_split(head, gpa);
            let mine = if page == 0 { in_hand.references() } else { 0 };
            // Release: who takes a reference finds the rest of it.
            small.refcount.store(1 + mine, Release);
            // What reclaim has in hand it lists itself; what nothing maps is about to be freed.
            if let Some(place) = place
                && is_mapped != 0
                && (page > 0 || place == Place::First)
            {
                self.lru_link(gpa, place);
            }
        }
    }
}

impl InHand {
    const fn references(self) -> u32 {
        match self {
            Self::Yes => 1,
            Self::No => 0,
        }
    }
}

/// The numbers of the pages in a set.
fn pages_in(pages: &Pages) -> impl Iterator<Item = u64> + '_ {
    (0..ENTRIES_PER_TABLE as u64).filter(|page| pages[(page / 64) as usize] >> (page % 64) & 1 != 0)
}
