//! futex: WAIT and WAKE, of words that one process uses or several (the latter in shared memory). There is no clock, so WAIT takes
//! no timeout (EINVAL).

use abi::layout::USER_END;
use abi::objects::{Mm, Pa, Task};
use abi::pte::fault;
use abi::syscall::{Errno, futex};

use crate::Kernel;
use crate::arch::Arch;
use crate::mm::Field;

/// What a futex call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FutexOp {
    /// Sleep if the word has this value.
    Wait(u32),
    /// Wake up to this many.
    Wake(u32),
}

impl FutexOp {
    /// Decodes futex's operation. As in Linux, WAKE wakes one even where none is asked for.
    pub(super) fn decode(op: u64, value: u64, timeout: u64) -> Result<Self, Errno> {
        match u64::from(op as u32) & !futex::PRIVATE_FLAG {
            futex::WAIT if timeout == 0 => Ok(Self::Wait(value as u32)),
            futex::WAIT => Err(Errno::EINVAL),
            futex::WAKE => Ok(Self::Wake((value as i32).max(1).cast_unsigned())),
            _ => Err(Errno::ENOSYS),
        }
    }
}

/// Which futex a word is ([`Task::futex`]).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct FutexKey(pub(super) [u64; 3]);

impl FutexKey {
    /// One that its process alone uses, by its own word for it.
    pub(super) const fn private(mm: Pa<Mm>, gva: u64) -> Self {
        Self([mm.0, 0, gva])
    }

    /// One that is not said to be private, in private memory: another one than that (Linux's FUT_OFF_MMSHARED). A word lies
    /// at a multiple of 4.
    const fn of_private_memory(mm: Pa<Mm>, gva: u64) -> Self {
        Self([mm.0, 0, gva | 1])
    }

    fn is_of(self, task: &Task) -> bool {
        (0..3).all(|word| task.futex[word].get() == self.0[word])
    }
}

impl<A: Arch> Kernel<A> {
    /// futex.
    pub(super) fn futex(&self, gva: u64, op: u64, value: u64, timeout: u64) -> Result<u64, Errno> {
        let is_private = op & futex::PRIVATE_FLAG != 0;
        let op = FutexOp::decode(op, value, timeout)?;
        if !gva.is_multiple_of(4) {
            return Err(Errno::EINVAL);
        }
        // The first address behind user space passes here, as Linux's access_ok of less than a page looks at the address
        // alone (arch/x86/include/asm/uaccess_64.h).
        if gva > USER_END {
            return Err(Errno::EFAULT);
        }
        let key = self.futex_key(gva, is_private)?;
        match op {
            FutexOp::Wait(expected) => self.futex_wait(key, gva, expected),
            FutexOp::Wake(most) => Ok(self.futex_wake(key, most)),
        }
    }

    /// Which futex the word at `gva` is. In a file's page it is the same for all who map it, unless the caller says that only
    /// its own process uses it (Linux's `get_futex_key`). Otherwise the page is made writable, if it may be: so a private mapping
    /// gets its own.
    ///
    /// # Errors
    /// EFAULT where the page cannot be read, and for private memory where it cannot be written: nobody would ever wake who waits
    /// there.
    pub(super) fn futex_key(&self, gva: u64, is_private: bool) -> Result<FutexKey, Errno> {
        let mm = self.current().mm.get();
        if is_private {
            return Ok(FutexKey::private(mm, gva));
        }
        let is_writable = self.fault_page(mm, gva, fault::USER | fault::WRITE);
        if !is_writable && !self.fault_page(mm, gva, fault::USER) {
            return Err(Errno::EFAULT);
        }
        match self.file_place(mm, gva, is_writable) {
            Some(place) => Ok(FutexKey(place)),
            None if is_writable => Ok(FutexKey::of_private_memory(mm, gva)),
            None => Err(Errno::EFAULT),
        }
    }

    /// Blocks until a wake, if the word still holds `expected`.
    ///
    /// The word is compared under the lock that a waker must take, so that no wake is lost between
    /// the look and the sleep. A fault cannot be handled under a spin lock, so one there is refused
    /// ([`Kernel::fault_for_copy`]) and the word is read in again without (Linux's
    /// `futex_get_value_locked()`).
    fn futex_wait(&self, key: FutexKey, gva: u64, expected: u32) -> Result<u64, Errno> {
        loop {
            self.get_user(gva)?;
            let lock = self.sched_lock();
            let Ok(value) = self.get_user(gva) else {
                continue;
            };
            if value != expected {
                return Err(Errno::EAGAIN);
            }
            self.may_block()?;
            let task = self.this_cpu().current.get();
            for (word, value) in self.obj(task).futex.iter().zip(key.0) {
                word.set(value);
            }
            self.queue_push(&self.root().futex_queue, task);
            self.block(lock, gva);
            return Ok(0);
        }
    }

    /// Wakes up to `most` tasks that wait for the word that is `key`, in the order of their arrival. Returns how many.
    pub(super) fn futex_wake(&self, key: FutexKey, most: u32) -> u64 {
        let lock = self.sched_lock();
        let mut woken = 0;
        while woken < u64::from(most) {
            let waiter = self.queue_take(&self.root().futex_queue, |_, task| key.is_of(task));
            let Some(task) = waiter else { break };
            self.wake(task);
            woken += 1;
        }
        drop(lock);
        woken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_decode_as_in_linux() {
        let wait = futex::WAIT | futex::PRIVATE_FLAG;
        assert_eq!(FutexOp::decode(wait, 7, 0), Ok(FutexOp::Wait(7)));
        assert_eq!(FutexOp::decode(futex::WAIT, 7, 0), Ok(FutexOp::Wait(7)));
        assert_eq!(FutexOp::decode(wait, 7, 0x1000), Err(Errno::EINVAL));
        let all = i32::MAX as u64;
        assert_eq!(
            FutexOp::decode(futex::WAKE, all, 0x1000),
            Ok(FutexOp::Wake(i32::MAX as u32))
        );
        assert_eq!(FutexOp::decode(futex::WAKE, 0, 0), Ok(FutexOp::Wake(1)));
        assert_eq!(
            FutexOp::decode(futex::WAKE, u64::MAX, 0),
            Ok(FutexOp::Wake(1))
        );
        const REQUEUE: u64 = 3;
        assert_eq!(FutexOp::decode(REQUEUE, 0, 0), Err(Errno::ENOSYS));
    }
}
