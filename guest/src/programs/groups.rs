//! `groups`: memory groups, their limits and their counters. Where there are none (ENOSYS) there is nothing to check.
//!
//! | test | what happens | wrong is |
//! |---|---|---|
//! | `tour` | the process moves to a group and fills memory; a child goes beyond the group's limit; the process moves to another group with its memory | a page that holds what nobody wrote; a counter that is not what was done |
//! | `touch` | two threads touch the same pages first | a group that does not count as many pages less when they are given back |
//! | `move` | the process moves to another group while the other thread gives pages back | the same of both groups together |
//!
//! What a counter must be to the page only the host knows, which recounts them: besides the pages here the process has
//! its own, and page tables.

use core::sync::atomic::{AtomicU64, Ordering};

use abi::channel::ReportKind::{ForeignFrame, WrongPermission, WrongResult};
use abi::layout::PAGE_SIZE;
use abi::objects::{MemGroup, group_stat};
use abi::syscall::{Errno, advice, encode, group, prot, signal, wait};

use super::{Data, Program, SUBJECT_GVA};
use crate::args::{Arg, Args};
use crate::sys::{ANONYMOUS, Sys, print_line};
use crate::tag::{Region, Tag, address};
use crate::team::{Findings, must, team};

pub(super) const PROGRAM: Program = Program {
    name: "groups",
    help: "memory groups: charges, limits, moves, and what the counters say of them",
    args: &[
        Arg {
            name: "test",
            default: "tour|touch|move",
            range: 0..=2,
            help: "a tour of all calls, or a race of a few steps for exploration",
        },
        Arg {
            name: "pages",
            default: "8",
            range: 1..=64,
            help: "pages that are touched (in races one of them by both threads)",
        },
    ],
    data: Data::Ignored,
    has_setup: true,
};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Test {
    Tour,
    Touch,
    Move,
}

const TESTS: [Test; 3] = [Test::Tour, Test::Touch, Test::Move];
const NO_LIMIT: u64 = MemGroup::NO_LIMIT;
/// Pages that the child may have more, and those that it touches.
const ROOM: u64 = 40;
const TOUCHED: u64 = 400;

/// Groups: one above two others.
#[derive(Clone, Copy)]
struct Groups {
    above: u64,
    first: u64,
    second: u64,
}

fn value(page: u64) -> u64 {
    let tag = Tag {
        region: Region::Subject,
        generation: 1,
        page,
        slot: 0,
    };
    tag.encode()
}

fn gva(page: u64) -> u64 {
    address(SUBJECT_GVA, page, 0)
}

pub(super) fn run<S: Sys>(sys: &S, args: &Args<'_>) -> i32 {
    let findings = &Findings::default();
    let pages = args.number("pages");
    let groups = match create(sys) {
        Ok(groups) => groups,
        Err(Errno::ENOSYS) => {
            print_line(sys, format_args!("groups: there are none here"));
            return findings.status();
        }
        Err(errno) => {
            must(sys, findings, 0, 1, Err(errno));
            return findings.status();
        }
    };
    let (rights, bytes) = (prot::READ | prot::WRITE, TOUCHED * PAGE_SIZE);
    let mapped = sys.mmap(SUBJECT_GVA, bytes, rights, ANONYMOUS);
    must(sys, findings, SUBJECT_GVA, SUBJECT_GVA, mapped);
    match TESTS[args.number("test") as usize] {
        Test::Tour => tour(sys, findings, groups, pages),
        test => race(sys, findings, groups, (test, pages)),
    }
    let _ = sys.munmap(SUBJECT_GVA, bytes);
    print_line(sys, format_args!("groups: over"));
    findings.status()
}

fn create<S: Sys>(sys: &S) -> Result<Groups, Errno> {
    let above = sys.group_create(0, NO_LIMIT)?;
    Ok(Groups {
        above,
        first: sys.group_create(above, NO_LIMIT)?,
        second: sys.group_create(above, NO_LIMIT)?,
    })
}

fn anon<S: Sys>(sys: &S, findings: &Findings, number: u64) -> u64 {
    stat(
        sys,
        findings,
        number,
        group::STATS + group_stat::ANON as u64,
    )
}

