//! The reverse mapping: anon_vmas and their chains, for anonymous folios; for pages of files see `i_mmap`.
//!
//! A folio points to the anon_vma of the VMA that it was first mapped in; every VMA that may map it is
//! on that anon_vma's list, at the address that the folio's index gives. A VMA is on the lists of its
//! own anon_vma and of those its ancestors had at fork. The lock of the family's root protects all
//! lists and `degree`/`active` of the family (Linux's mm/rmap.c).

use core::ops::Range;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};

use abi::channel::Walker;
use abi::layout::{HUGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE};
use abi::objects::{AnonVma, AnonVmaChain, File, FrameKind, Mm, Pa, Vma};
use abi::pte::Pte;
use abi::syscall::Errno;

use super::huge::huge_page_of;
use super::{Field, Slot, pages};
use crate::Kernel;
use crate::arch::Arch;
use crate::sync::Guard;
use abi::lock::LockClass;

impl<A: Arch> Kernel<A> {
    /// Gives `vma` an anon_vma before its first folio: a neighbour's, where the two may merge one day,
    /// or a new one. Under the mmap_lock held for reading at least.
    ///
    /// # Errors
    /// ENOMEM.
    pub(super) fn anon_vma_prepare(&self, mm: Pa<Mm>, vma: Pa<Vma>) -> Result<(), Errno> {
        let area = self.obj(vma);
        if !area.anon_vma.load(Acquire).is_null() {
            return Ok(());
        }
        // Neighbours are looked at: a VMA's own lock does not do.
        debug_assert!(self.obj(mm).mmap_lock.load(Relaxed) != 0);
        let chain = self.slab_alloc::<AnonVmaChain>()?;
        let neighbour = self.mergeable_anon_vma(mm, vma);
        let anon = match neighbour {
            Some(anon) => anon,
            None => match self.anon_vma_alloc(Pa::NULL) {
                Ok(anon) => anon,
                Err(error) => {
                    self.slab_free(chain);
                    return Err(error);
                }
            },
        };
        let family = self.lock_family(anon);
        // Two faults of one VMA may come here at once: the page-table lock decides.
        let upper = self.lock_upper(self.obj(mm));
        let first = area.anon_vma.get().is_null();
        if first {
            self.chain_link(chain, vma, anon, None);
            self.anon_vma_activate(vma, anon);
        }
        drop(upper);
        drop(family);
        if !first {
            self.slab_free(chain);
            if neighbour.is_none() {
                // Who has read a stale owner may hold a reference (`anon_vma_try_get`).
                self.obj(anon).refcount.fetch_add(1, Relaxed);
                self.anon_vma_put(anon);
            }
        }
        Ok(())
    }

    /// Puts `to` on every list that `from` is on (split, merge, fork). Where `to` has no anon_vma of
    /// its own yet, a forked child's VMA reuses one that has lost all its VMAs and has but one child
    /// (Linux's `degree` rule, with the counts kept apart as since 2555283eb40d).
    ///
    /// # Errors
    /// ENOMEM; `to` is then on no list and has no anon_vma.
    pub(super) fn anon_vma_clone(
        &self,
        to: Pa<Vma>,
        from: Pa<Vma>,
        reuse: Reuse,
    ) -> Result<(), Errno> {
        let first = self.obj(from).chains.get();
        let Some(first) = first.some() else {
            return Ok(());
        };
        let _family = self.lock_family(self.obj(first).anon_vma.get());
        let mut next = Some(first);
        while let Some(chain) = next {
            let copy = match self.slab_alloc::<AnonVmaChain>() {
                Ok(copy) => copy,
                Err(error) => {
                    self.abandon_chains(to);
                    return Err(error);
                }
            };
            let anon = self.obj(chain).anon_vma.get();
            self.chain_link(copy, to, anon, Some(chain));
            let object = self.obj(anon);
            // The root is never reused: it is its own parent.
            if reuse == Reuse::Allowed
                && self.obj(to).anon_vma.get().is_null()
                && object.root.get() != anon
                && object.active.get() == 0
                && object.degree.get() < 2
            {
                self.anon_vma_activate(to, anon);
            }
            next = self.obj(chain).next_of_vma.get().some();
        }
        Ok(())
    }

    /// Makes `vma` one of the VMAs whose anon_vma `anon` is. Under the family's lock.
    pub(super) fn anon_vma_activate(&self, vma: Pa<Vma>, anon: Pa<AnonVma>) {
        let object = self.obj(anon);
        object.active.set(object.active.get() + 1);
        object.degree.set(object.degree.get() + 1);
        object.refcount.fetch_add(1, Relaxed);
        // Release: a fault that finds it finds it on the list too.
        self.obj(vma).anon_vma.store(anon, Release);
    }

