//! The programs on the host's own Linux: the same runtime, with the testbed's calls replaced by a
//! record of what was reported.
//!
//! Threads are raw clones that share the caller's thread-local storage, so what they run must use
//! none: the programs do not, they know only [`Sys`].
#![allow(unsafe_code, reason = "system calls and signal handlers of the host")]

mod maps;
pub mod oracle;
mod own_file;
mod pagemap;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use abi::channel::ReportKind;
use abi::oracle::Area;
use abi::syscall::{Errno, nr};

use crate::args::UsageError;
use crate::programs::SUBJECT_GVA;
use crate::rt::{Rt, Testbed, Tlb, access_fixup, access_range, raw_syscall};
use crate::sys::Sys;

/// One report of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// What is wrong.
    pub kind: ReportKind,
    /// Where.
    pub gva: u64,
    /// What the program had to find there.
    pub expected: u64,
    /// What it found.
    pub found: u64,
}

/// What a program did.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Its exit status.
    pub status: i32,
    /// What it reported, its forked processes included.
    pub reports: Vec<Report>,
    /// What it printed.
    pub text: String,
}

const MAX_REPORTS: usize = 64;
const MAX_TEXT: usize = 16 << 10;

/// Lives in a shared mapping, so that forked processes write to it too.
struct Record {
    cpus: AtomicU64,
    reports: AtomicUsize,
    report: [[AtomicU64; 4]; MAX_REPORTS],
    text_len: AtomicUsize,
    text: [std::sync::atomic::AtomicU8; MAX_TEXT],
}

/// The testbed's calls on the host.
#[derive(Clone, Copy)]
pub struct Recorder(&'static Record);

/// The executor on the host.
pub type Native = Rt<Recorder>;

impl Testbed for Recorder {
    fn print(&self, text: &[u8]) {
        let start = self.0.text_len.fetch_add(text.len(), Ordering::Relaxed);
        for (cell, byte) in self.0.text.iter().skip(start).zip(text) {
            cell.store(*byte, Ordering::Relaxed);
        }
    }

    fn report(&self, kind: ReportKind, gva: u64, expected: u64, found: u64) {
        let index = self.0.reports.fetch_add(1, Ordering::Relaxed);
        if let Some(words) = self.0.report.get(index) {
            for (word, value) in words.iter().zip([kind as u64, gva, expected, found]) {
                word.store(value, Ordering::Relaxed);
            }
        }
    }

    fn tlb(&self) -> Tlb {
        Tlb::Hw
    }

    fn maps(&self, start: u64, end: u64, areas: &mut [Area]) -> Result<usize, Errno> {
        maps::read(start, end, areas)
    }

    fn cpus(&self) -> u64 {
        self.0.cpus.load(Ordering::Relaxed)
    }
}

/// Runs one program as [`crate::run`] does, on an executor made from [`Native`] by `wrap`.
///
/// One program at a time in this process: programs pin threads and move the heap's end.
///
/// # Errors
/// The program or its arguments do not exist.
///
/// # Panics
/// Where the host refuses what every Linux grants (a signal handler, 100 KiB of memory).
pub fn run_on<'a, S: Sys>(
    wrap: impl FnOnce(Native) -> S,
    program: &'a str,
    args: &'a str,
    data: Option<&[u8]>,
) -> Result<Outcome, UsageError<'a>> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let _heap = HeapOfTheProgram::take();
    catch_faults();
    // What a program left there because its executor was broken, or because it stopped early.
    raw_syscall(nr::MUNMAP, [SUBJECT_GVA, 1 << 30, 0, 0, 0, 0]);
    let record = shared_record();
    let affinity = affinity();
    record.cpus.store(lowest(affinity), Ordering::Relaxed);
    let result = crate::run(&wrap(Rt::new(Recorder(record))), program, args, data);
    set_affinity(affinity);
    let outcome = result.map(|status| Outcome {
        status,
        reports: reports(record),
        text: text(record),
    });
    // SAFETY: mapped by `shared_record`; every thread of the program was joined and every child
    // waited for before `run` returned, and the executor that held the reference is gone.
    unsafe {
        libc::munmap(
            std::ptr::from_ref(record).cast_mut().cast(),
            size_of::<Record>(),
        )
    };
    outcome
}

/// Runs one program on the host's Linux.
///
/// # Errors
/// The program or its arguments do not exist.
pub fn run<'a>(
    program: &'a str,
    args: &'a str,
    data: Option<&[u8]>,
) -> Result<Outcome, UsageError<'a>> {
    run_on(|native| native, program, args, data)
}

