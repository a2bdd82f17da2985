//! The page tables that the machine boots on; their upper half is the kernel's for good.

use std::sync::atomic::Ordering::Relaxed;

use abi::layout::DIRECT_MAP_BASE;
use abi::pte::{Pte, PteFlags, index};

use super::BootError;
use super::frames::Frames;
use crate::memory::{GuestRam, PhysMem};

/// How a kernel page may be used; never W and X together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Read-only data.
    Read,
    /// Data.
    ReadWrite,
    /// Code.
    Execute,
}

impl Access {
    fn flags(self) -> PteFlags {
        match self {
            // D as well as A: a page that is written for the first time must not cost a write to its
            // entry, which is traced and compared.
            Self::ReadWrite => PteFlags::WRITE | PteFlags::DIRTY | PteFlags::NO_EXECUTE,
            Self::Read => PteFlags::NO_EXECUTE,
            Self::Execute => PteFlags::empty(),
        }
    }
}

/// What every leaf of the kernel's half has: global, because that half is the same in every address
/// space, and not backed by a folio.
const LEAF: PteFlags = PteFlags::PRESENT
    .union(PteFlags::ACCESSED)
    .union(PteFlags::GLOBAL)
    .union(PteFlags::SPECIAL);
/// Entries that refer to a table restrict nothing.
const TABLE: PteFlags = PteFlags::PRESENT
    .union(PteFlags::WRITE)
    .union(PteFlags::ACCESSED);

/// Page tables under construction, in frames of guest memory.
pub(super) struct BootTables<'a> {
    ram: &'a GuestRam,
    frames: &'a mut Frames,
    pgd: u64,
}

impl<'a> BootTables<'a> {
    /// Tables that map nothing.
    pub(super) fn new(ram: &'a GuestRam, frames: &'a mut Frames) -> Result<Self, BootError> {
        let pgd = table(frames)?;
        Ok(Self { ram, frames, pgd })
    }

    /// GPA of the level-4 table.
    pub(super) fn pgd(&self) -> u64 {
        self.pgd
    }

    /// Maps the page at `gva` to `gpa`.
    pub(super) fn map_page(&mut self, gva: u64, gpa: u64, access: Access) -> Result<(), BootError> {
        self.set(gva, 1, Pte::new(gpa, LEAF | access.flags()))
    }

    /// Maps the frame at `gpa` in the direct map.
    pub(super) fn map_direct(&mut self, gpa: u64, access: Access) -> Result<(), BootError> {
        self.map_page(DIRECT_MAP_BASE + gpa, gpa, access)
    }

    /// Maps the 2 MiB at `gpa` in the direct map, read-write.
    pub(super) fn map_direct_huge(&mut self, gpa: u64) -> Result<(), BootError> {
        let flags = LEAF | Access::ReadWrite.flags() | PteFlags::HUGE;
        self.set(DIRECT_MAP_BASE + gpa, 2, Pte::new(gpa, flags))
    }

    /// Maps a page of device registers, uncached.
    pub(super) fn map_device_page(&mut self, gva: u64, gpa: u64) -> Result<(), BootError> {
        let uncached = PteFlags::CACHE_DISABLE | PteFlags::WRITE_THROUGH;
        let flags = LEAF | Access::ReadWrite.flags() | uncached;
        self.set(gva, 1, Pte::new(gpa, flags))
    }

    fn set(&mut self, gva: u64, level: u8, leaf: Pte) -> Result<(), BootError> {
        let mut at = self.pgd;
        for level in (level + 1..=4).rev() {
            let entry = &self.ram.table(at)?[index(gva, level)];
            let pte = Pte(entry.load(Relaxed));
            at = if pte.is_present() {
                pte.address()
            } else {
                let next = table(self.frames)?;
                entry.store(Pte::new(next, TABLE).0, Relaxed);
                next
            };
        }
        self.ram.table(at)?[index(gva, level)].store(leaf.0, Relaxed);
        Ok(())
    }
}

fn table(frames: &mut Frames) -> Result<u64, BootError> {
    frames.take(abi::layout::PAGE_SIZE, "boot page tables")
}
