//! P: what the page tables map, and the pages that they are made of.

use std::collections::HashMap;

use abi::layout::{ENTRIES_PER_TABLE, LAPIC_GPA, PAGE_SHIFT};
use abi::objects::{FrameKind, vma_flags};
use abi::pte::{Pte, PteFlags};

use super::context::Space;
use super::render::flags_of;
use super::{Applies, Context, Family, Finding, Findings, Invariant};
use crate::inspect::walk::{AddressSpace, Leaf, Table, WalkAnomaly, WalkProblem};
use crate::inspect::{FolioView, translate};

const LINUX_WALK: &str = "Linux Documentation/mm/process_addrs.rst, page tables";

pub(super) const INVARIANTS: &[Invariant] = &[
    Invariant {
        id: "P-01",
        family: Family::PageTables,
        predicate: "every present user entry lies in an attached VMA of its mm",
        applies: Applies::QuiescentMm,
        source: LINUX_WALK,
        run: in_a_vma,
    },
    Invariant {
        id: "P-02",
        family: Family::PageTables,
        predicate: "no user entry permits what its VMA does not (W, X, or any access at CPL 3)",
        applies: Applies::QuiescentMm,
        source: "mmap(2), mprotect(2); SDM vol. 3A, 5.6",
        run: within_vma_permissions,
    },
    Invariant {
        id: "P-03",
        family: Family::PageTables,
        predicate: "a user entry maps a frame of an anonymous folio, or a free one (P-04)",
        applies: Applies::Always,
        source: "Linux mm/page_table_check.c; abi::objects::FrameKind",
        run: maps_anonymous_memory,
    },
    Invariant {
        id: "P-04",
        family: Family::PageTables,
        predicate: "a free frame is mapped by no mm",
        applies: Applies::Always,
        source: "Linux mm/page_table_check.c; SDM vol. 3A, 5.10.5",
        run: free_frames_unmapped,
    },
    Invariant {
        id: "P-05",
        family: Family::PageTables,
        predicate: "no kernel mapping is both writable and executable",
        applies: Applies::Always,
        source: "Linux arch/x86/mm/dump_pagetables.c (CONFIG_DEBUG_WX)",
        run: kernel_write_xor_execute,
    },
    Invariant {
        id: "P-06",
        family: Family::PageTables,
        predicate: "no kernel mapping can be used at CPL 3",
        applies: Applies::Always,
        source: "SDM vol. 3A, 5.6.1",
        run: kernel_not_for_users,
    },
    Invariant {
        id: "P-07",
        family: Family::PageTables,
        predicate: "the kernel half of every mm's level-4 table equals the kernel's",
        applies: Applies::QuiescentMm,
        source: "Linux arch/x86/mm/pgtable.c, pgd_ctor",
        run: same_kernel_half,
    },
    Invariant {
        id: "P-08",
        family: Family::PageTables,
        predicate: "a page-table page is referenced at most once",
        applies: Applies::Always,
        source: "Linux mm/memory.c, pmd_install",
        run: referenced_once,
    },
    Invariant {
        id: "P-09",
        family: Family::PageTables,
        predicate: "a table that a walk enters is a page-table page of that mm and level",
        applies: Applies::Always,
        source: "abi::objects::FrameKind::Table",
        run: tables_are_tables,
    },
    Invariant {
        id: "P-10",
        family: Family::PageTables,
        predicate: "every page-table page of an mm is reached by its walk",
        applies: Applies::QuiescentMm,
        source: "Linux mm/memory.c, free_pgtables",
        run: no_lost_tables,
    },
    Invariant {
        id: "P-11",
        family: Family::PageTables,
        predicate: "a table's count of present entries is right",
        applies: Applies::QuiescentMm,
        source: "abi::objects::Folio::used",
        run: used_is_right,
    },
    Invariant {
        id: "P-12",
        family: Family::PageTables,
        predicate: "mm.tables is the number of page-table pages that the walk finds",
        applies: Applies::QuiescentMm,
        source: "Linux mm_pgtables_bytes; abi::objects::Mm::tables",
        run: tables_counted,
    },
    Invariant {
        id: "P-13",
        family: Family::PageTables,
        predicate: "mm.rss is the number of present user entries that the walk finds",
        applies: Applies::QuiescentMm,
        source: "Linux kernel/fork.c, check_mm; abi::objects::Mm::rss",
        run: rss_is_right,
    },
    Invariant {
        id: "P-14",
        family: Family::PageTables,
        predicate: "no present entry has a reserved bit set or leads to a table outside memory",
        applies: Applies::Always,
        source: "SDM vol. 3A, 5.5 and 5.7",
        run: entries_well_formed,
    },
    Invariant {
        id: "P-15",
        family: Family::PageTables,
        predicate: "a kernel mapping maps guest memory or the local APIC's page",
        applies: Applies::Always,
        source: "abi::layout",
        run: kernel_maps_memory,
    },
];

