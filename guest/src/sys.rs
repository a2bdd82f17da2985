//! What a program can ask for.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use abi::channel::ReportKind;
use abi::layout::PAGE_SIZE;
use abi::oracle::Area;
use abi::syscall::{Errno, falloc, futex, map, nr, prot};

/// Why an access to memory under test did not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The address.
    pub gva: u64,
    /// The signal that a program without a fixup would get.
    pub signal: Signal,
}

/// What a bad access is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Nothing is mapped there, or what is does not permit it (SIGSEGV).
    Segv,
    /// It lies behind the end of the file that is mapped there (SIGBUS).
    Bus,
}

impl Fault {
    /// A fault at `gva` for which the kernel gave `errno`: EIO for SIGBUS, else EFAULT.
    #[must_use]
    pub fn new(gva: u64, errno: Errno) -> Self {
        let signal = match errno {
            Errno::EIO => Signal::Bus,
            _ => Signal::Segv,
        };
        Self { gva, signal }
    }
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

    /// Calls `f` with an address at which a system call can read and write `words`, at most 8; not nested.
    fn lend<T>(&self, words: &[AtomicU64], f: impl FnOnce(u64) -> T) -> T {
        f(words.as_ptr().expose_provenance() as u64)
    }

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
    /// Reads the disk from `sector` on into `len` bytes at `gva`, which the device writes itself
    /// ([`nr::TESTBED_DIRECT_READ`]). Returns how many. Elsewhere ENOSYS.
    ///
    /// # Errors
    /// The call's errno; EIO where the disk fails.
    fn direct_read(&self, gva: u64, len: u64, sector: u64) -> Result<u64, Errno> {
        self.syscall(nr::TESTBED_DIRECT_READ, [gva, len, sector, 0, 0, 0])
    }
    /// Writes `len` bytes at `gva` to the disk from `sector` on, likewise.
    ///
    /// # Errors
    /// The call's errno; EIO where the disk fails.
    fn direct_write(&self, gva: u64, len: u64, sector: u64) -> Result<u64, Errno> {
        self.syscall(nr::TESTBED_DIRECT_WRITE, [gva, len, sector, 0, 0, 0])
    }
    /// Has the kernel reclaim `pages` frames, of whomever ([`nr::TESTBED_RECLAIM`]). Returns how many it could. Elsewhere none.
    fn reclaim(&self, pages: u64) -> u64 {
        let reclaimed = self.syscall(nr::TESTBED_RECLAIM, [pages, 0, 0, 0, 0, 0]);
        reclaimed.unwrap_or(0)
    }
    /// Sets how many free frames make an allocation reclaim, wake kswapd, and kswapd rest ([`nr::TESTBED_WATERMARKS`]).
    /// Nothing where there is no kswapd.
    fn watermarks(&self, marks: [u64; 3]) {
        let [min, low, high] = marks;
        let _ = self.syscall(nr::TESTBED_WATERMARKS, [min, low, high, 0, 0, 0]);
    }
    /// A new memory group below `parent` that holds `max` pages at most ([`nr::TESTBED_GROUP_CREATE`]); returns its number.
    /// Elsewhere ENOSYS.
    ///
    /// # Errors
    /// The call's errno.
    fn group_create(&self, parent: u64, max: u64) -> Result<u64, Errno> {
        self.syscall(nr::TESTBED_GROUP_CREATE, [parent, max, 0, 0, 0, 0])
    }
    /// Changes the limit of a memory group ([`nr::TESTBED_GROUP_SET_MAX`]). Elsewhere ENOSYS.
    ///
    /// # Errors
    /// The call's errno; EBUSY where it holds more.
    fn group_set_max(&self, group: u64, max: u64) -> Result<u64, Errno> {
        self.syscall(nr::TESTBED_GROUP_SET_MAX, [group, max, 0, 0, 0, 0])
    }
    /// Moves this process to a memory group ([`nr::TESTBED_GROUP_MOVE`]); returns the pages that go along. Elsewhere ENOSYS.
    ///
    /// # Errors
    /// The call's errno; ENOMEM where the group does not hold them.
    fn group_move(&self, group: u64, flags: u64) -> Result<u64, Errno> {
        self.syscall(nr::TESTBED_GROUP_MOVE, [group, flags, 0, 0, 0, 0])
    }
    /// A number of a memory group ([`abi::syscall::group`]). Elsewhere ENOSYS.
    ///
    /// # Errors
    /// The call's errno.
    fn group_stat(&self, group: u64, what: u64) -> Result<u64, Errno> {
        self.syscall(nr::TESTBED_GROUP_STAT, [group, what, 0, 0, 0, 0])
    }
    /// Moves the folios of whole mapped pages to other frames ([`nr::TESTBED_MIGRATE`]); returns how many have moved.
    /// Elsewhere ENOSYS.
    ///
    /// # Errors
    /// The call's errno; ENOMEM where there is no frame.
    fn migrate(&self, gva: u64, len: u64) -> Result<u64, Errno> {
        self.syscall(nr::TESTBED_MIGRATE, [gva, len, 0, 0, 0, 0])
    }
    /// Makes whole mapped pages the program's own memory, not under test: no access to them faults any
    /// more, and fork copies them. Elsewhere nothing.
    fn wire(&self, gva: u64, len: u64) {
        let _ = self.syscall(nr::TESTBED_WIRE, [gva, len, 0, 0, 0, 0]);
    }

