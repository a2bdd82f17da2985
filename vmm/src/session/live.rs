//! The machine behind a session: a scenario becomes a machine, and its stops become what the rules of
//! [`super::observe`] judge.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::path::Path;
use std::time::{Duration, Instant};

use abi::channel::{Control, Doorbell};
use abi::layout::{CHANNEL_GPA, CHANNEL_STRIDE, KERNEL_VIRT_OFFSET};
use abi::point::Point;
use abi::port;

use super::parallel::{self, Asked, Lookout, Streams};
use super::{Checked, Crash, Halt, Interrupt, Observed, Place, Subject, observe};
use crate::check::{self, Context, Moment, Outcome};
use crate::control::{
    self, Disturbance, KernelImage, Machine, MachineConfig, MachineError, ProgramSpec, Stop,
    VcpuSnapshot,
};
use crate::inspect::walk::USER_HALF;
use crate::inspect::{self, InspectError, Snapshot, VcpuFacts};
use crate::kvm::host::{Host, HostKind};
use crate::kvm::vcpu::ExitReason;
use crate::memory::PhysMem;
use crate::report::symbols::Symbols;
use crate::report::{HostFacts, StreamFacts, Timings, Verdict};
use crate::scenario::{CheckWhen, Scenario};

/// Points at which a vCPU only waits for others: between two passages of one nothing changes that
/// another point would not show, and stopping at each would never end.
const WAITING: [Point; 5] = [
    Point::LockWait,
    Point::FlushWait,
    Point::IdleEnter,
    Point::RcuWait,
    Point::DiskWait,
];

/// What a verdict must know of this host.
///
/// # Errors
/// The host runs no machine; the error says why.
pub fn host() -> Result<HostFacts, MachineError> {
    crate::kvm::vm::open()?;
    Ok(facts_of(Host::kind()))
}

/// What a verdict must know of a host of this kind.
#[must_use]
pub fn facts_of(kind: HostKind) -> HostFacts {
    HostFacts {
        kind: match kind {
            HostKind::Hardware(_) => "hardware",
            HostKind::Emulating => "emulating",
            HostKind::Lab => "lab",
            HostKind::None => "none",
        },
        description: kind.describe().to_owned(),
        shows_stale_translations: matches!(kind, HostKind::Hardware(_) | HostKind::Lab),
    }
}

/// A run from its start to its end.
#[derive(Debug)]
pub struct Finished {
    /// What it showed.
    pub observed: Observed,
    /// What the merged event streams are, where they were judged.
    pub stream: Option<StreamFacts>,
    /// What the rules have done that disturb the run.
    pub disturbances: Vec<Disturbance>,
    /// Where the time went.
    pub timings: Timings,
    /// KVM's statistics, summed over VM and vCPUs.
    pub kvm_stats: BTreeMap<String, u64>,
    /// What the guest wrote to its serial port.
    pub serial: String,
}

/// Boots and runs `scenario` once. `kernel` is an ELF file to boot instead of the embedded one.
///
/// # Errors
/// The machine cannot be made, or the host fails it.
pub fn run(
    scenario: &Scenario,
    kernel: Option<&Path>,
    interrupt: &Interrupt,
) -> Result<Finished, MachineError> {
    let mut live = Live::boot(scenario, kernel, interrupt)?;
    if scenario.check == CheckWhen::EveryPoint {
        live.trap_all();
    }
    let mut observed = observe(&mut live, scenario.check, scenario.timeout)?;
    let judging = Instant::now();
    let stream = live.judge(&mut observed)?;
    observed.checking += judging.elapsed();
    let disturbances = live.machine.disturbances();
    let kvm_stats = live.kvm_stats();
    let serial = live.serial();
    let made = live.machine.timings();
    let started = Instant::now();
    drop(live);
    let boot = made
        .first_user
        .unwrap_or(observed.running)
        .min(observed.running);
    Ok(Finished {
        timings: Timings {
            create: made.create_vm + made.create_vcpus,
            memory: made.memory,
            load: made.load,
            boot,
            run: observed.running - boot,
            checks: observed.checking,
            teardown: started.elapsed(),
        },
        observed,
        stream,
        disturbances,
        kvm_stats,
        serial,
    })
}

