//! Runs one schedule on an engine.

use std::mem::offset_of;
use std::sync::Arc;
use std::time::{Duration, Instant};

use abi::channel::{Event, EventKind, ReportKind};
use abi::lock::LockClass;
use abi::objects::{Cpu, CpuRcu};
use abi::point::{Point, Wait};
use abi::syscall::{Errno, nr};

use super::probe::{Favour, MAX_REPORTS, Shown};
use super::{Actor, Schedule, Scheduler, View};
use crate::check::stream::{Monitor, Seen};
use crate::check::{self, Context, Moment, Violation};
use crate::control::ProbeReport;
use crate::engine::{Engine, EngineError, GuestCrash, Halt, Limit, PointSet, UNBOUNDED};
use crate::inspect::{FolioView, Snapshot, TaskView};
use crate::scenario::Fail;

/// Points at which a vCPU always stops: it may not be able to go on, or the schedule is over.
const ALWAYS: PointSet = PointSet::of(&[
    Point::LockWait,
    Point::FlushWait,
    Point::IdleEnter,
    Point::UserRelax,
    Point::RcuWait,
    Point::DiskWait,
    Point::TestBegin,
    Point::TestEnd,
]);

/// Where a vCPU stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// At this point; none before its first.
    pub point: Option<Point>,
    /// Arguments of the point.
    pub args: [u64; 2],
}

impl Standing {
    /// What it waits for, where it stands at a wait.
    #[must_use]
    pub fn wait(&self) -> Option<Wait> {
        self.point?.wait(self.args)
    }
}

/// What one vCPU waits for, in a deadlock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitsFor {
    /// vCPU.
    pub vcpu: usize,
    /// What for.
    pub wait: Wait,
    /// Value of the word that it waits on: a spin lock's is the holder's CPU plus one. For a grace period the mask
    /// of the vCPUs that hold it up.
    pub word: u64,
}

/// How an execution ended.
#[derive(Clone, Debug)]
pub enum Ending {
    /// The program's test is over, or the first process has ended.
    Finished {
        /// The first process's exit status, where it has ended.
        status: Option<u32>,
    },
    /// A monitor found something.
    Violation(Box<Violation>),
    /// A program found a wrong value.
    Report {
        /// vCPU on which it was found.
        vcpu: usize,
        /// What was found.
        report: ProbeReport,
    },
    /// Nobody can take a step: what the vCPUs wait for, and the tasks that sleep.
    Deadlock(Vec<WaitsFor>, Vec<TaskView>),
    /// All that can run only wait for each other: where the vCPUs are, and the tasks that sleep.
    Livelock(Vec<Standing>, Vec<TaskView>),
    /// The guest cannot go on.
    Crashed {
        /// On which vCPU.
        vcpu: usize,
        /// What happened.
        crash: GuestCrash,
    },
    /// The scheduler had no more steps (a replay that is over).
    ScheduleOver,
}

/// One execution.
#[derive(Debug)]
pub struct Execution {
    /// What was run.
    pub schedule: Schedule,
    /// Passages of failpoints that were to fail.
    pub fails: Vec<Fail>,
    /// How it ended.
    pub ending: Ending,
    /// Everything that was recorded, in order.
    pub events: Vec<Seen>,
}

/// Bounds of one execution.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Scheduling points.
    pub points: u64,
    /// Times that anybody waited for anyone while nobody did anything else.
    pub idle_turns: u64,
    /// Events: the kernel records about one for each point, a guest that lies as many as it likes.
    pub events: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            points: 1_000_000,
            idle_turns: 1_000,
            events: 4_000_000,
        }
    }
}

