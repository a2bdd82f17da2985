//! What a crash looks like: registers, code, page walks, backtraces and last events of every vCPU, as
//! values (for JSON) and as text for a person.
//!
//! It reads a guest that is broken by definition: everything is looked up with checks, and what is
//! not there is said to be missing.

mod backtrace;
mod code;
mod text;
mod words;

use std::fmt;

use abi::channel::{Event, EventKind};
use serde::Serialize;

pub use backtrace::{Entry, Frame};
pub use code::Instruction;

use super::symbols::{Location, Symbols};
use crate::control::{Crash, CrashCause, Machine};
use crate::inspect::Snapshot;
use crate::inspect::walk::{self, Walk};
use crate::kvm::vcpu::{Registers, VcpuSnapshot};
use crate::memory::PhysMem;

/// Events of each vCPU that a report shows.
const EVENTS: usize = 16;
/// Lines of the console that a report shows.
const CONSOLE_LINES: usize = 20;

/// A crash with everything that is known about it.
#[derive(Debug, Serialize)]
pub struct CrashReport {
    /// Why.
    #[serde(flatten)]
    pub cause: CrashCause,
    /// The cause in words.
    pub summary: String,
    /// vCPU that it happened on; none where it is the machine as a whole.
    pub vcpu: Option<usize>,
    /// Every vCPU, the one that it happened on first.
    pub vcpus: Vec<VcpuReport>,
    /// Last lines of the console.
    pub console: Vec<String>,
}

/// One vCPU of a crashed machine.
#[derive(Debug, Serialize)]
pub struct VcpuReport {
    /// State and registers.
    #[serde(flatten)]
    pub snapshot: VcpuSnapshot,
    /// Task that it runs, by the kernel's own account.
    pub task: Option<u32>,
    /// The frame of `backtrace` that the crash is about: what raised an exception in the kernel, or
    /// called for a panic; else the first.
    pub site: usize,
    /// Instructions from the site's on where it raised an exception, else from RIP on; empty where they
    /// cannot be read.
    pub code: Vec<Instruction>,
    /// Translation of the first of them.
    pub rip_walk: Walk,
    /// Translation of CR2, where the vCPU was handling a page fault, or ended before it could.
    pub cr2_walk: Option<Walk>,
    /// Who called whom, innermost first.
    pub backtrace: Vec<Frame>,
    /// The last events, oldest first.
    pub events: Vec<EventReport>,
}

/// One event in words.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct EventReport {
    /// Position in the vCPU's stream.
    pub sequence: u64,
    /// Time stamp counter.
    pub tsc: u64,
    /// Nanoseconds before the last event of all vCPUs, where the counter's frequency is known.
    pub before_ns: Option<u64>,
    /// Task that was running, 0 for none.
    pub task: u32,
    /// Name of the kind, or its number where it has none.
    pub kind: String,
    /// Names and values of the arguments.
    pub args: Vec<(&'static str, Hex)>,
}

/// A number that is written in hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hex(pub u64);

impl fmt::Debug for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl Serialize for Hex {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The report on `crash` of `machine` for a person.
#[must_use]
pub fn render(crash: &Crash, machine: &Machine) -> String {
    CrashReport::of(crash, machine).to_string()
}

impl CrashReport {
    /// Everything about `crash`, which has just stopped `machine`.
    #[must_use]
    pub fn of(crash: &Crash, machine: &Machine) -> Self {
        let root = machine.kernel_root().unwrap_or(0);
        let scene = Scene {
            ram: machine.ram(),
            kernel: machine.kernel_elf(),
            user: machine.user_elf(),
            // A kernel that is too broken to be read runs no task that could be named.
            objects: Snapshot::read(machine.ram(), root).ok(),
            tsc_khz: machine.tsc_khz(),
        };
        let events = |vcpu| machine.events(vcpu);
        Self::collect(crash, &scene, events, &machine.serial_output())
    }

    /// All but the first line: for a report that has said the cause already.
    #[must_use]
    pub fn body(&self) -> impl fmt::Display {
        text::Body(self)
    }

