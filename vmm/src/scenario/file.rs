//! The TOML form of a scenario. `docs/scenarios.md` is its manual.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use abi::boot::InterruptMode;
use serde::Deserialize;
use toml::Spanned;

use super::catalog::{self, BadArgument, Data};
use super::disk;
use super::error::{Located, ScenarioError};
use super::source;
use super::trace;
use super::values::{self, Refused};
use super::{CheckWhen, Program, Scenario};

/// Checks the `text` of the scenario file at `path`. Traces are read relative to its directory.
///
/// # Errors
/// [`ScenarioError::Invalid`], at the first place that is refused.
pub fn parse(path: &Path, text: &str) -> Result<Scenario, ScenarioError> {
    let place = Place::From(0);
    Reader { path, text, place }.parse(text)
}

/// Checks the scenario `text`, which a string in the file at `path` holds. `whole` is all that the file has, and `at` the
/// string in it, quotes and all.
///
/// # Errors
/// As of [`parse`]; the place is one in the file.
pub fn parse_within(
    path: &Path,
    whole: &str,
    at: Range<usize>,
    text: &str,
) -> Result<Scenario, ScenarioError> {
    let written = whole.get(at.clone()).unwrap_or_default();
    let place = match written.find(text) {
        Some(quotes) => Place::From(at.start + quotes),
        None => Place::All(at),
    };
    let reader = Reader {
        path,
        text: whole,
        place,
    };
    reader.parse(text)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: Option<Spanned<String>>,
    #[serde(default)]
    description: String,
    #[serde(default)]
    machine: Machine,
    program: ProgramTable,
    #[serde(default)]
    kernel: Kernel,
    #[serde(default)]
    disk: Disk,
    #[serde(default)]
    parallel: Parallel,
    #[serde(default)]
    check: Check,
    #[serde(default)]
    limits: Limits,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Machine {
    vcpus: Option<Spanned<i64>>,
    memory: Option<Spanned<String>>,
    interrupts: Option<Interrupts>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Interrupts {
    Hardware,
    Controlled,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ProgramTable {
    name: Spanned<String>,
    #[serde(default)]
    args: BTreeMap<Spanned<String>, Spanned<Scalar>>,
    trace: Option<TraceTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TraceTable {
    file: Spanned<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Kernel {
    #[serde(default)]
    params: BTreeMap<Spanned<String>, Spanned<Scalar>>,
    #[serde(default)]
    bugs: Vec<Spanned<String>>,
    #[serde(default)]
    fail: Vec<Spanned<String>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Disk {
    sectors: Option<Spanned<i64>>,
    #[serde(default)]
    faults: Vec<Spanned<String>>,
}

/// Runs in which vCPUs run at once.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Parallel {
    #[serde(default)]
    delay: Vec<Spanned<String>>,
    #[serde(default)]
    ipi: Vec<Spanned<String>>,
    #[serde(default)]
    monitor: bool,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Check {
    #[serde(default)]
    when: When,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
enum When {
    #[default]
    End,
    EveryPoint,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Limits {
    timeout: Option<Spanned<String>>,
    watchdog: Option<Spanned<String>>,
}

/// A value of `args` and `params`; the program and the kernel get it as text.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a string, a whole number or true/false")]
enum Scalar {
    Bool(bool),
    Integer(i64),
    Text(String),
}

impl Scalar {
    fn text(&self) -> String {
        match self {
            Self::Bool(true) => "on".into(),
            Self::Bool(false) => "off".into(),
            Self::Integer(number) => number.to_string(),
            Self::Text(text) => text.clone(),
        }
    }
}

/// Where a scenario stands in its file.
enum Place {
    /// As it is, from this byte on.
    From(usize),
    /// In these bytes, with escapes: none of its places has one there.
    All(Range<usize>),
}

struct Reader<'a> {
    path: &'a Path,
    /// All of the file.
    text: &'a str,
    place: Place,
}

impl Reader<'_> {
    fn parse(&self, scenario: &str) -> Result<Scenario, ScenarioError> {
        let file = toml::from_str(scenario).map_err(|error| self.malformed(&error))?;
        self.scenario(file)
    }

    fn scenario(&self, file: File) -> Result<Scenario, ScenarioError> {
        let stem = self
            .path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let machine = file.machine;
        Ok(Scenario {
            name: match file.name {
                Some(name) => self.at(name.span(), values::scenario_name(name.as_ref()))?,
                None => self.at(0..0, values::scenario_name(&stem))?,
            },
            description: file.description.trim().to_owned(),
            path: self.path.to_path_buf(),
            vcpus: match machine.vcpus {
                Some(vcpus) => self.at(vcpus.span(), values::vcpus(*vcpus.as_ref()))?,
                None => super::DEFAULT_VCPUS,
            },
            memory_bytes: self.value(machine.memory, values::memory, super::DEFAULT_MEMORY)?,
            interrupts: match machine.interrupts {
                Some(Interrupts::Controlled) => InterruptMode::Controlled,
                Some(Interrupts::Hardware) | None => InterruptMode::Hardware,
            },
            program: self.program(file.program)?,
            params: self.params(file.kernel.params)?,
            bugs: file
                .kernel
                .bugs
                .iter()
                .map(|name| self.at(name.span(), values::bug(name.as_ref())))
                .collect::<Result<_, _>>()?,
            fails: file
                .kernel
                .fail
                .iter()
                .map(|fail| self.at(fail.span(), fail.as_ref().parse()))
                .collect::<Result<_, _>>()?,
            disk: super::DiskSpec {
                sectors: match file.disk.sectors {
                    Some(sectors) => self.at(sectors.span(), disk::sectors(*sectors.as_ref()))?,
                    None => devices::disk::DEFAULT_SECTORS,
                },
                faults: file
                    .disk
                    .faults
                    .iter()
                    .map(|fault| self.at(fault.span(), disk::fault(fault.as_ref())))
                    .collect::<Result<_, _>>()?,
            },
            disturb: super::Disturb {
                delays: self.rules(&file.parallel.delay)?,
                ipis: self.rules(&file.parallel.ipi)?,
                seed: 0,
            },
            monitor: file.parallel.monitor,
            check: match file.check.when {
                When::End => CheckWhen::End,
                When::EveryPoint => CheckWhen::EveryPoint,
            },
            timeout: self.value(
                file.limits.timeout,
                values::duration,
                super::DEFAULT_TIMEOUT,
            )?,
            watchdog: self.value(
                file.limits.watchdog,
                values::duration,
                super::DEFAULT_WATCHDOG,
            )?,
        })
    }

    fn program(&self, table: ProgramTable) -> Result<Program, ScenarioError> {
        let program = self.at(table.name.span(), catalog::program(table.name.as_ref()))?;
        let mut args = Vec::new();
        for (key, value) in table.args {
            let text = value.as_ref().text();
            catalog::argument(program, key.as_ref(), &text).map_err(|bad| match bad {
                BadArgument::Name(refused) => self.locate(key.span(), refused),
                BadArgument::Value(refused) => self.locate(value.span(), refused),
            })?;
            args.push((key.into_inner(), text));
        }
        let trace = match table.trace {
            None if program.data == Data::Trace => {
                let refused = Refused::new(format!("program '{}' needs a trace", program.name))
                    .with_help("add [program.trace] with file = \"…\", or record one: stalemate record -o FILE -- COMMAND");
                return Err(self.locate(table.name.span(), refused));
            }
            Some(trace) if program.data != Data::Trace => {
                let refused = Refused::new(format!("program '{}' replays no trace", program.name))
                    .with_help("use program 'replay'");
                return Err(self.locate(trace.file.span(), refused));
            }
            None => None,
            Some(trace) => Some(self.trace(&trace.file)?),
        };
        Ok(Program {
            name: program.name.to_owned(),
            args,
            trace,
        })
    }

    fn trace(&self, file: &Spanned<String>) -> Result<super::Trace, ScenarioError> {
        let path = self.path.with_file_name("").join(file.as_ref());
        let text = source::read(&path).map_err(|error| {
            let refused =
                Refused::new(format!("cannot read the trace {}: {error}", path.display()))
                    .with_help("the path is relative to the scenario's directory");
            self.locate(file.span(), refused)
        })?;
        let recorded = trace::parse(&text).map_err(|error| {
            let problem = format!("found {}, expected {}", error.found, error.expected);
            Located::new(&path, &text, error.span, "here", Refused::new(problem))
        })?;
        let compiled = trace::compile(&recorded);
        Ok(super::Trace {
            path,
            blob: compiled.blob,
            summary: compiled.summary,
        })
    }

    fn params(
        &self,
        table: BTreeMap<Spanned<String>, Spanned<Scalar>>,
    ) -> Result<Vec<(String, String)>, ScenarioError> {
        let mut params = Vec::new();
        for (key, value) in table {
            let text = value.as_ref().text();
            let known = abi::param::PARAMS
                .iter()
                .any(|param| param.name == key.as_ref());
            let span = if known { value.span() } else { key.span() };
            self.at(span, values::param(key.as_ref(), &text))?;
            params.push((key.into_inner(), text));
        }
        Ok(params)
    }

    fn rules<T: std::str::FromStr<Err = Refused>>(
        &self,
        rules: &[Spanned<String>],
    ) -> Result<Vec<T>, ScenarioError> {
        let rules = rules.iter();
        rules
            .map(|rule| self.at(rule.span(), rule.as_ref().parse()))
            .collect()
    }

    fn value<T>(
        &self,
        value: Option<Spanned<String>>,
        check: impl Fn(&str) -> Result<T, Refused>,
        default: T,
    ) -> Result<T, ScenarioError> {
        match value {
            Some(value) => self.at(value.span(), check(value.as_ref())),
            None => Ok(default),
        }
    }

    fn at<T>(&self, span: Range<usize>, result: Result<T, Refused>) -> Result<T, ScenarioError> {
        result.map_err(|refused| self.locate(span, refused))
    }

    /// A text that is not TOML, or not TOML of the right shape.
    fn malformed(&self, error: &toml::de::Error) -> ScenarioError {
        let message = error.message();
        // serde: "unknown field `a`, expected one of `b`, `c`", likewise "unknown variant".
        let mut names = message.split('`').skip(1).step_by(2);
        let refused = match names.next() {
            Some(unknown) if message.starts_with("unknown ") => {
                let expected: Vec<&str> = names.collect();
                Refused::new(
                    message
                        .split(", expected")
                        .next()
                        .unwrap_or(message)
                        .replace('`', "'"),
                )
                .with_help(values::did_you_mean(unknown, expected))
            }
            _ => Refused::new(message.replace('\n', "; ").replace('`', "'"))
                .with_help("docs/scenarios.md has the form of the file"),
        };
        self.locate(error.span().unwrap_or(0..0), refused)
    }

    fn locate(&self, span: Range<usize>, refused: Refused) -> ScenarioError {
        let span = match &self.place {
            Place::From(start) => start + span.start..start + span.end,
            Place::All(all) => all.clone(),
        };
        Located::new(self.path, self.text, span, "here", refused).into()
    }
}

#[cfg(test)]
mod tests;
