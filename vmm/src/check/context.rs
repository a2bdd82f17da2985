//! What the checks look at: the snapshot, and what follows from it, computed once.

use std::collections::HashSet;

use abi::layout::PAGE_SHIFT;
use abi::objects::FrameKind;

use super::{Applies, Busy, Findings, InFlight};
use crate::inspect::walk::{AddressSpace, KERNEL_HALF, Leaf, USER_HALF};
use crate::inspect::{FolioView, MmView, Snapshot, VcpuFacts, VmaView};
use crate::memory::PhysMem;

/// When the guest is looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Moment {
    /// In the middle of a run.
    #[default]
    Paused,
    /// After the last process has exited: nothing of any may be left.
    AfterExit,
}

/// A guest that stands still, ready to be judged.
pub struct Context<'a> {
    /// Its memory.
    pub mem: &'a dyn PhysMem,
    /// Its kernel's objects.
    pub snapshot: &'a Snapshot,
    /// Its vCPUs.
    pub vcpus: &'a [VcpuFacts],
    /// When this is.
    pub moment: Moment,
    /// What is half done.
    pub in_flight: InFlight,
    /// What the kernel's own tables map in the upper half.
    pub kernel: AddressSpace,
    /// The mms with what their tables map in the lower half, in the order of the snapshot.
    pub spaces: Vec<Space<'a>>,
    /// By frame: present user PTEs that map it, over all mms.
    mapped: Vec<u32>,
    unsettled: Unsettled,
}

/// One mm and what its tables say.
pub struct Space<'a> {
    /// The mm.
    pub mm: &'a MmView,
    /// Its user half.
    pub user: AddressSpace,
    /// Its VMAs by start, whatever order the tree has them in.
    by_start: Vec<&'a VmaView>,
}

impl<'a> Space<'a> {
    fn read(mem: &dyn PhysMem, mm: &'a MmView) -> Self {
        let mut by_start: Vec<_> = mm.vmas.iter().collect();
        by_start.sort_by_key(|vma| vma.start);
        Self {
            mm,
            user: AddressSpace::read(mem, mm.pgd, USER_HALF),
            by_start,
        }
    }

    /// The attached VMA with the highest start that contains `gva`.
    pub fn vma_at(&self, gva: u64) -> Option<&'a VmaView> {
        let after = self.by_start.partition_point(|vma| vma.start <= gva);
        let vma = *self.by_start[..after].last()?;
        (vma.contains(gva) && vma.attached).then_some(vma)
    }

    /// The VMAs by start.
    pub fn vmas_by_start(&self) -> &[&'a VmaView] {
        &self.by_start
    }
}

/// Folios whose counts an operation in flight may be changing.
#[derive(Default)]
struct Unsettled {
    /// The reason, where anything is in flight.
    reason: Option<Busy>,
    /// Some mm's VMAs are being changed: those that an unmap has taken out of the tree already lead
    /// nowhere any more, so any folio may be theirs.
    all: bool,
    /// Frames that a busy mm maps.
    frames: HashSet<u64>,
    /// anon_vmas that a busy mm's VMA is on.
    anon_vmas: HashSet<u64>,
}

impl<'a> Context<'a> {
    /// Reads all page tables and works out what is in flight.
    pub fn new(
        mem: &'a dyn PhysMem,
        snapshot: &'a Snapshot,
        vcpus: &'a [VcpuFacts],
        moment: Moment,
    ) -> Self {
        let in_flight = InFlight::read(snapshot, vcpus);
        let spaces: Vec<_> = snapshot.mms.iter().map(|mm| Space::read(mem, mm)).collect();
        let mut mapped = vec![0; snapshot.folios.len()];
        for leaf in spaces.iter().flat_map(|space| space.user.leaves.iter()) {
            for frame in frames_of(leaf, mapped.len()) {
                mapped[frame] += 1;
            }
        }
        let unsettled = Unsettled::new(&in_flight, &spaces);
        Self {
            mem,
            snapshot,
            vcpus,
            moment,
            in_flight,
            kernel: AddressSpace::read(mem, snapshot.root.pgd, KERNEL_HALF),
            spaces,
            mapped,
            unsettled,
        }
    }

    /// Why nothing that `applies` so can be examined now.
    pub(super) fn forbids(&self, applies: Applies) -> Option<String> {
        match applies {
            Applies::AfterExit if self.moment == Moment::Paused => {
                Some("the run has not ended".into())
            }
            Applies::QuiescentKernel | Applies::AfterExit => {
                self.in_flight.kernel().map(ToString::to_string)
            }
            _ => None,
        }
    }

    /// Present user PTEs that map `frame`.
    pub fn mappings(&self, frame: u64) -> u32 {
        usize::try_from(frame)
            .ok()
            .and_then(|frame| self.mapped.get(frame))
            .copied()
            .unwrap_or(0)
    }

