//! What a machine is made of.

use std::time::Duration;

use abi::channel::EventKind;
use abi::param::{Config, Pcid, TlbBackEnd};

use crate::boot::{KernelImage, ProgramSpec};
use crate::scenario::{DiskSpec, Disturb};

pub use abi::boot::InterruptMode as Interrupts;

/// Kinds of events of which there are several in every operation, so that they would push the others out
/// of the ring; where CPL 0 is emulated they would be a third of all that is executed. Whoever
/// needs them asks for them.
pub const NOISY_EVENTS: u64 = 1 << EventKind::LockAcquire as u32
    | 1 << EventKind::LockRelease as u32
    | 1 << EventKind::LockWait as u32
    | 1 << EventKind::MapcountChange as u32
    | 1 << EventKind::RefcountChange as u32
    | 1 << EventKind::VmaAlloc as u32
    | 1 << EventKind::VmaFree as u32
    | 1 << EventKind::VmaFound as u32
    | 1 << EventKind::VmaChange as u32
    | 1 << EventKind::WalkBegin as u32
    | 1 << EventKind::WalkEnd as u32
    | 1 << EventKind::CpumaskSet as u32
    | 1 << EventKind::CpumaskClear as u32
    | 1 << EventKind::TlbGen as u32
    | 1 << EventKind::MmCount as u32
    | 1 << EventKind::MmUsers as u32
    | 1 << EventKind::RcuEnter as u32
    | 1 << EventKind::RcuExit as u32
    | 1 << EventKind::RcuRetire as u32
    | 1 << EventKind::RcuGpStart as u32
    | 1 << EventKind::RcuGpWait as u32
    | 1 << EventKind::RcuGpEnd as u32
    | 1 << EventKind::RcuFree as u32
    | 1 << EventKind::Pin as u32;

/// Description of a machine.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// vCPUs, 1 to [`abi::layout::MAX_CPUS`].
    pub vcpus: u32,
    /// Bytes of guest memory, whole frames.
    pub memory_bytes: u64,
    /// How interrupts reach the vCPUs.
    pub interrupts: Interrupts,
    /// Kernel command line ([`abi::param`]).
    pub cmdline: String,
    /// The first process.
    pub program: ProgramSpec,
    /// The kernel.
    pub kernel: KernelImage,
    /// Whether vCPUs run one at a time ([`Machine::run_vcpu`](super::Machine::run_vcpu)): IPIs are then held
    /// until they are delivered, the first user instruction is a stop, and no event is lost. Needs
    /// controlled interrupts.
    pub serialised: bool,
    /// Whether each vCPU thread is pinned to a host CPU, best effort: a migration flushes the TLB.
    pub pin: bool,
    /// How long the guest may show no sign of life before it counts as hung.
    pub watchdog: Duration,
    /// Which events the kernel records: bit `k` for [`abi::channel::EventKind`] `k`. By default all but
    /// the [noisy](NOISY_EVENTS) ones.
    pub events: u64,
    /// The disk.
    pub disk: DiskSpec,
    /// How vCPUs that run at once are disturbed.
    pub disturb: Disturb,
}

impl MachineConfig {
    /// True where the kernel refuses a processor without PCIDs. What it makes of a wrong command line is its own to
    /// say.
    pub(super) fn needs_pcid(&self) -> bool {
        Config::parse(&self.cmdline)
            .is_ok_and(|config| config.pcid == Pcid::On && config.tlb != TlbBackEnd::Soft)
    }
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpus: 2,
            memory_bytes: 64 << 20,
            interrupts: Interrupts::Hardware,
            cmdline: String::new(),
            program: ProgramSpec::default(),
            kernel: KernelImage::Embedded,
            serialised: false,
            pin: true,
            watchdog: Duration::from_secs(10),
            events: !NOISY_EVENTS,
            disk: DiskSpec::default(),
            disturb: Disturb::default(),
        }
    }
}
