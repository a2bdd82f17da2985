use std::sync::atomic::Ordering::Relaxed;

use abi::layout::PAGE_SIZE;
use abi::objects::Mm;
use abi::point::Point;
use abi::pte::{NonPresent, Pte, PteFlags};

use super::fires;
use crate::check::world::{DATA, EMPTY, World};
use crate::inspect::Stop;

/// Puts `pte` at an empty entry, and counts it as the kernel would.
pub(super) fn add_entry(world: &World, gva: u64, pte: Pte) {
    let entry = world.entry(world.parent, gva, 1);
    assert!(world.pte(entry).is_none());
    world.set_pte(entry, pte);
    world.folio(entry / PAGE_SIZE, |table| table.used.fetch_add(1, Relaxed));
    if pte.is_resident() {
        world.update::<Mm, _>(world.parent, |mm| mm.rss.fetch_add(1, Relaxed));
    }
}

#[test]
fn s01_an_entry_says_nothing_that_there_is() {
    fires(&["S-01"], |world| add_entry(world, EMPTY, Pte(0x7002)));
    // Understood, but of a table.
    fires(&["S-01"], |world| {
        let said = NonPresent::Swap {
            slot: 3,
            exclusive: false,
        };
        let root = world.object::<Mm>(world.parent).pgd.load(Relaxed);
        world.set_pte(root + 8 * 200, said.entry());
        world.folio(root / PAGE_SIZE, |table| table.used.fetch_add(1, Relaxed));
    });
}

#[test]
fn s02_a_swap_entry_outside_every_vma() {
    // There is no swap, so no such slot either.
    fires(&["S-02", "S-20"], |world| {
        let said = NonPresent::Swap {
            slot: 0,
            exclusive: true,
        };
        add_entry(world, EMPTY + PAGE_SIZE, said.entry());
    });
}

/// The only page of the child alone becomes one that is on its way, by who holds its lock.
fn out(world: &World, flags: PteFlags) -> u64 {
    let gva = DATA + PAGE_SIZE;
    let frame = world.mapped_frame(world.child, gva);
    let said = NonPresent::Migration {
        gpa: frame * PAGE_SIZE,
        flags,
    };
    world.change_pte(world.child, gva, 1, |_| said.entry());
    world.folio(frame, |folio| {
        folio.mapcount.fetch_sub(1, Relaxed);
        folio.lock.store(1, Relaxed);
    });
    // Its CPU is in the middle of it.
    frame
}

/// The invariants that are violated while CPU 0 stands at the point.
fn at_point(corrupt: impl FnOnce(&mut World)) -> Vec<&'static str> {
    let mut world = World::new();
    world.vcpus[0].cpl = 0;
    world.vcpus[0].stop = Stop::Point(Point::Migrate);
    corrupt(&mut world);
    world.violated().into_keys().collect()
}

const KEPT: PteFlags = PteFlags::WRITE.union(PteFlags::DIRTY);

#[test]
fn a_page_on_its_way_is_sound() {
    assert_eq!(
        at_point(|world| {
            out(world, KEPT);
        }),
        [""; 0]
    );
}

#[test]
fn s03_a_migration_entry_of_a_folio_that_is_not_locked() {
    let unlocked = at_point(|world| {
        let frame = out(world, KEPT);
        world.folio(frame, |folio| folio.lock.store(0, Relaxed));
    });
    assert_eq!(unlocked, ["S-03"]);
    let nowhere = at_point(|world| {
        out(world, KEPT);
        let said = NonPresent::Migration {
            gpa: 1 << 40,
            flags: KEPT,
        };
        world.change_pte(world.child, DATA + PAGE_SIZE, 1, |_| said.entry());
    });
    assert_eq!(nowhere, ["S-03"]);
}

#[test]
fn s04_a_migration_entry_is_left_behind() {
    let mut world = World::new();
    out(&world, KEPT);
    assert!(world.violated().contains_key("S-04"), "{}", world.judge());
    world.vcpus[0].cpl = 0;
    world.vcpus[0].stop = Stop::Point(Point::Migrate);
    assert!(!world.violated().contains_key("S-04"));
}

#[test]
fn s05_nobody_holds_the_page_that_moves() {
    let found = at_point(|world| {
        let frame = out(world, KEPT);
        world.folio(frame, |folio| folio.mapcount.fetch_add(1, Relaxed));
    });
    assert!(found.contains(&"S-05"), "{found:?}");
}

#[test]
fn s06_a_shared_page_moves_as_if_it_were_not() {
    let found = at_point(|world| {
        let frame = out(world, KEPT);
        let other = NonPresent::Migration {
            gpa: frame * PAGE_SIZE,
            flags: PteFlags::COW,
        };
        world.change_pte(world.parent, DATA + PAGE_SIZE, 1, |_| other.entry());
    });
    assert!(found.contains(&"S-06"), "{found:?}");
}

#[test]
fn s07_a_migration_entry_where_no_walk_comes_to() {
    let found = at_point(|world| {
        let frame = out(world, KEPT);
        world.folio(frame, |folio| folio.index.fetch_add(1, Relaxed));
    });
    assert_eq!(found, ["S-07"]);
}
