//! What the entries of `entry` do: tells system calls, faults and interrupts apart and hands each to
//! the portable kernel.

use abi::objects::UserFrame;
use abi::pte::fault;

use super::boot::kernel;
use super::descriptors::{exception_name, user_rflags};
use super::entry::{self, EntryFrame, FIRST_IPI, SYSCALL_VECTOR};
use super::registers::fault_address;
use super::{apic, percpu, registers, user};

const PAGE_FAULT: u64 = 14;
const LAST_EXCEPTION: u64 = 31;

/// Every entry but the fatal ones. Returns to continue at `entry`.
pub(super) extern "sysv64" fn trap(entry: &mut EntryFrame) {
    let frame = &mut entry.user;
    if frame.cs & 3 == 0 {
        return kernel_trap(frame);
    }
    let kernel = kernel();
    match frame.vector {
        SYSCALL_VECTOR => kernel.syscall(frame),
        PAGE_FAULT => {
            let gva = fault_address();
            if is_system_call(frame, gva) {
                frame.rip = frame.rcx;
                entry.link_rip = frame.rcx;
                frame.rflags = user_rflags(frame.r11);
                frame.vector = SYSCALL_VECTOR;
                frame.error = 0;
                kernel.syscall(frame);
            } else {
                kernel.page_fault(frame, gva, frame.error);
            }
        }
        ..=LAST_EXCEPTION => kernel.exception(frame),
        vector => interrupt(vector),
    }
    kernel.return_to_user(frame);
}

/// `SYSCALL` on a host that emulates CPL 0 sets RIP, RCX and R11 but leaves CPL at 3, so that the fetch
/// of the entry's first instruction, on a present supervisor page, faults. A program that jumps there
/// on its own gets the system call that it would have got from `SYSCALL`; one with a return address
/// that no `SYSCALL` can produce gets the fault, for `iretq` must not see a non-canonical RIP.
fn is_system_call(frame: &UserFrame, gva: u64) -> bool {
    frame.error == fault::PRESENT | fault::USER | fault::FETCH
        && gva == frame.rip
        && gva == entry::syscall_entry()
        && frame.rcx <= abi::layout::USER_END
}

/// At CPL 0 there are interrupts in the two windows of `registers`, and page faults of the user-copy
/// routine; everything else is a bug of the kernel.
fn kernel_trap(frame: &mut UserFrame) {
    match frame.vector {
        FIRST_IPI.. => {
            frame.rip = registers::past_halt(frame.rip);
            interrupt(frame.vector);
        }
        PAGE_FAULT if user::is_access(frame.rip) => {
            if !kernel().kernel_user_fault(fault_address(), frame.error) {
                frame.rip = user::fixup();
            }
        }
        _ => fatal(frame),
    }
}

/// The end of interrupt comes first, as in Linux's `sysvec_*`: an IPI that is sent again while the
/// handler runs stays pending until interrupts are on again.
fn interrupt(vector: u64) {
    // A spurious interrupt is in no ISR bit and must not be ended (SDM vol. 3A, 11.9).
    if vector != apic::SPURIOUS_VECTOR {
        let kernel = kernel();
        kernel.arch.apic.end_of_interrupt();
        kernel.interrupt(vector as u8);
    }
}

/// First thing on a new thread's stack. Returns to enter CPL 3 with `entry`.
pub(super) extern "sysv64" fn started(entry: &mut EntryFrame) {
    let kernel = kernel();
    kernel.task_started();
    kernel.return_to_user(&mut entry.user);
}

/// NMI, #DF and #MC.
pub(super) extern "sysv64" fn fatal_trap(entry: &EntryFrame) -> ! {
    fatal(&entry.user)
}

/// An exception that a correct kernel on a correct machine never sees.
fn fatal(frame: &UserFrame) -> ! {
    percpu::recover();
    panic!(
        "{} at CPL {}: rip {:#x} rsp {:#x} error {:#x} cr2 {:#x} rflags {:#x}",
        exception_name(frame.vector),
        frame.cs & 3,
        frame.rip,
        frame.rsp,
        frame.error,
        fault_address(),
        frame.rflags
    );
}
