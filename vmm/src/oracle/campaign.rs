//! Runs cases on both sides, until one differs or all are done; what differs is shrunk.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use abi::oracle::{Op, Residency, Span};
use abi::syscall::decode;
use guest::native::oracle::Linux;
use serde::Serialize;

use super::OracleError;
use super::calls::CALLS;
use super::case::{Step, encode, lines};
use super::executor::{Executor, Expected, Outcome};
use super::generate::Generator;
use super::observation::{Observation, OneStep, flat, is_fault};

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Number of the first case.
    pub first: u64,
    /// Cases to run.
    pub cases: u64,
    /// Steps of each.
    pub ops: usize,
    /// What they are drawn from.
    pub seed: u64,
    /// Cases of one boot.
    pub batch: usize,
    /// Batches at a time.
    pub jobs: usize,
    /// Longest time to shrink for.
    pub shrink: Duration,
    /// What may differ, and is not drawn.
    pub residency: Residency,
}

/// How far it is, for whoever watches.
#[derive(Debug, Default)]
pub struct Counts {
    /// Cases that agree.
    pub cases: AtomicU64,
    /// Tries to make a difference smaller.
    pub shrinks: AtomicU64,
}

/// What was run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Cases that agree.
    pub cases: u64,
    /// Their steps, those of children included.
    pub steps: u64,
    /// Steps by kind.
    pub kinds: BTreeMap<String, u64>,
    /// System calls that failed, by errno.
    pub errnos: BTreeMap<String, u64>,
    /// Loads and stores that faulted.
    pub faults: u64,
    /// VMAs that a step split, and that it merged.
    pub splits: u64,
    /// See `splits`.
    pub merges: u64,
    /// Most VMAs that were looked at.
    pub most_vmas: usize,
}

/// A difference.
#[derive(Clone, Debug)]
pub struct Difference {
    /// Number of the case.
    pub case: u64,
    /// The case, made as small as there was time for.
    pub steps: Vec<Step>,
    /// What Linux showed of that.
    pub expected: Expected,
    /// What the guest did.
    pub outcome: Outcome,
    /// Steps that it had at first.
    pub original: usize,
    /// Cases that were tried to make it smaller.
    pub tries: u64,
}

