//! One translation that a vCPU may hold, and how entries that change make one.

use std::ops::{Deref, DerefMut};

use abi::pte::{Pte, PteFlags, level_size};

use super::laws::{Law, Laws};
use super::tables::{Path, Place};

/// What a translation permits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rights(u8);

impl Rights {
    /// Stores.
    pub(super) const WRITE: Self = Self(1);
    /// CPL 3.
    pub(super) const USER: Self = Self(2);
    /// Instruction fetches.
    pub(super) const FETCH: Self = Self(4);
    /// Stores that do not set D in the tables any more (SDM vol. 3A, 5.8).
    pub(super) const DIRTY: Self = Self(8);
    pub(super) const ALL: Self = Self(15);

    /// Of an entry as it is now: where it permits stores a processor may set D and cache it so at any time.
    pub(super) fn of(pte: Pte, level: u8) -> Self {
        let flags = pte.flags();
        let mut rights = Self(0);
        for (flag, right) in [
            (PteFlags::WRITE, Self::WRITE.0 | Self::DIRTY.0),
            (PteFlags::USER, Self::USER.0),
        ] {
            if flags.contains(flag) {
                rights.0 |= right;
            }
        }
        if !flags.contains(PteFlags::NO_EXECUTE) {
            rights.0 |= Self::FETCH.0;
        }
        if !pte.is_leaf(level) {
            rights.0 |= Self::DIRTY.0;
        }
        rights
    }
    /// Of an entry that is gone: it was never cached with D where D was not set in the end.
    pub(super) fn of_gone(pte: Pte, level: u8) -> Self {
        let rights = Self::of(pte, level);
        if pte.is_leaf(level) && !pte.flags().contains(PteFlags::DIRTY) {
            rights.without(Self::DIRTY)
        } else {
            rights
        }
    }
    /// What both permit (5.6.1: the most restrictive of all entries of a walk).
    #[must_use]
    pub(super) fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
    #[must_use]
    pub(super) fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
    #[must_use]
    pub(super) fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
    pub(super) fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
    /// Of a whole walk: D tells nothing where stores are refused.
    #[must_use]
    pub(super) fn of_walk(self) -> Self {
        if self.contains(Self::WRITE) {
            self
        } else {
            self.without(Self::DIRTY)
        }
    }
    /// What matters to a program: everything but D.
    pub(super) const PROGRAM: Self = Self(7);
}

/// Who changed an entry, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Change {
    /// vCPU that changed it.
    pub(super) vcpu: usize,
    /// Task that ran there.
    pub(super) task: u32,
    /// Number of the event in the stream.
    pub(super) at: u64,
    /// False where the task did not hold the mmap_lock of the mm: reclaim or migration, which comes by the folio, and takes
    /// nothing from the mapping. What goes with its table is gone.
    pub(super) guarded: bool,
}

/// A translation, or a pointer to a table, that a vCPU may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) mm: u64,
    pub(super) gva: u64,
    pub(super) level: u8,
    /// Where the entry lies, and what it was.
    pub(super) slot: u64,
    pub(super) entry: Pte,
    /// Of the whole walk at that time.
    pub(super) rights: Rights,
    /// Since which event the entry was what it was.
    pub(super) version: u64,
    /// Since which event it could be cached.
    pub(super) since: u64,
    /// Who took it out of the tables; none: its entry still says it.
    pub(super) taken: Option<Change>,
    /// Who unlinked the table in which its entry lies, where that was before it could be cached.
    pub(super) cut: Option<Change>,
    /// What took it away is over, without a flush here: this vCPU had to flush before it uses it.
    pub(super) missed: bool,
}

impl Held {
    pub(super) fn is_leaf(&self) -> bool {
        self.entry.is_leaf(self.level)
    }
    /// What took it out of the tables.
    pub(super) fn change(&self) -> Option<Change> {
        self.taken.or(self.cut)
    }
    pub(super) fn is_global(&self) -> bool {
        self.is_leaf() && self.entry.flags().contains(PteFlags::GLOBAL)
    }
    pub(super) fn bytes(&self) -> u64 {
        level_size(self.level)
    }
    pub(super) fn covers_frame(&self, gpa: u64, bytes: u64) -> bool {
        let first = self.entry.leaf_address(self.level);
        first < gpa.saturating_add(bytes) && gpa < first + self.bytes()
    }
    pub(super) fn overlaps(&self, start: u64, end: u64) -> bool {
        self.gva < end && start < self.gva.saturating_add(self.bytes())
    }
    /// True where whoever may hold `self` may do nothing more with `other`.
    pub(super) fn includes(&self, other: &Self) -> bool {
        (self.slot, self.gva, self.version, self.taken)
            == (other.slot, other.gva, other.version, other.taken)
            && self.rights.contains(other.rights)
    }
}

