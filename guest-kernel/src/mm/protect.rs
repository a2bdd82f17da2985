//! mprotect (Linux 6.18's mm/mprotect.c).

use core::convert::Infallible;

use abi::channel::Walker;
use abi::layout::PAGE_SIZE;
use abi::objects::{Mm, Pa, Vma, vma_flags};
use abi::point::Point;
use abi::pte::{Pte, PteFlags};
use abi::syscall::{Errno, prot};

use super::changed::Changed;
use super::vma::{ACCESS, leaf_flags, prot_flags, shared_rights};
use super::{Field, FreedTables, Slot, is_page_aligned, page_align, pages};
use crate::Kernel;
use crate::arch::Arch;

/// The range is to begin where a stack does (PROT_GROWSDOWN), or to end where one does that grows up, of
/// which x86 has none.
const PROT_GROWSDOWN: u64 = 0x0100_0000;
const PROT_GROWSUP: u64 = 0x0200_0000;
/// PROT_SEM: accepted and without effect, as in Linux.
const PROT_SEM: u64 = 8;

impl<A: Arch> Kernel<A> {
    /// mprotect. When it returns, no CPU uses a permission that it took away.
    ///
    /// # Errors
    /// EINVAL for a bad address or `prot`, or PROT_GROWSDOWN where no stack is; ENOMEM for a hole in the range, after what lies before the
    /// hole was changed, and where memory runs out.
    pub fn mprotect(&self, mm: Pa<Mm>, start: u64, len: u64, prot: u64) -> Result<(), Errno> {
        // In this order: Linux's do_mprotect_pkey.
        let grows = prot & (PROT_GROWSDOWN | PROT_GROWSUP);
        let prot = prot & !grows;
        if grows == PROT_GROWSDOWN | PROT_GROWSUP {
            return Err(Errno::EINVAL);
        }
        if !is_page_aligned(start) {
            return Err(Errno::EINVAL);
        }
        if len == 0 {
            return Ok(());
        }
        let end = start.wrapping_add(page_align(len));
        if end <= start {
            return Err(Errno::ENOMEM);
        }
        if prot & !(prot::READ | prot::WRITE | prot::EXEC | PROT_SEM) != 0 {
            return Err(Errno::EINVAL);
        }
        let _guard = self.mmap_write_lock(self.obj(mm));
        let start = self.protect_from(mm, (start, end), grows)?;
        let mut reduced = Changed::NOTHING;
        let result = self.protect_range(mm, (start, end), prot_flags(prot), &mut reduced);
        if !reduced.is_nothing() {
            self.flush_change(mm, reduced, FreedTables::No);
        }
        result
    }

    /// Where the range begins.
    fn protect_from(&self, mm: Pa<Mm>, (start, end): (u64, u64), grows: u64) -> Result<u64, Errno> {
        if grows == 0 {
            return Ok(start);
        }
        let vma = self.vma_find(self.obj(mm), start).ok_or(Errno::ENOMEM)?;
        let area = self.obj(vma);
        if grows == PROT_GROWSUP {
            let is_mapped = area.start.get() <= start;
            return Err(if is_mapped {
                Errno::EINVAL
            } else {
                Errno::ENOMEM
            });
        }
        if area.start.get() >= end {
            return Err(Errno::ENOMEM);
        }
        if area.flags.get() & vma_flags::GROWSDOWN == 0 {
            return Err(Errno::EINVAL);
        }
        Ok(area.start.get())
    }

    fn protect_range(
        &self,
        mm: Pa<Mm>,
        (start, end): (u64, u64),
        access: u64,
        reduced: &mut Changed,
    ) -> Result<(), Errno> {
        let mut at = start;
        while at < end {
            let vma = self.vma_at(self.obj(mm), at).ok_or(Errno::ENOMEM)?;
            let to = self.obj(vma).end.get().min(end);
            self.protect_vma(mm, vma, (at, to), access, reduced)?;
            at = to;
        }
        Ok(())
    }

