//! The other orders: is one of them clean?
//!
//! Two orders differ for a violation only in the order of the events that [concern](Subject) it. One step of the search
//! puts one of these before another that it need not follow, with all that it must follow. Such steps lead from any
//! possible order to any other: let the first place at which they differ hold `a` in this and `b` in that; then `b` does
//! not follow `a` for certain, all that it follows for certain stands before that place, and one step puts it there. Where
//! that place lies behind the violation the other order has the violation too, so steps are made before it only. The
//! search goes on from the order that gets furthest, until one is clean past all that may have come before the event that showed the
//! violation, or none is left.

use std::hash::BuildHasher;

use rustc_hash::{FxBuildHasher, FxHashMap, FxHashSet};

use super::line::{Line, State};
use super::subject::Subject;
use super::{Action, LOOKAHEAD};
use crate::check::Violation;

/// Events that concern a violation, before the one that shows it, whose order may be changed.
const RELEVANT: usize = 64;
/// Places before the one that shows the violation that they are looked for in.
const BACK: usize = 1 << 14;
/// Orders that are tried.
const ORDERS: usize = 256;

/// What a search comes to.
pub(super) enum Outcome {
    /// Every possible order has a violation.
    Every,
    /// This one, which begins at place `from`, has none.
    Clean {
        /// The first place.
        from: usize,
        /// Indices of the actions from there on.
        order: Vec<usize>,
    },
    /// There are more orders than are tried, or the bounds leave some out.
    TooMany,
}

/// An order with a violation. Places count from the start of the window.
struct Node {
    order: Vec<usize>,
    /// Where the violation shows.
    at: usize,
    violation: Violation,
    /// The first place at which it differs from the order that was told.
    first: usize,
}

/// Tries other orders than that of `line`, whose place `at` shows `violation`, or whose end does where it is compared
/// with a `state`.
pub(super) fn search(
    line: &Line,
    actions: &[Action],
    at: usize,
    violation: &Violation,
    state: Option<&State<'_>>,
) -> Outcome {
    let order = line.order();
    let last = order.len().min(at + LOOKAHEAD);
    let window = Window {
        line,
        actions,
        from: line.earliest().max(at.saturating_sub(BACK)),
        last,
        state,
    };
    // Past everything that may have come before it.
    let shown = &actions[order[at]];
    let later = (at + 1..last).rev();
    let unordered = later
        .into_iter()
        .find(|place| !shown.precedes(&actions[order[*place]]));
    let mut end = unordered.unwrap_or(at) + 1;
    loop {
        match window.search(end, at, violation) {
            Ok(outcome) => return outcome,
            Err(further) => end = further,
        }
    }
}

/// Where orders may differ.
struct Window<'a> {
    line: &'a Line,
    actions: &'a [Action],
    from: usize,
    /// Actions from here on are not looked at.
    last: usize,
    state: Option<&'a State<'a>>,
}

impl Window<'_> {
    /// Tries other orders of what lies before place `end`.
    ///
    /// # Errors
    /// One of them shows a violation elsewhere, before which something may have come that lies behind `end`: up to where.
    fn search(&self, end: usize, at: usize, violation: &Violation) -> Result<Outcome, usize> {
        let &Window {
            line,
            actions,
            from,
            last,
            state,
        } = self;
        let order = line.order();
        let hash = |order: &[usize]| FxBuildHasher.hash_one(order);
        let mut known = FxHashSet::from_iter([hash(&order[from..end])]);
        let mut open = vec![Node {
            order: order[from..end].to_vec(),
            at: at - from,
            violation: violation.clone(),
            first: end - from,
        }];
        let outside = Outside {
            before: &order[..from],
            behind: &order[last..],
            floor: line.floor(actions),
        };
        let mut whole = true;
        while let Some(node) = furthest(&mut open) {
            let concerned = Concerned::of(actions, &node);
            let shown = &actions[node.order[node.at]];
            let may_come_first = |place: &usize| {
                let later = &actions[order[*place]];
                !shown.precedes(later) && concerned.subject.concerns(later)
            };
            if let Some(place) = (end..last).rev().find(may_come_first) {
                return Err(place + 1);
            }
            whole &= concerned.is_whole(actions, &node, &outside);
            for (order, first) in exchanges(actions, &node, &concerned) {
                if !known.insert(hash(&order)) {
                    continue;
                }
                if known.len() > ORDERS {
                    return Ok(Outcome::TooMany);
                }
                let first = first.min(node.first);
                match line.attempt(actions, from, &order, first, state) {
                    None => return Ok(Outcome::Clean { from, order }),
                    Some((at, violation)) => open.push(Node {
                        order,
                        at,
                        violation,
                        first,
                    }),
                }
            }
        }
        Ok(if whole {
            Outcome::Every
        } else {
            Outcome::TooMany
        })
    }
}

