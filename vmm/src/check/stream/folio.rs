//! Folios on the stream (family F): counts against the entries that they count.
//!
//! The state checks of family R compare both where nothing is in flight. Here every transition is judged: the
//! kernel promises that `mapcount` changes together with the entry, under its page-table lock
//! (`guest-kernel/src/mm/folio.rs`; Linux's `folio_add_rmap` and `folio_remove_rmap` demand the same), so within
//! one section under page-table locks both change by as much.

use std::mem::offset_of;

use abi::channel::EventKind;
use abi::layout::{PAGE_SHIFT, PAGE_SIZE};
use abi::lock::LockClass;
use abi::objects::{Folio, FrameKind, KernelRoot};
use abi::pte::Pte;
use rustc_hash::FxHashMap;

use super::{Kinds, Monitor, Rule, Seen, tlb, violation};
use crate::check::{Finding, Violation};
use crate::memory::PhysMem;

/// IDs and predicates.
pub const INVARIANTS: &[Rule] = &[
    (
        TOGETHER,
        "a folio's mapcount and the entries that map it change by as much under one page-table lock",
    ),
    (
        FREED,
        "a folio is freed unmapped, and is not referred to before it is allocated again",
    ),
    (
        REFERENCES,
        "a folio has at least as many references as mappings",
    ),
    (
        EXPLAINED,
        "the events explain the counts of folios: they end as memory has them",
    ),
];

const TOGETHER: &str = "F-01";
const FREED: &str = "F-02";
const REFERENCES: &str = "F-03";
const EXPLAINED: &str = "F-04";

/// What the events say of one frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Frame {
    entries: u32,
    mapcount: u64,
    refcount: u64,
    freed: bool,
}

/// What a vCPU has changed since it took its first page-table lock.
#[derive(Clone, Debug, Default)]
struct Section {
    locks: u32,
    /// Frames, and by how much more their entries have changed than their mapcount.
    changed: Vec<(u64, i64)>,
}

impl Section {
    fn change(&mut self, frame: u64, by: i64) {
        match self.changed.iter_mut().find(|(other, _)| *other == frame) {
            Some((_, sum)) => *sum += by,
            None => self.changed.push((frame, by)),
        }
    }
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Folios {
    start: FxHashMap<u64, Frame>,
    frames: FxHashMap<u64, Frame>,
    sections: Vec<Section>,
    /// Frames whose counts the events have told.
    told: Vec<u64>,
}

impl Folios {
    fn pte_change(&mut self, seen: &Seen) {
        let [_, _, level, old, new] = seen.event.args;
        if level != 1 {
            return;
        }
        let section = &mut self.sections[seen.vcpu];
        for (entry, by) in [(Pte(old), -1), (Pte(new), 1)] {
            if entry.is_present() {
                section.change(entry.address(), by);
                if let Some(frame) = self.frames.get_mut(&entry.address()) {
                    frame.entries = frame.entries.saturating_add_signed(by as i32);
                }
            }
        }
    }

    fn mapcount(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [gpa, new, ..] = seen.event.args;
        let Some(frame) = self.frames.get_mut(&gpa) else {
            return;
        };
        let by = new.cast_signed().wrapping_sub(frame.mapcount.cast_signed());
        frame.mapcount = new;
        self.told.push(gpa);
        self.sections[seen.vcpu].change(gpa, by.wrapping_neg());
        self.judge(seen, gpa, found);
    }

    fn refcount(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [gpa, new, ..] = seen.event.args;
        let Some(frame) = self.frames.get_mut(&gpa) else {
            return;
        };
        if frame.freed {
            let finding = finding(seen, "a reference to a folio that is freed", gpa);
            found.push(violation(
                INVARIANTS,
                FREED,
                finding.found(format!("refcount becomes {new}")),
            ));
        }
        frame.refcount = new;
        self.told.push(gpa);
        if new > 0 {
            self.judge(seen, gpa, found);
        }
    }

