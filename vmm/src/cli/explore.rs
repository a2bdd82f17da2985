//! `stalemate explore` and `stalemate replay`.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::args::{Explore, ExploreStrategy, Replay};
use super::exit::Exit;
use super::failure::Failure;
use super::output::Output;
use super::{interrupt, run};
use crate::boot;
use crate::engine::model::ModelEngine;
use crate::engine::{Engine, EngineKind};
use crate::explore::campaign::{self, Counts, Found, Plan, Strategy, Summary, Worker, failure_id};
use crate::explore::{DriverError, Ending, Execution, compare, switches};
use crate::report::story;
use crate::reproducer::Reproducer;
use crate::scenario::Scenario;

/// The program whose tests begin and end at points of their own.
const EXPLORABLE: &str = "litmus";
/// Runs that the search for a smaller schedule may take.
const MINIMISE_RUNS: usize = 2_000;

pub(super) fn explore(name: &Path, options: &Explore, output: &Output) -> Result<Exit, Failure> {
    let mut scenario = Scenario::load(name)?;
    run::override_with(&mut scenario, &options.machine);
    if scenario.program.name != EXPLORABLE {
        return Err(Failure::Usage {
            problem: format!(
                "program '{}' does not say where its test begins and ends, so it cannot be explored",
                scenario.program.name
            ),
            help: "explore a scenario of the program 'litmus': scenarios/litmus-*.toml".into(),
        });
    }
    make_explorable(&mut scenario);
    output.check_json()?;
    let seed = options.machine.seed.unwrap_or_else(fresh_seed);
    let plan = Plan {
        strategy: match options.strategy {
            ExploreStrategy::Random => Strategy::Random { mean: 8 },
            ExploreStrategy::Pct => Strategy::Pct {
                depth: options.depth,
            },
            ExploreStrategy::RoundRobin => Strategy::RoundRobin,
        },
        executions: options.schedules,
        seed,
        time_limit: options.time_limit,
        state_every: options.state_every,
        verify_every: options.verify,
        jobs: options.jobs.max(1),
        first: !options.keep_going,
    };
    let counts = Counts::default();
    let stop = AtomicBool::new(false);
    let make = || make_engine(options.engine, &scenario);
    let summary = with_progress(output, &plan, &counts, &stop, || {
        campaign::run(make, &plan, &counts, &stop)
    })?;
    let mut text = headline(
        &scenario,
        options,
        &plan,
        &summary,
        stop.load(Ordering::Relaxed),
    );
    let mut written = Vec::new();
    if !summary.found.is_empty() {
        let mut worker = Worker::new(make()?, &plan)?;
        let mut told: Vec<String> = Vec::new();
        for found in &summary.found {
            let id = failure_id(&found.execution.ending).expect("it was found");
            if told.contains(&id) {
                continue;
            }
            told.push(id.clone());
            let small = worker.minimise(&found.execution, MINIMISE_RUNS)?;
            let reproducer = reproducer(&scenario, options, &plan, found, &small, &id);
            let stem = format!("{}-{}", scenario.name, id.to_lowercase());
            let path = reproducer.write(&options.out, &stem)?;
            text.push_str(&chapter(&scenario, found, &small, &path));
            written.push(path.display().to_string());
        }
    }
    output.json(&json!({
        "schema": crate::report::SCHEMA,
        "kind": "explore",
        "scenario": scenario.name,
        "kernel": boot::kernel_hash(),
        "seed": seed,
        "executions": summary.executions,
        "points": summary.points,
        "events": summary.events,
        "conflicting_pairs": summary.pairs,
        "replayed_and_compared": summary.verified,
        "states_checked": summary.states,
        "seconds": summary.elapsed.as_secs_f64(),
        "costs": summary.costs,
        "failures": summary.found.iter().map(|found| json!({
            "execution": found.index,
            "failure": failure_id(&found.execution.ending),
            "text": story::ending(&found.execution.ending),
        })).collect::<Vec<_>>(),
        "reproducers": written,
    }))?;
    output.say(&text);
    let crashed = |found: &Found| matches!(found.execution.ending, Ending::Crashed { .. });
    Ok(match summary.found.as_slice() {
        [] if stop.load(Ordering::Relaxed) => Exit::Interrupted,
        [] => Exit::Held,
        found if found.iter().all(crashed) => Exit::GuestFailed,
        _ => Exit::Violation,
    })
}

