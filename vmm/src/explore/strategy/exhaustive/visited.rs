//! Prefixes that were explored, by their fingerprints.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustc_hash::FxHashMap;

/// From where something was explored: what decides, besides the state, what can be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Visit {
    /// The vCPU that ran last, and whether it could go on.
    pub(super) last: Option<(u8, bool)>,
    /// Preemptions left.
    pub(super) left: u32,
    /// vCPUs that could run in this state, but do not have their turn: they have just waited for anyone.
    pub(super) held: u16,
    /// Whose turn it is where nobody gets anywhere ([`Turns::print`](super::turns::Turns::print)).
    pub(super) turns: u32,
    /// An IPI is on its way.
    pub(super) wires: bool,
}

impl Visit {
    /// True where whatever can be done from `other` could be done from here.
    pub(super) fn covers(&self, other: &Self) -> bool {
        if self.held & !other.held != 0 || self.turns != other.turns {
            return false;
        }
        let vcpu = |last: Option<(u8, bool)>| last.map(|(vcpu, _)| vcpu);
        let could_go_on = |last: Option<(u8, bool)>| last.is_some_and(|(_, could)| could);
        let more = if vcpu(self.last) == vcpu(other.last) {
            // To leave or to interrupt it is free where it is held, though it could go on in this state.
            u32::from(could_go_on(self.last) && !could_go_on(other.last))
        } else {
            // Whoever is to run next can, for one preemption where the last one could go on. An IPI that is
            // to arrive before that may interrupt the last one, or let it go on. From then on the same vCPU
            // ran last in both.
            u32::from(could_go_on(self.last)) + u32::from(self.wires)
        };
        self.left >= other.left.saturating_add(more)
    }
}

/// Locks among which the prefixes are spread.
const SHARDS: usize = 64;
/// From one visit of a prefix to the next: any odd number that no sum of hashes is likely to differ by.
const STRIDE: u64 = 0x9e37_79b9_7f4a_7c15;

/// All visits of a search.
#[derive(Debug)]
pub(super) struct Visited {
    shards: Vec<Mutex<FxHashMap<u64, Visit>>>,
    kept: AtomicUsize,
    most: usize,
}

impl Visited {
    /// None; keeps `most`.
    pub(super) fn new(most: usize) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            kept: AtomicUsize::new(0),
            most,
        }
    }

    /// Forgets all.
    pub(super) fn clear(&self) {
        for shard in &self.shards {
            *shard.lock().expect("no job panics") = FxHashMap::default();
        }
        self.kept.store(0, Ordering::Relaxed);
    }

    /// True where something as good was visited.
    pub(super) fn covers(&self, fingerprint: u64, visit: &Visit) -> bool {
        let shard = self.shard(fingerprint).lock().expect("no job panics");
        visits(&shard, fingerprint).any(|(_, known)| known.covers(visit))
    }

    /// Notes the visit. False: something as good was visited before.
    pub(super) fn insert(&self, fingerprint: u64, visit: Visit) -> bool {
        let mut shard = self.shard(fingerprint).lock().expect("no job panics");
        let mut place = fingerprint;
        for (key, known) in visits(&shard, fingerprint) {
            if known.covers(&visit) {
                return false;
            }
            // It takes the place of one that it covers.
            place = key;
            if visit.covers(&known) {
                break;
            }
            place = key.wrapping_add(STRIDE);
        }
        if self.kept.load(Ordering::Relaxed) < self.most && shard.insert(place, visit).is_none() {
            self.kept.fetch_add(1, Ordering::Relaxed);
        }
        true
    }

    fn shard(&self, fingerprint: u64) -> &Mutex<FxHashMap<u64, Visit>> {
        &self.shards[(fingerprint >> 58) as usize % SHARDS]
    }
}

/// The visits of one prefix: they lie one stride apart.
fn visits(
    shard: &FxHashMap<u64, Visit>,
    fingerprint: u64,
) -> impl Iterator<Item = (u64, Visit)> + '_ {
    let keys = (0u64..).map(move |n| fingerprint.wrapping_add(n.wrapping_mul(STRIDE)));
    keys.map_while(|key| Some((key, *shard.get(&key)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VISIT: Visit = Visit {
        last: Some((0, true)),
        left: 2,
        held: 0,
        turns: 0,
        wires: false,
    };

    #[test]
    fn only_more_freedom_covers() {
        let less = |change: fn(&mut Visit)| {
            let mut visit = VISIT;
            change(&mut visit);
            visit
        };
        let cases = [
            (less(|v| v.left = 1), true, false),
            (less(|v| v.held = 2), true, false),
            // Others have their turn there.
            (less(|v| v.turns = 3), false, false),
            // To leave it costs nothing there, for it is held.
            (
                less(|v| (v.last, v.held) = (Some((0, false)), 1)),
                false,
                false,
            ),
            (
                less(|v| (v.last, v.held, v.left) = (Some((0, false)), 1, 1)),
                true,
                false,
            ),
            // Another vCPU ran last: one more preemption makes up for it.
            (less(|v| v.last = Some((1, true))), false, false),
            (
                less(|v| (v.last, v.left) = (Some((1, true)), 1)),
                true,
                false,
            ),
            (less(|v| v.last = Some((1, false))), false, true),
            // What arrives there lets the one go on that did not, and then costs one to leave; and it may
            // interrupt the one that did, and that costs one more.
            (
                less(|v| (v.last, v.wires) = (Some((1, false)), true)),
                false,
                false,
            ),
            (
                less(|v| (v.last, v.wires, v.left) = (Some((1, true)), true, 3)),
                false,
                false,
            ),
            (
                less(|v| (v.last, v.wires, v.left) = (Some((1, true)), true, 4)),
                false,
                true,
            ),
        ];
        for (other, covers, covered) in cases {
            assert_eq!(VISIT.covers(&other), covers, "{other:?}");
            assert_eq!(other.covers(&VISIT), covered, "{other:?}");
        }
        assert!(VISIT.covers(&VISIT));
    }

    #[test]
    fn visits_are_kept_side_by_side_up_to_the_bound() {
        let visited = Visited::new(2);
        let other = Visit {
            last: Some((1, true)),
            ..VISIT
        };
        assert!(visited.insert(7, VISIT) && visited.insert(7, other));
        assert!(!visited.insert(7, VISIT) && !visited.insert(7, other));
        assert!(!visited.covers(8, &VISIT));
        let third = Visit { left: 9, ..VISIT };
        assert!(
            visited.insert(8, third) && visited.insert(8, third),
            "no room"
        );
        assert!(visited.insert(7, third), "takes the place of the first");
        visited.clear();
        assert!(visited.insert(8, third) && !visited.insert(8, third));
    }
}