/// Runs cases in as many threads as the plan has jobs: to the end, to a difference, or until it is stopped.
///
/// # Errors
/// One of the sides cannot be asked.
pub fn run<E: Executor + Clone + Send>(
    plan: &Plan,
    guest: &E,
    counts: &Counts,
    stop: &AtomicBool,
) -> Result<(Summary, Option<Difference>), OracleError> {
    let shared = Shared {
        plan,
        counts,
        stop,
        next: AtomicU64::new(plan.first),
        over: AtomicBool::new(false),
    };
    // All before the first thread starts: their processes have few pages then.
    let linux = (0..plan.jobs.max(1)).map(|_| Linux::start());
    let linux = linux.collect::<Result<Vec<_>, _>>()?;
    let results: Vec<_> = std::thread::scope(|scope| {
        let jobs = linux.into_iter().map(|linux| {
            let (shared, guest) = (&shared, guest.clone());
            scope.spawn(move || {
                let mut job = Job {
                    shared,
                    guest,
                    linux,
                    generator: Generator::new(plan.seed, plan.ops, plan.residency),
                };
                let result = job.run();
                if result.is_err() {
                    shared.over.store(true, Relaxed);
                }
                result
            })
        });
        let jobs: Vec<_> = jobs.collect();
        let ended = jobs.into_iter().map(ScopedJoinHandle::join);
        ended
            .map(|ended| ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    let (mut summary, mut first) = (Summary::default(), None::<Difference>);
    for result in results {
        let (part, found) = result?;
        summary.merge(&part);
        first = match (first, found) {
            (Some(one), Some(other)) if one.case > other.case => Some(other),
            (one, other) => one.or(other),
        };
    }
    Ok((summary, first))
}

/// What jobs share.
struct Shared<'a> {
    plan: &'a Plan,
    counts: &'a Counts,
    stop: &'a AtomicBool,
    /// The next case that nobody has taken.
    next: AtomicU64,
    /// One of them has ended, so that the others do.
    over: AtomicBool,
}

/// One thread.
struct Job<'a, E> {
    shared: &'a Shared<'a>,
    guest: E,
    linux: Linux,
    generator: Generator,
}

impl<E: Executor> Job<'_, E> {
    fn run(&mut self) -> Result<(Summary, Option<Difference>), OracleError> {
        let mut summary = Summary::default();
        let plan = self.shared.plan;
        let end = plan.first.saturating_add(plan.cases);
        while !self.is_over() {
            let batch = plan.batch as u64;
            let next = self.shared.next.fetch_add(batch, Relaxed);
            if next >= end {
                // The others are to come to their ends.
                return Ok((summary, None));
            }
            let numbers = next..end.min(next + batch);
            let cases: Vec<Vec<Step>> = numbers
                .map(|number| self.generator.tree(number).current())
                .collect();
            let expected = ask_linux(&mut self.linux, next, &cases)?;
            let outcome = self.guest.execute(&expected)?;
            let agree = match &outcome {
                Outcome::Alike => cases.len(),
                Outcome::Differs { case, .. } => *case,
                Outcome::Crashed { .. } => self.first_crash(&expected)?,
                Outcome::Interrupted => break,
            };
            for (steps, expected) in cases.iter().zip(&expected).take(agree) {
                summary.add(steps, expected);
            }
            self.shared.counts.cases.fetch_add(agree as u64, Relaxed);
            if agree < cases.len() {
                self.shared.over.store(true, Relaxed);
                let number = next + agree as u64;
                return Ok((summary, Some(self.shrink(number)?)));
            }
            if let Outcome::Crashed { reason } = outcome {
                // Together they crash it, none of them alone.
                return Err(OracleError::Nonsense(reason));
            }
        }
        Ok((summary, None))
    }

    fn is_over(&self) -> bool {
        self.shared.stop.load(Relaxed) || self.shared.over.load(Relaxed)
    }

    /// The first of these cases that does not agree when it has a machine to itself; their number where there is none.
    fn first_crash(&mut self, cases: &[Expected]) -> Result<usize, OracleError> {
        for (index, case) in cases.iter().enumerate() {
            if self.guest.execute(std::slice::from_ref(case))? != Outcome::Alike {
                return Ok(index);
            }
        }
        Ok(cases.len())
    }

    /// What both sides make of one case.
    fn try_one(&mut self, number: u64, steps: &[Step]) -> Result<(Expected, Outcome), OracleError> {
        let mut expected = ask_linux(&mut self.linux, number, &[steps.to_vec()])?;
        let outcome = self.guest.execute(&expected)?;
        Ok((expected.remove(0), outcome))
    }

    /// Makes case `number`, which differs, as small as it gets.
    fn shrink(&mut self, number: u64) -> Result<Difference, OracleError> {
        let started = Instant::now();
        let mut tree = self.generator.tree(number);
        let steps = tree.current();
        let original = super::case::count(&steps);
        let (expected, outcome) = self.try_one(number, &steps)?;
        let mut best = Difference {
            case: number,
            steps,
            expected,
            outcome,
            original,
            tries: 0,
        };
        if best.outcome == Outcome::Alike {
            // Not by itself: what came before it matters.
            return Err(OracleError::Nonsense(format!(
                "case {number} differs behind others, and not alone"
            )));
        }
        let (limit, stop) = (self.shared.plan.shrink, self.shared.stop);
        let over = || started.elapsed() >= limit || stop.load(Relaxed);
        while !over() && tree.simplify() {
            loop {
                let steps = tree.current();
                // Advice may become simpler advice.
                if !super::case::is_open(&steps, self.shared.plan.residency) {
                    let (expected, outcome) = self.try_one(number, &steps)?;
                    best.tries += 1;
                    self.shared.counts.shrinks.fetch_add(1, Relaxed);
                    if matches!(outcome, Outcome::Differs { .. } | Outcome::Crashed { .. }) {
                        (best.steps, best.expected, best.outcome) = (steps, expected, outcome);
                        break;
                    }
                }
                if over() || !tree.complicate() {
                    break;
                }
            }
        }
        Ok(best)
    }
}

