//! Descriptors, and the system calls on files (Linux's fs/read_write.c, fs/open.c, mm/memfd.c).
//!
//! A process's descriptors are its [`FileTable`]; 0 to 2 are the console at first. Every file is a memfd or a part of the
//! disk (`disk_files`): readable, writable and mappable, without seals.

use core::sync::atomic::Ordering::{AcqRel, Relaxed};

use abi::layout::PAGE_SIZE;
use abi::lock::LockClass;
use abi::objects::{FILE_TABLE_SLOTS, File, FileTable, Mm, OpenFile, Pa};
use abi::syscall::{Errno, falloc, map, memfd, seek};

use crate::Kernel;
use crate::arch::Arch;
use crate::mm::{Backing, Field, MAX_FILE_BYTES, Size};

/// Descriptors that are the console when a machine starts.
const CONSOLE: u64 = 0b111;
/// Bytes that are copied from or to a program at a time.
const CHUNK: usize = 256;
/// Most that one call transfers (Linux's MAX_RW_COUNT).
const MAX_TRANSFER: u64 = 0x7fff_f000;
/// Longest name of a memfd (Linux's MFD_NAME_MAX_LEN).
const MAX_NAME: u64 = 249;

/// What a descriptor refers to. A file has a reference that is to be given up.
#[derive(Clone, Copy)]
enum Descriptor {
    Console,
    Open(Pa<OpenFile>),
}

/// Where in the file a transfer begins.
#[derive(Clone, Copy)]
pub(super) enum Place {
    /// At the descriptor's position, which moves on.
    Position,
    /// At this byte (pread64, pwrite64).
    At(u64),
}

impl<A: Arch> Kernel<A> {
    /// The descriptors of the first process.
    pub(super) fn files_create(&self) -> Result<Pa<FileTable>, Errno> {
        let table = self.slab_alloc::<FileTable>()?;
        self.obj(table).users.set(1);
        self.obj(table).console.set(CONSOLE);
        Ok(table)
    }

    /// One more task uses the table.
    pub(super) fn files_share(&self, table: Pa<FileTable>) {
        self.obj(table).users.fetch_add(1, Relaxed);
    }

    /// A copy for a forked process: the same open files.
    pub(super) fn files_copy(&self, table: Pa<FileTable>) -> Result<Pa<FileTable>, Errno> {
        let copy = self.slab_alloc::<FileTable>()?;
        let (from, to) = (self.obj(table), self.obj(copy));
        to.users.set(1);
        let _guard = self.lock_files(from);
        to.console.set(from.console.get());
        for (from, to) in from.open.iter().zip(&to.open) {
            if let Some(open) = from.get().some() {
                self.obj(open).refcount.fetch_add(1, Relaxed);
                to.set(open);
            }
        }
        Ok(copy)
    }

    /// A task no longer uses the table; the last one closes everything.
    pub(super) fn files_put(&self, table: Pa<FileTable>) {
        let object = self.obj(table);
        // AcqRel: the last one sees what all others did.
        if object.users.fetch_sub(1, AcqRel) > 1 {
            return;
        }
        for open in object.open.iter().filter_map(|open| open.get().some()) {
            self.open_put(open);
        }
        self.slab_free(table);
    }

    fn lock_files<'k>(&'k self, table: &'k FileTable) -> crate::sync::Guard<'k, A> {
        self.lock(&table.lock, LockClass::Files)
    }

    fn open_put(&self, open: Pa<OpenFile>) {
        let object = self.obj(open);
        // AcqRel: whoever frees it sees it as the others left it.
        if object.refcount.fetch_sub(1, AcqRel) > 1 {
            return;
        }
        let file = object.file.get();
        self.slab_free(open);
        self.file_put(file);
    }

    fn descriptor(&self, fd: u64) -> Result<Descriptor, Errno> {
        let table = self.obj(self.current().files.get());
        let fd = fd as u32 as usize;
        let slot = table.open.get(fd).ok_or(Errno::EBADF)?;
        let _guard = self.lock_files(table);
        if table.console.get() & 1 << fd != 0 {
            return Ok(Descriptor::Console);
        }
        let open = slot.get().some().ok_or(Errno::EBADF)?;
        self.obj(open).refcount.fetch_add(1, Relaxed);
        Ok(Descriptor::Open(open))
    }

    /// Calls `f` with the file of `fd`; `console` where it is the console.
    pub(super) fn with_file<T>(
        &self,
        fd: u64,
        console: Errno,
        f: impl FnOnce(Pa<OpenFile>, Pa<File>) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        match self.descriptor(fd)? {
            Descriptor::Console => Err(console),
            Descriptor::Open(open) => {
                let result = f(open, self.obj(open).file.get());
                self.open_put(open);
                result
            }
        }
    }

