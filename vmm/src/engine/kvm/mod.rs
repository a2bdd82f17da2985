//! The kvm engine: the kernel image on vCPUs, one of which runs at a time.
//!
//! A reset puts back what was written since the state was saved; a machine that has crashed is replaced
//! by a clone of its snapshot.

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use abi::channel::Event;
use abi::failpoint::Failpoint;

use super::{Costs, Engine, EngineError, EngineKind, GuestCrash, Halt, Limit, Window};
use crate::control::{Interrupts, Machine, MachineConfig, MachineError, ProgramSpec, Stop};
use crate::inspect::{self, VcpuFacts};
use crate::memory::PhysMem;
use crate::report::symbols::Symbols;
use crate::scenario::Scenario;
use crate::snapshot::Snapshot;

/// What a guest can be given that shows signs of life, but does not come to the point where it is to stop: so
/// many times the watchdog's patience,
const PATIENCE: u32 = 6;
/// and so many events, which are the host's memory.
const MOST_EVENTS: usize = 4_000_000;

/// A vCPU and the [`Window`].
#[derive(Clone, Copy, Debug, Default)]
struct InWindow {
    /// It is in it.
    open: bool,
    /// Points since the last reset that the guest did not count: instructions, less what it has counted of a point that
    /// it has not come to. Wraps.
    points: u64,
}

/// See the module.
pub struct KvmEngine {
    config: MachineConfig,
    machine: Machine,
    saved: Option<Arc<Snapshot>>,
    /// Nothing has run since the saved state was reached.
    fresh: bool,
    /// The machine can no longer be run nor reset.
    broken: bool,
    /// Points that each vCPU had passed when the state was saved.
    passed: Vec<u64>,
    window: Option<Window>,
    /// Where each vCPU is as to the window.
    windows: Vec<InWindow>,
    stops: Vec<inspect::Stop>,
    saved_stops: Vec<inspect::Stop>,
    watchdog: Duration,
    /// See [`MOST_EVENTS`].
    most_events: usize,
    costs: Costs,
}

impl KvmEngine {
    /// The machine of `scenario`, before its first instruction.
    ///
    /// # Errors
    /// The machine cannot be made.
    pub fn new(scenario: &Scenario) -> Result<Self, EngineError> {
        let config = config(scenario);
        let machine = Machine::new(config.clone())?;
        Ok(Self::around(machine, config))
    }

    /// A clone of `snapshot`, which was saved of a machine of `scenario`; that state counts as saved.
    ///
    /// # Errors
    /// The machine cannot be made.
    pub fn clone_of(scenario: &Scenario, snapshot: Arc<Snapshot>) -> Result<Self, EngineError> {
        let config = config(scenario);
        let machine = Machine::clone_of(&snapshot, config.clone())?;
        let mut this = Self::around(machine, config);
        this.saved_as(snapshot);
        Ok(this)
    }

    fn around(machine: Machine, config: MachineConfig) -> Self {
        let cpus = config.vcpus as usize;
        Self {
            machine,
            saved: None,
            fresh: false,
            broken: false,
            passed: vec![0; cpus],
            window: None,
            windows: vec![InWindow::default(); cpus],
            stops: vec![inspect::Stop::Anywhere; cpus],
            saved_stops: vec![inspect::Stop::Anywhere; cpus],
            watchdog: config.watchdog,
            most_events: MOST_EVENTS,
            costs: Costs::default(),
            config,
        }
    }

    fn saved_as(&mut self, snapshot: Arc<Snapshot>) {
        self.saved = Some(snapshot);
        self.fresh = true;
        self.saved_stops.clone_from(&self.stops);
        for (vcpu, passed) in self.passed.iter_mut().enumerate() {
            *passed = self.machine.points_passed(vcpu);
        }
    }

    /// Runs `vcpu` to `limit`; a window's points end it too.
    fn step(
        &mut self,
        vcpu: usize,
        limit: Limit,
        events: &mut Vec<Event>,
    ) -> Result<Halt, EngineError> {
        let traps = match self.window {
            Some(window) => limit.traps.and(window.points),
            None => limit.traps,
        };
        self.machine.set_budget(vcpu, limit.points.max(1))?;
        self.machine.set_vcpu_traps(vcpu, traps.0)?;
        self.go(vcpu, events)
    }

    /// Runs `vcpu`, which is in the window, for at most `points` of it.
    fn step_through(
        &mut self,
        vcpu: usize,
        window: Window,
        points: u64,
        events: &mut Vec<Event>,
    ) -> Result<Halt, EngineError> {
        let instructions = points.saturating_mul(window.every);
        let before = self.points_passed(vcpu);
        self.machine.set_budget(vcpu, 1)?;
        self.machine.single_step(vcpu, Some(instructions))?;
        let halt = self.go(vcpu, events);
        if !self.broken {
            let done = self.machine.single_step(vcpu, None)?;
            // The guest counts a point some instructions before it stops at it, and may stand between the two. The
            // instruction that stops there is the point.
            let passed = match halt {
                Ok(Halt::Point { .. }) => done.div_ceil(window.every),
                _ => done / window.every,
            };
            let counted = self.points_passed(vcpu).wrapping_sub(before);
            let points = &mut self.windows[vcpu].points;
            *points = points.wrapping_add(passed).wrapping_sub(counted);
        }
        halt
    }

