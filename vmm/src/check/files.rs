//! R-16 and on, L-17 and on: files, their page caches, who maps them and who has them open.

use std::collections::{BTreeMap, BTreeSet};

use abi::layout::PAGE_SHIFT;
use abi::objects::FrameKind;

use super::pagetable::at_leaf;
use super::render::flags_of;
use super::{Applies, Busy, Context, Family, Finding, Findings, Invariant};
use crate::inspect::{FileView, FolioView};

const FILEMAP: &str = "Linux mm/filemap.c, __filemap_add_folio and filemap_unaccount_folio";

pub(super) const INVARIANTS: &[Invariant] = &[
    Invariant {
        id: "R-16",
        family: Family::Rmap,
        predicate: "a page of a file has a reference for the page cache and one for each mapping",
        applies: Applies::QuiescentKernel,
        source: "Linux mm/migrate.c, folio_expected_refs",
        run: references_are_right,
    },
    Invariant {
        id: "R-17",
        family: Family::Rmap,
        predicate: "a page of a file is writable only in shared mappings",
        applies: Applies::UnwrittenVmas,
        source: "mmap(2), MAP_PRIVATE; Linux mm/memory.c, do_wp_page",
        run: writable_is_shared,
    },
    Invariant {
        id: "R-18",
        family: Family::Rmap,
        predicate: "a VMA that maps a page of a file maps that file at that page, and is in its tree",
        applies: Applies::UnwrittenVmas,
        source: "Linux mm/rmap.c, rmap_walk_file",
        run: tree_leads_to_vma,
    },
    Invariant {
        id: "R-19",
        family: Family::Rmap,
        predicate: "a file's tree holds exactly the VMAs that map it, in order, each with the end of what is below it",
        applies: Applies::QuiescentKernel,
        source: "Linux mm/vma.c, vma_link_file; mm/interval_tree.c; abi::objects::File::i_mmap",
        run: trees_agree,
    },
    Invariant {
        id: "R-23",
        family: Family::Rmap,
        predicate: "a file's page cache holds exactly the pages that say so, each at its number",
        applies: Applies::QuiescentKernel,
        source: FILEMAP,
        run: cache_agrees,
    },
    Invariant {
        id: "L-17",
        family: Family::Lifetime,
        predicate: "a file's references are the open files and VMAs that refer to it",
        applies: Applies::QuiescentKernel,
        source: "abi::objects::File::refcount; Linux fs/inode.c, ihold and iput",
        run: file_references,
    },
    Invariant {
        id: "L-18",
        family: Family::Lifetime,
        predicate: "an open file's references are its descriptors, a descriptor table's its tasks",
        applies: Applies::QuiescentKernel,
        source: "Linux fs/file_table.c; fs/file.c, dup_fd and put_files_struct",
        run: open_references,
    },
];

fn files_pages<'a>(context: &Context<'a>) -> impl Iterator<Item = &'a FolioView> + use<'a> {
    let folios = context.snapshot.folios.iter();
    folios.filter(|folio| folio.is(FrameKind::File))
}

/// How often each frame is in a page cache.
fn cached(context: &Context<'_>) -> BTreeMap<u64, u32> {
    let mut cached = BTreeMap::new();
    for (_, gpa) in context.snapshot.files.values().flat_map(|file| &file.pages) {
        *cached.entry(gpa >> PAGE_SHIFT).or_default() += 1;
    }
    cached
}

fn references_are_right(context: &Context<'_>, findings: &mut Findings) {
    let cached = cached(context);
    for folio in files_pages(context) {
        let caches = cached.get(&folio.frame).copied().unwrap_or(0);
        let mapped = context.mappings(folio.frame);
        let all = caches + mapped + folio.pins;
        findings.require(folio.refcount == all, || {
            Finding::new("the references of a file's page are miscounted")
                .expected(format!(
                    "refcount = {all}: {caches} page caches, {mapped} mappings, {} pins",
                    folio.pins
                ))
                .found(format!("refcount = {}", folio.refcount))
                .frame(folio.frame)
                .details(context.describe_mappings(folio.frame))
        });
    }
}

