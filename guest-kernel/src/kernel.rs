//! The kernel as a value, and the one place that turns guest physical addresses into references.
#![allow(
    unsafe_code,
    reason = "the one place that turns guest physical addresses into references"
)]

use abi::objects::{
    AnonVma, AnonVmaChain, Cpu, Folio, KernelRoot, Mm, Pa, SoftTlb, Task, Vma, VmaNode,
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
    Folio,
    KernelRoot,
    Mm,
    SoftTlb,
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
    fn nr_frames(&self) -> u64 {
        self.root()
            .nr_frames
            .load(core::sync::atomic::Ordering::Relaxed)
    }

    #[cfg(feature = "testbed")]
    /// The word at `gpa`, a multiple of 8 inside guest memory, for accesses of programs.
    pub(crate) fn memory_word(&self, gpa: u64) -> &core::sync::atomic::AtomicU64 {
        assert!(
            gpa.is_multiple_of(8) && gpa / abi::layout::PAGE_SIZE < self.nr_frames(),
            "no word at {gpa:#x}"
        );
        // SAFETY: aligned and inside memory that the direct map maps for good; what lies there is only
        // ever accessed by words through this, by frame copies of their owner, or as atomics.
        unsafe { &*self.arch.phys_to_virt(gpa).cast() }
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
