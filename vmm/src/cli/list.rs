//! `stalemate list`: what can be named on the command line and in a scenario.

use std::fmt::Write as _;

use abi::bug::Bug;
use abi::failpoint::Failpoint;
use abi::param::PARAMS;
use abi::point::Point;
use serde::Serialize;

use super::args::Listed;
use super::exit::Exit;
use super::failure::Failure;
use super::output::Output;
use crate::report::verdict::Paint;
use crate::scenario::{self, Scenario, catalog};

/// One thing that has a name.
#[derive(Serialize)]
struct Entry {
    name: String,
    /// What to write after the name, where something is.
    #[serde(skip_serializing_if = "String::is_empty")]
    form: String,
    help: String,
    /// Of an invariant: when it must hold, and who says so.
    #[serde(skip_serializing_if = "str::is_empty")]
    applies: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    source: &'static str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    args: Vec<Entry>,
}

pub(super) fn list(what: Listed, output: &Output) -> Result<Exit, Failure> {
    let entries = entries(what);
    output.json(&entries)?;
    output.say(&table(&entries, output.paint));
    Ok(Exit::Held)
}

fn entries(what: Listed) -> Vec<Entry> {
    match what {
        Listed::Programs => catalog::PROGRAMS
            .iter()
            .map(|program| Entry {
                args: program.args.iter().map(argument).collect(),
                ..entry(program.name, String::new(), program.help)
            })
            .collect(),
        Listed::Params => PARAMS
            .iter()
            .map(|param| {
                entry(
                    param.name,
                    format!("{} [{}]", param.form, param.default),
                    param.help,
                )
            })
            .collect(),
        Listed::Bugs => Bug::ALL
            .iter()
            .map(|bug| entry(bug.name(), String::new(), bug.help()))
            .collect(),
        Listed::Points => Point::ALL
            .iter()
            .map(|point| entry(point.name(), String::new(), point.help()))
            .collect(),
        Listed::Failpoints => Failpoint::ALL
            .iter()
            .map(|failpoint| entry(failpoint.name(), String::new(), failpoint.help()))
            .collect(),
        Listed::Invariants => crate::check::described()
            .map(|invariant| Entry {
                applies: invariant.applies,
                source: invariant.source,
                ..entry(invariant.id, String::new(), invariant.predicate)
            })
            .collect(),
        Listed::Scenarios => scenario::available()
            .into_iter()
            .map(|(name, path)| match Scenario::load(&path) {
                Ok(scenario) => entry(&name, String::new(), &scenario.description),
                Err(error) => entry(&name, String::new(), &format!("invalid: {error}")),
            })
            .collect(),
    }
}

fn entry(name: &str, form: String, help: &str) -> Entry {
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    Entry {
        name: name.to_owned(),
        form,
        help,
        applies: "",
        source: "",
        args: Vec::new(),
    }
}

fn argument(arg: &guest::Arg) -> Entry {
    entry(
        arg.name,
        format!("{} [{}]", arg.form(), arg.default_text()),
        arg.help,
    )
}

fn table(entries: &[Entry], paint: Paint) -> String {
    let width = entries
        .iter()
        .map(|entry| entry.name.len())
        .max()
        .unwrap_or(0);
    let mut text = String::new();
    for entry in entries {
        let _ = writeln!(text, "{}", line(entry, width, paint));
        let inner = entry
            .args
            .iter()
            .map(|argument| argument.name.len())
            .max()
            .unwrap_or(0);
        for argument in &entry.args {
            let _ = writeln!(text, "{:width$}    {}", "", line(argument, inner, paint));
        }
    }
    text
}

fn line(entry: &Entry, width: usize, paint: Paint) -> String {
    let name = format!("{:<width$}", entry.name);
    let form = match entry.form.as_str() {
        "" => String::new(),
        form => format!("{}  ", paint.dim(form)),
    };
    let source = match entry.source {
        "" => String::new(),
        source => format!("  {}", paint.dim(&format!("[{source}]"))),
    };
    format!("{}  {form}{}{source}", paint.bold(&name), entry.help)
}