/// Why there is no execution.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The scheduler chose somebody who cannot take a step: an impossible schedule.
    #[error("after {points} points {actor} is to run, but cannot: {why}")]
    Impossible {
        /// Who.
        actor: Actor,
        /// Points so far.
        points: u64,
        /// Where it stands, or that nothing is in flight.
        why: String,
    },
    /// Two runs of one schedule differ: a bug of the first rank, of the kernel or of the engine.
    #[error("execution {index} is not the same when its schedule is replayed: {difference}")]
    Nondeterminism {
        /// Number of the execution.
        index: u64,
        /// The first difference.
        difference: String,
    },
    /// A schedule does not come to its end: the test is too long to be explored, or never ends.
    #[error(
        "a schedule is not over after {points} points: the test is too long to explore, or something in it never ends; give the program less to do"
    )]
    TooLong {
        /// Points so far.
        points: u64,
    },
    /// It was stopped before its end ([`Driver::stop_when`]), and tells nothing.
    #[error("stopped before the end of the schedule")]
    Stopped,
    /// A vCPU hung in an execution of a campaign.
    #[error("{which} hangs after schedule = \"{schedule}\"")]
    Hung {
        /// The execution, and what had chosen it.
        which: String,
        /// Its steps before the one that does not end.
        schedule: Box<Schedule>,
        /// Which vCPU, and where.
        source: Box<EngineError>,
    },
    /// The set-up of the program did not get to the start of the schedule.
    #[error("the program's set-up ended early: {0}")]
    SetUp(String),
}

/// Asked again and again during executions: true once they are to end where they are.
pub type StopWhen = Arc<dyn Fn() -> bool + Send + Sync>;

/// Steps in which nobody is asked whether to stop: asking is to cost nothing beside them.
const UNASKED: u64 = 16;

/// Turns of a set-up in which always the first runs who can; then each in turn.
const UNFAIR_TURNS: u64 = 1_000;

/// Runs schedules on one engine.
pub struct Driver<E> {
    engine: E,
    limits: Limits,
    /// Where each vCPU stands now, and where at the start of a schedule.
    standing: Vec<Standing>,
    at_start: Vec<Standing>,
    /// What happened from boot to there; nothing, where it is not known.
    since_boot: Arc<[Seen]>,
    /// For each vCPU, number of the step in which it began to wait for anyone.
    steps: u64,
    stopped_in: Vec<u64>,
    enabled: Vec<Actor>,
    /// Who would be enabled too, had it not been the last to run and only wait for anyone.
    relaxing: Vec<Actor>,
    /// Times that somebody waited for anyone since anybody did anything else.
    idle_turns: u64,
    /// What has happened in this execution, and who did it from where on.
    stream: Vec<Event>,
    turns: Vec<(usize, usize)>,
    /// Where the last step begins in it.
    since: usize,
    /// Memory of executions that nobody needs any more.
    spare: Vec<Seen>,
    spare_folios: Vec<FolioView>,
    /// Time in monitors since the first execution.
    checks: Duration,
    looks: bool,
    spare_schedule: Schedule,
    /// Failpoints to arm for each execution, and those that may still be armed from the last one.
    fails: Vec<Fail>,
    armed: Vec<Fail>,
    /// Where the step came to in which a monitor found something.
    cut_short: Option<(usize, Halt)>,
    stop_when: Option<StopWhen>,
    /// What was run of the last execution that has no end.
    unended: Schedule,
}

impl<E: Engine> Driver<E> {
    /// Runs the set-up of `engine`'s program by a fixed policy to [`Point::TestBegin`] (to the first user
    /// instruction, where the program has no such point and `to_begin` is false) and notes that state as
    /// the start of every schedule.
    ///
    /// # Errors
    /// The engine failed, or the program did not get there.
    pub fn new(engine: E, limits: Limits, to_begin: bool) -> Result<Self, DriverError> {
        let none = Standing {
            point: None,
            args: [0; 2],
        };
        let vcpus = engine.nr_vcpus();
        let mut driver = Self::resume(engine, limits, vec![none; vcpus], Arc::default());
        let mut events = Vec::new();
        driver.set_up(to_begin, &mut events)?;
        driver.engine.save()?;
        driver.since_boot = events.into();
        driver.at_start = driver.standing.clone();
        Ok(driver)
    }

    /// Goes on with an engine that has saved its state, in which its vCPUs stand at `at_start`; `since_boot` is
    /// what happened up to there, or nothing, where that is not known.
    pub fn resume(
        engine: E,
        limits: Limits,
        at_start: Vec<Standing>,
        since_boot: Arc<[Seen]>,
    ) -> Self {
        let vcpus = at_start.len();
        Self {
            engine,
            limits,
            standing: at_start.clone(),
            at_start,
            since_boot,
            steps: 0,
            stopped_in: vec![0; vcpus],
            enabled: Vec::new(),
            relaxing: Vec::new(),
            idle_turns: 0,
            stream: Vec::new(),
            turns: Vec::new(),
            since: 0,
            spare: Vec::new(),
            spare_folios: Vec::new(),
            spare_schedule: Schedule::default(),
            checks: Duration::ZERO,
            looks: false,
            fails: Vec::new(),
            armed: Vec::new(),
            cut_short: None,
            stop_when: None,
            unended: Schedule::default(),
        }
    }

