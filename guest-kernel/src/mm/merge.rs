//! Joining adjacent VMAs that would look alike (Linux 6.18's mm/vma.c, vma_merge_new_range and
//! vma_merge_existing_range). Under the mmap_lock held for writing.
//!
//! Two VMAs may become one if their files, flags and page offsets agree and their anon_vmas are one, or one of
//! them has none. A VMA whose chains come from a fork does not lend its anon_vma to a neighbour: that
//! would widen the family whose lock its folios share.

use core::sync::atomic::Ordering::Acquire;

use abi::objects::{AnonVma, Mm, Pa, Vma, vma_flags};
use abi::syscall::Errno;

use super::vma::Area;
use super::{Field, pages};
use crate::Kernel;
use crate::arch::Arch;

/// Flags in which VMAs that merge may differ: the heap is where `brk` says, not what was mapped.
const IGNORED: u64 = vma_flags::HEAP;

/// Which neighbours a new area may join.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Join {
    /// Both (mmap).
    Both,
    /// The one before it (brk).
    Before,
}

/// Where the pages of a new area come from.
#[derive(Clone, Copy)]
pub(super) enum Origin {
    /// From nowhere: it is empty.
    Fresh,
    /// From a VMA that stays, extended (Linux's vma_merge_extend) or copied (MREMAP_DONTUNMAP).
    Of(Pa<Vma>),
    /// From a VMA that is about to go, and so is no neighbour to join.
    InsteadOf(Pa<Vma>),
}

impl Origin {
    fn source(self) -> Option<Pa<Vma>> {
        match self {
            Self::Fresh => None,
            Self::Of(vma) | Self::InsteadOf(vma) => Some(vma),
        }
    }

    fn lets_join(self, neighbour: Pa<Vma>) -> bool {
        !matches!(self, Self::InsteadOf(vma) if vma == neighbour)
    }
}

impl<A: Arch> Kernel<A> {
    /// Maps `area`, which overlaps nothing, by extending a neighbour. None where none fits. A VMA that `area` originates
    /// from may be merged away, where it is a neighbour.
    ///
    /// # Errors
    /// ENOMEM; nothing changed.
    pub(super) fn merge_new(
        &self,
        mm: Pa<Mm>,
        area: Area,
        join: Join,
        origin: Origin,
    ) -> Result<Option<Pa<Vma>>, Errno> {
        let (space, source) = (self.obj(mm), origin.source());
        let prev = self
            .vma_before(space, area.start)
            .filter(|&prev| origin.lets_join(prev) && self.joins_before(prev, area, source));
        let next = self
            .vma_find(space, area.end)
            .filter(|&next| join == Join::Both && origin.lets_join(next))
            .filter(|&next| self.joins_after(next, area, source))
            .filter(|&next| prev.is_none_or(|prev| self.share_anon_vma(prev, next)));
        let lender = |default: Pa<Vma>| match source {
            Some(source) if self.obj(default).anon_vma.get().is_null() => source,
            _ => default,
        };
        match (prev, next) {
            (Some(prev), Some(next)) => {
                let end = self.obj(next).end.get();
                self.lend_anon_vma(prev, lender(next))?;
                self.absorb(mm, prev, &[next], end);
                Ok(Some(prev))
            }
            (Some(prev), None) => {
                self.lend_anon_vma(prev, lender(prev))?;
                self.absorb(mm, prev, &[], area.end);
                Ok(Some(prev))
            }
            (None, Some(next)) => {
                self.lend_anon_vma(next, lender(next))?;
                self.extend_down(mm, next, &[], area.start);
                Ok(Some(next))
            }
            (None, None) => Ok(None),
        }
    }

    /// Joins `vma` to neighbours that it was split from, and was to differ from, where nothing came of it.
    pub(super) fn vma_rejoin(&self, mm: Pa<Mm>, vma: Pa<Vma>) {
        let area = self.obj(vma);
        let range = (area.start.get(), area.end.get());
        // Parts of one VMA have one anon_vma: there is nothing to allocate, and to stay apart is no harm.
        let _ = self.merge_existing(mm, vma, range, area.flags.get());
    }

