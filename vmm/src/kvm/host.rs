//! What this host can do, as data for `doctor`: facts are gathered in one place and judged in
//! another, which needs no host to test.

use std::fs;
use std::io;

use kvm_ioctls::{Cap, Kvm};
use serde::Serialize;

use super::sys;
use super::vm::{self, OpenError};

/// Environment variable by which the lab says what it is: [`LAB_VALUE`].
const KIND_VARIABLE: &str = "STALEMATE_HOST_KIND";
const LAB_VALUE: &str = "lab";
/// The same on the lab's kernel command line.
const LAB_PARAMETER: &str = "stalemate.lab=1";

/// Capabilities without a name in kvm-ioctls.
mod raw_cap {
    use std::ffi::c_ulong;

    pub(super) const SET_GUEST_DEBUG: c_ulong = kvm_bindings::KVM_CAP_SET_GUEST_DEBUG as c_ulong;
    /// Answers with the flags of KVM_SET_GUEST_DEBUG that it knows.
    pub(super) const SET_GUEST_DEBUG2: c_ulong = kvm_bindings::KVM_CAP_SET_GUEST_DEBUG2 as c_ulong;
    pub(super) const DIRTY_PROTECT: c_ulong =
        kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 as c_ulong;
    pub(super) const DIRTY_RING: c_ulong = kvm_bindings::KVM_CAP_DIRTY_LOG_RING_ACQ_REL as c_ulong;
    pub(super) const STATS_FD: c_ulong = kvm_bindings::KVM_CAP_BINARY_STATS_FD as c_ulong;
}

/// Which kind of nested page tables the hardware has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Nested {
    /// Intel VMX with EPT.
    Vmx,
    /// AMD SVM with NPT.
    Svm,
}

/// Which kind of host this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "kind", content = "nested")]
pub enum HostKind {
    /// Virtualisation in hardware.
    Hardware(Nested),
    /// KVM without hardware support: shadow page tables, CPL 0 emulated.
    Emulating,
    /// The QEMU machine of `scripts/lab`: emulated SVM with NPT.
    Lab,
    /// No usable `/dev/kvm`.
    None,
}

impl HostKind {
    /// The kind in words.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::Hardware(Nested::Vmx) => "hardware virtualisation (Intel VMX)",
            Self::Hardware(Nested::Svm) => "hardware virtualisation (AMD SVM)",
            Self::Emulating => "emulating host (KVM with shadow page tables and emulated CPL 0)",
            Self::Lab => "the lab (QEMU with emulated SVM and NPT)",
            Self::None => "no usable KVM",
        }
    }
}

/// How much depends on a capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Need {
    /// Nothing can be booted without it.
    Required,
    /// Something else is impossible without it.
    Optional,
}

/// One thing that the product uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Capability {
    /// Its name.
    pub name: &'static str,
    /// Whether the host has it.
    pub present: bool,
    /// How much depends on it.
    pub need: Need,
    /// What was seen.
    pub detail: String,
    /// What it is used for: impossible where it is missing.
    pub needed_for: &'static str,
    /// How to get it.
    pub how_to_get: &'static str,
}

/// What this host is and can do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostReport {
    /// Which kind of host.
    #[serde(flatten)]
    pub kind: HostKind,
    /// The CPU's name.
    pub cpu_model: String,
    /// Release of the host's kernel.
    pub kernel: String,
    /// Host CPUs that this process may use.
    pub cpus: usize,
    /// Most vCPUs that KVM gives one machine, 0 without KVM.
    pub max_vcpus: usize,
    /// Everything that the product uses.
    pub capabilities: Vec<Capability>,
}

impl HostReport {
    /// True where a machine can be booted.
    #[must_use]
    pub fn can_boot(&self) -> bool {
        self.missing()
            .all(|capability| capability.need != Need::Required)
    }

    /// What the host lacks.
    pub fn missing(&self) -> impl Iterator<Item = &Capability> {
        self.capabilities
            .iter()
            .filter(|capability| !capability.present)
    }
}

/// The host that this process runs on.
#[derive(Clone, Copy, Debug)]
pub struct Host;

impl Host {
    /// Looks at everything.
    #[must_use]
    pub fn probe() -> HostReport {
        Facts::gather().judge()
    }

    /// Only which kind of host it is.
    #[must_use]
    pub fn kind() -> HostKind {
        let cpuinfo = read("/proc/cpuinfo");
        kind(is_lab(), vm::open().is_ok(), nested_flag(&cpuinfo))
    }
}

/// Host CPUs that this process may use; none where the host does not say.
pub(crate) fn allowed_cpus() -> Vec<usize> {
    sys::allowed_cpus().unwrap_or_default()
}

