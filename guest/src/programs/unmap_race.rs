//! `unmap-race`: one thread unmaps and remaps a range while others read and write it.
//!
//! The owner, on CPU 0, repeats: map the range A, stamp slot 0 of each page with the generation, let
//! the readers warm their TLBs, munmap A, map B, twice as large so that it takes the frames that A
//! gave back, stamp all of B, look at B for a while, munmap B. The readers, on the other CPUs, read
//! slot 0 of every page of A all the time, and write and read back a slot of their own.
//!
//! # What is wrong
//! The era is a counter that the owner alone changes: odd, `2g + 1`, from the return of the mmap of
//! generation `g` on; even, `2g + 2`, from the return of its munmap on.
//! - *Slot 0.* A reader loads the era (`before`), reads, and loads it again (`after`). A value of
//!   generation `g` is legal only if `before <= 2g + 1 <= after`; 0 and a fault always are. Anything
//!   else is another owner's data, or a frame that A no longer has.
//! - *A reader's own slot*, which nobody else writes in A, holds the last value that it wrote there or,
//!   in a newer mapping, 0. Once an access to the page has faulted or read 0 the last value is gone
//!   for good.
//! - *B* belongs to the owner alone: fresh words are 0, stamped words stay. A reader's write through
//!   a stale translation shows here.
//!
//! Each is a `ForeignFrame`.
//!
//! # Why it is never a false alarm
//! *`before <= 2g + 1`.* If `before > 2g + 1`, the munmap of generation `g` had returned before the
//! owner stored `before` (program order), and the reader's read comes after its load of `before`
//! (acquire). A munmap that has returned leaves no CPU with a translation: the read cannot hit the
//! frames of `g`, and a frame that reaches A again is zeroed first. *`2g + 1 <= after`.* The owner
//! stored era `2g + 1` before it wrote any value of `g`. x86 keeps stores in order and loads in order
//! (SDM vol. 3A, 9.2.2), so a reader that saw the value sees at least that era in its next load; the
//! access routines are calls that the compiler cannot see through, so it reorders nothing either.
//! *Zero*: between mmap and the stamp the page is fresh; nobody but the owner stamps slot 0.
//! *Own slot*: one writer, so a read returns the last write to the same frame, or 0 of a newer frame;
//! between the two the frame of the last write may be gone, which a fault or a 0 shows, and it never
//! comes back unzeroed; readers are pinned, so no other CPU's translations come into play.
//! *B*: its address is unknown to the readers.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use abi::channel::ReportKind::{ForeignFrame, WrongPermission};
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
    name: "unmap-race",
    help: "one thread unmaps and remaps a range while others read and write it; every value is checked",
    args: &[
        Arg {
            name: "pages",
            default: "8",
            range: 1..=PAGES as u64,
            help: "pages of the range",
        },
        Arg {
            name: "rounds",
            default: "50",
            range: 1..=1_000_000,
            help: "times it is unmapped",
        },
        Arg {
            name: "readers",
            default: "auto",
            range: 1..=MAX_MEMBERS as u64,
            help: "threads that access it (auto: one for each CPU but the first)",
        },
        Arg {
            name: "linger",
            default: "100",
            range: 1..=1_000_000,
            help: "times the owner looks at the memory that reuses the frames before it frees them",
        },
    ],
    data: Data::Ignored,
    has_setup: true,
};

/// Most pages of A; B is twice as large.
const PAGES: usize = MAX_PAGES as usize / 2;

struct Shared {
    pages: u64,
    readers: usize,
    pace: Pace,
    /// The module's comment says what it means. Starts even: nothing is mapped yet.
    era: AtomicU64,
    /// Era in which reader `i` began its last whole pass over the range.
    seen: [AtomicU64; MAX_MEMBERS],
    stop: AtomicBool,
    findings: Findings,
}

