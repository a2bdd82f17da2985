//! Folios on the stream (family F): counts against the entries that they count.
//!
//! The state checks of family R compare both where nothing is in flight. Here every transition is judged: the
//! kernel promises that `mapcount` changes together with the entry, under its page-table lock
//! (`guest-kernel/src/mm/folio.rs`; Linux's `folio_add_rmap` and `folio_remove_rmap` demand the same), so within
//! one section under page-table locks both change by as much.

use std::mem::offset_of;

use abi::channel::EventKind;
use abi::layout::{HUGE_ORDER, HUGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE};
use abi::lock::LockClass;
use abi::objects::{Folio, FrameKind, KernelRoot};
use abi::pte::Pte;

use super::words::Word as _;
use super::{Kinds, Monitor, Rule, Seen, tlb, violation};
use crate::check::{Finding, Violation};
use crate::map::{Map, Set};
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
    (
        PINNED,
        "a folio that a device uses is not freed, and each of its pins has a reference beside those of mappings",
    ),
    (
        ALONE,
        "a folio that a device uses is mapped once at most: it is not pinned while shared, and fork does not share it",
    ),
];

const TOGETHER: &str = "F-01";
const FREED: &str = "F-02";
const REFERENCES: &str = "F-03";
const EXPLAINED: &str = "F-04";
const PINNED: &str = "F-10";
const ALONE: &str = "F-11";

/// What the events say of one frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Frame {
    entries: u32,
    mapcount: u64,
    refcount: u64,
    pins: u64,
    freed: bool,
    /// It is in [`Folios::told`].
    is_told: bool,
}

impl Frame {
    /// An event tells a count of the frame at `gpa`.
    fn tell(&mut self, gpa: u64, told: &mut Vec<u64>) {
        if !self.is_told {
            self.is_told = true;
            told.push(gpa);
        }
    }
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
        // Entry and mapcount follow each other: it is one of the last.
        let mut known = self.changed.iter_mut().rev();
        match known.find(|(other, _)| *other == frame) {
            Some((_, sum)) => *sum += by,
            None => self.changed.push((frame, by)),
        }
    }
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Folios {
    start: Map<Frame>,
    /// Heads of folios of 2 MiB, at the start and now.
    large_at_start: Set,
    large: Set,
    /// Pages of those that entries of level 1 map, each with how many.
    pages: Map<u32>,
    pages_at_start: Map<u32>,
    /// By head.
    frames: Map<Frame>,
    sections: Vec<Section>,
    /// Frames whose counts the events have told.
    told: Vec<u64>,
}

impl Folios {
    fn pte_change(&mut self, seen: &Seen) {
        let [_, _, level, old, new] = seen.event.args;
        let level = level.clamp(1, 4) as u8;
        let mapped = |entry: Pte| {
            let is_leaf = entry.is_present() && entry.is_leaf(level);
            is_leaf.then(|| entry.leaf_address(level))
        };
        let (old, new) = (mapped(Pte(old)), mapped(Pte(new)));
        if old == new {
            return;
        }
        for (page, by) in [(old, -1), (new, 1)] {
            if let Some(page) = page {
                let head = self.head(page);
                if level == 1 && self.is_large(head) {
                    let (entries, _) = self.pages.entry(page, 0);
                    *entries = entries.saturating_add_signed(by as i32);
                }
                self.sections[seen.vcpu].change(head, by);
                if let Some(frame) = self.frames.get_mut(head) {
                    frame.entries = frame.entries.saturating_add_signed(by as i32);
                }
            }
        }
    }

    /// The folio that the frame at `gpa` is a page of.
    fn head(&self, gpa: u64) -> u64 {
        let head = gpa & !(HUGE_PAGE_SIZE - 1);
        if self.is_large(head) { head } else { gpa }
    }

    fn is_large(&self, head: u64) -> bool {
        !self.large.is_empty() && self.large.contains(head)
    }

