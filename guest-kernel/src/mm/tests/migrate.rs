//! Migration: what is moved, what stays where it is, and who comes between.

use std::sync::atomic::Ordering::Relaxed;

use abi::objects::{FrameKind, Mm, Pa, folio_flags};
use abi::point::Point;
use abi::pte::{Pte, PteFlags, fault};
use abi::syscall::{Errno, advice, map, mremap, prot};

use super::{AT, PAGE, RW, TestKernel, audit, map_at, space, teardown};
use crate::arch::model::testing::Machine;
use crate::mm::{Backing, Field, Slot};

fn entry(k: &TestKernel, mm: Pa<Mm>, gva: u64) -> Pte {
    let table = k.leaf_table(k.obj(mm), gva).unwrap();
    k.read_pte(Slot::new(table, 1, gva))
}

fn frame(k: &TestKernel, mm: Pa<Mm>, gva: u64) -> u64 {
    assert!(entry(k, mm, gva).is_present());
    entry(k, mm, gva).address()
}

/// A page at `AT` that is mapped, holds 7 and is cached by all three CPUs.
fn page(cmdline: &str) -> (Machine, Pa<Mm>) {
    let machine = Machine::new(3, cmdline);
    let k = machine.kernel();
    let mm = space(k, &[0, 1, 2]);
    map_at(k, mm, AT, 4, RW);
    for cpu in 0..3 {
        k.user_write(cpu, AT, 7).unwrap();
    }
    (machine, mm)
}

#[test]
fn a_page_moves_with_all_that_is_its() {
    let (machine, mm) = page("");
    let k = machine.kernel();
    let (old, flags) = (frame(k, mm, AT), entry(k, mm, AT).flags());
    let free = k.root().free_frames.get();
    assert_eq!(k.migrate_range(mm, AT, 4 * PAGE), Ok(1));
    let new = frame(k, mm, AT);
    assert_ne!(new, old);
    assert_eq!(entry(k, mm, AT).flags(), flags);
    let folio = k.folio(new);
    assert_eq!((folio.refcount.get(), folio.mapcount.get()), (1, 1));
    assert_eq!(folio.flags.get(), folio_flags::EXCLUSIVE);
    assert_eq!(k.root().free_frames.get(), free);
    for cpu in 0..3 {
        assert_eq!(k.user_read(cpu, AT), Ok(7), "nobody has the old frame");
        k.user_write(cpu, AT, 7).unwrap();
    }
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn a_bad_range_is_refused_and_an_empty_one_holds_nothing() {
    let (machine, mm) = page("");
    let k = machine.kernel();
    assert_eq!(k.migrate_range(mm, AT + 1, PAGE), Err(Errno::EINVAL));
    assert_eq!(k.migrate_range(mm, AT, u64::MAX - PAGE), Err(Errno::EINVAL));
    let to_the_kernel = u64::MAX - AT - 2 * PAGE + 1;
    assert_eq!(k.migrate_range(mm, AT, to_the_kernel), Err(Errno::EINVAL));
    assert_eq!(k.migrate_range(mm, AT + PAGE, 0), Ok(0));
    assert_eq!(k.migrate_range(mm, AT + PAGE, 8 * PAGE), Ok(0));
    // The zero page stays.
    k.user_read(0, AT + PAGE).unwrap();
    assert_eq!(k.migrate_range(mm, AT + PAGE, PAGE), Ok(0));
    teardown(k, &[mm]);
}

#[test]
fn a_shared_page_moves_in_every_process_and_stays_shared() {
    let (machine, mm) = page("");
    let k = machine.kernel();
    let child = k.mm_fork(mm).unwrap();
    let grandchild = k.mm_fork(child).unwrap();
    let old = frame(k, mm, AT);
    assert_eq!(k.migrate_range(child, AT, PAGE), Ok(1));
    let new = frame(k, mm, AT);
    assert_ne!(new, old);
    for mm in [mm, child, grandchild] {
        assert_eq!(frame(k, mm, AT), new);
        let flags = entry(k, mm, AT).flags();
        assert!(flags.contains(PteFlags::COW) && !flags.contains(PteFlags::WRITE));
    }
    let folio = k.folio(new);
    assert_eq!((folio.refcount.get(), folio.mapcount.get()), (3, 3));
    assert!(!k.folio_is_exclusive(new));
    audit(k);
    // A write copies as before.
    k.user_write(0, AT, 8).unwrap();
    k.on(2, |k| k.switch_mm(child));
    assert_eq!((k.user_read(2, AT), k.user_read(0, AT)), (Ok(7), Ok(8)));
    teardown(k, &[mm, child, grandchild]);
}

#[test]
fn a_page_of_a_file_moves_in_its_cache_too() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    let file = k.file_create().unwrap();
    k.file_truncate(file, 3 * PAGE);
    let backing = Backing::File(file, 0);
    let shared = map::SHARED | map::FIXED;
    k.mmap_of(mm, AT, 3 * PAGE, (RW, shared), backing).unwrap();
    let private = map::PRIVATE | map::FIXED;
    let other = AT + 8 * PAGE;
    k.mmap_of(mm, other, 3 * PAGE, (RW, private), backing)
        .unwrap();
    k.user_write(0, AT + PAGE, 7).unwrap();
    assert_eq!(k.user_read(0, other + PAGE), Ok(7));
    let old = frame(k, mm, AT + PAGE);
    assert_eq!(k.migrate_range(mm, AT, 3 * PAGE), Ok(1));
    let new = frame(k, mm, AT + PAGE);
    assert_ne!(new, old);
    assert_eq!(frame(k, mm, other + PAGE), new);
    let flags = entry(k, mm, AT + PAGE).flags();
    assert!(flags.contains(PteFlags::WRITE | PteFlags::DIRTY));
    assert!(!entry(k, mm, other + PAGE).flags().contains(PteFlags::WRITE));
    let mut word = [0; 8];
    assert_eq!(k.file_read(file, PAGE, &mut word), Ok(8));
    assert_eq!(u64::from_le_bytes(word), 7);
    let folio = k.folio(new);
    assert_eq!((folio.refcount.get(), folio.mapcount.get()), (3, 2));
    audit(k);
    // A private copy of a page of a file is an anonymous folio.
    k.user_write(0, other + PAGE, 8).unwrap();
    assert_eq!(k.migrate_range(mm, other, 3 * PAGE), Ok(1));
    assert_eq!(k.user_read(0, other + PAGE), Ok(8));
    audit(k);
    k.file_put(file);
    teardown(k, &[mm]);
}