/// A machine that runs a scenario.
pub struct Live {
    machine: Machine,
    /// Where the merged event streams are judged.
    streams: Option<Streams>,
    lookout: Lookout,
}

impl Live {
    /// The machine of `scenario`, paused before its first instruction.
    ///
    /// # Errors
    /// The machine cannot be made.
    pub fn boot(
        scenario: &Scenario,
        kernel: Option<&Path>,
        interrupt: &Interrupt,
    ) -> Result<Self, MachineError> {
        let events = if scenario.monitor {
            parallel::MONITORED
        } else {
            MachineConfig::default().events
        };
        let mut machine = Machine::new(MachineConfig {
            vcpus: scenario.vcpus,
            memory_bytes: scenario.memory_bytes,
            interrupts: scenario.interrupts,
            cmdline: scenario.cmdline(),
            program: ProgramSpec {
                name: scenario.program.name.clone(),
                args: scenario.program.args.clone(),
                data: scenario
                    .program
                    .trace
                    .as_ref()
                    .map(|trace| trace.blob.clone()),
            },
            kernel: kernel.map_or(KernelImage::Embedded, |path| KernelImage::File(path.into())),
            watchdog: scenario.watchdog,
            events,
            disk: scenario.disk.clone(),
            disturb: scenario.disturb.clone(),
            ..MachineConfig::default()
        })?;
        interrupt.watch(machine.interrupt_handle());
        let cmdline = scenario.cmdline();
        let params = abi::param::Config::parse(&cmdline);
        let tlb = params.expect("scenarios are checked").tlb;
        Ok(Self {
            streams: scenario.monitor.then(|| Streams::of(&mut machine, tlb)),
            lookout: Lookout::new(scenario.watchdog),
            machine,
        })
    }

    /// Judges the merged streams, which are over.
    fn judge(&mut self, observed: &mut Observed) -> Result<Option<StreamFacts>, MachineError> {
        let Some(mut streams) = self.streams.take() else {
            return Ok(None);
        };
        streams.drain(&mut self.machine)?;
        let vcpus = self.vcpus(Place::End)?;
        let rests =
            |vcpu: &VcpuFacts| matches!(vcpu.stop, inspect::Stop::Halted | inspect::Stop::Exited);
        let at_rest = observed.status.is_some() && vcpus.iter().all(rests);
        let (facts, violations) = streams.end(&self.machine, at_rest, &observed.reports);
        if !violations.is_empty() {
            observed.verdict = Verdict::Violation;
        }
        observed.violations.extend(violations);
        Ok(Some(facts))
    }

