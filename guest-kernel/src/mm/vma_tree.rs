//! The tree of an mm's VMAs: a B+ tree by start address that knows the largest hole below each entry.
//!
//! A leaf entry's `gap` is the hole in front of its VMA; an inner entry's the largest below it, so a
//! search for free address space skips what is too crowded. Nodes but the root are at least half full.
//! Changes are made under the mmap_lock held for writing; only an insertion needs memory, and it takes
//! it from a [`Reserve`] that was filled before anything changed.
//!
//! Readers under RCU ([`Kernel::vma_floor`]) may come any time, as to Linux's maple tree. A node that is unlinked is freed after
//! a grace period, its level never changes, and a slot holds a link to what belongs on its level or none, so a reader always
//! ends at a VMA or at nothing. Entries move within nodes while it looks, and bounds change: it may be led to a neighbour,
//! or to nothing. So it takes what it finds for a hint, asks the VMA itself, and turns to the mmap_lock where the answer is
//! no. (The maple tree replaces nodes instead of changing them, so that such a miss is rarer; it pays with an allocation for
//! almost every change, which may fail also where something is unmapped.)

use core::sync::atomic::Ordering::{Acquire, Release};

use abi::layout::PAGE_SIZE;
use abi::objects::{Mm, Pa, VMA_NODE_SLOTS, Vma, VmaNode, VmaSlot, vma_flags};
use abi::syscall::Errno;

use super::Field;
use crate::Kernel;
use crate::arch::Arch;

/// Least entries of a node that is not the root.
const HALF: usize = VMA_NODE_SLOTS / 2;
/// Levels of the tallest tree: one of 8 levels has at least 2 * 5^7 entries, more than [`super::vma::MAX_MAP_COUNT`].
const MAX_LEVELS: usize = 8;
/// Pages below a growing stack that mmap leaves alone (Linux's stack_guard_gap), in bytes.
pub(super) const STACK_GUARD: u64 = 256 * PAGE_SIZE;

/// Nodes set aside for insertions that must not fail.
pub(super) struct Reserve {
    nodes: [Pa<VmaNode>; 2 * (MAX_LEVELS + 1)],
    count: usize,
}

impl Reserve {
    fn take(&mut self) -> Pa<VmaNode> {
        assert!(self.count > 0, "the reserve was filled for this insertion");
        self.count -= 1;
        self.nodes[self.count]
    }
}

/// The way from the root to one leaf entry; of no levels in an empty tree.
struct Path {
    nodes: [Pa<VmaNode>; MAX_LEVELS],
    indices: [usize; MAX_LEVELS],
    levels: usize,
}

/// What a slot links to.
fn child(slot: &VmaSlot) -> u64 {
    slot.child.load(Acquire)
}

/// The last entry of `node` that starts at or before `key`, or else the first.
fn last_at_or_before(node: &VmaNode, key: u64) -> usize {
    let slots = &node.slots[..node.count.get() as usize];
    slots
        .iter()
        .rposition(|slot| slot.start.get() <= key)
        .unwrap_or(0)
}

/// Looking up.
impl<A: Arch> Kernel<A> {
    /// The first VMA that ends after `address` (Linux's find_vma): the one that holds it, or the next.
    pub fn vma_find(&self, mm: &Mm, address: u64) -> Option<Pa<Vma>> {
        let (leaf, index) = self.floor(mm, address)?;
        let slots = &leaf.slots[..leaf.count.get() as usize];
        let vma = Pa::<Vma>::new(slots[index].child.get());
        if self.obj(vma).end.get() > address {
            return Some(vma);
        }
        if let Some(next) = slots.get(index + 1) {
            return Some(Pa::new(next.child.get()));
        }
        let mut path = self.descend(mm, address);
        self.advance(&mut path).then(|| self.path_vma(&path))
    }

