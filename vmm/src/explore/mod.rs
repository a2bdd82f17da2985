//! Exploration: many schedules of one scenario, and what each shows.
//!
//! A [`Schedule`] says who ran for how many scheduling points. A [`Scheduler`] chooses one step at a time, a
//! [`Driver`] runs it on an [`Engine`](crate::engine::Engine), monitors look at every event.

pub mod campaign;
pub mod compare;
pub mod confirm;
mod coverage;
mod driver;
mod failing;
#[cfg(test)]
mod failing_tests;
mod footprint;
mod minimise;
mod plan;
pub mod probe;
pub(crate) mod rng;
mod sample;
mod schedule;
mod scheduler;
mod source;
pub mod strategy;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod trace;

pub use coverage::Coverage;
pub(crate) use driver::holds_up;
pub use driver::{Driver, DriverError, Ending, Execution, Limits, Standing, StopWhen, WaitsFor};
pub use minimise::{minimise, switches};
pub(crate) use rng::Rng;
pub use sample::{Kept, Sample};
pub use schedule::{Actor, Schedule, Segment};
pub use scheduler::{Choice, Scheduler, View};
pub use source::Source;
