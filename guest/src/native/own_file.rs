//! Files of /proc/self, which show the process that has opened them.
//!
//! Nothing here allocates: it runs in forked processes of a program with threads.

use std::ffi::CStr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use abi::syscall::{Errno, decode, nr};

use crate::rt::raw_syscall;

/// One of them, opened once by each process.
pub(super) struct OwnFile {
    path: &'static CStr,
    /// Process and descriptor.
    opened: AtomicU64,
}

impl OwnFile {
    pub(super) const fn new(path: &'static CStr) -> Self {
        Self {
            path,
            opened: AtomicU64::new(0),
        }
    }

    /// The calling process's descriptor.
    pub(super) fn descriptor(&self) -> Result<u64, Errno> {
        let process = decode(raw_syscall(nr::GETPID, [0; 6]))?;
        let opened = self.opened.load(Relaxed);
        if opened >> 32 == process {
            return Ok(opened & 0xffff_ffff);
        }
        let file = open(self.path)?;
        self.opened.store(process << 32 | file, Relaxed);
        Ok(file)
    }
}

/// Opens a file to read it.
pub(super) fn open(path: &CStr) -> Result<u64, Errno> {
    let path = path.as_ptr().expose_provenance() as u64;
    let args = [path, libc::O_CLOEXEC as u64, 0, 0, 0, 0];
    decode(raw_syscall(libc::SYS_open.cast_unsigned(), args))
}