    /// Fills `areas` with the first VMAs of this process that lie in `start..end`, and returns how many there
    /// were ([`nr::TESTBED_MAPS`]; /proc/self/maps on Linux).
    ///
    /// # Errors
    /// There is no way to know.
    fn maps(&self, start: u64, end: u64, areas: &mut [Area]) -> Result<usize, Errno>;

    /// mmap(2).
    ///
    /// # Errors
    /// Its errno.
    fn mmap(&self, gva: u64, len: u64, prot: u64, flags: u64) -> Result<u64, Errno> {
        self.syscall(nr::MMAP, [gva, len, prot, flags, u64::MAX, 0])
    }
    /// mmap(2) of `file`: a descriptor, and the first byte that is mapped.
    ///
    /// # Errors
    /// Its errno.
    fn mmap_file(
        &self,
        gva: u64,
        len: u64,
        prot: u64,
        flags: u64,
        (fd, offset): (u64, u64),
    ) -> Result<u64, Errno> {
        self.syscall(nr::MMAP, [gva, len, prot, flags, fd, offset])
    }
    /// memfd_create(2) without a name or flags: a new empty file's descriptor.
    ///
    /// # Errors
    /// Its errno.
    fn memfd(&self) -> Result<u64, Errno> {
        let name = [AtomicU64::new(0)];
        self.lend(&name, |name| {
            self.syscall(nr::MEMFD_CREATE, [name, 0, 0, 0, 0, 0])
        })
    }
    /// close(2).
    ///
    /// # Errors
    /// Its errno.
    fn close(&self, fd: u64) -> Result<u64, Errno> {
        self.syscall(nr::CLOSE, [fd, 0, 0, 0, 0, 0])
    }
    /// ftruncate(2).
    ///
    /// # Errors
    /// Its errno.
    fn ftruncate(&self, fd: u64, size: u64) -> Result<u64, Errno> {
        self.syscall(nr::FTRUNCATE, [fd, size, 0, 0, 0, 0])
    }
    /// fallocate(2) that punches a hole.
    ///
    /// # Errors
    /// Its errno.
    fn punch_hole(&self, fd: u64, offset: u64, len: u64) -> Result<u64, Errno> {
        let mode = falloc::PUNCH_HOLE | falloc::KEEP_SIZE;
        self.syscall(nr::FALLOCATE, [fd, mode, offset, len, 0, 0])
    }
    /// A descriptor of `len` bytes of the disk from `sector` on ([`nr::TESTBED_DISK_FILE`]). Elsewhere ENOSYS.
    ///
    /// # Errors
    /// The call's errno.
    fn disk_file(&self, sector: u64, len: u64) -> Result<u64, Errno> {
        self.syscall(nr::TESTBED_DISK_FILE, [sector, len, 0, 0, 0, 0])
    }
    /// A file of so many bytes: from the start of the disk, or in memory where there is no disk.
    fn file(&self, len: u64) -> Result<u64, Errno> {
        match self.disk_file(0, len) {
            Err(Errno::ENOSYS) => {
                let fd = self.memfd()?;
                self.ftruncate(fd, len).map(|_| fd)
            }
            opened => opened,
        }
    }
    /// fsync(2).
    ///
    /// # Errors
    /// Its errno.
    fn fsync(&self, fd: u64) -> Result<u64, Errno> {
        self.syscall(nr::FSYNC, [fd, 0, 0, 0, 0, 0])
    }
    /// posix_fadvise(2) of a whole file.
    ///
    /// # Errors
    /// Its errno.
    fn fadvise(&self, fd: u64, advice: u64) -> Result<u64, Errno> {
        self.syscall(nr::FADVISE64, [fd, 0, 0, advice, 0, 0])
    }
    /// msync(2).
    ///
    /// # Errors
    /// Its errno.
    fn msync(&self, gva: u64, len: u64, flags: u64) -> Result<u64, Errno> {
        self.syscall(nr::MSYNC, [gva, len, flags, 0, 0, 0])
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
    /// mremap(2) of `(old, new)` bytes at `gva`; `to` is where, with `MREMAP_FIXED`.
    ///
    /// # Errors
    /// Its errno.
    fn mremap(&self, gva: u64, (old, new): (u64, u64), flags: u64, to: u64) -> Result<u64, Errno> {
        self.syscall(nr::MREMAP, [gva, old, new, flags, to, 0])
    }
    /// mlock2(2): with no flags as mlock(2).
    ///
    /// # Errors
    /// Its errno.
    fn mlock(&self, gva: u64, len: u64, flags: u64) -> Result<u64, Errno> {
        self.syscall(nr::MLOCK2, [gva, len, flags, 0, 0, 0])
    }
    /// munlock(2).
    ///
    /// # Errors
    /// Its errno.
    fn munlock(&self, gva: u64, len: u64) -> Result<u64, Errno> {
        self.syscall(nr::MUNLOCK, [gva, len, 0, 0, 0, 0])
    }
    /// mlockall(2).
    ///
    /// # Errors
    /// Its errno.
    fn mlockall(&self, flags: u64) -> Result<u64, Errno> {
        self.syscall(nr::MLOCKALL, [flags, 0, 0, 0, 0, 0])
    }
    /// munlockall(2).
    ///
    /// # Errors
    /// None on Linux.
    fn munlockall(&self) -> Result<u64, Errno> {
        self.syscall(nr::MUNLOCKALL, [0; 6])
    }
    /// mincore(2) of the pages from `gva` on, a byte for each at `vector`, which is memory under test.
    ///
    /// # Errors
    /// Its errno.
    fn mincore(&self, gva: u64, pages: u64, vector: u64) -> Result<u64, Errno> {
        let len = pages.saturating_mul(PAGE_SIZE);
        self.syscall(nr::MINCORE, [gva, len, vector, 0, 0, 0])
    }
    /// membarrier(2).
    ///
    /// # Errors
    /// Its errno.
    fn membarrier(&self, command: u64) -> Result<u64, Errno> {
        self.syscall(nr::MEMBARRIER, [command, 0, 0, 0, 0, 0])
    }
    /// prlimit64(2) of this process: where, in memory under test, the soft and the hard limit to set are, and where to
    /// put those that were; 0 for neither.
    ///
    /// # Errors
    /// Its errno.
    fn prlimit(&self, resource: u64, new: u64, old: u64) -> Result<u64, Errno> {
        self.syscall(nr::PRLIMIT64, [0, resource, new, old, 0, 0])
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
