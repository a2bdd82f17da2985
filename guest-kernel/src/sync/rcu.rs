//! Read-copy-update: readers that take no lock, and memory that is freed only when none of them can hold it any
//! more. The classic form for a kernel that is not preemptible (Linux's Documentation/RCU/whatisRCU.rst).
//!
//! - A *read section* ([`Kernel::rcu_read`]) is a count of its own CPU; sections nest. Inside one a CPU does not
//!   switch, return to user mode, idle, or wait for a grace period. It may spin for a lock whose holders
//!   never wait for one: page-table locks.
//! - A CPU is *quiescent* in user mode, while idle, and while it spins outside of a section; and for a moment when it
//!   switches tasks. In the first three for as long as they last: none of them holds up a grace period
//!   ([`super::grace`] has the counter and its ordering).
//! - What was unlinked is *retired* ([`Kernel::rcu_retire`], Linux's `call_rcu`): it goes on a list of its CPU, and the
//!   CPU's next grace period is for all that is on it. Each CPU has its own grace periods: there is no thread
//!   and no lock for them. They are looked at whenever something is retired, on the way back to user mode and
//!   when idle; a CPU that has nothing else to do waits for its grace period instead of halting.
//! - [`Kernel::synchronize_rcu`] waits. No lock may be held that somebody takes in a section; others may, for who
//!   spins for them is quiescent.
//! - Where memory is short, [`Kernel::rcu_reclaim`] takes what all CPUs have retired and waits for it.
//!
//! What is retired are page-table pages (Linux's MMU_GATHER_RCU_TABLE_FREE), mms, each with its level-4 table, and nodes of
//! VMA trees.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};

use abi::bug::Bug;
use abi::channel::{EventKind, rcu_object};
use abi::layout::MAX_CPUS;
use abi::objects::{CpuRcu, FrameKind, Mm, Pa, VmaNode};
use abi::point::Point;

use super::grace;
use crate::Kernel;
use crate::arch::{Arch, CpuMask};
use crate::mm::Field;
use crate::testbed::told;

/// An open read section; dropping it ends it.
#[must_use = "the section ends at once"]
pub struct RcuReader<'k, A: Arch>(&'k Kernel<A>);

impl<A: Arch> Drop for RcuReader<'_, A> {
    fn drop(&mut self) {
        let nesting = &self.0.this_cpu().rcu.nesting;
        let left = nesting.get() - 1;
        point!(self.0, Point::RcuExit, [left, 0]);
        event!(self.0, EventKind::RcuExit, [left, 0, 0, 0, 0]);
        nesting.set(left);
    }
}

/// Read sections and quiescent states.
impl<A: Arch> Kernel<A> {
    /// Begins a read section: what is reached by links from here to its end stays.
    pub fn rcu_read(&self) -> RcuReader<'_, A> {
        let rcu = &self.this_cpu().rcu;
        debug_assert!(
            rcu.watching.get() % 2 == 1,
            "CPU {} reads under RCU in a quiescent state",
            self.arch.cpu()
        );
        let nesting = rcu.nesting.get() + 1;
        rcu.nesting.set(nesting);
        event!(self, EventKind::RcuEnter, [nesting, 0, 0, 0, 0]);
        point!(self, Point::RcuEnter, [nesting, 0]);
        RcuReader(self)
    }

    /// This CPU is in the kernel from here on.
    #[inline]
    pub fn rcu_enter_kernel(&self) {
        grace::enter(&self.this_cpu().rcu.watching);
    }

    /// This CPU returns to user mode.
    #[inline]
    pub(crate) fn rcu_return_to_user(&self) {
        self.assert_no_section();
        let rcu = &self.this_cpu().rcu;
        if has_work(rcu) {
            self.rcu_poll();
        }
        grace::leave(&rcu.watching);
    }

    /// This CPU leaves the kernel to idle.
    #[inline]
    pub(crate) fn rcu_leave_kernel(&self) {
        self.assert_no_section();
        grace::leave(&self.this_cpu().rcu.watching);
    }

    /// A switch of tasks.
    pub(crate) fn rcu_note_switch(&self) {
        self.assert_no_section();
        grace::pass(&self.this_cpu().rcu.watching);
    }

    /// One turn of a wait for what `point` says: outside of a section a quiescent state for as long as it
    /// lasts.
    pub(crate) fn spin(&self, point: Point, args: [u64; 2]) {
        let rcu = &self.this_cpu().rcu;
        let paused = rcu.nesting.get() == 0 && grace::leave(&rcu.watching);
        point!(self, point, args);
        self.arch.relax();
        if paused {
            grace::enter(&rcu.watching);
        }
    }

    fn assert_no_section(&self) {
        debug_assert!(
            self.this_cpu().rcu.nesting.get() == 0,
            "CPU {} leaves the kernel or its task inside an RCU read section",
            self.arch.cpu()
        );
    }
}

