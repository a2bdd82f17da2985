//! What a step showed, out of the words of the interpreter (`guest::programs::oracle`).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use abi::layout::PAGE_SIZE;
use abi::oracle::{ARENA, FENCE, HEAP, HEAP_BYTES, TOP, looked_at};
use abi::syscall::decode;

use super::calls::CALLS;
use super::case::{Step, lines};

/// What an access shows that would have been a SIGSEGV, and one that would have been a SIGBUS.
const FAULT: u64 = u64::from_le_bytes(*b"segfault");
const BUS: u64 = u64::from_le_bytes(*b"buserror");
/// Bits of a VMA's flags, in the low bits of its end.
const FLAGS: u64 = PAGE_SIZE - 1;

/// One VMA of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// First address.
    pub start: u64,
    /// First address past it.
    pub end: u64,
    /// READ, WRITE, EXEC and SHARED.
    pub flags: u64,
}

/// The words of a step, taken apart.
#[derive(Clone, Copy, Debug)]
pub struct Observation<'a> {
    /// The result.
    pub result: &'a [u64],
    map: &'a [u64],
}

/// What was seen of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// It is in memory.
    pub is_resident: bool,
    /// What was read, where it was.
    pub content: Option<u64>,
}

impl<'a> Observation<'a> {
    /// Takes `words` apart; those of a hostile guest may mean anything.
    #[must_use]
    pub fn new(words: &'a [u64]) -> Self {
        let (count, rest) = words.split_first().unwrap_or((&0, &[]));
        let count = (*count as usize).min(rest.len());
        let (result, map) = rest.split_at(count);
        Self { result, map }
    }

    /// The VMAs.
    pub fn areas(&self) -> impl Iterator<Item = Area> + use<'a> {
        let mut rest = self.map;
        std::iter::from_fn(move || area(&mut rest, |_, _| ()))
    }

    /// The pages that were in memory, or read.
    #[must_use]
    pub fn pages(&self) -> BTreeMap<u64, Page> {
        let mut pages = BTreeMap::new();
        let mut rest = self.map;
        while area(&mut rest, |at, page| {
            if page != Page::default() {
                pages.insert(at, page);
            }
        })
        .is_some()
        {}
        pages
    }

    /// How many VMAs were split and merged by a step that led from `before` to here: bounds inside
    /// what is mapped without a hole on both sides, that have come or gone.
    #[must_use]
    pub fn changes_since(&self, before: &Self) -> (u64, u64) {
        let bounds = |it: &Self| -> Vec<u64> {
            let areas: Vec<Area> = it.areas().collect();
            let pairs = areas.windows(2);
            pairs
                .filter(|pair| pair[0].end == pair[1].start)
                .map(|pair| pair[1].start)
                .collect()
        };
        let within = |it: &Self, at: u64| it.areas().any(|area| area.start < at && at < area.end);
        let come = bounds(self)
            .iter()
            .filter(|at| within(before, **at))
            .count();
        let gone = bounds(before)
            .iter()
            .filter(|at| within(self, **at))
            .count();
        (come as u64, gone as u64)
    }

    /// The result of `step` in words.
    #[must_use]
    pub fn result_text(&self, step: &OneStep<'_>) -> String {
        match (step, self.result) {
            (_, []) => "nothing".into(),
            (OneStep::Of(Step::Call { call, .. }), [value]) => match decode(*value) {
                Err(errno) => format!("-{errno}"),
                Ok(value) if CALLS[*call].returns == abi::oracle::Returns::Number => {
                    value.to_string()
                }
                Ok(address) => place(address),
            },
            (OneStep::Of(Step::Recorded(_)), [value]) => match decode(*value) {
                Err(errno) => format!("-{errno}"),
                Ok(address) => place(address),
            },
            (OneStep::Of(Step::Store(..)), [0]) => "stored".into(),
            (OneStep::Of(Step::FileStore(..) | Step::Limit(..)), [value]) => number(*value),
            (OneStep::Of(Step::FileLoad(..)), [bytes, value]) => match decode(*bytes) {
                Ok(0) => "no bytes".into(),
                Ok(_) => format!("{value:#x} ({bytes} bytes)"),
                Err(errno) => format!("-{errno}"),
            },
            (OneStep::Of(Step::Fork(_)), [status]) => match decode(*status) {
                Err(errno) => format!("-{errno}"),
                Ok(status) => format!("the child ended with wait status {status:#x}"),
            },
            (OneStep::Contents, words) => {
                let pairs = words.chunks(2).map(|pair| match pair {
                    [at, value] => format!("{}: {}", place(*at), word(*value)),
                    rest => format!("{rest:x?}"),
                });
                pairs.collect::<Vec<_>>().join(", ")
            }
            (_, words) => words
                .iter()
                .map(|it| word(*it))
                .collect::<Vec<_>>()
                .join(" "),
        }
    }

    /// The map as text: a line for each VMA.
    #[must_use]
    pub fn map_lines(&self) -> Vec<String> {
        let lines = self.areas().map(|area| {
            let mut flags = String::new();
            for (bit, letter) in [(1, 'r'), (2, 'w'), (4, 'x')] {
                flags.push(if area.flags & bit != 0 { letter } else { '-' });
            }
            flags.push(if area.flags & 8 != 0 { 's' } else { 'p' });
            let pages = (area.end.wrapping_sub(area.start)) / PAGE_SIZE;
            let mut line = format!("{}..{}", place(area.start), place(area.end));
            let _ = write!(
                line,
                " {flags} {pages} page{}",
                if pages == 1 { "" } else { "s" }
            );
            line
        });
        lines.collect()
    }
}

