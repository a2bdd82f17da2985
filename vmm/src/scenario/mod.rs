//! Scenarios: one question each, asked of one machine, one program and one kernel configuration.
//!
//! What lives here turns text (TOML, recorded traces, command-line values) into a checked
//! [`Scenario`]. Nothing here touches a machine, and nothing that leaves here is unchecked.

pub mod catalog;
pub mod disk;
pub mod disturb;
mod error;
mod excerpt;
pub mod fail;
mod file;
pub mod record;
mod source;
pub mod trace;
pub mod values;

use std::path::{Path, PathBuf};
use std::time::Duration;

use abi::boot::InterruptMode;
use abi::bug::Bug;

pub use disk::DiskSpec;
pub use disturb::Disturb;
pub use error::{Located, ScenarioError};
pub use fail::Fail;
pub use file::{parse, parse_within};

/// vCPUs where neither the scenario nor the command line says.
pub const DEFAULT_VCPUS: u32 = 2;
/// Guest memory where neither says.
pub const DEFAULT_MEMORY: u64 = 64 << 20;
/// Wall time of one run where neither says. Far above any scenario of ours: a slow host is slow,
/// not broken.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(120);
/// Time without a sign of life after which the guest counts as hung.
pub const DEFAULT_WATCHDOG: Duration = Duration::from_secs(10);

/// When the invariants are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckWhen {
    /// Once, when the program has ended.
    #[default]
    End,
    /// At every scheduling point too, with all vCPUs paused: slow and thorough.
    EveryPoint,
}

/// Reads the trace in `path`.
///
/// # Errors
/// It cannot be read, or is no trace.
pub fn read_trace(path: &Path) -> Result<trace::Trace, ScenarioError> {
    let text = source::read(path).map_err(|source| ScenarioError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    trace::parse(&text).map_err(|error| {
        let problem = format!("found {}, expected {}", error.found, error.expected);
        Located::new(
            path,
            &text,
            error.span,
            "here",
            values::Refused::new(problem),
        )
        .into()
    })
}

/// A checked scenario, command-line overrides included.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Short name; the file's stem where the file gives none.
    pub name: String,
    /// The question that it asks.
    pub description: String,
    /// The file that it came from.
    pub path: PathBuf,
    /// vCPUs, 1 to [`abi::layout::MAX_CPUS`].
    pub vcpus: u32,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// How interrupts reach the vCPUs.
    pub interrupts: InterruptMode,
    /// What runs at CPL 3.
    pub program: Program,
    /// Kernel parameters in the order given; a later one wins.
    pub params: Vec<(String, String)>,
    /// Seeded bugs that are switched on.
    pub bugs: Vec<Bug>,
    /// Passages of failpoints that fail, in every schedule that is explored.
    pub fails: Vec<Fail>,
    /// The disk.
    pub disk: DiskSpec,
    /// How a run is disturbed in which vCPUs run at once.
    pub disturb: Disturb,
    /// Whether the merged event streams of such a run are judged.
    pub monitor: bool,
    /// When the invariants are checked.
    pub check: CheckWhen,
    /// Longest wall time of one run.
    pub timeout: Duration,
    /// Longest time without a sign of life.
    pub watchdog: Duration,
}

/// The user program of a scenario.
#[derive(Clone, Debug)]
pub struct Program {
    /// Its name in [`catalog::PROGRAMS`].
    pub name: String,
    /// Its arguments, in the order given; a later one wins.
    pub args: Vec<(String, String)>,
    /// The recorded trace that it replays.
    pub trace: Option<Trace>,
}

/// A recorded trace, ready for the guest.
#[derive(Clone, Debug)]
pub struct Trace {
    /// The file.
    pub path: PathBuf,
    /// The compiled form ([`abi::trace`]).
    pub blob: Vec<u8>,
    /// What became of its calls.
    pub summary: trace::Summary,
}

impl Scenario {
    /// Reads the scenario that `name` means: a path, or the bare name of a file in `scenarios/`.
    ///
    /// # Errors
    /// No such file, or one that is refused; the error points into the text.
    pub fn load(name: &Path) -> Result<Self, ScenarioError> {
        let path = find(name)?;
        let text = source::read(&path).map_err(|source| ScenarioError::Unreadable {
            path: path.clone(),
            source,
        })?;
        parse(&path, &text)
    }

