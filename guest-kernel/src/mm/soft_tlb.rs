//! The soft TLB: programs' accesses to memory under test, through a TLB that the kernel keeps.
//!
//! It holds every translation, and every pointer to a leaf table, until a flush covers it: the worst that
//! the architecture allows (SDM vol. 3A, 5.10), the same on every host, and a stale access has its real
//! consequence. It fills on access only; what a processor may fill speculatively is the host's
//! TLB model to judge.
//!
//! With PCIDs (`asid`) its entries are tagged with the one that they were made under, and only those of the
//! loaded one are used, as in a processor (SDM vol. 3A, 5.10.1); a load of CR3 that keeps them does nothing here.

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};

use abi::channel::{EventKind, access};
use abi::layout::{ENTRIES_PER_TABLE, HUGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE};
use abi::objects::{ASIDS, FrameKind, Link, SoftEntry, SoftTlb};
use abi::param::TlbBackEnd;
use abi::pte::{Pte, PteFlags, fault, level_size};
use abi::syscall::Errno;

use super::{Field, Slot, page_of};
use crate::Kernel;
use crate::arch::Arch;

/// An entry that was removed: a search goes on behind it.
const REMOVED: u64 = 2;
/// Set in the tag of a used entry.
const USED: u64 = 1;
/// Where the PCID lies in a tag: above these two, and below the page number.
const PCID_SHIFT: u32 = 2;
/// Set in the tag of a translation of 2 MiB.
const HUGE: u64 = PAGE_SIZE / 2;
const PCID_MASK: u64 = (HUGE - 1) >> PCID_SHIFT << PCID_SHIFT;
const _: () = assert!((ASIDS as u64) << PCID_SHIFT <= PCID_MASK);

/// A translation that an access uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Translation {
    /// GPA of the byte.
    pub(crate) gpa: u64,
    /// The TLB had it.
    pub(crate) hit: bool,
}

impl<A: Arch> Kernel<A> {
    /// Gives each CPU its soft TLB where the command line asks for one. Once, at boot.
    pub(super) fn soft_tlb_init(&self) -> Result<(), Errno> {
        if self.config.tlb == TlbBackEnd::Hw {
            return Ok(());
        }
        for cpu in 0..self.arch.nr_cpus() {
            let page = self.alloc_frames(0, FrameKind::Kernel)?;
            self.arch.zero_frame(page);
            let link: &Link<SoftTlb> = &self.root().cpus[cpu].soft_tlb;
            link.set(abi::objects::Pa::new(page));
        }
        Ok(())
    }

    fn soft_tlb(&self) -> Option<&SoftTlb> {
        let tlb = self.this_cpu().soft_tlb.get().some()?;
        Some(self.obj(tlb))
    }

    /// Translates `gva` as this CPU's TLB does.
    ///
    /// # Errors
    /// The code of the page fault, which has removed what was held for the address (SDM vol. 3A,
    /// 5.10.4.1).
    pub(crate) fn soft_translate(&self, gva: u64, write: bool) -> Result<Translation, u64> {
        let wanted = if write {
            PteFlags::PRESENT | PteFlags::USER | PteFlags::WRITE
        } else {
            PteFlags::PRESENT | PteFlags::USER
        };
        let code = fault::USER | if write { fault::WRITE } else { 0 };
        let tlb = self.soft_tlb().ok_or(code)?;
        let page = self.soft_key(page_of(gva));
        let region = self.soft_key(gva & !(HUGE_PAGE_SIZE - 1));
        let found = |(level, entry): (u8, Pte), hit| Translation {
            gpa: entry.leaf_address(level) + gva % level_size(level),
            hit,
        };
        // Either may be used where it holds both; which of them is older is what it has not forgotten.
        for (level, key) in [(1, page), (2, region | HUGE)] {
            if let Some(entry) = find(&tlb.pages, key).map(|at| Pte(tlb.pages[at].value.get()))
                && entry.flags().contains(wanted)
            {
                return Ok(found((level, entry), true));
            }
        }
        let cached = find(&tlb.tables, region).map(|at| tlb.tables[at].value.get());
        let place = match cached {
            Some(table) => Some(Slot::new(table, 1, gva)),
            None => self.walk_to_leaf(gva),
        };
        let entry = place.map_or(Pte::NONE, |place| self.used_entry(place, wanted));
        if let Some(place) = place
            && entry.flags().contains(wanted)
            && entry.is_leaf(place.level)
        {
            if place.level == 2 {
                keep(tlb, &tlb.pages, region | HUGE, entry.0);
                return Ok(found((2, entry), false));
            }
            if cached.is_none() {
                tlb.tables_used.set(tlb.tables_used.get() + 1);
                keep(tlb, &tlb.tables, region, place.table);
            }
            keep(tlb, &tlb.pages, page, entry.0);
            return Ok(found((1, entry), false));
        }
        remove(&tlb.pages, page);
        remove(&tlb.pages, region | HUGE);
        remove(&tlb.tables, region);
        let present = if entry.is_present() {
            fault::PRESENT
        } else {
            0
        };
        Err(code | present)
    }

    /// Reads an entry as a walk does, which sets A in one that it uses (SDM vol. 3A, 5.8); nobody is told.
    fn used_entry(&self, slot: Slot, wanted: PteFlags) -> Pte {
        loop {
            let entry = self.read_pte(slot);
            if !entry.flags().contains(wanted) {
                return entry;
            }
            let used = entry.with(PteFlags::ACCESSED);
            if entry == used || self.processor_sets(slot, entry, used) {
                return used;
            }
        }
    }

