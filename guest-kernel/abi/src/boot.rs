//! What the host tells the kernel at boot.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Value of [`BootInfo::magic`].
pub const MAGIC: u64 = u64::from_le_bytes(*b"STALEMAT");
/// Most segments of the user image, the argument page and the data blob together.
pub const MAX_SEGMENTS: usize = 16;
/// Longest kernel command line, in bytes.
pub const MAX_CMDLINE: usize = 1024;

/// How interrupts reach a vCPU ([`BootInfo::interrupts`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum InterruptMode {
    /// In-kernel irqchip, x2APIC: the hardware (or KVM) delivers IPIs.
    Hardware = 0,
    /// No in-kernel irqchip: the local APIC is the host's device model behind xAPIC MMIO, so every
    /// IPI is an exit.
    Controlled = 1,
}

impl InterruptMode {
    /// The mode that `value` encodes.
    #[must_use]
    pub fn from_u32(value: u32) -> Option<Self> {
        match value {
            0 => Some(Self::Hardware),
            1 => Some(Self::Controlled),
            _ => None,
        }
    }
}

/// One piece of the first process's address space. The host has put its contents, padded with
/// zeroes to whole frames, at `gpa`; the kernel adopts those frames as anonymous folios.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct Segment {
    /// First user address, page aligned.
    pub gva: u64,
    /// First guest physical address, page aligned.
    pub gpa: u64,
    /// Whole frames, in bytes.
    pub bytes: u64,
    /// `PROT_*` of [`crate::syscall`].
    pub prot: u64,
}

/// The page at [`crate::layout::BOOT_INFO_GPA`]. Written by the host, read-only to the kernel but
/// for [`BootInfo::kernel_root`].
///
/// Every vCPU starts at the kernel's ELF entry in 64-bit mode, interrupts off, on the boot page
/// tables, with `rdi` = its index, `rsi` = GVA of this page in the direct map and no stack
/// (`rsp` = 0). vCPUs other than 0 wait until vCPU 0 has set up the kernel. All memory that the
/// host did not fill reads as zero.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct BootInfo {
    /// [`MAGIC`].
    pub magic: u64,
    /// [`crate::layout_hash`] of the host.
    pub layout_hash: u64,
    /// vCPUs in this machine, 1 to [`crate::layout::MAX_CPUS`].
    pub cpus: u32,
    /// An [`InterruptMode`].
    pub interrupts: u32,
    /// Bytes of guest memory, from GPA 0 without holes.
    pub memory_bytes: u64,
    /// GPA of the level-4 table that the machine boots on; its upper half is the kernel's for good.
    pub boot_pgd: u64,
    /// First byte that nothing occupies: `free_start..memory_bytes` is the kernel's to manage.
    /// Frames below it are reserved, but for those of `segments`, which become folios.
    pub free_start: u64,
    /// GPA of vCPU 0's channel.
    pub channels: u64,
    /// First instruction of the user image.
    pub user_entry: u64,
    /// Bytes of the argument page that are used.
    pub args_len: u64,
    /// Bytes of the data blob that are used, 0 where there is none.
    pub data_len: u64,
    /// Used entries of `segments`.
    pub nr_segments: u64,
    /// User image, argument page, data blob.
    pub segments: [Segment; MAX_SEGMENTS],
    /// Written by the kernel once it is ready: GPA of its [`crate::objects::KernelRoot`].
    pub kernel_root: u64,
    /// Used bytes of `cmdline`.
    pub cmdline_len: u64,
    /// Kernel command line: `key=value` separated by blanks.
    pub cmdline: [u8; MAX_CMDLINE],
}

const _: () = assert!(size_of::<BootInfo>() <= crate::layout::PAGE_SIZE as usize);
