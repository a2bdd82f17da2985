//! Walkers of page tables on the stream (family W): a table is freed only when nobody can be inside it.
//!
//! A walk in software holds pointers to tables from its first load to its end: a fault, a copy to or from
//! user memory, an unmap, an rmap walk, fork. A walk that began before a table was unlinked may have reached it;
//! one that began later cannot. Walks by processors, lazy ones too, are the TLB model's (T-03).
//!
//! What keeps the tables where they are depends on who walks (`abi::channel::Walker`): unmapping takes the mmap_lock for
//! writing, takes a VMA off its anon_vmas first, and its flush waits for every CPU that has interrupts off.

use std::mem::offset_of;

use abi::channel::{EventKind, Walker};
use abi::lock::LockClass;
use abi::objects::{Cpu, FrameKind, KernelRoot, Mm};
use abi::pte::{Pte, level_size};

use super::locks::mmap_lock;
use super::words::{Word as _, mms};
use super::{Kinds, Monitor, Rule, Seen, violation};
use crate::check::{Finding, Violation};
use crate::map::Map;
use crate::memory::PhysMem;

/// IDs and predicates.
pub const INVARIANTS: &[Rule] = &[
    (
        INSIDE,
        "a page-table page is freed only when no walk that began before it was unlinked goes on",
    ),
    (
        PROTECTED,
        "who walks page tables holds what keeps them there: the mmap_lock, a fault its VMA, the anon_vma's lock, an RCU read section, or this vCPU's CR3",
    ),
];

const INSIDE: &str = "W-01";
const PROTECTED: &str = "W-02";

/// A walk that goes on.
#[derive(Clone, Copy, Debug)]
struct Walk {
    /// Who walks: a task, which may go on on another vCPU; without one the vCPU.
    who: (u32, usize),
    vcpu: usize,
    mm: u64,
    gva: u64,
    walker: Option<Walker>,
    began: u64,
}

/// Locks that the walks of one kind rely on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    who: (u32, usize),
    vcpu: usize,
    class: LockClass,
    word: u64,
    /// Of a VMA: the number of its mm.
    mm: u64,
}

/// Locks under which somebody walks.
const PROTECT: &[LockClass] = &[
    LockClass::MmapRead,
    LockClass::MmapWrite,
    LockClass::VmaRead,
    LockClass::AnonVma,
    LockClass::IMmap,
];

/// What memory says at the start.
#[derive(Clone, Debug, Default)]
struct Start {
    /// By number: where the object lies.
    mms: Map<u64>,
    /// Number of the mm that each vCPU has loaded.
    loaded: Vec<u64>,
    /// Lock words that somebody holds already: nobody knows who.
    held: Vec<u64>,
}

/// A table that nothing refers to any more.
#[derive(Clone, Copy, Debug)]
struct Unlinked {
    mm: u64,
    start: u64,
    end: u64,
    at: u64,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Walks {
    walks: Vec<Walk>,
    unlinked: Map<Unlinked>,
    held: Vec<Held>,
    /// Depth of each vCPU's RCU read section.
    sections: Map<u64>,
    start: Start,
    now: Start,
    /// Events that it was told so far.
    at: u64,
}

impl Walks {
    fn begin(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [mm, gva, walker, ..] = seen.event.args;
        let walk = Walk {
            who: who(seen),
            vcpu: seen.vcpu,
            mm,
            gva,
            walker: Walker::from_u64(walker),
            began: self.at,
        };
        self.walks.push(walk);
        self.judge(seen, walk, "begins", found);
    }

