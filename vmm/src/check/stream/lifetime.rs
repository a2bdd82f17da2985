//! Lifetime of VMAs and mms on the stream (family O): nothing is used after it is gone.
//!
//! Objects come from type-stable slabs, so a use after free reads a recycled object and nothing crashes:
//! no single state shows it.

use abi::channel::{EventKind, Walker};
use abi::pte::Pte;

use super::locks::KEEP_VMAS;
use super::{Kinds, Monitor, Rule, Seen};
use crate::check::{Finding, Violation};
use crate::map::{Map, Set};
use crate::memory::PhysMem;

/// IDs and predicates.
pub const INVARIANTS: &[Rule] = &[
    (
        USED,
        "a VMA is used by a fault only while it is linked in its mm, and as what it was found",
    ),
    (
        LINKED,
        "a VMA is linked in once, taken out once, and freed only after it was taken out",
    ),
    (MM_USED, "nothing is done to an mm after it was freed"),
    (
        MM_COUNT,
        "an mm's count and users never rise from 0, and it is freed with both 0",
    ),
    (
        IN_USE,
        "a VMA is neither taken out nor freed by others while a fault uses it",
    ),
    (
        UNCOUNTED,
        "an mm is loaded only while it is counted, and gets entries only while it has users, but for what a walk back from a folio puts back",
    ),
];

const USED: &str = "O-01";
const LINKED: &str = "O-02";
const MM_USED: &str = "O-03";
const MM_COUNT: &str = "O-04";
const IN_USE: &str = "O-05";
const UNCOUNTED: &str = "O-06";

/// A VMA whose history is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vma {
    Allocated,
    Attached(u64),
    Detached,
    Freed,
}

/// Who uses a VMA.
#[derive(Clone, Copy, Debug)]
struct User {
    task: u32,
    vma: u64,
    /// The class of the lock that keeps it.
    lock: u64,
    walks: bool,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Lifetime {
    vmas: Map<Vma>,
    freed_mms: Set,
    /// By mm: the last value of its count, and of its users.
    counts: Map<u64>,
    users: Map<u64>,
    /// By VMA: its generation since it was allocated or freed last.
    generations: Map<u64>,
    /// Who uses which VMA.
    in_use: Vec<User>,
    /// Tasks that walk back from a folio, and the mms that they have come to.
    walking_back: Vec<(u32, u64)>,
}

impl Lifetime {
    fn vma(&mut self, seen: &Seen, gpa: u64, next: Vma, found: &mut Vec<Violation>) {
        let before = self.vmas.insert(gpa, next);
        if matches!(next, Vma::Detached | Vma::Freed) {
            self.taken(seen, gpa, found);
        }
        let right = match (before, next) {
            // From before the stream began.
            (None, _) => true,
            (Some(before), Vma::Allocated) => before == Vma::Freed,
            (Some(before), Vma::Attached(_)) => before == Vma::Allocated,
            (Some(before), Vma::Detached) => matches!(before, Vma::Attached(_)),
            (Some(before), Vma::Freed) => matches!(before, Vma::Detached | Vma::Allocated),
        };
        if !right {
            let finding = Finding::new(format!("a VMA becomes {next:?} that was {before:?}"))
                .object("VMA", gpa)
                .vcpu(seen.vcpu);
            found.push(violation(LINKED, finding));
        }
    }

    fn counted(&mut self, seen: &Seen, kind: EventKind, found: &mut Vec<Violation>) {
        let [mm, new, ..] = seen.event.args;
        let counts = if kind == EventKind::MmUsers {
            &mut self.users
        } else {
            &mut self.counts
        };
        if counts.insert(mm, new) == Some(0) && new > 0 {
            let finding = Finding::new(format!("{} of mm {mm} rises from 0", kind.name()))
                .found(new.to_string())
                .mm(mm)
                .vcpu(seen.vcpu);
            found.push(violation(MM_COUNT, finding));
        }
    }