    /// The kernel's command line.
    #[must_use]
    pub fn cmdline(&self) -> String {
        let params = self
            .params
            .iter()
            .map(|(key, value)| format!("{key}={value}"));
        let bugs = self.bugs.iter().map(|bug| format!("bug={}", bug.name()));
        params.chain(bugs).collect::<Vec<_>>().join(" ")
    }

    /// This scenario as a file, overrides included: all that schedules depend on, but a recorded trace, which it
    /// only names.
    #[must_use]
    pub fn to_toml(&self) -> String {
        use std::fmt::Write as _;
        let quoted = |text: &str| toml::Value::String(text.into()).to_string();
        let table = |pairs: &[(String, String)]| {
            // A later one wins.
            let map: std::collections::BTreeMap<_, _> = pairs.iter().cloned().collect();
            let pairs: Vec<String> = map
                .iter()
                .map(|(key, value)| format!("{} = {}", quoted(key), quoted(value)))
                .collect();
            format!("{{ {} }}", pairs.join(", "))
        };
        let mut text = format!("name = {}\n[machine]\n", quoted(&self.name));
        let interrupts = match self.interrupts {
            InterruptMode::Hardware => "hardware",
            InterruptMode::Controlled => "controlled",
        };
        let _ = write!(
            text,
            "vcpus = {}\nmemory = \"{}K\"\ninterrupts = \"{interrupts}\"\n[program]\nname = {}\nargs = {}\n",
            self.vcpus,
            self.memory_bytes >> 10,
            quoted(&self.program.name),
            table(&self.program.args),
        );
        if let Some(trace) = &self.program.trace {
            let _ = writeln!(
                text,
                "trace = {{ file = {} }}",
                quoted(&trace.path.to_string_lossy())
            );
        }
        let bugs: Vec<String> = self.bugs.iter().map(|bug| quoted(bug.name())).collect();
        let _ = write!(
            text,
            "[kernel]\nparams = {}\nbugs = [{}]\n",
            table(&self.params),
            bugs.join(", ")
        );
        if !self.fails.is_empty() {
            let fails = self.fails.iter().map(|fail| quoted(&fail.to_string()));
            let fails: Vec<String> = fails.collect();
            let _ = writeln!(text, "fail = [{}]", fails.join(", "));
        }
        if self.check == CheckWhen::EveryPoint {
            text.push_str("[check]\nwhen = \"every-point\"\n");
        }
        text.push_str(&self.disk.to_toml());
        text
    }

    /// The program's arguments as it gets them: `key=value`.
    #[must_use]
    pub fn args(&self) -> Vec<String> {
        self.program
            .args
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect()
    }

    /// Switches `bug` on, once.
    pub fn add_bug(&mut self, bug: Bug) {
        if !self.bugs.contains(&bug) {
            self.bugs.push(bug);
        }
    }
}

/// Directories that bare names are looked up in, nearest first.
#[must_use]
pub fn directories() -> Vec<PathBuf> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("scenarios");
    let mut found: Vec<PathBuf> = Vec::new();
    for directory in [PathBuf::from("scenarios"), repository] {
        let known = |other: &PathBuf| other.canonicalize().ok() == directory.canonicalize().ok();
        if directory.is_dir() && !found.iter().any(known) {
            found.push(directory);
        }
    }
    found
}

/// Every scenario file in [`directories`], by name.
#[must_use]
pub fn available() -> Vec<(String, PathBuf)> {
    let mut all: Vec<(String, PathBuf)> = Vec::new();
    for directory in directories() {
        for path in std::fs::read_dir(directory)
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path())
        {
            let (Some(stem), Some(extension)) = (path.file_stem(), path.extension()) else {
                continue;
            };
            let name = stem.to_string_lossy().into_owned();
            if extension == "toml" && !all.iter().any(|(other, _)| *other == name) {
                all.push((name, path));
            }
        }
    }
    all.sort();
    all
}

