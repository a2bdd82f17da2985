//! Why there is no machine, or no longer.

use abi::layout::MAX_CPUS;

use crate::boot::{BootError, KernelImageError};
use crate::kvm::KvmError;
use crate::kvm::vcpu::VcpuError;
use crate::kvm::vm::OpenError;
use crate::memory::RamError;

/// What went wrong on the host's side. What the guest does wrong is a
/// [`Crash`](crate::control::Crash), not an error.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// There is no KVM here.
    #[error(
        "this host has no /dev/kvm: load kvm_intel or kvm_amd, or use the lab (scripts/lab -- …)"
    )]
    NoKvm {
        /// What opening it said.
        source: std::io::Error,
    },
    /// KVM is there, but not for this user.
    #[error(
        "no permission to open /dev/kvm: join the group kvm (sudo usermod -aG kvm $USER, then log in again)"
    )]
    NoPermission {
        /// What opening it said.
        source: std::io::Error,
    },
    /// KVM is too old for this machine.
    #[error("this host's KVM lacks {name}: use a newer kernel, or the lab (scripts/lab -- …)")]
    MissingCapability {
        /// What is missing.
        name: String,
    },
    /// `pcid=on`, and the guest's processor has none.
    #[error(
        "pcid=on: the guest's processor has no PCID here (CPUID.01H:ECX bit 17): use a host whose KVM offers it, \
         pcid=auto, or tlb=soft, which has PCIDs of its own"
    )]
    NoPcid,
    /// A kernel file that cannot be read.
    #[error(transparent)]
    KernelFile(#[from] KernelImageError),
    /// The images cannot be booted.
    #[error(transparent)]
    BadKernel(#[from] BootError),
    /// Less memory than the kernel boots in.
    #[error("{given} bytes of guest memory are too few: the least is {minimum} ({} MiB)", minimum >> 20)]
    MemoryTooSmall {
        /// Bytes asked for.
        given: u64,
        /// Bytes needed.
        minimum: u64,
    },
    /// Memory that the machine cannot have for another reason.
    #[error(transparent)]
    Memory(RamError),
    /// A number of vCPUs that the machine cannot have.
    #[error("a machine has 1 to {max} vCPUs, not {given}")]
    BadVcpus {
        /// vCPUs asked for.
        given: u32,
        /// Most vCPUs.
        max: u32,
    },
    /// A KVM call failed.
    #[error("{call} failed")]
    Kvm {
        /// The call.
        call: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
    /// A vCPU thread did not do what it was told in time, or at all.
    #[error(transparent)]
    Vcpu(VcpuError),
    /// A vCPU thread did not answer in time.
    #[error("the host is stuck: {source}")]
    Timeout {
        /// Which vCPU, in which state, was asked what.
        source: VcpuError,
    },
    /// The host refused the machine's input and output.
    #[error("cannot {step}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
    /// A reset of a machine that was never saved: a bug of the caller.
    #[error("the machine has no state to go back to")]
    NotSaved,
    /// No such vCPU.
    #[error("there is no vCPU {given}: the machine has {vcpus}")]
    NoSuchVcpu {
        /// Index asked for.
        given: usize,
        /// vCPUs of the machine.
        vcpus: usize,
    },
}

impl MachineError {
    pub(super) fn bad_vcpus(given: u32) -> Self {
        Self::BadVcpus {
            given,
            max: MAX_CPUS as u32,
        }
    }
}

impl From<KvmError> for MachineError {
    fn from(error: KvmError) -> Self {
        Self::Kvm {
            call: error.call,
            source: error.source,
        }
    }
}

impl From<OpenError> for MachineError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Absent(source) => Self::NoKvm { source },
            OpenError::Permission(source) => Self::NoPermission { source },
            OpenError::Kvm(error) => error.into(),
            OpenError::Missing(name) => Self::MissingCapability { name: name.into() },
            error @ OpenError::Version(_) => Self::MissingCapability {
                name: error.to_string(),
            },
        }
    }
}

impl From<RamError> for MachineError {
    fn from(error: RamError) -> Self {
        match error {
            RamError::TooSmall { given, minimum } => Self::MemoryTooSmall { given, minimum },
            error => Self::Memory(error),
        }
    }
}

impl From<VcpuError> for MachineError {
    fn from(error: VcpuError) -> Self {
        match error {
            error @ VcpuError::Timeout { .. } => Self::Timeout { source: error },
            VcpuError::Kvm { source, .. } => source.into(),
            error => Self::Vcpu(error),
        }
    }
}
