//! Shootdowns, by membarrier: it asks for nothing but an answer. Two words are stored to and loaded, each by one side and
//! then the other (store buffering), with membarrier between on one side and nothing on the other: one of the two
//! loads sees the store.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use guest_kernel::sync::{Word, shootdown};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU64};
use loom::thread;

use crate::word::{ACQUIRE, FENCES, LoomWord, NOTHING, RELEASE, assert_broken, explore};

/// The bit of the CPU that is asked.
const OTHER: u64 = 1;

struct Shared<W> {
    /// The programs' words: the first is the other CPU's to store to, the second the asker's.
    words: [AtomicU64; 2],
    pending: W,
    lazy: W,
    over: AtomicBool,
}

impl<W: Word> Shared<W> {
    /// The program that calls membarrier between its store and its load; what it loads.
    fn with_barrier(&self) -> u64 {
        self.words[1].store(1, Relaxed);
        W::fence(SeqCst);
        if !shootdown::is_lazy(&self.lazy) {
            shootdown::ask(&self.pending, OTHER);
            while shootdown::unanswered(&self.pending) != 0 {
                thread::yield_now();
            }
        }
        W::fence(SeqCst);
        let seen = self.words[0].load(Relaxed);
        self.over.store(true, Relaxed);
        seen
    }

    /// The program on the other CPU, with nothing between its store and its load but an IPI, which may come at any time.
    fn without(&self) -> u64 {
        self.take_ipi();
        self.words[0].store(1, Relaxed);
        self.take_ipi();
        self.words[1].load(Relaxed)
    }

    fn take_ipi(&self) {
        if shootdown::is_asked(&self.pending, OTHER) {
            shootdown::answer(&self.pending, OTHER);
        }
    }
}

/// `other` is what the CPU does that does not call membarrier; it returns what its program has loaded.
fn store_buffering<const LEFT_OUT: u8>(lazy: u64, other: fn(&Shared<LoomWord<LEFT_OUT>>) -> u64) {
    let shared = Arc::new(Shared {
        words: [AtomicU64::new(0), AtomicU64::new(0)],
        pending: LoomWord::new(0),
        lazy: LoomWord::new(lazy),
        over: AtomicBool::new(false),
    });
    // Not on the thread that has made the words: loom lets nobody who has waited load what it knows from before.
    let here = shared.clone();
    let asker = thread::spawn(move || here.with_barrier());
    let other_seen = other(&shared);
    while !shared.over.load(Relaxed) {
        shared.take_ipi();
        thread::yield_now();
    }
    let seen = asker.join().unwrap();
    assert!(
        seen == 1 || other_seen == 1,
        "neither has seen the other's store"
    );
}

/// A CPU that runs the program all the time.
fn running<const LEFT_OUT: u8>() {
    store_buffering::<LEFT_OUT>(0, Shared::without);
}

/// A CPU that idled, and runs the program now.
fn from_lazy<const LEFT_OUT: u8>() {
    store_buffering::<LEFT_OUT>(1, |shared| {
        shootdown::leave_lazy(&shared.lazy);
        shared.without()
    });
}

/// A CPU that idles as soon as the program has loaded.
fn to_lazy<const LEFT_OUT: u8>() {
    store_buffering::<LEFT_OUT>(0, |shared| {
        let seen = shared.without();
        shootdown::enter_lazy(&shared.lazy);
        seen
    });
}

#[test]
fn who_is_asked_orders_by_its_answer() {
    explore(running::<NOTHING>);
    assert_broken(running::<ACQUIRE>);
    assert_broken(running::<RELEASE>);
}

#[test]
fn who_is_lazy_sees_the_store_or_is_asked() {
    explore(from_lazy::<NOTHING>);
    assert_broken(from_lazy::<FENCES>);
}

#[test]
fn who_becomes_lazy_has_stored() {
    explore(to_lazy::<NOTHING>);
    assert_broken(to_lazy::<RELEASE>);
}
