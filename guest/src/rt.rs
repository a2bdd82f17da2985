//! [`Sys`] by the `syscall` instruction, with nothing underneath: the runtime of the user image at
//! CPL 3, and, because the numbers and conventions are Linux's, of the programs on the host too.
//!
//! What differs between the two is behind [`Testbed`].
#![allow(unsafe_code, reason = "system calls")]

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use abi::channel::ReportKind;
use abi::layout::{MAX_CPUS, PAGE_SIZE};
use abi::oracle::Area;
use abi::syscall::{Errno, clone, decode, futex, nr, prot};

use crate::sys::{Fault, STACK_BYTES, Sys, Thread};

/// What Linux has no system call for.
pub trait Testbed: Copy + Send + Sync + 'static {
    /// Writes to the console.
    fn print(&self, text: &[u8]);
    /// Tells the host of a wrong value.
    fn report(&self, kind: ReportKind, gva: u64, expected: u64, found: u64);
    /// How memory under test is reached.
    fn tlb(&self) -> Tlb;
    /// [`Sys::maps`].
    ///
    /// # Errors
    /// There is no way to know.
    fn maps(&self, start: u64, end: u64, areas: &mut [Area]) -> Result<usize, Errno>;
    /// CPUs that threads may run on, bit `i` for the kernel's CPU `i`; not empty.
    fn cpus(&self) -> u64;
}

/// How memory under test is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tlb {
    /// By loads and stores.
    Hw,
    /// Through the kernel's soft TLB.
    Soft,
    /// Through the soft TLB, whose loads are then compared with the processor's.
    Both,
}

impl Tlb {
    /// What [`nr::TESTBED_TLB`] returned.
    #[must_use]
    pub fn from_call(result: Result<u64, Errno>) -> Self {
        match result {
            Ok(1) => Self::Soft,
            Ok(2) => Self::Both,
            _ => Self::Hw,
        }
    }
}

/// An access through the soft TLB.
struct Soft {
    value: u64,
    stale: bool,
}

fn soft_call(nr: u64, gva: u64, value: u64) -> Result<Soft, Fault> {
    loop {
        let (status, loaded): (u64, u64);
        // SAFETY: as in `raw_syscall`; these calls return a second value in rdx.
        unsafe {
            asm!("syscall",
                inlateout("rax") nr => status, in("rdi") gva, in("rsi") value,
                lateout("rdx") loaded,
                lateout("rcx") _, lateout("r11") _, options(nostack));
        }
        match decode(status) {
            Ok(stale) => {
                return Ok(Soft {
                    value: loaded,
                    stale: stale != 0,
                });
            }
            Err(Errno::EAGAIN) => {}
            Err(errno) => return Err(Fault::new(gva, errno)),
        }
    }
}

/// The runtime.
#[derive(Clone, Copy, Debug)]
pub struct Rt<T>(T);

impl<T: Testbed> Rt<T> {
    /// A runtime over `testbed`. Faults in [`access_range`] must already continue at
    /// [`access_fixup`].
    pub fn new(testbed: T) -> Self {
        Self(testbed)
    }

    /// The processor's TLB may have dropped what the soft TLB still holds, never the other way round: where
    /// the soft TLB says what the page tables say, the processor must say so too. Twice, because in a
    /// parallel run somebody may write the word in between.
    fn compare(&self, gva: u64) {
        for _ in 0..2 {
            match (soft_call(nr::TESTBED_LOAD, gva, 0), load(gva)) {
                (Ok(soft), Ok(hard)) if !soft.stale && soft.value != hard => {}
                _ => return,
            }
        }
        let found = load(gva).unwrap_or(0);
        self.0.report(ReportKind::TlbMismatch, gva, 0, found);
    }

    /// Ends the process.
    pub fn exit(&self, status: i32) -> ! {
        let status = u64::from(status.cast_unsigned());
        loop {
            // A return would be a kernel's bug; there is nothing to do but to ask again.
            let _ = self.syscall(nr::EXIT_GROUP, [status, 0, 0, 0, 0, 0]);
        }
    }
}

