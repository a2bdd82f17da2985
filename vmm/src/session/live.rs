//! The machine behind a session.

/// Why a machine cannot be made or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// No /dev/kvm.
    #[error("no /dev/kvm")]
    NoKvm,
    /// Not permitted.
    #[error("no permission on /dev/kvm")]
    NoPermission,
    /// KVM lacks something.
    #[error("KVM lacks {0}")]
    MissingCapability(String),
    /// Not a kernel.
    #[error("{0} is not a kernel")]
    BadKernel(String),
    /// A call failed.
    #[error("{0}")]
    Kvm(String),
}
