//! The machine-readable form, and the directory of `--out`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

/// File of the result in an `--out` directory.
pub const RESULT: &str = "result.json";
/// File of the text for a person.
pub const REPORT: &str = "report.txt";
/// File of the guest's serial output.
pub const SERIAL: &str = "serial.log";

/// Why a result cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The file system refused.
    #[error("cannot write {}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is another program's, or nobody knows whose.
    #[error("{} is there already, and stalemate did not write it: give another name", path.display())]
    NotOurFile {
        /// The file.
        path: PathBuf,
    },
    /// The directory holds files of the same names that this program did not write.
    #[error("{} has a {RESULT} that stalemate did not write: give another directory, or --force", directory.display())]
    NotOurs {
        /// The directory.
        directory: PathBuf,
    },
}

/// `value` as indented JSON with a newline at the end.
///
/// # Panics
/// Never: every result type serialises.
#[must_use]
pub fn to_text(value: &impl Serialize) -> String {
    let mut text = serde_json::to_string_pretty(value).expect("results have string keys only");
    text.push('\n');
    text
}

/// Writes `text` beside `path` and renames: a reader sees the old file or the new one, never half.
/// What is not a regular file (`/dev/stdout`, a pipe) is written in place.
///
/// # Errors
/// The file system refused.
pub fn write(path: &Path, text: &str) -> Result<(), WriteError> {
    let failed = |source| WriteError::Io {
        path: path.to_path_buf(),
        source,
    };
    match std::fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => return std::fs::write(path, text).map_err(failed),
        _ => {}
    }
    // A link is followed, not replaced.
    let target = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let mut name = target.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = target.with_file_name(name);
    let written = std::fs::File::create(&temporary)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .and_then(|()| std::fs::rename(&temporary, &target));
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written.map_err(failed)
}

/// Checks that [`write`] will be able to write `path` and that nothing but an earlier result is lost by it, and
/// leaves no trace of it.
///
/// # Errors
/// The file system refused, or the file is none of ours.
pub fn probe(path: &Path) -> Result<(), WriteError> {
    let existed = path.exists();
    let holds = std::fs::metadata(path).is_ok_and(|data| data.is_file() && data.len() > 0);
    if holds && !is_ours(path) {
        return Err(WriteError::NotOurFile {
            path: path.to_path_buf(),
        });
    }
    std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .map_err(|source| WriteError::Io {
            path: path.to_path_buf(),
            source,
        })?;
    if !existed {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

/// A directory that is ready to take a result.
#[derive(Debug)]
pub struct OutDirectory(PathBuf);

/// Whether a result of another program may be overwritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overwrite {
    /// Only a result of ours.
    Ours,
    /// Anything.
    Force,
}

impl OutDirectory {
    /// Creates `path` where it is missing. Called before the run, so that nothing is lost after it.
    ///
    /// # Errors
    /// It cannot be created, or holds what may not be overwritten.
    pub fn prepare(path: &Path, overwrite: Overwrite) -> Result<Self, WriteError> {
        let failed = |source| WriteError::Io {
            path: path.to_path_buf(),
            source,
        };
        std::fs::create_dir_all(path).map_err(failed)?;
        let occupied = [RESULT, REPORT, SERIAL]
            .iter()
            .any(|name| path.join(name).exists());
        if occupied && overwrite == Overwrite::Ours && !is_ours(&path.join(RESULT)) {
            return Err(WriteError::NotOurs {
                directory: path.to_path_buf(),
            });
        }
        Ok(Self(path.to_path_buf()))
    }

    /// Writes the three files.
    ///
    /// # Errors
    /// The file system refused.
    pub fn write(
        &self,
        result: &impl Serialize,
        report: &str,
        serial: &str,
    ) -> Result<(), WriteError> {
        write(&self.0.join(SERIAL), serial)?;
        write(&self.0.join(REPORT), report)?;
        write(&self.0.join(RESULT), &to_text(result))
    }
}

/// True for a result or a timeline that this program wrote.
fn is_ours(result: &Path) -> bool {
    let text = std::fs::read_to_string(result).unwrap_or_default();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let result = value.get("schema").is_some()
        && ["stalemate", "kind"]
            .iter()
            .any(|key| value.get(key).is_some());
    // A timeline says which kernel it is of.
    result || value.pointer("/otherData/kernel").is_some()
}

#[cfg(test)]
mod tests {
    use super::super::{Verdict, tests::result};
    use super::*;

    #[test]
    fn a_result_of_ours_may_be_replaced_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/deep");
        let out = OutDirectory::prepare(&path, Overwrite::Ours).unwrap();
        out.write(&result(Verdict::Held), "report", "serial")
            .unwrap();
        OutDirectory::prepare(&path, Overwrite::Ours).unwrap();

        std::fs::write(path.join(RESULT), "{\"mine\": 1}").unwrap();
        let refused = OutDirectory::prepare(&path, Overwrite::Ours)
            .unwrap_err()
            .to_string();
        assert!(refused.contains("--force"), "{refused}");
        OutDirectory::prepare(&path, Overwrite::Force).unwrap();
    }

    #[test]
    fn a_result_carries_its_schema_and_times_in_nanoseconds() {
        let value: serde_json::Value =
            serde_json::from_str(&to_text(&result(Verdict::Held))).unwrap();
        assert_eq!(value["schema"], super::super::SCHEMA);
        assert_eq!(value["verdict"], "held");
        assert_eq!(value["timings_ns"]["boot"], 100_000_000);
        assert_eq!(
            value["invariants"][1]["skipped"]["this host has no nested page tables"],
            3
        );
    }

    #[test]
    fn a_write_leaves_no_temporary_file_behind() {
        let directory = tempfile::tempdir().unwrap();
        let ours = "{\"schema\": 1, \"kind\": \"explore\"}";
        write(&directory.path().join("a.json"), "1").unwrap();
        let foreign = probe(&directory.path().join("a.json")).unwrap_err();
        assert!(foreign.to_string().contains("did not write it"));
        write(&directory.path().join("a.json"), ours).unwrap();
        assert!(write(&directory.path().join("absent/a.json"), "1").is_err());
        let files: Vec<_> = std::fs::read_dir(directory.path()).unwrap().collect();
        assert_eq!(files.len(), 1);
        probe(&directory.path().join("b.json")).unwrap();
        probe(&directory.path().join("a.json")).unwrap();
        assert!(probe(&directory.path().join("absent/b.json")).is_err());
        assert!(!directory.path().join("b.json").exists());
        assert_eq!(
            std::fs::read_to_string(directory.path().join("a.json")).unwrap(),
            ours
        );
    }
}
