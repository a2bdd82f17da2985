//! What the calls do, against Linux's documented behaviour.

use abi::boot::Segment;
use abi::layout::{
    HUGE_PAGE_SIZE, MMAP_BASE, USER_BRK_START, USER_END, USER_MIN, USER_STACK_BYTES, USER_STACK_TOP,
};
use abi::objects::{Pa, SlabId, Task, vma_flags};
use abi::pte::PteFlags;
use abi::syscall::{Errno, advice, map, mremap, prot};

use super::{ANON, AT, PAGE, RW, audit, map_at, maps, space, teardown, with_space};
use crate::Kernel;
use crate::arch::Arch;
use crate::arch::model::testing::{Machine, SEGMENTS};
use crate::mm::{FaultError, Field, Slot};

const R: u64 = prot::READ;

fn pages(from: u64, to: u64) -> (u64, u64) {
    (AT + from * PAGE, AT + to * PAGE)
}

#[test]
fn mmap_searches_top_down_and_neighbours_merge() {
    with_space(|k, mm| {
        let first = k.mmap(mm, 0, 3 * PAGE - 1, RW, ANON).unwrap();
        assert_eq!(first, MMAP_BASE - 3 * PAGE);
        let second = k.mmap(mm, 0, PAGE, RW, ANON).unwrap();
        assert_eq!(second, first - PAGE);
        assert_eq!(maps(k, mm), [(second, MMAP_BASE, RW)]);
        let other = k.mmap(mm, 0, PAGE, R, ANON).unwrap();
        assert_eq!(other, second - PAGE);
        assert_eq!(maps(k, mm).len(), 2);
        // A hole is filled from its top, and both neighbours take it in.
        k.munmap(mm, first, PAGE).unwrap();
        assert_eq!(k.mmap(mm, 0, PAGE, RW, ANON), Ok(first));
        assert_eq!(maps(k, mm).len(), 2);
        // MAP_STACK and MAP_NORESERVE are kept apart.
        let stack = k.mmap(mm, 0, PAGE, R, ANON | map::STACK).unwrap();
        assert_eq!((stack, maps(k, mm).len()), (other - PAGE, 3));
    });
}

#[test]
fn mmap_takes_hints_and_fixed_addresses() {
    with_space(|k, mm| {
        assert_eq!(k.mmap(mm, AT + 5, PAGE, RW, ANON), Ok(AT));
        // Taken: the hint is ignored.
        assert_eq!(k.mmap(mm, AT, PAGE, RW, ANON), Ok(MMAP_BASE - PAGE));
        assert_eq!(k.mmap(mm, 0x2000, PAGE, RW, ANON), Ok(USER_MIN));
        let fixed = ANON | map::FIXED;
        map_at(k, mm, AT, 8, RW);
        k.user_write(0, AT + PAGE, 7).unwrap();
        assert_eq!(k.mmap(mm, AT + PAGE, PAGE, R, fixed), Ok(AT + PAGE));
        assert_eq!(k.user_read(0, AT + PAGE), Ok(0));
        let exclusive = ANON | map::FIXED_NOREPLACE;
        assert_eq!(
            k.mmap(mm, AT + 7 * PAGE, 2 * PAGE, R, exclusive),
            Err(Errno::EEXIST)
        );
        assert_eq!(
            k.mmap(mm, AT + 8 * PAGE, PAGE, R, exclusive),
            Ok(AT + 8 * PAGE)
        );
    });
}

