//! Page faults on anonymous memory: zero-fill, copy-on-write, stacks that grow (Linux's mm/memory.c).
//!
//! An entry is writable only if its folio is exclusive. A is set in every entry that is installed and D
//! in every writable one, so the processor never writes entries by itself. What an entry was is read
//! without its lock, memory is allocated, and then the lock is taken and the entry checked again; if
//! somebody was faster, the access is simply tried again.

use abi::layout::{PAGE_SHIFT, PAGE_SIZE, USER_END, USER_MIN};
use abi::objects::{AnonVma, FrameKind, Mm, Pa, Vma, vma_flags};
use abi::point::Point;
use abi::pte::{Pte, PteFlags, fault};
use abi::syscall::Errno;

use super::vma::{ACCESS, leaf_flags, permits};
use super::vma_tree::STACK_GUARD;
use super::{Field, FreedTables, Slot, page_of, pages};
use crate::Kernel;
use crate::arch::Arch;
use crate::sync::Guard;
use abi::bug::Bug;
use abi::channel::{Walker, cause};
use abi::lock::LockClass;

/// Largest stack that grows by itself (Linux's default RLIMIT_STACK).
const STACK_LIMIT: u64 = 8 << 20;

/// Why an access cannot be made possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultError {
    /// Nothing is mapped there (SEGV_MAPERR).
    NoMapping,
    /// What is mapped there does not permit it (SEGV_ACCERR).
    Access,
    /// No frame is left.
    NoMemory,
}

/// The only error that anything below a fault has.
impl From<Errno> for FaultError {
    fn from(_: Errno) -> Self {
        Self::NoMemory
    }
}

/// The entry of a fault, and what was in it before the lock was taken.
#[derive(Clone, Copy)]
struct Faulting {
    mm: Pa<Mm>,
    vma: Pa<Vma>,
    gva: u64,
    slot: Slot,
    entry: Pte,
}

impl<A: Arch> Kernel<A> {
    /// Makes the access that faulted possible; `error` is the architectural code (`abi::pte::fault`).
    /// On success the access is to be tried again, which may fault again.
    ///
    /// # Errors
    /// Why it must not be made.
    pub fn handle_fault(&self, mm: Pa<Mm>, gva: u64, error: u64) -> Result<(), FaultError> {
        if gva >= USER_END {
            return Err(FaultError::NoMapping);
        }
        let page = page_of(gva);
        let space = self.obj(mm);
        {
            let _guard = self.read_lock(&space.mmap_lock, LockClass::MmapRead);
            if let Some(vma) = self.vma_at(space, page) {
                self.vma_found(space, vma, page);
                return self.fault_in(mm, vma, page, error);
            }
        }
        let _guard = self.write_lock(&space.mmap_lock, LockClass::MmapWrite);
        let vma = self.vma_find(space, page).ok_or(FaultError::NoMapping)?;
        self.vma_found(space, vma, page);
        if self.obj(vma).start.get() > page {
            self.expand_stack(mm, vma, page)?;
        }
        self.fault_in(mm, vma, page, error)
    }

    /// Told so that the host can tell a VMA that was recycled since.
    #[inline]
    fn vma_found(&self, mm: &Mm, vma: Pa<Vma>, gva: u64) {
        #[cfg(feature = "testbed")]
        {
            let generation = self.obj(vma).generation.get();
            self.event(
                abi::channel::EventKind::VmaFound,
                [mm.id.get(), vma.0, gva, generation.into(), 0],
            );
        }
        #[cfg(not(feature = "testbed"))]
        let _ = (mm, vma, gva);
    }

    pub(super) fn fault_in(
        &self,
        mm: Pa<Mm>,
        vma: Pa<Vma>,
        gva: u64,
        error: u64,
    ) -> Result<(), FaultError> {
        let area = self.obj(vma);
        if !permits(area.flags.get(), error) {
            return Err(FaultError::Access);
        }
        self.anon_vma_prepare(mm, vma)?;
        self.walk_begins(self.obj(mm), gva, Walker::Fault);
        let result = self.fault_in_table(mm, vma, gva, error);
        self.walk_ends(self.obj(mm), gva, Walker::Fault);
        result
    }

