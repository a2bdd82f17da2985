//! `smoke`: every system call once, on its good path and with each mistake that a caller can make.
//!
//! The expected results are Linux's. A wrong result, a value that does not survive, an access that is
//! permitted against the VMA's protection: each prints a line and is reported (`WrongResult`,
//! `ChangedUnderneath`, `WrongPermission`).

use core::sync::atomic::{AtomicU64, Ordering};

use abi::channel::ReportKind::{ChangedUnderneath, WrongPermission, WrongResult};
use abi::layout::{PAGE_SIZE, USER_END};
use abi::syscall::{Errno, advice, encode, futex, map, membarrier, nr, prot};

use super::{Data, Program, SUBJECT_GVA};
use crate::sys::{ANONYMOUS, Sys, print_line};
use crate::team::{Findings, MAX_MEMBERS, team};

pub(super) const PROGRAM: Program = Program {
    name: "smoke",
    help: "every system call once, on its good path and with each mistake",
    args: &[],
    data: Data::Ignored,
    has_setup: false,
};

const RW: u64 = prot::READ | prot::WRITE;

struct Check<'a, S> {
    sys: &'a S,
    findings: Findings,
    checks: AtomicU64,
}

impl<S: Sys> Check<'_, S> {
    /// The call that `what` describes had to return `expected`.
    fn gives(&self, what: &str, expected: Result<u64, Errno>, found: Result<u64, Errno>) -> bool {
        self.checks.fetch_add(1, Ordering::Relaxed);
        if expected != found {
            let text = format_args!("smoke: {what}: expected {expected:x?}, found {found:x?}");
            print_line(self.sys, text);
            self.findings
                .report(self.sys, WrongResult, 0, encode(expected), encode(found));
        }
        expected == found
    }

    /// What `what` describes had to be true.
    fn holds(&self, what: &str, truth: bool) -> bool {
        self.gives(what, Ok(1), Ok(truth.into()))
    }

    /// A page for what system calls read and write: every executor can reach it, where a program's own memory
    /// may lie anywhere.
    fn scratch(&self) -> u64 {
        let page = self.sys.mmap_anonymous(PAGE_SIZE);
        self.holds("a page", page.is_ok());
        page.unwrap_or(0)
    }

    fn reads(&self, gva: u64, expected: u64) {
        self.checks.fetch_add(1, Ordering::Relaxed);
        match self.sys.read(gva) {
            Ok(found) if found == expected => {}
            Ok(found) => self
                .findings
                .report(self.sys, ChangedUnderneath, gva, expected, found),
            Err(_) => self
                .findings
                .report(self.sys, WrongPermission, gva, expected, 0),
        }
    }

    fn writes(&self, gva: u64, value: u64) {
        self.checks.fetch_add(1, Ordering::Relaxed);
        if self.sys.write(gva, value).is_err() {
            self.findings
                .report(self.sys, WrongPermission, gva, value, 0);
        }
    }

    fn refuses_reads(&self, gva: u64) {
        self.checks.fetch_add(1, Ordering::Relaxed);
        if let Ok(found) = self.sys.read(gva) {
            self.findings
                .report(self.sys, WrongPermission, gva, 0, found);
        }
    }

    fn refuses_writes(&self, gva: u64) {
        self.checks.fetch_add(1, Ordering::Relaxed);
        if self.sys.write(gva, gva).is_ok() {
            self.findings.report(self.sys, WrongPermission, gva, 0, gva);
        }
    }
}

pub(super) fn run<S: Sys>(sys: &S) -> i32 {
    let check = Check {
        sys,
        findings: Findings::default(),
        checks: AtomicU64::new(0),
    };
    mmap(&check);
    munmap(&check);
    mprotect(&check);
    madvise(&check);
    brk(&check);
    futexes(&check);
    identity(&check);
    affinity(&check);
    fork(&check);
    threads(&check);
    print_line(
        sys,
        format_args!("smoke: {} checks", check.checks.load(Ordering::Relaxed)),
    );
    check.findings.status()
}

