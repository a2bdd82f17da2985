//! Random calls on two files, mapped by several processes, against a model of what everybody must see.

use std::collections::BTreeMap;

use abi::objects::{File, Mm, Pa};
use abi::syscall::{advice, map, prot};
use proptest::prelude::*;

use super::files::put;
use super::{AT, PAGE, TestKernel, audit, teardown};
use crate::Kernel;
use crate::arch::model::testing::Machine;
use crate::mm::{Backing, FaultError, Field, Size};

const CPUS: usize = 2;
const FILES: usize = 2;
const PROCESSES: usize = 3;
/// Pages of a file, and of the window in which they are mapped.
const PAGES: u64 = 8;

#[derive(Clone, Debug)]
enum Op {
    /// mmap of pages of a file at a page of the window.
    Map {
        at: u64,
        pages: u64,
        file: usize,
        pgoff: u64,
        shared: bool,
        prot: u64,
    },
    Unmap(u64, u64),
    Protect(u64, u64, u64),
    DontNeed(u64, u64),
    Fork(usize),
    Exit,
    Read(u64),
    Write(u64, u64),
    /// To so many half pages.
    Truncate(usize, u64),
    Punch(usize, u64, u64),
    Allocate(usize, u64, u64),
    FileWrite(usize, u64, u64),
    FileRead(usize, u64),
    /// The folios of a range move to other frames.
    Migrate(u64, u64),
}

type Step = (usize, usize, Op);

fn op() -> impl Strategy<Value = Op> {
    let (page, len, file) = (0..PAGES, 1..5u64, 0..FILES);
    let half = 0..2 * PAGES;
    let some_prot = prop_oneof![
        4 => Just(prot::READ | prot::WRITE),
        2 => Just(prot::READ),
        1 => Just(prot::NONE),
    ];
    let map = (
        page.clone(),
        len.clone(),
        file.clone(),
        page.clone(),
        any::<bool>(),
        some_prot.clone(),
    );
    prop_oneof![
        6 => map.prop_map(|(at, pages, file, pgoff, shared, prot)| Op::Map { at, pages, file, pgoff, shared, prot }),
        2 => (page.clone(), len.clone()).prop_map(|(at, n)| Op::Unmap(at, n)),
        2 => (page.clone(), len.clone(), some_prot).prop_map(|(at, n, p)| Op::Protect(at, n, p)),
        2 => (page.clone(), len.clone()).prop_map(|(at, n)| Op::DontNeed(at, n)),
        1 => (0..PROCESSES).prop_map(Op::Fork),
        1 => Just(Op::Exit),
        8 => half.clone().prop_map(Op::Read),
        10 => (half.clone(), 1..u64::MAX).prop_map(|(at, v)| Op::Write(at, v)),
        3 => (file.clone(), 0..=2 * PAGES).prop_map(|(f, n)| Op::Truncate(f, n)),
        3 => (file.clone(), half.clone(), 1..6u64).prop_map(|(f, at, n)| Op::Punch(f, at, n)),
        1 => (file.clone(), half.clone(), 1..6u64).prop_map(|(f, at, n)| Op::Allocate(f, at, n)),
        3 => (file.clone(), half.clone(), 1..u64::MAX).prop_map(|(f, at, v)| Op::FileWrite(f, at, v)),
        3 => (file, half).prop_map(|(f, at)| Op::FileRead(f, at)),
        3 => (page, len).prop_map(|(at, n)| Op::Migrate(at, n)),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec((0..CPUS, 0..PROCESSES, op()), 1..60)
}

/// Half a page: the unit in which contents differ.
const HALF: u64 = PAGE / 2;

/// A file as it must be: its size, and the first word of each half page.
#[derive(Clone, Default)]
struct Model {
    bytes: u64,
    words: BTreeMap<u64, u64>,
}

impl Model {
    fn truncate(&mut self, bytes: u64) {
        self.words.retain(|&half, _| half * HALF < bytes);
        self.bytes = bytes;
    }
    fn pages(&self) -> u64 {
        self.bytes.div_ceil(PAGE)
    }
}

/// A page of a process.
#[derive(Clone)]
struct Page {
    file: usize,
    index: u64,
    shared: bool,
    prot: u64,
    /// Both halves, once it was written privately.
    copy: Option<[u64; 2]>,
}

#[derive(Clone)]
struct Process {
    mm: Pa<Mm>,
    pages: BTreeMap<u64, Page>,
}

struct World<'k> {
    k: &'k TestKernel,
    files: [Pa<File>; FILES],
    models: [Model; FILES],
    processes: [Option<Process>; PROCESSES],
}

