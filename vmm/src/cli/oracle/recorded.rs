//! `stalemate oracle TRACE…`: recorded programs on both sides.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Instant;

use guest::native::oracle::Linux;
use serde_json::{Value, json};

use super::statistics;
use crate::boot;
use crate::cli::args::Oracle;
use crate::cli::exit::Exit;
use crate::cli::failure::Failure;
use crate::cli::output::Output;
use crate::oracle::recorded::{Program, Space, program};
use crate::oracle::{Difference, Guest, OracleError, Outcome, Summary, campaign, report};
use crate::report::verdict::Detail;
use crate::scenario;

pub(super) fn traces(
    options: &Oracle,
    mut guest: Guest<'_>,
    output: &Output,
) -> Result<Exit, Failure> {
    // Before the first one runs: what cannot be read is a mistake of whoever asks.
    let mut programs = Vec::new();
    for path in &options.traces {
        programs.push(program(&scenario::read_trace(path)?));
    }
    let mut linux = Linux::start().map_err(OracleError::from)?;
    let (mut exit, mut text, mut list) = (Exit::Held, String::new(), Vec::new());
    for (path, program) in options.traces.iter().zip(&programs) {
        let started = Instant::now();
        let mut summary = Summary::default();
        let mut found = None;
        for space in &program.spaces {
            let (part, difference) =
                campaign::compare(&mut guest, &mut linux, space.steps.clone())?;
            summary.merge(&part);
            if let Some(difference) = difference {
                found = Some((space, difference));
                break;
            }
        }
        if let Some((space, difference)) = &found {
            exit = match difference.outcome {
                Outcome::Crashed { .. } => Exit::GuestFailed,
                _ => Exit::Violation,
            };
            text += &differs(output, path, space, difference);
        } else {
            text += &agrees(output, path, program, &summary, started);
        }
        list.push(as_json(
            path,
            program,
            &summary,
            found.as_ref().map(|it| &it.1),
        ));
    }
    output.say(&text);
    output.json(&json!({
        "schema": crate::report::SCHEMA,
        "kind": "oracle",
        "stalemate": env!("CARGO_PKG_VERSION"),
        "kernel": boot::kernel_hash(),
        "engine": options.engine,
        "traces": list,
    }))?;
    Ok(exit)
}

fn agrees(
    output: &Output,
    path: &Path,
    program: &Program,
    summary: &Summary,
    started: Instant,
) -> String {
    let mut text = format!(
        "{} {}: {} calls in {} address spaces, {} steps ({:.1} s)\n",
        output.paint.green("✔ agrees:"),
        path.display(),
        program.calls,
        program.spaces.len(),
        summary.steps,
        started.elapsed().as_secs_f64(),
    );
    if output.detail == Detail::Headline {
        return text;
    }
    for ((call, reason), count) in &program.left_out {
        let _ = writeln!(text, "  left out: {call}, {count} times ({reason})");
    }
    if output.detail == Detail::Full {
        text += &statistics(summary);
    }
    text
}

fn differs(output: &Output, path: &Path, space: &Space, found: &Difference) -> String {
    format!(
        "{} {}, the address space that begins in line {}\n\n{}\n",
        output.paint.red("✘ difference:"),
        path.display(),
        space.line,
        report::difference(found)
    )
}

fn as_json(path: &Path, program: &Program, summary: &Summary, found: Option<&Difference>) -> Value {
    let left_out = program
        .left_out
        .iter()
        .map(|((call, reason), count)| json!({ "call": call, "reason": reason, "count": count }));
    json!({
        "trace": path.display().to_string(),
        "calls": program.calls,
        "spaces": program.spaces.len(),
        "left_out": left_out.collect::<Vec<_>>(),
        "summary": summary,
        "difference": found.map(report::difference),
    })
}
