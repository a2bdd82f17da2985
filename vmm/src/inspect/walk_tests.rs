use std::collections::HashMap;

use abi::layout::PAGE_SIZE;
use proptest::prelude::*;

use super::*;
use crate::inspect::MemoryImage;

const USER_TABLE: PteFlags = PteFlags::PRESENT
    .union(PteFlags::WRITE)
    .union(PteFlags::USER);

/// Page tables whose pages are taken one after another.
struct Tables {
    memory: MemoryImage,
    next: u64,
}

const CR3: u64 = 0x1000;

impl Tables {
    fn new(frames: u64) -> Self {
        Self {
            memory: MemoryImage::new(frames * PAGE_SIZE),
            next: CR3 + PAGE_SIZE,
        }
    }
    fn word(&self, gpa: u64) -> Pte {
        Pte(self.memory.word(gpa).unwrap().load(Relaxed))
    }
    fn set(&self, gpa: u64, entry: Pte) {
        self.memory.word(gpa).unwrap().store(entry.0, Relaxed);
    }
    fn map(&mut self, gva: u64, level: u8, entry: Pte) {
        let mut table = CR3;
        for above in (level + 1..=4).rev() {
            let at = table + 8 * index(gva, above) as u64;
            if self.word(at).is_none() {
                self.set(at, Pte::new(self.next, USER_TABLE));
                self.next += PAGE_SIZE;
            }
            table = self.word(at).address();
        }
        self.set(table + 8 * index(gva, level) as u64, entry);
    }
}

fn leaf(gpa: u64, flags: PteFlags) -> Pte {
    Pte::new(gpa, flags | PteFlags::PRESENT)
}

#[test]
fn translates_each_page_size() {
    let mut tables = Tables::new(64);
    let huge = PteFlags::HUGE | PteFlags::WRITE;
    tables.map(0x40_0000, 1, leaf(0x9000, PteFlags::USER));
    tables.map(0x8000_0000, 2, leaf(0x20_0000, huge));
    tables.map(0xffff_8880_0000_0000, 3, leaf(0x4000_0000, huge));
    let gpa = |gva| match translate(&tables.memory, CR3, gva).result {
        Translation::Mapped { gpa, level, .. } => (gpa, level),
        other => panic!("{other:?}"),
    };
    assert_eq!(gpa(0x40_0123), (0x9123, 1));
    assert_eq!(gpa(0x8012_3456), (0x32_3456, 2));
    assert_eq!(gpa(0xffff_8880_1234_5678), (0x5234_5678, 3));
}

#[test]
fn a_walk_says_where_it_ends() {
    let mut tables = Tables::new(64);
    tables.map(0x40_0000, 1, leaf(0x9000, PteFlags::USER));
    tables.map(0x60_0000, 2, Pte::new(1 << 45, PteFlags::PRESENT));
    tables.map(0x80_0000, 2, leaf(0x2000, PteFlags::HUGE));
    let end = |gva| translate(&tables.memory, CR3 | 0xfff, gva);
    assert_eq!(end(0x40_1000).result, Translation::NotPresent { level: 1 });
    assert_eq!(end(0x40_1000).steps.len(), 4);
    assert_eq!(end(1 << 40).result, Translation::NotPresent { level: 4 });
    let outside = Translation::TableOutside {
        level: 1,
        gpa: 1 << 45,
    };
    assert_eq!(end(0x60_0000).result, outside);
    assert_eq!(end(0x80_0000).result, Translation::Reserved { level: 2 });
    assert_eq!(end(1 << 47).result, Translation::NotCanonical);
}

#[test]
fn rights_are_those_of_all_levels() {
    let mut tables = Tables::new(64);
    tables.map(0x40_0000, 1, leaf(0x9000, PteFlags::USER | PteFlags::WRITE));
    let rights = |tables: &Tables| match translate(&tables.memory, CR3, 0x40_0000).result {
        Translation::Mapped { rights, .. } => rights,
        other => panic!("{other:?}"),
    };
    assert_eq!(rights(&tables), Rights::ALL);
    let top = tables.word(CR3).without(PteFlags::WRITE);
    tables.set(CR3, top.with(PteFlags::NO_EXECUTE));
    let restricted = Rights {
        write: false,
        user: true,
        execute: false,
    };
    assert_eq!(rights(&tables), restricted);
}

