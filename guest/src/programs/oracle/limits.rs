//! Limits of what a process may map. The executors' own processes are not alike, so that limits of address space and of data
//! are told from what a process has when a case begins; and how much that is, only its kernel knows.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

use abi::layout::PAGE_SIZE;
use abi::syscall::{Errno, nr, prot, rlimit};

use crate::sys::{ANONYMOUS, Sys};

/// Bytes that count against the limits of address space and data.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Used {
    pub(super) address_space: u64,
    pub(super) data: u64,
}

impl Used {
    pub(super) fn find<S: Sys>(sys: &S) -> Result<Self, Errno> {
        Ok(Self {
            address_space: least(sys, rlimit::AS)?,
            data: least(sys, rlimit::DATA)?,
        })
    }
}

/// The largest limit that does not admit one page more.
fn least<S: Sys>(sys: &S, resource: u64) -> Result<u64, Errno> {
    // Not 0, which Linux takes for the hard limit (may_expand_vm).
    let (mut refuses, mut admits) = (1, 1 << 47 >> 12);
    while admits - refuses > 1 {
        let middle = (refuses + admits) / 2;
        set_soft(sys, resource, middle * PAGE_SIZE)?;
        match sys.mmap(0, PAGE_SIZE, prot::READ | prot::WRITE, ANONYMOUS) {
            Ok(page) => {
                sys.munmap(page, PAGE_SIZE)?;
                admits = middle;
            }
            Err(Errno::ENOMEM) => refuses = middle,
            Err(errno) => return Err(errno),
        }
    }
    set_soft(sys, resource, rlimit::INFINITY)?;
    Ok(refuses * PAGE_SIZE)
}

/// Sets the soft limit and leaves the hard one alone. Returns 0.
pub(super) fn set_soft<S: Sys>(sys: &S, resource: u64, soft: u64) -> Result<u64, Errno> {
    let limits = [const { AtomicU64::new(0) }; 2];
    sys.lend(&limits, |old| {
        sys.syscall(nr::PRLIMIT64, [0, resource, 0, old, 0, 0])
    })?;
    limits[0].store(soft, Relaxed);
    sys.lend(&limits, |new| {
        sys.syscall(nr::PRLIMIT64, [0, resource, new, 0, 0, 0])
    })
}
