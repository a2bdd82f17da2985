//! The words of the region: who may have written them, and what must stay.

use core::sync::atomic::Ordering;

use abi::channel::ReportKind::{ChangedUnderneath, ForeignFrame};
use abi::layout::PAGE_SIZE;

use super::{MAX_OWNERS, SUBJECT_GVA, Shared, file};
use crate::sys::Sys;
use crate::tag::{Region, SLOTS, Tag, address};
use crate::team::Findings;

/// A thread, its words and what it draws from.
pub(super) struct Owner<'a, S> {
    pub(super) sys: &'a S,
    pub(super) shared: &'a Shared,
    pub(super) index: usize,
    random: u64,
    written: u64,
    /// Whether others are told how many values it has written.
    tells: bool,
    /// What it wrote last into its word of each page of the file.
    pub(super) file: [Option<u64>; file::PAGES as usize],
}

/// Pages that a thread has to itself at a time, at most.
pub(super) const MAX_TAKEN: u64 = 4;

/// All words of some pages, with those that faulted.
type Seen = [Option<u64>; MAX_TAKEN as usize * MAX_OWNERS];

impl<'a, S: Sys> Owner<'a, S> {
    pub(super) fn new(sys: &'a S, shared: &'a Shared, index: usize) -> Self {
        Self {
            sys,
            shared,
            index,
            random: mix(shared.seed ^ (index as u64 + 1) << 48),
            written: 0,
            tells: true,
            file: [None; file::PAGES as usize],
        }
    }

    /// The same in a forked child, which looks at nothing but what is its own. It tells nobody: where parent and child
    /// are one program of the host (the model engine), the numbers are still the parent's.
    pub(super) fn forked(sys: &'a S, shared: &'a Shared, index: usize) -> Self {
        Self {
            tells: false,
            ..Self::new(sys, shared, index)
        }
    }

    /// A number below `bound`.
    pub(super) fn draw(&mut self, bound: u64) -> u64 {
        self.random = mix(self.random);
        self.random % bound
    }

    /// Writes a new value into the own word of `page` of the region. False where it faulted.
    pub(super) fn write(&mut self, page: u64) -> bool {
        self.write_at(address(SUBJECT_GVA, page, self.index as u64), page)
            .is_some()
    }

    /// Writes one at `gva`, which may lie elsewhere than in page `page`; returns it where that did not fault.
    fn write_at(&mut self, gva: u64, page: u64) -> Option<u64> {
        let tag = Tag {
            region: Region::Subject,
            generation: self.number(),
            page,
            slot: self.index as u64,
        };
        let value = tag.encode();
        self.sys.write(gva, value).is_ok().then_some(value)
    }

    /// The number of the next value.
    pub(super) fn number(&mut self) -> u64 {
        self.written += 1;
        if self.tells {
            // Before the value is there for anybody to see.
            self.shared.written[self.index].store(self.written, Ordering::Release);
        }
        self.written
    }

    /// Reads all words of `page` of the region. False where that faulted.
    pub(super) fn read(&self, page: u64) -> bool {
        for slot in 0..self.shared.owners as u64 {
            let gva = address(SUBJECT_GVA, page, slot);
            let Ok(found) = self.sys.read(gva) else {
                return false;
            };
            let written = self.shared.written[slot as usize].load(Ordering::Acquire);
            if !self.is_legal(slot, found, Some(written)) {
                let findings = &self.shared.findings;
                findings.report(self.sys, ForeignFrame, gva, written, found);
            }
        }
        true
    }

    /// True where word `slot` of a page may hold `value`, when its owner has written so many values.
    fn is_legal(&self, slot: u64, value: u64, written: Option<u64>) -> bool {
        let place = value >> 16 & 0xffff;
        let tag = Tag {
            region: Region::Subject,
            generation: 0,
            page: place / SLOTS,
            slot,
        };
        value == 0
            || tag.page < self.shared.pages
                && tag
                    .generation_of(value)
                    .is_some_and(|number| written.is_none_or(|written| number <= written))
    }

    /// Looks at `pages` pages at `base`, which only this thread reaches, again and again.
    pub(super) fn watch(&mut self, findings: &Findings, base: u64, pages: u64) {
        let mut seen: Seen = [None; MAX_TAKEN as usize * MAX_OWNERS];
        let owners = self.shared.owners as u64;
        let places = || (0..pages).flat_map(|page| (0..owners).map(move |slot| (page, slot)));
        for ((page, slot), word) in places().zip(&mut seen) {
            let gva = address(base, page, slot);
            *word = self.sys.read(gva).ok();
            if let Some(found) = *word
                && !self.is_legal(slot, found, None)
            {
                findings.report(self.sys, ForeignFrame, gva, 0, found);
            }
        }
        // The own words are written, the others must be as they were.
        for page in 0..pages {
            let gva = address(base, page, self.index as u64);
            if let Some(value) = self.write_at(gva, page) {
                seen[(page * owners) as usize + self.index] = Some(value);
            }
        }
        for _ in 0..self.shared.looks {
            for ((page, slot), word) in places().zip(&seen) {
                let gva = address(base, page, slot);
                let found = self.sys.read(gva).ok();
                if found != *word {
                    let [expected, found] = [*word, found].map(Option::unwrap_or_default);
                    findings.report(self.sys, ChangedUnderneath, gva, expected, found);
                }
            }
            self.sys.relax();
            if findings.enough() {
                return;
            }
        }
    }

    /// Fills pages that nobody else knows with values that belong nowhere else, and looks at them.
    pub(super) fn stamp(&self, base: u64, pages: u64) {
        let (sys, findings) = (self.sys, &self.shared.findings);
        let owners = self.shared.owners as u64;
        let tags = || {
            (0..pages).flat_map(|page| {
                (0..owners).map(move |slot| Tag {
                    region: Region::Reuse,
                    generation: self.written,
                    page,
                    slot,
                })
            })
        };
        let check = |tag: Tag, expected: u64| {
            let gva = address(base, tag.page, tag.slot);
            // A fault reads as what is never there.
            let found = sys.read(gva).unwrap_or(u64::MAX);
            if found != expected {
                findings.report(sys, ForeignFrame, gva, expected, found);
            }
        };
        tags().for_each(|tag| check(tag, 0));
        for tag in tags() {
            let gva = address(base, tag.page, tag.slot);
            if sys.write(gva, tag.encode()).is_err() {
                findings.report(sys, ForeignFrame, gva, tag.encode(), u64::MAX);
            }
        }
        for _ in 0..self.shared.looks {
            tags().for_each(|tag| check(tag, tag.encode()));
            sys.relax();
        }
    }
}

/// Address of `page` of the region.
pub(super) fn place(page: u64) -> u64 {
    SUBJECT_GVA + page * PAGE_SIZE
}

/// The finaliser of splitmix64, with its step.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}
