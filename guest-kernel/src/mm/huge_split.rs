//! Splitting an entry of 2 MiB into a table of small ones that map the same folio (Linux 6.18's `__split_huge_pmd_locked`).
//!
//! No TLB may hold the same page in both sizes: what a processor then does is not defined well enough (SDM vol. 3A,
//! 5.10.2.3; AMD erratum 383). So the entry is made invalid and flushed before a small one can be reached. It keeps its
//! other bits meanwhile: whoever finds it takes the lock and waits ([`abi::pte::Pte::is_huge`]).
//!
//! A split never allocates: beside each entry of 2 MiB a table was set aside when it was made.

use abi::bug::Bug;
use abi::layout::{ENTRIES_PER_TABLE, HUGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE};
use abi::objects::{Mm, Pa};
use abi::point::Point;
use abi::pte::{Pte, PteFlags};
use core::convert::Infallible;
use core::sync::atomic::Ordering::Relaxed;

use super::huge::huge_page_of;
use super::page_table::TABLE;
use super::{Field, FreedTables, Slot};
use crate::Kernel;
use crate::arch::Arch;

impl<A: Arch> Kernel<A> {
    /// Splits the entry of 2 MiB that maps `gva`, if there is one (Linux's `__split_huge_pmd`). Under the mmap_lock.
    #[cold]
    pub(super) fn split_huge_entry(&self, mm: Pa<Mm>, gva: u64) {
        let base = huge_page_of(gva);
        self.with_huge(self.obj(mm), base, |slot, entry| {
            self.split_huge_locked(mm, base, slot, entry);
        });
    }

    /// Splits every entry of 2 MiB in or around `start..end`.
    #[inline]
    pub(super) fn split_huge_range(&self, mm: Pa<Mm>, start: u64, end: u64) {
        let Ok(()) = self.for_each_huge(self.obj(mm), (start, end), |gva| {
            self.split_huge_entry(mm, gva);
            Ok::<(), Infallible>(())
        });
    }

    /// Splits the entry of 2 MiB that `at`, where a VMA is to end, lies inside of (Linux's `vma_adjust_trans_huge`).
    #[inline]
    pub(super) fn split_huge_at(&self, mm: Pa<Mm>, at: u64) {
        if self.obj(mm).huge.get() > 0 && !at.is_multiple_of(HUGE_PAGE_SIZE) {
            self.split_huge_entry(mm, at);
        }
    }

    /// The same under the upper lock.
    pub(super) fn split_huge_locked(&self, mm: Pa<Mm>, base: u64, slot: Slot, entry: Pte) {
        let space = self.obj(mm);
        let mut old = entry;
        if !self.config.bugs.has(Bug::HugeSplitNoFlush) {
            let invalid = entry.without(PteFlags::PRESENT);
            let seen = self.set_pte(space, base, slot, entry, invalid);
            point!(self, Point::PteClear, [space.id.get(), base]);
            // One address invalidates a page of any size (SDM vol. 3A, 5.10.4.1).
            self.flush_range(mm, base, base + PAGE_SIZE, FreedTables::No);
            old = invalid;
            self.fill_split(space, base, slot, seen);
        } else {
            self.fill_split(space, base, slot, entry);
        }
        let table = self.withdraw_table(space, slot.table);
        self.set_pte(space, base, slot, old, Pte::new(table, TABLE));
        point!(self, Point::PteInstall, [space.id.get(), base]);
    }

    /// Fills the table that was set aside last, which nobody reaches yet, with what `entry` was.
    fn fill_split(&self, space: &Mm, base: u64, slot: Slot, entry: Pte) {
        let table = self.folio(slot.table).prev.get() << PAGE_SHIFT;
        let head = entry.address();
        self.folio_split_mapping(head);
        let flags = entry.flags().difference(PteFlags::HUGE) | PteFlags::PRESENT;
        for index in 0..ENTRIES_PER_TABLE {
            let offset = index as u64 * PAGE_SIZE;
            let small = Slot {
                table,
                level: 1,
                index,
            };
            let new = Pte::new(head + offset, flags);
            self.set_pte(space, base + offset, small, Pte::NONE, new);
        }
    }
}

/// Tables set aside (Linux's `pgtable_trans_huge_deposit`), under the upper lock.
impl<A: Arch> Kernel<A> {
    /// Sets the empty `table` of level 1 aside, for an entry of 2 MiB in the `upper` table.
    pub(super) fn deposit_table(&self, mm: &Mm, upper: u64, table: u64) {
        let first = &self.folio(upper).prev;
        self.folio(table).next.set(first.get());
        first.set(table >> PAGE_SHIFT);
        mm.tables.fetch_add(1, Relaxed);
    }

    /// A table that was set aside for an entry in the `upper` table: any of them will do.
    pub(super) fn withdraw_table(&self, mm: &Mm, upper: u64) -> u64 {
        let first = &self.folio(upper).prev;
        let table = first.get() << PAGE_SHIFT;
        assert!(table != 0, "no table was set aside in {upper:#x}");
        first.set(self.folio(table).next.get());
        self.folio(table).next.set(0);
        mm.tables.fetch_sub(1, Relaxed);
        table
    }
}
