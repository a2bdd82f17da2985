//! Files on the disk: what is read, what is dirty, what is written back, and what becomes of errors.

use abi::disk::{DiskOp, SECTOR_BYTES};
use abi::objects::{File, FrameKind, Mm, Pa, folio_flags, folio_state};
use abi::point::Point;
use abi::pte::{Pte, PteFlags};
use abi::syscall::{Errno, advice, map, msync, prot};

use super::files::{map_file, put, word};
use super::{AT, PAGE, RW, TestKernel, audit, space, teardown};
use crate::Kernel;
use crate::arch::model::testing::Machine;
use crate::mm::{FaultError, Field, Slot};

/// First sector and pages of the file of a test.
pub(super) const SECTOR: u64 = 64;
pub(super) const PAGES: u64 = 8;
/// What a test disk holds where nobody has written.
pub(super) const BLANK: u64 = 0xdbdb_dbdb_dbdb_dbdb;
const ALL: std::ops::Range<u64> = 0..u64::MAX;

/// Runs `test` with a file on the disk and two mms, of CPUs 0 and 1, which map all of it at [`AT`]; expects nothing to be
/// left.
pub(super) fn with_params(params: &str, test: impl FnOnce(&TestKernel, Pa<File>, [Pa<Mm>; 2])) {
    let machine = Machine::new(2, params);
    let k = machine.kernel();
    let mms = [space(k, &[0]), space(k, &[1])];
    let file = k.disk_file_create(SECTOR, PAGES * PAGE).unwrap();
    for mm in mms {
        map_file(k, mm, AT, PAGES, RW, map::SHARED, (file, 0));
    }
    test(k, file, mms);
    k.arch.disk().fails = None;
    audit(k);
    k.file_put(file);
    teardown(k, &mms);
}

fn with_file(test: impl FnOnce(&TestKernel, Pa<File>, [Pa<Mm>; 2])) {
    with_params("file_fault_around=1", test);
}

fn entry(k: &TestKernel, mm: Pa<Mm>, gva: u64) -> Pte {
    let table = k.leaf_table(k.obj(mm), gva);
    table.map_or(Pte::NONE, |table| k.read_pte(Slot::new(table, 1, gva)))
}

fn is_writable(k: &TestKernel, mm: Pa<Mm>, gva: u64) -> bool {
    let both = PteFlags::WRITE | PteFlags::DIRTY;
    let has = entry(k, mm, gva).flags().intersection(both);
    assert!(has == both || has.is_empty(), "{has:?}");
    has == both
}

fn is_dirty(k: &TestKernel, gpa: u64) -> bool {
    k.folio(gpa).state.get() & folio_state::DIRTY != 0
}

/// The word that the disk holds for byte `at` of the file.
pub(super) fn stored(k: &TestKernel, at: u64) -> u64 {
    let sector = SECTOR + at / PAGE * (PAGE / SECTOR_BYTES);
    let at = (at % PAGE) as usize;
    let mut disk = k.arch.disk();
    u64::from_le_bytes(disk.page(sector)[at..at + 8].try_into().unwrap())
}

fn sync(k: &TestKernel, file: Pa<File>) -> Result<(), Errno> {
    let result = k.file_sync(file, ALL);
    audit(k);
    result
}

