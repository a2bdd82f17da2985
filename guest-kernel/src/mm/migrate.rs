//! Migration of a folio to another frame (Linux 6.18's mm/migrate.c and, for the entries, mm/rmap.c).
//!
//! In Linux's order, under the folio locks of the old frame and of the new one, which nobody else knows yet:
//! 1. Every entry that maps the folio becomes a migration entry and is flushed, under its page-table lock
//!    (`try_to_migrate`): from then on nobody reads or writes the frame but who holds a reference.
//! 2. Where anybody does, nothing is moved (`folio_expected_ref_count`): a device writes the old frame, whatever the
//!    entries say.
//! 3. The contents are copied, then for a page of a file the page cache gets the new frame; whoever has found the
//!    old one there meanwhile holds a reference, so that is looked at again under the cache's lock.
//! 4. Every migration entry becomes a present one again, of the new frame, or, where something was in the way, of the old
//!    one (`remove_migration_ptes`). Both walks find the same entries: fork copies migration entries to a VMA that the walk
//!    comes to after the parent's, mremap moves them under the locks of the walk, and whoever clears one has
//!    nothing to give back.
//! 5. The locks are released, which is what faults on migration entries wait for, and the old frame is given back.
//!
//! A migration entry says what fork left of the page's exclusiveness: where it carries no COW, the page is still the
//! mm's alone ([`NonPresent::KEPT`]; Linux's readable-exclusive entries).

use core::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};
use core::sync::atomic::fence;

use abi::bug::Bug;
use abi::channel::cause;
use abi::layout::PAGE_SIZE;
use abi::objects::{FrameKind, folio_flags, folio_state, vma_flags};
use abi::point::Point;
use abi::pte::{NonPresent, Pte, PteFlags};
use abi::syscall::Errno;

use super::rmap::{MappedAt, RmapOwner};
use super::vma::leaf_flags;
use super::{Field, FreedTables};
use crate::Kernel;
use crate::arch::Arch;

/// Times that somebody is given to let go of a folio (Linux's NR_MAX_MIGRATE_PAGES_RETRY).
const ATTEMPTS: usize = 10;
/// Flags that a folio takes along.
const MOVING: u8 = folio_flags::FRESH | folio_flags::LAZYFREE;

/// A folio that nobody else may migrate: the caller holds a reference, and [`folio_flags::ISOLATED`].
pub(super) struct Isolated(u64);

impl Isolated {
    /// Where it lies.
    pub(super) fn gpa(&self) -> u64 {
        self.0
    }

    /// It is no longer isolated.
    fn into_gpa(self) -> u64 {
        self.0
    }
}

/// Whether every entry that maps a folio could be taken away.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unmapped {
    Yes,
    /// A device uses it, or its program must not fault on it.
    Refused,
}

impl<A: Arch> Kernel<A> {
    /// Takes the folio that `entry` maps for migration; none where somebody else has, or where it does not count its
    /// mappings. Under the page-table lock.
    pub(super) fn isolate(&self, entry: Pte) -> Option<Isolated> {
        let gpa = entry.address();
        let is_user =
            FrameKind::from_u8(self.folio(gpa).kind.get()).is_some_and(FrameKind::is_user);
        // Nor does a folio of 2 MiB move.
        if !entry.is_present() || !is_user || self.folio(gpa).order.get() > 0 {
            return None;
        }
        let flags = &self.folio(gpa).flags;
        if flags.fetch_or(folio_flags::ISOLATED, Acquire) & folio_flags::ISOLATED != 0 {
            return None;
        }
        self.folio_get(gpa, cause::HOLD);
        Some(Isolated(gpa))
    }

    /// Gives an isolated folio back.
    pub(super) fn put_isolated(&self, folio: Isolated) {
        let gpa = folio.into_gpa();
        self.folio(gpa)
            .flags
            .fetch_and(!folio_flags::ISOLATED, Relaxed);
        self.folio_put(gpa, cause::HOLD);
    }

