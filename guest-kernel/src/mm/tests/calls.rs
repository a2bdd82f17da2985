//! The calls that change or tell of mappings without moving them, against Linux's documented behaviour.

use abi::layout::{USER_BRK_START, USER_END};
use abi::objects::{Mm, Pa, folio_flags, vma_flags};
use abi::point::Point;
use abi::pte::{Pte, PteFlags};
use abi::syscall::{Errno, advice, map, membarrier, mlock, msync, prot, rlimit};

use super::{
    ANON, AT, PAGE, RW, TestKernel, audit, filled, map_at, maps, space, teardown, with_space,
};
use crate::Kernel;
use crate::arch::model::testing::Machine;
use crate::mm::{FaultError, Field, Slot};

fn flags_at(k: &TestKernel, mm: Pa<Mm>, at: u64) -> u64 {
    k.obj(k.vma_at(k.obj(mm), at).unwrap()).flags.get()
}

fn entry_at(k: &TestKernel, mm: Pa<Mm>, at: u64) -> Pte {
    let table = k.leaf_table(k.obj(mm), at).unwrap();
    k.read_pte(Slot::new(table, 1, at))
}

fn set_limit(k: &TestKernel, mm: Pa<Mm>, resource: u64, bytes: u64) {
    let hard = k.rlimit(mm, resource, None).unwrap().1;
    k.rlimit(mm, resource, Some((bytes, hard))).unwrap();
}

#[test]
fn mlock_populates_counts_splits_and_merges() {
    with_space(|k, mm| {
        map_at(k, mm, AT, 8, RW);
        // The bytes of a part of two pages.
        assert_eq!(k.mlock(mm, AT + 2 * PAGE + 5, PAGE, 0), Ok(()));
        assert_eq!(
            (
                maps(k, mm).len(),
                k.obj(mm).locked_vm.get(),
                k.obj(mm).rss.get()
            ),
            (3, 2, 2)
        );
        assert_eq!(k.mlock(mm, AT + 4 * PAGE, PAGE, mlock::ONFAULT), Ok(()));
        assert_eq!(
            (
                maps(k, mm).len(),
                k.obj(mm).locked_vm.get(),
                k.obj(mm).rss.get()
            ),
            (4, 3, 2)
        );
        assert_eq!(
            flags_at(k, mm, AT + 4 * PAGE) & vma_flags::LOCKED_MASK,
            vma_flags::LOCKED_MASK
        );
        // Again, without it: it is populated now.
        assert_eq!(k.mlock(mm, AT + 4 * PAGE, PAGE, 0), Ok(()));
        assert_eq!(
            (
                maps(k, mm).len(),
                k.obj(mm).locked_vm.get(),
                k.obj(mm).rss.get()
            ),
            (3, 3, 3)
        );
        assert_eq!(k.munlock(mm, AT, 8 * PAGE), Ok(()));
        assert_eq!((maps(k, mm).len(), k.obj(mm).locked_vm.get()), (1, 0));
        // A private mapping that may be written is populated for writing.
        assert!(
            entry_at(k, mm, AT + 2 * PAGE)
                .flags()
                .contains(PteFlags::WRITE)
        );
    });
}

