//! `mprotect-race`: one thread makes a range read-only and writable again while others write it.
//!
//! # What is wrong
//! The phase is a counter that the owner alone changes; modulo 4 it means: 0, writable (the mprotect
//! that made it so has returned); 1, being made read-only; 2, read-only (that mprotect has returned);
//! 3, being made writable. A writer loads the phase before and after each write:
//! - the same read-only phase, and the write went through: `WrongPermission`;
//! - the same writable phase, and the write faulted: `WrongPermission`;
//! - its own word, which nobody else writes, is not what it wrote last: `ChangedUnderneath`.
//!
//! While the range is read-only the owner reads every word again and again: one that changes is
//! `ChangedUnderneath`; one that no writer ever put there is a `ForeignFrame`.
//!
//! # Why it is never a false alarm
//! The phase is stored read-only after mprotect has returned, and left before the next one is called,
//! so between two loads of one read-only phase no translation permits a write. The write lies between
//! the loads: x86 does not move a store before an older load, and the fence keeps the second load
//! from being satisfied before the store has been performed (SDM vol. 3A, 9.2.2). Writable
//! phases likewise; a fault is precise. A store that went through before the range became read-only is
//! visible to the owner: mprotect returns after the writer's CPU has acknowledged the flush, by a
//! store that is younger than the writer's.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use abi::channel::ReportKind::{ChangedUnderneath, ForeignFrame, WrongPermission};
use abi::layout::PAGE_SIZE;
use abi::syscall::{map, prot};

use super::{Data, Program, SUBJECT_GVA};
use crate::args::{Arg, Args};
use crate::sys::{ANONYMOUS, Sys, print_line};
use crate::tag::{MAX_PAGES, Region, Tag, address};
use crate::team::{
    BACK_OFF, Findings, MAX_MEMBERS, PATIENCE, Pace, must, natural_members, team, wait_until,
};

pub(super) const PROGRAM: Program = Program {
    name: "mprotect-race",
    help: "one thread makes a range read-only and writable again while others write it",
    args: &[
        Arg {
            name: "pages",
            default: "8",
            range: 1..=PAGES as u64,
            help: "pages of the range",
        },
        Arg {
            name: "rounds",
            default: "100",
            range: 1..=1_000_000,
            help: "read-only phases",
        },
        Arg {
            name: "writers",
            default: "auto",
            range: 1..=MAX_MEMBERS as u64,
            help: "threads that write (auto: one for each CPU but the first)",
        },
        Arg {
            name: "looks",
            default: "50",
            range: 2..=1_000_000,
            help: "times the owner reads the range in each read-only phase",
        },
    ],
    data: Data::Ignored,
    has_setup: true,
};

/// Most pages of the range.
const PAGES: usize = 256;
const _: () = assert!(PAGES as u64 <= MAX_PAGES);

const WRITABLE: u64 = 0;
const READ_ONLY: u64 = 2;

struct Shared {
    pages: u64,
    writers: usize,
    pace: Pace,
    phase: AtomicU64,
    /// Phase in which writer `i` began its last whole pass.
    seen: [AtomicU64; MAX_MEMBERS],
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
        phase: AtomicU64::new(WRITABLE),
        seen: Default::default(),
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
        owner(sys, &shared, rounds, args.number("looks"));
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
        format_args!("mprotect-race: {rounds} rounds, {pages} pages, {writers} writers"),
    );
    shared.findings.status()
}

fn owner<S: Sys>(sys: &S, shared: &Shared, rounds: u64, looks: u64) {
    let findings = &shared.findings;
    sys.begin();
    let bytes = shared.pages * PAGE_SIZE;
    let enter = |phase| shared.phase.store(phase, Ordering::SeqCst);
    for round in 0..rounds {
        wait_for_writers(sys, shared);
        enter(4 * round + 1);
        must(
            sys,
            findings,
            SUBJECT_GVA,
            0,
            sys.mprotect(SUBJECT_GVA, bytes, prot::READ),
        );
        enter(4 * round + READ_ONLY);
        watch(sys, shared, looks);
        wait_for_writers(sys, shared);
        enter(4 * round + 3);
        let writable = prot::READ | prot::WRITE;
        must(
            sys,
            findings,
            SUBJECT_GVA,
            0,
            sys.mprotect(SUBJECT_GVA, bytes, writable),
        );
        enter(4 * (round + 1) + WRITABLE);
        if findings.enough() {
            return;
        }
    }
}

