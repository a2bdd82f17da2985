//! Checks on the stream of events: what no single state can show.
//!
//! A [`Monitor`] sees every event in the order in which it happened and keeps what it needs to know. The
//! same monitors judge serialised runs, event by event, and the merged streams of parallel ones.

pub mod folio;
pub mod lifetime;
pub mod locks;
pub mod merge;
pub mod tlb;
pub mod walk;

use abi::channel::Event;

use super::{Finding, Violation};
use crate::memory::PhysMem;

/// An event, and on which vCPU it happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// vCPU.
    pub vcpu: usize,
    /// The event.
    pub event: Event,
}

/// An ID that is never reused for anything else, and what must be true.
pub type Rule = (&'static str, &'static str);

/// Every rule of every monitor.
pub fn rules() -> impl Iterator<Item = &'static Rule> {
    let families = [
        tlb::INVARIANTS,
        locks::INVARIANTS,
        lifetime::INVARIANTS,
        folio::INVARIANTS,
        walk::INVARIANTS,
    ];
    families.into_iter().flatten()
}

/// What breaks rule `id` of `rules`.
fn violation(rules: &[Rule], id: &'static str, finding: Finding) -> Violation {
    let rule = rules.iter().find(|(other, _)| *other == id);
    Violation {
        id,
        predicate: rule.map_or("", |(_, predicate)| predicate),
        finding,
    }
}

/// Every monitor there is.
#[must_use]
pub fn all() -> Vec<Box<dyn Monitor>> {
    vec![
        Box::new(tlb::TlbModel::new()),
        Box::new(locks::Locks::default()),
        Box::new(lifetime::Lifetime::default()),
        Box::new(folio::Folios::default()),
        Box::new(walk::Walks::default()),
    ]
}

/// Judges a stream of events.
pub trait Monitor {
    /// Starts over from this state of the machine, in which no vCPU runs. Expensive: once a campaign.
    fn start(&mut self, memory: &dyn PhysMem, kernel_root: u64, nr_vcpus: usize);
    /// A copy that goes on from here by itself.
    fn fork(&self) -> Box<dyn Monitor>;
    /// Goes back to the state of the last [`Monitor::start`]. Cheap: once a schedule.
    fn reset(&mut self);
    /// Takes the next event; appends what it shows to be wrong to `found`.
    fn observe(&mut self, seen: &Seen, found: &mut Vec<Violation>);
    /// The stream is over, or the machine stands still: compares with the state that memory shows.
    fn compare(&mut self, memory: &dyn PhysMem, kernel_root: u64, found: &mut Vec<Violation>);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_is_explained_and_has_its_own_id() {
        let documents = [
            include_str!("../../../../docs/explore.md"),
            include_str!("../../../../docs/tlb-model.md"),
        ];
        let mut ids = std::collections::BTreeSet::new();
        for (id, predicate) in rules() {
            assert!(ids.insert(id), "{id} twice");
            let row = format!("| {id} | {predicate} |");
            let explained = documents.iter().any(|document| document.contains(&row));
            assert!(explained, "{row}");
        }
    }
}
