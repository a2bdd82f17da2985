//! What the workers of one search share: the prefixes that were explored, and parts of the tree to explore.

use std::sync::{Condvar, Mutex, MutexGuard};

use super::node::Node;
use super::visited::Visited;
use super::{Bounds, Explored};

/// See the module.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) visited: Visited,
    most: Option<u32>,
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
        let explored = Explored {
            preemptions: bounds.preemptions.map(|_| 0),
            ..Explored::default()
        };
        Self {
            visited: Visited::new(bounds.prefixes),
            most: bounds.preemptions,
            pool: Mutex::new(Pool {
                parts: vec![Vec::new()],
                busy: 0,
                waiting: 0,
                given_up: false,
                explored,
            }),
            changed: Condvar::new(),
        }
    }

    /// What all workers have told.
    pub(super) fn explored(&self) -> Explored {
        self.pool().explored
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
                return Some((part, pool.explored.preemptions));
            }
            pool.waiting += 1;
            pool = self.changed.wait(pool).expect("no job panics");
            pool.waiting -= 1;
        }
    }

    /// Takes over what a worker has counted. True: another one has nothing to do.
    pub(super) fn note(&self, counted: &mut Explored) -> bool {
        let mut pool = self.pool();
        pool.explored.add(std::mem::take(counted));
        pool.waiting > pool.parts.len()
    }

    /// Hands a part to whoever waits.
    pub(super) fn give(&self, part: Vec<Node>) {
        self.pool().parts.push(part);
        self.changed.notify_one();
    }

    /// A worker is through with its part, or leaves it.
    pub(super) fn put_back(&self, counted: &mut Explored, given_up: bool) {
        let mut pool = self.pool();
        pool.explored.add(std::mem::take(counted));
        pool.busy -= 1;
        pool.given_up |= given_up;
        if pool.busy == 0 && pool.parts.is_empty() && !pool.given_up {
            // Where no choice was out of bounds a larger bound allows nothing more.
            let last = pool.explored.preemptions == self.most;
            pool.explored.exhausted = last || pool.explored.out_of_bounds == 0;
        }
        self.changed.notify_all();
    }

    /// From the root again, with one preemption more.
    fn next_bound(&self, pool: &mut Pool) {
        pool.explored = Explored {
            preemptions: pool.explored.preemptions.map(|bound| bound + 1),
            ..Explored::default()
        };
        pool.parts.push(Vec::new());
        self.visited.clear();
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().expect("no job panics")
    }
}
