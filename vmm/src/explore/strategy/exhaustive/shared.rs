//! What the workers of one search share: the prefixes that were explored, and parts of the tree to explore.

use std::sync::{Condvar, Mutex, MutexGuard};

use rustc_hash::FxHashSet;

use super::node::Node;
use super::visited::Visited;
use super::{Bounds, Explored, Within};

/// See the module.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) visited: Visited,
    /// Ends of executions, with whatever bound, and those of them that failed.
    ends: Mutex<FxHashSet<u64>>,
    failures: Mutex<FxHashSet<u64>>,
    bounds: Bounds,
    pool: Mutex<Pool>,
    changed: Condvar,
}

#[derive(Debug)]
struct Pool {
    /// Parts that nobody explores yet. A part is a path with what is left to try on it.
    parts: Vec<Vec<Node>>,
    /// Workers that explore one, and workers that wait for one.
    busy: usize,
    waiting: usize,
    /// A worker left with its part unexplored.
    given_up: bool,
    explored: Explored,
}

impl Shared {
    pub(super) fn new(bounds: &Bounds) -> Self {
        Self {
            visited: Visited::new(bounds.prefixes),
            ends: Mutex::default(),
            failures: Mutex::default(),
            bounds: *bounds,
            pool: Mutex::new(Pool {
                parts: vec![Vec::new()],
                busy: 0,
                waiting: 0,
                given_up: false,
                explored: Explored::new(bounds.preemptions.map(|_| 0)),
            }),
            changed: Condvar::new(),
        }
    }

    /// What all workers have told.
    pub(super) fn explored(&self) -> Explored {
        self.pool().explored.clone()
    }

    /// The bound that is reached, with what was counted so far.
    pub(super) fn reached(&self) -> Within {
        *self.pool().explored.reached()
    }

    /// Notes the end of an execution. False: an equivalent one ended before.
    pub(super) fn ended(&self, end: u64) -> bool {
        let mut ends = self.ends.lock().expect("no job panics");
        // Without room for more all are new.
        ends.len() >= self.bounds.prefixes || ends.insert(end)
    }

    /// Notes that it failed. False: an equivalent one did before.
    pub(super) fn failed(&self, end: u64) -> bool {
        self.failures.lock().expect("no job panics").insert(end)
    }

    /// A part to explore, with preemptions that it may have. None: nothing is left, or nobody is there who
    /// would explore it.
    pub(super) fn take(&self) -> Option<(Vec<Node>, Option<u32>)> {
        let mut pool = self.pool();
        loop {
            if pool.explored.exhausted || pool.given_up {
                return None;
            }
            if pool.parts.is_empty() && pool.busy == 0 {
                self.next_bound(&mut pool);
            }
            if let Some(part) = pool.parts.pop() {
                pool.busy += 1;
                return Some((part, pool.explored.reached().preemptions));
            }
            pool.waiting += 1;
            pool = self.changed.wait(pool).expect("no job panics");
            pool.waiting -= 1;
        }
    }

    /// Takes over what a worker has counted. True: another one has nothing to do.
    pub(super) fn note(&self, counted: &mut Within) -> bool {
        let mut pool = self.pool();
        pool.explored.reached_mut().add(std::mem::take(counted));
        pool.waiting > pool.parts.len()
    }

    /// Hands a part to whoever waits.
    pub(super) fn give(&self, part: Vec<Node>) {
        self.pool().parts.push(part);
        self.changed.notify_one();
    }

    /// A worker is through with its part, or leaves it.
    pub(super) fn put_back(&self, counted: &mut Within, given_up: bool) {
        let mut pool = self.pool();
        pool.explored.reached_mut().add(std::mem::take(counted));
        pool.busy -= 1;
        pool.given_up |= given_up;
        if pool.busy == 0 && pool.parts.is_empty() && !pool.given_up {
            let reached = pool.explored.reached();
            // Where no choice was out of bounds a larger bound allows nothing more.
            let is_last = reached.preemptions == self.bounds.preemptions;
            pool.explored.exhausted = is_last || reached.out_of_bounds == 0;
        }
        self.changed.notify_all();
    }

    /// From the root again, with one preemption more.
    fn next_bound(&self, pool: &mut Pool) {
        let before = *pool.explored.reached();
        pool.explored.bounds.push(Within {
            preemptions: before.preemptions.map(|bound| bound + 1),
            schedules: before.schedules,
            ..Within::default()
        });
        pool.parts.push(Vec::new());
        self.visited.clear();
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().expect("no job panics")
    }
}
