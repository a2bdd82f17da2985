//! Bounded exhaustive search: every execution with at most so many preemptions, once up to equivalence.
//!
//! Depth first, stateless: an execution repeats the prefix of the one before up to the last choice that has
//! an alternative (VeriSoft; Godefroid, POPL 1997). The bounds are CHESS's (Musuvathi, Qadeer, PLDI 2007): a
//! vCPU that could go on is left for another one, or interrupted by an IPI, at the cost of one preemption.
//! An IPI that arrives at one that is not running costs none. As in CHESS the bound grows from 0, so what is
//! found needs no more preemptions than it has, and a search that is ended early is complete for the
//! bounds before.
//!
//! **Reduction.** Two executions are equivalent where they differ only in the order of steps that touch
//! nothing in common ([footprints](crate::explore::footprint)), that is, where they have the same
//! [happens-before relation](crate::explore::trace); then they end in the same state and in the same
//! judgement of every monitor. Dynamic partial-order reduction (Flanagan, Godefroid, POPL 2005; Abdulla et
//! al., POPL 2014) takes fewer executions without a bound, but is unsound with one: the execution that stands
//! for all the others may be one with too many preemptions (Coons, Musuvathi, McKinley, OOPSLA 2013). So
//! there are no backtrack sets here, every enabled step is tried, and only these two are left out:
//! - *Visited.* A prefix that is equivalent to one that was visited with as much freedom is not continued.
//!   Freedom is what decides, besides the state, what the bounds and the driver's fairness allow ([`Visit`]):
//!   who ran last, how many preemptions are left, who has just waited for anyone, and whose turn it is where
//!   nobody gets anywhere.
//! - *Asleep.* A step that was taken before, and of which all that happened since is independent, would do
//!   the same now (as in Godefroid's sleep sets); so its fingerprint is known without running it, and it
//!   need not be run where the first rule would end it. Unlike in a sleep set it is run otherwise. An IPI's
//!   arrival is known without running it, and is left out where all that can follow it would be.
//!
//! *Why nothing is lost.* Let `e1 … en` be an execution within the bound. Of each of its prefixes some
//! equivalent one with as much freedom is visited and continued. So it is of the empty one. If it is of
//! `e1 … ei`, then `e(i+1)` is enabled there too, costs no more than the freedom that is left over (by
//! [`Visit::covers`]), and leads to a prefix equivalent to `e1 … e(i+1)` with as much freedom: that one is
//! continued, or another that covers it was. Equivalent prefixes are equally long, so none is left out in
//! favour of itself, and with several workers each that was visited is continued by somebody.
//!
//! What is not in it: fingerprints have 64 bits, so of a million prefixes two different ones are taken for
//! the same with a probability of 3 in 10^8; executions longer than [`Bounds::steps`] are counted and not
//! varied further; and the driver is fair, so a vCPU that waits for anyone is not run twice in a row, nor
//! are others passed by for ever by those who only wait.

mod explored;
mod node;
mod shared;
mod turns;
mod visited;

use std::sync::Arc;

use abi::point::Wait;

pub use explored::{Explored, Within};
use node::{Candidate, Node};
use shared::Shared;
use turns::Turns;
use visited::Visit;

use crate::explore::footprint::{Footprint, Footprints};
use crate::explore::trace::Trace;
use crate::explore::{Actor, Choice, Schedule, Scheduler, Standing, View};

/// What bounds a search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Preemptions; none: any number.
    pub preemptions: Option<u32>,
    /// Steps after which nothing is varied any more.
    pub steps: usize,
    /// Prefixes that are kept in mind (25 to 60 bytes each); later ones are still explored, but perhaps more
    /// than once.
    pub prefixes: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            preemptions: Some(2),
            steps: 10_000,
            prefixes: 20_000_000,
        }
    }
}

/// Whether equivalent executions are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// Every one is run: for tests of the reduction, and of footprints.
    None,
    /// One of each is.
    Traces,
}

/// One worker of a search. See the module.
#[derive(Debug)]
pub struct Exhaustive {
    bounds: Bounds,
    reduction: Reduction,
    shared: Arc<Shared>,
    /// Counted since the others were told.
    counted: Within,
    /// It has a part to explore, of which `nodes` are the path.
    busy: bool,
    /// An execution has begun and is not over.
    runs: bool,
    nodes: Vec<Node>,
    /// Preemptions that executions of the part may have.
    preemptions: Option<u32>,
    /// Steps of this execution that are over, and how many of them are the old ones.
    at: usize,
    prefix: usize,
    /// The step under way, with where its vCPU stood before it.
    under_way: Option<(Actor, Standing)>,
    last_vcpu: Option<u8>,
    turns: Turns,
    footprints: Footprints,
    trace: Trace,
    /// It was given up: its end is not known.
    given_up: bool,
    /// Fingerprint of the last execution, with who took its last step.
    end: Option<u64>,
}

