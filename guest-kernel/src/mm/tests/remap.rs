//! mremap, against Linux's documented behaviour and mm/mremap.c.

use abi::bug::Bug;
use abi::layout::{HUGE_PAGE_SIZE, USER_END};
use abi::objects::{Mm, Pa, vma_flags};
use abi::point::Point;
use abi::syscall::{Errno, map, mremap, prot, rlimit};

use super::{
    ANON, AT, PAGE, RW, TestKernel, audit, filled, map_at, maps, space, teardown, with_space,
};
use crate::Kernel;
use crate::arch::model::testing::Machine;
use crate::mm::vma::MAX_MAP_COUNT;
use crate::mm::{FaultError, Field};

const MAY: u64 = mremap::MAYMOVE;
const FIXED: u64 = mremap::MAYMOVE | mremap::FIXED;
const KEEP: u64 = mremap::MAYMOVE | mremap::DONTUNMAP;
/// Where tests move to.
const TO: u64 = AT + (1 << 30);

fn resize(
    k: &TestKernel,
    mm: Pa<Mm>,
    at: u64,
    from: u64,
    to: u64,
    flags: u64,
) -> Result<u64, Errno> {
    k.mremap(mm, at, (from * PAGE, to * PAGE), flags, 0)
}

fn relocate(
    k: &TestKernel,
    mm: Pa<Mm>,
    at: u64,
    pages: u64,
    to: u64,
    flags: u64,
) -> Result<u64, Errno> {
    k.mremap(mm, at, (pages * PAGE, pages * PAGE), flags, to)
}

#[test]
fn shrinking_unmaps_the_end() {
    with_space(|k, mm| {
        filled(k, mm, 8);
        assert_eq!(resize(k, mm, AT, 8, 3, 0), Ok(AT));
        assert_eq!(maps(k, mm), [(AT, AT + 3 * PAGE, RW)]);
        assert_eq!(k.user_read(1, AT + 3 * PAGE), Err(FaultError::NoMapping));
        // In the middle, and over a hole: what is behind the old size stays.
        map_at(k, mm, AT + 4 * PAGE, 4, RW);
        assert_eq!(resize(k, mm, AT + PAGE, 5, 1, 0), Ok(AT + PAGE));
        let left = [(AT, AT + 2 * PAGE, RW), (AT + 6 * PAGE, AT + 8 * PAGE, RW)];
        assert_eq!(maps(k, mm), left);
        // The same size needs no mapping but the first.
        assert_eq!(resize(k, mm, AT, 80, 80, 0), Ok(AT));
    });
}

#[test]
fn growing_in_place_extends_and_merges() {
    with_space(|k, mm| {
        filled(k, mm, 2);
        map_at(k, mm, AT + 4 * PAGE, 1, RW);
        assert_eq!(resize(k, mm, AT, 2, 3, 0), Ok(AT));
        assert_eq!(k.user_read(0, AT + 2 * PAGE), Ok(0));
        assert_eq!(maps(k, mm).len(), 2);
        assert_eq!(resize(k, mm, AT + PAGE, 2, 3, 0), Ok(AT + PAGE));
        assert_eq!(maps(k, mm), [(AT, AT + 5 * PAGE, RW)]);
        // There is no room, and it is not the end of the mapping.
        map_at(k, mm, AT + 6 * PAGE, 1, prot::READ);
        assert_eq!(resize(k, mm, AT, 5, 7, 0), Err(Errno::ENOMEM));
        assert_eq!(resize(k, mm, AT, 2, 3, 0), Err(Errno::ENOMEM));
        assert_eq!(resize(k, mm, AT, 5, 6, 0), Ok(AT));
    });
}