    /// Gives the child's VMA at fork its anon_vma: on the lists of all of the parent's, and a new one of
    /// its own for the folios that it will not share, a child of the parent's.
    ///
    /// # Errors
    /// ENOMEM; `child` is then on no list.
    pub(super) fn anon_vma_fork(&self, child: Pa<Vma>, parent: Pa<Vma>) -> Result<(), Errno> {
        let Some(parent_anon) = self.obj(parent).anon_vma.get().some() else {
            return Ok(());
        };
        self.anon_vma_clone(child, parent, Reuse::Allowed)?;
        if !self.obj(child).anon_vma.get().is_null() {
            return Ok(());
        }
        let own = self.anon_vma_alloc(parent_anon).and_then(|anon| {
            self.slab_alloc::<AnonVmaChain>()
                .inspect_err(|_| self.anon_vma_free(anon))
                .map(|chain| (anon, chain))
        });
        let _family = self.lock_family(parent_anon);
        match own {
            Ok((anon, chain)) => {
                let parent = self.obj(parent_anon);
                parent.degree.set(parent.degree.get() + 1);
                parent.refcount.fetch_add(1, Relaxed);
                self.chain_link(chain, child, anon, None);
                self.anon_vma_activate(child, anon);
                Ok(())
            }
            Err(error) => {
                self.abandon_chains(child);
                Err(error)
            }
        }
    }

    /// Takes `vma` off all lists: from here on no walk finds it. Its chains, put before `rest`, keep the
    /// anon_vmas alive until [`Kernel::release_chains`], after the folios are gone.
    pub(super) fn unlink_chains(&self, vma: Pa<Vma>, rest: Pa<AnonVmaChain>) -> Pa<AnonVmaChain> {
        let Some(first) = self.obj(vma).chains.get().some() else {
            return rest;
        };
        let _family = self.lock_family(self.obj(first).anon_vma.get());
        let mut last = first;
        loop {
            self.chain_unlink(last);
            match self.obj(last).next_of_vma.get().some() {
                Some(next) => last = next,
                None => break,
            }
        }
        self.deactivate(vma);
        self.obj(last).next_of_vma.set(rest);
        self.obj(vma).chains.set(Pa::NULL);
        first
    }

    /// Frees chains that [`Kernel::unlink_chains`] took off, and the anon_vmas that only they kept.
    pub(super) fn release_chains(&self, first: Pa<AnonVmaChain>) {
        let mut next = first;
        while let Some(chain) = next.some() {
            next = self.obj(chain).next_of_vma.get();
            let anon = self.obj(chain).anon_vma.get();
            self.slab_free(chain);
            self.anon_vma_put(anon);
        }
    }

    /// Calls `f(mm, vma, gva, entry)` for every present entry that maps the folio at `gpa`, anonymous or a file's,
    /// under the lock of the family or of the file's i_mmap, and the entry's page-table lock. Something must keep
    /// the owner of the folio alive ([`Kernel::rmap_owner_get`]).
    pub fn rmap_walk(&self, gpa: u64, mut f: impl FnMut(Pa<Mm>, Pa<Vma>, u64, Pte)) {
        let folio = self.folio(gpa);
        let owner = match (folio.owner.get(), FrameKind::from_u8(folio.kind.get())) {
            (0, _) => return,
            (owner, Some(FrameKind::Anon)) => RmapOwner::Anon(Pa::new(owner)),
            (owner, Some(FrameKind::File)) => RmapOwner::File(Pa::new(owner)),
            _ => return,
        };
        let index = folio.index.get();
        if let RmapOwner::Anon(anon) = owner
            && folio.order.get() > 0
        {
            let _family = self.lock_family(anon);
            return self.walk_large(anon, gpa, &mut |at| f(at.mm, at.vma, at.gva, at.entry));
        }
        let maps = |entry: Pte| entry.is_present() && entry.address() == gpa;
        self.rmap_walk_places(owner, index, |at| {
            if maps(at.entry) {
                f(at.mm, at.vma, at.gva, at.entry);
            }
        });
    }

    /// Calls `f` for every present entry that maps a page of the folio of 2 MiB at `gpa`, or all of it. Under the lock of the
    /// family of `anon`.
    pub(super) fn walk_large(&self, anon: Pa<AnonVma>, gpa: u64, f: &mut impl FnMut(MappedAt)) {
        let first = self.folio(gpa).index.get();
        let indices = first..first + pages(HUGE_PAGE_SIZE);
        self.for_each_vma_of(anon, indices, |vma, part, gva| {
            let mut index = part.start;
            while index < part.end {
                let gva = gva + ((index - part.start) << PAGE_SHIFT);
                let page = gpa + ((index - first) << PAGE_SHIFT);
                index += self.rmap_part_of_large(vma, gva, page, part.end - index, f);
            }
        });
    }

