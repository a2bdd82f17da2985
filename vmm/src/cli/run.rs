//! `stalemate run`: boots a scenario, as often as asked, and gives the verdict.

use std::path::Path;
use std::time::Duration;

use abi::boot::InterruptMode;
use indicatif::{ProgressBar, ProgressStyle};

use super::args::{MachineOptions, Run};
use super::exit::Exit;
use super::failure::Failure;
use super::output::Output;
use super::{interrupt, lab};
use crate::report::json::{OutDirectory, Overwrite};
use crate::report::verdict::{self, Detail, Paint};
use crate::report::{HostFacts, RunResult, SCHEMA, ScenarioFacts, Verdict};
use crate::scenario::values::Refused;
use crate::scenario::{Scenario, catalog};
use crate::session::{self, Crash, Finished};
use crate::snapshot::SavedMachine;

/// The argument of programs that make random choices.
const SEED: &str = "seed";

pub(super) fn run(name: &Path, options: &Run, output: &Output) -> Result<Exit, Failure> {
    let mut scenario = load(name)?;
    override_with(&mut scenario, &options.machine);
    refuse_fails(&scenario)?;
    disturb_with(&mut scenario, options)?;
    scenario.check = options.check.unwrap_or(scenario.check);
    let out = prepare(&options.out, output)?;
    let host = session::host()?;
    let kernel = options.machine.kernel.as_deref();
    let interrupt = interrupt::on_ctrl_c();

    let progress = Progress::start(options.runs, &scenario.name, output);
    let mut done = 0;
    let finished = loop {
        seed(&mut scenario, options.machine.seed, done);
        scenario.disturb.seed = options.machine.seed.unwrap_or(0).wrapping_add(done.into());
        let finished = session::run(&scenario, kernel, interrupt)
            .map_err(|error| Failure::of_machine(error, kernel))?;
        done += 1;
        progress.done(done);
        if finished.observed.verdict != Verdict::Held || done == options.runs {
            break finished;
        }
    };
    progress.end();

    let result = assemble(&scenario, options, host, done, finished);
    if let Some(out) = &out {
        let report = verdict::render(&result, Paint::Plain, Detail::Full);
        out.write(&result, &report, &result.serial)?;
    }
    output.json(&result)?;
    output.say(&verdict::render(&result, output.paint, output.detail));
    Ok(Exit::from(result.verdict))
}

/// The scenario that `name` means, of a command that boots.
pub(super) fn load(name: &Path) -> Result<Scenario, Failure> {
    if SavedMachine::begins(name) {
        return Err(Failure::Usage {
            problem: format!("{} is a machine, saved, and no scenario", name.display()),
            help: "`stalemate explore` goes on from it; name the scenario that it was taken of"
                .into(),
        });
    }
    Ok(Scenario::load(name)?)
}

/// What the command line says wins over what the file says.
pub(super) fn override_with(scenario: &mut Scenario, options: &MachineOptions) {
    scenario.vcpus = options.vcpus.unwrap_or(scenario.vcpus);
    scenario.memory_bytes = options.memory.unwrap_or(scenario.memory_bytes);
    scenario.interrupts = options.interrupts.map_or(scenario.interrupts, Into::into);
    scenario.timeout = options.timeout.unwrap_or(scenario.timeout);
    scenario.params.extend(options.params.iter().cloned());
    for bug in &options.bugs {
        scenario.add_bug(*bug);
    }
}

/// Delays, faults of IPIs and the judgement of merged streams.
fn disturb_with(scenario: &mut Scenario, options: &Run) -> Result<(), Failure> {
    let disturb = &mut scenario.disturb;
    disturb.delays.extend(options.delays.iter().copied());
    disturb.ipis.extend(options.ipis.iter().copied());
    check_disturb(scenario)?;
    scenario.monitor |= options.monitor;
    if scenario.monitor {
        let stamp = scenario.params.iter().rfind(|(name, _)| name == "stamp");
        if stamp.is_some_and(|(_, value)| value != "ticket") {
            return Err(Failure::Usage {
                problem: "streams are merged by tickets, and stamp=tsc was asked for".into(),
                help: "leave the parameter stamp out".into(),
            });
        }
        scenario.params.push(("stamp".into(), "ticket".into()));
    }
    Ok(())
}

