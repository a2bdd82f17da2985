//! The way back from a folio on the stream (family A): the host walks the kernel's own rmap and finds the entries that the
//! events have told.
//!
//! Reclaim, migration and truncation trust `rmap_walk` to find every entry of a folio; one that it misses stays mapped
//! to a frame that is reused. So the host does that walk itself, over the kernel's anon_vmas, chains and VMAs in guest
//! memory (Linux mm/rmap.c, rmap_walk_anon): at the end of every schedule for all folios, and at the first few stops in
//! which something has changed for those whose entries have. What somebody is changing under a lock is not judged.

use std::mem::offset_of;

use abi::channel::EventKind;
use abi::layout::{HUGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE};
use abi::objects::{
    AnonVma, AnonVmaChain, File, Folio, FrameKind, KernelRoot, Mm, RwLockWord, Vma, VmaRefs,
};
use abi::pte::{Pte, index};

use super::words::{Word as _, Words, mms};
use super::{Kinds, Monitor, Rule, Seen, tlb, violation};
use crate::check::{Finding, Violation};
use crate::map::{Map, Set};
use crate::memory::PhysMem;

/// IDs and predicates.
pub const INVARIANTS: &[Rule] = &[
    (
        FINDS,
        "a walk back from a folio finds the entries that map it, all of them and no other",
    ),
    (
        ALIVE,
        "a walk back from a folio passes only what is alive: its anon_vma, chains, attached VMAs, mms",
    ),
];

const FINDS: &str = "A-01";
const ALIVE: &str = "A-02";

/// Stops at which a schedule is looked at before its end: a look costs about a microsecond for each folio.
const LOOKS: u32 = 4;
/// Chains that one look follows at most, and tables that it enters to see whether one is locked: the guest may have
/// tied them into a loop.
const MAX_CHAINS: u32 = 1 << 16;
const MAX_TABLES: u32 = 1 << 14;
/// Most frames that are looked at after one step, and most that are judged at the end: more change in no step,
/// and the first one that is wrong says it all.
const MAX_FRAMES: usize = 1 << 10;
const MAX_JUDGED: usize = 1 << 6;
/// Most places at which a finding says that a frame is mapped.
const MAX_MAPPINGS: usize = 8;

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Rmap {
    /// The zero page, from which no walk goes back.
    zero: u64,
    start: Map<u32>,
    /// Present leaf entries that the events have told, by the frame that they map.
    entries: Map<u32>,
    /// Frames whose entries have changed since the last look.
    changed: Set,
    looks: u32,
}

impl Rmap {
    fn change(&mut self, frame: u64, by: i32) {
        let (entries, _) = self.entries.entry(frame, 0);
        *entries = entries.saturating_add_signed(by);
        if self.looks > 0 && self.changed.len() < MAX_FRAMES {
            self.changed.insert(frame, ());
        }
    }

    /// True where a walk back from `frame` finds what it should.
    fn is_well(&self, guest: &mut Guest<'_>, frame: u64) -> bool {
        let told = self.entries.get(frame).copied().unwrap_or(0);
        told == 0 || guest.walk_back(frame) == Ok(told)
    }

    fn look(&self, guest: &mut Guest<'_>, frame: u64, found: &mut Vec<Violation>) {
        if self.is_well(guest, frame) || guest.is_busy(frame) {
            return;
        }
        let (id, finding) = match guest.walk_back(frame) {
            Ok(walked) => {
                let title = "a walk back from a folio does not find its entries";
                let finding = finding(guest, title, frame).found(format!("{walked} entries"));
                (FINDS, finding)
            }
            Err((kind, at)) => {
                let title = format!("a walk back from a folio meets a {kind} that is not alive");
                let finding = finding(guest, &title, frame).found(format!("{kind} at {at:#x}"));
                (ALIVE, finding.object(kind, at))
            }
        };
        let told = self.entries.get(frame).copied().unwrap_or(0);
        let finding = finding.expected(format!("{told} entries, as the events told"));
        found.push(violation(INVARIANTS, id, finding));
    }
}

impl Rmap {
    pub(super) const FOLLOWS: Kinds = Kinds::of(&[EventKind::PteChange]);
}