    fn judge(&self, seen: &Seen, gpa: u64, found: &mut Vec<Violation>) {
        let frame = &self.frames[&gpa];
        if frame.refcount < frame.mapcount && !frame.freed {
            let finding = finding(seen, "a folio has fewer references than mappings", gpa)
                .expected(format!("at least {} references", frame.mapcount))
                .found(frame.refcount.to_string());
            found.push(violation(INVARIANTS, REFERENCES, finding));
        }
    }

    fn free(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [gpa, _, kind, ..] = seen.event.args;
        if kind != FrameKind::Anon as u64 {
            self.frames.remove(&gpa);
            return;
        }
        let frame = self.frames.entry(gpa).or_default();
        if frame.entries > 0 || frame.mapcount > 0 {
            let finding = finding(seen, "a folio that is mapped is freed", gpa)
                .expected("no mapping")
                .found(format!(
                    "{} entries map it, its mapcount is {}",
                    frame.entries, frame.mapcount
                ));
            found.push(violation(INVARIANTS, FREED, finding));
        }
        if frame.refcount > 1 {
            let finding = finding(seen, "a folio that others refer to is freed", gpa)
                .expected("the last reference, or none")
                .found(format!("{} references", frame.refcount));
            found.push(violation(INVARIANTS, FREED, finding));
        }
        frame.freed = true;
    }

    /// The vCPU holds no page-table lock any more.
    fn section_over(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        for (gpa, difference) in std::mem::take(&mut self.sections[seen.vcpu].changed) {
            if difference == 0 || !self.frames.contains_key(&gpa) {
                continue;
            }
            let frame = &self.frames[&gpa];
            let title = "mapcount and entries did not change together";
            let finding = finding(seen, title, gpa)
                .expected("as many mappings more or less as entries")
                .found(format!(
                    "{difference:+} entries too many: {} entries now, mapcount {}",
                    frame.entries, frame.mapcount
                ));
            found.push(violation(INVARIANTS, TOGETHER, finding));
        }
    }
}

impl Monitor for Folios {
    fn fork(&self) -> Box<dyn Monitor> {
        Box::new(self.clone())
    }
    fn start(&mut self, memory: &dyn PhysMem, kernel_root: u64, nr_vcpus: usize) {
        self.start.clear();
        for gpa in tlb::leaf_frames(memory, kernel_root) {
            let frame = self
                .start
                .entry(gpa)
                .or_insert_with(|| counts(memory, kernel_root, gpa));
            frame.entries += 1;
        }
        self.sections = vec![Section::default(); nr_vcpus];
        self.reset();
    }
    fn reset(&mut self) {
        self.frames.clone_from(&self.start);
        self.told.clear();
        for section in &mut self.sections {
            section.locks = 0;
            section.changed.clear();
        }
    }
    fn follows(&self) -> Kinds {
        const {
            Kinds::of(&[
                EventKind::FrameAlloc,
                EventKind::FrameFree,
                EventKind::PteChange,
                EventKind::MapcountChange,
                EventKind::RefcountChange,
                EventKind::LockAcquire,
                EventKind::LockRelease,
                EventKind::SyscallExit,
                EventKind::FaultExit,
            ])
        }
    }
    fn observe(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        if seen.vcpu >= self.sections.len() {
            return;
        }
        let args = seen.event.args;
        let of_table = args[1] == LockClass::PageTable as u64;
        match EventKind::from_id(seen.event.kind) {
            Some(EventKind::FrameAlloc) if args[2] == FrameKind::Anon as u64 => {
                let fresh = Frame {
                    refcount: 1,
                    ..Frame::default()
                };
                self.frames.insert(args[0], fresh);
            }
            Some(EventKind::FrameFree) => self.free(seen, found),
            Some(EventKind::PteChange) => self.pte_change(seen),
            Some(EventKind::MapcountChange) => self.mapcount(seen, found),
            Some(EventKind::RefcountChange) => self.refcount(seen, found),
            Some(EventKind::LockAcquire) if of_table => self.sections[seen.vcpu].locks += 1,
            Some(EventKind::LockRelease) if of_table => {
                let section = &mut self.sections[seen.vcpu];
                section.locks = section.locks.saturating_sub(1);
                if section.locks == 0 {
                    self.section_over(seen, found);
                }
            }
            Some(EventKind::SyscallExit | EventKind::FaultExit) => self.section_over(seen, found),
            _ => {}
        }
    }
    fn compare(&mut self, memory: &dyn PhysMem, kernel_root: u64, found: &mut Vec<Violation>) {
        self.told.sort_unstable();
        self.told.dedup();
        for gpa in &self.told {
            let Some(told) = self.frames.get(gpa).filter(|frame| !frame.freed) else {
                continue;
            };
            let is = counts(memory, kernel_root, *gpa);
            if (told.refcount, told.mapcount) != (is.refcount, is.mapcount) {
                let text = |f: &Frame| format!("refcount {}, mapcount {}", f.refcount, f.mapcount);
                let title = format!("unexplained counts of frame {:#x}", gpa / PAGE_SIZE);
                let finding = Finding::new(title).expected(text(told)).found(text(&is));
                let finding = finding.frame(gpa >> PAGE_SHIFT);
                found.push(violation(INVARIANTS, EXPLAINED, finding));
                return;
            }
        }
    }
}

/// What the kernel's descriptor of a frame says.
fn counts(memory: &dyn PhysMem, kernel_root: u64, gpa: u64) -> Frame {
    let word = |at: u64| {
        let mut bytes = [0; 8];
        let read = memory.read(at, &mut bytes);
        read.map_or(0, |()| u64::from_le_bytes(bytes))
    };
    let folios = word(kernel_root.wrapping_add(offset_of!(KernelRoot, folios) as u64));
    let index = (gpa >> PAGE_SHIFT).wrapping_mul(size_of::<Folio>() as u64);
    let folio = folios.wrapping_add(index);
    let count = |offset: usize| word(folio.wrapping_add(offset as u64)) & u64::from(u32::MAX);
    Frame {
        entries: 0,
        mapcount: count(offset_of!(Folio, mapcount)),
        refcount: count(offset_of!(Folio, refcount)),
        freed: false,
    }
}

fn finding(seen: &Seen, title: &str, gpa: u64) -> Finding {
    Finding::new(format!("{title}: frame {:#x}", gpa / PAGE_SIZE))
        .object("frame", gpa)
        .vcpu(seen.vcpu)
        .detail(format!("by task {} on vCPU {}", seen.event.task, seen.vcpu))
}

#[cfg(test)]
mod tests {
    use abi::channel::Event;
    use abi::pte::PteFlags;

