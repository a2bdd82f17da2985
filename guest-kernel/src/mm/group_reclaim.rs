//! Reclaim for a memory group's limit (Linux's `try_to_free_mem_cgroup_pages`, mm/vmscan.c), and the limit itself.
//!
//! There is one set of LRU lists for all groups (Linux has one for each): what belongs to others is passed by.

use core::sync::atomic::Ordering::{Relaxed, SeqCst};

use abi::lock::LockClass;
use abi::objects::{MemGroup, folio_state, group_stat, lru};
use abi::syscall::Errno;

use super::Field;
use super::group::RETRIES;
use super::lru::CLUSTER;
use super::reclaim::Used;
use crate::Kernel;
use crate::arch::Arch;

/// Times that all of the lists are looked at in vain: the first finds most pages used, and makes them forget it.
const ROUNDS: u64 = 4;

impl<A: Arch> Kernel<A> {
    /// Frees `wanted` frames or more that are charged to `group` or below it, if it can. Returns how many. Callers hold
    /// what callers of [`Kernel::reclaim`] may.
    #[cold]
    pub(super) fn reclaim_group(&self, group: u64, wanted: u64) -> u64 {
        let mut freed = self.split_deferred(wanted, |gpa| self.is_charged_below(gpa, group));
        if freed >= wanted || !self.has_swap() {
            return freed;
        }
        for _ in 0..ROUNDS {
            for list in [
                lru::INACTIVE_FILE,
                lru::INACTIVE,
                lru::ACTIVE_FILE,
                lru::ACTIVE,
                lru::UNEVICTABLE,
            ] {
                freed += self.shrink_group_list(group, list, wanted - freed);
                if freed >= wanted {
                    return freed;
                }
            }
        }
        freed
    }

    /// One look at what a list has of the group.
    fn shrink_group_list(&self, group: u64, list: usize, wanted: u64) -> u64 {
        // Each of the group's once: those that stay come to the front of a list.
        let pages = self.group(group).map_or(0, |group| {
            group.stats[group_stat::ANON].get() + group.stats[group_stat::FILE].get()
        });
        let (mut freed, mut left) = (0, pages.min(self.lru_count(list)));
        while left > 0 && freed < wanted {
            let isolated =
                self.lru_isolate_where(list, CLUSTER, |gpa| self.is_charged_below(gpa, group));
            if isolated.frames().is_empty() {
                break;
            }
            left = left.saturating_sub(self.pages_isolated(&isolated));
            for &gpa in isolated.frames() {
                let was = folio_state::ACTIVE | folio_state::UNEVICTABLE;
                self.folio(gpa).state.fetch_and(!was, Relaxed);
            }
            freed += self.shrink_folios(&isolated, Used::Counts);
        }
        freed
    }

    fn is_charged_below(&self, gpa: u64, group: u64) -> bool {
        let charged = u64::from(self.frame_group(gpa).group.get());
        self.group_and_above(charged)
            .any(|(number, _)| number == group)
    }

    /// `group_set_max(group, max)`: reclaims what is more (Linux's `mem_cgroup_resize_max`).
    ///
    /// # Errors
    /// EINVAL where there is no such group; EBUSY where it holds more, and reclaim cannot change that: the limit is as it was.
    pub(super) fn group_limit(&self, number: u64, max: u64) -> Result<(), Errno> {
        let group = self.group(number).ok_or(Errno::EINVAL)?;
        let max = max.min(MemGroup::NO_LIMIT);
        for _ in 0..RETRIES {
            let more = match self.group_try_limit(group, max) {
                Ok(()) => return Ok(()),
                Err(more) => more,
            };
            if !self.rcu_reclaim() && self.reclaim_group(number, more) == 0 {
                break;
            }
        }
        Err(Errno::EBUSY)
    }

    /// Linux's `page_counter_set_max`: a charge adds first and compares then; so either it sees the new limit, or it is seen
    /// here. Where the group holds more, how much.
    fn group_try_limit(&self, group: &MemGroup, max: u64) -> Result<(), u64> {
        let _guard = self.lock(&self.root().groups_lock, LockClass::Groups);
        let usage = group.usage.load(SeqCst);
        if usage > max {
            return Err(usage - max);
        }
        let old = group.max.swap(max, SeqCst);
        let now = group.usage.load(SeqCst);
        if now > usage && max < old && now > max {
            group.max.set(old);
            return Err(now - max);
        }
        Ok(())
    }
}