fn mmap<S: Sys>(check: &Check<'_, S>) {
    let sys = check.sys;
    let einval = Err(Errno::EINVAL);
    check.gives("mmap of 0 bytes", einval, sys.mmap(0, 0, RW, ANONYMOUS));
    check.gives(
        "mmap without a type",
        einval,
        sys.mmap(0, PAGE_SIZE, RW, map::ANONYMOUS),
    );
    let unaligned = sys.mmap(SUBJECT_GVA + 1, PAGE_SIZE, RW, ANONYMOUS | map::FIXED);
    check.gives("fixed mmap at an unaligned address", einval, unaligned);
    let huge = sys.mmap(0, USER_END, RW, ANONYMOUS | map::NORESERVE);
    check.gives(
        "mmap of more than the address space",
        Err(Errno::ENOMEM),
        huge,
    );
    let beyond = sys.mmap(USER_END, PAGE_SIZE, RW, ANONYMOUS | map::FIXED);
    check.gives(
        "fixed mmap past the address space",
        Err(Errno::ENOMEM),
        beyond,
    );
    let no_file = sys.mmap(0, PAGE_SIZE, RW, map::PRIVATE);
    check.gives("mmap of file -1", Err(Errno::EBADF), no_file);

    let fixed = ANONYMOUS | map::FIXED_NOREPLACE;
    let base = SUBJECT_GVA;
    check.gives(
        "mmap where nothing is",
        Ok(base),
        sys.mmap(base, 4 * PAGE_SIZE, RW, fixed),
    );
    let twice = sys.mmap(base + 3 * PAGE_SIZE, 2 * PAGE_SIZE, RW, fixed);
    check.gives(
        "mmap over a mapping, not to replace",
        Err(Errno::EEXIST),
        twice,
    );
    for page in 0..4 {
        check.reads(base + page * PAGE_SIZE, 0);
        check.writes(base + page * PAGE_SIZE + 8, page);
    }
    let middle = base + PAGE_SIZE;
    let replaced = sys.mmap(middle, PAGE_SIZE, RW, ANONYMOUS | map::FIXED);
    check.gives("mmap over a mapping, to replace", Ok(middle), replaced);
    check.reads(middle + 8, 0);
    check.reads(middle + PAGE_SIZE + 8, 2);
    check.gives(
        "munmap of three VMAs",
        Ok(0),
        sys.munmap(base, 4 * PAGE_SIZE),
    );
    check.refuses_reads(middle);

    if let Ok(chosen) = sys.mmap_anonymous(1) {
        check.holds(
            "an address that mmap chose is aligned",
            chosen.is_multiple_of(PAGE_SIZE),
        );
        check.reads(chosen + PAGE_SIZE - 8, 0);
        check.gives("munmap of 1 byte", Ok(0), sys.munmap(chosen, 1));
        check.refuses_writes(chosen);
    } else {
        check.holds("mmap of 1 byte", false);
    }
    check.refuses_reads(0);
    check.refuses_writes(USER_END);
}

fn munmap<S: Sys>(check: &Check<'_, S>) {
    let sys = check.sys;
    let base = SUBJECT_GVA;
    check.gives(
        "munmap, unaligned",
        Err(Errno::EINVAL),
        sys.munmap(base + 8, PAGE_SIZE),
    );
    check.gives("munmap of 0 bytes", Err(Errno::EINVAL), sys.munmap(base, 0));
    check.gives(
        "munmap past the address space",
        Err(Errno::EINVAL),
        sys.munmap(base, USER_END),
    );
    check.gives("munmap of nothing", Ok(0), sys.munmap(base, PAGE_SIZE));

    let mapped = sys.mmap(base, 5 * PAGE_SIZE, RW, ANONYMOUS | map::FIXED);
    check.gives("fixed mmap", Ok(base), mapped);
    let page = |index: u64| base + index * PAGE_SIZE;
    (0..5).for_each(|index| check.writes(page(index), index + 1));
    check.gives(
        "munmap of the middle",
        Ok(0),
        sys.munmap(page(2), PAGE_SIZE),
    );
    check.gives("munmap of the head", Ok(0), sys.munmap(page(0), PAGE_SIZE));
    check.gives("munmap of the tail", Ok(0), sys.munmap(page(4), PAGE_SIZE));
    for index in [0, 2, 4] {
        check.refuses_reads(page(index));
    }
    check.reads(page(1), 2);
    check.reads(page(3), 4);
    check.gives(
        "munmap across holes",
        Ok(0),
        sys.munmap(base, 5 * PAGE_SIZE),
    );
    check.refuses_reads(page(1));
}

