//! The zero page: one frame of zeroes that anonymous memory maps until it is written.
//!
//! Entries that map it carry [`PteFlags::SPECIAL`] and are never writable. They take no reference and are not in
//! its mapcount, which every CPU would fight for (Linux's pte_mkspecial and vm_normal_page, mm/memory.c): who
//! clears or copies an entry asks [`is_uncounted`] first. `mm.rss` counts them, as all present entries.

use abi::objects::FrameKind;
use abi::pte::{Pte, PteFlags};
use abi::syscall::Errno;

use super::Field;
use super::vma::leaf_flags;
use crate::Kernel;
use crate::arch::Arch;

/// True where `entry` maps a frame that does not count it.
pub(super) fn is_uncounted(entry: Pte) -> bool {
    entry.flags().contains(PteFlags::SPECIAL)
}

impl<A: Arch> Kernel<A> {
    /// Sets the zero page aside. Once, at boot.
    pub(super) fn zero_page_init(&self) -> Result<(), Errno> {
        let frame = self.alloc_frames(0, FrameKind::Zero)?;
        self.arch.zero_frame(frame);
        self.root().zero_frame.set(frame);
        Ok(())
    }

    /// An entry of the zero page in a VMA with `flags`.
    pub(super) fn zero_entry(&self, flags: u64) -> Pte {
        let leaf = leaf_flags(flags) | PteFlags::SPECIAL;
        Pte::new(self.root().zero_frame.get(), leaf)
    }
}
