//! How tasks begin: the first process, fork, threads.
#![allow(
    unsafe_code,
    reason = "the word of BootInfo that is the kernel's to write"
)]

use core::mem::offset_of;
use core::sync::atomic::Ordering::Relaxed;

use abi::boot::BootInfo;
use abi::channel::{Doorbell, EventKind};
use abi::layout::{
    BOOT_INFO_GPA, PAGE_SIZE, USER_ARGS_GVA, USER_DATA_GVA, USER_END, USER_STACK_BYTES,
    USER_STACK_TOP,
};
use abi::objects::{FileTable, FrameKind, Mm, Pa, Task, UserFrame, task_flags};
use abi::syscall::{Errno, clone, signal};

use crate::Kernel;
use crate::arch::Arch;
use crate::mm::Field;
use crate::testbed::told;

/// Number of the first process and of its first task.
pub(super) const FIRST_TASK: u32 = 1;
/// Buddy order of a kernel stack.
const STACK_ORDER: u8 = 2;
/// Bytes of a kernel stack.
pub(super) const STACK_BYTES: usize = (PAGE_SIZE as usize) << STACK_ORDER;

/// RFLAGS at the first instruction of a program: interrupts on, and the bit that is always set (SDM
/// vol. 1, 3.4.3).
const FIRST_RFLAGS: u64 = 0x202;

/// What clone was asked for, and is able to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CloneForm {
    /// A task of the same process.
    Thread,
    /// A process with a copy of the address space.
    Fork,
}

impl CloneForm {
    /// Decodes clone's flags. Of the state that Linux can share only memory and descriptors (`FILES`) exist here, so
    /// `FS` and `SYSVSEM` are accepted with every form and mean nothing. A memory-sharing process
    /// (vfork), thread-local storage and namespaces do not exist: EINVAL.
    pub(super) fn decode(flags: u64) -> Result<Self, Errno> {
        const EXIT_SIGNAL: u64 = 0xff;
        const THREAD: u64 = clone::VM | clone::SIGHAND | clone::THREAD;
        const ACCEPTED: u64 = clone::FS
            | clone::FILES
            | clone::SYSVSEM
            | clone::PARENT_SETTID
            | clone::CHILD_SETTID
            | clone::CHILD_CLEARTID;
        match flags & !EXIT_SIGNAL & !ACCEPTED {
            THREAD => Ok(Self::Thread),
            0 if flags & EXIT_SIGNAL == signal::SIGCHLD => Ok(Self::Fork),
            _ => Err(Errno::EINVAL),
        }
    }
}

/// Arguments of clone in the order of x86-64.
#[derive(Clone, Copy, Debug)]
pub(super) struct CloneArgs {
    pub(super) flags: u64,
    pub(super) stack: u64,
    pub(super) parent_tid: u64,
    pub(super) child_tid: u64,
}

impl CloneArgs {
    /// What fork asks clone for.
    pub(super) const FORK: Self = Self {
        flags: signal::SIGCHLD,
        stack: 0,
        parent_tid: 0,
        child_tid: 0,
    };
}

/// A new task's place among the others.
struct Kin {
    mm: Pa<Mm>,
    /// None: it starts a process of its own.
    leader: Option<Pa<Task>>,
    parent: u32,
    affinity: u64,
    set_tid: u64,
    clear_tid: u64,
    files: Pa<FileTable>,
}

