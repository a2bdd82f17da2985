//! Shootdown, lazy TLB mode, and what the seeded bugs do, on TLBs that keep every entry until it is
//! flushed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use abi::channel::EventKind;
use abi::objects::{Mm, Pa};
use abi::point::Point;
use abi::pte::Pte;
use abi::syscall::{advice, prot};

use super::{AT, PAGE, RW, TestKernel, audit, map_at, space, teardown};
use crate::Kernel;
use crate::arch::model::testing::Machine;
use crate::mm::{FaultError, Field, FreedTables, POISON, Slot};

const R: u64 = prot::READ;

/// A page that three CPUs of one mm have in their TLBs, with the value 42.
fn shared(cmdline: &str) -> (Machine, Pa<Mm>) {
    let machine = Machine::new(3, cmdline);
    let mm = space(machine.kernel(), &[0, 1, 2]);
    map_at(machine.kernel(), mm, AT, 4, RW);
    for cpu in 0..3 {
        machine.kernel().user_write(cpu, AT, 42).unwrap();
    }
    (machine, mm)
}

fn cached(k: &TestKernel, cpu: usize, gva: u64) -> bool {
    k.tlb(cpu).pages.contains_key(&gva)
}

#[test]
fn munmap_reaches_every_cpu_of_the_mm_and_no_other() {
    let (machine, mm) = shared("");
    let k = machine.kernel();
    let other = space(k, &[2]);
    let before = k.arch.flushes(2);
    k.munmap(mm, AT, PAGE).unwrap();
    assert!(!cached(k, 0, AT) && !cached(k, 1, AT));
    assert_eq!(k.arch.flushes(2), before);
    for cpu in [0, 1] {
        assert_eq!(k.user_read(cpu, AT), Err(FaultError::NoMapping));
        assert_eq!(
            k.root().cpus[cpu].loaded_asid().tlb_gen.get(),
            k.obj(mm).tlb_gen.get()
        );
    }
    audit(k);
    teardown(k, &[mm, other]);
}

