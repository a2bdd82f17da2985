use std::sync::atomic::Ordering::Relaxed;

use abi::layout::{PAGE_SHIFT, PAGE_SIZE};
use abi::objects::{File, FrameKind, Pa, SwapSlot, folio_state, lru};
use abi::pte::NonPresent;

use super::non_present::add_entry;
use crate::check::world::{DATA, EMPTY, World};

/// Requires exactly `ids` to be violated in a guest with four swap slots that `corrupt` has broken.
fn fires(ids: &[&str], corrupt: impl FnOnce(&World)) {
    super::fires(ids, |world| {
        // Any memory will do for the array: this is a page of a program.
        let array = world.mapped_frame(world.child, DATA + PAGE_SIZE) << PAGE_SHIFT;
        world.root(|root| {
            root.swap.slots.set(Pa::new(array));
            root.swap.nr_slots.store(4, Relaxed);
        });
        let frames = world.root(|root| root.nr_frames.load(Relaxed));
        for frame in 1..frames {
            let is_listed = world.folio(frame, |folio| {
                folio.kind.load(Relaxed) == FrameKind::Anon as u8
            });
            if is_listed {
                list(world, frame, lru::INACTIVE);
            }
        }
        corrupt(world);
    });
}

/// Puts a frame on a list.
fn list(world: &World, frame: u64, number: usize) {
    let pages = 1 << world.folio(frame, |folio| folio.order.load(Relaxed));
    let next = world.root(|root| {
        let list = &root.lru[number];
        let next = list.first.swap(frame, Relaxed);
        if next == 0 {
            list.last.store(frame, Relaxed);
        }
        list.count.fetch_add(pages, Relaxed);
        next
    });
    world.folio(frame, |folio| {
        folio.state.fetch_or(folio_state::LRU, Relaxed);
        folio.next.store(next, Relaxed);
        folio.prev.store(0, Relaxed);
    });
    if next != 0 {
        world.folio(next, |folio| folio.prev.store(frame, Relaxed));
    }
}

fn slot(world: &World, slot: u64, change: impl FnOnce(&SwapSlot)) {
    let array = world.root(|root| root.swap.slots.get().0);
    let at = array + slot * size_of::<SwapSlot>() as u64;
    world.update::<SwapSlot, _>(at, |slot| change(slot));
    world.root(|root| root.swap.used.fetch_add(1, Relaxed));
}

#[test]
fn a_sound_guest_with_swap_is_clean() {
    fires(&[], |_| {});
    fires(&[], |world| {
        let frame = world.mapped_frame(world.parent, DATA);
        world.folio(frame, |folio| {
            folio.used.store(3, Relaxed);
            folio.refcount.fetch_add(1, Relaxed);
        });
        slot(world, 2, |slot| {
            slot.folio.store(frame << PAGE_SHIFT, Relaxed);
        });
    });
}

#[test]
fn s20_a_slot_miscounts_its_entries() {
    fires(&["S-20"], |world| {
        slot(world, 1, |slot| slot.count.store(1, Relaxed));
    });
    fires(&["S-20"], |world| {
        let said = NonPresent::Swap {
            slot: 9,
            exclusive: true,
        };
        add_entry(world, EMPTY, said.entry());
    });
    fires(&["S-20"], |world| {
        world.root(|root| root.swap.slots.set(Pa::new(u64::MAX - 7)));
    });
}

#[test]
fn s21_slot_and_folio_disagree() {
    fires(&["S-21"], |world| {
        let frame = world.mapped_frame(world.parent, DATA);
        slot(world, 0, |slot| {
            slot.folio.store(frame << PAGE_SHIFT, Relaxed);
        });
    });
    fires(&["S-21"], |world| {
        let frame = world.mapped_frame(world.parent, DATA);
        world.folio(frame, |folio| folio.used.store(77, Relaxed));
    });
}

