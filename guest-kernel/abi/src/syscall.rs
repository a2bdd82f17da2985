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
        READ = 0;
        WRITE = 1;
        CLOSE = 3;
        LSEEK = 8;
        MMAP = 9;
        MPROTECT = 10;
        MUNMAP = 11;
        BRK = 12;
        PREAD64 = 17;
        PWRITE64 = 18;
        SCHED_YIELD = 24;
        MREMAP = 25;
        MSYNC = 26;
        MINCORE = 27;
        MADVISE = 28;
        DUP = 32;
        GETPID = 39;
        CLONE = 56;
        FORK = 57;
        EXIT = 60;
        WAIT4 = 61;
        FSYNC = 74;
        FDATASYNC = 75;
        FTRUNCATE = 77;
        GETRLIMIT = 97;
        MLOCK = 149;
        MUNLOCK = 150;
        MLOCKALL = 151;
        MUNLOCKALL = 152;
        SETRLIMIT = 160;
        GETTID = 186;
        FUTEX = 202;
        SCHED_SETAFFINITY = 203;
        SCHED_GETAFFINITY = 204;
        FADVISE64 = 221;
        EXIT_GROUP = 231;
        MOVE_PAGES = 279;
        FALLOCATE = 285;
        PRLIMIT64 = 302;
        GETCPU = 309;
        MEMFD_CREATE = 319;
        MEMBARRIER = 324;
        MLOCK2 = 325;
        /// `report(kind, gva, expected, found)`: tells the host of a wrong value
        /// ([`crate::channel::ReportKind`]). Returns 0.
        TESTBED_REPORT = TESTBED_BASE;
        /// `fault_fixup(start, end, fixup)`: for the calling process, a fault that would kill a task whose
        /// instruction pointer lies in `start..end` continues at `fixup` instead, with `rax` = -EFAULT, or
        /// -EIO where it is a SIGBUS.
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
        /// good, -EIO where it lies behind the end of a file; -EAGAIN where a fault was handled and the call is to be made again.
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
        /// `maps(start, end, buffer, count)`: writes the first `count` VMAs of the calling process that lie in
        /// `start..end`, as [`crate::oracle::Area`]s, and returns how many there were.
        TESTBED_MAPS = TESTBED_BASE + 16;
        /// `direct_read(gva, len, sector)`: reads the disk into memory as read(2) of a file opened with O_DIRECT does: the
        /// pages are pinned and the device moves the data. Returns the bytes moved. EINVAL where `gva` or `len` is no
        /// multiple of [`crate::disk::SECTOR_BYTES`] or the disk has no such sectors, EFAULT where memory may not be
        /// written, EIO where the disk fails at once, ENOMEM.
        TESTBED_DIRECT_READ = TESTBED_BASE + 40;
        /// `direct_write(gva, len, sector)`: the other way.
        TESTBED_DIRECT_WRITE = TESTBED_BASE + 41;
        /// `reclaim(pages)`: reclaims so many frames, of whomever, if it can, as an allocation that finds none does
        /// (Linux's memory.reclaim). Returns how many.
        TESTBED_RECLAIM = TESTBED_BASE + 42;
        /// `migrate(start, len)`: moves the folios that whole mapped pages map to other frames, as far as nobody uses them
        /// otherwise, and returns how many have moved. EINVAL for a bad range; ENOMEM where there is no frame for the first.
        TESTBED_MIGRATE = TESTBED_BASE + 60;
        /// `compact()`: moves the folios of the calling process to lower frames that are free, and returns how many have
        /// moved.
        TESTBED_COMPACT = TESTBED_BASE + 61;
        /// `watermarks(min, low, high)`: so many free frames make an allocation reclaim, wake kswapd, and kswapd rest (Linux's
        /// /proc/sys/vm/min_free_kbytes); one that had been given up is tried again. It is woken at once where fewer are
        /// free. EINVAL where they are not in that order, and where there is no kswapd.
        TESTBED_WATERMARKS = TESTBED_BASE + 80;
        /// `group_create(parent, max)`: a new memory group below `parent` (0: below none) that holds `max` pages at most. Returns
        /// its number. EINVAL where there is no such parent, ENOSPC where there are as many groups as there can be; as the
        /// other calls of groups ENOSYS without the parameter `groups`.
        TESTBED_GROUP_CREATE = TESTBED_BASE + 70;
        /// `group_set_max(group, max)`: what it holds more is reclaimed. EINVAL where there is no such group, EBUSY where too
        /// little could be reclaimed: the limit stays as it was (Linux's memory.limit_in_bytes).
        TESTBED_GROUP_SET_MAX = TESTBED_BASE + 71;
        /// `group_move(group, flags)`: the calling process is in `group` (0: in none) from now on. What it was charged for stays
        /// where it is, but for what [`super::group::RECHARGE`] says. Returns the pages and slots that were moved. EINVAL where
        /// there is no such group, for other flags; ENOMEM where it does not hold so much: nothing has changed.
        TESTBED_GROUP_MOVE = TESTBED_BASE + 72;
        /// `group_stat(group, what)`: a number of [`super::group`]. EINVAL where there is none such.
        TESTBED_GROUP_STAT = TESTBED_BASE + 73;
        /// `disk_file(sector, len)`: a descriptor of `len` bytes of the disk from `sector` on, as one of a partition opened
        /// for reading and writing. EINVAL where either is no multiple of a page or nothing is asked for, EBUSY where the
        /// swap area lies there, ENOMEM, EMFILE.
        TESTBED_DISK_FILE = TESTBED_BASE + 46;
        /// `collapse_scan()`: what khugepaged does, for the calling process: collapses what the parameter `thp` and
        /// advice permit. Returns how many folios of 2 MiB it made.
        TESTBED_COLLAPSE_SCAN = TESTBED_BASE + 44;
        /// `split_folios(start, len)`: splits folios of 2 MiB of the calling process into small ones where nobody else uses
        /// them. Returns how many (Linux's /sys/kernel/debug/split_huge_pages). EINVAL for a bad range.
        TESTBED_SPLIT_FOLIOS = TESTBED_BASE + 45;
    }
}

