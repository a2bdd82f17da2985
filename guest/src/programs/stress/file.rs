//! What threads do to a file on the disk that all of them map.
//!
//! Word `i` of every page belongs to thread `i`, as in the region. But nobody may lose what is written here: pages leave
//! memory and come back from the disk, and its owner always finds in a word what it has written there last.

use abi::channel::ReportKind::ChangedUnderneath;
use abi::layout::PAGE_SIZE;
use abi::syscall::{Errno, advice, fadvise, map, prot};

use super::words::Owner;
use super::{SUBJECT_GVA, Shared};
use crate::sys::Sys;
use crate::tag::{Region, Tag, address};

/// Pages of the file.
pub(super) const PAGES: u64 = 4;
const BYTES: u64 = PAGES * PAGE_SIZE;
/// Where it is mapped.
const BASE: u64 = SUBJECT_GVA + (1 << 31);

/// Opens and maps it.
pub(super) fn map<S: Sys>(sys: &S) -> Result<u64, Errno> {
    let fd = sys.file(BYTES)?;
    let flags = map::SHARED | map::FIXED_NOREPLACE;
    sys.mmap_file(BASE, BYTES, prot::READ | prot::WRITE, flags, (fd, 0))?;
    Ok(fd)
}

/// Gives it back.
pub(super) fn unmap<S: Sys>(sys: &S, shared: &Shared) -> Result<u64, Errno> {
    sys.munmap(BASE, BYTES)?;
    sys.close(shared.fd)
}

impl<S: Sys> Owner<'_, S> {
    /// Writes to a page, or sees to it that pages leave memory; then looks at all.
    pub(super) fn use_file(&mut self) {
        let page = self.draw(PAGES);
        let fd = self.shared.fd;
        match self.draw(8) {
            0 => {
                let synced = self.sys.fsync(fd);
                self.expect(synced, &[]);
            }
            1 => {
                let unmapped = self.sys.madvise(BASE, BYTES, advice::DONTNEED);
                self.expect(unmapped, &[]);
                let dropped = self.sys.fadvise(fd, fadvise::DONTNEED);
                self.expect(dropped, &[]);
            }
            2 => {
                let aged = self.sys.madvise(BASE, BYTES, advice::PAGEOUT);
                self.expect(aged, &[]);
            }
            _ => self.write_file(page),
        }
        for (page, word) in (0..PAGES).zip(self.file) {
            if let Some(expected) = word {
                self.find_in_file(page, expected);
            }
        }
    }

    fn write_file(&mut self, page: u64) {
        let value = Tag {
            region: Region::Subject,
            generation: self.number(),
            page,
            slot: self.index as u64,
        };
        let (gva, value) = (address(BASE, page, self.index as u64), value.encode());
        match self.sys.write(gva, value) {
            Ok(()) => self.file[page as usize] = Some(value),
            Err(_) => self.tell_file(gva, value, 0),
        }
    }

    fn find_in_file(&self, page: u64, expected: u64) {
        let gva = address(BASE, page, self.index as u64);
        let found = self.sys.read(gva).unwrap_or(0);
        if found != expected {
            self.tell_file(gva, expected, found);
        }
    }

    fn tell_file(&self, gva: u64, expected: u64, found: u64) {
        let findings = &self.shared.findings;
        findings.report(self.sys, ChangedUnderneath, gva, expected, found);
    }
}
