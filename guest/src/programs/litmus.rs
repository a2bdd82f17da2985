//! `litmus`: races of a few steps, for exploration. The set-up (threads started, pinned, translations
//! warm) lies before [`Sys::begin`]; what is raced on lies between it and [`Sys::end`].
//!
//! The leader runs on CPU 0, the other thread on CPU 1. `done` is a flag that the leader sets when its
//! system call has returned; the other thread loads it *before* an access, so an access that starts
//! after the call has returned must show its effect: a translation from before is what a kernel must have
//! flushed. An access that starts earlier may see either side.
//!
//! | test | the leader | the other thread | wrong is |
//! |---|---|---|---|
//! | `unmap` | munmaps A, maps B, which takes A's frames, stamps and checks B | reads and writes A | an access to A that works once munmap has returned, a foreign value in A, a change in B |
//! | `protect` | mprotects A to read-only | writes A | a write that works once mprotect has returned |
//! | `dontneed` | madvise(DONTNEED) of A, then reads it | the same | the old value after one's own call |
//! | `apart` | madvise(DONTNEED) of A's first page, then reads both | the same with the second | the old value of a page whose call has returned |
//! | `wake` | wakes the other, whose CPU idles after another process has exited there, and munmaps A | sleeps, then reads A | as `unmap` |
//! | `lazy` | munmaps A while the other's CPU idles, maps B, wakes it | sleeps, then reads A | as `unmap` |
//! | `lazy-tables` | the same, and A's page tables go too | the same | the same, or a walk of a freed table |
//! | `switch` | munmaps A, maps B | reads A, yields to another process on its CPU, reads A | as `unmap` |
//! | `pcid` | munmaps A, maps B | reads A, yields to another process on its CPU, which has an A of its own at the same address and reads that, reads A | as `unmap`; a value of the other process's A |
//! | `cow` | writes A, which a child shares that exits meanwhile | reads A | a value nobody wrote to A, the old value after the new one or once the write is done |
//! | `fork` | forks a child that reads A twice | writes A | a value that changes in the child |
//! | `peek` | munmaps A, and its page tables go too | nothing; a child on its CPU peeks at its parent's A | a value that was never in A, a walk of a freed table |
//! | `direct` | forks, then writes the end of A | has the disk written to the start of A | what the disk holds is not in A, or what was written is not |
//! | `punch` | A maps a file: punches a hole there, maps B, which takes A's frames, stamps and checks B | reads and writes A | the old value in A once the call has returned, a foreign value in A, a change in B |
//! | `truncate` | A maps a file: truncates it to nothing, maps B, likewise | reads and writes A | an access to A that works once the call has returned, or fails otherwise than behind the end of a file; as `punch` |
//! | `remap` | munmaps A | maps A anew and reads it | the old value |
//! | `mremap` | mremaps A to B, then maps C, which takes A's frames where B is gone, stamps and checks C | reads and writes A, maps it anew, munmaps B | an access to A that works once mremap has returned, its old value after that, a foreign value in B, a change in C |
//! | `mremap-table` | the same with a whole page table | the same | the same |
//! | `migrate` | has A moved to other frames, maps B, which takes A's frames, stamps and checks B | writes A and reads it back | a value that was written to A and is not there, a foreign value in A, a change in B |
//! | `migrate-mremap` | mremaps the second half of A, which lies apart, back behind the first | nothing; a child on its CPU has its own half, of the same pages, moved to other frames | the half is not where it was moved to, or holds a foreign value |
//! | `free` | madvise(FREE) of A, then reads it | writes A | a value nobody wrote to A |
//! | `reclaim` | has A reclaimed, maps B, which takes A's frames, stamps and checks B | writes A and reads it back | another value than was written last, a change in B |
//! | `reclaim-protect` | has A reclaimed | mprotects A to read-only, then writes it | a write that works once mprotect has returned |
//! | `kswapd` | makes memory look short, and yields to kswapd, which reclaims A, maps B, which may take A's frames, stamps and checks B | as `reclaim` | as `reclaim` |

use core::sync::atomic::{AtomicU64, Ordering};

use abi::channel::ReportKind::{ChangedUnderneath, DiskData, ForeignFrame, WrongPermission};
use abi::disk::SECTOR_BYTES;
use abi::layout::{HUGE_PAGE_SIZE, PAGE_SIZE};
use abi::syscall::{Errno, advice, map, mremap, prot};

use super::{Data, Program, SUBJECT_GVA};
use crate::args::{Arg, Args};
use crate::sys::{ANONYMOUS, Signal, Sys, print_line};
use crate::tag::{Region, Tag, address};
use crate::team::{Findings, must, team};

