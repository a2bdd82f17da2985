use std::mem::offset_of;
use std::sync::atomic::Ordering::Relaxed;

use abi::channel::{Event, EventKind, access, cr3, flush};
use abi::layout::{HUGE_PAGE_SIZE, PAGE_SIZE};
use abi::lock::LockClass;
use abi::objects::{FrameKind, Mm};
use abi::pte::{Pte, PteFlags};
use abi::syscall::{map, nr};
use proptest::prelude::*;

use super::state::State;
use super::*;
use crate::check::stream::merge;
use crate::check::world::{ROOT_GPA, World};

mod huge;
mod past;
mod pcid;

const TABLE: PteFlags = PteFlags::PRESENT
    .union(PteFlags::USER)
    .union(PteFlags::WRITE)
    .union(PteFlags::ACCESSED);
const RW: PteFlags = TABLE.union(PteFlags::DIRTY);
/// Tables of mm 1, from level 4 to level 1, and the level-4 table of mm 2.
const TABLES: [u64; 4] = [0x1000, 0x2000, 0x3000, 0x4000];
const OTHER: u64 = 0x8000;
/// The object of mm 1.
const MM: u64 = 0xa000;
/// In mm 1, of 4 KiB and (not there at first) of 2 MiB.
const PAGE: u64 = 0x20_0000;
const HUGE: u64 = 0x40_0000;
const FRAME: u64 = 0x5000;
const BLOCK: u64 = 0x80_0000;

/// Two vCPUs that have mm 1 loaded, which maps [`PAGE`] to [`FRAME`], writable; mm 2 has an empty table.
fn model() -> TlbModel {
    let mut state = State::new(2);
    for vcpu in &mut state.vcpus {
        vcpu.place(1, TABLES[0], 0);
    }
    state.masks.insert(1, 0b11);
    state.mmap_locks.created(1, MM);
    state.tables_mut().roots.insert(1, TABLES[0]);
    state.tables_mut().roots.insert(2, OTHER);
    state.place(TABLES[0], 4, PAGE, Pte::new(TABLES[1], TABLE));
    state.place(TABLES[1], 3, PAGE, Pte::new(TABLES[2], TABLE));
    state.place(TABLES[2], 2, PAGE, Pte::new(TABLES[3], TABLE));
    state.place(TABLES[3], 1, PAGE, Pte::new(FRAME, RW));
    started(state)
}

fn started(state: State) -> TlbModel {
    let mut model = TlbModel {
        start: Rc::new(Run {
            state,
            ..Run::default()
        }),
        ..TlbModel::default()
    };
    model.reset();
    model
}

fn seen(vcpu: usize, kind: EventKind, args: [u64; 5]) -> Seen {
    let event = Event {
        kind: kind as u32,
        task: vcpu as u32 + 1,
        args,
        ..Event::default()
    };
    Seen { vcpu, event }
}

/// IDs of what the events violate.
fn ids(events: &[Seen]) -> Vec<&'static str> {
    found(events).iter().map(|violation| violation.id).collect()
}
fn found(events: &[Seen]) -> Vec<Violation> {
    let mut model = model();
    let mut found = Vec::new();
    for event in events {
        model.observe(event, &mut found);
    }
    found
}

fn rw() -> u64 {
    Pte::new(FRAME, RW).0
}
fn ro() -> u64 {
    Pte::new(FRAME, RW.difference(PteFlags::WRITE)).0
}
fn pte(old: u64, new: u64) -> Seen {
    seen(0, EventKind::PteChange, [1, PAGE, 1, old, new])
}
fn invlpg(vcpu: usize) -> Seen {
    let end = PAGE + PAGE_SIZE;
    seen(vcpu, EventKind::FlushLocal, [1, PAGE, end, 0, 0])
}
fn free(kind: FrameKind, gpa: u64) -> Seen {
    seen(0, EventKind::FrameFree, [gpa, 0, kind as u64, 0, 0])
}
fn call(kind: EventKind, number: u64) -> Seen {
    let args = match kind {
        EventKind::SyscallEnter => [number, PAGE, PAGE_SIZE, 0, 0],
        _ => [number, 0, 0, 0, 0],
    };
    seen(0, kind, args)
}