    /// The last VMA that starts before `address`.
    pub(super) fn vma_before(&self, mm: &Mm, address: u64) -> Option<Pa<Vma>> {
        let (leaf, index) = self.floor(mm, address.checked_sub(1)?)?;
        let vma = Pa::<Vma>::new(leaf.slots[index].child.get());
        (self.obj(vma).start.get() < address).then_some(vma)
    }

    /// The VMA that holds `address`.
    pub(super) fn vma_at(&self, mm: &Mm, address: u64) -> Option<Pa<Vma>> {
        self.vma_find(mm, address)
            .filter(|&vma| self.obj(vma).start.get() <= address)
    }

    /// The first VMA that has a page in `start..end`.
    pub(super) fn vma_in(&self, mm: &Mm, start: u64, end: u64) -> Option<Pa<Vma>> {
        self.vma_find(mm, start)
            .filter(|&vma| self.obj(vma).start.get() < end)
    }

    /// The highest address of a hole of `bytes` in `low..high`, away from the guards below stacks. As in Linux's
    /// unmapped_area_topdown, a hole that would do but for such a guard ends the search above the guard, smaller holes there
    /// included.
    pub(super) fn find_hole(&self, mm: &Mm, bytes: u64, low: u64, high: u64) -> Option<u64> {
        let above = self
            .vma_before(mm, u64::MAX)
            .map_or(0, |last| self.obj(last).end.get());
        if above.max(low) < high && high - above.max(low) >= bytes {
            return Some(high - bytes);
        }
        let root = mm.vmas.get().some()?;
        let mut high = high;
        loop {
            let (end, guarded) = self.hole_below(root, bytes, (low, high))?;
            if guarded >= end {
                return Some(end - bytes);
            }
            high = guarded;
        }
    }

    /// Where the highest hole of `bytes` in `low..high` ends, and where the guard of the VMA above it begins, or that VMA.
    fn hole_below(
        &self,
        node: Pa<VmaNode>,
        bytes: u64,
        (low, high): (u64, u64),
    ) -> Option<(u64, u64)> {
        let object = self.obj(node);
        let slots = &object.slots[..object.count.get() as usize];
        slots
            .iter()
            .rev()
            .filter(|slot| slot.gap.get() >= bytes)
            .find_map(|slot| {
                if object.level.get() > 0 {
                    return self.hole_below(Pa::new(slot.child.get()), bytes, (low, high));
                }
                let vma = self.obj(Pa::<Vma>::new(slot.child.get()));
                let start = vma.start.get();
                let (from, to) = ((start - slot.gap.get()).max(low), start.min(high));
                let guard = if vma.flags.get() & vma_flags::GROWSDOWN != 0 {
                    STACK_GUARD
                } else {
                    0
                };
                (from < to && to - from >= bytes).then(|| (to, start.saturating_sub(guard)))
            })
    }

    /// The VMA that likely holds `address`, if one does. In an RCU read section, or under the mmap_lock.
    pub(super) fn vma_floor(&self, mm: &Mm, address: u64) -> Option<Pa<Vma>> {
        let (leaf, index) = self.floor(mm, address)?;
        Pa::<Vma>::new(child(&leaf.slots[index])).some()
    }

    /// The leaf entry of the last VMA that starts at or before `key`, or of the first of all: the end of
    /// [`Kernel::descend`] without the way there. In an RCU read section nothing if what it comes to is just being changed.
    fn floor(&self, mm: &Mm, key: u64) -> Option<(&VmaNode, usize)> {
        // Acquire, here and for each link: pairs with `write_slot`, and with the stores of the root.
        let mut node = self.obj(mm.vmas.load(Acquire).some()?);
        loop {
            let index = last_at_or_before(node, key);
            if node.level.get() == 0 {
                return Some((node, index));
            }
            node = self.obj(Pa::<VmaNode>::new(child(&node.slots[index])).some()?);
        }
    }

