//! Reproducers: files that replay one execution, bit for bit, wherever the kernel is the same.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::boot;
use crate::engine::Window;
use crate::explore::campaign::failure_ids;
use crate::explore::{Actor, Schedule};
use crate::scenario::{self, Scenario, ScenarioError, fail, values};

/// Version of the format.
const FORMAT: u32 = 1;
/// Largest file that is read.
const MAX_BYTES: u64 = 16 << 20;
/// Characters of a fingerprint.
const DIGEST: usize = 32;

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
    /// The scenario, as a scenario file.
    scenario: String,
}

/// Where the strings of a file are in it.
#[derive(Deserialize)]
struct Strings {
    scenario: toml::Spanned<String>,
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
    #[error("{path}{}: {problem}; explore writes a new one", colon(.line))]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where in it, from 1.
        line: Option<usize>,
        /// Why.
        problem: String,
    },
    /// Its scenario is not one; the place is the one in the file.
    #[error(transparent)]
    Scenario(Box<ScenarioError>),
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
            schedule: schedule.to_string(),
            window: None,
            scenario: scenario.to_toml(),
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
        let malformed = |line, problem: String| ReproducerError::Malformed {
            path: path.into(),
            line,
            problem,
        };
        let metadata = std::fs::metadata(path).map_err(unreadable)?;
        // A device may have no end, and a FIFO no writer.
        if !metadata.is_file() {
            return Err(malformed(None, "is no regular file".into()));
        }
        let length = metadata.len();
        if length > MAX_BYTES {
            let problem = format!("{length} bytes are too many for a reproducer");
            return Err(malformed(None, problem));
        }
        let bytes = std::fs::read(path).map_err(unreadable)?;
        let text = String::from_utf8(bytes).map_err(|error| {
            let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            malformed(Some(line_of(good)), "is not text".into())
        })?;
        let this: Self = toml::from_str(&text).map_err(|error| {
            let line = error.span().map(|at| line_of(&text.as_bytes()[..at.start]));
            malformed(line, error.message().trim().replace('\n', ", "))
        })?;
        // Where a key is given.
        let at = |key: &str| {
            let mut lines = text.lines();
            let is_key = |line: &str| line.trim_start().starts_with(key);
            lines.position(is_key).map(|before| before + 1)
        };
        if this.format != FORMAT {
            let found = this.format;
            let problem = format!("has format {found}; this program reads format {FORMAT}");
            return Err(malformed(at("format"), problem));
        }
        // What is told to a person is a word, whoever has edited it.
        let is_word = |text: &str| {
            let known = |c: char| c.is_ascii_alphanumeric() || c == '-';
            (1..=64).contains(&text.len()) && text.chars().all(known)
        };
        if !is_word(&this.kernel) {
            let problem = format!("its kernel {:?} is none", this.kernel);
            return Err(malformed(at("kernel"), problem));
        }
        if !any_kernel && this.kernel != boot::kernel_hash() {
            return Err(ReproducerError::OtherKernel {
                path: path.into(),
                theirs: this.kernel,
                ours: boot::kernel_hash().into(),
            });
        }
        if !failure_ids().any(|id| id == this.ending) {
            let known: Vec<&str> = failure_ids().collect();
            let problem = format!(
                "its ending {:?} names no failure; known are {}",
                this.ending,
                known.join(", ")
            );
            return Err(malformed(at("ending"), problem));
        }
        let is_digit = |c: char| matches!(c, '0'..='9' | 'a'..='f');
        if this.digest.len() != DIGEST || !this.digest.chars().all(is_digit) {
            let digest = &this.digest;
            let problem = format!("its digest {digest:?} is not {DIGEST} hexadecimal digits");
            return Err(malformed(at("digest"), problem));
        }
        if let Some(Err(error)) = this.window.as_deref().map(values::window) {
            return Err(malformed(at("window"), format!("its window: {error}")));
        }
        let schedule = parse_schedule(&this.schedule).map_err(|word| {
            let problem = format!("`{word}` in its schedule is no step (0:12, i1, d0)");
            malformed(at("schedule"), problem)
        })?;
        let string = toml::from_str::<Strings>(&text).map_or(0..0, |at| at.scenario.span());
        let scenario = scenario::parse_within(path, &text, string, &this.scenario)
            .map_err(|source| ReproducerError::Scenario(Box::new(source)))?;
        fail::check(&scenario.fails, scenario.vcpus)
            .map_err(|refused| malformed(at("fail"), refused.to_string()))?;
        let vcpus = scenario.vcpus;
        let absent = schedule.segments.iter().find(|segment| {
            let (Actor::Vcpu(vcpu) | Actor::Wire(vcpu) | Actor::Disk(vcpu)) = segment.actor;
            u32::from(vcpu) >= vcpus
        });
        if let Some(segment) = absent {
            let actor = segment.actor;
            let problem = format!("its schedule has a step of {actor}, its scenario {vcpus} vCPUs");
            return Err(malformed(at("schedule"), problem));
        }
        Ok((this, scenario, schedule))
    }

    /// Writes it to a new file in `directory`, which is made where it is missing; nothing is overwritten.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, directory: &Path, stem: &str) -> Result<PathBuf, ReproducerError> {
        let failed = unwritable(directory);
        let mut file = self.temporary(directory).map_err(&failed)?;
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

    /// Writes it in place of an earlier one, of which a reader sees all or nothing.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn replace(&self, path: &Path) -> Result<(), ReproducerError> {
        let directory = path.parent().unwrap_or(Path::new("."));
        let file = self.temporary(directory);
        file.and_then(|file| file.persist(path).map_err(|error| error.error))
            .map(drop)
            .map_err(unwritable(directory))
    }

    fn temporary(&self, directory: &Path) -> std::io::Result<tempfile::NamedTempFile> {
        std::fs::create_dir_all(directory)?;
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        file.write_all(self.to_text().as_bytes())?;
        Ok(file)
    }

    /// The text of its file.
    #[must_use]
    pub fn to_text(&self) -> String {
        let body = toml::to_string_pretty(self).expect("strings and numbers");
        format!("# A reproducer: `stalemate replay FILE` runs it again.\n{body}")
    }
}

