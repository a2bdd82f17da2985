//! Whole kernels on several CPUs: programs start, wait for each other, fork, fault and end.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use abi::boot::BootInfo;
use abi::channel::Doorbell;
use abi::layout::{PAGE_SIZE, USER_END};
use abi::objects::{SlabId, Task, TaskState, task_flags};
use abi::syscall::{Errno, clone, futex, map, nr, prot, signal, wait};
use proptest::prelude::*;

use super::machine::{MEMORY, Machine, Outcome, Program, User, run};
use crate::Kernel;
use crate::arch::Arch;
use crate::arch::model::testing;
use crate::mm::Field;
use crate::mm::tests::slab_frames;
use crate::task::create::STACK_BYTES;

pub(super) const THREAD: u64 =
    clone::VM | clone::FS | clone::FILES | clone::SIGHAND | clone::THREAD;
/// Where the programs have a mapping of a few pages.
pub(super) const WORDS: u64 = 0x1000_0000;
const WAIT: u64 = futex::WAIT | futex::PRIVATE_FLAG;
const WAKE: u64 = futex::WAKE | futex::PRIVATE_FLAG;

pub(super) fn program(body: impl Fn(&mut User<'_>) -> u64 + Send + Sync + 'static) -> Program {
    Box::new(body)
}

/// Runs `programs` (the first is the first process's) on `cpus` CPUs to the end and checks that
/// nothing but the first process's zombie is left.
pub(super) fn machine(cpus: usize, programs: Vec<Program>) -> Outcome {
    let info = boot_info(cpus);
    let machine = Machine::new(cpus, programs);
    let kernel = Kernel::boot(machine, &info).expect("bootable");
    let free_at_boot = kernel.root().free_frames.get();
    let (kernel, outcome) = run(kernel, |kernel| kernel.start_first_process(&info));
    check_end(&kernel, free_at_boot);
    outcome
}

/// Runs one program on one CPU.
pub(super) fn alone(body: impl Fn(&mut User<'_>) + Send + Sync + 'static) {
    let outcome = machine(
        1,
        vec![program(move |user| {
            map_words(user);
            body(user);
            5
        })],
    );
    assert_eq!(outcome.status, 5);
}

pub(super) fn boot_info(cpus: usize) -> BootInfo {
    boot_info_with(cpus, "")
}

pub(super) fn boot_info_with(cpus: usize, cmdline: &str) -> BootInfo {
    BootInfo {
        boot_pgd: 0x3000,
        free_start: 0x10_0000,
        ..testing::boot_info(MEMORY, cpus, cmdline)
    }
}

pub(super) fn check_end(kernel: &Arc<Kernel<Machine>>, free_at_boot: u64) {
    let root = kernel.root();
    let tasks: Vec<_> = kernel.tasks().map(|task| kernel.obj(task)).collect();
    // Threads of the kernel sleep, and keep their stacks.
    let of_kernel = |task: &&&Task| task.flags.get() & task_flags::KERNEL != 0;
    let threads = tasks.iter().filter(of_kernel).count() as u64;
    for task in &tasks {
        let (state, stack) = match of_kernel(&task) {
            true => (TaskState::Blocked, true),
            false => (TaskState::Zombie, false),
        };
        assert_eq!(task.state.get(), state as u32);
        assert_eq!(task.stack.get() != 0, stack);
        assert!(task.mm.get().is_null());
    }
    assert_eq!(
        root.slabs[SlabId::Task as usize].used.get(),
        tasks.len() as u64
    );
    for slab in [
        SlabId::File,
        SlabId::CacheNode,
        SlabId::OpenFile,
        SlabId::FileTable,
    ] {
        assert_eq!(root.slabs[slab as usize].used.get(), 0, "{slab:?}");
    }
    assert_eq!(root.online.get(), 0);
    assert!(root.futex_queue.get().is_null());
    assert!(root.mms.get().is_null(), "an mm was not let go");
    assert_eq!(
        root.free_frames.get() + slab_frames(kernel) + threads * (STACK_BYTES as u64 / PAGE_SIZE),
        free_at_boot,
        "frames leaked"
    );
    for cpu in &root.cpus {
        assert!(cpu.current.get().is_null() && cpu.queue.get().is_null());
        assert!(cpu.loaded_mm.get().is_null() && cpu.dead.get().is_null());
        assert_eq!(cpu.queued.get(), 0);
    }
}

pub(super) fn map_words(user: &mut User<'_>) {
    let flags = map::PRIVATE | map::ANONYMOUS | map::FIXED;
    let result = user.call(nr::MMAP, [WORDS, 0x4000, prot::READ | prot::WRITE, flags]);
    assert_eq!(result, Ok(WORDS));
}

/// Waits until the word at `gva` is zero: what CLONE_CHILD_CLEARTID tells.
pub(super) fn join(user: &mut User<'_>, gva: u64) {
    loop {
        let value = user.load(gva);
        if value == 0 {
            return;
        }
        // Not private: exit wakes as if another process might wait, as Linux's mm_release does.
        let result = user.call(nr::FUTEX, [gva, futex::WAIT, value.into(), 0]);
        assert!(matches!(result, Ok(0) | Err(Errno::EAGAIN)), "{result:?}");
    }
}

#[test]
fn the_exit_code_of_the_first_process_ends_the_machine() {
    for cpus in [1, 2, 4] {
        let outcome = machine(cpus, vec![program(|_| 42)]);
        assert_eq!(outcome.status, 42);
        assert_eq!(outcome.doorbells, [Doorbell::FirstUser]);
    }
}

#[test]
fn threads_join_by_their_cleared_tid() {
    const THREADS: u64 = 6;
    const ROUNDS: u32 = 20;
    let parent = |user: &mut User<'_>| {
        map_words(user);
        for i in 0..THREADS {
            // The kernel writes the number before the thread can clear it.
            let word = WORDS + 0x100 + 4 * i;
            let flags = THREAD | clone::PARENT_SETTID | clone::CHILD_CLEARTID;
            let tid = user.clone(flags, word, 1).expect("a thread");
            assert!(tid > 1);
        }
        for i in 0..THREADS {
            join(user, WORDS + 0x100 + 4 * i);
        }
        u64::from(user.load(WORDS))
    };
    let child = |user: &mut User<'_>| {
        for _ in 0..ROUNDS {
            user.add(WORDS, 1);
            assert_eq!(user.call(nr::SCHED_YIELD, [0; 4]), Ok(0));
        }
        0
    };
    for cpus in [1, 2, 4] {
        let outcome = machine(cpus, vec![program(parent), program(child)]);
        assert_eq!(u64::from(outcome.status), THREADS * u64::from(ROUNDS));
    }
}

