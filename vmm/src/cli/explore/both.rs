//! `--engine both`: what the model shows, run on vCPUs too.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::cli::failure::Failure;
use crate::cli::interrupt;
use crate::engine::{Engine, EngineKind};
use crate::explore::campaign::{Plan, Worker};
use crate::explore::confirm::{Confirmation, confirm};
use crate::explore::{DriverError, Execution, Kept, Source};
use crate::scenario::Scenario;

/// Clean schedules that are confirmed where nobody says how many.
pub(super) const DEFAULT_CONFIRM: usize = 20;

type AnyWorker = Worker<Box<dyn Engine>>;

/// The machine on vCPUs.
pub(super) struct Second(AnyWorker);

impl Second {
    /// Made before anything is explored: a host that cannot is told so at once.
    pub(super) fn new(scenario: &Scenario) -> Result<Self, DriverError> {
        let source = Source::new(EngineKind::Kvm, scenario.clone());
        Ok(Self(Worker::new(
            source.driver()?,
            &Plan::replay_of(scenario),
        )?))
    }

    /// Runs the schedule of `first`, an execution of the model, here too.
    pub(super) fn confirm(&mut self, first: &Execution) -> Result<Confirmation, DriverError> {
        confirm(first, &mut self.0)
    }
}

/// The sample of clean schedules, on vCPUs.
#[derive(Default)]
pub(super) struct Clean {
    asked: usize,
    /// Schedules that there are to compare.
    kept: usize,
    compared: usize,
    events: u64,
    /// Those that differ, by number of the execution.
    diverged: Vec<(u64, Confirmation)>,
}

impl Clean {
    /// Runs every schedule of `sample` on both engines, until Ctrl-C.
    pub(super) fn run(
        sample: &[Kept],
        asked: usize,
        model: &mut AnyWorker,
        second: &mut Second,
    ) -> Result<Self, Failure> {
        let stop = interrupt::on_ctrl_c();
        let mut clean = Self {
            asked,
            kept: sample.len(),
            ..Self::default()
        };
        for kept in sample {
            if stop.requested() {
                break;
            }
            model.arm(&kept.fails);
            let first = model.replay(&kept.schedule)?;
            let confirmation = second.confirm(&first)?;
            clean.compared += 1;
            clean.events += confirmation.same_events;
            if !confirmation.holds() {
                clean.diverged.push((kept.index, confirmation));
            }
        }
        Ok(clean)
    }

    pub(super) fn holds(&self) -> bool {
        self.diverged.is_empty()
    }

    pub(super) fn text(&self) -> String {
        let (compared, events) = (self.compared, self.events);
        let mut text = match self.diverged.len() {
            0 if compared == 0 && self.kept > 0 => {
                "  confirmed  no clean schedule: interrupted before the first\n".into()
            }
            0 if compared == 0 => "  confirmed  no clean schedule: none was explored\n".into(),
            0 => format!(
                "  confirmed  {compared} clean schedules on vCPUs: same endings, all {events} events the same\n"
            ),
            n => format!(
                "  ✘ {n} of {compared} clean schedules are not the same on vCPUs: a defect of one of the engines\n"
            ),
        };
        // One divergence says it all.
        if let Some((index, first)) = self.diverged.first() {
            let _ = writeln!(text, "    execution {index}: {first}");
        }
        text
    }

    pub(super) fn json(&self) -> Value {
        let diverged = self.diverged.iter();
        json!({
            "asked": self.asked,
            "compared": self.compared,
            "events": self.events,
            "diverged": diverged.map(|(index, confirmation)| json!({
                "execution": index,
                "confirmation": confirmation,
            })).collect::<Vec<_>>(),
        })
    }
}