    /// Each page of a large folio is a folio of its own from now on: with the mappings that it has, and a reference for each,
    /// or for whoever frees it; the first one has `held` more.
    fn split(&mut self, head: u64, held: u64) {
        if self.large.remove(head).is_none() {
            return;
        }
        self.frames.remove(head);
        for page in (head..head + HUGE_PAGE_SIZE).step_by(PAGE_SIZE as usize) {
            let entries = self.pages.remove(page).unwrap_or(0);
            let frame = Frame {
                entries,
                mapcount: entries.into(),
                refcount: u64::from(entries.max(1)) + if page == head { held } else { 0 },
                is_told: true,
                ..Frame::default()
            };
            self.frames.insert(page, frame);
            self.told.push(page);
        }
    }

    fn mapcount(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [gpa, new, ..] = seen.event.args;
        let Some(frame) = self.frames.get_mut(gpa) else {
            return;
        };
        let by = new.cast_signed().wrapping_sub(frame.mapcount.cast_signed());
        frame.mapcount = new;
        frame.tell(gpa, &mut self.told);
        let frame = *frame;
        self.sections[seen.vcpu].change(gpa, by.wrapping_neg());
        judge(seen, gpa, &frame, found);
        self.judge_pins(seen, gpa, &frame, found);
    }

    fn pin(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [gpa, new, ..] = seen.event.args;
        let Some(frame) = self.frames.get_mut(gpa) else {
            return;
        };
        frame.pins = new;
        frame.tell(gpa, &mut self.told);
        let frame = *frame;
        self.judge_pins(seen, gpa, &frame, found);
    }

    /// A page that is both pinned and shared: the next write of the process goes to a copy that the device does not
    /// know.
    fn judge_pins(&self, seen: &Seen, gpa: u64, frame: &Frame, found: &mut Vec<Violation>) {
        if frame.pins == 0 {
            return;
        }
        let counts = format!("{} pins, mapcount {}", frame.pins, frame.mapcount);
        // Of a large one each page is shared or not.
        if frame.mapcount > 1 && !self.is_large(gpa) {
            let finding = finding(seen, "a folio that a device uses is shared", gpa)
                .expected("one mapping at most")
                .found(counts.clone());
            found.push(violation(INVARIANTS, ALONE, finding));
        }
        if frame.freed || frame.refcount < frame.mapcount.saturating_add(frame.pins) {
            let finding = finding(seen, "a folio that a device uses may be freed", gpa)
                .expected("a reference for each pin and each mapping")
                .found(format!("{counts}, refcount {}", frame.refcount));
            found.push(violation(INVARIANTS, PINNED, finding));
        }
    }

