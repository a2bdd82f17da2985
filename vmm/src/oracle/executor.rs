//! The guest kernel as an executor of cases, on either engine: a machine boots, executes a batch, and is gone.

use std::path::Path;
use std::time::Duration;

use abi::oracle::{Case, Header, MAGIC, MAX_WORDS, Op, Residency, Span};
use abi::point::Point;
use guest::programs::oracle::NO_STEP;
use zerocopy::IntoBytes;

use super::{OracleError, residency};
use crate::control::{Machine, MachineConfig, ProbeReport, ProgramSpec, Stop};
use crate::engine::model::ModelEngine;
use crate::engine::{Engine as _, EngineError, EngineKind, Halt, Limit, PointSet, UNBOUNDED};
use crate::scenario;
use crate::session::Interrupt;

/// A case with what Linux showed.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    /// Its steps.
    pub ops: Vec<Op>,
    /// What each showed, a part of `words`.
    pub spans: Vec<Span>,
    /// All words.
    pub words: Vec<u64>,
}

impl Expected {
    /// What `step` showed.
    #[must_use]
    pub fn shown(&self, step: usize) -> &[u64] {
        let span = self.spans.get(step).copied().unwrap_or_default();
        &self.words[span.start as usize..][..span.len as usize]
    }
}

/// What became of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Everything was as expected.
    Alike,
    /// The first difference.
    Differs {
        /// The case.
        case: usize,
        /// Its step; none where its process ended before its end.
        step: Option<usize>,
        /// What the step showed.
        words: Vec<u64>,
        /// What the guest wrote to its console.
        console: String,
    },
    /// The guest crashed.
    Crashed {
        /// How.
        reason: String,
    },
    /// Ctrl-C.
    Interrupted,
}

/// Executes cases and compares.
pub trait Executor {
    /// Executes `cases`, one after the other, to the first difference.
    ///
    /// # Errors
    /// The executor failed, not what it executes on.
    fn execute(&mut self, cases: &[Expected]) -> Result<Outcome, OracleError>;
}

/// The guest.
#[derive(Clone, Copy, Debug)]
pub struct Guest<'a> {
    /// What executes the kernel.
    pub engine: EngineKind,
    /// Kernel parameters and seeded bugs, as a command line.
    pub cmdline: &'a str,
    /// How the pages that are in memory are compared.
    pub residency: Residency,
    /// Longest wall time of a batch on vCPUs.
    pub timeout: Duration,
    /// Stops machines.
    pub interrupt: &'a Interrupt,
}

/// Memory of a machine on top of the cases themselves: a case touches a few hundred pages.
const MEMORY: u64 = 24 << 20;

impl Executor for Guest<'_> {
    fn execute(&mut self, cases: &[Expected]) -> Result<Outcome, OracleError> {
        let blob = blob(cases, self.residency);
        let memory = (MEMORY + blob.len() as u64).next_multiple_of(1 << 20);
        match self.engine {
            EngineKind::Model => self.on_the_model(blob, memory),
            EngineKind::Kvm => self.on_vcpus(blob, memory),
        }
    }
}

/// Where the model's kernel waits for the disk, which does nothing by itself there.
const WAITS: PointSet = PointSet::of(&[Point::DiskWait, Point::IdleEnter]);

/// Puts a difference together, out of the reports that tell its words.
#[derive(Default)]
struct Reports {
    found: Option<(usize, Option<usize>)>,
    words: Vec<u64>,
}

impl Reports {
    fn take(&mut self, report: &ProbeReport) -> Result<(), OracleError> {
        let (case, step) = (report.gva >> 32, report.gva & NO_STEP);
        let (index, len) = (report.expected >> 32, report.expected & 0xffff_ffff);
        let place = (case as usize, (step != NO_STEP).then_some(step as usize));
        let goes_on = index == self.words.len() as u64 && self.found.is_none_or(|it| it == place);
        if !goes_on || index >= len || len > MAX_WORDS as u64 {
            return Err(OracleError::Nonsense(format!("{report:x?}")));
        }
        self.found = Some(place);
        self.words.push(report.found);
        Ok(())
    }

    /// What they came to where the program ended with `status`.
    fn outcome(self, status: u32, console: String) -> Outcome {
        match (self.found, status) {
            (None, 0) => Outcome::Alike,
            (Some((case, step)), _) => Outcome::Differs {
                case,
                step,
                words: if step.is_some() {
                    self.words
                } else {
                    Vec::new()
                },
                console,
            },
            (None, status) => Outcome::Crashed {
                reason: format!("the program ended with status {status}: {}", console.trim()),
            },
        }
    }
}

