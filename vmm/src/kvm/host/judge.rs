//! What the facts mean: which capabilities there are, what they are needed for, how to get them.

use std::io;

use super::facts::{Facts, KvmFacts, kind};
use super::{Capability, HostKind, HostReport, Need, Nested};
use crate::kvm::vm::OpenError;

impl Facts {
    /// The facts as a report.
    pub(super) fn judge(self) -> HostReport {
        let kind = kind(self.lab, self.kvm.is_ok(), self.nested_flag);
        let mut capabilities = vec![device(&self.kvm)];
        let kvm = self.kvm.as_ref().ok().cloned().unwrap_or_default();
        let mut of_kvm = kvm_capabilities(&kvm, kind);
        if let Err(error) = &self.kvm {
            of_kvm.iter_mut().for_each(|one| forget(one, error));
        }
        capabilities.extend(of_kvm);
        capabilities.extend(self.host_capabilities(kind));
        HostReport {
            kind,
            cpus: self.allowed_cpus.as_ref().map_or(0, Vec::len),
            cpu_model: self.cpu_model,
            kernel: self.kernel,
            max_vcpus: kvm.max_vcpus,
            capabilities,
        }
    }

    fn host_capabilities(&self, kind: HostKind) -> Vec<Capability> {
        let flag = match self.nested_flag {
            Some(Nested::Vmx) => "the CPU has vmx",
            Some(Nested::Svm) => "the CPU has svm",
            None => "neither vmx nor svm in /proc/cpuinfo",
        };
        let paging = self
            .nested_paging
            .map_or("no kvm_intel or kvm_amd module".to_owned(), |(name, on)| {
                format!("{name}={}", if on { "Y" } else { "N" })
            });
        let (pinning, cpus) = match &self.allowed_cpus {
            Ok(cpus) => (true, format!("{} CPUs may be used", cpus.len())),
            Err(error) => (false, error.to_string()),
        };
        vec![
            optional(
                "hardware virtualisation",
                self.nested_flag.is_some(),
                flag,
                "guest CPL 0 at full speed, and what hardware does with its TLB",
                "switch VMX or SVM on in the firmware, or nested virtualisation in the hypervisor below",
            ),
            optional(
                "stale translations in hardware",
                matches!(kind, HostKind::Hardware(_) | HostKind::Lab),
                match kind {
                    HostKind::Hardware(_) => "ASID or VPID keeps TLB entries across exits",
                    HostKind::Lab => "until the next timer tick of the lab's Linux",
                    HostKind::Emulating => "KVM traps every page-table write of the guest",
                    HostKind::None => "no machine",
                },
                "a missed TLB shootdown that shows itself in a parallel run",
                "run it in the lab: scripts/lab -- run SCENARIO",
            ),
            optional(
                "nested page tables",
                self.nested_paging.is_some_and(|(_, on)| on),
                paging,
                "inspection and checks of EPT or NPT",
                "modprobe kvm_intel ept=1 or kvm_amd npt=1, or the lab: scripts/lab -- doctor",
            ),
            optional(
                "tdp_mmu",
                self.tdp_mmu,
                format!("kvm.tdp_mmu={}", if self.tdp_mmu { "Y" } else { "N" }),
                "kvm_tdp_mmu_spte_changed, which tells every change of a nested entry",
                "modprobe kvm tdp_mmu=1 on a host with nested page tables",
            ),
            optional(
                "kvmmmu tracepoints",
                self.tracepoints.is_some(),
                self.tracepoints.clone().unwrap_or("not readable".into()),
                "the mirror of the nested page tables",
                "as root: mount -t tracefs tracefs /sys/kernel/tracing",
            ),
            optional(
                "userfaultfd",
                self.userfaultfd.is_ok(),
                result_text(&self.userfaultfd),
                "holding a vCPU in a missing page",
                "as root: sysctl vm.unprivileged_userfaultfd=1",
            ),
            optional(
                "CPU pinning",
                pinning,
                cpus,
                "TLB entries that survive a pause (a migration flushes them)",
                "allow sched_setaffinity in the container's seccomp profile",
            ),
            optional(
                "root",
                self.root,
                if self.root { "yes" } else { "no" },
                "tracepoints and userfaultfd of the kernel's own accesses",
                "sudo",
            ),
        ]
    }
}

