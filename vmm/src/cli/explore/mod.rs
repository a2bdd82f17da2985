//! `stalemate explore`; `replay` and `snapshot` beside it.

mod aftermath;
mod both;
mod replay;
mod search;
mod trace;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::args::{Engines, Explore, ExploreStrategy, Snapshot as SnapshotCommand};
use super::exit::Exit;
use super::failure::Failure;
use super::output::{self, Output};
use super::{interrupt, run};
use crate::boot;
use crate::engine::EngineKind;
use crate::explore::campaign::{self, Broken, Counts, Found, Plan, Strategy, Summary, failure_id};
use crate::explore::strategy::Explored;
use crate::explore::{Ending, Source};
use crate::report::story;
use crate::report::verdict::Detail;
use crate::scenario::{CheckWhen, Fail, Scenario, fail};
use crate::snapshot::{SavedMachine, SnapshotError};

use aftermath::{Aftermath, Early};
use both::{DEFAULT_CONFIRM, Second};
pub(super) use replay::replay;

/// Schedules that are tried where nobody says how many.
const DEFAULT_SCHEDULES: u64 = 10_000;

pub(super) fn explore(name: &Path, options: &Explore, output: &Output) -> Result<Exit, Failure> {
    trace::check_files(options.json.json.as_deref(), options.trace.as_deref())?;
    let source = source(name, options)?.with_window(options.window);
    let scenario = source.scenario();
    let both = options.engine == Some(Engines::Both);
    output.check_json()?;
    check_out(&options.out)?;
    let second = both.then(|| Second::new(scenario)).transpose()?;
    let seed = options.machine.seed.unwrap_or_else(fresh_seed);
    let sample = match options.confirm {
        Some(confirm) => confirm,
        None if both => DEFAULT_CONFIRM,
        None => usize::from(options.trace.is_some()),
    };
    let plan = Plan {
        strategy: match options.strategy {
            ExploreStrategy::Random => Strategy::Random { mean: 8 },
            ExploreStrategy::Pct => Strategy::Pct {
                depth: options.depth,
            },
            ExploreStrategy::RoundRobin => Strategy::RoundRobin,
            ExploreStrategy::Exhaustive => Strategy::Exhaustive {
                preemptions: Some(options.preemptions),
            },
        },
        executions: options.schedules.unwrap_or(match options.strategy {
            ExploreStrategy::Exhaustive => u64::MAX,
            _ => DEFAULT_SCHEDULES,
        }),
        seed,
        time_limit: options
            .time_limit
            .map(|limit| if sample > 0 && both { limit / 2 } else { limit }),
        state_every: options.state_every,
        everywhere: scenario.check == CheckWhen::EveryPoint,
        verify_every: options.verify,
        jobs: options.jobs.max(1),
        first: !options.keep_going,
        sample,
        fails: scenario.fails.clone(),
        fail_any: options.fail_any.clone(),
    };
    let early = Early::new(&source, options, &plan);
    let counts = Counts::default();
    let stop = Arc::new(AtomicBool::new(false));
    let ended = with_progress(output, &plan, &counts, &stop, || {
        let tell = |found: &Found| early.keep(found);
        campaign::run_and_tell(|| source.driver(), &plan, &counts, &stop, tell)
    });
    let (mut summary, broken) = match ended {
        Ok(summary) => (summary, None),
        Err(Broken { error, summary }) if summary.found.is_empty() => return Err(error.into()),
        Err(Broken { error, summary }) => (*summary, Some(error)),
    };
    let stopped = stop.load(Ordering::Relaxed);
    let sample = std::mem::take(&mut summary.sample).take();
    let found = Aftermath::of(&early, &summary.found, &sample, second);
    let headline = headline(&source, &plan, &summary, both, stopped);
    output.say(&match output.detail {
        Detail::Headline => format!("{}\n{}", verdict(&summary, stopped), found.files()),
        Detail::Normal | Detail::Full => headline + &found.text,
    });
    let written = output.json(&json!({
        "schema": crate::report::SCHEMA,
        "kind": "explore",
        "scenario": scenario.name,
        "kernel": boot::kernel_hash(),
        "seed": seed,
        "executions": summary.executions,
        "points": summary.points,
        "events": summary.events,
        "search": summary.explored,
        "complete": summary.explored.as_ref().map(Explored::is_complete),
        "conflicting_pairs": summary.pairs,
        "replayed_and_compared": summary.verified,
        "check": scenario.check,
        "states_checked": summary.states,
        "seconds": summary.elapsed.as_secs_f64(),
        "costs": summary.costs,
        "checks": summary.checks,
        "worked": summary.worked,
        "failures": summary.found.iter().map(|found| json!({
            "execution": found.index,
            "failure": failure_id(&found.execution.ending),
            "fails": names(&found.execution.fails),
            "text": story::ending(&found.execution.ending),
        })).collect::<Vec<_>>(),
        "reproducers": found.reproducers,
        "confirmed": found.confirmed,
        "trace": found.traced,
        "error": broken.as_ref().map(ToString::to_string),
    }));
    let late = || Failure::Usage {
        problem: "no schedule came to its end within --time-limit".into(),
        help: "give a longer --time-limit, or explore a shorter scenario".into(),
    };
    let nothing = (summary.executions == 0 && !stopped).then(late);
    let failed = found.failed.into_iter().chain(written.err()).chain(nothing);
    if let Some(error) = broken {
        // It has the last word and the exit code.
        failed.for_each(|failure| output::report(&failure));
        return Err(error.into());
    }
    if !found.engines_agree {
        // What a testbed says that contradicts itself is not to be believed.
        return settle(Exit::Internal, failed);
    }
    let crashed = |found: &Found| matches!(found.execution.ending, Ending::Crashed { .. });
    let exit = match summary.found.as_slice() {
        [] if stopped => Exit::Interrupted,
        [] => Exit::Held,
        found if found.iter().all(crashed) => Exit::GuestFailed,
        _ => Exit::Violation,
    };
    settle(exit, failed)
}