    /// Gives `start..end` of `vma` the flags `flags`: joins it to neighbours that have them, or splits
    /// it off. Returns the VMA that holds the range then.
    ///
    /// # Errors
    /// ENOMEM; the flags are as they were, though `vma` may be split.
    pub(super) fn vma_modify(
        &self,
        mm: Pa<Mm>,
        vma: Pa<Vma>,
        (start, end): (u64, u64),
        flags: u64,
    ) -> Result<Pa<Vma>, Errno> {
        if let Some(merged) = self.merge_existing(mm, vma, (start, end), flags)? {
            return Ok(merged);
        }
        let mut middle = vma;
        if self.obj(middle).start.get() < start {
            self.check_map_count(mm)?;
            middle = self.vma_split(mm, middle, start)?;
        }
        if self.obj(middle).end.get() > end {
            self.check_map_count(mm)?;
            self.vma_split(mm, middle, end)?;
        }
        self.set_vma_flags(self.obj(mm), middle, flags);
        Ok(middle)
    }

    fn merge_existing(
        &self,
        mm: Pa<Mm>,
        vma: Pa<Vma>,
        (start, end): (u64, u64),
        flags: u64,
    ) -> Result<Option<Pa<Vma>>, Errno> {
        let (space, middle) = (self.obj(mm), self.obj(vma));
        let at_start = start == middle.start.get();
        let at_end = end == middle.end.get();
        let area = Area {
            start,
            end,
            flags,
            pgoff: middle.pgoff.get() + pages(start - middle.start.get()),
            file: middle.file.get(),
        };
        let prev = self
            .vma_before(space, middle.start.get())
            .filter(|&prev| at_start && self.joins_before(prev, area, Some(vma)));
        let next = self
            .vma_find(space, middle.end.get())
            .filter(|&next| at_end && self.joins_after(next, area, Some(vma)))
            .filter(|&next| prev.is_none_or(|prev| self.share_anon_vma(prev, next)));
        match (prev, next) {
            (Some(prev), Some(next)) => {
                let lender = if self.obj(next).anon_vma.get().is_null() {
                    vma
                } else {
                    next
                };
                self.lend_anon_vma(prev, lender)?;
                let end = self.obj(next).end.get();
                self.absorb(mm, prev, &[vma, next], end);
                Ok(Some(prev))
            }
            (Some(prev), None) => {
                self.lend_anon_vma(prev, vma)?;
                if at_end {
                    self.absorb(mm, prev, &[vma], end);
                } else {
                    self.move_boundary(mm, prev, vma, end);
                }
                Ok(Some(prev))
            }
            (None, Some(next)) => {
                self.lend_anon_vma(next, vma)?;
                if at_start {
                    self.extend_down(mm, next, &[vma], start);
                } else {
                    self.move_boundary(mm, vma, next, start);
                }
                Ok(Some(next))
            }
            (None, None) => Ok(None),
        }
    }

    /// An anon_vma for `vma` that a neighbour has, so that the two may merge once their flags agree
    /// (Linux's find_mergeable_anon_vma).
    pub(super) fn mergeable_anon_vma(&self, mm: Pa<Mm>, vma: Pa<Vma>) -> Option<Pa<AnonVma>> {
        let (space, area) = (self.obj(mm), self.obj(vma));
        let next = self.vma_find(space, area.end.get());
        let prev = self.vma_before(space, area.start.get());
        let from = |lower: Pa<Vma>, upper: Pa<Vma>, lender: Pa<Vma>| {
            let (low, high) = (self.obj(lower), self.obj(upper));
            let apart = high.start.get() - low.start.get();
            let alike = low.end.get() == high.start.get()
                && low.file.get() == high.file.get()
                && (low.flags.get() ^ high.flags.get()) & !(super::vma::ACCESS | IGNORED) == 0
                && high.pgoff.get() == low.pgoff.get() + pages(apart);
            let anon = self.obj(lender).anon_vma.load(Acquire).some()?;
            (alike && self.has_one_chain(lender)).then_some(anon)
        };
        next.and_then(|next| from(vma, next, next))
            .or_else(|| prev.and_then(|prev| from(prev, vma, prev)))
    }

    /// True where `prev` can be extended over `area`.
    fn joins_before(&self, prev: Pa<Vma>, area: Area, middle: Option<Pa<Vma>>) -> bool {
        let vma = self.obj(prev);
        let length = pages(vma.end.get() - vma.start.get());
        vma.end.get() == area.start
            && (vma.flags.get() ^ area.flags) & !IGNORED == 0
            && vma.file.get() == area.file
            && vma.pgoff.get() + length == area.pgoff
            && self.takes_anon_vma(prev, middle)
    }

    /// True where `next` can be extended down over `area`.
    fn joins_after(&self, next: Pa<Vma>, area: Area, middle: Option<Pa<Vma>>) -> bool {
        let vma = self.obj(next);
        vma.start.get() == area.end
            && (vma.flags.get() ^ area.flags) & !IGNORED == 0
            && vma.file.get() == area.file
            && area.pgoff + pages(area.end - area.start) == vma.pgoff.get()
            && self.takes_anon_vma(next, middle)
    }

