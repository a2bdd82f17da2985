//! What reclaim asks of the entries that map a folio: were they used, and their removal (Linux's mm/rmap.c,
//! `folio_referenced` and `try_to_unmap_one`).
//!
//! Reclaim may run inside an allocation, whose caller holds the lock of some family of anon_vmas, of some i_mmap, or of some
//! page of a file; so it tries those of a folio's and passes the folio by where it does not get them. Nothing keeps the
//! anon_vma to which an isolated folio points: with its lock held, a folio that is mapped is (Linux's
//! `folio_lock_anon_vma_read`), for a root is not freed while its lock is held. The file of a page stays while the page is
//! locked and still the file's.

use core::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};
use core::sync::atomic::fence;

use abi::channel::{Walker, cause};
use abi::layout::PAGE_SIZE;
use abi::lock::LockClass;
use abi::objects::{AnonVma, File, Pa, Vma, folio_flags, folio_state, vma_flags};
use abi::point::Point;
use abi::pte::{NonPresent, Pte, PteFlags};

use super::batch::Batch;
use super::folio_split::InHand;
use super::rmap::{MappedAt, RmapOwner};
use super::{Field, FreedTables};
use crate::Kernel;
use crate::arch::Arch;
use crate::sync::Guard;

/// What the entries of a folio say.
#[derive(Clone, Copy, Default)]
pub(super) struct References {
    /// Entries that were used since they were last asked.
    pub(super) used: u32,
    /// Some mapping of it is locked, or the program's own.
    pub(super) locked: bool,
    /// Some mapping is not: of a folio of 2 MiB other pages may be mapped there.
    pub(super) evictable: bool,
}

/// What takes the place of an entry.
#[derive(Clone, Copy)]
enum Replacement {
    /// An entry that names this slot.
    Swap(u64),
    /// Nothing, where the program has given the contents up and has not written since.
    Nothing,
    /// Nothing: the page cache has the page.
    Cached,
}

/// The way back from a folio to its entries, held open.
struct WayBack<'k, A: Arch> {
    owner: RmapOwner,
    /// Of the family of anon_vmas, or the i_mmap.
    _list: Guard<'k, A>,
    /// Of a page of a file.
    _folio: Option<Guard<'k, A>>,
}

impl<A: Arch> Kernel<A> {
    /// Asks every entry of the folio whether it was used, and makes it forget. None where somebody else is at work.
    ///
    /// A goes without a flush: a CPU that still has the translation does not set it again, so a use may be missed, which
    /// costs a fault at worst (Linux's `ptep_clear_flush_young`, arch/x86/mm/pgtable.c).
    pub(super) fn folio_referenced(&self, gpa: u64) -> Option<References> {
        let mut found = References::default();
        let way = self.try_lock_way_back(gpa)?;
        self.walk_back(&way, gpa, |at| {
            if is_kept(self.obj(at.vma)) {
                found.locked = true;
                return;
            }
            found.evictable = true;
            if at.entry.flags().contains(PteFlags::ACCESSED) {
                found.used += 1;
                let unused = at.entry.without(PteFlags::ACCESSED);
                self.set_pte(self.obj(at.mm), at.gva, at.slot, at.entry, unused);
            }
        });
        Some(found)
    }

    /// Replaces every entry that maps the folio, which is in the swap cache, by one that names its slot, as far as it goes:
    /// pinned folios and locked mappings stay. The batch is to be flushed before anybody relies on it.
    pub(super) fn unmap_to_swap(&self, gpa: u64, slot: u64, batch: &mut Batch) {
        self.unmap_folio(gpa, Replacement::Swap(slot), batch);
    }

    /// Removes the entries that map a folio that the program has given up (MADV_FREE), if it has not written to it since.
    pub(super) fn unmap_lazyfree(&self, gpa: u64, batch: &mut Batch) {
        self.unmap_folio(gpa, Replacement::Nothing, batch);
    }

    /// Removes the entries that map a page of a file.
    pub(super) fn unmap_cached(&self, gpa: u64, batch: &mut Batch) {
        self.unmap_folio(gpa, Replacement::Cached, batch);
    }

    fn unmap_folio(&self, gpa: u64, by: Replacement, batch: &mut Batch) {
        let Some(way) = self.try_lock_way_back(gpa) else {
            return;
        };
        let mut goes_on = true;
        self.walk_back(&way, gpa, |at| {
            goes_on = goes_on
                && !is_kept(self.obj(at.vma))
                && batch.takes(at.mm)
                && self.unmap_entry(at, gpa, by, batch);
        });
    }

    /// Linux's `try_to_unmap_one`, under the entry's page-table lock. False where the folio stays mapped.
    fn unmap_entry(
        &self,
        MappedAt {
            mm,
            gva,
            slot: place,
            entry,
            ..
        }: MappedAt,
        gpa: u64,
        by: Replacement,
        batch: &mut Batch,
    ) -> bool {
        let (space, folio) = (self.obj(mm), self.folio(gpa));
        let exclusive = self.folio_is_exclusive(gpa);
        let new = match by {
            Replacement::Swap(slot) => NonPresent::Swap { slot, exclusive }.entry(),
            Replacement::Nothing | Replacement::Cached => Pte::NONE,
        };
        let old = self.set_pte(space, gva, place, entry, new);
        // Who pins without a lock takes the pin and then looks whether the entry is still there; here it is the other
        // way round (Linux's folio_try_share_anon_rmap_pte). Nothing was lost: the entry comes back as it was.
        fence(SeqCst);
        let given_up = matches!(by, Replacement::Nothing);
        let dirty = folio.state.load(Acquire) & folio_state::DIRTY != 0;
        let written = given_up && (dirty || old.flags().contains(PteFlags::DIRTY));
        if self.folio_is_pinned(gpa) || written {
            self.set_pte(space, gva, place, new, old);
            if written {
                folio.flags.fetch_and(!folio_flags::LAZYFREE, Relaxed);
            }
            return false;
        }
        match by {
            Replacement::Swap(slot) => self.swap_slot_dup(slot),
            // Before the address can be touched again: that would find another page than who still reads this one.
            Replacement::Nothing => self.flush_range(mm, gva, gva + PAGE_SIZE, FreedTables::No),
            // Who touches the address again finds this page, as long as a CPU may still read it here.
            Replacement::Cached => self.reclaim_rmap(mm, gva, old),
        }
        if exclusive {
            folio.flags.fetch_and(!folio_flags::EXCLUSIVE, Relaxed);
        }
        if old.flags().contains(PteFlags::DIRTY) {
            folio.state.fetch_or(folio_state::DIRTY, Relaxed);
        }
        self.folio_unmap(gpa);
        self.batch_add(batch, mm, gva);
        point!(self, Point::PteClear, [space.id.get(), gva]);
        // Not the last one: the folio is isolated.
        self.folio_put(gpa, cause::UNMAP);
        true
    }

