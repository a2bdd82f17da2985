//! Which pages a process has mapped: /proc/self/pagemap (Linux's Documentation/admin-guide/mm/pagemap.rst), which changes nothing.
//!
//! Nothing here allocates: it runs in forked processes of a program with threads.

use abi::layout::PAGE_SIZE;
use abi::oracle::LOOKED_AT;
use abi::syscall::{Errno, decode, nr};

use super::own_file::OwnFile;
use crate::rt::raw_syscall;

const PRESENT: u64 = 1 << 63;
/// In a swap area, or on the way to another frame.
const ELSEWHERE: u64 = 1 << 62;

/// Where pages are, as bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) present: u64,
    /// A load would bring them back.
    pub(super) elsewhere: u64,
}

/// Asks for so many pages from `start` on, at most [`LOOKED_AT`].
pub(super) fn read((start, pages): (u64, u64)) -> Result<Found, Errno> {
    static PAGEMAP: OwnFile = OwnFile::new(c"/proc/self/pagemap");
    let file = PAGEMAP.descriptor()?;
    let mut entries = [0u64; LOOKED_AT as usize];
    let to = entries.as_mut_ptr().expose_provenance() as u64;
    let (len, offset) = (pages.min(LOOKED_AT) * 8, start / PAGE_SIZE * 8);
    let len = decode(raw_syscall(nr::PREAD64, [file, to, len, offset, 0, 0]))?;
    let mut found = Found::default();
    for (page, entry) in entries[..len as usize / 8].iter().enumerate() {
        found.present |= u64::from(entry & PRESENT != 0) << page;
        found.elsewhere |= u64::from(entry & ELSEWHERE != 0) << page;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::ANONYMOUS;
    use abi::syscall::prot;

    #[test]
    fn a_page_is_there_once_it_was_touched() {
        let (pages, len) = (LOOKED_AT, LOOKED_AT * PAGE_SIZE);
        let args = [0, len, prot::READ | prot::WRITE, ANONYMOUS, u64::MAX, 0];
        let start = decode(raw_syscall(nr::MMAP, args)).unwrap();
        assert_eq!(read((start, pages)), Ok(Found::default()));
        let touched = std::ptr::with_exposed_provenance_mut::<u8>((start + 2 * PAGE_SIZE) as usize);
        // SAFETY: a byte of a fresh mapping that nobody else knows.
        unsafe { touched.write_volatile(1) };
        assert_eq!(read((start, pages)).unwrap().present, 1 << 2);
        assert_eq!(read((start, 2)), Ok(Found::default()));
        raw_syscall(nr::MUNMAP, [start, len, 0, 0, 0, 0]);
    }
}
