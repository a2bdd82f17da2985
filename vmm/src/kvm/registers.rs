//! The registers with which a vCPU starts: pure tables, no KVM.
//!
//! 64-bit mode at CPL 0 without any descriptor table: segment caches are set directly, and an
//! exception before the kernel has loaded its IDT is a triple fault, which is reported as such.

use kvm_bindings::{kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};

use crate::boot::Boot;

/// Control register and EFER bits (SDM vol. 3A, 2.5 and 2.2.1).
#[allow(missing_docs)] // the architecture's own names
pub mod bits {
    pub const CR0_PE: u64 = 1 << 0;
    pub const CR0_MP: u64 = 1 << 1;
    pub const CR0_ET: u64 = 1 << 4;
    pub const CR0_NE: u64 = 1 << 5;
    pub const CR0_WP: u64 = 1 << 16;
    pub const CR0_PG: u64 = 1 << 31;
    pub const CR4_PAE: u64 = 1 << 5;
    pub const CR4_PGE: u64 = 1 << 7;
    pub const CR4_OSFXSR: u64 = 1 << 9;
    pub const CR4_OSXMMEXCPT: u64 = 1 << 10;
    pub const EFER_SCE: u64 = 1 << 0;
    pub const EFER_LME: u64 = 1 << 8;
    pub const EFER_LMA: u64 = 1 << 10;
    pub const EFER_NXE: u64 = 1 << 11;
    pub const APIC_BASE_BSP: u64 = 1 << 8;
    pub const APIC_BASE_ENABLE: u64 = 1 << 11;
}

/// Type field of a code segment: execute, read, accessed (SDM vol. 3A, table 3-1).
const TYPE_CODE: u8 = 0xb;
/// Type field of a data segment: read, write, accessed.
const TYPE_DATA: u8 = 0x3;
/// Type field of a busy 64-bit TSS (SDM vol. 3A, table 3-2): VM entry requires one in TR.
const TYPE_BUSY_TSS: u8 = 0xb;

/// General registers of vCPU `cpu` at the kernel's entry (the convention of
/// [`abi::boot::BootInfo`]).
#[must_use]
pub fn general(boot: &Boot, cpu: u32) -> kvm_regs {
    kvm_regs {
        rip: boot.entry,
        rdi: u64::from(cpu),
        rsi: boot.boot_info,
        rsp: 0,
        // Bit 1 is always set; interrupts are off.
        rflags: 1 << 1,
        ..kvm_regs::default()
    }
}

/// System registers of vCPU `cpu`: 64-bit mode on the boot page tables.
#[must_use]
pub fn system(boot: &Boot, cpu: u32) -> kvm_sregs {
    use bits::*;
    let code = kvm_segment {
        selector: 0x08,
        l: 1,
        ..flat(TYPE_CODE)
    };
    let data = kvm_segment {
        selector: 0x10,
        db: 1,
        ..flat(TYPE_DATA)
    };
    kvm_sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: kvm_segment {
            limit: 0x67,
            type_: TYPE_BUSY_TSS,
            present: 1,
            ..kvm_segment::default()
        },
        ldt: kvm_segment {
            unusable: 1,
            ..kvm_segment::default()
        },
        cr0: CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG,
        cr3: boot.pgd,
        cr4: CR4_PAE | CR4_PGE | CR4_OSFXSR | CR4_OSXMMEXCPT,
        efer: EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE,
        apic_base: abi::layout::LAPIC_GPA
            | APIC_BASE_ENABLE
            | if cpu == 0 { APIC_BASE_BSP } else { 0 },
        ..kvm_sregs::default()
    }
}

fn flat(type_: u8) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        type_,
        present: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    }
}

/// Model-specific registers of every vCPU.
pub const MSRS: &[kvm_msr_entry] = &[
    // IA32_MISC_ENABLE: fast string operations.
    msr(0x1a0, 1),
    // IA32_MTRR_DEF_TYPE: MTRRs on, write-back where none applies. Their reset state is uncached
    // memory (SDM vol. 3A, 12.11.2.1).
    msr(0x2ff, 1 << 11 | 6),
];

const fn msr(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        reserved: 0,
        data,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: Boot = Boot {
        entry: 0xffff_ffff_8020_0000,
        pgd: 0x30_0000,
        boot_info: 0xffff_8880_0000_1000,
        free_start: 0x40_0000,
    };

    #[test]
    fn entry_convention_is_the_one_of_boot_info() {
        let regs = general(&BOOT, 3);
        assert_eq!((regs.rip, regs.rdi), (BOOT.entry, 3));
        assert_eq!((regs.rsi, regs.rsp), (BOOT.boot_info, 0));
        assert_eq!(regs.rflags & 1 << 9, 0, "interrupts are off");
    }

    #[test]
    fn the_mode_is_64_bit_with_paging_nx_and_wp() {
        let sregs = system(&BOOT, 0);
        let long = bits::EFER_LME | bits::EFER_LMA;
        assert_eq!(sregs.efer & long, long);
        assert_ne!(sregs.efer & bits::EFER_NXE, 0);
        // Without it SYSCALL is #UD (an emulating host does not mind, hardware does).
        assert_ne!(sregs.efer & bits::EFER_SCE, 0);
        let paging = bits::CR0_PG | bits::CR0_PE | bits::CR0_WP;
        assert_eq!(sregs.cr0 & paging, paging);
        assert_ne!(sregs.cr4 & bits::CR4_PAE, 0);
        assert_eq!(sregs.cr3, BOOT.pgd);
        // L and D together are reserved (SDM vol. 3A, 3.4.5).
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.dpl), (1, 0, 0));
    }

    #[test]
    fn only_the_first_vcpu_is_the_bootstrap_processor() {
        assert_ne!(system(&BOOT, 0).apic_base & bits::APIC_BASE_BSP, 0);
        assert_eq!(system(&BOOT, 1).apic_base & bits::APIC_BASE_BSP, 0);
    }
}
