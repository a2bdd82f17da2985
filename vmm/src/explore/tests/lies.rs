//! An engine whose guest lies: events, points, arguments, counts and memory are drawn. Whatever it says, every
//! part of exploration that listens comes to an end, within its bounds, without a panic.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use abi::channel::{Event, EventKind, ReportKind};
use abi::failpoint::Failpoint;
use abi::layout::PAGE_SIZE;
use abi::point::Point;
use proptest::prelude::*;

use crate::check::Violation;
use crate::check::stream::{self, Seen, merge};
use crate::control::ProbeReport;
use crate::engine::{Costs, Engine, EngineError, EngineKind, GuestCrash, Halt, Limit, Window};
use crate::explore::campaign::{self, Found, Plan, Strategy, Worker};
use crate::explore::strategy::Random;
use crate::explore::{Driver, DriverError, Ending, Execution, Limits, Rng, Standing, compare};
use crate::inspect::{MemoryImage, VcpuFacts};
use crate::memory::PhysMem;
use crate::report::story;
use crate::report::symbols::Symbols;
use crate::report::timeline::timeline;
use crate::snapshot::Snapshot;

const VCPUS: usize = 3;
const MEMORY: u64 = 32 * PAGE_SIZE;
const LIMITS: Limits = Limits {
    points: 300,
    idle_turns: 40,
    events: 2_000,
};
/// Events of one step.
const MOST: u64 = 6;

/// A number that could be one of anything: small, a frame, a slot, an address, or just large.
fn number(rng: &mut Rng) -> u64 {
    match rng.below(8) {
        0..=2 => rng.below(6),
        3 => rng.below(MEMORY / PAGE_SIZE) * PAGE_SIZE,
        4 => rng.below(MEMORY / 8) * 8,
        5 => rng.below(8) << 12 | 0x27,
        6 => u64::MAX - rng.below(3),
        _ => rng.next(),
    }
}

fn event(rng: &mut Rng) -> Event {
    Event {
        stamp: number(rng),
        kind: rng.below(EventKind::ALL.len() as u64 + 3) as u32,
        task: rng.below(4) as u32,
        args: std::array::from_fn(|_| number(rng)),
        sequence: rng.next(),
    }
}

/// See the module. The same from each reset on: what it says can be replayed.
struct Liar {
    seed: u64,
    rng: Rng,
    memory: MemoryImage,
    /// It says one thing only: that it passes a harmless point, and that it has passed none.
    still: bool,
    /// Resets until it fails.
    lasts: u64,
}

impl Liar {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed, 0);
        let memory = MemoryImage::new(MEMORY);
        for gpa in (0..MEMORY).step_by(8) {
            memory.word(gpa).unwrap().store(number(&mut rng), Relaxed);
        }
        Self {
            seed,
            rng,
            memory,
            still: false,
            lasts: u64::MAX,
        }
    }

    fn still() -> Self {
        Self {
            still: true,
            ..Self::new(1)
        }
    }

    /// A bit that changes with every step.
    fn bit(&self, salt: u64) -> bool {
        !self.still && Rng::new(self.rng.clone().next(), salt).below(2) == 0
    }

    fn halt(&mut self) -> Halt {
        if self.still {
            let (point, args) = (Point::VmaAttach, [0; 2]);
            return Halt::Point { point, args };
        }
        let rng = &mut self.rng;
        match rng.below(40) {
            0 => Halt::Instruction { rip: rng.next() },
            1 => Halt::FirstUser,
            2 => Halt::Report(ProbeReport {
                kind: ReportKind::from_u64(1 + rng.below(3)).unwrap_or(ReportKind::WrongResult),
                gva: number(rng),
                expected: number(rng),
                found: number(rng),
                task: number(rng),
            }),
            3 if rng.below(8) == 0 => Halt::Exited {
                status: rng.next() as u32,
            },
            4 if rng.below(8) == 0 => Halt::Crashed(GuestCrash {
                reason: "a lie".into(),
                details: Vec::new(),
            }),
            _ => Halt::Point {
                point: Point::ALL[rng.below(Point::ALL.len() as u64) as usize],
                args: [number(rng), number(rng)],
            },
        }
    }
}

