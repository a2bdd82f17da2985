//! Memory groups: who pays for a frame (Linux's mm/memcontrol.c and mm/page_counter.c, version 2 of cgroups).
//!
//! A frame is charged when it is allocated for an mm, to the mm's group and those above it, and uncharged from the same
//! ones when it is freed, wherever the mm is by then: the frame knows its group ([`abi::objects::FrameGroup`]; Linux's
//! folio->memcg_data). So does a swap slot ([`abi::objects::SwapSlot::group`]; swap_cgroup), which is charged as long as it
//! is in use, beside the folio in memory; and what is read from it is charged to its group again. Pages of a file
//! belong to whoever touched them first. Who only moves contents to another frame (migration) or breaks a folio up
//! takes the charge along.
//!
//! `usage` is added to before it is compared with the limit, and taken back where it was too much: counters need no lock,
//! and while nothing is in flight `usage` is the number of frames whose group it is or lies below it. The root group,
//! number 0, counts nothing. Without the parameter `groups` there is no other, and this is one look at a flag for
//! each frame that is allocated or freed.
//!
//! A charge that would be too much reclaims from the group whose limit it is (`group_reclaim`). Where that gives
//! nothing, it is out of memory: the caller gets ENOMEM, a fault then kills.

use core::sync::atomic::Ordering::{AcqRel, Relaxed, SeqCst};

use abi::bug::Bug;
use abi::channel::EventKind;
use abi::layout::{PAGE_SHIFT, PAGE_SIZE};
use abi::objects::{FrameGroup, FrameKind, GROUPS, MemGroup, Mm, ORDERS, Pa, group_stat};
use abi::syscall::Errno;

use super::Field;
use crate::Kernel;
use crate::arch::Arch;

/// Times that a charge reclaims before it gives up (Linux's MAX_RECLAIM_RETRIES).
pub(super) const RETRIES: usize = 16;

/// How hard a charge tries.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Effort {
    /// It reclaims.
    Reclaim,
    /// What does not fit is not worth it: others will do (2 MiB, read-ahead).
    None,
}

impl<A: Arch> Kernel<A> {
    /// Takes the array of the frames' groups, where the command line asks for groups. Once, at boot.
    pub(super) fn groups_init(&self) -> Result<(), Errno> {
        if !self.has_groups() {
            return Ok(());
        }
        let bytes = self.root().nr_frames.get() * size_of::<FrameGroup>() as u64;
        let frames = bytes.div_ceil(PAGE_SIZE).next_power_of_two();
        let order = frames.ilog2() as u8;
        if usize::from(order) >= ORDERS {
            return Err(Errno::ENOMEM);
        }
        let array = self.alloc_frames(order, FrameKind::Kernel)?;
        for frame in 0..frames {
            self.arch.zero_frame(array + frame * PAGE_SIZE);
        }
        self.root().frame_groups.set(Pa::new(array));
        Ok(())
    }

    /// True where there are groups beside the root one.
    #[inline]
    pub(super) fn has_groups(&self) -> bool {
        self.config.groups
    }

    /// The group with `number`; none for the root group, and where there is none such.
    pub(super) fn group(&self, number: u64) -> Option<&MemGroup> {
        let at = usize::try_from(number.checked_sub(1)?).ok()?;
        let group = self.root().groups.get(at)?;
        (group.live.get() != 0).then_some(group)
    }

    /// The group `number` and those above it, lowest first.
    pub(super) fn group_and_above(&self, number: u64) -> impl Iterator<Item = (u64, &MemGroup)> {
        let mut next = number;
        // Parents have lower numbers: this ends.
        core::iter::from_fn(move || {
            let (number, group) = (next, self.group(next)?);
            next = group.parent.get();
            Some((number, group))
        })
        .take(GROUPS)
    }

    /// What the frame at `gpa` is charged to; where there are groups.
    pub(super) fn frame_group(&self, gpa: u64) -> &FrameGroup {
        let frame = gpa >> PAGE_SHIFT;
        assert!(frame < self.root().nr_frames.get(), "no frame at {gpa:#x}");
        let each = size_of::<FrameGroup>() as u64;
        self.obj(Pa::new(self.root().frame_groups.get().0 + frame * each))
    }

    /// Frames for user memory or a table of `mm`, as [`Kernel::alloc_frames`], charged to its group (Linux's
    /// `mem_cgroup_charge`, after `vma_alloc_folio`).
    ///
    /// # Errors
    /// ENOMEM.
    #[inline]
    pub(super) fn alloc_charged(
        &self,
        mm: Pa<Mm>,
        order: u8,
        kind: FrameKind,
    ) -> Result<u64, Errno> {
        let gpa = self.alloc_frames(order, kind)?;
        if self.has_groups() {
            self.charge_or_free(self.obj(mm).group.get(), gpa)?;
        }
        Ok(gpa)
    }