#[test]
fn a_frame_freed_before_the_other_vcpu_flushed_is_t_01() {
    let anon = || free(FrameKind::Anon, FRAME);
    assert_eq!(ids(&[pte(rw(), 0), invlpg(0), anon()]), ["T-01"]);
    assert_eq!(ids(&[pte(rw(), 0), invlpg(0), invlpg(1), anon()]), [""; 0]);
    let everything = seen(1, EventKind::FlushAll, [1, flush::CURRENT, 0, 0, 0]);
    assert_eq!(ids(&[pte(rw(), 0), invlpg(0), everything, anon()]), [""; 0]);
}

#[test]
fn a_page_written_back_that_another_vcpu_may_write_is_t_13() {
    let submit = |op, is_page| seen(0, EventKind::DiskSubmit, [op, 8, FRAME, PAGE_SIZE, is_page]);
    let clean = || pte(rw(), ro());
    assert_eq!(ids(&[clean(), invlpg(0), submit(1, 1)]), ["T-13"]);
    let flushed = [clean(), invlpg(0), invlpg(1), submit(1, 1)];
    assert_eq!(ids(&flushed), [""; 0]);
    // Unmapped and not flushed is the same; what a device reads for others, or writes, is not.
    assert_eq!(ids(&[pte(rw(), 0), invlpg(0), submit(1, 1)]), ["T-13"]);
    assert_eq!(ids(&[clean(), invlpg(0), submit(1, 0)]), [""; 0]);
    assert_eq!(ids(&[clean(), invlpg(0), submit(0, 1)]), [""; 0]);
}

#[test]
fn a_flush_of_another_page_is_none() {
    let other = seen(
        1,
        EventKind::FlushLocal,
        [1, PAGE + PAGE_SIZE, PAGE + 2 * PAGE_SIZE, 0, 0],
    );
    assert_eq!(
        ids(&[pte(rw(), 0), invlpg(0), other, free(FrameKind::Anon, FRAME)]),
        ["T-01"]
    );
}

#[test]
fn a_violation_names_everything_there_is_to_know() {
    let violations = found(&[pte(rw(), 0), invlpg(0), free(FrameKind::Anon, FRAME)]);
    let finding = &violations[0].finding;
    assert_eq!(
        finding.summary,
        "vCPU 1 may still translate 0x200000 to a frame that is freed"
    );
    assert_eq!(
        finding.expected,
        "a flush of 0x200000..0x201000 of mm 1 on vCPU 1 since the entry changed"
    );
    assert_eq!(
        finding.found,
        "none: it may hold frame 0x5 UWX, which could be cached from the start on; vCPU 0 (task 1) changed the entry (event 1)"
    );
    assert_eq!(
        finding.details,
        [
            "vCPU 1 has not flushed since the start",
            "freed by vCPU 0 (task 1)"
        ]
    );
}

#[test]
fn a_page_that_was_put_back_is_as_it_was() {
    let enter = call(EventKind::SyscallEnter, nr::MPROTECT);
    let exit = call(EventKind::SyscallExit, nr::MPROTECT);
    assert_eq!(
        ids(&[enter, pte(rw(), ro()), pte(ro(), rw()), exit]),
        [""; 0]
    );
}

#[test]
fn who_has_the_frame_now_is_told() {
    let leave = seen(1, EventKind::LazyLeave, [1, 2, 0, 0, 0]);
    let alloc = seen(0, EventKind::FrameAlloc, [FRAME, 0, 1, 0, 0]);
    let enter = seen(1, EventKind::LazyEnter, [1, 0, 0, 0, 0]);
    let violations = found(&[
        enter,
        pte(rw(), 0),
        invlpg(0),
        free(FrameKind::Anon, FRAME),
        alloc,
        leave,
    ]);
    assert_eq!(
        violations[0].finding.details[1..],
        [
            "its frame was freed by vCPU 0 (task 1, event 4)",
            "its frame was allocated again by vCPU 0 (task 1, event 5)"
        ]
    );
}

