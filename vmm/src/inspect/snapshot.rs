//! The kernel's objects, all of them, read in one go.
//!
//! Traversals are bounded by the objects that fit in guest memory: one object is entered once per
//! list or tree, and a link that leads nowhere, to the wrong kind of frame, or back becomes an
//! [`Anomaly`] with the place of the link.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::Ordering::Relaxed;

use abi::layout::{HUGE_ORDER, HUGE_PAGE_SIZE, MAX_CPUS, PAGE_SHIFT};
use abi::objects::{
    AnonVma, AnonVmaChain, Folio, FrameKind, KernelRoot, Mm, SlabId, Task, Vma, VmaNode,
};
use serde::Serialize;
use zerocopy::FromBytes;

use super::files::{FileTableView, FileView, OpenFileView};
use super::groups::GroupsView;
use super::objects::{
    AnonVmaView, ChainView, CpuView, FolioView, MmView, NodeView, RootView, TaskView, VmaView,
};
use super::serde_hex;
use super::swap::SwapView;
use super::visit::push_bounded;
use crate::memory::{OutOfRange, PhysMem};

/// Why the kernel's objects cannot be read at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InspectError {
    /// The kernel has not come so far.
    #[error("the guest kernel has not published its objects yet; let it boot further")]
    NotReady,
    /// The root lies outside memory.
    #[error("the kernel root cannot be read")]
    Root(#[source] OutOfRange),
    /// What lies there is not a kernel root.
    #[error("no kernel root at {gpa:#x}: its magic is {found:#x}, expected {expected:#x}", expected = abi::boot::MAGIC)]
    Magic {
        /// Where the root was looked for.
        gpa: u64,
        /// What was found.
        found: u64,
    },
    /// The kernel was built from other sources than this program.
    #[error(
        "the kernel and this program differ in the layout of shared objects (kernel {kernel:#018x}, \
         here {host:#018x}): build both from the same sources"
    )]
    LayoutHash {
        /// Hash of the kernel.
        kernel: u64,
        /// Hash of this program.
        host: u64,
    },
    /// The array of folios does not fit in memory.
    #[error("the kernel root names {frames} folios at {gpa:#x}, which do not lie in guest memory")]
    Folios {
        /// First descriptor.
        gpa: u64,
        /// Number of descriptors.
        frames: u64,
    },
    /// More CPUs than a machine can have.
    #[error("the kernel root names {0} CPUs; a machine has at most {MAX_CPUS}")]
    Cpus(u64),
}

/// What is wrong with a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkProblem {
    /// It leads outside guest memory.
    Outside,
    /// Its target is not aligned.
    Misaligned,
    /// It leads to an object that the same traversal has entered before.
    Again,
    /// Its target does not lie in a frame of the right slab.
    NotInSlab,
    /// Its target is a free slot (even generation, or number 0).
    NotLive,
    /// More objects than fit in guest memory were linked, overlapping each other.
    TooMany,
}

impl LinkProblem {
    /// For a person.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::Outside => "outside guest memory",
            Self::Misaligned => "not aligned to 8 bytes",
            Self::Again => "an object that is linked twice (a cycle or a shared tail)",
            Self::NotInSlab => "not in a frame of that object's slab",
            Self::NotLive => "a free slot",
            Self::TooMany => "one object too many for guest memory",
        }
    }
}

/// A link that the reader could not believe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Anomaly {
    /// The link: type and field.
    pub link: &'static str,
    /// The object that holds it.
    #[serde(with = "serde_hex")]
    pub holder: u64,
    /// Where it leads.
    #[serde(with = "serde_hex")]
    pub target: u64,
    /// What is wrong.
    pub problem: LinkProblem,
    /// The mm in whose tree it was met, 0 for none.
    #[serde(with = "serde_hex")]
    pub mm: u64,
}

