//! The user programs that a scenario can name: [`guest::PROGRAMS`], and why a name or an argument is
//! refused.

pub use guest::programs::{Data, PROGRAMS, Program as Info};

use super::values::{Refused, did_you_mean};

/// The program of this name.
///
/// # Errors
/// There is none.
pub fn program(name: &str) -> Result<&'static Info, Refused> {
    guest::find(name).ok_or_else(|| {
        Refused::new(format!("no program '{name}'")).with_help(did_you_mean(
            name,
            PROGRAMS.iter().map(|program| program.name),
        ))
    })
}

/// Why an argument is refused: it has none of this name, or not with this value.
#[derive(Debug)]
pub enum BadArgument {
    /// The name.
    Name(Refused),
    /// The value.
    Value(Refused),
}

/// Checks that `program` has an argument `name` that takes `value`.
///
/// # Errors
/// It has none, or takes other values.
pub fn argument(program: &'static Info, name: &str, value: &str) -> Result<(), BadArgument> {
    let names = program.args.iter().map(|arg| arg.name);
    let Some(arg) = program.args.iter().find(|arg| arg.name == name) else {
        let refused = Refused::new(format!(
            "program '{}' has no argument '{name}'",
            program.name
        ));
        return Err(BadArgument::Name(if program.args.is_empty() {
            refused.with_help("it takes none")
        } else {
            refused.with_help(did_you_mean(name, names))
        }));
    };
    match guest::Args::parse(program, &format!("{name}={value}")) {
        Ok(_) => Ok(()),
        Err(_) => Err(BadArgument::Value(
            Refused::new(format!(
                "'{value}' is no value for argument '{name}' of '{}'",
                program.name
            ))
            .with_help(format!("write {}", arg.form())),
        )),
    }
}

/// True where the program `name` has an argument `argument`.
#[must_use]
pub fn has_argument(name: &str, argument: &str) -> bool {
    guest::find(name).is_some_and(|program| program.args.iter().any(|arg| arg.name == argument))
}