    /// Linux's is_mergeable_anon_vma: `target` is to take over the range of `source`, or a new one.
    fn takes_anon_vma(&self, target: Pa<Vma>, source: Option<Pa<Vma>>) -> bool {
        let theirs = source.and_then(|vma| self.obj(vma).anon_vma.get().some());
        match (self.obj(target).anon_vma.get().some(), theirs) {
            (None, Some(_)) => source.is_some_and(|vma| self.has_one_chain(vma)),
            (Some(_), None) => self.has_one_chain(target),
            (ours, theirs) => ours == theirs,
        }
    }

    fn share_anon_vma(&self, a: Pa<Vma>, b: Pa<Vma>) -> bool {
        let (a, b) = (self.obj(a).anon_vma.get(), self.obj(b).anon_vma.get());
        a.is_null() || b.is_null() || a == b
    }

    fn has_one_chain(&self, vma: Pa<Vma>) -> bool {
        self.obj(vma)
            .chains
            .get()
            .some()
            .is_some_and(|chain| self.obj(chain).next_of_vma.get().is_null())
    }

    fn lend_anon_vma(&self, to: Pa<Vma>, from: Pa<Vma>) -> Result<(), Errno> {
        if self.obj(to).anon_vma.get().is_null() {
            self.anon_vma_copy(to, from)?;
        }
        Ok(())
    }

    /// Extends `vma` up to `end` over `victims`, which end there.
    fn absorb(&self, mm: Pa<Mm>, vma: Pa<Vma>, victims: &[Pa<Vma>], end: u64) {
        let area = self.obj(vma);
        self.start_writes(vma, victims);
        let more = (end - area.end.get()).cast_signed();
        self.account(self.obj(mm), area.flags.get(), more);
        {
            // Extended first: a walk finds every entry in one of them at any time.
            let _family = self.lock_vma_family(vma);
            self.vma_resize(vma, area.start.get(), end);
        }
        self.remove_victims(mm, vma, victims);
        self.tree_update(self.obj(mm), vma, area.start.get());
    }

    /// Extends `vma` down to `start` over `victims`, which begin there.
    fn extend_down(&self, mm: Pa<Mm>, vma: Pa<Vma>, victims: &[Pa<Vma>], start: u64) {
        let area = self.obj(vma);
        self.start_writes(vma, victims);
        let old = area.start.get();
        let more = (old - start).cast_signed();
        self.account(self.obj(mm), area.flags.get(), more);
        {
            let _family = self.lock_vma_family(vma);
            self.vma_resize(vma, start, area.end.get());
        }
        self.remove_victims(mm, vma, victims);
        self.tree_update(self.obj(mm), vma, old);
    }

    /// Moves the boundary between two neighbours to `at`.
    fn move_boundary(&self, mm: Pa<Mm>, lower: Pa<Vma>, upper: Pa<Vma>, at: u64) {
        let (low, high) = (self.obj(lower), self.obj(upper));
        let (space, old) = (self.obj(mm), high.start.get());
        self.start_writes(lower, &[upper]);
        self.split_huge_at(mm, at);
        let more = at.wrapping_sub(old).cast_signed();
        self.account(space, low.flags.get(), more);
        self.account(space, high.flags.get(), -more);
        {
            // They map one file or none, and have one anon_vma, or one of them has none.
            let lender = if low.anon_vma.get().is_null() {
                upper
            } else {
                lower
            };
            let _family = self.lock_vma_family(lender);
            self.vma_resize(lower, low.start.get(), at);
            self.vma_resize(upper, at, high.end.get());
        }
        self.tree_update(space, upper, old);
    }

    fn start_writes(&self, vma: Pa<Vma>, others: &[Pa<Vma>]) {
        self.vma_start_write(vma);
        for &other in others {
            self.vma_start_write(other);
        }
    }

    /// Frees VMAs whose range `vma` has taken over.
    fn remove_victims(&self, mm: Pa<Mm>, vma: Pa<Vma>, victims: &[Pa<Vma>]) {
        let flags = &self.obj(vma).flags;
        for &victim in victims {
            flags.set(flags.get() | self.obj(victim).flags.get() & IGNORED);
            self.vma_detach(self.obj(mm), victim);
            let chains = self.unlink_chains(victim, Pa::NULL);
            self.release_chains(chains);
            self.file_unlink(victim);
            self.slab_free(victim);
        }
    }
}
