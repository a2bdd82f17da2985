//! Layouts of the kernel's own objects, which the host reads while the vCPUs are paused.
//!
//! Objects refer to each other by guest physical address ([`Link`]), never by pointer, so the same
//! bytes mean the same on every engine. All fields are atomics: object memory comes from
//! type-stable slabs that never give a page back, so a stale reference may read a recycled object
//! but never breaks memory safety.

use core::fmt;
use core::marker::PhantomData;
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use zerocopy::{FromBytes, IntoBytes, KnownLayout};

use crate::layout::MAX_CPUS;

/// Guest physical address of a `T`; 0 means none (frame 0 is never used).
pub struct Pa<T>(pub u64, PhantomData<fn() -> T>);

impl<T> Pa<T> {
    /// No object.
    pub const NULL: Self = Self(0, PhantomData);
    /// The object at guest physical address `gpa`.
    #[must_use]
    pub const fn new(gpa: u64) -> Self {
        Self(gpa, PhantomData)
    }
    /// True where there is no object.
    #[must_use]
    pub const fn is_null(self) -> bool {
        self.0 == 0
    }
    /// The object, if there is one.
    #[must_use]
    pub const fn some(self) -> Option<Self> {
        if self.is_null() { None } else { Some(self) }
    }
}

impl<T> Clone for Pa<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Pa<T> {}
impl<T> PartialEq for Pa<T> {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}
impl<T> Eq for Pa<T> {}
impl<T> fmt::Debug for Pa<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A field that holds a [`Pa`].
#[repr(transparent)]
#[derive(FromBytes, IntoBytes, KnownLayout)]
pub struct Link<T> {
    gpa: AtomicU64,
    target: PhantomData<T>,
}

impl<T> Link<T> {
    /// Reads the link.
    pub fn load(&self, order: Ordering) -> Pa<T> {
        Pa::new(self.gpa.load(order))
    }
    /// Writes the link.
    pub fn store(&self, to: Pa<T>, order: Ordering) {
        self.gpa.store(to.0, order);
    }
    /// Reads the link with [`Ordering::Relaxed`]: for links that a lock protects.
    pub fn get(&self) -> Pa<T> {
        self.load(Ordering::Relaxed)
    }
    /// Writes the link with [`Ordering::Relaxed`]: for links that a lock protects.
    pub fn set(&self, to: Pa<T>) {
        self.store(to, Ordering::Relaxed);
    }
}

impl<T> fmt::Debug for Link<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

/// What a frame is used for ([`Folio::kind`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum FrameKind {
    /// Not a head: covered by the block whose head lies before it, or, below
    /// [`crate::boot::BootInfo::free_start`], reserved (boot structures, kernel image).
    Tail = 0,
    /// Head of a free block in the buddy allocator.
    Buddy = 1,
    /// Free, order 0, on the list of CPU [`Folio::owner`].
    PerCpu = 2,
    /// A page-table page; [`Folio::owner`] is its [`Mm`], [`Folio::index`] its level (1 to 4).
    Table = 3,
    /// A page of kernel objects; [`Folio::owner`] is the index of its slab in
    /// [`KernelRoot::slabs`].
    Slab = 4,
    /// A folio of anonymous user memory.
    Anon = 5,
    /// A kernel stack.
    Stack = 6,
    /// The folio descriptors and other memory that the kernel took at boot for good.
    Kernel = 7,
    /// Allocated, and not yet given one of the other kinds.
    Unset = 8,
    /// A page-table page to which no entry leads any more, and which is freed when a grace period is over
    /// ([`CpuRcu`]); as [`FrameKind::Table`] otherwise. One of level 4 takes its [`Mm`] with it.
    Retired = 9,
}

