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
        /// Software: not backed by a folio that counts its mappings (image of the kernel, MMIO, direct map, the
        /// zero page).
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
    /// True where the entry stands for a page in memory: it is present, or the page is on its way to another frame. These
    /// are the entries that [`crate::objects::Mm::rss`] counts at level 1, as Linux's MM_ANONPAGES and MM_FILEPAGES do.
    #[must_use]
    pub const fn is_resident(self) -> bool {
        const SAYS: u64 = NonPresent::SWAP | NonPresent::MIGRATION;
        self.is_present() || self.0 & SAYS == NonPresent::MIGRATION
    }
    /// What an entry says that is neither none nor present; none for a present entry, and for one that says
    /// nothing that there is.
    #[must_use]
    pub const fn non_present(self) -> Option<NonPresent> {
        const SAYS: u64 = NonPresent::SWAP | NonPresent::MIGRATION;
        let said = match self.0 & (PteFlags::PRESENT.bits() | SAYS) {
            NonPresent::SWAP => NonPresent::Swap {
                slot: self.address() >> 12,
                exclusive: self.0 & NonPresent::EXCLUSIVE != 0,
            },
            NonPresent::MIGRATION => NonPresent::Migration {
                gpa: self.address(),
                flags: self.flags().intersection(NonPresent::KEPT),
            },
            _ => return None,
        };
        // Any other bit would be lost.
        if said.entry().0 == self.0 {
            Some(said)
        } else {
            None
        }
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
    /// True where a present entry above level 1 refers to a table, and is not a leaf.
    #[must_use]
    pub const fn is_table(self) -> bool {
        const OF_TABLE: u64 = PteFlags::PRESENT.bits();
        self.0 & (OF_TABLE | PteFlags::HUGE.bits()) == OF_TABLE
    }
    /// True where an entry of level 2 maps 2 MiB, or did until its split began, which clears P and leaves the rest
    /// (Linux's `pmd_trans_huge`, true of what `pmdp_invalidate` leaves too).
    #[must_use]
    pub const fn is_huge(self) -> bool {
        self.0 & PteFlags::HUGE.bits() != 0
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

/// What an entry says that is neither none nor present (Linux's `swp_entry_t`, include/linux/swapops.h). P is
/// clear, so no processor caches it: making one of these from another needs no flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NonPresent {
    /// The page is in this swap slot.
    Swap {
        /// From 0.
        slot: u64,
        /// The page was exclusive when it went out, and nobody else has its slot.
        exclusive: bool,
    },
    /// The page is on its way from the frame at `gpa` to another one.
    Migration {
        /// The old frame, which is locked meanwhile.
        gpa: u64,
        /// What of [`NonPresent::KEPT`] the entry had.
        flags: PteFlags,
    },
}

impl NonPresent {
    /// What of a present entry a migration entry keeps.
    pub const KEPT: PteFlags = PteFlags::WRITE
        .union(PteFlags::ACCESSED)
        .union(PteFlags::DIRTY)
        .union(PteFlags::COW);

    const EXCLUSIVE: u64 = PteFlags::WRITE.bits();
    /// Which of the two: bits 2 and 3, never both clear.
    const SWAP: u64 = 1 << 2;
    const MIGRATION: u64 = 1 << 3;

    /// The entry that says it.
    #[must_use]
    pub const fn entry(self) -> Pte {
        Pte(match self {
            Self::Swap { slot, exclusive } => {
                let exclusive = if exclusive { Self::EXCLUSIVE } else { 0 };
                (slot << 12 & ADDRESS_MASK) | exclusive | Self::SWAP
            }
            Self::Migration { gpa, flags } => {
                (gpa & ADDRESS_MASK) | flags.intersection(Self::KEPT).bits() | Self::MIGRATION
            }
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_says_what_it_was_made_of() {
        let kept = PteFlags::WRITE.union(PteFlags::DIRTY);
        for said in [
            NonPresent::Swap {
                slot: 0,
                exclusive: false,
            },
            NonPresent::Swap {
                slot: 77,
                exclusive: true,
            },
            NonPresent::Migration {
                gpa: 0x1234_5000,
                flags: kept,
            },
        ] {
            assert_eq!(said.entry().non_present(), Some(said));
            assert!(!said.entry().is_present() && !said.entry().is_none());
            let on_its_way = matches!(said, NonPresent::Migration { .. });
            assert_eq!(said.entry().is_resident(), on_its_way);
        }
        assert!(Pte::new(0x1000, PteFlags::PRESENT | PteFlags::HUGE).is_resident());
        assert!(!Pte::NONE.is_resident());
    }

    #[test]
    fn no_entry_is_understood_in_part() {
        for low in 0..0x1000 {
            for high in [0, 1 << 63, 1 << 52] {
                let entry = Pte(low | 0x7000 | high);
                if let Some(said) = entry.non_present() {
                    assert_eq!(said.entry(), entry);
                }
            }
        }
        assert_eq!(
            Pte(0x3004).non_present().map(NonPresent::entry),
            Some(Pte(0x3004))
        );
        assert_eq!(Pte(0x300c).non_present(), None);
        assert_eq!(Pte(0x3005).non_present(), None);
        assert_eq!(Pte::NONE.non_present(), None);
    }
}