    /// The way to the last VMA that starts at or before `key`, or to the first of all.
    fn descend(&self, mm: &Mm, key: u64) -> Path {
        let mut path = Path {
            nodes: [Pa::NULL; MAX_LEVELS],
            indices: [0; MAX_LEVELS],
            levels: 0,
        };
        let mut next = mm.vmas.get().some();
        while let Some(node) = next {
            let object = self.obj(node);
            let index = last_at_or_before(object, key);
            path.nodes[path.levels] = node;
            path.indices[path.levels] = index;
            path.levels += 1;
            let is_inner = object.level.get() > 0;
            next = is_inner.then(|| Pa::new(object.slots[index].child.get()));
        }
        path
    }

    fn path_slot(&self, path: &Path, level: usize) -> &VmaSlot {
        &self.obj(path.nodes[level]).slots[path.indices[level]]
    }

    fn path_vma(&self, path: &Path) -> Pa<Vma> {
        Pa::new(self.path_slot(path, path.levels - 1).child.get())
    }

    /// Moves to the next VMA; false at the last.
    fn advance(&self, path: &mut Path) -> bool {
        let turn = (0..path.levels)
            .rev()
            .find(|&l| path.indices[l] + 1 < self.obj(path.nodes[l]).count.get() as usize);
        let Some(turn) = turn else {
            return false;
        };
        path.indices[turn] += 1;
        for level in turn + 1..path.levels {
            path.nodes[level] = Pa::new(self.path_slot(path, level - 1).child.get());
            path.indices[level] = 0;
        }
        true
    }

    /// The VMA before; none before the first.
    fn path_before(&self, path: &Path) -> Option<Pa<Vma>> {
        let turn = (0..path.levels).rev().find(|&l| path.indices[l] > 0)?;
        let mut slot = &self.obj(path.nodes[turn]).slots[path.indices[turn] - 1];
        for _ in turn + 1..path.levels {
            let node = self.obj(Pa::<VmaNode>::new(slot.child.get()));
            slot = &node.slots[node.count.get() as usize - 1];
        }
        Some(Pa::new(slot.child.get()))
    }
}

/// Changing.
impl<A: Arch> Kernel<A> {
    /// Sets nodes aside for one insertion at `start` into the tree as it is.
    ///
    /// # Errors
    /// ENOMEM; nothing is set aside.
    pub(super) fn reserve_insert(&self, mm: &Mm, start: u64) -> Result<Reserve, Errno> {
        let path = self.descend(mm, start);
        let full =
            |&level: &usize| self.obj(path.nodes[level]).count.get() as usize == VMA_NODE_SLOTS;
        let splits = (0..path.levels).rev().take_while(full).count();
        // A new root too where the old one is split, or where there is none.
        self.reserve(splits + usize::from(splits == path.levels))
    }

    /// Sets nodes aside for any two insertions.
    ///
    /// # Errors
    /// ENOMEM; nothing is set aside.
    pub(super) fn reserve_any(&self, mm: &Mm) -> Result<Reserve, Errno> {
        self.reserve(2 * (self.descend(mm, 0).levels + 1))
    }

    fn reserve(&self, needed: usize) -> Result<Reserve, Errno> {
        let mut reserve = Reserve {
            nodes: [Pa::NULL; 2 * (MAX_LEVELS + 1)],
            count: 0,
        };
        while reserve.count < needed {
            match self.slab_alloc::<VmaNode>() {
                Ok(node) => reserve.nodes[reserve.count] = node,
                Err(error) => {
                    self.unreserve(reserve);
                    return Err(error);
                }
            }
            reserve.count += 1;
        }
        Ok(reserve)
    }

    /// Gives back what was not needed.
    pub(super) fn unreserve(&self, mut reserve: Reserve) {
        while reserve.count > 0 {
            let node = reserve.take();
            self.slab_free(node);
        }
    }

