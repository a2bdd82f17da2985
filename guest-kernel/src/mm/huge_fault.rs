//! Faults where one entry may map 2 MiB (Linux 6.18's `do_huge_pmd_anonymous_page` and `do_huge_pmd_wp_page`).
//!
//! A folio of 2 MiB is mapped at the first touch of its range, for reads as well: there is no huge page of zeroes (Linux
//! with transparent_hugepage/use_zero_page off). Where no block is free, small pages serve, and nothing fails.

use abi::layout::{HUGE_ORDER, HUGE_PAGE_SIZE};
use abi::objects::{FrameKind, Mm, Pa, Vma, vma_flags};
use abi::param::Thp;
use abi::point::Point;
use abi::pte::{Pte, PteFlags, fault};
use abi::syscall::Errno;

use super::fault::{Faulting, UNSHARE};
use super::huge::huge_page_of;
use super::swap_in::Unfinished;
use super::vma::leaf_flags;
use super::{Field, Slot, pages};
use crate::Kernel;
use crate::arch::Arch;

impl<A: Arch> Kernel<A> {
    /// A fault where no table of level 1 is: maps 2 MiB or handles the entry that does, and returns none; or returns a table,
    /// for the fault to go on with small pages.
    ///
    /// # Errors
    /// ENOMEM; that the mmap_lock is needed.
    #[cold]
    #[inline(never)]
    pub(super) fn fault_above_table(
        &self,
        mm: Pa<Mm>,
        vma: Pa<Vma>,
        gva: u64,
        error: u64,
    ) -> Result<Option<u64>, Unfinished> {
        let space = self.obj(mm);
        let base = huge_page_of(gva);
        let is_wanted = self.takes_huge_faults(vma, base);
        if is_wanted {
            let table = self.table_alloc_at(mm, gva, 2)?;
            let slot = Slot::new(table, 2, base);
            if self.read_pte(slot).is_none() {
                // Of a read too: a folio of 2 MiB is never one of zeroes for all.
                match self.fault_anon_vma(mm, vma, error) {
                    Ok(()) if self.fill_huge(mm, vma, base, slot) => return Ok(None),
                    Err(Unfinished::NeedsMmapLock) => return Err(Unfinished::NeedsMmapLock),
                    _ => {}
                }
            }
        }
        if let Ok(table) = self.table_at(space, gva, 2) {
            let slot = Slot::new(table, 2, base);
            let fault = Faulting {
                mm,
                vma,
                gva: base,
                slot,
                entry: self.read_pte(slot),
                grant: match error & UNSHARE {
                    0 => PteFlags::WRITE.union(PteFlags::DIRTY),
                    _ => PteFlags::empty(),
                },
            };
            if fault.entry.is_huge() && self.huge_access(fault, error) {
                return Ok(None);
            }
        }
        let table = self.leaf_table_alloc(mm, gva)?;
        if is_wanted {
            // Small pages serve, until there is a block.
            self.want_collapse();
        }
        Ok(Some(table))
    }

    /// True where a fault may map the 2 MiB at `base` in `vma` at once (Linux's `thp_vma_allowable_order`).
    fn takes_huge_faults(&self, vma: Pa<Vma>, base: u64) -> bool {
        let area = self.obj(vma);
        self.wants_huge(area) && Self::holds_huge(area, base)
    }

    /// True where the policy wants folios of 2 MiB in `area`.
    pub(super) fn wants_huge(&self, area: &Vma) -> bool {
        match self.config.thp {
            Thp::Never => false,
            Thp::Madvise => area.flags.get() & vma_flags::HUGEPAGE != 0,
            Thp::Always => true,
        }
    }

    /// True where `area` takes the 2 MiB at `base` whole, and may have folios of that size.
    pub(super) fn holds_huge(area: &Vma, base: u64) -> bool {
        area.file.get().is_null()
            && area.flags.get() & (vma_flags::NOHUGEPAGE | vma_flags::WIRED | vma_flags::SHARED)
                == 0
            && area.start.get() <= base
            && base + HUGE_PAGE_SIZE <= area.end.get()
    }

    /// Maps 2 MiB of zeroes behind the empty entry `slot`, in a VMA that has an anon_vma. False where small pages must serve.
    fn fill_huge(&self, mm: Pa<Mm>, vma: Pa<Vma>, base: u64, slot: Slot) -> bool {
        let Ok((head, set_aside)) = self.alloc_huge(mm) else {
            return false;
        };
        for page in self.pages_of(head) {
            self.arch.zero_frame(page);
        }
        let guard = self.lock_upper(self.obj(mm));
        if self.read_pte(slot).is_none() {
            self.install_huge(mm, vma, base, slot, head, set_aside);
        } else {
            drop(guard);
            self.free_frames(head);
            self.free_frames(set_aside);
        }
        true
    }

    /// A block of 2 MiB for user memory, and the table that is set aside beside an entry that maps it, so that splitting
    /// it never allocates.
    fn alloc_huge(&self, mm: Pa<Mm>) -> Result<(u64, u64), Errno> {
        let head = self.alloc_charged(mm, HUGE_ORDER, FrameKind::Anon)?;
        match self.table_alloc(mm, 1) {
            Ok(table) => Ok((head, table)),
            Err(error) => {
                self.free_frames(head);
                Err(error)
            }
        }
    }

    /// Maps a folio of 2 MiB that nobody else knows behind the empty entry `slot`, and sets `table` aside. Under the upper
    /// lock.
    pub(super) fn install_huge(
        &self,
        mm: Pa<Mm>,
        vma: Pa<Vma>,
        base: u64,
        slot: Slot,
        head: u64,
        table: u64,
    ) {
        let (space, area) = (self.obj(mm), self.obj(vma));
        let index = area.pgoff.get() + pages(base - area.start.get());
        self.folio_map_new_huge(head, area.anon_vma.get(), index);
        // Dirty, whoever may write: what is gathered has contents (Linux's `collapse_huge_page`, `map_anon_folio_pmd`).
        let mut flags = leaf_flags(area.flags.get()) | PteFlags::HUGE | PteFlags::DIRTY;
        if area.flags.get() & vma_flags::WRITE != 0 {
            flags |= PteFlags::WRITE;
        }
        self.deposit_table(space, slot.table, table);
        self.set_pte(space, base, slot, Pte::NONE, Pte::new(head, flags));
        point!(self, Point::PteInstall, [space.id.get(), base]);
    }

    /// A fault on an entry of 2 MiB; false where it must be split for a page to be copied. A shared folio is not copied
    /// whole (`do_huge_pmd_wp_page`).
    fn huge_access(&self, fault: Faulting, error: u64) -> bool {
        let guard = self.lock_upper(self.obj(fault.mm));
        if self.read_pte(fault.slot) != fault.entry || !fault.entry.is_present() {
            // Somebody else was at it: the access is tried again.
            return true;
        }
        let is_denied =
            error & (fault::WRITE | UNSHARE) != 0 && !fault.entry.flags().contains(PteFlags::WRITE);
        if !is_denied {
            return true;
        }
        let head = fault.entry.address();
        if self.folio_is_exclusive(head) || self.folio_is_sole(head) {
            self.reuse(fault);
            return true;
        }
        drop(guard);
        false
    }
}
