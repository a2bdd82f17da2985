//! A whole-state audit: everything that the objects' documentation promises, checked against the page
//! tables and against each other, and no CPU's TLB holding what it must not.

use std::collections::{BTreeMap, BTreeSet};

use abi::layout::{PAGE_SHIFT, PAGE_SIZE, USER_END};
use abi::objects::{
    AnonVma, AnonVmaChain, CacheNode, CpuRcu, File, FrameKind, Mm, ORDERS, Pa, SLABS, SlabId, Vma,
    VmaNode, VmaRefs, folio_flags, vma_flags,
};
use abi::pte::{NonPresent, Pte, PteFlags, index, level_size};

use crate::Kernel;
use crate::arch::Arch;
use crate::arch::model::testing::{Access, Tlb};
use crate::mm::vma::ACCESS;
use crate::mm::{Field, Slot};

use super::TestKernel;

#[derive(Default)]
pub(super) struct Found {
    mms: Vec<Pa<Mm>>,
    vmas: BTreeSet<u64>,
    nodes: BTreeSet<u64>,
    chains: BTreeSet<u64>,
    anons: BTreeSet<u64>,
    files: BTreeSet<u64>,
    cache_nodes: BTreeSet<u64>,
    /// Frames in page caches.
    cached: BTreeSet<u64>,
    tables: BTreeSet<u64>,
    /// Entries of 2 MiB: head, mm, gva.
    huge: BTreeSet<(u64, u64, u64)>,
    /// Mappings by folio: (mm, gva).
    pub(super) mapped: BTreeMap<u64, BTreeSet<(u64, u64)>>,
    /// Entries by the swap slot that they name.
    pub(super) swapped: BTreeMap<u64, u32>,
}

impl Found {
    fn huge_in(&self, mm: Pa<Mm>) -> u64 {
        self.huge.iter().filter(|(_, of, _)| *of == mm.0).count() as u64
    }
}

/// Checks everything, on the test machine its TLBs too. No operation may be in flight.
pub(crate) fn audit(kernel: &TestKernel) {
    audit_memory(kernel);
    audit_tlbs(kernel);
    super::audit_disk::audit_contents(kernel);
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
    audit_files(kernel, &mut found);
    audit_rmap(kernel, &mut found);
    audit_frames(kernel, &found);
    audit_slabs(kernel, &found);
    super::audit_swap::audit_swap(kernel, &found);
    super::audit_groups::audit_groups(kernel);
    super::audit_disk::audit_disk_pages(kernel, &found);
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
        let kept = [FrameKind::Slab, FrameKind::Kernel, FrameKind::Zero];
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
    let huge = found.huge_in(pa);
    assert_eq!(mm.huge.get(), huge, "entries of 2 MiB");
    audit_counters(kernel, mm, &vmas);
}

