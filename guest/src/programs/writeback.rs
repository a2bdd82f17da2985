//! `writeback`: two threads over a shared mapping of a file on the disk. The leader, on CPU 0, syncs the file, unmaps its pages
//! and has clean ones dropped, so that they come back from the disk; the other, on CPU 1, writes, syncs, and writes again. It
//! is the only one who writes, so it always finds what it wrote last, and that is still there when all is over and the pages
//! were dropped once more: whoever makes a page clean while somebody can still write it loses that write.
//!
//! With `reclaim=1` the leader has pages reclaimed instead, dirty or not, without asking whether they were synced.
//!
//! Where there is no disk (ENOSYS) the file is one in memory, which nobody may lose either. Where the disk fails (`[disk]
//! faults`), a sync says EIO and loses nothing, and an access may fail once, with SIGBUS.

use core::sync::atomic::{AtomicU64, Ordering};

use abi::channel::ReportKind::{DiskData, WrongPermission};
use abi::layout::PAGE_SIZE;
use abi::syscall::{Errno, advice, fadvise, map, prot};

use super::{Data, Program, SUBJECT_GVA};
use crate::args::{Arg, Args};
use crate::sys::{Fault, Signal, Sys, print_line};
use crate::tag::{Region, Tag, address};
use crate::team::{Findings, must, team};

pub(super) const PROGRAM: Program = Program {
    name: "writeback",
    help: "a file on the disk is synced and dropped from memory while another thread writes it",
    args: &[
        Arg {
            name: "pages",
            default: "1",
            range: 1..=64,
            help: "pages of the file",
        },
        Arg {
            name: "passes",
            default: "1",
            range: 1..=1000,
            help: "times that each thread does what it does",
        },
        Arg {
            name: "reclaim",
            default: "0",
            range: 0..=1,
            help: "1: pages are reclaimed, and neither synced nor dropped by the leader; needs swap_slots",
        },
    ],
    data: Data::Ignored,
    has_setup: true,
};

/// Accesses of one word that may fail because the disk does.
const TRIES: usize = 3;

struct Shared {
    pages: u64,
    passes: u64,
    fd: u64,
    /// The other thread has translations that it may write by.
    ready: AtomicU64,
    /// The race may begin.
    go: AtomicU64,
    findings: Findings,
}

impl Shared {
    /// What the other thread writes to `page` in `pass`, before and after it has synced; 0 before all.
    fn value(&self, page: u64, pass: u64, half: u64) -> u64 {
        let generation = match pass {
            0 => 0,
            pass => 2 * pass - 1 + half,
        };
        let region = Region::Subject;
        Tag {
            region,
            generation,
            page,
            slot: 0,
        }
        .encode()
    }
}

pub(super) fn run<S: Sys>(sys: &S, args: &Args<'_>) -> i32 {
    let (pages, passes) = (args.number("pages"), args.number("passes"));
    let reclaims = args.number("reclaim") == 1;
    let bytes = pages * PAGE_SIZE;
    let fd = sys.file(bytes);
    let shared = Shared {
        pages,
        passes,
        fd: fd.unwrap_or(0),
        ready: AtomicU64::new(0),
        go: AtomicU64::new(0),
        findings: Findings::default(),
    };
    let findings = &shared.findings;
    must(sys, findings, 0, 0, fd.map(|_| 0));
    let writable = prot::READ | prot::WRITE;
    let flags = map::SHARED | map::FIXED_NOREPLACE;
    let base = sys.mmap_file(SUBJECT_GVA, bytes, writable, flags, (shared.fd, 0));
    must(sys, findings, SUBJECT_GVA, SUBJECT_GVA, base);
    let result = team(sys, &shared, 1, write_and_sync, || {
        while shared.ready.load(Ordering::Acquire) == 0 {
            sys.yield_now();
        }
        shared.go.store(1, Ordering::Release);
        sys.begin();
        for _ in 0..passes {
            if reclaims {
                sys.reclaim(pages);
            } else {
                sync(sys, &shared);
                drop_pages(sys, &shared);
            }
        }
    });
    must(sys, findings, 0, 0, result.map(|()| 0));
    drop_pages(sys, &shared);
    for page in 0..pages {
        find(sys, &shared, page, shared.value(page, passes, 1));
    }
    sys.end();
    let _ = sys.munmap(SUBJECT_GVA, bytes);
    let _ = sys.close(shared.fd);
    print_line(sys, format_args!("writeback: over"));
    findings.status()
}

/// The other thread.
fn write_and_sync<S: Sys>(sys: &S, shared: &Shared, _: usize) {
    for page in 0..shared.pages {
        write(sys, shared, page, shared.value(page, 0, 0));
    }
    shared.ready.store(1, Ordering::Release);
    while shared.go.load(Ordering::Acquire) == 0 {
        sys.yield_now();
    }
    for pass in 1..=shared.passes {
        for half in [0, 1] {
            for page in 0..shared.pages {
                let value = shared.value(page, pass, half);
                write(sys, shared, page, value);
                find(sys, shared, page, value);
            }
            if half == 0 {
                sync(sys, shared);
            }
        }
    }
}

/// EIO is what a disk that fails comes to.
fn sync<S: Sys>(sys: &S, shared: &Shared) {
    let result = sys.fsync(shared.fd);
    if result != Err(Errno::EIO) {
        must(sys, &shared.findings, 0, 0, result);
    }
}

/// Pages that are clean leave memory, if nobody uses them just now.
fn drop_pages<S: Sys>(sys: &S, shared: &Shared) {
    let bytes = shared.pages * PAGE_SIZE;
    let unmapped = sys.madvise(SUBJECT_GVA, bytes, advice::DONTNEED);
    must(sys, &shared.findings, SUBJECT_GVA, 0, unmapped);
    let dropped = sys.fadvise(shared.fd, fadvise::DONTNEED);
    must(sys, &shared.findings, 0, 0, dropped);
}

fn write<S: Sys>(sys: &S, shared: &Shared, page: u64, value: u64) {
    let gva = address(SUBJECT_GVA, page, 0);
    if insist(|| sys.write(gva, value)).is_err() {
        shared.findings.report(sys, WrongPermission, gva, value, 0);
    }
}

fn find<S: Sys>(sys: &S, shared: &Shared, page: u64, value: u64) {
    let (findings, gva) = (&shared.findings, address(SUBJECT_GVA, page, 0));
    match insist(|| sys.read(gva)) {
        Ok(found) if found == value => {}
        Ok(found) => findings.report(sys, DiskData, gva, value, found),
        Err(_) => findings.report(sys, WrongPermission, gva, value, 0),
    }
}

/// What the disk has failed to read is read anew by the next access.
fn insist<T>(access: impl Fn() -> Result<T, Fault>) -> Result<T, Fault> {
    let mut result = access();
    for _ in 1..TRIES {
        if !matches!(result, Err(fault) if fault.signal == Signal::Bus) {
            break;
        }
        result = access();
    }
    result
}

#[cfg(test)]
mod tests {
    use crate::native;

    #[test]
    fn linux_is_clean() {
        for args in ["", "pages=3\0passes=200", "reclaim=1\0passes=20"] {
            let outcome = native::run("writeback", args, None).unwrap();
            assert_eq!(outcome.reports, [], "{args:?}");
            assert_eq!(outcome.status, 0);
        }
    }
}
