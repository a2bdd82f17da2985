//! P-30 and on, R-30: folios of 2 MiB, the entries that map one whole, and the tables set aside beside these.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::Ordering::Relaxed;

use abi::layout::{HUGE_ORDER, PAGE_SHIFT};
use abi::objects::{FrameKind, folio_state};
use abi::pte::{Pte, level_size};

use super::context::Space;
use super::in_flight::family_lock;
use super::pagetable::at_leaf;
use super::{Applies, Busy, Context, Family, Finding, Findings, InFlight, Invariant};
use crate::inspect::FolioView;
use crate::inspect::walk::Leaf;

const LINUX_HUGE: &str = "Linux mm/huge_memory.c";

pub(super) const INVARIANTS: &[Invariant] = &[
    Invariant {
        id: "P-30",
        family: Family::PageTables,
        predicate: "a user entry of 2 MiB maps the whole of one anonymous folio of 2 MiB",
        applies: Applies::Always,
        source: LINUX_HUGE,
        run: maps_a_whole_folio,
    },
    Invariant {
        id: "P-31",
        family: Family::PageTables,
        predicate: "beside the entries of 2 MiB in a table as many empty tables of level 1 are set aside",
        applies: Applies::UnlockedTables,
        source: "Linux mm/pgtable-generic.c, pgtable_trans_huge_deposit",
        run: tables_are_set_aside,
    },
    Invariant {
        id: "P-32",
        family: Family::PageTables,
        predicate: "mm.huge is the number of entries of 2 MiB that the walk finds",
        applies: Applies::UnlockedTables,
        source: "abi::objects::Mm::huge",
        run: huge_is_right,
    },
    Invariant {
        id: "P-33",
        family: Family::PageTables,
        predicate: "no entry of 2 MiB is left half split: with its size, but not present",
        applies: Applies::UnlockedTables,
        source: "Linux mm/huge_memory.c, __split_huge_pmd_locked; abi::pte::Pte::is_huge",
        run: none_is_half_split,
    },
    Invariant {
        id: "R-30",
        family: Family::Rmap,
        predicate: "a folio of 2 MiB counts the entries of level 2 that map it",
        applies: Applies::UnlockedTables,
        source: "Linux mm/rmap.c, folio_entire_mapcount",
        run: entire_mapcount_is_right,
    },
    Invariant {
        id: "R-31",
        family: Family::Rmap,
        predicate: "the split queue holds every folio of 2 MiB that has mappings, none of them whole, and fewer than pages; and none that is mapped whole or not at all",
        applies: Applies::QuiescentKernel,
        source: "Linux mm/huge_memory.c, deferred_split_folio",
        run: parts_are_queued,
    },
];

/// The entries of 2 MiB of all spaces.
fn huge_leaves<'c, 'a>(
    context: &'c Context<'a>,
) -> impl Iterator<Item = (&'c Space<'a>, Leaf)> + use<'c, 'a> {
    context.spaces.iter().flat_map(|space| {
        let leaves = space.user.leaves.iter().filter(|leaf| leaf.level > 1);
        leaves.map(move |leaf| (space, leaf))
    })
}

fn maps_a_whole_folio(context: &Context<'_>, findings: &mut Findings) {
    for (space, leaf) in huge_leaves(context) {
        let folio = context.snapshot.folio(leaf.target());
        let right = leaf.level == 2
            && folio.is_some_and(|folio| folio.is(FrameKind::Anon) && folio.order == HUGE_ORDER);
        // A free one is P-04's.
        let free = folio.is_some_and(FolioView::is_free);
        findings.require(right || free, || {
            let found = folio.map_or("no frame".into(), |folio| {
                format!("{} of order {}", folio.kind_name(), folio.order)
            });
            at_leaf(
                context,
                space,
                leaf,
                "an entry of 2 MiB maps something else",
            )
            .expected("the head of an anonymous folio of order 9")
            .found(found)
        });
    }
}

