//! Locks (family K): taken in the documented order, by one holder, and none kept on the way out, or over a sleep that is not
//! made for that.
//!
//! The order is the kernel's own (`guest-kernel/src/sync`, after Linux's
//! `Documentation/mm/process_addrs.rst`), so a schedule that breaks it is reported whether or not another
//! one takes the locks the other way round: a deadlock needs both, and only one of them is wrong.

use std::mem::offset_of;

use abi::channel::{Event, EventKind};
use abi::lock::LockClass;
use abi::objects::{Mm, Vma};

use super::order::Order;
use super::{Kinds, Monitor, Rule, Seen};
use crate::check::{Finding, Violation};
use crate::map::Set;
use crate::memory::PhysMem;

/// IDs and predicates.
pub const INVARIANTS: &[Rule] = &[
    (
        ORDER,
        "locks are taken in the order file position, inode, mmap_lock, VMA, folio, i_mmap, anon_vma, page table, then one of the others",
    ),
    (
        HOLDER,
        "a lock has one holder, or only readers, and is released by who holds it",
    ),
    (KEPT, "a system call or fault that is over holds no lock"),
    (
        ASLEEP,
        "a CPU that is given to another task holds no spin lock but the scheduler's",
    ),
];

const ORDER: &str = "K-01";
const HOLDER: &str = "K-02";
const KEPT: &str = "K-03";
const ASLEEP: &str = "K-05";

/// Who holds a lock: spin locks belong to a CPU (the scheduler's is handed over with it at a context
/// switch), others to a task ([`LockClass::is_of_task`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Holder {
    Cpu(usize),
    Task(u32),
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Locks {
    held: Vec<(Holder, u64, LockClass)>,
    /// Locks whose history is known: those taken at least once since the start.
    known: Set,
    pub(super) order: Order,
}

fn rank(class: LockClass) -> u8 {
    match class {
        LockClass::Position => 0,
        LockClass::Inode => 1,
        LockClass::MmapRead | LockClass::MmapWrite => 2,
        LockClass::VmaRead | LockClass::VmaWrite => 3,
        LockClass::Folio => 4,
        LockClass::IMmap => 5,
        LockClass::AnonVma => 6,
        LockClass::PageTable => 7,
        _ => 8,
    }
}

/// Two locks of one rank that may be held together: fork holds the mmap_locks of parent and child and locks
/// of a table of each, migration the locks of the folios of both frames; who else knows the child's takes no other, and nobody knows the new
/// frame's.
fn may_nest(class: LockClass) -> bool {
    matches!(
        class,
        LockClass::MmapRead | LockClass::MmapWrite | LockClass::Folio | LockClass::PageTable
    )
}

/// True for the locks that a call on a file holds while it copies from and to its program.
fn is_of_file(class: LockClass) -> bool {
    matches!(class, LockClass::Position | LockClass::Inode)
}

/// True where several may hold a lock as `class`.
fn shares(class: LockClass) -> bool {
    matches!(class, LockClass::MmapRead | LockClass::VmaRead)
}

impl Locks {
    fn acquired(&mut self, seen: &Seen, word: u64, class: LockClass, found: &mut Vec<Violation>) {
        let me = holder(seen, class);
        self.known.insert(word, ());
        if self.held.is_empty() {
            return self.held.push((me, word, class));
        }
        let other = self
            .held
            .iter()
            .find(|(_, held, other)| *held == word && !(shares(class) && shares(*other)));
        if let Some((who, ..)) = other {
            let finding = finding(seen, "a lock was taken that is held already", class, word)
                .found(format!("{who:?} holds it"));
            found.push(violation(HOLDER, finding));
        }
        if !was_tried(&seen.event) {
            self.waited(seen, word, class, found);
        }
        self.held.push((me, word, class));
    }

