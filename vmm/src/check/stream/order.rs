//! The order of locks on the stream (family K too): a graph of who was held when what was taken, with its cycles.
//!
//! K-01 knows the one order that the kernel documents. The graph knows none: it learns the order of classes from a whole
//! campaign and the order of single locks of one class from each schedule, as Linux's lockdep does
//! (Documentation/locking/lockdep-design.rst), and reports who closes a cycle though nobody has waited in it yet. It
//! finds what K-01 lets pass: two mmap_locks, or two page-table locks, taken in both orders.

use std::fmt;
use std::mem::offset_of;

use abi::layout::PAGE_SHIFT;
use abi::lock::LockClass;
use abi::objects::{Folio, FrameKind, KernelRoot};

use super::locks::mmap_lock;
use super::words::Word as _;
use super::{Rule, Seen, violation};
use crate::check::{Finding, Violation};
use crate::memory::PhysMem;

/// IDs and predicates.
pub(super) const INVARIANTS: &[Rule] = &[(
    CYCLE,
    "no cycle in the order in which locks are taken: of classes in a campaign, of single locks in a schedule",
)];

const CYCLE: &str = "K-04";

/// A lock that was taken under another one.
#[derive(Clone, Copy, Debug)]
struct Edge {
    held: (LockClass, u64),
    taken: (LockClass, u64),
    vcpu: usize,
    task: u32,
    schedule: u64,
}

impl fmt::Display for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            held: (held, at),
            taken: (taken, to),
            vcpu,
            task,
            schedule,
        } = self;
        write!(
            f,
            "{} at {at:#x} -> {} at {to:#x}: task {task} on vCPU {vcpu}, schedule {schedule} of this job",
            held.name(),
            taken.name()
        )
    }
}

/// The order in which locks were taken.
#[derive(Clone, Debug, Default)]
pub(super) struct Order {
    /// Between classes; kept from schedule to schedule.
    classes: Vec<Edge>,
    /// By the number of a class, those that were taken under it: each set has a bit for each number of a class.
    under: Vec<u64>,
    /// Between locks of one class; of this schedule.
    locks: Vec<Edge>,
    schedule: u64,
    folios: u64,
}

/// Both ways to take an mmap_lock, or a VMA, are one class.
fn class_of(class: LockClass) -> LockClass {
    match class {
        LockClass::MmapRead => LockClass::MmapWrite,
        LockClass::VmaRead => LockClass::VmaWrite,
        class => class,
    }
}

impl Order {
    pub(super) fn start(&mut self, memory: &dyn PhysMem, kernel_root: u64) {
        *self = Self {
            folios: memory.field(kernel_root, offset_of!(KernelRoot, folios)),
            ..Self::default()
        };
    }

    /// Another schedule.
    pub(super) fn reset(&mut self) {
        self.locks.clear();
        self.schedule += 1;
    }

    /// `taken` is waited for by who has `held`.
    pub(super) fn taken(
        &mut self,
        seen: &Seen,
        held: (LockClass, u64),
        taken: (LockClass, u64),
        found: &mut Vec<Violation>,
    ) {
        let (from, to) = (class_of(held.0), class_of(taken.0));
        let under = self.under.get(from as usize).copied().unwrap_or(0);
        if from != to && under >> to as u64 & 1 != 0 {
            return;
        }
        let edge = Edge {
            held,
            taken,
            vcpu: seen.vcpu,
            task: seen.event.task,
            schedule: self.schedule,
        };
        let closed = if from == to {
            add(&mut self.locks, edge, |(_, word)| word)
        } else {
            let closed = add(&mut self.classes, edge, |(class, _)| class_of(class) as u64);
            if self.under.len() <= from as usize {
                self.under.resize(from as usize + 1, 0);
            }
            self.under[from as usize] |= u64::from(closed.is_none()) << to as u64;
            closed
        };
        if let Some(rest) = closed {
            found.push(violation(INVARIANTS, CYCLE, tell(edge, &rest)));
        }
    }

    /// The mm at `object` is another one from now on, and so is its lock.
    pub(super) fn mm_created(&mut self, object: u64) {
        self.forget(mmap_lock(object));
    }

    /// A frame of `kind`, an argument of an event, is another one from now on.
    pub(super) fn frame_allocated(&mut self, gpa: u64, kind: u64) {
        if !self.locks.is_empty() && has_lock(kind) {
            let index = (gpa >> PAGE_SHIFT).wrapping_mul(size_of::<Folio>() as u64);
            let folio = self.folios.wrapping_add(index);
            self.forget(folio.wrapping_add(offset_of!(Folio, lock) as u64));
        }
    }