/// What was seen, before it is judged.
#[derive(Debug)]
struct Facts {
    lab: bool,
    cpu_model: String,
    nested_flag: Option<Nested>,
    kernel: String,
    allowed_cpus: io::Result<Vec<usize>>,
    root: bool,
    kvm: Result<KvmFacts, OpenError>,
    nested_paging: Option<(&'static str, bool)>,
    tdp_mmu: bool,
    userfaultfd: io::Result<()>,
    tracepoints: Option<String>,
}

/// What KVM says.
#[derive(Clone, Debug, Default)]
struct KvmFacts {
    user_memory: bool,
    ext_cpuid: bool,
    immediate_exit: bool,
    irqchip: bool,
    split_irqchip: bool,
    x2apic_api: bool,
    guest_debug: bool,
    hardware_breakpoints: bool,
    dirty_protect: bool,
    dirty_ring: bool,
    stats_fd: bool,
    max_vcpus: usize,
}

impl KvmFacts {
    fn ask(kvm: &Kvm) -> Self {
        Self {
            user_memory: kvm.check_extension(Cap::UserMemory),
            ext_cpuid: kvm.check_extension(Cap::ExtCpuid),
            immediate_exit: kvm.check_extension(Cap::ImmediateExit),
            irqchip: kvm.check_extension(Cap::Irqchip) && kvm.check_extension(Cap::MpState),
            split_irqchip: kvm.check_extension(Cap::SplitIrqchip),
            x2apic_api: kvm.check_extension(Cap::X2ApicApi),
            guest_debug: kvm.check_extension_raw(raw_cap::SET_GUEST_DEBUG) > 0,
            hardware_breakpoints: kvm.check_extension_raw(raw_cap::SET_GUEST_DEBUG2)
                & kvm_bindings::KVM_GUESTDBG_USE_HW_BP as i32
                != 0,
            dirty_protect: kvm.check_extension_raw(raw_cap::DIRTY_PROTECT) > 0,
            dirty_ring: kvm.check_extension_raw(raw_cap::DIRTY_RING) > 0,
            stats_fd: kvm.check_extension_raw(raw_cap::STATS_FD) > 0,
            max_vcpus: kvm.get_max_vcpus(),
        }
    }
}

impl Facts {
    fn gather() -> Self {
        let cpuinfo = read("/proc/cpuinfo");
        Self {
            lab: is_lab(),
            cpu_model: field(&cpuinfo, "model name")
                .unwrap_or("unknown")
                .to_owned(),
            nested_flag: nested_flag(&cpuinfo),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            allowed_cpus: sys::allowed_cpus(),
            root: sys::is_root(),
            kvm: vm::open().map(|kvm| KvmFacts::ask(&kvm)),
            nested_paging: [
                ("kvm_intel.ept", "/sys/module/kvm_intel/parameters/ept"),
                ("kvm_amd.npt", "/sys/module/kvm_amd/parameters/npt"),
            ]
            .into_iter()
            .find_map(|(name, path)| Some((name, is_on(&fs::read_to_string(path).ok()?)))),
            tdp_mmu: is_on(&read("/sys/module/kvm/parameters/tdp_mmu")),
            userfaultfd: sys::userfaultfd().map(drop),
            tracepoints: [
                "/sys/kernel/tracing/events/kvmmmu",
                "/sys/kernel/debug/tracing/events/kvmmmu",
            ]
            .into_iter()
            .find(|path| fs::File::open(format!("{path}/enable")).is_ok())
            .map(str::to_owned),
        }
    }

    fn judge(self) -> HostReport {
        let kind = kind(self.lab, self.kvm.is_ok(), self.nested_flag);
        let mut capabilities = vec![device(&self.kvm)];
        let kvm = self.kvm.as_ref().ok().cloned().unwrap_or_default();
        capabilities.extend(kvm_capabilities(&kvm, kind));
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
    ]
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
        need: Need::Optional,
        detail: detail.into(),
        needed_for,
        how_to_get,
    }
}

fn kind(lab: bool, has_kvm: bool, flag: Option<Nested>) -> HostKind {
    match (has_kvm, lab, flag) {
        (false, _, _) => HostKind::None,
        (true, true, _) => HostKind::Lab,
        (true, false, Some(nested)) => HostKind::Hardware(nested),
        (true, false, None) => HostKind::Emulating,
    }
}

fn is_lab() -> bool {
    std::env::var_os(KIND_VARIABLE).is_some_and(|value| value == LAB_VALUE)
        || read("/proc/cmdline")
            .split_ascii_whitespace()
            .any(|word| word == LAB_PARAMETER)
}

fn nested_flag(cpuinfo: &str) -> Option<Nested> {
    let flags = field(cpuinfo, "flags")?;
    flags.split_ascii_whitespace().find_map(|flag| match flag {
        "vmx" => Some(Nested::Vmx),
        "svm" => Some(Nested::Svm),
        _ => None,
    })
}

/// The first `name : value` of /proc/cpuinfo.
fn field<'a>(cpuinfo: &'a str, name: &str) -> Option<&'a str> {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim())
}

fn is_on(parameter: &str) -> bool {
    matches!(parameter.trim(), "Y" | "1")
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
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

    const INTEL: &str = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu vmx sse2\n";

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
    fn the_kind_follows_from_kvm_the_lab_mark_and_the_flag() {
        assert_eq!(kind(true, false, Some(Nested::Svm)), HostKind::None);
        assert_eq!(kind(true, true, Some(Nested::Svm)), HostKind::Lab);
        assert_eq!(
            kind(false, true, Some(Nested::Vmx)),
            HostKind::Hardware(Nested::Vmx)
        );
        assert_eq!(kind(false, true, None), HostKind::Emulating);
    }

    #[test]
    fn cpuinfo_is_read() {
        assert_eq!(nested_flag(INTEL), Some(Nested::Vmx));
        assert_eq!(field(INTEL, "model name"), Some("Some CPU"));
        assert_eq!(nested_flag("flags : fpu hypervisor\n"), None);
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
    fn everything_that_is_missing_says_how_to_get_it() {
        for capability in facts(Ok(KvmFacts::default())).judge().missing() {
            assert!(!capability.how_to_get.is_empty(), "{}", capability.name);
            assert!(!capability.needed_for.is_empty(), "{}", capability.name);
        }
    }

    #[test]
    fn this_host_can_be_probed() {
        let report = Host::probe();
        assert_eq!(report.kind, Host::kind());
        assert!(!report.kernel.is_empty());
        assert!(report.cpus > 0);
    }
}
