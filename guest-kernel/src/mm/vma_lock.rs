//! How long a VMA lives, and who may read or write it meanwhile: the seam of VMA lifetime and of how "detached" is written down.
//!
//! The one implementation is the form that Linux merged in 6.15 (f35ab95ca0af, 3104138517fc) and has mended since: a VMA's
//! memory is always a VMA's (`slab`), so it is recycled without a grace period; one word of it counts readers, and is 0
//! while it is not linked in ([`vma_lock`](crate::sync::vma_lock) has the algorithm and its ordering). Who finds a VMA under
//! RCU may therefore find one that is gone, or is another one by now, perhaps another mm's: that is asked once it is counted as
//! its reader, for from then on it stays what it is.
//!
//! Whoever changes a VMA, or entries that a fault in it relies on, holds the mmap_lock for writing and has called
//! [`Kernel::vma_start_write`]; all VMAs are let go of with the mmap_lock. A fault holds one VMA for reading, or the
//! mmap_lock; it never waits for the mmap_lock while it holds a VMA.

use abi::bug::Bug;
use abi::channel::EventKind;
use abi::lock::LockClass;
use abi::objects::{Mm, Pa, Vma};
use abi::point::Point;

use super::Field;
use crate::Kernel;
use crate::arch::Arch;
use crate::sync::{Guard, Taken, rwlock, vma_lock};
use crate::testbed::told;

/// The mmap_lock held for writing, and with it every VMA that was locked meanwhile.
#[must_use = "the lock is released at once"]
pub(super) struct MmapWriter<'k, A: Arch> {
    kernel: &'k Kernel<A>,
    mm: &'k Mm,
}

impl<A: Arch> Drop for MmapWriter<'_, A> {
    fn drop(&mut self) {
        let Self { kernel, mm } = self;
        // All in one: told before the VMAs are free too, which a fault may have at once.
        kernel.released(&mm.mmap_lock, LockClass::MmapWrite, || {
            vma_lock::end(&mm.lock_seq);
            rwlock::release_write(&mm.mmap_lock)
        });
    }
}

/// A VMA held for reading: linked in, as it is, with its tables, until this is dropped.
#[must_use = "the VMA is let go of at once"]
pub(super) struct VmaReader<'k, A: Arch> {
    pub(super) vma: Pa<Vma>,
    _guard: Guard<'k, A>,
}

impl<A: Arch> Kernel<A> {
    /// Takes the mmap_lock of `mm` for writing.
    pub(super) fn mmap_write_lock<'k>(&'k self, mm: &'k Mm) -> MmapWriter<'k, A> {
        self.write_lock(&mm.mmap_lock, LockClass::MmapWrite);
        vma_lock::begin(&mm.lock_seq);
        MmapWriter { kernel: self, mm }
    }

    /// The VMA of `mm` that holds `address`, held for reading (Linux's function of this name). None where there is none, or
    /// where it cannot be had without a wait: then the mmap_lock says which.
    pub(super) fn lock_vma_under_rcu(&self, mm: Pa<Mm>, address: u64) -> Option<VmaReader<'_, A>> {
        let space = self.obj(mm);
        let _section = self.rcu_read();
        let vma = self.vma_floor(space, address)?;
        let area = self.obj(vma);
        let refs = self.lock_id(&area.refs);
        point!(self, Point::VmaLookup, [refs, address]);
        // A hint that spares a busy VMA two changes of its word.
        if vma_lock::is_written(&area.lock_seq, &space.lock_seq) {
            return None;
        }
        vma_lock::try_read(&area.refs).ok()?;
        point!(self, Point::VmaCounted, [refs, address]);
        let is_own = area.mm.get() == mm || self.config.bugs.has(Bug::VmaMmUnchecked);
        if !is_own
            || vma_lock::is_written(&area.lock_seq, &space.lock_seq)
            || !(area.start.get()..area.end.get()).contains(&address)
        {
            vma_lock::release(&area.refs);
            return None;
        }
        let (class, id) = (LockClass::VmaRead, told(|| space.id.get()));
        let guard = self.acquired(&area.refs, class, Taken::Trying, id);
        Some(VmaReader { vma, _guard: guard })
    }

    /// From here until the mmap_lock of its mm, held for writing, is released nobody reads `vma` (Linux's function of this
    /// name). Waits for those who do: under no lock that a fault takes.
    #[inline]
    pub(super) fn vma_start_write(&self, vma: Pa<Vma>) {
        let area = self.obj(vma);
        let mm = self.obj(area.mm.get());
        if area.lock_seq.get() != mm.lock_seq.get() {
            self.vma_note_write(mm, area);
        }
    }

    #[inline(never)]
    fn vma_note_write(&self, mm: &Mm, area: &Vma) {
        self.exclude_readers(area);
        let (class, id) = (LockClass::VmaWrite, told(|| mm.id.get()));
        let _excluded = self.acquired(&area.refs, class, Taken::Waiting, id);
        vma_lock::note(&area.lock_seq, &mm.lock_seq);
    }

    /// A new VMA that is complete, and known to nobody yet, is about to be linked in. It is held for writing, as all that its
    /// writer has changed.
    pub(super) fn vma_mark_attached(&self, mm: &Mm, vma: Pa<Vma>) {
        let area = self.obj(vma);
        vma_lock::note(&area.lock_seq, &mm.lock_seq);
        vma_lock::admit(&area.refs);
    }

    /// `vma`, which is held for writing, is in no tree any more. When it returns nobody reads it, and nobody will until it is
    /// another one.
    pub(super) fn vma_mark_detached(&self, vma: Pa<Vma>) {
        let area = self.obj(vma);
        // Some may have been counted and not asked yet.
        self.exclude_readers(area);
        vma_lock::detach(&area.refs);
    }

    fn exclude_readers(&self, area: &Vma) {
        vma_lock::exclude(&area.refs);
        while !vma_lock::is_alone(&area.refs) {
            self.wait(&area.refs, LockClass::VmaWrite);
        }
    }

    /// Told so that the host knows how far a VMA reaches, and what it permits.
    pub(super) fn vma_changed(&self, vma: Pa<Vma>) {
        let [id, start, end, flags] = told(|| {
            let area = self.obj(vma);
            let id = self.obj(area.mm.get()).id.get();
            [id, area.start.get(), area.end.get(), area.flags.get()]
        });
        event!(self, EventKind::VmaChange, [id, vma.0, start, end, flags]);
    }

    /// Told so that the host can tell a VMA that was recycled since, with the lock that keeps it.
    #[inline]
    pub(super) fn vma_found(&self, mm: &Mm, vma: Pa<Vma>, gva: u64, lock: LockClass) {
        event!(
            self,
            EventKind::VmaFound,
            [
                mm.id.get(),
                vma.0,
                gva,
                self.obj(vma).generation.get().into(),
                lock as u64
            ]
        );
    }
}