/// Retiring, and the grace periods of this CPU.
impl<A: Arch> Kernel<A> {
    /// Frees the page-table page at `table`, to which no entry leads any more and which no CPU caches, when all
    /// read sections of now have ended; one of level 4 with its mm, which is on no list any more. To be
    /// followed by [`Kernel::rcu_poll`] where the caller can do that.
    pub(crate) fn rcu_retire(&self, table: u64) {
        self.note_retired_table(table);
        self.push_retired(table);
    }

    /// As [`Kernel::rcu_retire`], of a node that no link leads to any more.
    pub(crate) fn rcu_retire_node(&self, node: Pa<VmaNode>) {
        self.slab_retire(node);
        event!(
            self,
            EventKind::RcuRetire,
            [node.0, rcu_object::VMA_NODE, 0, 0, 0]
        );
        if self.config.bugs.has(Bug::VmaNodesWithoutGracePeriod) {
            return self.free_retired_node(node);
        }
        self.push_retired(node.0 | CpuRcu::IS_NODE);
    }

    fn push_retired(&self, object: u64) {
        let list = &self.this_cpu().rcu.retired;
        // Others only ever take the whole list. AcqRel: who takes it sees how it is linked.
        let mut first = list.load(Relaxed);
        loop {
            self.next_retired(object).set(first);
            match list.compare_exchange_weak(first, object, AcqRel, Relaxed) {
                Ok(_) => return,
                Err(now) => first = now,
            }
        }
    }

    /// The link of what a list of retired objects calls `object` ([`CpuRcu::retired`]).
    fn next_retired(&self, object: u64) -> &AtomicU64 {
        match retired_node(object) {
            Some(node) => &self.obj(node).next_retired,
            None => &self.folio(object).next,
        }
    }

    /// True where this CPU has retired what is not yet free.
    #[inline]
    pub(crate) fn rcu_has_work(&self) -> bool {
        has_work(&self.this_cpu().rcu)
    }

    /// Looks whether grace periods are over, begins the next one, and frees what is due. Waits for nobody.
    /// Inside a section, nothing: it would not end.
    pub(crate) fn rcu_poll(&self) {
        let rcu = &self.this_cpu().rcu;
        if rcu.nesting.get() != 0 {
            return;
        }
        loop {
            if rcu.grace.get().is_multiple_of(2) {
                if rcu.retired.get() == 0 {
                    return;
                }
                self.grace_begin();
            }
            if !self.grace_is_over() {
                return;
            }
            self.grace_end();
        }
    }

    /// Waits until every read section of now, on any CPU, has ended. Frees what this CPU had retired.
    ///
    /// # Panics
    /// Inside a section, which would wait for itself.
    pub fn synchronize_rcu(&self) {
        let rcu = &self.this_cpu().rcu;
        assert!(rcu.nesting.get() == 0, "a grace period inside a section");
        if rcu.grace.get() % 2 == 1 {
            // It began before now: not enough.
            self.grace_wait();
        }
        self.grace_begin();
        self.grace_wait();
    }

    /// Waits until nothing that this CPU retired is left (Linux's `rcu_barrier`).
    pub(crate) fn rcu_barrier(&self) {
        while self.rcu_has_work() {
            self.synchronize_rcu();
        }
    }

    /// One turn of waiting for this CPU's grace period.
    pub(crate) fn rcu_wait(&self) {
        let first = Pa::<CpuRcu>::new(self.gpa_of(&self.root().cpus[0].rcu));
        self.spin(Point::RcuWait, [first.0, self.this_cpu().rcu.pending.get()]);
    }

    /// Frees what all CPUs have retired, after a grace period. False where no frame has become free, or where this CPU is
    /// in a section.
    pub(crate) fn rcu_reclaim(&self) -> bool {
        if self.this_cpu().rcu.nesting.get() != 0 {
            return false;
        }
        let cpus = &self.root().cpus[..self.arch.nr_cpus()];
        let lists = || {
            cpus.iter()
                .flat_map(|cpu| [&cpu.rcu.retired, &cpu.rcu.waiting])
        };
        if lists().all(|list| list.load(Relaxed) == 0) {
            return false;
        }
        let mut taken = [0; 2 * MAX_CPUS];
        for (taken, list) in taken.iter_mut().zip(lists()) {
            // Acquire: pairs with the push.
            *taken = list.swap(0, Acquire);
        }
        self.synchronize_rcu();
        taken
            .into_iter()
            .fold(false, |frames, list| self.free_retired(list) | frames)
    }

