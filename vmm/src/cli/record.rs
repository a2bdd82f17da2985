//! `stalemate record`: the memory calls of a real program, as a trace.

use std::io;
use std::process::Stdio;

use serde::Serialize;

use super::args::Record;
use super::exit::Exit;
use super::failure::Failure;
use super::output::Output;
use crate::report::SCHEMA;
use crate::scenario::record::{Existing, RecordSummary, record as strace};

#[derive(Serialize)]
struct Recorded<'a> {
    schema: u32,
    kind: &'static str,
    stalemate: &'static str,
    trace: String,
    #[serde(flatten)]
    summary: &'a RecordSummary,
}

pub(super) fn record(options: &Record, output: &Output) -> Result<Exit, Failure> {
    output.check_json()?;
    let existing = if options.force {
        Existing::Replace
    } else {
        Existing::Keep
    };
    // What the command prints must not end up in the JSON.
    let stdout = if output.json_on_stdout() {
        Stdio::from(io::stderr())
    } else {
        Stdio::inherit()
    };
    let summary = strace(&options.command, &options.output, existing, stdout)?;
    let trace = options.output.display();
    output.json(&Recorded {
        schema: SCHEMA,
        kind: "record",
        stalemate: env!("CARGO_PKG_VERSION"),
        trace: trace.to_string(),
        summary: &summary,
    })?;
    let total: u64 = summary.calls.values().sum();
    let calls: Vec<String> = summary
        .calls
        .iter()
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    let mut text = format!(
        "{} {trace}: {total} calls of {} task{} ({})\n",
        output.paint.green("✔ recorded"),
        summary.tasks,
        if summary.tasks == 1 { "" } else { "s" },
        calls.join(", ")
    );
    if summary.status != 0 {
        text += &format!("  note: the command ended with status {}\n", summary.status);
    }
    if summary.not_understood != 0 {
        text += &format!(
            "  note: {} lines of strace were not understood and left out\n",
            summary.not_understood
        );
    }
    output.say(&text);
    Ok(Exit::Held)
}
