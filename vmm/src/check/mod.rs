//! What must be true of a guest that stands still, and whether it is.
//!
//! Every invariant has a stable ID, a one-line predicate and its source; [`ALL`] lists them and
//! `docs/invariants.md` says the same to a person. [`run`] examines all of them on one [`Context`] and
//! tells three things apart: what was examined, what was *skipped and why* (an operation is in
//! flight, so counts may rightly be off), and what was violated.
//!
//! One family per file. A check only reads; it knows nothing of KVM.

pub mod render;
pub mod stream;
mod swap;

mod context;
mod files;
mod finding;
mod frames;
mod groups;
mod huge;
mod in_flight;
mod kswapd;
mod lifetime;
mod non_present;
mod pagetable;
mod rmap;
mod tables;
mod vma;
mod writeback;

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod world;

use serde::{Serialize, Serializer};

pub use context::{Context, Moment};
pub use finding::{Finding, Findings, Place};
pub use in_flight::{Busy, InFlight};

/// What an invariant is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// P: page tables and frames.
    PageTables,
    /// R: reverse mapping and folio accounting.
    Rmap,
    /// V: the tree of VMAs.
    Vma,
    /// L: lifetime of mms and tasks, lazy TLB.
    Lifetime,
    /// S: swap and migration entries.
    NonPresent,
    /// G: memory groups.
    Groups,
}

/// When an invariant holds, for what it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Applies {
    /// Between any two instructions.
    Always,
    /// For a vCPU that is at a scheduling point or outside the kernel.
    VcpuAtPoint,
    /// While every vCPU is at a scheduling point or outside the kernel.
    AllAtPoints,
    /// For an mm whose mmap_lock no writer holds.
    UnwrittenVmas,
    /// For an mm whose mmap_lock nobody holds, and none of whose VMAs a fault does.
    UnlockedMm,
    /// For an mm of which nobody holds a page-table lock.
    UnlockedTables,
    /// For an mm that has a task, and for every mm while no vCPU is inside the kernel.
    InhabitedMm,
    /// While no vCPU is inside the kernel.
    OutsideKernel,
    /// While no vCPU is inside the kernel and no lock is held.
    QuiescentKernel,
    /// Once the last process has exited.
    AfterExit,
}

impl Applies {
    /// The words of docs/invariants.md.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::VcpuAtPoint => "the vCPU is at a point or outside the kernel",
            Self::AllAtPoints => "every vCPU is at a point or outside the kernel",
            Self::UnwrittenVmas => "nobody holds mmap_lock for writing",
            Self::UnlockedMm => "nobody holds mmap_lock or a VMA",
            Self::UnlockedTables => "nobody holds a page-table lock of the mm",
            Self::InhabitedMm => "the mm has a task, or no vCPU is inside the kernel",
            Self::OutsideKernel => "no vCPU is inside the kernel",
            Self::QuiescentKernel => "nothing is in flight",
            Self::AfterExit => "the last process has exited",
        }
    }
}

/// One thing that must be true.
#[derive(Clone, Copy, Debug)]
pub struct Invariant {
    /// Never reused for anything else.
    pub id: &'static str,
    /// What it is about.
    pub family: Family,
    /// What must be true, in one line.
    pub predicate: &'static str,
    /// When it must be.
    pub applies: Applies,
    /// Who says so.
    pub source: &'static str,
    /// Examines all objects that it is about.
    pub run: fn(&Context<'_>, &mut Findings),
}

/// Every invariant, by ID.
pub fn all() -> impl Iterator<Item = &'static Invariant> {
    ALL.iter().copied().flatten()
}

/// Every invariant, by family.
pub const ALL: &[&[Invariant]] = &[
    pagetable::INVARIANTS,
    frames::INVARIANTS,
    huge::INVARIANTS,
    rmap::INVARIANTS,
    vma::INVARIANTS,
    lifetime::INVARIANTS,
    files::INVARIANTS,
    non_present::INVARIANTS,
    swap::INVARIANTS,
    kswapd::INVARIANTS,
    groups::INVARIANTS,
    writeback::INVARIANTS,
];

/// Any invariant, of a state or of the stream, for a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Described {
    /// Never reused for anything else.
    pub id: &'static str,
    /// What must be true, in one line.
    pub predicate: &'static str,
    /// When it must be.
    pub applies: &'static str,
    /// Who says so.
    pub source: &'static str,
}

/// Every invariant there is: those of states, then those of the stream of events.
pub fn described() -> impl Iterator<Item = Described> {
    let states = all().map(|invariant| Described {
        id: invariant.id,
        predicate: invariant.predicate,
        applies: invariant.applies.describe(),
        source: invariant.source,
    });
    let stream = stream::rules().map(|&(id, predicate)| Described {
        id,
        predicate,
        applies: "on the stream of events",
        source: stream::source(id),
    });
    states.chain(stream)
}

/// One invariant that does not hold for one object.
#[derive(Clone, Debug, Serialize)]
pub struct Violation {
    /// The invariant's ID.
    pub id: &'static str,
    /// What must be true.
    pub predicate: &'static str,
    /// What is wrong here, and with what.
    #[serde(flatten)]
    pub finding: Finding,
}

/// How much one invariant has looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// The invariant's ID.
    pub id: &'static str,
    /// Objects examined.
    pub examined: u64,
    /// Objects that violate it; [`Outcome::violations`] lists the first few.
    pub violated: u64,
}

/// What one invariant has not looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// The invariant's ID.
    pub id: &'static str,
    /// Why.
    pub reason: String,
    /// Objects left out; `None` where it was not looked for objects at all.
    pub objects: Option<u64>,
}

/// What a run of all invariants says.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    /// Invariants that were examined.
    pub checked: Vec<Checked>,
    /// What was left out: never counted as held.
    pub skipped: Vec<Skipped>,
    /// What does not hold, at most [`Findings::MAX_REPORTED`] for one invariant.
    pub violations: Vec<Violation>,
}

impl Outcome {
    /// True where nothing that was examined is violated.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.violations.is_empty()
    }
}

/// Examines every invariant that applies.
#[must_use]
pub fn run(context: &Context<'_>) -> Outcome {
    let mut outcome = Outcome::default();
    for invariant in all() {
        examine(context, invariant, &mut outcome);
    }
    outcome
}

fn examine(context: &Context<'_>, invariant: &'static Invariant, outcome: &mut Outcome) {
    let id = invariant.id;
    if let Some(reason) = context.forbids(invariant.applies) {
        outcome.skipped.push(Skipped {
            id,
            reason,
            objects: None,
        });
        return;
    }
    let mut findings = Findings::default();
    (invariant.run)(context, &mut findings);
    outcome.checked.push(Checked {
        id,
        examined: findings.examined,
        violated: findings.violated,
    });
    for (reason, objects) in findings.skipped {
        outcome.skipped.push(Skipped {
            id,
            reason,
            objects: Some(objects),
        });
    }
    for finding in findings.reported {
        outcome.violations.push(Violation {
            id,
            predicate: invariant.predicate,
            finding,
        });
    }
}

impl Serialize for Invariant {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let mut fields = serializer.serialize_struct("Invariant", 5)?;
        fields.serialize_field("id", self.id)?;
        fields.serialize_field("family", &self.family)?;
        fields.serialize_field("predicate", self.predicate)?;
        fields.serialize_field("applies", self.applies.describe())?;
        fields.serialize_field("source", self.source)?;
        fields.end()
    }
}
