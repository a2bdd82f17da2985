//! Random programs on several CPUs against a model of what they must see.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use abi::layout::USER_BRK_START;
use abi::objects::{FrameKind, MemGroup, Mm, Pa};
use abi::syscall::{Errno, advice, group, map, mlock, mremap, prot};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::{ANON, AT, PAGE, TestKernel, audit, teardown};
use crate::Kernel;
use crate::arch::model::testing::Machine;
use crate::mm::zero::is_uncounted;
use crate::mm::{FaultError, Field, Slot};

const CPUS: usize = 3;
const PROCESSES: usize = 3;
/// Memory groups, without limits (those with: `groups_random`).
const GROUPS: u64 = 3;
/// Pages that programs map and touch: across a boundary of every level's tables but the highest's.
const WINDOW: u64 = 24;
/// Bytes of what stands for a page where folios of 2 MiB are under test: a quarter of one.
const QUARTER: u64 = 128 * PAGE;

#[derive(Clone, Debug)]
enum Op {
    /// mmap at a page of the window (fixed, or as a hint) with so many pages.
    Map {
        at: u64,
        pages: u64,
        prot: u64,
        extra: u64,
    },
    Unmap(u64, u64),
    Protect(u64, u64, u64),
    Advise(u64, u64, u64),
    Brk(u64),
    /// mremap of so many pages to so many, with flags, to a page.
    Remap {
        at: u64,
        pages: u64,
        new_pages: u64,
        flags: u64,
        to: u64,
    },
    /// mlock with its flags, or munlock.
    Lock(u64, u64, Option<u64>),
    Mincore(u64, u64),
    /// The folios of a range move to other frames; of none at all, those of the process to lower ones.
    Migrate(u64, u64),
    /// MADV_COLLAPSE, or a scan as khugepaged makes it.
    Collapse(u64, u64),
    Scan,
    /// The folios that can be are split.
    Split(u64, u64),
    /// The process moves to a memory group, with its memory or without.
    Group(u64, bool),
    /// The process becomes the parent of a new one in the slot, if it is free.
    Fork(usize),
    Exit,
    Read(u64),
    Write(u64, u64),
    Fetch(u64),
    /// The CPU goes idle; the next operation on it makes it leave lazy mode.
    Idle,
}

/// An operation of process `.1` on CPU `.0`.
type Step = (usize, usize, Op);

