//! Calls about memory that read or write a program's own: mincore and the limits of a process.

use abi::layout::PAGE_SIZE;
use abi::objects::{Mm, Pa};
use abi::syscall::Errno;

use crate::Kernel;
use crate::arch::Arch;
use crate::mm::{Field, Limits};

/// Pages that mincore tells of at a time (Linux: what fits in a page).
const CHUNK: u64 = 256;
/// Pages that move_pages tells of at a time (Linux's DO_PAGES_STAT_CHUNK_NR).
const PAGES_AT_ONCE: usize = 16;
/// Flags of move_pages; the second needs CAP_SYS_NICE.
const MPOL_MF_MOVE: u64 = 1 << 1;
const MPOL_MF_MOVE_ALL: u64 = 1 << 2;
/// Bytes of a struct rlimit.
const LIMITS_BYTES: usize = 16;

impl<A: Arch> Kernel<A> {
    /// mincore (Linux's mm/mincore.c).
    pub(super) fn mincore_call(&self, start: u64, len: u64, vector: u64) -> Result<u64, Errno> {
        if !start.is_multiple_of(PAGE_SIZE) {
            return Err(Errno::EINVAL);
        }
        self.check_user(start, len).map_err(|_| Errno::ENOMEM)?;
        let pages = len.div_ceil(PAGE_SIZE);
        self.check_user(vector, pages)?;
        let mm = self.current().mm.get();
        let mut told = 0;
        while told < pages {
            let mut chunk = [0; CHUNK as usize];
            let chunk = &mut chunk[..(pages - told).min(CHUNK) as usize];
            // Not under the mmap_lock: the copy may fault.
            let more = self.mincore(mm, start + told * PAGE_SIZE, chunk)?;
            self.copy_out(vector + told, &chunk[..more])?;
            told += more as u64;
        }
        Ok(0)
    }

    /// move_pages (Linux's `kernel_move_pages`, mm/migrate.c). There is one node, 0, and every page is on it: nothing
    /// ever moves, and with or without `nodes` the status of a page is the same.
    pub(super) fn move_pages(
        &self,
        pid: u64,
        count: u64,
        (pages, nodes, status): (u64, u64, u64),
        flags: u64,
    ) -> Result<u64, Errno> {
        if flags & !(MPOL_MF_MOVE | MPOL_MF_MOVE_ALL) != 0 {
            return Err(Errno::EINVAL);
        }
        if flags & MPOL_MF_MOVE_ALL != 0 {
            return Err(Errno::EPERM);
        }
        let mm = self.mm_of(pid)?;
        let result = if nodes == 0 {
            self.pages_status(mm, count, pages, status)
        } else {
            self.pages_to_nodes(mm, count, (pages, nodes, status))
        };
        self.mm_drop(mm);
        result.map(|()| 0)
    }

    /// Linux's `do_pages_stat`: in pieces, of which each is told before the next is read.
    fn pages_status(&self, mm: Pa<Mm>, count: u64, pages: u64, status: u64) -> Result<(), Errno> {
        let mut done = 0;
        while done < count {
            let chunk = (count - done).min(PAGES_AT_ONCE as u64) as usize;
            let mut statuses = [0; PAGES_AT_ONCE * 4];
            let mut addresses = [0; PAGES_AT_ONCE * 8];
            let from = element(pages, done, 8);
            self.copy_in(&mut addresses[..chunk * 8], from)?;
            let addresses = addresses.chunks_exact(8).take(chunk);
            for (address, status) in addresses.zip(statuses.chunks_exact_mut(4)) {
                let address = address.try_into().map_or(0, u64::from_le_bytes);
                status.copy_from_slice(&status_of(self.page_status(mm, address)).to_le_bytes());
            }
            self.copy_out(element(status, done, 4), &statuses[..chunk * 4])?;
            done += chunk as u64;
        }
        Ok(())
    }

    /// Linux's `do_pages_move`: page by page, and an error ends it.
    fn pages_to_nodes(
        &self,
        mm: Pa<Mm>,
        count: u64,
        (pages, nodes, status): (u64, u64, u64),
    ) -> Result<(), Errno> {
        for page in 0..count {
            let mut address = [0; 8];
            self.copy_in(&mut address, element(pages, page, 8))?;
            if self.get_user(element(nodes, page, 4))? != 0 {
                return Err(Errno::ENODEV);
            }
            let found = self.page_status(mm, u64::from_le_bytes(address));
            self.put_user(element(status, page, 4), status_of(found))?;
        }
        Ok(())
    }

    /// The mm of the task `pid`, or of the running one where that is 0, which stays until it is dropped (Linux's
    /// `find_mm_struct`).
    fn mm_of(&self, pid: u64) -> Result<Pa<Mm>, Errno> {
        let _lock = self.sched_lock();
        let task = match pid as u32 {
            0 => self.this_cpu().current.get(),
            pid => {
                let mut tasks = self.tasks();
                let found = tasks.find(|task| self.obj(*task).id.get() == pid);
                found.ok_or(Errno::ESRCH)?
            }
        };
        let mm = self.obj(task).mm.get().some().ok_or(Errno::EINVAL)?;
        self.mm_grab(mm);
        Ok(mm)
    }

    /// prlimit64, and with one of the two pointers null getrlimit and setrlimit (Linux's kernel/sys.c).
    pub(super) fn prlimit(
        &self,
        pid: u64,
        resource: u64,
        (new, old): (u64, u64),
    ) -> Result<u64, Errno> {
        let wanted = match new {
            0 => None,
            at => {
                let mut bytes = [0; LIMITS_BYTES];
                self.copy_in(&mut bytes, at)?;
                Some(limits_of(bytes))
            }
        };
        let mm = {
            let _lock = self.sched_lock();
            let task = self.find_task(pid)?;
            let mm = self.obj(task).mm.get().some().ok_or(Errno::ESRCH)?;
            // Its process may end before its limits are looked at.
            self.mm_grab(mm);
            mm
        };
        // The number of the resource is an unsigned int.
        let result = self.rlimit(mm, resource & 0xffff_ffff, wanted);
        self.mm_drop(mm);
        let (soft, hard) = result?;
        if old != 0 {
            let mut bytes = [0; LIMITS_BYTES];
            bytes[..8].copy_from_slice(&soft.to_le_bytes());
            bytes[8..].copy_from_slice(&hard.to_le_bytes());
            self.copy_out(old, &bytes)?;
        }
        Ok(0)
    }
}

/// What move_pages tells of a page: its node, or an error as calls return it.
fn status_of(found: Result<u32, Errno>) -> u32 {
    found.unwrap_or_else(|errno| (-errno.0) as u32)
}

/// Address of an element of a program's array, which may wrap and is refused then.
fn element(array: u64, index: u64, bytes: u64) -> u64 {
    array.wrapping_add(index.wrapping_mul(bytes))
}

fn limits_of(bytes: [u8; LIMITS_BYTES]) -> Limits {
    let both = u128::from_le_bytes(bytes);
    (both as u64, (both >> 64) as u64)
}