const NOWHERE: Standing = Standing {
    point: None,
    args: [0; 2],
};

impl Exhaustive {
    /// A search, and its first worker.
    #[must_use]
    pub fn new(bounds: Bounds, reduction: Reduction) -> Self {
        Self::of(bounds, reduction, Arc::new(Shared::new(&bounds)))
    }

    /// Another worker of the same search, for another engine of the same scenario. Workers are dropped when
    /// they are not to go on: others would wait for their parts.
    #[must_use]
    pub fn worker(&self) -> Self {
        Self::of(self.bounds, self.reduction, Arc::clone(&self.shared))
    }

    fn of(bounds: Bounds, reduction: Reduction, shared: Arc<Shared>) -> Self {
        Self {
            bounds,
            reduction,
            shared,
            counted: Within::default(),
            busy: false,
            runs: false,
            nodes: Vec::new(),
            preemptions: None,
            at: 0,
            prefix: 0,
            under_way: None,
            last_vcpu: None,
            turns: Turns::default(),
            footprints: Footprints::default(),
            trace: Trace::default(),
            given_up: false,
            end: None,
        }
    }

    /// What the search has come to so far: all workers that are between two executions, or dropped.
    #[must_use]
    pub fn explored(&self) -> Explored {
        let mut explored = self.shared.explored();
        explored.reached_mut().add(self.counted);
        explored
    }

    /// The bound that the search has reached, and what was counted within it.
    #[must_use]
    pub fn reached(&self) -> Within {
        self.shared.reached()
    }

    /// Notes that the last execution failed. False: an equivalent one did before, with a smaller bound or in
    /// another worker.
    #[must_use]
    pub fn fails_anew(&self) -> bool {
        self.end.is_none_or(|end| self.shared.failed(end))
    }

    /// Goes to what is to be explored next. False: nothing is.
    fn find_work(&mut self) -> bool {
        if self.shared.note(&mut self.counted)
            && self.busy
            && let Some(part) = self.split()
        {
            self.shared.give(part);
        }
        if self.busy && !self.backtrack() {
            self.busy = false;
            self.shared.put_back(&mut self.counted, false);
        }
        if !self.busy {
            let Some((part, preemptions)) = self.shared.take() else {
                return false;
            };
            self.busy = true;
            self.nodes = part;
            self.preemptions = preemptions;
        }
        true
    }

    /// Goes to the next alternative of the deepest choice that has one. False: there is none.
    fn backtrack(&mut self) -> bool {
        while let Some(mut node) = self.nodes.pop() {
            node.advance();
            if self.find_candidate(&mut node) {
                self.nodes.push(node);
                return true;
            }
        }
        false
    }

    /// Parts with the alternatives of the first choice that has any: what is to be explored there is most.
    fn split(&mut self) -> Option<Vec<Node>> {
        for at in 0..self.nodes.len() {
            let mut other = self.nodes[at].clone();
            other.advance();
            self.nodes[at].settle();
            if self.find_candidate(&mut other) {
                let path = self.nodes[..at].iter().cloned();
                return Some(path.chain([other]).collect());
            }
        }
        None
    }

    /// Goes on to the first candidate that is worth it. False: none is.
    fn find_candidate(&mut self, node: &mut Node) -> bool {
        while let Some(candidate) = node.candidates.get(node.chosen) {
            if self.worth_it(node, *candidate) {
                return true;
            }
            node.chosen += 1;
        }
        false
    }

    /// Preemptions that it takes: one where the vCPU that ran last could go on, but another one does, or
    /// an IPI interrupts it.
    fn cost(&self, last: Option<(u8, bool)>, actor: Actor) -> u32 {
        let preempts = match (last, actor) {
            (Some((vcpu, true)), Actor::Vcpu(next)) => next != vcpu,
            (Some((vcpu, true)), Actor::Wire(to) | Actor::Disk(to)) => to == vcpu,
            _ => false,
        };
        (preempts && self.preemptions.is_some()).into()
    }