    /// The same where the VMA permits it.
    fn fault_in_table(
        &self,
        mm: Pa<Mm>,
        vma: Pa<Vma>,
        gva: u64,
        error: u64,
    ) -> Result<(), FaultError> {
        let table = self.leaf_table_alloc(mm, gva)?;
        let slot = Slot::new(table, 1, gva);
        let fault = Faulting {
            mm,
            vma,
            gva,
            slot,
            entry: self.read_pte(slot),
        };
        if !fault.entry.is_present() {
            self.zero_fill(fault, error)?;
            self.fault_around(fault, error);
            Ok(())
        } else if error & fault::WRITE != 0 && !fault.entry.flags().contains(PteFlags::WRITE) {
            Ok(self.write_protected(fault)?)
        } else {
            // The entry permits it: another CPU was faster, or this one had an older translation
            // (SDM vol. 3A, 5.10.4.3), which the fault has removed.
            Ok(())
        }
    }

    /// Maps a frame of zeroes.
    fn zero_fill(&self, fault: Faulting, error: u64) -> Result<(), Errno> {
        let frame = self.alloc_user_frame()?;
        let mut flags = leaf_flags(self.obj(fault.vma).flags.get());
        if error & fault::WRITE != 0 {
            flags |= PteFlags::WRITE | PteFlags::DIRTY;
        }
        let guard = self.lock_table(fault.slot.table);
        if self.read_pte(fault.slot).is_present() {
            drop(guard);
            self.free_frames(frame);
        } else {
            self.install(fault, Pte::NONE, Pte::new(frame, flags));
        }
        Ok(())
    }

    /// Maps the pages around a first touch too (parameter `fault_around`), as far as memory lasts.
    fn fault_around(&self, fault: Faulting, error: u64) {
        let window = self.config.fault_around.clamp(1, 16).next_power_of_two() << PAGE_SHIFT;
        if window == PAGE_SIZE {
            return;
        }
        let area = self.obj(fault.vma);
        let base = fault.gva & !(window - 1);
        let mut gva = base.max(area.start.get());
        while gva < (base + window).min(area.end.get()) {
            let slot = Slot::new(fault.slot.table, 1, gva);
            let entry = self.read_pte(slot);
            let page = Faulting {
                gva,
                slot,
                entry,
                ..fault
            };
            if !entry.is_present() && self.zero_fill(page, error).is_err() {
                return;
            }
            gva += PAGE_SIZE;
        }
    }

    /// A write to a present entry without W in a writable VMA.
    fn write_protected(&self, fault: Faulting) -> Result<(), Errno> {
        let shared = fault.entry.address();
        {
            let _guard = self.lock_table(fault.slot.table);
            if self.read_pte(fault.slot) != fault.entry {
                return Ok(());
            }
            if self.folio_is_exclusive(shared) || self.folio_is_sole(shared) {
                self.reuse(fault);
                return Ok(());
            }
            // Whatever happens to the entry meanwhile, the frame stays as long as it is copied.
            self.folio_get(shared, cause::HOLD);
        }
        let result = self.copy_on_write(fault, shared);
        self.folio_put(shared, cause::HOLD);
        if self.config.bugs.has(Bug::CowFreeBeforeFlush) {
            let (start, end) = (fault.gva, fault.gva + PAGE_SIZE);
            self.flush_range(fault.mm, start, end, FreedTables::No);
        }
        result
    }

    /// The folio has no other user: its mapping becomes writable as it is. More permission needs no
    /// flush; another CPU that still lacks it faults and finds it.
    fn reuse(&self, fault: Faulting) {
        let folio = self.folio(fault.entry.address());
        let anon = self.obj(fault.vma).anon_vma.get();
        // Its other owners are gone for good: no walk needs to look further than here.
        folio.owner.set(anon.0);
        folio.flags.set(abi::objects::folio_flags::EXCLUSIVE);
        let new = fault
            .entry
            .with(PteFlags::WRITE | PteFlags::DIRTY)
            .without(PteFlags::COW);
        let mm = self.obj(fault.mm);
        self.set_pte(mm, fault.gva, fault.slot, fault.entry, new);
        self.point(Point::PteInstall, [mm.id.get(), fault.gva]);
    }

