//! Frames: a binary buddy allocator with per-CPU lists for single frames.
//!
//! A block of order `n` is 2^n frames, aligned to its size; the descriptor of its first frame (the
//! head) says what it is, those of the others say [`FrameKind::Tail`]. The buddy's lists are under
//! `root.buddy_lock`. A per-CPU list is touched by its own CPU only, which needs no lock because the
//! kernel is not preemptible; it is a stack, so a freed frame is the next to be reused, which is what
//! makes a stale translation to it visible soon. `root.free_frames` counts both.

use core::ops::Range;
use core::sync::atomic::Ordering::Relaxed;

use abi::channel::EventKind;
use abi::failpoint::Failpoint;
use abi::layout::{HUGE_ORDER, PAGE_SHIFT};
use abi::objects::{Folio, FrameKind, ORDERS, Pa};
use abi::point::Point;
use abi::syscall::Errno;

use super::Field;
use super::kswapd::Shortage;
use crate::Kernel;
use crate::arch::Arch;
use abi::lock::LockClass;

/// Frames that an allocation that finds none has reclaimed.
const FROM_RECLAIM: u64 = 8;

impl<A: Arch> Kernel<A> {
    /// Allocates a block of 2^`order` frames with contents of no meaning, with one reference.
    /// Returns its guest physical address.
    ///
    /// # Errors
    /// ENOMEM where no block is left; frames on the lists of other CPUs are out of reach.
    pub fn alloc_frames(&self, order: u8, kind: FrameKind) -> Result<u64, Errno> {
        if fail!(self, Failpoint::FrameAlloc) {
            return Err(Errno::ENOMEM);
        }
        let mut frame = self.take_block(order, kind);
        if frame.is_none() {
            frame = self.reclaim_block(order, kind);
        }
        let gpa = frame.ok_or(Errno::ENOMEM)? << PAGE_SHIFT;
        self.allocated(gpa, order, kind);
        self.watch_memory(Shortage::Reclaims);
        Ok(gpa)
    }

    /// A block where there was none (Linux's `__alloc_pages_slowpath`).
    #[cold]
    fn reclaim_block(&self, order: u8, kind: FrameKind) -> Option<u64> {
        if self.rcu_reclaim()
            && let Some(frame) = self.take_block(order, kind)
        {
            return Some(frame);
        }
        let mut waited = false;
        while self.can_reclaim() {
            let freed = self.direct_reclaim(FROM_RECLAIM);
            let frame = self.take_block(order, kind);
            // Not all memory for a block of 2 MiB: small pages serve as well (Linux's GFP_TRANSHUGE, __GFP_NORETRY).
            if frame.is_some() || order >= HUGE_ORDER {
                return frame;
            }
            if freed == 0 && (waited || !self.await_reclaim()) {
                break;
            }
            waited |= freed == 0;
        }
        // Another CPU may have freed something since the last look, and nothing may be left to reclaim because it did.
        self.take_block(order, kind)
    }

    /// As [`Kernel::alloc_frames`], of one frame that is free already.
    ///
    /// # Errors
    /// ENOMEM.
    pub(super) fn alloc_free_frame(&self, kind: FrameKind) -> Result<u64, Errno> {
        let gpa = self.take_block(0, kind).ok_or(Errno::ENOMEM)? << PAGE_SHIFT;
        self.allocated(gpa, 0, kind);
        self.watch_memory(Shortage::Tolerated);
        Ok(gpa)
    }

    #[inline]
    fn allocated(&self, gpa: u64, order: u8, kind: FrameKind) {
        let args = [gpa, u64::from(order), kind as u64];
        event!(
            self,
            EventKind::FrameAlloc,
            [args[0], args[1], args[2], 0, 0]
        );
        point!(self, Point::FrameAlloc, [gpa, args[1]]);
    }

    /// Takes the lowest frame with a number in `range` that begins a free block, as [`Kernel::alloc_frames`] takes any: the
    /// free scanner of compaction (Linux's `isolate_freepages_block`). Frames on CPUs' lists are out of reach.
    pub(super) fn take_lowest(&self, range: Range<u64>, kind: FrameKind) -> Option<u64> {
        let frame = {
            let _guard = self.lock(&self.root().buddy_lock, LockClass::Buddy);
            let is_free =
                |frame: &u64| self.frame_folio(*frame).kind.get() == FrameKind::Buddy as u8;
            let frame = range.into_iter().find(is_free)?;
            let order = self.frame_folio(frame).order.get();
            self.buddy_unlink(frame, usize::from(order));
            for half in (0..order).rev() {
                self.buddy_push(frame + (1 << half), half);
            }
            self.claim(frame, 0, kind);
            frame
        };
        self.allocated(frame << PAGE_SHIFT, 0, kind);
        self.watch_memory(Shortage::Tolerated);
        Some(frame << PAGE_SHIFT)
    }

