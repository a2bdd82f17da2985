//! The TLB model (family T): which vCPU may still use a translation that is gone.
//!
//! `docs/tlb-model.md` explains it with its rules and its limits.

mod state;
#[cfg(test)]
mod tests;

use std::mem::offset_of;

use abi::channel::{Event, EventKind, access};
use abi::layout::PAGE_SIZE;
use abi::objects::{Cpu, FrameKind, KernelRoot, Mm};
use abi::pte::{Pte, PteFlags};
use abi::syscall::{advice, clone, decode, nr};
use rustc_hash::FxHashMap;

use super::{Monitor, Rule, Seen};
use crate::check::{Finding, Violation};
use crate::memory::PhysMem;
use state::{Change, Stale, State};

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
        "when a VMA is linked in, no vCPU that runs user code may hold translations of what was there before",
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
];

/// Most mms that are looked for.
const MAX_MMS: usize = 1024;

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

/// A system call or a fault that a task is in.
#[derive(Clone, Copy, Debug)]
struct Begun {
    at: u64,
    args: [u64; 5],
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct TlbModel {
    start: State,
    now: State,
    calls: FxHashMap<u32, Begun>,
    faults: FxHashMap<u32, Begun>,
    /// Events so far.
    at: u64,
}

impl TlbModel {
    /// An empty model; [`Monitor::start`] fills it.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn pte_change(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [mm, gva, level, old, new] = seen.event.args;
        let level = level.clamp(1, 4) as u8;
        let gva = gva & !(abi::pte::level_size(level) - 1);
        let change = self.change_of(seen);
        let (old, new) = (Pte(old), Pte(new));
        if let Err(known) = self.now.change((mm, level, gva), old, new, change) {
            found.push(violation(
                UNEXPLAINED,
                Finding::new("an entry was changed that was not what the events say it was")
                    .expected(describe(known, level))
                    .found(describe(old, level))
                    .mm(mm)
                    .gva(gva)
                    .vcpu(seen.vcpu),
            ));
        }
    }

    fn change_of(&self, seen: &Seen) -> Change {
        Change {
            vcpu: seen.vcpu,
            task: seen.event.task,
            at: self.at,
        }
    }

    fn frame_free(&self, seen: &Seen, found: &mut Vec<Violation>) {
        let [gpa, order, kind, ..] = seen.event.args;
        let bytes = PAGE_SIZE << order.min(10);
        if kind == FrameKind::Table as u64 {
            return self.table_free(seen, gpa, found);
        }
        let frame = gpa >> 12;
        for (index, vcpu) in self.now.vcpus.iter().enumerate() {
            // A lazy vCPU runs no user code, and flushes before it does (docs/tlb-model.md, X-I1).
            let held = vcpu.stale.iter().find(|s| s.covers_frame(gpa, bytes));
            if let Some(stale) = held.filter(|_| !vcpu.lazy) {
                found.push(violation(
                    FREED,
                    self.tell(index, stale, "is freed")
                        .frame(frame)
                        .detail(format!("freed by {}", who(seen))),
                ));
                return;
            }
        }
        if kind == FrameKind::Anon as u64 && self.now.mapped.get(&gpa).is_some_and(|n| *n > 0) {
            found.push(violation(
                FREED_MAPPED,
                Finding::new("a frame is freed that page tables map")
                    .expected("no present entry")
                    .found(format!("{} entries", self.now.mapped[&gpa]))
                    .frame(frame)
                    .vcpu(seen.vcpu),
            ));
        }
    }

    fn table_free(&self, seen: &Seen, gpa: u64, found: &mut Vec<Violation>) {
        for (index, vcpu) in self.now.vcpus.iter().enumerate() {
            let held = vcpu.tables.iter().find(|table| table.table == gpa);
            if let Some(table) = held {
                found.push(violation(
                    FREED_TABLE,
                    Finding::new(format!(
                        "a page-table page is freed that vCPU {index}{} may still walk",
                        if vcpu.lazy { ", which is lazy," } else { "" }
                    ))
                    .expected("a flush on that vCPU since the table was unlinked")
                    .found(format!(
                        "none: it may hold a pointer to the table for {:#x}, unlinked at level {} by vCPU {} (event {})",
                        table.gva, table.level, table.change.vcpu, table.change.at
                    ))
                    .mm(table.mm)
                    .gva(table.gva)
                    .frame(gpa >> 12)
                    .vcpu(index)
                    .detail(format!("freed by {}", who(seen))),
                ));
                return;
            }
            if vcpu.root == gpa {
                found.push(violation(
                    FREED_TABLE,
                    Finding::new(format!("the level-4 table in CR3 of vCPU {index} is freed"))
                        .frame(gpa >> 12)
                        .vcpu(index)
                        .detail(format!("freed by {}", who(seen))),
                ));
                return;
            }
        }
    }

