//! `bench`: how long one operation takes, in ticks of the time-stamp counter, on whatever executes it.
//!
//! Every round does the operation once, alone in its process, on memory that the program has prepared; only the
//! operation itself is timed. The result is one line: the operation, how many rounds, and the least, the median, the
//! 90th percentile and the greatest time. Memory is kept in 4 KiB pages wherever the kernel has larger ones.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

use abi::layout::PAGE_SIZE;
use abi::syscall::{Errno, advice, map, mremap, prot};

use super::{Data, Program, SUBJECT_GVA};
use crate::args::{Arg, Args};
use crate::sys::{ANONYMOUS, Sys, print_line};

pub(super) const PROGRAM: Program = Program {
    name: "bench",
    help: "times one operation of the kernel again and again",
    args: &[
        Arg {
            name: "op",
            default: "getpid|fault|map|map-512|protect|fork|cow|move|dontneed|lookup",
            range: 0..=Op::ALL.len() as u64 - 1,
            help: "what is timed",
        },
        Arg {
            name: "rounds",
            default: "200",
            range: 0..=MAX_ROUNDS,
            help: "how often",
        },
        Arg {
            name: "prepared",
            default: "0",
            range: 0..=MAX_ROUNDS,
            help: "for how many rounds memory is prepared at least",
        },
    ],
    data: Data::Ignored,
    has_setup: true,
};

/// Most rounds: each may need a page of its own.
const MAX_ROUNDS: u64 = 4096;
/// Pages that one table maps.
const TABLE_PAGES: u64 = 512;
/// Pages of the process that is forked.
const FORKED_PAGES: u64 = 1000;
/// VMAs among which one is looked up; every other one is written.
const VMAS: u64 = 1000;

const RW: u64 = prot::READ | prot::WRITE;

/// An operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// A system call that does nothing: what every other one costs besides.
    Getpid,
    /// A write to an anonymous page for the first time.
    Fault,
    /// mmap of a populated page, and munmap.
    Map,
    /// The same of 512 pages.
    Map512,
    /// mprotect that splits a VMA, and one that merges it again.
    Protect,
    /// fork of a process with 1,000 pages of its own.
    Fork,
    /// The first write to a page after fork.
    Cow,
    /// mremap of 512 pages, a whole table, to another place.
    Move,
    /// madvise(MADV_DONTNEED) of one page.
    DontNeed,
    /// As `fault`, in one of 1,000 VMAs.
    Lookup,
}

impl Op {
    /// Every operation, in the order of the argument's words.
    pub const ALL: &[Self] = &[
        Self::Getpid,
        Self::Fault,
        Self::Map,
        Self::Map512,
        Self::Protect,
        Self::Fork,
        Self::Cow,
        Self::Move,
        Self::DontNeed,
        Self::Lookup,
    ];

    /// The argument's word.
    #[must_use]
    pub fn name(self) -> &'static str {
        let mut words = PROGRAM.args[0].default.split('|');
        words.nth(self as usize).unwrap_or("?")
    }

    /// What is timed, for a table.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::Getpid => "getpid",
            Self::Fault => "first write to a page",
            Self::Map => "mmap + munmap of 1 page, populated",
            Self::Map512 => "mmap + munmap of 512 pages, populated",
            Self::Protect => "mprotect: split + merge",
            Self::Fork => "fork with 1,000 pages",
            Self::Cow => "copy on write",
            Self::Move => "mremap of 512 pages",
            Self::DontNeed => "MADV_DONTNEED of 1 page",
            Self::Lookup => "first write, among 1,000 VMAs",
        }
    }

    /// Most rounds that there is memory for.
    #[must_use]
    pub fn most_rounds(self) -> u64 {
        match self {
            Self::Lookup => VMAS / 2,
            _ => MAX_ROUNDS,
        }
    }
}

pub(super) fn run<S: Sys>(sys: &S, args: &Args<'_>) -> i32 {
    let op = Op::ALL[args.number("op") as usize];
    let rounds = args.number("rounds").min(op.most_rounds());
    let prepared = args.number("prepared").max(rounds);
    match measure(sys, op, rounds, prepared) {
        Ok(status) => status,
        Err(errno) => {
            print_line(sys, format_args!("bench {}: {errno}", op.name()));
            1
        }
    }
}

