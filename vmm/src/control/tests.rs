//! Machines with hand-assembled kernels. They need `/dev/kvm` and say so where it is missing.

mod stepping;

use std::mem::offset_of;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use abi::boot::BootInfo;
use abi::channel::{Control, Doorbell, ReportKind};
use abi::layout::{
    BOOT_INFO_GPA, CHANNEL_GPA, CHANNEL_STRIDE, DIRECT_MAP_BASE, KERNEL_LOAD_GPA,
    KERNEL_VIRT_OFFSET, LAPIC_GVA, MIN_MEMORY,
};
use abi::point::Point;
use abi::port;

use super::*;
use crate::boot::testing;
use crate::kvm::vcpu::State;

const TEXT: u64 = KERNEL_VIRT_OFFSET + KERNEL_LOAD_GPA;
const MODES: [Interrupts; 2] = [Interrupts::Hardware, Interrupts::Controlled];
/// Far more than any of these guests needs, on any host.
const LONG: Option<Duration> = Some(Duration::from_secs(60));
/// Words for the guests' use, in the page before the channels.
const SCRATCH: u64 = 0x8000;

fn config(code: &[u8]) -> MachineConfig {
    MachineConfig {
        vcpus: 1,
        memory_bytes: MIN_MEMORY,
        kernel: KernelImage::Bytes(testing::kernel(code)),
        watchdog: Duration::from_secs(30),
        ..MachineConfig::default()
    }
}

fn machine(config: MachineConfig) -> Machine {
    Machine::with_user_image(config, &testing::user())
        .unwrap_or_else(|error| panic!("this test boots a guest on /dev/kvm: {error}"))
}

fn crash_of(code: &[u8]) -> Crash {
    match machine(config(code)).run_until(LONG).unwrap() {
        Stop::Crashed(crash) => crash,
        other => panic!("{other:?}"),
    }
}

/// `mov dx, port; mov eax, value; out dx, eax`
fn out(port: u16, value: u32) -> Vec<u8> {
    let mut code = vec![0x66, 0xba];
    code.extend(port.to_le_bytes());
    code.push(0xb8);
    code.extend(value.to_le_bytes());
    code.push(0xef);
    code
}

/// `inc qword ptr [rsi + SCRATCH + 8 * word - BOOT_INFO_GPA]`; rsi points to `BootInfo`.
fn count(word: u64) -> Vec<u8> {
    let mut code = vec![0x48, 0xff, 0x86];
    code.extend(scratch_offset(word));
    code
}

/// The displacement of a scratch word from rsi.
fn scratch_offset(word: u64) -> [u8; 4] {
    ((SCRATCH + 8 * word - BOOT_INFO_GPA) as u32).to_le_bytes()
}

/// Runs `body` for ever.
fn forever(body: &[u8]) -> Vec<u8> {
    let mut code = body.to_vec();
    // jmp near to the start of the body
    code.push(0xe9);
    code.extend((-(body.len() as i32) - 5).to_le_bytes());
    code
}

fn scratch(machine: &Machine, word: u64) -> u64 {
    machine.ram().read_value(SCRATCH + 8 * word).unwrap()
}

/// Writes a field of the control page of vCPU 0, as the guest's kernel would.
fn write_control(machine: &Machine, offset: usize, value: u64) {
    machine
        .ram()
        .write_value(CHANNEL_GPA + offset as u64, &value)
        .unwrap();
}

const HLT: u8 = 0xf4;
const UD2: [u8; 2] = [0x0f, 0x0b];

#[test]
fn the_exit_port_ends_the_run_for_good() {
    for interrupts in MODES {
        let mut machine = machine(MachineConfig {
            interrupts,
            ..config(&out(port::EXIT, 42))
        });
        assert_eq!(
            machine.run_until(LONG).unwrap(),
            Stop::Exited { status: 42 }
        );
        assert_eq!(
            machine.run_until(LONG).unwrap(),
            Stop::Exited { status: 42 }
        );
    }
}

