//! Does the hardware show what the TLB model says it may? After a violation the program goes on, and what it
//! then finds is held against the violation.

use abi::channel::ReportKind;
use abi::layout::PAGE_SIZE;
use abi::param::TlbBackEnd;

use super::{Actor, Choice, Scheduler, View};
use crate::check::Violation;
use crate::control::ProbeReport;

/// Reports after which a program that goes on has said enough.
pub(super) const MAX_REPORTS: usize = 8;

/// A wrong value that the processor gave a program.
#[derive(Clone, Debug, PartialEq)]
pub struct Shown {
    /// vCPU that accessed it.
    pub vcpu: usize,
    /// What was found.
    pub report: ProbeReport,
}

impl std::fmt::Display for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ProbeReport {
            kind,
            gva,
            expected,
            found,
            ..
        } = &self.report;
        write!(
            f,
            "confirmed by hardware: vCPU {} found {found:#x} through {gva:#x}, where {expected:#x} belongs: {}",
            self.vcpu,
            kind.describe()
        )
    }
}

/// The first of `shown` that `violation` explains: on its vCPU, through its page, and a value that came from
/// the processor's TLB. With `tlb=both` the values that programs judge are the soft TLB's; only what no TLB
/// may give is the processor's there.
#[must_use]
pub fn belongs<'a>(
    violation: &Violation,
    shown: &'a [Shown],
    tlb: TlbBackEnd,
) -> Option<&'a Shown> {
    let place = &violation.finding.where_;
    let is_hardware = |kind: ReportKind| match tlb {
        TlbBackEnd::Soft => false,
        TlbBackEnd::Both => kind == ReportKind::TlbMismatch,
        TlbBackEnd::Hw => matches!(
            kind,
            ReportKind::ForeignFrame | ReportKind::ChangedUnderneath | ReportKind::WrongPermission
        ),
    };
    // Without a vCPU and an address nothing ties the two together.
    let (vcpu, gva) = (place.vcpu?, place.gva?);
    shown.iter().find(|shown| {
        let page = |gva: u64| gva & !(PAGE_SIZE - 1);
        shown.vcpu == vcpu && page(shown.report.gva) == page(gva) && is_hardware(shown.report.kind)
    })
}

/// Lets one vCPU run whenever it can, so that its translations are used soon.
#[derive(Debug)]
pub(super) struct Favour(pub(super) Option<usize>);

impl Scheduler for Favour {
    fn begin(&mut self) -> bool {
        true
    }
    fn choose(&mut self, view: &View<'_>) -> Option<Choice> {
        let favoured = self.0.map(|vcpu| Actor::Vcpu(vcpu as u8));
        let actor = favoured.filter(|actor| view.can(*actor));
        Some(Choice {
            actor: actor.unwrap_or(view.enabled[0]),
            points: u64::MAX,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{Finding, Place};
    use crate::engine::model::tests::driver;
    use crate::explore::Ending;
    use crate::explore::campaign::{Plan, Worker};
    use crate::explore::strategy::Pct;

    fn violation(vcpu: Option<usize>, gva: Option<u64>) -> Violation {
        Violation {
            id: "T-01",
            predicate: "",
            finding: Finding {
                where_: Place {
                    vcpu,
                    gva,
                    ..Place::default()
                },
                ..Finding::default()
            },
        }
    }

    fn shown(vcpu: usize, gva: u64, kind: ReportKind) -> Shown {
        Shown {
            vcpu,
            report: ProbeReport {
                kind,
                gva,
                expected: 1,
                found: 2,
                task: 2,
            },
        }
    }

    #[test]
    fn a_wrong_value_belongs_to_the_violation_of_its_vcpu_and_page() {
        use ReportKind::{ForeignFrame, TlbMismatch, WrongResult};
        let found = violation(Some(1), Some(0x5000));
        let reports = [
            shown(0, 0x5008, ForeignFrame),
            shown(1, 0x6008, ForeignFrame),
            shown(1, 0x5008, WrongResult),
            shown(1, 0x5010, ForeignFrame),
        ];
        let hit = belongs(&found, &reports, TlbBackEnd::Hw);
        assert_eq!(hit, Some(&reports[3]));
        let text = hit.unwrap().to_string();
        assert!(text.contains("vCPU 1") && text.contains("0x5010"), "{text}");
        assert_eq!(belongs(&found, &reports[..3], TlbBackEnd::Hw), None);
        assert_eq!(
            belongs(&violation(None, Some(0x5000)), &reports, TlbBackEnd::Hw),
            None
        );
        assert_eq!(
            belongs(&violation(Some(1), None), &reports, TlbBackEnd::Hw),
            None
        );
        // A value that the soft TLB gave proves nothing about the processor.
        assert_eq!(belongs(&found, &reports, TlbBackEnd::Soft), None);
        assert_eq!(belongs(&found, &reports, TlbBackEnd::Both), None);
        let mismatch = [shown(1, 0x5000, TlbMismatch)];
        assert!(belongs(&found, &mismatch, TlbBackEnd::Both).is_some());
    }

    /// The soft TLB stands for hardware that shows everything: what the program finds once it may go on
    /// belongs to what the model said before.
    #[test]
    fn a_program_that_goes_on_finds_what_the_model_foretold() {
        let mut joined = 0;
        for (test, bug) in [
            ("unmap", "shootdown-skip-remote"),
            ("dontneed", "dontneed-skip-none"),
        ] {
            let mut worker = Worker::new(driver(test, Some(bug)), &Plan::replay()).unwrap();
            for index in 0..100 {
                let run = worker
                    .execute(&mut Pct::new(4, index, 3, None), true)
                    .unwrap();
                if let Ending::Violation(violation) = &run.ending {
                    let shown = worker.go_on(violation).unwrap();
                    assert!(shown.len() <= MAX_REPORTS);
                    joined += usize::from(belongs(violation, &shown, TlbBackEnd::Hw).is_some());
                }
            }
            // What went on has left nothing behind.
            let first = worker.execute(&mut Pct::new(4, 0, 3, None), true).unwrap();
            let again = worker.replay(&first.schedule).unwrap();
            assert_eq!(first.events, again.events);
        }
        assert!(joined > 0, "no stale access was seen");
    }
}
