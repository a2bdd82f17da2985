//! The tree of a file's mappings: against a list, and how deep it gets.

use std::collections::BTreeSet;
use std::vec::Vec;

use abi::objects::{File, Mm, Pa, Vma};
use abi::syscall::map;
use proptest::prelude::*;

use super::files::map_file;
use super::{AT, PAGE, RW, TestKernel, audit, space, teardown};
use crate::arch::model::testing::Machine;
use crate::mm::Field;

/// Pages of the file, and of the addresses where it is mapped.
const PAGES: u64 = 64;

/// Maps pages of the file somewhere, or unmaps.
#[derive(Clone, Copy, Debug)]
struct Step {
    map: bool,
    page: u64,
    pages: u64,
    pgoff: u64,
}

fn step() -> impl Strategy<Value = Step> {
    (prop::bool::weighted(0.7), 0..PAGES, 1u64..12, 0..PAGES).prop_map(
        |(map, page, pages, pgoff)| Step {
            map,
            page,
            pages: pages.min(PAGES - page).min(PAGES - pgoff),
            pgoff,
        },
    )
}

/// Every page that is found to be mapped of pages `first..end` of the file, as (address, page of the file).
fn found(k: &TestKernel, file: Pa<File>, (first, end): (u64, u64)) -> BTreeSet<(u64, u64)> {
    let mut pages = BTreeSet::new();
    let mut order = Vec::new();
    let _i_mmap = k.lock_i_mmap(file);
    k.for_each_mapping(file, &(first..end), |vma, start, stop| {
        let area = k.obj(vma);
        order.push(area.pgoff.get());
        for gva in (start..stop).step_by(PAGE as usize) {
            let index = area.pgoff.get() + (gva - area.start.get()) / PAGE;
            assert!(pages.insert((gva, index)));
        }
    });
    assert!(order.is_sorted(), "{order:?}");
    pages
}

/// Maps and unmaps, and returns which page of the file is where.
fn take(
    k: &TestKernel,
    mm: Pa<Mm>,
    file: Pa<File>,
    steps: &[Step],
) -> [Option<u64>; PAGES as usize] {
    let mut mapped = [None; PAGES as usize];
    for step in steps {
        let gva = AT + step.page * PAGE;
        let slots = &mut mapped[step.page as usize..(step.page + step.pages) as usize];
        if step.map {
            map_file(k, mm, gva, step.pages, RW, map::SHARED, (file, step.pgoff));
            slots
                .iter_mut()
                .zip(step.pgoff..)
                .for_each(|(slot, index)| *slot = Some(index));
        } else {
            k.munmap(mm, gva, step.pages * PAGE).unwrap();
            slots.fill(None);
        }
    }
    mapped
}

proptest! {
    #[test]
    fn it_finds_what_a_look_at_all_mappings_finds(
        steps in prop::collection::vec(step(), 1..40),
        ranges in prop::collection::vec((0..PAGES, 0..PAGES), 1..8),
    ) {
        let machine = Machine::new(1, "");
        let k = machine.kernel();
        let mm = space(k, &[0]);
        let file = k.file_create().unwrap();
        k.file_truncate(file, PAGES * PAGE);
        let mapped = take(k, mm, file, &steps);
        audit(k);
        for (first, end) in ranges {
            let all = (0..PAGES).zip(mapped);
            let wanted: BTreeSet<_> = all
                .filter_map(|(page, index)| Some((AT + page * PAGE, index?)))
                .filter(|(_, index)| (first..end).contains(index))
                .collect();
            prop_assert_eq!(found(k, file, (first, end)), wanted);
        }
        k.file_put(file);
        teardown(k, &[mm]);
    }
}

/// Visits every VMA below `vma`, and returns how deep that goes.
fn depth(k: &TestKernel, vma: Pa<Vma>) -> usize {
    vma.some().map_or(0, |vma| {
        let area = k.obj(vma);
        let below = [&area.left_of_file, &area.right_of_file];
        1 + below
            .map(|link| depth(k, link.get()))
            .into_iter()
            .max()
            .unwrap_or(0)
    })
}

#[test]
fn a_thousand_mappings_in_order_make_no_list() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    let file = k.file_create().unwrap();
    k.file_truncate(file, 4 * PAGE);
    for index in 0..1000 {
        // Two pages apart: no two of them merge.
        map_file(
            k,
            mm,
            AT + index * 2 * PAGE,
            1,
            RW,
            map::SHARED,
            (file, index % 4),
        );
    }
    let deep = depth(k, k.obj(file).i_mmap.get());
    assert!((10..40).contains(&deep), "{deep}");
    assert_eq!(found(k, file, (3, 4)).len(), 250);
    k.file_put(file);
    teardown(k, &[mm]);
}
