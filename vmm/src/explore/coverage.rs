//! What an exploration has seen: ordered pairs of conflicting events on different vCPUs.
//!
//! A pair is what two events are (kind, lock class, level, …), which vCPUs they happened on, and that the
//! first was the last to touch what the second touched. That new pairs stay away says that more of the
//! same schedules will show little more; it is no proof (Krena et al., *Coverage Metrics for
//! Saturation-Based and Search-Based Testing of Concurrent Software*, RV 2011).

use std::hash::{Hash as _, Hasher as _};

use abi::channel::{Event, EventKind, access};
use rustc_hash::{FxHashSet, FxHasher};

use crate::map::Map;

/// Collects pairs.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    known: FxHashSet<u64>,
    /// Who touched what last, in this execution, by [`key`].
    last: Map<(usize, u64)>,
}

impl Coverage {
    /// Another execution begins.
    pub fn begin(&mut self) {
        self.last.clear();
    }

    /// Takes the next events of an execution, all of `vcpu`, and appends the pairs that were not known to `new`. A pair is
    /// the same number in every collection.
    pub fn take(&mut self, vcpu: usize, events: &[Event], new: &mut Vec<u64>) {
        for event in events {
            let Some((resource, class)) = touched(event) else {
                continue;
            };
            let now = (vcpu, class);
            let (last, _) = self.last.entry(key(resource), now);
            let (other, before) = std::mem::replace(last, now);
            if other != vcpu {
                let mut hash = FxHasher::default();
                (other, before, vcpu, class).hash(&mut hash);
                let pair = hash.finish();
                if self.known.insert(pair) {
                    new.push(pair);
                }
            }
        }
    }

    /// Pairs so far.
    #[must_use]
    pub fn pairs(&self) -> usize {
        self.known.len()
    }
}

/// One word for what is touched: addresses are the same in their upper bits.
fn key((what, address): (u8, u64)) -> u64 {
    address ^ u64::from(what) << 60
}

/// What an event touches, and what it is apart from addresses; none where its order tells nothing.
fn touched(event: &Event) -> Option<((u8, u64), u64)> {
    use EventKind as K;
    let kind = EventKind::from_id(event.kind)?;
    let args = event.args;
    let present = |entry: u64| entry & 1;
    let (resource, role) = match kind {
        K::LockAcquire | K::LockRelease | K::LockWait | K::LockWake => ((0, args[0]), args[1]),
        K::PteChange => {
            let role = args[2] << 2 | present(args[3]) << 1 | present(args[4]);
            ((1, args[1]), role)
        }
        K::VmaFound => ((1, args[2]), 0),
        K::FrameAlloc | K::FrameFree => ((2, args[0]), args[2]),
        K::MapcountChange | K::RefcountChange => ((2, args[0]), args[1].min(2)),
        K::CpumaskSet | K::CpumaskClear | K::TlbGen | K::Cr3Load => {
            let mm = if kind == K::Cr3Load { args[1] } else { args[0] };
            ((3, mm), 0)
        }
        K::LazyEnter | K::LazyLeave | K::FlushAll | K::FlushLocal | K::ShootdownBegin => {
            ((3, args[0]), 0)
        }
        K::Access => ((4, args[0]), args[3] & (access::WRITE | access::FAULT)),
        K::VmaAttach | K::VmaDetach | K::VmaChange => ((5, args[0]), 0),
        _ => return None,
    };
    Some((resource, u64::from(event.kind) << 32 | role))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::stream::Seen;

    fn lock(vcpu: usize, word: u64, kind: EventKind) -> Seen {
        let event = Event {
            kind: kind as u32,
            args: [word, 6, 0, 0, 0],
            ..Event::default()
        };
        Seen { vcpu, event }
    }

    #[test]
    fn a_pair_counts_once_and_by_order_not_by_address() {
        use EventKind::{LockAcquire as A, LockRelease as R};
        let mut coverage = Coverage::default();
        let mut new = Vec::new();
        let mut take = |events: &[Seen], new: &mut Vec<u64>| {
            coverage.begin();
            for seen in events {
                coverage.take(seen.vcpu, &[seen.event], new);
            }
            coverage.pairs()
        };
        take(&[lock(0, 8, A), lock(0, 8, R), lock(1, 8, A)], &mut new);
        assert_eq!(new.len(), 1, "only the two on different vCPUs");
        take(&[lock(0, 16, R), lock(1, 16, A)], &mut new);
        assert_eq!(new.len(), 1, "the same at another address");
        let pairs = take(&[lock(1, 8, R), lock(0, 8, A)], &mut new);
        assert_eq!((new.len(), pairs), (2, 2), "the other order");
        take(&[lock(0, 8, R), lock(1, 16, A)], &mut new);
        assert_eq!(new.len(), 2, "different locks");
    }
}
