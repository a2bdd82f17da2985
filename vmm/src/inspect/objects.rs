//! The kernel's objects as plain values: what [`abi::objects`] lays out, read once.
//!
//! A view says what the memory says, even where that makes no sense; judging it is the checkers'
//! job. Links stay guest physical addresses.

use std::sync::atomic::Ordering::Relaxed;

use abi::layout::{PAGE_SHIFT, PAGE_SIZE};
use abi::objects::{
    AnonVma, AnonVmaChain, Cpu, Folio, FrameKind, KernelRoot, Mm, ORDERS, RwLockWord, SLABS, Slab,
    Task, TaskState, VMA_NODE_SLOTS, Vma, VmaNode, folio_flags, vma_flags,
};
use serde::Serialize;

use super::serde_hex;

/// The root object.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs)] // the fields of abi's KernelRoot
pub struct RootView {
    #[serde(with = "serde_hex")]
    pub gpa: u64,
    #[serde(with = "serde_hex")]
    pub pgd: u64,
    #[serde(with = "serde_hex")]
    pub folios: u64,
    pub nr_frames: u64,
    pub first_frame: u64,
    pub free_frames: u64,
    pub buddy_lock: u64,
    pub buddy: [u64; ORDERS],
    pub slabs: [SlabView; SLABS],
    #[serde(with = "serde_hex")]
    pub mms: u64,
    pub mms_lock: u64,
    #[serde(with = "serde_hex")]
    pub tasks: u64,
    pub sched_lock: u64,
    pub online: u64,
    pub nr_cpus: u64,
}

impl RootView {
    pub(super) fn new(gpa: u64, root: &KernelRoot) -> Self {
        Self {
            gpa,
            pgd: root.pgd.load(Relaxed),
            folios: root.folios.get().0,
            nr_frames: root.nr_frames.load(Relaxed),
            first_frame: root.first_frame.load(Relaxed),
            free_frames: root.free_frames.load(Relaxed),
            buddy_lock: root.buddy_lock.load(Relaxed),
            buddy: root.buddy.each_ref().map(|head| head.load(Relaxed)),
            slabs: root.slabs.each_ref().map(SlabView::new),
            mms: root.mms.get().0,
            mms_lock: root.mms_lock.load(Relaxed),
            tasks: root.tasks.get().0,
            sched_lock: root.sched_lock.load(Relaxed),
            online: root.online.load(Relaxed),
            nr_cpus: root.nr_cpus.load(Relaxed),
        }
    }
}

/// The allocator of one type of object.
#[derive(Clone, Copy, Debug, Serialize)]
#[allow(missing_docs)] // the fields of abi's Slab
pub struct SlabView {
    pub object_bytes: u64,
    pub used: u64,
    pub frames: u64,
    #[serde(with = "serde_hex")]
    pub free: u64,
    pub lock: u64,
}

impl SlabView {
    fn new(slab: &Slab) -> Self {
        Self {
            object_bytes: slab.object_bytes.load(Relaxed),
            used: slab.used.load(Relaxed),
            frames: slab.frames.load(Relaxed),
            free: slab.free.load(Relaxed),
            lock: slab.lock.load(Relaxed),
        }
    }
}

/// The kernel's state of one CPU.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs)] // the fields of abi's Cpu
pub struct CpuView {
    pub index: usize,
    #[serde(with = "serde_hex")]
    pub current: u64,
    #[serde(with = "serde_hex")]
    pub loaded_mm: u64,
    pub tlb_gen: u64,
    pub lazy: bool,
    pub free_list: u64,
    pub free_count: u64,
    #[serde(with = "serde_hex")]
    pub queue: u64,
    pub queued: u64,
    /// The shootdown that it has asked others for, where some have not acknowledged.
    pub flush: Option<FlushView>,
}