    /// Puts what the caller refers to at the lowest free descriptor.
    fn install_descriptor(&self, what: Descriptor) -> Result<u64, Errno> {
        let table = self.obj(self.current().files.get());
        let _guard = self.lock_files(table);
        let is_free =
            |fd: &usize| table.open[*fd].get().is_null() && table.console.get() & 1 << fd == 0;
        let fd = (0..FILE_TABLE_SLOTS).find(is_free).ok_or(Errno::EMFILE)?;
        match what {
            Descriptor::Console => table.console.set(table.console.get() | 1 << fd),
            Descriptor::Open(open) => table.open[fd].set(open),
        }
        Ok(fd as u64)
    }

    /// memfd_create. The flags for execution and sealing are accepted, as there is neither.
    pub(super) fn memfd_create(&self, name: u64, flags: u64) -> Result<u64, Errno> {
        const KNOWN: u64 = memfd::CLOEXEC | memfd::ALLOW_SEALING | memfd::NOEXEC_SEAL | memfd::EXEC;
        const EXECUTION: u64 = memfd::NOEXEC_SEAL | memfd::EXEC;
        let flags = flags & u64::from(u32::MAX);
        if flags & !KNOWN != 0 || flags & EXECUTION == EXECUTION {
            return Err(Errno::EINVAL);
        }
        self.check_name(name)?;
        self.open_new(|| self.file_create())
    }

    /// A descriptor of the file that `create` makes.
    pub(super) fn open_new(
        &self,
        create: impl FnOnce() -> Result<Pa<File>, Errno>,
    ) -> Result<u64, Errno> {
        let open = self.slab_alloc::<OpenFile>()?;
        let file = create().inspect_err(|_| self.slab_free(open))?;
        self.obj(open).refcount.set(1);
        self.obj(open).file.set(file);
        self.install_descriptor(Descriptor::Open(open))
            .inspect_err(|_| self.open_put(open))
    }

    /// A name only has to be there, and not too long.
    fn check_name(&self, gva: u64) -> Result<(), Errno> {
        for at in 0..=MAX_NAME {
            let mut byte = [0];
            self.copy_in(&mut byte, gva.wrapping_add(at))?;
            if byte == [0] {
                return Ok(());
            }
        }
        Err(Errno::EINVAL)
    }

    /// close.
    pub(super) fn close(&self, fd: u64) -> Result<(), Errno> {
        let table = self.obj(self.current().files.get());
        let fd = fd as u32 as usize;
        let slot = table.open.get(fd).ok_or(Errno::EBADF)?;
        let open = {
            let _guard = self.lock_files(table);
            if table.console.get() & 1 << fd != 0 {
                table.console.set(table.console.get() & !(1 << fd));
                return Ok(());
            }
            let open = slot.get().some().ok_or(Errno::EBADF)?;
            slot.set(Pa::NULL);
            open
        };
        self.open_put(open);
        Ok(())
    }

    /// dup.
    pub(super) fn dup(&self, fd: u64) -> Result<u64, Errno> {
        let what = self.descriptor(fd)?;
        self.install_descriptor(what).inspect_err(|_| {
            if let Descriptor::Open(open) = what {
                self.open_put(open);
            }
        })
    }

    /// mmap of a descriptor, or of anonymous memory.
    pub(super) fn mmap_call(&self, mm: Pa<Mm>, args: [u64; 6]) -> Result<u64, Errno> {
        let [address, len, prot, flags, fd, offset] = args;
        if !offset.is_multiple_of(PAGE_SIZE) {
            return Err(Errno::EINVAL);
        }
        if flags & map::ANONYMOUS != 0 {
            return self.mmap(mm, address, len, prot, flags);
        }
        match self.descriptor(fd)? {
            Descriptor::Console => {
                self.mmap_of(mm, address, len, (prot, flags), Backing::Unmappable)
            }
            Descriptor::Open(open) => {
                let file = self.obj(open).file.get();
                let backing = Backing::File(file, offset / PAGE_SIZE);
                let result = self.mmap_of(mm, address, len, (prot, flags), backing);
                self.open_put(open);
                result
            }
        }
    }

    /// ftruncate; not of a part of the disk (Linux's do_ftruncate: no regular file).
    pub(super) fn ftruncate(&self, fd: u64, size: u64) -> Result<(), Errno> {
        if size > MAX_FILE_BYTES {
            return Err(Errno::EINVAL);
        }
        self.with_file(fd, Errno::EINVAL, |_, file| {
            if self.file_on_disk(file) {
                return Err(Errno::EINVAL);
            }
            self.file_truncate(file, size);
            Ok(())
        })
    }

