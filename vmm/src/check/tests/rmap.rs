use std::sync::atomic::Ordering::Relaxed;

use abi::layout::PAGE_SIZE;
use abi::objects::{AnonVma, AnonVmaChain, FrameKind, Pa, Task, TaskState, Vma, folio_flags};
use abi::pte::PteFlags;

use super::fires;
use crate::check::world::{DATA, TEXT, World};

/// Some task sleeps until the disk has answered.
fn waits_for_the_disk(world: &World) {
    let task = world.root(|root| root.tasks.get().0);
    world.update::<Task, _>(task, |task| {
        task.state.store(TaskState::Blocked as u32, Relaxed);
        task.waits_for.store(Task::WAITS_FOR_DISK, Relaxed);
    });
}

/// The anon_vma of a VMA.
fn anon_vma_of(world: &World, mm: u64, start: u64) -> u64 {
    world
        .object::<Vma>(world.vmas[&(mm, start)])
        .anon_vma
        .get()
        .0
}

#[test]
fn r01_a_mapcount_is_too_high() {
    fires(&["R-01"], |world| {
        let frame = world.mapped_frame(world.parent, TEXT);
        world.folio(frame, |folio| {
            folio.mapcount.store(2, Relaxed);
            folio.refcount.store(2, Relaxed);
        });
    });
}

#[test]
fn r02_a_frame_in_use_has_no_reference() {
    fires(&["R-02"], |world| {
        let frame = world.frame_of_kind(FrameKind::Slab);
        world.folio(frame, |folio| folio.refcount.store(0, Relaxed));
    });
}

#[test]
fn r02_a_free_frame_has_a_reference() {
    fires(&["R-02"], |world| {
        let frame = world.frame_of_kind(FrameKind::PerCpu);
        world.folio(frame, |folio| folio.refcount.store(1, Relaxed));
    });
}

#[test]
fn r03_a_mapping_without_its_reference() {
    fires(&["R-03"], |world| {
        let shared = world.mapped_frame(world.parent, DATA);
        world.folio(shared, |folio| folio.refcount.store(1, Relaxed));
    });
}

#[test]
fn r04_a_folio_that_nothing_maps() {
    fires(&["R-04"], |world| {
        let frame = world.frame_of_kind(FrameKind::Kernel);
        world.folio(frame, |folio| {
            folio.kind.store(FrameKind::Anon as u8, Relaxed);
        });
    });
}

#[test]
fn r05_a_mapped_folio_without_an_anon_vma() {
    fires(&["R-05"], |world| {
        let frame = world.mapped_frame(world.parent, TEXT);
        world.folio(frame, |folio| folio.owner.store(0, Relaxed));
    });
}

#[test]
fn r06_the_rmap_misses_a_mapping() {
    fires(&["R-06"], |world| {
        let frame = world.mapped_frame(world.parent, TEXT);
        let other = anon_vma_of(world, world.child, DATA);
        world.folio(frame, |folio| folio.owner.store(other, Relaxed));
    });
}

#[test]
fn r07_an_index_is_off_by_one() {
    fires(&["R-07"], |world| {
        let frame = world.mapped_frame(world.parent, TEXT);
        world.folio(frame, |folio| folio.index.fetch_add(1, Relaxed));
    });
}

#[test]
fn r08_a_shared_page_is_writable() {
    fires(&["R-08"], |world| {
        world.change_pte(world.child, DATA, 1, |pte| {
            pte.with(PteFlags::WRITE).without(PteFlags::COW)
        });
    });
}

#[test]
fn r09_a_shared_folio_claims_to_be_exclusive() {
    fires(&["R-09"], |world| {
        let shared = world.mapped_frame(world.parent, DATA);
        world.folio(shared, |folio| {
            folio.flags.store(folio_flags::EXCLUSIVE, Relaxed);
        });
    });
}

#[test]
fn r10_a_copy_on_write_entry_is_writable() {
    fires(&["R-10"], |world| {
        world.change_pte(world.child, DATA + PAGE_SIZE, 1, |pte| {
            pte.with(PteFlags::COW)
        });
    });
}

#[test]
fn r11_a_chain_is_not_linked_back() {
    fires(&["R-11"], |world| {
        let list = world.object::<AnonVma>(anon_vma_of(world, world.parent, DATA));
        let second = world
            .object::<AnonVmaChain>(list.chains.get().0)
            .next_of_anon
            .get();
        world.update::<AnonVmaChain, _>(second.0, |chain| chain.prev_of_anon.set(Pa::NULL));
    });
}

#[test]
fn r12_an_anon_vma_is_referenced_once_too_often() {
    fires(&["R-12"], |world| {
        let anon_vma = anon_vma_of(world, world.parent, TEXT);
        world.update::<AnonVma, _>(anon_vma, |anon_vma| anon_vma.refcount.fetch_add(1, Relaxed));
    });
}

#[test]
fn r13_a_degree_forgets_a_child() {
    fires(&["R-13"], |world| {
        let anon_vma = anon_vma_of(world, world.parent, DATA);
        world.update::<AnonVma, _>(anon_vma, |anon_vma| anon_vma.degree.fetch_sub(1, Relaxed));
    });
}

#[test]
fn r14_a_child_is_locked_by_another_family() {
    fires(&["R-14"], |world| {
        let other = anon_vma_of(world, world.parent, TEXT);
        let anon_vma = anon_vma_of(world, world.child, DATA);
        world.update::<AnonVma, _>(anon_vma, |anon_vma| anon_vma.root.set(Pa::new(other)));
    });
}

#[test]
fn r15_an_active_count_is_off() {
    fires(&["R-15"], |world| {
        let anon_vma = anon_vma_of(world, world.child, DATA);
        world.update::<AnonVma, _>(anon_vma, |anon_vma| anon_vma.active.fetch_sub(1, Relaxed));
    });
}

#[test]
fn r20_a_pin_without_a_reference() {
    fires(&["R-20"], |world| {
        waits_for_the_disk(world);
        let frame = world.mapped_frame(world.parent, TEXT);
        world.folio(frame, |folio| folio.pins.store(1, Relaxed));
    });
}

#[test]
fn r21_a_shared_page_is_pinned() {
    fires(&["R-21"], |world| {
        waits_for_the_disk(world);
        let frame = world.mapped_frame(world.parent, DATA);
        world.folio(frame, |folio| {
            folio.pins.store(1, Relaxed);
            folio.refcount.fetch_add(1, Relaxed);
        });
    });
}

#[test]
fn r22_a_page_is_still_pinned_when_its_request_is_over() {
    fires(&["R-22"], |world| {
        let frame = world.mapped_frame(world.parent, TEXT);
        world.folio(frame, |folio| {
            folio.pins.store(1, Relaxed);
            folio.refcount.fetch_add(1, Relaxed);
        });
    });
}

#[test]
fn r04_a_page_that_only_a_device_uses_is_no_leak() {
    fires(&[], |world| {
        waits_for_the_disk(world);
        let frame = world.frame_of_kind(FrameKind::Kernel);
        world.folio(frame, |folio| {
            folio.kind.store(FrameKind::Anon as u8, Relaxed);
            folio.pins.store(1, Relaxed);
        });
    });
}
