//! (room: scenario)

pub mod record;
pub mod trace;
