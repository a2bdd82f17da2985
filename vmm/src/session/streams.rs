//! The event streams of a parallel run: taken off the rings as they fill, merged and judged at its end.

use std::time::Duration;

use abi::channel::Event;
use abi::objects::KernelRoot;
use abi::point::Point;
use serde::Serialize;

use super::Place;
use crate::check::stream::{self, Monitor, Seen, merge};
use crate::control::{Machine, MachineError, Stop};
use crate::report::Violation;

/// What the merged streams of a run came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Streamed {
    /// Events that were judged.
    pub events: u64,
    /// Places where the order of the tickets looked wrong, and another possible order did not.
    pub reordered: u64,
    /// Places that looked wrong, with too many possible orders to try them all: not reported.
    pub undecided: u64,
}

/// Streams from the first system call on.
pub(super) struct Streams {
    events: Vec<Vec<Event>>,
    /// The first ticket that is not given yet.
    start: u64,
    monitors: Vec<Box<dyn Monitor>>,
}

impl Streams {
    /// Lets `machine` boot up to its first system call, from where on its events are judged. None: it ended
    /// before.
    pub(super) fn begin(
        machine: &mut Machine,
        limit: Duration,
    ) -> Result<Option<Self>, MachineError> {
        machine.trap_point(Point::SyscallEnter, true);
        let mut streams = Self {
            events: vec![Vec::new(); machine.nr_vcpus()],
            start: 0,
            monitors: stream::all(),
        };
        let there = loop {
            match machine.run_until(Some(limit))? {
                Stop::Point { .. } => break true,
                Stop::RingFull { .. } => streams.take(machine)?,
                _ => break false,
            }
        };
        machine.trap_point(Point::SyscallEnter, false);
        if !there {
            return Ok(None);
        }
        streams.take(machine)?;
        let since_boot = streams.take_since_boot();
        let root = machine.kernel_root().unwrap_or(0);
        let ticket = root + std::mem::offset_of!(KernelRoot, ticket) as u64;
        streams.start = machine.ram().read_value(ticket).unwrap_or(0);
        for monitor in &mut streams.monitors {
            monitor.since_boot(&since_boot, machine.nr_vcpus());
            monitor.start(machine.ram(), root, machine.nr_vcpus());
        }
        Ok(Some(streams))
    }

    /// Until there one vCPU after the other has started and all but one wait: the tickets say the order.
    fn take_since_boot(&mut self) -> Vec<Seen> {
        let streams = self.events.iter_mut().enumerate();
        let mut all: Vec<Seen> = streams
            .flat_map(|(vcpu, events)| events.drain(..).map(move |event| Seen { vcpu, event }))
            .collect();
        all.sort_by_key(|seen| seen.event.stamp);
        all
    }

    /// Takes what the rings hold. Every vCPU is paused.
    pub(super) fn take(&mut self, machine: &mut Machine) -> Result<(), MachineError> {
        for (vcpu, events) in self.events.iter_mut().enumerate() {
            events.extend(machine.take_events(vcpu)?);
        }
        Ok(())
    }

    /// Merges and judges.
    pub(super) fn judge(self) -> (Streamed, Option<Violation>) {
        let judged = merge::judge(&self.events, self.start, self.monitors);
        let streamed = Streamed {
            events: judged.events,
            reordered: judged.reordered,
            undecided: judged.undecided,
        };
        let violation = judged
            .violation
            .map(|violation| Violation::of_invariant(violation, Place::Anywhere));
        (streamed, violation)
    }
}