/// The system call `nr`.
pub fn raw_syscall(nr: u64, args: [u64; 6]) -> u64 {
    let result;
    // SAFETY: the instruction clobbers rax, rcx and r11 only (SDM vol. 2B, SYSCALL; Linux restores
    // the rest). What the call does to memory is up to the caller, as for every call through `Sys`:
    // programs pass addresses of memory under test, which no Rust reference covers, or of atomics and
    // locals that they lend to the kernel; the block counts as reading and writing all memory.
    unsafe {
        asm!("syscall",
            inlateout("rax") nr => result,
            in("rdi") args[0], in("rsi") args[1], in("rdx") args[2],
            in("r10") args[3], in("r8") args[4], in("r9") args[5],
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

// The only instructions that touch memory under test. A fault in them continues at the fixup with
// rax = -EFAULT, or -EIO for a SIGBUS; each is one instruction, so nothing is half done.
global_asm!(
    ".pushsection .text.stalemate_access, \"ax\", @progbits",
    ".globl stalemate_access_start",
    ".hidden stalemate_access_start",
    "stalemate_access_start:",
    ".globl stalemate_access_load",
    ".hidden stalemate_access_load",
    "stalemate_access_load:",
    "mov rdx, [rdi]",
    "xor eax, eax",
    "ret",
    ".globl stalemate_access_store",
    ".hidden stalemate_access_store",
    "stalemate_access_store:",
    "mov [rdi], rsi",
    "xor eax, eax",
    "ret",
    ".globl stalemate_access_fixup",
    ".hidden stalemate_access_fixup",
    "stalemate_access_fixup:",
    "ret",
    ".popsection",
);

/// rax and rdx of a load: two INTEGER eightbytes are returned there (System V psABI, 3.2.3).
#[repr(C)]
struct Loaded {
    status: i64,
    value: u64,
}

unsafe extern "C" {
    fn stalemate_access_start();
    fn stalemate_access_load(gva: u64) -> Loaded;
    fn stalemate_access_store(gva: u64, value: u64) -> i64;
    fn stalemate_access_fixup();
}

/// Code addresses `start..end` in which a fault belongs to memory under test.
#[must_use]
pub fn access_range() -> (u64, u64) {
    let start = stalemate_access_start as *const () as usize;
    (start as u64, access_fixup())
}

/// Code address at which such a fault continues, with rax = -EFAULT.
#[must_use]
pub fn access_fixup() -> u64 {
    stalemate_access_fixup as *const () as usize as u64
}

/// What a new thread needs, at the top of its stack mapping.
#[repr(C, align(64))]
struct Control<T> {
    /// Not 0 while the thread lives; the kernel clears it (CLONE_CHILD_CLEARTID) and wakes.
    alive: AtomicU32,
    sys: Rt<T>,
    entry: fn(&Rt<T>, u64),
    arg: u64,
}

extern "C" fn thread_main<T: Testbed>(control: &Control<T>) -> ! {
    (control.entry)(&control.sys, control.arg);
    loop {
        raw_syscall(nr::EXIT, [0; 6]);
    }
}

/// A load of memory under test by the processor.
fn load(gva: u64) -> Result<u64, Fault> {
    // SAFETY: the routine follows the C convention and survives any address: a fault becomes
    // its status. It only reads memory under test, which no Rust reference covers.
    let loaded = unsafe { stalemate_access_load(gva) };
    if loaded.status == 0 {
        Ok(loaded.value)
    } else {
        Err(Fault::new(gva, Errno(-loaded.status)))
    }
}

/// Likewise a store.
fn store(gva: u64, value: u64) -> Result<(), Fault> {
    // SAFETY: as in `load`; programs write only to memory that they mapped for the test.
    let status = unsafe { stalemate_access_store(gva, value) };
    if status == 0 {
        Ok(())
    } else {
        Err(Fault::new(gva, Errno(-status)))
    }
}

impl<T: Testbed> Sys for Rt<T> {
    fn syscall(&self, nr: u64, args: [u64; 6]) -> Result<u64, Errno> {
        decode(raw_syscall(nr, args))
    }

    #[inline]
    fn read(&self, gva: u64) -> Result<u64, Fault> {
        match self.0.tlb() {
            Tlb::Hw => load(gva),
            Tlb::Soft => Ok(soft_call(nr::TESTBED_LOAD, gva, 0)?.value),
            Tlb::Both => {
                let soft = soft_call(nr::TESTBED_LOAD, gva, 0)?;
                self.compare(gva);
                Ok(soft.value)
            }
        }
    }

    #[inline]
    fn write(&self, gva: u64, value: u64) -> Result<(), Fault> {
        match self.0.tlb() {
            Tlb::Hw => store(gva, value),
            Tlb::Soft | Tlb::Both => soft_call(nr::TESTBED_STORE, gva, value).map(|_| ()),
        }
    }

    fn ticks(&self) -> u64 {
        // SAFETY: every x86-64 processor has it, and neither Linux nor our kernel sets CR4.TSD.
        unsafe { core::arch::x86_64::_rdtsc() }
    }

    fn relax(&self) {
        match self.0.tlb() {
            Tlb::Hw => core::hint::spin_loop(),
            Tlb::Soft | Tlb::Both => {
                raw_syscall(nr::TESTBED_RELAX, [0; 6]);
            }
        }
    }

    fn spawn(&self, entry: fn(&Self, u64), arg: u64) -> Result<Thread, Errno> {
        let base = self.mmap_anonymous(PAGE_SIZE + STACK_BYTES)?;
        self.mprotect(base, PAGE_SIZE, prot::NONE)?;
        self.wire(base + PAGE_SIZE, STACK_BYTES);
        let top = base + PAGE_SIZE + STACK_BYTES - size_of::<Control<T>>() as u64;
        let control = core::ptr::with_exposed_provenance_mut::<Control<T>>(top as usize);
        // SAFETY: the last bytes of a fresh mapping of our own, aligned (`top` is a page boundary
        // less the size, a multiple of the alignment 64), and nobody else knows it yet.
        let control = unsafe {
            control.write(Control {
                alive: AtomicU32::new(1),
                sys: *self,
                entry,
                arg,
            });
            &*control
        };
        let flags = clone::VM
            | clone::FS
            | clone::FILES
            | clone::SIGHAND
            | clone::THREAD
            | clone::SYSVSEM
            | clone::CHILD_CLEARTID;
        let child_tid = core::ptr::from_ref(&control.alive).expose_provenance();
        let main: extern "C" fn(&Control<T>) -> ! = thread_main::<T>;
        let result: u64;
        // SAFETY: the parent returns from `syscall` as from any other call. The child returns from it
        // with the same registers on its own stack, which is mapped, 16-byte aligned and stays until
        // `join` has seen it end; it calls `thread_main` with the control block and never returns.
        unsafe {
            asm!(
                "syscall",
                "test rax, rax",
                "jnz 2f",
                "xor ebp, ebp",
                "mov rdi, r12",
                "call r13",
                "ud2",
                "2:",
                inlateout("rax") nr::CLONE => result,
                in("rdi") flags, in("rsi") top, in("rdx") 0u64,
                in("r10") child_tid, in("r8") 0u64,
                in("r12") control, in("r13") main,
                lateout("rcx") _, lateout("r11") _,
            );
        }
        match decode(result) {
            Ok(_) => Ok(Thread(base)),
            Err(errno) => {
                self.munmap(base, PAGE_SIZE + STACK_BYTES)?;
                Err(errno)
            }
        }
    }

    fn join(&self, thread: Thread) {
        let top = thread.0 + PAGE_SIZE + STACK_BYTES - size_of::<Control<T>>() as u64;
        let control = core::ptr::with_exposed_provenance::<Control<T>>(top as usize);
        // SAFETY: `spawn` put it there, and only this function unmaps it, once per thread. The
        // kernel writes `alive` too, which is atomic.
        let alive = unsafe { &(*control).alive };
        loop {
            let value = alive.load(Ordering::Acquire);
            if value == 0 {
                break;
            }
            // Not FUTEX_PRIVATE: the kernel's wake at thread exit is a shared one (Linux,
            // kernel/fork.c, mm_release), and the two do not meet.
            let address = core::ptr::from_ref(alive).expose_provenance() as u64;
            let _ = self.syscall(nr::FUTEX, [address, futex::WAIT, value.into(), 0, 0, 0]);
        }
        // The thread is past its last user instruction. An errno here would be a leak, no more.
        let _ = self.munmap(thread.0, PAGE_SIZE + STACK_BYTES);
    }

    fn fork(&self, child: impl FnOnce(&Self) -> i32) -> Result<u64, Errno> {
        match self.syscall(nr::FORK, [0; 6])? {
            0 => self.exit(child(self)),
            pid => Ok(pid),
        }
    }

    fn words(&self, count: usize) -> Result<&'static [AtomicU64], Errno> {
        let bytes = (count.max(1) * 8) as u64;
        let base = self.mmap_anonymous(bytes)?;
        self.wire(base, bytes);
        let base = core::ptr::with_exposed_provenance::<AtomicU64>(base as usize);
        // SAFETY: a fresh, page-aligned mapping of at least that many bytes, readable, writable and
        // zero, which is never unmapped; all access from here on is atomic.
        Ok(unsafe { core::slice::from_raw_parts(base, count) })
    }

    fn nr_cpus(&self) -> usize {
        (self.0.cpus().count_ones() as usize).min(MAX_CPUS)
    }

    fn set_affinity(&self, cpu: usize) -> Result<(), Errno> {
        let mut cpus = self.0.cpus();
        for _ in 0..cpu {
            cpus &= cpus.wrapping_sub(1);
        }
        let mask = cpus & cpus.wrapping_neg();
        let address = (&raw const mask).expose_provenance() as u64;
        self.syscall(nr::SCHED_SETAFFINITY, [0, 8, address, 0, 0, 0])
            .map(|_| ())
    }

    fn current_cpu(&self) -> Result<usize, Errno> {
        let cpu = AtomicU32::new(0);
        let address = core::ptr::from_ref(&cpu).expose_provenance() as u64;
        self.syscall(nr::GETCPU, [address, 0, 0, 0, 0, 0])?;
        let below = (1 << cpu.load(Ordering::Relaxed)) - 1;
        Ok((self.0.cpus() & below).count_ones() as usize)
    }

    fn maps(&self, start: u64, end: u64, areas: &mut [Area]) -> Result<usize, Errno> {
        self.0.maps(start, end, areas)
    }

    fn print(&self, text: &[u8]) {
        self.0.print(text);
    }

    fn report(&self, kind: ReportKind, gva: u64, expected: u64, found: u64) {
        self.0.report(kind, gva, expected, found);
    }
}