#[test]
fn a_lazy_vcpu_may_hold_a_freed_frame_until_it_leaves_lazy_mode() {
    let enter = seen(1, EventKind::LazyEnter, [1, 0, 0, 0, 0]);
    let leave = seen(1, EventKind::LazyLeave, [1, 2, 0, 0, 0]);
    let freed = [enter, pte(rw(), 0), invlpg(0), free(FrameKind::Anon, FRAME)];
    assert_eq!(ids(&freed), [""; 0]);
    assert_eq!(ids(&[&freed[..], &[leave]].concat()), ["T-07"]);
    assert_eq!(ids(&[&freed[..], &[invlpg(1), leave]].concat()), [""; 0]);
}

#[test]
fn what_is_still_to_be_flushed_is_no_miss() {
    let enter = seen(1, EventKind::LazyEnter, [1, 0, 0, 0, 0]);
    let leave = seen(1, EventKind::LazyLeave, [1, 2, 0, 0, 0]);
    // Whoever changed the entry sees now that vCPU 1 has to flush.
    let begun = [enter, pte(rw(), 0), leave];
    assert_eq!(ids(&begun), [""; 0]);
    let anon = free(FrameKind::Anon, FRAME);
    assert_eq!(ids(&[&begun[..], &[invlpg(0), anon]].concat()), ["T-01"]);
}

#[test]
fn a_frame_freed_while_mapped_is_t_02() {
    assert_eq!(ids(&[free(FrameKind::Anon, FRAME)]), ["T-02"]);
    assert_eq!(
        ids(&[
            pte(rw(), 0),
            invlpg(0),
            invlpg(1),
            free(FrameKind::Anon, FRAME)
        ]),
        [""; 0]
    );
    assert_eq!(ids(&[free(FrameKind::Table, TABLES[3])]), ["T-02"]);
}

#[test]
fn a_table_freed_while_a_lazy_vcpu_may_walk_it_is_t_03() {
    let link = Pte::new(TABLES[3], TABLE).0;
    let unlink = seen(0, EventKind::PteChange, [1, PAGE, 2, link, 0]);
    let enter = seen(1, EventKind::LazyEnter, [1, 0, 0, 0, 0]);
    let table = || free(FrameKind::Table, TABLES[3]);
    let begun = [enter, pte(rw(), 0), invlpg(0), unlink];
    assert_eq!(ids(&[&begun[..], &[invlpg(0), table()]].concat()), ["T-03"]);
    // INVLPG of any page drops every pointer to a table.
    assert_eq!(
        ids(&[&begun[..], &[invlpg(0), invlpg(1), table()]].concat()),
        [""; 0]
    );
    assert_eq!(
        ids(&[free(FrameKind::Table, TABLES[0])]),
        ["T-03"],
        "the table in CR3"
    );
}

#[test]
fn a_call_that_returns_too_early_is_t_04() {
    let enter = || call(EventKind::SyscallEnter, nr::MPROTECT);
    let exit = || call(EventKind::SyscallExit, nr::MPROTECT);
    assert_eq!(
        ids(&[enter(), pte(rw(), ro()), invlpg(0), exit()]),
        ["T-04"]
    );
    let flushed = [enter(), pte(rw(), ro()), invlpg(0), invlpg(1), exit()];
    assert_eq!(ids(&flushed), [""; 0]);
}

