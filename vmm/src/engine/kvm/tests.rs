//! They need /dev/kvm: without it they fail and say so, they do not pass.

use std::sync::Arc;

use abi::point::Point;

use super::{Halt, KvmEngine, Limit};
use crate::engine::PointSet;
use crate::engine::model::tests::{TESTS, driver, litmus};
use crate::engine::{Engine, EngineKind};
use crate::explore::campaign::{self, Plan, Strategy, Worker, failure_id};
use crate::explore::strategy::Random;
use crate::explore::{Driver, Execution, Limits, Source, compare};
use crate::kvm::vcpu::VcpuImage;
use crate::scenario::values;
use crate::snapshot::{SavedMachine, Snapshot, SnapshotError, file};

fn on_vcpus(test: &str, bug: Option<&str>) -> Worker<KvmEngine> {
    let engine = KvmEngine::new(&litmus(test, bug)).expect("this test needs /dev/kvm");
    let driver = Driver::new(engine, Limits::default(), true).unwrap();
    Worker::new(driver, &Plan::replay()).unwrap()
}

#[track_caller]
fn assert_same(one: &Execution, two: &Execution, what: &str) {
    let difference = compare::first_difference(&one.events, &two.events);
    assert_eq!(difference, None, "{what}");
    assert_eq!(one.schedule, two.schedule, "{what}");
    assert_eq!(failure_id(&one.ending), failure_id(&two.ending), "{what}");
}

#[test]
fn both_engines_tell_the_same_story() {
    for test in TESTS {
        let mut model = Worker::new(driver(test, None), &Plan::replay()).unwrap();
        let mut kvm = on_vcpus(test, None);
        let first = model.execute(&mut Random::new(11, 3, 6), false).unwrap();
        assert_eq!(failure_id(&first.ending), None, "{test}");
        let second = kvm.replay(&first.schedule).unwrap();
        assert_same(&first, &second, &format!("{test}: model here, kvm there"));
    }
}

/// What no point separates: the load and the store of a lost increment.
#[test]
fn instructions_of_a_window_are_scheduling_points() {
    let window = values::window("flush-issue:1").unwrap();
    let explore = |bug: Option<&str>, kind, window, executions| {
        let source = Source::new(kind, litmus("apart", bug)).with_window(window);
        let plan = Plan {
            strategy: Strategy::Pct { depth: 3 },
            executions,
            verify_every: 4,
            ..Plan::replay()
        };
        let (counts, stop) = Default::default();
        let summary = campaign::run(|| source.driver(), &plan, &counts, &stop);
        (source, summary)
    };
    let bug = Some("tlb-gen-plain-add");
    let (source, summary) = explore(bug, EngineKind::Kvm, Some(window), 1_000);
    let summary = summary.expect("this test needs /dev/kvm");
    let found = &summary
        .found
        .first()
        .expect("found by instructions")
        .execution;
    let mut worker = Worker::new(source.driver().unwrap(), &Plan::replay()).unwrap();
    for _ in 0..10 {
        assert_same(found, &worker.replay(&found.schedule).unwrap(), "replay");
    }
    // Not by points alone, and not without the bug.
    let (_, summary) = explore(bug, EngineKind::Model, None, 3_000);
    assert!(summary.unwrap().found.is_empty());
    let (_, summary) = explore(None, EngineKind::Kvm, Some(window), 100);
    assert!(summary.unwrap().found.is_empty());
    let (_, summary) = explore(None, EngineKind::Model, Some(window), 1);
    let error = summary.unwrap_err().to_string();
    assert!(error.contains("--engine kvm"), "{error}");
}

/// A flusher passes a CPU by from the instruction on that says it is lazy: its event comes before that.
#[test]
fn a_cpu_that_becomes_lazy_says_so_before_it_is_passed_by() {
    let window = values::window("switch,cr3-load,lock-release:1").unwrap();
    let source = Source::new(EngineKind::Kvm, litmus("wake", None)).with_window(Some(window));
    let plan = Plan {
        strategy: Strategy::Pct { depth: 3 },
        executions: 40,
        verify_every: 10,
        seed: 1,
        ..Plan::replay()
    };
    let (counts, stop) = Default::default();
    let summary = campaign::run(|| source.driver(), &plan, &counts, &stop);
    let summary = summary.expect("this test needs /dev/kvm");
    let found = summary
        .found
        .first()
        .map(|found| failure_id(&found.execution.ending));
    assert_eq!(found, None);
}

