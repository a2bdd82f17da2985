//! Folios of 2 MiB: how they are mapped, split, shared, moved and gathered.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use abi::failpoint::Failpoint;
use abi::layout::HUGE_PAGE_SIZE as HUGE;
use abi::objects::{FrameKind, Mm, Pa};
use abi::point::Point;
use abi::pte::{Pte, PteFlags};
use abi::syscall::{Errno, advice, mremap, prot};

use super::{AT, PAGE, RW, TestKernel, audit, map_at, space, teardown};
use crate::arch::Arch;
use crate::arch::model::testing::Machine;
use crate::mm::{FaultError, Field};

pub(super) const PAGES: u64 = HUGE / PAGE;

fn machine(cmdline: &str) -> Machine {
    Machine::with_memory(32 << 20, 2, cmdline)
}

/// The leaf entry for `gva`, with its level.
pub(super) fn leaf(k: &TestKernel, mm: Pa<Mm>, gva: u64) -> (u8, Pte) {
    k.leaf_at(k.obj(mm), gva).expect("something is mapped")
}

pub(super) fn is_huge(k: &TestKernel, mm: Pa<Mm>, gva: u64) -> bool {
    k.leaf_at(k.obj(mm), gva)
        .is_some_and(|(level, _)| level == 2)
}

pub(super) fn counts(k: &TestKernel, head: u64) -> (u32, u32, u32) {
    let folio = k.folio(head);
    (folio.refcount.get(), folio.mapcount.get(), folio.used.get())
}

/// An mm on both CPUs that has `count` times 2 MiB mapped whole from `AT` on, each with its number in its pages 0 and 5.
pub(super) fn filled(k: &TestKernel, count: u64) -> Pa<Mm> {
    let mm = space(k, &[0, 1]);
    map_at(k, mm, AT, count * PAGES, RW);
    k.madvise(mm, AT, count * HUGE, advice::HUGEPAGE).unwrap();
    for number in 0..count {
        for page in [0, 5] {
            let gva = AT + number * HUGE + page * PAGE;
            k.user_write(1, gva, 100 * number + page + 1).unwrap();
        }
        assert!(is_huge(k, mm, AT + number * HUGE));
    }
    audit(k);
    mm
}

/// Where only entries of level 2 have changed, one address in every 2 MiB is enough.
#[test]
fn whole_folios_are_flushed_one_by_one() {
    let machine = Machine::with_memory(32 << 20, 2, "flush_ceiling=3");
    let k = machine.kernel();
    let mm = filled(k, 3);
    let before = k.arch.flushes(1);
    k.mprotect(mm, AT, 3 * HUGE, prot::READ).unwrap();
    assert_eq!(k.arch.flushes(1), before + 3, "everything would be one");
    for number in 0..3 {
        k.user_read(1, AT + number * HUGE).unwrap();
    }
    k.munmap(mm, AT, HUGE).unwrap();
    assert_eq!(k.arch.flushes(1), before + 4);
    assert_eq!(k.user_read(1, AT), Err(FaultError::NoMapping));
    teardown(k, &[mm]);
}

#[test]
fn the_policy_decides_what_a_fault_maps() {
    for (thp, advised, huge) in [
        ("never", advice::HUGEPAGE, false),
        ("madvise", advice::NORMAL, false),
        ("madvise", advice::HUGEPAGE, true),
        ("always", advice::NORMAL, true),
        ("always", advice::NOHUGEPAGE, false),
    ] {
        for write in [false, true] {
            let machine = machine(&format!("thp={thp}"));
            let k = machine.kernel();
            let mm = space(k, &[0]);
            map_at(k, mm, AT, PAGES, RW);
            k.madvise(mm, AT, HUGE, advised).unwrap();
            let gva = AT + 7 * PAGE;
            if write {
                k.user_write(0, gva, 1).unwrap();
            } else {
                assert_eq!(k.user_read(0, gva), Ok(0));
            }
            assert_eq!(is_huge(k, mm, gva), huge, "{thp} {advised} {write}");
            let rss = if huge { PAGES } else { 1 };
            assert_eq!(k.obj(mm).rss.get(), rss);
            let mut vector = [9; 2];
            assert_eq!(k.mincore(mm, AT + 6 * PAGE, &mut vector), Ok(2));
            assert_eq!(vector, [u8::from(huge), 1]);
            audit(k);
            teardown(k, &[mm]);
        }
    }
}

