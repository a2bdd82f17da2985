//! The model with its coroutines, for tests of what sleeps: programs run, and a test chooses who goes on. One step is a
//! CPU up to some scheduling point, the arrival of IPIs, or the disk's answer to one request.
#![allow(
    unsafe_code,
    reason = "an arena that stands for physical memory, and the program's registers"
)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::boxed::Box;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;
use std::vec::Vec;

use abi::channel::{Control, Doorbell};
use abi::disk::{DiskOp, DiskRequest, DiskStatus};
use abi::layout::{CHANNEL_GPA, CHANNEL_STRIDE, PAGE_SIZE};
use abi::objects::{Pa, Task};
use abi::point::Point;
use abi::syscall::{Errno, clone, decode, map, nr, prot, signal};

use crate::Kernel;
use crate::arch::Arch;
use crate::arch::model::testing::boot_info;
use crate::arch::model::{Model, Pause};
use crate::mm::Field;

type Page = [u8; PAGE_SIZE as usize];

/// What a program does: its result is its exit code.
pub(super) type Program = fn(&User) -> u64;

/// Where a vCPU stops whatever its budget is: it may not be able to go on.
const WAITS: [Point; 7] = [
    Point::LockWait,
    Point::FlushWait,
    Point::IdleEnter,
    Point::UserRelax,
    Point::RcuWait,
    Point::DiskWait,
    Point::SyscallExit,
];
const BYTES: u64 = 4 << 20;
/// Steps after which a machine that has not ended never will.
const PATIENCE: usize = 2_000_000;
/// In r14 of a task's first registers: which of the programs it runs, plus one.
const FIRST: u64 = 1;

thread_local! {
    static PROGRAMS: Cell<&'static [Program]> = const { Cell::new(&[]) };
}

/// A machine, and its disk.
pub(super) struct Rig {
    pub(super) kernel: &'static Kernel<Model>,
    /// Free frames before the first process was.
    pub(super) free_at_boot: u64,
    memory: *mut u8,
    bytes: u64,
    queue: Vec<(usize, u64)>,
    pages: BTreeMap<u64, Page>,
    /// Requests of this kind fail.
    pub(super) fails: Option<DiskOp>,
    /// Requests done: reads, writes.
    pub(super) done: [usize; 2],
    seed: u64,
}

fn layout(bytes: u64) -> Layout {
    Layout::from_size_align(bytes as usize, PAGE_SIZE as usize).expect("a sane size")
}

/// CPL 3 of every task.
fn enter(kernel: &'static Kernel<Model>) {
    let user = User(kernel);
    let number = user.frame().r14.max(FIRST) - FIRST;
    let code = PROGRAMS.get()[number as usize](&user);
    let how = if number == 0 {
        nr::EXIT_GROUP
    } else {
        nr::EXIT
    };
    let _ = user.call(how, [code, 0, 0, 0]);
    unreachable!("exit returns");
}

impl Rig {
    /// A machine of `cpus` that runs `programs`, the first of them as its first process, by a schedule of `seed`.
    pub(super) fn new(cpus: usize, cmdline: &str, programs: &'static [Program], seed: u64) -> Self {
        Self::with_memory(BYTES, cpus, cmdline, programs, seed)
    }

    /// The same with so many bytes of memory.
    pub(super) fn with_memory(
        bytes: u64,
        cpus: usize,
        cmdline: &str,
        programs: &'static [Program],
        seed: u64,
    ) -> Self {
        PROGRAMS.set(programs);
        let info = boot_info(bytes, cpus, &std::format!("tlb=soft {cmdline}"));
        // SAFETY: the layout has a size that is not zero.
        let memory = unsafe { alloc_zeroed(layout(bytes)) };
        assert!(!memory.is_null(), "no memory for the arena");
        // SAFETY: page aligned, freed only in `drop`, used by this thread alone.
        let arch = unsafe { Model::new(memory, bytes, cpus, enter) };
        let kernel = Kernel::boot(arch, &info).unwrap_or_else(|error| panic!("{error}"));
        let kernel: &'static Kernel<Model> = Box::leak(Box::new(kernel));
        let rig = Self {
            kernel,
            free_at_boot: kernel.root().free_frames.get(),
            memory,
            bytes,
            queue: Vec::new(),
            pages: BTreeMap::new(),
            fails: None,
            done: [0; 2],
            seed: seed | 1,
        };
        for cpu in 0..cpus {
            let control = rig.control(cpu);
            control.budget.store(u64::MAX, Relaxed);
            for wait in WAITS {
                control.trap[wait as usize / 64].fetch_or(1 << (wait as usize % 64), Relaxed);
            }
        }
        Model::start(kernel, &info);
        rig
    }

    fn control(&self, cpu: usize) -> &Control {
        let gpa = CHANNEL_GPA + cpu as u64 * CHANNEL_STRIDE;
        // SAFETY: a page of the arena, of atomics.
        unsafe { &*self.memory.add(gpa as usize).cast::<Control>() }
    }