    /// Inserts `vma`, which overlaps nothing in the tree.
    pub(super) fn tree_insert(&self, mm: &Mm, vma: Pa<Vma>, reserve: &mut Reserve) {
        let start = self.obj(vma).start.get();
        let path = self.descend(mm, start);
        if path.levels == 0 {
            let root = reserve.take();
            self.put_slot(root, 0, (start, vma.0, 0));
            mm.vmas.store(root, Release);
        } else {
            let leaf = path.levels - 1;
            let after = self.path_slot(&path, leaf).start.get() < start;
            let at = path.indices[leaf] + usize::from(after);
            self.insert_at(mm, &path, at, (start, vma.0, 0), reserve);
        }
        self.tree_update(mm, vma, start);
    }

    fn insert_at(
        &self,
        mm: &Mm,
        path: &Path,
        at: usize,
        slot: (u64, u64, u64),
        reserve: &mut Reserve,
    ) {
        let (mut at, mut slot) = (at, slot);
        for level in (0..path.levels).rev() {
            let node = path.nodes[level];
            if (self.obj(node).count.get() as usize) < VMA_NODE_SLOTS {
                self.put_slot(node, at, slot);
                return self.summarise(path, level);
            }
            let upper = reserve.take();
            self.obj(upper).level.set(self.obj(node).level.get());
            self.move_slots(node, HALF, upper, 0, VMA_NODE_SLOTS - HALF);
            if at <= HALF {
                self.put_slot(node, at, slot);
            } else {
                self.put_slot(upper, at - HALF, slot);
            }
            slot = self.summary(upper);
            if level > 0 {
                self.write_slot(self.path_slot(path, level - 1), self.summary(node));
                at = path.indices[level - 1] + 1;
            }
        }
        // The root itself was split.
        let (old, new) = (path.nodes[0], reserve.take());
        self.obj(new).level.set(self.obj(old).level.get() + 1);
        self.put_slot(new, 0, self.summary(old));
        self.put_slot(new, 1, slot);
        mm.vmas.store(new, Release);
    }

    /// Removes `vma`.
    pub(super) fn tree_erase(&self, mm: &Mm, vma: Pa<Vma>) {
        let start = self.obj(vma).start.get();
        let path = self.descend(mm, start);
        assert_eq!(self.path_vma(&path), vma, "VMA at {start:#x} not found");
        let leaf = path.levels - 1;
        self.take_slot(path.nodes[leaf], path.indices[leaf]);
        for level in (1..path.levels).rev() {
            let node = path.nodes[level];
            if (self.obj(node).count.get() as usize) < HALF {
                self.refill(path.nodes[level - 1], path.indices[level - 1]);
            } else {
                self.write_slot(self.path_slot(&path, level - 1), self.summary(node));
            }
        }
        self.shrink_root(mm);
        let mut next = self.descend(mm, start);
        if next.levels > 0 {
            // By the listed starts: the bounds of its neighbours may be about to change.
            let listed = self.path_slot(&next, next.levels - 1).start.get();
            if listed > start || self.advance(&mut next) {
                self.refresh_gap(&next);
            }
        }
    }

    /// `vma`, which was inserted at `old_start`, has other bounds now, in the same place of the order.
    pub(super) fn tree_update(&self, mm: &Mm, vma: Pa<Vma>, old_start: u64) {
        let area = self.obj(vma);
        let mut path = self.descend(mm, old_start);
        assert_eq!(self.path_vma(&path), vma, "VMA at {old_start:#x} not found");
        let leaf = path.levels - 1;
        self.path_slot(&path, leaf).start.set(area.start.get());
        self.refresh_gap(&path);
        if self.advance(&mut path) {
            self.refresh_gap(&path);
        }
    }

    /// Computes the hole in front of the VMA at `path` again.
    fn refresh_gap(&self, path: &Path) {
        let start = self.obj(self.path_vma(path)).start.get();
        let before = self.path_before(path);
        let before = before.map_or(0, |vma| self.obj(vma).end.get());
        // While a boundary between neighbours moves they may overlap for a moment.
        let gap = start.saturating_sub(before);
        let leaf = path.levels - 1;
        self.path_slot(path, leaf).gap.set(gap);
        self.summarise(path, leaf);
    }

