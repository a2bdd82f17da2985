//! P: what the page tables map, and the pages that they are made of.

use abi::layout::{LAPIC_GPA, PAGE_SHIFT, PAGE_SIZE};
use abi::objects::{FrameKind, ORDERS, vma_flags};
use abi::pte::PteFlags;

use super::context::Space;
use super::render::flags_of;
use super::{Applies, Context, Family, Finding, Findings, InFlight, Invariant, tables};
use crate::inspect::translate;
use crate::inspect::walk::Leaf;

const LINUX_WALK: &str = "Linux Documentation/mm/process_addrs.rst, page tables";

pub(super) const INVARIANTS: &[Invariant] = &[
    Invariant {
        id: "P-01",
        family: Family::PageTables,
        predicate: "every present user entry lies in an attached VMA of its mm",
        applies: Applies::UnwrittenVmas,
        source: LINUX_WALK,
        run: in_a_vma,
    },
    Invariant {
        id: "P-02",
        family: Family::PageTables,
        predicate: "no user entry permits what its VMA does not (W, X, or any access at CPL 3)",
        applies: Applies::UnwrittenVmas,
        source: "mmap(2), mprotect(2); SDM vol. 3A, 5.6",
        run: within_vma_permissions,
    },
    Invariant {
        id: "P-03",
        family: Family::PageTables,
        predicate: "a user entry maps a frame of user memory, or a free one (P-04)",
        applies: Applies::Always,
        source: "Linux mm/page_table_check.c; abi::objects::FrameKind",
        run: maps_user_memory,
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
        applies: Applies::Always,
        source: "Linux arch/x86/mm/pgtable.c, pgd_ctor",
        run: tables::same_kernel_half,
    },
    Invariant {
        id: "P-08",
        family: Family::PageTables,
        predicate: "a page-table page is referenced at most once",
        applies: Applies::Always,
        source: "Linux mm/memory.c, pmd_install",
        run: tables::referenced_once,
    },
    Invariant {
        id: "P-09",
        family: Family::PageTables,
        predicate: "a table that a walk enters is a page-table page of that mm and level",
        applies: Applies::Always,
        source: "abi::objects::FrameKind::Table",
        run: tables::tables_are_tables,
    },
    Invariant {
        id: "P-10",
        family: Family::PageTables,
        predicate: "every page-table page of an mm is reached by its walk, or set aside (P-31)",
        applies: Applies::UnlockedMm,
        source: "Linux mm/memory.c, free_pgtables",
        run: tables::no_lost_tables,
    },
    Invariant {
        id: "P-11",
        family: Family::PageTables,
        predicate: "a table's count of entries that are not none is right",
        applies: Applies::UnlockedTables,
        source: "abi::objects::Folio::used",
        run: tables::used_is_right,
    },
    Invariant {
        id: "P-12",
        family: Family::PageTables,
        predicate: "mm.tables is the number of page-table pages that the walk finds, and of those set aside",
        applies: Applies::UnlockedTables,
        source: "Linux mm_pgtables_bytes; abi::objects::Mm::tables",
        run: tables::tables_counted,
    },
    Invariant {
        id: "P-13",
        family: Family::PageTables,
        predicate: "mm.rss is the number of pages that present user entries and migration entries have, as the walk finds",
        applies: Applies::UnlockedTables,
        source: "Linux kernel/fork.c, check_mm; abi::objects::Mm::rss",
        run: tables::rss_is_right,
    },
    Invariant {
        id: "P-14",
        family: Family::PageTables,
        predicate: "no present entry has a reserved bit set or leads to a table outside memory",
        applies: Applies::Always,
        source: "SDM vol. 3A, 5.5 and 5.7",
        run: tables::entries_well_formed,
    },
    Invariant {
        id: "P-15",
        family: Family::PageTables,
        predicate: "a kernel mapping maps guest memory or the local APIC's page",
        applies: Applies::Always,
        source: "abi::layout",
        run: kernel_maps_memory,
    },
    Invariant {
        id: "P-16",
        family: Family::PageTables,
        predicate: "entries of the zero page, and no others, are special, and none is writable",
        applies: Applies::Always,
        source: "Linux mm/memory.c, vm_normal_page and do_anonymous_page",
        run: zero_page_is_special,
    },
    Invariant {
        id: "P-17",
        family: Family::PageTables,
        predicate: "the zero page is one frame, of zeroes, with one reference and no mapcount",
        applies: Applies::Always,
        source: "Linux mm/mm_init.c, ZERO_PAGE; abi::objects::KernelRoot::zero_frame",
        run: zero_page_is_zero,
    },
];

fn in_a_vma(context: &Context<'_>, findings: &mut Findings) {
    for space in context.spaces_without(InFlight::vmas, findings) {
        for leaf in space.user.leaves.iter() {
            let end = leaf.gva.saturating_add(leaf.bytes());
            let inside = space.vma_at(leaf.gva).is_some_and(|vma| end <= vma.end);
            findings.require(inside, || {
                let flags = flags_of(leaf.entry, leaf.level);
                let mapped = &format!("{flags} maps {:#x}", leaf.target());
                at_leaf(context, space, leaf, "a present entry outside every VMA")
                    .expected("no present entry, or an attached VMA around all that it maps")
                    .found(mapped)
                    .details(neighbours(space, leaf.gva))
            });
        }
    }
}

