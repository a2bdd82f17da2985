//! The machine and its control: boot, run, pause, and what made it stop.
//!
//! [`Machine`] is the only way from the other rooms to a running guest. While it is in nobody's hands
//! (between two calls) every vCPU is paused, so that memory can be read at rest.
//!
//! Threads: one per vCPU (see [`crate::kvm::vcpu`]), one for input and output ([`io`]: console,
//! watchdog), and the controller, which is whoever calls the machine. The vCPU threads and the
//! watchdog send messages to the controller and never wait for it.

mod board;
pub(crate) mod channel;
mod config;
mod console;
mod disturb;
mod error;
mod io;
mod machine;
mod stop;

pub(crate) use board::BoardImage;
pub use config::{Interrupts, MachineConfig, NOISY_EVENTS};
pub use disturb::Disturbance;
pub use error::MachineError;
pub use machine::{InterruptHandle, Machine, PauseTimings, ResetTimings, Timings};
pub use stop::{Crash, CrashCause, ProbeReport, Stop};

pub use crate::boot::{KernelImage, ProgramSpec};
pub use crate::kvm::stats::KvmStats;
pub use crate::kvm::vcpu::VcpuSnapshot;

#[cfg(test)]
mod tests;
