//! What this host can do, as data for `doctor`: facts are gathered in one place ([`facts`]) and judged in
//! another ([`judge`]), which needs no host to test.

mod facts;
mod judge;

use std::sync::OnceLock;

use serde::Serialize;

use super::sys;
use facts::Facts;

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
    /// Whether the host is known to have it.
    pub present: bool,
    /// False where it could not be asked for: what kept it from being asked comes first.
    pub known: bool,
    /// How much depends on it.
    pub need: Need,
    /// What was seen.
    pub detail: String,
    /// What it is used for: impossible where it is missing.
    pub needed_for: &'static str,
    /// How to get it; empty where it is not known to be missing.
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

    /// Only the CPU's name.
    #[must_use]
    pub fn cpu_model() -> String {
        facts::cpu_model()
    }

    /// Only which kind of host it is.
    #[must_use]
    pub fn kind() -> HostKind {
        facts::kind_of_host()
    }
}

/// True where KVM shadows the guest's page tables, or where that is not known.
pub(crate) fn shadows_page_tables() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(facts::shadows_page_tables)
}

/// Host CPUs that this process may use; none where the host does not say.
pub(crate) fn allowed_cpus() -> Vec<usize> {
    sys::allowed_cpus().unwrap_or_default()
}