/// A shootdown that waits for acknowledgements.
#[derive(Clone, Copy, Debug, Serialize)]
#[allow(missing_docs)] // the fields of abi's FlushRequest
pub struct FlushView {
    #[serde(with = "serde_hex")]
    pub mm: u64,
    #[serde(with = "serde_hex")]
    pub start: u64,
    #[serde(with = "serde_hex")]
    pub end: u64,
    #[serde(with = "serde_hex")]
    pub pending: u64,
}

impl CpuView {
    pub(super) fn new(index: usize, cpu: &Cpu) -> Self {
        let pending = cpu.flush.pending.load(Relaxed);
        Self {
            index,
            current: cpu.current.get().0,
            loaded_mm: cpu.loaded_mm.get().0,
            tlb_gen: cpu.tlb_gen.load(Relaxed),
            lazy: cpu.lazy.load(Relaxed) != 0,
            free_list: cpu.free_list.load(Relaxed),
            free_count: cpu.free_count.load(Relaxed),
            queue: cpu.queue.get().0,
            queued: cpu.queued.load(Relaxed),
            flush: (pending != 0).then(|| FlushView {
                mm: cpu.flush.mm.get().0,
                start: cpu.flush.start.load(Relaxed),
                end: cpu.flush.end.load(Relaxed),
                pending,
            }),
        }
    }
}

/// The descriptor of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct FolioView {
    /// Number of the frame.
    pub frame: u64,
    /// Byte of the descriptor's kind.
    pub raw_kind: u8,
    /// log2 of the block's frames.
    pub order: u8,
    /// [`folio_flags`].
    pub flags: u8,
    /// References.
    pub refcount: u32,
    /// Present PTEs that map it.
    pub mapcount: u32,
    /// Allocations of this frame so far.
    pub generation: u32,
    /// By kind.
    #[serde(with = "serde_hex")]
    pub owner: u64,
    /// By kind.
    #[serde(with = "serde_hex")]
    pub index: u64,
    /// Next on a list: frame number, 0 for none.
    pub next: u64,
    /// Previous on a list: frame number, 0 for none.
    pub prev: u64,
    /// Table: lock word.
    pub lock: u64,
    /// By kind.
    pub used: u64,
}

impl FolioView {
    pub(super) fn new(frame: u64, folio: &Folio) -> Self {
        Self {
            frame,
            raw_kind: folio.kind.load(Relaxed),
            order: folio.order.load(Relaxed),
            flags: folio.flags.load(Relaxed),
            refcount: folio.refcount.load(Relaxed),
            mapcount: folio.mapcount.load(Relaxed),
            generation: folio.generation.load(Relaxed),
            owner: folio.owner.load(Relaxed),
            index: folio.index.load(Relaxed),
            next: folio.next.load(Relaxed),
            prev: folio.prev.load(Relaxed),
            lock: folio.lock.load(Relaxed),
            used: folio.used.load(Relaxed),
        }
    }

    /// GPA of the frame.
    #[must_use]
    pub fn gpa(&self) -> u64 {
        self.frame << PAGE_SHIFT
    }
    /// Its kind, where the byte is one.
    #[must_use]
    pub fn kind(&self) -> Option<FrameKind> {
        FrameKind::from_u8(self.raw_kind)
    }
    /// True where it is of `kind`.
    #[must_use]
    pub fn is(&self, kind: FrameKind) -> bool {
        self.raw_kind == kind as u8
    }
    /// True where it belongs to the allocator.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.kind().is_some_and(FrameKind::is_free)
    }
    /// True where its only mapping may be written without copying.
    #[must_use]
    pub fn is_exclusive(&self) -> bool {
        self.flags & folio_flags::EXCLUSIVE != 0
    }
    /// Frames of the block that it heads.
    #[must_use]
    pub fn frames(&self) -> u64 {
        1 << self.order.min(63)
    }
    /// The kind for a person.
    #[must_use]
    pub fn kind_name(&self) -> String {
        match self.kind() {
            Some(kind) => format!("{kind:?}"),
            None => format!("kind {}", self.raw_kind),
        }
    }
}

