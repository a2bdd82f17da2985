//! User memory, with the bounds of user space and the permissions of its pages, and lines on the console.
//!
//! At CPL 0 the processor looks at U only under CR4.SMAP, which a host that emulates CPL 0 does not have,
//! and an entry of a PROT_NONE page is present without U. So a copy goes page by page, and looks at the
//! entry of each before the back end touches it: what a program may not read, the kernel does not read
//! for it.

use core::fmt::{self, Write};

use abi::layout::{PAGE_SIZE, USER_END};
use abi::pte::fault;
use abi::syscall::Errno;

use crate::Kernel;
use crate::arch::Arch;

/// Bytes that go to the console at a time.
const CHUNK: usize = 128;
/// Most that one write takes (Linux's MAX_RW_COUNT).
const MAX_WRITE: u64 = 0x7fff_f000;

impl<A: Arch> Kernel<A> {
    /// Refuses a range that does not lie in user space (Linux's `access_ok()`).
    pub(super) fn check_user(&self, gva: u64, len: u64) -> Result<(), Errno> {
        match gva.checked_add(len) {
            Some(end) if end <= USER_END => Ok(()),
            _ => Err(Errno::EFAULT),
        }
    }

    /// Copies from the running task's memory.
    pub(super) fn copy_in(&self, dst: &mut [u8], gva: u64) -> Result<(), Errno> {
        self.check_user(gva, dst.len() as u64)?;
        whole(self.copy_in_part(dst, gva), dst.len())
    }

    /// Copies from the running task's memory up to the first byte that it may not read. Returns how many bytes.
    pub(super) fn copy_in_part(&self, dst: &mut [u8], gva: u64) -> usize {
        let mut done = 0;
        while done < dst.len() {
            let from = gva + done as u64;
            let part = dst.len().min(done + rest_of_page(from));
            let copied = self.ensure_access(from, 0).is_ok()
                && self.arch.copy_from_user(&mut dst[done..part], from).is_ok();
            if !copied {
                break;
            }
            done = part;
        }
        done
    }

    /// Copies to the running task's memory.
    pub(super) fn copy_out(&self, gva: u64, src: &[u8]) -> Result<(), Errno> {
        self.check_user(gva, src.len() as u64)?;
        whole(self.copy_out_part(gva, src), src.len())
    }

    /// Copies to the running task's memory up to the first byte that it may not write. Returns how many bytes.
    pub(super) fn copy_out_part(&self, gva: u64, src: &[u8]) -> usize {
        let mut done = 0;
        while done < src.len() {
            let to = gva + done as u64;
            let part = src.len().min(done + rest_of_page(to));
            let copied = self.ensure_access(to, fault::WRITE).is_ok()
                && self.arch.copy_to_user(to, &src[done..part]).is_ok();
            if !copied {
                break;
            }
            done = part;
        }
        done
    }

    /// Makes sure that the running task may make the access of page-fault `error` at `gva` itself.
    ///
    /// It stays so for the copy that follows at once: interrupts are off until then, so no change of
    /// the entry that takes permission away can complete, its flush would wait for this CPU. An entry that
    /// is cleared meanwhile makes the copy fault, and the fault handler asks the VMA.
    pub(super) fn ensure_access(&self, gva: u64, error: u64) -> Result<(), Errno> {
        let mm = self.obj(self.current().mm.get());
        while let Err(error) = self.check_access(mm, gva, error) {
            if !self.fault_for_copy(gva, error) {
                return Err(Errno::EFAULT);
            }
        }
        Ok(())
    }

    /// Reads an `int` of the running task.
    pub(super) fn get_user(&self, gva: u64) -> Result<u32, Errno> {
        let mut bytes = [0; 4];
        self.copy_in(&mut bytes, gva)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Writes an `int` of the running task.
    pub(super) fn put_user(&self, gva: u64, value: u32) -> Result<(), Errno> {
        self.copy_out(gva, &value.to_le_bytes())
    }

    /// write to the console.
    pub(super) fn write_console(&self, gva: u64, len: u64) -> Result<u64, Errno> {
        let len = len.min(MAX_WRITE);
        self.check_user(gva, len)?;
        let mut written = 0;
        while written < len {
            let mut buffer = [0; CHUNK];
            let chunk = &mut buffer[..(len - written).min(CHUNK as u64) as usize];
            match self.copy_in(chunk, gva + written) {
                Ok(()) => self.arch.console(chunk),
                Err(errno) if written == 0 => return Err(errno),
                Err(_) => break,
            }
            written += chunk.len() as u64;
        }
        Ok(written)
    }

    /// Prints one line on the console, in one piece where it is short.
    pub(super) fn print_line(&self, text: fmt::Arguments<'_>) {
        let mut line = Line {
            arch: &self.arch,
            bytes: [0; CHUNK],
            used: 0,
        };
        // Neither `Line` nor the formatters of integers and strings fail.
        let _ = line.write_fmt(text);
        let _ = line.write_str("\n");
        line.flush();
    }
}

/// EFAULT unless all `bytes` were copied.
fn whole(copied: usize, bytes: usize) -> Result<(), Errno> {
    if copied == bytes {
        Ok(())
    } else {
        Err(Errno::EFAULT)
    }
}

/// Bytes from `gva` to the end of its page.
fn rest_of_page(gva: u64) -> usize {
    (PAGE_SIZE - gva % PAGE_SIZE) as usize
}

struct Line<'k, A: Arch> {
    arch: &'k A,
    bytes: [u8; CHUNK],
    used: usize,
}

impl<A: Arch> Line<'_, A> {
    fn flush(&mut self) {
        self.arch.console(&self.bytes[..self.used]);
        self.used = 0;
    }
}

impl<A: Arch> Write for Line<'_, A> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut text = text.as_bytes();
        while !text.is_empty() {
            if self.used == CHUNK {
                self.flush();
            }
            let (now, later) = text.split_at(text.len().min(CHUNK - self.used));
            self.bytes[self.used..self.used + now.len()].copy_from_slice(now);
            self.used += now.len();
            text = later;
        }
        Ok(())
    }
}
