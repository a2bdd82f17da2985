//! `docs/invariants.md` says what the code does.

use std::collections::BTreeSet;

use crate::check::{Family, all, described};

const DOCUMENT: &str = include_str!("../../../../docs/invariants.md");
const SEAMS: &str = include_str!("../../../../docs/seams.md");
const TESTS: &str = concat!(
    include_str!("pagetable.rs"),
    include_str!("frames.rs"),
    include_str!("huge.rs"),
    include_str!("rmap.rs"),
    include_str!("vma.rs"),
    include_str!("lifetime.rs"),
    include_str!("files.rs"),
    include_str!("non_present.rs"),
    include_str!("swap.rs"),
    include_str!("kswapd.rs"),
    include_str!("groups.rs"),
    include_str!("writeback.rs"),
);
/// Tests of rules on the stream, beside the monitors.
const STREAM_TESTS: &str = concat!(
    include_str!("../stream/tlb/tests.rs"),
    include_str!("../stream/tlb/tests/pcid.rs"),
    include_str!("../stream/tlb/tests/huge.rs"),
    include_str!("../stream/locks.rs"),
    include_str!("../stream/order.rs"),
    include_str!("../stream/lifetime.rs"),
    include_str!("../stream/folio.rs"),
    include_str!("../stream/walk.rs"),
    include_str!("../stream/rcu.rs"),
    include_str!("../stream/rmap.rs"),
    include_str!("../stream/migration.rs"),
    include_str!("../stream/groups.rs"),
    include_str!("../stream/vma_lock.rs"),
);

/// The cells of the table's rows.
fn rows() -> Vec<Vec<&'static str>> {
    let rows = rows_of(DOCUMENT);
    rows.filter(|cells| cells[0] != "ID").collect()
}

fn rows_of(document: &'static str) -> impl Iterator<Item = Vec<&'static str>> {
    let lines = document.lines().filter(|line| line.starts_with("| "));
    lines.map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect())
}

#[test]
fn the_document_lists_the_registry() {
    let written: Vec<_> = rows().iter().map(|cells| cells[..4].join(" | ")).collect();
    let registered: Vec<_> = described()
        .map(|invariant| {
            assert!(!invariant.source.is_empty(), "{}", invariant.id);
            let applies = invariant.applies;
            [invariant.id, invariant.predicate, applies, invariant.source].join(" | ")
        })
        .collect();
    assert_eq!(
        written, registered,
        "copy the right side to docs/invariants.md"
    );
}

#[test]
fn every_invariant_has_a_test_that_makes_it_fire() {
    let of_states = all().count();
    for cells in &rows()[of_states..] {
        let test = format!("fn {}()", cells[4].trim_matches('`'));
        let body = STREAM_TESTS
            .split("#[test]")
            .find(|body| body.contains(&test));
        let body = body.unwrap_or_else(|| panic!("there is no test {test}"));
        assert!(
            body.contains(&format!("\"{}\"", cells[0])),
            "{test}: {}",
            cells[0]
        );
    }
    for cells in &rows()[..of_states] {
        let test = cells[4].trim_matches('`');
        let id = cells[0].replace('-', "").to_lowercase();
        assert!(
            test.starts_with(&id),
            "{test} is not a test of {}",
            cells[0]
        );
        assert!(
            TESTS.contains(&format!("fn {test}()")),
            "there is no test {test}"
        );
    }
}

/// docs/seams.md: the tests of a row are those of its rules.
#[test]
fn the_seams_name_the_tests_of_their_rules() {
    let rules = rows();
    let test_of = |id: &str| {
        let rule = rules.iter().find(|cells| cells[0] == id);
        rule.unwrap_or_else(|| panic!("there is no {id}"))[4]
    };
    let is_rule = |word: &&str| matches!(word.as_bytes(), [b'A'..=b'Z', b'-', ..]);
    let mut compared = 0;
    for cells in rows_of(SEAMS).filter(|cells| cells.len() == 4) {
        let named: Vec<_> = cells[2].split(", ").filter(is_rule).collect();
        if !named.is_empty() {
            let tests: Vec<_> = named.into_iter().map(test_of).collect();
            assert_eq!(cells[3], tests.join(", "), "{}", cells[0]);
            compared += 1;
        }
    }
    assert!(compared > 0);
}

#[test]
fn ids_are_unique_and_their_letter_is_the_family() {
    let mut seen = BTreeSet::new();
    for invariant in all() {
        assert!(seen.insert(invariant.id), "{} twice", invariant.id);
        let letter = match invariant.family {
            Family::PageTables => 'P',
            Family::Rmap => 'R',
            Family::Vma => 'V',
            Family::Lifetime => 'L',
            Family::NonPresent => 'S',
            Family::Groups => 'G',
        };
        assert!(invariant.id.starts_with(letter));
    }
    for invariant in described() {
        assert!(!invariant.predicate.contains('\n') && !invariant.predicate.contains('|'));
        seen.remove(invariant.id);
    }
    assert!(seen.is_empty());
    let ids: BTreeSet<_> = described().map(|invariant| invariant.id).collect();
    assert_eq!(ids.len(), described().count());
}
