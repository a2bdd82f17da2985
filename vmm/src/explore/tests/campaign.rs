//! Exhaustive searches of the real kernel, on the model engine, by several jobs; and their ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::engine::model::ModelEngine;
use crate::engine::model::tests::litmus;
use crate::explore::campaign::{self, Counts, Plan, Strategy, Summary, Worker, failure_id};
use crate::explore::strategy::{Bounds, Exhaustive, Random, Reduction};
use crate::explore::{Driver, DriverError, Limits};

fn plan(preemptions: u32, jobs: usize) -> Plan {
    Plan {
        strategy: Strategy::Exhaustive {
            preemptions: Some(preemptions),
        },
        executions: u64::MAX,
        jobs,
        first: false,
        state_every: 0,
        ..Plan::replay()
    }
}

fn search(
    test: &str,
    bug: Option<&str>,
    plan: &Plan,
    counts: &Counts,
    stop: &Arc<AtomicBool>,
) -> Summary {
    let scenario = litmus(test, bug);
    let make = || Driver::new(ModelEngine::new(&scenario)?, Limits::default(), true);
    campaign::run(make, plan, counts, stop).unwrap()
}

/// Schedules with every bound, and how each that failed did.
fn came_to(summary: &Summary) -> (Vec<u64>, Vec<String>) {
    let explored = summary.explored.as_ref().unwrap();
    assert!(explored.is_complete(), "{explored:?}");
    let found = summary.found.iter();
    let mut found: Vec<_> = found
        .filter_map(|found| failure_id(&found.execution.ending))
        .collect();
    found.sort();
    let bounds = explored.bounds.iter();
    (bounds.map(|within| within.schedules).collect(), found)
}

#[test]
fn jobs_share_a_search_and_come_to_the_same() {
    for bug in [None, Some("shootdown-skip-remote")] {
        let with = |jobs| {
            let counts = Counts::default();
            let plan = plan(1, jobs);
            let summary = search("protect", bug, &plan, &counts, &Arc::default());
            assert_eq!(
                counts.within.into_inner().unwrap().unwrap().preemptions,
                Some(1),
                "progress tells the bound"
            );
            came_to(&summary)
        };
        let (schedules, found) = with(1);
        assert!(schedules[1] > schedules[0], "{schedules:?}");
        assert_eq!(found.is_empty(), bug.is_none(), "{found:?}");
        // With each bound a failure is met again: it is told once.
        assert!(found.len() as u64 <= schedules[1]);
        for jobs in [2, 3] {
            assert_eq!(
                with(jobs),
                (schedules.clone(), found.clone()),
                "{jobs} jobs"
            );
        }
    }
}

#[test]
fn a_search_that_is_ended_says_how_far_it_got() {
    let ends_early = |plan: &Plan, counts: &Counts, stop: &Arc<AtomicBool>| {
        let summary = search("unmap", None, plan, counts, stop);
        let explored = summary.explored.unwrap();
        assert!(
            !explored.is_complete() && !explored.exhausted,
            "{explored:?}"
        );
        (summary.executions, explored)
    };
    for jobs in [1, 2] {
        // As many executions as --schedules says.
        let few = Plan {
            executions: 60,
            ..plan(4, jobs)
        };
        let (executions, explored) = ends_early(&few, &Counts::default(), &Arc::default());
        // A job that waits for a part when another one ends has begun one for nothing.
        assert!((60 + 1 - jobs as u64..=60).contains(&executions));
        assert_eq!(executions, explored.executions());
        let reached = explored.reached();
        assert!(
            reached.preemptions < Some(4) && reached.schedules > 0,
            "{explored:?}"
        );

        // Ctrl-C.
        let (counts, stop): (Counts, Arc<AtomicBool>) = Default::default();
        let (executions, explored) = std::thread::scope(|scope| {
            scope.spawn(|| {
                while counts.executions.load(Ordering::Relaxed) < 40 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                stop.store(true, Ordering::Relaxed);
            });
            ends_early(&plan(9, jobs), &counts, &stop)
        });
        assert!(executions >= 40 && explored.executions() == executions);

        // A time that is over before anything is begun.
        let late = Plan {
            time_limit: Some(Duration::ZERO),
            ..plan(4, jobs)
        };
        let (executions, explored) = ends_early(&late, &Counts::default(), &Arc::default());
        assert_eq!((executions, explored.executions()), (0, 0));
        assert!(explored.complete().is_none());
    }
}

#[test]
fn an_execution_that_is_stopped_counts_for_nothing_and_leaves_nothing_behind() {
    let make = || {
        let scenario = litmus("unmap", None);
        Driver::new(ModelEngine::new(&scenario)?, Limits::default(), true)
    };
    let mut worker = Worker::new(make().unwrap(), &Plan::replay()).unwrap();
    let whole = worker.execute(&mut Random::new(1, 0, 8), true).unwrap();
    // In the middle of the next one.
    worker.stop_when(Some(Arc::new(|| true)));
    let error = worker.execute(&mut Random::new(1, 1, 1), true).unwrap_err();
    assert!(matches!(error, DriverError::Stopped), "{error}");
    worker.stop_when(None);
    let again = worker.execute(&mut Random::new(1, 0, 8), true).unwrap();
    assert_eq!(again.schedule, whole.schedule);
    assert_eq!(again.events.len(), whole.events.len());
}

/// Looks at every point make the first schedule alone longer than that, and the run that PCT measures too.
#[test]
fn a_campaign_ends_in_the_middle_of_its_first_execution() {
    for strategy in [Strategy::Pct { depth: 3 }, Strategy::Random { mean: 8 }] {
        let plan = Plan {
            strategy,
            executions: 10,
            everywhere: true,
            time_limit: Some(Duration::from_millis(1)),
            ..Plan::replay()
        };
        let scenario = litmus("unmap", None);
        let make = || Driver::new(ModelEngine::new(&scenario)?, Limits::default(), true);
        let summary = campaign::run(make, &plan, &Counts::default(), &Arc::default()).unwrap();
        assert_eq!((summary.executions, summary.points), (0, 0));
    }
}

/// What was left of a search by an execution that was stopped is not lost.
#[test]
fn a_search_that_is_stopped_in_an_execution_is_not_exhausted() {
    let whole = search(
        "unmap",
        None,
        &plan(0, 1),
        &Counts::default(),
        &Arc::default(),
    );
    let executions = whole.executions;
    let scenario = litmus("unmap", None);
    let driver = Driver::new(
        ModelEngine::new(&scenario).unwrap(),
        Limits::default(),
        true,
    );
    let mut worker = Worker::new(driver.unwrap(), &Plan::replay()).unwrap();
    let bounds = Bounds {
        preemptions: Some(0),
        ..Bounds::default()
    };
    let search = Exhaustive::new(bounds, Reduction::Traces);
    let mut one = search.worker();
    for _ in 1..executions {
        worker.execute(&mut one, false).unwrap();
    }
    // The last.
    worker.stop_when(Some(Arc::new(|| true)));
    let error = worker.execute(&mut one, false).unwrap_err();
    assert!(matches!(error, DriverError::Stopped), "{error}");
    drop(one);
    let explored = search.explored();
    assert!(!explored.exhausted, "{explored:?}");
    assert_eq!(explored.executions(), executions - 1);
}
