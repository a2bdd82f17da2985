use std::sync::atomic::Ordering::Relaxed;

use abi::layout::{
    HUGE_PAGE_SIZE, KERNEL_LOAD_GPA, KERNEL_VIRT_OFFSET, MIN_MEMORY, PAGE_SIZE, USER_ARGS_GVA,
    USER_DATA_GVA, USER_IMAGE_GVA,
};
use abi::pte::{Pte, PteFlags, index};
use abi::syscall::prot;
use proptest::prelude::*;

use super::testing::{R, RW, RX, executable, kernel, user};
use super::*;

const TEXT: u64 = KERNEL_VIRT_OFFSET + KERNEL_LOAD_GPA;

fn spec<'a>(kernel: &'a [u8], user: &'a [u8], program: &'a ProgramSpec) -> BootSpec<'a> {
    BootSpec {
        kernel,
        user,
        program,
        cpus: 2,
        interrupts: InterruptMode::Controlled,
        cmdline: "poison=off",
    }
}

/// The leaf entry for `gva` and its level.
fn leaf(ram: &GuestRam, pgd: u64, gva: u64) -> Option<(Pte, u8)> {
    let mut at = pgd;
    for level in (1..=4).rev() {
        let pte = Pte(ram.table(at).unwrap()[index(gva, level)].load(Relaxed));
        if !pte.is_present() {
            return None;
        }
        if pte.is_leaf(level) {
            return Some((pte, level));
        }
        at = pte.address();
    }
    None
}

/// A kernel with text, read-only data and data with a tail of zeroes, not page-sized any of them.
fn three_segments() -> Vec<u8> {
    executable(
        TEXT + 0x10,
        &[
            (TEXT, RX, &[0x90; 0x1800], 0x1800),
            (TEXT + 0x3000, R, b"rodata", 6),
            (TEXT + 0x5800, RW, b"data", 0x2000),
        ],
    )
}

#[test]
fn segments_are_where_the_kernel_was_linked_with_their_rights() {
    let ram = GuestRam::new(MIN_MEMORY).unwrap();
    let (kernel, user, program) = (three_segments(), user(), ProgramSpec::default());
    let boot = load(&ram, &spec(&kernel, &user, &program)).unwrap();
    assert_eq!(boot.entry, TEXT + 0x10);

    let rights = |gva| {
        leaf(&ram, boot.pgd, gva).map(|(pte, _)| {
            let flags = pte.flags();
            (
                pte.address(),
                flags.contains(PteFlags::WRITE),
                !flags.contains(PteFlags::NO_EXECUTE),
            )
        })
    };
    assert_eq!(rights(TEXT), Some((0x20_0000, false, true)));
    assert_eq!(rights(TEXT + 0x1000), Some((0x20_1000, false, true)));
    assert_eq!(rights(TEXT + 0x2000), None);
    assert_eq!(rights(TEXT + 0x3000), Some((0x20_3000, false, false)));
    assert_eq!(rights(TEXT + 0x5000), Some((0x20_5000, true, false)));
    assert_eq!(rights(TEXT + 0x7000), Some((0x20_7000, true, false)));
    assert_eq!(rights(TEXT + 0x8000), None);

    let mut data = [0xee; 6];
    ram.read(0x20_5800, &mut data).unwrap();
    assert_eq!(&data, b"data\0\0");
}

#[test]
fn the_direct_map_is_never_executable_and_code_has_no_writable_alias() {
    // A last chunk that is not whole, so that the tail takes 4 KiB pages.
    let memory = MIN_MEMORY + HUGE_PAGE_SIZE / 2;
    let ram = GuestRam::new(memory).unwrap();
    let (kernel, user, program) = (three_segments(), user(), ProgramSpec::default());
    let boot = load(&ram, &spec(&kernel, &user, &program)).unwrap();
    let mut huge = 0;
    for gpa in (0..memory).step_by(PAGE_SIZE as usize) {
        let (pte, level) = leaf(&ram, boot.pgd, DIRECT_MAP_BASE + gpa).expect("mapped");
        let mask = abi::pte::level_size(level) - 1;
        assert_eq!(pte.leaf_address(level) + (gpa & mask), gpa);
        assert!(
            pte.flags()
                .contains(PteFlags::NO_EXECUTE | PteFlags::SPECIAL)
        );
        assert!(!pte.flags().contains(PteFlags::USER));
        let read_only = (0x20_0000..0x20_2000).contains(&gpa) || gpa == 0x20_3000;
        assert_eq!(
            pte.flags().contains(PteFlags::WRITE),
            !read_only,
            "{gpa:#x}"
        );
        huge += u64::from(level == 2);
    }
    assert!(huge * PAGE_SIZE >= memory - 2 * HUGE_PAGE_SIZE);
    assert_eq!(leaf(&ram, boot.pgd, DIRECT_MAP_BASE + memory), None);
    assert_eq!(leaf(&ram, boot.pgd, USER_IMAGE_GVA), None);
}