fn unwritable(directory: &Path) -> impl Fn(std::io::Error) -> ReproducerError {
    move |source| ReproducerError::Unwritable {
        path: directory.into(),
        source,
    }
}

/// `:7`, where the line is known.
fn colon(line: &Option<usize>) -> String {
    line.map_or(String::new(), |line| format!(":{line}"))
}

/// The line on which what follows `before` begins.
fn line_of(before: &[u8]) -> usize {
    before.iter().filter(|byte| **byte == b'\n').count() + 1
}

fn parse_schedule(text: &str) -> Result<Schedule, &str> {
    let mut schedule = Schedule::default();
    for word in text.split_ascii_whitespace() {
        let number = |text: Option<&str>| text.and_then(|text| text.parse::<u8>().ok());
        let step = match word.as_bytes().first() {
            Some(b'i') => number(word.get(1..)).map(|vcpu| (Actor::Wire(vcpu), 1)),
            Some(b'd') => number(word.get(1..)).map(|vcpu| (Actor::Disk(vcpu), 1)),
            _ => word.split_once(':').and_then(|(vcpu, points)| {
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
    use proptest::prelude::*;

    use super::*;

    fn example() -> (Reproducer, Schedule) {
        let text = "[program]\nname = \"litmus\"\nargs = { test = \"cow\" }\n[kernel]\nbugs = [\"cow-free-before-flush\"]";
        let scenario = scenario::parse(Path::new("a.toml"), text).unwrap();
        let schedule = parse_schedule("0:12 1:5 i1 d0 0:3").unwrap();
        let found = ("pct".to_owned(), "T-01".to_owned());
        let digest = "0123456789abcdef".repeat(2);
        let reproducer = Reproducer::new(&scenario, &schedule, found.0, found.1, (7, digest));
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
    fn one_that_is_replaced_is_the_new_one_whatever_became_of_its_directory() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        let (mut reproducer, _) = example();
        let path = reproducer.write(&out, "a").unwrap();
        reproducer.events = 8;
        reproducer.replace(&path).unwrap();
        assert_eq!(Reproducer::read(&path, false).unwrap().0.events, 8);
        assert_eq!(std::fs::read_dir(&out).unwrap().count(), 1);
        std::fs::remove_dir_all(&out).unwrap();
        reproducer.replace(&path).unwrap();
        std::fs::remove_dir_all(&out).unwrap();
        std::fs::write(&out, "a file").unwrap();
        let error = reproducer.replace(&path).unwrap_err().to_string();
        assert!(error.contains("cannot be written"), "{error}");
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
        for (old, new, line) in [
            ("0:12", "0:x", ":8: `0:x` in its schedule"),
            (
                "0:12",
                "7:12",
                ":8: its schedule has a step of 7, its scenario 2 vCPUs",
            ),
            ("i1", "i9", ":8: its schedule has a step of i9"),
            ("format = 1", "format = 9", ":2: has format 9"),
            ("format = 1", "format = x", ":2: "),
            ("found_by", "found\u{7}by", ":4: "),
            ("T-01", "T-01 \\u001b[31m", ":5: its ending"),
            (
                "T-01",
                "T-1",
                ":5: its ending \"T-1\" names no failure; known are ",
            ),
            ("T-01", "foo", " T-01, "),
            ("T-01", "foo", ", livelock, crash; "),
            ("digest = \"01", "digest = \"", ":7: its digest"),
            ("digest = \"01", "digest = \"xy", ":7: its digest"),
            ("\"litmus\"", "\"litmsu\"", ":16:8: no program 'litmsu'"),
            ("cow-free", "cow-fee", ":20:9: no seeded bug 'cow-fee"),
            ("vcpus = 2", "vcpus = 99", ":12:9: 99 vCPUs"),
            (
                "[kernel]\n",
                "[kernel]\nfail = [\"slab-alloc@7:1\"]\n",
                ":19: slab-alloc@7:1: this machine has no vCPU 7",
            ),
        ] {
            let (_directory, path) = written(&text.replace(old, new));
            let error = Reproducer::read(&path, true).unwrap_err().to_string();
            let name = path.to_str().unwrap();
            assert!(error.starts_with(name) && error.contains(line), "{error}");
        }
    }

    #[test]
    fn what_is_no_file_of_text_is_refused_before_it_is_read() {
        for (path, why) in [
            ("/dev/zero", "no regular file"),
            ("/tmp", "no regular file"),
        ] {
            let error = Reproducer::read(Path::new(path), true).unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("large.repro");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(MAX_BYTES + 1).unwrap();
        let error = Reproducer::read(&path, true).unwrap_err().to_string();
        assert!(error.contains("too many"), "{error}");
        std::fs::write(&path, b"format = 1\n# \xff\n").unwrap();
        let error = Reproducer::read(&path, true).unwrap_err().to_string();
        assert!(error.contains("large.repro:2: is not text"), "{error}");
    }

    /// A refusal names the file; what is not refused says nothing that its scenario has not.
    #[track_caller]
    fn is_refused_or_sound(bytes: &[u8]) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.repro");
        std::fs::write(&path, bytes).unwrap();
        match Reproducer::read(&path, true) {
            Err(error) => assert!(error.to_string().contains("x.repro"), "{error}"),
            Ok((_, scenario, schedule)) => {
                for segment in schedule.segments {
                    let (Actor::Vcpu(vcpu) | Actor::Wire(vcpu) | Actor::Disk(vcpu)) = segment.actor;
                    assert!(u32::from(vcpu) < scenario.vcpus && segment.points > 0);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_sound(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            is_refused_or_sound(&bytes);
        }

        #[test]
        fn flipped_bits_are_refused_or_sound(
            flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..4),
            end in any::<prop::sample::Index>(),
            cut: bool,
        ) {
            let mut bytes = example().0.to_text().into_bytes();
            for (at, bit) in flips {
                let at = at.index(bytes.len());
                bytes[at] ^= 1u8 << bit;
            }
            let end = if cut { end.index(bytes.len()) } else { bytes.len() };
            is_refused_or_sound(&bytes[..end]);
        }
    }
}
