//! Going through all tables of an address space, at memory speed and in bounded work.

use std::ops::RangeInclusive;
use std::sync::atomic::Ordering::Relaxed;

use abi::layout::ENTRIES_PER_TABLE;
use abi::pte::{Pte, index, level_size};
use serde::Serialize;

use super::leaves::Leaves;
use super::serde_hex;
use super::walk::{
    KERNEL_HALF, LINEAR_MASK, Rights, USER_HALF, canonical, has_reserved_bits, is_canonical,
};
use crate::memory::PhysMem;

/// An entry that ends a branch of the tree: a page, or in [`Visitor::absent`] a non-zero entry
/// without P.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// First address that it translates.
    pub gva: u64,
    /// 1 for 4 KiB, 2 for 2 MiB, 3 for 1 GiB.
    pub level: u8,
    /// What the levels above permit together.
    pub above: Rights,
    /// The entry.
    pub entry: Pte,
    /// GPA of the table that holds it.
    pub table_gpa: u64,
}

impl Leaf {
    /// GPA of the entry itself.
    #[must_use]
    pub fn entry_gpa(&self) -> u64 {
        self.table_gpa + 8 * index(self.gva, self.level) as u64
    }
    /// GPA of the page that it maps.
    #[must_use]
    pub fn target(&self) -> u64 {
        self.entry.leaf_address(self.level)
    }
    /// Bytes that it maps.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        level_size(self.level)
    }
    /// What all levels permit together.
    #[must_use]
    pub fn rights(&self) -> Rights {
        self.above.under(self.entry)
    }
}

/// A table page that a visit entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// Where it lies.
    pub gpa: u64,
    /// 4 for the root.
    pub level: u8,
    /// First address that it translates.
    pub gva: u64,
    /// GPA of the entry that refers to it, 0 for the root.
    pub parent_entry: u64,
}

/// What is wrong with an entry, so that the visit does not follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum WalkProblem {
    /// It refers to a table outside guest memory.
    TableOutside,
    /// It refers to a table that this visit has already entered.
    TableTwice,
    /// It has a reserved bit set.
    ReservedBits,
}

impl WalkProblem {
    /// For a person: the entry …
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::TableOutside => "leads to a table outside guest memory",
            Self::TableTwice => "leads to a table that the walk has entered before",
            Self::ReservedBits => "has a reserved bit set",
        }
    }
}

/// An entry that a visit refused to follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct WalkAnomaly {
    /// First address that the entry translates.
    #[serde(with = "serde_hex")]
    pub gva: u64,
    /// Its level; 5 stands for CR3 itself.
    pub level: u8,
    /// GPA of the entry, 0 for CR3.
    #[serde(with = "serde_hex")]
    pub entry_gpa: u64,
    /// The entry.
    #[serde(serialize_with = "serde_hex::pte")]
    pub entry: Pte,
    /// What is wrong.
    pub problem: WalkProblem,
}

/// What a visit tells about the tables it goes through, in order of GVA, tables before their entries.
pub trait Visitor {
    /// A table is entered.
    fn table(&mut self, _table: Table) {}
    /// A present entry maps a page.
    fn leaf(&mut self, _leaf: Leaf) {}
    /// An entry is not zero and not present.
    fn absent(&mut self, _entry: Leaf) {}
    /// An entry is not followed.
    fn anomaly(&mut self, _anomaly: WalkAnomaly) {}
}

/// How much a visit has read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Visited {
    /// Table pages entered.
    pub tables: u64,
    /// Entries read.
    pub slots: u64,
}

/// Goes through the tables of `cr3` that translate `range` (both ends canonical, or clipped to what
/// is).
pub fn visit<M: PhysMem + ?Sized, V: Visitor>(
    mem: &M,
    cr3: u64,
    range: RangeInclusive<u64>,
    visitor: &mut V,
) -> Visited {
    let mut visit = Visit {
        mem,
        visitor,
        entered: FrameSet::new(mem.bytes()),
        done: Visited::default(),
        first: clip_first(*range.start()),
        last: clip_last(*range.end()),
    };
    if visit.first <= visit.last && !range.is_empty() {
        let root = Pte(cr3);
        visit.enter(root.address(), root, 4, 0, 0, Rights::ALL);
    }
    visit.done
}

fn clip_first(gva: u64) -> u64 {
    if is_canonical(gva) {
        gva & LINEAR_MASK
    } else {
        KERNEL_HALF.start() & LINEAR_MASK
    }
}

fn clip_last(gva: u64) -> u64 {
    if is_canonical(gva) {
        gva & LINEAR_MASK
    } else {
        *USER_HALF.end()
    }
}

struct Visit<'a, M: ?Sized, V> {
    mem: &'a M,
    visitor: &'a mut V,
    entered: FrameSet,
    done: Visited,
    /// First and last address, without their sign extension.
    first: u64,
    last: u64,
}

