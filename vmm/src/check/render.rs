//! Verdicts for a person: what was checked, what was left out and why, what is wrong.

use std::collections::BTreeMap;
use std::fmt::{self, Display};

use abi::pte::Pte;

use super::{Outcome, Violation};
use crate::inspect::render::{count, pte_flags};

pub(super) fn flags_of(entry: Pte, level: u8) -> String {
    pte_flags(entry, level)
}

impl Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let finding = &self.finding;
        writeln!(f, "✗ {}  {}", self.id, finding.summary)?;
        writeln!(f, "    invariant  {}", self.predicate)?;
        let place = finding.where_.to_string();
        if !place.is_empty() {
            writeln!(f, "    where      {place}")?;
        }
        writeln!(f, "    expected   {}", finding.expected)?;
        writeln!(f, "    found      {}", finding.found)?;
        if let Some(walk) = &finding.walk {
            for (i, line) in walk.to_string().lines().enumerate() {
                let label = if i == 0 { "walk" } else { "" };
                writeln!(f, "    {label:<10} {line}")?;
            }
        }
        for (i, detail) in finding.details.iter().enumerate() {
            let label = if i == 0 { "details" } else { "" };
            writeln!(f, "    {label:<10} {detail}")?;
        }
        Ok(())
    }
}

impl Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for violation in &self.violations {
            writeln!(f, "{violation}")?;
        }
        let shown = |id| {
            self.violations
                .iter()
                .filter(|violation| violation.id == id)
                .count() as u64
        };
        for checked in self
            .checked
            .iter()
            .filter(|checked| checked.violated > shown(checked.id))
        {
            let more = checked.violated - shown(checked.id);
            writeln!(
                f,
                "  {}: {} more like these",
                checked.id,
                count(more, "violation")
            )?;
        }
        let examined: u64 = self.checked.iter().map(|checked| checked.examined).sum();
        let violated: u64 = self.checked.iter().map(|checked| checked.violated).sum();
        writeln!(
            f,
            "{}: {} examined on {}, {}",
            if violated == 0 { "clean" } else { "VIOLATED" },
            count(self.checked.len() as u64, "invariant"),
            count(examined, "object"),
            count(violated, "violation"),
        )?;
        self.fmt_skipped(f)
    }
}

impl Outcome {
    /// What was left out, by reason: many invariants share one.
    fn fmt_skipped(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut by_reason: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for skipped in &self.skipped {
            by_reason
                .entry(&skipped.reason)
                .or_default()
                .push(skipped.id);
        }
        for (reason, ids) in by_reason {
            writeln!(f, "  skipped, because {reason}:")?;
            for ids in ids.chunks(14) {
                writeln!(f, "    {}", ids.join(" "))?;
            }
        }
        Ok(())
    }
}
