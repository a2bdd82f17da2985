use crate::explore::strategy::{Pct, Random, Replay, RoundRobin, Tolerant};
use crate::explore::testing::{Fake, Op, driver, driver_of, schedule, scripts};
use crate::explore::{
    Actor, Choice, Driver, DriverError, Ending, Execution, Limits, Schedule, Scheduler, View,
};
use proptest::prelude::*;

fn once(driver: &mut Driver<Fake>, scheduler: &mut dyn Scheduler) -> Execution {
    driver.execute(scheduler, &mut []).unwrap().unwrap()
}

proptest! {
    #[test]
    fn what_any_strategy_runs_replays_to_the_same(scripts in scripts(3, 3), seed: u64) {
        let mut driver = driver(&scripts);
        let strategies: [Box<dyn Scheduler>; 4] = [
            Box::new(Random::new(seed, 0, 3)),
            Box::new(Pct::new(seed, 0, 3, Some(20))),
            Box::new(RoundRobin::new(1 + seed % 5)),
            Box::new(Tolerant::new(Schedule::default())),
        ];
        for mut strategy in strategies {
            let first = once(&mut driver, strategy.as_mut());
            let finished = matches!(first.ending, Ending::Finished { .. });
            prop_assert!(finished, "{:?}", first.ending);
            let outcome = driver.engine().outcome();
            let again = once(&mut driver, &mut Replay::new(first.schedule.clone()));
            prop_assert_eq!(&again.schedule, &first.schedule);
            prop_assert_eq!(&again.events, &first.events);
            prop_assert_eq!(driver.engine().outcome(), outcome);
        }
    }

    /// Whatever a file says: an error that names it, or an execution, but no panic.
    #[test]
    fn any_schedule_replays_or_is_impossible(
        scripts in scripts(2, 2),
        steps in prop::collection::vec((0u8..12, 1u64..6), 0..12),
    ) {
        let mut driver = driver(&scripts);
        let wanted = schedule(&steps);
        match driver.execute(&mut Replay::new(wanted.clone()), &mut []) {
            Ok(run) => prop_assert!(run.unwrap().schedule.points() <= wanted.points()),
            Err(DriverError::Impossible { actor, .. }) => {
                prop_assert!(wanted.segments.iter().any(|segment| segment.actor == actor));
            }
            Err(other) => prop_assert!(false, "{other}"),
        }
        let run = once(&mut driver, &mut Tolerant::new(wanted));
        prop_assert!(matches!(run.ending, Ending::Finished { .. }), "{:?}", run.ending);
    }
}

#[test]
fn an_impossible_step_is_named_with_its_place() {
    let mut driver = driver(&[vec![Op::Set(0, 1)], vec![]]);
    let error = driver
        .execute(&mut Replay::new(schedule(&[(0, 1), (9, 1)])), &mut [])
        .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("after 1 points i1") && text.contains("in flight"),
        "{text}"
    );
}

/// Always the lowest, whoever it is.
struct Lowest;
impl Scheduler for Lowest {
    fn begin(&mut self) -> bool {
        true
    }
    fn choose(&mut self, view: &View<'_>) -> Option<Choice> {
        Some(Choice {
            actor: view.enabled[0],
            points: 1,
        })
    }
}

#[test]
fn everybody_who_yields_has_a_turn() {
    // vCPUs 0 to 2 wait for words that only the last one sets, after two of its own turns of waiting.
    let waits = vec![Op::Await(0)];
    let last = vec![Op::Await(1), Op::Signal(0)];
    let mut scripts = vec![waits; 3];
    scripts.push(last);
    scripts[1] = vec![Op::Await(2), Op::Signal(1)];
    scripts[2] = vec![Op::Signal(2), Op::Await(0)];
    for scheduler in [
        &mut Lowest as &mut dyn Scheduler,
        &mut Tolerant::new(Schedule::default()),
    ] {
        let run = once(&mut driver(&scripts), scheduler);
        assert!(
            matches!(run.ending, Ending::Finished { .. }),
            "{:?}",
            run.ending
        );
    }
}