    /// Somebody has waited for a lock that he has now.
    fn waited(&mut self, seen: &Seen, word: u64, class: LockClass, found: &mut Vec<Violation>) {
        let mine = [Holder::Cpu(seen.vcpu), Holder::Task(seen.event.task)];
        let before = self.held.iter().filter(|(who, ..)| mine.contains(who));
        let wrong = before.clone().find(|(_, _, held)| {
            rank(*held) > rank(class) || rank(*held) == rank(class) && !may_nest(class)
        });
        if let Some((_, at, held)) = wrong {
            let title = format!("the {} was taken under the {}", class.name(), held.name());
            let finding = finding(seen, &title, class, word)
                .expected("the order of guest-kernel/src/sync")
                .found(format!("{} at {at:#x} held meanwhile", held.name()));
            found.push(violation(ORDER, finding));
        }
        for &(_, at, held) in before.filter(|(_, at, _)| *at != word) {
            self.order.taken(seen, (held, at), (class, word), found);
        }
    }

    fn released(&mut self, seen: &Seen, word: u64, class: LockClass, found: &mut Vec<Violation>) {
        let me = holder(seen, class);
        let at = self.held.iter().position(|held| *held == (me, word, class));
        match at {
            Some(at) => {
                self.held.swap_remove(at);
            }
            // It may have been taken before the stream began.
            None if !self.known.contains(word) => {}
            None => {
                let title = "a lock was released by who does not hold it";
                found.push(violation(HOLDER, finding(seen, title, class, word)));
            }
        }
    }

    fn over(
        &mut self,
        seen: &Seen,
        counts: impl Fn(LockClass) -> bool,
        found: &mut Vec<Violation>,
    ) {
        let mine = [Holder::Cpu(seen.vcpu), Holder::Task(seen.event.task)];
        let mut held = self.held.iter();
        let kept = held.find(|(who, _, class)| mine.contains(who) && counts(*class));
        if let Some((_, word, class)) = kept {
            let title = "a lock is still held on the way out of the kernel";
            found.push(violation(KEPT, finding(seen, title, *class, *word)));
        }
    }
}

impl Locks {
    /// The vCPU goes over to another task (Linux's `schedule_debug`, "scheduling while atomic"): who wants what it holds spins,
    /// perhaps where the one that sleeps would have to run.
    fn switched(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let kept = self
            .held
            .iter()
            .find(|(who, _, class)| *who == Holder::Cpu(seen.vcpu) && *class != LockClass::Sched);
        if let Some((_, word, class)) = kept {
            let title = "a task gives its CPU away while it holds a spin lock";
            found.push(violation(ASLEEP, finding(seen, title, *class, *word)));
        }
    }
}

impl Locks {
    pub(super) const FOLLOWS: Kinds = Kinds::of(&[
        EventKind::LockAcquire,
        EventKind::LockRelease,
        EventKind::SyscallExit,
        EventKind::FaultExit,
        EventKind::Switch,
        EventKind::MmCreate,
        EventKind::FrameAlloc,
    ]);
}

impl Monitor for Locks {
    fn fork(&self) -> Box<dyn Monitor> {
        Box::new(self.clone())
    }
    fn start(&mut self, memory: &dyn PhysMem, kernel_root: u64, _: usize) {
        self.order.start(memory, kernel_root);
        self.reset();
    }
    fn reset(&mut self) {
        self.held.clear();
        self.known.clear();
        self.order.reset();
    }
    fn follows(&self) -> Kinds {
        Self::FOLLOWS
    }
    #[inline(always)]
    fn take(&mut self, kind: EventKind, seen: &Seen, found: &mut Vec<Violation>) {
        let [word, class, third, ..] = seen.event.args;
        let class = LockClass::from_u64(class);
        match (kind, class) {
            (EventKind::LockAcquire, Some(class)) => self.acquired(seen, word, class, found),
            (EventKind::LockRelease, Some(class)) => self.released(seen, word, class, found),
            (EventKind::SyscallExit, _) => self.over(seen, |_| true, found),
            // A call that copies may fault under the locks of its file.
            (EventKind::FaultExit, _) => self.over(seen, |class| !is_of_file(class), found),
            (EventKind::Switch, _) => self.switched(seen, found),
            (EventKind::MmCreate, _) => self.order.mm_created(third),
            (EventKind::FrameAlloc, _) => self.order.frame_allocated(word, third),
            _ => {}
        }
    }
    fn compare(&mut self, _: &dyn PhysMem, _: u64, _: &mut Vec<Violation>) {}
}

fn holder(seen: &Seen, class: LockClass) -> Holder {
    if class.is_of_task() {
        Holder::Task(seen.event.task)
    } else {
        Holder::Cpu(seen.vcpu)
    }
}