    /// Charges a frame that nobody else knows yet to the group of the process that this CPU runs: it uses a file without
    /// an mm (Linux's `active_memcg`, or current->mm). Where that fails the frame is freed.
    ///
    /// # Errors
    /// ENOMEM.
    #[inline]
    pub(super) fn charge_to_current(&self, gpa: u64) -> Result<(), Errno> {
        if !self.has_groups() {
            return Ok(());
        }
        self.charge_or_free(self.current_group(), gpa)
    }

    fn current_group(&self) -> u64 {
        let mm = self.this_cpu().loaded_mm.get().some();
        mm.map_or(0, |mm| self.obj(mm).group.get())
    }

    #[cold]
    #[inline(never)]
    fn charge_or_free(&self, group: u64, gpa: u64) -> Result<(), Errno> {
        // Nothing is reclaimed for a folio of 2 MiB: small pages serve.
        let effort = match self.folio(gpa).order.get() {
            0 => Effort::Reclaim,
            _ => Effort::None,
        };
        self.charge(group, gpa, effort)
            .inspect_err(|_| self.free_frames(gpa))
    }

    /// Charges the frames at `gpa`, which are charged to none, to `group`.
    ///
    /// # Errors
    /// ENOMEM: nothing has changed.
    pub(super) fn charge(&self, group: u64, gpa: u64, effort: Effort) -> Result<(), Errno> {
        if self.group(group).is_none() {
            return Ok(());
        }
        let (stat, pages) = self.counts_as(gpa);
        self.try_charge(group, pages, effort)?;
        self.count_stat(group, stat, pages.cast_signed());
        self.set_frame_group(gpa, group, pages);
        Ok(())
    }

    /// Uncharges frames that are being freed, if they are charged (Linux's `uncharge_folio`, and of tables
    /// `memcg_kmem_uncharge_page` in `free_pages_prepare`).
    #[cold]
    #[inline(never)]
    pub(super) fn uncharge(&self, gpa: u64) {
        let charged = u64::from(self.frame_group(gpa).group.get());
        if charged == 0 {
            return;
        }
        let group = match self.config.bugs.has(Bug::UnchargeCurrentGroup) {
            true => self.current_group(),
            false => charged,
        };
        let (stat, pages) = self.counts_as(gpa);
        self.frame_group(gpa).group.set(0);
        self.charge_told(gpa, 0, group, pages);
        self.count_stat(group, stat, -pages.cast_signed());
        self.counters_cancel(group, pages);
    }

    /// The charge of the frame at `from` is that of the frame at `to` from now on, which has none (Linux's
    /// `mem_cgroup_migrate`).
    pub(super) fn charge_migrate(&self, from: u64, to: u64) {
        if !self.has_groups() {
            return;
        }
        let group = self.frame_group(from).group.get();
        if group != 0 {
            self.frame_group(from).group.set(0);
            self.charge_told(from, 0, group.into(), 1);
            self.set_frame_group(to, group.into(), 1);
        }
    }

    /// The folio at `head` is being broken up: the page at `page` is charged to the same group by itself (Linux's
    /// `folio_split_memcg_refs`).
    #[inline]
    pub(super) fn charge_split(&self, head: u64, page: u64) {
        if self.has_groups() && head != page {
            let group = self.frame_group(head).group.get();
            if group != 0 {
                self.set_frame_group(page, group.into(), 1);
            }
        }
    }

    /// The charge of a frame, `pages` of which are part of `to`'s usage already, leaves `from`. False where it is no longer
    /// charged to that.
    pub(super) fn charge_move(&self, gpa: u64, from: u64, to: u64) -> bool {
        let place = &self.frame_group(gpa).group;
        let moved = place.compare_exchange(from as u8, to as u8, AcqRel, Relaxed);
        if moved.is_ok() {
            let (stat, pages) = self.counts_as(gpa);
            self.charge_told(gpa, to, from, pages);
            self.count_stat(to, stat, pages.cast_signed());
            self.count_stat(from, stat, -pages.cast_signed());
            self.counters_cancel(from, pages);
        }
        moved.is_ok()
    }

    /// The seeded bug: a frame forgets its group, which still counts it.
    #[cold]
    pub(super) fn charge_forget(&self, gpa: u64) {
        if self.has_groups() {
            self.frame_group(gpa).group.set(0);
        }
    }

    fn set_frame_group(&self, gpa: u64, group: u64, pages: u64) {
        self.frame_group(gpa).group.set(group as u8);
        self.charge_told(gpa, group, 0, pages);
    }