pub(super) const PROGRAM: Program = Program {
    name: "litmus",
    help: "a race of a few steps between two threads, for exploration",
    args: &[
        Arg {
            name: "test",
            default: "unmap|protect|dontneed|lazy|lazy-tables|switch|cow|fork|remap|apart|wake|peek|pcid|direct|punch|truncate|mremap|mremap-table|free|migrate|migrate-mremap|reclaim|reclaim-protect|kswapd",
            range: 0..=23,
            help: "which race",
        },
        Arg {
            name: "pages",
            default: "2",
            range: 1..=64,
            help: "pages that are raced on",
        },
        Arg {
            name: "passes",
            default: "2",
            range: 1..=1000,
            help: "times the other thread accesses them",
        },
    ],
    data: Data::Ignored,
    has_setup: true,
};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Test {
    Unmap,
    Protect,
    Dontneed,
    Lazy,
    LazyTables,
    Switch,
    Cow,
    Fork,
    Remap,
    Apart,
    Wake,
    Peek,
    Pcid,
    Direct,
    Punch,
    Truncate,
    Mremap,
    MremapTable,
    Free,
    Migrate,
    MigrateMremap,
    Reclaim,
    ReclaimProtect,
    Kswapd,
}

const TESTS: [Test; 24] = [
    Test::Unmap,
    Test::Protect,
    Test::Dontneed,
    Test::Lazy,
    Test::LazyTables,
    Test::Switch,
    Test::Cow,
    Test::Fork,
    Test::Remap,
    Test::Apart,
    Test::Wake,
    Test::Peek,
    Test::Pcid,
    Test::Direct,
    Test::Punch,
    Test::Truncate,
    Test::Mremap,
    Test::MremapTable,
    Test::Free,
    Test::Migrate,
    Test::MigrateMremap,
    Test::Reclaim,
    Test::ReclaimProtect,
    Test::Kswapd,
];

impl Test {
    /// The other thread sleeps until the leader is done, or in `wake` until it begins.
    fn sleeps(self) -> bool {
        matches!(self, Self::Lazy | Self::LazyTables | Self::Wake)
    }
    /// A is a shared mapping of a file.
    fn maps_file(self) -> bool {
        matches!(self, Self::Punch | Self::Truncate)
    }
    /// Pages behind the raced ones, which stay: they keep the page tables.
    fn spare_pages(self) -> u64 {
        u64::from(!matches!(self, Self::LazyTables | Self::Peek))
    }
    /// A is what is reclaimed.
    fn reclaims(self) -> bool {
        matches!(self, Self::Reclaim | Self::ReclaimProtect | Self::Kswapd)
    }
    /// A is what the leader moves away.
    fn moves(self) -> bool {
        matches!(self, Self::Mremap | Self::MremapTable | Self::MigrateMremap)
    }
}

const WARM: u64 = 1;
const GO: u64 = 2;

struct Shared {
    test: Test,
    pages: u64,
    passes: u64,
    /// Descriptor of the file that A maps, in `punch` and `truncate`.
    fd: u64,
    /// The other thread is pinned and warm.
    ready: AtomicU64,
    /// The race may begin.
    go: AtomicU64,
    /// The leader's call has returned.
    done: AtomicU64,
    /// In `direct`: pages of A that the disk was read to.
    moved: AtomicU64,
    /// In `apart`: the call of the leader, and that of the other thread, has returned.
    dropped: [AtomicU64; 2],
    findings: Findings,
}

impl Shared {
    /// Bytes of A: more than its pages where a whole page table is to move.
    fn bytes(&self) -> u64 {
        match self.test {
            Test::MremapTable => HUGE_PAGE_SIZE,
            Test::MigrateMremap => 2 * self.pages * PAGE_SIZE,
            _ => self.pages * PAGE_SIZE,
        }
    }

    /// Where A moves to: where it shares page tables with what stays, so that they do not go with it, or where its
    /// own can go whole.
    fn moved(&self) -> u64 {
        match self.test {
            Test::MremapTable => SUBJECT_GVA + (1 << 30),
            _ => SUBJECT_GVA + self.bytes() + self.test.spare_pages() * PAGE_SIZE,
        }
    }
}

/// What A holds before the race, and what the leader writes in `cow`.
fn tag(region: Region, generation: u64, page: u64) -> Tag {
    Tag {
        region,
        generation,
        page,
        slot: 0,
    }
}

fn subject(page: u64) -> u64 {
    address(SUBJECT_GVA, page, 0)
}

