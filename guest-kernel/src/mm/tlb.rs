//! Address spaces on CPUs: loading them, and shootdown. What a CPU does with an mm that it does not run is in `lazy`.
//!
//! Every flush of an mm has a number: `mm.tlb_gen` counts them, the slot of what a CPU has loaded says up to
//! which one it has flushed (Linux's arch/x86/mm/tlb.c). The pairs that make a flush miss nobody:
//!
//! - *flusher* changes entries, then raises `tlb_gen`, then reads `cpumask`;
//!   *switcher* sets its bit in `cpumask`, then reads `tlb_gen`, then loads CR3. Both middles are full
//!   barriers (locked instructions, SeqCst), so either the flusher sees the bit and sends an IPI, which
//!   the switcher takes after it has finished because interrupts are off meanwhile, or the switcher
//!   reads the new `tlb_gen` and loads CR3 after the entries changed (CVE-2016-2069; Linux 71b3c126e611).
//!   A load that flushes would need no more than that it comes after the change. With PCIDs one that is to
//!   keep what the CPU has cached of the mm (`asid`) needs the number: it keeps only what is flushed up to
//!   what was read, so the bit has to come before the read and not just before the load.
//!   The flusher never asks which mm a CPU has loaded: that field is the switcher's own (Linux
//!   fea4e317f9e7, 83b0177a6c48).
//! - *leaver* loads another CR3, then clears its bit; *flusher* as above. A flusher that sees no bit may free what
//!   the CPU has used. What the CPU keeps under the mm's PCID is out of reach until it comes back as a
//!   *switcher*: it then sets the bit after the flusher has read the mask, and so reads a `tlb_gen` that the
//!   flusher has raised before. A processor follows no pointer of a PCID that is not loaded either (SDM
//!   vol. 3A, 5.10.1), so tables may be freed as leaves are.
//!
//! A flusher may hold locks, page-table locks included: the CPUs it waits for take IPIs while they
//! spin, and the handler takes no lock.

use core::sync::atomic::Ordering::{Acquire, Release, SeqCst};

use abi::bug::Bug;
use abi::channel::EventKind;
use abi::layout::{HUGE_PAGE_SIZE, PAGE_SIZE};
use abi::objects::{Mm, Pa};
use abi::point::Point;

use super::Field;
use super::asid::Choice;
use super::changed::Changed;
use crate::Kernel;
use crate::arch::{Arch, CpuMask, Ipi};
use crate::sync::shootdown;
use crate::testbed::told;

/// Whether page-table pages are freed after a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreedTables {
    /// Only leaf entries changed.
    No,
    /// Lazy CPUs must flush too.
    Yes,
}

/// One flush: what a CPU has to do to be at `tlb_gen`.
#[derive(Clone, Copy)]
pub(super) struct Flush {
    mm: Pa<Mm>,
    changed: Changed,
    tlb_gen: u64,
}

impl<A: Arch> Kernel<A> {
    /// Makes every CPU forget its translations of `start..end` in `mm` that were made before the call;
    /// when it returns, none uses them. The caller has changed the entries.
    pub fn flush_range(&self, mm: Pa<Mm>, start: u64, end: u64, freed: FreedTables) {
        self.flush_changed(mm, Changed::pages(start, end), freed);
    }

    /// As [`Kernel::flush_range`], of entries of whatever level.
    pub(super) fn flush_changed(&self, mm: Pa<Mm>, changed: Changed, freed: FreedTables) {
        let flush = self.flush_issue(mm, changed);
        let cpus = self.obj(mm).cpumask.load(SeqCst);
        self.flush_on(cpus, flush, freed);
    }

    /// As [`Kernel::flush_range`], for everything that `mm` maps.
    pub fn flush_mm(&self, mm: Pa<Mm>, freed: FreedTables) {
        self.flush_changed(mm, Changed::EVERYTHING, freed);
    }