#[test]
fn pages_are_read_once_when_they_are_used() {
    with_file(|k, file, [a, b]| {
        assert_eq!(k.user_read(0, AT), Ok(BLANK));
        assert_eq!(k.user_read(1, AT + 8), Ok(BLANK));
        assert_eq!(word(k, file, 16), BLANK);
        assert_eq!(k.arch.disk().done, [1, 0]);
        audit(k);
        let entries = [a, b].map(|mm| entry(k, mm, AT));
        assert_eq!(entries[0].address(), entries[1].address());
        assert!(!is_writable(k, a, AT) && !is_dirty(k, entries[0].address()));
        // By read(2), by a private mapping, by a call that populates.
        assert_eq!(word(k, file, PAGE), BLANK);
        map_file(k, a, AT + 16 * PAGE, 2, RW, map::PRIVATE, (file, 2));
        k.user_write(0, AT + 16 * PAGE, 5).unwrap();
        assert_eq!(k.user_read(0, AT + 16 * PAGE + 8), Ok(BLANK));
        k.madvise(b, AT + 3 * PAGE, PAGE, advice::POPULATE_WRITE)
            .unwrap();
        assert_eq!(k.arch.disk().done, [4, 0]);
        assert!(is_writable(k, b, AT + 3 * PAGE));
        audit(k);
        assert_eq!(k.user_read(0, AT + 3 * PAGE), Ok(BLANK));
        assert_eq!(k.arch.disk().done, [4, 0]);
    });
}

#[test]
fn what_the_cache_has_around_is_mapped_and_what_it_has_not_is_not_read() {
    with_params("file_fault_around=16", |k, file, [a, _]| {
        assert_eq!(word(k, file, 2 * PAGE), BLANK);
        assert_eq!(k.user_read(0, AT), Ok(BLANK));
        let present = (0..PAGES).filter(|page| entry(k, a, AT + page * PAGE).is_present());
        assert_eq!(present.collect::<Vec<_>>(), [0, 2]);
        assert!(!is_writable(k, a, AT + 2 * PAGE));
        assert_eq!(k.arch.disk().done, [2, 0]);
    });
}

#[test]
fn a_write_is_told_and_write_back_takes_the_right_away() {
    with_file(|k, file, [a, b]| {
        k.user_write(0, AT, 1).unwrap();
        assert_eq!(k.user_read(1, AT), Ok(1));
        let gpa = entry(k, a, AT).address();
        assert!(is_writable(k, a, AT) && !is_writable(k, b, AT) && is_dirty(k, gpa));
        assert_eq!(stored(k, 0), BLANK);
        k.user_write(1, AT + 8, 2).unwrap();
        assert!(is_writable(k, b, AT));
        audit(k);
        assert_eq!(sync(k, file), Ok(()));
        assert_eq!((stored(k, 0), stored(k, 8)), (1, 2));
        assert!(!is_writable(k, a, AT) && !is_writable(k, b, AT) && !is_dirty(k, gpa));
        // Nothing is left to do.
        assert_eq!(sync(k, file), Ok(()));
        assert_eq!(k.arch.disk().done, [1, 1]);
        // The next write faults again: the soft TLB of CPU 1 was flushed.
        k.user_write(1, AT, 3).unwrap();
        assert!(!is_writable(k, a, AT) && is_writable(k, b, AT) && is_dirty(k, gpa));
        assert_eq!(sync(k, file), Ok(()));
        assert_eq!(stored(k, 0), 3);
        // And so is one by write(2).
        put(k, file, 16, 4).unwrap();
        assert!(is_dirty(k, gpa));
        assert_eq!(sync(k, file), Ok(()));
        assert_eq!(stored(k, 16), 4);
        assert_eq!(k.user_read(0, AT + 16), Ok(4));
    });
}

/// Without the flush the other CPU writes on, and nobody knows.
#[test]
fn write_back_that_does_not_flush_loses_what_is_written_then() {
    for (params, last) in [("", 2), ("bug=mkclean-no-flush", 1)] {
        let machine = Machine::new(2, params);
        let k = machine.kernel();
        let mm = space(k, &[0, 1]);
        let file = k.disk_file_create(SECTOR, PAGE).unwrap();
        map_file(k, mm, AT, 1, RW, map::SHARED, (file, 0));
        k.user_write(1, AT, 1).unwrap();
        k.file_sync(file, ALL).unwrap();
        k.user_write(1, AT, 2).unwrap();
        k.file_sync(file, ALL).unwrap();
        assert_eq!(stored(k, 0), last, "{params}");
    }
}