#[test]
fn mlock_refuses_what_linux_refuses() {
    with_space(|k, mm| {
        map_at(k, mm, AT, 4, RW);
        map_at(k, mm, AT + 6 * PAGE, 1, RW);
        map_at(k, mm, AT + 7 * PAGE, 1, prot::NONE);
        assert_eq!(k.mlock(mm, AT, PAGE, 2), Err(Errno::EINVAL));
        assert_eq!(k.mlock(mm, AT, 0, 0), Ok(()));
        assert_eq!(k.munlock(mm, AT, u64::MAX), Ok(()), "wraps to nothing");
        assert_eq!(k.munlock(mm, PAGE.wrapping_neg(), PAGE), Err(Errno::EINVAL));
        // A hole: what lies before it is locked.
        assert_eq!(k.mlock(mm, AT + 2 * PAGE, 4 * PAGE, 0), Err(Errno::ENOMEM));
        assert_eq!(k.obj(mm).locked_vm.get(), 2);
        assert_eq!(k.munlock(mm, AT, 8 * PAGE), Err(Errno::ENOMEM));
        assert_eq!(k.obj(mm).locked_vm.get(), 0);
        // Without access: locked, and an error all the same.
        assert_eq!(k.mlock(mm, AT + 7 * PAGE, PAGE, 0), Err(Errno::ENOMEM));
        assert_eq!(k.obj(mm).locked_vm.get(), 1);
        assert_eq!(k.munlock(mm, AT + 7 * PAGE, PAGE), Ok(()));
        // The limit: what is locked already does not count again.
        set_limit(k, mm, rlimit::MEMLOCK, 3 * PAGE);
        assert_eq!(k.mlock(mm, AT, 4 * PAGE, 0), Err(Errno::ENOMEM));
        assert_eq!(k.mlock(mm, AT, 3 * PAGE, 0), Ok(()));
        assert_eq!(k.mlock(mm, AT, 3 * PAGE, 0), Ok(()));
        assert_eq!(k.mlock(mm, AT + PAGE, 3 * PAGE, 0), Err(Errno::ENOMEM));
        assert_eq!(
            k.mmap(mm, 0, PAGE, RW, ANON | map::LOCKED),
            Err(Errno::EAGAIN)
        );
        set_limit(k, mm, rlimit::MEMLOCK, 0);
        assert_eq!(k.mlock(mm, AT, PAGE, 0), Err(Errno::EPERM));
        assert_eq!(k.mlockall(mm, mlock::ALL_FUTURE), Err(Errno::EPERM));
        assert_eq!(
            k.mmap(mm, 0, PAGE, RW, ANON | map::LOCKED),
            Err(Errno::EPERM)
        );
        assert_eq!(k.munlock(mm, AT, 4 * PAGE), Ok(()), "it may always unlock");
    });
}

#[test]
fn mlockall_locks_what_is_there_and_what_will_be() {
    with_space(|k, mm| {
        map_at(k, mm, AT, 2, RW);
        for flags in [0, mlock::ALL_ONFAULT, 8] {
            assert_eq!(k.mlockall(mm, flags), Err(Errno::EINVAL));
        }
        assert_eq!(k.mlockall(mm, mlock::ALL_FUTURE), Ok(()));
        assert_eq!(k.obj(mm).locked_vm.get(), 0);
        map_at(k, mm, AT + 4 * PAGE, 2, RW);
        assert_eq!((k.obj(mm).locked_vm.get(), k.obj(mm).rss.get()), (2, 2));
        // The heap too.
        assert_eq!(k.brk(mm, USER_BRK_START + PAGE), USER_BRK_START + PAGE);
        assert_eq!((k.obj(mm).locked_vm.get(), k.obj(mm).rss.get()), (3, 3));
        let onfault = mlock::ALL_CURRENT | mlock::ALL_FUTURE | mlock::ALL_ONFAULT;
        assert_eq!(k.mlockall(mm, onfault), Ok(()));
        map_at(k, mm, AT + 8 * PAGE, 1, RW);
        assert_eq!((k.obj(mm).locked_vm.get(), k.obj(mm).rss.get()), (6, 3));
        assert_eq!(k.mlockall(mm, mlock::ALL_CURRENT), Ok(()));
        assert_eq!((k.obj(mm).locked_vm.get(), k.obj(mm).rss.get()), (6, 6));
        map_at(k, mm, AT + 10 * PAGE, 1, RW);
        assert_eq!(k.obj(mm).locked_vm.get(), 6, "no longer");
        set_limit(k, mm, rlimit::MEMLOCK, 6 * PAGE);
        assert_eq!(k.mlockall(mm, mlock::ALL_CURRENT), Err(Errno::ENOMEM));
        k.mlockall(mm, mlock::ALL_FUTURE).unwrap();
        assert_eq!(k.brk(mm, USER_BRK_START + 2 * PAGE), USER_BRK_START + PAGE);
        // A child inherits neither locks nor what mlockall said.
        let child = k.mm_fork(mm).unwrap();
        assert_eq!(
            (k.obj(child).locked_vm.get(), k.obj(child).def_flags.get()),
            (0, 0)
        );
        assert_eq!(k.rlimit(child, rlimit::MEMLOCK, None).unwrap().0, 6 * PAGE);
        k.mm_put(child);
        k.munlockall(mm);
        assert_eq!(
            (k.obj(mm).locked_vm.get(), k.obj(mm).def_flags.get()),
            (0, 0)
        );
    });
}

