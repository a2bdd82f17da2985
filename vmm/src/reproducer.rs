//! Reproducers: files that replay one execution, bit for bit, wherever the kernel is the same.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::boot;
use crate::engine::Window;
use crate::explore::{Actor, Schedule};
use crate::scenario::{self, Scenario, ScenarioError, values};

/// Version of the format.
const FORMAT: u32 = 1;
/// Largest file that is read.
const MAX_BYTES: u64 = 16 << 20;

/// What a reproducer file holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reproducer {
    format: u32,
    /// [`boot::kernel_hash`] of the kernel that it was found on.
    pub kernel: String,
    /// How it was found, for a person.
    pub found_by: String,
    /// How the execution ends: an invariant's ID, `report`, `deadlock`, …
    pub ending: String,
    /// Events of the execution.
    pub events: u64,
    /// Fingerprint of the events.
    pub digest: String,
    /// `0:12 1:5 i1`: vCPU 0 for 12 points, vCPU 1 for 5, then what is in flight to vCPU 1 arrives.
    schedule: String,
    /// Where instructions were scheduling points: `flush-issue:1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    window: Option<String>,
    /// All invariants looked at every point.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub check_every_point: bool,
    /// The scenario, as a scenario file.
    scenario: String,
}

/// Why a reproducer is refused.
#[derive(Debug, thiserror::Error)]
pub enum ReproducerError {
    /// No such file, or none that can be read.
    #[error("{path}: cannot be read: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not what a reproducer looks like.
    #[error("{path}: {problem}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Line and reason.
        problem: String,
    },
    /// Its scenario is not one.
    #[error("{path}: its scenario is refused: {source}")]
    Scenario {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<ScenarioError>,
    },
    /// It was found on another kernel.
    #[error(
        "{path}: was found on kernel {theirs}, this is kernel {ours}; --any-kernel tries all the same, \
         explore finds it anew"
    )]
    OtherKernel {
        /// The file.
        path: PathBuf,
        /// The file's kernel.
        theirs: String,
        /// The kernel in this program.
        ours: String,
    },
    /// It cannot be written.
    #[error("{path}: cannot be written: {source}")]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl Reproducer {
    /// A reproducer of an execution of `scenario` on this program's kernel.
    #[must_use]
    pub fn new(
        scenario: &Scenario,
        schedule: &Schedule,
        found_by: String,
        ending: String,
        (events, digest): (u64, String),
    ) -> Self {
        Self {
            format: FORMAT,
            kernel: boot::kernel_hash().into(),
            found_by,
            ending,
            events,
            digest,
            schedule: schedule_text(schedule),
            window: None,
            check_every_point: false,
            scenario: scenario.to_toml(),
        }
    }

    /// One that is checked at every point, or not.
    #[must_use]
    pub fn with_check(self, check_every_point: bool) -> Self {
        Self {
            check_every_point,
            ..self
        }
    }

    /// One whose schedule counts instructions too.
    #[must_use]
    pub fn with_window(self, window: Option<Window>) -> Self {
        Self {
            window: window.map(|window| window.to_string()),
            ..self
        }
    }

    /// Where instructions are scheduling points.
    #[must_use]
    pub fn window(&self) -> Option<Window> {
        self.window
            .as_deref()
            .and_then(|text| values::window(text).ok())
    }

    /// Reads the file at `path`. `any_kernel`: also where it belongs to another kernel.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn read(
        path: &Path,
        any_kernel: bool,
    ) -> Result<(Self, Scenario, Schedule), ReproducerError> {
        let unreadable = |source| ReproducerError::Unreadable {
            path: path.into(),
            source,
        };
        let malformed = |problem: String| ReproducerError::Malformed {
            path: path.into(),
            problem,
        };
        let length = std::fs::metadata(path).map_err(unreadable)?.len();
        if length > MAX_BYTES {
            return Err(malformed(format!(
                "{length} bytes are too many for a reproducer"
            )));
        }
        let bytes = std::fs::read(path).map_err(unreadable)?;
        let text = String::from_utf8(bytes).map_err(|_| malformed("is not text".into()))?;
        let this: Self = toml::from_str(&text).map_err(|error| malformed(error.to_string()))?;
        if this.format != FORMAT {
            let found = this.format;
            return Err(malformed(format!(
                "has format {found}; this program reads format {FORMAT}"
            )));
        }
        if !any_kernel && this.kernel != boot::kernel_hash() {
            return Err(ReproducerError::OtherKernel {
                path: path.into(),
                theirs: this.kernel,
                ours: boot::kernel_hash().into(),
            });
        }
        if let Some(Err(error)) = this.window.as_deref().map(values::window) {
            return Err(malformed(format!("its window: {error}")));
        }
        let schedule = parse_schedule(&this.schedule)
            .map_err(|word| malformed(format!("`{word}` in its schedule is no step (0:12, i1)")))?;
        let scenario =
            scenario::parse(path, &this.scenario).map_err(|source| ReproducerError::Scenario {
                path: path.into(),
                source: Box::new(source),
            })?;
        Ok((this, scenario, schedule))
    }

    /// Writes it to a new file in `directory`, which is made where it is missing; nothing is overwritten.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, directory: &Path, stem: &str) -> Result<PathBuf, ReproducerError> {
        let failed = |source| ReproducerError::Unwritable {
            path: directory.into(),
            source,
        };
        std::fs::create_dir_all(directory).map_err(failed)?;
        let mut file = tempfile::NamedTempFile::new_in(directory).map_err(failed)?;
        file.write_all(self.to_text().as_bytes()).map_err(failed)?;
        let mut number = 0u32;
        loop {
            let name = match number {
                0 => format!("{stem}.repro"),
                n => format!("{stem}-{n}.repro"),
            };
            let path = directory.join(name);
            match file.persist_noclobber(&path) {
                Ok(_) => return Ok(path),
                Err(error) if error.error.kind() == std::io::ErrorKind::AlreadyExists => {
                    file = error.file;
                    number += 1;
                }
                Err(error) => return Err(failed(error.error)),
            }
        }
    }

    fn to_text(&self) -> String {
        let body = toml::to_string_pretty(self).expect("strings and numbers");
        format!("# A reproducer: `stalemate replay FILE` runs it again.\n{body}")
    }
}

