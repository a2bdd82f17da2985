//! The executor of programs on the model: [`Sys`] by calls of the kernel in this process.
//!
//! It makes the calls that `guest::rt` makes at CPL 3, in the same order, so that both engines see the
//! same. What a program keeps in Rust variables is this process's memory: a forked child shares it, and
//! must only read what does not change. What the kernel is given by address lies in guest memory, at
//! the top of the thread's wired stack.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

use abi::channel::ReportKind;
use abi::layout::{PAGE_SIZE, USER_ARGS_GVA, USER_STACK_TOP};
use abi::objects::UserFrame;
use abi::oracle::Area;
use abi::syscall::{Errno, clone, decode, futex, nr, prot};
use guest::sys::{Fault, STACK_BYTES, Sys, Thread, WaitStatus};
use guest_kernel::Kernel;
use guest_kernel::arch::model::Model;
use zerocopy::IntoBytes;

/// Bytes of a thread's control block in guest memory; as in `guest::rt`.
const CONTROL_BYTES: u64 = 64;
/// Where, below a task's first stack pointer, the words that calls take lie.
const SCRATCH: u64 = 512;
/// Where, below that, the page for VMAs lies.
const AREAS: u64 = 2 * PAGE_SIZE;
/// Words of the first process's stack that stand for futex words of programs.
const FUTEXES: u64 = USER_STACK_TOP - 2 * PAGE_SIZE;

/// Kinds of new tasks, in r14 of their first frame.
const THREAD: u64 = 1;
const CHILD: u64 = 2;

type Child = Box<dyn FnOnce(&ModelSys) -> i32>;

thread_local! {
    /// What forked children will run, by number less one.
    static CHILDREN: RefCell<Vec<Option<Child>>> = const { RefCell::new(Vec::new()) };
}

/// Drops what children that never ran would have run.
pub(super) fn forget_children() {
    CHILDREN.with_borrow_mut(Vec::clear);
}

/// CPL 3 of a task, from its first instruction on.
pub(super) fn program(kernel: &'static Kernel<Model>) {
    let sys = ModelSys(kernel);
    let frame = sys.frame();
    let status = match frame.r14 {
        THREAD => {
            // SAFETY: `spawn` put the address of an entry function there.
            let entry: fn(&ModelSys, u64) =
                unsafe { std::mem::transmute::<usize, fn(&ModelSys, u64)>(frame.r12 as usize) };
            entry(&sys, frame.r13);
            let _ = sys.syscall(nr::EXIT, [0; 6]);
            unreachable!("exit returns");
        }
        CHILD => {
            let child = CHILDREN.with_borrow_mut(|all| all[frame.r13 as usize].take());
            child.expect("a child runs once")(&sys)
        }
        _ => first(&sys),
    };
    sys.exit(status)
}

/// The first process, as `guest`'s `user_main` does it.
fn first(sys: &ModelSys) -> i32 {
    let frame = sys.frame();
    let len = frame.rsi;
    let data = (frame.rdx != 0).then_some((frame.rdx, frame.r8));
    let _ = sys.syscall(nr::TESTBED_FAULT_FIXUP, [0; 6]);
    let _ = sys.syscall(nr::TESTBED_NR_CPUS, [0; 6]);
    let _ = sys.syscall(nr::TESTBED_TLB, [0; 6]);
    let place = sys.0.arch.private(USER_ARGS_GVA);
    assert!(!place.is_null() && len <= PAGE_SIZE, "no argument page");
    // SAFETY: at most one frame of guest memory, mapped read-only: nobody writes it again. Borrowed, not
    // copied: a program's frames are abandoned, not unwound.
    let args = unsafe { std::slice::from_raw_parts(place, len as usize) };
    let args = std::str::from_utf8(args).unwrap_or("");
    let (name, args) = args.split_once('\0').unwrap_or((args, ""));
    let data = data.map(|(gva, len)| {
        let place = sys.0.arch.private(gva);
        assert!(!place.is_null(), "no data");
        // SAFETY: the loader has put it into frames that follow each other, and it is mapped read-only.
        unsafe { std::slice::from_raw_parts(place, len as usize) }
    });
    match guest::run(sys, name, args, data) {
        Ok(status) => status,
        Err(error) => {
            guest::sys::print_line(sys, format_args!("{error}"));
            2
        }
    }
}

