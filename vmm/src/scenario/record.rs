//! Records the memory calls of a real program, by strace, as a text trace.

mod strace;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use serde::Serialize;
use tempfile::NamedTempFile;

use super::trace::{File, Trace};

/// The calls that are recorded.
const CALLS: &str = "trace=mmap,munmap,mprotect,mremap,brk,madvise,clone,clone3,fork,vfork,execve,\
                     exit,exit_group";

/// What to do where the file exists already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Refuse, before the command is run.
    Keep,
    /// Replace it, once the new one is complete.
    Replace,
}

/// What was recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RecordSummary {
    /// Calls, by name.
    pub calls: BTreeMap<&'static str, u64>,
    /// Tasks that made them.
    pub tasks: u64,
    /// Lines of strace's output that were not understood, and are not in the trace.
    pub not_understood: u64,
    /// Exit status of the command, as a shell gives it (128 and the signal's number for a signal).
    pub status: i32,
    /// Size of the text.
    pub bytes: u64,
}

/// Why nothing was recorded.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// No command was given.
    #[error("there is no command to record")]
    NoCommand,
    /// The output exists.
    #[error("{} exists already; choose another file, or ask for it to be replaced", .0.display())]
    Exists(PathBuf),
    /// strace is not installed.
    #[error("strace was not found; install the Debian package `strace`")]
    NoStrace,
    /// strace could not be started.
    #[error("strace cannot be started")]
    Strace(#[source] io::Error),
    /// The kernel does not let strace trace.
    #[error(
        "this host does not permit ptrace (strace said: {0}); run as root, or look at \
         /proc/sys/kernel/yama/ptrace_scope and the container's seccomp profile"
    )]
    PtraceNotPermitted(String),
    /// No such command.
    #[error("the command `{0}` was not found, or is not executable")]
    CommandNotFound(String),
    /// strace ran and recorded nothing.
    #[error("strace recorded no call (strace said: {0})")]
    Nothing(String),
    /// A file could not be read or written.
    #[error("{}: {doing} failed", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl RecordError {
    fn file(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File {
            path,
            doing,
            source,
        }
    }
}

/// Runs `command` and writes its memory calls to `out`, all at once when it has ended. The command keeps
/// its standard streams but for `stdout`, which its standard output is. One that fails is recorded like any other; the trace notes its status.
///
/// # Errors
/// See [`RecordError`]; `out` is then as it was.
pub fn record(
    command: &[OsString],
    out: &Path,
    existing: Existing,
    stdout: Stdio,
) -> Result<RecordSummary, RecordError> {
    record_with(OsStr::new("strace"), command, out, existing, stdout)
}

fn record_with(
    strace: &OsStr,
    command: &[OsString],
    out: &Path,
    existing: Existing,
    stdout: Stdio,
) -> Result<RecordSummary, RecordError> {
    let program = command.first().ok_or(RecordError::NoCommand)?;
    if existing == Existing::Keep && out.symlink_metadata().is_ok() {
        return Err(RecordError::Exists(out.to_owned()));
    }
    let folder = match out.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    // First of all, so that a folder that cannot be written to is known before the command runs.
    let mut text = NamedTempFile::new_in(folder)
        .map_err(RecordError::file(folder, "creating a temporary file"))?;
    if !is_executable(program) {
        return Err(RecordError::CommandNotFound(
            program.to_string_lossy().into_owned(),
        ));
    }
    let log = NamedTempFile::new().map_err(RecordError::file(
        &std::env::temp_dir(),
        "creating a temporary file",
    ))?;
    let (status, complaint) = run_strace(strace, command, log.path(), stdout)?;
    let bytes = std::fs::read(log.path()).map_err(RecordError::file(log.path(), "reading"))?;
    let recording = strace::parse(&String::from_utf8_lossy(&bytes));
    if recording.entries.is_empty() {
        return Err(nothing(complaint));
    }
    let status = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(-1);
    let mut trace = Trace {
        command: command
            .iter()
            .map(|word| word.to_string_lossy().into_owned())
            .collect(),
        status: Some(status),
        files: recording.files.iter().zip(0..).filter_map(size).collect(),
        entries: recording.entries,
    };
    trace.number_lines();
    let printed = trace.to_string();
    text.write_all(printed.as_bytes())
        .map_err(RecordError::file(text.path(), "writing"))?;
    keep(text, out, existing)?;

    let mut calls = BTreeMap::new();
    for entry in &trace.entries {
        *calls.entry(entry.call.name()).or_default() += 1;
    }
    Ok(RecordSummary {
        calls,
        tasks: recording.tasks,
        not_understood: recording.not_understood,
        status,
        bytes: printed.len() as u64,
    })
}

