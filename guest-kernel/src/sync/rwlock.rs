//! The reader-writer lock that prefers writers: a [`RwLockWord`] that counts readers, and has one bit for a writer that holds
//! it and one for writers that wait. Whoever wants it tries, and does in between what it likes: [`rwsem`](super::rwsem) makes of
//! it a lock that tasks sleep for.
//!
//! Ordering (Linux's Documentation/memory-barriers.txt and kernel/locking/rwsem.c):
//! - [`release_write`] (Release) with [`try_read`] and [`try_write`] (Acquire): a reader and the next
//!   writer see everything that the writer did.
//! - [`release_read`] (Release, a read-modify-write) with [`try_write`] (Acquire): a writer's changes come after
//!   everything that the readers before it read. All readers' releases are one release sequence, for each is a
//!   read-modify-write, so a writer that sees the last one is ordered after every one.
//! - Readers are not ordered with each other.
//!
//! [`claim`] carries no data, so it is Relaxed; whoever wins clears the others' claims, and they claim anew.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use abi::lock::LockClass;
use abi::objects::RwLockWord;

use super::Word;

/// Takes the lock for reading. May fail where it is free; who spins tries again.
#[inline]
pub fn try_read<W: Word>(word: &W) -> bool {
    let value = word.load(Relaxed);
    LockClass::MmapRead.lets_in(value)
        && word
            .compare_exchange_weak(value, value + 1, Acquire, Relaxed)
            .is_ok()
}

/// Takes the lock for writing. May fail where it is free; who spins tries again.
///
/// # Errors
/// Whether it is free.
#[inline]
pub fn try_write<W: Word>(word: &W) -> Result<(), Refused> {
    let value = word.load(Relaxed);
    if !LockClass::MmapWrite.lets_in(value) {
        return Err(Refused::Held);
    }
    let taken = RwLockWord::WRITER | value & RwLockWord::SLEEPERS;
    word.compare_exchange_weak(value, taken, Acquire, Relaxed)
        .map(|_| ())
        .map_err(|_| Refused::Raced)
}

/// Why a writer does not have the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Somebody holds it: [`claim`] it.
    Held,
    /// Somebody else changed the word.
    Raced,
}

/// Keeps new readers out until a writer has had the lock.
#[inline]
pub fn claim<W: Word>(word: &W) {
    word.fetch_or(RwLockWord::WAITING, Relaxed);
}

/// Ends a reader's hold. True where nobody holds the lock now and somebody sleeps that wants it.
#[inline]
pub fn release_read<W: Word>(word: &W) -> bool {
    let before = word.fetch_sub(1, Release);
    before & RwLockWord::READERS == 1 && before & RwLockWord::SLEEPERS != 0
}

/// Ends a writer's hold; a claim stays. True where somebody sleeps that wants the lock.
#[inline]
pub fn release_write<W: Word>(word: &W) -> bool {
    word.fetch_and(!RwLockWord::WRITER, Release) & RwLockWord::SLEEPERS != 0
}
