//! The chain of frame pointers: both images are built with them.
//!
//! Every entry into the kernel leaves the interrupted RBP and RIP on the stack as a call would, right
//! below the interrupted registers (`entry.rs` of the kernel), so the chain leads from a handler
//! through the kernel into the program, and tells what each part was interrupted by.

use serde::Serialize;

use super::Hex;
use super::code::Space;
use crate::kvm::vcpu::Registers;
use crate::report::symbols::Location;

/// Most frames that are followed.
const MAX_FRAMES: usize = 64;
/// [`Entry::vector`] of a system call: no exception has it.
pub(super) const SYSCALL: u64 = 0x80;
/// Exceptions have the vectors below (SDM vol. 3A, 6.3.1).
const EXCEPTIONS: u64 = 32;

/// One address of a backtrace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Frame {
    /// RIP, or a return address.
    pub address: Hex,
    /// The function there, preceded by what was inlined into it; empty where nothing is known.
    pub functions: Vec<Location>,
    /// How the kernel was entered from here, where it was not by a call.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entry: Option<Box<Entry>>,
}

/// An entry into the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Vector of the exception or interrupt; 128 for a system call.
    pub vector: u64,
    /// Error code, 0 where the vector has none.
    pub error: Hex,
    /// Privilege level that was interrupted.
    pub cpl: u8,
    /// The interrupted registers.
    pub regs: Registers,
}

impl Entry {
    /// True where the kernel's own code raised an exception.
    pub(super) fn is_kernel_fault(&self) -> bool {
        self.cpl == 0 && self.vector < EXCEPTIONS
    }

    /// The interrupted registers above the frame link `link`, if they repeat what the link says.
    fn above(space: &Space<'_>, link: u64, rbp: u64, rip: u64) -> Option<Self> {
        let bytes = space.read(link.checked_add(16)?, 22 * 8);
        let words: Vec<u64> = bytes
            .as_chunks()
            .0
            .iter()
            .map(|word| u64::from_le_bytes(*word))
            .collect();
        let [
            r15,
            r14,
            r13,
            r12,
            r11,
            r10,
            r9,
            r8,
            rdi,
            rsi,
            saved_rbp,
            rbx,
            rdx,
            rcx,
            rax,
            vector,
            error,
            saved_rip,
            cs,
            rflags,
            rsp,
            _ss,
        ] = words[..].try_into().ok()?;
        let is_entry = saved_rbp == rbp && saved_rip == rip && vector < 256 && cs < 0x10000;
        is_entry.then_some(Self {
            vector,
            error: Hex(error),
            cpl: (cs & 3) as u8,
            regs: Registers {
                rax,
                rbx,
                rcx,
                rdx,
                rsi,
                rdi,
                rsp,
                rbp,
                r8,
                r9,
                r10,
                r11,
                r12,
                r13,
                r14,
                r15,
                rip,
                rflags,
            },
        })
    }
}

/// Follows the frame pointers from `regs`. A chain that does not go upwards on a stack is at its end, or
/// broken.
pub(super) fn unwind(
    space: &Space<'_>,
    regs: &Registers,
    resolve: impl Fn(u64) -> Vec<Location>,
) -> Vec<Frame> {
    let at = |address: u64, entry: Option<Entry>| {
        // Of a call, not what follows it, which may be another function. An exception is at its address.
        let is_call = entry.as_ref().is_none_or(|entry| entry.vector == SYSCALL);
        Frame {
            address: Hex(address),
            functions: resolve(address.wrapping_sub(u64::from(is_call))),
            entry: entry.map(Box::new),
        }
    };
    let mut frames = vec![Frame {
        functions: resolve(regs.rip),
        ..at(regs.rip, None)
    }];
    // A jump to nowhere: the caller has left its return address on the stack and no frame.
    if space.read(regs.rip, 1).is_empty()
        && let Some(caller) = space.word(regs.rsp).filter(|address| *address != 0)
    {
        frames.push(at(caller, None));
    }
    let mut link = regs.rbp;
    while link != 0
        && link.is_multiple_of(8)
        && frames.len() < MAX_FRAMES
        && let Some(next) = space.word(link)
        && let Some(address) = link.checked_add(8).and_then(|at| space.word(at))
        && address != 0
    {
        let entry = Entry::above(space, link, next, address);
        // A program's stack lies where it wants to; a loop ends at MAX_FRAMES.
        let leaves_stack = entry.is_some();
        frames.push(at(address, entry));
        if next <= link && !leaves_stack {
            break;
        }
        link = next;
    }
    frames
}

/// The frame that the crash is about: what raised an exception in the kernel, or called for a panic;
/// else the first.
pub(super) fn site(frames: &[Frame]) -> usize {
    let faulted = frames
        .iter()
        .position(|frame| frame.entry.as_ref().is_some_and(|e| e.is_kernel_fault()));
    let is_core = |frame: &Frame| {
        frame
            .functions
            .last()
            .is_some_and(|location| location.function.starts_with("core::"))
    };
    let panicked = || {
        let handler = frames.iter().position(|frame| {
            frame
                .functions
                .iter()
                .any(|location| location.function.ends_with("rust_begin_unwind"))
        })?;
        let after = handler + 1;
        let caller = frames[after..].iter().position(|frame| !is_core(frame))?;
        Some(after + caller)
    };
    faulted.or_else(panicked).unwrap_or(0)
}
