//! Page faults, exceptions and interrupts, and what they do to the task that took them.

use core::fmt;

use abi::channel::EventKind;
use abi::layout::USER_END;
use abi::objects::{Mm, UserFrame};
use abi::point::Point;
use abi::pte::fault;
use abi::syscall::{Errno, encode, signal, wait};

use crate::Kernel;
use crate::arch::{Arch, Ipi};
use crate::mm::{FaultError, Field, MAY_SLEEP};

impl<A: Arch> Kernel<A> {
    /// A page fault at CPL 3, at `gva`, with the architecture's error code.
    pub fn page_fault(&self, frame: &mut UserFrame, gva: u64, error: u64) {
        self.entered(frame);
        match self.user_fault(gva, error, frame.rip) {
            Ok(()) => {}
            Err(FaultError::NoMapping | FaultError::Access) => {
                self.fatal(frame, signal::SIGSEGV, Cause::Address(gva));
            }
            Err(FaultError::Bus) => self.fatal(frame, signal::SIGBUS, Cause::Address(gva)),
            Err(FaultError::NoMemory) => self.kill(frame, signal::SIGKILL, self.no_memory(gva)),
        }
    }

    /// A program's fault from its beginning to its end, but for what becomes of the program.
    fn user_fault(&self, gva: u64, error: u64, rip: u64) -> Result<(), FaultError> {
        event!(self, EventKind::FaultEnter, [gva, error, rip, 0, 0]);
        point!(self, Point::FaultEnter, [gva, error]);
        let result = self.handle_fault(self.current().mm.get(), gva, error | MAY_SLEEP);
        event!(self, EventKind::FaultExit, [gva, outcome(result), 0, 0, 0]);
        point!(self, Point::FaultExit, [gva, outcome(result)]);
        result
    }

    /// A load or a store of the 8 aligned bytes at `gva` through the soft TLB. The loaded value goes to
    /// `rdx`; 1: the translation was stale, else 0. EAGAIN: a fault was handled and the access is to be made again, after interrupts that are
    /// pending were taken, as after a fault of the processor. EFAULT: it may not be made; EIO: it lies
    /// behind the end of a file.
    #[cfg(feature = "testbed")]
    pub(super) fn testbed_access(
        &self,
        frame: &mut UserFrame,
        gva: u64,
        store: Option<u64>,
    ) -> Result<u64, Errno> {
        if !gva.is_multiple_of(8) || gva >= USER_END {
            return Err(Errno::EFAULT);
        }
        let write = store.is_some();
        point!(self, Point::Access, [gva, write.into()]);
        let error = match self.soft_translate(gva, write) {
            Ok(translation) => {
                let (value, stale) = self.soft_access(gva, translation, store);
                frame.rdx = value;
                return Ok(stale.into());
            }
            Err(error) => error,
        };
        match self.user_fault(gva, error, frame.rip) {
            Ok(()) => Err(Errno::EAGAIN),
            Err(FaultError::NoMemory) => self.kill(frame, signal::SIGKILL, self.no_memory(gva)),
            Err(error) => {
                let how = abi::channel::access::FAULT | u64::from(write);
                event!(self, EventKind::Access, [gva, 0, 0, how, 0]);
                Err(if error == FaultError::Bus {
                    Errno::EIO
                } else {
                    Errno::EFAULT
                })
            }
        }
    }

    /// A page fault at CPL 0 inside a copy from or to user memory. True: try again; false: the copy
    /// fails (with EFAULT; so it does in Linux where memory is short).
    pub fn kernel_user_fault(&self, gva: u64, error: u64) -> bool {
        // Asked again: others may have changed the entry while this one waited.
        self.fault_for_copy(gva, error) && self.ensure_access(gva, error & fault::WRITE).is_ok()
    }

    /// A page fault that a copy has, or is about to have. False: the copy fails.
    pub(super) fn fault_for_copy(&self, gva: u64, error: u64) -> bool {
        let current = self.this_cpu().current.get();
        // Under the scheduler's lock nothing may wait for an mmap_lock (Linux's pagefault_disable()).
        if gva >= USER_END || current.is_null() || self.holds(&self.root().sched_lock) {
            return false;
        }
        progress!(self);
        // Not by CPL 3, but on its behalf: no instruction of it to name.
        event!(self, EventKind::FaultEnter, [gva, error, 0, 0, 0]);
        let mm = self.obj(current).mm.get();
        // A call that copies may hold the locks of a file (`files`), for which others sleep too.
        let result = self.handle_fault(mm, gva, error | fault::USER | MAY_SLEEP);
        event!(self, EventKind::FaultExit, [gva, outcome(result), 0, 0, 0]);
        result.is_ok()
    }

    /// Makes an access possible that a device is to make for the running task.
    pub(super) fn fault_for_pin(&self, gva: u64, error: u64) -> Result<(), FaultError> {
        progress!(self);
        // As in `fault_for_copy`: no instruction of CPL 3 to name.
        event!(self, EventKind::FaultEnter, [gva, error, 0, 0, 0]);
        let result = self.handle_fault(self.current().mm.get(), gva, error | MAY_SLEEP);
        event!(self, EventKind::FaultExit, [gva, outcome(result), 0, 0, 0]);
        result
    }

    /// An exception at CPL 3 other than a page fault; `frame.vector` says which.
    pub fn exception(&self, frame: &mut UserFrame) {
        self.entered(frame);
        self.fatal(
            frame,
            signal_of(frame.vector),
            Cause::Exception(frame.vector),
        );
    }

