//! Every way into and out of the kernel, in assembly.
//!
//! All entries build one [`EntryFrame`], of an interrupted kernel too, and call Rust:
//!
//! ```text
//!   top of stack ->  ss rsp rflags cs rip     pushed by the processor, or by `syscall`
//!                    error vector             pushed by the processor or the stub
//!                    rax rcx … r15            pushed by `save!`
//!                    rip, rbp                 the interrupted ones again  <- rbp
//! ```
//!
//! From CPL 3 the stack was empty, so a task's [`UserFrame`] is always the topmost 176 bytes of its
//! kernel stack.
//!
//! Always `iretq`, never `sysretq`: it works on every host, restores every register, and has none of
//! SYSRET's traps with non-canonical addresses.

use core::arch::naked_asm;

use abi::objects::UserFrame;

use super::descriptors::{USER_CS, USER_SS, has_error_code};
use super::percpu::{RSP0, USER_RSP};
use super::registers::msr;
use super::trap;

/// [`UserFrame::vector`] of a system call: no exception has it.
pub(super) const SYSCALL_VECTOR: u64 = 0x80;
/// First of the vectors that IPIs may have, up to 0xff (the spurious vector).
pub(super) const FIRST_IPI: u64 = 0xf0;

const DOUBLE_FAULT: usize = 8;
const NMI: usize = 2;
const MACHINE_CHECK: usize = 18;

/// NMI, #DF and #MC: may arrive before `swapgs` or on a bad stack.
pub(super) const fn may_come_anywhere(vector: usize) -> bool {
    matches!(vector, NMI | DOUBLE_FAULT | MACHINE_CHECK)
}

/// What lies on a kernel stack while an entry is handled. The two words below the registers look like
/// the frame of a call from the interrupted code, so the chain of frame pointers leads from any handler
/// through the kernel into the program, and the host can unwind it.
#[repr(C)]
pub(super) struct EntryFrame {
    pub(super) link_rbp: u64,
    pub(super) link_rip: u64,
    pub(super) user: UserFrame,
}

/// Pushes an [`EntryFrame`] from `rax` down and passes it to the call that follows. DF is the
/// interrupted code's until `cld`, and the ABI wants it clear.
macro_rules! save {
    () => {
        "push rax
         push rcx
         push rdx
         push rbx
         push rbp
         push rsi
         push rdi
         push r8
         push r9
         push r10
         push r11
         push r12
         push r13
         push r14
         push r15
         cld
         push [rsp + 17 * 8]
         push rbp
         mov rbp, rsp
         mov rdi, rsp"
    };
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<EntryFrame>() == 24 * 8);
    assert!(offset_of!(UserFrame, r15) == 0);
    assert!(offset_of!(UserFrame, rax) == 14 * 8);
    assert!(offset_of!(UserFrame, vector) == 15 * 8);
    assert!(offset_of!(UserFrame, rip) == 17 * 8);
    assert!(offset_of!(UserFrame, ss) == 21 * 8);
};

/// Gate of `VECTOR`: makes the stack look the same whether or not there is an error code.
#[unsafe(naked)]
extern "sysv64" fn stub<const VECTOR: usize>() {
    naked_asm!(
        ".if {has_error_code} == 0",
        "push 0",
        ".endif",
        "push {vector}",
        ".if {anywhere}",
        "jmp {fatal_entry}",
        ".else",
        "jmp {entry}",
        ".endif",
        has_error_code = const has_error_code(VECTOR as u8) as u8,
        vector = const VECTOR,
        anywhere = const may_come_anywhere(VECTOR) as u8,
        fatal_entry = sym fatal_entry,
        entry = sym entry,
    )
}

macro_rules! stubs_of {
    ($($vector:literal)+) => {
        /// Vectors that have a gate, with the gate's address. The others stay empty: nothing
        /// sends them, and an `int n` of a program ends in #GP either way.
        pub(super) fn stubs() -> impl Iterator<Item = (usize, u64)> {
            static STUBS: &[(usize, extern "sysv64" fn())] = &[$(($vector, stub::<$vector>)),+];
            STUBS.iter().map(|(vector, stub)| (*vector, *stub as usize as u64))
        }
    };
}
stubs_of!(
    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
    0xf0 0xf1 0xf2 0xf3 0xf4 0xf5 0xf6 0xf7 0xf8 0xf9 0xfa 0xfb 0xfc 0xfd 0xfe 0xff
);

