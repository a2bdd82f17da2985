//! madvise(MADV_REMOVE) (Linux 6.18's mm/madvise.c, madvise_remove): a hole in the file that is mapped.

use abi::layout::PAGE_SIZE;
use abi::lock::LockClass;
use abi::objects::{File, Mm, Pa, vma_flags};
use abi::syscall::Errno;

use super::{Field, pages};
use crate::Kernel;
use crate::arch::Arch;

/// What of a file to remove.
struct Part {
    file: Pa<File>,
    /// Its first byte.
    offset: u64,
    /// Addresses at which it is mapped.
    start: u64,
    end: u64,
}

impl<A: Arch> Kernel<A> {
    /// Each part without the mmap_lock, which comes behind the file's own locks.
    ///
    /// # Errors
    /// EINVAL for locked memory and memory without a file, EACCES for private memory, EOPNOTSUPP for a file on the disk;
    /// ENOMEM for holes, when the rest is done.
    pub(super) fn advise_remove(&self, mm: Pa<Mm>, start: u64, end: u64) -> Result<(), Errno> {
        let mut at = start;
        let mut result = Ok(());
        while at < end {
            let part = self.next_part(mm, at, end)?;
            if part.start > at {
                result = Err(Errno::ENOMEM);
            }
            at = part.end;
            let bytes = part.end - part.start;
            let on_disk = self.file_on_disk(part.file);
            if !on_disk {
                self.file_punch(part.file, part.offset, part.offset + bytes);
            }
            self.file_put(part.file);
            if on_disk {
                return Err(Errno::EOPNOTSUPP);
            }
        }
        result
    }

    /// The first part of `start..end`, with a reference to its file.
    fn next_part(&self, mm: Pa<Mm>, start: u64, end: u64) -> Result<Part, Errno> {
        let space = self.obj(mm);
        let _guard = self.read_lock(&space.mmap_lock, LockClass::MmapRead);
        let vma = self.vma_in(space, start, end).ok_or(Errno::ENOMEM)?;
        let area = self.obj(vma);
        let (file, flags) = (area.file.get(), area.flags.get());
        if flags & vma_flags::LOCKED != 0 || file.is_null() {
            return Err(Errno::EINVAL);
        }
        if flags & vma_flags::SHARED == 0 {
            return Err(Errno::EACCES);
        }
        self.file_get(file);
        let start = start.max(area.start.get());
        let page = area.pgoff.get() + pages(start - area.start.get());
        Ok(Part {
            file,
            offset: page * PAGE_SIZE,
            start,
            end: end.min(area.end.get()),
        })
    }
}
