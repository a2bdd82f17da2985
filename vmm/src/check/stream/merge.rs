//! Parallel runs: the streams of all vCPUs become one, and the monitors judge it.
//!
//! Events carry tickets (`stamp=ticket`) that a locked add gives *after* what they tell of. So the action of an
//! event lies somewhere between the ticket of the event before it on its vCPU and its own. Two actions of
//! different vCPUs whose intervals overlap may have happened in either order, and the order of the
//! tickets is only one of the possible ones.
//!
//! What looks wrong in that order is therefore tried in every other: a depth-first search over the orders of the events
//! around it, that leaves one out only where it differs from another in the order of events that no monitor can tell
//! apart (sleep sets: Godefroid, *Partial-Order Methods for the Verification of Concurrent Systems*, 1996). An
//! order that shows nothing wrong is taken for what happened. A violation is reported only where there is
//! none; where there are too many orders to try them all, it is counted as undecided.

use abi::channel::{Event, EventKind};
use rustc_hash::FxHashSet;

use super::{Monitor, Seen};
use crate::check::Violation;

/// Events before a violation whose order is varied.
const BEFORE: usize = 96;
/// Events after it that may have come before it.
const AFTER: usize = 32;
/// Events between two states that are kept to start again from.
const STRIDE: usize = 256;
/// Events that a search may take in all orders together.
const STEPS: usize = 20_000;

/// What the merged streams came to.
#[derive(Debug, Default)]
pub struct Judged {
    /// Events.
    pub events: u64,
    /// Places where the order of the tickets looked wrong and another possible one did not.
    pub reordered: u64,
    /// Places that looked wrong, with too many possible orders to try them all.
    pub undecided: u64,
    /// The first violation that every order shows.
    pub violation: Option<Violation>,
    /// Everything up to it, in the order that was taken.
    pub stream: Vec<Seen>,
}

/// An event and when its action may have happened: after `from`, up to its stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Timed {
    seen: Seen,
    from: u64,
}

impl Timed {
    fn until(&self) -> u64 {
        self.seen.event.stamp
    }
}

/// Merges `streams`, one for each vCPU in its own order, and has `monitors`, which were started, judge the
/// whole. `start` is the ticket from which the streams begin.
#[must_use]
pub fn judge(streams: &[Vec<Event>], start: u64, monitors: Vec<Box<dyn Monitor>>) -> Judged {
    let mut events = merge(streams, start);
    let mut judged = Judged {
        events: events.len() as u64,
        ..Judged::default()
    };
    let mut at = 0;
    // The state before `kept.0`, and before a later event.
    let mut kept = (0, fork(&monitors));
    let mut next = (0, fork(&monitors));
    let mut now = monitors;
    while at < events.len() {
        if at >= next.0 + STRIDE {
            kept = std::mem::replace(&mut next, (at, fork(&now)));
        }
        match step(&mut now, &events[at].seen) {
            None => at += 1,
            Some(violation) => {
                let begin = kept.0.max(at.saturating_sub(BEFORE));
                let end = (at + 1 + AFTER).min(events.len());
                let mut base = fork(&kept.1);
                for timed in &events[kept.0..begin] {
                    step(&mut base, &timed.seen);
                }
                let window = &events[begin..end];
                match Search::new(window, at - begin).run(&base) {
                    Outcome::Clean { order, well, state } => {
                        judged.reordered += 1;
                        events[begin..end].copy_from_slice(&order);
                        now = state;
                        at = begin + well;
                        if next.0 > begin {
                            // It was reached in another order.
                            next = (kept.0, fork(&kept.1));
                        }
                    }
                    Outcome::Undecided => {
                        judged.undecided += 1;
                        at += 1;
                    }
                    Outcome::Violated => {
                        judged.violation = Some(violation);
                        break;
                    }
                }
            }
        }
    }
    let seen = (at + 1).min(events.len());
    judged.stream = events[..seen].iter().map(|timed| timed.seen).collect();
    judged
}

fn merge(streams: &[Vec<Event>], start: u64) -> Vec<Timed> {
    let mut events = Vec::with_capacity(streams.iter().map(Vec::len).sum());
    for (vcpu, stream) in streams.iter().enumerate() {
        let mut from = start;
        for &event in stream {
            let seen = Seen { vcpu, event };
            events.push(Timed { seen, from });
            // A guest whose tickets fall tells nothing about time.
            from = from.max(event.stamp);
        }
    }
    // Stable: equal stamps, which no correct kernel gives, stay in the order of the vCPUs.
    events.sort_by_key(Timed::until);
    events
}

/// What a search came to.
enum Outcome {
    /// The first `well` events of this order, the suspect among them, show nothing wrong and lead to `state`.
    Clean {
        order: Vec<Timed>,
        well: usize,
        state: Vec<Box<dyn Monitor>>,
    },
    /// Every order does.
    Violated,
    /// Not every order was tried.
    Undecided,
}

