//! The MM stack.