fn reports(record: &Record) -> Vec<Report> {
    let count = record.reports.load(Ordering::Relaxed).min(MAX_REPORTS);
    let load = |words: &[AtomicU64; 4]| words.each_ref().map(|word| word.load(Ordering::Relaxed));
    let report = record.report[..count]
        .iter()
        .map(load)
        .map(|[kind, gva, expected, found]| Report {
            kind: ReportKind::from_u64(kind).expect("the recorder stored a kind"),
            gva,
            expected,
            found,
        });
    report.collect()
}

fn text(record: &Record) -> String {
    let len = record.text_len.load(Ordering::Relaxed).min(MAX_TEXT);
    let bytes: Vec<u8> = record.text[..len]
        .iter()
        .map(|cell| cell.load(Ordering::Relaxed))
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn shared_record() -> &'static Record {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a fresh anonymous mapping.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size_of::<Record>(),
            prot,
            flags,
            -1,
            0,
        )
    };
    assert_ne!(
        base,
        libc::MAP_FAILED,
        "mmap: {}",
        std::io::Error::last_os_error()
    );
    // SAFETY: page aligned, large enough, and all-zero bytes are a valid `Record` of atomics.
    unsafe { &*base.cast::<Record>() }
}

/// The first [`abi::layout::MAX_CPUS`] CPUs of a mask.
fn lowest(mask: u64) -> u64 {
    let mut rest = mask;
    for _ in 0..abi::layout::MAX_CPUS {
        rest &= rest.wrapping_sub(1);
    }
    mask & !rest
}

fn affinity() -> u64 {
    let mut mask = [0u64; 128];
    // SAFETY: a buffer of that many bytes.
    let result =
        unsafe { libc::sched_getaffinity(0, size_of_val(&mask), mask.as_mut_ptr().cast()) };
    assert_eq!(
        result,
        0,
        "sched_getaffinity: {}",
        std::io::Error::last_os_error()
    );
    assert_ne!(mask[0], 0, "none of the first 64 CPUs is ours");
    mask[0]
}

fn set_affinity(mask: u64) {
    // SAFETY: a mask of 8 bytes.
    unsafe { libc::sched_setaffinity(0, 8, (&raw const mask).cast()) };
}

/// While it lives, the heap is not malloc's: glibc takes new memory by mmap and gives none back by brk, so the heap's end
/// belongs to the program. Only for so long, for each piece of memory is a mapping then.
struct HeapOfTheProgram;

impl HeapOfTheProgram {
    /// Bytes from which on malloc maps memory (glibc's DEFAULT_MMAP_THRESHOLD_MIN).
    const MMAP_THRESHOLD: i32 = 128 << 10;

    fn take() -> Self {
        // SAFETY: mallopt has no preconditions.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, 0);
            libc::mallopt(libc::M_MMAP_MAX, i32::MAX);
            libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        }
        Self
    }
}

impl Drop for HeapOfTheProgram {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, Self::MMAP_THRESHOLD) };
    }
}

/// Lets faults of memory under test continue at their fixup.
fn catch_faults() {
    // SAFETY: an all-zero sigaction is a valid one; the handler has the SA_SIGINFO signature and
    // uses nothing that is not async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_fault as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        for signal in [libc::SIGSEGV, libc::SIGBUS] {
            let result = libc::sigaction(signal, &raw const action, std::ptr::null_mut());
            assert_eq!(result, 0, "sigaction: {}", std::io::Error::last_os_error());
        }
    }
}

/// The testbed's fault fixup on the host: a fault in the access routines continues at their fixup
/// with rax = -EFAULT, or -EIO for a SIGBUS; any other one is fatal, as without a handler.
extern "C" fn on_fault(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes the interrupted context to an SA_SIGINFO handler, and restores it
    // as we leave it.
    let registers = unsafe { &mut (*context).uc_mcontext.gregs };
    let (start, end) = access_range();
    let rip = registers[libc::REG_RIP as usize].cast_unsigned();
    if (start..end).contains(&rip) {
        let errno = match signal {
            libc::SIGBUS => Errno::EIO,
            _ => Errno::EFAULT,
        };
        registers[libc::REG_RAX as usize] = -errno.0;
        registers[libc::REG_RIP as usize] = access_fixup().cast_signed();
    } else {
        // SAFETY: async-signal-safe; the instruction faults again and ends the process.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}
