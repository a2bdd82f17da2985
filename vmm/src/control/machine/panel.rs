//! The front panel of a [`Machine`]: what can be set and read between two runs.

use std::io::Write;

use abi::boot::BootInfo;
use abi::channel::Event;
use abi::layout::{BOOT_INFO_GPA, PAGE_SIZE};
use abi::point::Point;

use super::{InterruptHandle, Machine, Timings};
use crate::control::Disturbance;
use crate::control::channel::Channel;
use crate::control::error::MachineError;
use crate::kvm::stats::KvmStats;
use crate::kvm::vcpu::{Vcpu, VcpuSnapshot};
use crate::memory::{GuestRam, PhysMem};

impl Machine {
    /// Makes `point` always stop (or no longer), on every vCPU.
    pub fn trap_point(&mut self, point: Point, on: bool) {
        let (word, bit) = (point as usize / 64, 1 << (point as usize % 64));
        if on {
            self.traps[word] |= bit;
        } else {
            self.traps[word] &= !bit;
        }
        self.set_traps(self.traps);
    }

    /// Makes exactly the points in `mask` always stop, on every vCPU: bit `p % 64` of word `p / 64`
    /// for point `p`. Returns what was set before.
    pub fn set_traps(&mut self, mask: [u64; 4]) -> [u64; 4] {
        let before = std::mem::replace(&mut self.traps, mask);
        let disturber = self.board.disturber();
        for vcpu in 0..self.vcpus.len() {
            let also = disturber.map_or([0; 4], |disturber| disturber.traps(vcpu));
            let all = [0, 1, 2, 3].map(|word: usize| mask[word] | also[word]);
            Channel::new(&self.ram, vcpu).set_traps(all);
        }
        if let Some(disturber) = disturber {
            for (word, bits) in disturber.told.iter().zip(mask) {
                word.store(bits, std::sync::atomic::Ordering::Relaxed);
            }
        }
        before
    }

    /// Makes `vcpu` stop at the point after `points` more.
    ///
    /// # Errors
    /// [`MachineError::NoSuchVcpu`].
    pub fn set_budget(&mut self, vcpu: usize, points: u64) -> Result<(), MachineError> {
        self.channel(vcpu)?.set_budget(points);
        Ok(())
    }

    /// Makes `vcpu` stop at the points in `mask` (bit `p` for point `p`, the first 64), whatever others do.
    ///
    /// # Errors
    /// [`MachineError::NoSuchVcpu`].
    pub fn set_vcpu_traps(&mut self, vcpu: usize, mask: u64) -> Result<(), MachineError> {
        self.channel(vcpu)?.set_traps([mask, 0, 0, 0]);
        Ok(())
    }

    /// What each rule of [`MachineConfig::disturb`](crate::control::MachineConfig::disturb) has done.
    #[must_use]
    pub fn disturbances(&self) -> Vec<Disturbance> {
        let disturber = self.board.disturber();
        disturber.map_or_else(Vec::new, super::super::disturb::Disturber::report)
    }

    /// The IPIs that were dropped, in words.
    #[must_use]
    pub fn dropped_ipis(&self) -> Vec<String> {
        let disturber = self.board.disturber();
        disturber.map_or_else(Vec::new, super::super::disturb::Disturber::lost)
    }

    /// System calls, faults, interrupts and switches so far, of each vCPU.
    #[must_use]
    pub fn progress(&self) -> Vec<u64> {
        let vcpus = 0..self.vcpus.len();
        vcpus
            .map(|vcpu| Channel::new(&self.ram, vcpu).signs_of_life()[0])
            .collect()
    }

    /// Points that `vcpu` has passed; 0 for one that does not exist.
    #[must_use]
    pub fn points_passed(&self, vcpu: usize) -> u64 {
        self.channel(vcpu)
            .map_or(0, |channel| channel.points_passed())
    }

    /// Makes `vcpu` stop ([`Stop::Stepped`](crate::control::Stop::Stepped)) after `instructions` at CPL 0, or
    /// no longer; says how many it has executed since it was told so last.
    ///
    /// # Errors
    /// No such vCPU, or a host that cannot single-step.
    pub fn single_step(
        &mut self,
        vcpu: usize,
        instructions: Option<u64>,
    ) -> Result<u64, MachineError> {
        let vcpus = self.vcpus.len();
        let handle = self.vcpus.get_mut(vcpu);
        let handle = handle.ok_or(MachineError::NoSuchVcpu { given: vcpu, vcpus })?;
        Ok(handle.single_step(instructions)?)
    }

