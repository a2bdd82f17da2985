//! Threads of the kernel: how they come to be, sleep and are woken.
//!
//! They have no address space. While one runs its CPU is lazy in what was loaded before ([`Kernel::enter_lazy`]), and its
//! flushes reach the others as everybody's do. None ever enters CPL 3. They sleep from the beginning: a machine that does not need them
//! never switches to them. The machine ends when the last process has and all of them sleep again, for
//! until then they may have something in hand.
//!
//! There is no timer, and no task gives its CPU away but by itself: a thread runs where a CPU idles, or a task of its CPU
//! sleeps, yields or ends.

use core::sync::atomic::Ordering::SeqCst;
use core::sync::atomic::fence;

use abi::channel::EventKind;
use abi::objects::{Pa, Task, TaskState, UserFrame, task_flags};

use crate::Kernel;
use crate::arch::Arch;
use crate::mm::Field;
use crate::testbed::told;

impl<A: Arch> Kernel<A> {
    /// A thread that sleeps, and that nobody finds yet.
    ///
    /// # Panics
    /// Where memory does not suffice.
    pub(super) fn new_thread(&self, name: &str) -> Pa<Task> {
        let task = self.new_task(&UserFrame::default());
        let task = task.unwrap_or_else(|_| panic!("guest memory too small for {name}"));
        let object = self.obj(task);
        object.process.set(object.id.get());
        object.leader.set(task);
        object.affinity.set(self.possible_cpus());
        object.flags.set(task_flags::KERNEL);
        object.waits_for.set(Task::WAITS_FOR_WORK);
        object.state.set(TaskState::Blocked as u32);
        task
    }

    /// Puts the thread on the list of tasks. The root names it already.
    pub(super) fn admit_thread(&self, task: Pa<Task>) {
        let id = told(|| self.obj(task).id.get());
        let _lock = self.sched_lock();
        let root = self.root();
        self.obj(task).next_task.set(root.tasks.get());
        root.tasks.set(task);
        event!(self, EventKind::TaskCreate, [id.into(), 0, 0, 0, 0]);
    }

    /// What a thread does first.
    pub(super) fn run_thread(&self) -> ! {
        let me = self.this_cpu().current.get();
        if me == self.root().khugepaged.task.get() {
            self.khugepaged()
        }
        self.kswapd()
    }

    /// Wakes a thread if it sleeps. Under no lock that comes last.
    pub(super) fn wake_thread(&self, task: Pa<Task>) {
        if self.has_no_work(task) {
            let _lock = self.sched_lock();
            if self.has_no_work(task) {
                self.wake(task);
            }
        }
    }

    /// The running thread sleeps until somebody wakes it, if nobody needs it now.
    pub(super) fn sleep_until_woken(&self, is_needed: impl FnOnce() -> bool) {
        let lock = self.sched_lock();
        let task = self.current();
        task.waits_for.set(Task::WAITS_FOR_WORK);
        task.state.set(TaskState::Blocked as u32);
        // Asleep first, then a look at what there is to do: who has made work looks the other way round.
        fence(SeqCst);
        if is_needed() {
            task.state.set(TaskState::Running as u32);
        } else {
            if !self.any_process() {
                // They wait for this one to end.
                self.kick(self.possible_cpus());
            }
            self.schedule(lock);
        }
        task.waits_for.set(0);
    }

    /// True where `task` is a thread of the kernel that has nothing to do.
    pub(super) fn has_no_work(&self, task: Pa<Task>) -> bool {
        let task = self.obj(task);
        task.waits_for.get() == Task::WAITS_FOR_WORK
            && task.state.get() == TaskState::Blocked as u32
    }
}