#[test]
fn t_04_says_whether_the_page_is_gone_or_only_a_right() {
    let said = |new| {
        let enter = call(EventKind::SyscallEnter, nr::MPROTECT);
        let exit = call(EventKind::SyscallExit, nr::MPROTECT);
        let found = found(&[enter, pte(rw(), new), invlpg(0), exit]);
        found[0].finding.summary.clone()
    };
    let protected = said(ro());
    assert!(
        protected.ends_with("to a frame that is mapped still, and may no longer be written"),
        "{protected}"
    );
    let gone = said(0);
    assert!(gone.ends_with("that has left the tables"), "{gone}");
}

#[test]
fn mremap_and_madv_free_answer_for_what_they_took_too() {
    let enter = |nr, third, fourth| {
        seen(
            0,
            EventKind::SyscallEnter,
            [nr, PAGE, PAGE_SIZE, third, fourth],
        )
    };
    let exit = |nr, result| seen(0, EventKind::SyscallExit, [nr, result, 0, 0, 0]);
    let moved = [enter(nr::MREMAP, PAGE_SIZE, 3), pte(rw(), 0), invlpg(0)];
    let over = exit(nr::MREMAP, PAGE + 0x10_0000);
    assert_eq!(ids(&[&moved[..], &[over]].concat()), ["T-04"]);
    assert_eq!(ids(&[&moved[..], &[invlpg(1), over]].concat()), [""; 0]);
    // At the fixed place, which another mapping had.
    let to = seen(
        0,
        EventKind::SyscallEnter,
        [nr::MREMAP, 0x9000_0000, PAGE_SIZE, PAGE_SIZE, 3],
    );
    let replaced = [to, pte(rw(), 0), invlpg(0), exit(nr::MREMAP, PAGE)];
    assert_eq!(ids(&replaced), ["T-04"]);
    let freed = [
        enter(nr::MADVISE, 8, 0),
        pte(rw(), ro()),
        invlpg(0),
        exit(nr::MADVISE, 0),
    ];
    assert_eq!(ids(&freed), ["T-04"]);
}

#[test]
fn what_another_call_took_away_meanwhile_is_not_this_calls_to_flush() {
    let other = seen(1, EventKind::PteChange, [1, PAGE, 1, rw(), 0]);
    let enter = call(EventKind::SyscallEnter, nr::MADVISE);
    let exit = call(EventKind::SyscallExit, nr::MADVISE);
    assert_eq!(ids(&[enter, other, exit]), [""; 0]);
    // What was gone before is, but not of who only moves pages.
    let before = |nr| {
        let over = call(EventKind::SyscallExit, nr);
        ids(&[other, call(EventKind::SyscallEnter, nr), over])
    };
    assert_eq!(before(nr::MPROTECT), ["T-04"]);
    assert_eq!(before(nr::TESTBED_MIGRATE), [""; 0]);
    let [enter, exit] = [EventKind::SyscallEnter, EventKind::SyscallExit]
        .map(|kind| call(kind, nr::TESTBED_MIGRATE));
    assert_eq!(ids(&[enter, pte(rw(), 0), exit]), ["T-04"]);
}

/// Another thread's fault has replaced the page and not flushed yet; mprotect finds the rights as they are to be.
#[test]
fn what_a_fault_has_not_flushed_yet_is_not_a_calls_to_flush() {
    let new = Pte::new(0x6000, RW).0;
    let fault = seen(1, EventKind::FaultEnter, [PAGE, 7, 0, 0, 0]);
    let replaced = seen(1, EventKind::PteChange, [1, PAGE, 1, rw(), new]);
    let over = seen(1, EventKind::FaultExit, [PAGE, 0, 0, 0, 0]);
    let [enter, exit] =
        [EventKind::SyscallEnter, EventKind::SyscallExit].map(|kind| call(kind, nr::MPROTECT));
    assert_eq!(ids(&[fault, replaced, enter, exit]), [""; 0]);
    assert_eq!(ids(&[fault, replaced, enter, over, exit]), ["T-05", "T-04"]);
}

