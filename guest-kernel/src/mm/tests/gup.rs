//! Pages that a device uses: what is pinned, and what fork, faults and unmaps make of it.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use abi::failpoint::Failpoint;
use abi::objects::{FrameKind, Mm, Pa, folio_flags};
use abi::point::Point;
use abi::pte::PteFlags;
use abi::syscall::{Errno, advice, prot};

use super::{AT, PAGE, RW, TestKernel, audit, map_at, space, teardown};
use crate::arch::Arch;
use crate::arch::model::testing::Machine;
use crate::mm::{Field, Slot};

/// Pins one page on the CPU that the test plays.
fn pin(k: &TestKernel, mm: Pa<Mm>, gva: u64, write: bool) -> Result<u64, Errno> {
    let mut frames = [0];
    let fault = |gva, code| k.fault(mm, gva, code);
    k.pin_user_pages(mm, gva, write, &mut frames, fault)?;
    Ok(frames[0])
}

fn unpin(k: &TestKernel, gva: u64, frame: u64) {
    k.unpin_user_pages(gva, &[frame]);
}

fn pins(k: &TestKernel, frame: u64) -> (u32, u32, u32) {
    let folio = k.folio(frame);
    (folio.pins.get(), folio.refcount.get(), folio.mapcount.get())
}

fn entry(k: &TestKernel, mm: Pa<Mm>, gva: u64) -> abi::pte::Pte {
    let table = k.leaf_table(k.obj(mm), gva).unwrap();
    k.read_pte(Slot::new(table, 1, gva))
}

fn word(k: &TestKernel, frame: u64) -> u64 {
    k.memory_word(frame).load(Relaxed)
}

#[test]
fn a_page_is_pinned_by_either_way_and_counts_are_as_before() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 3, RW);
    // Nothing is there: the slow way faults it in; the second time the fast way finds it.
    let walks = || k.root().free_frames.get();
    let slow = pin(k, mm, AT, true).unwrap();
    assert_eq!(pins(k, slow), (1, 2, 1));
    let free = walks();
    let fast = pin(k, mm, AT, true).unwrap();
    assert_eq!((fast, pins(k, slow)), (slow, (2, 3, 1)));
    assert_eq!(walks(), free);
    unpin(k, AT, fast);
    unpin(k, AT, slow);
    assert_eq!(pins(k, slow), (0, 1, 1));
    // A range: one for each page.
    let mut frames = [0; 3];
    let fault = |gva, code| k.fault(mm, gva, code);
    assert_eq!(
        k.pin_user_pages(mm, AT + 8, false, &mut frames, fault),
        Ok(3)
    );
    assert_eq!(frames[0], slow);
    for (index, frame) in frames.iter().enumerate() {
        assert_eq!(entry(k, mm, AT + index as u64 * PAGE).address(), *frame);
    }
    k.unpin_user_pages(AT, &frames);
    teardown(k, &[mm]);
}

#[test]
fn what_a_program_may_not_do_a_device_may_not_do_for_it() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 1, prot::READ);
    map_at(k, mm, AT + PAGE, 1, prot::NONE);
    assert_eq!(pin(k, mm, AT, true), Err(Errno::EFAULT));
    assert_eq!(pin(k, mm, AT + PAGE, false), Err(Errno::EFAULT));
    assert_eq!(pin(k, mm, AT + 2 * PAGE, false), Err(Errno::EFAULT));
    let frame = pin(k, mm, AT, false).unwrap();
    assert!(!entry(k, mm, AT).flags().contains(PteFlags::WRITE));
    unpin(k, AT, frame);
    // A present entry that the program may not use: neither way takes it.
    k.mprotect(mm, AT, PAGE, prot::NONE).unwrap();
    assert!(entry(k, mm, AT).is_present());
    assert_eq!(pin(k, mm, AT, false), Err(Errno::EFAULT));
    // An error behind the first page ends the list.
    let mut frames = [0; 3];
    k.mprotect(mm, AT, PAGE, prot::READ).unwrap();
    let fault = |gva, code| k.fault(mm, gva, code);
    assert_eq!(k.pin_user_pages(mm, AT, false, &mut frames, fault), Ok(1));
    k.unpin_user_pages(AT, &frames[..1]);
    teardown(k, &[mm]);
}

