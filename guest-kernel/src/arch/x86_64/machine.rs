//! [`X86`]: the machine as the portable kernel sees it.

use core::sync::atomic::AtomicU64;

use abi::boot::{BootInfo, InterruptMode};
use abi::channel::{Control, Doorbell, Event, RING_RECORDS};
use abi::layout::{DIRECT_MAP_BASE, PAGE_SIZE};
use abi::objects::UserFrame;

use super::apic::LocalApic;
use super::descriptors::{USER_CS, USER_SS, user_rflags};
use super::entry::{self, NewStack};
use super::{memory, percpu, registers, user};
use crate::arch::{Arch, CpuMask, Ipi, UserFault};

/// An x86-64 virtual machine.
#[derive(Debug)]
pub struct X86 {
    nr_cpus: usize,
    pub(super) apic: LocalApic,
}

impl X86 {
    /// The machine that `boot` describes.
    pub(super) fn new(boot: &BootInfo, interrupts: InterruptMode) -> Self {
        Self {
            nr_cpus: boot.cpus as usize,
            apic: LocalApic::new(interrupts),
        }
    }
}

impl Arch for X86 {
    #[inline]
    fn cpu(&self) -> usize {
        percpu::cpu()
    }

    fn nr_cpus(&self) -> usize {
        self.nr_cpus
    }

    #[inline]
    fn phys_to_virt(&self, gpa: u64) -> *mut u8 {
        // An address past the direct map faults, one that wraps does too: no check here.
        DIRECT_MAP_BASE.wrapping_add(gpa) as *mut u8
    }

    fn zero_frame(&self, gpa: u64) {
        self.fill_frame(gpa, 0);
    }

    fn fill_frame(&self, gpa: u64, word: u64) {
        // SAFETY: the kernel fills only frames that it owns alone (contract of `Arch`).
        unsafe { memory::fill_frame(self.phys_to_virt(gpa), word) };
    }

    fn copy_frame(&self, from: u64, to: u64) {
        // SAFETY: as for `fill_frame`; a program may write to `from` meanwhile, and then its store
        // races with itself, not with Rust's memory.
        unsafe { memory::copy_frame(self.phys_to_virt(from), self.phys_to_virt(to)) };
    }

    #[inline]
    fn flush_page(&self, gva: u64) {
        registers::invalidate_page(gva);
    }

    fn flush_all(&self) {
        // With the PCID that is loaded, and bit 63, which reads as 0, clear.
        self.load_root(registers::paging_root());
    }

    #[inline]
    fn load_root(&self, operand: u64) {
        // SAFETY: the kernel loads level-4 tables only, whose upper half is the boot tables', and PCIDs only
        // where it has switched them on (contract of `Arch`).
        unsafe { registers::load_paging_root(operand) };
    }

    fn current_root(&self) -> u64 {
        registers::paging_root() & abi::pte::ADDRESS_MASK
    }

    fn has_pcid(&self) -> bool {
        registers::has_pcid()
    }

    fn disk_submit(&self, gpa: u64) {
        registers::out32(abi::port::DISK, gpa as u32);
    }

    fn send_ipi(&self, mut targets: CpuMask, ipi: Ipi) {
        while targets != 0 {
            self.apic.send(targets.trailing_zeros() as usize, ipi as u8);
            targets &= targets - 1;
        }
    }

    fn relax(&self) {
        self.apic.relax();
    }

    fn wait_for_interrupt(&self) {
        self.apic.wait_for_interrupt();
    }

    fn copy_from_user(&self, dst: &mut [u8], gva: u64) -> Result<(), UserFault> {
        user::copy_from(dst, gva)
    }

    fn copy_to_user(&self, gva: u64, src: &[u8]) -> Result<(), UserFault> {
        user::copy_to(gva, src)
    }

    /// Selectors and the privileged bits of RFLAGS in `frame` are ignored: there is only one kind of
    /// user code.
    fn prepare_stack(&self, stack: *mut u8, bytes: usize, frame: &UserFrame) -> u64 {
        let frame = UserFrame {
            cs: u64::from(USER_CS),
            ss: u64::from(USER_SS),
            rflags: user_rflags(frame.rflags),
            ..*frame
        };
        let top = stack as u64 + bytes as u64;
        assert!(
            top.is_multiple_of(16),
            "kernel stack ends at {top:#x}, not 16-byte aligned"
        );
        let sp = top - size_of::<NewStack>() as u64;
        // SAFETY: the stack is new, so nobody else uses it (contract of `Arch`), and longer than this.
        unsafe { (sp as *mut NewStack).write(NewStack::new(top, &frame)) };
        sp
    }

    unsafe fn switch(&self, from: &AtomicU64, to: u64) {
        // SAFETY: the caller's promise. The plain store to `from` is by its only writer.
        unsafe { entry::switch(from.as_ptr(), to) };
    }

    fn set_kernel_stack(&self, top: u64) {
        percpu::set_kernel_stack(top);
    }

    #[inline]
    fn channel(&self) -> &Control {
        // SAFETY: the host's memory map has a control page per CPU, which the direct map maps for
        // good; all of it is atomics, so the host may write too.
        unsafe { &*percpu::channel() }
    }

    fn write_event(&self, slot: usize, event: &Event) {
        assert!(slot < RING_RECORDS, "event slot {slot} of {RING_RECORDS}");
        // SAFETY: the ring follows the control page; the slot is in range, and only this CPU writes
        // here. The store of the ring's head that follows is a release: the host sees the record first.
        unsafe {
            percpu::channel()
                .byte_add(PAGE_SIZE as usize)
                .cast::<Event>()
                .cast_mut()
                .add(slot)
                .write(*event);
        }
    }

    fn doorbell(&self, reason: Doorbell) {
        registers::out32(abi::port::DOORBELL, reason as u32);
    }

    fn tsc(&self) -> u64 {
        // SAFETY: every x86-64 processor has RDTSC.
        unsafe { core::arch::x86_64::_rdtsc() }
    }

    fn console(&self, bytes: &[u8]) {
        // No wait for an empty transmitter: the machine's serial port is always ready.
        registers::out_bytes(abi::port::SERIAL, bytes);
    }

    fn exit(&self, status: u32) -> ! {
        registers::out32(abi::port::EXIT, status);
        registers::halt_forever()
    }
}
