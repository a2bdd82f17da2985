//! A whole-state audit: everything that the objects' documentation promises, checked against the page
//! tables and against each other, and no CPU's TLB holding what it must not.

use std::collections::{BTreeMap, BTreeSet};

use abi::layout::{PAGE_SHIFT, PAGE_SIZE, USER_END};
use abi::objects::{
    AnonVma, AnonVmaChain, FrameKind, Mm, ORDERS, Pa, SLABS, SlabId, Vma, VmaNode, folio_flags,
    vma_flags,
};
use abi::pte::{Pte, PteFlags, index, level_size};

use crate::Kernel;
use crate::arch::Arch;
use crate::arch::testing::Access;
use crate::mm::vma::ACCESS;
use crate::mm::{Field, Slot};

use super::TestKernel;

#[derive(Default)]
struct Found {
    mms: Vec<Pa<Mm>>,
    vmas: BTreeSet<u64>,
    nodes: BTreeSet<u64>,
    chains: BTreeSet<u64>,
    anons: BTreeSet<u64>,
    tables: BTreeSet<u64>,
    /// Mappings by frame: (mm, gva).
    mapped: BTreeMap<u64, BTreeSet<(u64, u64)>>,
}

/// Checks everything, on the test machine its TLBs too. No operation may be in flight.
pub(crate) fn audit(kernel: &TestKernel) {
    audit_memory(kernel);
    audit_tlbs(kernel);
}

/// Checks everything but what CPUs have cached. No operation may be in flight.
pub(crate) fn audit_memory<A: Arch>(kernel: &Kernel<A>) {
    let mut found = Found::default();
    let root = kernel.root();
    let mut mm = root.mms.get();
    while let Some(pa) = mm.some() {
        found.mms.push(pa);
        audit_mm(kernel, pa, &mut found);
        mm = kernel.obj(pa).next.get();
    }
    audit_rmap(kernel, &mut found);
    audit_frames(kernel, &found);
    audit_slabs(kernel, &found);
    for lock in [&root.buddy_lock, &root.mms_lock] {
        assert_eq!(lock.get(), 0, "a lock is held");
    }
}

/// Checks that no memory is in use but the slabs' pages and what was taken at boot.
pub(crate) fn nothing_left<A: Arch>(kernel: &Kernel<A>) {
    let root = kernel.root();
    assert!(root.mms.get().is_null());
    for slab in &root.slabs[..SLABS] {
        assert_eq!(slab.used.get(), 0);
    }
    for frame in 1..root.nr_frames.get() {
        let kind = kernel.frame_folio(frame).kind.get();
        let idle = [FrameKind::Tail, FrameKind::Buddy, FrameKind::PerCpu];
        let kept = [FrameKind::Slab, FrameKind::Kernel];
        assert!(
            idle.iter().chain(&kept).any(|&k| k as u8 == kind),
            "frame {frame:#x} of kind {kind} leaked"
        );
    }
}

fn audit_mm<A: Arch>(kernel: &Kernel<A>, pa: Pa<Mm>, found: &mut Found) {
    let mm = kernel.obj(pa);
    assert!(mm.id.get() > 0 && mm.generation.get() % 2 == 1);
    assert_eq!(mm.mmap_lock.get(), 0);
    assert_eq!(mm.flush_pending.get(), 0);
    let loaded = kernel.root().cpus[..kernel.arch.nr_cpus()]
        .iter()
        .enumerate()
        .filter(|(_, cpu)| cpu.loaded_mm.get() == pa);
    let mask = loaded.clone().fold(0, |mask, (cpu, _)| mask | 1u64 << cpu);
    assert_eq!(
        mm.cpumask.get(),
        mask,
        "cpumask is exactly who has it loaded"
    );
    let users = u32::from(mm.users.get() > 0);
    assert_eq!(mm.count.get(), users + loaded.count() as u32);

    let vmas = audit_tree(kernel, pa, found);
    assert_eq!(mm.map_count.get(), vmas.len() as u64);
    let (mut tables, mut rss) = (1, 0);
    audit_table(
        kernel,
        pa,
        (mm.pgd.get(), 4, 0),
        &mut tables,
        &mut rss,
        found,
    );
    assert_eq!((mm.tables.get(), mm.rss.get()), (tables, rss));
}