fn op() -> impl Strategy<Value = Op> {
    let page = 0..WINDOW + 3;
    let len = 1..9u64;
    let some_prot = prop_oneof![
        4 => Just(prot::READ | prot::WRITE),
        2 => Just(prot::READ),
        1 => Just(prot::NONE),
        1 => Just(prot::EXEC),
        1 => Just(prot::WRITE),
        1 => Just(prot::READ | prot::WRITE | prot::EXEC),
    ];
    let extra = prop_oneof![
        4 => Just(map::FIXED),
        1 => Just(map::FIXED | map::POPULATE),
        1 => Just(map::FIXED | map::NORESERVE),
        1 => Just(map::FIXED_NOREPLACE),
        1 => Just(0),
    ];
    let some_advice = prop_oneof![
        3 => Just(advice::DONTNEED),
        1 => Just(advice::SEQUENTIAL),
        1 => Just(advice::NORMAL),
        1 => Just(advice::WILLNEED),
        3 => Just(advice::FREE),
        1 => Just(advice::COLD),
        3 => Just(advice::PAGEOUT),
        2 => Just(advice::HUGEPAGE),
        1 => Just(advice::NOHUGEPAGE),
        1 => Just(advice::DONTFORK),
        1 => Just(advice::DOFORK),
        1 => Just(advice::WIPEONFORK),
        1 => Just(advice::KEEPONFORK),
        1 => Just(advice::POPULATE_READ),
        1 => Just(advice::POPULATE_WRITE),
    ];
    let resized = prop_oneof![
        3 => Just(mremap::MAYMOVE),
        1 => Just(0),
        4 => Just(mremap::MAYMOVE | mremap::FIXED),
        1 => Just(mremap::MAYMOVE | mremap::DONTUNMAP),
        1 => Just(mremap::MAYMOVE | mremap::FIXED | mremap::DONTUNMAP),
    ];
    let remap = (0..WINDOW, len.clone(), len.clone(), resized, 0..WINDOW);
    let same = prop::bool::weighted(0.6);
    let lock = prop_oneof![Just(None), Just(Some(0)), Just(Some(mlock::ONFAULT))];
    let map = (0..WINDOW, len.clone(), some_prot.clone(), extra);
    prop_oneof![
        6 => map.prop_map(|(at, pages, prot, extra)| Op::Map { at, pages, prot, extra }),
        4 => (0..WINDOW, len.clone()).prop_map(|(at, n)| Op::Unmap(at, n)),
        4 => (0..WINDOW, len.clone(), some_prot).prop_map(|(at, n, p)| Op::Protect(at, n, p)),
        5 => (0..WINDOW, len.clone(), some_advice).prop_map(|(at, n, a)| Op::Advise(at, n, a)),
        2 => (0..6u64).prop_map(Op::Brk),
        8 => (remap, same).prop_map(|((at, pages, new_pages, flags, to), same)| Op::Remap {
            at,
            pages,
            new_pages: if same { pages } else { new_pages },
            flags,
            to,
        }),
        2 => (0..WINDOW, len.clone(), lock).prop_map(|(at, n, how)| Op::Lock(at, n, how)),
        1 => (0..WINDOW, len.clone()).prop_map(|(at, n)| Op::Mincore(at, n)),
        4 => (0..WINDOW, 0..9u64).prop_map(|(at, n)| Op::Migrate(at, n)),
        2 => (0..WINDOW, len.clone()).prop_map(|(at, n)| Op::Collapse(at, n)),
        1 => Just(Op::Scan),
        1 => (0..WINDOW, len.clone()).prop_map(|(at, n)| Op::Split(at, n)),
        2 => (0..=GROUPS, any::<bool>()).prop_map(|(group, all)| Op::Group(group, all)),
        2 => (0..PROCESSES).prop_map(Op::Fork),
        1 => Just(Op::Exit),
        6 => page.clone().prop_map(Op::Read),
        10 => (page.clone(), 1..u64::MAX).prop_map(|(at, v)| Op::Write(at, v)),
        1 => page.prop_map(Op::Fetch),
        2 => Just(Op::Idle),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec((0..CPUS, 0..PROCESSES, op()), 1..80)
}

/// One page as it must be.
#[derive(Clone, Copy, Default)]
struct Page {
    prot: u64,
    /// Its first word.
    value: u64,
    locked: bool,
    /// The program has given it up and not written since: it may be zero.
    given_up: bool,
    /// Not copied at fork, or zeroes in the child.
    dontfork: bool,
    wipe: bool,
}

/// One process as it must be.
#[derive(Clone)]
struct Process {
    mm: Pa<Mm>,
    pages: BTreeMap<u64, Page>,
    brk: u64,
    /// Bytes of a page: of those that are told apart here.
    page: u64,
}

impl Process {
    fn new(mm: Pa<Mm>, page: u64) -> Self {
        Self {
            mm,
            page,
            pages: BTreeMap::new(),
            brk: USER_BRK_START,
        }
    }

    fn access(&self, gva: u64, allowed: u64) -> Result<u64, FaultError> {
        match self.pages.get(&gva) {
            None => Err(FaultError::NoMapping),
            Some(page) if page.prot & allowed != 0 => Ok(page.value),
            Some(_) => Err(FaultError::Access),
        }
    }

    fn unmap(&mut self, start: u64, end: u64) {
        self.pages.retain(|&gva, _| gva < start || gva >= end);
    }

    fn map(&mut self, start: u64, end: u64, prot: u64) {
        for gva in (start..end).step_by(self.page as usize) {
            let page = Page {
                prot,
                ..Page::default()
            };
            self.pages.insert(gva, page);
        }
    }

    /// A page that was given up reads as zero from when it was reclaimed.
    fn note_read(&mut self, gva: u64, got: Result<u64, FaultError>) {
        match self.pages.get_mut(&gva) {
            Some(page) if page.given_up && got == Ok(0) => page.value = 0,
            _ => {}
        }
    }

    /// What a child is born with.
    fn forked(&self, mm: Pa<Mm>) -> Self {
        let mut child = self.clone();
        child.mm = mm;
        child.pages.retain(|_, page| !page.dontfork);
        for page in child.pages.values_mut() {
            page.locked = false;
            if page.wipe {
                page.value = 0;
            }
        }
        child
    }

    /// The pages of a range up to its first hole.
    fn prefix(&self, start: u64, end: u64) -> Vec<u64> {
        (start..end)
            .step_by(self.page as usize)
            .take_while(|gva| self.pages.contains_key(gva))
            .collect()
    }

    fn window(&self, at: u64, pages: u64) -> (u64, u64) {
        let base = AT - 10 * self.page;
        (base + at * self.page, base + (at + pages) * self.page)
    }

    /// Pages past the window are the heap's.
    fn touched(&self, at: u64) -> u64 {
        match at.checked_sub(WINDOW) {
            None => self.window(at, 0).0,
            Some(heap) => USER_BRK_START + heap * self.page,
        }
    }

    fn any(&self, start: u64, end: u64) -> bool {
        start < end && self.pages.range(start..end).next().is_some()
    }
}

struct World<'k> {
    kernel: &'k TestKernel,
    processes: [Option<Process>; PROCESSES],
}

