//! Random calls on a file on the disk, mapped by several processes, while the disk fails now and then: everybody sees what
//! was written, and once a sync has succeeded, the disk has it.

use std::collections::BTreeMap;

use abi::disk::DiskOp;
use abi::objects::{File, Mm, Pa, lru};
use abi::syscall::{Errno, advice, map, msync, prot};
use proptest::prelude::*;

use super::files::put;
use super::{AT, PAGE, RW, TestKernel, audit, teardown};
use crate::Kernel;
use crate::arch::model::testing::Machine;
use crate::mm::lru::CLUSTER;
use crate::mm::reclaim::Used;
use crate::mm::{Backing, FaultError, Field};

const CPUS: usize = 2;
const PROCESSES: usize = 3;
/// Pages of the file, which every process maps at first, and of the window.
const PAGES: u64 = 6;
const SECTOR: u64 = 16;
const BLANK: u64 = 0xdbdb_dbdb_dbdb_dbdb;
const ALL: std::ops::Range<u64> = 0..u64::MAX;

#[derive(Clone, Debug)]
enum Op {
    /// mmap of pages of the file at a page of the window: from which one, shared, writable.
    Map(u64, u64, u64, bool, bool),
    Unmap(u64, u64),
    Protect(u64, u64, bool),
    DontNeed(u64, u64),
    Fork(usize),
    Exit,
    Read(u64),
    Write(u64, u64),
    FileRead(u64),
    FileWrite(u64, u64),
    Sync,
    Msync(u64, u64),
    BeginWriting,
    Evict,
    Migrate(u64, u64),
    /// Of pages of files alone: the disk loses what it cannot read of the swap area.
    Reclaim,
    /// Requests of this kind fail from now on.
    Fail(Option<DiskOp>),
}

type Step = (usize, usize, Op);

fn op() -> impl Strategy<Value = Op> {
    let (page, len) = (0..PAGES, 1..4u64);
    let range = (page.clone(), len.clone());
    let map = (
        page.clone(),
        len,
        page.clone(),
        prop::bool::weighted(0.8),
        prop::bool::weighted(0.8),
    );
    let fails = prop_oneof![
        3 => Just(None),
        1 => Just(Some(DiskOp::Read)),
        1 => Just(Some(DiskOp::Write)),
    ];
    prop_oneof![
        4 => map.prop_map(|(at, n, from, shared, w)| Op::Map(at, n, from, shared, w)),
        2 => range.clone().prop_map(|(at, n)| Op::Unmap(at, n)),
        2 => (range.clone(), any::<bool>()).prop_map(|((at, n), w)| Op::Protect(at, n, w)),
        3 => range.clone().prop_map(|(at, n)| Op::DontNeed(at, n)),
        1 => (0..PROCESSES).prop_map(Op::Fork),
        1 => Just(Op::Exit),
        8 => page.clone().prop_map(Op::Read),
        12 => (page.clone(), 1..u64::MAX).prop_map(|(at, v)| Op::Write(at, v)),
        3 => page.clone().prop_map(Op::FileRead),
        3 => (page, 1..u64::MAX).prop_map(|(at, v)| Op::FileWrite(at, v)),
        3 => Just(Op::Sync),
        3 => range.clone().prop_map(|(at, n)| Op::Msync(at, n)),
        1 => Just(Op::BeginWriting),
        3 => Just(Op::Evict),
        2 => range.prop_map(|(at, n)| Op::Migrate(at, n)),
        4 => Just(Op::Reclaim),
        2 => fails.prop_map(Op::Fail),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec((0..CPUS, 0..PROCESSES, op()), 1..60)
}

#[derive(Clone)]
struct Page {
    index: u64,
    shared: bool,
    writable: bool,
    copy: Option<u64>,
}

#[derive(Clone)]
struct Process {
    mm: Pa<Mm>,
    pages: BTreeMap<u64, Page>,
}

struct World<'k> {
    k: &'k TestKernel,
    file: Pa<File>,
    /// The first word of each page.
    words: [u64; PAGES as usize],
    fails: Option<DiskOp>,
    /// Some write has failed, and perhaps nobody was told.
    failed: bool,
    processes: [Option<Process>; PROCESSES],
}

