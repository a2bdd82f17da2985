//! Many executions of one scenario, on several engines at once where that is asked for.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use abi::channel::Event;
use rustc_hash::FxHashSet;

use super::compare::{self, Masks};
use super::failing::{self, Passages};
pub use super::plan::{Plan, Strategy};
use super::probe::Shown;
use super::strategy::{Exhaustive, Explored, Pct, Random, Replay, RoundRobin, Tolerant, Within};
use super::{
    Coverage, Driver, DriverError, Ending, Execution, Sample, Schedule, Scheduler, StopWhen,
    minimise,
};
use crate::check::stream::{Monitor, Panel};
use crate::check::{self, Moment, Violation};
use crate::engine::{Costs, Engine, EngineError};
use crate::scenario::Fail;

/// An execution that does not end as it should.
#[derive(Debug)]
pub struct Found {
    /// Number of the execution.
    pub index: u64,
    /// What was run and how it ended.
    pub execution: Execution,
}

/// What a campaign came to.
#[derive(Debug, Default)]
pub struct Summary {
    /// Executions.
    pub executions: u64,
    /// Scheduling points.
    pub points: u64,
    /// Events.
    pub events: u64,
    /// Distinct ordered pairs of conflicting events on different vCPUs.
    pub pairs: usize,
    /// Executions that were replayed and compared.
    pub verified: u64,
    /// Ends that all invariants looked at.
    pub states: u64,
    /// What was found, by number of the execution.
    pub found: Vec<Found>,
    /// Some of those that were well.
    pub sample: Sample,
    /// Wall time.
    pub elapsed: Duration,
    /// Where the engines' time went.
    pub costs: Costs,
    /// Time in monitors and invariants, of all jobs.
    pub checks: Duration,
    /// Time in executions, of all jobs.
    pub worked: Duration,
    /// What an exhaustive search came to.
    pub explored: Option<Explored>,
}

/// What a campaign counts while it runs.
#[derive(Debug, Default)]
pub struct Counts {
    /// Executions so far.
    pub executions: AtomicU64,
    /// Pairs so far.
    pub pairs: AtomicU64,
    /// Found so far.
    pub found: AtomicU64,
    /// What an exhaustive search has come to with the bound that it has reached.
    pub within: Mutex<Option<Within>>,
}

/// A name for how an execution ended, the same for the same kind of failure; none where it is well.
#[must_use]
pub fn failure_id(ending: &Ending) -> Option<String> {
    Some(match ending {
        Ending::Finished { .. } | Ending::ScheduleOver => return None,
        Ending::Violation(violation) => violation.id.into(),
        Ending::Report { .. } => "report".into(),
        Ending::Deadlock(..) => "deadlock".into(),
        Ending::Livelock(..) => "livelock".into(),
        Ending::Crashed { .. } => "crash".into(),
    })
}

/// Every name that [`failure_id`] can give.
pub fn failure_ids() -> impl Iterator<Item = &'static str> {
    let others = ["report", "deadlock", "livelock", "crash"];
    check::described().map(|one| one.id).chain(others)
}

/// Runs `plan` on drivers that `make` makes, one for each job, until it is done or `stop` is set. An execution that
/// is under way then, or when time is up, counts for nothing.
///
/// Execution `i` of a seed is the same whatever the number of jobs; so is what is found first. Not so in an
/// exhaustive search, of which every job takes a part: only what all of it comes to is the same
/// ([`Within::schedules`]).
///
/// # Errors
/// An engine failed, or two runs of one schedule differ.
pub fn run<E: Engine>(
    make: impl Fn() -> Result<Driver<E>, DriverError> + Sync,
    plan: &Plan,
    counts: &Counts,
    stop: &Arc<AtomicBool>,
) -> Result<Summary, DriverError> {
    run_and_tell(make, plan, counts, stop, |_| ()).map_err(|broken| broken.error)
}

/// A campaign that could not go on.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Broken {
    /// Why.
    pub error: DriverError,
    /// What it had come to.
    pub summary: Box<Summary>,
}

