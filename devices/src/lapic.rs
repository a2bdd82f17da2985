//! Local APICs in xAPIC mode for controlled interrupts (SDM vol. 3A, chapter 11).
//!
//! What an interrupt controller of a multi-processor needs for IPIs: identification, task and
//! processor priority, IRR/ISR, EOI, and the interrupt command register. There is no timer and no
//! external interrupt: nothing asynchronous reaches a vCPU unless the host delivers it.
//!
//! An IPI is two steps, so that the host decides what lies between them: the write to the ICR yields
//! an [`IpiRequest`], and [`LocalApics::deliver`] sets it pending at one target.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::bus::{Device, Effect};

/// An IPI that a vCPU has asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpiRequest {
    /// Sending CPU.
    pub from: usize,
    /// Target CPUs, bit `i` for CPU `i`.
    pub targets: u64,
    /// What to deliver.
    pub kind: IpiKind,
}

/// Delivery modes that a guest can ask for (SDM vol. 3A, 11.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpiKind {
    /// An interrupt with this vector, 16 to 255.
    Fixed(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// INIT, SIPI, SMI and the reserved modes, by number: this machine's kernel uses none.
    Unsupported(u8),
}

/// Register offsets (SDM vol. 3A, table 11-1).
mod reg {
    pub(super) const ID: u64 = 0x20;
    pub(super) const VERSION: u64 = 0x30;
    pub(super) const TPR: u64 = 0x80;
    pub(super) const PPR: u64 = 0xa0;
    pub(super) const EOI: u64 = 0xb0;
    pub(super) const LDR: u64 = 0xd0;
    pub(super) const DFR: u64 = 0xe0;
    pub(super) const SVR: u64 = 0xf0;
    pub(super) const ISR: u64 = 0x100;
    pub(super) const IRR: u64 = 0x200;
    pub(super) const ICR_LOW: u64 = 0x300;
    pub(super) const ICR_HIGH: u64 = 0x310;
    pub(super) const LVT_FIRST: u64 = 0x320;
    pub(super) const LVT_LAST: u64 = 0x370;
}

/// Version 0x14 (an integrated APIC), highest LVT entry 5.
const VERSION: u32 = 0x14 | 5 << 16;
/// Software enable, in the spurious-interrupt vector register.
const SVR_ENABLE: u32 = 1 << 8;
/// Mask bit of a local vector table entry.
const LVT_MASKED: u32 = 1 << 16;

/// A set of vectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Vectors([u32; 8]);

impl Vectors {
    fn set(&mut self, vector: u8) {
        self.0[usize::from(vector / 32)] |= 1 << (vector % 32);
    }
    fn clear(&mut self, vector: u8) {
        self.0[usize::from(vector / 32)] &= !(1 << (vector % 32));
    }
    fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|word| *word != 0)?;
        Some((word * 32) as u8 + (31 - self.0[word].leading_zeros()) as u8)
    }
    /// The 32 bits that the register at `offset` from the first one shows.
    fn word(&self, offset: u64) -> u32 {
        self.0[(offset / 0x10) as usize & 7]
    }
}

/// One local APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalApic {
    tpr: u32,
    ldr: u32,
    dfr: u32,
    svr: u32,
    icr_high: u32,
    icr_low: u32,
    lvt: [u32; 6],
    irr: Vectors,
    isr: Vectors,
}

impl LocalApic {
    fn new() -> Self {
        Self {
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            icr_high: 0,
            icr_low: 0,
            lvt: [LVT_MASKED; 6],
            irr: Vectors::default(),
            isr: Vectors::default(),
        }
    }

    /// Processor priority: the higher class of TPR and of the interrupt in service (SDM 11.8.3.1).
    fn ppr(&self) -> u32 {
        let in_service = self.isr.highest().map_or(0, u32::from);
        if self.tpr >> 4 >= in_service >> 4 {
            self.tpr
        } else {
            in_service & 0xf0
        }
    }

