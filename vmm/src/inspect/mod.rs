//! (room: inspect)