#[test]
fn the_local_apic_is_mapped_uncached() {
    let ram = GuestRam::new(MIN_MEMORY).unwrap();
    let (kernel, user, program) = (kernel(&[0xf4]), user(), ProgramSpec::default());
    let boot = load(&ram, &spec(&kernel, &user, &program)).unwrap();
    let (pte, level) = leaf(&ram, boot.pgd, LAPIC_GVA).unwrap();
    assert_eq!((pte.address(), level), (LAPIC_GPA, 1));
    assert!(pte.flags().contains(
        PteFlags::CACHE_DISABLE | PteFlags::WRITE_THROUGH | PteFlags::WRITE | PteFlags::NO_EXECUTE
    ));
}

#[test]
fn boot_info_describes_the_machine_and_the_first_process() {
    let ram = GuestRam::new(MIN_MEMORY).unwrap();
    let kernel = kernel(&[0xf4]);
    let user = executable(
        USER_IMAGE_GVA + 0x123,
        &[
            (USER_IMAGE_GVA + 0x100, RX, &[0x90; 0x100], 0x100),
            (USER_IMAGE_GVA + 0x1000, RW, b"xy", 0x1001),
        ],
    );
    let program = ProgramSpec {
        name: "smoke".into(),
        args: vec![("rounds".into(), "3".into())],
        data: Some(vec![7; 5000]),
    };
    let boot = load(&ram, &spec(&kernel, &user, &program)).unwrap();
    let info: BootInfo = ram.read_value(BOOT_INFO_GPA).unwrap();
    assert_eq!(info.magic, MAGIC);
    assert_eq!(info.layout_hash, abi::layout_hash());
    assert_eq!((info.cpus, info.interrupts), (2, 1));
    assert_eq!((info.memory_bytes, info.boot_pgd), (MIN_MEMORY, boot.pgd));
    assert_eq!(info.free_start, boot.free_start);
    assert_eq!(info.user_entry, USER_IMAGE_GVA + 0x123);
    assert_eq!(&info.cmdline[..info.cmdline_len as usize], b"poison=off");
    assert_eq!((info.args_len, info.data_len), (15, 5000));

    let segments = &info.segments[..info.nr_segments as usize];
    let shape: Vec<_> = segments.iter().map(|s| (s.gva, s.bytes, s.prot)).collect();
    let (r, w, x) = (prot::READ, prot::WRITE, prot::EXEC);
    assert_eq!(
        shape,
        [
            (USER_IMAGE_GVA, 0x1000, r | x),
            (USER_IMAGE_GVA + 0x1000, 0x2000, r | w),
            (USER_ARGS_GVA, 0x1000, r),
            (USER_DATA_GVA, 0x2000, r),
        ]
    );
    // Frames of their own, below free_start.
    let mut next = 0;
    for segment in segments {
        assert!(segment.gpa >= next);
        next = segment.gpa + segment.bytes;
    }
    assert_eq!(next, boot.free_start);
    let mut bytes = [0; 16];
    ram.read(segments[2].gpa, &mut bytes).unwrap();
    assert_eq!(&bytes, b"smoke\0rounds=3\0\0");
    ram.read(segments[0].gpa + 0xf8, &mut bytes).unwrap();
    assert_eq!(bytes, *b"\0\0\0\0\0\0\0\0\x90\x90\x90\x90\x90\x90\x90\x90");
}

