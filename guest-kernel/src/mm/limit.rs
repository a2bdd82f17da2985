//! What a process may map and lock: the counters of an mm, and the limits of its process that they are held against
//! (Linux's `may_expand_vm`, `mlock_future_ok` and `do_prlimit`).
//!
//! The counters are sums over the VMAs, and every change of a VMA's range or flags keeps them so
//! ([`Kernel::account`]). Programs have no privileges: CAP_IPC_LOCK and CAP_SYS_RESOURCE do not exist.

use abi::bug::Bug;
use abi::layout::PAGE_SIZE;
use abi::objects::{Mm, Pa, Vma, vma_flags};
use abi::syscall::{Errno, rlimit};

use super::{Field, pages};
use crate::Kernel;
use crate::arch::Arch;

/// The limits of one resource: soft, hard.
pub(crate) type Limits = (u64, u64);

/// Where the limits of `resource` are kept; None where it has none.
fn index(resource: u64) -> Option<usize> {
    rlimit::KEPT.iter().position(|&kept| kept == resource)
}

impl<A: Arch> Kernel<A> {
    /// Linux's defaults (INIT_RLIMITS).
    pub(super) fn default_limits(&self, mm: &Mm) {
        for (limits, resource) in mm.limits.iter().zip(rlimit::KEPT) {
            let (soft, hard) = match resource {
                rlimit::STACK => (rlimit::DEFAULT_STACK, rlimit::INFINITY),
                rlimit::MEMLOCK => (rlimit::DEFAULT_MEMLOCK, rlimit::DEFAULT_MEMLOCK),
                _ => (rlimit::INFINITY, rlimit::INFINITY),
            };
            limits.soft.set(soft);
            limits.hard.set(hard);
        }
    }

    /// A child begins with its parent's limits.
    pub(super) fn copy_limits(&self, parent: &Mm, child: &Mm) {
        for (from, to) in parent.limits.iter().zip(&child.limits) {
            to.soft.set(from.soft.get());
            to.hard.set(from.hard.get());
        }
    }

    /// Gets the limits of `resource`, and sets them where `new` says so (prlimit64, `do_prlimit`).
    ///
    /// # Errors
    /// EINVAL for a resource whose limits are not kept, and for a soft limit above the hard one; EPERM to raise the
    /// hard one.
    pub(crate) fn rlimit(
        &self,
        mm: Pa<Mm>,
        resource: u64,
        new: Option<Limits>,
    ) -> Result<Limits, Errno> {
        let space = self.obj(mm);
        let limits = &space.limits[index(resource).ok_or(Errno::EINVAL)?];
        if new.is_some_and(|(soft, hard)| soft > hard) {
            return Err(Errno::EINVAL);
        }
        // Both in one piece, and as the mapping calls look at them.
        let _guard = self.mmap_write_lock(space);
        let old = (limits.soft.get(), limits.hard.get());
        if let Some((soft, hard)) = new {
            if hard > old.1 {
                return Err(Errno::EPERM);
            }
            limits.soft.set(soft);
            limits.hard.set(hard);
        }
        Ok(old)
    }

    /// The soft limit of `resource`, which is one of [`rlimit::KEPT`].
    pub(super) fn limit(&self, mm: &Mm, resource: u64) -> u64 {
        index(resource).map_or(rlimit::INFINITY, |index| mm.limits[index].soft.get())
    }

    /// Refuses `more` pages of a mapping with `flags` where RLIMIT_AS or RLIMIT_DATA does not allow them (Linux's
    /// `may_expand_vm`).
    ///
    /// # Errors
    /// ENOMEM.
    pub(super) fn may_expand(&self, mm: &Mm, flags: u64, more: u64) -> Result<(), Errno> {
        if mm.total_vm.get() + more > pages(self.limit(mm, rlimit::AS)) {
            return Err(Errno::ENOMEM);
        }
        if vma_flags::is_data(flags) {
            let (data, soft) = (mm.data_vm.get() + more, self.limit(mm, rlimit::DATA));
            // A soft limit of 0 means the hard one: a workaround of Linux's for valgrind.
            let hard = index(rlimit::DATA).map_or(0, |index| mm.limits[index].hard.get());
            if data > pages(soft) && !(soft == 0 && data <= pages(hard)) {
                return Err(Errno::ENOMEM);
            }
        }
        Ok(())
    }

    /// Refuses `bytes` more of a mapping with `flags` where those are to be locked and RLIMIT_MEMLOCK does not allow it
    /// (Linux's `mlock_future_ok`).
    ///
    /// # Errors
    /// EAGAIN.
    pub(super) fn may_lock(&self, mm: &Mm, flags: u64, bytes: u64) -> Result<(), Errno> {
        let locked = self.counted_as_locked(mm) + pages(bytes);
        if flags & vma_flags::LOCKED != 0 && locked > pages(self.limit(mm, rlimit::MEMLOCK)) {
            return Err(Errno::EAGAIN);
        }
        Ok(())
    }

    /// Pages that count against RLIMIT_MEMLOCK.
    pub(super) fn counted_as_locked(&self, mm: &Mm) -> u64 {
        mm.locked_vm.get() + mm.locked_before.get()
    }

    /// Counts `bytes` more, or where negative fewer, in mappings with `flags`. Under the mmap_lock held for writing.
    pub(super) fn account(&self, mm: &Mm, flags: u64, bytes: i64) {
        let delta = bytes / PAGE_SIZE as i64;
        let add = |counter: &core::sync::atomic::AtomicU64| {
            counter.set(counter.get().wrapping_add_signed(delta));
        };
        add(&mm.total_vm);
        if vma_flags::is_data(flags) {
            add(&mm.data_vm);
        }
        if flags & vma_flags::LOCKED != 0 {
            add(&mm.locked_vm);
        }
    }

    /// Gives `vma` other flags, and counts it as what it is then.
    pub(super) fn set_vma_flags(&self, mm: &Mm, vma: Pa<Vma>, flags: u64) {
        let area = self.obj(vma);
        if !self.config.bugs.has(Bug::VmaFlagsUnlocked) {
            self.vma_start_write(vma);
        }
        let bytes = (area.end.get() - area.start.get()).cast_signed();
        self.account(mm, area.flags.get(), -bytes);
        area.flags.set(flags);
        self.account(mm, flags, bytes);
        self.vma_changed(vma);
    }
}
