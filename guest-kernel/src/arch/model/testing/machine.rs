//! A booted kernel over an arena of its own.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::boxed::Box;
use std::mem::ManuallyDrop;
use std::string::{String, ToString};
use std::sync::atomic::Ordering::Relaxed;

use abi::boot::{BootInfo, MAGIC, MAX_CMDLINE, MAX_SEGMENTS, Segment};
use abi::channel::Control;
use abi::layout::{CHANNEL_GPA, CHANNEL_STRIDE, MAX_CPUS, PAGE_SIZE};
use abi::objects::KernelRoot;
use abi::objects::Pa;
use abi::param::Config;

use super::Model;
use crate::Kernel;

/// First frame for boot segments; the last ends where the channels start.
pub(crate) const SEGMENTS: u64 = 0x8000;
const BOOT_PGD: u64 = 0x2000;

/// A machine with a booted kernel.
pub(crate) struct Machine {
    /// Dropped before the memory under it.
    kernel: ManuallyDrop<Box<Kernel<Model>>>,
    memory: *mut u8,
    bytes: u64,
}

impl Machine {
    /// 4 MiB of memory.
    pub(crate) fn new(cpus: usize, cmdline: &str) -> Self {
        Self::with_memory(4 << 20, cpus, cmdline)
    }

    /// A machine with `bytes` of memory.
    pub(crate) fn with_memory(bytes: u64, cpus: usize, cmdline: &str) -> Self {
        let info = boot_info(bytes, cpus, &std::format!("tlb=soft {cmdline}"));
        Self::boot(&info).unwrap_or_else(|error| panic!("{error}"))
    }

    /// A machine as `info` says, if the kernel boots on it.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn boot(info: &BootInfo) -> Result<Self, String> {
        let (bytes, cpus) = (info.memory_bytes, info.cpus as usize);
        Self::build(bytes, cpus, |arch| {
            // One entry in the kernel's half, as a direct map has.
            arch.words(BOOT_PGD)[273].store(0x3023, Relaxed);
            Kernel::boot(arch, info).map_err(|error| error.to_string())
        })
    }

    /// A machine whose kernel has only its root object, at `root`.
    pub(crate) fn bare(bytes: u64, cpus: usize, root: Pa<KernelRoot>) -> Self {
        let built = Self::build(bytes, cpus, |arch| {
            Ok(Kernel::new(arch, Config::default(), root))
        });
        built.unwrap_or_else(|error| panic!("{error}"))
    }

    fn build(
        bytes: u64,
        cpus: usize,
        boot: impl FnOnce(Model) -> Result<Kernel<Model>, String>,
    ) -> Result<Self, String> {
        fn program(_: &'static Kernel<Model>) {
            panic!("a test's machine runs no programs");
        }
        // SAFETY: the layout has a size that is not zero.
        let memory = unsafe { alloc_zeroed(arena(bytes)) };
        assert!(!memory.is_null(), "no memory for the arena");
        // SAFETY: page aligned, freed only in `drop`, used by the test's thread alone.
        let arch = unsafe { Model::new(memory, bytes, cpus.min(MAX_CPUS), program) };
        for cpu in &arch.cpus {
            cpu.root.store(BOOT_PGD, Relaxed);
        }
        for cpu in 0..arch.cpus.len() as u64 {
            // SAFETY: a page of the arena, of atomics.
            let control = unsafe {
                &*memory
                    .add((CHANNEL_GPA + cpu * CHANNEL_STRIDE) as usize)
                    .cast::<Control>()
            };
            control.budget.store(u64::MAX, Relaxed);
        }
        arch.trap();
        match boot(arch) {
            Ok(kernel) => {
                let kernel = Box::new(kernel);
                let pointer = std::ptr::from_ref(kernel.as_ref()).cast_mut();
                kernel.arch.kernel.store(pointer, Relaxed);
                Ok(Self {
                    kernel: ManuallyDrop::new(kernel),
                    memory,
                    bytes,
                })
            }
            Err(error) => {
                // SAFETY: allocated above; the kernel that had it is gone.
                unsafe { dealloc(memory, arena(bytes)) };
                Err(error)
            }
        }
    }

    /// The kernel.
    pub(crate) fn kernel(&self) -> &Kernel<Model> {
        &self.kernel
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: dropped once, here; nobody has a reference to it any more, so none into the arena,
        // which `build` allocated with this layout.
        unsafe {
            ManuallyDrop::drop(&mut self.kernel);
            dealloc(self.memory, arena(self.bytes));
        }
    }
}

fn arena(bytes: u64) -> Layout {
    Layout::from_size_align(bytes as usize, PAGE_SIZE as usize).expect("a sane size")
}

/// What a host would tell a kernel on such a machine.
pub(crate) fn boot_info(bytes: u64, cpus: usize, cmdline: &str) -> BootInfo {
    let mut line = [0; MAX_CMDLINE];
    line[..cmdline.len()].copy_from_slice(cmdline.as_bytes());
    BootInfo {
        magic: MAGIC,
        layout_hash: abi::layout_hash(),
        cpus: cpus as u32,
        interrupts: 0,
        memory_bytes: bytes,
        boot_pgd: BOOT_PGD,
        free_start: CHANNEL_GPA + cpus as u64 * CHANNEL_STRIDE,
        channels: CHANNEL_GPA,
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
