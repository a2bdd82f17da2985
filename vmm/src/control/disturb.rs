//! Disturbing vCPUs that run at once: who is held at a point, and what becomes of an IPI.
//!
//! The rules are [`crate::scenario::disturb`]'s. A vCPU that is to be held exits at its point, because the
//! point is trapped in its control page, and its thread waits before it enters the guest again, while the
//! others run on: like a vCPU that the host's scheduler has taken the CPU from, it takes no interrupt
//! meanwhile. What is drawn depends on the seed, the rule, the vCPU and how often it has been there, and on nothing else.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use abi::point::Point;
use devices::lapic::LocalApics;
use serde::Serialize;

use crate::explore::rng::Rng;
use crate::kvm::vcpu::Kick;
use crate::scenario::disturb::{Disturb, Fault, Hold, Span, When, vector_name};

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

/// IPIs on their way, and the thread that lets them arrive.
struct Wire {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<Flights>,
    changed: Condvar,
}

#[derive(Default)]
struct Flights {
    under_way: Vec<Flight>,
    /// By target: what arrives when it has taken another one.
    after_accept: Vec<Vec<u8>>,
    stop: bool,
}

struct Flight {
    to: usize,
    vector: u8,
    due: Instant,
    /// It waits for another one to come before it.
    overtaken: bool,
}

impl Wire {
    fn start(apics: &Arc<LocalApics>, kicks: &[Arc<Kick>]) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(Flights {
                after_accept: vec![Vec::new(); kicks.len()],
                ..Flights::default()
            }),
            changed: Condvar::new(),
        });
        let thread = {
            let (shared, apics, kicks) = (Arc::clone(&shared), Arc::clone(apics), kicks.to_vec());
            std::thread::Builder::new()
                .name("wire".into())
                .spawn(move || shared.deliver(&apics, &kicks))?
        };
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    fn later(&self, to: usize, vector: u8, time: Duration, overtaken: bool) {
        let due = Instant::now() + time;
        lock(&self.shared.state).under_way.push(Flight {
            to,
            vector,
            due,
            overtaken,
        });
        self.shared.changed.notify_all();
    }

    /// Lets what waits to be overtaken on the way to `to` arrive after the next one. True where there was any.
    fn overtake(&self, to: usize) -> bool {
        let mut state = lock(&self.shared.state);
        let Some(at) = (state.under_way.iter()).position(|it| it.overtaken && it.to == to) else {
            return false;
        };
        let vector = state.under_way.swap_remove(at).vector;
        state.after_accept[to].push(vector);
        true
    }

    fn after_accept(&self, to: usize, vector: u8) {
        lock(&self.shared.state).after_accept[to].push(vector);
    }

    fn take_after_accept(&self, to: usize) -> Vec<u8> {
        std::mem::take(&mut lock(&self.shared.state).after_accept[to])
    }
}

