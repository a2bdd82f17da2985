//! The mmu_gather: clears entries, flushes, and only then gives frames and tables back. When the mappings that were are
//! counted off is up to `zap_order`.
//!
//! Several CPUs may clear entries of one mm at once (madvise under the mmap_lock held for reading). One
//! that finds an entry already cleared by another must not return before the flush that covers it, so
//! `mm.flush_pending` counts the gathers in flight, and one that is not alone flushes everything
//! (Linux 4647706ebeee, 7a30df49f63a).

use core::convert::Infallible;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use abi::bug::Bug;
use abi::channel::{Walker, cause};
use abi::layout::{PAGE_SHIFT, PAGE_SIZE};
use abi::objects::{AnonVmaChain, Mm, Pa};
use abi::param::MAX_GATHER_BATCH;
use abi::point::Point;
use abi::pte::Pte;

use super::changed::Changed;
use super::zero::is_uncounted;
use super::{Field, FreedTables, Slot};
use crate::Kernel;
use crate::arch::Arch;

/// Who unmaps: the seeded bugs are those of system calls.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Unmap {
    /// munmap, madvise and what is built on them.
    Syscall,
    /// The end of an address space.
    Exit,
    /// ftruncate, of whoever maps the file: private copies too (Linux's even_cows).
    Truncate,
    /// Hole punching: the file's own pages, not private copies.
    Hole,
}

impl Unmap {
    /// What keeps the tables where they are meanwhile.
    pub(super) fn walker(self) -> Walker {
        match self {
            Self::Syscall | Self::Exit => Walker::Unmap,
            Self::Truncate | Self::Hole => Walker::Truncate,
        }
    }
}

/// What was cleared and not yet flushed.
pub(super) struct Gather {
    pub(super) mm: Pa<Mm>,
    pub(super) by: Unmap,
    changed: Changed,
    /// Addresses, each with what `zap_order` notes in it.
    frames: [u64; MAX_GATHER_BATCH],
    nr_frames: usize,
    room: usize,
    /// Some of them still count the mapping that is gone.
    pub(super) delayed_rmap: bool,
    /// Unlinked tables, a list of frame numbers through `Folio::next`.
    tables: u64,
    /// Chains taken off their anon_vmas, which they keep alive as long as folios may point there.
    pub(super) chains: Pa<AnonVmaChain>,
}

impl Gather {
    /// Notes an unlinked table that covered `start..end`.
    pub(super) fn add_table<A: Arch>(
        &mut self,
        kernel: &Kernel<A>,
        table: u64,
        (start, end): (u64, u64),
    ) {
        kernel.folio(table).next.set(self.tables);
        self.tables = table >> PAGE_SHIFT;
        self.cover(Changed::table(start, end));
    }

    /// Notes a frame that `entry` mapped.
    pub(super) fn add_frame(&mut self, gpa: u64, entry: Changed) {
        self.frames[self.nr_frames] = gpa;
        self.nr_frames += 1;
        self.cover(entry);
    }

    /// What it has collected.
    pub(super) fn frames(&mut self) -> &mut [u64] {
        &mut self.frames[..self.nr_frames]
    }

    /// The flush is to cover `changed` too.
    pub(super) fn cover(&mut self, changed: Changed) {
        self.changed.add(changed);
    }

    pub(super) fn is_full(&self) -> bool {
        self.nr_frames >= self.room
    }
}

impl<A: Arch> Kernel<A> {
    /// Begins to unmap parts of `mm`.
    pub(super) fn gather(&self, mm: Pa<Mm>, by: Unmap) -> Gather {
        // Relaxed: the page-table lock that both take orders this before what a second gather finds.
        self.obj(mm).flush_pending.fetch_add(1, Relaxed);
        Gather {
            mm,
            by,
            changed: Changed::NOTHING,
            frames: [0; MAX_GATHER_BATCH],
            nr_frames: 0,
            room: self.config.gather_batch as usize,
            delayed_rmap: false,
            tables: 0,
            chains: Pa::NULL,
        }
    }

    /// Clears the entries of `start..end`.
    pub(super) fn zap_range(&self, gather: &mut Gather, start: u64, end: u64) {
        let mm = self.obj(gather.mm);
        self.zap_huge_range(gather, start, end);
        let Ok(()) =
            self.for_each_leaf_table(mm, gather.by.walker(), (start, end), |table, from, to| {
                let mut gva = from;
                while gva < to {
                    gva = self.zap_table(gather, table, gva, to);
                    if gather.is_full() {
                        self.gather_flush(gather);
                    }
                }
                Ok::<(), Infallible>(())
            });
    }

