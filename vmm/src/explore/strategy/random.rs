//! Random walk: whoever can run is as likely as any other; a run lasts for a geometric number of points.

use crate::explore::rng::Rng;
use crate::explore::{Choice, Scheduler, View};

/// See the module.
#[derive(Clone, Debug)]
pub struct Random {
    seed: u64,
    index: u64,
    mean: u64,
    rng: Rng,
}

impl Random {
    /// Executions from number `index` on of `seed`; runs are `mean` points long on average (at least 1).
    #[must_use]
    pub fn new(seed: u64, index: u64, mean: u64) -> Self {
        Self {
            seed,
            index,
            mean: mean.max(1),
            rng: Rng::new(seed, index),
        }
    }
}

impl Scheduler for Random {
    fn begin(&mut self) -> bool {
        self.rng = Rng::new(self.seed, self.index);
        self.index += 1;
        true
    }
    fn choose(&mut self, view: &View<'_>) -> Option<Choice> {
        let actor = view.enabled[self.rng.below(view.enabled.len() as u64) as usize];
        let mut points = 1;
        while self.rng.below(self.mean) != 0 {
            points += 1;
        }
        Some(Choice { actor, points })
    }
}
