//! A crash in both forms: [`crate::report::crash`] says everything, its first line is the reason, which
//! the verdict shows.

use super::Crash;
use crate::control::{self, Machine};
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
    }
    Crash { json, text }
}