    /// fallocate: the default mode, KEEP_SIZE and PUNCH_HOLE. A part of the disk has none of them: the disk can neither
    /// allocate nor write zeroes by itself.
    pub(super) fn fallocate(&self, fd: u64, mode: u64, offset: u64, len: u64) -> Result<(), Errno> {
        // The descriptor comes first (ksys_fallocate), then the range, then the mode (vfs_fallocate).
        let open = self.descriptor(fd)?;
        let result = check_fallocate(mode & u64::from(u32::MAX), offset, len);
        let file = match open {
            Descriptor::Console => return result.and(Err(Errno::ENODEV)),
            Descriptor::Open(open) => self.obj(open).file.get(),
        };
        let result = result.and_then(|mode| {
            let end = offset + len;
            match mode {
                _ if end > MAX_FILE_BYTES => Err(Errno::EFBIG),
                _ if self.file_on_disk(file) => Err(Errno::EOPNOTSUPP),
                Mode::Punch => {
                    self.file_punch(file, offset, end);
                    Ok(())
                }
                Mode::Allocate(size) => self.file_allocate(file, offset, end, size),
                Mode::Foreign => Err(Errno::EOPNOTSUPP),
            }
        });
        if let Descriptor::Open(open) = open {
            self.open_put(open);
        }
        result
    }

    /// lseek. Where holes are, it does not say (SEEK_DATA, SEEK_HOLE).
    pub(super) fn lseek(&self, fd: u64, offset: u64, whence: u64) -> Result<u64, Errno> {
        self.with_file(fd, Errno::ESPIPE, |open, file| {
            let object = self.obj(open);
            let _guard = self.mutex_lock(&object.lock, LockClass::Position);
            let base = match whence {
                seek::SET => 0,
                seek::CUR => object.position.get(),
                seek::END => self.file_size(file),
                _ => return Err(Errno::EINVAL),
            };
            // Two's complement: an offset may be negative.
            let to = base.wrapping_add(offset);
            if to > MAX_FILE_BYTES {
                return Err(Errno::EINVAL);
            }
            object.position.set(to);
            Ok(to)
        })
    }

    /// read and pread64. The console is always at its end.
    pub(super) fn read(&self, fd: u64, gva: u64, len: u64, at: Place) -> Result<u64, Errno> {
        check_place(at)?;
        match (self.descriptor(fd)?, at) {
            (Descriptor::Console, Place::Position) => Ok(0),
            (Descriptor::Console, Place::At(_)) => Err(Errno::ESPIPE),
            (Descriptor::Open(open), at) => {
                let file = self.obj(open).file.get();
                let result = self.check_user(gva, len).and_then(|()| {
                    self.transfer(open, at, len, |from, len| {
                        self.read_file(file, from, gva, len)
                    })
                });
                self.open_put(open);
                result
            }
        }
    }

    /// write and pwrite64.
    pub(super) fn write(&self, fd: u64, gva: u64, len: u64, at: Place) -> Result<u64, Errno> {
        check_place(at)?;
        match (self.descriptor(fd)?, at) {
            (Descriptor::Console, Place::Position) => self.write_console(gva, len),
            (Descriptor::Console, Place::At(_)) => Err(Errno::ESPIPE),
            (Descriptor::Open(open), at) => {
                let file = self.obj(open).file.get();
                let result = self.check_user(gva, len).and_then(|()| {
                    self.transfer(open, at, len, |to, len| self.write_file(file, to, gva, len))
                });
                self.open_put(open);
                result
            }
        }
    }

    /// Transfers `len` bytes from where the descriptor stands, which moves on, or from a place of its own. No byte may
    /// lie beyond what files can have (Linux's rw_verify_area).
    fn transfer(
        &self,
        open: Pa<OpenFile>,
        at: Place,
        len: u64,
        f: impl FnOnce(u64, u64) -> Result<u64, Errno>,
    ) -> Result<u64, Errno> {
        let f = |place: u64| match place.checked_add(len) {
            Some(end) if end <= MAX_FILE_BYTES => f(place, len.min(MAX_TRANSFER)),
            _ => Err(Errno::EINVAL),
        };
        if let Place::At(place) = at {
            return f(place);
        }
        let object = self.obj(open);
        let _guard = self.mutex_lock(&object.lock, LockClass::Position);
        let position = object.position.get();
        let done = f(position)?;
        object.position.set(position + done);
        Ok(done)
    }

    fn read_file(&self, file: Pa<File>, from: u64, gva: u64, len: u64) -> Result<u64, Errno> {
        let mut done = 0;
        while done < len {
            let mut buffer = [0; CHUNK];
            let chunk = &mut buffer[..chunk_at(from + done, len - done)];
            let bytes = match self.file_read(file, from + done, chunk) {
                Ok(bytes) => bytes,
                Err(errno) if done == 0 => return Err(errno),
                Err(_) => break,
            };
            let copied = self.copy_out_part(gva + done, &chunk[..bytes]);
            done += copied as u64;
            if copied < bytes {
                return faulted(done);
            }
            if bytes == 0 {
                break;
            }
        }
        Ok(done)
    }