    /// Moves an isolated folio to the frame at `to`, which was allocated as one of its kind; one of the two is free
    /// afterwards. Without any lock but the mmap_lock.
    ///
    /// # Errors
    /// EAGAIN where somebody uses it who does not let go: the folio is where it was.
    pub(super) fn migrate_folio(&self, folio: Isolated, to: u64) -> Result<(), Errno> {
        let from = folio.gpa();
        let mut result = Err(Errno::EAGAIN);
        for _ in 0..ATTEMPTS {
            result = self.migrate_once(from, to);
            if result.is_ok() {
                break;
            }
        }
        if result.is_ok() && !self.is_of_file(to) {
            self.lru_add(to);
        }
        self.put_isolated(folio);
        // What maps the new frame, or its page cache, holds references of its own.
        self.folio_put(to, cause::HOLD);
        result
    }

    fn migrate_once(&self, from: u64, to: u64) -> Result<(), Errno> {
        let _from = self.lock_folio(from);
        // A look before anybody is disturbed. The disk, whose answer is for this frame, does not begin while it is locked.
        if self.folio(from).refcount.load(Acquire) != self.expected_references(from)
            || self.in_transfer(from)
        {
            return Err(Errno::EAGAIN);
        }
        let Some(owner) = self.rmap_owner_get(from) else {
            return Err(Errno::EAGAIN);
        };
        let _to = self.lock_folio(to);
        let result = self.move_unmapped(owner, from, to);
        self.rmap_owner_put(owner);
        result
    }

    /// The references to a folio that nobody uses but its mappings, its page cache and who migrates it (Linux's
    /// `folio_expected_ref_count`, with the caller's). The swap cache's is not among them: a folio with a slot stays where
    /// it is.
    fn expected_references(&self, gpa: u64) -> u32 {
        let folio = self.folio(gpa);
        let is_cached = folio.kind.get() == FrameKind::File as u8 && folio.owner.get() != 0;
        folio.mapcount.load(Acquire) + u32::from(is_cached) + 1
    }

    /// Both are locked.
    fn move_unmapped(&self, owner: RmapOwner, from: u64, to: u64) -> Result<(), Errno> {
        let index = self.folio(from).index.get();
        let unmapped = self.try_to_migrate(owner, index, from);
        let moved = unmapped == Unmapped::Yes
            && self.folio(from).mapcount.load(Acquire) == 0
            && self.move_contents(owner, index, from, to);
        point!(self, Point::Migrate, [from, to]);
        let now = if moved { to } else { from };
        self.remove_migration_entries(owner, index, from, now);
        if moved { Ok(()) } else { Err(Errno::EAGAIN) }
    }

    /// Copies the contents and the state. False where somebody uses the folio: nothing has changed then.
    fn move_contents(&self, owner: RmapOwner, index: u64, from: u64, to: u64) -> bool {
        let (old, new) = (self.folio(from), self.folio(to));
        if old.refcount.load(Acquire) != self.expected_references(from) {
            return false;
        }
        self.arch.copy_frame(from, to);
        if self.config.bugs.has(Bug::MigrateCopyBeforeFlush) {
            self.flush_places(owner, index, from);
        }
        new.index.set(index);
        new.flags.set(old.flags.get() & MOVING);
        match owner {
            RmapOwner::Anon(_) => {
                // The copy is no use where a reference was taken meanwhile.
                if old.refcount.load(SeqCst) != self.expected_references(from) {
                    return false;
                }
                // Read now: a write fault may have narrowed it before the entries went.
                new.owner.set(old.owner.get());
            }
            RmapOwner::File(file) => {
                // The old one is still on its list.
                new.state.set(old.state.get() & !folio_state::LRU);
                let expected = self.expected_references(from);
                new.owner.set(file.0);
                if !self.cache_replace(file, index, (from, expected), to) {
                    new.owner.set(0);
                    return false;
                }
                old.owner.set(0);
                if self.file_on_disk(file) {
                    self.lru_add(to);
                }
                self.folio_put(from, cause::CACHE);
            }
        }
        self.charge_migrate(from, to);
        true
    }

