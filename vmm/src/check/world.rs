//! A guest that never ran: a kernel's objects and page tables, laid out by hand in a
//! [`MemoryImage`], consistent in every respect, for tests to break.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::Ordering::Relaxed;

use abi::layout::{
    DIRECT_MAP_BASE, HUGE_ORDER, HUGE_PAGE_SIZE, KERNEL_LOAD_GPA, KERNEL_VIRT_OFFSET, LAPIC_GPA,
    LAPIC_GVA, PAGE_SHIFT, PAGE_SIZE,
};
use abi::objects::{
    AnonVma, AnonVmaChain, CacheNode, Cpu, File, FileTable, Folio, FrameKind, KernelRoot, Mm,
    ORDERS, OpenFile, Pa, SLABS, SlabId, Task, TaskState, VMA_NODE_SLOTS, Vma, VmaNode, VmaRefs,
    VmaSlot, folio_flags, vma_flags,
};
use abi::pte::{Pte, PteFlags, index};
use zerocopy::{FromBytes, IntoBytes};

use super::{Context, Moment, Outcome, run};
use crate::inspect::{MemoryImage, Snapshot, Stop, VcpuFacts};

const ROOT: u64 = 0x2000;
const KERNEL_PGD: u64 = 0x6000;
const FOLIOS: u64 = 0x1_0000;
const BYTES: u64 = 4 << 20;
const FRAMES: u64 = BYTES / PAGE_SIZE;
const _: () = assert!(ROOT + size_of::<KernelRoot>() as u64 <= KERNEL_PGD);
/// The folio of 2 MiB: the last frames.
pub(crate) const LARGE_FRAME: u64 = FRAMES - HUGE_PAGE_SIZE / PAGE_SIZE;
/// Frames below are reserved; the array of folios starts here.
pub(crate) const FIRST_FRAME: u64 = FOLIOS >> PAGE_SHIFT;
const CPUS: usize = 2;
const MMS: u64 = 2;
/// What both CPUs have loaded: of the second slot.
const PCID: u64 = 2;
const READ_WRITE: u64 = vma_flags::READ | vma_flags::WRITE;
const TABLE: PteFlags = PteFlags::PRESENT
    .union(PteFlags::WRITE)
    .union(PteFlags::USER)
    .union(PteFlags::ACCESSED);

/// The guest under construction, and after [`World::new`] the finished one.
pub(crate) struct World {
    pub(crate) memory: MemoryImage,
    pub(crate) vcpus: Vec<VcpuFacts>,
    pub(crate) moment: Moment,
    /// First mm: two threads' worth of VMAs, one page shared with the second.
    pub(crate) parent: u64,
    /// Second mm, forked from the first.
    pub(crate) child: u64,
    /// A file that the first mm maps, privately and shared, and the second one shared.
    pub(crate) file: u64,
    /// What descriptor 3 of the first process refers to.
    pub(crate) open_file: u64,
    /// The descriptors of both tasks.
    pub(crate) file_table: u64,
    /// By mm and start.
    pub(crate) vmas: HashMap<(u64, u64), u64>,
    next_frame: u64,
    slabs: [(u64, u64); SLABS],
}

/// VMAs of [`World::parent`].
pub(crate) const TEXT: u64 = 0x40_0000;
/// A read-write VMA of both mms; its first page is shared, its second private to each.
pub(crate) const DATA: u64 = 0x60_0000;
/// A page of [`DATA`] in the parent that maps the zero page.
pub(crate) const UNTOUCHED: u64 = DATA + 2 * PAGE_SIZE;
/// A VMA of 4 MiB of the parent, whose second half one entry maps.
pub(crate) const LARGE: u64 = 0x8000_0000;
/// A shared mapping of [`World::file`] in both mms.
pub(crate) const SHARED_FILE: u64 = 0x30_0000;
/// A private mapping of it in the parent.
pub(crate) const PRIVATE_FILE: u64 = 0x38_0000;
/// VMAs without pages, enough for a tree of two levels.
pub(crate) const EMPTY: u64 = 0x7f00_0000_0000;

impl World {
    /// A machine of two vCPUs: CPU 0 runs a task of the parent, CPU 1 idles with the child lazily
    /// loaded. Nothing is in flight.
    pub(crate) fn new() -> Self {
        let mut world = Self::bare();
        let (parent, child) = (world.mm(1), world.mm(2));
        (world.parent, world.child) = (parent, child);
        world.map_processes();
        world.map_zero_page();
        world.map_large();
        world.map_file();
        world.run_tasks();
        world.finish();
        world
    }