pub(super) fn run<S: Sys>(sys: &S, args: &Args<'_>) -> i32 {
    let test = TESTS[args.number("test") as usize];
    let least = if test == Test::Apart { 2 } else { 1 };
    let pages = args.number("pages").max(least);
    let mapped = (pages + test.spare_pages()) * PAGE_SIZE;
    let fd = match test.maps_file() {
        true => open_file(sys, mapped),
        false => Ok(0),
    };
    let shared = Shared {
        test,
        pages,
        passes: args.number("passes"),
        fd: fd.unwrap_or(0),
        ready: AtomicU64::new(0),
        go: AtomicU64::new(0),
        done: AtomicU64::new(0),
        moved: AtomicU64::new(0),
        dropped: [AtomicU64::new(0), AtomicU64::new(0)],
        findings: Findings::default(),
    };
    let findings = &shared.findings;
    must(sys, findings, 0, 0, fd.map(|_| 0));
    pin(sys, findings, 0);
    let writable = prot::READ | prot::WRITE;
    let mapped = shared.bytes() + test.spare_pages() * PAGE_SIZE;
    let base = if test.maps_file() {
        let flags = map::SHARED | map::FIXED_NOREPLACE;
        sys.mmap_file(SUBJECT_GVA, mapped, writable, flags, (shared.fd, 0))
    } else {
        let flags = ANONYMOUS | map::FIXED_NOREPLACE;
        sys.mmap(SUBJECT_GVA, mapped, writable, flags)
    };
    must(sys, findings, SUBJECT_GVA, SUBJECT_GVA, base);
    if test.reclaims() {
        // What the program keeps in memory is found once, and not looked at again.
        sys.reclaim(1);
    }
    for page in 0..shared.pages {
        write(sys, findings, subject(page), tag(Region::Subject, 0, page));
    }
    match shared.test {
        Test::Direct => fill_disk(sys, &shared),
        Test::MigrateMremap => part_halves(sys, &shared),
        _ => {}
    }
    let result = team(sys, &shared, 1, other, || {
        while shared.ready.load(Ordering::Acquire) == 0 {
            sys.yield_now();
        }
        if matches!(shared.test, Test::Wake | Test::Pcid) {
            // In `wake` its end leaves the other thread's CPU lazy in an mm that is no longer the team's. In
            // `pcid` that mm has a slot of the CPU, so that the next one takes the team's where there are two.
            if let Some(pid) = bystander(sys, findings, 1, 0) {
                findings.reap(sys, pid);
            }
        }
        let child = match shared.test {
            Test::Switch => bystander(sys, findings, 1, 4 * shared.passes),
            Test::Cow => bystander(sys, findings, 2, 1),
            Test::Pcid => twin(sys, &shared, 4 * shared.passes),
            Test::Peek => peeper(sys, &shared),
            Test::MigrateMremap => migrator(sys, &shared),
            _ => None,
        };
        if shared.test == Test::Cow {
            // The fork has flushed: the other thread gets its translations again.
            shared.go.store(WARM, Ordering::Release);
            while shared.ready.load(Ordering::Acquire) != 3 {
                sys.yield_now();
            }
        }
        // Before the schedule begins, so that whoever runs first does not have to wait.
        shared.go.store(GO, Ordering::Release);
        sys.begin();
        if lead(sys, &shared) {
            shared.done.store(1, Ordering::Release);
            after(sys, &shared);
        }
        wake(sys, &shared);
        if let Some(pid) = child {
            findings.reap(sys, pid);
        }
    });
    must(sys, findings, 0, 0, result.map(|()| 0));
    match shared.test {
        Test::Migrate => look_at_last(sys, &shared),
        Test::MigrateMremap => look_at_half(sys, &shared),
        _ => {}
    }
    sys.end();
    if test == Test::Kswapd {
        sys.watermarks([0; 3]);
    }
    let _ = sys.munmap(SUBJECT_GVA, mapped);
    if test.maps_file() {
        let _ = sys.close(shared.fd);
    }
    if shared.test.moves() {
        let _ = sys.munmap(shared.moved(), shared.bytes());
    }
    print_line(sys, format_args!("litmus: over"));
    findings.status()
}

/// A file of `bytes`, which are holes.
fn open_file<S: Sys>(sys: &S, bytes: u64) -> Result<u64, Errno> {
    let fd = sys.memfd()?;
    sys.ftruncate(fd, bytes).map(|_| fd)
}

/// A process that shares all memory until it exits, and yields `turns` times before.
fn bystander<S: Sys>(sys: &S, findings: &Findings, cpu: usize, turns: u64) -> Option<u64> {
    // A child starts where its parent may run: on its own CPU from its first step on.
    pin(sys, findings, cpu);
    let child = sys.fork(move |sys| {
        for _ in 0..turns {
            sys.yield_now();
        }
        0
    });
    pin(sys, findings, 0);
    must(sys, findings, 0, 0, child.map(|_| 0));
    child.ok()
}

/// A process on the other CPU with values of its own in its A, which nobody else may change or see; it gives the
/// CPU away `turns` times.
fn twin<S: Sys>(sys: &S, shared: &Shared, turns: u64) -> Option<u64> {
    let findings = &shared.findings;
    let pages = shared.pages;
    pin(sys, findings, 1);
    let child = sys.fork(move |sys| {
        let findings = Findings::default();
        let own = |page| tag(Region::Subject, 1, page);
        for page in 0..pages {
            write(sys, &findings, subject(page), own(page));
        }
        for _ in 0..turns {
            for page in 0..pages {
                let (gva, expected) = (subject(page), own(page).encode());
                match sys.read(gva) {
                    Ok(found) if found == expected => {}
                    Ok(found) => findings.report(sys, ForeignFrame, gva, expected, found),
                    Err(_) => findings.report(sys, WrongPermission, gva, expected, 0),
                }
            }
            sys.yield_now();
        }
        findings.status()
    });
    pin(sys, findings, 0);
    must(sys, findings, 0, 0, child.map(|_| 0));
    child.ok()
}

