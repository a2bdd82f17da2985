//! The page tables and what each vCPU may hold besides, as events change them.

use std::rc::Rc;

use abi::pte::{ADDRESS_MASK, Pte, level_size};

use super::super::locks::{is_mmap_lock, keeps_vmas, mmap_lock};
use super::held::{Change, Held, Rights, Written};
use super::laws::Laws;
use super::tables::{Path, Place, Tables, same, slot};
use super::vcpu::{Flush, Vcpu};
use crate::map::Map;

/// Most holders of mmap_locks that are followed.
const MAX_HOLDERS: usize = 1 << 10;

/// Everything.
#[derive(Debug, Default)]
pub(super) struct State {
    /// Forks share them until one writes: a search over orders forks at every event.
    pub(super) tables: Rc<Tables>,
    /// Mask of vCPUs by mm.
    pub(super) masks: Map<u64>,
    pub(super) mmap_locks: MmapLocks,
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) laws: Laws,
    near: Near,
}

/// Who holds the mmap_lock of which mm, or one of its VMAs.
#[derive(Clone, Debug, Default)]
pub(super) struct MmapLocks {
    /// The lock of each mm.
    locks: Map<u64>,
    /// Tasks, and what they hold, for reading or writing; of a VMA the number of its mm.
    held: Vec<(u32, u64, Option<u64>)>,
}

impl MmapLocks {
    /// Mm `mm`, whose object is at `object`.
    pub(super) fn created(&mut self, mm: u64, object: u64) {
        self.locks.insert(mm, mmap_lock(object));
    }

    pub(super) fn destroyed(&mut self, mm: u64) {
        self.locks.remove(mm);
    }

    pub(super) fn acquired(&mut self, task: u32, [lock, class, _, mm, _]: [u64; 5]) {
        // As many as there are tasks that a guest of ours has: a hostile one cannot make the list grow for ever.
        if keeps_vmas(class) && self.held.len() < MAX_HOLDERS {
            let of = (!is_mmap_lock(class)).then_some(mm);
            self.held.push((task, lock, of));
        }
    }

    pub(super) fn released(&mut self, task: u32, [lock, class, ..]: [u64; 5]) {
        let same = |held: &(u32, u64, _)| (held.0, held.1) == (task, lock);
        if keeps_vmas(class)
            && let Some(at) = self.held.iter().position(same)
        {
            self.held.swap_remove(at);
        }
    }

    /// True where `task` holds the mmap_lock of `mm`, or one of its VMAs.
    pub(super) fn guards(&self, mm: u64, task: u32) -> bool {
        let of_mm = self.locks.get(mm);
        let mut held = self.held.iter();
        held.any(|(who, lock, of)| *who == task && (*of == Some(mm) || Some(lock) == of_mm))
    }
}

/// Tables of level 1 to which a way was found. Most changes are of entries beside others that have changed.
#[derive(Debug, Default)]
struct Near {
    ways: [Option<Way>; 8],
}

/// From a root to the table of level 1 for `region`, in which any entry of the mm lies.
#[derive(Clone, Copy, Debug)]
struct Way {
    mm: u64,
    region: u64,
    root: u64,
    /// To the first entry.
    path: Path,
}

impl Near {
    fn index(mm: u64, region: u64) -> usize {
        (mm.wrapping_mul(5) ^ region) as usize % 8
    }

    fn get(&self, (mm, level, gva): Place) -> Option<(u64, Path)> {
        let region = gva >> level_size(2).trailing_zeros();
        let way = self.ways[Self::index(mm, region)]?;
        let path = Path {
            slot: slot(way.path.slot, 1, gva),
            ..way.path
        };
        (level == 1 && way.mm == mm && way.region == region).then_some((way.root, path))
    }

    fn note(&mut self, (mm, level, gva): Place, (root, path): (u64, Path)) {
        if level == 1 {
            let region = gva >> level_size(2).trailing_zeros();
            self.ways[Self::index(mm, region)] = Some(Way {
                mm,
                region,
                root,
                path,
            });
        }
    }
}

impl Clone for State {
    fn clone(&self) -> Self {
        Self {
            tables: Rc::clone(&self.tables),
            masks: self.masks.clone(),
            mmap_locks: self.mmap_locks.clone(),
            vcpus: self.vcpus.clone(),
            laws: self.laws,
            near: Near::default(),
        }
    }
    /// Keeps its memory: once a schedule.
    fn clone_from(&mut self, from: &Self) {
        match Rc::get_mut(&mut self.tables) {
            Some(tables) => tables.clone_from(&from.tables),
            None => self.tables = Rc::new(Tables::clone(&from.tables)),
        }
        self.masks.clone_from(&from.masks);
        self.mmap_locks.clone_from(&from.mmap_locks);
        self.vcpus.clone_from(&from.vcpus);
        self.laws = from.laws;
        self.near = Near::default();
    }
}