/// Takes the first VMA off `words`, and tells of each of its pages that is looked at.
fn area(words: &mut &[u64], mut each: impl FnMut(u64, Page)) -> Option<Area> {
    let (&[start, end], mut rest) = words.split_first_chunk()?;
    let area = Area {
        start,
        end: end & !FLAGS,
        flags: end & FLAGS,
    };
    for (start, pages) in looked_at(area.start, area.end) {
        let (&[resident, read], behind) = rest.split_first_chunk()?;
        let mut contents = behind.iter();
        for page in 0..pages {
            let is_set = |bits: u64| bits >> page & 1 != 0;
            let seen = Page {
                is_resident: is_set(resident),
                content: is_set(read).then(|| contents.next().copied()).flatten(),
            };
            each(start.wrapping_add(page * PAGE_SIZE), seen);
        }
        rest = contents.as_slice();
    }
    *words = rest;
    Some(area)
}

/// What two sides have seen of the pages of which they have not seen the same: a line for each.
#[must_use]
pub fn page_lines(sides: [(&str, &Observation<'_>); 2]) -> Vec<String> {
    let pages = sides.map(|(_, seen)| seen.pages());
    let places: BTreeSet<u64> = pages.iter().flat_map(BTreeMap::keys).copied().collect();
    let mut lines = Vec::new();
    for at in places {
        let [one, other] =
            [&pages[0], &pages[1]].map(|it| it.get(&at).copied().unwrap_or_default());
        if one != other {
            let texts = [(sides[0].0, one), (sides[1].0, other)]
                .map(|(name, page)| format!("{name}: {}", page.text()));
            lines.push(format!("{}  {}", place(at), texts.join("; ")));
        }
    }
    lines
}

impl Page {
    fn text(self) -> String {
        let resident = if self.is_resident {
            "in memory"
        } else {
            "not in memory"
        };
        match self.content {
            Some(content) => format!("{resident}, has {}", word(content)),
            None => resident.into(),
        }
    }
}

/// A step of an encoded case.
#[derive(Clone, Copy, Debug)]
pub enum OneStep<'a> {
    /// One that was drawn.
    Of(&'a Step),
    /// The look at the end of a process.
    Contents,
}

/// The steps in the order in which they are encoded.
#[must_use]
pub fn flat(steps: &[Step]) -> Vec<OneStep<'_>> {
    fn into<'a>(steps: &'a [Step], all: &mut Vec<OneStep<'a>>) {
        for step in steps {
            all.push(OneStep::Of(step));
            if let Step::Fork(body) = step {
                into(body, all);
            }
        }
        all.push(OneStep::Contents);
    }
    let mut all = Vec::new();
    into(steps, &mut all);
    debug_assert_eq!(all.len(), lines(steps).len());
    all
}

/// True where a word says that an access would have been a signal.
pub(super) fn is_fault(word: u64) -> bool {
    word == FAULT || word == BUS
}

fn number(value: u64) -> String {
    match decode(value) {
        Ok(value) => value.to_string(),
        Err(errno) => format!("-{errno}"),
    }
}

fn word(value: u64) -> String {
    match value {
        FAULT => "SIGSEGV".into(),
        BUS => "SIGBUS".into(),
        value => format!("{value:#x}"),
    }
}