    /// Runs `vcpu` until it halts.
    fn go(&mut self, vcpu: usize, events: &mut Vec<Event>) -> Result<Halt, EngineError> {
        let started = Instant::now();
        let most = self.watchdog.saturating_mul(PATIENCE);
        let before = events.len();
        let halt = loop {
            let left = most.saturating_sub(started.elapsed());
            let stop = self.machine.run_vcpu(vcpu, Some(left))?;
            self.costs.exits += 1;
            events.extend(self.machine.take_events(vcpu)?);
            match stop {
                Stop::RingFull { .. } if events.len() - before <= self.most_events => {}
                Stop::RingFull { .. } => {
                    self.broken = true;
                    break crashed(format!(
                        "it recorded {} events without reaching a scheduling point",
                        events.len() - before
                    ));
                }
                Stop::Point { point, args, .. } => break Halt::Point { point, args },
                Stop::Stepped { rip, .. } => break Halt::Instruction { rip },
                Stop::FirstUser { .. } => break Halt::FirstUser,
                Stop::Report { report, .. } => break Halt::Report(report),
                Stop::Exited { status } => break Halt::Exited { status },
                Stop::Interrupted => return Err(EngineError::Interrupted),
                Stop::Deadline => return Err(self.no_point(vcpu, most)),
                Stop::Crashed(crash) => {
                    if let crate::control::CrashCause::NoProgress { .. } = crash.cause {
                        return Err(self.no_point(vcpu, self.watchdog));
                    }
                    self.broken = true;
                    break crashed(crash.cause.to_string());
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

    /// The vCPU has not come back in this `time`; the machine cannot go on from where it is.
    fn no_point(&mut self, vcpu: usize, time: Duration) -> EngineError {
        self.broken = true;
        let at = match self.machine.vcpu_state(vcpu) {
            Ok(state) => {
                let (rip, cpl) = (state.regs.rip, state.cpl());
                let elf = match cpl {
                    0 => self.machine.kernel_elf(),
                    _ => self.machine.user_elf(),
                };
                let functions = Symbols::of(elf).resolve(rip);
                let own = functions
                    .iter()
                    .find(|location| !location.function.starts_with("core::"));
                let name = own.or(functions.first());
                let name = name.map_or(String::new(), |it| format!(" in {}", it.function));
                format!("rip {rip:#x}{name}, CPL {cpl}")
            }
            Err(error) => error.to_string(),
        };
        EngineError::NoPoint {
            vcpu,
            seconds: time.as_secs_f64(),
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
        let Some(window) = self.window else {
            return self.step(vcpu, limit, events);
        };
        let target = self.points_passed(vcpu).saturating_add(limit.points.max(1));
        loop {
            let points = target.saturating_sub(self.points_passed(vcpu)).max(1);
            let halt = if self.windows[vcpu].open {
                self.step_through(vcpu, window, points, events)?
            } else {
                self.step(vcpu, Limit { points, ..limit }, events)?
            };
            self.windows[vcpu].open = match halt {
                Halt::Point { point, .. } => window.points.has(point),
                Halt::Instruction { .. } => self.points_passed(vcpu) >= target,
                _ => false,
            };
            // It has left the kernel, and with it the window, before its points were used up.
            if matches!(halt, Halt::Instruction { .. }) && !self.windows[vcpu].open {
                continue;
            }
            return Ok(halt);
        }
    }

    fn set_window(&mut self, window: Window) -> Result<(), EngineError> {
        self.window = Some(Window {
            every: window.every.max(1),
            ..window
        });
        Ok(())
    }
    fn points_passed(&self, vcpu: usize) -> u64 {
        let now = self.machine.points_passed(vcpu);
        // It lies in guest memory: any number may be there.
        now.wrapping_sub(self.passed[vcpu])
            .wrapping_add(self.windows[vcpu].points)
    }

    fn in_flight(&self, vcpu: usize) -> bool {
        self.machine.in_flight(vcpu)
    }
    fn deliver(&mut self, vcpu: usize) {
        self.fresh = false;
        self.machine.deliver(vcpu);
    }
    fn pending(&self, vcpu: usize) -> bool {
        self.machine.pending(vcpu)
    }

    fn disk_in_flight(&self, vcpu: usize) -> bool {
        self.machine.disk_in_flight(vcpu)
    }
    fn disk_complete(&mut self, vcpu: usize) {
        self.fresh = false;
        self.machine.disk_complete(vcpu);
    }

    fn save(&mut self) -> Result<(), EngineError> {
        let snapshot = self.machine.save()?;
        self.saved_as(snapshot);
        Ok(())
    }

    fn reset(&mut self) -> Result<(), EngineError> {
        if self.fresh {
            return Ok(());
        }
        let started = Instant::now();
        if self.broken {
            let saved = self.saved.as_ref().ok_or(MachineError::NotSaved)?;
            self.machine = Machine::clone_of(saved, self.config.clone())?;
            self.broken = false;
        } else {
            self.costs.pages += self.machine.reset()?.pages;
        }
        self.stops.clone_from(&self.saved_stops);
        self.windows.fill(InWindow::default());
        self.costs.reset += started.elapsed();
        self.costs.resets += 1;
        self.fresh = true;
        Ok(())
    }

    fn snapshot(&self) -> Option<Arc<Snapshot>> {
        self.saved.clone()
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

fn crashed(reason: String) -> Halt {
    Halt::Crashed(GuestCrash {
        reason,
        details: Vec::new(),
    })
}

fn config(scenario: &Scenario) -> MachineConfig {
    MachineConfig {
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
        disk: scenario.disk.clone(),
        events: u64::MAX,
        serialised: true,
        ..MachineConfig::default()
    }
}
