//! Counts that no lock guards, recorded in another order than they changed, and what is recorded late.

use super::*;

/// Judges the streams of two vCPUs, by the monitor of folios alone.
fn folios(streams: [&[Event]; 2]) -> Merge {
    let mut monitors: Vec<Box<dyn Monitor>> =
        vec![Box::new(crate::check::stream::folio::Folios::default())];
    monitors[0].start(&newborn(), 0, 2);
    let mut merge = Merge::new(2, 0, monitors);
    merge.push(0, streams[0]);
    merge.push(1, streams[1]);
    merge.judge_all();
    merge
}

fn refcount(count: u64) -> [u64; 5] {
    [frame(1), count, 0, 0, 0]
}

fn alloc() -> Event {
    let anon = FrameKind::Anon as u64;
    event(0, 0, K::FrameAlloc, [frame(1), 0, anon, 0, 0])
}

/// Two references were taken at about the same time and recorded the other way round; long after it, the
/// count that the tickets tell is too low for what is mapped.
#[test]
fn what_was_recorded_the_wrong_way_round_long_ago_is_no_violation_now() {
    const FAR: u64 = 3000;
    let far = (0..FAR).map(|at| event(4 + at, at + 3, K::Switch, [0; 5]));
    let mut first = vec![
        alloc(),
        event(1, 1, K::MapcountChange, [frame(1), 1, 0, 0, 0]),
        event(3, 2, K::RefcountChange, refcount(2)),
    ];
    first.extend(far);
    let mapped = [frame(1), 3, 0, 0, 0];
    first.push(event(4 + FAR, 3 + FAR, K::MapcountChange, mapped));
    let judged = |second: &[Event]| folios([&first, second]).judged;
    let inverted = judged(&[event(2, 0, K::RefcountChange, refcount(3))]);
    assert_eq!(ids(&inverted), [""; 0]);
    assert_eq!(inverted.undecided["F-03"], 1);
    // The other vCPU's reference is the second in every order: nothing explains the third mapping.
    let missing = judged(&[event(2, 0, K::RefcountChange, refcount(2))]);
    assert_eq!(ids(&missing), ["F-03"]);
}

/// One took the count of an mm from 2 to 1 and another from 1 to 0, and frees it; the tickets say it the other way round.
#[test]
fn a_count_whose_changes_were_stamped_the_wrong_way_round_long_ago_is_no_violation() {
    const FAR: u64 = 1000;
    let count = |stamp, sequence, count| event(stamp, sequence, K::MmCount, [1, count, 0, 0, 0]);
    let quiet = (0..FAR).map(|at| event(3 + at, 1 + at, K::IpiReceive, [0; 5]));
    let free = event(3 + FAR, 1 + FAR, K::MmFree, [1, 0, 0, 0, 0]);
    let first: Vec<Event> = [count(1, 0, 0)]
        .into_iter()
        .chain(quiet)
        .chain([free])
        .collect();
    let judged = |second: &[Event]| {
        let mut merge = Merge::from_boot(2, &newborn(), None);
        merge.push(0, &first);
        merge.push(1, second);
        merge.judge_all();
        merge.judged
    };
    let inverted = judged(&[count(0, 0, 2), count(2, 1, 1)]);
    assert_eq!(ids(&inverted), [""; 0]);
    assert!(inverted.undecided["O-04"] > 0);
    // It was 1 before, for certain: it is left at 0 once, and rises from there.
    let risen = judged(&[event(0, 0, K::Switch, [0; 5]), count(2, 1, 1)]);
    assert_eq!(ids(&risen), [""; 0], "it may have been 1 first");
    let mut late = first.clone();
    late.truncate(1);
    let mut merge = Merge::from_boot(2, &newborn(), None);
    merge.push(0, &late);
    merge.push(
        1,
        &[
            event(0, 0, K::Switch, [0; 5]),
            event(2, 1, K::Switch, [0; 5]),
            count(3, 2, 1),
        ],
    );
    assert_eq!(ids(merge.judge_all()), ["O-04"]);
}

/// The same, and so much has happened to the frame since that no order is tried which puts them right.
#[test]
fn counts_whose_order_is_in_doubt_beyond_all_that_is_tried_are_undecided() {
    for (more, born) in [(3, false), (200, false), (200, true)] {
        let mapcount = |stamp, count| {
            let args = [frame(1), count, 0, 0, 0];
            event(stamp, stamp - 1, K::MapcountChange, args)
        };
        let mut first = vec![
            alloc(),
            event(1, 1, K::MapcountChange, [frame(1), 1, 0, 0, 0]),
            event(3, 2, K::RefcountChange, refcount(2)),
        ];
        first.extend((0..more).map(|at| mapcount(4 + at, 1)));
        if born {
            // Another life, in which nothing is in doubt.
            first[100] = Event {
                stamp: 101,
                sequence: 100,
                ..alloc()
            };
        }
        first.push(mapcount(4 + more, 3));
        let inverted = [event(2, 0, K::RefcountChange, refcount(3))];
        let judged = folios([&first, &inverted]).judged;
        assert_eq!((judged.unjudged, &judged.broken), (0, &None));
        let expected: &[&str] = if born { &["F-03"] } else { &[] };
        assert_eq!(ids(&judged), expected, "{more}");
        assert_eq!(judged.given_up.is_empty(), born || more == 3, "{judged:?}");
    }
}

