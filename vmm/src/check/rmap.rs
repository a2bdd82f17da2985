//! R: folios, who maps them, and the way back from a folio to its mappings.

use std::collections::{BTreeMap, HashSet};

use abi::layout::{HUGE_ORDER, PAGE_SHIFT};
use abi::objects::{FrameKind, Task};
use abi::pte::PteFlags;

use super::in_flight::family_lock;
use super::pagetable::at_leaf;
use super::render::flags_of;
use super::{Applies, Context, Family, Finding, Findings, Invariant};
use crate::inspect::FolioView;

const LINUX_RMAP: &str = "Linux mm/rmap.c; include/linux/rmap.h, struct anon_vma";

pub(super) const INVARIANTS: &[Invariant] = &[
    Invariant {
        id: "R-01",
        family: Family::Rmap,
        predicate: "a folio's mapcount is the number of present entries that map it",
        applies: Applies::UnlockedTables,
        source: "Linux include/linux/mm.h, folio_mapcount",
        run: mapcount_is_right,
    },
    Invariant {
        id: "R-02",
        family: Family::Rmap,
        predicate: "a block's refcount is 0 if and only if it is free",
        applies: Applies::AllAtPoints,
        source: "abi::objects::Folio::refcount; Linux mm/page_alloc.c, check_new_page",
        run: refcount_zero_iff_free,
    },
    Invariant {
        id: "R-03",
        family: Family::Rmap,
        predicate: "a folio's refcount is at least its mapcount",
        applies: Applies::Always,
        source: "Linux mm/migrate.c, folio_expected_refs",
        run: refcount_covers_mapcount,
    },
    Invariant {
        id: "R-04",
        family: Family::Rmap,
        predicate: "no anonymous folio is left that nothing maps and no swap slot has cached",
        applies: Applies::QuiescentKernel,
        source: "Linux mm/rmap.c, folio_remove_rmap_ptes",
        run: no_leaked_folios,
    },
    Invariant {
        id: "R-05",
        family: Family::Rmap,
        predicate: "a mapped folio has a live anon_vma",
        applies: Applies::UnwrittenVmas,
        source: "Linux mm/rmap.c, folio_get_anon_vma",
        run: anon_vma_is_live,
    },
    Invariant {
        id: "R-06",
        family: Family::Rmap,
        predicate: "for every present user entry, the folio's anon_vma has a chain to the VMA",
        applies: Applies::UnwrittenVmas,
        source: "Linux mm/rmap.c, rmap_walk_anon",
        run: chain_leads_to_vma,
    },
    Invariant {
        id: "R-07",
        family: Family::Rmap,
        predicate: "a folio's index is the page offset at which each VMA maps it",
        applies: Applies::UnwrittenVmas,
        source: "Linux mm/rmap.c, __page_check_anon_rmap",
        run: index_is_right,
    },
    Invariant {
        id: "R-08",
        family: Family::Rmap,
        predicate: "a writable private entry maps an exclusive folio with mapcount 1",
        applies: Applies::UnlockedTables,
        source: "Linux include/linux/page-flags.h, PG_anon_exclusive",
        run: writable_is_exclusive,
    },
    Invariant {
        id: "R-09",
        family: Family::Rmap,
        predicate: "an exclusive folio is mapped at most once",
        applies: Applies::Always,
        source: "Linux mm/rmap.c, __folio_try_dup_anon_rmap",
        run: exclusive_is_single,
    },
    Invariant {
        id: "R-10",
        family: Family::Rmap,
        predicate: "no entry is both writable and marked copy-on-write",
        applies: Applies::Always,
        source: "abi::pte::PteFlags::COW",
        run: cow_is_readonly,
    },
    Invariant {
        id: "R-11",
        family: Family::Rmap,
        predicate: "a VMA's chains and its anon_vmas' chains are the same, linked both ways",
        applies: Applies::QuiescentKernel,
        source: LINUX_RMAP,
        run: chains_agree,
    },
    Invariant {
        id: "R-12",
        family: Family::Rmap,
        predicate: "an anon_vma's refcount is its VMAs, chains, children and own root link",
        applies: Applies::QuiescentKernel,
        source: "abi::objects::AnonVma::refcount",
        run: anon_vma_refcount,
    },
    Invariant {
        id: "R-13",
        family: Family::Rmap,
        predicate: "an anon_vma's degree is its children and the VMAs whose anon_vma it is",
        applies: Applies::QuiescentKernel,
        source: "Linux include/linux/rmap.h, num_children",
        run: anon_vma_degree,
    },
    Invariant {
        id: "R-14",
        family: Family::Rmap,
        predicate: "an anon_vma's root is its ancestor without a parent",
        applies: Applies::QuiescentKernel,
        source: LINUX_RMAP,
        run: root_is_oldest,
    },
    Invariant {
        id: "R-15",
        family: Family::Rmap,
        predicate: "an anon_vma is active as often as it is the anon_vma of a VMA",
        applies: Applies::QuiescentKernel,
        source: "Linux include/linux/rmap.h, num_active_vmas (2555283eb40d)",
        run: anon_vma_active,
    },
    Invariant {
        id: "R-20",
        family: Family::Rmap,
        predicate: "a folio has a reference for each pin and each mapping",
        applies: Applies::AllAtPoints,
        source: "Linux mm/gup.c, try_grab_folio; abi::objects::Folio::pins",
        run: pins_have_references,
    },
    Invariant {
        id: "R-21",
        family: Family::Rmap,
        predicate: "a pinned folio that is mapped is exclusive",
        applies: Applies::AllAtPoints,
        source: "Linux include/linux/page-flags.h, PG_anon_exclusive; mm/gup.c, gup_must_unshare",
        run: pinned_is_exclusive,
    },
    Invariant {
        id: "R-22",
        family: Family::Rmap,
        predicate: "a folio is pinned only while a task waits for the disk",
        applies: Applies::QuiescentKernel,
        source: "Linux Documentation/core-api/pin_user_pages.rst, unpin_user_pages",
        run: pins_have_users,
    },
];

