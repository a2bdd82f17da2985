//! The reduced search against one that runs every execution: the same final states and failures.

use std::collections::BTreeSet;

use proptest::prelude::*;

use crate::explore::campaign::failure_id;
use crate::explore::strategy::{Bounds, Exhaustive, Explored, Reduction};
use crate::explore::testing::{Fake, Op, any_scripts, driver, scripts};
use crate::explore::{Driver, Ending, Limits};

/// How an execution ended, and all that could be looked at then.
type Outcome = (Option<String>, Vec<u64>);

/// Brute force is given up after so many executions.
const MOST: u64 = 6_000;

/// A search of these scripts; all of whose executions end soon, those too in which nobody gets anywhere.
struct Search<'a> {
    scripts: &'a [Vec<Op>],
    worker: Exhaustive,
}

impl Search<'_> {
    fn new(scripts: &[Vec<Op>], preemptions: Option<u32>, reduction: Reduction) -> Search<'_> {
        let bounds = Bounds {
            preemptions,
            ..Bounds::default()
        };
        let worker = Exhaustive::new(bounds, reduction);
        Search { scripts, worker }
    }

    /// Outcomes of this worker's executions.
    fn outcomes(&mut self, most: u64) -> BTreeSet<Outcome> {
        let limits = Limits {
            idle_turns: 3 * self.scripts.len() as u64,
            ..Limits::default()
        };
        let mut driver = Driver::new(Fake::new(self.scripts), limits, true).unwrap();
        let mut found = BTreeSet::new();
        let mut executions = 0;
        while executions < most
            && let Some(run) = driver.execute(&mut self.worker, &mut []).unwrap()
        {
            executions += 1;
            if !matches!(run.ending, Ending::ScheduleOver) {
                let mut told = failure_id(&run.ending);
                if let Ending::Report { vcpu, report } = &run.ending {
                    told = Some(format!("{vcpu}: {}", report.found));
                }
                found.insert((told, driver.engine().outcome()));
            }
            driver.recycle(run);
        }
        found
    }
}

fn outcomes(
    scripts: &[Vec<Op>],
    preemptions: Option<u32>,
    reduction: Reduction,
    most: u64,
) -> (BTreeSet<Outcome>, Explored) {
    let mut search = Search::new(scripts, preemptions, reduction);
    let found = search.outcomes(most);
    (found, search.worker.explored())
}

/// As many workers as that, each with an engine of its own.
fn outcomes_of_workers(
    scripts: &[Vec<Op>],
    preemptions: Option<u32>,
    workers: usize,
) -> (BTreeSet<Outcome>, Explored) {
    let first = Search::new(scripts, preemptions, Reduction::Traces);
    let found = std::thread::scope(|scope| {
        let jobs: Vec<_> = (0..workers)
            .map(|_| {
                let worker = first.worker.worker();
                scope.spawn(|| Search { scripts, worker }.outcomes(u64::MAX))
            })
            .collect();
        let parts = jobs.into_iter().map(|job| job.join().unwrap());
        parts.flatten().collect()
    });
    (found, first.worker.explored())
}

fn reduction_loses_nothing(
    scripts: &[Vec<Op>],
    preemptions: Option<u32>,
) -> Result<(), TestCaseError> {
    let (all, plain) = outcomes(scripts, preemptions, Reduction::None, MOST);
    prop_assume!(plain.exhausted);
    let (some, reduced) = outcomes(scripts, preemptions, Reduction::Traces, u64::MAX);
    prop_assert!(reduced.is_complete());
    prop_assert_eq!(&all, &some, "plain {:?} reduced {:?}", plain, reduced);
    let bounds = preemptions.unwrap_or(0) as usize;
    prop_assert_eq!(schedules(&plain, bounds), schedules(&reduced, bounds));
    prop_assert!(reduced.executions() <= plain.executions());
    let (split, reduced) = outcomes_of_workers(scripts, preemptions, 3);
    prop_assert!(reduced.is_complete());
    prop_assert_eq!(&all, &split, "{:?}", reduced);
    prop_assert_eq!(schedules(&plain, bounds), schedules(&reduced, bounds));
    Ok(())
}

/// How many there are up to equivalence, with every bound: as many whatever is left out and whoever searches.
fn schedules(explored: &Explored, bounds: usize) -> Vec<u64> {
    let mut all: Vec<u64> = explored
        .bounds
        .iter()
        .map(|within| within.schedules)
        .collect();
    // A search that ended early says that more preemptions allow no more.
    all.resize(bounds + 1, explored.reached().schedules);
    all
}

fn cases(cases: u32) -> ProptestConfig {
    let more = std::env::var("STALEMATE_REDUCTION").ok();
    ProptestConfig {
        cases: more.and_then(|more| more.parse().ok()).unwrap_or(cases),
        max_global_rejects: 1_000_000,
        ..ProptestConfig::default()
    }
}

proptest! {
    // More with STALEMATE_REDUCTION=cases.
    #![proptest_config(cases(60))]

    #[test]
    fn reduction_loses_no_outcome_within_a_bound(scripts in scripts(2, 2), preemptions in 0u32..4) {
        reduction_loses_nothing(&scripts, Some(preemptions))?;
    }

    #[test]
    fn reduction_loses_no_outcome_with_three(scripts in scripts(3, 1), preemptions in 0u32..3) {
        reduction_loses_nothing(&scripts, Some(preemptions))?;
    }

    #[test]
    fn reduction_loses_no_failure(scripts in any_scripts(2, 2), preemptions in 0u32..4) {
        reduction_loses_nothing(&scripts, Some(preemptions))?;
    }

    #[test]
    fn reduction_loses_no_failure_with_three(scripts in any_scripts(3, 2), preemptions in 0u32..3) {
        reduction_loses_nothing(&scripts, Some(preemptions))?;
    }

    #[test]
    fn reduction_loses_no_outcome_without_a_bound(scripts in scripts(2, 1)) {
        reduction_loses_nothing(&scripts, None)?;
    }
}

#[test]
fn independent_threads_need_few_executions() {
    let own = |frame| vec![Op::Double(frame); 3];
    let scripts = [own(0), own(1), own(2)];
    let (all, plain) = outcomes(&scripts, Some(2), Reduction::None, u64::MAX);
    let (some, reduced) = outcomes(&scripts, Some(2), Reduction::Traces, u64::MAX);
    assert_eq!((all.len(), &all), (1, &some));
    let last = reduced.reached();
    let completed = last.executions - last.given_up;
    let plainly = plain.reached().executions;
    assert!(
        last.executions * 2 < plainly && completed * 8 < plainly,
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
    let reached = explored.reached();
    assert!(
        explored.exhausted && reached.too_long > 0 && reached.executions < 30,
        "{explored:?}"
    );
    assert!(!explored.is_complete(), "{explored:?}");
    assert!(Limits::default().points > 4);
}
