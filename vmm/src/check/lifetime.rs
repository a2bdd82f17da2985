//! L: who is alive, who has whom loaded, and what is left at the end.

use std::collections::{BTreeSet, HashMap};

use abi::channel::cr3;
use abi::layout::PAGE_SHIFT;
use abi::objects::{FrameKind, SlabId, TaskState};
use abi::pte::Pte;

use super::{Applies, Context, Family, Finding, Findings, InFlight, Invariant};
use crate::inspect::objects::CpuView;
use crate::inspect::{Stop, VcpuFacts};

const LAZY: &str = "Linux arch/x86/mm/tlb.c, switch_mm_irqs_off; Documentation/mm/active_mm.rst";

pub(super) const INVARIANTS: &[Invariant] = &[
    Invariant {
        id: "L-01",
        family: Family::Lifetime,
        predicate: "a vCPU's CR3 is the kernel's level-4 table or that of a live mm",
        applies: Applies::Always,
        source: "SDM vol. 3A, 5.10.5; Linux mm/mmu_gather.c",
        run: cr3_is_live,
    },
    Invariant {
        id: "L-02",
        family: Family::Lifetime,
        predicate: "a CPU's loaded_mm is the mm whose level-4 table is in its CR3",
        applies: Applies::VcpuAtPoint,
        source: LAZY,
        run: loaded_mm_agrees,
    },
    Invariant {
        id: "L-03",
        family: Family::Lifetime,
        predicate: "a CPU that has an mm loaded is in the mm's cpumask",
        applies: Applies::Always,
        source: "Linux arch/x86/mm/tlb.c (71b3c126e611, CVE-2016-2069)",
        run: loaded_mm_has_bit,
    },
    Invariant {
        id: "L-04",
        family: Family::Lifetime,
        predicate: "a CPU has not flushed up to a tlb_gen that its mm has not reached",
        applies: Applies::VcpuAtPoint,
        source: "Linux arch/x86/mm/tlb.c, flush_tlb_func",
        run: tlb_gen_not_ahead,
    },
    Invariant {
        id: "L-05",
        family: Family::Lifetime,
        predicate: "in user mode a CPU runs a running task of its own, with that task's mm loaded",
        applies: Applies::Always,
        source: "Linux kernel/sched/core.c, context_switch",
        run: current_is_consistent,
    },
    Invariant {
        id: "L-06",
        family: Family::Lifetime,
        predicate: "every running task is the current one of exactly one CPU, its own",
        applies: Applies::QuiescentKernel,
        source: "abi::objects::TaskState::Running",
        run: running_tasks_run,
    },
    Invariant {
        id: "L-07",
        family: Family::Lifetime,
        predicate: "an mm on the kernel's list is live and referenced",
        applies: Applies::InhabitedMm,
        source: "Linux include/linux/mm_types.h, mm_count",
        run: mms_are_referenced,
    },
    Invariant {
        id: "L-08",
        family: Family::Lifetime,
        predicate: "mm.users is the number of tasks that have the mm",
        applies: Applies::QuiescentKernel,
        source: "Linux include/linux/mm_types.h, mm_users",
        run: users_are_tasks,
    },
    Invariant {
        id: "L-09",
        family: Family::Lifetime,
        predicate: "a task's state exists, its number is its own, its mm is live",
        applies: Applies::QuiescentKernel,
        source: "abi::objects::Task",
        run: tasks_well_formed,
    },
    Invariant {
        id: "L-10",
        family: Family::Lifetime,
        predicate: "every link between kernel objects leads to a live object of its type",
        applies: Applies::QuiescentKernel,
        source: "Linux Documentation/mm/process_addrs.rst, lifetimes",
        run: links_are_sound,
    },
    Invariant {
        id: "L-11",
        family: Family::Lifetime,
        predicate: "a slab's objects in use are those that the kernel's lists lead to",
        applies: Applies::QuiescentKernel,
        source: "Linux mm/kmemleak.c",
        run: no_leaked_objects,
    },
    Invariant {
        id: "L-12",
        family: Family::Lifetime,
        predicate: "after the last exit no user memory and no page table of a process is left",
        applies: Applies::AfterExit,
        source: "Linux mm/mmap.c, exit_mmap",
        run: nothing_left,
    },
    Invariant {
        id: "L-13",
        family: Family::Lifetime,
        predicate: "mm.count is one for all users and one for every CPU that has it loaded",
        applies: Applies::QuiescentKernel,
        source: "Linux Documentation/mm/active_mm.rst; include/linux/mm_types.h, mm_count",
        run: count_is_right,
    },
    Invariant {
        id: "L-14",
        family: Family::Lifetime,
        predicate: "every lock is free and no shootdown waits",
        applies: Applies::OutsideKernel,
        source: "guest-kernel/src/sync; Linux kernel/locking/lockdep.c, lockdep_sys_exit",
        run: nothing_is_held,
    },
    Invariant {
        id: "L-15",
        family: Family::Lifetime,
        predicate: "a CPU's PCID is the one of a slot that names its loaded mm, and no other is in its CR3",
        applies: Applies::VcpuAtPoint,
        source: "Linux arch/x86/mm/tlb.c, switch_mm_irqs_off; SDM vol. 3A, 5.10.1",
        run: pcid_is_of_loaded_mm,
    },
    Invariant {
        id: "L-16",
        family: Family::Lifetime,
        predicate: "no two slots of a CPU name one mm, and none names one that never was or is ahead of its tlb_gen",
        applies: Applies::VcpuAtPoint,
        source: "Linux arch/x86/mm/tlb.c, choose_new_asid",
        run: slots_are_sound,
    },
];

