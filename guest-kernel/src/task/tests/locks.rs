//! Sleep for locks: whole machines on the model with its coroutines.

use std::cell::Cell;
use std::vec::Vec;

use abi::layout::PAGE_SIZE;
use abi::lock::LockClass;
use abi::objects::{Task, TaskState};
use abi::syscall::{Errno, advice, nr};

use super::kswapd::run;
use super::rig::{Program, User};
use crate::mm::Field;

/// Swap, and thereby kswapd, for [`run`]; whoever waits for an mmap_lock sleeps at once.
const SLEEPS: &str = "swap_slots=16 lock_spins=0";

std::thread_local! {
    /// Times that a program saw another task asleep for a lock of a class.
    static ASLEEP: Cell<[u64; 32]> = const { Cell::new([0; 32]) };
    /// Programs that are through.
    static THROUGH: Cell<u64> = const { Cell::new(0) };
}

/// Counts those who sleep for a lock now.
fn count(user: &User) {
    for task in user.0.tasks().map(|task| user.0.obj(task)) {
        let sleeps = task.state.get() == TaskState::Blocked as u32;
        if sleeps && task.waits_for.get() == Task::WAITS_FOR_LOCK {
            let mut asleep = ASLEEP.get();
            asleep[task.lock[1].get() as usize] += 1;
            ASLEEP.set(asleep);
        }
    }
}

fn asleep(class: LockClass) -> u64 {
    ASLEEP.get()[class as usize]
}

fn through() {
    THROUGH.set(THROUGH.get() + 1);
}

fn wait_for_all(user: &User, programs: u64) {
    while THROUGH.get() < programs {
        count(user);
        user.relax();
    }
}

fn leak<const N: usize>(programs: [Program; N]) -> &'static [Program] {
    Vec::from(programs).leak()
}

/// Writers and readers of one mmap_lock.
fn map_and_look(user: &User, turns: u64) {
    for turn in 0..turns {
        let base = user.map(2);
        user.store(base, turn);
        count(user);
        assert_eq!(user.load(base), Ok(turn));
        let mut residency = [0; 2];
        let into = residency.as_mut_ptr() as u64;
        // A reader; where it copies to is no address of the program's.
        let asked = user.call(nr::MINCORE, [base, 2 * PAGE_SIZE, into, 0]);
        assert_eq!(asked, Err(Errno::EFAULT));
        let unmapped = user.call(nr::MUNMAP, [base, 2 * PAGE_SIZE, 0, 0]);
        assert_eq!(unmapped, Ok(0));
    }
}

#[test]
fn who_waits_for_an_mmap_lock_sleeps_and_is_woken() {
    let first: Program = |user| {
        user.thread(1);
        user.thread(1);
        map_and_look(user, 4);
        wait_for_all(user, 2);
        0
    };
    let other: Program = |user| {
        map_and_look(user, 4);
        through();
        0
    };
    ASLEEP.set([0; 32]);
    for seed in 1..60 {
        THROUGH.set(0);
        run(1 + seed as usize % 3, SLEEPS, leak([first, other]), seed);
    }
    for class in [LockClass::MmapRead, LockClass::MmapWrite] {
        assert!(
            asleep(class) > 0,
            "nobody was seen asleep for the {class:?}"
        );
    }
}

#[test]
fn who_spins_for_an_mmap_lock_does_not_sleep() {
    let first: Program = |user| {
        user.thread(1);
        map_and_look(user, 4);
        wait_for_all(user, 1);
        0
    };
    let other: Program = |user| {
        map_and_look(user, 4);
        through();
        0
    };
    ASLEEP.set([0; 32]);
    for seed in 1..20 {
        THROUGH.set(0);
        let cmdline = "swap_slots=16 lock_spins=1000000";
        run(2, cmdline, leak([first, other]), seed);
    }
    assert_eq!(ASLEEP.get(), [0; 32]);
}

