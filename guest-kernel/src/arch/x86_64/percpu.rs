//! Each CPU's own area, which its GS base points to at CPL 0, and the tables that the processor reads.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::mem::offset_of;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

use abi::channel::Control;
use abi::layout::{CHANNEL_STRIDE, DIRECT_MAP_BASE, MAX_CPUS};

use super::descriptors::{
    self, GDT_ENTRIES, GateStack, IDT_ENTRIES, KERNEL_CS, KERNEL_SS, Privilege, TSS_BYTES,
    TSS_SELECTOR, rflags,
};
use super::entry;
use super::registers::{msr, read_msr, write_msr};

/// Bytes of a CPU's first stack, on which its scheduler loop runs for good.
pub(super) const BOOT_STACK_BYTES: usize = 16 << 10;
/// Bytes of the stack for NMI, #DF and #MC. They share one: each is fatal, so a second one destroys at
/// most the first one's report.
const IST_STACK_BYTES: usize = 8 << 10;

/// Memory that the processor itself uses as a stack.
#[repr(C, align(16))]
pub(super) struct Stacks<const BYTES: usize>(UnsafeCell<[[u8; BYTES]; MAX_CPUS]>);

// SAFETY: no reference to the contents is ever made; each CPU's stack pointer stays in its own part.
unsafe impl<const BYTES: usize> Sync for Stacks<BYTES> {}

impl<const BYTES: usize> Stacks<BYTES> {
    const fn new() -> Self {
        Self(UnsafeCell::new([[0; BYTES]; MAX_CPUS]))
    }
    fn top(&self, cpu: usize) -> u64 {
        self.0.get() as u64 + ((cpu + 1) * BYTES) as u64
    }
}

pub(super) static BOOT_STACKS: Stacks<BOOT_STACK_BYTES> = Stacks::new();
static IST_STACKS: Stacks<IST_STACK_BYTES> = Stacks::new();

/// One CPU's area.
#[repr(C, align(64))]
struct PerCpu {
    cpu: u64,
    channel: *const Control,
    /// Where the system-call entry keeps the user's `rsp` for three instructions.
    user_rsp: u64,
    /// How often this CPU has waited ([`next_turn`]).
    turns: u64,
    gdt: [u64; GDT_ENTRIES],
    /// 64-bit TSS in words of 4 bytes, since its 8-byte fields are not aligned (SDM vol. 3A, 7.7).
    tss: [u32; TSS_BYTES / 4],
}

/// Offset in a CPU's area of the scratch word of the system-call entry.
pub(super) const USER_RSP: usize = offset_of!(PerCpu, user_rsp);
/// Offset in a CPU's area of `TSS.rsp0`: the stack for entries from CPL 3, by gate or by `SYSCALL`.
pub(super) const RSP0: usize = offset_of!(PerCpu, tss) + 4;
const TSS_IST1_WORD: usize = 0x24 / 4;
const TSS_IO_MAP_WORD: usize = 0x64 / 4;

struct Areas(UnsafeCell<[PerCpu; MAX_CPUS]>);

// SAFETY: area `i` is written by CPU `i` only, before it takes any interrupt, and later through the GS
// base of CPU `i`.
unsafe impl Sync for Areas {}

static AREAS: Areas = Areas(UnsafeCell::new(
    [const {
        PerCpu {
            cpu: 0,
            channel: core::ptr::null(),
            user_rsp: 0,
            turns: 0,
            gdt: [0; GDT_ENTRIES],
            tss: [0; TSS_BYTES / 4],
        }
    }; MAX_CPUS],
));

/// The IDT that all CPUs share.
static IDT: [[AtomicU64; 2]; IDT_ENTRIES] =
    [const { [AtomicU64::new(0), AtomicU64::new(0)] }; IDT_ENTRIES];

/// Operand of LGDT and LIDT.
#[repr(C, packed)]
struct TablePointer {
    limit: u16,
    base: u64,
}

/// Gives CPU `cpu` its area, its tables and its entry points. `channels`: GPA of CPU 0's channel.
///
/// # Safety
/// Runs first on CPU `cpu`, with interrupts off, and once.
pub(super) unsafe fn init(cpu: usize, channels: u64) {
    assert!(cpu < MAX_CPUS, "CPU {cpu}: this kernel has {MAX_CPUS}");
    let area = AREAS.0.get().cast::<PerCpu>().wrapping_add(cpu);
    let channel = DIRECT_MAP_BASE + channels + cpu as u64 * CHANNEL_STRIDE;
    let ist = IST_STACKS.top(cpu);
    let mut tss = [0; TSS_BYTES / 4];
    tss[TSS_IST1_WORD] = ist as u32;
    tss[TSS_IST1_WORD + 1] = (ist >> 32) as u32;
    // No I/O permission bitmap: its offset lies past the limit.
    tss[TSS_IO_MAP_WORD] = (TSS_BYTES as u32) << 16;
    // SAFETY: `cpu` is in range, and nobody else touches this CPU's area (the caller's promise). The
    // tables are statics, hold what the encodings' tests check, and keep the processor in the same
    // mode and at CPL 0. The null GS selector comes before the GS base, since loading it clears the
    // base. The entry points are the ones of `entry`.
    unsafe {
        area.write(PerCpu {
            cpu: cpu as u64,
            channel: channel as *const Control,
            user_rsp: 0,
            turns: 0,
            gdt: descriptors::gdt(&raw const (*area).tss as u64),
            tss,
        });
        load_gdt(&raw const (*area).gdt as u64);
        write_msr(msr::GS_BASE, area as u64);
        write_msr(msr::KERNEL_GS_BASE, 0);
        load_idt();
        write_msr(msr::STAR, descriptors::star());
        write_msr(msr::LSTAR, entry::syscall_entry());
        write_msr(msr::FMASK, rflags::SYSCALL_CLEARS);
    }
}

