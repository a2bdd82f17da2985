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
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "sysv64" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    naked_asm!("mov rax, rdi", "mov rcx, rdx", "rep movsb", "ret")
}

/// C's `memmove`: backwards where the target begins inside the source.
#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
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
#[cfg_attr(not(test), unsafe(no_mangle))]
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
#[cfg_attr(not(test), unsafe(no_mangle))]
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
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "sysv64" fn bcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    naked_asm!("jmp {}", sym memcmp)
}

/// C's `strlen`.
#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
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

#[cfg(test)]
mod tests {
    use super::*;
    use core::cmp::Ordering;
    use proptest::prelude::*;

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        // Few values, so that long common prefixes occur.
        prop::collection::vec(prop_oneof![Just(0), Just(1), Just(0xff)], 0..200)
    }

    proptest! {
        #[test]
        fn memmove_moves_whatever_overlaps(mut area in bytes(), a: usize, b: usize, len: usize) {
            let (from, to) = (a % (area.len() + 1), b % (area.len() + 1));
            let len = len % (area.len() - from.max(to) + 1);
            let mut expected = area.clone();
            expected.copy_within(from..from + len, to);
            let base = area.as_mut_ptr();
            // SAFETY: both ranges lie in `area`.
            let result = unsafe { memmove(base.add(to), base.add(from), len) };
            prop_assert_eq!(result, base.wrapping_add(to));
            prop_assert_eq!(area, expected);
        }

        #[test]
        fn memcpy_copies_no_more_than_it_should(source in bytes(), len: usize) {
            let len = len % (source.len() + 1);
            let mut target = vec![7; source.len()];
            // SAFETY: both have `len` bytes and are distinct.
            let result = unsafe { memcpy(target.as_mut_ptr(), source.as_ptr(), len) };
            prop_assert_eq!(result, target.as_mut_ptr());
            prop_assert_eq!(&target[..len], &source[..len]);
            prop_assert!(target[len..].iter().all(|byte| *byte == 7));
        }

        #[test]
        fn memset_writes_the_low_byte(mut area in bytes(), value: i32, len: usize) {
            let len = len % (area.len() + 1);
            let rest = area[len..].to_vec();
            // SAFETY: `area` has `len` bytes.
            let result = unsafe { memset(area.as_mut_ptr(), value, len) };
            prop_assert_eq!(result, area.as_mut_ptr());
            prop_assert!(area[..len].iter().all(|byte| *byte == value as u8));
            prop_assert_eq!(&area[len..], &rest);
        }

        #[test]
        fn memcmp_orders_as_slices_do(left in bytes(), right in bytes()) {
            let len = left.len().min(right.len());
            // SAFETY: both have `len` bytes.
            let (order, equal) = unsafe {
                (memcmp(left.as_ptr(), right.as_ptr(), len), bcmp(left.as_ptr(), right.as_ptr(), len))
            };
            let expected = left[..len].cmp(&right[..len]);
            prop_assert_eq!(order.cmp(&0), expected);
            prop_assert_eq!(equal == 0, expected == Ordering::Equal);
        }

        #[test]
        fn strlen_finds_the_first_zero(mut text in bytes()) {
            text.push(0);
            let expected = text.iter().position(|byte| *byte == 0);
            // SAFETY: there is a zero.
            prop_assert_eq!(Some(unsafe { strlen(text.as_ptr()) }), expected);
        }
    }

    #[test]
    fn frames_are_filled_and_copied_to_their_last_byte() {
        const BYTES: usize = PAGE_SIZE as usize;
        let (mut from, mut to) = (vec![1u8; BYTES + 1], vec![2u8; BYTES + 1]);
        // SAFETY: both have a frame's bytes and are distinct.
        unsafe {
            fill_frame(from.as_mut_ptr(), 0x0807_0605_0403_0201);
            copy_frame(from.as_ptr(), to.as_mut_ptr());
        }
        assert!(
            from[..BYTES]
                .chunks(8)
                .all(|word| word == [1, 2, 3, 4, 5, 6, 7, 8])
        );
        assert_eq!(from[..BYTES], to[..BYTES]);
        assert_eq!((from[BYTES], to[BYTES]), (1, 2));
    }
}
