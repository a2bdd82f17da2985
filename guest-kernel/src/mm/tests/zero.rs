//! The zero page.

use abi::objects::{Mm, Pa, SlabId};
use abi::pte::{Pte, PteFlags};
use abi::syscall::{advice, prot};

use super::{AT, PAGE, RW, TestKernel, audit, map_at, space, teardown};
use crate::arch::model::testing::Machine;
use crate::mm::{Field, Slot};

fn entry(k: &TestKernel, mm: Pa<Mm>, gva: u64) -> Pte {
    let table = k.leaf_table(k.obj(mm), gva).unwrap();
    k.read_pte(Slot::new(table, 1, gva))
}

fn is_zero_page(k: &TestKernel, mm: Pa<Mm>, gva: u64) -> bool {
    let entry = entry(k, mm, gva);
    let special = entry.flags().contains(PteFlags::SPECIAL);
    assert_eq!(special, entry.address() == k.root().zero_frame.get());
    special
}

#[test]
fn reads_share_one_frame_and_take_no_memory() {
    let machine = Machine::new(2, "");
    let k = machine.kernel();
    let mm = space(k, &[0, 1]);
    map_at(k, mm, AT, 8, RW);
    k.user_read(0, AT).unwrap();
    let free = k.root().free_frames.get();
    for page in 0..8 {
        assert_eq!(k.user_read(1, AT + page * PAGE), Ok(0));
        assert!(is_zero_page(k, mm, AT + page * PAGE));
    }
    assert_eq!(k.root().free_frames.get(), free);
    assert_eq!(k.obj(mm).rss.get(), 8);
    assert_eq!(k.root().slabs[SlabId::AnonVma as usize].used.get(), 0);
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn the_first_write_replaces_it_for_every_cpu() {
    let machine = Machine::new(2, "");
    let k = machine.kernel();
    let mm = space(k, &[0, 1]);
    map_at(k, mm, AT, 2, RW);
    for cpu in [0, 1] {
        assert_eq!(k.user_read(cpu, AT), Ok(0));
    }
    k.user_write(0, AT, 7).unwrap();
    assert!(!is_zero_page(k, mm, AT));
    // CPU 1 had the zero page cached: a translation that survived would read 0.
    assert_eq!(k.user_read(1, AT), Ok(7));
    assert_eq!(k.user_read(1, AT + PAGE), Ok(0));
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn fork_mprotect_and_dontneed_leave_it_uncounted() {
    let machine = Machine::new(2, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 4, RW);
    k.user_read(0, AT).unwrap();
    // Without a folio nothing is copied: the child faults by itself (Linux's vma_needs_copy).
    let empty = k.mm_fork(mm).unwrap();
    assert_eq!(k.obj(empty).rss.get(), 0);
    k.user_write(0, AT + PAGE, 9).unwrap();
    let child = k.mm_fork(mm).unwrap();
    assert_eq!(k.obj(child).rss.get(), 2);
    assert!(is_zero_page(k, child, AT) && is_zero_page(k, mm, AT));
    audit(k);
    k.mprotect(mm, AT, 4 * PAGE, prot::NONE).unwrap();
    audit(k);
    k.mprotect(mm, AT, 4 * PAGE, RW).unwrap();
    audit(k);
    k.user_write(0, AT, 5).unwrap();
    k.on(1, |k| k.switch_mm(child));
    assert_eq!(k.user_read(1, AT), Ok(0));
    k.user_write(1, AT, 6).unwrap();
    assert_eq!(k.user_read(0, AT), Ok(5));
    k.madvise(mm, AT, 4 * PAGE, advice::DONTNEED).unwrap();
    assert_eq!(k.user_read(0, AT), Ok(0));
    assert!(is_zero_page(k, mm, AT));
    audit(k);
    teardown(k, &[mm, child, empty]);
}

#[test]
fn no_memory_for_the_write_leaves_it_in_place() {
    let machine = Machine::with_memory(1 << 20, 1, "pcp_batch=0");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 2, RW);
    k.user_write(0, AT + PAGE, 1).unwrap();
    k.user_read(0, AT).unwrap();
    let mut taken = Vec::new();
    while let Ok(frame) = k.alloc_frames(0, abi::objects::FrameKind::Stack) {
        taken.push(frame);
    }
    assert_eq!(k.user_write(0, AT, 3), Err(crate::mm::FaultError::NoMemory));
    assert_eq!(k.user_read(0, AT), Ok(0));
    assert!(is_zero_page(k, mm, AT));
    taken.into_iter().for_each(|frame| k.free_frames(frame));
    teardown(k, &[mm]);
}