/// Everything the kernel's objects say.
#[derive(Clone, Debug, Serialize)]
pub struct Snapshot {
    /// The root object.
    pub root: RootView,
    /// Per-CPU state of the CPUs in use.
    pub cpus: Vec<CpuView>,
    /// Live mms with their VMAs, in the order of the kernel's list.
    pub mms: Vec<MmView>,
    /// Tasks.
    pub tasks: Vec<TaskView>,
    /// anon_vmas that a VMA leads to, by GPA.
    pub anon_vmas: BTreeMap<u64, AnonVmaView>,
    /// Files that a task or a VMA leads to, by GPA.
    pub files: BTreeMap<u64, FileView>,
    /// What the tasks' descriptors refer to, by GPA.
    pub open_files: BTreeMap<u64, OpenFileView>,
    /// The tasks' descriptors, by GPA.
    pub file_tables: BTreeMap<u64, FileTableView>,
    /// The swap area and the LRU lists.
    pub swap: SwapView,
    /// Memory groups, and the frames that are charged to them.
    pub groups: GroupsView,
    /// One descriptor a frame.
    #[serde(skip)]
    pub folios: Vec<FolioView>,
    /// Links that could not be followed.
    pub anomalies: Vec<Anomaly>,
}

impl Snapshot {
    /// Reads what the kernel root at `root_gpa` leads to.
    ///
    /// # Errors
    /// [`InspectError`] where the root itself makes no sense; a fault further down is an [`Anomaly`].
    pub fn read<M: PhysMem + ?Sized>(mem: &M, root_gpa: u64) -> Result<Self, InspectError> {
        Self::read_over(mem, root_gpa, Vec::new())
    }

    /// The same, with its folios in the memory of others that nobody needs any more: there are thousands.
    ///
    /// # Errors
    /// As [`Snapshot::read`].
    pub fn read_over<M: PhysMem + ?Sized>(
        mem: &M,
        root_gpa: u64,
        spare: Vec<FolioView>,
    ) -> Result<Self, InspectError> {
        if root_gpa == 0 {
            return Err(InspectError::NotReady);
        }
        let raw: KernelRoot = read_object(mem, root_gpa).map_err(InspectError::Root)?;
        check_identity(root_gpa, &raw)?;
        let root = RootView::new(root_gpa, &raw);
        let cpus = usize::try_from(root.nr_cpus)
            .ok()
            .and_then(|count| raw.cpus.get(..count))
            .ok_or(InspectError::Cpus(root.nr_cpus))?;
        let cpus = cpus.iter().enumerate().map(|(i, cpu)| CpuView::new(i, cpu));
        let mut snapshot = Self {
            cpus: cpus.collect(),
            mms: Vec::new(),
            tasks: Vec::new(),
            anon_vmas: BTreeMap::new(),
            files: BTreeMap::new(),
            open_files: BTreeMap::new(),
            file_tables: BTreeMap::new(),
            swap: SwapView::read(mem, &raw),
            groups: GroupsView::read(mem, &raw),
            folios: read_folios(mem, &root, spare)?,
            anomalies: Vec::new(),
            root,
        };
        let mut reader = Reader {
            mem,
            snapshot: &mut snapshot,
            nodes: HashSet::new(),
            vmas: HashSet::new(),
            anon_vmas: HashSet::new(),
            chains_of_vma: HashSet::new(),
            chains_of_anon: HashSet::new(),
            file_tables: HashSet::new(),
            open_files: HashSet::new(),
            files: HashSet::new(),
            mappings: HashSet::new(),
            cache_nodes: HashSet::new(),
        };
        reader.tasks();
        reader.mms();
        reader.files();
        Ok(snapshot)
    }

