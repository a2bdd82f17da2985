//! Tests of the MM stack on the model, which a test plays by hand (`arch::model::testing`).

mod asid;
mod audit;
mod audit_disk;
mod audit_groups;
mod audit_swap;
mod calls;
#[cfg(feature = "testbed")]
mod disk_files;
#[cfg(feature = "testbed")]
mod disk_random;
mod files;
mod files_oom;
mod files_random;
mod flush;
mod frames;
#[cfg(feature = "testbed")]
mod groups;
mod groups_random;
mod gup;
mod huge;
#[cfg(feature = "testbed")]
mod huge_reclaim;
mod interval_tree;
#[cfg(feature = "testbed")]
mod maps;
mod migrate;
mod non_present;
mod oom;
mod oracle;
mod random;
#[cfg(feature = "testbed")]
mod rcu;
#[cfg(feature = "testbed")]
mod reclaim;
mod reclaim_files;
mod remap;
mod semantics;
mod tables;
mod tree;
mod vma_lock;
mod zero;

use abi::objects::{Mm, Pa};
use abi::syscall::{map, prot};
use proptest::strategy::Strategy;
use proptest::test_runner::{Config, TestCaseError, TestRng, TestRunner};

use crate::Kernel;
use crate::arch::model::Model;
use crate::arch::model::testing::Machine;

pub(crate) use audit::{audit, audit_memory, slab_frames};

const PAGE: u64 = abi::layout::PAGE_SIZE;
const RW: u64 = prot::READ | prot::WRITE;
const ANON: u64 = map::PRIVATE | map::ANONYMOUS;
/// An address that tests map by hand.
const AT: u64 = 0x10_0000_0000;

type TestKernel = Kernel<Model>;

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

/// Runs `test` on a new address space that two CPUs have loaded, audits what it leaves, and expects all of it to go.
fn with_space(test: impl FnOnce(&TestKernel, Pa<Mm>)) {
    let machine = Machine::new(2, "");
    let mm = space(machine.kernel(), &[0, 1]);
    test(machine.kernel(), mm);
    audit(machine.kernel());
    teardown(machine.kernel(), &[mm]);
}

/// Maps `pages` at [`AT`] and writes 100, 101... into them.
fn filled(kernel: &TestKernel, mm: Pa<Mm>, pages: u64) {
    map_at(kernel, mm, AT, pages, RW);
    for page in 0..pages {
        kernel.user_write(1, AT + page * PAGE, 100 + page).unwrap();
    }
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

/// True where `test` fails one of 300 random cases, the same ones at every run: for mistakes that must not slip through.
fn some_case_fails<S: Strategy>(
    cases: &S,
    test: impl Fn(S::Value) -> Result<(), TestCaseError>,
) -> bool {
    let config = Config {
        cases: 300,
        failure_persistence: None,
        max_shrink_iters: 0,
        ..Config::default()
    };
    let rng = TestRng::deterministic_rng(config.rng_algorithm);
    TestRunner::new_with_rng(config, rng)
        .run(cases, test)
        .is_err()
}

/// Cases of a property test: `PROPTEST_CASES` if it is set, else `default`.
pub(crate) fn cases(default: u32) -> u32 {
    std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(default)
}
