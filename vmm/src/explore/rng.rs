//! SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): small, fast, and the same numbers everywhere and for good,
//! which reproducers rely on.

/// A stream of numbers.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    /// The stream of execution `index` of `seed`.
    #[must_use]
    pub(crate) fn new(seed: u64, index: u64) -> Self {
        let mut rng = Self(seed);
        let mixed = rng.next() ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self(mixed)
    }
    /// The next number.
    #[allow(clippy::should_implement_trait)] // it has no end
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// A number below `bound`, which is not 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}