#[test]
fn a_fault_that_replaces_a_page_too_early_is_t_05() {
    let new = Pte::new(0x6000, RW).0;
    let enter = seen(0, EventKind::FaultEnter, [PAGE, 7, 0, 0, 0]);
    let exit = seen(0, EventKind::FaultExit, [PAGE, 0, 0, 0, 0]);
    assert_eq!(ids(&[enter, pte(rw(), new), exit]), ["T-05"]);
    assert_eq!(ids(&[enter, pte(rw(), new), invlpg(1), exit]), [""; 0]);
}

#[test]
fn a_mapping_over_what_may_still_be_cached_is_t_06() {
    let attach = seen(
        0,
        EventKind::VmaAttach,
        [1, 0x9000, PAGE, PAGE + PAGE_SIZE, 3],
    );
    let locked = |kind| {
        let lock = MM + offset_of!(Mm, mmap_lock) as u64;
        seen(0, kind, [lock, LockClass::MmapWrite as u64, 0, 0, 0])
    };
    let (lock, unlock) = (
        locked(EventKind::LockAcquire),
        locked(EventKind::LockRelease),
    );
    let unmapped = [lock, pte(rw(), 0), unlock, invlpg(0)];
    assert_eq!(ids(&[&unmapped[..], &[attach]].concat()), ["T-06"]);
    let flushed = [&unmapped[..], &[invlpg(1), attach]].concat();
    assert_eq!(ids(&flushed), [""; 0]);
    // Reclaim unmaps what belongs to the mapping still, which its merge with another links in anew.
    let merged = [lock, unlock, pte(rw(), 0), invlpg(0), attach];
    assert_eq!(ids(&merged), [""; 0]);
    // The mmap_lock of another mm says nothing.
    let other = seen(
        0,
        EventKind::LockAcquire,
        [0x100, LockClass::MmapWrite as u64, 0, 0, 0],
    );
    assert_eq!(ids(&[other, pte(rw(), 0), invlpg(0), attach]), [""; 0]);
}

/// mmap that merges links nothing in: its neighbour grows.
#[test]
fn a_mapping_that_grows_over_what_may_still_be_cached_is_t_06() {
    let lock = MM + offset_of!(Mm, mmap_lock) as u64;
    let locked = |vcpu, kind| seen(vcpu, kind, [lock, LockClass::MmapWrite as u64, 0, 0, 0]);
    let (take, release) = (EventKind::LockAcquire, EventKind::LockRelease);
    let bounds = [1, 0x9000, PAGE - PAGE_SIZE, PAGE + PAGE_SIZE, 3];
    let grown = |vcpu| seen(vcpu, EventKind::VmaChange, bounds);
    let enter = |vcpu, nr| seen(vcpu, EventKind::SyscallEnter, [nr, PAGE, PAGE_SIZE, 3, 0]);
    let unmapped = [
        enter(0, nr::MUNMAP),
        locked(0, take),
        pte(rw(), 0),
        locked(0, release),
        enter(1, nr::MMAP),
    ];
    assert_eq!(ids(&[&unmapped[..], &[grown(1)]].concat()), ["T-06"]);
    let flushed = [&unmapped[..], &[invlpg(0), invlpg(1), grown(1)]].concat();
    assert_eq!(ids(&flushed), [""; 0]);
    // What a call changes itself it flushes before it is over.
    let own = [
        enter(0, nr::MPROTECT),
        locked(0, take),
        pte(rw(), ro()),
        grown(0),
    ];
    assert_eq!(ids(&own), [""; 0]);
    let before = [
        enter(0, nr::MADVISE),
        locked(0, take),
        pte(rw(), 0),
        locked(0, release),
        enter(0, nr::MPROTECT),
        grown(0),
    ];
    assert_eq!(ids(&before), ["T-06"], "of an earlier call");
}

