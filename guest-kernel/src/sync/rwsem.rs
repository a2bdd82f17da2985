//! The lock that tasks sleep for (Linux's rw_semaphore, kernel/locking/rwsem.c; taken by writers alone its mutex): an
//! [`rwlock`](super::rwlock) with a queue of those who sleep, and one bit in its word that says that there are some.
//!
//! The queue has a lock (here the scheduler's, under which tasks fall asleep and are woken). Under it
//! - whoever wants to sleep sets the bit by a read-modify-write that sees the lock held ([`must_sleep`]), and queues up;
//! - whoever has released the lock and found the bit set wakes, and takes the bit back with the last one who slept
//!   ([`nobody_sleeps`]).
//!
//! No wake-up is lost, for release and the setting of the bit change one word: either the release comes later and sees the
//! bit, and then it waits for the queue's lock until the sleeper is on the queue; or it comes earlier, and who wants to sleep sees the lock
//! free. That needs no ordering but that of the word itself, so all here is Relaxed; what the holders did is
//! ordered by the `rwlock` when the woken one takes it.
//!
//! Who is woken takes the lock as everybody does, and may find that another was faster (Linux hands it over after a time; here
//! is no clock). The claim of a writer that sleeps keeps readers out until the lock is free and somebody is woken. Then it is taken back
//! ([`let_readers_in`]): readers would wait for a lock that nobody holds until the woken one runs, if they do not keep it from that; it claims
//! anew where it has to.

use core::sync::atomic::Ordering::Relaxed;

use abi::lock::LockClass;
use abi::objects::RwLockWord;

use super::Word;

/// True where the lock is held, or claimed, against `class`: from here on whoever releases it wakes. Under the queue's lock.
pub fn must_sleep<W: Word>(word: &W, class: LockClass) -> bool {
    let mut value = word.load(Relaxed);
    while !class.lets_in(value) {
        let announced = value | RwLockWord::SLEEPERS;
        match word.compare_exchange_weak(value, announced, Relaxed, Relaxed) {
            Ok(_) => return true,
            Err(now) => value = now,
        }
    }
    false
}

/// Takes writers' claims back. Under the queue's lock.
pub fn let_readers_in<W: Word>(word: &W) {
    word.fetch_and(!RwLockWord::WAITING, Relaxed);
}

/// The queue has none any more that sleeps for this lock. Under the queue's lock.
pub fn nobody_sleeps<W: Word>(word: &W) {
    word.fetch_and(!RwLockWord::SLEEPERS, Relaxed);
}
