//! One monitor, and the order of actions that it was told.

use super::search::{self, Outcome};
use super::subject::Subject;
use super::{Action, Doubt, Judged, Shown};
use crate::check::Violation;
use crate::check::stream::{Monitor, Seen};
use crate::memory::PhysMem;

/// Actions between two states that are kept to go back to.
const SPACING: usize = 512;
/// Events that a report shows.
const CONTEXT: usize = 16;

/// What the memory of the machine shows behind all actions.
pub(super) struct State<'a> {
    pub(super) memory: &'a dyn PhysMem,
    pub(super) kernel_root: u64,
}

/// A monitor, and what it was told.
pub(super) struct Line {
    monitor: Box<dyn Monitor>,
    /// Actions, by index, in the order in which they are told; those that are not told yet included.
    order: Vec<usize>,
    /// How many were told.
    told: usize,
    /// States after so many.
    saved: Vec<(usize, Box<dyn Monitor>)>,
    over: bool,
    /// Whether actions were forgotten.
    forgot: bool,
}

impl Line {
    pub(super) fn new(monitor: Box<dyn Monitor>) -> Self {
        Self {
            saved: vec![(0, monitor.fork())],
            monitor,
            order: Vec::new(),
            told: 0,
            over: false,
            forgot: false,
        }
    }

    /// Tells the monitor the first `end` of `actions`. Those behind are looked at only as others that may
    /// have come first.
    pub(super) fn advance(&mut self, actions: &[Action], end: usize, judged: &mut Judged) {
        self.order.extend(self.order.len()..actions.len());
        while !self.over && self.told < end {
            if self.told - self.saved.last().map_or(0, |saved| saved.0) >= SPACING {
                self.saved.push((self.told, self.monitor.fork()));
            }
            let mut found = Vec::new();
            let at = self.order[self.told];
            self.monitor.observe(&actions[at].seen, &mut found);
            self.told += 1;
            if let Some(violation) = found.into_iter().next() {
                self.decide(actions, violation, None, judged);
            }
        }
        self.told = self.told.max(end);
    }

    /// Compares the state after all actions, which were told, with what memory shows.
    pub(super) fn compare(&mut self, actions: &[Action], state: &State<'_>, judged: &mut Judged) {
        if self.over {
            return;
        }
        let mut found = Vec::new();
        let mut monitor = self.monitor.fork();
        monitor.compare(state.memory, state.kernel_root, &mut found);
        if let Some(violation) = found.into_iter().next() {
            self.decide(actions, violation, Some(state), judged);
        }
    }

    fn decide(
        &mut self,
        actions: &[Action],
        violation: Violation,
        state: Option<&State<'_>>,
        judged: &mut Judged,
    ) {
        let Some(at) = self.told.checked_sub(1) else {
            return judged.violations.push(Shown::at_start(violation));
        };
        let shown = &actions[self.order[at]];
        let ticket = shown.seen.event.stamp;
        let outcome = search::search(self, actions, at, &violation, state);
        let id = violation.id;
        let doubt = Doubt {
            subject: Subject::of(&violation, shown),
            known: actions[actions.len() - 1].seen.event.stamp,
            until: shown.before,
        };
        // To find the context takes a walk back: only for what is kept.
        let shown = || Shown {
            context: self.context(actions, at, &violation),
            violation,
            ticket: state.is_none().then_some(ticket),
            doubt: Some(doubt),
        };
        match outcome {
            Outcome::Every => {
                judged.violations.push(shown());
                self.over = true;
            }
            Outcome::Clean { from, order } => {
                judged.leave_open(id, shown);
                self.order[from..from + order.len()].copy_from_slice(&order);
                self.rewind(actions, from, at + 1);
            }
            // Nothing is known, so nothing is said; what follows from this state would be as doubtful.
            Outcome::TooMany => {
                judged.given_up.push((id, ticket));
                judged.leave_open(id, shown);
                self.over = true;
            }
        }
    }

    /// The last events that have to do with what place `at` shows.
    fn context(&self, actions: &[Action], at: usize, violation: &Violation) -> Vec<Seen> {
        let subject = Subject::of(violation, &actions[self.order[at]]);
        let told = self.order[..=at].iter().rev().map(|index| &actions[*index]);
        let mut context: Vec<Seen> = told
            .filter(|action| subject.concerns(action))
            .map(|action| action.seen)
            .take(CONTEXT)
            .collect();
        context.reverse();
        context
    }

    /// Goes back to before the `first` that is told differently and forward to `end`.
    fn rewind(&mut self, actions: &[Action], first: usize, end: usize) {
        self.saved.retain(|(at, _)| *at <= first);
        let Some((from, state)) = self.saved.last() else {
            return;
        };
        (self.told, self.monitor) = (*from, state.fork());
        let mut found = Vec::new();
        while self.told < end {
            self.monitor
                .observe(&actions[self.order[self.told]].seen, &mut found);
            self.told += 1;
        }
    }

    /// The order that is told.
    pub(super) fn order(&self) -> &[usize] {
        &self.order
    }

    /// The earliest place that the order can be changed at.
    pub(super) fn earliest(&self) -> usize {
        self.saved.first().map_or(self.told, |saved| saved.0)
    }

    /// The moment before which there are actions that are not kept any more.
    pub(super) fn floor(&self, actions: &[Action]) -> u64 {
        match actions.first() {
            Some(first) if self.forgot => first.seen.event.stamp,
            _ => 0,
        }
    }

    /// Tells `order`, which begins at place `from`, from the last state before its `first`: the place in it of
    /// the first violation, if there is any. One that only the comparison with `state` shows is at its end.
    pub(super) fn attempt(
        &self,
        actions: &[Action],
        from: usize,
        order: &[usize],
        first: usize,
        state: Option<&State<'_>>,
    ) -> Option<(usize, Violation)> {
        let states = self.saved.iter().rev();
        let (at, saved) = states.into_iter().find(|(at, _)| *at <= from + first)?;
        let mut monitor = saved.fork();
        let mut found = Vec::new();
        let known = self.order.get(*at..from).unwrap_or_default();
        for index in known {
            monitor.observe(&actions[*index].seen, &mut found);
        }
        found.clear();
        let skip = at.saturating_sub(from);
        for (place, index) in order.iter().enumerate().skip(skip) {
            monitor.observe(&actions[*index].seen, &mut found);
            if let Some(violation) = found.pop() {
                return Some((place, violation));
            }
        }
        if let Some(state) = state {
            monitor.compare(state.memory, state.kernel_root, &mut found);
        }
        let violation = found.into_iter().next()?;
        Some((order.len().checked_sub(1)?, violation))
    }

    /// True where the first `count` that were told are the first `count` actions, and there is a state behind
    /// them.
    pub(super) fn took(&self, count: usize) -> bool {
        let all = self.order[..count].iter().all(|index| *index < count);
        self.over || all && self.saved.iter().any(|(at, _)| *at >= count)
    }

    /// The first `count` actions are gone.
    pub(super) fn forget(&mut self, count: usize) {
        self.forgot = true;
        self.told -= count;
        self.order.drain(..count);
        for index in &mut self.order {
            *index = index.saturating_sub(count);
        }
        self.saved.retain(|(at, _)| *at >= count);
        for (at, _) in &mut self.saved {
            *at -= count;
        }
    }
}
