//! Snapshots: a paused machine as a value.
//!
//! A machine is [saved](crate::control::Machine::save) once, [reset](crate::control::Machine::reset) to
//! that state as often as needed by putting back the pages that were written since, and
//! [cloned](crate::control::Machine::clone_of) into others that share its memory until they write to it.

pub(crate) mod file;

use std::sync::Arc;

use crate::control::BoardImage;
use crate::kvm::vcpu::VcpuImage;
use crate::memory::GuestRam;

pub use file::{SavedMachine, SnapshotError};

/// A machine of which no vCPU runs.
#[derive(Debug)]
pub struct Snapshot {
    /// Never written: copies on write refer to it.
    pub(crate) memory: GuestRam,
    pub(crate) vcpus: Vec<Arc<VcpuImage>>,
    pub(crate) board: BoardImage,
}
