//! Kernels that are wrong on purpose, to see that the programs notice: a wrapper around an executor
//! that changes what some system calls do.
#![allow(unsafe_code, reason = "arguments of threads are addresses")]

use std::sync::atomic::{AtomicU64, Ordering};

use abi::channel::ReportKind;
use abi::layout::PAGE_SIZE;
use abi::oracle::Area;
use abi::syscall::{Errno, map, nr};

use crate::native;
use crate::sys::{self, Sys, Thread};

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// munmap returns 0 and does nothing.
    MunmapIgnored,
    /// mprotect returns 0 and does nothing.
    MprotectIgnored,
    /// madvise returns 0 and does nothing.
    MadviseIgnored,
    /// fallocate returns 0 and does nothing.
    FallocateIgnored,
    /// ftruncate to nothing returns 0 and does nothing.
    FtruncateIgnored,
    /// mremap to a fixed place returns it and does nothing.
    MremapLeavesItThere,
    /// Private anonymous memory is shared with forked children.
    PrivateIsShared,
    /// munmap of the subject's memory does nothing, and the next anonymous mapping that is not placed
    /// by hand is the subject's own frames: freed frames are reused while translations remain.
    ReuseAliasesSubject,
    /// There are memory groups, and all that they ever count is 0.
    GroupsCountNothing,
    /// The call with this number returns this errno.
    Fails(u64, Errno),
}

/// An executor with a fault.
pub(crate) struct Broken<S> {
    inner: S,
    fault: Fault,
    /// The last range that `ReuseAliasesSubject` did not unmap.
    kept: AtomicU64,
}

struct Entry<S> {
    sys: *const Broken<S>,
    entry: fn(&Broken<S>, u64),
    arg: u64,
}

impl<S: Sys> Broken<S> {
    pub(crate) fn new(inner: S, fault: Fault) -> Self {
        Self {
            inner,
            fault,
            kept: AtomicU64::new(0),
        }
    }
}

impl<S: Sys> Sys for Broken<S> {
    fn syscall(&self, number: u64, mut args: [u64; 6]) -> Result<u64, Errno> {
        match (self.fault, number) {
            (Fault::MunmapIgnored, nr::MUNMAP)
            | (Fault::MprotectIgnored, nr::MPROTECT)
            | (Fault::MadviseIgnored, nr::MADVISE)
            | (Fault::FallocateIgnored, nr::FALLOCATE) => return Ok(0),
            (Fault::MremapLeavesItThere, nr::MREMAP) => return Ok(args[4]),
            (Fault::FtruncateIgnored, nr::FTRUNCATE) if args[1] == 0 => return Ok(0),
            (Fault::PrivateIsShared, nr::MMAP) if args[3] & map::TYPE == map::PRIVATE => {
                args[3] ^= map::TYPE & (map::PRIVATE | map::SHARED);
            }
            (Fault::ReuseAliasesSubject, nr::MUNMAP)
                if args[0] >= 0x2000_0000_0000 && args[0] < 0x2100_0000_0000 =>
            {
                self.kept.store(args[0], Ordering::Relaxed);
                return Ok(0);
            }
            (Fault::ReuseAliasesSubject, nr::MMAP) => {
                let kept = self.kept.swap(0, Ordering::Relaxed);
                if args[0] == 0 && kept != 0 {
                    // The frames that A kept, at A's own address, grown to B's size, as readable and
                    // fresh as a kernel that zeroes what it hands out would make them.
                    let half = args[1] / 2;
                    let grown = [kept + half, half, args[2], args[3] | map::FIXED, args[4], 0];
                    self.inner.syscall(nr::MMAP, grown)?;
                    for gva in (kept..kept + args[1]).step_by(64) {
                        assert_eq!(PAGE_SIZE % 64, 0);
                        self.inner.write(gva, 0).expect("both halves are mapped");
                    }
                    return Ok(kept);
                }
            }
            (Fault::GroupsCountNothing, nr::TESTBED_GROUP_CREATE) => return Ok(1),
            (
                Fault::GroupsCountNothing,
                nr::TESTBED_GROUP_SET_MAX | nr::TESTBED_GROUP_MOVE | nr::TESTBED_GROUP_STAT,
            ) => return Ok(0),
            (Fault::Fails(which, errno), _) if which == number => return Err(errno),
            _ => {}
        }
        self.inner.syscall(number, args)
    }

    fn read(&self, gva: u64) -> Result<u64, sys::Fault> {
        self.inner.read(gva)
    }
    fn write(&self, gva: u64, value: u64) -> Result<(), sys::Fault> {
        self.inner.write(gva, value)
    }

    fn spawn(&self, entry: fn(&Self, u64), arg: u64) -> Result<Thread, Errno> {
        // Leaked: the thread shares the spawner's malloc state and must not free anything.
        let entry = Box::leak(Box::new(Entry {
            sys: self,
            entry,
            arg,
        }));
        let arg = std::ptr::from_ref(entry).expose_provenance() as u64;
        self.inner.spawn(
            |_, arg| {
                let entry = std::ptr::with_exposed_provenance::<Entry<S>>(arg as usize);
                // SAFETY: leaked by `spawn`; the wrapper outlives the threads, which a program joins
                // before it returns.
                let (entry, sys) = unsafe { (&*entry, &*(*entry).sys) };
                (entry.entry)(sys, entry.arg);
            },
            arg,
        )
    }
    fn join(&self, thread: Thread) {
        self.inner.join(thread);
    }
    fn fork(&self, child: impl FnOnce(&Self) -> i32) -> Result<u64, Errno> {
        match self.fault {
            Fault::Fails(nr::FORK, errno) => Err(errno),
            _ => self.inner.fork(|_| child(self)),
        }
    }
    fn words(&self, count: usize) -> Result<&'static [AtomicU64], Errno> {
        self.inner.words(count)
    }
    fn nr_cpus(&self) -> usize {
        self.inner.nr_cpus()
    }
    fn set_affinity(&self, cpu: usize) -> Result<(), Errno> {
        self.inner.set_affinity(cpu)
    }
    fn current_cpu(&self) -> Result<usize, Errno> {
        self.inner.current_cpu()
    }
    fn maps(&self, start: u64, end: u64, areas: &mut [Area]) -> Result<usize, Errno> {
        self.inner.maps(start, end, areas)
    }
    fn print(&self, text: &[u8]) {
        self.inner.print(text);
    }
    fn report(&self, kind: ReportKind, gva: u64, expected: u64, found: u64) {
        self.inner.report(kind, gva, expected, found);
    }
}

/// The program finds `kind` on a kernel with the `fault`. A race shows only where both threads run at once, which a busy
/// host does not give every time.
#[track_caller]
pub(crate) fn assert_caught(fault: Fault, program: &str, args: &str, kind: ReportKind) {
    let broken = |native| Broken::new(native, fault);
    let mut outcome = native::run_on(broken, program, args, None).unwrap();
    for _ in 0..MOST_RUNS {
        if outcome.status != 0 {
            break;
        }
        outcome = native::run_on(broken, program, args, None).unwrap();
    }
    assert_eq!(outcome.status, 1);
    assert!(
        outcome.reports.iter().any(|report| report.kind == kind),
        "{outcome:?}"
    );
}

/// Runs until a race is taken for one that is never caught.
const MOST_RUNS: u32 = 200;
