//! Queues, states and kinship of tasks, without context switches: the test says who runs.

use std::cell::Cell;
use std::sync::atomic::Ordering::Relaxed;

use abi::objects::{Mm, Pa, Task, TaskState, task_flags};
use abi::syscall::wait;
use proptest::prelude::*;

use crate::Kernel;
use crate::arch::model::Model;
use crate::arch::model::testing::Machine;
use crate::arch::{Arch, Ipi};
use crate::mm::Field;
use crate::task::futex::FutexKey;
use crate::task::wait::{Children, Which};

const MEMORY: u64 = 4 << 20;
const ROOT: u64 = 0x8_0000;
const TASKS: u64 = 0x10_0000;
const EVERYWHERE: u64 = u64::MAX;

/// A kernel whose root and tasks were put in memory by hand.
struct Bench {
    machine: Machine,
    tasks: Cell<u64>,
}

impl Bench {
    fn new(cpus: usize) -> Self {
        let machine = Machine::bare(MEMORY, cpus, Pa::new(ROOT));
        machine.kernel().root().online.set((1 << cpus) - 1);
        Self {
            machine,
            tasks: Cell::new(0),
        }
    }

    fn kernel(&self) -> &Kernel<Model> {
        self.machine.kernel()
    }

    /// A task of the process of `leader`, or a new process and child of `parent`. Blocked.
    fn task(&self, leader: Option<Pa<Task>>, parent: u32) -> Pa<Task> {
        let number = self.tasks.get() + 1;
        self.tasks.set(number);
        let pa = Pa::new(TASKS + number * 0x400);
        let task = self.kernel().obj(pa);
        let leader_pa = leader.unwrap_or(pa);
        let leader = self.kernel().obj(leader_pa);
        task.id.set(number as u32);
        task.process.set(leader.id.get());
        task.parent.set(parent);
        task.leader.set(leader_pa);
        task.affinity
            .set(EVERYWHERE & self.kernel().possible_cpus());
        task.state.set(TaskState::Blocked as u32);
        leader.threads.fetch_add(1, Relaxed);
        let root = self.kernel().root();
        task.next_task.set(root.tasks.get());
        root.tasks.set(pa);
        pa
    }

    fn runs(&self, task: Pa<Task>, cpu: usize) {
        self.kernel().root().cpus[cpu].current.set(task);
        let task = self.kernel().obj(task);
        task.state.set(TaskState::Running as u32);
        task.cpu.set(cpu as u32);
    }

    fn waits_for(&self, task: Pa<Task>, mm: u64, word: u64) {
        let object = self.kernel().obj(task);
        object.state.set(TaskState::Blocked as u32);
        object.waits_for.set(word);
        object.mm.set(Pa::<Mm>::new(mm));
        let key = FutexKey::private(Pa::new(mm), word);
        object
            .futex
            .iter()
            .zip(key.0)
            .for_each(|(word, value)| word.set(value));
        if word != Task::WAITS_FOR_CHILD {
            let queue = &self.kernel().root().futex_queue;
            self.kernel().queue_push(queue, task);
        }
    }

    fn state(&self, task: Pa<Task>) -> TaskState {
        TaskState::from_u32(self.kernel().obj(task).state.get()).expect("a known state")
    }

    fn pending(&self, cpu: usize) -> Vec<Ipi> {
        self.kernel().arch.take_pending(cpu)
    }

    fn all(&self) -> Vec<Pa<Task>> {
        self.kernel().tasks().collect()
    }

    /// Every task is where its state says, and nowhere else.
    fn check(&self) {
        let cpus = &self.kernel().root().cpus[..self.kernel().arch.nr_cpus()];
        for (number, cpu) in cpus.iter().enumerate() {
            let length = self.kernel().queue_iter(&cpu.queue).count() as u64;
            assert_eq!(cpu.queued.get(), length, "CPU {number}");
        }
        for pa in self.all() {
            let task = self.kernel().obj(pa);
            let home = task.cpu.get() as usize;
            let queues: Vec<usize> = cpus
                .iter()
                .enumerate()
                .flat_map(|(number, cpu)| {
                    let on = self.kernel().queue_iter(&cpu.queue).filter(|on| *on == pa);
                    on.map(move |_| number).collect::<Vec<_>>()
                })
                .collect();
            let runs = cpus.iter().filter(|cpu| cpu.current.get() == pa).count();
            match self.state(pa) {
                TaskState::Ready => {
                    assert_eq!(queues, [home], "a ready task is on one queue");
                    assert_ne!(task.affinity.get() & (1 << home), 0);
                    assert_eq!(runs, 0);
                }
                TaskState::Running => assert_eq!((queues, runs), (vec![], 1)),
                _ => assert_eq!((queues, runs), (vec![], 0)),
            }
        }
    }
}

