//! Page tables: walking, and the one function that writes entries.
//!
//! Locks (Linux's split page-table locks): entries of a level-1 table are under that table's own
//! [`Folio::lock`], entries of all higher levels under the lock of the mm's level-4 table. Entries are
//! read without a lock, and what was read is checked again under it. Upper entries are set by any
//! fault and cleared only where no VMA is, under the mmap_lock held for writing: a walk under the mmap_lock, or in a VMA that is held, reaches
//! tables that stay. An entry of level 2 that maps 2 MiB does not: whoever holds the upper lock may split or clear it
//! (`huge`).
//!
//! [`Folio::lock`]: abi::objects::Folio::lock
#![allow(unsafe_code, reason = "paging structures in the direct map")]

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};

use abi::channel::{EventKind, Walker};
use abi::layout::ENTRIES_PER_TABLE;
use abi::objects::{FrameKind, Mm, Pa};
use abi::point::Point;
use abi::pte::{Pte, PteFlags, fault, index, level_size};
use abi::syscall::Errno;

use super::Field;
use super::gather::Gather;
use crate::Kernel;
use crate::arch::Arch;
use crate::sync::Guard;
use abi::lock::LockClass;

/// Place of one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Guest physical address of the table.
    pub table: u64,
    /// 1 for a table of leaf entries, to 4.
    pub level: u8,
    /// Entry in the table.
    pub index: usize,
}

impl Slot {
    /// The entry for `gva` in the `table` of `level`.
    #[must_use]
    pub const fn new(table: u64, level: u8, gva: u64) -> Self {
        Self {
            table,
            level,
            index: index(gva, level),
        }
    }
}

/// What the processor sets by itself.
const HARDWARE: u64 = PteFlags::ACCESSED.bits() | PteFlags::DIRTY.bits();
/// An entry that refers to a table. A is set in advance: hardware never has to write it.
pub(super) const TABLE: PteFlags = PteFlags::PRESENT
    .union(PteFlags::WRITE)
    .union(PteFlags::USER)
    .union(PteFlags::ACCESSED);

impl<A: Arch> Kernel<A> {
    /// Reads an entry.
    pub fn read_pte(&self, slot: Slot) -> Pte {
        // Acquire: pairs with `set_pte`; a table that the entry refers to reads as it was published.
        Pte(self.entry(slot).load(Acquire))
    }

    /// Writes an entry, under its page-table lock, and keeps `rss`, `tables` and `used` true.
    /// Returns what was there: `old`, with the A and D bits that the processor has set since.
    ///
    /// # Panics
    /// Where the entry is not `old`: somebody wrote it without the lock.
    // Always: by the thousand entries are set with a level, and an old or new one, that are constants.
    #[inline(always)]
    pub fn set_pte(&self, mm: &Mm, gva: u64, slot: Slot, old: Pte, new: Pte) -> Pte {
        let entry = self.entry(slot);
        if slot.level > 1 {
            Self::count_huge_ahead(mm, old, new);
        }
        // AcqRel: what the entry refers to is visible before the entry is.
        let (seen, value) = match entry.compare_exchange(old.0, new.0, AcqRel, Acquire) {
            Ok(_) => (old, new),
            Err(now) => set_used_pte(entry, (gva, slot.level), (old, new), now),
        };
        if seen.is_none() != value.is_none() {
            let delta = if seen.is_none() { 1 } else { -1 };
            let used = &self.folio(slot.table).used;
            used.set(used.get().wrapping_add_signed(delta));
        }
        if slot.level > 1 {
            Self::count_upper(mm, seen, value);
        } else if seen.is_resident() != value.is_resident() {
            let delta: i64 = if value.is_resident() { 1 } else { -1 };
            mm.rss.fetch_add(delta.cast_unsigned(), Relaxed);
        }
        event!(
            self,
            EventKind::PteChange,
            [mm.id.get(), gva, u64::from(slot.level), seen.0, value.0],
        );
        seen
    }

    /// Sets A or D as a processor does that walks the tables: without a lock. False where the entry is another by now.
    #[cfg(feature = "testbed")]
    pub(super) fn processor_sets(&self, slot: Slot, from: Pte, to: Pte) -> bool {
        let entry = self.entry(slot);
        entry
            .compare_exchange(from.0, to.0, AcqRel, Acquire)
            .is_ok()
    }