/// A change of an entry, as it happens.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) place: Place,
    /// Root and way to the entry.
    pub(super) root: u64,
    pub(super) path: Path,
    pub(super) old: Pte,
    /// Since which event it was what it was.
    pub(super) since: u64,
    pub(super) new: Pte,
    pub(super) change: Change,
}

impl Written {
    fn is_leaf(&self) -> bool {
        self.old.is_leaf(self.place.1)
    }
    /// Entries without A were never cached (5.10.2.3). Not used for pointers: kernels set A in advance there.
    pub(super) fn was_never_cached(&self, laws: Laws) -> bool {
        laws.obey(Law::OnlyAccessedIsCached)
            && self.is_leaf()
            && !self.old.flags().contains(PteFlags::ACCESSED)
    }
    /// Nothing is gone: the new entry gives all that the old one gave, to whoever may fill.
    pub(super) fn gives_as_much(&self) -> bool {
        let (old, new, level) = (self.old, self.new, self.place.1);
        let kept = PteFlags::ACCESSED | PteFlags::GLOBAL;
        new.is_present()
            && old.is_leaf(level) == new.is_leaf(level)
            && old.address() == new.address()
            && Rights::of_gone(new, level).contains(Rights::of_gone(old, level))
            && (!self.is_leaf() || (old.flags() & kept) == (new.flags() & kept))
    }
}

/// What a walk caches that goes on behind `via`.
pub(super) fn through(via: &Held, slot: u64, pte: Pte, version: u64, laws: Laws) -> Held {
    let level = via.level - 1;
    let of_entry = Rights::of(pte, level);
    Held {
        gva: via.gva + (slot & 0xfff) / 8 * level_size(level),
        level,
        slot,
        entry: pte,
        rights: combine(via.rights, of_entry, pte.is_leaf(level), laws),
        version,
        since: via.since.max(version),
        taken: None,
        cut: via.change(),
        missed: false,
        mm: via.mm,
    }
}

pub(super) fn combine(path: Rights, entry: Rights, is_leaf: bool, laws: Laws) -> Rights {
    let rights = if laws.obey(Law::RightsOfTheWholeWalk) {
        path.and(entry)
    } else {
        entry
    };
    if is_leaf { rights.of_walk() } else { rights }
}

/// Words of [`Notes::slots`]: a schedule of a short program writes some hundred translations down.
const WORDS: usize = 32;

/// What is written down of one kind. Most entries that change have nothing written down: a hash of the slots says
/// so without a look at all of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Notes {
    held: Vec<Held>,
    slots: [u64; WORDS],
}

impl Notes {
    pub(super) fn push(&mut self, held: Held) {
        let (word, bit) = Self::hash(held.slot);
        self.slots[word] |= bit;
        self.held.push(held);
    }

    pub(super) fn clear(&mut self) {
        self.held.clear();
        self.slots = [0; WORDS];
    }

    /// True where something that is written down includes `held`.
    pub(super) fn include(&self, held: &Held) -> bool {
        self.may_have(held.slot) && self.held.iter().any(|other| other.includes(held))
    }

    /// What is written down of an entry that changes was taken away now, if it was ever cached.
    pub(super) fn resolve(&mut self, it: &Written, laws: Laws) {
        if !self.may_have(it.path.slot) {
            return;
        }
        self.held.retain_mut(|held| {
            if held.slot != it.path.slot || held.taken.is_some() {
                return true;
            }
            if it.was_never_cached(laws) {
                return false;
            }
            held.taken = Some(it.change);
            held.entry = it.old;
            if laws.obey(Law::OnlyDirtyIsCachedDirty) {
                let of_entry = Rights::of_gone(it.old, held.level);
                held.rights = held.rights.and(of_entry);
            }
            true
        });
    }

    /// A page of any size goes with any address in it (5.10.4.1).
    pub(super) fn drop_range(&mut self, start: u64, end: u64, laws: Laws) {
        if self.held.is_empty() {
            return;
        }
        self.held.retain(|held| {
            if laws.obey(Law::AnyAddressDropsAPage) {
                !held.overlaps(start, end)
            } else {
                !(start..end).contains(&held.gva)
            }
        });
        if self.held.is_empty() {
            self.clear();
        }
    }

    fn may_have(&self, slot: u64) -> bool {
        let (word, bit) = Self::hash(slot);
        self.slots[word] & bit != 0
    }

    fn hash(slot: u64) -> (usize, u64) {
        // Fibonacci hashing: tables of forked processes have the same entries.
        let hash = (slot / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let bit = hash >> (u64::BITS - (WORDS * 64).trailing_zeros());
        ((bit / 64) as usize, 1 << (bit % 64))
    }
}

impl Deref for Notes {
    type Target = [Held];
    fn deref(&self) -> &[Held] {
        &self.held
    }
}

/// Nobody changes the slot of what is written down.
impl DerefMut for Notes {
    fn deref_mut(&mut self) -> &mut [Held] {
        &mut self.held
    }
}
