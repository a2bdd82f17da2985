//! A VM with its memory and interrupt controller, and its vCPUs in their first state.
#![allow(unsafe_code, reason = "memory slots")]

use std::fs::File;
use std::sync::Arc;

use abi::boot::InterruptMode;
use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, KVM_MP_STATE_RUNNABLE,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, Msrs, kvm_enable_cap,
    kvm_mp_state, kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::stats::{self, Counters};
use super::{KvmError, cpuid, failed, registers, sys};
use crate::boot::Boot;
use crate::memory::{GuestRam, PhysMem, pages_of};

/// Three pages that KVM needs on CPUs without unrestricted guests; out of the way of guest memory,
/// below the BIOS area where PCs have them.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// Where message signalled interrupts are written to.
const MSI_ADDRESS: u32 = 0xfee0_0000;

/// The slot of guest memory.
const SLOT: u32 = 0;

/// Why there is no VM.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No such device.
    #[error("/dev/kvm is not there")]
    Absent(#[source] std::io::Error),
    /// Not for this user.
    #[error("no permission to open /dev/kvm")]
    Permission(#[source] std::io::Error),
    /// Another reason.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A KVM that speaks another protocol.
    #[error("/dev/kvm has API version {0}, not {KVM_API_VERSION}")]
    Version(i32),
    /// Something that every machine needs is missing.
    #[error("this host's KVM lacks {0}")]
    Missing(&'static str),
}

/// Opens `/dev/kvm`.
///
/// # Errors
/// [`OpenError`].
pub fn open() -> Result<Kvm, OpenError> {
    let kvm = Kvm::new().map_err(|error| classify(error.into()))?;
    match kvm.get_api_version() {
        version if version == KVM_API_VERSION as i32 => Ok(kvm),
        version => Err(OpenError::Version(version)),
    }
}

fn classify(error: std::io::Error) -> OpenError {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => OpenError::Absent(error),
        Some(libc::EACCES | libc::EPERM) => OpenError::Permission(error),
        _ => failed("opening /dev/kvm")(error).into(),
    }
}

/// A VM.
pub struct Vm {
    kvm: Kvm,
    fd: Arc<VmFd>,
    interrupts: InterruptMode,
    /// Keeps the mapping that the memory slot refers to.
    ram: GuestRam,
}

impl Vm {
    /// A VM with `ram` at guest physical address 0, and an in-kernel irqchip in
    /// [`InterruptMode::Hardware`].
    ///
    /// # Errors
    /// A host without KVM, without a capability that is needed, or that refuses a call.
    pub fn new(kvm: Kvm, ram: &GuestRam, interrupts: InterruptMode) -> Result<Self, OpenError> {
        for (cap, name) in needed(interrupts) {
            if !kvm.check_extension(*cap) {
                return Err(OpenError::Missing(name));
            }
        }
        let fd = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        fd.set_tss_address(TSS_ADDRESS)
            .map_err(failed("KVM_SET_TSS_ADDR"))?;
        if interrupts == InterruptMode::Hardware {
            if kvm.check_extension(Cap::X2ApicApi) {
                let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
                fd.enable_cap(&kvm_enable_cap {
                    cap: Cap::X2ApicApi as u32,
                    args: [flags.into(), 0, 0, 0],
                    ..kvm_enable_cap::default()
                })
                .map_err(failed("KVM_ENABLE_CAP(KVM_CAP_X2APIC_API)"))?;
            }
            fd.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
        }
        let vm = Self {
            kvm,
            fd: Arc::new(fd),
            interrupts,
            ram: ram.clone(),
        };
        vm.set_slot(ram.bytes(), 0)?;
        Ok(vm)
    }

    fn set_slot(&self, bytes: u64, flags: u32) -> Result<(), KvmError> {
        let slot = kvm_userspace_memory_region {
            slot: SLOT,
            flags,
            guest_phys_addr: 0,
            memory_size: bytes,
            userspace_addr: self.ram.host_address(),
        };
        // SAFETY: the slot is exactly `ram`'s mapping, or nothing; it stays mapped while `self` or any vCPU
        // of it lives, because each of them holds a clone of `ram`.
        unsafe { self.fd.set_user_memory_region(slot) }
            .map_err(failed("KVM_SET_USER_MEMORY_REGION"))
    }

    /// Makes KVM note which pages the guest writes from now on.
    ///
    /// # Errors
    /// A host without a dirty log.
    pub fn start_dirty_log(&self) -> Result<(), KvmError> {
        self.set_slot(self.ram.bytes(), KVM_MEM_LOG_DIRTY_PAGES)?;
        // What was logged before: a slot that had the flag already keeps its log.
        self.take_dirty().map(drop)
    }

    /// Numbers of the pages that the guest has written since the last call.
    ///
    /// # Errors
    /// The log was not started.
    pub fn take_dirty(&self) -> Result<Vec<u64>, KvmError> {
        let log = self
            .fd
            .get_dirty_log(SLOT, self.ram.bytes() as usize)
            .map_err(failed("KVM_GET_DIRTY_LOG"))?;
        let mut pages = Vec::new();
        for (word, bits) in log.iter().enumerate() {
            pages_of(word, *bits, &mut pages);
        }
        Ok(pages)
    }

    /// Makes KVM forget what it has derived from the guest's page tables. Where it shadows them it
    /// learns of writes by the guest alone: after the host has changed guest memory its shadow would be
    /// stale for ever. There is no call for it, but shadow pages go with their memory slot. The dirty
    /// log goes on, empty.
    ///
    /// # Errors
    /// The host refuses a call.
    pub fn forget_shadow_pages(&self, dirty_log: bool) -> Result<(), KvmError> {
        self.set_slot(0, 0)?;
        let flags = if dirty_log {
            KVM_MEM_LOG_DIRTY_PAGES
        } else {
            0
        };
        self.set_slot(self.ram.bytes(), flags)
    }

    /// The MSRs that KVM keeps for a vCPU.
    ///
    /// # Errors
    /// The host refuses the call.
    pub fn msrs(&self) -> Result<Vec<u32>, KvmError> {
        let list = self
            .kvm
            .get_msr_index_list()
            .map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(list.as_slice().to_vec())
    }

    /// True where its vCPUs have PCIDs.
    ///
    /// # Errors
    /// The host refuses the call.
    pub fn has_pcid(&self) -> Result<bool, KvmError> {
        offers_pcid(&self.kvm)
    }

    /// vCPU `cpu` of `cpus`, without a state.
    ///
    /// # Errors
    /// A call that the host refuses.
    pub fn create_vcpu(&self, cpu: u32, cpus: u32) -> Result<VcpuFd, KvmError> {
        let vcpu = self
            .fd
            .create_vcpu(cpu.into())
            .map_err(failed("KVM_CREATE_VCPU"))?;
        let supported = supported_cpuid(&self.kvm)?;
        let entries = cpuid::for_vcpu(supported.as_slice(), cpu, cpus, self.interrupts);
        let cpuid = CpuId::from_entries(&entries).expect("no more entries than the host gave");
        // Before any register: it decides which control register bits and MSRs exist.
        vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        Ok(vcpu)
    }

    /// Makes `vcpu`, number `cpu`, ready to execute the kernel's first instruction.
    ///
    /// # Errors
    /// A call that the host refuses.
    pub fn start_vcpu(&self, vcpu: &VcpuFd, cpu: u32, boot: &Boot) -> Result<(), KvmError> {
        vcpu.set_sregs(&registers::system(boot, cpu))
            .map_err(failed("KVM_SET_SREGS"))?;
        let msrs = Msrs::from_entries(registers::MSRS).expect("a few entries");
        let set = vcpu.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?;
        if let Some(refused) = registers::MSRS.get(set) {
            let text = format!("MSR {:#x} is refused", refused.index);
            return Err(failed("KVM_SET_MSRS")(std::io::Error::other(text)));
        }
        vcpu.set_regs(&registers::general(boot, cpu))
            .map_err(failed("KVM_SET_REGS"))?;
        if self.interrupts == InterruptMode::Hardware {
            // With an in-kernel irqchip all but the first wait for a SIPI; ours need none. After the
            // registers, which would otherwise belong to a vCPU that is not initialised.
            vcpu.set_mp_state(kvm_mp_state {
                mp_state: KVM_MP_STATE_RUNNABLE,
            })
            .map_err(failed("KVM_SET_MP_STATE"))?;
        }
        Ok(())
    }

    /// The wire from devices to KVM's local APICs; none where the machine has its own.
    #[must_use]
    pub fn wire(&self) -> Option<Wire> {
        let in_kvm = self.interrupts == InterruptMode::Hardware;
        in_kvm.then(|| Wire(Arc::clone(&self.fd)))
    }

    /// Guest memory.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// KVM's counters of the VM.
    ///
    /// # Errors
    /// A host without `KVM_CAP_BINARY_STATS_FD`.
    pub fn counters(&self) -> Result<Counters, KvmError> {
        let file = sys::stats_file(&*self.fd).map_err(failed("KVM_GET_STATS_FD"))?;
        read_counters(&file)
    }
}

/// Takes interrupts of devices to local APICs that are KVM's.
#[derive(Clone, Debug)]
pub struct Wire(Arc<VmFd>);

impl Wire {
    /// Sends `vector` to `vcpu`, edge triggered, as a PCI device does (SDM vol. 3A, 12.11, message signalled interrupts).
    ///
    /// # Errors
    /// A KVM that refuses it.
    pub fn interrupt(&self, vcpu: usize, vector: u8) -> Result<(), KvmError> {
        // Its APIC ID is the vCPU's number.
        let destination = (vcpu as u32) << 12;
        let message = kvm_msi {
            address_lo: MSI_ADDRESS | destination,
            data: vector.into(),
            ..kvm_msi::default()
        };
        self.0
            .signal_msi(message)
            .map(|_| ())
            .map_err(failed("KVM_SIGNAL_MSI"))
    }
}

fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, KvmError> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("KVM_GET_SUPPORTED_CPUID"))
}

