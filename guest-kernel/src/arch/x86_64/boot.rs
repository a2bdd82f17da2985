//! The start of each CPU.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::Ordering::{Acquire, SeqCst};

use abi::boot::{BootInfo, InterruptMode, MAGIC};
use abi::layout::CHANNEL_GPA;

use super::apic::LocalApic;
use super::machine::X86;
use super::{percpu, registers};
use crate::Kernel;
use crate::arch::{Arch, Ipi};

// The linker script cannot know `abi`'s constants; it checks itself against this symbol.
core::arch::global_asm!(
    ".global KERNEL_IMAGE_BASE",
    ".set KERNEL_IMAGE_BASE, {}",
    const (abi::layout::KERNEL_VIRT_OFFSET + abi::layout::KERNEL_LOAD_GPA) as i64,
);

/// The one kernel of this machine, written once by CPU 0. The portable kernel is a value and knows of
/// no static; entries from the processor have nowhere else to find it.
struct KernelCell {
    ready: AtomicBool,
    value: UnsafeCell<MaybeUninit<Kernel<X86>>>,
}

// SAFETY: the value is written before `ready` is set and only read after it was seen set.
unsafe impl Sync for KernelCell {}

static KERNEL: KernelCell = KernelCell {
    ready: AtomicBool::new(false),
    value: UnsafeCell::new(MaybeUninit::uninit()),
};

/// The kernel.
///
/// # Panics
/// Before CPU 0 has set it up: an exception then is fatal, and interrupts are off.
pub(super) fn kernel() -> &'static Kernel<X86> {
    assert!(
        KERNEL.ready.load(Acquire),
        "trap before the kernel is set up"
    );
    // SAFETY: `ready` says that the value is there; nobody writes it again.
    unsafe { (*KERNEL.value.get()).assume_init_ref() }
}

/// Where `_start` goes on: CPU `cpu`, on its boot stack, with the host's page tables.
pub(super) extern "sysv64" fn start(cpu: usize, boot: *const BootInfo) -> ! {
    // SAFETY: the host passes the address of the BootInfo page in the direct map (`abi::boot`), and
    // every bit pattern is a valid BootInfo. A copy, since the page is also written to.
    let boot = unsafe { boot.read() };
    let channels = match boot.magic {
        MAGIC => boot.channels,
        // So that `Kernel::boot`, which checks the page, can tell.
        _ => CHANNEL_GPA,
    };
    // SAFETY: the first thing on this CPU, which starts with interrupts off.
    unsafe { percpu::init(cpu, channels) };
    let Some(interrupts) = InterruptMode::from_u32(boot.interrupts) else {
        panic!("unknown BootInfo.interrupts {}", boot.interrupts);
    };
    LocalApic::new(interrupts).enable();
    if cpu == 0 {
        first_cpu(&boot, interrupts);
    } else {
        wait_for_kernel();
    }
    if kernel().cpu_uses_pcids() {
        // SAFETY: CR3 is still the boot tables', page aligned.
        unsafe { registers::enable_pcid() };
    }
    kernel().run_cpu()
}

/// Sets the kernel up and lets the other CPUs go.
fn first_cpu(boot: &BootInfo, interrupts: InterruptMode) {
    let kernel = match Kernel::boot(X86::new(boot, interrupts), boot) {
        Ok(kernel) => kernel,
        Err(error) => panic!("the kernel cannot boot: {error}"),
    };
    // SAFETY: only CPU 0 comes here, once, and nobody else looks before `ready` is set.
    let kernel = unsafe { &*(*KERNEL.value.get()).write(kernel) };
    kernel.start_first_process(boot);
    KERNEL.ready.store(true, SeqCst);
    let others = (1 << boot.cpus) - 2;
    kernel.arch.send_ipi(others, Ipi::Reschedule);
}

/// Halts until CPU 0 has set the kernel up: a halted CPU costs nothing on any host, and one that runs
/// one vCPU at a time sees that this one has nothing to do. No wake-up is lost: the local APIC was
/// enabled before the look at `ready`, and CPU 0 sends the IPI after it has set `ready`.
fn wait_for_kernel() {
    while !KERNEL.ready.load(SeqCst) {
        registers::wait_for_interrupt();
    }
}
