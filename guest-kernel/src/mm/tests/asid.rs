//! PCIDs: what a CPU keeps of an mm that it has left, and when it may use it again. On soft TLBs, which are
//! tagged as a processor's are.

use core::sync::atomic::Ordering::Relaxed;

use abi::channel::{EventKind, cr3};
use abi::objects::{ASIDS, Mm, Pa};
use abi::param::{Config, Pcid};
use abi::point::Point;
use abi::syscall::advice;

use super::{AT, PAGE, RW, TestKernel, audit, map_at, space, teardown};
use crate::Kernel;
use crate::arch::model::testing::{Machine, boot_info};
use crate::mm::asid::resolve;
use crate::mm::{FaultError, Field, FreedTables};

/// Two mms with a page at one address, 42 in the first and 43 in the second. Both were on CPU 1, the first is
/// on CPU 0 too and was on CPU 1 last.
fn two(cmdline: &str) -> (Machine, [Pa<Mm>; 2]) {
    let machine = Machine::new(2, &std::format!("pcid=on {cmdline}"));
    let k = machine.kernel();
    let mms = [42, 43].map(|value| {
        let mm = space(k, &[1]);
        map_at(k, mm, AT, 4, RW);
        k.user_write(1, AT, value).unwrap();
        mm
    });
    for cpu in [1, 0] {
        k.on(cpu, |k| k.switch_mm(mms[0]));
    }
    (machine, mms)
}

/// What CPU 1 has cached of the page of `mm`, loaded or not.
fn cached(k: &TestKernel, mm: Pa<Mm>) -> bool {
    let id = k.obj(mm).id.get();
    let slot = k.root().cpus[1].asids.iter().position(|a| a.mm.get() == id);
    slot.is_some_and(|slot| k.tlb_of(1, slot as u64 + 1).pages.contains_key(&AT))
}

/// The operands of the loads of CR3 that `f` makes CPU 1 execute.
fn loads(k: &TestKernel, f: impl FnOnce(&TestKernel)) -> Vec<u64> {
    k.arch.record_events();
    k.arch.drop_events();
    k.on(1, f);
    let mut events = Vec::new();
    k.arch.take_events(&mut events);
    let is_load = |event: &&abi::channel::Event| event.kind == EventKind::Cr3Load as u32;
    events.iter().filter(is_load).map(|e| e.args[0]).collect()
}

#[test]
fn translations_survive_a_switch_and_are_not_mixed_up() {
    let (machine, [one, other]) = two("");
    let k = machine.kernel();
    for (mm, pcid, value) in [(other, 2, 43), (one, 1, 42), (other, 2, 43)] {
        let operand = k.obj(mm).pgd.get() | pcid | cr3::NO_FLUSH;
        assert_eq!(loads(k, |k| k.switch_mm(mm)), [operand]);
        assert!(cached(k, one) && cached(k, other));
        assert_eq!(k.user_read(1, AT), Ok(value));
        audit(k);
    }
    // The processor has no PCIDs: it gets the address alone.
    assert_eq!(k.arch.root_of(1), k.obj(other).pgd.get());
    teardown(k, &[one, other]);
}

#[test]
fn without_pcids_every_load_flushes() {
    for cmdline in ["pcid=off", "", "pcid=auto"] {
        let machine = Machine::new(2, cmdline);
        let k = machine.kernel();
        let (one, other) = (space(k, &[1]), space(k, &[]));
        map_at(k, one, AT, 1, RW);
        k.user_write(1, AT, 1).unwrap();
        let pgds = [other, one].map(|mm| k.obj(mm).pgd.get());
        let back = loads(k, |k| {
            [other, one].into_iter().for_each(|mm| k.switch_mm(mm));
        });
        assert_eq!(back, pgds, "{cmdline}");
        assert!(k.tlb(1).pages.is_empty(), "{cmdline}");
        audit(k);
        teardown(k, &[one, other]);
    }
}