#[test]
fn every_vcpu_starts_paused_at_the_entry_with_its_index() {
    let machine = machine(MachineConfig {
        vcpus: 3,
        ..config(&[HLT])
    });
    for vcpu in 0..3 {
        let snapshot = machine.vcpu_state(vcpu).unwrap();
        assert_eq!(snapshot.state, State::Paused);
        assert_eq!((snapshot.regs.rip, snapshot.regs.rdi), (TEXT, vcpu as u64));
        assert_eq!(snapshot.cpl(), 0);
    }
    assert!(matches!(
        machine.vcpu_state(3),
        Err(MachineError::NoSuchVcpu { given: 3, vcpus: 3 })
    ));
}

#[test]
fn a_paused_machine_stands_still_and_goes_on() {
    for interrupts in MODES {
        let mut machine = machine(MachineConfig {
            vcpus: 2,
            interrupts,
            ..config(&forever(&count(0)))
        });
        let mut last = 0;
        for _ in 0..20 {
            let stop = machine.run_until(Some(Duration::from_millis(5))).unwrap();
            assert_eq!(stop, Stop::Deadline);
            let counted = scratch(&machine, 0);
            let rip = machine.vcpu_state(0).unwrap().regs.rip;
            assert!((TEXT..TEXT + 12).contains(&rip), "{rip:#x}");
            std::thread::sleep(Duration::from_millis(1));
            assert_eq!(scratch(&machine, 0), counted, "a paused guest wrote");
            last = last.max(counted);
        }
        assert!(last > 0);
    }
}

#[test]
fn pause_and_resume_are_timed_for_every_vcpu() {
    let mut machine = machine(MachineConfig {
        vcpus: 3,
        ..config(&forever(&count(0)))
    });
    let resumed = machine.resume_all().unwrap();
    let paused = machine.pause_all().unwrap();
    assert_eq!((resumed.each.len(), paused.each.len()), (3, 3));
    assert!(paused.each.iter().all(|each| *each <= paused.total));
    assert_eq!(
        machine.pause_all().unwrap().each,
        [],
        "nothing is left to pause"
    );
}

#[test]
fn a_pause_never_loses_the_result_of_a_read() {
    // Reads the serial port's line status for ever; anything but "transmitter empty" exits.
    let mut body = vec![0x66, 0xba]; // mov dx, SERIAL + 5
    body.extend((port::SERIAL + 5).to_le_bytes());
    body.extend([0x31, 0xc0]); // xor eax, eax
    body.push(0xec); // in al, dx
    body.extend([0x3c, 0x60]); // cmp al, 0x60
    let wrong = out(port::EXIT, 1);
    body.extend([0x74, wrong.len() as u8]); // je over the exit
    body.extend(&wrong);
    body.extend(count(0));
    let mut machine = machine(config(&forever(&body)));
    for _ in 0..200 {
        machine.resume_all().unwrap();
        machine.pause_all().unwrap();
    }
    let stop = machine.run_until(Some(Duration::from_millis(20))).unwrap();
    assert_eq!(stop, Stop::Deadline);
    assert!(scratch(&machine, 0) > 0);
}

#[test]
fn a_vcpu_at_a_point_stands_behind_its_doorbell_and_goes_on() {
    let bell = out(port::DOORBELL, Doorbell::Point as u32);
    let code = [bell.clone(), out(port::EXIT, 3)].concat();
    let mut machine = machine(config(&code));
    write_control(
        &machine,
        offset_of!(Control, point),
        Point::FlushWait as u64,
    );
    write_control(&machine, offset_of!(Control, point_args), 0x1234);
    let expected = Stop::Point {
        vcpu: 0,
        point: Point::FlushWait,
        args: [0x1234, 0],
    };
    assert_eq!(machine.run_until(LONG).unwrap(), expected);
    let snapshot = machine.vcpu_state(0).unwrap();
    assert_eq!(snapshot.regs.rip, TEXT + bell.len() as u64);
    assert_eq!(machine.run_until(LONG).unwrap(), Stop::Exited { status: 3 });
}

