//! Where the mappings of a recording lie.

use std::collections::BTreeMap;
use std::ops::Range;

use abi::layout::{PAGE_SIZE, USER_END};

/// What a process of the recording has mapped.
#[derive(Clone, Default)]
pub(crate) struct Places {
    /// By first address; disjoint.
    areas: BTreeMap<u64, Area>,
}

/// A part of a slot, where the recording had it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Area {
    /// First address past it.
    pub(crate) end: u64,
    /// The slot that it is a part of.
    pub(crate) slot: u32,
    /// Address at which the slot starts.
    pub(crate) base: u64,
}

/// A part of a slot.
pub(crate) struct Piece {
    pub(crate) slot: u32,
    /// Its first byte.
    pub(crate) offset: u64,
    /// Bytes.
    pub(crate) len: u64,
}

impl Places {
    /// Something is mapped at `start` where nothing was.
    pub(crate) fn insert(&mut self, start: u64, area: Area) {
        self.areas.insert(start, area);
    }

    /// What lies in `range`, a part of it at least, by first address.
    pub(crate) fn overlapping(&self, range: &Range<u64>) -> impl Iterator<Item = (u64, Area)> {
        let before = self
            .areas
            .range(..range.start)
            .next_back()
            .map(|(start, area)| (*start, *area));
        let inside = self
            .areas
            .range(range.clone())
            .map(|(start, area)| (*start, *area));
        before
            .filter(|(_, area)| area.end > range.start)
            .into_iter()
            .chain(inside)
    }

    /// The parts of slots that lie in `range`, neighbours of one slot joined.
    pub(crate) fn pieces(&self, range: &Range<u64>) -> Vec<Piece> {
        let mut pieces: Vec<Piece> = Vec::new();
        for (start, area) in self.overlapping(range) {
            let (start, end) = (start.max(range.start), area.end.min(range.end));
            let offset = start - area.base;
            match pieces.last_mut() {
                Some(last) if last.slot == area.slot && last.offset + last.len == offset => {
                    last.len += end - start;
                }
                _ => pieces.push(Piece {
                    slot: area.slot,
                    offset,
                    len: end - start,
                }),
            }
        }
        pieces
    }

    /// The parts of `range` where nothing is mapped.
    pub(crate) fn gaps(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = range.start;
        for (start, area) in self.overlapping(range) {
            if start > at {
                gaps.push(at..start);
            }
            at = at.max(area.end);
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        gaps
    }

    /// Nothing is mapped in `range` any more.
    pub(crate) fn remove(&mut self, range: &Range<u64>) {
        let areas: Vec<(u64, Area)> = self.overlapping(range).collect();
        for (start, area) in areas {
            self.areas.remove(&start);
            if start < range.start {
                self.areas.insert(
                    start,
                    Area {
                        end: range.start,
                        ..area
                    },
                );
            }
            if area.end > range.end {
                self.areas.insert(range.end, area);
            }
        }
    }
}

/// The whole pages of `addr..addr + len`; none of an empty range or one outside user space.
pub(crate) fn pages(addr: u64, len: u64) -> Option<Range<u64>> {
    let end = addr.checked_add(len).filter(|end| *end <= USER_END)?;
    let range = addr / PAGE_SIZE * PAGE_SIZE..end.next_multiple_of(PAGE_SIZE);
    (len > 0).then_some(range)
}