#[test]
fn small_ranges_are_flushed_page_by_page() {
    let (machine, mm) = shared("flush_ceiling=2");
    let k = machine.kernel();
    k.user_write(1, AT + 3 * PAGE, 1).unwrap();
    let before = k.arch.flushes(1);
    k.madvise(mm, AT, PAGE, advice::DONTNEED).unwrap();
    assert_eq!(k.arch.flushes(1), before + 1);
    assert!(!cached(k, 1, AT) && cached(k, 1, AT + 3 * PAGE));
    // Four pages are more than the ceiling: everything goes, at once.
    k.user_write(1, AT, 1).unwrap();
    k.madvise(mm, AT, 4 * PAGE, advice::DONTNEED).unwrap();
    assert_eq!(k.arch.flushes(1), before + 2);
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn shootdown_skip_remote_leaves_stale_translations() {
    let (machine, mm) = shared("bug=shootdown-skip-remote");
    let k = machine.kernel();
    k.munmap(mm, AT, PAGE).unwrap();
    assert_eq!(k.user_read(0, AT), Err(FaultError::NoMapping));
    let stale = k.user_read(1, AT).expect("the other CPU still translates");
    assert_eq!(
        stale & 0xffff_ffff_0000_0fff,
        POISON & 0xffff_ffff_0000_0fff
    );
    // The frame is somebody else's next, and the stale translation reads and writes that.
    map_at(k, mm, AT + 8 * PAGE, 1, RW);
    k.user_write(0, AT + 8 * PAGE, 1234).unwrap();
    assert_eq!(k.user_read(1, AT), Ok(1234));
    k.user_write(1, AT, 666).unwrap();
    assert_eq!(k.user_read(0, AT + 8 * PAGE), Ok(666));
    // mprotect and madvise likewise.
    map_at(k, mm, AT, 1, RW);
    k.on(1, |k| (k.leave_mm(), k.switch_mm(mm)));
    k.user_write(1, AT, 1).unwrap();
    k.mprotect(mm, AT, PAGE, R).unwrap();
    assert_eq!(k.user_write(0, AT, 2), Err(FaultError::Access));
    assert_eq!(k.user_write(1, AT, 2), Ok(()));
    k.madvise(mm, AT, PAGE, advice::DONTNEED).unwrap();
    assert_ne!(k.user_read(1, AT), Ok(0));
    teardown(k, &[mm]);
}

#[test]
fn mprotect_and_madvise_leave_nothing_stale() {
    let (machine, mm) = shared("");
    let k = machine.kernel();
    k.mprotect(mm, AT, PAGE, R).unwrap();
    for cpu in 0..3 {
        assert_eq!(k.user_write(cpu, AT, 2), Err(FaultError::Access));
    }
    k.mprotect(mm, AT, PAGE, 0).unwrap();
    assert_eq!(k.user_read(1, AT), Err(FaultError::Access));
    // More permission needs no flush.
    let before = k.arch.flushes(1);
    k.mprotect(mm, AT, PAGE, RW).unwrap();
    assert_eq!(k.arch.flushes(1), before);
    assert_eq!(k.user_read(1, AT), Ok(42));
    k.madvise(mm, AT, PAGE, advice::DONTNEED).unwrap();
    for cpu in 0..3 {
        assert_eq!(k.user_read(cpu, AT), Ok(0));
    }
    audit(k);
    teardown(k, &[mm]);
}

/// What a thread of the parent and the child see after fork: (child's value, parent's value).
fn write_after_fork(cmdline: &str) -> (u64, u64) {
    let (machine, parent) = shared(cmdline);
    let k = machine.kernel();
    let child = k.mm_fork(parent).unwrap();
    k.user_write(1, AT, 77).unwrap();
    k.on(2, |k| k.switch_mm(child));
    let seen = (k.user_read(2, AT).unwrap(), k.user_read(0, AT).unwrap());
    teardown(k, &[parent, child]);
    seen
}

#[test]
fn fork_without_the_flush_shares_what_the_parent_writes_later() {
    assert_eq!(write_after_fork(""), (42, 77));
    assert_eq!(write_after_fork("bug=fork-no-writeprotect-flush"), (77, 77));
}

/// What CPU 1 reads of a page that CPU 0 is about to flush, and what remains to be read after it.
fn read_before_flush(cmdline: &str) -> u64 {
    let (machine, mm) = shared(cmdline);
    let k = machine.kernel();
    let seen = Arc::new(AtomicU64::new(0));
    let result = Arc::clone(&seen);
    k.arch.at(Point::FlushIssue, move |k| {
        result.store(k.user_read(1, AT).unwrap(), SeqCst);
    });
    k.munmap(mm, AT, PAGE).unwrap();
    assert_eq!(k.arch.hooks_left(), 0);
    assert_eq!(k.user_read(1, AT), Err(FaultError::NoMapping));
    teardown(k, &[mm]);
    seen.load(SeqCst)
}

#[test]
fn free_before_flush_gives_a_reachable_frame_away() {
    assert_eq!(
        read_before_flush(""),
        42,
        "the frame is kept until the flush"
    );
    let poisoned = read_before_flush("bug=free-before-flush");
    assert_eq!(poisoned >> 32, POISON >> 32);
}

#[test]
fn full_batches_are_flushed_before_they_are_freed() {
    let machine = Machine::new(2, "gather_batch=3");
    let k = machine.kernel();
    let mm = space(k, &[0, 1]);
    map_at(k, mm, AT, 10, RW);
    for page in 0..10 {
        k.user_write(1, AT + page * PAGE, 1).unwrap();
    }
    let before = k.obj(mm).tlb_gen.get();
    k.munmap(mm, AT, 10 * PAGE).unwrap();
    assert_eq!(k.obj(mm).tlb_gen.get() - before, 4);
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn a_lazy_cpu_is_passed_by_and_catches_up() {
    let (machine, mm) = shared("");
    let k = machine.kernel();
    k.on(1, Kernel::enter_lazy);
    let before = k.arch.flushes(1);
    k.madvise(mm, AT, PAGE, advice::DONTNEED).unwrap();
    assert_eq!(k.arch.flushes(1), before, "no IPI");
    assert!(cached(k, 1, AT));
    audit(k);
    k.on(1, |k| k.switch_mm(mm));
    assert_eq!(k.arch.flushes(1), before + 1);
    assert_eq!(k.user_read(1, AT), Ok(0));
    // Nothing happened meanwhile: nothing to flush.
    k.on(1, |k| (k.enter_lazy(), k.switch_mm(mm)));
    assert_eq!(k.arch.flushes(1), before + 1);
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn freed_tables_are_flushed_on_lazy_cpus_too() {
    let (machine, mm) = shared("");
    let k = machine.kernel();
    k.on(1, Kernel::enter_lazy);
    assert_eq!(k.tlb(1).tables.len(), 1);
    k.munmap(mm, AT, 4 * PAGE).unwrap();
    assert!(k.tlb(1).tables.is_empty());
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn an_exited_mm_stays_loaded_on_lazy_cpus_without_its_tables() {
    let (machine, mm) = shared("");
    let k = machine.kernel();
    k.on(1, Kernel::enter_lazy);
    k.on(2, Kernel::leave_mm);
    k.mm_put(mm);
    assert!(k.tlb(1).tables.is_empty() && k.tlb(1).pages.is_empty());
    audit(k);
    let pgd = k.obj(mm).pgd.get();
    assert_eq!(k.obj(mm).count.get(), 2, "two CPUs have it loaded");
    k.on(0, Kernel::leave_mm);
    let next = k.mm_create().unwrap();
    assert_ne!(k.obj(next).pgd.get(), pgd, "a loaded table is not reused");
    k.on(1, |k| k.switch_mm(next));
    audit(k);
    teardown(k, &[next]);
}

#[test]
fn a_flush_during_a_switch_is_not_missed() {
    let machine = Machine::new(2, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    // CPU 1 is about to load CR3, with interrupts off, when CPU 0 begins a flush.
    k.arch.at(Point::Cr3Load, move |k| {
        let space = k.obj(mm);
        assert_eq!(space.cpumask.get(), 0b11, "announced before the load");
        let request = &k.root().cpus[0].flush;
        request.mm.set(mm);
        request.end.set(PAGE);
        request.stride.set(PAGE);
        request.tlb_gen.set(space.tlb_gen.fetch_add(1, SeqCst) + 1);
        request.pending.set(0b10);
    });
    k.on(1, |k| k.switch_mm(mm));
    let before = k.arch.flushes(1);
    k.on(1, Kernel::handle_shootdown);
    assert_eq!(k.arch.flushes(1), before + 1);
    assert_eq!(k.root().cpus[0].flush.pending.get(), 0);
    assert_eq!(
        k.root().cpus[1].loaded_asid().tlb_gen.get(),
        k.obj(mm).tlb_gen.get()
    );
    // Doubled or late, the IPI does nothing.
    k.on(1, Kernel::handle_shootdown);
    assert_eq!(k.arch.flushes(1), before + 1);
    k.on(0, |k| k.flush_mm(mm, FreedTables::No));
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn two_shootdowns_in_flight_are_both_served() {
    let (machine, mm) = shared("");
    let k = machine.kernel();
    k.user_write(1, AT + PAGE, 43).unwrap();
    k.user_write(1, AT + 2 * PAGE, 44).unwrap();
    // CPU 0's request is out, not served; CPU 2 numbers another flush before CPU 1 serves both.
    k.arch.at(Point::FlushDispatch, move |k| {
        k.on(2, |k| {
            k.madvise(mm, AT + PAGE, PAGE, advice::DONTNEED).unwrap();
        });
        assert_eq!(k.user_read(1, AT + PAGE), Ok(0));
    });
    k.madvise(mm, AT, PAGE, advice::DONTNEED).unwrap();
    assert_eq!(k.arch.hooks_left(), 0);
    assert_eq!(k.user_read(1, AT), Ok(0));
    assert_eq!(k.user_read(1, AT + 2 * PAGE), Ok(44));
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn a_request_is_not_taken_for_one_that_is_not_out_yet() {
    let (machine, mm) = shared("");
    let k = machine.kernel();
    k.user_write(1, AT + PAGE, 43).unwrap();
    // CPU 0's request is out. CPU 2 has numbered its own, and not sent it, when CPU 1 serves the
    // first: it must not count as having served both after flushing one page.
    k.arch.at(Point::FlushDispatch, move |k| {
        k.obj(mm).tlb_gen.fetch_add(1, SeqCst);
        k.on(1, Kernel::handle_shootdown);
        assert!(!cached(k, 1, AT + PAGE));
        assert_eq!(
            k.root().cpus[1].loaded_asid().tlb_gen.get(),
            k.obj(mm).tlb_gen.get()
        );
    });
    k.madvise(mm, AT, PAGE, advice::DONTNEED).unwrap();
    assert_eq!(k.arch.hooks_left(), 0);
    k.flush_mm(mm, FreedTables::No);
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn a_second_madvise_does_not_return_before_the_first_ones_flush() {
    let (machine, mm) = shared("");
    let k = machine.kernel();
    // CPU 0 has cleared the entry and not flushed; CPU 2 finds nothing to clear.
    k.arch.at(Point::FlushIssue, move |k| {
        k.on(2, |k| k.madvise(mm, AT, PAGE, advice::DONTNEED).unwrap());
        assert_eq!(k.user_read(2, AT), Ok(0));
        assert_eq!(k.user_read(1, AT), Ok(0), "Linux 4647706ebeee");
    });
    k.madvise(mm, AT, PAGE, advice::DONTNEED).unwrap();
    assert_eq!(k.arch.hooks_left(), 0);
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn a_copied_page_is_read_by_all_threads_at_once() {
    let (machine, parent) = shared("");
    let k = machine.kernel();
    let child = k.mm_fork(parent).unwrap();
    for cpu in 0..3 {
        assert_eq!(k.user_read(cpu, AT), Ok(42));
    }
    k.user_write(0, AT, 43).unwrap();
    assert_eq!(k.user_read(1, AT), Ok(43));
    audit(k);
    teardown(k, &[parent, child]);
}

#[test]
fn a_page_dropped_while_it_is_copied_stays_dropped() {
    let (machine, parent) = shared("");
    let k = machine.kernel();
    let child = k.mm_fork(parent).unwrap();
    k.arch.at(Point::CowCopy, move |k| {
        k.on(1, |k| {
            k.madvise(parent, AT, PAGE, advice::DONTNEED).unwrap();
        });
    });
    k.user_write(0, AT + 8, 7).unwrap();
    assert_eq!(k.arch.hooks_left(), 0);
    assert_eq!((k.user_read(1, AT), k.user_read(1, AT + 8)), (Ok(0), Ok(7)));
    audit(k);
    teardown(k, &[parent, child]);
}

#[test]
fn two_cpus_fault_on_one_page_at_once() {
    for point in [Point::FrameAlloc, Point::LockAcquire] {
        let machine = Machine::new(2, "");
        let k = machine.kernel();
        let mm = space(k, &[0, 1]);
        map_at(k, mm, AT, 1, RW);
        k.arch.at(point, |k| k.user_write(1, AT, 5).unwrap());
        assert_eq!(k.user_read(0, AT), Ok(5));
        assert_eq!(k.obj(mm).rss.get(), 1);
        audit(k);
        teardown(k, &[mm]);
    }
}

#[test]
fn two_cpus_copy_one_page_at_once() {
    let (machine, parent) = shared("");
    let k = machine.kernel();
    let child = k.mm_fork(parent).unwrap();
    k.arch
        .at(Point::CowCopy, |k| k.user_write(1, AT, 5).unwrap());
    k.user_write(0, AT + 8, 6).unwrap();
    assert_eq!((k.user_read(0, AT), k.user_read(1, AT + 8)), (Ok(5), Ok(6)));
    audit(k);
    teardown(k, &[parent, child]);
}

#[test]
fn the_events_tell_every_change_of_an_entry() {
    let machine = Machine::new(2, "");
    let k = machine.kernel();
    k.arch.record_events();
    let mm = space(k, &[0, 1]);
    let id = k.obj(mm).id.get();
    map_at(k, mm, AT, 6, RW);
    for page in 0..6 {
        k.user_write(0, AT + page * PAGE, 1).unwrap();
    }
    let child = k.mm_fork(mm).unwrap();
    k.user_write(0, AT, 2).unwrap();
    k.mprotect(mm, AT + PAGE, PAGE, R).unwrap();
    k.munmap(mm, AT + 3 * PAGE, PAGE).unwrap();
    let mut events = Vec::new();
    k.arch.take_events(&mut events);
    let mut entries = std::collections::BTreeMap::new();
    for event in events
        .iter()
        .filter(|e| e.kind == EventKind::PteChange as u32)
    {
        let [mm, gva, level, old, new] = event.args;
        if mm == id && level == 1 {
            let before = entries.insert(gva, new).unwrap_or(0);
            assert_eq!(before, old, "a change of {gva:#x} was not told");
        }
    }
    assert_eq!(entries.len(), 6);
    for (gva, told) in entries {
        let table = k.leaf_table(k.obj(mm), gva).unwrap();
        assert_eq!(k.read_pte(Slot::new(table, 1, gva)), Pte(told));
    }
    let count = |kind: EventKind| events.iter().filter(|e| e.kind == kind as u32).count();
    assert_eq!(
        count(EventKind::ShootdownBegin),
        count(EventKind::ShootdownEnd)
    );
    assert_eq!(count(EventKind::LockAcquire), count(EventKind::LockRelease));
    teardown(k, &[mm, child]);
}