    /// Whether `walk` still holds what it needs.
    fn judge(&self, seen: &Seen, walk: Walk, does: &str, found: &mut Vec<Violation>) {
        let Some(walker) = walk.walker else { return };
        let held = match walker {
            Walker::User | Walker::GupFast => {
                let loaded = self.now.loaded.get(walk.vcpu);
                loaded.is_none_or(|loaded| *loaded == walk.mm)
            }
            // One that was open before the stream began is not known.
            Walker::Peek => self.sections.get(walk.vcpu as u64) != Some(&0),
            // A fault that stays inside the family it has locked walks one mm only; others lock by task.
            Walker::Rmap => {
                let mut held = self.held.iter();
                held.any(|held| {
                    matches!(held.class, LockClass::AnonVma | LockClass::IMmap)
                        && held.vcpu == walk.vcpu
                })
            }
            Walker::Truncate => {
                let mut held = self.held.iter();
                held.any(|held| held.class == LockClass::IMmap && held.vcpu == walk.vcpu)
            }
            Walker::Fault if self.holds_vma(&walk) => true,
            _ => {
                let Some(object) = self.now.mms.get(walk.mm) else {
                    return; // An mm from before the stream that is on no list.
                };
                let word = mmap_lock(*object);
                let mut held = self.held.iter();
                self.now.held.contains(&word)
                    || held.any(|held| held.word == word && held.who == walk.who)
            }
        };
        if !held {
            let needs = match walker {
                Walker::User | Walker::GupFast => "its CR3 loaded",
                Walker::Rmap => "an anon_vma or i_mmap lock",
                Walker::Truncate => "an i_mmap lock",
                Walker::Peek => "an RCU read section",
                Walker::Fault => "its VMA or mmap_lock",
                _ => "its mmap_lock",
            };
            let title = format!("a walk by {} {does} without {needs}", walker.name());
            let finding = Finding::new(title)
                .expected(needs)
                .found(format!("none held by task {}", walk.who.0))
                .mm(walk.mm)
                .gva(walk.gva)
                .vcpu(seen.vcpu);
            found.push(violation(INVARIANTS, PROTECTED, finding));
        }
    }

    fn holds_vma(&self, walk: &Walk) -> bool {
        let mut held = self.held.iter();
        held.any(|held| {
            held.class == LockClass::VmaRead && held.who == walk.who && held.mm == walk.mm
        })
    }

    /// The walks of `seen`'s task and vCPU that go on.
    fn judge_own(&self, seen: &Seen, found: &mut Vec<Violation>) {
        let (me, vcpu) = (who(seen), seen.vcpu);
        for walk in self.walks.iter().filter(|w| w.who == me && w.vcpu == vcpu) {
            self.judge(seen, *walk, "goes on", found);
        }
    }

    fn lock(&mut self, seen: &Seen, taken: bool, found: &mut Vec<Violation>) {
        let [word, class, _, mm, _] = seen.event.args;
        let Some(class) = LockClass::from_u64(class) else {
            return;
        };
        if !PROTECT.contains(&class) {
            return;
        }
        let held = Held {
            who: who(seen),
            vcpu: seen.vcpu,
            class,
            word,
            mm,
        };
        if taken {
            return self.held.push(held);
        }
        let same = |other: &Held| (other.who, other.class, other.word) == (held.who, class, word);
        match self.held.iter().rposition(same) {
            Some(at) => drop(self.held.swap_remove(at)),
            None => self.now.held.retain(|other| *other != word),
        }
        self.judge_own(seen, found);
    }

    fn unlink(&mut self, args: [u64; 5]) {
        let [mm, gva, level, old, new] = args;
        let (old, new) = (Pte(old), Pte(new));
        let level = level.clamp(1, 4) as u8;
        if level < 2 || !old.is_present() || old.is_leaf(level) {
            return;
        }
        if !new.is_present() || new.address() != old.address() {
            let start = gva & !(level_size(level) - 1);
            let unlinked = Unlinked {
                mm,
                start,
                end: start.saturating_add(level_size(level)),
                at: self.at,
            };
            self.unlinked.insert(old.address(), unlinked);
        }
    }