/// Actions that are in no order that is tried.
struct Outside<'a> {
    before: &'a [usize],
    behind: &'a [usize],
    /// Whatever begins before this moment may have happened before actions that are not kept any more.
    floor: u64,
}

/// The places of a node that concern its violation.
struct Concerned {
    subject: Subject,
    /// Those whose order may be changed.
    places: Vec<usize>,
    /// Those before them.
    rest: Vec<usize>,
}

impl Concerned {
    fn of(actions: &[Action], node: &Node) -> Self {
        let order = &node.order;
        let subject = Subject::of(&node.violation, &actions[order[node.at]]);
        let mut places: Vec<usize> = (0..order.len())
            .filter(|place| subject.concerns(&actions[order[*place]]))
            .collect();
        let before = places.partition_point(|place| *place <= node.at);
        let rest = places.drain(..before.saturating_sub(RELEVANT)).collect();
        Self {
            subject,
            places,
            rest,
        }
    }

    /// True where nothing that concerns the violation may have happened on the other side of the bounds, and where the order
    /// of what lies there leaves no doubt that matters: no order is left out that could be clean.
    fn is_whole(&self, actions: &[Action], node: &Node, outside: &Outside<'_>) -> bool {
        let action = |place: &usize| &actions[node.order[*place]];
        let kept = outside.before.iter().map(|index| &actions[*index]);
        let earlier: Vec<&Action> = kept
            .filter(|earlier| self.subject.concerns(earlier))
            .chain(self.rest.iter().map(action))
            .collect();
        let mut later = outside.behind.iter().map(|index| &actions[*index]);
        let shown = action(&node.at);
        let inside = || self.places.iter().map(action);
        inside().all(|inside| inside.after >= outside.floor)
            && earlier
                .iter()
                .all(|earlier| inside().all(|inside| earlier.precedes(inside)))
            && !later.any(|later| !shown.precedes(later) && self.subject.concerns(later))
            && (!self.subject.is_counted() || self.is_certain(&earlier, inside(), outside))
    }

    /// True where what is counted was born among these actions, or `inside`, and all since are in order for certain.
    fn is_certain<'a>(
        &self,
        earlier: &[&Action],
        mut inside: impl Iterator<Item = &'a Action>,
        outside: &Outside<'_>,
    ) -> bool {
        let born = |action: &Action| self.subject.is_born(action);
        if inside.any(born) {
            return true;
        }
        let birth = earlier.iter().rposition(|action| born(action));
        if birth.is_none() && outside.floor > 0 {
            return false;
        }
        // By vCPU: the moment by which all its actions so far have happened.
        let mut done: FxHashMap<usize, u64> = FxHashMap::default();
        for (at, action) in earlier.iter().enumerate() {
            let me = action.seen.vcpu;
            let overlaps = |(vcpu, done): (&usize, &u64)| *vcpu != me && *done > action.after;
            if at >= birth.unwrap_or(0) && done.iter().any(overlaps) {
                return false;
            }
            let done = done.entry(me).or_default();
            *done = action.before.max(*done);
        }
        true
    }
}

fn furthest(open: &mut Vec<Node>) -> Option<Node> {
    let best = (0..open.len()).max_by_key(|index| open[*index].at)?;
    Some(open.swap_remove(best))
}

/// The orders that differ from that of `node` by one exchange, and where.
fn exchanges(actions: &[Action], node: &Node, concerned: &Concerned) -> Vec<(Vec<usize>, usize)> {
    let (order, places) = (&node.order, &concerned.places);
    let mut found = Vec::new();
    for (index, &first) in places.iter().enumerate() {
        if first > node.at {
            break; // The violation comes before both.
        }
        for &second in &places[index + 1..] {
            if !actions[order[first]].precedes(&actions[order[second]]) {
                let mut changed = order.clone();
                promote(actions, &mut changed[first..=second]);
                found.push((changed, first));
            }
        }
    }
    found
}

/// Puts the last of `segment` before the first, with all between them that precedes it for certain.
fn promote(actions: &[Action], segment: &mut [usize]) {
    let Some((&last, rest)) = segment.split_last() else {
        return;
    };
    let goes = |index: &&usize| actions[**index].precedes(&actions[last]);
    let ahead: Vec<usize> = rest.iter().filter(goes).copied().collect();
    let stays: Vec<usize> = rest.iter().filter(|index| !goes(index)).copied().collect();
    let changed = ahead.into_iter().chain([last]).chain(stays);
    for (place, index) in segment.iter_mut().zip(changed.collect::<Vec<_>>()) {
        *place = index;
    }
}
