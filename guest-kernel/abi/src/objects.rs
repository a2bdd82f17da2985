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
    /// The one frame of zeroes that anonymous memory maps until it is written ([`KernelRoot::zero_frame`]).
    /// Its mappings are not counted: their entries carry [`crate::pte::PteFlags::SPECIAL`].
    Zero = 10,
    /// A page of a file; [`Folio::owner`] is its [`File`], none once it was truncated away, and
    /// [`Folio::index`] the page in the file.
    File = 11,
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
        Self::Zero,
        Self::File,
    ];
    /// The kind with number `value`.
    #[must_use]
    pub fn from_u8(value: u8) -> Option<Self> {
        Self::ALL.get(usize::from(value)).copied()
    }
    /// The kind with number `value`, an argument of an event.
    #[must_use]
    pub fn from_u64(value: u64) -> Option<Self> {
        Self::from_u8(u8::try_from(value).ok()?)
    }
    /// True where a frame of this kind is a page-table page, retired or not.
    #[must_use]
    pub fn is_table(self) -> bool {
        matches!(self, Self::Table | Self::Retired)
    }
    /// True where programs map frames of this kind, and each mapping counts.
    #[must_use]
    pub fn is_user(self) -> bool {
        matches!(self, Self::Anon | Self::File)
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
    /// [`folio_state`].
    pub state: AtomicU8,
    /// References; 0 exactly while the frame is free. Each mapping holds one, a file's page cache or the swap cache
    /// another.
    pub refcount: AtomicU32,
    /// Present entries that map it, or a part of it, at whatever level (Linux's `_large_mapcount`).
    pub mapcount: AtomicU32,
    /// Times this frame was allocated, so that reuse can be told.
    pub generation: AtomicU32,
    /// Anonymous folio: its [`AnonVma`]. Others: by [`FrameKind`].
    pub owner: AtomicU64,
    /// Anonymous folio, page of a file: page offset in the VMAs that map it
    /// (`vma.pgoff + (gva - vma.start) / 4096`).
    pub index: AtomicU64,
    /// Next on a list (free list, slab list, LRU list; of the second page of a folio of 2 MiB: split queue): frame number, 0 for
    /// none.
    pub next: AtomicU64,
    /// Previous on a list: frame number, 0 for none. Table of level 2: first of a list by [`Folio::next`] of tables of
    /// level 1 set aside, one for each of its entries that maps 2 MiB (Linux's `pmd_huge_pte`).
    pub prev: AtomicU64,
    /// Table: spin lock word of the split page-table lock. User memory: of its folio lock.
    pub lock: AtomicU64,
    /// Table: entries that are not none. Slab: objects in use. Anonymous folio of one page: its swap slot plus one, 0 while
    /// it is not in the swap cache; of 2 MiB: entries of level 2 that map it (Linux's `_entire_mapcount`).
    pub used: AtomicU32,
    /// Times that it is pinned (Linux's FOLL_PIN). Each pin holds a reference too. A count of its own, as Linux's large
    /// folios have, and not [`Folio::refcount`] in steps of 1024 (GUP_PIN_COUNTING_BIAS), which a small folio of
    /// Linux has for want of room: so it is exact, and the host can say which reference is a device's.
    pub pins: AtomicU32,
}

/// Bits of [`Folio::flags`].
pub mod folio_flags {
    /// Its only mapping may be written without copying (Linux's PageAnonExclusive). Of a folio of 2 MiB the head has it
    /// for an entry of level 2; each page, tails too, for entries of level 1.
    pub const EXCLUSIVE: u8 = 1;
    /// Page of a file that fallocate has made and nobody has used, or that was not read from the disk yet (Linux: not
    /// uptodate).
    pub const FRESH: u8 = 2;
    /// A program has no use for its contents (MADV_FREE): it may be dropped for a page of zeroes as long as no
    /// entry that maps it is dirty.
    pub const LAZYFREE: u8 = 4;
    /// Somebody is about to move it to another frame, and nobody else may (Linux's PG_isolated).
    pub const ISOLATED: u8 = 8;
}

