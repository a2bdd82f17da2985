//! P-20 and on: the allocator's books. Every frame is exactly one thing, and the lists and counts say
//! so too.

use std::collections::HashSet;
use std::mem::offset_of;

use abi::layout::{PAGE_SHIFT, PAGE_SIZE};
use abi::objects::{
    AnonVma, AnonVmaChain, CacheNode, File, FileTable, FrameKind, Mm, ORDERS, OpenFile, SLABS,
    Task, Vma, VmaNode, VmaSlot,
};

use super::{Applies, Context, Family, Finding, Findings, Invariant};
use crate::inspect::FolioView;

const BUDDY: &str = "Linux mm/page_alloc.c, __free_one_page; abi::objects::FrameKind";

pub(super) const INVARIANTS: &[Invariant] = &[
    Invariant {
        id: "P-20",
        family: Family::PageTables,
        predicate: "frames tile exactly: aligned blocks of known kinds, nothing between them",
        applies: Applies::AllAtPoints,
        source: BUDDY,
        run: frames_tile,
    },
    Invariant {
        id: "P-21",
        family: Family::PageTables,
        predicate: "the buddy lists hold exactly the heads of free blocks, by order",
        applies: Applies::AllAtPoints,
        source: BUDDY,
        run: buddy_lists,
    },
    Invariant {
        id: "P-22",
        family: Family::PageTables,
        predicate: "each CPU's list holds exactly its free frames, and counts them right",
        applies: Applies::AllAtPoints,
        source: "Linux mm/page_alloc.c, struct per_cpu_pages",
        run: cpu_lists,
    },
    Invariant {
        id: "P-23",
        family: Family::PageTables,
        predicate: "free_frames is the number of free frames",
        applies: Applies::AllAtPoints,
        source: "abi::objects::KernelRoot::free_frames",
        run: free_frames_right,
    },
    Invariant {
        id: "P-24",
        family: Family::PageTables,
        predicate: "no allocated frame is left without a kind",
        applies: Applies::QuiescentKernel,
        source: "abi::objects::FrameKind::Unset",
        run: no_unset_frames,
    },
    Invariant {
        id: "P-25",
        family: Family::PageTables,
        predicate: "each slab's frames, objects in use, retired and free add up",
        applies: Applies::QuiescentKernel,
        source: "Linux mm/slub.c, validate_slab",
        run: slabs_add_up,
    },
];

/// The folios that head a block, as a walk over the tiling meets them; what does not fit is reported.
fn heads<'c>(
    context: &'c Context<'_>,
    mut wrong: impl FnMut(&FolioView, String),
) -> Vec<&'c FolioView> {
    let folios = &context.snapshot.folios;
    let first_managed = context.snapshot.root.first_frame;
    let mut heads = Vec::new();
    let mut next = 0;
    while let Some(folio) = folios.get(next) {
        let frame = next as u64;
        next += 1;
        match folio.kind() {
            None => wrong(folio, "a frame of an unknown kind".into()),
            Some(FrameKind::Tail) if frame < first_managed => {}
            Some(FrameKind::Tail) => wrong(folio, "a tail that no block covers".into()),
            Some(_) if usize::from(folio.order) >= ORDERS => {
                wrong(folio, format!("a block of order {}", folio.order));
            }
            Some(FrameKind::PerCpu) => {
                heads.push(folio);
                if folio.order != 0 {
                    let order = folio.order;
                    wrong(folio, format!("a single free frame of order {order}"));
                }
            }
            Some(_) => {
                heads.push(folio);
                if !frame.is_multiple_of(folio.frames()) {
                    wrong(
                        folio,
                        format!("a block of order {} that is not aligned", folio.order),
                    );
                }
                let end = next + folio.frames() as usize - 1;
                let tails = folios.get(next..end);
                match tails.map(|tails| tails.iter().find(|tail| !tail.is(FrameKind::Tail))) {
                    None => wrong(folio, "a block that ends past the last frame".into()),
                    Some(Some(inner)) => {
                        wrong(
                            inner,
                            format!("a head inside the block at frame {frame:#x}"),
                        );
                    }
                    Some(None) => next = end,
                }
            }
        }
    }
    heads
}

fn frames_tile(context: &Context<'_>, findings: &mut Findings) {
    let mut found = Vec::new();
    heads(context, |folio, what| found.push((*folio, what)));
    findings.examined += context.snapshot.folios.len() as u64;
    for (folio, what) in found {
        findings.report(|| {
            Finding::new(format!("frames do not tile: {what}"))
                .expected("every managed frame is a head or lies in exactly one block")
                .found(format!("{} of order {}", folio.kind_name(), folio.order))
                .frame(folio.frame)
        });
    }
}

