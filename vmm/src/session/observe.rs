//! The rules of a run: what ends it, what counts as a violation, and which verdict follows.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use abi::point::Point;

use super::{Crash, Halt, Place, ProbeReport, Subject};
use crate::explore::probe::Shown as WrongValue;
use crate::report::{InvariantCount, Verdict, Violation};
use crate::scenario::CheckWhen;

/// Wrong values that a program may report before the run ends: the first tells what is wrong, a
/// few more tell whether it is one frame or all.
pub const MAX_REPORTS: usize = 16;
/// Violations of one kind of check that are kept.
pub const MAX_VIOLATIONS: usize = 64;
/// Address spaces whose end is checked in a run that is not checked at every point. After the last
/// process there is little left to judge; just before a teardown everything is still in place.
pub(super) const MAX_MM_EXITS: u64 = 32;
/// Exit status with which a program says that it was called wrongly (as sysexits and this program).
pub const STATUS_BAD_INPUT: u32 = 2;

/// What a run showed.
#[derive(Debug)]
pub struct Observed {
    /// The answer.
    pub verdict: Verdict,
    /// Exit status of the first process, where it ended.
    pub status: Option<u32>,
    /// Everything that was violated.
    pub violations: Vec<Violation>,
    /// Those of them that a program found.
    pub reports: Vec<WrongValue>,
    /// What kept the guest from its end: it crashed, hung, or had too little time or memory.
    pub crash: Option<Crash>,
    /// Counts by invariant.
    pub invariants: Vec<InvariantCount>,
    /// Checks at scheduling points.
    pub points_checked: u64,
    /// Time spent running.
    pub running: Duration,
    /// Time spent checking.
    pub checking: Duration,
}

/// Runs `subject` to its end.
///
/// # Errors
/// What [`Subject::resume`] gives.
pub fn observe<S: Subject>(
    subject: &mut S,
    when: CheckWhen,
    timeout: Duration,
) -> Result<Observed, S::Error> {
    let mut watch = Watch::default();
    let started = Instant::now();
    if when == CheckWhen::End {
        subject.trap(Point::MmExit, true);
    }
    loop {
        let left = timeout.saturating_sub(started.elapsed());
        let resumed = Instant::now();
        let halt = if left.is_zero() {
            Halt::Deadline
        } else {
            subject.resume(left)?
        };
        watch.running += resumed.elapsed();
        match halt {
            Halt::Point { vcpu, point } => {
                watch.points_checked += 1;
                watch.check(subject, Place::Point(vcpu, point))?;
                if when == CheckWhen::End && watch.points_checked == MAX_MM_EXITS {
                    subject.trap(Point::MmExit, false);
                }
                // The first broken state explains; what follows from it only hides it.
                if when == CheckWhen::EveryPoint && !watch.violations.is_empty() {
                    return Ok(watch.end(None, None));
                }
            }
            Halt::Report { vcpu, report } => {
                watch.violations.push(data_probe(vcpu, &report));
                let vcpu = vcpu as usize;
                watch.reports.push(WrongValue { vcpu, report });
                if watch.reports.len() == MAX_REPORTS {
                    return Ok(watch.end(None, None));
                }
            }
            Halt::Exited { status } => {
                watch.check(subject, Place::End)?;
                let starved = match status {
                    0 => None,
                    _ => out_of_memory(&subject.console()),
                };
                return Ok(watch.end(Some(status), starved));
            }
            Halt::Nothing => {}
            Halt::Crashed(crash) => return Ok(watch.end(None, Some(crash))),
            Halt::Deadline => {
                let late = subject.did_not_finish(timeout)?;
                return Ok(watch.end(None, Some(late)));
            }
            Halt::Interrupted => {
                let mut observed = watch.end(None, None);
                if observed.violations.is_empty() {
                    observed.verdict = Verdict::Interrupted;
                }
                return Ok(observed);
            }
        }
    }
}

#[derive(Default)]
struct Watch {
    counts: BTreeMap<&'static str, InvariantCount>,
    violations: Vec<Violation>,
    reports: Vec<WrongValue>,
    points_checked: u64,
    running: Duration,
    checking: Duration,
}