fn writable_is_shared(context: &Context<'_>, findings: &mut Findings) {
    for (space, leaf, vma, _) in context.entries_of(FrameKind::File, findings) {
        findings.require(!(leaf.rights().write && vma.is_private()), || {
            at_leaf(
                context,
                space,
                leaf,
                "a private mapping can write a page of its file",
            )
            .expected("W clear, or a shared mapping")
            .found(format!(
                "{} in VMA {}",
                flags_of(leaf.entry, leaf.level),
                vma.label()
            ))
            .details(context.describe_mappings(leaf.target() >> PAGE_SHIFT))
        });
    }
}

fn tree_leads_to_vma(context: &Context<'_>, findings: &mut Findings) {
    for (space, leaf, vma, folio) in context.entries_of(FrameKind::File, findings) {
        let file = context.snapshot.files.get(&vma.file);
        if let Some(busy) = file.and_then(tree_lock) {
            findings.skip(&busy);
            continue;
        }
        let listed = file.is_some_and(|file| file.i_mmap.iter().any(|on| on.vma == vma.gpa));
        let index = vma.index_of(leaf.gva);
        // Truncated away, and about to be unmapped from here too, it has no owner: then R-23 says so at the end.
        let owned = folio.owner == vma.file && folio.index == index;
        findings.require(listed && owned, || {
            at_leaf(
                context,
                space,
                leaf,
                "the way back from a page of a file misses one of its mappings",
            )
            .expected(format!(
                "page {index:#x} of file {:#x}, with VMA {:#x} ({}) in its tree",
                vma.file,
                vma.gpa,
                vma.label()
            ))
            .found(format!(
                "page {:#x} of file {:#x}, the VMA is {}in the tree",
                folio.index,
                folio.owner,
                if listed { "" } else { "not " }
            ))
        });
    }
}

/// Why the tree of `file` may be changing.
fn tree_lock(file: &FileView) -> Option<Busy> {
    (file.i_mmap_lock != 0)
        .then(|| Busy::new(format!("the i_mmap lock of file {:#x} is held", file.gpa)))
}

fn trees_agree(context: &Context<'_>, findings: &mut Findings) {
    let mut listed = BTreeSet::new();
    for file in context.snapshot.files.values() {
        let ends: BTreeMap<_, _> = file
            .i_mmap
            .iter()
            .map(|on| (on.vma, on.subtree_end))
            .collect();
        let mut previous = 0;
        for on in &file.i_mmap {
            listed.insert(on.vma);
            let reached = context.snapshot.vma(on.vma).is_some();
            let below = on.below.iter().filter_map(|vma| ends.get(vma));
            let end = below.fold(on.pages.1, |end, below| end.max(*below));
            let right = on.file == file.gpa
                && on.above.0 == on.above.1
                && on.pages.0 >= previous
                && on.subtree_end == end
                && reached;
            findings.require(right, || {
                Finding::new("a VMA in a file's tree is out of place")
                    .expected(format!(
                        "file = {:#x}, below {:#x}, from page {previous:#x} or later on, all below ends at {end:#x}, in an mm's tree",
                        file.gpa, on.above.0
                    ))
                    .found(format!(
                        "file = {:#x}, below {:#x}, from page {:#x} on, all below ends at {:#x}, {}",
                        on.file,
                        on.above.1,
                        on.pages.0,
                        on.subtree_end,
                        if reached { "in a tree" } else { "in no tree" }
                    ))
                    .object("Vma", on.vma)
            });
            previous = on.pages.0;
        }
    }
    let vmas = context.snapshot.mms.iter().flat_map(|mm| &mm.vmas);
    for vma in vmas.filter(|vma| vma.file != 0) {
        findings.require(listed.contains(&vma.gpa), || {
            Finding::new("a VMA that maps a file is missing in the file's tree")
                .expected(format!("in the tree of file {:#x}", vma.file))
                .found("not in it")
                .object("Vma", vma.gpa)
                .detail(vma.label())
        });
    }
}