    /// Replaces the entries that map the folio by migration entries (Linux's `try_to_migrate_one`).
    fn try_to_migrate(&self, owner: RmapOwner, index: u64, from: u64) -> Unmapped {
        let mut result = Unmapped::Yes;
        self.rmap_walk_places(owner, index, |at| {
            let maps = at.entry.is_present() && at.entry.address() == from;
            if maps && result == Unmapped::Yes {
                result = self.take_entry(at, from);
            }
        });
        result
    }

    /// Under the page-table lock of the entry.
    fn take_entry(&self, at: MappedAt, from: u64) -> Unmapped {
        let mm = self.obj(at.mm);
        // Its program never faults on it (`wire`).
        if self.obj(at.vma).flags.get() & vma_flags::WIRED != 0 {
            return Unmapped::Refused;
        }
        let said = NonPresent::Migration {
            gpa: from,
            flags: at.entry.flags().intersection(NonPresent::KEPT),
        };
        let old = self.set_pte(mm, at.gva, at.slot, at.entry, said.entry());
        point!(self, Point::PteClear, [mm.id.get(), at.gva]);
        if !self.config.bugs.has(Bug::MigrateCopyBeforeFlush) {
            self.flush_range(at.mm, at.gva, at.gva + PAGE_SIZE, FreedTables::No);
        }
        // Who pins without a lock looks at the entry once it has the pin; here it is the other way round (Linux's
        // __folio_try_share_anon_rmap).
        fence(SeqCst);
        if self.folio_is_pinned(from) && self.folio_is_exclusive(from) {
            let out = self.read_pte(at.slot);
            self.set_pte(mm, at.gva, at.slot, out, old);
            return Unmapped::Refused;
        }
        self.folio(from)
            .flags
            .fetch_and(!folio_flags::EXCLUSIVE, Relaxed);
        self.folio_unmap(from);
        self.folio_put(from, cause::UNMAP);
        Unmapped::Yes
    }

    /// Makes the migration entries of `from` map `now`, which is locked too (Linux's `remove_migration_pte`).
    fn remove_migration_entries(&self, owner: RmapOwner, index: u64, from: u64, now: u64) {
        self.rmap_walk_places(owner, index, |at| match at.entry.non_present() {
            Some(NonPresent::Migration { gpa, flags }) if gpa == from => {
                self.bring_back(at, flags, now);
            }
            _ => {}
        });
    }

    /// Under the page-table lock of the entry. What was not present is not cached: no flush.
    fn bring_back(&self, at: MappedAt, kept: PteFlags, now: u64) {
        let (mm, flags) = (self.obj(at.mm), self.obj(at.vma).flags.get());
        let mut leaf = leaf_flags(flags) | kept;
        // mprotect has changed the VMA and comes to its entries next.
        if flags & vma_flags::WRITE == 0 {
            leaf.remove(PteFlags::WRITE);
        }
        let folio = self.folio(now);
        if folio.kind.get() == FrameKind::Anon as u8 && !kept.contains(PteFlags::COW) {
            folio.flags.fetch_or(folio_flags::EXCLUSIVE, Relaxed);
        }
        self.folio_map_again(now, cause::MAP);
        self.set_pte(mm, at.gva, at.slot, at.entry, Pte::new(now, leaf));
        point!(self, Point::PteInstall, [mm.id.get(), at.gva]);
    }

    /// The seeded bug: the flush of what `try_to_migrate` took out, when the contents are copied already.
    #[cold]
    fn flush_places(&self, owner: RmapOwner, index: u64, from: u64) {
        self.rmap_walk_places(owner, index, |at| {
            if let Some(NonPresent::Migration { gpa, .. }) = at.entry.non_present()
                && gpa == from
            {
                self.flush_range(at.mm, at.gva, at.gva + PAGE_SIZE, FreedTables::No);
            }
        });
    }
}