    fn free(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [gpa, _, kind, ..] = seen.event.args;
        let Some(table) = self.unlinked.remove(gpa) else {
            return;
        };
        if !FrameKind::from_u64(kind).is_some_and(FrameKind::is_table) {
            return;
        }
        let inside = self.walks.iter().find(|walk| {
            walk.mm == table.mm
                && walk.began < table.at
                && (table.start..table.end).contains(&walk.gva)
                && walk.who != who(seen)
        });
        if let Some(walk) = inside {
            let finding = Finding::new(format!(
                "a page-table page is freed while a walk for {:#x} may be inside it",
                walk.gva
            ))
            .expected("no walk of it that began before it was unlinked")
            .found(format!("task {} on vCPU {} walks", walk.who.0, walk.who.1))
            .object("page-table page", gpa)
            .mm(walk.mm)
            .gva(walk.gva)
            .vcpu(seen.vcpu)
            .detail(format!(
                "freed by task {} on vCPU {}",
                seen.event.task, seen.vcpu
            ));
            found.push(violation(INVARIANTS, INSIDE, finding));
        }
    }
}

impl Walks {
    pub(super) const FOLLOWS: Kinds = Kinds::of(&[
        EventKind::WalkBegin,
        EventKind::WalkEnd,
        EventKind::LockAcquire,
        EventKind::LockRelease,
        EventKind::RcuEnter,
        EventKind::RcuExit,
        EventKind::MmCreate,
        EventKind::MmFree,
        EventKind::Cr3Load,
        EventKind::PteChange,
        EventKind::FrameFree,
    ])
    .of_locks(PROTECT);
}

impl Monitor for Walks {
    fn fork(&self) -> Box<dyn Monitor> {
        Box::new(self.clone())
    }
    fn start(&mut self, memory: &dyn PhysMem, kernel_root: u64, nr_vcpus: usize) {
        self.start = read(memory, kernel_root, nr_vcpus);
        self.reset();
    }
    fn reset(&mut self) {
        self.walks.clear();
        self.unlinked.clear();
        self.held.clear();
        self.sections.clear();
        self.now.clone_from(&self.start);
        self.at = 0;
    }
    fn follows(&self) -> Kinds {
        Self::FOLLOWS
    }
    #[inline(always)]
    fn take(&mut self, kind: EventKind, seen: &Seen, found: &mut Vec<Violation>) {
        self.at += 1;
        let args = seen.event.args;
        match kind {
            EventKind::WalkBegin => self.begin(seen, found),
            EventKind::LockAcquire => self.lock(seen, true, found),
            EventKind::LockRelease => self.lock(seen, false, found),
            EventKind::RcuEnter | EventKind::RcuExit => {
                self.sections.insert(seen.vcpu as u64, args[0]);
                self.judge_own(seen, found);
            }
            EventKind::MmCreate => drop(self.now.mms.insert(args[0], args[2])),
            EventKind::MmFree => drop(self.now.mms.remove(args[0])),
            EventKind::Cr3Load => {
                if let Some(loaded) = self.now.loaded.get_mut(seen.vcpu) {
                    *loaded = args[1];
                }
                self.judge_own(seen, found);
            }
            EventKind::WalkEnd => {
                let me = who(seen);
                // The innermost: walks nest.
                let same = |walk: &Walk| (walk.who, walk.mm, walk.gva) == (me, args[0], args[1]);
                if let Some(at) = self.walks.iter().rposition(same) {
                    self.walks.remove(at);
                }
            }
            EventKind::PteChange => self.unlink(args),
            EventKind::FrameFree => self.free(seen, found),
            _ => {}
        }
    }
    fn compare(&mut self, _: &dyn PhysMem, _: u64, _: &mut Vec<Violation>) {}
}

fn read(memory: &dyn PhysMem, kernel_root: u64, nr_vcpus: usize) -> Start {
    let mut start = Start::default();
    for mm in mms(memory, kernel_root) {
        let id = memory.field(mm, offset_of!(Mm, id));
        start.mms.insert(id, mm);
        if memory.field(mm, offset_of!(Mm, mmap_lock)) != 0 {
            start.held.push(mmap_lock(mm));
        }
    }
    for index in 0..nr_vcpus {
        let cpu = offset_of!(KernelRoot, cpus) + index * size_of::<Cpu>();
        let mm = memory.field(kernel_root, cpu + offset_of!(Cpu, loaded_mm));
        let id = memory.field(mm, offset_of!(Mm, id));
        start.loaded.push(if mm == 0 { 0 } else { id });
    }
    start
}

fn who(seen: &Seen) -> (u32, usize) {
    match seen.event.task {
        0 => (0, seen.vcpu),
        task => (task, 0),
    }
}

#[cfg(test)]
mod tests {
    use abi::channel::Event;
    use abi::pte::PteFlags;

    use super::*;
    use EventKind as K;

    const TABLE: u64 = 0x9000;

    fn ids(steps: &[(u32, K, [u64; 5])]) -> Vec<&'static str> {
        let mut walks = Walks::default();
        walks.now.loaded = vec![1];
        let mut found = Vec::new();
        for &(task, kind, args) in steps {
            let event = Event {
                kind: kind as u32,
                task,
                args,
                ..Event::default()
            };
            walks.observe(&Seen { vcpu: 0, event }, &mut found);
        }
        found.iter().map(|violation| violation.id).collect()
    }

