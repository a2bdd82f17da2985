//! How tasks and processes end.
//!
//! A task ends by itself only ([`Kernel::exit_task`]); ending others means to mark them, after which
//! they end on their way back to CPL 3. A process has ended when its last task has; until its parent
//! has waited for it, its leader's slot stays as a zombie that holds the status. Children of an ended
//! process go to the first process; once that has ended they stay zombies, until the machine ends
//! with the last process.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use abi::channel::EventKind;
use abi::objects::{Pa, Task, TaskState, task_flags};

use super::create::FIRST_TASK;
use crate::Kernel;
use crate::arch::{Arch, CpuMask};
use crate::mm::Field;

impl<A: Arch> Kernel<A> {
    /// Ends the running task; `status` is the process's where it is the leader.
    pub(super) fn exit_task(&self, status: u32) -> ! {
        self.leave_address_space();
        // After the mappings, as in Linux's do_exit.
        let files = self.current().files.get();
        self.current().files.set(Pa::NULL);
        self.files_put(files);
        let lock = self.sched_lock();
        let task = self.this_cpu().current.get();
        self.bury(task, status);
        self.this_cpu().dead.set(task);
        self.schedule(lock);
        unreachable!("an exited task was switched to");
    }

    /// Ends the running task and all others of its process.
    pub(super) fn exit_process(&self, status: u32) -> ! {
        let lock = self.sched_lock();
        let cpus = self.kill_group(self.this_cpu().current.get(), status);
        drop(lock);
        self.kick(cpus);
        self.exit_task(status);
    }

    /// Does what other tasks have asked of the running one: to exit, or to leave this CPU.
    pub(super) fn honour_requests(&self) {
        let task = self.current();
        loop {
            // Acquire: pairs with the mark in `kill_group`.
            if task.flags.load(Acquire) & task_flags::KILLED != 0 {
                self.exit_task(self.obj(task.leader.get()).status.get());
            }
            if task.affinity.get() & (1 << self.arch.cpu()) != 0 {
                return;
            }
            self.yield_now();
        }
    }

    /// Marks all tasks of `survivor`'s process but itself to be killed, and gives the process its
    /// status where it has none yet. Returns the CPUs that must notice. Under the lock.
    pub(super) fn kill_group(&self, survivor: Pa<Task>, status: u32) -> CpuMask {
        let leader = self.obj(survivor).leader.get();
        let state = self.obj(leader);
        if state.flags.get() & task_flags::GROUP_EXIT != 0 {
            return 0;
        }
        state.flags.fetch_or(task_flags::GROUP_EXIT, Relaxed);
        state.status.set(status);
        let mut cpus = 0;
        for task in self.tasks() {
            let object = self.obj(task);
            if object.leader.get() != leader || task == survivor {
                continue;
            }
            // Release: who sees the mark sees the status.
            object.flags.fetch_or(task_flags::KILLED, Release);
            match TaskState::from_u32(object.state.get()) {
                Some(TaskState::Running) => cpus |= 1 << object.cpu.get(),
                // Who has a lock coming needs it first.
                Some(TaskState::Blocked) if object.waits_for.get() != Task::WAITS_FOR_LOCK => {
                    self.queue_take(&self.root().futex_queue, |waiter, _| waiter == task);
                    self.wake(task);
                }
                _ => {}
            }
        }
        cpus
    }

    /// Records that `task`, which runs here, has exited. Under the lock.
    pub(super) fn bury(&self, task: Pa<Task>, status: u32) {
        let object = self.obj(task);
        let leader_pa = object.leader.get();
        let leader = self.obj(leader_pa);
        let group_exit = leader.flags.get() & task_flags::GROUP_EXIT != 0;
        if task == leader_pa && !group_exit {
            leader.status.set(status);
        }
        object.state.set(TaskState::Zombie as u32);
        event!(
            self,
            EventKind::TaskExit,
            [object.id.get().into(), status.into(), 0, 0, 0],
        );
        let threads = leader.threads.get() - 1;
        leader.threads.set(threads);
        if threads == 0 {
            self.process_ended(leader);
        }
    }

    fn process_ended(&self, leader: &Task) {
        let process = leader.process.get();
        let mut heir = 0;
        let mut alive = false;
        for task in self.tasks().map(|task| self.obj(task)) {
            if task.threads.get() > 0 {
                alive = true;
                if task.id.get() == FIRST_TASK {
                    heir = FIRST_TASK;
                }
            }
        }
        let mut inherited = false;
        for task in self.tasks().map(|task| self.obj(task)) {
            if task.parent.get() == process {
                task.parent.set(heir);
                inherited = true;
            }
        }
        self.wake_parent(leader.parent.get());
        if inherited {
            self.wake_parent(heir);
        }
        if !alive {
            // Every CPU must let go of what it has loaded: see `Kernel::retire`.
            self.kick(self.possible_cpus());
        }
    }

    /// Lets the tasks of process `parent` that wait for a child look again.
    fn wake_parent(&self, parent: u32) {
        for task in self.tasks() {
            let object = self.obj(task);
            if object.process.get() == parent
                && object.state.get() == TaskState::Blocked as u32
                && object.waits_for.get() == Task::WAITS_FOR_CHILD
            {
                self.wake(task);
            }
        }
    }

    fn leave_address_space(&self) {
        let task = self.current();
        let mm = task.mm.get();
        let clear_tid = task.clear_tid.swap(0, Relaxed);
        // As in Linux's mm_release(): with no other user nobody can be waiting for it.
        if clear_tid != 0
            && self.obj(mm).users.get() > 1
            && self.put_user(clear_tid, 0).is_ok()
            && let Ok(key) = self.futex_key(clear_tid, false)
        {
            self.futex_wake(key, 1);
        }
        task.mm.set(Pa::NULL);
        self.enter_lazy();
        self.mm_put(mm);
    }
}
