use std::sync::atomic::Ordering::Relaxed;

use abi::layout::PAGE_SIZE;
use abi::objects::{CacheNode, File, FileTable, OpenFile, Pa, Vma};
use abi::pte::PteFlags;

use super::fires;
use crate::check::world::{PRIVATE_FILE, SHARED_FILE, World};

#[test]
fn r16_a_page_of_a_file_is_held_for_good() {
    fires(&["R-16"], |world| {
        let frame = world.mapped_frame(world.parent, SHARED_FILE);
        world.folio(frame, |folio| folio.refcount.fetch_add(1, Relaxed));
    });
}

#[test]
fn r17_a_private_mapping_writes_its_file() {
    fires(&["R-17"], |world| {
        world.change_pte(world.parent, PRIVATE_FILE, 1, |pte| {
            pte.with(PteFlags::WRITE)
        });
    });
}

#[test]
fn r18_a_page_is_mapped_at_the_wrong_place() {
    fires(&["R-18", "R-19"], |world| {
        let vma = world.vmas[&(world.child, SHARED_FILE)];
        world.update::<Vma, _>(vma, |vma| vma.pgoff.fetch_add(1, Relaxed));
    });
}

/// The root of the file's tree, and what is to its right.
fn mappings(world: &World) -> (u64, Pa<Vma>) {
    let root = world.object::<File>(world.file).i_mmap.get().0;
    (root, world.object::<Vma>(root).right_of_file.get())
}

#[test]
fn r18_a_vma_is_not_in_the_tree() {
    fires(&["R-18", "R-19"], |world| {
        let (file, (_, right)) = (world.file, mappings(world));
        world.update::<File, _>(file, |file| file.i_mmap.set(right));
        world.update::<Vma, _>(right.0, |vma| vma.parent_of_file.set(Pa::NULL));
    });
}

#[test]
fn r19_a_tree_is_not_linked_back() {
    fires(&["R-19"], |world| {
        let (_, right) = mappings(world);
        world.update::<Vma, _>(right.0, |vma| vma.parent_of_file.set(Pa::NULL));
    });
}

#[test]
fn r19_a_tree_does_not_say_how_far_it_reaches() {
    fires(&["R-19"], |world| {
        let (root, _) = mappings(world);
        world.update::<Vma, _>(root, |vma| vma.subtree_end.fetch_sub(1, Relaxed));
    });
}

#[test]
fn r19_a_tree_is_out_of_order() {
    fires(&["R-18", "R-19"], |world| {
        let (root, right) = mappings(world);
        let behind = world.object::<Vma>(right.0).subtree_end.load(Relaxed);
        world.update::<Vma, _>(root, |vma| {
            let pages = (vma.end.load(Relaxed) - vma.start.load(Relaxed)) / PAGE_SIZE;
            vma.pgoff.store(1, Relaxed);
            vma.subtree_end.store(behind.max(1 + pages), Relaxed);
        });
    });
}

#[test]
fn r23_a_page_is_at_the_wrong_number() {
    fires(&["R-23"], |world| {
        // A page that nothing maps.
        let node = world.object::<File>(world.file).pages.get().0;
        world.update::<CacheNode, _>(node, |node| {
            let page = node.slots[5].swap(0, Relaxed);
            node.slots[6].store(page, Relaxed);
        });
    });
}

#[test]
fn r23_a_cache_miscounts_its_pages() {
    fires(&["R-23"], |world| {
        world.update::<File, _>(world.file, |file| file.nr_pages.fetch_add(1, Relaxed));
    });
    fires(&["R-23"], |world| {
        let node = world.object::<File>(world.file).pages.get().0;
        world.update::<CacheNode, _>(node, |node| node.count.fetch_add(1, Relaxed));
    });
}

#[test]
fn l17_a_file_is_referenced_once_too_often() {
    fires(&["L-17"], |world| {
        world.update::<File, _>(world.file, |file| file.refcount.fetch_add(1, Relaxed));
    });
}

#[test]
fn l18_an_open_file_has_a_descriptor_too_many() {
    fires(&["L-18"], |world| {
        let open = world.open_file;
        world.update::<OpenFile, _>(open, |open| open.refcount.fetch_add(1, Relaxed));
    });
    fires(&["L-18"], |world| {
        let table = world.file_table;
        world.update::<FileTable, _>(table, |table| table.users.fetch_add(1, Relaxed));
    });
}

#[test]
fn a_tree_of_pages_in_a_loop_ends() {
    let world = World::new();
    let node = world.object::<File>(world.file).pages.get().0;
    world.update::<File, _>(world.file, |file| file.height.store(u64::MAX, Relaxed));
    world.update::<CacheNode, _>(node, |root| root.slots[63].store(node, Relaxed));
    let snapshot = world.snapshot();
    assert!(!snapshot.anomalies.is_empty());
    assert!(snapshot.files[&world.file].nodes as u64 <= PAGE_SIZE);
}