fn stat<S: Sys>(sys: &S, findings: &Findings, number: u64, what: u64) -> u64 {
    sys.group_stat(number, what).unwrap_or_else(|errno| {
        must(sys, findings, 0, 0, Err(errno));
        0
    })
}

/// What one counter says must be so much at least.
fn at_least<S: Sys>(sys: &S, findings: &Findings, expected: u64, found: u64) {
    if found < expected {
        findings.report(sys, WrongResult, 0, expected, found);
    }
}

fn write<S: Sys>(sys: &S, findings: &Findings, page: u64) {
    if sys.write(gva(page), value(page)).is_err() {
        findings.report(sys, WrongPermission, gva(page), value(page), 0);
    }
}

/// The first `pages` hold what was written.
fn look<S: Sys>(sys: &S, findings: &Findings, pages: u64) {
    for page in 0..pages {
        match sys.read(gva(page)) {
            Ok(found) if found == value(page) => {}
            Ok(found) => findings.report(sys, ForeignFrame, gva(page), value(page), found),
            Err(_) => findings.report(sys, WrongPermission, gva(page), value(page), 0),
        }
    }
}

fn tour<S: Sys>(sys: &S, findings: &Findings, groups: Groups, pages: u64) {
    sys.begin();
    let Groups {
        above,
        first,
        second,
    } = groups;
    refusals(sys, findings, first);
    must(sys, findings, 0, 0, sys.group_move(first, 0));
    must(sys, findings, 0, first, sys.group_stat(0, group::CURRENT));
    let before = anon(sys, findings, first);
    for page in 0..pages {
        write(sys, findings, page);
    }
    at_least(sys, findings, before + pages, anon(sys, findings, first));
    child_beyond_limit(sys, findings, first, pages);
    look(sys, findings, pages);
    // Nobody else is in a group, and no process is in the one above.
    let moved = sys.group_move(second, group::RECHARGE);
    at_least(sys, findings, pages, moved.unwrap_or(0));
    at_least(sys, findings, pages, anon(sys, findings, second));
    let sum = anon(sys, findings, first) + anon(sys, findings, second);
    must(sys, findings, 0, sum, Ok(anon(sys, findings, above)));
    // Out of all groups: what is given back is counted off where it was.
    let held = anon(sys, findings, second);
    must(sys, findings, 0, 0, sys.group_move(0, 0));
    let dropped = sys.madvise(SUBJECT_GVA, pages * PAGE_SIZE, advice::DONTNEED);
    must(sys, findings, SUBJECT_GVA, 0, dropped);
    must(
        sys,
        findings,
        0,
        held - pages.min(held),
        Ok(anon(sys, findings, second)),
    );
    sys.end();
}

/// What no group can be.
fn refusals<S: Sys>(sys: &S, findings: &Findings, known: u64) {
    let refused = encode(Err(Errno::EINVAL));
    for result in [
        sys.group_create(u64::MAX, 1),
        sys.group_set_max(u64::MAX, 1),
        sys.group_set_max(0, 1),
        sys.group_move(u64::MAX, 0),
        sys.group_move(known, 8),
        sys.group_stat(known, u64::MAX),
    ] {
        let result = result.or_else(|errno| Ok(encode(Err(errno))));
        must(sys, findings, 0, refused, result);
    }
}

/// A child lowers the group's limit and touches more than that: its memory goes to the swap area, or it is killed.
fn child_beyond_limit<S: Sys>(sys: &S, findings: &Findings, number: u64, pages: u64) {
    let child = sys.fork(move |sys| {
        let findings = &Findings::default();
        let usage = stat(sys, findings, number, group::USAGE);
        must(sys, findings, 0, 0, sys.group_set_max(number, usage + ROOM));
        for page in pages..TOUCHED {
            write(sys, findings, page);
        }
        look(sys, findings, TOUCHED);
        findings.status()
    });
    let Ok(pid) = child else {
        must(sys, findings, 0, 0, child);
        return;
    };
    let killed = wait::signaled(signal::SIGKILL);
    match sys.wait(pid) {
        Ok(status) if status.0 == 0 || status.0 == killed => {}
        Ok(status) => findings.report(sys, WrongResult, 0, 0, status.0.into()),
        Err(errno) => {
            must(sys, findings, 0, 0, Err(errno));
        }
    }
    at_least(
        sys,
        findings,
        1,
        stat(sys, findings, number, group::FAILURES),
    );
    let max = stat(sys, findings, number, group::MAX);
    for what in [group::USAGE, group::WATERMARK] {
        at_least(sys, findings, stat(sys, findings, number, what), max);
    }
    must(sys, findings, 0, 0, sys.group_set_max(number, NO_LIMIT));
}

