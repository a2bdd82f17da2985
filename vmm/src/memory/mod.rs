//! Guest physical memory as the host sees it.
//!
//! Everything that reads guest state goes through [`PhysMem`]: the machine's memory implements it,
//! and so do small in-memory fakes in tests. Nothing behind it trusts the guest: every address is
//! checked, live tables are read with atomic loads only.

mod ram;

use std::sync::atomic::AtomicU64;

use abi::layout::ENTRIES_PER_TABLE;

pub(crate) use ram::pages_of;
pub use ram::{GuestRam, RamError};

/// An access outside guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest physical address {gpa:#x} (+{len} bytes) lies outside guest memory")]
pub struct OutOfRange {
    /// First address.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
}

/// Read access to guest physical memory.
pub trait PhysMem: Sync {
    /// Bytes of guest memory, from guest physical address 0 without holes.
    fn bytes(&self) -> u64;

    /// Copies `buf.len()` bytes from `gpa`.
    ///
    /// # Errors
    /// [`OutOfRange`] where any byte lies outside; `buf` is then unspecified.
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), OutOfRange>;

    /// The page at `gpa` (page aligned) as the entries of a paging structure.
    ///
    /// # Errors
    /// [`OutOfRange`], also for an address that is not page aligned.
    fn table(&self, gpa: u64) -> Result<&[AtomicU64; ENTRIES_PER_TABLE], OutOfRange>;

    /// All of it as words, for who reads many; nothing where it does not lie in one piece.
    fn words(&self) -> &[AtomicU64] {
        &[]
    }
}
