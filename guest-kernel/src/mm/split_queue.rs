//! Folios of 2 MiB of which a part is mapped no more: they are split when memory is short, and not before (Linux's
//! mm/huge_memory.c, `deferred_split_folio` and `deferred_split_scan`).
//!
//! Until then they hold memory that nobody uses. To split one at once would cost every munmap of a part of one what most
//! never need: the rest often goes soon after. There is a queue with and without swap.
//!
//! It has the rules of the LRU lists, and their lock: being on it is no reference; who takes a folio off takes a
//! reference under the lock, and who gives the last one up takes it off under the lock first. The place of a folio on it is the descriptor
//! of its second page (Linux's `folio->_deferred_list`), for the first one's is that on an LRU list.

use core::sync::atomic::Ordering::{Acquire, Relaxed};

use abi::channel::{EventKind, cause};
use abi::layout::{ENTRIES_PER_TABLE, PAGE_SHIFT, PAGE_SIZE};
use abi::objects::{Folio, folio_state};

use super::Field;
use crate::Kernel;
use crate::arch::Arch;

/// Pages of a folio of 2 MiB.
const PAGES: u64 = ENTRIES_PER_TABLE as u64;

impl<A: Arch> Kernel<A> {
    /// The folio of 2 MiB at `head` has `mappings` left after one has gone: where they cannot be all of it, it is queued. The caller
    /// has a reference. Under a page-table lock.
    pub(super) fn defer_split(&self, head: u64, mappings: u32) {
        let is_whole = mappings == 0
            || u64::from(mappings) >= PAGES
            || self.folio(head).used.load(Relaxed) != 0;
        if is_whole || self.is_queued(head) {
            return;
        }
        let _guard = self.lock_lru();
        if !self.is_queued(head) {
            self.queue_link(head);
        }
    }

    /// True where the folio of 2 MiB at `head` is on the queue. It stays so while the lists' lock is held.
    pub(super) fn is_queued(&self, head: u64) -> bool {
        self.queue_place(head).state.load(Acquire) & folio_state::DEFERRED != 0
    }

    /// True where something is on the queue. Of this moment only.
    pub(super) fn has_deferred(&self) -> bool {
        self.root().split_queue.count.get() > 0
    }

    /// Splits folios of the queue for which `is_wanted` holds until `wanted` frames are free, each once. Returns how many are.
    /// What somebody else uses stays on it. Callers hold what callers of [`Kernel::reclaim`] may.
    pub(super) fn split_deferred(&self, wanted: u64, is_wanted: impl Fn(u64) -> bool) -> u64 {
        let mut left = self.root().split_queue.count.get() / PAGES;
        let mut freed = 0;
        while left > 0 && freed < wanted {
            let _reclaiming = self.reclaim_begins();
            let Some(head) = self.deferred_take(&is_wanted) else {
                break;
            };
            left -= 1;
            match self.split_isolated(head) {
                Some(unmapped) => freed += unmapped,
                None => self.queue_again(head),
            }
            let folio = self.folio(head);
            let is_last = folio.mapcount.load(Acquire) == 0 && folio.refcount.load(Acquire) == 1;
            freed += if is_last { 1 << folio.order.get() } else { 0 };
            self.swap_put(head, cause::HOLD);
        }
        freed
    }

    /// Takes the oldest off, with a reference.
    fn deferred_take(&self, is_wanted: &impl Fn(u64) -> bool) -> Option<u64> {
        let _guard = self.lock_lru();
        let mut frame = self.root().split_queue.last.get();
        while frame != 0 {
            let head = frame << PAGE_SHIFT;
            frame = self.queue_place(head).prev.get();
            if is_wanted(head) && self.lru_try_get(head) {
                self.queue_unlink(head);
                return Some(head);
            }
        }
        None
    }

    /// The folio was taken off, and is whole still.
    fn queue_again(&self, head: u64) {
        let _guard = self.lock_lru();
        if !self.is_queued(head) && self.folio(head).mapcount.load(Acquire) > 0 {
            self.queue_link(head);
        }
    }

    /// The descriptor by which the folio at `head` is linked; links name heads.
    fn queue_place(&self, head: u64) -> &Folio {
        self.folio(head + PAGE_SIZE)
    }

    /// Under the lock.
    fn queue_link(&self, head: u64) {
        let (queue, place) = (&self.root().split_queue, self.queue_place(head));
        let (frame, first) = (head >> PAGE_SHIFT, queue.first.get());
        place.next.set(first);
        place.prev.set(0);
        match first {
            0 => queue.last.set(frame),
            first => self.queue_place(first << PAGE_SHIFT).prev.set(frame),
        }
        queue.first.set(frame);
        queue.count.set(queue.count.get() + PAGES);
        place.state.fetch_or(folio_state::DEFERRED, Relaxed);
        event!(self, EventKind::SplitQueue, [head, 1, 0, 0, 0]);
    }

    /// Under the lock.
    pub(super) fn queue_unlink(&self, head: u64) {
        let (queue, place) = (&self.root().split_queue, self.queue_place(head));
        let (next, prev) = (place.next.get(), place.prev.get());
        match next {
            0 => queue.last.set(prev),
            next => self.queue_place(next << PAGE_SHIFT).prev.set(prev),
        }
        match prev {
            0 => queue.first.set(next),
            prev => self.queue_place(prev << PAGE_SHIFT).next.set(next),
        }
        place.next.set(0);
        place.prev.set(0);
        queue.count.set(queue.count.get() - PAGES);
        place.state.fetch_and(!folio_state::DEFERRED, Relaxed);
        event!(self, EventKind::SplitQueue, [head, 0, 0, 0, 0]);
    }
}
