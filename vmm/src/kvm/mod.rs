//! KVM: what this host can do, a VM, and the threads that run its vCPUs.
//!
//! This room knows registers, exits and signals; it does not know what the guest means. `control`
//! gives it a [`vcpu::Platform`] that answers the guest's accesses, and judges what it reports.
//! `unsafe` is in [`sys`] (system calls that no crate wraps), [`kick`] (signals) and in [`vm`] (the
//! memory slot) only.

pub mod cpuid;
pub mod host;
mod kick;
pub mod registers;
pub mod stats;
mod sys;
pub mod vcpu;
pub mod vm;

pub use host::{Capability, Host, HostKind, HostReport, Need, Nested};

/// A KVM call that the host refused.
#[derive(Debug, thiserror::Error)]
#[error("{call} failed")]
pub struct KvmError {
    /// The ioctl, or what else was called.
    pub call: &'static str,
    /// What the host said.
    pub source: std::io::Error,
}

/// Names the call that failed: `.map_err(failed("KVM_CREATE_VM"))`.
pub(crate) fn failed<E: Into<std::io::Error>>(call: &'static str) -> impl FnOnce(E) -> KvmError {
    move |source| KvmError {
        call,
        source: source.into(),
    }
}
