//! The walker of guest page tables: 4-level paging, 4 KiB, 2 MiB and 1 GiB pages (SDM vol. 3A, 5.5).
//!
//! The tables belong to the guest, so nothing in them is believed. Work is bounded by the size of
//! guest memory: within one visit every table page is entered once, and what would lead outside
//! memory, into a table again, or against a reserved bit is a [`WalkAnomaly`], never a panic.
//! Entries are read with atomic loads only, because vCPUs may be running.

use std::ops::RangeInclusive;
use std::sync::atomic::Ordering::Relaxed;

use abi::pte::{Pte, PteFlags, index, level_size};
use serde::Serialize;

pub use super::leaves::Leaves;
pub use super::visit::*;

use super::serde_hex;
use crate::memory::PhysMem;

/// The GVAs below the canonical hole: user space.
pub const USER_HALF: RangeInclusive<u64> = 0..=0x7fff_ffff_ffff;
/// The GVAs above the canonical hole: the kernel.
pub const KERNEL_HALF: RangeInclusive<u64> = 0xffff_8000_0000_0000..=u64::MAX;

/// Bits of a GVA that take part in translation.
pub(super) const LINEAR_MASK: u64 = (1 << 48) - 1;

/// What every entry on the way to a page permits together (SDM vol. 3A, 5.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Rights {
    /// R/W is set at every level.
    pub write: bool,
    /// U/S is set at every level.
    pub user: bool,
    /// XD is clear at every level.
    pub execute: bool,
}

impl Rights {
    /// Where a walk starts: CR3 restricts nothing.
    pub const ALL: Self = Self {
        write: true,
        user: true,
        execute: true,
    };

    /// What is left below `entry`.
    #[must_use]
    pub fn under(self, entry: Pte) -> Self {
        let flags = entry.flags();
        Self {
            write: self.write && flags.contains(PteFlags::WRITE),
            user: self.user && flags.contains(PteFlags::USER),
            execute: self.execute && !flags.contains(PteFlags::NO_EXECUTE),
        }
    }
}

/// One entry that a translation read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// 4 for the first.
    pub level: u8,
    /// GPA of the table.
    #[serde(with = "serde_hex")]
    pub table: u64,
    /// Index in the table.
    pub index: u16,
    /// The entry.
    #[serde(serialize_with = "serde_hex::pte")]
    pub entry: Pte,
}

/// How a translation ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "end")]
pub enum Translation {
    /// At a page.
    Mapped {
        /// GPA that the GVA translates to.
        #[serde(with = "serde_hex")]
        gpa: u64,
        /// Level of the leaf entry.
        level: u8,
        /// What all levels permit together.
        rights: Rights,
    },
    /// At an entry without P.
    NotPresent {
        /// Its level.
        level: u8,
    },
    /// At an entry with a reserved bit set: the CPU raises #PF with RSVD.
    Reserved {
        /// Its level.
        level: u8,
    },
    /// At a table that is not in guest memory.
    TableOutside {
        /// Its level.
        level: u8,
        /// Where it would be.
        #[serde(with = "serde_hex")]
        gpa: u64,
    },
    /// Nowhere: the GVA is not canonical.
    NotCanonical,
}

/// The translation of one GVA, step by step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Walk {
    /// The paging root, without its low bits.
    #[serde(with = "serde_hex")]
    pub cr3: u64,
    /// The address that is translated.
    #[serde(with = "serde_hex")]
    pub gva: u64,
    /// The entries, from level 4 down.
    pub steps: Vec<Step>,
    /// The end.
    pub result: Translation,
}

/// True where bits 63 to 47 of `gva` are equal.
#[must_use]
pub const fn is_canonical(gva: u64) -> bool {
    canonical(gva & LINEAR_MASK) == gva
}

pub(super) const fn canonical(linear: u64) -> u64 {
    ((linear << 16).cast_signed() >> 16).cast_unsigned()
}

/// True where `entry`, present at `level`, has a bit set that must be clear (SDM vol. 3A, table 5-14
/// and on). Address bits above the guest's memory are not looked at: they lead outside memory.
#[must_use]
pub const fn has_reserved_bits(entry: Pte, level: u8) -> bool {
    let huge = entry.0 & PteFlags::HUGE.bits() != 0;
    match level {
        4 => huge,
        // Bit 12 of a huge leaf is PAT; the address bits between it and the page size are reserved.
        2 | 3 if huge => entry.0 & (level_size(level) - 1) & !0x1fff != 0,
        _ => false,
    }
}

/// Translates `gva` as a CPU with `cr3` loaded would, without setting A or D.
pub fn translate<M: PhysMem + ?Sized>(mem: &M, cr3: u64, gva: u64) -> Walk {
    let mut walk = Walk {
        cr3: Pte(cr3).address(),
        gva,
        steps: Vec::with_capacity(4),
        result: Translation::NotCanonical,
    };
    if is_canonical(gva) {
        walk.result = descend(mem, &mut walk);
    }
    walk
}

fn descend<M: PhysMem + ?Sized>(mem: &M, walk: &mut Walk) -> Translation {
    let mut table = walk.cr3;
    let mut rights = Rights::ALL;
    for level in (1..=4).rev() {
        let Ok(entries) = mem.table(table) else {
            return Translation::TableOutside { level, gpa: table };
        };
        let index = index(walk.gva, level);
        let entry = Pte(entries[index].load(Relaxed));
        walk.steps.push(Step {
            level,
            table,
            index: index as u16,
            entry,
        });
        if !entry.is_present() {
            return Translation::NotPresent { level };
        }
        if has_reserved_bits(entry, level) {
            return Translation::Reserved { level };
        }
        rights = rights.under(entry);
        if entry.is_leaf(level) {
            return Translation::Mapped {
                gpa: entry.leaf_address(level) | (walk.gva & (level_size(level) - 1)),
                level,
                rights,
            };
        }
        table = entry.address();
    }
    unreachable!("a present entry of level 1 is a leaf")
}

#[cfg(test)]
#[path = "walk_tests.rs"]
mod tests;
