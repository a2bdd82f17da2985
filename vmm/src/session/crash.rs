//! A crash in both forms: [`crate::report::crash`] says everything, its first line is the reason, which
//! the verdict shows.

use std::time::Duration;

use super::Crash;
use crate::control::{self, CrashCause, Machine, MachineError};
use crate::report::crash::CrashReport;

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

/// The paused `machine` of a run that was not over after `timeout`.
pub(super) fn did_not_finish(machine: &Machine, timeout: Duration) -> Result<Crash, MachineError> {
    let snapshots = (0..machine.nr_vcpus())
        .map(|vcpu| machine.vcpu_state(vcpu))
        .collect::<Result<_, _>>()?;
    let late = control::Crash {
        cause: CrashCause::DidNotFinish {
            seconds: timeout.as_secs_f64(),
        },
        vcpu: None,
        snapshots,
    };
    Ok(describe(machine, &late))
}
