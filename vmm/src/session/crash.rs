//! A crash in both forms: [`crate::report::crash`] says everything, its first line is the reason, which
//! the verdict shows.

use std::time::Duration;

use super::Crash;
use crate::control::{self, CrashCause, Machine, MachineError};
use crate::explore::WaitsFor;
use crate::inspect::Snapshot;
use crate::report::crash::CrashReport;
use crate::report::story;

pub(super) fn describe(machine: &Machine, crash: &control::Crash) -> Crash {
    let reason = match crash.vcpu {
        Some(vcpu) => format!("{} on vCPU {vcpu}", crash.cause),
        None => crash.cause.to_string(),
    };
    let report = CrashReport::of(crash, machine);
    let text = report.body().to_string();
    let mut json = serde_json::to_value(&report).unwrap_or_default();
    if let Some(fields) = json.as_object_mut() {
        fields.insert("reason".into(), reason.into());
        if matches!(crash.cause, CrashCause::DidNotFinish { .. }) {
            fields.insert("kind".into(), "timeout".into());
        }
    }
    Crash { json, text }
}

/// The paused `machine` of a run that was not over after `timeout`, and in which nobody had got anywhere for `still`.
pub(super) fn did_not_finish(
    machine: &Machine,
    timeout: Duration,
    still: Duration,
) -> Result<Crash, MachineError> {
    let snapshots = (0..machine.nr_vcpus())
        .map(|vcpu| machine.vcpu_state(vcpu))
        .collect::<Result<_, _>>()?;
    let late = control::Crash {
        cause: CrashCause::DidNotFinish {
            seconds: timeout.as_secs_f64(),
            still: still.as_secs_f64(),
        },
        vcpu: None,
        snapshots,
    };
    Ok(describe(machine, &late))
}

/// The paused `machine`, of whose vCPUs nobody got anywhere for `patience`: who waits for what comes first.
pub(super) fn hang(
    machine: &Machine,
    waits: &[WaitsFor],
    patience: Duration,
) -> Result<Crash, MachineError> {
    let snapshots = (0..machine.nr_vcpus())
        .map(|vcpu| machine.vcpu_state(vcpu))
        .collect::<Result<_, _>>()?;
    let cause = CrashCause::NoProgress {
        seconds: patience.as_secs_f64(),
    };
    let stuck = control::Crash {
        cause,
        vcpu: None,
        snapshots,
    };
    let told = waits.iter();
    let told = told.map(|wait| format!("vCPU {} {}", wait.vcpu, story::waits_for(wait)));
    let tasks = Snapshot::read(machine.ram(), machine.kernel_root().unwrap_or(0));
    let tasks = tasks.map(|snapshot| snapshot.tasks).unwrap_or_default();
    let asleep = tasks.iter().filter_map(story::sleeps_for);
    let lines: Vec<String> = told.chain(asleep).chain(machine.dropped_ipis()).collect();
    let mut crash = describe(machine, &stuck);
    if let Some(fields) = crash.json.as_object_mut() {
        let reason = format!("{}: {}", stuck.cause, lines.join("; "));
        fields.insert("reason".into(), reason.into());
        fields.insert("kind".into(), "hang".into());
        fields.insert("waits".into(), lines.clone().into());
    }
    let lines: Vec<String> = lines.iter().map(|line| format!("  {line}\n")).collect();
    crash.text = lines.concat() + &crash.text;
    Ok(crash)
}
