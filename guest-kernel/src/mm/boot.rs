//! Laying memory out at boot: the root object, the array of folios, the buddy allocator.
//!
//! Memory reads as zero, and most of a descriptor is zero in every state that matters here, so only the
//! heads of a few large blocks are written: boot must cost few instructions where CPL 0 is emulated.

use core::fmt;

use abi::boot::{BootInfo, MAGIC, MAX_CMDLINE};
use abi::layout::{ENTRIES_PER_TABLE, MAX_CPUS, MIN_MEMORY, PAGE_SHIFT};
use abi::objects::{Folio, FrameKind, KernelRoot, ORDERS, Pa, SwapSlot};
use abi::param::{Config, ParamError};

use super::page_table::Slot;
use super::{Field, asid, page_align, pages};
use crate::Kernel;
use crate::arch::Arch;

/// Why the kernel cannot boot on what the host gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootError<'a> {
    /// The page is not a `BootInfo`.
    Magic(u64),
    /// Host and kernel were built from different layouts.
    Layout {
        /// The host's hash.
        host: u64,
    },
    /// More CPUs than the kernel can have, or none.
    Cpus(u32),
    /// Too little memory, or none left beside the boot structures.
    Memory {
        /// Bytes of guest memory.
        bytes: u64,
        /// Where free memory starts.
        free_start: u64,
    },
    /// The command line is longer than its field, or not UTF-8.
    CommandLine,
    /// A parameter is wrong.
    Param(ParamError<'a>),
    /// `pcid=on`, and the processor has none.
    NoPcid,
    /// There is no room for the descriptors of `swap_slots`.
    SwapSlots(u64),
}

impl fmt::Display for BootError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Magic(found) => write!(f, "boot info has magic {found:#x}, expected {MAGIC:#x}"),
            Self::Layout { host } => write!(
                f,
                "host has layout {host:#x}, kernel {:#x}: build both from one source",
                abi::layout_hash()
            ),
            Self::Cpus(cpus) => write!(f, "{cpus} CPUs, expected 1 to {MAX_CPUS}"),
            Self::Memory { bytes, free_start } => write!(
                f,
                "{bytes:#x} bytes of memory, free from {free_start:#x}: at least {MIN_MEMORY:#x} needed"
            ),
            Self::CommandLine => write!(
                f,
                "the command line is not UTF-8 or longer than {MAX_CMDLINE} bytes"
            ),
            Self::Param(ParamError::NotAnAssignment(word)) => {
                write!(f, "command line: `{word}` is not key=value")
            }
            Self::Param(ParamError::UnknownName(name)) => {
                write!(f, "command line: no parameter `{name}`")
            }
            Self::Param(ParamError::BadValue { name, value, form }) => {
                write!(f, "command line: {name}={value}, expected {form}")
            }
            Self::SwapSlots(slots) => write!(
                f,
                "swap_slots={slots}: their descriptors, {} bytes each in one piece, do not fit into memory: use fewer, or more memory",
                size_of::<SwapSlot>()
            ),
            Self::NoPcid => f.write_str(
                "pcid=on: the processor has no PCID (CPUID.01H:ECX bit 17): use pcid=auto, or tlb=soft, which has its own",
            ),
        }
    }
}

impl<A: Arch> Kernel<A> {
    /// The kernel on a machine that has just started: no process, all memory free but what `info` names.
    /// Does not publish the root in `info`.
    ///
    /// # Errors
    /// What is wrong with `info`.
    pub fn boot(arch: A, info: &BootInfo) -> Result<Self, BootError<'_>> {
        let mut config = check(info)?;
        config.pcid = asid::resolve(&config, || arch.has_pcid()).ok_or(BootError::NoPcid)?;
        let first = pages(page_align(info.free_start));
        let frames = pages(info.memory_bytes);
        let array = page_align(frames * size_of::<Folio>() as u64);
        let taken = pages(page_align(size_of::<KernelRoot>() as u64) + array);
        let memory = BootError::Memory {
            bytes: info.memory_bytes,
            free_start: info.free_start,
        };
        if first + taken >= frames {
            return Err(memory);
        }
        // The array first: its descriptors are 64 bytes and stay aligned.
        let folios = first << PAGE_SHIFT;
        let kernel = Self::new(arch, config, Pa::new(folios + array));
        let root = kernel.root();
        root.magic.set(MAGIC);
        root.layout_hash.set(abi::layout_hash());
        root.pgd.set(info.boot_pgd);
        root.folios.set(Pa::new(folios));
        root.nr_frames.set(frames);
        root.first_frame.set(first);
        root.next_mm.set(1);
        root.next_task.set(1);
        root.nr_cpus.set(u64::from(info.cpus));
        for_each_block(first, first + taken, |frame, order| {
            let folio = kernel.frame_folio(frame);
            folio.kind.set(FrameKind::Kernel as u8);
            folio.order.set(order);
            folio.refcount.set(1);
        });
        let free = first + taken;
        root.free_frames.set(frames - free);
        for_each_block(free, frames, |frame, order| kernel.buddy_push(frame, order));
        kernel.count_kernel_half();
        kernel.groups_init().map_err(|_| memory)?;
        kernel.zero_page_init().map_err(|_| memory)?;
        let slots = kernel.config.swap_slots;
        kernel
            .swap_init()
            .map_err(|_| BootError::SwapSlots(slots))?;
        #[cfg(feature = "testbed")]
        kernel.soft_tlb_init().map_err(|_| memory)?;
        Ok(kernel)
    }

    /// Notes how many entries every mm's level-4 table shares with the kernel's.
    fn count_kernel_half(&self) {
        let pgd = self.root().pgd.get();
        let used = (ENTRIES_PER_TABLE / 2..ENTRIES_PER_TABLE)
            .filter(|&index| {
                let slot = Slot {
                    table: pgd,
                    level: 4,
                    index,
                };
                self.read_pte(slot).is_present()
            })
            .count();
        self.folio(pgd).used.set(used as u32);
    }
}

fn check(info: &BootInfo) -> Result<Config, BootError<'_>> {
    if info.magic != MAGIC {
        return Err(BootError::Magic(info.magic));
    }
    if info.layout_hash != abi::layout_hash() {
        return Err(BootError::Layout {
            host: info.layout_hash,
        });
    }
    if info.cpus == 0 || info.cpus as usize > MAX_CPUS {
        return Err(BootError::Cpus(info.cpus));
    }
    let memory = BootError::Memory {
        bytes: info.memory_bytes,
        free_start: info.free_start,
    };
    if info.free_start >= info.memory_bytes {
        return Err(memory);
    }
    let line = info
        .cmdline
        .get(..info.cmdline_len as usize)
        .and_then(|bytes| core::str::from_utf8(bytes).ok())
        .ok_or(BootError::CommandLine)?;
    Config::parse(line).map_err(BootError::Param)
}

/// Tiles `start..end` with the largest aligned blocks, in ascending order.
fn for_each_block(start: u64, end: u64, mut f: impl FnMut(u64, u8)) {
    let mut frame = start;
    while frame < end {
        let aligned = frame.trailing_zeros().min(ORDERS as u32 - 1);
        let fits = (end - frame).ilog2();
        let order = aligned.min(fits);
        f(frame, order as u8);
        frame += 1 << order;
    }
}