    /// The range and what counts in it, of a call that has succeeded.
    fn call_over(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [number, result, ..] = seen.event.args;
        let Some(call) = self.calls.remove(&seen.event.task) else {
            return;
        };
        let [_, start, len, third, _] = call.args;
        if decode(result).is_err() {
            return;
        }
        let (start, end) = match number {
            nr::MUNMAP | nr::MPROTECT => (start, start.saturating_add(len)),
            nr::MADVISE if third == advice::DONTNEED => (start, start.saturating_add(len)),
            nr::FORK => (0, u64::MAX),
            nr::CLONE if start & clone::VM == 0 => (0, u64::MAX),
            _ => return,
        };
        let mm = self.now.vcpus[seen.vcpu].mm;
        let task = seen.event.task;
        // What a concurrent operation took away after this call began is that operation's to flush.
        let blamed = |s: &&Stale| {
            s.mm == mm && s.overlaps(start, end) && (s.change.at < call.at || s.change.task == task)
        };
        let held = self.holder(|_| true, blamed);
        if let Some((index, stale)) = held {
            found.push(violation(
                RETURNED,
                self.tell(index, stale, "has left the tables")
                    .detail(format!("the call returned on {}", who(seen))),
            ));
        }
    }

    fn fault_over(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let task = seen.event.task;
        let Some(fault) = self.faults.remove(&task) else {
            return;
        };
        let blamed = |s: &&Stale| s.change.task == task && s.change.at > fault.at;
        let held = self.holder(|index| index != seen.vcpu, blamed);
        if let Some((index, stale)) = held {
            found.push(violation(
                REPLACED,
                self.tell(index, stale, "was replaced by a fault")
                    .detail(format!("the fault was handled by {}", who(seen))),
            ));
        }
    }

    fn attach(&self, seen: &Seen, found: &mut Vec<Violation>) {
        let [mm, _, start, end, _] = seen.event.args;
        let blamed = |s: &&Stale| s.mm == mm && s.overlaps(start, end);
        if let Some((index, stale)) = self.holder(|_| true, blamed) {
            found.push(violation(
                ATTACHED,
                self.tell(index, stale, "belongs to a mapping that is gone")
                    .detail(format!("mapped again by {}", who(seen))),
            ));
        }
    }

    /// The first vCPU that runs user code, of those asked for, with a stale entry that counts.
    fn holder(
        &self,
        asked: impl Fn(usize) -> bool,
        counts: impl Fn(&&Stale) -> bool,
    ) -> Option<(usize, &Stale)> {
        self.now.vcpus.iter().enumerate().find_map(|(index, vcpu)| {
            if vcpu.lazy || !asked(index) {
                return None;
            }
            Some((index, vcpu.stale.iter().find(&counts)?))
        })
    }

    fn tell(&self, vcpu: usize, stale: &Stale, why: &str) -> Finding {
        Finding::new(format!(
            "vCPU {vcpu} may still translate {:#x} to a frame that {why}",
            stale.gva
        ))
        .expected(format!(
            "a flush of {:#x}..{:#x} of mm {} on vCPU {vcpu} since the entry changed",
            stale.gva,
            stale.gva + stale.bytes(),
            stale.mm
        ))
        .found(format!(
            "none: it may hold {} since before vCPU {} (task {}) changed the entry (event {})",
            describe(stale.entry, stale.level),
            stale.change.vcpu,
            stale.change.task,
            stale.change.at
        ))
        .mm(stale.mm)
        .gva(stale.gva)
        .vcpu(vcpu)
    }

    fn cr3_load(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [root, mm, ..] = seen.event.args;
        self.now.flush_all(seen.vcpu);
        let mask = self.now.masks.get(&mm).copied().unwrap_or(0);
        let vcpu = &mut self.now.vcpus[seen.vcpu];
        (vcpu.mm, vcpu.root, vcpu.lazy) = (mm, root, false);
        if mm != 0 && mask & 1 << seen.vcpu == 0 {
            found.push(violation(
                UNLISTED,
                Finding::new(format!(
                    "vCPU {} loads the page tables of mm {mm} and is not in its cpumask: no flush will reach it",
                    seen.vcpu
                ))
                .expected(format!("bit {}", seen.vcpu))
                .found(format!("{mask:#b}"))
                .mm(mm)
                .vcpu(seen.vcpu),
            ));
        }
    }

