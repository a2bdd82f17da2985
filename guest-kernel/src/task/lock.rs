//! Sleep for a lock: the queue of [`rwsem`], under the scheduler's lock.
//!
//! Not even being killed wakes who sleeps here (Linux's TASK_UNINTERRUPTIBLE): it comes to its end with the lock, on its way back
//! to CPL 3.

use core::sync::atomic::AtomicU64;

use abi::channel::EventKind;
use abi::lock::LockClass;
use abi::objects::Task;

use crate::Kernel;
use crate::arch::Arch;
use crate::mm::Field;
use crate::sync::rwsem;
use crate::testbed::told;

impl<A: Arch> Kernel<A> {
    /// The running task sleeps until it may try again to get the lock `word` as `class`; not at all where it may at once.
    /// It holds no spin lock.
    pub(crate) fn sleep_for_lock(&self, word: &AtomicU64, class: LockClass) {
        let lock = self.sched_lock();
        // It looks at the word once more.
        self.tell_wait(word, class);
        if rwsem::must_sleep(word, class) {
            let task = self.this_cpu().current.get();
            let [id, wanted] = &self.obj(task).lock;
            id.set(self.lock_id(word));
            wanted.set(class as u64);
            self.queue_push(&self.root().lock_queue, task);
            self.block(lock, Task::WAITS_FOR_LOCK);
        }
    }

    /// Wakes who sleeps for the lock `word`, which has been released: who came first, and with a reader all of them.
    ///
    /// Others may have woken those who slept, and the lock's object may be gone since: only a sleeper says that it is
    /// there.
    pub(crate) fn wake_sleepers(&self, word: &AtomicU64) {
        let _lock = self.sched_lock();
        let queue = &self.root().lock_queue;
        let id = self.lock_id(word);
        let sleeps = |task: &Task| task.lock[0].get() == id;
        let reads = |task: &Task| task.lock[1].get() == LockClass::MmapRead as u64;
        let Some(first) = self.queue_take(queue, |_, task| sleeps(task)) else {
            return;
        };
        let class = told(|| self.obj(first).lock[1].get());
        self.wake(first);
        let mut woken = told(|| 1);
        if reads(self.obj(first)) {
            while let Some(next) = self.queue_take(queue, |_, task| sleeps(task) && reads(task)) {
                self.wake(next);
                woken += told(|| 1);
            }
        }
        rwsem::let_readers_in(word);
        event!(self, EventKind::LockWake, [id, class, woken, 0, 0]);
        if !self.queue_iter(queue).any(|task| sleeps(self.obj(task))) {
            rwsem::nobody_sleeps(word);
        }
    }
}
