//! A leader and its threads over shared state, what they found, and how they wait for each other.
#![allow(unsafe_code, reason = "arguments of threads are addresses")]

use core::sync::atomic::{AtomicI64, AtomicU32, Ordering};

use abi::channel::ReportKind;
use abi::syscall::Errno;

use crate::sys::{Sys, Thread};

/// Most threads of a team.
pub(crate) const MAX_MEMBERS: usize = 16;

const WAITING: u32 = 0;
const GO: u32 = 1;
const CANCELLED: u32 = 2;

/// Where members wait until all are where they belong.
#[derive(Default)]
struct Gate {
    state: AtomicU32,
    arrived: AtomicU32,
    /// Of a member that could not be pinned.
    errno: AtomicI64,
}

impl Gate {
    fn cancel(&self) {
        let (new, ordering) = (CANCELLED, Ordering::Release);
        // Only where nobody opened it before.
        let _ = self
            .state
            .compare_exchange(WAITING, new, ordering, Ordering::Relaxed);
    }
}

struct Start<'a, S, T> {
    shared: &'a T,
    member: fn(&S, &T, usize),
    index: usize,
    gate: &'a Gate,
}

/// Joins what it holds when it goes out of scope, also by a panic of the leader in a test.
struct Joiner<'a, S: Sys> {
    sys: &'a S,
    threads: [Option<Thread>; MAX_MEMBERS],
    gate: &'a Gate,
}

impl<S: Sys> Drop for Joiner<'_, S> {
    fn drop(&mut self) {
        self.gate.cancel();
        for thread in self.threads.iter().flatten() {
            self.sys.join(*thread);
        }
    }
}

/// Runs `member(shared, 0..members)` on threads of their own and `leader` on this one, all started and each on
/// its CPU ([`cpu_of_member`]) before any goes on. Returns when all have ended, so the leader must make the
/// members end.
///
/// # Errors
/// A thread could not be started or pinned; then neither the leader nor any member has run.
pub(crate) fn team<S: Sys, T: Sync>(
    sys: &S,
    shared: &T,
    members: usize,
    member: fn(&S, &T, usize),
    leader: impl FnOnce(),
) -> Result<(), Errno> {
    assert!(members <= MAX_MEMBERS, "at most {MAX_MEMBERS} members");
    sys.set_affinity(0)?;
    let gate = Gate::default();
    let starts: [Start<'_, S, T>; MAX_MEMBERS] = core::array::from_fn(|index| Start {
        shared,
        member,
        index,
        gate: &gate,
    });
    let mut joiner = Joiner {
        sys,
        threads: [None; MAX_MEMBERS],
        gate: &gate,
    };
    for (start, thread) in starts.iter().zip(&mut joiner.threads).take(members) {
        let arg = core::ptr::from_ref(start).expose_provenance() as u64;
        *thread = Some(sys.spawn(enter::<S, T>, arg)?);
    }
    while gate.arrived.load(Ordering::Acquire) < members as u32 {
        sys.yield_now();
    }
    match gate.errno.load(Ordering::Relaxed) {
        0 => {}
        errno => return Err(Errno(errno)),
    }
    gate.state.store(GO, Ordering::Release);
    leader();
    Ok(())
}

fn enter<S: Sys, T: Sync>(sys: &S, arg: u64) {
    let start = core::ptr::with_exposed_provenance::<Start<'_, S, T>>(arg as usize);
    // SAFETY: `team` passed the address of a `Start<S, T>` on its stack and does not return before
    // `Joiner` has joined this thread; the thread only reads it, and `T` is `Sync`.
    let start = unsafe { &*start };
    if let Err(errno) = sys.set_affinity(cpu_of_member(sys, start.index)) {
        start.gate.errno.store(errno.0, Ordering::Relaxed);
    }
    start.gate.arrived.fetch_add(1, Ordering::Release);
    loop {
        match start.gate.state.load(Ordering::Acquire) {
            WAITING => sys.yield_now(),
            CANCELLED => return,
            _ => break,
        }
    }
    (start.member)(sys, start.shared, start.index);
}

