//! Bounded exhaustive search: every execution with at most so many preemptions, once.
//!
//! Depth first, stateless: an execution repeats the prefix of the one before up to the last choice that has
//! an alternative (VeriSoft; Godefroid, POPL 1997). The bounds are CHESS's (Musuvathi, Qadeer, PLDI 2007):
//! leaving a vCPU that could go on costs one preemption, whether for another vCPU or for an IPI that
//! arrives just then; what was left may be taken up again after the IPI for nothing.
//!
//! **Reduction.** Of executions that differ only in the order of independent steps one is enough. Two rules,
//! both over [happens-before fingerprints](crate::explore::trace):
//! - *Visited.* A prefix that is equivalent to one from which as much could be done is not continued.
//! - *Asleep.* A step that was taken before, and of which all that happened since is independent, would do
//!   the same now (as in Godefroid's sleep sets); so its fingerprint is known without running it, and it
//!   need not be run where that was visited.
//!
//! Dynamic partial-order reduction (Flanagan, Godefroid, POPL 2005; Abdulla et al., POPL 2014) takes
//! fewer executions without a bound, but is unsound with one: the execution that stands for all the others
//! may be one with too many preemptions (Coons, Musuvathi, McKinley, OOPSLA 2013). Here "visited" says with
//! how many preemptions left, so a bounded search reaches every final state, and every judgement of a
//! monitor, that the same search without reduction reaches. Fingerprints have 64 bits: of a million prefixes
//! two different ones are taken for the same with a probability of 3 in 10^8.

use rustc_hash::FxHashMap;

use abi::point::Wait;

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
    /// Prefixes that are kept in mind (24 bytes each and more); later ones are still explored,
    /// but perhaps more than once.
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

/// What a search came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Explored {
    /// Executions, pruned ones included.
    pub executions: u64,
    /// Executions that were given up as equivalent to earlier ones.
    pub pruned: u64,
    /// Alternatives that were left out without running them.
    pub asleep: u64,
    /// Alternatives that would have taken more preemptions than allowed.
    pub out_of_bounds: u64,
    /// Executions longer than the bound on steps.
    pub too_long: u64,
    /// Nothing within the bounds is left.
    pub exhausted: bool,
}

/// A choice, and what else could be chosen.
#[derive(Debug)]
struct Node {
    /// Who is chosen: an index of `candidates`.
    chosen: usize,
    /// In the order in which they are tried.
    candidates: Vec<Candidate>,
    /// The vCPU that ran last, and whether it could go on.
    last: Option<(u8, bool)>,
    /// Preemptions left.
    left: u32,
    /// The step that was taken; none while it is not over, or where it ended the execution.
    print: Option<Footprint>,
    /// Steps whose effect here is known.
    known: Vec<(Actor, Footprint)>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    actor: Actor,
    /// Fingerprint after its step, where that is known.
    next: Option<u64>,
}

/// From where something was explored.
#[derive(Clone, Copy, Debug)]
struct Visit {
    last: Option<(u8, bool)>,
    left: u32,
    /// vCPUs that could run in this state, but did not have their turn: they have just waited for anyone.
    held: u16,
    /// An IPI was on its way.
    wires: bool,
}

impl Visit {
    /// True where whatever can be done from `other` could be done from here.
    fn covers(&self, other: &Self) -> bool {
        if self.held & !other.held != 0 {
            return false;
        }
        let vcpu = |last: Option<(u8, bool)>| last.map(|(vcpu, _)| vcpu);
        if vcpu(self.last) == vcpu(other.last) {
            return self.left >= other.left;
        }
        // Whoever is to run next can, for one preemption where the last one could go on. IPIs that
        // arrive before that could each cost one more.
        let could_go_on = self.last.is_some_and(|(_, could)| could);
        !self.wires && self.left >= other.left.saturating_add(could_go_on.into())
    }
}

