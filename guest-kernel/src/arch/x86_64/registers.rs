//! Single instructions: control registers, MSRs, ports, and the two windows in which the kernel takes
//! interrupts.
//!
//! The functions are safe where no argument can break memory safety on its own; a paging root or a
//! descriptor table can, so those are `unsafe`.

use core::arch::asm;

/// Model-specific registers (SDM vol. 4, table 2-2).
#[allow(missing_docs)] // the manual's own names
pub(super) mod msr {
    pub(in super::super) const APIC_BASE: u32 = 0x1b;
    pub(in super::super) const STAR: u32 = 0xc000_0081;
    pub(in super::super) const LSTAR: u32 = 0xc000_0082;
    pub(in super::super) const FMASK: u32 = 0xc000_0084;
    pub(in super::super) const GS_BASE: u32 = 0xc000_0101;
    pub(in super::super) const KERNEL_GS_BASE: u32 = 0xc000_0102;
}

/// Reads an MSR that exists.
pub(super) fn read_msr(register: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading an MSR of the list above has no side effect; one that the processor lacks would
    // be a fatal #GP, never a wrong value.
    unsafe {
        asm!("rdmsr", in("ecx") register, out("eax") low, out("edx") high,
            options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR.
///
/// # Safety
/// The new value keeps the machine as the rest of the kernel expects it: entry points exist, the GS
/// base is this CPU's area.
pub(super) unsafe fn write_msr(register: u32, value: u64) {
    // SAFETY: the caller's promise. Not `nomem`: an ICR write must come after the stores before it.
    unsafe {
        asm!("wrmsr", in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack, preserves_flags));
    }
}

/// CR2: the address of the last page fault.
pub(super) fn fault_address() -> u64 {
    let gva;
    // SAFETY: reading CR2 has no side effect.
    unsafe { asm!("mov {}, cr2", out(reg) gva, options(nomem, nostack, preserves_flags)) };
    gva
}

/// True where the processor has PCIDs (SDM vol. 2A, CPUID.01H:ECX bit 17).
pub(super) fn has_pcid() -> bool {
    const PCID: u32 = 1 << 17;
    core::arch::x86_64::__cpuid(1).ecx & PCID != 0
}

/// Switches PCIDs on: from now on the low 12 bits of CR3 are one, 0 at first.
///
/// # Panics
/// Where this processor has none.
///
/// # Safety
/// The low 12 bits of CR3 are 0: else it is #GP (SDM vol. 3A, 5.10.1).
pub(super) unsafe fn enable_pcid() {
    const PCIDE: u64 = 1 << 17;
    assert!(
        has_pcid(),
        "this CPU has no PCID (CPUID.01H:ECX bit 17), and CPU 0 has"
    );
    // SAFETY: the caller's promise; the other bits stay.
    unsafe {
        asm!("mov {cr4}, cr4", "or {cr4}, {pcide}", "mov cr4, {cr4}",
            cr4 = out(reg) _, pcide = const PCIDE, options(nostack));
    };
}

/// CR3: the address of the level-4 table, and the PCID where CR4.PCIDE is set.
pub(super) fn paging_root() -> u64 {
    let root;
    // SAFETY: reading CR3 has no side effect.
    unsafe { asm!("mov {}, cr3", out(reg) root, options(nomem, nostack, preserves_flags)) };
    root
}

/// Loads CR3, which flushes this CPU's non-global translations: those of the PCID that is loaded where
/// CR4.PCIDE is set, none where bit 63 is set too.
///
/// # Safety
/// The upper half below the table at `operand` is the kernel's, and its tables stay allocated while it is loaded;
/// the low 12 bits and bit 63 are 0 but where [`enable_pcid`] was called.
pub(super) unsafe fn load_paging_root(operand: u64) {
    // SAFETY: the caller's promise. Not `nomem`: page-table writes come before it, accesses after.
    unsafe { asm!("mov cr3, {}", in(reg) operand, options(nostack, preserves_flags)) };
}

/// INVLPG.
pub(super) fn invalidate_page(gva: u64) {
    // SAFETY: flushing more often than needed is always correct. Not `nomem`, as for CR3.
    unsafe { asm!("invlpg [{}]", in(reg) gva, options(nostack, preserves_flags)) };
}

/// Writes `value` to I/O port `port`. The machine's ports are the host's devices: none of them writes
/// to memory that Rust owns.
pub(super) fn out32(port: u16, value: u32) {
    // SAFETY: see above. Not `nomem`: the host reads channel words that were written before.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags));
    };
}

/// Writes `bytes` to I/O port `port`, one after the other: one instruction, one exit per byte.
pub(super) fn out_bytes(port: u16, bytes: &[u8]) {
    // SAFETY: reads exactly `bytes`; DF is clear (the ABI, and `cld` at each entry).
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rsi") bytes.as_ptr() => _,
            inout("rcx") bytes.len() => _, options(readonly, nostack, preserves_flags));
    }
}

