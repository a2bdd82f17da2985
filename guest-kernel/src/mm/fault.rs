//! Page faults: what every one begins with, and anonymous memory: the zero page, zero-fill, copy-on-write, stacks that grow (Linux's
//! mm/memory.c). Mappings of files are in `file_fault`.
//!
//! A read of a page that was never written maps the zero page, which is not counted (`zero`); the first write
//! replaces it. Only who installs a folio gives the VMA an anon_vma.
//!
//! An entry is writable only if its folio is exclusive. A is set in every entry that is installed and D
//! in every writable one, so the processor never writes entries by itself. What an entry was is read
//! without its lock, memory is allocated, and then the lock is taken and the entry checked again; if
//! somebody was faster, the access is simply tried again.

use abi::layout::{PAGE_SHIFT, PAGE_SIZE, USER_END, USER_MIN};
use abi::objects::{AnonVma, FrameKind, Mm, Pa, Vma, vma_flags};
use abi::point::Point;
use abi::pte::{Pte, PteFlags, fault};
use abi::syscall::{Errno, rlimit};

use super::swap_in::{MAY_RETRY, MAY_SLEEP, Unfinished};
use super::swap_io::Waiting;
use super::vma::{ACCESS, leaf_flags, permits};
use super::vma_tree::STACK_GUARD;
use super::zero::is_uncounted;
use super::{Field, FreedTables, Slot, page_of, pages};
use crate::Kernel;
use crate::arch::Arch;
use crate::sync::Guard;
use abi::bug::Bug;
use abi::channel::{Walker, cause};

/// Why an access cannot be made possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultError {
    /// Nothing is mapped there (SEGV_MAPERR).
    NoMapping,
    /// What is mapped there does not permit it (SEGV_ACCERR).
    Access,
    /// The file that is mapped there ends before it (SIGBUS).
    Bus,
    /// No frame is left.
    NoMemory,
}

/// The only errno that anything below a fault has.
impl From<Errno> for FaultError {
    fn from(_: Errno) -> Self {
        Self::NoMemory
    }
}

/// The entry of a fault, and what was in it before the lock was taken.
#[derive(Clone, Copy)]
pub(super) struct Faulting {
    pub(super) mm: Pa<Mm>,
    pub(super) vma: Pa<Vma>,
    pub(super) gva: u64,
    pub(super) slot: Slot,
    pub(super) entry: Pte,
    /// What the entry grants afterwards: a write, unless the page is only to be unshared.
    pub(super) grant: PteFlags,
}