impl Shared {
    /// Until told to stop.
    fn deliver(&self, apics: &LocalApics, kicks: &[Arc<Kick>]) {
        let mut state = lock(&self.state);
        while !state.stop {
            let now = Instant::now();
            let (arrived, under_way) = std::mem::take(&mut state.under_way)
                .into_iter()
                .partition(|flight| flight.due <= now);
            state.under_way = under_way;
            let arrived: Vec<Flight> = arrived;
            for flight in arrived {
                apics.deliver(flight.to, flight.vector);
                kicks[flight.to].kick();
            }
            let next = state.under_way.iter().map(|flight| flight.due).min();
            state = match next {
                None => self.changed.wait(state),
                Some(due) => self
                    .changed
                    .wait_timeout(state, due.saturating_duration_since(now))
                    .map(|(state, _)| state)
                    .map_err(|error| PoisonError::new(error.into_inner().0)),
            }
            .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        lock(&self.shared.state).stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disturber(vcpus: usize, delays: &[&str], ipis: &[&str]) -> (Disturber, Arc<LocalApics>) {
        let apics = Arc::new(LocalApics::new(vcpus));
        for vcpu in 0..vcpus {
            // Software enable.
            use devices::bus::Device;
            apics.write(vcpu, 0xf0, &0x1ff_u32.to_le_bytes());
        }
        let rules = Disturb {
            delays: delays.iter().map(|rule| rule.parse().unwrap()).collect(),
            ipis: ipis.iter().map(|rule| rule.parse().unwrap()).collect(),
            seed: 7,
        };
        let kicks: Vec<Arc<Kick>> = (0..vcpus).map(|_| Arc::default()).collect();
        let disturber = Disturber::new(&rules, &kicks, Some(&apics)).unwrap();
        (disturber.unwrap(), apics)
    }

    fn take(disturber: &Disturber, apics: &LocalApics, vcpu: usize) -> Option<u8> {
        use devices::bus::Device;
        let vector = apics.accept(vcpu)?;
        disturber.accepted(apics, vcpu);
        apics.write(vcpu, 0xb0, &[0; 4]);
        Some(vector)
    }

    #[test]
    fn every_second_passage_is_held_and_tallied() {
        let (disturber, _) = disturber(2, &["flush-sync@1:every2=1ms"], &[]);
        assert!(disturber.is_own(1, Point::FlushSync) && !disturber.is_own(0, Point::FlushSync));
        for passage in 1..=4 {
            disturber.passed(0, Point::FlushSync);
            assert!(disturber.held_back(0).is_none());
            disturber.passed(1, Point::FlushSync);
            assert_eq!(disturber.held_back(1).is_some(), passage % 2 == 0);
            while disturber.held_back(1).is_some() {
                std::thread::yield_now();
            }
        }
        let report = &disturber.report()[0];
        assert_eq!((report.passages, report.hits), (4, 2));
        assert!(
            report.held_ns >= 2_000_000 && report.longest_ns >= 1_000_000,
            "{report:?}"
        );
    }

    #[test]
    fn a_vcpu_waits_until_the_other_one_has_passed() {
        let rule = "pte-clear@0=until:ipi-receive@1,1s";
        let (disturber, _) = disturber(3, &[rule], &[]);
        disturber.passed(0, Point::PteClear);
        disturber.passed(2, Point::IpiReceive);
        disturber.passed(1, Point::FlushSync);
        assert!(disturber.held_back(0).is_some());
        disturber.passed(1, Point::IpiReceive);
        assert!(disturber.held_back(0).is_none());
        assert_eq!(disturber.report()[0].timeouts, 0);
        assert!(disturber.is_own(1, Point::IpiReceive) && !disturber.is_own(2, Point::IpiReceive));
    }

    #[test]
    fn a_wait_for_what_never_comes_ends_and_is_counted() {
        let (disturber, _) = disturber(2, &["pte-clear=until:ipi-receive,1ms"], &[]);
        disturber.passed(0, Point::PteClear);
        while disturber.held_back(0).is_some() {
            std::thread::yield_now();
        }
        assert_eq!(disturber.report()[0].timeouts, 1);
    }

    #[test]
    fn the_seed_alone_decides_what_is_drawn() {
        let draws = |seed: u64| -> Vec<bool> {
            let rules = Disturb {
                delays: vec!["flush-sync:p0.5=1us".parse().unwrap()],
                seed,
                ..Disturb::default()
            };
            let disturber = Disturber::new(&rules, &[Arc::default()], None)
                .unwrap()
                .unwrap();
            let draw = |_| {
                let before = disturber.report()[0].hits;
                disturber.passed(0, Point::FlushSync);
                disturber.report()[0].hits > before
            };
            (0..64).map(draw).collect()
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
        assert!(draws(1).contains(&true) && draws(1).contains(&false));
    }

    #[test]
    fn a_dropped_ipi_does_not_arrive_and_is_named() {
        let (disturber, apics) = disturber(2, &[], &["shootdown@0-1:nth2=drop"]);
        assert!(disturber.send(&apics, 0, 1, 0xf0));
        assert_eq!(take(&disturber, &apics, 1), Some(0xf0));
        assert!(!disturber.send(&apics, 0, 1, 0xf0));
        assert_eq!(take(&disturber, &apics, 1), None);
        assert!(disturber.send(&apics, 0, 1, 0xf1) && disturber.send(&apics, 1, 0, 0xf0));
        let lost = disturber.lost();
        assert!(
            lost[0].contains("1 shootdown IPIs from vCPU 0 to vCPU 1"),
            "{lost:?}"
        );
    }

    #[test]
    fn a_duplicate_is_taken_twice() {
        let (disturber, apics) = disturber(2, &[], &["any=dup"]);
        assert!(disturber.send(&apics, 0, 1, 0xf0));
        assert_eq!(take(&disturber, &apics, 1), Some(0xf0));
        assert_eq!(take(&disturber, &apics, 1), Some(0xf0));
        assert_eq!(take(&disturber, &apics, 1), None);
    }

    #[test]
    fn one_that_is_reordered_comes_after_the_next() {
        let (disturber, apics) = disturber(2, &[], &["shootdown=reorder:1s"]);
        assert!(!disturber.send(&apics, 0, 1, 0xf0));
        assert_eq!(take(&disturber, &apics, 1), None);
        assert!(disturber.send(&apics, 0, 1, 0xf1));
        assert_eq!(take(&disturber, &apics, 1), Some(0xf1));
        assert_eq!(take(&disturber, &apics, 1), Some(0xf0));
    }

    #[test]
    fn a_delayed_ipi_arrives_and_so_does_one_that_nothing_overtakes() {
        for rule in ["any=delay:1ms", "any=reorder:1ms"] {
            let (disturber, apics) = disturber(2, &[], &[rule]);
            assert!(!disturber.send(&apics, 0, 1, 0xf0));
            while take(&disturber, &apics, 1).is_none() {
                std::thread::yield_now();
            }
            assert_eq!(disturber.report()[0].hits, 1);
        }
    }
}
