//! Anonymous folios: who refers to a frame of user memory and how often it is mapped.
//!
//! `mapcount` changes together with the entry, under the page-table lock of that entry, so it equals
//! the number of present entries whenever no such lock is held. A reference is given up only after
//! the flush that makes the mapping unreachable (`gather`), so a frame that a CPU may still translate
//! to is never free.

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};

use abi::channel::{EventKind, cause};
use abi::objects::{AnonVma, FrameKind, Pa, folio_flags};
use abi::point::Point;
use abi::syscall::Errno;

use super::Field;
use crate::Kernel;
use crate::arch::Arch;

/// Pattern of a freed user frame (parameter `poison`): every word of the frame at `gpa` reads
/// `POISON ^ gpa`, so a reader that still reaches it can be told from one that reads zeroes.
pub const POISON: u64 = 0x5a5a_5a5a_dead_f4ee;

impl<A: Arch> Kernel<A> {
    /// A frame of zeroes for user memory.
    pub(super) fn alloc_user_frame(&self) -> Result<u64, Errno> {
        let gpa = self.alloc_frames(0, FrameKind::Anon)?;
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
    }

    /// Counts one more mapping of a folio, which makes all of them shared (fork).
    pub(super) fn folio_share(&self, gpa: u64) {
        let folio = self.folio(gpa);
        folio.flags.fetch_and(!folio_flags::EXCLUSIVE, Relaxed);
        self.folio_get(gpa, cause::SHARE);
        self.set_mapcount(gpa, 1, cause::SHARE);
    }

    /// Counts one mapping less. The mapping's reference stays with the caller.
    pub(super) fn folio_unmap(&self, gpa: u64) {
        let before = self.set_mapcount(gpa, -1, cause::UNMAP);
        assert!(before > 0, "folio {gpa:#x} unmapped more often than mapped");
    }

    /// Takes a reference, for a [`cause`].
    pub(super) fn folio_get(&self, gpa: u64, cause: u64) {
        self.point(Point::RefcountChange, [gpa, 1]);
        let before = self.folio(gpa).refcount.fetch_add(1, Relaxed);
        self.refcount_changed(gpa, before, before + 1, cause);
    }

    /// Gives a reference up that was taken for a [`cause`]; the last one frees the folio.
    pub(super) fn folio_put(&self, gpa: u64, cause: u64) {
        // Read first: the last reference leaves the count to `free_frames`, so that 0 means free.
        // AcqRel: whoever frees sees what the other holders did with the frame.
        self.point(Point::RefcountChange, [gpa, 0]);
        let folio = self.folio(gpa);
        let sole = folio.refcount.load(Acquire) == 1;
        if !sole {
            let before = folio.refcount.fetch_sub(1, AcqRel);
            if before > 1 {
                return self.refcount_changed(gpa, before, before - 1, cause);
            }
            folio.refcount.set(1);
        }
        self.free_user_frame(gpa, cause);
    }

    fn free_user_frame(&self, gpa: u64, cause: u64) {
        let folio = self.folio(gpa);
        assert!(folio.mapcount.get() == 0, "mapped folio {gpa:#x} freed");
        self.point(Point::FrameFree, [gpa, folio.owner.get()]);
        self.refcount_changed(gpa, 1, 0, cause);
        if self.config.poison {
            self.arch.fill_frame(gpa, POISON ^ gpa);
        }
        self.free_frames(gpa);
    }

    /// True where the caller's mapping, whose page-table lock it holds, is all that refers to the
    /// folio: nobody can take another reference, for that takes a mapping.
    pub(super) fn folio_is_sole(&self, gpa: u64) -> bool {
        // Acquire: pairs with the AcqRel of the `folio_put` that left one reference.
        self.folio(gpa).refcount.load(Acquire) == 1
    }

    pub(super) fn folio_is_exclusive(&self, gpa: u64) -> bool {
        self.folio(gpa).flags.get() & folio_flags::EXCLUSIVE != 0
    }

    fn set_mapcount(&self, gpa: u64, delta: i32, cause: u64) -> u32 {
        let folio = self.folio(gpa);
        self.point(
            Point::MapcountChange,
            [gpa, u64::from(folio.mapcount.get())],
        );
        let before = folio.mapcount.fetch_add(delta.cast_unsigned(), AcqRel);
        let after = u64::from(before.wrapping_add_signed(delta));
        self.event(
            EventKind::MapcountChange,
            [gpa, after, before.into(), cause, 0],
        );
        before
    }

    fn refcount_changed(&self, gpa: u64, from: u32, to: u32, cause: u64) {
        self.event(
            EventKind::RefcountChange,
            [gpa, to.into(), from.into(), cause, 0],
        );
    }
}