#[test]
fn locked_memory_that_becomes_writable_is_made_so_at_once() {
    with_space(|k, mm| {
        map_at(k, mm, AT, 2, prot::READ);
        k.mlock(mm, AT, 2 * PAGE, 0).unwrap();
        assert!(!entry_at(k, mm, AT).flags().contains(PteFlags::WRITE));
        k.mprotect(mm, AT, 2 * PAGE, RW).unwrap();
        assert!(entry_at(k, mm, AT + PAGE).flags().contains(PteFlags::WRITE));
    });
}

#[test]
fn mincore_tells_what_is_there() {
    with_space(|k, mm| {
        map_at(k, mm, AT, 4, RW);
        k.user_write(0, AT + PAGE, 1).unwrap();
        map_at(k, mm, AT + 4 * PAGE, 1, prot::READ);
        k.user_read(0, AT + 4 * PAGE).unwrap();
        let mut vector = [7; 8];
        // To the end of the VMA.
        assert_eq!(k.mincore(mm, AT, &mut vector), Ok(4));
        assert_eq!(vector, [0, 1, 0, 0, 7, 7, 7, 7]);
        assert_eq!(k.mincore(mm, AT + 4 * PAGE, &mut vector[..3]), Ok(1));
        assert_eq!(vector[0], 1);
        assert_eq!(
            k.mincore(mm, AT + 5 * PAGE, &mut vector),
            Err(Errno::ENOMEM)
        );
    });
}

#[test]
fn msync_has_nothing_to_do_but_to_check() {
    with_space(|k, mm| {
        map_at(k, mm, AT, 2, RW);
        map_at(k, mm, AT + 3 * PAGE, 1, RW);
        let call = |at, pages: u64, flags| k.msync(mm, at, pages * PAGE, flags);
        assert_eq!(call(AT, 2, msync::SYNC), Ok(()));
        assert_eq!(call(AT, 2, 0), Ok(()));
        assert_eq!(call(AT, 2, 8), Err(Errno::EINVAL));
        assert_eq!(call(AT + 1, 2, msync::SYNC), Err(Errno::EINVAL));
        assert_eq!(call(AT, 2, msync::SYNC | msync::ASYNC), Err(Errno::EINVAL));
        let all = k.msync(mm, AT, u64::MAX, msync::SYNC);
        assert_eq!(all, Ok(()), "wraps to nothing");
        assert_eq!(
            k.msync(mm, AT, u64::MAX - 2 * PAGE, msync::SYNC),
            Err(Errno::ENOMEM)
        );
        assert_eq!(call(AT, 4, msync::ASYNC), Err(Errno::ENOMEM));
        assert_eq!(call(AT, 3, msync::ASYNC), Err(Errno::ENOMEM));
        assert_eq!(call(AT + 2 * PAGE, 1, msync::ASYNC), Err(Errno::ENOMEM));
        assert_eq!(call(USER_END, 0, msync::ASYNC), Ok(()));
        k.mlock(mm, AT + 3 * PAGE, PAGE, 0).unwrap();
        // Behind a hole: what is wrong there comes first.
        assert_eq!(call(AT, 4, msync::INVALIDATE), Err(Errno::EBUSY));
        assert_eq!(call(AT, 4, msync::SYNC), Err(Errno::ENOMEM));
    });
}