/// Bits of [`Folio::state`]: what reclaim knows of an anonymous folio, and what is known of a page of a file on the disk
/// (DIRTY, UPTODATE, WRITEBACK and READING, of its place there instead of a slot). Pages of files in memory have none.
pub mod folio_state {
    /// It is on an LRU list.
    pub const LRU: u8 = 1;
    /// It is, or was when it was taken off, on the active one.
    pub const ACTIVE: u8 = 2;
    /// It was used since it was last looked at.
    pub const REFERENCED: u8 = 4;
    /// What it holds is nowhere else, whatever its entries say: not in its slot, where it is in the swap cache.
    pub const DIRTY: u8 = 8;
    /// In the swap cache: it holds what its slot held when it was read, or was filled before it came there.
    pub const UPTODATE: u8 = 16;
    /// In the swap cache: it is being written to its slot.
    pub const WRITEBACK: u8 = 32;
    /// In the swap cache: it is being read from its slot.
    pub const READING: u8 = 64;
    /// It is, or was when it was taken off, on the list of those that cannot be reclaimed.
    pub const UNEVICTABLE: u8 = 128;
    /// Of the second page of a folio of 2 MiB, which has no other: the folio is on the split queue
    /// ([`super::KernelRoot::split_queue`]).
    pub const DEFERRED: u8 = 1;
}

/// The reclaim thread (Linux's kswapd), and when it works.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct Kswapd {
    /// Its task, none without the thread.
    pub task: Link<Task>,
    /// With fewer free frames who allocates reclaims itself. 0 without the thread, as the two below.
    pub min: AtomicU64,
    /// With fewer free frames an allocation wakes the thread.
    pub low: AtomicU64,
    /// With as many free frames the thread is content.
    pub high: AtomicU64,
    /// Times in a row that it has freed nothing (Linux's `kswapd_failures`): as many as
    /// [`Kswapd::MAX_FAILURES`], and nobody wakes it until somebody else has freed something.
    pub failures: AtomicU64,
    /// CPUs that have folios in hand to reclaim them, the thread's or another one.
    pub reclaiming: AtomicU64,
}

impl Kswapd {
    /// Failures after which it is given up (Linux's MAX_RECLAIM_RETRIES).
    pub const MAX_FAILURES: u64 = 16;
}

/// The thread that gathers small pages in folios of 2 MiB (Linux's khugepaged).
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct Khugepaged {
    /// Its task, none without the thread.
    pub task: Link<Task>,
    /// 1 since somebody has asked for a look at all address spaces, until it begins.
    pub wanted: AtomicU64,
}

/// What is known of one swap slot: a page on the disk.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct SwapSlot {
    /// Entries of page tables that name it. It is free while this and `folio` are 0.
    pub count: AtomicU32,
    /// Number of the memory group that it is charged to, 0 for none (Linux's swap_cgroup).
    pub group: AtomicU32,
    /// GPA of the folio in the swap cache that stands for it, 0 for none.
    pub folio: AtomicU64,
}

/// A transfer between a folio of the swap cache and its slot.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct SwapRequest {
    /// What the disk was asked for.
    pub disk: crate::disk::DiskRequest,
    /// GPA of the folio; 0 while the request is unused.
    pub folio: AtomicU64,
}

/// Most transfers that are under way at once.
pub const SWAP_REQUESTS: usize = 16;

/// The swap area, and the swap cache: slot to folio by [`SwapSlot::folio`], folio to slot by [`Folio::used`].
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct SwapArea {
    /// The array of slots, none without swap.
    pub slots: Link<SwapSlot>,
    /// Slots.
    pub nr_slots: AtomicU64,
    /// Slots that are not free.
    pub used: AtomicU64,
    /// Where the search for a free one begins.
    pub next: AtomicU64,
    /// First sector of slot 0.
    pub sector: AtomicU64,
    /// Spin lock word of slots, cache and requests.
    pub lock: AtomicU64,
    /// Transfers.
    pub requests: [SwapRequest; SWAP_REQUESTS],
}

/// The LRU lists, by number.
pub mod lru {
    /// Anonymous folios that are reclaimed next.
    pub const INACTIVE: usize = 0;
    /// Anonymous folios that were used more than once.
    pub const ACTIVE: usize = 1;
    /// Folios that a locked mapping keeps in memory, as far as reclaim has met them.
    pub const UNEVICTABLE: usize = 2;
    /// Pages of files on the disk that are reclaimed next.
    pub const INACTIVE_FILE: usize = 3;
    /// Pages of files on the disk that were used more than once.
    pub const ACTIVE_FILE: usize = 4;
    /// Their number.
    pub const LISTS: usize = 5;
    /// Their names.
    pub const NAMES: [&str; LISTS] = [
        "inactive",
        "active",
        "unevictable",
        "inactive file",
        "active file",
    ];