    /// A number below `limit` (xorshift64*).
    fn below(&mut self, limit: usize) -> usize {
        self.seed ^= self.seed >> 12;
        self.seed ^= self.seed << 25;
        self.seed ^= self.seed >> 27;
        (self.seed.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }

    /// Runs to the end. Returns the exit status.
    pub(super) fn run(&mut self) -> u32 {
        self.run_until(|_| false).expect("nobody stops it")
    }

    /// Runs until `stop`, which is asked between steps, or to the end, whose exit status it returns.
    pub(super) fn run_until(&mut self, mut stop: impl FnMut(&Self) -> bool) -> Option<u32> {
        let arch = &self.kernel.arch;
        for _ in 0..PATIENCE {
            if stop(self) {
                return None;
            }
            let cpu = self.below(arch.nr_cpus());
            match self.below(8) {
                0 => arch.deliver(cpu),
                1 => self.disk_step(),
                _ => {
                    let budget = 1 + self.below(200) as u64;
                    self.control(cpu).budget.store(budget, Relaxed);
                    let pause = arch.resume(cpu);
                    self.queue.extend(arch.take_submitted());
                    match pause {
                        Pause::Exited(status) => return Some(status),
                        Pause::Panicked(text) => panic!("the kernel panicked: {text}"),
                        Pause::Doorbell(Doorbell::Panic) => panic!("the kernel panicked"),
                        _ => {}
                    }
                }
            }
        }
        let tasks = self.kernel.tasks().map(|task| self.kernel.obj(task));
        let tasks = tasks.map(|task| (task.id.get(), task.state.get(), task.waits_for.get()));
        panic!("it hangs: {:?}", tasks.collect::<Vec<_>>());
    }

    /// The disk answers one request.
    fn disk_step(&mut self) {
        if self.queue.is_empty() {
            return;
        }
        let which = self.below(self.queue.len());
        let (cpu, gpa) = self.queue.remove(which);
        // SAFETY: what the kernel has submitted is a request in the arena, which is made of atomics.
        let request = unsafe { &*self.memory.add(gpa as usize).cast::<DiskRequest>() };
        let op = DiskOp::from_u32(request.op.get()).expect("an operation");
        let (sector, at) = (request.sector.get(), request.gpa.get());
        self.done[op as usize] += 1;
        let status = if self.fails == Some(op) {
            DiskStatus::Error
        } else {
            let page = self.pages.entry(sector).or_insert([0xdb; _]);
            match op {
                DiskOp::Write => self.kernel.load_memory(at, page),
                DiskOp::Read => self.kernel.store_memory(at, page),
            }
            DiskStatus::Done
        };
        request.status.set(status as u32);
        self.kernel.arch.interrupt_of_disk(cpu);
    }

    /// The reclaim thread.
    pub(super) fn kswapd(&self) -> Pa<Task> {
        self.kernel.root().kswapd.task.get()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.kernel.arch.forget_contexts();
        let kernel = std::ptr::from_ref(self.kernel).cast_mut();
        // SAFETY: leaked by `new`; no coroutine is left, and nobody else has the reference, nor one into the arena.
        unsafe {
            drop(Box::from_raw(kernel));
            dealloc(self.memory, layout(self.bytes));
        }
    }
}

/// CPL 3 of one task.
pub(super) struct User(pub(super) &'static Kernel<Model>);

impl User {
    #[allow(clippy::mut_from_ref)] // the running context has one frame, and no call keeps it
    fn frame(&self) -> &mut abi::objects::UserFrame {
        // SAFETY: it lies on the running context's own stack, and nobody else uses it while its program runs.
        unsafe { &mut *self.0.arch.user_frame() }
    }

    /// A system call with four arguments.
    pub(super) fn call(&self, nr: u64, args: [u64; 4]) -> Result<u64, Errno> {
        let frame = self.frame();
        frame.rax = nr;
        [frame.rdi, frame.rsi, frame.rdx, frame.r10] = args;
        self.0.syscall(frame);
        self.0.arch.user_boundary(frame);
        decode(frame.rax)
    }

    /// Maps `pages` of private memory.
    pub(super) fn map(&self, pages: u64) -> u64 {
        let flags = map::PRIVATE | map::ANONYMOUS;
        let bytes = pages * PAGE_SIZE;
        // The descriptor and offset are nobody's.
        let base = self.call(nr::MMAP, [0, bytes, prot::READ | prot::WRITE, flags]);
        base.expect("room for a mapping")
    }

    fn access(&self, nr: u64, gva: u64, value: u64) -> Result<u64, Errno> {
        loop {
            match self.call(nr, [gva, value, 0, 0]) {
                Err(Errno::EAGAIN) => {}
                Ok(_) => return Ok(self.frame().rdx),
                Err(errno) => return Err(errno),
            }
        }
    }

    pub(super) fn load(&self, gva: u64) -> Result<u64, Errno> {
        self.access(nr::TESTBED_LOAD, gva, 0)
    }

    pub(super) fn store(&self, gva: u64, value: u64) {
        let stored = self.access(nr::TESTBED_STORE, gva, value);
        assert!(stored.is_ok(), "store to {gva:#x}: {stored:?}");
    }

    /// Lets others run.
    pub(super) fn relax(&self) {
        let _ = self.call(nr::SCHED_YIELD, [0; 4]);
        let _ = self.call(nr::TESTBED_RELAX, [0; 4]);
    }

    /// A thread that runs program `number`.
    pub(super) fn thread(&self, number: u64) {
        let flags = clone::VM | clone::FS | clone::FILES | clone::SIGHAND | clone::THREAD;
        self.starts(flags | clone::SYSVSEM, number);
    }

    /// A forked child that runs program `number`.
    pub(super) fn child(&self, number: u64) {
        self.starts(signal::SIGCHLD, number);
    }

    fn starts(&self, flags: u64, number: u64) {
        let frame = self.frame();
        let kept = frame.r14;
        frame.r14 = number + FIRST;
        let made = self.call(nr::CLONE, [flags, 0, 0, 0]);
        self.frame().r14 = kept;
        made.expect("a task");
    }
}
