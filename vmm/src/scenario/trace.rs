//! Recorded memory calls of a real program, as text that a person can read and edit.
//!
//! ```text
//! stalemate-trace 1
//! command "true"
//! status 0
//! file 0 4711
//! # file NUMBER BYTES: what mmap's fifth argument names; -1 is no file.
//! # TASK CALL(ARGUMENTS) = RESULT; tasks are numbered from 0 in the order in which they start.
//! 0 mmap(0x0, 8192, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7f0000000000
//! 0 clone(CLONE_VM|CLONE_THREAD) = 1
//! 1 munmap(0x7f0000000000, 8192) = -EINVAL
//! 1 exit(0) = ?
//! ```
//!
//! [`parse`] reads it, [`Trace`]'s `Display` writes it, [`compile`] makes the records that the guest's
//! `replay` program executes ([`abi::trace`]).

mod compile;
mod names;
mod parse;
mod places;
#[cfg(test)]
mod tests;

use std::fmt;

use abi::syscall::Errno;

pub use compile::{CallSummary, Compiled, Summary, compile};
pub use parse::{ParseError, parse};

use names::{ADVICE, CLONE, MAP, PROT, errno_name};
pub(crate) use names::{errno_by_name, signal_by_name};
pub(crate) use places::{Area, Places, pages};

/// First word of the format's first line.
const FORMAT: &str = "stalemate-trace";
/// Version of the format that is written, and the only one that is read.
const VERSION: u64 = 1;

/// A recording.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// The command that was recorded; empty where the trace does not say.
    pub command: Vec<String>,
    /// Its exit status, as a shell gives it.
    pub status: Option<i32>,
    /// Files that it mapped.
    pub files: Vec<File>,
    /// The calls, in an order in which they could have been made one by one.
    pub entries: Vec<Entry>,
}

/// A file of a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct File {
    /// What mmap's argument `fd` says.
    pub number: i64,
    /// Its size.
    pub bytes: u64,
}

/// One recorded call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Line of the text, from 1.
    pub line: u64,
    /// Task that made it.
    pub task: u32,
    /// The call.
    pub call: Call,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It returned this (clone and fork: the number of the task that it started).
    Returned(u64),
    /// It failed.
    Failed(Errno),
    /// It did not return.
    Never,
}

/// A call and its arguments. Numbers are Linux's.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The arguments' names are those of man 2.
pub enum Call {
    /// mmap(2).
    Mmap {
        addr: u64,
        len: u64,
        prot: u64,
        flags: u64,
        fd: i64,
        offset: u64,
    },
    /// munmap(2).
    Munmap { addr: u64, len: u64 },
    /// mprotect(2).
    Mprotect { addr: u64, len: u64, prot: u64 },
    /// mremap(2).
    Mremap {
        addr: u64,
        old_len: u64,
        new_len: u64,
        flags: u64,
        new_addr: u64,
    },
    /// brk(2); 0 asks for the heap's end.
    Brk { addr: u64 },
    /// madvise(2).
    Madvise { addr: u64, len: u64, advice: u64 },
    /// clone(2).
    Clone { flags: u64 },
    /// clone3(2).
    Clone3 { flags: u64 },
    /// fork(2).
    Fork,
    /// vfork(2).
    Vfork,
    /// execve(2).
    Execve { path: String },
    /// exit(2): the task ends.
    Exit { status: i64 },
    /// exit_group(2): its process ends.
    ExitGroup { status: i64 },
    /// No call: a signal ended the task's process.
    Killed { signal: u64 },
}