    /// Clears entries of one table until the gather is full; returns where it stopped.
    fn zap_table(&self, gather: &mut Gather, table: u64, start: u64, end: u64) -> u64 {
        let mm = self.obj(gather.mm);
        let _guard = self.lock_table(table);
        self.flush_batched_pending(gather.mm);
        let used = &self.folio(table).used;
        let mut gva = start;
        while !gather.is_full() {
            if used.get() == 0 {
                gva = end;
                break;
            }
            let Some((found, entry)) = self.next_entry((table, 1), gva, end) else {
                gva = end;
                break;
            };
            gva = found + PAGE_SIZE;
            if !entry.is_present() {
                self.zap_non_present(gather, found, Slot::new(table, 1, found), entry);
                continue;
            }
            if gather.by == Unmap::Hole && !self.is_file_page(entry) {
                continue;
            }
            let entry = self.set_pte(mm, found, Slot::new(table, 1, found), entry, Pte::NONE);
            if is_uncounted(entry) {
                gather.cover(Changed::pages(found, found + PAGE_SIZE));
            } else {
                self.zap_rmap(gather, found, entry);
            }
            point!(self, Point::PteClear, [mm.id.get(), found]);
        }
        self.zap_flush_rmaps(gather);
        gva
    }

    /// When it returns, no CPU reaches what was gathered.
    pub(super) fn flush_gathered(&self, gather: &mut Gather) {
        if gather.changed.is_nothing() {
            return;
        }
        let changed = core::mem::replace(&mut gather.changed, Changed::NOTHING);
        let freed = if gather.tables == 0 {
            FreedTables::No
        } else {
            FreedTables::Yes
        };
        match gather.by {
            Unmap::Syscall | Unmap::Truncate | Unmap::Hole => {
                self.flush_change(gather.mm, changed, freed);
            }
            Unmap::Exit => self.flush_changed(gather.mm, changed, freed),
        }
    }

    /// Flushes what was gathered and frees it.
    pub(super) fn gather_flush(&self, gather: &mut Gather) {
        let bugs = self.config.bugs;
        let early = match gather.by {
            Unmap::Syscall => bugs.has(Bug::FreeBeforeFlush),
            Unmap::Hole => bugs.has(Bug::PunchFreeBeforeFlush),
            Unmap::Exit | Unmap::Truncate => false,
        };
        if early {
            self.free_gathered_frames(gather);
        }
        self.flush_gathered(gather);
        self.free_gathered_frames(gather);
        self.retire_gathered_tables(gather);
    }

    /// The flush has reached the CPUs that have the mm loaded; walkers of other CPUs, and those that may take an IPI
    /// on the way, are what the grace period is for (Linux's tlb_remove_table_free).
    fn retire_gathered_tables(&self, gather: &mut Gather) {
        if gather.tables == 0 {
            return;
        }
        while gather.tables != 0 {
            let table = gather.tables << PAGE_SHIFT;
            gather.tables = self.folio(table).next.get();
            if self.config.bugs.has(Bug::TablesFreeWithoutGracePeriod) {
                self.rcu_retire_and_free(table);
            } else {
                self.rcu_retire(table);
            }
        }
        self.rcu_poll();
    }

    fn free_gathered_frames(&self, gather: &mut Gather) {
        for &mut gpa in gather.frames() {
            self.zap_rmap_at_free(gpa);
            self.swap_put(gpa, cause::UNMAP);
        }
        gather.nr_frames = 0;
    }

    /// Ends the unmap: when it returns, no CPU can reach what was cleared.
    pub(super) fn gather_finish(&self, mut gather: Gather) {
        // Acquire: pairs with the Release below; a gather that is gone has flushed.
        let pending = &self.obj(gather.mm).flush_pending;
        let skip = self.config.bugs.has(Bug::DontneedSkipNone);
        if pending.load(Acquire) > 1 && !skip {
            gather.cover(Changed::EVERYTHING);
        }
        self.gather_flush(&mut gather);
        self.release_chains(gather.chains);
        pending.fetch_sub(1, Release);
    }
}