/// Linux's __thp_get_unmapped_area: measured on 6.18.
#[test]
fn whole_folios_of_2_mib_begin_with_one() {
    with_space(|k, mm| {
        let top = page_of_2_mib(MMAP_BASE);
        // A page at the top makes the plain place one that is not aligned.
        assert_eq!(k.mmap(mm, 0, PAGE, RW, ANON), Ok(MMAP_BASE - PAGE));
        let below =
            |at: u64, bytes: u64| page_of_2_mib(at - bytes - HUGE_PAGE_SIZE) + HUGE_PAGE_SIZE;
        let first = below(MMAP_BASE - PAGE, HUGE_PAGE_SIZE);
        assert!(first.is_multiple_of(HUGE_PAGE_SIZE) && first < top);
        assert_eq!(k.mmap(mm, 0, HUGE_PAGE_SIZE, RW, ANON), Ok(first));
        // Only whole ones, without a hint, of private memory.
        let odd = HUGE_PAGE_SIZE + PAGE;
        assert_eq!(k.mmap(mm, 0, odd, RW, ANON), Ok(first - odd));
        let shared = map::SHARED | map::ANONYMOUS;
        let plain = first - odd - HUGE_PAGE_SIZE;
        assert_eq!(k.mmap(mm, 0, HUGE_PAGE_SIZE, RW, shared), Ok(plain));
        assert_eq!(k.mmap(mm, AT, HUGE_PAGE_SIZE, RW, ANON), Ok(AT));
        // What is moved, too.
        let moved = k.mremap(mm, AT, (PAGE, 2 * HUGE_PAGE_SIZE), mremap::MAYMOVE, 0);
        assert_eq!(moved, Ok(below(plain, 2 * HUGE_PAGE_SIZE)));
    });
}

fn page_of_2_mib(gva: u64) -> u64 {
    gva & !(HUGE_PAGE_SIZE - 1)
}

#[test]
fn mmap_refuses_what_linux_refuses() {
    with_space(|k, mm| {
        let call = |address, len, flags| k.mmap(mm, address, len, RW, flags);
        assert_eq!(call(0, PAGE, map::PRIVATE), Err(Errno::EBADF));
        assert_eq!(call(0, 0, ANON), Err(Errno::EINVAL));
        assert_eq!(call(0, u64::MAX, ANON), Err(Errno::ENOMEM));
        assert_eq!(call(0, USER_END + PAGE, ANON), Err(Errno::ENOMEM));
        assert_eq!(call(0, MMAP_BASE, ANON), Err(Errno::ENOMEM));
        assert_eq!(call(0, PAGE, map::ANONYMOUS), Err(Errno::EINVAL));
        let shared = map::ANONYMOUS | map::SHARED;
        assert_eq!(call(0, PAGE, shared | map::GROWSDOWN), Err(Errno::EINVAL));
        // MAP_SHARED_VALIDATE is for files.
        assert_eq!(
            call(0, PAGE, map::ANONYMOUS | map::SHARED_VALIDATE),
            Err(Errno::EINVAL)
        );
        assert_eq!(call(0, PAGE, ANON | map::HUGETLB), Err(Errno::EINVAL));
        assert_eq!(call(AT + 1, PAGE, ANON | map::FIXED), Err(Errno::EINVAL));
        assert_eq!(call(0, PAGE, ANON | map::FIXED), Err(Errno::EPERM));
        assert_eq!(call(USER_END, PAGE, ANON | map::FIXED), Err(Errno::ENOMEM));
        assert_eq!(
            call(USER_END - PAGE, PAGE, ANON | map::FIXED),
            Ok(USER_END - PAGE)
        );
        assert_eq!(k.obj(mm).map_count.get(), 1);
    });
}

#[test]
fn populate_maps_every_page_at_once() {
    with_space(|k, mm| {
        let at = k.mmap(mm, 0, 5 * PAGE, RW, ANON | map::POPULATE).unwrap();
        assert_eq!(k.obj(mm).rss.get(), 5);
        k.mmap(mm, 0, PAGE, 0, ANON | map::POPULATE).unwrap();
        assert_eq!(k.obj(mm).rss.get(), 5);
        let table = k.leaf_table(k.obj(mm), at).unwrap();
        assert!(
            k.read_pte(Slot::new(table, 1, at))
                .flags()
                .contains(PteFlags::WRITE)
        );
    });
}

