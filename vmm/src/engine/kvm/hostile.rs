//! Kernels that do not keep their side of the bargain, hand-assembled. They need /dev/kvm.

use std::mem::offset_of;
use std::time::{Duration, Instant};

use abi::channel::{Control, Doorbell, Event, RING_RECORDS};
use abi::layout::{BOOT_INFO_GPA, CHANNEL_GPA, MIN_MEMORY, PAGE_SIZE};
use abi::port;

use super::{KvmEngine, PATIENCE};
use crate::boot::testing;
use crate::control::{Interrupts, KernelImage, Machine, MachineConfig};
use crate::engine::{Engine, EngineError, Halt, Limit, PointSet};

const WATCHDOG: Duration = Duration::from_millis(500);

/// A serialised machine with the kernel `code`, which runs for ever; rsi points to its `BootInfo`.
fn engine(code: &[u8]) -> KvmEngine {
    let mut code = code.to_vec();
    code.push(0xe9); // jmp near to the start
    code.extend((-(code.len() as i32) - 4).to_le_bytes());
    let config = MachineConfig {
        vcpus: 1,
        memory_bytes: MIN_MEMORY,
        interrupts: Interrupts::Controlled,
        serialised: true,
        kernel: KernelImage::Bytes(testing::kernel(&code)),
        watchdog: WATCHDOG,
        ..MachineConfig::default()
    };
    let machine = Machine::with_user_image(config.clone(), &testing::user())
        .unwrap_or_else(|error| panic!("this test boots a guest on /dev/kvm: {error}"));
    KvmEngine::around(machine, config)
}

/// `mov dx, DOORBELL; mov eax, value; out dx, eax`
fn ring(value: u32) -> Vec<u8> {
    let mut code = vec![0x66, 0xba];
    code.extend(port::DOORBELL.to_le_bytes());
    code.push(0xb8);
    code.extend(value.to_le_bytes());
    code.push(0xef);
    code
}

/// Displacement of a field of the first vCPU's control page from rsi.
fn field(offset: usize) -> [u8; 4] {
    ((CHANNEL_GPA + offset as u64 - BOOT_INFO_GPA) as u32).to_le_bytes()
}

/// `mov qword ptr [field], value`
fn store(offset: usize, value: u32) -> Vec<u8> {
    let mut code = vec![0x48, 0xc7, 0x86];
    code.extend(field(offset));
    code.extend(value.to_le_bytes());
    code
}

fn step(engine: &mut KvmEngine, events: &mut Vec<Event>) -> Result<Halt, EngineError> {
    let limit = Limit {
        points: 1,
        traps: PointSet::default(),
    };
    engine.run(0, limit, events)
}

#[track_caller]
fn no_point(code: &[u8], seconds: f64) {
    let started = Instant::now();
    let error = step(&mut engine(code), &mut Vec::new()).unwrap_err();
    assert!(started.elapsed() >= WATCHDOG, "not at once");
    let EngineError::NoPoint {
        vcpu: 0,
        seconds: told,
        at,
    } = &error
    else {
        panic!("{error}");
    };
    assert!((told - seconds).abs() < 1e-9, "{told}");
    assert!(at.contains("CPL 0"), "{at}");
    let text = error.to_string();
    assert!(
        text.contains("vCPU 0 has not reached a scheduling point"),
        "{text}"
    );
}

#[test]
fn a_kernel_that_spins_silently_ends_with_the_watchdog() {
    no_point(&[], WATCHDOG.as_secs_f64());
}

/// It counts points, which is a sign of life, but never stops at one.
#[test]
fn a_kernel_that_ignores_its_budget_ends_too() {
    let mut code = vec![0x48, 0xff, 0x86]; // inc qword ptr
    code.extend(field(offset_of!(Control, points_passed)));
    no_point(&code, (WATCHDOG * PATIENCE).as_secs_f64());
}

/// Each of its rings says that a full ring of events is to be taken.
#[test]
fn a_kernel_that_only_fills_its_ring_cannot_have_all_of_the_hosts_memory() {
    let code = [
        store(offset_of!(Control, ring_tail), 0),
        store(offset_of!(Control, ring_head), RING_RECORDS as u32),
        ring(Doorbell::RingFull as u32),
    ];
    let mut engine = engine(&code.concat());
    for sequence in 0..RING_RECORDS as u64 {
        let event = Event {
            sequence,
            ..Event::default()
        };
        let gpa = CHANNEL_GPA + PAGE_SIZE + sequence * size_of::<Event>() as u64;
        engine.machine.ram().write_value(gpa, &event).unwrap();
    }
    let most = 10 * RING_RECORDS;
    engine.most_events = most;
    let mut events = Vec::new();
    let halt = step(&mut engine, &mut events).unwrap();
    let Halt::Crashed(crash) = &halt else {
        panic!("{halt:?}");
    };
    assert!(crash.reason.contains("without reaching a scheduling point"));
    assert!((most..=most + RING_RECORDS + 1).contains(&events.len()));

    // Nothing that it records is an event: there is no more to take, and no end.
    let code = [
        store(offset_of!(Control, ring_head), u32::MAX),
        ring(Doorbell::RingFull as u32),
    ];
    no_point(&code.concat(), (WATCHDOG * PATIENCE).as_secs_f64());
}

#[test]
fn a_point_that_is_none_is_the_guests_crash() {
    let code = [
        store(offset_of!(Control, point), 12_345),
        ring(Doorbell::Point as u32),
    ];
    let mut engine = engine(&code.concat());
    let halt = step(&mut engine, &mut Vec::new()).unwrap();
    let Halt::Crashed(crash) = &halt else {
        panic!("{halt:?}");
    };
    assert!(crash.reason.contains("12345"), "{}", crash.reason);
}

#[test]
fn a_count_of_points_may_be_any_number() {
    let mut code = store(offset_of!(Control, points_passed), u32::MAX);
    code.extend(store(offset_of!(Control, point), 1));
    code.extend(ring(Doorbell::Point as u32));
    let mut engine = engine(&code);
    for _ in 0..3 {
        let halt = step(&mut engine, &mut Vec::new()).unwrap();
        assert!(matches!(halt, Halt::Point { .. }), "{halt:?}");
        assert_eq!(engine.points_passed(0), u64::MAX);
    }
}
