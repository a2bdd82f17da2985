//! The model engine: the kernel inside this process, on [`guest_kernel::arch::model`].
//!
//! Memory is laid out by the loader of the real machine, so a frame has the same address on both engines.
//! A reset puts the memory of the freshly booted kernel back and runs the set-up again: coroutines cannot
//! be copied, and the set-up is a few dozen steps.
#![allow(
    unsafe_code,
    reason = "guest memory is handed to the kernel as an arena"
)]

mod sys;
#[cfg(test)]
pub(crate) mod tests;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use abi::boot::{BootInfo, InterruptMode};
use abi::channel::{Control, Doorbell, Event};
use abi::failpoint::Failpoint;
use abi::layout::{BOOT_INFO_GPA, CHANNEL_GPA, CHANNEL_STRIDE, PAGE_SIZE};
use devices::disk::Disk;
use guest_kernel::Kernel;
use guest_kernel::arch::model::{Model, Pause, always_dirty};

use super::{Costs, Engine, EngineError, EngineKind, GuestCrash, Halt, Limit, Window};
use crate::boot::{self, BootSpec};
use crate::control::{KernelImage, MachineError, ProgramSpec, channel};
use crate::inspect::{Stop, VcpuFacts};
use crate::memory::{GuestRam, PhysMem};
use crate::report::symbols::Symbols;
use crate::scenario::Scenario;
use crate::snapshot::Snapshot;

/// A step of the set-up.
#[derive(Clone, Copy)]
enum Step {
    Run(usize, Limit),
    Deliver(usize),
    Disk(usize),
}

/// Memory as boot left it: most pages that a schedule writes were zero, and no reset needs to read those.
struct Booted {
    /// The zero page, then those that are not.
    pages: Vec<[u8; PAGE_SIZE as usize]>,
    /// By page: which of them it is.
    indices: Vec<u32>,
}

impl Booted {
    fn read(ram: &GuestRam) -> Self {
        let (numbers, bytes) = ram.pages_with_data();
        let (data, _) = bytes.as_chunks();
        let mut indices = vec![0; (ram.bytes() / PAGE_SIZE) as usize];
        for (index, number) in (1..).zip(numbers) {
            indices[number as usize] = index;
        }
        let zero = [0; PAGE_SIZE as usize];
        let pages = std::iter::once(&zero).chain(data).copied().collect();
        Self { pages, indices }
    }

    fn restore(&self, ram: &GuestRam, page: u64) {
        let index = self.indices[page as usize];
        ram.put_page(page, &self.pages[index as usize]);
    }
}

/// See the module.
pub struct ModelEngine {
    /// Freed in `drop`, before the memory under it.
    kernel: &'static Kernel<Model>,
    info: BootInfo,
    ram: GuestRam,
    booted: Booted,
    set_up: Vec<Step>,
    /// As it is, and as it was at boot.
    disk: Disk,
    fresh_disk: Disk,
    saved: bool,
    /// Nothing has run since the saved state was reached.
    fresh: bool,
    /// Points that each CPU had passed when the state was saved.
    passed: Vec<u64>,
    stops: Vec<Stop>,
    costs: Costs,
}

impl ModelEngine {
    /// The machine of `scenario`, whose kernel parameters must say `tlb=soft`.
    ///
    /// # Errors
    /// What no machine can have, and `tlb=hw` or `tlb=both`: there is no processor to ask.
    pub fn new(scenario: &Scenario) -> Result<Self, EngineError> {
        Self::with_data(scenario, None, u64::MAX)
    }