#[test]
fn what_cannot_grow_moves_with_its_contents() {
    with_space(|k, mm| {
        filled(k, mm, 4);
        map_at(k, mm, AT + 4 * PAGE, 1, prot::READ);
        let new = resize(k, mm, AT, 4, 6, MAY).unwrap();
        assert_ne!(new, AT);
        for page in 0..4 {
            assert_eq!(k.user_read(0, new + page * PAGE), Ok(100 + page));
            assert_eq!(k.user_read(1, AT + page * PAGE), Err(FaultError::NoMapping));
        }
        assert_eq!(k.user_read(1, new + 5 * PAGE), Ok(0));
        // A part of a VMA leaves a hole.
        let part = resize(k, mm, new + PAGE, 1, 2, MAY).unwrap();
        assert_eq!(k.user_read(0, part), Ok(101));
        assert_eq!(k.user_read(0, new + PAGE), Err(FaultError::NoMapping));
        assert_eq!(k.user_read(0, new + 2 * PAGE), Ok(102));
    });
}

#[test]
fn fixed_replaces_what_is_there() {
    with_space(|k, mm| {
        filled(k, mm, 3);
        map_at(k, mm, TO - PAGE, 3, RW);
        k.user_write(0, TO, 1).unwrap();
        assert_eq!(relocate(k, mm, AT, 3, TO, FIXED), Ok(TO));
        assert_eq!(k.user_read(0, TO), Ok(100));
        assert_eq!(k.user_read(1, TO + 2 * PAGE), Ok(102));
        assert_eq!(k.user_read(1, TO - PAGE), Ok(0));
        assert_eq!(k.user_read(1, AT), Err(FaultError::NoMapping));
        // Smaller and larger at once.
        assert_eq!(k.mremap(mm, TO, (3 * PAGE, PAGE), FIXED, AT), Ok(AT));
        assert_eq!(k.user_read(0, AT), Ok(100));
        assert_eq!(k.user_read(0, TO + PAGE), Err(FaultError::NoMapping));
        assert_eq!(k.mremap(mm, AT, (PAGE, 2 * PAGE), FIXED, TO), Ok(TO));
        assert_eq!(
            (k.user_read(0, TO), k.user_read(0, TO + PAGE)),
            (Ok(100), Ok(0))
        );
    });
}

#[test]
fn several_vmas_move_with_the_holes_between_them() {
    with_space(|k, mm| {
        filled(k, mm, 6);
        k.mprotect(mm, AT + 2 * PAGE, PAGE, prot::READ).unwrap();
        k.munmap(mm, AT + 4 * PAGE, PAGE).unwrap();
        map_at(k, mm, TO, 6, RW);
        assert_eq!(relocate(k, mm, AT, 6, TO, FIXED), Ok(TO));
        let moved: Vec<_> = [
            (0, 2, RW),
            (2, 3, prot::READ),
            (3, 4, RW),
            (4, 5, RW),
            (5, 6, RW),
        ]
        .map(|(from, to, prot)| (TO + from * PAGE, TO + to * PAGE, prot))
        .into();
        // What was at the hole's new place stays: only VMAs replace.
        assert_eq!(maps(k, mm), moved);
        for page in [0, 1, 2, 3, 5] {
            assert_eq!(k.user_read(0, TO + page * PAGE), Ok(100 + page));
        }
        // Not with a hole at its beginning, nor where it also resizes.
        assert_eq!(
            relocate(k, mm, AT, 6, TO + HUGE_PAGE_SIZE, FIXED),
            Err(Errno::EFAULT)
        );
        let grows = k.mremap(mm, TO, (6 * PAGE, 7 * PAGE), FIXED, AT);
        assert_eq!(grows, Err(Errno::EFAULT));
    });
}

#[test]
fn dontunmap_leaves_the_old_place_empty() {
    with_space(|k, mm| {
        filled(k, mm, 3);
        let new = relocate(k, mm, AT, 3, 0, KEEP).unwrap();
        assert_eq!(k.user_read(0, new + PAGE), Ok(101));
        assert_eq!(k.user_read(0, AT + PAGE), Ok(0), "mapped, and zero");
        k.user_write(0, AT + PAGE, 7).unwrap();
        assert_eq!(k.user_read(1, new + PAGE), Ok(101));
        // A part, to a hint.
        assert_eq!(relocate(k, mm, new, 1, TO, KEEP), Ok(TO));
        assert_eq!(k.user_read(1, TO), Ok(100));
        assert_eq!(k.user_read(1, new), Ok(0));
        assert_eq!(k.user_read(1, new + 2 * PAGE), Ok(102));
    });
}

