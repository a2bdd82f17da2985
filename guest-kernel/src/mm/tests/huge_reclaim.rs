//! Folios of 2 MiB on the LRU lists: what reclaim and MADV_COLD and MADV_PAGEOUT make of them.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use abi::layout::HUGE_PAGE_SIZE as HUGE;
use abi::objects::{Mm, Pa, folio_state, lru};
use abi::point::Point;
use abi::pte::PteFlags;
use abi::syscall::{advice, mremap, prot};

use super::huge::{PAGES, counts, filled, is_huge, leaf};
use super::{AT, PAGE, RW, TestKernel, audit, map_at, space, teardown};
use crate::arch::model::testing::Machine;
use crate::mm::reclaim::Used;
use crate::mm::{Field, FreedTables};

fn machine(cmdline: &str) -> Machine {
    Machine::with_memory(32 << 20, 2, cmdline)
}

/// [`filled`], and the head of its first folio.
fn folio(k: &TestKernel, count: u64) -> (Pa<Mm>, u64) {
    let mm = filled(k, count);
    (mm, leaf(k, mm, AT).1.address())
}

fn state(k: &TestKernel, head: u64, bit: u8) -> bool {
    k.folio(head).state.get() & bit != 0
}

/// Reclaims until nothing of `mm` is in memory, or nothing helps.
fn reclaim_all(k: &TestKernel, mm: Pa<Mm>) -> u64 {
    for _ in 0..8 {
        k.reclaim(2 * PAGES);
    }
    audit(k);
    k.obj(mm).rss.get()
}

fn reads_back(k: &TestKernel, cpu: usize, number: u64) {
    for page in [0, 5] {
        let gva = AT + number * HUGE + page * PAGE;
        assert_eq!(k.user_read(cpu, gva), Ok(100 * number + page + 1));
    }
}

#[test]
fn a_folio_is_listed_split_and_reclaimed_page_by_page() {
    let machine = machine("swap_slots=2000");
    let k = machine.kernel();
    let (mm, head) = folio(k, 2);
    assert_eq!(k.lru_count(lru::INACTIVE), 2 * PAGES, "in pages");
    // Used since the last look: it is kept, and the entry of level 2 forgets.
    assert_eq!(
        leaf(k, mm, AT).1.flags() & PteFlags::ACCESSED,
        PteFlags::ACCESSED
    );
    let free = k.root().free_frames.get();
    assert!(k.reclaim(1) >= 1);
    audit(k);
    assert!(!is_huge(k, mm, AT) || !is_huge(k, mm, AT + HUGE));
    assert!(k.root().free_frames.get() > free);
    assert_eq!(reclaim_all(k, mm), 0);
    assert_eq!(k.root().swap.used.get(), 2 * PAGES);
    assert!(k.folio(head).order.get() < 9 || k.folio(head).refcount.get() == 0);
    reads_back(k, 1, 0);
    reads_back(k, 0, 1);
    audit(k);
    teardown(k, &[mm]);
    assert_eq!(k.root().swap.used.get(), 0);
}