/// In the code of a fault: no access, but the page is to be this mm's alone though it stays read-only (Linux's
/// FAULT_FLAG_UNSHARE). Beside the architecture's bits.
pub(super) const UNSHARE: u64 = 1 << 32;

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
        let how = match error & MAY_SLEEP {
            0 => Waiting::Spinning,
            _ => Waiting::Asleep,
        };
        match self.fault_at(mm, page_of(gva), error | MAY_RETRY) {
            Err(Unfinished::Reading(slot)) => self.swap_read_done(slot, how),
            Err(Unfinished::ReadingPage(page)) => return self.page_read_done(page, how),
            Err(Unfinished::Refused(error)) => return Err(error),
            Ok(()) | Err(Unfinished::NeedsMmapLock) => {}
        }
        Ok(())
    }

    /// A fault under the mmap_lock, which is kept to its end (populate, get_user_pages).
    pub(super) fn fault_in(
        &self,
        mm: Pa<Mm>,
        vma: Pa<Vma>,
        gva: u64,
        error: u64,
    ) -> Result<(), FaultError> {
        match self.fault_in_or_wait(mm, vma, gva, error) {
            Err(Unfinished::Refused(error)) => Err(error),
            Err(Unfinished::ReadingPage(page)) => self.page_read_done(page, Waiting::Spinning),
            Ok(()) | Err(Unfinished::Reading(_) | Unfinished::NeedsMmapLock) => Ok(()),
        }
    }

    /// The same; where the code has [`MAY_RETRY`], it may end with something to wait for.
    pub(super) fn fault_in_or_wait(
        &self,
        mm: Pa<Mm>,
        vma: Pa<Vma>,
        gva: u64,
        error: u64,
    ) -> Result<(), Unfinished> {
        let flags = self.obj(vma).flags.get();
        if !permits(flags, error) {
            return Err(FaultError::Access.into());
        }
        if error & (fault::WRITE | UNSHARE) != 0 && flags & vma_flags::SHARED == 0 {
            self.fault_anon_vma(mm, vma, error)?;
        }
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
    ) -> Result<(), Unfinished> {
        let table = match self.leaf_table(self.obj(mm), gva) {
            Ok(table) => table,
            Err(_) => match self.fault_above_table(mm, vma, gva, error)? {
                Some(table) => table,
                None => return Ok(()),
            },
        };
        let slot = Slot::new(table, 1, gva);
        let fault = Faulting {
            mm,
            vma,
            gva,
            slot,
            entry: self.settled_pte(slot),
            grant: match error & UNSHARE {
                0 => PteFlags::WRITE.union(PteFlags::DIRTY),
                _ => PteFlags::empty(),
            },
        };
        let area = self.obj(vma);
        if !fault.entry.is_present() && !fault.entry.is_none() {
            self.fault_non_present(fault, error)
        } else if fault.entry.is_none() {
            if !area.file.get().is_null() {
                return self.file_fault(fault, error);
            }
            self.first_touch(fault, error)?;
            self.fault_around(fault, error);
            Ok(())
        } else if error & (fault::WRITE | UNSHARE) != 0
            && !fault.entry.flags().contains(PteFlags::WRITE)
        {
            if area.flags.get() & vma_flags::SHARED != 0 {
                self.shared_write(fault);
                return Ok(());
            }
            Ok(self.write_protected(fault)?)
        } else {
            // The entry permits it: another CPU was faster, or this one had an older translation
            // (SDM vol. 3A, 5.10.4.3), which the fault has removed.
            Ok(())
        }
    }

    /// Nothing is mapped: a write gets a frame of zeroes, a read the zero page (Linux's do_anonymous_page).
    fn first_touch(&self, fault: Faulting, error: u64) -> Result<(), Errno> {
        if error & fault::WRITE != 0 {
            self.zero_fill(fault)
        } else {
            self.map_zero_page(fault);
            Ok(())
        }
    }

    /// Maps a frame of zeroes, to be written.
    fn zero_fill(&self, fault: Faulting) -> Result<(), Errno> {
        let frame = self.alloc_user_frame(fault.mm)?;
        let flags = leaf_flags(self.obj(fault.vma).flags.get()) | PteFlags::WRITE | PteFlags::DIRTY;
        let guard = self.lock_table(fault.slot.table);
        if !self.read_pte(fault.slot).is_none() {
            drop(guard);
            if self.config.bugs.has(Bug::ChargeKeptOnRace) {
                self.charge_forget(frame);
            }
            self.free_frames(frame);
        } else {
            self.install(fault, Pte::NONE, Pte::new(frame, flags));
        }
        Ok(())
    }

    /// Maps the zero page, which needs no flush: what was there was not present.
    fn map_zero_page(&self, fault: Faulting) {
        let mm = self.obj(fault.mm);
        let entry = self.zero_entry(self.obj(fault.vma).flags.get());
        let _guard = self.lock_table(fault.slot.table);
        if self.read_pte(fault.slot).is_none() {
            self.set_pte(mm, fault.gva, fault.slot, Pte::NONE, entry);
            point!(self, Point::PteInstall, [mm.id.get(), fault.gva]);
        }
    }

    /// Maps the pages around a first touch too (parameter `fault_around`), as far as memory lasts.
    fn fault_around(&self, fault: Faulting, error: u64) {
        let window = self.config.fault_around << PAGE_SHIFT;
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
            if entry.is_none() && self.first_touch(page, error).is_err() {
                return;
            }
            gva += PAGE_SIZE;
        }
    }

    /// A write to a present entry without W in a writable VMA.
    fn write_protected(&self, fault: Faulting) -> Result<(), Errno> {
        let shared = fault.entry.address();
        if is_uncounted(fault.entry) {
            return self.copy_on_write(fault, shared);
        }
        {
            let _guard = self.lock_table(fault.slot.table);
            if self.read_pte(fault.slot) != fault.entry {
                return Ok(());
            }
            let anonymous = !self.is_file_page(fault.entry);
            if anonymous
                && (self.folio_is_exclusive(shared) || self.folio_has_no_other_user(shared))
            {
                self.reuse(fault);
                return Ok(());
            }
            // Whatever happens to the entry meanwhile, the frame stays as long as it is copied.
            self.folio_get(shared, cause::HOLD);
        }
        let result = self.copy_on_write(fault, shared);
        self.swap_put(shared, cause::HOLD);
        if self.config.bugs.has(Bug::CowFreeBeforeFlush) {
            let (start, end) = (fault.gva, fault.gva + PAGE_SIZE);
            self.flush_range(fault.mm, start, end, FreedTables::No);
        }
        result
    }

    /// True where the mapping is all that refers to the folio, or will be once its swap slot is given up, which is done then
    /// (Linux's `wp_can_reuse_anon_folio`).
    fn folio_has_no_other_user(&self, gpa: u64) -> bool {
        if self.slot_of(gpa).is_some() {
            self.swap_free_folio(gpa);
        }
        self.folio_is_sole(gpa)
    }

    /// The folio has no other user: its mapping becomes writable as it is. More permission needs no
    /// flush; another CPU that still lacks it faults and finds it.
    pub(super) fn reuse(&self, fault: Faulting) {
        let page = fault.entry.address();
        // Its other owners are gone for good: no walk needs to look further than here. Not so where other pages of it
        // are mapped.
        if self.folio_is_sole(page) {
            let anon = self.obj(fault.vma).anon_vma.get();
            self.folio(self.head(page)).owner.set(anon.0);
        }
        let folio = self.folio(page);
        folio.flags.set(abi::objects::folio_flags::EXCLUSIVE);
        let new = fault.entry.with(fault.grant).without(PteFlags::COW);
        let mm = self.obj(fault.mm);
        self.set_pte(mm, fault.gva, fault.slot, fault.entry, new);
        point!(self, Point::PteInstall, [mm.id.get(), fault.gva]);
    }

    fn copy_on_write(&self, fault: Faulting, shared: u64) -> Result<(), Errno> {
        let counted = !is_uncounted(fault.entry);
        let copy = if counted {
            let copy = self.alloc_charged(fault.mm, 0, FrameKind::Anon)?;
            self.arch.copy_frame(shared, copy);
            copy
        } else {
            self.alloc_user_frame(fault.mm)?
        };
        let mm = self.obj(fault.mm);
        point!(self, Point::CowCopy, [mm.id.get(), fault.gva]);
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
            if counted {
                self.folio_unmap(shared);
            }
            point!(self, Point::PteClear, [mm.id.get(), fault.gva]);
            let (start, end) = (fault.gva, fault.gva + PAGE_SIZE);
            self.flush_range(fault.mm, start, end, FreedTables::No);
            self.install(fault, Pte::NONE, copied(old, copy, fault.grant));
        }
        if counted {
            // The mapping's reference: nobody translates to the original here any more.
            self.swap_put(shared, cause::UNMAP);
        }
        Ok(())
    }

    /// The seeded bug: the original is given back, and flushed only afterwards.
    fn replace_without_flush(&self, fault: Faulting, copy: u64, guard: Guard<'_, A>) {
        let shared = fault.entry.address();
        let counted = !is_uncounted(fault.entry);
        self.install(fault, fault.entry, copied(fault.entry, copy, fault.grant));
        if counted {
            self.folio_unmap(shared);
        }
        drop(guard);
        if counted {
            self.swap_put(shared, cause::UNMAP);
        }
    }

    /// Maps a frame that nobody else knows. Under the page-table lock.
    pub(super) fn install(&self, fault: Faulting, old: Pte, new: Pte) {
        let (mm, area) = (self.obj(fault.mm), self.obj(fault.vma));
        let anon: Pa<AnonVma> = area.anon_vma.get();
        let index = area.pgoff.get() + pages(fault.gva - area.start.get());
        self.folio_map_new(new.address(), anon, index);
        self.set_pte(mm, fault.gva, fault.slot, old, new);
        point!(self, Point::PteInstall, [mm.id.get(), fault.gva]);
    }

    /// Extends the stack `vma` down to `page` (Linux's expand_downwards). Under the mmap_lock held for
    /// writing.
    pub(super) fn expand_stack(
        &self,
        mm: Pa<Mm>,
        vma: Pa<Vma>,
        page: u64,
    ) -> Result<(), FaultError> {
        let (space, area) = (self.obj(mm), self.obj(vma));
        let grows = area.flags.get() & vma_flags::GROWSDOWN != 0;
        if !grows || page < USER_MIN {
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
        if crowded {
            return Err(FaultError::NoMapping);
        }
        // Before the limits are looked at (Linux's expand_downwards): it shows in what the VMA merges with.
        self.anon_vma_prepare(mm, vma)?;
        self.vma_start_write(vma);
        let old = area.start.get();
        let shift = pages(old - page);
        if area.pgoff.get() < shift || area.end.get() - page > self.limit(space, rlimit::STACK) {
            return Err(FaultError::NoMapping);
        }
        // Linux's acct_stack_growth: a limit that is reached is a fault like any other.
        let flags = area.flags.get();
        self.may_expand(space, flags, shift)
            .and_then(|()| self.may_lock(space, flags, old - page))
            .map_err(|_| FaultError::NoMapping)?;
        self.account(space, flags, (old - page).cast_signed());
        {
            let _family = self.lock_vma_family(vma);
            area.start.set(page);
            area.pgoff.set(area.pgoff.get() - shift);
            self.vma_changed(vma);
        }
        self.tree_update(space, vma, old);
        Ok(())
    }
}

/// The entry of the copy that takes the place of `old`, and what it grants.
fn copied(old: Pte, copy: u64, grant: PteFlags) -> Pte {
    let flags = old.flags().difference(PteFlags::COW | PteFlags::SPECIAL);
    Pte::new(copy, flags | grant)
}
