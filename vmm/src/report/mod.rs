//! (room: report)

pub mod crash;
pub mod symbols;
