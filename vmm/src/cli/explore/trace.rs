//! `--trace FILE`: an execution as a timeline.

use std::path::Path;

use crate::boot;
use crate::cli::failure::Failure;
use crate::cli::output;
use crate::explore::Execution;
use crate::report::{json, story, timeline};
use crate::scenario::Scenario;

/// Refuses, before anything runs, files that must not or cannot be written: an option without a value takes
/// the word after it for one, and that is often a reproducer.
pub(super) fn check_files(json_file: Option<&Path>, trace: Option<&Path>) -> Result<(), Failure> {
    for (option, path) in [("--json", json_file), ("--trace", trace)] {
        let is_reproducer = |path: &&Path| path.extension().is_some_and(|e| e == "repro");
        if let Some(path) = path.filter(is_reproducer) {
            return Err(Failure::Usage {
                problem: format!("{option} {}: would overwrite a reproducer", path.display()),
                help: format!("put {option} last, or name a file as in {option}=result.json"),
            });
        }
    }
    output::apart([("--json", json_file), ("--trace", trace)])?;
    Ok(trace.map_or(Ok(()), json::probe)?)
}

/// Writes the timeline of `execution`; says where it is.
pub(super) fn write(
    path: &Path,
    execution: &Execution,
    scenario: &Scenario,
) -> Result<String, Failure> {
    let about = [
        ("scenario", scenario.name.clone()),
        ("kernel", boot::kernel_hash().to_owned()),
        ("ending", story::ending(&execution.ending)),
        ("axis", "event tickets, drawn as microseconds".to_owned()),
    ];
    let drawn = timeline::timeline(execution, scenario.vcpus as usize, &about);
    json::write(path, &json::to_text(&drawn))?;
    Ok(format!(
        "  timeline: {} (open it in https://ui.perfetto.dev or chrome://tracing)\n",
        path.display()
    ))
}
