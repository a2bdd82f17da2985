//! Which operations are in flight, so that no check cries wolf over a count that is rightly off.
//!
//! The evidence: where each vCPU stands, the lock words, and who sleeps. The kernel is not preemptible, so a task that is
//! not on a CPU is in the middle of nothing, unless it sleeps for the swap area or for a lock: then it may have folios in hand, and hold the
//! locks that tasks sleep for, but no spin lock. Outside the kernel (CPL 3), at the
//! points that enclose a system call or fault, and while idle, nothing is half done. What a lock
//! protects is whole while its word is free, wherever the vCPUs stand: so most invariants ask for one
//! lock and no more.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display};

use abi::layout::PAGE_SHIFT;
use abi::objects::{FrameKind, Task};
use abi::point::Point;

use crate::inspect::{AnonVmaView, FolioView, MmView, Snapshot, Stop, VcpuFacts};

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
    /// Per CPU of the kernel: why it may be between two scheduling points.
    between: Vec<Option<Busy>>,
    /// By GPA of the mm: why its VMAs may be off.
    vmas: BTreeMap<u64, Busy>,
    /// By GPA of the mm: which page-table lock of it is held.
    tables: BTreeMap<u64, Busy>,
    /// By GPA of the mm: why tables of it may be linked nowhere.
    unlinked: BTreeMap<u64, Busy>,
    /// By GPA of the mm: why it may be on its way in or out.
    homeless: BTreeMap<u64, Busy>,
    /// Lock words of page tables that are held, one for each holder.
    holders: BTreeSet<u64>,
    /// Every lock that is held, and every shootdown that waits.
    held: Vec<Busy>,
    /// Tasks that sleep in the middle of something.
    asleep: Vec<Busy>,
}

impl InFlight {
    /// Reads the evidence.
    #[must_use]
    pub fn read(snapshot: &Snapshot, vcpus: &[VcpuFacts]) -> Self {
        let facts = |cpu| vcpus.iter().find(|facts| facts.index == cpu);
        let cpus = 0..snapshot.cpus.len();
        let mut in_flight = Self {
            between: cpus
                .clone()
                .map(|cpu| between_points(facts(cpu), cpu))
                .collect(),
            vcpus: cpus
                .map(|cpu| vcpu_busy(snapshot, facts(cpu), cpu))
                .collect(),
            ..Self::default()
        };
        in_flight.read_sleepers(snapshot);
        in_flight.read_tables(snapshot);
        for mm in &snapshot.mms {
            in_flight.read_mm(snapshot, mm);
        }
        in_flight.read_kernel(snapshot);
        in_flight
    }

    /// Why the CPU may be between two scheduling points.
    #[must_use]
    pub fn between_points(&self, index: usize) -> Option<&Busy> {
        self.between.get(index)?.as_ref()
    }
    /// Why some CPU may be between two scheduling points.
    #[must_use]
    pub fn any_between_points(&self) -> Option<&Busy> {
        self.between.iter().flatten().next()
    }
    /// Why the VMAs of the mm at `gpa` may be changing.
    #[must_use]
    pub fn vmas(&self, gpa: u64) -> Option<&Busy> {
        self.vmas.get(&gpa)
    }
    /// Why entries and counts of the mm at `gpa` may be changing.
    #[must_use]
    pub fn tables(&self, gpa: u64) -> Option<&Busy> {
        self.tables.get(&gpa)
    }
    /// Why tables of the mm at `gpa` may be linked nowhere: not yet, or not any more.
    #[must_use]
    pub fn unlinked_tables(&self, gpa: u64) -> Option<&Busy> {
        self.unlinked.get(&gpa)
    }
    /// Why the mm at `gpa` may be on its way in or out.
    #[must_use]
    pub fn homeless(&self, gpa: u64) -> Option<&Busy> {
        self.homeless.get(&gpa)
    }
    /// CPUs that hold a page-table lock, whosever.
    #[must_use]
    pub fn table_lock_holders(&self) -> usize {
        self.holders.len()
    }
    /// Some page-table lock that is held.
    #[must_use]
    pub fn any_tables(&self) -> Option<&Busy> {
        self.tables.values().next()
    }
    /// Why some vCPU is inside the kernel.
    #[must_use]
    pub fn any_vcpu(&self) -> Option<&Busy> {
        self.vcpus.iter().flatten().next()
    }
    /// Every lock that is held, and every shootdown that waits.
    #[must_use]
    pub fn held(&self) -> &[Busy] {
        &self.held
    }
    /// Why anything may be in flight at all.
    #[must_use]
    pub fn kernel(&self) -> Option<&Busy> {
        let held = self.held.first().or(self.asleep.first());
        self.any_vcpu().or(held)
    }

