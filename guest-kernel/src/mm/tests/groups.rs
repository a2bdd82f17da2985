//! Memory groups: who is charged, when, and up to where.

use abi::layout::{HUGE_PAGE_SIZE as HUGE, PAGE_SHIFT};
use abi::objects::{GROUPS, MemGroup, Mm, Pa, group_stat};
use abi::point::Point;
use abi::pte::NonPresent;
use abi::syscall::{Errno, advice, group, map};

use super::files::{map_file, put};
use super::{AT, PAGE, RW, TestKernel, audit, map_at, space, teardown};
use crate::Kernel;
use crate::arch::model::testing::Machine;
use crate::mm::{FaultError, Field, Slot};

const NO_LIMIT: u64 = MemGroup::NO_LIMIT;
const ANON: usize = group_stat::ANON;
/// Tables below the first one that one page needs.
const TABLES: u64 = 3;

fn usage(k: &TestKernel, number: u64) -> u64 {
    k.group(number).unwrap().usage.get()
}

fn stats(k: &TestKernel, number: u64) -> [u64; 4] {
    k.group(number).unwrap().stats.each_ref().map(Field::get)
}

fn failures(k: &TestKernel, number: u64) -> u64 {
    k.group(number).unwrap().failures.get()
}

/// An mm on `cpus` in `group`.
fn member(k: &TestKernel, cpus: &[usize], group: u64) -> Pa<Mm> {
    let mm = space(k, cpus);
    assert_eq!(k.group_move(mm, group, 0), Ok(0));
    mm
}

/// An mm on CPU 0 in `group`, with `pages` at [`AT`] that hold 100, 101...
fn filled(k: &TestKernel, group: u64, pages: u64) -> Pa<Mm> {
    let mm = member(k, &[0], group);
    map_at(k, mm, AT, pages, RW);
    for page in 0..pages {
        k.user_write(0, AT + page * PAGE, 100 + page).unwrap();
    }
    mm
}

fn frame(k: &TestKernel, mm: Pa<Mm>, gva: u64) -> u64 {
    let (_, entry) = k.leaf_at(k.obj(mm), gva).unwrap();
    entry.address()
}

fn group_of(k: &TestKernel, gpa: u64) -> u64 {
    k.frame_group(gpa).group.get().into()
}

/// Runs `test` on a machine with groups, and expects nothing to be charged at its end.
fn with_groups(cmdline: &str, test: impl FnOnce(&TestKernel) -> Vec<Pa<Mm>>) {
    let machine = Machine::with_memory(8 << 20, 2, &format!("groups=on {cmdline}"));
    let k = machine.kernel();
    let mms = test(k);
    audit(k);
    teardown(k, &mms);
    for group in &k.root().groups {
        assert_eq!(group.usage.get(), 0);
        assert!(group.stats.iter().all(|stat| stat.get() == 0));
    }
}

#[test]
fn what_a_process_touches_is_charged_to_its_group_and_those_above() {
    with_groups("", |k| {
        let parent = k.group_create(0, NO_LIMIT).unwrap();
        let child = k.group_create(parent, 50).unwrap();
        let other = k.group_create(parent, NO_LIMIT).unwrap();
        assert_eq!((parent, child, other), (1, 2, 3));
        let mm = filled(k, child, 5);
        audit(k);
        for number in [parent, child] {
            assert_eq!(stats(k, number), [5, 0, TABLES, 0]);
            assert_eq!(usage(k, number), 5 + TABLES);
        }
        assert_eq!(usage(k, other), 0);
        // The zero page is nobody's.
        map_at(k, mm, AT + 16 * PAGE, 1, RW);
        assert_eq!(k.user_read(0, AT + 16 * PAGE), Ok(0));
        assert_eq!(stats(k, child)[ANON], 5);
        k.user_write(0, AT + 16 * PAGE, 1).unwrap();
        assert_eq!(stats(k, child)[ANON], 6);
        k.munmap(mm, AT, 5 * PAGE).unwrap();
        audit(k);
        assert_eq!(stats(k, child)[ANON], 1);
        assert_eq!(k.group(child).unwrap().watermark.get(), 6 + TABLES);
        vec![mm]
    });
}

#[test]
fn without_groups_there_are_none() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    assert_eq!(k.group_create(0, 1), Err(Errno::ENOSYS));
    assert_eq!(k.group_set_max(0, 1), Err(Errno::ENOSYS));
    assert_eq!(k.group_move(mm, 0, 0), Err(Errno::ENOSYS));
    assert_eq!(k.group_stat(mm, 0, group::CURRENT), Err(Errno::ENOSYS));
    teardown(k, &[mm]);
}

