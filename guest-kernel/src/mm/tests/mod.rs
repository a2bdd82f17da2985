//! Tests of the MM stack on the test machine.

mod audit;
mod flush;
mod frames;
mod oom;
mod random;
#[cfg(feature = "testbed")]
mod rcu;
mod semantics;
mod tables;
mod tree;

use abi::objects::{Mm, Pa};
use abi::syscall::{map, prot};

use crate::Kernel;
use crate::arch::testing::TestArch;

pub(crate) use audit::{audit, audit_memory};

const PAGE: u64 = abi::layout::PAGE_SIZE;
const RW: u64 = prot::READ | prot::WRITE;
const ANON: u64 = map::PRIVATE | map::ANONYMOUS;
/// An address that tests map by hand.
const AT: u64 = 0x10_0000_0000;

type TestKernel = Kernel<TestArch>;

/// A new address space, loaded on `cpus`.
fn space(kernel: &TestKernel, cpus: &[usize]) -> Pa<Mm> {
    let mm = kernel.mm_create().unwrap();
    for &cpu in cpus {
        kernel.on(cpu, |k| k.switch_mm(mm));
    }
    mm
}

/// Maps `pages` at `gva`.
fn map_at(kernel: &TestKernel, mm: Pa<Mm>, gva: u64, pages: u64, prot: u64) {
    let found = kernel.mmap(mm, gva, pages * PAGE, prot, ANON | map::FIXED);
    assert_eq!(found, Ok(gva));
}

/// The VMAs of `mm` as (start, end, access), like /proc/self/maps.
fn maps(kernel: &TestKernel, mm: Pa<Mm>) -> Vec<(u64, u64, u64)> {
    use super::Field;
    let mut maps = Vec::new();
    let mut at = 0;
    while let Some(vma) = kernel.vma_find(kernel.obj(mm), at) {
        let vma = kernel.obj(vma);
        at = vma.end.get();
        maps.push((vma.start.get(), at, vma.flags.get() & super::vma::ACCESS));
    }
    maps
}

/// Leaves and puts every mm, and expects nothing to be left of them.
fn teardown(kernel: &TestKernel, mms: &[Pa<Mm>]) {
    use crate::arch::Arch;
    for cpu in 0..kernel.arch.nr_cpus() {
        kernel.on(cpu, Kernel::leave_mm);
    }
    for &mm in mms {
        kernel.mm_put(mm);
    }
    audit(kernel);
    audit::nothing_left(kernel);
}

/// Cases of a property test: `PROPTEST_CASES` if it is set, else `default`.
pub(crate) fn cases(default: u32) -> u32 {
    std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(default)
}
