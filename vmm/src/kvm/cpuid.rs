//! What CPUID tells the guest: what the host supports, less what the machine does not have.
//! Pure functions over the entries, no KVM.

use abi::boot::InterruptMode;
use kvm_bindings::kvm_cpuid_entry2;

/// Leaf 1, ECX.
mod leaf1_ecx {
    pub(super) const PCID: u32 = 1 << 17;
    pub(super) const MONITOR: u32 = 1 << 3;
    pub(super) const VMX: u32 = 1 << 5;
    pub(super) const FMA: u32 = 1 << 12;
    pub(super) const X2APIC: u32 = 1 << 21;
    pub(super) const TSC_DEADLINE: u32 = 1 << 24;
    pub(super) const XSAVE: u32 = 1 << 26;
    pub(super) const OSXSAVE: u32 = 1 << 27;
    pub(super) const AVX: u32 = 1 << 28;
    pub(super) const F16C: u32 = 1 << 29;
}

/// First leaf of the hypervisors' range; KVM's paravirtual interfaces are there.
const HYPERVISOR_LEAVES: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4fff_ffff;
/// Leaf 7, subleaf 0, ECX: 57-bit addresses; the kernel has four levels.
const LEAF7_ECX_LA57: u32 = 1 << 16;
/// Leaf 7, subleaf 0, EBX: AVX2 and every AVX-512 part.
const LEAF7_EBX_AVX: u32 = 1 << 5 | 1 << 16 | 1 << 17 | 1 << 21 | 0b111 << 26 | 1 << 30 | 1 << 31;
/// Leaf 0x8000_0001, ECX: SVM.
const EXTENDED_ECX_SVM: u32 = 1 << 2;

/// The CPUID of vCPU `cpu` of `cpus`, made of what the host supports.
///
/// Left out: paravirtual interfaces (nothing asynchronous may reach the guest but what the host
/// sends), nested virtualisation, performance counters, timers, 57-bit addresses, and everything
/// that needs XSAVE, because the kernel saves FXSAVE state only.
#[must_use]
pub fn for_vcpu(
    supported: &[kvm_cpuid_entry2],
    cpu: u32,
    cpus: u32,
    interrupts: InterruptMode,
) -> Vec<kvm_cpuid_entry2> {
    supported
        .iter()
        .filter(|entry| !HYPERVISOR_LEAVES.contains(&entry.function))
        .map(|entry| {
            let mut entry = *entry;
            adapt(&mut entry, cpu, cpus, interrupts);
            entry
        })
        .collect()
}

/// True where the processor of these `entries` has PCIDs, which a guest is given as the host has them.
#[must_use]
pub fn has_pcid(entries: &[kvm_cpuid_entry2]) -> bool {
    let mut leaf = entries.iter().filter(|entry| entry.function == 1);
    leaf.any(|entry| entry.ecx & leaf1_ecx::PCID != 0)
}

fn adapt(entry: &mut kvm_cpuid_entry2, cpu: u32, cpus: u32, interrupts: InterruptMode) {
    use leaf1_ecx::*;
    match (entry.function, entry.index) {
        (1, _) => {
            entry.ebx = entry.ebx & 0xffff | cpus.min(0xff) << 16 | cpu << 24;
            entry.ecx &= !(MONITOR | VMX | FMA | TSC_DEADLINE | XSAVE | OSXSAVE | AVX | F16C);
            match interrupts {
                InterruptMode::Hardware => entry.ecx |= X2APIC,
                InterruptMode::Controlled => entry.ecx &= !X2APIC,
            }
        }
        (7, 0) => {
            entry.ebx &= !LEAF7_EBX_AVX;
            entry.ecx &= !LEAF7_ECX_LA57;
        }
        // Performance counters; XSAVE's state components.
        (0xa | 0xd, _) => clear(entry),
        // Extended topology: EDX is the x2APIC ID.
        (0xb | 0x1f, _) => entry.edx = cpu,
        (0x8000_0001, _) => entry.ecx &= !EXTENDED_ECX_SVM,
        (0x8000_000a, _) => clear(entry),
        (0x8000_001e, _) => entry.eax = cpu,
        _ => {}
    }
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_ones(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..kvm_cpuid_entry2::default()
        }
    }

    fn host() -> Vec<kvm_cpuid_entry2> {
        let leaves = [0, 1, 7, 0xa, 0xb, 0xd, 0x4000_0000, 0x4000_0001];
        let extended = [0x8000_0001, 0x8000_000a, 0x8000_001e];
        leaves
            .iter()
            .chain(&extended)
            .map(|leaf| all_ones(*leaf, 0))
            .collect()
    }

    fn leaf(entries: &[kvm_cpuid_entry2], function: u32) -> kvm_cpuid_entry2 {
        *entries
            .iter()
            .find(|entry| entry.function == function)
            .expect("leaf")
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id_in_every_leaf_that_tells_it() {
        let entries = for_vcpu(&host(), 5, 8, InterruptMode::Hardware);
        assert_eq!(leaf(&entries, 1).ebx >> 24, 5);
        assert_eq!(leaf(&entries, 1).ebx >> 16 & 0xff, 8);
        assert_eq!(leaf(&entries, 0xb).edx, 5);
        assert_eq!(leaf(&entries, 0x8000_001e).eax, 5);
    }

    #[test]
    fn x2apic_is_for_hardware_interrupts_only() {
        let x2apic = |mode| leaf(&for_vcpu(&host(), 0, 1, mode), 1).ecx & leaf1_ecx::X2APIC != 0;
        assert!(x2apic(InterruptMode::Hardware));
        assert!(!x2apic(InterruptMode::Controlled));
    }

    #[test]
    fn pcids_are_the_hosts() {
        let mut host = host();
        assert!(has_pcid(&for_vcpu(&host, 0, 1, InterruptMode::Hardware)));
        host[1].ecx &= !leaf1_ecx::PCID;
        assert!(!has_pcid(&for_vcpu(&host, 0, 1, InterruptMode::Hardware)));
        assert!(!has_pcid(&[]));
    }

    #[test]
    fn what_the_machine_lacks_is_hidden() {
        let entries = for_vcpu(&host(), 0, 1, InterruptMode::Hardware);
        assert!(!entries.iter().any(|entry| entry.function >> 28 == 4));
        assert_eq!(
            leaf(&entries, 1).ecx & (leaf1_ecx::VMX | leaf1_ecx::XSAVE),
            0
        );
        assert_eq!(leaf(&entries, 7).ecx & LEAF7_ECX_LA57, 0);
        assert_eq!(leaf(&entries, 7).ebx & 1 << 5, 0, "AVX2");
        assert_eq!(leaf(&entries, 0x8000_0001).ecx & EXTENDED_ECX_SVM, 0);
        assert_eq!(leaf(&entries, 0xa).eax, 0);
    }
}