#[test]
fn calls_answer_for_what_they_took_by_the_way() {
    let call = |nr, flags, result| {
        let enter = seen(0, EventKind::SyscallEnter, [nr, PAGE, PAGE_SIZE, 3, flags]);
        let exit = seen(0, EventKind::SyscallExit, [nr, result, 0, 0, 0]);
        let taken = [enter, pte(rw(), 0), invlpg(0)];
        let flushed = [&taken[..], &[invlpg(1), exit]].concat();
        assert_eq!(ids(&flushed), [""; 0]);
        ids(&[&taken[..], &[exit]].concat())
    };
    let failed = abi::syscall::encode(Err(abi::syscall::Errno::ENOMEM));
    assert_eq!(call(nr::MMAP, map::FIXED, PAGE), ["T-04"]);
    assert_eq!(call(nr::MMAP, 0, PAGE), [""; 0], "nothing was there");
    assert_eq!(call(nr::BRK, 0, PAGE), ["T-04"]);
    assert_eq!(call(nr::MPROTECT, 0, failed), ["T-04"], "half its way");
    assert_eq!(call(nr::MUNMAP, 0, failed), [""; 0]);
    // A call that has failed does not answer for others.
    let other = seen(1, EventKind::PteChange, [1, PAGE, 1, rw(), 0]);
    let enter = seen(
        0,
        EventKind::SyscallEnter,
        [nr::MPROTECT, PAGE, PAGE_SIZE, 1, 0],
    );
    let exit = seen(0, EventKind::SyscallExit, [nr::MPROTECT, failed, 0, 0, 0]);
    assert_eq!(ids(&[other, enter, exit]), [""; 0]);
}

#[test]
fn a_cr3_load_outside_the_cpumask_is_t_08() {
    let load = seen(1, EventKind::Cr3Load, [0x8000, 2, 0, 0, 0]);
    let set = seen(1, EventKind::CpumaskSet, [2, 0, 0, 0, 0]);
    assert_eq!(ids(&[load]), ["T-08"]);
    assert_eq!(ids(&[set, load]), [""; 0]);
}

#[test]
fn an_access_that_no_tlb_allows_is_t_09() {
    let read = |frame, how| seen(1, EventKind::Access, [PAGE, frame, 0, how, 0]);
    assert_eq!(ids(&[read(FRAME, 0)]), [""; 0]);
    assert_eq!(ids(&[read(0x7000, 0)]), ["T-09"]);
    let stale = access::HIT | access::STALE | access::WRITE;
    assert_eq!(
        ids(&[pte(rw(), ro()), read(FRAME, stale)]),
        [""; 0],
        "not flushed yet"
    );
    assert_eq!(
        ids(&[pte(rw(), ro()), invlpg(1), read(FRAME, stale)]),
        ["T-09"]
    );
    // The fault has dropped what it would use.
    let fault = seen(1, EventKind::FaultEnter, [PAGE, 7, 0, 0, 0]);
    assert_eq!(ids(&[pte(rw(), ro()), fault, read(FRAME, stale)]), ["T-09"]);
}

#[test]
fn both_sizes_may_be_cached_while_a_mapping_changes_its_size() {
    // That it may hold both is T-12, which is another test's.
    let besides = |events: &[Seen]| {
        let found = ids(events).into_iter();
        found.filter(|id| *id != "T-12").collect::<Vec<_>>()
    };
    let huge = Pte::new(BLOCK, RW | PteFlags::HUGE).0;
    let table = Pte::new(0xa000, TABLE).0;
    let level2 = |old, new| seen(0, EventKind::PteChange, [1, HUGE, 2, old, new]);
    let small = seen(0, EventKind::PteChange, [1, HUGE, 1, 0, ro()]);
    let at = HUGE + PAGE_SIZE;
    let read = |gva, frame| seen(1, EventKind::Access, [gva, frame, 0, 0, 0]);
    // The table is filled before it is linked in place of the page.
    let split = [level2(0, huge), small, level2(huge, table)];
    let reads = [
        read(HUGE, FRAME),
        read(HUGE, BLOCK),
        read(at, BLOCK + PAGE_SIZE),
    ];
    assert_eq!(besides(&[&split[..], &reads].concat()), [""; 0]);
    let flush = |start: u64| {
        seen(
            1,
            EventKind::FlushLocal,
            [1, start, start + PAGE_SIZE, 0, 0],
        )
    };
    let last = HUGE + HUGE_PAGE_SIZE - PAGE_SIZE;
    let flushed = [&split[..], &[flush(last)]].concat();
    assert_eq!(besides(&[&flushed[..], &reads[..1]].concat()), [""; 0]);
    assert_eq!(besides(&[&flushed[..], &reads[1..2]].concat()), ["T-09"]);
    // One of the frames of the 2 MiB page is freed.
    let part = free(FrameKind::Anon, BLOCK + 5 * PAGE_SIZE);
    assert_eq!(besides(&[&split[..], &[part]].concat()), ["T-01"]);
    let both = seen(0, EventKind::FlushLocal, [1, HUGE, at, 0, 0]);
    assert_eq!(besides(&[&flushed[..], &[both, part]].concat()), [""; 0]);
}

