//! The sequence counter: readers that never write, and look again where a writer was at work.
//!
//! Ordering (Linux's Documentation/locking/seqlock.rst; include/linux/seqlock.h):
//! - [`SeqCount::write`] makes the count odd, then a Release fence, then the data (`smp_wmb`); with
//!   [`SeqCount::changed`]: the data, then an Acquire fence, then the count (`smp_rmb`). A reader that saw any of
//!   a writer's data sees that the count has moved.
//! - The end of a write is a store with Release after the data; [`SeqCount::begin`] loads with Acquire. A reader that
//!   begins after a writer's end sees all that it wrote.
//!
//! Writers exclude each other by a lock of their own. The data are atomics, read Relaxed: a reader does read what a
//! writer is changing, and throws it away. A writer that waited for a reader would deadlock with
//! one that runs on its CPU; the kernel is not preemptible, so there is none.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::Word;

/// A sequence counter; zero at first.
#[derive(Debug, Default)]
pub struct SeqCount<W: Word = AtomicU64>(W);

/// A write in progress; dropping it ends it.
#[must_use = "the write ends at once"]
#[derive(Debug)]
pub struct SeqWrite<'c, W: Word>(&'c W, u64);

impl<W: Word> SeqCount<W> {
    /// A counter over `word`, which is even.
    pub const fn new(word: W) -> Self {
        Self(word)
    }

    /// The count before a read, for [`SeqCount::changed`]; `relax` is called while a writer is at work.
    pub fn begin(&self, mut relax: impl FnMut()) -> u64 {
        loop {
            let count = self.0.load(Acquire);
            if count.is_multiple_of(2) {
                return count;
            }
            relax();
        }
    }

    /// The count before a read, unless a writer is at work.
    pub fn try_begin(&self) -> Option<u64> {
        let count = self.0.load(Acquire);
        count.is_multiple_of(2).then_some(count)
    }

    /// True where what was read since [`SeqCount::begin`] gave `count` may be torn: read again.
    pub fn changed(&self, count: u64) -> bool {
        W::fence(Acquire);
        self.0.load(Relaxed) != count
    }

    /// Begins to write. The caller holds the writers' lock.
    pub fn write(&self) -> SeqWrite<'_, W> {
        let count = self.0.load(Relaxed);
        self.0.store(count + 1, Relaxed);
        W::fence(Release);
        SeqWrite(&self.0, count + 2)
    }
}

impl<W: Word> Drop for SeqWrite<'_, W> {
    fn drop(&mut self) {
        self.0.store(self.1, Release);
    }
}
