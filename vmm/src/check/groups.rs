//! Family G: memory groups, recounted.

use std::collections::BTreeMap;

use abi::objects::{FrameKind, group_stat};

use super::{Applies, Context, Family, Finding, Findings, Invariant};
use crate::inspect::{FolioView, GroupView};

pub(super) const INVARIANTS: &[Invariant] = &[
    Invariant {
        id: "G-01",
        family: Family::Groups,
        predicate: "a memory group's usage is the frames that are charged to it or to groups below it",
        applies: Applies::QuiescentKernel,
        source: "Linux mm/page_counter.c, page_counter_try_charge; mm/memcontrol.c, uncharge_folio",
        run: usage_recounted,
    },
    Invariant {
        id: "G-02",
        family: Family::Groups,
        predicate: "a memory group's statistics are the frames of their kind, and the swap slots, charged to it or below",
        applies: Applies::QuiescentKernel,
        source: "Linux mm/memcontrol.c, memcg_page_state and __mem_cgroup_try_charge_swap",
        run: stats_recounted,
    },
    Invariant {
        id: "G-03",
        family: Family::Groups,
        predicate: "a memory group's usage is at least that of its children together",
        applies: Applies::QuiescentKernel,
        source: "Linux Documentation/admin-guide/cgroup-v2.rst, memory.current",
        run: children_fit,
    },
    Invariant {
        id: "G-04",
        family: Family::Groups,
        predicate: "frames, swap slots, mms and groups name groups that exist, and parents come before their children",
        applies: Applies::QuiescentKernel,
        source: "Linux mm/memcontrol.c, mem_cgroup_from_id; abi::objects::MemGroup::parent",
        run: named_groups_exist,
    },
    Invariant {
        id: "G-05",
        family: Family::Groups,
        predicate: "a memory group's usage is neither above its limit nor above its watermark",
        applies: Applies::QuiescentKernel,
        source: "Linux mm/page_counter.c, page_counter_try_charge and page_counter_set_max",
        run: limits_kept,
    },
    Invariant {
        id: "G-06",
        family: Family::Groups,
        predicate: "only user memory, page-table pages and swap slots in use are charged",
        applies: Applies::QuiescentKernel,
        source: "Linux mm/page_alloc.c, page_expected_state (memcg_data)",
        run: nothing_else_charged,
    },
];

/// What one group must have counted.
#[derive(Clone, Copy, Default)]
struct Counted {
    usage: u64,
    stats: [u64; group_stat::NAMES.len()],
}

/// Frames that are charged, with the group.
fn charged<'c>(context: &'c Context<'_>) -> impl Iterator<Item = (&'c FolioView, u64)> {
    let frames = context.snapshot.groups.frames.as_deref().unwrap_or(&[]);
    let folios = context.snapshot.folios.iter().zip(frames);
    folios
        .filter(|(_, group)| **group != 0)
        .map(|(folio, group)| (folio, u64::from(*group)))
}

/// Slots that are charged, with the group.
fn charged_slots<'c>(context: &'c Context<'_>) -> impl Iterator<Item = (u64, u64)> + 'c {
    let slots = context.snapshot.swap.slots.as_deref().unwrap_or(&[]);
    (0..)
        .zip(slots)
        .filter(|(_, slot)| slot.group != 0)
        .map(|(number, slot)| (number, u64::from(slot.group)))
}

fn stat_of(folio: &FolioView) -> Option<usize> {
    Some(match folio.kind()? {
        FrameKind::Anon => group_stat::ANON,
        FrameKind::File => group_stat::FILE,
        FrameKind::Table | FrameKind::Retired => group_stat::PAGETABLES,
        _ => return None,
    })
}

fn recount(context: &Context<'_>) -> BTreeMap<u64, Counted> {
    let groups = &context.snapshot.groups;
    let mut counted = BTreeMap::<u64, Counted>::new();
    let mut count = |group, by: &dyn Fn(&mut Counted)| {
        for above in groups.group_and_above(group) {
            by(counted.entry(above.number).or_default());
        }
    };
    for (folio, group) in charged(context) {
        count(group, &|counted| {
            let frames = folio.frames();
            counted.usage = counted.usage.saturating_add(frames);
            if let Some(stat) = stat_of(folio) {
                counted.stats[stat] = counted.stats[stat].saturating_add(frames);
            }
        });
    }
    for (_, group) in charged_slots(context) {
        count(group, &|counted| counted.stats[group_stat::SWAP] += 1);
    }
    counted
}