/// Follows a list of frames; what it meets, and how it breaks off if it does.
fn list<'c>(context: &'c Context<'_>, first: u64) -> (Vec<&'c FolioView>, Option<String>) {
    let mut seen = HashSet::new();
    let mut members = Vec::new();
    let mut next = first;
    while next != 0 {
        let Some(folio) = context.snapshot.folios.get(next as usize) else {
            return (
                members,
                Some(format!("leads to frame {next:#x}, which does not exist")),
            );
        };
        if !seen.insert(next) {
            return (members, Some(format!("comes back to frame {next:#x}")));
        }
        members.push(folio);
        next = folio.next;
    }
    (members, None)
}

fn buddy_lists(context: &Context<'_>, findings: &mut Findings) {
    let mut listed = HashSet::new();
    for (order, &first) in context.snapshot.root.buddy.iter().enumerate() {
        let (members, broken) = list(context, first);
        if let Some(broken) = broken {
            findings.report(|| on_list(&format!("the buddy list of order {order}"), first, broken));
        }
        let mut previous = 0;
        for folio in members {
            let belongs = folio.is(FrameKind::Buddy) && usize::from(folio.order) == order;
            findings.require(belongs && folio.prev == previous, || {
                Finding::new(format!("a wrong entry on the buddy list of order {order}"))
                    .expected(format!("Buddy, order {order}, previous {previous:#x}"))
                    .found(format!(
                        "{}, order {}, previous {:#x}",
                        folio.kind_name(),
                        folio.order,
                        folio.prev
                    ))
                    .frame(folio.frame)
            });
            previous = folio.frame;
            listed.insert(folio.frame);
        }
    }
    for folio in of_kind(context, FrameKind::Buddy) {
        findings.require(listed.contains(&folio.frame), || {
            Finding::new("a free block that is on no buddy list")
                .expected(format!("on the list of order {}", folio.order))
                .found("on none")
                .frame(folio.frame)
        });
    }
}

fn cpu_lists(context: &Context<'_>, findings: &mut Findings) {
    let mut listed = HashSet::new();
    for cpu in &context.snapshot.cpus {
        let name = format!("the free list of CPU {}", cpu.index);
        let (members, broken) = list(context, cpu.free_list);
        if let Some(broken) = broken {
            findings.report(|| on_list(&name, cpu.free_list, broken));
        }
        findings.require(cpu.free_count == members.len() as u64, || {
            Finding::new(format!("{name} miscounts its frames"))
                .expected(format!("free_count = {}, the list's length", members.len()))
                .found(format!("free_count = {}", cpu.free_count))
                .vcpu(cpu.index)
        });
        for folio in members {
            let belongs = folio.is(FrameKind::PerCpu) && folio.owner == cpu.index as u64;
            findings.require(belongs, || {
                Finding::new(format!("a wrong entry on {name}"))
                    .expected(format!("PerCpu, owner {}", cpu.index))
                    .found(format!("{}, owner {:#x}", folio.kind_name(), folio.owner))
                    .frame(folio.frame)
            });
            listed.insert(folio.frame);
        }
    }
    for folio in of_kind(context, FrameKind::PerCpu) {
        findings.require(listed.contains(&folio.frame), || {
            Finding::new("a free frame that is on no CPU's list")
                .expected(format!("on the list of CPU {}", folio.owner))
                .found("on none")
                .frame(folio.frame)
        });
    }
}

fn on_list(list: &str, first: u64, broken: String) -> Finding {
    Finding::new(format!("{list} is broken"))
        .expected("a list that ends")
        .found(broken)
        .frame(first)
}

fn of_kind<'c>(context: &'c Context<'_>, kind: FrameKind) -> impl Iterator<Item = &'c FolioView> {
    context
        .snapshot
        .folios
        .iter()
        .filter(move |folio| folio.is(kind))
}

/// Frames of a block; those on a CPU's list are single, whatever order is left in their descriptor.
fn frames_of(folio: &FolioView) -> u64 {
    if folio.is(FrameKind::PerCpu) {
        1
    } else {
        folio.frames()
    }
}

