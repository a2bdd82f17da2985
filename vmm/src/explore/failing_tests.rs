//! The correct kernel survives every failure that can be asked of it.

use abi::channel::EventKind;
use abi::failpoint::Failpoint;

use super::campaign::{Plan, Worker, failure_id};
use super::failing::{Passages, counting};
use super::strategy::{Pct, RoundRobin};
use super::{Ending, Execution, Scheduler};
use crate::check::{self, Context, Moment};
use crate::engine::Engine as _;
use crate::engine::model::ModelEngine;
use crate::engine::model::tests::{TESTS, driver};
use crate::inspect::Snapshot;
use crate::report::story;
use crate::scenario::Fail;

type ModelWorker = Worker<ModelEngine>;

fn worker(test: &str) -> ModelWorker {
    Worker::new(driver(test, None), &Plan::replay()).unwrap()
}

/// How many passages of each failpoint each vCPU has.
fn passages(worker: &mut ModelWorker) -> Vec<Fail> {
    let vcpus = worker.engine().nr_vcpus();
    let counting = counting(Failpoint::ALL, vcpus, &[]);
    worker.arm(&counting);
    worker.execute(&mut RoundRobin::new(8), true).unwrap();
    Passages::read(worker.engine().memory(), &counting).all()
}

/// Runs `scheduler` to the exit of the machine, where nothing may be left of any process.
fn survives(worker: &mut ModelWorker, scheduler: &mut dyn Scheduler, what: &str) -> Execution {
    let run = worker.execute(scheduler, true).unwrap();
    let fails: Vec<String> = run.fails.iter().map(ToString::to_string).collect();
    assert!(
        matches!(run.ending, Ending::Finished { status: Some(_) }),
        "{what} with {fails:?}: {}\n{}",
        story::ending(&run.ending),
        story::tell(&run, 3),
    );
    run
}

fn hits(run: &Execution) -> usize {
    let hit =
        |event: &&crate::check::stream::Seen| event.event.kind == EventKind::FailpointHit as u32;
    run.events.iter().filter(hit).count()
}

/// Every passage of every failpoint on every vCPU of every test, in turns and under random priorities.
#[test]
fn the_correct_kernel_survives_every_failure() {
    let mut hit = 0;
    for test in TESTS {
        let mut worker = worker(test);
        for most in passages(&mut worker) {
            for passage in 1..=most.passage {
                worker.arm(&[Fail { passage, ..most }]);
                let mut schedulers: Vec<(String, Box<dyn Scheduler>)> = Vec::new();
                for quantum in [1, 4, 30] {
                    schedulers.push((
                        format!("in turns of {quantum}"),
                        Box::new(RoundRobin::new(quantum)),
                    ));
                }
                for index in 0..6 {
                    let pct = Pct::new(u64::from(passage), index, 3, Some(200));
                    schedulers.push((format!("pct {index}"), Box::new(pct)));
                }
                for (name, mut scheduler) in schedulers {
                    let run = survives(&mut worker, scheduler.as_mut(), &format!("{test} {name}"));
                    assert!(hits(&run) <= 1);
                    hit += hits(&run);
                }
            }
        }
    }
    assert!(hit > 500, "{hit} allocations failed");
}

/// What a failure leaves behind is really looked for: the invariants that would see it are not skipped.
#[test]
fn leaks_are_looked_for_at_the_exit() {
    let mut worker = worker("fork");
    worker.arm(&["frame-alloc@0:3".parse().unwrap()]);
    survives(&mut worker, &mut RoundRobin::new(8), "leaks");
    let engine = worker.engine();
    let facts = engine.vcpu_facts().unwrap();
    let snapshot = Snapshot::read(engine.memory(), engine.kernel_root().unwrap()).unwrap();
    let context = Context::new(engine.memory(), &snapshot, &facts, Moment::AfterExit);
    let outcome = check::run(&context);
    for id in ["P-24", "P-25", "L-11", "L-12"] {
        let skipped = outcome.skipped.iter().find(|skipped| skipped.id == id);
        assert_eq!(skipped, None);
        assert!(
            outcome.checked.iter().any(|checked| checked.id == id),
            "{id}"
        );
    }
}

#[test]
fn a_failure_is_armed_for_one_execution_at_a_time() {
    let mut worker = worker("fork");
    worker.arm(&["slab-alloc@0:1".parse().unwrap()]);
    for _ in 0..3 {
        let run = survives(&mut worker, &mut RoundRobin::new(8), "armed");
        assert_eq!(hits(&run), 1);
    }
    // One that is never reached must not fail in a later execution.
    worker.arm(&["frame-alloc@0:1000000".parse().unwrap()]);
    survives(&mut worker, &mut RoundRobin::new(8), "not reached");
    worker.arm(&[]);
    let run = worker.execute(&mut RoundRobin::new(8), true).unwrap();
    assert_eq!((hits(&run), failure_id(&run.ending)), (0, None));
    assert!(matches!(run.ending, Ending::Finished { status: None }));
}