#[test]
fn freed_pages_keep_their_contents_and_a_write_keeps_them() {
    with_space(|k, mm| {
        filled(k, mm, 3);
        assert_eq!(k.madvise(mm, AT, 2 * PAGE, advice::FREE), Ok(()));
        for page in 0..2 {
            let entry = entry_at(k, mm, AT + page * PAGE);
            assert!(!entry.flags().intersects(PteFlags::DIRTY | PteFlags::WRITE));
            assert_eq!(k.user_read(1, AT + page * PAGE), Ok(100 + page));
        }
        let lazy = |page: u64| {
            let entry = entry_at(k, mm, AT + page * PAGE);
            k.folio(entry.address()).flags.get() & folio_flags::LAZYFREE != 0
        };
        k.user_write(1, AT, 5).unwrap();
        assert_eq!((lazy(0), lazy(1), lazy(2)), (false, true, false));
        assert!(entry_at(k, mm, AT).flags().contains(PteFlags::DIRTY));
        assert_eq!(k.user_read(0, AT), Ok(5));
        audit(k);
        // One that a child shares.
        let child = k.mm_fork(mm).unwrap();
        assert_eq!(k.madvise(mm, AT, 3 * PAGE, advice::FREE), Ok(()));
        k.user_write(0, AT, 6).unwrap();
        k.on(1, |k| k.switch_mm(child));
        assert_eq!(k.user_read(1, AT), Ok(5));
        audit(k);
        k.on(1, Kernel::leave_mm);
        k.mm_put(child);
    });
}

#[test]
fn no_cpu_writes_a_freed_page_by_an_old_translation() {
    with_space(|k, mm| {
        filled(k, mm, 2);
        assert!(k.tlb(1).pages[&AT].flags().contains(PteFlags::WRITE));
        k.on(0, |k| k.madvise(mm, AT, 2 * PAGE, advice::FREE))
            .unwrap();
        assert!(!k.tlb(1).pages.contains_key(&AT));
    });
}

#[test]
fn populate_makes_the_accesses_or_says_why_not() {
    with_space(|k, mm| {
        map_at(k, mm, AT, 2, RW);
        map_at(k, mm, AT + 2 * PAGE, 1, prot::READ);
        map_at(k, mm, AT + 3 * PAGE, 1, prot::WRITE);
        let call =
            |from: u64, pages: u64, advice| k.madvise(mm, AT + from * PAGE, pages * PAGE, advice);
        assert_eq!(call(0, 1, advice::POPULATE_READ), Ok(()));
        assert!(!entry_at(k, mm, AT).flags().contains(PteFlags::WRITE));
        assert_eq!(call(0, 2, advice::POPULATE_WRITE), Ok(()));
        assert!(entry_at(k, mm, AT).flags().contains(PteFlags::WRITE));
        assert_eq!(call(0, 3, advice::POPULATE_READ), Ok(()));
        assert_eq!(call(0, 3, advice::POPULATE_WRITE), Err(Errno::EINVAL));
        assert_eq!(call(3, 1, advice::POPULATE_READ), Err(Errno::EINVAL));
        assert_eq!(call(3, 1, advice::POPULATE_WRITE), Ok(()));
        assert_eq!(call(3, 2, advice::POPULATE_WRITE), Err(Errno::ENOMEM));
        assert_eq!(call(4, 1, advice::POPULATE_READ), Err(Errno::ENOMEM));
        assert_eq!(k.obj(mm).rss.get(), 4);
    });
}

