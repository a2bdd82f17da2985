//! Disturbing vCPUs that run at once: who is held at a point, and what becomes of an IPI.
//!
//! The rules are [`crate::scenario::disturb`]'s. A vCPU that is to be held exits at its point, because the
//! point is trapped in its control page, and its thread waits before it enters the guest again, while the
//! others run on: like a vCPU that the host's scheduler has taken the CPU from, it takes no interrupt
//! meanwhile. What is drawn depends on the seed, the rule, the vCPU and how often it has been there, and on nothing else.

mod wire;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use abi::point::Point;
use devices::lapic::LocalApics;
use serde::Serialize;

use crate::explore::Rng;
use crate::kvm::vcpu::Kick;
use crate::scenario::disturb::{Disturb, Fault, Hold, Span, When, vector_name};
use wire::Wire;

/// What one rule has done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Disturbance {
    /// The rule as it is written.
    pub rule: String,
    /// How often it was looked at: the vCPU was at the point, or an IPI matched.
    pub passages: u64,
    /// How often it did something.
    pub hits: u64,
    /// How long vCPUs, or IPIs, were held, in nanoseconds; 0 where the rule holds nothing.
    pub held_ns: u64,
    /// The longest single time.
    pub longest_ns: u64,
    /// How often what a vCPU waited for did not come in time.
    pub timeouts: u64,
}

/// A vCPU that is held.
#[derive(Clone, Copy, Debug)]
struct Held {
    rule: usize,
    since: Instant,
    until: Instant,
    /// Ends it before: the point, and the vCPU that is to be there.
    awaits: Option<(Point, Option<usize>)>,
}

#[derive(Debug, Default)]
struct Tally {
    passages: Vec<u64>,
    hits: u64,
    held: Duration,
    longest: Duration,
    timeouts: u64,
}

impl Tally {
    fn new(vcpus: usize) -> Mutex<Self> {
        Mutex::new(Self {
            passages: vec![0; vcpus],
            ..Self::default()
        })
    }

    fn held(&mut self, time: Duration) {
        self.held += time;
        self.longest = self.longest.max(time);
    }
}

/// See the module.
pub(super) struct Disturber {
    rules: Disturb,
    delays: Vec<Mutex<Tally>>,
    ipis: Vec<Mutex<Tally>>,
    held: Vec<Mutex<Option<Held>>>,
    kicks: Vec<Arc<Kick>>,
    /// Points at which the controller wants to be told.
    pub(super) told: [AtomicU64; 4],
    /// Dropped IPIs: sender, target, vector, and how many.
    dropped: Mutex<BTreeMap<(usize, usize, u8), u64>>,
    wire: Option<Wire>,
}

impl Disturber {
    /// Nothing where nothing is to be disturbed.
    pub(super) fn new(
        rules: &Disturb,
        kicks: &[Arc<Kick>],
        apics: Option<&Arc<LocalApics>>,
    ) -> std::io::Result<Option<Self>> {
        if rules.is_empty() {
            return Ok(None);
        }
        let vcpus = kicks.len();
        let wire = match apics {
            Some(apics) if !rules.ipis.is_empty() => Some(Wire::start(apics, kicks)?),
            _ => None,
        };
        Ok(Some(Self {
            rules: rules.clone(),
            delays: rules.delays.iter().map(|_| Tally::new(vcpus)).collect(),
            ipis: rules.ipis.iter().map(|_| Tally::new(vcpus)).collect(),
            held: (0..vcpus).map(|_| Mutex::new(None)).collect(),
            kicks: kicks.to_vec(),
            told: Default::default(),
            dropped: Mutex::default(),
            wire,
        }))
    }

    /// Points at which `vcpu` must exit.
    pub(super) fn traps(&self, vcpu: usize) -> [u64; 4] {
        let mut mask = [0; 4];
        let mut trap = |point: Point, at: Option<usize>| {
            if at.is_none_or(|at| at == vcpu) {
                mask[point as usize / 64] |= 1 << (point as usize % 64);
            }
        };
        for delay in &self.rules.delays {
            trap(delay.point, delay.vcpu);
            if let Hold::Until { point, vcpu, .. } = delay.hold {
                trap(point, vcpu);
            }
        }
        mask
    }

    /// True where the exit of `vcpu` at `point` is none of the controller's business.
    pub(super) fn is_own(&self, vcpu: usize, point: Point) -> bool {
        let has = |mask: u64| mask & 1 << (point as usize % 64) != 0;
        let word = point as usize / 64;
        has(self.traps(vcpu)[word]) && !has(self.told[word].load(Relaxed))
    }

    /// `vcpu` is at `point`: whoever waited for this goes on, and it is held if a rule says so.
    pub(super) fn passed(&self, vcpu: usize, point: Point) {
        for (other, held) in self.held.iter().enumerate().filter(|(o, _)| *o != vcpu) {
            let mut held = lock(held);
            let Some(held) = held.as_mut() else {
                continue;
            };
            let awaited = |(at, who): (Point, Option<usize>)| {
                at == point && who.is_none_or(|who| who == vcpu)
            };
            if held.awaits.is_some_and(awaited) {
                held.awaits = None;
                held.until = Instant::now();
                self.kicks[other].kick();
            }
        }
        for (rule, delay) in self.rules.delays.iter().enumerate() {
            let here = delay.point == point && delay.vcpu.is_none_or(|at| at == vcpu);
            if !here {
                continue;
            }
            let mut tally = lock(&self.delays[rule]);
            let Some(mut rng) = self.draws(&mut tally, rule, vcpu, delay.when) else {
                continue;
            };
            drop(tally);
            let (time, awaits) = match delay.hold {
                Hold::Time(span) => (drawn(span, &mut rng), None),
                Hold::Until {
                    point,
                    vcpu,
                    timeout,
                } => (timeout, Some((point, vcpu))),
            };
            let since = Instant::now();
            *lock(&self.held[vcpu]) = Some(Held {
                rule,
                since,
                until: since + time,
                awaits,
            });
            return;
        }
    }

