//! The scheduler: cooperative, one FIFO run queue per CPU, one lock for all of them.
//!
//! A task gives up its CPU when it yields, blocks, exits or may no longer run there; there is no
//! timer. Nothing here is random and ties go to the lowest CPU, so who runs where is a function of
//! the order in which CPUs take the lock.
//!
//! **The lock is held across a context switch** and released on the new side ([`finish_switch`]), as
//! in xv6. A task therefore becomes ready, blocked or a zombie, and its context is saved, in one
//! critical section: no other CPU can run it, wake it or free it while this CPU still stands on its
//! stack. (Linux, whose queues have a lock each, needs `task_struct::on_cpu` for this.)
//!
//! [`finish_switch`]: Kernel::finish_switch
#![allow(unsafe_code, reason = "the context switch")]

use core::mem;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};

use abi::channel::EventKind;
use abi::objects::{Pa, Task, TaskState, task_flags};
use abi::point::Point;
use abi::syscall::{Errno, wait};

use super::create::{FIRST_TASK, STACK_BYTES};
use super::placement::{Load, choose_cpu};
use crate::Kernel;
use crate::arch::{Arch, CpuMask, Ipi};
use crate::mm::Field;
use crate::sync::Guard;
use abi::lock::LockClass;

/// Rounds of yields in vain after which the tasks of a CPU wait for another one.
#[cfg(feature = "testbed")]
const ROUNDS: u64 = 16;

impl<A: Arch> Kernel<A> {
    /// The scheduler loop of this CPU, on its boot stack; runs for ever.
    pub fn run_cpu(&self) -> ! {
        let me = self.arch.cpu();
        let lock = self.sched_lock();
        self.root().online.fetch_or(1 << me, AcqRel);
        drop(lock);
        loop {
            self.rcu_enter_kernel();
            let lock = self.sched_lock();
            if let Some(next) = self.pick() {
                self.switch_to(lock, next);
                continue;
            }
            let over = self.nothing_lives();
            drop(lock);
            if over {
                self.retire();
            }
            if self.rcu_has_work() {
                // Its memory is not to wait for the CPU's next task.
                self.rcu_poll();
                if self.rcu_has_work() {
                    self.rcu_wait();
                }
                continue;
            }
            // Interrupts have been off since the look at the queue, so a wake-up that came after it
            // is still pending here.
            self.idle();
        }
    }

    fn idle(&self) {
        self.rcu_leave_kernel();
        point!(self, Point::IdleEnter, [self.arch.cpu() as u64, 0]);
        self.arch.wait_for_interrupt();
    }

    /// What a new task does first on its own stack, before CPL 3.
    pub fn task_started(&self) {
        self.finish_switch();
        let task = self.current();
        if task.flags.load(Relaxed) & task_flags::KERNEL != 0 {
            self.run_thread();
        }
        let id = task.id.get();
        if id == FIRST_TASK {
            self.announce_first_user();
        }
        let set_tid = task.set_tid.get();
        if set_tid != 0 {
            // As in Linux's schedule_tail(), a bad address is the program's loss.
            let _ = self.put_user(set_tid, id);
        }
    }

    /// The task that runs on this CPU.
    ///
    /// # Panics
    /// On an idle CPU.
    pub(super) fn current(&self) -> &Task {
        self.obj(self.this_cpu().current.get())
    }

