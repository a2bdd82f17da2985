//! What a program can ask for.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use abi::channel::ReportKind;
use abi::syscall::{Errno, futex, map, nr, prot};

/// Why an access to memory under test did not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The address.
    pub gva: u64,
}

/// A thread that was spawned and not yet joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thread(pub u64);

/// Bytes of a thread's stack, above its guard page.
pub const STACK_BYTES: u64 = 32 << 10;

/// How a child ended (the status word of wait4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitStatus(pub u32);

impl WaitStatus {
    /// The exit status, unless a signal ended the child.
    #[must_use]
    pub fn exited(self) -> Option<u32> {
        (self.0 & 0x7f == 0).then_some(self.0 >> 8 & 0xff)
    }
}

/// An executor of programs: Linux's system calls, memory under test, threads and processes.
///
/// Addresses of memory under test are plain numbers, reached by [`Sys::read`] and [`Sys::write`]
/// only; a program's own state is ordinary Rust memory. Threads of a process share both; a forked
/// process has its own copy of both.
///
/// No thread is preempted by another in the guest: a loop that waits for somebody calls
/// [`Sys::yield_now`] now and then.
pub trait Sys: Sized + Sync + 'static {
    /// The system call `nr`, raw.
    ///
    /// # Errors
    /// The call's errno.
    fn syscall(&self, nr: u64, args: [u64; 6]) -> Result<u64, Errno>;

    /// Reads the 8 aligned bytes at `gva`.
    ///
    /// # Errors
    /// The access faulted and the kernel did not repair it.
    fn read(&self, gva: u64) -> Result<u64, Fault>;
    /// Writes the 8 aligned bytes at `gva`.
    ///
    /// # Errors
    /// The access faulted and the kernel did not repair it.
    fn write(&self, gva: u64, value: u64) -> Result<(), Fault>;

    /// Starts a thread of this process that runs `entry(arg)`.
    ///
    /// # Errors
    /// The errno of the mmap for its stack or of clone.
    fn spawn(&self, entry: fn(&Self, u64), arg: u64) -> Result<Thread, Errno>;
    /// Waits until `thread` has ended. Once per thread.
    fn join(&self, thread: Thread);
    /// Starts a process with a copy of this one's memory, which runs `child` and exits with the
    /// status that it returns. Returns the child's pid.
    ///
    /// # Errors
    /// The errno of fork.
    fn fork(&self, child: impl FnOnce(&Self) -> i32) -> Result<u64, Errno>;

    /// `count` words of the program's own memory, zero, for good: shared by the threads of the
    /// process, copied by fork.
    ///
    /// # Errors
    /// No memory.
    fn words(&self, count: usize) -> Result<&'static [AtomicU64], Errno>;

    /// CPUs that programs may use, 1 to [`abi::layout::MAX_CPUS`].
    fn nr_cpus(&self) -> usize;
    /// Moves the calling thread to CPU `cpu` (less than [`Sys::nr_cpus`]) and keeps it there.
    ///
    /// # Errors
    /// The errno of sched_setaffinity.
    fn set_affinity(&self, cpu: usize) -> Result<(), Errno>;
    /// CPU that the calling thread runs on.
    ///
    /// # Errors
    /// The errno of getcpu.
    fn current_cpu(&self) -> Result<usize, Errno>;

    /// Writes to the console.
    fn print(&self, text: &[u8]);
    /// Tells the host of a wrong value at `gva`.
    fn report(&self, kind: ReportKind, gva: u64, expected: u64, found: u64);

    /// The time-stamp counter; always 0 on an executor where time means nothing.
    fn ticks(&self) -> u64 {
        0
    }

    /// One turn of a spin loop.
    fn relax(&self) {
        core::hint::spin_loop();
    }

    /// The set-up of a test is over: schedules that a host explores begin here. Elsewhere nothing.
    fn begin(&self) {
        // ENOSYS where nobody explores.
        let _ = self.syscall(nr::TESTBED_BEGIN, [0; 6]);
    }
    /// The test is over.
    fn end(&self) {
        let _ = self.syscall(nr::TESTBED_END, [0; 6]);
    }
    /// What process `pid` has at `gva` just now, without its doing ([`nr::TESTBED_PEEK`]). Elsewhere ENOSYS.
    ///
    /// # Errors
    /// ESRCH where there is no such process, EFAULT where nothing is present there.
    fn peek(&self, pid: u64, gva: u64) -> Result<u64, Errno> {
        self.syscall(nr::TESTBED_PEEK, [pid, gva, 0, 0, 0, 0])
    }
    /// Makes whole mapped pages the program's own memory, not under test: no access to them faults any
    /// more, and fork copies them. Elsewhere nothing.
    fn wire(&self, gva: u64, len: u64) {
        let _ = self.syscall(nr::TESTBED_WIRE, [gva, len, 0, 0, 0, 0]);
    }

    /// mmap(2).
    ///
    /// # Errors
    /// Its errno.
    fn mmap(&self, gva: u64, len: u64, prot: u64, flags: u64) -> Result<u64, Errno> {
        self.syscall(nr::MMAP, [gva, len, prot, flags, u64::MAX, 0])
    }
    /// A readable and writable private anonymous mapping of `len` bytes.
    ///
    /// # Errors
    /// mmap's errno.
    fn mmap_anonymous(&self, len: u64) -> Result<u64, Errno> {
        self.mmap(0, len, prot::READ | prot::WRITE, ANONYMOUS)
    }
    /// munmap(2).
    ///
    /// # Errors
    /// Its errno.
    fn munmap(&self, gva: u64, len: u64) -> Result<u64, Errno> {
        self.syscall(nr::MUNMAP, [gva, len, 0, 0, 0, 0])
    }
    /// mprotect(2).
    ///
    /// # Errors
    /// Its errno.
    fn mprotect(&self, gva: u64, len: u64, prot: u64) -> Result<u64, Errno> {
        self.syscall(nr::MPROTECT, [gva, len, prot, 0, 0, 0])
    }
    /// madvise(2).
    ///
    /// # Errors
    /// Its errno.
    fn madvise(&self, gva: u64, len: u64, advice: u64) -> Result<u64, Errno> {
        self.syscall(nr::MADVISE, [gva, len, advice, 0, 0, 0])
    }
    /// The brk system call: returns the new end of the heap, the old one if it cannot be `end`.
    ///
    /// # Errors
    /// None on Linux.
    fn brk(&self, end: u64) -> Result<u64, Errno> {
        self.syscall(nr::BRK, [end, 0, 0, 0, 0, 0])
    }
    /// getpid(2).
    ///
    /// # Errors
    /// None on Linux.
    fn getpid(&self) -> Result<u64, Errno> {
        self.syscall(nr::GETPID, [0; 6])
    }
    /// gettid(2).
    ///
    /// # Errors
    /// None on Linux.
    fn gettid(&self) -> Result<u64, Errno> {
        self.syscall(nr::GETTID, [0; 6])
    }
    /// Lets another thread of this CPU run.
    fn yield_now(&self) {
        // sched_yield(2) always succeeds.
        let _ = self.syscall(nr::SCHED_YIELD, [0; 6]);
    }
    /// Waits until the child `pid` has ended.
    ///
    /// # Errors
    /// wait4's errno.
    fn wait(&self, pid: u64) -> Result<WaitStatus, Errno> {
        let status = AtomicU32::new(0);
        let address = core::ptr::from_ref(&status).expose_provenance() as u64;
        loop {
            match self.syscall(nr::WAIT4, [pid, address, 0, 0, 0, 0]) {
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
                Ok(_) => return Ok(WaitStatus(status.load(Ordering::Relaxed))),
            }
        }
    }
    /// Sleeps while the word holds `value` (its low half is what is compared), until woken.
    /// May return early.
    fn futex_wait(&self, word: &AtomicU64, value: u32) {
        // EAGAIN (the word changed) and EINTR both mean: look again.
        let _ = self.syscall(
            nr::FUTEX,
            [
                address(word),
                futex::WAIT | futex::PRIVATE_FLAG,
                value.into(),
                0,
                0,
                0,
            ],
        );
    }
    /// Wakes all that sleep on the word.
    fn futex_wake(&self, word: &AtomicU64) {
        let everyone = i32::MAX as u64;
        // Waking cannot fail on an address that exists.
        let _ = self.syscall(
            nr::FUTEX,
            [
                address(word),
                futex::WAKE | futex::PRIVATE_FLAG,
                everyone,
                0,
                0,
                0,
            ],
        );
    }
}

/// Flags of a private anonymous mapping.
pub const ANONYMOUS: u64 = map::PRIVATE | map::ANONYMOUS;

fn address(word: &AtomicU64) -> u64 {
    core::ptr::from_ref(word).expose_provenance() as u64
}

/// Text for the console, made on the stack: a line longer than it is cut.
pub(crate) struct Line {
    bytes: [u8; 200],
    used: usize,
}

impl core::fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        let room = &mut self.bytes[self.used..];
        let taken = text.len().min(room.len());
        room[..taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.used += taken;
        Ok(())
    }
}

/// Prints one line.
pub fn print_line<S: Sys>(sys: &S, text: core::fmt::Arguments<'_>) {
    let mut line = Line {
        bytes: [0; 200],
        used: 0,
    };
    // `Line` never fails.
    let _ = core::fmt::write(&mut line, text);
    let end = line.used.min(line.bytes.len() - 1);
    line.bytes[end] = b'\n';
    sys.print(&line.bytes[..=end]);
}
