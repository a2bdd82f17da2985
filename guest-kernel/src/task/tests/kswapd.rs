//! The reclaim thread: whole machines in too little memory, on the model with its coroutines.

use std::cell::Cell;
use std::panic::catch_unwind;
use std::vec::Vec;

use abi::disk::DiskOp;
use abi::layout::PAGE_SIZE;
use abi::objects::{FrameKind, Kswapd, SlabId, Task, TaskState, lru, task_flags};
use abi::syscall::{Errno, advice, nr};
use proptest::prelude::*;

use super::rig::{Program, Rig, User};
use crate::mm::Field;
use crate::mm::tests::{audit, cases, slab_frames};

/// Frames of a kernel stack.
const STACK: u64 = 4;
/// A few pages of a process are wired: reclaim meets them, and leaves them.
const PAGES: u64 = 120;

/// Leaves `left` frames free, whatever there were.
fn starve(user: &User, left: u64) -> Vec<u64> {
    let k = user.0;
    let spare = k.root().free_frames.get().saturating_sub(left);
    let take = || k.alloc_frames(0, FrameKind::Stack);
    (0..spare).map(|_| take().expect("a free frame")).collect()
}

fn feed(user: &User, taken: Vec<u64>) {
    taken
        .into_iter()
        .for_each(|frame| user.0.free_frames(frame));
}

fn rests(k: &crate::Kernel<crate::arch::model::Model>) -> bool {
    k.has_no_work(k.root().kswapd.task.get())
}

/// Waits until the thread sleeps.
fn let_it_work(user: &User) {
    while !rests(user.0) {
        user.relax();
    }
}

fn fill(user: &User, base: u64, pages: u64, era: u64) {
    for page in 0..pages {
        user.store(base + page * PAGE_SIZE, era + page);
    }
}

fn look(user: &User, base: u64, pages: u64, era: u64) {
    for page in 0..pages {
        let found = user.load(base + page * PAGE_SIZE);
        assert_eq!(found, Ok(era + page), "page {page}");
    }
}

/// Nothing but the first process's zombie and the thread is left, and every frame is free again.
fn check_end(rig: &Rig) {
    let (k, root) = (rig.kernel, rig.kernel.root());
    for task in k.tasks().map(|task| k.obj(task)) {
        let is_thread = task.flags.get() & task_flags::KERNEL != 0;
        let state = if is_thread {
            TaskState::Blocked
        } else {
            TaskState::Zombie
        };
        assert_eq!(task.state.get(), state as u32);
        assert_eq!(task.waits_for.get() == Task::WAITS_FOR_WORK, is_thread);
    }
    assert_eq!(root.slabs[SlabId::Task as usize].used.get(), 2);
    assert_eq!((root.online.get(), root.swap.used.get()), (0, 0));
    assert_eq!(root.kswapd.reclaiming.get(), 0);
    assert!(root.mms.get().is_null(), "an mm was not let go");
    let now = root.free_frames.get() + slab_frames(k) + STACK;
    assert_eq!(now, rig.free_at_boot);
    audit(k);
}

/// Runs the programs to their end, after which everything is given back. With swap, so that there is the thread.
pub(super) fn run(cpus: usize, cmdline: &str, programs: &'static [Program], seed: u64) -> Rig {
    let mut rig = Rig::new(cpus, cmdline, programs, seed);
    assert_eq!(rig.run(), 0, "{}", rig.kernel.arch.console_text());
    check_end(&rig);
    rig
}

#[test]
fn it_wakes_below_the_low_mark_and_stops_at_the_high_one() {
    let program: Program = |user| {
        let (k, base) = (user.0, user.map(PAGES));
        fill(user, base, PAGES, 100);
        let state = &k.root().kswapd;
        let free = || k.root().free_frames.get();
        let taken = starve(user, state.low.get());
        assert!(rests(k), "at the mark all is well");
        let last = k.alloc_frames(0, FrameKind::Stack).unwrap();
        assert!(!rests(k));
        let_it_work(user);
        assert!(free() >= state.high.get(), "{} free", free());
        // Not much more than it was to.
        assert!(free() <= state.high.get() + 32, "{} free", free());
        look(user, base, PAGES, 100);
        k.free_frames(last);
        feed(user, taken);
        0
    };
    for cpus in [1, 2, 3] {
        let rig = run(
            cpus,
            "swap_slots=256 min_free=20",
            leak(program),
            cpus as u64,
        );
        assert!(rig.done[DiskOp::Write as usize] >= 10);
    }
}

/// The list of one program.
fn leak(program: Program) -> &'static [Program] {
    std::vec![program].leak()
}

