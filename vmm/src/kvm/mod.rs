//! (room: kvm)