fn in_a_vma(context: &Context<'_>, findings: &mut Findings) {
    for space in context.quiet_spaces(findings) {
        for leaf in &space.user.leaves {
            findings.require(space.vma_at(leaf.gva).is_some(), || {
                let mapped = &format!("{} maps {:#x}", flags_of(leaf.entry, 1), leaf.target());
                at_leaf(context, space, leaf, "a present entry outside every VMA")
                    .expected("no present entry, or an attached VMA around it")
                    .found(mapped)
                    .details(neighbours(space, leaf.gva))
            });
        }
    }
}

fn within_vma_permissions(context: &Context<'_>, findings: &mut Findings) {
    for space in context.quiet_spaces(findings) {
        for leaf in &space.user.leaves {
            // Without a VMA it is P-01's.
            let Some(vma) = space.vma_at(leaf.gva) else {
                continue;
            };
            let rights = leaf.rights();
            let excess = if rights.user && !vma.is_accessible() {
                Some("access at CPL 3")
            } else if rights.write && !vma.has(vma_flags::WRITE) {
                Some("writes")
            } else if rights.user && rights.execute && !vma.has(vma_flags::EXEC) {
                Some("execution")
            } else {
                None
            };
            findings.require(excess.is_none(), || {
                let excess = excess.unwrap_or_default();
                let summary = format!("an entry permits {excess}, its VMA does not");
                at_leaf(context, space, leaf, summary)
                    .expected(format!("no {excess}: the VMA is {}", vma.label()))
                    .found(flags_of(leaf.entry, leaf.level))
                    .object("Vma", vma.gpa)
            });
        }
    }
}

fn maps_anonymous_memory(context: &Context<'_>, findings: &mut Findings) {
    for (space, leaf) in user_leaves(context) {
        let folio = context.folio_of(leaf);
        let right = folio.is_some_and(|folio| folio.is(FrameKind::Anon) || folio.is_free());
        findings.require(right, || {
            let kind = folio.map_or("no frame: outside memory".into(), |folio| {
                format!("{} (owner {:#x})", folio.kind_name(), folio.owner)
            });
            at_leaf(
                context,
                space,
                leaf,
                "a user entry maps what is not user memory",
            )
            .expected("an anonymous folio")
            .found(kind)
        });
    }
}

fn free_frames_unmapped(context: &Context<'_>, findings: &mut Findings) {
    for (space, leaf) in user_leaves(context) {
        // A tail of a free block is as free as its head, so every frame's head is asked.
        let frame = leaf.target() >> PAGE_SHIFT;
        let head = free_head(context, frame);
        findings.require(head.is_none(), || {
            let head = head.unwrap_or(frame);
            let folio = &context.snapshot.folios[head as usize];
            at_leaf(context, space, leaf, "a user entry maps a free frame")
                .expected("no present entry for a frame that the allocator owns")
                .found(format!("{} (order {})", folio.kind_name(), folio.order))
                .detail(format!(
                    "frame {frame:#x} has been allocated {} times; poison or foreign data shows here",
                    folio.generation
                ))
        });
    }
}

/// The head of the free block that `frame` lies in.
fn free_head(context: &Context<'_>, frame: u64) -> Option<u64> {
    let folios = &context.snapshot.folios;
    (0..abi::objects::ORDERS as u32)
        .map(|order| (order, frame >> order << order))
        .find(|&(order, head)| {
            folios.get(head as usize).is_some_and(|folio| {
                folio.is_free() && frame < head + folio.frames() && u32::from(folio.order) >= order
            })
        })
        .map(|(_, head)| head)
}

fn kernel_write_xor_execute(context: &Context<'_>, findings: &mut Findings) {
    for leaf in &context.kernel.leaves {
        let rights = leaf.rights();
        findings.require(!(rights.write && rights.execute), || {
            in_kernel(context, leaf, "a kernel mapping is writable and executable")
                .expected("W clear or NX set at some level")
                .found(flags_of(leaf.entry, leaf.level))
        });
    }
}

fn kernel_not_for_users(context: &Context<'_>, findings: &mut Findings) {
    for leaf in &context.kernel.leaves {
        findings.require(!leaf.rights().user, || {
            in_kernel(context, leaf, "a kernel mapping is open to CPL 3")
                .expected("U clear at some level")
                .found(flags_of(leaf.entry, leaf.level))
        });
    }
}