    /// Makes every point stop but those at which a vCPU only waits.
    fn trap_all(&mut self) {
        for point in Point::ALL.iter().filter(|point| !WAITING.contains(point)) {
            self.machine.trap_point(*point, true);
        }
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &dyn PhysMem {
        self.machine.ram()
    }

    /// The kernel's objects.
    ///
    /// # Errors
    /// The kernel is not ready, or makes no sense.
    pub fn snapshot(&self) -> Result<Snapshot, InspectError> {
        Snapshot::read(self.machine.ram(), self.machine.kernel_root().unwrap_or(0))
    }

    /// Where every vCPU stands, where one of them is at `place`.
    ///
    /// # Errors
    /// A vCPU that does not answer.
    pub fn vcpus(&self, place: Place) -> Result<Vec<VcpuFacts>, MachineError> {
        (0..self.machine.nr_vcpus())
            .map(|index| Ok(self.facts(&self.machine.vcpu_state(index)?, place)))
            .collect()
    }

    /// Every invariant that can be decided at `place`.
    #[must_use]
    pub fn outcome(&self, snapshot: &Snapshot, vcpus: &[VcpuFacts], place: Place) -> Outcome {
        let moment = match place {
            Place::End => Moment::AfterExit,
            Place::Point(..) | Place::Anywhere | Place::Event(_) => Moment::Paused,
        };
        check::run(&Context::new(self.memory(), snapshot, vcpus, moment))
    }

    /// Names addresses in the kernel and in the program: `function (file:line)`.
    pub fn namer(&self) -> impl Fn(u64) -> Option<String> {
        let kernel = Symbols::of(self.machine.kernel_elf());
        let user = Symbols::of(self.machine.user_elf());
        move |address| {
            let symbols = if USER_HALF.contains(&address) {
                &user
            } else {
                &kernel
            };
            let locations = symbols.resolve(address);
            // The function itself; what was inlined into it says less to a person.
            let outermost = locations.last()?;
            let place = outermost.file.as_deref().zip(outermost.line);
            let function = short_name(&outermost.function);
            Some(match place {
                Some((file, line)) => {
                    let mut names = file.rsplit('/').take(2).collect::<Vec<_>>();
                    names.reverse();
                    format!("{function} ({}:{line})", names.join("/"))
                }
                None => function,
            })
        }
    }

    /// What the guest has written to its serial port.
    #[must_use]
    pub fn serial(&self) -> String {
        self.machine.serial_output()
    }

    fn facts(&self, vcpu: &VcpuSnapshot, place: Place) -> VcpuFacts {
        VcpuFacts {
            index: vcpu.index,
            cpl: vcpu.cpl(),
            rip: vcpu.regs.rip,
            rsp: vcpu.regs.rsp,
            rflags: vcpu.regs.rflags,
            cr2: vcpu.sregs.cr2,
            cr3: vcpu.sregs.cr3,
            stop: match (place, vcpu.last_exit) {
                (Place::Point(at, point), _) if at as usize == vcpu.index => {
                    inspect::Stop::Point(point)
                }
                (
                    _,
                    ExitReason::Port {
                        port: port::EXIT, ..
                    },
                ) => inspect::Stop::Exited,
                _ if vcpu.halted || self.is_idle(vcpu) => inspect::Stop::Halted,
                _ => self
                    .rung_at(vcpu)
                    .map_or(inspect::Stop::Anywhere, inspect::Stop::Point),
            },
        }
    }

    /// The point that a vCPU stands at, right behind the `out` with which it told of it, though the
    /// machine was paused for another one's sake.
    fn rung_at(&self, vcpu: &VcpuSnapshot) -> Option<Point> {
        const OUT_DX_EAX: u8 = 0xef;
        let regs = &vcpu.regs;
        let rung = regs.rdx as u16 == port::DOORBELL && regs.rax as u32 == Doorbell::Point as u32;
        let mut opcode = [0];
        let gpa = regs.rip.wrapping_sub(KERNEL_VIRT_OFFSET + 1);
        self.memory().read(gpa, &mut opcode).ok()?;
        let mut point = [0; 8];
        let channel = CHANNEL_GPA + vcpu.index as u64 * CHANNEL_STRIDE;
        let word = channel + offset_of!(Control, point) as u64;
        self.memory().read(word, &mut point).ok()?;
        (vcpu.cpl() == 0 && rung && opcode == [OUT_DX_EAX])
            .then(|| Point::from_id(u64::from_le_bytes(point)))?
    }

    /// A vCPU that an interrupt has just woken is no longer halted for KVM. The kernel waits in
    /// `sti; hlt; cli`: right behind the `hlt` nothing is half done, awake or not.
    fn is_idle(&self, vcpu: &VcpuSnapshot) -> bool {
        const WAIT: [u8; 3] = [0xfb, 0xf4, 0xfa];
        let mut bytes = [0; WAIT.len()];
        let gpa = vcpu.regs.rip.wrapping_sub(KERNEL_VIRT_OFFSET + 2);
        vcpu.cpl() == 0 && self.memory().read(gpa, &mut bytes).is_ok() && bytes == WAIT
    }

    fn kvm_stats(&self) -> BTreeMap<String, u64> {
        let mut sums = BTreeMap::new();
        if let Some(stats) = self.machine.kvm_stats() {
            for (name, value) in stats.vcpus.iter().chain([&stats.vm]).flatten() {
                *sums.entry(name.clone()).or_default() += value;
            }
        }
        sums
    }

    fn crash(&self, crash: &control::Crash) -> Crash {
        super::crash::describe(&self.machine, crash)
    }
}

/// `Type::method` or `module::function`: a line has 100 columns.
fn short_name(function: &str) -> String {
    match function.rsplit_once(">::") {
        Some((path, method)) => {
            let path = path.rsplit_once("<impl ").map_or(path, |(_, path)| path);
            let path = path.split('<').find(|path| !path.is_empty()).unwrap_or("");
            let name = path.rsplit("::").next().unwrap_or(path);
            format!("{name}::{method}")
        }
        None => {
            let mut names = function.rsplit("::").take(2).collect::<Vec<_>>();
            names.reverse();
            names.join("::")
        }
    }
}

impl Subject for Live {
    type Error = MachineError;