#[test]
fn a_slot_that_has_missed_a_flush_is_flushed_when_it_is_loaded() {
    let (machine, [one, other]) = two("");
    let k = machine.kernel();
    k.on(1, |k| k.switch_mm(other));
    let before = k.arch.flushes(1);
    k.madvise(one, AT, PAGE, advice::DONTNEED).unwrap();
    assert_eq!(k.arch.flushes(1), before, "CPU 1 has left the mm: no IPI");
    assert!(cached(k, one));
    audit(k);
    let operand = k.obj(one).pgd.get() | 1;
    assert_eq!(loads(k, |k| k.switch_mm(one)), [operand]);
    assert_eq!(k.user_read(1, AT), Ok(0));
    // Of the other's nothing is lost.
    assert!(cached(k, other));
    audit(k);
    teardown(k, &[one, other]);
}

#[test]
fn tables_are_freed_under_a_pcid_that_is_not_loaded() {
    let (machine, [one, other]) = two("");
    let k = machine.kernel();
    k.on(1, |k| k.switch_mm(other));
    k.munmap(one, AT, 4 * PAGE).unwrap();
    assert!(
        !k.tlb_of(1, 1).tables.is_empty(),
        "a pointer that nobody can use"
    );
    audit(k);
    k.on(1, |k| k.switch_mm(one));
    assert!(k.tlb(1).tables.is_empty());
    assert_eq!(k.user_read(1, AT), Err(FaultError::NoMapping));
    audit(k);
    teardown(k, &[one, other]);
}

#[test]
fn a_flush_reaches_the_loaded_pcid_alone() {
    let (machine, [one, other]) = two("flush_ceiling=2");
    let k = machine.kernel();
    // Page by page, and everything.
    for pages in [1, 4] {
        k.user_write(1, AT, 1).unwrap();
        k.madvise(one, AT, pages * PAGE, advice::DONTNEED).unwrap();
        assert!(!cached(k, one) && cached(k, other));
        assert!(k.tlb(1).tables.is_empty() && !k.tlb_of(1, 2).tables.is_empty());
        audit(k);
    }
    k.on(1, |k| k.switch_mm(other));
    assert_eq!(k.user_read(1, AT), Ok(43));
    teardown(k, &[one, other]);
}

#[test]
fn a_lazy_cpu_that_goes_elsewhere_catches_up_when_it_comes_back() {
    let (machine, [one, other]) = two("");
    let k = machine.kernel();
    k.on(1, Kernel::enter_lazy);
    k.madvise(one, AT, PAGE, advice::DONTNEED).unwrap();
    // From lazy mode to the other mm, and to the kernel's own tables.
    k.on(1, |k| k.switch_mm(other));
    assert!(cached(k, one));
    audit(k);
    assert_eq!(loads(k, Kernel::leave_mm), [k.root().pgd.get()]);
    assert!(cached(k, one) && cached(k, other));
    k.on(1, |k| k.switch_mm(one));
    assert_eq!(k.user_read(1, AT), Ok(0));
    audit(k);
    teardown(k, &[one, other]);
}

#[test]
fn more_mms_than_slots_take_the_oldest() {
    let machine = Machine::new(2, "pcid=on");
    let k = machine.kernel();
    let mms: Vec<_> = (0..=ASIDS as u64)
        .map(|value| {
            let mm = space(k, &[1]);
            map_at(k, mm, AT, 1, RW);
            k.user_write(1, AT, value).unwrap();
            audit(k);
            mm
        })
        .collect();
    // The last one has the first one's slot; all others still have theirs.
    let operand = |mm: Pa<Mm>, pcid: u64| k.obj(mm).pgd.get() | pcid;
    for (value, &mm) in mms.iter().enumerate().skip(2) {
        let pcid = value as u64 % ASIDS as u64 + 1;
        let expected = operand(mm, pcid) | cr3::NO_FLUSH;
        let found = loads(k, |k| k.switch_mm(mm));
        // It is loaded already.
        assert!(value == ASIDS || found == [expected], "{found:x?}");
        assert_eq!(k.user_read(1, AT), Ok(value as u64));
    }
    assert_eq!(loads(k, |k| k.switch_mm(mms[0])), [operand(mms[0], 2)]);
    assert_eq!(k.user_read(1, AT), Ok(0));
    audit(k);
    teardown(k, &mms);
}

#[test]
fn a_dead_mm_leaves_nothing_to_the_next_one() {
    let machine = Machine::new(2, "pcid=on asids=1");
    let k = machine.kernel();
    for round in 0..3 {
        let mm = space(k, &[1]);
        map_at(k, mm, AT, 1, RW);
        assert_eq!(k.user_read(1, AT), Ok(0));
        k.user_write(1, AT, round).unwrap();
        teardown(k, &[mm]);
    }
}

