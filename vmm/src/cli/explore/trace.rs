//! `--trace FILE`: an execution as a timeline.

use std::path::Path;

use crate::boot;
use crate::cli::failure::Failure;
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
    apart([("--json", json_file), ("--trace", trace)])?;
    Ok(trace.map_or(Ok(()), json::probe)?)
}

/// Refuses two options that name one file, however they spell it.
pub(super) fn apart([one, two]: [(&str, Option<&Path>); 2]) -> Result<(), Failure> {
    // The file may not be there yet, its directory is.
    let place = |path: &Path| {
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new(".")).canonicalize().ok()?;
        Some(
            path.canonicalize()
                .unwrap_or(parent.join(path.file_name()?)),
        )
    };
    match (one.1.and_then(place), two.1.and_then(place)) {
        (Some(first), Some(second)) if first == second => Err(Failure::Usage {
            problem: format!("{} and {} name one file", one.0, two.0),
            help: "give each its own".into(),
        }),
        _ => Ok(()),
    }
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
