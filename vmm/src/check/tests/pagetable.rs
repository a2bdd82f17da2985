use std::sync::atomic::Ordering::Relaxed;

use abi::layout::{KERNEL_LOAD_GPA, KERNEL_VIRT_OFFSET, LAPIC_GVA, PAGE_SIZE};
use abi::objects::{FrameKind, Mm, Vma};
use abi::pte::{Pte, PteFlags};

use super::fires;
use crate::check::world::{DATA, EMPTY, LARGE_FRAME, TEXT, UNTOUCHED, World};

/// Puts `pte` at an empty entry, and counts it as the kernel would.
fn add_entry(world: &World, entry: u64, pte: Pte) {
    assert!(world.pte(entry).is_none());
    world.set_pte(entry, pte);
    world.folio(entry / PAGE_SIZE, |table| table.used.fetch_add(1, Relaxed));
}

fn map_frame(world: &World, gva: u64, frame: u64) {
    let flags = PteFlags::PRESENT | PteFlags::USER;
    let entry = world.entry(world.parent, gva, 1);
    add_entry(world, entry, Pte::new(frame * PAGE_SIZE, flags));
    world.update::<Mm, _>(world.parent, |mm| mm.rss.fetch_add(1, Relaxed));
}

#[test]
fn p01_a_vma_shrinks_and_keeps_its_entries() {
    fires(&["P-01", "V-08"], |world| {
        let vma = world.vmas[&(world.child, DATA)];
        world.update::<Vma, _>(vma, |vma| vma.end.store(DATA + PAGE_SIZE, Relaxed));
    });
}

#[test]
fn p02_a_read_only_page_becomes_writable() {
    fires(&["P-02"], |world| {
        world.change_pte(world.parent, TEXT, 1, |pte| pte.with(PteFlags::WRITE));
    });
}

#[test]
fn p02_data_becomes_executable() {
    fires(&["P-02"], |world| {
        world.change_pte(world.parent, DATA, 1, |pte| {
            pte.without(PteFlags::NO_EXECUTE)
        });
    });
}

#[test]
fn p02_a_vma_loses_all_access_and_its_entries_do_not() {
    fires(&["P-02", "V-08"], |world| {
        let vma = world.vmas[&(world.child, DATA)];
        world.update::<Vma, _>(vma, |vma| vma.flags.store(0, Relaxed));
    });
}

#[test]
fn p02_permissions_are_those_of_all_levels() {
    let world = World::new();
    world.change_pte(world.parent, TEXT, 1, |pte| pte.with(PteFlags::WRITE));
    world.change_pte(world.parent, TEXT, 2, |pte| pte.without(PteFlags::WRITE));
    assert_eq!(
        world.violated().keys().next(),
        None,
        "the level above still forbids writes"
    );
}

#[test]
fn p03_a_user_entry_maps_a_kernel_stack() {
    fires(&["P-03"], |world| {
        let frame = world.mapped_frame(world.parent, TEXT);
        world.folio(frame, |folio| {
            folio.kind.store(FrameKind::Stack as u8, Relaxed);
        });
    });
}

#[test]
fn p04_a_free_frame_is_mapped() {
    fires(&["P-04"], |world| {
        let free = world.frame_of_kind(FrameKind::PerCpu);
        map_frame(world, TEXT + 2 * PAGE_SIZE, free);
    });
}

#[test]
fn p04_a_frame_inside_a_free_block_is_mapped() {
    let world = World::new();
    // A tail of the largest block.
    let last = LARGE_FRAME - 1;
    map_frame(&world, TEXT + 2 * PAGE_SIZE, last);
    let violated: Vec<_> = world.violated().into_keys().collect();
    assert_eq!(
        violated,
        ["P-03", "P-04"],
        "a tail is no anonymous folio either"
    );
}

#[test]
fn p04_the_order_of_another_block_does_not_matter() {
    let world = World::new();
    let data = world.mapped_frame(world.child, DATA);
    // Frame 0 heads a free block of all memory, or so it says.
    world.folio(0, |folio| {
        folio.kind.store(FrameKind::Buddy as u8, Relaxed);
        folio.order.store(10, Relaxed);
    });
    assert!(data < 1 << 10 && !world.violated().contains_key("P-04"));
}

#[test]
fn p05_kernel_data_becomes_executable() {
    fires(&["P-05"], |world| {
        let data = KERNEL_VIRT_OFFSET + KERNEL_LOAD_GPA + PAGE_SIZE;
        world.change_pte(0, data, 1, |pte| pte.without(PteFlags::NO_EXECUTE));
    });
}

#[test]
fn p06_the_local_apic_is_open_to_programs() {
    fires(&["P-06"], |world| {
        for mm in [world.parent, world.child, 0] {
            world.change_pte(mm, LAPIC_GVA, 4, |pte| pte.with(PteFlags::USER));
        }
        for level in 1..=3 {
            world.change_pte(0, LAPIC_GVA, level, |pte| pte.with(PteFlags::USER));
        }
    });
}