    fn pending(&self) -> Option<u8> {
        if self.svr & SVR_ENABLE == 0 {
            return None;
        }
        self.irr
            .highest()
            .filter(|vector| u32::from(vector >> 4) > self.ppr() >> 4)
    }
}

/// The local APICs of a machine; CPU `i` has APIC ID `i`.
#[derive(Debug)]
pub struct LocalApics {
    apics: Vec<Mutex<LocalApic>>,
}

impl LocalApics {
    /// `cpus` local APICs in their state after reset: software disabled.
    #[must_use]
    pub fn new(cpus: usize) -> Self {
        Self {
            apics: (0..cpus).map(|_| Mutex::new(LocalApic::new())).collect(),
        }
    }

    /// Every CPU's local APIC as it is now.
    #[must_use]
    pub fn state(&self) -> Vec<LocalApic> {
        (0..self.apics.len())
            .map(|cpu| self.lock(cpu).clone())
            .collect()
    }

    /// Puts every CPU's local APIC back; those that `state` leaves out stay as they are.
    pub fn set_state(&self, state: &[LocalApic]) {
        for (cpu, apic) in state.iter().take(self.apics.len()).enumerate() {
            self.lock(cpu).clone_from(apic);
        }
    }

    /// Makes `vector` pending at `cpu`. Vectors below 16 are illegal and ignored, as is a CPU that
    /// does not exist.
    pub fn deliver(&self, cpu: usize, vector: u8) {
        if vector >= 16 && cpu < self.apics.len() {
            self.lock(cpu).irr.set(vector);
        }
    }

    /// The vector that `cpu` would take now if its interrupts were enabled.
    #[must_use]
    pub fn pending(&self, cpu: usize) -> Option<u8> {
        self.lock(cpu).pending()
    }

    /// Moves the pending vector of `cpu` into service: it is injected now.
    #[must_use]
    pub fn accept(&self, cpu: usize) -> Option<u8> {
        let mut apic = self.lock(cpu);
        let vector = apic.pending()?;
        apic.irr.clear(vector);
        apic.isr.set(vector);
        Some(vector)
    }

    fn lock(&self, cpu: usize) -> MutexGuard<'_, LocalApic> {
        // Every update is a few plain stores: the state is valid whatever panicked.
        self.apics[cpu]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn read_register(&self, cpu: usize, offset: u64) -> u32 {
        let apic = self.lock(cpu);
        match offset {
            reg::ID => (cpu as u32) << 24,
            reg::VERSION => VERSION,
            reg::TPR => apic.tpr,
            reg::PPR => apic.ppr(),
            reg::LDR => apic.ldr,
            reg::DFR => apic.dfr,
            reg::SVR => apic.svr,
            reg::ISR..0x180 => apic.isr.word(offset - reg::ISR),
            reg::IRR..0x280 => apic.irr.word(offset - reg::IRR),
            reg::ICR_LOW => apic.icr_low,
            reg::ICR_HIGH => apic.icr_high,
            reg::LVT_FIRST..=reg::LVT_LAST => apic.lvt[((offset - reg::LVT_FIRST) / 0x10) as usize],
            _ => 0,
        }
    }

    fn write_register(&self, cpu: usize, offset: u64, value: u32) -> Effect {
        let mut apic = self.lock(cpu);
        match offset {
            reg::TPR => apic.tpr = value & 0xff,
            reg::EOI => {
                if let Some(vector) = apic.isr.highest() {
                    apic.isr.clear(vector);
                }
            }
            reg::LDR => apic.ldr = value & 0xff00_0000,
            reg::DFR => apic.dfr = value | 0x0fff_ffff,
            reg::SVR => apic.svr = value & 0x1ff,
            reg::ICR_HIGH => apic.icr_high = value & 0xff00_0000,
            reg::LVT_FIRST..=reg::LVT_LAST => {
                // Only masked entries: nothing behind them exists.
                apic.lvt[((offset - reg::LVT_FIRST) / 0x10) as usize] = value | LVT_MASKED;
            }
            reg::ICR_LOW => {
                // Delivery status (bit 12) always reads idle: requests leave at once.
                apic.icr_low = value & !(1 << 12);
                let icr_high = apic.icr_high;
                drop(apic);
                return self.command(cpu, icr_high, value);
            }
            _ => {}
        }
        Effect::None
    }

