use std::sync::atomic::Ordering::Relaxed;

use abi::objects::{File, Kswapd, Pa, SlabId, SwapSlot, Task, TaskState, task_flags};

use super::fires;
use crate::check::world::{DATA, World};

/// Gives the guest a reclaim thread that rests, with as many free frames as its low mark.
fn thread(world: &World) -> u64 {
    let gpa = world.root(|root| root.slabs[SlabId::Task as usize].free.load(Relaxed));
    let free = world.object::<Task>(gpa).next.get().0;
    let (next, frames) = world.root(|root| {
        let slab = &root.slabs[SlabId::Task as usize];
        slab.free.store(free, Relaxed);
        slab.used.fetch_add(1, Relaxed);
        let next = root.tasks.get();
        root.tasks.set(Pa::new(gpa));
        let frames = root.free_frames.load(Relaxed);
        root.kswapd.task.set(Pa::new(gpa));
        root.kswapd.min.store(frames / 2, Relaxed);
        root.kswapd.low.store(frames, Relaxed);
        root.kswapd.high.store(frames + 1, Relaxed);
        (next, frames)
    });
    assert!(frames > 2);
    world.update::<Task, _>(gpa, |task| {
        task.next.set(Pa::NULL);
        task.id.store(3, Relaxed);
        task.process.store(3, Relaxed);
        task.state.store(TaskState::Blocked as u32, Relaxed);
        task.waits_for.store(Task::WAITS_FOR_WORK, Relaxed);
        task.flags.store(task_flags::KERNEL, Relaxed);
        task.affinity.store(u64::MAX, Relaxed);
        task.leader.set(Pa::new(gpa));
        task.next_task.set(next);
    });
    gpa
}

#[test]
fn a_sound_guest_with_a_reclaim_thread_is_clean() {
    fires(&[], |world| {
        thread(world);
    });
    // It has much to do, and does.
    fires(&[], |world| {
        let gpa = thread(world);
        world.root(|root| root.kswapd.low.fetch_add(1, Relaxed));
        world.update::<Task, _>(gpa, |task| {
            task.state.store(TaskState::Ready as u32, Relaxed);
        });
    });
}

#[test]
fn l40_a_thread_of_the_kernel_is_a_process_too() {
    fires(&["L-40"], |world| {
        let gpa = thread(world);
        world.update::<Task, _>(gpa, |task| task.parent.store(1, Relaxed));
    });
    fires(&["L-40"], |world| {
        let gpa = thread(world);
        world.update::<Task, _>(gpa, |task| task.flags.store(0, Relaxed));
    });
    fires(&["L-40"], |world| {
        thread(world);
        let process = world.root(|root| root.tasks.get());
        let process = world.object::<Task>(process.0).next_task.get().0;
        world.update::<Task, _>(process, |task| {
            task.flags.store(task_flags::KERNEL, Relaxed);
        });
    });
    fires(&["L-40"], |world| {
        world.root(|root| root.kswapd.task.set(Pa::new(0x7000)));
    });
    fires(&["L-40"], |world| {
        world.root(|root| root.khugepaged.task.set(Pa::new(0x7000)));
    });
}

#[test]
fn s40_the_marks_are_out_of_order() {
    fires(&["S-40"], |world| {
        thread(world);
        world.root(|root| root.kswapd.high.store(1, Relaxed));
    });
    fires(&["S-40"], |world| {
        world.root(|root| root.kswapd.high.store(1, Relaxed));
    });
}

#[test]
fn s41_nobody_has_woken_the_thread() {
    fires(&["S-41"], |world| {
        thread(world);
        world.root(|root| root.kswapd.low.fetch_add(1, Relaxed));
    });
    fires(&[], |world| {
        thread(world);
        world.root(|root| {
            root.kswapd.low.fetch_add(1, Relaxed);
            root.kswapd.failures.store(1, Relaxed);
        });
    });
    fires(&["S-41"], |world| {
        thread(world);
        world.root(|root| {
            let failures = &root.kswapd.failures;
            failures.store(Kswapd::MAX_FAILURES + 1, Relaxed);
        });
    });
}

/// A guest with swap slots in which a page is being moved.
fn moving(world: &World) {
    let array = world.mapped_frame(world.child, DATA + abi::layout::PAGE_SIZE) << 12;
    world.update::<SwapSlot, _>(array, |slot| slot.count.store(0, Relaxed));
    world.root(|root| root.swap.requests[0].folio.store(array, Relaxed));
}

/// Who sleeps holds what goes with a task over a sleep, and nothing else.
#[test]
fn the_lock_of_a_file_may_be_held_over_a_sleep() {
    let locked = |world: &World| {
        world.update::<File, _>(world.file, |file| file.inode_lock.store(1 << 63, Relaxed));
    };
    fires(&["L-14"], |world| locked(world));
    for what in [Task::WAITS_FOR_SWAP, Task::WAITS_FOR_LOCK] {
        let world = World::new();
        locked(&world);
        let task = world.root(|root| root.tasks.get());
        world.update::<Task, _>(task.0, |task| {
            task.state.store(TaskState::Blocked as u32, Relaxed);
            task.waits_for.store(what, Relaxed);
        });
        assert!(world.violated().is_empty(), "{what}");
        world.root(|root| root.buddy_lock.store(1, Relaxed));
        assert_eq!(
            world.violated().into_keys().collect::<Vec<_>>(),
            ["L-14"],
            "{what}"
        );
    }
}

/// Who sleeps has folios in hand: what is counted may be off. A transfer that nobody waits for is nobody's.
#[test]
fn a_task_that_waits_for_the_swap_area_is_in_the_middle_of_something() {
    fires(&["L-14"], |world| moving(world));
    for state in [TaskState::Blocked, TaskState::Ready] {
        let world = World::new();
        moving(&world);
        let task = world.root(|root| root.tasks.get());
        world.update::<Task, _>(task.0, |task| {
            task.state.store(state as u32, Relaxed);
            task.waits_for.store(Task::WAITS_FOR_SWAP, Relaxed);
        });
        let frame = world.mapped_frame(world.parent, DATA);
        world.folio(frame, |folio| folio.refcount.fetch_add(1, Relaxed));
        assert!(world.violated().is_empty());
        let skipped = world.judge().skipped;
        let leaks = skipped.iter().find(|skipped| skipped.id == "R-04");
        let reason = &leaks.expect("not judged").reason;
        assert_eq!(reason, "task 2 waits for the swap area");
    }
    fires(&["L-14"], |world| {
        world.root(|root| root.kswapd.reclaiming.store(1, Relaxed));
    });
}
