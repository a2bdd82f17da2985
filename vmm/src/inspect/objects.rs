//! The kernel's objects as plain values: what [`abi::objects`] lays out, read once.
//!
//! A view says what the memory says, even where that makes no sense; judging it is the checkers'
//! job. Links stay guest physical addresses.

use std::sync::atomic::Ordering::Relaxed;

use abi::layout::PAGE_SHIFT;
use abi::lock::LockClass;
use abi::objects::{
    ASIDS, Asid, Cpu, Folio, FrameKind, KernelRoot, Kswapd, ORDERS, SLABS, Slab, Task, TaskState,
    folio_flags, folio_state, task_flags,
};
use serde::Serialize;

pub use super::address_space::*;

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
    #[serde(with = "serde_hex")]
    pub zero_frame: u64,
    pub free_frames: u64,
    pub kswapd: KswapdView,
    /// Task of the thread that gathers 2 MiB.
    #[serde(with = "serde_hex")]
    pub khugepaged: u64,
    pub buddy_lock: u64,
    pub buddy: [u64; ORDERS],
    pub slabs: [SlabView; SLABS],
    #[serde(with = "serde_hex")]
    pub mms: u64,
    pub next_mm: u64,
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
            zero_frame: root.zero_frame.load(Relaxed),
            free_frames: root.free_frames.load(Relaxed),
            kswapd: KswapdView::new(&root.kswapd),
            khugepaged: root.khugepaged.task.get().0,
            buddy_lock: root.buddy_lock.load(Relaxed),
            buddy: root.buddy.each_ref().map(|head| head.load(Relaxed)),
            slabs: root.slabs.each_ref().map(SlabView::new),
            mms: root.mms.get().0,
            next_mm: root.next_mm.load(Relaxed),
            mms_lock: root.mms_lock.load(Relaxed),
            tasks: root.tasks.get().0,
            sched_lock: root.sched_lock.load(Relaxed),
            online: root.online.load(Relaxed),
            nr_cpus: root.nr_cpus.load(Relaxed),
        }
    }
}

/// The reclaim thread.
#[derive(Clone, Copy, Debug, Serialize)]
#[allow(missing_docs)] // the fields of abi's Kswapd
pub struct KswapdView {
    #[serde(with = "serde_hex")]
    pub task: u64,
    pub min: u64,
    pub low: u64,
    pub high: u64,
    pub failures: u64,
    pub reclaiming: u64,
}

impl KswapdView {
    fn new(kswapd: &Kswapd) -> Self {
        Self {
            task: kswapd.task.get().0,
            min: kswapd.min.load(Relaxed),
            low: kswapd.low.load(Relaxed),
            high: kswapd.high.load(Relaxed),
            failures: kswapd.failures.load(Relaxed),
            reclaiming: kswapd.reclaiming.load(Relaxed),
        }
    }
}

/// The allocator of one type of object.
#[derive(Clone, Copy, Debug, Serialize)]
#[allow(missing_docs)] // the fields of abi's Slab
pub struct SlabView {
    pub object_bytes: u64,
    pub used: u64,
    pub retired: u64,
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
            retired: slab.retired.load(Relaxed),
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
    /// The PCID of `loaded_mm`, 0 without PCIDs.
    pub pcid: u64,
    /// Of the slot of what is loaded.
    pub tlb_gen: u64,
    pub asids: [AsidView; ASIDS],
    pub lazy: bool,
    pub free_list: u64,
    pub free_count: u64,
    #[serde(with = "serde_hex")]
    pub queue: u64,
    pub queued: u64,
    /// The shootdown that it has asked others for, where some have not acknowledged.
    pub flush: Option<FlushView>,
}

/// What a CPU knows of one of its PCIDs.
#[derive(Clone, Copy, Debug, Serialize)]
#[allow(missing_docs)] // the fields of abi's Asid
pub struct AsidView {
    pub mm: u64,
    pub tlb_gen: u64,
}