/// An entry and the count of its folio change under one page-table lock, one after the other: whoever
/// holds such a lock may have done half of it, once; who splits an entry of 2 MiB counts 512 small ones before a walk finds
/// them. Two of them may work on one folio.
fn mapcount_is_right(context: &Context<'_>, findings: &mut Findings) {
    let small = 1 << HUGE_ORDER;
    let off = |folio: &FolioView| {
        let walked = context.folio_mappings(folio.frame);
        if folio.order == HUGE_ORDER && folio.mapcount.checked_sub(walked) == Some(small) {
            1
        } else {
            folio.mapcount.abs_diff(walked)
        }
    };
    let excused = context.in_flight.any_tables().filter(|_| {
        let halfway: u64 = context.counted_folios().map(|f| u64::from(off(f))).sum();
        halfway <= context.in_flight.table_lock_holders() as u64
    });
    for folio in context.counted_folios() {
        if let Some(busy) = excused
            && off(folio) != 0
        {
            findings.skip(busy);
            continue;
        }
        let walked = context.folio_mappings(folio.frame);
        // A collapse has unlinked the table that maps it (`huge::collapsing`).
        let known = &context.snapshot.anon_vmas;
        let family = known
            .get(&folio.owner)
            .and_then(|anon| known.get(&anon.root));
        if folio.mapcount != walked
            && let Some(busy) = family.and_then(family_lock)
        {
            findings.skip(&busy);
            continue;
        }
        findings.require(folio.mapcount == walked, || {
            about(folio, "a folio's mapcount is wrong")
                .expected(format!(
                    "mapcount = {walked}, the entries that the walks find"
                ))
                .found(format!("mapcount = {}", folio.mapcount))
                .details(context.describe_mappings(folio.frame))
        });
    }
}