    /// A full memory barrier on every CPU that runs user code, whatever its process: a flush of nothing in `mm`.
    pub(super) fn barrier_everywhere(&self, mm: Pa<Mm>) {
        let flush = self.flush_issue(mm, Changed::pages(0, 0));
        let cpus = self.root().online.load(SeqCst);
        self.flush_on(cpus, flush, FreedTables::No);
    }

    /// Has this CPU flush, and those of `cpus` that are not passed by.
    fn flush_on(&self, cpus: CpuMask, flush: Flush, freed: FreedTables) {
        let targets = self.flush_targets(cpus, flush.mm, freed);
        if targets != 0 {
            self.flush_dispatch(flush, targets);
        }
        self.flush_here(flush);
        if targets != 0 {
            self.flush_sync(flush, targets);
        }
    }

    /// The flush of munmap, mprotect and madvise: as [`Kernel::flush_range`], but for the seeded
    /// bugs that forget the other CPUs or the last page.
    pub(super) fn flush_change(&self, mm: Pa<Mm>, mut changed: Changed, freed: FreedTables) {
        let bugs = self.config.bugs;
        if bugs.has(Bug::FlushRangeShort) && changed != Changed::EVERYTHING {
            changed.end -= PAGE_SIZE;
        }
        if bugs.has(Bug::FlushWrongLevel) {
            changed.stride = HUGE_PAGE_SIZE;
        }
        if self.config.bugs.has(Bug::ShootdownSkipRemote) {
            let flush = self.flush_issue(mm, changed);
            self.flush_here(flush);
        } else {
            self.flush_changed(mm, changed, freed);
        }
    }

    /// Serves the flush requests that name this CPU. The back end calls it when it takes
    /// [`Ipi::Shootdown`]; a late or doubled IPI finds nothing to do.
    pub fn handle_shootdown(&self) {
        let vector = u64::from(Ipi::Shootdown as u8);
        event!(self, EventKind::IpiReceive, [vector, 0, 0, 0, 0]);
        point!(self, Point::IpiReceive, [vector, 0]);
        let root = self.root();
        let me = 1 << self.arch.cpu();
        for from in 0..root.nr_cpus.get() {
            let request = &root.cpus[from as usize].flush;
            if !shootdown::is_asked(&request.pending, me) {
                continue;
            }
            self.on_flush_ipi(Flush {
                mm: request.mm.get(),
                changed: Changed {
                    start: request.start.get(),
                    end: request.end.get(),
                    stride: request.stride.get(),
                },
                tlb_gen: request.tlb_gen.get(),
            });
            event!(self, EventKind::IpiAck, [from, 0, 0, 0, 0]);
            // Whoever sees the bit gone may reuse what this CPU has just stopped using.
            shootdown::answer(&request.pending, me);
            point!(self, Point::IpiAck, [from, 0]);
        }
    }

    /// Numbers a flush. SeqCst is the full barrier between the changed entries and the reads of
    /// `cpumask` and `lazy` that follow.
    fn flush_issue(&self, mm: Pa<Mm>, changed: Changed) -> Flush {
        point!(
            self,
            Point::FlushIssue,
            [self.obj(mm).id.get(), changed.start]
        );
        let counter = &self.obj(mm).tlb_gen;
        let tlb_gen = if self.config.bugs.has(Bug::TlbGenPlainAdd) {
            let next = counter.load(SeqCst) + 1;
            counter.store(next, SeqCst);
            next
        } else {
            counter.fetch_add(1, SeqCst) + 1
        };
        event!(
            self,
            EventKind::TlbGen,
            [self.obj(mm).id.get(), tlb_gen, 0, 0, 0]
        );
        Flush {
            mm,
            changed,
            tlb_gen,
        }
    }

