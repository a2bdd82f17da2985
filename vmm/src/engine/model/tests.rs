use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use abi::bug::Bug;
use abi::channel::{EventKind, cr3};

use super::ModelEngine;
use crate::check::stream::Seen;
use crate::explore::campaign::{self, Counts, Plan, Strategy, Worker, failure_id};
use crate::explore::strategy::{Pct, Random, Replay, RoundRobin};
use crate::explore::{Driver, Ending, Execution, Limits, Scheduler, switches};
use crate::report::story;
use crate::scenario::{self, Scenario};

pub(crate) const TESTS: [&str; 31] = [
    "unmap",
    "protect",
    "dontneed",
    "lazy",
    "lazy-tables",
    "switch",
    "cow",
    "fork",
    "remap",
    "apart",
    "wake",
    "peek",
    "pcid",
    "direct",
    "punch",
    "truncate",
    "mremap",
    "mremap-table",
    "migrate",
    "migrate-mremap",
    "free",
    "reclaim",
    "reclaim-protect",
    "kswapd",
    "writeback",
    "reclaim-file",
    "file-io",
    "sleep",
    "vma-protect",
    "vma-tree",
    "vma-recycle",
];

/// vCPUs that a test needs to show all that it can.
fn vcpus(test: &str) -> u32 {
    if test == "cow" { 3 } else { 2 }
}

pub(crate) fn litmus(test: &str, bug: Option<&str>) -> Scenario {
    let vcpus = vcpus(test);
    let bugs = bug.map_or(String::new(), |bug| format!("bugs = [\"{bug}\"]"));
    // More than one where the ranges of flushes matter.
    let pages = 1 + u32::from(test == "protect");
    // Fewer slots than there are mms: a slot is kept now, and given away then.
    let more = match test {
        "pcid" => ", pcid = \"on\", asids = 2",
        "reclaim" | "reclaim-protect" | "reclaim-file" | "kswapd" | "file-io" => {
            ", swap_slots = 16"
        }
        "sleep" => ", lock_spins = 0",
        "groups-touch" | "groups-move" => ", groups = \"on\"",
        _ => "",
    };
    let (program, args) = match test.split_once('-') {
        Some(("huge", test)) => ("huge", format!("test = \"{test}\"")),
        Some(("vma", test)) => ("vma", format!("test = \"{test}\", pages = 1")),
        Some(("groups", test)) => ("groups", format!("test = \"{test}\", pages = 1")),
        _ if test == "writeback" => (test, String::new()),
        _ if test == "file-io" => (test, String::new()),
        _ if test == "sleep" => ("litmus", "test = \"protect\", pages = 2".into()),
        _ if test == "reclaim-file" => ("writeback", "reclaim = 1".into()),
        _ => ("litmus", format!("test = \"{test}\", pages = {pages}")),
    };
    let text = format!(
        "[machine]\nvcpus = {vcpus}\nmemory = \"16M\"\ninterrupts = \"controlled\"\n[program]\nname = \"{program}\"\nargs = {{ {args} }}\n\
         [kernel]\nparams = {{ tlb = \"soft\", stamp = \"ticket\"{more} }}\n{bugs}\n"
    );
    scenario::parse(Path::new("litmus.toml"), &text).unwrap()
}

pub(crate) fn driver(test: &str, bug: Option<&str>) -> Driver<ModelEngine> {
    let engine = ModelEngine::new(&litmus(test, bug)).unwrap();
    Driver::new(engine, Limits::default(), true).unwrap()
}

fn once(driver: &mut Driver<ModelEngine>, scheduler: &mut dyn Scheduler) -> Execution {
    driver.execute(scheduler, &mut []).unwrap().unwrap()
}

/// One that comes to its end.
#[track_caller]
fn finished(driver: &mut Driver<ModelEngine>, scheduler: &mut dyn Scheduler) -> Execution {
    let run = once(driver, scheduler);
    let ending = &run.ending;
    assert!(matches!(ending, Ending::Finished { .. }), "{ending:?}");
    run
}

#[test]
fn every_litmus_test_is_clean_under_every_strategy() {
    for test in TESTS {
        let mut driver = driver(test, None);
        let mut schedulers: Vec<(&str, Box<dyn Scheduler>)> = vec![
            ("rr1", Box::new(RoundRobin::new(1))),
            ("rr7", Box::new(RoundRobin::new(7))),
        ];
        for index in 0..40 {
            schedulers.push(("random", Box::new(Random::new(1, index, 5))));
            schedulers.push(("pct", Box::new(Pct::new(1, index, 3, Some(200)))));
        }
        for (name, mut scheduler) in schedulers {
            let run = once(&mut driver, scheduler.as_mut());
            assert!(
                matches!(run.ending, Ending::Finished { .. }),
                "{test} under {name}: {:?} after {} points",
                run.ending,
                run.schedule.points()
            );
        }
    }
}