pub(super) fn run<S: Sys>(sys: &S, args: &Args<'_>) -> i32 {
    let readers = args
        .auto("readers")
        .map_or_else(|| natural_members(sys), |n| n as usize);
    let shared = Shared {
        pages: args.number("pages"),
        readers,
        pace: Pace::of(sys, readers),
        era: AtomicU64::new(0),
        seen: Default::default(),
        stop: AtomicBool::new(false),
        findings: Findings::default(),
    };
    let rounds = args.number("rounds");
    let result = team(sys, &shared, readers, reader, || {
        owner(sys, &shared, rounds, args.number("linger"));
        shared.stop.store(true, Ordering::Release);
    });
    must(sys, &shared.findings, 0, 0, result.map(|()| 0));
    sys.end();
    let pages = shared.pages;
    print_line(
        sys,
        format_args!("unmap-race: {rounds} rounds, {pages} pages, {readers} readers"),
    );
    shared.findings.status()
}

fn owner<S: Sys>(sys: &S, shared: &Shared, rounds: u64, linger: u64) {
    let findings = &shared.findings;
    sys.begin();
    let bytes = shared.pages * PAGE_SIZE;
    for generation in 0..rounds {
        let fixed = if generation == 0 {
            map::FIXED_NOREPLACE
        } else {
            map::FIXED
        };
        let base = sys.mmap(
            SUBJECT_GVA,
            bytes,
            prot::READ | prot::WRITE,
            ANONYMOUS | fixed,
        );
        if !must(sys, findings, SUBJECT_GVA, SUBJECT_GVA, base) {
            return;
        }
        let mapped = 2 * generation + 1;
        shared.era.store(mapped, Ordering::Release);
        for page in 0..shared.pages {
            stamp(sys, findings, SUBJECT_GVA, stamp_of(generation, page));
        }
        // Without this the munmap could come before any reader has a translation. Not needed for
        // correctness, so bounded.
        wait_until(sys, shared.pace, PATIENCE, || {
            shared.seen[..shared.readers]
                .iter()
                .all(|seen| seen.load(Ordering::Acquire) == mapped)
        });
        must(
            sys,
            findings,
            SUBJECT_GVA,
            0,
            sys.munmap(SUBJECT_GVA, bytes),
        );
        shared.era.store(mapped + 1, Ordering::Release);
        reuse(sys, shared, generation, linger);
        if findings.enough() {
            return;
        }
    }
}

fn stamp_of(generation: u64, page: u64) -> Tag {
    Tag {
        region: Region::Subject,
        generation,
        page,
        slot: 0,
    }
}

fn stamp<S: Sys>(sys: &S, findings: &Findings, base: u64, tag: Tag) {
    let gva = address(base, tag.page, tag.slot);
    if sys.write(gva, tag.encode()).is_err() {
        findings.report(sys, WrongPermission, gva, tag.encode(), 0);
    }
}

/// Maps B over the frames that A gave back, and holds it.
fn reuse<S: Sys>(sys: &S, shared: &Shared, generation: u64, linger: u64) {
    let findings = &shared.findings;
    let pages = 2 * shared.pages;
    let base = match sys.mmap_anonymous(pages * PAGE_SIZE) {
        Ok(base) => base,
        Err(errno) => {
            must(sys, findings, 0, 0, Err(errno));
            return;
        }
    };
    let tags = || {
        (0..pages).flat_map(|page| {
            (0..=shared.readers as u64).map(move |slot| Tag {
                region: Region::Reuse,
                generation,
                page,
                slot,
            })
        })
    };
    let check = |tag: Tag, expected: u64| {
        let gva = address(base, tag.page, tag.slot);
        match sys.read(gva) {
            Ok(found) if found == expected => {}
            Ok(found) => findings.report(sys, ForeignFrame, gva, expected, found),
            Err(_) => findings.report(sys, WrongPermission, gva, expected, 0),
        }
    };
    // First touch by a read in every other round, by a write in the rest.
    if generation.is_multiple_of(2) {
        tags().for_each(|tag| check(tag, 0));
    }
    tags().for_each(|tag| stamp(sys, findings, base, tag));
    for _ in 0..linger {
        tags().for_each(|tag| check(tag, tag.encode()));
        if findings.enough() {
            break;
        }
    }
    must(sys, findings, base, 0, sys.munmap(base, pages * PAGE_SIZE));
}