/// A vCPU gives a reference up, and the host takes its CPU away before it records this; the other one frees the frame and
/// tells much of it. The search goes back step by step.
#[test]
fn what_was_recorded_very_late_is_put_where_it_belongs() {
    let anon = FrameKind::Anon as u64;
    for more in [3, 200] {
        let mut first = vec![
            alloc(),
            event(1, 1, K::RefcountChange, refcount(2)),
            event(3, 2, K::RefcountChange, refcount(0)),
            event(4, 3, K::FrameFree, [frame(1), 0, anon, 0, 0]),
        ];
        let concerned = (0..more).map(|at| event(5 + at, 4 + at, K::MapcountChange, refcount(0)));
        first.extend(concerned);
        let late = [
            event(2, 0, K::Switch, [0; 5]),
            event(5 + more, 1, K::RefcountChange, refcount(1)),
        ];
        let judged = folios([&first, &late]).judged;
        assert_eq!((judged.unjudged, &judged.broken), (0, &None));
        assert_eq!(ids(&judged), [""; 0], "{more}");
        assert_eq!(judged.undecided["F-02"], 1, "{more}");
    }
}

/// The same, but what explains it is recorded after it was judged.
#[test]
fn a_report_is_taken_back_when_a_vcpu_records_late_what_may_explain_it() {
    let anon = FrameKind::Anon as u64;
    let mut merge = folios([
        &[
            alloc(),
            event(1, 1, K::MapcountChange, [frame(1), 1, 0, 0, 0]),
            event(3, 2, K::FrameFree, [frame(1), 0, anon, 0, 0]),
            event(4, 3, K::Switch, [0; 5]),
        ],
        &[event(2, 0, K::Switch, [0; 5])],
    ]);
    assert_eq!(ids(&merge.judged), ["F-02"]);
    let mut other = event(5, 1, K::MapcountChange, [frame(2), 0, 0, 0, 0]);
    merge.push(1, &[other]);
    assert_eq!(
        ids(merge.judge_all()),
        ["F-02"],
        "it is about another frame"
    );
    other = event(6, 2, K::MapcountChange, [frame(1), 0, 0, 0, 0]);
    merge.push(1, &[other]);
    assert_eq!(
        ids(merge.judge_all()),
        ["F-02"],
        "it came later for certain"
    );

    let mut merge = folios([
        &[
            alloc(),
            event(1, 1, K::MapcountChange, [frame(1), 1, 0, 0, 0]),
            event(3, 2, K::FrameFree, [frame(1), 0, anon, 0, 0]),
            event(4, 3, K::Switch, [0; 5]),
        ],
        &[event(2, 0, K::Switch, [0; 5])],
    ]);
    merge.push(1, &[event(5, 1, K::MapcountChange, [frame(1), 0, 0, 0, 0])]);
    let judged = merge.judge_all();
    assert_eq!(ids(judged), [""; 0]);
    assert_eq!(
        (judged.undecided["F-02"], &judged.given_up[..]),
        (1, &[("F-02", 3)][..])
    );
}

/// Memory has the count that one order of two changes leaves, the tickets tell the other.
#[test]
fn an_end_that_some_order_explains_is_no_violation() {
    use crate::check::world::{DATA, ROOT_GPA, World};
    let world = World::new();
    let number = world.mapped_frame(world.parent, DATA);
    let has = world.folio(number, |folio| u64::from(*folio.refcount.get_mut()));
    let gpa = number << abi::layout::PAGE_SHIFT;
    let count =
        |stamp, sequence, count| event(stamp, sequence, K::RefcountChange, [gpa, count, 0, 0, 0]);
    let judged = |streams: [&[Event]; 2]| {
        let mut monitors: Vec<Box<dyn Monitor>> =
            vec![Box::new(crate::check::stream::folio::Folios::default())];
        monitors[0].start(&world.memory, ROOT_GPA, 2);
        let mut merge = Merge::new(2, 0, monitors);
        merge.push(0, streams[0]);
        merge.push(1, streams[1]);
        merge.compare(&world.memory, ROOT_GPA);
        merge.judged
    };
    let inverted = judged([&[count(0, 0, has)], &[count(1, 0, has + 1)]]);
    assert_eq!(ids(&inverted), [""; 0]);
    assert_eq!(inverted.undecided["F-04"], 1);
    let told = judged([&[count(0, 0, has + 1), count(1, 1, has + 1)], &[]]);
    assert_eq!(ids(&told), ["F-04"]);
    assert!(told.violations[0].ticket.is_none());
}