    /// None where it is busy, or the folio is mapped no more.
    fn try_lock_way_back(&self, gpa: u64) -> Option<WayBack<'_, A>> {
        if self.is_of_file(gpa) {
            self.try_lock_mappings(gpa)
        } else {
            self.try_lock_family(gpa)
        }
    }

    fn try_lock_family(&self, gpa: u64) -> Option<WayBack<'_, A>> {
        let folio = self.folio(gpa);
        let anon = Pa::<AnonVma>::new(folio.owner.get()).some()?;
        let root = self.obj(anon).root.get().some()?;
        let family = self.try_lock(&self.obj(root).lock, LockClass::AnonVma)?;
        let same = folio.mapcount.load(Acquire) > 0
            && folio.owner.get() == anon.0
            && self.obj(anon).root.get() == root;
        same.then_some(WayBack {
            owner: RmapOwner::Anon(anon),
            _list: family,
            _folio: None,
        })
    }

    fn try_lock_mappings(&self, gpa: u64) -> Option<WayBack<'_, A>> {
        let page = self.try_lock_cached(gpa)?;
        let file = Pa::<File>::new(self.folio(gpa).owner.get());
        let i_mmap = self.try_lock(&self.obj(file).i_mmap_lock, LockClass::IMmap)?;
        Some(WayBack {
            owner: RmapOwner::File(file),
            _list: i_mmap,
            _folio: Some(page),
        })
    }

    /// The lock of a page of a file to which the caller has a reference, where it is free and the page still the file's.
    pub(super) fn try_lock_cached(&self, gpa: u64) -> Option<Guard<'_, A>> {
        let folio = self.folio(gpa);
        let lock = self.try_lock(&folio.lock, LockClass::Folio)?;
        (folio.owner.get() != 0).then_some(lock)
    }

    /// Splits a folio of 2 MiB that the caller has in hand, alone, into small ones; what nothing maps is freed, but for the
    /// first page, which stays in hand (Linux's `split_folio_to_list`). Returns how many are free. None where it stays whole: somebody
    /// else uses it, or is at work.
    pub(super) fn split_isolated(&self, head: u64) -> Option<u64> {
        let folio = self.folio(head);
        if folio.refcount.load(Acquire) != folio.mapcount.load(Acquire) + 1 {
            return None;
        }
        let split = {
            let way = self.try_lock_family(head)?;
            let table = self.sole_table(&way, head)?;
            let _guard = self.lock_table(table);
            self.split_mapped_by(table, head, InHand::Yes).ok()?
        };
        Some(self.put_unmapped(head, &split, InHand::Yes))
    }

    /// A table of level 1 with an entry that maps a page of the folio of 2 MiB at `head`; an entry of level 2 is split for that,
    /// where nothing else maps the folio.
    fn sole_table(&self, way: &WayBack<'_, A>, head: u64) -> Option<u64> {
        let mut found = None;
        self.walk_back(way, head, |at| found = found.or(Some(at)));
        let at = found?;
        if at.slot.level == 1 {
            return Some(at.slot.table);
        }
        let mm = self.obj(at.mm);
        self.walk_begins(mm, at.gva, Walker::Rmap);
        self.with_huge(mm, at.gva, |slot, entry| {
            // Looked at under this lock: fork, which copies entries of 2 MiB first, finds them all or is done with them.
            if entry.address() == head && self.folio(head).mapcount.load(Acquire) == 1 {
                self.split_huge_locked(at.mm, at.gva, slot, entry);
            }
        });
        let table = self.leaf_table(mm, at.gva).ok();
        self.walk_ends(mm, at.gva, Walker::Rmap);
        table
    }

    /// Calls `f` for every present entry that maps the folio.
    fn walk_back(&self, way: &WayBack<'_, A>, gpa: u64, mut f: impl FnMut(MappedAt)) {
        if let RmapOwner::Anon(anon) = way.owner
            && self.is_large(gpa)
        {
            return self.walk_large(anon, gpa, &mut f);
        }
        let index = self.folio(gpa).index.get();
        let mut maps = |at: MappedAt| {
            if at.entry.is_present() && at.entry.address() == gpa {
                f(at);
            }
        };
        match way.owner {
            RmapOwner::Anon(anon) => self.walk_chains(anon, index, &mut maps),
            RmapOwner::File(file) => self.walk_mappings(file, index, &mut maps),
        }
    }
}

/// True where the pages of a VMA stay in memory.
fn is_kept(area: &Vma) -> bool {
    area.flags.get() & (vma_flags::LOCKED | vma_flags::WIRED) != 0
}