/// Lets every writer try its luck in this phase, if it gets to run at all.
fn wait_for_writers<S: Sys>(sys: &S, shared: &Shared) {
    let phase = shared.phase.load(Ordering::Relaxed);
    wait_until(sys, shared.pace, PATIENCE, || {
        shared.seen[..shared.writers]
            .iter()
            .all(|seen| seen.load(Ordering::Acquire) == phase)
    });
}

/// Reads the whole range `looks` times; nothing may change.
fn watch<S: Sys>(sys: &S, shared: &Shared, looks: u64) {
    let findings = &shared.findings;
    for page in 0..shared.pages {
        for slot in 1..=shared.writers as u64 {
            let tag = Tag {
                region: Region::Subject,
                generation: 0,
                page,
                slot,
            };
            let gva = address(SUBJECT_GVA, page, slot);
            let Ok(first) = sys.read(gva) else {
                findings.report(sys, WrongPermission, gva, 0, 0);
                continue;
            };
            if first != 0 && tag.generation_of(first).is_none() {
                findings.report(sys, ForeignFrame, gva, 0, first);
            }
            for _ in 1..looks {
                match sys.read(gva) {
                    Ok(found) if found == first => {}
                    Ok(found) => findings.report(sys, ChangedUnderneath, gva, first, found),
                    Err(_) => findings.report(sys, WrongPermission, gva, first, 0),
                }
            }
        }
    }
}

fn writer<S: Sys>(sys: &S, shared: &Shared, index: usize) {
    let findings = &shared.findings;
    let slot = 1 + index as u64;
    let mut last = [0; PAGES];
    let mut sequence = 0u64;
    while !shared.stop.load(Ordering::Acquire) && !findings.enough() {
        let phase = shared.phase.load(Ordering::Acquire);
        let mut faulted = false;
        for page in 0..shared.pages {
            let tag = Tag {
                region: Region::Subject,
                generation: sequence,
                page,
                slot,
            };
            faulted |= !check_and_write(sys, shared, tag, &mut last[page as usize]);
        }
        sequence += 1;
        shared.seen[index].store(phase, Ordering::Release);
        shared.pace.pass(sys, sequence);
        if faulted {
            // Every further write of this phase would fault too and hold up the owner.
            wait_until(sys, shared.pace, BACK_OFF, || {
                shared.stop.load(Ordering::Acquire) || shared.phase.load(Ordering::Acquire) != phase
            });
        }
    }
}

/// Reads the word of `tag`, which must hold `last`, and writes it. False for a refused write.
fn check_and_write<S: Sys>(sys: &S, shared: &Shared, tag: Tag, last: &mut u64) -> bool {
    let findings = &shared.findings;
    let gva = address(SUBJECT_GVA, tag.page, tag.slot);
    match sys.read(gva) {
        Ok(found) if found == *last => {}
        Ok(found) => findings.report(sys, ChangedUnderneath, gva, *last, found),
        Err(_) => findings.report(sys, WrongPermission, gva, *last, 0),
    }
    let before = shared.phase.load(Ordering::SeqCst);
    let written = sys.write(gva, tag.encode()).is_ok();
    fence(Ordering::SeqCst);
    let after = shared.phase.load(Ordering::SeqCst);
    let wrong = if written { READ_ONLY } else { WRITABLE };
    if before == after && before % 4 == wrong {
        findings.report(sys, WrongPermission, gva, *last, tag.encode());
    }
    if written {
        *last = tag.encode();
    }
    written
}

#[cfg(test)]
mod tests {
    use crate::broken::{Fault, assert_caught};
    use crate::native;
    use abi::channel::ReportKind::WrongPermission;

    #[test]
    fn linux_is_clean() {
        for args in [
            "rounds=100",
            "rounds=20\0writers=4\0pages=3\0looks=5",
            "rounds=5\0pages=256\0looks=5",
        ] {
            let outcome = native::run("mprotect-race", args, None).unwrap();
            assert_eq!(outcome.reports, [], "{args:?}");
            assert_eq!(outcome.status, 0);
        }
    }

    #[test]
    fn an_mprotect_that_does_nothing_is_caught() {
        assert_caught(
            Fault::MprotectIgnored,
            "mprotect-race",
            "rounds=50",
            WrongPermission,
        );
    }
}
