//! Sleepable RCU.

use std::sync::atomic::Ordering::{Acquire, Release};

use guest_kernel::sync::Word;
use guest_kernel::sync::srcu::Srcu;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::AtomicUsize;
use loom::thread;

use crate::word::{FENCES, LoomWord, NOTHING, RELEASE, assert_broken, explore};

struct Shared<W: Word> {
    domain: Srcu<2, W>,
    link: AtomicUsize,
    objects: [UnsafeCell<u64>; 2],
}

// SAFETY: whether reads and frees are kept apart is what is tested: loom looks at each.
unsafe impl<W: Word + Sync> Sync for Shared<W> {}

impl<W: Word> Shared<W> {
    /// A section that begins on one CPU and ends on another: its reader was moved in between.
    fn read(&self, from: usize, to: usize) {
        let section = self.domain.read_begin(from);
        let object = &self.objects[self.link.load(Acquire)];
        // SAFETY: not freed before the section ends, or loom says that it is.
        assert_eq!(object.with(|value| unsafe { *value }), 7);
        self.domain.read_end(to, section);
    }
}

fn replaced_under_a_reader<const LEFT_OUT: u8>() {
    let shared = Arc::new(Shared {
        domain: Srcu::new(|| LoomWord::<LEFT_OUT>::new(0)),
        link: AtomicUsize::new(0),
        objects: [UnsafeCell::new(7), UnsafeCell::new(7)],
    });
    let other = shared.clone();
    let reader = thread::spawn(move || {
        other.read(0, 1);
        other.read(1, 1);
    });
    shared.link.store(1, Release);
    shared.domain.synchronize(1, thread::yield_now);
    // SAFETY: nobody can read it any more, or loom says that somebody can.
    shared.objects[0].with_mut(|value| unsafe { *value = 0 });
    reader.join().unwrap();
}

#[test]
fn what_a_section_reads_is_not_freed_before_its_end() {
    explore(replaced_under_a_reader::<NOTHING>);
    assert_broken(replaced_under_a_reader::<FENCES>);
    assert_broken(replaced_under_a_reader::<RELEASE>);
}

#[test]
fn two_grace_periods_at_once_both_end() {
    explore(|| {
        let domain = Arc::new(Srcu::<1, _>::new(|| LoomWord::<NOTHING>::new(0)));
        let other = domain.clone();
        let thread = thread::spawn(move || other.synchronize(2, thread::yield_now));
        domain.synchronize(1, thread::yield_now);
        thread.join().unwrap();
        let section = domain.read_begin(0);
        domain.read_end(0, section);
        domain.synchronize(1, || panic!("nobody is in a section"));
    });
}