impl FrameKind {
    /// Every kind.
    pub const ALL: &'static [FrameKind] = &[
        Self::Tail,
        Self::Buddy,
        Self::PerCpu,
        Self::Table,
        Self::Slab,
        Self::Anon,
        Self::Stack,
        Self::Kernel,
        Self::Unset,
        Self::Retired,
    ];
    /// The kind with number `value`.
    #[must_use]
    pub fn from_u8(value: u8) -> Option<Self> {
        Self::ALL.get(usize::from(value)).copied()
    }
    /// True where a frame of this kind belongs to the allocator.
    #[must_use]
    pub fn is_free(self) -> bool {
        matches!(self, Self::Buddy | Self::PerCpu)
    }
}

/// Descriptor of one frame; the descriptor of the first frame of a block is the folio's.
/// Descriptors form an array ([`KernelRoot::folios`]) indexed by frame number.
#[repr(C, align(64))]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct Folio {
    /// [`FrameKind`].
    pub kind: AtomicU8,
    /// log2 of the block's frames.
    pub order: AtomicU8,
    /// [`folio_flags`].
    pub flags: AtomicU8,
    /// Zero.
    pub reserved: AtomicU8,
    /// References; 0 exactly while the frame is free. Each mapping holds one.
    pub refcount: AtomicU32,
    /// Present PTEs that map it.
    pub mapcount: AtomicU32,
    /// Times this frame was allocated, so that reuse can be told.
    pub generation: AtomicU32,
    /// Anonymous folio: its [`AnonVma`]. Others: by [`FrameKind`].
    pub owner: AtomicU64,
    /// Anonymous folio: page offset in the VMAs that map it (`vma.pgoff + (gva - vma.start) / 4096`).
    pub index: AtomicU64,
    /// Next on a list (free list, slab list): frame number, 0 for none.
    pub next: AtomicU64,
    /// Previous on a list: frame number, 0 for none.
    pub prev: AtomicU64,
    /// Table: spin lock word of the split page-table lock.
    pub lock: AtomicU64,
    /// Table: present entries. Slab: objects in use.
    pub used: AtomicU64,
}

/// Bits of [`Folio::flags`].
pub mod folio_flags {
    /// Its only mapping may be written without copying (Linux's PageAnonExclusive).
    pub const EXCLUSIVE: u8 = 1;
}

/// Bits of [`Vma::flags`] (Linux's `VM_*` values where Linux has them).
#[allow(missing_docs)]
pub mod vma_flags {
    pub const READ: u64 = 1;
    pub const WRITE: u64 = 2;
    pub const EXEC: u64 = 4;
    pub const SHARED: u64 = 8;
    /// Grows down on faults below it (MAP_GROWSDOWN; the initial stack).
    pub const GROWSDOWN: u64 = 0x100;
    /// Read in order (MADV_SEQUENTIAL).
    pub const SEQ_READ: u64 = 0x8000;
    /// Read at random (MADV_RANDOM).
    pub const RAND_READ: u64 = 0x1_0000;
    /// Was writable and private once, so it counts against memory: keeps it apart from neighbours
    /// that never were.
    pub const ACCOUNT: u64 = 0x10_0000;
    /// The program's own memory, not under test ([`crate::syscall::nr::TESTBED_WIRE`]): populated, and
    /// copied at fork instead of shared, so that no access to it ever faults.
    pub const WIRED: u64 = 1 << 33;
    /// No 2 MiB folios (MAP_STACK).
    pub const NOHUGEPAGE: u64 = 0x4000_0000;
    /// The `brk` heap.
    pub const HEAP: u64 = 1 << 32;
    /// Not counted against memory (MAP_NORESERVE).
    pub const NORESERVE: u64 = 0x20_0000;
}

/// One mapping of an mm.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct Vma {
    /// First address, page aligned.
    pub start: AtomicU64,
    /// First address past it, page aligned.
    pub end: AtomicU64,
    /// [`vma_flags`].
    pub flags: AtomicU64,
    /// Page offset of `start` (anonymous: `start / 4096` when it was created, as in Linux).
    pub pgoff: AtomicU64,
    /// The mm that it belongs to.
    pub mm: Link<Mm>,
    /// 1 while it is linked in `mm`'s tree, 0 otherwise.
    pub attached: AtomicU32,
    /// +1 at every allocation and every free of this slot: odd while live.
    pub generation: AtomicU32,
    /// The anon_vma that new folios of it get; none until its first fault.
    pub anon_vma: Link<AnonVma>,
    /// First of its [`AnonVmaChain`]s, linked by [`AnonVmaChain::next_of_vma`].
    pub chains: Link<AnonVmaChain>,
}