/// One case that was not drawn, on both sides.
///
/// # Errors
/// One of the sides cannot be asked.
pub fn compare<E: Executor>(
    guest: &mut E,
    linux: &mut Linux,
    steps: Vec<Step>,
) -> Result<(Summary, Option<Difference>), OracleError> {
    let expected = ask_linux(linux, 0, std::slice::from_ref(&steps))?.remove(0);
    let outcome = guest.execute(std::slice::from_ref(&expected))?;
    let mut summary = Summary::default();
    if matches!(outcome, Outcome::Alike | Outcome::Interrupted) {
        summary.add(&steps, &expected);
        return Ok((summary, None));
    }
    let found = Difference {
        case: 0,
        original: super::case::count(&steps),
        steps,
        expected,
        outcome,
        tries: 0,
    };
    Ok((summary, Some(found)))
}

/// Lets Linux execute `cases`, the first of which has number `first`.
fn ask_linux(
    linux: &mut Linux,
    first: u64,
    cases: &[Vec<Step>],
) -> Result<Vec<Expected>, OracleError> {
    let ops: Vec<Vec<Op>> = cases.iter().map(|steps| encode(steps)).collect();
    let mut all: Vec<Expected> = ops
        .iter()
        .map(|ops| Expected {
            ops: ops.clone(),
            spans: vec![Span::default(); ops.len()],
            words: Vec::new(),
        })
        .collect();
    let slices: Vec<&[Op]> = ops.iter().map(Vec::as_slice).collect();
    for step in linux.run(&slices)? {
        let expected = &mut all[step.case];
        expected.spans[step.step] = Span {
            start: expected.words.len() as u32,
            len: step.words.len() as u32,
        };
        expected.words.extend_from_slice(step.words);
    }
    for (index, expected) in all.iter().enumerate() {
        // Every observation has words.
        if let Some(step) = expected.spans.iter().position(|span| span.len == 0) {
            let (_, line) = lines(&cases[index]).swap_remove(step);
            let case = first + index as u64;
            return Err(OracleError::Incomplete { case, step, line });
        }
    }
    Ok(all)
}

impl Summary {
    /// Adds what was run elsewhere.
    pub fn merge(&mut self, other: &Self) {
        let add = |to: &mut BTreeMap<String, u64>, from: &BTreeMap<String, u64>| {
            for (name, count) in from {
                *to.entry(name.clone()).or_default() += count;
            }
        };
        add(&mut self.kinds, &other.kinds);
        add(&mut self.errnos, &other.errnos);
        self.cases += other.cases;
        self.steps += other.steps;
        self.faults += other.faults;
        self.splits += other.splits;
        self.merges += other.merges;
        self.most_vmas = self.most_vmas.max(other.most_vmas);
    }

    fn add(&mut self, steps: &[Step], expected: &Expected) {
        self.cases += 1;
        let flat = flat(steps);
        let mut before: Option<Observation<'_>> = None;
        for (index, step) in flat.iter().enumerate() {
            let words = expected.shown(index);
            let seen = Observation::new(words);
            let OneStep::Of(step) = step else {
                // Another process's map is next.
                before = None;
                continue;
            };
            self.steps += 1;
            *self.kinds.entry(kind(step).into()).or_default() += 1;
            match step {
                Step::Call { .. } | Step::Recorded(_) => {
                    if let Some(Err(errno)) = seen.result.first().map(|word| decode(*word)) {
                        *self.errnos.entry(errno.to_string()).or_default() += 1;
                    }
                }
                Step::Load(_) | Step::Store(..) | Step::Check(..) => {
                    let faulted = seen.result.iter().filter(|word| is_fault(**word));
                    self.faults += faulted.count() as u64;
                }
                Step::FileLoad(..) | Step::FileStore(..) | Step::Limit(..) | Step::Fork(_) => {}
            }
            if let Some(before) = before {
                let (splits, merges) = seen.changes_since(&before);
                self.splits += splits;
                self.merges += merges;
            }
            self.most_vmas = self.most_vmas.max(seen.areas().count());
            before = Some(seen);
        }
    }
}

fn kind(step: &Step) -> &'static str {
    match step {
        Step::Call { call, .. } => CALLS[*call].name,
        Step::Recorded(call) => call.name,
        Step::Load(_) => "load",
        Step::Store(..) => "store",
        Step::Check(..) => "check",
        Step::FileLoad(..) => "file load",
        Step::FileStore(..) => "file store",
        Step::Limit(..) => "limit",
        Step::Fork(_) => "fork",
    }
}
