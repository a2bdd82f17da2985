//! User programs that drive the kernel.
#![no_std]