impl Engine for Liar {
    fn kind(&self) -> EngineKind {
        EngineKind::Model
    }
    fn nr_vcpus(&self) -> usize {
        VCPUS
    }
    fn run(&mut self, _: usize, _: Limit, events: &mut Vec<Event>) -> Result<Halt, EngineError> {
        for _ in 0..self.rng.below(MOST) {
            events.push(event(&mut self.rng));
        }
        Ok(self.halt())
    }
    fn set_window(&mut self, _: Window) -> Result<(), EngineError> {
        Ok(())
    }
    fn points_passed(&self, vcpu: usize) -> u64 {
        if self.still {
            return 7;
        }
        number(&mut Rng::new(self.rng.clone().next(), vcpu as u64))
    }
    fn in_flight(&self, vcpu: usize) -> bool {
        self.bit(vcpu as u64)
    }
    fn deliver(&mut self, _: usize) {
        self.rng.next();
    }
    fn pending(&self, vcpu: usize) -> bool {
        self.bit(8 + vcpu as u64)
    }
    fn save(&mut self) -> Result<(), EngineError> {
        Ok(())
    }
    fn reset(&mut self) -> Result<(), EngineError> {
        self.rng = Rng::new(self.seed, 0);
        let broken = || EngineError::Unsupported("it is broken".into());
        self.lasts = self.lasts.checked_sub(1).ok_or_else(broken)?;
        Ok(())
    }
    fn snapshot(&self) -> Option<Arc<Snapshot>> {
        None
    }
    fn arm(&mut self, _: usize, _: Failpoint, _: u32) {}
    fn memory(&self) -> &dyn PhysMem {
        &self.memory
    }
    fn kernel_root(&self) -> Option<u64> {
        Some(self.seed % (MEMORY / PAGE_SIZE) * PAGE_SIZE)
    }
    fn vcpu_facts(&self) -> Result<Vec<VcpuFacts>, EngineError> {
        let mut rng = self.rng.clone();
        let facts = |index| VcpuFacts {
            index,
            cr3: number(&mut rng),
            rip: number(&mut rng),
            rsp: number(&mut rng),
            ..VcpuFacts::default()
        };
        Ok((0..VCPUS).map(facts).collect())
    }
    fn symbols(&self) -> Option<&Symbols<'_>> {
        None
    }
    fn console(&self) -> String {
        String::new()
    }
    fn costs(&self) -> Costs {
        Costs::default()
    }
}

/// A driver whose vCPUs stand anywhere.
fn driver(seed: u64) -> Driver<Liar> {
    driver_of(Liar::new(seed))
}

fn driver_of(liar: Liar) -> Driver<Liar> {
    let seed = liar.seed;
    let mut rng = Rng::new(!seed, 0);
    let mut anywhere = || Standing {
        point: Point::from_id(rng.below(Point::ALL.len() as u64 + 1)),
        args: [number(&mut rng), number(&mut rng)],
    };
    let standing = (0..VCPUS).map(|_| anywhere()).collect();
    Driver::resume(liar, LIMITS, standing, [].into())
}

