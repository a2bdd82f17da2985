//! Loads the kernel image and maps it.
//!
//! W^X holds for aliases too: what the image maps without W is mapped without W in the direct map as
//! well, and nothing in the direct map may be executed.

use std::io::Cursor;
use std::ops::Range;

use abi::layout::{HUGE_PAGE_SIZE, KERNEL_LOAD_GPA, KERNEL_VIRT_OFFSET, PAGE_SIZE};

use linux_loader::loader::{self, KernelLoader};

use super::tables::{Access, BootTables};
use super::{BootError, Elf, ElfError};
use crate::memory::{GuestRam, PhysMem};

/// First GVA of the kernel image.
const FIRST: u64 = KERNEL_VIRT_OFFSET + KERNEL_LOAD_GPA;
/// First GVA past where the image may lie: one GiB from the top 2 GiB's start, so that one level-3
/// entry covers it.
const END: u64 = KERNEL_VIRT_OFFSET + (1 << 30);

/// A kernel in guest memory.
pub(super) struct Kernel {
    /// GVA of the first instruction.
    pub(super) entry: u64,
    /// First GPA past the image, page aligned.
    pub(super) end: u64,
    memory_bytes: u64,
    segments: Vec<(Range<u64>, Access)>,
}

/// Copies the segments of `elf` to their place.
pub(super) fn load(ram: &GuestRam, elf: &Elf<'_>) -> Result<Kernel, BootError> {
    elf.check_addresses(FIRST, END).map_err(BootError::Kernel)?;
    elf.check_physical(KERNEL_VIRT_OFFSET)
        .map_err(BootError::Kernel)?;
    let mut segments = Vec::new();
    let mut end = KERNEL_LOAD_GPA;
    for segment in &elf.segments {
        let pages =
            segment.first_page() - KERNEL_VIRT_OFFSET..segment.end_page() - KERNEL_VIRT_OFFSET;
        end = end.max(pages.end);
        if end > ram.bytes() {
            return Err(BootError::DoesNotFit {
                what: "kernel image",
                memory: ram.bytes(),
            });
        }
        let access = match (segment.is_writable(), segment.is_executable()) {
            (true, _) => Access::ReadWrite,
            (false, true) => Access::Execute,
            (false, false) => Access::Read,
        };
        segments.push((pages, access));
    }
    // Puts each segment at its physical address, which was checked above.
    loader::Elf::load(&ram.backend(), None, &mut Cursor::new(elf.file), None)
        .map_err(|error| BootError::Kernel(ElfError::Damaged(error.to_string())))?;
    Ok(Kernel {
        entry: elf.entry,
        end,
        memory_bytes: ram.bytes(),
        segments,
    })
}

impl Kernel {
    /// Maps the image at its link address and all of memory in the direct map.
    pub(super) fn map(&self, tables: &mut BootTables<'_>) -> Result<(), BootError> {
        for (pages, access) in &self.segments {
            for gpa in pages.clone().step_by(PAGE_SIZE as usize) {
                tables.map_page(gpa + KERNEL_VIRT_OFFSET, gpa, *access)?;
            }
        }
        for gpa in (0..self.memory_bytes).step_by(HUGE_PAGE_SIZE as usize) {
            let chunk = gpa..gpa + HUGE_PAGE_SIZE;
            if chunk.end <= self.memory_bytes && !self.has_read_only(&chunk) {
                tables.map_direct_huge(gpa)?;
                continue;
            }
            for gpa in (gpa..chunk.end.min(self.memory_bytes)).step_by(PAGE_SIZE as usize) {
                let access = if self.has_read_only(&(gpa..gpa + PAGE_SIZE)) {
                    Access::Read
                } else {
                    Access::ReadWrite
                };
                tables.map_direct(gpa, access)?;
            }
        }
        Ok(())
    }

    /// True where the image maps part of `gpas` without W.
    fn has_read_only(&self, gpas: &Range<u64>) -> bool {
        self.segments.iter().any(|(pages, access)| {
            *access != Access::ReadWrite && pages.start < gpas.end && gpas.start < pages.end
        })
    }
}