impl<A: Arch> Kernel<A> {
    /// Builds the first process from what the host loaded, and makes it ready. Once, on CPU 0.
    ///
    /// # Panics
    /// Where the host's [`BootInfo`] is not usable or memory does not suffice: there is nobody to
    /// return an error to.
    pub fn start_first_process(&self, info: &BootInfo) {
        assert!(
            info.user_entry < USER_END,
            "user entry {:#x} is no user address",
            info.user_entry
        );
        let short = "guest memory too small for the user image";
        let mm = self.mm_create().expect(short);
        let segments = usize::try_from(info.nr_segments).ok();
        let segments = segments
            .and_then(|count| info.segments.get(..count))
            .expect("more segments than BootInfo holds");
        for segment in segments {
            if let Err(errno) = self.map_segment(mm, segment) {
                panic!("user segment at {:#x} not mapped: {errno}", segment.gva);
            }
        }
        self.map_stack(mm, USER_STACK_TOP, USER_STACK_BYTES)
            .expect(short);
        let frame = UserFrame {
            rip: info.user_entry,
            rsp: USER_STACK_TOP,
            rflags: FIRST_RFLAGS,
            rdi: USER_ARGS_GVA,
            rsi: info.args_len,
            rdx: if info.data_len == 0 { 0 } else { USER_DATA_GVA },
            r8: info.data_len,
            ..UserFrame::default()
        };
        let task = self.new_task(&frame).expect(short);
        self.admit(
            task,
            &Kin {
                mm,
                leader: None,
                parent: 0,
                affinity: self.possible_cpus(),
                set_tid: 0,
                clear_tid: 0,
                files: self.files_create().expect(short),
            },
        );
        self.start_kswapd();
        self.start_khugepaged();
    }

    /// Tells the host where the kernel's objects are and that CPL 3 comes next. Once.
    pub(super) fn announce_first_user(&self) {
        let gpa = BOOT_INFO_GPA + offset_of!(BootInfo, kernel_root) as u64;
        let root = self.arch.phys_to_virt(gpa).cast::<u64>();
        // SAFETY: the BootInfo page is mapped for the kernel's whole life and reserved for the host's
        // structure, in which this word is aligned and the kernel's to write; nothing in the kernel
        // holds a reference to the structure any more: boot has ended, this is a task.
        unsafe { root.write_volatile(self.root_pa().0) };
        self.arch.doorbell(Doorbell::FirstUser);
    }

    /// clone, in the forms of [`CloneForm`]. `frame` is the caller's.
    pub(super) fn clone_task(&self, args: CloneArgs, frame: &UserFrame) -> Result<u64, Errno> {
        let form = CloneForm::decode(args.flags)?;
        let me = self.current();
        let mut child_frame = *frame;
        child_frame.rax = 0;
        if args.stack != 0 {
            child_frame.rsp = args.stack;
        }
        let files = self.clone_files(me.files.get(), args.flags)?;
        let task = self
            .new_task(&child_frame)
            .inspect_err(|_| self.files_put(files))?;
        let mm = me.mm.get();
        let mm = match form {
            CloneForm::Thread => {
                self.mm_get(mm);
                mm
            }
            CloneForm::Fork => self.mm_fork(mm).inspect_err(|_| {
                self.free_stack(self.obj(task).stack.get());
                self.free_slot(task);
                self.files_put(files);
            })?,
        };
        let id = self.obj(task).id.get();
        if args.flags & clone::PARENT_SETTID != 0 {
            // As in Linux, a bad address is the program's loss.
            let _ = self.put_user(args.parent_tid, id);
        }
        let when = |flag| {
            if args.flags & flag == 0 {
                0
            } else {
                args.child_tid
            }
        };
        self.admit(
            task,
            &Kin {
                mm,
                leader: (form == CloneForm::Thread).then(|| me.leader.get()),
                parent: match form {
                    CloneForm::Thread => me.parent.get(),
                    CloneForm::Fork => me.process.get(),
                },
                affinity: me.affinity.get(),
                set_tid: when(clone::CHILD_SETTID),
                clear_tid: when(clone::CHILD_CLEARTID),
                files,
            },
        );
        Ok(id.into())
    }

    /// The descriptors of a new task: its creator's, or a copy.
    fn clone_files(&self, files: Pa<FileTable>, flags: u64) -> Result<Pa<FileTable>, Errno> {
        if flags & clone::FILES == 0 {
            return self.files_copy(files);
        }
        self.files_share(files);
        Ok(files)
    }

