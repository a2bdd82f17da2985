//! What the checks look at: the snapshot, and what follows from it, computed once.

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
    /// By the first frame of a folio: those that map any of its pages.
    folded: Vec<u32>,
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
        (vma.contains(gva) && vma.is_attached()).then_some(vma)
    }

    /// The VMAs by start.
    pub fn vmas_by_start(&self) -> &[&'a VmaView] {
        &self.by_start
    }
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
        let mut folded = vec![0; snapshot.folios.len()];
        for leaf in spaces.iter().flat_map(|space| space.user.leaves.iter()) {
            for frame in frames_of(leaf, mapped.len()) {
                mapped[frame] += 1;
            }
            if let Some(head) = snapshot.head_of(leaf.target()) {
                folded[head.frame as usize] += 1;
            }
        }
        Self {
            mem,
            snapshot,
            vcpus,
            moment,
            in_flight,
            kernel: AddressSpace::read(mem, snapshot.root.pgd, KERNEL_HALF),
            spaces,
            mapped,
            folded,
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
            Applies::AllAtPoints => self.in_flight.any_between_points().map(ToString::to_string),
            Applies::OutsideKernel => self.in_flight.any_vcpu().map(ToString::to_string),
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

    /// Present user PTEs that map a page of the folio whose first frame is `frame`.
    pub fn folio_mappings(&self, frame: u64) -> u32 {
        let count = usize::try_from(frame)
            .ok()
            .and_then(|at| self.folded.get(at));
        count.copied().unwrap_or(0)
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
        self.snapshot.head_of(leaf.target())
    }

    /// The mms for which `busy` names nothing in flight; the others are counted as skipped.
    pub(super) fn spaces_without<'s>(
        &'s self,
        busy: impl Fn(&'s InFlight, u64) -> Option<&'s Busy>,
        findings: &mut Findings,
    ) -> Vec<&'s Space<'a>> {
        let mut quiet = Vec::with_capacity(self.spaces.len());
        for space in &self.spaces {
            match busy(&self.in_flight, space.mm.gpa) {
                Some(busy) => findings.skip(busy),
                None => quiet.push(space),
            }
        }
        quiet
    }

    /// Present entries of folios of this kind that lie in a VMA, in mms whose VMAs nobody changes.
    pub(super) fn entries_of<'c>(
        &'c self,
        kind: FrameKind,
        findings: &mut Findings,
    ) -> impl Iterator<Item = (&'c Space<'a>, Leaf, &'a VmaView, &'a FolioView)> + use<'a, 'c> {
        let spaces = self.spaces_without(InFlight::vmas, findings).into_iter();
        spaces.flat_map(move |space| {
            space.user.leaves.iter().filter_map(move |leaf| {
                let folio = self.folio_of(leaf).filter(|folio| folio.is(kind))?;
                Some((space, leaf, space.vma_at(leaf.gva)?, folio))
            })
        })
    }

    /// The folios whose mappings are counted: anonymous ones and pages of files.
    pub(super) fn counted_folios(&self) -> impl Iterator<Item = &'a FolioView> + use<'a> {
        let folios = self.snapshot.folios.iter();
        folios.filter(|folio| folio.is_counted())
    }

    /// The anonymous folios.
    pub(super) fn anonymous_folios(&self) -> impl Iterator<Item = &'a FolioView> + use<'a> {
        let folios = self.snapshot.folios.iter();
        folios.filter(|folio| folio.is(FrameKind::Anon))
    }
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
