//! System calls: Linux's numbers, flags and errno for x86-64, and the testbed's own in a range that
//! Linux does not use.

macro_rules! numbers {
    ($($(#[$doc:meta])* $name:ident = $value:expr;)+) => {
        $($(#[$doc])* pub const $name: u64 = $value;)+

        /// Every call that the kernel has, by its name.
        pub const ALL: &[(&str, u64)] = &[$((stringify!($name), $name),)+];
    };
}

/// System call numbers.
#[allow(missing_docs)] // Linux's own names; see man 2.
pub mod nr {
    /// First of the testbed's own calls.
    pub const TESTBED_BASE: u64 = 0x5354_0000;

    numbers! {
        WRITE = 1;
        MMAP = 9;
        MPROTECT = 10;
        MUNMAP = 11;
        BRK = 12;
        SCHED_YIELD = 24;
        MREMAP = 25;
        MADVISE = 28;
        GETPID = 39;
        CLONE = 56;
        FORK = 57;
        EXIT = 60;
        WAIT4 = 61;
        GETTID = 186;
        FUTEX = 202;
        SCHED_SETAFFINITY = 203;
        SCHED_GETAFFINITY = 204;
        EXIT_GROUP = 231;
        GETCPU = 309;
        /// `report(kind, gva, expected, found)`: tells the host of a wrong value
        /// ([`crate::channel::ReportKind`]). Returns 0.
        TESTBED_REPORT = TESTBED_BASE;
        /// `fault_fixup(start, end, fixup)`: for the calling process, a fault that would kill a task whose
        /// instruction pointer lies in `start..end` continues at `fixup` with `rax` = -EFAULT instead.
        TESTBED_FAULT_FIXUP = TESTBED_BASE + 1;
        /// `nr_cpus()`: CPUs of this machine.
        TESTBED_NR_CPUS = TESTBED_BASE + 2;
        /// `crash(how)`: the kernel fails as [`super::crash`] says, so that the host's report of it can be
        /// seen. Never returns; EINVAL for another `how`, ENOSYS in a kernel built without the testbed.
        TESTBED_CRASH = TESTBED_BASE + 3;
        /// `tlb()`: how memory under test is to be reached: 0 by the processor, 1 by `TESTBED_LOAD` and
        /// `TESTBED_STORE`, 2 by both.
        TESTBED_TLB = TESTBED_BASE + 4;
        /// `load(gva)`: the 8 aligned bytes at `gva` through the soft TLB, in `rdx`. In `rax` 0, or 1 where
        /// the translation is no longer what the page tables say; -EFAULT where the access faults for
        /// good; -EAGAIN where a fault was handled and the call is to be made again.
        TESTBED_LOAD = TESTBED_BASE + 5;
        /// `store(gva, value)`: likewise.
        TESTBED_STORE = TESTBED_BASE + 6;
        /// `relax()`: one turn of a program's spin loop ([`crate::point::Point::UserRelax`]).
        TESTBED_RELAX = TESTBED_BASE + 7;
        /// `begin()`: the set-up is over ([`crate::point::Point::TestBegin`]).
        TESTBED_BEGIN = TESTBED_BASE + 8;
        /// `end()`: the test is over ([`crate::point::Point::TestEnd`]).
        TESTBED_END = TESTBED_BASE + 9;
        /// `wire(start, len)`: populates whole mapped pages and marks them
        /// [`crate::objects::vma_flags::WIRED`]. Nothing with `tlb=hw`.
        TESTBED_WIRE = TESTBED_BASE + 10;
        /// `peek(pid, gva)`: the 8 aligned bytes at `gva` of process `pid`, by a walk of its page tables under
        /// RCU, without its mmap_lock and whatever it does meanwhile. ESRCH where there is no such
        /// process, EFAULT where the page is not present. A value that looks like an errno is taken
        /// for one.
        TESTBED_PEEK = TESTBED_BASE + 11;
    }
}

/// Ways to fail on request ([`nr::TESTBED_CRASH`]).
pub mod crash {
    /// The kernel panics.
    pub const PANIC: u64 = 0;
    /// The kernel loads from [`WILD_GVA`].
    pub const WILD: u64 = 1;
    /// The kernel spins for ever with interrupts off.
    pub const HANG: u64 = 2;
    /// Canonical, in the kernel's half, never mapped, and easy to recognise in a report.
    pub const WILD_GVA: u64 = 0xffff_dead_0000_0000;
}

macro_rules! errnos {
    ($($name:ident = $value:literal;)+) => {
        /// An error number (Linux's `errno-base.h`), positive; a call returns it negated.
        #[derive(Clone, Copy, PartialEq, Eq, Hash)]
        pub struct Errno(pub i64);

        #[allow(missing_docs)]
        impl Errno {
            $(pub const $name: Errno = Errno($value);)+

            /// The symbolic name, where the kernel knows it.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 { $($value => Some(stringify!($name)),)+ _ => None }
            }
        }
    };
}

errnos! {
    EPERM = 1;
    ESRCH = 3;
    EINTR = 4;
    EBADF = 9;
    ECHILD = 10;
    EAGAIN = 11;
    ENOMEM = 12;
    EACCES = 13;
    EFAULT = 14;
    EEXIST = 17;
    ENODEV = 19;
    EINVAL = 22;
    ENOSYS = 38;
    ETIMEDOUT = 110;
}

impl core::fmt::Debug for Errno {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "errno {}", self.0),
        }
    }
}