    fn bare() -> Self {
        let mut world = Self {
            memory: MemoryImage::new(BYTES),
            vcpus: Vec::new(),
            moment: Moment::Paused,
            parent: 0,
            child: 0,
            file: 0,
            open_file: 0,
            file_table: 0,
            vmas: HashMap::new(),
            next_frame: FIRST_FRAME,
            slabs: [(0, 0); SLABS],
        };
        world.update::<KernelRoot, _>(ROOT, |root| {
            root.magic.store(abi::boot::MAGIC, Relaxed);
            root.layout_hash.store(abi::layout_hash(), Relaxed);
            root.pgd.store(KERNEL_PGD, Relaxed);
            root.folios.set(Pa::new(FOLIOS));
            root.nr_frames.store(FRAMES, Relaxed);
            root.first_frame.store(FIRST_FRAME, Relaxed);
            root.nr_cpus.store(CPUS as u64, Relaxed);
            root.next_mm.store(1 + MMS, Relaxed);
            root.online.store((1 << CPUS) - 1, Relaxed);
        });
        for _ in 0..FRAMES * size_of::<Folio>() as u64 / PAGE_SIZE {
            world.frame(FrameKind::Kernel);
        }
        world.kernel_tables();
        world
    }

    /// Direct map without execution, image without writes, the local APIC's page.
    fn kernel_tables(&mut self) {
        let mut next = KERNEL_PGD;
        let mut map = |gva: u64, gpa: u64, level: u8, flags: PteFlags| {
            let mut table = KERNEL_PGD;
            for above in (level + 1..=4).rev() {
                let entry = table + 8 * index(gva, above) as u64;
                if self.pte(entry).is_none() {
                    next += PAGE_SIZE;
                    assert!(next < FOLIOS, "the kernel's tables need more room");
                    self.set_pte(entry, Pte::new(next, TABLE.difference(PteFlags::USER)));
                }
                table = self.pte(entry).address();
            }
            let entry = table + 8 * index(gva, level) as u64;
            self.set_pte(entry, Pte::new(gpa, flags | PteFlags::PRESENT));
        };
        let data = PteFlags::WRITE | PteFlags::NO_EXECUTE | PteFlags::GLOBAL;
        for gpa in (0..BYTES).step_by(2 << 20) {
            map(DIRECT_MAP_BASE + gpa, gpa, 2, data | PteFlags::HUGE);
        }
        let image = KERNEL_VIRT_OFFSET + KERNEL_LOAD_GPA;
        map(image, KERNEL_LOAD_GPA, 1, PteFlags::GLOBAL);
        map(image + PAGE_SIZE, KERNEL_LOAD_GPA + PAGE_SIZE, 1, data);
        map(LAPIC_GVA, LAPIC_GPA, 1, data | PteFlags::CACHE_DISABLE);
    }

    /// What a fork in the middle of a program's life leaves behind.
    fn map_processes(&mut self) {
        let (parent, child) = (self.parent, self.child);
        let text = self.vma(parent, TEXT, 4, vma_flags::READ | vma_flags::EXEC);
        let data = self.vma(parent, DATA, 4, READ_WRITE);
        let copy = self.vma(child, DATA, 4, READ_WRITE);
        for i in 0..11 {
            self.vma(parent, EMPTY + i * 0x10_0000, 1, vma_flags::READ);
        }
        self.leaf_entry(parent, TEXT);
        let of_text = self.anon_vma(0);
        self.activate(text, of_text);
        self.map_new(text, of_text, TEXT, PteFlags::empty());
        self.map_new(text, of_text, TEXT + PAGE_SIZE, PteFlags::empty());

        let of_data = self.anon_vma(0);
        self.activate(data, of_data);
        let of_copy = self.anon_vma(of_data);
        self.chain(copy, of_data);
        self.activate(copy, of_copy);
        let shared = self.map_new(data, of_data, DATA, PteFlags::COW);
        self.map(copy, shared, DATA, PteFlags::COW);
        self.map_new(data, of_data, DATA + PAGE_SIZE, PteFlags::WRITE);
        self.map_new(copy, of_copy, DATA + PAGE_SIZE, PteFlags::WRITE);
        // Tables that a fault made before it ran out of memory: empty, and rightly there.
        self.leaf_entry(parent, EMPTY);
    }

