//! `file-io`: two threads read a file through one descriptor, page by page, from the disk where there is one, and then write it
//! over, each the whole of it at once. Their buffers are paged out before each call, so copies under the descriptor's and the
//! file's locks wait for the disk too.
//!
//! Each page of a file on the disk is read by one of them, once: the position moves on under its lock. What is there in the end is what one of
//! them wrote: a write holds its file from beginning to end.

use core::sync::atomic::{AtomicU64, Ordering};

use abi::channel::ReportKind::{DiskData, WrongPermission, WrongResult};
use abi::layout::PAGE_SIZE;
use abi::syscall::{Errno, advice, fadvise, map, nr, prot};

use super::{Data, Program, SUBJECT_GVA};
use crate::args::{Arg, Args};
use crate::sys::{Sys, print_line};
use crate::tag::{Region, Tag, address};
use crate::team::{Findings, must, team};

/// The file is written by one call, whose source is one buffer.
const MAX_FILE_PAGES: u64 = 16;

pub(super) const PROGRAM: Program = Program {
    name: "file-io",
    help: "two threads read and write a file through one descriptor, out of and into pages that are swapped out",
    args: &[Arg {
        name: "pages",
        default: "2",
        range: 1..=MAX_FILE_PAGES,
        help: "pages of the file",
    }],
    data: Data::Ignored,
    has_setup: true,
};

/// Who wrote the file.
const SET_UP: u64 = 7;

struct Shared {
    pages: u64,
    fd: u64,
    /// Reads move its position on one after the other. Linux's memfds have no lock for it (FMODE_ATOMIC_POS).
    is_regular: bool,
    /// Bit by bit: the pages that somebody has read.
    read: AtomicU64,
    go: AtomicU64,
    /// Not 0 once a call did not move all that it was to, as where memory is short: then nothing is said of what is where.
    failed: AtomicU64,
    findings: Findings,
}

impl Shared {
    fn is_well(&self) -> bool {
        self.failed.load(Ordering::Relaxed) == 0
    }
}

/// Buffer of thread `me`.
fn buffer(me: u64) -> u64 {
    SUBJECT_GVA + me * 2 * MAX_FILE_PAGES * PAGE_SIZE
}

fn value(page: u64, writer: u64) -> u64 {
    let tag = Tag {
        region: Region::Subject,
        generation: writer,
        page,
        slot: 0,
    };
    tag.encode()
}

pub(super) fn run<S: Sys>(sys: &S, args: &Args<'_>) -> i32 {
    let pages = args.number("pages");
    let bytes = pages * PAGE_SIZE;
    let on_disk = sys.disk_file(0, bytes);
    let is_regular = on_disk != Err(Errno::ENOSYS);
    let fd = if is_regular { on_disk } else { sys.file(bytes) };
    let shared = Shared {
        pages,
        fd: fd.unwrap_or(0),
        is_regular,
        read: AtomicU64::new(0),
        go: AtomicU64::new(0),
        failed: AtomicU64::new(0),
        findings: Findings::default(),
    };
    let findings = &shared.findings;
    must(sys, findings, 0, 0, fd.map(|_| 0));
    let flags = map::PRIVATE | map::ANONYMOUS | map::FIXED_NOREPLACE;
    for me in 0..2 {
        let at = buffer(me);
        must(
            sys,
            findings,
            at,
            at,
            sys.mmap(at, bytes, prot::READ | prot::WRITE, flags),
        );
    }
    write_file(sys, &shared, 0, SET_UP);
    // So that pages come from the disk.
    must(sys, findings, 0, 0, sys.fsync(shared.fd));
    must(
        sys,
        findings,
        0,
        0,
        sys.fadvise(shared.fd, fadvise::DONTNEED),
    );
    let result = team(
        sys,
        &shared,
        1,
        |sys, shared, _| use_file(sys, shared, 1),
        || {
            shared.go.store(1, Ordering::Release);
            sys.begin();
            use_file(sys, &shared, 0);
        },
    );
    must(sys, findings, 0, 0, result.map(|()| 0));
    let all = (1 << pages) - 1;
    let read = shared.read.load(Ordering::Relaxed);
    if shared.is_well() && read != all {
        findings.report(sys, WrongResult, 0, all, read);
    }
    read_back(sys, &shared);
    sys.end();
    for me in 0..2 {
        let _ = sys.munmap(buffer(me), bytes);
    }
    let _ = sys.close(shared.fd);
    print_line(sys, format_args!("file-io: over"));
    findings.status()
}

