//! What is in flight is left out, with its reason, and nothing else is.

use std::sync::atomic::Ordering::Relaxed;

use abi::objects::{AnonVma, FrameKind, Mm, Pa, RwLockWord};
use abi::point::Point;
use abi::pte::PteFlags;

use crate::check::world::{DATA, LARGE_FRAME, TEXT, World};
use crate::inspect::Stop;

/// Reasons for which `id` skipped something.
fn skips(world: &World, id: &str) -> Vec<String> {
    let skipped = world
        .judge()
        .skipped
        .into_iter()
        .filter(|skipped| skipped.id == id);
    skipped.map(|skipped| skipped.reason).collect()
}

fn examined(world: &World, id: &str) -> u64 {
    let checked = world.judge().checked;
    checked
        .iter()
        .find(|checked| checked.id == id)
        .map_or(0, |checked| checked.examined)
}

/// Takes the lock of the parent's level-1 table for `gva`, and says which that is.
fn lock_table(world: &World, gva: u64) -> u64 {
    let table = world.pte(world.entry(world.parent, gva, 2)).address() / 4096;
    world.folio(table, |folio| folio.lock.store(1, Relaxed));
    table
}

fn violated(world: &World) -> Vec<&'static str> {
    world.violated().into_keys().collect()
}

#[test]
fn a_table_lock_excuses_the_counts_of_its_own_mm_only() {
    let mut world = World::new();
    world.vcpus[0].cpl = 0;
    world.vcpus[0].stop = Stop::Point(Point::PteInstall);
    let table = lock_table(&world, DATA);
    world.update::<Mm, _>(world.parent, |mm| mm.rss.fetch_add(1, Relaxed));
    assert_eq!(violated(&world), [""; 0]);
    assert_eq!(
        skips(&world, "P-13"),
        [format!("mm 1: lock of table {table:#x} is held")]
    );
    assert_eq!(
        examined(&world, "P-13"),
        1,
        "the child is judged all the same"
    );

    world.update::<Mm, _>(world.child, |mm| mm.rss.fetch_add(1, Relaxed));
    assert_eq!(violated(&world), ["P-13"]);
}

#[test]
fn a_vcpu_inside_the_kernel_without_a_lock_excuses_no_count() {
    let mut world = World::new();
    world.vcpus[0].cpl = 0;
    world.vcpus[0].stop = Stop::Anywhere;
    world.update::<Mm, _>(world.parent, |mm| mm.rss.fetch_add(1, Relaxed));
    let own = world.mapped_frame(world.child, DATA + 4096);
    world.folio(own, |folio| folio.mapcount.store(0, Relaxed));
    assert_eq!(violated(&world), ["P-13", "R-01"]);
}

/// The kernel is about to count a mapping that it has made, or the reverse.
#[test]
fn each_holder_of_a_table_lock_excuses_one_folio() {
    let mut world = World::new();
    world.vcpus[0].cpl = 0;
    world.vcpus[0].stop = Stop::Point(Point::MapcountChange);
    let table = lock_table(&world, DATA);
    let miscount = |gva| {
        let frame = world.mapped_frame(world.child, gva);
        world.folio(frame, |folio| folio.mapcount.fetch_sub(1, Relaxed));
    };
    miscount(DATA);
    assert_eq!(violated(&world), [""; 0]);
    assert_eq!(
        skips(&world, "R-01"),
        [format!("mm 1: lock of table {table:#x} is held")]
    );
    assert!(examined(&world, "R-01") > 1, "the other folios are judged");
    miscount(DATA + 4096);
    assert_eq!(violated(&world), ["R-01"]);
}

/// Parent and child unmap the same page at once: both entries are gone and neither is counted yet.
#[test]
fn two_holders_may_work_on_one_folio() {
    let mut world = World::new();
    world.vcpus[0].cpl = 0;
    world.vcpus[0].stop = Stop::Point(Point::MapcountChange);
    lock_table(&world, DATA);
    let frame = world.mapped_frame(world.child, DATA);
    world.folio(frame, |folio| folio.mapcount.fetch_sub(2, Relaxed));
    assert_eq!(violated(&world), ["R-01"], "one holder is not enough");
    let table = world.pte(world.entry(world.child, DATA, 2)).address() / 4096;
    world.folio(table, |folio| folio.lock.store(2, Relaxed));
    assert_eq!(violated(&world), [""; 0]);
    assert_eq!(skips(&world, "R-01").len(), 1);
}