    fn mm_freed(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let mm = seen.event.args[0];
        self.freed_mms.insert(mm, ());
        let counts = [
            (EventKind::MmCount, &mut self.counts),
            (EventKind::MmUsers, &mut self.users),
        ];
        for (kind, counts) in counts {
            let left = counts.remove(mm).unwrap_or(0);
            if left > 0 {
                let title = format!("mm {mm} is freed with {left} left of its {}", kind.name());
                let finding = Finding::new(title).mm(mm).vcpu(seen.vcpu);
                found.push(violation(MM_COUNT, finding));
            }
        }
    }

    /// A VMA that goes must be nobody's.
    fn taken(&self, seen: &Seen, gpa: u64, found: &mut Vec<Violation>) {
        let me = seen.event.task;
        let user = self
            .in_use
            .iter()
            .find(|user| user.task != me && user.vma == gpa);
        if let Some(User { task, .. }) = user {
            let finding = Finding::new(format!("a VMA goes while a fault of task {task} uses it"))
                .expected("nobody who uses it")
                .found(format!("task {me} takes it out"))
                .object("VMA", gpa)
                .vcpu(seen.vcpu);
            found.push(violation(IN_USE, finding));
        }
    }

    /// When a fault has done with its VMA: it has walked, or dropped the lock under which it was found.
    fn using(&mut self, seen: &Seen, kind: EventKind) {
        let me = seen.event.task;
        let Some(at) = self.in_use.iter().position(|user| user.task == me) else {
            return;
        };
        let fault = seen.event.args[2] == Walker::Fault as u64;
        let over = match kind {
            EventKind::WalkBegin if fault => {
                self.in_use[at].walks = true;
                false
            }
            EventKind::WalkEnd => fault,
            EventKind::LockRelease => {
                seen.event.args[1] == self.in_use[at].lock && !self.in_use[at].walks
            }
            EventKind::FaultExit | EventKind::SyscallExit => true,
            _ => false,
        };
        if over {
            self.in_use.swap_remove(at);
        }
    }

    /// A walk back begins or ends.
    fn walk(&mut self, seen: &Seen, kind: EventKind) {
        let [mm, _, walker, ..] = seen.event.args;
        if walker != Walker::Rmap as u64 {
            return;
        }
        let me = seen.event.task;
        self.walking_back.retain(|(task, _)| *task != me);
        if kind == EventKind::WalkBegin {
            self.walking_back.push((me, mm));
        }
    }

    fn walks_back(&self, seen: &Seen, mm: u64) -> bool {
        self.walking_back.contains(&(seen.event.task, mm))
    }

    fn uncounted(&self, seen: &Seen, kind: EventKind, found: &mut Vec<Violation>) {
        let [a, b, _, _, new] = seen.event.args;
        let (mm, count, does) = match kind {
            EventKind::Cr3Load => (b, EventKind::MmCount, "is loaded"),
            EventKind::VmaAttach => (a, EventKind::MmUsers, "gets a VMA"),
            // Migration and reclaim come by the folio, to an mm that nobody uses any more too, until its VMAs are unlinked
            // (Linux's exit_mmap): the end of the mm removes what they put back.
            EventKind::PteChange if Pte(new).is_present() && !self.walks_back(seen, a) => {
                (a, EventKind::MmUsers, "gets an entry")
            }
            _ => return,
        };
        let counts = if count == EventKind::MmUsers {
            &self.users
        } else {
            &self.counts
        };
        if counts.get(mm) == Some(&0) {
            let title = format!("mm {mm} {does} and its {} is 0", count.name());
            let finding = Finding::new(title).mm(mm).vcpu(seen.vcpu);
            found.push(violation(
                UNCOUNTED,
                finding.expected("at least 1").found("0"),
            ));
        }
    }