#[test]
fn calls_refuse_what_is_not_there() {
    with_groups("", |k| {
        let mm = space(k, &[0]);
        assert_eq!(k.group_create(1, 5), Err(Errno::EINVAL));
        assert_eq!(k.group_move(mm, 1, 0), Err(Errno::EINVAL));
        for number in 1..=GROUPS as u64 {
            assert_eq!(k.group_create(number - 1, u64::MAX), Ok(number));
        }
        assert_eq!(k.group_create(0, 5), Err(Errno::ENOSPC));
        assert_eq!(k.group_set_max(16, 5), Err(Errno::EINVAL));
        assert_eq!(k.group_set_max(0, 5), Err(Errno::EINVAL));
        assert_eq!(k.group_move(mm, 3, 2), Err(Errno::EINVAL));
        assert_eq!(k.group_stat(mm, 3, group::MAX), Ok(NO_LIMIT));
        assert_eq!(k.group_stat(mm, 3, group::PARENT), Ok(2));
        assert_eq!(k.group_stat(mm, 3, group::STATS + 4), Err(Errno::EINVAL));
        assert_eq!(k.group_stat(mm, 3, 9), Err(Errno::EINVAL));
        assert_eq!(k.group_stat(mm, 0, group::USAGE), Err(Errno::EINVAL));
        k.group_move(mm, 15, 0).unwrap();
        assert_eq!(k.group_stat(mm, 0, group::CURRENT), Ok(15));
        map_at(k, mm, AT, 1, RW);
        k.user_write(0, AT, 1).unwrap();
        assert_eq!(usage(k, 1), 1 + TABLES);
        vec![mm]
    });
}

#[test]
fn a_limit_above_is_a_limit() {
    with_groups("", |k| {
        let parent = k.group_create(0, 8 + TABLES).unwrap();
        let child = k.group_create(parent, NO_LIMIT).unwrap();
        let mm = filled(k, child, 8);
        map_at(k, mm, AT + 20 * PAGE, 2, RW);
        let before = (usage(k, parent), usage(k, child));
        let denied = k.user_write(0, AT + 20 * PAGE, 1);
        assert_eq!(denied, Err(FaultError::NoMemory));
        audit(k);
        assert_eq!((usage(k, parent), usage(k, child)), before);
        assert_eq!((failures(k, parent), failures(k, child)), (1, 0));
        assert_eq!(k.group_at_limit(mm), Some((parent, before.0, before.0)));
        // What is given back is there for others.
        k.munmap(mm, AT, PAGE).unwrap();
        assert_eq!(k.group_at_limit(mm), None);
        k.user_write(0, AT + 20 * PAGE, 1).unwrap();
        assert_eq!(k.group_set_max(parent, 5), Err(Errno::EBUSY));
        assert_eq!(k.group(parent).unwrap().max.get(), 8 + TABLES);
        k.group_set_max(parent, 9 + TABLES).unwrap();
        k.user_write(0, AT + 21 * PAGE, 1).unwrap();
        vec![mm]
    });
}

#[test]
fn a_call_without_room_fails_and_nothing_has_changed() {
    with_groups("", |k| {
        let number = k.group_create(0, 4 + TABLES).unwrap();
        let mm = filled(k, number, 4);
        let before = usage(k, number);
        let populated = map::POPULATE | super::ANON | map::FIXED;
        // Linux's populate ignores it; the mapping is there.
        k.mmap(mm, AT + 30 * PAGE, PAGE, RW, populated).unwrap();
        assert_eq!(usage(k, number), before);
        let advised = k.madvise(mm, AT + 30 * PAGE, PAGE, advice::POPULATE_WRITE);
        assert_eq!(advised, Err(Errno::ENOMEM));
        assert_eq!(k.mm_fork(mm), Err(Errno::ENOMEM));
        audit(k);
        assert_eq!(usage(k, number), before);
        for page in 0..4 {
            assert_eq!(k.user_read(0, AT + page * PAGE), Ok(100 + page));
        }
        vec![mm]
    });
}