#[test]
fn a_woken_task_calls_an_idle_cpu_and_no_busy_one() {
    let bench = Bench::new(3);
    let (running, first, second, third) = (
        bench.task(None, 0),
        bench.task(None, 1),
        bench.task(None, 1),
        bench.task(None, 1),
    );
    bench.runs(running, 0);
    bench.kernel().make_ready(first);
    assert_eq!(bench.pending(1), [Ipi::Reschedule]);
    bench.kernel().make_ready(second);
    assert_eq!(bench.pending(2), [Ipi::Reschedule]);
    bench.runs(bench.kernel().pick().expect("stolen"), 1);
    bench.runs(bench.kernel().pick().expect("stolen"), 2);
    bench.kernel().make_ready(third);
    assert_eq!([1, 2].map(|cpu| bench.pending(cpu)), [[], []]);
    bench.check();
}

#[test]
fn a_cpu_that_is_still_booting_is_not_interrupted() {
    let bench = Bench::new(2);
    bench.kernel().root().online.set(1);
    let task = bench.task(None, 0);
    bench.kernel().obj(task).affinity.set(0b10);
    bench.kernel().make_ready(task);
    assert_eq!(bench.pending(1), []);
    assert!(bench.kernel().pick().is_none());
    bench.kernel().arch.become_cpu(1);
    assert_eq!(bench.kernel().pick(), Some(task));
}

#[test]
fn futex_wakes_in_order_of_arrival_and_only_its_own_word_and_mm() {
    let bench = Bench::new(1);
    let [a, b, c, d, e] = [(); 5].map(|()| bench.task(None, 0));
    const MM: u64 = 0x5000;
    const WORD: u64 = 0x7000;
    for (task, mm, word) in [
        (a, MM, WORD),
        (b, MM + 1, WORD),
        (c, MM, WORD + 4),
        (d, MM, WORD),
        (e, MM, WORD),
    ] {
        bench.waits_for(task, mm, word);
    }
    let key = FutexKey::private(Pa::new(MM), WORD);
    assert_eq!(bench.kernel().futex_wake(key, 2), 2);
    let states = [a, b, c, d, e].map(|task| bench.state(task));
    use TaskState::{Blocked, Ready};
    assert_eq!(states, [Ready, Blocked, Blocked, Ready, Blocked]);
    assert_eq!(bench.kernel().futex_wake(key, 2), 1);
    assert_eq!(bench.kernel().futex_wake(key, 2), 0);
    let rest: Vec<_> = bench
        .kernel()
        .queue_iter(&bench.kernel().root().futex_queue)
        .collect();
    assert_eq!(rest, [b, c]);
    bench.check();
}

#[test]
fn the_end_of_a_process_reaches_each_of_its_tasks_where_it_is() {
    let bench = Bench::new(3);
    let caller = bench.task(None, 0);
    let [running, ready, waiting] = [(); 3].map(|()| bench.task(Some(caller), 0));
    let stranger = bench.task(None, 1);
    bench.runs(caller, 0);
    bench.runs(running, 2);
    bench.kernel().make_ready(ready);
    bench.waits_for(waiting, 0x5000, 0x7000);
    bench.waits_for(stranger, 0x6000, 0x7000);

    assert_eq!(bench.kernel().kill_group(caller, wait::exited(3)), 0b100);
    let killed = |task: Pa<Task>| bench.kernel().obj(task).flags.get() & task_flags::KILLED != 0;
    assert!(killed(running) && killed(ready) && killed(waiting));
    assert!(!killed(caller) && !killed(stranger));
    assert_eq!(bench.state(waiting), TaskState::Ready);
    assert_eq!(bench.state(stranger), TaskState::Blocked);
    bench.check();

    // The first status stands.
    assert_eq!(bench.kernel().kill_group(running, wait::exited(4)), 0);
    assert_eq!(bench.kernel().obj(caller).status.get(), 0x300);
}

/// Ends `task` as `exit_task` does, without the switch.
fn end(bench: &Bench, task: Pa<Task>, status: u32) {
    bench.runs(task, 0);
    bench.kernel().bury(task, status);
    bench.kernel().root().cpus[0].current.set(Pa::NULL);
    if bench.kernel().obj(task).leader.get() != task {
        bench.kernel().unlink_task(task);
    }
}

#[test]
fn a_process_has_ended_when_its_last_task_has_and_its_leaders_status_counts() {
    let bench = Bench::new(1);
    let parent = bench.task(None, 0);
    let leader = bench.task(None, 1);
    let thread = bench.task(Some(leader), 1);
    let children = |which| bench.kernel().children(1, which);
    assert_eq!(children(Which::Any), Children::Alive);
    end(&bench, leader, wait::exited(5));
    assert_eq!(bench.state(leader), TaskState::Zombie);
    assert_eq!(children(Which::Any), Children::Alive);
    bench.waits_for(parent, 0, Task::WAITS_FOR_CHILD);
    end(&bench, thread, wait::exited(6));
    assert_eq!(bench.state(parent), TaskState::Ready);
    assert_eq!(children(Which::Any), Children::Ended(leader));
    assert_eq!(children(Which::Process(2)), Children::Ended(leader));
    // A thread is no child, and nobody else's child is.
    assert_eq!(children(Which::Process(3)), Children::None);
    assert_eq!(bench.kernel().children(2, Which::Any), Children::None);
    assert_eq!(bench.kernel().obj(leader).status.get(), 0x500);
    assert!(!bench.kernel().nothing_lives());
}

