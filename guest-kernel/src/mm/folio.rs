//! Folios: who refers to a frame of user memory and how often it is mapped.
//!
//! `mapcount` changes together with the entry, under the page-table lock of that entry, so it equals
//! the number of present entries whenever no such lock is held. A reference is given up only after
//! the flush that makes the mapping unreachable (`gather`), so a frame that a CPU may still translate
//! to is never free.
//!
//! A folio of 2 MiB is one block of the allocator. Whatever refers to a page of it refers to its head: `refcount`,
//! `mapcount` and `pins` are the head's, and of the tails only EXCLUSIVE counts (Linux's folios without a mapcount for each
//! page, CONFIG_NO_PAGE_MAPCOUNT: what a page is asked for is only whether it is exclusive, and a count for each
//! would be 512 more to keep at every split). Functions here take the address of any page.

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, SeqCst};

use abi::channel::{EventKind, cause};
use abi::layout::{HUGE_ORDER, HUGE_PAGE_SIZE, PAGE_SIZE};
use abi::objects::{AnonVma, Folio, FrameKind, Mm, Pa, folio_flags};
use abi::point::Point;
use abi::pte::Pte;
use abi::syscall::Errno;

use super::Field;
use crate::Kernel;
use crate::arch::Arch;
use crate::testbed::told;

/// Pattern of a freed user frame (parameter `poison`): every word of the frame at `gpa` reads
/// `POISON ^ gpa`, so a reader that still reaches it can be told from one that reads zeroes.
pub const POISON: u64 = 0x5a5a_5a5a_dead_f4ee;

impl<A: Arch> Kernel<A> {
    /// A frame of zeroes for user memory of `mm`.
    pub(super) fn alloc_user_frame(&self, mm: Pa<Mm>) -> Result<u64, Errno> {
        let gpa = self.alloc_charged(mm, 0, FrameKind::Anon)?;
        self.arch.zero_frame(gpa);
        Ok(gpa)
    }

    /// Makes the frame at `gpa`, which the caller alone refers to, an exclusive folio that is about
    /// to be mapped at page offset `index` of the VMAs of `owner`. The mapping takes over the
    /// caller's reference.
    pub(super) fn folio_map_new(&self, gpa: u64, owner: Pa<AnonVma>, index: u64) {
        let folio = self.folio(gpa);
        folio.owner.set(owner.0);
        folio.index.set(index);
        folio.flags.set(folio_flags::EXCLUSIVE);
        self.set_mapcount(gpa, 1, cause::MAP);
        self.lru_add(gpa);
    }

    /// Counts one more mapping of a folio, by the page at `gpa`, which makes all of them shared (fork).
    #[inline]
    pub(super) fn folio_share(&self, gpa: u64, page: &Folio) {
        // The page's own: see the module.
        if page.flags.get() & folio_flags::EXCLUSIVE != 0 {
            page.flags.fetch_and(!folio_flags::EXCLUSIVE, Relaxed);
        }
        let (head, folio) = self.head_of(gpa, page);
        self.count_reference(head, folio, cause::SHARE);
        self.count_mappings(head, folio, 1, cause::SHARE);
    }

    /// Counts one more mapping, which holds a reference of its own, for a [`cause`].
    pub(super) fn folio_map_again(&self, gpa: u64, cause: u64) {
        self.folio_get(gpa, cause);
        self.set_mapcount(gpa, 1, cause);
    }

    /// True where `entry`, which is present, maps a page of a file.
    pub(super) fn is_file_page(&self, entry: Pte) -> bool {
        self.folio(entry.address()).kind.get() == FrameKind::File as u8
    }

    /// The head of the folio that the frame at `gpa` is a page of. Whoever refers to the folio or holds the page-table
    /// lock of an entry that maps it knows that it stays so.
    #[inline]
    pub(super) fn head(&self, gpa: u64) -> u64 {
        self.head_folio(gpa).0
    }

    /// The same with the descriptor, which most folios are looked up for once only: they are their own heads.
    #[inline]
    fn head_folio(&self, gpa: u64) -> (u64, &Folio) {
        self.head_of(gpa, self.folio(gpa))
    }

