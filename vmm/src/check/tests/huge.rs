//! Folios of 2 MiB. [`World`] has one, which one entry maps.

use std::sync::atomic::Ordering::Relaxed;

use abi::layout::{HUGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE};
use abi::objects::{Mm, Vma, folio_flags, folio_state};
use abi::pte::{Pte, PteFlags};

use super::fires;
use crate::check::world::{LARGE, LARGE_FRAME, World};

const GVA: u64 = LARGE + HUGE_PAGE_SIZE;

fn upper(world: &World) -> u64 {
    world.entry(world.parent, GVA, 2) >> PAGE_SHIFT
}

/// Splits the entry as the kernel does.
fn split(world: &World) {
    let upper = upper(world);
    let table = world.folio(upper, |folio| folio.prev.swap(0, Relaxed));
    let large = world.pte(world.entry(world.parent, GVA, 2));
    let small = large.flags().difference(PteFlags::HUGE);
    for page in 0..512 {
        let entry = Pte::new((LARGE_FRAME + page) << PAGE_SHIFT, small);
        world.set_pte((table << PAGE_SHIFT) + 8 * page, entry);
        world.folio(LARGE_FRAME + page, |folio| {
            folio.flags.store(folio_flags::EXCLUSIVE, Relaxed);
        });
    }
    world.folio(table, |folio| folio.used.store(512, Relaxed));
    world.folio(LARGE_FRAME, |folio| {
        folio.used.store(0, Relaxed);
        folio.mapcount.store(512, Relaxed);
        folio.refcount.store(512, Relaxed);
    });
    world.update::<Mm, _>(world.parent, |mm| mm.huge.store(0, Relaxed));
    world.change_pte(world.parent, GVA, 2, |_| {
        let flags = PteFlags::PRESENT | PteFlags::WRITE | PteFlags::USER | PteFlags::ACCESSED;
        Pte::new(table << PAGE_SHIFT, flags)
    });
}

#[test]
fn a_folio_mapped_page_by_page_is_sound() {
    let world = World::new();
    split(&world);
    assert_eq!(world.violated().keys().next(), None, "{}", world.judge());
}

#[test]
fn a_page_of_a_large_folio_is_judged_like_any_other() {
    let break_page = |change: fn(&World, u64)| {
        let world = World::new();
        split(&world);
        change(&world, LARGE_FRAME + 7);
        world.violated().into_keys().collect::<Vec<_>>()
    };
    let shared = break_page(|world, page| world.folio(page, |folio| folio.flags.store(0, Relaxed)));
    assert_eq!(shared, ["R-08"], "writable and not exclusive");
    let lost = break_page(|world, _| {
        world.change_pte(world.parent, GVA + 7 * PAGE_SIZE, 1, |_| Pte::NONE);
    });
    assert_eq!(
        lost,
        ["P-11", "P-13", "R-01"],
        "an entry that nobody uncounted"
    );
    let moved = break_page(|world, page| {
        world.change_pte(world.parent, GVA + 7 * PAGE_SIZE, 1, |pte| {
            Pte::new((page + 1) << PAGE_SHIFT, pte.flags())
        });
    });
    assert_eq!(moved, ["R-07", "R-08", "R-09"], "another page of it");
}

#[test]
fn p01_a_vma_ends_in_the_middle_of_an_entry() {
    fires(&["P-01", "V-06", "V-08"], |world| {
        let vma = world.vmas[&(world.parent, LARGE)];
        let end = GVA + HUGE_PAGE_SIZE / 2;
        world.update::<Vma, _>(vma, |vma| vma.end.store(end, Relaxed));
    });
}

#[test]
fn p30_an_entry_of_2_mib_maps_a_smaller_folio() {
    fires(&["P-20", "P-30", "R-07"], |world| {
        world.folio(LARGE_FRAME, |folio| folio.order.store(8, Relaxed));
        world.folio(LARGE_FRAME, |folio| folio.index.store(1, Relaxed));
    });
}