fn free_frames_right(context: &Context<'_>, findings: &mut Findings) {
    let heads = heads(context, |_, _| {});
    let free = heads.iter().filter(|folio| folio.is_free());
    let free: u64 = free.map(|folio| frames_of(folio)).sum();
    let says = context.snapshot.root.free_frames;
    findings.require(says == free, || {
        let mut by_kind = [0; FrameKind::ALL.len()];
        for folio in &heads {
            by_kind[usize::from(folio.raw_kind)] += frames_of(folio);
        }
        let kinds = FrameKind::ALL
            .iter()
            .zip(by_kind)
            .filter(|(_, frames)| *frames != 0);
        Finding::new("the count of free frames is wrong")
            .expected(format!("free_frames = {free}, the frames of free blocks"))
            .found(format!("free_frames = {says}"))
            .details(kinds.map(|(kind, frames)| format!("{kind:?}: {frames} frames")))
    });
}

fn no_unset_frames(context: &Context<'_>, findings: &mut Findings) {
    findings.examined += context.snapshot.folios.len() as u64;
    for folio in of_kind(context, FrameKind::Unset) {
        findings.report(|| {
            Finding::new("a frame that was allocated and never used")
                .expected("a kind other than Unset")
                .found(format!("Unset, refcount {}", folio.refcount))
                .frame(folio.frame)
        });
    }
}

fn slabs_add_up(context: &Context<'_>, findings: &mut Findings) {
    // One pass for all: there are many more frames than slabs.
    let mut frames_of = [0u64; SLABS];
    for folio in of_kind(context, FrameKind::Slab) {
        if let Some(frames) = frames_of.get_mut(folio.owner as usize) {
            *frames += folio.frames();
        }
    }
    let slabs = context.snapshot.root.slabs.iter().zip(frames_of);
    for (index, (slab, frames)) in slabs.enumerate() {
        findings.require(slab.frames == frames, || {
            in_slab(index, "frames").expected(frames).found(slab.frames)
        });
        let free = free_objects(context, index);
        let per_frame = PAGE_SIZE.checked_div(slab.object_bytes).unwrap_or(0);
        let room = frames * per_frame;
        match free {
            Ok(free) => findings.require(
                [slab.used, slab.retired, free]
                    .into_iter()
                    .try_fold(0, u64::checked_add)
                    == Some(room),
                || {
                    in_slab(index, "objects")
                        .expected(format!("{room}, in {frames} frames"))
                        .found(format!(
                            "{} in use, {} retired and {free} free",
                            slab.used, slab.retired
                        ))
                },
            ),
            Err(broken) => findings.report(|| {
                in_slab(index, "free objects")
                    .expected("a list that ends")
                    .found(broken)
            }),
        }
    }
}

fn in_slab(index: usize, what: &str) -> Finding {
    let name = [
        "Mm",
        "Vma",
        "VmaNode",
        "AnonVma",
        "AnonVmaChain",
        "Task",
        "File",
        "CacheNode",
        "OpenFile",
        "FileTable",
    ][index];
    Finding::new(format!("the {name} slab's {what} do not add up"))
}

/// Where the link of a free object lies in it, by slab.
const FREE_LINK: [usize; SLABS] = [
    offset_of!(Mm, next),
    offset_of!(Vma, chains),
    offset_of!(VmaNode, slots) + offset_of!(VmaSlot, child),
    offset_of!(AnonVma, chains),
    offset_of!(AnonVmaChain, next_of_vma),
    offset_of!(Task, next),
    offset_of!(File, pages),
    offset_of!(CacheNode, slots),
    offset_of!(OpenFile, position),
    offset_of!(FileTable, open),
];

/// Objects on a slab's free list.
fn free_objects(context: &Context<'_>, index: usize) -> Result<u64, String> {
    let mut seen = HashSet::new();
    let mut next = context.snapshot.root.slabs[index].free;
    while next != 0 {
        let folio = context.snapshot.folio(next);
        let own =
            folio.is_some_and(|folio| folio.is(FrameKind::Slab) && folio.owner == index as u64);
        if !own {
            return Err(format!(
                "{next:#x} lies in no frame {:#x} of the slab",
                next >> PAGE_SHIFT
            ));
        }
        if !seen.insert(next) {
            return Err(format!("{next:#x} is on the list twice"));
        }
        let mut word = [0; 8];
        let link = next + FREE_LINK[index] as u64;
        context
            .mem
            .read(link, &mut word)
            .map_err(|error| error.to_string())?;
        next = u64::from_le_bytes(word);
    }
    Ok(seen.len() as u64)
}