/// Flags and numbers of the calls of memory groups.
pub mod group {
    /// Of group_move: anonymous memory that the process alone maps, and swap slots that it alone names, are charged to
    /// the new group instead of its old one (Linux's memory.move_charge_at_immigrate with bit 0).
    pub const RECHARGE: u64 = 1;
    /// The group that the calling process is in; of any group.
    pub const CURRENT: u64 = 0;
    /// [`crate::objects::MemGroup::usage`].
    pub const USAGE: u64 = 1;
    /// [`crate::objects::MemGroup::max`].
    pub const MAX: u64 = 2;
    /// [`crate::objects::MemGroup::watermark`].
    pub const WATERMARK: u64 = 3;
    /// [`crate::objects::MemGroup::failures`].
    pub const FAILURES: u64 = 4;
    /// [`crate::objects::MemGroup::parent`].
    pub const PARENT: u64 = 5;
    /// The first of [`crate::objects::MemGroup::stats`], by [`crate::objects::group_stat`].
    pub const STATS: u64 = 16;
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
    ENOENT = 2;
    ESRCH = 3;
    EINTR = 4;
    EIO = 5;
    ENXIO = 6;
    EBADF = 9;
    ECHILD = 10;
    EAGAIN = 11;
    ENOMEM = 12;
    EACCES = 13;
    EFAULT = 14;
    EBUSY = 16;
    EEXIST = 17;
    ENODEV = 19;
    EINVAL = 22;
    EMFILE = 24;
    EFBIG = 27;
    ENOSPC = 28;
    ESPIPE = 29;
    ENOSYS = 38;
    EOVERFLOW = 75;
    EOPNOTSUPP = 95;
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
    pub const SHARED_VALIDATE: u64 = 0x03;
    pub const TYPE: u64 = 0x0f;
    pub const FIXED: u64 = 0x10;
    pub const ANONYMOUS: u64 = 0x20;
    pub const BITS_32: u64 = 0x40;
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

/// Flags of msync.
#[allow(missing_docs)]
pub mod msync {
    pub const ASYNC: u64 = 1;
    pub const INVALIDATE: u64 = 2;
    pub const SYNC: u64 = 4;
}

/// Advice of fadvise64.
#[allow(missing_docs)]
pub mod fadvise {
    pub const NORMAL: u64 = 0;
    pub const RANDOM: u64 = 1;
    pub const SEQUENTIAL: u64 = 2;
    pub const WILLNEED: u64 = 3;
    pub const DONTNEED: u64 = 4;
    pub const NOREUSE: u64 = 5;
}

/// Flags of memfd_create.
#[allow(missing_docs)]
pub mod memfd {
    pub const CLOEXEC: u64 = 1;
    pub const ALLOW_SEALING: u64 = 2;
    pub const NOEXEC_SEAL: u64 = 8;
    pub const EXEC: u64 = 0x10;
}

/// Modes of fallocate.
#[allow(missing_docs)]
pub mod falloc {
    pub const KEEP_SIZE: u64 = 1;
    pub const PUNCH_HOLE: u64 = 2;
    pub const COLLAPSE_RANGE: u64 = 8;
    pub const ZERO_RANGE: u64 = 0x10;
    pub const INSERT_RANGE: u64 = 0x20;
    pub const UNSHARE_RANGE: u64 = 0x40;
    pub const WRITE_ZEROES: u64 = 0x80;
}

/// Where lseek counts from.
#[allow(missing_docs)]
pub mod seek {
    pub const SET: u64 = 0;
    pub const CUR: u64 = 1;
    pub const END: u64 = 2;
}

/// Advice of madvise.
#[allow(missing_docs)]
pub mod advice {
    pub const NORMAL: u64 = 0;
    pub const RANDOM: u64 = 1;
    pub const SEQUENTIAL: u64 = 2;
    pub const WILLNEED: u64 = 3;
    pub const DONTNEED: u64 = 4;
    pub const FREE: u64 = 8;
    pub const REMOVE: u64 = 9;
    pub const DONTFORK: u64 = 10;
    pub const DOFORK: u64 = 11;
    pub const MERGEABLE: u64 = 12;
    pub const UNMERGEABLE: u64 = 13;
    pub const HUGEPAGE: u64 = 14;
    pub const NOHUGEPAGE: u64 = 15;
    pub const DONTDUMP: u64 = 16;
    pub const DODUMP: u64 = 17;
    pub const WIPEONFORK: u64 = 18;
    pub const KEEPONFORK: u64 = 19;
    pub const COLD: u64 = 20;
    pub const PAGEOUT: u64 = 21;
    pub const POPULATE_READ: u64 = 22;
    pub const POPULATE_WRITE: u64 = 23;
    pub const DONTNEED_LOCKED: u64 = 24;
    pub const COLLAPSE: u64 = 25;
}

/// Flags of mremap.
#[allow(missing_docs)]
pub mod mremap {
    pub const MAYMOVE: u64 = 1;
    pub const FIXED: u64 = 2;
    pub const DONTUNMAP: u64 = 4;
}

/// Flags of mlock2 and mlockall.
#[allow(missing_docs)]
pub mod mlock {
    /// Of mlock2: lock pages as they are touched.
    pub const ONFAULT: u64 = 1;
    pub const ALL_CURRENT: u64 = 1;
    pub const ALL_FUTURE: u64 = 2;
    pub const ALL_ONFAULT: u64 = 4;
}

/// Commands of membarrier.
#[allow(missing_docs)]
pub mod membarrier {
    pub const QUERY: u64 = 0;
    pub const GLOBAL: u64 = 1;
    pub const PRIVATE_EXPEDITED: u64 = 1 << 3;
    pub const REGISTER_PRIVATE_EXPEDITED: u64 = 1 << 4;
    pub const PRIVATE_EXPEDITED_SYNC_CORE: u64 = 1 << 5;
    pub const REGISTER_PRIVATE_EXPEDITED_SYNC_CORE: u64 = 1 << 6;
    pub const GET_REGISTRATIONS: u64 = 1 << 9;
}

/// Resources that have limits, and their numbers.
#[allow(missing_docs)]
pub mod rlimit {
    pub const DATA: u64 = 2;
    pub const STACK: u64 = 3;
    pub const MEMLOCK: u64 = 8;
    pub const AS: u64 = 9;
    /// No limit.
    pub const INFINITY: u64 = u64::MAX;
    /// The resources of memory, whose limits are kept.
    pub const KEPT: [u64; 4] = [DATA, STACK, MEMLOCK, AS];
    /// Linux's default for MEMLOCK.
    pub const DEFAULT_MEMLOCK: u64 = 8 << 20;
    /// Linux's default for STACK, the soft limit.
    pub const DEFAULT_STACK: u64 = 8 << 20;
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
    pub const SIGBUS: u64 = 7;
    pub const SIGFPE: u64 = 8;
    pub const SIGKILL: u64 = 9;
    pub const SIGSEGV: u64 = 11;
    pub const SIGCHLD: u64 = 17;
}
