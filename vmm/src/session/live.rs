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

use super::streams::{Streamed, Streams};
use super::{Checked, Crash, Halt, Interrupt, Observed, Place, Subject, observe};
use crate::check::{self, Context, Moment, Outcome};
use crate::control::{
    self, KernelImage, Machine, MachineConfig, MachineError, NOISY_EVENTS, ProgramSpec, Stop,
    VcpuSnapshot,
};
use crate::inject::Injected;
use crate::inspect::walk::USER_HALF;
use crate::inspect::{self, InspectError, Snapshot, VcpuFacts};
use crate::kvm::host::{Host, HostKind};
use crate::kvm::vcpu::ExitReason;
use crate::memory::PhysMem;
use crate::report::symbols::Symbols;
use crate::report::{HostFacts, Timings, Verdict};
use crate::scenario::{CheckWhen, Scenario};

/// Points at which a vCPU only waits for others: between two passages of one nothing changes that
/// another point would not show, and stopping at each would never end.
const WAITING: [Point; 4] = [
    Point::LockWait,
    Point::FlushWait,
    Point::IdleEnter,
    Point::RcuWait,
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
    /// Where the time went.
    pub timings: Timings,
    /// KVM's statistics, summed over VM and vCPUs.
    pub kvm_stats: BTreeMap<String, u64>,
    /// What the guest wrote to its serial port.
    pub serial: String,
    /// What its merged event streams came to, where they were judged.
    pub streamed: Option<Streamed>,
    /// What was done to it, where something was to be.
    pub injected: Option<Injected>,
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
    if scenario.is_streamed() {
        live.streams = Streams::begin(&mut live.machine, scenario.timeout)?;
    }
    if scenario.check == CheckWhen::EveryPoint {
        live.trap_all();
    }
    let mut observed = observe(&mut live, scenario.check, scenario.timeout)?;
    let mut streamed = None;
    if let Some(mut streams) = live.streams.take() {
        streams.take(&mut live.machine)?;
        let started = Instant::now();
        let (came_to, violation) = streams.judge();
        observed.checking += started.elapsed();
        streamed = Some(came_to);
        if let Some(violation) = violation {
            // It came before whatever was seen at the end.
            observed.violations.insert(0, violation);
            observed.verdict = Verdict::Violation;
        }
    }
    let injected = live.machine.injected();
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
        kvm_stats,
        serial,
        streamed,
        injected,
    })
}

/// A machine that runs a scenario.
pub struct Live {
    machine: Machine,
    streams: Option<Streams>,
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
            inject: scenario.inject.clone(),
            events: if scenario.is_streamed() {
                u64::MAX
            } else {
                !NOISY_EVENTS
            },
            ..MachineConfig::default()
        })?;
        machine.set_ring_exits(scenario.is_streamed());
        interrupt.watch(machine.interrupt_handle());
        Ok(Self {
            machine,
            streams: None,
        })
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
            Place::Point(..) | Place::Anywhere => Moment::Paused,
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
        Ok(match self.machine.run_until(Some(limit))? {
            Stop::Exited { status } => Halt::Exited { status },
            Stop::Point { vcpu, point, .. } => Halt::Point {
                vcpu: vcpu as u32,
                point,
            },
            Stop::Report { vcpu, report } => Halt::Report {
                vcpu: vcpu as u32,
                report,
            },
            Stop::RingFull { .. } => {
                if let Some(streams) = &mut self.streams {
                    streams.take(&mut self.machine)?;
                }
                Halt::Nothing
            }
            Stop::FirstUser { .. } | Stop::Stepped { .. } => Halt::Nothing,
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
        super::crash::did_not_finish(&self.machine, timeout)
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
