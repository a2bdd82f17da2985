//! wait4: how a parent learns that a child has ended.

use abi::objects::{Pa, Task, TaskState};
use abi::syscall::{Errno, wait};

use crate::Kernel;
use crate::arch::Arch;
use crate::mm::Field;

/// Which children wait4 waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    /// Every one.
    Any,
    /// The process with this number.
    Process(u32),
}

impl Which {
    /// Decodes wait4's `pid`. All processes are in one process group, the first's, so 0 means any
    /// child and other groups are empty.
    pub(super) fn decode(pid: u64) -> Result<Self, Errno> {
        match pid as i32 {
            -1 | 0 => Ok(Self::Any),
            pid => u32::try_from(pid)
                .map(Self::Process)
                .map_err(|_| Errno::ECHILD),
        }
    }
}

/// The children that a wait is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Children {
    /// There are none.
    None,
    /// All live.
    Alive,
    /// This one has ended.
    Ended(Pa<Task>),
}

impl<A: Arch> Kernel<A> {
    /// wait4. `WNOHANG` is the only option; resource usage is not kept, so its pointer must be null.
    pub(super) fn wait4(
        &self,
        pid: u64,
        status: u64,
        options: u64,
        usage: u64,
    ) -> Result<u64, Errno> {
        if options & !wait::WNOHANG != 0 || usage != 0 {
            return Err(Errno::EINVAL);
        }
        let which = Which::decode(pid)?;
        let me = self.current();
        loop {
            let lock = self.sched_lock();
            match self.children(me.process.get(), which) {
                Children::None => return Err(Errno::ECHILD),
                Children::Alive if options & wait::WNOHANG != 0 => return Ok(0),
                Children::Alive => {
                    self.may_block()?;
                    self.block(lock, Task::WAITS_FOR_CHILD);
                }
                Children::Ended(child) => {
                    self.unlink_task(child);
                    drop(lock);
                    let id = self.obj(child).id.get();
                    let value = self.obj(child).status.get();
                    self.free_slot(child);
                    if status != 0 {
                        self.put_user(status, value)?;
                    }
                    return Ok(id.into());
                }
            }
        }
    }

    /// What has become of the children of process `parent`; the oldest that has ended. Under the lock.
    pub(super) fn children(&self, parent: u32, which: Which) -> Children {
        let mut found = Children::None;
        for pa in self.tasks() {
            let task = self.obj(pa);
            let wanted = match which {
                Which::Any => true,
                Which::Process(id) => task.id.get() == id,
            };
            if !wanted || task.leader.get() != pa || task.parent.get() != parent {
                continue;
            }
            let ended = task.state.get() == TaskState::Zombie as u32 && task.threads.get() == 0;
            if ended {
                // Newest first in the list: the last that is found is the oldest.
                found = Children::Ended(pa);
            } else if found == Children::None {
                found = Children::Alive;
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pid_says_which_child() {
        assert_eq!(Which::decode(7), Ok(Which::Process(7)));
        assert_eq!(Which::decode(u64::MAX), Ok(Which::Any));
        // A C program passes an int: only its 32 bits count.
        assert_eq!(Which::decode(0xffff_ffff), Ok(Which::Any));
        assert_eq!(Which::decode(0), Ok(Which::Any));
        assert_eq!(Which::decode(-5i64 as u64), Err(Errno::ECHILD));
    }
}