    /// The list on which a folio of this [`super::folio_state`] belongs: a page of a file, or an anonymous one.
    #[must_use]
    pub const fn list_of(state: u8, is_file: bool) -> usize {
        let is_active = state & super::folio_state::ACTIVE != 0;
        if state & super::folio_state::UNEVICTABLE != 0 {
            return UNEVICTABLE;
        }
        match (is_file, is_active) {
            (false, false) => INACTIVE,
            (false, true) => ACTIVE,
            (true, false) => INACTIVE_FILE,
            (true, true) => ACTIVE_FILE,
        }
    }
}

/// One LRU list, or the split queue.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct LruList {
    /// The latest to come: frame number, 0 for none.
    pub first: AtomicU64,
    /// The next to go: frame number, 0 for none.
    pub last: AtomicU64,
    /// Pages of the folios on it.
    pub count: AtomicU64,
}

/// Memory groups that there can be. Their numbers begin with 1; number 0 is the root group, which counts nothing and has no
/// limit.
pub const GROUPS: usize = 15;

/// What [`MemGroup::stats`] are, in pages (names of Linux's memory.stat, and memory.swap.current).
pub mod group_stat {
    /// Frames of anonymous folios, mapped or not.
    pub const ANON: usize = 0;
    /// Frames of pages of files, in a page cache or not any more.
    pub const FILE: usize = 1;
    /// Page-table pages.
    pub const PAGETABLES: usize = 2;
    /// Swap slots, which do not count as [`super::MemGroup::usage`].
    pub const SWAP: usize = 3;
    /// By number.
    pub const NAMES: [&str; 4] = ["anon", "file", "pagetables", "swap"];
}

/// A memory group (Linux's struct mem_cgroup, with its page_counter). What it counts it counts for the groups below it too.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct MemGroup {
    /// 1 from its creation on: groups never go.
    pub live: AtomicU64,
    /// Number of the group that it is part of, lower than its own; 0 for none.
    pub parent: AtomicU64,
    /// Pages that are charged to it. While a charge is tried it may be more than `max`, for a moment.
    pub usage: AtomicU64,
    /// Most of those; [`MemGroup::NO_LIMIT`] for any number.
    pub max: AtomicU64,
    /// The most that `usage` has been.
    pub watermark: AtomicU64,
    /// Charges that would have made it more than `max`, of those below it too.
    pub failures: AtomicU64,
    /// By [`group_stat`].
    pub stats: [AtomicU64; group_stat::NAMES.len()],
}

impl MemGroup {
    /// Linux's PAGE_COUNTER_MAX.
    pub const NO_LIMIT: u64 = i64::MAX as u64 / crate::layout::PAGE_SIZE;
}

