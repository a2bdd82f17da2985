//! The memory functions that compiled code calls, which a program without libc brings itself.
//!
//! In assembly, because the compiler may turn a loop in Rust into a call of the very function. Part of
//! the image; the library has it in tests only, under names that do not replace libc's.
#![allow(
    unsafe_code,
    reason = "memcpy and relatives for an image without a C library"
)]

use core::arch::naked_asm;

#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    naked_asm!("mov rax, rdi", "mov rcx, rdx", "rep movsb", "ret")
}

#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "mov rcx, rdx",
        // Forwards is right unless the destination starts inside the source.
        "mov r8, rdi",
        "sub r8, rsi",
        "cmp r8, rdx",
        "jb 2f",
        "rep movsb",
        "ret",
        "2:",
        "lea rdi, [rdi + rdx - 1]",
        "lea rsi, [rsi + rdx - 1]",
        "std",
        "rep movsb",
        "cld",
        "ret",
    )
}

#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, bytes: usize) -> *mut u8 {
    naked_asm!(
        "mov r8, rdi",
        "mov eax, esi",
        "mov rcx, rdx",
        "rep stosb",
        "mov rax, r8",
        "ret",
    )
}

#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    naked_asm!(
        "mov rcx, rdx",
        // Sets ZF for an empty range, on which `repe cmpsb` leaves the flags alone.
        "xor eax, eax",
        "repe cmpsb",
        "je 2f",
        "movzx eax, byte ptr [rdi - 1]",
        "movzx ecx, byte ptr [rsi - 1]",
        "sub eax, ecx",
        "2:",
        "ret",
    )
}

#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    naked_asm!("jmp {}", sym memcmp)
}

#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    naked_asm!(
        "xor eax, eax",
        "2:",
        "cmp byte ptr [rdi + rax], 0",
        "je 3f",
        "inc rax",
        "jmp 2b",
        "3:",
        "ret",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memcmp_orders_as_slices_do() {
        let texts: [&[u8]; 6] = [b"", b"a", b"ab", b"b", b"a\xff", b"\0"];
        for left in texts {
            for right in texts {
                let len = left.len().min(right.len());
                // SAFETY: both have `len` bytes.
                let (order, equal) = unsafe {
                    (
                        memcmp(left.as_ptr(), right.as_ptr(), len),
                        bcmp(left.as_ptr(), right.as_ptr(), len),
                    )
                };
                let expected = left[..len].cmp(&right[..len]);
                assert_eq!(order.cmp(&0), expected, "{left:?} {right:?}");
                assert_eq!(equal == 0, expected.is_eq(), "{left:?} {right:?}");
            }
        }
    }

    #[test]
    fn memmove_moves_whatever_overlaps() {
        for from in 0..8 {
            for to in 0..8 {
                for len in 0..8 {
                    let mut area: [u8; 16] = core::array::from_fn(|i| i as u8);
                    let mut expected = area;
                    expected.copy_within(from..from + len, to);
                    let base = area.as_mut_ptr();
                    // SAFETY: both ranges lie in `area`.
                    unsafe { memmove(base.add(to), base.add(from), len) };
                    assert_eq!(area, expected, "{from} {to} {len}");
                }
            }
        }
    }

    #[test]
    fn memcpy_memset_and_strlen_do_what_their_names_say() {
        let mut text = *b"......";
        // SAFETY: all ranges lie in `text` and the literal, and there is a zero.
        let len = unsafe {
            memcpy(text.as_mut_ptr(), b"ab".as_ptr(), 2);
            memset(text.as_mut_ptr().add(3), 0x100, 2);
            strlen(text.as_ptr())
        };
        assert_eq!((&text, len), (b"ab.\0\0.", 3));
    }
}
