//! What a step touched: the relation of conflict that partial-order reduction and coverage rest on.
//!
//! Two steps of different actors that touch nothing in common commute: either order leads to the same
//! state, and to the same judgement of every monitor. What a step touched is derived from the point at which
//! it began, the point at which it ended, and the events between. Where these do not tell, it conflicts with
//! everything: too large a footprint costs time, too small a one loses schedules.
//!
//! What is behind the rules, besides the events themselves:
//! - Data under a lock need none: whoever touches them has taken the lock, and that is an event. Kernels in
//!   which this is not so are caught by the checks on locks, not here.
//! - The order of a TLB flush and of a change of an entry, of a frame's release, and of the end of an
//!   operation matters to the TLB model although these touch no common word.
//! - All code of programs may touch the same words of theirs ([`Resource::Program`]).
//! - What is on its way to a vCPU is seen by nobody else, so its delivery commutes with whatever others do,
//!   but for sending more to that vCPU.
//! - A vCPU takes a pending IPI as soon as its interrupts are on: before it goes on with its program, where
//!   it waits, and after another IPI. Steps that begin and end inside the kernel do not look at that.
//!
//! The tests exchange neighbouring steps that are independent by these rules on the model engine, in all
//! litmus tests, and demand the same memory, events and ending.

use abi::channel::{Event, EventKind, access};
use abi::lock::LockClass;
use abi::point::Point;
use abi::syscall::nr;

use super::{Actor, Standing};

/// Something that steps touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Resource {
    /// Whatever vCPUs touch. IPIs on their way are none of it: whoever sends or takes one says so.
    Everything,
    /// Memory of programs outside the test, and all that their threads tell each other.
    Program,
    /// A lock word.
    Lock(u64),
    /// Leaf entries, wherever they are.
    Leaves,
    /// Leaf entries for one page, of any mm.
    Leaf(u64),
    /// Entries that point to tables.
    Tables,
    /// Generation, CPU mask and users of mms; which mm is loaded where, and whether lazily.
    Mms,
    /// How many unmaps are under way, which each asks before it flushes.
    Gathers,
    /// The areas of mms.
    Vmas,
    /// TLBs, of whatever vCPU.
    Tlbs,
    /// The TLB of one vCPU.
    Tlb(usize),
    /// Frames, whichever.
    Frames,
    /// Counters, owner and contents of one frame.
    Frame(u64),
    /// The request of a shootdown, by the vCPU that made it.
    Request(usize),
    /// IPIs on their way to a vCPU.
    InFlight(usize),
    /// IPIs that a vCPU is about to take.
    Pending(usize),
}

/// How a step touches it. Two steps conflict where both touch the same and not [both do so in a way that
/// commutes](Mode::commutes).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Mode {
    /// Looks at all of it.
    Read,
    /// Changes a part that no other step so marked looks at or changes, but for those that say which.
    Part,
    /// Changes it.
    Write,
}

impl Mode {
    pub(super) fn commutes(self, other: Self) -> bool {
        self == other && self != Self::Write
    }
}

/// Everything that one step touched; sorted, each resource once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Footprint(Vec<(Resource, Mode)>);

impl Footprint {
    /// Of what is in flight to a vCPU as it arrives.
    pub(super) fn of_wire(vcpu: usize) -> Self {
        let mut print = Self::default();
        print.touch(Resource::InFlight(vcpu), Mode::Write);
        print.touch(Resource::Pending(vcpu), Mode::Write);
        print.0.sort_unstable();
        print
    }

    /// Of a request to the disk as it is done: data move from or to frames of anybody's.
    pub(super) fn of_disk(vcpu: usize) -> Self {
        let mut print = Self::default();
        print.touch(Resource::Everything, Mode::Write);
        print.touch(Resource::Pending(vcpu), Mode::Write);
        print.0.sort_unstable();
        print
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Resource, Mode)> {
        self.0.iter().copied()
    }

