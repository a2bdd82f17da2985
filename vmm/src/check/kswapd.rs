//! L-40, S-40 and on: the threads of the kernel, that of reclaim before all.

use abi::objects::{Kswapd, Task};

use super::{Applies, Context, Family, Finding, Findings, Invariant};

pub(super) const INVARIANTS: &[Invariant] = &[
    Invariant {
        id: "L-40",
        family: Family::Lifetime,
        predicate: "a thread of the kernel has no address space, no descriptors and no parent, and the root names it",
        applies: Applies::QuiescentKernel,
        source: "Linux include/linux/sched.h, PF_KTHREAD; abi::objects::task_flags::KERNEL",
        run: threads_are_bare,
    },
    Invariant {
        id: "S-40",
        family: Family::NonPresent,
        predicate: "the marks of free frames are in order, and without a reclaim thread there are none",
        applies: Applies::QuiescentKernel,
        source: "Linux mm/page_alloc.c, __setup_per_zone_wmarks",
        run: marks_are_in_order,
    },
    Invariant {
        id: "S-41",
        family: Family::NonPresent,
        predicate: "the reclaim thread rests with fewer free frames than its low mark only after it has failed",
        applies: Applies::QuiescentKernel,
        source: "Linux mm/vmscan.c, wakeup_kswapd and prepare_kswapd_sleep",
        run: rests_with_reason,
    },
];

fn threads_are_bare(context: &Context<'_>, findings: &mut Findings) {
    let snapshot = context.snapshot;
    let root = &snapshot.root;
    let named = [root.kswapd.task, root.khugepaged];
    for task in &snapshot.tasks {
        let is_bare = (task.mm, task.files, task.parent) == (0, 0, 0) && task.process == task.id;
        let right =
            task.is_of_kernel() == named.contains(&task.gpa) && (is_bare || !task.is_of_kernel());
        findings.require(right, || {
            Finding::new(format!("task {} is half a thread of the kernel", task.id))
                .expected("none, or the one that the root names, with nothing of a process")
                .found(format!(
                    "flags {:#x}, {}, descriptors at {:#x}, process {}, parent {}; the root names {named:#x?}",
                    task.flags,
                    snapshot.mm_name(task.mm),
                    task.files,
                    task.process,
                    task.parent
                ))
                .object("Task", task.gpa)
        });
    }
    for thread in named {
        findings.require(thread == 0 || snapshot.task_at(thread).is_some(), || {
            Finding::new("a thread of the kernel is no task")
                .expected("a task on the kernel's list")
                .found(format!("{thread:#x}"))
        });
    }
}

fn marks_are_in_order(context: &Context<'_>, findings: &mut Findings) {
    let kswapd = &context.snapshot.root.kswapd;
    let marks = [kswapd.min, kswapd.low, kswapd.high];
    let right = marks.is_sorted() && (kswapd.task != 0 || kswapd.high == 0);
    findings.require(right, || {
        Finding::new("the marks of free frames make no sense")
            .expected(match kswapd.task {
                0 => "0, 0, 0: there is no reclaim thread",
                _ => "min <= low <= high",
            })
            .found(format!("{marks:?}"))
    });
}

fn rests_with_reason(context: &Context<'_>, findings: &mut Findings) {
    let snapshot = context.snapshot;
    let (root, kswapd) = (&snapshot.root, &snapshot.root.kswapd);
    let Some(task) = snapshot.task_at(kswapd.task) else {
        return;
    };
    let rests = task.state() == Some(abi::objects::TaskState::Blocked)
        && task.waits_for == Task::WAITS_FOR_WORK;
    let is_low = root.free_frames < kswapd.low;
    findings.require(!rests || !is_low || kswapd.failures > 0, || {
        Finding::new("memory is low, and nobody has woken the reclaim thread")
            .expected(format!(
                "{} free frames, or a thread that has failed",
                kswapd.low
            ))
            .found(format!("{} free frames, no failure", root.free_frames))
            .object("Task", task.gpa)
    });
    findings.require(kswapd.failures <= Kswapd::MAX_FAILURES, || {
        Finding::new("the reclaim thread was tried again after it was given up")
            .expected(format!("at most {} failures", Kswapd::MAX_FAILURES))
            .found(kswapd.failures)
            .object("Task", task.gpa)
    });
}