    /// True where the candidate is within the bounds and may lead to what was not seen before.
    fn worth_it(&mut self, node: &Node, candidate: Candidate) -> bool {
        let cost = self.cost(node.last, candidate.actor);
        let Some(left) = node.left.checked_sub(cost) else {
            self.counted.out_of_bounds += 1;
            return false;
        };
        let known = candidate.next.is_some_and(|next| {
            self.was_seen(node, candidate.actor, next, left)
                || matches!(candidate.actor, Actor::Wire(_))
                    && self.comes_too_early(node, candidate.actor, next, left)
        });
        self.counted.asleep += u64::from(known);
        !known
    }

    /// True where something as good as `next` was visited: what comes of a known step of `actor`.
    fn was_seen(&self, node: &Node, actor: Actor, next: u64, left: u32) -> bool {
        // The step is one that gets on, or an IPI: nobody is held after it, and whether the vCPU that ran
        // last could go on is the same wherever this state was visited.
        let vcpu = actor.vcpu().or(node.last.map(|(vcpu, _)| vcpu));
        let visit = Visit {
            last: vcpu.map(|vcpu| (vcpu, true)),
            left,
            held: 0,
            turns: 0,
            wires: true,
        };
        self.shared.visited.covers(next, &visit)
    }

    /// True where the IPI may as well arrive later: whoever can take a step after it has done the same
    /// before it, and what came of that and of the IPI was visited. One step ahead of that rule itself, for
    /// there are many places where an IPI could arrive.
    fn comes_too_early(&self, node: &Node, wire: Actor, next: u64, left: u32) -> bool {
        let Actor::Wire(to) = wire else { return false };
        let can = |actor| node.candidates.iter().any(|other| other.actor == actor);
        if node.holds || !can(Actor::Vcpu(to)) {
            // It lets somebody take a step who could not before.
            return false;
        }
        let print = Footprint::of_wire(to.into());
        let rest = node.candidates.iter().filter(|other| other.actor != wire);
        rest.into_iter().all(|other| {
            let Some(left) = left.checked_sub(self.cost(node.last, other.actor)) else {
                return true;
            };
            let (Some(alone), Some(its)) = (other.next, node.print_of(other.actor)) else {
                return false;
            };
            // Steps that are independent have the same clocks in both orders.
            let both = alone.wrapping_add(next).wrapping_sub(node.at);
            its.independent(&print) && self.was_seen(node, other.actor, both, left)
        })
    }

    /// Takes note of the step that is over.
    fn step_over(&mut self, view: &View<'_>) {
        let Some((actor, from)) = self.under_way.take() else {
            return;
        };
        let vcpus = view.standing.len();
        if self.at < self.prefix {
            // Old steps, several of one vCPU at once.
            let passed = match (actor, view.last) {
                (Actor::Vcpu(vcpu), Some((_, passed))) => {
                    let vcpu = usize::from(vcpu);
                    self.footprints.follow(vcpu, vcpus, view.events);
                    passed.max(1) as usize
                }
                _ => 1,
            };
            let until = (self.at + passed).min(self.prefix);
            for node in &self.nodes[self.at..until] {
                let print = node.print.as_ref().expect("the step was taken before");
                self.trace.step(actor, print);
            }
            self.at = until;
            return;
        }
        let standing = |vcpu: u8| view.standing[usize::from(vcpu)];
        let to = actor.vcpu().map_or(NOWHERE, standing);
        let print = self.footprints.step(actor, vcpus, from, to, view.events);
        self.trace.step(actor, &print);
        let node = &mut self.nodes[self.at];
        node.print = Some(print);
        node.gets_on = view.idle_turns == 0 && to.wait() != Some(Wait::Anyone);
        if self.reduction == Reduction::Traces && node.gets_on {
            node.candidates[node.chosen].next = Some(self.trace.fingerprint());
        }
        self.at += 1;
    }

