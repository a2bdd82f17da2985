//! What the guest images may contain, proved from their disassembly.
//!
//! The kernel must run where CPL 0 is emulated by KVM (docs/hosts.md): no SSE, none of the
//! instructions that the emulator refuses. And its `#PF` and IPI gates use the interrupted stack,
//! which is safe only because no code outside the two places that make room keeps data below `rsp`
//! while an exception can come; that claim is the kernel's (`arch::x86_64`), the images' part of it,
//! that interrupts are enabled in exactly those places, is checked here.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use object::{Object, ObjectSection, ObjectSegment, SectionFlags, SegmentFlags, elf};

const KERNEL: &[u8] = include_bytes!(env!("STALEMATE_KERNEL_ELF"));
const USER: &[u8] = include_bytes!(env!("STALEMATE_USER_ELF"));

/// Every instruction of the executable sections of `image`.
fn disassemble(image: &[u8]) -> Vec<Instruction> {
    let file = object::File::parse(image).expect("the image is an ELF file");
    file.sections()
        .filter(|section| {
            matches!(section.flags(), SectionFlags::Elf { sh_flags } if sh_flags & u64::from(elf::SHF_EXECINSTR) != 0)
        })
        .flat_map(|section| {
            let code = section.data().expect("section data").to_vec();
            Decoder::with_ip(64, &code, section.address(), DecoderOptions::NONE)
                .into_iter()
                .collect::<Vec<_>>()
        })
        .collect()
}

fn uses_vector_register(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|operand| {
        let register = instruction.op_register(operand);
        instruction.op_kind(operand) == OpKind::Register
            && (register.is_vector_register() || register.is_mm() || register.is_st())
    })
}

#[test]
fn the_images_use_no_vector_or_fpu_register() {
    for (name, image) in [("kernel", KERNEL), ("user", USER)] {
        let code = disassemble(image);
        assert!(
            code.len() > 1000,
            "the {name} image disassembles to something"
        );
        let found = code
            .iter()
            .find(|instruction| uses_vector_register(instruction));
        assert_eq!(found, None, "in the {name} image");
    }
}

#[test]
fn the_kernel_uses_no_instruction_that_an_emulating_host_refuses() {
    let refused = [
        Mnemonic::Popcnt,
        Mnemonic::Cmpxchg16b,
        Mnemonic::Rdtscp,
        Mnemonic::Xsave,
        Mnemonic::Xgetbv,
        Mnemonic::Invpcid,
        Mnemonic::Ldmxcsr,
        Mnemonic::Stac,
        Mnemonic::Clac,
        Mnemonic::Int,
        Mnemonic::Int3,
        Mnemonic::Andn,
        Mnemonic::Tzcnt,
        Mnemonic::Lzcnt,
        Mnemonic::Shlx,
        Mnemonic::Shrx,
        Mnemonic::Sarx,
        Mnemonic::Mulx,
        Mnemonic::Pdep,
        Mnemonic::Pext,
    ];
    let found: Vec<_> = disassemble(KERNEL)
        .into_iter()
        .filter(|instruction| refused.contains(&instruction.mnemonic()))
        .map(|instruction| format!("{:#x} {instruction}", instruction.ip()))
        .collect();
    assert!(found.is_empty(), "{found:#?}");
}

/// `sti` stands only after the interrupted stack was moved past a possible red zone.
#[test]
fn interrupts_are_enabled_only_below_the_red_zone() {
    let code = disassemble(KERNEL);
    let windows: Vec<_> = code
        .iter()
        .enumerate()
        .filter(|(_, at)| at.mnemonic() == Mnemonic::Sti)
        .collect();
    assert!(!windows.is_empty(), "the kernel opens interrupt windows");
    for (index, sti) in windows {
        let before = &code[index.saturating_sub(3)..index];
        let room = before.iter().any(|instruction| {
            let down = match instruction.mnemonic() {
                Mnemonic::Sub => instruction.immediate(1) as i64,
                Mnemonic::Lea => -(instruction.memory_displacement64() as i64),
                // add rsp, -128 is the shorter encoding.
                Mnemonic::Add => -(instruction.immediate(1) as i64),
                _ => 0,
            };
            instruction.op0_register() == Register::RSP && down >= 128
        });
        assert!(room, "sti at {:#x} may clobber a red zone", sti.ip());
    }
}

#[test]
fn no_segment_is_both_writable_and_executable() {
    for (name, image) in [("kernel", KERNEL), ("user", USER)] {
        let file = object::File::parse(image).expect("the image is an ELF file");
        for segment in file.segments() {
            let SegmentFlags::Elf { p_flags } = segment.flags() else {
                panic!("{name} is not ELF")
            };
            assert_ne!(
                p_flags & (elf::PF_W | elf::PF_X),
                elf::PF_W | elf::PF_X,
                "{name} segment at {:#x}",
                segment.address()
            );
            assert_eq!(
                segment.address() % 4096,
                0,
                "{name} segment is page aligned"
            );
        }
    }
}
