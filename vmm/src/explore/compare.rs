//! Are two executions the same? Streams of events, on one engine or on both.

use std::fmt::Write as _;

use abi::channel::{Event, EventKind};
use abi::syscall::nr;
use sha2::{Digest as _, Sha256};

use crate::check::stream::Seen;

/// The event without what belongs to one engine only: addresses of the program's own memory and code. A
/// program keeps its variables in guest memory at CPL 3 and in the host's on the model.
#[must_use]
pub fn masked(seen: &Seen) -> Seen {
    let mut seen = *seen;
    let Event { kind, args, .. } = &mut seen.event;
    match EventKind::from_id(*kind) {
        Some(EventKind::FaultEnter) => args[2] = 0,
        // Copies to and from a program walk for its own variables too.
        Some(EventKind::WalkBegin | EventKind::WalkEnd) => args[1] = 0,
        Some(EventKind::SyscallEnter) => {
            // Arguments 1.. of the event are the call's first four.
            let pointers: &[usize] = match args[0] {
                nr::WRITE | nr::WAIT4 => &[2],
                nr::FUTEX => &[1],
                nr::GETCPU => &[1, 2],
                nr::SCHED_SETAFFINITY | nr::SCHED_GETAFFINITY => &[3],
                nr::TESTBED_FAULT_FIXUP => &[1, 2, 3],
                nr::MINCORE => &[3],
                nr::GETRLIMIT | nr::SETRLIMIT => &[2],
                nr::PRLIMIT64 => &[3, 4],
                _ => &[],
            };
            for pointer in pointers {
                args[*pointer] = 0;
            }
            // Registers that the call does not use hold whatever was there.
            let used = match args[0] {
                nr::MUNMAP | nr::TESTBED_WIRE | nr::TESTBED_PEEK => 2,
                nr::MLOCK | nr::MUNLOCK | nr::MEMBARRIER | nr::GETRLIMIT | nr::SETRLIMIT => 2,
                nr::MPROTECT | nr::MADVISE | nr::WRITE | nr::SCHED_SETAFFINITY => 3,
                nr::TESTBED_DIRECT_READ
                | nr::TESTBED_DIRECT_WRITE
                | nr::MLOCK2
                | nr::MSYNC
                | nr::MINCORE => 3,
                nr::MREMAP | nr::PRLIMIT64 => 4,
                nr::MMAP | nr::FUTEX | nr::CLONE | nr::WAIT4 | nr::TESTBED_REPORT => 4,
                nr::BRK | nr::TESTBED_RECLAIM | nr::MLOCKALL | nr::EXIT | nr::EXIT_GROUP => 1,
                _ => 0,
            };
            for arg in &mut args[1 + used..] {
                *arg = 0;
            }
        }
        _ => {}
    }
    seen
}

/// A fingerprint of a stream, the same on both engines.
#[must_use]
pub fn digest(events: &[Seen]) -> String {
    let mut hash = Sha256::new();
    for seen in events.iter().map(masked) {
        hash.update((seen.vcpu as u32).to_le_bytes());
        hash.update(seen.event.kind.to_le_bytes());
        hash.update(seen.event.task.to_le_bytes());
        for arg in seen.event.args {
            hash.update(arg.to_le_bytes());
        }
    }
    let mut text = String::new();
    for byte in &hash.finalize()[..16] {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// What two streams may differ in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Masks {
    /// Nothing, stamps included: two runs on one engine.
    Nothing,
    /// Stamps, and what is [`masked`]: runs on two engines.
    OfEngine,
}

/// Where two streams first differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Number of the event.
    pub at: usize,
    /// The last events that are the same, oldest first.
    pub before: Vec<Seen>,
    /// The event of the first stream; none where it is over.
    pub left: Option<Seen>,
    /// That of the second.
    pub right: Option<Seen>,
}

/// Events that are shown before a difference.
const CONTEXT: usize = 4;

/// Where two streams first differ; none where they are the same.
#[must_use]
pub fn difference(left: &[Seen], right: &[Seen], masks: Masks) -> Option<Difference> {
    let same = |(l, r): (&Seen, &Seen)| match masks {
        Masks::Nothing => l == r,
        Masks::OfEngine => {
            let of = |s: Seen| (s.vcpu, s.event.kind, s.event.task, s.event.args);
            of(masked(l)) == of(masked(r))
        }
    };
    let at = left.iter().zip(right).position(|pair| !same(pair));
    let at = match at {
        Some(at) => at,
        None if left.len() == right.len() => return None,
        None => left.len().min(right.len()),
    };
    Some(Difference {
        at,
        before: left[at.saturating_sub(CONTEXT)..at].to_vec(),
        left: left.get(at).copied(),
        right: right.get(at).copied(),
    })
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tell = |seen: &Option<Seen>| seen.as_ref().map_or("the end".to_owned(), describe);
        let (left, right) = (tell(&self.left), tell(&self.right));
        write!(f, "event {}: {left} here, {right} there", self.at)?;
        if left == right
            && let (Some(left), Some(right)) = (self.left, self.right)
        {
            // What a line does not show.
            let of = |seen: Seen| (seen.event.stamp, seen.event.sequence, seen.event.args);
            write!(
                f,
                " (stamp, sequence, arguments {:x?} and {:x?})",
                of(left),
                of(right)
            )?;
        }
        for (back, seen) in self.before.iter().rev().enumerate() {
            let at = self.at - 1 - back;
            write!(f, "\n    after event {at}: {}", describe(seen))?;
        }
        Ok(())
    }
}

