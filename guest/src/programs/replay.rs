//! `replay`: executes a recorded list of memory calls, and touches what it maps.
//!
//! The data blob is a compiled trace ([`abi::trace`]). Each of `copies` forked processes executes all
//! of it, with a thread or a process for each task of the recording. The tasks of one process make
//! their calls in the recorded order; who waits for its turn reads mapped pages meanwhile, so that its
//! CPU holds translations which the others' calls must flush.
//!
//! Of every mapping `touch` pages, evenly spread, are watched. A watched page is written, where its
//! protection permits, with a value made from (copy, slot, page, call that wrote it), and keeps it
//! until it is unmapped, replaced or dropped by `MADV_DONTNEED`; until it is written it holds 0.
//!
//! # What is wrong
//! - A call that fails, or lands elsewhere, where the recording succeeded: `WrongResult`, and a line
//!   that names the trace's line.
//! - A watched page that holds anything else: `ForeignFrame`.
//! - A watched page that is not accessible as its protection says: `WrongPermission`.
//!
//! # Why it is never a false alarm
//! All calls and writes of one process are made by whoever has the turn. A waiting task checks a
//! value only if the count of calls ([`Process::changes`]) was the same even number before and after
//! the read: then no call or write was under way, and the table of watched pages is exact.

mod process;
mod trace;

use super::{Data, Program};
use crate::args::{Arg, Args};
use crate::sys::{Sys, print_line};
use crate::team::{Findings, must};
use process::Process;
use trace::Trace;

pub(super) const PROGRAM: Program = Program {
    name: "replay",
    help: "executes a recorded list of memory calls and touches what it maps",
    args: &[
        Arg {
            name: "copies",
            default: "1",
            range: 1..=64,
            help: "processes that each execute it",
        },
        Arg {
            name: "touch",
            default: "4",
            range: 0..=64,
            help: "pages of each mapping to watch",
        },
    ],
    data: Data::Trace,
    has_setup: false,
};

pub(super) fn run<S: Sys>(
    sys: &S,
    args: &Args<'_>,
    data: Option<&[u8]>,
) -> Result<i32, &'static str> {
    let trace = Trace::parse(data.ok_or("is absent")?)?;
    let copies = args.number("copies");
    let findings = Findings::default();
    let Ok(pids) = sys.words(copies as usize) else {
        must(sys, &findings, 0, 0, Err(abi::syscall::Errno::ENOMEM));
        return Ok(findings.status());
    };
    for (copy, pid) in pids.iter().enumerate() {
        let started = sys.fork(|sys| Process::run(sys, &trace, copy, args.number("touch")));
        match started {
            Ok(child) => pid.store(child, core::sync::atomic::Ordering::Relaxed),
            Err(errno) => {
                must(sys, &findings, 0, 0, Err(errno));
                break;
            }
        }
    }
    for pid in pids {
        match pid.load(core::sync::atomic::Ordering::Relaxed) {
            0 => {}
            pid => findings.reap(sys, pid),
        }
    }
    if findings.status() == 0 {
        print_line(sys, format_args!("replay: {trace}, {copies} copies"));
    }
    Ok(findings.status())
}

#[cfg(test)]
mod tests;