impl AsidView {
    fn new(asid: &Asid) -> Self {
        Self {
            mm: asid.mm.load(Relaxed),
            tlb_gen: asid.tlb_gen.load(Relaxed),
        }
    }
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
            pcid: cpu.pcid.load(Relaxed),
            tlb_gen: cpu.loaded_asid().tlb_gen.load(Relaxed),
            asids: cpu.asids.each_ref().map(AsidView::new),
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
    /// [`folio_state`].
    pub state: u8,
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
    /// Times that it is pinned.
    pub pins: u32,
}

impl FolioView {
    pub(super) fn new(frame: u64, folio: &Folio) -> Self {
        Self {
            frame,
            raw_kind: folio.kind.load(Relaxed),
            order: folio.order.load(Relaxed),
            flags: folio.flags.load(Relaxed),
            state: folio.state.load(Relaxed),
            refcount: folio.refcount.load(Relaxed),
            mapcount: folio.mapcount.load(Relaxed),
            generation: folio.generation.load(Relaxed),
            owner: folio.owner.load(Relaxed),
            index: folio.index.load(Relaxed),
            next: folio.next.load(Relaxed),
            prev: folio.prev.load(Relaxed),
            lock: folio.lock.load(Relaxed),
            used: folio.used.load(Relaxed).into(),
            pins: folio.pins.load(Relaxed),
        }
    }

    /// The slot for which it is in the swap cache.
    #[must_use]
    pub fn swap_slot(&self) -> Option<u64> {
        let may_be = self.is(FrameKind::Anon) && self.order == 0;
        may_be.then(|| self.used.checked_sub(1)).flatten()
    }
    /// True where it says that it is on an LRU list.
    #[must_use]
    pub fn is_listed(&self) -> bool {
        self.state & folio_state::LRU != 0
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
    /// True where programs may map it.
    #[must_use]
    pub fn is_user(&self) -> bool {
        matches!(
            self.kind(),
            Some(FrameKind::Anon | FrameKind::File | FrameKind::Zero)
        )
    }
    /// True where its mappings are counted.
    #[must_use]
    pub fn is_counted(&self) -> bool {
        matches!(self.kind(), Some(FrameKind::Anon | FrameKind::File))
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
    /// The lock that it sleeps for ([`Task::lock`]); of the last one where it does not.
    pub lock: [u64; 2],
    #[serde(with = "serde_hex")]
    pub stack: u64,
    #[serde(with = "serde_hex")]
    pub frame: u64,
    #[serde(with = "serde_hex")]
    pub files: u64,
    pub flags: u32,
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
            lock: task.lock.each_ref().map(|word| word.load(Relaxed)),
            stack: task.stack.load(Relaxed),
            frame: task.frame.load(Relaxed),
            files: task.files.get().0,
            flags: task.flags.load(Relaxed),
        }
    }

    /// True for a thread of the kernel.
    #[must_use]
    pub fn is_of_kernel(&self) -> bool {
        self.flags & task_flags::KERNEL != 0
    }
    /// True where it waits for `what`, one of `WAITS_FOR_*`, or was woken from that and does not yet run.
    #[must_use]
    pub fn is_in_wait_for(&self, what: u64) -> bool {
        let waits = matches!(self.state(), Some(TaskState::Blocked | TaskState::Ready));
        waits && self.waits_for == what
    }
    /// What it sleeps for, for a person; none where it does not.
    #[must_use]
    pub fn sleeps_for(&self) -> Option<String> {
        (self.state() == Some(TaskState::Blocked)).then(|| match self.waits_for {
            Task::WAITS_FOR_CHILD => "for a child".into(),
            Task::WAITS_FOR_DISK => "for the disk".into(),
            Task::WAITS_FOR_SWAP => "for the swap area".into(),
            Task::WAITS_FOR_WORK => "for work".into(),
            Task::WAITS_FOR_LOCK => {
                let [word, class] = self.lock;
                let class = LockClass::from_u64(class).map_or("lock", LockClass::name);
                format!("for the {class} at {word:#x}")
            }
            gva => format!("on the futex at {gva:#x}"),
        })
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