    /// Adds the choice at the end of what was explored so far. False: not worth going on.
    fn grow(&mut self, view: &View<'_>) -> bool {
        let visit = self.visit(view);
        let reduces = self.reduction == Reduction::Traces;
        if reduces && !self.shared.visited.insert(self.trace.fingerprint(), visit) {
            return false;
        }
        let mut node = Node {
            chosen: 0,
            candidates: Vec::with_capacity(view.enabled.len()),
            last: visit.last,
            left: visit.left,
            holds: visit.held != 0,
            at: self.trace.fingerprint(),
            print: None,
            gets_on: false,
            known: Vec::new(),
        };
        if reduces {
            self.inherit(&mut node);
        }
        let current = self.last_vcpu.map(Actor::Vcpu);
        let first = view.enabled.iter().filter(|actor| Some(**actor) == current);
        let rest = view.enabled.iter().filter(|actor| Some(**actor) != current);
        for &actor in first.chain(rest) {
            let print = node.print_of(actor).filter(|_| reduces);
            let next = print.map(|print| self.trace.peek(actor, &print));
            node.candidates.push(Candidate { actor, next });
        }
        if self.at >= self.bounds.steps {
            self.counted.too_long += u64::from(self.at == self.bounds.steps);
            node.candidates.truncate(1);
        }
        let is_worth_it = self.find_candidate(&mut node);
        if is_worth_it {
            self.nodes.push(node);
        }
        is_worth_it
    }

    /// How free the next choice is.
    fn visit(&self, view: &View<'_>) -> Visit {
        let last = self.last_vcpu;
        let held = |vcpu: usize| {
            let could = matches!(view.standing[vcpu].wait(), None | Some(Wait::Anyone));
            could && !view.can(Actor::Vcpu(vcpu as u8))
        };
        let is_wire = |actor: &Actor| actor.vcpu().is_none();
        Visit {
            last: last.map(|vcpu| (vcpu, view.can(Actor::Vcpu(vcpu)))),
            left: match self.nodes.last() {
                Some(node) => node.left - self.cost(node.last, node.actor()),
                None => self.preemptions.unwrap_or(u32::MAX),
            },
            held: (0..view.standing.len()).fold(0, |set, vcpu| set | u16::from(held(vcpu)) << vcpu),
            turns: self.turns.print(view.idle_turns),
            wires: view.enabled.iter().any(is_wire),
        }
    }

    /// Steps that would do the same after the last one as before it.
    fn inherit(&self, node: &mut Node) {
        let Some(parent) = self.nodes.last() else {
            return;
        };
        let taken = parent.actor();
        let print = parent.print.as_ref().expect("its step is over");
        let known = parent.known.iter();
        let same = known.filter(|(actor, known)| *actor != taken && known.independent(print));
        node.known.extend(same.cloned());
    }
}

impl Scheduler for Exhaustive {
    fn begin(&mut self) -> bool {
        if !self.find_work() {
            return false;
        }
        self.counted.executions += 1;
        self.runs = true;
        // The last step is taken anew.
        self.prefix = self.nodes.len().saturating_sub(1);
        self.at = 0;
        self.under_way = None;
        self.last_vcpu = None;
        self.turns.begin();
        self.footprints.begin();
        self.given_up = false;
        true
    }

    fn choose(&mut self, view: &View<'_>) -> Option<Choice> {
        if view.last.is_none() {
            self.trace.begin(view.standing.len());
        }
        self.step_over(view);
        if self.at == self.nodes.len() && !self.grow(view) {
            self.counted.given_up += 1;
            self.given_up = true;
            return None;
        }
        let actor = self.nodes[self.at].actor();
        let points = match actor {
            Actor::Vcpu(_) if self.at < self.prefix => {
                let old = self.nodes[self.at..self.prefix].iter();
                old.take_while(|node| node.actor() == actor).count() as u64
            }
            _ => 1,
        };
        let from = match actor {
            Actor::Vcpu(vcpu) => {
                self.last_vcpu = Some(vcpu);
                self.turns.ran(vcpu);
                view.standing[usize::from(vcpu)]
            }
            Actor::Wire(_) | Actor::Disk(_) => NOWHERE,
        };
        self.under_way = Some((actor, from));
        Some(Choice { actor, points })
    }

    fn end(&mut self, _ran: &Schedule) {
        self.runs = false;
        // A step that ended the execution stays without a footprint: it is not known what it did. But it
        // does the same in the same state.
        let last = self.under_way.take().map(|(actor, _)| actor);
        self.end = (!self.given_up).then(|| self.trace.end(last));
        if let Some(end) = self.end {
            self.counted.schedules += u64::from(self.shared.ended(end));
        }
    }
}

impl Drop for Exhaustive {
    /// Whoever waits for a part of this worker's waits in vain, unless it was through with it.
    fn drop(&mut self) {
        if self.busy {
            // One that was stopped counts for nothing, and is still to be explored.
            self.counted.executions -= u64::from(self.runs);
            let given_up = self.runs || self.backtrack();
            self.shared.put_back(&mut self.counted, given_up);
        }
    }
}