impl World<'_> {
    fn expect(&self, process: &Process, at: u64, write: bool) -> Result<u64, FaultError> {
        let page = process.pages.get(&at).ok_or(FaultError::NoMapping)?;
        if write && !page.writable {
            return Err(FaultError::Access);
        }
        if page.index >= PAGES {
            return Err(FaultError::Bus);
        }
        Ok(page.copy.unwrap_or(self.words[page.index as usize]))
    }

    /// True where an access may fail because the disk does.
    fn may_fail(&self) -> bool {
        self.fails == Some(DiskOp::Read)
    }

    fn synced(&mut self, result: Result<(), Errno>, whole: bool) -> Result<(), TestCaseError> {
        let fails = self.fails == Some(DiskOp::Write);
        self.failed |= fails;
        match result {
            Ok(()) if whole => {
                for (index, expected) in (0..).zip(self.words) {
                    prop_assert_eq!(self.stored(index), expected, "page {}", index);
                }
            }
            Ok(()) => {}
            Err(errno) => {
                prop_assert_eq!(errno, Errno::EIO);
                prop_assert!(self.failed, "nothing has failed");
                // Told once.
                self.failed = fails;
            }
        }
        Ok(())
    }

    fn stored(&self, index: u64) -> u64 {
        let mut disk = self.k.arch.disk();
        let page = disk.page(SECTOR + index * 8);
        u64::from_le_bytes(page[..8].try_into().unwrap())
    }

    fn settle(&self) {
        self.k.arch.serve_disk();
        self.k.swap_poll();
    }

    fn step(&mut self, (cpu, slot, op): &Step) -> Result<(), TestCaseError> {
        let (k, cpu) = (self.k, *cpu);
        let Some(mut process) = self.processes[*slot].clone() else {
            return Ok(());
        };
        let mm = process.mm;
        k.on(cpu, |k| k.switch_mm(mm));
        let gva = |page: u64| AT + page * PAGE;
        match *op {
            Op::Map(at, pages, from, shared, writable) => {
                let flags = map::FIXED | if shared { map::SHARED } else { map::PRIVATE };
                let prot = if writable { RW } else { prot::READ };
                let backing = Backing::File(self.file, from);
                let got = k.on(cpu, |k| {
                    k.mmap_of(mm, gva(at), pages * PAGE, (prot, flags), backing)
                });
                prop_assert_eq!(got, Ok(gva(at)));
                for i in 0..pages {
                    let page = Page {
                        index: from + i,
                        shared,
                        writable,
                        copy: None,
                    };
                    process.pages.insert(at + i, page);
                }
            }
            Op::Unmap(at, pages) => {
                prop_assert_eq!(k.on(cpu, |k| k.munmap(mm, gva(at), pages * PAGE)), Ok(()));
                process
                    .pages
                    .retain(|page, _| !(at..at + pages).contains(page));
            }
            Op::Protect(at, pages, writable) => {
                let prot = if writable { RW } else { prot::READ };
                let _ = k.on(cpu, |k| k.mprotect(mm, gva(at), pages * PAGE, prot));
                let whole = (at..at + pages).take_while(|page| process.pages.contains_key(page));
                for page in whole.collect::<Vec<_>>() {
                    process.pages.get_mut(&page).unwrap().writable = writable;
                }
            }
            Op::DontNeed(at, pages) => {
                let _ = k.on(cpu, |k| {
                    k.madvise(mm, gva(at), pages * PAGE, advice::DONTNEED)
                });
                for (_, page) in process.pages.range_mut(at..at + pages) {
                    page.copy = None;
                }
            }
            Op::Fork(into) if self.processes[into].is_none() => {
                let child = k.on(cpu, |k| k.mm_fork(mm)).unwrap();
                self.processes[into] = Some(Process {
                    mm: child,
                    ..process.clone()
                });
            }
            Op::Fork(_) => {}
            Op::Exit => {
                for other in 0..CPUS {
                    if k.root().cpus[other].loaded_mm.get() == mm {
                        k.on(other, Kernel::leave_mm);
                    }
                }
                k.on(cpu, |k| k.mm_put(mm));
                self.processes[*slot] = None;
                return Ok(());
            }
            Op::Read(at) => {
                let got = k.user_read(cpu, gva(at));
                if got != Err(FaultError::Bus) || !self.may_fail() {
                    prop_assert_eq!(got, self.expect(&process, at, false), "page {}", at);
                }
            }
            Op::Write(at, value) => {
                let got = k.user_write(cpu, gva(at), value);
                if got != Err(FaultError::Bus) || !self.may_fail() {
                    let expected = self.expect(&process, at, true);
                    prop_assert_eq!(got, expected.map(|_| ()), "page {}", at);
                }
                if let (Ok(()), Some(page)) = (got, process.pages.get_mut(&at)) {
                    if page.shared {
                        self.words[page.index as usize] = value;
                    } else {
                        page.copy = Some(value);
                    }
                }
            }
            Op::FileRead(index) => {
                let mut bytes = [0; 8];
                let got = k.file_read(self.file, index * PAGE, &mut bytes);
                if got != Err(Errno::EIO) || !self.may_fail() {
                    prop_assert_eq!(got, Ok(8));
                    prop_assert_eq!(u64::from_le_bytes(bytes), self.words[index as usize]);
                }
            }
            Op::FileWrite(index, value) => {
                let got = k.on(cpu, |k| put(k, self.file, index * PAGE, value));
                if got != Err(Errno::EIO) || !self.may_fail() {
                    prop_assert_eq!(got, Ok(()));
                    self.words[index as usize] = value;
                }
            }
            Op::Sync => {
                let result = k.on(cpu, |k| k.file_sync(self.file, ALL));
                self.synced(result, true)?;
            }
            Op::Msync(at, pages) => {
                let result = k.on(cpu, |k| k.msync(mm, gva(at), pages * PAGE, msync::SYNC));
                if result != Err(Errno::ENOMEM) {
                    self.synced(result, false)?;
                }
                self.failed |= self.fails == Some(DiskOp::Write);
            }
            Op::BeginWriting => {
                k.on(cpu, |k| k.file_begin_writing(self.file, ALL));
                self.failed |= self.fails == Some(DiskOp::Write);
                self.settle();
            }
            Op::Evict => {
                k.on(cpu, |k| k.file_evict(self.file, ALL));
            }
            Op::Migrate(at, pages) => {
                let moved = k.on(cpu, |k| k.migrate_range(mm, gva(at), pages * PAGE));
                prop_assert!(moved.unwrap() <= pages);
            }
            Op::Reclaim => {
                for list in [lru::INACTIVE_FILE, lru::UNEVICTABLE] {
                    k.on(cpu, |k| {
                        k.shrink_folios(&k.lru_isolate(list, CLUSTER), Used::Counts);
                    });
                }
                self.failed |= self.fails == Some(DiskOp::Write);
            }
            Op::Fail(fails) => {
                self.fails = fails;
                k.arch.disk().fails = fails;
            }
        }
        self.processes[*slot] = Some(process);
        Ok(())
    }
}