/// Where two streams of two engines first differ, in words; none where they are the same.
#[must_use]
pub fn first_difference(left: &[Seen], right: &[Seen]) -> Option<String> {
    difference(left, right, Masks::OfEngine).map(|difference| difference.to_string())
}

/// One event in a line.
#[must_use]
pub fn describe(seen: &Seen) -> String {
    let Event {
        kind, task, args, ..
    } = seen.event;
    let mut text = format!("vCPU {} task {task} ", seen.vcpu);
    match EventKind::from_id(kind) {
        Some(kind) => {
            text.push_str(kind.name());
            for (name, value) in kind.arg_names().iter().zip(args) {
                let _ = write!(text, " {name}={value:#x}");
            }
        }
        None => {
            let _ = write!(text, "unknown event {kind}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seen(kind: EventKind, args: [u64; 5]) -> Seen {
        let kind = kind as u32;
        let event = Event {
            kind,
            args,
            ..Event::default()
        };
        Seen { vcpu: 1, event }
    }

    #[test]
    fn what_belongs_to_an_engine_is_masked_and_nothing_else() {
        use EventKind::{FaultEnter, SyscallEnter};
        // Kind, arguments, and which of these another engine may have otherwise.
        let table: [(EventKind, [u64; 5], &[usize]); 8] = [
            (FaultEnter, [0x1000, 6, 0x40_1000, 0, 0], &[2]),
            (SyscallEnter, [nr::WRITE, 1, 0x5000, 3, 9], &[2, 4]),
            (SyscallEnter, [nr::WAIT4, 1, 0x5000, 0, 0], &[2]),
            (SyscallEnter, [nr::FUTEX, 0x5000, 0, 1, 0], &[1]),
            (
                SyscallEnter,
                [nr::SCHED_SETAFFINITY, 0, 8, 0x5000, 7],
                &[3, 4],
            ),
            (
                SyscallEnter,
                [nr::GETCPU, 0x5000, 0x6000, 7, 7],
                &[1, 2, 3, 4],
            ),
            (SyscallEnter, [nr::MUNMAP, 0x1000, 0x2000, 7, 7], &[3, 4]),
            (EventKind::PteChange, [1, 2, 3, 4, 5], &[]),
        ];
        for (kind, args, other) in table {
            for at in 0..5 {
                let mut changed = args;
                changed[at] ^= 0x10_0000;
                let pair = ([seen(kind, args)], [seen(kind, changed)]);
                let differs = difference(&pair.0, &pair.1, Masks::OfEngine).is_some();
                // A changed call number is another call.
                assert_eq!(
                    differs,
                    !other.contains(&at),
                    "{kind:?} {args:x?} argument {at}"
                );
                assert!(difference(&pair.0, &pair.1, Masks::Nothing).is_some());
                assert_eq!(digest(&pair.0) != digest(&pair.1), differs);
            }
        }
    }

    #[test]
    fn a_difference_is_told_with_what_came_before() {
        let same = seen(EventKind::LockAcquire, [0x10, 6, 0, 0, 0]);
        let left = [same, seen(EventKind::LockRelease, [0x10, 6, 0, 0, 0])];
        let text = first_difference(&left, &[same]).unwrap();
        assert_eq!(
            text,
            "event 1: vCPU 1 task 0 lock-release lock=0x10 class=0x6 asleep=0x0 here, the end there\n    \
             after event 0: vCPU 1 task 0 lock-acquire lock=0x10 class=0x6 tried=0x0 mm=0x0"
        );
        let mut late = same;
        late.event.stamp = 7;
        let text = difference(&[same], &[late], Masks::Nothing)
            .unwrap()
            .to_string();
        assert!(text.contains("stamp") && text.contains('7'), "{text}");
    }

    proptest! {
        #[test]
        fn the_first_difference_is_the_first(
            kinds in prop::collection::vec(0u32..60, 1..20),
            at in any::<prop::sample::Index>(),
        ) {
            let stream: Vec<Seen> = kinds
                .iter()
                .map(|kind| Seen { vcpu: 0, event: Event { kind: *kind, ..Event::default() } })
                .collect();
            prop_assert_eq!(difference(&stream, &stream, Masks::Nothing), None);
            let at = at.index(stream.len());
            let mut other = stream.clone();
            other[at].vcpu = 1;
            let found = difference(&stream, &other, Masks::OfEngine).unwrap();
            prop_assert_eq!(found.at, at);
            prop_assert_eq!(found.before.len(), at.min(CONTEXT));
            prop_assert!(digest(&stream) != digest(&other));
        }
    }
}
