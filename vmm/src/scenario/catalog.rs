//! The user programs that a scenario can name.

use std::path::Path;

use super::values::{Refused, did_you_mean};
use super::{ScenarioError, Trace};

/// One user program.
#[derive(Debug)]
pub struct Info {
    /// Its name.
    pub name: &'static str,
    /// What it does.
    pub help: &'static str,
    /// Its arguments: name, meaning.
    pub args: &'static [(&'static str, &'static str)],
    /// True where it replays a recorded trace.
    pub needs_trace: bool,
}

/// Every program, in the order of the help text.
pub const PROGRAMS: &[Info] = &[
    Info {
        name: "smoke",
        help: "",
        args: &[],
        needs_trace: false,
    },
    Info {
        name: "unmap-race",
        help: "",
        args: &[],
        needs_trace: false,
    },
    Info {
        name: "cow-fork",
        help: "",
        args: &[],
        needs_trace: false,
    },
    Info {
        name: "mprotect-race",
        help: "",
        args: &[],
        needs_trace: false,
    },
    Info {
        name: "replay",
        help: "",
        args: &[],
        needs_trace: true,
    },
];

/// The program of this name.
///
/// # Errors
/// There is none.
pub fn program(name: &str) -> Result<&'static Info, Refused> {
    PROGRAMS
        .iter()
        .find(|program| program.name == name)
        .ok_or_else(|| {
            Refused::new(format!("no program '{name}'")).with_help(did_you_mean(
                name,
                PROGRAMS.iter().map(|program| program.name),
            ))
        })
}

/// Checks that `program` has an argument `name`.
///
/// # Errors
/// It has none.
pub fn argument(program: &Info, name: &str) -> Result<(), Refused> {
    let names = program.args.iter().map(|(name, _)| *name);
    if names.clone().any(|known| known == name) {
        return Ok(());
    }
    let refused = Refused::new(format!(
        "program '{}' has no argument '{name}'",
        program.name
    ));
    Err(if program.args.is_empty() {
        refused.with_help("it takes none")
    } else {
        refused.with_help(did_you_mean(name, names))
    })
}

/// Compiles the text of a recorded trace.
///
/// # Errors
/// A line that is no call that the replay knows.
pub fn compile_trace(path: &Path, text: &str) -> Result<Trace, ScenarioError> {
    let _ = text;
    Ok(Trace {
        path: path.to_path_buf(),
        blob: Vec::new(),
        summary: serde_json::Value::Null,
    })
}
