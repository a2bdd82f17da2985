//! A process moves to another memory group, and takes along what it was charged for if it says so (Linux's
//! `mem_cgroup_can_attach`, `mem_cgroup_precharge_mc` and `mem_cgroup_move_charge` of cgroups version 1, mm/memcontrol.c up to
//! 6.12: memory.move_charge_at_immigrate with bit 0; version 2 leaves all where it is).
//!
//! What moves is what the process alone uses and its old group pays for: anonymous folios that one entry maps, which is
//! this process's, those of 2 MiB as a whole or not at all, and swap slots that one entry names. Its new group is charged for
//! all of them at first, so that nothing has happened where it does not hold them; then one after the other leaves the
//! old one, each under the page-table lock of its entry. Reclaim may have taken some meanwhile: what is left of the charge goes
//! back. The mmap_lock and all VMAs, held for writing, keep out all else.
//!
//! Page tables, pages of files, and what the swap cache alone has stay where they are charged.

use abi::channel::Walker;
use abi::layout::{HUGE_ORDER, PAGE_SIZE, USER_END};
use abi::lock::LockClass;
use abi::objects::{FrameKind, MemGroup, Mm, Pa, group_stat};
use abi::pte::{NonPresent, Pte};
use abi::syscall::{Errno, group};
use core::convert::Infallible;

use super::Field;
use super::group::Effort;
use crate::Kernel;
use crate::arch::Arch;

/// What is to be moved from one group to the other.
#[derive(Clone, Copy)]
struct Recharge {
    from: u64,
    to: u64,
}

impl<A: Arch> Kernel<A> {
    /// `group_create(parent, max)`: returns the number of the new group.
    ///
    /// # Errors
    /// ENOSYS without groups, EINVAL where there is no such parent, ENOSPC.
    pub(crate) fn group_create(&self, parent: u64, max: u64) -> Result<u64, Errno> {
        self.require_group(parent)?;
        let _guard = self.lock(&self.root().groups_lock, LockClass::Groups);
        let groups = &self.root().groups;
        let free = groups.iter().position(|group| group.live.get() == 0);
        let at = free.ok_or(Errno::ENOSPC)?;
        let group = &groups[at];
        group.parent.set(parent);
        group.max.set(max.min(MemGroup::NO_LIMIT));
        // Nobody knows its number before this returns.
        group.live.set(1);
        Ok(at as u64 + 1)
    }

    /// `group_set_max(group, max)`.
    ///
    /// # Errors
    /// ENOSYS without groups, EINVAL where there is no such group, EBUSY where it holds more.
    pub(crate) fn group_set_max(&self, group: u64, max: u64) -> Result<(), Errno> {
        self.require_group(group)?;
        self.group_limit(group, max)
    }

    /// `group_stat(group, what)` for the process of `mm`.
    ///
    /// # Errors
    /// ENOSYS without groups, EINVAL where there is no such group or number.
    pub(crate) fn group_stat(&self, mm: Pa<Mm>, number: u64, what: u64) -> Result<u64, Errno> {
        self.require_group(number)?;
        if what == group::CURRENT {
            return Ok(self.obj(mm).group.get());
        }
        let object = self.group(number).ok_or(Errno::EINVAL)?;
        let stat = what.checked_sub(group::STATS).map(|stat| stat as usize);
        let word = match (what, stat) {
            (group::USAGE, _) => &object.usage,
            (group::MAX, _) => &object.max,
            (group::WATERMARK, _) => &object.watermark,
            (group::FAILURES, _) => &object.failures,
            (group::PARENT, _) => &object.parent,
            (_, Some(stat)) => object.stats.get(stat).ok_or(Errno::EINVAL)?,
            _ => return Err(Errno::EINVAL),
        };
        Ok(word.get())
    }

    /// `group_move(group, flags)` for the process of `mm`: returns the pages and slots whose charge has moved.
    ///
    /// # Errors
    /// ENOSYS without groups, EINVAL where there is no such group or flag, ENOMEM: nothing has changed.
    pub(crate) fn group_move(&self, mm: Pa<Mm>, to: u64, flags: u64) -> Result<u64, Errno> {
        self.require_group(to)?;
        if flags & !group::RECHARGE != 0 {
            return Err(Errno::EINVAL);
        }
        let space = self.obj(mm);
        let _guard = self.mmap_write_lock(space);
        self.keep_faults_out(space);
        let from = space.group.get();
        let mut moved = 0;
        if flags & group::RECHARGE != 0 && from != to && from != 0 {
            moved = self.recharge(space, Recharge { from, to })?;
        }
        space.group.set(to);
        Ok(moved)
    }