/// QEMU's SVM forgets the shadow of `sti` when the host is interrupted in it: an IPI then comes before the `hlt` that it
/// was to end.
#[test]
fn an_interrupt_between_sti_and_hlt_wakes_the_cpu_too() {
    let one = Limit {
        points: 1,
        traps: PointSet::default(),
    };
    let mut kvm = on_vcpus("wake", None);
    let engine = kvm.engine();
    engine.reset().unwrap();
    let mut events = Vec::new();
    // The other thread sleeps, and an IPI is on its way to wake it.
    for (vcpu, until) in [(1, Some(Point::IdleEnter)), (0, None)] {
        loop {
            let halt = engine.run(vcpu, one, &mut events).unwrap();
            let Halt::Point { point, .. } = halt else {
                panic!("{halt:?}");
            };
            if Some(point) == until || until.is_none() && engine.in_flight(1) {
                break;
            }
        }
    }
    loop {
        let rip = engine.vcpu_facts().unwrap()[1].rip;
        let mut instruction = [0];
        let gpa = rip.wrapping_sub(abi::layout::KERNEL_VIRT_OFFSET);
        engine.memory().read(gpa, &mut instruction).unwrap();
        if instruction == [0xf4] {
            break;
        }
        engine.machine.single_step(1, Some(1)).unwrap();
        engine.machine.run_vcpu(1, None).unwrap();
        engine.machine.single_step(1, None).unwrap();
    }
    let there = engine.machine.save().unwrap();
    let mut vcpus = there.vcpus.clone();
    let image = postcard::to_stdvec(&*vcpus[1]).unwrap();
    let mut image: VcpuImage = postcard::from_bytes(&image).unwrap();
    image.drop_shadow();
    vcpus[1] = Arc::new(image);
    let there = Snapshot {
        memory: there.memory.clone(),
        vcpus,
        board: there.board.clone(),
    };
    let mut again = KvmEngine::clone_of(&litmus("wake", None), Arc::new(there)).unwrap();
    again.deliver(1);
    events.clear();
    let woken = Limit {
        points: 100,
        traps: PointSet::of(&[Point::IdleEnter, Point::Switch]),
    };
    let halt = again.run(1, woken, &mut events).unwrap();
    assert!(matches!(halt, Halt::Point { .. }), "{halt:?}");
}

/// All of guest memory, and where each vCPU stands.
fn state(engine: &KvmEngine) -> (Vec<u8>, String) {
    let mut memory = vec![0; engine.memory().bytes() as usize];
    engine.memory().read(0, &mut memory).unwrap();
    (memory, format!("{:?}", engine.vcpu_facts().unwrap()))
}

#[test]
fn a_reset_machine_is_the_saved_one() {
    let mut kvm = on_vcpus("cow", None);
    kvm.engine().reset().unwrap();
    let saved = state(kvm.engine());
    for index in 0..6 {
        kvm.execute(&mut Random::new(3, index, 5), false).unwrap();
        assert_ne!(state(kvm.engine()).0, saved.0, "something ran");
        kvm.engine().reset().unwrap();
        let (memory, facts) = state(kvm.engine());
        let page = memory.chunks(4096).zip(saved.0.chunks(4096));
        let differs = page.clone().position(|(now, then)| now != then);
        assert_eq!(differs, None, "page that differs after reset {index}");
        assert_eq!(facts, saved.1);
    }
    let costs = kvm.engine().costs();
    assert!(
        costs.pages < costs.resets * 1_000,
        "dirty pages only: {costs:?}"
    );
}

#[test]
fn a_machine_that_crashed_is_replaced_by_a_clone() {
    let mut kvm = on_vcpus("unmap", None);
    let first = kvm.execute(&mut Random::new(3, 0, 5), false).unwrap();
    // A kernel without its page tables: the next instruction is a triple fault.
    let engine = kvm.engine();
    engine.reset().unwrap();
    let cr3 = engine.vcpu_facts().unwrap()[0].cr3 & 0x000f_ffff_ffff_f000;
    engine.machine.ram().write(cr3, &[0; 4096]).unwrap();
    let limit = super::Limit {
        points: 1,
        traps: PointSet::default(),
    };
    let halt = engine.run(0, limit, &mut Vec::new()).unwrap();
    assert!(matches!(halt, super::Halt::Crashed(_)), "{halt:?}");
    let again = kvm.replay(&first.schedule).unwrap();
    assert_same(&first, &again, "after a crash");
}