    fn copy_on_write(&self, fault: Faulting, shared: u64) -> Result<(), Errno> {
        let copy = self.alloc_frames(0, FrameKind::Anon)?;
        self.arch.copy_frame(shared, copy);
        let mm = self.obj(fault.mm);
        self.point(Point::CowCopy, [mm.id.get(), fault.gva]);
        {
            let guard = self.lock_table(fault.slot.table);
            if self.read_pte(fault.slot) != fault.entry {
                drop(guard);
                self.free_frames(copy);
                return Ok(());
            }
            if self.config.bugs.has(Bug::CowFreeBeforeFlush) {
                self.replace_without_flush(fault, copy, guard);
                return Ok(());
            }
            // Cleared and flushed before the copy is reachable: else one thread writes the copy while
            // another reads the original through an older translation (Linux's wp_page_copy).
            let old = self.set_pte(mm, fault.gva, fault.slot, fault.entry, Pte::NONE);
            self.folio_unmap(shared);
            self.point(Point::PteClear, [mm.id.get(), fault.gva]);
            let (start, end) = (fault.gva, fault.gva + PAGE_SIZE);
            self.flush_range(fault.mm, start, end, FreedTables::No);
            let flags = old.flags().difference(PteFlags::COW);
            let new = Pte::new(copy, flags | PteFlags::WRITE | PteFlags::DIRTY);
            self.install(fault, Pte::NONE, new);
        }
        // The mapping's reference: nobody translates to the original here any more.
        self.folio_put(shared, cause::UNMAP);
        Ok(())
    }

    /// The seeded bug: the original is given back, and flushed only afterwards.
    fn replace_without_flush(&self, fault: Faulting, copy: u64, guard: Guard<'_, A>) {
        let flags = fault.entry.flags().difference(PteFlags::COW);
        let new = Pte::new(copy, flags | PteFlags::WRITE | PteFlags::DIRTY);
        let shared = fault.entry.address();
        self.install(fault, fault.entry, new);
        self.folio_unmap(shared);
        drop(guard);
        self.folio_put(shared, cause::UNMAP);
    }

    /// Maps a frame that nobody else knows. Under the page-table lock.
    fn install(&self, fault: Faulting, old: Pte, new: Pte) {
        let (mm, area) = (self.obj(fault.mm), self.obj(fault.vma));
        let anon: Pa<AnonVma> = area.anon_vma.get();
        let index = area.pgoff.get() + pages(fault.gva - area.start.get());
        self.folio_map_new(new.address(), anon, index);
        self.set_pte(mm, fault.gva, fault.slot, old, new);
        self.point(Point::PteInstall, [mm.id.get(), fault.gva]);
    }

    /// Extends the stack `vma` down to `page` (Linux's expand_downwards). Under the mmap_lock held for
    /// writing.
    fn expand_stack(&self, mm: Pa<Mm>, vma: Pa<Vma>, page: u64) -> Result<(), FaultError> {
        let (space, area) = (self.obj(mm), self.obj(vma));
        let grows = area.flags.get() & vma_flags::GROWSDOWN != 0;
        if !grows || page < USER_MIN || area.end.get() - page > STACK_LIMIT {
            return Err(FaultError::NoMapping);
        }
        let crowded = self
            .vma_before(space, area.start.get())
            .is_some_and(|prev| {
                let prev = self.obj(prev);
                let flags = prev.flags.get();
                flags & vma_flags::GROWSDOWN == 0
                    && flags & ACCESS != 0
                    && page - prev.end.get() < STACK_GUARD
            });
        let old = area.start.get();
        let shift = pages(old - page);
        if crowded || area.pgoff.get() < shift {
            return Err(FaultError::NoMapping);
        }
        self.anon_vma_prepare(mm, vma)?;
        {
            let _family = self.lock_vma_family(vma);
            area.start.set(page);
            area.pgoff.set(area.pgoff.get() - shift);
        }
        self.tree_update(space, vma, old);
        Ok(())
    }
}
