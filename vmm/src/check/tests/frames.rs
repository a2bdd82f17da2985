use std::sync::atomic::Ordering::Relaxed;

use abi::objects::{FrameKind, ORDERS, SlabId};

use super::fires;
use crate::check::world::World;

/// The head of the largest free block.
fn largest_block(world: &World) -> (usize, u64) {
    let head = |order: &usize| world.root(|root| root.buddy[*order].load(Relaxed));
    let order = (0..ORDERS)
        .rev()
        .find(|order| head(order) != 0)
        .expect("free memory");
    (order, head(&order))
}

#[test]
fn p20_a_head_inside_a_block() {
    fires(&["P-20"], |world| {
        let (_, frame) = largest_block(world);
        world.folio(frame + 1, |folio| {
            folio.kind.store(FrameKind::Kernel as u8, Relaxed)
        });
    });
}

#[test]
fn p20_an_unknown_kind() {
    fires(&["P-20"], |world| {
        let frame = world.frame_of_kind(FrameKind::Kernel);
        world.folio(frame, |folio| folio.kind.store(200, Relaxed));
    });
}

#[test]
fn p21_a_free_block_is_on_no_list() {
    fires(&["P-21"], |world| {
        let (order, _) = largest_block(world);
        world.root(|root| root.buddy[order].store(0, Relaxed));
    });
}

#[test]
fn p21_a_buddy_list_is_a_ring() {
    fires(&["P-21"], |world| {
        let (_, frame) = largest_block(world);
        world.folio(frame, |folio| folio.next.store(frame, Relaxed));
    });
}

#[test]
fn p22_a_cpu_miscounts_its_frames() {
    fires(&["P-22"], |world| {
        world.cpu(1, |cpu| cpu.free_count.fetch_add(1, Relaxed));
    });
}

#[test]
fn p22_a_frame_is_on_another_cpus_list() {
    fires(&["P-22"], |world| {
        let frame = world.frame_of_kind(FrameKind::PerCpu);
        world.folio(frame, |folio| folio.owner.store(0, Relaxed));
    });
}

#[test]
fn p23_free_frames_is_off() {
    fires(&["P-23"], |world| {
        world.root(|root| root.free_frames.fetch_sub(1, Relaxed));
    });
}

#[test]
fn p24_a_frame_without_a_kind() {
    fires(&["P-24"], |world| {
        let frame = world.frame_of_kind(FrameKind::Kernel);
        world.folio(frame, |folio| {
            folio.kind.store(FrameKind::Unset as u8, Relaxed)
        });
    });
}

#[test]
fn p25_a_slab_miscounts_its_frames() {
    fires(&["P-25"], |world| {
        world.root(|root| {
            root.slabs[SlabId::Vma as usize]
                .frames
                .fetch_add(1, Relaxed)
        });
    });
}

#[test]
fn p25_a_slab_s_free_list_leaves_the_slab() {
    fires(&["P-25"], |world| {
        world.root(|root| root.slabs[SlabId::Vma as usize].free.store(0x3000, Relaxed));
    });
}
