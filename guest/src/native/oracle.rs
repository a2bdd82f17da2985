//! Linux's side of the oracle: a process that executes cases, each in a process of its own, and records what they show.
//!
//! It is forked once, with few pages, and prepared once ([`prepare`]); what it forks are the cases. It has no capabilities,
//! so that Linux refuses what it refuses to everybody, and the limits that the guest kernel has. From the
//! fork on it is without threads and never allocates.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::ptr::NonNull;
use std::slice;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use abi::channel::ReportKind;
use abi::oracle::{ARENA, Area, MAX_WORDS, Op};
use abi::syscall::{Errno, decode, rlimit};
use zerocopy::IntoBytes;

use super::{maps, pagemap};
use crate::programs::oracle::{Pages, Sink, State, case_of, prepare, run_case};
use crate::rt::{Rt, Testbed, Tlb, raw_syscall};
use crate::sys::Sys;

/// Words of memory for the steps of a batch of cases, and for what they show.
const STEPS: usize = 1 << 20;
const SHOWN: usize = 32 << 20;
/// Words of a step.
const OP: usize = size_of::<Op>() / 8;

/// Linux as an executor of cases.
#[derive(Debug)]
pub struct Linux {
    memory: Memory,
    process: libc::pid_t,
    ask: File,
    answer: File,
}

/// What a step of a case has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown<'a> {
    /// Case of the batch.
    pub case: usize,
    /// Its step.
    pub step: usize,
    /// The observation.
    pub words: &'a [u64],
}

/// Why there is nothing to compare with.
#[derive(Debug, thiserror::Error)]
pub enum LinuxError {
    /// A call failed that never does.
    #[error("cannot start the process that asks Linux: {0}")]
    Start(#[source] io::Error),
    /// It ended.
    #[error("the process that asks Linux has ended: {0}")]
    Gone(String),
    /// More steps than there is room for.
    #[error("{steps} steps are too many for one batch")]
    TooMany {
        /// How many.
        steps: usize,
    },
}

/// Memory that is shared with the process.
#[derive(Debug)]
struct Memory(NonNull<u64>);

impl Memory {
    const WORDS: usize = STEPS + SHOWN;

    fn new() -> io::Result<Self> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let null = std::ptr::null_mut();
        // SAFETY: a fresh anonymous mapping.
        let base = unsafe { libc::mmap(null, Self::WORDS * 8, prot, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(NonNull::new(base.cast()).expect("not at 0")))
    }

    /// Its words, to share.
    fn shared(&self) -> &'static [AtomicU64] {
        // SAFETY: mapped for as long as `self` lives, which whoever asks outlives: `Linux`'s borrows
        // of it are bounded by its own, and in the process it is never unmapped. Atomics may be shared.
        unsafe { slice::from_raw_parts(self.0.as_ptr().cast(), Self::WORDS) }
    }

    /// Its words while nobody else uses them.
    fn owned(&mut self) -> &mut [u64] {
        // SAFETY: as above; the process waits to be asked, and `self` is borrowed for as long.
        unsafe { slice::from_raw_parts_mut(self.0.as_ptr(), Self::WORDS) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; the borrows have ended.
        unsafe { libc::munmap(self.0.as_ptr().cast(), Self::WORDS * 8) };
    }
}

// SAFETY: a mapping may be used and unmapped by any thread.
unsafe impl Send for Memory {}

impl Linux {
    /// Starts the process.
    ///
    /// # Errors
    /// The host is out of something.
    pub fn start() -> Result<Self, LinuxError> {
        Self::try_start().map_err(LinuxError::Start)
    }

    fn try_start() -> io::Result<Self> {
        let memory = Memory::new()?;
        let (asked, ask) = pipe()?;
        let (answer, answered) = pipe()?;
        // SAFETY: the child only does what is safe between fork and exec (`serve`).
        let process = unsafe { libc::fork() };
        match process {
            -1 => Err(io::Error::last_os_error()),
            0 => serve(&memory, asked.as_raw_fd(), answered.as_raw_fd()),
            process => Ok(Self {
                memory,
                process,
                ask: ask.into(),
                answer: answer.into(),
            }),
        }
    }