#[test]
fn a_replay_is_identical_every_time() {
    let mut driver = driver("unmap", None);
    let first = once(&mut driver, &mut Random::new(7, 0, 4));
    for _ in 0..200 {
        let again = once(&mut driver, &mut Replay::new(first.schedule.clone()));
        assert_eq!(again.schedule, first.schedule);
        assert_eq!(again.events, first.events);
    }
}

/// A clean `peek` shows little if no grace period ever has to wait for its reader.
#[test]
fn grace_periods_wait_for_readers_and_end() {
    let mut driver = driver("peek", None);
    let mut waited = 0;
    for index in 0..200 {
        let run = finished(&mut driver, &mut Pct::new(1, index, 3, Some(400)));
        let first = |kind: EventKind| run.events.iter().position(|s| s.event.kind == kind as u32);
        if let Some(wait) = first(EventKind::RcuGpWait) {
            let mut later = run.events[wait..].iter();
            waited += usize::from(later.any(|s| s.event.kind == EventKind::RcuFree as u32));
        }
    }
    assert!(waited > 0, "no grace period waited and ended");
}

/// A clean `pcid` shows little if its processes do not find their slots as they left them, behind, and taken.
#[test]
fn pcids_are_kept_flushed_and_taken() {
    let mut driver = driver("pcid", None);
    let (mut kept, mut behind, mut taken) = (0, 0, 0);
    for index in 0..200 {
        let run = finished(&mut driver, &mut Pct::new(1, index, 3, Some(400)));
        let loads = run.events.iter().filter_map(|seen| {
            let is_load = seen.event.kind == EventKind::Cr3Load as u32 && seen.vcpu == 1;
            is_load.then_some((seen.event.args[0], seen.event.args[1]))
        });
        let mut owners = BTreeMap::new();
        for (operand, mm) in loads {
            let before = owners.insert(operand & cr3::PCID, mm);
            kept += usize::from(operand & cr3::NO_FLUSH != 0);
            let flushed = operand & cr3::NO_FLUSH == 0;
            behind += usize::from(flushed && before == Some(mm));
            taken += usize::from(flushed && before != Some(mm));
        }
    }
    assert!(
        kept > 0 && behind > 0 && taken > 0,
        "{kept} kept, {behind} behind, {taken} taken"
    );
}

/// Which tests show which seeded bug, by PCT of depth 3: `explore` finds every one within 2,000 schedules.
pub(crate) const SHOWN_BY: [(&str, &str); 37] = [
    ("shootdown-skip-remote", "unmap"),
    ("fork-no-writeprotect-flush", "fork"),
    ("free-before-flush", "unmap"),
    ("munmap-flush-after-unlock", "remap"),
    ("flush-range-short", "protect"),
    ("flush-wrong-level", "protect"),
    ("dontneed-skip-none", "dontneed"),
    ("cr3-before-cpumask", "switch"),
    ("flush-skip-switching", "switch"),
    ("freed-tables-skip-lazy", "lazy-tables"),
    ("lazy-reuse-no-flush", "lazy"),
    ("cow-free-before-flush", "cow"),
    ("mapcount-after-unlock", "unmap"),
    ("switch-clears-lazy-late", "wake"),
    ("tables-free-without-grace-period", "peek"),
    ("pcid-reuse-no-flush", "pcid"),
    ("pcid-skip-stale-gen", "pcid"),
    ("gup-fast-no-recheck", "direct"),
    ("fork-shares-pinned", "direct"),
    ("punch-free-before-flush", "punch"),
    ("mremap-flush-after-unlock", "mremap"),
    ("mremap-table-no-flush", "mremap-table"),
    ("mremap-no-rmap-locks", "migrate-mremap"),
    ("migrate-copy-before-flush", "migrate"),
    ("batched-flush-ignored", "reclaim-protect"),
    ("reclaim-free-before-flush", "reclaim"),
    ("huge-split-no-flush", "huge-split"),
    ("collapse-copy-before-flush", "huge-collapse"),
    ("charge-kept-on-race", "groups-touch"),
    ("uncharge-current-group", "groups-move"),
    ("mkclean-no-flush", "writeback"),
    ("zap-loses-dirty", "writeback"),
    ("reclaim-loses-dirty", "reclaim-file"),
    ("vma-mm-unchecked", "vma-recycle"),
    ("fork-parent-vma-unlocked", "fork"),
    ("vma-flags-unlocked", "vma-protect"),
    ("vma-nodes-without-grace-period", "vma-tree"),
];

