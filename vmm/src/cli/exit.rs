//! The exit codes, and the one place where causes become codes.

use crate::report::Verdict;

/// Exit code of the process (`docs/cli.md`). Scripts rely on the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// All invariants held; the command did what was asked.
    Held = 0,
    /// A violation was found.
    Violation = 1,
    /// The input or the usage is wrong.
    BadInput = 2,
    /// This host cannot do what was asked.
    HostCannot = 3,
    /// The guest crashed, hung or did not finish in time.
    GuestFailed = 4,
    /// A defect of this program.
    Internal = 5,
    /// Ctrl-C, as shells number it (128 + SIGINT).
    Interrupted = 130,
}

impl Exit {
    /// The number.
    #[must_use]
    pub fn code(self) -> u8 {
        self as u8
    }
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}

impl From<Verdict> for Exit {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Held => Self::Held,
            Verdict::Violation => Self::Violation,
            Verdict::BadInput => Self::BadInput,
            Verdict::Crashed => Self::GuestFailed,
            Verdict::Interrupted => Self::Interrupted,
        }
    }
}