/// exit_group while others sleep for the lock: each gets it, ends then, and leaves nothing behind.
#[test]
fn who_is_killed_while_it_sleeps_for_a_lock_gets_it_first() {
    let first: Program = |user| {
        user.thread(1);
        user.thread(1);
        while asleep(LockClass::MmapWrite) + asleep(LockClass::MmapRead) == 0 && THROUGH.get() == 0
        {
            count(user);
            user.relax();
        }
        0
    };
    let other: Program = |user| {
        map_and_look(user, 40);
        through();
        0
    };
    let mut any = 0;
    for seed in 1..40 {
        ASLEEP.set([0; 32]);
        THROUGH.set(0);
        run(3, SLEEPS, leak([first, other]), seed);
        any += u64::from(THROUGH.get() == 0);
    }
    assert!(any > 0, "nobody was killed meanwhile");
}

/// A page of a file that has to come from the disk is waited for asleep, with the lock of the descriptor's position held; who
/// wants that sleeps too, so one CPU is enough for both.
#[test]
fn a_read_sleeps_for_the_disk_and_others_for_its_position() {
    const PAGES: u64 = 4;
    thread_local!(static FD: Cell<u64> = const { Cell::new(0) });
    fn read_some(user: &User, buffer: u64) {
        for _ in 0..PAGES {
            let read = user.call(nr::READ, [FD.get(), buffer, PAGE_SIZE, 0]);
            assert_eq!(read, Ok(PAGE_SIZE));
            // What this disk has where nothing was written.
            assert_eq!(user.load(buffer + 8), Ok(0xdbdb_dbdb_dbdb_dbdb));
            count(user);
        }
        through();
    }
    let first: Program = |user| {
        let bytes = 2 * PAGES * PAGE_SIZE;
        FD.set(
            user.call(nr::TESTBED_DISK_FILE, [4096, bytes, 0, 0])
                .unwrap(),
        );
        user.thread(1);
        user.thread(1);
        wait_for_all(user, 2);
        let buffer = user.map(1);
        let end = user.call(nr::READ, [FD.get(), buffer, PAGE_SIZE, 0]);
        assert_eq!(end, Ok(0), "both have read all of it");
        0
    };
    let other: Program = |user| {
        let buffer = user.map(1);
        user.store(buffer, 0);
        read_some(user, buffer);
        0
    };
    ASLEEP.set([0; 32]);
    for seed in 1..30 {
        THROUGH.set(0);
        run(
            1 + seed as usize % 2,
            "swap_slots=16",
            leak([first, other]),
            seed,
        );
    }
    assert!(asleep(LockClass::Position) > 0, "nobody was seen asleep");
}

/// A write whose source was swapped out waits for the disk with the lock of its file held.
#[test]
fn a_write_sleeps_for_its_source_and_others_for_the_file() {
    thread_local!(static FD: Cell<u64> = const { Cell::new(0) });
    fn write_some(user: &User, at: u64) {
        let base = user.map(2);
        for turn in 0..3 {
            user.store(base, turn);
            user.store(base + PAGE_SIZE, turn);
            let out = user.call(nr::MADVISE, [base, 2 * PAGE_SIZE, advice::PAGEOUT, 0]);
            assert_eq!(out, Ok(0));
            let written = user.call(nr::PWRITE64, [FD.get(), base, 2 * PAGE_SIZE, at]);
            assert_eq!(written, Ok(2 * PAGE_SIZE));
            count(user);
        }
        through();
    }
    let first: Program = |user| {
        let name = user.map(1);
        user.store(name, 0);
        FD.set(user.call(nr::MEMFD_CREATE, [name, 0, 0, 0]).unwrap());
        user.thread(1);
        user.thread(2);
        wait_for_all(user, 2);
        0
    };
    let one: Program = |user| {
        write_some(user, 0);
        0
    };
    let other: Program = |user| {
        write_some(user, 2 * PAGE_SIZE);
        0
    };
    ASLEEP.set([0; 32]);
    for seed in 1..40 {
        THROUGH.set(0);
        run(
            1 + seed as usize % 2,
            "swap_slots=16",
            leak([first, one, other]),
            seed,
        );
    }
    assert!(asleep(LockClass::Inode) > 0, "nobody was seen asleep");
}
