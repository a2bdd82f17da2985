//! P-07 to P-14: the pages that page tables are made of. Their rows are in [`super::pagetable`].

use std::collections::{HashMap, HashSet};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use abi::layout::{ENTRIES_PER_TABLE, PAGE_SHIFT};
use abi::objects::FrameKind;
use abi::pte::{Pte, PteFlags};

use super::context::Space;
use super::{Context, Finding, Findings, InFlight, huge};
use crate::inspect::FolioView;
use crate::inspect::walk::{AddressSpace, Leaf, Table, WalkAnomaly, WalkProblem};

pub(super) fn same_kernel_half(context: &Context<'_>, findings: &mut Findings) {
    let kernel_pgd = context.snapshot.root.pgd;
    // A is set by the CPU in whichever copy it walks.
    let entry = |table: u64, slot: usize| {
        let entries = context.mem.table(table).ok()?;
        let entry = Pte(entries[slot].load(Relaxed));
        Some(entry.without(PteFlags::ACCESSED))
    };
    for space in &context.spaces {
        for slot in ENTRIES_PER_TABLE / 2..ENTRIES_PER_TABLE {
            let (own, kernel) = (entry(space.mm.pgd, slot), entry(kernel_pgd, slot));
            findings.require(own == kernel, || {
                let show = |entry: Option<Pte>| {
                    entry.map_or("unreadable".into(), |entry| format!("{:#018x}", entry.0))
                };
                Finding::new(format!(
                    "entry {slot} of the level-4 table is not the kernel's"
                ))
                .expected(show(kernel))
                .found(show(own))
                .mm(space.mm.id)
                .frame(space.mm.pgd >> PAGE_SHIFT)
            });
        }
    }
}

/// Every table that any walk enters, with the name of whose it is; the kernel's first.
fn all_tables<'c>(context: &'c Context<'_>) -> impl Iterator<Item = (Option<u64>, &'c Table)> {
    let kernel = context.kernel.tables.iter().map(|table| (None, table));
    let users = context.spaces.iter().flat_map(|space| {
        let tables = space.user.tables.iter();
        tables.map(|table| (Some(space.mm.id), table))
    });
    kernel.chain(users)
}

pub(super) fn referenced_once(context: &Context<'_>, findings: &mut Findings) {
    let mut referenced_by: HashMap<u64, (Option<u64>, &Table)> = HashMap::new();
    for (mm, table) in all_tables(context) {
        let first = *referenced_by.entry(table.gpa).or_insert((mm, table));
        let once = std::ptr::eq(first.1, table);
        findings.require(once, || {
            twice(
                table.gpa,
                (first.0, first.1.parent_entry),
                (mm, table.parent_entry),
                table.gva,
            )
        });
    }
    // Within one walk the second reference is what the walker refused to follow.
    for (mm, space) in named_spaces(context) {
        let again = |anomaly: &&WalkAnomaly| anomaly.problem == WalkProblem::TableTwice;
        for anomaly in space.anomalies.iter().filter(again) {
            let gpa = anomaly.entry.address();
            let first = referenced_by
                .get(&gpa)
                .map_or((None, 0), |(mm, table)| (*mm, table.parent_entry));
            findings.report(|| twice(gpa, first, (mm, anomaly.entry_gpa), anomaly.gva));
        }
    }
}

fn twice(table: u64, first: (Option<u64>, u64), second: (Option<u64>, u64), gva: u64) -> Finding {
    let name = |(mm, entry): (Option<u64>, u64)| {
        let who = mm.map_or("the kernel".into(), |mm| format!("mm {mm}"));
        match entry {
            0 => format!("{who}'s root"),
            entry => format!("{who}'s entry at {entry:#x}"),
        }
    };
    let finding = Finding::new("a page-table page is referenced twice")
        .expected(format!("only {}", name(first)))
        .found(format!("also {}", name(second)))
        .frame(table >> PAGE_SHIFT)
        .gva(gva);
    second.0.into_iter().fold(finding, Finding::mm)
}

/// The kernel's half, then every mm's.
fn named_spaces<'c>(
    context: &'c Context<'_>,
) -> impl Iterator<Item = (Option<u64>, &'c AddressSpace)> {
    let users = context
        .spaces
        .iter()
        .map(|space| (Some(space.mm.id), &space.user));
    std::iter::once((None, &context.kernel)).chain(users)
}

pub(super) fn tables_are_tables(context: &Context<'_>, findings: &mut Findings) {
    for space in &context.spaces {
        for table in &space.user.tables {
            let folio = context.snapshot.folio(table.gpa);
            let right = folio.is_some_and(|folio| {
                folio.is(FrameKind::Table)
                    && folio.owner == space.mm.gpa
                    && folio.index == u64::from(table.level)
            });
            findings.require(right, || {
                let found = folio.map_or("no descriptor".into(), |folio| {
                    format!(
                        "{}, owner {:#x}, level {}",
                        folio.kind_name(),
                        folio.owner,
                        folio.index
                    )
                });
                Finding::new("a walk goes through a frame that is not such a table")
                    .expected(format!(
                        "Table, owner {:#x}, level {}",
                        space.mm.gpa, table.level
                    ))
                    .found(found)
                    .mm(space.mm.id)
                    .gva(table.gva)
                    .frame(table.gpa >> PAGE_SHIFT)
            });
        }
    }
    for table in &context.kernel.tables {
        let free = context
            .snapshot
            .folio(table.gpa)
            .filter(|folio| folio.is_free());
        findings.require(free.is_none(), || {
            Finding::new("one of the kernel's own tables is a free frame")
                .expected("a frame that is not the allocator's")
                .found(free.map_or(String::new(), FolioView::kind_name))
                .gva(table.gva)
                .frame(table.gpa >> PAGE_SHIFT)
        });
    }
}