/// Checks the tree of VMAs; returns them in order.
pub(crate) fn tree_of<A: Arch>(kernel: &Kernel<A>, pa: Pa<Mm>) -> Vec<Pa<Vma>> {
    audit_tree(kernel, pa, &mut Found::default())
}

fn audit_tree<A: Arch>(kernel: &Kernel<A>, pa: Pa<Mm>, found: &mut Found) -> Vec<Pa<Vma>> {
    let mut vmas = Vec::new();
    let mut end_before = 0;
    if let Some(root) = kernel.obj(pa).vmas.get().some() {
        let level = kernel.obj(root).level.get();
        audit_node(kernel, root, level, true, &mut end_before, &mut vmas, found);
    }
    for &vma in &vmas {
        let area = kernel.obj(vma);
        let (start, end) = (area.start.get(), area.end.get());
        assert!(start < end && end <= USER_END && (start | end) % PAGE_SIZE == 0);
        assert!(area.mm.get() == pa && area.attached.get() == 1);
        assert_eq!(area.generation.get() % 2, 1);
        assert!(found.vmas.insert(vma.0), "VMA {vma:?} is in two trees");
    }
    vmas
}

fn audit_node<A: Arch>(
    kernel: &Kernel<A>,
    node: Pa<VmaNode>,
    level: u32,
    is_root: bool,
    end_before: &mut u64,
    vmas: &mut Vec<Pa<Vma>>,
    found: &mut Found,
) -> (u64, u64) {
    assert!(found.nodes.insert(node.0), "node {node:?} has two parents");
    let object = kernel.obj(node);
    assert_eq!(object.level.get(), level);
    let count = object.count.get() as usize;
    let least = match (is_root, level) {
        (false, _) => object.slots.len() / 2,
        (true, 0) => 1,
        (true, _) => 2,
    };
    assert!(count >= least, "node with {count} entries");
    let mut gap = 0;
    for slot in &object.slots[..count] {
        let (start, below) = if level == 0 {
            let vma = Pa::<Vma>::new(slot.child.get());
            let (start, end) = (kernel.obj(vma).start.get(), kernel.obj(vma).end.get());
            assert!(start >= *end_before, "VMAs overlap at {start:#x}");
            let hole = start - *end_before;
            *end_before = end;
            vmas.push(vma);
            (start, hole)
        } else {
            let child = Pa::new(slot.child.get());
            audit_node(kernel, child, level - 1, false, end_before, vmas, found)
        };
        assert_eq!((slot.start.get(), slot.gap.get()), (start, below));
        gap = gap.max(below);
    }
    (object.slots[0].start.get(), gap)
}

fn audit_table<A: Arch>(
    kernel: &Kernel<A>,
    pa: Pa<Mm>,
    (table, level, base): (u64, u8, u64),
    tables: &mut u64,
    rss: &mut u64,
    found: &mut Found,
) {
    let mm = kernel.obj(pa);
    let folio = kernel.folio(table);
    assert_eq!(folio.kind.get(), FrameKind::Table as u8);
    assert_eq!(
        (folio.owner.get(), folio.index.get()),
        (pa.0, u64::from(level))
    );
    assert_eq!((folio.lock.get(), folio.refcount.get()), (0, 1));
    assert!(found.tables.insert(table), "table {table:#x} linked twice");
    let user_half = if level == 4 { 256 } else { 512 };
    let mut used = 0;
    for index in 0..512 {
        let entry = kernel.read_pte(Slot {
            table,
            level,
            index,
        });
        if !entry.is_present() {
            assert!(entry.is_none());
            continue;
        }
        used += 1;
        if index >= user_half {
            continue;
        }
        let gva = base + index as u64 * level_size(level);
        if level > 1 {
            *tables += 1;
            let child = (entry.address(), level - 1, gva);
            audit_table(kernel, pa, child, tables, rss, found);
            continue;
        }
        *rss += 1;
        audit_leaf(kernel, mm, gva, entry);
        let mappings = found.mapped.entry(entry.address()).or_default();
        assert!(mappings.insert((pa.0, gva)));
    }
    assert_eq!(folio.used.get(), used, "entries of table {table:#x}");
}