fn same_kernel_half(context: &Context<'_>, findings: &mut Findings) {
    let kernel_pgd = context.snapshot.root.pgd;
    // A is set by the CPU in whichever copy it walks.
    let entry = |table: u64, slot: usize| {
        let entries = context.mem.table(table).ok()?;
        let entry = Pte(entries[slot].load(std::sync::atomic::Ordering::Relaxed));
        Some(entry.without(PteFlags::ACCESSED))
    };
    for space in context.quiet_spaces(findings) {
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

fn referenced_once(context: &Context<'_>, findings: &mut Findings) {
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

fn tables_are_tables(context: &Context<'_>, findings: &mut Findings) {
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

fn no_lost_tables(context: &Context<'_>, findings: &mut Findings) {
    let mut reached = std::collections::HashSet::new();
    for space in context.quiet_spaces(findings) {
        reached.extend(space.user.tables.iter().map(|table| table.gpa));
    }
    let tables = context
        .snapshot
        .folios
        .iter()
        .filter(|folio| folio.is(FrameKind::Table));
    for folio in tables {
        let owner = context.snapshot.mm_at(folio.owner);
        // A table of an mm that is gone is nobody's to finish, unless that is just happening.
        let busy = context.in_flight.mm(folio.owner);
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

fn used_is_right(context: &Context<'_>, findings: &mut Findings) {
    for space in context.quiet_spaces(findings) {
        for table in &space.user.tables {
            let (Some(folio), Ok(entries)) = (
                context.snapshot.folio(table.gpa),
                context.mem.table(table.gpa),
            ) else {
                continue;
            };
            let present = |entry: &&std::sync::atomic::AtomicU64| {
                Pte(entry.load(std::sync::atomic::Ordering::Relaxed)).is_present()
            };
            let used = entries.iter().filter(present).count() as u64;
            findings.require(folio.used == used, || {
                Finding::new("a page-table page miscounts its entries")
                    .expected(format!("used = {used}, the present entries"))
                    .found(format!("used = {}", folio.used))
                    .mm(space.mm.id)
                    .gva(table.gva)
                    .frame(folio.frame)
            });
        }
    }
}

fn tables_counted(context: &Context<'_>, findings: &mut Findings) {
    for space in context.quiet_spaces(findings) {
        counted(
            findings,
            space,
            "tables",
            space.mm.tables,
            space.user.tables.len(),
        );
    }
}

fn rss_is_right(context: &Context<'_>, findings: &mut Findings) {
    for space in context.quiet_spaces(findings) {
        counted(
            findings,
            space,
            "rss",
            space.mm.rss,
            space.user.leaves.len(),
        );
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

fn entries_well_formed(context: &Context<'_>, findings: &mut Findings) {
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

fn kernel_maps_memory(context: &Context<'_>, findings: &mut Findings) {
    for leaf in &context.kernel.leaves {
        let end = leaf.target().saturating_add(leaf.bytes());
        let right = end <= context.mem.bytes() || (leaf.target() == LAPIC_GPA && leaf.level == 1);
        findings.require(right, || {
            in_kernel(context, leaf, "a kernel mapping leads outside guest memory")
                .expected(format!("an address below {:#x}", context.mem.bytes()))
                .found(format!("{:#x}..{end:#x}", leaf.target()))
        });
    }
}

fn user_leaves<'c, 'a>(
    context: &'c Context<'a>,
) -> impl Iterator<Item = (&'c Space<'a>, &'c Leaf)> {
    let spaces = context.spaces.iter();
    spaces.flat_map(|space| space.user.leaves.iter().map(move |leaf| (space, leaf)))
}

/// A finding about `leaf` of `space`, with its walk.
pub(super) fn at_leaf(
    context: &Context<'_>,
    space: &Space<'_>,
    leaf: &Leaf,
    summary: impl Into<String>,
) -> Finding {
    Finding::new(summary)
        .mm(space.mm.id)
        .gva(leaf.gva)
        .frame(leaf.target() >> PAGE_SHIFT)
        .walk(translate(context.mem, space.mm.pgd, leaf.gva))
}

fn in_kernel(context: &Context<'_>, leaf: &Leaf, summary: &str) -> Finding {
    Finding::new(summary).gva(leaf.gva).walk(translate(
        context.mem,
        context.snapshot.root.pgd,
        leaf.gva,
    ))
}

/// The VMAs before and after `gva`.
fn neighbours(space: &Space<'_>, gva: u64) -> Vec<String> {
    let vmas = space.vmas_by_start();
    let after = vmas.partition_point(|vma| vma.start <= gva);
    let before = after.checked_sub(1).and_then(|i| vmas.get(i));
    let mut lines = Vec::new();
    lines.extend(before.map(|vma| format!("VMA before: {}", vma.label())));
    lines.extend(
        vmas.get(after)
            .map(|vma| format!("VMA after:  {}", vma.label())),
    );
    lines
}