fn refcount_zero_iff_free(context: &Context<'_>, findings: &mut Findings) {
    let heads = context.snapshot.folios.iter().filter(|folio| {
        // Kernel frames are never handed back, so nobody counts them.
        !folio.is(FrameKind::Tail) && !folio.is(FrameKind::Kernel)
    });
    for folio in heads {
        findings.require((folio.refcount == 0) == folio.is_free(), || {
            about(folio, "a block's refcount contradicts its kind")
                .expected(if folio.is_free() {
                    "refcount = 0"
                } else {
                    "refcount > 0"
                })
                .found(format!(
                    "{}, refcount = {}",
                    folio.kind_name(),
                    folio.refcount
                ))
        });
    }
}

fn refcount_covers_mapcount(context: &Context<'_>, findings: &mut Findings) {
    for folio in context.counted_folios() {
        findings.require(folio.refcount >= folio.mapcount, || {
            about(folio, "a folio has fewer references than mappings")
                .expected(format!("refcount >= {}, its mapcount", folio.mapcount))
                .found(format!("refcount = {}", folio.refcount))
                .details(context.describe_mappings(folio.frame))
        });
    }
}

fn no_leaked_folios(context: &Context<'_>, findings: &mut Findings) {
    for folio in context.anonymous_folios() {
        findings.require(
            folio.mapcount != 0
                || folio.pins != 0
                || folio.swap_slot().is_some()
                || context.folio_mappings(folio.frame) != 0,
            || {
                about(folio, "an anonymous folio that nothing maps: a leak")
                    .expected("mapcount > 0, or a free frame")
                    .found(format!("mapcount = 0, refcount = {}", folio.refcount))
            },
        );
    }
}

fn pins_have_references(context: &Context<'_>, findings: &mut Findings) {
    for folio in context.anonymous_folios() {
        let least = u64::from(folio.mapcount) + u64::from(folio.pins);
        findings.require(
            folio.pins == 0 || u64::from(folio.refcount) >= least,
            || {
                about(folio, "a pinned folio has too few references")
                    .expected(format!("refcount >= {least}, its mapcount and its pins"))
                    .found(format!("refcount = {}", folio.refcount))
                    .details(context.describe_mappings(folio.frame))
            },
        );
    }
}

fn pinned_is_exclusive(context: &Context<'_>, findings: &mut Findings) {
    for folio in context.anonymous_folios() {
        // Of a large one any page may be the pinned one.
        let first = folio.frame as usize;
        let pages = &context.snapshot.folios[first..];
        let mut pages = pages.iter().take(folio.frames() as usize);
        let shared = folio.mapcount > 0 && !pages.any(FolioView::is_exclusive);
        findings.require(folio.pins == 0 || !shared, || {
            about(folio, "a page that a device uses is shared")
                .expected("EXCLUSIVE: the process reads what the device writes")
                .found(format!("not exclusive, {} pins", folio.pins))
                .details(context.describe_mappings(folio.frame))
        });
    }
}

fn pins_have_users(context: &Context<'_>, findings: &mut Findings) {
    let waits = (context.snapshot.tasks.iter()).any(|task| {
        // In the middle of a transfer that pins, its task may wait for the swap area too, or for the mmap_lock.
        let middle = [
            Task::WAITS_FOR_DISK,
            Task::WAITS_FOR_SWAP,
            Task::WAITS_FOR_LOCK,
        ];
        middle.into_iter().any(|what| task.is_in_wait_for(what))
    });
    for folio in context.anonymous_folios() {
        findings.require(folio.pins == 0 || waits, || {
            about(folio, "a folio that nobody uses is pinned")
                .expected("no pin: no task waits for the disk")
                .found(format!("{} pins", folio.pins))
        });
    }
}

