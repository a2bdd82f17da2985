//! Page tables and mms freed by RCU, with another CPU in a read section.

use abi::objects::{FrameKind, Mm, Pa};
use abi::point::Point;
use abi::syscall::Errno;

use super::{AT, PAGE, RW, TestKernel, audit, map_at, space, teardown};
use crate::arch::model::testing::Machine;
use crate::mm::Field;

fn retired(k: &TestKernel) -> usize {
    let kinds = (1..k.root().nr_frames.get()).map(|frame| k.frame_folio(frame).kind.get());
    kinds
        .filter(|kind| *kind == FrameKind::Retired as u8)
        .count()
}

/// CPU 1 comes into the kernel and begins a section; ended by `leave`.
fn reader_on_cpu_1(k: &TestKernel) {
    k.on(1, |k| {
        k.rcu_enter_kernel();
        std::mem::forget(k.rcu_read());
    });
}

fn leave(k: &TestKernel) {
    k.on(1, |k| {
        k.this_cpu().rcu.nesting.set(0);
        k.rcu_leave_kernel();
    });
}

/// A page of `mm` and its three tables, unmapped while CPU 1 is in a section.
fn unmapped_below_a_reader(k: &TestKernel, mm: Pa<Mm>) {
    map_at(k, mm, AT, 1, RW);
    k.user_write(0, AT, 1).unwrap();
    reader_on_cpu_1(k);
    k.munmap(mm, AT, PAGE).unwrap();
}

#[test]
fn tables_stay_until_the_reader_has_left_and_no_longer() {
    let machine = Machine::new(2, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    let unmap = || {
        map_at(k, mm, AT, 1, RW);
        k.user_write(0, AT, 1).unwrap();
        k.munmap(mm, AT, PAGE).unwrap();
    };
    unmap();
    assert_eq!(retired(k), 0, "nobody else is in the kernel");
    reader_on_cpu_1(k);
    unmap();
    assert_eq!(retired(k), 3);
    audit(k);
    // The grace period under way is not for what comes later.
    unmap();
    assert_eq!(retired(k), 6);
    k.rcu_poll();
    assert_eq!(retired(k), 6);
    leave(k);
    k.rcu_poll();
    assert_eq!(retired(k), 0);
    teardown(k, &[mm]);
}

/// Between its grace period and the allocator a page-table page is still one that nothing leads to: as a table of its
/// mm it would count as lost (P-10).
#[test]
fn a_table_is_retired_until_it_is_free() {
    let machine = Machine::new(2, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    unmapped_below_a_reader(k, mm);
    leave(k);
    k.arch.at(Point::TableFree, |k| assert_eq!(retired(k), 3));
    k.rcu_poll();
    assert_eq!((retired(k), k.arch.hooks_left()), (0, 0));
    teardown(k, &[mm]);
}

#[test]
fn an_mm_that_a_reader_may_have_found_is_not_reused() {
    let machine = Machine::new(2, "");
    let k = machine.kernel();
    let mm = space(k, &[]);
    reader_on_cpu_1(k);
    let id = k.obj(mm).id.get();
    k.mm_put(mm);
    assert_eq!(k.obj(mm).id.get(), id);
    let other = k.mm_create().unwrap();
    assert!(other != mm);
    audit(k);
    leave(k);
    k.rcu_poll();
    assert_eq!(k.obj(mm).id.get(), 0);
    teardown(k, &[other]);
}

#[test]
fn synchronize_waits_for_the_reader() {
    let machine = Machine::new(2, "");
    let k = machine.kernel();
    k.rcu_enter_kernel();
    reader_on_cpu_1(k);
    k.arch.at(Point::RcuWait, |k| {
        let waits = k.root().cpus[0].rcu.pending.get();
        assert_eq!(waits, 0b10);
        leave(k);
    });
    k.synchronize_rcu();
    assert_eq!(k.arch.hooks_left(), 0);
}

#[test]
fn memory_that_waits_for_a_reader_is_no_want_of_memory() {
    let machine = Machine::with_memory(1 << 20, 2, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    unmapped_below_a_reader(k, mm);
    assert_eq!(retired(k), 3);
    k.arch.at(Point::RcuWait, leave);
    let mut taken = Vec::new();
    let error = loop {
        match k.alloc_frames(0, FrameKind::Kernel) {
            Ok(frame) => taken.push(frame),
            Err(error) => break error,
        }
    };
    assert_eq!((error, retired(k)), (Errno::ENOMEM, 0));
    assert_eq!(k.arch.hooks_left(), 0, "it has waited");
    assert_eq!(k.root().free_frames.get(), 0);
    taken.into_iter().for_each(|frame| k.free_frames(frame));
    teardown(k, &[mm]);
}

#[test]
fn peek_reads_another_address_space_and_nothing_that_is_not_there() {
    let machine = Machine::new(2, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 2, RW);
    k.user_write(0, AT + 8, 77).unwrap();
    let id = k.obj(mm).id.get();
    let peek = |id, gva| {
        k.on(1, |k| {
            k.rcu_enter_kernel();
            let found = k.peek(id, gva);
            k.rcu_leave_kernel();
            found
        })
    };
    assert_eq!(peek(id, AT + 8), Ok(77));
    assert_eq!(peek(id, AT + PAGE), Err(Errno::EFAULT), "no page");
    assert_eq!(peek(id, AT << 1), Err(Errno::EFAULT), "no table");
    assert_eq!(peek(id + 1, AT), Err(Errno::ESRCH));
    teardown(k, &[mm]);
    assert_eq!(peek(id, AT + 8), Err(Errno::ESRCH));
}
