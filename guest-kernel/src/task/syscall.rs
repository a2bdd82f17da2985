//! The system-call table, with Linux's numbers, arguments and errno (x86-64: number in `rax`,
//! arguments in `rdi rsi rdx r10 r8 r9`, result in `rax`).

use abi::channel::EventKind;
use abi::disk::DiskOp;
use abi::objects::UserFrame;
use abi::point::Point;
use abi::syscall::{Errno, encode, nr, wait};

use super::create::CloneArgs;
use super::files::Place;
use crate::Kernel;
use crate::arch::Arch;
use crate::mm::Field;

impl<A: Arch> Kernel<A> {
    /// The system call that the registers ask for; its result goes to `rax`.
    pub fn syscall(&self, frame: &mut UserFrame) {
        let (nr, arg0) = (frame.rax, frame.rdi);
        self.entered(frame);
        #[cfg(feature = "testbed")]
        if nr != nr::SCHED_YIELD {
            self.this_cpu().yields.set(0);
        }
        #[cfg(feature = "testbed")]
        if let Some(result) = self.testbed_call(frame) {
            frame.rax = encode(result);
            return;
        }
        event!(
            self,
            EventKind::SyscallEnter,
            [nr, arg0, frame.rsi, frame.rdx, frame.r10],
        );
        point!(self, Point::SyscallEnter, [nr, arg0]);
        let result = encode(self.dispatch(frame));
        frame.rax = result;
        event!(self, EventKind::SyscallExit, [nr, result, 0, 0, 0]);
        point!(self, Point::SyscallExit, [nr, result]);
    }

    /// What every entry from CPL 3 does: RCU watches, a sign of life, and the registers where the host finds them.
    pub(super) fn entered(&self, frame: &UserFrame) {
        self.rcu_enter_kernel();
        progress!(self);
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
            nr::MMAP => self.mmap_call(mm, [a0, a1, a2, a3, a4, a5]),
            nr::MUNMAP => self.munmap(mm, a0, a1).map(|()| 0),
            nr::MPROTECT => self.mprotect(mm, a0, a1, a2).map(|()| 0),
            nr::MADVISE => self.madvise(mm, a0, a1, int(a2)).map(|()| 0),
            nr::MREMAP => self.mremap(mm, a0, (a1, a2), a3, a4),
            nr::MSYNC => self.msync(mm, a0, a1, int(a2)).map(|()| 0),
            nr::MINCORE => self.mincore_call(a0, a1, a2),
            nr::MLOCK => self.mlock(mm, a0, a1, 0).map(|()| 0),
            nr::MLOCK2 => self.mlock(mm, a0, a1, int(a2)).map(|()| 0),
            nr::MUNLOCK => self.munlock(mm, a0, a1).map(|()| 0),
            nr::MLOCKALL => self.mlockall(mm, int(a0)).map(|()| 0),
            nr::MUNLOCKALL => {
                self.munlockall(mm);
                Ok(0)
            }
            nr::MOVE_PAGES => self.move_pages(a0, a1, (a2, a3, a4), int(a5)),
            nr::MEMBARRIER => self.membarrier(mm, int(a0), int(a1)),
            nr::PRLIMIT64 => self.prlimit(a0, a1, (a2, a3)),
            nr::GETRLIMIT if a1 == 0 => Err(Errno::EFAULT),
            nr::GETRLIMIT => self.prlimit(0, a0, (0, a1)),
            nr::SETRLIMIT if a1 == 0 => Err(Errno::EFAULT),
            nr::SETRLIMIT => self.prlimit(0, a0, (a1, 0)),
            nr::BRK => Ok(self.brk(mm, a0)),
            nr::READ => self.read(a0, a1, a2, Place::Position),
            nr::WRITE => self.write(a0, a1, a2, Place::Position),
            nr::PREAD64 => self.read(a0, a1, a2, Place::At(a3)),
            nr::PWRITE64 => self.write(a0, a1, a2, Place::At(a3)),
            nr::LSEEK => self.lseek(a0, a1, a2),
            nr::CLOSE => self.close(a0).map(|()| 0),
            nr::DUP => self.dup(a0),
            nr::MEMFD_CREATE => self.memfd_create(a0, a1),
            nr::FSYNC | nr::FDATASYNC => self.fsync(a0).map(|()| 0),
            nr::FADVISE64 => self.fadvise(a0, (a1, a2), int(a3)).map(|()| 0),
            nr::FTRUNCATE => self.ftruncate(a0, a1).map(|()| 0),
            nr::FALLOCATE => self.fallocate(a0, a1, a2, a3).map(|()| 0),
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
            nr::TESTBED_COLLAPSE_SCAN => Ok(self.scan_for_collapse(mm)),
            nr::TESTBED_SPLIT_FOLIOS => self.split_folios(mm, a0, a1),
            nr::TESTBED_NR_CPUS => Ok(self.arch.nr_cpus() as u64),
            nr::TESTBED_DIRECT_READ => self.direct_io(DiskOp::Read, a0, a1, a2),
            nr::TESTBED_DIRECT_WRITE => self.direct_io(DiskOp::Write, a0, a1, a2),
            nr::TESTBED_DISK_FILE => self.disk_file(a0, a1),
            nr::TESTBED_RECLAIM => Ok(self.reclaim(a0)),
            nr::TESTBED_WATERMARKS => self.change_watermarks([a0, a1, a2]),
            nr::TESTBED_GROUP_CREATE => self.group_create(a0, a1),
            nr::TESTBED_GROUP_SET_MAX => self.group_set_max(a0, a1).map(|()| 0),
            nr::TESTBED_GROUP_MOVE => self.group_move(mm, a0, a1),
            nr::TESTBED_GROUP_STAT => self.group_stat(mm, a0, a1),
            nr::TESTBED_MIGRATE => self.migrate_range(mm, a0, a1),
            nr::TESTBED_COMPACT => Ok(self.compact(mm)),
            #[cfg(feature = "testbed")]
            nr::TESTBED_CRASH => self.testbed_crash(a0),
            #[cfg(feature = "testbed")]
            nr::TESTBED_PEEK => self.testbed_peek(a0, a1),
            #[cfg(feature = "testbed")]
            nr::TESTBED_MAPS => self.testbed_maps(a0, a1, a2, a3),
            _ => Err(Errno::ENOSYS),
        }
    }
}

/// An argument that is an int: the upper half of the register means nothing.
fn int(argument: u64) -> u64 {
    argument & 0xffff_ffff
}
