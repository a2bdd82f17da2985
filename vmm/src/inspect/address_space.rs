//! An mm, its VMAs with their tree, and the anon_vmas that they are on.

use std::sync::atomic::Ordering::Relaxed;

use abi::layout::PAGE_SIZE;
use abi::objects::{
    AnonVma, AnonVmaChain, Mm, RwLockWord, VMA_NODE_SLOTS, Vma, VmaNode, VmaRefs, vma_flags,
};
use serde::Serialize;

use super::serde_hex;

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
    /// Its lock: [`VmaRefs`].
    #[serde(with = "serde_hex")]
    pub refs: u64,
    /// [`MmView::lock_seq`] when it was locked for writing last.
    pub lock_seq: u64,
    /// Odd while live.
    pub generation: u32,
    /// Its anon_vma, 0 for none.
    #[serde(with = "serde_hex")]
    pub anon_vma: u64,
    /// Its chains, in order.
    pub chains: Vec<ChainView>,
    /// The file that it maps, 0 for none.
    #[serde(with = "serde_hex")]
    pub file: u64,
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
            refs: vma.refs.load(Relaxed),
            lock_seq: vma.lock_seq.load(Relaxed),
            generation: vma.generation.load(Relaxed),
            anon_vma: vma.anon_vma.get().0,
            chains: Vec::new(),
            file: vma.file.get().0,
        }
    }

    /// True while it is linked in its mm's tree.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        VmaRefs::is_attached(self.refs)
    }
    /// Faults that hold it for reading.
    #[must_use]
    pub fn readers(&self) -> u64 {
        VmaRefs::readers(self.refs)
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
    /// VMAs whose `anon_vma` it is.
    pub active: u32,
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
            active: anon_vma.active.load(Relaxed),
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
    pub lock_seq: u64,
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
    pub flush_pending: u32,
    pub huge: u64,
    pub total_vm: u64,
    pub data_vm: u64,
    pub locked_vm: u64,
    /// Number of the memory group that its process is in, 0 for none.
    pub group: u64,
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
            lock_seq: mm.lock_seq.load(Relaxed),
            tree: mm.vmas.get().0,
            map_count: mm.map_count.load(Relaxed),
            rss: mm.rss.load(Relaxed),
            tables: mm.tables.load(Relaxed),
            brk_start: mm.brk_start.load(Relaxed),
            brk: mm.brk.load(Relaxed),
            generation: mm.generation.load(Relaxed),
            flush_pending: mm.flush_pending.load(Relaxed),
            huge: mm.huge.load(Relaxed),
            total_vm: mm.total_vm.load(Relaxed),
            data_vm: mm.data_vm.load(Relaxed),
            locked_vm: mm.locked_vm.load(Relaxed),
            group: mm.group.load(Relaxed),
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
