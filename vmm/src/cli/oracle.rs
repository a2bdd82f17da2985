//! `stalemate oracle`: the same calls on Linux and on the guest kernel.

mod recorded;

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use abi::param::Config;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::args::Oracle;
use super::exit::Exit;
use super::failure::Failure;
use super::interrupt;
use super::output::Output;
use crate::boot;
use crate::engine::EngineKind;
use crate::oracle::{Counts, Guest, Outcome, Plan, Summary, campaign, report, residency};
use crate::report::verdict::Detail;

/// Longest wall time of a machine: a batch takes seconds where CPL 0 is emulated.
const TIMEOUT: Duration = Duration::from_secs(600);

pub(super) fn oracle(options: &Oracle, output: &Output) -> Result<Exit, Failure> {
    output.check_json()?;
    if options.engine == EngineKind::Kvm {
        crate::session::host()?;
    }
    let cmdline = cmdline(options);
    let config = Config::parse(&cmdline).expect("arguments are checked");
    let guest = Guest {
        engine: options.engine,
        cmdline: &cmdline,
        residency: residency::with_this_host(&config),
        timeout: TIMEOUT,
        interrupt: interrupt::on_ctrl_c(),
    };
    if options.traces.is_empty() {
        generated(options, &guest, output)
    } else {
        recorded::traces(options, guest, output)
    }
}

/// Parameters and seeded bugs.
fn cmdline(options: &Oracle) -> String {
    let params = options
        .params
        .iter()
        .map(|(key, value)| format!("{key}={value}"));
    let bugs = options.bugs.iter().map(|bug| format!("bug={}", bug.name()));
    params.chain(bugs).collect::<Vec<_>>().join(" ")
}

/// As they were given.
fn kernel_options(options: &Oracle) -> String {
    let params = options.params.iter();
    let params = params.map(|(key, value)| format!(" --param {key}={value}"));
    let bugs = options.bugs.iter();
    let bugs = bugs.map(|bug| format!(" --bug {}", bug.name()));
    params.chain(bugs).collect()
}

fn generated(options: &Oracle, guest: &Guest<'_>, output: &Output) -> Result<Exit, Failure> {
    let seed = options.seed.unwrap_or_else(super::explore::fresh_seed);
    let plan = Plan {
        first: options.first,
        cases: options.cases,
        ops: options.ops as usize,
        seed,
        batch: batch(options.engine),
        jobs: options.jobs,
        shrink: options.shrink,
        residency: guest.residency,
    };
    let (counts, stop) = (Counts::default(), AtomicBool::new(false));
    let started = Instant::now();
    let (summary, found) = with_progress(output, &plan, &counts, &stop, || {
        campaign::run(&plan, guest, &counts, &stop)
    })?;
    let elapsed = started.elapsed();
    let interrupted = stop.load(Ordering::Relaxed);

    let mut text = headline(output, &plan, options, &summary, elapsed);
    if let Some(found) = &found {
        text = format!(
            "{} case {} of seed {seed} differs; {} steps of {} are enough ({} tries)\n\n{}\n{text}  again: stalemate \
             oracle --engine {} --seed {seed} --ops {} --first {} --cases 1{}\n",
            output.paint.red("✘ difference"),
            found.case,
            crate::oracle::case::count(&found.steps),
            found.original,
            found.tries,
            report::difference(found),
            options.engine,
            options.ops,
            found.case,
            kernel_options(options),
        );
    }
    output.say(&text);
    output.json(&json!({
        "schema": crate::report::SCHEMA,
        "kind": "oracle",
        "stalemate": env!("CARGO_PKG_VERSION"),
        "kernel": boot::kernel_hash(),
        "engine": options.engine,
        "seed": seed,
        "ops": plan.ops,
        "summary": summary,
        "seconds": elapsed.as_secs_f64(),
        "interrupted": interrupted,
        "difference": found.as_ref().map(|found| json!({
            "case": found.case,
            "crashed": matches!(found.outcome, Outcome::Crashed { .. }),
            "steps": crate::oracle::case::count(&found.steps),
            "text": report::difference(found),
        })),
    }))?;
    Ok(match found {
        Some(found) if matches!(found.outcome, Outcome::Crashed { .. }) => Exit::GuestFailed,
        Some(_) => Exit::Violation,
        None if interrupted => Exit::Interrupted,
        None => Exit::Held,
    })
}

/// Cases of one boot: many, as a boot takes as long as dozens of them, but few enough that Ctrl-C and
/// the bar need not wait long.
fn batch(engine: EngineKind) -> usize {
    match engine {
        EngineKind::Model => 200,
        EngineKind::Kvm => 20,
    }
}

fn headline(
    output: &Output,
    plan: &Plan,
    options: &Oracle,
    summary: &Summary,
    elapsed: Duration,
) -> String {
    let rate = summary.cases as f64 / elapsed.as_secs_f64().max(1e-9);
    let mut text = format!(
        "{} {} cases of {} steps on {} and on Linux, seed {} ({:.1} s, {rate:.0} cases/s)\n",
        output.paint.green("✔ agree:"),
        summary.cases,
        plan.ops,
        options.engine,
        plan.seed,
        elapsed.as_secs_f64(),
    );
    if output.detail != Detail::Headline {
        text += &statistics(summary);
    }
    text
}

/// What was executed.
fn statistics(summary: &Summary) -> String {
    let mut text = String::new();
    let list = |map: &std::collections::BTreeMap<String, u64>| {
        let pairs = map.iter().map(|(name, count)| format!("{name} {count}"));
        pairs.collect::<Vec<_>>().join(", ")
    };
    let _ = writeln!(
        text,
        "  steps: {} ({})",
        summary.steps,
        list(&summary.kinds)
    );
    let _ = writeln!(text, "  calls that failed: {}", list(&summary.errnos));
    let _ = writeln!(
        text,
        "  accesses that faulted: {}; VMAs split {}, merged {}, most at a time {}",
        summary.faults, summary.splits, summary.merges, summary.most_vmas
    );
    text
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
        let template = "{elapsed_precise} {wide_bar} {pos}/{len} cases, {per_sec}{msg}";
        let style = ProgressStyle::with_template(template).expect("a fixed template");
        ProgressBar::new(plan.cases).with_style(style)
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
                bar.set_position(counts.cases.load(Ordering::Relaxed));
                match counts.shrinks.load(Ordering::Relaxed) {
                    0 => {}
                    tries => bar.set_message(format!("; a difference, made smaller {tries} times")),
                }
            }
        });
        let result = work();
        over.store(true, Ordering::Relaxed);
        bar.finish_and_clear();
        result
    })
}