/// The executor.
#[derive(Clone, Copy)]
pub(super) struct ModelSys(&'static Kernel<Model>);

impl ModelSys {
    #[allow(clippy::mut_from_ref)] // the running context has one frame, and no call keeps it
    fn frame(&self) -> &mut UserFrame {
        // SAFETY: the frame of the running context, which lies on its own stack below this call and is
        // used by nobody else while its program runs.
        unsafe { &mut *self.0.arch.user_frame() }
    }

    /// The call; rax and rdx afterwards.
    fn call(&self, nr: u64, args: [u64; 6]) -> (u64, u64) {
        let frame = self.frame();
        frame.rax = nr;
        [
            frame.rdi, frame.rsi, frame.rdx, frame.r10, frame.r8, frame.r9,
        ] = args;
        self.0.syscall(frame);
        self.0.arch.user_boundary(frame);
        (frame.rax, frame.rdx)
    }

    fn access(&self, nr: u64, gva: u64, value: u64) -> Result<u64, Fault> {
        loop {
            let (status, loaded) = self.call(nr, [gva, value, 0, 0, 0, 0]);
            match decode(status) {
                Ok(_) => return Ok(loaded),
                Err(Errno::EAGAIN) => {}
                Err(errno) => return Err(Fault::new(gva, errno)),
            }
        }
    }

    /// The calling task's words for calls that take an address.
    fn scratch(&self) -> u64 {
        self.frame().rsp - SCRATCH
    }

    /// Copies from the program's own memory.
    fn peek(&self, gva: u64, to: &mut [u8]) {
        let mut gva = gva;
        let mut to = to;
        while !to.is_empty() {
            let place = self.0.arch.private(gva);
            assert!(!place.is_null(), "own memory at {gva:#x} is not mapped");
            let part = to.len().min((PAGE_SIZE - gva % PAGE_SIZE) as usize);
            let (now, later) = to.split_at_mut(part);
            // SAFETY: bytes of one frame of guest memory, and of a buffer of this process.
            unsafe { place.copy_to_nonoverlapping(now.as_mut_ptr(), part) };
            gva += part as u64;
            to = later;
        }
    }
    /// Copies to the program's own memory.
    fn poke(&self, gva: u64, from: &[u8]) {
        for (i, byte) in from.iter().enumerate() {
            let place = self.0.arch.private(gva + i as u64);
            assert!(!place.is_null(), "own memory at {gva:#x} is not mapped");
            // SAFETY: a byte of guest memory.
            unsafe { place.write_volatile(*byte) };
        }
    }
    fn peek_word(&self, gva: u64) -> u32 {
        let mut bytes = [0; 4];
        self.peek(gva, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// The guest address that stands for a program's futex word, with the word's value put there: whoever
    /// changes the word wakes afterwards, and puts the new value there first.
    fn futex_word(&self, word: &AtomicU64) -> u64 {
        let place = std::ptr::from_ref(word).addr() as u64 / 8 % (PAGE_SIZE / 8);
        let gva = FUTEXES + place * 8;
        self.poke(gva, &word.load(Ordering::SeqCst).to_le_bytes());
        gva
    }

    fn exit(&self, status: i32) -> ! {
        let status = u64::from(status.cast_unsigned());
        let _ = self.syscall(nr::EXIT_GROUP, [status, 0, 0, 0, 0, 0]);
        unreachable!("exit_group returns");
    }
}

impl Sys for ModelSys {
    fn syscall(&self, nr: u64, args: [u64; 6]) -> Result<u64, Errno> {
        decode(self.call(nr, args).0)
    }

    fn read(&self, gva: u64) -> Result<u64, Fault> {
        self.access(nr::TESTBED_LOAD, gva, 0)
    }
    fn write(&self, gva: u64, value: u64) -> Result<(), Fault> {
        self.access(nr::TESTBED_STORE, gva, value).map(|_| ())
    }
    fn relax(&self) {
        let _ = self.syscall(nr::TESTBED_RELAX, [0; 6]);
    }

    fn spawn(&self, entry: fn(&Self, u64), arg: u64) -> Result<Thread, Errno> {
        let base = self.mmap_anonymous(PAGE_SIZE + STACK_BYTES)?;
        self.mprotect(base, PAGE_SIZE, prot::NONE)?;
        self.wire(base + PAGE_SIZE, STACK_BYTES);
        let top = base + PAGE_SIZE + STACK_BYTES - CONTROL_BYTES;
        self.poke(top, &1u32.to_le_bytes());
        let flags = clone::VM
            | clone::FS
            | clone::FILES
            | clone::SIGHAND
            | clone::THREAD
            | clone::SYSVSEM
            | clone::CHILD_CLEARTID;
        let frame = self.frame();
        let kept = (frame.r12, frame.r13, frame.r14);
        (frame.r12, frame.r13, frame.r14) = (entry as usize as u64, arg, THREAD);
        let result = self.syscall(nr::CLONE, [flags, top, 0, top, 0, 0]);
        let frame = self.frame();
        (frame.r12, frame.r13, frame.r14) = kept;
        match result {
            Ok(_) => Ok(Thread(base)),
            Err(errno) => {
                self.munmap(base, PAGE_SIZE + STACK_BYTES)?;
                Err(errno)
            }
        }
    }

    fn join(&self, thread: Thread) {
        let alive = thread.0 + PAGE_SIZE + STACK_BYTES - CONTROL_BYTES;
        loop {
            let value = self.peek_word(alive);
            if value == 0 {
                break;
            }
            let _ = self.syscall(nr::FUTEX, [alive, futex::WAIT, value.into(), 0, 0, 0]);
        }
        let _ = self.munmap(thread.0, PAGE_SIZE + STACK_BYTES);
    }

    fn fork(&self, child: impl FnOnce(&Self) -> i32) -> Result<u64, Errno> {
        let child: Box<dyn FnOnce(&Self) -> i32 + '_> = Box::new(child);
        // SAFETY: only the lifetime changes. What the child borrows lies on stacks of contexts that are
        // kept until the machine is reset, which drops the children first; a program waits for its
        // child before it leaves the frame that the child borrows from (the rule of `Sys::fork` on
        // executors that share memory).
        let child: Child = unsafe { std::mem::transmute(child) };
        let number = CHILDREN.with_borrow_mut(|all| {
            all.push(Some(child));
            all.len() - 1
        });
        let frame = self.frame();
        let kept = (frame.r13, frame.r14);
        (frame.r13, frame.r14) = (number as u64, CHILD);
        let result = self.syscall(nr::FORK, [0; 6]);
        let frame = self.frame();
        (frame.r13, frame.r14) = kept;
        result
    }

    fn words(&self, count: usize) -> Result<&'static [AtomicU64], Errno> {
        let bytes = (count.max(1) * 8) as u64;
        if bytes > PAGE_SIZE {
            // Frames of a larger mapping need not be neighbours.
            return Err(Errno::ENOMEM);
        }
        let base = self.mmap_anonymous(bytes)?;
        self.wire(base, bytes);
        let place = self.0.arch.private(base).cast::<AtomicU64>();
        assert!(!place.is_null(), "wired memory is mapped");
        // SAFETY: a whole frame of guest memory, which stays the machine's; accessed atomically.
        Ok(unsafe { std::slice::from_raw_parts(place, count) })
    }

    fn maps(&self, start: u64, end: u64, areas: &mut [Area]) -> Result<usize, Errno> {
        // Below the stack pointer, which is a coroutine's elsewhere: nobody uses it.
        let place = (self.scratch() - AREAS) & !(PAGE_SIZE - 1);
        let room = areas.len().min(PAGE_SIZE as usize / size_of::<Area>());
        let args = [start, end, place, room as u64, 0, 0];
        let found = self.syscall(nr::TESTBED_MAPS, args)? as usize;
        self.peek(place, areas[..found].as_mut_bytes());
        Ok(found)
    }

    fn nr_cpus(&self) -> usize {
        guest_kernel::arch::Arch::nr_cpus(&self.0.arch)
    }
    fn set_affinity(&self, cpu: usize) -> Result<(), Errno> {
        let mask = self.scratch();
        self.poke(mask, &(1u64 << cpu).to_le_bytes());
        self.syscall(nr::SCHED_SETAFFINITY, [0, 8, mask, 0, 0, 0])
            .map(|_| ())
    }
    fn current_cpu(&self) -> Result<usize, Errno> {
        let word = self.scratch();
        self.syscall(nr::GETCPU, [word, 0, 0, 0, 0, 0])?;
        Ok(self.peek_word(word) as usize)
    }

    fn print(&self, text: &[u8]) {
        let place = self.scratch() - 256;
        let text = &text[..text.len().min(256)];
        self.poke(place, text);
        let _ = self.syscall(nr::WRITE, [1, place, text.len() as u64, 0, 0, 0]);
    }
    fn report(&self, kind: ReportKind, gva: u64, expected: u64, found: u64) {
        let _ = self.syscall(
            nr::TESTBED_REPORT,
            [kind as u64, gva, expected, found, 0, 0],
        );
    }

    fn lend<T>(&self, words: &[AtomicU64], f: impl FnOnce(u64) -> T) -> T {
        let place = self.scratch();
        let at = |index: usize| place + index as u64 * 8;
        for (index, word) in words.iter().enumerate() {
            self.poke(at(index), &word.load(Ordering::SeqCst).to_le_bytes());
        }
        let result = f(place);
        for (index, word) in words.iter().enumerate() {
            let mut bytes = [0; 8];
            self.peek(at(index), &mut bytes);
            word.store(u64::from_le_bytes(bytes), Ordering::SeqCst);
        }
        result
    }
    fn wait(&self, pid: u64) -> Result<WaitStatus, Errno> {
        let status = self.scratch();
        loop {
            match self.syscall(nr::WAIT4, [pid, status, 0, 0, 0, 0]) {
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
                Ok(_) => return Ok(WaitStatus(self.peek_word(status))),
            }
        }
    }
    fn futex_wait(&self, word: &AtomicU64, value: u32) {
        let place = self.futex_word(word);
        let op = futex::WAIT | futex::PRIVATE_FLAG;
        let _ = self.syscall(nr::FUTEX, [place, op, value.into(), 0, 0, 0]);
    }
    fn futex_wake(&self, word: &AtomicU64) {
        let place = self.futex_word(word);
        let op = futex::WAKE | futex::PRIVATE_FLAG;
        let everyone = i32::MAX as u64;
        let _ = self.syscall(nr::FUTEX, [place, op, everyone, 0, 0, 0]);
    }
}