fn anon_vma_is_live(context: &Context<'_>, findings: &mut Findings) {
    let known = &context.snapshot.anon_vmas;
    for (space, leaf, _, folio) in context.entries_of(FrameKind::Anon, findings) {
        let anon_vma = known.get(&folio.owner);
        findings.require(
            anon_vma.is_some_and(|anon_vma| anon_vma.generation % 2 == 1),
            || {
                at_leaf(
                    context,
                    space,
                    leaf,
                    "a mapped folio whose anon_vma is gone",
                )
                .expected("a live anon_vma (odd generation) that a VMA leads to")
                .found(match anon_vma {
                    Some(gone) => format!("{:#x}, generation {}", gone.gpa, gone.generation),
                    None => format!("{:#x}, which no VMA leads to", folio.owner),
                })
                .details(context.describe_mappings(folio.frame))
            },
        );
    }
}

fn chain_leads_to_vma(context: &Context<'_>, findings: &mut Findings) {
    for (space, leaf, vma, folio) in context.entries_of(FrameKind::Anon, findings) {
        // Without an anon_vma it is R-05's.
        let known = &context.snapshot.anon_vmas;
        let Some(anon_vma) = known.get(&folio.owner) else {
            continue;
        };
        if let Some(busy) = known.get(&anon_vma.root).and_then(family_lock) {
            findings.skip(&busy);
            continue;
        }
        let leads = anon_vma.chains.iter().any(|chain| chain.vma == vma.gpa);
        findings.require(leads, || {
            let chains = anon_vma.chains.iter().take(8);
            at_leaf(
                context,
                space,
                leaf,
                "the rmap of a folio misses one of its mappings",
            )
            .expected(format!(
                "a chain from anon_vma {:#x} to VMA {:#x} ({})",
                anon_vma.gpa,
                vma.gpa,
                vma.label()
            ))
            .found(format!("{} chains, none to it", anon_vma.chains.len()))
            .details(
                chains.map(|chain| format!("chain {:#x} leads to VMA {:#x}", chain.gpa, chain.vma)),
            )
        });
    }
}

fn index_is_right(context: &Context<'_>, findings: &mut Findings) {
    for (space, leaf, vma, folio) in context.entries_of(FrameKind::Anon, findings) {
        let index = vma.index_of(leaf.gva);
        let offset = (leaf.target() >> PAGE_SHIFT) - folio.frame;
        findings.require(folio.index.wrapping_add(offset) == index, || {
            at_leaf(
                context,
                space,
                leaf,
                "a folio's index does not lead to its mapping",
            )
            .expected(format!(
                "index = {index:#x}, as VMA {} has it (pgoff {:#x})",
                vma.label(),
                vma.pgoff
            ))
            .found(format!("index = {:#x}, page {offset} of it", folio.index))
        });
    }
}

fn writable_is_exclusive(context: &Context<'_>, findings: &mut Findings) {
    let leaves = context.spaces.iter().flat_map(|space| {
        let leaves = space.user.leaves.iter();
        leaves.map(move |leaf| (space, leaf))
    });
    for (space, leaf) in leaves.filter(|(_, leaf)| leaf.rights().write) {
        let folio = context.folio_of(leaf);
        let Some(folio) = folio.filter(|folio| folio.is(FrameKind::Anon)) else {
            continue;
        };
        // An entry outside every VMA is P-01's, and private all the same.
        if space.vma_at(leaf.gva).is_some_and(|vma| !vma.is_private()) {
            continue;
        }
        // fork shares the folio before it takes the permission away, under the table's lock.
        let table = context.snapshot.folio(leaf.table_gpa);
        if let (Some(busy), Some(1..)) = (
            context.in_flight.tables(space.mm.gpa),
            table.map(|table| table.lock),
        ) {
            findings.skip(busy);
            continue;
        }
        // Each page of a large folio is exclusive or not.
        let Some(page) = context.snapshot.folio(leaf.target()) else {
            continue;
        };
        let mapped = context.mappings(page.frame);
        findings.require(page.is_exclusive() && mapped == 1, || {
            let exclusive = if page.is_exclusive() {
                "exclusive"
            } else {
                "not exclusive"
            };
            at_leaf(
                context,
                space,
                leaf,
                "a private page can be written while others share it",
            )
            .expected("W clear, or an exclusive page with one mapping")
            .found(format!(
                "{}; it is {exclusive}, {mapped} entries map it",
                flags_of(leaf.entry, leaf.level)
            ))
            .details(context.describe_mappings(folio.frame))
        });
    }
}