impl Monitor for Rmap {
    fn fork(&self) -> Box<dyn Monitor> {
        Box::new(self.clone())
    }
    fn start(&mut self, memory: &dyn PhysMem, kernel_root: u64, _: usize) {
        self.start.clear();
        self.zero = memory.field(kernel_root, offset_of!(KernelRoot, zero_frame));
        for (frame, _) in tlb::leaf_frames(memory, kernel_root) {
            if frame != self.zero {
                *self.start.entry(frame, 0).0 += 1;
            }
        }
        self.reset();
    }
    fn reset(&mut self) {
        self.entries.clone_from(&self.start);
        self.changed.clear();
        self.looks = LOOKS;
    }
    fn follows(&self) -> Kinds {
        Self::FOLLOWS
    }
    #[inline(always)]
    fn take(&mut self, kind: EventKind, seen: &Seen, _: &mut Vec<Violation>) {
        if kind != EventKind::PteChange {
            return;
        }
        let [_, _, level, old, new] = seen.event.args;
        let level = level.clamp(1, 4) as u8;
        // An entry of 2 MiB counts for the first frame that it maps.
        let maps = |entry: Pte| {
            let is_leaf = entry.is_present() && entry.is_leaf(level);
            is_leaf.then(|| entry.leaf_address(level))
        };
        let (old, new) = (maps(Pte(old)), maps(Pte(new)));
        if old != new {
            for (frame, by) in [(old, -1), (new, 1)] {
                if let Some(frame) = frame.filter(|frame| *frame != self.zero) {
                    self.change(frame, by);
                }
            }
        }
    }
    fn settled(&mut self, memory: &dyn PhysMem, kernel_root: u64, found: &mut Vec<Violation>) {
        if self.looks == 0 || self.changed.is_empty() {
            return;
        }
        self.looks -= 1;
        let mut guest = Guest::new(memory, kernel_root);
        let before = found.len();
        for (frame, ()) in self.changed.iter() {
            self.look(&mut guest, frame, found);
            if found.len() > before {
                break;
            }
        }
        self.changed.clear();
    }
    fn compare(&mut self, memory: &dyn PhysMem, kernel_root: u64, found: &mut Vec<Violation>) {
        let mut guest = Guest::new(memory, kernel_root);
        let frames = self.entries.iter().map(|(frame, _)| frame);
        let mut wrong: Vec<u64> = frames
            .filter(|frame| !self.is_well(&mut guest, *frame))
            .collect();
        wrong.sort_unstable();
        wrong.truncate(MAX_JUDGED);
        let before = found.len();
        for frame in wrong {
            self.look(&mut guest, frame, found);
            if found.len() > before {
                break;
            }
        }
    }
}

/// What is not alive, and where it lies.
type Dead = (&'static str, u64);

/// The kernel's objects in guest memory.
struct Guest<'m> {
    memory: &'m dyn PhysMem,
    words: Words<'m>,
    kernel_root: u64,
    folios: u64,
    /// Chains that may still be followed.
    left: u32,
    hits: Vec<(u64, u64)>,
}

impl<'m> Guest<'m> {
    fn new(memory: &'m dyn PhysMem, kernel_root: u64) -> Self {
        Self {
            memory,
            words: Words::of(memory),
            kernel_root,
            folios: memory.field(kernel_root, offset_of!(KernelRoot, folios)),
            left: MAX_CHAINS,
            hits: Vec::new(),
        }
    }

    /// The folio that the frame is a page of, and which page.
    fn folio_of(&self, frame: u64) -> (u64, u64) {
        let own = self.folio(frame);
        if self.kind(own) == FrameKind::Tail as u64 {
            let head = frame & !(HUGE_PAGE_SIZE - 1);
            (self.folio(head), (frame - head) >> PAGE_SHIFT)
        } else {
            (own, 0)
        }
    }

    fn folio(&self, frame: u64) -> u64 {
        let offset = (frame >> PAGE_SHIFT).wrapping_mul(size_of::<Folio>() as u64);
        self.folios.wrapping_add(offset)
    }

    fn kind(&self, folio: u64) -> u64 {
        self.words.field(folio, offset_of!(Folio, kind) & !7) & 0xff
    }

    /// True where the descriptor is that of a page of a file.
    fn is_file_page(&self, folio: u64) -> bool {
        self.kind(folio) == FrameKind::File as u64
    }