    /// What was run of the last execution that ended with an error.
    pub fn unended(&self) -> &Schedule {
        &self.unended
    }

    /// Ends executions in the middle, with [`DriverError::Stopped`], once `stop` says so.
    pub fn stop_when(&mut self, stop: Option<StopWhen>) {
        self.stop_when = stop;
    }

    fn is_stopped(&self) -> bool {
        self.stop_when.as_ref().is_some_and(|stop| stop())
    }

    /// Lets `fails` fail in every execution from now on. Those executions go on to the exit of the machine,
    /// for only there it shows whether an operation that failed has left something behind.
    pub fn arm(&mut self, fails: &[Fail]) {
        self.fails.clear();
        self.fails.extend_from_slice(fails);
    }

    fn arm_failpoints(&mut self) {
        for fail in self.armed.drain(..) {
            self.engine.arm(fail.vcpu, fail.failpoint, 0);
        }
        for fail in &self.fails {
            self.engine.arm(fail.vcpu, fail.failpoint, fail.passage);
        }
        self.armed.clone_from(&self.fails);
    }

    /// Where each vCPU stands at the start of every schedule.
    pub fn start_standing(&self) -> &[Standing] {
        &self.at_start
    }

    /// What happened from boot to the start of every schedule; nothing, where that is not known.
    pub fn since_boot(&self) -> Arc<[Seen]> {
        Arc::clone(&self.since_boot)
    }

    /// Starts `monitors` from the state at the start of every schedule.
    ///
    /// # Errors
    /// The engine failed.
    pub fn start(&mut self, monitors: &mut [Box<dyn Monitor>]) -> Result<(), DriverError> {
        self.engine.reset()?;
        let root = self.engine.kernel_root().unwrap_or(0);
        for monitor in monitors {
            monitor.since_boot(&self.since_boot, self.standing.len());
            monitor.start(self.engine.memory(), root, self.standing.len());
        }
        Ok(())
    }

    /// Takes an execution back that nobody needs any more: the next one uses its memory.
    pub fn recycle(&mut self, mut run: Execution) {
        run.events.clear();
        self.spare = run.events;
        run.schedule.segments.clear();
        self.spare_schedule = run.schedule;
    }

    /// Time in monitors so far.
    pub fn checks(&self) -> Duration {
        self.checks
    }

    /// The engine.
    pub fn engine(&mut self) -> &mut E {
        &mut self.engine
    }

    /// The first vCPU runs to the first user instruction, then every other one until it waits; then
    /// always the first that can, until it waits or has sent an IPI, which is delivered at once.
    fn set_up(&mut self, to_begin: bool, events: &mut Vec<Seen>) -> Result<(), DriverError> {
        self.set_up_step(0, events, |halt| matches!(halt, Halt::FirstUser))?;
        for vcpu in 1..self.standing.len() {
            // It may wait for an interrupt that the first one sent while it was not yet there.
            self.engine.deliver(vcpu);
            self.set_up_step(vcpu, events, is_wait)?;
            if self.engine.pending(vcpu) {
                // It came before interrupts were on. A test that begins at once begins without it.
                self.set_up_step(vcpu, events, is_wait)?;
            }
        }
        for turn in 0.. {
            if !to_begin {
                return Ok(());
            }
            self.steps += 1;
            self.find_enabled();
            let device = self.enabled.iter().find(|actor| actor.vcpu().is_none());
            // Two that wait for a third must not keep it off for ever.
            let first = if turn < UNFAIR_TURNS {
                self.enabled.first()
            } else {
                self.enabled.iter().min_by_key(|actor| {
                    let since = |vcpu: u8| self.stopped_in[usize::from(vcpu)];
                    actor.vcpu().map_or(0, since)
                })
            };
            let Some(&actor) = device.or(first) else {
                return Err(DriverError::SetUp("nobody can run".into()));
            };
            if turn > self.limits.points {
                return Err(DriverError::SetUp("it does not end".into()));
            }
            if let Some(vcpu) = self.vcpu_or_act(actor) {
                let at_point = |halt: &Halt| matches!(halt, Halt::Point { .. });
                let halt = self.set_up_step(vcpu, events, at_point)?;
                if matches!(
                    halt,
                    Halt::Point {
                        point: Point::TestBegin,
                        ..
                    }
                ) {
                    return Ok(());
                }
            }
        }
        unreachable!("the loop has no end of its own")
    }

