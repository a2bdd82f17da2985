//! When memory is reclaimed (Linux's mm/vmscan.c, `kswapd` and `balance_pgdat`; mm/page_alloc.c, `zone_watermark_ok`).
//!
//! Three marks of free frames. An allocation that leaves fewer than `low` wakes the thread, which reclaims until `high` are
//! free; one that leaves fewer than `min` reclaims itself before it goes on, as does one that finds none. Unlike Linux,
//! which keeps what is below `min` for those who reclaim, an allocation may have the last frame: reclaim allocates nothing.
//!
//! The thread (`task::kswapd`) works on a cluster of folios at a time, holding no lock, and lets others run in between. What
//! it has written it does not keep in its hands until the disk is done: the folios are on the lists meanwhile, where
//! who needs memory at once finds them, and waits for them.
//!
//! While no slot of the swap area is free, and there are no pages of files, neither reclaims (Linux's `can_reclaim_anon_pages`): every
//! allocation would look at all lists for the few folios that need none. Only who finds no free frame at all does.
//!
//! It frees to the buddy allocator: what would stay on the list of its CPU is out of the reach of others.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use core::sync::atomic::fence;

use abi::lock::LockClass;
use abi::objects::Kswapd;
use abi::point::Point;
use abi::syscall::Errno;

use super::Field;
use super::lru::CLUSTER;
use crate::Kernel;
use crate::arch::Arch;

/// Frames that an allocation reclaims that leaves fewer than `min`.
const FROM_SHORTAGE: u64 = 8;
/// KiB that `min` is at least, and at most (Linux's `calculate_min_free_kbytes`).
const MIN_KIB: u64 = 128;
const MAX_KIB: u64 = 256 << 10;
const KIB_PER_FRAME: u64 = abi::layout::PAGE_SIZE >> 10;
/// What lies between two marks at least, of all memory: 1/1000 (Linux's watermark_scale_factor).
const SCALE: u64 = 1000;

/// What an allocation does that leaves fewer free frames than there should be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Shortage {
    /// It reclaims.
    Reclaims,
    /// No more than waking the thread: what it is for is not worth more.
    Tolerated,
}

/// A CPU that has folios in hand to reclaim them, until it is dropped.
pub(super) struct Reclaiming<'k, A: Arch>(&'k Kernel<A>);

impl<A: Arch> Drop for Reclaiming<'_, A> {
    fn drop(&mut self) {
        let word = &self.0.root().kswapd.reclaiming;
        // Release: who sees it finds the folios freed, or listed.
        word.fetch_sub(1, Release);
        point!(
            self.0,
            Point::LockRelease,
            [self.0.lock_id(word), LockClass::Reclaim as u64]
        );
    }
}

/// The marks.
impl<A: Arch> Kernel<A> {
    /// Sets the marks at boot (Linux's `init_per_zone_wmark_min`).
    pub(crate) fn set_default_watermarks(&self) {
        let root = self.root();
        let frames = root.nr_frames.get() - root.first_frame.get();
        let min = match self.config.min_free {
            0 => default_minimum(frames),
            frames => frames,
        };
        let step = (min / 4).max(frames / SCALE);
        let low = min.saturating_add(step);
        self.set_watermarks([min, low, low.saturating_add(step)]);
    }

    /// `watermarks(min, low, high)`.
    pub(crate) fn change_watermarks(&self, marks: [u64; 3]) -> Result<u64, Errno> {
        if self.root().kswapd.task.get().is_null() || !marks.is_sorted() {
            return Err(Errno::EINVAL);
        }
        self.set_watermarks(marks);
        self.root().kswapd.failures.set(0);
        self.watch_memory(Shortage::Tolerated);
        Ok(0)
    }

    fn set_watermarks(&self, [min, low, high]: [u64; 3]) {
        let state = &self.root().kswapd;
        state.min.set(min);
        state.low.set(low);
        state.high.set(high);
    }

    fn free_frames_left(&self) -> u64 {
        self.root().free_frames.load(Relaxed)
    }

    /// True where the thread has something to do that it has not failed at.
    pub(crate) fn is_memory_low(&self) -> bool {
        let state = &self.root().kswapd;
        self.free_frames_left() < state.low.get()
            && state.failures.get() == 0
            && !self.reclaim_is_hopeless()
    }

    /// Last part of every allocation. Under no lock that comes last.
    #[inline]
    pub(super) fn watch_memory(&self, shortage: Shortage) {
        // Without the thread the mark is 0.
        if self.free_frames_left() < self.root().kswapd.low.get() {
            self.memory_is_low(shortage);
        }
    }