#[test]
fn a_shared_page_is_replaced_before_a_device_uses_it() {
    for write in [true, false] {
        let machine = Machine::new(1, "");
        let k = machine.kernel();
        let mm = space(k, &[0]);
        map_at(k, mm, AT, 1, RW);
        k.user_write(0, AT, 7).unwrap();
        let child = k.mm_fork(mm).unwrap();
        let shared = entry(k, mm, AT).address();
        assert_eq!(pins(k, shared), (0, 2, 2));
        let frame = pin(k, mm, AT, write).unwrap();
        assert_ne!(frame, shared);
        assert_eq!((pins(k, frame), word(k, frame)), ((1, 2, 1), 7));
        assert_eq!(pins(k, shared), (0, 1, 1));
        // An unshared page is exclusive, and as writable as it was.
        let flags = entry(k, mm, AT).flags();
        assert_eq!(flags.contains(PteFlags::WRITE), write);
        assert!(k.folio_is_exclusive(frame));
        // A write fault on it changes only the entry: the device has the same page.
        k.user_write(0, AT, 8).unwrap();
        assert_eq!(entry(k, mm, AT).address(), frame);
        assert_eq!(word(k, shared), 7);
        unpin(k, AT, frame);
        teardown(k, &[child, mm]);
    }
}

/// Under PROT_READ, where a write fault would be refused.
#[test]
fn a_page_that_may_only_be_read_is_unshared_too() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 1, RW);
    k.user_write(0, AT, 7).unwrap();
    k.mprotect(mm, AT, PAGE, prot::READ).unwrap();
    let child = k.mm_fork(mm).unwrap();
    let shared = entry(k, mm, AT).address();
    let frame = pin(k, mm, AT, false).unwrap();
    assert_ne!(frame, shared);
    assert!(!entry(k, mm, AT).flags().contains(PteFlags::WRITE));
    audit(k);
    unpin(k, AT, frame);
    teardown(k, &[child, mm]);
}

#[test]
fn fork_copies_what_a_device_uses_and_shares_the_rest() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 3, RW);
    for page in 0..3 {
        k.user_write(0, AT + page * PAGE, page + 1).unwrap();
    }
    let frame = pin(k, mm, AT + PAGE, true).unwrap();
    let child = k.mm_fork(mm).unwrap();
    // The parent has its page as it was, the child a copy of its own.
    let (own, copy) = (entry(k, mm, AT + PAGE), entry(k, child, AT + PAGE));
    assert_eq!(own.address(), frame);
    assert!(own.flags().contains(PteFlags::WRITE));
    assert_eq!(pins(k, frame), (1, 2, 1));
    assert_ne!(copy.address(), frame);
    assert!(copy.flags().contains(PteFlags::WRITE));
    assert_eq!(
        (word(k, copy.address()), pins(k, copy.address())),
        (2, (0, 1, 1))
    );
    for page in [0, 2] {
        let gva = AT + page * PAGE;
        assert_eq!(entry(k, mm, gva).address(), entry(k, child, gva).address());
    }
    // What the device writes and what the parent writes meet in one page.
    k.memory_word(frame + 8).store(99, Relaxed);
    k.user_write(0, AT + PAGE, 5).unwrap();
    assert_eq!(k.user_read(0, AT + PAGE + 8), Ok(99));
    unpin(k, AT + PAGE, frame);
    teardown(k, &[child, mm]);
}

#[test]
fn a_fork_that_finds_no_memory_for_a_copy_leaves_everything_as_it_was() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 2, RW);
    for page in 0..2 {
        k.user_write(0, AT + page * PAGE, page + 1).unwrap();
    }
    let frame = pin(k, mm, AT + PAGE, true).unwrap();
    let before = k.root().free_frames.get();
    let mut failed = 0;
    for passage in 1.. {
        k.arch.channel().fail[Failpoint::FrameAlloc as usize].store(passage, Relaxed);
        let result = k.mm_fork(mm);
        k.arch.channel().fail[Failpoint::FrameAlloc as usize].store(0, Relaxed);
        match result {
            Err(errno) => {
                assert_eq!(errno, Errno::ENOMEM);
                failed += 1;
            }
            Ok(child) => {
                k.mm_put(child);
                break;
            }
        }
        k.rcu_barrier();
        assert_eq!(k.root().free_frames.get(), before, "passage {passage}");
        assert_eq!(pins(k, frame), (1, 2, 1));
        assert_eq!(k.obj(mm).write_protect_seq.get() % 2, 0);
        audit(k);
    }
    assert!(
        failed >= 5,
        "a level-4 table, three more, and the copy: {failed}"
    );
    unpin(k, AT + PAGE, frame);
    teardown(k, &[mm]);
}

