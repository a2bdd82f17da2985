//! What happened before the start.

use super::*;
use crate::engine::Engine;
use crate::engine::kvm::KvmEngine;
use crate::engine::model::tests::{driver, litmus};
use crate::explore::{Driver, Limits};

#[test]
fn what_happened_before_the_start_is_known_or_not_judged() {
    let stale = |how| seen(1, EventKind::Access, [PAGE, 0x7000, 0, how, 0]);
    let mut unknown = model().start.state.clone();
    unknown.vcpus.iter_mut().for_each(vcpu::Vcpu::forget_past);
    let ids = |events: &[Seen]| {
        let mut model = started(unknown.clone());
        let mut found = Vec::new();
        for event in events {
            model.observe(event, &mut found);
        }
        found.iter().map(|it| it.id).collect::<Vec<_>>()
    };
    let read = stale(access::HIT | access::STALE);
    assert_eq!(ids(&[read]), [""; 0], "nobody knows");
    let other = seen(1, EventKind::FlushLocal, [1, 0, PAGE, 0, 0]);
    assert_eq!(ids(&[other, read]), [""; 0]);
    assert_eq!(ids(&[invlpg(1), read]), ["T-09"]);
    let load = seen(1, EventKind::Cr3Load, [TABLES[0], 1, 0, 0, 0]);
    assert_eq!(ids(&[load, read]), ["T-09"]);
    let keep = seen(
        1,
        EventKind::Cr3Load,
        [TABLES[0] | 5 | cr3::NO_FLUSH, 1, 0, 0, 0],
    );
    assert_eq!(ids(&[load, keep, read]), [""; 0], "another PCID");
    let all = seen(1, EventKind::FlushAll, [1, flush::ALL, 0, 0, 0]);
    assert_eq!(ids(&[all, keep, read]), ["T-09"]);
}

/// Events since boot that make what [`memory_of`] shows.
fn history() -> Vec<Seen> {
    let link = |level: u64, table| seen(0, EventKind::PteChange, [1, PAGE, level, 0, table]);
    let mut events = vec![
        seen(0, EventKind::MmCreate, [1, TABLES[0], 0, 0, 0]),
        seen(0, EventKind::CpumaskSet, [1, 0, 0, 0, 0]),
        seen(0, EventKind::Cr3Load, [TABLES[0], 1, 0, 0, 0]),
        link(4, Pte::new(TABLES[1], TABLE).0),
        link(3, Pte::new(TABLES[2], TABLE).0),
        link(2, Pte::new(TABLES[3], TABLE).0),
        link(1, rw()),
        pte(rw(), 0),
    ];
    for (sequence, seen) in events.iter_mut().enumerate() {
        seen.event.sequence = sequence as u64;
    }
    events
}

/// What [`history`] leads to, but for `present`, which it does not have.
fn memory_of(present: bool) -> crate::memory::GuestRam {
    use std::mem::offset_of;

    use abi::objects::{KernelRoot, Mm};
    let ram = crate::memory::GuestRam::new(16 << 20).unwrap();
    let (root, mm) = (ROOT, 0x1_0000u64);
    let put = |at: u64, value: u64| ram.write(at, &value.to_le_bytes()).unwrap();
    put(root + offset_of!(KernelRoot, mms) as u64, mm);
    put(mm + offset_of!(Mm, id) as u64, 1);
    put(mm + offset_of!(Mm, pgd) as u64, TABLES[0]);
    for (level, table) in [(4, TABLES[0]), (3, TABLES[1]), (2, TABLES[2])] {
        let next = TABLES[5 - level as usize];
        put(tables::slot(table, level, PAGE), Pte::new(next, TABLE).0);
    }
    if present {
        put(tables::slot(TABLES[3], 1, PAGE), rw());
    }
    ram
}
const ROOT: u64 = 0x2_0000;

