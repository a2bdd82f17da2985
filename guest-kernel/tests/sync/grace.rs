//! Quiescent states and grace periods.

use std::sync::atomic::Ordering::{Acquire, Release};

use guest_kernel::sync::{Word, grace};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::AtomicUsize;
use loom::thread;

use crate::word::{ACQUIRE, FENCES, LoomWord, NOTHING, RELEASE, assert_broken, explore};

/// Two objects, one of which is linked; and the words of two CPUs that read.
struct Shared<W> {
    link: AtomicUsize,
    /// loom fails where one is freed (written) and read with no order between.
    objects: [UnsafeCell<u64>; 2],
    watching: [W; 2],
}

// SAFETY: whether reads and frees are kept apart is what is tested: loom looks at each.
unsafe impl<W: Sync> Sync for Shared<W> {}

impl<W: Word> Shared<W> {
    fn read_section(&self) {
        let object = &self.objects[self.link.load(Acquire)];
        // SAFETY: not freed before the section ends, or loom says that it is.
        assert_eq!(object.with(|value| unsafe { *value }), 7);
    }

    /// Links the second object, and frees the first after a grace period.
    fn replace(&self, cpus: &[usize]) {
        self.link.store(1, Release);
        grace::begin::<W>();
        let seen: Vec<u64> = cpus
            .iter()
            .map(|&cpu| grace::look(&self.watching[cpu]))
            .collect();
        for (&cpu, &seen) in cpus.iter().zip(&seen) {
            while grace::holds_up(&self.watching[cpu], seen) {
                thread::yield_now();
            }
        }
        // SAFETY: nobody can read it any more, or loom says that somebody can.
        self.objects[0].with_mut(|value| unsafe { *value = 0 });
    }
}

fn shared<const LEFT_OUT: u8>(watching: u64) -> Arc<Shared<LoomWord<LEFT_OUT>>> {
    Arc::new(Shared {
        link: AtomicUsize::new(0),
        objects: [UnsafeCell::new(7), UnsafeCell::new(7)],
        watching: [LoomWord::new(watching), LoomWord::new(watching)],
    })
}

/// A CPU that comes from user mode, reads, and goes back.
fn from_user_mode<const LEFT_OUT: u8>() {
    let kernel = shared::<LEFT_OUT>(0);
    let other = kernel.clone();
    let reader = thread::spawn(move || {
        grace::enter(&other.watching[0]);
        other.read_section();
        grace::leave(&other.watching[0]);
    });
    kernel.replace(&[0]);
    reader.join().unwrap();
}

/// A CPU that is in the kernel, reads, is quiescent for a moment, reads again, and goes to user mode.
fn through_the_kernel<const LEFT_OUT: u8>() {
    let kernel = shared::<LEFT_OUT>(1);
    let other = kernel.clone();
    let reader = thread::spawn(move || {
        other.read_section();
        grace::pass(&other.watching[0]);
        other.read_section();
        grace::leave(&other.watching[0]);
    });
    kernel.replace(&[0]);
    reader.join().unwrap();
}

/// Two CPUs, one grace period for both.
fn two_readers() {
    let kernel = shared::<NOTHING>(1);
    let readers = [0, 1].map(|cpu| {
        let kernel = kernel.clone();
        thread::spawn(move || {
            kernel.read_section();
            grace::leave(&kernel.watching[cpu]);
        })
    });
    kernel.replace(&[0, 1]);
    for reader in readers {
        reader.join().unwrap();
    }
}

/// Two CPUs that both wait for a grace period: each is quiescent while it waits.
fn two_updaters() {
    let kernel = shared::<NOTHING>(1);
    let wait = |kernel: &Shared<LoomWord>, me: usize| {
        grace::begin::<LoomWord>();
        let other = &kernel.watching[1 - me];
        let seen = grace::look(other);
        while grace::holds_up(other, seen) {
            let paused = grace::leave(&kernel.watching[me]);
            thread::yield_now();
            assert!(paused);
            grace::enter(&kernel.watching[me]);
        }
        grace::leave(&kernel.watching[me]);
    };
    let other = kernel.clone();
    let thread = thread::spawn(move || wait(&other, 1));
    wait(&kernel, 0);
    thread.join().unwrap();
}

#[test]
fn a_cpu_that_comes_into_the_kernel_is_waited_for_or_sees_the_new_link() {
    explore(from_user_mode::<NOTHING>);
    assert_broken(from_user_mode::<FENCES>);
    assert_broken(from_user_mode::<RELEASE>);
    assert_broken(from_user_mode::<ACQUIRE>);
}

#[test]
fn a_moment_outside_is_enough() {
    explore(through_the_kernel::<NOTHING>);
    assert_broken(through_the_kernel::<FENCES>);
    assert_broken(through_the_kernel::<RELEASE>);
    assert_broken(through_the_kernel::<ACQUIRE>);
}

#[test]
fn a_grace_period_waits_for_all() {
    explore(two_readers);
}

#[test]
fn two_that_wait_for_each_other_come_to_an_end() {
    explore(two_updaters);
}