    fn take_block(&self, order: u8, kind: FrameKind) -> Option<u64> {
        if order == 0 && self.config.pcp_batch > 0 {
            return self.pcp_take(kind);
        }
        let taken = self.buddy_take(order, kind);
        if taken.is_none() && self.config.pcp_batch > 0 {
            self.pcp_spill(0);
            return self.buddy_take(order, kind);
        }
        taken
    }

    /// Gives the block whose head is at `gpa` back. Its contents stay as they are.
    ///
    /// # Panics
    /// Where it is free already: a double free.
    pub fn free_frames(&self, gpa: u64) {
        let frame = gpa >> PAGE_SHIFT;
        let folio = self.frame_folio(frame);
        let (kind, order) = (folio.kind.get(), folio.order.get());
        let allocated =
            FrameKind::from_u8(kind).is_some_and(|k| k != FrameKind::Tail && !k.is_free());
        assert!(allocated, "frame {gpa:#x} of kind {kind} freed");
        if self.has_groups() {
            self.uncharge(gpa);
        }
        event!(
            self,
            EventKind::FrameFree,
            [gpa, u64::from(order), u64::from(kind), 0, 0],
        );
        let batch = self.config.pcp_batch;
        if order == 0 && batch > 0 {
            self.pcp_push(frame);
            self.root().free_frames.fetch_add(1, Relaxed);
            if self.this_cpu().free_count.get() > 2 * batch {
                self.pcp_spill(batch);
            }
        } else {
            let _guard = self.lock(&self.root().buddy_lock, LockClass::Buddy);
            self.buddy_put(frame, order);
            self.root().free_frames.fetch_add(1 << order, Relaxed);
        }
    }

    /// The descriptor of the frame at `gpa`.
    ///
    /// # Panics
    /// Where there is no such frame.
    #[inline]
    pub fn folio(&self, gpa: u64) -> &Folio {
        self.obj(self.folio_pa(gpa))
    }

    /// Where the descriptor of the frame at `gpa` lies.
    ///
    /// # Panics
    /// Where there is no such frame.
    #[inline]
    pub fn folio_pa(&self, gpa: u64) -> Pa<Folio> {
        let frame = gpa >> PAGE_SHIFT;
        let root = self.root();
        if frame >= root.nr_frames.get() {
            no_frame(gpa);
        }
        Pa::new(root.folios.get().0 + frame * size_of::<Folio>() as u64)
    }

    pub(super) fn frame_folio(&self, frame: u64) -> &Folio {
        self.folio(frame << PAGE_SHIFT)
    }

    /// Makes the block at `frame` an allocated one of `kind`. Its owner alone may touch it now.
    fn claim(&self, frame: u64, order: u8, kind: FrameKind) {
        let folio = self.frame_folio(frame);
        folio.kind.set(kind as u8);
        folio.order.set(order);
        folio.refcount.set(1);
        folio.generation.set(folio.generation.get().wrapping_add(1));
        folio.owner.set(0);
        folio.next.set(0);
        folio.state.set(0);
        self.root().free_frames.fetch_sub(1 << order, Relaxed);
    }

    /// What is true of every free descriptor, wherever it is listed.
    fn release(&self, frame: u64, kind: FrameKind, owner: u64) -> &Folio {
        let folio = self.frame_folio(frame);
        folio.kind.set(kind as u8);
        folio.flags.set(0);
        folio.state.set(0);
        folio.refcount.set(0);
        folio.mapcount.set(0);
        folio.owner.set(owner);
        folio.index.set(0);
        folio.used.set(0);
        folio
    }
}

/// The per-CPU lists.
impl<A: Arch> Kernel<A> {
    fn pcp_take(&self, kind: FrameKind) -> Option<u64> {
        let cpu = self.this_cpu();
        if cpu.free_list.get() == 0 {
            self.pcp_refill();
        }
        let frame = cpu.free_list.get();
        if frame == 0 {
            return None;
        }
        cpu.free_list.set(self.frame_folio(frame).next.get());
        cpu.free_count.set(cpu.free_count.get() - 1);
        self.claim(frame, 0, kind);
        Some(frame)
    }

