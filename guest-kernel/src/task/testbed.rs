//! The testbed's own system calls.
#![allow(unsafe_code, reason = "a crash on request")]

use abi::channel::{Doorbell, ReportKind};
use abi::layout::USER_END;
#[cfg(feature = "testbed")]
use abi::objects::UserFrame;
#[cfg(feature = "testbed")]
use abi::oracle::Area;
use abi::param::TlbBackEnd;
#[cfg(feature = "testbed")]
use abi::point::Point;
use abi::syscall::Errno;
#[cfg(feature = "testbed")]
use abi::syscall::crash;
#[cfg(feature = "testbed")]
use abi::syscall::nr;

use crate::Kernel;
use crate::arch::Arch;
use crate::mm::Field;

impl<A: Arch> Kernel<A> {
    /// The calls that stand for something that is no system call; none where `frame` asks for another.
    #[cfg(feature = "testbed")]
    pub(super) fn testbed_call(&self, frame: &mut UserFrame) -> Option<Result<u64, Errno>> {
        let gva = frame.rdi;
        Some(match frame.rax {
            nr::TESTBED_LOAD => self.testbed_access(frame, gva, None),
            nr::TESTBED_STORE => {
                let value = frame.rsi;
                self.testbed_access(frame, gva, Some(value))
            }
            nr::TESTBED_RELAX => self.testbed_point(Point::UserRelax),
            nr::TESTBED_BEGIN => self.testbed_point(Point::TestBegin),
            nr::TESTBED_END => self.testbed_point(Point::TestEnd),
            _ => return None,
        })
    }

    #[cfg(feature = "testbed")]
    fn testbed_point(&self, point: Point) -> Result<u64, Errno> {
        point!(self, point, [self.current().id.get().into(), 0]);
        Ok(0)
    }

    /// `peek(pid, gva)`.
    #[cfg(feature = "testbed")]
    pub(super) fn testbed_peek(&self, pid: u64, gva: u64) -> Result<u64, Errno> {
        if !gva.is_multiple_of(8) || gva >= USER_END {
            return Err(Errno::EFAULT);
        }
        let id = {
            let _lock = self.sched_lock();
            let mut tasks = self.tasks().map(|task| self.obj(task));
            let found = tasks.find(|t| u64::from(t.process.get()) == pid && !t.mm.get().is_null());
            let mm = found.ok_or(Errno::ESRCH)?.mm.get();
            self.obj(mm).id.get()
        };
        // Nothing holds the mm from here on but RCU.
        self.peek(id, gva)
    }

    /// `maps(start, end, buffer, count)`: in pieces, because the copy out of each may fault.
    #[cfg(feature = "testbed")]
    pub(super) fn testbed_maps(
        &self,
        start: u64,
        end: u64,
        buffer: u64,
        count: u64,
    ) -> Result<u64, Errno> {
        let mm = self.current().mm.get();
        let (mut told, mut at) = (0, start);
        while told < count {
            let mut areas = [Area::default(); 4];
            let room = (count - told).min(areas.len() as u64) as usize;
            let found = self.areas(mm, at, end, &mut areas[..room]);
            let to = buffer.wrapping_add(told * size_of::<Area>() as u64);
            self.copy_out(to, Area::bytes(&areas[..found]))?;
            told += found as u64;
            if found < room {
                break;
            }
            at = areas[found - 1].end;
        }
        Ok(told)
    }

    /// `tlb()`; without the testbed there is only the processor's.
    pub(super) fn testbed_tlb(&self) -> u64 {
        match self.config.tlb {
            _ if !cfg!(feature = "testbed") => 0,
            TlbBackEnd::Hw => 0,
            TlbBackEnd::Soft => 1,
            TlbBackEnd::Both => 2,
        }
    }

    /// `report(kind, gva, expected, found)`: tells the host; returns when it lets this CPU go on.
    pub(super) fn testbed_report(
        &self,
        kind: u64,
        gva: u64,
        expected: u64,
        found: u64,
    ) -> Result<u64, Errno> {
        ReportKind::from_u64(kind).ok_or(Errno::EINVAL)?;
        let report = &self.arch.channel().report;
        report.kind.set(kind);
        report.gva.set(gva);
        report.expected.set(expected);
        report.found.set(found);
        report.task.set(self.current().id.get().into());
        self.arch.doorbell(Doorbell::Report);
        Ok(0)
    }

    /// `fault_fixup(start, end, fixup)`; an empty range switches it off.
    pub(super) fn testbed_fault_fixup(
        &self,
        start: u64,
        end: u64,
        fixup: u64,
    ) -> Result<u64, Errno> {
        // A fixup inside the range would fault for ever, and one outside user space would fault
        // in the kernel's return.
        if start > end || end > USER_END || fixup >= USER_END || (start..end).contains(&fixup) {
            return Err(Errno::EINVAL);
        }
        let words = &self.obj(self.current().mm.get()).fixup;
        for (word, value) in words.iter().zip([start, end, fixup]) {
            word.set(value);
        }
        Ok(0)
    }

    /// `crash(how)`: out of line, so that a backtrace names who asked for it.
    #[cfg(feature = "testbed")]
    #[inline(never)]
    pub(super) fn testbed_crash(&self, how: u64) -> Result<u64, Errno> {
        match how {
            crash::PANIC => panic!("task {} asked for a panic", self.current().id.get()),
            crash::WILD => Ok(wild_load()),
            crash::HANG => hang(),
            _ => Err(Errno::EINVAL),
        }
    }
}

#[cfg(feature = "testbed")]
fn wild_load() -> u64 {
    // SAFETY: none, on purpose: no kernel maps this address, so the load faults and the kernel ends.
    unsafe { (crash::WILD_GVA as *const u64).read_volatile() }
}

/// Interrupts are off at CPL 0 but in `Arch::relax`, which this is not: nothing gets in.
#[cfg(feature = "testbed")]
fn hang() -> ! {
    loop {
        core::hint::spin_loop();
    }
}