impl World<'_> {
    fn step(&mut self, (cpu, slot, op): &Step) -> Result<(), TestCaseError> {
        let k = self.kernel;
        let Some(process) = self.processes[*slot].clone() else {
            return Ok(());
        };
        k.on(*cpu, |k| k.switch_mm(process.mm));
        match *op {
            Op::Fork(into) if self.processes[into].is_none() => {
                let mm = k.on(*cpu, |k| k.mm_fork(process.mm)).unwrap();
                self.processes[into] = Some(process.forked(mm));
            }
            Op::Fork(_) => {}
            Op::Exit => {
                k.on(*cpu, |k| k.mm_put(process.mm));
                // Other CPUs of the process are idle from now on, with it loaded.
                for other in 0..CPUS {
                    let state = &k.root().cpus[other];
                    if state.loaded_mm.get() == process.mm {
                        k.on(other, Kernel::enter_lazy);
                    }
                }
                self.processes[*slot] = None;
            }
            Op::Idle => k.on(*cpu, Kernel::enter_lazy),
            ref op => {
                let process = self.processes[*slot].as_mut().unwrap();
                k.on(*cpu, |k| call(k, *cpu, process, op))?;
            }
        }
        Ok(())
    }

    fn count_huge(&self) {
        let processes = self.processes.iter().flatten();
        let huge: u64 = processes.map(|p| self.kernel.obj(p.mm).huge.get()).sum();
        HUGE.fetch_add(huge, Relaxed);
    }

    /// Every page of every process reads as it must.
    fn check_contents(&self) -> Result<(), TestCaseError> {
        for process in self.processes.iter().flatten() {
            self.kernel.on(0, |k| k.switch_mm(process.mm));
            for (&gva, page) in &process.pages {
                let got = self.kernel.user_read(0, gva);
                if page.given_up && got == Ok(0) {
                    continue;
                }
                let expected = if page.prot == 0 {
                    Err(FaultError::Access)
                } else {
                    Ok(page.value)
                };
                prop_assert_eq!(got, expected, "{:#x}", gva);
            }
        }
        Ok(())
    }
}