/// What was found counts, whatever of it could not be written; where nothing was, that does.
fn settle(exit: Exit, failed: impl IntoIterator<Item = Failure>) -> Result<Exit, Failure> {
    let mut failed = failed.into_iter();
    if let Exit::Held | Exit::Interrupted = exit
        && let Some(first) = failed.next()
    {
        return Err(first);
    }
    failed.for_each(|failure| output::report(&failure));
    Ok(exit)
}

/// What is explored: a scenario, or a machine that was saved.
fn source(name: &Path, options: &Explore) -> Result<Source, Failure> {
    if SavedMachine::is_one(name) {
        if !matches!(options.engine, None | Some(Engines::Kvm)) {
            return Err(Failure::Usage {
                problem: format!("{} is a machine with vCPUs, saved", name.display()),
                help: "leave --engine out, or explore the scenario that it was taken of".into(),
            });
        }
        let mut saved = SavedMachine::read(name)?;
        let mut changed = saved.scenario.clone();
        run::override_with(&mut changed, &options.machine);
        if changed.to_toml() != saved.scenario.to_toml() {
            return Err(Failure::Usage {
                problem: format!("the machine in {} has booted already", name.display()),
                help: "give options of the machine to `stalemate snapshot`".into(),
            });
        }
        saved.scenario.check = options.check.unwrap_or(saved.scenario.check);
        saved.scenario.fails.extend(&options.fails);
        check_fails(&saved.scenario)?;
        return Ok(Source::of_saved(saved));
    }
    let mut scenario = Scenario::load(name)?;
    run::override_with(&mut scenario, &options.machine);
    make_explorable(&mut scenario);
    scenario.check = options.check.unwrap_or(scenario.check);
    scenario.fails.extend(&options.fails);
    check_fails(&scenario)?;
    Ok(Source::new(
        engine_of(options.engine.unwrap_or(Engines::Model)),
        scenario,
    ))
}

/// `stalemate snapshot`.
pub(super) fn snapshot(
    name: &Path,
    options: &SnapshotCommand,
    output: &Output,
) -> Result<Exit, Failure> {
    let mut scenario = run::load(name)?;
    run::override_with(&mut scenario, &options.machine);
    make_explorable(&mut scenario);
    output::apart([
        ("--json", options.json.json.as_deref()),
        ("--out", Some(&options.out)),
    ])?;
    output.check_json()?;
    if options.out.exists() {
        return Err(SnapshotError::Exists {
            path: options.out.clone(),
        }
        .into());
    }
    let saved = Source::new(EngineKind::Kvm, scenario).save()?;
    saved.write(&options.out)?;
    let bytes = std::fs::metadata(&options.out).map_or(0, |data| data.len());
    output.json(&json!({
        "schema": crate::report::SCHEMA,
        "kind": "snapshot",
        "scenario": saved.scenario.name,
        "kernel": boot::kernel_hash(),
        "file": options.out.display().to_string(),
        "bytes": bytes,
    }))?;
    output.say(&format!(
        "{}: {} at the start of its schedules, {} vCPUs, {} KiB\n  explore it with: stalemate explore {}\n",
        options.out.display(),
        saved.scenario.name,
        saved.scenario.vcpus,
        bytes >> 10,
        output::shell_word(&options.out),
    ));
    Ok(Exit::Held)
}

/// The directory for reproducers can be written to, before anything is found that would be lost.
fn check_out(out: &Path) -> Result<(), Failure> {
    match std::fs::metadata(out) {
        Ok(at) if !at.is_dir() => Err(Failure::Usage {
            problem: format!("--out {}: is no directory", out.display()),
            help: "name a directory, or what is not there yet".into(),
        }),
        _ => Ok(()),
    }
}

/// All failpoints of `scenario` can be armed at once.
pub(super) fn check_fails(scenario: &Scenario) -> Result<(), Failure> {
    fail::check(&scenario.fails, scenario.vcpus).map_err(|refused| Failure::Usage {
        problem: refused.problem,
        help: refused.help.unwrap_or_default(),
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

/// The engine that explores.
fn engine_of(engines: Engines) -> EngineKind {
    match engines {
        Engines::Kvm => EngineKind::Kvm,
        Engines::Model | Engines::Both => EngineKind::Model,
    }
}

pub(super) fn fresh_seed() -> u64 {
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
        progress_bar(plan)
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
                let within = *counts.within.lock().expect("no job panics");
                let within = within.map_or_else(String::new, |within| search::progress(&within));
                bar.set_message(format!(
                    "{within}{pairs} conflicting pairs, {found} failures"
                ));
            }
        });
        let result = work();
        over.store(true, Ordering::Relaxed);
        bar.finish_and_clear();
        result
    })
}

