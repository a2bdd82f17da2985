//! madvise (Linux 6.18's mm/madvise.c).
//!
//! Pages age only with swap (`age`), anonymous ones and those of files on the disk: without it what MADV_COLD and MADV_PAGEOUT
//! age stays where it is, and what MADV_FREE gives up keeps its contents, which Linux permits (madvise(2)). MADV_COLLAPSE is
//! in `collapse`.

use abi::channel::Walker;
use abi::layout::PAGE_SIZE;
use abi::lock::LockClass;
use abi::objects::{Mm, Pa, Vma, folio_flags, folio_state, vma_flags};
use abi::point::Point;
use abi::pte::{PteFlags, fault};
use abi::syscall::{Errno, advice};
use core::convert::Infallible;
use core::sync::atomic::Ordering::Relaxed;

use super::age::Age;
use super::changed::Changed;
use super::gather::{Gather, Unmap};
use super::zero::is_uncounted;
use super::{Field, Slot, is_page_aligned, page_align};
use crate::Kernel;
use crate::arch::Arch;

/// What is done to each VMA of the range.
#[derive(Clone, Copy)]
enum Advice {
    /// Changes its flags.
    Flags { set: u64, clear: u64 },
    /// Drops its pages, of locked memory only where asked to.
    DontNeed { locked: bool },
    /// Lets its pages be dropped.
    Free,
    /// Ages its pages.
    Age(Age),
    /// Makes the accesses of a page-fault code.
    Populate(u64),
    /// Reads what is on the disk.
    WillNeed,
    /// Punches a hole into the file.
    Remove,
    /// Gathers its pages in folios of 2 MiB.
    Collapse,
}

const READ_AHEAD: u64 = vma_flags::SEQ_READ | vma_flags::RAND_READ;

impl Advice {
    fn decode(advice: u64) -> Result<Self, Errno> {
        let flags = |set: u64, clear: u64| Self::Flags { set, clear };
        Ok(match advice {
            advice::NORMAL => flags(0, READ_AHEAD),
            advice::RANDOM => flags(vma_flags::RAND_READ, READ_AHEAD),
            advice::SEQUENTIAL => flags(vma_flags::SEQ_READ, READ_AHEAD),
            advice::DONTFORK => flags(vma_flags::DONTCOPY, 0),
            advice::DOFORK => flags(0, vma_flags::DONTCOPY),
            advice::WIPEONFORK => flags(vma_flags::WIPEONFORK, 0),
            advice::KEEPONFORK => flags(0, vma_flags::WIPEONFORK),
            advice::DONTDUMP => flags(vma_flags::DONTDUMP, 0),
            advice::DODUMP => flags(0, vma_flags::DONTDUMP),
            advice::MERGEABLE => flags(vma_flags::MERGEABLE, 0),
            advice::UNMERGEABLE => flags(0, vma_flags::MERGEABLE),
            advice::HUGEPAGE => flags(vma_flags::HUGEPAGE, vma_flags::NOHUGEPAGE),
            advice::NOHUGEPAGE => flags(vma_flags::NOHUGEPAGE, vma_flags::HUGEPAGE),
            advice::WILLNEED => Self::WillNeed,
            advice::DONTNEED => Self::DontNeed { locked: false },
            advice::DONTNEED_LOCKED => Self::DontNeed { locked: true },
            advice::FREE => Self::Free,
            advice::COLD => Self::Age(Age::Cold),
            advice::PAGEOUT => Self::Age(Age::PageOut),
            advice::POPULATE_READ => Self::Populate(fault::USER),
            advice::POPULATE_WRITE => Self::Populate(fault::USER | fault::WRITE),
            advice::REMOVE => Self::Remove,
            advice::COLLAPSE => Self::Collapse,
            _ => return Err(Errno::EINVAL),
        })
    }
}

impl<A: Arch> Kernel<A> {
    /// madvise.
    ///
    /// # Errors
    /// EINVAL for unknown advice, a bad range, and advice that a VMA does not take; ENOMEM for a hole in the range,
    /// after the advice was applied to all that is mapped (MADV_POPULATE_*: to what lies before it); EAGAIN where memory
    /// runs out for VMAs, ENOMEM where it runs out for pages.
    pub fn madvise(&self, mm: Pa<Mm>, start: u64, len: u64, advice: u64) -> Result<(), Errno> {
        let advice = Advice::decode(advice)?;
        let bytes = page_align(len);
        if !is_page_aligned(start) || bytes == 0 && len != 0 || start.checked_add(bytes).is_none() {
            return Err(Errno::EINVAL);
        }
        if bytes == 0 {
            return Ok(());
        }
        if let Advice::Remove = advice {
            return self.advise_remove(mm, start, start + bytes);
        }
        let space = self.obj(mm);
        let (_writer, _reader) = match advice {
            Advice::Flags { .. } | Advice::Collapse => (Some(self.mmap_write_lock(space)), None),
            _ => (
                None,
                Some(self.read_lock(&space.mmap_lock, LockClass::MmapRead)),
            ),
        };
        match advice {
            Advice::Populate(error) => self.populate_access(mm, (start, start + bytes), error),
            _ => self.advise_range(mm, start, start + bytes, advice),
        }
    }