/// One operation of `process` on this CPU, and what it must do.
fn call(k: &TestKernel, cpu: usize, process: &mut Process, op: &Op) -> Result<(), TestCaseError> {
    let (mm, unit) = (process.mm, process.page);
    match *op {
        Op::Map {
            at,
            pages,
            prot,
            extra,
        } => {
            let (start, end) = process.window(at, pages);
            let got = k.mmap(mm, start, pages * unit, prot, ANON | extra);
            let taken = process.any(start, end);
            if extra == map::FIXED_NOREPLACE && taken {
                prop_assert_eq!(got, Err(Errno::EEXIST));
                return Ok(());
            }
            let found = got.unwrap();
            if extra != 0 || !taken {
                prop_assert_eq!(found, start);
            }
            if extra & map::FIXED == 0 {
                prop_assert!(!process.any(found, found + pages * unit));
            }
            process.unmap(found, found + pages * unit);
            process.map(found, found + pages * unit, prot);
        }
        Op::Unmap(at, pages) => {
            let (start, end) = process.window(at, pages);
            prop_assert_eq!(k.munmap(mm, start, pages * unit), Ok(()));
            process.unmap(start, end);
        }
        Op::Protect(at, pages, prot) => {
            let (start, end) = process.window(at, pages);
            let prefix = process.prefix(start, end);
            let whole = prefix.len() as u64 == pages;
            let expected = if whole { Ok(()) } else { Err(Errno::ENOMEM) };
            prop_assert_eq!(k.mprotect(mm, start, pages * unit, prot), expected);
            for gva in prefix {
                process.pages.get_mut(&gva).unwrap().prot = prot;
            }
        }
        Op::Advise(at, pages, advice) => {
            let range = process.window(at, pages);
            advise(k, process, range, advice)?;
        }
        Op::Remap {
            at,
            pages,
            new_pages,
            flags,
            to,
        } => remap(k, process, (at, pages), (to, new_pages), flags)?,
        Op::Lock(at, pages, how) => {
            let (start, end) = process.window(at, pages);
            let got = match how {
                Some(flags) => k.mlock(mm, start, pages * unit, flags),
                None => k.munlock(mm, start, pages * unit),
            };
            let prefix = process.prefix(start, end);
            // Without access nothing can be populated.
            let closed = how == Some(0) && prefix.iter().any(|at| process.pages[at].prot == 0);
            let fails = prefix.len() as u64 != pages || closed;
            prop_assert_eq!(got, if fails { Err(Errno::ENOMEM) } else { Ok(()) });
            for gva in prefix {
                process.pages.get_mut(&gva).unwrap().locked = how.is_some();
            }
        }
        Op::Mincore(at, pages) => {
            let (start, end) = process.window(at, pages);
            let mut vector = [9; 8];
            let told = k.mincore(mm, start, &mut vector[..pages as usize]);
            match told {
                Err(error) => {
                    prop_assert_eq!(error, Errno::ENOMEM);
                    prop_assert!(!process.pages.contains_key(&start));
                }
                Ok(told) => {
                    prop_assert!(told <= process.prefix(start, end).len());
                    for (page, byte) in vector[..told].iter().enumerate() {
                        // Only a page that was touched can hold anything.
                        let value = process.pages[&(start + page as u64 * PAGE)].value;
                        let out = k.config.swap_slots != 0;
                        prop_assert!(*byte == 1 || *byte == 0 && (value == 0 || out));
                    }
                }
            }
        }
        Op::Group(..) if !k.has_groups() => {}
        Op::Group(number, all) => {
            let flags = if all { group::RECHARGE } else { 0 };
            prop_assert!(k.group_move(mm, number, flags).is_ok());
        }
        Op::Migrate(_, 0) => {
            k.compact(mm);
        }
        Op::Migrate(at, pages) => {
            let (start, end) = process.window(at, pages);
            let movable = |gva: &u64| {
                let table = k.leaf_table(k.obj(mm), *gva).ok();
                let entry = table.map(|table| k.read_pte(Slot::new(table, 1, *gva)));
                let entry = entry.filter(|entry| entry.is_present() && !is_uncounted(*entry));
                entry.is_some_and(|entry| k.folio(k.head(entry.address())).order.get() == 0)
            };
            let pages = (start..end).step_by(PAGE as usize).filter(movable).count() as u64;
            let moved = k.migrate_range(mm, start, end - start);
            if k.config.swap_slots == 0 {
                prop_assert_eq!(moved, Ok(pages));
            } else {
                // Those with a swap slot stay, and the new frames may take some away.
                prop_assert!(
                    moved.map_or_else(|error| error == Errno::ENOMEM, |moved| moved <= pages)
                );
            }
        }
        Op::Brk(pages) => {
            let wanted = USER_BRK_START + pages * unit;
            let old = process.brk;
            if wanted > old && !process.any(old, wanted + unit) {
                process.map(old, wanted, prot::READ | prot::WRITE);
                process.brk = wanted;
            } else if wanted < old && process.any(wanted, old) {
                process.unmap(wanted, old);
                process.brk = wanted;
            }
            prop_assert_eq!(k.brk(mm, wanted), process.brk);
        }
        Op::Read(at) => {
            let gva = process.touched(at);
            let allowed = prot::READ | prot::WRITE | prot::EXEC;
            let got = k.user_read(cpu, gva);
            process.note_read(gva, got);
            prop_assert_eq!(got, process.access(gva, allowed));
        }
        Op::Write(at, value) => {
            let gva = process.touched(at);
            let expected = process.access(gva, prot::WRITE).map(|_| ());
            prop_assert_eq!(k.user_write(cpu, gva, value), expected);
            if expected.is_ok() {
                let page = process.pages.get_mut(&gva).unwrap();
                (page.value, page.given_up) = (value, false);
            }
        }
        Op::Fetch(at) => {
            let gva = process.touched(at);
            let expected = process.access(gva, prot::EXEC).map(|_| ());
            prop_assert_eq!(k.user_fetch(cpu, gva), expected);
        }
        Op::Collapse(at, pages) => {
            let (start, end) = process.window(at, pages);
            if let Err(error) = k.madvise(mm, start, end - start, advice::COLLAPSE) {
                // Whether it can is up to the VMAs; what it does changes nothing that a program sees.
                let known = [Errno::EINVAL, Errno::ENOMEM, Errno::EAGAIN];
                prop_assert!(known.contains(&error), "{:?}", error);
            }
        }
        Op::Scan => {
            k.scan_for_collapse(mm);
        }
        Op::Split(at, pages) => {
            let (start, end) = process.window(at, pages);
            prop_assert!(k.split_folios(mm, start, end - start).is_ok());
        }
        Op::Fork(_) | Op::Exit | Op::Idle => unreachable!("handled by the world"),
    }
    Ok(())
}

