//! `cow-fork`: threads of the parent write a region while another thread forks.
//!
//! Each writer owns one word of every page and writes ever new values to it; the forker owns slot 0
//! and writes it before each fork.
//!
//! # What is wrong
//! - *In the child*, which is alone in its memory: a word that changes between two reads, or after
//!   the child wrote it (`ChangedUnderneath`): the parent still writes through a stale writable
//!   translation into the frame that fork made shared. A word that no thread of the parent ever wrote
//!   there is a `ForeignFrame`.
//! - *In the parent*: a writer's word that is not what it wrote last (`ChangedUnderneath`): the write
//!   went to the shared frame after another thread's write fault had copied it, or the child's value
//!   came through. Slot 0 the same.
//! - An access that faults (`WrongPermission`), or a child that did not exit with 0 (`WrongResult`).
//!
//! # Why it is never a false alarm
//! Every word of the parent has one writer, and the region stays mapped: a thread reads what it wrote
//! last. The child has one thread and a private copy; fork copies each word as it was at one moment,
//! so any value that its writer ever wrote, or 0, may be there at first, and none may replace it.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use abi::channel::ReportKind::{ChangedUnderneath, ForeignFrame, WrongPermission, WrongResult};
use abi::layout::PAGE_SIZE;
use abi::syscall::{map, prot};

use super::{Data, Program, SUBJECT_GVA};
use crate::args::{Arg, Args};
use crate::sys::{ANONYMOUS, Sys, print_line};
use crate::tag::{MAX_PAGES, Region, Tag, address};
use crate::team::{Findings, MAX_MEMBERS, PATIENCE, Pace, must, natural_members, team, wait_until};

pub(super) const PROGRAM: Program = Program {
    name: "cow-fork",
    help: "threads write a region while another forks; parent and child check their private copies",
    args: &[
        Arg {
            name: "pages",
            default: "8",
            range: 1..=MAX_PAGES,
            help: "pages of the region",
        },
        Arg {
            name: "rounds",
            default: "20",
            range: 1..=1_000_000,
            help: "forks",
        },
        Arg {
            name: "writers",
            default: "auto",
            range: 1..=MAX_MEMBERS as u64,
            help: "threads that write (auto: one for each CPU but the first)",
        },
        Arg {
            name: "looks",
            default: "20",
            range: 2..=1_000_000,
            help: "times the child reads its copy",
        },
    ],
    data: Data::Ignored,
    has_setup: true,
};

struct Shared {
    pages: u64,
    writers: usize,
    pace: Pace,
    looks: u64,
    /// Passes over the region that each writer has made.
    passes: [AtomicU64; MAX_MEMBERS],
    stop: AtomicBool,
    findings: Findings,
}

pub(super) fn run<S: Sys>(sys: &S, args: &Args<'_>) -> i32 {
    let writers = args
        .auto("writers")
        .map_or_else(|| natural_members(sys), |n| n as usize);
    let shared = Shared {
        pages: args.number("pages"),
        writers,
        pace: Pace::of(sys, writers),
        looks: args.number("looks"),
        passes: Default::default(),
        stop: AtomicBool::new(false),
        findings: Findings::default(),
    };
    let bytes = shared.pages * PAGE_SIZE;
    let flags = ANONYMOUS | map::FIXED_NOREPLACE;
    let base = sys.mmap(SUBJECT_GVA, bytes, prot::READ | prot::WRITE, flags);
    if !must(sys, &shared.findings, SUBJECT_GVA, SUBJECT_GVA, base) {
        return shared.findings.status();
    }
    let rounds = args.number("rounds");
    let result = team(sys, &shared, writers, writer, || {
        forker(sys, &shared, rounds);
        shared.stop.store(true, Ordering::Release);
    });
    must(sys, &shared.findings, 0, 0, result.map(|()| 0));
    sys.end();
    must(
        sys,
        &shared.findings,
        SUBJECT_GVA,
        0,
        sys.munmap(SUBJECT_GVA, bytes),
    );
    let pages = shared.pages;
    print_line(
        sys,
        format_args!("cow-fork: {rounds} forks, {pages} pages, {writers} writers"),
    );
    shared.findings.status()
}

/// Reads the word of `tag`, which must hold `expected`.
fn check<S: Sys>(sys: &S, findings: &Findings, tag: Tag, expected: u64) {
    let gva = address(SUBJECT_GVA, tag.page, tag.slot);
    match sys.read(gva) {
        Ok(found) if found == expected => {}
        Ok(found) => findings.report(sys, ChangedUnderneath, gva, expected, found),
        Err(_) => findings.report(sys, WrongPermission, gva, expected, 0),
    }
}