fn mprotect<S: Sys>(check: &Check<'_, S>) {
    let sys = check.sys;
    let base = SUBJECT_GVA;
    let mapped = sys.mmap(base, 3 * PAGE_SIZE, RW, ANONYMOUS | map::FIXED);
    check.gives("fixed mmap", Ok(base), mapped);
    let page = |index: u64| base + index * PAGE_SIZE;
    (0..3).for_each(|index| check.writes(page(index), index + 1));
    let unaligned = sys.mprotect(base + 8, PAGE_SIZE, RW);
    check.gives("mprotect, unaligned", Err(Errno::EINVAL), unaligned);
    check.gives("mprotect of 0 bytes", Ok(0), sys.mprotect(base, 0, RW));
    let hole = sys.mprotect(base, 4 * PAGE_SIZE, RW);
    check.gives("mprotect across a hole", Err(Errno::ENOMEM), hole);

    check.gives(
        "mprotect to read-only",
        Ok(0),
        sys.mprotect(page(1), PAGE_SIZE, prot::READ),
    );
    check.refuses_writes(page(1));
    check.reads(page(1), 2);
    check.writes(page(0), 1);
    check.writes(page(2), 3);
    check.gives(
        "mprotect to nothing",
        Ok(0),
        sys.mprotect(page(1), PAGE_SIZE, prot::NONE),
    );
    check.refuses_reads(page(1));
    let gives_cpu = || sys.syscall(nr::GETCPU, [page(1), 0, 0, 0, 0, 0]);
    check.gives(
        "getcpu to memory without access",
        Err(Errno::EFAULT),
        gives_cpu(),
    );
    let mask = || sys.syscall(nr::SCHED_SETAFFINITY, [0, 8, page(1), 0, 0, 0]);
    check.gives(
        "sched_setaffinity from memory without access",
        Err(Errno::EFAULT),
        mask(),
    );
    check.gives(
        "mprotect to writable",
        Ok(0),
        sys.mprotect(base, 3 * PAGE_SIZE, RW),
    );
    check.reads(page(1), 2);
    check.writes(page(1), 4);
    check.reads(page(1), 4);
    check.gives("munmap", Ok(0), sys.munmap(base, 3 * PAGE_SIZE));
}

fn madvise<S: Sys>(check: &Check<'_, S>) {
    let sys = check.sys;
    let base = SUBJECT_GVA;
    let mapped = sys.mmap(base, 2 * PAGE_SIZE, RW, ANONYMOUS | map::FIXED);
    check.gives("fixed mmap", Ok(base), mapped);
    check.writes(base, 1);
    check.writes(base + PAGE_SIZE, 2);
    check.gives(
        "DONTNEED",
        Ok(0),
        sys.madvise(base, PAGE_SIZE, advice::DONTNEED),
    );
    check.reads(base, 0);
    check.reads(base + PAGE_SIZE, 2);
    check.gives(
        "DONTNEED of 0 bytes",
        Ok(0),
        sys.madvise(base, 0, advice::DONTNEED),
    );
    let hole = sys.madvise(base + PAGE_SIZE, 2 * PAGE_SIZE, advice::DONTNEED);
    check.gives("DONTNEED across a hole", Err(Errno::ENOMEM), hole);
    check.reads(base + PAGE_SIZE, 0);
    let unaligned = sys.madvise(base + 8, PAGE_SIZE, advice::DONTNEED);
    check.gives("DONTNEED, unaligned", Err(Errno::EINVAL), unaligned);
    let unknown = sys.madvise(base, PAGE_SIZE, 9999);
    check.gives("unknown advice", Err(Errno::EINVAL), unknown);
    check.gives("munmap", Ok(0), sys.munmap(base, 2 * PAGE_SIZE));
}

