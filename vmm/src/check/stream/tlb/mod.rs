//! The TLB model (family T): which vCPU may still use a translation that is gone.
//!
//! `docs/tlb-model.md` explains it with its rules and its limits.

mod caches;
#[cfg(test)]
mod exact;
mod held;
#[cfg(test)]
mod history;
mod laws;
mod memory;
#[cfg(test)]
mod reference;
mod rules;
mod state;
mod tables;
mod tell;
#[cfg(test)]
mod tests;
mod vcpu;

use std::rc::Rc;

use abi::channel::{Event, EventKind, flush};
use abi::pte::level_size;

use super::locks::KEEP_VMAS;
use super::{Kinds, Monitor, Rule, Seen, is_of_lock};
use crate::check::{Finding, Violation};
use crate::map::Map;
use crate::memory::PhysMem;
use held::Change;
use state::State;
use tell::describe;
use vcpu::Flush;

/// IDs and predicates, in the order of docs/tlb-model.md.
pub const INVARIANTS: &[Rule] = &[
    (
        FREED,
        "no vCPU that runs user code may still translate to a frame that is freed",
    ),
    (FREED_MAPPED, "no page table maps a frame that is freed"),
    (
        FREED_TABLE,
        "no vCPU may still walk a page-table page that is freed",
    ),
    (
        RETURNED,
        "when a call that takes memory or rights away has returned, no vCPU that runs user code may use what it took",
    ),
    (
        REPLACED,
        "when a fault has replaced a page, no other vCPU may use the old one",
    ),
    (
        ATTACHED,
        "when a VMA is linked in, or has new bounds, no vCPU that runs user code may hold translations of what was there before",
    ),
    (
        LAZY,
        "a vCPU that is no longer lazy holds nothing that it missed while it was",
    ),
    (
        UNLISTED,
        "a vCPU is in the cpumask of an mm before it loads its CR3",
    ),
    (
        IMPOSSIBLE,
        "an access uses only translations that its vCPU may hold",
    ),
    (UNEXPLAINED, "the events explain the page tables"),
    (
        REUSED,
        "a vCPU that loads CR3 holds nothing there that it missed, or that another mm left in the PCID",
    ),
    (
        TWO_SIZES,
        "no vCPU that runs user code may hold a page in one size when it is mapped in another",
    ),
    (
        WRITTEN_BACK,
        "when the disk is asked to take a page of a file that was made clean, no vCPU that runs user code may write it without a fault",
    ),
];

const FREED: &str = "T-01";
const FREED_MAPPED: &str = "T-02";
const FREED_TABLE: &str = "T-03";
const RETURNED: &str = "T-04";
const REPLACED: &str = "T-05";
const ATTACHED: &str = "T-06";
const LAZY: &str = "T-07";
const UNLISTED: &str = "T-08";
const IMPOSSIBLE: &str = "T-09";
const UNEXPLAINED: &str = "T-10";
const REUSED: &str = "T-11";
const TWO_SIZES: &str = "T-12";
const WRITTEN_BACK: &str = "T-13";

/// Frames that were freed or allocated last: so many are remembered, to tell what became of one.
const MAX_FATES: usize = 128;

/// A system call or a fault that a task is in.
#[derive(Clone, Copy, Debug)]
struct Begun {
    at: u64,
    args: [u64; 5],
}

/// What became of frames.
#[derive(Clone, Copy, Debug)]
struct Fate {
    gpa: u64,
    bytes: u64,
    freed: bool,
    change: Change,
}

/// What is known after so many events.
#[derive(Debug, Default)]
struct Run {
    state: State,
    /// By task.
    calls: Map<Begun>,
    faults: Map<Begun>,
    fates: Vec<Fate>,
    /// Events so far, those of the set-up included.
    at: u64,
}

impl Clone for Run {
    fn clone(&self) -> Self {
        let mut copy = Self::default();
        copy.clone_from(self);
        copy
    }
    /// Keeps its memory: once a schedule.
    fn clone_from(&mut self, from: &Self) {
        self.state.clone_from(&from.state);
        self.calls.clone_from(&from.calls);
        self.faults.clone_from(&from.faults);
        self.fates.clone_from(&from.fates);
        self.at = from.at;
    }
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct TlbModel {
    /// Shared by all forks.
    start: Rc<Run>,
    now: Run,
    /// Events of the set-up.
    begins: u64,
    /// What the events since boot came to, until [`Monitor::start`].
    history: Option<Run>,
}

impl TlbModel {
    /// An empty model; [`Monitor::start`] fills it.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn change_of(&self, seen: &Seen) -> Change {
        Change {
            vcpu: seen.vcpu,
            task: seen.event.task,
            at: self.now.at,
            guarded: true,
        }
    }