impl Guest<'_> {
    fn on_the_model(&self, blob: Vec<u8>, memory: u64) -> Result<Outcome, OracleError> {
        let text = format!(
            "[machine]\nvcpus = 1\nmemory = \"{}K\"\ninterrupts = \"controlled\"\n[program]\nname = \"oracle\"\n",
            memory >> 10
        );
        let mut scenario =
            scenario::parse(Path::new("oracle.toml"), &text).expect("a good scenario");
        scenario.params = vec![("tlb".into(), "soft".into())];
        for word in self.cmdline.split(' ').filter(|word| !word.is_empty()) {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            scenario.params.push((key.into(), value.into()));
        }
        let mut engine = ModelEngine::with_data(&scenario, Some(blob), 0)?;
        let mut reports = Reports::default();
        let limit = Limit {
            points: UNBOUNDED,
            traps: WAITS,
        };
        let mut events = Vec::new();
        loop {
            match engine.run(0, limit, &mut events)? {
                Halt::Report(report) => reports.take(&report)?,
                Halt::Exited { status } => {
                    return Ok(reports.outcome(status, engine.console()));
                }
                Halt::Crashed(crash) => {
                    return Ok(Outcome::Crashed {
                        reason: crash.reason,
                    });
                }
                Halt::Point { .. } => {
                    while engine.disk_in_flight(0) {
                        engine.disk_complete(0);
                    }
                }
                Halt::FirstUser | Halt::Instruction { .. } => {}
            }
        }
    }

    fn on_vcpus(&self, blob: Vec<u8>, memory: u64) -> Result<Outcome, OracleError> {
        let machine = Machine::new(MachineConfig {
            vcpus: 1,
            memory_bytes: memory,
            cmdline: self.cmdline.into(),
            program: ProgramSpec {
                name: "oracle".into(),
                args: Vec::new(),
                data: Some(blob),
            },
            events: 0,
            ..MachineConfig::default()
        });
        let mut machine = machine.map_err(EngineError::from)?;
        self.interrupt.watch(machine.interrupt_handle());
        let mut reports = Reports::default();
        loop {
            let stop = machine.run_until(Some(self.timeout));
            match stop.map_err(EngineError::from)? {
                Stop::Report { report, .. } => reports.take(&report)?,
                Stop::Exited { status } => {
                    return Ok(reports.outcome(status, console(&machine)));
                }
                Stop::Crashed(crash) => {
                    return Ok(Outcome::Crashed {
                        reason: crash.cause.to_string(),
                    });
                }
                Stop::Interrupted => return Ok(Outcome::Interrupted),
                Stop::Deadline => {
                    return Ok(Outcome::Crashed {
                        reason: format!("it was not done after {} s", self.timeout.as_secs()),
                    });
                }
                Stop::Point { .. }
                | Stop::RingFull { .. }
                | Stop::FirstUser { .. }
                | Stop::Stepped { .. } => {}
            }
        }
    }
}

fn console(machine: &Machine) -> String {
    machine.serial_output()
}

/// The program's data.
fn blob(cases: &[Expected], residency: Residency) -> Vec<u8> {
    let header = Header {
        magic: MAGIC,
        cases: cases.len() as u64,
    };
    let mut blob = header.as_bytes().to_vec();
    for case in cases {
        let header = Case {
            ops: case.ops.len() as u32,
            words: case.words.len() as u32,
            residency: residency::of(&case.ops, residency) as u32,
            reserved: 0,
        };
        blob.extend_from_slice(header.as_bytes());
        blob.extend_from_slice(case.ops.as_bytes());
        blob.extend_from_slice(case.spans.as_bytes());
        blob.extend_from_slice(case.words.as_bytes());
    }
    blob
}

#[cfg(test)]
mod tests {
    use abi::channel::ReportKind;

    use super::*;

    fn report(case: u64, step: u64, index: u64, len: u64, found: u64) -> ProbeReport {
        ProbeReport {
            kind: ReportKind::WrongResult,
            gva: case << 32 | step,
            expected: index << 32 | len,
            found,
            task: 2,
        }
    }

    #[test]
    fn reports_are_put_together_and_nonsense_is_refused() {
        let mut reports = Reports::default();
        reports.take(&report(3, 7, 0, 2, 11)).unwrap();
        reports.take(&report(3, 7, 1, 2, 12)).unwrap();
        for bad in [
            report(3, 7, 1, 2, 0),
            report(3, 7, 2, 2, 0),
            report(3, 8, 2, 9, 0),
            report(3, 7, 2, 1 << 20, 0),
        ] {
            assert!(reports.take(&bad).is_err(), "{bad:?}");
        }
        let found = reports.outcome(1, String::new());
        let Outcome::Differs {
            case, step, words, ..
        } = found
        else {
            panic!("{found:?}");
        };
        assert_eq!((case, step, words), (3, Some(7), vec![11, 12]));
        let mut ended = Reports::default();
        ended.take(&report(0, NO_STEP, 0, 1, 0)).unwrap();
        let ended = ended.outcome(1, String::new());
        assert!(matches!(ended, Outcome::Differs { step: None, .. }));
        let silent = Reports::default().outcome(2, "no data".into());
        assert!(matches!(silent, Outcome::Crashed { .. }), "{silent:?}");
    }
}
