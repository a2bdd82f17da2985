//! Puts a machine's memory into the state in which its vCPUs start: kernel image, boot page tables,
//! `BootInfo`, and the frames of the first process.
//!
//! Guest physical memory, from below ([`abi::layout`] has the fixed addresses):
//!
//! ```text
//! 0x0        nothing (frame 0 is never used)
//! 0x1000     BootInfo
//! 0x10000    the vCPUs' channels
//! 0x200000   kernel image
//!            boot page tables
//!            user image, argument page, data blob
//! free_start the kernel's to manage
//! ```
//!
//! Works on [`GuestRam`] alone, without KVM. What an image says is not believed: it may come from
//! the command line.

mod elf;
mod frames;
mod images;
mod kernel;
mod program;
mod tables;

use abi::boot::{BootInfo, InterruptMode, MAGIC, MAX_CMDLINE, MAX_SEGMENTS, Segment};
use abi::layout::{BOOT_INFO_GPA, CHANNEL_GPA, CHANNEL_STRIDE, DIRECT_MAP_BASE, MAX_CPUS};
use abi::layout::{LAPIC_GPA, LAPIC_GVA};
use zerocopy::FromZeros;

pub use elf::{Elf, ElfError, ElfSegment};
pub use images::{KernelImage, KernelImageError, kernel_hash, kernel_rustflags, user_image};
pub use program::ProgramSpec;

use crate::memory::{GuestRam, OutOfRange, PhysMem};
use frames::Frames;
use tables::BootTables;

/// What to boot.
#[derive(Clone, Copy, Debug)]
pub struct BootSpec<'a> {
    /// The kernel's ELF file.
    pub kernel: &'a [u8],
    /// The user programs' ELF file.
    pub user: &'a [u8],
    /// Which of its programs runs first, and with what.
    pub program: &'a ProgramSpec,
    /// vCPUs.
    pub cpus: u32,
    /// How interrupts reach them.
    pub interrupts: InterruptMode,
    /// Kernel command line.
    pub cmdline: &'a str,
}

/// Where things were put: what the vCPUs' first registers are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boot {
    /// GVA of the kernel's first instruction.
    pub entry: u64,
    /// GPA of the level-4 table.
    pub pgd: u64,
    /// GVA of [`BootInfo`] in the direct map.
    pub boot_info: u64,
    /// First byte that nothing occupies.
    pub free_start: u64,
}

/// Why a machine cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel is not an image for this machine.
    #[error("the kernel image cannot be used")]
    Kernel(#[source] ElfError),
    /// The user programs are not an image for this machine.
    #[error("the user image cannot be used")]
    User(#[source] ElfError),
    /// What must be loaded is larger than guest memory.
    #[error(
        "{memory} bytes of guest memory are too few to load the {what}: give the machine more memory"
    )]
    DoesNotFit {
        /// What was being loaded.
        what: &'static str,
        /// Bytes of guest memory.
        memory: u64,
    },
    /// More than one page of arguments.
    #[error("the program's name and arguments take {given} bytes, the most is {maximum}")]
    ArgumentsTooLong {
        /// Bytes, with their terminators.
        given: usize,
        /// Bytes of the argument page.
        maximum: usize,
    },
    /// An argument that the argument page cannot hold.
    #[error("the argument {0:?} contains a NUL")]
    ArgumentWithNul(String),
    /// A data blob beyond what the user layout leaves for it.
    #[error("the data of the program has {given} bytes, the most is {maximum}")]
    DataTooLong {
        /// Bytes.
        given: usize,
        /// Bytes of the area for it.
        maximum: usize,
    },
    /// Longer than [`MAX_CMDLINE`].
    #[error("the kernel command line has {given} bytes, the most is {MAX_CMDLINE}")]
    CommandLineTooLong {
        /// Bytes.
        given: usize,
    },
    /// More pieces than [`MAX_SEGMENTS`].
    #[error("the first process has {given} segments, the most is {MAX_SEGMENTS}")]
    TooManySegments {
        /// Segments.
        given: usize,
    },
    /// The bounds of an image were checked and yet it left guest memory: a bug of the loader.
    #[error("loading left guest memory")]
    OutOfRange(#[from] OutOfRange),
}

/// Fills `ram`, which is all zeroes, and says where the vCPUs start.
///
/// # Errors
/// An image that is not one, or what does not fit.
pub fn load(ram: &GuestRam, spec: &BootSpec<'_>) -> Result<Boot, BootError> {
    if spec.cmdline.len() > MAX_CMDLINE {
        return Err(BootError::CommandLineTooLong {
            given: spec.cmdline.len(),
        });
    }
    let kernel_elf = Elf::parse(spec.kernel).map_err(BootError::Kernel)?;
    let kernel = kernel::load(ram, &kernel_elf)?;
    let mut frames = Frames::new(ram, kernel.end);

    let mut tables = BootTables::new(ram, &mut frames)?;
    kernel.map(&mut tables)?;
    tables.map_device_page(LAPIC_GVA, LAPIC_GPA)?;
    let pgd = tables.pgd();

    let user_elf = Elf::parse(spec.user).map_err(BootError::User)?;
    let process = program::load(ram, &mut frames, &user_elf, spec.program)?;

    let mut info = BootInfo::new_zeroed();
    info.magic = MAGIC;
    info.layout_hash = abi::layout_hash();
    info.cpus = spec.cpus;
    info.interrupts = spec.interrupts as u32;
    info.memory_bytes = ram.bytes();
    info.boot_pgd = pgd;
    info.free_start = frames.next();
    info.channels = CHANNEL_GPA;
    info.user_entry = process.entry;
    info.args_len = process.args_len;
    info.data_len = process.data_len;
    info.nr_segments = process.segments.len() as u64;
    copy_segments(&process.segments, &mut info.segments)?;
    info.cmdline_len = spec.cmdline.len() as u64;
    info.cmdline[..spec.cmdline.len()].copy_from_slice(spec.cmdline.as_bytes());
    ram.write_value(BOOT_INFO_GPA, &info)?;

    Ok(Boot {
        entry: kernel.entry,
        pgd,
        boot_info: DIRECT_MAP_BASE + BOOT_INFO_GPA,
        free_start: info.free_start,
    })
}

fn copy_segments(from: &[Segment], to: &mut [Segment; MAX_SEGMENTS]) -> Result<(), BootError> {
    to.get_mut(..from.len())
        .ok_or(BootError::TooManySegments { given: from.len() })?
        .copy_from_slice(from);
    Ok(())
}

// The channels end before the kernel begins.
const _: () =
    assert!(CHANNEL_GPA + MAX_CPUS as u64 * CHANNEL_STRIDE <= abi::layout::KERNEL_LOAD_GPA);

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
