//! Every invariant fires when one thing is broken, and nothing else does; and nothing fires on a sound
//! guest.

mod docs;
mod files;
mod frames;
mod groups;
mod hostile;
mod huge;
mod kswapd;
mod lifetime;
mod non_present;
mod pagetable;
mod quiescence;
mod rmap;
mod swap;
mod vma;
mod writeback;

use super::world::World;

/// Breaks a sound guest with `corrupt` and requires exactly the invariants `ids` to be violated.
fn fires(ids: &[&str], corrupt: impl FnOnce(&mut World)) {
    let mut world = World::new();
    corrupt(&mut world);
    let outcome = world.judge();
    let found: Vec<_> = world.violated().into_keys().collect();
    assert_eq!(found, ids, "\n{outcome}");
    for violation in &outcome.violations {
        let text = violation.to_string();
        assert!(text.contains(violation.id) && text.contains(&violation.finding.found));
        assert!(!violation.finding.expected.is_empty() && !violation.finding.found.is_empty());
    }
}

#[test]
fn a_sound_guest_is_clean() {
    let outcome = World::new().judge();
    assert!(outcome.is_clean(), "{outcome}");
    let skipped: Vec<_> = outcome.skipped.iter().map(|skipped| skipped.id).collect();
    assert_eq!(
        skipped,
        ["L-12"],
        "nothing is in flight, so only the end is not judged"
    );
    for checked in &outcome.checked {
        assert!(
            // Of entries that are neither none nor present there are none, nor of memory groups.
            checked.examined > 0
                || checked.id == "R-04"
                || checked.id.starts_with("S-")
                || checked.id.starts_with("G-"),
            "{} looked at nothing",
            checked.id
        );
    }
}

#[test]
fn few_of_many_alike_violations_are_kept_and_all_are_counted() {
    let world = World::new();
    // Every VMA of the parent names the wrong mm.
    for ((_, _), vma) in world.vmas.iter().filter(|((mm, _), _)| *mm == world.parent) {
        world.update::<abi::objects::Vma, _>(*vma, |vma| vma.mm.set(abi::objects::Pa::new(8)));
    }
    let outcome = world.judge();
    let kept = outcome
        .violations
        .iter()
        .filter(|violation| violation.id == "V-07")
        .count();
    assert_eq!(kept, super::Findings::MAX_REPORTED);
    assert_eq!(world.violated()["V-07"], 16);
    assert!(
        outcome
            .to_string()
            .contains("V-07: 8 violations more like these")
    );
}

#[test]
fn an_outcome_is_json() {
    let world = World::new();
    world.update::<abi::objects::Mm, _>(world.parent, |mm| {
        mm.rss.store(99, std::sync::atomic::Ordering::Relaxed);
    });
    let json = serde_json::to_value(world.judge()).unwrap();
    let violation = &json["violations"][0];
    assert_eq!(violation["id"], "P-13");
    assert_eq!(violation["where"]["mm"], 1);
    assert_eq!(violation["found"], "99");
    assert_eq!(json["skipped"][0]["reason"], "the run has not ended");
}