    /// Linux's `madvise_walk_vmas`.
    fn advise_range(&self, mm: Pa<Mm>, start: u64, end: u64, advice: Advice) -> Result<(), Errno> {
        let mut at = start;
        let mut result = Ok(());
        while at < end {
            let Some(vma) = self.vma_in(self.obj(mm), at, end) else {
                return Err(Errno::ENOMEM);
            };
            let area = self.obj(vma);
            if area.start.get() > at {
                result = Err(Errno::ENOMEM);
                at = area.start.get();
            }
            let to = area.end.get().min(end);
            self.advise_vma(mm, vma, (at, to), advice)?;
            at = to;
        }
        result
    }

    /// Linux's `madvise_vma_behavior`.
    fn advise_vma(
        &self,
        mm: Pa<Mm>,
        vma: Pa<Vma>,
        (at, to): (u64, u64),
        advice: Advice,
    ) -> Result<(), Errno> {
        let area = self.obj(vma);
        let (flags, is_anonymous) = (area.flags.get(), area.file.get().is_null());
        let is_locked = flags & vma_flags::LOCKED != 0;
        match advice {
            Advice::Flags { set, .. } if set & vma_flags::WIPEONFORK != 0 && !is_anonymous => {
                return Err(Errno::EINVAL);
            }
            // Nothing of it can be merged (Linux's vma_ksm_compatible).
            Advice::Flags { set, .. }
                if set & vma_flags::MERGEABLE != 0 && flags & vma_flags::SHARED != 0 => {}
            Advice::Flags { set, clear } => {
                let new = flags & !clear | set;
                if new != flags {
                    let has_pages = !area.anon_vma.get().is_null();
                    self.vma_modify(mm, vma, (at, to), new)
                        .map_err(|_| Errno::EAGAIN)?;
                    if has_pages && new & !flags & vma_flags::HUGEPAGE != 0 {
                        self.want_collapse();
                    }
                }
            }
            Advice::DontNeed { locked: false } | Advice::Free | Advice::Age(_) if is_locked => {
                return Err(Errno::EINVAL);
            }
            Advice::Free if !is_anonymous => return Err(Errno::EINVAL),
            Advice::DontNeed { .. } => {
                let mut gather = self.gather(mm, Unmap::Syscall);
                self.zap_range(&mut gather, at, to);
                self.gather_finish(gather);
            }
            Advice::Free => {
                let mut gather = self.gather(mm, Unmap::Syscall);
                self.free_lazily(&mut gather, at, to);
                self.gather_finish(gather);
            }
            Advice::Collapse => return self.collapse_advice(mm, vma, (at, to)),
            Advice::Age(age) => self.age(mm, vma, (at, to), age),
            Advice::WillNeed => self.read_ahead(mm, (at, to)),
            Advice::Populate(_) | Advice::Remove => {}
        }
        Ok(())
    }

    /// False for a folio whose contents others share that have not given it up, as far as entries do not tell; else makes its
    /// entries all that does: it leaves the swap cache, where yet older contents may be. Under the page-table lock.
    fn may_be_dropped(&self, gpa: u64) -> bool {
        let folio = self.folio(gpa);
        let dirty = folio.state.get() & folio_state::DIRTY != 0;
        if self.slot_of(gpa).is_none() && !dirty {
            return true;
        }
        let alone = folio.mapcount.get() == 1 && self.swap_free_folio(gpa);
        if alone {
            folio.state.fetch_and(!folio_state::DIRTY, Relaxed);
        }
        alone
    }

    /// Makes the entries of `start..end` clean, and marks their folios: what is written from the flush on makes them
    /// dirty again, and keeps them (Linux's `madvise_free_pte_range`). An entry that is not dirty is not writable here, so
    /// the next write faults.
    fn free_lazily(&self, gather: &mut Gather, start: u64, end: u64) {
        let mm = self.obj(gather.mm);
        // Linux keeps one that is given up whole and has one user (madvise_free_huge_pmd).
        self.split_huge_range(gather.mm, start, end);
        let Ok(()) =
            self.for_each_leaf_table(mm, Walker::Protect, (start, end), |table, from, to| {
                let _guard = self.lock_table(table);
                self.flush_batched_pending(gather.mm);
                let mut rest = from;
                while let Some((gva, entry)) = self.next_entry((table, 1), rest, to) {
                    rest = gva + PAGE_SIZE;
                    if !entry.is_present() {
                        self.free_non_present(mm, gva, Slot::new(table, 1, gva), entry);
                        continue;
                    }
                    if is_uncounted(entry) || self.is_file_page(entry) {
                        continue;
                    }
                    if !self.may_be_dropped(entry.address()) {
                        continue;
                    }
                    let folio = self.folio(entry.address());
                    folio.flags.fetch_or(folio_flags::LAZYFREE, Relaxed);
                    let clean = entry.without(PteFlags::WRITE | PteFlags::DIRTY);
                    if clean != entry {
                        self.set_pte(mm, gva, Slot::new(table, 1, gva), entry, clean);
                        gather.cover(Changed::pages(gva, rest));
                        point!(self, Point::PteProtect, [mm.id.get(), gva]);
                    }
                }
                Ok::<(), Infallible>(())
            });
    }
}