/// The pair of switcher and flusher: the flush comes when the switcher has said that it will have the mm, and
/// has not loaded it.
#[test]
fn a_flush_during_a_switch_that_keeps_is_not_missed() {
    let (machine, [one, other]) = two("");
    let k = machine.kernel();
    k.on(1, |k| k.switch_mm(other));
    k.arch.at(Point::Cr3Load, move |k| {
        let space = k.obj(one);
        assert_eq!(space.cpumask.get(), 0b11, "announced before the load");
        // Numbered after the switcher has read the number: it gets the request.
        let request = &k.root().cpus[0].flush;
        request.mm.set(one);
        request.start.set(AT);
        request.end.set(AT + PAGE);
        request.stride.set(PAGE);
        request.tlb_gen.set(space.tlb_gen.load(Relaxed) + 1);
        space.tlb_gen.fetch_add(1, Relaxed);
        request.pending.set(0b10);
    });
    k.on(1, |k| k.switch_mm(one));
    assert!(cached(k, one), "kept: it was not behind");
    k.on(1, Kernel::handle_shootdown);
    assert!(!cached(k, one));
    let slot = k.root().cpus[1].loaded_asid();
    assert_eq!(slot.tlb_gen.get(), k.obj(one).tlb_gen.get());
    k.on(0, |k| k.flush_mm(one, FreedTables::No));
    audit(k);
    teardown(k, &[one, other]);
}

#[test]
fn a_reused_slot_without_a_flush_shows_the_other_mm() {
    let seen = |bug: &str| {
        let machine = Machine::new(2, &std::format!("pcid=on asids=1 {bug}"));
        let k = machine.kernel();
        let one = space(k, &[1]);
        map_at(k, one, AT, 1, RW);
        k.user_write(1, AT, 42).unwrap();
        let other = space(k, &[1]);
        map_at(k, other, AT, 1, RW);
        let seen = k.user_read(1, AT).unwrap();
        teardown(k, &[one, other]);
        seen
    };
    assert_eq!(seen(""), 0);
    assert_eq!(seen("bug=pcid-reuse-no-flush"), 42);
}

#[test]
fn a_slot_that_is_behind_shows_what_is_gone() {
    let seen = |bug: &str| {
        let (machine, [one, other]) = two(bug);
        let k = machine.kernel();
        k.on(1, |k| k.switch_mm(other));
        k.munmap(one, AT, PAGE).unwrap();
        k.on(1, |k| k.switch_mm(one));
        let seen = k.user_read(1, AT);
        teardown(k, &[one, other]);
        seen
    };
    assert_eq!(seen(""), Err(FaultError::NoMapping));
    assert!(seen("bug=pcid-skip-stale-gen").is_ok());
}

/// The model's processor has no TLB, so none with PCIDs.
#[test]
fn pcids_of_a_processor_that_has_none_are_refused() {
    for tlb in ["hw", "both"] {
        let line = std::format!("pcid=on tlb={tlb}");
        let refused = Machine::boot(&boot_info(4 << 20, 1, &line)).err();
        let text = refused.expect("it has none");
        assert!(text.contains("CPUID.01H:ECX bit 17"), "{text}");
    }
}

#[test]
fn pcids_are_used_where_they_may_be() {
    let resolved = |line: &str, has| resolve(&Config::parse(line).unwrap(), || has);
    for (line, with, without) in [
        ("", Some(Pcid::On), Some(Pcid::Off)),
        ("pcid=off", Some(Pcid::Off), Some(Pcid::Off)),
        ("pcid=on", Some(Pcid::On), None),
        ("pcid=on tlb=both", Some(Pcid::On), None),
        ("pcid=on tlb=soft", Some(Pcid::On), Some(Pcid::On)),
        ("tlb=soft", Some(Pcid::Off), Some(Pcid::Off)),
        ("tlb=both", Some(Pcid::Off), Some(Pcid::Off)),
    ] {
        assert_eq!(resolved(line, true), with, "{line}");
        assert_eq!(resolved(line, false), without, "{line}");
    }
}
