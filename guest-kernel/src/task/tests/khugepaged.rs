//! The thread that gathers 2 MiB: whole machines, on the model with its coroutines.

use abi::layout::{HUGE_PAGE_SIZE, PAGE_SIZE};
use abi::objects::{SlabId, TaskState};
use abi::syscall::{advice, nr};
use proptest::prelude::*;

use super::rig::{Program, Rig, User};
use crate::mm::Field;
use crate::mm::tests::{audit, cases};

/// Pages of 2 MiB.
const PAGES: u64 = HUGE_PAGE_SIZE / PAGE_SIZE;

const BYTES: u64 = 16 << 20;

/// The list of one program.
fn leak(program: Program) -> &'static [Program] {
    std::vec![program].leak()
}

/// Waits until the thread sleeps.
fn let_it_work(user: &User) {
    let k = user.0;
    while !k.has_no_work(k.root().khugepaged.task.get()) {
        user.relax();
    }
}

fn check_end(rig: &Rig) {
    let (k, root) = (rig.kernel, rig.kernel.root());
    let thread = k.obj(root.khugepaged.task.get());
    assert_eq!(thread.state.get(), TaskState::Blocked as u32);
    assert_eq!(root.khugepaged.wanted.get(), 0);
    assert!(root.mms.get().is_null(), "an mm was not let go");
    assert_eq!(root.slabs[SlabId::Mm as usize].used.get(), 0);
    audit(k);
}

/// Small pages in 2 MiB that MADV_HUGEPAGE names afterwards are gathered, and read as before.
#[test]
fn it_gathers_what_has_become_eligible() {
    let program: Program = |user| {
        let k = user.0;
        let base = user.map(2 * PAGES);
        for page in [0, 7, PAGES, 2 * PAGES - 1] {
            user.store(base + page * PAGE_SIZE, 100 + page);
        }
        let mm = k.current().mm.get();
        assert_eq!(k.obj(mm).huge.get(), 0);
        let advised = user.call(nr::MADVISE, [base, 2 * HUGE_PAGE_SIZE, advice::HUGEPAGE, 0]);
        assert_eq!(advised, Ok(0));
        let_it_work(user);
        assert_eq!(k.obj(mm).huge.get(), 2);
        for page in [0, 7, PAGES, 2 * PAGES - 1] {
            assert_eq!(user.load(base + page * PAGE_SIZE), Ok(100 + page));
        }
        0
    };
    for cpus in [1, 2, 3] {
        let mut rig = Rig::with_memory(BYTES, cpus, "khugepaged=on", leak(program), 5);
        assert_eq!(rig.run(), 0, "{}", rig.kernel.arch.console_text());
        check_end(&rig);
    }
}

/// Every address space is looked at from its start, that of a child too, whose number is the next one.
#[test]
fn it_gathers_in_parent_and_child() {
    fn huge(user: &User) -> u64 {
        user.0.obj(user.0.current().mm.get()).huge.get()
    }
    let parent: Program = |user| {
        let base = user.map(2 * PAGES);
        user.store(base, 1);
        user.store(base + HUGE_PAGE_SIZE, 2);
        let advised = user.call(nr::MADVISE, [base, 2 * HUGE_PAGE_SIZE, advice::HUGEPAGE, 0]);
        assert_eq!(advised, Ok(0));
        user.child(1);
        assert_eq!(huge(user), 0, "one CPU: the thread has not run");
        let_it_work(user);
        assert_eq!(huge(user), 2);
        assert!(user.call(nr::WAIT4, [u64::MAX, 0, 0, 0]).is_ok());
        0
    };
    let child: Program = |user| {
        let_it_work(user);
        assert_eq!(huge(user), 2);
        0
    };
    let programs = std::vec![parent, child].leak();
    let mut rig = Rig::with_memory(BYTES, 1, "khugepaged=on", programs, 5);
    assert_eq!(rig.run(), 0, "{}", rig.kernel.arch.console_text());
    check_end(&rig);
}

#[test]
fn it_never_runs_where_nobody_asks() {
    let program: Program = |user| {
        let base = user.map(20);
        (0..20).for_each(|page| user.store(base + page * PAGE_SIZE, page));
        0
    };
    let mut rig = Rig::with_memory(BYTES, 2, "khugepaged=on", leak(program), 3);
    let thread = rig.kernel.root().khugepaged.task.get();
    let saved = rig.kernel.obj(thread).saved_sp.get();
    assert_eq!(rig.run(), 0);
    check_end(&rig);
    assert_eq!(rig.kernel.obj(thread).saved_sp.get(), saved);
    let mut rig = Rig::with_memory(BYTES, 2, "", leak(program), 3);
    assert!(rig.kernel.root().khugepaged.task.get().is_null());
    assert_eq!(rig.run(), 0);
}

/// Programs that come and go while the thread looks at them: whoever is last tears an address space down.
fn churn(user: &User) -> u64 {
    let base = user.map(PAGES);
    for round in 0..3 {
        user.store(base + 3 * PAGE_SIZE, round);
        user.store(base + 9 * PAGE_SIZE, round + 1);
        let advise = |advice| user.call(nr::MADVISE, [base, HUGE_PAGE_SIZE, advice, 0]);
        assert_eq!(advise(advice::HUGEPAGE), Ok(0));
        user.relax();
        assert_eq!(user.load(base + 3 * PAGE_SIZE), Ok(round));
        assert_eq!(user.load(base + 9 * PAGE_SIZE), Ok(round + 1));
        assert_eq!(advise(advice::NOHUGEPAGE), Ok(0));
        assert_eq!(advise(advice::DONTNEED), Ok(0));
    }
    user.store(base, 1);
    let _ = user.call(nr::MADVISE, [base, HUGE_PAGE_SIZE, advice::HUGEPAGE, 0]);
    0
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(60)))]

    #[test]
    fn programs_that_come_and_go_lose_nothing_to_it(
        seed: u64,
        cpus in 1..=3usize,
        cmdline in prop_oneof![
            Just("khugepaged=on"),
            Just("khugepaged=on pcp_batch=0 swap_slots=600"),
        ],
    ) {
        let program: Program = |user| {
            user.thread(1);
            churn(user)
        };
        let other: Program = churn;
        let mut rig = Rig::with_memory(BYTES, cpus, cmdline, std::vec![program, other].leak(), seed);
        prop_assert_eq!(rig.run(), 0, "{}", rig.kernel.arch.console_text());
        check_end(&rig);
    }
}