    /// Decodes an interrupt command (SDM vol. 3A, figure 11-12).
    fn command(&self, from: usize, high: u32, low: u32) -> Effect {
        let all = u64::MAX >> (64 - self.apics.len().max(1));
        let me = 1 << from;
        let targets = match low >> 18 & 3 {
            0 => self.destination(high >> 24, low & 1 << 11 != 0) & all,
            1 => me,
            2 => all,
            _ => all & !me,
        };
        let vector = low as u8;
        let kind = match low >> 8 & 7 {
            // Lowest priority is delivered like fixed: the choice of a target is the guest's.
            0 | 1 if vector >= 16 => IpiKind::Fixed(vector),
            0 | 1 => return Effect::None,
            4 => IpiKind::Nmi,
            mode => IpiKind::Unsupported(mode as u8),
        };
        if targets == 0 {
            return Effect::None;
        }
        Effect::Ipi(IpiRequest {
            from,
            targets,
            kind,
        })
    }

    fn destination(&self, field: u32, logical: bool) -> u64 {
        match (logical, field) {
            (false, 0xff) => u64::MAX,
            (false, id) => 1u64.checked_shl(id).unwrap_or(0),
            // Flat model: the CPUs whose logical ID has a bit in common with the field.
            (true, mask) => (0..self.apics.len())
                .filter(|cpu| self.lock(*cpu).ldr >> 24 & mask != 0)
                .fold(0, |targets, cpu| targets | 1 << cpu),
        }
    }
}

