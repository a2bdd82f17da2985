//! What each vCPU may hold: the page tables as events tell them, and what has left them since each vCPU's
//! last flush.
//!
//! The rules are those of SDM vol. 3A, 5.10 (cited by subsection): a translation may be cached at any
//! time from any present entry of a loaded paging structure, by speculation too; it may go at any time; it
//! is gone for certain only after an invalidation that covers it. So what a vCPU may hold is what the tables
//! say now, and every [`Stale`] entry that they said since its last such invalidation.

use abi::layout::{HUGE_PAGE_SIZE, PAGE_SIZE};
use abi::pte::{Pte, PteFlags, level_size};
use rustc_hash::FxHashMap;

/// Who changed an entry, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Change {
    /// vCPU that changed it.
    pub(super) vcpu: usize,
    /// Task that ran there.
    pub(super) task: u32,
    /// Number of the event in the stream.
    pub(super) at: u64,
}

/// A leaf translation that a vCPU may hold though the tables no longer say so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stale {
    pub(super) mm: u64,
    pub(super) gva: u64,
    pub(super) level: u8,
    /// The entry as it was.
    pub(super) entry: Pte,
    pub(super) change: Change,
}

impl Stale {
    pub(super) fn bytes(&self) -> u64 {
        level_size(self.level)
    }
    pub(super) fn first_frame(&self) -> u64 {
        self.entry.leaf_address(self.level)
    }
    pub(super) fn covers_frame(&self, gpa: u64, bytes: u64) -> bool {
        let first = self.first_frame();
        first < gpa + bytes && gpa < first + self.bytes()
    }
    pub(super) fn overlaps(&self, start: u64, end: u64) -> bool {
        self.gva < end && start < self.gva + self.bytes()
    }
}

/// A pointer to a paging structure that a vCPU may hold in its paging-structure caches (5.10.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StaleTable {
    pub(super) mm: u64,
    pub(super) gva: u64,
    /// Level of the entry that pointed to it.
    pub(super) level: u8,
    pub(super) table: u64,
    pub(super) change: Change,
}

/// One vCPU.
#[derive(Clone, Debug, Default)]
pub(super) struct Vcpu {
    /// mm whose tables are loaded, 0 for the kernel's own.
    pub(super) mm: u64,
    pub(super) root: u64,
    pub(super) lazy: bool,
    pub(super) stale: Vec<Stale>,
    pub(super) tables: Vec<StaleTable>,
}

/// Key of an entry: mm, level, first address.
pub(super) type Place = (u64, u8, u64);

/// Everything.
#[derive(Clone, Debug, Default)]
pub(super) struct State {
    /// Present entries of user halves.
    pub(super) entries: FxHashMap<Place, Pte>,
    /// How many present leaf entries map a frame.
    pub(super) mapped: FxHashMap<u64, u32>,
    /// Level-4 table of each mm.
    pub(super) roots: FxHashMap<u64, u64>,
    /// Mask of vCPUs by mm.
    pub(super) masks: FxHashMap<u64, u64>,
    pub(super) vcpus: Vec<Vcpu>,
    /// Where memory ends: what a guest maps behind it is no frame.
    pub(super) memory_bytes: Option<u64>,
}

/// Permissions of an entry: what a demotion takes away.
fn rights(entry: Pte) -> (bool, bool, bool) {
    let flags = entry.flags();
    (
        flags.contains(PteFlags::WRITE),
        flags.contains(PteFlags::USER),
        !flags.contains(PteFlags::NO_EXECUTE),
    )
}

/// True where somebody who still holds `old` may do what `new` does not allow: another frame, or a right
/// that is gone. More rights need no flush: at worst they cost a spurious fault (5.10.4.3).
pub(super) fn takes_away(old: Pte, new: Pte, level: u8) -> bool {
    if !old.is_present() {
        return false;
    }
    let (had, has) = (rights(old), rights(new));
    !new.is_present()
        || old.is_leaf(level) != new.is_leaf(level)
        || old.leaf_address(level) != new.leaf_address(level)
        || had.0 && !has.0
        || had.1 && !has.1
        || had.2 && !has.2
}

