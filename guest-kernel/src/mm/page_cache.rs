//! The page cache of a file: a radix tree from page numbers to frames (Linux's i_pages).
//!
//! Its lock protects the tree and the file's size, and nothing is allocated or freed under it: nodes come from a
//! [`Spare`], and those that fall empty are given back when it is dropped. Whoever takes a frame out of a lookup
//! holds a reference to it; whether it is still the file's, the folio lock tells (`file`).

use core::sync::atomic::Ordering::SeqCst;

use abi::channel::cause;
use abi::layout::PAGE_SIZE;
use abi::lock::LockClass;
use abi::objects::{CACHE_NODE_SLOTS, CacheNode, File, Pa, folio_state};
use abi::syscall::Errno;

use super::Field;
use crate::Kernel;
use crate::arch::Arch;
use crate::sync::Guard;

/// Bits of a page's number that one level resolves.
const BITS: u64 = CACHE_NODE_SLOTS.trailing_zeros() as u64;
/// Levels that any page number needs: 52 bits.
const MAX_HEIGHT: usize = 9;
/// Most nodes that one insertion needs: a new path, and a new root above each old level.
const MAX_SPARE: usize = 2 * MAX_HEIGHT;

/// Nodes set aside for an insertion, or taken out by a removal.
pub(super) struct Spare {
    nodes: [Pa<CacheNode>; MAX_SPARE],
    count: usize,
}

impl Spare {
    pub(super) const fn new() -> Self {
        Self {
            nodes: [Pa::NULL; MAX_SPARE],
            count: 0,
        }
    }

    fn push(&mut self, node: Pa<CacheNode>) {
        self.nodes[self.count] = node;
        self.count += 1;
    }

    fn take(&mut self) -> Pa<CacheNode> {
        self.count -= 1;
        self.nodes[self.count]
    }
}

/// Which pages may be put into a cache.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Within {
    /// Those that the file's size covers (faults).
    Size,
    /// Any (write, which sets the size afterwards, and fallocate).
    Anything,
}

/// What a lookup finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cached {
    /// A frame, to which the caller holds a reference now.
    Page(u64),
    /// Nothing, where the file has a page.
    Hole,
    /// The file ends before it.
    Beyond,
}