fn audit_leaf<A: Arch>(kernel: &Kernel<A>, mm: &Mm, gva: u64, entry: Pte) {
    let vma = kernel.vma_at(mm, gva).expect("an entry without a VMA");
    let vma = kernel.obj(vma);
    let (vma_flags, flags) = (vma.flags.get(), entry.flags());
    assert_eq!(flags.contains(PteFlags::USER), vma_flags & ACCESS != 0);
    assert_eq!(
        flags.contains(PteFlags::NO_EXECUTE),
        vma_flags & vma_flags::EXEC == 0
    );
    assert!(flags.contains(PteFlags::ACCESSED));
    let folio = kernel.folio(entry.address());
    assert_eq!(folio.kind.get(), FrameKind::Anon as u8);
    let index = vma.pgoff.get() + ((gva - vma.start.get()) >> PAGE_SHIFT);
    assert_eq!(folio.index.get(), index);
    if flags.contains(PteFlags::WRITE) {
        assert!(flags.contains(PteFlags::DIRTY) && !flags.contains(PteFlags::COW));
        assert!(vma_flags & vma_flags::WRITE != 0);
        assert!(folio.flags.get() & folio_flags::EXCLUSIVE != 0);
    }
}

/// Every folio is found by the walk exactly where the page tables map it; every count of an anon_vma
/// is what the lists say.
fn audit_rmap<A: Arch>(kernel: &Kernel<A>, found: &mut Found) {
    for &vma in &found.vmas {
        let area = kernel.obj(Pa::<Vma>::new(vma));
        let mut chain = area.chains.get();
        let mut has_own = area.anon_vma.get().is_null();
        while let Some(pa) = chain.some() {
            let link = kernel.obj(pa);
            assert_eq!((link.vma.get().0, link.generation.get() % 2), (vma, 1));
            has_own |= link.anon_vma.get() == area.anon_vma.get();
            assert!(found.chains.insert(pa.0));
            let mut anon = link.anon_vma.get();
            while found.anons.insert(anon.0) {
                anon = kernel.obj(anon).parent.get();
            }
            chain = link.next_of_vma.get();
        }
        assert!(has_own, "a VMA is on its own anon_vma's list");
    }
    let mut listed = 0;
    for &anon in &found.anons {
        listed += audit_anon_vma(kernel, Pa::new(anon), found);
    }
    assert_eq!(listed, found.chains.len());
    for (&gpa, mappings) in &found.mapped {
        let folio = kernel.folio(gpa);
        assert_eq!(folio.mapcount.get() as usize, mappings.len(), "{gpa:#x}");
        assert_eq!(folio.refcount.get() as usize, mappings.len());
        assert!(mappings.len() == 1 || folio.flags.get() & folio_flags::EXCLUSIVE == 0);
        assert!(found.anons.contains(&folio.owner.get()), "anon_vma is gone");
        let mut walked = BTreeSet::new();
        kernel.rmap_walk(gpa, |mm, _, gva, _| {
            assert!(walked.insert((mm.0, gva)));
        });
        assert_eq!(&walked, mappings, "the walk of {gpa:#x}");
    }
}