fn progress_bar(plan: &Plan) -> ProgressBar {
    let (bar, template) = if plan.executions == u64::MAX {
        let template = "{elapsed_precise} {pos} schedules, {per_sec}, {msg}";
        (ProgressBar::new_spinner(), template)
    } else {
        let template = "{elapsed_precise} {wide_bar} {pos}/{len} schedules, {per_sec}, {msg}";
        (ProgressBar::new(plan.executions), template)
    };
    let style = ProgressStyle::with_template(template);
    bar.with_style(style.expect("a fixed template"))
}

fn verdict(summary: &Summary, interrupted: bool) -> String {
    match summary.found.len() {
        0 if summary.executions == 0 => "– no schedule came to its end".to_owned(),
        0 if interrupted => "– interrupted; nothing wrong was seen so far".to_owned(),
        0 => "✔ nothing wrong was seen".to_owned(),
        n => format!("✘ {n} of {} schedules fail", summary.executions),
    }
}

fn headline(
    source: &Source,
    plan: &Plan,
    summary: &Summary,
    both: bool,
    interrupted: bool,
) -> String {
    let (scenario, seed) = (source.scenario(), plan.seed);
    let strategy = match plan.strategy {
        Strategy::Random { mean } => {
            format!("random walk, runs of {mean} points on average, seed {seed}")
        }
        Strategy::Pct { depth } => format!("PCT, depth {depth}, seed {seed}"),
        Strategy::RoundRobin => "round robin".into(),
        Strategy::Exhaustive { preemptions } => preemptions.map_or_else(
            || "exhaustive".into(),
            |most| format!("exhaustive, {}", search::preemptions(most)),
        ),
    };
    let rate = summary.executions as f64 / summary.elapsed.as_secs_f64().max(1e-9);
    let verdict = verdict(summary, interrupted);
    let average = |sum: u64| sum / summary.executions.max(1);
    format!(
        "{verdict}\n  scenario   {}{}\n  engine     {}{}, kernel {}\n  strategy   {strategy}{}\n  \
         explored   {} schedules in {:.1} s ({rate:.0}/s), {} points and {} events each\n{}  \
         coverage   {} ordered pairs of conflicting events on different vCPUs\n  \
         checked    every event by the TLB model and the rules for locks, lifetimes, folios and walks; {} ends{} by all invariants; {} schedules replayed and compared\n  \
         time       {}\n",
        scenario.name,
        bugs(scenario),
        source.kind(),
        if both { ", confirmed on kvm" } else { "" },
        boot::kernel_hash(),
        failing(plan),
        summary.executions,
        summary.elapsed.as_secs_f64(),
        average(summary.points),
        average(summary.events),
        search::ending(plan, summary, interrupted),
        summary.pairs,
        summary.states,
        if plan.everywhere {
            " and every point"
        } else {
            ""
        },
        summary.verified,
        split(summary),
    )
}

/// Where the time went, for each execution (replays for comparison are executions too).
fn split(summary: &Summary) -> String {
    let runs = summary.costs.resets.max(1) as f64;
    let each = |time: Duration| format!("{:.0} us", time.as_secs_f64() * 1e6 / runs);
    let costs = &summary.costs;
    let known = costs.guest + costs.set_up + costs.reset + summary.checks;
    let set_up = match costs.set_up {
        Duration::ZERO => String::new(),
        time => format!("and {} for its set-up, ", each(time)),
    };
    format!(
        "each: guest {} ({:.1} exits), {set_up}reset {} ({:.0} pages), checks {}, other work of the host {}",
        each(costs.guest),
        costs.exits as f64 / runs,
        each(costs.reset),
        costs.pages as f64 / runs,
        each(summary.checks),
        each(summary.worked.saturating_sub(known)),
    )
}

/// What is made to fail, as a line of the headline.
fn failing(plan: &Plan) -> String {
    let any = plan.fail_any.iter().map(|failpoint| failpoint.name());
    let any: Vec<&str> = any.collect();
    let mut parts = names(&plan.fails);
    if !any.is_empty() {
        parts.push(format!(
            "one passage of {} in each schedule",
            any.join(" or ")
        ));
    }
    if parts.is_empty() {
        return String::new();
    }
    format!(
        "\n  failing    {}; schedules go on to the exit",
        parts.join(", ")
    )
}

fn names(fails: &[Fail]) -> Vec<String> {
    fails.iter().map(ToString::to_string).collect()
}

fn bugs(scenario: &Scenario) -> String {
    let names: Vec<&str> = scenario.bugs.iter().map(|bug| bug.name()).collect();
    if names.is_empty() {
        String::new()
    } else {
        format!(", with the seeded bug {}", names.join(", "))
    }
}
