//! One observation: how many words the result has, the result, and the VMAs that are looked at. Each is its start, its end
//! with the flags in the low bits, and for each piece of it ([`abi::oracle::looked_at`]) the pages that are in memory, as bits,
//! those that are read, and what was read of each of these.
//!
//! # Which pages are read
//! Those that Linux has mapped, where they can be read at all: the load finds them mapped and changes nothing. A page that is not
//! mapped would come to be by the look at it, and the next step would find another process than the case has made. What
//! Linux has mapped, /proc/self/pagemap tells; the guest is told with what Linux has shown.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

use abi::layout::{PAGE_SIZE, USER_MIN};
use abi::oracle::{ARENA, Area, FENCE, HEAP, HEAP_BYTES, LOOKED_AT, MAX_WORDS, TOP, looked_at};

use super::interpret::{READABLE, fault};
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
/// Bytes of a page at which a word is read: where stores aim at.
const WORDS_OF_PAGE: [u64; 4] = [0, 8, PAGE_SIZE / 2, PAGE_SIZE - 8];

/// Pages of a piece, as bits.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pages {
    /// In memory.
    pub(crate) resident: u64,
    /// Mapped on Linux.
    pub(crate) mapped: u64,
    /// Of these, what this kernel has put elsewhere and a look would bring back.
    pub(crate) elsewhere: u64,
}

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

    /// Words of the map so far.
    fn of_map(&self) -> usize {
        self.used - 1 - self.words[0] as usize
    }

    /// Adds the map with its pages. What is said of those of a piece that mincore has found, `known` makes out of them, the index
    /// of the word in the map and the piece; `on_linux` tells what Linux has shown there.
    pub(super) fn map<S: Sys>(
        &mut self,
        sys: &S,
        heap: u64,
        known: impl Fn(usize, (u64, u64), u64) -> Pages,
        on_linux: impl Fn(usize) -> u64,
    ) {
        for_each_area(sys, heap, |area| {
            self.push(seen(heap, area.start));
            self.push(seen(heap, area.end) | area.flags);
            for piece in looked_at(area.start, area.end) {
                let (start, pages) = piece;
                // What is folded could not be told to the guest.
                let has_room = self.used + 2 + pages as usize <= MAX_WORDS;
                let known = if has_room {
                    known(self.of_map(), piece, in_memory(sys, piece))
                } else {
                    Pages::default()
                };
                let all = u64::MAX >> (LOOKED_AT - pages);
                let is_readable = area.flags & READABLE != 0;
                let read = if is_readable { known.mapped & all } else { 0 };
                self.push(known.resident & all);
                self.push(read);
                for page in (0..pages).filter(|page| read >> page & 1 != 0) {
                    self.push(if known.elsewhere >> page & 1 != 0 {
                        on_linux(self.of_map())
                    } else {
                        content(sys, start + page * PAGE_SIZE)
                    });
                }
            }
        });
    }
}

/// What mincore says of a piece of a VMA.
fn in_memory<S: Sys>(sys: &S, (start, pages): (u64, u64)) -> u64 {
    let vector = [const { AtomicU64::new(0) }; LOOKED_AT as usize / 8];
    let used = &vector[..pages.div_ceil(8) as usize];
    // For what is mapped it never fails; where it does, it says of no page that it is there.
    let _ = sys.lend(used, |vector| sys.mincore(start, pages, vector));
    let byte = |page: u64| vector[page as usize / 8].load(Relaxed) >> (page % 8 * 8);
    (0..pages).fold(0, |all, page| all | (byte(page) & 1) << page)
}

/// Some words of a page in one. They are small numbers in a case mostly, which lie side by side in it then.
fn content<S: Sys>(sys: &S, page: u64) -> u64 {
    let mut all = 0;
    for (index, offset) in WORDS_OF_PAGE.into_iter().enumerate() {
        match sys.read(page + offset) {
            Ok(word) => all ^= word.rotate_left(16 * index as u32),
            Err(it) => return fault(it),
        }
    }
    all
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