/// The memory group that a frame is charged to. Descriptors have no room for it, so there is an array
/// ([`KernelRoot::frame_groups`]) where there are groups at all (Linux's page_cgroup, before it became folio->memcg_data).
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct FrameGroup {
    /// The first frame of a folio, or of a page-table page: number of the group; 0 for none. Other frames: 0.
    pub group: AtomicU8,
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
    /// Stays in memory (mlock).
    pub const LOCKED: u64 = 0x2000;
    /// Read in order (MADV_SEQUENTIAL).
    pub const SEQ_READ: u64 = 0x8000;
    /// Read at random (MADV_RANDOM).
    pub const RAND_READ: u64 = 0x1_0000;
    /// A forked child does not get it (MADV_DONTFORK).
    pub const DONTCOPY: u64 = 0x2_0000;
    /// With LOCKED: pages are locked as they are touched, and not populated (MLOCK_ONFAULT).
    pub const LOCKONFAULT: u64 = 0x8_0000;
    /// A forked child finds zeroes there (MADV_WIPEONFORK).
    pub const WIPEONFORK: u64 = 0x200_0000;
    /// Not part of a core dump (MADV_DONTDUMP).
    pub const DONTDUMP: u64 = 0x400_0000;
    /// 2 MiB folios are welcome (MADV_HUGEPAGE).
    pub const HUGEPAGE: u64 = 0x2000_0000;
    /// Pages with equal contents may be joined (MADV_MERGEABLE).
    pub const MERGEABLE: u64 = 0x8000_0000;
    /// Was writable and private once, so it counts against memory: keeps it apart from neighbours
    /// that never were.
    pub const ACCOUNT: u64 = 0x10_0000;
    /// The program's own memory, not under test ([`crate::syscall::nr::TESTBED_WIRE`]): populated, and
    /// copied at fork instead of shared, so that no access to it ever faults.
    pub const WIRED: u64 = 1 << 33;
    /// No 2 MiB folios (MADV_NOHUGEPAGE, MAP_STACK).
    pub const NOHUGEPAGE: u64 = 0x4000_0000;
    /// The `brk` heap.
    pub const HEAP: u64 = 1 << 32;
    /// Not counted against memory (MAP_NORESERVE).
    pub const NORESERVE: u64 = 0x20_0000;
    /// Shared mapping of a file on the disk: a page is mapped read-only until a write fault has marked it dirty (Linux asks
    /// vma_wants_writenotify).
    pub const NOTIFY: u64 = 1 << 34;

    /// What mlock and munlock change (Linux's VM_LOCKED_MASK).
    pub const LOCKED_MASK: u64 = LOCKED | LOCKONFAULT;

    /// True where a mapping with `flags` is data, which RLIMIT_DATA limits (Linux's is_data_mapping).
    #[must_use]
    pub const fn is_data(flags: u64) -> bool {
        flags & (WRITE | SHARED | GROWSDOWN) == WRITE
    }
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
    /// Its lock: [`VmaRefs`].
    pub refs: AtomicU64,
    /// [`Mm::lock_seq`] when it was locked for writing last: it still is where the two are equal.
    pub lock_seq: AtomicU64,
    /// +1 at every allocation and every free of this slot: odd while live.
    pub generation: AtomicU32,
    /// Zero.
    pub reserved: AtomicU32,
    /// The anon_vma that new folios of it get; none until its first fault.
    pub anon_vma: Link<AnonVma>,
    /// First of its [`AnonVmaChain`]s, linked by [`AnonVmaChain::next_of_vma`].
    pub chains: Link<AnonVmaChain>,
    /// The file that it maps, from page `pgoff` on; none for private anonymous memory.
    pub file: Link<File>,
    /// In the tree [`File::i_mmap`]: what maps pages from an earlier one on, or was there first.
    pub left_of_file: Link<Vma>,
    /// In that tree: what maps pages from a later one on, or came after it.
    pub right_of_file: Link<Vma>,
    /// In that tree: the VMA above; none for the root.
    pub parent_of_file: Link<Vma>,
    /// The page past the last one of the file that it or any VMA below it in that tree maps.
    pub subtree_end: AtomicU64,
}

/// Encoding of [`Vma::refs`] (Linux's vm_refcnt): whether a VMA is linked in its mm's tree, and who reads it.
pub struct VmaRefs;

impl VmaRefs {
    /// Nobody's: not linked in, or about to be freed.
    pub const DETACHED: u64 = 0;
    /// Linked in, and read by nobody; one more for each reader.
    pub const ATTACHED: u64 = 1;
    /// Set while a writer waits until no reader is left, and keeps new ones out (Linux's VM_REFCNT_EXCLUDE_READERS_FLAG).
    pub const EXCLUDED: u64 = 1 << 30;

    /// True where `refs` say that the VMA is linked in.
    #[must_use]
    pub const fn is_attached(refs: u64) -> bool {
        refs & !Self::EXCLUDED != Self::DETACHED
    }
    /// Readers that `refs` count, of a VMA that is linked in.
    #[must_use]
    pub const fn readers(refs: u64) -> u64 {
        (refs & !Self::EXCLUDED).saturating_sub(Self::ATTACHED)
    }
}

/// Entries of a [`CacheNode`].
pub const CACHE_NODE_SLOTS: usize = 64;

/// Node of a file's page cache: a radix tree over the pages' numbers, six bits a level.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct CacheNode {
    /// Slots that are not 0.
    pub count: AtomicU64,
    /// Level 1: GPA of the page's frame. Above: GPA of the child [`CacheNode`]. 0: nothing there.
    pub slots: [AtomicU64; CACHE_NODE_SLOTS],
}

