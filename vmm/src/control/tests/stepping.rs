//! Single-stepping.

use super::*;

/// An instruction whose access KVM emulates is a step as any other is, on every host: a window's schedule counts them.
#[test]
fn every_instruction_is_a_step_and_so_is_one_that_exits() {
    let mut load_lapic = vec![0x48, 0xbb]; // mov rbx, LAPIC_GVA
    load_lapic.extend(LAPIC_GVA.to_le_bytes());
    let instructions: [&[u8]; 12] = [
        &load_lapic,
        &[0x8b, 0x8b, 0x30, 0, 0, 0], // mov ecx, [rbx + version]: a read of MMIO
        &[0x90],
        &[0x89, 0x8b, 0xb0, 0, 0, 0], // mov [rbx + EOI], ecx: writes to MMIO, one after the other
        &[0x89, 0x8b, 0xb0, 0, 0, 0],
        &[0x90],
        &[0x66, 0xba, 0xf8, 0x03], // mov dx, SERIAL
        &[0xb0, b'x'],             // mov al, 'x'
        &[0xee],                   // out dx, al
        &[0xee],
        &[0x89, 0x8b, 0xb0, 0, 0, 0],
        &[0xf4], // hlt
    ];
    let starts: Vec<u64> = instructions
        .iter()
        .scan(TEXT, |at, bytes| {
            let start = *at;
            *at += bytes.len() as u64;
            Some(start)
        })
        .collect();
    for every in [1, 2, 5] {
        let mut machine = machine(MachineConfig {
            interrupts: Interrupts::Controlled,
            ..config(&instructions.concat())
        });
        for step in starts.iter().copied().skip(every).step_by(every) {
            machine.single_step(0, Some(every as u64)).unwrap();
            let stop = machine.run_until(LONG).unwrap();
            assert_eq!(stop, Stop::Stepped { vcpu: 0, rip: step }, "{every}");
            assert_eq!(machine.single_step(0, None).unwrap(), every as u64);
        }
    }
}