#[test]
fn munmap_splits_and_frees_tables() {
    with_space(|k, mm| {
        map_at(k, mm, AT, 10, RW);
        for page in 0..10 {
            k.user_write(0, AT + page * PAGE, page).unwrap();
        }
        let tables = k.obj(mm).tables.get();
        k.munmap(mm, AT + 3 * PAGE, 2 * PAGE).unwrap();
        let (a, b) = (pages(0, 3), pages(5, 10));
        assert_eq!(maps(k, mm), [(a.0, a.1, RW), (b.0, b.1, RW)]);
        assert_eq!(k.user_read(1, AT + 4 * PAGE), Err(FaultError::NoMapping));
        assert_eq!(k.user_read(1, AT + 5 * PAGE), Ok(5));
        assert_eq!((k.obj(mm).tables.get(), k.obj(mm).rss.get()), (tables, 8));
        // Over holes and many VMAs.
        k.munmap(mm, AT - 4 * PAGE, 100 * PAGE).unwrap();
        assert_eq!((k.obj(mm).tables.get(), k.obj(mm).rss.get()), (1, 0));
        assert_eq!(k.munmap(mm, AT, PAGE), Ok(()), "nothing there is no error");
        assert_eq!(k.munmap(mm, AT + 1, PAGE), Err(Errno::EINVAL));
        assert_eq!(k.munmap(mm, AT, 0), Err(Errno::EINVAL));
        assert_eq!(k.munmap(mm, AT, u64::MAX), Err(Errno::EINVAL));
        assert_eq!(k.munmap(mm, USER_END + PAGE, PAGE), Err(Errno::EINVAL));
    });
}

#[test]
fn tables_go_only_with_the_last_vma_of_their_range() {
    with_space(|k, mm| {
        // Two VMAs in one 2 MiB region, a third in the next.
        let next = AT + (2 << 20);
        map_at(k, mm, AT, 1, RW);
        map_at(k, mm, AT + 8 * PAGE, 1, R);
        map_at(k, mm, next, 1, RW);
        for gva in [AT, AT + 8 * PAGE, next] {
            k.user_read(0, gva).unwrap();
        }
        assert_eq!(k.obj(mm).tables.get(), 1 + 2 + 2);
        k.munmap(mm, AT, PAGE).unwrap();
        assert_eq!(k.obj(mm).tables.get(), 1 + 2 + 2);
        k.munmap(mm, AT + 8 * PAGE, PAGE).unwrap();
        assert_eq!(k.obj(mm).tables.get(), 1 + 2 + 1);
        k.munmap(mm, next, PAGE).unwrap();
        assert_eq!(k.obj(mm).tables.get(), 1);
    });
}

#[test]
fn mprotect_splits_merges_and_takes_effect() {
    with_space(|k, mm| {
        map_at(k, mm, AT, 6, RW);
        for page in 0..6 {
            k.user_write(1, AT + page * PAGE, page + 1).unwrap();
        }
        k.mprotect(mm, AT + 2 * PAGE, 2 * PAGE, R).unwrap();
        assert_eq!(maps(k, mm).len(), 3);
        assert_eq!(k.user_write(1, AT + 2 * PAGE, 9), Err(FaultError::Access));
        assert_eq!(k.user_read(1, AT + 2 * PAGE), Ok(3));
        k.mprotect(mm, AT + 2 * PAGE, PAGE, RW).unwrap();
        let (a, b, c) = (pages(0, 3), pages(3, 4), pages(4, 6));
        assert_eq!(maps(k, mm), [(a.0, a.1, RW), (b.0, b.1, R), (c.0, c.1, RW)]);
        k.mprotect(mm, AT + 3 * PAGE, PAGE, RW).unwrap();
        assert_eq!(maps(k, mm), [(a.0, c.1, RW)]);
        k.user_write(0, AT + 2 * PAGE, 8).unwrap();
        // PROT_NONE keeps the contents.
        k.mprotect(mm, AT, 6 * PAGE, 0).unwrap();
        assert_eq!(k.user_read(0, AT), Err(FaultError::Access));
        assert_eq!(k.obj(mm).rss.get(), 6);
        k.mprotect(mm, AT, 6 * PAGE, prot::EXEC).unwrap();
        assert_eq!(k.user_read(0, AT + 2 * PAGE), Ok(8));
        k.user_fetch(1, AT).unwrap();
        k.mprotect(mm, AT, 6 * PAGE, R).unwrap();
        assert_eq!(k.user_fetch(1, AT), Err(FaultError::Access));
    });
}