#[test]
fn every_vcpu_that_stops_is_told_before_any_runs_on() {
    const VCPUS: u32 = 4;
    // count; doorbell; count; doorbell; … so that who runs on too early is seen.
    let code = forever(&[count(0), out(port::DOORBELL, Doorbell::Point as u32)].concat());
    let mut machine = machine(MachineConfig {
        vcpus: VCPUS,
        ..config(&code)
    });
    let mut stops = [0_u64; VCPUS as usize];
    for _ in 0..40 {
        match machine.run_until(LONG).unwrap() {
            Stop::Point { vcpu, .. } => stops[vcpu] += 1,
            other => panic!("{other:?}"),
        }
        // `inc` is not locked, so counts may be lost, but none can be more than the stops told plus
        // one per vCPU under way.
        let told: u64 = stops.iter().sum();
        assert!(scratch(&machine, 0) <= told + u64::from(VCPUS));
    }
    assert!(stops.iter().all(|count| *count > 0), "{stops:?}");
}

#[test]
fn reports_and_panics_are_read_from_the_channel() {
    let report = config(&out(port::DOORBELL, Doorbell::Report as u32));
    let mut reporting = machine(report);
    let field = |field| offset_of!(Control, report) + field;
    write_control(&reporting, field(0), ReportKind::ForeignFrame as u64);
    write_control(&reporting, field(8), 0x7000);
    write_control(&reporting, field(16), 5);
    write_control(&reporting, field(24), 6);
    write_control(&reporting, field(32), 9);
    let expected = ProbeReport {
        kind: ReportKind::ForeignFrame,
        gva: 0x7000,
        expected: 5,
        found: 6,
        task: 9,
    };
    assert_eq!(
        reporting.run_until(LONG).unwrap(),
        Stop::Report {
            vcpu: 0,
            report: expected
        }
    );

    let mut panicking = machine(config(&out(port::DOORBELL, Doorbell::Panic as u32)));
    write_control(&panicking, offset_of!(Control, message_len), 4);
    write_control(
        &panicking,
        offset_of!(Control, message),
        u64::from_le_bytes(*b"oops\xff\xff\xff\xff"),
    );
    let Stop::Crashed(crash) = panicking.run_until(LONG).unwrap() else {
        panic!("no crash");
    };
    assert_eq!(crash.vcpu, Some(0));
    assert_eq!(crash.snapshots.len(), 1);
    assert_eq!(
        crash.cause,
        CrashCause::KernelPanic {
            message: "oops".into()
        }
    );
}

#[test]
fn the_first_user_instruction_is_timed_and_stops_nothing() {
    let bell = out(port::DOORBELL, Doorbell::FirstUser as u32);
    let mut machine = machine(config(&[bell, out(port::EXIT, 0)].concat()));
    assert_eq!(machine.timings().first_user, None);
    assert_eq!(machine.run_until(LONG).unwrap(), Stop::Exited { status: 0 });
    assert!(machine.timings().first_user.is_some());
}

#[test]
fn what_a_hostile_guest_does_is_a_crash_with_its_name() {
    let text = |code: &[u8]| match crash_of(code).cause {
        CrashCause::UnexpectedExit { text } => text,
        other => panic!("{other:?}"),
    };
    assert!(text(&out(port::DOORBELL, 99)).contains("99"));
    assert!(text(&out(port::DOORBELL, Doorbell::RingFull as u32)).contains("ring"));
    assert!(text(&out(0x80, 1)).contains("port 0x80"));
    // in eax, 0x60
    assert!(text(&[0xe5, 0x60]).contains("port 0x60"));

    let mut no_point = machine(config(&out(port::DOORBELL, Doorbell::Point as u32)));
    write_control(&no_point, offset_of!(Control, point), u64::MAX);
    let stop = no_point.run_until(LONG).unwrap();
    assert!(format!("{stop:?}").contains("scheduling point 18446744073709551615"));
}

