//! Strategies: how a campaign chooses its schedules.

mod exhaustive;
mod pct;
mod random;
mod replay;
mod round_robin;

pub use exhaustive::{Bounds, Exhaustive, Explored, Reduction, Within};
pub use pct::Pct;
pub use random::Random;
pub use replay::{Replay, Tolerant};
pub use round_robin::RoundRobin;