#[test]
fn orphans_go_to_the_first_process_and_ended_ones_wake_it() {
    let bench = Bench::new(1);
    let first = bench.task(None, 0);
    let middle = bench.task(None, 1);
    let orphan = bench.task(None, 2);
    end(&bench, orphan, wait::signaled(11));
    assert_eq!(
        bench.kernel().children(1, Which::Process(3)),
        Children::None
    );
    bench.waits_for(first, 0, Task::WAITS_FOR_CHILD);
    end(&bench, middle, 0);
    assert_eq!(bench.state(first), TaskState::Ready);
    assert_eq!(
        bench.kernel().children(1, Which::Process(3)),
        Children::Ended(orphan)
    );
}

#[test]
fn children_of_an_ended_first_process_keep_the_machine_up_and_nobody_waits_for_them() {
    let bench = Bench::new(2);
    let first = bench.task(None, 0);
    let child = bench.task(None, 1);
    end(&bench, first, wait::exited(9));
    assert_eq!(bench.kernel().obj(child).parent.get(), 0);
    assert!(!bench.kernel().nothing_lives());
    assert_eq!(bench.pending(1), []);
    end(&bench, child, 0);
    assert!(bench.kernel().nothing_lives());
    assert_eq!(
        bench.pending(1),
        [Ipi::Reschedule],
        "CPU 1 lets go of its mm"
    );
}

#[test]
fn the_oldest_ended_child_is_waited_for_first() {
    let bench = Bench::new(1);
    let _parent = bench.task(None, 0);
    let [a, b, _alive] = [(); 3].map(|()| bench.task(None, 1));
    end(&bench, b, 0);
    end(&bench, a, 0);
    assert_eq!(bench.kernel().children(1, Which::Any), Children::Ended(a));
}

#[test]
fn a_machine_without_any_task_yet_has_not_ended() {
    assert!(!Bench::new(1).kernel().nothing_lives());
}

#[derive(Clone, Debug)]
enum Step {
    Start {
        affinity: u64,
    },
    Next {
        cpu: usize,
    },
    Block {
        cpu: usize,
    },
    Wake {
        which: prop::sample::Index,
    },
    Restrict {
        which: prop::sample::Index,
        affinity: u64,
    },
}

const CPUS: usize = 4;

fn step() -> impl Strategy<Value = Step> {
    let affinity = 1u64..(1 << CPUS);
    prop_oneof![
        affinity
            .clone()
            .prop_map(|affinity| Step::Start { affinity }),
        (0..CPUS).prop_map(|cpu| Step::Next { cpu }),
        (0..CPUS).prop_map(|cpu| Step::Block { cpu }),
        any::<prop::sample::Index>().prop_map(|which| Step::Wake { which }),
        (any::<prop::sample::Index>(), affinity)
            .prop_map(|(which, affinity)| Step::Restrict { which, affinity }),
    ]
}

impl Bench {
    fn take(&self, step: &Step) {
        match step {
            Step::Start { affinity } => {
                let task = self.task(None, 0);
                self.kernel().obj(task).affinity.set(*affinity);
                self.kernel().make_ready(task);
            }
            Step::Next { cpu } => {
                self.kernel().arch.become_cpu(*cpu);
                if self.kernel().this_cpu().current.get().is_null() {
                    let may_run = self.all().iter().any(|task| {
                        let affinity = self.kernel().obj(*task).affinity.get();
                        self.state(*task) == TaskState::Ready && affinity & (1 << cpu) != 0
                    });
                    let next = self.kernel().pick();
                    assert_eq!(next.is_some(), may_run, "no CPU idles beside its work");
                    if let Some(next) = next {
                        self.runs(next, *cpu);
                    }
                }
            }
            Step::Block { cpu } => {
                let current = self.kernel().root().cpus[*cpu].current.get();
                if let Some(task) = current.some() {
                    self.waits_for(task, 0, Task::WAITS_FOR_CHILD);
                    self.kernel().root().cpus[*cpu].current.set(Pa::NULL);
                }
            }
            Step::Wake { which } => {
                let all = self.all();
                if let Some(task) = all.get(which.index(all.len().max(1)))
                    && self.state(*task) == TaskState::Blocked
                {
                    self.kernel().wake(*task);
                }
            }
            Step::Restrict { which, affinity } => {
                let all = self.all();
                if let Some(task) = all.get(which.index(all.len().max(1))) {
                    self.kernel().restrict(*task, *affinity);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn a_ready_task_is_on_exactly_one_queue_that_its_affinity_allows(
        steps in prop::collection::vec(step(), 1..60)
    ) {
        let bench = Bench::new(CPUS);
        for step in &steps {
            bench.take(step);
            bench.check();
        }
    }
}
