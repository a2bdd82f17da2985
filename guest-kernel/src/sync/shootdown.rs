//! The words of a shootdown: who is asked to do something at once, who has done it, and who need not be asked.
//!
//! Whoever asks has a word with a bit for each CPU that it asks ([`ask`]). Those find their bit ([`is_asked`]), do what is asked for
//! and take it out ([`answer`]); whoever asks waits until no bit is left ([`unanswered`]). A CPU that runs no user code
//! says so in a word of its own ([`enter_lazy`]) and is not asked: it looks for itself before it runs user code again
//! ([`leave_lazy`]). A flush of entries is one use of this; the other is membarrier, where nothing is asked for but to answer.
//!
//! Ordering:
//! - *What the asker did to who answers*: [`ask`] stores with Release, [`is_asked`] loads with Acquire.
//! - *What others did to the asker*: [`answer`] is a Release, [`unanswered`] an Acquire: what a CPU did before it answered
//!   comes before what the asker does next. The same for a CPU that is lazy by now: [`enter_lazy`] and [`is_lazy`].
//! - *Who is not asked*: the asker stores (an entry and its number, or whatever a program did before membarrier), full fence,
//!   [`is_lazy`]; a CPU that leaves lazy mode stores its word, full fence ([`leave_lazy`]), and looks at what the asker has
//!   stored. This is the store-buffering pattern: the asker sees that the CPU is not lazy any more, or the CPU sees the asker's
//!   stores.

use core::sync::atomic::Ordering::{Acquire, Release, SeqCst};

use super::Word;

/// Asks the CPUs of `targets`; what it is about lies beside the word.
#[inline]
pub fn ask<W: Word>(pending: &W, targets: u64) {
    pending.store(targets, Release);
}

/// True where the CPU whose bit is `me` is asked.
#[inline]
pub fn is_asked<W: Word>(pending: &W, me: u64) -> bool {
    pending.load(Acquire) & me != 0
}

/// The CPU whose bit is `me` has done what it was asked for; it does not look at the request again.
#[inline]
pub fn answer<W: Word>(pending: &W, me: u64) {
    pending.fetch_and(!me, Release);
}

/// The CPUs that have not answered yet.
#[inline]
pub fn unanswered<W: Word>(pending: &W) -> u64 {
    pending.load(Acquire)
}

/// This CPU's user code is over: it need not be asked from here on.
#[inline]
pub fn enter_lazy<W: Word>(lazy: &W) {
    lazy.store(1, Release);
}

/// User code follows: this CPU is to be asked again, and looks itself at what it was not asked.
#[inline]
pub fn leave_lazy<W: Word>(lazy: &W) {
    lazy.store(0, SeqCst);
    W::fence(SeqCst);
}

/// True where the CPU need not be asked. After the asker's full fence.
#[inline]
pub fn is_lazy<W: Word>(lazy: &W) -> bool {
    lazy.load(SeqCst) != 0
}
