//! FIFO queues of tasks, linked by [`Task::next`]. A task is on at most one. Under the lock.

use abi::objects::{Link, Pa, Task};

use crate::Kernel;
use crate::arch::Arch;

impl<A: Arch> Kernel<A> {
    /// The tasks of the queue that starts at `head`, in order.
    pub(super) fn queue_iter(&self, head: &Link<Task>) -> impl Iterator<Item = Pa<Task>> {
        core::iter::successors(head.get().some(), |task| self.obj(*task).next.get().some())
    }

    /// Appends `task`, which is on no queue.
    pub(super) fn queue_push(&self, head: &Link<Task>, task: Pa<Task>) {
        self.obj(task).next.set(Pa::NULL);
        match self.queue_iter(head).last() {
            Some(last) => self.obj(last).next.set(task),
            None => head.set(task),
        }
    }

    /// Takes the first task that is `wanted`.
    pub(super) fn queue_take(
        &self,
        head: &Link<Task>,
        wanted: impl Fn(Pa<Task>, &Task) -> bool,
    ) -> Option<Pa<Task>> {
        let mut link = head;
        while let Some(task) = link.get().some() {
            let object = self.obj(task);
            if wanted(task, object) {
                link.set(object.next.get());
                object.next.set(Pa::NULL);
                return Some(task);
            }
            link = &object.next;
        }
        None
    }

    /// Every task of the machine, newest first.
    pub(super) fn tasks(&self) -> impl Iterator<Item = Pa<Task>> {
        core::iter::successors(self.root().tasks.get().some(), |task| {
            self.obj(*task).next_task.get().some()
        })
    }

    /// Takes `task` off the list of all tasks.
    pub(super) fn unlink_task(&self, task: Pa<Task>) {
        let mut link = &self.root().tasks;
        while link.get() != task {
            link = &self.obj(link.get()).next_task;
        }
        link.set(self.obj(task).next_task.get());
    }
}