#[test]
fn clones_run_apart_and_alike_and_so_does_one_from_a_file() {
    let source = Source::new(EngineKind::Kvm, litmus("fork", None));
    let mut workers: Vec<_> = (0..3)
        .map(|_| {
            Worker::new(
                source.driver().expect("this test needs /dev/kvm"),
                &Plan::replay(),
            )
            .unwrap()
        })
        .collect();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.snapshot");
    source.save().unwrap().write(&path).unwrap();
    assert!(SavedMachine::is_one(&path));
    let taken = source.save().unwrap().write(&path).unwrap_err();
    assert!(matches!(taken, SnapshotError::Exists { .. }), "{taken}");
    let read = Source::of_saved(SavedMachine::read(&path).unwrap());
    workers.push(Worker::new(read.driver().unwrap(), &Plan::replay()).unwrap());

    let mut model = Worker::new(driver("fork", None), &Plan::replay()).unwrap();
    for index in 0..3 {
        let here = model.execute(&mut Random::new(9, index, 4), false).unwrap();
        for worker in &mut workers {
            assert_same(&here, &worker.replay(&here.schedule).unwrap(), "clone");
        }
    }
}

#[test]
fn what_is_not_a_snapshot_of_this_program_is_refused() {
    let source = Source::new(EngineKind::Kvm, litmus("unmap", None));
    let saved = source.save().expect("this test needs /dev/kvm");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.snapshot");
    saved.write(&path).unwrap();
    let good = std::fs::read(&path).unwrap();
    let refused = |bytes: &[u8]| {
        let path = directory.path().join("b.snapshot");
        std::fs::write(&path, bytes).unwrap();
        SavedMachine::read(&path).unwrap_err().to_string()
    };
    // One flipped bit, anywhere.
    for at in (0..60).chain((60..good.len()).step_by(good.len() / 50)) {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        let error = refused(&bad);
        assert!(error.contains("b.snapshot"), "byte {at}: {error}");
    }
    for length in [0, 7, 8, 51, 52, 53, good.len() / 2, good.len() - 1] {
        refused(&good[..length]);
    }
    let mut longer = good.clone();
    longer.push(0);
    assert!(refused(&longer).contains("where its sizes make"));
    let mut damaged = good.clone();
    *damaged.last_mut().unwrap() ^= 1;
    assert!(refused(&damaged).contains("checksum"));
}

/// Whoever makes the checksum right has no way to make this program panic: a machine like that is refused, by this
/// program or by KVM, or is just another machine.
#[test]
fn a_snapshot_whose_header_lies_is_no_danger() {
    let source = Source::new(EngineKind::Kvm, litmus("unmap", None));
    let saved = source.save().expect("this test needs /dev/kvm");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.snapshot");
    saved.write(&path).unwrap();
    let good = std::fs::read(&path).unwrap();
    let header = file::header(&good);
    let mut rng = crate::explore::Rng::new(1, 0);
    let (mut refused, mut made) = (0, 0);
    // The small parts come after the vCPUs: the board's lists, the console.
    let last = |rng: &mut crate::explore::Rng| header.end - 1 - rng.below(300) as usize;
    let any =
        |rng: &mut crate::explore::Rng| header.start + rng.below(header.len() as u64) as usize;
    for index in 0..60 {
        let mut bad = good.clone();
        let at = if index % 2 == 0 {
            last(&mut rng)
        } else {
            any(&mut rng)
        };
        bad[at] = rng.below(256) as u8;
        file::seal(&mut bad);
        let path = directory.path().join("b.snapshot");
        std::fs::write(&path, bad).unwrap();
        match SavedMachine::read(&path) {
            Err(error) => {
                refused += 1;
                assert!(error.to_string().contains("b.snapshot"), "{error}");
            }
            Ok(saved) => {
                made += 1;
                if let Err(error) = Source::of_saved(saved).driver() {
                    assert!(!error.to_string().is_empty());
                }
            }
        }
    }
    assert!(refused > 0 && made > 0, "{refused} refused, {made} made");
}
