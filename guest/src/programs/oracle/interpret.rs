//! The interpreter of cases: one for all executors, so that what differs is the kernels.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

use abi::layout::PAGE_SIZE;
use abi::oracle::{ARENA, Arg, MAX_SLOTS, Mode, Op, OpKind, Returns, TOP};
use abi::syscall::{Errno, encode, nr, rlimit};

use super::blob::Case;
use super::limits;
use super::words::{BUS, FAULT, Pages, Words, for_each_area, seen};
use crate::sys::{Fault, Signal, Sys};

/// Results that can be used later.
const KEPT: usize = 8;
/// Pages of each VMA whose first word is looked at in the end.
const PAGES: u64 = 24;
/// Pages of each open file that is looked at then.
const FILE_PAGES: u64 = 8;
/// A name of files.
const NAME: u64 = u64::from_le_bytes(*b"oracle\0\0");
/// Access bits of a page that can be read: x86 has no pages that can be written but not read. One that can
/// only be executed is left alone, as what a load of it does depends on protection keys.
pub(super) const READABLE: u64 = 3;

/// Gets the observations.
pub(crate) trait Sink<S> {
    /// What the observation of `step` says from word `at` of the map on of a piece of a VMA (its first address and its pages), of which
    /// mincore has found `resident` in memory.
    fn pages(&self, step: usize, at: usize, piece: (u64, u64), resident: u64) -> Pages;
    /// What word `at` of the map is on Linux at `step`, which must be known where pages are said to be elsewhere.
    fn on_linux(&self, step: usize, at: usize) -> u64;
    /// What step number `step` showed. False ends the process.
    fn observe(&self, sys: &S, step: usize, words: &[u64]) -> bool;
}

/// How a process of a case went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// To its end.
    Alike,
    /// The sink ended it or one that it had forked.
    Differs,
}

/// What the arguments of steps are relative to. Copied by fork.
#[derive(Clone, Copy, Debug)]
pub(crate) struct State {
    heap: u64,
    placed: [u64; KEPT],
    files: [u64; KEPT],
    slots: Slots,
    /// Bytes that it has of what is limited.
    used: limits::Used,
}

/// Where a process keeps results by number. Executors whose processes share the program's own memory have one for all of
/// them: a slot is used after it was written, and what a child has written its parent does not use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slots([&'static [AtomicU64]; MAX_SLOTS / SLOTS_OF_PAGE]);

/// Slots of a page, which is as much as all executors have in one piece.
const SLOTS_OF_PAGE: usize = PAGE_SIZE as usize / 8;

impl Slots {
    pub(super) fn new<S: Sys>(sys: &S) -> Result<Self, Errno> {
        let mut pages = [[].as_slice(); MAX_SLOTS / SLOTS_OF_PAGE];
        for page in &mut pages {
            *page = sys.words(SLOTS_OF_PAGE)?;
        }
        Ok(Self(pages))
    }

    fn at(&self, index: u32) -> &AtomicU64 {
        let index = index as usize;
        &self.0[index / SLOTS_OF_PAGE][index % SLOTS_OF_PAGE]
    }
}

impl State {
    pub(super) fn new(heap: u64, slots: Slots, used: limits::Used) -> Self {
        Self {
            heap,
            placed: [ARENA; KEPT],
            files: [u64::MAX; KEPT],
            slots,
            used,
        }
    }

    fn value(&self, arg: &Arg) -> u64 {
        let index = arg.index as usize % KEPT;
        let base = match Mode::from_u32(arg.mode) {
            Some(Mode::Arena) => ARENA,
            Some(Mode::Placed) => self.placed[index],
            Some(Mode::Heap) => self.heap,
            Some(Mode::Top) => TOP,
            Some(Mode::File) => self.files[index],
            Some(Mode::Slot) => match self.slots.at(arg.index).load(Relaxed) {
                0 => ARENA,
                kept => kept,
            },
            // What only a call can use ([`call`]).
            Some(Mode::Name | Mode::Raw) | None => 0,
        };
        base.wrapping_add(arg.value)
    }

    /// Keeps a result for later, and says what is compared of it.
    fn take(&mut self, op: &Op, result: u64) -> u64 {
        let keep = |all: &mut [u64; KEPT]| {
            all.rotate_right(1);
            all[0] = result;
        };
        match Returns::from_u32(op.returns) {
            Some(Returns::Place) => keep(&mut self.placed),
            Some(Returns::File) => {
                keep(&mut self.files);
                return 0;
            }
            Some(Returns::Slot) => self.slots.at(op.slot).store(result, Relaxed),
            Some(Returns::FileSlot) => {
                self.slots.at(op.slot).store(result, Relaxed);
                return 0;
            }
            Some(Returns::Address | Returns::Number) | None => {}
        }
        seen(self.heap, result)
    }

    /// The call has failed: what its slot keeps may be a child's.
    fn keep_nothing(&self, op: &Op) {
        if let Some(Returns::Slot | Returns::FileSlot) = Returns::from_u32(op.returns) {
            self.slots.at(op.slot).store(0, Relaxed);
        }
    }

    /// Forgets a descriptor that was closed: who gets its number next is nobody's business either.
    fn forget(&mut self, fd: u64) {
        for file in &mut self.files {
            if *file == fd {
                *file = u64::MAX;
            }
        }
    }
}

