//! Which events a violation has to do with.

use abi::channel::EventKind;
use abi::layout::{PAGE_SHIFT, PAGE_SIZE};
use abi::pte::{Pte, level_size};

use super::super::locks::{is_mmap_lock, vma_of};
use super::Action;
use crate::check::Violation;

/// What a violation is about, and whose event showed it.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    mm: Option<u64>,
    page: Option<u64>,
    /// Address of a frame.
    frame: Option<u64>,
    vcpu: Option<usize>,
    object: Option<u64>,
    /// Whether it is about what a TLB holds, so that flushes matter.
    cached: bool,
    /// Whether it is about a VMA: then those matter who use one, until they are done.
    vma: bool,
    /// Whether it is about RCU, so that read sections matter.
    sections: bool,
    counted: bool,
    task: u32,
    ticket: u64,
}

/// Rules, or families of them, that hang on the last value of counts that no lock guards. Everything else is ordered
/// by locks and acknowledgements: the intervals of actions that depend on each other do not overlap.
const COUNTED: [&str; 3] = ["F-", "O-04", "O-06"];

impl Subject {
    pub(super) fn of(violation: &Violation, shown: &Action) -> Self {
        let place = &violation.finding.where_;
        Self {
            mm: place.mm,
            page: place.gva.map(|gva| gva & !(PAGE_SIZE - 1)),
            frame: place.frame.map(|frame| frame << PAGE_SHIFT),
            vcpu: place.vcpu,
            object: place.object.map(|(_, gpa)| gpa),
            cached: violation.id.starts_with('T'),
            sections: violation.id.starts_with('U'),
            counted: COUNTED.iter().any(|rule| violation.id.starts_with(rule)),
            vma: place.object.is_some_and(|(kind, _)| kind == "VMA"),
            task: shown.seen.event.task,
            ticket: shown.seen.event.stamp,
        }
    }

    /// True where the violation hangs on the last value of a count: two changes whose tickets are the wrong way
    /// round leave a wrong one, however long ago they were.
    pub(super) fn is_counted(&self) -> bool {
        self.counted
    }

    /// True where `action` begins the life of what is counted: what was before does not matter.
    pub(super) fn is_born(&self, action: &Action) -> bool {
        let [a, ..] = action.seen.event.args;
        match EventKind::from_id(action.seen.event.kind) {
            Some(EventKind::FrameAlloc) => self.object == Some(a) || self.frame == Some(a),
            Some(EventKind::MmCreate) => self.mm == Some(a),
            _ => false,
        }
    }

    /// True where the violation may depend on when `action` happened. Too much costs orders to try; too little
    /// would make the search blind, so whatever names the same thing counts.
    pub(super) fn concerns(&self, action: &Action) -> bool {
        use EventKind as K;
        let event = &action.seen.event;
        let [a, b, c, d, e] = event.args;
        let Some(kind) = EventKind::from_id(event.kind) else {
            return false;
        };
        let here = self.vcpu.is_none_or(|vcpu| vcpu == action.seen.vcpu);
        let object = |gpa| self.object == Some(gpa) || self.frame == Some(gpa);
        let mm = |id| self.mm == Some(id);
        let within = |start: u64, end| {
            let page = self.page;
            page.is_some_and(|page| start < page.saturating_add(PAGE_SIZE) && page < end)
        };
        let about = match kind {
            K::PteChange => {
                let size = level_size(c.clamp(1, 4) as u8);
                let start = b & !(size - 1);
                let frames = [d, e].map(Pte).map(Pte::address);
                (self.mm.is_none_or(|mm| mm == a) && within(start, start.saturating_add(size)))
                    || frames.into_iter().any(object)
            }
            // Any INVLPG drops all paging-structure caches, and who is lazy is asked for every entry.
            K::FlushLocal | K::FlushAll | K::LazyEnter | K::LazyLeave => self.cached && here,
            K::Cr3Load => self.cached && here || mm(b),
            K::CpumaskSet | K::CpumaskClear => here && mm(a),
            K::FrameAlloc | K::FrameFree | K::MapcountChange | K::RefcountChange | K::Pin => {
                object(a)
            }
            K::VmaAttach | K::VmaDetach | K::VmaChange => object(b) || mm(a) && within(c, d),
            K::VmaAlloc | K::VmaFree => object(a),
            K::VmaFound => object(b),
            K::LockAcquire => object(a) || object(vma_of(a)),
            K::LockRelease => object(a) || object(vma_of(a)) || self.vma && is_mmap_lock(b),
            K::MmCreate | K::MmDestroy | K::MmFree | K::MmCount | K::MmUsers | K::TlbGen => mm(a),
            K::RcuEnter | K::RcuExit | K::RcuGpStart | K::RcuGpEnd => self.sections,
            K::RcuRetire | K::RcuFree => self.sections && object(a),
            K::WalkBegin | K::WalkEnd => self.vma || mm(a) && within(b, b.saturating_add(1)),
            // A page fault drops what its vCPU holds for the address (SDM vol. 3A, 5.10.4.1).
            K::FaultEnter if self.cached && here => true,
            K::SyscallEnter | K::SyscallExit | K::FaultEnter | K::FaultExit => {
                event.task == self.task || self.vma && kind == K::FaultExit
            }
            _ => false,
        };
        about || event.stamp == self.ticket
    }
}
