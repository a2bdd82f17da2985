//! What a campaign is to do.

use std::time::Duration;

use abi::failpoint::Failpoint;

use super::strategy::{Bounds, Exhaustive, Reduction};
use crate::scenario::{CheckWhen, Fail, Scenario};

/// How schedules are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// Random walk with runs of this many points on average.
    Random {
        /// Mean length of a run.
        mean: u64,
    },
    /// Probabilistic concurrency testing.
    Pct {
        /// Ordering constraints that a bug may need.
        depth: u64,
    },
    /// Everybody in turn; execution `i` with a quantum of `i + 1` points.
    RoundRobin,
    /// Every execution with at most so many preemptions, up to the order of independent steps.
    Exhaustive {
        /// Preemptions; none: any number.
        preemptions: Option<u32>,
    },
}

/// What a campaign does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How schedules are chosen.
    pub strategy: Strategy,
    /// Executions.
    pub executions: u64,
    /// Of which stream of random numbers.
    pub seed: u64,
    /// Wall time.
    pub time_limit: Option<Duration>,
    /// Every how many executions the state at the end is checked by all invariants too (0: never).
    pub state_every: u64,
    /// All invariants look at every point too.
    pub everywhere: bool,
    /// Every how many executions one is replayed and compared (0: never).
    pub verify_every: u64,
    /// Engines at once.
    pub jobs: usize,
    /// Ends at the first violation.
    pub first: bool,
    /// Schedules of executions that are well to keep, spread over the campaign.
    pub sample: usize,
    /// Passages of failpoints that fail in every execution.
    pub fails: Vec<Fail>,
    /// Failpoints of which one more passage, drawn from the seed, fails in each execution.
    pub fail_any: Vec<Failpoint>,
}

impl Plan {
    /// Of a worker that only runs what it is given.
    #[must_use]
    pub const fn replay() -> Self {
        Self {
            strategy: Strategy::RoundRobin,
            executions: 0,
            seed: 0,
            time_limit: None,
            state_every: 1,
            everywhere: false,
            verify_every: 0,
            jobs: 1,
            first: true,
            sample: 0,
            fails: Vec::new(),
            fail_any: Vec::new(),
        }
    }

    /// As [`Plan::replay`], with executions judged as `scenario` says.
    #[must_use]
    pub fn replay_of(scenario: &Scenario) -> Self {
        Self {
            everywhere: scenario.check == CheckWhen::EveryPoint,
            ..Self::replay()
        }
    }

    /// The search that all workers share, where it is one.
    pub(super) fn search(&self) -> Option<Exhaustive> {
        let Strategy::Exhaustive { preemptions } = self.strategy else {
            return None;
        };
        let bounds = Bounds {
            preemptions,
            ..Bounds::default()
        };
        Some(Exhaustive::new(bounds, Reduction::Traces))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn what_is_replayed_is_looked_at_as_its_scenario_says() {
        let looks = |check: &str| {
            let text = format!("[program]\nname = \"smoke\"\n{check}");
            let scenario = crate::scenario::parse(Path::new("a.toml"), &text).unwrap();
            Plan::replay_of(&scenario).everywhere
        };
        assert!(looks("[check]\nwhen = \"every-point\""));
        assert!(!looks(""));
    }
}
