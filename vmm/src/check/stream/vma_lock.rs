//! Locks of single VMAs on the stream (family N): who may read one, who may change it, and who has to have it.
//!
//! A fault holds one VMA for reading; a writer has the mmap_lock and has locked each VMA that it changes, until it lets
//! go of the mmap_lock (`guest-kernel/src/mm/vma_lock.rs`). A VMA that was locked for writing is told by its exclusion of
//! readers ([`LockClass::VmaWrite`]), one that is new by being linked in.

use std::collections::BTreeMap;
use std::mem::offset_of;

use abi::channel::{EventKind, Walker};
use abi::lock::LockClass;
use abi::objects::{Mm, VMA_NODE_SLOTS, Vma, VmaNode, VmaSlot};

use super::locks::{mmap_lock, vma_of};
use super::words::{Word as _, mms};
use super::{Kinds, Monitor, Rule, Seen};
use crate::check::{Finding, Violation};
use crate::map::{Map, Set};
use crate::memory::PhysMem;

/// IDs and predicates.
pub const INVARIANTS: &[Rule] = &[
    (
        APART,
        "nobody holds a VMA for reading while somebody has locked it for writing",
    ),
    (
        UNLOCKED,
        "a VMA is changed or taken out only by who has locked it for writing",
    ),
    (
        ELSEWHERE,
        "a fault that holds a VMA holds one of its own mm that contains the address",
    ),
    (
        BEHIND,
        "who unmaps, protects, copies or moves entries under the mmap_lock held for writing has locked the VMA around them",
    ),
];

const APART: &str = "N-01";
const UNLOCKED: &str = "N-02";
const ELSEWHERE: &str = "N-03";
const BEHIND: &str = "N-04";

/// Most nodes of trees that are read at the start.
const MAX_NODES: usize = 1 << 17;

/// A VMA that is linked in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    mm: u64,
    start: u64,
    end: u64,
    /// The task that has locked it for writing.
    writer: Option<u32>,
}

/// What is linked in.
#[derive(Clone, Debug, Default)]
struct Vmas {
    by_object: Map<Known>,
    /// By mm and start.
    by_place: BTreeMap<(u64, u64), u64>,
}

impl Vmas {
    fn insert(&mut self, vma: u64, known: Known) {
        self.remove(vma);
        self.by_place.insert((known.mm, known.start), vma);
        self.by_object.insert(vma, known);
    }

    fn remove(&mut self, vma: u64) -> Option<Known> {
        let known = self.by_object.remove(vma)?;
        let place = (known.mm, known.start);
        // One that has grown over it is there already.
        if self.by_place.get(&place) == Some(&vma) {
            self.by_place.remove(&place);
        }
        Some(known)
    }

    /// The one that holds `gva`.
    fn at(&self, mm: u64, gva: u64) -> Option<(u64, Known)> {
        let (_, vma) = self.by_place.range((mm, 0)..=(mm, gva)).next_back()?;
        let known = *self.by_object.get(*vma)?;
        (gva < known.end).then_some((*vma, known))
    }
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct VmaLocks {
    vmas: Vmas,
    /// Those of the start.
    first: Vmas,
    /// Those that somebody has locked for writing.
    written: Vec<u64>,
    /// Tasks, and the VMAs that they hold for reading.
    readers: Vec<(u32, u64)>,
    /// Tasks, and the mmap_locks that they hold for writing.
    writers: Vec<(u32, u64)>,
    /// By number: where each mm's mmap_lock is.
    locks: Map<u64>,
    first_locks: Map<u64>,
}

impl VmaLocks {
    fn acquired(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [word, class, ..] = seen.event.args;
        let (me, vma) = (seen.event.task, vma_of(word));
        match LockClass::from_u64(class) {
            Some(LockClass::MmapWrite) => self.writers.push((me, word)),
            Some(LockClass::VmaRead) => {
                if let Some(writer) = self.vmas.by_object.get(vma).and_then(|known| known.writer) {
                    let title = "a fault gets a VMA that is locked for writing";
                    let finding = finding(seen, title, vma).found(format!("by task {writer}"));
                    found.push(violation(APART, finding));
                }
                self.readers.push((me, vma));
            }
            Some(LockClass::VmaWrite) => {
                if let Some((reader, _)) = self.readers.iter().find(|(_, held)| *held == vma) {
                    let title = "a VMA is locked for writing that a fault holds";
                    let finding = finding(seen, title, vma).found(format!("task {reader}"));
                    found.push(violation(APART, finding));
                }
                if let Some(known) = self.vmas.by_object.get_mut(vma) {
                    known.writer = Some(me);
                    self.written.push(vma);
                }
            }
            _ => {}
        }
    }

