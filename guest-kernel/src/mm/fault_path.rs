//! How a fault comes by its VMA, and what keeps the VMA and its tables as they are until the fault is over: the seam of the
//! fault path.
//!
//! The one implementation is Linux's since 6.4 (`do_user_addr_fault`, lock_vma_under_rcu): the VMA alone is locked, for reading,
//! found under RCU; where it cannot be had so, or the fault needs more than its VMA, the mmap_lock is taken instead. What
//! needs more is a VMA's first anon_vma, which may be a neighbour's, and a stack that grows, which changes the VMA.

use abi::lock::LockClass;
use abi::objects::{Mm, Pa, Vma, vma_flags};

use super::swap_in::Unfinished;
use super::{FaultError, Field};
use crate::Kernel;
use crate::arch::Arch;
use core::sync::atomic::Ordering::Acquire;

/// In the code of a fault: it holds its VMA and not the mmap_lock (Linux's FAULT_FLAG_VMA_LOCK). Beside the architecture's
/// bits.
pub(super) const VMA_LOCKED: u64 = 1 << 35;

impl<A: Arch> Kernel<A> {
    /// A fault at `page` of `mm`, under whatever lock it takes.
    ///
    /// # Errors
    /// What it has to wait for without one, or why the access must not be made.
    pub(super) fn fault_at(&self, mm: Pa<Mm>, page: u64, error: u64) -> Result<(), Unfinished> {
        if let Some(reader) = self.lock_vma_under_rcu(mm, page) {
            self.vma_found(self.obj(mm), reader.vma, page, LockClass::VmaRead);
            match self.fault_in_or_wait(mm, reader.vma, page, error | VMA_LOCKED) {
                Err(Unfinished::NeedsMmapLock) => {}
                result => return result,
            }
        }
        self.fault_under_mmap_lock(mm, page, error)
    }

    /// Linux's lock_mm_and_find_vma, and the fault.
    fn fault_under_mmap_lock(&self, mm: Pa<Mm>, page: u64, error: u64) -> Result<(), Unfinished> {
        let space = self.obj(mm);
        {
            let _guard = self.read_lock(&space.mmap_lock, LockClass::MmapRead);
            let vma = self.vma_find(space, page).ok_or(FaultError::NoMapping)?;
            let area = self.obj(vma);
            if area.start.get() <= page {
                self.vma_found(space, vma, page, LockClass::MmapRead);
                return self.fault_in_or_wait(mm, vma, page, error);
            }
            // Only a stack that grows needs the lock for writing.
            if area.flags.get() & vma_flags::GROWSDOWN == 0 {
                return Err(FaultError::NoMapping.into());
            }
        }
        let _guard = self.mmap_write_lock(space);
        let vma = self.vma_find(space, page).ok_or(FaultError::NoMapping)?;
        self.vma_found(space, vma, page, LockClass::MmapWrite);
        if self.obj(vma).start.get() > page {
            self.expand_stack(mm, vma, page)?;
        }
        self.fault_in_or_wait(mm, vma, page, error)
    }

    /// Gives the `vma` of a fault an anon_vma if it has none (Linux's vmf_anon_prepare): its neighbours may have one for it, so
    /// the mmap_lock is needed too, for a moment, and must not be waited for.
    ///
    /// # Errors
    /// ENOMEM as a [`FaultError`]; where a writer has the mmap_lock, that it is needed.
    pub(super) fn fault_anon_vma(
        &self,
        mm: Pa<Mm>,
        vma: Pa<Vma>,
        error: u64,
    ) -> Result<(), Unfinished> {
        if !self.obj(vma).anon_vma.load(Acquire).is_null() {
            return Ok(());
        }
        let _guard = if error & VMA_LOCKED == 0 {
            None
        } else {
            let lock = &self.obj(mm).mmap_lock;
            let guard = self.try_read_lock(lock, LockClass::MmapRead);
            Some(guard.ok_or(Unfinished::NeedsMmapLock)?)
        };
        Ok(self.anon_vma_prepare(mm, vma)?)
    }
}
