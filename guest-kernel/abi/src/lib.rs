//! The contract between the host (`vmm`, `devices`), the guest kernel and the user programs.
//!
//! Every constant, layout and name that two sides share exists here and nowhere else. The crate is
//! `no_std` and holds no logic beyond encoding: the guest writes these structures, the host reads
//! them through vm-memory and believes none of them.
//!
//! Versioning: [`layout_hash`] is computed from the layouts themselves; the kernel publishes it in
//! its [`objects::KernelRoot`] and the host refuses to interpret a kernel whose hash differs.
#![no_std]
#![forbid(unsafe_code)]

pub mod boot;
pub mod bug;
pub mod channel;
pub mod disk;
pub mod failpoint;
pub mod layout;
pub mod lock;
pub mod objects;
pub mod oracle;
pub mod param;
pub mod point;
pub mod port;
pub mod pte;
pub mod syscall;
pub mod trace;

mod hash;
pub use hash::layout_hash;