/// The counters that limits are held against are sums over the VMAs.
fn audit_counters<A: Arch>(kernel: &Kernel<A>, mm: &Mm, vmas: &[Pa<Vma>]) {
    let sum = |counts: &dyn Fn(u64) -> bool| -> u64 {
        let areas = vmas.iter().map(|&vma| kernel.obj(vma));
        let counted = areas.filter(|area| counts(area.flags.get()));
        counted
            .map(|area| (area.end.get() - area.start.get()) >> PAGE_SHIFT)
            .sum()
    };
    assert_eq!(mm.total_vm.get(), sum(&|_| true), "total_vm");
    assert_eq!(mm.data_vm.get(), sum(&vma_flags::is_data), "data_vm");
    let is_locked = |flags| flags & vma_flags::LOCKED != 0;
    assert_eq!(mm.locked_vm.get(), sum(&is_locked), "locked_vm");
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
        assert!(area.mm.get() == pa && area.refs.get() == VmaRefs::ATTACHED);
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
    let mut set_aside = folio.prev.get() << PAGE_SHIFT;
    assert!(level == 2 || set_aside == 0);
    let mut spare = 0;
    while set_aside != 0 {
        let folio = kernel.folio(set_aside);
        assert_eq!(folio.kind.get(), FrameKind::Table as u8);
        assert_eq!((folio.owner.get(), folio.index.get()), (pa.0, 1));
        assert_eq!((folio.used.get(), folio.refcount.get()), (0, 1));
        assert!(found.tables.insert(set_aside), "table {set_aside:#x} twice");
        spare += 1;
        set_aside = folio.next.get() << PAGE_SHIFT;
    }
    *tables += spare;
    for index in 0..512 {
        let entry = kernel.read_pte(Slot {
            table,
            level,
            index,
        });
        if entry.is_none() {
            continue;
        }
        used += 1;
        if !entry.is_present() {
            assert_eq!(level, 1);
            match entry.non_present() {
                Some(NonPresent::Swap { slot, .. }) => {
                    assert!(kernel.vma_at(mm, base + index as u64 * PAGE_SIZE).is_some());
                    *found.swapped.entry(slot).or_default() += 1;
                }
                other => panic!("entry {:#x}: {other:?}", entry.0),
            }
            continue;
        }
        if index >= user_half {
            continue;
        }
        let gva = base + index as u64 * level_size(level);
        if level == 2 && entry.is_huge() {
            spare -= 1;
            *rss += 512;
            audit_huge_leaf(kernel, mm, gva, entry);
            assert!(found.huge.insert((entry.address(), pa.0, gva)));
            let mappings = found.mapped.entry(entry.address()).or_default();
            assert!(mappings.insert((pa.0, gva)));
            continue;
        }
        if level > 1 {
            *tables += 1;
            let child = (entry.address(), level - 1, gva);
            audit_table(kernel, pa, child, tables, rss, found);
            continue;
        }
        *rss += 1;
        audit_leaf(kernel, mm, gva, entry);
        if entry.flags().contains(PteFlags::SPECIAL) {
            continue;
        }
        let head = kernel.head(entry.address());
        let mappings = found.mapped.entry(head).or_default();
        assert!(mappings.insert((pa.0, gva)));
    }
    assert_eq!(spare, 0, "tables set aside and entries of 2 MiB");
    assert_eq!(folio.used.get(), used, "entries of table {table:#x}");
}

/// Beside what every leaf is: it lies in one VMA, and maps the whole of a folio.
fn audit_huge_leaf<A: Arch>(kernel: &Kernel<A>, mm: &Mm, gva: u64, entry: Pte) {
    audit_leaf(kernel, mm, gva, entry);
    let vma = kernel.obj(kernel.vma_at(mm, gva).expect("a VMA"));
    assert!(vma.end.get() >= gva + level_size(2));
    let folio = kernel.folio(entry.address());
    assert_eq!(folio.order.get(), 9);
    assert_eq!(entry.address() % level_size(2), 0);
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
    // Only reclaim takes it away.
    assert!(flags.contains(PteFlags::ACCESSED) || kernel.config.swap_slots != 0);
    let page = kernel.folio(entry.address());
    let head = kernel.head(entry.address());
    let folio = kernel.folio(head);
    let special = flags.contains(PteFlags::SPECIAL);
    assert_eq!(special, entry.address() == kernel.root().zero_frame.get());
    if special {
        assert!(!flags.intersects(PteFlags::WRITE | PteFlags::DIRTY | PteFlags::COW));
        return;
    }
    let of_file = folio.kind.get() == FrameKind::File as u8;
    assert!(of_file || folio.kind.get() == FrameKind::Anon as u8);
    let shared = vma_flags & vma_flags::SHARED != 0;
    assert!(of_file || !shared, "a private page in a shared mapping");
    assert!(!of_file || folio.owner.get() == vma.file.get().0);
    let index = vma.pgoff.get() + ((gva - vma.start.get()) >> PAGE_SHIFT);
    let offset = (entry.address() - head) >> PAGE_SHIFT;
    assert_eq!(folio.index.get() + offset, index);
    if flags.contains(PteFlags::WRITE) {
        assert!(flags.contains(PteFlags::DIRTY) && !flags.contains(PteFlags::COW));
        assert!(vma_flags & vma_flags::WRITE != 0);
        assert!(shared || page.flags.get() & folio_flags::EXCLUSIVE != 0);
        assert!(shared || !of_file, "a private mapping writes its file");
    }
}

