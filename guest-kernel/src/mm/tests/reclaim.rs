//! Reclaim and swap: what goes out comes back as it was, whatever happens meanwhile.

use abi::channel::cause;
use abi::disk::DiskOp;
use abi::objects::{FrameKind, Mm, Pa, lru};
use abi::point::Point;
use abi::pte::{NonPresent, Pte, PteFlags};
use abi::syscall::{Errno, advice};

use super::{AT, PAGE, RW, TestKernel, audit, map_at, space, teardown};
use crate::Kernel;
use crate::arch::model::testing::Machine;
use crate::mm::reclaim::Used;
use crate::mm::{FaultError, Field, FreedTables, Slot};

fn entry(k: &TestKernel, mm: Pa<Mm>, gva: u64) -> Pte {
    let table = k.leaf_table(k.obj(mm), gva).unwrap();
    k.read_pte(Slot::new(table, 1, gva))
}

/// The slot that the entry for `gva` names, and whether it says exclusive.
fn swapped(k: &TestKernel, mm: Pa<Mm>, gva: u64) -> Option<(u64, bool)> {
    match entry(k, mm, gva).non_present() {
        Some(NonPresent::Swap { slot, exclusive }) => Some((slot, exclusive)),
        _ => None,
    }
}

fn page_out(k: &TestKernel, mm: Pa<Mm>, gva: u64, pages: u64) {
    k.madvise(mm, gva, pages * PAGE, advice::PAGEOUT).unwrap();
}

/// `pages` pages at [`AT`], each with its number in it.
fn filled(k: &TestKernel, cpus: &[usize], pages: u64) -> Pa<Mm> {
    let mm = space(k, cpus);
    map_at(k, mm, AT, pages, RW);
    for page in 0..pages {
        k.user_write(cpus[0], AT + page * PAGE, 100 + page).unwrap();
    }
    mm
}

/// Takes all free frames but `left`.
fn starve(k: &TestKernel, left: usize) -> Vec<u64> {
    let mut taken = Vec::new();
    while let Ok(frame) = k.alloc_free_frame(FrameKind::Stack) {
        taken.push(frame);
    }
    for frame in taken.drain(..left) {
        k.free_frames(frame);
    }
    taken
}

fn feed(k: &TestKernel, taken: Vec<u64>) {
    taken.into_iter().for_each(|frame| k.free_frames(frame));
}

#[test]
fn a_page_goes_out_and_comes_back() {
    let machine = Machine::new(2, "swap_slots=16");
    let k = machine.kernel();
    let mm = filled(k, &[0, 1], 3);
    let free = k.root().free_frames.get();
    page_out(k, mm, AT, 3);
    audit(k);
    assert_eq!(k.root().free_frames.get(), free + 3);
    for page in 0..3 {
        assert_eq!(swapped(k, mm, AT + page * PAGE), Some((page, true)));
    }
    assert_eq!(k.arch.disk().done, [0, 3]);
    assert_eq!(k.obj(mm).rss.get(), 0);
    // One fault reads all three.
    assert_eq!(k.user_read(1, AT + PAGE), Ok(101));
    audit(k);
    assert_eq!(k.arch.disk().done, [3, 3]);
    let now = entry(k, mm, AT + PAGE);
    assert!(!now.flags().intersects(PteFlags::WRITE | PteFlags::COW));
    assert!(k.folio_is_exclusive(now.address()));
    assert_eq!(k.user_read(0, AT), Ok(100));
    k.user_write(0, AT + 2 * PAGE, 7).unwrap();
    audit(k);
    assert_eq!(k.arch.disk().done, [3, 3]);
    assert_eq!(k.root().swap.used.get(), 2, "what is written needs no slot");
    // What is clean still is in its slot.
    page_out(k, mm, AT, 3);
    assert_eq!(k.arch.disk().done, [3, 4]);
    for (page, value) in [100, 101, 7].into_iter().enumerate() {
        assert_eq!(k.user_read(0, AT + page as u64 * PAGE), Ok(value));
    }
    audit(k);
    teardown(k, &[mm]);
    assert_eq!(k.root().swap.used.get(), 0);
}