#[test]
fn a_triple_fault_is_told_with_every_vcpus_registers() {
    let mut machine = machine(MachineConfig {
        vcpus: 2,
        // test edi, edi; jz +3; hlt; jmp hlt; ud2
        ..config(&[&[0x85, 0xff, 0x74, 0x03, HLT, 0xeb, 0xfd][..], &UD2].concat())
    });
    let Stop::Crashed(crash) = machine.run_until(LONG).unwrap() else {
        panic!("no crash");
    };
    assert_eq!(
        (crash.cause, crash.vcpu),
        (CrashCause::TripleFault, Some(0))
    );
    assert_eq!(crash.snapshots.len(), 2);
    assert_eq!(crash.snapshots[1].regs.rdi, 1);
}

#[test]
fn a_guest_that_halts_for_ever_is_hung() {
    for interrupts in MODES {
        let mut machine = machine(MachineConfig {
            vcpus: 2,
            interrupts,
            watchdog: Duration::from_millis(100),
            ..config(&[HLT])
        });
        let Stop::Crashed(crash) = machine.run_until(LONG).unwrap() else {
            panic!("no crash");
        };
        assert_eq!(crash.cause, CrashCause::NoProgress { seconds: 0.1 });
        assert!(
            crash.snapshots.iter().all(|vcpu| vcpu.halted),
            "{interrupts:?}"
        );
        assert_eq!(crash.vcpu, None);
    }
}

#[test]
fn another_thread_can_interrupt_a_run() {
    let mut machine = machine(config(&forever(&count(0))));
    let handle = machine.interrupt_handle();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        handle.interrupt();
    });
    assert_eq!(machine.run_until(LONG).unwrap(), Stop::Interrupted);
    thread.join().unwrap();
    // One request, one stop.
    let stop = machine.run_until(Some(Duration::from_millis(5))).unwrap();
    assert_eq!(stop, Stop::Deadline);
    machine.interrupt_handle().interrupt();
    assert_eq!(machine.run_until(LONG).unwrap(), Stop::Interrupted);
}

#[test]
fn a_string_instruction_writes_to_the_console() {
    let text = b"hello from the guest\n";
    let mut code = vec![0x66, 0xba]; // mov dx, SERIAL
    code.extend(port::SERIAL.to_le_bytes());
    code.push(0xb9); // mov ecx, length
    code.extend((text.len() as u32).to_le_bytes());
    code.extend([0x48, 0xbe]); // mov rsi, the text in the direct map
    code.extend((DIRECT_MAP_BASE + SCRATCH).to_le_bytes());
    code.extend([0xf3, 0x6e]); // rep outsb
    code.extend(out(port::EXIT, 0));
    let mut machine = machine(config(&code));
    machine.ram().write(SCRATCH, text).unwrap();

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);
    impl std::io::Write for Sink {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let sink = Sink::default();
    machine.stream_serial(Box::new(sink.clone()));
    assert_eq!(machine.run_until(LONG).unwrap(), Stop::Exited { status: 0 });
    assert_eq!(machine.serial_output().as_bytes(), text);
    drop(machine); // streams the rest
    assert_eq!(*sink.0.lock().unwrap(), text);
}

/// `mov dword ptr [rbx + register], value`
fn lapic(register: u32, value: u32) -> Vec<u8> {
    let mut code = vec![0xc7, 0x83];
    code.extend(register.to_le_bytes());
    code.extend(value.to_le_bytes());
    code
}

fn with_scratch(opcode: &[u8], word: u64) -> Vec<u8> {
    [opcode, &scratch_offset(word)].concat()
}

/// Gets ready for interrupts, does `then`, halts until one came, and ends the run.
fn receiver(then: &[u8]) -> Vec<u8> {
    let mut receiver = vec![0x48, 0x8d, 0xa6]; // lea rsp, [rsi + disp32]: a stack below scratch
    receiver.extend(scratch_offset(0));
    receiver.extend(with_scratch(&[0x0f, 0x01, 0x96], 10)); // lgdt [rsi + disp32]
    receiver.extend(with_scratch(&[0x0f, 0x01, 0x9e], 12)); // lidt [rsi + disp32]
    receiver.extend(lapic(0xf0, 0x1ff)); // SVR: enable
    receiver.extend(then);
    receiver.extend([0xfb, HLT]); // sti; hlt
    receiver.extend(out(port::EXIT, 7));
    receiver.push(HLT);
    receiver
}