/// Each file's list of VMAs, tree of pages and counts; references may come from open files as well.
fn audit_files<A: Arch>(kernel: &Kernel<A>, found: &mut Found) {
    let mut mapped = BTreeMap::<u64, BTreeSet<u64>>::new();
    for &vma in &found.vmas {
        let area = kernel.obj(Pa::<Vma>::new(vma));
        let shared = area.flags.get() & vma_flags::SHARED != 0;
        match area.file.get().some() {
            Some(file) => assert!(mapped.entry(file.0).or_default().insert(vma)),
            None => assert!(!shared, "a shared mapping without a file"),
        }
    }
    for frame in 1..kernel.root().nr_frames.get() {
        let folio = kernel.frame_folio(frame);
        if folio.kind.get() == FrameKind::File as u8 {
            assert_ne!(folio.owner.get(), 0, "a page of no file");
            mapped.entry(folio.owner.get()).or_default();
        }
    }
    for (file, vmas) in mapped {
        found.files.insert(file);
        let object = kernel.obj(Pa::<File>::new(file));
        assert_eq!(object.generation.get() % 2, 1);
        let locks = [&object.inode_lock, &object.lock, &object.i_mmap_lock];
        assert!(locks.iter().all(|lock| lock.get() == 0));
        let mut listed = BTreeSet::new();
        audit_mappings(kernel, (Pa::NULL, object.i_mmap.get()), &mut |vma| {
            assert!(listed.insert(vma.0));
        });
        assert_eq!(listed, vmas, "who maps the file");
        assert!(object.refcount.get() as usize >= vmas.len());
        let mut pages = 0;
        if let Some(root) = object.pages.get().some() {
            audit_cache(
                kernel,
                file,
                root,
                object.height.get(),
                0,
                &mut pages,
                found,
            );
        }
        assert_eq!(object.nr_pages.get(), pages);
        assert_eq!(object.height.get() == 0, pages == 0);
    }
}

/// The tree of a file's mappings below `vma`, in order; returns its end.
fn audit_mappings<A: Arch>(
    kernel: &Kernel<A>,
    (above, vma): (Pa<Vma>, Pa<Vma>),
    f: &mut impl FnMut(Pa<Vma>),
) -> u64 {
    if vma.is_null() {
        return 0;
    }
    let area = kernel.obj(vma);
    assert_eq!(area.parent_of_file.get(), above);
    let left = audit_mappings(kernel, (vma, area.left_of_file.get()), f);
    f(vma);
    let right = audit_mappings(kernel, (vma, area.right_of_file.get()), f);
    let pages = (area.end.get() - area.start.get()) >> PAGE_SHIFT;
    let end = (area.pgoff.get() + pages).max(left).max(right);
    assert_eq!(area.subtree_end.get(), end);
    end
}

fn audit_cache<A: Arch>(
    kernel: &Kernel<A>,
    file: u64,
    node: Pa<CacheNode>,
    level: u64,
    base: u64,
    pages: &mut u64,
    found: &mut Found,
) {
    assert!(found.cache_nodes.insert(node.0));
    let object = kernel.obj(node);
    let mut used = 0;
    for (at, word) in object.slots.iter().enumerate() {
        let word = word.get();
        if word == 0 {
            continue;
        }
        used += 1;
        let index = base + ((at as u64) << (6 * (level - 1)));
        if level > 1 {
            audit_cache(kernel, file, Pa::new(word), level - 1, index, pages, found);
            continue;
        }
        *pages += 1;
        let folio = kernel.folio(word);
        assert_eq!(folio.kind.get(), FrameKind::File as u8);
        assert_eq!((folio.owner.get(), folio.index.get()), (file, index));
        let mapped = found.mapped.get(&word).map_or(0, BTreeSet::len);
        // What is mapped was used.
        let legal = if mapped == 0 { folio_flags::FRESH } else { 0 };
        assert_eq!((folio.lock.get(), folio.flags.get() & !legal), (0, 0));
        assert_eq!(folio.refcount.get() as usize, mapped + 1);
        assert_eq!(folio.mapcount.get() as usize, mapped);
        assert!(found.cached.insert(word));
    }
    assert!(used > 0 && object.count.get() == used);
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
        let pins = folio.pins.get() as usize;
        if folio.kind.get() == FrameKind::File as u8 {
            assert!(found.cached.contains(&gpa), "mapped and truncated away");
        } else {
            let is_large = folio.order.get() > 0;
            let huge = found.huge.iter().filter(|(head, ..)| *head == gpa).count();
            let cached = if is_large {
                assert_eq!(
                    folio.used.get() as usize,
                    huge,
                    "entries of 2 MiB of {gpa:#x}"
                );
                0
            } else {
                usize::from(folio.used.get() != 0)
            };
            assert_eq!(
                folio.refcount.get() as usize,
                mappings.len() + pins + cached
            );
            let is_exclusive = folio.flags.get() & folio_flags::EXCLUSIVE != 0;
            assert!(mappings.len() == 1 || is_large || !is_exclusive);
            assert!(found.anons.contains(&folio.owner.get()), "anon_vma is gone");
        }
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
    let zero = kernel.folio(root.zero_frame.get());
    assert_eq!((zero.refcount.get(), zero.mapcount.get()), (1, 0));
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
            let used = found.mapped.contains_key(&gpa) || folio.used.get() != 0;
            assert!(used, "folio {gpa:#x} leaked");
        }
        if kind == FrameKind::File {
            let gpa = frame << PAGE_SHIFT;
            assert!(
                found.cached.contains(&gpa),
                "page {gpa:#x} of a file leaked"
            );
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
    assert_eq!((count(FrameKind::Unset), count(FrameKind::Zero)), (0, 1));
    assert_eq!(count(FrameKind::Slab), slab_frames(kernel));
}

