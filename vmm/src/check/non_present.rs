//! S: entries that are neither none nor present.

use std::collections::BTreeMap;

use abi::layout::PAGE_SHIFT;
use abi::objects::FrameKind;
use abi::pte::{NonPresent, PteFlags};

use super::context::Space;
use super::{Applies, Context, Family, Finding, Findings, InFlight, Invariant};
use crate::inspect::translate;
use crate::inspect::walk::Leaf;

pub(super) const INVARIANTS: &[Invariant] = &[
    Invariant {
        id: "S-01",
        family: Family::NonPresent,
        predicate: "a user entry that is neither none nor present says what there is, at level 1",
        applies: Applies::Always,
        source: "Linux include/linux/swapops.h; abi::pte::NonPresent",
        run: says_what_there_is,
    },
    Invariant {
        id: "S-02",
        family: Family::NonPresent,
        predicate: "a swap or migration entry lies in an attached VMA of its mm",
        applies: Applies::UnwrittenVmas,
        source: "Linux mm/memory.c, zap_nonpresent_ptes",
        run: in_a_vma,
    },
    Invariant {
        id: "S-03",
        family: Family::NonPresent,
        predicate: "a migration entry refers to a folio of user memory that is locked",
        applies: Applies::Always,
        source: "Linux include/linux/swapops.h, pfn_swap_entry_to_page",
        run: migrates_what_is_locked,
    },
    Invariant {
        id: "S-04",
        family: Family::NonPresent,
        predicate: "no migration entry is left where nobody migrates",
        applies: Applies::OutsideKernel,
        source: "Linux mm/migrate.c, remove_migration_ptes",
        run: nobody_left_behind,
    },
    Invariant {
        id: "S-05",
        family: Family::NonPresent,
        predicate: "a folio that migration entries refer to has a reference that is no mapping's",
        applies: Applies::AllAtPoints,
        source: "Linux mm/migrate.c, folio_expected_ref_count",
        run: mover_has_a_reference,
    },
    Invariant {
        id: "S-06",
        family: Family::NonPresent,
        predicate: "a migration entry that keeps W in a private mapping, or has no COW, is the only one of its anonymous folio",
        applies: Applies::UnlockedTables,
        source: "Linux include/linux/swapops.h, is_writable_migration_entry; mm/memory.c, copy_nonpresent_pte",
        run: exclusive_is_alone,
    },
    Invariant {
        id: "S-07",
        family: Family::NonPresent,
        predicate: "a migration entry lies where the walk back from its folio comes to",
        applies: Applies::UnwrittenVmas,
        source: "Linux mm/rmap.c, rmap_walk_anon; mm/mremap.c, take_rmap_locks (486cf46f3f9b)",
        run: walk_comes_to_it,
    },
];

/// A migration entry of an mm.
struct Out<'c, 'a> {
    space: &'c Space<'a>,
    leaf: Leaf,
    /// Frame number.
    frame: u64,
    flags: PteFlags,
}

fn migrations<'c, 'a>(space: &'c Space<'a>) -> impl Iterator<Item = Out<'c, 'a>> {
    space
        .user
        .absent
        .iter()
        .filter_map(move |&leaf| match said(&leaf) {
            Some(NonPresent::Migration { gpa, flags }) => Some(Out {
                space,
                leaf,
                frame: gpa >> PAGE_SHIFT,
                flags,
            }),
            _ => None,
        })
}

impl Out<'_, '_> {
    fn finding(&self, context: &Context<'_>, title: &str) -> Finding {
        non_present(context, self.space, self.leaf, title).frame(self.frame)
    }
}

fn migrates_what_is_locked(context: &Context<'_>, findings: &mut Findings) {
    for out in context.spaces.iter().flat_map(migrations) {
        let folio = context.snapshot.folio(out.frame << PAGE_SHIFT);
        let moves = folio.is_some_and(|folio| folio.is_counted() && folio.lock != 0);
        findings.require(moves, || {
            let found = match folio {
                Some(folio) => format!("{}, lock {:#x}", folio.kind_name(), folio.lock),
                None => "no frame of memory".into(),
            };
            out.finding(context, "a migration entry of a page that nobody moves")
                .expected("a locked folio of user memory")
                .found(found)
        });
    }
}

fn nobody_left_behind(context: &Context<'_>, findings: &mut Findings) {
    for out in context.spaces.iter().flat_map(migrations) {
        findings.report(|| {
            out.finding(context, "a migration entry is left behind")
                .expected("none: no vCPU is inside the kernel")
                .found(describe(&out.leaf))
        });
    }
}

