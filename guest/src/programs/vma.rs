//! `vma`: races of a fault, which locks its VMA and nothing else, against changes of VMAs, for exploration. The set-up lies
//! before [`Sys::begin`], what is raced on between it and [`Sys::end`], as in `litmus`.
//!
//! The leader runs on CPU 0, the other thread on CPU 1. A is a mapping of its own, with pages that nobody has touched, so that
//! the leader's call flushes nothing: a flush would wait until the other CPU has done with its fault. `done` is set when the call has
//! returned.
//!
//! | test | the leader | the other thread | wrong is |
//! |---|---|---|---|
//! | `protect` | mprotects A to read-only | writes A's untouched pages | a write that works once mprotect has returned |
//! | `tree` | munmaps the mappings below A, of which there are as many as make the tree of VMAs shrink | reads A's untouched pages | an access that fails, or another value than 0 |
//! | `recycle` | munmaps A, and yields to another process on its CPU, which maps the same addresses: its VMA takes the memory of A's | as in `tree`, as long as A is there | an access that works once munmap has returned |

use core::sync::atomic::{AtomicU64, Ordering};

use abi::channel::ReportKind::{ForeignFrame, WrongPermission};
use abi::layout::PAGE_SIZE;
use abi::syscall::{map, prot};

use super::{Data, Program, SUBJECT_GVA};
use crate::args::{Arg, Args};
use crate::sys::{ANONYMOUS, Sys, print_line};
use crate::team::{Findings, must, team};

pub(super) const PROGRAM: Program = Program {
    name: "vma",
    help: "a race of a few steps between a fault and a change of its VMA, for exploration",
    args: &[
        Arg {
            name: "test",
            default: "protect|tree|recycle",
            range: 0..=2,
            help: "which race",
        },
        Arg {
            name: "pages",
            default: "2",
            range: 1..=64,
            help: "pages that the other thread touches",
        },
    ],
    data: Data::Ignored,
    has_setup: true,
};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Test {
    Protect,
    Tree,
    Recycle,
}

const TESTS: [Test; 3] = [Test::Protect, Test::Tree, Test::Recycle];
const WRITABLE: u64 = prot::READ | prot::WRITE;
/// Mappings below A: more than two nodes of the tree hold.
const BELOW: u64 = 24;
/// Where the lowest of them is: they lie with a hole before each.
const LOWEST: u64 = SUBJECT_GVA - 2 * BELOW * PAGE_SIZE;

struct Shared {
    test: Test,
    pages: u64,
    /// The other thread is pinned.
    ready: AtomicU64,
    /// The race may begin.
    go: AtomicU64,
    /// The leader's call has returned.
    done: AtomicU64,
    /// The other thread is.
    over: AtomicU64,
    findings: Findings,
}

impl Shared {
    /// The other thread leaves the first page of A alone.
    fn bytes(&self) -> u64 {
        (1 + self.pages) * PAGE_SIZE
    }

    fn untouched(&self) -> impl Iterator<Item = u64> {
        (1..=self.pages).map(|page| SUBJECT_GVA + page * PAGE_SIZE)
    }
}

pub(super) fn run<S: Sys>(sys: &S, args: &Args<'_>) -> i32 {
    let shared = Shared {
        test: TESTS[args.number("test") as usize],
        pages: args.number("pages"),
        ready: AtomicU64::new(0),
        go: AtomicU64::new(0),
        done: AtomicU64::new(0),
        over: AtomicU64::new(0),
        findings: Findings::default(),
    };
    let findings = &shared.findings;
    must(sys, findings, 0, 0, sys.set_affinity(0).map(|()| 0));
    map_at(sys, findings, SUBJECT_GVA, shared.bytes());
    match shared.test {
        // Else a write takes the mmap_lock, for A's first anon_vma.
        Test::Protect if sys.write(SUBJECT_GVA, 1).is_err() => {
            findings.report(sys, WrongPermission, SUBJECT_GVA, 1, 0);
        }
        Test::Tree => {
            for nth in 0..BELOW {
                map_at(sys, findings, LOWEST + 2 * nth * PAGE_SIZE, PAGE_SIZE);
            }
        }
        _ => {}
    }
    let result = team(sys, &shared, 1, other, || {
        while shared.ready.load(Ordering::Acquire) == 0 {
            sys.yield_now();
        }
        let child = match shared.test {
            Test::Recycle => mapper(sys, &shared),
            _ => None,
        };
        shared.go.store(1, Ordering::Release);
        sys.begin();
        lead(sys, &shared);
        if let Some(pid) = child {
            findings.reap(sys, pid);
        }
    });
    must(sys, findings, 0, 0, result.map(|()| 0));
    sys.end();
    let _ = sys.munmap(SUBJECT_GVA, shared.bytes());
    let _ = sys.munmap(LOWEST, SUBJECT_GVA - LOWEST);
    print_line(sys, format_args!("vma: over"));
    findings.status()
}

