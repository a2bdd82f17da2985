//! The CPU's local APIC, as far as IPIs need it.

use abi::boot::InterruptMode;
use abi::layout::LAPIC_GVA;

use super::percpu;
use super::registers::{self, msr, read_msr, write_msr};

/// Vector of a spurious interrupt.
pub(super) const SPURIOUS_VECTOR: u64 = 0xff;
const SOFTWARE_ENABLE: u64 = 1 << 8;

// Offsets of xAPIC registers (SDM vol. 3A, table 11-1). An x2APIC MSR is 0x800 + offset / 16, but for
// the two halves of ICR, which are one MSR.
const EOI: u64 = 0xb0;
const SPURIOUS: u64 = 0xf0;
/// IRR of the vectors from 0xe0 on, which all of ours are among.
const IRR_HIGHEST: u64 = 0x270;
const ICR_LOW: u64 = 0x300;
const ICR_HIGH: u64 = 0x310;
/// ICR: fixed delivery, physical destination, edge, assert (bit 14; SDM vol. 3A, 11.6.1).
const ICR_FIXED: u64 = 1 << 14;
/// IA32_APIC_BASE: x2APIC mode and global enable.
const BASE_X2APIC_ENABLED: u64 = 1 << 10 | 1 << 11;

/// How the local APIC is reached. The APIC ID of a vCPU is its index in both.
#[derive(Clone, Copy, Debug)]
pub(super) enum LocalApic {
    /// Controlled mode: the host's device model, behind MMIO. Every access is an exit.
    XApic,
    /// Hardware mode: MSRs.
    X2Apic,
}

impl LocalApic {
    pub(super) fn new(mode: InterruptMode) -> Self {
        match mode {
            InterruptMode::Controlled => Self::XApic,
            InterruptMode::Hardware => Self::X2Apic,
        }
    }

    /// Makes this CPU's local APIC accept interrupts.
    pub(super) fn enable(self) {
        if let Self::X2Apic = self {
            let base = read_msr(msr::APIC_BASE);
            // SAFETY: switches the register interface before anything has used the other one.
            unsafe { write_msr(msr::APIC_BASE, base | BASE_X2APIC_ENABLED) };
        }
        self.write(SPURIOUS, SOFTWARE_ENABLE | SPURIOUS_VECTOR);
    }

    /// Sends `vector` to `cpu`.
    pub(super) fn send(self, cpu: usize, vector: u8) {
        let (destination, command) = (cpu as u64, ICR_FIXED | u64::from(vector));
        match self {
            // No wait for the delivery status to clear: KVM and our device deliver at once, and every
            // look would be an exit.
            Self::XApic => {
                self.write(ICR_HIGH, destination << 24);
                self.write(ICR_LOW, command);
            }
            Self::X2Apic => {
                store_fence();
                self.write(ICR_LOW, destination << 32 | command);
            }
        }
    }

    /// Opens a window in which all pending interrupts are taken.
    pub(super) fn relax(self) {
        match self {
            // One window takes one interrupt on a host that emulates: there may be another, that came
            // while the first one's handler ran.
            Self::XApic => {
                let pending = (LAPIC_GVA + IRR_HIGHEST) as *const u32;
                while registers::relax_with_exit(pending) != 0 {}
            }
            Self::X2Apic => registers::relax(percpu::next_turn()),
        }
    }

    /// Halts until an interrupt came; all that are pending then are taken.
    pub(super) fn wait_for_interrupt(self) {
        registers::wait_for_interrupt();
        if let Self::XApic = self {
            self.relax();
        }
    }

    /// Ends the interrupt that is being handled.
    pub(super) fn end_of_interrupt(self) {
        self.write(EOI, 0);
    }

    #[inline]
    fn write(self, register: u64, value: u64) {
        match self {
            // SAFETY: the boot page tables map the APIC's page there, uncached, for good.
            Self::XApic => unsafe {
                ((LAPIC_GVA + register) as *mut u32).write_volatile(value as u32);
            },
            // SAFETY: an interrupt that the handlers expect is all that these registers can cause.
            Self::X2Apic => unsafe { write_msr(0x800 + (register >> 4) as u32, value) },
        }
    }
}

/// A WRMSR to an x2APIC register does not wait for earlier stores as an MMIO write does: the target
/// could take the IPI and not see what it is about (SDM vol. 3A, 11.12.3; Linux's
/// `weak_wrmsr_fence`).
fn store_fence() {
    // SAFETY: fences only order accesses.
    unsafe { core::arch::asm!("mfence", "lfence", options(nostack, preserves_flags)) };
}
