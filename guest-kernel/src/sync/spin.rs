//! The spin lock: a word that is the holder's name while it is held, 0 while it is free.
//!
//! Ordering (Linux's Documentation/memory-barriers.txt, "Implicit kernel memory barriers", ACQUIRE and
//! RELEASE): [`release`] is a store with Release, [`try_acquire`] an exchange with Acquire that reads
//! what it stored; so what the last holder did under the lock happens before what the next one does. What
//! either does *outside* the lock may move inside it, never out. A release followed by an acquire of another
//! lock is no full barrier.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::Word;

/// Takes the lock for `me`, which is not 0. May fail where it is free; who spins tries again.
///
/// # Errors
/// Who holds it; 0 where nobody does.
#[inline]
pub fn try_acquire<W: Word>(word: &W, me: u64) -> Result<(), u64> {
    word.compare_exchange_weak(0, me, Acquire, Relaxed)
        .map(|_| ())
}

/// Lets go of the lock, which the caller holds.
#[inline]
pub fn release<W: Word>(word: &W) {
    word.store(0, Release);
}