/// Entries of a [`VmaNode`].
pub const VMA_NODE_SLOTS: usize = 10;

/// One entry of a [`VmaNode`].
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct VmaSlot {
    /// Leaf: the VMA's start. Inner: the least start below it.
    pub start: AtomicU64,
    /// GPA of the [`Vma`] (leaf) or of the child [`VmaNode`].
    pub child: AtomicU64,
    /// Bytes of the largest hole below it: in a leaf the hole between the VMA before and this one
    /// (before the first: from address 0).
    pub gap: AtomicU64,
}

/// Node of an mm's tree of VMAs: a B+ tree ordered by start address.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct VmaNode {
    /// 0 for a leaf, else one more than its children's.
    pub level: AtomicU32,
    /// Used slots, packed at the front.
    pub count: AtomicU32,
    /// The entries, in order.
    pub slots: [VmaSlot; VMA_NODE_SLOTS],
    /// Zero.
    pub reserved: AtomicU64,
}

/// An address space.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct Mm {
    /// Number of the address space, never reused; 0 in a free slot.
    pub id: AtomicU64,
    /// GPA of its level-4 table.
    pub pgd: AtomicU64,
    /// Tasks that use it as user memory (Linux's mm_users).
    pub users: AtomicU32,
    /// References of any kind; all users together hold one (Linux's mm_count).
    pub count: AtomicU32,
    /// CPUs that may hold translations of it.
    pub cpumask: AtomicU64,
    /// +1 before every shootdown.
    pub tlb_gen: AtomicU64,
    /// mmap_lock: [`RwLockWord`].
    pub mmap_lock: AtomicU64,
    /// Root of the VMA tree, none while empty.
    pub vmas: Link<VmaNode>,
    /// VMAs in the tree.
    pub map_count: AtomicU64,
    /// Present user leaf entries.
    pub rss: AtomicU64,
    /// Page-table pages, all levels.
    pub tables: AtomicU64,
    /// Start of the `brk` area.
    pub brk_start: AtomicU64,
    /// Current `brk`.
    pub brk: AtomicU64,
    /// Instruction range of [`crate::syscall::nr::TESTBED_FAULT_FIXUP`] and its target.
    pub fixup: [AtomicU64; 3],
    /// Next in [`KernelRoot::mms`].
    pub next: Link<Mm>,
    /// +1 at every allocation and every free of this slot: odd while live.
    pub generation: AtomicU32,
    /// Unmaps in flight that have cleared entries and not yet flushed (Linux's tlb_flush_pending).
    pub flush_pending: AtomicU32,
}

/// Encoding of a reader-writer lock word.
pub struct RwLockWord;

impl RwLockWord {
    /// Set while a writer holds the lock.
    pub const WRITER: u64 = 1 << 63;
    /// Set while a writer waits, which keeps new readers out.
    pub const WAITING: u64 = 1 << 62;
    /// The bits that count readers.
    pub const READERS: u64 = 0xffff_ffff;
}

/// Root of a reverse mapping: every VMA that may map the folios that point to it is on its list.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct AnonVma {
    /// The anon_vma of the oldest ancestor, whose lock protects the whole family.
    pub root: Link<AnonVma>,
    /// The anon_vma of the process that forked this one's.
    pub parent: Link<AnonVma>,
    /// First chain of the VMAs on this anon_vma, linked by [`AnonVmaChain::next_of_anon`].
    pub chains: Link<AnonVmaChain>,
    /// Spin lock word (of the root: the family's lock).
    pub lock: AtomicU64,
    /// References: VMAs whose `anon_vma` it is, chains, children, and its own root link.
    pub refcount: AtomicU32,
    /// Children plus VMAs whose `anon_vma` it is: decides reuse at fork (Linux's `degree`).
    pub degree: AtomicU32,
    /// +1 at every allocation and every free of this slot: odd while live.
    pub generation: AtomicU32,
    /// VMAs whose `anon_vma` it is: the part of `degree` that is not children.
    pub active: AtomicU32,
}

