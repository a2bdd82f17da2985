//! Hands out frames upwards from the end of the kernel image.

use abi::layout::PAGE_SIZE;

use super::BootError;
use crate::memory::{GuestRam, PhysMem};

/// The frames that boot takes; they are zero, as all of fresh guest memory is.
pub(super) struct Frames {
    next: u64,
    end: u64,
}

impl Frames {
    /// Frames of `ram` from `first` (page aligned).
    pub(super) fn new(ram: &GuestRam, first: u64) -> Self {
        Self {
            next: first,
            end: ram.bytes(),
        }
    }

    /// GPA of `bytes` (rounded up to whole frames) for `what`.
    pub(super) fn take(&mut self, bytes: u64, what: &'static str) -> Result<u64, BootError> {
        let first = self.next;
        let next = bytes
            .checked_next_multiple_of(PAGE_SIZE)
            .and_then(|bytes| first.checked_add(bytes))
            .filter(|next| *next <= self.end)
            .ok_or(BootError::DoesNotFit {
                what,
                memory: self.end,
            })?;
        self.next = next;
        Ok(first)
    }

    /// GPA of the first frame that was not taken.
    pub(super) fn next(&self) -> u64 {
        self.next
    }
}