    fn released(&mut self, seen: &Seen) {
        let [word, class, ..] = seen.event.args;
        let me = seen.event.task;
        match LockClass::from_u64(class) {
            Some(LockClass::MmapWrite) => {
                self.writers.retain(|held| *held != (me, word));
                let (locks, vmas) = (&self.locks, &mut self.vmas.by_object);
                self.written.retain(|vma| {
                    let Some(known) = vmas.get_mut(*vma) else {
                        return false;
                    };
                    if known.writer == Some(me) && locks.get(known.mm) == Some(&word) {
                        known.writer = None;
                    }
                    known.writer.is_some()
                });
            }
            Some(LockClass::VmaRead) => {
                let mine = (me, vma_of(word));
                if let Some(at) = self.readers.iter().position(|held| *held == mine) {
                    self.readers.swap_remove(at);
                }
            }
            _ => {}
        }
    }

    /// `vma` becomes another one, or goes.
    fn changed(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [mm, vma, start, end, _] = seen.event.args;
        let me = seen.event.task;
        let is_gone = seen.event.kind == EventKind::VmaDetach as u32;
        // One that is not linked in yet is its maker's alone.
        let Some(known) = self.vmas.remove(vma) else {
            return;
        };
        let writer = known.writer;
        if !is_gone {
            self.vmas.insert(
                vma,
                Known {
                    start,
                    end,
                    ..known
                },
            );
        }
        if writer != Some(me) {
            let does = if is_gone { "taken out" } else { "changed" };
            let title = format!("a VMA is {does} that is not locked for writing");
            let finding = finding(seen, title, vma)
                .expected(format!("locked by task {me}"))
                .found(writer.map_or("by nobody".into(), |task| format!("by task {task}")))
                .mm(mm)
                .gva(start);
            found.push(violation(UNLOCKED, finding));
        }
    }

    fn found(&self, seen: &Seen, found: &mut Vec<Violation>) {
        let [mm, vma, gva, _, lock] = seen.event.args;
        let Some(known) = self.vmas.by_object.get(vma) else {
            return; // O-01's.
        };
        if lock == LockClass::VmaRead as u64
            && (known.mm != mm || !(known.start..known.end).contains(&gva))
        {
            let title = format!("a fault at {gva:#x} of mm {mm} takes another VMA for its own");
            let finding = finding(seen, title, vma)
                .expected(format!("a VMA of mm {mm} around {gva:#x}"))
                .found(format!(
                    "{:#x}..{:#x} of mm {}",
                    known.start, known.end, known.mm
                ))
                .mm(mm)
                .gva(gva);
            found.push(violation(ELSEWHERE, finding));
        }
    }