    fn run_tasks(&mut self) {
        self.task(1, self.parent, TaskState::Running, 0);
        self.task(2, self.child, TaskState::Blocked, 1);
        let running = self.root(|root| root.tasks.get());
        for (cpu, mm) in [(0u64, self.parent), (1, self.child)] {
            let (id, pgd, tlb_gen) = self.update::<Mm, _>(mm, |mm| {
                mm.cpumask.store(1 << cpu, Relaxed);
                mm.count.store(2, Relaxed);
                mm.tlb_gen.store(5, Relaxed);
                (mm.id.load(Relaxed), mm.pgd.load(Relaxed), 5)
            });
            self.cpu(cpu as usize, |state| {
                state.loaded_mm.set(Pa::new(mm));
                state.pcid.store(PCID, Relaxed);
                state.loaded_asid().mm.store(id, Relaxed);
                state.loaded_asid().tlb_gen.store(tlb_gen, Relaxed);
                state.lazy.store(cpu, Relaxed);
            });
            self.vcpus.push(VcpuFacts {
                index: cpu as usize,
                cpl: if cpu == 0 { 3 } else { 0 },
                rip: if cpu == 0 { TEXT } else { KERNEL_VIRT_OFFSET },
                cr3: pgd | PCID,
                stop: if cpu == 0 {
                    Stop::Anywhere
                } else {
                    Stop::Halted
                },
                ..VcpuFacts::default()
            });
        }
        // Tasks are linked at the front: the first one is last.
        let first = self.object::<Task>(running.0).next_task.get();
        self.cpu(0, |state| state.current.set(first));
    }

    /// A page of the parent that was only read.
    fn map_zero_page(&mut self) {
        let zero = self.frame(FrameKind::Zero);
        self.root(|root| root.zero_frame.store(zero, Relaxed));
        let entry = self.leaf_entry(self.parent, UNTOUCHED);
        let leaf = PteFlags::PRESENT | PteFlags::USER | PteFlags::ACCESSED;
        let pte = Pte::new(zero, leaf | PteFlags::NO_EXECUTE | PteFlags::SPECIAL);
        self.set_pte(entry, pte);
        self.count_entry(entry & !(PAGE_SIZE - 1), pte);
        self.update::<Mm, _>(self.parent, |mm| mm.rss.fetch_add(1, Relaxed));
    }

    /// A folio of 2 MiB, mapped by one entry, with a table set aside beside it.
    fn map_large(&mut self) {
        let pages = HUGE_PAGE_SIZE / PAGE_SIZE;
        let vma = self.vma(self.parent, LARGE, 2 * pages, READ_WRITE);
        let anon_vma = self.anon_vma(0);
        self.activate(vma, anon_vma);
        let gva = LARGE + HUGE_PAGE_SIZE;
        self.folio(LARGE_FRAME, |folio| {
            folio.kind.store(FrameKind::Anon as u8, Relaxed);
            folio.order.store(HUGE_ORDER, Relaxed);
            folio.owner.store(anon_vma, Relaxed);
            folio.index.store(gva / PAGE_SIZE, Relaxed);
            folio.flags.store(folio_flags::EXCLUSIVE, Relaxed);
            folio.generation.store(1, Relaxed);
            for count in [&folio.refcount, &folio.mapcount, &folio.used] {
                count.store(1, Relaxed);
            }
        });
        // Makes the tables on the way; the first half has an empty one.
        self.leaf_entry(self.parent, LARGE);
        let entry = self.entry(self.parent, gva, 2);
        let leaf = PteFlags::PRESENT | PteFlags::USER | PteFlags::ACCESSED | PteFlags::WRITE;
        let flags = leaf | PteFlags::DIRTY | PteFlags::HUGE | PteFlags::NO_EXECUTE;
        let pte = Pte::new(LARGE_FRAME << PAGE_SHIFT, flags);
        let upper = entry & !(PAGE_SIZE - 1);
        self.set_pte(entry, pte);
        self.count_entry(upper, pte);
        let table = self.table(self.parent, 1) >> PAGE_SHIFT;
        self.folio(upper >> PAGE_SHIFT, |folio| {
            folio.prev.store(table, Relaxed);
        });
        self.update::<Mm, _>(self.parent, |mm| {
            mm.rss.fetch_add(pages, Relaxed);
            mm.huge.fetch_add(1, Relaxed);
        });
    }

