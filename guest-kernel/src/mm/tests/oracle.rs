//! What `stalemate oracle` found to differ from Linux, each as a test of its own.

use abi::pte::fault;
use abi::syscall::{Errno, advice, map, membarrier, mremap, prot, rlimit};

use super::{ANON, AT, PAGE, RW, map_at, maps, with_space};
use crate::mm::{Backing, FaultError, Field, Size};

const GROWSDOWN: u64 = 0x0100_0000;
const GROWSUP: u64 = 0x0200_0000;

#[test]
fn mprotect_may_begin_where_a_stack_does() {
    with_space(|k, mm| {
        let stack = ANON | map::FIXED | map::GROWSDOWN;
        k.mmap(mm, AT, 4 * PAGE, RW, stack).unwrap();
        map_at(k, mm, AT + 8 * PAGE, 1, RW);
        let read = |at: u64, len, more| k.mprotect(mm, AT + at * PAGE, len, prot::READ | more);
        // In the order of Linux's do_mprotect_pkey: both at once, alignment, length, then what is there.
        assert_eq!(
            k.mprotect(mm, AT + 1, 0, GROWSDOWN | GROWSUP),
            Err(Errno::EINVAL)
        );
        assert_eq!(read(0, u64::MAX, GROWSDOWN | GROWSUP), Err(Errno::EINVAL));
        assert_eq!(read(0, 0, GROWSDOWN), Ok(()));
        assert_eq!(read(8, PAGE, GROWSDOWN), Err(Errno::EINVAL));
        assert_eq!(read(5, PAGE, GROWSDOWN), Err(Errno::ENOMEM));
        assert_eq!(read(20, PAGE, GROWSDOWN), Err(Errno::ENOMEM));
        assert_eq!(read(8, PAGE, GROWSUP), Err(Errno::EINVAL));
        assert_eq!(read(5, PAGE, GROWSUP), Err(Errno::ENOMEM));
        let whole = (AT, AT + 4 * PAGE, RW);
        assert_eq!(maps(k, mm)[0], whole);
        assert_eq!(read(2, PAGE, GROWSDOWN), Ok(()));
        assert_eq!(maps(k, mm)[0], (AT, AT + 3 * PAGE, prot::READ));
    });
}

#[test]
fn a_fixed_address_that_looks_like_an_errno_is_one() {
    with_space(|k, mm| {
        let fixed = |address: i64| k.mmap(mm, address.cast_unsigned(), PAGE, RW, ANON | map::FIXED);
        assert_eq!(fixed(-1), Err(Errno::EPERM));
        assert_eq!(fixed(-4095), Err(Errno(4095)));
        assert_eq!(fixed(-4096), Err(Errno::ENOMEM));
    });
}

#[test]
fn a_guard_that_spoils_a_hole_ends_the_search_above_it() {
    with_space(|k, mm| {
        let stack = k.mmap(mm, 0, PAGE, RW, ANON | map::GROWSDOWN).unwrap();
        let other = stack - 5 * PAGE;
        map_at(k, mm, other, 1, RW);
        // Neither the hole between the two nor the one right below, which is behind the same guard.
        let found = k.mmap(mm, 0, PAGE, RW, ANON);
        assert_eq!(found, Ok(stack - 257 * PAGE));
        // Too much for the hole that the guard spoils: the search does not end there, and finds the one below the other.
        let found = k.mmap(mm, 0, 60 * PAGE, RW, ANON);
        assert_eq!(found, Ok(other - 60 * PAGE));
    });
}

#[test]
fn a_stack_that_may_not_grow_has_an_anon_vma_all_the_same() {
    with_space(|k, mm| {
        let stack = k
            .mmap(
                mm,
                AT,
                2 * PAGE,
                prot::READ,
                ANON | map::GROWSDOWN | map::FIXED,
            )
            .unwrap();
        // Once writable, counted; as long as it may hold something it stays so.
        let far = stack - (64 << 20);
        assert_eq!(k.fault(mm, far, fault::USER), Err(FaultError::NoMapping));
        k.mprotect(mm, stack, PAGE, RW).unwrap();
        k.mprotect(mm, stack, PAGE, prot::READ).unwrap();
        let page = |from, to| (AT + from * PAGE, AT + to * PAGE, prot::READ);
        assert_eq!(maps(k, mm), [page(0, 1), page(1, 2)]);
    });
}

#[test]
fn a_mapping_that_a_limit_refuses_leaves_its_edges_split() {
    with_space(|k, mm| {
        map_at(k, mm, AT, 4, RW);
        let pages = k.obj(mm).total_vm.get();
        let limit = (pages * PAGE, rlimit::INFINITY);
        k.rlimit(mm, rlimit::AS, Some(limit)).unwrap();
        // One page more than it replaces.
        let fixed = k.mmap(mm, AT + 3 * PAGE, 2 * PAGE, RW, ANON | map::FIXED);
        assert_eq!(fixed, Err(Errno::ENOMEM));
        let split = AT + 3 * PAGE;
        assert_eq!(maps(k, mm), [(AT, split, RW), (split, AT + 4 * PAGE, RW)]);
    });
}

