//! Reclaim: anonymous folios that were not used for long go to the swap area (Linux's mm/vmscan.c).
//!
//! A thread does before memory runs out (`kswapd`); and whoever finds no free frame, or few, does itself, wherever in the
//! kernel it allocates but for locks that come last. It takes no mmap_lock, tries the lock of anon_vmas, and allocates nothing: slots and requests are there from the
//! beginning.
//!
//! A cluster of folios goes through it at once. Each is [isolated](Isolated), gets a slot, and is unmapped; then one flush
//! makes sure that no CPU uses any of them; then those that are dirty are written, all at the same time; and those that
//! nobody has used meanwhile are freed. (Linux takes clean folios out of the swap cache before the flush. Here they wait for
//! it, so that no CPU reads an old page while another writes the one that was read in anew.) Who allocates waits for the
//! disk by spinning, for locks that spin may be held: interrupts are taken meanwhile, and the disk needs no lock. The thread sleeps.
//!
//! Out of memory is when [`ROUNDS`] times the lists have given nothing: the caller gets ENOMEM, a fault then kills.

use core::sync::atomic::Ordering::{Acquire, Relaxed};

use abi::bug::Bug;
use abi::channel::cause;
use abi::objects::{folio_flags, folio_state, lru};

use super::Field;
use super::batch::Batch;
use super::lru::{CLUSTER, Isolated};
use super::swap::IN_TRANSFER;
use super::swap_io::Waiting;
use super::unmap::References;
use crate::Kernel;
use crate::arch::Arch;

/// Times that all of the lists are looked at in vain: the first finds most pages used, and makes them forget it.
const ROUNDS: u64 = 4;

/// The two lists that folios of a sort are on.
#[derive(Clone, Copy)]
struct Lists {
    inactive: usize,
    active: usize,
}

const ANON: Lists = Lists {
    inactive: lru::INACTIVE,
    active: lru::ACTIVE,
};
const FILE: Lists = Lists {
    inactive: lru::INACTIVE_FILE,
    active: lru::ACTIVE_FILE,
};

/// Whether it counts that a page was used.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Used {
    /// It is kept then.
    Counts,
    /// It goes all the same: a program has said so (MADV_PAGEOUT).
    Ignored,
}

/// What becomes of a folio at the end of the inactive list (Linux's `folio_check_references`).
enum Verdict {
    Reclaim,
    Keep,
    Activate,
    /// A locked mapping keeps it.
    Cull,
}

impl<A: Arch> Kernel<A> {
    /// Frees `wanted` frames or more, if it can. Returns how many.
    pub(crate) fn reclaim(&self, wanted: u64) -> u64 {
        // What nobody uses at all goes first, without I/O.
        let split = self.split_deferred(wanted, |_| true);
        if split >= wanted || !self.has_swap() {
            return split;
        }
        let wanted = wanted - split;
        let freed = self.reclaim_evictable(wanted);
        // Some may have been unlocked since.
        if split + freed == 0 && self.lru_rescue() {
            return self.reclaim_evictable(wanted);
        }
        split + freed
    }

    /// True where an allocation that finds no frame may find one by reclaim.
    pub(super) fn can_reclaim(&self) -> bool {
        self.has_swap() || self.has_deferred() || self.root().kswapd.reclaiming.get() > 0
    }

    pub(super) fn reclaim_evictable(&self, wanted: u64) -> u64 {
        let (mut freed, mut left) = (0, self.clusters_to_scan());
        for turn in 0.. {
            if left == 0 || freed >= wanted {
                break;
            }
            let _reclaiming = self.reclaim_begins();
            let isolated = self.isolate_cluster(turn);
            left = left.saturating_sub(self.clusters_in(&isolated));
            freed += self.shrink_folios(&isolated, Used::Counts);
        }
        freed
    }

    /// As how many clusters these folios count, before they are split: as many as they have pages for, or one.
    pub(super) fn clusters_in(&self, isolated: &Isolated) -> u64 {
        let pages = self.pages_isolated(isolated);
        pages.div_ceil(CLUSTER as u64).max(1)
    }

    /// Clusters to look at before there is nothing to be reclaimed.
    pub(super) fn clusters_to_scan(&self) -> u64 {
        let clusters = |lists: Lists| {
            let all = self.lru_count(lists.inactive) + self.lru_count(lists.active);
            all.div_ceil(CLUSTER as u64)
        };
        // Where there are both they take turns.
        let (anon, file) = (clusters(ANON), clusters(FILE));
        ROUNDS * (anon.max(file) + anon.min(file).max(u64::from(file > 0)) + 1)
    }