    /// Arms a failpoint on `vcpu`: its `passages`-th passage from here fails; 0 disarms it.
    ///
    /// # Errors
    /// [`MachineError::NoSuchVcpu`].
    pub fn arm(
        &mut self,
        vcpu: usize,
        failpoint: abi::failpoint::Failpoint,
        passages: u32,
    ) -> Result<(), MachineError> {
        self.channel(vcpu)?.arm(failpoint, passages);
        Ok(())
    }

    /// Makes a full event ring stop the machine ([`Stop::RingFull`]) instead of overwriting the
    /// oldest events, or not; what the rings hold now counts as taken.
    pub fn set_ring_exits(&mut self, on: bool) {
        for vcpu in 0..self.vcpus.len() {
            Channel::new(&self.ram, vcpu).set_ring_exits(on);
        }
    }

    /// Takes the events of `vcpu` since the last call off its ring.
    ///
    /// # Errors
    /// [`MachineError::NoSuchVcpu`].
    pub fn take_events(&mut self, vcpu: usize) -> Result<Vec<Event>, MachineError> {
        let channel = self.channel(vcpu)?;
        let events = channel.unread_events();
        channel.consume_events();
        Ok(events)
    }

    /// The last events of `vcpu`, oldest first; none of a vCPU that does not exist. Records that are
    /// torn are left out, unknown kinds are not.
    #[must_use]
    pub fn events(&self, vcpu: usize) -> Vec<Event> {
        self.channel(vcpu)
            .map(|channel| channel.events())
            .unwrap_or_default()
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn nr_vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// Registers and state of `vcpu`.
    ///
    /// # Errors
    /// No such vCPU, or one that is not paused or does not answer.
    pub fn vcpu_state(&self, vcpu: usize) -> Result<VcpuSnapshot, MachineError> {
        let handle = self.vcpus.get(vcpu).ok_or(MachineError::NoSuchVcpu {
            given: vcpu,
            vcpus: self.vcpus.len(),
        })?;
        Ok(handle.snapshot()?)
    }

    /// Guest memory.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The kernel's ELF file.
    #[must_use]
    pub fn kernel_elf(&self) -> &[u8] {
        &self.kernel
    }

    /// The user programs' ELF file.
    #[must_use]
    pub fn user_elf(&self) -> &[u8] {
        &self.user
    }

    /// GPA of the kernel's root object, once the kernel is ready. Only the address is checked, not
    /// what lies there.
    #[must_use]
    pub fn kernel_root(&self) -> Option<u64> {
        let info: BootInfo = self.ram.read_value(BOOT_INFO_GPA).ok()?;
        let root = info.kernel_root;
        (root != 0 && root.is_multiple_of(8) && root <= self.ram.bytes() - PAGE_SIZE)
            .then_some(root)
    }

    /// What the guest has written to its serial port.
    #[must_use]
    pub fn serial_output(&self) -> String {
        self.console.text()
    }

    /// Also writes the serial port's output to `sink` as it comes, from the I/O thread.
    pub fn stream_serial(&mut self, sink: Box<dyn Write + Send>) {
        self.console.stream_to(sink);
    }

    /// How to stop the machine from elsewhere.
    #[must_use]
    pub fn interrupt_handle(&self) -> InterruptHandle {
        self.interrupt.clone()
    }

    /// How long things took.
    #[must_use]
    pub fn timings(&self) -> Timings {
        self.timings
    }

    /// Frequency of the guest's time stamp counters, where KVM tells it.
    #[must_use]
    pub fn tsc_khz(&self) -> Option<u32> {
        self.tsc_khz
    }

    /// Host CPU that each vCPU's thread is pinned to.
    #[must_use]
    pub fn pinning(&self) -> Vec<Option<usize>> {
        self.vcpus.iter().map(Vcpu::pinned).collect()
    }

    /// KVM's counters (`insn_emulation`, `exits`, …), none where the host has none.
    #[must_use]
    pub fn kvm_stats(&self) -> Option<KvmStats> {
        let vm = self.vm.counters().ok()?;
        let vcpus = self
            .vcpus
            .iter()
            .map(|vcpu| vcpu.counters()?.ok())
            .collect::<Option<_>>()?;
        Some(KvmStats { vm, vcpus })
    }

    fn channel(&self, vcpu: usize) -> Result<Channel<'_>, MachineError> {
        if vcpu < self.vcpus.len() {
            Ok(Channel::new(&self.ram, vcpu))
        } else {
            Err(MachineError::NoSuchVcpu {
                given: vcpu,
                vcpus: self.vcpus.len(),
            })
        }
    }
}
