//! The programs: one file each, which says what it checks and how a kernel's bug shows.

pub mod bench;
mod cow_fork;
mod crash;
mod direct;
mod exit;
mod file_io;
mod groups;
mod huge;
mod litmus;
mod mprotect_race;
pub mod oracle;
mod pressure;
mod replay;
mod smoke;
mod stress;
mod unmap_race;
mod vma;
mod writeback;

use crate::args::{Arg, Args, UsageError};
use crate::sys::Sys;

/// Where programs map the memory that they race on: far below the addresses that mmap chooses by
/// itself, so that nothing else ever lands in a hole there.
pub(crate) const SUBJECT_GVA: u64 = 0x2000_0000_0000;

/// One program.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// Its name.
    pub name: &'static str,
    /// What it does, in one sentence.
    pub help: &'static str,
    /// Its arguments.
    pub args: &'static [Arg],
    /// Whether it reads a data blob.
    pub data: Data,
    /// Whether its test begins ([`Sys::begin`]) only after a set-up, not with itself.
    pub has_setup: bool,
}

/// What a program wants of the data blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    /// Nothing.
    Ignored,
    /// A compiled trace ([`abi::trace`]).
    Trace,
    /// Cases that Linux has executed ([`abi::oracle`]).
    Oracle,
}

/// Every program.
pub const PROGRAMS: &[Program] = &[
    smoke::PROGRAM,
    unmap_race::PROGRAM,
    cow_fork::PROGRAM,
    mprotect_race::PROGRAM,
    stress::PROGRAM,
    litmus::PROGRAM,
    huge::PROGRAM,
    vma::PROGRAM,
    groups::PROGRAM,
    direct::PROGRAM,
    pressure::PROGRAM,
    writeback::PROGRAM,
    file_io::PROGRAM,
    replay::PROGRAM,
    oracle::PROGRAM,
    crash::PROGRAM,
    exit::PROGRAM,
    bench::PROGRAM,
];

/// The program called `name`.
#[must_use]
pub fn find(name: &str) -> Option<&'static Program> {
    PROGRAMS.iter().find(|program| program.name == name)
}

/// Runs the program called `name` with the NUL-separated `key=value` words of `args`. Returns its exit
/// status: 0 where it found nothing wrong.
///
/// # Errors
/// There is no such program, or it cannot be started with these arguments and data.
pub fn run<'a, S: Sys>(
    sys: &S,
    name: &'a str,
    args: &'a str,
    data: Option<&[u8]>,
) -> Result<i32, UsageError<'a>> {
    let program = find(name).ok_or(UsageError::UnknownProgram(name))?;
    let args = Args::parse(program, args)?;
    // Those with a set-up say themselves where their tests begin.
    if !program.has_setup {
        sys.begin();
    }
    match program.name {
        "smoke" => Ok(smoke::run(sys)),
        "unmap-race" => Ok(unmap_race::run(sys, &args)),
        "cow-fork" => Ok(cow_fork::run(sys, &args)),
        "mprotect-race" => Ok(mprotect_race::run(sys, &args)),
        "stress" => Ok(stress::run(sys, &args)),
        "litmus" => Ok(litmus::run(sys, &args)),
        "huge" => Ok(huge::run(sys, &args)),
        "vma" => Ok(vma::run(sys, &args)),
        "groups" => Ok(groups::run(sys, &args)),
        "direct" => Ok(direct::run(sys, &args)),
        "pressure" => Ok(pressure::run(sys, &args)),
        "writeback" => Ok(writeback::run(sys, &args)),
        "file-io" => Ok(file_io::run(sys, &args)),
        "replay" => replay::run(sys, &args, data).map_err(|reason| UsageError::BadData {
            program: program.name,
            reason,
        }),
        "oracle" => oracle::run(sys, data).map_err(|reason| UsageError::BadData {
            program: program.name,
            reason,
        }),
        "crash" => Ok(crash::run(sys, &args)),
        "exit" => Ok(exit::STATUS),
        "bench" => Ok(bench::run(sys, &args)),
        _ => Err(UsageError::UnknownProgram(name)),
    }
}