#[test]
fn a_group_reclaims_its_own_and_nobody_elses() {
    with_groups("swap_slots=64", |k| {
        let rich = k.group_create(0, NO_LIMIT).unwrap();
        let poor = k.group_create(0, 12).unwrap();
        let bystander = filled(k, rich, 10);
        let mm = filled(k, poor, 30);
        audit(k);
        assert_eq!(k.obj(bystander).rss.get(), 10);
        assert!(usage(k, poor) <= 12 && failures(k, poor) > 0);
        assert!(stats(k, poor)[group_stat::SWAP] >= 30 - 12);
        assert_eq!(stats(k, rich), [10, 0, TABLES, 0]);
        k.on(0, |k| k.switch_mm(mm));
        for page in 0..30 {
            assert_eq!(k.user_read(0, AT + page * PAGE), Ok(100 + page));
        }
        audit(k);
        // A lower limit is met by reclaim, until there is nothing left to reclaim.
        k.group_set_max(poor, 6).unwrap();
        assert!(usage(k, poor) <= 6);
        assert_eq!(k.group_set_max(poor, TABLES - 1), Err(Errno::EBUSY));
        assert_eq!(k.group(poor).unwrap().max.get(), 6);
        assert_eq!(k.obj(bystander).rss.get(), 10);
        vec![mm, bystander]
    });
}

#[test]
fn locked_memory_is_not_reclaimed_for_a_limit() {
    with_groups("swap_slots=64", |k| {
        let number = k.group_create(0, 8 + TABLES).unwrap();
        let mm = filled(k, number, 8);
        k.mlock(mm, AT, 8 * PAGE, 0).unwrap();
        map_at(k, mm, AT + 20 * PAGE, 1, RW);
        let denied = k.user_write(0, AT + 20 * PAGE, 1);
        assert_eq!(denied, Err(FaultError::NoMemory));
        k.munlock(mm, AT, 8 * PAGE).unwrap();
        k.user_write(0, AT + 20 * PAGE, 1).unwrap();
        vec![mm]
    });
}

#[test]
fn what_was_charged_before_a_move_stays_and_is_uncharged_there() {
    for (bug, left) in [("", 0), ("bug=uncharge-current-group", 3)] {
        let machine = Machine::new(1, &format!("groups=on {bug}"));
        let k = machine.kernel();
        let old = k.group_create(0, NO_LIMIT).unwrap();
        let new = k.group_create(0, NO_LIMIT).unwrap();
        let mm = filled(k, old, 3);
        k.group_move(mm, new, 0).unwrap();
        assert_eq!((stats(k, old)[ANON], stats(k, new)[ANON]), (3, 0));
        map_at(k, mm, AT + 8 * PAGE, 4, RW);
        for page in 8..12 {
            k.user_write(0, AT + page * PAGE, 1).unwrap();
        }
        assert_eq!((stats(k, old)[ANON], stats(k, new)[ANON]), (3, 4));
        audit(k);
        k.munmap(mm, AT, 3 * PAGE).unwrap();
        assert_eq!(stats(k, old)[ANON], left);
        assert_eq!(stats(k, new)[ANON], 4 - left);
        if left == 0 {
            audit(k);
            teardown(k, &[mm]);
            assert_eq!((usage(k, old), usage(k, new)), (0, 0));
        }
    }
}

#[test]
fn a_recharge_takes_what_the_process_alone_maps() {
    with_groups("", |k| {
        let old = k.group_create(0, NO_LIMIT).unwrap();
        let new = k.group_create(0, 5).unwrap();
        let mm = filled(k, old, 6);
        let child = k.mm_fork(mm).unwrap();
        assert_eq!(k.obj(child).group.get(), old);
        // Two become the child's own, and so the parent's.
        k.on(1, |k| k.switch_mm(child));
        for page in 0..2 {
            k.user_write(1, AT + page * PAGE, 7).unwrap();
        }
        assert_eq!(stats(k, old), [8, 0, 2 * TABLES + 1, 0]);
        assert_eq!(k.group_move(mm, new, group::RECHARGE), Ok(2));
        audit(k);
        assert_eq!((stats(k, old)[ANON], stats(k, new)[ANON]), (6, 2));
        assert_eq!(group_of(k, frame(k, mm, AT)), new);
        assert_eq!(group_of(k, frame(k, mm, AT + 2 * PAGE)), old);
        // The child takes its two along; the others still are shared.
        assert_eq!(k.group_move(child, new, group::RECHARGE), Ok(2));
        assert_eq!(usage(k, new), 4);
        // Now they are the parent's, who pays for its own in the new group already.
        k.on(1, Kernel::leave_mm);
        k.mm_put(child);
        assert_eq!(k.group_move(mm, old, group::RECHARGE), Ok(2));
        // Too much for the new group: nothing moves.
        assert_eq!(k.group_move(mm, new, group::RECHARGE), Err(Errno::ENOMEM));
        assert_eq!(k.obj(mm).group.get(), old);
        assert_eq!((stats(k, old)[ANON], usage(k, new)), (6, 0));
        audit(k);
        // To the root group, which counts nothing.
        assert_eq!(k.group_move(mm, 0, group::RECHARGE), Ok(6));
        assert_eq!(stats(k, old)[ANON], 0);
        vec![mm]
    });
}