    /// The same where the descriptor of the page at `gpa` is known.
    #[inline]
    fn head_of<'k>(&'k self, gpa: u64, page: &'k Folio) -> (u64, &'k Folio) {
        if page.kind.get() != FrameKind::Tail as u8 {
            return (gpa, page);
        }
        let head = gpa & !(HUGE_PAGE_SIZE - 1);
        (head, self.folio(head))
    }

    /// True where the frame at `gpa`, to whose folio the caller refers, is the head of a folio of 2 MiB.
    pub(super) fn is_large(&self, gpa: u64) -> bool {
        self.folio(gpa).order.get() == HUGE_ORDER
    }

    /// Counts one mapping less. The mapping's reference stays with the caller.
    #[inline]
    pub(super) fn folio_unmap(&self, gpa: u64) {
        let before = self.set_mapcount(gpa, -1, cause::UNMAP);
        assert!(before > 0, "folio {gpa:#x} unmapped more often than mapped");
        let head = self.head(gpa);
        if self.is_large(head) {
            self.defer_split(head, before - 1);
        }
    }

    /// Takes a reference, for a [`cause`].
    pub(super) fn folio_get(&self, gpa: u64, cause: u64) {
        let (gpa, folio) = self.head_folio(gpa);
        self.count_reference(gpa, folio, cause);
    }

    /// Of the folio's head.
    #[inline]
    fn count_reference(&self, gpa: u64, folio: &Folio, cause: u64) {
        point!(self, Point::RefcountChange, [gpa, 1]);
        let before = folio.refcount.fetch_add(1, Relaxed);
        self.refcount_changed(gpa, before, before + 1, cause);
    }

    /// Gives a reference up that was taken for a [`cause`]; the last one frees the folio.
    pub(super) fn folio_put(&self, gpa: u64, cause: u64) {
        let (gpa, folio) = self.head_folio(gpa);
        // Read first: the last reference leaves the count to `free_frames`, so that 0 means free.
        // AcqRel: whoever frees sees what the other holders did with the frame.
        point!(self, Point::RefcountChange, [gpa, 0]);
        loop {
            let sole = folio.refcount.load(Acquire) == 1;
            if !sole {
                let before = folio.refcount.fetch_sub(1, AcqRel);
                if before > 1 {
                    return self.refcount_changed(gpa, before, before - 1, cause);
                }
                folio.refcount.set(1);
            }
            if self.try_free_folio(gpa, cause) {
                return;
            }
        }
    }

    /// Frees a folio that nobody but the caller refers to. False where another has found it by reclaim's lists or queue, for
    /// which no reference is needed. Apart, so that giving up any other reference needs no stack frame for it.
    #[inline(never)]
    fn try_free_folio(&self, gpa: u64, cause: u64) -> bool {
        let is_found = self.has_swap() || self.is_large(gpa);
        let is_free = !is_found || self.lru_forget(gpa);
        if is_free {
            self.free_user_frame(gpa, cause);
        }
        is_free
    }

    fn free_user_frame(&self, gpa: u64, cause: u64) {
        let folio = self.folio(gpa);
        assert!(folio.mapcount.get() == 0, "mapped folio {gpa:#x} freed");
        assert!(folio.pins.get() == 0, "pinned folio {gpa:#x} freed");
        point!(self, Point::FrameFree, [gpa, folio.owner.get()]);
        self.refcount_changed(gpa, 1, 0, cause);
        for page in self.pages_of(gpa) {
            if self.config.poison {
                self.arch.fill_frame(page, POISON ^ page);
            }
            self.folio(page).flags.set(0);
        }
        self.free_frames(gpa);
    }

    /// The frames of the folio whose head is at `gpa`.
    pub(super) fn pages_of(&self, gpa: u64) -> impl Iterator<Item = u64> + use<A> {
        let bytes = PAGE_SIZE << self.folio(gpa).order.get();
        (gpa..gpa + bytes).step_by(PAGE_SIZE as usize)
    }

    /// Pins a folio that is mapped, under the page-table lock of its entry for `gva`.
    pub(super) fn folio_pin(&self, gpa: u64, gva: u64) {
        self.folio_get(gpa, cause::PIN);
        self.head_folio(gpa).1.pins.fetch_add(1, SeqCst);
        self.folio_pin_told(gpa, gva);
    }

    /// Pins a folio that may be freed any time, unless it is; tells nothing yet. The caller must look whether it is
    /// still the one that it meant (Linux's `try_grab_folio_fast`).
    pub(super) fn folio_try_pin(&self, page: u64) -> bool {
        let (gpa, folio) = self.head_folio(page);
        point!(self, Point::RefcountChange, [gpa, 1]);
        let taken = folio
            .refcount
            .fetch_update(AcqRel, Acquire, |count| (count > 0).then_some(count + 1));
        if let Ok(before) = taken {
            folio.pins.fetch_add(1, SeqCst);
            self.refcount_changed(gpa, before, before + 1, cause::PIN);
            // The page may be another folio's by now, or one of its own.
            if self.head(page) != gpa {
                self.folio_unpin_untold(gpa);
                return false;
            }
        }
        taken.is_ok()
    }

    /// Gives back what [`Kernel::folio_try_pin`] took.
    pub(super) fn folio_unpin_untold(&self, gpa: u64) {
        self.head_folio(gpa).1.pins.fetch_sub(1, SeqCst);
        self.swap_put(gpa, cause::PIN);
    }

    /// A pin is there to stay.
    pub(super) fn folio_pin_told(&self, gpa: u64, gva: u64) {
        let (gpa, folio) = self.head_folio(gpa);
        let pins = told(|| u64::from(folio.pins.get()));
        event!(
            self,
            EventKind::Pin,
            [gpa, pins, pins.wrapping_sub(1), gva, 0]
        );
    }

    /// Gives a pin back. Whoever copies the folio from now on has what the device has written.
    pub(super) fn folio_unpin(&self, gpa: u64, gva: u64) {
        let (gpa, folio) = self.head_folio(gpa);
        let before = folio.pins.fetch_sub(1, SeqCst);
        assert!(before > 0, "folio {gpa:#x} unpinned more often than pinned");
        let before = u64::from(before);
        event!(self, EventKind::Pin, [gpa, before - 1, before, gva, 0]);
        self.swap_put(gpa, cause::PIN);
    }

    /// True where a device uses the folio (Linux's `folio_maybe_dma_pinned`).
    #[inline]
    pub(super) fn folio_is_pinned(&self, gpa: u64) -> bool {
        self.head_folio(gpa).1.pins.load(SeqCst) > 0
    }

    /// True where the caller's mapping, whose page-table lock it holds, is all that refers to the
    /// folio: nobody can take another reference, for that takes a mapping.
    pub(super) fn folio_is_sole(&self, gpa: u64) -> bool {
        // Acquire: pairs with the AcqRel of the `folio_put` that left one reference.
        self.head_folio(gpa).1.refcount.load(Acquire) == 1
    }

    pub(super) fn folio_is_exclusive(&self, gpa: u64) -> bool {
        self.folio(gpa).flags.get() & folio_flags::EXCLUSIVE != 0
    }

    #[inline]
    pub(super) fn set_mapcount(&self, gpa: u64, delta: i32, cause: u64) -> u32 {
        let (gpa, folio) = self.head_folio(gpa);
        self.count_mappings(gpa, folio, delta, cause)
    }

    /// Of the folio's head.
    #[inline]
    fn count_mappings(&self, gpa: u64, folio: &Folio, delta: i32, cause: u64) -> u32 {
        point!(
            self,
            Point::MapcountChange,
            [gpa, u64::from(folio.mapcount.get())],
        );
        let before = folio.mapcount.fetch_add(delta.cast_unsigned(), AcqRel);
        let after = u64::from(before.wrapping_add_signed(delta));
        event!(
            self,
            EventKind::MapcountChange,
            [gpa, after, before.into(), cause, 0],
        );
        before
    }

    #[inline]
    pub(super) fn refcount_changed(&self, gpa: u64, from: u32, to: u32, cause: u64) {
        event!(
            self,
            EventKind::RefcountChange,
            [gpa, to.into(), from.into(), cause, 0],
        );
    }
}
