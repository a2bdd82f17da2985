//! A storm on the memory of one process: threads on all CPUs map, unmap, protect, drop, fork and touch it
//! at once. Each knows what its own pages must hold; pages that all share are anybody's. Between rounds
//! everybody waits at CPL 3 and the whole state of the MM stack is audited.
//!
//! CPUs keep translations until they are flushed, so a frame that is freed without a shootdown is read and
//! written by whoever had it.

use std::panic::catch_unwind;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};

use abi::layout::PAGE_SIZE;
use abi::objects::FrameKind;
use abi::param::Config;
use abi::syscall::{Errno, advice, clone, map, nr, prot, signal, wait};
use proptest::prelude::*;

use super::life::{THREAD, WORDS, boot_info_with, check_end, join, map_words, program};
use super::machine::{Machine, Program, User, run};
use crate::Kernel;
use crate::arch::Arch;
use crate::mm::Field;
use crate::mm::tests::audit_memory;

const RW: u64 = prot::READ | prot::WRITE;
const FIXED: u64 = map::PRIVATE | map::ANONYMOUS | map::FIXED;
/// Pages of each thread's own, in one table of leaf entries, side by side so that VMAs merge.
const OWN: u64 = 0x2000_0000;
const OWN_PAGES: u64 = 12;
/// Pages that all change, across a boundary between two tables.
const SHARED: u64 = 0x2fff_8000;
const SHARED_PAGES: u64 = 16;
const MAX_CPUS: usize = 4;
/// Where faults that nothing can resolve continue.
const FIXUP: u64 = 0x5000;
const CHILD: u64 = 2;
const CHILD_STATUS: u64 = 7;

/// What a thread knows of one of its pages: its value and access, or nothing where it is not mapped.
type Page = Option<(u32, u64)>;

struct Storm {
    cpus: usize,
    rounds: u64,
    acts: u64,
    seed: u64,
    started: AtomicU64,
    arrived: AtomicU64,
    /// By CPU: what the child that is forked there must find.
    inherited: [Mutex<[Page; OWN_PAGES as usize]>; MAX_CPUS],
}

/// One thread, or one forked child, at CPL 3.
struct Member<'s, 'u, 'k> {
    storm: &'s Storm,
    user: &'u mut User<'k>,
    cpu: usize,
    random: u64,
    pages: [Page; OWN_PAGES as usize],
}