    /// How many entries a walk back from the folio of `frame` finds.
    fn walk_back(&mut self, frame: u64) -> Result<u32, Dead> {
        let (folio, page) = self.folio_of(frame);
        let words = self.words;
        let owner = words.field(folio, offset_of!(Folio, owner));
        let at = words
            .field(folio, offset_of!(Folio, index))
            .wrapping_add(page);
        self.hits.clear();
        if owner == 0 {
            return Ok(0);
        }
        if self.is_file_page(folio) {
            return self.walk_file(owner, at, frame);
        }
        self.alive("AnonVma", owner, offset_of!(AnonVma, generation))?;
        let mut next = words.field(owner, offset_of!(AnonVma, chains));
        while next != 0 && self.left > 0 {
            self.left -= 1;
            self.alive("AnonVmaChain", next, offset_of!(AnonVmaChain, generation))?;
            self.pass(words.field(next, offset_of!(AnonVmaChain, vma)), at, frame)?;
            next = words.field(next, offset_of!(AnonVmaChain, next_of_anon));
        }
        Ok(self.hits.len() as u32)
    }

    /// The same from page `at` of a file, by all VMAs of its tree.
    fn walk_file(&mut self, file: u64, at: u64, frame: u64) -> Result<u32, Dead> {
        let words = self.words;
        self.alive("File", file, offset_of!(File, generation))?;
        let mut left = vec![words.field(file, offset_of!(File, i_mmap))];
        while let Some(next) = left.pop() {
            if next == 0 || self.left == 0 {
                continue;
            }
            self.left -= 1;
            self.pass(next, at, frame)?;
            left.push(words.field(next, offset_of!(Vma, left_of_file)));
            left.push(words.field(next, offset_of!(Vma, right_of_file)));
        }
        Ok(self.hits.len() as u32)
    }

    /// A walk back from `frame`, whose page offset is `at`, comes to a VMA.
    fn pass(&mut self, vma: u64, at: u64, frame: u64) -> Result<(), Dead> {
        let words = self.words;
        self.alive("VMA", vma, offset_of!(Vma, generation))?;
        if !VmaRefs::is_attached(words.field(vma, offset_of!(Vma, refs))) {
            return Err(("VMA", vma));
        }
        let start = words.field(vma, offset_of!(Vma, start));
        let end = words.field(vma, offset_of!(Vma, end));
        let first = words.field(vma, offset_of!(Vma, pgoff));
        let offset = at.wrapping_sub(first);
        if at >= first && offset < end.wrapping_sub(start) >> PAGE_SHIFT {
            let mm = words.field(vma, offset_of!(Vma, mm));
            self.alive("mm", mm, offset_of!(Mm, generation))?;
            let pgd = words.field(mm, offset_of!(Mm, pgd));
            let gva = start.wrapping_add(offset << PAGE_SHIFT);
            // Two VMAs may cover one page for a moment: that is one entry.
            if self.maps(pgd, gva, frame) && !self.hits.contains(&(mm, gva)) {
                self.hits.push((mm, gva));
            }
        }
        Ok(())
    }

    /// The object at `gpa` is allocated: its generation is odd as long as it is.
    fn alive(&self, kind: &'static str, gpa: u64, generation: usize) -> Result<(), Dead> {
        match self.words.half(gpa, generation) % 2 {
            1 => Ok(()),
            _ => Err((kind, gpa)),
        }
    }

    fn maps(&self, pgd: u64, gva: u64, frame: u64) -> bool {
        let mut table = pgd;
        for level in [4, 3, 2, 1] {
            let entry = Pte(self.words.field(table, 8 * index(gva, level)));
            if !entry.is_present() {
                return false;
            }
            if entry.is_leaf(level) {
                // See `observe`.
                return entry.leaf_address(level) == frame;
            }
            table = entry.address();
        }
        false
    }

    /// True where somebody may be in the middle of changing what a walk back from `frame` passes: the VMAs
    /// of any mm, since a chain may lead to any; the entries of any; the lists of the family.
    fn is_busy(&self, frame: u64) -> bool {
        let memory = self.memory;
        let mut left = MAX_TABLES;
        let (folio, _) = self.folio_of(frame);
        let anon = self.words.field(folio, offset_of!(Folio, owner));
        let list = if self.is_file_page(folio) {
            memory.field(anon, offset_of!(File, i_mmap_lock))
        } else {
            let root = memory.field(anon, offset_of!(AnonVma, root));
            memory.field(root, offset_of!(AnonVma, lock))
        };
        list != 0
            || mms(memory, self.kernel_root).any(|mm| {
                let lock = memory.field(mm, offset_of!(Mm, mmap_lock));
                let pgd = memory.field(mm, offset_of!(Mm, pgd));
                lock & RwLockWord::WRITER != 0 || self.is_table_locked(pgd, 4, &mut left)
            })
    }

