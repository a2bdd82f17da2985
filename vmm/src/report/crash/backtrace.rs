//! The chain of frame pointers: both images are built with them.

use serde::Serialize;

use super::Hex;
use super::code::Space;
use crate::kvm::vcpu::Registers;
use crate::report::symbols::Location;

/// Most frames that are followed.
const MAX_FRAMES: usize = 64;

/// One address of a backtrace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Frame {
    /// RIP, or a return address.
    pub address: Hex,
    /// The function there, preceded by what was inlined into it; empty where nothing is known.
    pub functions: Vec<Location>,
}

/// Follows the frame pointers from `regs`. A chain that does not go upwards is at its end, or broken.
pub(super) fn unwind(
    space: &Space<'_>,
    regs: &Registers,
    resolve: impl Fn(u64) -> Vec<Location>,
) -> Vec<Frame> {
    let mut frames = vec![Frame {
        address: Hex(regs.rip),
        functions: resolve(regs.rip),
    }];
    let mut returns_to = |address: u64| {
        frames.push(Frame {
            address: Hex(address),
            // The call, not what follows it, which may be another function.
            functions: resolve(address.wrapping_sub(1)),
        });
        frames.len() < MAX_FRAMES
    };
    // A jump to nowhere: the caller has left its return address on the stack and no frame.
    if space.read(regs.rip, 1).is_empty()
        && let Some(caller) = space.word(regs.rsp).filter(|address| *address != 0)
    {
        returns_to(caller);
    }
    let mut frame = regs.rbp;
    while frame != 0
        && frame.is_multiple_of(8)
        && let Some(next) = space.word(frame)
        && let Some(address) = frame.checked_add(8).and_then(|at| space.word(at))
        && address != 0
        && returns_to(address)
        && next > frame
    {
        frame = next;
    }
    frames
}