    fn set_up_step(
        &mut self,
        vcpu: usize,
        events: &mut Vec<Seen>,
        wanted: impl Fn(&Halt) -> bool,
    ) -> Result<Halt, DriverError> {
        let limit = Limit {
            points: UNBOUNDED,
            traps: ALWAYS.and(self.awaited()),
        };
        for _ in 0..=self.limits.points {
            self.stream.clear();
            let halt = self.engine.run(vcpu, limit, &mut self.stream)?;
            events.extend(self.stream.iter().map(|&event| Seen { vcpu, event }));
            if events.len() > self.limits.events {
                // A guest may record as many as it likes. With holes they say nothing of the past.
                events.clear();
            }
            if let Halt::Point { point, args } = halt {
                self.standing[vcpu] = Standing {
                    point: Some(point),
                    args,
                };
                self.stopped_in[vcpu] = self.steps;
            }
            match &halt {
                halt if wanted(halt) => return Ok(halt.clone()),
                // The first point after an IPI.
                Halt::Point { point, .. } if !ALWAYS.has(*point) => {}
                halt => return Err(DriverError::SetUp(format!("vCPU {vcpu}: {halt:?}"))),
            }
        }
        Err(DriverError::SetUp(format!(
            "vCPU {vcpu} passes points for ever"
        )))
    }

    /// Runs one execution from the start; none where the scheduler has no more.
    ///
    /// # Errors
    /// The engine failed, or the scheduler chose what is impossible.
    pub fn execute(
        &mut self,
        scheduler: &mut dyn Scheduler,
        monitors: &mut [Box<dyn Monitor>],
    ) -> Result<Option<Execution>, DriverError> {
        let mut run = self.execute_bare(scheduler, monitors, &mut |_, _| {})?;
        if let Some(run) = &mut run {
            self.fill(run);
        }
        Ok(run)
    }

    /// The same without its events, for who asks seldom for them: [`Driver::fill`]. `on_step` is told what each vCPU did in
    /// each step.
    ///
    /// # Errors
    /// As [`Driver::execute`].
    pub fn execute_bare(
        &mut self,
        scheduler: &mut dyn Scheduler,
        monitors: &mut [Box<dyn Monitor>],
        on_step: &mut dyn FnMut(usize, &[Event]),
    ) -> Result<Option<Execution>, DriverError> {
        if !scheduler.begin() {
            return Ok(None);
        }
        self.engine.reset()?;
        self.arm_failpoints();
        self.cut_short = None;
        self.standing.clone_from(&self.at_start);
        self.stopped_in.fill(0);
        self.steps = 0;
        self.idle_turns = 0;
        for monitor in monitors.iter_mut() {
            monitor.reset();
        }
        let mut run = Execution {
            schedule: std::mem::take(&mut self.spare_schedule),
            fails: self.fails.clone(),
            ending: Ending::ScheduleOver,
            events: std::mem::take(&mut self.spare),
        };
        match self.steps_to_end(scheduler, monitors, on_step, &mut run) {
            Ok(ending) => run.ending = ending,
            Err(error) => {
                self.unended = run.schedule;
                return Err(error);
            }
        }
        scheduler.end(&run.schedule);
        Ok(Some(run))
    }

    /// How many events the last execution has.
    pub fn told(&self) -> usize {
        self.stream.len()
    }

    /// Puts the events of the last execution, which is `run`, into it.
    pub fn fill(&self, run: &mut Execution) {
        run.events.clear();
        run.events.reserve(self.stream.len());
        let ends = self.turns.iter().skip(1).map(|(_, begin)| *begin);
        let ends = ends.chain([self.stream.len()]);
        for (&(vcpu, begin), end) in self.turns.iter().zip(ends) {
            let events = self.stream[begin..end].iter();
            run.events.extend(events.map(|&event| Seen { vcpu, event }));
        }
    }

