//! Engines: machines whose vCPUs run one at a time, where the host decides which.
//!
//! Two of them, with the same scheduling points, events and guest memory: `kvm` runs the kernel image on
//! vCPUs, `model` the same kernel inside this process. Whoever drives an [`Engine`] cannot tell
//! which one it is.

pub mod kvm;
pub mod model;

use std::fmt;
use std::sync::Arc;

use abi::channel::Event;
use abi::point::Point;

use crate::control::ProbeReport;
use crate::inspect::VcpuFacts;
use crate::memory::PhysMem;
use crate::report::symbols::Symbols;
use crate::snapshot::Snapshot;

/// Which engine.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum EngineKind {
    /// The kernel image on vCPUs.
    Kvm,
    /// The kernel inside this process.
    Model,
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Model => "model",
        })
    }
}

/// A set of points, bit `p` for [`Point`] `p`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PointSet(pub u64);

impl PointSet {
    /// The set of `points`.
    #[must_use]
    pub const fn of(points: &[Point]) -> Self {
        let (mut set, mut i) = (0, 0);
        while i < points.len() {
            set |= 1 << points[i] as u64;
            i += 1;
        }
        Self(set)
    }
    /// This set and `other`.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
    /// True where `point` is in it.
    #[must_use]
    pub const fn has(self, point: Point) -> bool {
        self.0 & 1 << point as u64 != 0
    }
}

/// Points of an [`Engine::run`] without a bound.
pub const UNBOUNDED: u64 = u64::MAX;

/// Where instructions are scheduling points too: after a passage of one of `points`, until the vCPU's next
/// point or until it leaves the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// What opens it.
    pub points: PointSet,
    /// Every how many instructions there is a scheduling point, at least 1.
    pub every: u64,
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let points = Point::ALL.iter().filter(|point| self.points.has(**point));
        for (index, point) in points.enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{}", point.name())?;
        }
        write!(f, ":{}", self.every)
    }
}

/// How far a vCPU runs.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    /// At most to this many points from here (at least 1).
    pub points: u64,
    /// Or to the next of these.
    pub traps: PointSet,
}

/// Why a vCPU no longer runs.
#[derive(Clone, Debug, PartialEq)]
pub enum Halt {
    /// It stands at a point: its points are used up, the point is trapped, or it is the first point
    /// after an IPI was sent.
    Point {
        /// The point.
        point: Point,
        /// Its arguments.
        args: [u64; 2],
    },
    /// It stands between two instructions of a [`Window`].
    Instruction {
        /// Address of the next one.
        rip: u64,
    },
    /// The kernel is about to enter CPL 3 for the first time.
    FirstUser,
    /// A program found a wrong value.
    Report(ProbeReport),
    /// The first process has ended: the machine is over.
    Exited {
        /// Its exit status.
        status: u32,
    },
    /// The guest cannot go on (a panic, a triple fault, something that the machine has not).
    Crashed(GuestCrash),
}

/// A guest that cannot go on.
#[derive(Clone, Debug, PartialEq)]
pub struct GuestCrash {
    /// What happened, in one line.
    pub reason: String,
    /// More for a person: registers, a backtrace.
    pub details: Vec<String>,
}

/// Why an engine cannot go on: the host's fault, or that of who drives it.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The machine cannot be made or run.
    #[error(transparent)]
    Machine(#[from] crate::control::MachineError),
    /// A vCPU ran for this long without reaching a scheduling point.
    #[error("vCPU {vcpu} has not reached a scheduling point in {seconds} s (at {at})")]
    NoPoint {
        /// Which.
        vcpu: usize,
        /// The watchdog's patience.
        seconds: f64,
        /// Where it was.
        at: String,
    },
    /// This engine cannot do what the scenario asks for.
    #[error("{0}")]
    Unsupported(String),
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
}

/// A machine whose vCPUs run one at a time.
///
/// IPIs take two steps, so that their delay is a choice: a send puts them *in flight* to each target;
/// [`Engine::deliver`] makes them pending there; the target takes them as soon as its interrupts are on
/// (in user code, in a spin loop, while idle). A request to the disk is under way likewise until
/// [`Engine::disk_complete`].
///
/// A new engine stands before the kernel's first instruction. Events carry tickets (`stamp=ticket`), all
/// kinds are recorded, and a full ring never loses one.
pub trait Engine {
    /// Which one it is.
    fn kind(&self) -> EngineKind;
    /// Number of vCPUs.
    fn nr_vcpus(&self) -> usize;

    /// Lets `vcpu`, which must be able to, run to `limit`, and appends what it recorded to `events`.
    ///
    /// # Errors
    /// The host failed. A guest that fails is a [`Halt`].
    fn run(
        &mut self,
        vcpu: usize,
        limit: Limit,
        events: &mut Vec<Event>,
    ) -> Result<Halt, EngineError>;
    /// Makes instructions inside a window scheduling points too; each counts as a point.
    ///
    /// # Errors
    /// This engine cannot.
    fn set_window(&mut self, window: Window) -> Result<(), EngineError>;
    /// Points that `vcpu` has passed since the machine was made or last [reset](Engine::reset).
    fn points_passed(&self, vcpu: usize) -> u64;

