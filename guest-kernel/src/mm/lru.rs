//! The LRU lists (Linux's mm/swap.c and the lists of mm/vmscan.c): of anonymous folios and of pages of files on the disk an
//! inactive one each, from whose end folios are reclaimed, and an active one; and unevictable ones of both. A new folio comes
//! to the inactive one (Linux b518154e59aa). Without swap there are none.
//!
//! Being listed is no reference. Who takes a folio off to work on it takes one under the lists' lock, and who gives the
//! last one up takes the folio off under the same lock first: so neither finds the folio gone.
//!
//! What a locked mapping keeps in memory comes to the unevictable list when reclaim meets it, as Linux culls lazily. It
//! comes back when reclaim finds nothing else ([`Kernel::lru_rescue`]), and so perhaps later than in Linux, which counts the locked
//! mappings of a folio.

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};

use abi::channel::{EventKind, cause};
use abi::layout::PAGE_SHIFT;
use abi::lock::LockClass;
use abi::objects::{FrameKind, folio_state, lru};
use abi::point::Point;

use super::Field;
use crate::Kernel;
use crate::arch::Arch;
use crate::sync::Guard;

/// Folios that reclaim takes off at once (Linux's SWAP_CLUSTER_MAX is 32; this bounds the kernel stack).
pub(super) const CLUSTER: usize = 16;

/// An end of a list.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Where what has just come is.
    First,
    /// Where reclaim takes from.
    Last,
}

/// Folios that were taken off the lists, each with a reference.
pub(super) struct Isolated {
    frames: [u64; CLUSTER],
    count: usize,
}

impl Isolated {
    pub(super) const fn new() -> Self {
        Self {
            frames: [0; CLUSTER],
            count: 0,
        }
    }

    pub(super) fn push(&mut self, gpa: u64) {
        self.frames[self.count] = gpa;
        self.count += 1;
    }

    pub(super) const fn is_full(&self) -> bool {
        self.count == CLUSTER
    }

    pub(super) fn frames(&self) -> &[u64] {
        &self.frames[..self.count]
    }
}