#[test]
fn a_page_that_is_written_while_it_is_written_back_is_dirty_again() {
    with_file(|k, file, [a, _]| {
        k.user_write(0, AT, 1).unwrap();
        k.arch.at(Point::DiskWait, |k| {
            k.user_write(1, AT, 2).unwrap();
        });
        k.file_sync(file, ALL).unwrap();
        assert_eq!(k.arch.hooks_left(), 0);
        let gpa = entry(k, a, AT).address();
        assert!(is_dirty(k, gpa));
        assert_eq!(k.folio(gpa).state.get() & folio_state::WRITEBACK, 0);
        assert_eq!(sync(k, file), Ok(()));
        assert_eq!(stored(k, 0), 2);
    });
}

#[test]
fn an_unmapped_page_stays_dirty_and_counted_until_it_is_flushed() {
    for params in ["file_fault_around=1", "file_fault_around=1 gather_batch=1"] {
        with_params(params, |k, file, [a, b]| {
            k.user_write(0, AT, 1).unwrap();
            k.user_write(0, AT + PAGE, 2).unwrap();
            let gpa = entry(k, a, AT).address();
            k.on(1, |k| k.switch_mm(a));
            assert_eq!(k.user_read(1, AT), Ok(1));
            let seen = move |k: &TestKernel| k.folio(gpa).mapcount.get();
            k.arch.at(Point::FlushWait, move |k| assert_eq!(seen(k), 1));
            k.madvise(a, AT, 2 * PAGE, advice::DONTNEED).unwrap();
            assert_eq!(k.arch.hooks_left(), 0);
            audit(k);
            assert_eq!((seen(k), is_dirty(k, gpa)), (0, true));
            assert_eq!(sync(k, file), Ok(()));
            assert_eq!((stored(k, 0), stored(k, PAGE)), (1, 2));
            k.on(1, |k| k.switch_mm(b));
        });
    }
}

/// The other CPU writes between the write-back, which has found nothing mapped, and the flush.
#[test]
fn an_unmap_that_is_not_counted_until_the_flush_loses_what_is_written_then() {
    let machine = Machine::new(2, "bug=zap-loses-dirty");
    let k = machine.kernel();
    let mm = space(k, &[0, 1]);
    let file = k.disk_file_create(SECTOR, PAGE).unwrap();
    map_file(k, mm, AT, 1, RW, map::SHARED, (file, 0));
    k.user_write(1, AT, 1).unwrap();
    k.arch.at(Point::FlushDispatch, move |k| {
        k.file_sync(file, ALL).unwrap();
        k.user_write(1, AT, 2).unwrap();
    });
    k.madvise(mm, AT, PAGE, advice::DONTNEED).unwrap();
    assert_eq!(k.arch.hooks_left(), 0);
    assert_eq!(word(k, file, 0), 2);
    k.file_sync(file, ALL).unwrap();
    assert_eq!(stored(k, 0), 1);
}

#[test]
fn protection_gives_back_only_what_was_told() {
    with_file(|k, file, [a, _]| {
        k.user_write(0, AT, 1).unwrap();
        assert_eq!(k.user_read(0, AT + PAGE), Ok(BLANK));
        k.mprotect(a, AT, 2 * PAGE, prot::READ).unwrap();
        audit(k);
        assert_eq!(k.user_write(0, AT, 2), Err(FaultError::Access));
        k.mprotect(a, AT, 2 * PAGE, RW).unwrap();
        audit(k);
        // Dirty as it is, it needs no fault; the other does.
        assert!(is_writable(k, a, AT) && !is_writable(k, a, AT + PAGE));
        k.mprotect(a, AT, PAGE, prot::READ).unwrap();
        assert_eq!(sync(k, file), Ok(()));
        k.mprotect(a, AT, PAGE, RW).unwrap();
        audit(k);
        assert!(!is_writable(k, a, AT));
        k.user_write(0, AT, 3).unwrap();
        assert_eq!(sync(k, file), Ok(()));
        assert_eq!(stored(k, 0), 3);
    });
}

