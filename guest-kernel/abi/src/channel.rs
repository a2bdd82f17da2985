//! The testbed channel: one control page and one event ring per vCPU, shared with the host.
//!
//! The guest needs nothing from the host to be correct, and the host trusts nothing it reads here:
//! ring indices are taken modulo the ring's length, unknown kinds are shown as such.

use core::sync::atomic::{AtomicU32, AtomicU64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Records in a vCPU's ring.
pub const RING_RECORDS: usize =
    (crate::layout::CHANNEL_STRIDE - crate::layout::PAGE_SIZE) as usize / size_of::<Event>();
/// Longest text of a [`Doorbell::Panic`], in bytes.
pub const MAX_MESSAGE: usize = 512;

/// Why the guest rang the doorbell: the value of the `out` to [`crate::port::DOORBELL`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Doorbell {
    /// A scheduling point's budget ran out, or the point is trapped: [`Control::point`] names it.
    Point = 1,
    /// The event ring is full and the host asked not to overwrite.
    RingFull = 2,
    /// The kernel panicked: [`Control::message`] says why.
    Panic = 3,
    /// A user program found a wrong value: [`Control::report`].
    Report = 4,
    /// The kernel is about to enter CPL 3 for the first time (once per machine).
    FirstUser = 5,
}

impl Doorbell {
    /// The reason with number `value`.
    #[must_use]
    pub fn from_u32(value: u32) -> Option<Self> {
        match value {
            1 => Some(Self::Point),
            2 => Some(Self::RingFull),
            3 => Some(Self::Panic),
            4 => Some(Self::Report),
            5 => Some(Self::FirstUser),
            _ => None,
        }
    }
}

/// What a user program reports through the testbed-only system call
/// [`crate::syscall::nr::TESTBED_REPORT`].
#[repr(C)]
#[derive(Debug, Default, FromBytes, IntoBytes, KnownLayout)]
pub struct Report {
    /// A [`ReportKind`].
    pub kind: AtomicU64,
    /// Address that was read or written.
    pub gva: AtomicU64,
    /// What the program had to find there.
    pub expected: AtomicU64,
    /// What it found.
    pub found: AtomicU64,
    /// Task that found it.
    pub task: AtomicU64,
}

/// Kinds of [`Report`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum ReportKind {
    /// A read returned what was never written to this page: a frame that is no longer its own.
    ForeignFrame = 1,
    /// A value that should have stayed the same changed (a lost copy-on-write).
    ChangedUnderneath = 2,
    /// A write that should have faulted went through, or one that should not fault did.
    WrongPermission = 3,
    /// A system call returned what it must not.
    WrongResult = 4,
    /// The processor loaded what neither the soft TLB nor the page tables give.
    TlbMismatch = 5,
    /// What was read from the disk is not what was written to it, or is not where it was read to.
    DiskData = 20,
}

impl ReportKind {
    /// The kind with number `value`.
    #[must_use]
    pub fn from_u64(value: u64) -> Option<Self> {
        match value {
            1 => Some(Self::ForeignFrame),
            2 => Some(Self::ChangedUnderneath),
            3 => Some(Self::WrongPermission),
            4 => Some(Self::WrongResult),
            5 => Some(Self::TlbMismatch),
            20 => Some(Self::DiskData),
            _ => None,
        }
    }
    /// What it means, for a person.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::ForeignFrame => "the read hit a frame that is no longer this page's own",
            Self::ChangedUnderneath => "a private value changed underneath its owner",
            Self::WrongPermission => {
                "an access was permitted or refused against the VMA's protection"
            }
            Self::WrongResult => "a system call returned a wrong result",
            Self::TlbMismatch => "the processor translated an address as no TLB may",
            Self::DiskData => "what was read from the disk is not what was written to it",
        }
    }
}

