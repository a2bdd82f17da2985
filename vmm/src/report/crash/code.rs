//! Guest virtual memory through a vCPU's page tables, and the code in it.

use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};
use serde::Serialize;

use super::Hex;
use crate::inspect::walk::{self, Translation};
use crate::memory::PhysMem;

/// Instructions that are shown.
const INSTRUCTIONS: usize = 8;
/// Longest instruction (SDM vol. 2A, 2.3.11).
const MAX_BYTES: usize = 15;

/// One instruction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Instruction {
    /// Where it is.
    pub address: Hex,
    /// Its bytes, in hexadecimal.
    pub bytes: String,
    /// Its text, in AT&T syntax.
    pub text: String,
}

/// An address space.
pub(super) struct Space<'a> {
    pub(super) ram: &'a dyn PhysMem,
    pub(super) cr3: u64,
}

impl Space<'_> {
    /// The bytes from `gva` on, at most `len`, up to the first that is not mapped.
    pub(super) fn read(&self, gva: u64, len: usize) -> Vec<u8> {
        const PAGE: u64 = abi::layout::PAGE_SIZE;
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let Some(at) = gva.checked_add(bytes.len() as u64) else {
                break;
            };
            let Translation::Mapped { gpa, .. } = walk::translate(self.ram, self.cr3, at).result
            else {
                break;
            };
            let in_page = (PAGE - at % PAGE) as usize;
            let mut part = vec![0; in_page.min(len - bytes.len())];
            if self.ram.read(gpa, &mut part).is_err() {
                break;
            }
            bytes.extend(part);
        }
        bytes
    }

    /// The word at `gva`.
    pub(super) fn word(&self, gva: u64) -> Option<u64> {
        self.read(gva, 8).try_into().ok().map(u64::from_le_bytes)
    }
}

/// The instructions from `rip` on.
pub(super) fn disassemble(space: &Space<'_>, rip: u64) -> Vec<Instruction> {
    let bytes = space.read(rip, INSTRUCTIONS * MAX_BYTES);
    let mut decoder = Decoder::with_ip(64, &bytes, rip, DecoderOptions::NONE);
    let mut formatter = GasFormatter::new();
    formatter.options_mut().set_branch_leading_zeros(false);
    let mut instructions = Vec::new();
    while decoder.can_decode() && instructions.len() < INSTRUCTIONS {
        let from = decoder.position();
        let instruction = decoder.decode();
        let mut text = String::new();
        formatter.format(&instruction, &mut text);
        let hex = bytes[from..decoder.position()]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<Vec<_>>();
        instructions.push(Instruction {
            address: Hex(instruction.ip()),
            bytes: hex.join(" "),
            text,
        });
    }
    instructions
}
