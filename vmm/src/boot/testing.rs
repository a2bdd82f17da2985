//! Synthetic ELF images for tests.

use object::elf::{PF_R, PF_W, PF_X};

/// Segment permissions.
pub(crate) const R: u32 = PF_R.0;
pub(crate) const RW: u32 = PF_R.0 | PF_W.0;
pub(crate) const RX: u32 = PF_R.0 | PF_X.0;

/// One segment: address, permissions, contents, bytes in memory.
pub(crate) type Piece<'a> = (u64, u32, &'a [u8], u64);

/// A static executable for x86-64.
pub(crate) fn executable(entry: u64, pieces: &[Piece<'_>]) -> Vec<u8> {
    const EHDR: usize = 64;
    const PHDR: usize = 56;
    let mut file = vec![0; EHDR + PHDR * pieces.len()];
    file[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file[16..18].copy_from_slice(&2u16.to_le_bytes()); // ET_EXEC
    file[18..20].copy_from_slice(&62u16.to_le_bytes()); // EM_X86_64
    file[20..24].copy_from_slice(&1u32.to_le_bytes());
    file[24..32].copy_from_slice(&entry.to_le_bytes());
    file[32..40].copy_from_slice(&(EHDR as u64).to_le_bytes());
    file[52..54].copy_from_slice(&(EHDR as u16).to_le_bytes());
    file[54..56].copy_from_slice(&(PHDR as u16).to_le_bytes());
    file[56..58].copy_from_slice(&(pieces.len() as u16).to_le_bytes());
    for (number, (address, flags, data, bytes)) in pieces.iter().enumerate() {
        let offset = file.len() as u64;
        file.extend_from_slice(data);
        let words = [
            u64::from(*flags) << 32 | 1, // p_type PT_LOAD, p_flags
            offset,
            *address,
            address
                .checked_sub(abi::layout::KERNEL_VIRT_OFFSET)
                .unwrap_or(*address),
            data.len() as u64,
            *bytes,
            0x1000,
        ];
        for (word, value) in words.iter().enumerate() {
            let at = EHDR + PHDR * number + 8 * word;
            file[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
    file
}

/// A kernel whose text, at the load address, is `code`.
pub(crate) fn kernel(code: &[u8]) -> Vec<u8> {
    let text = abi::layout::KERNEL_VIRT_OFFSET + abi::layout::KERNEL_LOAD_GPA;
    executable(text, &[(text, RX, code, code.len() as u64)])
}

/// A user image that nothing executes.
pub(crate) fn user() -> Vec<u8> {
    let text = abi::layout::USER_IMAGE_GVA;
    executable(text, &[(text, RX, &[0xf4], 1)])
}