/// Everything that shows an execution to somebody; it is within its bounds.
fn told(run: &Execution) {
    assert!(run.schedule.points() <= 2 * LIMITS.points + 2);
    assert!(run.events.len() <= LIMITS.events + (LIMITS.points * MOST) as usize);
    let story = story::tell(run, VCPUS);
    assert!(story.lines().count() < 200, "{story}");
    assert!(story.contains('✘'), "it says how it ended");
    let trace = timeline(run, VCPUS, &[("lies", "all".into())]);
    assert!(
        serde_json::to_string(&trace)
            .unwrap()
            .contains("traceEvents")
    );
    assert_eq!(compare::digest(&run.events), compare::digest(&run.events));
    assert_eq!(compare::first_difference(&run.events, &run.events), None);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_guest_says_an_execution_ends_and_is_told(seed: u64, everywhere: bool) {
        let plan = Plan { everywhere, ..Plan::replay() };
        let mut worker = Worker::new(driver(seed), &plan).unwrap();
        for index in 0..4 {
            let run = match worker.execute(&mut Random::new(seed, index, 4), true) {
                Err(DriverError::TooLong { .. }) => continue,
                run => run.unwrap(),
            };
            told(&run);
            if let Ending::Violation(violation) = &run.ending {
                prop_assert!(worker.go_on(violation).unwrap().len() < 100);
                if let Ok(small) = worker.minimise(&run, 5, || true) {
                    told(&small);
                }
            }
        }
    }

    #[test]
    fn every_strategy_comes_to_its_end_or_says_why(seed: u64) {
        let strategies = [
            Strategy::Random { mean: 4 },
            Strategy::Pct { depth: 3 },
            Strategy::RoundRobin,
            Strategy::Exhaustive { preemptions: Some(1) },
        ];
        for strategy in strategies {
            let plan = Plan {
                strategy,
                executions: 4,
                seed,
                verify_every: 2,
                first: false,
                ..Plan::replay()
            };
            let (counts, stop) = Default::default();
            match campaign::run(|| Ok(driver(seed)), &plan, &counts, &stop) {
                Ok(summary) => {
                    prop_assert!(summary.executions <= 4);
                    summary.found.iter().for_each(|found| told(&found.execution));
                }
                Err(error) => prop_assert!(!error.to_string().is_empty()),
            }
        }
    }

    #[test]
    fn no_set_up_goes_on_for_ever(seed: u64) {
        if let Err(error) = Driver::new(Liar::new(seed), LIMITS, true) {
            prop_assert!(error.to_string().contains("set-up ended early"), "{error}");
        }
    }

    #[test]
    fn garbage_of_parallel_runs_is_merged_and_judged(seed: u64, length in 0usize..120) {
        let mut rng = Rng::new(seed, 0);
        let liar = Liar::new(seed);
        let streams: Vec<Vec<Event>> = (0..VCPUS)
            .map(|_| (0..length).map(|_| event(&mut rng)).collect())
            .collect();
        let mut monitors = stream::all();
        for monitor in &mut monitors {
            monitor.start(liar.memory(), liar.kernel_root().unwrap(), VCPUS);
        }
        let mut merge = merge::Merge::new(VCPUS, number(&mut rng), monitors);
        for (vcpu, events) in streams.iter().enumerate() {
            merge.push(vcpu, events);
        }
        let judged = merge.compare(liar.memory(), liar.kernel_root().unwrap());
        prop_assert!(judged.events <= (VCPUS * length) as u64);
    }

    /// More vCPUs than there are, too. Nothing that a monitor says depends on events that it does not follow.
    #[test]
    fn every_monitor_takes_any_event(seed: u64) {
        let mut rng = Rng::new(seed, 0);
        let liar = Liar::new(seed);
        for mut monitor in stream::all() {
            let [mut found, mut found_by_other, mut at_stops] = [const { Vec::new() }; 3];
            monitor.start(liar.memory(), number(&mut rng), VCPUS);
            let mut other = monitor.fork();
            for _ in 0..200 {
                let vcpu = rng.below(abi::layout::MAX_CPUS as u64 + 2) as usize;
                let seen = Seen { vcpu, event: event(&mut rng) };
                monitor.observe(&seen, &mut found);
                monitor.settled(liar.memory(), number(&mut rng), &mut at_stops);
                if monitor.follows().has(&seen.event) {
                    other.observe(&seen, &mut found_by_other);
                }
            }
            let said = |found: &[Violation]| found.iter().map(ToString::to_string).collect::<Vec<_>>();
            prop_assert_eq!(said(&found), said(&found_by_other));
            monitor.compare(liar.memory(), number(&mut rng), &mut found);
            monitor.reset();
            for violation in found.iter().chain(&at_stops) {
                prop_assert!(!violation.predicate.is_empty(), "{} is listed", violation.id);
            }
        }
    }
}

/// One that passes points for ever, all of them harmless, and whose count stands still.
#[test]
fn a_count_that_stands_still_does_not_hold_up_a_look_at_every_point() {
    let none = Standing {
        point: None,
        args: [0; 2],
    };
    let mut driver = Driver::resume(Liar::still(), LIMITS, vec![none; VCPUS], [].into());
    driver.look_everywhere(true);
    let run = driver.execute(&mut Random::new(1, 0, 50), &mut []);
    assert!(matches!(run, Err(DriverError::TooLong { .. })), "{run:?}");

    let set_up = Driver::new(Liar::still(), LIMITS, true).err().unwrap();
    assert!(set_up.to_string().contains("for ever"), "{set_up}");
}

#[test]
fn what_was_found_is_not_lost_where_the_engine_fails() {
    for jobs in [1, 3] {
        let plan = Plan {
            strategy: Strategy::Random { mean: 4 },
            executions: 1_000,
            jobs,
            first: false,
            verify_every: 0,
            ..Plan::replay()
        };
        let (counts, stop) = Default::default();
        let make = || {
            let lasts = 20;
            Ok(driver_of(Liar {
                lasts,
                ..Liar::new(3)
            }))
        };
        let told = AtomicU64::new(0);
        let tell = |_: &Found| {
            told.fetch_add(1, Relaxed);
        };
        let broken = campaign::run_and_tell(make, &plan, &counts, &stop, tell).unwrap_err();
        assert_eq!(broken.to_string(), "it is broken");
        let summary = broken.summary;
        assert!((1..=20 * jobs as u64).contains(&summary.executions));
        assert!(!summary.found.is_empty());
        assert_eq!(summary.found.len() as u64, told.into_inner());
    }
}