/// What no scheduling point separates: only schedules of instructions show it (`engine::kvm::tests`).
const BETWEEN_POINTS: [Bug; 1] = [Bug::TlbGenPlainAdd];

/// Both sides must be preempted inside the other's race: random walks do that, few preemptions seldom.
const WALKS_SHOW: &str = "mremap-no-rmap-locks";

#[test]
fn every_seeded_bug_is_found_within_2000_schedules() {
    for bug in Bug::ALL.iter().filter(|bug| !BETWEEN_POINTS.contains(bug)) {
        let shown = SHOWN_BY.iter().find(|(name, _)| *name == bug.name());
        let (name, test) = shown.expect("a test for every bug");
        let scenario = litmus(test, Some(name));
        let mut plan = plan(2_000, true);
        if *name == WALKS_SHOW {
            plan.strategy = Strategy::Random { mean: 8 };
        }
        let summary = campaign::run(
            || Driver::new(ModelEngine::new(&scenario)?, Limits::default(), true),
            &plan,
            &Counts::default(),
            &Arc::default(),
        )
        .unwrap();
        assert!(!summary.found.is_empty(), "{name} by {test}");
    }
}

/// Not only by the value that the program reads in the end: with the processor's TLB that shows seldom.
#[test]
fn the_tlb_model_tells_what_is_flushed_after_its_address_is_taken_anew() {
    for (bug, test) in [
        ("munmap-flush-after-unlock", "remap"),
        ("mremap-flush-after-unlock", "mremap"),
    ] {
        let scenario = litmus(test, Some(bug));
        let make = || Driver::new(ModelEngine::new(&scenario)?, Limits::default(), true);
        let summary =
            campaign::run(make, &plan(500, false), &Counts::default(), &Arc::default()).unwrap();
        let ids = summary
            .found
            .iter()
            .filter_map(|found| campaign::failure_id(&found.execution.ending));
        assert!(ids.into_iter().any(|id| id == "T-06"), "{bug}");
    }
}

/// The thread reclaims with another one's address space lazily loaded.
#[test]
fn what_is_wrong_in_reclaim_shows_in_the_thread_too() {
    let scenario = litmus("kswapd", Some("reclaim-free-before-flush"));
    let make = || Driver::new(ModelEngine::new(&scenario)?, Limits::default(), true);
    let never = Arc::default();
    let summary = campaign::run(make, &plan(2_000, true), &Counts::default(), &never).unwrap();
    assert!(!summary.found.is_empty());
}

/// A clean `kswapd` shows little if the thread does not reclaim the page, and sleep for the disk meanwhile.
#[test]
fn the_thread_reclaims_the_page_and_sleeps() {
    let mut driver = driver("kswapd", None);
    let (mut out, mut lazily, mut asleep) = (0, 0, 0);
    for index in 0..100 {
        let run = finished(&mut driver, &mut Pct::new(1, index, 3, Some(400)));
        let count = |kind: EventKind| {
            let of =
                move |seen: &&Seen| seen.event.kind == kind as u32 && seen.event.task == KSWAPD;
            run.events.iter().filter(of)
        };
        out += count(EventKind::SwapCache).count();
        lazily += count(EventKind::LazyEnter).count();
        asleep += count(EventKind::Switch).count();
    }
    assert!(
        out >= 100 && lazily >= 50 && asleep >= 100,
        "{out} out, {lazily} lazily, {asleep} asleep"
    );
}

/// Its number: it is made after the first process.
const KSWAPD: u32 = 2;