    fn protect_vma(
        &self,
        mm: Pa<Mm>,
        vma: Pa<Vma>,
        (start, end): (u64, u64),
        access: u64,
        reduced: &mut Changed,
    ) -> Result<(), Errno> {
        let area = self.obj(vma);
        let old = area.flags.get();
        let mut new = old & !ACCESS | access;
        if new == old {
            return Ok(());
        }
        if new & vma_flags::WRITE != 0 {
            // Where the area turns into data (Linux's mprotect_fixup).
            let more = pages(end - start);
            let had_room = self.may_expand(self.obj(mm), old, more).is_ok();
            self.may_expand(self.obj(mm), new, more)
                .or_else(|error| if had_room { Err(error) } else { Ok(()) })?;
        }
        // A private mapping counts from when it is first writable until it can hold nothing.
        if new & vma_flags::WRITE != 0 {
            if old
                & (vma_flags::ACCOUNT | vma_flags::WRITE | vma_flags::NORESERVE | vma_flags::SHARED)
                == 0
            {
                new |= vma_flags::ACCOUNT;
            }
        } else if area.anon_vma.get().is_null() && area.file.get().is_null() {
            new &= !vma_flags::ACCOUNT;
        }
        self.vma_modify(mm, vma, (start, end), new)?;
        self.protect_entries(mm, (start, end), new, reduced);
        let locked = vma_flags::WRITE | vma_flags::SHARED | vma_flags::LOCKED;
        if old & locked == vma_flags::LOCKED && new & vma_flags::WRITE != 0 {
            self.populate_locked(mm, (start, end));
        }
        Ok(())
    }

    fn protect_entries(
        &self,
        mm: Pa<Mm>,
        (start, end): (u64, u64),
        flags: u64,
        reduced: &mut Changed,
    ) {
        let space = self.obj(mm);
        self.protect_huge_range(mm, (start, end), flags, reduced);
        let Ok(()) =
            self.for_each_leaf_table(space, Walker::Protect, (start, end), |table, from, to| {
                let _guard = self.lock_table(table);
                self.flush_batched_pending(mm);
                let mut rest = from;
                while let Some((gva, entry)) = self.next_entry((table, 1), rest, to) {
                    let new = self.protected(entry, flags);
                    if new != entry {
                        self.set_pte(space, gva, Slot::new(table, 1, gva), entry, new);
                    }
                    if takes_away(entry, new) {
                        reduced.add(Changed::pages(gva, gva + PAGE_SIZE));
                        point!(self, Point::PteProtect, [space.id.get(), gva]);
                    }
                    rest = gva + PAGE_SIZE;
                }
                Ok::<(), Infallible>(())
            });
    }

    /// `entry` with the permissions of a VMA with `flags`. It becomes writable only where a write needs
    /// neither a copy nor D, which a fault sets.
    pub(super) fn protected(&self, entry: Pte, flags: u64) -> Pte {
        if !entry.is_present() {
            return Self::protect_non_present(entry);
        }
        let kept = PteFlags::ACCESSED
            | PteFlags::DIRTY
            | PteFlags::COW
            | PteFlags::SPECIAL
            | PteFlags::HUGE;
        let mut leaf = leaf_flags(flags) | entry.flags().intersection(kept);
        if flags & vma_flags::SHARED != 0 {
            leaf |= shared_rights(flags);
            // Whoever has made it dirty has told (Linux's can_change_shared_pte_writable).
            if flags & vma_flags::WRITE != 0 && leaf.contains(PteFlags::DIRTY) {
                leaf |= PteFlags::WRITE;
            }
        } else if flags & vma_flags::WRITE != 0
            && leaf.contains(PteFlags::DIRTY)
            && self.folio_is_exclusive(entry.address())
        {
            leaf |= PteFlags::WRITE;
        }
        Pte::new(entry.address(), leaf)
    }
}

/// True where a translation cached from `old` permits what `new` refuses (SDM vol. 3A, 5.10.4.2).
pub(super) fn takes_away(old: Pte, new: Pte) -> bool {
    if !old.is_present() {
        return false;
    }
    let granted = PteFlags::WRITE | PteFlags::USER;
    !new.flags().contains(old.flags().intersection(granted))
        || new.flags().contains(PteFlags::NO_EXECUTE) && !old.flags().contains(PteFlags::NO_EXECUTE)
}