#[test]
fn a_forked_child_has_its_own_memory_and_its_status_is_waited_for() {
    let parent = |user: &mut User<'_>| {
        map_words(user);
        user.store(WORDS, 7);
        let child = user.clone(signal::SIGCHLD, 0, 1).expect("a child");
        let status = WORDS + 0x1000;
        let wait = [u64::MAX, status, 0, 0];
        assert_eq!(user.call(nr::WAIT4, wait), Ok(child));
        assert_eq!(user.load(status), 9 << 8);
        assert_eq!(user.call(nr::WAIT4, wait), Err(Errno::ECHILD));
        u64::from(user.load(WORDS))
    };
    let child = |user: &mut User<'_>| {
        assert_eq!(user.call(nr::GETPID, [0; 4]), user.call(nr::GETTID, [0; 4]));
        let seen = user.load(WORDS);
        user.store(WORDS, 100);
        u64::from(seen) + 2
    };
    for cpus in [1, 2] {
        let outcome = machine(cpus, vec![program(parent), program(child)]);
        assert_eq!(outcome.status, 7);
    }
}

#[test]
fn a_wait_that_must_not_hang_does_not() {
    let parent = |user: &mut User<'_>| {
        map_words(user);
        let child = user.clone(signal::SIGCHLD, 0, 1).expect("a child");
        let poll = [child, 0, wait::WNOHANG, 0];
        assert_eq!(user.call(nr::WAIT4, poll), Ok(0));
        assert_eq!(user.call(nr::WAIT4, [child, 0, 0, 0]), Ok(child));
        assert_eq!(user.call(nr::WAIT4, poll), Err(Errno::ECHILD));
        assert_eq!(user.call(nr::WAIT4, [0, 0, 4, 0]), Err(Errno::EINVAL));
        0
    };
    // On one CPU the child cannot run before its parent waits.
    assert_eq!(machine(1, vec![program(parent), program(|_| 0)]).status, 0);
}