    /// True where nothing can be reclaimed but what costs a look at all lists for a few: no slot is free, and there are no
    /// pages of files (Linux's `can_reclaim_anon_pages`).
    pub(super) fn reclaim_is_hopeless(&self) -> bool {
        self.swap_is_full() && !self.has_listed_files()
    }

    fn has_listed_files(&self) -> bool {
        self.lru_count(FILE.inactive) + self.lru_count(FILE.active) > 0
    }

    /// A cluster of an inactive list, after as many of the active one came there where that is the longer (Linux's
    /// `shrink_lruvec`, `inactive_is_low`). Files and anonymous memory take turns, files first. (Linux's `get_scan_count`
    /// weighs what either has cost.)
    pub(super) fn isolate_cluster(&self, turn: u64) -> Isolated {
        let files = turn.is_multiple_of(2) && self.has_listed_files();
        let lists = if files { FILE } else { ANON };
        if self.lru_count(lists.active) > self.lru_count(lists.inactive) {
            self.shrink_active(lists.active);
        }
        self.lru_isolate(lists.inactive, CLUSTER)
    }

    /// Linux's `shrink_active_list`: who used them does not count, it only is forgotten. (Linux keeps pages of programs.)
    fn shrink_active(&self, list: usize) {
        for &gpa in self.lru_isolate(list, CLUSTER).frames() {
            let found = self.folio_referenced(gpa).unwrap_or_default();
            let state = &self.folio(gpa).state;
            state.fetch_and(!folio_state::ACTIVE, Relaxed);
            if self.is_kept(gpa, &found) {
                state.fetch_or(folio_state::UNEVICTABLE, Relaxed);
            }
            self.lru_put_back(gpa);
        }
    }

    /// Reclaims what can be of a cluster, and gives the others back to the lists (Linux's `shrink_folio_list`).
    pub(super) fn shrink_folios(&self, isolated: &Isolated, used: Used) -> u64 {
        self.shrink_cluster(isolated, used, |gpa| self.let_go(gpa))
    }

    /// The same, but what is being written goes back to the lists at once: the caller waits for it, holding nothing, and
    /// then [comes back](Kernel::finish_writing) to it. Returns how many are free, and those.
    pub(super) fn shrink_without_waiting(&self, isolated: &Isolated) -> (u64, Isolated) {
        let mut written = Isolated::new();
        let freed = self.shrink_cluster(isolated, Used::Counts, |gpa| {
            if self.folio(gpa).state.load(Acquire) & folio_state::WRITEBACK == 0 {
                return self.let_go(gpa);
            }
            written.push(gpa);
            self.lru_put_back(gpa);
            false
        });
        (freed, written)
    }

    /// Lets go of what was written: who has asked for a transfer does, whether or not memory is short still. Returns how
    /// many are free.
    pub(super) fn finish_writing(&self, written: &Isolated) -> u64 {
        let _reclaiming = self.reclaim_begins();
        let mut freed = 0;
        for &gpa in written.frames() {
            // Who has taken it off its list meanwhile lets go of it, and what the frame is now may be another folio.
            if self.lru_isolate_one(gpa) {
                freed += u64::from(self.let_go(gpa));
            }
        }
        freed
    }

    fn shrink_cluster(
        &self,
        isolated: &Isolated,
        used: Used,
        mut finish: impl FnMut(u64) -> bool,
    ) -> u64 {
        let (mut batch, mut freed) = (Batch::new(), 0);
        for &gpa in isolated.frames() {
            if batch.is_full() {
                self.batch_flush(&mut batch);
            }
            match self.judge(gpa, used) {
                Verdict::Reclaim if self.is_large(gpa) => match self.split_to_reclaim(gpa) {
                    Some(unmapped) => {
                        freed += unmapped;
                        self.reclaim_first(gpa, &mut batch);
                    }
                    None => self.mark(gpa, folio_state::ACTIVE),
                },
                Verdict::Reclaim => self.unmap(gpa, &mut batch),
                Verdict::Keep => {}
                Verdict::Activate => self.mark(gpa, folio_state::ACTIVE),
                Verdict::Cull => self.mark(gpa, folio_state::UNEVICTABLE),
            }
        }
        let early = self.config.bugs.has(Bug::ReclaimFreeBeforeFlush);
        if !early {
            self.batch_flush(&mut batch);
        }
        for &gpa in isolated.frames() {
            if self.is_of_file(gpa) {
                self.write_reclaimed(gpa);
            } else {
                self.swap_write(gpa);
            }
        }
        for &gpa in isolated.frames() {
            freed += u64::from(finish(gpa));
        }
        if early {
            self.batch_flush(&mut batch);
        }
        freed
    }

