//! Checks on the stream of events: what no single state can show.
//!
//! A [`Monitor`] sees every event in the order in which it happened and keeps what it needs to know. The
//! same monitors judge serialised runs, event by event, and the merged streams of parallel ones.

pub mod lifetime;
pub mod locks;
pub mod tlb;

use abi::channel::Event;

use super::Violation;
use crate::memory::PhysMem;

/// An event, and on which vCPU it happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// vCPU.
    pub vcpu: usize,
    /// The event.
    pub event: Event,
}

/// Every monitor there is.
#[must_use]
pub fn all() -> Vec<Box<dyn Monitor>> {
    vec![
        Box::new(tlb::TlbModel::new()),
        Box::new(locks::Locks::default()),
        Box::new(lifetime::Lifetime::default()),
    ]
}

/// Judges a stream of events.
pub trait Monitor {
    /// Starts over from this state of the machine, in which no vCPU runs. Expensive: once a campaign.
    fn start(&mut self, memory: &dyn PhysMem, kernel_root: u64, nr_vcpus: usize);
    /// Goes back to the state of the last [`Monitor::start`]. Cheap: once a schedule.
    fn reset(&mut self);
    /// Takes the next event; appends what it shows to be wrong to `found`.
    fn observe(&mut self, seen: &Seen, found: &mut Vec<Violation>);
    /// The stream is over, or the machine stands still: compares with the state that memory shows.
    fn compare(&mut self, memory: &dyn PhysMem, kernel_root: u64, found: &mut Vec<Violation>);
}
