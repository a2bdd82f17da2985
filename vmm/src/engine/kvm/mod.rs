//! The kvm engine: the kernel image on vCPUs, one of which runs at a time.
//!
//! A reset boots the machine anew and runs the set-up again: slow, and as sure as the boot is
//! deterministic.

#[cfg(test)]
mod tests;

use std::time::Instant;

use abi::channel::Event;
use abi::failpoint::Failpoint;

use super::{Costs, Engine, EngineError, EngineKind, GuestCrash, Halt, Limit};
use crate::control::{Interrupts, Machine, MachineConfig, ProgramSpec, Stop};
use crate::inspect::{self, VcpuFacts};
use crate::memory::PhysMem;
use crate::report::symbols::Symbols;
use crate::scenario::Scenario;

/// A step of the set-up.
#[derive(Clone, Copy)]
enum Step {
    Run(usize, Limit),
    Deliver(usize),
}

/// See the module.
pub struct KvmEngine {
    config: MachineConfig,
    machine: Machine,
    set_up: Vec<Step>,
    saved: bool,
    /// Nothing has run since the saved state was reached.
    fresh: bool,
    /// Points that each vCPU had passed when the state was saved.
    passed: Vec<u64>,
    stops: Vec<inspect::Stop>,
    watchdog: f64,
    costs: Costs,
}

impl KvmEngine {
    /// The machine of `scenario`, before its first instruction.
    ///
    /// # Errors
    /// The machine cannot be made.
    pub fn new(scenario: &Scenario) -> Result<Self, EngineError> {
        let config = MachineConfig {
            vcpus: scenario.vcpus,
            memory_bytes: scenario.memory_bytes,
            interrupts: Interrupts::Controlled,
            cmdline: scenario.cmdline(),
            program: ProgramSpec {
                name: scenario.program.name.clone(),
                args: scenario.program.args.clone(),
                data: scenario.program.trace.as_ref().map(|t| t.blob.clone()),
            },
            watchdog: scenario.watchdog,
            events: u64::MAX,
            serialised: true,
            ..MachineConfig::default()
        };
        let cpus = scenario.vcpus as usize;
        Ok(Self {
            machine: Machine::new(config.clone())?,
            config,
            set_up: Vec::new(),
            saved: false,
            fresh: false,
            passed: vec![0; cpus],
            stops: vec![inspect::Stop::Anywhere; cpus],
            watchdog: scenario.watchdog.as_secs_f64(),
            costs: Costs::default(),
        })
    }

    fn step(
        &mut self,
        vcpu: usize,
        limit: Limit,
        events: &mut Vec<Event>,
    ) -> Result<Halt, EngineError> {
        let started = Instant::now();
        self.machine.set_budget(vcpu, limit.points.max(1))?;
        self.machine.set_vcpu_traps(vcpu, limit.traps.0)?;
        let halt = loop {
            let stop = self.machine.run_vcpu(vcpu)?;
            self.costs.exits += 1;
            events.extend(self.machine.take_events(vcpu)?);
            match stop {
                Stop::RingFull { .. } => {}
                Stop::Point { point, args, .. } => break Halt::Point { point, args },
                Stop::FirstUser { .. } => break Halt::FirstUser,
                Stop::Report { report, .. } => break Halt::Report(report),
                Stop::Exited { status } => break Halt::Exited { status },
                Stop::Interrupted | Stop::Deadline => return Err(EngineError::Interrupted),
                Stop::Crashed(crash) => {
                    if let crate::control::CrashCause::NoProgress { .. } = crash.cause {
                        return Err(self.no_point(vcpu));
                    }
                    break Halt::Crashed(GuestCrash {
                        reason: crash.cause.to_string(),
                        details: Vec::new(),
                    });
                }
            }
        };
        self.stops[vcpu] = match halt {
            Halt::Point { point, .. } => inspect::Stop::Point(point),
            Halt::Exited { .. } => inspect::Stop::Exited,
            _ => inspect::Stop::Anywhere,
        };
        self.costs.guest += started.elapsed();
        Ok(halt)
    }

    fn no_point(&self, vcpu: usize) -> EngineError {
        let at = match self.machine.vcpu_state(vcpu) {
            Ok(state) => format!("rip {:#x}, CPL {}", state.regs.rip, state.cpl()),
            Err(error) => error.to_string(),
        };
        EngineError::NoPoint {
            vcpu,
            seconds: self.watchdog,
            at,
        }
    }
}

impl Engine for KvmEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Kvm
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
        self.step(vcpu, limit, events)
    }
    fn points_passed(&self, vcpu: usize) -> u64 {
        let now = self.machine.points_passed(vcpu);
        now.wrapping_sub(self.passed[vcpu])
    }

    fn in_flight(&self, vcpu: usize) -> bool {
        self.machine.in_flight(vcpu)
    }
    fn deliver(&mut self, vcpu: usize) {
        self.fresh = false;
        if !self.saved {
            self.set_up.push(Step::Deliver(vcpu));
        }
        self.machine.deliver(vcpu);
    }
    fn pending(&self, vcpu: usize) -> bool {
        self.machine.pending(vcpu)
    }

    fn save(&mut self) -> Result<(), EngineError> {
        self.saved = true;
        self.fresh = true;
        for (vcpu, passed) in self.passed.iter_mut().enumerate() {
            *passed = self.machine.points_passed(vcpu);
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), EngineError> {
        if self.fresh {
            return Ok(());
        }
        let started = Instant::now();
        let guest = self.costs.guest;
        self.machine = Machine::new(self.config.clone())?;
        let mut events = Vec::new();
        for index in 0..self.set_up.len() {
            match self.set_up[index] {
                Step::Run(vcpu, limit) => {
                    self.step(vcpu, limit, &mut events)?;
                }
                Step::Deliver(vcpu) => self.machine.deliver(vcpu),
            }
        }
        self.costs.guest = guest;
        self.costs.reset += started.elapsed();
        self.costs.resets += 1;
        self.fresh = true;
        Ok(())
    }

    fn arm(&mut self, vcpu: usize, failpoint: Failpoint, passages: u32) {
        // Only a vCPU that does not exist is an error.
        let _ = self.machine.arm(vcpu, failpoint, passages);
    }

    fn memory(&self) -> &dyn PhysMem {
        self.machine.ram()
    }
    fn kernel_root(&self) -> Option<u64> {
        self.machine.kernel_root()
    }
    fn vcpu_facts(&self) -> Result<Vec<VcpuFacts>, EngineError> {
        let facts = |vcpu: usize| {
            let state = self.machine.vcpu_state(vcpu)?;
            Ok(VcpuFacts {
                index: vcpu,
                cpl: state.cpl(),
                rip: state.regs.rip,
                rsp: state.regs.rsp,
                rflags: state.regs.rflags,
                cr2: state.sregs.cr2,
                cr3: state.sregs.cr3,
                stop: self.stops[vcpu],
            })
        };
        (0..self.stops.len()).map(facts).collect()
    }
    fn symbols(&self) -> Option<&Symbols<'_>> {
        None
    }
    fn console(&self) -> String {
        self.machine.serial_output()
    }
    fn costs(&self) -> Costs {
        self.costs
    }
}