/// Executes `case` in this process and those that it forks.
pub(crate) fn run<S: Sys>(
    sys: &S,
    sink: &impl Sink<S>,
    case: Case<'_>,
    mut state: State,
) -> Verdict {
    run_range(sys, sink, case, 0, case.len(), &mut state)
}

fn run_range<S: Sys>(
    sys: &S,
    sink: &impl Sink<S>,
    case: Case<'_>,
    from: usize,
    to: usize,
    state: &mut State,
) -> Verdict {
    let mut step = from;
    while step < to {
        let op = case.op(step);
        let mut words = Words::new();
        let behind = step + 1 + op.body as usize;
        if op.kind == OpKind::Fork as u32 {
            let copy = *state;
            let child = sys.fork(|sys| {
                let mut state = copy;
                let verdict = run_range(sys, sink, case, step + 1, behind, &mut state);
                i32::from(verdict == Verdict::Differs)
            });
            match child.and_then(|pid| sys.wait(pid)) {
                Ok(status) if status.exited() == Some(1) => return Verdict::Differs,
                Ok(status) => words.push(status.0.into()),
                Err(errno) => words.push(encode(Err(errno))),
            }
        } else {
            execute(sys, &op, state, &mut words);
        }
        words.end_result();
        words.map(
            sys,
            state.heap,
            |at, piece, resident| sink.pages(step, at, piece, resident),
            |at| sink.on_linux(step, at),
        );
        if !sink.observe(sys, step, words.get()) {
            return Verdict::Differs;
        }
        step = behind;
    }
    Verdict::Alike
}

fn execute<S: Sys>(sys: &S, op: &Op, state: &mut State, words: &mut Words) {
    let args = op.args.each_ref().map(|arg| state.value(arg));
    match OpKind::from_u32(op.kind) {
        Some(OpKind::Call) => {
            let result = call(sys, op, args);
            if u64::from(op.nr) == nr::CLOSE && result.is_ok() {
                state.forget(args[0]);
            }
            words.push(match result {
                Ok(value) => state.take(op, value),
                Err(errno) => {
                    state.keep_nothing(op);
                    encode(Err::<u64, Errno>(errno))
                }
            });
        }
        Some(OpKind::Load) => words.push(load(sys, args[0])),
        Some(OpKind::Store) => words.push(sys.write(args[0], args[1]).map_or_else(fault, |()| 0)),
        Some(OpKind::FileLoad) => file_load(sys, args[0], args[1], words),
        Some(OpKind::FileStore) => {
            let word = AtomicU64::new(args[2]);
            let result = transfer(sys, nr::PWRITE64, (args[0], args[1]), &word);
            words.push(encode(result));
        }
        Some(OpKind::Limit) => {
            let bytes = match args[0] {
                rlimit::AS => args[1].wrapping_add(state.used.address_space),
                rlimit::DATA => args[1].wrapping_add(state.used.data),
                _ => args[1],
            };
            words.push(encode(limits::set_soft(sys, args[0], bytes)));
        }
        Some(OpKind::Check) => {
            for page in 0..args[1].min(64) {
                words.push(load(sys, args[0].wrapping_add(page * PAGE_SIZE)));
            }
        }
        Some(OpKind::Contents) => {
            contents(sys, state.heap, words);
            for file in state.files.iter().filter(|file| **file != u64::MAX) {
                for page in 0..FILE_PAGES {
                    file_load(sys, *file, page * PAGE_SIZE, words);
                }
            }
        }
        Some(OpKind::Fork) | None => {}
    }
}

fn call<S: Sys>(sys: &S, op: &Op, mut args: [u64; 6]) -> Result<u64, Errno> {
    let is_name = |arg: &Arg| arg.mode == Mode::Name as u32;
    match op.args.iter().position(is_name) {
        None => sys.syscall(op.nr.into(), args),
        Some(place) => sys.lend(&[AtomicU64::new(NAME)], |name| {
            args[place] = name;
            sys.syscall(op.nr.into(), args)
        }),
    }
}

fn load<S: Sys>(sys: &S, gva: u64) -> u64 {
    sys.read(gva).unwrap_or_else(fault)
}

pub(super) fn fault(fault: Fault) -> u64 {
    match fault.signal {
        Signal::Segv => FAULT,
        Signal::Bus => BUS,
    }
}

/// How many bytes were read, and what.
fn file_load<S: Sys>(sys: &S, file: u64, offset: u64, words: &mut Words) {
    let word = AtomicU64::new(0);
    let result = transfer(sys, nr::PREAD64, (file, offset), &word);
    words.push(encode(result));
    words.push(word.load(Relaxed));
}

fn transfer<S: Sys>(
    sys: &S,
    call: u64,
    (file, offset): (u64, u64),
    word: &AtomicU64,
) -> Result<u64, Errno> {
    sys.lend(core::slice::from_ref(word), |address| {
        sys.syscall(call, [file, address, 8, offset, 0, 0])
    })
}

/// The words that are not 0, with their addresses.
fn contents<S: Sys>(sys: &S, heap: u64, words: &mut Words) {
    for_each_area(sys, heap, |area| {
        if area.flags & READABLE == 0 {
            return;
        }
        let pages = ((area.end - area.start) / PAGE_SIZE).min(PAGES);
        for gva in (0..pages).map(|page| area.start + page * PAGE_SIZE) {
            let word = load(sys, gva);
            if word != 0 {
                words.push(seen(heap, gva));
                words.push(word);
            }
        }
    });
}