/// A process on the other CPU that looks at A of its parent, which does not know: what it sees is A's value as long
/// as it is there, and then nothing.
fn peeper<S: Sys>(sys: &S, shared: &Shared) -> Option<u64> {
    let findings = &shared.findings;
    let (pages, passes) = (shared.pages, shared.passes);
    let parent = sys.getpid().unwrap_or(0);
    pin(sys, findings, 1);
    let child = sys.fork(move |sys| {
        let findings = Findings::default();
        for page in (0..passes).flat_map(|_| 0..pages) {
            let (gva, expected) = (subject(page), tag(Region::Subject, 0, page).encode());
            match sys.peek(parent, gva) {
                Ok(found) if found != expected => {
                    findings.report(sys, ForeignFrame, gva, expected, found);
                }
                // Where nobody can peek, there is nothing to see.
                _ => {}
            }
        }
        findings.status()
    });
    pin(sys, findings, 0);
    must(sys, findings, 0, 0, child.map(|_| 0));
    child.ok()
}

fn pin<S: Sys>(sys: &S, findings: &Findings, cpu: usize) {
    let cpu = cpu % sys.nr_cpus();
    must(sys, findings, 0, 0, sys.set_affinity(cpu).map(|()| 0));
}

fn write<S: Sys>(sys: &S, findings: &Findings, gva: u64, tag: Tag) {
    if sys.write(gva, tag.encode()).is_err() {
        findings.report(sys, WrongPermission, gva, tag.encode(), 0);
    }
}

/// The call that is raced with. False where it was refused, so that nothing has changed.
fn lead<S: Sys>(sys: &S, shared: &Shared) -> bool {
    let findings = &shared.findings;
    let bytes = shared.pages * PAGE_SIZE;
    let result = match shared.test {
        Test::Unmap
        | Test::Switch
        | Test::Pcid
        | Test::Lazy
        | Test::LazyTables
        | Test::Remap
        | Test::Peek => sys.munmap(SUBJECT_GVA, bytes),
        Test::Wake => {
            shared.ready.store(2, Ordering::Release);
            sys.futex_wake(&shared.ready);
            sys.munmap(SUBJECT_GVA, bytes)
        }
        Test::Protect => sys.mprotect(SUBJECT_GVA, bytes, prot::READ),
        Test::Punch => sys.punch_hole(shared.fd, 0, bytes),
        Test::Truncate => sys.ftruncate(shared.fd, 0),
        Test::Mremap | Test::MremapTable => {
            let (bytes, flags) = (shared.bytes(), mremap::MAYMOVE | mremap::FIXED);
            let moved = sys.mremap(SUBJECT_GVA, (bytes, bytes), flags, shared.moved());
            return must(sys, findings, SUBJECT_GVA, shared.moved(), moved);
        }
        Test::Free => sys.madvise(SUBJECT_GVA, bytes, advice::FREE),
        Test::Migrate => {
            // Where nobody can, nothing moves; where a frame is missing, that was asked for.
            let _ = sys.migrate(SUBJECT_GVA, bytes);
            return true;
        }
        Test::MigrateMremap => {
            let flags = mremap::MAYMOVE | mremap::FIXED;
            let behind = SUBJECT_GVA + bytes;
            let moved = sys.mremap(shared.moved(), (bytes, bytes), flags, behind);
            return must(sys, findings, shared.moved(), behind, moved);
        }
        Test::Reclaim | Test::ReclaimProtect => {
            sys.reclaim(shared.pages);
            return true;
        }
        Test::Kswapd => {
            sys.watermarks([0, ALL, ALL]);
            // It runs here, and lazily keeps this thread's address space loaded.
            sys.yield_now();
            return true;
        }
        Test::Dontneed => return drop_and_look(sys, shared),
        Test::Apart => {
            drop_one_look_at_both(sys, shared, 0);
            return true;
        }
        Test::Cow => {
            for page in 0..shared.pages {
                write(sys, findings, subject(page), tag(Region::Subject, 1, page));
            }
            return true;
        }
        Test::Direct => {
            // The other thread may go first without being preferred.
            sys.relax();
            let child = sys.fork(|_| 0);
            for page in 0..shared.pages {
                write(sys, findings, end_of(page), tag(Region::Subject, 1, page));
            }
            // The child lives until all is over: it need not run for that.
            let mut turns = 0u64;
            while shared.ready.load(Ordering::Acquire) != READ_OVER {
                turns += 1;
                if turns.is_multiple_of(64) {
                    sys.yield_now();
                }
                sys.relax();
            }
            look_for_both(sys, shared);
            sys.end();
            match child {
                Ok(pid) => findings.reap(sys, pid),
                Err(errno) => {
                    must(sys, findings, 0, 0, Err(errno));
                }
            }
            return true;
        }
        Test::Fork => {
            let (pages, passes) = (shared.pages, shared.passes);
            match sys.fork(move |sys| constant(sys, pages, passes)) {
                Ok(pid) => findings.reap(sys, pid),
                Err(errno) => {
                    must(sys, findings, 0, 0, Err(errno));
                }
            }
            return true;
        }
    };
    must(sys, findings, SUBJECT_GVA, 0, result)
}

