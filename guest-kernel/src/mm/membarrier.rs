//! membarrier (Linux 6.18's kernel/sched/membarrier.c): a full memory barrier on every CPU that runs the process.
//!
//! The barrier is a shootdown of nothing: the IPI and its acknowledgement are what orders ([`crate::sync::shootdown`]). A CPU
//! that the mm's mask does not name, or that is lazy, runs none of its threads, and passes a full barrier before it
//! does (`tlb`, `lazy`). Every return to CPL 3 is an `iretq`, which serialises, so SYNC_CORE asks for nothing more.
//!
//! MEMBARRIER_CMD_GLOBAL is for the threads of all processes, and waits in Linux for a grace period of RCU. Here a CPU at
//! CPL 3 is quiescent without a barrier, as with Linux's nohz_full (where the command does not exist), so a grace period
//! orders nothing there: it is the same shootdown, of all CPUs that are not lazy.

use abi::objects::{Mm, Pa};
use abi::syscall::{Errno, membarrier};
use core::sync::atomic::Ordering::SeqCst;
use core::sync::atomic::fence;

use super::{Field, FreedTables};
use crate::Kernel;
use crate::arch::Arch;

/// Commands that exist.
const COMMANDS: u64 = membarrier::GLOBAL
    | membarrier::PRIVATE_EXPEDITED
    | membarrier::REGISTER_PRIVATE_EXPEDITED
    | membarrier::PRIVATE_EXPEDITED_SYNC_CORE
    | membarrier::REGISTER_PRIVATE_EXPEDITED_SYNC_CORE
    | membarrier::GET_REGISTRATIONS;

impl<A: Arch> Kernel<A> {
    /// membarrier.
    ///
    /// # Errors
    /// EINVAL for flags and for commands that do not exist; EPERM for a barrier that the process has not registered for.
    pub fn membarrier(&self, mm: Pa<Mm>, command: u64, flags: u64) -> Result<u64, Errno> {
        if flags != 0 {
            return Err(Errno::EINVAL);
        }
        let space = self.obj(mm);
        match command {
            membarrier::QUERY => return Ok(COMMANDS),
            membarrier::GET_REGISTRATIONS => return Ok(registrations(space.membarrier.get())),
            register @ (membarrier::REGISTER_PRIVATE_EXPEDITED
            | membarrier::REGISTER_PRIVATE_EXPEDITED_SYNC_CORE) => {
                space.membarrier.fetch_or(register, SeqCst);
            }
            membarrier::GLOBAL => {
                fence(SeqCst);
                self.barrier_everywhere(mm);
                fence(SeqCst);
            }
            barrier @ (membarrier::PRIVATE_EXPEDITED | membarrier::PRIVATE_EXPEDITED_SYNC_CORE) => {
                // Each command is the bit below its registration.
                if space.membarrier.get() & barrier << 1 == 0 {
                    return Err(Errno::EPERM);
                }
                fence(SeqCst);
                self.flush_range(mm, 0, 0, FreedTables::No);
                fence(SeqCst);
            }
            _ => return Err(Errno::EINVAL),
        }
        Ok(0)
    }
}

/// Who has registered for SYNC_CORE seems to have registered for both, but is not ready for the plain barrier (Linux's
/// membarrier_register_private_expedited sets the state of both, and membarrier_get_registrations looks at that).
fn registrations(registered: u64) -> u64 {
    match registered & membarrier::REGISTER_PRIVATE_EXPEDITED_SYNC_CORE {
        0 => registered,
        _ => registered | membarrier::REGISTER_PRIVATE_EXPEDITED,
    }
}
