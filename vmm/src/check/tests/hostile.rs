//! A guest that lies: nothing panics, everything ends.

use abi::layout::{ENTRIES_PER_TABLE, PAGE_SIZE};
use abi::pte::{Pte, PteFlags};
use proptest::prelude::*;

use crate::check::world::{DATA, ROOT_GPA, World};
use crate::check::{Context, run};
use crate::inspect::walk::USER_HALF;
use crate::inspect::{Snapshot, render};

/// Everything that reads the guest, over whatever lies in memory.
fn look_at_everything(world: &World) {
    let Ok(snapshot) = Snapshot::read(&world.memory, ROOT_GPA) else {
        return;
    };
    let outcome = run(&Context::new(
        &world.memory,
        &snapshot,
        &world.vcpus,
        world.moment,
    ));
    let mut text = outcome.to_string();
    text += &render::machine(&world.memory, &snapshot, &world.vcpus).to_string();
    for mm in snapshot.mms.iter().take(4) {
        text += &render::tree(&world.memory, mm.pgd, USER_HALF).to_string();
        if let Some((walk, frame)) = render::folio_behind(&world.memory, &snapshot, mm.id, DATA) {
            text += &walk.to_string();
            text += &frame.map_or(String::new(), |frame| frame.to_string());
        }
    }
    assert!(!text.is_empty());
    serde_json::to_string(&outcome).expect("JSON");
}

/// Bytes where there is something to break: objects, tables, descriptors, not the free memory.
fn interesting() -> impl Strategy<Value = u64> {
    prop_oneof![
        ROOT_GPA..ROOT_GPA + 0x1000,
        ROOT_GPA + 0x1000..0x1_0000,
        0x1_0000u64..0x4_0000
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn corrupt_bytes_end_in_a_verdict(
        bytes in prop::collection::vec((interesting(), any::<u8>()), 1..40),
    ) {
        let world = World::new();
        for (gpa, value) in bytes {
            world.memory.write(gpa, &[value]).unwrap();
        }
        look_at_everything(&world);
    }

    #[test]
    fn corrupt_links_end_in_a_verdict(
        words in prop::collection::vec((interesting(), interesting()), 1..40),
    ) {
        let world = World::new();
        for (gpa, target) in words {
            // Words that look like links or entries: the corruption that leads furthest.
            world.poke(gpa & !7, target & !7 | 1 & gpa);
        }
        look_at_everything(&world);
    }
}

#[test]
fn a_table_that_is_its_own_child_throughout() {
    let world = World::new();
    let pgd = world.entry(world.parent, 0, 4);
    for slot in 0..ENTRIES_PER_TABLE as u64 {
        let flags = PteFlags::PRESENT | PteFlags::USER;
        world.set_pte(pgd + 8 * slot, Pte::new(pgd, flags));
    }
    look_at_everything(&world);
    let violated = world.violated();
    assert!(violated["P-08"] >= 256, "{violated:?}");
}

#[test]
fn memory_that_is_all_links_to_itself() {
    let world = World::new();
    // Every word of the slabs' pages is a link to the first object of its page.
    for frame in 0x20u64..0x40 {
        let page = frame * PAGE_SIZE;
        for word in (page..page + PAGE_SIZE).step_by(8) {
            world.poke(word, page);
        }
    }
    look_at_everything(&world);
}