    fn grace_wait(&self) {
        while !self.grace_is_over() {
            self.rcu_wait();
        }
        self.grace_end();
    }

    /// Begins a grace period for what this CPU has retired.
    fn grace_begin(&self) {
        let rcu = &self.this_cpu().rcu;
        rcu.waiting.store(rcu.retired.swap(0, AcqRel), Relaxed);
        let grace = rcu.grace.get() + 1;
        rcu.grace.set(grace);
        // Told first: sections that begin after it need not be waited for.
        event!(self, EventKind::RcuGpStart, [grace / 2, 0, 0, 0, 0]);
        grace::begin::<core::sync::atomic::AtomicU64>();
        let mut pending: CpuMask = 0;
        for cpu in 0..self.arch.nr_cpus() {
            let seen = grace::look(&self.root().cpus[cpu].rcu.watching);
            rcu.seen[cpu].set(seen);
            // This one is in no section.
            if seen % 2 == 1 && cpu != self.arch.cpu() {
                pending |= 1 << cpu;
            }
        }
        rcu.pending.set(pending);
        point!(self, Point::RcuGpStart, [grace / 2, pending]);
    }

    fn grace_is_over(&self) -> bool {
        let rcu = &self.this_cpu().rcu;
        let (mut rest, mut pending) = (rcu.pending.get(), 0);
        while rest != 0 {
            let cpu = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            if grace::holds_up(&self.root().cpus[cpu].rcu.watching, rcu.seen[cpu].get()) {
                pending |= 1 << cpu;
            }
        }
        rcu.pending.set(pending);
        if pending != 0 {
            let grace = told(|| rcu.grace.get() / 2);
            event!(self, EventKind::RcuGpWait, [grace, pending, 0, 0, 0]);
        }
        pending == 0
    }

    fn grace_end(&self) {
        let rcu = &self.this_cpu().rcu;
        let grace = rcu.grace.get();
        rcu.grace.set(grace + 1);
        event!(self, EventKind::RcuGpEnd, [grace / 2, 0, 0, 0, 0]);
        point!(self, Point::RcuGpEnd, [grace / 2, 0]);
        // Acquire: pairs with the push; the list may have been taken meanwhile.
        self.free_retired(rcu.waiting.swap(0, Acquire));
    }

    /// True where frames are among what is on `list`.
    fn free_retired(&self, list: u64) -> bool {
        let (mut next, mut frames) = (list, false);
        while next != 0 {
            let object = next;
            next = self.next_retired(object).get();
            match retired_node(object) {
                Some(node) => self.free_retired_node(node),
                None => {
                    self.free_retired_table(object);
                    frames = true;
                }
            }
        }
        frames
    }

    fn free_retired_node(&self, node: Pa<VmaNode>) {
        event!(
            self,
            EventKind::RcuFree,
            [node.0, rcu_object::VMA_NODE, 0, 0, 0]
        );
        self.slab_free_retired(node);
    }

    /// The seeded bug: as [`Kernel::rcu_retire`], but frees at once.
    pub(crate) fn rcu_retire_and_free(&self, table: u64) {
        self.note_retired_table(table);
        self.free_retired_table(table);
    }

    fn note_retired_table(&self, table: u64) {
        self.folio(table).kind.set(FrameKind::Retired as u8);
        let [object, kind] = told(|| self.retired_object(table));
        event!(self, EventKind::RcuRetire, [object, kind, 0, 0, 0]);
    }

    fn free_retired_table(&self, table: u64) {
        let [object, kind] = self.retired_object(table);
        event!(self, EventKind::RcuFree, [object, kind, 0, 0, 0]);
        if kind == rcu_object::MM {
            self.mm_free(Pa::new(object));
        } else {
            self.table_free(table);
        }
    }

    fn retired_object(&self, table: u64) -> [u64; 2] {
        let folio = self.folio(table);
        if folio.index.get() == 4 {
            let mm = Pa::<Mm>::new(folio.owner.get());
            [mm.0, rcu_object::MM]
        } else {
            [table, rcu_object::TABLE]
        }
    }
}

/// The node that a list of retired objects calls `object`; none for a table.
fn retired_node(object: u64) -> Option<Pa<VmaNode>> {
    (object & CpuRcu::IS_NODE != 0).then(|| Pa::new(object & !CpuRcu::IS_NODE))
}

#[inline]
fn has_work(rcu: &CpuRcu) -> bool {
    rcu.retired.get() != 0 || rcu.grace.get() % 2 == 1
}
