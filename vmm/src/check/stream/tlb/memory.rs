//! The state that guest memory shows, to start from and to compare with.

use std::mem::offset_of;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use abi::objects::{Cpu, KernelRoot, Mm};
use abi::pte::{Pte, level_size};
use rustc_hash::FxHashSet;

use super::super::words::{Word as _, mms};
use super::state::State;
use super::tables::{Tables, same, slot};
use super::vcpu::Vcpu;
use crate::memory::PhysMem;

/// Most tables that are read: a guest may tie them into loops.
const MAX_TABLES: usize = 1 << 14;
/// Entries that are looked at together, to see that all are none.
const LINE: usize = 16;

/// An mm as memory shows it.
struct Space {
    at: u64,
    id: u64,
    pgd: u64,
}

fn spaces(memory: &dyn PhysMem, kernel_root: u64) -> impl Iterator<Item = Space> + '_ {
    mms(memory, kernel_root).map(|at| Space {
        at,
        id: memory.field(at, offset_of!(Mm, id)),
        pgd: memory.field(at, offset_of!(Mm, pgd)),
    })
}

/// The tables that a walk through all mms has read. Each is entered once from an mm at each level, for a guest
/// can reach one by any number of ways.
struct Tour {
    entered: FxHashSet<(u64, u8)>,
    left: usize,
}

impl Tour {
    fn new() -> Self {
        Self {
            entered: FxHashSet::default(),
            left: MAX_TABLES,
        }
    }

    /// The root of the next mm.
    fn root(&mut self, pgd: u64) -> (u64, u8, u64) {
        self.entered.clear();
        (pgd, 4, 0)
    }

    fn enter(&mut self, table: u64, level: u8) -> bool {
        let enters = self.left > 0 && self.entered.insert((table, level));
        self.left -= usize::from(enters);
        enters
    }
}

/// The state that memory shows. What else is cached is not known.
pub(super) fn read(memory: &dyn PhysMem, kernel_root: u64, nr_vcpus: usize) -> State {
    let mut state = State::new(nr_vcpus);
    state.vcpus.iter_mut().for_each(Vcpu::forget_past);
    let mut tour = Tour::new();
    for Space { at, id, pgd } in spaces(memory, kernel_root) {
        state.tables_mut().roots.insert(id, pgd);
        let mask = memory.field(at, offset_of!(Mm, cpumask));
        state.masks.insert(id, mask);
        state.mmap_locks.created(id, at);
        let root = tour.root(pgd);
        for_each_entry(memory, &mut tour, root, &mut |table, level, gva, pte| {
            state.place(table, level, gva, pte);
        });
        for (index, vcpu) in state.vcpus.iter_mut().enumerate() {
            let cpu = offset_of!(KernelRoot, cpus) + index * size_of::<Cpu>();
            if memory.field(kernel_root, cpu + offset_of!(Cpu, loaded_mm)) == at {
                vcpu.lazy = memory.field(kernel_root, cpu + offset_of!(Cpu, lazy)) != 0;
                let pcid = memory.field(kernel_root, cpu + offset_of!(Cpu, pcid));
                vcpu.place(id, pgd, pcid);
            }
        }
    }
    state
}

/// See [`super::leaf_addresses`].
pub(super) fn leaf_addresses(
    memory: &dyn PhysMem,
    kernel_root: u64,
    frame: u64,
) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    let mut tour = Tour::new();
    for Space { id, pgd, .. } in spaces(memory, kernel_root) {
        let root = tour.root(pgd);
        for_each_entry(memory, &mut tour, root, &mut |_, level, gva, pte| {
            if pte.is_present() && pte.is_leaf(level) && pte.leaf_address(level) == frame {
                found.push((id, gva));
            }
        });
    }
    found.sort_unstable();
    found
}

/// An entry that is not what the events say.
#[derive(Debug)]
pub(super) struct Unexplained {
    pub(super) mm: u64,
    pub(super) level: u8,
    pub(super) gva: u64,
    pub(super) told: Pte,
    pub(super) is: Pte,
}