/// An address, relative to what a case names.
fn place(address: u64) -> String {
    const TIB: u64 = 1 << 40;
    let relative = |name: &str, base: u64| match address.wrapping_sub(base).cast_signed() {
        0 => name.to_owned(),
        offset @ 1.. => format!("{name}+{offset:#x}"),
        offset => format!("{name}-{:#x}", offset.unsigned_abs()),
    };
    if address.abs_diff(ARENA) <= TIB {
        relative("arena", ARENA)
    } else if address.wrapping_sub(HEAP - HEAP_BYTES) <= 2 * HEAP_BYTES {
        relative("heap", HEAP)
    } else if (TOP - 8 * TIB..FENCE + (1 << 30)).contains(&address) {
        relative("top", TOP)
    } else {
        format!("{address:#x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(areas: &[(u64, u64, u64)]) -> Vec<u64> {
        let untouched = areas.iter().flat_map(|(start, end, flags)| {
            let (start, end) = (ARENA + start * PAGE_SIZE, ARENA + end * PAGE_SIZE);
            [start, end | flags, 0, 0]
        });
        [1, 0].into_iter().chain(untouched).collect()
    }

    #[test]
    fn a_wrong_byte_of_mincore_and_wrong_contents_are_told_by_page() {
        let (start, end) = (ARENA, ARENA + 70 * PAGE_SIZE);
        // Two pieces: 64 pages, and 6.
        let linux = [0, start, end | 3, 0b111, 0b101, 7, 8, 0b10, 0];
        let seen = |change: &[(usize, u64)]| {
            let mut guest = linux;
            for (index, word) in change {
                guest[*index] = *word;
            }
            let sides = [Observation::new(&linux), Observation::new(&guest)];
            page_lines([("Linux", &sides[0]), ("guest", &sides[1])])
        };
        assert_eq!(seen(&[]), [""; 0]);
        let content = "arena+0x2000  Linux: in memory, has 0x8; guest: in memory, has 0x9";
        assert_eq!(seen(&[(6, 9)]), [content]);
        let byte = "arena+0x1000  Linux: in memory; guest: not in memory";
        assert_eq!(seen(&[(3, 0b101)]), [byte]);
        let last = "arena+0x41000  Linux: in memory; guest: not in memory";
        assert_eq!(seen(&[(7, 0)]), [last]);
        assert_eq!(seen(&[(6, 9), (3, 0b101), (7, 0)]), [byte, content, last]);
        assert_eq!(Observation::new(&linux).areas().count(), 1);
    }

    #[test]
    fn splits_and_merges_are_counted_apart_from_new_neighbours() {
        let changes = |before: &[_], after: &[_]| {
            let (before, after) = (words(before), words(after));
            Observation::new(&after).changes_since(&Observation::new(&before))
        };
        let whole = [(0, 4, 3)];
        let split = [(0, 1, 3), (1, 2, 1), (2, 4, 3)];
        assert_eq!(changes(&whole, &split), (2, 0));
        assert_eq!(changes(&split, &whole), (0, 2));
        // A hole is no split of what is left, and a neighbour that comes is none either.
        assert_eq!(changes(&whole, &[(0, 1, 3), (2, 4, 3)]), (0, 0));
        assert_eq!(changes(&whole, &[(0, 4, 3), (4, 5, 1)]), (0, 0));
    }

    #[test]
    fn a_hostile_observation_is_shown_without_a_panic() {
        for words in [
            &[][..],
            &[5],
            &[u64::MAX, 1],
            &[0, u64::MAX, 0, 7],
            &[3, 1, 2, 3],
        ] {
            let seen = Observation::new(words);
            let _ = (seen.map_lines(), seen.pages());
            for step in [OneStep::Contents, OneStep::Of(&Step::Fork(vec![]))] {
                assert!(!seen.result_text(&step).is_empty() || matches!(step, OneStep::Contents));
            }
        }
    }

    #[test]
    fn maps_are_shown_relative_to_what_a_case_names() {
        let words = words(&[(0, 2, 3), (5, 6, 8)]);
        let lines = Observation::new(&words).map_lines();
        assert_eq!(
            lines,
            [
                "arena..arena+0x2000 rw-p 2 pages",
                "arena+0x5000..arena+0x6000 ---s 1 page"
            ]
        );
        assert_eq!(place(TOP - PAGE_SIZE), "top-0x1000");
        assert_eq!(place(HEAP + 1), "heap+0x1");
        assert_eq!(place(0x1234), "0x1234");
    }
}