    /// Loads or stores the 8 bytes at `gpa` and records it; returns what was loaded or stored, and whether
    /// the translation is stale.
    pub(crate) fn soft_access(&self, gva: u64, at: Translation, store: Option<u64>) -> (u64, bool) {
        let word = self.memory_word(at.gpa);
        let value = match store {
            Some(value) => {
                word.store(value, Relaxed);
                value
            }
            None => word.load(Relaxed),
        };
        let mut how = if store.is_some() { access::WRITE } else { 0 };
        if at.hit {
            how |= access::HIT;
        }
        let stale = self.translation_now(gva) != Some(page_of(at.gpa));
        if stale {
            how |= access::STALE;
        }
        event!(
            self,
            EventKind::Access,
            [gva, page_of(at.gpa), value, how, 0]
        );
        (value, stale)
    }

    /// The frame that the loaded page tables give for `gva`.
    fn translation_now(&self, gva: u64) -> Option<u64> {
        let (level, entry) = self.leaf_below(self.arch.current_root(), gva)?;
        let offset = page_of(gva) & (level_size(level) - 1);
        Some(entry.leaf_address(level) + offset)
    }

    /// Where the walk below the loaded root ends for `gva`: at an entry of level 1, or at one that maps 2 MiB.
    fn walk_to_leaf(&self, gva: u64) -> Option<Slot> {
        let mut slot = Slot::new(self.arch.current_root(), 4, gva);
        while slot.level > 1 {
            let entry = self.read_pte(slot);
            if !entry.is_present() {
                return None;
            }
            if !entry.is_table() {
                break;
            }
            slot = Slot::new(entry.address(), slot.level - 1, gva);
        }
        Some(slot)
    }

    /// What an entry for `gva` is found by in the address space that is loaded.
    pub(crate) fn soft_key(&self, gva: u64) -> u64 {
        soft_key_in(self.this_cpu().pcid.get(), gva)
    }

    /// Removes the entries whose PCID is that of `key`. False where none of another one are left, and for none
    /// without PCIDs: then everything may go at once.
    fn forget_own(&self, entries: &[SoftEntry], key: u64) -> bool {
        let mut left = false;
        if self.has_pcids() {
            for entry in entries {
                let tag = entry.tag.get();
                if tag & USED != 0 && tag & PCID_MASK == key & PCID_MASK {
                    entry.tag.set(REMOVED);
                }
                left |= tag & USED != 0 && tag & PCID_MASK != key & PCID_MASK;
            }
        }
        left
    }

    /// INVLPG of each page of `start..end`: it drops all pointers to tables too, of the loaded PCID (SDM vol. 3A,
    /// 5.10.4.1).
    pub(super) fn soft_flush_range(&self, start: u64, end: u64) {
        let Some(tlb) = self.soft_tlb() else { return };
        let mut gva = start;
        while gva < end {
            remove(&tlb.pages, self.soft_key(gva));
            gva += PAGE_SIZE;
        }
        // One address is enough to drop a page of any size (SDM vol. 3A, 5.10.4.1).
        let mut region = start & !(HUGE_PAGE_SIZE - 1);
        while region < end {
            remove(&tlb.pages, self.soft_key(region) | HUGE);
            region += HUGE_PAGE_SIZE;
        }
        if tlb.tables_used.get() != 0 && !self.forget_own(&tlb.tables, self.soft_key(0)) {
            clear(&tlb.tables);
            tlb.tables_used.set(0);
        }
    }

    /// A load of CR3 with this PCID that flushes.
    pub(super) fn soft_flush_all(&self, pcid: u64) {
        let Some(at) = self.this_cpu().soft_tlb.get().some() else {
            return;
        };
        let (tlb, key) = (self.obj(at), soft_key_in(pcid, 0));
        // `|`: of both.
        if self.forget_own(&tlb.pages, key) | self.forget_own(&tlb.tables, key) {
            return;
        }
        let evictions = tlb.evictions.get();
        self.arch.zero_frame(at.0);
        tlb.evictions.set(evictions);
    }
}

/// What an entry for `gva` under `pcid` is found by.
pub(crate) const fn soft_key_in(pcid: u64, gva: u64) -> u64 {
    gva | pcid << PCID_SHIFT
}

const _: () = assert!(ENTRIES_PER_TABLE * 8 == size_of::<SoftTlb>());

fn start_of(entries: &[SoftEntry], key: u64) -> usize {
    // Pages and regions in turn land on neighbouring entries, whatever their PCID.
    (((key >> PAGE_SHIFT) ^ (key >> 21)) % entries.len() as u64) as usize
}

/// The entry for `key`: open addressing, by steps of one.
fn find(entries: &[SoftEntry], key: u64) -> Option<usize> {
    let mut at = start_of(entries, key);
    for _ in 0..entries.len() {
        match entries[at].tag.load(Acquire) {
            0 => return None,
            tag if tag == key | USED => return Some(at),
            _ => at = if at + 1 == entries.len() { 0 } else { at + 1 },
        }
    }
    None
}

fn keep(tlb: &SoftTlb, entries: &[SoftEntry], key: u64, value: u64) {
    let at = find(entries, key).unwrap_or_else(|| {
        let start = start_of(entries, key);
        let free = (0..entries.len())
            .map(|step| (start + step) % entries.len())
            .find(|&at| entries[at].tag.get() & USED == 0);
        free.unwrap_or_else(|| {
            tlb.evictions.fetch_add(1, AcqRel);
            start
        })
    });
    entries[at].value.set(value);
    entries[at].tag.set(key | USED);
}

fn remove(entries: &[SoftEntry], key: u64) {
    if let Some(at) = find(entries, key) {
        entries[at].tag.set(REMOVED);
    }
}

fn clear(entries: &[SoftEntry]) {
    for entry in entries {
        entry.tag.set(0);
    }
}
