//! One process of a replay: its turnstile, its table of watched pages, its tasks.
#![allow(unsafe_code, reason = "arguments of threads are addresses")]

use core::sync::atomic::{AtomicU64, Ordering};

use abi::channel::ReportKind::{ForeignFrame, WrongPermission, WrongResult};
use abi::layout::PAGE_SIZE;
use abi::syscall::{Errno, advice, encode, map, prot};
use abi::trace::{Op, OpKind};

use super::trace::Trace;
use crate::sys::{Sys, Thread, print_line};
use crate::team::Findings;

/// Slot of the heap.
const HEAP: usize = 0;
/// Mappings that a waiting task looks at: the last ones.
const RECENT: usize = 16;
/// Turns that a waiting task reads pages before it sleeps.
const TURNS: u64 = 512;

/// A word of [`Process::watched`]: protection, whether it is mapped, whether it was written and by
/// which record.
#[derive(Clone, Copy)]
struct Page(u64);

impl Page {
    const MAPPED: u64 = 1 << 3;
    const WRITTEN: u64 = 1 << 4;
    const RECORD: u32 = 8;

    fn mapped(prot: u64) -> Self {
        Self(prot & 7 | Self::MAPPED)
    }
    fn is_mapped(self) -> bool {
        self.0 & Self::MAPPED != 0
    }
    fn is_written(self) -> bool {
        self.0 & Self::WRITTEN != 0
    }
    fn prot(self) -> u64 {
        self.0 & 7
    }
    fn with_prot(self, prot: u64) -> Self {
        Self(self.0 & !7 | prot & 7)
    }
    fn written_by(self, record: usize) -> Self {
        Self(self.0 & 0xff | Self::WRITTEN | (record as u64) << Self::RECORD)
    }
    /// x86 has no pages that can be written but not read.
    fn is_readable(self) -> bool {
        self.is_mapped() && self.0 & (prot::READ | prot::WRITE) != 0
    }
    fn is_writable(self) -> bool {
        self.is_mapped() && self.0 & prot::WRITE != 0
    }
}

/// Tables live in words of the executor, so that fork copies them and threads share them.
pub(super) struct Process<'a> {
    trace: &'a Trace<'a>,
    copy: usize,
    touch: u64,
    /// Record whose turn it is. Less than 2^20, so the futex compares all of it.
    turn: &'static AtomicU64,
    /// Odd while a call or a write is under way.
    changes: &'static AtomicU64,
    /// By task: the process that it belongs to, numbered by the task that leads it.
    leader: &'static [AtomicU64],
    /// By slot: where it lies, 0 where it does not.
    base: &'static [AtomicU64],
    /// By slot: its pages.
    pages: &'static [AtomicU64],
    /// By slot and number: a [`Page`].
    watched: &'static [AtomicU64],
    /// Slots that were mapped last.
    recent: &'static [AtomicU64],
    /// By task: a [`Thread`] plus 1 or a pid that this process started and has not waited for.
    threads: &'static [AtomicU64],
    children: &'static [AtomicU64],
    /// By task: two words for [`enter`].
    starts: &'static [AtomicU64],
    findings: Findings,
}

impl<'a> Process<'a> {
    /// Executes the whole trace in this process and those that it starts. Returns the exit status.
    pub(super) fn run<S: Sys>(sys: &S, trace: &'a Trace<'a>, copy: usize, touch: u64) -> i32 {
        match Self::new(sys, trace, copy, touch) {
            Ok(process) => process.lead(sys, 0, 0),
            Err(errno) => {
                print_line(
                    sys,
                    format_args!("replay: no memory for its tables: {errno}"),
                );
                sys.report(WrongResult, 0, 0, encode(Err(errno)));
                1
            }
        }
    }

    fn new<S: Sys>(sys: &S, trace: &'a Trace<'a>, copy: usize, touch: u64) -> Result<Self, Errno> {
        let scalars = sys.words(2)?;
        let process = Self {
            trace,
            copy,
            touch,
            turn: &scalars[0],
            changes: &scalars[1],
            leader: sys.words(trace.tasks)?,
            base: sys.words(trace.slots)?,
            pages: sys.words(trace.slots)?,
            watched: sys.words(trace.slots * touch as usize)?,
            recent: sys.words(RECENT)?,
            threads: sys.words(trace.tasks)?,
            children: sys.words(trace.tasks)?,
            starts: sys.words(2 * trace.tasks)?,
            findings: Findings::default(),
        };
        for op in (0..trace.len()).map(|record| trace.op(record)) {
            let slot = op.slot as usize;
            match Trace::kind(&op) {
                OpKind::Map => store(&process.pages[slot], op.len.div_ceil(PAGE_SIZE)),
                OpKind::Brk => {
                    let pages = op
                        .offset
                        .div_ceil(PAGE_SIZE)
                        .max(load(&process.pages[HEAP]));
                    store(&process.pages[HEAP], pages);
                }
                OpKind::Thread => {
                    let leader = load(&process.leader[op.task as usize]);
                    store(&process.leader[op.len as usize], leader);
                }
                OpKind::Fork => store(&process.leader[op.len as usize], op.len),
                _ => {}
            }
        }
        let start = sys.brk(0)?;
        let heap = start.next_multiple_of(PAGE_SIZE);
        if sys.brk(heap)? == heap && trace.slots > HEAP {
            store(&process.base[HEAP], heap);
        }
        Ok(process)
    }