fn cr3_is_live(context: &Context<'_>, findings: &mut Findings) {
    let snapshot = context.snapshot;
    for facts in context.vcpus {
        let pgd = Pte(facts.cr3).address();
        let mm = snapshot.mms.iter().find(|mm| mm.pgd == pgd);
        let live = pgd == snapshot.root.pgd || mm.is_some_and(|mm| mm.generation % 2 == 1);
        findings.require(live, || {
            let folio = snapshot.folio(pgd);
            Finding::new("a vCPU has a dead address space loaded")
                .expected(format!(
                    "the kernel's table {:#x} or a live mm's",
                    snapshot.root.pgd
                ))
                .found(folio.map_or("a table outside memory".into(), |folio| {
                    format!(
                        "frame {:#x}: {}, generation {}",
                        folio.frame,
                        folio.kind_name(),
                        folio.generation
                    )
                }))
                .vcpu(facts.index)
                .frame(pgd >> PAGE_SHIFT)
                .details(
                    snapshot
                        .mms
                        .iter()
                        .map(|mm| format!("mm {} has table {:#x}", mm.id, mm.pgd))
                        .take(8),
                )
        });
    }
}

/// CPUs at a point or outside the kernel, with the facts about their vCPU; the others are counted as skipped.
fn settled_cpus<'c>(
    context: &'c Context<'_>,
    findings: &mut Findings,
) -> Vec<(&'c CpuView, &'c VcpuFacts)> {
    let mut quiet = Vec::new();
    for cpu in &context.snapshot.cpus {
        let facts = context.vcpus.iter().find(|facts| facts.index == cpu.index);
        match (context.in_flight.between_points(cpu.index), facts) {
            (None, Some(facts)) => quiet.push((cpu, facts)),
            (Some(busy), _) => findings.skip(busy),
            (None, None) => {}
        }
    }
    quiet
}

fn loaded_mm_agrees(context: &Context<'_>, findings: &mut Findings) {
    let snapshot = context.snapshot;
    for (cpu, facts) in settled_cpus(context, findings) {
        let expected = match cpu.loaded_mm {
            0 => Some(snapshot.root.pgd),
            mm => snapshot.mm_at(mm).map(|mm| mm.pgd),
        };
        let pgd = Pte(facts.cr3).address();
        findings.require(expected == Some(pgd), || {
            let expected =
                expected.map_or("an mm on the list".into(), |pgd| format!("CR3 = {pgd:#x}"));
            Finding::new("CR3 is not what the kernel believes to be loaded")
                .expected(format!(
                    "{expected}, of {}",
                    snapshot.mm_name(cpu.loaded_mm)
                ))
                .found(format!("CR3 = {pgd:#x}"))
                .vcpu(cpu.index)
        });
    }
}

fn loaded_mm_has_bit(context: &Context<'_>, findings: &mut Findings) {
    // The bit is set before the mm is loaded, and cleared after it is not any more.
    for cpu in &context.snapshot.cpus {
        let Some(mm) = context.snapshot.mm_at(cpu.loaded_mm) else {
            continue;
        };
        findings.require(mm.cpumask >> cpu.index & 1 == 1, || {
            Finding::new("shootdowns of an mm miss a CPU that has it loaded")
                .expected(format!("bit {} set", cpu.index))
                .found(format!("cpumask = {:#b}", mm.cpumask))
                .vcpu(cpu.index)
                .mm(mm.id)
        });
    }
}