/// The tables set aside in the table of level 2 at `upper`; and how the list breaks off, if it does.
pub(super) fn set_aside(context: &Context<'_>, upper: u64) -> (Vec<u64>, Option<String>) {
    let mut tables = Vec::new();
    let mut seen = HashSet::new();
    let mut next = context.snapshot.folio(upper).map_or(0, |folio| folio.prev);
    while next != 0 {
        let gpa = next << PAGE_SHIFT;
        let Some(folio) = context.snapshot.folio(gpa) else {
            return (tables, Some(format!("leads to frame {next:#x}")));
        };
        if !seen.insert(next) {
            return (tables, Some(format!("comes back to frame {next:#x}")));
        }
        tables.push(gpa);
        next = folio.next;
    }
    (tables, None)
}

/// Every table that is set aside in the tables of `space`.
pub(super) fn all_set_aside(context: &Context<'_>, space: &Space<'_>) -> Vec<u64> {
    let upper = space.user.tables.iter().filter(|table| table.level == 2);
    upper
        .flat_map(|table| set_aside(context, table.gpa).0)
        .collect()
}

fn tables_are_set_aside(context: &Context<'_>, findings: &mut Findings) {
    for space in context.spaces_without(InFlight::tables, findings) {
        let mut entries = BTreeMap::<u64, usize>::new();
        for leaf in space.user.leaves.iter().filter(|leaf| leaf.level == 2) {
            *entries.entry(leaf.table_gpa).or_default() += 1;
        }
        for upper in space.user.tables.iter().filter(|table| table.level == 2) {
            let wanted = entries.get(&upper.gpa).copied().unwrap_or(0);
            let (tables, broken) = set_aside(context, upper.gpa);
            let about = |found: String| {
                Finding::new("the tables set aside for splits are wrong")
                    .expected(format!(
                        "{wanted}, as many as entries of 2 MiB, each empty, of this mm and level 1"
                    ))
                    .found(found)
                    .mm(space.mm.id)
                    .gva(upper.gva)
                    .frame(upper.gpa >> PAGE_SHIFT)
            };
            if let Some(broken) = broken {
                findings.report(|| about(format!("a list that {broken}")));
                continue;
            }
            findings.require(tables.len() == wanted, || {
                about(format!("{} tables", tables.len()))
            });
            for gpa in tables {
                let folio = context.snapshot.folio(gpa);
                let right = folio.is_some_and(|folio| {
                    folio.is(FrameKind::Table)
                        && (folio.owner, folio.index, folio.used) == (space.mm.gpa, 1, 0)
                });
                let empty = context.mem.table(gpa).is_ok_and(|entries| {
                    let mut entries = entries.iter().map(|entry| Pte(entry.load(Relaxed)));
                    entries.all(Pte::is_none)
                });
                findings.require(right && empty, || {
                    let kind = folio.map_or("no frame".into(), |folio| {
                        format!(
                            "{}, owner {:#x}, level {}, {} entries",
                            folio.kind_name(),
                            folio.owner,
                            folio.index,
                            folio.used
                        )
                    });
                    about(format!(
                        "frame {:#x}: {kind}, empty: {empty}",
                        gpa >> PAGE_SHIFT
                    ))
                });
            }
        }
    }
}

fn huge_is_right(context: &Context<'_>, findings: &mut Findings) {
    for space in context.spaces_without(InFlight::tables, findings) {
        let walked = space.user.leaves.iter().filter(|leaf| leaf.level == 2);
        let walked = walked.count() as u64;
        findings.require(space.mm.huge == walked, || {
            Finding::new("mm.huge is wrong")
                .expected(format!("{walked}, as the walk finds"))
                .found(space.mm.huge)
                .mm(space.mm.id)
        });
    }
}

fn none_is_half_split(context: &Context<'_>, findings: &mut Findings) {
    for space in context.spaces_without(InFlight::tables, findings) {
        for table in space.user.tables.iter().filter(|table| table.level == 2) {
            let Ok(entries) = context.mem.table(table.gpa) else {
                continue;
            };
            let entries = entries.iter().map(|entry| Pte(entry.load(Relaxed)));
            for (index, entry) in entries.enumerate() {
                findings.require(!entry.is_huge() || entry.is_present(), || {
                    Finding::new("an entry of 2 MiB was made invalid for a split that nobody ends")
                        .expected("present, or another entry")
                        .found(format!("{:#018x}", entry.0))
                        .mm(space.mm.id)
                        .gva(table.gva.wrapping_add(index as u64 * level_size(2)))
                });
            }
        }
    }
}

