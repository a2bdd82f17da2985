//! Encodings of segment descriptors, gates and the MSRs that go with them. Pure functions.

/// Selector of the kernel's code segment. `SYSCALL` takes the stack segment from the next entry, which
/// fixes the order of the table (SDM vol. 2B, SYSCALL).
pub const KERNEL_CS: u16 = 0x08;
/// Selector of the kernel's data segment.
pub const KERNEL_SS: u16 = 0x10;
/// Selector of the user data segment, with RPL 3.
pub const USER_SS: u16 = 0x18 | 3;
/// Selector of the user code segment, with RPL 3.
pub const USER_CS: u16 = 0x20 | 3;
/// Selector of the task-state segment, whose descriptor takes two entries.
pub const TSS_SELECTOR: u16 = 0x28;
/// Entries of a GDT.
pub const GDT_ENTRIES: usize = 7;
/// Entries of the IDT.
pub const IDT_ENTRIES: usize = 256;
/// Bytes of a 64-bit TSS without an I/O permission bitmap.
pub const TSS_BYTES: usize = 104;

/// Who may use a descriptor: its DPL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Privilege {
    /// CPL 0 only.
    Kernel = 0,
    /// CPL 3 too.
    User = 3,
}

/// The stack that a gate switches to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum GateStack {
    /// The current one, or `TSS.rsp0` where CPL changes.
    Current = 0,
    /// The first IST stack, always.
    Ist1 = 1,
}

// Bits of a segment descriptor (SDM vol. 3A, 3.4.5). Accessed is set from the start: the processor
// never has to write to the table.
const ACCESSED: u64 = 1 << 40;
const WRITABLE_OR_READABLE: u64 = 1 << 41;
const EXECUTABLE: u64 = 1 << 43;
const NOT_SYSTEM: u64 = 1 << 44;
const PRESENT: u64 = 1 << 47;
const LONG: u64 = 1 << 53;
const DPL_SHIFT: u32 = 45;

/// A 64-bit code segment.
#[must_use]
pub const fn code_segment(privilege: Privilege) -> u64 {
    data_segment(privilege) | EXECUTABLE | LONG
}

/// A writable data segment (base and limit mean nothing in 64-bit mode).
#[must_use]
pub const fn data_segment(privilege: Privilege) -> u64 {
    ACCESSED | WRITABLE_OR_READABLE | NOT_SYSTEM | PRESENT | (privilege as u64) << DPL_SHIFT
}

/// The two entries of an available 64-bit TSS at `base` (SDM vol. 3A, 7.2.3).
#[must_use]
pub const fn tss_descriptor(base: u64) -> [u64; 2] {
    const AVAILABLE_TSS: u64 = 9 << 40;
    let limit = TSS_BYTES as u64 - 1;
    [
        limit | (base & 0xff_ffff) << 16 | AVAILABLE_TSS | PRESENT | (base >> 24 & 0xff) << 56,
        base >> 32,
    ]
}

/// The GDT of a CPU whose TSS lies at `tss`.
#[must_use]
pub const fn gdt(tss: u64) -> [u64; GDT_ENTRIES] {
    let [tss_low, tss_high] = tss_descriptor(tss);
    [
        0,
        code_segment(Privilege::Kernel),
        data_segment(Privilege::Kernel),
        data_segment(Privilege::User),
        code_segment(Privilege::User),
        tss_low,
        tss_high,
    ]
}

/// The two words of a 64-bit interrupt gate to `handler` (SDM vol. 3A, 6.14.1). `privilege`: who may
/// raise the vector with an instruction (`int3`).
#[must_use]
pub const fn interrupt_gate(handler: u64, stack: GateStack, privilege: Privilege) -> [u64; 2] {
    const INTERRUPT_GATE: u64 = 0xe << 40;
    [
        (handler & 0xffff)
            | (KERNEL_CS as u64) << 16
            | (stack as u64) << 32
            | INTERRUPT_GATE
            | (privilege as u64) << DPL_SHIFT
            | PRESENT
            | (handler >> 16 & 0xffff) << 48,
        handler >> 32,
    ]
}

/// IA32_STAR: `SYSCALL` loads [`KERNEL_CS`] and [`KERNEL_SS`]; `SYSRET`, which the kernel does not use,
/// would load [`USER_CS`] and [`USER_SS`].
#[must_use]
pub const fn star() -> u64 {
    (KERNEL_CS as u64) << 32 | (USER_CS as u64 - 16) << 48
}

/// Bits of RFLAGS.
#[allow(missing_docs)] // the architecture's own names
pub mod rflags {
    pub const CF: u64 = 1 << 0;
    pub const RESERVED_ONE: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const AC: u64 = 1 << 18;
    pub const ID: u64 = 1 << 21;