fn tlb_gen_not_ahead(context: &Context<'_>, findings: &mut Findings) {
    for (cpu, _) in settled_cpus(context, findings) {
        let Some(mm) = context.snapshot.mm_at(cpu.loaded_mm) else {
            continue;
        };
        findings.require(cpu.tlb_gen <= mm.tlb_gen, || {
            Finding::new("a CPU claims a flush that was never asked for")
                .expected(format!("tlb_gen <= {}, the mm's", mm.tlb_gen))
                .found(format!("tlb_gen = {}", cpu.tlb_gen))
                .vcpu(cpu.index)
                .mm(mm.id)
        });
    }
}

fn pcid_is_of_loaded_mm(context: &Context<'_>, findings: &mut Findings) {
    for (cpu, facts) in settled_cpus(context, findings) {
        // With the soft TLB's PCIDs the processor has none.
        let in_cr3 = facts.cr3 & cr3::PCID;
        findings.require(in_cr3 == 0 || in_cr3 == cpu.pcid, || {
            Finding::new("CR3 has another PCID than the kernel believes")
                .expected(format!("PCID {}", cpu.pcid))
                .found(format!("CR3 = {:#x}", facts.cr3))
                .vcpu(cpu.index)
        });
        let Some(mm) = context.snapshot.mm_at(cpu.loaded_mm) else {
            continue;
        };
        let slot = cpu.pcid.saturating_sub(1);
        let asid = cpu.asids.get(slot as usize);
        findings.require(asid.is_some_and(|asid| asid.mm == mm.id), || {
            Finding::new("an mm is loaded with a PCID whose slot is not its own")
                .expected(format!("slot {slot} names mm {}", mm.id))
                .found(asid.map_or("no such slot".into(), |asid| format!("mm {}", asid.mm)))
                .vcpu(cpu.index)
                .mm(mm.id)
        });
    }
}

fn slots_are_sound(context: &Context<'_>, findings: &mut Findings) {
    let snapshot = context.snapshot;
    for (cpu, _) in settled_cpus(context, findings) {
        let used = cpu
            .asids
            .iter()
            .enumerate()
            .filter(|(_, asid)| asid.mm != 0);
        for (slot, asid) in used {
            // A dead mm may be named: nobody asks for its number again.
            let mm = snapshot.mms.iter().find(|mm| mm.id == asid.mm);
            let twin = cpu.asids[..slot]
                .iter()
                .position(|other| other.mm == asid.mm);
            let is_ahead = mm.is_some_and(|mm| asid.tlb_gen > mm.tlb_gen);
            let is_sound = twin.is_none() && asid.mm < snapshot.root.next_mm && !is_ahead;
            findings.require(is_sound, || {
                let found = match (twin, mm) {
                    (Some(twin), _) => format!("slot {twin} does too"),
                    (_, Some(mm)) => format!("tlb_gen {} of {}", asid.tlb_gen, mm.tlb_gen),
                    (..) => format!(
                        "mms were made up to number {}",
                        snapshot.root.next_mm.saturating_sub(1)
                    ),
                };
                Finding::new(format!("slot {slot} of a CPU names mm {}", asid.mm))
                    .expected("one slot of an mm that was made, no further than its tlb_gen")
                    .found(found)
                    .vcpu(cpu.index)
                    .mm(asid.mm)
            });
        }
    }
}

fn current_is_consistent(context: &Context<'_>, findings: &mut Findings) {
    let in_user = context.vcpus.iter().filter(|facts| facts.cpl == 3);
    for cpu in in_user.filter_map(|facts| context.snapshot.cpus.get(facts.index)) {
        let task = context.snapshot.task_at(cpu.current);
        let right = task.is_some_and(|task| {
            task.state() == Some(TaskState::Running)
                && task.cpu as usize == cpu.index
                && task.mm != 0
                && task.mm == cpu.loaded_mm
                && !cpu.lazy
        });
        findings.require(right, || {
            let loaded = context.snapshot.mm_name(cpu.loaded_mm);
            let lazy = if cpu.lazy { ", lazily" } else { "" };
            Finding::new("a user program runs on a CPU that is not set up for it")
                .expected(format!(
                    "a running task of CPU {} whose mm is loaded",
                    cpu.index
                ))
                .found(match task {
                    None => "no task".into(),
                    Some(task) => format!(
                        "task {} ({}, CPU {}, {}); {loaded} is loaded{lazy}",
                        task.id,
                        task.state_name(),
                        task.cpu,
                        context.snapshot.mm_name(task.mm)
                    ),
                })
                .vcpu(cpu.index)
        });
    }
}