impl Watch {
    fn check<S: Subject>(&mut self, subject: &mut S, place: Place) -> Result<(), S::Error> {
        let started = Instant::now();
        let outcome = subject.check(place)?;
        self.checking += started.elapsed();
        for (id, examined) in outcome.checked {
            let count = self.count(id);
            count.checks += 1;
            count.examined += examined;
        }
        for (id, reason, objects) in outcome.skipped {
            *self.count(id).skipped.entry(reason).or_default() += objects;
        }
        self.violations.extend(outcome.violations);
        self.violations.truncate(MAX_VIOLATIONS);
        Ok(())
    }

    fn count(&mut self, id: &'static str) -> &mut InvariantCount {
        self.counts
            .entry(id)
            .or_insert_with(|| InvariantCount::new(id))
    }

    fn end(mut self, status: Option<u32>, crash: Option<Crash>) -> Observed {
        // A program that ends though something stopped it was killed for want of memory.
        let refused = status.is_some_and(|status| status == STATUS_BAD_INPUT || crash.is_some())
            && self.violations.is_empty();
        if let Some(status) = status
            && status != 0
            && !refused
            && self.reports.is_empty()
        {
            self.violations.push(program_failed(status));
        }
        Observed {
            verdict: match (&crash, self.violations.is_empty()) {
                // A wrong value is the better news of the two: it says why.
                (_, false) => Verdict::Violation,
                (_, true) if refused => Verdict::BadInput,
                (Some(_), true) => Verdict::Crashed,
                (None, true) => Verdict::Held,
            },
            status,
            violations: self.violations,
            reports: self.reports,
            crash,
            invariants: self.counts.into_values().collect(),
            points_checked: self.points_checked,
            running: self.running,
            checking: self.checking,
        }
    }
}

fn data_probe(vcpu: u32, report: &ProbeReport) -> Violation {
    Violation {
        id: "data-probe".into(),
        title: report.kind.describe().to_owned(),
        expected: Some(format!("{:#018x}", report.expected)),
        found: Some(format!("{:#018x}", report.found)),
        at: format!(
            "gva {:#x}, task {} on vCPU {}",
            report.gva, report.task, vcpu
        ),
        details: Vec::new(),
    }
}

/// The kernel killed a process because it had no frame left: the machine is too small for what it was
/// asked, which breaks no invariant. The kernel's own line on the `console` tells it from other ends.
fn out_of_memory(console: &str) -> Option<Crash> {
    let killed = console.lines().find(|line| {
        line.contains("): SIGKILL at rip ") && line.contains(", out of memory for address ")
    })?;
    let reason = "the guest ran out of memory and killed a process; --memory gives it more";
    Some(Crash {
        text: format!("  the kernel said: {killed}"),
        json: serde_json::json!({ "kind": "out-of-memory", "reason": reason }),
    })
}