    /// A file of three pages, two of which are mapped, and one open description of it.
    fn map_file(&mut self) {
        let file = self.allocate(SlabId::File);
        let node = self.allocate(SlabId::CacheNode);
        let (open, table) = (
            self.allocate(SlabId::OpenFile),
            self.allocate(SlabId::FileTable),
        );
        (self.file, self.open_file, self.file_table) = (file, open, table);
        self.update::<File, _>(file, |file| {
            file.size.store(6 * PAGE_SIZE, Relaxed);
            file.pages.set(Pa::new(node));
            file.height.store(1, Relaxed);
            file.refcount.store(1, Relaxed);
            file.generation.store(1, Relaxed);
        });
        self.update::<OpenFile, _>(open, |open_file| {
            open_file.file.set(Pa::new(file));
            open_file.refcount.store(1, Relaxed);
            open_file.generation.store(1, Relaxed);
        });
        self.update::<FileTable, _>(table, |table| {
            table.open[3].set(Pa::new(open));
            table.console.store(7, Relaxed);
            table.generation.store(1, Relaxed);
        });
        let pages = [0, 1, 5].map(|index| self.file_page(node, index));
        let shared = READ_WRITE | vma_flags::SHARED;
        for (mm, start, flags) in [
            (self.parent, SHARED_FILE, shared),
            (self.child, SHARED_FILE, shared),
            (self.parent, PRIVATE_FILE, READ_WRITE),
        ] {
            let vma = self.vma(mm, start, 2, flags);
            self.map_of_file(vma);
            let write = match flags {
                READ_WRITE => PteFlags::empty(),
                _ => PteFlags::WRITE,
            };
            for (gva, page) in [start, start + PAGE_SIZE].into_iter().zip(pages) {
                self.map(vma, page, gva, write);
            }
        }
    }

    fn file_page(&mut self, node: u64, index: usize) -> u64 {
        let (gpa, file) = (self.frame(FrameKind::File), self.file);
        self.folio(gpa >> PAGE_SHIFT, |folio| {
            folio.owner.store(file, Relaxed);
            folio.index.store(index as u64, Relaxed);
        });
        self.update::<CacheNode, _>(node, |node| {
            node.slots[index].store(gpa, Relaxed);
            node.count.fetch_add(1, Relaxed);
        });
        self.update::<File, _>(file, |file| file.nr_pages.fetch_add(1, Relaxed));
        gpa
    }

    /// Makes `vma` the first of those that map the file, from its first page on.
    fn map_of_file(&mut self, vma: u64) {
        let file = self.file;
        let next = self.update::<File, _>(file, |file| {
            let next = file.i_mmap.get();
            file.i_mmap.set(Pa::new(vma));
            file.refcount.fetch_add(1, Relaxed);
            next
        });
        let end_behind = match next.some() {
            Some(next) => self.update::<Vma, _>(next.0, |next| {
                next.parent_of_file.set(Pa::new(vma));
                next.subtree_end.load(Relaxed)
            }),
            None => 0,
        };
        self.update::<Vma, _>(vma, |vma| {
            let bytes = vma.end.load(Relaxed) - vma.start.load(Relaxed);
            vma.pgoff.store(0, Relaxed);
            vma.file.set(Pa::new(file));
            vma.right_of_file.set(next);
            vma.subtree_end
                .store(end_behind.max(bytes >> PAGE_SHIFT), Relaxed);
        });
    }

    /// Trees, free lists and counts.
    fn finish(&mut self) {
        for mm in [self.parent, self.child] {
            let mut vmas: Vec<_> = self
                .vmas
                .iter()
                .filter(|((of, _), _)| *of == mm)
                .map(|((_, start), vma)| (*start, *vma))
                .collect();
            vmas.sort_unstable();
            self.plant(mm, &vmas);
        }
        self.finish_slabs();
        self.free_the_rest();
    }

    fn plant(&mut self, mm: u64, vmas: &[(u64, u64)]) {
        let mut end = 0;
        let mut slots: Vec<(u64, u64, u64)> = Vec::new();
        for &(start, vma) in vmas {
            slots.push((start, vma, start - end));
            end = self.object::<Vma>(vma).end.load(Relaxed);
        }
        let mut level = 0;
        loop {
            let nodes: Vec<_> = slots
                .chunks(VMA_NODE_SLOTS)
                .map(|chunk| {
                    let node = self.allocate(SlabId::VmaNode);
                    self.fill_node(node, level, chunk);
                    let gap = chunk.iter().map(|slot| slot.2).max().unwrap_or(0);
                    (chunk[0].0, node, gap)
                })
                .collect();
            if let [(_, root, _)] = nodes[..] {
                return self.update::<Mm, _>(mm, |mm| mm.vmas.set(Pa::new(root)));
            }
            slots = nodes;
            level += 1;
        }
    }