    fn used(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [mm, gpa, gva, generation, lock] = seen.event.args;
        let task = seen.event.task;
        self.in_use.retain(|user| user.task != task);
        self.in_use.push(User {
            task,
            vma: gpa,
            lock,
            walks: false,
        });
        match self.vmas.get(gpa) {
            None => {}
            Some(Vma::Attached(owner))
                if *owner == mm && self.generations.get(gpa) == Some(&generation) => {}
            Some(state) => {
                let finding = Finding::new(format!(
                    "task {} uses a VMA for {gva:#x} that is not linked in its mm",
                    seen.event.task
                ))
                .expected(format!("linked in mm {mm}"))
                .found(format!("{state:?}, found as generation {generation}"))
                .object("VMA", gpa)
                .mm(mm)
                .gva(gva)
                .vcpu(seen.vcpu);
                found.push(violation(USED, finding));
            }
        }
    }
}

impl Lifetime {
    pub(super) const FOLLOWS: Kinds = Kinds::of(&[
        EventKind::Cr3Load,
        EventKind::PteChange,
        EventKind::TlbGen,
        EventKind::CpumaskSet,
        EventKind::VmaAttach,
        EventKind::VmaFound,
        EventKind::ShootdownBegin,
        EventKind::VmaAlloc,
        EventKind::VmaFree,
        EventKind::VmaDetach,
        EventKind::MmFree,
        EventKind::MmCount,
        EventKind::MmUsers,
        EventKind::WalkBegin,
        EventKind::WalkEnd,
        EventKind::LockRelease,
        EventKind::FaultExit,
        EventKind::SyscallExit,
    ])
    .of_locks(KEEP_VMAS);
}

impl Monitor for Lifetime {
    fn fork(&self) -> Box<dyn Monitor> {
        Box::new(self.clone())
    }
    fn start(&mut self, _: &dyn PhysMem, _: u64, _: usize) {
        self.reset();
    }
    fn reset(&mut self) {
        self.vmas.clear();
        self.freed_mms.clear();
        self.counts.clear();
        self.users.clear();
        self.generations.clear();
        self.in_use.clear();
        self.walking_back.clear();
    }
    fn follows(&self) -> Kinds {
        Self::FOLLOWS
    }
    #[inline(always)]
    fn take(&mut self, kind: EventKind, seen: &Seen, found: &mut Vec<Violation>) {
        let args = seen.event.args;
        let mm = match kind {
            EventKind::Cr3Load => args[1],
            EventKind::PteChange
            | EventKind::TlbGen
            | EventKind::CpumaskSet
            | EventKind::VmaAttach
            | EventKind::VmaFound
            | EventKind::ShootdownBegin => args[0],
            _ => 0,
        };
        if mm != 0 && !self.freed_mms.is_empty() && self.freed_mms.contains(mm) {
            let title = format!("{} of mm {mm}, which was freed", kind.name());
            let finding = Finding::new(title).mm(mm).vcpu(seen.vcpu);
            found.push(violation(MM_USED, finding));
        }
        self.uncounted(seen, kind, found);
        if let EventKind::VmaAlloc | EventKind::VmaFree = kind {
            self.generations.insert(args[0], args[1]);
        }
        if let EventKind::WalkBegin | EventKind::WalkEnd = kind {
            self.walk(seen, kind);
        }
        match kind {
            EventKind::VmaAlloc => self.vma(seen, args[0], Vma::Allocated, found),
            EventKind::VmaFree => self.vma(seen, args[0], Vma::Freed, found),
            EventKind::VmaAttach => self.vma(seen, args[1], Vma::Attached(args[0]), found),
            EventKind::VmaDetach => self.vma(seen, args[1], Vma::Detached, found),
            EventKind::VmaFound => self.used(seen, found),
            EventKind::MmFree => self.mm_freed(seen, found),
            EventKind::MmCount | EventKind::MmUsers => self.counted(seen, kind, found),
            EventKind::WalkBegin
            | EventKind::WalkEnd
            | EventKind::LockRelease
            | EventKind::FaultExit
            | EventKind::SyscallExit => self.using(seen, kind),
            _ => {}
        }
    }
    fn compare(&mut self, _: &dyn PhysMem, _: u64, _: &mut Vec<Violation>) {}
}

fn violation(id: &'static str, finding: Finding) -> Violation {
    super::violation(INVARIANTS, id, finding)
}

#[cfg(test)]
mod tests {
    use abi::channel::Event;
    use abi::lock::LockClass;