#[test]
fn a_mutex_of_futexes_keeps_its_promise_on_every_number_of_cpus() {
    const THREADS: u64 = 4;
    const ROUNDS: u32 = 40;
    const LOCK: u64 = WORDS;
    const COUNT: u64 = WORDS + 4;
    const DONE: u64 = WORDS + 8;
    // Every round is a look and a store, far enough apart to collide without the lock.
    let body = |user: &mut User<'_>| {
        for _ in 0..ROUNDS {
            while user.add(LOCK, 1) != 0 {
                let held = user.load(LOCK);
                if held != 0 {
                    let _ = user.call(nr::FUTEX, [LOCK, WAIT, held.into(), 0]);
                }
            }
            let count = user.load(COUNT);
            user.call(nr::SCHED_YIELD, [0; 4]).expect("a yield");
            user.store(COUNT, count + 1);
            user.store(LOCK, 0);
            user.call(nr::FUTEX, [LOCK, WAKE, 1, 0]).expect("a wake");
        }
        user.add(DONE, 1);
        user.call(nr::FUTEX, [DONE, WAKE, 1, 0]).expect("a wake");
        0
    };
    let parent = move |user: &mut User<'_>| {
        map_words(user);
        for _ in 0..THREADS {
            user.clone(THREAD, 0, 1).expect("a thread");
        }
        loop {
            let done = user.load(DONE);
            if u64::from(done) == THREADS {
                break;
            }
            let _ = user.call(nr::FUTEX, [DONE, WAIT, done.into(), 0]);
        }
        u64::from(user.load(COUNT))
    };
    for cpus in [1, 2, 3] {
        let outcome = machine(cpus, vec![program(parent), program(body)]);
        assert_eq!(u64::from(outcome.status), THREADS * u64::from(ROUNDS));
    }
}

/// A word in shared memory is one futex for all who map it, wherever they do; in private memory each has its own.
#[test]
fn processes_wake_each_other_in_shared_memory_only() {
    const SHARED: u64 = 2 * WORDS;
    const GO: u64 = SHARED;
    const ASLEEP: u64 = SHARED + 4;
    let parent = |user: &mut User<'_>| {
        map_words(user);
        let flags = map::SHARED | map::ANONYMOUS | map::FIXED;
        let access = prot::READ | prot::WRITE;
        let shared = user.call(nr::MMAP, [SHARED, 0x1000, access, flags]);
        assert_eq!(shared, Ok(SHARED));
        let child = user.clone(signal::SIGCHLD, 0, 1).expect("a child");
        while user.load(ASLEEP) == 0 {
            user.call(nr::SCHED_YIELD, [0; 4]).expect("a yield");
        }
        // Its own process's only, and it is asleep in another one: nobody.
        assert_eq!(user.call(nr::FUTEX, [GO, WAKE, 1, 0]), Ok(0));
        while user.call(nr::FUTEX, [GO, futex::WAKE, 1, 0]) == Ok(0) {
            user.call(nr::SCHED_YIELD, [0; 4]).expect("a yield");
        }
        assert_eq!(user.call(nr::WAIT4, [child, 0, 0, 0]), Ok(child));
        let unmapped = user.call(nr::FUTEX, [3 * WORDS, futex::WAKE, 1, 0]);
        assert_eq!(unmapped, Err(Errno::EFAULT));
        0
    };
    let child = |user: &mut User<'_>| {
        user.store(ASLEEP, 1);
        let slept = user.call(nr::FUTEX, [GO, futex::WAIT, 0, 0]);
        assert_eq!(slept, Ok(0));
        0
    };
    for cpus in [1, 2] {
        assert_eq!(
            machine(cpus, vec![program(parent), program(child)]).status,
            0
        );
    }
}

