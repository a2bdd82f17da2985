//! Quiescent states and grace periods: the part of RCU that is arithmetic on one word per CPU
//! ([`abi::objects::CpuRcu::watching`]), which only its own CPU writes.
//!
//! The word is odd while its CPU may be inside a read section. A grace period looks at every CPU's word once
//! ([`look`]); who is odd holds it up until the word is another one ([`holds_up`]). Whatever sections were open at
//! its start have then ended, for a CPU makes its word even only outside of them.
//!
//! Ordering (Linux's Documentation/RCU/Design/Memory-Ordering; kernel/context_tracking.c, whose
//! `ct_state_inc` is both of these in one locked instruction):
//! - *End of a section to what is freed*: every change of the word is a store with Release, and [`look`] and
//!   [`holds_up`] load with Acquire. Who sees the new value comes after every read that the CPU made before.
//!   Release at both changes: with a plain store on the way in, a grace period that sees only that one would have
//!   no edge from the store before it.
//! - *What was unlinked to a section that is not waited for*: [`enter`] stores, full fence, and the section reads
//!   links; the updater writes links, full fence ([`begin`]), and [`look`]s. This is the store-buffering pattern:
//!   one of the two sees the other's store, so where the updater sees an old, even value the section sees the
//!   link as it is now. Without either fence a CPU comes into the kernel unseen and finds what is about to be freed.
//! - Inside a section nothing is ordered by RCU: links are stored with Release when something is published and
//!   loaded with Acquire (Linux's `rcu_assign_pointer` and `rcu_dereference`).
//!
//! [`leave`] needs no fence after its store: outside, a CPU reads nothing that RCU protects.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

use abi::objects::CpuRcu;

use super::Word;

/// The CPU comes back from a quiescent state, if it is in one.
#[inline]
pub fn enter<W: Word>(watching: &W) {
    let now = watching.load(Relaxed);
    if now.is_multiple_of(2) {
        watching.store(now + 1, Release);
        W::fence(SeqCst);
    }
}

/// The CPU begins a quiescent state, if it is not in one. It is in no section. Returns whether it was watching.
#[inline]
pub fn leave<W: Word>(watching: &W) -> bool {
    let now = watching.load(Relaxed);
    let was = now % 2 == 1;
    if was {
        watching.store(now + 1, Release);
    }
    was
}

/// A quiescent state of a moment.
#[inline]
pub fn pass<W: Word>(watching: &W) {
    if leave(watching) {
        enter(watching);
    }
}

/// What a grace period is for has been unlinked: comes before the first [`look`].
#[inline]
pub fn begin<W: Word>() {
    W::fence(SeqCst);
}

/// The word at the start of a grace period.
#[inline]
pub fn look<W: Word>(watching: &W) -> u64 {
    watching.load(Acquire)
}

/// True where the CPU may still be in a section that was open when its word was `seen`.
#[inline]
pub fn holds_up<W: Word>(watching: &W, seen: u64) -> bool {
    CpuRcu::holds_up(seen, watching.load(Acquire))
}