    /// The mm with number `id`.
    #[must_use]
    pub fn mm(&self, id: u64) -> Option<&MmView> {
        self.mms.iter().find(|mm| mm.id == id)
    }
    /// The mm at `gpa`.
    #[must_use]
    pub fn mm_at(&self, gpa: u64) -> Option<&MmView> {
        self.mms.iter().find(|mm| mm.gpa == gpa)
    }
    /// The task at `gpa`.
    #[must_use]
    pub fn task_at(&self, gpa: u64) -> Option<&TaskView> {
        self.tasks.iter().find(|task| task.gpa == gpa)
    }
    /// The VMA at `gpa`, with its mm.
    #[must_use]
    pub fn vma(&self, gpa: u64) -> Option<(&MmView, &VmaView)> {
        self.mms.iter().find_map(|mm| {
            let vma = mm.vmas.iter().find(|vma| vma.gpa == gpa)?;
            Some((mm, vma))
        })
    }
    /// The descriptor of the frame at `gpa`.
    #[must_use]
    pub fn folio(&self, gpa: u64) -> Option<&FolioView> {
        self.folios.get(usize::try_from(gpa >> PAGE_SHIFT).ok()?)
    }
    /// The folio that the frame at `gpa` is a page of.
    #[must_use]
    pub fn head_of(&self, gpa: u64) -> Option<&FolioView> {
        let own = self.folio(gpa)?;
        if !own.is(FrameKind::Tail) {
            return Some(own);
        }
        let head = self.folio(gpa & !(HUGE_PAGE_SIZE - 1));
        let is_large = |head: &&FolioView| head.is(FrameKind::Anon) && head.order == HUGE_ORDER;
        Some(head.filter(is_large).unwrap_or(own))
    }
    /// `mm 3`, or the address where there is no such mm.
    #[must_use]
    pub fn mm_name(&self, gpa: u64) -> String {
        match self.mm_at(gpa) {
            Some(mm) => format!("mm {}", mm.id),
            None if gpa == 0 => "kernel".into(),
            None => format!("mm at {gpa:#x}"),
        }
    }
}

fn check_identity(gpa: u64, root: &KernelRoot) -> Result<(), InspectError> {
    let found = root.magic.load(Relaxed);
    if found != abi::boot::MAGIC {
        return Err(InspectError::Magic { gpa, found });
    }
    let (kernel, host) = (root.layout_hash.load(Relaxed), abi::layout_hash());
    if kernel != host {
        return Err(InspectError::LayoutHash { kernel, host });
    }
    Ok(())
}

/// Descriptors that are read together.
const AT_ONCE: usize = 64;

fn read_folios<M: PhysMem + ?Sized>(
    mem: &M,
    root: &RootView,
    mut folios: Vec<FolioView>,
) -> Result<Vec<FolioView>, InspectError> {
    let wrong = InspectError::Folios {
        gpa: root.folios,
        frames: root.nr_frames,
    };
    // A descriptor for a frame that does not exist is as wrong as one that cannot be read.
    if root.nr_frames > mem.bytes() >> PAGE_SHIFT {
        return Err(wrong);
    }
    let each = size_of::<Folio>();
    let bytes = root.nr_frames * each as u64;
    if root
        .folios
        .checked_add(bytes)
        .is_none_or(|end| end > mem.bytes())
    {
        return Err(wrong);
    }
    folios.clear();
    folios.reserve(root.nr_frames as usize);
    let mut some = [0; AT_ONCE * size_of::<Folio>()];
    for first in (0..root.nr_frames).step_by(AT_ONCE) {
        let count = AT_ONCE.min((root.nr_frames - first) as usize);
        let some = &mut some[..count * each];
        if mem.read(root.folios + first * each as u64, some).is_err() {
            return Err(wrong);
        }
        let chunks = (first..).zip(some.chunks_exact(each));
        folios.extend(chunks.map(|(frame, bytes)| {
            let folio = Folio::read_from_bytes(bytes).expect("a chunk has a descriptor's size");
            FolioView::new(frame, &folio)
        }));
    }
    Ok(folios)
}

fn read_object<M: PhysMem + ?Sized, T: FromBytes + zerocopy::IntoBytes>(
    mem: &M,
    gpa: u64,
) -> Result<T, OutOfRange> {
    let mut object = T::new_zeroed();
    mem.read(gpa, object.as_mut_bytes())?;
    Ok(object)
}

/// A link, with what is needed to blame it.
#[derive(Clone, Copy)]
pub(super) struct Edge {
    pub(super) link: &'static str,
    pub(super) holder: u64,
    pub(super) target: u64,
    pub(super) mm: u64,
}

