//! mprotect (Linux 6.18's mm/mprotect.c).

use core::convert::Infallible;

use abi::channel::Walker;
use abi::layout::PAGE_SIZE;
use abi::objects::{Mm, Pa, Vma, vma_flags};
use abi::point::Point;
use abi::pte::{Pte, PteFlags};
use abi::syscall::{Errno, prot};

use super::vma::{ACCESS, leaf_flags, prot_flags};
use super::{Field, FreedTables, Slot, is_page_aligned, page_align};
use crate::Kernel;
use crate::arch::Arch;
use abi::lock::LockClass;

/// PROT_SEM: accepted and without effect, as in Linux.
const PROT_SEM: u64 = 8;

/// What changed in the entries and is not yet flushed.
struct Reduced {
    start: u64,
    end: u64,
}

impl<A: Arch> Kernel<A> {
    /// mprotect. When it returns, no CPU uses a permission that it took away.
    ///
    /// # Errors
    /// EINVAL for a bad address or `prot`; ENOMEM for a hole in the range, after what lies before the
    /// hole was changed, and where memory runs out.
    pub fn mprotect(&self, mm: Pa<Mm>, start: u64, len: u64, prot: u64) -> Result<(), Errno> {
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
        let _guard = self.write_lock(&self.obj(mm).mmap_lock, LockClass::MmapWrite);
        let mut reduced = Reduced {
            start: u64::MAX,
            end: 0,
        };
        let result = self.protect_range(mm, (start, end), prot_flags(prot), &mut reduced);
        if reduced.start < reduced.end {
            self.flush_change(mm, reduced.start, reduced.end, FreedTables::No);
        }
        result
    }

    fn protect_range(
        &self,
        mm: Pa<Mm>,
        (start, end): (u64, u64),
        access: u64,
        reduced: &mut Reduced,
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
        reduced: &mut Reduced,
    ) -> Result<(), Errno> {
        let area = self.obj(vma);
        let old = area.flags.get();
        let mut new = old & !ACCESS | access;
        if new == old {
            return Ok(());
        }
        // A private mapping counts from when it is first writable until it can hold nothing.
        if new & vma_flags::WRITE != 0 {
            if old & (vma_flags::ACCOUNT | vma_flags::WRITE | vma_flags::NORESERVE) == 0 {
                new |= vma_flags::ACCOUNT;
            }
        } else if area.anon_vma.get().is_null() {
            new &= !vma_flags::ACCOUNT;
        }
        self.vma_modify(mm, vma, (start, end), new)?;
        self.protect_entries(mm, (start, end), new, reduced);
        Ok(())
    }

    fn protect_entries(
        &self,
        mm: Pa<Mm>,
        (start, end): (u64, u64),
        flags: u64,
        reduced: &mut Reduced,
    ) {
        let space = self.obj(mm);
        let Ok(()) =
            self.for_each_leaf_table(space, Walker::Protect, (start, end), |table, from, to| {
                let _guard = self.lock_table(table);
                let mut rest = from;
                while let Some((gva, entry)) = self.next_present((table, 1), rest, to) {
                    let new = self.protected(entry, flags);
                    if new != entry {
                        self.set_pte(space, gva, Slot::new(table, 1, gva), entry, new);
                    }
                    if takes_away(entry, new) {
                        reduced.start = reduced.start.min(gva);
                        reduced.end = gva + PAGE_SIZE;
                        self.point(Point::PteProtect, [space.id.get(), gva]);
                    }
                    rest = gva + PAGE_SIZE;
                }
                Ok::<(), Infallible>(())
            });
    }

    /// `entry` with the permissions of a VMA with `flags`. It becomes writable only where a write needs
    /// neither a copy nor D, which a fault sets.
    fn protected(&self, entry: Pte, flags: u64) -> Pte {
        let kept = PteFlags::ACCESSED | PteFlags::DIRTY | PteFlags::COW;
        let mut leaf = leaf_flags(flags) | entry.flags().intersection(kept);
        if flags & vma_flags::WRITE != 0
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
    let granted = PteFlags::WRITE | PteFlags::USER;
    !new.flags().contains(old.flags().intersection(granted))
        || new.flags().contains(PteFlags::NO_EXECUTE) && !old.flags().contains(PteFlags::NO_EXECUTE)
}
