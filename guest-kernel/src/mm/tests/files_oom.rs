//! Running out of memory in calls and faults on files: everything stays as it was, and nothing leaks.

use abi::objects::{File, FrameKind, Mm, Pa};
use abi::syscall::{Errno, map};

use super::files::{map_file, put, word};
use super::{AT, PAGE, RW, TestKernel, audit, maps, space, teardown};
use crate::arch::model::testing::Machine;
use crate::mm::{FaultError, Field, Size};

/// Runs `operation` with 0, 1, 2... frames left until it succeeds; before that it may only say that there is no memory,
/// and change nothing that `state` shows.
fn at_every_allocation(operation: impl Fn(&TestKernel, Pa<File>, Pa<Mm>) -> Result<(), Errno>) {
    let mut failures = 0;
    for left in 0.. {
        let machine = Machine::with_memory(1 << 20, 1, "pcp_batch=0");
        let k = machine.kernel();
        let mm = space(k, &[0]);
        let file = k.file_create().unwrap();
        k.file_truncate(file, 8 * PAGE);
        map_file(k, mm, AT, 4, RW, map::SHARED, (file, 0));
        map_file(k, mm, AT + 8 * PAGE, 4, RW, map::PRIVATE, (file, 0));
        k.user_write(0, AT, 1).unwrap();
        k.user_write(0, AT + 9 * PAGE, 2).unwrap();
        let state = |k: &TestKernel| {
            let pages = k.obj(file).nr_pages.get();
            (k.file_size(file), pages, maps(k, mm), word(k, file, 0))
        };
        let before = state(k);
        let mut taken: Vec<_> =
            core::iter::from_fn(|| k.alloc_frames(0, FrameKind::Stack).ok()).collect();
        for frame in taken.drain(..left) {
            k.free_frames(frame);
        }
        let result = operation(k, file, mm);
        taken.into_iter().for_each(|frame| k.free_frames(frame));
        if let Err(error) = result {
            assert_eq!(error, Errno::ENOMEM);
            assert_eq!(state(k), before, "with {left} frames left");
            failures += 1;
        }
        audit(k);
        k.file_put(file);
        teardown(k, &[mm]);
        if result.is_ok() {
            break;
        }
    }
    assert!(failures > 0, "the operation allocates nothing");
}

fn fault(error: FaultError) -> Errno {
    assert_eq!(error, FaultError::NoMemory);
    Errno::ENOMEM
}

#[test]
fn write_and_fallocate() {
    // A page far away needs new nodes above the old one and below.
    at_every_allocation(|k, file, _| put(k, file, 3 * PAGE, 5));
    at_every_allocation(|k, file, _| put(k, file, 1 << 40, 5));
    at_every_allocation(|k, file, _| k.file_allocate(file, 0, 6 * PAGE, Size::Grows));
    at_every_allocation(|k, file, _| k.file_allocate(file, 7 * PAGE, 100 * PAGE, Size::Stays));
}

#[test]
fn faults() {
    at_every_allocation(|k, _, _| k.user_read(0, AT + 2 * PAGE).map(|_| ()).map_err(fault));
    at_every_allocation(|k, _, _| k.user_write(0, AT + 2 * PAGE, 1).map_err(fault));
    at_every_allocation(|k, _, _| k.user_write(0, AT + 8 * PAGE, 1).map_err(fault));
}

#[test]
fn mappings_and_splits() {
    let shared = map::SHARED | map::ANONYMOUS;
    // Enough of them to need fresh slabs of every object.
    at_every_allocation(|k, _, mm| {
        let at = k.mmap(mm, 0, PAGE, RW, shared)?;
        k.user_write(0, at, 1)
            .map_err(fault)
            .or_else(|error| k.munmap(mm, at, PAGE).and(Err(error)))
    });
    at_every_allocation(|k, file, mm| {
        let child = k.mm_fork(mm)?;
        assert!(k.obj(file).refcount.get() > 4);
        k.mm_put(child);
        Ok(())
    });
}