fn brk<S: Sys>(check: &Check<'_, S>) {
    let sys = check.sys;
    let Ok(start) = sys.brk(0) else {
        check.holds("brk(0)", false);
        return;
    };
    let heap = start.next_multiple_of(PAGE_SIZE);
    let end = heap + 3 * PAGE_SIZE;
    check.gives("brk grows", Ok(end), sys.brk(end));
    for page in 0..3 {
        check.reads(heap + page * PAGE_SIZE, 0);
        check.writes(heap + page * PAGE_SIZE, page + 1);
    }
    let shrunk = heap + PAGE_SIZE;
    check.gives("brk shrinks", Ok(shrunk), sys.brk(shrunk));
    check.reads(heap, 1);
    check.refuses_reads(shrunk);
    check.gives("brk below the heap", Ok(shrunk), sys.brk(PAGE_SIZE));
    check.gives("brk past the address space", Ok(shrunk), sys.brk(USER_END));
    check.gives("brk grows again", Ok(end), sys.brk(end));
    check.reads(shrunk, 0);
    check.gives("brk back to the start", Ok(start), sys.brk(start));
}

fn futexes<S: Sys>(check: &Check<'_, S>) {
    let sys = check.sys;
    let address = check.scratch();
    check.writes(address, 7);
    let call = |gva, operation, value| sys.syscall(nr::FUTEX, [gva, operation, value, 0, 0, 0]);
    check.gives(
        "futex wait, other value",
        Err(Errno::EAGAIN),
        call(address, futex::WAIT, 8),
    );
    check.gives("futex wake of nobody", Ok(0), call(address, futex::WAKE, 1));
    check.gives(
        "futex, unaligned",
        Err(Errno::EINVAL),
        call(address + 1, futex::WAIT, 7),
    );
    // A value that is not there: if something is mapped by mistake, this must not sleep.
    let never = 0xdead_beef;
    check.gives(
        "futex, unmapped",
        Err(Errno::EFAULT),
        call(SUBJECT_GVA, futex::WAIT, never),
    );
    check.gives("munmap", Ok(0), sys.munmap(address, PAGE_SIZE));
}

fn identity<S: Sys>(check: &Check<'_, S>) {
    let sys = check.sys;
    check.gives("getpid, twice", sys.getpid(), sys.getpid());
    check.holds("gettid", sys.gettid().is_ok_and(|tid| tid > 0));
    check.gives("sched_yield", Ok(0), sys.syscall(nr::SCHED_YIELD, [0; 6]));
    let unknown = sys.syscall(nr::TESTBED_BASE + 0xfff, [0; 6]);
    check.gives("an unknown system call", Err(Errno::ENOSYS), unknown);
    let address = check.scratch();
    let bad_file = sys.syscall(nr::WRITE, [9999, address, 1, 0, 0, 0]);
    check.gives("write to file 9999", Err(Errno::EBADF), bad_file);
    check.gives("munmap", Ok(0), sys.munmap(address, PAGE_SIZE));
}