    fn flush(&mut self, vcpu: usize, flush: Flush) {
        self.now.state.flush(vcpu, flush, self.now.at);
    }

    fn flush_local(&mut self, vcpu: usize, [_, start, end, how, pcid]: [u64; 5]) {
        let flush = match how {
            flush::INVPCID_ADDRESS => Flush::Address(pcid, start, end),
            _ => Flush::Invlpg(start, end),
        };
        self.flush(vcpu, flush);
    }

    fn flush_all(&mut self, vcpu: usize, [_, how, pcid, ..]: [u64; 5]) {
        let flush = match how {
            flush::INVPCID_CONTEXT => Flush::Pcid(pcid),
            flush::ALL_AND_GLOBAL => Flush::AllAndGlobal,
            flush::ALL => Flush::All,
            _ => Flush::Current,
        };
        self.flush(vcpu, flush);
    }

    fn remember(&mut self, seen: &Seen, freed: bool) {
        let [gpa, order, ..] = seen.event.args;
        let change = self.change_of(seen);
        let fates = &mut self.now.fates;
        if fates.len() == MAX_FATES {
            fates.drain(..MAX_FATES / 2);
        }
        fates.push(Fate {
            gpa,
            bytes: level_size(1) << order.min(10),
            freed,
            change,
        });
    }

    fn begun(&self, seen: &Seen) -> Begun {
        Begun {
            at: self.now.at,
            args: seen.event.args,
        }
    }
}

impl Monitor for TlbModel {
    fn fork(&self) -> Box<dyn Monitor> {
        Box::new(self.clone())
    }

    fn since_boot(&mut self, events: &[Seen], nr_vcpus: usize) {
        self.history = None;
        if !is_whole(events, nr_vcpus) {
            return;
        }
        let mut model = Self::default();
        model.now.state = State::new(nr_vcpus);
        // Nobody asked what was wrong before the start.
        let mut ignored = Vec::new();
        for seen in events {
            model.observe(seen, &mut ignored);
            ignored.clear();
        }
        self.history = Some(model.now);
    }

    fn start(&mut self, memory: &dyn PhysMem, kernel_root: u64, nr_vcpus: usize) {
        let explains =
            |run: &Run| memory::difference(memory, kernel_root, &run.state.tables).is_none();
        let run = self.history.take().filter(explains).unwrap_or_else(|| {
            let state = memory::read(memory, kernel_root, nr_vcpus);
            Run {
                state,
                ..Run::default()
            }
        });
        self.begins = run.at;
        self.start = Rc::new(run);
        self.reset();
    }

    fn reset(&mut self) {
        self.now.clone_from(&self.start);
    }

    fn follows(&self) -> Kinds {
        Self::FOLLOWS
    }
    #[inline(always)]
    fn take(&mut self, kind: EventKind, seen: &Seen, found: &mut Vec<Violation>) {
        self.now.at += 1;
        if JUDGED.has_kind(kind as u32)
            && (!is_of_lock(kind as u32) || JUDGED.has_class(seen.event.args[1]))
            && seen.vcpu < self.now.state.vcpus.len()
        {
            self.judge(kind, seen, found);
        }
    }

    fn take_unknown(&mut self) {
        self.now.at += 1;
    }

    fn compare(&mut self, memory: &dyn PhysMem, kernel_root: u64, found: &mut Vec<Violation>) {
        let tables = &self.now.state.tables;
        if let Some(it) = memory::difference(memory, kernel_root, tables) {
            found.push(violation(
                UNEXPLAINED,
                Finding::new(format!(
                    "unexplained PTE change at {:#x}, level {}",
                    it.gva, it.level
                ))
                .expected(describe(it.told, it.level))
                .found(describe(it.is, it.level))
                .mm(it.mm)
                .gva(it.gva),
            ));
        }
    }
}