#[test]
fn s22_the_area_miscounts_its_slots() {
    fires(&["S-22"], |world| {
        world.root(|root| root.swap.used.store(1, Relaxed));
    });
}

#[test]
fn s23_a_folio_that_reclaim_does_not_find() {
    // The first one is skipped.
    fires(&["S-23"], |world| {
        let second = world.root(|root| {
            let first = root.lru[lru::INACTIVE].first.load(Relaxed);
            root.lru[lru::INACTIVE].count.fetch_sub(1, Relaxed);
            first
        });
        let next = world.folio(second, |folio| folio.next.load(Relaxed));
        world.folio(next, |folio| folio.prev.store(0, Relaxed));
        world.root(|root| root.lru[lru::INACTIVE].first.store(next, Relaxed));
    });
    fires(&["S-23"], |world| {
        world.root(|root| root.lru[lru::ACTIVE].count.store(1, Relaxed));
    });
    // A loop, a frame of another kind, one that there is not, one that says it is active.
    let first = |world: &World| world.root(|root| root.lru[lru::INACTIVE].first.load(Relaxed));
    fires(&["S-23"], |world| {
        let frame = first(world);
        world.folio(frame, |folio| folio.next.store(frame, Relaxed));
    });
    for wrong in [1, u64::MAX] {
        fires(&["S-23"], |world| {
            world.folio(first(world), |folio| folio.next.store(wrong, Relaxed));
        });
    }
    fires(&["S-23"], |world| {
        world.folio(first(world), |folio| {
            folio.state.fetch_or(folio_state::ACTIVE, Relaxed);
        });
    });
}

/// The pages of the file, which is on the disk: they were read, and are dirty.
fn pages_on_disk(world: &World) -> Vec<u64> {
    world.update::<File, _>(world.file, |file| file.on_disk.store(1, Relaxed));
    let frames = world.root(|root| root.nr_frames.load(Relaxed));
    let is_page = |frame: &u64| {
        world.folio(*frame, |folio| {
            folio.kind.load(Relaxed) == FrameKind::File as u8
        })
    };
    let pages: Vec<u64> = (1..frames).filter(is_page).collect();
    for page in &pages {
        world.folio(*page, |folio| {
            let state = folio_state::UPTODATE | folio_state::DIRTY;
            folio.state.store(state, Relaxed);
        });
    }
    pages
}

#[test]
fn s23_a_page_of_a_file_that_reclaim_does_not_find() {
    let listed = |world: &World, number: usize, left_out: usize| {
        for page in &pages_on_disk(world)[left_out..] {
            list(world, *page, number);
        }
    };
    fires(&[], |world| listed(world, lru::INACTIVE_FILE, 0));
    fires(&["S-23"], |world| listed(world, lru::INACTIVE_FILE, 1));
    fires(&["S-23"], |world| listed(world, lru::INACTIVE, 0));
    fires(&["S-23"], |world| {
        listed(world, lru::INACTIVE_FILE, 0);
        // In memory, so there is nowhere to write it to.
        world.update::<File, _>(world.file, |file| file.on_disk.store(0, Relaxed));
        for page in 1..world.root(|root| root.nr_frames.load(Relaxed)) {
            world.folio(page, |folio| {
                if folio.kind.load(Relaxed) == FrameKind::File as u8 {
                    folio.state.store(0, Relaxed);
                }
            });
        }
    });
}

#[test]
fn s24_a_folio_is_cached_for_nobody() {
    fires(&["S-24"], |world| {
        let frame = world.frame_of_kind(FrameKind::Kernel);
        world.folio(frame, |folio| {
            folio.kind.store(FrameKind::Anon as u8, Relaxed);
            folio.used.store(1, Relaxed);
        });
        list(world, frame, lru::INACTIVE);
        slot(world, 0, |slot| {
            slot.folio.store(frame << PAGE_SHIFT, Relaxed);
        });
    });
}