    /// Goes on after [`Driver::execute`] has ended with a violation, judged by nobody: `favoured` runs
    /// whenever it can. Returns the wrong values that the program finds until its test is over.
    ///
    /// # Errors
    /// The host failed. A vCPU that no longer reaches a point has nothing more to tell.
    pub fn go_on(&mut self, favoured: Option<usize>) -> Result<Vec<Shown>, DriverError> {
        let mut shown = Vec::new();
        match self.cut_short.take() {
            Some((vcpu, Halt::Report(report))) => shown.push(Shown { vcpu, report }),
            Some((_, Halt::Point { point, .. })) if point != Point::TestEnd => {}
            // The machine or its test is over.
            _ => return Ok(shown),
        }
        while shown.len() < MAX_REPORTS {
            let mut rest = Execution {
                schedule: Schedule::default(),
                fails: Vec::new(),
                ending: Ending::ScheduleOver,
                events: Vec::new(),
            };
            match self.steps_to_end(&mut Favour(favoured), &mut [], &mut |_, _| {}, &mut rest) {
                Ok(Ending::Report { vcpu, report }) => shown.push(Shown { vcpu, report }),
                Ok(_)
                | Err(
                    DriverError::TooLong { .. } | DriverError::Engine(EngineError::NoPoint { .. }),
                ) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(shown)
    }

    fn steps_to_end(
        &mut self,
        scheduler: &mut dyn Scheduler,
        monitors: &mut [Box<dyn Monitor>],
        on_step: &mut dyn FnMut(usize, &[Event]),
        run: &mut Execution,
    ) -> Result<Ending, DriverError> {
        let mut found = Vec::new();
        let mut last = None;
        let mut points = 0u64;
        self.stream.clear();
        self.turns.clear();
        self.since = 0;
        loop {
            self.steps += 1;
            self.find_enabled();
            if self.enabled.is_empty() {
                return Ok(Ending::Deadlock(self.who_waits(), self.who_sleeps()));
            }
            if self.idle_turns > self.limits.idle_turns {
                return Ok(Ending::Livelock(self.standing.clone(), self.who_sleeps()));
            }
            if points > self.limits.points || self.stream.len() > self.limits.events {
                return Err(DriverError::TooLong { points });
            }
            if self.steps.is_multiple_of(UNASKED) && self.is_stopped() {
                return Err(DriverError::Stopped);
            }
            let view = View {
                points,
                last,
                enabled: &self.enabled,
                standing: &self.standing,
                events: &self.stream[self.since..],
                idle_turns: self.idle_turns,
            };
            let Some(choice) = scheduler.choose(&view) else {
                return Ok(Ending::ScheduleOver);
            };
            if !view.can(choice.actor) {
                return Err(self.impossible(choice.actor, points));
            }
            self.since = self.stream.len();
            let Some(vcpu) = self.vcpu_or_act(choice.actor) else {
                self.idle_turns = 0;
                run.schedule.push(choice.actor, 1);
                last = Some((choice.actor, 1));
                continue;
            };
            let before = self.engine.points_passed(vcpu);
            // A guest that passes points for ever without a wait must come back too.
            let left = self.limits.points.saturating_sub(points).saturating_add(1);
            let limit = Limit {
                points: choice.points.clamp(1, left),
                traps: ALWAYS.and(self.awaited()),
            };
            let halt = if self.looks {
                self.run_and_look(vcpu, limit, &mut found)?
            } else {
                self.engine.run(vcpu, limit, &mut self.stream)?
            };
            // The count lies in guest memory: what cannot be is not believed. A step that does not reach
            // a point counts too: a replay must take it.
            let told = self.engine.points_passed(vcpu).saturating_sub(before);
            let passed = match halt {
                Halt::Point { .. } | Halt::Instruction { .. } => told.clamp(1, limit.points),
                _ => told.min(limit.points - 1) + 1,
            };
            points += passed;
            run.schedule.push(choice.actor, passed);
            last = Some((choice.actor, passed));
            self.turns.push((vcpu, self.since));
            let started = Instant::now();
            let told = tell(monitors, vcpu, &self.stream[self.since..], &mut found);
            // What comes after the first that breaks a rule tells nothing more.
            self.stream.truncate(self.since + told);
            let others = self.standing.iter().enumerate();
            let mut others = others.filter(|(other, _)| *other != vcpu);
            if found.is_empty()
                && matches!(halt, Halt::Point { .. })
                && others.all(|(_, standing)| standing.point.is_some())
            {
                let root = self.engine.kernel_root().unwrap_or(0);
                for monitor in monitors.iter_mut() {
                    monitor.settled(self.engine.memory(), root, &mut found);
                }
            }
            self.checks += started.elapsed();
            on_step(vcpu, &self.stream[self.since..]);
            if !found.is_empty() {
                if let Halt::Point { point, args } = halt {
                    self.standing[vcpu] = Standing {
                        point: Some(point),
                        args,
                    };
                    self.stopped_in[vcpu] = self.steps;
                }
                self.cut_short = Some((vcpu, halt));
                // What a monitor says came before the state that was looked at.
                return Ok(Ending::Violation(Box::new(found.pop().expect("not empty"))));
            }
            match halt {
                Halt::Point { point, args } => {
                    self.standing[vcpu] = Standing {
                        point: Some(point),
                        args,
                    };
                    self.stopped_in[vcpu] = self.steps;
                    self.note_idle(point);
                    if point == Point::TestEnd && self.fails.is_empty() {
                        return Ok(Ending::Finished { status: None });
                    }
                }
                Halt::Instruction { .. } => {
                    self.standing[vcpu].point = None;
                    self.stopped_in[vcpu] = self.steps;
                    self.idle_turns = 0;
                }
                Halt::FirstUser => {}
                Halt::Report(report) if self.is_asked_for(&report) => {}
                Halt::Report(report) => return Ok(Ending::Report { vcpu, report }),
                Halt::Exited { status } => {
                    return Ok(Ending::Finished {
                        status: Some(status),
                    });
                }
                Halt::Crashed(crash) => return Ok(Ending::Crashed { vcpu, crash }),
            }
        }
    }

    /// The vCPU that is to run; none where `actor` is a device, whose step is done now.
    fn vcpu_or_act(&mut self, actor: Actor) -> Option<usize> {
        match actor {
            Actor::Vcpu(vcpu) => return Some(usize::from(vcpu)),
            Actor::Wire(to) => self.engine.deliver(usize::from(to)),
            Actor::Disk(of) => self.engine.disk_complete(usize::from(of)),
        }
        None
    }

    /// As [`Engine::run`], with a look at the whole state at every point; ends at the first that is broken.
    fn run_and_look(
        &mut self,
        vcpu: usize,
        limit: Limit,
        found: &mut Vec<Violation>,
    ) -> Result<Halt, DriverError> {
        let target = self.engine.points_passed(vcpu).saturating_add(limit.points);
        let mut runs = 0;
        loop {
            // A look takes as long as many steps.
            if self.is_stopped() {
                return Err(DriverError::Stopped);
            }
            runs += 1;
            let (one, seen) = (Limit { points: 1, ..limit }, self.stream.len());
            let halt = self.engine.run(vcpu, one, &mut self.stream)?;
            found.extend(self.look(Moment::Paused)?);
            let sends = |event: &Event| event.kind == EventKind::IpiSend as u32;
            match halt {
                Halt::Point { point, .. }
                    if found.is_empty()
                        && !limit.traps.has(point)
                        // The count lies in guest memory: it may stand still.
                        && self.engine.points_passed(vcpu) < target
                        && runs < limit.points
                        && !self.stream[seen..].iter().any(sends) => {}
                halt => return Ok(halt),
            }
        }
    }

    /// What the invariants say of the state now.
    ///
    /// # Errors
    /// The engine failed.
    pub fn look(&mut self, moment: Moment) -> Result<Option<Violation>, DriverError> {
        let started = Instant::now();
        let facts = self.engine.vcpu_facts()?;
        let root = self.engine.kernel_root().unwrap_or(0);
        let memory = self.engine.memory();
        let spare = std::mem::take(&mut self.spare_folios);
        let mut found = None;
        if let Ok(snapshot) = Snapshot::read_over(memory, root, spare) {
            let context = Context::new(memory, &snapshot, &facts, moment);
            found = check::run(&context).violations.into_iter().next();
            drop(context);
            self.spare_folios = snapshot.folios;
        }
        self.checks += started.elapsed();
        Ok(found)
    }

    /// Whether every point of every execution is looked at by all invariants: slow, and thorough.
    pub fn look_everywhere(&mut self, looks: bool) {
        self.looks = looks;
    }

    /// True for a call that failed, or a child that was killed, for want of memory in an execution in
    /// which a failpoint took it.
    fn is_asked_for(&self, report: &ProbeReport) -> bool {
        let killed = abi::syscall::signal::SIGKILL;
        // A copy from or to a page that cannot be had is EFAULT.
        let failed = [Errno::ENOMEM, Errno::EFAULT].map(|errno| abi::syscall::encode(Err(errno)));
        let is_want = report.found == killed || failed.contains(&report.found);
        let is_hit = |event: &Event| event.kind == EventKind::FailpointHit as u32;
        report.kind == ReportKind::WrongResult && is_want && self.stream.iter().any(is_hit)
    }

    /// Points after which somebody who waits may be able to go on: the scheduler is asked there.
    fn awaited(&self) -> PointSet {
        let waits = self.standing.iter().filter_map(Standing::wait);
        waits.fold(PointSet::default(), |set, wait| {
            set.and(match wait {
                // The second is the first point after a fault was counted as a reader in vain.
                Wait::Lock {
                    class: LockClass::VmaWrite,
                    ..
                } => PointSet::of(&[Point::LockRelease, Point::RcuExit]),
                Wait::Lock { .. } => PointSet::of(&[Point::LockRelease]),
                Wait::Acknowledged { .. } => PointSet::of(&[Point::IpiAck]),
                // The first points after a quiescent state; that of a vCPU that waits or idles stops anyway.
                Wait::GracePeriod { .. } => PointSet::of(&[
                    Point::SyscallEnter,
                    Point::FaultEnter,
                    Point::Access,
                    Point::IpiReceive,
                ]),
                // Nothing but the disk's own step answers a request.
                Wait::Disk { .. } | Wait::Interrupt | Wait::Anyone => PointSet::default(),
            })
        })
    }

    /// Counts a turn in which nothing was done but to wait for anyone. It goes by events and by waits, at
    /// which every step ends: so it does not matter in how many steps a vCPU passes the points between.
    fn note_idle(&mut self, point: Point) {
        let waits_for_anyone = point == Point::UserRelax;
        let waits = point.is_wait() && !waits_for_anyone;
        if waits || !self.stream[self.since..].iter().all(is_of_relax) {
            self.idle_turns = 0;
        }
        self.idle_turns += u64::from(waits_for_anyone);
    }

    fn find_enabled(&mut self) {
        self.enabled.clear();
        self.relaxing.clear();
        for vcpu in 0..self.standing.len() {
            let actor = Actor::Vcpu(vcpu as u8);
            let ready = match self.standing[vcpu].wait() {
                None => true,
                _ if self.engine.pending(vcpu) => true,
                Some(Wait::Lock { word, class }) => class.lets_in(self.word(word)),
                Some(Wait::Acknowledged { word }) => self.word(word) == 0,
                Some(Wait::GracePeriod { first }) => self.holds_up(vcpu, first) == 0,
                Some(Wait::Disk { request }) => Wait::disk_answered(self.word(request)),
                Some(Wait::Interrupt) => false,
                Some(Wait::Anyone) => {
                    let nobody_since = self.stopped_in[vcpu] + 1 == self.steps;
                    if nobody_since {
                        self.relaxing.push(actor);
                    }
                    !nobody_since
                }
            };
            if ready {
                self.enabled.push(actor);
            }
        }
        for vcpu in 0..self.standing.len() {
            if self.engine.in_flight(vcpu) {
                self.enabled.push(Actor::Wire(vcpu as u8));
            }
            if self.engine.disk_in_flight(vcpu) {
                self.enabled.push(Actor::Disk(vcpu as u8));
            }
        }
        if self.enabled.is_empty() {
            std::mem::swap(&mut self.enabled, &mut self.relaxing);
        } else if self.idle_turns > 2 * self.standing.len() as u64 {
            self.take_turns();
        }
    }

    /// Nobody gets anywhere, for those who run only wait for others: from here on each has its turn,
    /// whomever the scheduler likes best, so that the one who could is not passed by for ever.
    fn take_turns(&mut self) {
        let Self {
            enabled,
            standing,
            stopped_in,
            ..
        } = self;
        let free = |actor: &Actor| {
            let vcpu = usize::from(actor.vcpu()?);
            let wait = standing[vcpu].wait();
            matches!(wait, None | Some(Wait::Anyone)).then(|| stopped_in[vcpu])
        };
        if let Some(turn) = enabled.iter().filter_map(free).min() {
            enabled.retain(|actor| free(actor).is_none_or(|since| since == turn));
        }
    }

    /// A word of guest memory; one outside lets nobody in.
    fn word(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        match self.engine.memory().read(gpa, &mut bytes) {
            Ok(()) => u64::from_le_bytes(bytes),
            Err(_) => u64::MAX,
        }
    }

    fn holds_up(&self, vcpu: usize, first: u64) -> u64 {
        holds_up(|gpa| self.word(gpa), self.standing.len(), vcpu, first)
    }

    fn who_waits(&self) -> Vec<WaitsFor> {
        let waits = self.standing.iter().enumerate();
        waits
            .filter_map(|(vcpu, standing)| {
                let wait = standing.wait()?;
                let word = match wait {
                    Wait::Lock { word, .. } | Wait::Acknowledged { word } => self.word(word),
                    Wait::GracePeriod { first } => self.holds_up(vcpu, first),
                    Wait::Disk { request } => self.word(request),
                    Wait::Interrupt | Wait::Anyone => 0,
                };
                Some(WaitsFor { vcpu, wait, word })
            })
            .collect()
    }

    fn who_sleeps(&self) -> Vec<TaskView> {
        let root = self.engine.kernel_root().unwrap_or(0);
        let tasks = Snapshot::read(self.engine.memory(), root).map(|snapshot| snapshot.tasks);
        let mut tasks = tasks.unwrap_or_default();
        tasks.retain(|task| task.sleeps_for().is_some());
        tasks
    }

    fn impossible(&self, actor: Actor, points: u64) -> DriverError {
        let why = match actor {
            Actor::Wire(vcpu) => format!("nothing is in flight to vCPU {vcpu}"),
            Actor::Disk(vcpu) => format!("vCPU {vcpu} has asked the disk for nothing"),
            Actor::Vcpu(vcpu) => match self.standing.get(usize::from(vcpu)) {
                Some(Standing { point: None, .. }) => "it is at no scheduling point".into(),
                Some(Standing {
                    point: Some(point),
                    args: [first, second],
                }) => format!("it stands at {} ({first:#x}, {second:#x})", point.name()),
                None => format!("this machine has {} vCPUs", self.standing.len()),
            },
        };
        DriverError::Impossible { actor, points, why }
    }
}

/// Tells `monitors` of `events` of `vcpu`, up to the first in which one finds something: how many that are.
fn tell(
    monitors: &mut [Box<dyn Monitor>],
    vcpu: usize,
    events: &[Event],
    found: &mut Vec<Violation>,
) -> usize {
    if let [monitor] = monitors {
        return monitor.observe_all(vcpu, events, found);
    }
    let before = found.len();
    for (index, &event) in events.iter().enumerate() {
        for monitor in monitors.iter_mut() {
            monitor.observe(&Seen { vcpu, event }, found);
        }
        if found.len() > before {
            return index + 1;
        }
    }
    events.len()
}

/// True where the event belongs to waiting for anyone itself.
fn is_of_relax(event: &Event) -> bool {
    let kind = EventKind::from_id(event.kind);
    matches!(kind, Some(EventKind::SyscallEnter | EventKind::SyscallExit))
        && matches!(event.args[0], nr::SCHED_YIELD | nr::TESTBED_RELAX)
        || matches!(kind, Some(EventKind::LockAcquire | EventKind::LockRelease))
            && event.args[1] == LockClass::Sched as u64
}

fn is_wait(halt: &Halt) -> bool {
    matches!(halt, Halt::Point { point, .. } if point.is_wait())
}

/// The vCPUs of `nr` that hold up the grace period of `vcpu`, as a mask. The parts of RCU of the CPUs lie from `first`.
pub(crate) fn holds_up(word: impl Fn(u64) -> u64, nr: usize, vcpu: usize, first: u64) -> u64 {
    let field = |cpu: usize, offset: usize| {
        let offset = cpu * size_of::<Cpu>() + offset;
        word(first.wrapping_add(offset as u64))
    };
    let pending = field(vcpu, offset_of!(CpuRcu, pending));
    let cpus = (0..nr).filter(|cpu| pending & 1 << cpu != 0);
    let holding = cpus.filter(|cpu| {
        let seen = field(vcpu, offset_of!(CpuRcu, seen) + cpu * size_of::<u64>());
        CpuRcu::holds_up(seen, field(*cpu, offset_of!(CpuRcu, watching)))
    });
    holding.fold(0, |mask, cpu| mask | 1 << cpu)
}
