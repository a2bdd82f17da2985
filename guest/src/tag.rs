//! Values that say where and when they were written, so that a frame which turns up in a foreign
//! place is recognised by what it holds.

/// Bits of [`Tag::generation`].
const GENERATION_BITS: u32 = 24;

/// Words of a page that programs use; the rest stays untouched.
pub(crate) const SLOTS: u64 = 32;
/// Most pages of a tagged region.
pub(crate) const MAX_PAGES: u64 = (1 << 16) / SLOTS;

/// What a word holds: its region, the generation in which it was written, and its place. Encoded
/// with a checksum; never 0, which is what a fresh page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tag {
    /// Which region of the program.
    pub(crate) region: Region,
    /// When: meaning by program, modulo 2^24.
    pub(crate) generation: u64,
    /// Page of the region.
    pub(crate) page: u64,
    /// Word of the page ([`offset`]).
    pub(crate) slot: u64,
}

/// The regions of all programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Region {
    /// Memory that the program races on.
    Subject = 0xa5,
    /// Memory that reuses the subject's frames.
    Reuse = 0xb6,
    /// What a forked child writes.
    Child = 0xc7,
}

/// Address of a word of the region at `base`. Slots lie a cache line apart, so that threads which
/// write different slots do not slow each other down.
pub(crate) fn address(base: u64, page: u64, slot: u64) -> u64 {
    base + page * abi::layout::PAGE_SIZE + slot * 64
}

impl Tag {
    pub(crate) fn encode(self) -> u64 {
        let generation = self.generation & ((1 << GENERATION_BITS) - 1);
        let place = self.page * SLOTS + self.slot;
        let body = u64::from(self.region as u8) << 56 | generation << 32 | (place & 0xffff) << 16;
        body | checksum(body)
    }

    /// The same place, one generation earlier.
    pub(crate) fn before(self) -> Self {
        Tag {
            generation: self.generation.wrapping_sub(1),
            ..self
        }
    }

    /// The generation of `value`, if it is a value of this region and place at all.
    pub(crate) fn generation_of(self, value: u64) -> Option<u64> {
        let generation = value >> 32 & ((1 << GENERATION_BITS) - 1);
        (Tag { generation, ..self }.encode() == value).then_some(generation)
    }
}

fn checksum(body: u64) -> u64 {
    // Fibonacci hashing; the top bits of the product depend on all bits below.
    body.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_its_own_place_accepts_a_value() {
        let tag = Tag {
            region: Region::Subject,
            generation: 77,
            page: 5,
            slot: 3,
        };
        let value = tag.encode();
        assert_eq!(tag.generation_of(value), Some(77));
        assert_eq!(
            Tag {
                generation: 1,
                ..tag
            }
            .generation_of(value),
            Some(77)
        );
        assert_eq!(Tag { page: 6, ..tag }.generation_of(value), None);
        assert_eq!(Tag { slot: 4, ..tag }.generation_of(value), None);
        assert_eq!(
            Tag {
                region: Region::Reuse,
                ..tag
            }
            .generation_of(value),
            None
        );
        for bit in 0..16 {
            assert_eq!(
                tag.generation_of(value ^ 1 << bit),
                None,
                "checksum bit {bit}"
            );
        }
        assert_eq!(tag.generation_of(0), None);
    }
}