#[test]
fn a_table_lock_never_excuses_a_count_that_is_off_by_two() {
    let world = World::new();
    lock_table(&world, DATA);
    let frame = world.mapped_frame(world.child, DATA);
    world.folio(frame, |folio| folio.mapcount.fetch_add(2, Relaxed));
    let violated = violated(&world);
    assert!(violated.contains(&"R-01"), "{violated:?}");
}

/// A split has counted the small entries, and has not linked their table.
#[test]
fn a_table_lock_excuses_the_split_of_2_mib() {
    let world = World::new();
    let split = |mapcount| {
        world.folio(LARGE_FRAME, |folio| {
            folio.mapcount.store(mapcount, Relaxed);
            folio.refcount.store(mapcount, Relaxed);
        });
    };
    split(513);
    let violated_now = violated(&world);
    assert!(violated_now.contains(&"R-01"), "{violated_now:?}");
    lock_table(&world, DATA);
    assert!(!violated(&world).contains(&"R-01"));
    split(512);
    assert!(
        violated(&world).contains(&"R-01"),
        "one small entry is missing"
    );
}

/// fork has made a folio shared and is about to take the permission away.
#[test]
fn a_table_lock_excuses_the_writable_entries_of_its_table_only() {
    let mut world = World::new();
    world.vcpus[0].cpl = 0;
    world.vcpus[0].stop = Stop::Point(Point::MapcountChange);
    let frame = world.mapped_frame(world.child, DATA + 4096);
    world.folio(frame, |folio| folio.flags.store(0, Relaxed));
    lock_table(&world, DATA);
    assert_eq!(violated(&world), ["R-08"], "that lock is the parent's");
    let table = world.pte(world.entry(world.child, DATA, 2)).address() / 4096;
    world.folio(table, |folio| folio.lock.store(1, Relaxed));
    assert_eq!(violated(&world), [""; 0]);
    assert_eq!(skips(&world, "R-08").len(), 2, "one for each table");
}

/// A fault is about to link a table that it has made, or an unmap to free one.
#[test]
fn mmap_lock_excuses_a_table_that_is_linked_nowhere() {
    let mut world = World::new();
    world.vcpus[0].cpl = 0;
    world.vcpus[0].stop = Stop::Point(Point::FrameAlloc);
    let frame = world.frame_of_kind(FrameKind::PerCpu);
    world.folio(frame, |folio| {
        folio.kind.store(FrameKind::Table as u8, Relaxed);
        folio.owner.store(world.parent, Relaxed);
        folio.refcount.store(1, Relaxed);
    });
    assert!(violated(&world).contains(&"P-10"));
    world.update::<Mm, _>(world.parent, |mm| mm.mmap_lock.store(1, Relaxed));
    assert!(!violated(&world).contains(&"P-10"));
    assert!(skips(&world, "P-10")[0].ends_with("mmap_lock is held for reading"));
}

/// An unmap has taken a VMA out of the tree and not yet cleared its entries.
#[test]
fn a_writer_excuses_entries_outside_every_vma() {
    let mut world = World::new();
    world.vcpus[0].cpl = 0;
    world.vcpus[0].stop = Stop::Point(Point::VmaDetach);
    world.update::<Mm, _>(world.child, |mm| {
        mm.mmap_lock.store(RwLockWord::WRITER, Relaxed);
        mm.vmas.set(Pa::NULL);
    });
    assert_eq!(violated(&world), [""; 0]);
    for id in ["P-01", "P-02", "R-05", "R-06", "R-07", "V-03"] {
        assert_eq!(
            skips(&world, id),
            ["mm 2: mmap_lock is held for writing"],
            "{id}"
        );
        assert_ne!(examined(&world, id), 0, "{id}: the parent is judged");
    }
}

#[test]
fn a_family_lock_excuses_the_lists_of_the_family() {
    let mut world = World::new();
    world.vcpus[0].cpl = 0;
    let all = examined(&world, "R-06");
    let snapshot = world.snapshot();
    let root = snapshot
        .anon_vmas
        .values()
        .find(|anon_vma| anon_vma.gpa == anon_vma.root)
        .expect("a family has a root");
    world.update::<AnonVma, _>(root.gpa, |root| root.lock.store(1, Relaxed));
    let skipped = skips(&world, "R-06");
    assert!(
        skipped[0].starts_with("the lock of anon_vma"),
        "{skipped:?}"
    );
    assert!(examined(&world, "R-06") < all);
}

