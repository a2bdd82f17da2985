//! V: the VMAs of an mm and the tree that they hang in.

use std::collections::HashMap;

use abi::layout::{PAGE_SIZE, USER_END, USER_MIN};
use abi::objects::{VMA_NODE_SLOTS, VmaRefs, vma_flags};

use super::context::Space;
use super::{Applies, Context, Family, Finding, Findings, InFlight, Invariant};
use crate::inspect::VmaView;
use crate::inspect::objects::{MmView, NodeView};

const LINUX_LOCK: &str = "Linux include/linux/mmap_lock.h; mm/mmap_lock.c";
const LINUX_VMA: &str = "Linux mm/vma.c, validate_mm";
const TREE: &str = "abi::objects::VmaNode; Linux lib/maple_tree.c, mt_validate";

pub(super) const INVARIANTS: &[Invariant] = &[
    Invariant {
        id: "V-01",
        family: Family::Vma,
        predicate: "an mm's VMAs are sorted and disjoint",
        applies: Applies::UnwrittenVmas,
        source: LINUX_VMA,
        run: sorted_and_disjoint,
    },
    Invariant {
        id: "V-02",
        family: Family::Vma,
        predicate: "a VMA is page aligned, not empty, and inside user space",
        applies: Applies::UnwrittenVmas,
        source: LINUX_VMA,
        run: well_formed,
    },
    Invariant {
        id: "V-03",
        family: Family::Vma,
        predicate: "mm.map_count is the number of VMAs in the tree",
        applies: Applies::UnwrittenVmas,
        source: LINUX_VMA,
        run: map_count,
    },
    Invariant {
        id: "V-04",
        family: Family::Vma,
        predicate: "the tree is balanced, its nodes are filled within bounds, its links are sound",
        applies: Applies::UnwrittenVmas,
        source: TREE,
        run: nodes_well_formed,
    },
    Invariant {
        id: "V-05",
        family: Family::Vma,
        predicate: "a slot's start is the least start below it",
        applies: Applies::UnwrittenVmas,
        source: TREE,
        run: separators,
    },
    Invariant {
        id: "V-06",
        family: Family::Vma,
        predicate: "a slot's gap is the largest hole below it",
        applies: Applies::UnwrittenVmas,
        source: TREE,
        run: gaps,
    },
    Invariant {
        id: "V-07",
        family: Family::Vma,
        predicate: "a VMA in an mm's tree is attached, live, and that mm's",
        applies: Applies::UnwrittenVmas,
        source: "Linux include/linux/mmap_lock.h, vma_assert_attached",
        run: attached_and_owned,
    },
    Invariant {
        id: "V-08",
        family: Family::Vma,
        predicate: "mm.total_vm, data_vm and locked_vm are the pages of its VMAs, of those that are data, and of those that are locked",
        applies: Applies::UnwrittenVmas,
        source: "Linux mm/mmap.c, vm_stat_account; mm/mlock.c, mlock_fixup",
        run: counters,
    },
    Invariant {
        id: "V-09",
        family: Family::Vma,
        predicate: "mm.lock_seq is even, and every VMA of the mm was locked for writing before it",
        applies: Applies::UnwrittenVmas,
        source: LINUX_LOCK,
        run: write_locks,
    },
    Invariant {
        id: "V-10",
        family: Family::Vma,
        predicate: "no fault holds a VMA, and none is kept out of one",
        applies: Applies::OutsideKernel,
        source: LINUX_LOCK,
        run: readers,
    },
];

fn sorted_and_disjoint(context: &Context<'_>, findings: &mut Findings) {
    for space in context.spaces_without(InFlight::vmas, findings) {
        let vmas = &space.mm.vmas;
        findings.examined += vmas.len().min(1) as u64;
        for (before, after) in vmas.iter().zip(vmas.iter().skip(1)) {
            findings.require(before.end <= after.start, || {
                let what = if before.start <= after.start {
                    "overlap"
                } else {
                    "are out of order"
                };
                Finding::new(format!("two VMAs {what}"))
                    .expected(format!("a start of at least {:#x}", before.end))
                    .found(format!("{} and then {}", before.label(), after.label()))
                    .mm(space.mm.id)
                    .gva(after.start)
                    .object("Vma", after.gpa)
            });
        }
    }
}

fn well_formed(context: &Context<'_>, findings: &mut Findings) {
    for (space, vma) in vmas(context, findings) {
        let aligned = vma.start.is_multiple_of(PAGE_SIZE) && vma.end.is_multiple_of(PAGE_SIZE);
        let inside = USER_MIN <= vma.start && vma.end <= USER_END;
        findings.require(aligned && inside && vma.start < vma.end, || {
            Finding::new("a VMA has no possible range")
                .expected(format!(
                    "page aligned, not empty, in {USER_MIN:#x}..{USER_END:#x}"
                ))
                .found(vma.label())
                .mm(space.mm.id)
                .object("Vma", vma.gpa)
        });
    }
}