    /// CPUs that the machine has.
    pub(super) fn possible_cpus(&self) -> u64 {
        u64::MAX >> (64 - self.arch.nr_cpus())
    }

    /// Gives the kernel stack at GVA `stack` back.
    pub(super) fn free_stack(&self, stack: u64) {
        self.free_frames(stack - self.arch.phys_to_virt(0) as u64);
    }

    /// Gives the slot of a task that nothing refers to any more back.
    pub(super) fn free_slot(&self, task: Pa<Task>) {
        self.slab_free(task);
    }

    /// A numbered task with a stack from which it enters CPL 3 with `frame`. Nobody else knows it.
    pub(super) fn new_task(&self, frame: &UserFrame) -> Result<Pa<Task>, Errno> {
        let stack = self.alloc_frames(STACK_ORDER, FrameKind::Stack)?;
        let task = self
            .slab_alloc::<Task>()
            .inspect_err(|_| self.free_frames(stack))?;
        let stack = self.arch.phys_to_virt(stack);
        let object = self.obj(task);
        let id = self.root().next_task.fetch_add(1, Relaxed);
        object.id.set(id as u32);
        object.stack.set(stack as u64);
        let sp = self.arch.prepare_stack(stack, STACK_BYTES, frame);
        object.saved_sp.set(sp);
        Ok(task)
    }

    /// Makes `task` one of the machine's tasks, and ready.
    fn admit(&self, task: Pa<Task>, kin: &Kin) {
        let object = self.obj(task);
        let id = told(|| object.id.get());
        object.mm.set(kin.mm);
        object.parent.set(kin.parent);
        object.affinity.set(kin.affinity);
        object.set_tid.set(kin.set_tid);
        object.clear_tid.set(kin.clear_tid);
        object.files.set(kin.files);
        object.leader.set(kin.leader.unwrap_or(task));
        let leader = self.obj(object.leader.get());

        let lock = self.sched_lock();
        object.process.set(leader.id.get());
        leader.threads.set(leader.threads.get() + 1);
        // A thread that starts while another one ends the process must not outlive it.
        let killed = kin.leader.is_some() && leader.flags.get() & task_flags::GROUP_EXIT != 0;
        object
            .flags
            .set(if killed { task_flags::KILLED } else { 0 });
        let root = self.root();
        object.next_task.set(root.tasks.get());
        root.tasks.set(task);
        event!(
            self,
            EventKind::TaskCreate,
            [id.into(), self.obj(kin.mm).id.get(), 0, 0, 0],
        );
        self.make_ready(task);
        drop(lock);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clone_takes_the_flags_of_pthread_create_and_of_fork() {
        let thread = clone::VM | clone::FS | clone::FILES | clone::SIGHAND | clone::THREAD;
        let extras = clone::SYSVSEM | clone::PARENT_SETTID | clone::CHILD_CLEARTID;
        assert_eq!(CloneForm::decode(thread), Ok(CloneForm::Thread));
        assert_eq!(CloneForm::decode(thread | extras), Ok(CloneForm::Thread));
        let fork = signal::SIGCHLD;
        assert_eq!(CloneForm::decode(fork), Ok(CloneForm::Fork));
        let glibc = fork | clone::CHILD_SETTID | clone::CHILD_CLEARTID;
        assert_eq!(CloneForm::decode(glibc), Ok(CloneForm::Fork));
    }

    #[test]
    fn clone_refuses_what_does_not_exist_here() {
        let thread = clone::VM | clone::SIGHAND | clone::THREAD;
        const NEWPID: u64 = 0x2000_0000;
        for flags in [
            0,
            clone::VM | signal::SIGCHLD,
            clone::THREAD | signal::SIGCHLD,
            clone::VM | clone::THREAD,
            thread | clone::SETTLS,
            NEWPID | signal::SIGCHLD,
            1 << 40 | signal::SIGCHLD,
        ] {
            assert_eq!(CloneForm::decode(flags), Err(Errno::EINVAL), "{flags:#x}");
        }
    }
}