impl Device for LocalApics {
    fn name(&self) -> &'static str {
        "local APIC"
    }
    /// Registers are 32 bits at 16-byte steps; anything else reads as zero (SDM vol. 3A, 11.4.1).
    fn read(&self, cpu: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (true, Ok(word)) = (offset.is_multiple_of(16), <&mut [u8; 4]>::try_from(data)) {
            *word = self.read_register(cpu, offset).to_le_bytes();
        }
    }
    fn write(&self, cpu: usize, offset: u64, data: &[u8]) -> Effect {
        match (offset.is_multiple_of(16), <[u8; 4]>::try_from(data)) {
            (true, Ok(word)) => self.write_register(cpu, offset, u32::from_le_bytes(word)),
            _ => Effect::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn enabled(cpus: usize) -> LocalApics {
        let apics = LocalApics::new(cpus);
        for cpu in 0..cpus {
            write(&apics, cpu, reg::SVR, 0x1ff);
        }
        apics
    }
    fn write(apics: &LocalApics, cpu: usize, offset: u64, value: u32) -> Effect {
        apics.write(cpu, offset, &value.to_le_bytes())
    }
    fn read(apics: &LocalApics, cpu: usize, offset: u64) -> u32 {
        let mut word = [0; 4];
        apics.read(cpu, offset, &mut word);
        u32::from_le_bytes(word)
    }

    #[test]
    fn each_cpu_sees_its_own_id() {
        let apics = LocalApics::new(3);
        assert_eq!(
            [0, 1, 2].map(|cpu| read(&apics, cpu, reg::ID) >> 24),
            [0, 1, 2]
        );
    }

    #[test]
    fn a_command_is_a_request_and_delivery_is_another_step() {
        let apics = enabled(2);
        write(&apics, 0, reg::ICR_HIGH, 1 << 24);
        let effect = write(&apics, 0, reg::ICR_LOW, 0xf0);
        let request = IpiRequest {
            from: 0,
            targets: 0b10,
            kind: IpiKind::Fixed(0xf0),
        };
        assert_eq!(effect, Effect::Ipi(request));
        assert_eq!(apics.pending(1), None);
        apics.deliver(1, 0xf0);
        assert_eq!(apics.pending(1), Some(0xf0));
    }

    #[test]
    fn shorthands_choose_targets() {
        let apics = enabled(4);
        for (shorthand, expected) in [(1, 0b0010), (2, 0b1111), (3, 0b1101)] {
            let effect = write(&apics, 1, reg::ICR_LOW, shorthand << 18 | 0x40);
            let request = IpiRequest {
                from: 1,
                targets: expected,
                kind: IpiKind::Fixed(0x40),
            };
            assert_eq!(effect, Effect::Ipi(request));
        }
    }

    #[test]
    fn logical_destinations_use_the_flat_model() {
        let apics = enabled(3);
        for cpu in 0..3 {
            write(&apics, cpu, reg::LDR, 1 << (24 + cpu));
        }
        write(&apics, 0, reg::ICR_HIGH, 0b110 << 24);
        let effect = write(&apics, 0, reg::ICR_LOW, 1 << 11 | 0x50);
        let request = IpiRequest {
            from: 0,
            targets: 0b110,
            kind: IpiKind::Fixed(0x50),
        };
        assert_eq!(effect, Effect::Ipi(request));
    }

    #[test]
    fn absent_targets_and_illegal_vectors_request_nothing() {
        let apics = enabled(2);
        write(&apics, 0, reg::ICR_HIGH, 9 << 24);
        assert_eq!(write(&apics, 0, reg::ICR_LOW, 0x40), Effect::None);
        assert_eq!(write(&apics, 0, reg::ICR_LOW, 2 << 18 | 0x0f), Effect::None);
    }

    #[test]
    fn a_higher_class_interrupts_a_lower_one_only() {
        let apics = enabled(1);
        apics.deliver(0, 0x45);
        assert_eq!(apics.accept(0), Some(0x45));
        apics.deliver(0, 0x4f);
        assert_eq!(apics.pending(0), None, "same class waits for the EOI");
        apics.deliver(0, 0x50);
        assert_eq!(apics.accept(0), Some(0x50));
        write(&apics, 0, reg::EOI, 0);
        write(&apics, 0, reg::EOI, 0);
        assert_eq!(apics.accept(0), Some(0x4f));
    }

    #[test]
    fn task_priority_holds_back_lower_classes() {
        let apics = enabled(1);
        apics.deliver(0, 0x75);
        write(&apics, 0, reg::TPR, 0x70);
        assert_eq!(apics.pending(0), None);
        write(&apics, 0, reg::TPR, 0x60);
        assert_eq!(apics.pending(0), Some(0x75));
    }

    #[test]
    fn a_disabled_apic_keeps_what_is_pending() {
        let apics = LocalApics::new(1);
        apics.deliver(0, 0x40);
        assert_eq!(apics.accept(0), None);
        write(&apics, 0, reg::SVR, 0x1ff);
        assert_eq!(apics.accept(0), Some(0x40));
    }

    proptest! {
        /// Every vector delivered is accepted exactly once, highest class first, whatever the order.
        #[test]
        fn delivered_vectors_are_accepted_once(vectors in prop::collection::vec(16u8.., 1..40)) {
            let apics = enabled(1);
            for vector in &vectors {
                apics.deliver(0, *vector);
            }
            let mut accepted = Vec::new();
            while let Some(vector) = apics.accept(0) {
                accepted.push(vector);
                write(&apics, 0, reg::EOI, 0);
            }
            let mut expected = vectors;
            expected.sort_unstable();
            expected.dedup();
            expected.reverse();
            prop_assert_eq!(accepted, expected);
        }

        /// No access, of any size at any offset, panics or makes an interrupt pending by itself.
        #[test]
        fn any_access_is_harmless(
            accesses in prop::collection::vec((0u64..0x1000, prop::collection::vec(any::<u8>(), 1..9)), 1..60)
        ) {
            let apics = enabled(2);
            for (offset, data) in accesses {
                apics.write(0, offset, &data);
                let mut data = data;
                apics.read(0, offset, &mut data);
            }
            prop_assert_eq!(apics.pending(0), None);
        }
    }
}
