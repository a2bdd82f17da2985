//! What is known of a paused vCPU.

use std::fmt;

use kvm_bindings::{kvm_regs, kvm_sregs};
use serde::{Serialize, Serializer};

use super::State;

/// A vCPU between two guest instructions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VcpuSnapshot {
    /// Which vCPU.
    pub index: usize,
    /// Its state.
    pub state: State,
    /// True where it has executed HLT and no interrupt has ended that.
    pub halted: bool,
    /// Why KVM_RUN returned last, kicks left out.
    pub last_exit: ExitReason,
    /// Exits that the guest caused.
    pub exits: u64,
    /// Host CPU that its thread is pinned to.
    pub pinned: Option<usize>,
    /// General registers.
    pub regs: Registers,
    /// System registers.
    pub sregs: SystemRegisters,
}

impl VcpuSnapshot {
    /// Current privilege level.
    #[must_use]
    pub fn cpl(&self) -> u8 {
        self.sregs.cpl
    }
}

/// General registers. In JSON they are strings like `"0x1f000"`: readable, and exact where a reader
/// keeps numbers as doubles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the architecture's own names
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

impl Registers {
    /// Names and values, in the order in which they are shown.
    #[must_use]
    pub fn named(&self) -> [(&'static str, u64); 18] {
        [
            ("rax", self.rax),
            ("rbx", self.rbx),
            ("rcx", self.rcx),
            ("rdx", self.rdx),
            ("rsi", self.rsi),
            ("rdi", self.rdi),
            ("rbp", self.rbp),
            ("rsp", self.rsp),
            ("r8", self.r8),
            ("r9", self.r9),
            ("r10", self.r10),
            ("r11", self.r11),
            ("r12", self.r12),
            ("r13", self.r13),
            ("r14", self.r14),
            ("r15", self.r15),
            ("rip", self.rip),
            ("rflags", self.rflags),
        ]
    }
}

impl Serialize for Registers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(
            self.named()
                .map(|(name, value)| (name, format!("{value:#x}"))),
        )
    }
}

impl Serialize for SystemRegisters {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(
            self.named()
                .map(|(name, value)| (name, format!("{value:#x}"))),
        )
    }
}

impl From<kvm_regs> for Registers {
    fn from(regs: kvm_regs) -> Self {
        Self {
            rax: regs.rax,
            rbx: regs.rbx,
            rcx: regs.rcx,
            rdx: regs.rdx,
            rsi: regs.rsi,
            rdi: regs.rdi,
            rsp: regs.rsp,
            rbp: regs.rbp,
            r8: regs.r8,
            r9: regs.r9,
            r10: regs.r10,
            r11: regs.r11,
            r12: regs.r12,
            r13: regs.r13,
            r14: regs.r14,
            r15: regs.r15,
            rip: regs.rip,
            rflags: regs.rflags,
        }
    }
}

/// The system registers that reports and checkers use; in JSON like [`Registers`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the architecture's own names
pub struct SystemRegisters {
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    /// Selector.
    pub cs: u16,
    /// Selector.
    pub ss: u16,
    /// DPL of SS, which is the CPL (SDM vol. 3A, 6.5).
    pub cpl: u8,
    pub fs_base: u64,
    pub gs_base: u64,
    pub gdt_base: u64,
    pub idt_base: u64,
    pub tr_base: u64,
    pub apic_base: u64,
}

impl SystemRegisters {
    /// Names and values, in the order in which they are shown.
    #[must_use]
    pub fn named(&self) -> [(&'static str, u64); 14] {
        [
            ("cr0", self.cr0),
            ("cr2", self.cr2),
            ("cr3", self.cr3),
            ("cr4", self.cr4),
            ("efer", self.efer),
            ("cs", self.cs.into()),
            ("ss", self.ss.into()),
            ("cpl", self.cpl.into()),
            ("fs_base", self.fs_base),
            ("gs_base", self.gs_base),
            ("gdt_base", self.gdt_base),
            ("idt_base", self.idt_base),
            ("tr_base", self.tr_base),
            ("apic_base", self.apic_base),
        ]
    }
}

impl From<kvm_sregs> for SystemRegisters {
    fn from(sregs: kvm_sregs) -> Self {
        Self {
            cr0: sregs.cr0,
            cr2: sregs.cr2,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
            cs: sregs.cs.selector,
            ss: sregs.ss.selector,
            cpl: sregs.ss.dpl,
            fs_base: sregs.fs.base,
            gs_base: sregs.gs.base,
            gdt_base: sregs.gdt.base,
            idt_base: sregs.idt.base,
            tr_base: sregs.tr.base,
            apic_base: sregs.apic_base,
        }
    }
}

/// Why KVM_RUN returned (`KVM_EXIT_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "reason")]
pub enum ExitReason {
    /// It has not returned yet.
    #[default]
    None,
    /// Port I/O.
    Port {
        /// The port.
        port: u16,
        /// IN, not OUT.
        read: bool,
    },
    /// An access to what is not memory.
    Mmio {
        /// Guest physical address.
        gpa: u64,
        /// A read, not a write.
        read: bool,
    },
    /// HLT.
    Halt,
    /// The vCPU can take an interrupt now.
    InterruptWindow,
    /// Triple fault.
    Shutdown,
    /// KVM could not go on.
    InternalError,
    /// The CPU refused to enter the guest.
    FailEntry,
    /// Another.
    Other,
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = |read: bool| if read { "read" } else { "write" };
        match self {
            Self::None => f.write_str("none"),
            Self::Port { port, read } => write!(f, "port {} {port:#x}", direction(*read)),
            Self::Mmio { gpa, read } => write!(f, "MMIO {} {gpa:#x}", direction(*read)),
            Self::Halt => f.write_str("HLT"),
            Self::InterruptWindow => f.write_str("interrupt window"),
            Self::Shutdown => f.write_str("shutdown (triple fault)"),
            Self::InternalError => f.write_str("KVM internal error"),
            Self::FailEntry => f.write_str("failed entry"),
            Self::Other => f.write_str("other"),
        }
    }
}