#[test]
fn advice_about_fork_is_taken_there() {
    with_space(|k, mm| {
        filled(k, mm, 6);
        k.madvise(mm, AT, 2 * PAGE, advice::DONTFORK).unwrap();
        k.madvise(mm, AT + 2 * PAGE, 2 * PAGE, advice::WIPEONFORK)
            .unwrap();
        assert_eq!(maps(k, mm).len(), 3);
        let child = k.mm_fork(mm).unwrap();
        audit(k);
        k.on(1, |k| k.switch_mm(child));
        assert_eq!(k.user_read(1, AT), Err(FaultError::NoMapping));
        assert_eq!(k.user_read(1, AT + 2 * PAGE), Ok(0));
        assert_eq!(k.user_read(1, AT + 4 * PAGE), Ok(104));
        assert_eq!(k.user_read(0, AT + 2 * PAGE), Ok(102));
        assert_eq!(k.obj(child).total_vm.get(), 4);
        // Wiped memory is wiped for a grandchild too.
        k.user_write(1, AT + 2 * PAGE, 9).unwrap();
        let grandchild = k.mm_fork(child).unwrap();
        k.on(1, |k| k.switch_mm(grandchild));
        assert_eq!(k.user_read(1, AT + 2 * PAGE), Ok(0));
        audit(k);
        k.on(1, Kernel::leave_mm);
        k.mm_put(grandchild);
        k.mm_put(child);
        k.madvise(mm, AT, 2 * PAGE, advice::DOFORK).unwrap();
        k.madvise(mm, AT, 6 * PAGE, advice::KEEPONFORK).unwrap();
        assert_eq!(maps(k, mm).len(), 1);
    });
}

#[test]
fn flags_of_advice_split_and_merge() {
    with_space(|k, mm| {
        let pairs = [
            (advice::HUGEPAGE, advice::NOHUGEPAGE, vma_flags::HUGEPAGE),
            (advice::MERGEABLE, advice::UNMERGEABLE, vma_flags::MERGEABLE),
            (advice::DONTDUMP, advice::DODUMP, vma_flags::DONTDUMP),
        ];
        for (on, off, flag) in pairs {
            map_at(k, mm, AT, 4, RW);
            assert_eq!(k.madvise(mm, AT + PAGE, PAGE, on), Ok(()));
            assert_eq!(maps(k, mm).len(), 3);
            assert_eq!(flags_at(k, mm, AT + PAGE) & flag, flag);
            assert_eq!(k.madvise(mm, AT, 4 * PAGE, on), Ok(()));
            assert_eq!(maps(k, mm).len(), 1);
            assert_eq!(k.madvise(mm, AT, 4 * PAGE, off), Ok(()));
            assert_eq!(flags_at(k, mm, AT) & flag, 0);
        }
        assert_eq!(k.madvise(mm, AT, 4 * PAGE, advice::NOHUGEPAGE), Ok(()));
        assert_ne!(flags_at(k, mm, AT) & vma_flags::NOHUGEPAGE, 0);
    });
}

#[test]
fn advice_that_memory_does_not_take_is_refused() {
    with_space(|k, mm| {
        filled(k, mm, 2);
        let call = |advice| k.madvise(mm, AT, 2 * PAGE, advice);
        for advice in [advice::REMOVE, advice::COLLAPSE, 5, 26, 99] {
            assert_eq!(call(advice), Err(Errno::EINVAL), "{advice}");
        }
        assert_eq!(
            (call(advice::COLD), call(advice::PAGEOUT)),
            (Ok(()), Ok(()))
        );
        k.mlock(mm, AT + PAGE, PAGE, 0).unwrap();
        for advice in [
            advice::COLD,
            advice::PAGEOUT,
            advice::FREE,
            advice::DONTNEED,
        ] {
            assert_eq!(call(advice), Err(Errno::EINVAL), "{advice}");
        }
        assert_eq!(
            k.user_read(0, AT),
            Ok(0),
            "before the locked part it was dropped"
        );
        assert_eq!(k.user_read(0, AT + PAGE), Ok(101));
        assert_eq!(call(advice::DONTNEED_LOCKED), Ok(()));
        assert_eq!(k.user_read(0, AT + PAGE), Ok(0));
    });
}