fn cache_agrees(context: &Context<'_>, findings: &mut Findings) {
    let snapshot = context.snapshot;
    for file in snapshot.files.values() {
        let whole = file.miscounted_nodes.is_empty() && file.nr_pages == file.pages.len() as u64;
        findings.require(whole, || {
            Finding::new("a page cache miscounts its pages")
                .expected(format!("nr_pages = {}", file.pages.len()))
                .found(format!(
                    "nr_pages = {}, {} nodes miscount their slots",
                    file.nr_pages,
                    file.miscounted_nodes.len()
                ))
                .object("File", file.gpa)
        });
        for &(index, gpa) in &file.pages {
            let folio = snapshot.folio(gpa);
            let right = folio.is_some_and(|folio| {
                folio.is(FrameKind::File) && (folio.owner, folio.index) == (file.gpa, index)
            });
            findings.require(right, || {
                Finding::new("a page cache holds what is not its page")
                    .expected(format!("page {index:#x} of file {:#x}", file.gpa))
                    .found(folio.map_or("no frame".into(), |folio| {
                        format!(
                            "{} of {:#x}, index {:#x}",
                            folio.kind_name(),
                            folio.owner,
                            folio.index
                        )
                    }))
                    .frame(gpa >> PAGE_SHIFT)
                    .object("File", file.gpa)
            });
        }
    }
    let cached = cached(context);
    for folio in files_pages(context) {
        let times = cached.get(&folio.frame).copied().unwrap_or(0);
        findings.require(times == 1, || {
            Finding::new("a page of a file that is not once in its page cache: a leak")
                .expected(format!(
                    "in the page cache of file {:#x}, once",
                    folio.owner
                ))
                .found(format!("{times} times in any, refcount {}", folio.refcount))
                .frame(folio.frame)
        });
    }
}

fn file_references(context: &Context<'_>, findings: &mut Findings) {
    let snapshot = context.snapshot;
    let vmas = snapshot.mms.iter().flat_map(|mm| &mm.vmas);
    let vmas = count(vmas.map(|vma| vma.file));
    let opens = count(snapshot.open_files.values().map(|open| open.file));
    for file in snapshot.files.values() {
        let of = |counts: &BTreeMap<u64, u32>| counts.get(&file.gpa).copied().unwrap_or(0);
        let (vmas, opens) = (of(&vmas), of(&opens));
        findings.require(file.refcount == vmas + opens, || {
            Finding::new("a file's references are miscounted")
                .expected(format!(
                    "refcount = {}: {vmas} VMAs, {opens} open files",
                    vmas + opens
                ))
                .found(format!("refcount = {}", file.refcount))
                .object("File", file.gpa)
        });
    }
}

fn open_references(context: &Context<'_>, findings: &mut Findings) {
    let snapshot = context.snapshot;
    let tables = snapshot.file_tables.values();
    let descriptors = count(tables.flat_map(|table| table.open.iter().copied()));
    for open in snapshot.open_files.values() {
        let expected = descriptors.get(&open.gpa).copied().unwrap_or(0);
        findings.require(open.refcount == expected, || {
            Finding::new("an open file's references are miscounted")
                .expected(format!("refcount = {expected}, its descriptors"))
                .found(format!("refcount = {}", open.refcount))
                .object("OpenFile", open.gpa)
        });
    }
    let tasks = count(snapshot.tasks.iter().map(|task| task.files));
    for table in snapshot.file_tables.values() {
        let expected = tasks.get(&table.gpa).copied().unwrap_or(0);
        findings.require(table.users == expected, || {
            Finding::new("the users of a descriptor table are miscounted")
                .expected(format!("users = {expected}, its tasks"))
                .found(format!("users = {}", table.users))
                .object("FileTable", table.gpa)
        });
    }
}

/// How often each link occurs.
fn count(links: impl Iterator<Item = u64>) -> BTreeMap<u64, u32> {
    let mut counts = BTreeMap::new();
    for link in links {
        *counts.entry(link).or_default() += 1;
    }
    counts
}