    fn is_table_locked(&self, table: u64, level: u8, left: &mut u32) -> bool {
        *left = left.saturating_sub(1);
        let lock = self.words.field(self.folio(table), offset_of!(Folio, lock));
        let user = if level == 4 { 256 } else { 512 };
        lock != 0
            || level > 1
                && *left > 0
                && self.memory.table(table).is_ok_and(|entries| {
                    let entries = entries[..user].iter();
                    entries
                        .map(|entry| Pte(entry.load(std::sync::atomic::Ordering::Relaxed)))
                        .filter(|entry| entry.is_present() && !entry.is_leaf(level))
                        .any(|entry| self.is_table_locked(entry.address(), level - 1, left))
                })
    }

    /// Who maps `frame`, found by a walk of all page tables.
    fn mappings(&self, frame: u64) -> Vec<String> {
        let mut all = tlb::leaf_addresses(self.memory, self.kernel_root, frame);
        all.truncate(MAX_MAPPINGS);
        all.into_iter()
            .map(|(mm, gva)| format!("mapped by mm {mm} at GVA {gva:#x}"))
            .collect()
    }
}

fn finding(guest: &Guest<'_>, title: &str, frame: u64) -> Finding {
    let places = guest.hits.iter();
    let walked = places.map(|(mm, gva)| format!("found at GVA {gva:#x} of the mm at {mm:#x}"));
    Finding::new(format!("{title}: frame {:#x}", frame / PAGE_SIZE))
        .frame(frame >> PAGE_SHIFT)
        .details(guest.mappings(frame))
        .details(walked)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use abi::channel::Event;
    use abi::objects::Pa;
    use abi::pte::NonPresent;

    use super::*;
    use crate::check::world::{DATA, ROOT_GPA, World};

    fn monitor(world: &World) -> Rmap {
        let mut rmap = Rmap::default();
        rmap.start(&world.memory, ROOT_GPA, 2);
        rmap
    }

    /// What the end of a schedule shows after `corrupt`.
    fn ids(corrupt: impl FnOnce(&mut World)) -> Vec<&'static str> {
        let mut world = World::new();
        let mut rmap = monitor(&world);
        corrupt(&mut world);
        let mut found = Vec::new();
        rmap.compare(&world.memory, ROOT_GPA, &mut found);
        found.iter().map(|violation| violation.id).collect()
    }

    fn shared(world: &World) -> u64 {
        world.mapped_frame(world.parent, DATA)
    }

    fn anon_of(world: &World) -> u64 {
        world.folio(shared(world), |folio| folio.owner.load(Relaxed))
    }

    #[test]
    fn a_sound_guest_is_clean() {
        assert_eq!(ids(|_| {}), [""; 0]);
    }

    #[test]
    fn a_chain_that_is_missing_is_a_01() {
        let cut = |world: &mut World| {
            let anon = anon_of(world);
            let first = world.object::<AnonVma>(anon).chains.get().0;
            let rest = world.object::<AnonVmaChain>(first).next_of_anon.get();
            world.update::<AnonVma, _>(anon, |anon| anon.chains.set(rest));
        };
        assert_eq!(ids(cut), ["A-01"]);
        assert_eq!(
            ids(|world| world.folio(shared(world), |folio| folio.index.store(0, Relaxed))),
            ["A-01"],
            "the wrong place"
        );
        // Somebody is changing the lists.
        let busy = |world: &mut World| {
            cut(world);
            let anon = anon_of(world);
            world.update::<AnonVma, _>(anon, |anon| anon.lock.store(1, Relaxed));
        };
        assert_eq!(ids(busy), [""; 0]);
        let writer = |world: &mut World| {
            cut(world);
            let word = RwLockWord::WRITER;
            world.update::<Mm, _>(world.child, |mm| mm.mmap_lock.store(word, Relaxed));
        };
        assert_eq!(ids(writer), [""; 0]);
    }

    #[test]
    fn a_walk_over_what_is_gone_is_a_02() {
        let detached = |world: &mut World| {
            let vma = world.vmas[&(world.child, DATA)];
            world.update::<Vma, _>(vma, |vma| vma.refs.store(VmaRefs::DETACHED, Relaxed));
        };
        assert_eq!(ids(detached), ["A-02"]);
        let freed = |world: &mut World| {
            let anon = anon_of(world);
            world.update::<AnonVma, _>(anon, |anon| anon.generation.store(2, Relaxed));
        };
        assert_eq!(ids(freed), ["A-02"]);
    }

    #[test]
    fn a_file_tree_that_misses_a_vma_or_holds_a_dead_one() {
        use crate::check::world::SHARED_FILE;
        let cut = |world: &mut World| {
            let first = world.object::<File>(world.file).i_mmap.get();
            let rest = world.object::<Vma>(first.0).right_of_file.get();
            world.update::<File, _>(world.file, |file| file.i_mmap.set(rest));
        };
        assert_eq!(ids(cut), ["A-01"]);
        let busy = |world: &mut World| {
            cut(world);
            world.update::<File, _>(world.file, |file| file.i_mmap_lock.store(1, Relaxed));
        };
        assert_eq!(ids(busy), [""; 0]);
        let detached = |world: &mut World| {
            let vma = world.vmas[&(world.child, SHARED_FILE)];
            world.update::<Vma, _>(vma, |vma| vma.refs.store(VmaRefs::DETACHED, Relaxed));
        };
        assert_eq!(ids(detached), ["A-02"]);
        let freed = |world: &mut World| {
            world.update::<File, _>(world.file, |file| file.generation.store(2, Relaxed));
        };
        assert_eq!(ids(freed), ["A-02"]);
    }

    #[test]
    fn chains_in_a_loop_and_links_into_nowhere_end() {
        let looped = |world: &mut World| {
            let first = world.object::<AnonVma>(anon_of(world)).chains.get();
            world.update::<AnonVmaChain, _>(first.0, |chain| chain.next_of_anon.set(first));
        };
        assert_eq!(ids(looped), ["A-01"]);
        let outside = |world: &mut World| {
            world.update::<AnonVma, _>(anon_of(world), |anon| anon.chains.set(Pa::new(!7)));
        };
        assert_eq!(ids(outside), ["A-02"]);
    }

    #[test]
    fn what_has_changed_is_looked_at_as_soon_as_all_stand_still_a_01() {
        let world = World::new();
        let mut rmap = monitor(&world);
        let entry = world.pte(world.entry(world.parent, DATA, 1)).0;
        // The event tells one more mapping than the rmap leads to.
        let event = Event {
            kind: EventKind::PteChange as u32,
            args: [7, DATA, 1, 0, entry],
            ..Event::default()
        };
        let mut found = Vec::new();
        rmap.settled(&world.memory, ROOT_GPA, &mut found);
        assert!(found.is_empty());
        rmap.observe(&Seen { vcpu: 0, event }, &mut found);
        rmap.settled(&world.memory, ROOT_GPA, &mut found);
        assert_eq!(found[0].id, "A-01");
        assert!(found[0].finding.details.len() >= 2, "{:?}", found[0]);
    }

    #[test]
    fn an_entry_that_says_where_its_page_was_maps_it_no_more_a_01() {
        let world = World::new();
        let mut rmap = monitor(&world);
        let entry = world.pte(world.entry(world.parent, DATA, 1));
        let said = NonPresent::Migration {
            gpa: entry.address(),
            flags: abi::pte::PteFlags::empty(),
        };
        let change = |old: Pte, new: Pte| Seen {
            vcpu: 0,
            event: Event {
                kind: EventKind::PteChange as u32,
                args: [7, DATA, 1, old.0, new.0],
                ..Event::default()
            },
        };
        let mut found = Vec::new();
        rmap.observe(&change(entry, said.entry()), &mut found);
        let mut back = rmap.clone();
        rmap.compare(&world.memory, ROOT_GPA, &mut found);
        assert_eq!(found.len(), 1, "memory still has the entry");
        assert_eq!(found.remove(0).id, "A-01");
        back.observe(&change(said.entry(), entry), &mut found);
        back.compare(&world.memory, ROOT_GPA, &mut found);
        assert!(found.is_empty());
    }
}
