use abi::channel::Event;
use proptest::prelude::*;

use super::*;
use crate::engine::model::tests::{TESTS, driver};
use crate::explore::campaign::{Plan, Worker, failure_id};
use crate::explore::strategy::{Pct, Random};
use crate::explore::{Schedule, Scheduler};

/// What a valid trace has of each kind of record.
#[derive(Debug, Default)]
struct Counts {
    slices: usize,
    flows: usize,
    instants: usize,
    failures: usize,
}

/// Checks the trace as its readers do: slices nest, times rise on each track, arrows are whole and begin
/// and end in a slice.
fn check(timeline: &Value) -> Counts {
    let text = serde_json::to_string(timeline).unwrap();
    let parsed: Value = serde_json::from_str(&text).unwrap();
    let mut counts = Counts::default();
    let mut open: HashMap<u64, usize> = HashMap::new();
    let mut last: HashMap<u64, u64> = HashMap::new();
    let mut flows: HashMap<u64, String> = HashMap::new();
    for record in parsed["traceEvents"].as_array().unwrap() {
        let number = |field: &str| record[field].as_u64().unwrap();
        let (ph, tid, ts) = (record["ph"].as_str().unwrap(), number("tid"), number("ts"));
        assert!(record["name"].is_string() && record["pid"] == 1);
        if ph == "M" {
            continue;
        }
        let before = last.insert(tid, ts).unwrap_or(0);
        assert!(before <= ts, "track {tid} goes back from {before} to {ts}");
        let depth = open.entry(tid).or_default();
        match ph {
            "B" => {
                *depth += 1;
                counts.slices += 1;
            }
            "E" => *depth = depth.checked_sub(1).expect("an end without a beginning"),
            "i" => {
                counts.instants += 1;
                counts.failures += usize::from(record["s"] == "g");
            }
            "s" | "t" | "f" => {
                assert!(*depth > 0, "an arrow in no slice: {record}");
                flows.entry(number("id")).or_default().push_str(ph);
            }
            other => panic!("{other}"),
        }
    }
    assert!(
        open.values().all(|depth| *depth == 0),
        "slices without an end"
    );
    for (id, steps) in &flows {
        assert!(steps == "sf" || steps == "stf", "arrow {id}: {steps}");
    }
    counts.flows = flows.len();
    counts
}

#[test]
fn every_litmus_test_has_a_valid_timeline() {
    for test in TESTS {
        let mut worker = Worker::new(driver(test, None), &Plan::replay()).unwrap();
        let (mut arrows, mut locks) = (0, 0);
        for index in 0..20 {
            // In a walk, who does little is over before the other comes to what concerns both.
            let mut walk = Random::new(2, index, 5);
            let mut few = Pct::new(2, index, 3, Some(400));
            let scheduler: &mut dyn Scheduler = match index % 2 {
                0 => &mut walk,
                _ => &mut few,
            };
            let run = worker.execute(scheduler, true).unwrap();
            let drawn = timeline(&run, 3, &[("scenario", test.into())]);
            let counts = check(&drawn);
            assert!(
                counts.slices > 10 && counts.instants > 3,
                "{test}: {counts:?}"
            );
            assert_eq!(counts.failures, 0);
            assert_eq!(drawn["otherData"]["scenario"], test);
            arrows += counts.flows;
            let records = drawn["traceEvents"].as_array().unwrap();
            locks += records.iter().filter(|it| it["cat"] == "lock").count();
            // The axis is the ticket.
            let first = records.iter().find(|it| it["ph"] != "M").unwrap();
            assert_eq!(first["ts"], run.events[0].event.stamp);
        }
        assert!(
            arrows > 0 && locks > 0,
            "{test}: {arrows} arrows, {locks} locks"
        );
    }
}

