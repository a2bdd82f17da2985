//! sched_setaffinity, sched_getaffinity and getcpu. A mask is one word: there are at most 16 CPUs.

use core::sync::atomic::Ordering::Release;

use abi::objects::{Pa, Task, TaskState, task_flags};
use abi::syscall::Errno;

use crate::Kernel;
use crate::arch::Arch;
use crate::mm::Field;

const MASK_BYTES: u64 = 8;

impl<A: Arch> Kernel<A> {
    /// sched_setaffinity. CPUs that the machine does not have are ignored; a task that may no longer
    /// run where it is moves at once (here) or on its way back to CPL 3 (elsewhere).
    pub(super) fn sched_setaffinity(&self, tid: u64, len: u64, mask: u64) -> Result<u64, Errno> {
        let mut bytes = [0; MASK_BYTES as usize];
        self.copy_in(&mut bytes[..len.min(MASK_BYTES) as usize], mask)?;
        let lock = self.sched_lock();
        let task = self.find_task(tid)?;
        let allowed = u64::from_le_bytes(bytes) & self.possible_cpus();
        if allowed == 0 {
            return Err(Errno::EINVAL);
        }
        self.restrict(task, allowed);
        drop(lock);
        self.honour_requests();
        Ok(0)
    }

    /// sched_getaffinity. Returns the bytes that it wrote.
    pub(super) fn sched_getaffinity(&self, tid: u64, len: u64, mask: u64) -> Result<u64, Errno> {
        if !len.is_multiple_of(MASK_BYTES) || len == 0 {
            return Err(Errno::EINVAL);
        }
        let lock = self.sched_lock();
        let task = self.find_task(tid)?;
        let allowed = self.obj(task).affinity.get();
        drop(lock);
        self.copy_out(mask, &allowed.to_le_bytes())?;
        Ok(MASK_BYTES)
    }

    /// getcpu. There is one NUMA node.
    pub(super) fn getcpu(&self, cpu: u64, node: u64) -> Result<u64, Errno> {
        if cpu != 0 {
            self.put_user(cpu, self.arch.cpu() as u32)?;
        }
        if node != 0 {
            self.put_user(node, 0)?;
        }
        Ok(0)
    }

    /// Lets `task` run on `allowed` only. Under the lock.
    pub(super) fn restrict(&self, task: Pa<Task>, allowed: u64) {
        let object = self.obj(task);
        object.affinity.store(allowed, Release);
        let cpu = object.cpu.get();
        if allowed & (1 << cpu) != 0 {
            return;
        }
        match TaskState::from_u32(object.state.get()) {
            Some(TaskState::Ready) => {
                self.dequeue(task);
                self.make_ready(task);
            }
            Some(TaskState::Running) => self.kick(1 << cpu),
            _ => {}
        }
    }

    /// The live task with number `tid`, the caller for 0; those of the kernel are not for programs. Under the lock.
    pub(super) fn find_task(&self, tid: u64) -> Result<Pa<Task>, Errno> {
        if tid as u32 == 0 {
            return Ok(self.this_cpu().current.get());
        }
        self.tasks()
            .find(|task| {
                let task = self.obj(*task);
                task.id.get() == tid as u32
                    && task.state.get() != TaskState::Zombie as u32
                    && task.flags.get() & task_flags::KERNEL == 0
            })
            .ok_or(Errno::ESRCH)
    }
}