    /// An entry of 2 MiB is counted before it is there, and until it is not: where [`Mm::huge`] is 0, nobody has used one
    /// that is still there.
    fn count_huge_ahead(mm: &Mm, old: Pte, new: Pte) {
        if new.is_huge() && !old.is_huge() {
            // AcqRel: before the exchange that follows.
            mm.huge.fetch_add(1, AcqRel);
        }
    }

    /// Keeps the counts of an mm true where an entry above level 1 was `old` and is `new`.
    fn count_upper(mm: &Mm, old: Pte, new: Pte) {
        if old.is_table() != new.is_table() {
            let delta: i64 = if new.is_table() { 1 } else { -1 };
            mm.tables.fetch_add(delta.cast_unsigned(), Relaxed);
        }
        if old.is_huge() || new.is_huge() {
            Self::count_huge_entry(mm, old, new);
        }
    }

    #[cold]
    fn count_huge_entry(mm: &Mm, old: Pte, new: Pte) {
        let (before, after) = (huge_pages(old), huge_pages(new));
        if before != after {
            mm.rss.fetch_add(after.wrapping_sub(before), Relaxed);
        }
        if old.is_huge() && !new.is_huge() {
            mm.huge.fetch_sub(1, AcqRel);
        }
    }

    /// Takes the split page-table lock of the level-1 table at `table`.
    pub(super) fn lock_table(&self, table: u64) -> Guard<'_, A> {
        self.lock(&self.folio(table).lock, LockClass::PageTable)
    }

    /// Takes the lock of all levels above.
    pub(super) fn lock_upper(&self, mm: &Mm) -> Guard<'_, A> {
        self.lock_table(mm.pgd.get())
    }

    /// Somebody begins to walk the tables of `mm` for `gva`, and holds pointers to them from now on.
    #[inline]
    pub(super) fn walk_begins(&self, mm: &Mm, gva: u64, walker: Walker) {
        self.walk_event(EventKind::WalkBegin, mm, gva, walker);
    }

    /// The walk is over.
    #[inline]
    pub(super) fn walk_ends(&self, mm: &Mm, gva: u64, walker: Walker) {
        self.walk_event(EventKind::WalkEnd, mm, gva, walker);
    }

    #[inline]
    fn walk_event(&self, kind: EventKind, mm: &Mm, gva: u64, walker: Walker) {
        event!(self, kind, [mm.id.get(), gva, walker as u64, 0, 0]);
    }

    /// The level-1 table that covers `gva`; where there is none, the level at which the walk ends.
    ///
    /// # Errors
    /// The level whose entry is not present, or maps 2 MiB (2).
    #[inline]
    pub fn leaf_table(&self, mm: &Mm, gva: u64) -> Result<u64, u8> {
        self.table_at(mm, gva, 1)
    }

    /// The table of `wanted` level that covers `gva`.
    ///
    /// # Errors
    /// As [`Kernel::leaf_table`].
    #[inline]
    pub(super) fn table_at(&self, mm: &Mm, gva: u64, wanted: u8) -> Result<u64, u8> {
        let (mut table, mut level) = (mm.pgd.get(), 4);
        while level > wanted {
            let entry = self.read_pte(Slot::new(table, level, gva));
            if !entry.is_table() {
                return Err(level);
            }
            table = entry.address();
            level -= 1;
        }
        Ok(table)
    }

    /// The leaf entry that translates `gva`, with its level; none where nothing is present there.
    pub(super) fn leaf_at(&self, mm: &Mm, gva: u64) -> Option<(u8, Pte)> {
        self.leaf_below(mm.pgd.get(), gva)
    }

    /// The same below the level-4 table `root`.
    pub(super) fn leaf_below(&self, root: u64, gva: u64) -> Option<(u8, Pte)> {
        let (mut table, mut level) = (root, 4);
        loop {
            let entry = self.read_pte(Slot::new(table, level, gva));
            if !entry.is_present() {
                return None;
            }
            if entry.is_leaf(level) {
                return Some((level, entry));
            }
            (table, level) = (entry.address(), level - 1);
        }
    }

    /// Whether the entries for `gva` let a program make the access of page-fault `error`; otherwise the
    /// code of the fault that it would take. Upper entries permit everything.
    ///
    /// Needs no lock where `mm` is loaded on this CPU and interrupts are off: tables that are unlinked
    /// meanwhile are not freed before this CPU has flushed.
    ///
    /// # Errors
    /// The code of the fault.
    pub(crate) fn check_access(&self, mm: &Mm, gva: u64, error: u64) -> Result<(), u64> {
        self.walk_begins(mm, gva, Walker::User);
        let entry = self.leaf_at(mm, gva).map_or(Pte::NONE, |(_, entry)| entry);
        self.walk_ends(mm, gva, Walker::User);
        if !entry.is_present() {
            return Err(error);
        }
        let mut needed = PteFlags::USER;
        if error & fault::WRITE != 0 {
            needed |= PteFlags::WRITE;
        }
        if entry.flags().contains(needed) {
            Ok(())
        } else {
            Err(error | fault::PRESENT)
        }
    }

    /// The level-1 table that covers `gva`, made on the way where it is missing. An entry of 2 MiB in its place is
    /// split.
    ///
    /// # Errors
    /// ENOMEM; tables made before it stay, and go with the VMA around them.
    #[inline]
    pub fn leaf_table_alloc(&self, mm: Pa<Mm>, gva: u64) -> Result<u64, Errno> {
        self.table_alloc_at(mm, gva, 1)
    }

    /// As [`Kernel::leaf_table_alloc`], for the table of `wanted` level.
    ///
    /// # Errors
    /// ENOMEM.
    #[inline]
    pub(super) fn table_alloc_at(&self, mm: Pa<Mm>, gva: u64, wanted: u8) -> Result<u64, Errno> {
        let space = self.obj(mm);
        let mut table = space.pgd.get();
        let mut level = 4;
        while level > wanted {
            let slot = Slot::new(table, level, gva);
            let entry = self.read_pte(slot);
            table = if entry.is_table() {
                entry.address()
            } else {
                self.table_link(mm, gva, slot)?
            };
            level -= 1;
        }
        Ok(table)
    }

    /// Puts a new table behind the empty entry `slot`, or finds that somebody else just did.
    fn table_link(&self, mm: Pa<Mm>, gva: u64, slot: Slot) -> Result<u64, Errno> {
        if self.read_pte(slot).is_huge() {
            self.split_huge_entry(mm, gva);
            let entry = self.read_pte(slot);
            if entry.is_table() {
                return Ok(entry.address());
            }
        }
        let table = self.table_alloc(mm, slot.level - 1)?;
        let space = self.obj(mm);
        let guard = self.lock_upper(space);
        let entry = self.read_pte(slot);
        if !entry.is_none() {
            drop(guard);
            self.free_frames(table);
            if entry.is_huge() {
                return self.table_link(mm, gva, slot);
            }
            return Ok(entry.address());
        }
        self.set_pte(space, gva, slot, Pte::NONE, Pte::new(table, TABLE));
        Ok(table)
    }

    /// An empty table that nothing refers to yet.
    pub(super) fn table_alloc(&self, mm: Pa<Mm>, level: u8) -> Result<u64, Errno> {
        let table = self.alloc_charged(mm, 0, FrameKind::Table)?;
        self.arch.zero_frame(table);
        let folio = self.folio(table);
        folio.owner.set(mm.0);
        folio.index.set(u64::from(level));
        Ok(table)
    }

    /// Calls `f(table, from, to)` for each level-1 table in `start..end`, with the part of the range
    /// that it covers.
    pub(super) fn for_each_leaf_table<E>(
        &self,
        mm: &Mm,
        walker: Walker,
        (start, end): (u64, u64),
        mut f: impl FnMut(u64, u64, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut gva = start;
        while gva < end {
            let (level, table) = match self.leaf_table(mm, gva) {
                Ok(table) => (2, Some(table)),
                Err(level) => (level, None),
            };
            let size = level_size(level);
            let next = ((gva & !(size - 1)) + size).min(end);
            if let Some(table) = table {
                self.walk_begins(mm, gva, walker);
                let result = f(table, gva, next);
                self.walk_ends(mm, gva, walker);
                result?;
            }
            gva = next;
        }
        Ok(())
    }

    /// Unlinks the tables in `start..end` that no VMA needs any more: those whose whole range lies in
    /// `floor..ceiling`, the hole around `start..end` (Linux's free_pgtables). `gather` frees them
    /// after the flush. Under the mmap_lock held for writing.
    pub(super) fn unlink_tables(
        &self,
        gather: &mut Gather,
        (start, end): (u64, u64),
        hole: (u64, u64),
    ) {
        let pgd = self.obj(gather.mm).pgd.get();
        self.unlink_below(gather, (pgd, 4), (start, end), hole);
    }

    fn unlink_below(
        &self,
        gather: &mut Gather,
        (table, level): (u64, u8),
        (start, end): (u64, u64),
        (floor, ceiling): (u64, u64),
    ) {
        let size = level_size(level);
        let mut from = start;
        // Stops with the last entry: at the end of an address space the rest of the table is empty.
        while self.folio(table).used.get() > 0
            && let Some((region, entry)) = self.next_entry((table, level), from, end)
        {
            let (child, past) = (entry.address(), region + size);
            if level > 2 {
                let part = (start.max(region), end.min(past));
                self.unlink_below(gather, (child, level - 1), part, (floor, ceiling));
            }
            if region >= floor && past <= ceiling && self.folio(child).used.get() == 0 {
                let slot = Slot::new(table, level, region);
                let space = self.obj(gather.mm);
                let guard = self.lock_upper(space);
                self.set_pte(space, region, slot, entry, Pte::NONE);
                drop(guard);
                gather.add_table(self, child, (region, past));
            }
            from = past;
        }
    }

    /// The first entry that is not none for an address in `start..end`, all of which the `table` of `level` covers:
    /// the first address that it translates, and what it is.
    ///
    /// The caller holds what keeps such an entry as it is: for a level-1 table its lock, for the others
    /// the mmap_lock for writing. The loop over empty entries is most of what the end of an address space
    /// costs: it is tight.
    #[inline]
    pub(super) fn next_entry(
        &self,
        (table, level): (u64, u8),
        start: u64,
        end: u64,
    ) -> Option<(u64, Pte)> {
        if start >= end {
            return None;
        }
        let (first, last) = (index(start, level), index(end - 1, level));
        let entries = &self.entries(table)[first..=last];
        let at = entries
            .iter()
            .position(|entry| !Pte(entry.load(Relaxed)).is_none())?;
        let size = level_size(level);
        let gva = (start & !(size - 1)) + at as u64 * size;
        // Acquire: as `read_pte`.
        Some((gva, Pte(entries[at].load(Acquire))))
    }

    /// Copies the upper half of the kernel's level-4 table, which never changes after boot, to `pgd`.
    pub(super) fn share_kernel_half(&self, pgd: u64) {
        let kernel = self.root().pgd.get();
        let half = ENTRIES_PER_TABLE / 2 * size_of::<Pte>();
        // SAFETY: both are whole frames of the direct map; `pgd` is a fresh table that only the caller
        // knows, and nobody writes the source; they differ, so the halves do not overlap.
        unsafe {
            core::ptr::copy_nonoverlapping(
                self.arch.phys_to_virt(kernel).add(half),
                self.arch.phys_to_virt(pgd).add(half),
                half,
            );
        }
        self.folio(pgd).used.set(self.folio(kernel).used.get());
    }

    #[inline]
    fn entry(&self, slot: Slot) -> &AtomicU64 {
        &self.entries(slot.table)[slot.index]
    }

    #[inline]
    fn entries(&self, table: u64) -> &[AtomicU64; ENTRIES_PER_TABLE] {
        assert!(table != 0);
        // SAFETY: `table` is a frame of the direct map, which stays mapped for the kernel's life; its
        // words are only ever accessed atomically while they are a table's.
        unsafe { &*self.arch.phys_to_virt(table).cast() }
    }

    /// Frees a table that no CPU can walk any more.
    pub(crate) fn table_free(&self, table: u64) {
        point!(
            self,
            Point::TableFree,
            [table, self.folio(table).index.get()]
        );
        self.free_frames(table);
    }
}

/// Writes `new` to an entry that is not `old` but `now`: the processor has used it since. Returns what was there, and what
/// is.
#[cold]
#[inline(never)]
fn set_used_pte(
    entry: &AtomicU64,
    (gva, level): (u64, u8),
    (old, new): (Pte, Pte),
    mut now: u64,
) -> (Pte, Pte) {
    let mut value = new;
    loop {
        assert!(
            (now ^ old.0) & !HARDWARE == 0,
            "entry for {gva:#x} at level {level} is {now:#x}, expected {:#x}",
            old.0
        );
        // A bit that hardware sets meanwhile is kept: a lost D is a lost write. A migration entry has both too.
        if new.is_resident() && new.address() == old.address() {
            value = Pte(new.0 | (now & !old.0 & HARDWARE));
        }
        // AcqRel: as in `set_pte`.
        match entry.compare_exchange(now, value.0, AcqRel, Acquire) {
            Ok(_) => return (Pte(now), value),
            Err(other) => now = other,
        }
    }
}

/// The pages that an entry above level 1 maps itself.
const fn huge_pages(entry: Pte) -> u64 {
    if entry.is_huge() && entry.is_present() {
        ENTRIES_PER_TABLE as u64
    } else {
        0
    }
}