    use super::*;
    use EventKind as K;

    const FRAME: u64 = 0x7000;
    const ANON: u64 = FrameKind::Anon as u64;
    const TABLE: u64 = LockClass::PageTable as u64;

    fn ids(steps: &[(usize, K, [u64; 5])]) -> Vec<&'static str> {
        let mut folios = Folios {
            sections: vec![Section::default(); 2],
            ..Folios::default()
        };
        let mut found = Vec::new();
        for &(vcpu, kind, args) in steps {
            let kind = kind as u32;
            let event = Event {
                kind,
                args,
                ..Event::default()
            };
            folios.observe(&Seen { vcpu, event }, &mut found);
        }
        found.iter().map(|violation| violation.id).collect()
    }

    fn entry() -> u64 {
        Pte::new(FRAME, PteFlags::PRESENT | PteFlags::USER).0
    }
    fn alloc() -> (usize, K, [u64; 5]) {
        (0, K::FrameAlloc, [FRAME, 0, ANON, 0, 0])
    }
    fn lock() -> (usize, K, [u64; 5]) {
        (0, K::LockAcquire, [8, TABLE, 0, 0, 0])
    }
    fn unlock() -> (usize, K, [u64; 5]) {
        (0, K::LockRelease, [8, TABLE, 0, 0, 0])
    }
    fn mapcount(vcpu: usize, new: u64) -> (usize, K, [u64; 5]) {
        (vcpu, K::MapcountChange, [FRAME, new, 0, 0, 0])
    }
    fn refcount(new: u64) -> (usize, K, [u64; 5]) {
        (0, K::RefcountChange, [FRAME, new, 0, 0, 0])
    }
    fn map() -> (usize, K, [u64; 5]) {
        (0, K::PteChange, [1, 0x1000, 1, 0, entry()])
    }
    fn unmap() -> (usize, K, [u64; 5]) {
        (0, K::PteChange, [1, 0x1000, 1, entry(), 0])
    }
    fn free() -> (usize, K, [u64; 5]) {
        (0, K::FrameFree, [FRAME, 0, ANON, 0, 0])
    }