#[test]
fn what_cannot_be_read_is_an_error_to_each_who_waits_and_is_tried_anew() {
    with_file(|k, file, [a, _]| {
        k.arch.disk().fails = Some(DiskOp::Read);
        assert_eq!(k.user_read(0, AT), Err(FaultError::Bus));
        assert_eq!(k.user_write(0, AT, 1), Err(FaultError::Bus));
        let mut bytes = [0; 8];
        assert_eq!(k.file_read(file, 0, &mut bytes), Err(Errno::EIO));
        assert_eq!(put(k, file, 0, 1), Err(Errno::EIO));
        let populated = k.madvise(a, AT, PAGE, advice::POPULATE_READ);
        assert_eq!(populated, Err(Errno::EFAULT));
        assert_eq!(k.arch.disk().done, [5, 0]);
        assert_eq!(sync(k, file), Ok(()));
        let gpa = k.cache_next(file, 0, 1).unwrap().1;
        k.folio_put(gpa, abi::channel::cause::HOLD);
        assert_eq!(k.folio(gpa).flags.get(), folio_flags::FRESH);
        assert!(!k.cache_has(file, 0), "mincore");
        k.arch.disk().fails = None;
        assert_eq!(k.user_read(0, AT), Ok(BLANK));
        assert_eq!(entry(k, a, AT).address(), gpa);
        assert_eq!(k.arch.disk().done, [6, 0]);
    });
}

#[test]
fn what_cannot_be_written_is_told_once_and_not_lost() {
    with_file(|k, file, [a, _]| {
        k.user_write(0, AT, 1).unwrap();
        k.arch.disk().fails = Some(DiskOp::Write);
        assert_eq!(sync(k, file), Err(Errno::EIO));
        assert!(is_dirty(k, entry(k, a, AT).address()));
        assert_eq!(k.file_evict(file, ALL), 0);
        // Tried again, in vain again.
        assert_eq!(k.msync(a, AT, PAGE, msync::SYNC), Err(Errno::EIO));
        k.arch.disk().fails = None;
        assert_eq!(sync(k, file), Ok(()));
        assert_eq!(stored(k, 0), 1);
        // Who only begins to write leaves the error to who asks.
        k.user_write(0, AT, 2).unwrap();
        k.arch.disk().fails = Some(DiskOp::Write);
        k.file_begin_writing(file, ALL);
        k.arch.serve_disk();
        k.swap_poll();
        k.arch.disk().fails = None;
        assert_eq!(sync(k, file), Err(Errno::EIO));
        assert_eq!(stored(k, 0), 2);
        assert_eq!(sync(k, file), Ok(()));
    });
}

#[test]
fn msync_writes_what_its_range_maps() {
    with_file(|k, _, [a, b]| {
        for page in 0..4 {
            k.user_write(0, AT + page * PAGE, 10 + page).unwrap();
        }
        assert_eq!(k.msync(a, AT, PAGE, msync::ASYNC), Ok(()));
        assert_eq!(k.arch.disk().done[1], 0);
        // Another mapping of the file is as good.
        assert_eq!(k.msync(b, AT + PAGE, 2 * PAGE, msync::SYNC), Ok(()));
        let pages = [0, 1, 2, 3].map(|page| stored(k, page * PAGE));
        assert_eq!(pages, [BLANK, 11, 12, BLANK]);
        assert_eq!(k.msync(a, AT, 4 * PAGE, msync::SYNC), Ok(()));
        assert_eq!((stored(k, 0), stored(k, 3 * PAGE)), (10, 13));
        k.user_write(0, AT + 5 * PAGE, 15).unwrap();
        k.munmap(a, AT + 4 * PAGE, PAGE).unwrap();
        let hole = k.msync(a, AT, PAGES * PAGE, msync::SYNC);
        assert_eq!(hole, Err(Errno::ENOMEM), "after all of it");
        assert_eq!(stored(k, 5 * PAGE), 15);
    });
}