    /// Executes `task`, the first of its process, from record `from` on, and waits for all that the
    /// process started.
    fn lead<S: Sys>(&self, sys: &S, task: usize, from: usize) -> i32 {
        store(self.turn, self.next_record(task, from) as u64);
        self.work(sys, task, from);
        for thread in self.threads {
            match load(thread) {
                0 => {}
                thread => sys.join(Thread(thread - 1)),
            }
        }
        for child in self.children {
            match load(child) {
                0 => {}
                pid => self.findings.reap(sys, pid),
            }
        }
        self.findings.status()
    }

    /// Executes the records of `task`, each in its turn.
    fn work<S: Sys>(&self, sys: &S, task: usize, from: usize) {
        let cpu = (self.copy + task) % sys.nr_cpus();
        if let Err(errno) = sys.set_affinity(cpu) {
            self.findings
                .report(sys, WrongResult, 0, 0, encode(Err(errno)));
        }
        for record in from..self.trace.len() {
            let op = self.trace.op(record);
            if op.task as usize != task {
                continue;
            }
            self.wait_for_turn(sys, record, task);
            self.changes.fetch_add(1, Ordering::SeqCst);
            self.execute(sys, record, &op);
            self.changes.fetch_add(1, Ordering::SeqCst);
            self.pass_turn(sys, task, record + 1);
            if Trace::kind(&op) == OpKind::Exit {
                return;
            }
        }
    }

    /// The first record from `from` on of a task of the same process as `task`; the trace's end
    /// where there is none.
    fn next_record(&self, task: usize, from: usize) -> usize {
        let process = load(&self.leader[task]);
        (from..self.trace.len())
            .find(|record| load(&self.leader[self.trace.op(*record).task as usize]) == process)
            .unwrap_or(self.trace.len())
    }

    fn pass_turn<S: Sys>(&self, sys: &S, task: usize, from: usize) {
        let next = self.next_record(task, from);
        self.turn.store(next as u64, Ordering::Release);
        if next < self.trace.len() && self.trace.op(next).task as usize != task {
            sys.futex_wake(self.turn);
        }
    }

    fn wait_for_turn<S: Sys>(&self, sys: &S, record: usize, task: usize) {
        let mut turns = 0;
        let mut random = (record * self.trace.tasks + task) as u64;
        loop {
            let turn = self.turn.load(Ordering::Acquire);
            if turn == record as u64 {
                return;
            }
            turns += 1;
            if turns > TURNS {
                sys.futex_wait(self.turn, turn as u32);
            } else if turns % 16 == 0 {
                sys.yield_now();
            } else {
                random = mix(random);
                self.look(sys, random);
            }
        }
    }

    /// Reads one watched page of a recent mapping, if nobody changes anything meanwhile.
    fn look<S: Sys>(&self, sys: &S, random: u64) {
        let before = self.changes.load(Ordering::SeqCst);
        if before % 2 == 1 || self.touch == 0 {
            return sys.relax();
        }
        let slot = load(&self.recent[random as usize % RECENT]) as usize;
        let number = random >> 32 & 0xffff;
        let Some((gva, index)) = self.place(slot, number % self.touch) else {
            return sys.relax();
        };
        let page = Page(load(&self.watched[index]));
        if !page.is_readable() {
            return sys.relax();
        }
        let result = sys.read(gva);
        if self.changes.load(Ordering::SeqCst) == before {
            self.judge(sys, gva, self.content(index, page), result.ok());
        }
    }

    fn judge<S: Sys>(&self, sys: &S, gva: u64, expected: u64, found: Option<u64>) {
        match found {
            Some(found) if found == expected => {}
            Some(found) => self
                .findings
                .report(sys, ForeignFrame, gva, expected, found),
            None => self.findings.report(sys, WrongPermission, gva, expected, 0),
        }
    }

