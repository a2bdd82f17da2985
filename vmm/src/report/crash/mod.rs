//! What a crash looks like: registers, code, page walks, backtraces and last events of every vCPU, as
//! values (for JSON) and as text for a person.
//!
//! It reads a guest that is broken by definition: everything is looked up with checks, and what is
//! not there is said to be missing.

mod backtrace;
mod code;
mod text;

use std::fmt;

use abi::channel::{Event, EventKind};
use serde::Serialize;

pub use backtrace::Frame;
pub use code::Instruction;

use super::symbols::Symbols;
use crate::control::{Crash, CrashCause, Machine};
use crate::inspect::walk::{self, Walk};
use crate::kvm::vcpu::VcpuSnapshot;
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
    /// Instructions from RIP on; empty where they cannot be read.
    pub code: Vec<Instruction>,
    /// Translation of RIP.
    pub rip_walk: Walk,
    /// Translation of CR2, the address of the last page fault, where there was one.
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
        let scene = Scene {
            ram: machine.ram(),
            kernel: machine.kernel_elf(),
            user: machine.user_elf(),
        };
        let events = |vcpu| machine.events(vcpu);
        Self::collect(crash, &scene, events, &machine.serial_output())
    }

    fn collect(
        crash: &Crash,
        scene: &Scene<'_>,
        events: impl Fn(usize) -> Vec<Event>,
        console: &str,
    ) -> Self {
        let (kernel, user) = (Symbols::of(scene.kernel), Symbols::of(scene.user));
        let mut vcpus: Vec<_> = crash
            .snapshots
            .iter()
            .map(|snapshot| vcpu(snapshot, scene, &kernel, &user, &events(snapshot.index)))
            .collect();
        vcpus.sort_by_key(|vcpu| (Some(vcpu.snapshot.index) != crash.vcpu, vcpu.snapshot.index));
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
}

fn vcpu(
    snapshot: &VcpuSnapshot,
    scene: &Scene<'_>,
    kernel: &Symbols<'_>,
    user: &Symbols<'_>,
    events: &[Event],
) -> VcpuReport {
    let (cr2, cr3, rip) = (snapshot.sregs.cr2, snapshot.sregs.cr3, snapshot.regs.rip);
    let space = code::Space {
        ram: scene.ram,
        cr3,
    };
    let last = events.len().saturating_sub(EVENTS);
    VcpuReport {
        code: code::disassemble(&space, rip),
        rip_walk: walk::translate(scene.ram, cr3, rip),
        cr2_walk: (cr2 != 0).then(|| walk::translate(scene.ram, cr3, cr2)),
        backtrace: backtrace::unwind(&space, &snapshot.regs, |address| {
            // The kernel has the upper half.
            if address >> 63 == 1 {
                kernel.resolve(address)
            } else {
                user.resolve(address)
            }
        }),
        events: events[last..].iter().map(EventReport::of).collect(),
        snapshot: snapshot.clone(),
    }
}

impl EventReport {
    fn of(event: &Event) -> Self {
        let kind = EventKind::from_id(event.kind);
        Self {
            sequence: event.sequence,
            tsc: event.tsc,
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