#[test]
fn the_books_of_the_allocator_are_judged_at_every_point() {
    let mut world = World::new();
    world.vcpus[0].cpl = 0;
    world.root(|root| root.free_frames.fetch_add(1, Relaxed));
    world.vcpus[0].stop = Stop::Point(Point::FrameAlloc);
    assert_eq!(violated(&world), ["P-23"]);
    world.vcpus[0].stop = Stop::Anywhere;
    assert_eq!(violated(&world), [""; 0]);
    assert_eq!(
        skips(&world, "P-23"),
        ["vCPU 0 is inside the kernel, between two points"]
    );
}

#[test]
fn a_cpu_between_two_points_may_be_loading_an_mm() {
    let mut world = World::new();
    world.vcpus[0].cpl = 0;
    world.vcpus[0].cr3 = world.snapshot().root.pgd;
    world.vcpus[0].stop = Stop::Anywhere;
    assert_eq!(violated(&world), [""; 0]);
    assert_eq!(skips(&world, "L-02").len(), 1);
    world.vcpus[0].stop = Stop::Point(Point::FrameFree);
    assert_eq!(violated(&world), ["L-02"]);
}

#[test]
fn the_points_around_an_operation_excuse_nothing() {
    for point in [
        Point::SyscallEnter,
        Point::SyscallExit,
        Point::FaultEnter,
        Point::FaultExit,
        Point::IdleEnter,
    ] {
        let mut world = World::new();
        world.vcpus[1].stop = Stop::Point(point);
        assert_eq!(skips(&world, "P-23"), [""; 0], "{point:?}");
    }
}

/// A lock that nobody can release is no excuse for anything.
#[test]
fn a_lock_that_is_held_outside_the_kernel_is_a_violation_of_its_own() {
    let world = World::new();
    world.update::<Mm, _>(world.parent, |mm| {
        mm.mmap_lock.store(2, Relaxed);
        mm.map_count.fetch_add(1, Relaxed);
    });
    assert_eq!(violated(&world), ["L-14", "V-03"]);
}

#[test]
fn an_mm_without_a_task_is_being_built_or_torn_down() {
    let mut world = World::new();
    world.vcpus[0].cpl = 0;
    let task = world.root(|root| root.tasks.get());
    world.update::<abi::objects::Task, _>(task.0, |task| task.mm.set(Pa::NULL));
    world.update::<Mm, _>(world.child, |mm| mm.count.store(0, Relaxed));
    assert_eq!(violated(&world), [""; 0]);
    assert!(skips(&world, "L-07")[0].starts_with("mm 2: has no task"));
}

#[test]
fn an_unknown_vcpu_excuses_what_it_may_be_doing() {
    let mut world = World::new();
    world.vcpus.pop();
    assert_eq!(skips(&world, "P-23"), ["nothing is known of vCPU 1"]);
}

#[test]
fn what_always_holds_is_never_excused() {
    let mut world = World::new();
    world.vcpus[0].cpl = 0;
    let frame = world.mapped_frame(world.parent, TEXT);
    world.folio(frame, |folio| {
        folio.kind.store(FrameKind::PerCpu as u8, Relaxed);
    });
    assert_eq!(world.violated().into_keys().collect::<Vec<_>>(), ["P-04"]);
}

/// munmap took the VMA out and has yet to clear the entry; fork forgot to write-protect it.
#[test]
fn a_writer_does_not_excuse_a_shared_page_that_is_writable() {
    let mut world = World::new();
    world.vcpus[0].cpl = 0;
    world.vcpus[0].stop = Stop::Point(Point::ForkCopy);
    world.update::<Mm, _>(world.child, |mm| {
        mm.mmap_lock.store(RwLockWord::WRITER, Relaxed);
    });
    world.change_pte(world.child, DATA, 1, |entry| {
        entry.with(PteFlags::WRITE).without(PteFlags::COW)
    });
    assert_eq!(violated(&world), ["R-08"]);
}