    fn fill_node(&self, node: u64, level: u32, slots: &[(u64, u64, u64)]) {
        self.update::<VmaNode, _>(node, |node| {
            node.level.store(level, Relaxed);
            node.count.store(slots.len() as u32, Relaxed);
            for (slot, (start, child, gap)) in node.slots.iter().zip(slots) {
                slot.start.store(*start, Relaxed);
                slot.child.store(*child, Relaxed);
                slot.gap.store(*gap, Relaxed);
            }
        });
    }

    fn finish_slabs(&mut self) {
        for (id, link) in FREE_LINK {
            let bytes = object_bytes(id);
            let (page, used) = self.slabs[id as usize];
            let room = PAGE_SIZE / bytes;
            assert!(page != 0 && used <= room, "one page a slab is enough");
            for i in used..room {
                let next = if i + 1 < room {
                    page + (i + 1) * bytes
                } else {
                    0
                };
                self.poke(page + i * bytes + link as u64, next);
            }
            self.root(|root| {
                let slab = &root.slabs[id as usize];
                slab.object_bytes.store(bytes, Relaxed);
                slab.used.store(used, Relaxed);
                slab.frames.store(1, Relaxed);
                let first = if used < room { page + used * bytes } else { 0 };
                slab.free.store(first, Relaxed);
            });
        }
    }

    /// Three frames to CPU 1's list, the rest to the buddy in blocks as large as alignment allows.
    fn free_the_rest(&mut self) {
        for _ in 0..3 {
            let frame = self.frame(FrameKind::PerCpu) >> PAGE_SHIFT;
            let next = self.cpu(1, |cpu| {
                cpu.free_count.fetch_add(1, Relaxed);
                cpu.free_list.swap(frame, Relaxed)
            });
            self.folio(frame, |folio| {
                folio.refcount.store(0, Relaxed);
                folio.owner.store(1, Relaxed);
                folio.next.store(next, Relaxed);
            });
        }
        let free = LARGE_FRAME - self.next_frame + 3;
        let mut frame = self.next_frame;
        while frame < LARGE_FRAME {
            let order = frame.trailing_zeros().min(ORDERS as u32 - 1);
            let order = order.min((LARGE_FRAME - frame).ilog2());
            let next = self.root(|root| root.buddy[order as usize].swap(frame, Relaxed));
            self.folio(frame, |folio| {
                folio.kind.store(FrameKind::Buddy as u8, Relaxed);
                folio.order.store(order as u8, Relaxed);
                folio.next.store(next, Relaxed);
            });
            if next != 0 {
                self.folio(next, |folio| folio.prev.store(frame, Relaxed));
            }
            frame += 1 << order;
        }
        self.root(|root| root.free_frames.store(free, Relaxed));
    }
}

const FREE_LINK: [(SlabId, usize); SLABS] = [
    (SlabId::Mm, std::mem::offset_of!(Mm, next)),
    (SlabId::Vma, std::mem::offset_of!(Vma, chains)),
    (
        SlabId::VmaNode,
        std::mem::offset_of!(VmaNode, slots) + std::mem::offset_of!(VmaSlot, child),
    ),
    (SlabId::AnonVma, std::mem::offset_of!(AnonVma, chains)),
    (
        SlabId::AnonVmaChain,
        std::mem::offset_of!(AnonVmaChain, next_of_vma),
    ),
    (SlabId::Task, std::mem::offset_of!(Task, next)),
    (SlabId::File, std::mem::offset_of!(File, pages)),
    (SlabId::CacheNode, std::mem::offset_of!(CacheNode, slots)),
    (SlabId::OpenFile, std::mem::offset_of!(OpenFile, position)),
    (SlabId::FileTable, std::mem::offset_of!(FileTable, open)),
];