#[test]
fn a_gigabyte_page_is_one_translation() {
    let giga = Pte::new(1 << 30, RW | PteFlags::HUGE).0;
    let gva = 1 << 30;
    let change = |old, new| seen(0, EventKind::PteChange, [1, gva, 3, old, new]);
    let read = seen(1, EventKind::Access, [gva + HUGE, gva + HUGE, 0, 0, 0]);
    let gone = [change(0, giga), change(giga, 0)];
    assert_eq!(ids(&[&gone[..], &[read]].concat()), [""; 0]);
    let end = gva + PAGE_SIZE;
    let flush = seen(1, EventKind::FlushLocal, [1, gva, end, 0, 0]);
    assert_eq!(ids(&[&gone[..], &[flush, read]].concat()), ["T-09"]);
}

#[test]
fn what_is_written_into_an_unlinked_table_is_reached_through_a_held_pointer() {
    let link = Pte::new(TABLES[3], TABLE).0;
    let unlink = seen(0, EventKind::PteChange, [1, PAGE, 2, link, 0]);
    let relink = seen(0, EventKind::PteChange, [1, HUGE, 2, 0, link]);
    let write = seen(
        0,
        EventKind::PteChange,
        [1, HUGE, 1, rw(), Pte::new(0x6000, RW).0],
    );
    let read = seen(1, EventKind::Access, [PAGE, 0x6000, 0, 0, 0]);
    let moved = [unlink, relink, write];
    assert_eq!(ids(&[&moved[..], &[read]].concat()), [""; 0]);
    assert_eq!(ids(&[unlink, invlpg(1), relink, write, read]), ["T-09"]);
}

#[test]
fn a_table_that_is_replaced_by_its_neighbour_is_gone() {
    let link = |table| Pte::new(table, TABLE).0;
    let replace = [1, PAGE, 2, link(TABLES[3]), link(TABLES[3] + PAGE_SIZE)];
    let replace = seen(0, EventKind::PteChange, replace);
    let free = free(FrameKind::Table, TABLES[3]);
    assert_eq!(ids(&[pte(rw(), 0), replace, invlpg(0), free]), ["T-03"]);
    let flushed = [pte(rw(), 0), replace, invlpg(0), invlpg(1), free];
    assert_eq!(ids(&flushed), [""; 0]);
}

#[test]
fn an_entry_that_was_never_used_was_never_cached() {
    let unused = Pte::new(FRAME, RW.difference(PteFlags::ACCESSED)).0;
    let anon = free(FrameKind::Anon, FRAME);
    let flushed = [pte(rw(), 0), invlpg(0), invlpg(1)];
    let again = [pte(0, unused), pte(unused, 0), anon];
    assert_eq!(ids(&[&flushed[..], &again].concat()), [""; 0]);
    let used = [pte(0, unused), pte(rw(), 0), anon];
    assert_eq!(ids(&[&flushed[..], &used].concat()), ["T-01"]);
}