/// The first entry in memory that is not what `tables` say.
pub(super) fn difference(
    memory: &dyn PhysMem,
    kernel_root: u64,
    tables: &Tables,
) -> Option<Unexplained> {
    let mut seen = Vec::new();
    let mut tour = Tour::new();
    for Space { at, id, pgd } in spaces(memory, kernel_root) {
        seen.push(id);
        // Told of as gone, and not off the list yet: between the two whoever dropped it last waits for the list's lock.
        let is_over = memory.half(at, offset_of!(Mm, count)) == 0;
        if is_over && tables.roots.get(id).is_none() {
            continue;
        }
        let root = tour.root(pgd);
        let found = compare(memory, tables, &mut tour, id, root);
        if found.is_some() {
            return found;
        }
        if tables.roots.get(id) != Some(&pgd) {
            return Some(Unexplained {
                mm: id,
                level: 5,
                gva: 0,
                told: Pte(tables.roots.get(id).copied().unwrap_or(0)),
                is: Pte(pgd),
            });
        }
    }
    // An mm that memory no longer has, with entries that nobody cleared.
    let gone = tables.roots.iter().filter(|(id, _)| !seen.contains(id));
    gone.filter_map(|(id, pgd)| {
        let (index, entry) = tables.present(*pgd).next()?;
        Some(Unexplained {
            mm: id,
            level: 4,
            gva: index * level_size(4),
            told: entry.pte,
            is: Pte::NONE,
        })
    })
    .min_by_key(|it| it.mm)
}

fn compare(
    memory: &dyn PhysMem,
    tables: &Tables,
    tour: &mut Tour,
    mm: u64,
    (table, level, base): (u64, u8, u64),
) -> Option<Unexplained> {
    let entries = memory.table(table).ok()?;
    if !tour.enter(table, level) {
        return None;
    }
    let mut present = 0;
    let unexplained = |gva: u64, told: Pte, is: Pte| Unexplained {
        mm,
        level,
        gva,
        told,
        is,
    };
    // A table is empty but for a few entries.
    let ignores_none = tables.none_is_silent();
    let all_of = |line: &[AtomicU64; LINE]| {
        let words = line.iter();
        words.fold(0, |all, entry| all | entry.load(Relaxed))
    };
    let (lines, _) = entries[..used(level)].as_chunks::<LINE>();
    let lines = lines.iter().enumerate();
    let told_or_there = lines
        .filter(|(_, line)| !ignores_none || all_of(line) != 0)
        .flat_map(|(number, line)| (number * LINE..).zip(line));
    for (index, entry) in told_or_there {
        let is = Pte(entry.load(Relaxed));
        if is.is_none() && ignores_none {
            continue;
        }
        let gva = base + index as u64 * level_size(level);
        let (told, _) = tables.told(slot(table, level, gva));
        if !is.is_present() {
            // Where a present entry is gone, the count tells.
            if is != told && !told.is_present() {
                return Some(unexplained(gva, told, is));
            }
            continue;
        }
        present += 1;
        if !same(is, told) {
            return Some(unexplained(gva, told, is));
        }
        if !is.is_leaf(level) {
            let found = compare(memory, tables, tour, mm, (is.address(), level - 1, gva));
            if found.is_some() {
                return found;
            }
        }
    }
    if present == tables.used(table) {
        return None;
    }
    // The events told of more than there is.
    let mut told = tables.present(table).map(|(index, entry)| {
        let is = Pte(entries[index as usize].load(Relaxed));
        unexplained(base + index * level_size(level), entry.pte, is)
    });
    told.find(|it| !it.is.is_present())
}

/// Entries of a table that are the mm's own: the upper half is the kernel's.
fn used(level: u8) -> usize {
    if level == 4 { 256 } else { 512 }
}

/// Calls `f` for every entry that is not none.
fn for_each_entry(
    memory: &dyn PhysMem,
    tour: &mut Tour,
    (table, level, base): (u64, u8, u64),
    f: &mut impl FnMut(u64, u8, u64, Pte),
) {
    let Ok(entries) = memory.table(table) else {
        return;
    };
    if !tour.enter(table, level) {
        return;
    }
    for (index, entry) in entries.iter().take(used(level)).enumerate() {
        let pte = Pte(entry.load(Relaxed));
        if pte.is_none() {
            continue;
        }
        let gva = base + index as u64 * level_size(level);
        f(table, level, gva, pte);
        if pte.is_present() && !pte.is_leaf(level) {
            for_each_entry(memory, tour, (pte.address(), level - 1, gva), f);
        }
    }
}
