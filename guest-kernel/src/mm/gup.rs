//! get_user_pages with FOLL_PIN: pages of a program that a device uses, which stay the pages of the program meanwhile
//! (Linux's mm/gup.c; Documentation/core-api/pin_user_pages.rst).
//!
//! A pin is a reference, and one in [`Folio::pins`]. What it promises: as long as the program maps the page, what the device
//! writes is what the program reads. So of anonymous pages only those that are exclusive are pinned ([`folio_flags::EXCLUSIVE`], Linux's
//! PageAnonExclusive): a shared one is replaced first, by a write fault where the device writes, else by an unshare
//! fault (`gup_must_unshare`). An exclusive page stays so while it is pinned: fork copies it instead of sharing it
//! (`copy_present_page`), and a write fault on it changes only the entry. Nothing keeps the program from unmapping
//! it; the frame then stays until it is unpinned.
//!
//! The fast way takes no lock. Interrupts are off and the mm is loaded here, so whatever is unlinked or unmapped meanwhile is not
//! freed before this CPU has flushed. It finds the page, takes the pin, and only then looks whether the entry is still the
//! one that it has found and no fork was at work ([`Mm::write_protect_seq`]); otherwise it gives the pin back. A fork that
//! did not see the pin has made the count odd before: both sides write first and read then, with a full barrier
//! between.
//!
//! [`Folio::pins`]: abi::objects::Folio::pins

use core::sync::atomic::Ordering::SeqCst;
use core::sync::atomic::fence;

use abi::bug::Bug;
use abi::channel::Walker;
use abi::layout::PAGE_SIZE;
use abi::lock::LockClass;
use abi::objects::{Mm, Pa};
use abi::point::Point;
use abi::pte::{Pte, PteFlags, fault, level_size};
use abi::syscall::Errno;

use super::fault::UNSHARE;
use super::vma::permits;
use super::zero::is_uncounted;
use super::{FaultError, Slot, page_of};
use crate::Kernel;
use crate::arch::Arch;
use crate::sync::seqcount::SeqCount;

/// What a look for a page finds.
enum Look {
    /// It is pinned: its frame.
    Pinned(u64),
    /// A fault of this code must come first.
    Fault(u64),
}

impl<A: Arch> Kernel<A> {
    /// Pins the pages from the one of `gva` on, one for each of `frames`, of `mm`, which is loaded here; for a device
    /// that writes them, or only reads them. `fault` makes an access possible, as a fault of the program itself
    /// does. Returns how many are pinned, at least one: an error at a later page ends the list (Linux's
    /// `__get_user_pages`).
    ///
    /// # Errors
    /// EFAULT where the program may not make the access, ENOMEM.
    pub(crate) fn pin_user_pages(
        &self,
        mm: Pa<Mm>,
        gva: u64,
        write: bool,
        frames: &mut [u64],
        mut fault: impl FnMut(u64, u64) -> Result<(), FaultError>,
    ) -> Result<usize, Errno> {
        let wanted = frames.len();
        for (index, place) in frames.iter_mut().enumerate() {
            let page = page_of(gva) + index as u64 * PAGE_SIZE;
            match self.pin_page(mm, page, write, &mut fault) {
                Ok(frame) => *place = frame,
                Err(_) if index > 0 => return Ok(index),
                Err(errno) => return Err(errno),
            }
        }
        Ok(wanted)
    }

    fn pin_page(
        &self,
        mm: Pa<Mm>,
        gva: u64,
        write: bool,
        fault: &mut impl FnMut(u64, u64) -> Result<(), FaultError>,
    ) -> Result<u64, Errno> {
        loop {
            if let Some(frame) = self.pin_fast(self.obj(mm), gva, write) {
                return Ok(frame);
            }
            match self.pin_slow(self.obj(mm), gva, write)? {
                Look::Pinned(frame) => return Ok(frame),
                Look::Fault(code) => fault(gva, code).map_err(|error| match error {
                    FaultError::NoMemory => Errno::ENOMEM,
                    FaultError::NoMapping | FaultError::Access | FaultError::Bus => Errno::EFAULT,
                })?,
            }
        }
    }

    /// Under the mmap_lock (Linux's `follow_page_mask`, `check_vma_flags`).
    fn pin_slow(&self, mm: &Mm, gva: u64, write: bool) -> Result<Look, Errno> {
        let access = if write { fault::WRITE } else { 0 };
        let _guard = self.read_lock(&mm.mmap_lock, LockClass::MmapRead);
        // No stack grows for it (gup_vma_lookup).
        let vma = self.vma_at(mm, gva).ok_or(Errno::EFAULT)?;
        if !permits(self.obj(vma).flags.load(SeqCst), access) {
            return Err(Errno::EFAULT);
        }
        self.walk_begins(mm, gva, Walker::Gup);
        let look = self.pin_mapped(mm, gva, write);
        self.walk_ends(mm, gva, Walker::Gup);
        Ok(look)
    }

