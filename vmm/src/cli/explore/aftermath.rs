//! What comes after a campaign: what was found is minimised, written and told; with two engines, compared.

use std::path::{Path, PathBuf};
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
use crate::reproducer::Reproducer;
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
    /// What the second engine says, where there is one.
    pub(super) confirmed: Option<Value>,
    /// False: one of the engines has a defect.
    pub(super) engines_agree: bool,
    /// File of the timeline.
    pub(super) traced: Option<PathBuf>,
}

impl Aftermath {
    /// Of a campaign that has `found` failures and a `sample` of what was well.
    pub(super) fn of(
        source: &Source,
        options: &Explore,
        plan: &Plan,
        found: &[Found],
        sample: &[Kept],
        mut second: Option<Second>,
    ) -> Result<Self, Failure> {
        let mut this = Self {
            text: String::new(),
            reproducers: Vec::new(),
            confirmed: None,
            engines_agree: true,
            traced: None,
        };
        if found.is_empty() && sample.is_empty() && second.is_none() {
            return Ok(this);
        }
        let scenario = source.scenario();
        let mut worker = Worker::new(source.driver()?, plan)?;
        let clean = match &mut second {
            Some(second) => Some(Clean::run(sample, plan.sample, &mut worker, second)?),
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
            let goes_on = || !interrupt.requested() && Instant::now() < until;
            let small = worker.minimise(&found.execution, MINIMISE_RUNS, goes_on)?;
            let reproducer = reproducer(source, plan, found, &small, &id);
            let stem = format!("{}-{}", scenario.name, id.to_lowercase());
            let path = reproducer.write(&options.out, &stem)?;
            this.text.push_str(&chapter(scenario, found, &small, &path));
            this.trace(options, &small, scenario)?;
            if let Some(second) = &mut second {
                let confirmation = second.confirm(&small)?;
                this.engines_agree &= confirmation.holds();
                this.text.push_str(&format!("  {confirmation}\n"));
                violations.push(json!({
                    "failure": id,
                    "reproducer": path,
                    "confirmation": confirmation,
                }));
            }
            this.reproducers.push(path);
        }
        if let Some(kept) = sample.first() {
            worker.arm(&kept.fails);
            let run = worker.replay(&kept.schedule)?;
            this.trace(options, &run, scenario)?;
        }
        this.confirmed =
            clean.map(|clean| json!({ "clean": clean.json(), "violations": violations }));
        Ok(this)
    }

    /// The reproducers, a line each, and that the engines differ where they do.
    pub(super) fn files(&self) -> String {
        let mut text = String::new();
        for path in &self.reproducers {
            text.push_str(&format!(
                "  replay with: stalemate replay {}\n",
                shell_word(path)
            ));
        }
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

fn reproducer(
    source: &Source,
    plan: &Plan,
    found: &Found,
    small: &Execution,
    id: &str,
) -> Reproducer {
    let found_by = format!(
        "{:?} seed {} execution {} on {}",
        plan.strategy,
        plan.seed,
        found.index,
        source.kind()
    );
    let stream = (small.events.len() as u64, compare::digest(&small.events));
    let mut scenario = source.scenario().clone();
    scenario.fails.clone_from(&small.fails);
    Reproducer::new(&scenario, &small.schedule, found_by, id.into(), stream)
        .with_window(source.window())
}

fn chapter(scenario: &Scenario, found: &Found, small: &Execution, path: &Path) -> String {
    let before = &found.execution.schedule;
    let failing = match names(&small.fails).join(", ") {
        fails if fails.is_empty() => fails,
        fails => format!(", with {fails} failing"),
    };
    format!(
        "\nexecution {}, minimised from {} context switches to {}{failing}:\n\n{}\n  replay with: stalemate replay {}\n",
        found.index,
        switches(before),
        switches(&small.schedule),
        story::tell(small, scenario.vcpus as usize),
        shell_word(path)
    )
}