    fn pcp_push(&self, frame: u64) {
        let cpu = self.this_cpu();
        let folio = self.release(frame, FrameKind::PerCpu, self.arch.cpu() as u64);
        folio.order.set(0);
        folio.next.set(cpu.free_list.get());
        cpu.free_list.set(frame);
        cpu.free_count.set(cpu.free_count.get() + 1);
    }

    fn pcp_refill(&self) {
        let _guard = self.lock(&self.root().buddy_lock, LockClass::Buddy);
        for _ in 0..self.config.pcp_batch {
            let Some(frame) = self.buddy_pop(0) else {
                break;
            };
            self.pcp_push(frame);
        }
    }

    /// Gives the oldest frames of this CPU's list back to the buddy allocator, all but `keep`.
    pub(super) fn pcp_spill(&self, keep: u64) {
        let cpu = self.this_cpu();
        let mut next = cpu.free_list.get();
        let mut last_kept = 0;
        for _ in 0..keep.min(cpu.free_count.get()) {
            last_kept = next;
            next = self.frame_folio(next).next.get();
        }
        let _guard = self.lock(&self.root().buddy_lock, LockClass::Buddy);
        if last_kept == 0 {
            cpu.free_list.set(0);
        } else {
            self.frame_folio(last_kept).next.set(0);
        }
        while next != 0 {
            let frame = next;
            next = self.frame_folio(frame).next.get();
            cpu.free_count.set(cpu.free_count.get() - 1);
            self.buddy_put(frame, 0);
        }
    }
}

/// The buddy allocator proper.
impl<A: Arch> Kernel<A> {
    fn buddy_take(&self, order: u8, kind: FrameKind) -> Option<u64> {
        let _guard = self.lock(&self.root().buddy_lock, LockClass::Buddy);
        let frame = self.buddy_pop(order)?;
        self.claim(frame, order, kind);
        Some(frame)
    }

    /// Takes a block of exactly `order` off the lists, splitting a larger one where it must.
    fn buddy_pop(&self, order: u8) -> Option<u64> {
        let lists = &self.root().buddy;
        let from = (usize::from(order)..ORDERS).find(|&o| lists[o].get() != 0)?;
        let frame = lists[from].get();
        self.buddy_unlink(frame, from);
        for half in (usize::from(order)..from).rev() {
            self.buddy_push(frame + (1 << half), half as u8);
        }
        Some(frame)
    }

    /// Lists a free block, merged with its free buddies.
    fn buddy_put(&self, frame: u64, order: u8) {
        let root = self.root();
        let (mut frame, mut order) = (frame, order);
        while usize::from(order) + 1 < ORDERS {
            let buddy = frame ^ (1 << order);
            // Frames below the first one were adopted one by one between reserved ones: a merge
            // would blur where the allocator's own memory begins.
            if frame.min(buddy) < root.first_frame.get() || buddy >= root.nr_frames.get() {
                break;
            }
            let other = self.frame_folio(buddy);
            if other.kind.get() != FrameKind::Buddy as u8 || other.order.get() != order {
                break;
            }
            self.buddy_unlink(buddy, usize::from(order));
            let upper = self.release(frame.max(buddy), FrameKind::Tail, 0);
            upper.order.set(0);
            upper.next.set(0);
            frame = frame.min(buddy);
            order += 1;
        }
        self.buddy_push(frame, order);
    }

    /// Makes the block at `frame` the head of a free one and lists it, without merging.
    pub(super) fn buddy_push(&self, frame: u64, order: u8) {
        let list = &self.root().buddy[usize::from(order)];
        let folio = self.release(frame, FrameKind::Buddy, 0);
        folio.order.set(order);
        let next = list.get();
        folio.next.set(next);
        folio.prev.set(0);
        if next != 0 {
            self.frame_folio(next).prev.set(frame);
        }
        list.set(frame);
    }

    fn buddy_unlink(&self, frame: u64, order: usize) {
        let folio = self.frame_folio(frame);
        let (next, prev) = (folio.next.get(), folio.prev.get());
        if next != 0 {
            self.frame_folio(next).prev.set(prev);
        }
        if prev == 0 {
            self.root().buddy[order].set(next);
        } else {
            self.frame_folio(prev).next.set(next);
        }
        folio.prev.set(0);
    }
}

/// Apart, so that a lookup needs no stack frame for the message.
#[cold]
#[inline(never)]
fn no_frame(gpa: u64) -> ! {
    panic!("no frame at {gpa:#x}")
}