/// madvise, and what it must do.
fn advise(
    k: &TestKernel,
    process: &mut Process,
    (start, end): (u64, u64),
    advice: u64,
) -> Result<(), TestCaseError> {
    let unit = process.page;
    let got = k.madvise(process.mm, start, end - start, advice);
    let prefix = process.prefix(start, end);
    let whole = prefix.len() as u64 == (end - start) / unit;
    let mapped = process.pages.range_mut(start..end);
    let refuses_locked = [
        advice::DONTNEED,
        advice::FREE,
        advice::COLD,
        advice::PAGEOUT,
    ]
    .contains(&advice);
    if [advice::POPULATE_READ, advice::POPULATE_WRITE].contains(&advice) {
        let needed = if advice == advice::POPULATE_READ {
            prot::READ
        } else {
            prot::WRITE
        };
        let closed = prefix.iter().any(|at| process.pages[at].prot & needed == 0);
        let expected = match (closed, whole) {
            (true, _) => Err(Errno::EINVAL),
            (_, false) => Err(Errno::ENOMEM),
            _ => Ok(()),
        };
        prop_assert_eq!(got, expected);
        return Ok(());
    }
    for (_, page) in mapped {
        if refuses_locked && page.locked {
            prop_assert_eq!(got, Err(Errno::EINVAL));
            return Ok(());
        }
        match advice {
            advice::DONTNEED => page.value = 0,
            advice::FREE => page.given_up = k.config.swap_slots != 0,
            advice::DONTFORK => page.dontfork = true,
            advice::DOFORK => page.dontfork = false,
            advice::WIPEONFORK => page.wipe = true,
            advice::KEEPONFORK => page.wipe = false,
            _ => {}
        }
    }
    prop_assert_eq!(got, if whole { Ok(()) } else { Err(Errno::ENOMEM) });
    Ok(())
}

