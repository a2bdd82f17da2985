//! Schedules: who ran, and for how many scheduling points.

use std::fmt;

/// Who can take a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Actor {
    /// A vCPU: its step is to run to its next scheduling point.
    Vcpu(u8),
    /// The wire to a vCPU: its step is to deliver what is in flight.
    Wire(u8),
    /// The disk's queue of a vCPU: its step is to do the oldest request.
    Disk(u8),
}

impl Actor {
    /// The vCPU, where it is one and no device.
    #[must_use]
    pub fn vcpu(self) -> Option<u8> {
        match self {
            Self::Vcpu(vcpu) => Some(vcpu),
            Self::Wire(_) | Self::Disk(_) => None,
        }
    }
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vcpu(vcpu) => write!(f, "{vcpu}"),
            Self::Wire(vcpu) => write!(f, "i{vcpu}"),
            Self::Disk(vcpu) => write!(f, "d{vcpu}"),
        }
    }
}

/// Steps of one actor without another's in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Segment {
    /// Who.
    pub actor: Actor,
    /// Scheduling points passed; 1 for a wire or the disk.
    pub points: u64,
}

/// As a reproducer has it: `0:12 1:5 i1`.
impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut gap = "";
        for Segment { actor, points } in &self.segments {
            match actor {
                Actor::Vcpu(_) => write!(f, "{gap}{actor}:{points}")?,
                Actor::Wire(_) | Actor::Disk(_) => write!(f, "{gap}{actor}")?,
            }
            gap = " ";
        }
        Ok(())
    }
}

/// Who ran when, from the start of the schedule on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Schedule {
    /// In order; neighbours have different actors.
    pub segments: Vec<Segment>,
}

impl Schedule {
    /// Appends steps, joined with the last segment where that is the same vCPU's.
    pub fn push(&mut self, actor: Actor, points: u64) {
        match self.segments.last_mut() {
            Some(last) if last.actor == actor && matches!(actor, Actor::Vcpu(_)) => {
                last.points = last.points.saturating_add(points);
            }
            _ => self.segments.push(Segment { actor, points }),
        }
    }
    /// Scheduling points passed by vCPUs.
    #[must_use]
    pub fn points(&self) -> u64 {
        let vcpus = |segment: &&Segment| matches!(segment.actor, Actor::Vcpu(_));
        let points = self.segments.iter().filter(vcpus).map(|s| s.points);
        points.fold(0, u64::saturating_add)
    }
}