#[test]
fn only_whole_aligned_anonymous_memory_is_mapped_by_2_mib() {
    let machine = machine("thp=always");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT + PAGE, PAGES - 1, RW);
    k.user_write(0, AT + PAGE, 1).unwrap();
    assert!(!is_huge(k, mm, AT + PAGE), "it begins too late");
    map_at(k, mm, AT + HUGE, PAGES - 1, RW);
    k.user_write(0, AT + HUGE, 1).unwrap();
    assert!(!is_huge(k, mm, AT + HUGE), "it ends too early");
    // A table is there already, though nothing is in it.
    k.munmap(mm, AT + HUGE, HUGE).unwrap();
    map_at(k, mm, AT + 2 * HUGE, PAGES, RW);
    k.madvise(mm, AT + 2 * HUGE, HUGE, advice::NOHUGEPAGE)
        .unwrap();
    k.user_write(0, AT + 2 * HUGE, 1).unwrap();
    k.madvise(mm, AT + 2 * HUGE, HUGE, advice::DONTNEED)
        .unwrap();
    k.madvise(mm, AT + 2 * HUGE, HUGE, advice::HUGEPAGE)
        .unwrap();
    k.user_write(0, AT + 2 * HUGE, 1).unwrap();
    assert!(!is_huge(k, mm, AT + 2 * HUGE));
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn without_a_block_small_pages_serve() {
    let machine = machine("thp=always");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    let blocks: Vec<_> = std::iter::from_fn(|| k.alloc_frames(9, FrameKind::Stack).ok()).collect();
    map_at(k, mm, AT, PAGES, RW);
    k.user_write(0, AT, 1).unwrap();
    assert!(!is_huge(k, mm, AT));
    assert_eq!(
        k.madvise(mm, AT, HUGE, advice::COLLAPSE),
        Err(Errno::ENOMEM)
    );
    assert_eq!(k.user_read(0, AT), Ok(1));
    blocks.into_iter().for_each(|block| k.free_frames(block));
    audit(k);
    teardown(k, &[mm]);
}

/// Fails the `nth` allocation of a frame from here on.
fn fail(k: &TestKernel, nth: u32) {
    let armed = &k.arch.channel().fail[Failpoint::FrameAlloc as usize];
    armed.store(nth, Relaxed);
}

#[test]
fn every_allocation_of_a_fault_a_collapse_or_a_fork_may_fail() {
    type Act = fn(&TestKernel, Pa<Mm>) -> bool;
    let fault: Act = |k, mm| {
        let _ = mm;
        k.user_write(0, AT + 3 * PAGE, 7).is_ok()
    };
    let collapse: Act = |k, mm| k.madvise(mm, AT, HUGE, advice::COLLAPSE).is_ok();
    let fork: Act = |k, mm| {
        let child = k.mm_fork(mm);
        let done = child.is_ok();
        child.into_iter().for_each(|child| k.mm_put(child));
        done
    };
    for (act, prepared) in [
        (fault, advice::HUGEPAGE),
        (collapse, advice::NOHUGEPAGE),
        (fork, advice::HUGEPAGE),
    ] {
        let mut failed = 0;
        for nth in 1.. {
            let machine = machine("pcp_batch=0");
            let k = machine.kernel();
            let mm = space(k, &[0]);
            map_at(k, mm, AT, PAGES, RW);
            k.madvise(mm, AT, HUGE, prepared).unwrap();
            let touched = !std::ptr::fn_addr_eq(act, fault);
            if touched {
                k.user_write(0, AT + 3 * PAGE, 5).unwrap();
            }
            k.madvise(mm, AT, HUGE, advice::NORMAL).unwrap();
            if prepared == advice::NOHUGEPAGE {
                k.madvise(mm, AT, HUGE, advice::HUGEPAGE).unwrap();
            }
            fail(k, nth);
            let done = act(k, mm);
            let hit = k.arch.channel().fail[Failpoint::FrameAlloc as usize].load(Relaxed) == 0;
            fail(k, 0);
            audit(k);
            let left = match (touched, done) {
                (true, _) => 5,
                (false, true) => 7,
                (false, false) => 0,
            };
            assert_eq!(k.user_read(0, AT + 3 * PAGE), Ok(left), "allocation {nth}");
            teardown(k, &[mm]);
            if !hit {
                break;
            }
            failed += 1;
        }
        assert!(failed > 0, "nothing was allocated");
    }
}

