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

/// Runs that the search for a smaller schedule may take.
const MINIMISE_RUNS: usize = 2_000;

pub(super) fn explore(name: &Path, options: &Explore, output: &Output) -> Result<Exit, Failure> {
    let mut scenario = Scenario::load(name)?;
    run::override_with(&mut scenario, &options.machine);
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
    let (reproducer, scenario, schedule) = Reproducer::read(&options.file, options.any_kernel)?;
    output.check_json()?;
    let plan = Plan {
        strategy: Strategy::RoundRobin,
        executions: 0,
        seed: 0,
        time_limit: None,
        state_every: 1,
        verify_every: 0,
        jobs: 1,
        first: true,
    };
    let stop = interrupt::on_ctrl_c();
    let mut worker = Worker::new(make_engine(options.engine, &scenario)?, &plan)?;
    let mut same = 0;
    let mut last: Option<Execution> = None;
    let mut done = 0;
    while done < options.times && !stop.requested() {
        let run = worker.replay(&schedule)?;
        let ending = failure_id(&run.ending).unwrap_or_else(|| "nothing".into());
        if ending == reproducer.ending && compare::digest(&run.events) == reproducer.digest {
            same += 1;
        }
        last = Some(run);
        done += 1;
    }
    let Some(run) = last else {
        return Ok(Exit::Interrupted);
    };
    let ending = failure_id(&run.ending).unwrap_or_else(|| "nothing".into());
    let reproduced = ending == reproducer.ending;
    let mut text = String::new();
    if !options.brief {
        text.push_str(&story::tell(&run, scenario.vcpus as usize));
        text.push('\n');
    }
    let events = run.events.len();
    text.push_str(&if reproduced && same == done {
        format!("✘ reproduced: {ending}, {same} of {done} identical ({events} events, digest {})\n", reproducer.digest)
    } else if reproduced {
        format!(
            "✘ reproduced: {ending}, but the events are the recorded ones in {same} of {done} runs only\n"
        )
    } else {
        format!("✔ not reproduced: it ended with {ending}, not {}\n", reproducer.ending)
    });
    output.json(&json!({
        "schema": crate::report::SCHEMA,
        "kind": "replay",
        "kernel": boot::kernel_hash(),
        "expected": reproducer.ending,
        "found": ending,
        "identical": same,
        "runs": done,
        "text": story::ending(&run.ending),
    }))?;
    output.say(&text);
    Ok(match (reproduced, options.expect) {
        (true, false) => Exit::Violation,
        (true, true) if same == done => Exit::Held,
        (true, true) => Exit::Internal,
        (false, true) => Exit::Violation,
        (false, false) => Exit::Held,
    })
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
