//! Sleepable RCU: readers that may block, switch and return to user mode inside a section, at the price of a full
//! barrier at each end (Linux's kernel/rcu/srcutree.c, Documentation/RCU/rcu.rst).
//!
//! There are two sets of counters, and `index` says which one new readers use. A grace period waits until the
//! set that is *not* in use is balanced, turns the index, and waits for the other one.
//!
//! Ordering, with Linux's letters:
//! - *B* (reader: counts its entry, full fence, then its reads) with *A* (updater: full fence before it sums the
//!   entries): either the sum has the entry, or the reader sees what the updater did before.
//! - *C* (reader: its reads, then counts its exit with Release) with *A* again (updater: sums the exits, then the full
//!   fence): what the reader read is read before the grace period ends.
//! - Exits are summed before entries, so that an exit is never counted without its entry: a sum that is
//!   equal was balanced at some moment.
//! - *E* (full fence before the index turns) and *D* (after): a reader that still takes the old index had counted
//!   itself there before the second sum, or sees what was done before the grace period. Why two sets are
//!   needed: a reader may load the index long before it counts itself, and must not be missed by the sum of
//!   the set that it then uses; it can miss one turn, not two.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Relaxed, Release, SeqCst};

use super::{Word, spin};

/// A domain: its grace periods wait for its own readers only.
#[derive(Debug)]
pub struct Srcu<const CPUS: usize, W: Word = AtomicU64> {
    /// Its lowest bit is the set that new readers use.
    index: W,
    /// Spin lock word: one grace period at a time.
    updater: W,
    cpus: [Counters<W>; CPUS],
}

/// Entries and exits of one CPU, by set. Only that CPU changes them, and nothing interrupts it there.
#[derive(Debug)]
struct Counters<W> {
    entries: [W; 2],
    exits: [W; 2],
}

/// An open read section; ended by [`Srcu::read_end`].
#[must_use = "a section that is never ended holds up every grace period"]
#[derive(Debug)]
pub struct SrcuSection(usize);

impl<const CPUS: usize, W: Word> Srcu<CPUS, W> {
    /// A domain without readers; `word` makes words that are 0.
    pub fn new(mut word: impl FnMut() -> W) -> Self {
        Self {
            index: word(),
            updater: word(),
            cpus: core::array::from_fn(|_| Counters {
                entries: [word(), word()],
                exits: [word(), word()],
            }),
        }
    }

    /// Begins a read section on `cpu`, the one that this runs on.
    pub fn read_begin(&self, cpu: usize) -> SrcuSection {
        let set = (self.index.load(Relaxed) & 1) as usize;
        count(&self.cpus[cpu].entries[set]);
        W::fence(SeqCst); // B
        SrcuSection(set)
    }

    /// Ends a section, on `cpu`, the one that this runs on now.
    #[allow(clippy::needless_pass_by_value, reason = "it ends once")]
    pub fn read_end(&self, cpu: usize, section: SrcuSection) {
        count(&self.cpus[cpu].exits[section.0]); // C
    }

    /// Waits until every section that is open now has ended; `relax` is called while it waits.
    pub fn synchronize(&self, me: u64, mut relax: impl FnMut()) {
        while spin::try_acquire(&self.updater, me).is_err() {
            relax();
        }
        W::fence(SeqCst);
        let index = self.index.load(Relaxed);
        let set = (index & 1) as usize;
        // Readers that took the other set before it was turned last, and counted themselves late.
        self.drain(1 - set, &mut relax);
        W::fence(SeqCst); // E
        self.index.store(index.wrapping_add(1), Relaxed);
        W::fence(SeqCst); // D
        self.drain(set, &mut relax);
        W::fence(SeqCst);
        spin::release(&self.updater);
    }

    fn drain(&self, set: usize, relax: &mut impl FnMut()) {
        while !self.is_balanced(set) {
            relax();
        }
    }

    fn is_balanced(&self, set: usize) -> bool {
        let sum = |counter: fn(&Counters<W>) -> &[W; 2]| {
            let all = self.cpus.iter().map(|cpu| &counter(cpu)[set]);
            all.fold(0u64, |sum, word| sum.wrapping_add(word.load(Relaxed)))
        };
        let exits = sum(|cpu| &cpu.exits);
        W::fence(SeqCst); // A
        let entries = sum(|cpu| &cpu.entries);
        entries == exits
    }
}

/// Release: see C of the module.
fn count<W: Word>(counter: &W) {
    counter.store(counter.load(Relaxed).wrapping_add(1), Release);
}
