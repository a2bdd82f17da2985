//! `huge`: races over 2 MiB that one entry maps, or is to map, for exploration. The set-up lies before [`Sys::begin`], what is
//! raced on between it and [`Sys::end`], as in `litmus`.
//!
//! The leader runs on CPU 0, the other thread on CPU 1, which has used A before. `last` counts the other thread's stores to a
//! page of A: who loads it, and then the page, must find what it counts or what is younger.
//!
//! | test | the leader | the other thread | wrong is |
//! |---|---|---|---|
//! | `split` | drops one page of A, which is mapped whole, and reads it | writes another page, reads both | the old value of the page that was dropped; a value of the other that nobody wrote, or that is older than what was written |
//! | `collapse` | collapses A, whose pages are small, and reads the page | writes it | a value that is older than what was written |
//! | `fork` | forks, writes the page of A, which the child shares whole | reads it | in the child a value that changes; else the old value once the write is done |
//!
//! That a page was in a TLB in both sizes no program sees: that is the host's to say (T-12).

use core::sync::atomic::{AtomicU64, Ordering};

use abi::channel::ReportKind::{ChangedUnderneath, ForeignFrame, WrongPermission};
use abi::layout::{HUGE_PAGE_SIZE, PAGE_SIZE};
use abi::syscall::{Errno, advice, prot};

use super::{Data, Program, SUBJECT_GVA};
use crate::args::{Arg, Args};
use crate::sys::{ANONYMOUS, Sys, print_line};
use crate::tag::{Region, Tag, address};
use crate::team::{Findings, must, team};

pub(super) const PROGRAM: Program = Program {
    name: "huge",
    help: "a race of a few steps over 2 MiB that one entry maps, for exploration",
    args: &[
        Arg {
            name: "test",
            default: "split|collapse|fork",
            range: 0..=2,
            help: "which race",
        },
        Arg {
            name: "passes",
            default: "2",
            range: 1..=1000,
            help: "times the other thread accesses A",
        },
    ],
    data: Data::Ignored,
    has_setup: true,
};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Test {
    Split,
    Collapse,
    Fork,
}

const TESTS: [Test; 3] = [Test::Split, Test::Collapse, Test::Fork];
/// The page that is written, and in `split` the one that is dropped.
const WRITTEN: u64 = 3;
const DROPPED: u64 = 300;

struct Shared {
    test: Test,
    passes: u64,
    /// The other thread has used A.
    ready: AtomicU64,
    /// The race may begin.
    go: AtomicU64,
    /// The leader's call has returned.
    done: AtomicU64,
    /// Which of the values of [`value`] was stored last, at least.
    last: AtomicU64,
    findings: Findings,
}

fn page(number: u64) -> u64 {
    address(SUBJECT_GVA, number, 0)
}

/// What is stored in a page the `nth` time.
fn value(number: u64, nth: u64) -> u64 {
    let tag = Tag {
        region: Region::Subject,
        generation: nth,
        page: number,
        slot: 0,
    };
    tag.encode()
}

pub(super) fn run<S: Sys>(sys: &S, args: &Args<'_>) -> i32 {
    let shared = Shared {
        test: TESTS[args.number("test") as usize],
        passes: args.number("passes"),
        ready: AtomicU64::new(0),
        go: AtomicU64::new(0),
        done: AtomicU64::new(0),
        last: AtomicU64::new(0),
        findings: Findings::default(),
    };
    let findings = &shared.findings;
    must(sys, findings, 0, 0, sys.set_affinity(0).map(|()| 0));
    if set_up(sys, &shared).is_err() {
        findings.report(sys, WrongPermission, SUBJECT_GVA, 0, 0);
        return findings.status();
    }
    let result = team(sys, &shared, 1, other, || {
        while shared.ready.load(Ordering::Acquire) == 0 {
            sys.yield_now();
        }
        shared.go.store(1, Ordering::Release);
        sys.begin();
        lead(sys, &shared);
    });
    must(sys, findings, 0, 0, result.map(|()| 0));
    sys.end();
    let _ = sys.munmap(SUBJECT_GVA, HUGE_PAGE_SIZE);
    print_line(sys, format_args!("huge: over"));
    findings.status()
}

/// A as the race needs it: mapped whole, or by small pages.
fn set_up<S: Sys>(sys: &S, shared: &Shared) -> Result<(), Errno> {
    let wanted = match shared.test {
        Test::Collapse => advice::NOHUGEPAGE,
        Test::Split | Test::Fork => advice::HUGEPAGE,
    };
    sys.mmap(
        SUBJECT_GVA,
        HUGE_PAGE_SIZE,
        prot::READ | prot::WRITE,
        ANONYMOUS,
    )?;
    ignored_where_unknown(sys.madvise(SUBJECT_GVA, HUGE_PAGE_SIZE, wanted))?;
    for number in [WRITTEN, DROPPED] {
        write(sys, &shared.findings, number, 0);
    }
    if shared.test == Test::Collapse {
        ignored_where_unknown(sys.madvise(SUBJECT_GVA, HUGE_PAGE_SIZE, advice::HUGEPAGE))?;
    }
    Ok(())
}

/// A Linux without folios of 2 MiB does not know what they want: the races are races all the same.
fn ignored_where_unknown(result: Result<u64, Errno>) -> Result<(), Errno> {
    match result {
        Ok(_) | Err(Errno::EINVAL) => Ok(()),
        Err(errno) => Err(errno),
    }
}