fn entire_mapcount_is_right(context: &Context<'_>, findings: &mut Findings) {
    if let Some(busy) = context.in_flight.any_tables() {
        return findings.skip(busy);
    }
    let mut entries = BTreeMap::<u64, u64>::new();
    for (_, leaf) in huge_leaves(context) {
        *entries.entry(leaf.target() >> PAGE_SHIFT).or_default() += 1;
    }
    // That of a folio of one page is its swap slot.
    let large = context.anonymous_folios().filter(|folio| folio.order > 0);
    for folio in large {
        let walked = entries.get(&folio.frame).copied().unwrap_or(0);
        findings.require(folio.used == walked, || {
            Finding::new("a folio miscounts the entries of 2 MiB that map it")
                .expected(format!("{walked}, as the walks find"))
                .found(folio.used)
                .frame(folio.frame)
                .details(context.describe_mappings(folio.frame))
        });
    }
}

/// Why entries of `space` may lie in a table that no walk reaches: a collapse unlinks it, under the mmap_lock held for
/// writing and the lock of an anon_vma's family.
pub(super) fn collapsing(context: &Context<'_>, space: &Space<'_>) -> Option<Busy> {
    context.in_flight.unlinked_tables(space.mm.gpa)?;
    let known = &context.snapshot.anon_vmas;
    space.mm.vmas.iter().find_map(|vma| {
        let root = known.get(&vma.anon_vma)?.root;
        known.get(&root).and_then(family_lock)
    })
}

/// True where a folio of 2 MiB is mapped in parts. One that several map may have as many mappings as pages all the same: as it
/// was unmapped, it had fewer.
fn is_partly_mapped(folio: &FolioView) -> bool {
    folio.used == 0 && folio.mapcount > 0 && u64::from(folio.mapcount) < 1 << HUGE_ORDER
}

fn parts_are_queued(context: &Context<'_>, findings: &mut Findings) {
    let snapshot = context.snapshot;
    let queue = snapshot.swap.split_queue;
    let place = |head: u64| snapshot.folios.get(head as usize + 1);
    let (mut queued, mut previous, mut next) = (HashSet::new(), 0, queue.first);
    while next != 0 {
        let wrong = match (snapshot.folios.get(next as usize), place(next)) {
            (None, _) | (_, None) => Some("which does not exist"),
            _ if !queued.insert(next) => Some("which is queued already"),
            (Some(folio), _) if !folio.is(FrameKind::Anon) || folio.order != HUGE_ORDER => {
                Some("which is no folio of 2 MiB")
            }
            (Some(folio), _) if folio.used > 0 || folio.mapcount == 0 => {
                Some("which is mapped whole, or not at all")
            }
            (_, Some(place))
                if place.state & folio_state::DEFERRED == 0 || place.prev != previous =>
            {
                Some("which does not know")
            }
            _ => None,
        };
        if let Some(wrong) = wrong {
            findings.report(|| {
                Finding::new("the split queue leads to a wrong frame")
                    .expected("folios of 2 MiB that are partly mapped, each once, linked both ways")
                    .found(format!("frame {next:#x}, {wrong}"))
                    .frame(next)
            });
            return;
        }
        previous = next;
        next = place(next).map_or(0, |place| place.next);
    }
    let count = (queued.len() as u64) << HUGE_ORDER;
    findings.require((queue.last, queue.count) == (previous, count), || {
        Finding::new("the split queue is not what its head says")
            .expected(format!("last = {previous:#x}, count = {count}"))
            .found(format!("last = {:#x}, count = {}", queue.last, queue.count))
    });
    for folio in context.anonymous_folios() {
        let is_wanted = folio.order == HUGE_ORDER && is_partly_mapped(folio);
        findings.require(!is_wanted || queued.contains(&folio.frame), || {
            Finding::new(
                "a folio of 2 MiB holds pages that nobody maps, and is not queued to be split",
            )
            .expected("on the split queue")
            .found(format!("{} mappings, and on none", folio.mapcount))
            .frame(folio.frame)
        });
    }
}