fn map_count(context: &Context<'_>, findings: &mut Findings) {
    for space in context.spaces_without(InFlight::vmas, findings) {
        let MmView {
            map_count,
            vmas,
            id,
            ..
        } = space.mm;
        findings.require(*map_count == vmas.len() as u64, || {
            Finding::new("mm.map_count is wrong")
                .expected(format!("{}, the VMAs in the tree", vmas.len()))
                .found(map_count)
                .mm(*id)
        });
    }
}

fn counters(context: &Context<'_>, findings: &mut Findings) {
    for space in context.spaces_without(InFlight::vmas, findings) {
        let mm = space.mm;
        let sum = |counts: fn(u64) -> bool| {
            let counted = mm.vmas.iter().filter(|vma| counts(vma.flags));
            // What a guest writes may have any range.
            counted.fold(0u64, |pages, vma| {
                pages.wrapping_add(vma.end.wrapping_sub(vma.start) / PAGE_SIZE)
            })
        };
        for (name, found, counts) in [
            ("total_vm", mm.total_vm, (|_| true) as fn(u64) -> bool),
            ("data_vm", mm.data_vm, vma_flags::is_data),
            ("locked_vm", mm.locked_vm, |flags| {
                flags & vma_flags::LOCKED != 0
            }),
        ] {
            let expected = sum(counts);
            findings.require(found == expected, || {
                Finding::new(format!("mm.{name} is wrong"))
                    .expected(format!("{expected}, the pages of its VMAs"))
                    .found(found)
                    .mm(mm.id)
            });
        }
    }
}

/// A tree by the GPA of its nodes.
struct Tree<'c> {
    mm: &'c MmView,
    nodes: HashMap<u64, &'c NodeView>,
    vmas: HashMap<u64, &'c VmaView>,
}

impl<'c> Tree<'c> {
    fn of(space: &Space<'c>) -> Self {
        let mm = space.mm;
        Self {
            mm,
            nodes: mm.nodes.iter().map(|node| (node.gpa, node)).collect(),
            vmas: mm.vmas.iter().map(|vma| (vma.gpa, vma)).collect(),
        }
    }

    fn about(&self, node: &NodeView, summary: impl Into<String>) -> Finding {
        Finding::new(summary)
            .mm(self.mm.id)
            .object("VmaNode", node.gpa)
    }

