//! What a run found, and its two forms: for a person ([`verdict`]) and for a program ([`json`]).
//!
//! The types here are the JSON schema; `docs/result-schema.md` documents every field and changes
//! with them. Nothing here runs a machine; [`crash`] reads one that has stopped for good.

pub mod crash;
pub mod json;
pub mod story;
pub mod symbols;
pub mod timeline;
pub mod verdict;

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

/// Version of the JSON schema: +1 with every change that an old reader would misread.
pub const SCHEMA: u32 = 1;

/// What one `stalemate run` found. With `--runs N` it tells of the last run, which is the first that
/// was not clean, or the Nth.
#[derive(Debug, Serialize)]
pub struct RunResult {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Always `run`: other commands write other kinds.
    pub kind: &'static str,
    /// Version of this program.
    pub stalemate: &'static str,
    /// The command that repeats the run, as words.
    pub command: Vec<String>,
    /// The host.
    pub host: HostFacts,
    /// What was asked.
    pub scenario: ScenarioFacts,
    /// The answer.
    pub verdict: Verdict,
    /// Exit code of the process for that answer.
    pub exit_code: u8,
    /// Runs asked for.
    pub runs: u32,
    /// Runs that ended with a verdict, this one included.
    pub runs_done: u32,
    /// Exit status of the user program, where it ended.
    pub program_status: Option<u32>,
    /// Checked and skipped counts by invariant.
    pub invariants: Vec<InvariantCount>,
    /// What was violated, in the order found.
    pub violations: Vec<Violation>,
    /// The crash or hang, where that is the verdict.
    pub crash: Option<serde_json::Value>,
    /// The crash for a person; in `report.txt` and on the terminal.
    #[serde(skip)]
    pub crash_text: Option<String>,
    /// The merged event streams, where they were judged (`--monitor`).
    pub stream: Option<StreamFacts>,
    /// What each rule of `--delay` and `--ipi` has done.
    pub disturbances: Vec<crate::control::Disturbance>,
    /// What became of the calls of the replayed trace.
    pub trace: Option<crate::scenario::trace::Summary>,
    /// What this host cannot show, and other remarks that bear on the verdict.
    pub notes: Vec<String>,
    /// Where the time went, in nanoseconds.
    pub timings_ns: Timings,
    /// KVM's statistics of the machine, by KVM's own names; empty where KVM has none.
    pub kvm_stats: BTreeMap<String, u64>,
    /// Checks of the machine at scheduling points.
    pub points_checked: u64,
    /// What the guest wrote to its serial port.
    pub serial: String,
}

/// How far the merged event streams of vCPUs that ran at once were judged.
#[derive(Clone, Debug, Default, Serialize)]
pub struct StreamFacts {
    /// Events that were judged.
    pub events: u64,
    /// Events that were not, because one before them is missing.
    pub unjudged: u64,
    /// By ID: violations of one order of the events that another possible order may not have.
    pub undecided: BTreeMap<&'static str, u64>,
    /// IDs for which there were too many orders to try, and the ticket from which on that monitor is silent.
    pub given_up: Vec<(&'static str, u64)>,
    /// Why a stream makes no sense; nothing was judged from there on.
    pub broken: Option<String>,
}

/// What bears on a verdict about the host.
#[derive(Clone, Debug, Serialize)]
pub struct HostFacts {
    /// `hardware`, `emulating` or `lab`; `none` where no machine runs.
    pub kind: &'static str,
    /// The same for a person.
    pub description: String,
    /// True where user code can see a stale translation after the guest changed a PTE.
    pub shows_stale_translations: bool,
}

/// The question, with every default filled in.
#[derive(Clone, Debug, Serialize)]
pub struct ScenarioFacts {
    /// Its name.
    pub name: String,
    /// Its file.
    pub path: String,
    /// The question that it asks.
    pub description: String,
    /// vCPUs.
    pub vcpus: u32,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// `hardware` or `controlled`.
    pub interrupts: &'static str,
    /// The kernel's command line.
    pub cmdline: String,
    /// Seeded bugs that are on.
    pub bugs: Vec<&'static str>,
    /// The user program.
    pub program: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// When the invariants are checked.
    pub check: crate::scenario::CheckWhen,
    /// Seed of the program's random choices, where one was given.
    pub seed: Option<u64>,
}

/// The answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Every invariant that was checked held, and the program ended well.
    Held,
    /// An invariant did not hold, or the program saw a wrong value.
    Violation,
    /// The program refused its arguments or its trace, or the machine has too little memory for it.
    BadInput,
    /// The guest crashed, hung or did not finish in time.
    Crashed,
    /// Ctrl-C: nothing wrong was found until then.
    Interrupted,
}

/// How much of an invariant was looked at, and what was not.
#[derive(Clone, Debug, Serialize)]
pub struct InvariantCount {
    /// Its ID in `docs/invariants.md`.
    pub id: &'static str,
    /// Times it was looked at.
    pub checks: u64,
    /// Objects that were examined, over all of them.
    pub examined: u64,
    /// Objects, or whole looks, that were left out, by reason.
    pub skipped: BTreeMap<String, u64>,
}