/// Counts in scratch word 1.
fn handler() -> Vec<u8> {
    let mut handler = lapic(0xb0, 0); // EOI
    handler.extend(count(1));
    handler.extend([0x48, 0xcf]); // iretq
    handler
}

/// The tables of a [`receiver`], whose handler of `vector` lies at `handler_at`.
fn put_tables(machine: &Machine, vector: u64, handler_at: u64) {
    let put = |word: u64, value: u64| {
        machine
            .ram()
            .write_value(SCRATCH + 8 * word, &value)
            .unwrap();
    };
    let gva = |word: u64| DIRECT_MAP_BASE + SCRATCH + 8 * word;
    // Descriptor tables: limit and base of each, GDT at word 20, IDT at word 32.
    for (register, table, limit) in [(10, 20, 0x17_u64), (12, 32, 0xfff)] {
        put(register, limit | gva(table) << 16);
        put(register + 1, gva(table) >> 48);
    }
    put(21, 0x00af_9b00_0000_ffff); // 64-bit code, selector 0x08
    put(22, 0x00cf_9300_0000_ffff); // data, selector 0x10
    let low = handler_at & 0xffff | 0x08 << 16 | 0x8e00 << 32;
    put(32 + 2 * vector, low | (handler_at >> 16 & 0xffff) << 48);
    put(33 + 2 * vector, handler_at >> 32);
}

/// A task that did not ask for what the disk moves may wait for it too: not even who asked may be awake.
#[test]
fn the_disk_interrupts_whoever_asked_it_in_both_modes() {
    let request = out(port::DISK, SCRATCH as u32 + 4 * 8);
    let mut code = vec![0x48, 0xbb]; // mov rbx, LAPIC_GVA
    code.extend(LAPIC_GVA.to_le_bytes());
    code.extend(receiver(&request));
    let handler_at = TEXT + code.len() as u64;
    code.extend(handler());
    for interrupts in MODES {
        let mut machine = machine(MachineConfig {
            interrupts,
            ..config(&code)
        });
        put_tables(&machine, abi::disk::VECTOR.into(), handler_at);
        // Operation, sector, where the data are, and how many bytes.
        let write = [abi::disk::DiskOp::Write as u64, 0, SCRATCH, 512];
        for (word, value) in (4..).zip(write) {
            let at = SCRATCH + 8 * word;
            machine.ram().write_value(at, &value).unwrap();
        }
        assert_eq!(
            machine.run_until(LONG).unwrap(),
            Stop::Exited { status: 7 },
            "{interrupts:?}"
        );
        assert_eq!(scratch(&machine, 1), 1, "one interrupt, {interrupts:?}");
    }
}

/// vCPU 0 sends vector 0x50 to vCPU 1, which has halted; its handler counts, and it ends the run.
#[test]
fn an_ipi_wakes_a_halted_vcpu_in_both_modes() {
    let receiver = receiver(&count(0)); // ready
    let mut sender = lapic(0xf0, 0x1ff);
    // cmp qword ptr [rsi + disp32], 0; je back: until the other is ready
    let wait = [
        &with_scratch(&[0x48, 0x83, 0xbe], 0)[..],
        &[0],
        &[0x74, 0xf6],
    ]
    .concat();
    sender.extend(&wait);
    sender.extend(lapic(0x310, 1 << 24)); // ICR: APIC ID 1
    sender.extend(lapic(0x300, 0x4050)); // ICR: fixed, assert, vector 0x50
    sender.extend([HLT, 0xeb, 0xfd]); // hlt; jmp hlt

    let mut code = vec![0x48, 0xbb]; // mov rbx, LAPIC_GVA
    code.extend(LAPIC_GVA.to_le_bytes());
    code.extend([0x85, 0xff]); // test edi, edi
    code.extend([0x74, receiver.len() as u8]); // jz sender
    code.extend(&receiver);
    code.extend(&sender);
    let handler_at = TEXT + code.len() as u64;
    code.extend(handler());

    for interrupts in MODES {
        let mut machine = machine(MachineConfig {
            vcpus: 2,
            interrupts,
            ..config(&code)
        });
        put_tables(&machine, 0x50, handler_at);
        assert_eq!(
            machine.run_until(LONG).unwrap(),
            Stop::Exited { status: 7 },
            "{interrupts:?}"
        );
        assert_eq!(scratch(&machine, 1), 1, "one interrupt, {interrupts:?}");
    }
}