impl<M: PhysMem + ?Sized, V: Visitor> Visit<'_, M, V> {
    /// Visits the table at `gpa` of `level` that translates from `base` on; `entry` at `entry_gpa`
    /// refers to it.
    fn enter(&mut self, gpa: u64, entry: Pte, level: u8, base: u64, entry_gpa: u64, above: Rights) {
        let refuse = |problem| WalkAnomaly {
            gva: canonical(base),
            level: level + 1,
            entry_gpa,
            entry,
            problem,
        };
        // A copy of the reference, so that the borrow of the table does not pin `self`.
        let mem = self.mem;
        let Ok(entries) = mem.table(gpa) else {
            return self.visitor.anomaly(refuse(WalkProblem::TableOutside));
        };
        if !self.entered.insert(gpa) {
            return self.visitor.anomaly(refuse(WalkProblem::TableTwice));
        }
        self.visitor.table(Table {
            gpa,
            level,
            gva: canonical(base),
            parent_entry: entry_gpa,
        });

        let size = level_size(level);
        let from = self.first.saturating_sub(base) / size;
        let to = ((self.last - base) / size).min(ENTRIES_PER_TABLE as u64 - 1);
        self.done.tables += 1;
        self.done.slots += to + 1 - from;
        for (slot, entry) in (from..).zip(&entries[from as usize..=to as usize]) {
            let entry = Pte(entry.load(Relaxed));
            if entry.is_none() {
                continue;
            }
            let linear = base + slot * size;
            let leaf = Leaf {
                gva: canonical(linear),
                level,
                above,
                entry,
                table_gpa: gpa,
            };
            if level == 1 && entry.is_present() {
                self.visitor.leaf(leaf);
            } else {
                self.upper(leaf, linear);
            }
        }
    }

    /// An entry that is not simply a 4 KiB page.
    fn upper(&mut self, leaf: Leaf, linear: u64) {
        let Leaf { level, entry, .. } = leaf;
        if !entry.is_present() {
            self.visitor.absent(leaf);
        } else if has_reserved_bits(entry, level) {
            self.visitor.anomaly(WalkAnomaly {
                gva: leaf.gva,
                level,
                entry_gpa: leaf.entry_gpa(),
                entry,
                problem: WalkProblem::ReservedBits,
            });
        } else if entry.is_leaf(level) {
            self.visitor.leaf(leaf);
        } else {
            let entry_gpa = leaf.entry_gpa();
            self.enter(
                entry.address(),
                entry,
                level - 1,
                linear,
                entry_gpa,
                leaf.rights(),
            );
        }
    }
}

/// Calls `each` for every page that `cr3` maps in `range`, and returns what was refused on the way.
pub fn for_each_leaf<M: PhysMem + ?Sized>(
    mem: &M,
    cr3: u64,
    range: RangeInclusive<u64>,
    each: impl FnMut(Leaf),
) -> Vec<WalkAnomaly> {
    struct Leaves<F>(F, Vec<WalkAnomaly>);
    impl<F: FnMut(Leaf)> Visitor for Leaves<F> {
        fn leaf(&mut self, leaf: Leaf) {
            (self.0)(leaf);
        }
        fn anomaly(&mut self, anomaly: WalkAnomaly) {
            push_bounded(&mut self.1, anomaly);
        }
    }
    let mut leaves = Leaves(each, Vec::new());
    visit(mem, cr3, range, &mut leaves);
    leaves.1
}

/// Calls `each` for every table page that translates part of `range`.
pub fn for_each_table<M: PhysMem + ?Sized>(
    mem: &M,
    cr3: u64,
    range: RangeInclusive<u64>,
    each: impl FnMut(Table),
) {
    struct Tables<F>(F);
    impl<F: FnMut(Table)> Visitor for Tables<F> {
        fn table(&mut self, table: Table) {
            (self.0)(table);
        }
    }
    visit(mem, cr3, range, &mut Tables(each));
}

/// All that one visit found: the material of the checkers.
#[derive(Clone, Debug, Default)]
pub struct AddressSpace {
    /// Pages, by GVA.
    pub leaves: Leaves,
    /// Non-zero entries without P, by GVA.
    pub absent: Vec<Leaf>,
    /// Table pages, the root first.
    pub tables: Vec<Table>,
    /// What was not followed, at most [`MAX_ANOMALIES`].
    pub anomalies: Vec<WalkAnomaly>,
}

/// Most anomalies that one traversal keeps: a hostile guest could make millions.
pub const MAX_ANOMALIES: usize = 256;

pub(super) fn push_bounded<T>(list: &mut Vec<T>, item: T) {
    if list.len() < MAX_ANOMALIES {
        list.push(item);
    }
}

impl AddressSpace {
    /// Reads what `cr3` maps in `range`.
    pub fn read<M: PhysMem + ?Sized>(mem: &M, cr3: u64, range: RangeInclusive<u64>) -> Self {
        let mut space = Self::default();
        visit(mem, cr3, range, &mut space);
        space
    }
}

impl Visitor for AddressSpace {
    fn table(&mut self, table: Table) {
        self.tables.push(table);
    }
    fn leaf(&mut self, leaf: Leaf) {
        self.leaves.push(leaf);
    }
    fn absent(&mut self, entry: Leaf) {
        self.absent.push(entry);
    }
    fn anomaly(&mut self, anomaly: WalkAnomaly) {
        push_bounded(&mut self.anomalies, anomaly);
    }
}

/// A set of frames: one bit each.
struct FrameSet(Vec<u64>);

impl FrameSet {
    fn new(bytes: u64) -> Self {
        Self(vec![
            0;
            (bytes / abi::layout::PAGE_SIZE).div_ceil(64) as usize
        ])
    }
    /// Adds the frame at `gpa`, which lies in memory; false where it was in already.
    fn insert(&mut self, gpa: u64) -> bool {
        let frame = gpa >> abi::layout::PAGE_SHIFT;
        let word = &mut self.0[(frame / 64) as usize];
        let bit = 1 << (frame % 64);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }
}
