//! A real guest that lies: a booted kernel's memory, with words of its objects, descriptors and page
//! tables overwritten. Whatever they say, looking at it ends, panics nowhere, and is bounded by the
//! size of memory.

use std::cell::Cell;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use abi::layout::{ENTRIES_PER_TABLE, PAGE_SIZE};
use abi::objects::{Folio, FrameKind};
use abi::point::Point;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};
use vmm::check::{self, Context, Findings, Moment, all};
use vmm::inspect::walk::{AddressSpace, KERNEL_HALF, USER_HALF};
use vmm::inspect::{MemoryImage, Snapshot, VcpuFacts, render};
use vmm::memory::PhysMem;
use vmm::scenario::Scenario;
use vmm::session::{self, Interrupt, Live, Place, Reached, Until};

/// A guest that was paused in the middle of forks, threads and faults.
struct Guest {
    memory: MemoryImage,
    root: u64,
    vcpus: Vec<VcpuFacts>,
    /// Words that say something: the root, objects, tables, descriptors of frames in use.
    words: Vec<u64>,
}

impl Guest {
    fn boot() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scenarios/cow-fork.toml");
        let mut scenario = Scenario::load(&path).expect("the scenario is sound");
        scenario.memory_bytes = 16 << 20;
        let mut live = Live::boot(&scenario, None, &Interrupt::default())
            .unwrap_or_else(|error| panic!("this test boots a guest on /dev/kvm: {error}"));
        let until = Until::Passage {
            point: Point::CowCopy,
            nth: 2,
            vcpu: None,
        };
        let reached = session::advance(&mut live, until, Duration::from_secs(60));
        let Ok(Reached::At(Some((vcpu, point)))) = reached else {
            panic!("{reached:?}");
        };
        let snapshot = live.snapshot().expect("the kernel is up");
        Self {
            memory: copy(live.memory()),
            root: snapshot.root.gpa,
            vcpus: live.vcpus(Place::Point(vcpu, point)).expect("paused"),
            words: words(&snapshot),
        }
    }

    /// Everything that reads a guest; returns the violations.
    fn look(&self, moment: Moment) -> u64 {
        let Ok(snapshot) = Snapshot::read(&self.memory, self.root) else {
            return 1;
        };
        let outcome = check::run(&Context::new(&self.memory, &snapshot, &self.vcpus, moment));
        let most = all().count() * Findings::MAX_REPORTED;
        assert!(outcome.violations.len() <= most);
        let report = render::machine(&self.memory, &snapshot, &self.vcpus);
        let mut text = format!("{outcome}{report}");
        for mm in snapshot.mms.iter().take(3) {
            text += &render::tree(&self.memory, mm.pgd, USER_HALF).to_string();
            if let Some(vma) = mm.vmas.first()
                && let Some((walk, frame)) =
                    render::folio_behind(&self.memory, &snapshot, mm.id, vma.start)
            {
                text += &walk.to_string();
                text += &frame.map_or(String::new(), |frame| frame.to_string());
            }
        }
        assert!(!text.is_empty());
        serde_json::to_string(&(outcome.clone(), report)).expect("JSON");
        outcome.checked.iter().map(|one| one.violated).sum()
    }
}

fn copy(from: &dyn PhysMem) -> MemoryImage {
    let image = MemoryImage::new(from.bytes());
    for gpa in (0..from.bytes()).step_by(PAGE_SIZE as usize) {
        let (from, to) = (from.table(gpa).unwrap(), image.table(gpa).unwrap());
        for (from, to) in from.iter().zip(to) {
            to.store(from.load(Relaxed), Relaxed);
        }
    }
    image
}

fn words(snapshot: &Snapshot) -> Vec<u64> {
    let told = |kind| matches!(kind, Some(FrameKind::Slab | FrameKind::Table));
    let frames = snapshot.folios.iter().filter(|folio| told(folio.kind()));
    let pages = frames.map(|folio| folio.gpa()..folio.gpa() + PAGE_SIZE);
    let in_use = snapshot.folios.iter().filter(|folio| folio.refcount != 0);
    let descriptors = in_use.map(|folio| {
        let bytes = size_of::<Folio>() as u64;
        let gpa = snapshot.root.folios + folio.frame * bytes;
        gpa..gpa + bytes
    });
    let root = snapshot.root.gpa & !7;
    let ranges = pages
        .chain(descriptors)
        .chain(std::iter::once(root..root + PAGE_SIZE));
    ranges.flat_map(|range| range.step_by(8)).collect()
}