    fn access(&self, seen: &Seen, found: &mut Vec<Violation>) {
        let [gva, frame, _, how, _] = seen.event.args;
        if how & access::FAULT != 0 {
            return;
        }
        let write = how & access::WRITE != 0;
        let may = self.now.may_translate(seen.vcpu, gva, frame);
        if may.is_none_or(|writable| write && !writable) {
            found.push(violation(
                IMPOSSIBLE,
                Finding::new(format!(
                    "vCPU {} used a translation of {gva:#x} that it cannot hold: the soft TLB and the model disagree",
                    seen.vcpu
                ))
                .expected("a translation of the tables, or one that no flush has covered")
                .found(format!("frame {:#x}", frame >> 12))
                .gva(gva)
                .frame(frame >> 12)
                .vcpu(seen.vcpu),
            ));
        }
    }

    fn leave_lazy(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let vcpu = &mut self.now.vcpus[seen.vcpu];
        vcpu.lazy = false;
        if let Some(stale) = vcpu.stale.first().copied() {
            found.push(violation(
                LAZY,
                self.tell(seen.vcpu, &stale, "left the tables while it was lazy"),
            ));
        }
    }
}

impl Monitor for TlbModel {
    fn fork(&self) -> Box<dyn Monitor> {
        Box::new(self.clone())
    }
    fn start(&mut self, memory: &dyn PhysMem, kernel_root: u64, nr_vcpus: usize) {
        self.start = read(memory, kernel_root, nr_vcpus);
        self.reset();
    }

    fn reset(&mut self) {
        self.now.clone_from(&self.start);
        self.calls.clear();
        self.faults.clear();
        self.at = 0;
    }

    fn observe(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        self.at += 1;
        let Event { task, args, .. } = seen.event;
        let Some(kind) = EventKind::from_id(seen.event.kind) else {
            return;
        };
        if seen.vcpu >= self.now.vcpus.len() {
            return;
        }
        match kind {
            EventKind::PteChange => self.pte_change(seen, found),
            EventKind::FlushLocal => self.now.flush_range(seen.vcpu, args[1], args[2]),
            EventKind::FlushAll => self.now.flush_all(seen.vcpu),
            EventKind::Cr3Load => self.cr3_load(seen, found),
            EventKind::FrameFree => self.frame_free(seen, found),
            EventKind::VmaAttach => self.attach(seen, found),
            EventKind::SyscallEnter => {
                let begun = Begun { at: self.at, args };
                self.calls.insert(task, begun);
            }
            EventKind::SyscallExit => self.call_over(seen, found),
            EventKind::FaultEnter => {
                let begun = Begun { at: self.at, args };
                self.faults.insert(task, begun);
            }
            EventKind::FaultExit => self.fault_over(seen, found),
            EventKind::LazyEnter => self.now.vcpus[seen.vcpu].lazy = true,
            EventKind::LazyLeave => self.leave_lazy(seen, found),
            EventKind::CpumaskSet => {
                *self.now.masks.entry(args[0]).or_default() |= 1 << seen.vcpu;
            }
            EventKind::CpumaskClear => {
                *self.now.masks.entry(args[0]).or_default() &= !(1 << seen.vcpu);
            }
            EventKind::MmCreate => {
                self.now.roots.insert(args[0], args[1]);
            }
            EventKind::MmDestroy => {
                self.now.roots.remove(&args[0]);
                self.now.masks.remove(&args[0]);
            }
            EventKind::Access => self.access(seen, found),
            _ => {}
        }
    }

    fn compare(&mut self, memory: &dyn PhysMem, kernel_root: u64, found: &mut Vec<Violation>) {
        let there = read(memory, kernel_root, self.now.vcpus.len());
        let hardware = (PteFlags::ACCESSED | PteFlags::DIRTY).bits();
        let differs = |a: Option<&Pte>, b: Option<&Pte>| match (a, b) {
            (Some(a), Some(b)) => (a.0 ^ b.0) & !hardware != 0,
            (a, b) => a.is_some() != b.is_some(),
        };
        let places = self.now.entries.keys().chain(there.entries.keys());
        for place in places {
            let (told, is) = (self.now.entries.get(place), there.entries.get(place));
            if differs(told, is) {
                let (mm, level, gva) = *place;
                let text =
                    |entry: Option<&Pte>| describe(entry.copied().unwrap_or(Pte::NONE), level);
                found.push(violation(
                    UNEXPLAINED,
                    Finding::new(format!("unexplained PTE change at {gva:#x}, level {level}"))
                        .expected(text(told))
                        .found(text(is))
                        .mm(mm)
                        .gva(gva),
                ));
                return;
            }
        }
    }
}