#[test]
fn only_what_is_clean_and_unused_leaves_the_cache() {
    with_file(|k, file, [a, _]| {
        k.user_write(0, AT, 1).unwrap();
        put(k, file, PAGE, 2).unwrap();
        assert_eq!(word(k, file, 2 * PAGE), BLANK);
        assert_eq!(k.file_evict(file, ALL), 1);
        assert_eq!(sync(k, file), Ok(()));
        assert_eq!(k.file_evict(file, 0..1), 0, "mapped");
        assert_eq!(k.file_evict(file, ALL), 1);
        k.madvise(a, AT, PAGE, advice::DONTNEED).unwrap();
        assert_eq!(k.file_evict(file, ALL), 1);
        audit(k);
        assert_eq!(k.obj(file).nr_pages.get(), 0);
        assert_eq!(k.user_read(0, AT), Ok(1));
        assert_eq!(word(k, file, PAGE), 2);
        // Nor what is being written.
        put(k, file, PAGE, 3).unwrap();
        k.file_begin_writing(file, ALL);
        assert_eq!(k.file_evict(file, 1..2), 0);
        k.arch.serve_disk();
        k.swap_poll();
        assert_eq!(k.file_evict(file, 1..2), 1);
    });
}

#[test]
fn the_last_close_writes() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    let file = k.disk_file_create(SECTOR, PAGE).unwrap();
    map_file(k, mm, AT, 1, RW, map::SHARED, (file, 0));
    k.file_put(file);
    k.user_write(0, AT, 9).unwrap();
    audit(k);
    k.munmap(mm, AT, PAGE).unwrap();
    assert_eq!(stored(k, 0), 9);
    teardown(k, &[mm]);
}

#[test]
fn a_file_that_goes_while_it_is_read_waits_for_the_disk() {
    let machine = Machine::new(2, "");
    let k = machine.kernel();
    let mm = space(k, &[0, 1]);
    let file = k.disk_file_create(SECTOR, PAGE).unwrap();
    map_file(k, mm, AT, 1, RW, map::SHARED, (file, 0));
    k.file_put(file);
    k.arch.at(Point::DiskWait, move |k| {
        k.on(1, |k| k.munmap(mm, AT, PAGE).unwrap());
    });
    assert_eq!(k.user_read(0, AT), Err(FaultError::NoMapping));
    assert_eq!(k.arch.hooks_left(), 0);
    teardown(k, &[mm]);
}

#[test]
fn what_is_dirty_stays_so_in_another_frame_and_what_is_moved_by_the_disk_stays() {
    with_file(|k, file, [a, _]| {
        k.user_write(0, AT, 1).unwrap();
        assert_eq!(k.user_read(0, AT + PAGE), Ok(BLANK));
        let before = entry(k, a, AT).address();
        assert_eq!(k.migrate_range(a, AT, 2 * PAGE), Ok(2));
        let after = entry(k, a, AT).address();
        assert!(before != after && is_dirty(k, after) && is_writable(k, a, AT));
        audit(k);
        k.file_begin_writing(file, ALL);
        assert_eq!(k.migrate_range(a, AT, PAGE), Ok(0));
        assert_eq!(sync(k, file), Ok(()));
        assert_eq!(stored(k, 0), 1);
        assert_eq!(k.migrate_range(a, AT, PAGE), Ok(1));
        k.user_write(0, AT, 2).unwrap();
        assert_eq!(sync(k, file), Ok(()));
        assert_eq!(stored(k, 0), 2);
    });
}

