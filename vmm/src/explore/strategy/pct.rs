//! Probabilistic concurrency testing (Burckhardt et al., ASPLOS 2010).
//!
//! Everybody who can take steps (vCPUs and the wires to them) gets a random priority; always the one with
//! the highest priority that can run does, but at `depth - 1` random points the one that runs then falls
//! below all others. A bug that needs `d` ordering constraints is found by one execution with probability
//! at least `1 / (n k^(d-1))`, for `n` actors and `k` points. `k` is taken from the executions before.
//!
//! Whoever waits for anyone falls below the others too: a spin loop of a program would else run for ever.

use abi::point::Wait;

use crate::explore::rng::Rng;
use crate::explore::{Actor, Choice, Schedule, Scheduler, View};

/// Points of an execution where none is known yet.
const FIRST_GUESS: u64 = 200;

/// See the module.
#[derive(Clone, Debug)]
pub struct Pct {
    seed: u64,
    index: u64,
    depth: u64,
    /// Longest execution so far: `k`. Fixed where executions must not depend on each other.
    length: u64,
    fixed: bool,
    rng: Rng,
    priorities: Vec<(Actor, i64)>,
    /// Points at which priorities change, latest first.
    changes: Vec<u64>,
    lowest: i64,
}

impl Pct {
    /// Executions from number `index` on of `seed`. `length`: points of an execution, learned where none.
    #[must_use]
    pub fn new(seed: u64, index: u64, depth: u64, length: Option<u64>) -> Self {
        Self {
            seed,
            index,
            depth: depth.max(1),
            length: length.unwrap_or(FIRST_GUESS).max(1),
            fixed: length.is_some(),
            rng: Rng::new(seed, index),
            priorities: Vec::new(),
            changes: Vec::new(),
            lowest: 0,
        }
    }

    /// The priority of `actor`, drawn where it has none yet.
    fn priority(&mut self, actor: Actor) -> i64 {
        if let Some((_, priority)) = self.priorities.iter().find(|(other, _)| *other == actor) {
            return *priority;
        }
        let priority = (self.rng.next() >> 2) as i64;
        self.priorities.push((actor, priority));
        priority
    }

    fn lower(&mut self, actor: Actor) {
        self.lowest -= 1;
        let lowest = self.lowest;
        if let Some((_, priority)) = self
            .priorities
            .iter_mut()
            .find(|(other, _)| *other == actor)
        {
            *priority = lowest;
        }
    }
}

impl Scheduler for Pct {
    fn begin(&mut self) -> bool {
        self.rng = Rng::new(self.seed, self.index);
        self.index += 1;
        self.priorities.clear();
        self.lowest = 0;
        self.changes.clear();
        for _ in 1..self.depth {
            let at = 1 + self.rng.below(self.length);
            self.changes.push(at);
        }
        self.changes.sort_unstable_by(|a, b| b.cmp(a));
        true
    }

    fn choose(&mut self, view: &View<'_>) -> Option<Choice> {
        for vcpu in 0..view.standing.len() {
            // Everybody draws at the start, in the same order whoever can run.
            self.priority(Actor::Vcpu(vcpu as u8));
            self.priority(Actor::Wire(vcpu as u8));
        }
        if let Some((last, _)) = view.last {
            while self.changes.last().is_some_and(|at| *at <= view.points) {
                self.changes.pop();
                self.lower(last);
            }
            if let Actor::Vcpu(vcpu) = last
                && view.standing[usize::from(vcpu)].wait() == Some(Wait::Anyone)
            {
                self.lower(last);
            }
        }
        let mut best = (view.enabled[0], i64::MIN);
        for &actor in view.enabled {
            let priority = self.priority(actor);
            if priority > best.1 {
                best = (actor, priority);
            }
        }
        let next = self.changes.last().copied().unwrap_or(u64::MAX);
        Some(Choice {
            actor: best.0,
            points: next.saturating_sub(view.points).max(1),
        })
    }

    fn end(&mut self, ran: &Schedule) {
        if !self.fixed {
            self.length = self.length.max(ran.points()).min(1 << 32);
        }
    }
}