    #[test]
    fn a_folio_that_is_mapped_unmapped_and_freed_is_no_violation() {
        let life = [
            alloc(),
            lock(),
            mapcount(0, 1),
            map(),
            unlock(),
            lock(),
            unmap(),
            mapcount(0, 0),
            unlock(),
            refcount(0),
            free(),
        ];
        assert_eq!(ids(&[life, life].concat()), [""; 0]);
    }

    #[test]
    fn a_mapcount_that_changes_after_the_lock_is_f_01() {
        let mapped = [alloc(), lock(), mapcount(0, 1), map(), unlock()];
        let late = [lock(), unmap(), unlock()];
        assert_eq!(ids(&[&mapped[..], &late].concat()), ["F-01"]);
        // Another vCPU's section is no excuse, nor is none at all.
        let other = [lock(), unmap(), mapcount(1, 0), unlock()];
        assert_eq!(ids(&[&mapped[..], &other].concat()), ["F-01"]);
        let exit = (0, K::SyscallExit, [0; 5]);
        assert_eq!(ids(&[&mapped[..], &[unmap(), exit]].concat()), ["F-01"]);
    }

    #[test]
    fn a_folio_freed_while_mapped_or_taken_when_freed_is_f_02() {
        let mapped = [alloc(), lock(), mapcount(0, 1), map(), unlock()];
        assert_eq!(ids(&[&mapped[..], &[free()]].concat()), ["F-02"]);
        assert_eq!(ids(&[alloc(), free(), refcount(1)]), ["F-02"]);
        assert_eq!(ids(&[alloc(), free(), alloc(), refcount(2)]), [""; 0]);
        assert_eq!(ids(&[alloc(), refcount(2), free()]), ["F-02"]);
    }

    #[test]
    fn a_count_that_no_event_told_is_f_04() {
        use crate::check::world::{DATA, ROOT_GPA, World};
        let world = World::new();
        let mut folios = Folios::default();
        folios.start(&world.memory, ROOT_GPA, 2);
        let frame = world.mapped_frame(world.parent, DATA);
        let count = world.folio(frame, |folio| *folio.refcount.get_mut());
        let mut told = |new: u32| {
            let event = Event {
                kind: K::RefcountChange as u32,
                args: [frame << PAGE_SHIFT, new.into(), 0, 0, 0],
                ..Event::default()
            };
            let mut found = Vec::new();
            folios.observe(&Seen { vcpu: 0, event }, &mut found);
            folios.compare(&world.memory, ROOT_GPA, &mut found);
            found.iter().map(|v| v.id).collect::<Vec<_>>()
        };
        assert_eq!(told(count), [""; 0]);
        assert_eq!(told(count + 1), ["F-04"]);
    }

    #[test]
    fn more_mappings_than_references_are_f_03() {
        assert_eq!(ids(&[alloc(), mapcount(0, 1), mapcount(0, 2)]), ["F-03"]);
        let shared = [alloc(), mapcount(0, 1), refcount(2), mapcount(0, 2)];
        assert_eq!(ids(&shared), [""; 0]);
        assert_eq!(ids(&[&shared[..], &[refcount(1)]].concat()), ["F-03"]);
    }
}