/// Frames of the slabs, which keep what they once had.
pub(crate) fn slab_frames<A: Arch>(kernel: &Kernel<A>) -> u64 {
    let slabs = kernel.root().slabs.iter();
    slabs.map(|slab| slab.frames.get()).sum()
}

fn audit_slabs<A: Arch>(kernel: &Kernel<A>, found: &Found) {
    let used = |id: SlabId| kernel.root().slabs[id as usize].used.get() as usize;
    assert_eq!(used(SlabId::Mm), found.mms.len() + audit_retired(kernel));
    assert_eq!(used(SlabId::Vma), found.vmas.len());
    assert_eq!(used(SlabId::VmaNode), found.nodes.len());
    assert_eq!(used(SlabId::AnonVmaChain), found.chains.len());
    assert_eq!(used(SlabId::AnonVma), found.anons.len());
    assert_eq!(used(SlabId::CacheNode), found.cache_nodes.len());
    // A file without pages that nobody maps is not found.
    assert!(used(SlabId::File) >= found.files.len());
}

/// Checks that exactly the retired tables are on the CPUs' lists; returns how many take an mm with them.
fn audit_retired<A: Arch>(kernel: &Kernel<A>) -> usize {
    let root = kernel.root();
    let mut listed = BTreeSet::new();
    for cpu in &root.cpus {
        assert!(cpu.rcu.waiting.get() == 0 || cpu.rcu.grace.get() % 2 == 1);
        for list in [&cpu.rcu.retired, &cpu.rcu.waiting] {
            let mut next = list.get();
            while next != 0 {
                assert!(listed.insert(next), "{next:#x} retired twice");
                let node = next & !CpuRcu::IS_NODE;
                next = if node == next {
                    kernel.folio(next).next.get()
                } else {
                    kernel.obj(Pa::<VmaNode>::new(node)).next_retired.get()
                };
            }
        }
    }
    let is_retired =
        |frame: &u64| kernel.frame_folio(*frame).kind.get() == FrameKind::Retired as u8;
    let retired: BTreeSet<u64> = (1..root.nr_frames.get()).filter(is_retired).collect();
    let (nodes, tables): (BTreeSet<_>, BTreeSet<_>) = listed
        .iter()
        .partition(|object| **object & CpuRcu::IS_NODE != 0);
    assert_eq!(
        tables,
        retired.iter().map(|frame| frame << PAGE_SHIFT).collect()
    );
    assert_eq!(
        root.slabs[SlabId::VmaNode as usize].retired.get(),
        nodes.len() as u64
    );
    let roots = retired
        .iter()
        .filter(|&&frame| kernel.frame_folio(frame).index.get() == 4);
    roots.count()
}