#[test]
fn madvise_remove_punches_holes_into_what_is_shared() {
    with_space(|k, mm| {
        let shared = map::SHARED | map::ANONYMOUS | map::FIXED;
        k.mmap(mm, AT, 4 * PAGE, RW, shared).unwrap();
        map_at(k, mm, AT + 6 * PAGE, 1, RW);
        for page in 0..4 {
            k.user_write(0, AT + page * PAGE, 7 + page).unwrap();
        }
        let remove = |at: u64, pages| k.madvise(mm, AT + at * PAGE, pages * PAGE, advice::REMOVE);
        assert_eq!(remove(1, 2), Ok(()));
        let found = [0, 1, 2, 3].map(|page| k.user_read(0, AT + page * PAGE));
        assert_eq!(found, [Ok(7), Ok(0), Ok(0), Ok(10)]);
        // A hole is told of when the rest is done (madvise_walk_vmas); private and locked memory end it.
        assert_eq!(remove(3, 2), Err(Errno::ENOMEM));
        assert_eq!(k.user_read(0, AT + 3 * PAGE), Ok(0));
        assert_eq!(remove(6, 1), Err(Errno::EINVAL));
        k.mlock(mm, AT, PAGE, 0).unwrap();
        assert_eq!(remove(0, 4), Err(Errno::EINVAL));
        assert_eq!(k.user_read(0, AT), Ok(7));
        let memfd = k.file_create().unwrap();
        k.file_truncate(memfd, 4 * PAGE);
        let private = (RW, map::PRIVATE | map::FIXED);
        let backing = Backing::File(memfd, 0);
        k.mmap_of(mm, AT + 8 * PAGE, PAGE, private, backing)
            .unwrap();
        assert_eq!(remove(8, 1), Err(Errno::EACCES));
        k.file_put(memfd);
    });
}

#[test]
fn registering_for_sync_core_seems_to_be_registering_for_both() {
    with_space(|k, mm| {
        use membarrier::{
            GET_REGISTRATIONS, PRIVATE_EXPEDITED, REGISTER_PRIVATE_EXPEDITED,
            REGISTER_PRIVATE_EXPEDITED_SYNC_CORE,
        };
        let sync_core = REGISTER_PRIVATE_EXPEDITED_SYNC_CORE;
        assert_eq!(k.membarrier(mm, sync_core, 0), Ok(0));
        let both = REGISTER_PRIVATE_EXPEDITED | sync_core;
        assert_eq!(k.membarrier(mm, GET_REGISTRATIONS, 0), Ok(both));
        let barrier = k.membarrier(mm, PRIVATE_EXPEDITED, 0);
        assert_eq!(barrier, Err(Errno::EPERM));
        // A child inherits it.
        let child = k.mm_fork(mm).unwrap();
        assert_eq!(k.membarrier(child, GET_REGISTRATIONS, 0), Ok(both));
        k.mm_put(child);
    });
}

#[test]
fn shared_memory_is_not_mergeable() {
    with_space(|k, mm| {
        let shared = map::SHARED | map::ANONYMOUS | map::FIXED;
        k.mmap(mm, AT, 4 * PAGE, RW, shared).unwrap();
        let advised = k.madvise(mm, AT, PAGE, advice::MERGEABLE);
        assert_eq!(advised, Ok(()));
        assert_eq!(maps(k, mm).len(), 1);
    });
}

#[test]
fn what_fallocate_makes_is_in_memory_when_somebody_uses_it() {
    with_space(|k, mm| {
        let file = k.file_create().unwrap();
        k.file_allocate(file, 0, 3 * PAGE, Size::Grows).unwrap();
        let shared = (RW, map::SHARED | map::FIXED);
        let backing = Backing::File(file, 0);
        k.mmap_of(mm, AT, 3 * PAGE, shared, backing).unwrap();
        let resident = || {
            let mut vector = [9; 3];
            assert_eq!(k.mincore(mm, AT, &mut vector), Ok(3));
            vector
        };
        assert_eq!(resident(), [0, 0, 0]);
        // A read is no use of it, nor is a fault on its neighbour.
        assert_eq!(k.file_read(file, 0, &mut [0; 8]), Ok(8));
        assert_eq!(k.user_read(0, AT + PAGE), Ok(0));
        assert_eq!(resident(), [0, 1, 0]);
        // A second fallocate is.
        k.file_allocate(file, 2 * PAGE, 3 * PAGE, Size::Grows)
            .unwrap();
        assert_eq!(resident(), [0, 1, 1]);
        k.file_put(file);
    });
}

#[test]
fn what_dontunmap_leaves_behind_stays_counted_as_locked() {
    with_space(|k, mm| {
        map_at(k, mm, AT, 8, RW);
        k.mlock(mm, AT, 8 * PAGE, 0).unwrap();
        let keep = mremap::MAYMOVE | mremap::DONTUNMAP;
        let sizes = (2 * PAGE, 2 * PAGE);
        let moved = k.mremap(mm, AT, sizes, keep, 0).unwrap();
        let counted = || k.counted_as_locked(k.obj(mm));
        assert_eq!((maps(k, mm).len(), counted()), (2, 10));
        // All of the VMA is unlocked now: to unmap it takes nothing away.
        k.munmap(mm, AT, 8 * PAGE).unwrap();
        assert_eq!(counted(), 10);
        k.munmap(mm, moved, 2 * PAGE).unwrap();
        assert_eq!((counted(), k.obj(mm).locked_vm.get()), (8, 0));
    });
}