    /// Lets Linux execute `cases`, and returns what each of their steps showed, in the order in which they were
    /// executed.
    ///
    /// # Errors
    /// The process is gone, or there are too many steps.
    pub fn run(&mut self, cases: &[&[Op]]) -> Result<impl Iterator<Item = Shown<'_>>, LinuxError> {
        let steps = cases.iter().map(|case| case.len()).sum::<usize>();
        // Every step shows something, and no more than so many words.
        if 1 + cases.len() + steps * OP > STEPS || 1 + steps * (MAX_WORDS + 2) > SHOWN {
            return Err(LinuxError::TooMany { steps });
        }
        let words = self.memory.owned();
        words[0] = cases.len() as u64;
        let mut at = 1;
        for case in cases {
            words[at] = case.len() as u64;
            let room = &mut words[at + 1..][..case.len() * OP];
            room.as_mut_bytes().copy_from_slice(case.as_bytes());
            at += 1 + room.len();
        }
        words[STEPS] = 1;
        let asked = self.ask.write_all(&[1]);
        let mut byte = [0];
        if let Err(error) = asked.and_then(|()| self.answer.read_exact(&mut byte)) {
            return Err(LinuxError::Gone(error.to_string()));
        }
        if byte != [DONE] {
            let error = Errno((-i64::from(byte[0].cast_signed())).abs());
            return Err(LinuxError::Gone(format!(
                "it could not prepare itself ({error})"
            )));
        }
        Ok(Log(&self.memory.owned()[STEPS..]).shown())
    }
}

impl Drop for Linux {
    fn drop(&mut self) {
        // SAFETY: our own child, not waited for yet.
        unsafe {
            libc::kill(self.process, libc::SIGKILL);
            libc::waitpid(self.process, std::ptr::null_mut(), 0);
        }
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors, which are ours then.
    unsafe {
        if libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])))
    }
}

/// What the processes of the cases have shown: the number of words that are used, then for each step
/// its case (upper half) and number, the number of its words, its words.
struct Log<'a>(&'a [u64]);

impl<'a> Log<'a> {
    fn shown(self) -> impl Iterator<Item = Shown<'a>> {
        let (words, end) = (self.0, self.0[0] as usize);
        let mut at = 1;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let (place, len) = (words[at], words[at + 1] as usize);
            let shown = Shown {
                case: (place >> 32) as usize,
                step: place as u32 as usize,
                words: &words[at + 2..][..len],
            };
            at += 2 + len;
            Some(shown)
        })
    }
}

/// The testbed of the process: it says nothing.
#[derive(Clone, Copy)]
struct Silent;

impl Testbed for Silent {
    fn print(&self, _: &[u8]) {}
    fn report(&self, _: ReportKind, _: u64, _: u64, _: u64) {}
    fn tlb(&self) -> Tlb {
        Tlb::Hw
    }
    fn cpus(&self) -> u64 {
        1
    }
    fn maps(&self, start: u64, end: u64, areas: &mut [Area]) -> Result<usize, Errno> {
        maps::read(start, end, areas)
    }
}

/// Appends to the log.
struct Record {
    case: usize,
    log: &'static [AtomicU64],
}

impl<S: Sys> Sink<S> for Record {
    fn pages(&self, _: usize, _: usize, piece: (u64, u64), resident: u64) -> Pages {
        let known = pagemap::read(piece).unwrap_or_default();
        Pages {
            // Where this host has swap, that is its own business.
            resident: resident | known.elsewhere,
            mapped: known.present | known.elsewhere,
            elsewhere: 0,
        }
    }

    fn on_linux(&self, _: usize, _: usize) -> u64 {
        unreachable!("it says of no page that it is elsewhere")
    }

    fn observe(&self, _: &S, step: usize, words: &[u64]) -> bool {
        let at = self.log[0].load(Relaxed) as usize;
        let head = [(self.case as u64) << 32 | step as u64, words.len() as u64];
        let places = self.log[at..].iter();
        for (place, word) in places.zip(head.iter().chain(words)) {
            place.store(*word, Relaxed);
        }
        let end = at + head.len() + words.len();
        self.log[0].store(end as u64, Relaxed);
        true
    }
}

/// What the process answers when the cases are over; anything else is an errno.
const DONE: u8 = 0;