/// A window with interrupts on, in which pending IPIs are taken. `sti` holds them off until the instruction
/// after it is done.
///
/// The window is one to eight pauses long, by the caller's `turn`: a host that emulates CPL 0 looks for interrupts
/// once in a number of instructions, and where a loop that waits has a length that divides the number, a
/// window of one length is missed for seconds.
pub(super) fn relax(turn: u64) {
    // SAFETY: at CPL 0 with IF = 0, as everywhere. Handlers only run kernel code that its callers
    // allow for (`Arch::relax`), and push below the red zone, hence the 128.
    unsafe {
        asm!(
            "lea rsp, [rsp - 128]",
            "sti",
            "2:",
            "pause",
            "dec {pauses}",
            "jns 2b",
            "cli",
            "lea rsp, [rsp + 128]",
            pauses = inout(reg) turn % 8 => _,
        );
    }
}

/// As [`relax`], with a load from `mmio` in the window, which is an exit to the host. A host that emulates
/// CPL 0 executes many instructions at a time and may see no window that closes again before it looks;
/// an exit makes it look. Returns what was loaded.
pub(super) fn relax_with_exit(mmio: *const u32) -> u32 {
    let loaded;
    // SAFETY: as for `relax`; the caller's address may be read at any time.
    unsafe {
        asm!(
            "lea rsp, [rsp - 128]",
            "sti",
            "pause",
            "mov eax, [{mmio}]",
            "nop",
            "cli",
            "lea rsp, [rsp + 128]",
            mmio = in(reg) mmio,
            out("eax") loaded,
        );
    }
    loaded
}

/// Halts until an interrupt was taken. None is lost: one that is already pending is held off by `sti`
/// until `hlt` is executing, and ends it (SDM vol. 2B, STI).
pub(super) fn wait_for_interrupt() {
    // SAFETY: as for `relax`.
    unsafe {
        asm!(
            "lea rsp, [rsp - 128]",
            "sti",
            "hlt",
            "cli",
            "lea rsp, [rsp + 128]",
        );
    }
}

/// Where a CPU that was interrupted at `rip` in the kernel goes on: one at the `hlt` of [`wait_for_interrupt`] has
/// halted. The shadow of `sti` keeps interrupts from coming there, but where #VMEXIT saves it for a
/// hypervisor to go on with, QEMU's VMRUN does not load it (7.2, `helper_vmrun`), and who goes back to
/// `hlt` then halts with nothing left to wake it.
pub(super) fn past_halt(rip: u64) -> u64 {
    const HLT: u8 = 0xf4;
    // SAFETY: an instruction of the kernel that was about to be executed can be read.
    let at_halt = unsafe { (rip as *const u8).read() } == HLT;
    rip + u64::from(at_halt)
}

/// Stops this CPU for good.
pub(super) fn halt_forever() -> ! {
    loop {
        // SAFETY: with IF = 0 nothing but an NMI or the host wakes it, and it halts again.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}
