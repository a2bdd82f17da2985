use std::sync::atomic::Ordering::Relaxed;

use abi::layout::PAGE_SIZE;
use abi::objects::{FrameKind, Mm, Pa, SlabId, Task, Vma};

use super::fires;
use crate::check::Moment;
use crate::check::world::World;
use crate::inspect::Stop;

/// Where the second task lies, which is first on the list, and the first.
fn tasks(world: &World) -> (u64, u64) {
    let second = world.root(|root| root.tasks.get());
    (second.0, world.object::<Task>(second.0).next_task.get().0)
}

#[test]
fn l01_a_vcpu_walks_a_freed_table() {
    fires(&["L-01"], |world| {
        let free = world.frame_of_kind(FrameKind::PerCpu);
        world.vcpus[1].cr3 = free * PAGE_SIZE;
        // Always: also for a vCPU in the middle of the kernel.
        world.vcpus[1].stop = Stop::Anywhere;
    });
}

#[test]
fn l02_another_mm_is_loaded() {
    fires(&["L-02"], |world| world.vcpus[1].cr3 = world.vcpus[0].cr3);
}

#[test]
fn l03_a_shootdown_would_miss_a_cpu() {
    fires(&["L-03"], |world| {
        world.update::<Mm, _>(world.child, |mm| mm.cpumask.store(0, Relaxed));
    });
}

#[test]
fn l04_a_cpu_is_ahead_of_its_mm() {
    fires(&["L-04", "L-16"], |world| {
        world.cpu(1, |cpu| cpu.loaded_asid().tlb_gen.store(6, Relaxed));
    });
}

#[test]
fn l05_a_program_runs_on_a_lazy_cpu() {
    fires(&["L-05"], |world| {
        world.cpu(0, |cpu| cpu.lazy.store(1, Relaxed));
    });
}

#[test]
fn l06_a_blocked_task_is_current() {
    fires(&["L-06"], |world| {
        let (second, _) = tasks(world);
        world.cpu(1, |cpu| cpu.current.set(Pa::new(second)));
    });
}

#[test]
fn l07_a_dead_mm_is_on_the_list() {
    fires(&["L-07", "L-13"], |world| {
        world.update::<Mm, _>(world.child, |mm| mm.count.store(0, Relaxed));
    });
}

#[test]
fn l08_mm_users_is_off() {
    fires(&["L-08"], |world| {
        world.update::<Mm, _>(world.child, |mm| mm.users.fetch_add(1, Relaxed));
    });
}

#[test]
fn l09_two_tasks_share_a_number() {
    fires(&["L-09"], |world| {
        let (second, _) = tasks(world);
        world.update::<Task, _>(second, |task| task.id.store(1, Relaxed));
    });
}

#[test]
fn l10_a_list_leads_nowhere() {
    fires(&["L-10"], |world| {
        let (_, first) = tasks(world);
        world.update::<Task, _>(first, |task| task.next_task.set(Pa::new(u64::MAX - 7)));
    });
}

#[test]
fn l10_a_list_is_a_ring() {
    fires(&["L-10"], |world| {
        let (second, first) = tasks(world);
        world.update::<Task, _>(first, |task| task.next_task.set(Pa::new(second)));
    });
}

#[test]
fn l11_an_object_is_in_use_and_unreachable() {
    fires(&["L-11"], |world| {
        let id = SlabId::Vma as usize;
        let leaked = world.root(|root| root.slabs[id].free.load(Relaxed));
        let next = world.object::<Vma>(leaked).chains.get();
        world.root(|root| {
            root.slabs[id].free.store(next.0, Relaxed);
            root.slabs[id].used.fetch_add(1, Relaxed);
        });
    });
}

#[test]
fn l12_processes_are_left_at_the_end() {
    fires(&["L-12"], |world| world.moment = Moment::AfterExit);
}

#[test]
fn l13_a_lazy_cpu_holds_no_reference() {
    fires(&["L-13"], |world| {
        world.update::<Mm, _>(world.child, |mm| mm.count.store(1, Relaxed));
    });
}

#[test]
fn l14_a_lock_is_never_released() {
    fires(&["L-14"], |world| {
        world.root(|root| root.sched_lock.store(2, Relaxed));
    });
}

#[test]
fn l14_a_shootdown_is_never_acknowledged() {
    fires(&["L-14"], |world| {
        let parent = world.parent;
        world.cpu(0, |cpu| {
            cpu.flush.mm.set(Pa::new(parent));
            cpu.flush.pending.store(2, Relaxed);
        });
    });
}

#[test]
fn l14_an_unmap_never_flushes() {
    fires(&["L-14"], |world| {
        world.update::<Mm, _>(world.parent, |mm| mm.flush_pending.store(1, Relaxed));
    });
}

#[test]
fn l15_an_mm_is_loaded_with_another_ones_slot() {
    fires(&["L-15"], |world| {
        world.cpu(1, |cpu| cpu.loaded_asid().mm.store(1, Relaxed));
    });
}

#[test]
fn l15_cr3_has_another_pcid() {
    fires(&["L-15"], |world| world.vcpus[0].cr3 ^= 1);
}

#[test]
fn l15_a_pcid_without_a_slot_is_loaded() {
    // A slot for every number is a guest's word for nothing: the host reads what lies behind none.
    fires(&["L-15"], |world| {
        world.vcpus[1].cr3 &= !0xfff;
        world.cpu(1, |cpu| cpu.pcid.store(u64::MAX, Relaxed));
    });
}

#[test]
fn l16_two_slots_name_one_mm() {
    fires(&["L-16"], |world| {
        world.cpu(1, |cpu| {
            let mm = cpu.loaded_asid().mm.load(Relaxed);
            cpu.asids[0].mm.store(mm, Relaxed);
        });
    });
}

#[test]
fn l16_a_slot_that_is_not_loaded_is_ahead_of_its_mm() {
    fires(&["L-16"], |world| {
        let parent = world.object::<Mm>(world.parent).id.load(Relaxed);
        world.cpu(1, |cpu| {
            cpu.asids[0].mm.store(parent, Relaxed);
            cpu.asids[0].tlb_gen.store(6, Relaxed);
        });
    });
}

#[test]
fn l16_a_slot_names_an_mm_that_never_was() {
    fires(&["L-16"], |world| {
        world.cpu(1, |cpu| cpu.asids[0].mm.store(1000, Relaxed));
    });
}