    /// True where an IPI is on its way to `vcpu`.
    fn in_flight(&self, vcpu: usize) -> bool;
    /// Makes every IPI that is on its way to `vcpu` pending there.
    fn deliver(&mut self, vcpu: usize);
    /// True where `vcpu` will take an interrupt as soon as it may.
    fn pending(&self, vcpu: usize) -> bool;

    /// True where a request of `vcpu` to the disk is under way.
    fn disk_in_flight(&self, _vcpu: usize) -> bool {
        false
    }
    /// Lets the disk do the oldest request of `vcpu`, which is interrupted then.
    fn disk_complete(&mut self, _vcpu: usize) {}

    /// Notes this state, in which no vCPU runs, as the one to go back to.
    ///
    /// # Errors
    /// The host failed.
    fn save(&mut self) -> Result<(), EngineError>;
    /// Goes back to the noted state, with every vCPU's translations flushed.
    ///
    /// # Errors
    /// The host failed.
    fn reset(&mut self) -> Result<(), EngineError>;

    /// The noted state as a value, where this engine has one and has noted it.
    fn snapshot(&self) -> Option<Arc<Snapshot>>;

    /// Arms (or with 0 disarms) a failpoint on `vcpu`: its `passages`-th passage from here fails.
    fn arm(&mut self, vcpu: usize, failpoint: abi::failpoint::Failpoint, passages: u32);

    /// Guest memory.
    fn memory(&self) -> &dyn PhysMem;
    /// GPA of the kernel's root object, once there is one.
    fn kernel_root(&self) -> Option<u64>;
    /// Where each vCPU stands, for the checkers.
    ///
    /// # Errors
    /// The host failed.
    fn vcpu_facts(&self) -> Result<Vec<VcpuFacts>, EngineError>;
    /// Names of the kernel's code, where this engine has addresses.
    fn symbols(&self) -> Option<&Symbols<'_>>;
    /// What the guest has written to its console since the start or the last reset.
    fn console(&self) -> String;
    /// Where the time went since the engine was made.
    fn costs(&self) -> Costs;
}

impl<E: Engine + ?Sized> Engine for Box<E> {
    fn kind(&self) -> EngineKind {
        (**self).kind()
    }
    fn nr_vcpus(&self) -> usize {
        (**self).nr_vcpus()
    }
    fn run(
        &mut self,
        vcpu: usize,
        limit: Limit,
        events: &mut Vec<Event>,
    ) -> Result<Halt, EngineError> {
        (**self).run(vcpu, limit, events)
    }
    fn set_window(&mut self, window: Window) -> Result<(), EngineError> {
        (**self).set_window(window)
    }
    fn points_passed(&self, vcpu: usize) -> u64 {
        (**self).points_passed(vcpu)
    }
    fn in_flight(&self, vcpu: usize) -> bool {
        (**self).in_flight(vcpu)
    }
    fn deliver(&mut self, vcpu: usize) {
        (**self).deliver(vcpu);
    }
    fn pending(&self, vcpu: usize) -> bool {
        (**self).pending(vcpu)
    }
    fn disk_in_flight(&self, vcpu: usize) -> bool {
        (**self).disk_in_flight(vcpu)
    }
    fn disk_complete(&mut self, vcpu: usize) {
        (**self).disk_complete(vcpu);
    }
    fn save(&mut self) -> Result<(), EngineError> {
        (**self).save()
    }
    fn reset(&mut self) -> Result<(), EngineError> {
        (**self).reset()
    }
    fn snapshot(&self) -> Option<Arc<Snapshot>> {
        (**self).snapshot()
    }
    fn arm(&mut self, vcpu: usize, failpoint: abi::failpoint::Failpoint, passages: u32) {
        (**self).arm(vcpu, failpoint, passages);
    }
    fn memory(&self) -> &dyn PhysMem {
        (**self).memory()
    }
    fn kernel_root(&self) -> Option<u64> {
        (**self).kernel_root()
    }
    fn vcpu_facts(&self) -> Result<Vec<VcpuFacts>, EngineError> {
        (**self).vcpu_facts()
    }
    fn symbols(&self) -> Option<&Symbols<'_>> {
        (**self).symbols()
    }
    fn console(&self) -> String {
        (**self).console()
    }
    fn costs(&self) -> Costs {
        (**self).costs()
    }
}

/// Where an engine's time went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Costs {
    /// In the guest, exits included.
    pub guest: std::time::Duration,
    /// Returns from the guest to the host (model: coroutine switches).
    pub exits: u64,
    /// In the guest once more, from boot to the saved state, where that state cannot be copied.
    pub set_up: std::time::Duration,
    /// In the rest of [`Engine::reset`].
    pub reset: std::time::Duration,
    /// Resets.
    pub resets: u64,
    /// Pages copied by resets.
    pub pages: u64,
}

impl Costs {
    /// These and `other`.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            guest: self.guest + other.guest,
            exits: self.exits + other.exits,
            set_up: self.set_up + other.set_up,
            reset: self.reset + other.reset,
            resets: self.resets + other.resets,
            pages: self.pages + other.pages,
        }
    }

    /// What came after `before`, an earlier answer of the same engine.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            guest: self.guest - before.guest,
            exits: self.exits - before.exits,
            set_up: self.set_up - before.set_up,
            reset: self.reset - before.reset,
            resets: self.resets - before.resets,
            pages: self.pages - before.pages,
        }
    }
}