#[test]
fn pinning_without_memory_pins_nothing() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 1, RW);
    for passage in 1.. {
        k.arch.channel().fail[Failpoint::FrameAlloc as usize].store(passage, Relaxed);
        let result = pin(k, mm, AT, true);
        k.arch.channel().fail[Failpoint::FrameAlloc as usize].store(0, Relaxed);
        match result {
            Err(errno) => assert_eq!(errno, Errno::ENOMEM),
            Ok(frame) => {
                assert!(passage > 1, "something failed");
                unpin(k, AT, frame);
                break;
            }
        }
        audit(k);
    }
    teardown(k, &[mm]);
}

#[test]
fn an_unmapped_page_stays_until_the_device_is_done() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 2, RW);
    let unmapped = pin(k, mm, AT, true).unwrap();
    let dropped = pin(k, mm, AT + PAGE, true).unwrap();
    k.munmap(mm, AT, PAGE).unwrap();
    k.madvise(mm, AT + PAGE, PAGE, advice::DONTNEED).unwrap();
    for frame in [unmapped, dropped] {
        assert_eq!(pins(k, frame), (1, 1, 0));
        assert_eq!(k.folio(frame).kind.get(), FrameKind::Anon as u8);
    }
    // What the program gets there now is another page.
    assert_ne!(
        k.user_read(0, AT + PAGE)
            .map(|_| entry(k, mm, AT + PAGE).address()),
        Ok(dropped)
    );
    let before = k.root().free_frames.get();
    unpin(k, AT, unmapped);
    unpin(k, AT + PAGE, dropped);
    assert_eq!(k.root().free_frames.get(), before + 2);
    teardown(k, &[mm]);
}

/// Something happens to the page between the look at its entry and the reference: the pin is given back, and the slow
/// way finds what is true now.
#[test]
fn the_fast_way_backs_off_when_the_page_has_changed() {
    type Change = fn(&TestKernel, Pa<Mm>);
    let changes: [(&str, Change, Result<(), Errno>); 3] = [
        ("fork", |k, mm| assert!(k.mm_fork(mm).is_ok()), Ok(())),
        (
            "mprotect",
            |k, mm| k.mprotect(mm, AT, PAGE, prot::READ).unwrap(),
            Err(Errno::EFAULT),
        ),
        (
            "munmap",
            |k, mm| k.munmap(mm, AT, PAGE).unwrap(),
            Err(Errno::EFAULT),
        ),
    ];
    for (name, change, expected) in changes {
        let machine = Machine::new(2, "");
        let k = machine.kernel();
        // Loaded on CPU 0 only: the change on CPU 1 need not wait for it.
        let mm = space(k, &[0]);
        map_at(k, mm, AT, 1, RW);
        k.user_write(0, AT, 7).unwrap();
        let old = entry(k, mm, AT).address();
        let seen = Arc::new(AtomicU64::new(0));
        let told = Arc::clone(&seen);
        k.arch.at(Point::RefcountChange, move |k| {
            // The CPU that pins takes no IPI: what would wait for it is done by itself here.
            change(k, mm);
            told.store(1, Relaxed);
        });
        let pinned = k.on(0, |k| pin(k, mm, AT, true));
        assert_eq!(seen.load(Relaxed), 1, "{name}");
        assert_eq!(pinned.map(drop), expected, "{name}");
        if let Ok(frame) = pinned {
            assert_ne!(frame, old, "{name}: the old page is shared");
            assert_eq!(k.folio(frame).flags.get(), folio_flags::EXCLUSIVE);
            unpin(k, AT, frame);
        }
        let folio = k.folio(old);
        assert_eq!(folio.pins.get(), 0, "{name}");
    }
}

/// The mistake: the page that was found is kept, and fork has shared it meanwhile.
#[test]
fn without_a_second_look_a_shared_page_is_pinned() {
    let machine = Machine::new(1, "bug=gup-fast-no-recheck");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 1, RW);
    k.user_write(0, AT, 7).unwrap();
    k.arch.at(Point::RefcountChange, move |k| {
        k.mm_fork(mm).unwrap();
    });
    let frame = pin(k, mm, AT, true).unwrap();
    assert_eq!(pins(k, frame), (1, 3, 2));
    assert!(!k.folio_is_exclusive(frame));
}

#[test]
fn a_reference_to_a_free_frame_is_not_taken() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let frame = k.alloc_frames(0, FrameKind::Anon).unwrap();
    k.free_frames(frame);
    assert!(!k.folio_try_pin(frame));
    assert_eq!(pins(k, frame), (0, 0, 0));
}
