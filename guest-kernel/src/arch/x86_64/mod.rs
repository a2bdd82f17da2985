//! The real machine: the kernel at CPL 0 of an x86-64 virtual machine.
//!
//! From the bottom: `registers` has single instructions, `descriptors` the encodings of GDT, IDT and
//! TSS (pure, tested on the host), `percpu` each CPU's own area and tables, `apic` the two local
//! APICs, `memory` the routines that compiled code calls (`memcpy`), `user` the copies to and from
//! user memory, `entry` the assembly of every way into and out of the kernel, `trap` what those
//! entries do, `machine` the [`Arch`](super::Arch) back end [`X86`], `boot` the start of each CPU,
//! `panic` and `message` the end. Nothing but `boot` and `trap` calls the portable kernel.
//!
//! # Why interrupts are safe without a separate stack for each
//!
//! Functions that come from the distributed `core` were compiled with a red zone, and LTO may keep
//! it: a leaf function may hold live data in the 128 bytes below `rsp`. The processor pushes an
//! exception frame right there when CPL does not change and no IST stack is used (SDM vol. 3A,
//! 6.14.2). No such push ever meets a live red zone:
//!
//! 1. *From CPL 3* the stack is the task's kernel stack (`TSS.rsp0`) or an IST stack, both empty.
//! 2. *Maskable interrupts at CPL 0* arrive only between the `sti` and the `cli` of
//!    [`registers::relax`] and [`registers::wait_for_interrupt`]: every gate is an interrupt gate and
//!    FMASK has IF, so every entry starts with IF = 0, and nothing else sets it but the `iretq` back
//!    to CPL 3 or into such a window. Both windows move `rsp` down by 128 first. One that QEMU delivers
//!    twice meets the entry path of the first, which has no red zone.
//! 3. *Page faults at CPL 0* are legal at one instruction only, the `rep movsb` of `user`'s copy
//!    routine, an out-of-line assembly function with nothing below its `rsp`; its caller is not a
//!    leaf, so it has no red zone.
//! 4. *Every other exception at CPL 0* is fatal: whatever it overwrites belongs to code that never
//!    continues.
//! 5. *NMI, #DF and #MC*, which may arrive anywhere, even before `swapgs` and on a bad stack, run on
//!    an IST stack, and are fatal too.
//!
//! # What the code here may not use
//!
//! A host that emulates CPL 0 refuses SSE and AVX, `popcnt`, `cmpxchg16b`, `rdtscp`, `invpcid`,
//! `int n`, `stac`/`clac` and `xsave`, and takes about half a microsecond for each instruction that it
//! does emulate. So string instructions do bulk work, and entry paths are short. User programs are built
//! without SSE too, so a context switch saves no more than the integer registers. CR4.OSFXSR stays
//! clear: on hardware an SSE instruction is a loud #UD.
#![allow(
    unsafe_code,
    reason = "the machine itself: registers, entry code, descriptor tables"
)]

pub mod descriptors;
mod memory;
mod message;

#[cfg(feature = "image")]
mod apic;
#[cfg(feature = "image")]
mod boot;
#[cfg(feature = "image")]
mod entry;
#[cfg(feature = "image")]
mod machine;
#[cfg(feature = "image")]
mod panic;
#[cfg(feature = "image")]
mod percpu;
#[cfg(feature = "image")]
mod registers;
#[cfg(feature = "image")]
mod trap;
#[cfg(feature = "image")]
mod user;

#[cfg(feature = "image")]
pub use machine::X86;
#[cfg(feature = "image")]
pub use panic::panic;
