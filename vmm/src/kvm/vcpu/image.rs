//! Everything that a vCPU is, so that it can be put back.
#![allow(
    unsafe_code,
    reason = "KVM_SET_XSAVE reads behind the structure where state components are dynamic"
)]

use kvm_bindings::{
    KVM_MAX_MSR_ENTRIES, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::kvm::{KvmError, failed};

/// IA32_TSC. A guest's clock is not part of its state: it goes on.
const TSC: u32 = 0x10;
/// What CR3 differs in while the translations are flushed.
const OTHER_PAGE: u64 = 1 << 12;

/// A vCPU between two instructions, as KVM knows it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct VcpuImage {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    /// None where the host has no XSAVE.
    xcrs: Option<Box<kvm_xcrs>>,
    debug: kvm_debugregs,
    /// Interrupts and exceptions that are pending or half delivered.
    events: kvm_vcpu_events,
    msrs: Vec<kvm_msr_entry>,
    /// None without an in-kernel irqchip.
    lapic: Option<Box<kvm_lapic_state>>,
    /// None where the host tells none.
    mp_state: Option<kvm_mp_state>,
    /// What the last exit left in `kvm_run`.
    interrupt_flag: u8,
    ready_for_interrupt: u8,
    /// HLT was executed and no interrupt has ended it.
    pub(super) halted: bool,
}

impl VcpuImage {
    /// Nothing holds interrupts off any more.
    #[cfg(test)]
    pub(crate) fn drop_shadow(&mut self) {
        self.events.interrupt.shadow = 0;
        (self.interrupt_flag, self.ready_for_interrupt) = (1, 1);
    }

    /// The state of `vcpu`, of whose MSRs those in `msrs` that it has.
    pub(super) fn take(
        vcpu: &mut VcpuFd,
        msrs: &[u32],
        halted: bool,
        irqchip: bool,
    ) -> Result<Self, KvmError> {
        let run = vcpu.get_kvm_run();
        let (interrupt_flag, ready_for_interrupt) =
            (run.if_flag, run.ready_for_interrupt_injection);
        let lapic = irqchip
            .then(|| vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC")))
            .transpose()?;
        Ok(Self {
            // KVM may still have to carry out part of these three: asked for first.
            mp_state: vcpu.get_mp_state().ok(),
            events: vcpu
                .get_vcpu_events()
                .map_err(failed("KVM_GET_VCPU_EVENTS"))?,
            regs: vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?,
            xsave: Box::new(vcpu.get_xsave().map_err(failed("KVM_GET_XSAVE"))?),
            xcrs: vcpu.get_xcrs().ok().map(Box::new),
            debug: vcpu.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
            msrs: read_msrs(vcpu, msrs)?,
            lapic: lapic.map(Box::new),
            interrupt_flag,
            ready_for_interrupt,
            halted,
        })
    }

    /// Makes `vcpu` this one, with all its translations flushed.
    pub(super) fn put(&self, vcpu: &mut VcpuFd) -> Result<(), KvmError> {
        // A CR3 that changes makes KVM drop the root and with it every translation (`__set_sregs` and
        // `kvm_mmu_reset_context` in Linux's x86.c and mmu.c); one that stays would keep them.
        let other = kvm_sregs {
            cr3: self.sregs.cr3 ^ OTHER_PAGE,
            ..self.sregs
        };
        for sregs in [&other, &self.sregs] {
            vcpu.set_sregs(sregs).map_err(failed("KVM_SET_SREGS"))?;
        }
        vcpu.set_regs(&self.regs).map_err(failed("KVM_SET_REGS"))?;
        // SAFETY: no dynamically enabled state component: nothing in this program asks for one, so that
        // KVM reads no more than the structure.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(failed("KVM_SET_XSAVE"))?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(failed("KVM_SET_XCRS"))?;
        }
        vcpu.set_debug_regs(&self.debug)
            .map_err(failed("KVM_SET_DEBUGREGS"))?;
        for some in self.msrs.chunks(KVM_MAX_MSR_ENTRIES) {
            let entries = Msrs::from_entries(some).expect("no more than the most");
            let set = vcpu.set_msrs(&entries).map_err(failed("KVM_SET_MSRS"))?;
            if let Some(refused) = some.get(set) {
                let text = format!("MSR {:#x} is refused", refused.index);
                return Err(failed("KVM_SET_MSRS")(std::io::Error::other(text)));
            }
        }
        if let Some(lapic) = &self.lapic {
            vcpu.set_lapic(lapic).map_err(failed("KVM_SET_LAPIC"))?;
        }
        if let Some(mp_state) = self.mp_state {
            vcpu.set_mp_state(mp_state)
                .map_err(failed("KVM_SET_MP_STATE"))?;
        }
        // Last: what was set before may have changed what is pending.
        vcpu.set_vcpu_events(&self.events)
            .map_err(failed("KVM_SET_VCPU_EVENTS"))?;
        let run = vcpu.get_kvm_run();
        run.if_flag = self.interrupt_flag;
        run.ready_for_interrupt_injection = self.ready_for_interrupt;
        run.request_interrupt_window = 0;
        Ok(())
    }
}

/// The MSRs of `wanted` that can be read and written here: KVM's list has some that this CPU or this
/// machine lacks (the paravirtual ones need an in-kernel irqchip), and what the host may not write,
/// the guest may not either.
fn read_msrs(vcpu: &VcpuFd, wanted: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let entries: Vec<_> = wanted
        .iter()
        .filter(|index| **index != TSC)
        .map(|index| kvm_msr_entry {
            index: *index,
            ..kvm_msr_entry::default()
        })
        .collect();
    let read = accepted(&entries, |some| {
        vcpu.get_msrs(some).map_err(failed("KVM_GET_MSRS"))
    })?;
    accepted(&read, |some| {
        vcpu.set_msrs(some).map_err(failed("KVM_SET_MSRS"))
    })
}

/// Hands `entries` to `call` and gives back those that it took. It stops at the first that it refuses.
fn accepted(
    entries: &[kvm_msr_entry],
    call: impl Fn(&mut Msrs) -> Result<usize, KvmError>,
) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut rest = entries;
    let mut taken = Vec::new();
    while !rest.is_empty() {
        let some = rest.len().min(KVM_MAX_MSR_ENTRIES);
        let mut msrs = Msrs::from_entries(&rest[..some]).expect("no more than the most");
        let done = call(&mut msrs)?;
        taken.extend_from_slice(&msrs.as_slice()[..done]);
        rest = &rest[done + usize::from(done < some)..];
    }
    Ok(taken)
}