/// See the module.
#[derive(Debug)]
pub struct Exhaustive {
    bounds: Bounds,
    reduction: Reduction,
    explored: Explored,
    nodes: Vec<Node>,
    /// Steps of this execution that are over, and how many of them are the old ones.
    at: usize,
    prefix: usize,
    /// The step under way, with where its vCPU stood before it.
    under_way: Option<(Actor, Standing)>,
    last_vcpu: Option<u8>,
    footprints: Footprints,
    trace: Trace,
    visited: FxHashMap<u64, Vec<Visit>>,
    kept: usize,
}

const NOWHERE: Standing = Standing {
    point: None,
    args: [0; 2],
};

impl Exhaustive {
    /// A search.
    #[must_use]
    pub fn new(bounds: Bounds, reduction: Reduction) -> Self {
        Self {
            bounds,
            reduction,
            explored: Explored::default(),
            nodes: Vec::new(),
            at: 0,
            prefix: 0,
            under_way: None,
            last_vcpu: None,
            footprints: Footprints::default(),
            trace: Trace::default(),
            visited: FxHashMap::default(),
            kept: 0,
        }
    }

    /// What it has come to so far.
    #[must_use]
    pub fn explored(&self) -> Explored {
        self.explored
    }

    /// Goes to the next alternative of the deepest choice that has one. False: there is none.
    fn backtrack(&mut self) -> bool {
        while let Some(mut node) = self.nodes.pop() {
            let taken = node.candidates[node.chosen].actor;
            if let Some(print) = node.print.take()
                && !node.known.iter().any(|(actor, _)| *actor == taken)
            {
                node.known.push((taken, print));
            }
            node.chosen += 1;
            while let Some(candidate) = node.candidates.get(node.chosen) {
                if self.worth_it(&node, *candidate) {
                    self.nodes.push(node);
                    return true;
                }
                node.chosen += 1;
            }
        }
        false
    }

    fn cost(&self, last: Option<(u8, bool)>, actor: Actor) -> u32 {
        match last {
            Some((vcpu, true)) if actor != Actor::Vcpu(vcpu) => {
                self.bounds.preemptions.is_some().into()
            }
            _ => 0,
        }
    }

    /// True where the candidate is within the bounds and may lead to what was not seen before.
    fn worth_it(&mut self, node: &Node, candidate: Candidate) -> bool {
        let cost = self.cost(node.last, candidate.actor);
        let Some(left) = node.left.checked_sub(cost) else {
            self.explored.out_of_bounds += 1;
            return false;
        };
        let last = match candidate.actor {
            // It may go on or not; nothing is said of it that is not so.
            Actor::Vcpu(vcpu) => Some((vcpu, true)),
            Actor::Wire(_) => node.last,
        };
        let visit = Visit {
            last,
            left,
            held: 0,
            wires: true,
        };
        let known = candidate
            .next
            .is_some_and(|next| self.was_visited(next, &visit));
        self.explored.asleep += u64::from(known);
        !known
    }

    fn was_visited(&self, fingerprint: u64, visit: &Visit) -> bool {
        let visits = self.visited.get(&fingerprint);
        visits.is_some_and(|visits| visits.iter().any(|known| known.covers(visit)))
    }

    /// Notes the visit. False: something as good was visited before.
    fn visit(&mut self, visit: Visit) -> bool {
        let fingerprint = self.trace.fingerprint();
        if self.was_visited(fingerprint, &visit) {
            return false;
        }
        if self.kept < self.bounds.prefixes {
            self.kept += 1;
            self.visited.entry(fingerprint).or_default().push(visit);
        }
        true
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
        let to = match actor {
            Actor::Vcpu(vcpu) => view.standing[usize::from(vcpu)],
            Actor::Wire(_) => NOWHERE,
        };
        let print = self.footprints.step(actor, vcpus, from, to, view.events);
        self.trace.step(actor, &print);
        self.nodes[self.at].print = Some(print);
        self.at += 1;
    }