/// The exit status: 0 where the line was printed, by a child too.
fn measure<S: Sys>(sys: &S, op: Op, rounds: u64, prepared: u64) -> Result<i32, Errno> {
    let bench = Bench {
        sys,
        op,
        samples: sys.words(rounds as usize)?,
        rounds,
    };
    match op {
        Op::Getpid => bench.each(|_| sys.getpid()),
        Op::Fault => {
            bench.warm(prepared)?;
            bench.map(prepared, 0)?;
            bench.each(|round| bench.touch(round))
        }
        Op::Map | Op::Map512 => {
            let pages = if op == Op::Map { 1 } else { TABLE_PAGES };
            bench.each(|_| {
                bench.map(pages, map::POPULATE)?;
                sys.munmap(SUBJECT_GVA, pages * PAGE_SIZE)
            })
        }
        Op::Protect => {
            bench.map(3, map::POPULATE)?;
            bench.each(|_| {
                sys.mprotect(page(1), PAGE_SIZE, prot::READ)?;
                sys.mprotect(page(1), PAGE_SIZE, RW)
            })
        }
        Op::Fork => {
            bench.map(FORKED_PAGES, map::POPULATE)?;
            let reap = |child| sys.wait(child).map(|_| ());
            bench.between(|| Ok(()), |_| sys.fork(|_| 0), reap)
        }
        Op::Cow => {
            bench.warm(2 * prepared)?;
            bench.map(prepared, map::POPULATE)?;
            // The parent waits, and keeps its pages meanwhile.
            let child = sys.fork(|_| bench.each(|round| bench.touch(round)).unwrap_or(1))?;
            let status = sys.wait(child)?;
            Ok(status.exited().map_or(1, u32::cast_signed))
        }
        Op::Move => {
            bench.map(TABLE_PAGES, map::POPULATE)?;
            let bytes = TABLE_PAGES * PAGE_SIZE;
            let place = |round: u64| page(round % 2 * 2 * TABLE_PAGES);
            bench.each(|round| {
                let (flags, to) = (mremap::MAYMOVE | mremap::FIXED, place(round + 1));
                sys.mremap(place(round), (bytes, bytes), flags, to)
            })
        }
        Op::DontNeed => {
            bench.map(1, 0)?;
            let prepare = || bench.touch(0).map(|_| ());
            let drop_page = |_| sys.madvise(page(0), PAGE_SIZE, advice::DONTNEED);
            bench.between(prepare, drop_page, |_| Ok(()))
        }
        Op::Lookup => {
            bench.warm(VMAS)?;
            bench.map(VMAS, 0)?;
            for index in (1..VMAS).step_by(2) {
                sys.mprotect(page(index), PAGE_SIZE, prot::READ)?;
            }
            // All over the range: 7 and the number of writable VMAs have no common divisor.
            bench.each(|round| bench.touch(2 * (round * 7 % (VMAS / 2))))
        }
    }
}

fn page(index: u64) -> u64 {
    SUBJECT_GVA + index * PAGE_SIZE
}

struct Bench<'s, S> {
    sys: &'s S,
    op: Op,
    samples: &'static [AtomicU64],
    rounds: u64,
}

impl<S: Sys> Bench<'_, S> {
    /// So many pages of memory under test, in 4 KiB pages on every Linux that asks first.
    fn map(&self, pages: u64, flags: u64) -> Result<u64, Errno> {
        let flags = ANONYMOUS | map::FIXED | map::STACK | flags;
        self.sys
            .mmap(SUBJECT_GVA, pages.max(1) * PAGE_SIZE, RW, flags)
    }

    /// Uses as many frames and gives them back: those of a virtual machine may never have been used before, and
    /// then its host takes a fault too.
    fn warm(&self, pages: u64) -> Result<(), Errno> {
        self.map(pages, map::POPULATE)?;
        self.sys.munmap(SUBJECT_GVA, pages.max(1) * PAGE_SIZE)?;
        Ok(())
    }

    fn touch(&self, index: u64) -> Result<u64, Errno> {
        let gva = page(index);
        match self.sys.write(gva, gva) {
            Ok(()) => Ok(0),
            Err(_) => Err(Errno::EFAULT),
        }
    }

    /// Times every round, and prints.
    fn each(&self, timed: impl FnMut(u64) -> Result<u64, Errno>) -> Result<i32, Errno> {
        self.between(|| Ok(()), timed, |_| Ok(()))
    }

    /// Likewise, with something untimed before and after each.
    fn between(
        &self,
        mut prepare: impl FnMut() -> Result<(), Errno>,
        mut timed: impl FnMut(u64) -> Result<u64, Errno>,
        mut after: impl FnMut(u64) -> Result<(), Errno>,
    ) -> Result<i32, Errno> {
        for round in 0..self.rounds {
            prepare()?;
            let started = self.sys.ticks();
            let result = timed(round)?;
            let ticks = self.sys.ticks().wrapping_sub(started);
            self.samples[round as usize].store(ticks, Relaxed);
            after(result)?;
        }
        self.print();
        Ok(0)
    }

    fn print(&self) {
        let (name, count) = (self.op.name(), self.rounds as usize);
        let samples = &self.samples[..count];
        sort(samples);
        let at = |part: usize| {
            samples
                .get(count * part / 100)
                .map_or(0, |it| it.load(Relaxed))
        };
        let last = samples.last().map_or(0, |it| it.load(Relaxed));
        print_line(
            self.sys,
            format_args!(
                "bench {name} {count} {} {} {} {last}",
                at(0),
                at(50),
                at(90)
            ),
        );
    }
}

/// Shell sort: in place, and words that threads could share have no other.
fn sort(words: &[AtomicU64]) {
    for gap in [701, 301, 132, 57, 23, 10, 4, 1] {
        for from in gap..words.len() {
            let (value, mut to) = (words[from].load(Relaxed), from);
            while to >= gap && words[to - gap].load(Relaxed) > value {
                words[to].store(words[to - gap].load(Relaxed), Relaxed);
                to -= gap;
            }
            words[to].store(value, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::native;

    #[test]
    fn every_operation_is_timed_and_told_in_order() {
        for op in Op::ALL {
            let args = format!("op={}\0rounds=20", op.name());
            let outcome = native::run("bench", &args, None).unwrap();
            assert_eq!(outcome.status, 0, "{}", outcome.text);
            let words: Vec<&str> = outcome.text.split_whitespace().collect();
            assert_eq!(words[..3], ["bench", op.name(), "20"], "{}", outcome.text);
            let times: Vec<u64> = words[3..]
                .iter()
                .map(|word| word.parse().unwrap())
                .collect();
            assert_eq!(times.len(), 4);
            assert!(times.is_sorted() && times[0] > 0, "{times:?}");
        }
    }

    #[test]
    fn samples_are_sorted() {
        let words: Vec<AtomicU64> = (0..1000u64)
            .map(|i| AtomicU64::new(i * 7919 % 997))
            .collect();
        sort(&words);
        assert!(
            words
                .windows(2)
                .all(|w| w[0].load(Relaxed) <= w[1].load(Relaxed))
        );
    }
}