impl<A: Arch> Kernel<A> {
    pub(super) fn lock_lru(&self) -> Guard<'_, A> {
        self.lock(&self.root().lru_lock, LockClass::Lru)
    }

    /// Pages of the folios on one of the lists.
    pub(crate) fn lru_count(&self, list: usize) -> u64 {
        self.root().lru[list].count.get()
    }

    /// Lists a folio that is on no list: a new one, or one that was taken off.
    pub(super) fn lru_add(&self, gpa: u64) {
        if self.has_swap() {
            let _guard = self.lock_lru();
            self.lru_link(gpa, Place::First);
        }
    }

    /// Takes a folio off its list that is about to be split, and that nobody gets a reference to. Returns where its pages are
    /// to be listed: at the front of its list; or, where reclaim has it in hand, as the next to be reclaimed (Linux's
    /// `lru_add_split_folio`). None without lists. Under the lock.
    pub(super) fn lru_split(&self, gpa: u64) -> Option<Place> {
        if !self.has_swap() {
            return None;
        }
        if self.folio(gpa).state.get() & folio_state::LRU == 0 {
            return Some(Place::Last);
        }
        self.lru_unlink(gpa);
        Some(Place::First)
    }

    /// Pages of folios that were taken off.
    pub(super) fn pages_isolated(&self, isolated: &Isolated) -> u64 {
        isolated
            .frames()
            .iter()
            .map(|gpa| self.folio_pages(*gpa))
            .sum()
    }

    fn folio_pages(&self, gpa: u64) -> u64 {
        1 << self.folio(gpa).order.get()
    }

    /// True where the folio, to which the caller has a reference or whose list's lock it holds, is a page of a file.
    pub(super) fn is_of_file(&self, gpa: u64) -> bool {
        self.folio(gpa).kind.get() == FrameKind::File as u8
    }

    /// Takes up to a cluster of folios off the end of a list, with `most` pages, or the first of 2 MiB.
    pub(super) fn lru_isolate(&self, list: usize, most: usize) -> Isolated {
        self.lru_isolate_where(list, most, |_| true)
    }

    /// The same of those for which `is_wanted` holds.
    pub(super) fn lru_isolate_where(
        &self,
        list: usize,
        most: usize,
        is_wanted: impl Fn(u64) -> bool,
    ) -> Isolated {
        let mut isolated = Isolated::new();
        let _guard = self.lock_lru();
        let mut frame = self.root().lru[list].last.get();
        let mut left = most as u64;
        while frame != 0 && !isolated.is_full() && left > 0 {
            let gpa = frame << PAGE_SHIFT;
            frame = self.frame_folio(frame).prev.get();
            if is_wanted(gpa) && self.lru_try_get(gpa) {
                self.lru_unlink(gpa);
                isolated.push(gpa);
                left = left.saturating_sub(self.folio_pages(gpa));
            }
        }
        isolated
    }

    /// Gives all that was found unevictable another chance. False where there was nothing.
    pub(super) fn lru_rescue(&self) -> bool {
        let mut left = self.lru_count(lru::UNEVICTABLE);
        let any = left > 0;
        while left > 0 {
            let taken = self.lru_isolate(lru::UNEVICTABLE, CLUSTER);
            if taken.count == 0 {
                break;
            }
            left = left.saturating_sub(self.pages_isolated(&taken));
            for &gpa in taken.frames() {
                let state = &self.folio(gpa).state;
                state.fetch_and(!folio_state::UNEVICTABLE, Relaxed);
                self.lru_put_back(gpa);
            }
        }
        any
    }

    /// Takes one folio off its list. False where it is on none (Linux's `folio_isolate_lru`). Without a hold on it, such as
    /// an entry whose lock the caller holds, it may be another folio by now.
    pub(super) fn lru_isolate_one(&self, gpa: u64) -> bool {
        let _guard = self.lock_lru();
        let listed = self.folio(gpa).state.get() & folio_state::LRU != 0 && self.lru_try_get(gpa);
        if listed {
            self.lru_unlink(gpa);
        }
        listed
    }

    /// Lists a folio that was isolated, and gives the reference up (Linux's `folio_putback_lru`).
    pub(super) fn lru_put_back(&self, gpa: u64) {
        self.lru_add(gpa);
        self.swap_put(gpa, cause::HOLD);
    }

    /// The caller is about to give up the last reference to a folio that may be listed, or queued to be split. False where
    /// somebody has taken the folio off meanwhile, and so has another.
    ///
    /// Both are looked at under the lock. Without it, who has the folio in hand may put it back between the two looks: it would
    /// be on no list, have one reference, and be freed on a list.
    pub(super) fn lru_forget(&self, gpa: u64) -> bool {
        let folio = self.folio(gpa);
        let _guard = self.lock_lru();
        let last = folio.refcount.load(Acquire) == 1;
        if last && folio.state.load(Acquire) & folio_state::LRU != 0 {
            self.lru_unlink(gpa);
        }
        if last && self.is_large(gpa) && self.is_queued(gpa) {
            self.queue_unlink(gpa);
        }
        last
    }

    /// A reference, unless the last one is being given up. Under the lock.
    pub(super) fn lru_try_get(&self, gpa: u64) -> bool {
        point!(self, Point::RefcountChange, [gpa, 1]);
        let taken = self
            .folio(gpa)
            .refcount
            .fetch_update(AcqRel, Acquire, |count| (count > 0).then_some(count + 1));
        if let Ok(before) = taken {
            self.refcount_changed(gpa, before, before + 1, cause::HOLD);
        }
        taken.is_ok()
    }

    /// Under the lock.
    pub(super) fn lru_link(&self, gpa: u64, place: Place) {
        let (frame, folio) = (gpa >> PAGE_SHIFT, self.folio(gpa));
        let state = folio.state.fetch_or(folio_state::LRU, Relaxed);
        assert!(state & folio_state::LRU == 0, "folio {gpa:#x} listed twice");
        let number = lru::list_of(state, self.is_of_file(gpa));
        let list = &self.root().lru[number];
        let (next, prev) = match place {
            Place::First => (list.first.get(), 0),
            Place::Last => (0, list.last.get()),
        };
        folio.next.set(next);
        folio.prev.set(prev);
        match next {
            0 => list.last.set(frame),
            next => self.frame_folio(next).prev.set(frame),
        }
        match prev {
            0 => list.first.set(frame),
            prev => self.frame_folio(prev).next.set(frame),
        }
        list.count.set(list.count.get() + self.folio_pages(gpa));
        event!(self, EventKind::Lru, [gpa, number as u64 + 1, 0, 0, 0]);
    }

    fn lru_unlink(&self, gpa: u64) {
        let folio = self.folio(gpa);
        let state = folio.state.fetch_and(!folio_state::LRU, Relaxed);
        assert!(state & folio_state::LRU != 0, "folio {gpa:#x} not listed");
        let list = &self.root().lru[lru::list_of(state, self.is_of_file(gpa))];
        let (next, prev) = (folio.next.get(), folio.prev.get());
        match next {
            0 => list.last.set(prev),
            next => self.frame_folio(next).prev.set(prev),
        }
        match prev {
            0 => list.first.set(next),
            prev => self.frame_folio(prev).next.set(next),
        }
        folio.next.set(0);
        folio.prev.set(0);
        list.count.set(list.count.get() - self.folio_pages(gpa));
        event!(self, EventKind::Lru, [gpa, 0, 0, 0, 0]);
    }
}
