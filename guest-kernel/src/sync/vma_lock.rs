//! The lock of one VMA (Linux's vm_refcnt, mm/mmap_lock.c): a count of its readers, and two sequence numbers that say whether
//! a writer has it. Encoding: [`VmaRefs`].
//!
//! A reader comes without any other lock and never waits: it counts itself ([`try_read`]), which a VMA that is not linked in
//! refuses, and then asks whether the VMA [is being written](is_written); if so, it takes its count back ([`release`]) and
//! does without. A writer holds the mmap_lock for writing. It keeps new readers out ([`exclude`]), waits until those there have gone
//! ([`is_alone`]), [notes](note) the mm's number of now in the VMA, and lets readers in again ([`admit`]), which see that number. So
//! it holds any number of VMAs, and lets go of all of them at once with the mmap_lock, which changes the mm's number.
//!
//! Ordering:
//! - *P1*: [`admit`] (Release), also the one that links a new VMA in, with [`try_read`] (Acquire): who is counted sees the VMA
//!   as it was linked in, and not as what its memory was before.
//! - *P2*: the same pair: who is counted after a writer has kept readers out sees the number that it noted.
//! - *P3*: the mm's number changes with Release at the end of a write ([`end`]), and [`is_written`] loads it with Acquire:
//!   who sees that a write is over sees all of it.
//! - *P4*: [`release`] (Release) with [`is_alone`] (Acquire): a writer's changes come after all that readers read. Their
//!   releases are read-modify-writes, and so one release sequence.
//!
//! A writer spins for its readers; nobody is woken, so a reader that lets go of a VMA that was recycled meanwhile touches
//! nothing but its count, which is of a type-stable object (Linux's wake-up needed the mm of the recycled VMA, and so a
//! reference to it: CVE-2025-38554).

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use abi::objects::VmaRefs;

use super::Word;

/// Why a VMA cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It is not linked in, or no more.
    Detached,
    /// A writer waits for its readers to go.
    Excluded,
}

/// Counts a reader.
///
/// # Errors
/// Why there must be none.
#[inline]
pub fn try_read<W: Word>(refs: &W) -> Result<(), Refused> {
    loop {
        let value = refs.load(Relaxed);
        if value & VmaRefs::EXCLUDED != 0 {
            return Err(Refused::Excluded);
        }
        if value == VmaRefs::DETACHED {
            return Err(Refused::Detached);
        }
        if refs
            .compare_exchange_weak(value, value + 1, Acquire, Relaxed)
            .is_ok()
        {
            return Ok(());
        }
    }
}

/// Uncounts a reader.
#[inline]
pub fn release<W: Word>(refs: &W) {
    refs.fetch_sub(1, Release);
}

/// True where the VMA whose number is `vma` is held by the writer who holds the mm whose number is `mm`. Asked by who is not counted
/// it is a hint.
#[inline]
pub fn is_written<W: Word>(vma: &W, mm: &W) -> bool {
    vma.load(Relaxed) == mm.load(Acquire)
}

/// Keeps new readers out.
#[inline]
pub fn exclude<W: Word>(refs: &W) {
    refs.fetch_or(VmaRefs::EXCLUDED, Relaxed);
}

/// True where no reader is left of a VMA that they are kept out of.
#[inline]
pub fn is_alone<W: Word>(refs: &W) -> bool {
    refs.load(Acquire) == VmaRefs::EXCLUDED | VmaRefs::ATTACHED
}

/// Notes in the VMA's number that the writer of the mm with number `mm` holds it.
#[inline]
pub fn note<W: Word>(vma: &W, mm: &W) {
    vma.store(mm.load(Relaxed), Relaxed);
}

/// Lets readers in: of a VMA that they were kept out of, or that is linked in only now. The only change of the count while
/// there is no reader, so it is a store.
#[inline]
pub fn admit<W: Word>(refs: &W) {
    refs.store(VmaRefs::ATTACHED, Release);
}

/// No reader is counted any more. They are kept out, and none is left.
#[inline]
pub fn detach<W: Word>(refs: &W) {
    refs.store(VmaRefs::DETACHED, Relaxed);
}

/// A writer has got the mmap_lock: no VMA has the number that it has now.
#[inline]
pub fn begin<W: Word>(mm: &W) {
    mm.store(mm.load(Relaxed) + 1, Relaxed);
}

/// The writer is about to let go of the mmap_lock, and of all VMAs.
#[inline]
pub fn end<W: Word>(mm: &W) {
    mm.store(mm.load(Relaxed) + 1, Release);
}