#[test]
fn a_failure_is_drawn_across_all_tracks() {
    let driver = driver("unmap", Some("shootdown-skip-remote"));
    let mut worker = Worker::new(driver, &Plan::replay()).unwrap();
    let mut runs = (0..50).map(|i| worker.execute(&mut Pct::new(1, i, 3, None), true).unwrap());
    let run = runs.find(|run| failure_id(&run.ending).is_some()).unwrap();
    let drawn = timeline(&run, 2, &[]);
    assert_eq!(check(&drawn).failures, 1);
    let last = drawn["traceEvents"].as_array().unwrap().last().unwrap();
    assert!(last["name"].as_str().unwrap().starts_with("T-0"), "{last}");
}

fn execution(events: Vec<Seen>) -> Execution {
    Execution {
        schedule: Schedule::default(),
        fails: Vec::new(),
        ending: Ending::ScheduleOver,
        events,
    }
}

fn seen(vcpu: usize, stamp: u64, kind: EventKind, args: [u64; 2]) -> Seen {
    Seen {
        vcpu,
        event: Event {
            stamp,
            kind: kind as u32,
            task: vcpu as u32 + 1,
            args: [args[0], args[1], 0, 0, 0],
            ..Event::default()
        },
    }
}

#[test]
fn an_ipi_is_an_arrow_from_its_sender_to_its_acknowledgement() {
    use EventKind::{IpiAck, IpiReceive, IpiSend, SyscallEnter};
    let events = vec![
        seen(0, 5, SyscallEnter, [11, 0]),
        seen(0, 6, IpiSend, [0xf0, 0b110]),
        seen(1, 7, IpiReceive, [0xf0, 0]),
        seen(1, 9, IpiAck, [0, 0]),
        seen(1, 10, SyscallEnter, [24, 0]),
    ];
    let drawn = timeline(&execution(events), 3, &[]);
    // The one to vCPU 2 has not arrived: it is no arrow.
    assert_eq!(check(&drawn).flows, 1);
    let records = drawn["traceEvents"].as_array().unwrap();
    let steps = records
        .iter()
        .filter(|it| it["cat"] == "ipi" && it["id"] == 1);
    let steps: Vec<_> = steps
        .map(|it| {
            (
                it["ph"].as_str().unwrap(),
                it["tid"].as_u64().unwrap(),
                it["ts"].as_u64().unwrap(),
            )
        })
        .collect();
    assert_eq!(steps, [("s", 0, 6), ("t", 2, 7), ("f", 2, 9)]);
}

#[test]
fn locks_that_do_not_nest_are_drawn_anew() {
    use EventKind::{LockAcquire, LockRelease, LockWait};
    let events = vec![
        seen(0, 1, LockAcquire, [0x10, 2]),
        seen(0, 2, LockWait, [0x20, 4]),
        seen(0, 3, LockWait, [0x20, 4]),
        seen(0, 4, LockAcquire, [0x20, 4]),
        seen(0, 5, LockRelease, [0x10, 2]),
        seen(0, 6, LockRelease, [0x20, 4]),
        seen(0, 7, LockRelease, [0x30, 4]),
    ];
    let drawn = timeline(&execution(events), 1, &[]);
    check(&drawn);
    let records = drawn["traceEvents"].as_array().unwrap();
    let begun = records
        .iter()
        .filter(|it| it["ph"] == "B" && it["tid"] == 1);
    let begun: Vec<&str> = begun.map(|it| it["name"].as_str().unwrap()).collect();
    let table = "page-table lock";
    assert_eq!(
        begun,
        [
            "mmap_lock (write)",
            "waits for page-table lock",
            table,
            table
        ]
    );
}

proptest! {
    #[test]
    fn whatever_a_guest_records_the_timeline_is_valid(
        events in prop::collection::vec(
            (0usize..4, 0u32..5, 0u32..60, prop::array::uniform5(prop_oneof![0u64..4, any::<u64>()]), any::<u64>()),
            0..80,
        ),
        rising in any::<bool>(),
    ) {
        let make = |(index, (vcpu, task, kind, args, stamp)): (usize, (usize, u32, u32, [u64; 5], u64))| Seen {
            vcpu,
            event: Event {
                stamp: if rising { index as u64 * 3 } else { stamp },
                kind,
                task,
                args,
                ..Event::default()
            },
        };
        check(&timeline(&execution(events.into_iter().enumerate().map(make).collect()), 2, &[]));
    }
}