    fn forget(&mut self, word: u64) {
        self.locks
            .retain(|edge| edge.held.1 != word && edge.taken.1 != word);
    }
}

/// Adds `edge` to the graph of `edges`. Where that closes a cycle, it is left out, so that the next one who does
/// it is reported too, and the rest of the cycle is returned.
fn add(
    edges: &mut Vec<Edge>,
    edge: Edge,
    node: impl Fn((LockClass, u64)) -> u64,
) -> Option<Vec<Edge>> {
    let (from, to) = (node(edge.held), node(edge.taken));
    let known = |e: &Edge| node(e.held) == from && node(e.taken) == to;
    if edges.iter().any(known) {
        return None;
    }
    // Breadth first from what was taken: `reached` holds each edge that led somewhere new, and the one before.
    let mut reached: Vec<(Edge, Option<usize>)> = Vec::new();
    let mut next = 0;
    let (mut at, mut before) = (to, None);
    loop {
        for candidate in edges.iter().filter(|e| node(e.held) == at) {
            let new = node(candidate.taken);
            if new != to && reached.iter().all(|(e, _)| node(e.taken) != new) {
                reached.push((*candidate, before));
            }
        }
        let Some((last, _)) = reached.get(next) else {
            edges.push(edge);
            return None;
        };
        if node(last.taken) == from {
            let mut path = Vec::new();
            let mut step = Some(next);
            while let Some(index) = step {
                path.push(reached[index].0);
                step = reached[index].1;
            }
            path.reverse();
            return Some(path);
        }
        (at, before) = (node(last.taken), Some(next));
        next += 1;
    }
}

fn tell(edge: Edge, rest: &[Edge]) -> Finding {
    let ((held, _), (taken, word)) = (edge.held, edge.taken);
    Finding::new(format!(
        "the {} taken under the {} closes a cycle of {} locks: whoever takes them at once can wait for ever",
        taken.name(),
        held.name(),
        rest.len() + 1
    ))
    .expected("one order")
    .found("a cycle")
    .object(taken.name(), word)
    .vcpu(edge.vcpu)
    .detail(edge.to_string())
    .details(rest.iter().map(ToString::to_string))
}

/// True where frames of `kind`, an argument of an event, have a lock: tables, and folios of user memory.
fn has_lock(kind: u64) -> bool {
    FrameKind::from_u64(kind).is_some_and(|kind| kind == FrameKind::Table || kind.is_user())
}

#[cfg(test)]
mod tests {
    use abi::channel::{Event, EventKind};
    use abi::objects::Mm;

    use super::super::Monitor as _;
    use super::super::locks::Locks;
    use super::*;
    use EventKind::{LockAcquire as Take, LockRelease as Drop, MmCreate};
    use LockClass::{AnonVma, Buddy, MmapRead, MmapWrite, PageTable};

    type Step = (u32, EventKind, u64, u64);

    fn run(order: &mut Locks, steps: &[Step]) -> Vec<Violation> {
        let mut found = Vec::new();
        for &(task, kind, word, class) in steps {
            // The object of an mm; nothing was only tried.
            let third = if kind == MmCreate { word } else { 0 };
            let event = Event {
                kind: kind as u32,
                task,
                args: [word, class, third, 0, 0],
                ..Event::default()
            };
            let vcpu = task as usize;
            order.observe(&Seen { vcpu, event }, &mut found);
        }
        cycles(found)
    }

    /// Those of `found` that are about the order: what is locked here breaks other rules too.
    fn cycles(mut found: Vec<Violation>) -> Vec<Violation> {
        found.retain(|violation| violation.id == CYCLE);
        found
    }

    /// Takes the first lock, the second under it, and drops both.
    fn nest(task: u32, outer: (u64, LockClass), inner: (u64, LockClass)) -> [Step; 4] {
        [
            (task, Take, outer.0, outer.1 as u64),
            (task, Take, inner.0, inner.1 as u64),
            (task, Drop, inner.0, inner.1 as u64),
            (task, Drop, outer.0, outer.1 as u64),
        ]
    }