/// One preemption is enough for every bug that points can show but one (and one that takes too long here); and all schedules with one, of long
/// tests those with none, are clean without the bug.
#[test]
fn exhaustive_search_finds_every_seeded_bug_and_nothing_else() {
    let search = |test: &str, bug: Option<&str>| {
        let scenario = litmus(test, bug);
        // One preemption makes thousands of executions of these: too many for a debug build.
        let long = [
            "cow",
            "direct",
            "fork",
            "kswapd",
            "migrate-mremap",
            "pcid",
            "peek",
            "punch",
            "reclaim",
            "reclaim-file",
            "reclaim-protect",
            "switch",
            "truncate",
            "wake",
            "writeback",
        ];
        let is_long = long.contains(&test);
        let preemptions = match bug {
            Some("switch-clears-lazy-late") => 2,
            Some(_) => 1,
            None => u32::from(!is_long),
        };
        let plan = Plan {
            strategy: Strategy::Exhaustive {
                preemptions: Some(preemptions),
            },
            executions: u64::MAX,
            ..plan(0, true)
        };
        let make = || Driver::new(ModelEngine::new(&scenario)?, Limits::default(), true);
        campaign::run(make, &plan, &Counts::default(), &Arc::default()).unwrap()
    };
    // Hundreds of points all come before those to be preempted at, or it takes two preemptions: minutes in a debug build.
    let late = [
        "gup-fast-no-recheck",
        WALKS_SHOW,
        "zap-loses-dirty",
        "reclaim-loses-dirty",
    ];
    let soon = |bug: &str| !late.contains(&bug);
    for (bug, test) in SHOWN_BY.into_iter().filter(|(bug, _)| soon(bug)) {
        assert!(!search(test, Some(bug)).found.is_empty(), "{bug} by {test}");
    }
    // Two threads that wait for the same disk are ordered in too many ways even where nobody is preempted: no end within minutes.
    for test in TESTS.into_iter().filter(|&test| test != "file-io") {
        let summary = search(test, None);
        let found = summary
            .found
            .first()
            .map(|f| story::ending(&f.execution.ending));
        assert_eq!(found, None, "{test}");
        let explored = summary.explored.unwrap();
        assert!(
            explored.is_complete() && explored.executions() > 1,
            "{test}: {explored:?}"
        );
    }
}

#[test]
fn the_correct_kernel_survives_the_same_schedules() {
    for test in TESTS {
        let scenario = litmus(test, None);
        let summary = campaign::run(
            || Driver::new(ModelEngine::new(&scenario)?, Limits::default(), true),
            &plan(2_000, false),
            &Counts::default(),
            &Arc::default(),
        )
        .unwrap();
        assert_eq!(summary.executions, 2_000);
        let found: Vec<_> = summary
            .found
            .iter()
            .map(|f| story::ending(&f.execution.ending))
            .collect();
        assert_eq!(found, [] as [&str; 0], "{test}");
        assert!(summary.verified > 0 && summary.states > 0);
    }
}

/// Charges that meet, and a move of the process among them: no counter is off, in any schedule.
#[test]
fn races_in_memory_groups_are_clean() {
    for test in ["groups-touch", "groups-move"] {
        let scenario = litmus(test, None);
        let summary = campaign::run(
            || Driver::new(ModelEngine::new(&scenario)?, Limits::default(), true),
            &Plan {
                state_every: 1,
                ..plan(500, false)
            },
            &Counts::default(),
            &Arc::default(),
        )
        .unwrap();
        let found: Vec<_> = summary
            .found
            .iter()
            .map(|f| story::ending(&f.execution.ending))
            .collect();
        assert_eq!(found, [] as [&str; 0], "{test}");
        assert_eq!(summary.executions, 500);
    }
}

#[test]
fn a_story_tells_who_was_charged() {
    let driver = driver("groups-touch", Some("charge-kept-on-race"));
    let mut worker = Worker::new(driver, &plan(1, true)).unwrap();
    let mut tries = (0..200).map(|i| worker.execute(&mut Random::new(5, i, 4), true).unwrap());
    let failing = tries.find(|run| failure_id(&run.ending).is_some());
    let story = story::tell(&failing.expect("the bug shows soon"), 2);
    assert!(story.contains("G-20"), "{story}");
    assert!(story.contains("to memory group 2"), "{story}");
}

#[test]
fn a_small_schedule_still_fails_and_tells_its_story() {
    let driver = driver("unmap", Some("shootdown-skip-remote"));
    let mut worker = Worker::new(driver, &plan(1, true)).unwrap();
    let mut tries = (0..50).map(|i| worker.execute(&mut Random::new(5, i, 4), true).unwrap());
    let failing = tries.find(|run| failure_id(&run.ending).is_some());
    let failing = failing.expect("the bug shows soon");
    let id = failure_id(&failing.ending);
    let small = worker.minimise(&failing, 500, || true).unwrap();
    assert_eq!(failure_id(&small.ending), id);
    assert!(switches(&small.schedule) <= switches(&failing.schedule));
    let story = story::tell(&small, 2);
    assert!(story.contains("munmap") && story.contains("✘"), "{story}");
}

fn plan(executions: u64, first: bool) -> Plan {
    Plan {
        strategy: Strategy::Pct { depth: 3 },
        executions,
        seed: 1,
        time_limit: None,
        state_every: 50,
        verify_every: 50,
        jobs: 2,
        first,
        ..Plan::replay()
    }
}
