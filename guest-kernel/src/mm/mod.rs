//! The MM stack: everything between a system call or a fault and the bits of a paging-structure entry.
//!
//! Bottom to top: `boot` lays out memory; `frame` is the buddy allocator with its per-CPU lists,
//! `folio` what is known of each frame, `slab` the allocator of kernel objects; `page_table` reads and
//! writes entries, `tlb` loads address spaces and flushes them, `gather` clears ranges and gives their
//! frames back only after the flush; `vma_tree` orders an mm's VMAs, `vma` splits and `merge` joins
//! them, `rmap` finds the entries that map a folio; `address_space` is the life of an mm, and `map`,
//! `protect`, `advise`, `fault` and `fork` are what programs ask for.
//!
//! All of it is methods of [`crate::Kernel`] over the objects of [`abi::objects`]; there are no statics,
//! no heap, and no knowledge of the machine below [`crate::arch::Arch`].
//!
//! Fields that the host may read are true whenever no lock that protects them is held.

mod address_space;
mod advise;
mod boot;
mod fault;
mod folio;
mod fork;
mod frame;
mod gather;
mod map;
mod merge;
mod page_table;
#[cfg(feature = "testbed")]
mod peek;
mod protect;
mod rmap;
mod slab;
#[cfg(feature = "testbed")]
mod soft_tlb;
mod tlb;
mod vma;
mod vma_tree;
mod wire;

#[cfg(test)]
pub(crate) mod tests;

pub use boot::BootError;
pub use fault::FaultError;
pub use folio::POISON;
pub use page_table::Slot;
pub use slab::Slabbed;
pub use tlb::FreedTables;

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
