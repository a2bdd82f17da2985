//! Device models of the machine.
