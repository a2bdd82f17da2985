//! The x86-64 back end.
