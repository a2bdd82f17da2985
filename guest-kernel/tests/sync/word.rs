//! Words and data for tests.

use std::panic::catch_unwind;
use std::sync::atomic::Ordering;

use guest_kernel::sync::Word;
use loom::sync::atomic::AtomicU64;

/// A word of loom's. `LEFT_OUT` is what is left out of every operation on it, so that the test shows what it is for.
#[derive(Debug)]
pub(crate) struct LoomWord<const LEFT_OUT: u8 = NOTHING>(AtomicU64);

/// All is as it should be.
pub(crate) const NOTHING: u8 = 0;
/// Fences do nothing.
pub(crate) const FENCES: u8 = 1;
/// Acquire is Relaxed.
pub(crate) const ACQUIRE: u8 = 2;
/// Release is Relaxed.
pub(crate) const RELEASE: u8 = 3;

impl<const LEFT_OUT: u8> LoomWord<LEFT_OUT> {
    pub(crate) fn new(value: u64) -> Self {
        Self(AtomicU64::new(value))
    }
}

fn weakened(left_out: u8, order: Ordering) -> Ordering {
    match (left_out, order) {
        (ACQUIRE, Ordering::Acquire) | (RELEASE, Ordering::Release) => Ordering::Relaxed,
        (ACQUIRE, Ordering::AcqRel) => Ordering::Release,
        (RELEASE, Ordering::AcqRel) => Ordering::Acquire,
        _ => order,
    }
}

impl<const LEFT_OUT: u8> Word for LoomWord<LEFT_OUT> {
    fn load(&self, order: Ordering) -> u64 {
        self.0.load(weakened(LEFT_OUT, order))
    }
    fn store(&self, value: u64, order: Ordering) {
        self.0.store(value, weakened(LEFT_OUT, order));
    }
    fn fetch_sub(&self, value: u64, order: Ordering) -> u64 {
        self.0.fetch_sub(value, weakened(LEFT_OUT, order))
    }
    fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
        self.0.fetch_or(bits, weakened(LEFT_OUT, order))
    }
    fn fetch_and(&self, bits: u64, order: Ordering) -> u64 {
        self.0.fetch_and(bits, weakened(LEFT_OUT, order))
    }
    fn compare_exchange_weak(
        &self,
        current: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        // Weak in name: loom does not let it fail where it need not.
        let success = weakened(LEFT_OUT, success);
        self.0
            .compare_exchange(current, new, success, weakened(LEFT_OUT, failure))
    }
    fn fence(order: Ordering) {
        if LEFT_OUT != FENCES {
            loom::sync::atomic::fence(order);
        }
    }
}

/// Runs `test` in every way that loom knows.
pub(crate) fn explore(test: impl Fn() + Send + Sync + 'static) {
    explore_within(3, test);
}

/// The same with at most so many preemptions.
pub(crate) fn explore_within(preemptions: usize, test: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(test);
}

/// Asserts that loom finds something wrong with `test`.
pub(crate) fn assert_broken(test: impl Fn() + Send + Sync + std::panic::UnwindSafe + 'static) {
    assert!(
        catch_unwind(|| explore(test)).is_err(),
        "what was left out is not needed"
    );
}
