//! Footprints against the real kernel, on the model engine: neighbours that are independent by them are
//! exchanged, and nothing may come out differently.

use crate::check::stream::Seen;
use crate::engine::Engine;
use crate::engine::model::ModelEngine;
use crate::engine::model::tests::{TESTS, driver, litmus};
use crate::explore::campaign::{Plan, Worker, failure_id};
use crate::explore::footprint::{Footprint, Footprints};
use crate::explore::rng::Rng;
use crate::explore::strategy::{Random, Replay};
use crate::explore::{Actor, Choice, Execution, Schedule, Scheduler, Standing, View};
use abi::channel::Event;
use abi::layout::{CHANNEL_GPA, CHANNEL_STRIDE, PAGE_SIZE};
use abi::point::Wait;

/// Steps of another scheduler, one point at a time, with their footprints.
struct Recorder<S> {
    inner: S,
    run: Option<Choice>,
    under_way: Option<(Actor, Standing)>,
    footprints: Footprints,
    steps: Vec<Step>,
}

#[derive(Debug)]
struct Step {
    actor: Actor,
    from: Standing,
    to: Standing,
    print: Footprint,
}

const NOWHERE: Standing = Standing {
    point: None,
    args: [0; 2],
};

impl<S: Scheduler> Scheduler for Recorder<S> {
    fn begin(&mut self) -> bool {
        self.inner.begin()
    }
    fn choose(&mut self, view: &View<'_>) -> Option<Choice> {
        let place = |actor| match actor {
            Actor::Vcpu(vcpu) => view.standing[usize::from(vcpu)],
            Actor::Wire(_) | Actor::Disk(_) => NOWHERE,
        };
        if let Some((actor, from)) = self.under_way.take() {
            let (vcpus, to) = (view.standing.len(), place(actor));
            let print = self.footprints.step(actor, vcpus, from, to, view.events);
            self.steps.push(Step {
                actor,
                from,
                to,
                print,
            });
        }
        let going_on = self.run.filter(|run| run.points > 0 && view.can(run.actor));
        let mut run = going_on.or_else(|| self.inner.choose(view))?;
        self.under_way = Some((run.actor, place(run.actor)));
        run.points -= 1;
        self.run = Some(run);
        Some(Choice { points: 1, ..run })
    }
}

/// Exactly these steps, then whatever comes.
fn of_steps(steps: &[Actor]) -> Schedule {
    let mut schedule = Schedule::default();
    for actor in steps {
        schedule.push(*actor, 1);
    }
    schedule
}

/// What must not depend on the order of independent steps.
#[derive(Debug, PartialEq)]
struct Outcome {
    ending: Option<String>,
    events: Vec<Vec<Event>>,
    memory: u64,
}

fn outcome(worker: &mut Worker<ModelEngine>, run: &Execution, vcpus: usize) -> Outcome {
    // The stamps are the order itself.
    let of = |vcpu: usize| {
        let mine = run.events.iter().filter(|seen: &&Seen| seen.vcpu == vcpu);
        mine.map(|seen| Event {
            stamp: 0,
            ..seen.event
        })
        .collect()
    };
    Outcome {
        ending: failure_id(&run.ending),
        events: (0..vcpus).map(of).collect(),
        memory: memory(worker.engine(), vcpus),
    }
}

/// A hash of guest memory without the channels, whose rings hold the stamps, and the ticket.
fn memory(engine: &ModelEngine, vcpus: usize) -> u64 {
    use std::hash::Hasher as _;
    let root = engine.kernel_root().unwrap();
    let ticket = root + std::mem::offset_of!(abi::objects::KernelRoot, ticket) as u64;
    let channels = CHANNEL_GPA..CHANNEL_GPA + vcpus as u64 * CHANNEL_STRIDE;
    let mut hash = rustc_hash::FxHasher::default();
    let mut page = [0; PAGE_SIZE as usize];
    for gpa in (0..engine.memory().bytes()).step_by(PAGE_SIZE as usize) {
        if channels.contains(&gpa) {
            continue;
        }
        engine.memory().read(gpa, &mut page).unwrap();
        if page == [0; PAGE_SIZE as usize] {
            continue;
        }
        hash.write_u64(gpa);
        if let Some(at) = ticket.checked_sub(gpa).filter(|at| *at < PAGE_SIZE) {
            page[at as usize..][..8].fill(0);
        }
        for word in page.as_chunks::<8>().0 {
            let word = u64::from_le_bytes(*word);
            // The model's programs run on stacks of this process, and the kernel notes where.
            if !(0x5000_0000_0000..0x8000_0000_0000).contains(&word) {
                hash.write_u64(word);
            }
        }
    }
    hash.finish()
}