    /// What a watched page holds.
    fn content(&self, index: usize, page: Page) -> u64 {
        if page.is_written() {
            mix(mix(index as u64 ^ (self.copy as u64) << 40) ^ page.0 >> Page::RECORD) | 1
        } else {
            0
        }
    }

    /// Address and index in [`Process::watched`] of watched page `number` of `slot`, if there is one.
    fn place(&self, slot: usize, number: u64) -> Option<(u64, usize)> {
        let base = load(self.base.get(slot)?);
        let page = self.page(slot, number)?;
        (base != 0).then(|| {
            (
                base + page * PAGE_SIZE,
                slot * self.touch as usize + number as usize,
            )
        })
    }

    /// Page of the slot that is its watched page `number`: all of a small slot, else evenly spread.
    fn page(&self, slot: usize, number: u64) -> Option<u64> {
        let pages = load(&self.pages[slot]);
        if pages <= self.touch {
            (number < pages).then_some(number)
        } else {
            Some(number * pages / self.touch)
        }
    }

    /// Address and index of the watched pages that lie in a record's range.
    fn range(&self, op: &Op) -> impl Iterator<Item = (u64, usize)> {
        let slot = op.slot as usize;
        let bytes = op.offset..op.offset + op.len;
        (0..self.touch)
            .filter(move |number| {
                self.page(slot, *number)
                    .is_some_and(|page| bytes.contains(&(page * PAGE_SIZE)))
            })
            .filter_map(move |number| self.place(slot, number))
    }

    /// Changes the state of the watched pages of a record's range.
    fn update(&self, op: &Op, change: impl Fn(Page) -> Page) {
        for (_, index) in self.range(op) {
            let page = Page(load(&self.watched[index]));
            store(&self.watched[index], change(page).0);
        }
    }

    /// Checks the watched pages of a record's range against their state, and writes those that may
    /// be written and were not.
    fn visit<S: Sys>(&self, sys: &S, record: usize, op: &Op) {
        for (gva, index) in self.range(op) {
            let page = Page(load(&self.watched[index]));
            if page.is_readable() {
                self.judge(sys, gva, self.content(index, page), sys.read(gva).ok());
            } else if page.is_mapped() && page.prot() == prot::NONE {
                self.refused(sys, gva, sys.read(gva).ok());
            }
            if page.is_writable() && !page.is_written() {
                let page = page.written_by(record);
                let value = self.content(index, page);
                if sys.write(gva, value).is_err() {
                    self.findings.report(sys, WrongPermission, gva, value, 0);
                }
                store(&self.watched[index], page.0);
                self.judge(sys, gva, value, sys.read(gva).ok());
            } else if page.is_mapped() && !page.is_writable() {
                // A write that goes through would also change what the page must hold, so it writes
                // what is there.
                let content = self.content(index, page);
                self.refused(sys, gva, sys.write(gva, content).ok().map(|()| content));
            }
        }
    }

    fn refused<S: Sys>(&self, sys: &S, gva: u64, found: Option<u64>) {
        if let Some(found) = found {
            self.findings.report(sys, WrongPermission, gva, 0, found);
        }
    }

    fn execute<S: Sys>(&self, sys: &S, record: usize, op: &Op) {
        let slot = op.slot as usize;
        let base = load(&self.base[slot]);
        let (gva, prot) = (base + op.offset, op.prot.into());
        let needs_base = !matches!(
            Trace::kind(op),
            OpKind::Map | OpKind::Thread | OpKind::Fork | OpKind::Exit
        );
        if needs_base && base == 0 {
            // Its mmap failed, and was reported.
            return;
        }
        match Trace::kind(op) {
            OpKind::Map => {
                let result = sys.mmap(0, op.len, prot, op.flags);
                if let Ok(base) = result {
                    store(&self.base[slot], base);
                    store(&self.recent[record % RECENT], slot as u64);
                }
                if self.check(sys, op, "mmap", result, |base| base % PAGE_SIZE == 0) {
                    self.update(op, |_| Page::mapped(prot));
                    self.visit(sys, record, op);
                }
            }
            OpKind::MapFixed => {
                self.visit(sys, record, op);
                let result = sys.mmap(gva, op.len, prot, op.flags | map::FIXED);
                if self.check(sys, op, "mmap", result, |base| base == gva) {
                    self.update(op, |_| Page::mapped(prot));
                    self.visit(sys, record, op);
                }
            }
            OpKind::Unmap => {
                self.visit(sys, record, op);
                if self.check(sys, op, "munmap", sys.munmap(gva, op.len), |zero| zero == 0) {
                    self.update(op, |_| Page(0));
                }
            }
            OpKind::Protect => {
                self.visit(sys, record, op);
                let result = sys.mprotect(gva, op.len, prot);
                if self.check(sys, op, "mprotect", result, |zero| zero == 0) {
                    self.update(op, |page| page.with_prot(prot));
                    self.visit(sys, record, op);
                }
            }
            OpKind::Advise => {
                self.visit(sys, record, op);
                let result = sys.madvise(gva, op.len, op.flags);
                if self.check(sys, op, "madvise", result, |zero| zero == 0) {
                    if op.flags == advice::DONTNEED {
                        self.update(op, |page| Page(page.0 & (7 | Page::MAPPED)));
                    }
                    self.visit(sys, record, op);
                }
            }
            OpKind::Brk => self.brk(sys, record, op, base),
            OpKind::Thread => self.start_thread(sys, record, op),
            OpKind::Fork => self.start_process(sys, record, op),
            OpKind::Exit => {}
        }
    }