    /// Why only vCPUs can run `scenario`, where that is so.
    #[must_use]
    pub fn cannot_run(scenario: &Scenario) -> Option<&'static str> {
        if scenario.program.trace.is_some() {
            return Some(
                "the model engine runs no traces, whose data lies in guest memory: use --engine kvm",
            );
        }
        let config = abi::param::Config::parse(&scenario.cmdline()).expect("scenarios are checked");
        if config.tlb != abi::param::TlbBackEnd::Soft {
            return Some(
                "the model engine has no processor that translates: set the kernel parameter tlb=soft",
            );
        }
        (scenario.program.name == "crash").then_some(
            "the model engine does not run 'crash', which would take this process with it: use --engine kvm",
        )
    }

    /// The same with a data blob for the program, and with these kinds of events only.
    ///
    /// # Errors
    /// As [`ModelEngine::new`].
    pub fn with_data(
        scenario: &Scenario,
        data: Option<Vec<u8>>,
        events: u64,
    ) -> Result<Self, EngineError> {
        if let Some(why) = Self::cannot_run(scenario) {
            return Err(EngineError::Unsupported(why.into()));
        }
        let cmdline = scenario.cmdline();
        let ram = GuestRam::new(scenario.memory_bytes).map_err(MachineError::from)?;
        let image = KernelImage::Embedded.bytes().map_err(MachineError::from)?;
        let program = ProgramSpec {
            name: scenario.program.name.clone(),
            args: scenario.program.args.clone(),
            data,
        };
        let spec = BootSpec {
            kernel: &image,
            user: boot::user_image(),
            program: &program,
            cpus: scenario.vcpus,
            interrupts: InterruptMode::Controlled,
            cmdline: &cmdline,
        };
        boot::load(&ram, &spec).map_err(MachineError::from)?;
        let cpus = scenario.vcpus as usize;
        for cpu in 0..cpus {
            let control = control(&ram, cpu);
            control.budget.store(u64::MAX, Relaxed);
            control.event_mask.store(events, Relaxed);
        }
        let info: BootInfo = ram
            .read_value(BOOT_INFO_GPA)
            .expect("the loader has written it");
        let memory = ram.host_address() as *mut u8;
        // SAFETY: the memory is a page-aligned mapping that `ram` keeps and that outlives the kernel
        // (`drop`); between two calls only this engine's users read it, and while the model runs nobody does.
        let arch = unsafe { Model::new(memory, ram.bytes(), cpus, sys::program) };
        let kernel = match Kernel::boot(arch, &info) {
            Ok(kernel) => Box::leak(Box::new(kernel)),
            Err(error) => return Err(EngineError::Unsupported(error.to_string())),
        };
        let booted = Booted::read(&ram);
        kernel.arch.take_dirty(|_| {});
        let disk = scenario.disk.build(cpus);
        let engine = Self {
            kernel,
            info,
            ram,
            booted,
            set_up: Vec::new(),
            fresh_disk: disk.clone(),
            disk,
            saved: false,
            fresh: false,
            passed: vec![0; cpus],
            stops: vec![Stop::Anywhere; cpus],
            costs: Costs::default(),
        };
        Model::start(engine.kernel, &engine.info);
        Ok(engine)
    }

    fn step(&mut self, vcpu: usize, limit: Limit) -> Halt {
        let control = control(&self.ram, vcpu);
        control.budget.store(limit.points.max(1), Relaxed);
        control.trap[0].store(limit.traps.0, Relaxed);
        let pause = self.kernel.arch.resume(vcpu);
        for (cpu, request) in self.kernel.arch.take_submitted() {
            self.disk
                .submit(cpu, request, &Arena(self.kernel, &self.ram));
        }
        self.costs.exits += 1;
        let halt = self.halt(vcpu, pause);
        self.stops[vcpu] = match halt {
            Halt::Point { point, .. } => Stop::Point(point),
            Halt::Exited { .. } => Stop::Exited,
            _ => Stop::Anywhere,
        };
        halt
    }

    fn complete(&mut self, vcpu: usize) {
        if self.disk.complete(vcpu, &Arena(self.kernel, &self.ram)) {
            self.kernel.arch.interrupt_of_disk(vcpu);
        }
    }

    fn halt(&self, vcpu: usize, pause: Pause) -> Halt {
        let crashed = |reason: String| {
            Halt::Crashed(GuestCrash {
                reason,
                details: Vec::new(),
            })
        };
        let channel = channel::Channel::new(&self.ram, vcpu);
        match pause {
            Pause::Doorbell(Doorbell::Point) => match channel.point() {
                Ok((point, args)) => Halt::Point { point, args },
                Err(text) => crashed(text),
            },
            Pause::Doorbell(Doorbell::FirstUser) => Halt::FirstUser,
            Pause::Doorbell(Doorbell::Report) => match channel.report() {
                Ok(report) => Halt::Report(report),
                Err(text) => crashed(text),
            },
            Pause::Doorbell(reason) => crashed(format!("the doorbell rang: {reason:?}")),
            Pause::Exited(status) => Halt::Exited { status },
            Pause::Panicked(text) => crashed(format!("kernel panic: {text}")),
            Pause::Halted => crashed("it waits for an interrupt that nobody sends".into()),
            Pause::Switch(_) => unreachable!("the contexts go on by themselves"),
        }
    }
}

/// Guest memory for the disk: what it writes, the next reset must put back.
struct Arena<'e>(&'e Kernel<Model>, &'e GuestRam);

impl devices::disk::Dma for Arena<'_> {
    fn read(&self, gpa: u64, bytes: &mut [u8]) -> bool {
        PhysMem::read(self.1, gpa, bytes).is_ok()
    }
    fn write(&self, gpa: u64, bytes: &[u8]) -> bool {
        // It stays inside a frame.
        self.0.arch.will_write(gpa);
        self.1.write(gpa, bytes).is_ok()
    }
}

fn control(ram: &GuestRam, cpu: usize) -> &Control {
    let gpa = CHANNEL_GPA + cpu as u64 * CHANNEL_STRIDE;
    // SAFETY: a page of guest memory, which `ram` keeps mapped; a `Control` is made of atomics.
    unsafe { &*((ram.host_address() + gpa) as *const Control) }
}