fn exclusive_is_single(context: &Context<'_>, findings: &mut Findings) {
    let is_page = |page: &&FolioView| {
        let head = context.snapshot.head_of(page.gpa());
        page.is_exclusive() && head.is_some_and(|head| head.is(FrameKind::Anon))
    };
    for folio in context.snapshot.folios.iter().filter(is_page) {
        let mapped = context.mappings(folio.frame);
        findings.require(mapped <= 1, || {
            about(folio, "an exclusive folio is shared")
                .expected("at most one entry maps it")
                .found(format!("{mapped} entries map it"))
                .details(context.describe_mappings(folio.frame))
        });
    }
}

fn cow_is_readonly(context: &Context<'_>, findings: &mut Findings) {
    for space in &context.spaces {
        for leaf in space.user.leaves.iter() {
            let both = PteFlags::COW | PteFlags::WRITE;
            findings.require(!leaf.entry.flags().contains(both), || {
                at_leaf(context, space, leaf, "a copy-on-write entry is writable")
                    .expected("W or COW, not both")
                    .found(flags_of(leaf.entry, leaf.level))
            });
        }
    }
}

fn chains_agree(context: &Context<'_>, findings: &mut Findings) {
    let snapshot = context.snapshot;
    let mut of_vmas = BTreeMap::new();
    for vma in snapshot.mms.iter().flat_map(|mm| &mm.vmas) {
        for chain in &vma.chains {
            of_vmas.insert(chain.gpa, chain);
            findings.require(chain.vma == vma.gpa, || {
                Finding::new("a chain on a VMA's list is another VMA's")
                    .expected(format!("vma = {:#x}", vma.gpa))
                    .found(format!("vma = {:#x}", chain.vma))
                    .object("AnonVmaChain", chain.gpa)
            });
        }
        let own = vma.anon_vma == 0
            || vma
                .chains
                .iter()
                .any(|chain| chain.anon_vma == vma.anon_vma);
        findings.require(own, || {
            Finding::new("a VMA is not on its own anon_vma")
                .expected(format!("a chain to anon_vma {:#x}", vma.anon_vma))
                .found(format!("{} chains, none to it", vma.chains.len()))
                .object("Vma", vma.gpa)
                .detail(vma.label())
        });
    }
    let mut of_anon_vmas = HashSet::new();
    for anon_vma in snapshot.anon_vmas.values() {
        let mut previous = 0;
        for chain in &anon_vma.chains {
            of_anon_vmas.insert(chain.gpa);
            let right = chain.anon_vma == anon_vma.gpa
                && chain.prev_of_anon == previous
                && of_vmas.contains_key(&chain.gpa);
            findings.require(right, || {
                Finding::new("a chain on an anon_vma's list is out of place")
                    .expected(format!(
                        "anon_vma = {:#x}, previous = {previous:#x}, on its VMA's list",
                        anon_vma.gpa
                    ))
                    .found(format!(
                        "anon_vma = {:#x}, previous = {:#x}, {}",
                        chain.anon_vma,
                        chain.prev_of_anon,
                        if of_vmas.contains_key(&chain.gpa) {
                            "on a VMA's list"
                        } else {
                            "on no VMA's list"
                        }
                    ))
                    .object("AnonVmaChain", chain.gpa)
            });
            previous = chain.gpa;
        }
    }
    for chain in of_vmas.values() {
        findings.require(of_anon_vmas.contains(&chain.gpa), || {
            Finding::new("a VMA's chain is missing on its anon_vma's list")
                .expected(format!("on the list of anon_vma {:#x}", chain.anon_vma))
                .found("not on it")
                .object("AnonVmaChain", chain.gpa)
        });
    }
}

