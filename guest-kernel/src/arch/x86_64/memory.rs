//! The routines that compiled code calls for memory, and whole-frame variants. String instructions
//! throughout: one emulated instruction on hosts that emulate CPL 0, where a loop would be thousands.
//! In assembly, since a compiler may turn a loop in `memset` into a call of `memset`.

use core::arch::{asm, naked_asm};

use abi::layout::PAGE_SIZE;

const WORDS: u64 = PAGE_SIZE / 8;

/// Fills the frame at `frame` with `word`.
///
/// # Safety
/// `frame` is a whole frame that nothing else uses.
pub(super) unsafe fn fill_frame(frame: *mut u8, word: u64) {
    // SAFETY: the caller's promise; DF is clear (the ABI, and `cld` at each entry).
    unsafe {
        asm!("rep stosq", inout("rdi") frame => _, inout("rcx") WORDS => _, in("rax") word,
            options(nostack, preserves_flags));
    }
}

/// Copies the frame at `from` to the frame at `to`.
///
/// # Safety
/// Both are whole, distinct frames; nothing else uses `to`.
pub(super) unsafe fn copy_frame(from: *const u8, to: *mut u8) {
    // SAFETY: as for `fill_frame`.
    unsafe {
        asm!("rep movsq", inout("rsi") from => _, inout("rdi") to => _, inout("rcx") WORDS => _,
            options(nostack, preserves_flags));
    }
}

/// C's `memcpy`.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "sysv64" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    naked_asm!("mov rax, rdi", "mov rcx, rdx", "rep movsb", "ret")
}

/// C's `memmove`: backwards where the target begins inside the source.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "sysv64" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "mov rcx, rdx",
        "mov rdx, rdi",
        "sub rdx, rsi",
        "cmp rdx, rcx",
        "jb 2f",
        "rep movsb",
        "ret",
        "2:",
        "lea rdi, [rdi + rcx - 1]",
        "lea rsi, [rsi + rcx - 1]",
        "std",
        "rep movsb",
        "cld",
        "ret",
    )
}

/// C's `memset`.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "sysv64" fn memset(to: *mut u8, byte: i32, bytes: usize) -> *mut u8 {
    naked_asm!(
        "mov r8, rdi",
        "mov eax, esi",
        "mov rcx, rdx",
        "rep stosb",
        "mov rax, r8",
        "ret",
    )
}

/// C's `memcmp`.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "sysv64" fn memcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    naked_asm!(
        "mov rcx, rdx",
        "xor eax, eax", // sets ZF too, which `repe cmpsb` leaves alone when there is nothing to do
        "repe cmpsb",
        "je 2f",
        "movzx eax, byte ptr [rdi - 1]",
        "movzx ecx, byte ptr [rsi - 1]",
        "sub eax, ecx",
        "2:",
        "ret",
    )
}

/// BSD's `bcmp`, which LLVM prefers where only equality matters.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "sysv64" fn bcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    naked_asm!("jmp {}", sym memcmp)
}

/// C's `strlen`.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "sysv64" fn strlen(text: *const u8) -> usize {
    naked_asm!(
        "xor eax, eax",
        "mov rcx, -1",
        "repne scasb",
        "not rcx",
        "lea rax, [rcx - 1]",
        "ret",
    )
}