#[test]
fn mprotect_changes_what_lies_before_a_hole() {
    with_space(|k, mm| {
        map_at(k, mm, AT, 2, RW);
        map_at(k, mm, AT + 3 * PAGE, 2, RW);
        assert_eq!(k.mprotect(mm, AT, 5 * PAGE, R), Err(Errno::ENOMEM));
        let (a, b) = (pages(0, 2), pages(3, 5));
        assert_eq!(maps(k, mm), [(a.0, a.1, R), (b.0, b.1, RW)]);
        assert_eq!(
            k.mprotect(mm, AT + 2 * PAGE, 2 * PAGE, R),
            Err(Errno::ENOMEM)
        );
        assert_eq!(k.mprotect(mm, AT + 1, PAGE, R), Err(Errno::EINVAL));
        assert_eq!(k.mprotect(mm, AT, 0, R), Ok(()));
        assert_eq!(k.mprotect(mm, AT, u64::MAX - PAGE, R), Err(Errno::ENOMEM));
        assert_eq!(k.mprotect(mm, AT, PAGE, 0x10), Err(Errno::EINVAL));
        assert_eq!(k.mprotect(mm, AT + 3 * PAGE, PAGE, RW | 8), Ok(()));
    });
}

#[test]
fn brk_grows_shrinks_and_stops_at_neighbours() {
    with_space(|k, mm| {
        let start = USER_BRK_START;
        assert_eq!(k.brk(mm, 0), start);
        assert_eq!(k.brk(mm, start + 10), start + 10);
        k.user_write(0, start, 1).unwrap();
        assert_eq!(k.brk(mm, start + 3 * PAGE), start + 3 * PAGE);
        assert_eq!(maps(k, mm), [(start, start + 3 * PAGE, RW)]);
        let heap = k.vma_at(k.obj(mm), start).unwrap();
        assert!(k.obj(heap).flags.get() & vma_flags::HEAP != 0);
        map_at(k, mm, start + 5 * PAGE, 1, R);
        assert_eq!(
            k.brk(mm, start + 5 * PAGE),
            start + 3 * PAGE,
            "one page stays free"
        );
        assert_eq!(k.brk(mm, start + 4 * PAGE), start + 4 * PAGE);
        assert_eq!(k.brk(mm, start + PAGE), start + PAGE);
        assert_eq!(k.user_read(0, start), Ok(1));
        assert_eq!(k.user_read(0, start + PAGE), Err(FaultError::NoMapping));
        assert_eq!(k.brk(mm, start), start);
        assert_eq!(maps(k, mm).len(), 1);
        assert_eq!(k.brk(mm, u64::MAX), start);
        // Unmapped behind its back: a shrink finds nothing.
        k.brk(mm, start + 2 * PAGE);
        k.munmap(mm, start, 2 * PAGE).unwrap();
        assert_eq!(k.brk(mm, start + PAGE), start + 2 * PAGE);
    });
}