fn device(kvm: &Result<KvmFacts, OpenError>) -> Capability {
    let (detail, how_to_get) = match kvm {
        Ok(_) => ("can be opened".to_owned(), ""),
        Err(error @ OpenError::Absent(_)) => (
            error.to_string(),
            "modprobe kvm_intel or kvm_amd; in a container pass --device /dev/kvm; without KVM use the lab: scripts/lab -- doctor",
        ),
        Err(error @ OpenError::Permission(_)) => (
            error.to_string(),
            "join the group kvm: sudo usermod -aG kvm $USER, then log in again",
        ),
        Err(error) => (
            error.to_string(),
            "use a KVM of Linux 5.10 or later, or the lab: scripts/lab -- doctor",
        ),
    };
    Capability {
        name: "/dev/kvm",
        present: kvm.is_ok(),
        known: true,
        need: Need::Required,
        detail,
        needed_for: "booting the guest kernel",
        how_to_get,
    }
}

const NEWER_KERNEL: &str = "a newer kernel on the host";

fn kvm_capabilities(kvm: &KvmFacts, kind: HostKind) -> Vec<Capability> {
    let cap = |name, present: bool, needed_for| {
        let detail = if present { "yes" } else { "no" };
        optional(name, present, detail, needed_for, NEWER_KERNEL)
    };
    let required = |name, present, needed_for| Capability {
        need: Need::Required,
        ..cap(name, present, needed_for)
    };
    // Measured: the debug registers of a guest under emulated SVM do not fire.
    let breakpoints = kvm.hardware_breakpoints && kind != HostKind::Lab;
    vec![
        required("KVM_CAP_USER_MEMORY", kvm.user_memory, "guest memory"),
        required("KVM_CAP_EXT_CPUID", kvm.ext_cpuid, "the guest's CPUID"),
        required(
            "KVM_CAP_IMMEDIATE_EXIT",
            kvm.immediate_exit,
            "pausing a vCPU between two instructions",
        ),
        cap("KVM_CAP_IRQCHIP", kvm.irqchip, "--interrupts hardware"),
        cap(
            "KVM_CAP_SPLIT_IRQCHIP",
            kvm.split_irqchip,
            "a local APIC in KVM without a PIC and an I/O APIC",
        ),
        cap(
            "KVM_CAP_X2APIC_API",
            kvm.x2apic_api,
            "x2APIC destinations without the broadcast quirk",
        ),
        cap(
            "KVM_CAP_SET_GUEST_DEBUG",
            kvm.guest_debug,
            "single-stepping the guest",
        ),
        optional(
            "hardware breakpoints",
            breakpoints,
            match (breakpoints, kind) {
                (true, _) => "yes",
                (false, HostKind::Lab) => "do not fire under emulated SVM",
                (false, _) => "no",
            },
            "stopping at an address without changing the guest's code",
            "a hardware or an emulating host",
        ),
        cap(
            "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
            kvm.dirty_protect,
            "the log of frames that the guest wrote",
        ),
        cap(
            "KVM_CAP_DIRTY_LOG_RING",
            kvm.dirty_ring,
            "resetting a machine at the cost of the frames that it wrote",
        ),
        cap(
            "KVM_CAP_BINARY_STATS_FD",
            kvm.stats_fd,
            "counts of emulated instructions, exits and flushes",
        ),
        optional(
            "PCIDs",
            kvm.pcid,
            if kvm.pcid {
                "yes"
            } else {
                "KVM offers none (CPUID.01H:ECX bit 17)"
            },
            "pcid=on with tlb=hw or both: a missed flush of a PCID that shows itself in a parallel run",
            "a hardware host with PCIDs; tlb=soft has its own on every host",
        ),
    ]
}

/// KVM could not be asked for `capability`: the remedy for `/dev/kvm` is the only one that helps.
fn forget(capability: &mut Capability, error: &OpenError) {
    capability.known = false;
    capability.how_to_get = "";
    capability.detail = match error {
        OpenError::Absent(_) | OpenError::Permission(_) => "unknown: /dev/kvm cannot be opened",
        OpenError::Kvm(_) | OpenError::Version(_) | OpenError::Missing(_) => {
            "unknown: /dev/kvm cannot be used"
        }
    }
    .into();
}

fn optional(
    name: &'static str,
    present: bool,
    detail: impl Into<String>,
    needed_for: &'static str,
    how_to_get: &'static str,
) -> Capability {
    Capability {
        name,
        present,
        known: true,
        need: Need::Optional,
        detail: detail.into(),
        needed_for,
        how_to_get,
    }
}