    /// Frame 0, which is nobody's: a charge that was refused.
    fn charge_told(&self, gpa: u64, group: u64, old: u64, pages: u64) {
        event!(self, EventKind::Charge, [gpa, group, old, pages, 0]);
    }

    /// Which statistic frames count in, and how many they are.
    fn counts_as(&self, gpa: u64) -> (usize, u64) {
        let folio = self.folio(gpa);
        let stat = match FrameKind::from_u8(folio.kind.get()) {
            Some(FrameKind::File) => group_stat::FILE,
            Some(FrameKind::Table | FrameKind::Retired) => group_stat::PAGETABLES,
            _ => group_stat::ANON,
        };
        (stat, 1 << folio.order.get())
    }
}

/// Counters.
impl<A: Arch> Kernel<A> {
    /// Counts `pages` more as usage of `group` and those above it, if no limit is in the way (Linux's `try_charge_memcg`).
    ///
    /// # Errors
    /// ENOMEM: nothing has changed.
    pub(super) fn try_charge(&self, group: u64, pages: u64, effort: Effort) -> Result<(), Errno> {
        for _ in 0..RETRIES {
            let Err(full) = self.counters_charge(group, pages) else {
                return Ok(());
            };
            let again = effort == Effort::Reclaim
                && (self.rcu_reclaim() || self.reclaim_group(full, pages) > 0);
            if !again {
                break;
            }
        }
        self.charge_told(0, group, 0, pages);
        Err(Errno::ENOMEM)
    }

    /// Linux's `page_counter_try_charge`: the group whose limit is in the way where one is, and nothing is counted then.
    fn counters_charge(&self, group: u64, pages: u64) -> Result<(), u64> {
        for (number, object) in self.group_and_above(group) {
            // SeqCst: whoever lowers the limit sees this, or is seen here (`group_limit`).
            let usage = object.usage.fetch_add(pages, SeqCst) + pages;
            if usage > object.max.load(SeqCst) {
                object.failures.fetch_add(1, Relaxed);
                cancel(object, pages);
                let below = self.group_and_above(group);
                below
                    .take_while(|(below, _)| *below != number)
                    .for_each(|(_, object)| cancel(object, pages));
                return Err(number);
            }
            object.watermark.fetch_max(usage, Relaxed);
        }
        Ok(())
    }

    /// Linux's `page_counter_uncharge`.
    pub(super) fn counters_cancel(&self, group: u64, pages: u64) {
        for (_, object) in self.group_and_above(group) {
            cancel(object, pages);
        }
    }

    pub(super) fn count_stat(&self, group: u64, stat: usize, by: i64) {
        for (_, object) in self.group_and_above(group) {
            object.stats[stat].fetch_add(by.cast_unsigned(), Relaxed);
        }
    }
}

/// Linux's `page_counter_cancel`: what is uncharged more often than charged is not less than nothing.
fn cancel(group: &MemGroup, pages: u64) {
    let _ = group
        .usage
        .fetch_update(SeqCst, SeqCst, |usage| Some(usage.saturating_sub(pages)));
}

/// Swap slots, which have no limit. Under the swap lock.
impl<A: Arch> Kernel<A> {
    /// A slot comes into use for the folio at `gpa`, whose group is charged for it (Linux's `__mem_cgroup_try_charge_swap`).
    pub(super) fn slot_charge(&self, slot: u64, gpa: u64) {
        if self.has_groups() {
            let group = self.frame_group(gpa).group.get();
            self.swap_slot(slot).group.set(group.into());
            self.count_stat(group.into(), group_stat::SWAP, 1);
        }
    }

    /// A slot is free (Linux's `__mem_cgroup_uncharge_swap`).
    pub(super) fn slot_uncharge(&self, slot: u64) {
        let group = &self.swap_slot(slot).group;
        if group.get() != 0 {
            self.count_stat(group.get().into(), group_stat::SWAP, -1);
            group.set(0);
        }
    }

    /// Charges the frame at `gpa`, which nobody else knows yet, to the group of the slot that it is to be read from (Linux's
    /// `mem_cgroup_swapin_charge_folio`). Where that fails the frame is freed.
    ///
    /// # Errors
    /// ENOMEM.
    pub(super) fn charge_as_slot(&self, slot: u64, gpa: u64, effort: Effort) -> Result<(), Errno> {
        // Without the lock: where the slot has become another's, nothing is read from it (`swap_read`).
        let group = self.swap_slot(slot).group.get();
        if group == 0 {
            return Ok(());
        }
        self.charge(group.into(), gpa, effort)
            .inspect_err(|_| self.free_frames(gpa))
    }
}