/// Exceptions and interrupts, with vector and error code on the stack.
///
/// An IPI where interrupts are off is one that QEMU 7.2 delivers twice: its VMRUN hands an injected interrupt to the
/// guest and leaves it noted as an exception to come (`helper_vmrun`, `cs->exception_index`), which its main loop
/// then delivers too if something asks for the loop before the guest's next exit, that is, somewhere
/// between the gate and the end of interrupt. The second one goes back to the first.
#[unsafe(naked)]
extern "sysv64" fn entry() {
    naked_asm!(
        "test byte ptr [rsp + 3 * 8], 3", // CPL of the interrupted code, in its CS
        "jz 3f",
        "swapgs",
        "2:",
        save!(),
        "call {trap}",
        "jmp {leave}",
        "3:",
        "cmp qword ptr [rsp], {first_ipi}",
        "jb 2b",
        "test byte ptr [rsp + 4 * 8 + 1], 2", // IF, in the interrupted code's RFLAGS
        "jnz 2b",
        "add rsp, 16",
        "iretq",
        first_ipi = const FIRST_IPI,
        trap = sym trap::trap,
        leave = sym leave,
    )
}

/// NMI, #DF and #MC: the GS base tells whether `swapgs` has already run (the kernel's is a negative
/// address, a program's never is), as in Linux's `paranoid_entry`.
#[unsafe(naked)]
extern "sysv64" fn fatal_entry() {
    naked_asm!(
        save!(),
        "mov ecx, {gs_base}",
        "rdmsr",
        "test edx, edx",
        "js 2f",
        "swapgs",
        "2:",
        "call {fatal}",
        "ud2",
        gs_base = const msr::GS_BASE,
        fatal = sym trap::fatal_trap,
    )
}

/// Address of the target of `SYSCALL`.
pub(super) fn syscall_entry() -> u64 {
    syscall as *const () as u64
}

/// `SYSCALL` leaves RIP in `rcx`, RFLAGS in `r11` and the stack as it was. Builds what an exception
/// would have pushed.
#[unsafe(naked)]
extern "sysv64" fn syscall() {
    naked_asm!(
        "swapgs",
        "mov gs:[{user_rsp}], rsp",
        "mov rsp, gs:[{rsp0}]",
        "push {user_ss}",
        "push gs:[{user_rsp}]",
        "push r11",
        "push {user_cs}",
        "push rcx",
        "push 0",
        "push {vector}",
        save!(),
        "call {trap}",
        "jmp {leave}",
        user_rsp = const USER_RSP,
        rsp0 = const RSP0,
        user_ss = const USER_SS,
        user_cs = const USER_CS,
        vector = const SYSCALL_VECTOR,
        trap = sym trap::trap,
        leave = sym leave,
    )
}

/// Goes back to where the [`EntryFrame`] at `rsp` says.
#[unsafe(naked)]
extern "sysv64" fn leave() {
    naked_asm!(
        "add rsp, 16",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop r11",
        "pop r10",
        "pop r9",
        "pop r8",
        "pop rdi",
        "pop rsi",
        "pop rbp",
        "pop rbx",
        "pop rdx",
        "pop rcx",
        "pop rax",
        "test byte ptr [rsp + 3 * 8], 3",
        "jz 2f",
        "swapgs",
        "2:",
        "add rsp, 16",
        "iretq",
    )
}

/// Saves the callee-saved registers (System V ABI) and the stack pointer of the running thread to
/// `from`, and goes on with those saved at `to`.
///
/// # Safety
/// As for [`Arch::switch`](crate::arch::Arch::switch).
#[unsafe(naked)]
pub(super) unsafe extern "sysv64" fn switch(from: *mut u64, to: u64) {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rdi], rsp",
        "mov rsp, rsi",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
    )
}

/// What a new kernel stack holds, from its stack pointer up: what [`switch`] pops, then what
/// [`leave`] expects.
#[repr(C)]
pub(super) struct NewStack {
    callee_saved: [u64; 5],
    rbp: u64,
    return_address: u64,
    entry: EntryFrame,
}

impl NewStack {
    /// For a stack that ends at `top`, entering CPL 3 with `user`.
    pub(super) fn new(top: u64, user: &UserFrame) -> Self {
        Self {
            callee_saved: [0; 5],
            rbp: top - size_of::<EntryFrame>() as u64,
            return_address: first_run as *const () as u64,
            entry: EntryFrame {
                link_rbp: user.rbp,
                link_rip: user.rip,
                user: *user,
            },
        }
    }
}

/// Where the first [`switch`] to a new thread returns to.
#[unsafe(naked)]
extern "sysv64" fn first_run() {
    naked_asm!(
        "mov rdi, rsp",
        "call {started}",
        "jmp {leave}",
        started = sym trap::started,
        leave = sym leave,
    )
}

/// First instruction of every CPU (`abi::boot`): `rdi` = its index, `rsi` = BootInfo, no stack.
#[unsafe(naked)]
#[unsafe(no_mangle)]
extern "sysv64" fn _start() -> ! {
    naked_asm!(
        "lea rax, [rdi + 1]",
        "imul rax, rax, {bytes}",
        "lea rsp, [rip + {stacks}]",
        "add rsp, rax",
        "xor ebp, ebp",
        "call {start}",
        "ud2",
        bytes = const super::percpu::BOOT_STACK_BYTES,
        stacks = sym super::percpu::BOOT_STACKS,
        start = sym super::boot::start,
    )
}