    /// How much longer `vcpu` must not run.
    pub(super) fn held_back(&self, vcpu: usize) -> Option<Duration> {
        let mut held = lock(self.held.get(vcpu)?);
        let now = Instant::now();
        let it = (*held)?;
        if it.until > now {
            return Some(it.until - now);
        }
        *held = None;
        let mut tally = lock(&self.delays[it.rule]);
        tally.held(now - it.since);
        tally.timeouts += u64::from(it.awaits.is_some());
        None
    }

    /// The numbers for a rule's next passage by `vcpu`; none where the rule lets it pass.
    fn draws(&self, tally: &mut Tally, rule: usize, vcpu: usize, when: When) -> Option<Rng> {
        let own = tally.passages.get_mut(vcpu)?;
        *own += 1;
        let own = *own;
        let all: u64 = tally.passages.iter().sum();
        let mut rng = Rng::new(
            self.rules.seed ^ (rule as u64) << 32 ^ (vcpu as u64) << 48,
            own,
        );
        let chosen = match when {
            When::Always => true,
            When::Every(count) => all.is_multiple_of(count.max(1)),
            When::Nth(count) => all == count,
            When::Chance(millionths) => rng.below(1_000_000) < u64::from(millionths),
        };
        tally.hits += u64::from(chosen);
        chosen.then_some(rng)
    }

    /// Sends `vector` to `to`, or does not. True where the target must be kicked now.
    pub(super) fn send(&self, apics: &LocalApics, from: usize, to: usize, vector: u8) -> bool {
        let Some(wire) = &self.wire else {
            apics.deliver(to, vector);
            return true;
        };
        // One that waits to be overtaken has been.
        if wire.overtake(to) {
            apics.deliver(to, vector);
            return true;
        }
        let rules = self.rules.ipis.iter().enumerate();
        for (rule, ipi) in rules {
            let is = |wanted: Option<usize>, it: usize| wanted.is_none_or(|wanted| wanted == it);
            let matches = ipi.vector.is_none_or(|wanted| wanted == vector)
                && is(ipi.from, from)
                && is(ipi.to, to);
            if !matches {
                continue;
            }
            let mut tally = lock(&self.ipis[rule]);
            let Some(mut rng) =
                self.draws(&mut tally, self.rules.delays.len() + rule, from, ipi.when)
            else {
                continue;
            };
            let (time, overtaken) = match ipi.fault {
                Fault::Drop => {
                    *lock(&self.dropped).entry((from, to, vector)).or_default() += 1;
                    return false;
                }
                Fault::Duplicate => {
                    apics.deliver(to, vector);
                    wire.after_accept(to, vector);
                    return true;
                }
                Fault::Delay(span) => (drawn(span, &mut rng), false),
                Fault::Reorder(time) => (time, true),
            };
            tally.held(time);
            wire.later(to, vector, time, overtaken);
            return false;
        }
        apics.deliver(to, vector);
        true
    }

    /// `vcpu` has taken an interrupt: what was to come after it, comes.
    pub(super) fn accepted(&self, apics: &LocalApics, vcpu: usize) {
        if let Some(wire) = &self.wire {
            for vector in wire.take_after_accept(vcpu) {
                apics.deliver(vcpu, vector);
            }
        }
    }

    /// What each rule has done.
    pub(super) fn report(&self) -> Vec<Disturbance> {
        let delays = self.rules.delays.iter().map(ToString::to_string);
        let ipis = self.rules.ipis.iter().map(ToString::to_string);
        let tallies = self.delays.iter().chain(&self.ipis);
        delays
            .chain(ipis)
            .zip(tallies)
            .map(|(rule, tally)| {
                let tally = lock(tally);
                let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
                Disturbance {
                    rule,
                    passages: tally.passages.iter().sum(),
                    hits: tally.hits,
                    held_ns: ns(tally.held),
                    longest_ns: ns(tally.longest),
                    timeouts: tally.timeouts,
                }
            })
            .collect()
    }

    /// The IPIs that did not arrive, in words.
    pub(super) fn lost(&self) -> Vec<String> {
        let dropped = lock(&self.dropped);
        let dropped = dropped.iter();
        dropped
            .map(|((from, to, vector), count)| {
                let name = vector_name(*vector);
                format!("{count} {name} IPIs from vCPU {from} to vCPU {to} were dropped (--ipi)")
            })
            .collect()
    }
}

fn drawn(span: Span, rng: &mut Rng) -> Duration {
    let more = (span.most - span.least).as_nanos() as u64;
    span.least + Duration::from_nanos(rng.below(more + 1))
}

/// Everything behind these locks is valid after each statement, whoever panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
