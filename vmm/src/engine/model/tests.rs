use std::path::Path;

use super::ModelEngine;
use crate::check::stream::Monitor;
use crate::check::stream::tlb::TlbModel;
use crate::engine::Engine as _;
use crate::explore::strategy::{Pct, Random, Replay, RoundRobin};
use crate::explore::{Driver, Ending, Execution, Limits, Scheduler};
use crate::scenario::{self, Scenario};

pub(crate) const TESTS: [&str; 9] = [
    "unmap",
    "protect",
    "dontneed",
    "lazy",
    "lazy-tables",
    "switch",
    "cow",
    "fork",
    "remap",
];

/// vCPUs that a test needs to show all that it can.
fn vcpus(test: &str) -> u32 {
    if test == "cow" { 3 } else { 2 }
}

pub(crate) fn litmus(test: &str, bug: Option<&str>) -> Scenario {
    let vcpus = vcpus(test);
    let bugs = bug.map_or(String::new(), |bug| format!("bugs = [\"{bug}\"]"));
    let text = format!(
        "[machine]\nvcpus = {vcpus}\nmemory = \"16M\"\ninterrupts = \"controlled\"\n[program]\nname = \"litmus\"\nargs = {{ test = \"{test}\", pages = 1 }}\n\
         [kernel]\nparams = {{ tlb = \"soft\", stamp = \"ticket\" }}\n{bugs}\n"
    );
    scenario::parse(Path::new("litmus.toml"), &text).unwrap()
}

fn driver(test: &str, bug: Option<&str>) -> Driver<ModelEngine> {
    let engine = ModelEngine::new(&litmus(test, bug)).unwrap();
    Driver::new(engine, Limits::default(), true).unwrap()
}

fn judged(driver: &mut Driver<ModelEngine>) -> Vec<Box<dyn Monitor>> {
    let mut monitors: Vec<Box<dyn Monitor>> = vec![Box::new(TlbModel::new())];
    driver.start(&mut monitors).unwrap();
    monitors
}

fn once(driver: &mut Driver<ModelEngine>, scheduler: &mut dyn Scheduler) -> Execution {
    driver.execute(scheduler, &mut []).unwrap().unwrap()
}

#[test]
fn every_litmus_test_is_clean_under_every_strategy() {
    for test in TESTS {
        let mut driver = driver(test, None);
        let mut schedulers: Vec<(&str, Box<dyn Scheduler>)> = vec![
            ("rr1", Box::new(RoundRobin::new(1))),
            ("rr7", Box::new(RoundRobin::new(7))),
        ];
        for index in 0..40 {
            schedulers.push(("random", Box::new(Random::new(1, index, 5))));
            schedulers.push(("pct", Box::new(Pct::new(1, index, 3, Some(200)))));
        }
        for (name, mut scheduler) in schedulers {
            let run = once(&mut driver, scheduler.as_mut());
            assert!(
                matches!(run.ending, Ending::Finished { .. }),
                "{test} under {name}: {:?} after {} points",
                run.ending,
                run.schedule.points()
            );
        }
    }
}

#[test]
fn a_replay_is_identical_every_time() {
    let mut driver = driver("unmap", None);
    let first = once(&mut driver, &mut Random::new(7, 0, 4));
    for _ in 0..200 {
        let again = once(&mut driver, &mut Replay::new(first.schedule.clone()));
        assert_eq!(again.schedule, first.schedule);
        assert_eq!(again.events, first.events);
    }
}

#[test]
#[ignore = "a survey"]
fn survey() {
    for bug in abi::bug::Bug::ALL {
        for test in TESTS {
            let mut driver = driver(test, Some(bug.name()));
            let mut monitors = judged(&mut driver);
            let mut pct = Pct::new(3, 0, 3, None);
            let started = std::time::Instant::now();
            for i in 0..2000 {
                let run = driver.execute(&mut pct, &mut monitors).unwrap().unwrap();
                if !matches!(run.ending, Ending::Finished { .. }) {
                    let text = format!("{:?}", run.ending);
                    println!(
                        "{} {test}: #{i} {}",
                        bug.name(),
                        &text[..text.len().min(150)]
                    );
                    break;
                }
            }
            let _ = started;
        }
    }
    for test in TESTS {
        let mut driver = driver(test, None);
        let mut monitors = judged(&mut driver);
        let mut pct = Pct::new(3, 0, 3, None);
        let started = std::time::Instant::now();
        let mut points = 0;
        for _ in 0..2000 {
            let run = driver.execute(&mut pct, &mut monitors).unwrap().unwrap();
            points += run.schedule.points();
            assert!(
                matches!(run.ending, Ending::Finished { .. }),
                "{test} {:?}",
                run.ending
            );
        }
        let costs = driver.engine().costs();
        println!(
            "{test}: {:?}/run, {} points, reset {:?}, {} pages",
            started.elapsed() / 2000,
            points / 2000,
            costs.reset / costs.resets as u32,
            costs.pages / costs.resets
        );
    }
}
