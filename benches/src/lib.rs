//! What benchmarks and their tests share: other builds of the guest kernel, and what its code consists of.

pub mod code;
pub mod kernels;