impl<A: Arch> Kernel<A> {
    pub(super) fn lock_cache(&self, file: Pa<File>) -> Guard<'_, A> {
        self.lock(&self.obj(file).lock, LockClass::PageCache)
    }

    /// Looks page `index` up.
    pub(super) fn cache_get(&self, file: Pa<File>, index: u64, within: Within) -> Cached {
        let object = self.obj(file);
        let _guard = self.lock_cache(file);
        if within == Within::Size && index >= size_pages(object) {
            return Cached::Beyond;
        }
        match self.cache_find(object, index) {
            Some(gpa) => {
                self.folio_get(gpa, cause::HOLD);
                Cached::Page(gpa)
            }
            None => Cached::Hole,
        }
    }

    /// True where page `index` is in the cache, and somebody has used it (Linux's mincore_page).
    pub(super) fn cache_has(&self, file: Pa<File>, index: u64) -> bool {
        let _guard = self.lock_cache(file);
        self.cache_find(self.obj(file), index)
            .is_some_and(|gpa| !self.is_fresh(gpa))
    }

    /// Puts the frame at `gpa`, of which the caller holds the only reference, into the cache as page `index`, unless
    /// there is one or the file ends before it. The cache has a reference of its own then.
    ///
    /// # Errors
    /// ENOMEM.
    pub(super) fn cache_insert(
        &self,
        file: Pa<File>,
        index: u64,
        within: Within,
        gpa: u64,
    ) -> Result<bool, Errno> {
        let mut spare = Spare::new();
        let result = loop {
            let missing = {
                let object = self.obj(file);
                let _guard = self.lock_cache(file);
                let beyond = within == Within::Size && index >= size_pages(object);
                if beyond || self.cache_find(object, index).is_some() {
                    break Ok(false);
                }
                let missing = self.missing_nodes(object, index);
                if missing <= spare.count {
                    self.folio_get(gpa, cause::CACHE);
                    self.cache_store(object, index, gpa, &mut spare);
                    break Ok(true);
                }
                missing
            };
            if let Err(error) = self.cache_reserve(&mut spare, missing) {
                break Err(error);
            }
        };
        self.cache_release(spare);
        result
    }

    /// Takes page `index`, which is there, out of the cache. Its reference is the caller's now.
    pub(super) fn cache_remove(&self, file: Pa<File>, index: u64) {
        let object = self.obj(file);
        let mut empty = Spare::new();
        {
            let _guard = self.lock_cache(file);
            self.cache_erase(object, index, &mut empty);
        }
        self.cache_release(empty);
    }

    /// Takes page `index`, the frame at `gpa`, out of the cache where nobody refers to it but the cache and the caller, and
    /// what it holds is on the disk: who finds a page here takes a reference under the same lock (Linux's
    /// `__remove_mapping`, which looks at the references first too). The cache's reference is the caller's then.
    pub(super) fn cache_evict(&self, file: Pa<File>, index: u64, gpa: u64) -> bool {
        const KEEP: u8 = folio_state::DIRTY | folio_state::WRITEBACK | folio_state::READING;
        let mut empty = Spare::new();
        {
            let folio = self.folio(gpa);
            let _guard = self.lock_cache(file);
            if folio.refcount.load(SeqCst) != 2 || folio.state.load(SeqCst) & KEEP != 0 {
                return false;
            }
            self.cache_erase(self.obj(file), index, &mut empty);
        }
        self.cache_release(empty);
        true
    }

    /// Puts the frame at `to` in the place of page `index`, the frame at `from`, where that has the references that it
    /// must have and no more: who finds a page here takes one under the same lock (Linux's `__folio_migrate_mapping`). The
    /// reference of the cache to the old frame is the caller's then. False where somebody uses it.
    pub(super) fn cache_replace(
        &self,
        file: Pa<File>,
        index: u64,
        (from, references): (u64, u32),
        to: u64,
    ) -> bool {
        let object = self.obj(file);
        let _guard = self.lock_cache(file);
        if self.folio(from).refcount.load(SeqCst) != references {
            return false;
        }
        let mut node = object.pages.get();
        for level in (2..=object.height.get()).rev() {
            node = Pa::new(self.obj(node).slots[slot(index, level)].get());
        }
        let place = &self.obj(node).slots[slot(index, 1)];
        assert!(place.get() == from, "page {index:#x} is not at {from:#x}");
        self.folio_get(to, cause::CACHE);
        place.set(to);
        true
    }

    /// The first page in `from..to`, with a reference to it.
    pub(super) fn cache_next(&self, file: Pa<File>, from: u64, to: u64) -> Option<(u64, u64)> {
        let object = self.obj(file);
        let _guard = self.lock_cache(file);
        let height = object.height.get();
        if height == 0 || from >= capacity(height) {
            return None;
        }
        let (index, gpa) = self.first_in(object.pages.get(), height, 0, from)?;
        (index < to).then(|| {
            self.folio_get(gpa, cause::HOLD);
            (index, gpa)
        })
    }

    fn cache_find(&self, file: &File, index: u64) -> Option<u64> {
        let height = file.height.get();
        if height == 0 || index >= capacity(height) {
            return None;
        }
        let mut word = file.pages.get().0;
        for level in (1..=height).rev() {
            word = self.obj(Pa::<CacheNode>::new(word)).slots[slot(index, level)].get();
            if word == 0 {
                return None;
            }
        }
        Some(word)
    }

    /// The first page from `from` on below `node`, whose first page is `base`. Recursion ends with the levels.
    fn first_in(
        &self,
        node: Pa<CacheNode>,
        level: u64,
        base: u64,
        from: u64,
    ) -> Option<(u64, u64)> {
        let each = 1 << (BITS * (level - 1));
        let first = from.saturating_sub(base) / each;
        let slots = &self.obj(node).slots;
        for (at, word) in slots.iter().enumerate().skip(first as usize) {
            let (word, start) = (word.get(), base + at as u64 * each);
            if word == 0 {
                continue;
            }
            if level == 1 {
                return Some((start, word));
            }
            if let Some(found) = self.first_in(Pa::new(word), level - 1, start, from) {
                return Some(found);
            }
        }
        None
    }

    /// Nodes that are missing for page `index`, which is not there.
    fn missing_nodes(&self, file: &File, index: u64) -> usize {
        let (height, needed) = (file.height.get(), height_for(index));
        if height == 0 {
            return needed as usize;
        }
        if needed > height {
            // Roots above the old one, and below the newest a path of its own.
            return (needed - height + needed - 1) as usize;
        }
        let mut node = file.pages.get();
        for level in (2..=height).rev() {
            node = Pa::new(self.obj(node).slots[slot(index, level)].get());
            if node.is_null() {
                return level as usize - 1;
            }
        }
        0
    }

    fn cache_store(&self, file: &File, index: u64, gpa: u64, spare: &mut Spare) {
        let needed = height_for(index);
        if file.height.get() == 0 {
            file.pages.set(spare.take());
            file.height.set(needed);
        }
        while file.height.get() < needed {
            let root = spare.take();
            self.fill_slot(root, 0, file.pages.get().0);
            file.pages.set(root);
            file.height.set(file.height.get() + 1);
        }
        let mut node = file.pages.get();
        for level in (2..=file.height.get()).rev() {
            let at = slot(index, level);
            let mut child = self.obj(node).slots[at].get();
            if child == 0 {
                child = spare.take().0;
                self.fill_slot(node, at, child);
            }
            node = Pa::new(child);
        }
        self.fill_slot(node, slot(index, 1), gpa);
        file.nr_pages.set(file.nr_pages.get() + 1);
    }

    fn fill_slot(&self, node: Pa<CacheNode>, at: usize, word: u64) {
        let object = self.obj(node);
        object.slots[at].set(word);
        object.count.set(object.count.get() + 1);
    }

    fn cache_erase(&self, file: &File, index: u64, empty: &mut Spare) {
        let height = file.height.get();
        let mut path = [Pa::<CacheNode>::NULL; MAX_HEIGHT];
        let mut node = file.pages.get();
        for level in (1..=height).rev() {
            path[level as usize - 1] = node;
            node = Pa::new(self.obj(node).slots[slot(index, level)].get());
        }
        assert!(!node.is_null(), "page {index:#x} is not in the cache");
        file.nr_pages.set(file.nr_pages.get() - 1);
        for level in 1..=height {
            let object = self.obj(path[level as usize - 1]);
            object.slots[slot(index, level)].set(0);
            object.count.set(object.count.get() - 1);
            if object.count.get() != 0 {
                return;
            }
            empty.push(path[level as usize - 1]);
        }
        file.pages.set(Pa::NULL);
        file.height.set(0);
    }

    fn cache_reserve(&self, spare: &mut Spare, count: usize) -> Result<(), Errno> {
        while spare.count < count {
            spare.push(self.slab_alloc::<CacheNode>()?);
        }
        Ok(())
    }

    fn cache_release(&self, mut spare: Spare) {
        while spare.count > 0 {
            self.slab_free(spare.take());
        }
    }
}

/// Pages that a file's size covers, the last one perhaps in part. Under the cache's lock.
pub(super) fn size_pages(file: &File) -> u64 {
    file.size.get().div_ceil(PAGE_SIZE)
}

/// Pages below a root of `height` levels.
const fn capacity(height: u64) -> u64 {
    1 << (BITS * height)
}

/// Least height of a tree that has a place for page `index`.
const fn height_for(index: u64) -> u64 {
    let bits = 64 - index.leading_zeros() as u64;
    let levels = bits.div_ceil(BITS);
    if levels == 0 { 1 } else { levels }
}

const fn slot(index: u64, level: u64) -> usize {
    (index >> (BITS * (level - 1))) as usize % CACHE_NODE_SLOTS
}