/// What two streams come to whose events were stamped in this order: what is reported, and whether anything is undecided.
fn judged(events: &[Seen]) -> (Vec<&'static str>, bool) {
    let mut merge = merge::Merge::new(2, 0, vec![Box::new(model())]);
    let mut next = [0; 2];
    for (stamp, seen) in (0..).zip(events) {
        let sequence = next[seen.vcpu];
        next[seen.vcpu] += 1;
        let event = Event {
            stamp,
            sequence,
            ..seen.event
        };
        merge.push(seen.vcpu, &[event]);
    }
    let judged = merge.judge_all();
    let ids = judged.violations.iter().map(|shown| shown.violation.id);
    (ids.collect(), !judged.undecided.is_empty())
}

#[test]
fn in_a_parallel_run_a_flush_that_is_stamped_late_is_none_that_is_missing() {
    let other = |vcpu| seen(vcpu, EventKind::IpiReceive, [0; 5]);
    let mine = [
        pte(rw(), 0),
        invlpg(0),
        free(FrameKind::Anon, FRAME),
        other(0),
    ];
    let late = judged(&[&mine[..], &[invlpg(1)]].concat());
    assert_eq!(late, (vec![], true));
    // It had not begun when the frame was freed.
    let missing = judged(&[&mine[..], &[other(1), invlpg(1)]].concat());
    assert_eq!(missing, (vec!["T-01"], false));
}

#[test]
fn forks_and_resets_share_nothing() {
    let mut model = model();
    let mut found = Vec::new();
    model.observe(&pte(rw(), 0), &mut found);
    let mut fork = model.fork();
    model.reset();
    model.observe(&free(FrameKind::Slab, FRAME), &mut found);
    assert!(found.is_empty(), "{found:?}");
    fork.observe(&free(FrameKind::Slab, FRAME), &mut found);
    assert_eq!(found[0].id, "T-01");
    found.clear();
    fork.reset();
    fork.observe(&free(FrameKind::Slab, FRAME), &mut found);
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn a_change_that_no_event_explains_is_t_10() {
    assert_eq!(ids(&[pte(Pte::new(0x7000, RW).0, 0)]), ["T-10"]);
    let mut model = model();
    let mut found = Vec::new();
    // Memory in which nothing is mapped at all.
    let empty = crate::memory::GuestRam::new(16 << 20).unwrap();
    model.compare(&empty, 0x1000, &mut found);
    assert_eq!(found[0].id, "T-10");
    assert!(found[0].finding.summary.contains("unexplained PTE change"));
}

#[test]
fn an_mm_that_is_about_to_leave_the_list_explains_itself() {
    let world = World::new();
    let id = world.object::<Mm>(world.child).id.load(Relaxed);
    let mut model = TlbModel::default();
    model.start(&world.memory, ROOT_GPA, 2);
    let mut compared = |count: u32| {
        world.update::<Mm, _>(world.child, |mm| mm.count.store(count, Relaxed));
        let mut found = Vec::new();
        let destroyed = Event {
            kind: EventKind::MmDestroy as u32,
            args: [id, 0, 0, 0, 0],
            ..Event::default()
        };
        let seen = Seen {
            vcpu: 0,
            event: destroyed,
        };
        model.observe(&seen, &mut found);
        model.compare(&world.memory, ROOT_GPA, &mut found);
        found.iter().map(|it| it.id).collect::<Vec<_>>()
    };
    assert_eq!(compared(0), [""; 0]);
    assert_eq!(compared(1), ["T-10"], "somebody counts on it");
}

proptest! {
    #[test]
    fn garbage_neither_panics_nor_hangs(
        events in prop::collection::vec((0usize..5, 0u32..60, any::<[u64; 5]>()), 0..200),
    ) {
        let mut model = model();
        let mut found = Vec::new();
        for (vcpu, kind, args) in events {
            let event = Event { kind, args, ..Event::default() };
            model.observe(&Seen { vcpu, event }, &mut found);
        }
    }
}