struct Shared {
    test: Test,
    pages: u64,
    /// The group to move to.
    to: u64,
    /// The other thread is where it belongs.
    ready: AtomicU64,
    /// The race may begin.
    go: AtomicU64,
    findings: Findings,
}

fn race<S: Sys>(sys: &S, findings: &Findings, groups: Groups, (test, pages): (Test, u64)) {
    let shared = Shared {
        test,
        pages,
        to: groups.second,
        ready: AtomicU64::new(0),
        go: AtomicU64::new(0),
        findings: Findings::default(),
    };
    must(sys, findings, 0, 0, sys.set_affinity(0).map(|()| 0));
    must(sys, findings, 0, 0, sys.group_move(groups.first, 0));
    // The tables are there already; in `move` the pages too.
    write(sys, findings, pages);
    if test == Test::Move {
        (0..pages).for_each(|page| write(sys, findings, page));
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
    let before = anon(sys, findings, groups.above);
    let dropped = sys.madvise(SUBJECT_GVA, pages * PAGE_SIZE, advice::DONTNEED);
    must(sys, findings, SUBJECT_GVA, 0, dropped);
    let given_back = match test {
        Test::Touch => pages,
        Test::Tour | Test::Move => 0,
    };
    at_least(sys, findings, given_back, before);
    let after = anon(sys, findings, groups.above);
    must(sys, findings, 0, before - given_back.min(before), Ok(after));
    sys.end();
    if shared.findings.status() != 0 {
        findings.report(sys, WrongResult, 0, 0, 1);
    }
}

fn lead<S: Sys>(sys: &S, shared: &Shared) {
    let findings = &shared.findings;
    match shared.test {
        Test::Tour => {}
        Test::Touch => (0..shared.pages).for_each(|page| write(sys, findings, page)),
        Test::Move => {
            let moved = sys.group_move(shared.to, group::RECHARGE);
            if moved.is_err() {
                must(sys, findings, 0, 0, moved);
            }
            // Whatever has stayed behind is of the first group still.
            must(sys, findings, 0, 0, sys.group_move(0, 0));
            drop_pages(sys, shared);
        }
    }
}

fn other<S: Sys>(sys: &S, shared: &Shared, _: usize) {
    let findings = &shared.findings;
    shared.ready.store(1, Ordering::Release);
    while shared.go.load(Ordering::Acquire) == 0 {
        sys.yield_now();
    }
    match shared.test {
        Test::Tour => {}
        Test::Touch => (0..shared.pages).for_each(|page| write(sys, findings, page)),
        Test::Move => drop_pages(sys, shared),
    }
}

fn drop_pages<S: Sys>(sys: &S, shared: &Shared) {
    let bytes = shared.pages * PAGE_SIZE;
    let dropped = sys.madvise(SUBJECT_GVA, bytes, advice::DONTNEED);
    must(sys, &shared.findings, SUBJECT_GVA, 0, dropped);
}

#[cfg(test)]
mod tests {
    use crate::broken::{Fault, assert_caught};
    use crate::native;
    use abi::channel::ReportKind::WrongResult;
    use abi::syscall::{Errno, nr};

    #[test]
    fn linux_has_no_groups_of_ours() {
        for test in ["tour", "touch", "move"] {
            let outcome = native::run("groups", &format!("test={test}"), None).unwrap();
            assert_eq!((outcome.status, outcome.reports), (0, Vec::new()));
            assert!(outcome.text.contains("none here"), "{}", outcome.text);
        }
    }

    /// Counters that never change, and calls that fail.
    #[test]
    fn groups_that_count_nothing_are_caught() {
        for test in ["tour", "touch"] {
            let args = format!("test={test}");
            assert_caught(Fault::GroupsCountNothing, "groups", &args, WrongResult);
        }
        let failing = Fault::Fails(nr::TESTBED_GROUP_CREATE, Errno::ENOSPC);
        assert_caught(failing, "groups", "test=tour", WrongResult);
    }
}