impl Member<'_, '_, '_> {
    /// A number below `limit` (xorshift64*).
    fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }

    fn own(&self, page: u64) -> u64 {
        OWN + (self.cpu as u64 * OWN_PAGES + page) * PAGE_SIZE
    }

    /// A range of pages: its first and how many.
    fn range(&mut self, pages: u64) -> (u64, u64) {
        let first = self.below(pages);
        let most = (pages - first).min(5);
        (first, 1 + self.below(most))
    }

    fn access(&mut self) -> u64 {
        [prot::NONE, prot::READ, RW, RW][self.below(4) as usize]
    }

    fn act(&mut self) {
        match self.below(16) {
            0..8 => self.act_on_own(),
            8..15 => self.act_on_shared(),
            _ => self.fork(),
        }
    }

    fn act_on_own(&mut self) {
        let (first, count) = self.range(OWN_PAGES);
        let (gva, bytes) = (self.own(first), count * PAGE_SIZE);
        let range = first as usize..(first + count) as usize;
        let mapped = self.pages[range.clone()].iter().all(Option::is_some);
        match self.below(8) {
            0 | 1 => {
                let mapped = self.user.call(nr::MMAP, [gva, bytes, RW, FIXED]);
                assert_eq!(mapped, Ok(gva));
                self.pages[range].fill(Some((0, RW)));
            }
            2 => {
                assert_eq!(self.user.call(nr::MUNMAP, [gva, bytes, 0, 0]), Ok(0));
                self.pages[range].fill(None);
            }
            3 if mapped => {
                let access = self.access();
                let protect = self.user.call(nr::MPROTECT, [gva, bytes, access, 0]);
                assert_eq!(protect, Ok(0));
                for page in self.pages[range].iter_mut().flatten() {
                    page.1 = access;
                }
            }
            4 if mapped => {
                let drop = [gva, bytes, advice::DONTNEED, 0];
                assert_eq!(self.user.call(nr::MADVISE, drop), Ok(0));
                for page in self.pages[range].iter_mut().flatten() {
                    page.0 = 0;
                }
            }
            _ => {
                self.write_own(first);
                self.check_own(first);
            }
        }
    }

    fn write_own(&mut self, page: u64) {
        let (gva, value) = (self.own(page), self.below(u64::from(u32::MAX)) as u32);
        let done = self.user.try_store(gva, value).is_some();
        let known = &mut self.pages[page as usize];
        let may = known.is_some_and(|(_, access)| access & prot::WRITE != 0);
        assert_eq!(done, may, "write to {gva:#x}, {known:x?}");
        if let Some((old, _)) = known.as_mut().filter(|_| done) {
            *old = value;
        }
    }

    fn check_own(&mut self, page: u64) {
        let known = self.pages[page as usize].filter(|(_, access)| access & prot::READ != 0);
        let gva = self.own(page);
        let found = self.user.try_load(gva);
        assert_eq!(found, known.map(|(value, _)| value), "read of {gva:#x}");
    }

    fn act_on_shared(&mut self) {
        let (first, count) = self.range(SHARED_PAGES);
        let (gva, bytes) = (SHARED + first * PAGE_SIZE, count * PAGE_SIZE);
        // The others may have unmapped any of it.
        let done = match self.below(10) {
            0 | 1 => self.user.call(nr::MMAP, [gva, bytes, RW, FIXED]).map(|_| 0),
            2 => self.user.call(nr::MUNMAP, [gva, bytes, 0, 0]),
            3 => {
                let access = self.access();
                self.user.call(nr::MPROTECT, [gva, bytes, access, 0])
            }
            4 => {
                let drop = [gva, bytes, advice::DONTNEED, 0];
                self.user.call(nr::MADVISE, drop)
            }
            5 => self.user.call(nr::GETCPU, [gva, 0, 0, 0]),
            6 | 7 => {
                for page in 0..SHARED_PAGES {
                    let gva = SHARED + page * PAGE_SIZE;
                    let found = self.user.try_load(gva);
                    // Zeroes, or a CPU's number: anything else is somebody else's, or poison.
                    let theirs = found.is_none_or(|word| word < MAX_CPUS as u32);
                    assert!(theirs, "{gva:#x} holds {found:x?}");
                }
                Ok(0)
            }
            _ => {
                let _ = self.user.try_store(gva, 1);
                Ok(0)
            }
        };
        let expected = [Ok(0), Err(Errno::ENOMEM), Err(Errno::EFAULT)];
        assert!(expected.contains(&done), "{done:?}");
    }

    fn fork(&mut self) {
        *self.storm.inherited[self.cpu].lock().unwrap() = self.pages;
        let child = self.user.clone(signal::SIGCHLD, 0, CHILD).expect("a child");
        self.write_own(0);
        let status = WORDS + 0x400 + 8 * self.cpu as u64;
        let waited = self.user.call(nr::WAIT4, [child, status, 0, 0]);
        assert_eq!(waited, Ok(child));
        let exited = wait::exited(CHILD_STATUS);
        assert_eq!(self.user.load(status), exited);
        (0..OWN_PAGES).for_each(|page| self.check_own(page));
    }

    /// Waits at CPL 3 until all members are here.
    fn meet(&mut self) {
        let cpus = self.storm.cpus as u64;
        let arrived = &self.storm.arrived;
        let all = (arrived.fetch_add(1, SeqCst) / cpus + 1) * cpus;
        while arrived.load(SeqCst) < all {
            self.user.take_ipis();
            std::thread::yield_now();
        }
    }
}

/// What each thread does.
fn member(storm: &Storm, user: &mut User<'_>) -> u64 {
    let cpu = storm.started.fetch_add(1, SeqCst) as usize;
    let mask = WORDS + 0x800 + 8 * cpu as u64;
    user.store(mask, 1 << cpu);
    assert_eq!(user.call(nr::SCHED_SETAFFINITY, [0, 8, mask, 0]), Ok(0));
    let mut member = Member {
        storm,
        user,
        cpu,
        random: storm.seed ^ (cpu as u64 + 1) << 32 | 1,
        pages: [None; OWN_PAGES as usize],
    };
    for _ in 0..storm.rounds {
        member.meet();
        (0..storm.acts).for_each(|_| member.act());
        (0..OWN_PAGES).for_each(|page| member.check_own(page));
        member.meet();
        // Without kswapd, or while it rests; nobody else is in the kernel.
        let kswapd = member.user.kernel.root().kswapd.task.get().some();
        if cpu == 0 && kswapd.is_none_or(|task| member.user.kernel.has_no_work(task)) {
            audit_memory(member.user.kernel);
        }
    }
    member.meet();
    0
}