/// What no machine can do, or not this one.
pub(super) fn check_disturb(scenario: &Scenario) -> Result<(), Failure> {
    let refuse = |refused: Refused| Failure::Usage {
        problem: refused.problem,
        help: refused.help.unwrap_or_default(),
    };
    let disturb = &scenario.disturb;
    disturb
        .check(scenario.vcpus, scenario.interrupts)
        .map_err(refuse)
}

/// A passage of a failpoint is counted from the start of a schedule, which only `explore` has.
pub(super) fn refuse_fails(scenario: &Scenario) -> Result<(), Failure> {
    match scenario.fails.first() {
        None => Ok(()),
        Some(fail) => Err(Failure::Usage {
            problem: format!("the scenario lets {fail} fail, which only explore can do"),
            help: format!("stalemate explore {}", scenario.path.display()),
        }),
    }
}

/// Everything that can be refused about the results is refused before the run.
pub(super) fn prepare(
    options: &super::args::Out,
    output: &Output,
) -> Result<Option<OutDirectory>, Failure> {
    output.check_json()?;
    let overwrite = if options.force {
        Overwrite::Force
    } else {
        Overwrite::Ours
    };
    Ok(match &options.out {
        Some(directory) => Some(OutDirectory::prepare(directory, overwrite)?),
        None => None,
    })
}

/// Run `index`, from 0, of several has its own seed.
pub(super) fn seed(scenario: &mut Scenario, seed: Option<u64>, index: u32) {
    if let Some(seed) = seed
        && catalog::has_argument(&scenario.program.name, SEED)
    {
        let seed = seed.wrapping_add(u64::from(index)).to_string();
        scenario.program.args.retain(|(key, _)| key != SEED);
        scenario.program.args.push((SEED.into(), seed));
    }
}

fn assemble(
    scenario: &Scenario,
    options: &Run,
    host: HostFacts,
    done: u32,
    finished: Finished,
) -> RunResult {
    let observed = finished.observed;
    let mut notes = notes(scenario, options, &host, observed.verdict);
    notes.extend(doubt(&host, observed.crash.as_ref()));
    let (crash, crash_text) = match observed.crash {
        Some(crash) => (Some(crash.json), Some(crash.text)),
        None => (None, None),
    };
    RunResult {
        schema: SCHEMA,
        kind: "run",
        stalemate: env!("CARGO_PKG_VERSION"),
        command: lab::own_command(),
        notes,
        host,
        scenario: facts(
            scenario,
            options.machine.seed.map(|seed| seed + u64::from(done - 1)),
        ),
        verdict: observed.verdict,
        exit_code: Exit::from(observed.verdict).code(),
        runs: options.runs,
        runs_done: done,
        program_status: observed.status,
        invariants: observed.invariants,
        violations: observed.violations,
        crash,
        crash_text,
        stream: finished.stream,
        disturbances: finished.disturbances,
        trace: scenario
            .program
            .trace
            .as_ref()
            .map(|trace| trace.summary.clone()),
        timings_ns: finished.timings,
        kvm_stats: finished.kvm_stats,
        points_checked: observed.points_checked,
        serial: finished.serial,
    }
}

/// The question with every default filled in.
pub(super) fn facts(scenario: &Scenario, seed: Option<u64>) -> ScenarioFacts {
    ScenarioFacts {
        name: scenario.name.clone(),
        path: scenario.path.display().to_string(),
        description: scenario.description.clone(),
        vcpus: scenario.vcpus,
        memory_bytes: scenario.memory_bytes,
        interrupts: match scenario.interrupts {
            InterruptMode::Hardware => "hardware",
            InterruptMode::Controlled => "controlled",
        },
        cmdline: scenario.cmdline(),
        bugs: scenario.bugs.iter().map(|bug| bug.name()).collect(),
        program: scenario.program.name.clone(),
        args: scenario.args(),
        check: scenario.check,
        seed,
    }
}