/// What a word is overwritten with.
#[derive(Clone, Debug)]
enum Lie {
    Anything(u64),
    Small(u64),
    Flipped(u32),
    /// What another word of the guest says: a link or an entry that leads somewhere else.
    Copied(Index),
    /// The address of another word: a link into the middle of something.
    LinkTo(Index, u64),
}

fn lie() -> impl Strategy<Value = Lie> {
    prop_oneof![
        any::<u64>().prop_map(Lie::Anything),
        (0u64..600).prop_map(Lie::Small),
        (0u32..64).prop_map(Lie::Flipped),
        any::<Index>().prop_map(Lie::Copied),
        (any::<Index>(), 0u64..8).prop_map(|(at, flags)| Lie::LinkTo(at, flags)),
    ]
}

#[test]
fn a_booted_guest_that_lies_is_looked_at_to_the_end() {
    let guest = Mutex::new(Guest::boot());
    assert_eq!(guest.lock().unwrap().look(Moment::Paused), 0);
    let lies = prop::collection::vec((any::<Index>(), lie()), 1..60);
    let noticed = Cell::new(0);
    let config = Config {
        cases: 96,
        failure_persistence: None,
        ..Config::default()
    };
    TestRunner::new(config)
        .run(&(lies, any::<bool>()), |(lies, ended)| {
            let guest = guest.lock().unwrap();
            let mut saved = Vec::new();
            for (at, lie) in lies {
                let gpa = guest.words[at.index(guest.words.len())];
                let word = guest.memory.word(gpa).unwrap();
                let other = |at: Index| guest.words[at.index(guest.words.len())];
                let value = match lie {
                    Lie::Anything(value) | Lie::Small(value) => value,
                    Lie::Flipped(bit) => word.load(Relaxed) ^ 1 << bit,
                    Lie::Copied(at) => guest.memory.word(other(at)).unwrap().load(Relaxed),
                    Lie::LinkTo(at, flags) => other(at) | flags,
                };
                saved.push((gpa, word.swap(value, Relaxed)));
            }
            let moment = if ended {
                Moment::AfterExit
            } else {
                Moment::Paused
            };
            noticed.set(noticed.get() + u32::from(guest.look(moment) != 0));
            for (gpa, value) in saved.into_iter().rev() {
                guest.memory.word(gpa).unwrap().store(value, Relaxed);
            }
            Ok(())
        })
        .unwrap();
    assert_ne!(noticed.get(), 0, "nothing was ever noticed");
    assert_eq!(
        guest.lock().unwrap().look(Moment::Paused),
        0,
        "every lie was taken back"
    );
}

/// Work is bounded by memory even where every entry of every table leads to the next table.
#[test]
fn tables_that_all_lead_to_tables_are_entered_once_each() {
    let guest = Guest::boot();
    let snapshot = Snapshot::read(&guest.memory, guest.root).unwrap();
    let tables: Vec<_> = snapshot
        .folios
        .iter()
        .filter(|folio| folio.is(FrameKind::Table))
        .map(vmm::inspect::FolioView::gpa)
        .collect();
    for &table in &tables {
        let entries = guest.memory.table(table).unwrap();
        for slot in 0..ENTRIES_PER_TABLE {
            let next = tables[(table as usize / 64 + slot) % tables.len()];
            entries[slot].store(next | 0x27, Relaxed);
        }
    }
    for mm in &snapshot.mms {
        for half in [USER_HALF, KERNEL_HALF] {
            let space = AddressSpace::read(&guest.memory, mm.pgd, half);
            assert!(space.tables.len() <= tables.len());
            assert!(space.leaves.len() <= tables.len() * ENTRIES_PER_TABLE);
        }
    }
    assert_ne!(guest.look(Moment::Paused), 0);
}
