//! Reclaim of pages of files on the disk: what goes comes back as it was, and what somebody needs stays.

use abi::channel::cause;
use abi::disk::DiskOp;
use abi::objects::{File, FrameKind, Mm, Pa, folio_state, lru};
use abi::syscall::{advice, map, prot};

use super::disk_files::{BLANK, PAGES, SECTOR, stored, with_params};
use super::files::{map_file, put, word};
use super::{AT, PAGE, RW, TestKernel, audit, map_at, space, teardown};
use crate::arch::model::testing::Machine;
use crate::mm::reclaim::Used;
use crate::mm::{Field, Slot};

/// [`with_params`], with swap.
fn with_file(test: impl FnOnce(&TestKernel, Pa<File>, [Pa<Mm>; 2])) {
    with_params("swap_slots=4 file_fault_around=1", test);
}

/// Looks at the pages that may go, twice: the first look finds those used that were just touched.
fn reclaim(k: &TestKernel) -> u64 {
    let look = || k.shrink_folios(&k.lru_isolate(lru::INACTIVE_FILE, 16), Used::Counts);
    let freed = look() + look();
    audit(k);
    freed
}

fn is_mapped(k: &TestKernel, mm: Pa<Mm>, gva: u64) -> bool {
    let table = k.leaf_table(k.obj(mm), gva);
    table.is_ok_and(|table| k.read_pte(Slot::new(table, 1, gva)).is_present())
}

#[test]
fn a_clean_page_goes_from_all_who_map_it_and_is_read_anew() {
    with_file(|k, file, mms| {
        for cpu in 0..2 {
            assert_eq!(k.user_read(cpu, AT), Ok(BLANK));
        }
        assert_eq!(word(k, file, PAGE), BLANK);
        let free = k.root().free_frames.get();
        // Used by two entries: active first.
        assert_eq!(reclaim(k), 1, "the page that only a call has read");
        assert_eq!(k.lru_count(lru::ACTIVE_FILE), 1);
        assert!(k.reclaim(1) > 0);
        audit(k);
        assert!(mms.iter().all(|mm| !is_mapped(k, *mm, AT)));
        assert!(k.root().free_frames.get() >= free + 2);
        assert_eq!(k.arch.disk().done, [2, 0], "nothing was written");
        assert_eq!(k.user_read(1, AT), Ok(BLANK));
        assert_eq!(k.arch.disk().done, [3, 0]);
    });
}

#[test]
fn a_dirty_page_is_written_before_it_goes() {
    with_file(|k, file, _| {
        k.user_write(0, AT, 5).unwrap();
        put(k, file, PAGE, 6).unwrap();
        assert_eq!(reclaim(k), 2);
        assert_eq!((stored(k, 0), stored(k, PAGE)), (5, 6));
        assert_eq!(k.user_read(1, AT), Ok(5));
        assert_eq!(k.user_read(0, AT + PAGE), Ok(6));
    });
}

#[test]
fn what_the_disk_does_not_take_stays_and_the_next_sync_tells() {
    with_file(|k, file, _| {
        k.user_write(0, AT, 5).unwrap();
        k.arch.disk().fails = Some(DiskOp::Write);
        assert_eq!(reclaim(k), 0);
        assert_eq!(k.user_read(0, AT), Ok(5));
        k.arch.disk().fails = None;
        assert!(k.file_sync(file, 0..u64::MAX).is_err());
        assert_eq!(k.file_sync(file, 0..u64::MAX), Ok(()));
        assert_eq!(stored(k, 0), 5);
    });
}

#[test]
fn locked_and_pinned_pages_stay() {
    with_file(|k, _, [a, _]| {
        k.user_write(0, AT, 5).unwrap();
        k.user_write(0, AT + PAGE, 6).unwrap();
        k.mlock(a, AT, PAGE, 0).unwrap();
        let table = k.leaf_table(k.obj(a), AT + PAGE).unwrap();
        let pinned = k.read_pte(Slot::new(table, 1, AT + PAGE)).address();
        k.folio_pin(pinned, AT + PAGE);
        let taken = k.lru_isolate(lru::INACTIVE_FILE, 16);
        assert_eq!(k.shrink_folios(&taken, Used::Ignored), 0);
        assert!(is_mapped(k, a, AT) && is_mapped(k, a, AT + PAGE));
        assert_eq!(k.lru_count(lru::UNEVICTABLE), 1);
        assert_eq!(k.lru_count(lru::ACTIVE_FILE), 1);
        k.folio_unpin(pinned, AT + PAGE);
        k.munlock(a, AT, PAGE).unwrap();
        // The one that was locked is looked at again when there is nothing else.
        assert_eq!([k.reclaim(1), k.reclaim(1)], [1, 1]);
        assert_eq!((stored(k, 0), stored(k, PAGE)), (5, 6));
    });
}