/// A search for an order of a window that shows nothing wrong.
struct Search<'a> {
    /// The window's events by vCPU.
    queues: Vec<Vec<&'a Timed>>,
    window: &'a [Timed],
    /// The event that looks wrong, in the order of the tickets.
    suspect: usize,
    placed: Vec<Timed>,
    steps: usize,
}

impl<'a> Search<'a> {
    fn new(window: &'a [Timed], suspect: usize) -> Self {
        let vcpus = window.iter().map(|it| it.seen.vcpu + 1).max().unwrap_or(0);
        let mut queues = vec![Vec::new(); vcpus];
        for timed in window {
            queues[timed.seen.vcpu].push(timed);
        }
        Self {
            queues,
            window,
            suspect,
            placed: Vec::new(),
            steps: STEPS,
        }
    }

    fn run(mut self, base: &[Box<dyn Monitor>]) -> Outcome {
        let heads = vec![0; self.queues.len()];
        match self.from(&heads, &[], base) {
            Some(state) => {
                let well = self.placed.len();
                let placed: FxHashSet<(usize, u64)> = self.placed.iter().map(name).collect();
                let rest = self.window.iter().filter(|it| !placed.contains(&name(it)));
                let mut order = self.placed.clone();
                order.extend(rest.copied());
                Outcome::Clean { order, well, state }
            }
            None if self.steps == 0 => Outcome::Undecided,
            None => Outcome::Violated,
        }
    }