/// Puts one VMA on one anon_vma's list.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct AnonVmaChain {
    /// The VMA.
    pub vma: Link<Vma>,
    /// The anon_vma.
    pub anon_vma: Link<AnonVma>,
    /// Next chain of the same VMA.
    pub next_of_vma: Link<AnonVmaChain>,
    /// Next chain of the same anon_vma.
    pub next_of_anon: Link<AnonVmaChain>,
    /// Previous chain of the same anon_vma.
    pub prev_of_anon: Link<AnonVmaChain>,
    /// +1 at every allocation and every free of this slot: odd while live.
    pub generation: AtomicU32,
    /// Zero.
    pub reserved: AtomicU32,
}

/// What a task is doing ([`Task::state`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum TaskState {
    /// Free slot.
    Free = 0,
    /// On a run queue.
    Ready = 1,
    /// On a CPU.
    Running = 2,
    /// Waiting; [`Task::waits_for`] says for what.
    Blocked = 3,
    /// Has exited. A leader stays so until its whole process has and its parent has waited for it,
    /// another thread until its CPU has left its stack.
    Zombie = 4,
}

impl TaskState {
    /// The state with number `value`.
    #[must_use]
    pub fn from_u32(value: u32) -> Option<Self> {
        Some(match value {
            0 => Self::Free,
            1 => Self::Ready,
            2 => Self::Running,
            3 => Self::Blocked,
            4 => Self::Zombie,
            _ => return None,
        })
    }
}

/// A thread of execution with its own kernel stack.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct Task {
    /// Thread number (Linux's tid), never reused; 0 in a free slot.
    pub id: AtomicU32,
    /// Number of the process that it belongs to (Linux's tgid).
    pub process: AtomicU32,
    /// Process of its parent, 0 for the first.
    pub parent: AtomicU32,
    /// [`TaskState`].
    pub state: AtomicU32,
    /// Address space, none once it has exited.
    pub mm: Link<Mm>,
    /// CPUs that it may run on.
    pub affinity: AtomicU64,
    /// CPU that it runs on or ran on last.
    pub cpu: AtomicU32,
    /// Exit status as wait4 gives it.
    pub status: AtomicU32,
    /// Blocked: the futex word's GVA, or 1 for a child's exit.
    pub waits_for: AtomicU64,
    /// Address to clear and wake at exit (CLONE_CHILD_CLEARTID), 0 for none.
    pub clear_tid: AtomicU64,
    /// GVA of the lowest byte of its kernel stack.
    pub stack: AtomicU64,
    /// Saved stack pointer while it is not running.
    pub saved_sp: AtomicU64,
    /// Next on a run queue or a wait queue.
    pub next: Link<Task>,
    /// Next of all tasks ([`KernelRoot::tasks`]).
    pub next_task: Link<Task>,
    /// GVA of the saved user registers on its kernel stack ([`UserFrame`]), 0 before the first.
    pub frame: AtomicU64,
    /// First task of its process, which stays (as a zombie) until the whole process was waited for.
    /// Its `status`, once it has exited, is the process's.
    pub leader: Link<Task>,
    /// Address to which it writes its number when it first runs (CLONE_CHILD_SETTID), 0 for none.
    pub set_tid: AtomicU64,
    /// [`task_flags`].
    pub flags: AtomicU32,
    /// Leader: tasks of the process that have not exited.
    pub threads: AtomicU32,
}

impl Task {
    /// Value of [`Task::waits_for`] while it waits for the exit of a child.
    pub const WAITS_FOR_CHILD: u64 = 1;
}