/// Exchanges neighbours of executions of `test`. Returns how many pairs were exchanged.
fn exchange(test: &str, bug: Option<&str>, executions: u64, pairs: usize) -> usize {
    let scenario = litmus(test, bug);
    let mut worker = Worker::new(driver(test, bug), &Plan::replay()).unwrap();
    let vcpus = scenario.vcpus as usize;
    let mut exchanged = 0;
    for index in 0..executions {
        let mut recorder = Recorder {
            inner: Random::new(3, index, 1 + index % 4),
            run: None,
            under_way: None,
            footprints: Footprints::default(),
            steps: Vec::new(),
        };
        let run = worker.execute(&mut recorder, false).unwrap();
        let steps = recorder.steps;
        let mut actors: Vec<Actor> = steps.iter().map(|step| step.actor).collect();
        let last = run.schedule.segments.last().unwrap().actor;
        actors.push(last);
        let first = outcome(&mut worker, &run, vcpus);
        let relaxes = |standing: &Standing| standing.wait() == Some(Wait::Anyone);
        let free = |at: &usize| {
            let (one, other) = (&steps[*at], &steps[at + 1]);
            // Whoever waits for anyone has no two turns in a row: that is not of the state.
            let before = at.checked_sub(1).map(|before| actors[before]);
            let twice = relaxes(&other.from) && before == Some(other.actor)
                || relaxes(&one.to) && actors.get(at + 2) == Some(&one.actor);
            one.actor != other.actor && !twice && one.print.independent(&other.print)
        };
        let mut places: Vec<usize> = (0..steps.len().saturating_sub(1)).filter(free).collect();
        let mut rng = Rng::new(9, index);
        while places.len() > pairs {
            places.swap_remove(rng.below(places.len() as u64) as usize);
        }
        for at in places {
            let mut other = actors.clone();
            other.swap(at, at + 1);
            let again = worker.execute(&mut Replay::new(of_steps(&other)), false);
            let again = again.unwrap_or_else(|error| {
                panic!("{test}: {error}: {:?} {:?}", steps[at], steps[at + 1])
            });
            let second = outcome(&mut worker, &again, vcpus);
            assert!(
                first == second,
                "{test} {bug:?} execution {index} steps {at}: {:?} and {:?} do not commute: {:?} {:?}, {}",
                steps[at],
                steps[at + 1],
                first.ending,
                second.ending,
                difference(&first, &second),
            );
            exchanged += 1;
        }
    }
    exchanged
}

fn difference(first: &Outcome, second: &Outcome) -> String {
    for (vcpu, (a, b)) in first.events.iter().zip(&second.events).enumerate() {
        if let Some(at) = a.iter().zip(b).position(|(a, b)| a != b) {
            let tell = |event| crate::explore::compare::describe(&Seen { vcpu, event });
            return format!("{} / {}", tell(a[at]), tell(b[at]));
        }
        if a.len() != b.len() {
            return format!("vCPU {vcpu}: {} events, {}", a.len(), b.len());
        }
    }
    "only memory differs".into()
}

#[test]
fn independent_steps_of_the_kernel_commute() {
    let (executions, pairs) = sample();
    let exchanged = TESTS.map(|test| exchange(test, None, executions, pairs));
    // A footprint that conflicts with everything would pass too.
    // (Direct I/O does: what the disk does to memory is in no event of its vCPU. So does reclaim: what it takes is up to
    // lists that every fault changes.)
    let mut judged = exchanged.iter().zip(TESTS);
    let few = judged.any(|(exchanged, test)| {
        *exchanged < 5 && !["direct", "reclaim", "reclaim-file", "kswapd"].contains(&test)
    });
    assert!(
        !few && exchanged.iter().sum::<usize>() > 300,
        "{exchanged:?}"
    );
}

#[test]
fn independent_steps_of_kernels_with_bugs_commute() {
    let (executions, pairs) = sample();
    for (bug, test) in crate::engine::model::tests::SHOWN_BY {
        exchange(test, Some(bug), executions, pairs);
    }
}

/// How many executions of a test, and pairs of each; more with STALEMATE_COMMUTE=executions.
fn sample() -> (u64, usize) {
    let more = std::env::var("STALEMATE_COMMUTE").ok();
    let executions = more.and_then(|more| more.parse().ok()).unwrap_or(10);
    (executions, 20)
}