/// The control page of one vCPU's channel.
#[repr(C, align(4096))]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct Control {
    /// Points left before the next exit; decremented at each. `u64::MAX` at boot: never.
    /// Written by the host, counted down by the guest.
    pub budget: AtomicU64,
    /// Bit `p % 64` of word `p / 64`: point `p` always exits. Written by the host.
    pub trap: [AtomicU64; 4],
    /// Bit `k`: events of kind `k` are recorded. Written by the host.
    pub event_mask: AtomicU64,
    /// 1: a full ring exits ([`Doorbell::RingFull`]) before it overwrites; 0: the ring is a flight
    /// recorder of the last [`RING_RECORDS`] events. Written by the host.
    pub ring_exits: AtomicU64,
    /// Records that the host has consumed. Written by the host.
    pub ring_tail: AtomicU64,
    /// Records ever written; the next one goes to `ring_head % RING_RECORDS`. Written by the guest.
    pub ring_head: AtomicU64,
    /// Point of the current [`Doorbell::Point`], and its two arguments. Written by the guest.
    pub point: AtomicU64,
    /// Arguments of the point (addresses, ids; by point).
    pub point_args: [AtomicU64; 2],
    /// System calls, faults, interrupts and context switches so far: the watchdog's sign of life.
    pub progress: AtomicU64,
    /// Points passed so far.
    pub points_passed: AtomicU64,
    /// Argument of the current [`Doorbell::Report`].
    pub report: Report,
    /// Used bytes of `message`.
    pub message_len: AtomicU64,
    /// Text of the current [`Doorbell::Panic`], UTF-8, eight bytes a word, little-endian.
    pub message: [AtomicU64; MAX_MESSAGE / 8],
    /// Armed failpoints: entry `f` counts down per passage of failpoint `f`; the passage that takes
    /// it from 1 to 0 fails. 0: not armed. Written by the host.
    pub fail: [AtomicU32; 16],
    /// Reserved, zero.
    pub reserved: [u64; 420],
}

const _: () = assert!(size_of::<Control>() == crate::layout::PAGE_SIZE as usize);

/// One record of the event ring.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
pub struct Event {
    /// When: the time stamp counter, or with the kernel parameter `stamp=ticket` a number that a locked
    /// add on [`crate::objects::KernelRoot::ticket`] gave, so that it orders the events of all vCPUs.
    pub stamp: u64,
    /// [`EventKind`].
    pub kind: u32,
    /// Task that was running, 0 for none.
    pub task: u32,
    /// By kind, see [`EventKind`].
    pub args: [u64; 5],
    /// Position in this vCPU's stream, from 0: tells the host a torn or overwritten record.
    pub sequence: u64,
}

/// Bits of the argument `how` of [`EventKind::Access`].
pub mod access {
    /// A store; else a load.
    pub const WRITE: u64 = 1;
    /// The soft TLB had the translation; else the tables were walked.
    pub const HIT: u64 = 2;
    /// The translation that was used is no longer what the page tables say.
    pub const STALE: u64 = 4;
    /// The access faulted for good: the program gets an error; `frame` and `value` are 0.
    pub const FAULT: u64 = 8;
}

/// Argument `how` of [`EventKind::FlushLocal`] and [`EventKind::FlushAll`]: which instruction invalidated (SDM
/// vol. 3A, 5.10.4.1). With those of `INVPCID_*` that name one, the argument `pcid` says which PCID.
pub mod flush {
    /// In the current PCID: INVLPG of each page, or for everything a load of CR3.
    pub const CURRENT: u64 = 0;
    /// INVPCID type 0 of each page, in one PCID.
    pub const INVPCID_ADDRESS: u64 = 1;
    /// INVPCID type 1: everything of one PCID but global translations.
    pub const INVPCID_CONTEXT: u64 = 2;
    /// INVPCID type 2, or a change of CR4.PGE: everything of every PCID, and global translations.
    pub const ALL_AND_GLOBAL: u64 = 3;
    /// INVPCID type 3: everything of every PCID but global translations.
    pub const ALL: u64 = 4;
}

/// Argument `cr3` of [`EventKind::Cr3Load`]: the operand of the MOV to CR3. Besides the address of the
/// level-4 table, where CR4.PCIDE is set:
pub mod cr3 {
    /// The PCID.
    pub const PCID: u64 = 0xfff;
    /// What is cached for the PCID stays.
    pub const NO_FLUSH: u64 = 1 << 63;
}

/// Argument `cause` of [`EventKind::MapcountChange`] and [`EventKind::RefcountChange`].
pub mod cause {
    /// An entry begins to map the folio: a fault, or a process's first segments.
    pub const MAP: u64 = 0;
    /// An entry of a forked child does.
    pub const SHARE: u64 = 1;
    /// An entry no longer does.
    pub const UNMAP: u64 = 2;
    /// Somebody keeps the frame for a while, or has kept it.
    pub const HOLD: u64 = 3;
    /// A device, or whoever works for it, uses the frame: its contents stay where they are.
    pub const PIN: u64 = 4;
    /// It is in a file's page cache or in the swap cache, or no longer.
    pub const CACHE: u64 = 5;
}