#[test]
fn slots_are_charged_to_the_folios_group_and_what_is_read_to_the_slots() {
    with_groups("swap_slots=16 swap_readahead=1", |k| {
        let old = k.group_create(0, NO_LIMIT).unwrap();
        let new = k.group_create(0, NO_LIMIT).unwrap();
        let mm = filled(k, old, 4);
        k.madvise(mm, AT, 4 * PAGE, advice::PAGEOUT).unwrap();
        assert_eq!(stats(k, old), [0, 0, TABLES, 4]);
        audit(k);
        k.group_move(mm, new, 0).unwrap();
        assert_eq!(k.user_read(0, AT), Ok(100));
        audit(k);
        assert_eq!(stats(k, old), [1, 0, TABLES, 4]);
        assert_eq!(stats(k, new), [0; 4]);
        // Written: the slot is of no more use.
        k.user_write(0, AT + PAGE, 5).unwrap();
        assert_eq!(stats(k, old), [2, 0, TABLES, 3]);
        // Back, and then with what it has on the disk, but for the slot of what is in memory too.
        k.group_move(mm, old, 0).unwrap();
        assert_eq!(k.group_move(mm, new, group::RECHARGE), Ok(2 + 2));
        audit(k);
        assert_eq!(stats(k, new), [2, 0, 0, 2]);
        assert_eq!(stats(k, old), [0, 0, TABLES, 1]);
        assert_eq!(k.user_read(0, AT + 3 * PAGE), Ok(103));
        assert_eq!(stats(k, new), [3, 0, 0, 2]);
        vec![mm]
    });
}

#[test]
fn read_ahead_stops_at_the_limit() {
    with_groups("swap_slots=16 swap_readahead=8", |k| {
        let number = k.group_create(0, NO_LIMIT).unwrap();
        let mm = filled(k, number, 8);
        k.madvise(mm, AT, 8 * PAGE, advice::PAGEOUT).unwrap();
        k.group_set_max(number, TABLES + 3).unwrap();
        assert_eq!(k.user_read(0, AT), Ok(100));
        audit(k);
        assert_eq!(stats(k, number)[ANON], 3);
        vec![mm]
    });
}

#[test]
fn pages_of_a_file_belong_to_who_touched_them_first() {
    with_groups("", |k| {
        let [first, second] = [6, NO_LIMIT].map(|max| k.group_create(0, max).unwrap());
        let a = member(k, &[0], first);
        let b = member(k, &[1], second);
        let file = k.file_create().unwrap();
        k.file_truncate(file, 8 * PAGE);
        for (mm, cpu) in [(a, 0), (b, 1)] {
            map_file(k, mm, AT, 8, RW, map::SHARED, (file, 0));
            for page in 0..2 + cpu as u64 {
                k.user_write(cpu, AT + page * PAGE, page).unwrap();
            }
        }
        assert_eq!(stats(k, first), [0, 2, TABLES, 0]);
        assert_eq!(stats(k, second), [0, 1, TABLES, 0]);
        // By write, of the process that runs; and up to its limit.
        k.on(0, |k| put(k, file, 5 * PAGE, 1)).unwrap();
        assert_eq!(stats(k, first), [0, 3, TABLES, 0]);
        let denied = k.on(0, |k| put(k, file, 6 * PAGE, 1));
        assert_eq!(denied, Err(Errno::ENOMEM));
        assert_eq!(k.user_read(0, AT + 7 * PAGE), Err(FaultError::NoMemory));
        audit(k);
        k.file_truncate(file, PAGE);
        assert_eq!(stats(k, first), [0, 1, TABLES, 0]);
        assert_eq!(stats(k, second), [0, 0, TABLES, 0]);
        k.file_put(file);
        vec![a, b]
    });
}