/// A file (Linux's inode and address_space): its pages, and who maps them. It is in memory, as a memfd, or on the disk, as
/// a block device.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct File {
    /// Bytes. Changes under `inode_lock` and `lock`.
    pub size: AtomicU64,
    /// [`RwLockWord`] that only writers take, held over whatever changes contents or size by a system call (Linux's i_rwsem).
    pub inode_lock: AtomicU64,
    /// Spin lock word of `size`, of the tree of pages (Linux's i_pages), and of `refcount`.
    pub lock: AtomicU64,
    /// Spin lock word of `i_mmap`; held, the VMAs on it keep their bounds and page tables.
    pub i_mmap_lock: AtomicU64,
    /// Root of the tree of the VMAs that map it ([`Vma::left_of_file`]), in the order of their first pages. One that
    /// fork made comes after the one that it copies.
    pub i_mmap: Link<Vma>,
    /// Root of its page cache, none while it has no page.
    pub pages: Link<CacheNode>,
    /// Levels of that tree.
    pub height: AtomicU64,
    /// Pages in it.
    pub nr_pages: AtomicU64,
    /// References: [`OpenFile`]s and VMAs.
    pub refcount: AtomicU32,
    /// +1 at every allocation and every free of this slot: odd while live.
    pub generation: AtomicU32,
    /// On the disk: the sector of page 0.
    pub sector: AtomicU64,
    /// 1 for a file on the disk, 0 for one in memory; does not change.
    pub on_disk: AtomicU32,
    /// A page could not be written to the disk since somebody last asked (Linux's AS_EIO).
    pub write_failed: AtomicU32,
}

/// What a descriptor refers to (Linux's struct file): shared by dup and fork.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct OpenFile {
    /// Where read and write go on, in bytes.
    pub position: AtomicU64,
    /// [`RwLockWord`] of `position` that only writers take.
    pub lock: AtomicU64,
    /// The file.
    pub file: Link<File>,
    /// Descriptors that refer to it, and calls that use it.
    pub refcount: AtomicU32,
    /// +1 at every allocation and every free of this slot: odd while live.
    pub generation: AtomicU32,
}

/// Descriptors of a [`FileTable`].
pub const FILE_TABLE_SLOTS: usize = 32;

/// The descriptors of a process, shared by its threads and copied by fork.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct FileTable {
    /// By number; none where it is closed, or the console.
    pub open: [Link<OpenFile>; FILE_TABLE_SLOTS],
    /// Descriptors that are the console, one bit each.
    pub console: AtomicU64,
    /// Spin lock word.
    pub lock: AtomicU64,
    /// Tasks that use it.
    pub users: AtomicU32,
    /// +1 at every allocation and every free of this slot: odd while live.
    pub generation: AtomicU32,
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
    /// While it is retired: the next one on the list ([`CpuRcu::retired`]).
    pub next_retired: AtomicU64,
}