/// A triple fault in the lab need not be the guest's (docs/lab.md, "One thread or several").
fn doubt(host: &HostFacts, crash: Option<&Crash>) -> Option<String> {
    let triple = crash.is_some_and(|crash| crash.json["cause"] == "triple-fault");
    (host.kind == "lab" && triple).then(|| {
        "QEMU's SVM shows a triple fault at times that the guest did not have: believe it if it comes again".into()
    })
}

/// What a person must know before believing the verdict.
fn notes(scenario: &Scenario, options: &Run, host: &HostFacts, verdict: Verdict) -> Vec<String> {
    let mut notes = Vec::new();
    if options.machine.seed.is_some()
        && scenario.disturb.is_empty()
        && !catalog::has_argument(&scenario.program.name, SEED)
    {
        notes.push(format!(
            "--seed changed nothing: program '{}' makes no random choice",
            scenario.program.name
        ));
    }
    if !matches!(verdict, Verdict::Held | Verdict::Interrupted) {
        return notes;
    }
    // The merged streams say what a TLB may hold, whatever this host's holds.
    if !host.shows_stale_translations && !scenario.monitor {
        let bugs: Vec<&str> = scenario.bugs.iter().map(|bug| bug.name()).collect();
        let bugs = match bugs[..] {
            [] => String::new(),
            _ => format!(", so the seeded bug {} cannot show itself", bugs.join(", ")),
        };
        let lab = lab::command()
            .map(|lab| format!("; where it can: {lab}"))
            .unwrap_or_default();
        notes.push(format!(
            "this host cannot show a stale translation after the guest changes a PTE{bugs}: \
             a clean run says nothing about missing TLB flushes{lab}"
        ));
    } else if !scenario.bugs.is_empty() && verdict == Verdict::Held {
        notes.push(
            "a seeded bug is on and did not show itself in this run: --runs N tries again".into(),
        );
    }
    if scenario.vcpus == 1 {
        notes.push("one vCPU: nothing that needs two at once was tried".into());
    }
    notes
}

/// A bar for many runs, a spinner for a long one; nothing where nobody looks.
struct Progress(Option<ProgressBar>);

impl Progress {
    fn start(runs: u32, name: &str, output: &Output) -> Self {
        if !output.shows_progress() {
            return Self(None);
        }
        let (bar, template) = if runs > 1 {
            let bar = ProgressBar::new(u64::from(runs));
            (bar, "{msg} {bar:30} {pos}/{len} clean, {elapsed}")
        } else {
            (ProgressBar::new_spinner(), "{spinner} {msg} {elapsed}")
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(name.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(Some(bar))
    }

    fn done(&self, runs: u32) {
        if let Some(bar) = &self.0 {
            bar.set_position(u64::from(runs));
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    /// An error message must not share a line with the bar.
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::host::HostKind;

    #[test]
    fn a_triple_fault_in_the_lab_may_be_qemus_and_nothing_else_is() {
        let crash = |cause| Crash {
            json: serde_json::json!({ "cause": cause }),
            text: String::new(),
        };
        let lab = session::facts_of(HostKind::Lab);
        let note = doubt(&lab, Some(&crash("triple-fault"))).expect("a note");
        assert!(note.contains("QEMU"), "{note}");
        assert_eq!(doubt(&lab, Some(&crash("hang"))), None);
        assert_eq!(doubt(&lab, None), None);
        let here = session::facts_of(HostKind::Emulating);
        assert_eq!(doubt(&here, Some(&crash("triple-fault"))), None);
    }
}