/// True where a vCPU of `kvm` has PCIDs.
pub(super) fn offers_pcid(kvm: &Kvm) -> Result<bool, KvmError> {
    Ok(cpuid::has_pcid(supported_cpuid(kvm)?.as_slice()))
}

/// The file with KVM's counters of a vCPU, none where the host has no such thing.
pub(crate) fn vcpu_stats_file(vcpu: &VcpuFd) -> Option<File> {
    sys::stats_file(vcpu).ok()
}

/// Reads a file of counters.
pub(crate) fn read_counters(file: &File) -> Result<Counters, KvmError> {
    stats::read(file).map_err(failed("reading KVM's statistics"))
}

/// What a machine cannot do without.
fn needed(interrupts: InterruptMode) -> &'static [(Cap, &'static str)] {
    const ALWAYS: [(Cap, &str); 3] = [
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    ];
    const HARDWARE: [(Cap, &str); 6] = [
        ALWAYS[0],
        ALWAYS[1],
        ALWAYS[2],
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::MpState, "KVM_CAP_MP_STATE"),
        (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    ];
    match interrupts {
        InterruptMode::Hardware => &HARDWARE,
        InterruptMode::Controlled => &ALWAYS,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Error;

    use super::*;

    #[test]
    fn the_reason_why_kvm_cannot_be_opened_is_told_apart() {
        let kind = |errno| classify(Error::from_raw_os_error(errno));
        assert!(matches!(kind(libc::ENOENT), OpenError::Absent(_)));
        assert!(matches!(kind(libc::ENODEV), OpenError::Absent(_)));
        assert!(matches!(kind(libc::EACCES), OpenError::Permission(_)));
        assert!(matches!(kind(libc::EMFILE), OpenError::Kvm(_)));
    }
}
