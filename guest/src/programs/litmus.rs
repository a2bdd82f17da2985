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
//! | `cow` | writes A, which a child shares that exits meanwhile | reads A | a value nobody wrote to A, the old value after the new one or once the write is done |
//! | `fork` | forks a child that reads A twice | writes A | a value that changes in the child |
//! | `peek` | munmaps A, and its page tables go too | nothing; a child on its CPU peeks at its parent's A | a value that was never in A, a walk of a freed table |
//! | `remap` | munmaps A | maps A anew and reads it | the old value |

use core::sync::atomic::{AtomicU64, Ordering};

use abi::channel::ReportKind::{ChangedUnderneath, ForeignFrame, WrongPermission};
use abi::layout::PAGE_SIZE;
use abi::syscall::{advice, map, prot};

use super::{Data, Program, SUBJECT_GVA};
use crate::args::{Arg, Args};
use crate::sys::{ANONYMOUS, Sys, print_line};
use crate::tag::{Region, Tag, address};
use crate::team::{Findings, must, team};

pub(super) const PROGRAM: Program = Program {
    name: "litmus",
    help: "a race of a few steps between two threads, for exploration",
    args: &[
        Arg {
            name: "test",
            default: "unmap|protect|dontneed|lazy|lazy-tables|switch|cow|fork|remap|apart|wake|peek",
            range: 0..=11,
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
}

const TESTS: [Test; 12] = [
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
];

impl Test {
    /// The other thread sleeps until the leader is done, or in `wake` until it begins.
    fn sleeps(self) -> bool {
        matches!(self, Self::Lazy | Self::LazyTables | Self::Wake)
    }
    /// Pages behind the raced ones, which stay: they keep the page tables.
    fn spare_pages(self) -> u64 {
        u64::from(!matches!(self, Self::LazyTables | Self::Peek))
    }
}

const WARM: u64 = 1;
const GO: u64 = 2;

struct Shared {
    test: Test,
    pages: u64,
    passes: u64,
    /// The other thread is pinned and warm.
    ready: AtomicU64,
    /// The race may begin.
    go: AtomicU64,
    /// The leader's call has returned.
    done: AtomicU64,
    /// In `apart`: the call of the leader, and that of the other thread, has returned.
    dropped: [AtomicU64; 2],
    findings: Findings,
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
    let shared = Shared {
        test,
        pages: args.number("pages").max(least),
        passes: args.number("passes"),
        ready: AtomicU64::new(0),
        go: AtomicU64::new(0),
        done: AtomicU64::new(0),
        dropped: [AtomicU64::new(0), AtomicU64::new(0)],
        findings: Findings::default(),
    };
    let findings = &shared.findings;
    pin(sys, findings, 0);
    let flags = ANONYMOUS | map::FIXED_NOREPLACE;
    let bytes = shared.pages * PAGE_SIZE;
    let writable = prot::READ | prot::WRITE;
    let mapped = bytes + shared.test.spare_pages() * PAGE_SIZE;
    let base = sys.mmap(SUBJECT_GVA, mapped, writable, flags);
    must(sys, findings, SUBJECT_GVA, SUBJECT_GVA, base);
    for page in 0..shared.pages {
        write(sys, findings, subject(page), tag(Region::Subject, 0, page));
    }
    let result = team(sys, &shared, 1, other, || {
        while shared.ready.load(Ordering::Acquire) == 0 {
            sys.yield_now();
        }
        let child = match shared.test {
            Test::Switch => Some(bystander(sys, findings, 1, 4 * shared.passes)),
            Test::Cow => Some(bystander(sys, findings, 2, 1)),
            Test::Wake => {
                // Its end leaves the other thread's CPU lazy in an mm that is no longer the team's.
                if let Some(pid) = bystander(sys, findings, 1, 0) {
                    findings.reap(sys, pid);
                }
                None
            }
            Test::Peek => Some(peeper(sys, &shared)),
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
        if let Some(pid) = child.flatten() {
            findings.reap(sys, pid);
        }
    });
    must(sys, findings, 0, 0, result.map(|()| 0));
    sys.end();
    let _ = sys.munmap(SUBJECT_GVA, mapped);
    print_line(sys, format_args!("litmus: over"));
    findings.status()
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
        Test::Unmap | Test::Switch | Test::Lazy | Test::LazyTables | Test::Remap | Test::Peek => {
            sys.munmap(SUBJECT_GVA, bytes)
        }
        Test::Wake => {
            shared.ready.store(2, Ordering::Release);
            sys.futex_wake(&shared.ready);
            sys.munmap(SUBJECT_GVA, bytes)
        }
        Test::Protect => sys.mprotect(SUBJECT_GVA, bytes, prot::READ),
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
    if !matches!(
        shared.test,
        Test::Unmap | Test::Switch | Test::Lazy | Test::LazyTables | Test::Wake | Test::Peek
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
    pin(sys, findings, 1);
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
        Test::Peek => {}
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
            if shared.test == Test::Protect || shared.test == Test::Fork {
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
        if shared.test == Test::Switch {
            for _ in 0..3 {
                sys.yield_now();
            }
        }
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

    const TESTS: [&str; 12] = [
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
    }
}