fn find(name: &Path) -> Result<PathBuf, ScenarioError> {
    if name.is_file() {
        return Ok(name.to_path_buf());
    }
    let is_bare = name.components().count() == 1 && name.extension().is_none_or(|e| e == "toml");
    let available = available();
    let wanted = name.file_stem().unwrap_or_default().to_string_lossy();
    if is_bare && let Some((_, path)) = available.iter().find(|(other, _)| *other == wanted) {
        return Ok(path.clone());
    }
    // No file, but something: reading it says what is wrong.
    if name.exists() {
        return Ok(name.to_path_buf());
    }
    let names = || available.iter().map(|(name, _)| name.as_str());
    let help = match names().next() {
        None => {
            "no scenarios/ here nor in the repository that this binary was built from: give a path"
                .into()
        }
        Some(_) => format!(
            "{} (`stalemate list scenarios` shows all)",
            values::did_you_mean(&wanted, names().collect::<Vec<_>>())
        ),
    };
    Err(ScenarioError::NotFound {
        name: name.to_path_buf(),
        help,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scenario(text: &str) -> Scenario {
        parse(Path::new("dir/x.toml"), text).unwrap()
    }

    #[test]
    fn what_a_file_leaves_out_has_a_default() {
        let scenario = scenario("[program]\nname = \"smoke\"\n");
        assert_eq!(
            (scenario.name.as_str(), scenario.vcpus),
            ("x", DEFAULT_VCPUS)
        );
        assert_eq!(
            (scenario.memory_bytes, scenario.check),
            (DEFAULT_MEMORY, CheckWhen::End)
        );
        assert_eq!(scenario.interrupts, InterruptMode::Hardware);
        assert_eq!(scenario.cmdline(), "");
    }

    #[test]
    fn parameters_and_bugs_become_the_kernel_command_line() {
        let mut scenario = scenario(
            "[program]\nname = \"smoke\"\n[kernel]\nparams = { poison = \"off\", flush_ceiling = 1 }\nbugs = [\"free-before-flush\"]",
        );
        scenario.add_bug(Bug::ShootdownSkipRemote);
        scenario.add_bug(Bug::ShootdownSkipRemote);
        assert_eq!(
            scenario.cmdline(),
            "flush_ceiling=1 poison=off bug=free-before-flush bug=shootdown-skip-remote"
        );
        abi::param::Config::parse(&scenario.cmdline()).unwrap();
    }

    #[test]
    fn what_is_written_as_a_file_is_read_as_the_same() {
        let whole = "[program]\nname = \"smoke\"\n[machine]\nvcpus = 3\ninterrupts = \"controlled\"\n\
                     [kernel]\nparams = { poison = \"off\" }\nbugs = [\"free-before-flush\"]\n\
                     fail = [\"slab-alloc@0:3\"]\n[check]\nwhen = \"every-point\"\n";
        let first = scenario(whole);
        let again = scenario(&first.to_toml());
        assert_eq!(again.to_toml(), first.to_toml());
        assert_eq!((again.vcpus, again.check), (3, CheckWhen::EveryPoint));
        assert_eq!(
            (again.cmdline(), again.fails),
            (first.cmdline(), first.fails)
        );
    }

    #[test]
    fn a_missing_scenario_names_the_nearest() {
        let error = Scenario::load(Path::new("smok")).unwrap_err().to_string();
        assert!(error.contains("no scenario 'smok'"), "{error}");
        let ScenarioError::NotFound { help, .. } = Scenario::load(Path::new("smok")).unwrap_err()
        else {
            panic!("not found")
        };
        assert!(help.contains("'smoke'"), "{help}");
    }

    #[test]
    fn every_scenario_of_the_repository_is_valid() {
        let all = available();
        for name in ["smoke", "unmap-race", "cow-fork", "mprotect-race"] {
            assert!(all.iter().any(|(other, _)| other == name), "{name}");
        }
        for (name, path) in all {
            let scenario = Scenario::load(&path).unwrap_or_else(|error| panic!("{error:?}"));
            assert_eq!(scenario.name, name);
            assert!(
                scenario.description.ends_with('?'),
                "{name} asks no question"
            );
        }
    }
}
