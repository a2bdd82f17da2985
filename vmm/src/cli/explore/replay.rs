//! `stalemate replay`: what a reproducer says, again.

use std::path::{Path, PathBuf};

use abi::param::TlbBackEnd;
use serde_json::{Value, json};

use super::both::Second;
use super::{engine_of, trace};
use crate::boot;
use crate::cli::args::{Engines, Replay};
use crate::cli::exit::Exit;
use crate::cli::failure::Failure;
use crate::cli::interrupt;
use crate::cli::output::{self, Output};
use crate::engine::Engine;
use crate::engine::model::ModelEngine;
use crate::explore::campaign::{Plan, Worker, failure_id};
use crate::explore::confirm::Confirmation;
use crate::explore::probe::{Shown, belongs};
use crate::explore::{Ending, Execution, Schedule, Source, compare};
use crate::report::story;
use crate::reproducer::Reproducer;
use crate::scenario::Scenario;
use crate::session::Interrupt;

pub(in crate::cli) fn replay(options: &Replay, output: &Output) -> Result<Exit, Failure> {
    trace::check_files(options.json.json.as_deref(), options.trace.as_deref())?;
    if options.trace.is_some() && options.files.len() > 1 {
        return Err(Failure::Usage {
            problem: "--trace is of one execution".into(),
            help: "give one reproducer".into(),
        });
    }
    output.check_json()?;
    // All are read before any runs: what is refused is told at once, and the others are run all the same.
    let all: Vec<(&PathBuf, Result<Case, Failure>)> = options
        .files
        .iter()
        .map(|file| (file, Case::read(file, options.any_kernel)))
        .collect();
    for refused in all.iter().filter_map(|(_, case)| case.as_ref().err()) {
        output::report(refused);
    }
    let stop = interrupt::on_ctrl_c();
    let mut results = Vec::new();
    let mut exit = Exit::Held;
    for (file, case) in all {
        if stop.requested() {
            exit = worse(exit, Exit::Interrupted);
            break;
        }
        let ran = case.and_then(|case| {
            let ran = case.run(file, options, output, stop);
            ran.inspect_err(output::report)
        });
        let (this, result) = ran.unwrap_or_else(|failure| (failure.exit(), failed(file, &failure)));
        exit = worse(exit, this);
        results.push(result);
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

/// What the result says of a file that was not replayed.
fn failed(file: &Path, failure: &Failure) -> Value {
    json!({ "file": file, "error": failure.line(), "exit_code": failure.exit().code() })
}

/// What one file says.
struct Case {
    reproducer: Reproducer,
    scenario: Scenario,
    schedule: Schedule,
}

impl Case {
    fn read(file: &Path, any_kernel: bool) -> Result<Self, Failure> {
        let (reproducer, scenario, schedule) = Reproducer::read(file, any_kernel)?;
        Ok(Self {
            reproducer,
            scenario,
            schedule,
        })
    }

    /// Where it runs unless told otherwise: the model steps no instructions, and not every scenario is for it.
    fn engine(&self) -> Engines {
        if self.reproducer.window().is_some() || ModelEngine::cannot_run(&self.scenario).is_some() {
            Engines::Kvm
        } else {
            Engines::Model
        }
    }

    /// Replays it as often as asked, or until Ctrl-C; how that ends, and what the result says of it.
    fn run(
        &self,
        file: &Path,
        options: &Replay,
        output: &Output,
        stop: &Interrupt,
    ) -> Result<(Exit, Value), Failure> {
        let (reproducer, scenario) = (&self.reproducer, &self.scenario);
        let failed = |source| Failure::Replay {
            path: file.into(),
            source,
        };
        let window = reproducer.window();
        let engines = options.engine.unwrap_or_else(|| self.engine());
        let source = Source::new(engine_of(engines), scenario.clone()).with_window(window);
        let driver = source.driver().map_err(failed)?;
        let mut worker = Worker::new(driver, &Plan::replay_of(scenario)).map_err(failed)?;
        worker.arm(&scenario.fails);
        let mut second = match engines {
            Engines::Both => Some(Second::new(scenario).map_err(failed)?),
            Engines::Model | Engines::Kvm => None,
        };
        let mut again = Again::default();
        while again.runs < options.times && !stop.requested() {
            let run = worker.replay(&self.schedule).map_err(failed)?;
            is_used_up(file, &self.schedule, &run)?;
            if engines == Engines::Kvm {
                again.probed(hardware(&mut worker, &run, scenario)?);
            }
            if let Some(second) = &mut second {
                again.confirmed(second.confirm(&run).map_err(failed)?);
            }
            again.take(run, reproducer);
        }
        let Some(last) = &again.last else {
            return Ok((Exit::Interrupted, json!({ "file": file, "runs": 0 })));
        };
        if !options.brief {
            output.say(&format!("{}\n", story::tell(last, scenario.vcpus as usize)));
        }
        output.say(&format!("{}: {}\n", file.display(), again.text(reproducer)));
        if let Some(path) = &options.trace {
            output.say(&trace::write(path, last, scenario)?);
        }
        let mut exit = again.exit(reproducer, options.expect);
        if again.runs < options.times {
            // Fewer than were asked for: whatever they showed, this is no answer.
            exit = worse(exit, Exit::Interrupted);
        }
        let result = json!({
            "file": file,
            "expected": reproducer.ending,
            "found": again.ending(),
            "identical": again.identical,
            "runs": again.runs,
            "text": story::ending(&last.ending),
            "confirmation": again.confirmation,
            "hardware": again.hardware.as_ref().map(|hardware| json!({
                "shows_it": matches!(hardware, Hardware::Shows(_)),
                "text": hardware.text(),
            })),
            "trace": options.trace,
            "error": null,
            "exit_code": exit.code(),
        });
        Ok((exit, result))
    }
}

/// A schedule that goes on where nobody can is none of this scenario's.
fn is_used_up(file: &Path, schedule: &Schedule, run: &Execution) -> Result<(), Failure> {
    let end = match run.ending {
        Ending::Finished { .. } => "the end of the test",
        Ending::Livelock(..) => "all that can run only wait",
        Ending::Deadlock(..) => "nobody can run",
        _ => return Ok(()),
    };
    let (wanted, passed) = (schedule.points(), run.schedule.points());
    if passed >= wanted {
        return Ok(());
    }
    Err(Failure::Unreached {
        path: file.into(),
        wanted,
        passed,
        end,
    })
}

/// The first that is not well, but for a defect of ours, which makes every other doubtful.
fn worse(before: Exit, this: Exit) -> Exit {
    match (before, this) {
        (_, Exit::Internal) | (Exit::Held, _) => this,
        _ => before,
    }
}

/// Replays of one reproducer.
#[derive(Default)]
struct Again {
    runs: u64,
    /// Runs whose ending and events are the recorded ones.
    identical: u64,
    last: Option<Execution>,
    /// `--engine both`: what it is on vCPUs; the first that differs, where one does.
    confirmation: Option<Confirmation>,
    /// On vCPUs whose own TLBs are used: what the hardware shows of the violation.
    hardware: Option<Hardware>,
}

/// What the processor shows of a violation.
#[derive(Debug)]
enum Hardware {
    Shows(Shown),
    Nothing,
}

impl Hardware {
    fn text(&self) -> String {
        match self {
            Self::Shows(shown) => shown.to_string(),
            Self::Nothing => "the hardware did not show it (its absence proves nothing)".into(),
        }
    }
}

/// Lets a program that uses the processor's TLB go on after a violation. None where there is nothing to see.
fn hardware<E: Engine>(
    worker: &mut Worker<E>,
    run: &Execution,
    scenario: &Scenario,
) -> Result<Option<Hardware>, Failure> {
    let config = abi::param::Config::parse(&scenario.cmdline()).expect("scenarios are checked");
    let Ending::Violation(violation) = &run.ending else {
        return Ok(None);
    };
    if config.tlb == TlbBackEnd::Soft {
        return Ok(None);
    }
    let shown = worker.go_on(violation)?;
    let shown = belongs(violation, &shown, config.tlb).cloned();
    Ok(Some(shown.map_or(Hardware::Nothing, Hardware::Shows)))
}

impl Again {
    fn confirmed(&mut self, confirmation: Confirmation) {
        if self.confirmation.as_ref().is_none_or(Confirmation::holds) {
            self.confirmation = Some(confirmation);
        }
    }

    fn take(&mut self, run: Execution, reproducer: &Reproducer) {
        let same = compare::digest(&run.events) == reproducer.digest
            && run.events.len() as u64 == reproducer.events;
        self.last = Some(run);
        self.runs += 1;
        self.identical += u64::from(same && self.reproduced(reproducer));
    }

    /// What was shown once is shown.
    fn probed(&mut self, hardware: Option<Hardware>) {
        if !matches!(self.hardware, Some(Hardware::Shows(_))) {
            self.hardware = hardware;
        }
    }

    fn ending(&self) -> String {
        let failure = self.last.as_ref().and_then(|run| failure_id(&run.ending));
        failure.unwrap_or_else(|| "nothing wrong".into())
    }

    fn reproduced(&self, reproducer: &Reproducer) -> bool {
        self.ending() == reproducer.ending
    }

    fn text(&self, reproducer: &Reproducer) -> String {
        let mut text = self.reproduction(reproducer);
        if let Some(confirmation) = &self.confirmation {
            text.push_str(&format!("\n  {confirmation}"));
        }
        if let Some(hardware) = &self.hardware {
            text.push_str(&format!("\n  {}", hardware.text()));
        }
        text
    }

    fn reproduction(&self, reproducer: &Reproducer) -> String {
        let (ending, same, runs) = (self.ending(), self.identical, self.runs);
        if !self.reproduced(reproducer) {
            let is_short =
                matches!(&self.last, Some(run) if matches!(run.ending, Ending::ScheduleOver));
            let early = if is_short {
                "; the schedule ended before the program did"
            } else {
                ""
            };
            return format!(
                "✔ not reproduced: {ending}, not {}{early}",
                reproducer.ending
            );
        }
        let events = reproducer.events;
        format!(
            "✘ reproduced: {ending}; {same} of {runs} identical to the recorded {events} events"
        )
    }

    fn exit(&self, reproducer: &Reproducer, expected: bool) -> Exit {
        if self.confirmation.as_ref().is_some_and(|c| !c.holds()) {
            return Exit::Internal;
        }
        match (self.reproduced(reproducer), expected) {
            (true, true) if self.identical == self.runs => Exit::Held,
            // The failure is there, but a replay that differs is a defect of ours.
            (true, true) => Exit::Internal,
            (true, false) | (false, true) => Exit::Violation,
            (false, false) => Exit::Held,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn confirmation(divergence: Option<&str>) -> Confirmation {
        Confirmation {
            same_ending: true,
            events: 9,
            same_events: 9,
            divergence: divergence.map(Into::into),
        }
    }

    #[test]
    fn engines_that_differ_once_are_a_defect_whatever_was_expected() {
        let text = "[program]\nname = \"litmus\"\n";
        let scenario = crate::scenario::parse(std::path::Path::new("a.toml"), text).unwrap();
        let ending = "nothing wrong".to_owned();
        let schedule = crate::explore::Schedule::default();
        let reproducer = Reproducer::new(&scenario, &schedule, "".into(), ending, (0, "".into()));
        let mut again = Again::default();
        again.confirmed(confirmation(None));
        assert_eq!(again.exit(&reproducer, true), Exit::Held);
        again.confirmed(confirmation(Some("event 3")));
        again.confirmed(confirmation(None));
        assert_eq!(again.exit(&reproducer, true), Exit::Internal);
        assert_eq!(again.exit(&reproducer, false), Exit::Internal);
        assert!(again.text(&reproducer).contains("event 3"));
        assert_eq!(worse(Exit::Violation, Exit::Internal), Exit::Internal);
        assert_eq!(worse(Exit::Violation, Exit::Held), Exit::Violation);
    }

    #[test]
    fn a_schedule_that_ends_before_the_program_is_told_to() {
        let text = "[program]\nname = \"litmus\"\n";
        let scenario = crate::scenario::parse(Path::new("a.toml"), text).unwrap();
        let schedule = Schedule::default();
        let recorded = (0, String::new());
        let reproducer = Reproducer::new(&scenario, &schedule, "".into(), "T-01".into(), recorded);
        let said = |ending| {
            let mut again = Again::default();
            let run = Execution {
                schedule: Schedule::default(),
                fails: Vec::new(),
                ending,
                events: Vec::new(),
            };
            again.take(run, &reproducer);
            again.text(&reproducer)
        };
        let early = "the schedule ended before the program did";
        assert!(said(Ending::ScheduleOver).contains(early));
        assert!(!said(Ending::Finished { status: None }).contains(early));
    }

    #[test]
    fn what_only_vcpus_can_run_is_replayed_there() {
        let engine = |program: &str, tlb: &str, window: Option<&str>| {
            let text =
                format!("[program]\nname = {program:?}\n[kernel]\nparams = {{ tlb = {tlb:?} }}\n");
            let scenario = crate::scenario::parse(Path::new("a.toml"), &text).unwrap();
            let schedule = Schedule::default();
            let recorded = (0, String::new());
            let reproducer =
                Reproducer::new(&scenario, &schedule, "".into(), "T-01".into(), recorded)
                    .with_window(window.map(|text| crate::scenario::values::window(text).unwrap()));
            let case = Case {
                reproducer,
                scenario,
                schedule,
            };
            case.engine()
        };
        assert_eq!(engine("litmus", "soft", None), Engines::Model);
        assert_eq!(engine("litmus", "hw", None), Engines::Kvm);
        assert_eq!(engine("litmus", "both", None), Engines::Kvm);
        assert_eq!(engine("crash", "soft", None), Engines::Kvm);
        let window = Some("flush-issue:1");
        assert_eq!(engine("litmus", "soft", window), Engines::Kvm);
    }

    #[test]
    fn points_behind_the_end_of_the_test_are_none_but_those_behind_a_failure_may_be() {
        let schedule = |points| {
            let mut schedule = Schedule::default();
            schedule.push(crate::explore::Actor::Vcpu(0), points);
            schedule
        };
        let judged = |wanted, ending| {
            let run = Execution {
                schedule: schedule(10),
                fails: Vec::new(),
                ending,
                events: Vec::new(),
            };
            is_used_up(Path::new("a.repro"), &schedule(wanted), &run)
        };
        let over = || Ending::Finished { status: None };
        assert!(judged(10, over()).is_ok());
        let text = judged(11, over()).unwrap_err().to_string();
        assert!(
            text.contains("a.repro") && text.contains("11 points"),
            "{text}"
        );
        assert!(
            text.contains("10 that there are until the end of the test"),
            "{text}"
        );
        assert!(judged(11, Ending::Deadlock(Vec::new(), Vec::new())).is_err());
        assert!(judged(11, Ending::Livelock(Vec::new(), Vec::new())).is_err());
        let crash = crate::engine::GuestCrash {
            reason: "r".into(),
            details: Vec::new(),
        };
        assert!(judged(11, Ending::Crashed { vcpu: 0, crash }).is_ok());
    }
}