    /// Each piece is copied from the program before the page is there: a page that is made is written. Where nothing can
    /// be copied there is a page all the same, and the file ends there at least, as after Linux's shmem_write_end of
    /// nothing (mm/filemap.c, generic_perform_write, which faults in only then).
    fn write_file(&self, file: Pa<File>, to: u64, gva: u64, len: u64) -> Result<u64, Errno> {
        let _inode = self.lock_inode(file);
        let mut done = 0;
        while done < len {
            let mut buffer = [0; CHUNK];
            let chunk = &mut buffer[..chunk_at(to + done, len - done)];
            let copied = self.copy_in_part(chunk, gva + done);
            match self.file_write(file, to + done, &chunk[..copied]) {
                Ok(()) => done += copied as u64,
                Err(errno) if done == 0 => return Err(errno),
                Err(_) => break,
            }
            // It may lie behind what was the end of this very file.
            if copied == 0 && self.copy_in_part(chunk, gva + done) == 0 {
                return faulted(done);
            }
        }
        Ok(done)
    }
}

/// What a transfer comes to that a bad address has ended after `done` bytes.
fn faulted(done: u64) -> Result<u64, Errno> {
    match done {
        0 => Err(Errno::EFAULT),
        done => Ok(done),
    }
}

/// Bytes that go at once from `position` on: to the end of a chunk, so never beyond a page.
fn chunk_at(position: u64, left: u64) -> usize {
    let room = CHUNK as u64 - position % CHUNK as u64;
    left.min(room) as usize
}

fn check_place(at: Place) -> Result<(), Errno> {
    match at {
        Place::At(place) if place > MAX_FILE_BYTES => Err(Errno::EINVAL),
        _ => Ok(()),
    }
}

/// What fallocate does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Allocate(Size),
    Punch,
    /// What other files can.
    Foreign,
}

/// What vfs_fallocate checks before it looks at the file. The range ends below 2^64.
fn check_fallocate(mode: u64, offset: u64, len: u64) -> Result<Mode, Errno> {
    if offset > MAX_FILE_BYTES || len == 0 || len > MAX_FILE_BYTES {
        return Err(Errno::EINVAL);
    }
    const PUNCH: u64 = falloc::PUNCH_HOLE | falloc::KEEP_SIZE;
    match mode {
        0 => Ok(Mode::Allocate(Size::Grows)),
        falloc::KEEP_SIZE => Ok(Mode::Allocate(Size::Stays)),
        PUNCH => Ok(Mode::Punch),
        falloc::COLLAPSE_RANGE | falloc::INSERT_RANGE | falloc::WRITE_ZEROES => Ok(Mode::Foreign),
        _ if matches!(
            mode & !falloc::KEEP_SIZE,
            falloc::ZERO_RANGE | falloc::UNSHARE_RANGE
        ) =>
        {
            Ok(Mode::Foreign)
        }
        _ => Err(Errno::EOPNOTSUPP),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fallocate_takes_three_modes_and_refuses_as_linux_does() {
        assert_eq!(check_fallocate(0, 0, 1), Ok(Mode::Allocate(Size::Grows)));
        assert_eq!(check_fallocate(1, 0, 1), Ok(Mode::Allocate(Size::Stays)));
        assert_eq!(check_fallocate(3, 0, 1), Ok(Mode::Punch));
        assert_eq!(check_fallocate(2, 0, 1), Err(Errno::EOPNOTSUPP));
        // The end of all files comes before what this one can not.
        for mode in [0x8, 0x10, 0x11, 0x20, 0x40, 0x41, 0x80] {
            assert_eq!(check_fallocate(mode, 0, 1), Ok(Mode::Foreign));
        }
        assert_eq!(check_fallocate(9, 0, 1), Err(Errno::EOPNOTSUPP));
        assert_eq!(check_fallocate(0x12, 0, 1), Err(Errno::EOPNOTSUPP));
        // The range comes before the mode.
        assert_eq!(check_fallocate(2, 0, 0), Err(Errno::EINVAL));
        assert_eq!(check_fallocate(2, u64::MAX, 1), Err(Errno::EINVAL));
        assert_eq!(check_fallocate(0, 0, u64::MAX), Err(Errno::EINVAL));
    }

    #[test]
    fn chunks_lie_within_a_page() {
        assert_eq!(chunk_at(0, 1000), CHUNK);
        assert_eq!(chunk_at(PAGE_SIZE - 3, 1000), 3);
        assert_eq!(chunk_at(PAGE_SIZE - 3, 2), 2);
    }
}