    fn collect(
        crash: &Crash,
        scene: &Scene<'_>,
        events: impl Fn(usize) -> Vec<Event>,
        console: &str,
    ) -> Self {
        let (kernel, user) = (Symbols::of(scene.kernel), Symbols::of(scene.user));
        let resolve = |address: u64| {
            // The kernel has the upper half.
            if address >> 63 == 1 {
                kernel.resolve(address)
            } else {
                user.resolve(address)
            }
        };
        let events: Vec<_> = crash
            .snapshots
            .iter()
            .map(|vcpu| events(vcpu.index))
            .collect();
        let clock = Clock {
            last: events.iter().flatten().map(|event| event.stamp).max(),
            khz: scene.tsc_khz,
        };
        let mut vcpus: Vec<_> = crash
            .snapshots
            .iter()
            .zip(&events)
            .map(|(snapshot, events)| {
                let by_host = Some(snapshot.index) == crash.vcpu && crash.cause.is_by_host();
                let last = events.len().saturating_sub(EVENTS);
                VcpuReport {
                    events: events[last..]
                        .iter()
                        .map(|event| EventReport::of(event, &clock))
                        .collect(),
                    ..VcpuReport::new(snapshot, scene, resolve, by_host)
                }
            })
            .collect();
        vcpus.sort_by_key(|vcpu| {
            let snapshot = &vcpu.snapshot;
            (
                Some(snapshot.index) != crash.vcpu,
                snapshot.halted,
                snapshot.index,
            )
        });
        let lines: Vec<_> = console.lines().collect();
        let last = lines.len().saturating_sub(CONSOLE_LINES);
        Self {
            cause: crash.cause.clone(),
            summary: crash.cause.to_string(),
            vcpu: crash.vcpu,
            vcpus,
            console: lines[last..]
                .iter()
                .map(|line| (*line).to_owned())
                .collect(),
        }
    }
}

/// Where it happened.
struct Scene<'a> {
    ram: &'a dyn PhysMem,
    kernel: &'a [u8],
    user: &'a [u8],
    objects: Option<Snapshot>,
    tsc_khz: Option<u32>,
}

impl Scene<'_> {
    fn task_on(&self, vcpu: usize) -> Option<u32> {
        let objects = self.objects.as_ref()?;
        let current = objects.cpus.get(vcpu)?.current;
        let task = objects.tasks.iter().find(|task| task.gpa == current)?;
        Some(task.id)
    }
}

/// Makes times of time stamps.
struct Clock {
    last: Option<u64>,
    khz: Option<u32>,
}

impl Clock {
    fn before_ns(&self, tsc: u64) -> Option<u64> {
        let khz = self.khz.filter(|khz| *khz != 0)?;
        let cycles = self.last?.saturating_sub(tsc);
        u64::try_from(u128::from(cycles) * 1_000_000 / u128::from(khz)).ok()
    }
}

impl VcpuReport {
    /// `by_host`: it was KVM that gave up on this vCPU.
    fn new(
        snapshot: &VcpuSnapshot,
        scene: &Scene<'_>,
        resolve: impl Fn(u64) -> Vec<Location>,
        by_host: bool,
    ) -> Self {
        const PAGE_FAULT: u64 = 14;
        let (cr2, cr3) = (snapshot.sregs.cr2, snapshot.sregs.cr3);
        let space = code::Space {
            ram: scene.ram,
            cr3,
        };
        let backtrace = backtrace::unwind(&space, &snapshot.regs, resolve);
        let site = backtrace::site(&backtrace);
        let faulted = backtrace[site].entry.is_some();
        let rip = if faulted {
            backtrace[site].address.0
        } else {
            snapshot.regs.rip
        };
        let entered = backtrace.iter().find_map(|frame| frame.entry.as_ref());
        let in_page_fault = entered.is_some_and(|entry| entry.vector == PAGE_FAULT);
        Self {
            task: scene.task_on(snapshot.index),
            site,
            code: code::disassemble(&space, rip),
            rip_walk: walk::translate(scene.ram, cr3, rip),
            cr2_walk: (in_page_fault || by_host && cr2 != 0)
                .then(|| walk::translate(scene.ram, cr3, cr2)),
            backtrace,
            events: Vec::new(),
            snapshot: snapshot.clone(),
        }
    }

    /// The registers that matter: those of the exception that the kernel raised, if it did.
    fn regs(&self) -> &Registers {
        let entry = self
            .backtrace
            .get(self.site)
            .and_then(|frame| frame.entry.as_ref());
        entry.map_or(&self.snapshot.regs, |entry| &entry.regs)
    }
}

impl EventReport {
    fn of(event: &Event, clock: &Clock) -> Self {
        let kind = EventKind::from_id(event.kind);
        Self {
            sequence: event.sequence,
            tsc: event.stamp,
            before_ns: clock.before_ns(event.stamp),
            task: event.task,
            kind: kind.map_or_else(
                || format!("kind-{}", event.kind),
                |kind| kind.name().to_owned(),
            ),
            args: kind
                .map_or(&["a0", "a1", "a2", "a3", "a4"][..], EventKind::arg_names)
                .iter()
                .copied()
                .zip(event.args.map(Hex))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests;