/// Bits of [`Task::flags`].
pub mod task_flags {
    /// It exits instead of returning to CPL 3.
    pub const KILLED: u32 = 1;
    /// Leader: the whole process exits, and the leader's `status` is final
    /// (Linux's SIGNAL_GROUP_EXIT).
    pub const GROUP_EXIT: u32 = 2;
}

/// User registers as the kernel's entry code saves them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)] // the architecture's own names
pub struct UserFrame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rax: u64,
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// What the kernel keeps per CPU and the host reads; two cache lines.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct Cpu {
    /// The task that runs, none while idle.
    pub current: Link<Task>,
    /// The mm whose pgd is in CR3, none for the kernel's own boot tables (lazy or not).
    pub loaded_mm: Link<Mm>,
    /// `tlb_gen` of `loaded_mm` up to which this CPU has flushed.
    pub tlb_gen: AtomicU64,
    /// 1 while it runs no user task but keeps `loaded_mm` loaded.
    pub lazy: AtomicU64,
    /// Per-CPU free list: first frame number, 0 for none.
    pub free_list: AtomicU64,
    /// Frames on that list.
    pub free_count: AtomicU64,
    /// First of the run queue.
    pub queue: Link<Task>,
    /// Tasks on the run queue.
    pub queued: AtomicU64,
    /// The flush that this CPU has asked others for.
    pub flush: FlushRequest,
    /// Saved stack pointer of its idle loop while a task runs.
    pub idle_sp: AtomicU64,
    /// The task that exited here last, until the context after it has freed its stack.
    pub dead: Link<Task>,
    /// Its soft TLB, none with `tlb=hw`.
    pub soft_tlb: Link<SoftTlb>,
    /// Its part of RCU.
    pub rcu: CpuRcu,
}

/// RCU on one CPU: what it reads, and the grace period that it waits for.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct CpuRcu {
    /// Odd while the CPU may be inside a read section: in the kernel, and not waiting for anything. +1 at
    /// every change, so that whoever saw it odd and sees another value knows of a quiescent state between
    /// (the `RCU_WATCHING` counter of Linux's context tracking).
    pub watching: AtomicU64,
    /// Read sections that are open here, one inside the other.
    pub nesting: AtomicU64,
    /// Retired page-table pages for which no grace period has begun: first frame number of a list by
    /// [`Folio::next`], 0 for none.
    pub retired: AtomicU64,
    /// Those that the grace period under way is for.
    pub waiting: AtomicU64,
    /// Grace periods that this CPU has begun and ended: odd while one is under way.
    pub grace: AtomicU64,
    /// CPUs that were watching when it began and were not seen quiescent since.
    pub pending: AtomicU64,
    /// What `watching` of each CPU of `pending` was when it began.
    pub seen: [AtomicU64; MAX_CPUS],
}

impl CpuRcu {
    /// True where a CPU whose `watching` was `seen` at the start of a grace period and is `now` holds it up.
    #[must_use]
    pub const fn holds_up(seen: u64, now: u64) -> bool {
        seen % 2 == 1 && seen == now
    }
}

/// Translations that a [`SoftTlb`] holds.
pub const SOFT_TLB_PAGES: usize = 190;
/// Pointers to leaf tables that a [`SoftTlb`] holds (the paging-structure cache of PDEs).
pub const SOFT_TLB_TABLES: usize = 64;

/// One entry of a [`SoftTlb`].
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct SoftEntry {
    /// First address that it translates, with bit 0 set; 0 for an unused entry.
    pub tag: AtomicU64,
    /// The entry as it was when it was walked: a leaf entry, or the GPA of a leaf table.
    pub value: AtomicU64,
}

/// One CPU's TLB in software: it keeps every entry until a flush covers it, the worst that the
/// architecture allows. One page.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct SoftTlb {
    /// Leaf entries by page.
    pub pages: [SoftEntry; SOFT_TLB_PAGES],
    /// Leaf tables by the 2 MiB that they map.
    pub tables: [SoftEntry; SOFT_TLB_TABLES],
    /// Entries that had to leave because it was full: a run in which this is not 0 may miss bugs.
    pub evictions: AtomicU64,
    /// Entries of `tables` filled since it was last emptied: 0 where it is empty.
    pub tables_used: AtomicU64,
    /// Zero.
    pub reserved: [AtomicU64; 2],
}

