//! Round robin: everybody in turn, for the same number of points.

use crate::explore::{Actor, Choice, Scheduler, View};

/// One execution in which everybody runs for `quantum` points in turn.
#[derive(Clone, Debug)]
pub struct RoundRobin {
    quantum: u64,
    done: bool,
}

impl RoundRobin {
    /// With this quantum.
    #[must_use]
    pub fn new(quantum: u64) -> Self {
        Self {
            quantum: quantum.max(1),
            done: false,
        }
    }
}

impl Scheduler for RoundRobin {
    fn begin(&mut self) -> bool {
        !std::mem::replace(&mut self.done, true)
    }
    fn choose(&mut self, view: &View<'_>) -> Option<Choice> {
        let after = |actor: &&Actor| view.last.is_some_and(|(last, _)| **actor > last);
        let next = view.enabled.iter().find(after).or(view.enabled.first())?;
        Some(Choice {
            actor: *next,
            points: self.quantum,
        })
    }
}