fn result_text(result: &io::Result<()>) -> String {
    match result {
        Ok(()) => "yes".into(),
        Err(error) => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(kvm: Result<KvmFacts, OpenError>) -> Facts {
        Facts {
            lab: false,
            cpu_model: "Some CPU".into(),
            nested_flag: None,
            kernel: "6.18.0".into(),
            allowed_cpus: Ok(vec![0, 3]),
            root: false,
            kvm,
            nested_paging: None,
            tdp_mmu: false,
            userfaultfd: Ok(()),
            tracepoints: None,
        }
    }

    fn full_kvm() -> KvmFacts {
        KvmFacts {
            user_memory: true,
            ext_cpuid: true,
            immediate_exit: true,
            hardware_breakpoints: true,
            ..KvmFacts::default()
        }
    }

    fn get<'a>(report: &'a HostReport, name: &str) -> &'a Capability {
        report
            .capabilities
            .iter()
            .find(|capability| capability.name == name)
            .expect(name)
    }

    #[test]
    fn an_emulating_host_can_boot_and_is_told_what_it_cannot_show() {
        let report = facts(Ok(full_kvm())).judge();
        assert_eq!(report.kind, HostKind::Emulating);
        assert!(report.can_boot());
        let stale = get(&report, "stale translations in hardware");
        assert!(!stale.present && stale.how_to_get.contains("scripts/lab"));
        assert!(get(&report, "hardware breakpoints").present);
    }

    #[test]
    fn the_lab_has_no_hardware_breakpoints() {
        let report = Facts {
            lab: true,
            nested_flag: Some(Nested::Svm),
            ..facts(Ok(full_kvm()))
        }
        .judge();
        assert_eq!(report.kind, HostKind::Lab);
        assert!(!get(&report, "hardware breakpoints").present);
        assert!(get(&report, "stale translations in hardware").present);
    }

    #[test]
    fn each_reason_to_have_no_kvm_has_its_own_remedy() {
        let device = |error| {
            let report = facts(Err(error)).judge();
            assert_eq!(report.kind, HostKind::None);
            assert!(!report.can_boot());
            get(&report, "/dev/kvm").clone()
        };
        let absent = device(OpenError::Absent(io::Error::from_raw_os_error(
            libc::ENOENT,
        )));
        assert!(absent.how_to_get.contains("scripts/lab"), "{absent:?}");
        let refused = device(OpenError::Permission(io::Error::from_raw_os_error(
            libc::EACCES,
        )));
        assert!(refused.how_to_get.contains("group kvm"), "{refused:?}");
    }

    #[test]
    fn what_kvm_could_not_be_asked_for_is_unknown_and_only_the_device_has_a_remedy() {
        let absent = OpenError::Absent(io::Error::from_raw_os_error(libc::ENOENT));
        let report = facts(Err(absent)).judge();
        let unknown: Vec<_> = report.missing().filter(|one| !one.known).collect();
        let asked = kvm_capabilities(&KvmFacts::default(), HostKind::None);
        assert_eq!(unknown.len(), asked.len());
        for capability in unknown {
            assert_eq!(capability.detail, "unknown: /dev/kvm cannot be opened");
            assert_eq!(capability.how_to_get, "", "{}", capability.name);
        }
        assert!(report.missing().all(|one| one.how_to_get != NEWER_KERNEL));

        let old = facts(Err(OpenError::Version(11))).judge();
        let irqchip = get(&old, "KVM_CAP_IRQCHIP");
        assert_eq!(irqchip.detail, "unknown: /dev/kvm cannot be used");

        let report = facts(Ok(KvmFacts::default())).judge();
        assert!(report.capabilities.iter().all(|one| one.known));
        assert_eq!(get(&report, "KVM_CAP_IRQCHIP").how_to_get, NEWER_KERNEL);
    }

    #[test]
    fn everything_that_is_missing_says_how_to_get_it() {
        for capability in facts(Ok(KvmFacts::default())).judge().missing() {
            assert!(!capability.how_to_get.is_empty(), "{}", capability.name);
            assert!(!capability.needed_for.is_empty(), "{}", capability.name);
        }
    }

    #[test]
    fn this_host_can_be_probed() {
        let report = super::super::Host::probe();
        assert_eq!(report.kind, super::super::Host::kind());
        assert!(!report.kernel.is_empty());
        assert!(report.cpus > 0);
    }
}
