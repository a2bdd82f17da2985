//! User programs that drive the kernel, written once against [`Sys`]: Linux's system calls plus
//! reads and writes of memory that may fault.
//!
//! Executors: `rt` at CPL 3 in the guest (feature `image`), `native` on the host's own Linux (tests
//! and feature `native`), which is how we know that a program reports nothing on a correct kernel.
//! Without features the crate is the programs and their table, [`PROGRAMS`], for whoever starts them.
#![cfg_attr(not(any(test, feature = "native")), no_std)]

mod args;
#[cfg(any(test, feature = "native"))]
pub mod native;
pub mod programs;
#[cfg(any(test, feature = "native", feature = "image"))]
pub mod rt;
pub mod sys;
mod tag;
mod team;

#[cfg(test)]
mod broken;
#[cfg(test)]
mod mem;

pub use args::{Arg, Args, UsageError};
pub use programs::{PROGRAMS, Program, find, run};
pub use sys::Sys;