    #[test]
    fn a_walk_without_its_lock_is_w_02() {
        let mmap = mmap_lock(0x100);
        let (read, anon) = (LockClass::MmapRead as u64, LockClass::AnonVma as u64);
        let i_mmap = LockClass::IMmap as u64;
        let create = (1, K::MmCreate, [1, 0, 0x100, 0, 0]);
        let walk = |task, walker: Walker| (task, K::WalkBegin, [1, 0x1000, walker as u64, 0, 0]);
        let end = |walker: Walker| (1, K::WalkEnd, [1, 0x1000, walker as u64, 0, 0]);
        let take = |word, class| (1, K::LockAcquire, [word, class, 0, 0, 0]);
        let give = |word, class| (1, K::LockRelease, [word, class, 0, 0, 0]);

        let fault = [create, take(mmap, read), walk(1, Walker::Fault)];
        let over = [end(Walker::Fault), give(mmap, read)];
        assert_eq!(ids(&[fault, [over[0], over[1], create]].concat()), [""; 0]);
        assert_eq!(ids(&[create, walk(1, Walker::Fault)]), ["W-02"]);
        assert_eq!(
            ids(&[create, take(mmap, read), walk(2, Walker::Unmap)]),
            ["W-02"],
            "another task's lock"
        );
        assert_eq!(
            ids(&[create, take(8, read), walk(1, Walker::Fork)]),
            ["W-02"],
            "another mm's lock"
        );
        assert_eq!(
            ids(&[&fault[..], &[give(mmap, read)]].concat()),
            ["W-02"],
            "dropped inside"
        );
        assert_eq!(ids(&[walk(1, Walker::Rmap)]), ["W-02"]);
        let rmap = [take(8, anon), walk(1, Walker::Rmap), end(Walker::Rmap)];
        assert_eq!(ids(&rmap), [""; 0]);
        // A file's mappings are under its own lock, for both walks, and no anon_vma's will do for truncate.
        let truncate = walk(1, Walker::Truncate);
        let ends = [end(Walker::Truncate), end(Walker::Rmap)];
        let of_file = [take(8, i_mmap), truncate, walk(1, Walker::Rmap)];
        assert_eq!(ids(&[&of_file[..], &ends].concat()), [""; 0]);
        assert_eq!(ids(&[take(8, anon), truncate]), ["W-02"]);
        assert_eq!(ids(&[truncate]), ["W-02"]);
        let load = |mm| (1, K::Cr3Load, [0, mm, 0, 0, 0]);
        assert_eq!(ids(&[load(1), walk(1, Walker::User)]), [""; 0]);
        assert_eq!(ids(&[load(2), walk(1, Walker::User)]), ["W-02"]);
        assert_eq!(ids(&[load(1), walk(1, Walker::GupFast)]), [""; 0]);
        assert_eq!(ids(&[load(2), walk(1, Walker::GupFast)]), ["W-02"]);
        assert_eq!(ids(&[create, walk(1, Walker::Gup)]), ["W-02"]);
        let (enter, exit) = ((1, K::RcuEnter, [1, 0, 0, 0, 0]), (1, K::RcuExit, [0; 5]));
        let peek = [enter, walk(1, Walker::Peek), end(Walker::Peek), exit];
        assert_eq!(ids(&peek), [""; 0]);
        assert_eq!(ids(&[exit, walk(1, Walker::Peek)]), ["W-02"]);
        assert_eq!(ids(&[&peek[..2], &[exit]].concat()), ["W-02"]);
    }

    #[test]
    fn a_table_freed_under_a_walk_that_may_be_inside_is_w_01() {
        let entry = Pte::new(TABLE, PteFlags::PRESENT | PteFlags::USER).0;
        let unlink = (1, K::PteChange, [1, 0x20_0000, 2, entry, 0]);
        let free = (1, K::FrameFree, [TABLE, 0, FrameKind::Table as u64, 0, 0]);
        let walk = |mm, gva| (2, K::WalkBegin, [mm, gva, 0, 0, 0]);
        let over = (2, K::WalkEnd, [1, 0x20_1000, 0, 0, 0]);
        let inside = walk(1, 0x20_1000);
        assert_eq!(ids(&[inside, unlink, free]), ["W-01"]);
        let retired = (1, K::FrameFree, [TABLE, 0, FrameKind::Retired as u64, 0, 0]);
        assert_eq!(ids(&[inside, unlink, retired]), ["W-01"]);
        assert_eq!(
            ids(&[inside, inside, over, unlink, free]),
            ["W-01"],
            "they nest"
        );
        // Over, begun later, elsewhere, in another mm, or one's own.
        assert_eq!(ids(&[inside, over, unlink, free]), [""; 0]);
        assert_eq!(ids(&[inside, unlink, over, free]), [""; 0]);
        assert_eq!(ids(&[unlink, inside, free]), [""; 0]);
        assert_eq!(ids(&[walk(1, 0x40_0000), unlink, free]), [""; 0]);
        assert_eq!(ids(&[walk(2, 0x20_1000), unlink, free]), [""; 0]);
        let own = (1, K::WalkBegin, [1, 0x20_1000, 0, 0, 0]);
        assert_eq!(ids(&[own, unlink, free]), [""; 0]);
    }
}