/// As on Linux, where the key of one carries FUT_OFF_MMSHARED: who says that a word is private, and who does not, wait for two
/// futexes.
#[test]
fn a_private_futex_and_a_shared_one_of_one_word_are_two() {
    const GO: u64 = WORDS;
    const ASLEEP: u64 = WORDS + 4;
    for (wait, other, same) in [(WAIT, futex::WAKE, WAKE), (futex::WAIT, WAKE, futex::WAKE)] {
        let parent = move |user: &mut User<'_>| {
            map_words(user);
            user.clone(THREAD, 0, 1).expect("a thread");
            while user.load(ASLEEP) != 1 {
                user.call(nr::SCHED_YIELD, [0; 4]).expect("a yield");
            }
            // On one CPU the thread sleeps by now.
            assert_eq!(user.call(nr::FUTEX, [GO, other, 1, 0]), Ok(0));
            assert_eq!(user.call(nr::FUTEX, [GO, same, 1, 0]), Ok(1));
            0
        };
        let thread = move |user: &mut User<'_>| {
            user.store(ASLEEP, 1);
            assert_eq!(user.call(nr::FUTEX, [GO, wait, 0, 0]), Ok(0));
            0
        };
        let programs = vec![program(parent), program(thread)];
        assert_eq!(machine(1, programs).status, 0);
    }
}

#[test]
fn exit_group_ends_threads_that_run_wait_and_are_ready() {
    const READY: u64 = WORDS;
    const NEVER: u64 = WORDS + 4;
    let parent = |user: &mut User<'_>| {
        map_words(user);
        for program in [1, 1, 2, 2] {
            user.clone(THREAD, 0, program).expect("a thread");
        }
        while user.load(READY) != 4 {
            user.call(nr::SCHED_YIELD, [0; 4]).expect("a yield");
        }
        user.call(nr::EXIT_GROUP, [77, 0, 0, 0]).expect("no return");
        0
    };
    let spins = |user: &mut User<'_>| {
        user.add(READY, 1);
        loop {
            user.call(nr::SCHED_YIELD, [0; 4]).expect("a yield");
        }
    };
    let sleeps = |user: &mut User<'_>| {
        user.add(READY, 1);
        user.call(nr::FUTEX, [NEVER, WAIT, 0, 0])
            .map_or(0, |_| panic!("woken"))
    };
    for cpus in [1, 2, 4] {
        let programs = vec![program(parent), program(spins), program(sleeps)];
        assert_eq!(machine(cpus, programs).status, 77);
    }
}

#[test]
fn a_thread_that_never_enters_the_kernel_is_ended_by_an_interrupt() {
    let parent = |user: &mut User<'_>| {
        map_words(user);
        user.clone(THREAD, 0, 1).expect("a thread");
        while user.load(WORDS) == 0 {
            std::thread::yield_now();
        }
        5
    };
    let spins = |user: &mut User<'_>| {
        user.store(WORDS, 1);
        loop {
            user.take_ipis();
            std::thread::yield_now();
        }
    };
    let parent = move |user: &mut User<'_>| {
        let code = parent(user);
        user.call(nr::EXIT_GROUP, [code, 0, 0, 0])
            .expect("no return")
    };
    let programs = vec![program(parent), program(spins)];
    assert_eq!(machine(2, programs).status, 5);
}

#[test]
fn a_fault_kills_the_process_and_says_where() {
    let outcome = machine(2, vec![program(|user| u64::from(user.load(0xdead_0000)))]);
    assert_eq!(outcome.status, 128 + 11);
    assert_eq!(
        outcome.console,
        "task 1 (process 1): SIGSEGV at rip 0x0, address 0xdead0000\n"
    );
}

#[test]
fn a_killed_child_shows_its_signal() {
    let parent = |user: &mut User<'_>| {
        map_words(user);
        let child = user.clone(signal::SIGCHLD, 0, 1).expect("a child");
        assert_eq!(user.call(nr::WAIT4, [child, WORDS, 0, 0]), Ok(child));
        u64::from(user.load(WORDS))
    };
    let child = |user: &mut User<'_>| {
        user.exception(6);
        0
    };
    let outcome = machine(2, vec![program(parent), program(child)]);
    assert_eq!(u64::from(outcome.status), signal::SIGILL);
    assert_eq!(
        outcome.console,
        "task 2 (process 2): SIGILL at rip 0x1, exception 6\n"
    );
}

#[test]
fn a_fixup_catches_exceptions_and_faults_of_its_process() {
    let body = |user: &mut User<'_>| {
        let set = [0, 1, 0x5000, 0];
        assert_eq!(user.call(nr::TESTBED_FAULT_FIXUP, set), Ok(0));
        user.exception(13);
        u64::from(user.rip() == 0x5000)
    };
    assert_eq!(machine(1, vec![program(body)]).status, 1);
}

