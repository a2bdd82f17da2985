//! Scheduling points: named places in the kernel where the host may stop a vCPU.

use crate::lock::LockClass;

macro_rules! points {
    ($($variant:ident = $id:literal, $name:literal, $help:literal;)+) => {
        /// One scheduling point.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Point { $(#[doc = $help] $variant = $id,)+ }
        impl Point {
            /// Every point, in order of its number.
            pub const ALL: &'static [Point] = &[$(Point::$variant,)+];
            /// The name on the command line and in reports.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Point::$variant => $name,)+ }
            }
            /// Where it lies.
            #[must_use]
            pub const fn help(self) -> &'static str {
                match self { $(Point::$variant => $help,)+ }
            }
            /// The point with number `id`.
            #[must_use]
            pub fn from_id(id: u64) -> Option<Point> {
                match id { $($id => Some(Point::$variant),)+ _ => None }
            }
        }
    };
}

points! {
    SyscallEnter = 0, "syscall-enter", "a system call was decoded and is about to run";
    SyscallExit = 1, "syscall-exit", "a system call has its result and returns to CPL 3";
    FaultEnter = 2, "fault-enter", "a page fault from CPL 3 is about to be handled";
    FaultExit = 3, "fault-exit", "a page fault was handled and returns to CPL 3";
    PteInstall = 4, "pte-install", "a fault or fork has written a present leaf entry";
    PteClear = 5, "pte-clear", "an unmap has cleared a leaf entry; nothing is flushed yet";
    PteProtect = 6, "pte-protect", "permissions of a leaf entry were reduced; nothing is flushed yet";
    FlushIssue = 7, "flush-issue", "a shootdown is about to choose the CPUs it must reach";
    FlushDispatch = 8, "flush-dispatch", "the shootdown's IPIs were sent";
    FlushSync = 9, "flush-sync", "every CPU of the shootdown has acknowledged";
    FlushWait = 10, "flush-wait", "spinning until the CPUs of a shootdown acknowledge";
    IpiReceive = 11, "ipi-receive", "an IPI handler was entered";
    IpiAck = 12, "ipi-ack", "an IPI handler has flushed and acknowledged";
    FrameFree = 13, "frame-free", "a user frame is about to go back to the allocator";
    FrameAlloc = 14, "frame-alloc", "a frame was taken from the allocator";
    TableFree = 15, "table-free", "a page-table page is about to be freed";
    VmaAttach = 16, "vma-attach", "a VMA was linked into its mm";
    VmaDetach = 17, "vma-detach", "a VMA was removed from its mm";
    LockWait = 18, "lock-wait", "spinning on a lock that another CPU holds";
    LockAcquire = 19, "lock-acquire", "a lock was taken";
    LockRelease = 20, "lock-release", "a lock was released";
    ForkCopy = 21, "fork-copy", "fork has copied the entries of one VMA";
    ForkFlush = 22, "fork-flush", "fork has write-protected the parent and is about to flush";
    CowCopy = 23, "cow-copy", "a write fault has copied a shared frame and not yet replaced the entry";
    MapcountChange = 24, "mapcount-change", "a folio's mapcount is about to change";
    Switch = 25, "switch", "the scheduler has chosen another task";
    Cr3Load = 26, "cr3-load", "a CR3 load is about to run";
    MmExit = 27, "mm-exit", "the last user of an mm is gone; it is about to be torn down";
    IdleEnter = 28, "idle", "a CPU found nothing to run and waits for an IPI";
    LazyEnter = 29, "lazy-enter", "a CPU has entered lazy mode: no user code, its last mm still loaded";
    LazyLeave = 30, "lazy-leave", "a CPU that was lazy is about to look at what it has missed";
    RefcountChange = 31, "refcount-change", "a folio's refcount is about to change";
    Access = 32, "access", "a program is about to access memory under test through the soft TLB";
    UserRelax = 33, "user-relax", "a program waits for another thread of its own";
    TestBegin = 34, "test-begin", "the program's set-up is over: schedules start here";
    SwitchMm = 36, "switch-mm", "a CPU has loaded the page tables of an mm and not yet noted that it has";
    TestEnd = 35, "test-end", "the program's test is over: schedules end here";
    RcuEnter = 37, "rcu-enter", "an RCU read section has begun";
    RcuExit = 38, "rcu-exit", "an RCU read section is about to end";
    RcuGpStart = 39, "rcu-gp-start", "a grace period has begun";
    RcuGpEnd = 40, "rcu-gp-end", "a grace period is over; what was retired before it is about to be freed";
    RcuWait = 41, "rcu-wait", "spinning until the CPUs that hold up a grace period were quiescent";
    IpiSend = 43, "ipi-send", "an IPI is about to be sent";
    DiskSubmit = 50, "disk-submit", "a request was given to the disk";
    DiskWait = 51, "disk-wait", "spinning until the disk has answered a request of the swap area";
    Migrate = 60, "migrate", "a folio was copied to its new frame, or cannot be, and is about to be mapped again";
    VmaLookup = 44, "vma-lookup", "a fault has found a VMA under RCU and is about to take its lock";
    VmaCounted = 45, "vma-counted", "a fault is counted as a VMA's reader and is about to see whether it may be";
    WalkStep = 42, "walk-step", "a walk without locks has read an entry and is about to follow it";
}

