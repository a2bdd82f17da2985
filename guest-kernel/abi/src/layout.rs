//! Where things are: guest physical and guest virtual addresses that both sides rely on.
//!
//! The virtual layout follows Linux's x86-64 `Documentation/arch/x86/x86_64/mm.rst` so that an
//! address in a report looks familiar: direct map, then the kernel image in the top 2 GiB.

/// Bytes in a page and in a frame.
pub const PAGE_SIZE: u64 = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bytes mapped by one level-2 (PMD) leaf entry.
pub const HUGE_PAGE_SIZE: u64 = 2 << 20;
/// Order of a block of that size.
pub const HUGE_ORDER: u8 = 9;
/// Entries in a page-table page, at every level.
pub const ENTRIES_PER_TABLE: usize = 512;

/// Most vCPUs a machine can have; CPU masks are one `u64` all the same.
pub const MAX_CPUS: usize = 16;

/// GVA at which guest physical address 0 appears (Linux's `page_offset_base`).
pub const DIRECT_MAP_BASE: u64 = 0xffff_8880_0000_0000;
/// GVA of the kernel image's link base minus its load address: `GVA = GPA + KERNEL_VIRT_OFFSET`.
pub const KERNEL_VIRT_OFFSET: u64 = 0xffff_ffff_8000_0000;
/// GPA at which the kernel image is loaded; the linker script links it at
/// `KERNEL_VIRT_OFFSET + KERNEL_LOAD_GPA`.
pub const KERNEL_LOAD_GPA: u64 = 0x20_0000;
/// GVA at which the boot page tables map the local APIC's MMIO page, uncached.
pub const LAPIC_GVA: u64 = 0xffff_fffe_0000_0000;
/// GPA of the local APIC's MMIO page (SDM vol. 3A, 11.4.1).
pub const LAPIC_GPA: u64 = 0xfee0_0000;

/// GPA of [`crate::boot::BootInfo`].
pub const BOOT_INFO_GPA: u64 = 0x1000;
/// GPA of the first vCPU's channel; vCPU `i` has `CHANNEL_STRIDE` bytes at
/// `CHANNEL_GPA + i * CHANNEL_STRIDE`.
pub const CHANNEL_GPA: u64 = 0x1_0000;
/// Bytes from one vCPU's channel to the next: one control page and its event ring.
pub const CHANNEL_STRIDE: u64 = 0x1_0000;

/// Lowest user address a mapping may have (Linux's `mmap_min_addr`).
pub const USER_MIN: u64 = 0x1_0000;
/// First address past user space (Linux's `TASK_SIZE_MAX` with 4-level paging).
pub const USER_END: u64 = 0x7fff_ffff_f000;
/// GVA at which user images are linked.
pub const USER_IMAGE_GVA: u64 = 0x40_0000;
/// GVA of the read-only argument page: NUL-terminated strings, program name first.
pub const USER_ARGS_GVA: u64 = 0x1000_0000;
/// GVA of the read-only data blob of the scenario (a compiled trace), if any.
pub const USER_DATA_GVA: u64 = 0x2000_0000;
/// First address past the initial thread's stack.
pub const USER_STACK_TOP: u64 = 0x7fff_f000_0000;
/// Bytes of the initial thread's stack mapping.
pub const USER_STACK_BYTES: u64 = 64 << 10;
/// Top of the area that top-down `mmap` searches (Linux's `mmap_base`).
pub const MMAP_BASE: u64 = 0x7fff_e000_0000;
/// Where the initial process's `brk` area starts.
pub const USER_BRK_START: u64 = 0x4000_0000;

/// Least guest memory that the kernel boots in, in bytes.
pub const MIN_MEMORY: u64 = 16 << 20;
/// Most guest memory: all of it lies below the local APIC's hole at 3 GiB.
pub const MAX_MEMORY: u64 = 3 << 30;