#[test]
fn memory_may_be_larger_than_it_is() {
    let machine = Machine::new(1, "swap_slots=200 pcp_batch=4");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 150, RW);
    let taken = starve(k, 60);
    for round in 0..3 {
        for page in 0..150 {
            let gva = AT + page * PAGE;
            assert_eq!(k.user_read(0, gva), Ok(page * round), "page {page}");
            k.user_write(0, gva, page * (round + 1)).unwrap();
        }
        audit(k);
    }
    assert!(k.root().swap.used.get() > 80);
    k.munmap(mm, AT, 70 * PAGE).unwrap();
    audit(k);
    feed(k, taken);
    teardown(k, &[mm]);
    assert_eq!(k.root().swap.used.get(), 0);
}

#[test]
fn without_room_for_more_it_is_an_error_and_nothing_is_lost() {
    let machine = Machine::new(1, "swap_slots=20");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 200, RW);
    let taken = starve(k, 40);
    let mut filled = 0;
    let full = loop {
        match k.user_write(0, AT + filled * PAGE, 100 + filled) {
            Ok(()) => filled += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(full, FaultError::NoMemory);
    assert!(filled > 40, "{filled}");
    audit(k);
    assert_eq!(k.root().swap.used.get(), 20);
    let child = k.mm_fork(mm);
    assert_eq!(child, Err(Errno::ENOMEM));
    // With some room again all of it is still there.
    k.munmap(mm, AT + (filled - 4) * PAGE, 4 * PAGE).unwrap();
    for page in 0..filled - 4 {
        assert_eq!(k.user_read(0, AT + page * PAGE), Ok(100 + page));
    }
    audit(k);
    feed(k, taken);
    teardown(k, &[mm]);
}

#[test]
fn a_disk_that_fails_to_write_loses_nothing() {
    let machine = Machine::new(1, "swap_slots=16");
    let k = machine.kernel();
    let mm = filled(k, &[0], 4);
    k.arch.disk().fails = Some(DiskOp::Write);
    let free = k.root().free_frames.get();
    page_out(k, mm, AT, 4);
    audit(k);
    assert_eq!(k.root().free_frames.get(), free);
    for page in 0..4 {
        assert_eq!(k.user_read(0, AT + page * PAGE), Ok(100 + page));
    }
    // Nothing can go out: out of memory is an error.
    map_at(k, mm, AT + 100 * PAGE, 50, RW);
    let taken = starve(k, 4);
    let result = (0..50).try_for_each(|page| k.user_write(0, AT + (100 + page) * PAGE, 1));
    assert_eq!(result, Err(FaultError::NoMemory));
    audit(k);
    k.arch.disk().fails = None;
    let result = (0..8).try_for_each(|page| k.user_write(0, AT + (100 + page) * PAGE, 1));
    assert_eq!(result, Ok(()));
    feed(k, taken);
    teardown(k, &[mm]);
}

#[test]
fn a_page_that_cannot_be_read_is_a_bus_error_to_who_touches_it() {
    let machine = Machine::new(1, "swap_slots=16 swap_readahead=1");
    let k = machine.kernel();
    let mm = filled(k, &[0], 2);
    page_out(k, mm, AT, 2);
    k.arch.disk().fails = Some(DiskOp::Read);
    assert_eq!(k.user_read(0, AT), Err(FaultError::Bus));
    assert_eq!(k.user_write(0, AT, 1), Err(FaultError::Bus));
    k.arch.disk().fails = None;
    // The other page is not lost.
    assert_eq!(k.user_read(0, AT + PAGE), Ok(101));
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn shared_pages_are_shared_in_their_slot_and_parted_by_a_write() {
    let machine = Machine::new(2, "swap_slots=16");
    let k = machine.kernel();
    let mm = filled(k, &[0], 2);
    page_out(k, mm, AT, 1);
    let child = k.mm_fork(mm).unwrap();
    k.on(1, |k| k.switch_mm(child));
    audit(k);
    let slot = swapped(k, mm, AT).unwrap();
    assert_eq!((swapped(k, child, AT), slot.1), (Some(slot), false));
    assert_eq!(k.swap_slot(slot.0).count.get(), 2);
    // The second page goes out while both map it: by reclaim, not by advice, which leaves it to others.
    page_out(k, mm, AT + PAGE, 1);
    assert!(entry(k, mm, AT + PAGE).is_present());
    assert!(k.reclaim(1) >= 1);
    audit(k);
    let both = swapped(k, mm, AT + PAGE).unwrap();
    assert_eq!(swapped(k, child, AT + PAGE), Some(both));
    assert_eq!(k.user_read(1, AT), Ok(100));
    k.user_write(0, AT, 1).unwrap();
    k.user_write(1, AT + PAGE, 2).unwrap();
    audit(k);
    assert_eq!((k.user_read(1, AT), k.user_read(0, AT)), (Ok(100), Ok(1)));
    let second = (k.user_read(1, AT + PAGE), k.user_read(0, AT + PAGE));
    assert_eq!(second, (Ok(2), Ok(101)));
    audit(k);
    teardown(k, &[child, mm]);
    assert_eq!(k.root().swap.used.get(), 0);
}

#[test]
fn locked_and_pinned_pages_stay() {
    let machine = Machine::new(1, "swap_slots=16");
    let k = machine.kernel();
    let mm = filled(k, &[0], 3);
    k.mlock(mm, AT, PAGE, 0).unwrap();
    let mut frames = [0];
    let fault = |gva, code| k.fault(mm, gva, code);
    k.pin_user_pages(mm, AT + PAGE, true, &mut frames, fault)
        .unwrap();
    assert_eq!(k.reclaim(3), 1);
    assert!(entry(k, mm, AT).is_present() && entry(k, mm, AT + PAGE).is_present());
    assert!(swapped(k, mm, AT + 2 * PAGE).is_some());
    k.unpin_user_pages(AT + PAGE, &frames);
    audit(k);
    assert_eq!(k.madvise(mm, AT, PAGE, advice::PAGEOUT), Err(Errno::EINVAL));
    teardown(k, &[mm]);
}

/// As who copies it on a write holds it: it would come back to find it gone, for ever in little memory.
#[test]
fn a_page_that_somebody_holds_is_not_unmapped() {
    let machine = Machine::new(1, "swap_slots=16");
    let k = machine.kernel();
    let mm = filled(k, &[0], 2);
    let frame = entry(k, mm, AT).address();
    k.folio_get(frame, cause::HOLD);
    assert_eq!(k.reclaim(2), 1);
    assert_eq!(entry(k, mm, AT).address(), frame);
    k.folio_put(frame, cause::HOLD);
    assert_eq!(k.reclaim(1), 1);
    assert!(swapped(k, mm, AT).is_some());
    teardown(k, &[mm]);
}

#[test]
fn a_page_that_is_used_while_it_is_written_stays() {
    let machine = Machine::new(2, "swap_slots=16");
    let k = machine.kernel();
    let mm = filled(k, &[0, 1], 1);
    let frame = entry(k, mm, AT).address();
    k.arch.at(Point::DiskWait, |k| {
        k.user_write(1, AT, 3).unwrap();
    });
    page_out(k, mm, AT, 1);
    assert_eq!(k.arch.hooks_left(), 0);
    assert_eq!(entry(k, mm, AT).address(), frame);
    audit(k);
    page_out(k, mm, AT, 1);
    assert_eq!(k.user_read(0, AT), Ok(3));
    teardown(k, &[mm]);
}

/// Two transfers of one page must not be under way, and the last to use it lets go of it.
#[test]
fn pages_that_go_while_they_are_moved_leave_nothing() {
    for whole in [false, true] {
        let machine = Machine::new(2, "swap_slots=16");
        let k = machine.kernel();
        let mm = filled(k, &[0], 4);
        k.arch.at(Point::DiskWait, move |k| {
            k.on(1, |k| {
                if whole {
                    k.munmap(mm, AT, 4 * PAGE).unwrap();
                } else {
                    k.madvise(mm, AT, 3 * PAGE, advice::DONTNEED).unwrap();
                }
            });
        });
        assert!(k.reclaim(4) >= 3);
        assert_eq!(k.arch.hooks_left(), 0);
        audit(k);
        if !whole {
            assert_eq!(k.user_read(0, AT), Ok(0));
            // What is being read.
            k.arch.at(Point::DiskWait, move |k| {
                let gone = k.on(1, |k| k.madvise(mm, AT, 4 * PAGE, advice::DONTNEED));
                assert_eq!(gone, Ok(()));
            });
            assert_eq!(k.user_read(0, AT + 3 * PAGE), Ok(0));
            assert_eq!(k.arch.hooks_left(), 0);
        }
        audit(k);
        assert_eq!(k.root().swap.used.get(), 0);
        teardown(k, &[mm]);
    }
}

/// What CPU 2 reads after CPU 1 has dropped a page, which CPU 0 has unmapped and not yet flushed.
fn drop_during_reclaim(bug: &str) -> u64 {
    let machine = Machine::new(3, &std::format!("swap_slots=16 {bug}"));
    let k = machine.kernel();
    let mm = filled(k, &[2, 1, 0], 1);
    k.arch.at(Point::PteClear, |_| {});
    let found = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(1));
    let told = found.clone();
    // Its page-table lock is free again.
    k.arch.at(Point::LockRelease, |_| {});
    k.arch.at(Point::LockRelease, move |k| {
        k.on(1, |k| k.madvise(mm, AT, PAGE, advice::DONTNEED))
            .unwrap();
        told.set(k.user_read(2, AT).unwrap());
    });
    assert_eq!(k.reclaim(1), 1);
    assert_eq!(k.arch.hooks_left(), 0);
    found.get()
}

#[test]
fn who_finds_an_entry_gone_waits_for_the_flush_of_the_batch() {
    assert_eq!(drop_during_reclaim(""), 0);
    assert_eq!(drop_during_reclaim("bug=batched-flush-ignored"), 100);
}

/// What CPU 1 finds, by the translation that it has, in the page that CPU 0 reclaims, just before the flush.
fn read_during_reclaim(bug: &str) -> Result<u64, FaultError> {
    let machine = Machine::new(2, &std::format!("swap_slots=16 {bug}"));
    let k = machine.kernel();
    let mm = filled(k, &[1, 0], 1);
    let found = std::sync::Arc::new(std::sync::Mutex::new(None));
    let told = found.clone();
    k.arch.at(Point::FlushIssue, move |k| {
        *told.lock().unwrap() = Some(k.user_read(1, AT));
    });
    page_out(k, mm, AT, 1);
    let found = *found.lock().unwrap();
    found.unwrap()
}

#[test]
fn nothing_is_freed_before_the_flush_of_the_batch() {
    assert_eq!(read_during_reclaim(""), Ok(100));
    let poison = read_during_reclaim("bug=reclaim-free-before-flush");
    assert_ne!(poison, Ok(100));
}

#[test]
fn what_is_used_again_is_activated_and_what_is_not_goes_first() {
    let machine = Machine::new(1, "swap_slots=64");
    let k = machine.kernel();
    let mm = filled(k, &[0], 24);
    assert_eq!(
        (k.lru_count(lru::INACTIVE), k.lru_count(lru::ACTIVE)),
        (24, 0)
    );
    let use_first = || {
        k.flush_mm(mm, FreedTables::No);
        (0..8).for_each(|page| assert!(k.user_read(0, AT + page * PAGE).is_ok()));
    };
    // Seen used once, they are kept; twice, they become active.
    for _ in 0..2 {
        use_first();
        assert_eq!(
            k.shrink_folios(&k.lru_isolate(lru::INACTIVE, 8), Used::Counts),
            0
        );
        for _ in 0..2 {
            let others = k.lru_isolate(lru::INACTIVE, 8);
            others.frames().iter().for_each(|gpa| k.lru_put_back(*gpa));
        }
    }
    assert_eq!(k.lru_count(lru::ACTIVE), 8);
    audit(k);
    assert!(k.reclaim(16) >= 16);
    for page in 0..24 {
        assert_eq!(
            swapped(k, mm, AT + page * PAGE).is_none(),
            page < 8,
            "{page}"
        );
    }
    teardown(k, &[mm]);
}

#[test]
fn advice_ages_pages_out_and_reads_them_in() {
    let machine = Machine::new(1, "swap_slots=64 swap_readahead=1");
    let k = machine.kernel();
    let mm = filled(k, &[0], 4);
    k.madvise(mm, AT, 4 * PAGE, advice::COLD).unwrap();
    audit(k);
    assert!(!entry(k, mm, AT).flags().contains(PteFlags::ACCESSED));
    assert_eq!(k.reclaim(4), 4, "at the first look");
    k.madvise(mm, AT, 3 * PAGE, advice::WILLNEED).unwrap();
    audit(k);
    assert_eq!(k.arch.disk().done[0], 3);
    for page in 0..3 {
        assert_eq!(k.user_read(0, AT + page * PAGE), Ok(100 + page));
    }
    assert_eq!(k.arch.disk().done[0], 3, "they were there");
    // Given up: dropped without a slot, and zeroes from then on; what is written again is not.
    k.madvise(mm, AT, 2 * PAGE, advice::FREE).unwrap();
    k.user_write(0, AT + PAGE, 9).unwrap();
    let writes = k.arch.disk().done[1];
    page_out(k, mm, AT, 2);
    audit(k);
    assert_eq!(entry(k, mm, AT), Pte::NONE);
    assert_eq!(k.user_read(0, AT), Ok(0));
    assert_eq!(k.user_read(0, AT + PAGE), Ok(9));
    page_out(k, mm, AT + PAGE, 1);
    assert_eq!(k.user_read(0, AT + PAGE), Ok(9));
    assert_eq!(k.arch.disk().done[1], writes + 1);
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn a_page_that_moves_to_another_frame_is_reclaimed_there() {
    let machine = Machine::new(1, "swap_slots=16");
    let k = machine.kernel();
    let mm = filled(k, &[0], 2);
    let before = entry(k, mm, AT).address();
    assert_eq!(k.migrate_range(mm, AT, PAGE), Ok(1));
    assert_ne!(entry(k, mm, AT).address(), before);
    audit(k);
    page_out(k, mm, AT, 2);
    assert!(swapped(k, mm, AT).is_some());
    assert_eq!(k.user_read(0, AT), Ok(100));
    // In the swap cache it stays where it is: its slot names the frame.
    assert_eq!(k.migrate_range(mm, AT, PAGE), Ok(0));
    audit(k);
    teardown(k, &[mm]);
}

/// A page that was read in is clean in every entry; who shares it by fork has not given it up.
#[test]
fn what_one_process_gives_up_another_keeps() {
    let machine = Machine::new(2, "swap_slots=16");
    let k = machine.kernel();
    let mm = filled(k, &[0], 1);
    page_out(k, mm, AT, 1);
    assert_eq!(k.user_read(0, AT), Ok(100));
    let child = k.mm_fork(mm).unwrap();
    k.on(1, |k| k.switch_mm(child));
    k.madvise(mm, AT, PAGE, advice::FREE).unwrap();
    k.reclaim(1);
    audit(k);
    assert_eq!(k.user_read(1, AT), Ok(100));
    let given_up = k.user_read(0, AT);
    assert!([Ok(0), Ok(100)].contains(&given_up));
    // Without a sharer it goes, though it was in the cache.
    k.on(1, Kernel::leave_mm);
    k.mm_put(child);
    assert!(k.user_read(0, AT).is_ok());
    k.madvise(mm, AT, PAGE, advice::FREE).unwrap();
    page_out(k, mm, AT, 1);
    assert_eq!(k.user_read(0, AT), Ok(0));
    audit(k);
    teardown(k, &[mm]);
}
