//! Who maps a file: the tree of its VMAs (`interval_tree`), under its i_mmap lock (Linux's i_mmap).
//!
//! While the lock is held, the VMAs in the tree keep their bounds, and the page tables below them stay: a VMA leaves
//! the tree after its entries are cleared and before its tables are unlinked (Linux's unlink_file_vma_batch before
//! free_pgtables). fork puts the child's VMA right behind the parent's, before it copies entries: a walk
//! in order clears the parent's first, and what was copied before that it finds in the child (Linux's dup_mmap,
//! vma_interval_tree_insert_after).

use core::ops::Range;

use abi::lock::LockClass;
use abi::objects::{File, Pa, Vma};

use super::interval_tree::mapped_part;
use super::{Field, pages};
use crate::Kernel;
use crate::arch::Arch;
use crate::sync::Guard;

impl<A: Arch> Kernel<A> {
    pub(super) fn lock_i_mmap(&self, file: Pa<File>) -> Guard<'_, A> {
        self.lock(&self.obj(file).i_mmap_lock, LockClass::IMmap)
    }

    /// Makes `vma` one of those that map `file`, behind `parent` where it is a copy of that one.
    pub(super) fn file_link(&self, vma: Pa<Vma>, file: Pa<File>, parent: Option<Pa<Vma>>) {
        self.file_get(file);
        let (area, object) = (self.obj(vma), self.obj(file));
        let _guard = self.lock_i_mmap(file);
        area.file.set(file);
        self.interval_insert(&object.i_mmap, vma, parent);
    }

    /// Takes `vma` out of the tree of its file, if it maps one: from here on no walk finds it.
    pub(super) fn file_unlink(&self, vma: Pa<Vma>) {
        let area = self.obj(vma);
        let Some(file) = area.file.get().some() else {
            return;
        };
        {
            let _guard = self.lock_i_mmap(file);
            self.interval_remove(&self.obj(file).i_mmap, vma);
            area.file.set(Pa::NULL);
        }
        self.file_put(file);
    }

    /// Calls `f(vma, start, end)` for the part of each VMA that maps pages of `range`. Under the i_mmap lock.
    pub(super) fn for_each_mapping(
        &self,
        file: Pa<File>,
        range: &Range<u64>,
        mut f: impl FnMut(Pa<Vma>, u64, u64),
    ) {
        let mut next = self.interval_first(self.obj(file).i_mmap.get(), range);
        while let Some(vma) = next {
            next = self.interval_next(vma, range);
            let (start, end) = mapped_part(self.obj(vma), range);
            f(vma, start, end);
        }
    }

    /// Moves the bounds of `vma`; its pages keep their places in the file. Under [`Kernel::lock_vma_family`].
    pub(super) fn vma_resize(&self, vma: Pa<Vma>, start: u64, end: u64) {
        let area = self.obj(vma);
        let shift = pages(start).wrapping_sub(pages(area.start.get()));
        let tree = area.file.get().some().map(|file| &self.obj(file).i_mmap);
        let moves = tree.filter(|_| shift != 0);
        if let Some(tree) = moves {
            self.interval_remove(tree, vma);
        }
        area.pgoff.set(area.pgoff.get().wrapping_add(shift));
        area.start.set(start);
        area.end.set(end);
        match (tree, moves) {
            (_, Some(tree)) => self.interval_insert(tree, vma, None),
            (Some(_), None) => self.interval_update(vma),
            (None, None) => {}
        }
        self.vma_changed(vma);
    }
}