impl Call {
    /// The name in the text.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Mmap { .. } => "mmap",
            Self::Munmap { .. } => "munmap",
            Self::Mprotect { .. } => "mprotect",
            Self::Mremap { .. } => "mremap",
            Self::Brk { .. } => "brk",
            Self::Madvise { .. } => "madvise",
            Self::Clone { .. } => "clone",
            Self::Clone3 { .. } => "clone3",
            Self::Fork => "fork",
            Self::Vfork => "vfork",
            Self::Execve { .. } => "execve",
            Self::Exit { .. } => "exit",
            Self::ExitGroup { .. } => "exit_group",
            Self::Killed { .. } => "killed",
        }
    }

    /// True for the calls that start a task.
    #[must_use]
    pub fn starts_task(&self) -> bool {
        matches!(
            self,
            Self::Clone { .. } | Self::Clone3 { .. } | Self::Fork | Self::Vfork
        )
    }
}

impl Trace {
    /// Numbers the entries as the lines of the printed text.
    pub(crate) fn number_lines(&mut self) {
        let lines = u64::from(!self.command.is_empty()) + u64::from(self.status.is_some());
        let header = 1 + lines + self.files.len() as u64;
        for (entry, line) in self.entries.iter_mut().zip(header + 1..) {
            entry.line = line;
        }
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{FORMAT} {VERSION}")?;
        if !self.command.is_empty() {
            f.write_str("command")?;
            for word in &self.command {
                write!(f, " {}", Quoted(word))?;
            }
            writeln!(f)?;
        }
        if let Some(status) = self.status {
            writeln!(f, "status {status}")?;
        }
        for File { number, bytes } in &self.files {
            writeln!(f, "file {number} {bytes}")?;
        }
        for Entry {
            task,
            call,
            outcome,
            ..
        } in &self.entries
        {
            writeln!(f, "{task} {call} = {outcome}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}(", self.name())?;
        match self {
            Self::Mmap {
                addr,
                len,
                prot,
                flags,
                fd,
                offset,
            } => {
                let (prot, flags) = (PROT.show(*prot), MAP.show(*flags));
                write!(f, "{addr:#x}, {len}, {prot}, {flags}, {fd}, {offset:#x}")
            }
            Self::Munmap { addr, len } => write!(f, "{addr:#x}, {len}"),
            Self::Mprotect { addr, len, prot } => {
                write!(f, "{addr:#x}, {len}, {}", PROT.show(*prot))
            }
            Self::Mremap {
                addr,
                old_len,
                new_len,
                flags,
                new_addr,
            } => {
                write!(
                    f,
                    "{addr:#x}, {old_len}, {new_len}, {flags:#x}, {new_addr:#x}"
                )
            }
            Self::Brk { addr } => write!(f, "{addr:#x}"),
            Self::Madvise { addr, len, advice } => {
                write!(f, "{addr:#x}, {len}, {}", ADVICE.show(*advice))
            }
            Self::Clone { flags } | Self::Clone3 { flags } => write!(f, "{}", CLONE.show(*flags)),
            Self::Fork | Self::Vfork => Ok(()),
            Self::Execve { path } => write!(f, "{}", Quoted(path)),
            Self::Exit { status } | Self::ExitGroup { status } => write!(f, "{status}"),
            Self::Killed { signal } => write!(f, "{signal}"),
        }?;
        f.write_str(")")
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // Task numbers and 0 read better in decimal, addresses in hexadecimal.
            Self::Returned(value) if *value < 0x1000 => write!(f, "{value}"),
            Self::Returned(value) => write!(f, "{value:#x}"),
            Self::Failed(errno) => match errno_name(*errno) {
                Some(name) => write!(f, "-{name}"),
                None => write!(f, "-{}", errno.0),
            },
            Self::Never => f.write_str("?"),
        }
    }
}

/// A string literal of the format.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"")?;
        for c in self.0.chars() {
            match c {
                '"' | '\\' => write!(f, "\\{c}"),
                '\n' => f.write_str("\\n"),
                '\t' => f.write_str("\\t"),
                c if c.is_control() => write!(f, "\\u{{{:x}}}", c as u32),
                c => write!(f, "{c}"),
            }?;
        }
        f.write_str("\"")
    }
}