#[test]
fn what_no_machine_can_have_is_refused() {
    let refuse = |config| match Machine::with_user_image(config, &testing::user()) {
        Err(error) => error,
        Ok(_) => panic!("a machine"),
    };
    for given in [0, 17, 1000] {
        let error = refuse(MachineConfig {
            vcpus: given,
            ..config(&[HLT])
        });
        assert!(error.to_string().contains("1 to 16"), "{error}");
    }
    assert!(matches!(
        refuse(MachineConfig {
            memory_bytes: 1 << 20,
            ..config(&[HLT])
        }),
        MachineError::MemoryTooSmall {
            given: 0x10_0000,
            minimum: MIN_MEMORY
        }
    ));
    assert!(matches!(
        refuse(MachineConfig {
            kernel: KernelImage::Bytes(b"no ELF".to_vec()),
            ..config(&[HLT])
        }),
        MachineError::BadKernel(_)
    ));
    assert!(matches!(
        refuse(MachineConfig {
            kernel: KernelImage::File("/nowhere".into()),
            ..config(&[HLT])
        }),
        MachineError::KernelFile(_)
    ));
}

#[test]
fn the_kernels_root_is_told_once_it_is_there_and_inside_memory() {
    let machine = machine(config(&[HLT]));
    let set = |value: u64| {
        let at = BOOT_INFO_GPA + offset_of!(BootInfo, kernel_root) as u64;
        machine.ram().write_value(at, &value).unwrap();
    };
    assert_eq!(machine.kernel_root(), None);
    for outside in [MIN_MEMORY, u64::MAX, 0x30_0001] {
        set(outside);
        assert_eq!(machine.kernel_root(), None);
    }
    set(0x30_0000);
    assert_eq!(machine.kernel_root(), Some(0x30_0000));
}

#[test]
fn traps_budgets_and_masks_reach_every_channel() {
    let mut machine = machine(MachineConfig {
        vcpus: 2,
        events: 0b101,
        ..config(&[HLT])
    });
    machine.trap_point(Point::FlushIssue, true);
    machine.trap_point(Point::IdleEnter, true);
    machine.trap_point(Point::IdleEnter, false);
    machine.set_budget(1, 5).unwrap();
    assert!(machine.set_budget(2, 5).is_err());
    let word = |vcpu: u64, offset: usize| -> u64 {
        let page = CHANNEL_GPA + vcpu * CHANNEL_STRIDE;
        machine.ram().read_value(page + offset as u64).unwrap()
    };
    for vcpu in 0..2 {
        assert_eq!(
            word(vcpu, offset_of!(Control, trap)),
            1 << Point::FlushIssue as u64
        );
        assert_eq!(word(vcpu, offset_of!(Control, event_mask)), 0b101);
    }
    assert_eq!(word(0, offset_of!(Control, budget)), u64::MAX);
    assert_eq!(word(1, offset_of!(Control, budget)), 5);
}

#[test]
fn kvm_counts_exits_where_the_host_has_counters() {
    let mut machine = machine(config(&out(port::EXIT, 0)));
    machine.run_until(LONG).unwrap();
    let host = crate::kvm::Host::probe();
    let counted = host
        .capabilities
        .iter()
        .any(|capability| capability.name == "KVM_CAP_BINARY_STATS_FD" && capability.present);
    let exits = machine.kvm_stats().and_then(|stats| stats.total("exits"));
    assert_eq!(exits.is_some_and(|exits| exits > 0), counted);
    assert!(machine.vcpu_state(0).unwrap().exits > 0);
}

fn real(interrupts: Interrupts, cmdline: &str) -> Machine {
    Machine::new(MachineConfig {
        interrupts,
        cmdline: cmdline.into(),
        program: ProgramSpec {
            name: "smoke".into(),
            ..ProgramSpec::default()
        },
        watchdog: Duration::from_secs(30),
        ..MachineConfig::default()
    })
    .unwrap_or_else(|error| panic!("this test boots a guest on /dev/kvm: {error}"))
}

