//! Reading files: from the tasks' descriptors and from the VMAs, with the care of [`super::snapshot`].

use std::sync::atomic::Ordering::Relaxed;

use abi::objects::{CACHE_NODE_SLOTS, CacheNode, File, FileTable, OpenFile, SlabId, Vma};

use super::files::{FileTableView, FileView, MappingView, OpenFileView};
use super::snapshot::{Edge, Reader};
use crate::memory::PhysMem;

/// Levels of the largest tree of pages.
const MAX_HEIGHT: u64 = 9;
/// Bits of a page's number that one level resolves.
const BITS: u64 = CACHE_NODE_SLOTS.trailing_zeros() as u64;

impl<M: PhysMem + ?Sized> Reader<'_, M> {
    /// Reads every file that a task or a VMA leads to. After both.
    pub(super) fn files(&mut self) {
        let tables = self.snapshot.tasks.iter().map(|task| Edge {
            link: "Task.files",
            holder: task.gpa,
            target: task.files,
            mm: 0,
        });
        for edge in tables.collect::<Vec<_>>() {
            self.file_table(edge);
        }
        let vmas = self.snapshot.mms.iter().flat_map(|mm| &mm.vmas);
        let files = vmas.map(|vma| Edge {
            link: "Vma.file",
            holder: vma.gpa,
            target: vma.file,
            mm: vma.mm,
        });
        for edge in files.collect::<Vec<_>>() {
            self.file(edge);
        }
    }

    fn file_table(&mut self, edge: Edge) {
        if self.snapshot.file_tables.contains_key(&edge.target) {
            return;
        }
        let mut seen = std::mem::take(&mut self.file_tables);
        let table = self.follow::<FileTable>(edge, SlabId::FileTable, &mut seen);
        self.file_tables = seen;
        let Some(table) = table else { return };
        let view = FileTableView::new(edge.target, &table);
        self.require_live(edge, view.generation % 2 == 1);
        for &target in &view.open {
            self.open_file(Edge {
                link: "FileTable.open",
                holder: view.gpa,
                target,
                mm: 0,
            });
        }
        self.snapshot.file_tables.insert(view.gpa, view);
    }

    fn open_file(&mut self, edge: Edge) {
        if self.snapshot.open_files.contains_key(&edge.target) {
            return;
        }
        let mut seen = std::mem::take(&mut self.open_files);
        let open = self.follow::<OpenFile>(edge, SlabId::OpenFile, &mut seen);
        self.open_files = seen;
        let Some(open) = open else { return };
        let view = OpenFileView::new(edge.target, &open);
        self.require_live(edge, view.generation % 2 == 1);
        self.file(Edge {
            link: "OpenFile.file",
            holder: view.gpa,
            target: view.file,
            mm: 0,
        });
        self.snapshot.open_files.insert(view.gpa, view);
    }

    fn file(&mut self, edge: Edge) {
        if self.snapshot.files.contains_key(&edge.target) {
            return;
        }
        let mut seen = std::mem::take(&mut self.files);
        let file = self.follow::<File>(edge, SlabId::File, &mut seen);
        self.files = seen;
        let Some(file) = file else { return };
        let mut view = FileView::new(edge.target, &file);
        self.require_live(edge, view.generation % 2 == 1);
        self.i_mmap(&mut view, file.i_mmap.get().0);
        self.pages(&mut view, file.pages.get().0);
        self.snapshot.files.insert(view.gpa, view);
    }

    /// Reads the tree of mappings in order.
    fn i_mmap(&mut self, file: &mut FileView, root: u64) {
        let edge = |link, holder, target| Edge {
            link,
            holder,
            target,
            mm: 0,
        };
        let mut seen = std::mem::take(&mut self.mappings);
        let mut passed = Vec::new();
        let mut next = edge("File.i_mmap", file.gpa, root);
        let mut above = 0;
        loop {
            while let Some(vma) = self.follow::<Vma>(next, SlabId::Vma, &mut seen) {
                self.require_live(next, vma.generation.load(Relaxed) % 2 == 1);
                let view = MappingView::new(next.target, &vma, above);
                passed.push(view);
                above = view.vma;
                next = edge("Vma.left_of_file", above, view.below[0]);
            }
            let Some(view) = passed.pop() else { break };
            file.i_mmap.push(view);
            above = view.vma;
            next = edge("Vma.right_of_file", above, view.below[1]);
        }
        self.mappings = seen;
    }

    /// Reads the tree in order, without recursion: its depth is the guest's word.
    fn pages(&mut self, file: &mut FileView, root: u64) {
        let root = Edge {
            link: "File.pages",
            holder: file.gpa,
            target: root,
            mm: 0,
        };
        let mut seen = std::mem::take(&mut self.cache_nodes);
        let mut stack = vec![(root, file.height.min(MAX_HEIGHT), 0u64)];
        while let Some((edge, level, base)) = stack.pop() {
            let Some(node) = self.follow::<CacheNode>(edge, SlabId::CacheNode, &mut seen) else {
                continue;
            };
            file.nodes += 1;
            let slots = node.slots.iter().map(|slot| slot.load(Relaxed));
            let used: Vec<_> = (0..).zip(slots).filter(|(_, word)| *word != 0).collect();
            if node.count.load(Relaxed) != used.len() as u64 || used.is_empty() {
                file.miscounted_nodes.push(edge.target);
            }
            let Some(below) = level.checked_sub(1) else {
                continue;
            };
            let first = |at: u64| base.wrapping_add(at << (BITS * below));
            if below == 0 {
                file.pages
                    .extend(used.iter().map(|(at, word)| (first(*at), *word)));
                continue;
            }
            let child = |(at, target): &(u64, u64)| {
                let edge = Edge {
                    link: "CacheNode.slots",
                    holder: edge.target,
                    target: *target,
                    mm: 0,
                };
                (edge, below, first(*at))
            };
            stack.extend(used.iter().rev().map(child));
        }
        self.cache_nodes = seen;
    }
}