#[test]
fn dontunmap_unlocks_the_old_place() {
    with_space(|k, mm| {
        filled(k, mm, 2);
        k.mlock(mm, AT, 2 * PAGE, 0).unwrap();
        let new = relocate(k, mm, AT, 2, 0, KEEP).unwrap();
        let flags = |at| {
            let vma = k.vma_at(k.obj(mm), at).unwrap();
            k.obj(vma).flags.get() & vma_flags::LOCKED
        };
        assert_eq!((flags(AT), flags(new)), (0, vma_flags::LOCKED));
        assert_eq!(k.obj(mm).locked_vm.get(), 2);
    });
}

#[test]
fn untouched_memory_merges_where_it_goes_and_touched_memory_where_it_came_from() {
    with_space(|k, mm| {
        map_at(k, mm, AT, 4, RW);
        map_at(k, mm, TO, 1, RW);
        assert_eq!(
            relocate(k, mm, AT + 2 * PAGE, 2, TO + PAGE, FIXED),
            Ok(TO + PAGE)
        );
        assert_eq!(
            maps(k, mm),
            [(AT, AT + 2 * PAGE, RW), (TO, TO + 3 * PAGE, RW)]
        );
        // With itself.
        assert_eq!(
            relocate(k, mm, TO, 1, TO + 3 * PAGE, FIXED),
            Ok(TO + 3 * PAGE)
        );
        assert_eq!(maps(k, mm)[1..], [(TO + PAGE, TO + 4 * PAGE, RW)]);
        k.munmap(mm, TO, 8 * PAGE).unwrap();
        // Touched: its page offset says where it belongs.
        for page in 0..2 {
            k.user_write(0, AT + page * PAGE, page).unwrap();
        }
        map_at(k, mm, TO, 1, RW);
        assert_eq!(
            relocate(k, mm, AT + PAGE, 1, TO + PAGE, FIXED),
            Ok(TO + PAGE)
        );
        assert_eq!(maps(k, mm).len(), 3);
        assert_eq!(
            relocate(k, mm, TO + PAGE, 1, AT + PAGE, FIXED),
            Ok(AT + PAGE)
        );
        assert_eq!(maps(k, mm), [(AT, AT + 2 * PAGE, RW), (TO, TO + PAGE, RW)]);
    });
}

#[test]
fn whole_tables_move_as_such() {
    with_space(|k, mm| {
        let pages = 2 * HUGE_PAGE_SIZE / PAGE;
        let from = AT.next_multiple_of(HUGE_PAGE_SIZE) - PAGE;
        map_at(k, mm, from, pages + 2, RW);
        for page in [0, 1, 300, 512, 513, pages, pages + 1] {
            k.user_write(1, from + page * PAGE, page).unwrap();
        }
        let (first, second) = (from + PAGE, from + PAGE + HUGE_PAGE_SIZE);
        let tables = [first, second].map(|at| k.leaf_table(k.obj(mm), at).unwrap());
        let to = TO.next_multiple_of(HUGE_PAGE_SIZE) - PAGE;
        assert_eq!(relocate(k, mm, from, pages + 2, to, FIXED), Ok(to));
        let moved = [to + PAGE, to + PAGE + HUGE_PAGE_SIZE];
        assert_eq!(moved.map(|at| k.leaf_table(k.obj(mm), at).unwrap()), tables);
        for page in [0, 1, 300, 512, 513, pages, pages + 1] {
            assert_eq!(k.user_read(0, to + page * PAGE), Ok(page), "{page}");
            assert_eq!(
                k.user_read(1, from + page * PAGE),
                Err(FaultError::NoMapping)
            );
        }
        audit(k);
        // Not aligned to each other: entry by entry.
        assert_eq!(relocate(k, mm, to, pages + 2, AT, FIXED), Ok(AT));
        for page in [0, 1, 300, 512, 513, pages, pages + 1] {
            assert_eq!(k.user_read(0, AT + page * PAGE), Ok(page), "{page}");
        }
        assert_eq!(k.obj(mm).rss.get(), 7);
    });
}

