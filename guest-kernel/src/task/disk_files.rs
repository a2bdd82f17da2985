//! The system calls on files on the disk (Linux's block/fops.c, fs/sync.c, mm/fadvise.c).

use abi::layout::PAGE_SIZE;
use abi::syscall::{Errno, fadvise};

use crate::Kernel;
use crate::arch::Arch;

impl<A: Arch> Kernel<A> {
    /// `disk_file(sector, len)`.
    pub(super) fn disk_file(&self, sector: u64, len: u64) -> Result<u64, Errno> {
        self.open_new(|| self.disk_file_create(sector, len))
    }

    /// fsync and fdatasync: a file has no metadata. The console cannot be synced.
    pub(super) fn fsync(&self, fd: u64) -> Result<(), Errno> {
        self.with_file(fd, Errno::EINVAL, |_, file| {
            self.file_sync(file, 0..u64::MAX)
        })
    }

    /// fadvise64. POSIX_FADV_DONTNEED begins to write what is dirty, and drops whole pages that nobody uses and the disk has;
    /// all else is without effect, as is everything for a file in memory (Linux's generic_fadvise).
    pub(super) fn fadvise(
        &self,
        fd: u64,
        (offset, len): (u64, u64),
        advice: u64,
    ) -> Result<(), Errno> {
        self.with_file(fd, Errno::ESPIPE, |_, file| {
            if len.cast_signed() < 0 || advice > fadvise::NOREUSE {
                return Err(Errno::EINVAL);
            }
            if advice != fadvise::DONTNEED || !self.file_on_disk(file) {
                return Ok(());
            }
            let end = match offset.checked_add(len) {
                Some(end) if len != 0 => end,
                _ => u64::MAX,
            };
            // A page that the file ends in is whole (here: every last one).
            let whole = offset.div_ceil(PAGE_SIZE)..end / PAGE_SIZE;
            self.file_begin_writing(file, offset / PAGE_SIZE..end.div_ceil(PAGE_SIZE));
            self.file_evict(file, whole);
            Ok(())
        })
    }
}
