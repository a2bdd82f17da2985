//! What comes after a campaign: what was found is minimised, written and told; with two engines, compared.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::both::{Clean, Second};
use super::{names, trace};
use crate::cli::args::Explore;
use crate::cli::failure::Failure;
use crate::cli::interrupt;
use crate::cli::output::shell_word;
use crate::explore::campaign::{Found, Plan, Worker, failure_id};
use crate::explore::{Execution, Kept, Source, compare, switches};
use crate::report::story;
use crate::reproducer::{Reproducer, ReproducerError};
use crate::scenario::Scenario;

/// Runs that the search for a smaller schedule may take.
const MINIMISE_RUNS: usize = 2_000;
/// Time that it may take; what was found by then is written.
const MINIMISE_TIME: Duration = Duration::from_secs(20);

/// See the module.
pub(super) struct Aftermath {
    /// For a person.
    pub(super) text: String,
    /// Files of the reproducers.
    pub(super) reproducers: Vec<PathBuf>,
    /// For a person: how to replay each, or its text where it could not be written.
    kept: Vec<String>,
    /// What came to nothing first.
    pub(super) failed: Option<Failure>,
    /// What the second engine says, where there is one.
    pub(super) confirmed: Option<Value>,
    /// False: one of the engines has a defect.
    pub(super) engines_agree: bool,
    /// File of the timeline.
    pub(super) traced: Option<PathBuf>,
}

/// Reproducers of what a campaign that goes on has found, written at once and not yet minimised: whatever ends
/// it, they are there.
pub(super) struct Early<'a> {
    source: &'a Source,
    options: &'a Explore,
    plan: &'a Plan,
    /// When no more clean schedules are confirmed.
    until: Option<Instant>,
    /// By kind of failure; none where the file could not be written, which is told at the end.
    written: Mutex<BTreeMap<String, Option<PathBuf>>>,
}

impl<'a> Early<'a> {
    pub(super) fn new(source: &'a Source, options: &'a Explore, plan: &'a Plan) -> Self {
        Self {
            source,
            options,
            plan,
            until: options
                .time_limit
                .and_then(|limit| Instant::now().checked_add(limit)),
            written: Mutex::default(),
        }
    }

    /// Writes the first of each kind.
    pub(super) fn keep(&self, found: &Found) {
        if self.plan.first {
            return;
        }
        let id = failure_id(&found.execution.ending).expect("it was found");
        let mut written = self.written.lock().expect("no job panics");
        written.entry(id).or_insert_with_key(|id| {
            let reproducer = self.reproducer(found, &found.execution, id);
            reproducer.write(&self.options.out, &self.stem(id)).ok()
        });
    }

    /// Writes what the failure `id` was minimised to: in place of the early one, where there is one.
    fn write(&self, id: &str, reproducer: &Reproducer) -> Result<PathBuf, ReproducerError> {
        let written = self.written.lock().expect("no job panics");
        match written.get(id) {
            Some(Some(path)) => reproducer.replace(path).map(|()| path.clone()),
            _ => reproducer.write(&self.options.out, &self.stem(id)),
        }
    }

    fn stem(&self, id: &str) -> String {
        format!("{}-{}", self.source.scenario().name, id.to_lowercase())
    }

    fn reproducer(&self, found: &Found, small: &Execution, id: &str) -> Reproducer {
        let found_by = format!(
            "{:?} seed {} execution {} on {}",
            self.plan.strategy,
            self.plan.seed,
            found.index,
            self.source.kind()
        );
        let stream = (small.events.len() as u64, compare::digest(&small.events));
        let mut scenario = self.source.scenario().clone();
        scenario.fails.clone_from(&small.fails);
        Reproducer::new(&scenario, &small.schedule, found_by, id.into(), stream)
            .with_window(self.source.window())
    }
}

impl Aftermath {
    /// Of a campaign that has `found` failures and a `sample` of what was well. What was found is told even where
    /// something else fails.
    pub(super) fn of(
        early: &Early<'_>,
        found: &[Found],
        sample: &[Kept],
        second: Option<Second>,
    ) -> Self {
        let mut this = Self {
            text: String::new(),
            reproducers: Vec::new(),
            kept: Vec::new(),
            failed: None,
            confirmed: None,
            engines_agree: true,
            traced: None,
        };
        if !found.is_empty() || !sample.is_empty() || second.is_some() {
            let worked = this.work(early, found, sample, second);
            this.note(worked);
        }
        this
    }