#[test]
fn mremap_refuses_what_linux_refuses() {
    with_space(|k, mm| {
        filled(k, mm, 4);
        let call = |at, from, to, flags, new| k.mremap(mm, at, (from, to), flags, new);
        let invalid = [
            call(AT, PAGE, PAGE, 8, 0),
            call(AT + 1, PAGE, PAGE, MAY, 0),
            call(AT, PAGE, 0, MAY, 0),
            call(AT, PAGE, u64::MAX, MAY, 0),
            call(AT, PAGE, USER_END + PAGE, MAY, 0),
            call(AT, PAGE, PAGE, mremap::FIXED, TO),
            call(AT, PAGE, PAGE, mremap::DONTUNMAP, 0),
            call(AT, PAGE, 2 * PAGE, KEEP, 0),
            call(AT, PAGE, PAGE, FIXED, TO + 1),
            call(AT, PAGE, PAGE, FIXED, USER_END),
            call(AT, 2 * PAGE, 2 * PAGE, FIXED, AT + PAGE),
            call(AT, 0, PAGE, MAY, 0),
            call(AT, 0, PAGE, FIXED, TO),
        ];
        assert_eq!(invalid, [Err(Errno::EINVAL); 13]);
        let missing = [
            call(TO, PAGE, PAGE, 0, 0),
            call(AT, 5 * PAGE, 6 * PAGE, MAY, 0),
            call(AT, 5 * PAGE, 5 * PAGE, KEEP, 0),
            call(TO, PAGE, PAGE, FIXED, TO + PAGE),
        ];
        assert_eq!(missing, [Err(Errno::EFAULT); 4]);
        assert_eq!(call(AT, PAGE, PAGE, FIXED, 0), Err(Errno::EPERM));
        assert_eq!(call(AT, 4 * PAGE, USER_END, MAY, 0), Err(Errno::ENOMEM));
        assert_eq!(maps(k, mm), [(AT, AT + 4 * PAGE, RW)]);
    });
}

#[test]
fn limits_hold_for_what_grows() {
    with_space(|k, mm| {
        filled(k, mm, 4);
        let limit = |resource, pages: u64| {
            let new = Some((pages * PAGE, rlimit::INFINITY));
            k.rlimit(mm, resource, new).unwrap();
        };
        limit(rlimit::AS, 5);
        assert_eq!(resize(k, mm, AT, 4, 6, MAY), Err(Errno::ENOMEM));
        assert_eq!(resize(k, mm, AT, 4, 5, MAY), Ok(AT));
        assert_eq!(relocate(k, mm, AT, 5, 0, KEEP), Err(Errno::ENOMEM));
        limit(rlimit::AS, 10);
        limit(rlimit::DATA, 5);
        assert_eq!(resize(k, mm, AT, 5, 6, 0), Err(Errno::ENOMEM));
        limit(rlimit::DATA, 10);
        assert_eq!(
            k.rlimit(mm, rlimit::MEMLOCK, Some((5 * PAGE, 5 * PAGE)))
                .map(|_| ()),
            Ok(())
        );
        k.mlock(mm, AT, 5 * PAGE, 0).unwrap();
        assert_eq!(resize(k, mm, AT, 5, 6, 0), Err(Errno::EAGAIN));
        assert_eq!(resize(k, mm, AT, 5, 4, 0), Ok(AT));
        assert_eq!(resize(k, mm, AT, 4, 5, 0), Ok(AT));
        assert_eq!(
            k.obj(mm).rss.get(),
            5,
            "locked memory is there when it has grown"
        );
    });
}

#[test]
fn too_many_vmas_are_refused_before_anything_is_unmapped() {
    with_space(|k, mm| {
        filled(k, mm, 2);
        map_at(k, mm, TO, 1, RW);
        let count = &k.obj(mm).map_count;
        let (real, most) = (count.get(), MAX_MAP_COUNT);
        count.set(most - 5);
        assert_eq!(relocate(k, mm, AT, 1, TO, FIXED), Err(Errno::ENOMEM));
        count.set(most - 3);
        assert_eq!(resize(k, mm, AT, 1, 2, MAY), Err(Errno::ENOMEM));
        count.set(real);
        assert_eq!(maps(k, mm).len(), 2);
    });
}