/// As [`run`]; `tell` is told at once of what is found.
///
/// # Errors
/// As of [`run`], with what was found before.
pub fn run_and_tell<E: Engine>(
    make: impl Fn() -> Result<Driver<E>, DriverError> + Sync,
    plan: &Plan,
    counts: &Counts,
    stop: &Arc<AtomicBool>,
    tell: impl Fn(&Found) + Sync,
) -> Result<Summary, Broken> {
    let started = Instant::now();
    let until = plan.time_limit.and_then(|limit| started.checked_add(limit));
    let stop = Arc::clone(stop);
    let search = plan.search();
    let jobs = Jobs {
        plan,
        counts,
        tell,
        stop_when: Arc::new(move || {
            stop.load(Ordering::Relaxed) || until.is_some_and(|until| Instant::now() >= until)
        }),
        next: AtomicU64::new(0),
        over: AtomicBool::new(false),
        pairs: Mutex::new(FxHashSet::default()),
    };
    let job = || {
        let mut summary = Summary {
            sample: Sample::new(plan.sample),
            ..Summary::default()
        };
        let ended = make().and_then(|driver| jobs.work(driver, search.as_ref(), &mut summary));
        // One that fails ends all.
        jobs.over.fetch_or(ended.is_err(), Ordering::Relaxed);
        (summary, ended.err())
    };
    let parts: Vec<(Summary, Option<DriverError>)> = if plan.jobs <= 1 {
        vec![job()]
    } else {
        std::thread::scope(|scope| {
            let jobs: Vec<_> = (0..plan.jobs).map(|_| scope.spawn(job)).collect();
            jobs.into_iter()
                .map(|job| job.join().expect("a job does not panic"))
                .collect()
        })
    };
    let mut whole = Summary::default();
    let mut failed = None;
    for (part, error) in parts {
        failed = failed.or(error);
        whole.executions += part.executions;
        whole.points += part.points;
        whole.events += part.events;
        whole.verified += part.verified;
        whole.states += part.states;
        whole.found.extend(part.found);
        whole.sample.join(part.sample);
        whole.checks += part.checks;
        whole.worked += part.worked;
        whole.costs = whole.costs.plus(&part.costs);
    }
    whole.explored = search.as_ref().map(Exhaustive::explored);
    whole.found.sort_by_key(|found| found.index);
    if plan.first {
        // Executions are begun in order, so every one before this was run.
        whole.found.truncate(1);
    }
    whole.pairs = jobs.pairs.into_inner().expect("no job panics").len();
    whole.elapsed = started.elapsed();
    match failed {
        Some(error) => Err(Broken {
            error,
            summary: Box::new(whole),
        }),
        None => Ok(whole),
    }
}

/// What the jobs of a campaign share.
struct Jobs<'a, T> {
    plan: &'a Plan,
    counts: &'a Counts,
    tell: T,
    stop_when: StopWhen,
    /// The next execution.
    next: AtomicU64,
    /// Nobody begins another one.
    over: AtomicBool,
    pairs: Pairs,
}

