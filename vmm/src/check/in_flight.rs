//! Which operations are in flight, so that no check cries wolf over a count that is rightly off.
//!
//! The evidence: where each vCPU stands, and the lock words. The kernel is not preemptible and its
//! locks spin, so a task that is not on a CPU holds none of them; and outside the kernel (CPL 3), at
//! the points that enclose a system call or fault, and while idle, nothing is half done.

use std::collections::BTreeMap;
use std::fmt::{self, Display};

use abi::objects::FrameKind;
use abi::point::Point;

use crate::inspect::{MmView, Snapshot, Stop, VcpuFacts};

/// Why something may not be judged now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Busy(String);

impl Display for Busy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Busy {
    pub(super) fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

/// The operations in flight.
#[derive(Clone, Debug, Default)]
pub struct InFlight {
    /// Per CPU of the kernel: why it may be in the middle of something.
    vcpus: Vec<Option<Busy>>,
    /// By GPA of the mm: why its tables and counts may be off.
    mms: BTreeMap<u64, Busy>,
    /// By GPA of the mm: why its VMAs may be off.
    vmas: BTreeMap<u64, Busy>,
    /// Why anything may be off.
    kernel: Option<Busy>,
}

impl InFlight {
    /// Reads the evidence.
    #[must_use]
    pub fn read(snapshot: &Snapshot, vcpus: &[VcpuFacts]) -> Self {
        let mut in_flight = Self {
            vcpus: (0..snapshot.cpus.len())
                .map(|cpu| vcpu_busy(snapshot, vcpus.iter().find(|facts| facts.index == cpu), cpu))
                .collect(),
            ..Self::default()
        };
        in_flight.read_mms(snapshot);
        in_flight.kernel = in_flight.kernel_busy(snapshot);
        in_flight
    }

    /// Why the CPU may be in the middle of something.
    #[must_use]
    pub fn vcpu(&self, index: usize) -> Option<&Busy> {
        self.vcpus.get(index)?.as_ref()
    }
    /// Why an operation may be in flight on the mm at `gpa`.
    #[must_use]
    pub fn mm(&self, gpa: u64) -> Option<&Busy> {
        self.mms.get(&gpa)
    }
    /// Why the VMAs of the mm at `gpa` may be changing.
    #[must_use]
    pub fn vmas(&self, gpa: u64) -> Option<&Busy> {
        self.vmas.get(&gpa)
    }
    /// Why anything may be in flight at all.
    #[must_use]
    pub fn kernel(&self) -> Option<&Busy> {
        self.kernel.as_ref()
    }

    fn read_mms(&mut self, snapshot: &Snapshot) {
        let lock_held = locked_tables(snapshot);
        for mm in &snapshot.mms {
            let homeless = self.built_or_torn_down(snapshot, mm);
            let written = mm
                .is_write_locked()
                .then(|| Busy::new(format!("mm {}: mmap_lock is held for writing", mm.id)));
            if let Some(busy) = written.clone().or_else(|| homeless.clone()) {
                self.vmas.insert(mm.gpa, busy);
            }
            let busy = written
                .or(homeless)
                .or_else(|| {
                    (mm.readers() != 0)
                        .then(|| Busy::new(format!("mm {}: mmap_lock is held for reading", mm.id)))
                })
                .or_else(|| {
                    lock_held.get(&mm.gpa).map(|frame| {
                        Busy::new(format!("mm {}: lock of table {frame:#x} is held", mm.id))
                    })
                })
                .or_else(|| self.shootdown(snapshot, mm))
                .or_else(|| self.worked_on(snapshot, mm));
            if let Some(busy) = busy {
                self.mms.insert(mm.gpa, busy);
            }
        }
    }

    /// An mm without a task, while some vCPU is in the kernel, is being made or taken apart.
    fn built_or_torn_down(&self, snapshot: &Snapshot, mm: &MmView) -> Option<Busy> {
        let inhabited = snapshot.tasks.iter().any(|task| task.mm == mm.gpa);
        let busy = self.vcpus.iter().flatten().next()?;
        (!inhabited).then(|| Busy::new(format!("mm {}: has no task, and {busy}", mm.id)))
    }

    fn shootdown(&self, snapshot: &Snapshot, mm: &MmView) -> Option<Busy> {
        let cpu = snapshot
            .cpus
            .iter()
            .find(|cpu| cpu.flush.is_some_and(|flush| flush.mm == mm.gpa))?;
        Some(Busy::new(format!(
            "mm {}: CPU {} waits for a shootdown",
            mm.id, cpu.index
        )))
    }

    fn worked_on(&self, snapshot: &Snapshot, mm: &MmView) -> Option<Busy> {
        let cpu = snapshot.cpus.iter().find(|cpu| {
            let task = snapshot.task_at(cpu.current);
            self.vcpu(cpu.index).is_some()
                && (cpu.loaded_mm == mm.gpa || task.is_some_and(|task| task.mm == mm.gpa))
        })?;
        Some(Busy::new(format!(
            "mm {}: {}",
            mm.id,
            self.vcpu(cpu.index)?
        )))
    }

    fn kernel_busy(&self, snapshot: &Snapshot) -> Option<Busy> {
        let root = &snapshot.root;
        let held = |lock: u64, name: &str| {
            (lock != 0).then(|| Busy::new(format!("the {name} lock is held (word {lock:#x})")))
        };
        self.vcpus
            .iter()
            .flatten()
            .next()
            .cloned()
            .or_else(|| held(root.buddy_lock, "buddy"))
            .or_else(|| held(root.mms_lock, "mm list"))
            .or_else(|| held(root.sched_lock, "scheduler"))
            .or_else(|| root.slabs.iter().find_map(|slab| held(slab.lock, "slab")))
            .or_else(|| {
                let anon_vmas = &mut snapshot.anon_vmas.values();
                anon_vmas.find_map(|anon_vma| held(anon_vma.lock, "anon_vma"))
            })
            .or_else(|| self.mms.values().next().cloned())
    }
}

/// Page-table locks that are held: a table's frame by its mm.
fn locked_tables(snapshot: &Snapshot) -> BTreeMap<u64, u64> {
    let tables = snapshot
        .folios
        .iter()
        .filter(|folio| folio.is(FrameKind::Table) && folio.lock != 0);
    tables.map(|folio| (folio.owner, folio.frame)).collect()
}

fn vcpu_busy(snapshot: &Snapshot, facts: Option<&VcpuFacts>, cpu: usize) -> Option<Busy> {
    let Some(facts) = facts else {
        return Some(Busy::new(format!("nothing is known of vCPU {cpu}")));
    };
    let at = match facts.stop {
        _ if facts.cpl == 3 => return None,
        Stop::Halted | Stop::Exited => return None,
        Stop::Point(
            Point::SyscallEnter
            | Point::SyscallExit
            | Point::FaultEnter
            | Point::FaultExit
            | Point::IdleEnter,
        ) => return None,
        Stop::Point(point) => format!("at {}", point.name()),
        Stop::Anywhere => format!("at {:#x}", facts.rip),
    };
    let task = snapshot
        .cpus
        .get(cpu)
        .and_then(|cpu| snapshot.task_at(cpu.current));
    let who = task.map_or(String::new(), |task| format!(", task {}", task.id));
    Some(Busy::new(format!(
        "vCPU {cpu} is inside the kernel ({at}{who})"
    )))
}