/// One mapping of an mm.
#[derive(Clone, Debug, Serialize)]
pub struct VmaView {
    /// Where it lies.
    #[serde(with = "serde_hex")]
    pub gpa: u64,
    /// First address.
    #[serde(with = "serde_hex")]
    pub start: u64,
    /// First address past it.
    #[serde(with = "serde_hex")]
    pub end: u64,
    /// [`vma_flags`].
    #[serde(with = "serde_hex")]
    pub flags: u64,
    /// Page offset of `start`.
    #[serde(with = "serde_hex")]
    pub pgoff: u64,
    /// Its mm.
    #[serde(with = "serde_hex")]
    pub mm: u64,
    /// True while it is linked in its mm's tree.
    pub attached: bool,
    /// Odd while live.
    pub generation: u32,
    /// Its anon_vma, 0 for none.
    #[serde(with = "serde_hex")]
    pub anon_vma: u64,
    /// Its chains, in order.
    pub chains: Vec<ChainView>,
}

impl VmaView {
    pub(super) fn new(gpa: u64, vma: &Vma) -> Self {
        Self {
            gpa,
            start: vma.start.load(Relaxed),
            end: vma.end.load(Relaxed),
            flags: vma.flags.load(Relaxed),
            pgoff: vma.pgoff.load(Relaxed),
            mm: vma.mm.get().0,
            attached: vma.attached.load(Relaxed) != 0,
            generation: vma.generation.load(Relaxed),
            anon_vma: vma.anon_vma.get().0,
            chains: Vec::new(),
        }
    }

    /// True where `gva` lies in it.
    #[must_use]
    pub fn contains(&self, gva: u64) -> bool {
        (self.start..self.end).contains(&gva)
    }
    /// True where all of `flags` are set.
    #[must_use]
    pub fn has(&self, flags: u64) -> bool {
        self.flags & flags == flags
    }
    /// True where some access is permitted.
    #[must_use]
    pub fn is_accessible(&self) -> bool {
        self.flags & (vma_flags::READ | vma_flags::WRITE | vma_flags::EXEC) != 0
    }
    /// True where writes stay in this process.
    #[must_use]
    pub fn is_private(&self) -> bool {
        !self.has(vma_flags::SHARED)
    }
    /// Page offset of `gva`: [`FolioView::index`] of an anonymous folio that is mapped there.
    #[must_use]
    pub fn index_of(&self, gva: u64) -> u64 {
        self.pgoff
            .wrapping_add(gva.wrapping_sub(self.start) / PAGE_SIZE)
    }
    /// The inverse of [`VmaView::index_of`], where it lies in the VMA.
    #[must_use]
    pub fn address_of(&self, index: u64) -> Option<u64> {
        let pages = index.checked_sub(self.pgoff)?;
        let gva = self.start.checked_add(pages.checked_mul(PAGE_SIZE)?)?;
        self.contains(gva).then_some(gva)
    }
    /// `rwxp` as in /proc/PID/maps.
    #[must_use]
    pub fn permissions(&self) -> String {
        [
            (vma_flags::READ, 'r', '-'),
            (vma_flags::WRITE, 'w', '-'),
            (vma_flags::EXEC, 'x', '-'),
            (vma_flags::SHARED, 's', 'p'),
        ]
        .map(|(flag, set, clear)| if self.has(flag) { set } else { clear })
        .iter()
        .collect()
    }
    /// `START-END rwxp` as in /proc/PID/maps.
    #[must_use]
    pub fn label(&self) -> String {
        format!("{:08x}-{:08x} {}", self.start, self.end, self.permissions())
    }
}