/// mremap: what it returns is up to the VMAs, which are the audit's; where it succeeds the pages must be where it says,
/// and where it fails nothing may have changed but that a fixed place was cleared.
fn remap(
    k: &TestKernel,
    process: &mut Process,
    (at, pages): (u64, u64),
    (to, new_pages): (u64, u64),
    flags: u64,
) -> Result<(), TestCaseError> {
    let unit = process.page;
    let (start, _) = process.window(at, pages);
    let (target, target_end) = process.window(to, new_pages);
    let fixed = flags & mremap::FIXED != 0;
    let keeps = flags & mremap::DONTUNMAP != 0;
    let sizes = (pages * unit, new_pages * unit);
    let before = process.clone();
    let got = k.mremap(
        process.mm,
        start,
        sizes,
        flags,
        if fixed { target } else { 0 },
    );
    let found = match got {
        Ok(found) => found,
        Err(error) => {
            let known = [Errno::EINVAL, Errno::EFAULT, Errno::ENOMEM];
            prop_assert!(known.contains(&error), "{:?}", error);
            // Some page must be missing, or it is in the way, or too large to stay.
            let whole = process.prefix(start, start + sizes.0).len() as u64 == pages;
            let simple = whole && pages == new_pages && fixed && !keeps;
            let apart = target >= start + sizes.0 || target_end <= start;
            prop_assert!(!(simple && apart), "{:?}", error);
            // The place may have been cleared, and what shrinks cut off; what is left reads as before.
            process
                .pages
                .retain(|&gva, _| k.vma_at(k.obj(before.mm), gva).is_some());
            let lost = before.pages.len() - process.pages.len();
            prop_assert!(fixed || lost == 0, "{} pages lost with {:?}", lost, error);
            return Ok(());
        }
    };
    if fixed {
        prop_assert_eq!(found, target);
    }
    let moved = pages.min(new_pages);
    let grows_with = before.pages.get(&start).copied().unwrap_or_default();
    if found == start && !fixed {
        process.unmap(start + sizes.1, (start + sizes.0).max(start + sizes.1));
    } else {
        if !keeps {
            process.unmap(start, start + sizes.0);
        }
        for page in 0..moved {
            let from = start + page * unit;
            process.pages.remove(&(found + page * unit));
            if let Some(&content) = before.pages.get(&from) {
                process.pages.insert(found + page * unit, content);
                if keeps {
                    let left = process.pages.get_mut(&from).unwrap();
                    (left.value, left.locked) = (0, false);
                }
            } else if k.vma_at(k.obj(process.mm), found + page * unit).is_some() {
                // A hole replaces nothing.
                let kept = before.pages[&(found + page * unit)];
                process.pages.insert(found + page * unit, kept);
            }
        }
    }
    for page in pages..new_pages {
        let grown = Page {
            value: 0,
            ..grows_with
        };
        process.pages.insert(found + page * unit, grown);
    }
    if keeps {
        // The whole VMA is unlocked, not only what has moved.
        for (&gva, page) in &mut process.pages {
            let vma = k.vma_at(k.obj(process.mm), gva).unwrap();
            page.locked = k.obj(vma).flags.get() & abi::objects::vma_flags::LOCKED != 0;
        }
    }
    Ok(())
}

fn run(cmdline: &str, steps: &[Step]) -> Result<(), TestCaseError> {
    run_with(cmdline, (2 << 20, usize::MAX, PAGE), steps)
}