fn use_file<S: Sys>(sys: &S, shared: &Shared, me: u64) {
    while shared.go.load(Ordering::Acquire) == 0 {
        sys.yield_now();
    }
    while read_next(sys, shared, me) {}
    if shared.is_well() {
        write_file(sys, shared, me, me + 1);
    }
}

fn page_out<S: Sys>(sys: &S, shared: &Shared, me: u64) {
    let out = sys.madvise(buffer(me), shared.pages * PAGE_SIZE, advice::PAGEOUT);
    // Without swap there is nowhere to go.
    if out != Err(Errno::EINVAL) {
        must(sys, &shared.findings, buffer(me), 0, out);
    }
}

/// Reads where the descriptor stands. False at the end of the file.
fn read_next<S: Sys>(sys: &S, shared: &Shared, me: u64) -> bool {
    let (findings, at) = (&shared.findings, buffer(me));
    page_out(sys, shared, me);
    let got = sys.syscall(nr::READ, [shared.fd, at, PAGE_SIZE, 0, 0, 0]);
    if got == Ok(0) || !moved(sys, shared, (at, PAGE_SIZE), got) {
        return false;
    }
    let Ok(found) = sys.read(at) else {
        findings.report(sys, WrongPermission, at, 0, 0);
        return false;
    };
    match (0..shared.pages).find(|page| value(*page, SET_UP) == found) {
        Some(page) => {
            let before = shared.read.fetch_or(1 << page, Ordering::Relaxed);
            if before & 1 << page != 0 && shared.is_regular {
                findings.report(sys, WrongResult, at, 0, page);
            }
        }
        // Else the other one may have come to the end and be writing.
        None if shared.is_regular && shared.is_well() => {
            findings.report(sys, DiskData, at, value(0, SET_UP), found);
        }
        None => {}
    }
    true
}

/// Writes all of the file at once.
fn write_file<S: Sys>(sys: &S, shared: &Shared, me: u64, writer: u64) {
    let (findings, at, bytes) = (&shared.findings, buffer(me), shared.pages * PAGE_SIZE);
    for page in 0..shared.pages {
        if sys
            .write(address(at, page, 0), value(page, writer))
            .is_err()
        {
            findings.report(sys, WrongPermission, at, 0, 0);
        }
    }
    page_out(sys, shared, me);
    let written = sys.syscall(nr::PWRITE64, [shared.fd, at, bytes, 0, 0, 0]);
    moved(sys, shared, (at, bytes), written);
}

/// True where a call has moved all `bytes`. One that did less has come to a page that could not be had.
fn moved<S: Sys>(
    sys: &S,
    shared: &Shared,
    (at, bytes): (u64, u64),
    result: Result<u64, Errno>,
) -> bool {
    let result = match result {
        Ok(some) if some < bytes => Err(Errno::EFAULT),
        result => result,
    };
    let all = must(sys, &shared.findings, at, bytes, result);
    if !all {
        shared.failed.store(1, Ordering::Relaxed);
    }
    all
}

/// One of the two has written all of it.
fn read_back<S: Sys>(sys: &S, shared: &Shared) {
    let (findings, at, bytes) = (&shared.findings, buffer(0), shared.pages * PAGE_SIZE);
    let got = sys.syscall(nr::PREAD64, [shared.fd, at, bytes, 0, 0, 0]);
    if !moved(sys, shared, (at, bytes), got) || !shared.is_well() {
        return;
    }
    let found = |page| sys.read(address(at, page, 0)).unwrap_or(0);
    let writer = if found(0) == value(0, 1) { 1 } else { 2 };
    for page in 0..shared.pages {
        if found(page) != value(page, writer) {
            findings.report(sys, DiskData, at, value(page, writer), found(page));
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::native;

    #[test]
    fn linux_is_clean() {
        for args in ["", "pages=1", "pages=16"] {
            let outcome = native::run("file-io", args, None).unwrap();
            assert_eq!(outcome.reports, [], "{args:?}");
            assert_eq!(outcome.status, 0);
        }
    }
}