    /// Slots are for one page each: so a folio of 2 MiB is split first. Its pages are the next to be reclaimed, and the first
    /// one stays in hand (Linux splits where it finds no 512 slots in a row: mm/vmscan.c, `shrink_folio_list`). Returns how many
    /// pages nothing maps, which are free then. None where it stays whole; or nothing would be gained.
    fn split_to_reclaim(&self, gpa: u64) -> Option<u64> {
        if self.folio(gpa).mapcount.load(Acquire) == 0 {
            return Some(0);
        }
        if self.swap_is_full() && !self.is_queued(gpa) {
            return None;
        }
        self.split_isolated(gpa)
    }

    /// The first page of what was split: it may be the part that is locked.
    fn reclaim_first(&self, gpa: u64, batch: &mut Batch) {
        match self.judge(gpa, Used::Ignored) {
            Verdict::Reclaim => self.unmap(gpa, batch),
            Verdict::Cull => self.mark(gpa, folio_state::UNEVICTABLE),
            Verdict::Keep | Verdict::Activate => {}
        }
    }

    fn mark(&self, gpa: u64, state: u8) {
        self.folio(gpa).state.fetch_or(state, Relaxed);
    }

    fn judge(&self, gpa: u64, used: Used) -> Verdict {
        let folio = self.folio(gpa);
        if self.folio_is_pinned(gpa) {
            return Verdict::Activate;
        }
        let is_file = self.is_of_file(gpa);
        // A reference each: of its mappings, of the cache, of who has isolated it.
        let is_cached = is_file || self.slot_of(gpa).is_some();
        let known = folio.mapcount.load(Acquire) + u32::from(is_cached) + 1;
        if folio.refcount.load(Acquire) > known {
            // It would not be free. Who copies it on a write, and reclaims for the copy's frame, would never come to an
            // end if it were unmapped again and again.
            return Verdict::Keep;
        }
        if folio.mapcount.load(Acquire) == 0 {
            // It was read ahead, or its programs are gone; or it was read by a call since the last look.
            let used = folio.state.fetch_and(!folio_state::REFERENCED, Relaxed);
            let keep = is_file && used & folio_state::REFERENCED != 0;
            return if keep {
                Verdict::Keep
            } else {
                Verdict::Reclaim
            };
        }
        let Some(found) = self.folio_referenced(gpa) else {
            return Verdict::Keep;
        };
        if self.is_kept(gpa, &found) {
            return Verdict::Cull;
        }
        if used == Used::Ignored {
            return Verdict::Reclaim;
        }
        let again = folio.state.get() & folio_state::REFERENCED != 0;
        folio.state.fetch_and(!folio_state::REFERENCED, Relaxed);
        if found.used == 0 {
            return Verdict::Reclaim;
        }
        folio.state.fetch_or(folio_state::REFERENCED, Relaxed);
        if again || found.used > 1 {
            Verdict::Activate
        } else {
            Verdict::Keep
        }
    }

    /// True where a locked mapping keeps a folio. Of one of 2 MiB a part may be locked: the rest of it can go.
    fn is_kept(&self, gpa: u64, found: &References) -> bool {
        found.locked && !(found.evictable && self.is_large(gpa))
    }

    /// Takes the folio away from those who map it.
    fn unmap(&self, gpa: u64, batch: &mut Batch) {
        let folio = self.folio(gpa);
        if folio.mapcount.load(Acquire) == 0 || folio.state.load(Acquire) & IN_TRANSFER != 0 {
            return;
        }
        if self.is_of_file(gpa) {
            return self.unmap_cached(gpa, batch);
        }
        let slot = self.slot_of(gpa);
        if slot.is_none() && folio.flags.get() & folio_flags::LAZYFREE != 0 {
            self.unmap_lazyfree(gpa, batch);
        } else if (slot.is_some() || self.swap_add(gpa))
            && let Some(slot) = self.slot_of(gpa)
        {
            self.unmap_to_swap(gpa, slot, batch);
        }
    }

    /// Frees the folio if nobody has come to it meanwhile; else it goes back to the lists. True where it is free.
    fn let_go(&self, gpa: u64) -> bool {
        let folio = self.folio(gpa);
        // What is being read is waited for by those who have asked for it.
        if folio.state.load(Acquire) & folio_state::WRITEBACK != 0 {
            self.swap_wait(gpa, Waiting::Spinning);
        }
        let is_detached = if self.is_of_file(gpa) {
            self.page_detach(gpa)
        } else {
            self.swap_detach(gpa)
        };
        let is_free =
            is_detached && folio.mapcount.load(Acquire) == 0 && folio.refcount.load(Acquire) == 1;
        if is_free {
            self.folio_put(gpa, cause::HOLD);
        } else {
            self.lru_put_back(gpa);
        }
        is_free
    }
}