/// Limits of one resource (Linux's struct rlimit), in bytes; [`crate::syscall::rlimit::INFINITY`] for none.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct Rlimit {
    /// What holds.
    pub soft: AtomicU64,
    /// What `soft` may be raised to.
    pub hard: AtomicU64,
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
    /// CPUs that have it loaded, and so may use translations of it.
    pub cpumask: AtomicU64,
    /// +1 before every shootdown.
    pub tlb_gen: AtomicU64,
    /// mmap_lock: [`RwLockWord`].
    pub mmap_lock: AtomicU64,
    /// +1 when a writer gets the mmap_lock and when it lets go: odd meanwhile (Linux's mm_lock_seq).
    pub lock_seq: AtomicU64,
    /// Root of the VMA tree, none while empty.
    pub vmas: Link<VmaNode>,
    /// VMAs in the tree.
    pub map_count: AtomicU64,
    /// Pages that user leaf entries have in memory: 512 for one of level 2, one for a present or a migration entry of level 1.
    pub rss: AtomicU64,
    /// Page-table pages, all levels, and those set aside ([`Folio::prev`]).
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
    /// Batches of reclaim that have cleared entries of it (low half), and up to which they were flushed (high half):
    /// Linux's tlb_flush_batched.
    pub flush_batched: AtomicU64,
    /// Odd while fork write-protects entries (Linux's write_protect_seq): who pins pages without a lock looks again.
    pub write_protect_seq: AtomicU64,
    /// Entries of level 2 that map 2 MiB, or are being split ([`crate::pte::Pte::is_huge`]).
    pub huge: AtomicU64,
    /// Pages of all VMAs.
    pub total_vm: AtomicU64,
    /// Pages of those that are data ([`vma_flags::is_data`]).
    pub data_vm: AtomicU64,
    /// Pages of those that are locked ([`vma_flags::LOCKED`]).
    pub locked_vm: AtomicU64,
    /// Pages that count against RLIMIT_MEMLOCK too: mremap with DONTUNMAP has unlocked them, and Linux goes on counting them
    /// in its locked_vm (mm/mremap.c, dontunmap_complete).
    pub locked_before: AtomicU64,
    /// Flags that every new mapping gets: those of mlockall(MCL_FUTURE).
    pub def_flags: AtomicU64,
    /// Commands of membarrier that the process has registered for (Linux's membarrier_state).
    pub membarrier: AtomicU64,
    /// Limits of its process, by [`crate::syscall::rlimit::KEPT`]. A process is the only user of its mm, and a child
    /// gets a copy of both, so they lie here.
    pub limits: [Rlimit; crate::syscall::rlimit::KEPT.len()],
    /// Number of the memory group that its process is in, 0 for the root group (Linux's mm->owner leads there).
    pub group: AtomicU64,
}

/// Encoding of a reader-writer lock word.
pub struct RwLockWord;

impl RwLockWord {
    /// Set while a writer holds the lock.
    pub const WRITER: u64 = 1 << 63;
    /// Set while a writer waits, which keeps new readers out.
    pub const WAITING: u64 = 1 << 62;
    /// Set while tasks sleep that want the lock ([`KernelRoot::lock_queue`]).
    pub const SLEEPERS: u64 = 1 << 61;
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
    /// Blocked, or woken and not yet running: the futex word's GVA, 1 for a child's exit, 2 for the disk, 3 for the swap
    /// area, 4 for work, 5 for a lock.
    pub waits_for: AtomicU64,
    /// Which futex that is: the GPA of its mm, 0, and its GVA; in shared memory the GPA of the file, its generation, and the
    /// byte of it.
    pub futex: [AtomicU64; 3],
    /// Which lock that is, and as what: the GPA of its word and the number of its [`LockClass`](crate::lock::LockClass).
    pub lock: [AtomicU64; 2],
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
    /// What it has asked the disk for: one request at a time.
    pub disk: crate::disk::DiskRequest,
    /// Its descriptors, none once it has exited.
    pub files: Link<FileTable>,
}

impl Task {
    /// Value of [`Task::waits_for`] while it waits for the exit of a child.
    pub const WAITS_FOR_CHILD: u64 = 1;
    /// Value of [`Task::waits_for`] while it waits for the disk.
    pub const WAITS_FOR_DISK: u64 = 2;
    /// Value of [`Task::waits_for`] while it waits for transfers of the swap area.
    pub const WAITS_FOR_SWAP: u64 = 3;
    /// Value of [`Task::waits_for`] while a task of the kernel has nothing to do.
    pub const WAITS_FOR_WORK: u64 = 4;
    /// Value of [`Task::waits_for`] while it waits for [`Task::lock`].
    pub const WAITS_FOR_LOCK: u64 = 5;
}

/// Bits of [`Task::flags`].
pub mod task_flags {
    /// It exits instead of returning to CPL 3.
    pub const KILLED: u32 = 1;
    /// Leader: the whole process exits, and the leader's `status` is final
    /// (Linux's SIGNAL_GROUP_EXIT).
    pub const GROUP_EXIT: u32 = 2;
    /// A thread of the kernel (Linux's PF_KTHREAD): it has no address space, no descriptors and no parent, is nobody's
    /// process, and never ends.
    pub const KERNEL: u32 = 4;
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
    /// The PCID of `loaded_mm`: one more than its slot in `asids`. 0 for the kernel's own tables, and always
    /// without PCIDs, where slot 0 serves every mm.
    pub pcid: AtomicU64,
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
    /// Calls of sched_yield since a task of this CPU did anything else. With the testbed only.
    pub yields: AtomicU64,
    /// Which mm's translations are kept under which PCID (Linux's `cpu_tlbstate.ctxs`).
    pub asids: [Asid; ASIDS],
    /// The slot that the next mm without one is given, modulo the slots in use.
    pub next_asid: AtomicU64,
}

