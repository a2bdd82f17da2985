//! The kernel as a value, and the one place that turns guest physical addresses into references.

use abi::objects::{AnonVma, AnonVmaChain, Cpu, Folio, KernelRoot, Mm, Pa, Task, Vma, VmaNode};
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
    pub const fn new(arch: A, config: Config, root: Pa<KernelRoot>) -> Self {
        Self { arch, config, root }
    }

    /// The root object.
    pub fn root(&self) -> &KernelRoot {
        self.obj(self.root)
    }

    /// Where the root object lies.
    pub fn root_pa(&self) -> Pa<KernelRoot> {
        self.root
    }

    /// The object at `pa`.
    ///
    /// # Panics
    /// On the null link: following it is a bug of the kernel.
    pub fn obj<T: Object>(&self, pa: Pa<T>) -> &T {
        assert!(
            !pa.is_null(),
            "null {} followed",
            core::any::type_name::<T>()
        );
        // SAFETY: a non-null `Pa<T>` of an `Object` was made by the slab, the folio array or boot for
        // a `T` in type-stable memory, which is mapped for the kernel's whole life; every bit pattern
        // of a `T` is valid and all its fields are atomics, so shared references may alias freely.
        unsafe { &*self.arch.phys_to_virt(pa.0).cast::<T>() }
    }

    /// State of the CPU that executes this.
    pub fn this_cpu(&self) -> &Cpu {
        &self.root().cpus[self.arch.cpu()]
    }
}