    /// True where the order of the two steps does not matter.
    pub(super) fn independent(&self, other: &Self) -> bool {
        let (mut left, mut right) = (self.0.as_slice(), other.0.as_slice());
        while let (Some(l), Some(r)) = (left.first(), right.first()) {
            if l.0 == r.0 && !l.1.commutes(r.1) {
                return false;
            }
            // Equal resources may stand in either order: both go.
            let (l, r) = (l.0, r.0);
            left = &left[usize::from(l <= r)..];
            right = &right[usize::from(r <= l)..];
        }
        true
    }

    fn touch(&mut self, resource: Resource, mode: Mode) {
        match self.0.iter_mut().find(|(known, _)| *known == resource) {
            None => self.0.push((resource, mode)),
            Some((_, known)) if *known == mode => {}
            // Both a look and a change of a part, which is more than either.
            Some((_, known)) => *known = Mode::Write,
        }
    }

    fn part(&mut self, whole: Resource, part: Resource, mode: Mode) {
        self.touch(part, mode);
        if mode != Mode::Read {
            self.touch(whole, Mode::Part);
        }
    }
}

/// What a vCPU is doing, as far as its events have told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    Unknown,
    Program,
    /// A fault, in a program or in a call.
    Fault,
    Call(u64),
}

/// Derives the footprints of an execution's steps.
#[derive(Clone, Debug, Default)]
pub(super) struct Footprints {
    doing: Vec<Doing>,
}

impl Footprints {
    /// A new execution begins.
    pub(super) fn begin(&mut self) {
        self.doing.clear();
    }

    /// Only notes what the vCPU is doing after `events`.
    pub(super) fn follow(&mut self, vcpu: usize, vcpus: usize, events: &[Event]) {
        self.doing.resize(vcpus, Doing::Unknown);
        for event in events {
            self.doing[vcpu] = match EventKind::from_id(event.kind) {
                Some(EventKind::SyscallEnter) => Doing::Call(event.args[0]),
                Some(EventKind::SyscallExit) => Doing::Program,
                Some(EventKind::FaultEnter) => Doing::Fault,
                // A copy inside a call may have faulted: what comes next is not known.
                Some(EventKind::FaultExit) => Doing::Unknown,
                // Another task goes on wherever it was.
                Some(EventKind::Switch) => Doing::Unknown,
                // A fault of the soft TLB ends in the program.
                Some(EventKind::Access) => Doing::Program,
                _ => continue,
            };
        }
    }

    /// The footprint of one step of `actor` between `from` and `to` (of a wire: both nothing).
    pub(super) fn step(
        &mut self,
        actor: Actor,
        vcpus: usize,
        from: Standing,
        to: Standing,
        events: &[Event],
    ) -> Footprint {
        let mut print = Footprint::default();
        match actor {
            Actor::Wire(vcpu) => print = Footprint::of_wire(vcpu.into()),
            Actor::Disk(vcpu) => print = Footprint::of_disk(vcpu.into()),
            Actor::Vcpu(vcpu) => {
                let vcpu = usize::from(vcpu);
                self.doing.resize(vcpus, Doing::Unknown);
                let before = self.doing[vcpu];
                self.follow(vcpu, vcpus, events);
                let known = points(&mut print, vcpu, vcpus, before, from, to);
                let mut all = known;
                for event in events {
                    all &= one(&mut print, vcpu, event);
                }
                if !all || looks_for_ipis(&print, from, to) {
                    print.touch(Resource::Pending(vcpu), Mode::Read);
                }
                let mode = if all { Mode::Read } else { Mode::Write };
                print.touch(Resource::Everything, mode);
            }
        }
        print.0.sort_unstable();
        print
    }
}

/// Calls that touch nothing of their program's memory.
fn is_of_mm(call: u64) -> bool {
    matches!(
        call,
        nr::MMAP | nr::MUNMAP | nr::MPROTECT | nr::MADVISE | nr::BRK | nr::SCHED_YIELD
    )
}