/// What [`TlbModel::judge`] does something with.
const JUDGED: Kinds = Kinds::of(&[
    EventKind::PteChange,
    EventKind::FlushLocal,
    EventKind::FlushAll,
    EventKind::Cr3Load,
    EventKind::FrameAlloc,
    EventKind::FrameFree,
    EventKind::VmaAttach,
    EventKind::VmaChange,
    EventKind::SyscallEnter,
    EventKind::SyscallExit,
    EventKind::FaultEnter,
    EventKind::FaultExit,
    EventKind::LazyEnter,
    EventKind::LazyLeave,
    EventKind::CpumaskSet,
    EventKind::CpumaskClear,
    EventKind::LockAcquire,
    EventKind::LockRelease,
    EventKind::MmCreate,
    EventKind::MmDestroy,
    EventKind::Access,
    EventKind::DiskSubmit,
])
.of_locks(KEEP_VMAS);

impl TlbModel {
    /// It tells events by their numbers.
    pub(super) const FOLLOWS: Kinds = Kinds::ALL;

    #[inline(always)]
    fn judge(&mut self, kind: EventKind, seen: &Seen, found: &mut Vec<Violation>) {
        let Event { task, args, .. } = seen.event;
        let vcpu = seen.vcpu;
        match kind {
            EventKind::PteChange => self.pte_change(seen, found),
            EventKind::FlushLocal => self.flush_local(vcpu, args),
            EventKind::FlushAll => self.flush_all(vcpu, args),
            EventKind::Cr3Load => self.cr3_load(seen, found),
            EventKind::FrameAlloc => self.remember(seen, false),
            EventKind::FrameFree => {
                self.frame_free(seen, found);
                self.remember(seen, true);
            }
            EventKind::VmaAttach => self.attach(seen, found),
            EventKind::VmaChange => self.resized(seen, found),
            EventKind::SyscallEnter => {
                self.now.calls.insert(task.into(), self.begun(seen));
            }
            EventKind::SyscallExit => self.call_over(seen, found),
            EventKind::FaultEnter => {
                self.flush(vcpu, Flush::Fault(args[0]));
                self.now.faults.insert(task.into(), self.begun(seen));
            }
            EventKind::FaultExit => self.fault_over(seen, found),
            EventKind::LazyEnter => self.now.state.vcpus[vcpu].lazy = true,
            EventKind::LazyLeave => self.leave_lazy(seen, found),
            EventKind::CpumaskSet => {
                *self.now.state.masks.entry(args[0], 0).0 |= bit(vcpu);
            }
            EventKind::CpumaskClear => {
                *self.now.state.masks.entry(args[0], 0).0 &= !bit(vcpu);
            }
            EventKind::LockAcquire => self.now.state.mmap_locks.acquired(task, args),
            EventKind::LockRelease => self.now.state.mmap_locks.released(task, args),
            EventKind::MmCreate => {
                self.now.state.tables_mut().roots.insert(args[0], args[1]);
                self.now.state.mmap_locks.created(args[0], args[2]);
            }
            EventKind::MmDestroy => {
                self.now.state.tables_mut().roots.remove(args[0]);
                self.now.state.masks.remove(args[0]);
                self.now.state.mmap_locks.destroyed(args[0]);
            }
            EventKind::Access => self.access(seen, found),
            EventKind::DiskSubmit => self.written_back(seen, found),
            _ => {}
        }
    }
}

/// The first frames that leaf entries of any mm map, and their level, once for each entry.
pub(super) fn leaf_frames(memory: &dyn PhysMem, kernel_root: u64) -> Vec<(u64, u8)> {
    memory::read(memory, kernel_root, 0).tables.leaf_frames()
}

/// The mms, and where in each, whose tables have leaf entries that map `frame` first.
pub(super) fn leaf_addresses(
    memory: &dyn PhysMem,
    kernel_root: u64,
    frame: u64,
) -> Vec<(u64, u64)> {
    memory::leaf_addresses(memory, kernel_root, frame)
}

/// True where nothing is missing in the streams since boot: every vCPU that has one has it from number 0 on.
fn is_whole(events: &[Seen], nr_vcpus: usize) -> bool {
    let mut next = vec![0; nr_vcpus];
    let in_order = |seen: &Seen| {
        let Some(next) = next.get_mut(seen.vcpu) else {
            return false;
        };
        let is_next = seen.event.sequence == *next;
        *next += 1;
        is_next
    };
    !events.is_empty() && events.iter().all(in_order)
}

fn bit(vcpu: usize) -> u64 {
    1 << (vcpu % 64)
}

fn violation(id: &'static str, finding: Finding) -> Violation {
    super::violation(INVARIANTS, id, finding)
}
