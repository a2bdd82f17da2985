//! `direct`: direct I/O. Pages are written to the disk, changed in memory, and read back; what comes back must be what
//! was written. So it tells the errors of a disk, and data that a disk spoils and says nothing about; and it checks
//! that what may not be read or written is refused as Linux refuses it.
//!
//! Where there is no disk (ENOSYS) there is nothing to check.

use abi::channel::ReportKind::{DiskData, WrongPermission, WrongResult};
use abi::disk::SECTOR_BYTES;
use abi::layout::PAGE_SIZE;
use abi::syscall::{Errno, encode, map, prot};

use super::{Data, Program, SUBJECT_GVA};
use crate::args::{Arg, Args};
use crate::sys::{ANONYMOUS, Sys, print_line};
use crate::tag::{Region, SLOTS, Tag, address};
use crate::team::{Findings, must};

pub(super) const PROGRAM: Program = Program {
    name: "direct",
    help: "direct I/O: what is read from the disk must be what was written to it",
    args: &[
        Arg {
            name: "pages",
            default: "4",
            range: 1..=64,
            help: "pages that are written and read at once",
        },
        Arg {
            name: "rounds",
            default: "2",
            range: 1..=1000,
            help: "times",
        },
    ],
    data: Data::Ignored,
    has_setup: false,
};

/// One slot of each sector is used.
const SLOTS_PER_SECTOR: u64 = SECTOR_BYTES / 64;
const SECTORS_PER_PAGE: u64 = PAGE_SIZE / SECTOR_BYTES;

fn tag(round: u64, page: u64, slot: u64) -> Tag {
    Tag {
        region: Region::Subject,
        generation: round,
        page,
        slot,
    }
}

pub(super) fn run<S: Sys>(sys: &S, args: &Args<'_>) -> i32 {
    let findings = &Findings::default();
    let (pages, rounds) = (args.number("pages"), args.number("rounds"));
    let writable = prot::READ | prot::WRITE;
    let flags = ANONYMOUS | map::FIXED_NOREPLACE;
    let bytes = pages * PAGE_SIZE;
    // The last page is not mapped.
    let base = sys.mmap(SUBJECT_GVA, bytes, writable, flags);
    must(sys, findings, SUBJECT_GVA, SUBJECT_GVA, base);
    if sys.direct_read(SUBJECT_GVA, 0, 0) == Err(Errno::ENOSYS) {
        print_line(sys, format_args!("direct: there is no disk here"));
    } else {
        for round in 1..=rounds {
            there_and_back(sys, findings, round, pages);
        }
        refusals(sys, findings, bytes);
        print_line(sys, format_args!("direct: over"));
    }
    let _ = sys.munmap(SUBJECT_GVA, bytes);
    sys.end();
    findings.status()
}

fn there_and_back<S: Sys>(sys: &S, findings: &Findings, round: u64, pages: u64) {
    let bytes = pages * PAGE_SIZE;
    let fill = |generation| {
        for (page, slot) in places(pages) {
            let value = tag(generation, page, slot).encode();
            let gva = address(SUBJECT_GVA, page, slot);
            if sys.write(gva, value).is_err() {
                findings.report(sys, WrongPermission, gva, value, 0);
            }
        }
    };
    fill(round);
    let written = sys.direct_write(SUBJECT_GVA, bytes, 0);
    // Nothing of what was written is left in memory.
    fill(0);
    let read = sys.direct_read(SUBJECT_GVA, bytes, 0);
    let mut done = bytes;
    for result in [written, read] {
        if result != Ok(bytes) {
            findings.report(sys, WrongResult, SUBJECT_GVA, bytes, encode(result));
        }
        done = done.min(result.unwrap_or(0));
    }
    for (page, slot) in places(pages) {
        let gva = address(SUBJECT_GVA, page, slot);
        if gva >= SUBJECT_GVA + done {
            break;
        }
        let expected = tag(round, page, slot).encode();
        match sys.read(gva) {
            Ok(found) if found == expected => {}
            Ok(found) => findings.report(sys, DiskData, gva, expected, found),
            Err(_) => findings.report(sys, WrongPermission, gva, expected, 0),
        }
    }
}

fn places(pages: u64) -> impl Iterator<Item = (u64, u64)> {
    let slots = (0..SECTORS_PER_PAGE)
        .map(|sector| sector * SLOTS_PER_SECTOR)
        .filter(|slot| *slot < SLOTS);
    (0..pages).flat_map(move |page| slots.clone().map(move |slot| (page, slot)))
}

/// Errors, in Linux's order: alignment, then addresses, then sectors.
fn refusals<S: Sys>(sys: &S, findings: &Findings, bytes: u64) {
    let end = SUBJECT_GVA + bytes;
    let refused = |gva, len, sector, expected: Errno| {
        for result in [
            sys.direct_read(gva, len, sector),
            sys.direct_write(gva, len, sector),
        ] {
            must(
                sys,
                findings,
                gva,
                encode(Err(expected)),
                result.or_else(|errno| Ok(encode(Err(errno)))),
            );
        }
    };
    refused(SUBJECT_GVA + 8, SECTOR_BYTES, 0, Errno::EINVAL);
    refused(SUBJECT_GVA, SECTOR_BYTES - 1, 0, Errno::EINVAL);
    refused(end, SECTOR_BYTES, 0, Errno::EFAULT);
    refused(u64::MAX - SECTOR_BYTES + 1, SECTOR_BYTES, 0, Errno::EFAULT);
    refused(SUBJECT_GVA, SECTOR_BYTES, 1 << 40, Errno::EINVAL);
    // A page that the program may only read: the device may read it too, and no more.
    let page = end - PAGE_SIZE;
    let protected = sys.mprotect(page, PAGE_SIZE, prot::READ);
    must(sys, findings, page, 0, protected);
    let read = sys.direct_read(page, SECTOR_BYTES, 0);
    let read = read.or_else(|errno| Ok(encode(Err(errno))));
    must(sys, findings, page, encode(Err(Errno::EFAULT)), read);
    must(
        sys,
        findings,
        page,
        SECTOR_BYTES,
        sys.direct_write(page, SECTOR_BYTES, 0),
    );
}

#[cfg(test)]
mod tests {
    use crate::native;

    #[test]
    fn linux_has_no_disk_of_ours() {
        let outcome = native::run("direct", "pages=2", None).unwrap();
        assert_eq!((outcome.status, outcome.reports), (0, Vec::new()));
        assert!(outcome.text.contains("no disk"), "{}", outcome.text);
    }
}