fn usage_recounted(context: &Context<'_>, findings: &mut Findings) {
    let groups = &context.snapshot.groups;
    let counted = recount(context);
    for group in &groups.groups {
        let expected = counted
            .get(&group.number)
            .map_or(0, |counted| counted.usage);
        findings.require(group.usage == expected, || {
            about(group, "miscounts what it is charged for")
                .expected(format!("usage = {expected}"))
                .found(format!("usage = {}", group.usage))
        });
    }
    findings.require(groups.frames.is_some(), || {
        Finding::new("the array of the frames' memory groups does not lie in memory")
            .expected("an array in guest memory")
            .found(format!("{:#x}", groups.array))
    });
}

fn stats_recounted(context: &Context<'_>, findings: &mut Findings) {
    let counted = recount(context);
    for group in &context.snapshot.groups.groups {
        let expected = counted
            .get(&group.number)
            .copied()
            .unwrap_or_default()
            .stats;
        for (stat, name) in group_stat::NAMES.iter().enumerate() {
            findings.require(group.stats[stat] == expected[stat], || {
                about(group, &format!("miscounts its {name}"))
                    .expected(format!("{name} = {}", expected[stat]))
                    .found(format!("{name} = {}", group.stats[stat]))
            });
        }
    }
}

fn children_fit(context: &Context<'_>, findings: &mut Findings) {
    let groups = &context.snapshot.groups.groups;
    for group in groups {
        let children = groups.iter().filter(|child| child.parent == group.number);
        let of_children = children.fold(0u64, |sum, child| sum.saturating_add(child.usage));
        findings.require(group.usage >= of_children, || {
            about(group, "has less than its children")
                .expected(format!("usage of {of_children} or more"))
                .found(format!("usage = {}", group.usage))
        });
    }
}

fn named_groups_exist(context: &Context<'_>, findings: &mut Findings) {
    let groups = &context.snapshot.groups;
    let exists = |number: u64| number == 0 || groups.group(number).is_some();
    for group in &groups.groups {
        let parent = group.parent;
        findings.require(exists(parent) && parent < group.number, || {
            about(group, "is part of one that cannot be above it")
                .expected("an older group, or 0")
                .found(format!("group {parent}"))
        });
    }
    for (folio, group) in charged(context) {
        findings.require(exists(group), || {
            let frame = folio.frame;
            nowhere(&format!("frame {frame:#x} is charged to"), group).frame(frame)
        });
    }
    for (slot, group) in charged_slots(context) {
        findings.require(exists(group), || {
            nowhere(&format!("swap slot {slot:#x} is charged to"), group)
        });
    }
    for mm in &context.snapshot.mms {
        findings.require(exists(mm.group), || {
            nowhere(&format!("the process of mm {} is in", mm.id), mm.group).mm(mm.id)
        });
    }
}

fn limits_kept(context: &Context<'_>, findings: &mut Findings) {
    for group in &context.snapshot.groups.groups {
        let most = group.max.min(group.watermark);
        findings.require(group.usage <= most, || {
            let GroupView { max, watermark, .. } = group;
            about(group, "has more than it may")
                .expected(format!("at most max = {max} and watermark = {watermark}"))
                .found(format!("usage = {}", group.usage))
        });
    }
}

fn nothing_else_charged(context: &Context<'_>, findings: &mut Findings) {
    for (folio, group) in charged(context) {
        findings.require(stat_of(folio).is_some(), || {
            Finding::new(format!(
                "frame {:#x} is charged and must not be",
                folio.frame
            ))
            .expected("user memory or a page-table page, or no group")
            .found(format!("{} of group {group}", folio.kind_name()))
            .frame(folio.frame)
        });
    }
    let slots = context.snapshot.swap.slots.as_deref().unwrap_or(&[]);
    for (slot, group) in charged_slots(context) {
        let in_use = slots
            .get(slot as usize)
            .is_some_and(|slot| slot.count != 0 || slot.folio != 0);
        findings.require(in_use, || {
            Finding::new(format!("swap slot {slot:#x} is free and charged"))
                .expected("no group")
                .found(format!("group {group}"))
        });
    }
}

fn about(group: &GroupView, what: &str) -> Finding {
    Finding::new(format!("memory group {} {what}", group.number))
}

fn nowhere(what: &str, group: u64) -> Finding {
    Finding::new(format!("{what} a memory group that there is not"))
        .expected("a group that was created, or 0")
        .found(format!("group {group}"))
}