fn within_vma_permissions(context: &Context<'_>, findings: &mut Findings) {
    for space in context.spaces_without(InFlight::vmas, findings) {
        for leaf in space.user.leaves.iter() {
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

fn maps_user_memory(context: &Context<'_>, findings: &mut Findings) {
    for (space, leaf) in user_leaves(context) {
        let folio = context.folio_of(leaf);
        let right = folio.is_some_and(|folio| folio.is_user() || folio.is_free());
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
            .expected("an anonymous folio, or the zero page")
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

/// The head of the free block that `frame` lies in. What the frame's own descriptor says comes first: a
/// wrong order further down (P-20) must not make a frame in use look free.
fn free_head(context: &Context<'_>, frame: u64) -> Option<u64> {
    let folios = &context.snapshot.folios;
    let own = folios.get(usize::try_from(frame).ok()?)?;
    if !own.is(FrameKind::Tail) {
        return own.is_free().then_some(frame);
    }
    (1..ORDERS as u32)
        .map(|order| frame >> order << order)
        .find(|&head| {
            let folio = &folios[head as usize];
            folio.is(FrameKind::Buddy) && frame - head < folio.frames()
        })
}

fn kernel_write_xor_execute(context: &Context<'_>, findings: &mut Findings) {
    for leaf in context.kernel.leaves.iter() {
        let rights = leaf.rights();
        findings.require(!(rights.write && rights.execute), || {
            in_kernel(context, leaf, "a kernel mapping is writable and executable")
                .expected("W clear or NX set at some level")
                .found(flags_of(leaf.entry, leaf.level))
        });
    }
}

fn kernel_not_for_users(context: &Context<'_>, findings: &mut Findings) {
    for leaf in context.kernel.leaves.iter() {
        findings.require(!leaf.rights().user, || {
            in_kernel(context, leaf, "a kernel mapping is open to CPL 3")
                .expected("U clear at some level")
                .found(flags_of(leaf.entry, leaf.level))
        });
    }
}

fn kernel_maps_memory(context: &Context<'_>, findings: &mut Findings) {
    for leaf in context.kernel.leaves.iter() {
        let end = leaf.target().saturating_add(leaf.bytes());
        let right = end <= context.mem.bytes() || (leaf.target() == LAPIC_GPA && leaf.level == 1);
        findings.require(right, || {
            in_kernel(context, leaf, "a kernel mapping leads outside guest memory")
                .expected(format!("an address below {:#x}", context.mem.bytes()))
                .found(format!("{:#x}..{end:#x}", leaf.target()))
        });
    }
}

fn zero_page_is_special(context: &Context<'_>, findings: &mut Findings) {
    let zero = context.snapshot.root.zero_frame;
    for (space, leaf) in user_leaves(context) {
        let flags = leaf.entry.flags();
        let special = flags.contains(PteFlags::SPECIAL);
        let of_zero = leaf.target() == zero;
        let excess = of_zero && leaf.rights().write;
        findings.require(special == of_zero && !excess, || {
            let summary = match of_zero {
                true => "an entry of the zero page is writable or counted",
                false => "an entry of counted memory says that it is not counted",
            };
            at_leaf(context, space, leaf, summary)
                .expected("SPECIAL and no W for the zero page, no SPECIAL for other frames")
                .found(flags_of(leaf.entry, leaf.level))
        });
    }
}

fn zero_page_is_zero(context: &Context<'_>, findings: &mut Findings) {
    let gpa = context.snapshot.root.zero_frame;
    let mut bytes = vec![0xff; PAGE_SIZE as usize];
    let read = context.mem.read(gpa, &mut bytes);
    let nonzero = bytes.iter().position(|byte| *byte != 0);
    findings.require(read.is_ok() && nonzero.is_none(), || {
        Finding::new("the zero page is not zero")
            .expected("4096 bytes of 0")
            .found(match nonzero {
                Some(at) if read.is_ok() => format!("{:#x} at byte {at:#x}", bytes[at]),
                _ => format!("no memory at {gpa:#x}"),
            })
            .frame(gpa >> PAGE_SHIFT)
    });
    let folios = context.snapshot.folios.iter();
    let zero = folios.filter(|folio| folio.is(FrameKind::Zero) || folio.gpa() == gpa);
    for folio in zero {
        let right = folio.gpa() == gpa
            && folio.is(FrameKind::Zero)
            && (folio.refcount, folio.mapcount) == (1, 0);
        findings.require(right, || {
            Finding::new("a zero page that is not the one, or that is counted")
                .expected(format!("Zero at {gpa:#x} only, refcount 1, mapcount 0"))
                .found(format!(
                    "{} at {:#x}, refcount {}, mapcount {}",
                    folio.kind_name(),
                    folio.gpa(),
                    folio.refcount,
                    folio.mapcount
                ))
                .frame(folio.frame)
        });
    }
}

fn user_leaves<'c, 'a>(context: &'c Context<'a>) -> impl Iterator<Item = (&'c Space<'a>, Leaf)> {
    let spaces = context.spaces.iter();
    spaces.flat_map(|space| space.user.leaves.iter().map(move |leaf| (space, leaf)))
}

/// A finding about `leaf` of `space`, with its walk.
pub(super) fn at_leaf(
    context: &Context<'_>,
    space: &Space<'_>,
    leaf: Leaf,
    summary: impl Into<String>,
) -> Finding {
    Finding::new(summary)
        .mm(space.mm.id)
        .gva(leaf.gva)
        .frame(leaf.target() >> PAGE_SHIFT)
        .walk(translate(context.mem, space.mm.pgd, leaf.gva))
}

fn in_kernel(context: &Context<'_>, leaf: Leaf, summary: &str) -> Finding {
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