impl InvariantCount {
    /// An invariant that was not looked at yet.
    #[must_use]
    pub fn new(id: &'static str) -> Self {
        Self {
            id,
            checks: 0,
            examined: 0,
            skipped: BTreeMap::new(),
        }
    }
}

/// One violation.
#[derive(Clone, Debug, Serialize)]
pub struct Violation {
    /// ID of the invariant; `data-probe` and `program` for what the user program found.
    pub id: String,
    /// One line: what does not hold.
    pub title: String,
    /// What had to be there.
    pub expected: Option<String>,
    /// What was there.
    pub found: Option<String>,
    /// Where: the scheduling point, or the end of the run.
    pub at: String,
    /// More lines for a person: the walk, the objects, the events.
    pub details: Vec<String>,
}

impl Violation {
    /// What a checker found at `place`.
    #[must_use]
    pub fn of_invariant(violation: crate::check::Violation, place: crate::session::Place) -> Self {
        let finding = violation.finding;
        let walk = finding
            .walk
            .map(|walk| walk.to_string())
            .unwrap_or_default();
        let invariant = format!("invariant: {}", violation.predicate);
        let object = finding.where_.to_string();
        Self {
            id: violation.id.to_owned(),
            title: finding.summary,
            expected: Some(finding.expected).filter(|text| !text.is_empty()),
            found: Some(finding.found).filter(|text| !text.is_empty()),
            at: match object.as_str() {
                "" => place.to_string(),
                object => format!("{object}, {place}"),
            },
            details: std::iter::once(invariant)
                .chain(walk.lines().map(str::to_owned))
                .chain(finding.details)
                .collect(),
        }
    }
}

/// Wall time by part of a run.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Timings {
    /// Opening /dev/kvm, creating VM and vCPUs.
    #[serde(serialize_with = "nanoseconds")]
    pub create: Duration,
    /// Guest memory.
    #[serde(serialize_with = "nanoseconds")]
    pub memory: Duration,
    /// Loading kernel, program and data; boot page tables.
    #[serde(serialize_with = "nanoseconds")]
    pub load: Duration,
    /// First instruction of the kernel to the first of the user program.
    #[serde(serialize_with = "nanoseconds")]
    pub boot: Duration,
    /// The user program.
    #[serde(serialize_with = "nanoseconds")]
    pub run: Duration,
    /// Checking invariants.
    #[serde(serialize_with = "nanoseconds")]
    pub checks: Duration,
    /// Taking the machine down.
    #[serde(serialize_with = "nanoseconds")]
    pub teardown: Duration,
}

impl Timings {
    /// The parts with their names, in the order in which they happen.
    #[must_use]
    pub fn parts(&self) -> [(&'static str, Duration); 7] {
        [
            ("VM creation", self.create),
            ("memory", self.memory),
            ("load", self.load),
            ("boot", self.boot),
            ("run", self.run),
            ("checks", self.checks),
            ("teardown", self.teardown),
        ]
    }
}

fn nanoseconds<S: serde::Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_u64(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

impl RunResult {
    /// How many invariants were examined, had nothing to examine, and were not looked at.
    #[must_use]
    pub fn invariant_totals(&self) -> (usize, usize, usize) {
        let count =
            |is: fn(&InvariantCount) -> bool| self.invariants.iter().filter(|one| is(one)).count();
        (
            count(|one| one.examined > 0),
            count(|one| one.examined == 0 && one.checks > 0),
            count(|one| one.checks == 0),
        )
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn result(verdict: Verdict) -> RunResult {
        RunResult {
            schema: SCHEMA,
            kind: "run",
            stalemate: env!("CARGO_PKG_VERSION"),
            command: ["stalemate", "run", "smoke"].map(String::from).to_vec(),
            host: HostFacts {
                kind: "emulating",
                description: "emulating host".into(),
                shows_stale_translations: false,
            },
            scenario: ScenarioFacts {
                name: "smoke".into(),
                path: "scenarios/smoke.toml".into(),
                description: "does it boot?".into(),
                vcpus: 2,
                memory_bytes: 64 << 20,
                interrupts: "hardware",
                cmdline: String::new(),
                bugs: Vec::new(),
                program: "smoke".into(),
                args: Vec::new(),
                check: crate::scenario::CheckWhen::End,
                seed: None,
            },
            verdict,
            exit_code: 0,
            runs: 1,
            runs_done: 1,
            program_status: Some(0),
            invariants: vec![
                InvariantCount {
                    id: "P-01",
                    checks: 1,
                    examined: 3,
                    skipped: BTreeMap::new(),
                },
                InvariantCount {
                    id: "N-01",
                    checks: 0,
                    examined: 0,
                    skipped: [("this host has no nested page tables".to_owned(), 3)].into(),
                },
            ],
            violations: Vec::new(),
            crash: None,
            crash_text: None,
            stream: None,
            disturbances: Vec::new(),
            trace: None,
            notes: Vec::new(),
            timings_ns: Timings {
                boot: Duration::from_millis(100),
                ..Timings::default()
            },
            kvm_stats: BTreeMap::new(),
            points_checked: 0,
            serial: String::new(),
        }
    }
}