pub(super) fn replay(options: &Replay, output: &Output) -> Result<Exit, Failure> {
    output.check_json()?;
    // All are read before any runs: what is refused is refused at once.
    let all = options
        .files
        .iter()
        .map(|file| Ok((file, Reproducer::read(file, options.any_kernel)?)))
        .collect::<Result<Vec<_>, Failure>>()?;
    let stop = interrupt::on_ctrl_c();
    let mut results = Vec::new();
    let mut exit = Exit::Held;
    for (file, (reproducer, scenario, schedule)) in &all {
        let mut worker = Worker::new(make_engine(options.engine, scenario)?, &REPLAY)?;
        let mut again = Again::default();
        while again.runs < options.times && !stop.requested() {
            again.take(worker.replay(schedule)?, reproducer);
        }
        let Some(last) = &again.last else {
            return Ok(Exit::Interrupted);
        };
        if !options.brief {
            output.say(&format!("{}\n", story::tell(last, scenario.vcpus as usize)));
        }
        output.say(&format!("{}: {}\n", file.display(), again.text(reproducer)));
        let this = again.exit(reproducer, options.expect);
        if exit == Exit::Held {
            exit = this;
        }
        results.push(json!({
            "file": file,
            "expected": reproducer.ending,
            "found": again.ending(),
            "identical": again.identical,
            "runs": again.runs,
            "text": story::ending(&last.ending),
        }));
    }
    output.json(&json!({
        "schema": crate::report::SCHEMA,
        "kind": "replay",
        "kernel": boot::kernel_hash(),
        "exit_code": exit.code(),
        "replays": results,
    }))?;
    Ok(exit)
}

/// A worker that only replays.
const REPLAY: Plan = Plan {
    strategy: Strategy::RoundRobin,
    executions: 0,
    seed: 0,
    time_limit: None,
    state_every: 1,
    verify_every: 0,
    jobs: 1,
    first: true,
};

/// Replays of one reproducer.
#[derive(Default)]
struct Again {
    runs: u64,
    /// Runs whose ending and events are the recorded ones.
    identical: u64,
    last: Option<Execution>,
}

impl Again {
    fn take(&mut self, run: Execution, reproducer: &Reproducer) {
        let same = compare::digest(&run.events) == reproducer.digest;
        self.last = Some(run);
        self.runs += 1;
        self.identical += u64::from(same && self.reproduced(reproducer));
    }

    fn ending(&self) -> String {
        let failure = self.last.as_ref().and_then(|run| failure_id(&run.ending));
        failure.unwrap_or_else(|| "nothing wrong".into())
    }

    fn reproduced(&self, reproducer: &Reproducer) -> bool {
        self.ending() == reproducer.ending
    }

    fn text(&self, reproducer: &Reproducer) -> String {
        let (ending, same, runs) = (self.ending(), self.identical, self.runs);
        if !self.reproduced(reproducer) {
            return format!("✔ not reproduced: {ending}, not {}", reproducer.ending);
        }
        let events = reproducer.events;
        format!(
            "✘ reproduced: {ending}; {same} of {runs} identical to the recorded {events} events"
        )
    }

    fn exit(&self, reproducer: &Reproducer, expected: bool) -> Exit {
        match (self.reproduced(reproducer), expected) {
            (true, true) if self.identical == self.runs => Exit::Held,
            // The failure is there, but a replay that differs is a defect of ours.
            (true, true) => Exit::Internal,
            (true, false) | (false, true) => Exit::Violation,
            (false, false) => Exit::Held,
        }
    }
}

/// What serialised runs need: nothing but the schedule may decide.
fn make_explorable(scenario: &mut Scenario) {
    scenario.interrupts = abi::boot::InterruptMode::Controlled;
    for (key, value) in [("tlb", "soft"), ("stamp", "ticket")] {
        if !scenario.params.iter().any(|(known, _)| known == key) {
            scenario.params.push((key.into(), value.into()));
        }
    }
}

fn make_engine(kind: EngineKind, scenario: &Scenario) -> Result<Box<dyn Engine>, DriverError> {
    Ok(match kind {
        EngineKind::Model => Box::new(ModelEngine::new(scenario)?),
        EngineKind::Kvm => Box::new(crate::engine::kvm::KvmEngine::new(scenario)?),
    })
}