/// CPU for member `index`: the leader has CPU 0 to itself where there are others.
fn cpu_of_member<S: Sys>(sys: &S, index: usize) -> usize {
    match sys.nr_cpus() {
        1 => 0,
        cpus => 1 + index % (cpus - 1),
    }
}

/// Members that have a CPU of their own: as many as the leader leaves, at least one.
pub(crate) fn natural_members<S: Sys>(sys: &S) -> usize {
    (sys.nr_cpus() - 1).clamp(1, MAX_MEMBERS)
}

/// How often who waits lets others have the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// Threads share CPUs: at every turn.
    Crowded,
    /// Each thread has its own: hardly ever. A system call costs as much as thousands of turns, far
    /// more on a host that emulates CPL 0, and holds up those who work in the kernel.
    Roomy,
}

impl Pace {
    /// The pace of a leader with `members` pinned threads.
    pub(crate) fn of<S: Sys>(sys: &S, members: usize) -> Self {
        if members + 1 > sys.nr_cpus() {
            Self::Crowded
        } else {
            Self::Roomy
        }
    }

    /// Passes over a region, or turns of a spin loop, between yields.
    fn interval(self) -> u64 {
        match self {
            Self::Crowded => 1,
            Self::Roomy => 1 << 14,
        }
    }

    /// Yields when it is time to, after pass or turn `count`.
    pub(crate) fn pass<S: Sys>(self, sys: &S, count: u64) {
        if count.is_multiple_of(self.interval()) {
            sys.yield_now();
        } else {
            sys.relax();
        }
    }
}

/// Yields in [`wait_until`] that nobody needs unless a CPU is taken away.
pub(crate) const PATIENCE: u64 = 1000;
/// Yields for which a thread leaves memory alone after it faulted.
pub(crate) const BACK_OFF: u64 = 4;

/// Spins until `done`, for at most `yields` yields.
pub(crate) fn wait_until<S: Sys>(sys: &S, pace: Pace, yields: u64, done: impl Fn() -> bool) {
    for turn in 1..=yields * pace.interval() {
        if done() {
            return;
        }
        pace.pass(sys, turn);
    }
}

/// Counts the reports of a program; after a few more of the same would tell nothing.
#[derive(Default)]
pub(crate) struct Findings(AtomicU32);

impl Findings {
    const ENOUGH: u32 = 8;

    pub(crate) fn report<S: Sys>(
        &self,
        sys: &S,
        kind: ReportKind,
        gva: u64,
        expected: u64,
        found: u64,
    ) {
        if self.0.fetch_add(1, Ordering::Relaxed) < Self::ENOUGH {
            sys.report(kind, gva, expected, found);
        }
    }

    /// True where there is no point in going on.
    pub(crate) fn enough(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= Self::ENOUGH
    }

    /// Waits for a child, whose own reports are out when it exits with 1; any other end but 0 is
    /// reported.
    pub(crate) fn reap<S: Sys>(&self, sys: &S, pid: u64) {
        match sys.wait(pid).map(|status| (status.exited(), status.0)) {
            Ok((Some(0), _)) => {}
            Ok((Some(1), _)) => {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
            Ok((_, status)) => self.report(sys, ReportKind::WrongResult, 0, 0, status.into()),
            Err(errno) => {
                self.report(
                    sys,
                    ReportKind::WrongResult,
                    0,
                    0,
                    abi::syscall::encode(Err(errno)),
                );
            }
        }
    }

    /// The program's exit status: 1 where anything was found.
    pub(crate) fn status(&self) -> i32 {
        i32::from(self.0.load(Ordering::Relaxed) != 0)
    }
}

/// Reports the errno of a call that cannot fail on a correct kernel as what it found.
pub(crate) fn must<S: Sys>(
    sys: &S,
    findings: &Findings,
    gva: u64,
    expected: u64,
    result: Result<u64, Errno>,
) -> bool {
    let found = abi::syscall::encode(result);
    if found != expected {
        findings.report(sys, ReportKind::WrongResult, gva, expected, found);
    }
    found == expected
}