#[test]
fn with_memory_enough_it_never_runs() {
    let program: Program = |user| {
        let base = user.map(20);
        fill(user, base, 20, 7);
        look(user, base, 20, 7);
        0
    };
    let mut rig = Rig::new(2, "swap_slots=64 min_free=20", leak(program), 3);
    let saved = rig.kernel.obj(rig.kswapd()).saved_sp.get();
    assert_eq!(rig.run(), 0);
    check_end(&rig);
    assert_eq!(rig.kernel.obj(rig.kswapd()).saved_sp.get(), saved);
    assert_eq!(rig.done, [0, 0]);
}

#[test]
fn there_is_none_without_swap_or_where_it_is_switched_off() {
    let program: Program = |_| 0;
    for cmdline in ["", "swap_slots=64 kswapd=off"] {
        let mut rig = Rig::new(2, cmdline, leak(program), 1);
        assert!(rig.kswapd().is_null());
        assert_eq!(rig.kernel.root().kswapd.high.get(), 0);
        assert_eq!(rig.run(), 0);
    }
}

/// Each allocation below the mark tries it again, up to a number of times; direct reclaim that succeeds revives it.
#[test]
fn where_nothing_can_be_freed_it_gives_up() {
    let program: Program = |user| {
        let k = user.0;
        let state = &k.root().kswapd;
        let base = user.map(PAGES);
        fill(user, base, PAGES, 100);
        assert_eq!(user.call(nr::MLOCK, [base, PAGES * PAGE_SIZE, 0, 0]), Ok(0));
        let mut taken = starve(user, state.low.get());
        // The first times it finds the few pages that are not locked.
        let (mut tries, mut failures) = (0, 0);
        while failures < Kswapd::MAX_FAILURES {
            taken.push(k.alloc_frames(0, FrameKind::Stack).unwrap());
            tries += 1;
            let_it_work(user);
            assert!([failures, failures + 1].contains(&state.failures.get()));
            failures = state.failures.get();
        }
        assert!(tries < Kswapd::MAX_FAILURES + 8, "{tries}");
        taken.push(k.alloc_frames(0, FrameKind::Stack).unwrap());
        assert!(rests(k), "it is given up");
        assert_eq!(state.failures.get(), Kswapd::MAX_FAILURES);
        look(user, base, PAGES, 100);
        // Pages that are not locked any more: an allocation that finds no frame gets one, and the thread is worth a try.
        assert_eq!(user.call(nr::MUNLOCK, [base, 40 * PAGE_SIZE, 0, 0]), Ok(0));
        taken.extend(starve(user, 0));
        taken.push(k.alloc_frames(0, FrameKind::Stack).unwrap());
        assert!(state.failures.get() < Kswapd::MAX_FAILURES);
        let_it_work(user);
        feed(user, taken);
        look(user, base, PAGES, 100);
        0
    };
    run(
        2,
        "swap_slots=256 min_free=40 pcp_batch=0",
        leak(program),
        5,
    );
}

/// As long as no slot is free neither the thread nor an allocation below the marks looks for what it could not write.
#[test]
fn with_a_full_swap_area_nobody_looks_for_pages_before_no_frame_is_left() {
    const SLOTS: u64 = 4;
    let program: Program = |user| {
        let k = user.0;
        let state = &k.root().kswapd;
        let base = user.map(PAGES);
        fill(user, base, PAGES, 100);
        let mut taken = starve(user, state.low.get());
        while k.root().swap.used.get() < SLOTS {
            taken.push(k.alloc_frames(0, FrameKind::Stack).unwrap());
            let_it_work(user);
        }
        let lists = || [lru::INACTIVE, lru::ACTIVE].map(|list| k.lru_count(list));
        let before = lists();
        while k.root().free_frames.get() > state.min.get() / 2 {
            taken.push(k.alloc_frames(0, FrameKind::Stack).unwrap());
            assert!(rests(k), "it was woken");
        }
        assert_eq!((lists(), state.failures.get()), (before, 0));
        // With room in the area it works again.
        assert_eq!(user.call(nr::MUNMAP, [base, 40 * PAGE_SIZE, 0, 0]), Ok(0));
        taken.extend(starve(user, state.low.get()));
        taken.push(k.alloc_frames(0, FrameKind::Stack).unwrap());
        let_it_work(user);
        assert_eq!(k.root().swap.used.get(), SLOTS);
        feed(user, taken);
        look(user, base + 40 * PAGE_SIZE, PAGES - 40, 140);
        0
    };
    run(2, "swap_slots=4 min_free=40 pcp_batch=0", leak(program), 5);
}

