use std::sync::atomic::Ordering::Relaxed;

use abi::layout::{PAGE_SIZE, USER_END};
use abi::objects::{Mm, Pa, Vma, VmaNode, VmaRefs, vma_flags};

use super::fires;
use crate::check::world::{DATA, EMPTY, TEXT, World};

/// The VMA with the highest start.
const LAST: u64 = EMPTY + 10 * 0x10_0000;

fn change_vma(world: &World, mm: u64, start: u64, change: impl FnOnce(&mut Vma)) {
    world.update::<Vma, _>(world.vmas[&(mm, start)], change);
}

fn change_root(world: &World, mm: u64, change: impl FnOnce(&mut VmaNode)) {
    let root = world.object::<Mm>(mm).vmas.get();
    world.update::<VmaNode, _>(root.0, change);
}

#[test]
fn v01_two_vmas_overlap() {
    fires(&["V-01", "V-08"], |world| {
        change_vma(world, world.parent, TEXT, |vma| {
            vma.end.store(DATA + PAGE_SIZE, Relaxed);
        });
    });
}

#[test]
fn v02_a_vma_ends_inside_a_page() {
    fires(&["V-02"], |world| {
        change_vma(world, world.parent, LAST, |vma| {
            _ = vma.end.fetch_add(8, Relaxed);
        });
    });
}

#[test]
fn v02_a_vma_is_empty() {
    fires(&["V-02", "V-08"], |world| {
        change_vma(world, world.parent, LAST, |vma| {
            vma.end.store(LAST, Relaxed);
        });
    });
}

#[test]
fn v02_a_vma_leaves_user_space() {
    fires(&["V-02", "V-08"], |world| {
        change_vma(world, world.parent, LAST, |vma| {
            vma.end.store(USER_END + PAGE_SIZE, Relaxed);
        });
    });
}

#[test]
fn v03_map_count_is_off() {
    fires(&["V-03"], |world| {
        world.update::<Mm, _>(world.parent, |mm| mm.map_count.fetch_add(1, Relaxed));
    });
}

#[test]
fn v04_a_tree_is_not_balanced() {
    fires(&["V-04"], |world| {
        change_root(world, world.parent, |root| root.level.store(2, Relaxed));
    });
}

#[test]
fn v04_a_node_is_overfull() {
    fires(&["V-04"], |world| {
        let leaf = world.object::<Mm>(world.parent).vmas.get();
        let leaf = world.object::<VmaNode>(leaf.0).slots[0].child.load(Relaxed);
        world.update::<VmaNode, _>(leaf, |leaf| leaf.count.store(11, Relaxed));
    });
}

#[test]
fn v04_a_link_is_wild() {
    fires(&["V-04"], |world| {
        change_root(world, world.parent, |root| {
            root.count.store(3, Relaxed);
            root.slots[2].child.store(0xdead_beef_0000, Relaxed);
        });
    });
}

#[test]
fn v04_a_tree_bites_its_tail() {
    let world = World::new();
    let root = world.object::<Mm>(world.parent).vmas.get();
    change_root(&world, world.parent, |node| {
        node.count.store(3, Relaxed);
        node.slots[2].child.store(root.0, Relaxed);
    });
    assert!(world.violated().contains_key("V-04"));
}

#[test]
fn v05_a_slot_names_the_wrong_start() {
    fires(&["V-05"], |world| {
        change_root(world, world.child, |leaf| {
            _ = leaf.slots[0].start.fetch_add(4096, Relaxed);
        });
    });
}

#[test]
fn v06_a_slot_names_the_wrong_hole() {
    fires(&["V-06"], |world| {
        change_root(world, world.parent, |root| {
            _ = root.slots[1].gap.fetch_sub(4096, Relaxed);
        });
    });
}

#[test]
fn v07_a_detached_vma_is_in_the_tree() {
    fires(&["V-07"], |world| {
        change_vma(world, world.parent, EMPTY, |vma| {
            vma.refs.store(VmaRefs::DETACHED, Relaxed);
        });
    });
}

#[test]
fn v09_an_mm_is_still_marked_as_written() {
    fires(&["V-09"], |world| {
        world.update::<Mm, _>(world.parent, |mm| mm.lock_seq.store(3, Relaxed));
    });
}

#[test]
fn v09_a_vma_was_locked_in_a_write_that_never_was() {
    fires(&["V-09"], |world| {
        change_vma(world, world.parent, EMPTY, |vma| {
            vma.lock_seq.store(7, Relaxed);
        });
    });
}

#[test]
fn v10_a_fault_has_left_a_vma_held() {
    fires(&["L-14", "V-10"], |world| {
        change_vma(world, world.parent, EMPTY, |vma| {
            vma.refs.store(VmaRefs::ATTACHED + 1, Relaxed);
        });
    });
}

#[test]
fn v10_faults_are_kept_out_for_good() {
    fires(&["V-10"], |world| {
        change_vma(world, world.parent, EMPTY, |vma| {
            vma.refs
                .store(VmaRefs::ATTACHED | VmaRefs::EXCLUDED, Relaxed);
        });
    });
}

#[test]
fn v07_a_recycled_vma_is_in_the_tree() {
    fires(&["V-07"], |world| {
        change_vma(world, world.parent, EMPTY, |vma| {
            vma.generation.store(2, Relaxed);
        });
    });
}

#[test]
fn v07_a_vma_belongs_to_another_mm() {
    fires(&["V-07"], |world| {
        change_vma(world, world.parent, EMPTY, |vma| {
            vma.mm.set(Pa::new(world.child));
        });
    });
}

#[test]
fn v08_an_mm_miscounts_its_pages() {
    fires(&["V-08"], |world| {
        world.update::<Mm, _>(world.parent, |mm| mm.total_vm.fetch_add(1, Relaxed));
    });
    fires(&["V-08"], |world| {
        world.update::<Mm, _>(world.parent, |mm| mm.data_vm.fetch_sub(1, Relaxed));
    });
    fires(&["V-08"], |world| {
        change_vma(world, world.child, DATA, |vma| {
            vma.flags.fetch_or(vma_flags::LOCKED, Relaxed);
        });
    });
}
