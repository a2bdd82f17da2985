//! Is what one engine shows so on the other? One schedule on both, compared event by event.

use super::campaign::{Worker, failure_id};
use super::compare;
use super::strategy::Tolerant;
use super::{DriverError, Execution};
use crate::check::stream::Seen;
use crate::engine::{Engine, EngineError};

/// What a schedule came to on a second engine, beside the first.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Confirmation {
    /// The second engine ends it as the first does.
    pub same_ending: bool,
    /// Events of the first engine.
    pub events: u64,
    /// Events up to the first that differs: all of them where none does.
    pub same_events: u64,
    /// The first difference, in words; none where there is none.
    pub divergence: Option<String>,
}

impl Confirmation {
    /// True where nothing differs.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.divergence.is_none()
    }
}

impl std::fmt::Display for Confirmation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (same, of) = (self.same_events, self.events);
        match &self.divergence {
            None => write!(
                f,
                "confirmed on vCPUs: same ending, {same} of {of} events the same"
            ),
            Some(divergence) => {
                let ending = if self.same_ending { "same" } else { "another" };
                write!(
                    f,
                    "not confirmed on vCPUs: {ending} ending, {same} of {of} events the same\n    \
                     model here, kvm there: {divergence}"
                )
            }
        }
    }
}

/// Replays the schedule of `first` on `second` and compares.
///
/// # Errors
/// The host failed. That the schedule is impossible there, or that a vCPU hangs, is a divergence.
pub fn confirm<E: Engine>(
    first: &Execution,
    second: &mut Worker<E>,
) -> Result<Confirmation, DriverError> {
    second.arm(&first.fails);
    let why_not = match second.replay(&first.schedule) {
        Ok(run) => return Ok(judge(first, &run)),
        Err(error @ DriverError::Impossible { .. }) => error.to_string(),
        Err(error @ DriverError::Engine(EngineError::NoPoint { .. })) => {
            return Ok(Confirmation {
                same_ending: false,
                events: first.events.len() as u64,
                same_events: 0,
                divergence: Some(error.to_string()),
            });
        }
        Err(error) => return Err(error),
    };
    // As near as it goes: where the engines part is before the impossible step.
    let run = second.execute(&mut Tolerant::new(first.schedule.clone()), true)?;
    let mut confirmation = judge(first, &run);
    confirmation.divergence = Some(match confirmation.divergence {
        Some(divergence) => format!("{divergence}\n    {why_not}"),
        None => why_not,
    });
    Ok(confirmation)
}

/// Compares two runs of one schedule.
#[must_use]
pub fn judge(first: &Execution, second: &Execution) -> Confirmation {
    let (one, other) = (failure_id(&first.ending), failure_id(&second.ending));
    let name = |id: &Option<String>| id.clone().unwrap_or_else(|| "nothing wrong".into());
    let endings = || format!("it ends with {} here, {} there", name(&one), name(&other));
    let schedules = || "the same events, but other points are passed".to_owned();
    let divergence = compare::first_difference(&first.events, &second.events)
        .or_else(|| (one != other).then(endings))
        .or_else(|| (first.schedule != second.schedule).then(schedules));
    Confirmation {
        same_ending: one == other,
        events: first.events.len() as u64,
        same_events: common(&first.events, &second.events) as u64,
        divergence,
    }
}

/// Events before the first that differs.
fn common(left: &[Seen], right: &[Seen]) -> usize {
    let key = |seen: &Seen| {
        let seen = compare::masked(seen);
        (seen.vcpu, seen.event.kind, seen.event.task, seen.event.args)
    };
    let pairs = left.iter().zip(right);
    pairs.take_while(|(l, r)| key(l) == key(r)).count()
}

#[cfg(test)]
mod tests {
    use abi::channel::{Event, EventKind};

    use super::*;
    use crate::engine::model::tests::driver;
    use crate::explore::campaign::Plan;
    use crate::explore::strategy::Random;
    use crate::explore::{Actor, Ending, Schedule};

    fn run(kinds: &[EventKind], ending: Ending) -> Execution {
        let seen = |kind: &EventKind| Seen {
            vcpu: 0,
            event: Event {
                kind: *kind as u32,
                ..Event::default()
            },
        };
        let mut schedule = Schedule::default();
        schedule.push(Actor::Vcpu(0), 3);
        Execution {
            schedule,
            fails: Vec::new(),
            ending,
            events: kinds.iter().map(seen).collect(),
        }
    }

    #[test]
    fn events_endings_and_points_are_compared() {
        use EventKind::{FlushAll, IpiAck, LockAcquire};
        let whole = run(&[LockAcquire, FlushAll], Ending::ScheduleOver);
        let same = judge(&whole, &run(&[LockAcquire, FlushAll], Ending::ScheduleOver));
        assert!(same.holds(), "{same}");
        assert!(
            same.to_string().contains("2 of 2 events the same"),
            "{same}"
        );

        let other = judge(&whole, &run(&[LockAcquire, IpiAck], Ending::ScheduleOver));
        assert_eq!((other.same_events, other.same_ending), (1, true));
        assert!(other.to_string().contains("flush-all"), "{other}");

        let dead = judge(
            &whole,
            &run(
                &[LockAcquire, FlushAll],
                Ending::Deadlock(Vec::new(), Vec::new()),
            ),
        );
        assert!(!dead.same_ending && !dead.holds());
        assert!(dead.to_string().contains("deadlock there"), "{dead}");

        let mut longer = run(&[LockAcquire, FlushAll], Ending::ScheduleOver);
        longer.schedule.push(Actor::Vcpu(1), 1);
        assert!(!judge(&whole, &longer).holds());
    }

    /// A second engine with another kernel stands for one that is broken.
    #[test]
    fn an_engine_that_does_something_else_is_found_out() {
        let worker = |bug| Worker::new(driver("unmap", bug), &Plan::replay()).unwrap();
        let (mut good, mut again) = (worker(None), worker(None));
        let mut broken = worker(Some("shootdown-skip-remote"));
        let mut parted = 0;
        for index in 0..20 {
            let first = good.execute(&mut Random::new(3, index, 5), true).unwrap();
            let held = confirm(&first, &mut again).unwrap();
            assert!(held.holds(), "{held}");
            assert_eq!(held.same_events, first.events.len() as u64);
            let other = confirm(&first, &mut broken).unwrap();
            if !other.holds() {
                parted += 1;
                assert!(other.same_events < other.events, "{other}");
            }
        }
        assert!(parted > 0, "the broken one never differs");
    }
}
