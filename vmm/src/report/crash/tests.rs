use abi::layout::{DIRECT_MAP_BASE, KERNEL_LOAD_GPA, KERNEL_VIRT_OFFSET, MIN_MEMORY};

use super::*;
use crate::boot::{self, BootSpec, ProgramSpec, testing};
use crate::control::{Interrupts, KernelImage, MachineConfig, Stop};
use crate::kvm::vcpu::{ExitReason, Registers, State, SystemRegisters};
use crate::memory::GuestRam;

const TEXT: u64 = KERNEL_VIRT_OFFSET + KERNEL_LOAD_GPA;
/// A page for stacks, in the direct map.
const STACK: u64 = DIRECT_MAP_BASE + 0x8000;

/// Guest memory with the boot page tables and `code`, and the root of the tables.
fn guest(code: &[u8]) -> (GuestRam, u64) {
    let ram = GuestRam::new(MIN_MEMORY).unwrap();
    let spec = BootSpec {
        kernel: &testing::kernel(code),
        user: &testing::user(),
        program: &ProgramSpec::default(),
        cpus: 1,
        interrupts: Interrupts::Controlled,
        cmdline: "",
    };
    let boot = boot::load(&ram, &spec).unwrap();
    (ram, boot.pgd)
}

fn snapshot(index: usize, cr3: u64, regs: Registers) -> VcpuSnapshot {
    VcpuSnapshot {
        index,
        state: State::Paused,
        halted: false,
        last_exit: ExitReason::Shutdown,
        exits: 1,
        pinned: None,
        regs,
        sregs: SystemRegisters {
            cr2: 0xdead_b000,
            cr3,
            ..SystemRegisters::default()
        },
    }
}

fn report(ram: &GuestRam, snapshots: Vec<VcpuSnapshot>, events: &[Event]) -> CrashReport {
    let crash = Crash {
        cause: CrashCause::TripleFault,
        vcpu: Some(1),
        snapshots,
    };
    report_of(ram, &crash, events)
}

fn report_of(ram: &GuestRam, crash: &Crash, events: &[Event]) -> CrashReport {
    let scene = Scene {
        ram,
        kernel: &[],
        user: &[],
        objects: None,
        tsc_khz: Some(1_000_000),
    };
    CrashReport::collect(crash, &scene, |_| events.to_vec(), "one\ntwo\n")
}

#[test]
fn a_run_that_did_not_finish_shows_where_each_vcpu_stands() {
    let (ram, cr3) = guest(&[0x90]);
    let regs = Registers {
        rip: TEXT,
        ..Registers::default()
    };
    let late = |still| Crash {
        cause: CrashCause::DidNotFinish {
            seconds: 0.6,
            still,
        },
        vcpu: None,
        snapshots: vec![snapshot(0, cr3, regs), snapshot(1, cr3, regs)],
    };
    let stuck = report_of(&ram, &late(7.3), &[]).body().to_string();
    assert!(
        stuck.starts_with("  for the last 7 s no vCPU got anywhere;"),
        "{stuck}"
    );
    let report = report_of(&ram, &late(0.0), &[]);
    assert_eq!(report.summary, "the run did not finish in 0.6 s");
    let text = report.body().to_string();
    assert!(!text.contains("did not finish"), "{text}");
    assert!(
        text.starts_with("  it was getting on to the end: --timeout gives it more\n"),
        "{text}"
    );
    assert_eq!(text.matches("backtrace:").count(), 2, "{text}");
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["cause"], "did-not-finish");
    assert_eq!(json["seconds"], 0.6);
}

#[test]
fn the_code_at_rip_is_disassembled_up_to_the_end_of_what_is_mapped() {
    let (ram, cr3) = guest(&[0x0f, 0x0b, 0x48, 0x89, 0xc3, 0xc3]);
    let regs = Registers {
        rip: TEXT,
        ..Registers::default()
    };
    let report = report(&ram, vec![snapshot(0, cr3, regs)], &[]);
    let code = &report.vcpus[0].code;
    let shown: Vec<_> = code.iter().take(3).map(|line| line.text.as_str()).collect();
    assert_eq!(shown, ["ud2", "mov %rax,%rbx", "ret"]);
    assert_eq!(code[1].address, Hex(TEXT + 2));
    assert_eq!(code[1].bytes, "48 89 c3");

    // The kernel has one page of text: nothing can be read behind it.
    let space = code::Space { ram: &ram, cr3 };
    assert_eq!(space.read(TEXT + 0xffe, 15).len(), 2);
    assert!(space.read(u64::MAX, 15).is_empty());
}

