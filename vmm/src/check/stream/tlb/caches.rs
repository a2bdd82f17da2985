//! What each vCPU may hold in its TLBs and paging-structure caches.
//!
//! What the loaded tables say now may be cached at any moment, so it is not written down. Written down
//! ([`Held`]) is what may be cached besides: translations and pointers to tables that the tables no longer
//! say, those of a PCID that were reached in another way, and global translations. While its PCID is loaded,
//! a [`Context`] is closed under filling: what a processor can reach through a pointer that it may hold is
//! written down too.

use abi::pte::Pte;

use super::held::{Held, Notes, Rights, Written, combine, through};
use super::laws::{Law, Laws};
use super::tables::Tables;

/// Most that is written down of one PCID of a vCPU: a hostile guest cannot make the host go out of memory.
const MAX_HELD: usize = 1 << 13;
/// Most flushed ranges that are noted of a PCID of unknown past.
const MAX_SETTLED: usize = 64;
/// A level above the highest: what refers to a root.
const ROOT: u8 = 5;

/// What may be cached for one PCID on one vCPU.
#[derive(Clone, Debug, Default)]
pub(super) struct Context {
    pub(super) pcid: u64,
    pub(super) mm: u64,
    pub(super) root: u64,
    /// What `root` gives by entries that are older is held without being written down. `u64::MAX`: it is
    /// loaded.
    pub(super) until: u64,
    /// The event of its last flush of everything.
    pub(super) since: u64,
    /// Something may be cached that no event told of, but for pages of `settled`.
    pub(super) unknown: bool,
    pub(super) settled: Vec<(u64, u64)>,
    pub(super) leaves: Notes,
    pub(super) pointers: Notes,
}

impl Context {
    pub(super) fn is_loaded(&self) -> bool {
        self.until == u64::MAX
    }

    pub(super) fn clear(&mut self, at: u64) {
        self.leaves.clear();
        self.pointers.clear();
        self.unknown = false;
        self.settled.clear();
        self.since = at;
        if !self.is_loaded() {
            self.until = 0;
        }
    }

    /// Pages of `start..end` are flushed.
    pub(super) fn drop_pages(&mut self, start: u64, end: u64, laws: Laws) {
        self.leaves.drop_range(start, end, laws);
        if self.unknown && self.settled.len() < MAX_SETTLED {
            self.settled.push((start, end));
        }
    }

    /// Writes down that `held` may be cached, and what can be reached through it.
    fn take_in(&mut self, held: Held, globals: &mut Notes, tables: &Tables, laws: Laws) {
        let list = if !held.is_leaf() {
            &mut self.pointers
        } else if !held.is_global() || !laws.obey(Law::GlobalSurvivesCr3) {
            &mut self.leaves
        } else if self.is_loaded() {
            &mut *globals
        } else {
            return; // Written down when the PCID was left.
        };
        if list.len() >= MAX_HELD {
            self.unknown = true;
            self.settled.clear();
        } else if !list.include(&held) {
            list.push(held);
            if !held.is_leaf() && laws.obey(Law::FillsThroughHeldPointers) {
                self.expand(&held, globals, tables, laws);
            }
        }
    }

    /// What is there behind a pointer: everything, or what was there when the PCID was left.
    pub(super) fn expand(&mut self, via: &Held, globals: &mut Notes, tables: &Tables, laws: Laws) {
        if via.level <= 1 || self.leaves.len() >= MAX_HELD {
            return;
        }
        for (index, entry) in tables.present(via.entry.address()) {
            if entry.since < self.until {
                let slot = via.entry.address() + index * 8;
                let held = through(via, slot, entry.pte, entry.since, laws);
                self.take_in(held, globals, tables, laws);
            }
        }
    }

    /// Writes down all that was not.
    pub(super) fn expand_root(&mut self, globals: &mut Notes, tables: &Tables, laws: Laws) {
        let root = Held {
            mm: self.mm,
            gva: 0,
            level: ROOT,
            slot: 0,
            entry: Pte(self.root),
            rights: Rights::ALL,
            version: 0,
            since: self.since,
            taken: None,
            cut: None,
            missed: false,
        };
        self.expand(&root, globals, tables, laws);
    }

    /// An entry changes. `tables`: before it has.
    #[inline]
    pub(super) fn written(
        &mut self,
        it: &Written,
        globals: &mut Notes,
        tables: &Tables,
        laws: Laws,
    ) {
        // Most entries become present where none was and nothing is written down.
        if it.old.is_present() || self.leaves.len() + self.pointers.len() > 0 {
            self.replaced(it, globals, tables, laws);
        }
    }

    fn replaced(&mut self, it: &Written, globals: &mut Notes, tables: &Tables, laws: Laws) {
        self.leaves.resolve(it, laws);
        self.pointers.resolve(it, laws);
        let (mm, level, gva) = it.place;
        let limit = if laws.obey(Law::OnlyTheLoadedPcidFills) {
            self.until
        } else {
            u64::MAX
        };
        let was_reached = it.old.is_present()
            && self.root == it.root
            && it.path.newest < limit
            && it.since < limit;
        if was_reached && !it.was_never_cached(laws) && !(self.is_loaded() && it.gives_as_much()) {
            let of_entry = if laws.obey(Law::OnlyDirtyIsCachedDirty) {
                Rights::of_gone(it.old, level)
            } else {
                Rights::of(it.old, level)
            };
            let held = Held {
                mm,
                gva,
                level,
                slot: it.path.slot,
                entry: it.old,
                rights: combine(it.path.rights, of_entry, it.old.is_leaf(level), laws),
                version: it.since,
                since: it.since.max(it.path.newest).max(self.since),
                taken: Some(it.change),
                cut: None,
                missed: false,
            };
            self.take_in(held, globals, tables, laws);
        }
        if self.is_loaded() && it.new.is_present() && laws.obey(Law::FillsThroughHeldPointers) {
            let table = it.path.slot & !0xfff;
            for index in 0..self.pointers.len() {
                let via = self.pointers[index];
                if via.entry.address() == table && via.level == level + 1 {
                    let held = through(&via, it.path.slot, it.new, it.change.at, laws);
                    self.take_in(held, globals, tables, laws);
                }
            }
        }
    }
}