impl<T: Fn(&Found)> Jobs<'_, T> {
    /// Works until there is nothing more to do: adds to `summary` what that comes to, whatever ends it.
    fn work<E: Engine>(
        &self,
        mut driver: Driver<E>,
        search: Option<&Exhaustive>,
        summary: &mut Summary,
    ) -> Result<(), DriverError> {
        driver.stop_when(Some(Arc::clone(&self.stop_when)));
        let mut worker = match Worker::new(driver, self.plan) {
            Err(DriverError::Stopped) => return Ok(()),
            worker => worker?,
        };
        worker.search = search.map(Exhaustive::worker);
        let before = worker.driver.engine().costs();
        worker.checks = Duration::ZERO;
        let begun = Instant::now();
        let ended = self.executions(&mut worker, summary);
        summary.worked = begun.elapsed();
        summary.costs = worker.driver.engine().costs().since(&before);
        summary.checks = worker.checks + worker.driver.checks();
        ended
    }

    fn executions<E: Engine>(
        &self,
        worker: &mut Worker<E>,
        summary: &mut Summary,
    ) -> Result<(), DriverError> {
        let Self { plan, counts, .. } = self;
        while !(self.stop_when)() && !self.over.load(Ordering::Relaxed) {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= plan.executions {
                break;
            }
            let which = || format!("execution {index} ({:?} seed {})", plan.strategy, plan.seed);
            match worker.one(index, plan, &self.pairs, summary) {
                Ok(false) | Err(DriverError::Stopped) => break,
                went_on => went_on.map_err(|error| worker.of_execution(error, which))?,
            };
            counts.executions.fetch_add(1, Ordering::Relaxed);
            if let Some(search) = &worker.search {
                *counts.within.lock().expect("no job panics") = Some(search.reached());
            }
            let found = summary.found.last();
            if let Some(found) = found.filter(|found| found.index == index) {
                (self.tell)(found);
                counts.found.fetch_add(1, Ordering::Relaxed);
                if plan.first {
                    self.over.store(true, Ordering::Relaxed);
                }
            }
            if index.is_multiple_of(64) {
                let known = self.pairs.lock().expect("no job panics").len() as u64;
                counts.pairs.store(known, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}

type Pairs = Mutex<FxHashSet<u64>>;

/// One engine and its monitors.
pub struct Worker<E> {
    driver: Driver<E>,
    monitors: Vec<Box<dyn Monitor>>,
    /// Points of one execution in turns: what PCT spreads its changes over.
    length: u64,
    search: Option<Exhaustive>,
    coverage: Coverage,
    new_pairs: Vec<u64>,
    /// Time in checks at the ends of executions.
    checks: Duration,
    /// What [`Plan::fail_any`] is drawn from.
    passages: Passages,
}

impl<E: Engine> Worker<E> {
    /// Looks at the state that `driver`'s schedules start from.
    ///
    /// # Errors
    /// The engine failed.
    pub fn new(driver: Driver<E>, plan: &Plan) -> Result<Self, DriverError> {
        let mut worker = Self {
            driver,
            monitors: vec![Box::new(Panel::default())],
            length: 1,
            search: None,
            coverage: Coverage::default(),
            new_pairs: Vec::new(),
            checks: Duration::ZERO,
            passages: Passages::default(),
        };
        worker.driver.look_everywhere(plan.everywhere);
        worker.driver.start(&mut worker.monitors)?;
        if !plan.fail_any.is_empty() {
            let vcpus = worker.driver.engine().nr_vcpus();
            let counting = failing::counting(&plan.fail_any, vcpus, &plan.fails);
            worker.arm(&counting);
            worker.measured()?;
            worker.passages = Passages::read(worker.driver.engine().memory(), &counting);
        }
        worker.arm(&plan.fails);
        if let Strategy::Pct { .. } = plan.strategy {
            let run = worker.measured()?;
            worker.length = run.schedule.points().max(1);
        }
        Ok(worker)
    }

    /// An execution of which one only looks how long it is.
    fn measured(&mut self) -> Result<Execution, DriverError> {
        let which = || "the execution that measures (round robin)".to_owned();
        let run = self.execute(&mut RoundRobin::new(8), false);
        run.map_err(|error| self.of_execution(error, which))
    }

    /// With the execution in which it came up, where that tells something.
    fn of_execution(&self, error: DriverError, which: impl FnOnce() -> String) -> DriverError {
        match error {
            DriverError::Engine(source @ EngineError::NoPoint { .. }) => DriverError::Hung {
                which: which(),
                schedule: Box::new(self.driver.unended().clone()),
                source: Box::new(source),
            },
            other => other,
        }
    }

    /// Lets `fails` fail in every execution from now on.
    pub fn arm(&mut self, fails: &[Fail]) {
        self.driver.arm(fails);
    }

    /// As [`Driver::stop_when`].
    pub fn stop_when(&mut self, stop: Option<StopWhen>) {
        self.driver.stop_when(stop);
    }

    /// Runs one schedule with all monitors; `state`: all invariants look at the state at its end.
    ///
    /// # Errors
    /// The engine failed, or the schedule is impossible.
    pub fn execute(
        &mut self,
        scheduler: &mut dyn Scheduler,
        state: bool,
    ) -> Result<Execution, DriverError> {
        let run = self.next(scheduler, state, false)?;
        let mut run = run.expect("a fresh scheduler has one execution");
        self.driver.fill(&mut run);
        Ok(run)
    }

    /// As [`Worker::execute`] without the events; none where the scheduler has no more. `counts`: its pairs do.
    fn next(
        &mut self,
        scheduler: &mut dyn Scheduler,
        state: bool,
        counts: bool,
    ) -> Result<Option<Execution>, DriverError> {
        let Self {
            driver,
            monitors,
            coverage,
            new_pairs,
            ..
        } = self;
        coverage.begin();
        let mut on_step = |vcpu: usize, events: &[Event]| {
            if counts {
                coverage.take(vcpu, events, new_pairs);
            }
        };
        let Some(mut run) = driver.execute_bare(scheduler, monitors, &mut on_step)? else {
            return Ok(None);
        };
        if let Ending::Finished { status } = run.ending {
            let started = Instant::now();
            let engine = self.driver.engine();
            let root = engine.kernel_root().unwrap_or(0);
            let mut found = Vec::new();
            for monitor in &mut self.monitors {
                monitor.compare(engine.memory(), root, &mut found);
            }
            if state && found.is_empty() {
                let moment = match status {
                    Some(_) => Moment::AfterExit,
                    None => Moment::Paused,
                };
                found.extend(self.driver.look(moment)?);
            }
            if !found.is_empty() {
                run.ending = Ending::Violation(Box::new(found.swap_remove(0)));
            }
            self.checks += started.elapsed();
        }
        Ok(Some(run))
    }

    /// Replays `schedule` exactly.
    ///
    /// # Errors
    /// As [`Worker::execute`].
    pub fn replay(&mut self, schedule: &Schedule) -> Result<Execution, DriverError> {
        self.execute(&mut Replay::new(schedule.clone()), true)
    }

    /// Goes on where the last execution ended with `violation`: what the program finds then.
    ///
    /// # Errors
    /// The engine failed.
    pub fn go_on(&mut self, violation: &Violation) -> Result<Vec<Shown>, DriverError> {
        self.driver.go_on(violation.finding.where_.vcpu)
    }

    /// The cheapest schedule that is found to fail as `failing` does, and its execution. The search ends after so
    /// many `runs`, or when `goes_on` says no.
    ///
    /// # Errors
    /// The engine failed.
    pub fn minimise(
        &mut self,
        failing: &Execution,
        runs: usize,
        goes_on: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Result<Execution, DriverError> {
        let stop: StopWhen = Arc::new(move || !goes_on());
        self.stop_when(Some(Arc::clone(&stop)));
        let small = self.smaller(failing, runs, &stop);
        self.stop_when(None);
        self.replay(&small?)
    }

    fn smaller(
        &mut self,
        failing: &Execution,
        runs: usize,
        stop: &StopWhen,
    ) -> Result<Schedule, DriverError> {
        let id = failure_id(&failing.ending);
        let mut start = failing.schedule.clone();
        let mut fails = failing.fails.clone();
        for index in (0..fails.len()).rev() {
            if stop() {
                break;
            }
            // What has nothing to do with the failure need not fail.
            let left_out = fails.remove(index);
            self.arm(&fails);
            match self.fails_as(&id, &start)? {
                Some(schedule) => start = schedule,
                None => fails.insert(index, left_out),
            }
        }
        self.arm(&fails);
        minimise::minimise(start, runs, |candidate| {
            if stop() {
                return Ok(None);
            }
            self.fails_as(&id, candidate)
        })
    }

    /// What was really run, where `candidate` fails in this way.
    fn fails_as(
        &mut self,
        id: &Option<String>,
        candidate: &Schedule,
    ) -> Result<Option<Schedule>, DriverError> {
        match self.execute(&mut Tolerant::new(candidate.clone()), true) {
            Ok(run) => Ok((failure_id(&run.ending) == *id).then_some(run.schedule)),
            // Another schedule than the one that fails: no reason to lose that.
            Err(DriverError::TooLong { .. } | DriverError::Stopped) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The engine.
    pub fn engine(&mut self) -> &mut E {
        self.driver.engine()
    }

    fn one(
        &mut self,
        index: u64,
        plan: &Plan,
        pairs: &Pairs,
        summary: &mut Summary,
    ) -> Result<bool, DriverError> {
        let is_due = |every: u64| every != 0 && index.is_multiple_of(every);
        if let Some(drawn) = self.passages.draw(plan.seed, index) {
            let mut fails = plan.fails.clone();
            fails.push(drawn);
            self.arm(&fails);
        }
        // What a failure leaves behind is seen at the end only.
        let injects = !plan.fails.is_empty() || !plan.fail_any.is_empty();
        let state = injects || is_due(plan.state_every);
        let (seed, quantum) = (plan.seed, index + 1);
        let run = match plan.strategy {
            Strategy::Random { mean } => {
                self.next(&mut Random::new(seed, index, mean), state, true)?
            }
            Strategy::Pct { depth } => {
                let mut pct = Pct::new(seed, index, depth, Some(self.length));
                self.next(&mut pct, state, true)?
            }
            Strategy::RoundRobin => self.next(&mut RoundRobin::new(quantum), state, true)?,
            Strategy::Exhaustive { .. } => {
                let mut search = self
                    .search
                    .take()
                    .expect("every worker of a search has its own");
                let run = self.next(&mut search, state, true);
                self.search = Some(search);
                run?
            }
        };
        let Some(mut run) = run else {
            return Ok(false);
        };
        summary.executions += 1;
        summary.points += run.schedule.points();
        summary.events += self.driver.told() as u64;
        summary.states += u64::from(state);
        if !self.new_pairs.is_empty() {
            let mut pairs = pairs.lock().expect("no job panics");
            pairs.extend(self.new_pairs.drain(..));
        }
        let (fails, verifies) = (failure_id(&run.ending).is_some(), is_due(plan.verify_every));
        if fails || verifies {
            self.driver.fill(&mut run);
        }
        if verifies {
            let mut replay = Replay::new(run.schedule.clone());
            match self.execute(&mut replay, state) {
                Ok(again) => {
                    summary.verified += 1;
                    if let Some(difference) = difference(&run, &again) {
                        return Err(DriverError::Nondeterminism { index, difference });
                    }
                }
                // The schedule itself has come to its end.
                Err(DriverError::Stopped) => {}
                Err(error) => return Err(error),
            }
        }
        // An exhaustive search comes by some failures more than once, with each bound and in each job.
        let is_new = |search: &Exhaustive| search.fails_anew();
        if fails && self.search.as_ref().is_none_or(is_new) {
            summary.found.push(Found {
                index,
                execution: run,
            });
        } else {
            if !fails {
                summary.sample.offer(index, &run);
            }
            self.driver.recycle(run);
        }
        Ok(true)
    }
}

/// Where two runs of one schedule on one engine differ.
fn difference(run: &Execution, again: &Execution) -> Option<String> {
    if let Some(difference) = compare::difference(&run.events, &again.events, Masks::Nothing) {
        return Some(difference.to_string());
    }
    let (first, second) = (failure_id(&run.ending), failure_id(&again.ending));
    let name = |ending: Option<String>| ending.unwrap_or_else(|| "nothing wrong".into());
    (first != second).then(|| format!("it ends with {}, then with {}", name(first), name(second)))
}