    fn read_tables(&mut self, snapshot: &Snapshot) {
        let locked = |folio: &&FolioView| folio.is(FrameKind::Table) && folio.lock != 0;
        for folio in snapshot.folios.iter().filter(locked) {
            let mm = snapshot.mm_name(folio.owner);
            let busy = Busy::new(format!("{mm}: lock of table {:#x} is held", folio.frame));
            self.held.push(busy.clone());
            self.tables.insert(folio.owner, busy);
            self.holders.insert(folio.lock);
        }
    }

    fn read_mm(&mut self, snapshot: &Snapshot, mm: &MmView) {
        let lock = |how| Busy::new(format!("mm {}: mmap_lock is held for {how}", mm.id));
        if mm.is_write_locked() {
            self.vmas.insert(mm.gpa, lock("writing"));
            self.unlinked.insert(mm.gpa, lock("writing"));
            self.held.push(lock("writing"));
        } else if mm.readers() != 0 {
            self.unlinked.insert(mm.gpa, lock("reading"));
            self.held.push(lock("reading"));
        }
        // A fault under one of them may have a table in hand.
        if let Some(vma) = mm.vmas.iter().find(|vma| vma.readers() != 0) {
            let busy = Busy::new(format!(
                "mm {}: a fault holds the VMA at {:#x}",
                mm.id, vma.start
            ));
            self.unlinked.insert(mm.gpa, busy.clone());
            self.held.push(busy);
        }
        if mm.flush_pending != 0 {
            self.held.push(Busy::new(format!(
                "mm {}: an unmap has yet to flush",
                mm.id
            )));
        }
        let inhabited = snapshot.tasks.iter().any(|task| task.mm == mm.gpa);
        if let (false, Some(busy)) = (inhabited, self.any_vcpu()) {
            let busy = Busy::new(format!("mm {}: has no task, and {busy}", mm.id));
            self.homeless.insert(mm.gpa, busy);
        }
    }

    fn read_sleepers(&mut self, snapshot: &Snapshot) {
        for task in &snapshot.tasks {
            let what = if task.is_in_wait_for(Task::WAITS_FOR_SWAP) {
                "the swap area"
            } else if task.is_in_wait_for(Task::WAITS_FOR_LOCK) {
                "a lock"
            } else {
                continue;
            };
            let reason = format!("task {} waits for {what}", task.id);
            self.asleep.push(Busy::new(reason));
        }
    }

    /// Where what may be held over a sleep goes: who sleeps lets go of it afterwards; where nobody does a vCPU is in the
    /// kernel for it.
    fn held_over_sleep(&mut self) -> &mut Vec<Busy> {
        match self.asleep.is_empty() {
            true => &mut self.held,
            false => &mut self.asleep,
        }
    }