fn fresh_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(1, |now| now.as_nanos() as u64 % 1_000_000_000)
}

fn with_progress<T>(
    output: &Output,
    plan: &Plan,
    counts: &Counts,
    stop: &AtomicBool,
    work: impl FnOnce() -> T,
) -> T {
    let interrupt = interrupt::on_ctrl_c();
    let over = AtomicBool::new(false);
    let bar = if output.shows_progress() {
        let style = ProgressStyle::with_template(
            "{elapsed_precise} {wide_bar} {pos}/{len} schedules, {per_sec}, {msg}",
        );
        ProgressBar::new(plan.executions).with_style(style.expect("a fixed template"))
    } else {
        ProgressBar::hidden()
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(50));
                if interrupt.requested() {
                    stop.store(true, Ordering::Relaxed);
                }
                bar.set_position(counts.executions.load(Ordering::Relaxed));
                let pairs = counts.pairs.load(Ordering::Relaxed);
                let found = counts.found.load(Ordering::Relaxed);
                bar.set_message(format!("{pairs} conflicting pairs, {found} failures"));
            }
        });
        let result = work();
        over.store(true, Ordering::Relaxed);
        bar.finish_and_clear();
        result
    })
}

fn headline(
    scenario: &Scenario,
    options: &Explore,
    plan: &Plan,
    summary: &Summary,
    interrupted: bool,
) -> String {
    let strategy = match plan.strategy {
        Strategy::Random { mean } => format!("random walk, runs of {mean} points on average"),
        Strategy::Pct { depth } => format!("PCT, depth {depth}"),
        Strategy::RoundRobin => "round robin".into(),
        Strategy::Exhaustive { preemptions } => preemptions.map_or_else(
            || "exhaustive".into(),
            |most| format!("exhaustive, at most {most} preemptions"),
        ),
    };
    let rate = summary.executions as f64 / summary.elapsed.as_secs_f64().max(1e-9);
    let verdict = match summary.found.len() {
        0 if interrupted => "– interrupted; nothing wrong was seen so far".to_owned(),
        0 => "✔ nothing wrong was seen".to_owned(),
        n => format!("✘ {n} of {} schedules fail", summary.executions),
    };
    let engine = match options.engine {
        EngineKind::Kvm => "kvm",
        EngineKind::Model => "model",
    };
    let average = |sum: u64| sum / summary.executions.max(1);
    format!(
        "{verdict}\n  scenario   {}{}\n  engine     {engine}, kernel {}\n  strategy   {strategy}, seed {}\n  \
         explored   {} schedules in {:.1} s ({rate:.0}/s), {} points and {} events each\n  \
         coverage   {} ordered pairs of conflicting events on different vCPUs\n  \
         checked    every event by the TLB model; {} ends by all invariants; {} schedules replayed and compared\n",
        scenario.name,
        bugs(scenario),
        boot::kernel_hash(),
        plan.seed,
        summary.executions,
        summary.elapsed.as_secs_f64(),
        average(summary.points),
        average(summary.events),
        summary.pairs,
        summary.states,
        summary.verified,
    )
}

fn bugs(scenario: &Scenario) -> String {
    let names: Vec<&str> = scenario.bugs.iter().map(|bug| bug.name()).collect();
    if names.is_empty() {
        String::new()
    } else {
        format!(", with the seeded bug {}", names.join(", "))
    }
}

fn reproducer(
    scenario: &Scenario,
    options: &Explore,
    plan: &Plan,
    found: &Found,
    small: &Execution,
    id: &str,
) -> Reproducer {
    let found_by = format!(
        "{:?} seed {} execution {} on {:?}",
        plan.strategy, plan.seed, found.index, options.engine
    );
    let stream = (small.events.len() as u64, compare::digest(&small.events));
    Reproducer::new(scenario, &small.schedule, found_by, id.into(), stream)
}

fn chapter(scenario: &Scenario, found: &Found, small: &Execution, path: &Path) -> String {
    let before = &found.execution.schedule;
    format!(
        "\nexecution {}, minimised from {} context switches to {}:\n\n{}\n  replay with: stalemate replay {}\n",
        found.index,
        switches(before),
        switches(&small.schedule),
        story::tell(small, scenario.vcpus as usize),
        path.display()
    )
}