fn program_failed(status: u32) -> Violation {
    Violation {
        id: "program".into(),
        title: format!("the program ended with status {status}"),
        expected: Some("0".into()),
        found: Some(status.to_string()),
        at: Place::End.to_string(),
        details: vec![
            "its own words are on the serial port (--verbose, or serial.log in --out)".into(),
        ],
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::Checked;
    use super::*;
    use abi::channel::ReportKind;
    use std::collections::VecDeque;

    /// A subject that stops as it is told.
    pub(in super::super) struct Script {
        halts: VecDeque<Halt>,
        pub(in super::super) broken_at: Option<Place>,
        pub(in super::super) resumed: u32,
        /// Resumes until the first user instruction.
        pub(in super::super) boots_after: u32,
        pub(in super::super) trapped: Vec<(Point, bool)>,
        pub(in super::super) console: &'static str,
    }

    impl Script {
        pub(in super::super) fn new(halts: &[Halt]) -> Self {
            Self {
                halts: halts.iter().cloned().collect(),
                broken_at: None,
                resumed: 0,
                boots_after: 0,
                trapped: Vec::new(),
                console: "",
            }
        }
    }

    impl Subject for Script {
        type Error = &'static str;
        fn resume(&mut self, _: Duration) -> Result<Halt, Self::Error> {
            self.resumed += 1;
            self.halts.pop_front().ok_or("resumed after the end")
        }
        fn trap(&mut self, point: Point, on: bool) {
            self.trapped.push((point, on));
        }
        fn in_user(&self) -> bool {
            self.resumed >= self.boots_after
        }
        fn check(&mut self, place: Place) -> Result<Checked, Self::Error> {
            Ok(Checked {
                checked: vec![("P-01", 3)],
                skipped: vec![("N-01", "no nested tables".into(), 1)],
                violations: (self.broken_at == Some(place))
                    .then(|| program_failed(9))
                    .into_iter()
                    .collect(),
            })
        }
        fn did_not_finish(&mut self, timeout: Duration) -> Result<Crash, Self::Error> {
            Ok(Crash {
                json: serde_json::Value::Null,
                text: format!("resumed {} times in {timeout:?}", self.resumed),
            })
        }
        fn console(&self) -> String {
            self.console.to_owned()
        }
    }

    fn observe(halts: &[Halt], broken_at: Option<Place>, when: CheckWhen) -> Observed {
        let mut script = Script::new(halts);
        script.broken_at = broken_at;
        super::observe(&mut script, when, Duration::from_secs(3600)).unwrap()
    }

    const EXIT: Halt = Halt::Exited { status: 0 };
    const POINT: Halt = Halt::Point {
        vcpu: 1,
        point: Point::FlushSync,
    };

    fn report(kind: ReportKind) -> Halt {
        Halt::Report {
            vcpu: 0,
            report: ProbeReport {
                kind,
                gva: 0x1000,
                expected: 1,
                found: 2,
                task: 3,
            },
        }
    }

    #[test]
    fn a_clean_run_is_checked_at_its_end() {
        let observed = observe(&[EXIT], None, CheckWhen::End);
        assert_eq!(observed.verdict, Verdict::Held);
        assert_eq!(observed.status, Some(0));
        let counts: Vec<_> = observed
            .invariants
            .iter()
            .map(|one| (one.id, one.checks))
            .collect();
        assert_eq!(counts, [("N-01", 0), ("P-01", 1)]);
        assert_eq!(observed.invariants[0].skipped["no nested tables"], 1);
    }

    #[test]
    fn the_first_address_spaces_are_checked_before_their_teardown() {
        let mm_exit = Halt::Point {
            vcpu: 0,
            point: Point::MmExit,
        };
        let mut halts = vec![mm_exit; MAX_MM_EXITS as usize];
        halts.push(EXIT);
        let mut script = Script::new(&halts);
        let long = Duration::from_secs(3600);
        let observed = super::observe(&mut script, CheckWhen::End, long).unwrap();
        assert_eq!(observed.points_checked, MAX_MM_EXITS);
        assert_eq!(observed.invariants[1].checks, MAX_MM_EXITS + 1);
        assert_eq!(
            script.trapped,
            [(Point::MmExit, true), (Point::MmExit, false)]
        );
    }

    #[test]
    fn points_are_checked_and_the_run_ends_at_the_first_broken_one() {
        let observed = observe(&[POINT, POINT, EXIT], None, CheckWhen::EveryPoint);
        assert_eq!(
            (observed.points_checked, observed.verdict),
            (2, Verdict::Held)
        );
        assert_eq!(
            (
                observed.invariants[1].checks,
                observed.invariants[1].examined
            ),
            (3, 9)
        );

        let broken = observe(
            &[POINT],
            Some(Place::Point(1, Point::FlushSync)),
            CheckWhen::EveryPoint,
        );
        assert_eq!((broken.verdict, broken.status), (Verdict::Violation, None));
    }

    #[test]
    fn reports_are_violations_and_sixteen_are_enough() {
        let two = observe(
            &[
                report(ReportKind::ForeignFrame),
                report(ReportKind::WrongResult),
                Halt::Exited { status: 1 },
            ],
            None,
            CheckWhen::End,
        );
        assert_eq!(two.verdict, Verdict::Violation);
        assert_eq!(
            two.violations.len(),
            2,
            "the status follows from the reports"
        );
        assert!(
            two.violations[0]
                .title
                .contains("no longer this page's own")
        );
        assert!(two.violations[1].title.contains("wrong result"));

        let many = observe(
            &vec![report(ReportKind::ForeignFrame); MAX_REPORTS],
            None,
            CheckWhen::End,
        );
        assert_eq!((many.violations.len(), many.status), (MAX_REPORTS, None));
    }

    #[test]
    fn a_status_is_a_violation_unless_it_means_bad_input() {
        let failed = observe(&[Halt::Exited { status: 1 }], None, CheckWhen::End);
        assert_eq!(
            (failed.verdict, failed.violations[0].id.as_str()),
            (Verdict::Violation, "program")
        );
        let refused = observe(
            &[Halt::Exited {
                status: STATUS_BAD_INPUT,
            }],
            None,
            CheckWhen::End,
        );
        assert_eq!(
            (refused.verdict, refused.violations.len()),
            (Verdict::BadInput, 0)
        );
        let both = observe(
            &[Halt::Exited {
                status: STATUS_BAD_INPUT,
            }],
            Some(Place::End),
            CheckWhen::End,
        );
        assert_eq!(both.verdict, Verdict::Violation);
    }

    #[test]
    fn a_program_killed_for_want_of_memory_is_no_violation_and_told_to_ask_for_more() {
        let ended = |status, broken_at, halts: &[Halt]| {
            let mut script = Script::new(&[halts, &[Halt::Exited { status }]].concat());
            script.broken_at = broken_at;
            script.console = "round 1\ntask 3 (process 2): SIGKILL at rip 0x401000, out of memory \
                              for address 0x7f0000001000\n";
            super::observe(&mut script, CheckWhen::End, Duration::from_secs(3600)).unwrap()
        };
        let starved = ended(137, None, &[]);
        assert_eq!(
            (starved.verdict, starved.violations.len(), starved.status),
            (Verdict::BadInput, 0, Some(137))
        );
        let why = starved.crash.unwrap();
        assert_eq!(why.json["kind"], "out-of-memory");
        let reason = why.json["reason"].as_str().unwrap();
        assert!(
            reason.starts_with("the guest ran out of memory"),
            "{reason}"
        );
        assert!(reason.contains("--memory gives it more"), "{reason}");
        assert!(
            why.text.contains("for address 0x7f0000001000"),
            "{}",
            why.text
        );

        let survived = ended(0, None, &[]);
        assert_eq!(survived.verdict, Verdict::Held, "it coped with the kill");
        assert!(survived.crash.is_none());
        let broken = ended(137, Some(Place::End), &[]);
        assert_eq!(broken.verdict, Verdict::Violation);
        let reported = ended(1, None, &[report(ReportKind::ForeignFrame)]);
        assert_eq!(reported.verdict, Verdict::Violation);

        let other = observe(&[Halt::Exited { status: 137 }], None, CheckWhen::End);
        assert_eq!(
            other.verdict,
            Verdict::Violation,
            "killed for another reason"
        );
    }

    #[test]
    fn what_was_found_before_a_crash_or_an_interrupt_stays_found() {
        let crash = Halt::Crashed(Crash {
            json: serde_json::Value::Null,
            text: "t".into(),
        });
        assert_eq!(
            observe(std::slice::from_ref(&crash), None, CheckWhen::End).verdict,
            Verdict::Crashed
        );
        let both = observe(
            &[report(ReportKind::ForeignFrame), crash],
            None,
            CheckWhen::End,
        );
        assert_eq!(both.verdict, Verdict::Violation);
        assert!(both.crash.is_some());
        assert_eq!(
            observe(&[Halt::Interrupted], None, CheckWhen::End).verdict,
            Verdict::Interrupted
        );
        assert_eq!(
            observe(
                &[report(ReportKind::ForeignFrame), Halt::Interrupted],
                None,
                CheckWhen::End
            )
            .verdict,
            Verdict::Violation
        );
    }

    #[test]
    fn a_deadline_is_a_failed_guest_and_says_how_long() {
        let late = observe(&[Halt::Deadline], None, CheckWhen::End);
        assert_eq!(late.verdict, Verdict::Crashed);
        assert_eq!(late.crash.unwrap().text, "resumed 1 times in 3600s");
        let mut script = Script::new(&[]);
        let none = super::observe(&mut script, CheckWhen::End, Duration::ZERO).unwrap();
        assert_eq!(none.verdict, Verdict::Crashed);
        assert_eq!(none.crash.unwrap().text, "resumed 0 times in 0ns");
    }
}