/// The state that memory shows: nothing stale, because what starts here starts with a flush.
fn read(memory: &dyn PhysMem, kernel_root: u64, nr_vcpus: usize) -> State {
    let mut state = State {
        vcpus: vec![state::Vcpu::default(); nr_vcpus],
        ..State::default()
    };
    let word = |gpa: u64| {
        let mut bytes = [0; 8];
        let read = memory.read(gpa, &mut bytes);
        read.map_or(0, |()| u64::from_le_bytes(bytes))
    };
    let mut mm = word(kernel_root + offset_of!(KernelRoot, mms) as u64);
    // A list that the guest has tied into a loop ends here all the same.
    for _ in 0..MAX_MMS {
        if mm == 0 {
            break;
        }
        let id = word(mm + offset_of!(Mm, id) as u64);
        let pgd = word(mm + offset_of!(Mm, pgd) as u64);
        state.roots.insert(id, pgd);
        let mask = word(mm + offset_of!(Mm, cpumask) as u64);
        state.masks.insert(id, mask);
        walk(memory, &mut state, id, pgd, 4, 0);
        for index in 0..nr_vcpus {
            let cpu = offset_of!(KernelRoot, cpus) + index * size_of::<Cpu>();
            let cpu = kernel_root + cpu as u64;
            if word(cpu + offset_of!(Cpu, loaded_mm) as u64) == mm {
                let lazy = word(cpu + offset_of!(Cpu, lazy) as u64) != 0;
                let vcpu = &mut state.vcpus[index];
                (vcpu.mm, vcpu.root, vcpu.lazy) = (id, pgd, lazy);
            }
        }
        mm = word(mm + offset_of!(Mm, next) as u64);
    }
    state
}

/// The frames that level-1 entries of any mm map, once for each entry.
pub(super) fn leaf_frames(memory: &dyn PhysMem, kernel_root: u64) -> Vec<u64> {
    read(memory, kernel_root, 0).leaf_frames()
}

/// Addresses at which the tables below `pgd` map `frame`.
pub(super) fn leaf_addresses(memory: &dyn PhysMem, pgd: u64, frame: u64) -> Vec<u64> {
    let mut state = State::default();
    walk(memory, &mut state, 0, pgd, 4, 0);
    let maps = |entry: Pte| entry.is_present() && entry.address() == frame;
    let leaves = state
        .entries
        .iter()
        .filter(|((_, level, _), _)| *level == 1);
    let mut found: Vec<u64> = leaves
        .filter(|(_, entry)| maps(**entry))
        .map(|((_, _, gva), _)| *gva)
        .collect();
    found.sort_unstable();
    found
}

fn walk(memory: &dyn PhysMem, state: &mut State, mm: u64, table: u64, level: u8, base: u64) {
    let Ok(entries) = memory.table(table) else {
        return;
    };
    let used = if level == 4 { 256 } else { 512 };
    for (index, entry) in entries.iter().take(used).enumerate() {
        let entry = Pte(entry.load(std::sync::atomic::Ordering::Relaxed));
        if !entry.is_present() {
            continue;
        }
        let gva = base + index as u64 * abi::pte::level_size(level);
        state.place((mm, level, gva), entry);
        if level > 1 && !entry.is_leaf(level) {
            walk(memory, state, mm, entry.address(), level - 1, gva);
        }
    }
}

fn violation(id: &'static str, finding: Finding) -> Violation {
    super::violation(INVARIANTS, id, finding)
}

fn who(seen: &Seen) -> String {
    format!("vCPU {} (task {})", seen.vcpu, seen.event.task)
}

fn describe(entry: Pte, level: u8) -> String {
    if !entry.is_present() {
        return "nothing".into();
    }
    if level > 1 && !entry.is_leaf(level) {
        return format!("a table at {:#x}", entry.address());
    }
    let flags = entry.flags();
    let mut text = format!("frame {:#x} ", entry.leaf_address(level) >> 12);
    for (flag, letter) in [
        (PteFlags::USER, 'U'),
        (PteFlags::WRITE, 'W'),
        (PteFlags::NO_EXECUTE, 'N'),
    ] {
        text.push(if flags.contains(flag) { letter } else { '-' });
    }
    text
}