    fn flush_targets(&self, cpus: CpuMask, mm: Pa<Mm>, freed: FreedTables) -> CpuMask {
        let mut targets = cpus & !(1 << self.arch.cpu());
        let skip_lazy = self.passes_by_lazy(freed);
        let skip_switching = self.config.bugs.has(Bug::FlushSkipSwitching);
        if skip_lazy || skip_switching {
            let mut rest = targets;
            while rest != 0 {
                let cpu = rest.trailing_zeros();
                rest &= rest - 1;
                let state = &self.root().cpus[cpu as usize];
                if skip_lazy && shootdown::is_lazy(&state.lazy)
                    || skip_switching && state.loaded_mm.load(SeqCst) != mm
                {
                    targets &= !(1 << cpu);
                }
            }
        }
        targets
    }

    fn flush_dispatch(&self, flush: Flush, targets: CpuMask) {
        let id = told(|| self.obj(flush.mm).id.get());
        event!(
            self,
            EventKind::ShootdownBegin,
            [id, flush.changed.start, flush.changed.end, targets, 0],
        );
        let request = &self.this_cpu().flush;
        request.mm.set(flush.mm);
        request.start.set(flush.changed.start);
        request.end.set(flush.changed.end);
        request.stride.set(flush.changed.stride);
        request.tlb_gen.set(flush.tlb_gen);
        shootdown::ask(&request.pending, targets);
        self.send_ipi(targets, Ipi::Shootdown);
        point!(self, Point::FlushDispatch, [id, targets]);
    }

    /// Sends `ipi` to each CPU of `targets`, which is not empty.
    pub(crate) fn send_ipi(&self, targets: CpuMask, ipi: Ipi) {
        let vector = u64::from(ipi as u8);
        point!(self, Point::IpiSend, [vector, targets]);
        event!(self, EventKind::IpiSend, [vector, targets, 0, 0, 0]);
        self.arch.send_ipi(targets, ipi);
    }

    fn flush_sync(&self, flush: Flush, targets: CpuMask) {
        let id = told(|| self.obj(flush.mm).id.get());
        let pending = &self.this_cpu().flush.pending;
        loop {
            // Where it is 0, the frames and tables that are freed next are no longer in use there.
            let left = shootdown::unanswered(pending);
            if left == 0 {
                break;
            }
            self.spin(Point::FlushWait, [self.lock_id(pending), left]);
        }
        event!(self, EventKind::ShootdownEnd, [id, targets, 0, 0, 0]);
        point!(self, Point::FlushSync, [id, targets]);
    }

    /// Brings this CPU up to `flush`, if it has that mm loaded.
    pub(super) fn flush_here(&self, flush: Flush) {
        let cpu = self.this_cpu();
        if cpu.loaded_mm.get() != flush.mm {
            // It has left that mm since: CR3 was loaded with a flush, or the mm's slot is behind until it is
            // loaded again.
            return;
        }
        let (loaded, mm) = (cpu.loaded_asid(), self.obj(flush.mm));
        let have = loaded.tlb_gen.get();
        // Read before flushing: a flush covers the changes that were numbered before it began.
        let latest = mm.tlb_gen.load(Acquire);
        if have >= flush.tlb_gen {
            return; // A full flush has covered this one.
        }
        // The range alone is enough only if nothing else is outstanding (Linux's flush_tlb_func).
        let next_in_line = have + 1 == flush.tlb_gen && flush.tlb_gen == latest;
        let Changed { start, end, stride } = flush.changed;
        if next_in_line && flush.changed.len() <= self.config.flush_ceiling {
            if stride == PAGE_SIZE {
                self.flush_pages_here(mm, start, end);
            } else {
                let mut gva = start;
                while gva < end {
                    self.flush_pages_here(mm, gva, gva + PAGE_SIZE);
                    gva += stride;
                }
            }
            loaded.tlb_gen.set(flush.tlb_gen);
        } else {
            self.flush_everything_here(mm);
            loaded.tlb_gen.set(latest);
        }
    }

