//! Who chooses the next step.

use abi::channel::Event;

use super::driver::Standing;
use super::{Actor, Schedule};

/// What a scheduler sees when it chooses.
#[derive(Debug)]
pub struct View<'a> {
    /// Scheduling points passed in this execution so far, by all vCPUs.
    pub points: u64,
    /// Who took the last step, and how many points it passed.
    pub last: Option<(Actor, u64)>,
    /// Who can take a step, in order; never empty. A vCPU that only waits for anyone
    /// ([`abi::point::Wait::Anyone`]) is in it only after somebody else has taken a step, or where it is
    /// the only one.
    pub enabled: &'a [Actor],
    /// Where each vCPU stands.
    pub standing: &'a [Standing],
    /// Events of the last step.
    pub events: &'a [Event],
    /// Turns for which nobody has done anything but wait for anyone. Too many are a livelock, and before
    /// that everybody has their turn, whoever is chosen.
    pub idle_turns: u64,
}

impl View<'_> {
    /// True where `actor` can take a step.
    #[must_use]
    pub fn can(&self, actor: Actor) -> bool {
        self.enabled.contains(&actor)
    }
    /// The actor of the last step, if it can go on.
    #[must_use]
    pub fn current(&self) -> Option<Actor> {
        self.last
            .map(|(actor, _)| actor)
            .filter(|actor| self.can(*actor))
    }
}

/// The next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Who; it must be enabled.
    pub actor: Actor,
    /// For how many points at most (at least 1); the scheduler is asked again earlier where the actor has to
    /// wait, has sent an IPI, or has done what somebody waited for.
    pub points: u64,
}

/// Chooses schedules.
pub trait Scheduler {
    /// A new execution begins. False: there is none left to try.
    fn begin(&mut self) -> bool;
    /// The next step; none ends the execution here (a replay that is over).
    fn choose(&mut self, view: &View<'_>) -> Option<Choice>;
    /// The execution is over; this is what was run.
    fn end(&mut self, _ran: &Schedule) {}
}