    /// Takes the lock of tasks and queues.
    pub(super) fn sched_lock(&self) -> Guard<'_, A> {
        self.lock(&self.root().sched_lock, LockClass::Sched)
    }

    /// sched_yield: lets the other tasks of this CPU's queue run first.
    pub(super) fn yield_now(&self) {
        #[cfg(feature = "testbed")]
        self.note_yield();
        self.give_way();
    }

    /// Lets the other tasks of this CPU's queue run first, and others take this one where it may no longer run (Linux's
    /// `cond_resched`).
    pub(crate) fn give_way(&self) {
        let me = self.arch.cpu();
        let lock = self.sched_lock();
        let task = self.this_cpu().current.get();
        let allowed = self.obj(task).affinity.get() & (1 << me) != 0;
        if !allowed {
            self.make_ready(task);
        } else if self.this_cpu().queue.get().is_null() {
            return;
        } else {
            self.enqueue(task, me);
        }
        self.schedule(lock);
    }

    /// Whoever yields waits for somebody. Where every task of this CPU has done nothing else for some rounds, that one
    /// runs on another CPU. Only then, for at this point others must go first: schedules in which they do not are
    /// lost.
    #[cfg(feature = "testbed")]
    fn note_yield(&self) {
        let cpu = self.this_cpu();
        let yields = cpu.yields.get() + 1;
        if yields > ROUNDS * cpu.queued.get() {
            cpu.yields.set(0);
            point!(self, Point::UserRelax, [self.current().id.get().into(), 0]);
        } else {
            cpu.yields.set(yields);
        }
    }

    /// Refuses to block where the running task is to be killed: nobody would wake it for that again.
    /// Under the lock.
    pub(super) fn may_block(&self) -> Result<(), Errno> {
        match self.current().flags.get() & task_flags::KILLED {
            0 => Ok(()),
            _ => Err(Errno::EINTR),
        }
    }

    /// Blocks the running task, which [may](Kernel::may_block), until somebody wakes it; `waits_for`
    /// says for what.
    pub(super) fn block(&self, lock: Guard<'_, A>, waits_for: u64) {
        let task = self.current();
        task.waits_for.set(waits_for);
        task.state.set(TaskState::Blocked as u32);
        self.schedule(lock);
        // Not when it is woken: until it runs it holds what it held.
        task.waits_for.set(0);
    }

    /// Makes a blocked task ready. Under the lock.
    pub(super) fn wake(&self, task: Pa<Task>) {
        self.make_ready(task);
    }

    /// Puts `task`, which runs nowhere else and is on no queue, on the queue of the best CPU that it
    /// may run on, and wakes that CPU if it idles. Under the lock.
    pub(super) fn make_ready(&self, task: Pa<Task>) {
        let allowed = self.obj(task).affinity.get();
        let cpu = choose_cpu(allowed, (0..self.arch.nr_cpus()).map(|cpu| self.load(cpu)))
            .expect("a task may always run on some CPU");
        self.enqueue(task, cpu);
        if self.root().cpus[cpu].current.get().is_null() {
            self.kick(1 << cpu);
        }
    }

    /// Makes every CPU of `cpus` that is up, but this one, look at its queue, or at what its task was
    /// asked to do.
    pub(super) fn kick(&self, cpus: CpuMask) {
        let targets = cpus & self.root().online.load(Acquire) & !(1 << self.arch.cpu());
        if targets != 0 {
            self.send_ipi(targets, Ipi::Reschedule);
        }
    }

    /// Gives this CPU to the next task, or to the idle loop. The caller has said, under the lock,
    /// what becomes of the running one. Returns when that one runs again.
    pub(super) fn schedule(&self, lock: Guard<'_, A>) {
        let next = self.pick().unwrap_or(Pa::NULL);
        self.switch_to(lock, next);
    }

    fn load(&self, cpu: usize) -> Load {
        let state = &self.root().cpus[cpu];
        Load {
            online: self.root().online.get() & (1 << cpu) != 0,
            tasks: state.queued.get() + u64::from(!state.current.get().is_null()),
        }
    }

    fn enqueue(&self, task: Pa<Task>, cpu: usize) {
        let object = self.obj(task);
        object.state.set(TaskState::Ready as u32);
        object.cpu.set(cpu as u32);
        let state = &self.root().cpus[cpu];
        self.queue_push(&state.queue, task);
        state.queued.set(state.queued.get() + 1);
    }

    /// Takes `task`, which is ready, off its queue. Under the lock.
    pub(super) fn dequeue(&self, task: Pa<Task>) {
        let cpu = self.obj(task).cpu.get() as usize;
        self.take_ready(cpu, |candidate, _| candidate == task)
            .expect("a ready task is on the queue of its CPU");
    }

    /// The task to run next on this CPU, taken off its queue: the first of its own, else the first
    /// on another CPU's that may run here. Under the lock.
    pub(super) fn pick(&self) -> Option<Pa<Task>> {
        let me = self.arch.cpu();
        let may_run_here = |_, task: &Task| task.affinity.get() & (1 << me) != 0;
        self.take_ready(me, |_, _| true)
            .or_else(|| (0..self.arch.nr_cpus()).find_map(|cpu| self.take_ready(cpu, may_run_here)))
    }

    fn take_ready(&self, cpu: usize, wanted: impl Fn(Pa<Task>, &Task) -> bool) -> Option<Pa<Task>> {
        let state = &self.root().cpus[cpu];
        let task = self.queue_take(&state.queue, wanted)?;
        state.queued.set(state.queued.get() - 1);
        Some(task)
    }

    /// Continues with `next` (the idle loop where there is none) on this CPU.
    fn switch_to(&self, lock: Guard<'_, A>, next: Pa<Task>) {
        let cpu = self.this_cpu();
        let prev = cpu.current.get();
        let id = |task: Pa<Task>| {
            task.some()
                .map_or(0, |task| u64::from(self.obj(task).id.get()))
        };
        progress!(self);
        event!(self, EventKind::Switch, [id(prev), id(next), 0, 0, 0]);
        point!(self, Point::Switch, [id(prev), id(next)]);
        self.rcu_note_switch();
        cpu.current.set(next);
        let to = if let Some(next) = next.some() {
            let next = self.obj(next);
            next.state.set(TaskState::Running as u32);
            next.cpu.set(self.arch.cpu() as u32);
            self.arch
                .set_kernel_stack(next.stack.get() + STACK_BYTES as u64);
            &next.saved_sp
        } else {
            &cpu.idle_sp
        };
        let from = match prev.some() {
            Some(prev) => &self.obj(prev).saved_sp,
            None => &cpu.idle_sp,
        };
        // The new side adopts the lock.
        mem::forget(lock);
        // SAFETY: `to` was stored by `prepare_stack` or `switch`. It is resumed once: a task comes
        // here only off a run queue, onto which it goes (under the lock) when it is new or was
        // running, and the lock is held until the new side stands on `to`; the idle loop's is used
        // only by its own CPU, while a task runs there. Stacks are freed by `finish_switch` after
        // their last use.
        unsafe { self.arch.switch(from, to.get()) };
        self.finish_switch();
    }

    /// First thing on the new side of a switch: lets the others schedule, loads the address space,
    /// frees the stack of a task that will never run again.
    ///
    /// Until the address space is loaded this CPU still has the last task's, which may be gone: the
    /// CPU's own reference to what it has loaded keeps it.
    fn finish_switch(&self) {
        // Not the old side's: this stack may have come from another CPU.
        let cpu = self.this_cpu();
        let lock = self.adopt_lock(&self.root().sched_lock, LockClass::Sched);
        let dead = cpu.dead.get();
        cpu.dead.set(Pa::NULL);
        // A zombie may be waited for, and its slot reused, as soon as the lock is released.
        let remains = dead.some().map(|task| {
            let stack = self.obj(task).stack.swap(0, Relaxed);
            let leader = self.obj(task).leader.get() == task;
            if !leader {
                self.unlink_task(task);
            }
            (stack, (!leader).then_some(task))
        });
        drop(lock);
        let task = cpu.current.get().some();
        match task.and_then(|task| self.obj(task).mm.get().some()) {
            Some(mm) => self.switch_mm(mm),
            // The idle loop, or a thread of the kernel.
            None => self.enter_lazy(),
        }
        if let Some((stack, slot)) = remains {
            self.free_stack(stack);
            if let Some(slot) = slot {
                self.free_slot(slot);
            }
        }
    }

    /// True once the last process has exited, and the threads of the kernel have come to an end with what they did. (The
    /// first process's leader is never waited for, so there are tasks from the first process on.) Under the lock.
    pub(super) fn nothing_lives(&self) -> bool {
        let is_busy = |task: Pa<Task>| {
            self.obj(task).flags.get() & task_flags::KERNEL != 0 && !self.has_no_work(task)
        };
        !self.root().tasks.get().is_null() && !self.any_process() && !self.tasks().any(is_busy)
    }

    /// True while some process has not exited. Under the lock.
    pub(super) fn any_process(&self) -> bool {
        self.tasks().any(|task| self.obj(task).threads.get() > 0)
    }

    /// Ends this CPU's part of the run: it lets go of the last address space, and the last CPU to do
    /// so ends the machine. The host then finds every frame accounted for.
    fn retire(&self) -> ! {
        self.leave_mm();
        self.rcu_barrier();
        let lock = self.sched_lock();
        let me = 1 << self.arch.cpu();
        let last = self.root().online.fetch_and(!me, AcqRel) == me;
        let first = self
            .tasks()
            .find(|task| self.obj(*task).id.get() == FIRST_TASK);
        drop(lock);
        if last {
            let status = first.map_or(0, |task| self.obj(task).status.get());
            self.arch.exit(wait::shell(status));
        }
        loop {
            self.idle();
        }
    }
}
