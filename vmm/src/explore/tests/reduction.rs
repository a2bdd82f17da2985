use std::collections::BTreeSet;

use proptest::prelude::*;

use crate::explore::strategy::{Bounds, Exhaustive, Explored, Reduction};
use crate::explore::testing::{Op, driver, scripts};
use crate::explore::{Ending, Limits};

/// All outcomes within the bounds, and what the search came to.
fn outcomes(
    scripts: &[Vec<Op>],
    preemptions: Option<u32>,
    reduction: Reduction,
    most: u64,
) -> (BTreeSet<Vec<u64>>, Explored) {
    let mut driver = driver(scripts);
    let bounds = Bounds {
        preemptions,
        ..Bounds::default()
    };
    let mut search = Exhaustive::new(bounds, reduction);
    let mut found = BTreeSet::new();
    while let Some(run) = driver.execute(&mut search, &mut []).unwrap() {
        match run.ending {
            Ending::Finished { .. } => {
                found.insert(driver.engine().outcome());
            }
            Ending::ScheduleOver => {}
            // The fake's scripts drop their locks and end: nothing else may come of them.
            other => panic!("{other:?}"),
        }
        driver.recycle(run);
        if search.explored().executions >= most {
            break;
        }
    }
    (found, search.explored())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn reduction_loses_no_outcome_within_a_bound(
        scripts in scripts(2, 2),
        preemptions in 0u32..4,
    ) {
        let (all, plain) = outcomes(&scripts, Some(preemptions), Reduction::None, 60_000);
        prop_assume!(plain.exhausted);
        let (some, reduced) = outcomes(&scripts, Some(preemptions), Reduction::Traces, 60_000);
        prop_assert!(reduced.exhausted);
        prop_assert_eq!(&all, &some, "plain {:?} reduced {:?}", plain, reduced);
        prop_assert!(reduced.executions <= plain.executions);
    }

    #[test]
    fn reduction_loses_no_outcome_with_three(
        scripts in scripts(3, 1),
        preemptions in 0u32..3,
    ) {
        let (all, plain) = outcomes(&scripts, Some(preemptions), Reduction::None, 60_000);
        prop_assume!(plain.exhausted);
        let (some, reduced) = outcomes(&scripts, Some(preemptions), Reduction::Traces, 60_000);
        prop_assert!(reduced.exhausted);
        prop_assert_eq!(&all, &some, "plain {:?} reduced {:?}", plain, reduced);
    }

    #[test]
    fn reduction_loses_no_outcome_without_a_bound(scripts in scripts(2, 1)) {
        let (all, plain) = outcomes(&scripts, None, Reduction::None, 60_000);
        prop_assume!(plain.exhausted);
        let (some, reduced) = outcomes(&scripts, None, Reduction::Traces, 60_000);
        prop_assert!(reduced.exhausted);
        prop_assert_eq!(&all, &some);
    }
}

#[test]
fn independent_threads_need_few_executions() {
    let own = |frame| vec![Op::Double(frame); 3];
    let scripts = [own(0), own(1), own(2)];
    let (all, plain) = outcomes(&scripts, Some(2), Reduction::None, u64::MAX);
    let (some, reduced) = outcomes(&scripts, Some(2), Reduction::Traces, u64::MAX);
    assert_eq!((all.len(), &all), (1, &some));
    let completed = reduced.executions - reduced.pruned;
    assert!(
        reduced.executions * 2 < plain.executions && completed * 8 < plain.executions,
        "{reduced:?} against {plain:?}"
    );
}

#[test]
fn a_bound_is_kept_and_a_larger_one_finds_more() {
    // 1, 2, 4, … in every order of sets and doublings that the bound allows.
    let scripts = [
        vec![Op::Set(0, 1), Op::Double(0), Op::Double(0)],
        vec![Op::Set(0, 3), Op::Double(0), Op::Double(0)],
    ];
    let found = |bound| {
        outcomes(&scripts, bound, Reduction::Traces, u64::MAX)
            .0
            .len()
    };
    let (none, one, all) = (found(Some(0)), found(Some(1)), found(None));
    assert!(none < one && one < all, "{none} {one} {all}");
}

#[test]
fn the_bound_on_steps_ends_the_variation() {
    let scripts = [vec![Op::Double(0); 6], vec![Op::Set(0, 1); 6]];
    let mut driver = driver(&scripts);
    let bounds = Bounds {
        steps: 4,
        ..Bounds::default()
    };
    let mut search = Exhaustive::new(bounds, Reduction::Traces);
    while driver.execute(&mut search, &mut []).unwrap().is_some() {}
    let explored = search.explored();
    assert!(
        explored.exhausted && explored.too_long > 0 && explored.executions < 30,
        "{explored:?}"
    );
    assert!(Limits::default().points > 4);
}