fn put<S: Sys>(sys: &S, findings: &Findings, tag: Tag) {
    let gva = address(SUBJECT_GVA, tag.page, tag.slot);
    if sys.write(gva, tag.encode()).is_err() {
        findings.report(sys, WrongPermission, gva, tag.encode(), 0);
    }
}

fn writer<S: Sys>(sys: &S, shared: &Shared, index: usize) {
    let findings = &shared.findings;
    let slot = 1 + index as u64;
    let mut pass = 0;
    while !shared.stop.load(Ordering::Acquire) && !findings.enough() {
        for page in 0..shared.pages {
            let tag = Tag {
                region: Region::Subject,
                generation: pass,
                page,
                slot,
            };
            let expected = if pass == 0 { 0 } else { tag.before().encode() };
            check(sys, findings, tag, expected);
            put(sys, findings, tag);
        }
        pass += 1;
        shared.passes[index].store(pass, Ordering::Release);
        shared.pace.pass(sys, pass);
    }
}

fn forker<S: Sys>(sys: &S, shared: &Shared, rounds: u64) {
    let findings = &shared.findings;
    sys.begin();
    for round in 0..rounds {
        let tags = || {
            (0..shared.pages).map(move |page| Tag {
                region: Region::Subject,
                generation: round,
                page,
                slot: 0,
            })
        };
        tags().for_each(|tag| put(sys, findings, tag));
        wait_for_a_pass(sys, shared);
        match sys.fork(|sys| child(sys, shared, round)) {
            Ok(pid) => {
                // While the child looks, this thread's copies must break too.
                tags().for_each(|tag| check(sys, findings, tag, tag.encode()));
                findings.reap(sys, pid);
            }
            Err(errno) => findings.report(sys, WrongResult, 0, 0, abi::syscall::encode(Err(errno))),
        }
        tags().for_each(|tag| check(sys, findings, tag, tag.encode()));
        if findings.enough() {
            return;
        }
    }
}

/// Lets every writer get writable translations to the whole region again.
fn wait_for_a_pass<S: Sys>(sys: &S, shared: &Shared) {
    for passes in &shared.passes[..shared.writers] {
        let start = passes.load(Ordering::Acquire);
        wait_until(sys, shared.pace, PATIENCE, || {
            passes.load(Ordering::Acquire) >= start + 2
        });
    }
}

fn child<S: Sys>(sys: &S, shared: &Shared, round: u64) -> i32 {
    // The parent's count came along as a copy.
    let findings = Findings::default();
    must(
        sys,
        &findings,
        0,
        0,
        sys.set_affinity(round as usize % sys.nr_cpus()).map(|()| 0),
    );
    let tags = |region| {
        (0..shared.pages).flat_map(move |page| {
            (0..=shared.writers as u64).map(move |slot| Tag {
                region,
                generation: round,
                page,
                slot,
            })
        })
    };
    for tag in tags(Region::Subject) {
        constant(sys, shared, &findings, tag);
    }
    tags(Region::Child).for_each(|tag| put(sys, &findings, tag));
    for look in 0..shared.looks {
        tags(Region::Child).for_each(|tag| check(sys, &findings, tag, tag.encode()));
        if look % 8 == 0 {
            sys.yield_now();
        }
    }
    findings.status()
}

/// What the word of `tag` held when it was first read must stay.
fn constant<S: Sys>(sys: &S, shared: &Shared, findings: &Findings, tag: Tag) {
    let gva = address(SUBJECT_GVA, tag.page, tag.slot);
    let Ok(first) = sys.read(gva) else {
        return findings.report(sys, WrongPermission, gva, tag.encode(), 0);
    };
    if first != 0 && tag.generation_of(first).is_none() {
        findings.report(sys, ForeignFrame, gva, tag.encode(), first);
    }
    for _ in 0..shared.looks {
        sys.relax();
        check(sys, findings, tag, first);
    }
}

#[cfg(test)]
mod tests {
    use crate::broken::{Fault, assert_caught};
    use crate::native;
    use abi::channel::ReportKind::ChangedUnderneath;

    #[test]
    fn linux_is_clean() {
        for args in [
            "rounds=60",
            "rounds=30\0writers=4\0pages=3\0looks=100",
            "rounds=3\0pages=600",
        ] {
            let outcome = native::run("cow-fork", args, None).unwrap();
            assert_eq!(outcome.reports, [], "{args:?}");
            assert_eq!(outcome.status, 0);
        }
    }

    #[test]
    fn a_fork_that_shares_memory_is_caught() {
        assert_caught(
            Fault::PrivateIsShared,
            "cow-fork",
            "rounds=20",
            ChangedUnderneath,
        );
    }
}