pub(super) struct Reader<'a, M: ?Sized> {
    mem: &'a M,
    pub(super) snapshot: &'a mut Snapshot,
    // What was entered, over all lists of a type, so that total work is bounded by memory.
    nodes: HashSet<u64>,
    vmas: HashSet<u64>,
    anon_vmas: HashSet<u64>,
    chains_of_vma: HashSet<u64>,
    chains_of_anon: HashSet<u64>,
    pub(super) file_tables: HashSet<u64>,
    pub(super) open_files: HashSet<u64>,
    pub(super) files: HashSet<u64>,
    pub(super) mappings: HashSet<u64>,
    pub(super) cache_nodes: HashSet<u64>,
}

impl<M: PhysMem + ?Sized> Reader<'_, M> {
    fn tasks(&mut self) {
        let mut seen = HashSet::new();
        let mut edge = Edge {
            link: "KernelRoot.tasks",
            holder: self.snapshot.root.gpa,
            target: self.snapshot.root.tasks,
            mm: 0,
        };
        while let Some(task) = self.follow::<Task>(edge, SlabId::Task, &mut seen) {
            let view = TaskView::new(edge.target, &task);
            self.require_live(edge, view.id != 0);
            self.snapshot.tasks.push(view);
            edge = Edge {
                link: "Task.next_task",
                holder: edge.target,
                target: task.next_task.get().0,
                mm: 0,
            };
        }
    }

    fn mms(&mut self) {
        let mut seen = HashSet::new();
        let mut edge = Edge {
            link: "KernelRoot.mms",
            holder: self.snapshot.root.gpa,
            target: self.snapshot.root.mms,
            mm: 0,
        };
        while let Some(mm) = self.follow::<Mm>(edge, SlabId::Mm, &mut seen) {
            let mut view = MmView::new(edge.target, &mm);
            self.require_live(edge, view.generation % 2 == 1 && view.id != 0);
            self.tree(&mut view);
            self.snapshot.mms.push(view);
            edge = Edge {
                link: "Mm.next",
                holder: edge.target,
                target: mm.next.get().0,
                mm: 0,
            };
        }
    }

    /// Reads the tree of VMAs in order, without recursion: its depth is the guest's word.
    fn tree(&mut self, mm: &mut MmView) {
        let mut stack = vec![Edge {
            link: "Mm.vmas",
            holder: mm.gpa,
            target: mm.tree,
            mm: mm.gpa,
        }];
        let mut nodes = std::mem::take(&mut self.nodes);
        while let Some(edge) = stack.pop() {
            let Some(node) = self.follow::<VmaNode>(edge, SlabId::VmaNode, &mut nodes) else {
                continue;
            };
            let node = NodeView::new(edge.target, &node);
            let mm_gpa = mm.gpa;
            let slots = node.slots.iter().map(|slot| Edge {
                link: "VmaNode.slots",
                holder: node.gpa,
                target: slot.child,
                mm: mm_gpa,
            });
            if node.level == 0 {
                slots.for_each(|slot| self.vma(mm, slot));
            } else {
                stack.extend(slots.rev());
            }
            mm.nodes.push(node);
        }
        self.nodes = nodes;
    }

    fn vma(&mut self, mm: &mut MmView, edge: Edge) {
        let mut vmas = std::mem::take(&mut self.vmas);
        if let Some(vma) = self.follow::<Vma>(edge, SlabId::Vma, &mut vmas) {
            let mut view = VmaView::new(edge.target, &vma);
            self.require_live(edge, view.generation % 2 == 1);
            view.chains = self.chains(
                Edge {
                    link: "Vma.chains",
                    holder: view.gpa,
                    target: vma.chains.get().0,
                    mm: mm.gpa,
                },
                Of::Vma,
            );
            self.anon_vma(Edge {
                link: "Vma.anon_vma",
                holder: view.gpa,
                target: view.anon_vma,
                mm: mm.gpa,
            });
            for chain in &view.chains {
                self.anon_vma(Edge {
                    link: "AnonVmaChain.anon_vma",
                    holder: chain.gpa,
                    target: chain.anon_vma,
                    mm: mm.gpa,
                });
            }
            mm.vmas.push(view);
        }
        self.vmas = vmas;
    }

    /// Reads an anon_vma and its ancestors, unless they are known.
    fn anon_vma(&mut self, edge: Edge) {
        let mut seen = std::mem::take(&mut self.anon_vmas);
        let mut todo = vec![edge];
        while let Some(edge) = todo.pop() {
            if edge.target == 0 || self.snapshot.anon_vmas.contains_key(&edge.target) {
                continue;
            }
            let Some(anon_vma) = self.follow::<AnonVma>(edge, SlabId::AnonVma, &mut seen) else {
                continue;
            };
            let mut view = AnonVmaView::new(edge.target, &anon_vma);
            self.require_live(edge, view.generation % 2 == 1);
            view.chains = self.chains(
                Edge {
                    link: "AnonVma.chains",
                    holder: view.gpa,
                    target: anon_vma.chains.get().0,
                    mm: 0,
                },
                Of::AnonVma,
            );
            let up = |link, target| Edge {
                link,
                holder: view.gpa,
                target,
                mm: 0,
            };
            todo.push(up("AnonVma.root", view.root));
            todo.push(up("AnonVma.parent", view.parent));
            self.snapshot.anon_vmas.insert(view.gpa, view);
        }
        self.anon_vmas = seen;
    }

    fn chains(&mut self, mut edge: Edge, of: Of) -> Vec<ChainView> {
        let mut seen = std::mem::take(match of {
            Of::Vma => &mut self.chains_of_vma,
            Of::AnonVma => &mut self.chains_of_anon,
        });
        let mut chains = Vec::new();
        while let Some(chain) = self.follow::<AnonVmaChain>(edge, SlabId::AnonVmaChain, &mut seen) {
            let view = ChainView::new(edge.target, &chain);
            self.require_live(edge, view.generation % 2 == 1);
            chains.push(view);
            edge.holder = view.gpa;
            (edge.link, edge.target) = match of {
                Of::Vma => ("AnonVmaChain.next_of_vma", view.next_of_vma),
                Of::AnonVma => ("AnonVmaChain.next_of_anon", view.next_of_anon),
            };
        }
        *match of {
            Of::Vma => &mut self.chains_of_vma,
            Of::AnonVma => &mut self.chains_of_anon,
        } = seen;
        chains
    }

    /// The object that `edge` leads to, if it leads to one that was not entered before.
    pub(super) fn follow<T: FromBytes + zerocopy::IntoBytes>(
        &mut self,
        edge: Edge,
        slab: SlabId,
        seen: &mut HashSet<u64>,
    ) -> Option<T> {
        if edge.target == 0 {
            return None;
        }
        let problem = if !edge.target.is_multiple_of(8) {
            LinkProblem::Misaligned
        } else if seen.len() as u64 >= self.mem.bytes() / size_of::<T>() as u64 {
            LinkProblem::TooMany
        } else if !seen.insert(edge.target) {
            LinkProblem::Again
        } else {
            match read_object(self.mem, edge.target) {
                // What lies elsewhere is not that object: following its links would only add noise.
                Ok(object) if self.lies_in(edge.target, slab) => return Some(object),
                Ok(_) => LinkProblem::NotInSlab,
                Err(OutOfRange { .. }) => LinkProblem::Outside,
            }
        };
        self.blame(edge, problem);
        None
    }

    fn lies_in(&self, gpa: u64, slab: SlabId) -> bool {
        self.snapshot
            .folio(gpa)
            .is_some_and(|folio| folio.is(FrameKind::Slab) && folio.owner == slab as u64)
    }

    pub(super) fn require_live(&mut self, edge: Edge, live: bool) {
        if !live {
            self.blame(edge, LinkProblem::NotLive);
        }
    }

    fn blame(&mut self, edge: Edge, problem: LinkProblem) {
        let anomaly = Anomaly {
            link: edge.link,
            holder: edge.holder,
            target: edge.target,
            problem,
            mm: edge.mm,
        };
        push_bounded(&mut self.snapshot.anomalies, anomaly);
    }
}

/// Whose list a chain is followed on.
#[derive(Clone, Copy)]
enum Of {
    Vma,
    AnonVma,
}
