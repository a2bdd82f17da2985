//! The spin lock and the reader-writer lock.

use guest_kernel::sync::{Word, rwlock, spin};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

use crate::word::{ACQUIRE, LoomWord, NOTHING, RELEASE, assert_broken, explore};

struct Locked<W> {
    word: W,
    /// loom fails where two threads touch it with no order between them.
    data: UnsafeCell<u64>,
}

// SAFETY: whether the lock keeps accesses apart is what is tested: loom looks at each.
unsafe impl<W: Sync> Sync for Locked<W> {}

impl<W: Word> Locked<W> {
    fn add(&self) {
        // SAFETY: the caller holds the lock alone, or loom says that it does not.
        self.data.with_mut(|data| unsafe { *data += 1 });
    }
    fn read(&self) -> u64 {
        // SAFETY: as above, not alone.
        self.data.with(|data| unsafe { *data })
    }
    // One attempt: loom would follow a spin loop for ever, for each turn of it writes the word (the claim).
    fn write_once(&self) -> u64 {
        if rwlock::try_write(&self.word).is_err() {
            rwlock::claim(&self.word);
            return 0;
        }
        self.add();
        rwlock::release_write(&self.word);
        1
    }
    fn read_once(&self) -> Option<u64> {
        rwlock::try_read(&self.word).then(|| {
            let value = self.read();
            rwlock::release_read(&self.word);
            value
        })
    }
}

fn locked<const LEFT_OUT: u8>() -> Arc<Locked<LoomWord<LEFT_OUT>>> {
    Arc::new(Locked {
        word: LoomWord::new(0),
        data: UnsafeCell::new(0),
    })
}

fn spin_counts<const LEFT_OUT: u8>() {
    let lock = locked::<LEFT_OUT>();
    let add = |lock: &Locked<_>, me| {
        while let Err(holder) = spin::try_acquire(&lock.word, me) {
            assert_ne!(holder, me);
            thread::yield_now();
        }
        lock.add();
        spin::release(&lock.word);
    };
    let other = lock.clone();
    let thread = thread::spawn(move || add(&other, 2));
    add(&lock, 1);
    thread.join().unwrap();
    assert_eq!(lock.read(), 2);
}

/// Two writers and a reader, in any order.
fn writers_and_a_reader<const LEFT_OUT: u8>() {
    let lock = locked::<LEFT_OUT>();
    let (one, two) = (lock.clone(), lock.clone());
    let writer = thread::spawn(move || one.write_once());
    let reader = thread::spawn(move || two.read_once());
    let mine = lock.write_once();
    let all = mine + writer.join().unwrap();
    assert!(reader.join().unwrap().is_none_or(|seen| seen <= all));
    assert_eq!(lock.read(), all);
}

/// Two readers and a writer, which must be ordered after both, whoever of them released last.
fn readers_then_a_writer<const LEFT_OUT: u8>() {
    let lock = locked::<LEFT_OUT>();
    let readers = [lock.clone(), lock.clone()].map(|lock| thread::spawn(move || lock.read_once()));
    let written = lock.write_once();
    for reader in readers {
        assert!(reader.join().unwrap().is_none_or(|seen| seen <= written));
    }
}

#[test]
fn a_spin_lock_keeps_two_holders_apart() {
    explore(spin_counts::<NOTHING>);
    assert_broken(spin_counts::<ACQUIRE>);
    assert_broken(spin_counts::<RELEASE>);
}

#[test]
fn a_writer_is_alone() {
    explore(writers_and_a_reader::<NOTHING>);
    assert_broken(writers_and_a_reader::<ACQUIRE>);
    assert_broken(writers_and_a_reader::<RELEASE>);
}

#[test]
fn a_writer_comes_after_all_readers_before_it() {
    explore(readers_then_a_writer::<NOTHING>);
    assert_broken(readers_then_a_writer::<RELEASE>);
}

#[test]
fn a_claim_keeps_readers_out_until_a_writer_has_had_the_lock() {
    let word = std::sync::atomic::AtomicU64::new(0);
    assert!(rwlock::try_read(&word));
    assert_eq!(rwlock::try_write(&word), Err(rwlock::Refused::Held));
    rwlock::claim(&word);
    assert!(!rwlock::try_read(&word), "a writer waits");
    rwlock::release_read(&word);
    assert!(!rwlock::try_read(&word));
    assert_eq!(rwlock::try_write(&word), Ok(()), "free, but for the claim");
    rwlock::claim(&word);
    rwlock::release_write(&word);
    assert!(!rwlock::try_read(&word), "the next claim stays");
    assert_eq!(rwlock::try_write(&word), Ok(()));
    rwlock::release_write(&word);
    assert!(rwlock::try_read(&word));
}