#[test]
fn membarrier_reaches_who_runs_the_process_once_it_has_registered() {
    with_space(|k, mm| {
        let call = |command, flags| k.on(0, |k| k.membarrier(mm, command, flags));
        let known = call(membarrier::QUERY, 0).unwrap();
        assert_ne!(known & membarrier::PRIVATE_EXPEDITED, 0);
        assert_eq!(call(membarrier::QUERY, 1), Err(Errno::EINVAL));
        assert_eq!(call(1 << 20, 0), Err(Errno::EINVAL));
        for (barrier, register) in [
            (
                membarrier::PRIVATE_EXPEDITED,
                membarrier::REGISTER_PRIVATE_EXPEDITED,
            ),
            (
                membarrier::PRIVATE_EXPEDITED_SYNC_CORE,
                membarrier::REGISTER_PRIVATE_EXPEDITED_SYNC_CORE,
            ),
        ] {
            assert_eq!(call(barrier, 0), Err(Errno::EPERM));
            assert_eq!(call(register, 0), Ok(0));
            let before = k.root().cpus[1].loaded_asid().tlb_gen.get();
            assert_eq!(call(barrier, 0), Ok(0));
            assert_eq!(
                k.root().cpus[1].loaded_asid().tlb_gen.get(),
                before + 1,
                "CPU 1 has taken an IPI"
            );
        }
        let both = membarrier::REGISTER_PRIVATE_EXPEDITED
            | membarrier::REGISTER_PRIVATE_EXPEDITED_SYNC_CORE;
        assert_eq!(call(membarrier::GET_REGISTRATIONS, 0), Ok(both));
    });
}

#[test]
fn the_global_membarrier_reaches_every_cpu_that_runs_anything() {
    let machine = Machine::new(4, "");
    let k = machine.kernel();
    let (mm, other) = (space(k, &[0, 2]), space(k, &[1, 3]));
    k.root().online.set(0b1111);
    k.on(2, Kernel::enter_lazy);
    let call = |command| k.on(0, |k| k.membarrier(mm, command, 0));
    assert_ne!(call(membarrier::QUERY).unwrap() & membarrier::GLOBAL, 0);
    k.arch.at(Point::FlushDispatch, |k| {
        let asked = k.root().cpus[0].flush.pending.get();
        assert_eq!(
            asked, 0b1010,
            "all but the caller's and the one that is lazy"
        );
    });
    // Nobody has to register for it.
    assert_eq!(call(membarrier::GLOBAL), Ok(0));
    assert_eq!(k.arch.hooks_left(), 0);
    assert_eq!(k.root().cpus[0].flush.pending.get(), 0, "all have answered");
    k.root().online.set(0);
    audit(k);
    teardown(k, &[mm, other]);
}

#[test]
fn limits_are_kept_and_only_ever_lowered() {
    with_space(|k, mm| {
        assert_eq!(
            k.rlimit(mm, rlimit::STACK, None),
            Ok((rlimit::DEFAULT_STACK, rlimit::INFINITY))
        );
        assert_eq!(k.rlimit(mm, 7, None), Err(Errno::EINVAL));
        assert_eq!(k.rlimit(mm, rlimit::AS, Some((2, 1))), Err(Errno::EINVAL));
        let old = k.rlimit(mm, rlimit::AS, Some((PAGE, 9 * PAGE)));
        assert_eq!(old, Ok((rlimit::INFINITY, rlimit::INFINITY)));
        let more = Some((PAGE, 10 * PAGE));
        assert_eq!(k.rlimit(mm, rlimit::AS, more), Err(Errno::EPERM));
        assert_eq!(
            k.rlimit(mm, rlimit::AS, Some((9 * PAGE, 9 * PAGE))),
            Ok((PAGE, 9 * PAGE))
        );
    });
}