/// True where interrupts may be on between the two points.
fn looks_for_ipis(print: &Footprint, from: Standing, to: Standing) -> bool {
    let handles = |point| matches!(point, Some(Point::IpiReceive | Point::IpiAck));
    let of_program = print.0.iter().any(|(known, _)| *known == Resource::Program);
    of_program || from.wait().is_some() || handles(from.point) || handles(to.point)
}

/// What lies between two points without an event. False: not known.
fn points(
    print: &mut Footprint,
    vcpu: usize,
    vcpus: usize,
    before: Doing,
    from: Standing,
    to: Standing,
) -> bool {
    use Point as P;
    let (Some(start), Some(end)) = (from.point, to.point) else {
        return false;
    };
    // A grace period asks what every CPU is doing; who waits for the disk takes in the answers to others too.
    let waits = [P::RcuWait, P::DiskWait];
    if waits.contains(&start) || waits.contains(&end) {
        return false;
    }
    let spins = matches!(
        end,
        P::LockWait | P::LockAcquire | P::FlushWait | P::FlushSync | P::IpiAck | P::IpiReceive
    );
    let in_handler = matches!(start, P::IpiReceive | P::IpiAck);
    let of_program = |point| {
        matches!(
            point,
            P::SyscallExit | P::Access | P::TestBegin | P::UserRelax
        )
    };
    // Code of the program ran, or may have.
    if of_program(start)
        || matches!(
            end,
            P::SyscallEnter | P::FaultEnter | P::Access | P::UserRelax | P::TestEnd
        )
        || start == P::FaultExit
        || in_handler && !spins
    {
        print.touch(Resource::Program, Mode::Write);
    }
    match start {
        // The handler looks for requests to it, and flushes what they say.
        P::IpiReceive | P::IpiAck => {
            print.touch(Resource::Mms, Mode::Read);
            for from in 0..vcpus {
                let mode = if from == vcpu { Mode::Read } else { Mode::Part };
                print.touch(Resource::Request(from), mode);
            }
        }
        // It counts the flush and asks which CPUs have the mm.
        P::FlushIssue => print.touch(Resource::Mms, Mode::Write),
        P::FlushDispatch | P::FlushWait => {
            print.touch(Resource::Mms, Mode::Read);
            print.touch(Resource::Request(vcpu), Mode::Read);
        }
        P::SwitchMm | P::Cr3Load | P::LazyEnter | P::LazyLeave | P::Switch | P::MmExit => {
            print.touch(Resource::Mms, Mode::Write);
        }
        P::Access => {
            print.touch(Resource::Leaf(from.args[0] >> 12), Mode::Read);
            print.touch(Resource::Tables, Mode::Read);
        }
        // A fault looks for its VMA, and asks whether it may have it.
        P::RcuEnter if before == Doing::Fault => print.touch(Resource::Vmas, Mode::Read),
        P::VmaLookup | P::VmaCounted => {
            print.touch(Resource::Vmas, Mode::Read);
            print.touch(Resource::Lock(from.args[0]), Mode::Read);
        }
        P::RefcountChange | P::MapcountChange | P::FrameFree | P::FrameAlloc | P::TableFree => {
            let frame = Resource::Frame(from.args[0] >> 12);
            print.part(Resource::Frames, frame, Mode::Write);
        }
        _ => {}
    }
    if matches!(end, P::FlushWait | P::FlushSync) {
        print.touch(Resource::Request(vcpu), Mode::Read);
    }
    if of_program(start) || start == P::LockWait || in_handler {
        // Nothing but the above, where the end is the program's or a spin loop's.
        let plain = spins
            || matches!(
                end,
                P::SyscallEnter | P::Access | P::UserRelax | P::SyscallExit | P::TestEnd
            );
        if plain && !(in_handler && !spins && before == Doing::Unknown) {
            return true;
        }
    }
    match before {
        Doing::Call(call) if is_of_mm(call) => {
            // Walks to leaf tables take no lock.
            print.touch(Resource::Tables, Mode::Read);
            let of_slab = to.args[1] == LockClass::Slab as u64;
            if of_slab && matches!(end, P::LockAcquire | P::LockWait) {
                // It may be giving back what was in the tree of VMAs, of whose changes nothing else tells.
                print.touch(Resource::Vmas, Mode::Write);
            }
            if end == P::CowCopy {
                // A collapse reads all pages of a table.
                print.touch(Resource::Frames, Mode::Read);
            }
            if call != nr::MPROTECT && call != nr::SCHED_YIELD {
                gathers(print, end, to.args);
            }
            true
        }
        Doing::Call(nr::FALLOCATE | nr::FTRUNCATE) => {
            // Walks to leaf tables of whoever maps the file, looks at who else has a page before it takes a
            // lock that guards that, and fills parts of pages with zeroes, of which no event tells.
            print.touch(Resource::Tables, Mode::Read);
            print.touch(Resource::Leaves, Mode::Read);
            print.touch(Resource::Frames, Mode::Write);
            gathers(print, end, to.args);
            true
        }
        Doing::Fault => {
            // Looks at entries and at what else refers to a frame before it takes the lock.
            print.touch(Resource::Tables, Mode::Read);
            print.touch(Resource::Leaves, Mode::Read);
            print.touch(Resource::Frames, Mode::Read);
            true
        }
        Doing::Program => start == P::FaultExit || start == P::SyscallExit,
        _ => false,
    }
}

