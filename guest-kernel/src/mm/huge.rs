//! Entries of level 2 that map a folio of 2 MiB: what unmapping, mprotect, fork, mremap and walks back do with a whole
//! one (Linux 6.18's mm/huge_memory.c). Where they mean a part of it, it is split first (`huge_split`).
//!
//! Such an entry is under the lock of the mm's upper levels. Under the mmap_lock held for reading it may be set
//! where the entry is empty, cleared, and split; a table that took its place stays. So each of these makes two passes: over
//! the entries of 2 MiB in its range, and then over the tables.

use core::convert::Infallible;
use core::sync::atomic::Ordering::{Acquire, Relaxed};

use abi::channel::{Walker, cause};
use abi::layout::HUGE_PAGE_SIZE;
use abi::objects::{AnonVma, Mm, Pa, Vma, folio_flags};
use abi::point::Point;
use abi::pte::{Pte, level_size};
use abi::syscall::Errno;

use super::changed::Changed;
use super::gather::{Gather, Unmap};
use super::protect::takes_away;
use super::rmap::MappedAt;
use super::{Field, Slot};
use crate::Kernel;
use crate::arch::Arch;

/// The first byte of the 2 MiB that hold `address`.
pub(super) const fn huge_page_of(address: u64) -> u64 {
    address & !(HUGE_PAGE_SIZE - 1)
}

impl<A: Arch> Kernel<A> {
    /// Calls `f` with the first address of each 2 MiB in or around `start..end` that one entry maps. The entry may be another
    /// when `f` looks at it under its lock.
    #[inline]
    pub(super) fn for_each_huge<E>(
        &self,
        mm: &Mm,
        (start, end): (u64, u64),
        f: impl FnMut(u64) -> Result<(), E>,
    ) -> Result<(), E> {
        // Counted before such an entry is set, and as long as its split has not linked the table. Acquire: no entry is
        // looked at before.
        if mm.huge.load(Acquire) == 0 {
            return Ok(());
        }
        self.for_each_huge_entry(mm, (start, end), f)
    }