/// Argument `walker` of [`EventKind::WalkBegin`] and [`EventKind::WalkEnd`]: who walks, and so what keeps the
/// tables where they are meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u64)]
pub enum Walker {
    /// A page fault, under the VMA's lock or the mmap_lock.
    Fault = 0,
    /// An access of the kernel to user memory, with interrupts off and the mm loaded.
    User = 1,
    /// munmap, madvise or the end of an mm, under the mmap_lock.
    Unmap = 2,
    /// mprotect, under the mmap_lock.
    Protect = 3,
    /// fork, which copies entries, under the mmap_lock.
    Fork = 4,
    /// A walk back from a folio, under the lock of its anon_vmas, or of its file's i_mmap.
    Rmap = 5,
    /// A look into another process's memory, in an RCU read section.
    Peek = 6,
    /// The pages of a range are pinned, under the mmap_lock.
    Gup = 20,
    /// The same without a lock, with interrupts off and the mm loaded.
    GupFast = 21,
    /// ftruncate or fallocate, which unmaps a file's pages wherever they are mapped, under its i_mmap lock.
    Truncate = 7,
    /// mremap, which moves entries and tables, under the mmap_lock.
    Move = 8,
    /// The folios of a range are taken to be migrated, under the mmap_lock.
    Migrate = 9,
}

impl Walker {
    /// The walker with number `value`.
    #[must_use]
    pub const fn from_u64(value: u64) -> Option<Self> {
        Some(match value {
            0 => Self::Fault,
            1 => Self::User,
            2 => Self::Unmap,
            3 => Self::Protect,
            4 => Self::Fork,
            5 => Self::Rmap,
            6 => Self::Peek,
            20 => Self::Gup,
            21 => Self::GupFast,
            7 => Self::Truncate,
            8 => Self::Move,
            9 => Self::Migrate,
            _ => return None,
        })
    }
    /// The name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fault => "fault",
            Self::User => "user access",
            Self::Unmap => "unmap",
            Self::Protect => "mprotect",
            Self::Fork => "fork",
            Self::Rmap => "rmap walk",
            Self::Peek => "peek",
            Self::Gup => "get_user_pages",
            Self::GupFast => "fast get_user_pages",
            Self::Truncate => "truncate",
            Self::Move => "mremap",
            Self::Migrate => "migration",
        }
    }
}

macro_rules! events {
    ($($variant:ident = $id:literal, $name:literal, [$($arg:literal),*];)+) => {
        /// What happened, and what the arguments of its record are.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum EventKind { $(#[doc = concat!($name, $(" ", $arg),*)] $variant = $id,)+ }
        impl EventKind {
            /// Every kind, in order of its number.
            pub const ALL: &'static [EventKind] = &[$(EventKind::$variant,)+];
            /// The name in reports.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(EventKind::$variant => $name,)+ }
            }
            /// Names of the arguments that are used.
            #[must_use]
            pub const fn arg_names(self) -> &'static [&'static str] {
                match self { $(EventKind::$variant => &[$($arg),*],)+ }
            }
            /// The kind with number `id`.
            #[inline]
            #[must_use]
            pub const fn from_id(id: u32) -> Option<Self> {
                match id { $($id => Some(EventKind::$variant),)+ _ => None }
            }
        }
    };
}