/// Checks the counts of one anon_vma; returns the length of its list.
fn audit_anon_vma<A: Arch>(kernel: &Kernel<A>, pa: Pa<AnonVma>, found: &Found) -> usize {
    let anon = kernel.obj(pa);
    assert_eq!((anon.generation.get() % 2, anon.lock.get()), (1, 0));
    let active = found
        .vmas
        .iter()
        .filter(|&&vma| kernel.obj(Pa::<Vma>::new(vma)).anon_vma.get() == pa)
        .count() as u32;
    let children = found
        .anons
        .iter()
        .filter(|&&a| a != pa.0 && kernel.obj(Pa::<AnonVma>::new(a)).parent.get() == pa)
        .count() as u32;
    let mut chains: u32 = 0;
    let mut prev = Pa::<AnonVmaChain>::NULL;
    let mut chain = anon.chains.get();
    while let Some(link) = chain.some() {
        assert!(found.chains.contains(&link.0), "a chain of no live VMA");
        assert_eq!(kernel.obj(link).prev_of_anon.get(), prev);
        assert_eq!(kernel.obj(link).anon_vma.get(), pa);
        chains += 1;
        (prev, chain) = (link, kernel.obj(link).next_of_anon.get());
    }
    assert!(chains > 0, "an anon_vma without VMAs");
    let own_root = u32::from(anon.root.get() == pa);
    assert_eq!(anon.active.get(), active);
    assert_eq!(anon.degree.get(), active + children);
    assert_eq!(anon.refcount.get(), active + children + chains + own_root);
    chains as usize
}

/// Memory is tiled by blocks, each is where its kind says, and the counts add up.
fn audit_frames<A: Arch>(kernel: &Kernel<A>, found: &Found) {
    let root = kernel.root();
    let (first, nr) = (root.first_frame.get(), root.nr_frames.get());
    let mut listed = BTreeMap::new();
    for order in 0..ORDERS {
        let (mut prev, mut frame) = (0, root.buddy[order].get());
        while frame != 0 {
            let folio = kernel.frame_folio(frame);
            assert_eq!(folio.kind.get(), FrameKind::Buddy as u8);
            assert_eq!(
                (usize::from(folio.order.get()), folio.prev.get()),
                (order, prev)
            );
            assert!(listed.insert(frame, 1u64 << order).is_none());
            (prev, frame) = (frame, folio.next.get());
        }
    }
    for (cpu, state) in root.cpus.iter().enumerate() {
        let (mut count, mut frame) = (0, state.free_list.get());
        while frame != 0 {
            let folio = kernel.frame_folio(frame);
            assert_eq!(folio.kind.get(), FrameKind::PerCpu as u8);
            assert_eq!((folio.owner.get(), folio.order.get()), (cpu as u64, 0));
            assert!(listed.insert(frame, 1).is_none());
            count += 1;
            frame = folio.next.get();
        }
        assert_eq!(state.free_count.get(), count);
    }
    let free: u64 = listed.values().sum();
    assert_eq!(root.free_frames.get(), free);
    let mut seen_free = 0;
    let mut frame = 1;
    let mut by_kind = BTreeMap::<u8, u64>::new();
    while frame < nr {
        let folio = kernel.frame_folio(frame);
        let kind = FrameKind::from_u8(folio.kind.get()).expect("a kind");
        let order = folio.order.get();
        if kind == FrameKind::Tail {
            assert!(frame < first, "frame {frame:#x} is in no block");
            frame += 1;
            continue;
        }
        assert_eq!(frame % (1 << order), 0);
        assert_eq!(
            folio.refcount.get() == 0,
            kind.is_free(),
            "frame {frame:#x}"
        );
        assert_eq!(listed.contains_key(&frame), kind.is_free());
        if kind == FrameKind::Anon {
            let gpa = frame << PAGE_SHIFT;
            assert!(found.mapped.contains_key(&gpa), "folio {gpa:#x} leaked");
        }
        if kind.is_free() {
            seen_free += 1 << order;
            let gpa = frame << PAGE_SHIFT;
            assert!(
                !found.mapped.contains_key(&gpa),
                "free frame {gpa:#x} mapped"
            );
            assert_eq!(folio.mapcount.get(), 0);
        }
        *by_kind.entry(folio.kind.get()).or_default() += 1;
        for tail in frame + 1..frame + (1 << order) {
            assert_eq!(kernel.frame_folio(tail).kind.get(), FrameKind::Tail as u8);
        }
        frame += 1 << order;
    }
    assert_eq!((frame, seen_free), (nr, free));
    let count = |kind: FrameKind| by_kind.get(&(kind as u8)).copied().unwrap_or(0);
    assert_eq!(count(FrameKind::Table), found.tables.len() as u64);
    assert_eq!(count(FrameKind::Unset), 0);
    let slabs: u64 = root.slabs.iter().map(|slab| slab.frames.get()).sum();
    assert_eq!(count(FrameKind::Slab), slabs);
}

