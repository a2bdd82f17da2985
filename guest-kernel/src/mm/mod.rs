//! The MM stack: everything between a system call or a fault and the bits of a paging-structure entry.
//!
//! Bottom to top: `boot` lays out memory; `frame` is the buddy allocator with its per-CPU lists,
//! `folio` what is known of each frame, `zero` the one that untouched memory shares, `slab` the allocator of kernel
//! objects; `page_table` reads and writes entries, `tlb` loads address spaces and flushes them, `asid` gives them PCIDs,
//! `gather` clears ranges and gives their
//! frames back only after the flush; `vma_tree` orders an mm's VMAs, `vma_lock` says who may read or change one, `vma` splits and `merge` joins
//! them, `rmap` finds the entries that map a folio; `limit` counts what is mapped and holds it against the process's
//! limits; `swap` is the swap area with its cache, `swap_io` moves pages there and back, `lru` lists those that may go,
//! `reclaim` takes them away with `unmap` and `batch`, and `kswapd` says when it is time to; `address_space` is the life of an mm, and `map`, `remap` with `relocate`, `protect`, `advise`, `mlock`,
//! `populate`, `residency`, `membarrier`, `fault` (with `fault_path`) and `fork` are what programs ask for. `huge` does for entries of 2 MiB what
//! these do for small ones; `huge_fault` makes, `huge_split` breaks and `collapse` gathers them, `khugepaged` says when; `folio_split` breaks the folio itself,
//! and `split_queue` remembers which to break when memory is short.
//!
//! What Linux has debated, and what others would decide otherwise, is apart from its callers: `vma_lock` says how long a VMA
//! lives, `fault_path` how a fault comes by it, `lazy` says who keeps an mm that
//! nobody runs, `zap_order` when an unmap counts a mapping less, `relocate` how pages move (docs/seams.md).
//!
//! `group` counts who pays for which frame, `group_reclaim` holds it against limits, and `group_move` lets a process change sides.
//!
//! All of it is methods of [`crate::Kernel`] over the objects of [`abi::objects`]; there are no statics,
//! no heap, and no knowledge of the machine below [`crate::arch::Arch`].
//!
//! Fields that the host may read are true whenever no lock that protects them is held.

mod address_space;
mod advise;
mod age;
mod asid;
mod batch;
mod boot;
mod changed;
mod collapse;
mod disk_file;
mod fault;
mod fault_path;
mod file;
mod file_fault;
mod folio;
mod folio_split;
mod fork;
mod frame;
mod gather;
mod group;
mod group_move;
mod group_reclaim;
mod gup;
mod huge;
mod huge_fault;
mod huge_split;
mod i_mmap;
mod interval_tree;
mod khugepaged;
mod kswapd;
mod lazy;
mod limit;
mod lru;
mod map;
#[cfg(feature = "testbed")]
mod maps;
mod membarrier;
mod merge;
mod migrate;
mod mlock;
mod move_pages;
mod msync;
mod non_present;
mod page_cache;
mod page_table;
#[cfg(feature = "testbed")]
mod peek;
mod populate;
mod protect;
mod reclaim;
mod relocate;
mod remap;
mod remove;
mod residency;
mod rmap;
mod slab;
#[cfg(feature = "testbed")]
mod soft_tlb;
mod split_queue;
mod swap;
mod swap_in;
mod swap_io;
mod tlb;
mod truncate;
mod unmap;
mod vma;
mod vma_lock;
mod vma_tree;
mod wire;
mod writeback;
mod zap_order;
mod zero;

#[cfg(test)]
pub(crate) mod tests;

pub use boot::BootError;
pub use fault::FaultError;
pub use file::{MAX_FILE_BYTES, Size};
pub use folio::POISON;
pub(crate) use limit::Limits;
pub use map::Backing;
pub use page_table::Slot;
pub use slab::Slabbed;
pub(crate) use swap_in::MAY_SLEEP;
pub use tlb::FreedTables;

#[cfg(test)]
pub(crate) use soft_tlb::soft_key_in;

use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};

use abi::layout::{PAGE_SHIFT, PAGE_SIZE};

/// Plain access to a field of a shared object: for fields that a lock protects, or that only their
/// owner writes. Every other access spells its ordering out.
pub(crate) trait Field {
    type Value;
    fn get(&self) -> Self::Value;
    fn set(&self, value: Self::Value);
}

macro_rules! fields {
    ($($atomic:ty: $value:ty),+) => { $(
        impl Field for $atomic {
            type Value = $value;
            #[inline]
            fn get(&self) -> $value {
                self.load(Relaxed)
            }
            #[inline]
            fn set(&self, value: $value) {
                self.store(value, Relaxed);
            }
        }
    )+ };
}
fields!(AtomicU8: u8, AtomicU32: u32, AtomicU64: u64);

/// The first byte of the page that holds `address`.
pub(crate) const fn page_of(address: u64) -> u64 {
    address & !(PAGE_SIZE - 1)
}

/// `bytes` rounded up to whole pages; wraps to 0 like Linux's PAGE_ALIGN.
pub(crate) const fn page_align(bytes: u64) -> u64 {
    page_of(bytes.wrapping_add(PAGE_SIZE - 1))
}

/// True where `address` starts a page.
pub(crate) const fn is_page_aligned(address: u64) -> bool {
    address & (PAGE_SIZE - 1) == 0
}

/// Pages in `bytes`.
pub(crate) const fn pages(bytes: u64) -> u64 {
    bytes >> PAGE_SHIFT
}