#[test]
fn threads_that_only_wait_for_each_other_are_a_livelock_at_any_grain() {
    let scripts = [vec![Op::Await(0)], vec![Op::Await(1)], vec![Op::Await(0)]];
    let strategies: [Box<dyn Scheduler>; 4] = [
        Box::new(Lowest),
        Box::new(RoundRobin::new(1)),
        Box::new(RoundRobin::new(1_000)),
        Box::new(Random::new(1, 0, 4)),
    ];
    for mut strategy in strategies {
        let run = once(&mut driver(&scripts), strategy.as_mut());
        assert!(
            matches!(run.ending, Ending::Livelock(..)),
            "{:?}",
            run.ending
        );
        assert!(
            run.schedule.points() < 20_000,
            "seen soon: {}",
            run.schedule.points()
        );
    }
}

#[test]
fn a_long_wait_for_one_who_works_is_none() {
    let mut works = vec![Op::Double(0); 3_000];
    works.push(Op::Signal(0));
    let run = once(
        &mut driver(&[vec![Op::Await(0)], works]),
        &mut RoundRobin::new(1),
    );
    assert!(
        matches!(run.ending, Ending::Finished { .. }),
        "{:?}",
        run.ending
    );
}

#[test]
fn a_deadlock_says_who_waits_for_whom() {
    let scripts = [
        vec![Op::Lock(0), Op::Lock(1), Op::Unlock(1), Op::Unlock(0)],
        vec![Op::Lock(1), Op::Lock(0), Op::Unlock(0), Op::Unlock(1)],
    ];
    let run = once(&mut driver(&scripts), &mut RoundRobin::new(2));
    let Ending::Deadlock(waits, _) = &run.ending else {
        panic!("{:?}", run.ending);
    };
    let told: Vec<_> = waits.iter().map(|wait| (wait.vcpu, wait.word)).collect();
    assert_eq!(told, [(0, 2), (1, 1)], "each waits for the other");
}

#[test]
fn a_guest_that_never_waits_comes_back() {
    let limits = Limits {
        points: 5_000,
        ..Limits::default()
    };
    let mut driver = Driver::new(Fake::new(&[vec![Op::Spin], vec![]]), limits, true).unwrap();
    let run = driver.execute(&mut Tolerant::new(Schedule::default()), &mut []);
    assert!(
        matches!(run, Err(DriverError::TooLong { points: 5_001.. })),
        "{run:?}"
    );
}

#[test]
fn a_guest_that_lies_about_its_points_is_not_believed() {
    for lie in [0, u64::MAX] {
        let mut fake = Fake::new(&[vec![Op::Double(0); 3], vec![]]);
        fake.lie = Some(lie);
        let mut driver = driver_of(fake);
        let run = once(&mut driver, &mut RoundRobin::new(2));
        assert!(
            matches!(run.ending, Ending::Finished { .. }),
            "{:?}",
            run.ending
        );
        assert!(run.schedule.points() < 100, "{:?}", run.schedule);
    }
}

#[test]
fn a_step_that_ends_in_a_report_is_part_of_the_replay() {
    let mut driver = driver(&[vec![Op::Set(0, 5), Op::Fail(0, 5)], vec![]]);
    let first = once(&mut driver, &mut RoundRobin::new(3));
    assert!(matches!(first.ending, Ending::Report { vcpu: 0, .. }));
    let again = once(&mut driver, &mut Replay::new(first.schedule.clone()));
    assert!(matches!(again.ending, Ending::Report { vcpu: 0, .. }));
    assert_eq!(again.schedule, first.schedule);
    assert_eq!(
        first.schedule.segments.last().unwrap().actor,
        Actor::Vcpu(0)
    );
}
