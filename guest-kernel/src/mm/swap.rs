//! The swap area and the swap cache (Linux's mm/swapfile.c and mm/swap_state.c).
//!
//! A slot is a page of the disk. It counts the entries of page tables that name it ([`SwapSlot::count`]), and knows the
//! folio that stands for it while one does ([`SwapSlot::folio`]: the swap cache, which holds a reference). It is free when
//! both are zero. One lock protects slots, cache and requests; it comes last, like that of the page cache, so entries
//! change together with their slot's count under their page-table lock.
//!
//! Who may take a folio out of the cache: whoever finds no entry left that names its slot ([`Kernel::swap_free_folio`],
//! Linux's `folio_free_swap`), and reclaim where nobody but itself refers to it ([`Kernel::swap_detach`], Linux's
//! `__remove_mapping`). A fault that found it there has a reference, and an entry; so the folio that it maps is still the
//! slot's. That takes the place of the folio lock, which in Linux keeps these apart.

use core::sync::atomic::Ordering::{Acquire, Relaxed};

use abi::channel::{EventKind, cause};
use abi::disk::SECTOR_BYTES;
use abi::layout::PAGE_SIZE;
use abi::lock::LockClass;
use abi::objects::{FrameKind, ORDERS, Pa, SwapSlot, folio_state};
use abi::syscall::Errno;

use super::Field;
use crate::Kernel;
use crate::arch::Arch;
use crate::sync::Guard;

/// Sectors of a slot.
pub(super) const SLOT_SECTORS: u64 = PAGE_SIZE / SECTOR_BYTES;
/// The folio is being moved from or to its slot.
pub(super) const IN_TRANSFER: u8 = folio_state::WRITEBACK | folio_state::READING;

/// What a slot holds, for a fault.
pub(super) enum SlotContents {
    /// This folio, to which the caller has a reference now.
    Folio(u64),
    /// What is on the disk.
    Disk,
    /// Nothing: no entry names it (any more).
    Free,
}

impl<A: Arch> Kernel<A> {
    /// Takes the array of slots, where the command line asks for swap. Once, at boot.
    pub(super) fn swap_init(&self) -> Result<(), Errno> {
        let slots = self.config.swap_slots;
        if slots == 0 {
            return Ok(());
        }
        let frames = slots
            .checked_mul(size_of::<SwapSlot>() as u64)
            .ok_or(Errno::ENOMEM)?
            .div_ceil(PAGE_SIZE)
            .next_power_of_two();
        let order = frames.ilog2() as u8;
        if usize::from(order) >= ORDERS {
            return Err(Errno::ENOMEM);
        }
        let array = self.alloc_frames(order, FrameKind::Kernel)?;
        for frame in 0..frames {
            self.arch.zero_frame(array + frame * PAGE_SIZE);
        }
        let area = &self.root().swap;
        area.slots.set(Pa::new(array));
        area.sector.set(self.config.swap_sector);
        area.nr_slots.set(slots);
        Ok(())
    }

    /// True where anonymous memory is reclaimed at all.
    #[inline]
    pub(super) fn has_swap(&self) -> bool {
        self.config.swap_slots != 0
    }

    /// True where nothing new can be written out. Of this moment only.
    pub(super) fn swap_is_full(&self) -> bool {
        let area = &self.root().swap;
        area.used.get() == area.nr_slots.get()
    }