#[test]
fn affinity_decides_where_a_task_runs() {
    let body = |user: &mut User<'_>| {
        map_words(user);
        for cpu in [2, 0, 1, 2, 1] {
            user.store(WORDS, 1 << cpu);
            user.store(WORDS + 4, 0);
            let set = [0, 8, WORDS, 0];
            assert_eq!(user.call(nr::SCHED_SETAFFINITY, set), Ok(0));
            user.call(nr::GETCPU, [WORDS + 8, WORDS + 12, 0, 0])
                .expect("a CPU");
            assert_eq!((user.load(WORDS + 8), user.load(WORDS + 12)), (cpu, 0));
            let get = [0, 128, WORDS + 16, 0];
            assert_eq!(user.call(nr::SCHED_GETAFFINITY, get), Ok(8));
            assert_eq!(user.load(WORDS + 16), 1 << cpu);
        }
        user.store(WORDS, 0);
        let nowhere = user.call(nr::SCHED_SETAFFINITY, [0, 8, WORDS, 0]);
        assert_eq!(nowhere, Err(Errno::EINVAL));
        let nobody = user.call(nr::SCHED_SETAFFINITY, [999, 8, WORDS, 0]);
        assert_eq!(nobody, Err(Errno::ESRCH));
        0
    };
    assert_eq!(machine(3, vec![program(body)]).status, 0);
}

#[test]
fn a_running_task_is_moved_off_a_cpu_that_it_is_denied() {
    const STAGE: u64 = WORDS;
    const HERE: u64 = WORDS + 4;
    const MASK: u64 = WORDS + 8;
    const THERE: u64 = WORDS + 16;
    let parent = |user: &mut User<'_>| {
        map_words(user);
        let tid = user.clone(THREAD, 0, 1).expect("a thread");
        // It runs elsewhere, since this task does not give up its CPU.
        while user.load(STAGE) == 0 {
            std::thread::yield_now();
        }
        user.call(nr::GETCPU, [HERE, 0, 0, 0]).expect("a CPU");
        let here = user.load(HERE);
        user.store(MASK, 1 << here);
        let set = [tid, 8, MASK, 0];
        assert_eq!(user.call(nr::SCHED_SETAFFINITY, set), Ok(0));
        while user.load(STAGE) != 2 {
            user.call(nr::SCHED_YIELD, [0; 4]).expect("a yield");
        }
        u64::from(user.load(THERE) == here)
    };
    let child = |user: &mut User<'_>| {
        let cpu = |user: &mut User<'_>| {
            user.call(nr::GETCPU, [THERE, 0, 0, 0]).expect("a CPU");
            user.load(THERE)
        };
        let first = cpu(user);
        user.store(STAGE, 1);
        while cpu(user) == first {
            user.take_ipis();
        }
        user.store(STAGE, 2);
        0
    };
    let programs = vec![program(parent), program(child)];
    assert_eq!(machine(2, programs).status, 1);
}

#[test]
fn bad_pointers_are_refused_and_kill_nobody() {
    const KERNEL: u64 = 0xffff_8880_0000_0000;
    let body = |user: &mut User<'_>| {
        map_words(user);
        for bad in [KERNEL, u64::MAX - 3, 0x7fff_ffff_effc, 0xdead_0000] {
            let efault = Err(Errno::EFAULT);
            assert_eq!(user.call(nr::WRITE, [1, bad, 8, 0]), efault, "{bad:#x}");
            assert_eq!(user.call(nr::FUTEX, [bad, WAIT, 0, 0]), efault);
            assert_eq!(user.call(nr::GETCPU, [bad, 0, 0, 0]), efault);
            assert_eq!(user.call(nr::SCHED_SETAFFINITY, [0, 8, bad, 0]), efault);
        }
        assert_eq!(
            user.call(nr::FUTEX, [WORDS + 1, WAIT, 0, 0]),
            Err(Errno::EINVAL)
        );
        assert_eq!(user.call(nr::WRITE, [3, WORDS, 1, 0]), Err(Errno::EBADF));
        assert_eq!(user.call(500, [0; 4]), Err(Errno::ENOSYS));
        0
    };
    assert_eq!(machine(1, vec![program(body)]).status, 0);
}