#[test]
fn a_range_is_visited_to_its_edges_and_no_further() {
    let mut tables = Tables::new(64);
    for page in 0..8 {
        tables.map(
            0x3f_c000 + page * PAGE_SIZE,
            1,
            leaf(0x9000, PteFlags::USER),
        );
    }
    let visited = |range| {
        let mut gvas = Vec::new();
        for_each_leaf(&tables.memory, CR3, range, |leaf| gvas.push(leaf.gva));
        gvas
    };
    assert_eq!(
        visited(0x3f_e000..=0x40_0fff),
        [0x3f_e000, 0x3f_f000, 0x40_0000]
    );
    assert_eq!(visited(0x3f_efff..=0x3f_efff), [0x3f_e000]);
    assert_eq!(visited(0..=u64::MAX).len(), 8);
    assert_eq!(
        visited(0..=1 << 50).len(),
        8,
        "an end in the hole is clipped"
    );
    assert_eq!(visited(1 << 50..=u64::MAX).len(), 0);
    #[expect(clippy::reversed_empty_ranges)]
    let nothing = visited(0x40_0000..=0x3f_0000);
    assert_eq!(nothing.len(), 0);
}

#[test]
fn tables_come_with_the_entry_that_refers_to_them() {
    let mut tables = Tables::new(64);
    tables.map(0x40_0000, 1, leaf(0x9000, PteFlags::USER));
    let mut seen = Vec::new();
    for_each_table(&tables.memory, CR3, USER_HALF, |table| seen.push(table));
    assert_eq!(
        seen.iter().map(|table| table.level).collect::<Vec<_>>(),
        [4, 3, 2, 1]
    );
    assert_eq!(seen[0].parent_entry, 0);
    for table in &seen[1..] {
        assert_eq!(tables.word(table.parent_entry).address(), table.gpa);
    }
}

#[test]
fn a_table_full_of_itself_is_entered_once() {
    let tables = Tables::new(64);
    for slot in 0..512 {
        tables.set(CR3 + 8 * slot, Pte::new(CR3, USER_TABLE));
    }
    let space = AddressSpace::read(&tables.memory, CR3, 0..=u64::MAX);
    assert_eq!(space.tables.len(), 1);
    assert_eq!(space.anomalies.len(), MAX_ANOMALIES);
    assert_eq!(space.anomalies[0].problem, WalkProblem::TableTwice);
}

#[test]
fn a_root_outside_memory_is_an_anomaly() {
    let tables = Tables::new(4);
    let space = AddressSpace::read(&tables.memory, 1 << 40, USER_HALF);
    assert_eq!(space.anomalies[0].problem, WalkProblem::TableOutside);
    assert_eq!(space.anomalies[0].level, 5);
}

proptest! {
    /// The visit and the single translation agree on what is mapped.
    #[test]
    fn visit_agrees_with_translate(pages in prop::collection::vec((0u64..1 << 36, 1u64..64), 1..50)) {
        let mut tables = Tables::new(256);
        let mut expected = HashMap::new();
        for (page, frame) in pages {
            let gva = canonical(page << 12);
            tables.map(gva, 1, leaf(frame * PAGE_SIZE, PteFlags::USER));
            expected.insert(gva, frame * PAGE_SIZE);
        }
        let mut last = None;
        let mut found = HashMap::new();
        let anomalies = for_each_leaf(&tables.memory, CR3, 0..=u64::MAX, |leaf| {
            assert!(last < Some(leaf.gva), "in order");
            last = Some(leaf.gva);
            found.insert(leaf.gva, leaf.target());
            let end = translate(&tables.memory, CR3, leaf.gva).result;
            assert!(matches!(end, Translation::Mapped { gpa, .. } if gpa == leaf.target()));
        });
        prop_assert!(anomalies.is_empty());
        prop_assert_eq!(found, expected);
    }

    /// Whatever lies in memory, a visit ends after at most one look at each word.
    #[test]
    fn random_memory_is_visited_in_bounded_work(words in prop::collection::vec(any::<u64>(), 2048)) {
        let tables = Tables::new(16);
        for (slot, word) in (0u64..).zip(words) {
            // Half of the words are pointers into this memory, so that walks get far.
            let word = if word & 8 == 0 { word & 0x80 | (word & 0xf000) | 7 } else { word };
            tables.set(slot * 32, Pte(word));
        }
        struct Count(u64);
        impl Visitor for Count {
            fn leaf(&mut self, _: Leaf) {
                self.0 += 1;
            }
        }
        let mut count = Count(0);
        let visited = visit(&tables.memory, CR3, 0..=u64::MAX, &mut count);
        prop_assert!(visited.tables <= 16);
        prop_assert!(count.0 <= visited.slots && visited.slots <= 16 * 512);
    }
}
