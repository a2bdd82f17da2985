//! When 2 MiB are gathered by themselves (Linux's mm/khugepaged.c, `khugepaged_scan_mm_slot`). How is in `collapse`.
//!
//! There is no timer here. The thread (`task::khugepaged`) is woken where there may be something to gather: where a fault
//! wanted 2 MiB and has got small pages, and where MADV_HUGEPAGE names memory that has pages already (Linux's
//! `khugepaged_enter_vma`). It looks at all address spaces once, in the order of their numbers, and sleeps again. What it could not gather
//! it tries when it is woken the next time.
//!
//! A step is at most [`REGIONS`] of 2 MiB of one address space, and ends with the first that it collapses. It holds the mmap_lock,
//! and is one more user of the mm meanwhile (`mmget_not_zero`): so the mm is not torn down under it, and where it is
//! the last it tears down itself. Between two steps it holds nothing, and knows by a number where it was.

use core::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};
use core::sync::atomic::fence;

use abi::channel::EventKind;
use abi::objects::{Mm, Pa};

use super::Field;
use crate::Kernel;
use crate::arch::Arch;

/// 2 MiB that a step looks at (Linux's pages_to_scan: 8 times the entries of a table).
pub(super) const REGIONS: u64 = 8;

impl<A: Arch> Kernel<A> {
    /// There may be something to gather. Under no lock that comes last.
    pub(super) fn want_collapse(&self) {
        let state = &self.root().khugepaged;
        if state.task.get().is_null() {
            return;
        }
        state.wanted.store(1, Relaxed);
        // With the fence of `sleep_until_woken`: either this sees it asleep, or it sees the word.
        fence(SeqCst);
        self.wake_khugepaged();
    }

    /// True where somebody has asked for a look since the last one began.
    pub(crate) fn is_collapse_wanted(&self) -> bool {
        self.root().khugepaged.wanted.load(Acquire) != 0
    }

    /// Looks at all address spaces once. As a task without locks.
    pub(crate) fn scan_all_for_collapse(&self) {
        self.root().khugepaged.wanted.store(0, Relaxed);
        // Who asks from here on asks for another look.
        fence(SeqCst);
        let (mut number, mut at) = (0, 0);
        while let Some(mm) = self.mm_get_from(number) {
            let found = self.obj(mm).id.get();
            if found != number {
                (number, at) = (found, 0);
            }
            let next = self.scan_step(mm, at);
            self.mm_put(mm);
            match next {
                Some(next) => at = next,
                None => (number, at) = (number + 1, 0),
            }
            self.give_way();
        }
    }

    /// A user more of the address space with the lowest number from `number` on that has any.
    fn mm_get_from(&self, number: u64) -> Option<Pa<Mm>> {
        loop {
            let _section = self.rcu_read();
            let mut lowest: Option<(u64, Pa<Mm>)> = None;
            let mut next = self.root().mms.load(Acquire).some();
            while let Some(mm) = next {
                let space = self.obj(mm);
                let id = space.id.get();
                let is_lower = lowest.is_none_or(|(lowest, _)| id < lowest);
                if id >= number && is_lower && space.users.load(Acquire) > 0 {
                    lowest = Some((id, mm));
                }
                next = space.next.load(Acquire).some();
            }
            let (_, mm) = lowest?;
            if self.mm_get_not_zero(mm) {
                return Some(mm);
            }
        }
    }

    /// Adds a user unless there is none any more (Linux's `mmget_not_zero`). Something keeps the object.
    fn mm_get_not_zero(&self, mm: Pa<Mm>) -> bool {
        let space = self.obj(mm);
        let more = |users: u32| (users > 0).then_some(users + 1);
        let before = space.users.fetch_update(Relaxed, Relaxed, more);
        if let Ok(before) = before {
            let users = u64::from(before) + 1;
            event!(self, EventKind::MmUsers, [space.id.get(), users, 0, 0, 0]);
        }
        before.is_ok()
    }
}