    #[cold]
    fn memory_is_low(&self, shortage: Shortage) {
        let state = &self.root().kswapd;
        let hopeless =
            || state.failures.get() >= Kswapd::MAX_FAILURES || self.reclaim_is_hopeless();
        let short = self.free_frames_left() < state.min.get();
        if shortage == Shortage::Reclaims && short && !hopeless() {
            self.direct_reclaim(FROM_SHORTAGE);
        }
        if self.free_frames_left() < state.low.get() && !hopeless() {
            // With the fence of `sleep_until_woken`: either this sees it asleep, or it sees how few frames are left.
            fence(SeqCst);
            self.wake_kswapd();
        }
    }
}

/// Reclaim by who needs memory.
impl<A: Arch> Kernel<A> {
    /// As [`Kernel::reclaim`], for an allocation (Linux's `__alloc_pages_direct_reclaim`). Where it frees anything, the thread
    /// may too again (Linux's `shrink_node` resets `kswapd_failures`).
    pub(super) fn direct_reclaim(&self, wanted: u64) -> u64 {
        let freed = self.reclaim(wanted);
        let failures = &self.root().kswapd.failures;
        if freed > 0 && failures.get() > 0 {
            failures.set(0);
            self.watch_memory(Shortage::Tolerated);
        }
        freed
    }

    /// This CPU takes folios in hand, which it will free or list again whatever others do: it allocates nothing
    /// meanwhile, and waits for no lock but page-table locks and those that come last.
    pub(super) fn reclaim_begins(&self) -> Reclaiming<'_, A> {
        self.root().kswapd.reclaiming.fetch_add(1, Relaxed);
        Reclaiming(self)
    }

    /// Waits until nobody else has folios in hand: nothing to be found on the lists is no want of memory then (Linux's
    /// `too_many_isolated`). False where nobody had. Under no page-table lock.
    pub(super) fn await_reclaim(&self) -> bool {
        let word = &self.root().kswapd.reclaiming;
        let mut waited = false;
        // Acquire: what they have freed is there.
        while word.load(Acquire) != 0 {
            self.wait(word, LockClass::Reclaim);
            waited = true;
        }
        waited
    }
}

/// Reclaim by the thread.
impl<A: Arch> Kernel<A> {
    /// Reclaims until enough frames are free (Linux's `balance_pgdat`), or nothing helps: then it has failed once more.
    /// As a task without locks.
    pub(crate) fn balance(&self) {
        let state = &self.root().kswapd;
        let (mut left, mut turn, mut rescued) = (self.clusters_to_scan(), 0, false);
        while self.free_frames_left() < state.high.get() {
            let (mut freed, mut looked_at) = (self.split_deferred(CLUSTER as u64, |_| true), 1);
            if freed == 0 {
                if self.reclaim_is_hopeless() {
                    return;
                }
                (freed, looked_at) = self.balance_cluster(turn);
                turn += 1;
            }
            if freed > 0 {
                self.free_for_all();
                state.failures.set(0);
                left = self.clusters_to_scan();
            } else if left > looked_at {
                left -= looked_at;
            } else if !rescued && self.lru_rescue() {
                // Some may have been unlocked since.
                rescued = true;
                left = self.clusters_to_scan();
            } else {
                state.failures.set(state.failures.get() + 1);
                return;
            }
            self.give_way();
        }
        state.failures.set(0);
    }

    /// Reclaims of one cluster what it can. Returns how many are free, and as how many clusters it counts.
    fn balance_cluster(&self, turn: u64) -> (u64, u64) {
        let (looked_at, (mut freed, written)) = {
            let _reclaiming = self.reclaim_begins();
            let cluster = self.isolate_cluster(turn);
            (
                self.clusters_in(&cluster),
                self.shrink_without_waiting(&cluster),
            )
        };
        if !written.frames().is_empty() {
            self.swap_sleep(written.frames());
            freed += self.finish_writing(&written);
        }
        (freed, looked_at)
    }

    /// What it has freed others can reach too.
    fn free_for_all(&self) {
        if self.config.pcp_batch > 0 {
            self.pcp_spill(0);
        }
    }
}

/// Four times the root of all memory, in KiB, between two bounds; in frames.
fn default_minimum(frames: u64) -> u64 {
    let kib = (frames * KIB_PER_FRAME * 16).isqrt();
    kib.clamp(MIN_KIB, MAX_KIB) / KIB_PER_FRAME
}

#[cfg(test)]
mod unit_tests {
    use super::default_minimum;

    #[test]
    fn the_minimum_is_linux_s() {
        // The table in Linux's mm/page_alloc.c: MiB of memory and KiB of min_free_kbytes.
        for (mib, kib) in [
            (16, 512),
            (32, 724),
            (64, 1024),
            (128, 1448),
            (256, 2048),
            (512, 2896),
            (1024, 4096),
            (2048, 5792),
            (4096, 8192),
            (8192, 11584),
            (16384, 16384),
        ] {
            assert_eq!(default_minimum(mib * 256), kib / 4, "{mib} MiB");
        }
        assert_eq!(default_minimum(256), 32);
    }
}