/// The process: serves until nobody asks any more.
fn serve(memory: &Memory, asked: i32, answered: i32) -> ! {
    let words = memory.shared();
    let sys = Rt::new(Silent);
    let prepared = confine(asked, answered).and_then(|()| prepare(&sys));
    let mut byte = 0u8;
    let asked_to = (&raw mut byte).expose_provenance() as u64;
    while let 1 = call(libc::SYS_read, [asked as u64, asked_to, 1, 0]) {
        let answer = match &prepared {
            Ok(start) => {
                serve_batch(&sys, words, *start);
                DONE
            }
            Err(errno) => errno.0 as u8,
        };
        let from = (&raw const answer).expose_provenance() as u64;
        call(libc::SYS_write, [answered as u64, from, 1, 0]);
    }
    sys.exit(0)
}

fn serve_batch(sys: &Rt<Silent>, words: &'static [AtomicU64], start: State) {
    let log = &words[STEPS..];
    let mut at = 1;
    for case in 0..words[0].load(Relaxed) as usize {
        let len = words[at].load(Relaxed) as usize * OP;
        let steps = steps(&words[at + 1..][..len]);
        at += 1 + len;
        let child = sys.fork(|sys| {
            run_case(sys, &Record { case, log }, case_of(steps), start);
            0
        });
        // What did not start, or did not come to its end, has not shown all: the host counts the steps.
        if let Ok(pid) = child {
            let _ = sys.wait(pid);
        }
    }
}

/// The bytes of steps that the host has stored.
fn steps(words: &'static [AtomicU64]) -> &'static [u8] {
    let bytes = size_of_val(words);
    // SAFETY: nobody writes them while the process has not answered.
    unsafe { slice::from_raw_parts(words.as_ptr().cast(), bytes) }
}

fn call(number: i64, [a, b, c, d]: [u64; 4]) -> i64 {
    raw_syscall(number.cast_unsigned(), [a, b, c, d, 0, 0]).cast_signed()
}

/// Largest stack that grows by itself, as in the guest.
const STACK: u64 = 8 << 20;

/// Leaves the process nothing of the program that forked it.
fn confine(asked: i32, answered: i32) -> Result<(), Errno> {
    super::catch_faults();
    // Ctrl-C is the host's business; its handler writes to a pipe that this process shares.
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let how = if signal == libc::SIGINT {
            libc::SIG_IGN
        } else {
            libc::SIG_DFL
        };
        // SAFETY: async-signal-safe.
        unsafe { libc::signal(signal, how) };
    }
    let (low, high) = (asked.min(answered) as u64, asked.max(answered) as u64);
    for (first, last) in [
        (3, low - 1),
        (low + 1, high - 1),
        (high + 1, u32::MAX.into()),
    ] {
        if first <= last {
            call(libc::SYS_close_range, [first, last, 0, 0]);
        }
    }
    let unlimited = libc::RLIM_INFINITY;
    let locked = rlimit::DEFAULT_MEMLOCK;
    for (limit, soft, hard) in [
        (libc::RLIMIT_STACK, STACK, unlimited),
        (libc::RLIMIT_DATA, unlimited, unlimited),
        (libc::RLIMIT_AS, unlimited, unlimited),
        (libc::RLIMIT_MEMLOCK, locked, locked),
    ] {
        let wanted = libc::rlimit {
            rlim_cur: soft,
            rlim_max: hard,
        };
        // SAFETY: a limit of this process.
        if unsafe { libc::setrlimit(limit, &raw const wanted) } != 0 {
            return Err(Errno(
                io::Error::last_os_error()
                    .raw_os_error()
                    .unwrap_or(0)
                    .into(),
            ));
        }
    }
    // Programs on this executor map their subjects there.
    let (start, len) = (ARENA - (1 << 40), 2 << 40);
    if call(libc::SYS_munmap, [start, len, 0, 0]) != 0 {
        return Err(Errno::ENOMEM);
    }
    drop_capabilities()
}

/// MAP_FIXED below vm.mmap_min_addr, memory that is locked without limit: Linux permits much to root.
fn drop_capabilities() -> Result<(), Errno> {
    // Version 3 of the call, of the calling process.
    let header = [0x2008_0522u32, 0];
    let none = [0u32; 6];
    let args = [
        header.as_ptr().expose_provenance() as u64,
        none.as_ptr().expose_provenance() as u64,
    ];
    let [header, none] = args;
    let result = raw_syscall(libc::SYS_capset.cast_unsigned(), [header, none, 0, 0, 0, 0]);
    decode(result).map(|_| ())
}
