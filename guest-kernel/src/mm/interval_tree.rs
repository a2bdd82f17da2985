//! The tree of the VMAs that map a file, by the pages that they map, each with the end of all below it: who maps some
//! pages is found without a look at the others (Linux's mm/interval_tree.c).
//!
//! A treap: in order of first pages, and above each other by [`rank`], which is as good as random, so that it is as
//! deep as a logarithm. Everything here is under the file's i_mmap lock.

use core::ops::Range;

use abi::layout::PAGE_SHIFT;
use abi::objects::{Link, Pa, Vma};

use super::{Field, pages};
use crate::Kernel;
use crate::arch::Arch;

/// The VMA of the greatest rank is the root.
fn rank(vma: Pa<Vma>) -> u64 {
    // The finalizer of SplitMix64.
    let mut rank = vma.0;
    rank = (rank ^ rank >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    rank = (rank ^ rank >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    rank ^ rank >> 31
}

impl<A: Arch> Kernel<A> {
    /// Puts `vma` into the tree at `root`: right behind `parent`, which maps the same pages, or behind all
    /// that begin where it does.
    pub(super) fn interval_insert(&self, root: &Link<Vma>, vma: Pa<Vma>, parent: Option<Pa<Vma>>) {
        let area = self.obj(vma);
        area.left_of_file.set(Pa::NULL);
        area.right_of_file.set(Pa::NULL);
        let (above, link) = match parent {
            Some(parent) => self.place_behind(parent),
            None => self.place_of(root, area.pgoff.get()),
        };
        area.parent_of_file.set(above);
        link.set(vma);
        self.interval_update(vma);
        while let Some(above) = area.parent_of_file.get().some()
            && rank(above) < rank(vma)
        {
            self.rotate_up(root, vma);
        }
    }

    /// Takes `vma` out of the tree at `root`.
    pub(super) fn interval_remove(&self, root: &Link<Vma>, vma: Pa<Vma>) {
        let area = self.obj(vma);
        loop {
            let (left, right) = (area.left_of_file.get(), area.right_of_file.get());
            let higher = match (left.some(), right.some()) {
                (None, None) => break,
                (Some(one), None) | (None, Some(one)) => one,
                (Some(left), Some(right)) if rank(left) > rank(right) => left,
                (_, Some(right)) => right,
            };
            self.rotate_up(root, higher);
        }
        self.link_above(root, vma).set(Pa::NULL);
        if let Some(above) = area.parent_of_file.get().some() {
            self.interval_update(above);
        }
    }

    /// `vma` ends elsewhere, or something below it does.
    pub(super) fn interval_update(&self, vma: Pa<Vma>) {
        let mut next = Some(vma);
        while let Some(vma) = next {
            self.find_subtree_end(vma);
            next = self.obj(vma).parent_of_file.get().some();
        }
    }

    /// The first VMA of the tree below `top` that maps pages of `range`.
    pub(super) fn interval_first(&self, top: Pa<Vma>, range: &Range<u64>) -> Option<Pa<Vma>> {
        let mut vma = top.some().filter(|_| !range.is_empty())?;
        loop {
            let area = self.obj(vma);
            if let Some(left) = self.reaching(&area.left_of_file, range) {
                // If the first of all is not to the left, then nothing is: what reaches it begins behind `range`.
                vma = left;
            } else if area.pgoff.get() >= range.end {
                return None;
            } else if self.file_end(area) > range.start {
                return Some(vma);
            } else {
                vma = self.reaching(&area.right_of_file, range)?;
            }
        }
    }

    /// The next one after `vma`.
    pub(super) fn interval_next(&self, vma: Pa<Vma>, range: &Range<u64>) -> Option<Pa<Vma>> {
        let area = self.obj(vma);
        if let Some(right) = self.reaching(&area.right_of_file, range) {
            return self.interval_first(right, range);
        }
        let mut below = vma;
        loop {
            let above = self.obj(below).parent_of_file.get().some()?;
            let area = self.obj(above);
            if area.left_of_file.get() == below {
                if area.pgoff.get() >= range.end {
                    return None;
                }
                if self.file_end(area) > range.start {
                    return Some(above);
                }
                if let Some(right) = self.reaching(&area.right_of_file, range) {
                    return self.interval_first(right, range);
                }
            }
            below = above;
        }
    }

    /// What `link` leads to, where something in it ends behind the beginning of `range`.
    fn reaching(&self, link: &Link<Vma>, range: &Range<u64>) -> Option<Pa<Vma>> {
        let reaches = |vma: &Pa<Vma>| self.obj(*vma).subtree_end.get() > range.start;
        link.get().some().filter(reaches)
    }

    /// The page of its file past the last one that `area` maps.
    fn file_end(&self, area: &Vma) -> u64 {
        area.pgoff.get() + pages(area.end.get() - area.start.get())
    }

    fn find_subtree_end(&self, vma: Pa<Vma>) {
        let area = self.obj(vma);
        let below = [&area.left_of_file, &area.right_of_file].map(|link| {
            let end = |vma: Pa<Vma>| self.obj(vma).subtree_end.get();
            link.get().some().map_or(0, end)
        });
        let end = self.file_end(area).max(below[0]).max(below[1]);
        area.subtree_end.set(end);
    }

    /// Where a VMA goes that comes right behind `vma`: below whom, and its link.
    fn place_behind(&self, vma: Pa<Vma>) -> (Pa<Vma>, &Link<Vma>) {
        let (mut above, mut link) = (vma, &self.obj(vma).right_of_file);
        while let Some(next) = link.get().some() {
            (above, link) = (next, &self.obj(next).left_of_file);
        }
        (above, link)
    }

    /// Where a VMA goes that maps from page `first` on.
    fn place_of<'k>(&'k self, root: &'k Link<Vma>, first: u64) -> (Pa<Vma>, &'k Link<Vma>) {
        let (mut above, mut link) = (Pa::NULL, root);
        while let Some(next) = link.get().some() {
            let area = self.obj(next);
            let earlier = first < area.pgoff.get();
            link = if earlier {
                &area.left_of_file
            } else {
                &area.right_of_file
            };
            above = next;
        }
        (above, link)
    }

    /// The link that leads to `vma`.
    fn link_above<'k>(&'k self, root: &'k Link<Vma>, vma: Pa<Vma>) -> &'k Link<Vma> {
        match self.obj(vma).parent_of_file.get().some() {
            None => root,
            Some(above) => {
                let area = self.obj(above);
                let is_left = area.left_of_file.get() == vma;
                if is_left {
                    &area.left_of_file
                } else {
                    &area.right_of_file
                }
            }
        }
    }

    /// Exchanges `vma` and the one above it; the order stays.
    fn rotate_up(&self, root: &Link<Vma>, vma: Pa<Vma>) {
        let area = self.obj(vma);
        let above = area.parent_of_file.get();
        let top = self.obj(above);
        let (from, to) = if top.left_of_file.get() == vma {
            (&top.left_of_file, &area.right_of_file)
        } else {
            (&top.right_of_file, &area.left_of_file)
        };
        self.link_above(root, above).set(vma);
        area.parent_of_file.set(top.parent_of_file.get());
        let between = to.get();
        from.set(between);
        if let Some(between) = between.some() {
            self.obj(between).parent_of_file.set(above);
        }
        to.set(above);
        top.parent_of_file.set(vma);
        self.find_subtree_end(above);
        self.find_subtree_end(vma);
    }
}

/// The addresses at which `area` maps what it maps of `range`.
pub(super) fn mapped_part(area: &Vma, range: &Range<u64>) -> (u64, u64) {
    let (start, pgoff) = (area.start.get(), area.pgoff.get());
    let first = range.start.max(pgoff);
    let last = range.end.min(pgoff + pages(area.end.get() - start));
    let gva = |index: u64| start + ((index - pgoff) << PAGE_SHIFT);
    (gva(first), gva(last))
}
