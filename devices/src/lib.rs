//! Device models of the machine: serial port, local APIC (controlled interrupts), disk, the testbed
//! channel's doorbell, and exit.
//!
//! Devices know nothing of KVM, and of guest memory only what [`disk::Dma`] shows them. A write may have an [`Effect`] on the machine,
//! which the caller carries out after the device's lock is released.
//!
//! # Lock order
//! Every device guards its own state with a lock that it takes on entry and releases before it
//! returns; no device calls another and none calls the machine, so at most one device lock is held
//! by a thread at any time. [`lapic::LocalApics`] has one lock per CPU and never holds two: an IPI
//! leaves the sender's APIC as an [`Effect`] and enters the target's by [`lapic::LocalApics::deliver`].
#![forbid(unsafe_code)]

pub mod bus;
pub mod channel;
pub mod disk;
pub mod exit;
pub mod lapic;
pub mod serial;

pub use bus::{Bus, Device, Effect};