/// Per anon_vma: VMAs whose `anon_vma` it is, and children.
fn families(context: &Context<'_>) -> BTreeMap<u64, (u64, u64)> {
    let snapshot = context.snapshot;
    let mut families: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    for vma in snapshot.mms.iter().flat_map(|mm| &mm.vmas) {
        families.entry(vma.anon_vma).or_default().0 += 1;
    }
    for child in snapshot.anon_vmas.values() {
        if child.parent != child.gpa {
            families.entry(child.parent).or_default().1 += 1;
        }
    }
    families
}

fn anon_vma_refcount(context: &Context<'_>, findings: &mut Findings) {
    let families = families(context);
    for anon_vma in context.snapshot.anon_vmas.values() {
        let (vmas, children) = families.get(&anon_vma.gpa).copied().unwrap_or_default();
        let chains = anon_vma.chains.len() as u64;
        let own_root = u64::from(anon_vma.root == anon_vma.gpa);
        let expected = vmas + chains + children + own_root;
        findings.require(u64::from(anon_vma.refcount) == expected, || {
            Finding::new("an anon_vma's references are miscounted")
                .expected(format!(
                    "refcount = {expected}: {vmas} VMAs, {chains} chains, {children} children, {own_root} own root link"
                ))
                .found(format!("refcount = {}", anon_vma.refcount))
                .object("AnonVma", anon_vma.gpa)
        });
    }
}

fn anon_vma_degree(context: &Context<'_>, findings: &mut Findings) {
    let families = families(context);
    for anon_vma in context.snapshot.anon_vmas.values() {
        let (vmas, children) = families.get(&anon_vma.gpa).copied().unwrap_or_default();
        findings.require(u64::from(anon_vma.degree) == vmas + children, || {
            Finding::new("an anon_vma's degree is wrong")
                .expected(format!(
                    "degree = {}: {vmas} VMAs, {children} children",
                    vmas + children
                ))
                .found(format!("degree = {}", anon_vma.degree))
                .object("AnonVma", anon_vma.gpa)
        });
    }
}

fn anon_vma_active(context: &Context<'_>, findings: &mut Findings) {
    let families = families(context);
    for anon_vma in context.snapshot.anon_vmas.values() {
        let vmas = families.get(&anon_vma.gpa).map_or(0, |family| family.0);
        findings.require(u64::from(anon_vma.active) == vmas, || {
            Finding::new("an anon_vma miscounts the VMAs whose anon_vma it is")
                .expected(format!("active = {vmas}"))
                .found(format!("active = {}", anon_vma.active))
                .object("AnonVma", anon_vma.gpa)
        });
    }
}

fn root_is_oldest(context: &Context<'_>, findings: &mut Findings) {
    let known = &context.snapshot.anon_vmas;
    for anon_vma in known.values() {
        let mut oldest = anon_vma;
        // Bounded: a cycle of parents ends the search at an anon_vma that has one.
        for _ in 0..known.len() {
            match known.get(&oldest.parent) {
                Some(parent) if oldest.parent != oldest.gpa => oldest = parent,
                _ => break,
            }
        }
        let is_oldest = oldest.parent == 0 || oldest.parent == oldest.gpa;
        findings.require(is_oldest && anon_vma.root == oldest.gpa, || {
            Finding::new("an anon_vma's root is not its oldest ancestor")
                .expected(format!("root = {:#x}", oldest.gpa))
                .found(format!(
                    "root = {:#x}, parent = {:#x}",
                    anon_vma.root, anon_vma.parent
                ))
                .object("AnonVma", anon_vma.gpa)
        });
    }
}

fn about(folio: &FolioView, summary: &str) -> Finding {
    Finding::new(summary).frame(folio.frame)
}
