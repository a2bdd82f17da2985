//! x86-64 paging-structure entries, 4-level paging (SDM vol. 3A, 5.5).

use bitflags::bitflags;

bitflags! {
    /// The flag bits of an entry at any level. `PS` is bit 7, which is `PAT` in a level-1 entry.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
    pub struct PteFlags: u64 {
        /// P: the entry maps something.
        const PRESENT = 1 << 0;
        /// R/W: writes are allowed.
        const WRITE = 1 << 1;
        /// U/S: CPL 3 may use it.
        const USER = 1 << 2;
        /// PWT.
        const WRITE_THROUGH = 1 << 3;
        /// PCD.
        const CACHE_DISABLE = 1 << 4;
        /// A: used by a translation since it was cleared.
        const ACCESSED = 1 << 5;
        /// D: written through since it was cleared (leaf entries).
        const DIRTY = 1 << 6;
        /// PS: a leaf at level 2 or 3.
        const HUGE = 1 << 7;
        /// G: survives a CR3 load (leaf entries).
        const GLOBAL = 1 << 8;
        /// Software: the entry is a private mapping of a frame shared since fork (copy on write).
        const COW = 1 << 9;
        /// Software: not backed by a folio (image of the kernel, MMIO, direct map).
        const SPECIAL = 1 << 10;
        /// XD: instruction fetches are refused.
        const NO_EXECUTE = 1 << 63;
    }
}

/// The bits of an entry that hold a physical address (52-bit physical addresses).
pub const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;

/// One paging-structure entry, as it lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Pte(pub u64);

impl Pte {
    /// The entry that maps nothing.
    pub const NONE: Pte = Pte(0);

    /// An entry that refers to physical address `pa` (page aligned) with `flags`.
    #[must_use]
    pub const fn new(pa: u64, flags: PteFlags) -> Self {
        Pte((pa & ADDRESS_MASK) | flags.bits())
    }
    /// True where the entry is all zero.
    #[must_use]
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
    /// True where P is set.
    #[must_use]
    pub const fn is_present(self) -> bool {
        self.0 & PteFlags::PRESENT.bits() != 0
    }
    /// Physical address that the entry refers to (for a huge leaf the low bits are masked by
    /// [`Pte::leaf_address`]).
    #[must_use]
    pub const fn address(self) -> u64 {
        self.0 & ADDRESS_MASK
    }
    /// Physical address of the page that a leaf at `level` (1 = 4 KiB, 2 = 2 MiB, 3 = 1 GiB) maps.
    #[must_use]
    pub const fn leaf_address(self, level: u8) -> u64 {
        self.0 & ADDRESS_MASK & !(level_size(level) - 1)
    }
    /// The flag bits.
    #[must_use]
    pub const fn flags(self) -> PteFlags {
        PteFlags::from_bits_truncate(self.0)
    }
    /// True where a present entry at `level` maps a page and is not a pointer to a table.
    #[must_use]
    pub const fn is_leaf(self, level: u8) -> bool {
        level == 1 || (level < 4 && self.0 & PteFlags::HUGE.bits() != 0)
    }
    /// The same entry with `flags` added.
    #[must_use]
    pub const fn with(self, flags: PteFlags) -> Self {
        Pte(self.0 | flags.bits())
    }
    /// The same entry with `flags` removed.
    #[must_use]
    pub const fn without(self, flags: PteFlags) -> Self {
        Pte(self.0 & !flags.bits())
    }
}

/// Bytes that one entry at `level` covers (1: 4 KiB, 2: 2 MiB, 3: 1 GiB, 4: 512 GiB).
#[must_use]
pub const fn level_size(level: u8) -> u64 {
    1 << (12 + 9 * (level as u32 - 1))
}

/// Index of the entry for `gva` in a table of `level`.
#[must_use]
pub const fn index(gva: u64, level: u8) -> usize {
    ((gva >> (12 + 9 * (level as u32 - 1))) & 0x1ff) as usize
}

/// Architectural page-fault error code bits (SDM vol. 3A, 5.7).
pub mod fault {
    /// The translation was present: a protection violation.
    pub const PRESENT: u64 = 1 << 0;
    /// The access was a write.
    pub const WRITE: u64 = 1 << 1;
    /// The access was made at CPL 3.
    pub const USER: u64 = 1 << 2;
    /// A reserved bit was set in an entry.
    pub const RESERVED: u64 = 1 << 3;
    /// The access was an instruction fetch.
    pub const FETCH: u64 = 1 << 4;
}