#[test]
fn a_program_may_say_that_pages_go() {
    with_file(|k, _, [a, b]| {
        k.user_write(0, AT, 5).unwrap();
        k.user_write(0, AT + PAGE, 6).unwrap();
        assert_eq!(k.user_read(1, AT + PAGE), Ok(6));
        k.madvise(a, AT, PAGES * PAGE, advice::PAGEOUT).unwrap();
        audit(k);
        assert!(!is_mapped(k, a, AT) && is_mapped(k, b, AT + PAGE));
        assert_eq!(stored(k, 0), 5);
        k.madvise(a, AT + PAGE, PAGE, advice::COLD).unwrap();
        assert_eq!(
            (k.user_read(0, AT), k.user_read(0, AT + PAGE)),
            (Ok(5), Ok(6))
        );
    });
}

#[test]
fn a_private_mapping_loses_the_file_s_page_and_keeps_its_copy() {
    with_file(|k, file, [a, _]| {
        let at = AT + 32 * PAGE;
        map_file(k, a, at, 2, RW, map::PRIVATE, (file, 0));
        k.user_write(0, at, 9).unwrap();
        assert_eq!(k.user_read(0, at + PAGE), Ok(BLANK));
        reclaim(k);
        assert!(is_mapped(k, a, at) && !is_mapped(k, a, at + PAGE));
        assert_eq!(k.user_read(0, at), Ok(9));
        assert_eq!(k.user_read(0, at + PAGE), Ok(BLANK));
    });
}

#[test]
fn a_file_larger_than_memory_is_read_and_written() {
    let machine = Machine::new(1, "swap_slots=1 swap_sector=0");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    let pages = 150;
    let file = k.disk_file_create(SECTOR, pages * PAGE).unwrap();
    map_file(k, mm, AT, pages, RW, map::SHARED, (file, 0));
    let mut taken = Vec::new();
    while let Ok(frame) = k.alloc_free_frame(FrameKind::Stack) {
        taken.push(frame);
    }
    for frame in taken.drain(..60) {
        k.free_frames(frame);
    }
    for round in 0..3 {
        for page in 0..pages {
            let expected = if round == 0 { BLANK } else { page * round };
            let gva = AT + page * PAGE;
            assert_eq!(k.user_read(0, gva), Ok(expected), "page {page}");
            k.user_write(0, gva, page * (round + 1)).unwrap();
        }
        audit(k);
    }
    taken.into_iter().for_each(|frame| k.free_frames(frame));
    k.file_put(file);
    teardown(k, &[mm]);
}

/// Anonymous memory has nowhere to go; what files have in memory makes room for it.
#[test]
fn files_make_room_while_the_swap_area_is_full() {
    with_file(|k, file, [a, _]| {
        let at = AT + 64 * PAGE;
        map_at(k, a, at, 4, RW);
        for page in 0..4 {
            k.user_write(0, at + page * PAGE, page).unwrap();
        }
        k.madvise(a, at, 4 * PAGE, advice::PAGEOUT).unwrap();
        assert!(k.swap_is_full() && k.reclaim_is_hopeless());
        for page in 0..PAGES {
            assert_eq!(word(k, file, page * PAGE), BLANK);
        }
        assert!(!k.reclaim_is_hopeless());
        assert!(k.reclaim(PAGES) >= PAGES);
        assert!(k.reclaim_is_hopeless());
        assert_eq!(k.mprotect(a, at, PAGE, prot::READ), Ok(()));
    });
}

#[test]
fn a_page_that_moves_is_on_its_list_afterwards() {
    with_file(|k, _, [a, _]| {
        k.user_write(0, AT, 5).unwrap();
        k.user_write(0, AT + PAGE, 6).unwrap();
        assert_eq!(k.migrate_range(a, AT, 2 * PAGE), Ok(2));
        audit(k);
        assert_eq!(k.lru_count(lru::INACTIVE_FILE), 2);
        assert_eq!(reclaim(k), 2);
        assert_eq!(
            (k.user_read(0, AT), k.user_read(1, AT + PAGE)),
            (Ok(5), Ok(6))
        );
    });
}

/// Who has found the page in the cache keeps it.
#[test]
fn a_page_that_somebody_refers_to_stays() {
    with_file(|k, file, [a, _]| {
        k.user_write(0, AT, 5).unwrap();
        let table = k.leaf_table(k.obj(a), AT).unwrap();
        let gpa = k.read_pte(Slot::new(table, 1, AT)).address();
        let look = || k.shrink_folios(&k.lru_isolate(lru::INACTIVE_FILE, 16), Used::Ignored);
        k.folio_get(gpa, cause::HOLD);
        assert_eq!(look(), 0);
        assert!(is_mapped(k, a, AT));
        k.folio_put(gpa, cause::HOLD);
        // Nor does one go that somebody has locked.
        let locked = k.lock_folio(gpa);
        assert_eq!(look(), 0);
        drop(locked);
        assert_ne!(k.folio(gpa).state.get() & folio_state::DIRTY, 0);
        assert_eq!(reclaim(k), 1);
        assert_eq!(word(k, file, 0), 5);
    });
}
