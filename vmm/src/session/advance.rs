//! To a place in the middle of a run, for those who want to look around there.

use std::time::{Duration, Instant};

use abi::point::Point;

use super::{Halt, Subject};

/// How long the machine runs between two looks at whether the kernel has booted.
const BOOT_STEP: Duration = Duration::from_millis(1);

/// A place in the middle of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// The `nth` passage, from 1, of a point.
    Passage {
        /// The point.
        point: Point,
        /// Which passage.
        nth: u64,
        /// Only passages on this vCPU count.
        vcpu: Option<u32>,
    },
    /// This long after the first user instruction.
    Elapsed(Duration),
}

/// Where the machine is now.
#[derive(Debug, PartialEq)]
pub enum Reached {
    /// At the place: the vCPU and the point, where the place is one.
    At(Option<(u32, Point)>),
    /// The run ended before; the point was passed this often.
    Ended {
        /// How.
        halt: Halt,
        /// Passages that counted.
        passages: u64,
    },
}

/// Runs `subject` to the place, for `timeout` at most. Wrong values that the program reports on the way
/// do not stop it.
///
/// # Errors
/// What [`Subject::resume`] gives.
pub fn advance<S: Subject>(
    subject: &mut S,
    until: Until,
    timeout: Duration,
) -> Result<Reached, S::Error> {
    let mut clock = Clock {
        end: Instant::now() + timeout,
    };
    match until {
        Until::Passage { point, nth, vcpu } => to_passage(subject, point, nth, vcpu, &mut clock),
        Until::Elapsed(time) => to_time(subject, time, &mut clock),
    }
}

struct Clock {
    end: Instant,
}

impl Clock {
    fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }
}

fn to_passage<S: Subject>(
    subject: &mut S,
    point: Point,
    nth: u64,
    vcpu: Option<u32>,
    clock: &mut Clock,
) -> Result<Reached, S::Error> {
    subject.trap(point, true);
    let mut passages = 0;
    loop {
        match subject.resume(clock.left())? {
            Halt::Point {
                vcpu: at,
                point: passed,
            } => {
                if passed == point && vcpu.is_none_or(|vcpu| vcpu == at) {
                    passages += 1;
                    if passages == nth {
                        subject.trap(point, false);
                        return Ok(Reached::At(Some((at, point))));
                    }
                }
            }
            Halt::Report { .. } | Halt::Nothing => {}
            halt => return Ok(Reached::Ended { halt, passages }),
        }
    }
}

fn to_time<S: Subject>(
    subject: &mut S,
    time: Duration,
    clock: &mut Clock,
) -> Result<Reached, S::Error> {
    let mut end = None;
    loop {
        if subject.in_user() {
            end.get_or_insert_with(|| Instant::now() + time);
        }
        let step = end.map_or(BOOT_STEP, |end| {
            end.saturating_duration_since(Instant::now())
        });
        if step.is_zero() {
            return Ok(Reached::At(None));
        }
        match subject.resume(step.min(clock.left()))? {
            Halt::Deadline if !clock.left().is_zero() => {}
            Halt::Report { .. } | Halt::Nothing | Halt::Point { .. } => {}
            halt => return Ok(Reached::Ended { halt, passages: 0 }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::observe::tests::Script;
    use super::*;

    const LONG: Duration = Duration::from_secs(3600);
    const EXIT: Halt = Halt::Exited { status: 0 };

    fn passage(nth: u64, vcpu: Option<u32>) -> Until {
        Until::Passage {
            point: Point::FlushSync,
            nth,
            vcpu,
        }
    }

    fn at(vcpu: u32) -> Halt {
        Halt::Point {
            vcpu,
            point: Point::FlushSync,
        }
    }

    #[test]
    fn passages_count_on_the_vcpu_that_was_asked_for() {
        let mut script = Script::new(&[at(0), at(1), at(0)]);
        let reached = advance(&mut script, passage(2, None), LONG).unwrap();
        assert_eq!(reached, Reached::At(Some((1, Point::FlushSync))));
        assert_eq!(
            script.trapped,
            [(Point::FlushSync, true), (Point::FlushSync, false)]
        );

        let mut script = Script::new(&[at(0), at(1), at(0)]);
        let reached = advance(&mut script, passage(2, Some(0)), LONG).unwrap();
        assert_eq!(reached, Reached::At(Some((0, Point::FlushSync))));
    }

    #[test]
    fn a_run_that_ends_before_says_how_often_the_point_was_passed() {
        let mut script = Script::new(&[at(0), EXIT]);
        let reached = advance(&mut script, passage(2, None), LONG).unwrap();
        assert_eq!(
            reached,
            Reached::Ended {
                halt: EXIT,
                passages: 1
            }
        );
    }

    #[test]
    fn time_counts_from_the_first_user_instruction() {
        let mut script = Script::new(&[Halt::Deadline, Halt::Deadline, EXIT]);
        script.boots_after = 2;
        let reached = advance(&mut script, Until::Elapsed(Duration::from_nanos(1)), LONG).unwrap();
        assert_eq!(reached, Reached::At(None));
        assert_eq!(
            script.resumed, 2,
            "the time was over at once after the boot"
        );

        let mut script = Script::new(&[EXIT]);
        let reached = advance(&mut script, Until::Elapsed(LONG), LONG).unwrap();
        assert_eq!(
            reached,
            Reached::Ended {
                halt: EXIT,
                passages: 0
            }
        );
    }
}