#[test]
fn a_disk_that_fails_to_write_does_not_keep_it_busy_for_ever_and_loses_nothing() {
    let program: Program = |user| {
        let (k, base) = (user.0, user.map(PAGES));
        let state = &k.root().kswapd;
        fill(user, base, PAGES, 100);
        let mut taken = starve(user, state.low.get());
        taken.push(k.alloc_frames(0, FrameKind::Stack).unwrap());
        let_it_work(user);
        assert!(state.failures.get() > 0);
        look(user, base, PAGES, 100);
        feed(user, taken);
        0
    };
    let mut rig = Rig::new(2, "swap_slots=256 min_free=20", leak(program), 9);
    rig.fails = Some(DiskOp::Write);
    assert_eq!(rig.run(), 0, "{}", rig.kernel.arch.console_text());
    assert!(rig.done[DiskOp::Write as usize] > 0);
    check_end(&rig);
}

#[test]
fn who_allocates_below_the_minimum_reclaims_itself() {
    let program: Program = |user| {
        let (k, base) = (user.0, user.map(PAGES));
        fill(user, base, PAGES, 100);
        let state = &k.root().kswapd;
        let taken = starve(user, state.low.get());
        // On one CPU the thread does not run before this task gives way.
        for _ in 0..30 {
            user.store(user.map(1), 1);
            assert!(k.root().free_frames.get() + 1 >= state.min.get());
        }
        look(user, base, PAGES, 100);
        feed(user, taken);
        0
    };
    run(
        1,
        "swap_slots=256 min_free=20 pcp_batch=0",
        leak(program),
        2,
    );
}

/// What it writes when the last process ends is let go of before the machine ends.
#[test]
fn a_machine_ends_when_its_work_is_done() {
    let program: Program = |user| {
        let (k, base) = (user.0, user.map(PAGES));
        fill(user, base, PAGES, 100);
        let taken = starve(user, k.root().kswapd.low.get());
        let last = k.alloc_frames(0, FrameKind::Stack).unwrap();
        user.relax();
        feed(user, taken);
        k.free_frames(last);
        0
    };
    for seed in 1..40 {
        run(2, "swap_slots=256 min_free=20", leak(program), seed);
    }
}

/// A page that is read in is waited for asleep: on one CPU the other thread runs meanwhile.
#[test]
fn who_reads_a_page_in_sleeps() {
    let first: Program = |user| {
        let base = user.map(4);
        fill(user, base, 4, 100);
        let out = user.call(nr::MADVISE, [base, 4 * PAGE_SIZE, advice::PAGEOUT, 0]);
        assert_eq!(out, Ok(0));
        user.thread(1);
        look(user, base, 4, 100);
        0
    };
    let second: Program = |user| {
        let asleep = || {
            user.0.tasks().any(|task| {
                let task = user.0.obj(task);
                task.waits_for.get() == Task::WAITS_FOR_SWAP
                    && task.state.get() == TaskState::Blocked as u32
            })
        };
        loop {
            SEEN.set(SEEN.get() + u64::from(asleep()));
            user.relax();
        }
    };
    let programs: &'static [Program] = std::vec![first, second].leak();
    let mut any = 0;
    for seed in 1..20 {
        SEEN.set(0);
        run(1, "swap_slots=16", programs, seed);
        any += SEEN.get();
    }
    assert!(any > 0, "nobody was ever seen asleep");
}

std::thread_local! {
    static SEEN: Cell<u64> = const { Cell::new(0) };
}

/// Being killed does not end the wait before the disk has answered: the folio is the device's until then.
#[test]
fn who_is_killed_while_it_reads_a_page_in_ends_after_the_disk() {
    let first: Program = |user| {
        let base = user.map(8);
        fill(user, base, 8, 100);
        SEEN.set(base);
        let out = user.call(nr::MADVISE, [base, 8 * PAGE_SIZE, advice::PAGEOUT, 0]);
        assert_eq!(out, Ok(0));
        user.thread(1);
        user.thread(1);
        user.relax();
        let _ = user.call(nr::EXIT_GROUP, [0; 4]);
        unreachable!("exit_group returns")
    };
    let second: Program = |user| {
        let base = SEEN.get();
        loop {
            for page in 0..8 {
                let found = user.load(base + page * PAGE_SIZE);
                assert!(found == Ok(100 + page), "{found:?}");
            }
            let pages = [base, 8 * PAGE_SIZE, advice::PAGEOUT, 0];
            let _ = user.call(nr::MADVISE, pages);
        }
    };
    let programs: &'static [Program] = std::vec![first, second].leak();
    for seed in 1..60 {
        run(2, "swap_slots=16 swap_readahead=4", programs, seed);
    }
}