#[test]
fn what_a_device_uses_stays_and_nothing_is_disturbed() {
    let (machine, mm) = page("");
    let k = machine.kernel();
    let mut frames = [0];
    let fault = |gva, code| k.fault(mm, gva, code);
    k.pin_user_pages(mm, AT, true, &mut frames, fault).unwrap();
    let (old, flushes) = (entry(k, mm, AT), k.arch.flushes(1));
    assert_eq!(k.migrate_range(mm, AT, PAGE), Ok(0));
    assert_eq!((entry(k, mm, AT), k.arch.flushes(1)), (old, flushes));
    assert_eq!(k.folio(old.address()).flags.get(), folio_flags::EXCLUSIVE);
    k.unpin_user_pages(AT, &frames);
    assert_eq!(k.migrate_range(mm, AT, PAGE), Ok(1));
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn a_pin_that_comes_before_the_flush_brings_the_page_back() {
    let (machine, mm) = page("");
    let k = machine.kernel();
    let old = entry(k, mm, AT);
    // CPU 1 has found the entry present; its interrupts are off, and the flush waits for it.
    k.arch.at(Point::PteClear, move |k| {
        k.on(1, |k| assert!(k.folio_try_pin(old.address())));
    });
    // All attempts fail.
    assert_eq!(k.migrate_range(mm, AT, PAGE), Ok(0));
    assert_eq!((k.arch.hooks_left(), entry(k, mm, AT)), (0, old));
    assert!(k.folio_is_exclusive(old.address()));
    k.folio_unpin_untold(old.address());
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn a_reference_that_comes_late_brings_the_page_back() {
    let (machine, mm) = page("");
    let k = machine.kernel();
    let child = k.mm_fork(mm).unwrap();
    let old = frame(k, mm, AT);
    k.arch.at(Point::PteClear, move |k| {
        k.on(1, |k| k.folio_get(old, abi::channel::cause::HOLD));
    });
    assert_eq!(k.migrate_range(mm, AT, PAGE), Ok(0));
    for mm in [mm, child] {
        assert_eq!(frame(k, mm, AT), old);
        assert!(entry(k, mm, AT).flags().contains(PteFlags::COW));
    }
    k.folio_put(old, abi::channel::cause::HOLD);
    audit(k);
    teardown(k, &[mm, child]);
}

#[test]
fn an_access_meanwhile_faults_and_finds_the_new_frame() {
    for error in [fault::USER, fault::USER | fault::WRITE] {
        let (machine, mm) = page("");
        let k = machine.kernel();
        // What the fault does is wait for who moves the page, whom the test plays too: see `non_present`.
        k.arch.at(Point::Migrate, move |k| {
            let access = k.on(1, |k| k.check_access(k.obj(mm), AT, error));
            assert_eq!(access, Err(error), "not present");
        });
        assert_eq!(k.migrate_range(mm, AT, PAGE), Ok(1));
        assert_eq!(k.arch.hooks_left(), 0);
        k.on(1, |k| k.fault(mm, AT, error)).unwrap();
        assert_eq!(k.user_read(1, AT), Ok(7));
        audit(k);
        teardown(k, &[mm]);
    }
}

/// What happens to a page at `AT` while it is out of all page tables.
fn meanwhile(
    act: impl FnOnce(&TestKernel, Pa<Mm>) + Send + 'static,
    then: impl FnOnce(&TestKernel, Pa<Mm>),
) {
    let (machine, mm) = page("");
    let k = machine.kernel();
    k.arch.at(Point::Migrate, move |k| k.on(1, |k| act(k, mm)));
    k.migrate_range(mm, AT, PAGE).unwrap();
    assert_eq!(k.arch.hooks_left(), 0);
    then(k, mm);
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn unmapped_meanwhile_it_is_gone() {
    meanwhile(
        |k, mm| k.munmap(mm, AT, PAGE).unwrap(),
        |k, mm| assert_eq!(k.obj(mm).rss.get(), 0),
    );
    meanwhile(
        |k, mm| k.madvise(mm, AT, PAGE, advice::DONTNEED).unwrap(),
        |k, _| assert_eq!(k.user_read(0, AT), Ok(0)),
    );
}

#[test]
fn protected_meanwhile_it_comes_back_as_its_vma_is() {
    meanwhile(
        |k, mm| k.mprotect(mm, AT, PAGE, prot::READ).unwrap(),
        |k, mm| {
            assert!(!entry(k, mm, AT).flags().contains(PteFlags::WRITE));
            assert!(k.folio_is_exclusive(frame(k, mm, AT)));
            assert_eq!(k.user_read(1, AT), Ok(7));
        },
    );
    meanwhile(
        |k, mm| k.mprotect(mm, AT, PAGE, prot::NONE).unwrap(),
        |k, mm| assert!(!entry(k, mm, AT).flags().contains(PteFlags::USER)),
    );
}

#[test]
fn forked_meanwhile_it_comes_back_in_both_and_shared() {
    let (machine, mm) = page("");
    let k = machine.kernel();
    let child = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let made = std::sync::Arc::clone(&child);
    k.arch.at(Point::Migrate, move |k| {
        made.store(k.on(1, |k| k.mm_fork(mm)).unwrap().0, Relaxed);
    });
    assert_eq!(k.migrate_range(mm, AT, PAGE), Ok(1));
    let child = Pa::new(child.load(Relaxed));
    assert_eq!(frame(k, child, AT), frame(k, mm, AT));
    assert!(!k.folio_is_exclusive(frame(k, mm, AT)));
    for mm in [mm, child] {
        assert!(entry(k, mm, AT).flags().contains(PteFlags::COW));
    }
    audit(k);
    k.user_write(0, AT, 8).unwrap();
    k.on(2, |k| k.switch_mm(child));
    assert_eq!((k.user_read(2, AT), k.user_read(0, AT)), (Ok(7), Ok(8)));
    teardown(k, &[mm, child]);
}

#[test]
fn moved_meanwhile_it_comes_back_at_its_new_place() {
    let to = AT + 64 * PAGE;
    meanwhile(
        move |k, mm| {
            let flags = mremap::MAYMOVE | mremap::FIXED;
            k.mremap(mm, AT, (PAGE, PAGE), flags, to).unwrap();
        },
        move |k, _| assert_eq!(k.user_read(0, to), Ok(7)),
    );
}

#[test]
fn a_process_that_ends_meanwhile_leaves_nothing() {
    let (machine, mm) = page("");
    let k = machine.kernel();
    let child = k.mm_fork(mm).unwrap();
    k.arch
        .at(Point::Migrate, move |k| k.on(1, |k| k.mm_put(child)));
    assert_eq!(k.migrate_range(mm, AT, PAGE), Ok(1));
    let folio = k.folio(frame(k, mm, AT));
    assert_eq!((folio.refcount.get(), folio.mapcount.get()), (1, 1));
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn a_file_truncated_before_the_lock_and_one_read_meanwhile() {
    let machine = Machine::new(2, "");
    let k = machine.kernel();
    let mm = space(k, &[0, 1]);
    let file = k.file_create().unwrap();
    k.file_truncate(file, PAGE);
    let backing = Backing::File(file, 0);
    k.mmap_of(mm, AT, PAGE, (RW, map::SHARED | map::FIXED), backing)
        .unwrap();
    k.user_write(0, AT, 7).unwrap();
    let old = frame(k, mm, AT);
    // Somebody has found it in the cache and reads it.
    k.arch.at(Point::PteClear, move |k| {
        k.on(1, |k| k.folio_get(old, abi::channel::cause::HOLD));
    });
    assert_eq!(k.migrate_range(mm, AT, PAGE), Ok(0));
    assert_eq!(frame(k, mm, AT), old);
    k.folio_put(old, abi::channel::cause::HOLD);
    audit(k);
    // It is truncated when it is isolated, and nobody has it then but who wants to move it.
    k.arch.at(Point::FrameAlloc, move |k| {
        k.on(1, |k| k.file_truncate(file, 0));
    });
    assert_eq!(k.migrate_range(mm, AT, PAGE), Ok(0));
    assert!(entry(k, mm, AT).is_none());
    audit(k);
    k.file_put(file);
    teardown(k, &[mm]);
}

#[test]
fn nobody_moves_what_somebody_else_moves() {
    let (machine, mm) = page("");
    let k = machine.kernel();
    k.arch.at(Point::Migrate, move |k| {
        assert_eq!(k.on(1, |k| k.migrate_range(mm, AT, PAGE)), Ok(0));
    });
    assert_eq!(k.migrate_range(mm, AT, PAGE), Ok(1));
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn without_a_frame_for_the_copy_everything_is_as_it_was() {
    let (machine, mm) = page("");
    let k = machine.kernel();
    k.user_write(0, AT + PAGE, 9).unwrap();
    let before = [entry(k, mm, AT), entry(k, mm, AT + PAGE)];
    let mut taken = Vec::new();
    while let Ok(frame) = k.alloc_frames(0, FrameKind::Stack) {
        taken.push(frame);
    }
    assert_eq!(k.migrate_range(mm, AT, 2 * PAGE), Err(Errno::ENOMEM));
    assert_eq!(k.compact(mm), 0);
    assert_eq!([entry(k, mm, AT), entry(k, mm, AT + PAGE)], before);
    // With one, both move in turn: the frame that the first leaves is the second's.
    k.free_frames(taken.pop().unwrap());
    assert_eq!(k.migrate_range(mm, AT, 2 * PAGE), Ok(2));
    assert_eq!(
        (k.user_read(1, AT), k.user_read(1, AT + PAGE)),
        (Ok(7), Ok(9))
    );
    taken.into_iter().for_each(|frame| k.free_frames(frame));
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn compaction_moves_folios_down() {
    // Without per-CPU lists every free frame is in reach.
    let machine = Machine::new(1, "pcp_batch=0");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    let other = AT + 64 * PAGE;
    map_at(k, mm, other, 32, RW);
    map_at(k, mm, AT, 8, RW);
    for page in 0..32 {
        k.user_write(0, other + page * PAGE, 1).unwrap();
    }
    for page in 0..8 {
        k.user_write(0, AT + page * PAGE, 100 + page).unwrap();
    }
    let highest = |k: &TestKernel| (0..8).map(|page| frame(k, mm, AT + page * PAGE)).max();
    k.munmap(mm, other, 32 * PAGE).unwrap();
    let before = highest(k);
    assert!(k.compact(mm) > 0);
    assert!(highest(k) < before, "{before:x?}");
    for page in 0..8 {
        assert_eq!(k.user_read(0, AT + page * PAGE), Ok(100 + page));
    }
    audit(k);
    // Again there is little to do, and it ends.
    k.compact(mm);
    let settled = highest(k);
    k.compact(mm);
    assert_eq!(highest(k), settled);
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn move_pages_tells_where_pages_are() {
    let (machine, mm) = page("");
    let k = machine.kernel();
    k.user_read(0, AT + PAGE).unwrap();
    assert_eq!(k.page_status(mm, AT + 5), Ok(0));
    assert_eq!(
        k.page_status(mm, AT + PAGE),
        Err(Errno::EFAULT),
        "zero page"
    );
    assert_eq!(k.page_status(mm, AT + 2 * PAGE), Err(Errno::ENOENT));
    assert_eq!(k.page_status(mm, AT + 9 * PAGE), Err(Errno::EFAULT));
    k.arch.at(Point::Migrate, move |k| {
        assert_eq!(k.page_status(mm, AT), Err(Errno::ENOENT), "on its way");
    });
    k.migrate_range(mm, AT, PAGE).unwrap();
    assert_eq!(k.page_status(mm, AT), Ok(0));
    teardown(k, &[mm]);
}

/// What CPU 1 has written and reads again where it wrote between the copy and the flush of the old frame.
fn write_before_flush(cmdline: &str) -> u64 {
    let (machine, mm) = page(cmdline);
    let k = machine.kernel();
    k.arch.at(Point::FlushIssue, move |k| {
        k.user_write(1, AT, 8).unwrap();
    });
    assert_eq!(k.migrate_range(mm, AT, PAGE), Ok(1));
    assert_eq!(k.arch.hooks_left(), 0);
    let seen = k.user_read(1, AT).unwrap();
    teardown(k, &[mm]);
    seen
}

#[test]
fn copied_before_the_flush_a_write_is_lost() {
    assert_eq!(write_before_flush(""), 8);
    assert_eq!(write_before_flush("bug=migrate-copy-before-flush"), 7);
}
