//! The kernel as a value, and the one place that turns guest physical addresses into references.
#![allow(
    unsafe_code,
    reason = "the one place that turns guest physical addresses into references"
)]

use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::{AtomicU8, AtomicU64};

use abi::layout::PAGE_SIZE;
use abi::objects::{
    AnonVma, AnonVmaChain, CacheNode, Cpu, File, FileTable, Folio, FrameGroup, KernelRoot, Mm,
    OpenFile, Pa, SoftTlb, SwapSlot, Task, Vma, VmaNode,
};
use abi::param::Config;

use crate::arch::Arch;

/// Types that live in type-stable memory: a slab's pages, the array of folios, the root. All of their
/// fields are atomics, so a reference to a recycled object reads stale values and nothing worse.
pub trait Object: sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
}

macro_rules! objects {
    ($($type:ty),+) => { $(impl sealed::Sealed for $type {} impl Object for $type {})+ };
}
objects!(
    AnonVma,
    AnonVmaChain,
    CacheNode,
    File,
    FileTable,
    Folio,
    FrameGroup,
    KernelRoot,
    Mm,
    OpenFile,
    SoftTlb,
    SwapSlot,
    Task,
    Vma,
    VmaNode
);

/// One kernel on one machine.
pub struct Kernel<A: Arch> {
    /// The machine.
    pub arch: A,
    /// The command line, parsed.
    pub config: Config,
    root: Pa<KernelRoot>,
}

impl<A: Arch> Kernel<A> {
    /// A kernel whose root object lies at `root`, zeroed and of type-stable memory.
    ///
    /// # Panics
    /// Where `root` is null.
    pub const fn new(arch: A, config: Config, root: Pa<KernelRoot>) -> Self {
        assert!(!root.is_null(), "the root object lies nowhere");
        Self { arch, config, root }
    }

    /// The root object.
    #[inline]
    pub fn root(&self) -> &KernelRoot {
        // SAFETY: `new` has refused null; that it is a root in type-stable memory is the contract of
        // `new`, kept by boot.
        unsafe { self.object(self.root) }
    }

    /// Where the root object lies.
    pub fn root_pa(&self) -> Pa<KernelRoot> {
        self.root
    }

    /// The object at `pa`.
    ///
    /// # Panics
    /// On the null link: following it is a bug of the kernel.
    #[inline]
    pub fn obj<T: Object>(&self, pa: Pa<T>) -> &T {
        if pa.is_null() {
            null_followed::<T>();
        }
        // SAFETY: a non-null `Pa<T>` of an `Object` was made by the slab, the folio array or boot for
        // a `T` in type-stable memory.
        unsafe { self.object(pa) }
    }

    /// # Safety
    /// There is a `T` at `pa`, in type-stable memory.
    #[inline]
    unsafe fn object<T: Object>(&self, pa: Pa<T>) -> &T {
        // SAFETY: the caller's promise; the memory is mapped for the kernel's whole life, every bit
        // pattern of a `T` is valid and all its fields are atomics, so shared references may alias freely.
        unsafe { &*self.arch.phys_to_virt(pa.0).cast::<T>() }
    }

    #[cfg(feature = "testbed")]
    /// The word at `gpa`, a multiple of 8 inside guest memory, for accesses of programs.
    pub(crate) fn memory_word(&self, gpa: u64) -> &AtomicU64 {
        &self.memory_words(gpa, 1)[0]
    }

    /// The `count` words at `gpa`, a multiple of 8 inside guest memory: the contents of a frame that programs may
    /// access meanwhile.
    fn memory_words(&self, gpa: u64, count: u64) -> &[AtomicU64] {
        let end = gpa + count * 8;
        assert!(
            gpa.is_multiple_of(8) && end <= self.root().nr_frames.load(Relaxed) * PAGE_SIZE,
            "no words at {gpa:#x}..{end:#x}"
        );
        // SAFETY: aligned and inside memory that the direct map maps for good; what lies there is only
        // ever accessed by words through this, by bytes through `memory_bytes`, by frame copies, or as atomics.
        unsafe { core::slice::from_raw_parts(self.arch.phys_to_virt(gpa).cast(), count as usize) }
    }

    /// The `count` bytes at `gpa`, inside guest memory, likewise. A store to one leaves its neighbours alone, as a
    /// store of the word around it would not: a program may write those.
    fn memory_bytes(&self, gpa: u64, count: usize) -> &[AtomicU8] {
        let end = gpa + count as u64;
        assert!(
            end <= self.root().nr_frames.load(Relaxed) * PAGE_SIZE,
            "no bytes at {gpa:#x}..{end:#x}"
        );
        // SAFETY: as for `memory_words`.
        unsafe { core::slice::from_raw_parts(self.arch.phys_to_virt(gpa).cast(), count) }
    }

    /// Copies from memory that programs may write meanwhile: whole words where they are aligned, so that no word of
    /// a program is torn.
    pub(crate) fn load_memory(&self, gpa: u64, to: &mut [u8]) {
        if gpa.is_multiple_of(8) && to.len().is_multiple_of(8) {
            let words = self.memory_words(gpa, to.len() as u64 / 8);
            for (word, to) in words.iter().zip(to.chunks_exact_mut(8)) {
                to.copy_from_slice(&word.load(Relaxed).to_le_bytes());
            }
        } else {
            for (byte, to) in self.memory_bytes(gpa, to.len()).iter().zip(to) {
                *to = byte.load(Relaxed);
            }
        }
    }

    /// Copies to memory that programs may access meanwhile; as [`Kernel::load_memory`].
    pub(crate) fn store_memory(&self, gpa: u64, from: &[u8]) {
        let (chunks, rest) = from.as_chunks::<8>();
        if gpa.is_multiple_of(8) && rest.is_empty() {
            let words = self.memory_words(gpa, chunks.len() as u64);
            for (word, from) in words.iter().zip(chunks) {
                word.store(u64::from_le_bytes(*from), Relaxed);
            }
        } else {
            for (byte, from) in self.memory_bytes(gpa, from.len()).iter().zip(from) {
                byte.store(*from, Relaxed);
            }
        }
    }

    /// Writes zeroes to memory that programs may access meanwhile.
    pub(crate) fn zero_memory(&self, gpa: u64, bytes: u64) {
        for byte in self.memory_bytes(gpa, bytes as usize) {
            byte.store(0, Relaxed);
        }
    }

    /// True where a task runs on this CPU, and not its idle loop.
    pub(crate) fn runs_task(&self) -> bool {
        !self.this_cpu().current.get().is_null()
    }

    /// State of the CPU that executes this.
    #[inline]
    pub fn this_cpu(&self) -> &Cpu {
        &self.root().cpus[self.arch.cpu()]
    }
}

/// Apart, so that the functions that follow links need no stack frame for the message.
#[cold]
#[inline(never)]
fn null_followed<T>() -> ! {
    panic!("null {} followed", core::any::type_name::<T>())
}