#[test]
fn what_is_no_kernel_is_refused_with_the_reason() {
    let ram = GuestRam::new(MIN_MEMORY).unwrap();
    let (good, user, program) = (three_segments(), user(), ProgramSpec::default());
    let refuse = |kernel: &[u8]| match load(&ram, &spec(kernel, &user, &program)) {
        Err(BootError::Kernel(error)) => error,
        other => panic!("{other:?}"),
    };
    assert!(matches!(refuse(b"#!/bin/sh\n"), ElfError::NotElf(_)));
    assert!(matches!(refuse(b""), ElfError::NotElf(_)));

    let mut arm = good.clone();
    arm[18] = 183;
    assert_eq!(refuse(&arm), ElfError::WrongMachine { found: 183 });
    let mut pie = good.clone();
    pie[16] = 3;
    assert_eq!(refuse(&pie), ElfError::NotExecutable { found: 3 });
    assert!(matches!(refuse(&good[..200]), ElfError::Damaged(_)));

    let low = executable(0x40_0000, &[(0x40_0000, RX, &[0xf4], 1)]);
    assert!(matches!(
        refuse(&low),
        ElfError::WrongAddress {
            found: 0x40_0000,
            ..
        }
    ));
    let entry = executable(TEXT + 8, &[(TEXT, RX, &[0xf4], 1)]);
    assert_eq!(refuse(&entry), ElfError::BadEntry(TEXT + 8));
    let shared = executable(TEXT, &[(TEXT, RX, &[0xf4], 1), (TEXT + 0x800, RW, &[0], 1)]);
    assert_eq!(refuse(&shared), ElfError::SharedPage(TEXT));
    let both = executable(TEXT, &[(TEXT, RX | RW, &[0xf4], 1)]);
    assert_eq!(refuse(&both), ElfError::WritableCode(TEXT));
    let wraps = executable(TEXT, &[(TEXT, RX, &[0xf4], u64::MAX - 1)]);
    assert!(matches!(refuse(&wraps), ElfError::Damaged(_)));
    assert_eq!(refuse(&executable(0, &[])), ElfError::Empty);
    let mut moved = good.clone();
    moved[64 + 24] ^= 0x10; // p_paddr of the first program header
    assert!(matches!(refuse(&moved), ElfError::WrongPhysical { .. }));
}

#[test]
fn what_does_not_fit_is_refused() {
    let ram = GuestRam::new(MIN_MEMORY).unwrap();
    let (small, user) = (kernel(&[0xf4]), user());
    let large = executable(TEXT, &[(TEXT, RX, &[0xf4], MIN_MEMORY)]);
    let program = ProgramSpec::default();
    assert!(matches!(
        load(&ram, &spec(&large, &user, &program)),
        Err(BootError::DoesNotFit {
            what: "kernel image",
            ..
        })
    ));
    let program = ProgramSpec {
        data: Some(vec![0; MIN_MEMORY as usize]),
        ..ProgramSpec::default()
    };
    assert!(matches!(
        load(&ram, &spec(&small, &user, &program)),
        Err(BootError::DoesNotFit {
            what: "program's data",
            ..
        })
    ));
    let program = ProgramSpec {
        args: vec![("k".into(), "v".repeat(5000))],
        ..ProgramSpec::default()
    };
    assert!(matches!(
        load(&ram, &spec(&small, &user, &program)),
        Err(BootError::ArgumentsTooLong { .. })
    ));
    let program = ProgramSpec {
        name: "a\0b".into(),
        ..ProgramSpec::default()
    };
    assert!(matches!(
        load(&ram, &spec(&small, &user, &program)),
        Err(BootError::ArgumentWithNul(_))
    ));
    let program = ProgramSpec::default();
    let cmdline = "x".repeat(MAX_CMDLINE + 1);
    let spec = BootSpec {
        cmdline: &cmdline,
        ..spec(&small, &user, &program)
    };
    assert!(matches!(
        load(&ram, &spec),
        Err(BootError::CommandLineTooLong { .. })
    ));
}

#[test]
fn a_kernel_file_that_is_not_there_is_named() {
    let error = KernelImage::File("/nowhere/kernel".into())
        .bytes()
        .unwrap_err();
    assert!(error.to_string().contains("/nowhere/kernel"));
}

proptest! {
    /// A hostile kernel file never makes the loader panic.
    #[test]
    fn damaged_files_are_refused_or_loaded(at in 0usize..260, byte: u8, cut in 0usize..8000) {
        let ram = GuestRam::new(MIN_MEMORY).unwrap();
        let (mut kernel, user, program) = (three_segments(), user(), ProgramSpec::default());
        kernel[at] = byte;
        kernel.truncate(kernel.len().saturating_sub(cut));
        if let Ok(boot) = load(&ram, &spec(&kernel, &user, &program)) {
            let (pte, _) = leaf(&ram, boot.pgd, boot.entry).expect("the entry is mapped");
            prop_assert!(!pte.flags().intersects(PteFlags::NO_EXECUTE | PteFlags::WRITE));
        }
    }
}