/// The marks change while the machine runs, as far as they make sense.
#[test]
fn marks_are_changed_by_a_call() {
    let program: Program = |user| {
        let k = user.0;
        let marks = |min, low, high| user.call(nr::TESTBED_WATERMARKS, [min, low, high, 0]);
        assert_eq!(marks(3, 2, 5), Err(Errno::EINVAL));
        let base = user.map(8);
        fill(user, base, 8, 100);
        assert!(rests(k));
        let free = k.root().free_frames.get();
        assert_eq!(marks(0, free + 100, free + 100), Ok(0));
        assert!(!rests(k), "too few are free by these");
        let_it_work(user);
        assert!(
            k.root().free_frames.get() >= free + 8,
            "all that can go is gone"
        );
        assert_eq!(k.root().kswapd.failures.get(), 1);
        look(user, base, 8, 100);
        assert_eq!(marks(0, 0, 0), Ok(0));
        0
    };
    run(2, "swap_slots=64", leak(program), 4);
    let none: Program = |user| {
        let refused = user.call(nr::TESTBED_WATERMARKS, [0, 1, 2, 0]);
        u64::from(refused != Err(Errno::EINVAL))
    };
    let mut rig = Rig::new(1, "", leak(none), 1);
    assert_eq!(rig.run(), 0);
}

/// Threads fill, check, drop and page out memory of which there is not enough, and nobody reads what was not written.
fn churn(user: &User) -> u64 {
    let base = user.map(48);
    let me = user.call(nr::GETTID, [0; 4]).unwrap();
    let mut random = me.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut below = |limit: u64| {
        random ^= random >> 12;
        random ^= random << 25;
        random ^= random >> 27;
        (random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    };
    let mut known = [0; 48];
    for round in 1..400 {
        let page = below(48);
        let gva = base + page * PAGE_SIZE;
        match below(12) {
            0 => {
                let drop = [gva, PAGE_SIZE, advice::DONTNEED, 0];
                assert_eq!(user.call(nr::MADVISE, drop), Ok(0));
                known[page as usize] = 0;
            }
            1 => {
                let out = [gva, PAGE_SIZE, advice::PAGEOUT, 0];
                assert_eq!(user.call(nr::MADVISE, out), Ok(0));
            }
            2..6 => {
                user.store(gva, me << 32 | round);
                known[page as usize] = me << 32 | round;
            }
            _ => assert_eq!(user.load(gva), Ok(known[page as usize]), "page {page}"),
        }
    }
    0
}

/// A machine of `cpus` in which three threads [churn] and `left` frames are free.
fn churn_on(cpus: usize, cmdline: &str, left: u64, seed: u64) -> Rig {
    let first: Program = |user| {
        let taken = starve(user, LEFT.get());
        user.thread(1);
        user.thread(1);
        churn(user);
        let threads = || user.0.tasks().map(|task| user.0.obj(task).process.get());
        while threads().filter(|process| *process == 1).count() > 1 {
            user.relax();
        }
        feed(user, taken);
        0
    };
    LEFT.set(left);
    let programs: &'static [Program] = std::vec![first, churn as Program].leak();
    let mut rig = Rig::new(cpus, cmdline, programs, seed);
    assert_eq!(rig.run(), 0, "{}", rig.kernel.arch.console_text());
    rig
}

std::thread_local! {
    static LEFT: Cell<u64> = const { Cell::new(0) };
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(40)))]

    #[test]
    fn nobody_reads_what_was_not_written_in_little_memory(
        seed: u64,
        cpus in 1..=3usize,
        left in 60..140u64,
        cmdline in prop_oneof![
            Just("swap_slots=512 min_free=16"),
            Just("swap_slots=512 min_free=40 pcp_batch=0 swap_readahead=1"),
            Just("swap_slots=512 min_free=16 pcp_batch=2 fault_around=4"),
        ],
    ) {
        let rig = churn_on(cpus, cmdline, left, seed);
        check_end(&rig);
        prop_assert!(rig.done[DiskOp::Write as usize] > 0, "there was memory enough");
    }
}

/// The net has no holes that these slip through.
#[test]
fn churning_finds_pages_that_are_freed_before_the_flush() {
    let cmdline = "swap_slots=512 min_free=40 pcp_batch=0 bug=reclaim-free-before-flush";
    let fails = |seed: u64| catch_unwind(|| check_end(&churn_on(3, cmdline, 70, seed))).is_err();
    assert!((1..200).any(fails));
}