#[test]
fn the_frame_pointers_are_followed_upwards_only() {
    let (ram, cr3) = guest(&[0x90]);
    let put = |offset: u64, value: u64| ram.write_value(0x8000 + offset, &value).unwrap();
    put(0x100, STACK + 0x200);
    put(0x108, TEXT + 0x10);
    put(0x200, STACK + 0x180); // downwards: the end
    put(0x208, TEXT + 0x20);
    let regs = Registers {
        rip: TEXT,
        rbp: STACK + 0x100,
        ..Registers::default()
    };
    let report = report(&ram, vec![snapshot(0, cr3, regs)], &[]);
    let addresses: Vec<_> = report.vcpus[0]
        .backtrace
        .iter()
        .map(|f| f.address.0)
        .collect();
    assert_eq!(addresses, [TEXT, TEXT + 0x10, TEXT + 0x20]);
}

/// Puts an entry frame as the kernel's entries build it at `offset` of the stack page.
fn put_entry(ram: &GuestRam, offset: u64, vector: u64, cs: u64, rip: u64, rbp: u64) {
    let mut words = [0; 24];
    (words[0], words[1]) = (rbp, rip);
    // r15 … rax, vector, error, rip, cs, rflags, rsp, ss
    words[2 + 10] = rbp;
    words[2 + 14] = 0x77; // rax
    (words[2 + 15], words[2 + 16]) = (vector, 2);
    (words[2 + 17], words[2 + 18]) = (rip, cs);
    for (word, at) in words.iter().zip((offset..).step_by(8)) {
        ram.write_value(0x8000 + at, word).unwrap();
    }
}

#[test]
fn the_chain_leads_through_a_fault_of_the_kernel_into_the_program() {
    let (ram, cr3) = guest(&[0x90, 0x48, 0x8b, 0x10]);
    let user_rbp = STACK + 0x40; // below: a program's stack lies where it wants to
    put_entry(&ram, 0x100, 14, 8, TEXT + 1, STACK + 0x300);
    put_entry(&ram, 0x300, 128, 0x23, 0x40_1000, user_rbp);
    for (offset, word) in [(0x40, 0), (0x48, 0x40_2000_u64)] {
        ram.write_value(0x8000 + offset, &word).unwrap();
    }
    let regs = Registers {
        rip: TEXT,
        rbp: STACK + 0x100,
        ..Registers::default()
    };
    let report = report(&ram, vec![snapshot(1, cr3, regs)], &[]);
    let vcpu = &report.vcpus[0];
    let addresses: Vec<_> = vcpu.backtrace.iter().map(|f| f.address.0).collect();
    assert_eq!(addresses, [TEXT, TEXT + 1, 0x40_1000, 0x40_2000]);
    let entries: Vec<_> = vcpu
        .backtrace
        .iter()
        .map(|f| f.entry.as_ref().map(|entry| (entry.vector, entry.cpl)))
        .collect();
    assert_eq!(entries, [None, Some((14, 0)), Some((128, 3)), None]);
    // The crash is about what faulted: its registers and its code.
    assert_eq!(vcpu.site, 1);
    assert_eq!(vcpu.regs().rax, 0x77);
    assert_eq!(vcpu.code[0].text, "mov (%rax),%rdx");
    assert!(vcpu.cr2_walk.is_some());

    // What does not repeat the link is no entry.
    ram.write_value(0x8000 + 0x100 + 8 * 12, &1_u64).unwrap();
    let report = self::report(&ram, vec![snapshot(1, cr3, regs)], &[]);
    assert_eq!(report.vcpus[0].backtrace[1].entry, None);
    assert_eq!(report.vcpus[0].site, 0);
}

