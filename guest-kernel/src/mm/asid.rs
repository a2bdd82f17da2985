//! Which PCID a CPU gives an mm, and whether what it has cached under it is still good: the one place that
//! knows more than the loaded one (Linux's `choose_new_asid`, arch/x86/mm/tlb.c).
//!
//! A CPU has a few slots ([`abi::objects::Asid`]), each with a PCID: which mm it holds translations of, by a number that
//! no other mm ever gets, and up to which `tlb_gen` they are flushed. So an mm that dies needs no flush of
//! them: its number is asked for by nobody, and a slot is flushed when it is given to another mm. Slots are the
//! CPU's own: others never read them. Slot `i` has PCID `i + 1`; PCID 0 is the kernel's own tables.
//!
//! No flush names a PCID that is not loaded: a slot that is not loaded is behind in `tlb_gen`, and flushed when it
//! is loaded. Linux needs INVPCID or its `invalidate_other` for the second, user half of page-table isolation,
//! and for changes of kernel mappings; this kernel has neither, so INVLPG and MOV to CR3 do.

use abi::bug::Bug;
use abi::channel::cr3;
use abi::param::{Config, Pcid, TlbBackEnd};

use super::Field;
use crate::Kernel;
use crate::arch::Arch;

/// With what PCID an mm is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) pcid: u64,
    cached: Cached,
}

/// What becomes of what is cached under the PCID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cached {
    /// All of it is the mm's and of now: it stays.
    Kept,
    /// It is flushed.
    Flushed,
}

impl Choice {
    /// The kernel's own tables, and every mm without PCIDs.
    pub(super) const NONE: Self = Self {
        pcid: 0,
        cached: Cached::Flushed,
    };

    /// True where nothing that is cached under the PCID outlives the load.
    pub(super) fn flushes(self) -> bool {
        self.cached == Cached::Flushed
    }

    /// The operand of MOV to CR3 for the level-4 table at `pgd`.
    pub(super) fn operand(self, pgd: u64) -> u64 {
        match self.cached {
            Cached::Kept => pgd | self.pcid | cr3::NO_FLUSH,
            Cached::Flushed => pgd | self.pcid,
        }
    }
}

/// `pcid` of a machine: never `Auto`. None where it is asked for and cannot be had.
///
/// The soft TLB has PCIDs wherever it runs. `Auto` leaves it without: what it holds decides what a program sees,
/// which must be the same on every host for a schedule to be.
pub(super) fn resolve(config: &Config, cpu_has_pcid: impl FnOnce() -> bool) -> Option<Pcid> {
    match (config.pcid, config.tlb) {
        (Pcid::Off, _) | (Pcid::Auto, TlbBackEnd::Soft | TlbBackEnd::Both) => Some(Pcid::Off),
        (Pcid::On, TlbBackEnd::Soft) => Some(Pcid::On),
        (Pcid::Auto, TlbBackEnd::Hw) => Some(if cpu_has_pcid() { Pcid::On } else { Pcid::Off }),
        (Pcid::On, TlbBackEnd::Hw | TlbBackEnd::Both) => cpu_has_pcid().then_some(Pcid::On),
    }
}

impl<A: Arch> Kernel<A> {
    /// True where translations are told apart by PCID.
    #[inline]
    pub(super) fn has_pcids(&self) -> bool {
        self.config.pcid == Pcid::On
    }

    /// True where the processor's are: the operand of MOV to CR3 has PCIDs. With `tlb=soft` the soft TLB has
    /// them, and the processor, which may have none, flushes at every load.
    #[inline]
    pub fn cpu_uses_pcids(&self) -> bool {
        self.has_pcids() && self.config.tlb != TlbBackEnd::Soft
    }

    /// The slot for mm `id`, whose `tlb_gen` this CPU has read after it is in the mm's cpumask: what it has
    /// cached there is kept where it is this mm's and flushed up to that. Else the oldest slot is given to it.
    pub(super) fn choose_asid(&self, id: u64, tlb_gen: u64) -> Choice {
        if !self.has_pcids() {
            return Choice::NONE;
        }
        let cpu = self.this_cpu();
        let bugs = self.config.bugs;
        let slots = self.config.asids;
        let known = (0..slots).find(|&slot| cpu.asids[slot as usize].mm.get() == id);
        let (slot, is_good) = if let Some(slot) = known {
            let is_behind = cpu.asids[slot as usize].tlb_gen.get() < tlb_gen;
            (slot, !is_behind || bugs.has(Bug::PcidSkipStaleGen))
        } else {
            let slot = cpu.next_asid.get() % slots;
            cpu.next_asid.set(slot + 1);
            (slot, bugs.has(Bug::PcidReuseNoFlush))
        };
        Choice {
            pcid: slot + 1,
            cached: if is_good {
                Cached::Kept
            } else {
                Cached::Flushed
            },
        }
    }

    /// Notes that mm `id` is loaded as chosen for `tlb_gen`.
    pub(super) fn take_asid(&self, choice: Choice, id: u64, tlb_gen: u64) {
        let cpu = self.this_cpu();
        cpu.pcid.set(choice.pcid);
        let slot = cpu.loaded_asid();
        if choice.flushes() || slot.mm.get() != id {
            slot.mm.set(id);
            slot.tlb_gen.set(tlb_gen);
        }
    }
}