    fn refcount(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [gpa, new, ..] = seen.event.args;
        let Some(frame) = self.frames.get_mut(gpa) else {
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
        frame.tell(gpa, &mut self.told);
        let frame = *frame;
        if new > 0 {
            judge(seen, gpa, &frame, found);
            self.judge_pins(seen, gpa, &frame, found);
        }
    }

    fn free(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [gpa, _, kind, ..] = seen.event.args;
        if self.is_large(gpa) {
            self.large.remove(gpa);
            let pages = gpa..gpa + HUGE_PAGE_SIZE;
            self.pages.retain(|page, _| !pages.contains(&page));
        }
        if !is_counted(kind) {
            self.frames.remove(gpa);
            return;
        }
        let (frame, _) = self.frames.entry(gpa, Frame::default());
        if frame.entries > 0 || frame.mapcount > 0 {
            let finding = finding(seen, "a folio that is mapped is freed", gpa)
                .expected("no mapping")
                .found(format!(
                    "{} entries map it, its mapcount is {}",
                    frame.entries, frame.mapcount
                ));
            found.push(violation(INVARIANTS, FREED, finding));
        }
        if frame.pins > 0 {
            let finding = finding(seen, "a folio that a device uses is freed", gpa)
                .expected("no pin")
                .found(format!("{} pins", frame.pins));
            found.push(violation(INVARIANTS, PINNED, finding));
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
        for (gpa, difference) in self.sections[seen.vcpu].changed.drain(..) {
            if difference == 0 {
                continue;
            }
            let Some(frame) = self.frames.get(gpa) else {
                continue;
            };
            let title = "mapcount and entries did not change together";
            let finding = finding(seen, title, gpa)
                .expected("as many mappings more or less as entries")
                .found(format!(
                    "{}: {} now, mapcount {}",
                    off_by(difference),
                    entries(frame.entries.into()),
                    frame.mapcount
                ));
            found.push(violation(INVARIANTS, TOGETHER, finding));
        }
    }
}

impl Folios {
    pub(super) const FOLLOWS: Kinds = Kinds::of(&[
        EventKind::FrameAlloc,
        EventKind::FrameFree,
        EventKind::PteChange,
        EventKind::MapcountChange,
        EventKind::RefcountChange,
        EventKind::FolioSplit,
        EventKind::Pin,
        EventKind::LockAcquire,
        EventKind::LockRelease,
        EventKind::SyscallExit,
        EventKind::FaultExit,
    ])
    .of_locks(&[LockClass::PageTable]);
}

impl Monitor for Folios {
    fn fork(&self) -> Box<dyn Monitor> {
        Box::new(self.clone())
    }
    fn start(&mut self, memory: &dyn PhysMem, kernel_root: u64, nr_vcpus: usize) {
        self.start.clear();
        self.large_at_start.clear();
        self.pages_at_start.clear();
        let zero = memory.field(kernel_root, offset_of!(KernelRoot, zero_frame));
        let counted = tlb::leaf_frames(memory, kernel_root).into_iter();
        // Nobody counts the zero page's mappings.
        for (page, level) in counted.filter(|(gpa, _)| *gpa != zero) {
            let gpa = head_in(memory, kernel_root, page);
            if order_in(memory, kernel_root, gpa) == HUGE_ORDER {
                self.large_at_start.insert(gpa, ());
                if level == 1 {
                    *self.pages_at_start.entry(page, 0).0 += 1;
                }
            }
            let fresh = counts(memory, kernel_root, gpa);
            self.start.entry(gpa, fresh).0.entries += 1;
        }
        self.sections = vec![Section::default(); nr_vcpus];
        self.reset();
    }
    fn reset(&mut self) {
        self.frames.clone_from(&self.start);
        self.large.clone_from(&self.large_at_start);
        self.pages.clone_from(&self.pages_at_start);
        self.told.clear();
        for section in &mut self.sections {
            section.locks = 0;
            section.changed.clear();
        }
    }
    fn follows(&self) -> Kinds {
        Self::FOLLOWS
    }
    #[inline(always)]
    fn take(&mut self, kind: EventKind, seen: &Seen, found: &mut Vec<Violation>) {
        if seen.vcpu >= self.sections.len() {
            return;
        }
        let args = seen.event.args;
        let of_table = args[1] == LockClass::PageTable as u64;
        match kind {
            EventKind::FrameAlloc if is_counted(args[2]) => {
                let fresh = Frame {
                    refcount: 1,
                    ..Frame::default()
                };
                self.frames.insert(args[0], fresh);
                if args[1] == u64::from(HUGE_ORDER) {
                    self.large.insert(args[0], ());
                }
            }
            EventKind::FrameFree => self.free(seen, found),
            EventKind::PteChange => self.pte_change(seen),
            EventKind::MapcountChange => self.mapcount(seen, found),
            EventKind::RefcountChange => self.refcount(seen, found),
            EventKind::FolioSplit => self.split(args[0], args[2]),
            EventKind::Pin => self.pin(seen, found),
            EventKind::LockAcquire if of_table => self.sections[seen.vcpu].locks += 1,
            EventKind::LockRelease if of_table => {
                let section = &mut self.sections[seen.vcpu];
                section.locks = section.locks.saturating_sub(1);
                if section.locks == 0 {
                    self.section_over(seen, found);
                }
            }
            EventKind::SyscallExit | EventKind::FaultExit => self.section_over(seen, found),
            _ => {}
        }
    }
    fn compare(&mut self, memory: &dyn PhysMem, kernel_root: u64, found: &mut Vec<Violation>) {
        self.told.sort_unstable();
        self.told.dedup();
        for gpa in &self.told {
            let Some(told) = self.frames.get(*gpa).filter(|frame| !frame.freed) else {
                continue;
            };
            let is = counts(memory, kernel_root, *gpa);
            let counts = |f: &Frame| (f.refcount, f.mapcount, f.pins);
            if counts(told) != counts(&is) {
                let text = |f: &Frame| {
                    let (references, mappings, pins) = counts(f);
                    format!("refcount {references}, mapcount {mappings}, {pins} pins")
                };
                let title = format!("unexplained counts of frame {:#x}", gpa / PAGE_SIZE);
                let finding = Finding::new(title).expected(text(told)).found(text(&is));
                let finding = finding.frame(gpa >> PAGE_SHIFT);
                found.push(violation(INVARIANTS, EXPLAINED, finding));
                return;
            }
        }
    }
}

fn judge(seen: &Seen, gpa: u64, frame: &Frame, found: &mut Vec<Violation>) {
    if frame.refcount < frame.mapcount && !frame.freed {
        let finding = finding(seen, "a folio has fewer references than mappings", gpa)
            .expected(format!("at least {} references", frame.mapcount))
            .found(frame.refcount.to_string());
        found.push(violation(INVARIANTS, REFERENCES, finding));
    }
}

/// True where frames of `kind`, an argument of an event, count their mappings.
fn is_counted(kind: u64) -> bool {
    FrameKind::from_u64(kind).is_some_and(FrameKind::is_user)
}

/// Where the kernel's descriptor of the frame at `gpa` lies.
fn descriptor(memory: &dyn PhysMem, kernel_root: u64, gpa: u64) -> u64 {
    let folios = memory.field(kernel_root, offset_of!(KernelRoot, folios));
    let index = (gpa >> PAGE_SHIFT).wrapping_mul(size_of::<Folio>() as u64);
    folios.wrapping_add(index)
}

fn order_in(memory: &dyn PhysMem, kernel_root: u64, gpa: u64) -> u8 {
    let word = memory.field(descriptor(memory, kernel_root, gpa), 0);
    (word >> (8 * offset_of!(Folio, order))) as u8
}

/// The folio that memory says the frame at `gpa` is a page of.
fn head_in(memory: &dyn PhysMem, kernel_root: u64, gpa: u64) -> u64 {
    let word = memory.field(descriptor(memory, kernel_root, gpa), 0);
    let kind = (word >> (8 * offset_of!(Folio, kind))) as u8;
    if kind == FrameKind::Tail as u8 {
        gpa & !(HUGE_PAGE_SIZE - 1)
    } else {
        gpa
    }
}

/// What the kernel's descriptor of a frame says.
fn counts(memory: &dyn PhysMem, kernel_root: u64, gpa: u64) -> Frame {
    let folio = descriptor(memory, kernel_root, gpa);
    let count = |offset: usize| memory.half(folio, offset).into();
    Frame {
        mapcount: count(offset_of!(Folio, mapcount)),
        refcount: count(offset_of!(Folio, refcount)),
        pins: count(offset_of!(Folio, pins)),
        ..Frame::default()
    }
}

fn off_by(difference: i64) -> String {
    let which = if difference > 0 { "many" } else { "few" };
    format!("{} too {which}", entries(difference.unsigned_abs()))
}

fn entries(count: u64) -> String {
    match count {
        1 => "1 entry".into(),
        n => format!("{n} entries"),
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
        found(steps).iter().map(|violation| violation.id).collect()
    }

    fn found(steps: &[(usize, K, [u64; 5])]) -> Vec<Violation> {
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
        found
    }

    #[test]
    fn how_far_mapcount_and_entries_are_apart_is_told_in_words() {
        let said = |steps: &[(usize, K, [u64; 5])]| found(steps)[0].finding.found.clone();
        let mapped = [
            alloc(),
            lock(),
            map(),
            mapcount(0, 1),
            refcount(1),
            unlock(),
        ];
        let early = [&mapped[..], &[lock(), unmap(), unlock()]].concat();
        assert_eq!(said(&early), "1 entry too few: 0 entries now, mapcount 1");
        let uncounted = [alloc(), lock(), map(), unlock()];
        let told = said(&uncounted);
        assert_eq!(told, "1 entry too many: 1 entry now, mapcount 0");
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
    fn pages_of_a_large_folio_are_counted_at_its_head_until_it_is_split() {
        let head = HUGE_PAGE_SIZE;
        let page = head + 5 * PAGE_SIZE;
        let entry = |gpa: u64| Pte::new(gpa, PteFlags::PRESENT).0;
        let order = u64::from(HUGE_ORDER);
        let made = (0, K::FrameAlloc, [head, order, ANON, 0, 0]);
        let count = |gpa: u64, new: u64| (0, K::MapcountChange, [gpa, new, 0, 0, 0]);
        let set = |gpa: u64| (0, K::PteChange, [1, gpa, 1, 0, entry(gpa)]);
        let clear = |gpa: u64| (0, K::PteChange, [1, gpa, 1, entry(gpa), 0]);
        let references = |gpa: u64, new: u64| (0, K::RefcountChange, [gpa, new, 0, 0, 0]);
        let mapped = [
            made,
            references(head, 2),
            lock(),
            count(head, 2),
            set(head),
            set(page),
            unlock(),
        ];
        assert_eq!(ids(&mapped), [""; 0]);
        let whole = [lock(), clear(page), count(head, 1), unlock()];
        assert_eq!(ids(&[&mapped[..], &whole].concat()), [""; 0]);
        let wrong = [lock(), clear(page), count(page, 0), unlock()];
        assert_eq!(
            ids(&[&mapped[..], &wrong].concat()),
            ["F-01"],
            "the head counts"
        );
        let split = (0, K::FolioSplit, [head, order, 0, 0, 0]);
        let apart = [&mapped[..], &[split]].concat();
        assert_eq!(ids(&[&apart[..], &wrong].concat()), [""; 0]);
        assert_eq!(ids(&[&apart[..], &whole].concat()), ["F-01"]);
        let unmapped = (0, K::FrameFree, [head + PAGE_SIZE, 0, ANON, 0, 0]);
        assert_eq!(ids(&[&apart[..], &[unmapped]].concat()), [""; 0]);
        let freed = (0, K::FrameFree, [page, 0, ANON, 0, 0]);
        assert_eq!(ids(&[&apart[..], &[freed]].concat()), ["F-02"]);
    }

    fn pins(new: u64) -> (usize, K, [u64; 5]) {
        (1, K::Pin, [FRAME, new, 0, 0, 0])
    }

    #[test]
    fn a_folio_freed_under_a_device_is_f_10() {
        let mapped = [alloc(), lock(), mapcount(0, 1), map(), unlock()];
        let pinned = [&mapped[..], &[refcount(2), pins(1)]].concat();
        let unmapped = [lock(), unmap(), mapcount(0, 0), unlock(), refcount(1)];
        let kept = [&pinned[..], &unmapped].concat();
        let over = [pins(0), refcount(0), free()];
        assert_eq!(ids(&[&kept[..], &over].concat()), [""; 0]);
        assert_eq!(ids(&[&kept[..], &[free()]].concat()), ["F-10"]);
        assert_eq!(ids(&[&mapped[..], &[pins(1)]].concat()), ["F-10"]);
        let early = [&pinned[..], &[refcount(1)]].concat();
        assert_eq!(ids(&early), ["F-10"], "the reference goes before the pin");
    }

    #[test]
    fn a_folio_shared_with_a_device_at_work_is_f_11() {
        let mapped = [alloc(), lock(), mapcount(0, 1), map(), unlock()];
        let share = [refcount(3), lock(), mapcount(0, 2), map(), unlock()];
        let pinned = [refcount(2), pins(1)];
        let fork = [&mapped[..], &pinned, &share].concat();
        assert_eq!(ids(&fork), ["F-11"], "fork shares it");
        let shared = [refcount(2), lock(), mapcount(0, 2), map(), unlock()];
        let late = [&mapped[..], &shared, &[refcount(3), pins(1)]].concat();
        assert_eq!(ids(&late), ["F-11"], "pinned when it is shared");
        let over = [&mapped[..], &pinned, &[pins(0), refcount(1)], &shared].concat();
        assert_eq!(ids(&over), [""; 0]);
    }

    #[test]
    fn more_mappings_than_references_are_f_03() {
        assert_eq!(ids(&[alloc(), mapcount(0, 1), mapcount(0, 2)]), ["F-03"]);
        let shared = [alloc(), mapcount(0, 1), refcount(2), mapcount(0, 2)];
        assert_eq!(ids(&shared), [""; 0]);
        assert_eq!(ids(&[&shared[..], &[refcount(1)]].concat()), ["F-03"]);
    }
}
