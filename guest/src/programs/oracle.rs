//! `oracle`: executes cases that Linux has executed, and compares every step with what Linux showed.
//!
//! The data blob is a list of cases with Linux's observations ([`abi::oracle`]). Each case runs in a forked
//! process of its own, so that all start from one address space. The interpreter is the same on both
//! sides: on the host's Linux it records ([`crate::native::oracle`]), here it compares.
//!
//! # What is wrong
//! The first step whose observation differs: the result, a value that was read, the map of VMAs, the pages in memory or their contents. All words of
//! this kernel's observation are told by reports of the kind `WrongResult`: `gva` is the case (upper half)
//! and the step, `expected` the index of the word (upper half) and their number. A process that did not
//! come to its end is told by the step [`NO_STEP`]. Nothing behind it is executed.

pub(crate) mod blob;
mod interpret;
mod limits;
mod prepare;
mod words;

#[cfg(test)]
mod tests;

use abi::channel::ReportKind::WrongResult;

use super::{Data, Program};
use crate::sys::{Sys, WaitStatus, print_line};
use blob::Blob;
#[cfg(any(test, feature = "native"))]
pub(crate) use interpret::State;
pub(crate) use interpret::{Sink, run as run_case};
pub(crate) use prepare::prepare;
pub(crate) use words::Pages;

/// A case to record, of the bytes of its steps.
#[cfg(any(test, feature = "native"))]
pub(crate) fn case_of(steps: &[u8]) -> blob::Case<'_> {
    blob::Case::of(steps)
}

pub(super) const PROGRAM: Program = Program {
    name: "oracle",
    help: "executes what `stalemate oracle` has let Linux execute, and compares",
    args: &[],
    data: Data::Oracle,
    has_setup: false,
};

/// In the place of a step: the process ended before its case did.
pub const NO_STEP: u64 = 0xffff_ffff;

pub(super) fn run<S: Sys>(sys: &S, data: Option<&[u8]>) -> Result<i32, &'static str> {
    let blob = Blob::parse(data.ok_or("is absent")?)?;
    let start = match prepare(sys) {
        Ok(start) => start,
        Err(errno) => {
            print_line(
                sys,
                format_args!("oracle: the address space cannot be prepared: {errno}"),
            );
            return Ok(1);
        }
    };
    for (number, case) in blob.cases().enumerate() {
        let child = sys.fork(|sys| {
            let compare = Compare { number, case };
            let verdict = run_case(sys, &compare, case, start);
            i32::from(verdict != interpret::Verdict::Alike)
        });
        let ended = child.and_then(|pid| sys.wait(pid));
        match ended.map(WaitStatus::exited) {
            Ok(Some(0)) => {}
            // It has told what differs.
            Ok(Some(1)) => return Ok(1),
            Ok(_) | Err(_) => {
                let place = (number as u64) << 32 | NO_STEP;
                sys.report(WrongResult, place, 1, 0);
                return Ok(1);
            }
        }
    }
    Ok(0)
}

/// Compares with what Linux showed.
struct Compare<'a> {
    number: usize,
    case: blob::Case<'a>,
}

impl<S: Sys> Sink<S> for Compare<'_> {
    fn pages(&self, step: usize, at: usize, _: (u64, u64), resident: u64) -> Pages {
        let mapped = self.case.map_at(step, at + 1);
        if self.case.compares_residency() {
            return Pages {
                resident,
                mapped,
                elsewhere: 0,
            };
        }
        Pages {
            resident: self.case.map_at(step, at),
            mapped,
            elsewhere: mapped & !resident,
        }
    }

    fn on_linux(&self, step: usize, at: usize) -> u64 {
        self.case.map_at(step, at)
    }

    fn observe(&self, sys: &S, step: usize, words: &[u64]) -> bool {
        if self.case.expects(step, words) {
            return true;
        }
        let place = (self.number as u64) << 32 | step as u64;
        for (index, word) in words.iter().enumerate() {
            let position = (index as u64) << 32 | words.len() as u64;
            sys.report(WrongResult, place, position, *word);
        }
        false
    }
}