fn object_bytes(id: SlabId) -> u64 {
    (match id {
        SlabId::Mm => size_of::<Mm>(),
        SlabId::Vma => size_of::<Vma>(),
        SlabId::VmaNode => size_of::<VmaNode>(),
        SlabId::AnonVma => size_of::<AnonVma>(),
        SlabId::AnonVmaChain => size_of::<AnonVmaChain>(),
        SlabId::Task => size_of::<Task>(),
        SlabId::File => size_of::<File>(),
        SlabId::CacheNode => size_of::<CacheNode>(),
        SlabId::OpenFile => size_of::<OpenFile>(),
        SlabId::FileTable => size_of::<FileTable>(),
    }) as u64
}

/// Making objects.
impl World {
    fn frame(&mut self, kind: FrameKind) -> u64 {
        let frame = self.next_frame;
        self.next_frame += 1;
        self.folio(frame, |folio| {
            folio.kind.store(kind as u8, Relaxed);
            folio.refcount.store(1, Relaxed);
            folio.generation.store(1, Relaxed);
        });
        frame << PAGE_SHIFT
    }

    fn allocate(&mut self, id: SlabId) -> u64 {
        let (mut page, used) = self.slabs[id as usize];
        if page == 0 {
            page = self.frame(FrameKind::Slab);
            self.folio(page >> PAGE_SHIFT, |folio| {
                folio.owner.store(id as u64, Relaxed);
            });
        }
        self.slabs[id as usize] = (page, used + 1);
        page + used * object_bytes(id)
    }

    fn table(&mut self, mm: u64, level: u8) -> u64 {
        let gpa = self.frame(FrameKind::Table);
        self.folio(gpa >> PAGE_SHIFT, |folio| {
            folio.owner.store(mm, Relaxed);
            folio.index.store(u64::from(level), Relaxed);
        });
        self.update::<Mm, _>(mm, |mm| mm.tables.fetch_add(1, Relaxed));
        gpa
    }

    fn mm(&mut self, id: u64) -> u64 {
        let gpa = self.allocate(SlabId::Mm);
        let pgd = self.table(gpa, 4);
        let next = self.root(|root| {
            let next = root.mms.get();
            root.mms.set(Pa::new(gpa));
            next
        });
        self.update::<Mm, _>(gpa, |mm| {
            mm.id.store(id, Relaxed);
            mm.pgd.store(pgd, Relaxed);
            mm.count.store(1, Relaxed);
            mm.generation.store(1, Relaxed);
            mm.next.set(next);
        });
        for slot in 256..512 {
            let entry = self.pte(KERNEL_PGD + 8 * slot);
            self.set_pte(pgd + 8 * slot, entry);
            self.count_entry(pgd, entry);
        }
        gpa
    }

    fn vma(&mut self, mm: u64, start: u64, pages: u64, flags: u64) -> u64 {
        let gpa = self.allocate(SlabId::Vma);
        self.update::<Vma, _>(gpa, |vma| {
            vma.start.store(start, Relaxed);
            vma.end.store(start + pages * PAGE_SIZE, Relaxed);
            vma.flags.store(flags, Relaxed);
            vma.pgoff.store(start / PAGE_SIZE, Relaxed);
            vma.mm.set(Pa::new(mm));
            vma.refs.store(VmaRefs::ATTACHED, Relaxed);
            vma.generation.store(1, Relaxed);
        });
        self.update::<Mm, _>(mm, |mm| {
            mm.map_count.fetch_add(1, Relaxed);
            mm.total_vm.fetch_add(pages, Relaxed);
            if vma_flags::is_data(flags) {
                mm.data_vm.fetch_add(pages, Relaxed);
            }
        });
        self.vmas.insert((mm, start), gpa);
        gpa
    }

    /// An anon_vma: a root where `parent` is 0.
    fn anon_vma(&mut self, parent: u64) -> u64 {
        let gpa = self.allocate(SlabId::AnonVma);
        self.update::<AnonVma, _>(gpa, |anon_vma| {
            let up = if parent == 0 { gpa } else { parent };
            anon_vma.root.set(Pa::new(up));
            anon_vma.parent.set(Pa::new(up));
            anon_vma.generation.store(1, Relaxed);
            anon_vma.refcount.store(u32::from(parent == 0), Relaxed);
        });
        if parent != 0 {
            self.update::<AnonVma, _>(parent, |parent| {
                parent.refcount.fetch_add(1, Relaxed);
                parent.degree.fetch_add(1, Relaxed);
            });
        }
        gpa
    }

