//! The boundary between the kernel and the machine.
//!
//! [`Arch`] is all that the kernel knows of the machine. Back ends: `x86_64`, the real one (feature
//! `image`), and `model`, the same kernel inside a host process (feature `model`, and this crate's tests).
//! A back end never calls upwards but through the entry points that it documents (trap, interrupt,
//! thread start). The tests of tasks have one more, of host threads (`task::tests::machine`), because the
//! model never runs two CPUs at once.

#[cfg(any(feature = "model", test))]
pub mod model;
#[cfg(any(feature = "image", test))]
pub mod x86_64;

use core::sync::atomic::AtomicU64;

use abi::channel::{Control, Doorbell, Event};

/// A set of CPUs, bit `i` for CPU `i`.
pub type CpuMask = u64;

/// Inter-processor interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Ipi {
    /// Handle the flush requests that name this CPU (`Kernel::handle_shootdown`).
    Shootdown = 0xf0,
    /// Look at the run queue (wakes an idle CPU).
    Reschedule = 0xf1,
}

/// A user address that could not be accessed, and was not made accessible by the fault handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserFault {
    /// The address.
    pub gva: u64,
}

/// The machine.
///
/// The kernel is not preemptible: interrupts are off at CPL 0 except inside [`Arch::relax`] and
/// [`Arch::wait_for_interrupt`], so an IPI is taken in user mode, while spinning, or while idle.
/// A section that must not take IPIs therefore just does neither.
pub trait Arch: Sync + Sized + 'static {
    /// CPU that executes this, from 0.
    fn cpu(&self) -> usize;
    /// CPUs of the machine.
    fn nr_cpus(&self) -> usize;

    /// Address at which the kernel sees guest physical address `gpa` (the direct map).
    fn phys_to_virt(&self, gpa: u64) -> *mut u8;
    /// Fills the frame at `gpa` with zeroes, cheaply.
    fn zero_frame(&self, gpa: u64);
    /// Fills the frame at `gpa` with `word`, cheaply.
    fn fill_frame(&self, gpa: u64, word: u64);
    /// Copies the frame at `from` to the frame at `to`, cheaply.
    fn copy_frame(&self, from: u64, to: u64);

    /// Invalidates this CPU's translations of the page at `gva` in the loaded address space, and its
    /// paging-structure caches (INVLPG, SDM vol. 3A 5.10.4.1).
    fn flush_page(&self, gva: u64);
    /// Invalidates this CPU's non-global translations of the loaded address space: of its PCID, or all where
    /// there are none (CR3 reload).
    fn flush_all(&self);
    /// Loads CR3 with `operand`: the GPA of a level-4 table, and where [`Arch::has_pcid`] says so and the kernel
    /// uses it ([`crate::Kernel::cpu_uses_pcids`]) a PCID and whether what is cached for it stays
    /// ([`abi::channel::cr3`]). Else all non-global translations are flushed.
    fn load_root(&self, operand: u64);
    /// The level-4 table that is loaded.
    fn current_root(&self) -> u64;
    /// True where the processor can tell translations apart by PCID.
    fn has_pcid(&self) -> bool;

    /// Gives the [`abi::disk::DiskRequest`] at `gpa` to the disk's queue of this CPU, which is interrupted with
    /// [`abi::disk::VECTOR`] when it is done.
    fn disk_submit(&self, gpa: u64);
    /// Sends `ipi` to each CPU of `targets` (never the sender itself).
    fn send_ipi(&self, targets: CpuMask, ipi: Ipi);
    /// One turn of a spin loop: a pause, with a window in which pending IPIs are taken.
    fn relax(&self);
    /// Waits until an interrupt was taken. Checks nothing: the caller looks at its queue with
    /// interrupts off, and a wake-up between that look and the wait is not lost.
    fn wait_for_interrupt(&self);

    /// Copies from user memory of the loaded address space; faults on the way are handled like user
    /// faults. `dst.len()` bytes, may cross pages.
    ///
    /// # Errors
    /// The first address that has no readable mapping.
    fn copy_from_user(&self, dst: &mut [u8], gva: u64) -> Result<(), UserFault>;
    /// Copies to user memory of the loaded address space.
    ///
    /// # Errors
    /// The first address that has no writable mapping.
    fn copy_to_user(&self, gva: u64, src: &[u8]) -> Result<(), UserFault>;

    /// Prepares a new kernel stack (`stack`: its lowest byte, `bytes` long) so that the first
    /// [`Arch::switch`] to the returned stack pointer enters CPL 3 with the registers `frame`, after
    /// the kernel's `task_started` hook ran.
    fn prepare_stack(&self, stack: *mut u8, bytes: usize, frame: &abi::objects::UserFrame) -> u64;
    /// Saves the callee-saved context of the running thread, stores its stack pointer to `from`, and
    /// continues at the stack pointer `to`. Returns when somebody switches back.
    ///
    /// # Safety
    /// `to` is a stack pointer that `prepare_stack` returned or `switch` stored, not resumed since,
    /// on a stack that stays allocated.
    #[allow(
        unsafe_code,
        reason = "only the scheduler knows whether a stack may be resumed"
    )]
    unsafe fn switch(&self, from: &AtomicU64, to: u64);
    /// Tells the machine which kernel stack entries from CPL 3 use on this CPU from now on
    /// (`top`: first byte past the stack).
    fn set_kernel_stack(&self, top: u64);

    /// Control page of this CPU's channel.
    fn channel(&self) -> &Control;
    /// Writes record `slot` (less than [`abi::channel::RING_RECORDS`]) of this CPU's ring.
    fn write_event(&self, slot: usize, event: &Event);
    /// Rings the doorbell: returns when the host lets this vCPU go on.
    fn doorbell(&self, reason: Doorbell);
    /// Time stamp counter, or a count that grows by one per call where the engine has no time.
    fn tsc(&self) -> u64;
    /// Writes to the console.
    fn console(&self, bytes: &[u8]);
    /// Ends the machine.
    fn exit(&self, status: u32) -> !;
}