    /// Goes on behind `heads`; those `asleep` would only repeat what was tried. The state at the goal: at least
    /// as many events are placed as up to the suspect in the order of the tickets, the suspect among them.
    fn from(
        &mut self,
        heads: &[usize],
        asleep: &[usize],
        state: &[Box<dyn Monitor>],
    ) -> Option<Vec<Box<dyn Monitor>>> {
        let suspect = name(&self.window[self.suspect]);
        if self.placed.len() > self.suspect && self.placed.iter().any(|it| name(it) == suspect) {
            return Some(fork(state));
        }
        if self.placed.len() > self.suspect + AFTER {
            return None;
        }
        let first: Vec<Option<&'a Timed>> = (0..heads.len())
            .map(|vcpu| self.queues[vcpu].get(heads[vcpu]).copied())
            .collect();
        let waiting: Vec<(usize, &'a Timed)> = first
            .iter()
            .enumerate()
            .filter_map(|(vcpu, head)| Some((vcpu, (*head)?)))
            .collect();
        // Nothing comes before what certainly came before it.
        let mut possible: Vec<(usize, &'a Timed)> = waiting
            .iter()
            .filter(|(_, it)| waiting.iter().all(|(_, other)| other.until() > it.from))
            .copied()
            .collect();
        possible.sort_by_key(|(_, it)| it.until());
        let mut asleep = asleep.to_vec();
        for (vcpu, timed) in possible {
            if asleep.contains(&vcpu) {
                continue;
            }
            if self.steps == 0 {
                return None;
            }
            self.steps -= 1;
            let mut next = fork(state);
            if step(&mut next, &timed.seen).is_none() {
                let awake = |other: &usize| {
                    first[*other].is_some_and(|other| commute(&other.seen, &timed.seen))
                };
                let still: Vec<usize> = asleep.iter().copied().filter(awake).collect();
                let mut behind = heads.to_vec();
                behind[vcpu] += 1;
                self.placed.push(*timed);
                if let Some(found) = self.from(&behind, &still, &next) {
                    return Some(found);
                }
                self.placed.pop();
            }
            asleep.push(vcpu);
        }
        None
    }
}

/// What tells an event of a window from the others.
fn name(timed: &Timed) -> (usize, u64) {
    (timed.seen.vcpu, timed.until())
}

/// True where no monitor can tell the order of two events of different vCPUs. What is not known to be so is not.
fn commute(one: &Seen, two: &Seen) -> bool {
    use EventKind as K;
    let kinds = [one, two].map(|seen| EventKind::from_id(seen.event.kind));
    let is_lock = |kind| matches!(kind, Some(K::LockAcquire | K::LockRelease | K::LockWait));
    let says_nothing = |kind| {
        matches!(
            kind,
            None | Some(K::IpiSend | K::IpiReceive | K::IpiAck | K::LockWait | K::FailpointHit)
        )
    };
    // Of locks only the same one, and of everything else all, may matter to each other: a section's end is a
    // release, and what it changed is judged there.
    match kinds.map(is_lock) {
        [true, true] => one.event.args[0] != two.event.args[0],
        _ => kinds.into_iter().any(says_nothing),
    }
}

/// Observes one event with all monitors.
fn step(monitors: &mut [Box<dyn Monitor>], seen: &Seen) -> Option<Violation> {
    let mut found = Vec::new();
    for monitor in monitors {
        monitor.observe(seen, &mut found);
    }
    found.into_iter().next()
}

fn fork(monitors: &[Box<dyn Monitor>]) -> Vec<Box<dyn Monitor>> {
    monitors.iter().map(|monitor| monitor.fork()).collect()
}

#[cfg(test)]
mod tests {
    use abi::lock::LockClass;
    use proptest::prelude::*;

    use super::*;
    use crate::check::stream::locks::Locks;

    /// A true history of one lock (or, with `broken`, of two holders at once): who acts at which moment.
    fn history(turns: &[(usize, u64)], broken: bool) -> Vec<(usize, EventKind, u64)> {
        let mut at = 0;
        let mut all = Vec::new();
        for (index, &(vcpu, gap)) in turns.iter().enumerate() {
            at += 1 + gap;
            all.push((vcpu, EventKind::LockAcquire, at));
            if broken && index == turns.len() / 2 {
                // Long enough that no delay of a stamp explains it.
                all.push((1 - vcpu, EventKind::LockAcquire, at + 100));
                // Events around them make certain that both hold it.
                for (who, after) in [(vcpu, 40), (1 - vcpu, 60), (vcpu, 140), (1 - vcpu, 150)] {
                    all.push((who, EventKind::IpiReceive, at + after));
                }
                at += 200;
                all.push((1 - vcpu, EventKind::LockRelease, at));
            }
            at += 1 + gap;
            all.push((vcpu, EventKind::LockRelease, at));
        }
        all.sort_by_key(|(.., at)| *at);
        all
    }

    /// The streams that such a history leaves where every stamp comes up to `late` moments after its action,
    /// but before the vCPU's next one.
    fn streams(history: &[(usize, EventKind, u64)], late: &[u64]) -> Vec<Vec<Event>> {
        let mut stamped: Vec<(u64, usize, usize)> = Vec::new();
        for (index, &(vcpu, _, at)) in history.iter().enumerate() {
            let next = history[index + 1..]
                .iter()
                .find(|(other, ..)| *other == vcpu);
            let limit = next.map_or(u64::MAX, |(.., next)| next - 1);
            let stamp = (10 * (at + late[index % late.len()])).min(limit.saturating_mul(10));
            stamped.push((stamp, vcpu, index));
        }
        stamped.sort_unstable();
        let mut streams = vec![Vec::new(); 2];
        for (ticket, &(_, vcpu, index)) in stamped.iter().enumerate() {
            streams[vcpu].push(Event {
                stamp: ticket as u64 + 1,
                kind: history[index].1 as u32,
                task: vcpu as u32 + 1,
                args: [8, LockClass::Slab as u64, 0, 0, 0],
                sequence: index as u64,
            });
        }
        for stream in &mut streams {
            stream.sort_by_key(|event| event.sequence);
        }
        streams
    }

    fn judge_locks(streams: &[Vec<Event>]) -> Judged {
        judge(streams, 0, vec![Box::new(Locks::default())])
    }

    proptest! {
        #[test]
        fn late_stamps_make_nobody_cry_wolf(
            turns in prop::collection::vec((0usize..2, 0u64..4), 1..80),
            late in prop::collection::vec(0u64..12, 1..20),
        ) {
            let streams = streams(&history(&turns, false), &late);
            let judged = judge_locks(&streams);
            prop_assert!(judged.violation.is_none(), "{:?}", judged.violation);
        }

        #[test]
        fn what_every_order_shows_is_reported(
            turns in prop::collection::vec((0usize..2, 0u64..4), 1..40),
            late in prop::collection::vec(0u64..4, 1..20),
        ) {
            let judged = judge_locks(&streams(&history(&turns, true), &late));
            prop_assert!(judged.violation.is_some(), "{judged:?}");
        }
    }

    #[test]
    fn a_release_that_is_stamped_late_is_put_before_the_acquisition() {
        use EventKind::{LockAcquire, LockRelease};
        let event = |stamp, task, kind: EventKind| Event {
            stamp,
            task,
            kind: kind as u32,
            args: [8, LockClass::Slab as u64, 0, 0, 0],
            ..Event::default()
        };
        let streams = [
            vec![event(1, 1, LockAcquire), event(3, 1, LockRelease)],
            vec![event(2, 2, LockAcquire), event(4, 2, LockRelease)],
        ];
        let judged = judge_locks(&streams);
        assert!(judged.violation.is_none());
        assert_eq!(judged.reordered, 1);
        let order: Vec<u64> = judged.stream.iter().map(|seen| seen.event.stamp).collect();
        assert_eq!(order, [1, 3, 2, 4]);
    }
}