/// One membership of a VMA in an anon_vma's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ChainView {
    /// Where it lies.
    #[serde(with = "serde_hex")]
    pub gpa: u64,
    /// The VMA.
    #[serde(with = "serde_hex")]
    pub vma: u64,
    /// The anon_vma.
    #[serde(with = "serde_hex")]
    pub anon_vma: u64,
    /// Next of the VMA.
    #[serde(with = "serde_hex")]
    pub next_of_vma: u64,
    /// Next of the anon_vma.
    #[serde(with = "serde_hex")]
    pub next_of_anon: u64,
    /// Previous of the anon_vma.
    #[serde(with = "serde_hex")]
    pub prev_of_anon: u64,
    /// Odd while live.
    pub generation: u32,
}

impl ChainView {
    pub(super) fn new(gpa: u64, chain: &AnonVmaChain) -> Self {
        Self {
            gpa,
            vma: chain.vma.get().0,
            anon_vma: chain.anon_vma.get().0,
            next_of_vma: chain.next_of_vma.get().0,
            next_of_anon: chain.next_of_anon.get().0,
            prev_of_anon: chain.prev_of_anon.get().0,
            generation: chain.generation.load(Relaxed),
        }
    }
}

/// Root of a reverse mapping.
#[derive(Clone, Debug, Serialize)]
pub struct AnonVmaView {
    /// Where it lies.
    #[serde(with = "serde_hex")]
    pub gpa: u64,
    /// The oldest ancestor.
    #[serde(with = "serde_hex")]
    pub root: u64,
    /// The anon_vma of the process that forked this one's.
    #[serde(with = "serde_hex")]
    pub parent: u64,
    /// Lock word.
    pub lock: u64,
    /// References.
    pub refcount: u32,
    /// Children plus VMAs whose `anon_vma` it is.
    pub degree: u32,
    /// Odd while live.
    pub generation: u32,
    /// The VMAs on it, in order.
    pub chains: Vec<ChainView>,
}

impl AnonVmaView {
    pub(super) fn new(gpa: u64, anon_vma: &AnonVma) -> Self {
        Self {
            gpa,
            root: anon_vma.root.get().0,
            parent: anon_vma.parent.get().0,
            lock: anon_vma.lock.load(Relaxed),
            refcount: anon_vma.refcount.load(Relaxed),
            degree: anon_vma.degree.load(Relaxed),
            generation: anon_vma.generation.load(Relaxed),
            chains: Vec::new(),
        }
    }
}

/// A node of a VMA tree.
#[derive(Clone, Debug, Serialize)]
pub struct NodeView {
    /// Where it lies.
    #[serde(with = "serde_hex")]
    pub gpa: u64,
    /// 0 for a leaf.
    pub level: u32,
    /// Used slots, as the node says.
    pub count: u32,
    /// The used slots that exist.
    pub slots: Vec<SlotView>,
}

/// An entry of a [`NodeView`].
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SlotView {
    /// The VMA's start, or the least start below.
    #[serde(with = "serde_hex")]
    pub start: u64,
    /// The VMA or the child.
    #[serde(with = "serde_hex")]
    pub child: u64,
    /// Bytes of the largest hole below.
    #[serde(with = "serde_hex")]
    pub gap: u64,
}

impl NodeView {
    pub(super) fn new(gpa: u64, node: &VmaNode) -> Self {
        let count = node.count.load(Relaxed);
        Self {
            gpa,
            level: node.level.load(Relaxed),
            count,
            slots: node.slots[..(count as usize).min(VMA_NODE_SLOTS)]
                .iter()
                .map(|slot| SlotView {
                    start: slot.start.load(Relaxed),
                    child: slot.child.load(Relaxed),
                    gap: slot.gap.load(Relaxed),
                })
                .collect(),
        }
    }
}