fn running_tasks_run(context: &Context<'_>, findings: &mut Findings) {
    let exited = |cpu: usize| {
        let facts = context.vcpus.iter().find(|facts| facts.index == cpu);
        facts.is_some_and(|facts| facts.stop == Stop::Exited)
    };
    for task in &context.snapshot.tasks {
        let on: Vec<_> = context
            .snapshot
            .cpus
            .iter()
            .filter(|cpu| cpu.current == task.gpa)
            .map(|cpu| cpu.index)
            .collect();
        // The task that ended the run never gave its CPU away.
        if on.iter().any(|&cpu| exited(cpu)) {
            continue;
        }
        let runs = task.state() == Some(TaskState::Running);
        let right = if runs {
            on == [task.cpu as usize]
        } else {
            on.is_empty()
        };
        findings.require(right, || {
            Finding::new(format!(
                "task {} and the CPUs disagree about where it runs",
                task.id
            ))
            .expected(if runs {
                format!("current of CPU {} only", task.cpu)
            } else {
                "current of no CPU".into()
            })
            .found(format!("{}, current of CPUs {on:?}", task.state_name()))
            .object("Task", task.gpa)
        });
    }
}

fn mms_are_referenced(context: &Context<'_>, findings: &mut Findings) {
    for space in context.spaces_without(InFlight::homeless, findings) {
        let mm = space.mm;
        let live = mm.count > 0 && mm.generation % 2 == 1 && mm.id != 0;
        findings.require(live, || {
            Finding::new("an mm on the kernel's list is dead")
                .expected("count > 0, odd generation")
                .found(format!(
                    "count = {}, users = {}, generation {}",
                    mm.count, mm.users, mm.generation
                ))
                .mm(mm.id)
                .object("Mm", mm.gpa)
        });
    }
}

fn count_is_right(context: &Context<'_>, findings: &mut Findings) {
    for mm in &context.snapshot.mms {
        let cpus = context
            .snapshot
            .cpus
            .iter()
            .filter(|cpu| cpu.loaded_mm == mm.gpa);
        let on: Vec<_> = cpus.map(|cpu| cpu.index).collect();
        let users = u32::from(mm.users > 0);
        findings.require(mm.count as usize == on.len() + users as usize, || {
            Finding::new("mm.count is wrong")
                .expected(format!(
                    "{}: CPUs {on:?}, and {users} for its users",
                    on.len() + users as usize
                ))
                .found(mm.count)
                .mm(mm.id)
        });
    }
}

fn users_are_tasks(context: &Context<'_>, findings: &mut Findings) {
    for mm in &context.snapshot.mms {
        let tasks = context
            .snapshot
            .tasks
            .iter()
            .filter(|task| task.mm == mm.gpa);
        let users: Vec<_> = tasks.map(|task| task.id).collect();
        findings.require(mm.users as usize == users.len(), || {
            Finding::new("mm.users is wrong")
                .expected(format!("{}: tasks {users:?}", users.len()))
                .found(mm.users)
                .mm(mm.id)
        });
    }
}

fn tasks_well_formed(context: &Context<'_>, findings: &mut Findings) {
    let snapshot = context.snapshot;
    let mut numbers = HashMap::new();
    for task in &snapshot.tasks {
        let first = *numbers.entry(task.id).or_insert(task.gpa);
        let state = task.state().is_some_and(|state| state != TaskState::Free);
        let mm = task.mm == 0 || snapshot.mm_at(task.mm).is_some();
        findings.require(state && mm && task.id != 0 && first == task.gpa, || {
            let shared = if first == task.gpa {
                ""
            } else {
                " (another task's too)"
            };
            Finding::new("a task makes no sense")
                .expected("a number of its own, a state, an mm on the list or none")
                .found(format!(
                    "number {}{shared}, {}, {}",
                    task.id,
                    task.state_name(),
                    snapshot.mm_name(task.mm)
                ))
                .object("Task", task.gpa)
        });
    }
}