impl State {
    /// With so many vCPUs, on the kernel's own tables.
    pub(super) fn new(nr_vcpus: usize) -> Self {
        Self {
            vcpus: vec![Vcpu::default(); nr_vcpus],
            ..Self::default()
        }
    }

    /// To be written, wherever.
    pub(super) fn tables_mut(&mut self) -> &mut Tables {
        self.near = Near::default();
        Rc::make_mut(&mut self.tables)
    }

    /// The way to the entry of `place` from a root, with the root.
    fn find(&mut self, place: Place) -> Option<(u64, Path)> {
        if let Some(found) = self.near.get(place) {
            return Some(found);
        }
        let found = self.tables.linked(place)?;
        self.near.note(place, found);
        Some(found)
    }

    fn take_unlinked(&mut self, place: Place) -> Vec<(Place, Pte)> {
        if self.tables.has_unlinked() {
            self.tables_mut().take_unlinked(place)
        } else {
            Vec::new()
        }
    }

    /// Applies a change of an entry.
    ///
    /// # Errors
    /// What the events said before, where that is not `old` but for the bits that the processor sets.
    pub(super) fn change(
        &mut self,
        place: Place,
        old: Pte,
        new: Pte,
        change: Change,
    ) -> Result<(), Pte> {
        let found = self.find(place).or_else(|| self.tables.parked(place));
        let Some((root, path)) = found else {
            let known = self.tables.unlinked(place);
            self.tables_mut().set_unlinked(place, new);
            return if same(old, known) { Ok(()) } else { Err(known) };
        };
        let (known, since) = self.tables.told(path.slot);
        let written = Written {
            place,
            root: root & ADDRESS_MASK,
            path,
            old,
            since,
            new,
            change,
        };
        for vcpu in &mut self.vcpus {
            vcpu.written(&written, &self.tables, self.laws);
        }
        let tables = Rc::make_mut(&mut self.tables);
        tables.set(path.slot, place.1, new, change.at);
        if place.1 > 1 {
            self.near = Near::default();
        }
        if place.1 == 2 {
            self.tables_mut().park(place.0, place.2, old, new);
        }
        if new.is_present() && !new.is_leaf(place.1) {
            for (below, pte) in self.take_unlinked(place) {
                // Nothing was there: the table was not linked.
                let _ = self.change(below, Pte::NONE, pte, change);
            }
        }
        if same(old, known) { Ok(()) } else { Err(known) }
    }

    /// Notes an entry that is there from the start.
    pub(super) fn place(&mut self, table: u64, level: u8, gva: u64, pte: Pte) {
        let slot = slot(table, level, gva);
        self.tables_mut().set(slot, level, pte, 0);
    }

    /// The table at `table` is freed.
    pub(super) fn table_freed(&mut self, table: u64, by: Change) {
        for vcpu in &mut self.vcpus {
            vcpu.table_freed(table, by, &self.tables, self.laws);
        }
        if self.tables.used(table) != 0 {
            self.tables_mut().forget(table);
            self.tables_mut().unpark(table);
        }
    }

    /// `vcpu` loads CR3.
    pub(super) fn load(&mut self, vcpu: usize, cr3: u64, mm: u64, at: u64) {
        self.vcpus[vcpu].load(cr3, mm, at, &self.tables, self.laws);
    }

    /// `vcpu` flushes.
    pub(super) fn flush(&mut self, vcpu: usize, flush: Flush, at: u64) {
        self.vcpus[vcpu].flush(flush, at, &self.tables, self.laws);
    }
}

/// True where `held` permits in `start..end` what the tables of `mm` do not say now: another frame, or any of
/// `rights` that is gone.
pub(super) fn exceeds(
    tables: &Tables,
    mm: u64,
    held: &Held,
    (start, end): (u64, u64),
    rights: Rights,
) -> bool {
    let Some(&root) = tables.roots.get(mm) else {
        return true;
    };
    let mut gva = held.gva.max(start & !0xfff);
    let end = end.min(held.gva.saturating_add(held.bytes()));
    let first = held.entry.leaf_address(held.level);
    while gva < end {
        let Ok(leaf) = tables.leaf(root, gva) else {
            return true;
        };
        let size = abi::pte::level_size(leaf.level);
        let offset = gva & (size - 1);
        let is_same = leaf.pte.leaf_address(leaf.level) + offset == first + (gva - held.gva);
        if !is_same || !leaf.rights.contains(held.rights.and(rights)) {
            return true;
        }
        gva = (gva - offset).saturating_add(size);
    }
    false
}