const _: () = assert!(size_of::<SoftTlb>() == crate::layout::PAGE_SIZE as usize);

/// A shootdown in flight: written by its CPU, acknowledged by the others.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct FlushRequest {
    /// Address space.
    pub mm: Link<Mm>,
    /// First address.
    pub start: AtomicU64,
    /// First address past the range; `u64::MAX` for everything.
    pub end: AtomicU64,
    /// CPUs that have not acknowledged.
    pub pending: AtomicU64,
    /// `tlb_gen` of the address space that this flush brings a CPU up to.
    pub tlb_gen: AtomicU64,
}

/// Orders that the buddy allocator keeps, 0 to 10 (4 KiB to 4 MiB).
pub const ORDERS: usize = 11;

/// Slabs, by index in [`KernelRoot::slabs`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
#[allow(missing_docs)] // named after their objects
pub enum SlabId {
    Mm = 0,
    Vma = 1,
    VmaNode = 2,
    AnonVma = 3,
    AnonVmaChain = 4,
    Task = 5,
}

/// Number of slabs.
pub const SLABS: usize = 6;

/// Allocator of one type of object.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct Slab {
    /// Bytes of one object.
    pub object_bytes: AtomicU64,
    /// Objects in use.
    pub used: AtomicU64,
    /// Frames that it has taken.
    pub frames: AtomicU64,
    /// First free object; 0 for none. A free object is zero but for its generation and one link to
    /// the next: `Mm::next`, `Vma::chains`, `VmaNode::slots[0].child`, `AnonVma::chains`,
    /// `AnonVmaChain::next_of_vma`, `Task::next`.
    pub free: AtomicU64,
    /// Spin lock word.
    pub lock: AtomicU64,
}

/// Where the host starts to read: the kernel writes its GPA to
/// [`crate::boot::BootInfo::kernel_root`] when everything below is valid.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct KernelRoot {
    /// [`crate::boot::MAGIC`].
    pub magic: AtomicU64,
    /// [`crate::layout_hash`] of the kernel.
    pub layout_hash: AtomicU64,
    /// GPA of the kernel's own level-4 table (the boot one).
    pub pgd: AtomicU64,
    /// First descriptor of the array of folios.
    pub folios: Link<Folio>,
    /// Frames, and descriptors in that array.
    pub nr_frames: AtomicU64,
    /// First frame that the allocator manages; frames below are reserved or adopted.
    pub first_frame: AtomicU64,
    /// Free frames, in the buddy allocator and on the CPUs' lists.
    pub free_frames: AtomicU64,
    /// Lock of the buddy allocator.
    pub buddy_lock: AtomicU64,
    /// Heads of the buddy's free lists by order: frame number, 0 for none.
    pub buddy: [AtomicU64; ORDERS],
    /// Slabs by [`SlabId`].
    pub slabs: [Slab; SLABS],
    /// First of all live mms.
    pub mms: Link<Mm>,
    /// Lock of that list.
    pub mms_lock: AtomicU64,
    /// First of all tasks.
    pub tasks: Link<Task>,
    /// Lock of tasks, run queues and wait queues.
    pub sched_lock: AtomicU64,
    /// First of the tasks that wait for a futex, in the order of their arrival.
    pub futex_queue: Link<Task>,
    /// Next number of a task.
    pub next_task: AtomicU64,
    /// Next number of an mm.
    pub next_mm: AtomicU64,
    /// Events stamped so far, with `stamp=ticket`.
    pub ticket: AtomicU64,
    /// CPUs that are up.
    pub online: AtomicU64,
    /// Used entries of `cpus`.
    pub nr_cpus: AtomicU64,
    /// Per-CPU state.
    pub cpus: [Cpu; MAX_CPUS],
}