pub(super) fn no_lost_tables(context: &Context<'_>, findings: &mut Findings) {
    let mut reached = HashSet::new();
    for space in context.spaces_without(InFlight::unlinked_tables, findings) {
        reached.extend(space.user.tables.iter().map(|table| table.gpa));
        reached.extend(huge::all_set_aside(context, space));
    }
    let tables = context
        .snapshot
        .folios
        .iter()
        .filter(|folio| folio.is(FrameKind::Table));
    for folio in tables {
        let owner = context.snapshot.mm_at(folio.owner);
        // A table of an mm that is gone is nobody's to finish, unless that is just happening.
        let busy = context.in_flight.unlinked_tables(folio.owner);
        let busy = busy.or(context.in_flight.kernel().filter(|_| owner.is_none()));
        if let Some(busy) = busy {
            findings.skip(busy);
            continue;
        }
        findings.require(reached.contains(&folio.gpa()), || {
            Finding::new("a page-table page that no walk reaches")
                .expected("one reference from a table of its mm, or a free frame")
                .found(format!(
                    "level {}, owner {}, no reference",
                    folio.index,
                    context.snapshot.mm_name(folio.owner)
                ))
                .frame(folio.frame)
        });
    }
}

pub(super) fn used_is_right(context: &Context<'_>, findings: &mut Findings) {
    for space in context.spaces_without(InFlight::tables, findings) {
        for table in &space.user.tables {
            let (Some(folio), Ok(entries)) = (
                context.snapshot.folio(table.gpa),
                context.mem.table(table.gpa),
            ) else {
                continue;
            };
            let some = |entry: &&AtomicU64| !Pte(entry.load(Relaxed)).is_none();
            let used = entries.iter().filter(some).count() as u64;
            findings.require(folio.used == used, || {
                Finding::new("a page-table page miscounts its entries")
                    .expected(format!("used = {used}, the entries that are not none"))
                    .found(format!("used = {}", folio.used))
                    .mm(space.mm.id)
                    .gva(table.gva)
                    .frame(folio.frame)
            });
        }
    }
}

pub(super) fn tables_counted(context: &Context<'_>, findings: &mut Findings) {
    for space in context.spaces_without(InFlight::tables, findings) {
        counted(
            findings,
            space,
            "tables",
            space.mm.tables,
            space.user.tables.len() + huge::all_set_aside(context, space).len(),
        );
    }
}

pub(super) fn rss_is_right(context: &Context<'_>, findings: &mut Findings) {
    for space in context.spaces_without(InFlight::tables, findings) {
        let on_their_way = |leaf: &&Leaf| leaf.level == 1 && leaf.entry.is_resident();
        let absent = space.user.absent.iter().filter(on_their_way).count();
        let pages = space
            .user
            .leaves
            .iter()
            .map(|leaf| leaf.bytes() >> PAGE_SHIFT);
        let resident = pages.sum::<u64>() as usize + absent;
        if space.mm.rss != resident as u64
            && let Some(busy) = huge::collapsing(context, space)
        {
            findings.skip(&busy);
            continue;
        }
        counted(findings, space, "rss", space.mm.rss, resident);
    }
}

fn counted(findings: &mut Findings, space: &Space<'_>, field: &str, says: u64, walked: usize) {
    findings.require(says == walked as u64, || {
        Finding::new(format!("mm.{field} is wrong"))
            .expected(format!("{walked}, as the walk finds"))
            .found(says)
            .mm(space.mm.id)
    });
}

pub(super) fn entries_well_formed(context: &Context<'_>, findings: &mut Findings) {
    for (mm, space) in named_spaces(context) {
        // The tables were all read; each is one object.
        findings.examined += space.tables.len() as u64;
        // A second reference to a table is P-08's.
        let wrong = |anomaly: &&WalkAnomaly| anomaly.problem != WalkProblem::TableTwice;
        for anomaly in space.anomalies.iter().filter(wrong) {
            findings.report(|| {
                let finding = Finding::new(format!("an entry {}", anomaly.problem.describe()))
                    .expected("an entry that a CPU can follow")
                    .found(format!(
                        "{:#018x} at {:#x} (level {})",
                        anomaly.entry.0, anomaly.entry_gpa, anomaly.level
                    ))
                    .gva(anomaly.gva);
                mm.into_iter().fold(finding, Finding::mm)
            });
        }
    }
}
