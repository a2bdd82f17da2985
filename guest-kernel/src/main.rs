//! The kernel's bootable image: the library with its x86-64 back end, whose `_start` every vCPU enters.
#![no_std]
#![no_main]

// The whole of the program is in the library; this links it.
use guest_kernel as _;

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    guest_kernel::arch::x86_64::panic(info)
}
