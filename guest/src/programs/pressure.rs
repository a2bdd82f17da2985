//! `pressure`: memory that goes out to the swap area and comes back. Each pass writes every page, has frames reclaimed,
//! and reads: what comes back must be what was written, in a forked child too, whose pages the parent's writes leave as
//! they were.
//!
//! With `hog=1` a child takes memory until there is none. It must be refused (ENOMEM) or killed (SIGKILL), and no page
//! of the parent may change by that; afterwards the parent has all of its memory again.
//!
//! A disk that fails or spoils data shows: a page that cannot be read in again, or holds something else, is `DiskData`
//! at its address. Where there is no swap area nothing is reclaimed, and memory must hold what it holds all the same.

use abi::channel::ReportKind::{DiskData, WrongResult};
use abi::layout::PAGE_SIZE;
use abi::syscall::{Errno, encode, map, prot, signal};

use super::{Data, Program, SUBJECT_GVA};
use crate::args::{Arg, Args};
use crate::sys::{ANONYMOUS, Sys, print_line};
use crate::tag::{Region, SLOTS, Tag, address};
use crate::team::{Findings, must};

pub(super) const PROGRAM: Program = Program {
    name: "pressure",
    help: "pages that are swapped out must come back as they were, whatever becomes of memory",
    args: &[
        Arg {
            name: "pages",
            default: "32",
            range: 1..=MOST_PAGES,
            help: "pages of the process",
        },
        Arg {
            name: "passes",
            default: "2",
            range: 1..=1000,
            help: "times that they are written, reclaimed and read",
        },
        Arg {
            name: "hog",
            default: "0",
            range: 0..=1,
            help: "1: a child takes all memory that there is, and is killed",
        },
    ],
    data: Data::Ignored,
    has_setup: false,
};

const MOST_PAGES: u64 = 2048;
/// Words of a page that are written: the first and the last one that has a tag.
const WRITTEN: [u64; 2] = [0, SLOTS - 1];
/// What the hog maps at a time, and how often at most: more than any guest has.
const BITE: u64 = 1 << 20;
const BITES: u64 = 4096;
/// How the hog exits that was refused.
const REFUSED: i32 = 3;

/// The region as one process knows it.
struct Pages<'a, S> {
    sys: &'a S,
    findings: &'a Findings,
    count: u64,
}

impl<S: Sys> Pages<'_, S> {
    fn tags(&self, region: Region, generation: u64) -> impl Iterator<Item = (u64, u64)> + use<S> {
        let tag = move |page, slot| Tag {
            region,
            generation,
            page,
            slot,
        };
        (0..self.count).flat_map(move |page| {
            WRITTEN.map(|slot| (address(SUBJECT_GVA, page, slot), tag(page, slot).encode()))
        })
    }

    fn write(&self, region: Region, generation: u64) {
        for (gva, value) in self.tags(region, generation) {
            if self.sys.write(gva, value).is_err() {
                self.findings.report(self.sys, DiskData, gva, value, 0);
            }
        }
    }

    fn check(&self, region: Region, generation: u64) {
        for (gva, expected) in self.tags(region, generation) {
            // What a fault leaves unread is no value.
            let found = self.sys.read(gva).unwrap_or(0);
            if found != expected {
                self.findings
                    .report(self.sys, DiskData, gva, expected, found);
            }
        }
    }

    /// Asks for as many frames as the region has: those of others may go, and none where there is no swap area.
    fn reclaim(&self) -> u64 {
        self.sys.reclaim(self.count)
    }
}

pub(super) fn run<S: Sys>(sys: &S, args: &Args<'_>) -> i32 {
    let findings = &Findings::default();
    let (count, passes) = (args.number("pages"), args.number("passes"));
    let pages = Pages {
        sys,
        findings,
        count,
    };
    let flags = ANONYMOUS | map::FIXED_NOREPLACE;
    let bytes = count * PAGE_SIZE;
    let base = sys.mmap(SUBJECT_GVA, bytes, prot::READ | prot::WRITE, flags);
    let mut reclaimed = 0;
    if must(sys, findings, SUBJECT_GVA, SUBJECT_GVA, base) {
        for pass in 1..=passes {
            reclaimed += pass_over(&pages, pass);
        }
        if args.number("hog") == 1 {
            hog(&pages);
            reclaimed += pass_over(&pages, passes + 1);
        }
    }
    let unmapped = sys.munmap(SUBJECT_GVA, bytes);
    must(sys, findings, SUBJECT_GVA, 0, unmapped);
    sys.end();
    print_line(
        sys,
        format_args!("pressure: {count} pages, {passes} passes, {reclaimed} frames reclaimed"),
    );
    findings.status()
}

/// Returns how many frames the parent had reclaimed.
fn pass_over<S: Sys>(pages: &Pages<'_, S>, pass: u64) -> u64 {
    let Pages {
        sys,
        findings,
        count,
    } = *pages;
    pages.write(Region::Subject, pass);
    let mut reclaimed = pages.reclaim();
    pages.check(Region::Subject, pass);
    reclaimed += pages.reclaim();
    let child = sys.fork(|sys| {
        let findings = &Findings::default();
        let pages = Pages {
            sys,
            findings,
            count,
        };
        pages.check(Region::Subject, pass);
        pages.write(Region::Child, pass);
        pages.reclaim();
        pages.check(Region::Child, pass);
        findings.status()
    });
    match child {
        Ok(pid) => findings.reap(sys, pid),
        Err(errno) => findings.report(sys, WrongResult, 0, 0, encode(Err(errno))),
    }
    pages.check(Region::Subject, pass);
    reclaimed
}

fn hog<S: Sys>(pages: &Pages<'_, S>) {
    let (sys, findings) = (pages.sys, pages.findings);
    pages.write(Region::Subject, 0);
    let child = sys.fork(|sys| {
        for _ in 0..BITES {
            let Ok(base) = sys.mmap_anonymous(BITE) else {
                return REFUSED;
            };
            for page in 0..BITE / PAGE_SIZE {
                let _ = sys.write(address(base, page, 0), base);
            }
        }
        0
    });
    let status = child.and_then(|pid| sys.wait(pid));
    match status {
        Ok(status) if status.exited() == Some(REFUSED as u32) => {}
        Ok(status) if u64::from(status.0 & 0x7f) == signal::SIGKILL => {}
        Ok(status) => findings.report(sys, WrongResult, 0, signal::SIGKILL, status.0.into()),
        // Nor is there memory for a child.
        Err(Errno::ENOMEM) => {}
        Err(errno) => findings.report(sys, WrongResult, 0, 0, encode(Err(errno))),
    }
    pages.check(Region::Subject, 0);
}

#[cfg(test)]
mod tests {
    use crate::broken::{Fault, assert_caught};
    use crate::native;
    use abi::channel::ReportKind::DiskData;

    #[test]
    fn linux_keeps_memory() {
        let outcome = native::run("pressure", "pages=200\0passes=3", None).unwrap();
        assert_eq!((outcome.status, outcome.reports), (0, Vec::new()));
        let text = outcome.text;
        assert!(text.contains("200 pages, 3 passes, 0 frames"), "{text}");
    }

    #[test]
    fn a_child_that_shares_its_parents_pages_is_caught() {
        assert_caught(Fault::PrivateIsShared, "pressure", "pages=4", DiskData);
    }
}