#[test]
fn madvise_drops_pages_and_reports_holes() {
    with_space(|k, mm| {
        map_at(k, mm, AT, 2, RW);
        map_at(k, mm, AT + 3 * PAGE, 2, RW);
        for page in [0, 1, 3, 4] {
            k.user_write(0, AT + page * PAGE, 5).unwrap();
        }
        let drop = |len| k.madvise(mm, AT + PAGE, len, advice::DONTNEED);
        assert_eq!(drop(3 * PAGE), Err(Errno::ENOMEM));
        let read = |page| k.user_read(1, AT + page * PAGE).unwrap();
        assert_eq!([read(0), read(1), read(3), read(4)], [5, 0, 0, 5]);
        assert_eq!(drop(0), Ok(()));
        assert_eq!(k.madvise(mm, AT, PAGE, 99), Err(Errno::EINVAL));
        assert_eq!(
            k.madvise(mm, AT + 1, PAGE, advice::NORMAL),
            Err(Errno::EINVAL)
        );
        assert_eq!(drop(u64::MAX), Err(Errno::EINVAL));
        assert_eq!(k.madvise(mm, AT, PAGE, advice::WILLNEED), Ok(()));
        // Read-ahead advice is a property of the VMA.
        assert_eq!(k.madvise(mm, AT, PAGE, advice::SEQUENTIAL), Ok(()));
        assert_eq!(maps(k, mm).len(), 3);
        assert_eq!(k.madvise(mm, AT, PAGE, advice::NORMAL), Ok(()));
        assert_eq!(maps(k, mm).len(), 2);
        assert_eq!(k.madvise(mm, AT, PAGE, advice::RANDOM), Ok(()));
    });
}

#[test]
fn the_stack_grows_down_to_its_guard_and_its_limit() {
    with_space(|k, mm| {
        k.map_stack(mm, USER_STACK_TOP, USER_STACK_BYTES).unwrap();
        assert_eq!(k.map_stack(mm, USER_STACK_TOP, PAGE), Err(Errno::EEXIST));
        k.user_write(0, USER_STACK_TOP - 8, 1).unwrap();
        let deep = USER_STACK_TOP - (1 << 20);
        k.user_write(1, deep, 2).unwrap();
        assert_eq!(maps(k, mm), [(deep, USER_STACK_TOP, RW)]);
        let too_deep = USER_STACK_TOP - (8 << 20) - PAGE;
        assert_eq!(k.user_write(0, too_deep, 1), Err(FaultError::NoMapping));
        // Closer than the guard to something else.
        let neighbour = USER_STACK_TOP - (4 << 20);
        map_at(k, mm, neighbour, 1, RW);
        let close = neighbour + (1 << 20);
        assert_eq!(k.user_write(0, close, 1), Err(FaultError::NoMapping));
        k.user_write(0, close + PAGE, 1).unwrap();
        assert_eq!(k.user_read(0, 0x1000), Err(FaultError::NoMapping));
        assert_eq!(k.user_read(0, USER_END), Err(FaultError::NoMapping));
        // mmap keeps the guard free too: the hint would fit, but for it.
        let hint = close - 4 * PAGE;
        assert_ne!(k.mmap(mm, hint, PAGE, RW, ANON), Ok(hint));
    });
}

#[test]
fn boot_segments_become_exclusive_folios() {
    with_space(|k, mm| {
        let segment = |gva, prot| Segment {
            gva,
            gpa: SEGMENTS + (gva - AT),
            bytes: 2 * PAGE,
            prot,
        };
        for (gpa, value) in [(SEGMENTS, 11), (SEGMENTS + 3 * PAGE, 22)] {
            k.arch.fill_frame(gpa, value);
        }
        k.map_segment(mm, &segment(AT, R | prot::EXEC)).unwrap();
        k.map_segment(mm, &segment(AT + 2 * PAGE, RW)).unwrap();
        assert_eq!(
            k.map_segment(mm, &segment(AT + PAGE, RW)),
            Err(Errno::EEXIST)
        );
        assert_eq!(k.map_segment(mm, &segment(AT + 8, RW)), Err(Errno::EINVAL));
        k.user_fetch(0, AT).unwrap();
        assert_eq!(k.user_read(0, AT), Ok(11));
        assert_eq!(k.user_write(0, AT, 1), Err(FaultError::Access));
        assert_eq!(k.user_read(0, AT + 3 * PAGE), Ok(22));
        k.user_write(0, AT + 3 * PAGE, 23).unwrap();
        let free = k.root().free_frames.get();
        audit(k);
        let child = k.mm_fork(mm).unwrap();
        k.user_write(0, AT + 3 * PAGE, 24).unwrap();
        k.on(1, |k| k.switch_mm(child));
        assert_eq!(k.user_read(1, AT + 3 * PAGE), Ok(23));
        audit(k);
        k.on(1, Kernel::leave_mm);
        k.mm_put(child);
        // Unmapped, they join the free frames, those below the first one too.
        k.munmap(mm, AT, 4 * PAGE).unwrap();
        audit(k);
        assert!(k.root().free_frames.get() > free);
    });
}