#[test]
fn the_kernel_reads_and_writes_for_a_program_what_the_program_may() {
    let body = |user: &mut User<'_>| {
        map_words(user);
        let word = WORDS + 0x1000;
        user.store(word, u32::from_le_bytes(*b"abc\n"));
        let efault = Err(Errno::EFAULT);
        // From the page before, which is readable throughout.
        let across = [1, word - 2, 4, 0];
        for (access, reads, writes) in [
            (prot::NONE, efault, efault),
            (prot::READ, Ok(4), efault),
            (prot::EXEC, Ok(4), efault),
            (prot::NONE, efault, efault),
            (prot::READ | prot::WRITE, Ok(4), Ok(0)),
        ] {
            let protect = user.call(nr::MPROTECT, [word, 0x1000, access, 0]);
            assert_eq!(protect, Ok(0));
            assert_eq!(user.call(nr::WRITE, [1, word, 4, 0]), reads, "{access}");
            assert_eq!(user.call(nr::WRITE, across), reads, "{access}");
            let getcpu = user.call(nr::GETCPU, [word + 8, 0, 0, 0]);
            assert_eq!(getcpu, writes, "{access}");
        }
        assert_eq!(user.load(word), u32::from_le_bytes(*b"abc\n"));
        // A page that was never touched.
        let fresh = WORDS + 0x2000;
        assert_eq!(user.call(nr::GETCPU, [fresh, 0, 0, 0]), Ok(0));
        // Up to the last byte of user space, and not one further, nor around the end.
        for (gva, len) in [(0x7fff_ffff_f000, 1), (u64::MAX, 2), (USER_END - 4, 5)] {
            assert_eq!(user.call(nr::WRITE, [1, gva, len, 0]), efault, "{gva:#x}");
        }
        0
    };
    let outcome = machine(1, vec![program(body)]);
    assert_eq!(outcome.status, 0);
    assert_eq!(outcome.console, "abc\n\0\0ab".repeat(3));
}

#[test]
fn a_copy_that_writes_does_not_write_into_what_a_child_shares() {
    let parent = |user: &mut User<'_>| {
        map_words(user);
        user.store(WORDS, 7);
        user.clone(signal::SIGCHLD, 0, 1).expect("a child");
        assert_eq!(user.call(nr::GETCPU, [WORDS, 0, 0, 0]), Ok(0));
        let status = WORDS + 8;
        assert!(user.call(nr::WAIT4, [u64::MAX, status, 0, 0]).is_ok());
        assert_eq!((user.load(WORDS), user.load(status)), (0, 7 << 8));
        0
    };
    let child = |user: &mut User<'_>| user.load(WORDS).into();
    let outcome = machine(1, vec![program(parent), program(child)]);
    assert_eq!(outcome.status, 0);
}

#[test]
fn write_goes_to_the_console_in_full() {
    let body = |user: &mut User<'_>| {
        map_words(user);
        for i in 0..100 {
            user.store(WORDS + 4 * i, u32::from_le_bytes(*b"abc\n"));
        }
        assert_eq!(user.call(nr::WRITE, [2, WORDS, 400, 0]), Ok(400));
        0
    };
    assert_eq!(machine(1, vec![program(body)]).console, "abc\n".repeat(100));
}

#[test]
fn orphans_outlive_the_first_process_and_its_status_stays_the_machines() {
    let first = |user: &mut User<'_>| {
        user.clone(signal::SIGCHLD, 0, 1).expect("a child");
        3
    };
    let child = |user: &mut User<'_>| {
        for _ in 0..50 {
            user.call(nr::SCHED_YIELD, [0; 4]).expect("a yield");
        }
        1
    };
    for cpus in [1, 2] {
        let outcome = machine(cpus, vec![program(first), program(child)]);
        assert_eq!(outcome.status, 3);
    }
}

#[test]
fn a_report_reaches_the_host() {
    let body = |user: &mut User<'_>| {
        assert_eq!(user.call(nr::TESTBED_REPORT, [2, 0x5000, 7, 8]), Ok(0));
        let report = &user.kernel.arch.channel().report;
        assert_eq!(report.gva.get(), 0x5000);
        assert_eq!(report.task.get(), 1);
        assert_eq!(
            user.call(nr::TESTBED_REPORT, [99, 0, 0, 0]),
            Err(Errno::EINVAL)
        );
        assert_eq!(
            user.call(nr::TESTBED_CRASH, [99, 0, 0, 0]),
            Err(Errno::EINVAL)
        );
        user.call(nr::TESTBED_NR_CPUS, [0; 4]).unwrap_or(0)
    };
    let outcome = machine(1, vec![program(body)]);
    assert_eq!(outcome.status, 1);
    assert_eq!(outcome.doorbells, [Doorbell::FirstUser, Doorbell::Report]);
}