/// `mm.flush_pending`: counted up before the tables are looked at, looked at before the flush, counted
/// down at the end, which may be before or after the mmap_lock is dropped; truncate's before it drops the i_mmap lock.
fn gathers(print: &mut Footprint, end: Point, args: [u64; 2]) {
    let of_mmap = matches!(
        LockClass::from_u64(args[1]),
        Some(LockClass::MmapRead | LockClass::MmapWrite | LockClass::IMmap)
    );
    let mode = match end {
        Point::LockAcquire | Point::LockWait | Point::VmaDetach => Mode::Part,
        Point::FlushIssue => Mode::Read,
        Point::LockRelease if of_mmap => Mode::Write,
        Point::SyscallExit => Mode::Write,
        _ => return,
    };
    print.touch(Resource::Gathers, mode);
}

/// What one event says. False: it is not known what it stands for.
fn one(print: &mut Footprint, vcpu: usize, event: &Event) -> bool {
    use EventKind as K;
    let Some(kind) = EventKind::from_id(event.kind) else {
        return false;
    };
    let args = event.args;
    match kind {
        K::SyscallEnter | K::SyscallExit if args[0] == nr::SCHED_YIELD => {}
        // What an operation promises at its end depends on the entries and TLBs that were there at its
        // beginning, and on those that are there now.
        K::SyscallEnter | K::SyscallExit | K::FaultEnter | K::FaultExit | K::ShootdownEnd => {
            print.touch(Resource::Tlbs, Mode::Read);
            print.touch(Resource::Leaves, Mode::Read);
            print.touch(Resource::Tables, Mode::Read);
        }
        // What the order of a section and a grace period is worth is in the events of the grace period.
        K::IpiReceive | K::FailpointHit | K::RcuEnter | K::RcuExit => {}
        K::PteChange => {
            let leaf = Resource::Leaf(args[1] >> 12);
            if args[2] == 1 {
                print.part(Resource::Leaves, leaf, Mode::Write);
            } else {
                print.touch(Resource::Tables, Mode::Write);
                print.touch(Resource::Leaves, Mode::Read);
            }
            print.touch(Resource::Tlbs, Mode::Read);
        }
        K::WalkBegin | K::WalkEnd => {
            print.touch(Resource::Tables, Mode::Read);
            print.touch(Resource::Leaves, Mode::Read);
        }
        K::FlushLocal | K::FlushAll => {
            print.touch(Resource::Mms, Mode::Read);
            print.part(Resource::Tlbs, Resource::Tlb(vcpu), Mode::Write);
        }
        K::Cr3Load | K::LazyEnter | K::LazyLeave => {
            print.touch(Resource::Mms, Mode::Write);
            print.part(Resource::Tlbs, Resource::Tlb(vcpu), Mode::Write);
        }
        K::CpumaskSet | K::CpumaskClear | K::TlbGen | K::MmCount | K::MmUsers => {
            print.touch(Resource::Mms, Mode::Write);
        }
        K::ShootdownBegin => print.touch(Resource::Request(vcpu), Mode::Write),
        K::IpiSend => {
            for target in 0..u64::BITS as usize {
                if args[1] & 1 << target != 0 {
                    print.touch(Resource::InFlight(target), Mode::Write);
                }
            }
        }
        K::IpiAck => print.touch(Resource::Request(args[0] as usize), Mode::Part),
        K::FrameAlloc | K::FrameFree => {
            let frame = Resource::Frame(args[0] >> 12);
            print.part(Resource::Frames, frame, Mode::Write);
            print.touch(Resource::Tlbs, Mode::Read);
        }
        K::MapcountChange | K::RefcountChange => {
            let frame = Resource::Frame(args[0] >> 12);
            print.part(Resource::Frames, frame, Mode::Write);
        }
        K::VmaFound => {
            print.touch(Resource::Vmas, Mode::Read);
            print.touch(Resource::Leaf(args[2] >> 12), Mode::Read);
        }
        // Nobody may still have what was there before.
        K::VmaAttach | K::VmaChange => {
            print.touch(Resource::Vmas, Mode::Write);
            print.touch(Resource::Tlbs, Mode::Read);
        }
        K::VmaDetach | K::VmaAlloc | K::VmaFree => print.touch(Resource::Vmas, Mode::Write),
        // Onto whose queue is in no event.
        K::LockWake => return false,
        K::LockAcquire | K::LockRelease | K::LockWait => {
            // Readers only count themselves, but for who sleeps, and the last of them who wakes it.
            let class = LockClass::from_u64(args[1]);
            let somebody_sleeps = kind == K::LockWait || kind == K::LockRelease && args[2] != 0;
            let reads =
                !somebody_sleeps && matches!(class, Some(LockClass::MmapRead | LockClass::VmaRead));
            let mode = if reads { Mode::Read } else { Mode::Write };
            print.touch(Resource::Lock(args[0]), mode);
            // Whether a fault gets its VMA hangs on the mm's number too.
            if matches!(class, Some(LockClass::MmapWrite | LockClass::VmaWrite)) {
                print.touch(Resource::Vmas, Mode::Write);
            }
        }
        K::Access => {
            print.touch(Resource::Leaf(args[0] >> 12), Mode::Read);
            print.touch(Resource::Tables, Mode::Read);
            if args[3] & access::FAULT == 0 {
                let write = args[3] & access::WRITE != 0;
                let mode = if write { Mode::Write } else { Mode::Read };
                print.part(Resource::Frames, Resource::Frame(args[1] >> 12), mode);
            }
        }
        // A grace period looks at what every CPU is doing, which is no event where nobody looks.
        // What the device does to the frame and to this vCPU is in no event.
        K::Pin | K::DiskSubmit | K::DiskDone | K::FolioSplit => return false,
        // Reclaim chooses by lists that every fault changes.
        K::SwapSlot | K::SwapCache | K::Lru | K::SplitQueue => return false,
        // Whether a charge fits is up to all others of its group.
        K::Charge => return false,
        K::RcuRetire | K::RcuFree | K::RcuGpStart | K::RcuGpWait | K::RcuGpEnd => return false,
        K::Switch | K::MmCreate | K::MmDestroy | K::MmFree | K::TaskCreate | K::TaskExit => {
            return false;
        }
    }
    true
}
