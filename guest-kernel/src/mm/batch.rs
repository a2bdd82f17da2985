//! One flush for all that a round of reclaim has unmapped (Linux's mm/rmap.c: `set_tlb_ubc_flush_pending`,
//! `try_to_unmap_flush`, `flush_tlb_batched_pending`).
//!
//! Reclaim clears entries of mms whose mmap_lock it does not hold, and flushes once at the end of the round, before it
//! writes or frees what they mapped. Until then other CPUs still use the pages. So whoever clears or narrows entries of the
//! mm on behalf of a program, and finds them gone already, must not return before that flush: [`Mm::flush_batched`] says,
//! under the page-table lock of the entries, whether one is outstanding, and then it flushes itself
//! (Linux 3ea277194daa). The word holds two counts, as Linux's does since B4 (3c3115ad9a6b): what is flushed is what was
//! pending when the flush began, and not what has come since.
//!
//! [`Mm::flush_batched`]: abi::objects::Mm::flush_batched

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};

use abi::bug::Bug;
use abi::layout::PAGE_SIZE;
use abi::objects::{Mm, Pa};

use super::{Field, FreedTables};
use crate::Kernel;
use crate::arch::Arch;

/// Address spaces that one batch keeps apart.
const MMS: usize = 8;
const PENDING: u64 = 0xffff_ffff;

/// What was unmapped and not yet flushed.
pub(super) struct Batch {
    /// Each with a reference, and the range to flush.
    mms: [(Pa<Mm>, u64, u64); MMS],
    count: usize,
}

impl Batch {
    pub(super) const fn new() -> Self {
        Self {
            mms: [(Pa::NULL, u64::MAX, 0); MMS],
            count: 0,
        }
    }

    /// True where it has no room for an address space that it does not know yet.
    pub(super) const fn is_full(&self) -> bool {
        self.count == MMS
    }

    /// True where `mm` can be added to it.
    pub(super) fn takes(&self, mm: Pa<Mm>) -> bool {
        !self.is_full() || self.mms.iter().any(|(known, ..)| *known == mm)
    }
}

impl<A: Arch> Kernel<A> {
    /// The entry of `mm` for `gva`, whose page-table lock the caller holds, was cleared, and the batch [takes](Batch::takes)
    /// it.
    pub(super) fn batch_add(&self, batch: &mut Batch, mm: Pa<Mm>, gva: u64) {
        // Relaxed: the page-table lock orders it after the entry, for everybody who asks.
        let pending = &self.obj(mm).flush_batched;
        let _ = pending.fetch_update(Relaxed, Relaxed, |word| {
            Some(word & !PENDING | word.wrapping_add(1) & PENDING)
        });
        let known = &mut batch.mms[..batch.count];
        let at = known.iter().position(|(known, ..)| *known == mm);
        let at = at.unwrap_or_else(|| {
            // Its VMA is there as long as the lock of its entries is held, so it is not freed before this.
            self.mm_grab(mm);
            batch.mms[batch.count] = (mm, u64::MAX, 0);
            batch.count += 1;
            batch.count - 1
        });
        let (_, start, end) = &mut batch.mms[at];
        *start = (*start).min(gva);
        *end = (*end).max(gva + PAGE_SIZE);
    }

    /// When it returns, no CPU uses what was unmapped.
    pub(super) fn batch_flush(&self, batch: &mut Batch) {
        for &(mm, start, end) in &batch.mms[..batch.count] {
            let word = self.obj(mm).flush_batched.load(Acquire);
            self.flush_range(mm, start, end, FreedTables::No);
            self.batch_is_flushed(mm, word);
            self.mm_drop(mm);
        }
        batch.count = 0;
    }

    /// Flushes `mm` where a batch has cleared entries of it and not yet flushed. Under the page-table lock of the entries
    /// that the caller is about to change.
    #[inline]
    pub(super) fn flush_batched_pending(&self, mm: Pa<Mm>) {
        let word = self.obj(mm).flush_batched.get();
        if word >> 32 == word & PENDING || self.config.bugs.has(Bug::BatchedFlushIgnored) {
            return;
        }
        self.flush_mm(mm, FreedTables::No);
        self.batch_is_flushed(mm, word);
    }

    /// All that was pending when `word` was read is flushed. Where more came since, the next one flushes again.
    fn batch_is_flushed(&self, mm: Pa<Mm>, word: u64) {
        let flushed = word << 32 | word & PENDING;
        let batched = &self.obj(mm).flush_batched;
        let _ = batched.compare_exchange(word, flushed, AcqRel, Relaxed);
    }
}
