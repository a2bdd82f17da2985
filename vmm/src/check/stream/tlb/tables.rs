//! The page tables as events tell them.
//!
//! Every entry is known by where it lies in memory, not by what it translates: a table that was unlinked
//! keeps its entries, and a vCPU that still has a pointer to it reads them there.

use abi::layout::ENTRIES_PER_TABLE;
use abi::pte::{ADDRESS_MASK, Pte, PteFlags, index, level_size};
use rustc_hash::FxHashMap;

use super::held::Rights;
use crate::map::Map;

/// Where no level-4 table is.
const NO_ROOT: u64 = ADDRESS_MASK;
/// What the processor sets by itself.
const HARDWARE: u64 = PteFlags::ACCESSED.bits() | PteFlags::DIRTY.bits();

/// Where software sees an entry: mm, level, first address.
pub(super) type Place = (u64, u8, u64);

/// An entry, and since which event it is what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) pte: Pte,
    pub(super) since: u64,
    level: u8,
}

/// The way from a root to the slot of an entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Path {
    /// GPA of the entry.
    pub(super) slot: u64,
    /// What all entries on the way permit.
    pub(super) rights: Rights,
    /// The last event that changed one of them.
    pub(super) newest: u64,
}

/// A translation that the tables give.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leaf {
    pub(super) level: u8,
    pub(super) pte: Pte,
    pub(super) rights: Rights,
}

/// The page tables of all mms.
#[derive(Debug, Default)]
pub(super) struct Tables {
    /// Present entries of user halves, by their GPA.
    entries: Map<Entry>,
    /// How many entries of a table are present.
    used: Map<u32>,
    /// How many present entries refer to what starts at an address, by [`target`].
    mapped: Map<u32>,
    /// Level-4 table of each mm.
    pub(super) roots: Map<u64>,
    /// Entries of tables that are filled before they are linked.
    unlinked: FxHashMap<Place, Pte>,
    /// Entries that are neither none nor present, by their GPA: no processor caches them, but they are explained too.
    silent: Map<Pte>,
    /// Tables of level 1 by the mm and the address at which they were linked last, where nothing is linked since: a collapse
    /// clears the entries of one that it has unlinked.
    parked: FxHashMap<(u64, u64), u64>,
    /// Present leaf entries with G.
    pub(super) globals: u32,
}

impl Clone for Tables {
    fn clone(&self) -> Self {
        let mut copy = Self::default();
        copy.clone_from(self);
        copy
    }
    /// Keeps the memory of the maps: once a schedule.
    fn clone_from(&mut self, from: &Self) {
        self.entries.clone_from(&from.entries);
        self.used.clone_from(&from.used);
        self.mapped.clone_from(&from.mapped);
        self.roots.clone_from(&from.roots);
        self.unlinked.clone_from(&from.unlinked);
        self.silent.clone_from(&from.silent);
        self.parked.clone_from(&from.parked);
        self.globals = from.globals;
    }
}

/// Key of [`Tables::mapped`]: the address and what is there: a page of a level, or (0) a table.
fn target(pte: Pte, level: u8) -> u64 {
    if pte.is_leaf(level) {
        pte.leaf_address(level) | u64::from(level)
    } else {
        pte.address()
    }
}

fn is_global(pte: Pte, level: u8) -> bool {
    pte.is_leaf(level) && pte.flags().contains(PteFlags::GLOBAL)
}

/// True where both are the same but for what the processor sets.
pub(super) fn same(a: Pte, b: Pte) -> bool {
    if a.is_present() {
        (a.0 ^ b.0) & !HARDWARE == 0
    } else {
        a == b
    }
}

impl Tables {
    /// The entry at `slot`.
    pub(super) fn entry(&self, slot: u64) -> Option<Entry> {
        self.entries.get(slot).copied()
    }

    /// What the events say of the entry at `slot`, present or not, and since when where it is present.
    pub(super) fn told(&self, slot: u64) -> (Pte, u64) {
        if let Some(entry) = self.entry(slot) {
            return (entry.pte, entry.since);
        }
        let silent = if self.silent.is_empty() {
            None
        } else {
            self.silent.get(slot).copied()
        };
        (silent.unwrap_or(Pte::NONE), 0)
    }

