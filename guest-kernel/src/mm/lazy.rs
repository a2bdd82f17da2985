//! Lazy TLB mode: what a CPU that runs no user code does with the mm that it has loaded, and who keeps that mm alive
//! meanwhile. The seam for a choice that Linux debates.
//!
//! A CPU that idles, or runs a thread of the kernel, *borrows* the mm of the program that ran there last, so that it need
//! not load CR3 to come back. Where it counts a reference for that, all CPUs of a process with many threads write one word
//! whenever they go idle; where it does not, whoever frees the mm must make those CPUs let go of it, and know which they are.
//!
//! The one implementation is the form that was merged, and that x86 uses (Linux 6.4, 2655421ae69f:
//! MMU_LAZY_TLB_REFCOUNT): references are counted. What a CPU has borrowed is what it has loaded, and nothing else says so:
//! there is no `active_mm`, so it cannot disagree with `loaded_mm`. A CPU has one reference to what it has loaded, from
//! before it loads it until it has loaded something else, lazy or not; going lazy and coming back count nothing. Each of
//! the methods below decides one thing, and other forms replace these:
//!
//! | when | method | here | other forms |
//! |---|---|---|---|
//! | an mm is to be loaded | `borrow_mm` | a reference is taken | none is (shootdown, nolazy, hazard pointers) |
//! | something else is loaded | `give_back_mm` | it is given up | only a full barrier (shootdown); what the last user has left here is given up (hazard pointers) |
//! | user code ends: idle, thread of the kernel, exit | `enter_lazy` | the mm stays loaded | the kernel's tables are loaded (nolazy); the mm is made known (hazard pointers) |
//! | user code comes back to it | `leave_lazy` | what was missed is flushed | never happens (nolazy) |
//! | a flush chooses its CPUs | `passes_by_lazy` | lazy ones only if tables go | all of them |
//! | the IPI of a flush comes | `on_flush_ipi` | flushed as elsewhere, the mm stays | a lazy CPU loads the kernel's tables (x86) |
//! | the last user has gone | `at_last_put` | what CPUs have borrowed outlives it | an IPI: lazy CPUs let go (IPI at the last put); who has made it known gets a reference (hazard pointers) |
//! | the last reference has gone | `at_last_drop` | it is freed, and nobody asked | an IPI to the cpumask: lazy CPUs let go, then it is freed (shootdown, of powerpc) |
//!
//! A CPU that goes off lets go first (`Kernel::retire`): it loads the kernel's tables, and only then clears its bit in
//! the cpumask.
//!
//! The pair that makes a flush miss no lazy CPU: a *flusher* raises `tlb_gen`, then reads `lazy`; a CPU that *leaves lazy
//! mode* clears `lazy`, full barrier, then reads `tlb_gen` ([`shootdown`]). It gets the IPI or sees that it is behind. One that goes from
//! lazy mode to another mm leaves its slot behind, and flushes it when it comes back.
//!
//! What must hold, whatever the form, and which rule says so (docs/seams.md has all): `count` is what is held (L-13); no
//! CPU has a freed level-4 table in CR3 (L-01, T-03), loads an mm that nobody counts (O-06), or has one loaded outside its cpumask
//! (L-03, T-08); what is loaded, noted and run agree (L-02, L-05); no count rises from 0 (O-04); nobody is ahead of
//! `tlb_gen` or comes back behind it (L-04, T-07); tables go only when lazy CPUs have flushed too (T-03).

use core::sync::atomic::Ordering::SeqCst;

use abi::bug::Bug;
use abi::channel::EventKind;
use abi::objects::{Mm, Pa};
use abi::point::Point;

use super::tlb::Flush;
use super::{Field, FreedTables};
use crate::Kernel;
use crate::arch::Arch;
use crate::sync::shootdown;
use crate::testbed::told;

impl<A: Arch> Kernel<A> {
    /// This CPU is about to load `mm`.
    pub(super) fn borrow_mm(&self, mm: Pa<Mm>) {
        self.mm_grab(mm);
    }

    /// This CPU has loaded something else than `mm`, and is in its cpumask no more.
    pub(super) fn give_back_mm(&self, mm: Pa<Mm>) {
        self.mm_drop(mm);
    }

    /// This CPU runs no user code from now on and keeps what it has loaded.
    pub fn enter_lazy(&self) {
        let cpu = self.this_cpu();
        if !cpu.loaded_mm.get().is_null() {
            let mm = told(|| self.obj(cpu.loaded_mm.get()).id.get());
            // Before the fact: from the store on a flusher may pass this CPU by.
            event!(self, EventKind::LazyEnter, [mm, 0, 0, 0, 0]);
            shootdown::enter_lazy(&cpu.lazy);
            point!(self, Point::LazyEnter, [mm, 0]);
        }
    }

    /// Back to user code on the mm that this CPU kept loaded, if it was lazy.
    pub(super) fn leave_lazy(&self, mm: Pa<Mm>) {
        let (cpu, space) = (self.this_cpu(), self.obj(mm));
        if cpu.lazy.get() == 0 {
            return;
        }
        let loaded = cpu.loaded_asid();
        point!(
            self,
            Point::LazyLeave,
            [space.id.get(), loaded.tlb_gen.get()]
        );
        // With the full barrier of the module's pair, which membarrier relies on, too.
        shootdown::leave_lazy(&cpu.lazy);
        let latest = space.tlb_gen.load(SeqCst);
        if loaded.tlb_gen.get() < latest && !self.config.bugs.has(Bug::LazyReuseNoFlush) {
            self.flush_everything_here(space);
            loaded.tlb_gen.set(latest);
        }
        event!(
            self,
            EventKind::LazyLeave,
            [space.id.get(), latest, 0, 0, 0]
        );
    }

    /// True for a flush that lazy CPUs may catch up on when they leave lazy mode. They run no user code, but they may walk
    /// tables speculatively, so not for one that frees some (Linux 2ff6ddf19c0e, CVE-2025-22045).
    pub(super) fn passes_by_lazy(&self, freed: FreedTables) -> bool {
        freed == FreedTables::No || self.config.bugs.has(Bug::FreedTablesSkipLazy)
    }

    /// The IPI of `flush` has come, to a CPU that is lazy or not: it flushes, and keeps the mm.
    pub(super) fn on_flush_ipi(&self, flush: Flush) {
        self.flush_here(flush);
    }

    /// The last user of `mm` has torn its mappings down. CPUs that have it loaded keep the rest.
    pub(super) fn at_last_put(&self, mm: Pa<Mm>) {
        self.mm_drop(mm);
    }

    /// Nobody refers to `mm` any more. No flush and no IPI: every CPU that had it loaded held a reference and has loaded
    /// something else since. A reader may have found it on the list of mms.
    pub(super) fn at_last_drop(&self, mm: Pa<Mm>) {
        self.rcu_retire(self.obj(mm).pgd.get());
        self.rcu_poll();
    }
}