/// Loads the GDT at `base` and every segment register from it.
///
/// # Safety
/// A table of [`descriptors::gdt`] lies at `base` for good.
unsafe fn load_gdt(base: u64) {
    let pointer = TablePointer {
        limit: (GDT_ENTRIES * 8 - 1) as u16,
        base,
    };
    // SAFETY: the caller's promise; a far return is the way to load CS in 64-bit mode.
    unsafe {
        asm!(
            "lgdt [{pointer}]",
            "push {code}",
            "lea {scratch}, [rip + 2f]",
            "push {scratch}",
            "retfq",
            "2:",
            "mov ss, {data:e}",
            "xor {scratch:e}, {scratch:e}",
            "mov ds, {scratch:e}",
            "mov es, {scratch:e}",
            "mov fs, {scratch:e}",
            "mov gs, {scratch:e}",
            "ltr {tss:x}",
            pointer = in(reg) &raw const pointer,
            code = const KERNEL_CS,
            data = in(reg) u32::from(KERNEL_SS),
            tss = in(reg) TSS_SELECTOR,
            scratch = out(reg) _,
        );
    }
}

/// Fills the IDT and loads it. Every CPU writes the same values, so they need no order among them.
///
/// # Safety
/// Interrupts are off; the GDT is loaded.
unsafe fn load_idt() {
    const BREAKPOINT: usize = 3;
    const OVERFLOW: usize = 4;
    for (vector, handler) in entry::stubs() {
        let stack = match entry::may_come_anywhere(vector) {
            true => GateStack::Ist1,
            false => GateStack::Current,
        };
        let privilege = match vector {
            BREAKPOINT | OVERFLOW => Privilege::User,
            _ => Privilege::Kernel,
        };
        let [low, high] = descriptors::interrupt_gate(handler, stack, privilege);
        IDT[vector][0].store(low, Relaxed);
        IDT[vector][1].store(high, Relaxed);
    }
    let pointer = TablePointer {
        limit: (size_of_val(&IDT) - 1) as u16,
        base: IDT.as_ptr() as u64,
    };
    // SAFETY: the table is a static and complete.
    unsafe { asm!("lidt [{}]", in(reg) &raw const pointer, options(nostack, preserves_flags)) };
}

/// Puts the GS base right where a trap at CPL 0 came with a program's: without its area a CPU cannot even say what
/// happened, and the traps of its attempts would run over its stack and those of others.
pub(super) fn recover() {
    if read_msr(msr::GS_BASE).cast_signed() >= 0 {
        // SAFETY: the area's address is a negative one, a program's base never is, so the kernel's is in the other register.
        unsafe { asm!("swapgs", options(nomem, nostack, preserves_flags)) };
    }
}

/// The CPU that executes this.
#[inline]
pub(super) fn cpu() -> usize {
    let cpu: u64;
    // SAFETY: at CPL 0 the GS base is this CPU's area. Volatile (not `pure`): a thread may go on on
    // another CPU after a switch.
    unsafe {
        asm!("mov {}, gs:[{}]", out(reg) cpu, const offset_of!(PerCpu, cpu),
            options(nomem, nostack, preserves_flags));
    }
    cpu as usize
}

/// The control page of this CPU's channel.
#[inline]
pub(super) fn channel() -> *const Control {
    let channel: *const Control;
    // SAFETY: as for `cpu`.
    unsafe {
        asm!("mov {}, gs:[{}]", out(reg) channel, const offset_of!(PerCpu, channel),
            options(nomem, nostack, preserves_flags));
    }
    channel
}

/// Counts the turns of this CPU's waits.
#[inline]
pub(super) fn next_turn() -> u64 {
    let before: u64;
    // SAFETY: as for `cpu`; nobody else has the word, and one instruction takes no interrupt in between.
    unsafe {
        asm!("xadd gs:[{}], {}", const offset_of!(PerCpu, turns), inout(reg) 1u64 => before, options(nostack));
    }
    before
}

/// Entries from CPL 3 use the stack that ends at `top` from now on.
#[inline]
pub(super) fn set_kernel_stack(top: u64) {
    // SAFETY: as for `cpu`; the word is this CPU's `TSS.rsp0`, read only at the next entry.
    unsafe {
        asm!("mov gs:[{}], {}", const RSP0, in(reg) top, options(nostack, preserves_flags));
    }
}