fn child(storm: &Storm, user: &mut User<'_>) -> u64 {
    let cpu = user.kernel.arch.cpu();
    let pages = *storm.inherited[cpu].lock().unwrap();
    let mut member = Member {
        storm,
        user,
        cpu,
        random: storm.seed | 1,
        pages,
    };
    (0..OWN_PAGES).for_each(|page| member.check_own(page));
    (0..OWN_PAGES).for_each(|page| member.write_own(page));
    (0..8).for_each(|_| member.act_on_shared());
    (0..OWN_PAGES).for_each(|page| member.check_own(page));
    CHILD_STATUS
}

fn programs(storm: Storm) -> Vec<Program> {
    let storm = Arc::new(storm);
    let [first, others, children] = [storm.clone(), storm.clone(), storm];
    let first = move |user: &mut User<'_>| {
        map_words(user);
        let fixup = [0, CHILD + 1, FIXUP, 0];
        assert_eq!(user.call(nr::TESTBED_FAULT_FIXUP, fixup), Ok(0));
        let tid = |cpu: usize| WORDS + 8 * cpu as u64;
        for cpu in 1..first.cpus {
            let flags = THREAD | clone::CHILD_CLEARTID | clone::PARENT_SETTID;
            user.clone(flags, tid(cpu), 1).expect("a thread");
        }
        let status = member(&first, user);
        (1..first.cpus).for_each(|cpu| join(user, tid(cpu)));
        status
    };
    vec![
        program(first),
        program(move |user| member(&others, user)),
        program(move |user| child(&children, user)),
    ]
}

/// Runs a storm on a kernel that `configure` has changed.
fn run_storm(seed: u64, cpus: usize, configure: impl FnOnce(&mut Config)) {
    run_storm_in("", usize::MAX, (seed, cpus), configure);
}

/// The same with a command line, and so many free frames. Returns how many pages went to the disk.
fn run_storm_in(
    cmdline: &str,
    frames: usize,
    (seed, cpus): (u64, usize),
    configure: impl FnOnce(&mut Config),
) -> usize {
    let storm = Storm {
        cpus,
        rounds: 4,
        acts: 40,
        seed,
        started: AtomicU64::new(0),
        arrived: AtomicU64::new(0),
        inherited: Default::default(),
    };
    let info = boot_info_with(cpus, cmdline);
    let machine = Machine::new(cpus, programs(storm));
    let mut kernel = Kernel::boot(machine, &info).expect("bootable");
    configure(&mut kernel.config);
    let spare = (kernel.root().free_frames.get() as usize).saturating_sub(frames);
    let take = |_| {
        kernel
            .alloc_frames(0, FrameKind::Stack)
            .expect("it is free")
    };
    (0..spare).map(take).for_each(drop);
    let free_at_boot = kernel.root().free_frames.get();
    let (kernel, outcome) = run(kernel, |kernel| kernel.start_first_process(&info));
    assert_eq!((outcome.status, outcome.console.as_str()), (0, ""));
    check_end(&kernel, free_at_boot);
    audit_memory(&*kernel);
    kernel.arch.swapped_pages()
}

/// CPUs that really run at once, kswapd among the threads, and the disk in its own time.
#[test]
fn a_storm_in_little_memory_keeps_every_promise() {
    let mut out = 0;
    for seed in 1..9 {
        let cmdline = "swap_slots=1024 min_free=16 pcp_batch=2";
        let cpus = 1 + seed as usize % MAX_CPUS;
        out += run_storm_in(cmdline, 30 + 20 * cpus, (seed, cpus), |_| {});
    }
    assert!(out > 0, "there was memory enough");
}

/// Storms that do not find a bug are tried again: which CPU is where is up to the host. The window of
/// `free-before-flush` is too short for this; `mm`'s own tests stop a CPU inside it.
#[test]
fn a_storm_finds_missing_flushes() {
    for bug in ["shootdown-skip-remote", "fork-no-writeprotect-flush"] {
        let line = format!("bug={bug}");
        let bugs = Config::parse(&line).expect("a parameter").bugs;
        let found = (1..=200).find(|seed| {
            catch_unwind(|| run_storm(*seed, MAX_CPUS, |config| config.bugs = bugs)).is_err()
        });
        assert!(found.is_some(), "200 storms did not find {bug}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(crate::mm::tests::cases(8)))]
    #[test]
    fn a_storm_on_one_address_space_keeps_every_promise(
        seed: u64,
        cpus in 2..=MAX_CPUS,
        batch in prop::sample::select(vec![1, 3, 64]),
        pcp_batch in prop::sample::select(vec![0, 1, 16]),
        fault_around in prop::sample::select(vec![1, 4]),
    ) {
        run_storm(seed, cpus, |config| {
            config.gather_batch = batch;
            config.pcp_batch = pcp_batch;
            config.fault_around = fault_around;
        });
    }
}