    /// Adds the choice at the end of what was explored so far. False: not worth going on.
    fn grow(&mut self, view: &View<'_>) -> bool {
        let current = self.last_vcpu.map(Actor::Vcpu);
        let last = self
            .last_vcpu
            .map(|vcpu| (vcpu, view.can(Actor::Vcpu(vcpu))));
        let left = match self.nodes.last() {
            Some(node) => node.left - self.cost(node.last, node.candidates[node.chosen].actor),
            None => self.bounds.preemptions.unwrap_or(u32::MAX),
        };
        let held = |vcpu: usize| {
            let could = matches!(view.standing[vcpu].wait(), None | Some(Wait::Anyone));
            could && !view.can(Actor::Vcpu(vcpu as u8))
        };
        let visit = Visit {
            last,
            left,
            held: (0..view.standing.len()).fold(0, |set, vcpu| set | u16::from(held(vcpu)) << vcpu),
            wires: view
                .enabled
                .iter()
                .any(|actor| matches!(actor, Actor::Wire(_))),
        };
        if self.reduction == Reduction::Traces && !self.visit(visit) {
            return false;
        }
        let mut node = Node {
            chosen: 0,
            candidates: Vec::with_capacity(view.enabled.len()),
            last,
            left,
            print: None,
            known: Vec::new(),
        };
        if self.reduction == Reduction::Traces {
            self.inherit(&mut node);
        }
        let first = view.enabled.iter().filter(|actor| Some(**actor) == current);
        let rest = view.enabled.iter().filter(|actor| Some(**actor) != current);
        for &actor in first.chain(rest) {
            let known = node.known.iter().find(|(known, _)| *known == actor);
            let next = known.map(|(_, print)| self.trace.peek(actor, print));
            node.candidates.push(Candidate { actor, next });
        }
        if self.at >= self.bounds.steps {
            self.explored.too_long += u64::from(self.at == self.bounds.steps);
            node.candidates.truncate(1);
        }
        while let Some(candidate) = node.candidates.get(node.chosen) {
            if self.worth_it(&node, *candidate) {
                self.nodes.push(node);
                return true;
            }
            node.chosen += 1;
        }
        false
    }

    /// Steps that would do the same after the last one as before it.
    fn inherit(&self, node: &mut Node) {
        let Some(parent) = self.nodes.last() else {
            return;
        };
        let taken = parent.candidates[parent.chosen].actor;
        let print = parent.print.as_ref().expect("its step is over");
        let same =
            |(actor, known): &&(Actor, Footprint)| *actor != taken && known.independent(print);
        node.known.extend(parent.known.iter().filter(same).cloned());
    }
}

impl Scheduler for Exhaustive {
    fn begin(&mut self) -> bool {
        if self.explored.exhausted || self.explored.executions > 0 && !self.backtrack() {
            self.explored.exhausted = true;
            return false;
        }
        self.explored.executions += 1;
        // The last step is taken anew.
        self.prefix = self.nodes.len().saturating_sub(1);
        self.at = 0;
        self.under_way = None;
        self.last_vcpu = None;
        self.footprints.begin();
        true
    }

    fn choose(&mut self, view: &View<'_>) -> Option<Choice> {
        if view.last.is_none() {
            self.trace.begin(view.standing.len());
        }
        self.step_over(view);
        if self.at == self.nodes.len() && !self.grow(view) {
            self.explored.pruned += 1;
            return None;
        }
        let chosen = |node: &Node| node.candidates[node.chosen].actor;
        let actor = chosen(&self.nodes[self.at]);
        let points = match actor {
            Actor::Vcpu(_) if self.at < self.prefix => {
                let old = self.nodes[self.at..self.prefix].iter();
                old.take_while(|node| chosen(node) == actor).count() as u64
            }
            _ => 1,
        };
        let from = match actor {
            Actor::Vcpu(vcpu) => {
                self.last_vcpu = Some(vcpu);
                view.standing[usize::from(vcpu)]
            }
            Actor::Wire(_) => NOWHERE,
        };
        self.under_way = Some((actor, from));
        Some(Choice { actor, points })
    }

    fn end(&mut self, _ran: &Schedule) {
        // A step that ended the execution stays without a footprint: it is not known what it did.
        self.under_way = None;
    }
}