/// More frames than there are: kswapd reclaims all that it can.
const ALL: u64 = 1 << 40;

/// [`Shared::ready`]: the disk was read as far as it went.
const READ_OVER: u64 = 4;

/// A word of A that the disk is not read to.
fn end_of(page: u64) -> u64 {
    address(SUBJECT_GVA, page, SECTOR_BYTES / 64)
}

/// What the disk holds for each page of A.
fn on_disk(page: u64) -> Tag {
    tag(Region::Subject, 2, page)
}

/// Sector `page` gets what A is to be read into later.
fn fill_disk<S: Sys>(sys: &S, shared: &Shared) {
    for page in 0..shared.pages {
        write(sys, &shared.findings, subject(page), on_disk(page));
        let written = sys.direct_write(subject(page), SECTOR_BYTES, page);
        if written != Err(Errno::ENOSYS) {
            must(sys, &shared.findings, subject(page), SECTOR_BYTES, written);
        }
        write(
            sys,
            &shared.findings,
            subject(page),
            tag(Region::Subject, 0, page),
        );
    }
}

/// The device writes the first sector of each page.
fn read_disk<S: Sys>(sys: &S, shared: &Shared) {
    for page in 0..shared.pages {
        // Where there is no disk, or no memory, nothing was read.
        if sys.direct_read(subject(page), SECTOR_BYTES, page) == Ok(SECTOR_BYTES) {
            shared.moved.fetch_or(1 << page, Ordering::Release);
        }
    }
    shared.ready.store(READ_OVER, Ordering::Release);
}

/// What the device wrote and what the leader wrote is in A, whoever came first.
fn look_for_both<S: Sys>(sys: &S, shared: &Shared) {
    let moved = shared.moved.load(Ordering::Acquire);
    for page in 0..shared.pages {
        let first = match moved >> page & 1 {
            0 => tag(Region::Subject, 0, page),
            _ => on_disk(page),
        };
        let both = [
            (subject(page), first),
            (end_of(page), tag(Region::Subject, 1, page)),
        ];
        for (gva, expected) in both {
            let expected = expected.encode();
            match sys.read(gva) {
                Ok(found) if found == expected => {}
                Ok(found) => shared.findings.report(sys, DiskData, gva, expected, found),
                Err(_) => shared
                    .findings
                    .report(sys, WrongPermission, gva, expected, 0),
            }
        }
    }
}

/// Wakes the other thread where it sleeps until the leader is done.
fn wake<S: Sys>(sys: &S, shared: &Shared) {
    if shared.test.sleeps() && shared.ready.load(Ordering::Acquire) != 2 {
        shared.ready.store(2, Ordering::Release);
        sys.futex_wake(&shared.ready);
    }
}

/// What the leader does once its call has returned: memory that takes the frames of A shows a write
/// through an old translation.
fn after<S: Sys>(sys: &S, shared: &Shared) {
    if shared.test == Test::MigrateMremap {
        return;
    } else if shared.test.moves() {
        look_at_moved(sys, shared);
    } else if shared.test == Test::Free {
        return look_at_freed(sys, shared);
    } else if !matches!(
        shared.test,
        Test::Unmap
            | Test::Switch
            | Test::Pcid
            | Test::Lazy
            | Test::LazyTables
            | Test::Wake
            | Test::Peek
            | Test::Punch
            | Test::Truncate
            | Test::Migrate
            | Test::Reclaim
            | Test::Kswapd
    ) {
        return;
    }
    let findings = &shared.findings;
    let bytes = shared.pages * PAGE_SIZE;
    let Ok(base) = sys.mmap_anonymous(bytes) else {
        return; // A failed allocation was asked for; nothing is wrong.
    };
    for page in 0..shared.pages {
        let gva = address(base, page, 0);
        write(sys, findings, gva, tag(Region::Reuse, 0, page));
    }
    wake(sys, shared);
    for page in 0..shared.pages {
        let gva = address(base, page, 0);
        let expected = tag(Region::Reuse, 0, page).encode();
        match sys.read(gva) {
            Ok(found) if found == expected => {}
            Ok(found) => findings.report(sys, ForeignFrame, gva, expected, found),
            Err(_) => findings.report(sys, WrongPermission, gva, expected, 0),
        }
    }
}

/// What has moved is as it was, as long as it is there.
fn look_at_moved<S: Sys>(sys: &S, shared: &Shared) {
    for page in 0..shared.pages {
        let gva = address(shared.moved(), page, 0);
        let expected = tag(Region::Subject, 0, page).encode();
        if let Ok(found) = sys.read(gva)
            && found != expected
        {
            let findings = &shared.findings;
            findings.report(sys, ForeignFrame, gva, expected, found);
        }
    }
}