    /// An interrupt, at any CPL: in user mode, in [`Arch::relax`] or in [`Arch::wait_for_interrupt`].
    pub fn interrupt(&self, vector: u8) {
        self.rcu_enter_kernel();
        progress!(self);
        if vector == Ipi::Shootdown as u8 {
            return self.handle_shootdown();
        }
        // Reschedule needs no more than the interrupt: the idle loop looks at its queue, and
        // `return_to_user` at what the task was asked to do.
        event!(self, EventKind::IpiReceive, [vector.into(), 0, 0, 0, 0]);
        point!(self, Point::IpiReceive, [vector.into(), 0]);
        if vector == abi::disk::VECTOR {
            self.disk_interrupt();
        }
    }

    /// Last thing before every return to CPL 3, with interrupts off from here to there: a request
    /// that comes later is followed by an interrupt of CPL 3.
    pub fn return_to_user(&self, _frame: &mut UserFrame) {
        self.honour_requests();
        self.rcu_return_to_user();
    }

    /// Continues at the fixup that the program has set for where it is, or kills it.
    fn fatal(&self, frame: &mut UserFrame, signal: u64, cause: Cause) {
        let mm = self.obj(self.current().mm.get());
        match fixup_target(fixup_words(mm), frame.rip) {
            Some(target) => {
                frame.rip = target;
                frame.rax = encode(Err(match signal {
                    signal::SIGBUS => Errno::EIO,
                    _ => Errno::EFAULT,
                }));
            }
            None => self.kill(frame, signal, cause),
        }
    }

    /// Which limit it was that the process has come up against.
    fn no_memory(&self, gva: u64) -> Cause {
        match self.group_at_limit(self.current().mm.get()) {
            Some((group, pages, max)) => Cause::Group {
                gva,
                group,
                pages,
                max,
            },
            None => Cause::NoMemory(gva),
        }
    }

    fn kill(&self, frame: &UserFrame, signal: u64, cause: Cause) -> ! {
        let task = self.current();
        self.print_line(format_args!(
            "task {} (process {}): {} at rip {:#x}, {cause}",
            task.id.get(),
            task.process.get(),
            signal_name(signal),
            frame.rip,
        ));
        self.exit_process(wait::signaled(signal))
    }
}

/// Why a program is killed, for the console.
#[derive(Clone, Copy, Debug)]
enum Cause {
    Address(u64),
    NoMemory(u64),
    /// A memory group has all the pages that it may have.
    Group {
        gva: u64,
        group: u64,
        pages: u64,
        max: u64,
    },
    Exception(u64),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(gva) => write!(f, "address {gva:#x}"),
            Self::NoMemory(gva) => write!(f, "out of memory for address {gva:#x}"),
            Self::Group {
                gva,
                group,
                pages,
                max,
            } => write!(
                f,
                "out of memory for address {gva:#x}: memory group {group} has {pages} of {max} pages"
            ),
            Self::Exception(vector) => write!(f, "exception {vector}"),
        }
    }
}

/// Result of a fault as its events and points give it.
fn outcome(result: Result<(), FaultError>) -> u64 {
    match result {
        Ok(()) => 0,
        Err(FaultError::NoMapping) => 1,
        Err(FaultError::Access) => 2,
        Err(FaultError::NoMemory) => 3,
        Err(FaultError::Bus) => 4,
    }
}

fn fixup_words(mm: &Mm) -> [u64; 3] {
    core::array::from_fn(|i| mm.fixup[i].get())
}

/// Where a fault at `rip` continues, if the program has said so.
fn fixup_target([start, end, target]: [u64; 3], rip: u64) -> Option<u64> {
    (start..end).contains(&rip).then_some(target)
}

/// The signal of an exception (SDM vol. 3A, table 6-1). Linux sends SIGBUS for #SS, #NP and #AC; here
/// every bad access is a SIGSEGV.
fn signal_of(vector: u64) -> u64 {
    match vector {
        0 | 16 | 19 => signal::SIGFPE,
        1 | 3 => signal::SIGTRAP,
        6 | 7 => signal::SIGILL,
        _ => signal::SIGSEGV,
    }
}

fn signal_name(signal: u64) -> &'static str {
    match signal {
        signal::SIGILL => "SIGILL",
        signal::SIGTRAP => "SIGTRAP",
        signal::SIGFPE => "SIGFPE",
        signal::SIGKILL => "SIGKILL",
        signal::SIGBUS => "SIGBUS",
        _ => "SIGSEGV",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn exceptions_become_linux_signals() {
        for (vector, expected) in [
            (0, "SIGFPE"),
            (1, "SIGTRAP"),
            (3, "SIGTRAP"),
            (6, "SIGILL"),
            (12, "SIGSEGV"),
            (13, "SIGSEGV"),
            (17, "SIGSEGV"),
        ] {
            assert_eq!(signal_name(signal_of(vector)), expected, "vector {vector}");
        }
    }

    #[test]
    fn a_process_without_fixup_has_none_anywhere() {
        assert_eq!(fixup_target([0; 3], 0), None);
    }

    proptest! {
        #[test]
        fn a_fixup_applies_exactly_inside_its_range(start in 0u64..100, len in 0u64..100, rip in 0u64..300) {
            let inside = rip >= start && rip < start + len;
            prop_assert_eq!(fixup_target([start, start + len, 7], rip), inside.then_some(7));
        }
    }
}
