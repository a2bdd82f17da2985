//! Entries that are neither none nor present ([`NonPresent`]): what everybody who meets one does with it.
//!
//! A swap entry holds a reference to its slot, which goes with it ([`Kernel::swap_slot_put`]). A migration entry holds
//! nothing: its folio is locked, and stays, for as long as there is one, and whoever clears it has nothing to give back
//! (Linux's include/linux/swapops.h and mm/migrate.c). Both are read and written under the page-table lock only, but
//! for a first look. Neither is cached by a processor, so that changing one takes no flush.

use abi::lock::LockClass;
use abi::objects::{FrameKind, Mm};
use abi::point::Point;
use abi::pte::{NonPresent, Pte, PteFlags};

use super::fault::Faulting;
use super::gather::{Gather, Unmap};
use super::swap_in::Unfinished;
use super::{Field, Slot};
use crate::Kernel;
use crate::arch::Arch;

impl<A: Arch> Kernel<A> {
    /// Reads an entry for a fault; where its page is on its way to another frame, waits until it is there (Linux's
    /// `migration_entry_wait`).
    #[inline]
    pub(super) fn settled_pte(&self, slot: Slot) -> Pte {
        loop {
            let entry = self.read_pte(slot);
            if entry.is_present() || entry.is_none() {
                return entry;
            }
            match entry.non_present() {
                Some(NonPresent::Migration { gpa, .. }) => self.migration_wait(slot, entry, gpa),
                _ => return entry,
            }
        }
    }

    /// Waits until whoever moves the page at `gpa` has unlocked it. No reference is taken meanwhile: one more would
    /// keep the page from moving (Linux's `migration_entry_wait_on_locked`).
    #[cold]
    fn migration_wait(&self, slot: Slot, entry: Pte, gpa: u64) {
        let word = &self.folio(gpa).lock;
        {
            let _guard = self.lock_table(slot.table);
            if self.read_pte(slot) != entry {
                return;
            }
            // Linux's pfn_swap_entry_to_page has the same.
            assert!(
                word.get() != 0,
                "a migration entry of frame {gpa:#x}, which nobody moves"
            );
        }
        // Any lock of this word: the frame may be something else by then, and the entry is read again anyway.
        while word.get() != 0 {
            self.wait(word, LockClass::Folio);
        }
    }

    /// A fault on an entry that is neither none nor present.
    #[cold]
    pub(super) fn fault_non_present(&self, fault: Faulting, error: u64) -> Result<(), Unfinished> {
        match said_by(fault.entry) {
            NonPresent::Swap { slot, exclusive } => {
                self.swap_fault(fault, error, (slot, exclusive))
            }
            // Only since it was read: the access is tried again.
            NonPresent::Migration { .. } => Ok(()),
        }
    }

    /// Clears an entry that is unmapped (Linux's `zap_nonpresent_ptes`). Under the page-table lock.
    #[cold]
    pub(super) fn zap_non_present(&self, gather: &Gather, gva: u64, slot: Slot, entry: Pte) {
        let mm = self.obj(gather.mm);
        let said = said_by(entry);
        let is_private = match said {
            NonPresent::Swap { .. } => true,
            NonPresent::Migration { gpa, .. } => !self.is_file_frame(gpa),
        };
        if gather.by == Unmap::Hole && is_private {
            return;
        }
        self.set_pte(mm, gva, slot, entry, Pte::NONE);
        if let NonPresent::Swap { slot, .. } = said {
            self.swap_slot_put(slot);
        }
        point!(self, Point::PteClear, [mm.id.get(), gva]);
    }

    /// MADV_FREE: what is on the disk alone goes; what is on its way stays (Linux's `madvise_free_pte_range`). Under
    /// the page-table lock.
    #[cold]
    pub(super) fn free_non_present(&self, mm: &Mm, gva: u64, slot: Slot, entry: Pte) {
        if let NonPresent::Swap { slot: from, .. } = said_by(entry) {
            self.set_pte(mm, gva, slot, entry, Pte::NONE);
            self.swap_slot_put(from);
            point!(self, Point::PteClear, [mm.id.get(), gva]);
        }
    }

    /// What parent and child both have after fork where the parent had `entry` (Linux's `copy_nonpresent_pte`). Under
    /// the page-table locks.
    #[cold]
    pub(super) fn share_non_present(&self, entry: Pte) -> Pte {
        match said_by(entry) {
            NonPresent::Swap { slot, .. } => {
                self.swap_slot_dup(slot);
                NonPresent::Swap {
                    slot,
                    exclusive: false,
                }
                .entry()
            }
            NonPresent::Migration { gpa, .. } if self.is_file_frame(gpa) => entry,
            NonPresent::Migration { gpa, flags } => NonPresent::Migration {
                gpa,
                flags: flags.difference(PteFlags::WRITE) | PteFlags::COW,
            }
            .entry(),
        }
    }

    /// What `entry` is after mprotect: the permissions are those of the VMA when the page has arrived, but for W, which
    /// the first write fault gives back where it may (Linux's `change_pte_range`).
    #[cold]
    pub(super) fn protect_non_present(entry: Pte) -> Pte {
        match said_by(entry) {
            NonPresent::Swap { .. } => entry,
            NonPresent::Migration { gpa, flags } => NonPresent::Migration {
                gpa,
                flags: flags.difference(PteFlags::WRITE),
            }
            .entry(),
        }
    }

    /// True where the page of an entry that is not none is in memory (Linux's `mincore_pte_range`).
    pub(super) fn in_memory(&self, entry: Pte) -> bool {
        if entry.is_present() {
            return true;
        }
        match said_by(entry) {
            NonPresent::Swap { slot, .. } => self.swap_is_cached(slot),
            NonPresent::Migration { .. } => true,
        }
    }

    /// True where the frame at `gpa` is a page of a file.
    fn is_file_frame(&self, gpa: u64) -> bool {
        self.folio(gpa).kind.get() == FrameKind::File as u8
    }
}

/// What an entry says that is neither none nor present.
fn said_by(entry: Pte) -> NonPresent {
    entry
        .non_present()
        .unwrap_or_else(|| panic!("entry {:#x} says nothing that there is", entry.0))
}
