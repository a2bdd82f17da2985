//! What the host does to a parallel run: delays at scheduling points, and IPIs that come late, twice, out of
//! order or never.
//!
//! [`rules`] says what, as it is written on the command line; [`Injector`] does it, on the threads of the vCPUs.

mod courier;
mod injector;
mod rules;

pub(crate) use courier::Courier;
pub use injector::{Injected, Injector};
pub use rules::{Delay, HowLong, IpiFault, IpiFaultKind, Rules};