    /// What a program may set as it likes.
    pub const USER: u64 = CF | PF | AF | ZF | SF | TF | DF | OF | AC | ID;
    /// What `SYSCALL` clears (IA32_FMASK). All of it, as Linux does (`syscall_init`): a stray NT would
    /// make the kernel's own `iretq` fault.
    pub const SYSCALL_CLEARS: u64 = USER | IF | IOPL | NT | RF;
}

/// RFLAGS with which a program goes on that asks for `wanted`: its own bits, interrupts on, no I/O
/// privilege, no NT.
#[must_use]
pub const fn user_rflags(wanted: u64) -> u64 {
    wanted & rflags::USER | rflags::IF | rflags::RESERVED_ONE
}

/// True for the exceptions that push an error code (SDM vol. 3A, table 6-1; AMD's #VC and #SX).
#[must_use]
pub const fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

/// The manual's name of an exception.
#[must_use]
pub const fn exception_name(vector: u64) -> &'static str {
    match vector {
        0 => "#DE",
        1 => "#DB",
        2 => "NMI",
        3 => "#BP",
        4 => "#OF",
        5 => "#BR",
        6 => "#UD",
        7 => "#NM",
        8 => "#DF",
        10 => "#TS",
        11 => "#NP",
        12 => "#SS",
        13 => "#GP",
        14 => "#PF",
        16 => "#MF",
        17 => "#AC",
        18 => "#MC",
        19 => "#XM",
        20 => "#VE",
        21 => "#CP",
        _ => "unknown exception",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The values that every 64-bit kernel's table shows (Linux's `gdt_page`, with A set).
    #[test]
    fn segments_are_the_well_known_values() {
        assert_eq!(code_segment(Privilege::Kernel), 0x0020_9b00_0000_0000);
        assert_eq!(data_segment(Privilege::Kernel), 0x0000_9300_0000_0000);
        assert_eq!(code_segment(Privilege::User), 0x0020_fb00_0000_0000);
        assert_eq!(data_segment(Privilege::User), 0x0000_f300_0000_0000);
    }

    #[test]
    fn selectors_name_the_entries_of_the_table() {
        let table = gdt(0);
        let entry = |selector: u16| table[usize::from(selector >> 3)];
        assert_eq!(entry(KERNEL_CS), code_segment(Privilege::Kernel));
        assert_eq!(entry(KERNEL_SS), data_segment(Privilege::Kernel));
        assert_eq!(entry(USER_CS), code_segment(Privilege::User));
        assert_eq!(entry(USER_SS), data_segment(Privilege::User));
        assert_eq!(entry(TSS_SELECTOR), tss_descriptor(0)[0]);
    }

    #[test]
    fn star_gives_the_selectors_that_syscall_and_sysret_derive_from_it() {
        let syscall = (star() >> 32) as u16;
        assert_eq!((syscall, syscall + 8), (KERNEL_CS, KERNEL_SS));
        let sysret = (star() >> 48) as u16;
        assert_eq!((sysret + 16, sysret + 8), (USER_CS, USER_SS));
        assert_eq!(star() as u32, 0);
    }

    #[test]
    fn a_program_gets_neither_io_privilege_nor_nt_nor_masked_interrupts() {
        assert_eq!(user_rflags(u64::MAX), 0x24_0fd7);
        assert_eq!(user_rflags(0), 0x202);
        assert_eq!(rflags::SYSCALL_CLEARS, 0x25_7fd5); // Linux 6.18, syscall_init
    }

    #[test]
    fn error_codes_as_in_table_6_1() {
        let with: Vec<u8> = (0..=255).filter(|v| has_error_code(*v)).collect();
        assert_eq!(with, [8, 10, 11, 12, 13, 14, 17, 21, 29, 30]);
    }

    proptest! {
        #[test]
        fn gate_fields_decode_to_what_was_encoded(handler: u64, ist: bool, user: bool) {
            let stack = if ist { GateStack::Ist1 } else { GateStack::Current };
            let privilege = if user { Privilege::User } else { Privilege::Kernel };
            let [low, high] = interrupt_gate(handler, stack, privilege);
            prop_assert_eq!((low & 0xffff) | (low >> 48) << 16 | high << 32, handler);
            prop_assert_eq!(low >> 16 & 0xffff, u64::from(KERNEL_CS));
            prop_assert_eq!(low >> 32 & 0xff, u64::from(ist));
            let dpl = if user { 3 } else { 0 };
            prop_assert_eq!(low >> 40 & 0xff, 0x8e | dpl << 5);
        }

        #[test]
        fn tss_descriptor_fields_decode_to_what_was_encoded(base: u64) {
            let [low, high] = tss_descriptor(base);
            prop_assert_eq!((low >> 16 & 0xff_ffff) | (low >> 56) << 24 | high << 32, base);
            prop_assert_eq!((low & 0xffff) | (low >> 32 & 0xf_0000), 103);
            prop_assert_eq!(low >> 40 & 0xff, 0x89);
            prop_assert_eq!(low >> 52 & 0xf, 0);
        }
    }
}
