//! `docs/invariants.md` says what the code does.

use std::collections::BTreeSet;

use crate::check::{Family, all};

const DOCUMENT: &str = include_str!("../../../../docs/invariants.md");
const TESTS: &str = concat!(
    include_str!("pagetable.rs"),
    include_str!("frames.rs"),
    include_str!("rmap.rs"),
    include_str!("vma.rs"),
    include_str!("lifetime.rs"),
);

/// The cells of the table's rows.
fn rows() -> Vec<Vec<&'static str>> {
    let lines = DOCUMENT.lines().filter(|line| line.starts_with("| "));
    let rows = lines.map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect());
    rows.filter(|cells: &Vec<_>| cells[0] != "ID").collect()
}

#[test]
fn the_document_lists_the_registry() {
    let written: Vec<_> = rows().iter().map(|cells| cells[..4].join(" | ")).collect();
    let registered: Vec<_> = all()
        .map(|invariant| {
            let applies = invariant.applies.describe();
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
    for cells in rows() {
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
        };
        assert!(invariant.id.starts_with(letter));
        assert!(!invariant.predicate.contains('\n') && !invariant.predicate.contains('|'));
    }
}
