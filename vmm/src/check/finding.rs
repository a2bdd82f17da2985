//! What a check hands back: findings, and an honest count of what it looked at.

use std::collections::BTreeMap;
use std::fmt::{self, Display};

use serde::Serialize;

use crate::inspect::Walk;

/// Where something was found: whichever of these apply.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Number of the mm.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mm: Option<u64>,
    /// Guest virtual address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gva: Option<u64>,
    /// Frame number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frame: Option<u64>,
    /// Number of the vCPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpu: Option<usize>,
    /// Kind and GPA of a kernel object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub object: Option<(&'static str, u64)>,
}

impl Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            self.vcpu.map(|vcpu| format!("vCPU {vcpu}")),
            self.mm.map(|mm| format!("mm {mm}")),
            self.gva.map(|gva| format!("GVA {gva:#x}")),
            self.frame
                .map(|frame| format!("frame {frame:#x} (GPA {:#x})", u128::from(frame) << 12)),
            self.object.map(|(kind, gpa)| format!("{kind} at {gpa:#x}")),
        ];
        let parts: Vec<_> = parts.into_iter().flatten().collect();
        f.write_str(&parts.join(", "))
    }
}

/// One object for which an invariant does not hold.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Finding {
    /// What is wrong, in one line.
    pub summary: String,
    /// What had to be found.
    pub expected: String,
    /// What was found.
    pub found: String,
    /// Where.
    #[serde(rename = "where")]
    pub where_: Place,
    /// The translation that shows it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub walk: Option<Walk>,
    /// What else helps to understand it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
}

impl Finding {
    pub(super) fn new(summary: impl Into<String>) -> Self {
        Self {
            summary: summary.into(),
            ..Self::default()
        }
    }
    pub(super) fn expected(mut self, expected: impl Display) -> Self {
        self.expected = expected.to_string();
        self
    }
    pub(super) fn found(mut self, found: impl Display) -> Self {
        self.found = found.to_string();
        self
    }
    pub(super) fn mm(mut self, id: u64) -> Self {
        self.where_.mm = Some(id);
        self
    }
    pub(super) fn gva(mut self, gva: u64) -> Self {
        self.where_.gva = Some(gva);
        self
    }
    pub(super) fn frame(mut self, frame: u64) -> Self {
        self.where_.frame = Some(frame);
        self
    }
    pub(super) fn vcpu(mut self, index: usize) -> Self {
        self.where_.vcpu = Some(index);
        self
    }
    pub(super) fn object(mut self, kind: &'static str, gpa: u64) -> Self {
        self.where_.object = Some((kind, gpa));
        self
    }
    pub(super) fn walk(mut self, walk: Walk) -> Self {
        self.walk = Some(walk);
        self
    }
    pub(super) fn detail(mut self, detail: impl Into<String>) -> Self {
        self.details.push(detail.into());
        self
    }
    pub(super) fn details(mut self, details: impl IntoIterator<Item = String>) -> Self {
        self.details.extend(details);
        self
    }
}

/// What one invariant has found so far.
#[derive(Debug, Default)]
pub struct Findings {
    pub(super) examined: u64,
    pub(super) violated: u64,
    pub(super) skipped: BTreeMap<String, u64>,
    pub(super) reported: Vec<Finding>,
}

impl Findings {
    /// Findings of one invariant that are kept: where one thing is broken, thousands of objects can
    /// show it, and the first few say it all.
    pub const MAX_REPORTED: usize = 8;

    /// Counts an object as examined.
    pub(super) fn examine(&mut self) {
        self.examined += 1;
    }
    /// Counts an object as left out.
    pub(super) fn skip(&mut self, reason: &Busy) {
        *self.skipped.entry(reason.to_string()).or_default() += 1;
    }
    /// Counts a violation, and describes it if it is one of the first.
    pub(super) fn report(&mut self, describe: impl FnOnce() -> Finding) {
        self.violated += 1;
        if self.reported.len() < Self::MAX_REPORTED {
            self.reported.push(describe());
        }
    }
    /// Counts an object as examined, and as violating unless `holds`.
    pub(super) fn require(&mut self, holds: bool, describe: impl FnOnce() -> Finding) {
        self.examine();
        if !holds {
            self.report(describe);
        }
    }
}

use super::Busy;
