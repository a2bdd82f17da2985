//! Collapse: 512 small pages are copied to one folio of 2 MiB, which one entry maps from then on (Linux 6.18's
//! mm/khugepaged.c). On request (MADV_COLLAPSE), or where a scan of an address space finds it worthwhile: that of the thread
//! (`khugepaged`), or one on request.
//!
//! While the pages are copied nobody may write them, or take a reference to them. The VMA held for writing keeps
//! faults out, the lock of the anon_vma's family walks back. Programs and get_user_pages without a lock ask neither: so the
//! entry of level 2 is cleared and flushed first, from every CPU that may hold a pointer to the table, and only then are the
//! pages looked at (Linux's `pmdp_collapse_flush`). Who pins a page without a lock looks at that entry again afterwards;
//! either it sees that it is gone, or its reference is seen here, and the pages stay as they are.
//!
//! The table is not freed: it is what is set aside beside the new entry. A walk without locks may be in it still, so
//! whoever frees it then waits for a grace period (`huge`).

use abi::bug::Bug;
use abi::channel::{Walker, cause};
use abi::layout::{ENTRIES_PER_TABLE, HUGE_ORDER, HUGE_PAGE_SIZE, PAGE_SIZE};
use abi::objects::{FrameKind, Mm, Pa, Vma};
use abi::point::Point;
use abi::pte::Pte;
use abi::syscall::Errno;
use core::sync::atomic::Ordering::Acquire;

use super::group::Effort;
use super::huge::huge_page_of;
use super::khugepaged::REGIONS;
use super::zero::is_uncounted;
use super::{Field, FreedTables, Slot};
use crate::Kernel;
use crate::arch::Arch;

/// Pages that are unmapped under one hold of the page-table lock.
const BATCH: usize = 64;

/// Who wants it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Collapse {
    /// A program: as many pages as it takes may be missing, or be shared (Linux's `cc->is_khugepaged` false).
    Forced,
    /// A scan.
    Scan,
}

/// Most pages that a scan finds missing, or shared with others (the defaults of /sys/kernel/mm/transparent_hugepage/
/// khugepaged: max_ptes_none, max_ptes_shared).
const MAX_NONE: usize = ENTRIES_PER_TABLE - 1;
const MAX_SHARED: usize = ENTRIES_PER_TABLE / 2;

/// Why 2 MiB were not collapsed (Linux's `enum scan_result`).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Refusal {
    /// There is no table, or something other than a page in it: others may succeed.
    NoPages,
    /// Somebody else uses a page of it.
    Used,
    /// Too many pages are missing, or shared.
    NotWorth,
    /// No block of 2 MiB is free.
    NoMemory,
    /// The memory group does not hold 2 MiB more.
    NotCharged,
}

impl Refusal {
    /// Linux's `madvise_collapse_errno`.
    fn errno(self) -> Errno {
        match self {
            Self::NoPages | Self::NotWorth => Errno::EINVAL,
            Self::Used => Errno::EAGAIN,
            Self::NoMemory => Errno::ENOMEM,
            Self::NotCharged => Errno::EBUSY,
        }
    }
}

/// What is collapsed.
#[derive(Clone, Copy)]
struct Region {
    mm: Pa<Mm>,
    vma: Pa<Vma>,
    base: u64,
    /// The entry of level 2, and the table that it refers to.
    slot: Slot,
    table: u64,
}

impl<A: Arch> Kernel<A> {
    /// MADV_COLLAPSE of what a VMA has in a range (Linux's `madvise_collapse`). Under the mmap_lock held for writing, which Linux
    /// takes for each 2 MiB anew.
    ///
    /// # Errors
    /// EINVAL where the VMA takes no folio of 2 MiB or has no page yet, or the range holds none; of the last 2 MiB that
    /// could not be collapsed: EAGAIN where others use a page, ENOMEM without a free block and EBUSY where the memory group
    /// does not hold it, which end the call, EINVAL where nothing was ever mapped.
    pub(super) fn collapse_advice(
        &self,
        mm: Pa<Mm>,
        vma: Pa<Vma>,
        (start, end): (u64, u64),
    ) -> Result<(), Errno> {
        let area = self.obj(vma);
        let last = huge_page_of(area.end.get()).wrapping_sub(HUGE_PAGE_SIZE);
        if area.anon_vma.get().is_null() || !Self::holds_huge(area, last) {
            return Err(Errno::EINVAL);
        }
        let (mut base, end) = (huge_page_of(start + HUGE_PAGE_SIZE - 1), huge_page_of(end));
        if base > end {
            return Err(Errno::EINVAL);
        }
        let mut result = Ok(());
        while base < end {
            match self.collapse(mm, vma, base, Collapse::Forced) {
                Ok(()) => {}
                Err(refusal @ (Refusal::NoMemory | Refusal::NotCharged)) => {
                    return Err(refusal.errno());
                }
                Err(refusal) => result = Err(refusal.errno()),
            }
            base += HUGE_PAGE_SIZE;
        }
        result
    }