    fn read_kernel(&mut self, snapshot: &Snapshot) {
        let root = &snapshot.root;
        let kernel = [
            (root.buddy_lock, "buddy"),
            (root.mms_lock, "mm list"),
            (root.sched_lock, "scheduler"),
            (snapshot.swap.lock, "swap"),
            (snapshot.swap.lru_lock, "LRU"),
            (snapshot.groups.lock, "memory groups"),
        ];
        let slabs = root.slabs.iter().map(|slab| (slab.lock, "slab"));
        for (lock, name) in kernel.into_iter().chain(slabs) {
            if lock != 0 {
                self.held.push(Busy::new(format!(
                    "the {name} lock is held (word {lock:#x})"
                )));
            }
        }
        self.held
            .extend(snapshot.anon_vmas.values().filter_map(family_lock));
        let moving = self.held_over_sleep();
        // Nobody need wait for a page of a file, and nothing else of it changes meanwhile.
        let of_file = |gpa: u64| snapshot.folio(gpa).is_some_and(|it| it.is(FrameKind::File));
        for folio in snapshot.swap.moving.iter().filter(|gpa| !of_file(**gpa)) {
            moving.push(Busy::new(format!(
                "frame {:#x} is being moved from or to its swap slot",
                folio >> PAGE_SHIFT
            )));
        }
        if root.kswapd.reclaiming != 0 {
            let cpus = root.kswapd.reclaiming;
            self.held
                .push(Busy::new(format!("{cpus} CPUs have folios to reclaim")));
        }
        self.read_files(snapshot);
        for cpu in &snapshot.cpus {
            if let Some(flush) = cpu.flush {
                let mm = snapshot.mm_name(flush.mm);
                let cpu = cpu.index;
                self.held
                    .push(Busy::new(format!("{mm}: CPU {cpu} waits for a shootdown")));
            }
        }
    }
}

impl InFlight {
    fn read_files(&mut self, snapshot: &Snapshot) {
        let busy = |word: u64, what: String| {
            (word != 0).then(|| Busy::new(format!("the {what} is held (word {word:#x})")))
        };
        let inodes = snapshot.files.values().filter_map(|file| {
            let gpa = file.gpa;
            busy(file.inode_lock, format!("inode lock of file {gpa:#x}"))
        });
        let positions = snapshot
            .open_files
            .values()
            .filter_map(|open| busy(open.lock, format!("position lock of {:#x}", open.gpa)));
        self.held_over_sleep().extend(inodes.chain(positions));
        let mut hold = |word, what| self.held.extend(busy(word, what));
        for file in snapshot.files.values() {
            let gpa = file.gpa;
            hold(file.lock, format!("page cache lock of file {gpa:#x}"));
            hold(file.i_mmap_lock, format!("i_mmap lock of file {gpa:#x}"));
        }
        for table in snapshot.file_tables.values() {
            hold(
                table.lock,
                format!("descriptor table lock of {:#x}", table.gpa),
            );
        }
        let pages = snapshot.folios.iter().filter(|folio| folio.is_counted());
        for folio in pages {
            hold(
                folio.lock,
                format!("folio lock of frame {:#x}", folio.frame),
            );
        }
    }
}

/// Why the lists of a family, whose root is `root`, may be changing.
pub(super) fn family_lock(root: &AnonVmaView) -> Option<Busy> {
    let (gpa, lock) = (root.gpa, root.lock);
    (lock != 0).then(|| {
        Busy::new(format!(
            "the lock of anon_vma {gpa:#x} is held (word {lock:#x})"
        ))
    })
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
        // Not the address: one reason for all of them, so that they are counted together.
        Stop::Anywhere => "between two points".into(),
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

fn between_points(facts: Option<&VcpuFacts>, cpu: usize) -> Option<Busy> {
    match facts {
        None => Some(Busy::new(format!("nothing is known of vCPU {cpu}"))),
        Some(facts) if facts.cpl != 3 && facts.stop == Stop::Anywhere => Some(Busy::new(format!(
            "vCPU {cpu} is inside the kernel, between two points"
        ))),
        // Inside the window that the point is there to show: CR3 is loaded, `loaded_mm` is not set yet.
        Some(facts) if facts.stop == Stop::Point(Point::SwitchMm) => Some(Busy::new(format!(
            "vCPU {cpu} is in the middle of loading an mm"
        ))),
        Some(_) => None,
    }
}