/// True where a lock was only tried: who does not wait for it closes no cycle (Linux's lockdep, the trylock argument of
/// lock_acquire).
fn was_tried(event: &Event) -> bool {
    event.args[2] != 0
}

/// The VMA whose lock is at `word`.
pub(super) fn vma_of(word: u64) -> u64 {
    word.wrapping_sub(offset_of!(Vma, refs) as u64)
}

/// True for the number of a class that a mmap_lock is held by.
pub(super) fn is_mmap_lock(class: u64) -> bool {
    use LockClass::{MmapRead, MmapWrite};
    class == MmapRead as u64 || class == MmapWrite as u64
}

/// Locks under which VMAs stay: of all of an mm, or of one.
pub(super) const KEEP_VMAS: &[LockClass] = &[
    LockClass::MmapRead,
    LockClass::MmapWrite,
    LockClass::VmaRead,
];

/// True for the number of one of [`KEEP_VMAS`].
pub(super) fn keeps_vmas(class: u64) -> bool {
    KEEP_VMAS.iter().any(|keeps| *keeps as u64 == class)
}

/// Where the mmap_lock of the mm at `mm` is.
pub(super) fn mmap_lock(mm: u64) -> u64 {
    mm.wrapping_add(offset_of!(Mm, mmap_lock) as u64)
}

fn finding(seen: &Seen, title: &str, class: LockClass, word: u64) -> Finding {
    Finding::new(title)
        .object(class.name(), word)
        .vcpu(seen.vcpu)
        .detail(format!("by task {} on vCPU {}", seen.event.task, seen.vcpu))
}

fn violation(id: &'static str, finding: Finding) -> Violation {
    super::violation(INVARIANTS, id, finding)
}

#[cfg(test)]
mod tests {
    use abi::channel::Event;
    use proptest::prelude::*;

    use super::*;
    use EventKind::{LockAcquire, LockRelease, Switch, SyscallExit};
    use LockClass::{
        AnonVma, Buddy, Folio, IMmap, Inode, MmapRead, MmapWrite, PageTable, Position, Sched,
    };

    fn seen(vcpu: usize, task: u32, kind: EventKind, word: u64, class: u64) -> Seen {
        let event = Event {
            kind: kind as u32,
            task,
            args: [word, class, 0, 0, 0],
            ..Event::default()
        };
        Seen { vcpu, event }
    }