    fn flush_pages_here(&self, mm: &Mm, start: u64, end: u64) {
        let mut gva = start;
        while gva < end {
            self.arch.flush_page(gva);
            gva += PAGE_SIZE;
        }
        #[cfg(feature = "testbed")]
        self.soft_flush_range(start, end);
        // After the fact: the host's TLB model forgets what the event covers.
        event!(self, EventKind::FlushLocal, [mm.id.get(), start, end, 0, 0]);
    }

    pub(super) fn flush_everything_here(&self, mm: &Mm) {
        self.arch.flush_all();
        #[cfg(feature = "testbed")]
        self.soft_flush_all(self.this_cpu().pcid.get());
        event!(self, EventKind::FlushAll, [mm.id.get(), 0, 0, 0, 0]);
    }
}

/// Which address space this CPU has loaded.
impl<A: Arch> Kernel<A> {
    /// Loads `next` on this CPU for user code.
    pub fn switch_mm(&self, next: Pa<Mm>) {
        let cpu = self.this_cpu();
        let prev = cpu.loaded_mm.get();
        if prev == next {
            return self.leave_lazy(next);
        }
        self.borrow_mm(next);
        let (space, bit) = (self.obj(next), 1 << self.arch.cpu());
        let lazy_late = self.config.bugs.has(Bug::SwitchClearsLazyLate);
        if !lazy_late {
            // SeqCst, before it is in the cpumask: a flusher that finds it there must not pass it by as lazy.
            cpu.lazy.store(0, SeqCst);
        }
        let late = self.config.bugs.has(Bug::Cr3BeforeCpumask);
        if !late {
            self.join_cpumask(space, bit);
        }
        let (id, tlb_gen) = (space.id.get(), space.tlb_gen.load(SeqCst));
        let choice = self.choose_asid(id, tlb_gen);
        self.load_pgd(space.pgd.get(), id, choice);
        point!(self, Point::SwitchMm, [id, tlb_gen]);
        if late {
            self.join_cpumask(space, bit);
        }
        cpu.loaded_mm.set(next);
        self.take_asid(choice, id, tlb_gen);
        if lazy_late {
            cpu.lazy.store(0, SeqCst);
        }
        self.forget_mm(prev, bit);
    }

    /// Leaves the loaded mm for the kernel's own tables.
    pub fn leave_mm(&self) {
        let cpu = self.this_cpu();
        let prev = cpu.loaded_mm.get();
        if prev.is_null() {
            return;
        }
        self.load_pgd(self.root().pgd.get(), 0, Choice::NONE);
        cpu.loaded_mm.set(Pa::NULL);
        cpu.pcid.set(0);
        cpu.lazy.store(0, SeqCst);
        self.forget_mm(prev, 1 << self.arch.cpu());
    }

    /// SeqCst, before `tlb_gen` is read and before CR3: see the module's first pair.
    fn join_cpumask(&self, space: &Mm, bit: CpuMask) {
        space.cpumask.fetch_or(bit, SeqCst);
        event!(self, EventKind::CpumaskSet, [space.id.get(), 0, 0, 0, 0]);
    }

    fn load_pgd(&self, pgd: u64, mm: u64, choice: Choice) {
        point!(self, Point::Cr3Load, [mm, pgd]);
        let operand = choice.operand(pgd);
        self.arch
            .load_root(if self.cpu_uses_pcids() { operand } else { pgd });
        #[cfg(feature = "testbed")]
        if choice.flushes() {
            self.soft_flush_all(choice.pcid);
        }
        event!(self, EventKind::Cr3Load, [operand, mm, 0, 0, 0]);
    }

    /// CR3 is elsewhere: nothing of `prev` that is cached here can be used before it is loaded again.
    fn forget_mm(&self, prev: Pa<Mm>, bit: CpuMask) {
        if !prev.is_null() {
            // Release: a flusher that sees the bit gone relies on the CR3 load before it.
            self.obj(prev).cpumask.fetch_and(!bit, Release);
            event!(
                self,
                EventKind::CpumaskClear,
                [self.obj(prev).id.get(), 0, 0, 0, 0],
            );
            self.give_back_mm(prev);
        }
    }
}
