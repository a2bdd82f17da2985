//! Which entries have changed and are not flushed yet: the range, and of which level they are (what Linux's mmu_gather
//! notes in `start`, `end`, `cleared_ptes` and `cleared_pmds`).
//!
//! One INVLPG invalidates the translation of its address whatever the size of the page, and all that the processor has cached
//! of tables (SDM vol. 3A, 5.10.4.1). So where only entries of level 2 have changed, one in every 2 MiB is enough.

use abi::layout::{HUGE_PAGE_SIZE, PAGE_SIZE};

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Changed {
    pub(super) start: u64,
    /// `u64::MAX` for everything.
    pub(super) end: u64,
    /// Bytes that the smallest of them stands for (Linux's tlb_get_unmap_size).
    pub(super) stride: u64,
}

impl Changed {
    pub(super) const NOTHING: Self = Self {
        start: u64::MAX,
        end: 0,
        stride: HUGE_PAGE_SIZE,
    };
    pub(super) const EVERYTHING: Self = Self::pages(0, u64::MAX);

    /// Entries of level 1 in `start..end`.
    pub(super) const fn pages(start: u64, end: u64) -> Self {
        Self {
            start,
            end,
            stride: PAGE_SIZE,
        }
    }

    /// The entry of level 2 that maps 2 MiB at `gva`.
    pub(super) const fn huge(gva: u64) -> Self {
        Self::table(gva, gva + HUGE_PAGE_SIZE)
    }

    /// Entries that refer to tables, which cover `start..end`.
    pub(super) const fn table(start: u64, end: u64) -> Self {
        Self {
            start,
            end,
            stride: HUGE_PAGE_SIZE,
        }
    }

    /// `other` has changed too.
    pub(super) fn add(&mut self, other: Self) {
        self.start = self.start.min(other.start);
        self.end = self.end.max(other.end);
        self.stride = self.stride.min(other.stride);
    }

    pub(super) fn is_nothing(&self) -> bool {
        self.start >= self.end
    }

    /// Addresses of which one must be invalidated each.
    pub(super) fn len(&self) -> u64 {
        (self.end - self.start).div_ceil(self.stride)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_entry_says_how_far_apart_addresses_may_be() {
        let mut changed = Changed::NOTHING;
        assert!(changed.is_nothing());
        changed.add(Changed::huge(4 * HUGE_PAGE_SIZE));
        changed.add(Changed::huge(2 * HUGE_PAGE_SIZE));
        assert_eq!((changed.is_nothing(), changed.len()), (false, 3));
        let page = 5 * HUGE_PAGE_SIZE + PAGE_SIZE;
        changed.add(Changed::pages(page, page + PAGE_SIZE));
        assert_eq!(changed.len(), 3 * 512 + 2);
        changed.add(Changed::EVERYTHING);
        assert_eq!(changed.end, u64::MAX);
    }
}