impl State {
    /// Applies a change of an entry. Returns what the tables said before, where that is not `old` but for the
    /// bits that the processor sets.
    pub(super) fn change(
        &mut self,
        (mm, level, gva): Place,
        old: Pte,
        new: Pte,
        change: Change,
    ) -> Result<(), Pte> {
        let known = self.entries.get(&(mm, level, gva)).copied();
        let known = known.unwrap_or(Pte::NONE);
        let hardware = (PteFlags::ACCESSED | PteFlags::DIRTY).bits();
        let explained = if old.is_present() {
            (known.0 ^ old.0) & !hardware == 0
        } else {
            !known.is_present()
        };
        if old.is_present() && old.is_leaf(level) {
            self.count(old, level, false);
            if takes_away(old, new, level) {
                self.keep_stale(Stale {
                    mm,
                    gva,
                    level,
                    entry: old,
                    change,
                });
            }
        } else if old.is_present() && takes_away(old, new, level) {
            self.keep_table(StaleTable {
                mm,
                gva,
                level,
                table: old.address(),
                change,
            });
        }
        if new.is_present() {
            if new.is_leaf(level) {
                self.count(new, level, true);
            }
            self.entries.insert((mm, level, gva), new);
        } else {
            self.entries.remove(&(mm, level, gva));
        }
        if explained { Ok(()) } else { Err(known) }
    }

    /// Notes an entry that is there from the start.
    pub(super) fn place(&mut self, place: Place, entry: Pte) {
        if entry.is_leaf(place.1) {
            self.count(entry, place.1, true);
        }
        self.entries.insert(place, entry);
    }

    fn count(&mut self, entry: Pte, level: u8, more: bool) {
        let pages = if level == 1 {
            1
        } else {
            level_size(level).min(HUGE_PAGE_SIZE) / PAGE_SIZE
        };
        for page in 0..pages {
            let frame = entry.leaf_address(level) + page * PAGE_SIZE;
            if self.memory_bytes.is_some_and(|bytes| frame >= bytes) {
                return;
            }
            let count = self.mapped.entry(frame).or_default();
            *count = if more {
                *count + 1
            } else {
                count.saturating_sub(1)
            };
        }
    }

    fn keep_stale(&mut self, stale: Stale) {
        // Without A at the time nobody may have cached it (5.10.2.2), but A is only known as of the last
        // look: every present entry counts.
        for vcpu in self.vcpus.iter_mut().filter(|vcpu| vcpu.mm == stale.mm) {
            vcpu.stale.push(stale);
        }
    }

    fn keep_table(&mut self, table: StaleTable) {
        for vcpu in self.vcpus.iter_mut().filter(|vcpu| vcpu.mm == table.mm) {
            vcpu.tables.push(table);
        }
    }

    /// A CR3 load (without PCIDs), or any other flush of everything that is not global (5.10.4.1).
    pub(super) fn flush_all(&mut self, vcpu: usize) {
        self.vcpus[vcpu].stale.clear();
        self.vcpus[vcpu].tables.clear();
    }

    /// INVLPG of every page of `start..end`: their translations, of whatever size, and all
    /// paging-structure caches (5.10.4.1).
    pub(super) fn flush_range(&mut self, vcpu: usize, start: u64, end: u64) {
        let vcpu = &mut self.vcpus[vcpu];
        vcpu.stale.retain(|stale| !stale.overlaps(start, end));
        if start < end {
            vcpu.tables.clear();
        }
    }

    /// The frames of all level-1 entries.
    pub(super) fn leaf_frames(&self) -> Vec<u64> {
        let leaves = self.entries.iter();
        leaves
            .filter(|((_, level, _), entry)| *level == 1 && entry.is_present())
            .map(|(_, entry)| entry.address())
            .collect()
    }

    /// True where `vcpu` may translate `gva` to the frame `gpa`, and whether it may write there.
    pub(super) fn may_translate(&self, vcpu: usize, gva: u64, gpa: u64) -> Option<bool> {
        let state = &self.vcpus[vcpu];
        let page = gva & !(PAGE_SIZE - 1);
        let mut found: Option<bool> = None;
        let mut take = |entry: Pte, level: u8, start: u64| {
            if entry.leaf_address(level) + (page - start) == gpa {
                let writable = entry.flags().contains(PteFlags::WRITE);
                found = Some(found.unwrap_or(false) || writable);
            }
        };
        for level in [1u8, 2, 3] {
            let start = page & !(level_size(level) - 1);
            if let Some(entry) = self.entries.get(&(state.mm, level, start))
                && entry.is_leaf(level)
            {
                take(*entry, level, start);
            }
        }
        for stale in &state.stale {
            if stale.overlaps(page, page + PAGE_SIZE) {
                take(stale.entry, stale.level, stale.gva);
            }
        }
        found
    }
}
