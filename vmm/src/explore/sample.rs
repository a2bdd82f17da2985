//! Some schedules of a campaign, spread evenly over however many it turns out to have.

use super::{Execution, Schedule};
use crate::scenario::Fail;

/// An execution that was well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Number of the execution.
    pub index: u64,
    /// What was run.
    pub schedule: Schedule,
    /// Passages of failpoints that were to fail.
    pub fails: Vec<Fail>,
}

/// Keeps every `stride`-th execution and doubles the stride when they become too many, so memory is bounded
/// and what is kept does not depend on how the executions were shared among jobs.
#[derive(Clone, Debug)]
pub struct Sample {
    wanted: usize,
    stride: u64,
    kept: Vec<Kept>,
}

impl Default for Sample {
    fn default() -> Self {
        Self::new(0)
    }
}

impl Sample {
    /// `wanted` of them.
    #[must_use]
    pub fn new(wanted: usize) -> Self {
        Self {
            wanted,
            stride: 1,
            kept: Vec::new(),
        }
    }

    /// Takes execution `index` where it is one to be kept.
    pub(super) fn offer(&mut self, index: u64, run: &Execution) {
        if self.wanted > 0 && index.is_multiple_of(self.stride) {
            self.kept.push(Kept {
                index,
                schedule: run.schedule.clone(),
                fails: run.fails.clone(),
            });
            self.thin();
        }
    }

    /// Takes those of another job.
    pub(super) fn join(&mut self, other: Self) {
        self.wanted = self.wanted.max(other.wanted);
        self.stride = self.stride.max(other.stride);
        let stride = self.stride;
        self.kept.extend(other.kept);
        self.kept.retain(|kept| kept.index.is_multiple_of(stride));
        self.thin();
    }

    fn thin(&mut self) {
        while self.kept.len() > 2 * self.wanted {
            self.stride *= 2;
            let stride = self.stride;
            self.kept.retain(|kept| kept.index.is_multiple_of(stride));
        }
    }

    /// As many as were wanted, or all where there are not so many, by number.
    #[must_use]
    pub fn take(mut self) -> Vec<Kept> {
        self.kept.sort_by_key(|kept| kept.index);
        let (have, want) = (self.kept.len(), self.wanted);
        if have <= want {
            return self.kept;
        }
        let mut place = 0;
        self.kept.retain(|_| {
            // Kept where the next of `want` even steps begins.
            let chosen = place * want / have != (place + 1) * want / have;
            place += 1;
            chosen
        });
        self.kept
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::explore::Ending;

    fn run() -> Execution {
        Execution {
            schedule: Schedule::default(),
            fails: Vec::new(),
            ending: Ending::ScheduleOver,
            events: Vec::new(),
        }
    }

    proptest! {
        #[test]
        fn it_is_even_bounded_and_the_same_for_any_jobs(
            executions in 0u64..5_000,
            wanted in 1usize..40,
            jobs in 1usize..5,
        ) {
            let run = run();
            let mut one = Sample::new(wanted);
            let mut parts = vec![Sample::new(wanted); jobs];
            for index in 0..executions {
                one.offer(index, &run);
                parts[index as usize % jobs].offer(index, &run);
                prop_assert!(one.kept.len() <= 2 * wanted);
            }
            let mut joined = Sample::default();
            for part in parts {
                joined.join(part);
            }
            let (one, joined) = (one.take(), joined.take());
            prop_assert_eq!(&one, &joined);
            prop_assert_eq!(one.len(), wanted.min(executions as usize));
            // Spread: no gap is more than a few times the even one.
            let gaps = one.windows(2).map(|pair| pair[1].index - pair[0].index);
            let even = executions / wanted as u64 + 1;
            prop_assert!(gaps.max().unwrap_or(0) <= 4 * even);
        }

        #[test]
        fn nothing_is_kept_where_nothing_is_wanted(executions in 0u64..100) {
            let mut sample = Sample::new(0);
            for index in 0..executions {
                sample.offer(index, &run());
            }
            prop_assert_eq!(sample.take(), Vec::new());
        }
    }
}
