//! Moving what page tables hold from one range of addresses to another: the seam at which mremap relocates pages.
//!
//! The one implementation is Linux's plain mremap (mm/mremap.c, `move_page_tables`): entries, or whole level-1 tables
//! where both ranges are aligned, change their place; folios keep their anon_vma and index, which is why the VMAs keep
//! their page offset. It is in two steps: [`Relocation::prepare`] allocates all tables that it takes and may fail,
//! [`Relocation::run`] does not.
//!
//! Two rules keep others right meanwhile. A walk back from a folio visits the two VMAs in any order, so entries move
//! under the lock of the anon_vma's family and that of the file's mappings: it finds each entry exactly once (Linux's
//! `take_rmap_locks`). And entries
//! leave their old place only as far as the page-table locks: those are held until no CPU can translate by the old
//! place any more, so that whoever finds the page at its new place, and takes it away, flushes all there is
//! (CVE-2018-18281, Linux eb66ae030829).

use abi::bug::Bug;
use abi::channel::Walker;
use abi::layout::{HUGE_PAGE_SIZE, PAGE_SIZE};
use abi::objects::{Mm, Pa, Vma};
use abi::point::Point;
use abi::pte::{Pte, level_size};
use abi::syscall::Errno;

use super::{Field, FreedTables, Slot};
use crate::Kernel;
use crate::arch::Arch;

/// Pages that are to change their addresses. Both ranges lie in VMAs when it runs, under the mmap_lock held for writing.
#[derive(Clone, Copy)]
pub(super) struct Relocation {
    pub(super) mm: Pa<Mm>,
    /// First address now.
    pub(super) old: u64,
    /// First address then; the ranges do not overlap, and nothing is mapped there.
    pub(super) new: u64,
    pub(super) bytes: u64,
}

/// A part of a relocation that one entry of level 2 covers on either side.
#[derive(Clone, Copy)]
struct Part {
    old: u64,
    new: u64,
    bytes: u64,
}

/// How a part moves.
enum Way {
    /// Nothing is there: neither here, nor in so many bytes.
    Nothing(u64),
    /// The level-1 table of the first goes behind the entry of level 2 of the second.
    Table { from: Slot, to: u64 },
    /// Entry by entry, out of this table.
    Entries { from: u64 },
}

impl Relocation {
    /// The part that begins `done` bytes in.
    fn part(&self, done: u64) -> Part {
        let (old, new) = (self.old + done, self.new + done);
        let to_boundary = |at: u64| HUGE_PAGE_SIZE - at % HUGE_PAGE_SIZE;
        let bytes = (self.bytes - done)
            .min(to_boundary(old))
            .min(to_boundary(new));
        Part { old, new, bytes }
    }

    /// Allocates the tables that it takes at the new place.
    ///
    /// # Errors
    /// ENOMEM; the caller gives back what was allocated ([`Kernel::free_empty_tables`]).
    pub(super) fn prepare<A: Arch>(&self, kernel: &Kernel<A>) -> Result<(), Errno> {
        self.each_part(|part| {
            match kernel.way(self.mm, part) {
                Way::Nothing(bytes) => return Ok(bytes),
                Way::Table { .. } => kernel.table_alloc_at(self.mm, part.new, 2)?,
                Way::Entries { .. } => kernel.leaf_table_alloc(self.mm, part.new)?,
            };
            Ok(part.bytes)
        })
    }

    /// Moves what `source`, the VMA at the old place, maps there. `unflushed` is for the seeded bug, and stays empty.
    pub(super) fn run<A: Arch>(
        &self,
        kernel: &Kernel<A>,
        source: Pa<Vma>,
        unflushed: &mut Unflushed,
    ) {
        let Ok(()) = self.each_part(|part| {
            let way = kernel.way(self.mm, part);
            if let Way::Nothing(bytes) = way {
                return Ok::<u64, core::convert::Infallible>(bytes);
            }
            let mm = kernel.obj(self.mm);
            kernel.walk_begins(mm, part.old, Walker::Move);
            // See the module: walks back find every entry once.
            let bugs = kernel.config.bugs;
            let family =
                (!bugs.has(Bug::MremapNoRmapLocks)).then(|| kernel.lock_vma_family(source));
            match way {
                Way::Table { from, to } => kernel.move_table(self.mm, part, from, to, unflushed),
                Way::Entries { from } => kernel.move_entries(self.mm, part, from, unflushed),
                Way::Nothing(_) => {}
            }
            drop(family);
            kernel.walk_ends(mm, part.old, Walker::Move);
            Ok(part.bytes)
        });
    }

    /// Calls `f` for each part; it says how many bytes it is done with.
    fn each_part<E>(&self, mut f: impl FnMut(Part) -> Result<u64, E>) -> Result<(), E> {
        let mut done = 0;
        while done < self.bytes {
            done += f(self.part(done))?;
        }
        Ok(())
    }
}

/// What has moved and is not yet flushed: nothing but with the seeded bug.
#[derive(Default)]
pub(super) struct Unflushed(Option<(u64, u64)>);

impl Unflushed {
    /// Ends the seeded bug's delay.
    pub(super) fn flush<A: Arch>(self, kernel: &Kernel<A>, mm: Pa<Mm>) {
        if let Some((start, end)) = self.0 {
            kernel.flush_range(mm, start, end, FreedTables::No);
        }
    }

