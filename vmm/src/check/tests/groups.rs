use std::sync::atomic::Ordering::Relaxed;

use abi::layout::{PAGE_SHIFT, PAGE_SIZE};
use abi::objects::{FrameKind, MemGroup, Mm, Pa, SwapSlot, group_stat};

use crate::check::world::{DATA, TEXT, World};

/// Requires exactly `ids` to be violated in a guest that `corrupt` has broken, with two groups, the second below the
/// first: of it are two pages of the parent, one of the file, and a table.
fn fires(ids: &[&str], corrupt: impl FnOnce(&World, u64)) {
    super::fires(ids, |world| {
        // Any memory will do for the array: this is a page of a program.
        let array = world.mapped_frame(world.parent, TEXT + PAGE_SIZE) << PAGE_SHIFT;
        world.memory.write(array, &[0; 0x800]).unwrap();
        world.root(|root| root.frame_groups.set(Pa::new(array)));
        let file = world.frame_of_kind(FrameKind::File);
        let pages = [DATA, DATA + PAGE_SIZE].map(|gva| world.mapped_frame(world.parent, gva));
        for frame in pages {
            world.memory.write(array + frame, &[2]).unwrap();
        }
        let table = world.frame_of_kind(FrameKind::Table);
        world.memory.write(array + file, &[2]).unwrap();
        world.memory.write(array + table, &[1]).unwrap();
        for (number, parent, stats) in [(1, 0, [2, 1, 1, 0]), (2, 1, [2, 1, 0, 0])] {
            group(world, number, |group| {
                group.live.store(1, Relaxed);
                group.parent.store(parent, Relaxed);
                for (word, value) in group.stats.iter().zip(stats) {
                    word.store(value, Relaxed);
                }
                let usage = stats.iter().sum();
                for word in [&group.usage, &group.max, &group.watermark] {
                    word.store(usage, Relaxed);
                }
            });
        }
        world.update::<Mm, _>(world.parent, |mm| mm.group.store(2, Relaxed));
        corrupt(world, array);
    });
}

fn group(world: &World, number: usize, change: impl FnOnce(&MemGroup)) {
    world.root(|root| change(&root.groups[number - 1]));
}

#[test]
fn a_sound_guest_with_groups_is_clean() {
    fires(&[], |_, _| {});
}

#[test]
fn g01_a_group_miscounts_its_usage() {
    fires(&["G-01"], |world, _| {
        group(world, 1, |group| {
            group.usage.store(3, Relaxed);
        });
    });
    // What is charged to it is no longer there.
    fires(&["G-01", "G-02"], |world, array| {
        let frame = world.mapped_frame(world.parent, DATA);
        world.memory.write(array + frame, &[0]).unwrap();
    });
    fires(&["G-01", "G-02"], |world, _| {
        world.root(|root| root.frame_groups.set(Pa::new(u64::MAX)));
    });
}

#[test]
fn g02_a_group_miscounts_a_statistic() {
    for stat in 0..group_stat::NAMES.len() {
        fires(&["G-02"], |world, _| {
            group(world, 2, |group| {
                group.stats[stat].fetch_add(1, Relaxed);
            });
        });
    }
}

#[test]
fn g03_a_parent_has_less_than_its_children() {
    fires(&["G-01", "G-03"], |world, _| {
        group(world, 1, |group| {
            group.usage.store(2, Relaxed);
        });
    });
}

#[test]
fn g04_somebody_names_a_group_that_there_is_not() {
    fires(&["G-04"], |world, array| {
        let frame = world.mapped_frame(world.child, DATA + PAGE_SIZE);
        world.memory.write(array + frame, &[9]).unwrap();
    });
    fires(&["G-04"], |world, _| {
        world.update::<Mm, _>(world.child, |mm| mm.group.store(3, Relaxed));
    });
    fires(&["G-04"], |world, _| {
        group(world, 3, |group| {
            group.live.store(1, Relaxed);
            group.parent.store(7, Relaxed);
        });
    });
    // In a circle.
    fires(&["G-04"], |world, _| {
        for (number, parent) in [(3, 4), (4, 3)] {
            group(world, number, |group| {
                group.live.store(1, Relaxed);
                group.parent.store(parent, Relaxed);
            });
        }
    });
}

#[test]
fn g05_a_group_has_more_than_it_may() {
    fires(&["G-05"], |world, _| {
        group(world, 2, |group| {
            group.max.store(2, Relaxed);
        });
    });
    fires(&["G-05"], |world, _| {
        group(world, 2, |group| {
            group.watermark.store(2, Relaxed);
        });
    });
}

#[test]
fn g06_a_free_frame_is_charged() {
    for kind in [FrameKind::Kernel, FrameKind::Buddy] {
        fires(&["G-01", "G-06"], |world, array| {
            let frame = world.frame_of_kind(kind);
            world.memory.write(array + frame, &[1]).unwrap();
        });
    }
    // (S-23: with slots there must be lists.)
    fires(&["G-02", "G-06", "S-23"], |world, array| {
        // The rest of the array of groups will do for slots.
        let slots = array + 0x400;
        world.root(|root| root.swap.slots.set(Pa::new(slots)));
        world.update::<SwapSlot, _>(slots, |slot| slot.group.store(2, Relaxed));
        world.root(|root| root.swap.nr_slots.store(1, Relaxed));
    });
}