    /// Calls `f` where entries of `vma` from `gva` on map the `count` frames from `gpa` on, or 2 MiB around them. Returns the
    /// pages that are done with: as far as one entry of level 2 goes.
    fn rmap_part_of_large(
        &self,
        vma: Pa<Vma>,
        gva: u64,
        gpa: u64,
        count: u64,
        f: &mut impl FnMut(MappedAt),
    ) -> u64 {
        let mm = self.obj(vma).mm.get();
        let space = self.obj(mm);
        self.walk_begins(space, gva, Walker::Rmap);
        let is_huge = space.huge.get() > 0 && self.rmap_huge_entry(mm, vma, gva, gpa, f);
        if !is_huge && let Ok(table) = self.leaf_table(space, gva) {
            let _guard = self.lock_table(table);
            let end = (gva + (count << PAGE_SHIFT)).min(huge_page_of(gva) + HUGE_PAGE_SIZE);
            let mut rest = gva;
            while let Some((gva_of, entry)) = self.next_entry((table, 1), rest, end) {
                rest = gva_of + PAGE_SIZE;
                if entry.is_present() && entry.address() == gpa + (gva_of - gva) {
                    let slot = Slot::new(table, 1, gva_of);
                    f(MappedAt {
                        mm,
                        vma,
                        gva: gva_of,
                        slot,
                        entry,
                    });
                }
            }
        }
        self.walk_ends(space, gva, Walker::Rmap);
        count.min(pages(huge_page_of(gva) + HUGE_PAGE_SIZE - gva))
    }

    /// Calls `f` for every place at which page `index` of `owner` may be mapped, whatever is there, under the same locks.
    /// A place that two VMAs cover for a moment comes twice.
    pub(super) fn rmap_walk_places(
        &self,
        owner: RmapOwner,
        index: u64,
        mut f: impl FnMut(MappedAt),
    ) {
        match owner {
            RmapOwner::Anon(anon) => self.rmap_walk_anon(anon, index, &mut f),
            RmapOwner::File(file) => {
                let _i_mmap = self.lock_i_mmap(file);
                self.walk_mappings(file, index, &mut f);
            }
        }
    }

    /// What leads from the mapped folio at `gpa`, which the caller has locked and holds a reference to, to its entries;
    /// it stays until [`Kernel::rmap_owner_put`]. None where the folio has just lost it.
    pub(super) fn rmap_owner_get(&self, gpa: u64) -> Option<RmapOwner> {
        let folio = self.folio(gpa);
        let owner = folio.owner.load(Acquire);
        match FrameKind::from_u8(folio.kind.get()) {
            // As long as the folio is locked, it is the file's, and the file cannot go without it (`remove_pages`).
            Some(FrameKind::File) => Pa::new(owner).some().map(RmapOwner::File),
            Some(FrameKind::Anon) => {
                let anon = Pa::<AnonVma>::new(owner).some()?;
                self.anon_vma_try_get(gpa, anon)
                    .then_some(RmapOwner::Anon(anon))
            }
            _ => None,
        }
    }

    /// See [`Kernel::rmap_owner_get`].
    pub(super) fn rmap_owner_put(&self, owner: RmapOwner) {
        if let RmapOwner::Anon(anon) = owner {
            self.anon_vma_put(anon);
        }
    }

    /// Takes a reference to `anon`, the owner of the folio at `gpa`, unless nothing maps the folio any more (Linux's
    /// `folio_get_anon_vma`). What maps it keeps its anon_vma; so where the folio is mapped after the reference was
    /// taken, the anon_vma is the one that was read, and otherwise it may be another one by now, which the slab's
    /// type-stable memory permits.
    fn anon_vma_try_get(&self, gpa: u64, anon: Pa<AnonVma>) -> bool {
        let folio = self.folio(gpa);
        if folio.mapcount.load(Acquire) == 0 {
            return false;
        }
        let more = |count: u32| (count > 0).then_some(count + 1);
        let taken = self.obj(anon).refcount.fetch_update(SeqCst, Acquire, more);
        if taken.is_err() {
            return false;
        }
        let is_owner = folio.mapcount.load(SeqCst) > 0 && folio.owner.load(SeqCst) == anon.0;
        if !is_owner {
            self.anon_vma_put(anon);
        }
        is_owner
    }