fn links_are_sound(context: &Context<'_>, findings: &mut Findings) {
    let snapshot = context.snapshot;
    let vmas: usize = snapshot.mms.iter().map(|mm| mm.vmas.len()).sum();
    let objects = snapshot.mms.len() + snapshot.tasks.len() + snapshot.anon_vmas.len() + vmas;
    findings.examined += objects as u64;
    // What goes wrong inside a VMA tree is V-04's and V-07's.
    let own = |link: &str| !matches!(link, "Mm.vmas" | "VmaNode.slots");
    for anomaly in snapshot
        .anomalies
        .iter()
        .filter(|anomaly| own(anomaly.link))
    {
        findings.report(|| {
            Finding::new(format!("{} cannot be followed", anomaly.link))
                .expected("a live object of its type, linked once")
                .found(format!(
                    "{:#x}: {}",
                    anomaly.target,
                    anomaly.problem.describe()
                ))
                .object("holder", anomaly.holder)
        });
    }
}

fn no_leaked_objects(context: &Context<'_>, findings: &mut Findings) {
    let snapshot = context.snapshot;
    let vmas = || snapshot.mms.iter().flat_map(|mm| &mm.vmas);
    let chains: BTreeSet<_> = vmas()
        .flat_map(|vma| &vma.chains)
        .chain(
            snapshot
                .anon_vmas
                .values()
                .flat_map(|anon_vma| &anon_vma.chains),
        )
        .map(|chain| chain.gpa)
        .collect();
    // On no list any more, until a grace period is over: each goes with its level-4 table.
    let retired = snapshot
        .folios
        .iter()
        .filter(|folio| folio.is(FrameKind::Retired));
    let retired_mms = retired.filter(|folio| folio.index == 4).count();
    let reached = [
        (SlabId::Mm, snapshot.mms.len() + retired_mms),
        (SlabId::Vma, vmas().count()),
        (
            SlabId::VmaNode,
            snapshot.mms.iter().map(|mm| mm.nodes.len()).sum(),
        ),
        (SlabId::AnonVma, snapshot.anon_vmas.len()),
        (SlabId::AnonVmaChain, chains.len()),
        (SlabId::Task, snapshot.tasks.len()),
        (SlabId::File, snapshot.files.len()),
        (
            SlabId::CacheNode,
            snapshot.files.values().map(|file| file.nodes).sum(),
        ),
        (SlabId::OpenFile, snapshot.open_files.len()),
        (SlabId::FileTable, snapshot.file_tables.len()),
    ];
    for (slab, reached) in reached {
        let used = snapshot.root.slabs[slab as usize].used;
        findings.require(used == reached as u64, || {
            Finding::new(format!(
                "{slab:?} objects are in use that nothing leads to, or the reverse"
            ))
            .expected(format!("{reached} in use, as many as can be reached"))
            .found(format!("{used} in use"))
        });
    }
}

fn nothing_left(context: &Context<'_>, findings: &mut Findings) {
    let snapshot = context.snapshot;
    findings.examined += snapshot.folios.len() as u64;
    // A CPU may keep the last mm loaded: then its level-4 table is rightly alive, and nothing else.
    let kept = |mm: &u64| snapshot.cpus.iter().any(|cpu| cpu.loaded_mm == *mm);
    let left = snapshot.folios.iter().filter(|folio| match folio.kind() {
        Some(FrameKind::Anon | FrameKind::File | FrameKind::Retired) => true,
        Some(FrameKind::Table) => folio.index != 4 || !kept(&folio.owner),
        _ => false,
    });
    for folio in left {
        findings.report(|| {
            Finding::new(format!(
                "a frame is left after the last exit: {}",
                folio.kind_name()
            ))
            .expected("a free frame")
            .found(format!(
                "{}, refcount {}, mapcount {}, owner {:#x}",
                folio.kind_name(),
                folio.refcount,
                folio.mapcount,
                folio.owner
            ))
            .frame(folio.frame)
            .details(context.describe_mappings(folio.frame))
        });
    }
}

fn nothing_is_held(context: &Context<'_>, findings: &mut Findings) {
    findings.examine();
    for held in context.in_flight.held() {
        findings.report(|| {
            Finding::new("something is held or waited for, and no vCPU is in the kernel to end it")
                .expected("every lock word 0, no shootdown pending")
                .found(held)
        });
    }
}