impl World<'_> {
    /// What an access of the `half` of the window must give, and the page that it touches.
    fn expect(&self, process: &Process, half: u64, write: bool) -> Result<u64, FaultError> {
        let page = process
            .pages
            .get(&(half / 2))
            .ok_or(FaultError::NoMapping)?;
        let needed = if write {
            prot::WRITE
        } else {
            prot::READ | prot::WRITE
        };
        if page.prot & needed == 0 {
            return Err(FaultError::Access);
        }
        if let Some(copy) = page.copy {
            return Ok(copy[half as usize % 2]);
        }
        let model = &self.models[page.file];
        if page.index >= model.pages() {
            return Err(FaultError::Bus);
        }
        let at = page.index * 2 + half % 2;
        Ok(model.words.get(&at).copied().unwrap_or(0))
    }

    fn step(&mut self, (cpu, slot, op): &Step) -> Result<(), TestCaseError> {
        let k = self.k;
        let Some(mut process) = self.processes[*slot].clone() else {
            return Ok(());
        };
        let mm = process.mm;
        k.on(*cpu, |k| k.switch_mm(mm));
        let gva = |page: u64| AT + page * PAGE;
        match *op {
            Op::Map {
                at,
                pages,
                file,
                pgoff,
                shared,
                prot,
            } => {
                let flags = map::FIXED | if shared { map::SHARED } else { map::PRIVATE };
                let backing = Backing::File(self.files[file], pgoff);
                let got = k.on(*cpu, |k| {
                    k.mmap_of(mm, gva(at), pages * PAGE, (prot, flags), backing)
                });
                prop_assert_eq!(got, Ok(gva(at)));
                for i in 0..pages {
                    let page = Page {
                        file,
                        index: pgoff + i,
                        shared,
                        prot,
                        copy: None,
                    };
                    process.pages.insert(at + i, page);
                }
            }
            Op::Unmap(at, pages) => {
                prop_assert_eq!(k.on(*cpu, |k| k.munmap(mm, gva(at), pages * PAGE)), Ok(()));
                process
                    .pages
                    .retain(|page, _| !(at..at + pages).contains(page));
            }
            Op::Protect(at, pages, prot) => {
                let _ = k.on(*cpu, |k| k.mprotect(mm, gva(at), pages * PAGE, prot));
                let whole = (at..at + pages).take_while(|page| process.pages.contains_key(page));
                for page in whole.collect::<Vec<_>>() {
                    process.pages.get_mut(&page).unwrap().prot = prot;
                }
            }
            Op::DontNeed(at, pages) => {
                let _ = k.on(*cpu, |k| {
                    k.madvise(mm, gva(at), pages * PAGE, advice::DONTNEED)
                });
                for (_, page) in process.pages.range_mut(at..at + pages) {
                    page.copy = None;
                }
            }
            Op::Fork(into) if self.processes[into].is_none() => {
                let child = k.on(*cpu, |k| k.mm_fork(mm)).unwrap();
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
                k.on(*cpu, |k| k.mm_put(mm));
                self.processes[*slot] = None;
                return Ok(());
            }
            Op::Read(half) => {
                let expected = self.expect(&process, half, false);
                prop_assert_eq!(k.user_read(*cpu, AT + half * HALF), expected, "{:#x}", half);
            }
            Op::Write(half, value) => {
                let expected = self.expect(&process, half, true);
                let other = self.expect(&process, half ^ 1, true);
                let got = k.user_write(*cpu, AT + half * HALF, value);
                prop_assert_eq!(got, expected.map(|_| ()));
                if let (Ok(_), Some(page)) = (expected, process.pages.get_mut(&(half / 2))) {
                    if page.shared {
                        let at = page.index * 2 + half % 2;
                        self.models[page.file].words.insert(at, value);
                    } else {
                        let mut copy = page.copy.unwrap_or([other.unwrap(); 2]);
                        copy[half as usize % 2] = value;
                        page.copy = Some(copy);
                    }
                }
            }
            Op::Truncate(file, halves) => {
                k.on(*cpu, |k| k.file_truncate(self.files[file], halves * HALF));
                self.models[file].truncate(halves * HALF);
                let end = self.models[file].pages();
                // Private copies behind the end go too; where nothing was taken away, nothing does.
                for process in self.processes.iter_mut().flatten().chain([&mut process]) {
                    for page in process.pages.values_mut() {
                        if page.file == file && page.index >= end {
                            page.copy = None;
                        }
                    }
                }
            }
            Op::Punch(file, at, halves) => {
                let (start, end) = (at * HALF, (at + halves) * HALF);
                k.on(*cpu, |k| k.file_punch(self.files[file], start, end));
                self.models[file]
                    .words
                    .retain(|half, _| !(at..at + halves).contains(half));
            }
            Op::Allocate(file, at, halves) => {
                let (start, end) = (at * HALF, (at + halves) * HALF);
                let got = k.on(*cpu, |k| {
                    k.file_allocate(self.files[file], start, end, Size::Grows)
                });
                prop_assert_eq!(got, Ok(()));
                let bytes = &mut self.models[file].bytes;
                *bytes = end.max(*bytes);
            }
            Op::FileWrite(file, at, value) => {
                prop_assert_eq!(
                    k.on(*cpu, |k| put(k, self.files[file], at * HALF, value)),
                    Ok(())
                );
                let model = &mut self.models[file];
                model.words.insert(at, value);
                model.bytes = model.bytes.max(at * HALF + 8);
            }
            Op::Migrate(at, pages) => {
                let bytes = pages * PAGE;
                let moved = k.on(*cpu, |k| k.migrate_range(mm, gva(at), bytes)).unwrap();
                prop_assert!(moved <= pages);
            }
            Op::FileRead(file, at) => {
                let mut bytes = [0; 8];
                let got = k
                    .file_read(self.files[file], at * HALF, &mut bytes)
                    .unwrap() as u64;
                let model = &self.models[file];
                prop_assert_eq!(got, model.bytes.saturating_sub(at * HALF).min(8));
                if got == 8 {
                    let expected = model.words.get(&at).copied().unwrap_or(0);
                    prop_assert_eq!(u64::from_le_bytes(bytes), expected);
                }
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
        files: [(); FILES].map(|()| k.file_create().unwrap()),
        models: Default::default(),
        processes: [
            Some(Process {
                mm: k.mm_create().unwrap(),
                pages: BTreeMap::new(),
            }),
            None,
            None,
        ],
    };
    for step in steps {
        world.step(step)?;
        audit(k);
    }
    for half in 0..2 * PAGES {
        for (slot, process) in world.processes.clone().iter().enumerate() {
            if process.is_some() {
                world.step(&(0, slot, Op::Read(half)))?;
            }
        }
    }
    world.files.into_iter().for_each(|file| k.file_put(file));
    let left: Vec<_> = world.processes.iter().flatten().map(|p| p.mm).collect();
    teardown(k, &left);
    let now = k.root().free_frames.get() + super::slab_frames(k);
    prop_assert_eq!(now, free, "frames are back");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(super::cases(150)))]

    #[test]
    fn everybody_sees_what_was_written(
        steps in steps(),
        cmdline in prop_oneof![Just(""), Just("gather_batch=1 flush_ceiling=0 pcp_batch=0")],
    ) {
        run(cmdline, &steps)?;
    }
}

/// The net holds what it is for.
#[test]
fn random_calls_find_missing_flushes() {
    for bug in ["shootdown-skip-remote", "flush-range-short"] {
        let buggy = format!("bug={bug}");
        let caught = super::some_case_fails(&steps(), |steps| run(&buggy, &steps));
        assert!(caught, "{bug} stays hidden");
    }
}
