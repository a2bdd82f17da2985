//! A [`Machine`] saved, put back, and cloned.

use std::sync::Arc;
use std::time::{Duration, Instant};

use abi::layout::{CHANNEL_GPA, CHANNEL_STRIDE, PAGE_SIZE};

use super::{Machine, MachineConfig, MachineError, Message, Start};
use crate::boot;
use crate::kvm::host;
use crate::kvm::vcpu::Step;
use crate::memory::{GuestRam, PhysMem};
use crate::snapshot::Snapshot;

/// What a machine goes back to, and how.
pub(super) struct Base {
    snapshot: Arc<Snapshot>,
    /// KVM notes which pages the guest writes; else all pages are compared.
    logged: bool,
    /// KVM shadows the guest's page tables.
    shadowed: bool,
}

/// How long the parts of a reset took. The vCPUs are put back meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResetTimings {
    /// Pages that were put back.
    pub pages: u64,
    /// Finding them.
    pub find: Duration,
    /// Copying them.
    pub copy: Duration,
    /// Making KVM forget what it has derived from them, where it shadows page tables.
    pub forget: Duration,
    /// All of it, the vCPUs and devices included.
    pub total: Duration,
}

impl Machine {
    /// Notes this state as the one that [`Machine::reset`] goes back to. Stops that were not told yet are
    /// no part of it.
    ///
    /// # Errors
    /// The host refuses memory or a call.
    pub fn save(&mut self) -> Result<Arc<Snapshot>, MachineError> {
        let msrs: Arc<[u32]> = self.vm.msrs()?.into();
        let vcpus = self
            .vcpus
            .iter()
            .map(|vcpu| Ok(Arc::new(vcpu.save(&msrs)?)))
            .collect::<Result<_, MachineError>>()?;
        let snapshot = Arc::new(Snapshot {
            memory: self.ram.copy()?,
            vcpus,
            board: self.board.image(),
        });
        self.start_from(Arc::clone(&snapshot));
        Ok(snapshot)
    }

    /// From now on differences to `snapshot`, which this machine is, are noted.
    pub(super) fn start_from(&mut self, snapshot: Arc<Snapshot>) {
        self.ram.take_written();
        self.base = Some(Base {
            snapshot,
            logged: self.vm.start_dirty_log().is_ok(),
            shadowed: host::shadows_page_tables(),
        });
    }

    /// Goes back to the state that was noted last: by [`Machine::save`], or by the snapshot that this
    /// machine is a clone of. Every vCPU's translations are flushed. Only pages that were written
    /// meanwhile are copied; what the host has stored through [`PhysMem::table`] is not noticed,
    /// but in the channels' control pages.
    ///
    /// # Errors
    /// Nothing was noted, or the host refuses a call; the machine should then be dropped.
    pub fn reset(&mut self) -> Result<ResetTimings, MachineError> {
        let start = Instant::now();
        let base = self.base.as_ref().ok_or(MachineError::NotSaved)?;
        let snapshot = Arc::clone(&base.snapshot);
        let mut result = Ok(());
        for (vcpu, image) in self.vcpus.iter_mut().zip(&snapshot.vcpus) {
            result = result.and(vcpu.request_restore(Arc::clone(image)));
        }
        let memory = reset_memory(base, &self.ram, &self.vm, self.vcpus.len());
        self.board.restore(&snapshot.board);
        for vcpu in &mut self.vcpus {
            // One that was not asked because another failed does not answer: its turn ends the loop.
            if result.is_ok() {
                result = vcpu.wait(Step::Restore);
            }
        }
        result?;
        let mut timings = memory?;
        // What the vCPUs had to say is no longer so; who waits for an interruption still does.
        self.backlog.extend(self.messages.try_iter());
        self.backlog
            .retain(|message| matches!(message, Message::Interrupted));
        self.ended = None;
        timings.total = start.elapsed();
        Ok(timings)
    }

    /// As on a host without a dirty log.
    #[cfg(test)]
    pub(crate) fn forget_dirty_log(&mut self) {
        if let Some(base) = &mut self.base {
            base.logged = false;
        }
    }

    /// A machine in the state `snapshot`, which shares the snapshot's memory until either writes to it.
    /// `config` is that of the machine that was saved; the kernel and the program in it are not loaded.
    ///
    /// # Errors
    /// As [`Machine::new`].
    #[allow(clippy::needless_pass_by_value)] // a machine is made of its configuration
    pub fn clone_of(snapshot: &Arc<Snapshot>, config: MachineConfig) -> Result<Self, MachineError> {
        if config.vcpus as usize != snapshot.vcpus.len() {
            return Err(MachineError::bad_vcpus(config.vcpus));
        }
        let clock = Instant::now();
        let ram = snapshot.memory.copy_on_write()?;
        let timings = super::Timings {
            memory: clock.elapsed(),
            ..super::Timings::default()
        };
        let start = Start::Snapshot(snapshot);
        let images = (config.kernel.bytes()?, boot::user_image());
        let mut machine = Self::assemble(&config, images, ram, timings, &start)?;
        machine.start_from(Arc::clone(snapshot));
        Ok(machine)
    }
}

fn reset_memory(
    base: &Base,
    ram: &GuestRam,
    vm: &crate::kvm::vm::Vm,
    vcpus: usize,
) -> Result<ResetTimings, MachineError> {
    let start = Instant::now();
    let image = &base.snapshot.memory;
    let mut pages = if base.logged {
        let mut pages = vm.take_dirty()?;
        pages.extend(ram.take_written());
        pages
    } else {
        (0..ram.bytes() / PAGE_SIZE)
            .filter(|page| !ram.has_same_page(image, *page))
            .collect()
    };
    // The host writes to the channels' first pages while the guest runs.
    pages.extend((0..vcpus as u64).map(|vcpu| (CHANNEL_GPA + vcpu * CHANNEL_STRIDE) / PAGE_SIZE));
    pages.sort_unstable();
    pages.dedup();
    let find = start.elapsed();
    for page in &pages {
        ram.copy_page(image, *page);
    }
    let copy = start.elapsed() - find;
    if base.shadowed {
        vm.forget_shadow_pages(base.logged)?;
    }
    Ok(ResetTimings {
        pages: pages.len() as u64,
        find,
        copy,
        forget: start.elapsed() - find - copy,
        total: Duration::ZERO,
    })
}
