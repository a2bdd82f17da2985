//! Stalemate on the host: the machine, its control, what is read from it and what is judged.
//!
//! Dependencies between the rooms point down this list; `cli` is the only one that prints.

pub mod bench;
pub mod boot;
pub mod check;
pub mod cli;
pub mod control;
pub mod engine;
pub mod explore;
pub mod inspect;
pub mod kvm;
mod map;
pub mod memory;
pub mod oracle;
pub mod report;
pub mod reproducer;
pub mod scenario;
pub mod session;
pub mod snapshot;