    /// True where the events tell of no entry that is neither none nor present.
    pub(super) fn none_is_silent(&self) -> bool {
        self.silent.is_empty()
    }

    /// The present entries of the table at `table`, with their indices.
    pub(super) fn present(&self, table: u64) -> impl Iterator<Item = (u64, Entry)> + '_ {
        let left = self.used.get(table).copied().unwrap_or(0);
        (0..ENTRIES_PER_TABLE as u64)
            .filter_map(move |index| Some((index, self.entry(table + index * 8)?)))
            .take(left as usize)
    }

    /// Present entries of the table at `table`.
    pub(super) fn used(&self, table: u64) -> u32 {
        self.used.get(table).copied().unwrap_or(0)
    }

    /// The way from `root` to the entry of `level` for `gva`, where there is one.
    pub(super) fn path(&self, root: u64, level: u8, gva: u64) -> Option<Path> {
        let mut path = Path {
            slot: slot(root, 4, gva),
            rights: Rights::ALL,
            newest: 0,
        };
        for above in (level + 1..=4).rev() {
            let entry = self.entry(path.slot)?;
            if entry.pte.is_leaf(above) {
                return None;
            }
            path = Path {
                slot: slot(entry.pte.address(), above - 1, gva),
                rights: path.rights.and(Rights::of(entry.pte, above)),
                newest: path.newest.max(entry.since),
            };
        }
        Some(path)
    }

    /// How the tables below `root` translate `gva`; otherwise the level at which they do not.
    pub(super) fn leaf(&self, root: u64, gva: u64) -> Result<Leaf, u8> {
        let (mut table, mut rights) = (root, Rights::ALL);
        for level in (1..=4).rev() {
            let pte = self.entry(slot(table, level, gva)).ok_or(level)?.pte;
            rights = rights.and(Rights::of(pte, level));
            if pte.is_leaf(level) {
                return Ok(Leaf { level, pte, rights });
            }
            table = pte.address();
        }
        Err(1)
    }

    /// The way to the entry of `place` from the root of its mm, and that root, if its table is linked.
    pub(super) fn linked(&self, (mm, level, gva): Place) -> Option<(u64, Path)> {
        let root = *self.roots.get(mm)?;
        Some((root, self.path(root, level, gva)?))
    }

    /// What the events say of an entry whose table is not linked.
    pub(super) fn unlinked(&self, place: Place) -> Pte {
        self.unlinked.get(&place).copied().unwrap_or(Pte::NONE)
    }

    /// An entry in a table that was unlinked and not yet emptied. No root leads to it.
    pub(super) fn parked(&self, (mm, level, gva): Place) -> Option<(u64, Path)> {
        if self.parked.is_empty() || level != 1 {
            return None;
        }
        let table = self.parked.get(&(mm, gva & !(level_size(2) - 1)))?;
        let slot = slot(*table, 1, gva);
        self.entry(slot)?;
        let path = Path {
            slot,
            rights: Rights::ALL,
            newest: 0,
        };
        Some((NO_ROOT, path))
    }

    /// The entry of level 2 at an address of `mm` changes.
    pub(super) fn park(&mut self, mm: u64, gva: u64, old: Pte, new: Pte) {
        if new.is_table() && !self.parked.is_empty() {
            self.unpark(new.address());
        }
        if old.is_table() && self.used(old.address()) > 0 {
            self.parked.insert((mm, gva), old.address());
        }
    }

    /// The table at `table` is linked again, or freed.
    pub(super) fn unpark(&mut self, table: u64) {
        self.parked.retain(|_, parked| *parked != table);
    }

    /// Notes an entry of a table that is not linked.
    pub(super) fn set_unlinked(&mut self, place: Place, new: Pte) {
        if !new.is_none() {
            self.unlinked.insert(place, new);
        } else {
            self.unlinked.remove(&place);
        }
    }

    /// True where tables were filled that are not linked.
    pub(super) fn has_unlinked(&self) -> bool {
        !self.unlinked.is_empty()
    }

    /// Entries that were written to the table that `place` now refers to, before it was linked.
    pub(super) fn take_unlinked(&mut self, (mm, level, gva): Place) -> Vec<(Place, Pte)> {
        let region = gva..gva.saturating_add(level_size(level));
        let is_below =
            |place: &Place| place.0 == mm && place.1 + 1 == level && region.contains(&place.2);
        let mut found: Vec<_> = self
            .unlinked
            .iter()
            .filter(|(place, _)| is_below(place))
            .map(|(place, pte)| (*place, *pte))
            .collect();
        found.sort_unstable_by_key(|(place, _)| *place);
        for (place, _) in &found {
            self.unlinked.remove(place);
        }
        found
    }

    /// The table at `table` is no longer one: there is nothing in it to fill from.
    pub(super) fn forget(&mut self, table: u64) {
        self.silent.retain(|slot, _| slot & ADDRESS_MASK != table);
        let slots: Vec<u64> = self.present(table).map(|(i, _)| table + i * 8).collect();
        for slot in slots {
            self.set(slot, 1, Pte::NONE, 0);
        }
    }

    /// Writes the entry at `slot`.
    pub(super) fn set(&mut self, slot: u64, level: u8, new: Pte, at: u64) {
        let table = slot & ADDRESS_MASK;
        if !new.is_present() && !new.is_none() {
            self.silent.insert(slot, new);
        } else if !self.silent.is_empty() {
            self.silent.remove(slot);
        }
        let entry = Entry {
            pte: new,
            since: at,
            level,
        };
        // Most changes leave the frame as it is, and so all counts.
        let before = if new.is_present() {
            self.entries.insert(slot, entry)
        } else {
            self.entries.remove(slot)
        };
        let counts = |pte: Pte, level| (target(pte, level), is_global(pte, level));
        if let Some(old) = before {
            if new.is_present() && counts(old.pte, old.level) == counts(new, level) {
                return;
            }
            self.count(old.pte, old.level, false);
        }
        if new.is_present() {
            self.count(new, level, true);
        }
        if before.is_some() != new.is_present() {
            let (used, _) = self.used.entry(table, 0);
            *used = if new.is_present() {
                used.saturating_add(1)
            } else {
                used.saturating_sub(1)
            };
        }
    }

    fn count(&mut self, pte: Pte, level: u8, more: bool) {
        let add = |count: &mut u32| {
            *count = if more {
                count.saturating_add(1)
            } else {
                count.saturating_sub(1)
            };
        };
        add(self.mapped.entry(target(pte, level), 0).0);
        if is_global(pte, level) {
            add(&mut self.globals);
        }
    }

    /// Present leaf entries that map any of the `bytes` from `gpa`.
    pub(super) fn mappings(&self, gpa: u64, bytes: u64) -> u64 {
        let of = |key: u64| u64::from(self.mapped.get(key).copied().unwrap_or(0));
        let pages = |level: u8| {
            let size = level_size(level);
            let first = gpa & !(size - 1);
            let step = usize::try_from(size).unwrap_or(usize::MAX);
            (first..gpa.saturating_add(bytes))
                .step_by(step)
                .map(move |page| page | u64::from(level))
        };
        (1..=3).flat_map(pages).map(of).sum()
    }

    /// Present entries that refer to the table at `table`.
    pub(super) fn links(&self, table: u64) -> u32 {
        self.mapped.get(table).copied().unwrap_or(0)
    }

    /// The first frames of all leaf entries, and their level, once for each.
    pub(super) fn leaf_frames(&self) -> Vec<(u64, u8)> {
        let mut frames = Vec::new();
        for (key, count) in self.mapped.iter() {
            if key & 0xfff != 0 {
                let leaf = (key & ADDRESS_MASK, (key & 0xfff) as u8);
                frames.extend(std::iter::repeat_n(leaf, *count as usize));
            }
        }
        frames
    }
}

/// GPA of the entry for `gva` in the `table` of `level`.
pub(super) fn slot(table: u64, level: u8, gva: u64) -> u64 {
    (table & ADDRESS_MASK) + index(gva, level) as u64 * 8
}