    #[inline(never)]
    fn for_each_huge_entry<E>(
        &self,
        mm: &Mm,
        (start, end): (u64, u64),
        mut f: impl FnMut(u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut gva = huge_page_of(start);
        while gva < end {
            let level = match self.table_at(mm, gva, 2) {
                Ok(table) => {
                    if self.read_pte(Slot::new(table, 2, gva)).is_huge() {
                        f(gva)?;
                    }
                    2
                }
                Err(level) => level,
            };
            let size = level_size(level);
            gva = (gva & !(size - 1)) + size;
        }
        Ok(())
    }

    /// Calls `f` with the place of the entry of 2 MiB for `gva` and what it is, under its lock; not where there is none.
    pub(super) fn with_huge<T>(
        &self,
        mm: &Mm,
        gva: u64,
        f: impl FnOnce(Slot, Pte) -> T,
    ) -> Option<T> {
        let slot = Slot::new(self.table_at(mm, gva, 2).ok()?, 2, gva);
        let _guard = self.lock_upper(mm);
        let entry = self.read_pte(slot);
        // Under the lock no split is half done.
        entry.is_huge().then(|| f(slot, entry))
    }

    /// [`Kernel::leaf_at`] of who tells a program what is there, and so must not take an entry for none that is being split:
    /// reclaim does that under no lock that keeps others out for longer (Linux's `pmd_trans_huge_lock` in mincore).
    pub(super) fn leaf_told(&self, mm: &Mm, gva: u64) -> Option<(u8, Pte)> {
        let found = self.leaf_at(mm, gva);
        if found.is_some() || mm.huge.get() == 0 {
            return found;
        }
        // Under the lock no split is half done.
        let _guard = self.lock_upper(mm);
        self.leaf_at(mm, gva)
    }

    /// Clears the entries of 2 MiB that lie in `start..end`, and splits those that reach beyond it (Linux's
    /// `zap_huge_pmd`).
    #[inline]
    pub(super) fn zap_huge_range(&self, gather: &mut Gather, start: u64, end: u64) {
        let mm = self.obj(gather.mm);
        let Ok(()) = self.for_each_huge(mm, (start, end), |gva| {
            if gva < start || gva + HUGE_PAGE_SIZE > end {
                self.split_huge_entry(gather.mm, gva);
            } else if gather.by != Unmap::Hole {
                self.zap_huge(gather, gva);
            }
            Ok::<(), Infallible>(())
        });
    }

    fn zap_huge(&self, gather: &mut Gather, gva: u64) {
        let mm = self.obj(gather.mm);
        self.walk_begins(mm, gva, gather.by.walker());
        let table = self.with_huge(mm, gva, |slot, entry| {
            self.set_pte(mm, gva, slot, entry, Pte::NONE);
            self.zap_rmap_huge(gather, gva, entry);
            point!(self, Point::PteClear, [mm.id.get(), gva]);
            self.withdraw_table(mm, slot.table)
        });
        self.walk_ends(mm, gva, gather.by.walker());
        if let Some(table) = table {
            // A collapse may have set it aside, and a walk without locks may be in it still.
            self.rcu_retire(table);
            self.rcu_poll();
        }
        if gather.is_full() {
            self.gather_flush(gather);
        }
    }

    /// Gives the entries of 2 MiB in `start..end` the permissions of a VMA with `flags` (Linux's `change_huge_pmd`).
    #[inline]
    pub(super) fn protect_huge_range(
        &self,
        mm: Pa<Mm>,
        (start, end): (u64, u64),
        flags: u64,
        reduced: &mut Changed,
    ) {
        let space = self.obj(mm);
        let Ok(()) = self.for_each_huge(space, (start, end), |gva| {
            // A VMA does not end in the middle of one.
            assert!(gva >= start && gva + HUGE_PAGE_SIZE <= end);
            self.walk_begins(space, gva, Walker::Protect);
            self.with_huge(space, gva, |slot, entry| {
                let new = self.protected(entry, flags);
                if new != entry {
                    self.set_pte(space, gva, slot, entry, new);
                }
                if takes_away(entry, new) {
                    reduced.add(Changed::huge(gva));
                    point!(self, Point::PteProtect, [space.id.get(), gva]);
                }
            });
            self.walk_ends(space, gva, Walker::Protect);
            Ok::<(), Infallible>(())
        });
    }

    /// Shares the folios that entries of 2 MiB in `start..end` map with the child (Linux's `copy_huge_pmd`). One that a
    /// device uses is split in the parent, and copied page by page.
    ///
    /// # Errors
    /// ENOMEM.
    #[inline]
    pub(super) fn copy_huge_range(
        &self,
        parent: Pa<Mm>,
        child: Pa<Mm>,
        range: (u64, u64),
    ) -> Result<(), Errno> {
        self.for_each_huge(self.obj(parent), range, |gva| {
            self.copy_huge(parent, child, gva)
        })
    }

    fn copy_huge(&self, parent: Pa<Mm>, child: Pa<Mm>, gva: u64) -> Result<(), Errno> {
        let (old, new) = (self.obj(parent), self.obj(child));
        let set_aside = self.table_alloc(child, 1)?;
        let to = self
            .table_alloc_at(child, gva, 2)
            .inspect_err(|_| self.free_frames(set_aside))?;
        let to = Slot::new(to, 2, gva);
        self.walk_begins(old, gva, Walker::Fork);
        let is_shared = self.with_huge(old, gva, |slot, entry| {
            if self.copies_pinned(entry) {
                return false;
            }
            // Two locks of upper levels: nobody else can know the child's yet.
            let _child = self.lock_upper(new);
            let shared = self.share_entry(entry);
            self.count_huge(entry.address(), 1);
            if entry != shared {
                self.set_pte(old, gva, slot, entry, shared);
                point!(self, Point::PteProtect, [old.id.get(), gva]);
            }
            self.deposit_table(new, to.table, set_aside);
            self.set_pte(new, gva, to, Pte::NONE, shared);
            point!(self, Point::PteInstall, [new.id.get(), gva]);
            true
        });
        self.walk_ends(old, gva, Walker::Fork);
        if is_shared != Some(true) {
            self.free_frames(set_aside);
            self.split_huge_entry(parent, gva);
        }
        Ok(())
    }

    /// Calls `f` where the entry of 2 MiB of `vma` for `gva` maps the frame at `gpa`. False where there is none of 2 MiB.
    #[cold]
    pub(super) fn rmap_huge_entry(
        &self,
        mm: Pa<Mm>,
        vma: Pa<Vma>,
        gva: u64,
        gpa: u64,
        f: &mut impl FnMut(MappedAt),
    ) -> bool {
        let base = huge_page_of(gva);
        let found = self.with_huge(self.obj(mm), gva, |slot, entry| {
            if entry.address() + (gva - base) == gpa {
                f(MappedAt {
                    mm,
                    vma,
                    gva: base,
                    slot,
                    entry,
                });
            }
        });
        found.is_some()
    }
}

/// Counting.
impl<A: Arch> Kernel<A> {
    /// As [`Kernel::folio_map_new`], for a folio of 2 MiB that one entry is to map.
    pub(super) fn folio_map_new_huge(&self, head: u64, owner: Pa<AnonVma>, index: u64) {
        // Before it is listed, and found by reclaim.
        self.count_huge(head, 1);
        self.folio_map_new(head, owner, index);
    }

    /// As [`Kernel::folio_unmap`], for an entry of 2 MiB.
    pub(super) fn folio_unmap_huge(&self, head: u64) {
        self.count_huge(head, -1);
        self.folio_unmap(head);
    }

    /// Counts the entries of level 2 that map the folio at `head`; entries of several mms may change at once.
    pub(super) fn count_huge(&self, head: u64, by: i32) {
        let entire = &self.folio(head).used;
        entire.fetch_add(by.cast_unsigned(), Relaxed);
    }

    /// One entry of 2 MiB becomes 512 small ones, each with a reference and the exclusivity of the whole (Linux's
    /// `__split_huge_pmd_locked`). References come first: a folio never has less than mappings.
    pub(super) fn folio_split_mapping(&self, head: u64) {
        let more = super::pages(HUGE_PAGE_SIZE) as u32 - 1;
        point!(self, Point::RefcountChange, [head, 1]);
        let folio = self.folio(head);
        let before = folio.refcount.fetch_add(more, Relaxed);
        self.refcount_changed(head, before, before + more, cause::MAP);
        self.set_mapcount(head, more.cast_signed(), cause::MAP);
        self.count_huge(head, -1);
        let exclusive = folio.flags.get() & folio_flags::EXCLUSIVE;
        for page in self.pages_of(head) {
            let flags = &self.folio(page).flags;
            // Who maps the whole has not given this page up, though another may have.
            flags.fetch_and(!(folio_flags::EXCLUSIVE | folio_flags::LAZYFREE), Relaxed);
            flags.fetch_or(exclusive, Relaxed);
        }
    }
}