    /// Who maps `frame`, for a person; at most eight.
    pub(super) fn describe_mappings(&self, frame: u64) -> Vec<String> {
        let entries = self.spaces.iter().flat_map(|space| {
            let leaves = space.user.leaves.iter();
            leaves
                .filter(|&leaf| frame_range(leaf).contains(&frame))
                .map(|leaf| mapping(space.mm, leaf))
        });
        entries.take(8).collect()
    }

    /// The folio that a leaf maps, where it maps memory.
    pub(super) fn folio_of(&self, leaf: Leaf) -> Option<&'a FolioView> {
        self.snapshot.folio(leaf.target())
    }

    /// The mms on which nothing is in flight; the others are counted as skipped.
    pub(super) fn quiet_spaces<'s>(&'s self, findings: &mut Findings) -> Vec<&'s Space<'a>> {
        let spaces = self.spaces.iter();
        spaces
            .filter(|space| settled(self.in_flight.mm(space.mm.gpa), findings))
            .collect()
    }

    /// The mms whose VMAs nobody is changing; the others are counted as skipped.
    pub(super) fn unwritten_spaces<'s>(&'s self, findings: &mut Findings) -> Vec<&'s Space<'a>> {
        let spaces = self.spaces.iter();
        spaces
            .filter(|space| settled(self.in_flight.vmas(space.mm.gpa), findings))
            .collect()
    }

    /// The anonymous folios that no operation in flight can be changing; the others are counted as
    /// skipped.
    pub(super) fn settled_folios<'s>(
        &'s self,
        findings: &mut Findings,
    ) -> impl Iterator<Item = &'a FolioView> + use<'a, 's> {
        let all = self.snapshot.folios.iter();
        let anon = || all.clone().filter(|folio| folio.is(FrameKind::Anon));
        for busy in anon().filter_map(|folio| self.unsettled(folio)) {
            findings.skip(busy);
        }
        let (settled, all) = (
            |folio: &&FolioView| self.unsettled(folio).is_none(),
            all.clone(),
        );
        all.filter(|folio| folio.is(FrameKind::Anon))
            .filter(settled)
    }

    /// Why the counts of `folio` may be off.
    pub(super) fn unsettled(&self, folio: &FolioView) -> Option<&Busy> {
        let Unsettled {
            reason,
            all,
            frames,
            anon_vmas,
        } = &self.unsettled;
        let reason = reason.as_ref()?;
        // A folio that nothing maps and whose anon_vma is unknown may be anybody's.
        let stray =
            self.mappings(folio.frame) == 0 && !self.snapshot.anon_vmas.contains_key(&folio.owner);
        let touched = frames.contains(&folio.frame) || anon_vmas.contains(&folio.owner);
        (*all || stray || touched).then_some(reason)
    }
}

fn settled(busy: Option<&Busy>, findings: &mut Findings) -> bool {
    if let Some(busy) = busy {
        findings.skip(busy);
    }
    busy.is_none()
}

/// One entry for a person.
fn mapping(mm: &MmView, leaf: Leaf) -> String {
    format!(
        "mapped by mm {} at GVA {:#x}: entry {:#018x} at {:#x}",
        mm.id,
        leaf.gva,
        leaf.entry.0,
        leaf.entry_gpa()
    )
}

fn frame_range(leaf: Leaf) -> std::ops::Range<u64> {
    let first = leaf.target() >> PAGE_SHIFT;
    first..first + (leaf.bytes() >> PAGE_SHIFT)
}

/// The frames below `limit` that `leaf` maps.
fn frames_of(leaf: Leaf, limit: usize) -> std::ops::Range<usize> {
    let range = frame_range(leaf);
    let clip = |frame: u64| frame.min(limit as u64) as usize;
    clip(range.start)..clip(range.end)
}

impl Unsettled {
    fn new(in_flight: &InFlight, spaces: &[Space<'_>]) -> Self {
        let mut unsettled = Self::default();
        for space in spaces {
            let Some(busy) = in_flight.mm(space.mm.gpa) else {
                continue;
            };
            if let Some(busy) = in_flight.vmas(space.mm.gpa) {
                unsettled.reason = Some(busy.clone());
                unsettled.all = true;
                return unsettled;
            }
            unsettled.reason.get_or_insert_with(|| busy.clone());
            for leaf in space.user.leaves.iter() {
                unsettled.frames.extend(frame_range(leaf).take(512));
            }
            for vma in &space.mm.vmas {
                unsettled.anon_vmas.insert(vma.anon_vma);
                let chains = vma.chains.iter().map(|chain| chain.anon_vma);
                unsettled.anon_vmas.extend(chains);
            }
        }
        unsettled.reason = unsettled.reason.or_else(|| in_flight.kernel().cloned());
        unsettled
    }
}
