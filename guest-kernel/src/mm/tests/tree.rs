//! The VMA tree against a sorted map.

use std::collections::BTreeMap;

use abi::layout::PAGE_SIZE;
use abi::objects::{Mm, Pa, Vma};
use proptest::prelude::*;

use super::audit::tree_of;
use super::{TestKernel, teardown};
use crate::arch::model::testing::Machine;
use crate::mm::Field;
use crate::mm::vma::Area;

#[derive(Clone, Debug)]
enum Step {
    /// Insert (start, pages) in pages, if it fits.
    Insert(u64, u64),
    /// Erase the nth.
    Erase(usize),
    /// Move the bounds of the nth towards its neighbours.
    Resize(usize, u64, u64),
    /// Look an address up.
    Find(u64),
    /// Search a hole of so many pages in low..high.
    Hole(u64, u64, u64),
}

fn steps(space: u64, len: usize) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (1..space, 1..6u64).prop_map(|(at, n)| Step::Insert(at, n)),
        3 => any::<usize>().prop_map(Step::Erase),
        2 => (any::<usize>(), 0..4u64, 0..4u64).prop_map(|(n, a, b)| Step::Resize(n, a, b)),
        2 => (0..space + 8).prop_map(Step::Find),
        2 => (1..12u64, 0..space, 0..space + 8).prop_map(|(n, l, h)| Step::Hole(n, l, h)),
    ];
    prop::collection::vec(step, 1..len)
}

/// Pages by start: (end, VMA).
type Model = BTreeMap<u64, (u64, Pa<Vma>)>;

fn free(model: &Model, start: u64, end: u64) -> bool {
    !model.iter().any(|(&s, &(e, _))| s < end && start < e)
}

fn highest_hole(model: &Model, pages: u64, low: u64, high: u64) -> Option<u64> {
    (low..high.saturating_sub(pages - 1).max(low))
        .rev()
        .find(|&at| at + pages <= high && free(model, at, at + pages))
}

fn run(kernel: &TestKernel, mm: Pa<Mm>, steps: &[Step]) -> Result<(), TestCaseError> {
    let space = kernel.obj(mm);
    let mut model = Model::new();
    for step in steps {
        match *step {
            Step::Insert(at, pages) if free(&model, at, at + pages) => {
                let area = Area::anonymous(at * PAGE_SIZE, (at + pages) * PAGE_SIZE, 0);
                let vma = kernel.vma_create(mm, area, None).unwrap();
                model.insert(at, (at + pages, vma));
            }
            Step::Erase(which) if !model.is_empty() => {
                let at = *model.keys().nth(which % model.len()).unwrap();
                let (_, vma) = model.remove(&at).unwrap();
                kernel.vma_detach(space, vma);
                kernel.slab_free(vma);
            }
            Step::Resize(which, down, up) if !model.is_empty() => {
                let at = *model.keys().nth(which % model.len()).unwrap();
                let (end, vma) = model.remove(&at).unwrap();
                let lowest = model.range(..at).next_back().map_or(1, |(_, &(e, _))| e);
                let highest = model.range(end..).next().map_or(u64::MAX, |(&s, _)| s);
                let (start, end) = (at.saturating_sub(down).max(lowest), (end + up).min(highest));
                kernel.obj(vma).start.set(start * PAGE_SIZE);
                kernel.obj(vma).end.set(end * PAGE_SIZE);
                kernel.tree_update(space, vma, at * PAGE_SIZE);
                model.insert(start, (end, vma));
            }
            Step::Find(at) => {
                let expected = model.values().find(|&&(end, _)| end > at).map(|&(_, v)| v);
                prop_assert_eq!(kernel.vma_find(space, at * PAGE_SIZE), expected);
                let before = model.range(..at).next_back().map(|(_, &(_, v))| v);
                prop_assert_eq!(kernel.vma_before(space, at * PAGE_SIZE), before);
            }
            Step::Hole(pages, low, high) => {
                let expected = highest_hole(&model, pages, low, high).map(|at| at * PAGE_SIZE);
                let (low, high) = (low * PAGE_SIZE, high * PAGE_SIZE);
                let found = kernel.find_hole(space, pages * PAGE_SIZE, low, high);
                prop_assert_eq!(found, expected);
            }
            _ => {}
        }
        let listed: Vec<_> = model.values().map(|&(_, vma)| vma).collect();
        prop_assert_eq!(tree_of(kernel, mm), listed);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(super::cases(48)))]

    #[test]
    fn behaves_like_a_sorted_map(steps in prop_oneof![steps(60, 120), steps(3000, 700)]) {
        let machine = Machine::new(1, "");
        let mm = machine.kernel().mm_create().unwrap();
        run(machine.kernel(), mm, &steps)?;
        teardown(machine.kernel(), &[mm]);
    }
}

#[test]
fn grows_and_shrinks_through_several_levels() {
    let machine = Machine::new(1, "");
    let kernel = machine.kernel();
    let mm = kernel.mm_create().unwrap();
    // Descending, ascending and from the middle: every way of splitting.
    let starts = (0..600u64).map(|i| match i % 3 {
        0 => 10_000 - i,
        1 => 20_000 + i,
        _ => 15_000 + (i * 7919) % 1201 * 2,
    });
    let mut vmas = Vec::new();
    for start in starts {
        let start = start * 2 * PAGE_SIZE;
        let area = Area::anonymous(start, start + PAGE_SIZE, 0);
        vmas.push(kernel.vma_create(mm, area, None).unwrap());
    }
    assert_eq!(tree_of(kernel, mm).len(), 600);
    assert!(kernel.obj(kernel.obj(mm).vmas.get()).level.get() >= 2);
    for (i, vma) in vmas.into_iter().enumerate() {
        kernel.vma_detach(kernel.obj(mm), vma);
        kernel.slab_free(vma);
        if i % 50 == 0 {
            tree_of(kernel, mm);
        }
    }
    assert!(kernel.obj(mm).vmas.get().is_null());
    teardown(kernel, &[mm]);
}