impl Point {
    /// True where the CPU waits for somebody else: what for is in the point's arguments ([`Wait`]).
    #[must_use]
    pub const fn is_wait(self) -> bool {
        matches!(
            self,
            Self::LockWait
                | Self::FlushWait
                | Self::IdleEnter
                | Self::UserRelax
                | Self::RcuWait
                | Self::DiskWait
        )
    }

    /// What a CPU that stands here with these arguments waits for; none where it does not wait.
    #[must_use]
    pub fn wait(self, args: [u64; 2]) -> Option<Wait> {
        Some(match self {
            Self::LockWait => Wait::Lock {
                word: args[0],
                class: LockClass::from_u64(args[1])?,
            },
            Self::FlushWait => Wait::Acknowledged { word: args[0] },
            Self::IdleEnter => Wait::Interrupt,
            Self::UserRelax => Wait::Anyone,
            Self::RcuWait => Wait::GracePeriod { first: args[0] },
            Self::DiskWait => Wait::Disk { request: args[0] },
            _ => return None,
        })
    }
}

/// What a CPU that spins or idles waits for. In every case it takes IPIs meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Until the lock word at this GPA lets it in ([`LockClass::lets_in`]).
    Lock {
        /// GPA of the lock word.
        word: u64,
        /// What it wants to take it as.
        class: LockClass,
    },
    /// Until every CPU of its shootdown has acknowledged: the word at this GPA is 0.
    Acknowledged {
        /// GPA of [`crate::objects::FlushRequest::pending`].
        word: u64,
    },
    /// Until no CPU holds up its grace period ([`crate::objects::CpuRcu::holds_up`]).
    GracePeriod {
        /// GPA of [`crate::objects::Cpu::rcu`] of CPU 0; that of CPU `i` lies `i` [`crate::objects::Cpu`]s
        /// behind it.
        first: u64,
    },
    /// Until the disk has answered: `status` of the request at this GPA is not
    /// [`crate::disk::DiskStatus::Pending`] ([`Wait::disk_answered`]).
    Disk {
        /// GPA of the [`crate::disk::DiskRequest`].
        request: u64,
    },
    /// For an IPI.
    Interrupt,
    /// For some other thread of the program to do something: it can always go on, but need not.
    Anyone,
}

impl Wait {
    /// True where the first word of a [`crate::disk::DiskRequest`] says that the disk has answered.
    #[must_use]
    pub const fn disk_answered(word: u64) -> bool {
        word >> 32 != crate::disk::DiskStatus::Pending as u64
    }
}

impl core::str::FromStr for Point {
    type Err = ();
    fn from_str(name: &str) -> Result<Self, ()> {
        Point::ALL
            .iter()
            .copied()
            .find(|point| point.name() == name)
            .ok_or(())
    }
}