#[test]
fn the_embedded_kernel_boots_and_runs_a_program_in_both_modes() {
    for interrupts in MODES {
        let mut machine = real(interrupts, "");
        let stop = machine.run_until(LONG).unwrap();
        assert_eq!(
            stop,
            Stop::Exited { status: 0 },
            "{}",
            machine.serial_output()
        );
        assert!(machine.serial_output().contains("smoke:"));
        assert!(machine.kernel_root().is_some());
        assert!(machine.timings().first_user.is_some());
        assert!(!machine.events(0).is_empty());
    }
}

#[test]
fn the_embedded_kernel_stops_at_a_trapped_point() {
    let mut machine = real(Interrupts::Controlled, "");
    machine.trap_point(Point::SyscallEnter, true);
    for _ in 0..5 {
        match machine.run_until(LONG).unwrap() {
            Stop::Point { point, .. } => assert_eq!(point, Point::SyscallEnter),
            other => panic!("{other:?}"),
        }
    }
    machine.trap_point(Point::SyscallEnter, false);
    // vCPUs that had stopped before the trap was lifted are still told.
    let mut stop = machine.run_until(LONG).unwrap();
    while matches!(stop, Stop::Point { .. }) {
        stop = machine.run_until(LONG).unwrap();
    }
    assert_eq!(stop, Stop::Exited { status: 0 });
}

#[test]
fn a_panic_of_the_embedded_kernel_has_a_symbolised_backtrace() {
    let mut machine = real(Interrupts::Controlled, "no_such_parameter=1");
    let Stop::Crashed(crash) = machine.run_until(LONG).unwrap() else {
        panic!("no crash");
    };
    let CrashCause::KernelPanic { message } = &crash.cause else {
        panic!("{crash:?}");
    };
    assert!(message.contains("no_such_parameter"), "{message}");
    let text = crate::report::crash::render(&crash, &machine);
    assert!(text.contains("panic"), "{text}");
    assert!(text.contains("guest-kernel/src/"), "{text}");
}

/// In the middle of a shootdown: an IPI is pending somewhere, and its sender waits for the answer.
#[test]
fn a_saved_machine_goes_back_and_on_in_both_modes() {
    let ends = |machine: &mut Machine| {
        machine.set_traps([0; 4]);
        let stop = machine.run_until(LONG).unwrap();
        assert_eq!(stop, Stop::Exited { status: 0 });
        machine.serial_output()
    };
    let bytes = |snapshot: &crate::snapshot::Snapshot| {
        postcard::to_stdvec(&(&snapshot.vcpus, &snapshot.board)).unwrap()
    };
    for interrupts in MODES {
        let mut machine = real(interrupts, "");
        machine.trap_point(Point::FlushWait, true);
        let stop = machine.run_until(LONG).unwrap();
        assert!(matches!(stop, Stop::Point { .. }), "{stop:?}");
        let saved = machine.save().unwrap();
        let console = ends(&mut machine);
        for logged in [true, false] {
            if !logged {
                machine.forget_dirty_log();
            }
            let timings = machine.reset().unwrap();
            assert!(timings.pages > 0);
            assert_eq!(
                bytes(&machine.save().unwrap()),
                bytes(&saved),
                "{interrupts:?}"
            );
            assert_eq!(ends(&mut machine), console);
        }
        let config = MachineConfig {
            interrupts,
            ..MachineConfig::default()
        };
        let mut clone = Machine::clone_of(&saved, config.clone()).unwrap();
        assert_eq!(ends(&mut clone), console);
        clone.reset().unwrap();
        assert_eq!(ends(&mut clone), console);
        let vcpus = MachineConfig { vcpus: 3, ..config };
        assert!(Machine::clone_of(&saved, vcpus).is_err());
    }
    let mut never_saved = machine(config(&[HLT]));
    assert!(matches!(never_saved.reset(), Err(MachineError::NotSaved)));
}