fn reader<S: Sys>(sys: &S, shared: &Shared, index: usize) {
    let mut own = OwnSlot {
        slot: 1 + index as u64,
        sequence: 0,
        last: [0; PAGES],
    };
    let mut passes = 0u64;
    while !shared.stop.load(Ordering::Acquire) && !shared.findings.enough() {
        let era = shared.era.load(Ordering::Acquire);
        let mut faulted = false;
        for page in 0..shared.pages {
            faulted |= !check_stamp(sys, shared, page);
            faulted |= !own.check_and_write(sys, shared, page);
        }
        shared.seen[index].store(era, Ordering::Release);
        passes += 1;
        shared.pace.pass(sys, passes);
        if faulted {
            // Every further access would fault too and only hold up the owner in the kernel.
            wait_until(sys, shared.pace, BACK_OFF, || {
                shared.stop.load(Ordering::Acquire) || shared.era.load(Ordering::Acquire) != era
            });
        }
    }
}

/// Reads slot 0 of `page`. False for a fault.
fn check_stamp<S: Sys>(sys: &S, shared: &Shared, page: u64) -> bool {
    let gva = address(SUBJECT_GVA, page, 0);
    let before = shared.era.load(Ordering::Acquire);
    let Ok(found) = sys.read(gva) else {
        return false;
    };
    let after = shared.era.load(Ordering::Acquire);
    // The generation of an even era is the one that is about to come.
    let expected = stamp_of(before / 2, page);
    let legal = found == 0
        || expected
            .generation_of(found)
            .is_some_and(|generation| (before..=after).contains(&(2 * generation + 1)));
    if !legal {
        shared
            .findings
            .report(sys, ForeignFrame, gva, expected.encode(), found);
    }
    true
}

/// The words that only one reader writes.
struct OwnSlot {
    slot: u64,
    sequence: u64,
    /// What each page's word must hold unless it is 0.
    last: [u64; PAGES],
}

impl OwnSlot {
    /// Reads and rewrites the own word of `page`. False for a fault.
    fn check_and_write<S: Sys>(&mut self, sys: &S, shared: &Shared, page: u64) -> bool {
        let gva = address(SUBJECT_GVA, page, self.slot);
        let last = &mut self.last[page as usize];
        match sys.read(gva) {
            Ok(0) => *last = 0,
            Ok(found) if found == *last => {}
            Ok(found) => shared.findings.report(sys, ForeignFrame, gva, *last, found),
            Err(_) => {
                *last = 0;
                return false;
            }
        }
        self.sequence += 1;
        let tag = Tag {
            region: Region::Subject,
            generation: self.sequence,
            page,
            slot: self.slot,
        };
        let written = sys.write(gva, tag.encode()).is_ok();
        *last = if written { tag.encode() } else { 0 };
        written
    }
}

#[cfg(test)]
mod tests {
    use crate::broken::{Fault, assert_caught};
    use crate::native;
    use abi::channel::ReportKind::ForeignFrame;

    #[test]
    fn linux_is_clean() {
        for args in [
            "rounds=150",
            "rounds=40\0readers=4\0pages=3\0linger=5",
            "rounds=20\0pages=512",
        ] {
            let outcome = native::run("unmap-race", args, None).unwrap();
            assert_eq!(outcome.reports, [], "{args:?}");
            assert_eq!(outcome.status, 0);
        }
    }

    #[test]
    fn a_munmap_that_does_not_unmap_is_caught() {
        assert_caught(
            Fault::MunmapIgnored,
            "unmap-race",
            "rounds=50",
            ForeignFrame,
        );
    }

    #[test]
    fn stale_writes_into_reused_frames_are_caught() {
        assert_caught(
            Fault::ReuseAliasesSubject,
            "unmap-race",
            "rounds=50",
            ForeignFrame,
        );
    }
}