    /// Puts `vma` on the list of `anon_vma`.
    fn chain(&mut self, vma: u64, anon_vma: u64) {
        let gpa = self.allocate(SlabId::AnonVmaChain);
        let of_vma = self.update::<Vma, _>(vma, |vma| {
            let next = vma.chains.get();
            vma.chains.set(Pa::new(gpa));
            next
        });
        let of_anon = self.update::<AnonVma, _>(anon_vma, |anon_vma| {
            let next = anon_vma.chains.get();
            anon_vma.chains.set(Pa::new(gpa));
            anon_vma.refcount.fetch_add(1, Relaxed);
            next
        });
        if !of_anon.is_null() {
            self.update::<AnonVmaChain, _>(of_anon.0, |chain| {
                chain.prev_of_anon.set(Pa::new(gpa));
            });
        }
        self.update::<AnonVmaChain, _>(gpa, |chain| {
            chain.vma.set(Pa::new(vma));
            chain.anon_vma.set(Pa::new(anon_vma));
            chain.next_of_vma.set(of_vma);
            chain.next_of_anon.set(of_anon);
            chain.generation.store(1, Relaxed);
        });
    }

    /// Makes `anon_vma` the one of `vma`.
    fn activate(&mut self, vma: u64, anon_vma: u64) {
        self.chain(vma, anon_vma);
        self.update::<Vma, _>(vma, |vma| vma.anon_vma.set(Pa::new(anon_vma)));
        self.update::<AnonVma, _>(anon_vma, |anon_vma| {
            anon_vma.refcount.fetch_add(1, Relaxed);
            anon_vma.degree.fetch_add(1, Relaxed);
            anon_vma.active.fetch_add(1, Relaxed);
        });
    }

    /// Maps a new folio at `gva`.
    fn map_new(&mut self, vma: u64, anon_vma: u64, gva: u64, flags: PteFlags) -> u64 {
        let gpa = self.frame(FrameKind::Anon);
        self.folio(gpa >> PAGE_SHIFT, |folio| {
            folio.owner.store(anon_vma, Relaxed);
            folio.index.store(gva / PAGE_SIZE, Relaxed);
            folio.flags.store(folio_flags::EXCLUSIVE, Relaxed);
            // The mapping takes this reference over.
            folio.refcount.store(0, Relaxed);
        });
        self.map(vma, gpa, gva, flags);
        gpa
    }

    fn map(&mut self, vma: u64, gpa: u64, gva: u64, flags: PteFlags) {
        let vma = self.object::<Vma>(vma);
        let mm = vma.mm.get().0;
        let entry = self.leaf_entry(mm, gva);
        let nx = if vma.flags.load(Relaxed) & vma_flags::EXEC == 0 {
            PteFlags::NO_EXECUTE
        } else {
            PteFlags::empty()
        };
        let leaf = PteFlags::PRESENT | PteFlags::USER | PteFlags::ACCESSED;
        let pte = Pte::new(gpa, flags | nx | leaf);
        self.set_pte(entry, pte);
        self.count_entry(entry & !(PAGE_SIZE - 1), pte);
        self.update::<Mm, _>(mm, |mm| mm.rss.fetch_add(1, Relaxed));
        self.folio(gpa >> PAGE_SHIFT, |folio| {
            folio.refcount.fetch_add(1, Relaxed);
            if folio.mapcount.fetch_add(1, Relaxed) != 0 {
                folio.flags.store(0, Relaxed);
            }
        });
    }

    fn task(&mut self, id: u32, mm: u64, state: TaskState, cpu: u32) {
        let gpa = self.allocate(SlabId::Task);
        let next = self.root(|root| {
            let next = root.tasks.get();
            root.tasks.set(Pa::new(gpa));
            next
        });
        self.update::<Task, _>(gpa, |task| {
            task.id.store(id, Relaxed);
            task.process.store(id, Relaxed);
            task.state.store(state as u32, Relaxed);
            task.mm.set(Pa::new(mm));
            task.cpu.store(cpu, Relaxed);
            task.affinity.store(u64::MAX, Relaxed);
            task.next_task.set(next);
        });
        self.update::<Mm, _>(mm, |mm| mm.users.fetch_add(1, Relaxed));
        let table = self.file_table;
        self.update::<FileTable, _>(table, |table| table.users.fetch_add(1, Relaxed));
        self.update::<Task, _>(gpa, |task| task.files.set(Pa::new(table)));
    }

    fn count_entry(&self, table: u64, entry: Pte) {
        if !entry.is_none() {
            self.folio(table >> PAGE_SHIFT, |folio| {
                folio.used.fetch_add(1, Relaxed)
            });
        }
    }