#[test]
fn p31_nothing_is_set_aside() {
    fires(&["P-10", "P-12", "P-31"], |world| {
        let upper = upper(world);
        world.folio(upper, |folio| folio.prev.store(0, Relaxed));
    });
}

#[test]
fn p31_a_table_set_aside_is_not_empty() {
    fires(&["P-31"], |world| {
        let table = world.folio(upper(world), |folio| folio.prev.load(Relaxed));
        world.poke(table << PAGE_SHIFT, 0x1000);
    });
}

#[test]
fn p31_the_list_comes_back() {
    fires(&["P-31"], |world| {
        let table = world.folio(upper(world), |folio| folio.prev.load(Relaxed));
        world.folio(table, |folio| folio.next.store(table, Relaxed));
    });
}

#[test]
fn p32_the_count_of_entries_is_off() {
    fires(&["P-32"], |world| {
        world.update::<Mm, _>(world.parent, |mm| mm.huge.store(2, Relaxed));
    });
}

#[test]
fn p33_a_split_is_not_ended() {
    // Nothing maps the folio then.
    fires(&["P-13", "P-31", "P-32", "P-33", "R-01", "R-30"], |world| {
        let entry = world.entry(world.parent, GVA, 2);
        world.set_pte(entry, world.pte(entry).without(PteFlags::PRESENT));
    });
}

#[test]
fn r30_an_entry_of_2_mib_is_not_counted() {
    // Then it looks as if one page were mapped.
    fires(&["R-30", "R-31"], |world| {
        world.folio(LARGE_FRAME, |folio| folio.used.store(0, Relaxed));
    });
}

/// Splits the entry and unmaps one page, and queues the folio.
fn queued(world: &World) {
    split(world);
    let address = GVA + 7 * PAGE_SIZE;
    let table = world.entry(world.parent, address, 1) >> PAGE_SHIFT;
    world.change_pte(world.parent, address, 1, |_| Pte::NONE);
    world.folio(table, |folio| folio.used.store(511, Relaxed));
    world.update::<Mm, _>(world.parent, |mm| mm.rss.fetch_sub(1, Relaxed));
    world.folio(LARGE_FRAME, |folio| {
        folio.mapcount.store(511, Relaxed);
        folio.refcount.store(511, Relaxed);
    });
    world.folio(LARGE_FRAME + 1, |folio| {
        folio.state.store(folio_state::DEFERRED, Relaxed);
    });
    world.root(|root| {
        root.split_queue.first.store(LARGE_FRAME, Relaxed);
        root.split_queue.last.store(LARGE_FRAME, Relaxed);
        root.split_queue.count.store(512, Relaxed);
    });
}

#[test]
fn r31_a_part_that_is_unmapped_is_not_queued() {
    fires(&[], |world| queued(world));
    let broken = |change: fn(&World)| {
        fires(&["R-31"], |world| {
            queued(world);
            change(world);
        });
    };
    broken(|world| {
        world.root(|root| {
            root.split_queue.first.store(0, Relaxed);
            root.split_queue.last.store(0, Relaxed);
            root.split_queue.count.store(0, Relaxed);
        });
    });
    broken(|world| {
        world.root(|root| root.split_queue.count.store(1, Relaxed));
    });
    // It does not know; a loop; a frame of another kind; one that there is not.
    broken(|world| world.folio(LARGE_FRAME + 1, |folio| folio.state.store(0, Relaxed)));
    for next in [LARGE_FRAME, 1, u64::MAX - 7] {
        fires(&["R-31"], |world| {
            queued(world);
            world.folio(LARGE_FRAME + 1, |folio| folio.next.store(next, Relaxed));
        });
    }
    // Mapped whole.
    fires(&["R-31"], |world| {
        world.root(|root| {
            root.split_queue.first.store(LARGE_FRAME, Relaxed);
            root.split_queue.last.store(LARGE_FRAME, Relaxed);
            root.split_queue.count.store(512, Relaxed);
        });
    });
}