    fn pin_mapped(&self, mm: &Mm, gva: u64, write: bool) -> Look {
        let access = if write { fault::WRITE } else { 0 } | fault::USER;
        let (slot, _guard) = match self.leaf_table(mm, gva) {
            Ok(table) => (Slot::new(table, 1, gva), self.lock_table(table)),
            Err(2) => {
                let Ok(table) = self.table_at(mm, gva, 2) else {
                    return Look::Fault(access);
                };
                (Slot::new(table, 2, gva), self.lock_upper(mm))
            }
            Err(_) => return Look::Fault(access),
        };
        let entry = self.read_pte(slot);
        if !entry.is_present() || !entry.is_leaf(slot.level) {
            return Look::Fault(access);
        }
        if write && !entry.flags().contains(PteFlags::WRITE) {
            return Look::Fault(access | fault::PRESENT);
        }
        if !self.stays_mapped(entry) {
            return Look::Fault(fault::USER | fault::PRESENT | UNSHARE);
        }
        let frame = frame_of(entry, slot.level, gva);
        self.folio_pin(frame, gva);
        Look::Pinned(frame)
    }

    /// Without a lock (Linux's `gup_fast`); none where the other way must be tried.
    fn pin_fast(&self, mm: &Mm, gva: u64, write: bool) -> Option<u64> {
        let forks = SeqCount::new(&mm.write_protect_seq);
        let count = forks.try_begin()?;
        self.walk_begins(mm, gva, Walker::GupFast);
        let found = self.pin_lockless(mm, gva, write, || forks.changed(count));
        self.walk_ends(mm, gva, Walker::GupFast);
        found
    }

    fn pin_lockless(
        &self,
        mm: &Mm,
        gva: u64,
        write: bool,
        forked: impl Fn() -> bool,
    ) -> Option<u64> {
        let mut slot = Slot::new(mm.pgd.load(SeqCst), 4, gva);
        let mut above = None;
        let entry = loop {
            let entry = self.read_pte(slot);
            if slot.level > 1 {
                point!(self, Point::WalkStep, [slot.table, u64::from(slot.level)]);
            }
            if !entry.is_present() {
                return None;
            }
            if entry.is_leaf(slot.level) {
                break entry;
            }
            above = Some((slot, entry));
            slot = Slot::new(entry.address(), slot.level - 1, gva);
        };
        let frame = frame_of(entry, slot.level, gva);
        if !grants(entry, write) || !self.folio_try_pin(frame) {
            return None;
        }
        // A table that a collapse has unlinked is still read here; its pages are about to be copied (Linux's
        // gup_fast_pte_range).
        let linked = || above.is_some_and(|(slot, entry)| self.read_pte(slot) == entry);
        // The pin is seen before the entry and the count are looked at; fork does it the other way round.
        fence(SeqCst);
        let same = self.config.bugs.has(Bug::GupFastNoRecheck)
            || self.read_pte(slot) == entry && linked() && !forked() && self.stays_mapped(entry);
        if !same {
            self.folio_unpin_untold(frame);
            return None;
        }
        self.folio_pin_told(frame, gva);
        Some(frame)
    }

    /// Gives back pins of [`Kernel::pin_user_pages`].
    pub(crate) fn unpin_user_pages(&self, gva: u64, frames: &[u64]) {
        for (index, &frame) in frames.iter().enumerate() {
            self.folio_unpin(frame, page_of(gva) + index as u64 * PAGE_SIZE);
        }
    }

    /// True where a pin keeps its promise for the page of `entry`: nothing but unmapping parts the program from a page
    /// of a file, or from one that is its alone.
    fn stays_mapped(&self, entry: Pte) -> bool {
        !is_uncounted(entry)
            && (self.is_file_page(entry) || self.folio_is_exclusive(entry.address()))
    }

    /// True where fork must give the child a copy of the page of `entry`: a device uses it (Linux's
    /// `folio_needs_cow_for_dma`). While [`Mm::write_protect_seq`] is odd.
    #[inline]
    pub(super) fn copies_pinned(&self, entry: Pte) -> bool {
        // Who pins without a lock either sees the odd count or is seen here.
        fence(SeqCst);
        self.folio_is_pinned(entry.address()) && self.pin_needs_copy(entry)
    }

    /// The rest of it, which is asked of few pages.
    #[cold]
    fn pin_needs_copy(&self, entry: Pte) -> bool {
        !self.is_file_page(entry)
            && self.folio_is_exclusive(entry.address())
            && !self.config.bugs.has(Bug::ForkSharesPinned)
    }
}

/// The frame of the page at `gva` that `entry`, a leaf of `level`, maps.
fn frame_of(entry: Pte, level: u8, gva: u64) -> u64 {
    entry.leaf_address(level) | (page_of(gva) & (level_size(level) - 1))
}

/// True where a program may make the access through `entry`.
fn grants(entry: Pte, write: bool) -> bool {
    let mut needed = PteFlags::PRESENT | PteFlags::USER;
    if write {
        needed |= PteFlags::WRITE;
    }
    entry.flags().contains(needed)
}