impl core::fmt::Display for Errno {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Debug::fmt(self, f)
    }
}

/// The register value of a system call's result.
#[must_use]
pub const fn encode(result: Result<u64, Errno>) -> u64 {
    match result {
        Ok(value) => value,
        Err(errno) => (-errno.0).cast_unsigned(),
    }
}

/// The result that a register value encodes.
///
/// # Errors
/// The errno of a value in Linux's error range, -4095 to -1.
pub const fn decode(value: u64) -> Result<u64, Errno> {
    let signed = value.cast_signed();
    if signed < 0 && signed >= -4095 {
        Err(Errno(-signed))
    } else {
        Ok(value)
    }
}

/// Protection bits of mmap and mprotect.
#[allow(missing_docs)]
pub mod prot {
    pub const NONE: u64 = 0;
    pub const READ: u64 = 1;
    pub const WRITE: u64 = 2;
    pub const EXEC: u64 = 4;
}

/// Flags of mmap.
#[allow(missing_docs)]
pub mod map {
    pub const SHARED: u64 = 0x01;
    pub const PRIVATE: u64 = 0x02;
    pub const TYPE: u64 = 0x0f;
    pub const FIXED: u64 = 0x10;
    pub const ANONYMOUS: u64 = 0x20;
    pub const GROWSDOWN: u64 = 0x100;
    pub const DENYWRITE: u64 = 0x800;
    pub const EXECUTABLE: u64 = 0x1000;
    pub const LOCKED: u64 = 0x2000;
    pub const NORESERVE: u64 = 0x4000;
    pub const POPULATE: u64 = 0x8000;
    pub const NONBLOCK: u64 = 0x1_0000;
    pub const STACK: u64 = 0x2_0000;
    pub const HUGETLB: u64 = 0x4_0000;
    pub const FIXED_NOREPLACE: u64 = 0x10_0000;
}

/// Advice of madvise.
#[allow(missing_docs)]
pub mod advice {
    pub const NORMAL: u64 = 0;
    pub const RANDOM: u64 = 1;
    pub const SEQUENTIAL: u64 = 2;
    pub const WILLNEED: u64 = 3;
    pub const DONTNEED: u64 = 4;
}

/// Flags of clone that the kernel understands.
#[allow(missing_docs)]
pub mod clone {
    pub const VM: u64 = 0x100;
    pub const FS: u64 = 0x200;
    pub const FILES: u64 = 0x400;
    pub const SIGHAND: u64 = 0x800;
    pub const THREAD: u64 = 0x1_0000;
    pub const SYSVSEM: u64 = 0x4_0000;
    pub const SETTLS: u64 = 0x8_0000;
    pub const PARENT_SETTID: u64 = 0x10_0000;
    pub const CHILD_CLEARTID: u64 = 0x20_0000;
    pub const CHILD_SETTID: u64 = 0x100_0000;
}

/// Operations of futex.
#[allow(missing_docs)]
pub mod futex {
    pub const WAIT: u64 = 0;
    pub const WAKE: u64 = 1;
    pub const PRIVATE_FLAG: u64 = 128;
}

/// Options of wait4, and the wait statuses that it gives.
pub mod wait {
    /// Return 0 where no child has exited yet.
    pub const WNOHANG: u64 = 1;

    /// Status of a process that exited with `code`.
    #[must_use]
    pub const fn exited(code: u64) -> u32 {
        (code as u32 & 0xff) << 8
    }
    /// Status of a process that `signal` killed.
    #[must_use]
    pub const fn signaled(signal: u64) -> u32 {
        signal as u32 & 0x7f
    }
    /// The status as a shell shows it: the exit code, or 128 plus the signal.
    #[must_use]
    pub const fn shell(status: u32) -> u32 {
        match status & 0x7f {
            0 => status >> 8 & 0xff,
            signal => 128 + signal,
        }
    }
}

/// Signals that appear in wait statuses.
#[allow(missing_docs)]
pub mod signal {
    pub const SIGILL: u64 = 4;
    pub const SIGTRAP: u64 = 5;
    pub const SIGFPE: u64 = 8;
    pub const SIGKILL: u64 = 9;
    pub const SIGSEGV: u64 = 11;
    pub const SIGCHLD: u64 = 17;
}