    /// What khugepaged does for one address space: collapses what the policy and its limits permit. Returns how many folios of
    /// 2 MiB it has made.
    pub(crate) fn scan_for_collapse(&self, mm: Pa<Mm>) -> u64 {
        let _guard = self.mmap_write_lock(self.obj(mm));
        let (mut next, mut made) = (Some(0), 0);
        while let Some(at) = next {
            let (is_made, rest) = self.scan_regions(mm, at, u64::MAX);
            made += u64::from(is_made);
            next = rest;
        }
        made
    }

    /// A step of the thread from `at` on; returns where the next one begins, none at the end.
    pub(super) fn scan_step(&self, mm: Pa<Mm>, at: u64) -> Option<u64> {
        let _guard = self.mmap_write_lock(self.obj(mm));
        self.scan_regions(mm, at, REGIONS).1
    }

    /// Looks at up to so many 2 MiB from `at` on, until one is collapsed. Returns whether one is, and where to go on. Under the
    /// mmap_lock held for writing.
    fn scan_regions(&self, mm: Pa<Mm>, at: u64, regions: u64) -> (bool, Option<u64>) {
        let space = self.obj(mm);
        let (mut at, mut left) = (at, regions);
        while let Some(vma) = self.vma_find(space, at) {
            let area = self.obj(vma);
            let mut base = huge_page_of(area.start.get().max(at) + HUGE_PAGE_SIZE - 1);
            at = area.end.get();
            if !self.wants_huge(area) || area.anon_vma.get().is_null() {
                continue;
            }
            while Self::holds_huge(area, base) {
                if left == 0 {
                    return (false, Some(base));
                }
                left -= 1;
                let is_huge = self
                    .leaf_at(space, base)
                    .is_some_and(|(level, _)| level == 2);
                let next = base + HUGE_PAGE_SIZE;
                if !is_huge && self.collapse(mm, vma, base, Collapse::Scan).is_ok() {
                    return (true, Some(next));
                }
                base = next;
            }
        }
        (false, None)
    }

    /// Linux's `hpage_collapse_scan_pmd` and `collapse_huge_page`.
    fn collapse(&self, mm: Pa<Mm>, vma: Pa<Vma>, base: u64, by: Collapse) -> Result<(), Refusal> {
        let space = self.obj(mm);
        let upper = self
            .table_at(space, base, 2)
            .map_err(|_| Refusal::NoPages)?;
        let slot = Slot::new(upper, 2, base);
        let entry = self.read_pte(slot);
        if entry.is_huge() {
            return Ok(());
        }
        if !entry.is_table() {
            return Err(Refusal::NoPages);
        }
        let region = Region {
            mm,
            vma,
            base,
            slot,
            table: entry.address(),
        };
        self.vma_start_write(vma);
        {
            let _guard = self.lock_table(region.table);
            self.can_collapse(region, by)?;
        }
        let head = self
            .alloc_frames(HUGE_ORDER, FrameKind::Anon)
            .map_err(|_| Refusal::NoMemory)?;
        // Linux's alloc_charge_folio. What the small pages are charged for goes with them.
        if self.charge(space.group.get(), head, Effort::None).is_err() {
            self.free_frames(head);
            return Err(Refusal::NotCharged);
        }
        self.walk_begins(space, base, Walker::Move);
        let result = self.collapse_to(region, entry, head, by);
        self.walk_ends(space, base, Walker::Move);
        if result.is_err() {
            self.free_frames(head);
        }
        result
    }