    /// Brings the inner entries above the node at `level` of `path` up to date.
    fn summarise(&self, path: &Path, level: usize) {
        for level in (1..=level).rev() {
            let summary = self.summary(path.nodes[level]);
            self.write_slot(self.path_slot(path, level - 1), summary);
        }
    }

    /// The entry that stands for `node` in its parent.
    fn summary(&self, node: Pa<VmaNode>) -> (u64, u64, u64) {
        let object = self.obj(node);
        let slots = &object.slots[..object.count.get() as usize];
        let gap = slots.iter().map(|slot| slot.gap.get()).max().unwrap_or(0);
        (slots[0].start.get(), node.0, gap)
    }

    /// The child `index` of `parent` is less than half full: shares with a neighbour or joins it.
    fn refill(&self, parent: Pa<VmaNode>, index: usize) {
        let object = self.obj(parent);
        let left_index = index.saturating_sub(1);
        let child = |i: usize| Pa::<VmaNode>::new(object.slots[i].child.get());
        let (left, right) = (child(left_index), child(left_index + 1));
        let count = |node: Pa<VmaNode>| self.obj(node).count.get() as usize;
        let total = count(left) + count(right);
        if total <= VMA_NODE_SLOTS {
            self.move_slots(right, 0, left, count(left), count(right));
            self.take_slot(parent, left_index + 1);
            self.rcu_retire_node(right);
        } else {
            let want = total / 2;
            let have = count(left);
            if have < want {
                self.move_slots(right, 0, left, have, want - have);
            } else {
                self.move_slots(left, want, right, 0, have - want);
            }
            self.write_slot(&object.slots[left_index + 1], self.summary(right));
        }
        self.write_slot(&object.slots[left_index], self.summary(left));
    }

    fn shrink_root(&self, mm: &Mm) {
        while let Some(root) = mm.vmas.get().some() {
            let object = self.obj(root);
            match (object.count.get(), object.level.get()) {
                (0, _) => mm.vmas.store(Pa::NULL, Release),
                (1, 1..) => mm.vmas.store(Pa::new(object.slots[0].child.get()), Release),
                _ => return,
            }
            self.rcu_retire_node(root);
        }
    }
}

/// Entries within nodes, as (start, child, gap).
impl<A: Arch> Kernel<A> {
    fn write_slot(&self, slot: &VmaSlot, (start, child, gap): (u64, u64, u64)) {
        slot.start.set(start);
        // Release: a reader under RCU comes to what is complete.
        slot.child.store(child, Release);
        slot.gap.set(gap);
    }

    fn copy_slot(&self, from: &VmaSlot, to: &VmaSlot) {
        self.write_slot(to, (from.start.get(), from.child.get(), from.gap.get()));
    }

    fn put_slot(&self, node: Pa<VmaNode>, at: usize, slot: (u64, u64, u64)) {
        let object = self.obj(node);
        let count = object.count.get() as usize;
        for i in (at..count).rev() {
            self.copy_slot(&object.slots[i], &object.slots[i + 1]);
        }
        self.write_slot(&object.slots[at], slot);
        object.count.set(count as u32 + 1);
    }

    fn take_slot(&self, node: Pa<VmaNode>, at: usize) {
        let object = self.obj(node);
        let count = object.count.get() as usize;
        for i in at + 1..count {
            self.copy_slot(&object.slots[i], &object.slots[i - 1]);
        }
        self.write_slot(&object.slots[count - 1], (0, 0, 0));
        object.count.set(count as u32 - 1);
    }

    /// Moves `n` entries, from `at` of one node to `to_at` of another.
    fn move_slots(&self, from: Pa<VmaNode>, at: usize, to: Pa<VmaNode>, to_at: usize, n: usize) {
        for i in 0..n {
            let slot = &self.obj(from).slots[at];
            let entry = (slot.start.get(), slot.child.get(), slot.gap.get());
            self.take_slot(from, at);
            self.put_slot(to, to_at + i, entry);
        }
    }
}