/// The size of a file that was mapped, unless it is gone or has none.
fn size((path, number): (&String, i64)) -> Option<File> {
    let meta = std::fs::metadata(path).ok()?;
    meta.is_file().then_some(File {
        number,
        bytes: meta.len(),
    })
}

fn keep(text: NamedTempFile, out: &Path, existing: Existing) -> Result<(), RecordError> {
    let persisted = match existing {
        Existing::Keep => text.persist_noclobber(out),
        Existing::Replace => text.persist(out),
    };
    match persisted {
        Ok(file) => {
            // A temporary file is private; the trace is an ordinary one.
            let permissions = std::fs::Permissions::from_mode(0o644);
            file.set_permissions(permissions)
                .map_err(RecordError::file(out, "setting its mode"))
        }
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
            Err(RecordError::Exists(out.to_owned()))
        }
        Err(error) => Err(RecordError::file(out, "writing")(error.error)),
    }
}

/// Runs the command under strace. Returns its status and the end of what strace and the command wrote
/// to standard error, which goes to ours as well.
fn run_strace(
    strace: &OsStr,
    command: &[OsString],
    log: &Path,
    stdout: Stdio,
) -> Result<(ExitStatus, String), RecordError> {
    let mut child = Command::new(strace)
        .args([
            "-f", "-q", "-y", "-s", "256", "-X", "raw", "-e", CALLS, "-o",
        ])
        .arg(log)
        .arg("--")
        .args(command)
        .env("LC_ALL", "C")
        .stdout(stdout)
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => RecordError::NoStrace,
            _ => RecordError::Strace(error),
        })?;
    let complaint = copy_stderr(&mut child);
    let status = child.wait().map_err(RecordError::Strace)?;
    Ok((status, complaint))
}

/// Copies the child's standard error to ours until it closes. Returns the end of it.
fn copy_stderr(child: &mut Child) -> String {
    const KEPT: usize = 2048;
    let mut end = Vec::new();
    let mut buffer = [0; 4096];
    if let Some(mut stderr) = child.stderr.take() {
        while let Ok(count @ 1..) = stderr.read(&mut buffer) {
            // Ours may be closed; the recording goes on.
            let _ = io::stderr().write_all(&buffer[..count]);
            end.extend_from_slice(&buffer[..count]);
            end.drain(..end.len().saturating_sub(KEPT));
        }
    }
    String::from_utf8_lossy(&end).trim().to_owned()
}

fn nothing(complaint: String) -> RecordError {
    let refused = ["PTRACE", "ptrace"]
        .iter()
        .any(|word| complaint.contains(word));
    if refused {
        RecordError::PtraceNotPermitted(complaint)
    } else {
        RecordError::Nothing(complaint)
    }
}

