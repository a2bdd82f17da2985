//! A choice on the path that is explored.

use std::borrow::Cow;

use crate::explore::Actor;
use crate::explore::footprint::Footprint;

/// A choice, and what else could be chosen.
#[derive(Clone, Debug)]
pub(super) struct Node {
    /// Who is chosen: an index of `candidates`.
    pub(super) chosen: usize,
    /// In the order in which they are tried.
    pub(super) candidates: Vec<Candidate>,
    /// The vCPU that ran last, and whether it could go on.
    pub(super) last: Option<(u8, bool)>,
    /// Preemptions left.
    pub(super) left: u32,
    /// Somebody who could run does not have their turn.
    pub(super) holds: bool,
    /// Fingerprint here.
    pub(super) at: u64,
    /// The step that was taken; none while it is not over, or where it ended the execution.
    pub(super) print: Option<Footprint>,
    /// The step was more than to wait for anyone: what can be done after it follows from the state alone.
    pub(super) gets_on: bool,
    /// Steps whose effect here is known.
    pub(super) known: Vec<(Actor, Footprint)>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) actor: Actor,
    /// Fingerprint after its step, where that is known.
    pub(super) next: Option<u64>,
}

impl Node {
    /// Who takes the step.
    pub(super) fn actor(&self) -> Actor {
        self.candidates[self.chosen].actor
    }

    /// Goes to the next candidate, if there is one; what the last one did is known from now on.
    pub(super) fn advance(&mut self) {
        let taken = self.actor();
        if let Some(print) = self.print.take()
            && self.gets_on
            && !self.known.iter().any(|(actor, _)| *actor == taken)
        {
            self.known.push((taken, print));
        }
        self.chosen += 1;
    }

    /// What the step of `actor` would touch here, where that is known.
    pub(super) fn print_of(&self, actor: Actor) -> Option<Cow<'_, Footprint>> {
        match actor {
            Actor::Wire(to) => Some(Cow::Owned(Footprint::of_wire(to.into()))),
            Actor::Disk(of) => Some(Cow::Owned(Footprint::of_disk(of.into()))),
            Actor::Vcpu(_) => {
                let known = self.known.iter().find(|(known, _)| *known == actor);
                known.map(|(_, print)| Cow::Borrowed(print))
            }
        }
    }

    /// Leaves nothing to choose but what is chosen.
    pub(super) fn settle(&mut self) {
        self.candidates.truncate(self.chosen + 1);
    }
}