#[test]
fn a_split_keeps_contents_counts_and_exclusivity() {
    let machine = machine("");
    let k = machine.kernel();
    let mm = filled(k, 1);
    let head = leaf(k, mm, AT).1.address();
    assert_eq!(counts(k, head), (1, 1, 1));
    let tables = k.obj(mm).tables.get();
    let free = k.root().free_frames.get();
    k.mprotect(mm, AT + 4 * PAGE, 2 * PAGE, prot::READ).unwrap();
    assert_eq!(counts(k, head), (512, 512, 0));
    assert_eq!(k.obj(mm).tables.get(), tables, "the table was set aside");
    assert!(k.root().free_frames.get() >= free - 8, "but for the VMAs");
    assert_eq!(leaf(k, mm, AT + 5 * PAGE).1.address(), head + 5 * PAGE);
    assert_eq!(k.user_read(0, AT + 5 * PAGE), Ok(6));
    assert!(k.user_write(0, AT + 5 * PAGE, 1).is_err());
    // The other pages are still this mm's alone: no fault, no copy.
    let before = k.root().free_frames.get();
    k.user_write(0, AT, 11).unwrap();
    assert_eq!(k.root().free_frames.get(), before);
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn whole_entries_are_protected_unmapped_and_moved_whole() {
    let machine = machine("");
    let k = machine.kernel();
    let mm = filled(k, 3);
    k.mprotect(mm, AT, HUGE, prot::READ).unwrap();
    assert!(is_huge(k, mm, AT));
    assert!(k.user_write(1, AT, 1).is_err());
    k.mprotect(mm, AT, HUGE, RW).unwrap();
    assert!(leaf(k, mm, AT).1.flags().contains(PteFlags::WRITE));
    k.user_write(1, AT, 2).unwrap();
    k.madvise(mm, AT, HUGE, advice::DONTNEED).unwrap();
    assert_eq!(k.user_read(1, AT), Ok(0));
    audit(k);
    let to = AT + (1 << 39);
    let fixed = mremap::MAYMOVE | mremap::FIXED;
    assert_eq!(k.mremap(mm, AT + HUGE, (HUGE, HUGE), fixed, to), Ok(to));
    assert!(is_huge(k, mm, to), "with the table that was set aside");
    assert_eq!(k.user_read(1, to), Ok(101));
    assert!(k.user_read(1, AT + HUGE).is_err());
    audit(k);
    // Not to a place that is not aligned.
    let odd = AT + (1 << 40) + PAGE;
    let moved = k.mremap(mm, AT + 2 * HUGE, (HUGE, HUGE), fixed, odd);
    assert_eq!(moved, Ok(odd));
    assert_eq!(k.user_read(1, odd + 5 * PAGE), Ok(206));
    assert!(!is_huge(k, mm, odd));
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn a_part_that_is_dropped_reads_zero_and_the_folio_goes_with_the_rest() {
    let machine = machine("");
    let k = machine.kernel();
    let mm = filled(k, 1);
    let head = leaf(k, mm, AT).1.address();
    k.madvise(mm, AT + 5 * PAGE, PAGE, advice::DONTNEED)
        .unwrap();
    assert_eq!(k.user_read(1, AT + 5 * PAGE), Ok(0));
    assert_eq!(k.user_read(1, AT), Ok(1));
    assert_eq!(counts(k, head), (511, 511, 0));
    k.munmap(mm, AT, HUGE - PAGE).unwrap();
    assert_eq!(counts(k, head), (1, 1, 0));
    assert_eq!(k.folio(head).order.get(), 9);
    audit(k);
    k.munmap(mm, AT + HUGE - PAGE, PAGE).unwrap();
    assert_eq!(k.folio(head).refcount.get(), 0);
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn fork_shares_whole_folios_and_a_write_copies_one_page() {
    let machine = machine("");
    let k = machine.kernel();
    let mm = filled(k, 1);
    let head = leaf(k, mm, AT).1.address();
    let child = k.mm_fork(mm).unwrap();
    assert_eq!(counts(k, head), (2, 2, 2));
    assert!(is_huge(k, mm, AT) && is_huge(k, child, AT));
    audit(k);
    k.user_write(0, AT, 50).unwrap();
    assert!(!is_huge(k, mm, AT), "split, and one page copied");
    assert_eq!(counts(k, head), (512, 512, 1));
    audit(k);
    k.on(1, |k| k.switch_mm(child));
    assert_eq!(k.user_read(1, AT), Ok(1));
    assert_eq!(k.user_read(0, AT + 5 * PAGE), Ok(6));
    // The parent goes: what the child has whole is its own.
    k.on(0, |k| k.switch_mm(child));
    k.mm_put(mm);
    k.user_write(1, AT + 5 * PAGE, 7).unwrap();
    assert!(is_huge(k, child, AT), "written in place");
    assert_eq!(counts(k, head), (1, 1, 1));
    audit(k);
    teardown(k, &[child]);
}

#[test]
fn a_pinned_page_is_copied_at_fork_and_keeps_its_frame() {
    let machine = machine("");
    let k = machine.kernel();
    let mm = filled(k, 1);
    let head = leaf(k, mm, AT).1.address();
    let mut frames = [0; 2];
    let fault = |gva, code| k.fault(mm, gva, code);
    let pinned = k.pin_user_pages(mm, AT + 4 * PAGE, true, &mut frames, fault);
    assert_eq!(
        (pinned, frames),
        (Ok(2), [head + 4 * PAGE, head + 5 * PAGE])
    );
    assert_eq!(k.folio(head).pins.get(), 2);
    assert_eq!(counts(k, head), (3, 1, 1));
    assert_eq!(
        k.madvise(mm, AT, HUGE, advice::COLLAPSE),
        Ok(()),
        "it is whole already"
    );
    let child = k.mm_fork(mm).unwrap();
    assert!(!is_huge(k, mm, AT));
    assert_ne!(leaf(k, child, AT + 5 * PAGE).1.address(), frames[1]);
    k.user_write(0, AT + 5 * PAGE, 60).unwrap();
    assert_eq!(leaf(k, mm, AT + 5 * PAGE).1.address(), frames[1]);
    // A page of it is a device's: gathering would part them.
    assert_eq!(
        k.madvise(mm, AT, HUGE, advice::COLLAPSE),
        Err(Errno::EAGAIN)
    );
    k.unpin_user_pages(AT + 4 * PAGE, &frames);
    audit(k);
    assert_eq!(k.madvise(mm, AT, HUGE, advice::COLLAPSE), Ok(()));
    assert_eq!(k.user_read(0, AT + 5 * PAGE), Ok(60));
    k.on(1, |k| k.switch_mm(child));
    assert_eq!(k.user_read(1, AT + 5 * PAGE), Ok(6));
    audit(k);
    teardown(k, &[mm, child]);
}

#[test]
fn collapse_gathers_what_is_there() {
    let machine = machine("thp=never");
    let k = machine.kernel();
    let mm = space(k, &[0, 1]);
    map_at(k, mm, AT, 2 * PAGES, RW);
    // Nothing was ever mapped: no anon_vma.
    assert_eq!(
        k.madvise(mm, AT, HUGE, advice::COLLAPSE),
        Err(Errno::EINVAL)
    );
    for page in [0, 7, 511] {
        k.user_write(1, AT + page * PAGE, page + 1).unwrap();
    }
    assert_eq!(k.user_read(1, AT + 9 * PAGE), Ok(0));
    let free = k.root().free_frames.get();
    assert_eq!(k.madvise(mm, AT, HUGE, advice::COLLAPSE), Ok(()));
    assert!(is_huge(k, mm, AT));
    assert_eq!(k.root().free_frames.get(), free - PAGES + 3);
    for page in [0, 7, 9, 511] {
        let expected = if page == 9 { 0 } else { page + 1 };
        assert_eq!(k.user_read(1, AT + page * PAGE), Ok(expected));
    }
    // There is no table behind the second half.
    assert_eq!(
        k.madvise(mm, AT, 2 * HUGE, advice::COLLAPSE),
        Err(Errno::EINVAL)
    );
    // A range that holds no 2 MiB, one that is empty after rounding, and memory that wants none.
    let collapse = |start, len| k.madvise(mm, start, len, advice::COLLAPSE);
    assert_eq!(collapse(AT + PAGE, 2 * PAGE), Err(Errno::EINVAL));
    assert_eq!(collapse(AT + HUGE, 2 * PAGE), Ok(()));
    k.madvise(mm, AT, HUGE, advice::NOHUGEPAGE).unwrap();
    assert_eq!(collapse(AT, HUGE), Err(Errno::EINVAL));
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn a_scan_collapses_what_the_policy_permits() {
    let machine = machine("thp=madvise");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 3 * PAGES, RW);
    for region in 0..3 {
        k.user_write(0, AT + region * HUGE, region).unwrap();
    }
    assert_eq!(k.scan_for_collapse(mm), 0, "nobody asked for it");
    k.madvise(mm, AT + HUGE, 2 * HUGE, advice::HUGEPAGE)
        .unwrap();
    // One with nothing but zeroes is not worth it.
    k.madvise(mm, AT + HUGE, PAGE, advice::DONTNEED).unwrap();
    assert_eq!(k.scan_for_collapse(mm), 1);
    assert!(!is_huge(k, mm, AT + HUGE) && is_huge(k, mm, AT + 2 * HUGE));
    assert_eq!(k.scan_for_collapse(mm), 0);
    audit(k);
    teardown(k, &[mm]);
}

/// While a collapse waits for its flush another CPU still writes the old pages: nothing of it may be lost.
#[test]
fn what_is_written_until_the_flush_is_collapsed_too() {
    for (bug, expected) in [("", 8), ("bug=collapse-copy-before-flush", 1)] {
        let machine = machine(bug);
        let k = machine.kernel();
        let mm = space(k, &[0, 1]);
        map_at(k, mm, AT, PAGES, RW);
        k.user_write(1, AT, 1).unwrap();
        k.arch
            .at(Point::FlushIssue, |k| k.user_write(1, AT, 8).unwrap());
        assert_eq!(k.madvise(mm, AT, HUGE, advice::COLLAPSE), Ok(()));
        assert_eq!(k.arch.hooks_left(), 0);
        assert_eq!(k.user_read(1, AT), Ok(expected), "{bug}");
        teardown(k, &[mm]);
    }
}

/// Somebody pins a page without a lock while a collapse has just cleared the entry above it: one of the two gives way.
#[test]
fn a_pin_without_a_lock_and_a_collapse_do_not_both_succeed() {
    let machine = machine("");
    let k = machine.kernel();
    let mm = space(k, &[0, 1]);
    map_at(k, mm, AT, PAGES, RW);
    k.user_write(1, AT, 1).unwrap();
    // On its way down, past the entry of level 2, when the collapse runs whole.
    k.arch.at(Point::RefcountChange, move |k| {
        k.on(0, |k| {
            let collapsed = k.madvise(mm, AT, HUGE, advice::COLLAPSE);
            assert_eq!(collapsed, Ok(()));
        });
    });
    let frame = k.on(1, |k| {
        let mut frames = [0];
        let fault = |gva, code| k.fault(mm, gva, code);
        k.pin_user_pages(mm, AT, true, &mut frames, fault).unwrap();
        frames[0]
    });
    assert_eq!(frame, leaf(k, mm, AT).1.address(), "of the new folio");
    k.unpin_user_pages(AT, &[frame]);
    audit(k);
    teardown(k, &[mm]);
}

/// A second thread meets an entry that is being split: it waits, and nothing that it asked for is skipped.
#[test]
fn who_meets_a_split_half_done_waits_for_it() {
    let machine = machine("");
    let k = machine.kernel();
    let mm = filled(k, 1);
    let seen = Arc::new(AtomicU64::new(0));
    let told = Arc::clone(&seen);
    // The entry is invalid, and the upper lock held.
    k.arch.at(Point::FlushIssue, move |k| {
        let entry = k.table_at(k.obj(mm), AT, 2).unwrap();
        let entry = k.read_pte(crate::mm::Slot::new(entry, 2, AT));
        assert!(entry.is_huge() && !entry.is_present());
        assert_eq!(k.obj(mm).huge.get(), 1, "it counts as long as it is split");
        told.store(1, Relaxed);
    });
    k.madvise(mm, AT + 5 * PAGE, PAGE, advice::DONTNEED)
        .unwrap();
    assert_eq!(seen.load(Relaxed), 1);
    assert_eq!(k.obj(mm).huge.get(), 0);
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn a_split_flushes_the_whole_before_the_parts_can_be_reached() {
    for (bug, held) in [("", 0), ("bug=huge-split-no-flush", 1)] {
        let machine = machine(bug);
        let k = machine.kernel();
        let mm = filled(k, 1);
        assert_eq!(k.user_read(0, AT), Ok(1));
        assert_eq!(k.tlb(0).huge.len(), 1);
        // A VMA ends in the middle: the table is there, and nothing else has changed.
        k.madvise(mm, AT + HUGE / 2, HUGE / 2, advice::SEQUENTIAL)
            .unwrap();
        assert!(!is_huge(k, mm, AT));
        assert_eq!(k.tlb(0).huge.len(), held, "{bug}");
        k.on(0, |k| k.flush_mm(mm, crate::mm::FreedTables::No));
        teardown(k, &[mm]);
    }
}

#[test]
fn a_folio_that_one_table_maps_is_split_and_its_unmapped_pages_are_free() {
    let machine = machine("");
    let k = machine.kernel();
    let mm = filled(k, 2);
    let head = leaf(k, mm, AT).1.address();
    k.madvise(mm, AT + 100 * PAGE, 12 * PAGE, advice::DONTNEED)
        .unwrap();
    let free = k.root().free_frames.get();
    assert_eq!(k.split_folios(mm, AT, HUGE), Ok(1));
    assert_eq!(k.root().free_frames.get(), free + 12);
    assert_eq!(k.folio(head).order.get(), 0);
    assert_eq!(counts(k, head + 5 * PAGE), (1, 1, 0));
    audit(k);
    // Each page is this mm's alone, as it was.
    k.user_write(0, AT + 5 * PAGE, 70).unwrap();
    assert_eq!(leaf(k, mm, AT + 5 * PAGE).1.address(), head + 5 * PAGE);
    assert_eq!(k.user_read(0, AT + 105 * PAGE), Ok(0));
    // One that is whole, and then nothing.
    assert_eq!(k.split_folios(mm, AT, 2 * HUGE), Ok(1));
    assert_eq!(k.split_folios(mm, AT, 2 * HUGE), Ok(0));
    assert_eq!(k.split_folios(mm, AT + 1, HUGE), Err(Errno::EINVAL));
    assert_eq!(k.madvise(mm, AT, 2 * HUGE, advice::COLLAPSE), Ok(()));
    assert_eq!(k.user_read(0, AT + 5 * PAGE), Ok(70));
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn a_folio_that_others_use_stays_whole() {
    let machine = machine("");
    let k = machine.kernel();
    let mm = filled(k, 1);
    let head = leaf(k, mm, AT).1.address();
    let mut frames = [0];
    let fault = |gva, code| k.fault(mm, gva, code);
    k.pin_user_pages(mm, AT, true, &mut frames, fault).unwrap();
    assert_eq!(k.split_folios(mm, AT, HUGE), Ok(0), "a device");
    k.unpin_user_pages(AT, &frames);
    let child = k.mm_fork(mm).unwrap();
    assert_eq!(k.split_folios(mm, AT, HUGE), Ok(0), "a child");
    assert_eq!(k.folio(head).order.get(), 9);
    audit(k);
    k.mm_put(child);
    assert_eq!(k.split_folios(mm, AT, HUGE), Ok(1));
    audit(k);
    teardown(k, &[mm]);
}

/// A program's own memory is copied page by page at fork.
#[test]
fn wiring_splits() {
    let machine = machine("");
    let k = machine.kernel();
    let mm = filled(k, 1);
    k.wire(mm, AT, HUGE).unwrap();
    assert!(!is_huge(k, mm, AT));
    let child = k.mm_fork(mm).unwrap();
    assert_ne!(leaf(k, child, AT).1.address(), leaf(k, mm, AT).1.address());
    k.on(1, |k| k.switch_mm(child));
    assert_eq!(k.user_read(1, AT + 5 * PAGE), Ok(6));
    audit(k);
    teardown(k, &[mm, child]);
}

#[test]
fn move_pages_tells_the_node_of_every_page_of_an_entry_of_2_mib() {
    let machine = machine("");
    let k = machine.kernel();
    let mm = filled(k, 1);
    for page in [0, 5, PAGES - 1] {
        assert_eq!(k.page_status(mm, AT + page * PAGE), Ok(0));
    }
    teardown(k, &[mm]);
}

#[test]
fn peek_sees_through_an_entry_of_2_mib() {
    let machine = machine("");
    let k = machine.kernel();
    let mm = filled(k, 1);
    let id = k.obj(mm).id.get();
    k.rcu_enter_kernel();
    assert_eq!(k.peek(id, AT + 5 * PAGE), Ok(6));
    k.mprotect(mm, AT, PAGE, prot::READ).unwrap();
    assert_eq!(k.peek(id, AT + 5 * PAGE), Ok(6));
    k.rcu_return_to_user();
    teardown(k, &[mm]);
}