    pub(super) fn lock_swap(&self) -> Guard<'_, A> {
        self.lock(&self.root().swap.lock, LockClass::Swap)
    }

    /// What is known of slot `slot`.
    ///
    /// # Panics
    /// Where there is none of that number.
    pub(super) fn swap_slot(&self, slot: u64) -> &SwapSlot {
        let area = &self.root().swap;
        assert!(slot < area.nr_slots.get(), "no swap slot {slot}");
        let each = size_of::<SwapSlot>() as u64;
        self.obj(Pa::new(area.slots.get().0 + slot * each))
    }

    /// The slot of a folio that is in the swap cache.
    #[inline]
    pub(super) fn slot_of(&self, gpa: u64) -> Option<u64> {
        let folio = self.folio(gpa);
        let used = u64::from(folio.used.load(Acquire));
        used.checked_sub(1).filter(|_| folio.order.get() == 0)
    }

    /// One more entry names `slot` (Linux's `swap_duplicate`), which an entry does already or the cache keeps. Under the
    /// page-table lock of both.
    pub(super) fn swap_slot_dup(&self, slot: u64) {
        let _guard = self.lock_swap();
        self.count_slot(slot, 1);
    }

    /// One entry less names `slot` (Linux's `swap_free` and `free_swap_and_cache`): with the last one go the slot and the folio
    /// in the cache, if nobody uses it; else whoever does lets it go.
    pub(super) fn swap_slot_put(&self, slot: u64) {
        let unused = {
            let _guard = self.lock_swap();
            self.count_slot(slot, -1);
            let object = self.swap_slot(slot);
            let gpa = object.folio.get();
            if object.count.get() != 0 {
                None
            } else if gpa == 0 {
                self.slot_is_free(slot);
                None
            } else {
                // Under the lock nobody finds it: a count of one is the cache's.
                let folio = self.folio(gpa);
                let alone = folio.refcount.load(Acquire) == 1
                    && folio.state.load(Acquire) & IN_TRANSFER == 0;
                alone.then(|| self.cache_unlink(slot, gpa))
            }
        };
        if let Some(gpa) = unused {
            self.folio_put(gpa, cause::CACHE);
        }
    }

    /// Gives the folio at `gpa` a slot, and puts it into the cache (Linux's `folio_alloc_swap`). It is dirty then: the slot
    /// holds nothing yet. False where the area is full.
    pub(super) fn swap_add(&self, gpa: u64) -> bool {
        let state = &self.folio(gpa).state;
        let _guard = self.lock_swap();
        let Some(slot) = self.find_free_slot() else {
            return false;
        };
        state.fetch_or(folio_state::DIRTY | folio_state::UPTODATE, Relaxed);
        self.cache_link(slot, gpa);
        self.slot_charge(slot, gpa);
        true
    }

    /// Puts the folio at `gpa`, which the caller alone refers to, into the cache for `slot`, to be read. False where
    /// another is there, or nobody needs it any more. Under the lock.
    pub(super) fn swap_add_unread(&self, slot: u64, gpa: u64) -> bool {
        let object = self.swap_slot(slot);
        if object.count.get() == 0 || object.folio.get() != 0 {
            return false;
        }
        self.folio(gpa).state.set(folio_state::READING);
        self.cache_link(slot, gpa);
        true
    }

    /// True where what is in `slot` is in memory too (Linux's mincore_swap). Without a lock.
    pub(super) fn swap_is_cached(&self, slot: u64) -> bool {
        let gpa = self.swap_slot(slot).folio.get();
        gpa != 0 && self.folio(gpa).state.load(Acquire) & folio_state::UPTODATE != 0
    }

    /// What `slot` holds (Linux's `swap_cache_get_folio`).
    pub(super) fn swap_find(&self, slot: u64) -> SlotContents {
        if slot >= self.root().swap.nr_slots.get() {
            return SlotContents::Free;
        }
        let _guard = self.lock_swap();
        let object = self.swap_slot(slot);
        match object.folio.get() {
            0 if object.count.get() == 0 => SlotContents::Free,
            0 => SlotContents::Disk,
            gpa => {
                self.folio_get(gpa, cause::HOLD);
                SlotContents::Folio(gpa)
            }
        }
    }

    /// Takes the folio out of the cache if no entry names its slot, which is free then (Linux's `folio_free_swap`). The
    /// caller has a reference. True where it is in the cache no more.
    pub(super) fn swap_free_folio(&self, gpa: u64) -> bool {
        self.cache_take_out(gpa, |slot, _| slot.count.get() == 0)
    }

    /// Takes a clean folio that nobody maps, and nobody but the caller holds, out of the cache; what it held is in its
    /// slot, or nobody needs it (Linux's `__remove_mapping`). True where it is in the cache no more.
    pub(super) fn swap_detach(&self, gpa: u64) -> bool {
        let folio = self.folio(gpa);
        self.cache_take_out(gpa, |slot, state| {
            let unused = folio.mapcount.load(Acquire) == 0 && folio.refcount.load(Acquire) == 2;
            slot.count.get() == 0 || unused && state & folio_state::DIRTY == 0
        })
    }

    fn cache_take_out(&self, gpa: u64, may: impl FnOnce(&SwapSlot, u8) -> bool) -> bool {
        {
            let _guard = self.lock_swap();
            let Some(slot) = self.slot_of(gpa) else {
                return true;
            };
            let (object, state) = (self.swap_slot(slot), self.folio(gpa).state.load(Acquire));
            if state & IN_TRANSFER != 0 || !may(object, state) {
                return false;
            }
            self.cache_unlink(slot, gpa);
        }
        self.folio_put(gpa, cause::CACHE);
        true
    }

    /// Gives up a reference to a folio that may be in the swap cache, and with it the folio where nobody needs it any more
    /// (Linux's `free_swap_cache` and `folio_put`).
    #[inline]
    pub(super) fn swap_put(&self, gpa: u64, cause: u64) {
        if self.has_swap() {
            self.swap_free_unmapped(gpa);
        }
        self.folio_put(gpa, cause);
    }

    #[inline(never)]
    fn swap_free_unmapped(&self, gpa: u64) {
        if self.slot_of(gpa).is_some() && self.folio(gpa).mapcount.load(Acquire) == 0 {
            self.swap_free_folio(gpa);
        }
    }

    /// The first free slot from where the last search ended. Under the lock.
    fn find_free_slot(&self) -> Option<u64> {
        let area = &self.root().swap;
        let (slots, from) = (area.nr_slots.get(), area.next.get());
        if self.swap_is_full() {
            return None;
        }
        (from..slots).chain(0..from).find(|&slot| {
            let object = self.swap_slot(slot);
            object.count.get() == 0 && object.folio.get() == 0
        })
    }

    /// Under the lock.
    fn cache_link(&self, slot: u64, gpa: u64) {
        let (area, object) = (&self.root().swap, self.swap_slot(slot));
        if object.count.get() == 0 {
            area.used.set(area.used.get() + 1);
            area.next.set((slot + 1) % area.nr_slots.get());
        }
        object.folio.set(gpa);
        self.folio(gpa).used.set(slot as u32 + 1);
        self.folio_get(gpa, cause::CACHE);
        event!(self, EventKind::SwapCache, [slot, gpa, 1, 0, 0]);
    }

    /// Under the lock. The cache's reference is the caller's.
    fn cache_unlink(&self, slot: u64, gpa: u64) -> u64 {
        let object = self.swap_slot(slot);
        let folio = self.folio(gpa);
        object.folio.set(0);
        folio.used.set(0);
        // What it holds is nowhere else, or will not be for long: its entries need not say so (Linux's folio_free_swap).
        folio.state.fetch_or(folio_state::DIRTY, Relaxed);
        folio.state.fetch_and(!folio_state::UPTODATE, Relaxed);
        event!(self, EventKind::SwapCache, [slot, gpa, 0, 0, 0]);
        if object.count.get() == 0 {
            self.slot_is_free(slot);
        }
        gpa
    }

    /// Under the lock.
    fn slot_is_free(&self, slot: u64) {
        self.slot_uncharge(slot);
        let used = &self.root().swap.used;
        used.set(used.get() - 1);
    }

    fn count_slot(&self, slot: u64, by: i32) {
        let count = &self.swap_slot(slot).count;
        let before = count.get();
        let after = before.checked_add_signed(by);
        let after = after.unwrap_or_else(|| panic!("swap slot {slot} freed once too often"));
        count.set(after);
        event!(
            self,
            EventKind::SwapSlot,
            [slot, after.into(), before.into(), 0, 0]
        );
    }
}