#[test]
fn a_page_that_a_device_has_written_is_dirty() {
    with_file(|k, file, [a, _]| {
        let mut frames = [0];
        let fault = |gva, code| k.fault(a, gva, code);
        k.on(0, |k| {
            k.pin_user_pages(a, AT, true, &mut frames, fault).unwrap()
        });
        assert_eq!(k.file_sync(file, ALL), Ok(()));
        assert!(!is_dirty(k, frames[0]), "while it is pinned");
        k.store_memory(frames[0], &7u64.to_le_bytes());
        k.page_written_by_device(frames[0]);
        k.unpin_user_pages(AT, &frames);
        audit(k);
        assert_eq!(sync(k, file), Ok(()));
        assert_eq!(stored(k, 0), 7);
    });
}

#[test]
fn a_file_is_as_large_as_it_is() {
    with_params(
        "swap_slots=4 swap_sector=512 tlb=soft",
        |k, file, [a, _]| {
            let end = PAGES * PAGE;
            assert_eq!(put(k, file, end, 1), Err(Errno::ENOSPC));
            assert_eq!(k.file_read(file, end, &mut [0; 8]), Ok(0));
            map_file(k, a, AT + 32 * PAGE, 2, RW, map::SHARED, (file, PAGES - 1));
            k.user_write(0, AT + 32 * PAGE, 1).unwrap();
            let behind = k.user_write(0, AT + 33 * PAGE, 1);
            assert_eq!(behind, Err(FaultError::Bus));
            // Write-back would make it read-only.
            assert_eq!(k.wire(a, AT, PAGE), Err(Errno::EINVAL));
            let removed = k.madvise(a, AT, PAGE, advice::REMOVE);
            assert_eq!(removed, Err(Errno::EOPNOTSUPP));
            let refused = |sector, bytes| k.disk_file_create(sector, bytes).err();
            for (sector, bytes) in [(1, PAGE), (8, 100), (8, 0), (!7, PAGE)] {
                assert_eq!(refused(sector, bytes), Some(Errno::EINVAL));
            }
            for (sector, bytes) in [(512, PAGE), (504, 2 * PAGE), (536, PAGE)] {
                assert_eq!(refused(sector, bytes), Some(Errno::EBUSY));
            }
            for sector in [504, 544] {
                k.file_put(k.disk_file_create(sector, PAGE).unwrap());
            }
        },
    );
}

#[test]
fn without_memory_faults_fail_and_nothing_changes() {
    let mut failures = 0;
    for left in 0.. {
        let machine = Machine::with_memory(1 << 20, 1, "pcp_batch=0");
        let k = machine.kernel();
        let mm = space(k, &[0]);
        let file = k.disk_file_create(SECTOR, PAGES * PAGE).unwrap();
        map_file(k, mm, AT, PAGES, RW, map::SHARED, (file, 0));
        let mut taken: Vec<_> =
            core::iter::from_fn(|| k.alloc_frames(0, FrameKind::Stack).ok()).collect();
        taken.drain(..left).for_each(|frame| k.free_frames(frame));
        let result = k.user_write(0, AT, 1);
        taken.into_iter().for_each(|frame| k.free_frames(frame));
        audit(k);
        if let Err(error) = result {
            assert_eq!(error, FaultError::NoMemory);
            failures += 1;
        } else {
            assert_eq!(sync(k, file), Ok(()));
            assert_eq!(stored(k, 0), 1);
        }
        k.file_put(file);
        teardown(k, &[mm]);
        if result.is_ok() {
            break;
        }
    }
    assert!(failures > 2, "{failures}");
}

#[test]
fn more_pages_than_requests_are_written() {
    let machine = Machine::new(1, "");
    let k: &Kernel<_> = machine.kernel();
    let file = k.disk_file_create(SECTOR, 40 * PAGE).unwrap();
    for page in 0..40 {
        put(k, file, page * PAGE, 100 + page).unwrap();
    }
    assert_eq!(sync(k, file), Ok(()));
    assert_eq!(k.arch.disk().done, [40, 40]);
    assert!((0..40).all(|page| stored(k, page * PAGE) == 100 + page));
    k.file_put(file);
}