fn audit_slabs<A: Arch>(kernel: &Kernel<A>, found: &Found) {
    let used = |id: SlabId| kernel.root().slabs[id as usize].used.get() as usize;
    assert_eq!(used(SlabId::Mm), found.mms.len() + audit_retired(kernel));
    assert_eq!(used(SlabId::Vma), found.vmas.len());
    assert_eq!(used(SlabId::VmaNode), found.nodes.len());
    assert_eq!(used(SlabId::AnonVmaChain), found.chains.len());
    assert_eq!(used(SlabId::AnonVma), found.anons.len());
}

/// Checks that exactly the retired tables are on the CPUs' lists; returns how many take an mm with them.
fn audit_retired<A: Arch>(kernel: &Kernel<A>) -> usize {
    let root = kernel.root();
    let mut listed = BTreeSet::new();
    for cpu in &root.cpus {
        assert!(cpu.rcu.waiting.get() == 0 || cpu.rcu.grace.get() % 2 == 1);
        for list in [&cpu.rcu.retired, &cpu.rcu.waiting] {
            let mut frame = list.get();
            while frame != 0 {
                assert!(listed.insert(frame), "table {frame:#x} retired twice");
                frame = kernel.frame_folio(frame).next.get();
            }
        }
    }
    let is_retired =
        |frame: &u64| kernel.frame_folio(*frame).kind.get() == FrameKind::Retired as u8;
    let retired: BTreeSet<u64> = (1..root.nr_frames.get()).filter(is_retired).collect();
    assert_eq!(retired, listed);
    let roots = retired
        .iter()
        .filter(|&&frame| kernel.frame_folio(frame).index.get() == 4);
    roots.count()
}

/// What a CPU has cached must be what the tables say: nothing that they no longer permit. A lazy CPU
/// may be behind with leaf entries, never with tables.
fn audit_tlbs(kernel: &TestKernel) {
    for cpu in 0..kernel.arch.nr_cpus() {
        let state = &kernel.root().cpus[cpu];
        let Some(pa) = state.loaded_mm.get().some() else {
            continue;
        };
        let mm = kernel.obj(pa);
        let tlb = kernel.arch.tlb(cpu);
        for (&gva, &table) in &tlb.tables {
            assert_eq!(
                kernel.leaf_table(mm, gva),
                Ok(table),
                "CPU {cpu} may walk a freed table"
            );
        }
        let behind = state.tlb_gen.get() < mm.tlb_gen.get();
        if behind {
            assert_eq!(state.lazy.get(), 1, "CPU {cpu} has missed a flush");
            continue;
        }
        for (&gva, &cached) in &tlb.pages {
            let now = kernel
                .leaf_table(mm, gva)
                .map_or(Pte::NONE, |table| kernel.read_pte(Slot::new(table, 1, gva)));
            assert_eq!(
                now.address(),
                cached.address(),
                "CPU {cpu}, {gva:#x} is stale"
            );
            for access in [Access::Read, Access::Write, Access::Fetch] {
                let stale = access.allowed_by(cached) && !access.allowed_by(now);
                assert!(!stale, "CPU {cpu} may still {access:?} {gva:#x}");
            }
            assert!(index(gva, 4) < 256);
        }
    }
}
