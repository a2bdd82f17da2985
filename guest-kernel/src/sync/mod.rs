//! Locks over words in shared objects: a spin lock, and a reader-writer lock that tasks sleep for; and RCU.
//!
//! Each algorithm is a file of its own, generic over the atomics ([`Word`]), with its ordering rules: [`spin`],
//! [`rwlock`], [`rwsem`], [`vma_lock`], [`seqcount`], [`srcu`], [`grace`] (the counters of RCU), [`shootdown`]. What is here and in [`rcu`] puts them on the kernel's
//! objects, with the events and points that the host sees.
//!
//! Who spins does so with [`Arch::relax`], so a CPU that waits still takes IPIs: a shootdown never deadlocks
//! with a lock; outside of RCU read sections it is quiescent meanwhile. None may be taken from an IPI handler, but the scheduler's.
//!
//! A task may sleep while it holds locks of files and mmap_locks ([`LockClass::is_of_task`]): whoever waits for them sleeps too,
//! for the lock of a file at once, for an mmap_lock after some turns (parameter `lock_spins`), for who holds it sleeps at most for another one. All others are spin
//! locks, under which nobody sleeps.
//!
//! Lock words live in `abi` objects so that the host can see who holds what.
//!
//! Lock order (Linux's `Documentation/mm/process_addrs.rst`, the part that exists here):
//! file position -> inode -> `mmap_lock` -> VMA -> folio -> i_mmap -> anon_vma root -> page-table lock -> one of page
//! cache, descriptor table, swap, LRU, buddy, slab, mms, sched (Linux's mm/filemap.c and mm/rmap.c, the lists at their tops).
//! Whoever reads a VMA has not waited for it, and does not wait for the mmap_lock: its writers wait for him under it.
//! Two mmap_locks: parent before child (fork; nobody but khugepaged can know the child, and that takes one at a time). Two folio locks: that of a folio that
//! moves before that of its new frame, which nobody else can know (`mm::migrate`).

pub mod grace;
pub mod rcu;
pub mod rwlock;
pub mod rwsem;
pub mod seqcount;
pub mod shootdown;
pub mod spin;
pub mod srcu;
pub mod vma_lock;
mod word;

pub use word::Word;

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

use abi::channel::EventKind;
use abi::lock::LockClass;
use abi::objects::RwLockWord;
use abi::point::Point;

use crate::Kernel;
use crate::arch::Arch;

/// A held lock; dropping it releases.
#[must_use = "the lock is released at once"]
pub struct Guard<'k, A: Arch> {
    kernel: &'k Kernel<A>,
    word: &'k AtomicU64,
    class: LockClass,
}

/// How a lock was taken.
#[derive(Clone, Copy)]
pub(crate) enum Taken {
    /// Whoever wants it waits.
    Waiting = 0,
    /// It was free; else it would not have been taken, so no order with others matters.
    Trying = 1,
}

/// A spin lock word is the holder's CPU plus one, 0 while free.
impl<A: Arch> Kernel<A> {
    /// Takes the spin lock `word`.
    ///
    /// # Panics
    /// Where this CPU holds it already.
    pub fn lock<'k>(&'k self, word: &'k AtomicU64, class: LockClass) -> Guard<'k, A> {
        let me = self.arch.cpu() as u64 + 1;
        while let Err(holder) = spin::try_acquire(word, me) {
            assert!(holder != me, "{class:?} lock taken twice by CPU {}", me - 1);
            self.wait(word, class);
        }
        self.acquired(word, class, Taken::Waiting, 0)
    }