    fn add(&mut self, start: u64, end: u64) {
        let (first, last) = self.0.unwrap_or((start, end));
        self.0 = Some((first.min(start), last.max(end)));
    }
}

impl<A: Arch> Kernel<A> {
    /// How `part` moves. Preparing does not change the answer: a part moves as a table only where the entry of level 2 at
    /// its new place is empty, and that entry is filled only for parts that move by entries.
    fn way(&self, mm: Pa<Mm>, part: Part) -> Way {
        let space = self.obj(mm);
        // Before the table is looked for: reclaim may split an entry meanwhile, and nobody makes one.
        if self.is_huge_at(space, part.old) {
            return self.way_of_huge(mm, part);
        }
        let from = match self.leaf_table(space, part.old) {
            Ok(from) => from,
            Err(level) => {
                let size = level_size(level);
                return Way::Nothing(part.bytes.max(size - part.old % size));
            }
        };
        let is_whole = part.bytes == HUGE_PAGE_SIZE;
        if is_whole && self.leaf_table(space, part.new).is_err() {
            let slot = |gva: u64| self.table_at(space, gva, 2);
            let from = slot(part.old).map(|table| Slot::new(table, 2, part.old));
            // Where its table of level 2 does not exist yet, preparing makes it.
            if let Ok(from) = from {
                return Way::Table {
                    from,
                    to: slot(part.new).unwrap_or(0),
                };
            }
        }
        Way::Entries { from }
    }

    fn is_huge_at(&self, mm: &Mm, gva: u64) -> bool {
        if mm.huge.get() == 0 {
            return false;
        }
        let upper = self.table_at(mm, gva, 2);
        upper.is_ok_and(|table| self.read_pte(Slot::new(table, 2, gva)).is_huge())
    }

    /// An entry of 2 MiB moves as a table does where it may stay whole (Linux's `move_huge_pmd`), and is split otherwise.
    #[cold]
    fn way_of_huge(&self, mm: Pa<Mm>, part: Part) -> Way {
        let space = self.obj(mm);
        let is_whole = part.bytes == HUGE_PAGE_SIZE;
        match self.table_at(space, part.old, 2) {
            Ok(table) if is_whole && self.leaf_table(space, part.new).is_err() => Way::Table {
                from: Slot::new(table, 2, part.old),
                to: self.table_at(space, part.new, 2).unwrap_or(0),
            },
            _ => {
                self.split_huge_entry(mm, part.old);
                self.way(mm, part)
            }
        }
    }

    /// Linux's `move_normal_pmd` and `move_huge_pmd`.
    fn move_table(&self, mm: Pa<Mm>, part: Part, from: Slot, to: u64, unflushed: &mut Unflushed) {
        let space = self.obj(mm);
        let _upper = self.lock_upper(space);
        self.flush_batched_pending(mm);
        let entry = self.read_pte(from);
        self.set_pte(space, part.old, from, entry, Pte::NONE);
        let to = Slot::new(to, 2, part.new);
        if entry.is_huge() && from.table != to.table {
            // The table that is set aside goes with it (Linux's pmd_move_must_withdraw).
            let set_aside = self.withdraw_table(space, from.table);
            self.deposit_table(space, to.table, set_aside);
        }
        self.set_pte(space, part.new, to, Pte::NONE, entry);
        point!(self, Point::PteClear, [space.id.get(), part.old]);
        if self.config.bugs.has(Bug::MremapTableNoFlush) {
            return;
        }
        self.flush_moved(mm, (part.old, part.old + part.bytes), unflushed);
    }

    /// Linux's `move_ptes`.
    fn move_entries(&self, mm: Pa<Mm>, part: Part, from: u64, unflushed: &mut Unflushed) {
        let space = self.obj(mm);
        let Ok(to) = self.leaf_table(space, part.new) else {
            // When it was prepared there was no table at the old place either: that one was made since, for the new place
            // of another part, and has nothing of this one.
            return;
        };
        // Two page-table locks in the order of their addresses; where both places share a table there is one.
        let _first = self.lock_table(from.min(to));
        let _second = (from != to).then(|| self.lock_table(from.max(to)));
        self.flush_batched_pending(mm);
        let end = part.old + part.bytes;
        let (mut rest, mut moved) = (part.old, None);
        while let Some((gva, entry)) = self.next_entry((from, 1), rest, end) {
            let target = part.new + (gva - part.old);
            let entry = self.set_pte(space, gva, Slot::new(from, 1, gva), entry, Pte::NONE);
            self.set_pte(space, target, Slot::new(to, 1, target), Pte::NONE, entry);
            point!(self, Point::PteClear, [space.id.get(), gva]);
            rest = gva + PAGE_SIZE;
            if entry.is_present() {
                moved = Some((moved.map_or(gva, |(first, _)| first), rest));
            }
        }
        if let Some(range) = moved {
            self.flush_moved(mm, range, unflushed);
        }
    }

    fn flush_moved(&self, mm: Pa<Mm>, (start, end): (u64, u64), unflushed: &mut Unflushed) {
        if self.config.bugs.has(Bug::MremapFlushAfterUnlock) {
            unflushed.add(start, end);
        } else {
            self.flush_range(mm, start, end, FreedTables::No);
        }
    }
}