/// An address space.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs)] // the fields of abi's Mm
pub struct MmView {
    #[serde(with = "serde_hex")]
    pub gpa: u64,
    pub id: u64,
    #[serde(with = "serde_hex")]
    pub pgd: u64,
    pub users: u32,
    pub count: u32,
    #[serde(with = "serde_hex")]
    pub cpumask: u64,
    pub tlb_gen: u64,
    #[serde(with = "serde_hex")]
    pub mmap_lock: u64,
    #[serde(with = "serde_hex")]
    pub tree: u64,
    pub map_count: u64,
    pub rss: u64,
    pub tables: u64,
    #[serde(with = "serde_hex")]
    pub brk_start: u64,
    #[serde(with = "serde_hex")]
    pub brk: u64,
    pub generation: u32,
    /// Nodes of the VMA tree, parents before children.
    #[serde(skip)]
    pub nodes: Vec<NodeView>,
    /// VMAs, in the order of the tree.
    pub vmas: Vec<VmaView>,
}

impl MmView {
    pub(super) fn new(gpa: u64, mm: &Mm) -> Self {
        Self {
            gpa,
            id: mm.id.load(Relaxed),
            pgd: mm.pgd.load(Relaxed),
            users: mm.users.load(Relaxed),
            count: mm.count.load(Relaxed),
            cpumask: mm.cpumask.load(Relaxed),
            tlb_gen: mm.tlb_gen.load(Relaxed),
            mmap_lock: mm.mmap_lock.load(Relaxed),
            tree: mm.vmas.get().0,
            map_count: mm.map_count.load(Relaxed),
            rss: mm.rss.load(Relaxed),
            tables: mm.tables.load(Relaxed),
            brk_start: mm.brk_start.load(Relaxed),
            brk: mm.brk.load(Relaxed),
            generation: mm.generation.load(Relaxed),
            nodes: Vec::new(),
            vmas: Vec::new(),
        }
    }

    /// The first VMA of the tree that contains `gva`.
    #[must_use]
    pub fn vma_at(&self, gva: u64) -> Option<&VmaView> {
        self.vmas.iter().find(|vma| vma.contains(gva))
    }
    /// True while a writer holds mmap_lock.
    #[must_use]
    pub fn is_write_locked(&self) -> bool {
        self.mmap_lock & RwLockWord::WRITER != 0
    }
    /// Readers that hold mmap_lock.
    #[must_use]
    pub fn readers(&self) -> u64 {
        self.mmap_lock & RwLockWord::READERS
    }
}

/// A thread of execution.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs)] // the fields of abi's Task
pub struct TaskView {
    #[serde(with = "serde_hex")]
    pub gpa: u64,
    pub id: u32,
    pub process: u32,
    pub parent: u32,
    pub raw_state: u32,
    #[serde(with = "serde_hex")]
    pub mm: u64,
    #[serde(with = "serde_hex")]
    pub affinity: u64,
    pub cpu: u32,
    pub status: u32,
    #[serde(with = "serde_hex")]
    pub waits_for: u64,
    #[serde(with = "serde_hex")]
    pub stack: u64,
    #[serde(with = "serde_hex")]
    pub frame: u64,
}

impl TaskView {
    pub(super) fn new(gpa: u64, task: &Task) -> Self {
        Self {
            gpa,
            id: task.id.load(Relaxed),
            process: task.process.load(Relaxed),
            parent: task.parent.load(Relaxed),
            raw_state: task.state.load(Relaxed),
            mm: task.mm.get().0,
            affinity: task.affinity.load(Relaxed),
            cpu: task.cpu.load(Relaxed),
            status: task.status.load(Relaxed),
            waits_for: task.waits_for.load(Relaxed),
            stack: task.stack.load(Relaxed),
            frame: task.frame.load(Relaxed),
        }
    }

    /// What it is doing, where the number is a state.
    #[must_use]
    pub fn state(&self) -> Option<TaskState> {
        TaskState::from_u32(self.raw_state)
    }
    /// The state for a person.
    #[must_use]
    pub fn state_name(&self) -> String {
        match self.state() {
            Some(state) => format!("{state:?}").to_lowercase(),
            None => format!("state {}", self.raw_state),
        }
    }
}