    /// A walk begins that changes what it finds.
    fn walk(&self, seen: &Seen, found: &mut Vec<Violation>) {
        let [mm, gva, walker, ..] = seen.event.args;
        let me = seen.event.task;
        let changes = matches!(
            Walker::from_u64(walker),
            Some(Walker::Unmap | Walker::Protect | Walker::Fork | Walker::Move)
        );
        let lock = self.locks.get(mm).copied().unwrap_or(0);
        if !changes || !self.writers.contains(&(me, lock)) {
            return;
        }
        // Where none is, it was taken out before.
        if let Some((vma, known)) = self.vmas.at(mm, gva)
            && known.writer != Some(me)
        {
            let finding = finding(seen, "entries are changed in a VMA that is not locked", vma)
                .expected(format!("locked for writing by task {me}"))
                .found("a fault may be in it")
                .mm(mm)
                .gva(gva);
            found.push(violation(BEHIND, finding));
        }
    }
}

impl VmaLocks {
    pub(super) const FOLLOWS: Kinds = Kinds::of(&[
        EventKind::LockAcquire,
        EventKind::LockRelease,
        EventKind::VmaAttach,
        EventKind::VmaChange,
        EventKind::VmaDetach,
        EventKind::VmaFound,
        EventKind::WalkBegin,
        EventKind::MmCreate,
        EventKind::MmFree,
    ])
    .of_locks(&[
        LockClass::MmapWrite,
        LockClass::VmaRead,
        LockClass::VmaWrite,
    ]);
}

impl Monitor for VmaLocks {
    fn fork(&self) -> Box<dyn Monitor> {
        Box::new(self.clone())
    }
    fn start(&mut self, memory: &dyn PhysMem, kernel_root: u64, _: usize) {
        self.first = Vmas::default();
        self.first_locks.clear();
        let mut nodes = Set::default();
        for mm in mms(memory, kernel_root) {
            let id = memory.field(mm, offset_of!(Mm, id));
            self.first_locks.insert(id, mmap_lock(mm));
            read(memory, (mm, id), &mut nodes, &mut self.first);
        }
        self.reset();
    }
    fn reset(&mut self) {
        self.vmas.clone_from(&self.first);
        self.locks.clone_from(&self.first_locks);
        self.written.clear();
        self.readers.clear();
        self.writers.clear();
    }
    fn follows(&self) -> Kinds {
        Self::FOLLOWS
    }
    #[inline(always)]
    fn take(&mut self, kind: EventKind, seen: &Seen, found: &mut Vec<Violation>) {
        let [a, b, c, d, _] = seen.event.args;
        match kind {
            EventKind::LockAcquire => self.acquired(seen, found),
            EventKind::LockRelease => self.released(seen),
            EventKind::VmaAttach => {
                let known = Known {
                    mm: a,
                    start: c,
                    end: d,
                    writer: Some(seen.event.task),
                };
                self.vmas.insert(b, known);
                self.written.push(b);
            }
            EventKind::VmaChange | EventKind::VmaDetach => self.changed(seen, found),
            EventKind::VmaFound => self.found(seen, found),
            EventKind::WalkBegin => self.walk(seen, found),
            EventKind::MmCreate => drop(self.locks.insert(a, mmap_lock(c))),
            EventKind::MmFree => drop(self.locks.remove(a)),
            _ => {}
        }
    }
    fn compare(&mut self, _: &dyn PhysMem, _: u64, _: &mut Vec<Violation>) {}
}

/// The VMAs of the tree of the mm at `mm`, which nobody is changing. `seen`: nodes that were read, of all mms. A guest may have
/// tied trees into loops, and into each other.
fn read(memory: &dyn PhysMem, (mm, id): (u64, u64), seen: &mut Set, vmas: &mut Vmas) {
    let mut nodes = vec![memory.field(mm, offset_of!(Mm, vmas))];
    while let Some(node) = nodes.pop() {
        if node == 0 || seen.len() == MAX_NODES || seen.insert(node, ()).is_some() {
            continue;
        }
        let used = memory.half(node, offset_of!(VmaNode, count)) as usize;
        let is_leaf = memory.half(node, offset_of!(VmaNode, level)) == 0;
        for slot in 0..used.min(VMA_NODE_SLOTS) {
            let slot = offset_of!(VmaNode, slots) + slot * size_of::<VmaSlot>();
            let child = memory.field(node, slot + offset_of!(VmaSlot, child));
            if !is_leaf {
                nodes.push(child);
                continue;
            }
            let known = Known {
                mm: id,
                start: memory.field(child, offset_of!(Vma, start)),
                end: memory.field(child, offset_of!(Vma, end)),
                writer: None,
            };
            vmas.insert(child, known);
        }
    }
}

fn finding(seen: &Seen, title: impl Into<String>, vma: u64) -> Finding {
    Finding::new(title)
        .object("VMA", vma)
        .vcpu(seen.vcpu)
        .detail(format!("by task {} on vCPU {}", seen.event.task, seen.vcpu))
}

fn violation(id: &'static str, finding: Finding) -> Violation {
    super::violation(INVARIANTS, id, finding)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;
    use std::sync::atomic::Ordering::Relaxed;

    use abi::channel::Event;
    use abi::layout::ENTRIES_PER_TABLE;
    use abi::objects::KernelRoot;
    use proptest::prelude::*;

    use super::*;
    use crate::inspect::MemoryImage;
    use crate::memory::OutOfRange;
    use EventKind::{LockAcquire, LockRelease, VmaAttach, VmaChange, VmaDetach, VmaFound};

    /// The object of mm 1, and a VMA of its.
    const MM: u64 = 0x1000;
    const VMA: u64 = 0x2000;

    /// Counts who asks for a page.
    struct Counting {
        image: MemoryImage,
        asked: AtomicU64,
    }

    impl PhysMem for Counting {
        fn bytes(&self) -> u64 {
            self.image.bytes()
        }
        fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), OutOfRange> {
            self.image.read(gpa, buf)
        }
        fn table(&self, gpa: u64) -> Result<&[AtomicU64; ENTRIES_PER_TABLE], OutOfRange> {
            self.asked.fetch_add(1, Relaxed);
            self.image.table(gpa)
        }
    }