    /// Where the level-1 entry for `gva` lies; tables are made on the way.
    pub(crate) fn leaf_entry(&mut self, mm: u64, gva: u64) -> u64 {
        let mut table = self.object::<Mm>(mm).pgd.load(Relaxed);
        for level in [4, 3, 2] {
            let entry = table + 8 * index(gva, level) as u64;
            if self.pte(entry).is_none() {
                let below = self.table(mm, level - 1);
                self.set_pte(entry, Pte::new(below, TABLE));
                self.count_entry(table, Pte::new(below, TABLE));
            }
            table = self.pte(entry).address();
        }
        table + 8 * index(gva, 1) as u64
    }
}

/// Reading, breaking and judging.
impl World {
    pub(crate) fn object<T: FromBytes + IntoBytes>(&self, gpa: u64) -> T {
        let mut object = T::new_zeroed();
        let bytes = object.as_mut_bytes();
        crate::memory::PhysMem::read(&self.memory, gpa, bytes).expect("in memory");
        object
    }
    pub(crate) fn update<T: FromBytes + IntoBytes, R>(
        &self,
        gpa: u64,
        change: impl FnOnce(&mut T) -> R,
    ) -> R {
        self.memory.update(gpa, change).expect("in memory")
    }
    pub(crate) fn root<R>(&self, change: impl FnOnce(&mut KernelRoot) -> R) -> R {
        self.update(ROOT, change)
    }
    pub(crate) fn cpu<R>(&self, index: usize, change: impl FnOnce(&Cpu) -> R) -> R {
        self.root(|root| change(&root.cpus[index]))
    }
    pub(crate) fn folio<R>(&self, frame: u64, change: impl FnOnce(&mut Folio) -> R) -> R {
        self.update(FOLIOS + frame * size_of::<Folio>() as u64, change)
    }
    pub(crate) fn poke(&self, gpa: u64, value: u64) {
        self.memory
            .word(gpa)
            .expect("in memory")
            .store(value, Relaxed);
    }
    pub(crate) fn pte(&self, entry: u64) -> Pte {
        Pte(self.memory.word(entry).expect("in memory").load(Relaxed))
    }
    pub(crate) fn set_pte(&self, entry: u64, pte: Pte) {
        self.poke(entry, pte.0);
    }
    /// Changes the level-`level` entry for `gva` in `mm`, or in the kernel's tables where that is 0.
    pub(crate) fn change_pte(&self, mm: u64, gva: u64, level: u8, change: impl FnOnce(Pte) -> Pte) {
        let entry = self.entry(mm, gva, level);
        self.set_pte(entry, change(self.pte(entry)));
    }
    /// Where the entry of `level` for `gva` lies.
    pub(crate) fn entry(&self, mm: u64, gva: u64, level: u8) -> u64 {
        let mut table = match mm {
            0 => KERNEL_PGD,
            mm => self.object::<Mm>(mm).pgd.load(Relaxed),
        };
        for above in (level + 1..=4).rev() {
            table = self.pte(table + 8 * index(gva, above) as u64).address();
        }
        table + 8 * index(gva, level) as u64
    }
    /// The frame that `mm` maps at `gva`.
    pub(crate) fn mapped_frame(&self, mm: u64, gva: u64) -> u64 {
        self.pte(self.entry(mm, gva, 1)).address() >> PAGE_SHIFT
    }
    /// A frame of `kind`.
    pub(crate) fn frame_of_kind(&self, kind: FrameKind) -> u64 {
        (0..FRAMES)
            .find(|&frame| self.folio(frame, |folio| folio.kind.load(Relaxed)) == kind as u8)
            .expect("there is one")
    }
    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot::read(&self.memory, ROOT).expect("the root is sound")
    }
    pub(crate) fn judge(&self) -> Outcome {
        let snapshot = self.snapshot();
        run(&Context::new(
            &self.memory,
            &snapshot,
            &self.vcpus,
            self.moment,
        ))
    }
    /// IDs that are violated, with how often.
    pub(crate) fn violated(&self) -> BTreeMap<&'static str, u64> {
        let outcome = self.judge();
        let checked = outcome
            .checked
            .iter()
            .filter(|checked| checked.violated != 0);
        checked
            .map(|checked| (checked.id, checked.violated))
            .collect()
    }
}

pub(crate) const ROOT_GPA: u64 = ROOT;