    /// Nobody faults in `mm` until the mmap_lock, held for writing, is released.
    fn keep_faults_out(&self, mm: &Mm) {
        let mut at = 0;
        while let Some(vma) = self.vma_find(mm, at) {
            self.vma_start_write(vma);
            at = self.obj(vma).end.get();
        }
    }

    /// The group that keeps `mm`'s process from getting more memory, with its usage and limit; none where no limit does.
    pub(crate) fn group_at_limit(&self, mm: Pa<Mm>) -> Option<(u64, u64, u64)> {
        self.group_and_above(self.obj(mm).group.get())
            .map(|(number, group)| (number, group.usage.get(), group.max.get()))
            .find(|(_, usage, max)| usage >= max)
    }

    fn require_group(&self, number: u64) -> Result<(), Errno> {
        if !self.has_groups() {
            return Err(Errno::ENOSYS);
        }
        (number == 0 || self.group(number).is_some())
            .then_some(())
            .ok_or(Errno::EINVAL)
    }

    fn recharge(&self, mm: &Mm, what: Recharge) -> Result<u64, Errno> {
        let (mut left, mut moved) = (0, 0);
        self.for_each_own(mm, what, &mut |gpa| left += self.pages_charged(gpa));
        if left > 0 {
            self.try_charge(what.to, left, Effort::Reclaim)?;
        }
        self.for_each_own(mm, what, &mut |gpa| {
            let pages = self.pages_charged(gpa);
            if pages <= left && self.charge_move(gpa, what.from, what.to) {
                left -= pages;
                moved += pages;
            }
        });
        self.counters_cancel(what.to, left);
        Ok(moved + self.recharge_slots(mm, what))
    }

    fn pages_charged(&self, gpa: u64) -> u64 {
        1 << self.folio(gpa).order.get()
    }

    /// Calls `f` with every folio that `mm` alone uses and that is charged to `what.from`, under the page-table lock of its
    /// entry (Linux's `get_mctgt_type` and `get_mctgt_type_thp`).
    fn for_each_own(&self, mm: &Mm, what: Recharge, f: &mut impl FnMut(u64)) {
        let is_own = |gpa: u64| {
            let folio = self.folio(gpa);
            folio.kind.get() == FrameKind::Anon as u8
                && folio.mapcount.get() == 1
                && u64::from(self.frame_group(gpa).group.get()) == what.from
        };
        let Ok(()) = self.for_each_huge(mm, (0, USER_END), |gva| {
            self.walk_begins(mm, gva, Walker::Migrate);
            self.with_huge(mm, gva, |_, entry| {
                if is_own(entry.address()) {
                    f(entry.address());
                }
            });
            self.walk_ends(mm, gva, Walker::Migrate);
            Ok::<(), Infallible>(())
        });
        self.for_each_small(mm, |entry| {
            let gpa = entry.address();
            // Not by a page of it: a folio of 2 MiB is one entry's, of level 2.
            if entry.is_present() && self.folio(gpa).order.get() < HUGE_ORDER && is_own(gpa) {
                f(gpa);
            }
        });
    }

    /// Calls `f` with every entry of level 1 that is not none, under its lock.
    fn for_each_small(&self, mm: &Mm, mut f: impl FnMut(Pte)) {
        let all = (0, USER_END);
        let Ok(()) = self.for_each_leaf_table(mm, Walker::Migrate, all, |table, from, to| {
            let _guard = self.lock_table(table);
            let mut rest = from;
            while let Some((gva, entry)) = self.next_entry((table, 1), rest, to) {
                f(entry);
                rest = gva + PAGE_SIZE;
            }
            Ok::<(), Infallible>(())
        });
    }

    /// Linux's `mem_cgroup_move_swap_account`.
    fn recharge_slots(&self, mm: &Mm, what: Recharge) -> u64 {
        let mut moved = 0;
        self.for_each_small(mm, |entry| {
            let Some(NonPresent::Swap { slot, .. }) = entry.non_present() else {
                return;
            };
            let _guard = self.lock_swap();
            let object = self.swap_slot(slot);
            if object.count.get() == 1 && u64::from(object.group.get()) == what.from {
                object.group.set(what.to as u32);
                self.count_stat(what.to, group_stat::SWAP, 1);
                self.count_stat(what.from, group_stat::SWAP, -1);
                moved += 1;
            }
        });
        moved
    }
}