fn affinity<S: Sys>(check: &Check<'_, S>) {
    let sys = check.sys;
    for cpu in 0..sys.nr_cpus() {
        check.gives(
            "sched_setaffinity",
            Ok(0),
            sys.set_affinity(cpu).map(|()| 0),
        );
        check.gives(
            "getcpu",
            Ok(cpu as u64),
            sys.current_cpu().map(|cpu| cpu as u64),
        );
    }
    let address = check.scratch();
    check.writes(address, 0);
    let set = |gva| sys.syscall(nr::SCHED_SETAFFINITY, [0, 8, gva, 0, 0, 0]);
    check.gives(
        "sched_setaffinity to no CPU",
        Err(Errno::EINVAL),
        set(address),
    );
    check.gives(
        "sched_setaffinity, bad pointer",
        Err(Errno::EFAULT),
        set(SUBJECT_GVA),
    );
    // Room for Linux's largest configurations.
    let room = 1024;
    let get = |gva, bytes| sys.syscall(nr::SCHED_GETAFFINITY, [0, bytes, gva, 0, 0, 0]);
    let bytes = get(address, room);
    check.holds("sched_getaffinity", bytes.is_ok_and(|bytes| bytes >= 8));
    let words = (0..bytes.unwrap_or(0)).step_by(8);
    let masks = words.map(|offset| sys.read(address + offset).unwrap_or(0));
    let allowed: u32 = masks.map(u64::count_ones).sum();
    check.gives(
        "CPUs that are allowed to a pinned thread",
        Ok(1),
        Ok(allowed.into()),
    );
    check.gives(
        "sched_getaffinity of 4 bytes",
        Err(Errno::EINVAL),
        get(address, 4),
    );
    let bad_pointer = get(SUBJECT_GVA, room);
    check.gives(
        "sched_getaffinity, bad pointer",
        Err(Errno::EFAULT),
        bad_pointer,
    );
    check.gives("munmap", Ok(0), sys.munmap(address, PAGE_SIZE));
}

/// What a child exits with.
const CHILD_STATUS: i32 = 42;

fn fork<S: Sys>(check: &Check<'_, S>) {
    let sys = check.sys;
    let base = SUBJECT_GVA;
    let mapped = sys.mmap(base, PAGE_SIZE, RW, ANONYMOUS | map::FIXED);
    check.gives("fixed mmap", Ok(base), mapped);
    check.writes(base, 1);
    let parent = sys.getpid();
    let child = sys.fork(|sys| {
        check.holds("the child's pid is its own", sys.getpid() != parent);
        check.reads(base, 1);
        check.writes(base, 2);
        check.reads(base, 2);
        check.gives(
            "wait without a child",
            Err(Errno::ECHILD),
            wait(sys, u64::MAX),
        );
        if check.findings.status() == 0 {
            CHILD_STATUS
        } else {
            1
        }
    });
    match child {
        Ok(pid) => {
            check.holds("the parent's pid is another", Ok(pid) != parent);
            check.writes(base + 8, 3);
            let status = sys.wait(pid).map(|status| status.0.into());
            check.gives(
                "status of the child",
                Ok((CHILD_STATUS as u64) << 8),
                status,
            );
            check.gives("wait for it again", Err(Errno::ECHILD), wait(sys, pid));
        }
        Err(errno) => {
            check.gives("fork", Ok(1), Err(errno));
        }
    }
    check.reads(base, 1);
    check.reads(base + 8, 3);
    check.gives("munmap", Ok(0), sys.munmap(base, PAGE_SIZE));
}

fn wait<S: Sys>(sys: &S, pid: u64) -> Result<u64, Errno> {
    sys.syscall(nr::WAIT4, [pid, 0, 0, 0, 0, 0])
}

struct Shared {
    pid: Result<u64, Errno>,
    tids: [AtomicU64; MAX_MEMBERS],
    cpus: [AtomicU64; MAX_MEMBERS],
}

