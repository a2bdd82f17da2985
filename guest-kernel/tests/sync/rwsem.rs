//! Sleep for a lock: nobody sleeps for one that is free.

use abi::lock::LockClass;
use guest_kernel::sync::{Word, rwlock, rwsem};
use loom::sync::atomic::AtomicBool;
use loom::sync::{Arc, Mutex, Notify};
use loom::thread;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::word::{LoomWord, explore_within};

/// Who sleeps.
struct Sleeper {
    class: LockClass,
    woken: AtomicBool,
    notify: Notify,
}

impl Sleeper {
    fn wake(&self) {
        self.woken.store(true, Release);
        self.notify.notify();
    }
}

struct Semaphore {
    word: LoomWord,
    /// The queue, under its lock.
    queue: Mutex<Vec<Arc<Sleeper>>>,
}

/// As `guest-kernel/src/task/lock.rs`, with loom's threads for tasks.
impl Semaphore {
    fn new() -> Arc<Self> {
        let (word, queue) = (LoomWord::new(0), Mutex::new(Vec::new()));
        Arc::new(Self { word, queue })
    }

    fn sleep(&self, class: LockClass) {
        let mut queue = self.queue.lock().unwrap();
        if rwsem::must_sleep(&self.word, class) {
            let me = Arc::new(Sleeper {
                class,
                woken: AtomicBool::new(false),
                notify: Notify::new(),
            });
            queue.push(me.clone());
            drop(queue);
            // loom's waits end by themselves too, tasks do not.
            while !me.woken.load(Acquire) {
                me.notify.wait();
            }
        }
    }

    fn wake(&self) {
        let mut queue = self.queue.lock().unwrap();
        if queue.is_empty() {
            return;
        }
        let first = queue.remove(0);
        first.wake();
        if first.class == LockClass::MmapRead {
            queue.retain(|sleeper| {
                let reads = sleeper.class == LockClass::MmapRead;
                if reads {
                    sleeper.wake();
                }
                !reads
            });
        }
        rwsem::let_readers_in(&self.word);
        if queue.is_empty() {
            rwsem::nobody_sleeps(&self.word);
        }
    }

    fn read(&self) {
        while !rwlock::try_read(&self.word) {
            self.sleep(LockClass::MmapRead);
        }
        if rwlock::release_read(&self.word) {
            self.wake();
        }
    }

    fn write(&self) {
        while let Err(refused) = rwlock::try_write(&self.word) {
            if refused == rwlock::Refused::Held {
                rwlock::claim(&self.word);
                self.sleep(LockClass::MmapWrite);
            }
        }
        if rwlock::release_write(&self.word) {
            self.wake();
        }
    }
}

/// Every one comes to its end, which loom tells from a deadlock, and leaves nothing behind but perhaps a claim.
fn all_come_through(others: &'static [fn(&Semaphore)]) {
    explore_within(2, move || {
        let lock = Semaphore::new();
        let others = others.iter().map(|other| {
            let lock = lock.clone();
            thread::spawn(move || other(&lock))
        });
        let others: Vec<_> = others.collect();
        lock.write();
        for other in others {
            other.join().unwrap();
        }
        assert!(lock.queue.lock().unwrap().is_empty());
        let word = lock.word.load(Relaxed);
        assert!(LockClass::MmapWrite.lets_in(word), "{word:#x}");
        assert_eq!(word & abi::objects::RwLockWord::SLEEPERS, 0, "{word:#x}");
    });
}

#[test]
fn two_writers_come_through() {
    all_come_through(&[Semaphore::write]);
}

#[test]
fn a_reader_and_two_writers_come_through() {
    all_come_through(&[Semaphore::read, Semaphore::write]);
}

#[test]
fn two_readers_and_a_writer_come_through() {
    all_come_through(&[Semaphore::read, Semaphore::read]);
}

/// Why both changes are made by read-modify-writes of one word, and claims taken back: without either somebody sleeps for ever.
#[test]
fn a_sleeper_is_announced_and_a_claim_taken_back() {
    let word = std::sync::atomic::AtomicU64::new(0);
    assert!(
        !rwsem::must_sleep(&word, LockClass::MmapWrite),
        "it is free"
    );
    assert!(rwlock::try_read(&word));
    rwlock::claim(&word);
    assert!(rwsem::must_sleep(&word, LockClass::MmapWrite));
    assert!(
        rwsem::must_sleep(&word, LockClass::MmapRead),
        "a writer waits"
    );
    assert!(rwlock::release_read(&word), "somebody is to be woken");
    rwsem::let_readers_in(&word);
    assert!(rwlock::try_read(&word) && rwlock::try_read(&word));
    assert!(!rwlock::release_read(&word), "one holds it still");
    rwsem::nobody_sleeps(&word);
    assert!(!rwlock::release_read(&word), "nobody sleeps");
    assert_eq!(rwlock::try_write(&word), Ok(()));
    assert!(!rwlock::release_write(&word));
}
