//! Replay of a schedule: exact, or as near as it goes.

use crate::explore::{Actor, Choice, Schedule, Scheduler, View};

/// One execution, exactly as `schedule` says. Whoever cannot run when it should is the driver's
/// [`Impossible`](crate::explore::DriverError::Impossible).
#[derive(Clone, Debug)]
pub struct Replay {
    schedule: Schedule,
    next: usize,
    /// Points of the current segment that are left.
    left: u64,
    begun: bool,
}

impl Replay {
    /// Replays `schedule` once.
    #[must_use]
    pub fn new(schedule: Schedule) -> Self {
        Self {
            schedule,
            next: 0,
            left: 0,
            begun: false,
        }
    }
}

impl Scheduler for Replay {
    fn begin(&mut self) -> bool {
        self.next = 0;
        self.left = 0;
        !std::mem::replace(&mut self.begun, true)
    }
    fn choose(&mut self, view: &View<'_>) -> Option<Choice> {
        if let Some((Actor::Vcpu(_), passed)) = view.last {
            self.left = self.left.saturating_sub(passed);
        }
        if self.left == 0 {
            let segment = self.schedule.segments.get(self.next)?;
            self.next += 1;
            if matches!(segment.actor, Actor::Vcpu(_)) {
                self.left = segment.points;
            }
            return Some(Choice {
                actor: segment.actor,
                points: segment.points,
            });
        }
        Some(Choice {
            actor: self.schedule.segments[self.next - 1].actor,
            points: self.left,
        })
    }
}

/// One execution that follows `schedule` where it can: segments of who cannot run are skipped, and after
/// the last one everybody runs until it waits, the lowest first.
#[derive(Clone, Debug)]
pub struct Tolerant {
    replay: Replay,
}

impl Tolerant {
    /// Follows `schedule` once.
    #[must_use]
    pub fn new(schedule: Schedule) -> Self {
        Self {
            replay: Replay::new(schedule),
        }
    }
}

impl Scheduler for Tolerant {
    fn begin(&mut self) -> bool {
        self.replay.begin()
    }
    fn choose(&mut self, view: &View<'_>) -> Option<Choice> {
        let mut view = View { ..*view };
        while let Some(choice) = self.replay.choose(&view) {
            if view.can(choice.actor) {
                return Some(choice);
            }
            self.replay.left = 0;
            view.last = None;
        }
        let stay = view.current().filter(|actor| {
            let waits = |vcpu: u8| view.standing[usize::from(vcpu)].wait().is_some();
            actor.vcpu().is_some_and(|vcpu| !waits(vcpu))
        });
        Some(Choice {
            actor: stay.unwrap_or(view.enabled[0]),
            points: u64::MAX,
        })
    }
}