events! {
    SyscallEnter = 0, "syscall-enter", ["nr", "a0", "a1", "a2", "a3"];
    SyscallExit = 1, "syscall-exit", ["nr", "result"];
    FaultEnter = 2, "fault-enter", ["gva", "error", "rip"];
    FaultExit = 3, "fault-exit", ["gva", "result"];
    PteChange = 4, "pte-change", ["mm", "gva", "level", "old", "new"];
    Cr3Load = 5, "cr3-load", ["cr3", "mm"];
    FlushLocal = 6, "flush-local", ["mm", "start", "end", "how", "pcid"];
    FlushAll = 7, "flush-all", ["mm", "how", "pcid"];
    ShootdownBegin = 8, "shootdown-begin", ["mm", "start", "end", "targets"];
    ShootdownEnd = 9, "shootdown-end", ["mm", "targets"];
    IpiSend = 10, "ipi-send", ["vector", "targets"];
    IpiReceive = 11, "ipi-receive", ["vector"];
    IpiAck = 12, "ipi-ack", ["from"];
    FrameAlloc = 13, "frame-alloc", ["frame", "order", "kind"];
    FrameFree = 14, "frame-free", ["frame", "order", "kind"];
    MapcountChange = 15, "mapcount", ["frame", "new", "old", "cause"];
    RefcountChange = 16, "refcount", ["frame", "new", "old", "cause"];
    VmaAttach = 17, "vma-attach", ["mm", "vma", "start", "end", "flags"];
    VmaDetach = 18, "vma-detach", ["mm", "vma", "start", "end"];
    LockAcquire = 19, "lock-acquire", ["lock", "class", "tried", "mm"];
    LockRelease = 20, "lock-release", ["lock", "class", "asleep"];
    Switch = 21, "switch", ["from", "to"];
    MmCreate = 22, "mm-create", ["mm", "pgd", "object"];
    MmDestroy = 23, "mm-destroy", ["mm"];
    TaskCreate = 24, "task-create", ["task", "mm"];
    TaskExit = 25, "task-exit", ["task", "status"];
    LazyEnter = 26, "lazy-enter", ["mm"];
    LazyLeave = 27, "lazy-leave", ["mm", "tlb_gen"];
    Access = 28, "access", ["gva", "frame", "value", "how"];
    LockWait = 29, "lock-wait", ["lock", "class"];
    CpumaskSet = 30, "cpumask-set", ["mm"];
    CpumaskClear = 31, "cpumask-clear", ["mm"];
    TlbGen = 32, "tlb-gen", ["mm", "gen"];
    MmCount = 33, "mm-count", ["mm", "count"];
    VmaAlloc = 34, "vma-alloc", ["vma", "generation"];
    VmaFree = 35, "vma-free", ["vma", "generation"];
    VmaFound = 36, "vma-found", ["mm", "vma", "gva", "generation", "lock"];
    VmaChange = 40, "vma-change", ["mm", "vma", "start", "end", "flags"];
    WalkBegin = 37, "walk-begin", ["mm", "gva", "walker"];
    WalkEnd = 38, "walk-end", ["mm", "gva", "walker"];
    MmUsers = 39, "mm-users", ["mm", "users"];
    FailpointHit = 41, "failpoint", ["failpoint"];
    MmFree = 42, "mm-free", ["mm"];
    SplitQueue = 43, "split-queue", ["frame", "in"];
    LockWake = 44, "lock-wake", ["lock", "class", "tasks"];
    RcuEnter = 48, "rcu-enter", ["nesting"];
    RcuExit = 49, "rcu-exit", ["nesting"];
    RcuRetire = 50, "rcu-retire", ["object", "kind"];
    RcuGpStart = 51, "rcu-gp-start", ["grace"];
    RcuGpWait = 52, "rcu-gp-wait", ["grace", "cpus"];
    RcuGpEnd = 53, "rcu-gp-end", ["grace"];
    RcuFree = 54, "rcu-free", ["object", "kind"];
    FolioSplit = 59, "folio-split", ["frame", "order", "held"];
    Pin = 60, "pin", ["frame", "new", "old", "gva"];
    DiskSubmit = 61, "disk-submit", ["op", "sector", "gpa", "bytes", "of-file"];
    DiskDone = 62, "disk-done", ["op", "sector", "gpa", "status"];
    SwapSlot = 55, "swap-slot", ["slot", "count", "old"];
    SwapCache = 56, "swap-cache", ["slot", "frame", "in"];
    Lru = 57, "lru", ["frame", "list"];
    Charge = 58, "charge", ["frame", "group", "old", "pages"];
}

/// What the arguments `kind` of [`EventKind::RcuRetire`] and [`EventKind::RcuFree`] say.
pub mod rcu_object {
    /// A page-table page, by its GPA.
    pub const TABLE: u64 = 1;
    /// An [`crate::objects::Mm`] and its level-4 table, by the GPA of the object.
    pub const MM: u64 = 2;
    /// A [`crate::objects::VmaNode`], by its GPA.
    pub const VMA_NODE: u64 = 3;
    /// The name in reports.
    #[must_use]
    pub const fn name(kind: u64) -> &'static str {
        match kind {
            TABLE => "page-table page",
            MM => "mm",
            VMA_NODE => "VMA node",
            _ => "object",
        }
    }
}