    fn resume(&mut self, limit: Duration) -> Result<Halt, MachineError> {
        let step = limit.min(self.lookout.interval());
        let mut stop = self.machine.run_until(Some(step))?;
        if let Some(streams) = &mut self.streams {
            streams.drain(&mut self.machine)?;
        }
        let waits = matches!(stop, Stop::Deadline | Stop::RingFull { .. });
        if waits && self.lookout.is_suspicious(self.machine.progress()) {
            let patience = self.lookout.patience();
            match parallel::ask(&mut self.machine, patience)? {
                Asked::Well => self.lookout.is_well(),
                Asked::Stopped(other) => stop = other,
                Asked::Hang(waits) => {
                    let hang = super::crash::hang(&self.machine, &waits, patience)?;
                    return Ok(Halt::Crashed(hang));
                }
            }
        }
        if stop == Stop::Deadline && step < limit {
            return Ok(Halt::Nothing);
        }
        Ok(match stop {
            Stop::Exited { status } => Halt::Exited { status },
            Stop::Point { vcpu, point, .. } => Halt::Point {
                vcpu: vcpu as u32,
                point,
            },
            Stop::Report { vcpu, report } => Halt::Report {
                vcpu: vcpu as u32,
                report,
            },
            // A ring was drained; the others nobody asked for.
            Stop::RingFull { .. } | Stop::FirstUser { .. } | Stop::Stepped { .. } => Halt::Nothing,
            Stop::Deadline => Halt::Deadline,
            Stop::Interrupted => Halt::Interrupted,
            Stop::Crashed(crash) => Halt::Crashed(self.crash(&crash)),
        })
    }

    fn trap(&mut self, point: Point, on: bool) {
        self.machine.trap_point(point, on);
    }

    fn in_user(&self) -> bool {
        self.machine.timings().first_user.is_some()
    }

    fn check(&mut self, place: Place) -> Result<Checked, MachineError> {
        let snapshot = match self.snapshot() {
            Ok(snapshot) => snapshot,
            // Points that the kernel passes while it boots: there is nothing to judge yet.
            Err(InspectError::NotReady) if place != Place::End => return Ok(Checked::default()),
            Err(error) => return Ok(Checked::unreadable(&error, place)),
        };
        let vcpus = self.vcpus(place)?;
        Ok(Checked::new(self.outcome(&snapshot, &vcpus, place), place))
    }

    fn did_not_finish(&mut self, timeout: Duration) -> Result<Crash, MachineError> {
        super::crash::did_not_finish(&self.machine, timeout, self.lookout.still())
    }

    fn console(&self) -> String {
        self.serial()
    }
}

#[cfg(test)]
mod tests {
    use super::short_name;

    #[test]
    fn functions_are_named_by_type_or_module() {
        let method = "guest_kernel::sync::<impl guest_kernel::kernel::Kernel<A>>::read_lock";
        assert_eq!(short_name(method), "Kernel::read_lock");
        assert_eq!(
            short_name("<guest::rt::Rt as guest::sys::Sys>::mmap"),
            "Sys::mmap"
        );
        assert_eq!(
            short_name("guest_kernel::arch::x86_64::entry::leave+0x14"),
            "entry::leave+0x14"
        );
        assert_eq!(short_name("memcpy"), "memcpy");
    }
}