    fn note<T>(&mut self, worked: Result<T, impl Into<Failure>>) -> Option<T> {
        worked
            .map_err(|error| {
                self.failed.get_or_insert_with(|| error.into());
            })
            .ok()
    }

    fn work(
        &mut self,
        early: &Early<'_>,
        found: &[Found],
        sample: &[Kept],
        mut second: Option<Second>,
    ) -> Result<(), Failure> {
        let Early {
            source,
            options,
            plan,
            ..
        } = *early;
        let this = self;
        let scenario = source.scenario();
        let mut worker = Worker::new(source.driver()?, &Plan::replay_of(scenario))?;
        let clean = match &mut second {
            Some(second) => {
                let clean = Clean::run(sample, plan.sample, early.until, &mut worker, second);
                this.note(clean)
            }
            None => None,
        };
        if let Some(clean) = &clean {
            this.engines_agree &= clean.holds();
            this.text.push_str(&clean.text());
        }
        let interrupt = interrupt::on_ctrl_c();
        let mut violations = Vec::new();
        let mut told: Vec<String> = Vec::new();
        for found in found {
            let id = failure_id(&found.execution.ending).expect("it was found");
            if told.contains(&id) {
                continue;
            }
            told.push(id.clone());
            let until = Instant::now() + MINIMISE_TIME;
            let goes_on = move || !interrupt.requested() && Instant::now() < until;
            let minimised = worker.minimise(&found.execution, MINIMISE_RUNS, goes_on);
            let minimised = this.note(minimised);
            let small = minimised.as_ref().unwrap_or(&found.execution);
            let reproducer = early.reproducer(found, small, &id);
            let path = this.note(early.write(&id, &reproducer));
            let kept = match &path {
                Some(path) => format!("  replay with: stalemate replay {}\n", shell_word(path)),
                None => format!(
                    "  its reproducer could not be written; replay this from a file of yours:\n\n{}",
                    reproducer.to_text()
                ),
            };
            this.text
                .push_str(&(chapter(scenario, found, small) + &kept));
            this.kept.push(kept);
            this.reproducers.extend(path.clone());
            let traced = this.trace(options, small, scenario);
            this.note(traced);
            if let Some(second) = &mut second {
                let confirmation = second.confirm(small)?;
                this.engines_agree &= confirmation.holds();
                this.text.push_str(&format!("  {confirmation}\n"));
                violations.push(json!({
                    "failure": id,
                    "reproducer": path,
                    "confirmation": confirmation,
                }));
            }
        }
        if let Some(kept) = sample.first() {
            worker.arm(&kept.fails);
            let run = worker.replay(&kept.schedule)?;
            this.trace(options, &run, scenario)?;
        }
        this.confirmed =
            clean.map(|clean| json!({ "clean": clean.json(), "violations": violations }));
        Ok(())
    }

    /// The reproducers, and that the engines differ where they do.
    pub(super) fn files(&self) -> String {
        let mut text = self.kept.concat();
        if !self.engines_agree {
            text.push_str("  ✘ the engines differ: a defect of one of them\n");
        }
        text
    }

    /// Draws `run` where a timeline was asked for and there is none yet.
    fn trace(
        &mut self,
        options: &Explore,
        run: &Execution,
        scenario: &Scenario,
    ) -> Result<(), Failure> {
        if self.traced.is_none()
            && let Some(path) = &options.trace
        {
            self.text.push_str(&trace::write(path, run, scenario)?);
            self.traced = Some(path.clone());
        }
        Ok(())
    }
}

fn chapter(scenario: &Scenario, found: &Found, small: &Execution) -> String {
    let before = &found.execution.schedule;
    let failing = match names(&small.fails).join(", ") {
        fails if fails.is_empty() => fails,
        fails => format!(", with {fails} failing"),
    };
    format!(
        "\nexecution {}, minimised from {} context switches to {}{failing}:\n\n{}\n",
        found.index,
        switches(before),
        switches(&small.schedule),
        story::tell(small, scenario.vcpus as usize)
    )
}
