//! The guest kernel: a memory-management stack with Linux's semantics, owned whole by the testbed.
//!
//! - `arch` is the narrow boundary to the machine; nothing above it touches a register or knows
//!   which engine runs it.
//! - `mm` is the MM stack: frames, slabs, page tables, VMAs, faults, fork, rmap, shootdown.
//! - `task` is processes, threads, the scheduler and the system-call table.
//! - `sync` has the locks, `testbed` the channel to the host (events, scheduling points, failpoints).
//!
//! A kernel is a value ([`Kernel`]), not a set of global statics: many can live in one process.
#![cfg_attr(not(any(test, feature = "model")), no_std)]

#[macro_use]
pub mod testbed;

pub mod arch;
pub mod mm;
pub mod sync;
pub mod task;

mod kernel;
pub use kernel::Kernel;