#[test]
fn p07_an_mm_has_another_kernel_half() {
    fires(&["P-07"], |world| {
        world.change_pte(world.parent, LAPIC_GVA, 4, |pte| {
            pte.without(PteFlags::WRITE)
        });
    });
}

#[test]
fn p07_the_accessed_bit_may_differ() {
    let world = World::new();
    world.change_pte(world.parent, LAPIC_GVA, 4, |pte| {
        pte.without(PteFlags::ACCESSED)
    });
    assert!(world.judge().is_clean());
}

#[test]
fn p08_one_table_behind_two_entries_of_an_mm() {
    fires(&["P-08"], |world| {
        let entry = world.entry(world.parent, EMPTY, 2);
        add_entry(world, entry + 8, world.pte(entry));
    });
}

#[test]
fn p08_one_table_in_two_mms() {
    fires(&["P-08", "P-09"], |world| {
        let shared = world.pte(world.entry(world.parent, EMPTY, 2));
        add_entry(world, world.entry(world.child, DATA, 2) + 8, shared);
        world.update::<Mm, _>(world.child, |mm| mm.tables.fetch_add(1, Relaxed));
    });
}

#[test]
fn p09_a_table_of_the_wrong_level() {
    fires(&["P-09"], |world| {
        let table = world.pte(world.entry(world.parent, DATA, 2)).address();
        world.folio(table / PAGE_SIZE, |folio| folio.index.store(2, Relaxed));
    });
}

#[test]
fn p09_a_kernel_table_is_free() {
    fires(&["P-09", "P-22", "P-23"], |world| {
        let table = world.pte(world.entry(0, LAPIC_GVA, 2)).address();
        world.folio(table / PAGE_SIZE, |folio| {
            folio.kind.store(FrameKind::PerCpu as u8, Relaxed);
        });
    });
}

#[test]
fn p10_a_table_is_unlinked_and_never_freed() {
    fires(&["P-10"], |world| {
        let entry = world.entry(world.parent, EMPTY, 2);
        world.set_pte(entry, Pte::NONE);
        world.folio(entry / PAGE_SIZE, |table| table.used.fetch_sub(1, Relaxed));
        world.update::<Mm, _>(world.parent, |mm| mm.tables.fetch_sub(1, Relaxed));
    });
}

#[test]
fn p11_a_table_miscounts_its_entries() {
    fires(&["P-11"], |world| {
        let table = world.pte(world.entry(world.parent, DATA, 2)).address();
        world.folio(table / PAGE_SIZE, |folio| folio.used.fetch_add(1, Relaxed));
    });
}

#[test]
fn p12_mm_tables_is_off() {
    fires(&["P-12"], |world| {
        world.update::<Mm, _>(world.child, |mm| mm.tables.fetch_sub(1, Relaxed));
    });
}

#[test]
fn p13_mm_rss_is_off() {
    fires(&["P-13"], |world| {
        world.update::<Mm, _>(world.child, |mm| mm.rss.fetch_add(1, Relaxed));
    });
}

#[test]
fn p14_a_table_outside_memory() {
    fires(&["P-14"], |world| {
        let entry = world.entry(world.parent, EMPTY, 2) + 8;
        add_entry(world, entry, Pte::new(1 << 40, PteFlags::PRESENT));
    });
}

#[test]
fn p14_a_reserved_bit() {
    fires(&["P-14"], |world| {
        let entry = world.entry(world.parent, EMPTY, 2) + 8;
        add_entry(
            world,
            entry,
            Pte::new(0x2000, PteFlags::PRESENT | PteFlags::HUGE),
        );
    });
}

#[test]
fn p15_the_kernel_maps_what_is_not_there() {
    fires(&["P-15"], |world| {
        let data = KERNEL_VIRT_OFFSET + KERNEL_LOAD_GPA + PAGE_SIZE;
        world.change_pte(0, data, 1, |pte| Pte::new(1 << 30, pte.flags()));
    });
}

#[test]
fn p16_the_zero_page_can_be_written() {
    fires(&["P-16"], |world| {
        world.change_pte(world.parent, UNTOUCHED, 1, |pte| pte.with(PteFlags::WRITE));
    });
    // An entry that the kernel would count.
    fires(&["P-16"], |world| {
        world.change_pte(world.parent, UNTOUCHED, 1, |pte| {
            pte.without(PteFlags::SPECIAL)
        });
    });
    // A folio that it would not.
    fires(&["P-16"], |world| {
        world.change_pte(world.parent, DATA, 1, |pte| pte.with(PteFlags::SPECIAL));
    });
}

#[test]
fn p17_the_zero_page_is_written() {
    fires(&["P-17"], |world| {
        let zero = world.mapped_frame(world.parent, UNTOUCHED);
        world.poke(zero * PAGE_SIZE + 8, 1);
    });
    fires(&["P-17"], |world| {
        let zero = world.mapped_frame(world.parent, UNTOUCHED);
        world.folio(zero, |folio| folio.refcount.fetch_add(1, Relaxed));
    });
}
