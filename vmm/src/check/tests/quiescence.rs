//! What is in flight is left out, with its reason, and nothing else is.

use std::sync::atomic::Ordering::Relaxed;

use abi::objects::{FrameKind, Mm, Pa, RwLockWord};
use abi::point::Point;

use crate::check::world::{DATA, TEXT, World};
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

#[test]
fn a_vcpu_in_the_kernel_excuses_its_own_mm_only() {
    let mut world = World::new();
    world.vcpus[0].cpl = 0;
    world.vcpus[0].stop = Stop::Point(Point::MapcountChange);
    // The kernel is about to count the child's and the parent's mapping.
    let frame = world.mapped_frame(world.parent, TEXT);
    world.folio(frame, |folio| folio.mapcount.store(0, Relaxed));
    world.update::<Mm, _>(world.parent, |mm| mm.rss.fetch_add(1, Relaxed));
    assert_eq!(world.violated().keys().next(), None);
    assert_eq!(
        skips(&world, "P-13"),
        ["mm 1: vCPU 0 is inside the kernel (at mapcount-change, task 1)"]
    );
    assert_eq!(
        examined(&world, "P-13"),
        1,
        "the child is judged all the same"
    );
    assert!(!skips(&world, "P-23").is_empty());

    world.update::<Mm, _>(world.child, |mm| mm.rss.fetch_add(1, Relaxed));
    assert_eq!(world.violated().into_keys().collect::<Vec<_>>(), ["P-13"]);
}

#[test]
fn folios_that_only_quiet_mms_map_are_judged() {
    let mut world = World::new();
    world.vcpus[0].cpl = 0;
    world.vcpus[0].stop = Stop::Anywhere;
    let own = world.mapped_frame(world.child, DATA + 4096);
    world.folio(own, |folio| folio.mapcount.store(0, Relaxed));
    assert_eq!(world.violated().into_keys().collect::<Vec<_>>(), ["R-01"]);
}

/// The kernel tears a forked child down: its VMAs have left the tree, its entry is cleared, and the
/// mapcount is about to follow. Nothing leads from the folio to that mm any more.
#[test]
fn an_unmap_in_the_middle_excuses_folios_that_it_no_longer_leads_to() {
    let world = World::new();
    world.update::<Mm, _>(world.child, |mm| {
        mm.mmap_lock.store(RwLockWord::WRITER, Relaxed);
        mm.vmas.set(Pa::NULL);
    });
    world.set_pte(world.entry(world.child, DATA, 1), abi::pte::Pte::NONE);
    assert_eq!(world.violated().keys().next(), None);
    assert_eq!(
        skips(&world, "R-01"),
        ["mm 2: mmap_lock is held for writing"]
    );
    assert_eq!(examined(&world, "R-01"), 0);
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

#[test]
fn a_writer_excuses_the_vmas() {
    let world = World::new();
    world.update::<Mm, _>(world.parent, |mm| {
        mm.mmap_lock.store(RwLockWord::WRITER, Relaxed);
        mm.map_count.fetch_add(1, Relaxed);
    });
    assert_eq!(
        skips(&world, "V-03"),
        ["mm 1: mmap_lock is held for writing"]
    );
    assert_eq!(world.violated().keys().next(), None);
}

#[test]
fn a_reader_excuses_the_tables_and_not_the_vmas() {
    let world = World::new();
    world.update::<Mm, _>(world.parent, |mm| {
        mm.mmap_lock.store(2, Relaxed);
        mm.map_count.fetch_add(1, Relaxed);
        mm.rss.fetch_add(1, Relaxed);
    });
    assert_eq!(
        skips(&world, "P-13"),
        ["mm 1: mmap_lock is held for reading"]
    );
    assert_eq!(world.violated().into_keys().collect::<Vec<_>>(), ["V-03"]);
}

#[test]
fn a_table_lock_excuses_its_mm() {
    let world = World::new();
    let table = world.pte(world.entry(world.parent, DATA, 2)).address();
    world.folio(table / 4096, |folio| folio.lock.store(1, Relaxed));
    let reason = format!("mm 1: lock of table {:#x} is held", table / 4096);
    assert_eq!(skips(&world, "P-13"), [reason]);
}

#[test]
fn an_unmap_that_has_yet_to_flush_excuses_its_mm() {
    let world = World::new();
    world.update::<Mm, _>(world.parent, |mm| mm.flush_pending.store(1, Relaxed));
    assert_eq!(skips(&world, "P-13"), ["mm 1: an unmap has yet to flush"]);
}

#[test]
fn a_shootdown_excuses_its_mm() {
    let world = World::new();
    world.cpu(0, |cpu| {
        cpu.flush.mm.set(Pa::new(world.parent));
        cpu.flush.pending.store(2, Relaxed);
    });
    assert_eq!(skips(&world, "P-13"), ["mm 1: CPU 0 waits for a shootdown"]);
}

#[test]
fn an_mm_without_a_task_is_being_built_or_torn_down() {
    let mut world = World::new();
    world.vcpus[0].cpl = 0;
    let task = world.root(|root| root.tasks.get());
    world.update::<abi::objects::Task, _>(task.0, |task| task.mm.set(Pa::NULL));
    world.update::<Mm, _>(world.child, |mm| mm.map_count.fetch_add(1, Relaxed));
    assert_eq!(world.violated().keys().next(), None);
    assert!(skips(&world, "V-03")[0].starts_with("mm 2: has no task"));
}

#[test]
fn locks_of_the_kernel_excuse_its_books() {
    let world = World::new();
    world.root(|root| {
        root.buddy_lock.store(1, Relaxed);
        root.free_frames.fetch_add(1, Relaxed);
    });
    assert_eq!(skips(&world, "P-23"), ["the buddy lock is held (word 0x1)"]);
    assert!(world.judge().is_clean());
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
