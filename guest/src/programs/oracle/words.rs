//! One observation: how many words the result has, the result, and the VMAs that are looked at, each as its
//! start and its end with the flags in the low bits. The map that follows makes every difference visible that a call
//! leaves behind; what is in the pages only an access shows.

use abi::layout::{PAGE_SIZE, USER_MIN};
use abi::oracle::{ARENA, Area, FENCE, HEAP, HEAP_BYTES, MAX_WORDS, TOP};

use crate::sys::Sys;

/// What an access shows that would have been a SIGSEGV, and one that would have been a SIGBUS.
pub(super) const FAULT: u64 = u64::from_le_bytes(*b"segfault");
pub(super) const BUS: u64 = u64::from_le_bytes(*b"buserror");

/// Bytes below the heap that are looked at too; less than [`super::prepare::APART`].
const BELOW: u64 = 1000 * PAGE_SIZE;
const TIB: u64 = 1 << 40;
/// VMAs that are asked for at once, and at a time where there are more.
const AREAS: usize = 100;
const CHUNK: usize = 24;

/// Words of an observation. What comes when it is full is folded into the last one: a difference there is one, though
/// nobody sees where.
pub(super) struct Words {
    words: [u64; MAX_WORDS],
    used: usize,
}

/// Multiplier of FNV-1a.
const FOLD: u64 = 0x0100_0000_01b3;

impl Words {
    pub(super) fn new() -> Self {
        Self {
            words: [0; MAX_WORDS],
            used: 1,
        }
    }

    pub(super) fn push(&mut self, word: u64) {
        if let Some(place) = self.words.get_mut(self.used) {
            *place = word;
            self.used += 1;
        } else {
            let last = &mut self.words[MAX_WORDS - 1];
            *last = (*last ^ word).wrapping_mul(FOLD);
        }
    }

    /// The result is complete; what follows is the map.
    pub(super) fn end_result(&mut self) {
        self.words[0] = self.used as u64 - 1;
    }

    pub(super) fn get(&self) -> &[u64] {
        &self.words[..self.used]
    }

    /// Adds the map.
    pub(super) fn map<S: Sys>(&mut self, sys: &S, heap: u64) {
        for_each_area(sys, heap, |area| {
            self.push(seen(heap, area.start));
            self.push(seen(heap, area.end) | area.flags);
        });
    }
}

/// An address as an observation has it: the heap is elsewhere on both sides.
pub(super) fn seen(heap: u64, address: u64) -> u64 {
    match address.wrapping_sub(heap - BELOW) {
        offset if offset <= BELOW + HEAP_BYTES => HEAP - BELOW + offset,
        _ => address,
    }
}

/// Calls `each` with every VMA where a case can have one, cut at the bounds of what is looked at.
pub(super) fn for_each_area<S: Sys>(sys: &S, heap: u64, mut each: impl FnMut(Area)) {
    let windows = [
        (USER_MIN, USER_MIN + (1 << 20)),
        (ARENA - TIB, ARENA + TIB),
        (heap - BELOW, heap + HEAP_BYTES),
        (TOP - 8 * TIB, FENCE + PAGE_SIZE),
    ];
    // One call mostly: they are what a step costs where CPL 0 is emulated.
    let mut areas = [Area::default(); AREAS];
    let found = sys.maps(USER_MIN, FENCE + PAGE_SIZE, &mut areas);
    let found = found.unwrap_or(0);
    for (start, end) in windows {
        if found < AREAS {
            for area in &areas[..found] {
                cut(*area, (start, end), &mut each);
            }
            continue;
        }
        let mut at = start;
        while at < end {
            let found = sys.maps(at, end, &mut areas[..CHUNK]).unwrap_or(0);
            for area in &areas[..found] {
                cut(*area, (start, end), &mut each);
            }
            if found < CHUNK {
                break;
            }
            at = areas[CHUNK - 1].end;
        }
    }
}

fn cut(area: Area, (start, end): (u64, u64), each: &mut impl FnMut(Area)) {
    if area.start < end && area.end > start {
        each(Area {
            start: area.start.max(start),
            end: area.end.min(end),
            flags: area.flags,
        });
    }
}