fn write<S: Sys>(sys: &S, findings: &Findings, number: u64, nth: u64) {
    if sys.write(page(number), value(number, nth)).is_err() {
        findings.report(sys, WrongPermission, page(number), value(number, nth), 0);
    }
}

fn lead<S: Sys>(sys: &S, shared: &Shared) {
    let findings = &shared.findings;
    match shared.test {
        Test::Split => {
            let dropped = sys.madvise(page(DROPPED), PAGE_SIZE, advice::DONTNEED);
            if must(sys, findings, page(DROPPED), 0, dropped) {
                shared.done.store(1, Ordering::Release);
                look_at_dropped(sys, shared);
            }
        }
        Test::Collapse => {
            // It may be refused, while others use a page or no block is free.
            let _ = sys.madvise(SUBJECT_GVA, HUGE_PAGE_SIZE, advice::COLLAPSE);
            for _ in 0..shared.passes {
                look_at_written(sys, shared);
            }
        }
        Test::Fork => {
            let passes = shared.passes;
            let child = sys.fork(move |sys| constant(sys, passes));
            write(sys, findings, WRITTEN, 1);
            shared.done.store(1, Ordering::Release);
            match child {
                Ok(pid) => findings.reap(sys, pid),
                Err(errno) => {
                    must(sys, findings, 0, 0, Err(errno));
                }
            }
        }
    }
}

fn other<S: Sys>(sys: &S, shared: &Shared, _: usize) {
    let findings = &shared.findings;
    for number in [WRITTEN, DROPPED] {
        write(sys, findings, number, 0);
    }
    shared.ready.store(1, Ordering::Release);
    while shared.go.load(Ordering::Acquire) == 0 {
        sys.yield_now();
    }
    for nth in 1..=shared.passes {
        if shared.test == Test::Fork {
            look_at_forked(sys, shared);
            continue;
        }
        write(sys, findings, WRITTEN, nth);
        shared.last.store(nth, Ordering::Release);
        if shared.test == Test::Split {
            look_at_dropped(sys, shared);
            look_at_written(sys, shared);
        }
    }
}

/// Zero, once the call that dropped it has returned.
fn look_at_dropped<S: Sys>(sys: &S, shared: &Shared) {
    let findings = &shared.findings;
    let gone = shared.done.load(Ordering::Acquire) != 0;
    let old = value(DROPPED, 0);
    match sys.read(page(DROPPED)) {
        Ok(0) => {}
        Ok(found) if found == old && !gone => {}
        Ok(found) => findings.report(sys, ForeignFrame, page(DROPPED), 0, found),
        Err(_) => findings.report(sys, WrongPermission, page(DROPPED), 0, 0),
    }
}

/// What was stored last, or later.
fn look_at_written<S: Sys>(sys: &S, shared: &Shared) {
    let findings = &shared.findings;
    let last = shared.last.load(Ordering::Acquire);
    let expected = value(WRITTEN, last);
    match sys.read(page(WRITTEN)) {
        Ok(found) if (last..=shared.passes).any(|nth| found == value(WRITTEN, nth)) => {}
        Ok(found) => findings.report(sys, ChangedUnderneath, page(WRITTEN), expected, found),
        Err(_) => findings.report(sys, WrongPermission, page(WRITTEN), expected, 0),
    }
}

/// The old value, or once it was written the new one.
fn look_at_forked<S: Sys>(sys: &S, shared: &Shared) {
    let findings = &shared.findings;
    let done = shared.done.load(Ordering::Acquire) != 0;
    let [old, new] = [0, 1].map(|nth| value(WRITTEN, nth));
    match sys.read(page(WRITTEN)) {
        Ok(found) if found == new || found == old && !done => {}
        Ok(found) => findings.report(sys, ForeignFrame, page(WRITTEN), new, found),
        Err(_) => findings.report(sys, WrongPermission, page(WRITTEN), new, 0),
    }
}

/// In a child: what its page holds when it is first read must stay.
fn constant<S: Sys>(sys: &S, passes: u64) -> i32 {
    let findings = Findings::default();
    let old = value(WRITTEN, 0);
    for _ in 0..passes {
        match sys.read(page(WRITTEN)) {
            Ok(found) if found == old => {}
            Ok(found) => findings.report(sys, ChangedUnderneath, page(WRITTEN), old, found),
            Err(_) => findings.report(sys, WrongPermission, page(WRITTEN), old, 0),
        }
    }
    findings.status()
}

#[cfg(test)]
mod tests {
    use crate::broken::{Fault, assert_caught};
    use crate::native;
    use abi::channel::ReportKind::ForeignFrame;

    #[test]
    fn linux_is_clean() {
        for test in ["split", "collapse", "fork"] {
            for passes in [1, 50] {
                let args = format!("test={test}\0passes={passes}");
                let outcome = native::run("huge", &args, None).unwrap();
                assert_eq!(outcome.reports, [], "{args:?}");
                assert_eq!(outcome.status, 0);
            }
        }
    }

    #[test]
    fn a_call_without_an_effect_is_caught() {
        assert_caught(Fault::MadviseIgnored, "huge", "test=split", ForeignFrame);
    }
}