    fn collapse_to(
        &self,
        region: Region,
        entry: Pte,
        head: u64,
        by: Collapse,
    ) -> Result<(), Refusal> {
        let Region {
            mm,
            vma,
            base,
            slot,
            ..
        } = region;
        let space = self.obj(mm);
        // Walks back find the small pages, or the folio, and not what is between.
        let _family = self.lock_vma_family(vma);
        let early = self.config.bugs.has(Bug::CollapseCopyBeforeFlush);
        {
            let _guard = self.lock_upper(space);
            self.set_pte(space, base, slot, entry, Pte::NONE);
            point!(self, Point::PteClear, [space.id.get(), base]);
            if early {
                self.copy_pages(region, head);
                point!(self, Point::CowCopy, [space.id.get(), base]);
            }
            // Who is lazy may hold a pointer to the table too, which will serve other addresses.
            self.flush_range(mm, base, base + HUGE_PAGE_SIZE, FreedTables::Yes);
        }
        let allowed = {
            let _guard = self.lock_table(region.table);
            self.can_collapse(region, by)
        };
        if let Err(refusal) = allowed {
            let _guard = self.lock_upper(space);
            self.set_pte(space, base, slot, Pte::NONE, entry);
            return Err(refusal);
        }
        if !early {
            self.copy_pages(region, head);
            point!(self, Point::CowCopy, [space.id.get(), base]);
        }
        self.unmap_small(region);
        let _guard = self.lock_upper(space);
        self.install_huge(mm, vma, base, slot, head, region.table);
        Ok(())
    }

    /// Whether the pages of a table may be collapsed (Linux's `__collapse_huge_page_isolate`). Under its lock.
    fn can_collapse(&self, region: Region, by: Collapse) -> Result<(), Refusal> {
        let (mut none, mut shared) = (0, 0);
        for entry in self.small_entries(region) {
            if entry.is_none() || entry.is_present() && is_uncounted(entry) {
                none += 1;
                continue;
            }
            if !entry.is_present() {
                return Err(Refusal::NoPages);
            }
            let folio = self.folio(self.head(entry.address()));
            let (mappings, references) = (folio.mapcount.get(), folio.refcount.load(Acquire));
            // A device, or somebody who is copying it.
            if references != mappings {
                return Err(Refusal::Used);
            }
            shared += usize::from(!self.folio_is_exclusive(entry.address()) && mappings > 1);
        }
        if by == Collapse::Scan && (none > MAX_NONE || shared > MAX_SHARED) {
            return Err(Refusal::NotWorth);
        }
        Ok(())
    }

    fn small_entries(&self, region: Region) -> impl Iterator<Item = Pte> + '_ {
        (0..ENTRIES_PER_TABLE).map(move |index| {
            self.read_pte(Slot {
                table: region.table,
                level: 1,
                index,
            })
        })
    }

    /// Linux's `__collapse_huge_page_copy`.
    fn copy_pages(&self, region: Region, head: u64) {
        for (index, entry) in self.small_entries(region).enumerate() {
            let page = head + index as u64 * PAGE_SIZE;
            if entry.is_none() || is_uncounted(entry) {
                self.arch.zero_frame(page);
            } else {
                self.arch.copy_frame(entry.address(), page);
            }
        }
    }

    /// Clears the small entries, which nobody reaches any more, and gives their pages back.
    fn unmap_small(&self, region: Region) {
        let space = self.obj(region.mm);
        let end = region.base + HUGE_PAGE_SIZE;
        let mut rest = region.base;
        while rest < end {
            let (mut frames, mut count) = ([0; BATCH], 0);
            {
                let _guard = self.lock_table(region.table);
                while count < BATCH {
                    let Some((gva, entry)) = self.next_entry((region.table, 1), rest, end) else {
                        rest = end;
                        break;
                    };
                    rest = gva + PAGE_SIZE;
                    let slot = Slot::new(region.table, 1, gva);
                    self.set_pte(space, gva, slot, entry, Pte::NONE);
                    if !is_uncounted(entry) {
                        self.folio_unmap(entry.address());
                        frames[count] = entry.address();
                        count += 1;
                    }
                }
            }
            for &frame in &frames[..count] {
                self.folio_put(frame, cause::UNMAP);
            }
        }
    }
}
