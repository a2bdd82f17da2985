//! The one place that chooses the atomics under every lock: a word of the machine, or, in tests on the
//! host, one of [loom](https://docs.rs/loom)'s, which tries every value that the memory model allows.
//!
//! The algorithms of this directory are generic over it, so what is tested is what runs
//! (`guest-kernel/tests/sync`).

use core::sync::atomic::{AtomicU64, Ordering};

/// An atomic 64-bit word, with the operations and orderings of [`AtomicU64`].
pub trait Word {
    /// As [`AtomicU64::load`].
    fn load(&self, order: Ordering) -> u64;
    /// As [`AtomicU64::store`].
    fn store(&self, value: u64, order: Ordering);
    /// As [`AtomicU64::fetch_sub`].
    fn fetch_sub(&self, value: u64, order: Ordering) -> u64;
    /// As [`AtomicU64::fetch_or`].
    fn fetch_or(&self, bits: u64, order: Ordering) -> u64;
    /// As [`AtomicU64::fetch_and`].
    fn fetch_and(&self, bits: u64, order: Ordering) -> u64;
    /// As [`AtomicU64::compare_exchange_weak`].
    ///
    /// # Errors
    /// What the word is instead.
    fn compare_exchange_weak(
        &self,
        current: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64>;
    /// As [`core::sync::atomic::fence`].
    fn fence(order: Ordering);
}

/// A word that lies elsewhere: in an object of the kernel's.
impl<W: Word> Word for &W {
    #[inline]
    fn load(&self, order: Ordering) -> u64 {
        W::load(self, order)
    }
    #[inline]
    fn store(&self, value: u64, order: Ordering) {
        W::store(self, value, order);
    }
    #[inline]
    fn fetch_sub(&self, value: u64, order: Ordering) -> u64 {
        W::fetch_sub(self, value, order)
    }
    #[inline]
    fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
        W::fetch_or(self, bits, order)
    }
    #[inline]
    fn fetch_and(&self, bits: u64, order: Ordering) -> u64 {
        W::fetch_and(self, bits, order)
    }
    #[inline]
    fn compare_exchange_weak(
        &self,
        current: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        W::compare_exchange_weak(self, current, new, success, failure)
    }
    #[inline]
    fn fence(order: Ordering) {
        W::fence(order);
    }
}

impl Word for AtomicU64 {
    #[inline]
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }
    #[inline]
    fn store(&self, value: u64, order: Ordering) {
        self.store(value, order);
    }
    #[inline]
    fn fetch_sub(&self, value: u64, order: Ordering) -> u64 {
        self.fetch_sub(value, order)
    }
    #[inline]
    fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
        self.fetch_or(bits, order)
    }
    #[inline]
    fn fetch_and(&self, bits: u64, order: Ordering) -> u64 {
        self.fetch_and(bits, order)
    }
    #[inline]
    fn compare_exchange_weak(
        &self,
        current: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        self.compare_exchange_weak(current, new, success, failure)
    }
    #[inline]
    fn fence(order: Ordering) {
        core::sync::atomic::fence(order);
    }
}