    fn rmap_walk_anon(&self, anon: Pa<AnonVma>, index: u64, f: &mut impl FnMut(MappedAt)) {
        let _family = self.lock_family(anon);
        self.walk_chains(anon, index, f);
    }

    /// As [`Kernel::rmap_walk_places`], under the lock of the family of `anon`.
    pub(super) fn walk_chains(&self, anon: Pa<AnonVma>, index: u64, f: &mut impl FnMut(MappedAt)) {
        self.for_each_vma_of(anon, index..index + 1, |vma, _, gva| {
            self.rmap_place(vma, gva, f);
        });
    }

    /// As [`Kernel::rmap_walk_places`], under the i_mmap lock of `file`.
    pub(super) fn walk_mappings(&self, file: Pa<File>, index: u64, f: &mut impl FnMut(MappedAt)) {
        self.for_each_mapping(file, &(index..index + 1), |vma, gva, _| {
            self.rmap_place(vma, gva, f);
        });
    }

    /// Calls `f(vma, part, gva)` for every VMA in the chains of `anon` that has pages of `indices`: which ones, and the address
    /// of the first. Under the family's lock.
    fn for_each_vma_of(
        &self,
        anon: Pa<AnonVma>,
        indices: Range<u64>,
        mut f: impl FnMut(Pa<Vma>, Range<u64>, u64),
    ) {
        let mut next = self.obj(anon).chains.get();
        while let Some(chain) = next.some() {
            next = self.obj(chain).next_of_anon.get();
            let vma = self.obj(chain).vma.get();
            let area = self.obj(vma);
            let (start, pgoff) = (area.start.get(), area.pgoff.get());
            let first = indices.start.max(pgoff);
            let end = indices.end.min(pgoff + pages(area.end.get() - start));
            if first < end {
                f(vma, first..end, start + ((first - pgoff) << PAGE_SHIFT));
            }
        }
    }

    /// Calls `f` with the entry of `vma` for `gva`, where there is a table for it.
    fn rmap_place(&self, vma: Pa<Vma>, gva: u64, f: &mut impl FnMut(MappedAt)) {
        let mm = self.obj(vma).mm.get();
        self.walk_begins(self.obj(mm), gva, Walker::Rmap);
        if let Ok(table) = self.leaf_table(self.obj(mm), gva) {
            let _guard = self.lock_table(table);
            let slot = Slot::new(table, 1, gva);
            let entry = self.read_pte(slot);
            f(MappedAt {
                mm,
                vma,
                gva,
                slot,
                entry,
            });
        }
        self.walk_ends(self.obj(mm), gva, Walker::Rmap);
    }

    /// Takes the lock of the family of `anon`.
    pub(super) fn lock_family(&self, anon: Pa<AnonVma>) -> Guard<'_, A> {
        let root = self.obj(anon).root.get();
        self.lock(&self.obj(root).lock, LockClass::AnonVma)
    }
}

/// What leads from a folio to the VMAs that may map it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RmapOwner {
    /// Of an anonymous folio.
    Anon(Pa<AnonVma>),
    /// Of a page of a file.
    File(Pa<File>),
}

/// A place that a walk back from a folio comes to.
#[derive(Clone, Copy, Debug)]
pub(super) struct MappedAt {
    pub(super) mm: Pa<Mm>,
    pub(super) vma: Pa<Vma>,
    pub(super) gva: u64,
    pub(super) slot: Slot,
    pub(super) entry: Pte,
}

/// Whether a clone may take an existing anon_vma over.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reuse {
    /// Fork.
    Allowed,
    /// Split and merge: the VMA shares the one it was cloned from.
    No,
}

impl<A: Arch> Kernel<A> {
    /// A child of `parent`, or a root where that is null. Nothing counts it yet but itself.
    fn anon_vma_alloc(&self, parent: Pa<AnonVma>) -> Result<Pa<AnonVma>, Errno> {
        let anon = self.slab_alloc::<AnonVma>()?;
        let object = self.obj(anon);
        match parent.some() {
            Some(parent) => {
                object.parent.set(parent);
                object.root.set(self.obj(parent).root.get());
            }
            None => {
                object.parent.set(anon);
                object.root.set(anon);
                // Release: who takes a reference through a stale owner sees the object as it is.
                object.refcount.store(1, Release);
            }
        }
        Ok(anon)
    }