/// What a CPU has cached must be what the tables say: nothing that they no longer permit. A lazy CPU
/// may be behind with leaf entries, never with tables; a slot that is not loaded with both.
fn audit_tlbs(kernel: &TestKernel) {
    for cpu in 0..kernel.arch.nr_cpus() {
        let state = &kernel.root().cpus[cpu];
        if let Some(pa) = state.loaded_mm.get().some() {
            let mm = kernel.obj(pa);
            assert_eq!(state.loaded_asid().mm.get(), mm.id.get(), "CPU {cpu}");
            let tlb = kernel.tlb(cpu);
            let behind = state.loaded_asid().tlb_gen.get() < mm.tlb_gen.get();
            audit_pointers(kernel, pa, &tlb, behind);
            if behind {
                assert_eq!(state.lazy.get(), 1, "CPU {cpu} has missed a flush");
            } else {
                audit_leaves(kernel, mm, &tlb);
            }
        }
        audit_asids(kernel, cpu);
    }
}

/// What a slot has that counts as flushed will be used as it is when it is loaded.
fn audit_asids(kernel: &TestKernel, cpu: usize) {
    let state = &kernel.root().cpus[cpu];
    let root = kernel.root();
    let mms = std::iter::successors(root.mms.get().some(), |mm| {
        kernel.obj(*mm).next.get().some()
    });
    let by_id: BTreeMap<u64, Pa<Mm>> = mms.map(|mm| (kernel.obj(mm).id.get(), mm)).collect();
    let mut named = BTreeSet::new();
    for (slot, asid) in state.asids.iter().enumerate() {
        let id = asid.mm.get();
        assert!(id == 0 || named.insert(id), "CPU {cpu}: mm {id} twice");
        if let Some(mm) = by_id.get(&id).map(|mm| kernel.obj(*mm)) {
            let (have, latest) = (asid.tlb_gen.get(), mm.tlb_gen.get());
            assert!(have <= latest, "CPU {cpu}, slot {slot} is ahead of mm {id}");
            if have == latest && kernel.has_pcids() {
                let tlb = kernel.tlb_of(cpu, slot as u64 + 1);
                audit_pointers(kernel, by_id[&id], &tlb, false);
                audit_leaves(kernel, mm, &tlb);
            }
        }
    }
}

/// A table that has moved is as good as one that has not, to who flushes before it runs user code.
fn audit_pointers(kernel: &TestKernel, mm: Pa<Mm>, tlb: &Tlb, behind: bool) {
    for (&gva, &table) in &tlb.tables {
        let folio = kernel.folio(table);
        let is_live = (folio.kind.get(), folio.owner.get()) == (FrameKind::Table as u8, mm.0);
        let now = kernel.leaf_table(kernel.obj(mm), gva);
        let may_walk = behind && is_live || now == Ok(table);
        assert!(may_walk, "a CPU may walk a freed table");
    }
}

fn audit_leaves(kernel: &TestKernel, mm: &Mm, tlb: &Tlb) {
    for (&gva, &cached) in &tlb.pages {
        let now = kernel
            .leaf_table(mm, gva)
            .map_or(Pte::NONE, |table| kernel.read_pte(Slot::new(table, 1, gva)));
        assert_eq!(now.address(), cached.address(), "{gva:#x} is stale");
        assert!(
            tlb.huge.is_empty() || !tlb.huge.contains_key(&(gva & !0x1f_ffff)),
            "{gva:#x} in two sizes"
        );
        for access in [Access::Read, Access::Write, Access::Fetch] {
            let stale = access.allowed_by(cached) && !access.allowed_by(now);
            assert!(!stale, "a CPU may still {access:?} {gva:#x}");
        }
        assert!(index(gva, 4) < 256);
    }
    for (&gva, &cached) in &tlb.huge {
        let now = kernel.leaf_at(mm, gva).filter(|(level, _)| *level == 2);
        let now = now.map_or(Pte::NONE, |(_, entry)| entry);
        assert_eq!(
            now.address(),
            cached.address(),
            "2 MiB at {gva:#x} are stale"
        );
        for access in [Access::Read, Access::Write, Access::Fetch] {
            let stale = access.allowed_by(cached) && !access.allowed_by(now);
            assert!(!stale, "a CPU may still {access:?} 2 MiB at {gva:#x}");
        }
    }
}