/// What a thread of the storm does before it ends or is ended.
#[derive(Clone, Copy, Debug)]
enum Act {
    Yield,
    Move { affinity: u32 },
    Sleep { word: u64 },
    Wake { word: u64 },
    Thread,
    Fork,
    Reap,
    Fault,
    Exit,
    ExitGroup,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => Just(Act::Yield),
        2 => (1u32..16).prop_map(|affinity| Act::Move { affinity }),
        2 => (0..3u64).prop_map(|word| Act::Sleep { word: WORDS + 0x800 + 4 * word }),
        2 => (0..3u64).prop_map(|word| Act::Wake { word: WORDS + 0x800 + 4 * word }),
        3 => Just(Act::Thread),
        2 => Just(Act::Fork),
        1 => Just(Act::Reap),
        1 => Just(Act::Fault),
        1 => Just(Act::Exit),
        1 => Just(Act::ExitGroup),
    ]
}

/// Tasks that a storm starts beyond its first [`FIRST_CHILDREN`].
const MOST_BIRTHS: usize = 20;
const FIRST_CHILDREN: u64 = 3;

/// Each task of the storm plays its own part of `acts`. A process always ends, because its leader
/// never sleeps and ends the others; the first process waits for all.
fn storm(acts: Vec<Act>) -> Vec<Program> {
    let started = AtomicUsize::new(0);
    let births = AtomicUsize::new(0);
    let part = move |user: &mut User<'_>| {
        let number = started.fetch_add(1, Relaxed);
        let own_word = WORDS + 0x1000 + 8 * number as u64;
        let leads = user.call(nr::GETPID, [0; 4]) == user.call(nr::GETTID, [0; 4]);
        let may_start = || births.fetch_add(1, Relaxed) < MOST_BIRTHS;
        for act in acts.iter().cycle().skip(number * 5).take(8) {
            let call = match *act {
                Act::Move { affinity } => {
                    user.store(own_word, affinity);
                    (nr::SCHED_SETAFFINITY, [0, 8, own_word, 0])
                }
                Act::Sleep { word } if !leads => (nr::FUTEX, [word, WAIT, 0, 0]),
                Act::Wake { word } => (nr::FUTEX, [word, WAKE, 2, 0]),
                Act::Thread if may_start() => {
                    let flags = THREAD | clone::CHILD_CLEARTID | clone::CHILD_SETTID;
                    let _ = user.clone(flags, own_word, 1);
                    continue;
                }
                Act::Fork if may_start() => {
                    let _ = user.clone(signal::SIGCHLD, 0, 1);
                    continue;
                }
                Act::Reap => (nr::WAIT4, [u64::MAX, 0, wait::WNOHANG, 0]),
                Act::Fault => {
                    user.load(0xdead_0000);
                    unreachable!("the load kills");
                }
                Act::Exit if !leads => return 1,
                Act::ExitGroup => (nr::EXIT_GROUP, [2, 0, 0, 0]),
                _ => (nr::SCHED_YIELD, [0; 4]),
            };
            let _ = user.call(call.0, call.1);
        }
        let _ = user.call(nr::EXIT_GROUP, [3, 0, 0, 0]);
        unreachable!("exit_group does not return");
    };
    let first = |user: &mut User<'_>| {
        map_words(user);
        for _ in 0..FIRST_CHILDREN {
            user.clone(signal::SIGCHLD, 0, 1).expect("a child");
        }
        let mut ended = 0;
        while user.call(nr::WAIT4, [u64::MAX, 0, 0, 0]).is_ok() {
            ended += 1;
        }
        ended
    };
    vec![program(first), program(part)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_storm_of_tasks_ends_and_leaves_nothing_behind(
        acts in prop::collection::vec(act(), 7..60),
        cpus in 1usize..=4,
    ) {
        let outcome = machine(cpus, storm(acts));
        let children = u64::from(outcome.status);
        let most = FIRST_CHILDREN + MOST_BIRTHS as u64;
        prop_assert!((FIRST_CHILDREN..=most).contains(&children), "{} children", children);
    }
}
