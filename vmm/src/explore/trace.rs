//! Mazurkiewicz traces: executions up to the order of independent neighbours.
//!
//! Each step has a vector clock: how many steps of every actor happen before it. Two executions with the
//! same clocks have the same steps in orders that differ only where it does not matter, and so end in the
//! same state (Musuvathi, Qadeer, *Partial-Order Reduction for Context-Bounded State Exploration*,
//! MSR-TR-2007-12). The fingerprint of a trace is the sum over its steps of a hash of actor and clock,
//! so it does not depend on the order in which they were taken.

use rustc_hash::FxHashMap;

use super::Actor;
use super::footprint::{Footprint, Mode, Resource};

/// The trace of an execution so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Trace {
    actors: usize,
    /// Clock of each actor's last step.
    own: Vec<u32>,
    /// Row of each resource in `touched`, and there one clock for each [`Mode`].
    rows: FxHashMap<Resource, usize>,
    touched: Vec<u32>,
    scratch: Vec<u32>,
    print: u64,
}

const MODES: [Mode; 3] = [Mode::Read, Mode::Part, Mode::Write];

impl Trace {
    /// The empty trace of a machine with `vcpus`.
    pub(super) fn begin(&mut self, vcpus: usize) {
        self.actors = 3 * vcpus;
        self.own.clear();
        self.own.resize(self.actors * self.actors, 0);
        self.rows.clear();
        self.touched.clear();
        self.print = 0;
    }

    /// Its fingerprint.
    pub(super) fn fingerprint(&self) -> u64 {
        self.print
    }

    /// The fingerprint that it would have after this step too.
    pub(super) fn peek(&mut self, actor: Actor, print: &Footprint) -> u64 {
        self.clock(actor, print);
        self.print
            .wrapping_add(hash(self.index(actor), &self.scratch))
    }

    /// A fingerprint of it and of who took a last step, of which nothing else is known.
    pub(super) fn end(&self, last: Option<Actor>) -> u64 {
        let last = last.map_or(self.actors, |actor| self.index(actor));
        self.print.wrapping_add(hash(last, &[]))
    }

    /// Adds a step.
    pub(super) fn step(&mut self, actor: Actor, print: &Footprint) {
        self.print = self.peek(actor, print);
        let (n, me) = (self.actors, self.index(actor));
        self.own[me * n..][..n].copy_from_slice(&self.scratch);
        for (resource, mode) in print.iter() {
            let next = self.touched.len();
            let row = *self.rows.entry(resource).or_insert(next);
            if row == next {
                self.touched.resize(next + MODES.len() * n, 0);
            }
            join(
                &mut self.touched[row + mode as usize * n..][..n],
                &self.scratch,
            );
        }
    }

    /// Puts the clock of a next step into `scratch`.
    fn clock(&mut self, actor: Actor, print: &Footprint) {
        let (n, me) = (self.actors, self.index(actor));
        self.scratch.clear();
        self.scratch.extend_from_slice(&self.own[me * n..][..n]);
        for (resource, mode) in print.iter() {
            let Some(&row) = self.rows.get(&resource) else {
                continue;
            };
            for other in MODES {
                if !mode.commutes(other) {
                    let clock = &self.touched[row + other as usize * n..][..n];
                    join(&mut self.scratch, clock);
                }
            }
        }
        self.scratch[me] += 1;
    }

    fn index(&self, actor: Actor) -> usize {
        match actor {
            Actor::Vcpu(vcpu) => usize::from(vcpu),
            Actor::Wire(vcpu) => self.actors / 3 + usize::from(vcpu),
            Actor::Disk(vcpu) => self.actors / 3 * 2 + usize::from(vcpu),
        }
    }
}

fn join(into: &mut [u32], from: &[u32]) {
    for (into, from) in into.iter_mut().zip(from) {
        *into = (*into).max(*from);
    }
}

/// SplitMix64's finaliser over actor and clock.
fn hash(actor: usize, clock: &[u32]) -> u64 {
    let mix = |state: u64, word: u64| {
        let mut z = (state ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let words = clock.iter().map(|time| u64::from(*time));
    words.fold(mix(0, actor as u64), mix)
}