#[test]
fn what_is_mapped_is_held_against_the_limits() {
    with_space(|k, mm| {
        set_limit(k, mm, rlimit::AS, 6 * PAGE);
        map_at(k, mm, AT, 4, RW);
        assert_eq!(k.mmap(mm, 0, 3 * PAGE, RW, ANON), Err(Errno::ENOMEM));
        // What is replaced does not count.
        map_at(k, mm, AT + 2 * PAGE, 4, RW);
        assert_eq!(k.obj(mm).total_vm.get(), 6);
        assert_eq!(k.brk(mm, USER_BRK_START + PAGE), USER_BRK_START);
        set_limit(k, mm, rlimit::AS, 100 * PAGE);
        set_limit(k, mm, rlimit::DATA, 7 * PAGE);
        map_at(k, mm, AT + 10 * PAGE, 2, prot::READ);
        // The whole change has to fit.
        assert_eq!(
            k.mprotect(mm, AT + 10 * PAGE, 2 * PAGE, RW),
            Err(Errno::ENOMEM)
        );
        assert_eq!(k.mprotect(mm, AT + 10 * PAGE, PAGE, RW), Ok(()));
        assert_eq!(k.obj(mm).data_vm.get(), 7);
        assert_eq!(k.brk(mm, USER_BRK_START + PAGE), USER_BRK_START);
        assert_eq!(k.mmap(mm, 0, PAGE, RW, ANON), Err(Errno::ENOMEM));
        assert!(k.mmap(mm, 0, PAGE, prot::READ, ANON).is_ok());
        // Stacks are no data, and grow as far as theirs lets them.
        let stack = k.mmap(
            mm,
            AT + 4096 * PAGE,
            2 * PAGE,
            RW,
            ANON | map::FIXED | map::GROWSDOWN,
        );
        let bottom = stack.unwrap();
        set_limit(k, mm, rlimit::STACK, 4 * PAGE);
        k.user_write(0, bottom - 2 * PAGE, 1).unwrap();
        assert_eq!(
            k.user_write(0, bottom - 3 * PAGE, 1),
            Err(FaultError::NoMapping)
        );
        assert_eq!(k.obj(mm).data_vm.get(), 7);
    });
}

#[test]
fn mmap_takes_the_other_flags_as_linux_does() {
    with_space(|k, mm| {
        let low = k.mmap(mm, 0, 2 * PAGE, RW, ANON | map::BITS_32).unwrap();
        assert_eq!(low, 0x4000_0000);
        let next = k.mmap(mm, 0, PAGE, RW, ANON | map::BITS_32).unwrap();
        assert_eq!(next, low + 2 * PAGE, "bottom-up");
        assert_eq!(
            k.mmap(mm, 0x7000_0000, PAGE, RW, ANON | map::BITS_32),
            Ok(0x7000_0000)
        );
        assert_eq!(
            k.mmap(mm, AT, PAGE, RW, ANON | map::BITS_32),
            Ok(next + PAGE)
        );
        let huge = ANON | map::BITS_32;
        assert_eq!(k.mmap(mm, 0, 0x4000_0000, RW, huge), Err(Errno::ENOMEM));
        // MAP_SHARED_VALIDATE is for files.
        let validate = map::ANONYMOUS | 3;
        assert_eq!(k.mmap(mm, 0, PAGE, RW, validate), Err(Errno::EINVAL));
        // Locked: populated even with MAP_NONBLOCK, which only takes MAP_POPULATE back.
        let rss = k.obj(mm).rss.get();
        k.mmap(mm, 0, PAGE, RW, ANON | map::POPULATE | map::NONBLOCK)
            .unwrap();
        assert_eq!(k.obj(mm).rss.get(), rss);
        let at = k
            .mmap(mm, 0, PAGE, RW, ANON | map::LOCKED | map::NONBLOCK)
            .unwrap();
        assert_eq!(
            (k.obj(mm).rss.get(), k.obj(mm).locked_vm.get()),
            (rss + 1, 1)
        );
        k.munmap(mm, at, PAGE).unwrap();
        assert_eq!(k.obj(mm).locked_vm.get(), 0);
    });
}
