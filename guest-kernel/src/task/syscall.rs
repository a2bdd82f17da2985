//! The system-call table, with Linux's numbers, arguments and errno (x86-64: number in `rax`,
//! arguments in `rdi rsi rdx r10 r8 r9`, result in `rax`).

use abi::channel::EventKind;
use abi::layout::PAGE_SIZE;
use abi::objects::UserFrame;
use abi::point::Point;
use abi::syscall::{Errno, encode, map, nr, wait};

use super::create::CloneArgs;
use crate::Kernel;
use crate::arch::Arch;
use crate::mm::Field;

impl<A: Arch> Kernel<A> {
    /// The system call that the registers ask for; its result goes to `rax`.
    pub fn syscall(&self, frame: &mut UserFrame) {
        let (nr, arg0) = (frame.rax, frame.rdi);
        self.entered(frame);
        #[cfg(feature = "testbed")]
        if let Some(result) = self.testbed_call(frame) {
            frame.rax = encode(result);
            return;
        }
        self.event(
            EventKind::SyscallEnter,
            [nr, arg0, frame.rsi, frame.rdx, frame.r10],
        );
        self.point(Point::SyscallEnter, [nr, arg0]);
        let result = encode(self.dispatch(frame));
        frame.rax = result;
        self.event(EventKind::SyscallExit, [nr, result, 0, 0, 0]);
        self.point(Point::SyscallExit, [nr, result]);
    }

    /// What every entry from CPL 3 does: RCU watches, a sign of life, and the registers where the host finds them.
    pub(super) fn entered(&self, frame: &UserFrame) {
        self.rcu_enter_kernel();
        self.progress();
        self.current().frame.set(core::ptr::from_ref(frame) as u64);
    }

    fn dispatch(&self, frame: &UserFrame) -> Result<u64, Errno> {
        let UserFrame {
            rdi: a0,
            rsi: a1,
            rdx: a2,
            r10: a3,
            r8: a4,
            r9: a5,
            ..
        } = *frame;
        let me = self.current();
        let mm = me.mm.get();
        match frame.rax {
            nr::MMAP => {
                check_mmap(a3, a4, a5)?;
                self.mmap(mm, a0, a1, a2, a3)
            }
            nr::MUNMAP => self.munmap(mm, a0, a1).map(|()| 0),
            nr::MPROTECT => self.mprotect(mm, a0, a1, a2).map(|()| 0),
            nr::MADVISE => self.madvise(mm, a0, a1, a2).map(|()| 0),
            nr::BRK => Ok(self.brk(mm, a0)),
            nr::WRITE => self.write(a0, a1, a2),
            nr::GETPID => Ok(me.process.get().into()),
            nr::GETTID => Ok(me.id.get().into()),
            nr::GETCPU => self.getcpu(a0, a1),
            nr::SCHED_YIELD => {
                self.yield_now();
                Ok(0)
            }
            nr::SCHED_SETAFFINITY => self.sched_setaffinity(a0, a1, a2),
            nr::SCHED_GETAFFINITY => self.sched_getaffinity(a0, a1, a2),
            nr::FUTEX => self.futex(a0, a1, a2, a3),
            nr::CLONE => self.clone_task(
                CloneArgs {
                    flags: a0,
                    stack: a1,
                    parent_tid: a2,
                    child_tid: a3,
                },
                frame,
            ),
            nr::FORK => self.clone_task(CloneArgs::FORK, frame),
            nr::WAIT4 => self.wait4(a0, a1, a2, a3),
            nr::EXIT => self.exit_task(wait::exited(a0)),
            nr::EXIT_GROUP => self.exit_process(wait::exited(a0)),
            nr::TESTBED_REPORT => self.testbed_report(a0, a1, a2, a3),
            nr::TESTBED_FAULT_FIXUP => self.testbed_fault_fixup(a0, a1, a2),
            nr::TESTBED_TLB => Ok(self.testbed_tlb()),
            nr::TESTBED_WIRE => self.wire(mm, a0, a1).map(|()| 0),
            nr::TESTBED_NR_CPUS => Ok(self.arch.nr_cpus() as u64),
            #[cfg(feature = "testbed")]
            nr::TESTBED_CRASH => self.testbed_crash(a0),
            #[cfg(feature = "testbed")]
            nr::TESTBED_PEEK => self.testbed_peek(a0, a1),
            _ => Err(Errno::ENOSYS),
        }
    }
}

/// What mmap checks before it looks at the address space: there are no files to map. Descriptors 0 to
/// 2 are the console, which cannot be mapped.
fn check_mmap(flags: u64, fd: u64, offset: u64) -> Result<(), Errno> {
    if !offset.is_multiple_of(PAGE_SIZE) {
        return Err(Errno::EINVAL);
    }
    if flags & map::ANONYMOUS != 0 {
        return Ok(());
    }
    Err(match fd as u32 {
        0..=2 => Errno::ENODEV,
        _ => Errno::EBADF,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mmap_of_a_file_is_refused_as_linux_refuses_a_bad_descriptor() {
        let private = map::PRIVATE;
        assert_eq!(check_mmap(private | map::ANONYMOUS, u64::MAX, 0), Ok(()));
        assert_eq!(check_mmap(private | map::ANONYMOUS, 0, 0), Ok(()));
        assert_eq!(check_mmap(private, u64::MAX, 0), Err(Errno::EBADF));
        assert_eq!(check_mmap(private, 0xffff_ffff, 0), Err(Errno::EBADF));
        assert_eq!(check_mmap(private, 9, 0), Err(Errno::EBADF));
        assert_eq!(check_mmap(private, 1, 0), Err(Errno::ENODEV));
        assert_eq!(
            check_mmap(private | map::ANONYMOUS, u64::MAX, 0x800),
            Err(Errno::EINVAL)
        );
    }
}
