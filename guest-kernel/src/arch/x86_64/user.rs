//! Copies between kernel and user memory: the one place where the kernel may fault.

use core::arch::global_asm;

use abi::layout::USER_END;

use crate::arch::UserFault;

// `rep movsb` keeps its progress in registers, so the fault handler either restarts it where it was or
// skips to the next instruction, which returns how much is left. One emulated instruction on hosts
// that emulate CPL 0, however long the copy is.
global_asm!(
    ".pushsection .text.copy_user,\"ax\",@progbits",
    ".type copy_user, @function",
    "copy_user:",
    "push rbp",
    "mov rbp, rsp",
    "mov rcx, rdx",
    ".global copy_user_access",
    "copy_user_access:",
    "rep movsb",
    ".global copy_user_fixup",
    "copy_user_fixup:",
    "mov rax, rcx",
    "pop rbp",
    "ret",
    ".size copy_user, . - copy_user",
    ".global copy_user",
    ".popsection",
);

unsafe extern "sysv64" {
    /// Copies `bytes` from `source` to `target` and returns how many could not be copied.
    fn copy_user(target: *mut u8, source: *const u8, bytes: usize) -> usize;
    /// The instruction that may fault.
    fn copy_user_access();
    /// Where it goes on without the rest.
    fn copy_user_fixup();
}

/// True for the address of the instruction that may fault at CPL 0.
pub(super) fn is_access(rip: u64) -> bool {
    rip == copy_user_access as *const () as u64
}

/// Where a fault of that instruction continues when it cannot be resolved.
pub(super) fn fixup() -> u64 {
    copy_user_fixup as *const () as u64
}

/// See [`Arch::copy_from_user`](crate::arch::Arch::copy_from_user).
pub(super) fn copy_from(target: &mut [u8], gva: u64) -> Result<(), UserFault> {
    let bytes = user_part(gva, target.len());
    // SAFETY: `target` is writable for at least `bytes`; the source lies below USER_END, where no
    // kernel object is, and a fault there is handled.
    let left = unsafe { copy_user(target.as_mut_ptr(), gva as *const u8, bytes) };
    result(gva, bytes - left, target.len())
}

/// See [`Arch::copy_to_user`](crate::arch::Arch::copy_to_user).
pub(super) fn copy_to(gva: u64, source: &[u8]) -> Result<(), UserFault> {
    let bytes = user_part(gva, source.len());
    // SAFETY: as above with the roles exchanged.
    let left = unsafe { copy_user(gva as *mut u8, source.as_ptr(), bytes) };
    result(gva, bytes - left, source.len())
}

/// How many of `len` bytes from `gva` lie in user space, where paging decides alone; beyond it the
/// kernel's own pages would let CPL 0 in.
fn user_part(gva: u64, len: usize) -> usize {
    USER_END.saturating_sub(gva).min(len as u64) as usize
}

fn result(gva: u64, copied: usize, len: usize) -> Result<(), UserFault> {
    if copied == len {
        Ok(())
    } else {
        Err(UserFault {
            gva: gva + copied as u64,
        })
    }
}