impl Cpu {
    /// The slot of what is loaded.
    #[must_use]
    pub fn loaded_asid(&self) -> &Asid {
        // A slot for every value: what a host reads here is the guest's.
        &self.asids[self.pcid.load(Ordering::Relaxed).saturating_sub(1) as usize % ASIDS]
    }
}

/// Mms whose translations a CPU keeps beside each other (Linux's `TLB_NR_DYN_ASIDS`).
pub const ASIDS: usize = 6;

/// What a CPU knows of one of its PCIDs.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct Asid {
    /// [`Mm::id`] of the mm whose translations it holds, alive or not; 0 for none.
    pub mm: AtomicU64,
    /// `tlb_gen` of that mm up to which they are flushed.
    pub tlb_gen: AtomicU64,
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
    /// What was retired and no grace period has begun for: the first of a list, 0 for none. The GPA of a page-table page,
    /// linked by [`Folio::next`], or of a [`VmaNode`] with [`CpuRcu::IS_NODE`] set, linked by [`VmaNode::next_retired`].
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
    /// Set in the entry of a list of retired objects that stands for a [`VmaNode`].
    pub const IS_NODE: u64 = 1;

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
    /// First address that it translates, with the PCID from bit 2 on, and bit 0 set; 0 for an unused entry.
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
    /// Bytes that the smallest entry that has changed stands for: 4 KiB or 2 MiB.
    pub stride: AtomicU64,
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
    File = 6,
    CacheNode = 7,
    OpenFile = 8,
    FileTable = 9,
}

/// Number of slabs.
pub const SLABS: usize = 10;

/// Allocator of one type of object.
#[repr(C)]
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
pub struct Slab {
    /// Bytes of one object.
    pub object_bytes: AtomicU64,
    /// Objects in use.
    pub used: AtomicU64,
    /// Objects that are in use no more, and will be free when no reader under RCU can be at them.
    pub retired: AtomicU64,
    /// Frames that it has taken.
    pub frames: AtomicU64,
    /// First free object; 0 for none. A free object is zero but for its generation and one link to
    /// the next: `Mm::next`, `Vma::chains`, `VmaNode::slots[0].child`, `AnonVma::chains`,
    /// `AnonVmaChain::next_of_vma`, `Task::next`, `File::pages`, `CacheNode::slots[0]`,
    /// `OpenFile::position`, `FileTable::open[0]`.
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
    /// GPA of the one frame of [`FrameKind::Zero`].
    pub zero_frame: AtomicU64,
    /// Free frames, in the buddy allocator and on the CPUs' lists.
    pub free_frames: AtomicU64,
    /// Lock of the buddy allocator.
    pub buddy_lock: AtomicU64,
    /// Heads of the buddy's free lists by order: frame number, 0 for none.
    pub buddy: [AtomicU64; ORDERS],
    /// Slabs by [`SlabId`].
    pub slabs: [Slab; SLABS],
    /// The swap area.
    pub swap: SwapArea,
    /// Lists of anonymous folios by [`lru`], where there is swap.
    pub lru: [LruList; lru::LISTS],
    /// Folios of 2 MiB to be split when memory is short, linked by the descriptors of their second pages (Linux's
    /// split_queue).
    pub split_queue: LruList,
    /// Spin lock word of those.
    pub lru_lock: AtomicU64,
    /// The reclaim thread.
    pub kswapd: Kswapd,
    /// The thread that gathers 2 MiB.
    pub khugepaged: Khugepaged,
    /// Groups of frames by frame number, none where there are no groups.
    pub frame_groups: Link<FrameGroup>,
    /// Memory groups, that with number `n` at `n - 1`.
    pub groups: [MemGroup; GROUPS],
    /// Spin lock word of their creation and limits.
    pub groups_lock: AtomicU64,
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
    /// First of the tasks that sleep until they may get a lock, in the order of their arrival.
    pub lock_queue: Link<Task>,
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
