//! One run from start to verdict: resume, judge what stopped the machine, check, go on or end.
//!
//! Room between `control` (which runs machines and judges nothing) and `cli` (which prints). The
//! rules ([`observe()`], [`advance()`]) stand apart from the machine ([`Live`]) behind [`Subject`], so
//! that they can be tested without one.

mod advance;
mod crash;
mod interrupt;
mod live;
mod observe;
mod parallel;

use std::fmt;
use std::time::Duration;

use abi::point::Point;

use crate::check::Outcome;
pub use crate::control::{MachineError, ProbeReport};
use crate::inspect::InspectError;
use crate::report::Violation;
pub use advance::{Reached, Until, advance};
pub use interrupt::Interrupt;
pub use live::{Finished, Live, facts_of, host, run};
pub use observe::{MAX_REPORTS, MAX_VIOLATIONS, Observed, STATUS_BAD_INPUT, observe};

/// What a session drives: a machine and the checkers that read it.
pub trait Subject {
    /// Why the host, not the guest, cannot go on.
    type Error;
    /// Runs until something happens, at most for `limit`.
    ///
    /// # Errors
    /// The host failed.
    fn resume(&mut self, limit: Duration) -> Result<Halt, Self::Error>;
    /// Makes `point` stop the machine, or no longer.
    fn trap(&mut self, point: Point, on: bool);
    /// True once the first user instruction was reached.
    fn in_user(&self) -> bool;
    /// Checks what can be checked while all vCPUs are paused at `place`.
    ///
    /// # Errors
    /// The host failed.
    fn check(&mut self, place: Place) -> Result<Checked, Self::Error>;
    /// Where everything stands in a run that is not over after `timeout`.
    ///
    /// # Errors
    /// The host failed.
    fn did_not_finish(&mut self, timeout: Duration) -> Result<Crash, Self::Error>;
    /// What the guest has written to its serial port.
    fn console(&self) -> String;
}

/// Why all vCPUs are paused.
#[derive(Clone, Debug, PartialEq)]
pub enum Halt {
    /// The first process ended.
    Exited {
        /// Its exit status.
        status: u32,
    },
    /// A trapped scheduling point.
    Point {
        /// vCPU.
        vcpu: u32,
        /// The point.
        point: Point,
    },
    /// A program reported a wrong value.
    Report {
        /// vCPU on which it was found.
        vcpu: u32,
        /// What was found.
        report: ProbeReport,
    },
    /// The limit is over.
    Deadline,
    /// Ctrl-C.
    Interrupted,
    /// The guest crashed or hangs.
    Crashed(Crash),
    /// Nothing that concerns a session.
    Nothing,
}

/// Why a guest did not get to its end (a crash, a hang, too little time or memory), in both forms.
#[derive(Clone, Debug, PartialEq)]
pub struct Crash {
    /// For programs; `reason` is one line.
    pub json: serde_json::Value,
    /// For a person.
    pub text: String,
}

/// Where a check happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// All vCPUs are paused, one of them at this point.
    Point(u32, Point),
    /// All vCPUs are paused wherever they were.
    Anywhere,
    /// The first process has ended.
    End,
    /// Behind the event with this ticket, of the merged streams.
    Event(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Point(vcpu, point) => write!(f, "{} on vCPU {vcpu}", point.name()),
            Self::Anywhere => f.write_str("a pause"),
            Self::End => f.write_str("the end of the run"),
            Self::Event(ticket) => write!(f, "event {ticket} of the merged streams"),
        }
    }
}

/// What one check found.
#[derive(Clone, Debug, Default)]
pub struct Checked {
    /// IDs that were looked at, and how many objects each examined.
    pub checked: Vec<(&'static str, u64)>,
    /// IDs, what was left out and why: objects, or 1 for the whole look.
    pub skipped: Vec<(&'static str, String, u64)>,
    /// What does not hold.
    pub violations: Vec<Violation>,
}

impl Checked {
    /// What the checkers said at `place`.
    fn new(outcome: Outcome, place: Place) -> Self {
        Self {
            checked: outcome
                .checked
                .iter()
                .map(|one| (one.id, one.examined))
                .collect(),
            skipped: outcome
                .skipped
                .into_iter()
                .map(|one| (one.id, one.reason, one.objects.unwrap_or(1)))
                .collect(),
            violations: outcome
                .violations
                .into_iter()
                .map(|violation| Violation::of_invariant(violation, place))
                .collect(),
        }
    }

    /// The kernel's objects cannot be read at all.
    fn unreadable(error: &InspectError, place: Place) -> Self {
        Self {
            violations: vec![Violation {
                id: "kernel-root".into(),
                title: error.to_string(),
                expected: Some("a kernel root that the host can read".into()),
                found: None,
                at: place.to_string(),
                details: Vec::new(),
            }],
            ..Self::default()
        }
    }
}