/// True where a shell would find `program` and could execute it.
fn is_executable(program: &OsStr) -> bool {
    let executable = |path: &Path| {
        path.metadata()
            .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    let path = Path::new(program);
    if path.components().count() > 1 || program.as_encoded_bytes().contains(&b'/') {
        return executable(path);
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&folders).any(|folder| executable(&folder.join(path)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::trace::{Call, parse};

    fn words(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    fn is_strace_here() -> bool {
        is_executable(OsStr::new("strace"))
    }

    #[test]
    fn a_command_is_recorded_with_its_status() {
        assert!(
            is_strace_here(),
            "this test needs the Debian package `strace`"
        );
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("sh.trace");
        let command = words(&["sh", "-c", "(true); exit 3"]);
        let summary = record(&command, &out, Existing::Keep, Stdio::inherit()).unwrap();
        assert_eq!(summary.status, 3);
        assert_eq!(summary.not_understood, 0);
        assert!(summary.tasks >= 2, "{summary:?}");
        let text = std::fs::read_to_string(&out).unwrap();
        assert_eq!(summary.bytes, text.len() as u64);
        let trace = parse(&text).unwrap();
        assert_eq!(trace.status, Some(3));
        assert_eq!(trace.command, ["sh", "-c", "(true); exit 3"]);
        assert!(matches!(trace.entries[0].call, Call::Execve { .. }));
        assert!(
            trace
                .entries
                .iter()
                .any(|entry| entry.call == Call::ExitGroup { status: 3 })
        );
        // Nothing but the trace is left in the folder.
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);

        let again = record(&command, &out, Existing::Keep, Stdio::inherit());
        assert!(matches!(again, Err(RecordError::Exists(path)) if path == out));
        assert_eq!(std::fs::read_to_string(&out).unwrap(), text);
        record(&words(&["true"]), &out, Existing::Replace, Stdio::inherit()).unwrap();
        assert_eq!(
            parse(&std::fs::read_to_string(&out).unwrap())
                .unwrap()
                .command,
            ["true"]
        );
    }

    #[test]
    fn a_command_that_a_signal_ends_has_a_shells_status() {
        assert!(
            is_strace_here(),
            "this test needs the Debian package `strace`"
        );
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("killed.trace");
        let command = words(&["sh", "-c", "kill -TERM $$"]);
        let summary = record(&command, &out, Existing::Keep, Stdio::inherit()).unwrap();
        assert_eq!(summary.status, 128 + libc::SIGTERM);
        let trace = parse(&std::fs::read_to_string(&out).unwrap()).unwrap();
        let killed = Call::Killed {
            signal: libc::SIGTERM as u64,
        };
        assert_eq!(trace.entries.last().unwrap().call, killed);
    }

    #[test]
    fn what_is_missing_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("x.trace");
        let error = |strace: &str, command: &[&str]| {
            let result = record_with(
                OsStr::new(strace),
                &words(command),
                &out,
                Existing::Keep,
                Stdio::inherit(),
            );
            result.unwrap_err().to_string()
        };
        assert_eq!(error("strace", &[]), "there is no command to record");
        assert_eq!(
            error("strace", &["no-such-command"]),
            "the command `no-such-command` was not found, or is not executable"
        );
        assert_eq!(
            error("/nonexistent/strace", &["true"]),
            "strace was not found; install the Debian package `strace`"
        );
        // Stands for a strace that records nothing.
        assert!(error("true", &["true"]).starts_with("strace recorded no call"));
        let refused = folder.path().join("refused");
        let script =
            "#!/bin/sh\necho 'strace: ptrace(PTRACE_SEIZE): Operation not permitted' >&2\n";
        std::fs::write(&refused, script).unwrap();
        std::fs::set_permissions(&refused, std::fs::Permissions::from_mode(0o755)).unwrap();
        let refused = error(refused.to_str().unwrap(), &["true"]);
        assert!(
            refused.starts_with("this host does not permit ptrace"),
            "{refused}"
        );
        assert!(!out.exists());

        let nowhere = folder.path().join("no/such/folder.trace");
        let error = record(
            &words(&["true"]),
            &nowhere,
            Existing::Keep,
            Stdio::inherit(),
        )
        .unwrap_err();
        assert!(matches!(error, RecordError::File { .. }), "{error}");
    }
}