#[test]
fn nothing_is_cached_at_the_old_place_before_the_locks_are_dropped() {
    for bug in [None, Some(Bug::MremapFlushAfterUnlock)] {
        let cmdline = bug.map_or(String::new(), |bug| format!("bug={}", bug.name()));
        let machine = Machine::new(2, &cmdline);
        let k = machine.kernel();
        let mm = space(k, &[0, 1]);
        filled(k, mm, 2);
        // The first lock that is released after the first entry has left is that of its table.
        let seen = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(usize::MAX));
        let count = seen.clone();
        k.arch.at(Point::PteClear, move |k| {
            k.arch.at(Point::LockRelease, move |k| {
                let cached = k
                    .tlb(1)
                    .pages
                    .keys()
                    .filter(|at| (AT..AT + 2 * PAGE).contains(*at))
                    .count();
                count.store(cached, std::sync::atomic::Ordering::Relaxed);
            });
        });
        k.on(0, |k| relocate(k, mm, AT, 2, TO, FIXED)).unwrap();
        assert_eq!(k.arch.hooks_left(), 0);
        let cached = seen.load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!(cached, if bug.is_some() { 2 } else { 0 }, "{bug:?}");
        audit(k);
        teardown(k, &[mm]);
    }
}

#[test]
fn a_forked_childs_pages_move_too_and_walks_find_both() {
    with_space(|k, mm| {
        filled(k, mm, 4);
        let child = k.mm_fork(mm).unwrap();
        assert_eq!(relocate(k, mm, AT, 4, TO, FIXED), Ok(TO));
        audit(k);
        k.user_write(0, TO, 7).unwrap();
        k.on(1, |k| k.switch_mm(child));
        assert_eq!(k.user_read(1, AT), Ok(100));
        assert_eq!(relocate(k, child, AT + PAGE, 2, TO, FIXED), Ok(TO));
        audit(k);
        assert_eq!(k.user_read(1, TO), Ok(101));
        let grandchild = k.mm_fork(child).unwrap();
        assert_eq!(relocate(k, child, TO, 2, AT + PAGE, FIXED), Ok(AT + PAGE));
        audit(k);
        k.on(1, Kernel::leave_mm);
        k.mm_put(grandchild);
        k.mm_put(child);
    });
}

#[test]
fn a_table_that_moves_without_a_flush_stays_cached() {
    let machine = Machine::new(2, "bug=mremap-table-no-flush");
    let k = machine.kernel();
    let mm = space(k, &[0, 1]);
    let from = AT.next_multiple_of(HUGE_PAGE_SIZE);
    let pages = HUGE_PAGE_SIZE / PAGE;
    assert_eq!(
        k.mmap(mm, from, HUGE_PAGE_SIZE, RW, ANON | map::FIXED),
        Ok(from)
    );
    k.user_write(1, from, 1).unwrap();
    k.on(0, |k| {
        relocate(k, mm, from, pages, from + HUGE_PAGE_SIZE, FIXED)
    })
    .unwrap();
    assert!(k.tlb(1).pages.contains_key(&from));
}

/// The table that the second half needs at its new place lies where the first half was, which had none.
#[test]
fn a_table_made_for_one_part_is_not_taken_for_another_ones() {
    const QUARTER: u64 = 128 * PAGE;
    with_space(|k, mm| {
        let (old, new, len) = (AT + 3 * QUARTER, AT - QUARTER, 2 * QUARTER);
        map_at(k, mm, old, len / PAGE, RW);
        let written = QUARTER + 5 * PAGE;
        k.user_write(0, old + written, 7).unwrap();
        let flags = mremap::MAYMOVE | mremap::FIXED;
        assert_eq!(k.mremap(mm, old, (len, len), flags, new), Ok(new));
        assert_eq!(k.user_read(1, new + written), Ok(7));
        assert_eq!(k.user_read(1, new), Ok(0));
    });
}
