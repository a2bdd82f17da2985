use abi::channel::{Event, EventKind, access};
use abi::objects::FrameKind;
use abi::pte::{Pte, PteFlags};
use abi::syscall::nr;
use proptest::prelude::*;

use super::state::{Change, State, Vcpu};
use super::*;

const RW: PteFlags = PteFlags::PRESENT
    .union(PteFlags::USER)
    .union(PteFlags::WRITE)
    .union(PteFlags::ACCESSED);
const PAGE: u64 = 0x20_0000;
const FRAME: u64 = 0x5000;

/// Two vCPUs that have mm 1 loaded, which maps [`PAGE`] to [`FRAME`], writable.
fn model() -> TlbModel {
    let vcpu = Vcpu {
        mm: 1,
        root: 0x1000,
        ..Vcpu::default()
    };
    let mut state = State {
        vcpus: vec![vcpu.clone(), vcpu],
        ..State::default()
    };
    state.masks.insert(1, 0b11);
    state.place((1, 2, PAGE), Pte::new(0x3000, RW));
    state.place((1, 1, PAGE), Pte::new(FRAME, RW));
    TlbModel {
        now: state.clone(),
        start: state,
        ..TlbModel::default()
    }
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
    let mut model = model();
    let mut found = Vec::new();
    for event in events {
        model.observe(event, &mut found);
    }
    found.iter().map(|violation| violation.id).collect()
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
fn flush(vcpu: usize) -> Seen {
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
    assert_eq!(ids(&[pte(rw(), 0), flush(0), anon()]), ["T-01"]);
    assert_eq!(ids(&[pte(rw(), 0), flush(0), flush(1), anon()]), [""; 0]);
    let everything = seen(1, EventKind::FlushAll, [1, 0, 0, 0, 0]);
    assert_eq!(ids(&[pte(rw(), 0), flush(0), everything, anon()]), [""; 0]);
}

#[test]
fn a_flush_of_another_page_is_none() {
    let other = seen(
        1,
        EventKind::FlushLocal,
        [1, PAGE + PAGE_SIZE, PAGE + 2 * PAGE_SIZE, 0, 0],
    );
    assert_eq!(
        ids(&[pte(rw(), 0), flush(0), other, free(FrameKind::Anon, FRAME)]),
        ["T-01"]
    );
}

#[test]
fn a_lazy_vcpu_may_hold_a_freed_frame_until_it_leaves_lazy_mode() {
    let enter = seen(1, EventKind::LazyEnter, [1, 0, 0, 0, 0]);
    let leave = seen(1, EventKind::LazyLeave, [1, 2, 0, 0, 0]);
    let freed = [enter, pte(rw(), 0), flush(0), free(FrameKind::Anon, FRAME)];
    assert_eq!(ids(&freed), [""; 0]);
    assert_eq!(ids(&[&freed[..], &[leave]].concat()), ["T-07"]);
    assert_eq!(ids(&[&freed[..], &[flush(1), leave]].concat()), [""; 0]);
}

#[test]
fn a_frame_freed_while_mapped_is_t_02() {
    assert_eq!(ids(&[free(FrameKind::Anon, FRAME)]), ["T-02"]);
}

#[test]
fn a_table_freed_while_a_lazy_vcpu_may_walk_it_is_t_03() {
    let link = Pte::new(0x3000, RW).0;
    let unlink = seen(0, EventKind::PteChange, [1, PAGE, 2, link, 0]);
    let enter = seen(1, EventKind::LazyEnter, [1, 0, 0, 0, 0]);
    let table = || free(FrameKind::Table, 0x3000);
    let begun = [enter, pte(rw(), 0), flush(0), unlink];
    assert_eq!(ids(&[&begun[..], &[flush(0), table()]].concat()), ["T-03"]);
    // INVLPG of any page drops every pointer to a table.
    assert_eq!(
        ids(&[&begun[..], &[flush(0), flush(1), table()]].concat()),
        [""; 0]
    );
    assert_eq!(
        ids(&[free(FrameKind::Table, 0x1000)]),
        ["T-03"],
        "the table in CR3"
    );
}

#[test]
fn a_call_that_returns_too_early_is_t_04() {
    let enter = || call(EventKind::SyscallEnter, nr::MPROTECT);
    let exit = || call(EventKind::SyscallExit, nr::MPROTECT);
    assert_eq!(ids(&[enter(), pte(rw(), ro()), flush(0), exit()]), ["T-04"]);
    let flushed = [enter(), pte(rw(), ro()), flush(0), flush(1), exit()];
    assert_eq!(ids(&flushed), [""; 0]);
}

#[test]
fn what_another_call_took_away_meanwhile_is_not_this_calls_to_flush() {
    let other = seen(1, EventKind::PteChange, [1, PAGE, 1, rw(), 0]);
    let enter = call(EventKind::SyscallEnter, nr::MADVISE);
    let exit = call(EventKind::SyscallExit, nr::MADVISE);
    assert_eq!(ids(&[enter, other, exit]), [""; 0]);
}

#[test]
fn a_fault_that_replaces_a_page_too_early_is_t_05() {
    let new = Pte::new(0x6000, RW).0;
    let enter = seen(0, EventKind::FaultEnter, [PAGE, 7, 0, 0, 0]);
    let exit = seen(0, EventKind::FaultExit, [PAGE, 0, 0, 0, 0]);
    assert_eq!(ids(&[enter, pte(rw(), new), exit]), ["T-05"]);
    assert_eq!(ids(&[enter, pte(rw(), new), flush(1), exit]), [""; 0]);
}

#[test]
fn a_mapping_over_what_may_still_be_cached_is_t_06() {
    let attach = seen(
        0,
        EventKind::VmaAttach,
        [1, 0x9000, PAGE, PAGE + PAGE_SIZE, 3],
    );
    assert_eq!(ids(&[pte(rw(), 0), flush(0), attach]), ["T-06"]);
    assert_eq!(ids(&[pte(rw(), 0), flush(0), flush(1), attach]), [""; 0]);
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
        ids(&[pte(rw(), ro()), flush(1), read(FRAME, stale)]),
        ["T-09"]
    );
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

/// A tiny MMU that does everything the architecture permits: what it may hold is the set of all that was
/// ever there to be cached since the last invalidation that covers it.
mod reference {
    use std::collections::BTreeSet;

    /// One step of a history, on few pages and frames.
    #[derive(Clone, Copy, Debug)]
    pub(super) enum Step {
        /// The entry of a page becomes this: frame and W, or none.
        Write(u64, Option<(u64, bool)>),
        Flush(usize, u64),
        FlushAll(usize),
    }

    /// For each vCPU every (page, frame, W) that some execution of the MMU may hold.
    pub(super) fn may_hold(vcpus: usize, steps: &[Step]) -> Vec<BTreeSet<(u64, u64, bool)>> {
        let mut table: [Option<(u64, bool)>; 4] = [None; 4];
        let mut held: Vec<BTreeSet<(u64, u64, bool)>> = vec![BTreeSet::new(); vcpus];
        // Speculation fills whatever is present, at every moment, on every vCPU.
        let fill = |table: &[Option<(u64, bool)>; 4],
                    held: &mut Vec<BTreeSet<(u64, u64, bool)>>| {
            for set in held {
                for (page, entry) in table.iter().enumerate() {
                    if let Some((frame, write)) = entry {
                        set.insert((page as u64, *frame, *write));
                    }
                }
            }
        };
        for step in steps {
            match *step {
                Step::Write(page, entry) => table[page as usize] = entry,
                Step::Flush(vcpu, page) => held[vcpu].retain(|(p, ..)| *p != page),
                Step::FlushAll(vcpu) => held[vcpu].clear(),
            }
            fill(&table, &mut held);
        }
        held
    }
}

fn step() -> impl Strategy<Value = reference::Step> {
    use reference::Step;
    prop_oneof![
        3 => (0u64..4, prop::option::of((0u64..4, any::<bool>()))).prop_map(|(p, e)| Step::Write(p, e)),
        2 => (0usize..3, 0u64..4).prop_map(|(v, p)| Step::Flush(v, p)),
        1 => (0usize..3).prop_map(Step::FlushAll),
    ]
}

proptest! {
    /// The model says that a vCPU may translate a page to a frame, or write there, exactly where some
    /// legal TLB content does.
    #[test]
    fn the_model_is_exact(steps in prop::collection::vec(step(), 0..40)) {
        use reference::Step;
        let address = |page: u64| PAGE + page * PAGE_SIZE;
        let frame = |frame: u64| 0x10_0000 + frame * PAGE_SIZE;
        let entry_of = |entry: Option<(u64, bool)>| match entry {
            None => Pte::NONE,
            Some((number, true)) => Pte::new(frame(number), RW),
            Some((number, false)) => Pte::new(frame(number), RW.difference(PteFlags::WRITE)),
        };
        let mut state = State {
            vcpus: vec![Vcpu { mm: 1, ..Vcpu::default() }; 3],
            ..State::default()
        };
        let mut now = [None; 4];
        for (at, step) in steps.iter().enumerate() {
            let change = Change { vcpu: 0, task: 1, at: at as u64 };
            match *step {
                Step::Write(page, entry) => {
                    let old = entry_of(now[page as usize]);
                    now[page as usize] = entry;
                    let place = (1, 1, address(page));
                    prop_assert!(state.change(place, old, entry_of(entry), change).is_ok());
                }
                Step::Flush(vcpu, page) => {
                    state.flush_range(vcpu, address(page), address(page) + PAGE_SIZE);
                }
                Step::FlushAll(vcpu) => state.flush_all(vcpu),
            }
        }
        let held = reference::may_hold(3, &steps);
        for (vcpu, held) in held.iter().enumerate() {
            for page in 0..4 {
                for number in 0..4 {
                    let may = |write| held.contains(&(page, number, write));
                    let expected = match (may(false), may(true)) {
                        (_, true) => Some(true),
                        (true, false) => Some(false),
                        (false, false) => None,
                    };
                    let says = state.may_translate(vcpu, address(page), frame(number));
                    prop_assert_eq!(says, expected, "vCPU {} page {} frame {}", vcpu, page, number);
                }
            }
        }
    }
}
