//! The sequence counter.

use std::sync::atomic::Ordering::Relaxed;

use guest_kernel::sync::seqcount::SeqCount;
use loom::sync::Arc;
use loom::sync::atomic::AtomicU64;
use loom::thread;

use crate::word::{ACQUIRE, FENCES, LoomWord, NOTHING, RELEASE, assert_broken, explore};

/// Two words that are always equal, but while they are written.
fn never_torn<const LEFT_OUT: u8>() {
    let shared = Arc::new((
        SeqCount::new(LoomWord::<LEFT_OUT>::new(0)),
        [AtomicU64::new(0), AtomicU64::new(0)],
    ));
    let other = shared.clone();
    let writer = thread::spawn(move || {
        let (count, words) = &*other;
        for value in 1..=2 {
            let _write = count.write();
            words.iter().for_each(|word| word.store(value, Relaxed));
        }
    });
    let (count, words) = &*shared;
    loop {
        let start = count.begin(thread::yield_now);
        let [first, second] = [0, 1].map(|i: usize| words[i].load(Relaxed));
        if !count.changed(start) {
            assert_eq!(first, second, "torn");
            assert!(first >= start / 2, "older than the count");
            break;
        }
        thread::yield_now();
    }
    writer.join().unwrap();
}

#[test]
fn a_reader_keeps_only_what_is_whole() {
    explore(never_torn::<NOTHING>);
    assert_broken(never_torn::<FENCES>);
    assert_broken(never_torn::<ACQUIRE>);
    assert_broken(never_torn::<RELEASE>);
}