    /// Takes the spin lock `word` if nobody holds it, this CPU included.
    pub(crate) fn try_lock<'k>(
        &'k self,
        word: &'k AtomicU64,
        class: LockClass,
    ) -> Option<Guard<'k, A>> {
        let me = self.arch.cpu() as u64 + 1;
        // It may fail where the lock is free: whoever only tries it takes that for held.
        spin::try_acquire(word, me).ok()?;
        Some(self.acquired(word, class, Taken::Trying, 0))
    }

    /// The guard of a spin lock that this CPU took on another stack: the scheduler's lock is held
    /// across a context switch and released by whoever runs next.
    ///
    /// # Panics
    /// Where this CPU does not hold it.
    pub(crate) fn adopt_lock<'k>(&'k self, word: &'k AtomicU64, class: LockClass) -> Guard<'k, A> {
        assert!(self.holds(word), "{class:?} lock adopted but not held");
        Guard {
            kernel: self,
            word,
            class,
        }
    }

    /// True where this CPU holds the spin lock `word`.
    pub(crate) fn holds(&self, word: &AtomicU64) -> bool {
        word.load(Relaxed) == self.arch.cpu() as u64 + 1
    }

    /// Takes the reader-writer lock `word` for reading: shared with other readers.
    pub fn read_lock<'k>(&'k self, word: &'k AtomicU64, class: LockClass) -> Guard<'k, A> {
        let mut turns = 0;
        while !rwlock::try_read(word) {
            self.wait_or_sleep(word, class, &mut turns);
        }
        self.acquired(word, class, Taken::Waiting, 0)
    }

    /// Takes the reader-writer lock `word` for reading if no writer holds or wants it.
    pub(crate) fn try_read_lock<'k>(
        &'k self,
        word: &'k AtomicU64,
        class: LockClass,
    ) -> Option<Guard<'k, A>> {
        // It may fail where the lock is free, as `try_lock`.
        rwlock::try_read(word).then(|| self.acquired(word, class, Taken::Trying, 0))
    }

    /// Takes the reader-writer lock `word` for writing: alone. Whoever releases it does so by [`Kernel::released`].
    pub(crate) fn write_lock(&self, word: &AtomicU64, class: LockClass) {
        let mut turns = 0;
        loop {
            match rwlock::try_write(word) {
                Ok(()) => return self.tell_acquired(word, class, Taken::Waiting, 0),
                Err(rwlock::Refused::Raced) => {}
                Err(rwlock::Refused::Held) => {
                    rwlock::claim(word);
                    self.wait_or_sleep(word, class, &mut turns);
                }
            }
        }
    }

    /// Takes the lock of a file that is `word`: alone, and perhaps for a sleep.
    pub(crate) fn mutex_lock<'k>(&'k self, word: &'k AtomicU64, class: LockClass) -> Guard<'k, A> {
        self.write_lock(word, class);
        Guard {
            kernel: self,
            word,
            class,
        }
    }

    /// One turn of a wait for a lock of a task, after `turns` others.
    #[cold]
    fn wait_or_sleep(&self, word: &AtomicU64, class: LockClass, turns: &mut u64) {
        let spins = match class {
            LockClass::MmapRead | LockClass::MmapWrite => self.config.lock_spins,
            _ => 0,
        };
        if self.runs_task() && *turns >= spins {
            self.tell_wait(word, class);
            self.sleep_for_lock(word, class);
        } else {
            *turns += 1;
            self.wait(word, class);
        }
    }

    #[cold]
    pub(crate) fn wait(&self, word: &AtomicU64, class: LockClass) {
        self.tell_wait(word, class);
        self.spin(Point::LockWait, [self.lock_id(word), class as u64]);
    }

    pub(crate) fn tell_wait(&self, word: &AtomicU64, class: LockClass) {
        event!(
            self,
            EventKind::LockWait,
            [self.lock_id(word), class as u64, 0, 0, 0],
        );
    }

    /// The guard of a lock that was just taken, told of; a VMA's with the number of its mm.
    pub(crate) fn acquired<'k>(
        &'k self,
        word: &'k AtomicU64,
        class: LockClass,
        taken: Taken,
        mm: u64,
    ) -> Guard<'k, A> {
        self.tell_acquired(word, class, taken, mm);
        Guard {
            kernel: self,
            word,
            class,
        }
    }

    #[inline]
    fn tell_acquired(&self, word: &AtomicU64, class: LockClass, taken: Taken, mm: u64) {
        event!(
            self,
            EventKind::LockAcquire,
            [self.lock_id(word), class as u64, taken as u64, mm, 0],
        );
        point!(self, Point::LockAcquire, [self.lock_id(word), class as u64]);
    }

    /// Releases a lock by `release`, and tells so: before, because another may have it at once. Wakes where that says that somebody
    /// sleeps.
    #[inline]
    pub(crate) fn released(
        &self,
        word: &AtomicU64,
        class: LockClass,
        release: impl FnOnce() -> bool,
    ) {
        event!(
            self,
            EventKind::LockRelease,
            [
                self.lock_id(word),
                class as u64,
                u64::from(class.is_of_task() && word.load(Relaxed) & RwLockWord::SLEEPERS != 0),
                0,
                0
            ],
        );
        let somebody_sleeps = release();
        point!(self, Point::LockRelease, [self.lock_id(word), class as u64]);
        if somebody_sleeps {
            self.wake_sleepers(word);
        }
    }

    /// Guest physical address of a lock word: its name in events, the same on every engine.
    pub(crate) fn lock_id(&self, word: &AtomicU64) -> u64 {
        self.gpa_of(word)
    }

    /// Guest physical address of a field of a shared object.
    fn gpa_of<T>(&self, field: &T) -> u64 {
        (core::ptr::from_ref(field) as u64).wrapping_sub(self.arch.phys_to_virt(0) as u64)
    }
}

impl<A: Arch> Drop for Guard<'_, A> {
    fn drop(&mut self) {
        let (word, class) = (self.word, self.class);
        self.kernel.released(word, class, || {
            match class {
                LockClass::MmapRead => return rwlock::release_read(word),
                LockClass::Position | LockClass::Inode => return rwlock::release_write(word),
                LockClass::VmaRead => vma_lock::release(word),
                LockClass::VmaWrite => vma_lock::admit(word),
                _ => spin::release(word),
            }
            false
        });
    }
}
