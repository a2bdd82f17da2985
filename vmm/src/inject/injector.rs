//! Does what the rules say, on the threads of the vCPUs.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use abi::point::Point;
use serde::Serialize;

use super::rules::{HowLong, IpiFaultKind, Rules};
use crate::engine::PointSet;
use crate::explore::Rng;

/// What was done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Injected {
    /// Delays.
    pub delays: u64,
    /// How long they were together.
    pub delayed: Duration,
    /// Delays that ended because the machine was paused, or because nobody passed the awaited point in time.
    pub cut_short: u64,
    /// IPIs that came late.
    pub ipis_delayed: u64,
    /// IPIs that never came.
    pub ipis_dropped: u64,
    /// IPIs that came twice.
    pub ipis_duplicated: u64,
    /// IPIs that came after a later one.
    pub ipis_reordered: u64,
}

#[derive(Debug)]
struct State {
    rng: Rng,
    /// Passages that each delay has counted, and IPIs that each fault has.
    passages: Vec<u64>,
    ipis: Vec<u64>,
    /// How often each vCPU has passed each point that somebody may wait for.
    passed: Vec<[u64; PointSet::MOST]>,
    pausing: bool,
    done: Injected,
}

/// See the module.
#[derive(Debug)]
pub struct Injector {
    rules: Rules,
    points: PointSet,
    state: Mutex<State>,
    changed: Condvar,
}

impl Injector {
    /// For a machine with `vcpus`.
    #[must_use]
    pub fn new(rules: Rules, vcpus: usize) -> Self {
        let mut points = Vec::new();
        for delay in &rules.delays {
            points.push(delay.point);
            if let HowLong::Until { point, .. } = delay.how_long {
                points.push(point);
            }
        }
        let state = State {
            rng: Rng::new(rules.seed, 0),
            passages: vec![0; rules.delays.len()],
            ipis: vec![0; rules.ipis.len()],
            passed: vec![[0; PointSet::MOST]; vcpus],
            pausing: false,
            done: Injected::default(),
        };
        Self {
            points: PointSet::of(&points),
            rules,
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// Points at which it must be told.
    #[must_use]
    pub fn points(&self) -> PointSet {
        self.points
    }

    /// What was done so far.
    #[must_use]
    pub fn done(&self) -> Injected {
        self.lock().done
    }

    /// Whether the machine is being paused: nobody waits then.
    pub fn set_pausing(&self, pausing: bool) {
        self.lock().pausing = pausing;
        self.changed.notify_all();
    }

    /// `vcpu` is at `point`: returns when it may go on.
    pub fn at(&self, vcpu: usize, point: Point) {
        let mut state = self.lock();
        if let Some(passed) = state.passed.get_mut(vcpu) {
            passed[point as usize % PointSet::MOST] += 1;
        }
        self.changed.notify_all();
        let delays = self.rules.delays.iter().enumerate();
        for (index, delay) in delays {
            if delay.point != point || delay.vcpu.is_some_and(|only| only != vcpu) {
                continue;
            }
            state.passages[index] += 1;
            if !state.passages[index].is_multiple_of(delay.every) {
                continue;
            }
            state = self.wait(state, vcpu, delay.how_long);
        }
    }

    fn wait<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        vcpu: usize,
        how_long: HowLong,
    ) -> MutexGuard<'a, State> {
        let started = Instant::now();
        let (time, awaited) = match how_long {
            HowLong::Fixed(time) => (time, None),
            HowLong::Between(least, most) => {
                let span = (most - least).as_nanos() as u64;
                let more = state.rng.below(span.saturating_add(1));
                (least + Duration::from_nanos(more), None)
            }
            HowLong::Until {
                point,
                vcpu: by,
                most,
            } => (most, Some((point, by))),
        };
        let passed = |state: &State| {
            awaited.map_or(0, |(point, by)| {
                let others = state.passed.iter().enumerate();
                let counted =
                    others.filter(|(other, _)| by.map_or(*other != vcpu, |by| by == *other));
                counted
                    .map(|(_, passed)| passed[point as usize % PointSet::MOST])
                    .sum()
            })
        };
        let before: u64 = passed(&state);
        let cut = loop {
            if state.pausing {
                break true;
            }
            if awaited.is_some() && passed(&state) != before {
                break false;
            }
            let left = time.saturating_sub(started.elapsed());
            if left.is_zero() {
                break awaited.is_some();
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        state.done.delays += 1;
        state.done.delayed += started.elapsed();
        state.done.cut_short += u64::from(cut);
        state
    }

    /// What happens to an IPI to `target`; none: it arrives as it should.
    pub fn ipi(&self, target: usize) -> Option<IpiFaultKind> {
        let mut state = self.lock();
        let mut fate = None;
        for (index, fault) in self.rules.ipis.iter().enumerate() {
            if fault.target.is_some_and(|only| only != target) {
                continue;
            }
            state.ipis[index] += 1;
            if fate.is_none() && state.ipis[index].is_multiple_of(fault.every) {
                fate = Some(fault.kind);
            }
        }
        let done = &mut state.done;
        match fate {
            None => {}
            Some(IpiFaultKind::Drop) => done.ipis_dropped += 1,
            Some(IpiFaultKind::Duplicate) => done.ipis_duplicated += 1,
            Some(IpiFaultKind::Reorder) => done.ipis_reordered += 1,
            Some(IpiFaultKind::Delay(_)) => done.ipis_delayed += 1,
        }
        fate
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Counters: valid whatever panicked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn injector(delays: &[&str], ipis: &[&str]) -> Injector {
        let rules = Rules {
            delays: delays.iter().map(|text| text.parse().unwrap()).collect(),
            ipis: ipis.iter().map(|text| text.parse().unwrap()).collect(),
            seed: 1,
        };
        Injector::new(rules, 2)
    }

    #[test]
    fn every_nth_passage_of_the_vcpu_waits() {
        let injector = injector(&["pte-clear@1/2=1us"], &[]);
        for _ in 0..5 {
            injector.at(0, Point::PteClear);
            injector.at(1, Point::PteClear);
            injector.at(1, Point::PteInstall);
        }
        let done = injector.done();
        assert_eq!((done.delays, done.cut_short), (2, 0));
        assert!(done.delayed >= Duration::from_micros(2));
    }

    #[test]
    fn one_waits_until_another_passes_a_point_or_the_machine_is_paused() {
        let injector = Arc::new(injector(&["flush-issue@0=until:pte-clear@1,60s"], &[]));
        assert!(injector.points().has(Point::PteClear));
        for passes in [true, false] {
            let waits = Arc::clone(&injector);
            let thread = std::thread::spawn(move || waits.at(0, Point::FlushIssue));
            if passes {
                while !thread.is_finished() {
                    injector.at(1, Point::PteClear);
                    std::thread::yield_now();
                }
            } else {
                injector.set_pausing(true);
            }
            thread.join().unwrap();
        }
        let done = injector.done();
        assert_eq!((done.delays, done.cut_short), (2, 1));
    }

    #[test]
    fn ipis_have_the_fate_of_their_target() {
        let injector = injector(&[], &["drop/3@1", "dup@0"]);
        assert_eq!(injector.ipi(0), Some(IpiFaultKind::Duplicate));
        let fates: Vec<_> = (0..6).map(|_| injector.ipi(1).is_some()).collect();
        assert_eq!(fates, [false, false, true, false, false, true]);
        let done = injector.done();
        assert_eq!((done.ipis_dropped, done.ipis_duplicated), (2, 1));
    }
}
