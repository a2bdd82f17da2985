//! Why a machine has stopped.

use std::fmt;

use abi::channel::ReportKind;
use abi::point::Point;

use crate::kvm::vcpu::{Fault, VcpuSnapshot};

/// Why [`Machine::run_until`](super::Machine::run_until) has returned. Every vCPU is paused.
#[derive(Clone, Debug, PartialEq)]
pub enum Stop {
    /// The guest has ended the run.
    Exited {
        /// Exit status of the first process.
        status: u32,
    },
    /// A vCPU stands at a scheduling point that is trapped, or where its budget ran out.
    Point {
        /// Which vCPU.
        vcpu: usize,
        /// Where it stands.
        point: Point,
        /// Arguments of the point.
        args: [u64; 2],
    },
    /// A user program has found a wrong value.
    Report {
        /// vCPU that it runs on.
        vcpu: usize,
        /// What it found.
        report: ProbeReport,
    },
    /// The event ring of a vCPU is full (only where
    /// [`Machine::set_ring_exits`](super::Machine::set_ring_exits) asked for this).
    RingFull {
        /// Which vCPU.
        vcpu: usize,
    },
    /// The kernel is about to enter CPL 3 for the first time (serialised machines only).
    FirstUser {
        /// Which vCPU.
        vcpu: usize,
    },
    /// A vCPU was single-stepped for as long as it was to be ([`Machine::single_step`](super::Machine::single_step)).
    Stepped {
        /// Which vCPU.
        vcpu: usize,
        /// Address of its next instruction.
        rip: u64,
    },
    /// The time given is over.
    Deadline,
    /// Somebody asked for it through an [`InterruptHandle`](super::InterruptHandle).
    Interrupted,
    /// The guest cannot go on.
    Crashed(Crash),
}

impl Stop {
    /// True where the machine cannot be run on.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Exited { .. } | Self::Crashed(_))
    }
}

/// What a user program has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeReport {
    /// What is wrong.
    pub kind: ReportKind,
    /// Address that was accessed.
    pub gva: u64,
    /// What had to be there.
    pub expected: u64,
    /// What was there.
    pub found: u64,
    /// Task that found it.
    pub task: u64,
}

/// A guest that cannot go on.
#[derive(Clone, Debug, PartialEq)]
pub struct Crash {
    /// Why.
    pub cause: CrashCause,
    /// The vCPU that it happened on; none where it is the machine as a whole.
    pub vcpu: Option<usize>,
    /// Every vCPU as it stood then.
    pub snapshots: Vec<VcpuSnapshot>,
}

/// Why a guest cannot go on.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[serde(rename_all = "kebab-case", tag = "cause")]
pub enum CrashCause {
    /// An exception whose handling failed twice, or that came before there was an IDT
    /// (KVM_EXIT_SHUTDOWN).
    TripleFault,
    /// KVM gave up (KVM_EXIT_INTERNAL_ERROR).
    InternalError {
        /// `KVM_INTERNAL_ERROR_*` of Linux's `kvm.h`.
        suberror: u32,
        /// Its data: by suberror.
        data: Vec<u64>,
    },
    /// The kernel panicked.
    KernelPanic {
        /// Its message.
        message: String,
    },
    /// No system call, fault, interrupt, switch, event or exit for this long.
    NoProgress {
        /// The watchdog's time, in seconds.
        seconds: f64,
    },
    /// The run was not over when its time was: not by itself a crash, but it is looked at like one.
    DidNotFinish {
        /// The time it had, in seconds.
        seconds: f64,
        /// How long no vCPU had got anywhere by then, in seconds; 0 where one still did.
        still: f64,
    },
    /// The CPU refused to enter the guest (KVM_EXIT_FAIL_ENTRY).
    FailEntry {
        /// The CPU's reason (VMX: exit reason; SVM: exit code).
        reason: u64,
    },
    /// The guest did something that this machine does not have.
    UnexpectedExit {
        /// What.
        text: String,
    },
}

impl CrashCause {
    pub(super) fn unexpected(text: impl Into<String>) -> Self {
        Self::UnexpectedExit { text: text.into() }
    }

    /// True where KVM or the CPU gave up, not the kernel or this machine.
    #[must_use]
    pub fn is_by_host(&self) -> bool {
        matches!(
            self,
            Self::TripleFault | Self::InternalError { .. } | Self::FailEntry { .. }
        )
    }

    /// Name of a `KVM_INTERNAL_ERROR_*` suberror.
    #[must_use]
    pub fn suberror_name(suberror: u32) -> &'static str {
        match suberror {
            1 => "emulation failure",
            2 => "simultaneous exceptions",
            3 => "exit during event delivery",
            4 => "unexpected exit reason",
            _ => "unknown",
        }
    }
}

impl From<Fault> for CrashCause {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Shutdown => Self::TripleFault,
            Fault::InternalError { suberror, data } => Self::InternalError { suberror, data },
            Fault::FailEntry { reason } => Self::FailEntry { reason },
            Fault::Unexpected(text) => Self::UnexpectedExit { text },
        }
    }
}

impl fmt::Display for CrashCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TripleFault => f.write_str("triple fault"),
            Self::InternalError { suberror, .. } => write!(
                f,
                "KVM internal error, suberror {suberror} ({})",
                Self::suberror_name(*suberror)
            ),
            Self::KernelPanic { message } => write!(f, "kernel panic: {message}"),
            Self::NoProgress { seconds } => write!(f, "no progress for {seconds} s"),
            Self::DidNotFinish { seconds, .. } => {
                write!(f, "the run did not finish in {seconds} s")
            }
            Self::FailEntry { reason } => write!(f, "failed VM entry, reason {reason:#x}"),
            Self::UnexpectedExit { text } => f.write_str(text),
        }
    }
}
