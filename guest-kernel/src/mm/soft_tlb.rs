//! The soft TLB: programs' accesses to memory under test, through a TLB that the kernel keeps.
//!
//! It holds every translation, and every pointer to a leaf table, until a flush covers it: the worst that
//! the architecture allows (SDM vol. 3A, 5.10), the same on every host, and a stale access has its real
//! consequence. It fills on access only; what a processor may fill speculatively is the host's
//! TLB model to judge.

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};

use abi::channel::{EventKind, access};
use abi::layout::{ENTRIES_PER_TABLE, HUGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE};
use abi::objects::{FrameKind, Link, SoftEntry, SoftTlb};
use abi::param::TlbBackEnd;
use abi::pte::{Pte, PteFlags, fault};
use abi::syscall::Errno;

use super::{Field, Slot, page_of};
use crate::Kernel;
use crate::arch::Arch;

/// An entry that was removed: a search goes on behind it.
const REMOVED: u64 = 2;
/// Set in the tag of a used entry.
const USED: u64 = 1;

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
        let (page, region) = (page_of(gva), gva & !(HUGE_PAGE_SIZE - 1));
        let found = |entry: Pte, hit| Translation {
            gpa: entry.address() + gva % PAGE_SIZE,
            hit,
        };
        if let Some(entry) = find(&tlb.pages, page).map(|at| Pte(tlb.pages[at].value.get()))
            && entry.flags().contains(wanted)
        {
            return Ok(found(entry, true));
        }
        let cached = find(&tlb.tables, region).map(|at| tlb.tables[at].value.get());
        let table = cached.or_else(|| self.walk_to_leaf_table(gva));
        let entry = table.map_or(Pte::NONE, |table| self.read_pte(Slot::new(table, 1, gva)));
        if let Some(table) = table
            && entry.flags().contains(wanted)
        {
            if cached.is_none() {
                tlb.tables_used.set(tlb.tables_used.get() + 1);
                keep(tlb, &tlb.tables, region, table);
            }
            keep(tlb, &tlb.pages, page, entry.0);
            return Ok(found(entry, false));
        }
        remove(&tlb.pages, page);
        remove(&tlb.tables, region);
        let present = if entry.is_present() {
            fault::PRESENT
        } else {
            0
        };
        Err(code | present)
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
        let table = self.walk_to_leaf_table(gva)?;
        let entry = self.read_pte(Slot::new(table, 1, gva));
        entry.is_present().then(|| entry.address())
    }

    /// The level-1 table for `gva` below the loaded root.
    fn walk_to_leaf_table(&self, gva: u64) -> Option<u64> {
        [4, 3, 2]
            .into_iter()
            .try_fold(self.arch.current_root(), |table, level| {
                let entry = self.read_pte(Slot::new(table, level, gva));
                entry.is_present().then(|| entry.address())
            })
    }

    /// INVLPG of each page of `start..end`, which drops all pointers to tables too (SDM vol. 3A,
    /// 5.10.4.1).
    pub(super) fn soft_flush_range(&self, start: u64, end: u64) {
        let Some(tlb) = self.soft_tlb() else { return };
        let mut gva = start;
        while gva < end {
            remove(&tlb.pages, gva);
            gva += PAGE_SIZE;
        }
        if tlb.tables_used.get() != 0 {
            clear(&tlb.tables);
            tlb.tables_used.set(0);
        }
    }

    /// A CR3 load.
    pub(super) fn soft_flush_all(&self) {
        if let Some(tlb) = self.this_cpu().soft_tlb.get().some() {
            let evictions = self.obj(tlb).evictions.get();
            self.arch.zero_frame(tlb.0);
            self.obj(tlb).evictions.set(evictions);
        }
    }
}

const _: () = assert!(ENTRIES_PER_TABLE * 8 == size_of::<SoftTlb>());

fn start_of(entries: &[SoftEntry], key: u64) -> usize {
    // Pages and regions in turn land on neighbouring entries.
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