    fn brk<S: Sys>(&self, sys: &S, record: usize, op: &Op, heap: u64) {
        let bytes = load(&self.pages[HEAP]) * PAGE_SIZE;
        let kept = Op {
            offset: 0,
            len: op.offset,
            ..*op
        };
        let dropped_from = op.offset.next_multiple_of(PAGE_SIZE);
        let dropped = Op {
            offset: dropped_from,
            len: bytes.saturating_sub(dropped_from),
            ..*op
        };
        self.visit(sys, record, &dropped);
        let end = heap + op.offset;
        if self.check(sys, op, "brk", sys.brk(end), |found| found == end) {
            self.update(&dropped, |_| Page(0));
            self.update(&kept, |page| {
                if page.is_mapped() {
                    page
                } else {
                    Page::mapped(prot::READ | prot::WRITE)
                }
            });
            store(&self.recent[record % RECENT], HEAP as u64);
            self.visit(sys, record, &kept);
        }
    }

    fn start_thread<S: Sys>(&self, sys: &S, record: usize, op: &Op) {
        let task = op.len as usize;
        let start = &self.starts[2 * task..2 * task + 2];
        store(
            &start[0],
            core::ptr::from_ref(self).expose_provenance() as u64,
        );
        store(&start[1], (task as u64) << 32 | (record as u64 + 1));
        let arg = start.as_ptr().expose_provenance() as u64;
        let result = sys.spawn(enter::<S>, arg).map(|thread| thread.0);
        if let Ok(thread) = result {
            store(&self.threads[task], thread + 1);
        }
        self.check(sys, op, "clone", result, |_| true);
    }

    fn start_process<S: Sys>(&self, sys: &S, record: usize, op: &Op) {
        let task = op.len as usize;
        let result = sys.fork(|sys| {
            // The copy has one thread and no children yet; the call that made it is over.
            self.threads
                .iter()
                .chain(self.children)
                .for_each(|word| store(word, 0));
            self.changes.fetch_add(1, Ordering::SeqCst);
            self.lead(sys, task, record + 1)
        });
        if let Ok(pid) = result {
            store(&self.children[task], pid);
        }
        self.check(sys, op, "fork", result, |_| true);
    }

    /// Reports a result that the recording did not have. Returns whether it was right.
    fn check<S: Sys>(
        &self,
        sys: &S,
        op: &Op,
        call: &str,
        result: Result<u64, Errno>,
        right: impl Fn(u64) -> bool,
    ) -> bool {
        let found = encode(result);
        if result.is_ok_and(right) {
            return true;
        }
        let line = op.line;
        print_line(
            sys,
            format_args!(
                "replay: line {line}: {call} gave {result:x?} where the recording succeeded"
            ),
        );
        let gva = load(&self.base[op.slot as usize]) + op.offset;
        self.findings.report(sys, WrongResult, gva, line, found);
        false
    }
}

fn enter<S: Sys>(sys: &S, arg: u64) {
    let start = core::ptr::with_exposed_provenance::<[AtomicU64; 2]>(arg as usize);
    // SAFETY: `start_thread` passed two words of `Process::starts`, which live for good.
    let [process, position] = unsafe { &*start };
    let process = core::ptr::with_exposed_provenance::<Process<'_>>(load(process) as usize);
    // SAFETY: stored by `start_thread`. The process lies on the stack of its first thread or, after a
    // fork, at the same address in the copy; `lead` joins this thread before that frame ends. It is
    // only read, and all that changes in it is atomic.
    let process = unsafe { &*process };
    let position = load(position);
    process.work(sys, (position >> 32) as usize, position as u32 as usize);
}

fn load(word: &AtomicU64) -> u64 {
    word.load(Ordering::Relaxed)
}

fn store(word: &AtomicU64, value: u64) {
    word.store(value, Ordering::Relaxed);
}

/// SplitMix64's finaliser (Steele, Lea, Flood 2014).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}