fn map_at<S: Sys>(sys: &S, findings: &Findings, gva: u64, bytes: u64) {
    let mapped = sys.mmap(gva, bytes, WRITABLE, ANONYMOUS | map::FIXED_NOREPLACE);
    must(sys, findings, gva, gva, mapped);
}

/// A process on the leader's CPU without A, which maps one of its own when the leader yields to it.
fn mapper<S: Sys>(sys: &S, shared: &Shared) -> Option<u64> {
    let bytes = shared.bytes();
    let child = sys.fork(move |sys| {
        let findings = Findings::default();
        let _ = sys.munmap(SUBJECT_GVA, bytes);
        sys.yield_now();
        map_at(sys, &findings, SUBJECT_GVA, bytes);
        sys.yield_now();
        findings.status()
    });
    // It has unmapped its copy of A when this returns.
    sys.yield_now();
    must(sys, &shared.findings, 0, 0, child.map(|_| 0));
    child.ok()
}

/// The call that is raced with.
fn lead<S: Sys>(sys: &S, shared: &Shared) {
    let (findings, bytes) = (&shared.findings, shared.bytes());
    // The other thread may go first without being preferred.
    sys.relax();
    let result = match shared.test {
        Test::Protect => sys.mprotect(SUBJECT_GVA, bytes, prot::READ),
        Test::Tree => sys.munmap(LOWEST, SUBJECT_GVA - LOWEST),
        Test::Recycle => sys.munmap(SUBJECT_GVA, bytes),
    };
    if must(sys, findings, SUBJECT_GVA, 0, result) {
        shared.done.store(1, Ordering::Release);
    }
    if shared.test == Test::Recycle {
        sys.yield_now();
        // The process lives on as long as this thread does not give way.
        while shared.over.load(Ordering::Acquire) == 0 {
            sys.relax();
        }
    }
}

fn other<S: Sys>(sys: &S, shared: &Shared, _index: usize) {
    let findings = &shared.findings;
    shared.ready.store(1, Ordering::Release);
    while shared.go.load(Ordering::Acquire) == 0 {
        sys.yield_now();
    }
    for gva in shared.untouched() {
        let over = shared.done.load(Ordering::Acquire) != 0;
        if shared.test == Test::Protect {
            if sys.write(gva, gva).is_ok() && over {
                findings.report(sys, WrongPermission, gva, 0, gva);
            }
            continue;
        }
        let gone = over && shared.test == Test::Recycle;
        match sys.read(gva) {
            Ok(0) if !gone => {}
            Ok(found) => findings.report(sys, ForeignFrame, gva, 0, found),
            Err(_) if shared.test == Test::Recycle => {}
            Err(_) => findings.report(sys, WrongPermission, gva, 0, 0),
        }
    }
    shared.over.store(1, Ordering::Release);
}

#[cfg(test)]
mod tests {
    use crate::broken::{Fault, assert_caught};
    use crate::native;
    use abi::channel::ReportKind::{ForeignFrame, WrongPermission};

    #[test]
    fn linux_is_clean() {
        for test in ["protect", "tree", "recycle"] {
            let outcome = native::run("vma", &format!("test={test}\0pages=50"), None).unwrap();
            assert_eq!((outcome.reports, outcome.status), (vec![], 0), "{test}");
        }
    }

    #[test]
    fn calls_without_an_effect_are_caught() {
        let protect = "test=protect\0pages=64";
        assert_caught(Fault::MprotectIgnored, "vma", protect, WrongPermission);
        let recycle = "test=recycle\0pages=64";
        assert_caught(Fault::MunmapIgnored, "vma", recycle, ForeignFrame);
    }
}