/// What was given up may be gone, and reads as zeroes then; else it is what somebody wrote.
fn look_at_freed<S: Sys>(sys: &S, shared: &Shared) {
    let findings = &shared.findings;
    for page in 0..shared.pages {
        let gva = subject(page);
        let written = |pass| tag(Region::Subject, pass, page).encode();
        match sys.read(gva) {
            Ok(0) => {}
            Ok(found) if (0..=shared.passes).any(|pass| found == written(pass)) => {}
            Ok(found) => findings.report(sys, ForeignFrame, gva, written(0), found),
            Err(_) => findings.report(sys, WrongPermission, gva, written(0), 0),
        }
    }
}

/// madvise(DONTNEED), after which no read may give what was there before. False where it was refused.
fn drop_and_look<S: Sys>(sys: &S, shared: &Shared) -> bool {
    let findings = &shared.findings;
    let bytes = shared.pages * PAGE_SIZE;
    let result = sys.madvise(SUBJECT_GVA, bytes, advice::DONTNEED);
    if !must(sys, findings, SUBJECT_GVA, 0, result) {
        return false;
    }
    for page in 0..shared.pages {
        match sys.read(subject(page)) {
            Ok(0) => {}
            Ok(found) => findings.report(sys, ForeignFrame, subject(page), 0, found),
            Err(_) => findings.report(sys, WrongPermission, subject(page), 0, 0),
        }
    }
    true
}

/// Drops page `mine` of the first two; what of either is gone must not be seen any more.
fn drop_one_look_at_both<S: Sys>(sys: &S, shared: &Shared, mine: usize) {
    let findings = &shared.findings;
    let result = sys.madvise(subject(mine as u64), PAGE_SIZE, advice::DONTNEED);
    if must(sys, findings, subject(mine as u64), 0, result) {
        shared.dropped[mine].store(1, Ordering::Release);
    }
    for _ in 0..shared.passes {
        for (page, dropped) in shared.dropped.iter().enumerate() {
            let gone = dropped.load(Ordering::Acquire) != 0;
            let gva = subject(page as u64);
            match sys.read(gva) {
                Ok(found) if gone && found != 0 => {
                    findings.report(sys, ForeignFrame, gva, 0, found);
                }
                Ok(_) => {}
                Err(_) => findings.report(sys, WrongPermission, gva, 0, 0),
            }
        }
    }
}

/// In a child: what a page holds when it is first read must stay.
fn constant<S: Sys>(sys: &S, pages: u64, passes: u64) -> i32 {
    let findings = Findings::default();
    for page in 0..pages {
        let gva = subject(page);
        let Ok(first) = sys.read(gva) else {
            findings.report(sys, WrongPermission, gva, 0, 0);
            continue;
        };
        for _ in 0..passes {
            match sys.read(gva) {
                Ok(found) if found == first => {}
                Ok(found) => findings.report(sys, ChangedUnderneath, gva, first, found),
                Err(_) => findings.report(sys, WrongPermission, gva, first, 0),
            }
        }
    }
    findings.status()
}

fn other<S: Sys>(sys: &S, shared: &Shared, _index: usize) {
    let findings = &shared.findings;
    // Warm: writable translations of every page.
    for page in 0..shared.pages {
        write(sys, findings, subject(page), tag(Region::Subject, 0, page));
    }
    shared.ready.store(1, Ordering::Release);
    if shared.test.sleeps() {
        while shared.ready.load(Ordering::Acquire) != 2 {
            sys.futex_wait(&shared.ready, 1);
        }
    } else {
        while shared.go.load(Ordering::Acquire) != GO {
            if shared.go.load(Ordering::Acquire) == WARM {
                for page in 0..shared.pages {
                    let _ = sys.read(subject(page));
                }
                shared.ready.store(3, Ordering::Release);
            }
            sys.yield_now();
        }
    }
    match shared.test {
        Test::Dontneed => {
            drop_and_look(sys, shared);
        }
        Test::Apart => drop_one_look_at_both(sys, shared, 1),
        Test::Remap => remap(sys, shared),
        Test::Cow => watch(sys, shared),
        Test::Peek | Test::MigrateMremap => {}
        Test::Reclaim | Test::Kswapd => keep(sys, shared),
        Test::ReclaimProtect => protect_and_write(sys, shared),
        Test::Direct => read_disk(sys, shared),
        Test::Punch | Test::Truncate => use_file(sys, shared),
        Test::Migrate => keep_writing(sys, shared),
        Test::Mremap | Test::MremapTable => {
            access(sys, shared);
            remap(sys, shared);
            // Nothing is there yet, or what has moved.
            let _ = sys.munmap(shared.moved(), shared.bytes());
        }
        _ => access(sys, shared),
    }
}

