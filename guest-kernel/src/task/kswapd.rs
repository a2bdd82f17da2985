//! The reclaim thread as a task: how it comes to be, sleeps and is woken. What it does is in `mm::kswapd`.
//!
//! It has no address space. While it runs its CPU is lazy in what was loaded before ([`Kernel::enter_lazy`]), and its
//! flushes reach the others as everybody's do. It never enters CPL 3. It sleeps from the beginning: a machine with
//! memory enough never switches to it. The machine ends when the last process has and the thread sleeps again, for
//! until then it may have pages in hand.
//!
//! There is no timer, and no task gives its CPU away but by itself: the thread runs where a CPU idles, or a task of its CPU
//! sleeps, yields or ends. Programs that leave it no CPU reclaim themselves.

use core::sync::atomic::Ordering::SeqCst;
use core::sync::atomic::fence;

use abi::channel::EventKind;
use abi::objects::{Pa, Task, TaskState, UserFrame, task_flags};

use crate::Kernel;
use crate::arch::Arch;
use crate::mm::Field;
use crate::testbed::told;

impl<A: Arch> Kernel<A> {
    /// Makes the thread, where the command line asks for swap and not against it. Once, at boot, on CPU 0.
    ///
    /// # Panics
    /// Where memory does not suffice.
    pub(super) fn start_kswapd(&self) {
        if self.config.swap_slots == 0 || !self.config.kswapd {
            return;
        }
        let task = self.new_task(&UserFrame::default());
        let task = task.expect("guest memory too small for kswapd");
        let object = self.obj(task);
        let id = told(|| object.id.get());
        object.process.set(object.id.get());
        object.leader.set(task);
        object.affinity.set(self.possible_cpus());
        object.flags.set(task_flags::KERNEL);
        object.waits_for.set(Task::WAITS_FOR_WORK);
        object.state.set(TaskState::Blocked as u32);
        self.set_default_watermarks();
        let lock = self.sched_lock();
        let root = self.root();
        object.next_task.set(root.tasks.get());
        root.tasks.set(task);
        root.kswapd.task.set(task);
        event!(self, EventKind::TaskCreate, [id.into(), 0, 0, 0, 0]);
        drop(lock);
        if self.is_memory_low() {
            self.wake_kswapd();
        }
    }

    /// What the thread does, from its first step on.
    pub(super) fn kswapd(&self) -> ! {
        self.current().waits_for.set(0);
        loop {
            self.balance();
            self.kswapd_sleep();
        }
    }

    /// Wakes the thread if it sleeps (Linux's `wakeup_kswapd`). Under no lock that comes last.
    pub(crate) fn wake_kswapd(&self) {
        let Some(task) = self.root().kswapd.task.get().some() else {
            return;
        };
        if self.has_no_work(task) {
            let _lock = self.sched_lock();
            if self.has_no_work(task) {
                self.wake(task);
            }
        }
    }

    /// Sleeps until somebody wakes the thread, if nobody needs it now (Linux's `kswapd_try_to_sleep`).
    fn kswapd_sleep(&self) {
        let lock = self.sched_lock();
        let task = self.current();
        task.waits_for.set(Task::WAITS_FOR_WORK);
        task.state.set(TaskState::Blocked as u32);
        // Asleep first, then a look at how many frames are free: who has taken one looks the other way round.
        fence(SeqCst);
        if self.is_memory_low() {
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
