//! A booted kernel on the test machine, and what programs do on its CPUs.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use abi::boot::{BootInfo, MAGIC, MAX_CMDLINE, MAX_SEGMENTS, Segment};
use abi::objects::{Mm, Pa};

use super::{Access, BOOT_PGD, TestArch};
use crate::Kernel;
use crate::mm::FaultError;

/// Where free memory starts.
const FREE_START: u64 = 0x1_0000;

/// What programs do, on the CPU that the test plays.
impl Kernel<TestArch> {
    /// Runs `f` as CPU `cpu`.
    pub fn on<T>(&self, cpu: usize, f: impl FnOnce(&Self) -> T) -> T {
        let back = self.arch.current.swap(cpu, SeqCst);
        let result = f(self);
        self.arch.current.store(back, SeqCst);
        result
    }

    /// Reads the word at `gva` as the user code of `cpu`.
    ///
    /// # Errors
    /// Why the access would kill the program.
    pub fn user_read(&self, cpu: usize, gva: u64) -> Result<u64, FaultError> {
        self.on(cpu, |k| {
            k.user_access(gva, Access::Read, |w| w.load(SeqCst))
        })
    }

    /// Writes the word at `gva` as the user code of `cpu`.
    ///
    /// # Errors
    /// Why the access would kill the program.
    pub fn user_write(&self, cpu: usize, gva: u64, value: u64) -> Result<(), FaultError> {
        self.on(cpu, |k| {
            k.user_access(gva, Access::Write, |w| w.store(value, SeqCst))
        })
    }

    /// Fetches an instruction at `gva` as the user code of `cpu`.
    ///
    /// # Errors
    /// Why the access would kill the program.
    pub fn user_fetch(&self, cpu: usize, gva: u64) -> Result<(), FaultError> {
        self.on(cpu, |k| k.user_access(gva, Access::Fetch, |_| ()))
    }

    pub(super) fn user_access<T>(
        &self,
        gva: u64,
        access: Access,
        f: impl FnOnce(&AtomicU64) -> T,
    ) -> Result<T, FaultError> {
        let mm: Pa<Mm> = self.this_cpu().loaded_mm.get();
        for _ in 0..8 {
            match self.arch.translate(gva, access) {
                Ok(gpa) => return Ok(f(self.arch.word(gpa))),
                Err(error) => self.handle_fault(mm, gva, error)?,
            }
        }
        panic!("{access:?} of {gva:#x} faults forever");
    }
}

/// A machine with a booted kernel.
pub struct Machine {
    kernel: Box<Kernel<TestArch>>,
}

impl Machine {
    /// 4 MiB of memory.
    #[must_use]
    pub fn new(cpus: usize, cmdline: &str) -> Self {
        Self::with_memory(4 << 20, cpus, cmdline)
    }

    /// A machine with `bytes` of memory.
    #[must_use]
    pub fn with_memory(bytes: u64, cpus: usize, cmdline: &str) -> Self {
        let arch = TestArch::new(bytes, cpus);
        // One entry in the kernel's half, as a direct map has.
        arch.word(BOOT_PGD + 273 * 8).store(0x3023, SeqCst);
        let info = boot_info(bytes, cpus, cmdline);
        let kernel = match Kernel::boot(arch, &info) {
            Ok(kernel) => Box::new(kernel),
            Err(error) => panic!("{error}"),
        };
        let pointer = std::ptr::from_ref(kernel.as_ref()).cast_mut();
        kernel.arch.kernel.store(pointer, SeqCst);
        Self { kernel }
    }

    /// The kernel.
    #[must_use]
    pub fn kernel(&self) -> &Kernel<TestArch> {
        &self.kernel
    }
}

/// What a host would tell a kernel on such a machine.
#[must_use]
pub fn boot_info(bytes: u64, cpus: usize, cmdline: &str) -> BootInfo {
    let mut line = [0; MAX_CMDLINE];
    line[..cmdline.len()].copy_from_slice(cmdline.as_bytes());
    BootInfo {
        magic: MAGIC,
        layout_hash: abi::layout_hash(),
        cpus: cpus as u32,
        interrupts: 0,
        memory_bytes: bytes,
        boot_pgd: BOOT_PGD,
        free_start: FREE_START,
        channels: 0,
        user_entry: 0,
        args_len: 0,
        data_len: 0,
        nr_segments: 0,
        segments: [Segment::default(); MAX_SEGMENTS],
        kernel_root: 0,
        cmdline_len: cmdline.len() as u64,
        cmdline: line,
    }
}