#[test]
fn a_loop_of_frames_and_an_unaligned_one_end() {
    let (ram, cr3) = guest(&[0x90]);
    ram.write_value(0x8100, &(STACK + 0x100)).unwrap();
    ram.write_value(0x8108, &TEXT).unwrap();
    for (rbp, frames) in [(STACK + 0x100, 2), (STACK + 0x101, 1), (u64::MAX - 7, 1)] {
        let regs = Registers {
            rip: TEXT,
            rbp,
            ..Registers::default()
        };
        let report = report(&ram, vec![snapshot(0, cr3, regs)], &[]);
        assert_eq!(report.vcpus[0].backtrace.len(), frames, "{rbp:#x}");
    }
}

#[test]
fn a_jump_to_nowhere_shows_who_jumped() {
    let (ram, cr3) = guest(&[0x90]);
    ram.write_value(0x8ff0, &(TEXT + 5)).unwrap();
    let regs = Registers {
        rip: 0,
        rsp: STACK + 0xff0,
        ..Registers::default()
    };
    let report = report(&ram, vec![snapshot(0, cr3, regs)], &[]);
    assert_eq!(report.vcpus[0].backtrace[1].address, Hex(TEXT + 5));
    let text = report.to_string();
    assert!(text.contains("RIP cannot be read"), "{text}");
}

#[test]
fn the_text_has_the_crashed_vcpu_first_and_all_that_is_known() {
    let (ram, cr3) = guest(&[0x0f, 0x0b]);
    let event = |kind: u32, sequence| Event {
        kind,
        task: 4,
        args: [0x10, 0x20, 1, 0, 0x8000_0000_0000_0003],
        sequence,
        ..Event::default()
    };
    let events: Vec<_> = (0..30)
        .map(|sequence| event(EventKind::PteChange as u32, sequence))
        .chain([event(999, 30)])
        .collect();
    let regs = Registers {
        rip: TEXT,
        rax: 0x1122,
        ..Registers::default()
    };
    let report = report(
        &ram,
        vec![snapshot(0, cr3, regs), snapshot(1, cr3, regs)],
        &events,
    );
    let indices: Vec<_> = report
        .vcpus
        .iter()
        .map(|vcpu| vcpu.snapshot.index)
        .collect();
    assert_eq!(indices, [1, 0]);
    assert_eq!(report.vcpus[0].events.len(), EVENTS);
    let text = report.to_string();
    for part in [
        "The guest crashed: triple fault (vCPU 1)",
        "vCPU 1: CPL 0, last exit: shutdown (triple fault)",
        "rax 0000000000001122",
        "> ffffffff80200000  0f 0b",
        "ud2",
        "pte-change mm=16 gva=0x20 level=1 old=0x0 new=0x0(P W NX)",
        "kind-999",
        "CR2: ",
        "Last lines of the console:\n  one\n  two",
    ] {
        assert!(text.contains(part), "{part:?} is missing in\n{text}");
    }
}

#[test]
fn the_json_has_addresses_as_strings() {
    let (ram, cr3) = guest(&[0x0f, 0x0b]);
    let regs = Registers {
        rip: TEXT,
        ..Registers::default()
    };
    let report = report(&ram, vec![snapshot(1, cr3, regs)], &[]);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["cause"], "triple-fault");
    assert_eq!(json["vcpus"][0]["regs"]["rip"], "0xffffffff80200000");
    assert_eq!(json["vcpus"][0]["code"][0]["address"], "0xffffffff80200000");
    assert_eq!(json["vcpus"][0]["last_exit"]["reason"], "shutdown");
}

#[test]
fn a_machine_that_crashes_is_reported() {
    let config = MachineConfig {
        vcpus: 1,
        memory_bytes: MIN_MEMORY,
        kernel: KernelImage::Bytes(testing::kernel(&[0x0f, 0x0b])), // ud2
        ..MachineConfig::default()
    };
    let mut machine = Machine::with_user_image(config, &testing::user())
        .unwrap_or_else(|error| panic!("this test boots a guest on /dev/kvm: {error}"));
    let Stop::Crashed(crash) = machine.run_until(None).unwrap() else {
        panic!("no crash");
    };
    let text = render(&crash, &machine);
    assert!(text.contains("triple fault (vCPU 0)"), "{text}");
    assert!(text.contains("ud2"), "{text}");
}