#[test]
fn what_is_stale_at_the_start_is_known_from_the_events_since_boot() {
    let ids = |events: &[Seen], present| {
        let mut model = TlbModel::new();
        model.since_boot(events, 2);
        model.start(&memory_of(present), ROOT, 2);
        let mut found = Vec::new();
        let enter = seen(0, EventKind::LazyLeave, [1, 0, 0, 0, 0]);
        for event in [enter, free(FrameKind::Slab, FRAME)] {
            model.observe(&event, &mut found);
        }
        let told = found.first().map(|it| it.finding.found.clone());
        (
            found.iter().map(|it| it.id).collect::<Vec<_>>(),
            told.unwrap_or_default(),
        )
    };
    let (known, told) = ids(&history(), false);
    assert_eq!(known, ["T-01"], "nobody has flushed since");
    assert!(
        told.ends_with("could be cached from event 7 of the set-up on; vCPU 0 (task 1) changed the entry (event 8 of the set-up)"),
        "{told}"
    );
    assert_eq!(ids(&[], false).0, [""; 0], "no events");
    assert_eq!(ids(&history()[1..], false).0, [""; 0], "some are missing");
    assert_eq!(
        ids(&history(), true).0,
        [""; 0],
        "they do not explain memory"
    );
    let mut model = TlbModel::new();
    model.since_boot(&history(), 2);
    model.start(&memory_of(false), ROOT, 2);
    let mut found = Vec::new();
    model.compare(&memory_of(false), ROOT, &mut found);
    assert!(found.is_empty(), "{found:?}");
    model.compare(&memory_of(true), ROOT, &mut found);
    assert_eq!(found[0].id, "T-10");
}

#[test]
fn garbage_in_memory_is_no_harm() {
    let ram = memory_of(true);
    let mms = ROOT + std::mem::offset_of!(abi::objects::KernelRoot, mms) as u64;
    for mm in [u64::MAX - 7, 1, ROOT] {
        ram.write(mms, &mm.to_le_bytes()).unwrap();
        let mut model = TlbModel::new();
        model.start(&ram, ROOT, 2);
        model.compare(&ram, ROOT, &mut Vec::new());
    }
    let ram = memory_of(true);
    // A table that refers to itself, at every level.
    let own = Pte::new(TABLES[0], TABLE).0.to_le_bytes();
    (0..512).for_each(|index| ram.write(TABLES[0] + index * 8, &own).unwrap());
    let mut model = TlbModel::new();
    model.start(&ram, ROOT, 2);
    let mut found = Vec::new();
    model.compare(&ram, ROOT, &mut found);
    assert!(found.is_empty(), "{found:?}");
}

/// Everything that the kernel tells since boot is there, and comes to what memory shows.
fn knows_the_past<E: Engine>(mut driver: Driver<E>) {
    let since_boot = driver.since_boot();
    let engine = driver.engine();
    let (vcpus, root) = (engine.nr_vcpus(), engine.kernel_root().unwrap());
    let mut model = TlbModel::new();
    model.since_boot(&since_boot, vcpus);
    assert!(model.history.is_some(), "{since_boot:?}");
    model.start(engine.memory(), root, vcpus);
    assert_eq!(model.begins, since_boot.len() as u64);
    let there = memory::read(engine.memory(), root, vcpus);
    for (known, there) in model.now.state.vcpus.iter().zip(&there.vcpus) {
        assert_eq!(known.loaded().mm, there.loaded().mm);
        assert_eq!(known.loaded().root, there.loaded().root);
        assert_eq!(known.loaded().pcid, there.loaded().pcid);
        assert_eq!(known.lazy, there.lazy);
        assert!(!known.is_unknown(PAGE));
    }
    for (mm, mask) in there.masks.iter() {
        // One that was never loaded is in no event.
        let known = model.now.state.masks.get(mm).copied();
        assert_eq!(known.unwrap_or_default(), *mask);
    }
}

#[test]
fn the_kernel_tells_everything_since_boot() {
    for test in ["lazy-tables", "pcid"] {
        knows_the_past(driver(test, None));
    }
}

#[test]
fn on_kvm_the_kernel_tells_everything_since_boot() {
    let engine = KvmEngine::new(&litmus("lazy-tables", None)).expect("this test needs /dev/kvm");
    knows_the_past(Driver::new(engine, Limits::default(), true).unwrap());
}