    /// Frees an anon_vma that nobody counts.
    fn anon_vma_free(&self, anon: Pa<AnonVma>) {
        let object = self.obj(anon);
        assert!(object.chains.get().is_null() && object.degree.get() == 0);
        // Reclaim may have found it through a folio that was mapped a moment ago; it looks again when it has the lock, and
        // is gone soon (Linux's anon_vma_free).
        if object.lock.load(Acquire) != 0 {
            drop(self.lock(&object.lock, LockClass::AnonVma));
        }
        self.slab_free(anon);
    }

    /// Gives a reference up; with the last one the anon_vma goes, and with it its count at its parent.
    fn anon_vma_put(&self, anon: Pa<AnonVma>) {
        let mut anon = anon;
        loop {
            let object = self.obj(anon);
            let (parent, is_root) = (object.parent.get(), object.root.get() == anon);
            // A root's own link goes with the last reference of others, in one step: from 0 on nobody takes one.
            let own = u32::from(is_root);
            let less = |count: u32| Some(if count - 1 == own { 0 } else { count - 1 });
            // AcqRel: whoever frees it sees it as the other holders left it.
            let before = object.refcount.fetch_update(AcqRel, Acquire, less);
            if before.is_ok_and(|before| before - 1 > own) {
                return;
            }
            if is_root {
                return self.anon_vma_free(anon);
            }
            {
                let _family = self.lock_family(parent);
                let degree = &self.obj(parent).degree;
                degree.set(degree.get() - 1);
            }
            self.anon_vma_free(anon);
            anon = parent;
        }
    }

    /// `vma` has no anon_vma any more. Under the family's lock; the VMA's chains, which outlive this,
    /// hold the reference that keeps it from being the last.
    fn deactivate(&self, vma: Pa<Vma>) {
        if let Some(anon) = self.obj(vma).anon_vma.get().some() {
            let object = self.obj(anon);
            object.active.set(object.active.get() - 1);
            object.degree.set(object.degree.get() - 1);
            let before = object.refcount.fetch_sub(1, AcqRel);
            assert!(before > 1, "anon_vma {anon:?} without its chain");
            self.obj(vma).anon_vma.set(Pa::NULL);
        }
    }

    /// Undoes a clone that ran out of memory. Under the family's lock, which the other chains of the
    /// source keep alive: none of the references here is the last.
    fn abandon_chains(&self, vma: Pa<Vma>) {
        self.deactivate(vma);
        let mut next = self.obj(vma).chains.get();
        self.obj(vma).chains.set(Pa::NULL);
        while let Some(chain) = next.some() {
            next = self.obj(chain).next_of_vma.get();
            self.chain_unlink(chain);
            let before = self
                .obj(self.obj(chain).anon_vma.get())
                .refcount
                .fetch_sub(1, AcqRel);
            assert!(before > 1);
            self.slab_free(chain);
        }
    }

    /// Puts `vma` on the list of `anon` through `chain`: first, or right behind the chain of the VMA that it is a copy of.
    /// So a walk comes to a parent before its children, and finds in a child what fork has copied meanwhile
    /// (Linux's anon_vma_interval_tree_insert, which has the same order). Under the family's lock.
    fn chain_link(
        &self,
        chain: Pa<AnonVmaChain>,
        vma: Pa<Vma>,
        anon: Pa<AnonVma>,
        behind: Option<Pa<AnonVmaChain>>,
    ) {
        let (link, area, object) = (self.obj(chain), self.obj(vma), self.obj(anon));
        link.vma.set(vma);
        link.anon_vma.set(anon);
        link.next_of_vma.set(area.chains.get());
        area.chains.set(chain);
        let place = behind.map_or(&object.chains, |prev| &self.obj(prev).next_of_anon);
        let next = place.get();
        link.next_of_anon.set(next);
        link.prev_of_anon.set(behind.unwrap_or(Pa::NULL));
        if !next.is_null() {
            self.obj(next).prev_of_anon.set(chain);
        }
        place.set(chain);
        // Release: as for a root.
        object.refcount.fetch_add(1, Release);
    }

    /// Takes `chain` off its anon_vma's list. Under the family's lock.
    fn chain_unlink(&self, chain: Pa<AnonVmaChain>) {
        let link = self.obj(chain);
        let (next, prev) = (link.next_of_anon.get(), link.prev_of_anon.get());
        if !next.is_null() {
            self.obj(next).prev_of_anon.set(prev);
        }
        if prev.is_null() {
            self.obj(link.anon_vma.get()).chains.set(next);
        } else {
            self.obj(prev).next_of_anon.set(next);
        }
        link.next_of_anon.set(Pa::NULL);
        link.prev_of_anon.set(Pa::NULL);
        link.vma.set(Pa::NULL);
    }
}