/// Reads, and writes where A was writable, as long as it is there.
fn access<S: Sys>(sys: &S, shared: &Shared) {
    let findings = &shared.findings;
    for pass in 0..shared.passes {
        for page in 0..shared.pages {
            let (gva, expected) = (subject(page), tag(Region::Subject, 0, page).encode());
            let gone = shared.done.load(Ordering::Acquire) != 0;
            if matches!(shared.test, Test::Protect | Test::Fork | Test::Free) {
                // The leader's call takes the right to write away only in `protect`.
                let value = tag(Region::Subject, pass + 1, page).encode();
                let written = sys.write(gva, value).is_ok();
                if gone && written && shared.test == Test::Protect {
                    findings.report(sys, WrongPermission, gva, 0, value);
                }
                continue;
            }
            match sys.read(gva) {
                Ok(found) if found != expected || gone => {
                    findings.report(sys, ForeignFrame, gva, expected, found);
                }
                Ok(_) => {
                    // Into the frame of A, or of whoever has it now.
                    let gone = shared.done.load(Ordering::Acquire) != 0;
                    if sys.write(gva, expected).is_ok() && gone {
                        findings.report(sys, ForeignFrame, gva, 0, expected);
                    }
                }
                Err(_) => {}
            }
        }
        if matches!(shared.test, Test::Switch | Test::Pcid) {
            for _ in 0..3 {
                sys.yield_now();
            }
        }
    }
}

/// Nobody but this thread writes A: it always finds what it wrote last, wherever A is meanwhile.
fn keep<S: Sys>(sys: &S, shared: &Shared) {
    let findings = &shared.findings;
    for pass in 0..=shared.passes {
        for page in 0..shared.pages {
            let (gva, value) = (subject(page), tag(Region::Subject, pass + 1, page));
            write(sys, findings, gva, value);
            match sys.read(gva) {
                Ok(found) if found == value.encode() => {}
                Ok(found) => findings.report(sys, ForeignFrame, gva, value.encode(), found),
                Err(_) => findings.report(sys, WrongPermission, gva, value.encode(), 0),
            }
        }
    }
}

/// After its own mprotect this thread must not be able to write, whoever has cleared the entries.
fn protect_and_write<S: Sys>(sys: &S, shared: &Shared) {
    let findings = &shared.findings;
    let bytes = shared.pages * PAGE_SIZE;
    let result = sys.mprotect(SUBJECT_GVA, bytes, prot::READ);
    if !must(sys, findings, SUBJECT_GVA, 0, result) {
        return;
    }
    for page in 0..shared.pages {
        let (gva, expected) = (subject(page), tag(Region::Subject, 0, page).encode());
        if sys.write(gva, !expected).is_ok() {
            findings.report(sys, WrongPermission, gva, 0, !expected);
        }
        match sys.read(gva) {
            Ok(found) if found == expected => {}
            Ok(found) => findings.report(sys, ForeignFrame, gva, expected, found),
            Err(_) => findings.report(sys, WrongPermission, gva, expected, 0),
        }
    }
}

/// Reads the file through A, and writes another value there: before the leader's call the old value or one's own,
/// after it never the old one, and from a file of no pages nothing at all.
fn use_file<S: Sys>(sys: &S, shared: &Shared) {
    let findings = &shared.findings;
    for _ in 0..shared.passes {
        for page in 0..shared.pages {
            let gva = subject(page);
            let [old, own] = [0, 1].map(|era| tag(Region::Subject, era, page).encode());
            let gone = shared.done.load(Ordering::Acquire) != 0;
            let truncated = gone && shared.test == Test::Truncate;
            match sys.read(gva) {
                Ok(found) if truncated => findings.report(sys, WrongPermission, gva, 0, found),
                Ok(found) if found == own || found == 0 || found == old && !gone => {}
                Ok(found) => findings.report(sys, ForeignFrame, gva, own, found),
                Err(fault) if fault.signal == Signal::Bus && shared.test == Test::Truncate => {}
                Err(_) => findings.report(sys, WrongPermission, gva, own, 0),
            }
            // Into the frame of A, or of whoever has it now: B shows it.
            let written = sys.write(gva, own);
            if truncated && written.is_ok() {
                findings.report(sys, WrongPermission, gva, 0, own);
            }
        }
    }
}

/// What one writes to A is there when one reads it: nobody else writes it, wherever its frame is.
fn keep_writing<S: Sys>(sys: &S, shared: &Shared) {
    let findings = &shared.findings;
    for pass in 0..shared.passes {
        for page in 0..shared.pages {
            let value = tag(Region::Subject, pass + 1, page);
            write(sys, findings, subject(page), value);
            read_back(sys, findings, subject(page), value);
        }
    }
}

fn read_back<S: Sys>(sys: &S, findings: &Findings, gva: u64, tag: Tag) {
    match sys.read(gva) {
        Ok(found) if found == tag.encode() => {}
        Ok(found) => findings.report(sys, ChangedUnderneath, gva, tag.encode(), found),
        Err(_) => findings.report(sys, WrongPermission, gva, tag.encode(), 0),
    }
}

/// What the other thread has written last is there when it is over.
fn look_at_last<S: Sys>(sys: &S, shared: &Shared) {
    for page in 0..shared.pages {
        let last = tag(Region::Subject, shared.passes, page);
        read_back(sys, &shared.findings, subject(page), last);
    }
}