fn schedule_text(schedule: &Schedule) -> String {
    let mut text = String::new();
    for segment in &schedule.segments {
        let gap = if text.is_empty() { "" } else { " " };
        let _ = match segment.actor {
            Actor::Vcpu(vcpu) => write!(text, "{gap}{vcpu}:{}", segment.points),
            Actor::Wire(vcpu) => write!(text, "{gap}i{vcpu}"),
        };
    }
    text
}

fn parse_schedule(text: &str) -> Result<Schedule, &str> {
    let mut schedule = Schedule::default();
    for word in text.split_ascii_whitespace() {
        let step = match word.strip_prefix('i') {
            Some(vcpu) => vcpu.parse().ok().map(|vcpu| (Actor::Wire(vcpu), 1)),
            None => word.split_once(':').and_then(|(vcpu, points)| {
                Some((Actor::Vcpu(vcpu.parse().ok()?), points.parse().ok()?))
            }),
        };
        match step {
            Some((actor, points)) if points > 0 => schedule.push(actor, points),
            _ => return Err(word),
        }
    }
    Ok(schedule)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> (Reproducer, Schedule) {
        let text = "[program]\nname = \"litmus\"\nargs = { test = \"cow\" }\n[kernel]\nbugs = [\"cow-free-before-flush\"]";
        let scenario = scenario::parse(Path::new("a.toml"), text).unwrap();
        let schedule = parse_schedule("0:12 1:5 i1 0:3").unwrap();
        let found = ("pct".to_owned(), "T-01".to_owned());
        let reproducer = Reproducer::new(&scenario, &schedule, found.0, found.1, (7, "ab".into()));
        (reproducer, schedule)
    }

    fn written(text: &str) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.repro");
        std::fs::write(&path, text).unwrap();
        (directory, path)
    }

    #[test]
    fn what_is_written_is_read_and_nothing_is_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let (reproducer, schedule) = example();
        let first = reproducer.write(directory.path(), "a").unwrap();
        let second = reproducer.write(directory.path(), "a").unwrap();
        assert_ne!(first, second);
        for path in [first, second] {
            let (read, scenario, steps) = Reproducer::read(&path, false).unwrap();
            assert_eq!((&read, &steps), (&reproducer, &schedule));
            assert_eq!(scenario.cmdline(), "bug=cow-free-before-flush");
            assert_eq!(scenario.args(), ["test=cow"]);
        }
    }

    #[test]
    fn another_kernel_is_named() {
        let (mut reproducer, _) = example();
        reproducer.kernel = "0123".into();
        let (_directory, path) = written(&reproducer.to_text());
        let error = Reproducer::read(&path, false).unwrap_err().to_string();
        assert!(
            error.contains("0123") && error.contains(boot::kernel_hash()),
            "{error}"
        );
        assert!(Reproducer::read(&path, true).is_ok());
    }

    #[test]
    fn whatever_was_cut_off_or_changed_is_refused_with_a_reason() {
        let (reproducer, _) = example();
        let text = reproducer.to_text();
        for end in (0..text.len() - 1).step_by(7) {
            let (_directory, path) = written(&text[..end]);
            assert!(Reproducer::read(&path, true).is_err(), "cut at {end}");
        }
        for (old, new) in [
            ("0:12", "0:x"),
            ("format = 1", "format = 9"),
            ("litmus", "nothing"),
        ] {
            let (_directory, path) = written(&text.replace(old, new));
            assert!(Reproducer::read(&path, true).is_err(), "{new}");
        }
    }
}