    /// The list of mms leads back to its first, and a node of its tree has only itself below it.
    #[test]
    fn what_a_guest_has_tied_into_loops_is_read_once() {
        let (root, node) = (0x3000, 0x4000);
        let image = MemoryImage::new(0x5000);
        let write = |gpa: u64, offset: usize, value: u64| {
            let word = image.word(gpa + offset as u64).unwrap();
            word.store(value, Relaxed);
        };
        write(root, offset_of!(KernelRoot, mms), MM);
        write(MM, offset_of!(Mm, next), MM);
        write(MM, offset_of!(Mm, vmas), node);
        let count_and_level = offset_of!(VmaNode, count).min(offset_of!(VmaNode, level));
        write(node, count_and_level, 0x0000_0010_0000_0010);
        for slot in 0..VMA_NODE_SLOTS {
            let slot = offset_of!(VmaNode, slots) + slot * size_of::<VmaSlot>();
            write(node, slot + offset_of!(VmaSlot, child), node);
        }
        let memory = Counting {
            image,
            asked: AtomicU64::new(0),
        };
        let mut locks = VmaLocks::default();
        locks.start(&memory, root, 1);
        let asked = memory.asked.into_inner();
        assert!((20..10_000).contains(&asked), "{asked} reads");
    }

    fn ids(steps: &[(u32, EventKind, [u64; 5])]) -> Vec<&'static str> {
        let mut locks = VmaLocks::default();
        let mut found = Vec::new();
        for &(task, kind, args) in steps {
            let event = Event {
                kind: kind as u32,
                task,
                args,
                ..Event::default()
            };
            locks.observe(&Seen { vcpu: 0, event }, &mut found);
        }
        found.iter().map(|violation| violation.id).collect()
    }

    type Step = (u32, EventKind, [u64; 5]);

    fn lock(task: u32, kind: EventKind, class: LockClass) -> Step {
        let word = match class {
            LockClass::MmapWrite | LockClass::MmapRead => mmap_lock(MM),
            _ => VMA + offset_of!(Vma, refs) as u64,
        };
        (task, kind, [word, class as u64, 0, 1, 0])
    }
    fn take(task: u32, class: LockClass) -> Step {
        lock(task, LockAcquire, class)
    }
    fn drop_it(task: u32, class: LockClass) -> Step {
        lock(task, LockRelease, class)
    }
    const CREATE: Step = (1, EventKind::MmCreate, [1, 0, MM, 0, 0]);
    const ATTACH: Step = (1, VmaAttach, [1, VMA, 0x5000, 0x7000, 3]);

    /// Task 1 has mapped the VMA and let go of all locks.
    fn mapped() -> Vec<Step> {
        use LockClass::MmapWrite;
        vec![CREATE, take(1, MmapWrite), ATTACH, drop_it(1, MmapWrite)]
    }
    fn after_mapped(steps: &[Step]) -> Vec<&'static str> {
        ids(&[&mapped(), steps].concat())
    }
    /// Task 1 locks it for writing.
    fn written() -> [Step; 3] {
        use LockClass::{MmapWrite, VmaWrite};
        [take(1, MmapWrite), take(1, VmaWrite), drop_it(1, VmaWrite)]
    }

    #[test]
    fn a_reader_beside_a_writer_is_n_01() {
        use LockClass::{MmapWrite, VmaRead};
        let read = [take(2, VmaRead), drop_it(2, VmaRead)];
        assert_eq!(after_mapped(&[&read[..], &written()].concat()), [""; 0]);
        let end = [drop_it(1, MmapWrite)];
        assert_eq!(
            after_mapped(&[&written()[..], &end, &read].concat()),
            [""; 0]
        );
        assert_eq!(after_mapped(&[&written()[..], &read].concat()), ["N-01"]);
        assert_eq!(
            after_mapped(&[&read[..1], &written()].concat()),
            ["N-01"],
            "who reads was not waited for"
        );
        assert_eq!(
            ids(&[CREATE, take(1, MmapWrite), ATTACH, take(2, VmaRead)]),
            ["N-01"],
            "a new one before its maker is done"
        );
    }

    #[test]
    fn a_change_without_the_lock_is_n_02() {
        let change = |task| (task, VmaChange, [1, VMA, 0x5000, 0x6000, 3]);
        let detach = (1, VmaDetach, [1, VMA, 0x5000, 0x6000, 0]);
        assert_eq!(
            after_mapped(&[&written()[..], &[change(1), detach]].concat()),
            [""; 0]
        );
        assert_eq!(after_mapped(&[change(1)]), ["N-02"]);
        assert_eq!(after_mapped(&[detach]), ["N-02"]);
        assert_eq!(
            after_mapped(&[&written()[..], &[change(2)]].concat()),
            ["N-02"],
            "another's lock"
        );
        let unknown = (1, VmaChange, [1, VMA + 64, 0, 0, 0]);
        assert_eq!(after_mapped(&[unknown]), [""; 0], "not linked in yet");
    }

    #[test]
    fn another_vma_than_the_fault_s_is_n_03() {
        let read = LockClass::VmaRead as u64;
        let found = |mm, gva, lock| (2, VmaFound, [mm, VMA, gva, 1, lock]);
        assert_eq!(after_mapped(&[found(1, 0x6000, read)]), [""; 0]);
        assert_eq!(after_mapped(&[found(2, 0x6000, read)]), ["N-03"]);
        assert_eq!(after_mapped(&[found(1, 0x7000, read)]), ["N-03"]);
        let below_a_stack = found(1, 0x4000, LockClass::MmapWrite as u64);
        assert_eq!(after_mapped(&[below_a_stack]), [""; 0]);
    }

    #[test]
    fn entries_changed_in_a_vma_that_is_not_locked_are_n_04() {
        use LockClass::{MmapRead, MmapWrite};
        let walk = |gva, walker: Walker| (1, EventKind::WalkBegin, [1, gva, walker as u64, 0, 0]);
        let fork = walk(0x5000, Walker::Fork);
        assert_eq!(after_mapped(&[&written()[..], &[fork]].concat()), [""; 0]);
        assert_eq!(after_mapped(&[take(1, MmapWrite), fork]), ["N-04"]);
        let fault = walk(0x5000, Walker::Fault);
        assert_eq!(after_mapped(&[take(1, MmapWrite), fault]), [""; 0]);
        let beyond = walk(0x7000, Walker::Unmap);
        assert_eq!(after_mapped(&[take(1, MmapWrite), beyond]), [""; 0]);
        let dontneed = walk(0x5000, Walker::Unmap);
        assert_eq!(after_mapped(&[take(1, MmapRead), dontneed]), [""; 0]);
    }

    proptest! {
        #[test]
        fn garbage_neither_panics_nor_hangs(
            events in prop::collection::vec((0u32..3, 0u32..64, any::<[u64; 5]>()), 0..200),
        ) {
            let mut locks = VmaLocks::default();
            let mut found = Vec::new();
            for (task, kind, args) in events {
                let event = Event { kind, task, args, ..Event::default() };
                locks.observe(&Seen { vcpu: 0, event }, &mut found);
            }
        }
    }
}
