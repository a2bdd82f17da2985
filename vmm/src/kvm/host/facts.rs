//! Looks at the host and judges nothing.

use std::fs;
use std::io;

use kvm_ioctls::{Cap, Kvm};

use super::{HostKind, Nested};
use crate::kvm::sys;
use crate::kvm::vm::{self, OpenError};

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

/// What was seen, before it is judged.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) lab: bool,
    pub(super) cpu_model: String,
    pub(super) nested_flag: Option<Nested>,
    pub(super) kernel: String,
    pub(super) allowed_cpus: io::Result<Vec<usize>>,
    pub(super) root: bool,
    pub(super) kvm: Result<KvmFacts, OpenError>,
    pub(super) nested_paging: Option<(&'static str, bool)>,
    pub(super) tdp_mmu: bool,
    pub(super) userfaultfd: io::Result<()>,
    pub(super) tracepoints: Option<String>,
}

/// What KVM says.
#[derive(Clone, Debug, Default)]
pub(super) struct KvmFacts {
    pub(super) user_memory: bool,
    pub(super) ext_cpuid: bool,
    pub(super) immediate_exit: bool,
    pub(super) irqchip: bool,
    pub(super) split_irqchip: bool,
    pub(super) x2apic_api: bool,
    pub(super) guest_debug: bool,
    pub(super) hardware_breakpoints: bool,
    pub(super) dirty_protect: bool,
    pub(super) dirty_ring: bool,
    pub(super) stats_fd: bool,
    pub(super) pcid: bool,
    pub(super) max_vcpus: usize,
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
            pcid: vm::offers_pcid(kvm).unwrap_or_default(),
            max_vcpus: kvm.get_max_vcpus(),
        }
    }
}

impl Facts {
    pub(super) fn gather() -> Self {
        let cpuinfo = read("/proc/cpuinfo");
        Self {
            lab: is_lab(),
            cpu_model: model_name(&cpuinfo),
            nested_flag: nested_flag(&cpuinfo),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            allowed_cpus: sys::allowed_cpus(),
            root: sys::is_root(),
            kvm: vm::open().map(|kvm| KvmFacts::ask(&kvm)),
            nested_paging: nested_paging(),
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
}

fn model_name(cpuinfo: &str) -> String {
    field(cpuinfo, "model name").unwrap_or("unknown").to_owned()
}

/// Only the CPU's name.
pub(super) fn cpu_model() -> String {
    model_name(&read("/proc/cpuinfo"))
}

/// The parameter that says whether KVM uses nested page tables, and what it says.
fn nested_paging() -> Option<(&'static str, bool)> {
    [
        ("kvm_intel.ept", "/sys/module/kvm_intel/parameters/ept"),
        ("kvm_amd.npt", "/sys/module/kvm_amd/parameters/npt"),
    ]
    .into_iter()
    .find_map(|(name, path)| Some((name, is_on(&fs::read_to_string(path).ok()?))))
}

/// True unless KVM is known to leave the guest's page tables to the CPU.
pub(super) fn shadows_page_tables() -> bool {
    nested_flag(&read("/proc/cpuinfo")).is_none() || !nested_paging().is_some_and(|(_, on)| on)
}

/// Only which kind of host this is.
pub(super) fn kind_of_host() -> HostKind {
    let cpuinfo = read("/proc/cpuinfo");
    kind(is_lab(), vm::open().is_ok(), nested_flag(&cpuinfo))
}

pub(super) fn kind(lab: bool, has_kvm: bool, flag: Option<Nested>) -> HostKind {
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

#[cfg(test)]
mod tests {
    use super::*;

    const INTEL: &str = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu vmx sse2\n";

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
}