/// The second half of A goes far away, with a VMA of its own behind the first half's on the lists of their anon_vma.
fn part_halves<S: Sys>(sys: &S, shared: &Shared) {
    let (findings, bytes) = (&shared.findings, shared.pages * PAGE_SIZE);
    let half = SUBJECT_GVA + bytes;
    for page in 0..shared.pages {
        write(
            sys,
            findings,
            address(half, page, 0),
            tag(Region::Subject, 0, page),
        );
    }
    let flags = mremap::MAYMOVE | mremap::FIXED;
    let moved = sys.mremap(half, (bytes, bytes), flags, shared.moved());
    must(sys, findings, half, shared.moved(), moved);
}

/// A process on the other CPU with the same pages, which it has moved to other frames `passes` times.
fn migrator<S: Sys>(sys: &S, shared: &Shared) -> Option<u64> {
    let (findings, passes) = (&shared.findings, shared.passes);
    let (gva, bytes) = (shared.moved(), shared.pages * PAGE_SIZE);
    pin(sys, findings, 1);
    let child = sys.fork(move |sys| {
        for _ in 0..passes {
            // Where nobody can, nothing moves.
            let _ = sys.migrate(gva, bytes);
        }
        0
    });
    pin(sys, findings, 0);
    must(sys, findings, 0, 0, child.map(|_| 0));
    child.ok()
}

/// It is back, with all that it held.
fn look_at_half<S: Sys>(sys: &S, shared: &Shared) {
    let half = SUBJECT_GVA + shared.pages * PAGE_SIZE;
    for page in 0..shared.pages {
        let value = tag(Region::Subject, 0, page);
        read_back(sys, &shared.findings, address(half, page, 0), value);
    }
}

/// Maps A again as soon as it is gone: fresh pages are zero.
fn remap<S: Sys>(sys: &S, shared: &Shared) {
    let findings = &shared.findings;
    let bytes = shared.pages * PAGE_SIZE;
    let flags = ANONYMOUS | map::FIXED_NOREPLACE;
    for _ in 0..shared.passes {
        if sys
            .mmap(SUBJECT_GVA, bytes, prot::READ | prot::WRITE, flags)
            .is_err()
        {
            sys.relax();
            continue;
        }
        for page in 0..shared.pages {
            match sys.read(subject(page)) {
                Ok(0) => {}
                Ok(found) => findings.report(sys, ForeignFrame, subject(page), 0, found),
                Err(_) => findings.report(sys, WrongPermission, subject(page), 0, 0),
            }
        }
        return;
    }
}

/// The old value, then the new one, and nothing else.
fn watch<S: Sys>(sys: &S, shared: &Shared) {
    let findings = &shared.findings;
    for page in 0..shared.pages {
        let (gva, old, new) = (
            subject(page),
            tag(Region::Subject, 0, page).encode(),
            tag(Region::Subject, 1, page).encode(),
        );
        let mut seen_new = false;
        for _ in 0..shared.passes {
            seen_new |= shared.done.load(Ordering::Acquire) != 0;
            match sys.read(gva) {
                Ok(found) if found == new => seen_new = true,
                Ok(found) if found == old && !seen_new => {}
                Ok(found) => findings.report(sys, ForeignFrame, gva, new, found),
                Err(_) => findings.report(sys, WrongPermission, gva, new, 0),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::broken::{Fault, assert_caught};
    use crate::native;
    use abi::channel::ReportKind::{ForeignFrame, WrongPermission};

    const TESTS: [&str; 19] = [
        "unmap",
        "protect",
        "dontneed",
        "apart",
        "wake",
        "lazy",
        "lazy-tables",
        "switch",
        "cow",
        "fork",
        "remap",
        "peek",
        "pcid",
        "direct",
        "punch",
        "truncate",
        "mremap",
        "mremap-table",
        "free",
    ];

    #[test]
    fn linux_is_clean() {
        for test in TESTS {
            for passes in [1, 50] {
                let args = format!("test={test}\0passes={passes}");
                let outcome = native::run("litmus", &args, None).unwrap();
                assert_eq!(outcome.reports, [], "{args:?}");
                assert_eq!(outcome.status, 0);
            }
        }
    }

    #[test]
    fn calls_without_an_effect_are_caught() {
        let dontneed = "test=dontneed";
        assert_caught(Fault::MadviseIgnored, "litmus", dontneed, ForeignFrame);
        let protect = "test=protect\0passes=1000";
        assert_caught(Fault::MprotectIgnored, "litmus", protect, WrongPermission);
        let lazy = "test=lazy";
        assert_caught(Fault::MunmapIgnored, "litmus", lazy, ForeignFrame);
        let punch = "test=punch\0passes=1000";
        assert_caught(Fault::FallocateIgnored, "litmus", punch, ForeignFrame);
        let truncate = "test=truncate\0passes=1000";
        assert_caught(Fault::FtruncateIgnored, "litmus", truncate, WrongPermission);
        for mremap in ["test=mremap", "test=mremap-table"] {
            let fault = Fault::MremapLeavesItThere;
            assert_caught(fault, "litmus", mremap, ForeignFrame);
        }
    }
}