#[test]
fn one_that_was_used_is_kept() {
    let machine = machine("swap_slots=2000");
    let k = machine.kernel();
    let (mm, head) = folio(k, 1);
    let mut taken = k.lru_isolate(lru::INACTIVE, 1);
    assert_eq!(k.shrink_folios(&taken, Used::Counts), 0);
    assert!(state(k, head, folio_state::REFERENCED) && !state(k, head, folio_state::ACTIVE));
    assert!(!leaf(k, mm, AT).1.flags().contains(PteFlags::ACCESSED));
    // As programs do, past a TLB.
    k.on(0, |k| k.flush_mm(mm, FreedTables::No));
    reads_back(k, 0, 0);
    taken = k.lru_isolate(lru::INACTIVE, 1);
    assert_eq!(k.shrink_folios(&taken, Used::Counts), 0);
    assert!(state(k, head, folio_state::ACTIVE) && is_huge(k, mm, AT));
    assert_eq!(
        (k.lru_count(lru::INACTIVE), k.lru_count(lru::ACTIVE)),
        (0, PAGES)
    );
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn one_that_others_use_stays_whole() {
    let machine = machine("swap_slots=2000");
    let k = machine.kernel();
    let (mm, head) = folio(k, 1);
    let mut frames = [0];
    let fault = |gva, code| k.fault(mm, gva, code);
    k.pin_user_pages(mm, AT, true, &mut frames, fault).unwrap();
    assert_eq!(reclaim_all(k, mm), PAGES, "a device");
    assert!(is_huge(k, mm, AT));
    k.unpin_user_pages(AT, &frames);
    let child = k.mm_fork(mm).unwrap();
    assert_eq!(reclaim_all(k, mm), PAGES, "a child");
    assert!(is_huge(k, mm, AT) && is_huge(k, child, AT));
    assert_eq!(counts(k, head), (2, 2, 2));
    k.mm_put(child);
    assert_eq!(reclaim_all(k, mm), 0);
    reads_back(k, 0, 0);
    teardown(k, &[mm]);
}

#[test]
fn without_a_free_slot_it_stays_whole() {
    let machine = machine("swap_slots=1");
    let k = machine.kernel();
    let (mm, _) = folio(k, 2);
    map_at(k, mm, AT + 2 * HUGE, 1, RW);
    k.user_write(0, AT + 2 * HUGE, 1).unwrap();
    k.madvise(mm, AT + 2 * HUGE, PAGE, advice::PAGEOUT).unwrap();
    assert_eq!(reclaim_all(k, mm), 2 * PAGES);
    assert!(is_huge(k, mm, AT) && is_huge(k, mm, AT + HUGE));
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn locked_memory_stays_and_the_rest_of_the_folio_goes() {
    let machine = machine("swap_slots=2000");
    let k = machine.kernel();
    let (mm, head) = folio(k, 1);
    k.mlock(mm, AT, HUGE, 0).unwrap();
    assert_eq!(reclaim_all(k, mm), PAGES);
    assert!(is_huge(k, mm, AT) && state(k, head, folio_state::UNEVICTABLE));
    assert_eq!(k.lru_count(lru::UNEVICTABLE), PAGES);
    // A part is unlocked: what is not is kept, page by page.
    k.munlock(mm, AT + 100 * PAGE, HUGE - 100 * PAGE).unwrap();
    assert_eq!(reclaim_all(k, mm), 100);
    assert_eq!(k.lru_count(lru::UNEVICTABLE), 100);
    reads_back(k, 0, 0);
    k.munlock(mm, AT, HUGE).unwrap();
    assert_eq!(reclaim_all(k, mm), 0);
    reads_back(k, 1, 0);
    teardown(k, &[mm]);
}

#[test]
fn pageout_takes_what_it_is_asked_for() {
    let machine = machine("swap_slots=2000");
    let k = machine.kernel();
    let (mm, _) = folio(k, 3);
    let page_out = |gva, bytes| k.madvise(mm, gva, bytes, advice::PAGEOUT).unwrap();
    // All of one; a part; what is mapped page by page already.
    page_out(AT, HUGE);
    assert_eq!(k.obj(mm).rss.get(), 2 * PAGES);
    page_out(AT + HUGE + 3 * PAGE, 7 * PAGE);
    assert_eq!(k.obj(mm).rss.get(), 2 * PAGES - 7);
    audit(k);
    let second = leaf(k, mm, AT + HUGE).1.address();
    assert_eq!(k.folio(second).order.get(), 0, "a folio of one page");
    let third = AT + 2 * HUGE;
    k.mprotect(mm, third + PAGE, PAGE, prot::READ).unwrap();
    assert!(!is_huge(k, mm, third) && k.is_large(leaf(k, mm, third).1.address()));
    page_out(third, 10 * PAGE);
    assert_eq!(k.obj(mm).rss.get(), 2 * PAGES - 17);
    audit(k);
    for number in 0..3 {
        reads_back(k, 0, number);
    }
    teardown(k, &[mm]);
}

#[test]
fn pageout_leaves_what_others_map() {
    let machine = machine("swap_slots=2000");
    let k = machine.kernel();
    let (mm, _) = folio(k, 1);
    let child = k.mm_fork(mm).unwrap();
    for bytes in [HUGE, 9 * PAGE] {
        k.madvise(mm, AT, bytes, advice::PAGEOUT).unwrap();
        assert!(is_huge(k, mm, AT) && is_huge(k, child, AT));
    }
    // By pages in one of them.
    k.mprotect(mm, AT, PAGE, prot::READ).unwrap();
    k.madvise(mm, AT, HUGE, advice::PAGEOUT).unwrap();
    assert_eq!(k.obj(mm).rss.get(), PAGES);
    audit(k);
    teardown(k, &[child, mm]);
}

#[test]
fn cold_memory_stays_whole_and_goes_first() {
    let machine = machine("swap_slots=2000");
    let k = machine.kernel();
    let (mm, head) = folio(k, 2);
    k.madvise(mm, AT, HUGE, advice::COLD).unwrap();
    assert!(is_huge(k, mm, AT) && !leaf(k, mm, AT).1.flags().contains(PteFlags::ACCESSED));
    let list = &k.root().lru[lru::INACTIVE];
    assert_eq!(list.first.get() * PAGE, head);
    audit(k);
    // A part of it is a part.
    k.madvise(mm, AT + HUGE + PAGE, PAGE, advice::COLD).unwrap();
    assert_eq!(k.folio(leaf(k, mm, AT + HUGE).1.address()).order.get(), 0);
    audit(k);
    teardown(k, &[mm]);
}

/// Pages that were given up before the split go without a slot.
#[test]
fn what_was_given_up_needs_no_slot() {
    let machine = machine("swap_slots=2000");
    let k = machine.kernel();
    let (mm, _) = folio(k, 1);
    k.madvise(mm, AT, 300 * PAGE, advice::FREE).unwrap();
    assert_eq!(reclaim_all(k, mm), 0);
    assert_eq!(k.root().swap.used.get(), PAGES - 300);
    assert_eq!(k.user_read(0, AT), Ok(0));
    teardown(k, &[mm]);
}

/// What a parent has given up is its child's still: memory that was gathered, though nobody has written to it there.
#[test]
fn what_one_process_gives_up_stays_the_others() {
    let machine = machine("swap_slots=2000 thp=never");
    let k = machine.kernel();
    let (mm, page) = (space(k, &[0]), AT + 5 * PAGE);
    map_at(k, mm, AT, PAGES, RW);
    for number in 0..6 {
        k.user_write(0, AT + number * PAGE, number + 1).unwrap();
    }
    k.mprotect(mm, AT, HUGE, prot::READ).unwrap();
    k.madvise(mm, AT, HUGE, advice::COLLAPSE).unwrap();
    assert!(is_huge(k, mm, AT));
    let child = k.mm_fork(mm).unwrap();
    k.madvise(mm, page, PAGE, advice::FREE).unwrap();
    k.on(0, |k| k.switch_mm(child));
    k.mm_put(mm);
    reclaim_all(k, child);
    assert_eq!(k.user_read(0, page), Ok(6));
    audit(k);
    teardown(k, &[child]);
}

/// Reclaims when so many locks were released, unless a page-table lock is held still. Tells whether that splits the entry.
fn reclaim_after(k: &TestKernel, mm: Pa<Mm>, releases: u64) -> Arc<AtomicU64> {
    let told = Arc::new(AtomicU64::new(0));
    let done = Arc::clone(&told);
    for _ in 0..releases {
        k.arch.at(Point::LockRelease, |_| {});
    }
    k.arch.at(Point::LockRelease, move |k| {
        let frames = 1..k.root().nr_frames.get();
        if frames
            .clone()
            .all(|frame| k.frame_folio(frame).lock.get() == 0)
        {
            // The first look makes it forget that it was used.
            k.reclaim(1);
            k.reclaim(1);
            done.store(k.obj(mm).huge.get() ^ 1, Relaxed);
        }
    });
    told
}

/// Reclaim splits an entry at any moment of an mremap: what it maps moves all the same.
#[test]
fn an_entry_that_reclaim_splits_meanwhile_moves_with_its_pages() {
    let mut split = 0;
    for releases in 0..60 {
        let machine = machine("swap_slots=2000");
        let k = machine.kernel();
        let (mm, _) = folio(k, 1);
        let told = reclaim_after(k, mm, releases);
        let to = AT + 8 * HUGE;
        let flags = mremap::MAYMOVE | mremap::FIXED;
        assert_eq!(k.mremap(mm, AT, (HUGE, HUGE), flags, to), Ok(to));
        split += told.load(Relaxed);
        if k.arch.hooks_left() > 0 {
            break;
        }
        audit(k);
        for page in [0, 5] {
            assert_eq!(k.user_read(0, to + page * PAGE), Ok(page + 1), "{releases}");
        }
        teardown(k, &[mm]);
    }
    assert!(split > 5, "in {split} places");
}

/// The same of fork, which copies entries of 2 MiB first, and tables then.
#[test]
fn an_entry_that_reclaim_splits_meanwhile_is_copied_once() {
    let mut split = 0;
    for releases in 0..120 {
        let machine = machine("swap_slots=2000");
        let k = machine.kernel();
        let (mm, _) = folio(k, 1);
        let told = reclaim_after(k, mm, releases);
        let child = k.mm_fork(mm).unwrap();
        split += told.load(Relaxed);
        if k.arch.hooks_left() > 0 {
            break;
        }
        k.on(1, |k| k.switch_mm(child));
        audit(k);
        reads_back(k, 0, 0);
        reads_back(k, 1, 0);
        k.user_write(1, AT + PAGE, 9).unwrap();
        assert_eq!(k.user_read(0, AT + PAGE), Ok(0));
        teardown(k, &[child, mm]);
    }
    assert!(split > 5, "in {split} places");
}

/// The folios on the split queue.
fn queued(k: &TestKernel) -> u64 {
    k.root().split_queue.count.get() / PAGES
}

#[test]
fn what_is_partly_unmapped_is_queued_and_split_when_memory_is_short() {
    for cmdline in ["", "swap_slots=2000"] {
        let machine = machine(cmdline);
        let k = machine.kernel();
        let (mm, head) = folio(k, 2);
        let drop_pages = |gva, pages| k.madvise(mm, gva, pages * PAGE, advice::DONTNEED).unwrap();
        k.mprotect(mm, AT, PAGE, prot::READ).unwrap();
        assert_eq!(queued(k), 0, "in parts, but all of it");
        drop_pages(AT + 100 * PAGE, 12);
        drop_pages(AT + 200 * PAGE, 3);
        assert_eq!(queued(k), 1, "once");
        drop_pages(AT + HUGE, 1);
        assert_eq!(queued(k), 2);
        audit(k);
        // The first to come is the first to go, and it is enough.
        let free = k.root().free_frames.get();
        assert_eq!(k.reclaim(15), 15);
        assert_eq!(k.root().free_frames.get(), free + 15);
        assert_eq!((queued(k), k.folio(head).order.get()), (1, 0));
        audit(k);
        // The first page is unmapped of this one.
        assert_eq!(k.reclaim(1), 1);
        assert_eq!(k.root().free_frames.get(), free + 16);
        audit(k);
        reads_back(k, 0, 0);
        assert_eq!(k.user_read(0, AT + HUGE + 5 * PAGE), Ok(106));
        assert_eq!(k.obj(mm).rss.get(), 2 * PAGES - 16);
        teardown(k, &[mm]);
    }
}

#[test]
fn who_goes_leaves_the_queue() {
    for cmdline in ["", "swap_slots=2000"] {
        let machine = machine(cmdline);
        let k = machine.kernel();
        let (mm, _) = folio(k, 4);
        for number in 0..4 {
            let gva = AT + number * HUGE;
            k.madvise(mm, gva, PAGE, advice::DONTNEED).unwrap();
        }
        assert_eq!(queued(k), 4);
        // From the middle: unmapped, split on request, gathered anew; and the rest with its program.
        k.munmap(mm, AT + HUGE, HUGE).unwrap();
        assert_eq!(queued(k), 3);
        assert_eq!(k.split_folios(mm, AT + 2 * HUGE, HUGE), Ok(1));
        audit(k);
        k.madvise(mm, AT, HUGE, advice::COLLAPSE).unwrap();
        assert_eq!(queued(k), 1);
        audit(k);
        teardown(k, &[mm]);
        assert_eq!(queued(k), 0);
    }
}

#[test]
fn what_others_use_stays_on_the_queue() {
    let machine = machine("");
    let k = machine.kernel();
    let (mm, head) = folio(k, 1);
    let drop_page = |page: u64| {
        k.madvise(mm, AT + page * PAGE, PAGE, advice::DONTNEED)
            .unwrap();
    };
    drop_page(9);
    let mut frames = [0];
    let fault = |gva, code| k.fault(mm, gva, code);
    k.pin_user_pages(mm, AT, true, &mut frames, fault).unwrap();
    assert_eq!((k.reclaim(1), queued(k)), (0, 1), "a device");
    k.unpin_user_pages(AT, &frames);
    let child = k.mm_fork(mm).unwrap();
    assert_eq!((k.reclaim(1), queued(k)), (0, 1), "a child");
    assert_eq!(k.folio(head).order.get(), 9);
    audit(k);
    k.mm_put(child);
    audit(k);
    assert_eq!((k.reclaim(1), queued(k)), (1, 0));
    teardown(k, &[mm]);
}

#[test]
fn a_first_page_that_is_locked_gets_no_slot() {
    let machine = machine("swap_slots=2000");
    let k = machine.kernel();
    let (mm, head) = folio(k, 1);
    k.mlock(mm, AT, PAGE, 0).unwrap();
    assert_eq!(reclaim_all(k, mm), 1);
    assert_eq!(k.root().swap.used.get(), PAGES - 1);
    assert!(state(k, head, folio_state::UNEVICTABLE));
    reads_back(k, 0, 0);
    teardown(k, &[mm]);
}

/// Of one that was used twice too, and so is active.
#[test]
fn an_active_folio_of_which_a_part_is_locked_stays_evictable() {
    let machine = machine("swap_slots=2000");
    let k = machine.kernel();
    let (mm, head) = folio(k, 1);
    for _ in 0..2 {
        reads_back(k, 0, 0);
        let taken = k.lru_isolate(lru::INACTIVE, 1);
        k.shrink_folios(&taken, Used::Counts);
        k.on(0, |k| k.flush_mm(mm, FreedTables::No));
    }
    assert!(state(k, head, folio_state::ACTIVE));
    k.mlock(mm, AT, PAGE, 0).unwrap();
    // The entry is split by now, and each of its pages may have been used.
    for _ in 0..8 {
        k.reclaim_evictable(2 * PAGES);
    }
    assert_eq!(k.obj(mm).rss.get(), 1);
    audit(k);
    teardown(k, &[mm]);
}

/// One program gives a part of its memory back, and another needs it: without a swap area.
#[test]
fn an_allocation_that_finds_nothing_splits_what_is_queued() {
    let machine = machine("pcp_batch=0");
    let k = machine.kernel();
    let (mm, _) = folio(k, 1);
    k.madvise(mm, AT, 40 * PAGE, advice::DONTNEED).unwrap();
    map_at(k, mm, AT + 2 * HUGE, 60, RW);
    k.user_write(0, AT + 2 * HUGE, 7).unwrap();
    let mut taken = Vec::new();
    while let Ok(frame) = k.alloc_free_frame(abi::objects::FrameKind::Stack) {
        taken.push(frame);
    }
    let written =
        (1..60).take_while(|page| k.user_write(0, AT + 2 * HUGE + page * PAGE, *page).is_ok());
    assert_eq!(written.count(), 40, "as many as the other has given back");
    assert_eq!(queued(k), 0);
    audit(k);
    taken.into_iter().for_each(|frame| k.free_frames(frame));
    teardown(k, &[mm]);
}

/// Another CPU splits what is queued, all there is, at any moment of an allocation that finds nothing: it gets a page of it.
#[test]
fn an_allocation_gets_what_another_cpu_frees_meanwhile() {
    for releases in 0..12 {
        let machine = machine("pcp_batch=0");
        let k = machine.kernel();
        let (mm, _) = folio(k, 1);
        k.madvise(mm, AT, 40 * PAGE, advice::DONTNEED).unwrap();
        let mut taken = Vec::new();
        while let Ok(frame) = k.alloc_free_frame(abi::objects::FrameKind::Stack) {
            taken.push(frame);
        }
        for _ in 0..releases {
            k.arch.at(Point::LockRelease, |_| {});
        }
        k.arch.at(Point::LockRelease, |k| {
            if k.root().lru_lock.get() == 0 {
                k.on(1, |k| k.reclaim(1));
            }
        });
        let frame = k.alloc_frames(0, abi::objects::FrameKind::Stack);
        taken.push(frame.unwrap_or_else(|_| panic!("after {releases} locks")));
        taken.into_iter().for_each(|frame| k.free_frames(frame));
        audit(k);
        teardown(k, &[mm]);
    }
}

/// The last mapping goes while reclaim has the folio in hand, taken off the queue.
#[test]
fn a_folio_that_goes_while_it_is_in_hand_is_freed_once() {
    for releases in 0..12 {
        let machine = machine("");
        let k = machine.kernel();
        let (mm, _) = folio(k, 1);
        k.madvise(mm, AT, PAGE, advice::DONTNEED).unwrap();
        for _ in 0..releases {
            k.arch.at(Point::LockRelease, |_| {});
        }
        k.arch.at(Point::LockRelease, move |k| {
            let frames = 1..k.root().nr_frames.get();
            let is_free = |frame| k.frame_folio(frame).lock.get() == 0;
            if frames.clone().all(is_free) {
                k.on(1, |k| k.madvise(mm, AT, HUGE, advice::DONTNEED))
                    .unwrap();
            }
        });
        k.reclaim(1);
        if k.arch.hooks_left() > 0 {
            break;
        }
        audit(k);
        assert!(queued(k) == 0);
        teardown(k, &[mm]);
    }
}