fn mover_has_a_reference(context: &Context<'_>, findings: &mut Findings) {
    for out in context.spaces.iter().flat_map(migrations) {
        // Without a folio it is S-03's.
        let Some(folio) = context.snapshot.folio(out.frame << PAGE_SHIFT) else {
            continue;
        };
        findings.require(folio.refcount > folio.mapcount, || {
            out.finding(context, "a page moves to which nobody holds a reference")
                .expected(format!("refcount > {}, its mapcount", folio.mapcount))
                .found(format!("refcount = {}", folio.refcount))
        });
    }
}

fn exclusive_is_alone(context: &Context<'_>, findings: &mut Findings) {
    if let Some(busy) = context.in_flight.any_tables() {
        let all = context.spaces.iter().flat_map(migrations);
        return all.for_each(|_| findings.skip(busy));
    }
    let mut entries = BTreeMap::new();
    for out in context.spaces.iter().flat_map(migrations) {
        *entries
            .entry(out.frame)
            .or_insert_with(|| context.mappings(out.frame)) += 1;
    }
    for out in context.spaces.iter().flat_map(migrations) {
        let folio = context.snapshot.folio(out.frame << PAGE_SHIFT);
        if !folio.is_some_and(|folio| folio.is(FrameKind::Anon)) {
            continue;
        }
        let alone = out.flags.contains(PteFlags::WRITE) || !out.flags.contains(PteFlags::COW);
        let others = entries[&out.frame] - 1;
        findings.require(!alone || others == 0, || {
            out.finding(
                context,
                "a page that moves is somebody's alone, and others map it too",
            )
            .expected("no other entry, or COW and no W")
            .found(format!("{others} others, {:?}", out.flags))
            .details(context.describe_mappings(out.frame))
        });
    }
}

fn walk_comes_to_it(context: &Context<'_>, findings: &mut Findings) {
    let spaces = context.spaces_without(InFlight::vmas, findings);
    for out in spaces.into_iter().flat_map(migrations) {
        let folio = context.snapshot.folio(out.frame << PAGE_SHIFT);
        // Without them it is S-03's and S-02's.
        let (Some(folio), Some(vma)) = (folio, out.space.vma_at(out.leaf.gva)) else {
            continue;
        };
        let index = vma.index_of(out.leaf.gva);
        findings.require(folio.index == index, || {
            out.finding(context, "a migration entry where no walk back comes to")
                .expected(format!("index {index:#x}, the page offset there"))
                .found(format!("index {:#x}", folio.index))
        });
    }
}

/// What the entry of `leaf` says, where that is understood.
pub(super) fn said(leaf: &Leaf) -> Option<NonPresent> {
    (leaf.level == 1).then(|| leaf.entry.non_present())?
}

fn says_what_there_is(context: &Context<'_>, findings: &mut Findings) {
    for space in &context.spaces {
        findings.examined += space.user.leaves.len() as u64;
        // An entry of 2 MiB that is being split is P-33's.
        let is_split = |leaf: &&Leaf| leaf.level == 2 && leaf.entry.is_huge();
        for &leaf in space.user.absent.iter().filter(|leaf| !is_split(leaf)) {
            findings.require(said(&leaf).is_some(), || {
                let title = "an entry is neither none nor present, and says nothing that there is";
                non_present(context, space, leaf, title)
                    .expected("none, present, or a swap or migration entry of level 1")
                    .found(format!("{:#018x} at level {}", leaf.entry.0, leaf.level))
            });
        }
    }
}

fn in_a_vma(context: &Context<'_>, findings: &mut Findings) {
    for space in context.spaces_without(InFlight::vmas, findings) {
        for &leaf in space.user.absent.iter().filter(|leaf| said(leaf).is_some()) {
            findings.require(space.vma_at(leaf.gva).is_some(), || {
                non_present(context, space, leaf, "an entry outside every VMA")
                    .expected("none, or an attached VMA around it")
                    .found(describe(&leaf))
            });
        }
    }
}

/// What an entry says, for a person.
pub(super) fn describe(leaf: &Leaf) -> String {
    match said(leaf) {
        Some(NonPresent::Swap { slot, exclusive }) => {
            let exclusive = if exclusive { ", exclusive" } else { "" };
            format!("swap slot {slot:#x}{exclusive}")
        }
        Some(NonPresent::Migration { gpa, flags }) => {
            format!("migration of frame {:#x}, {flags:?}", gpa >> 12)
        }
        None => format!("{:#018x}", leaf.entry.0),
    }
}

pub(super) fn non_present(
    context: &Context<'_>,
    space: &Space<'_>,
    leaf: Leaf,
    title: &str,
) -> Finding {
    Finding::new(title)
        .mm(space.mm.id)
        .gva(leaf.gva)
        .walk(translate(context.mem, space.mm.pgd, leaf.gva))
}