impl Engine for ModelEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Model
    }
    fn nr_vcpus(&self) -> usize {
        self.stops.len()
    }

    fn run(
        &mut self,
        vcpu: usize,
        limit: Limit,
        events: &mut Vec<Event>,
    ) -> Result<Halt, EngineError> {
        self.fresh = false;
        if !self.saved {
            self.set_up.push(Step::Run(vcpu, limit));
        }
        let started = Instant::now();
        let halt = self.step(vcpu, limit);
        self.costs.guest += started.elapsed();
        self.kernel.arch.take_events(events);
        Ok(halt)
    }

    fn set_window(&mut self, _: Window) -> Result<(), EngineError> {
        Err(EngineError::Unsupported(
            "the model engine has no instructions to stop between: use --engine kvm".into(),
        ))
    }
    fn points_passed(&self, vcpu: usize) -> u64 {
        let now = control(&self.ram, vcpu).points_passed.load(Relaxed);
        now.wrapping_sub(self.passed[vcpu])
    }

    fn in_flight(&self, vcpu: usize) -> bool {
        self.kernel.arch.in_flight(vcpu)
    }
    fn deliver(&mut self, vcpu: usize) {
        self.fresh = false;
        if !self.saved {
            self.set_up.push(Step::Deliver(vcpu));
        }
        self.kernel.arch.deliver(vcpu);
    }
    fn pending(&self, vcpu: usize) -> bool {
        self.kernel.arch.pending(vcpu)
    }

    fn disk_in_flight(&self, vcpu: usize) -> bool {
        self.disk.in_flight(vcpu)
    }
    fn disk_complete(&mut self, vcpu: usize) {
        self.fresh = false;
        if !self.saved {
            self.set_up.push(Step::Disk(vcpu));
        }
        self.complete(vcpu);
    }

    fn save(&mut self) -> Result<(), EngineError> {
        self.saved = true;
        self.fresh = true;
        for vcpu in 0..self.passed.len() {
            self.passed[vcpu] = control(&self.ram, vcpu).points_passed.load(Relaxed);
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), EngineError> {
        if self.fresh {
            return Ok(());
        }
        let started = Instant::now();
        let arch = &self.kernel.arch;
        arch.forget_contexts();
        sys::forget_children();
        let mut pages = 0;
        let mut restore = |gpa: u64| {
            self.booted.restore(&self.ram, gpa / PAGE_SIZE);
            pages += 1;
        };
        arch.take_dirty(&mut restore);
        always_dirty(self.kernel.root_pa().0, self.stops.len()).for_each(&mut restore);
        self.costs.pages += pages;
        self.disk.clone_from(&self.fresh_disk);
        let restored = Instant::now();
        Model::start(self.kernel, &self.info);
        for index in 0..self.set_up.len() {
            match self.set_up[index] {
                Step::Run(vcpu, limit) => {
                    self.step(vcpu, limit);
                }
                Step::Deliver(vcpu) => self.kernel.arch.deliver(vcpu),
                Step::Disk(vcpu) => self.complete(vcpu),
            }
        }
        self.kernel.arch.drop_events();
        self.costs.reset += restored - started;
        self.costs.set_up += restored.elapsed();
        self.costs.resets += 1;
        self.fresh = true;
        Ok(())
    }

    /// Coroutines cannot be copied.
    fn snapshot(&self) -> Option<Arc<Snapshot>> {
        None
    }

    fn arm(&mut self, vcpu: usize, failpoint: Failpoint, passages: u32) {
        control(&self.ram, vcpu).fail[failpoint as usize].store(passages, Relaxed);
    }

    fn memory(&self) -> &dyn PhysMem {
        &self.ram
    }
    fn kernel_root(&self) -> Option<u64> {
        Some(self.kernel.root_pa().0)
    }
    fn vcpu_facts(&self) -> Result<Vec<VcpuFacts>, EngineError> {
        let facts = |(index, stop): (usize, &Stop)| VcpuFacts {
            index,
            cr3: self.kernel.arch.root_of(index),
            stop: *stop,
            ..VcpuFacts::default()
        };
        Ok(self.stops.iter().enumerate().map(facts).collect())
    }
    fn symbols(&self) -> Option<&Symbols<'_>> {
        None
    }
    fn console(&self) -> String {
        self.kernel.arch.console_text()
    }
    fn costs(&self) -> Costs {
        self.costs
    }
}

impl Drop for ModelEngine {
    fn drop(&mut self) {
        self.kernel.arch.forget_contexts();
        sys::forget_children();
        let kernel = std::ptr::from_ref(self.kernel).cast_mut();
        // SAFETY: leaked by `new`; no coroutine is left, and nobody else has the reference.
        drop(unsafe { Box::from_raw(kernel) });
    }
}
