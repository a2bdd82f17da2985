//! `--engine both`: what the model shows, run on vCPUs too.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use crate::cli::interrupt;
use crate::engine::{Engine, EngineKind};
use crate::explore::campaign::{Plan, Worker};
use crate::explore::confirm::{Confirmation, confirm};
use crate::explore::{DriverError, Execution, Kept, Source, StopWhen};
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
    /// What ended it before all were compared.
    ended: &'static str,
    /// Those that differ, by number of the execution.
    diverged: Vec<(u64, Confirmation)>,
}

impl Clean {
    /// Runs every schedule of `sample` on both engines, until Ctrl-C or `until`.
    pub(super) fn run(
        sample: &[Kept],
        asked: usize,
        until: Option<Instant>,
        model: &mut AnyWorker,
        second: &mut Second,
    ) -> Result<Self, DriverError> {
        let interrupt = interrupt::on_ctrl_c();
        let stop: StopWhen = Arc::new(move || {
            interrupt.requested() || until.is_some_and(|until| Instant::now() >= until)
        });
        let mut clean = Self {
            asked,
            kept: sample.len(),
            ..Self::default()
        };
        model.stop_when(Some(Arc::clone(&stop)));
        second.0.stop_when(Some(Arc::clone(&stop)));
        let compared = sample
            .iter()
            .take_while(|_| !stop())
            .try_for_each(|kept| clean.compare(kept, model, second));
        model.stop_when(None);
        second.0.stop_when(None);
        clean.ended = if interrupt.requested() {
            "interrupted"
        } else {
            "ended by --time-limit"
        };
        match compared {
            Ok(()) | Err(DriverError::Stopped) => Ok(clean),
            Err(error) => Err(error),
        }
    }

    fn compare(
        &mut self,
        kept: &Kept,
        model: &mut AnyWorker,
        second: &mut Second,
    ) -> Result<(), DriverError> {
        model.arm(&kept.fails);
        let first = model.replay(&kept.schedule)?;
        let confirmation = second.confirm(&first)?;
        self.compared += 1;
        self.events += confirmation.same_events;
        if !confirmation.holds() {
            self.diverged.push((kept.index, confirmation));
        }
        Ok(())
    }

    pub(super) fn holds(&self) -> bool {
        self.diverged.is_empty()
    }

    pub(super) fn text(&self) -> String {
        let (compared, events) = (self.compared, self.events);
        let mut text = match self.diverged.len() {
            0 if self.asked == 0 => "  confirmed  no clean schedule: none was asked for\n".into(),
            0 if compared == 0 && self.kept > 0 => {
                format!(
                    "  confirmed  no clean schedule: {} before the first\n",
                    self.ended
                )
            }
            0 if compared == 0 => "  confirmed  no clean schedule: none was explored\n".into(),
            0 => format!(
                "  confirmed  {compared} clean schedules on vCPUs: same endings, all {events} events the same\n"
            ),
            n => format!(
                "  ✘ {n} of {compared} clean schedules are not the same on vCPUs: a defect of one of the engines\n"
            ),
        };
        if (1..self.kept).contains(&compared) {
            let left = self.kept - compared;
            let _ = writeln!(
                text,
                "             {left} more not confirmed: {}",
                self.ended
            );
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_confirmed_is_said_with_the_reason() {
        let text = |asked, kept, compared| {
            let ended = "ended by --time-limit";
            let clean = Clean {
                asked,
                kept,
                compared,
                ended,
                ..Clean::default()
            };
            clean.text()
        };
        assert!(text(0, 0, 0).ends_with("no clean schedule: none was asked for\n"));
        assert!(text(20, 0, 0).ends_with("no clean schedule: none was explored\n"));
        assert!(text(20, 9, 0).ends_with("ended by --time-limit before the first\n"));
        let some = text(20, 9, 4);
        assert!(some.contains("4 clean schedules on vCPUs"), "{some}");
        assert!(some.ends_with("5 more not confirmed: ended by --time-limit\n"));
        assert!(!text(20, 9, 9).contains("more not confirmed"));
    }
}