#[test]
fn a_page_keeps_its_group_where_it_moves() {
    with_groups("", |k| {
        let number = k.group_create(0, 3 + TABLES).unwrap();
        let other = k.group_create(0, NO_LIMIT).unwrap();
        let mm = filled(k, number, 3);
        let before = frame(k, mm, AT);
        k.group_move(mm, other, 0).unwrap();
        // Even where the group has no room for one more.
        assert_eq!(k.migrate_range(mm, AT, PAGE), Ok(1));
        audit(k);
        let now = frame(k, mm, AT);
        assert_ne!(now, before);
        assert_eq!((group_of(k, now), group_of(k, before)), (number, 0));
        assert_eq!((usage(k, number), usage(k, other)), (3 + TABLES, 0));
        vec![mm]
    });
}

#[test]
fn a_folio_of_2_mib_is_charged_split_and_gathered() {
    with_groups("thp=always", |k| {
        let number = k.group_create(0, 1000).unwrap();
        let tight = k.group_create(0, 600).unwrap();
        let mm = member(k, &[0], number);
        map_at(k, mm, AT, 2 * HUGE / PAGE, RW);
        k.user_write(0, AT, 1).unwrap();
        assert_eq!(stats(k, number)[ANON], 512);
        // No room for another one: small pages serve.
        k.user_write(0, AT + HUGE, 2).unwrap();
        assert_eq!(stats(k, number)[ANON], 513);
        assert_eq!(failures(k, number), 1);
        let collapsed = k.madvise(mm, AT + HUGE, HUGE, advice::COLLAPSE);
        assert_eq!(collapsed, Err(Errno::EBUSY));
        audit(k);
        k.munmap(mm, AT + HUGE, HUGE).unwrap();
        // As a whole.
        assert_eq!(k.group_move(mm, tight, group::RECHARGE), Ok(512));
        audit(k);
        // The part that is dropped is charged as long as the folio is whole.
        k.madvise(mm, AT, 100 * PAGE, advice::DONTNEED).unwrap();
        assert_eq!(stats(k, tight)[ANON], 512);
        assert_eq!(k.split_folios(mm, AT, HUGE), Ok(1));
        audit(k);
        assert_eq!(stats(k, tight)[ANON], 412);
        let page = frame(k, mm, AT + 200 * PAGE);
        assert_eq!(group_of(k, page), tight);
        // What takes their place is charged before they are given back.
        let collapsed = k.madvise(mm, AT, HUGE, advice::COLLAPSE);
        assert_eq!(collapsed, Err(Errno::EBUSY));
        k.group_set_max(tight, 1000).unwrap();
        k.madvise(mm, AT, HUGE, advice::COLLAPSE).unwrap();
        audit(k);
        assert_eq!(stats(k, tight)[ANON], 512);
        vec![mm]
    });
}

/// Two CPUs make a page for one address.
#[test]
fn who_comes_second_is_not_charged() {
    for (bug, kept) in [("", 0), ("bug=charge-kept-on-race", 1)] {
        let machine = Machine::new(2, &format!("groups=on {bug}"));
        let k = machine.kernel();
        let number = k.group_create(0, NO_LIMIT).unwrap();
        let mm = member(k, &[0, 1], number);
        map_at(k, mm, AT, 2, RW);
        k.user_write(0, AT + PAGE, 1).unwrap();
        let before = usage(k, number);
        k.arch.at(Point::FrameAlloc, |k| {
            k.user_write(1, AT, 7).unwrap();
        });
        k.user_write(0, AT, 8).unwrap();
        assert_eq!(k.arch.hooks_left(), 0);
        assert_eq!(usage(k, number), before + 1 + kept);
        if kept == 0 {
            audit(k);
            teardown(k, &[mm]);
        }
    }
}

/// A limit is not lowered below what comes meanwhile.
#[test]
fn reclaim_for_a_limit_gives_up_where_the_disk_is_full() {
    with_groups("swap_slots=2 swap_readahead=1", |k| {
        let number = k.group_create(0, TABLES + 4).unwrap();
        let mm = filled(k, number, 4);
        map_at(k, mm, AT + 16 * PAGE, 4, RW);
        for page in 16..18 {
            k.user_write(0, AT + page * PAGE, page).unwrap();
        }
        let denied = k.user_write(0, AT + 18 * PAGE, 1);
        assert_eq!(denied, Err(FaultError::NoMemory));
        audit(k);
        assert_eq!(stats(k, number), [4, 0, TABLES, 2]);
        let table = k.leaf_table(k.obj(mm), AT).unwrap();
        let swapped = (0..18).filter(|page| {
            let entry = k.read_pte(Slot::new(table, 1, AT + (page << PAGE_SHIFT)));
            matches!(entry.non_present(), Some(NonPresent::Swap { .. }))
        });
        assert_eq!(swapped.count(), 2);
        vec![mm]
    });
}
