//! (room: boot)