/// The same with so much memory, of which no more than so many frames are free, in units of so many bytes.
fn run_with(
    cmdline: &str,
    (memory, frames, page): (u64, usize, u64),
    steps: &[Step],
) -> Result<(), TestCaseError> {
    let machine = Machine::with_memory(memory, CPUS, cmdline);
    let kernel = machine.kernel();
    let take = || kernel.alloc_free_frame(FrameKind::Stack).ok();
    let spare = (kernel.root().free_frames.get() as usize).saturating_sub(frames);
    let taken: Vec<_> = std::iter::from_fn(take).take(spare).collect();
    let first = kernel.mm_create().unwrap();
    if kernel.has_groups() {
        for number in 1..=GROUPS {
            let created = kernel.group_create(number / 2, MemGroup::NO_LIMIT);
            prop_assert_eq!(created, Ok(number));
        }
        kernel.group_move(first, GROUPS, 0).unwrap();
    }
    let mut world = World {
        kernel,
        processes: [Some(Process::new(first, page)), None, None],
    };
    for step in steps {
        world.step(step)?;
        audit(kernel);
        world.count_huge();
    }
    world.check_contents()?;
    let left: Vec<_> = world.processes.iter().flatten().map(|p| p.mm).collect();
    taken
        .into_iter()
        .for_each(|frame| kernel.free_frames(frame));
    teardown(kernel, &left);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(super::cases(150)))]

    #[test]
    fn programs_see_what_they_must(
        steps in steps(),
        cmdline in prop_oneof![
            Just(""),
            Just("gather_batch=1 flush_ceiling=0 pcp_batch=0"),
            Just("gather_batch=3 flush_ceiling=100 fault_around=8 poison=off"),
            Just("pcid=on"),
            Just("pcid=on asids=2 flush_ceiling=2"),
            Just("pcid=on asids=1 gather_batch=3"),
            Just("groups=on"),
        ],
    ) {
        run(cmdline, &steps)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(super::cases(150)))]

    /// What is reclaimed is what was written when it comes back.
    #[test]
    fn programs_see_what_they_must_in_little_memory(
        steps in steps(),
        frames in 60..100usize,
        cmdline in prop_oneof![
            Just("swap_slots=256 pcp_batch=0"),
            Just("swap_slots=256 pcp_batch=2 swap_readahead=1"),
            Just("swap_slots=256 pcp_batch=1 fault_around=8 gather_batch=2"),
            Just("swap_slots=256 pcp_batch=2 pcid=on asids=2"),
            Just("swap_slots=256 pcp_batch=1 groups=on"),
        ],
    ) {
        run_with(cmdline, (2 << 20, frames, PAGE), &steps)?;
    }
}

/// How many folios of 2 MiB all random programs together had mapped whole at some time.
static HUGE: AtomicU64 = AtomicU64::new(0);

/// The same over 12 MiB, in quarters of 2 MiB.
#[test]
fn programs_see_what_they_must_with_folios_of_2_mib() {
    let cases = super::cases(60);
    let config = ProptestConfig::with_cases(cases);
    let everything = usize::MAX;
    let machine = prop_oneof![
        Just(("thp=always", everything)),
        Just(("thp=madvise", everything)),
        Just((
            "thp=always gather_batch=3 flush_ceiling=1024 poison=off",
            everything
        )),
        Just(("thp=always pcid=on asids=2", everything)),
        Just(("thp=always groups=on", everything)),
        // Not enough for a process that uses all of its memory.
        Just(("thp=always swap_slots=8192 pcp_batch=2", 2500)),
    ];
    let result = TestRunner::new(config).run(&(steps(), machine), |(steps, machine)| {
        // Locked memory would have to fit its limit, and a vector has a byte for each page.
        let is_left_out = |op: &Op| matches!(op, Op::Lock(..) | Op::Mincore(..));
        let steps = steps.into_iter().filter(|(_, _, op)| !is_left_out(op));
        // Four times 2 MiB to begin with: what random mappings leave room for is little.
        let area = Op::Map {
            at: 2,
            pages: 16,
            prot: prot::READ | prot::WRITE,
            extra: map::FIXED,
        };
        let begin = [area, Op::Advise(2, 16, advice::HUGEPAGE)].map(|op| (0, 0, op));
        let steps: Vec<_> = begin.into_iter().chain(steps).collect();
        let (cmdline, frames) = machine;
        run_with(cmdline, (64 << 20, frames, QUARTER), &steps)
    });
    result.unwrap_or_else(|error| panic!("{error}"));
    // Of a few cases, as under valgrind, none may.
    assert!(
        cases < 20 || HUGE.load(Relaxed) > u64::from(cases),
        "2 MiB are hardly ever mapped whole"
    );
}

/// The random programs with the audit are a net: mistakes do not slip through it.
#[test]
fn random_programs_find_missing_flushes() {
    for bug in [
        "shootdown-skip-remote",
        "fork-no-writeprotect-flush",
        "pcid-reuse-no-flush pcid=on asids=2",
        "pcid-skip-stale-gen pcid=on",
    ] {
        let buggy = format!("bug={bug}");
        let caught = super::some_case_fails(&steps(), |steps| run(&buggy, &steps));
        assert!(caught, "{bug} stays hidden");
    }
}