/// One thread for each CPU; each maps memory of its own, and writes its page of a common mapping.
fn threads<S: Sys>(check: &Check<'_, S>) {
    let sys = check.sys;
    let members = sys.nr_cpus().min(MAX_MEMBERS);
    let bytes = members as u64 * PAGE_SIZE;
    let mapped = sys.mmap(SUBJECT_GVA, bytes, RW, ANONYMOUS | map::FIXED);
    check.gives("fixed mmap", Ok(SUBJECT_GVA), mapped);
    let shared = Shared {
        pid: sys.getpid(),
        tids: Default::default(),
        cpus: Default::default(),
    };
    let started = team(sys, &shared, members, member, || ());
    check.gives("threads on all CPUs", Ok(0), started.map(|()| 0));
    for index in 0..members {
        let tid = shared.tids[index].load(Ordering::Relaxed);
        let cpu = shared.cpus[index].load(Ordering::Relaxed);
        check.reads(SUBJECT_GVA + index as u64 * PAGE_SIZE, tid);
        check.gives("CPU of a pinned thread", Ok(index as u64), Ok(cpu));
        check.holds("a thread's steps", tid != 0);
        let same = shared.tids[..index]
            .iter()
            .any(|other| other.load(Ordering::Relaxed) == tid);
        check.holds("thread ids differ", !same);
    }
    check.gives("munmap", Ok(0), sys.munmap(SUBJECT_GVA, bytes));
}

/// Leaves its thread id, or 0 where a step went wrong.
fn member<S: Sys>(sys: &S, shared: &Shared, index: usize) {
    let steps = || -> Result<u64, Errno> {
        sys.set_affinity(index)?;
        shared.cpus[index].store(sys.current_cpu()? as u64, Ordering::Relaxed);
        let own = sys.mmap_anonymous(PAGE_SIZE)?;
        let kept = sys.write(own, 5).is_ok() && sys.read(own) == Ok(5);
        sys.munmap(own, PAGE_SIZE)?;
        sys.membarrier(membarrier::REGISTER_PRIVATE_EXPEDITED)?;
        sys.membarrier(membarrier::PRIVATE_EXPEDITED)?;
        // A Linux with nohz_full has none.
        if sys.membarrier(membarrier::QUERY)? & membarrier::GLOBAL != 0 {
            sys.membarrier(membarrier::GLOBAL)?;
        }
        let tid = sys.gettid()?;
        let written = sys
            .write(SUBJECT_GVA + index as u64 * PAGE_SIZE, tid)
            .is_ok();
        let right = kept && written && sys.getpid() == shared.pid;
        Ok(if right { tid } else { 0 })
    };
    shared.tids[index].store(steps().unwrap_or(0), Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use crate::broken::{Broken, Fault};
    use crate::native;
    use abi::channel::ReportKind::{ChangedUnderneath, WrongPermission, WrongResult};
    use abi::syscall::{Errno, nr};

    #[test]
    fn linux_is_clean() {
        let outcome = native::run("smoke", "", None).unwrap();
        assert_eq!(outcome.reports, [], "{}", outcome.text);
        assert_eq!(outcome.status, 0);
        assert!(outcome.text.contains("checks\n"), "{}", outcome.text);
    }

    #[test]
    fn each_broken_call_is_caught() {
        let cases = [
            (Fault::MunmapIgnored, WrongPermission),
            (Fault::MprotectIgnored, WrongPermission),
            (Fault::MadviseIgnored, ChangedUnderneath),
            (Fault::PrivateIsShared, ChangedUnderneath),
            (Fault::Fails(nr::FORK, Errno::ENOSYS), WrongResult),
            (
                Fault::Fails(nr::SCHED_GETAFFINITY, Errno::ENOSYS),
                WrongResult,
            ),
            (Fault::Fails(nr::FUTEX, Errno::ENOSYS), WrongResult),
        ];
        for (fault, kind) in cases {
            let outcome = native::run_on(|native| Broken::new(native, fault), "smoke", "", None);
            let outcome = outcome.unwrap();
            assert_eq!(outcome.status, 1, "{fault:?}");
            let caught = outcome.reports.iter().any(|report| report.kind == kind);
            assert!(caught, "{fault:?}: {outcome:?}");
        }
    }
}