    /// Every slot with its number and node.
    fn slots(&self) -> impl Iterator<Item = (&'c NodeView, usize)> + use<'c> {
        let nodes = self.mm.nodes.iter();
        nodes.flat_map(|node| (0..node.slots.len()).map(move |slot| (node, slot)))
    }
}

fn nodes_well_formed(context: &Context<'_>, findings: &mut Findings) {
    for space in context.spaces_without(InFlight::vmas, findings) {
        let tree = Tree::of(space);
        for node in &space.mm.nodes {
            let filled = (1..=VMA_NODE_SLOTS as u32).contains(&node.count);
            findings.require(filled, || {
                tree.about(node, "a node of the VMA tree is empty or overfull")
                    .expected(format!("count in 1..={VMA_NODE_SLOTS}"))
                    .found(format!("count = {}", node.count))
            });
            let children = node.slots.iter().filter(|_| node.level != 0);
            for child in children.filter_map(|slot| tree.nodes.get(&slot.child)) {
                findings.require(child.level.checked_add(1) == Some(node.level), || {
                    tree.about(child, "the VMA tree is not balanced")
                        .expected(format!("level {}", node.level.saturating_sub(1)))
                        .found(format!("level {}", child.level))
                });
            }
        }
        let anomalies = context.snapshot.anomalies.iter();
        // Chains and anon_vmas hang off a VMA and are L-10's.
        let of_tree = |link: &str| link == "Mm.vmas" || link == "VmaNode.slots";
        for anomaly in
            anomalies.filter(|anomaly| anomaly.mm == space.mm.gpa && of_tree(anomaly.link))
        {
            // A free slot in the tree is V-07's.
            if anomaly.problem == crate::inspect::snapshot::LinkProblem::NotLive {
                continue;
            }
            findings.report(|| {
                Finding::new("a link of the VMA tree is wild")
                    .expected(format!(
                        "{} leads to an object of its type, entered once",
                        anomaly.link
                    ))
                    .found(format!(
                        "{:#x}: {}",
                        anomaly.target,
                        anomaly.problem.describe()
                    ))
                    .mm(space.mm.id)
                    .object("holder", anomaly.holder)
            });
        }
    }
}

fn separators(context: &Context<'_>, findings: &mut Findings) {
    for space in context.spaces_without(InFlight::vmas, findings) {
        let tree = Tree::of(space);
        for (node, index) in tree.slots() {
            let slot = node.slots[index];
            let least = match node.level {
                0 => tree.vmas.get(&slot.child).map(|vma| vma.start),
                _ => tree
                    .nodes
                    .get(&slot.child)
                    .and_then(|child| Some(child.slots.first()?.start)),
            };
            // A child that could not be read is V-04's.
            let Some(least) = least else { continue };
            findings.require(slot.start == least, || {
                tree.about(
                    node,
                    format!("slot {index} of the VMA tree names the wrong start"),
                )
                .expected(format!("start = {least:#x}"))
                .found(format!("start = {:#x}", slot.start))
                .gva(least)
            });
        }
    }
}

fn gaps(context: &Context<'_>, findings: &mut Findings) {
    for space in context.spaces_without(InFlight::vmas, findings) {
        let tree = Tree::of(space);
        let before = ends_before(&space.mm.vmas);
        for (node, index) in tree.slots() {
            let slot = node.slots[index];
            let hole = match node.level {
                0 => tree
                    .vmas
                    .get(&slot.child)
                    .and_then(|vma| vma.start.checked_sub(*before.get(&vma.gpa)?)),
                _ => tree
                    .nodes
                    .get(&slot.child)
                    .and_then(|child| child.slots.iter().map(|slot| slot.gap).max()),
            };
            let Some(hole) = hole else { continue };
            findings.require(slot.gap == hole, || {
                tree.about(
                    node,
                    format!("slot {index} of the VMA tree names the wrong hole"),
                )
                .expected(format!("gap = {hole:#x}"))
                .found(format!("gap = {:#x}", slot.gap))
                .gva(slot.start)
            });
        }
    }
}

/// By VMA: where the hole before it begins.
fn ends_before(vmas: &[VmaView]) -> HashMap<u64, u64> {
    let ends = std::iter::once(0).chain(vmas.iter().map(|vma| vma.end));
    vmas.iter().map(|vma| vma.gpa).zip(ends).collect()
}

fn attached_and_owned(context: &Context<'_>, findings: &mut Findings) {
    for (space, vma) in vmas(context, findings) {
        let right = vma.is_attached() && vma.generation % 2 == 1 && vma.mm == space.mm.gpa;
        findings.require(right, || {
            Finding::new("a VMA in an mm's tree is not one of its own")
                .expected(format!(
                    "attached, odd generation, mm = {:#x}",
                    space.mm.gpa
                ))
                .found(format!(
                    "{}, generation {}, mm = {:#x}",
                    if vma.is_attached() {
                        "attached"
                    } else {
                        "detached"
                    },
                    vma.generation,
                    vma.mm
                ))
                .mm(space.mm.id)
                .object("Vma", vma.gpa)
                .detail(vma.label())
        });
    }
}

fn write_locks(context: &Context<'_>, findings: &mut Findings) {
    for space in context.spaces_without(InFlight::vmas, findings) {
        let mm = space.mm;
        let is_wrong = |vma: &&VmaView| {
            vma.lock_seq > mm.lock_seq || vma.lock_seq.is_multiple_of(2) && vma.lock_seq != 0
        };
        let wrong = mm.vmas.iter().find(is_wrong);
        findings.require(mm.lock_seq.is_multiple_of(2) && wrong.is_none(), || {
            let found = match wrong {
                Some(vma) => format!(
                    "{}, and lock_seq {} of {}",
                    mm.lock_seq,
                    vma.lock_seq,
                    vma.label()
                ),
                None => mm.lock_seq.to_string(),
            };
            Finding::new("an mm's lock_seq does not fit")
                .expected("an even one, and odd ones below it of VMAs that were ever locked")
                .found(found)
                .mm(mm.id)
        });
    }
}

fn readers(context: &Context<'_>, findings: &mut Findings) {
    for (space, vma) in vmas(context, findings) {
        findings.require(vma.refs & !VmaRefs::ATTACHED == 0, || {
            Finding::new("a VMA is still held, or closed")
                .expected(format!("{:#x}", VmaRefs::ATTACHED))
                .found(format!("{:#x}, {} readers", vma.refs, vma.readers()))
                .mm(space.mm.id)
                .object("Vma", vma.gpa)
                .detail(vma.label())
        });
    }
}

/// The VMAs of the mms whose VMAs nobody is changing.
fn vmas<'c, 'a>(
    context: &'c Context<'a>,
    findings: &mut Findings,
) -> impl Iterator<Item = (&'c Space<'a>, &'a VmaView)> + use<'a, 'c> {
    let spaces = context.spaces_without(InFlight::vmas, findings).into_iter();
    spaces.flat_map(|space| space.mm.vmas.iter().map(move |vma| (space, vma)))
}