fn run(cmdline: &str, steps: &[Step]) -> Result<(), TestCaseError> {
    let machine = Machine::with_memory(2 << 20, CPUS, cmdline);
    let k = machine.kernel();
    let free = k.root().free_frames.get();
    let mut world = World {
        k,
        file: k.disk_file_create(SECTOR, PAGES * PAGE).unwrap(),
        words: [BLANK; PAGES as usize],
        fails: None,
        failed: false,
        processes: [
            Some(Process {
                mm: k.mm_create().unwrap(),
                pages: BTreeMap::new(),
            }),
            None,
            None,
        ],
    };
    world.step(&(0, 0, Op::Map(0, PAGES, 0, true, true)))?;
    for step in steps {
        world.step(step)?;
        audit(k);
    }
    world.step(&(0, 0, Op::Fail(None)))?;
    world.fails = None;
    k.arch.disk().fails = None;
    for page in 0..PAGES {
        for slot in 0..PROCESSES {
            world.step(&(0, slot, Op::Read(page)))?;
        }
    }
    // The first may tell of an error of before.
    let first = k.file_sync(world.file, ALL);
    world.synced(first, true)?;
    prop_assert_eq!(k.file_sync(world.file, ALL), Ok(()));
    for process in world.processes.iter().flatten() {
        k.munmap(process.mm, AT, 2 * PAGES * PAGE).unwrap();
    }
    k.file_evict(world.file, ALL);
    for (index, expected) in (0..).zip(world.words) {
        let mut bytes = [0; 8];
        prop_assert_eq!(world.stored(index), expected);
        prop_assert_eq!(k.file_read(world.file, index * PAGE, &mut bytes), Ok(8));
        prop_assert_eq!(u64::from_le_bytes(bytes), expected, "read anew");
    }
    k.file_put(world.file);
    let left: Vec<_> = world.processes.iter().flatten().map(|p| p.mm).collect();
    teardown(k, &left);
    let now = k.root().free_frames.get() + super::slab_frames(k);
    prop_assert_eq!(now, free, "frames are back");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(super::cases(150)))]

    #[test]
    fn what_was_written_is_seen_and_what_was_synced_is_kept(
        steps in steps(),
        cmdline in prop_oneof![
            Just(""),
            Just("swap_slots=1"),
            Just("gather_batch=1 flush_ceiling=0 file_fault_around=1 swap_slots=1"),
        ],
    ) {
        run(cmdline, &steps)?;
    }
}

/// The net holds what it is for. (Who unmaps and who cleans are not at work at once here: `disk_files`.)
#[test]
fn random_calls_find_write_back_that_does_not_flush() {
    let caught = super::some_case_fails(&steps(), |steps| run("bug=mkclean-no-flush", &steps));
    assert!(caught, "it stays hidden");
}