#[test]
fn fork_shares_until_a_write() {
    let machine = Machine::new(2, "");
    let k = machine.kernel();
    let parent = space(k, &[0]);
    map_at(k, parent, AT, 3, RW);
    map_at(k, parent, AT + 3 * PAGE, 1, R);
    for page in 0..3 {
        k.user_write(0, AT + page * PAGE, page + 1).unwrap();
    }
    k.brk(parent, USER_BRK_START + PAGE);
    let frames = k.root().free_frames.get();
    let child = k.mm_fork(parent).unwrap();
    k.on(1, |k| k.switch_mm(child));
    audit(k);
    assert_eq!(maps(k, child), maps(k, parent));
    assert_eq!(k.brk(child, 0), USER_BRK_START + PAGE);
    assert!(
        frames - k.root().free_frames.get() < 10,
        "no page was copied"
    );
    k.user_write(1, AT, 100).unwrap();
    assert_eq!((k.user_read(0, AT), k.user_read(1, AT)), (Ok(1), Ok(100)));
    k.user_write(0, AT + PAGE, 200).unwrap();
    assert_eq!(k.user_read(1, AT + PAGE), Ok(2));
    audit(k);
    // The last owner reuses the frame instead of copying it.
    k.munmap(parent, AT + 2 * PAGE, PAGE).unwrap();
    let free = k.root().free_frames.get();
    k.user_write(1, AT + 2 * PAGE, 3).unwrap();
    assert_eq!(k.root().free_frames.get(), free);
    audit(k);
    // An area mapped beside a forked VMA stays apart from it (Linux's vma_is_fork_child).
    k.munmap(child, AT + 3 * PAGE, PAGE).unwrap();
    map_at(k, child, AT + 3 * PAGE, 1, RW);
    assert_eq!(maps(k, child).len(), 3);
    map_at(k, parent, AT + 2 * PAGE, 1, RW);
    assert_eq!(
        maps(k, parent).len(),
        3,
        "the parent's has one chain and merges"
    );
    teardown(k, &[parent, child]);
}

#[test]
fn generations_of_forks_do_not_pile_anon_vmas_up() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let mut mm = space(k, &[0]);
    map_at(k, mm, AT, 2, RW);
    k.user_write(0, AT, 1).unwrap();
    for generation in 0..12 {
        let child = k.mm_fork(mm).unwrap();
        k.switch_mm(child);
        k.mm_put(mm);
        k.user_write(0, AT + generation % 2 * PAGE, generation)
            .unwrap();
        mm = child;
        audit(k);
    }
    let used = k.root().slabs[SlabId::AnonVma as usize].used.get();
    assert!(used <= 3, "{used} anon_vmas for one VMA");
    teardown(k, &[mm]);
}

#[test]
fn neighbours_share_an_anon_vma_so_that_they_can_merge() {
    with_space(|k, mm| {
        let two = |at: u64, second: u64| {
            for (gva, flags) in [(at, 0), (at + PAGE, second)] {
                let prot = if gva == at { RW } else { RW | prot::EXEC };
                k.mmap(mm, gva, PAGE, prot, ANON | map::FIXED | flags)
                    .unwrap();
                k.user_write(0, gva, 1).unwrap();
            }
            k.mprotect(mm, at + PAGE, PAGE, RW).unwrap();
        };
        two(AT, 0);
        assert_eq!(maps(k, mm).len(), 1);
        assert_eq!(k.root().slabs[SlabId::AnonVma as usize].used.get(), 1);
        // Only one of them counts against memory (Linux's VM_ACCOUNT).
        two(AT + 8 * PAGE, map::NORESERVE);
        assert_eq!(maps(k, mm).len(), 3);
        // One that was only read has no anon_vma, and no need to share one.
        map_at(k, mm, AT + 20 * PAGE, 1, R);
        k.user_read(0, AT + 20 * PAGE).unwrap();
        map_at(k, mm, AT + 21 * PAGE, 1, RW);
        k.user_write(0, AT + 21 * PAGE, 1).unwrap();
        k.mprotect(mm, AT + 20 * PAGE, PAGE, RW).unwrap();
        assert_eq!(maps(k, mm).len(), 4);
    });
}