    /// IDs of what steps (vCPU, task, kind, lock, class) violate.
    fn ids(steps: &[(usize, u32, EventKind, u64, LockClass)]) -> Vec<&'static str> {
        let mut locks = Locks::default();
        let mut found = Vec::new();
        for &(vcpu, task, kind, word, class) in steps {
            locks.observe(&seen(vcpu, task, kind, word, class as u64), &mut found);
        }
        found.iter().map(|violation| violation.id).collect()
    }

    #[test]
    fn the_documented_order_is_no_violation() {
        let steps = [
            (0, 1, LockAcquire, 9, Position),
            (0, 1, LockAcquire, 10, Inode),
            (0, 1, LockAcquire, 1, MmapWrite),
            (0, 1, LockAcquire, 2, MmapWrite),
            (0, 1, LockAcquire, 7, Folio),
            (0, 1, LockAcquire, 8, IMmap),
            (0, 1, LockAcquire, 3, AnonVma),
            (0, 1, LockAcquire, 4, PageTable),
            (0, 1, LockAcquire, 5, PageTable),
            (0, 1, LockAcquire, 6, Buddy),
        ];
        assert_eq!(ids(&steps), [""; 0]);
    }

    #[test]
    fn a_lock_out_of_order_is_k_01() {
        let upside_down = [
            (0, 1, LockAcquire, 4, PageTable),
            (0, 1, LockAcquire, 1, MmapRead),
        ];
        assert_eq!(ids(&upside_down), ["K-01"]);
        let folio_first = [(0, 1, LockAcquire, 4, IMmap), (0, 1, LockAcquire, 5, Folio)];
        assert_eq!(ids(&folio_first), ["K-01"]);
        let two_leaves = [(0, 1, LockAcquire, 4, Sched), (0, 1, LockAcquire, 5, Buddy)];
        assert_eq!(ids(&two_leaves), ["K-01"]);
    }

    #[test]
    fn a_lock_that_was_only_tried_has_no_order() {
        let mut locks = Locks::default();
        let mut found = Vec::new();
        let mut take = |word, class: LockClass, tried| {
            let mut seen = seen(0, 1, LockAcquire, word, class as u64);
            seen.event.args[2] = tried;
            locks.observe(&seen, &mut found);
            found.len()
        };
        take(3, AnonVma, 0);
        assert_eq!(take(7, Folio, 1), 0);
        // Held it is all the same.
        assert_eq!(take(8, MmapRead, 0), 1);
    }

    #[test]
    fn two_holders_and_strange_releases_are_k_02() {
        let twice = [
            (0, 1, LockAcquire, 1, MmapWrite),
            (1, 2, LockAcquire, 1, MmapRead),
        ];
        assert_eq!(ids(&twice), ["K-02"]);
        let readers = [
            (0, 1, LockAcquire, 1, MmapRead),
            (1, 2, LockAcquire, 1, MmapRead),
        ];
        assert_eq!(ids(&readers), [""; 0]);
        let stranger = [(0, 1, LockAcquire, 1, Buddy), (1, 2, LockRelease, 1, Buddy)];
        assert_eq!(ids(&stranger), ["K-02"]);
        let from_before = [(1, 2, LockRelease, 1, Buddy)];
        assert_eq!(ids(&from_before), [""; 0]);
    }

    #[test]
    fn the_schedulers_lock_goes_with_its_cpu_to_the_next_task() {
        let switch = [(0, 1, LockAcquire, 1, Sched), (0, 2, LockRelease, 1, Sched)];
        assert_eq!(ids(&switch), [""; 0]);
    }

    #[test]
    fn a_sleep_under_a_spin_lock_is_k_05() {
        let switch = |class| {
            [
                (0, 1, LockAcquire, 1, class),
                (0, 1, Switch, 1, class),
                (1, 1, LockRelease, 1, class),
            ]
        };
        assert_eq!(ids(&switch(PageTable)[..2]), ["K-05"]);
        // Those of a task go with it, wherever it runs then.
        for class in [Position, Inode, MmapRead, MmapWrite] {
            assert_eq!(ids(&switch(class)), [""; 0], "{class:?}");
        }
        assert_eq!(ids(&switch(Sched)[..2]), [""; 0]);
        let elsewhere = [
            (1, 2, LockAcquire, 1, PageTable),
            (0, 1, Switch, 1, PageTable),
        ];
        assert_eq!(ids(&elsewhere), [""; 0]);
    }

    #[test]
    fn a_fault_in_a_copy_may_have_the_locks_of_a_file_around_it() {
        let fault = |class| {
            [
                (0, 1, LockAcquire, 1, class),
                (0, 1, EventKind::FaultExit, 0, class),
            ]
        };
        for class in [Position, Inode] {
            assert_eq!(ids(&fault(class)), [""; 0], "{class:?}");
        }
        assert_eq!(ids(&fault(MmapRead)), ["K-03"]);
        let kept = [(0, 1, LockAcquire, 1, Inode), (0, 1, SyscallExit, 0, Inode)];
        assert_eq!(ids(&kept), ["K-03"]);
    }

    #[test]
    fn a_lock_that_is_kept_is_k_03() {
        let kept = [
            (0, 1, LockAcquire, 1, MmapRead),
            (0, 1, SyscallExit, 0, MmapRead),
        ];
        assert_eq!(ids(&kept), ["K-03"]);
        let others = [
            (0, 1, LockAcquire, 1, MmapRead),
            (1, 2, SyscallExit, 0, MmapRead),
        ];
        assert_eq!(ids(&others), [""; 0]);
    }

    proptest! {
        #[test]
        fn garbage_neither_panics_nor_hangs(
            events in prop::collection::vec((0usize..3, 0u32..3, 0u32..60, any::<[u64; 5]>()), 0..200),
        ) {
            let mut locks = Locks::default();
            let mut found = Vec::new();
            for (vcpu, task, kind, args) in events {
                let event = Event { kind, task, args, ..Event::default() };
                locks.observe(&Seen { vcpu, event }, &mut found);
            }
        }
    }
}