    #[test]
    fn classes_in_one_order_are_no_violation() {
        let mut order = Locks::default();
        for task in [1, 2] {
            assert!(run(&mut order, &nest(task, (1, MmapWrite), (2, AnonVma))).is_empty());
            assert!(run(&mut order, &nest(task, (2, AnonVma), (3, PageTable))).is_empty());
            assert!(run(&mut order, &nest(task, (1, MmapRead), (3, PageTable))).is_empty());
        }
    }

    #[test]
    fn a_cycle_of_classes_over_two_schedules_is_k_04_and_is_printed() {
        let mut order = Locks::default();
        run(&mut order, &nest(1, (1, MmapRead), (2, AnonVma)));
        order.reset();
        run(&mut order, &nest(2, (2, AnonVma), (3, PageTable)));
        order.reset();
        let closing = nest(1, (5, PageTable), (6, MmapWrite));
        let found = run(&mut order, &closing);
        assert_eq!(found[0].id, "K-04");
        let text = found[0].to_string() + &found[0].finding.details.join("\n");
        for part in [
            "3 locks",
            "anon_vma lock at 0x2 -> page-table lock at 0x3",
            "task 2",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        order.reset();
        assert_eq!(run(&mut order, &closing).len(), 1, "again, for a replay");
    }

    #[test]
    fn two_locks_of_one_class_in_both_orders_are_k_04() {
        let (a, b) = ((0x110, MmapWrite), (0x120, MmapWrite));
        let mut order = Locks::default();
        assert!(run(&mut order, &nest(1, a, b)).is_empty());
        assert_eq!(run(&mut order, &nest(2, b, a))[0].id, "K-04");
        let (c, d) = ((0x130, MmapWrite), (0x140, MmapRead));
        run(&mut order, &nest(1, b, c));
        run(&mut order, &nest(2, c, d));
        let circle = run(&mut order, &nest(1, d, a));
        assert_eq!(circle[0].finding.details.len(), 4, "{circle:?}");
        // Another schedule has its own locks.
        order.reset();
        assert!(run(&mut order, &nest(2, b, a)).is_empty());
        // And a recycled mm has another one than the old mm had.
        let at = 0x120 - offset_of!(Mm, mmap_lock) as u64;
        run(&mut order, &[(1, MmCreate, at, 0)]);
        assert!(run(&mut order, &nest(1, a, b)).is_empty());
    }

    #[test]
    fn a_frame_that_is_allocated_anew_has_another_lock() {
        for (kind, cycles) in [(FrameKind::Anon, 0), (FrameKind::Slab, 1)] {
            let word =
                |frame: u64| frame * size_of::<Folio>() as u64 + offset_of!(Folio, lock) as u64;
            let (a, b) = ((word(5), LockClass::Folio), (word(6), LockClass::Folio));
            let mut order = Locks::default();
            assert!(run(&mut order, &nest(1, a, b)).is_empty());
            // The first is free by then, and a page moves there from the second.
            let event = Event {
                kind: EventKind::FrameAlloc as u32,
                args: [5 << PAGE_SHIFT, 0, kind as u64, 0, 0],
                ..Event::default()
            };
            order.observe(&Seen { vcpu: 1, event }, &mut Vec::new());
            assert_eq!(run(&mut order, &nest(1, b, a)).len(), cycles);
        }
    }

    #[test]
    fn a_lock_that_was_only_tried_closes_no_cycle() {
        let mut order = Locks::default();
        run(&mut order, &nest(1, (1, LockClass::Folio), (2, AnonVma)));
        let mut tried = |tried, cycles| {
            let mut found = Vec::new();
            for (word, class, tried) in [(3, AnonVma, 0), (4, LockClass::Folio, tried)] {
                let event = Event {
                    kind: Take as u32,
                    task: 2,
                    args: [word, class as u64, tried, 0, 0],
                    ..Event::default()
                };
                order.observe(&Seen { vcpu: 1, event }, &mut found);
            }
            assert_eq!(self::cycles(found).len(), cycles);
            order.reset();
        };
        tried(1, 0);
        tried(0, 1);
    }

    #[test]
    fn locks_of_others_and_what_was_dropped_make_no_order() {
        let mut order = Locks::default();
        let apart = [
            (1, Take, 1, PageTable as u64),
            (2, Take, 2, Buddy as u64),
            (2, Take, 1, PageTable as u64),
        ];
        assert!(run(&mut order, &apart).is_empty());
        assert_eq!(order.order.classes.len(), 1, "only what one vCPU did");
    }
}