#[test]
fn one_vma_of_three_goes_from_both_sides() {
    with_space(|k, mm| {
        // prev touched, middle not, next touched: two anon_vmas meet and must not merge.
        map_at(k, mm, AT, 1, RW);
        map_at(k, mm, AT + 2 * PAGE, 1, RW);
        k.user_write(0, AT, 1).unwrap();
        k.user_write(0, AT + 2 * PAGE, 3).unwrap();
        map_at(k, mm, AT + PAGE, 1, RW);
        let (a, b) = (pages(0, 2), pages(2, 3));
        assert_eq!(maps(k, mm), [(a.0, a.1, RW), (b.0, b.1, RW)]);
        audit(k);
        // Neither touched: one VMA, with the anon_vma of the part that has one.
        let at = AT + 10 * PAGE;
        map_at(k, mm, at, 1, RW);
        map_at(k, mm, at + 2 * PAGE, 1, RW);
        k.user_write(0, at + 2 * PAGE, 3).unwrap();
        map_at(k, mm, at + PAGE, 1, RW);
        assert_eq!(maps(k, mm).len(), 3);
        audit(k);
        assert_eq!(k.user_read(1, at + 2 * PAGE), Ok(3));
    });
}

#[test]
fn fault_around_maps_a_window() {
    let machine = Machine::new(1, "fault_around=4");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT + PAGE, 10, RW);
    k.user_write(0, AT + 2 * PAGE, 1).unwrap();
    assert_eq!(k.obj(mm).rss.get(), 3, "the window, cut at the VMA's start");
    k.user_read(0, AT + 9 * PAGE).unwrap();
    assert_eq!(k.obj(mm).rss.get(), 6);
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn user_memory_is_copied_across_pages() {
    with_space(|k, mm| {
        k.rcu_enter_kernel();
        map_at(k, mm, AT, 2, RW);
        // The kernel accesses the memory of a task.
        let task = k.slab_alloc::<Task>().unwrap();
        k.obj(task).mm.set(mm);
        k.this_cpu().current.set(task);
        let text = *b"across the boundary";
        k.arch.copy_to_user(AT + PAGE - 7, &text).unwrap();
        let mut back = [0; 19];
        k.arch.copy_from_user(&mut back, AT + PAGE - 7).unwrap();
        assert_eq!(back, text);
        let fault = k.arch.copy_to_user(AT + 2 * PAGE - 1, &text).unwrap_err();
        assert_eq!(fault.gva, AT + 2 * PAGE);
        k.this_cpu().current.set(Pa::NULL);
        k.slab_free(task);
    });
}

#[test]
fn too_many_vmas_are_refused() {
    let machine = Machine::with_memory(24 << 20, 1, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    let limit = crate::mm::vma::MAX_MAP_COUNT;
    for i in 0..limit {
        map_at(k, mm, AT + 2 * i * PAGE, 1, RW);
    }
    map_at(k, mm, AT + 2 * limit * PAGE, 2, RW);
    let last = AT + 2 * limit * PAGE;
    assert_eq!(k.mmap(mm, 0, PAGE, RW, ANON), Err(Errno::ENOMEM));
    assert_eq!(k.mprotect(mm, last, PAGE, R), Err(Errno::ENOMEM));
    // Trimming an edge adds none.
    k.munmap(mm, last, PAGE).unwrap();
    k.munmap(mm, AT, PAGE).unwrap();
    k.munmap(mm, AT + 2 * PAGE, PAGE).unwrap();
    k.mmap(mm, 0, PAGE, RW, ANON).unwrap();
    teardown(k, &[mm]);
}