    use super::*;
    use EventKind::{Cr3Load, MmFree, VmaAlloc, VmaAttach, VmaDetach, VmaFound, VmaFree};

    fn ids(steps: &[(EventKind, [u64; 3])]) -> Vec<&'static str> {
        let wide = |&(kind, [a, b, c]): &(EventKind, [u64; 3])| {
            // Every VMA is found as its first self.
            let generation = u64::from(kind == VmaFound);
            (0, kind, [a, b, c, generation, 0])
        };
        ids_of(&steps.iter().map(wide).collect::<Vec<_>>())
    }

    fn ids_of(steps: &[(u32, EventKind, [u64; 5])]) -> Vec<&'static str> {
        let mut lifetime = Lifetime::default();
        let mut found = Vec::new();
        for &(task, kind, args) in steps {
            let event = Event {
                kind: kind as u32,
                task,
                args,
                ..Event::default()
            };
            lifetime.observe(&Seen { vcpu: 0, event }, &mut found);
        }
        found.iter().map(|violation| violation.id).collect()
    }

    const ALLOC: (EventKind, [u64; 3]) = (VmaAlloc, [8, 1, 0]);
    const ATTACH: (EventKind, [u64; 3]) = (VmaAttach, [1, 8, 0]);
    const DETACH: (EventKind, [u64; 3]) = (VmaDetach, [1, 8, 0]);
    const FREE: (EventKind, [u64; 3]) = (VmaFree, [8, 2, 0]);
    const FOUND: (EventKind, [u64; 3]) = (VmaFound, [1, 8, 0x1000]);

    #[test]
    fn a_whole_life_and_a_second_one_are_no_violation() {
        let life = [ALLOC, ATTACH, FOUND, DETACH, FREE];
        assert_eq!(ids(&[life, life].concat()), [""; 0]);
        assert_eq!(
            ids(&[ALLOC, FREE]),
            [""; 0],
            "an allocation that was not needed"
        );
        assert_eq!(ids(&[FOUND, DETACH]), [""; 0], "from before the stream");
    }

    #[test]
    fn a_vma_used_after_it_was_taken_out_or_recycled_is_o_01() {
        assert_eq!(ids(&[ALLOC, ATTACH, DETACH, FOUND]), ["O-01"]);
        let recycled = (VmaAttach, [2, 8, 0]);
        assert_eq!(
            ids(&[ALLOC, ATTACH, DETACH, FREE, ALLOC, recycled, FOUND]),
            ["O-01"]
        );
    }

    #[test]
    fn a_vma_found_as_its_former_self_is_o_01() {
        let alloc = |generation| (1, VmaAlloc, [8, generation, 0, 0, 0]);
        let attach = (1, VmaAttach, [1, 8, 0, 0, 0]);
        let used = |generation| (2, VmaFound, [1, 8, 0x1000, generation, 0]);
        assert_eq!(ids_of(&[alloc(3), attach, used(3)]), [""; 0]);
        assert_eq!(ids_of(&[alloc(3), attach, used(1)]), ["O-01"]);
    }

    #[test]
    fn a_vma_that_goes_while_a_fault_uses_it_is_o_05() {
        let fault = Walker::Fault as u64;
        let mmap = LockClass::MmapRead as u64;
        let used = (2, VmaFound, [1, 8, 0x1000, 1, mmap]);
        let begin = (2, EventKind::WalkBegin, [1, 0x1000, fault, 0, 0]);
        let end = (2, EventKind::WalkEnd, [1, 0x1000, fault, 0, 0]);
        let unlock = (2, EventKind::LockRelease, [4, mmap, 0, 0, 0]);
        let table = (
            2,
            EventKind::LockRelease,
            [4, LockClass::PageTable as u64, 0, 0, 0],
        );
        let detach = |task| (task, VmaDetach, [1, 8, 0, 0, 0]);
        assert_eq!(ids_of(&[used, detach(1)]), ["O-05"]);
        assert_eq!(ids_of(&[used, begin, table, unlock, detach(1)]), ["O-05"]);
        assert_eq!(ids_of(&[used, begin, end, detach(1)]), [""; 0]);
        assert_eq!(ids_of(&[used, unlock, detach(1)]), [""; 0], "refused");
        assert_eq!(ids_of(&[used, begin, detach(2)]), [""; 0], "its own doing");
    }

    #[test]
    fn an_mm_loaded_or_mapped_when_nobody_counts_it_is_o_06() {
        let (count, users) = (EventKind::MmCount, EventKind::MmUsers);
        let load = (1, Cr3Load, [0x1000, 3, 0, 0, 0]);
        let attach = (1, VmaAttach, [3, 8, 0, 0, 0]);
        let map = (1, EventKind::PteChange, [3, 0x1000, 1, 0, 1]);
        let unmap = (1, EventKind::PteChange, [3, 0x1000, 1, 1, 0]);
        let set = |kind, value| (1, kind, [3, value, 0, 0, 0]);
        assert_eq!(
            ids_of(&[set(count, 1), set(users, 1), load, attach, map]),
            [""; 0]
        );
        assert_eq!(ids_of(&[set(count, 0), load]), ["O-06"]);
        assert_eq!(ids_of(&[set(users, 0), attach]), ["O-06"]);
        assert_eq!(ids_of(&[set(users, 0), map]), ["O-06"]);
        assert_eq!(ids_of(&[set(users, 0), unmap]), [""; 0], "the end of an mm");
        let walk = |kind, mm| (1, kind, [mm, 0x1000, Walker::Rmap as u64, 0, 0]);
        let (begin, end) = (EventKind::WalkBegin, EventKind::WalkEnd);
        assert_eq!(ids_of(&[set(users, 0), walk(begin, 3), map]), [""; 0]);
        assert_eq!(ids_of(&[set(users, 0), walk(begin, 4), map]), ["O-06"]);
        let over = [set(users, 0), walk(begin, 3), walk(end, 3), map];
        assert_eq!(ids_of(&over), ["O-06"]);
    }

    #[test]
    fn a_vma_linked_twice_or_freed_while_linked_is_o_02() {
        assert_eq!(ids(&[ALLOC, ATTACH, ATTACH]), ["O-02"]);
        assert_eq!(ids(&[ALLOC, ATTACH, FREE]), ["O-02"]);
        assert_eq!(ids(&[ALLOC, ATTACH, DETACH, DETACH]), ["O-02"]);
    }

    #[test]
    fn a_count_that_rises_from_0_or_is_left_is_o_04() {
        let count = |count| (EventKind::MmCount, [3, count, 0]);
        let users = |users| (EventKind::MmUsers, [3, users, 0]);
        let free = (MmFree, [3, 0, 0]);
        assert_eq!(
            ids(&[count(2), count(1), users(0), count(0), free]),
            [""; 0]
        );
        assert_eq!(ids(&[count(0), count(1)]), ["O-04"]);
        assert_eq!(ids(&[users(0), users(1)]), ["O-04"]);
        assert_eq!(ids(&[users(1), count(0), free]), ["O-04"]);
    }

    #[test]
    fn an_mm_used_after_it_was_freed_is_o_03() {
        let load = (Cr3Load, [0x1000, 3, 0]);
        assert_eq!(ids(&[load, (MmFree, [3, 0, 0])]), [""; 0]);
        assert_eq!(ids(&[(MmFree, [3, 0, 0]), load]), ["O-03"]);
    }
}
