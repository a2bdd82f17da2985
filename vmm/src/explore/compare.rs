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
        Some(EventKind::SyscallEnter) => {
            // Arguments 1.. of the event are the call's first four.
            let pointers: &[usize] = match args[0] {
                nr::WRITE | nr::WAIT4 => &[2],
                nr::FUTEX => &[1],
                nr::GETCPU => &[1, 2],
                nr::SCHED_SETAFFINITY | nr::SCHED_GETAFFINITY => &[3],
                nr::TESTBED_FAULT_FIXUP => &[1, 2, 3],
                _ => &[],
            };
            for pointer in pointers {
                args[*pointer] = 0;
            }
            // Registers that the call does not use hold whatever was there.
            let used = match args[0] {
                nr::MUNMAP | nr::TESTBED_WIRE => 2,
                nr::MPROTECT | nr::MADVISE | nr::WRITE | nr::SCHED_SETAFFINITY => 3,
                nr::MMAP | nr::FUTEX | nr::CLONE | nr::WAIT4 | nr::TESTBED_REPORT => 4,
                nr::BRK | nr::EXIT | nr::EXIT_GROUP => 1,
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

/// Where two streams first differ, in words; none where they are the same.
#[must_use]
pub fn first_difference(left: &[Seen], right: &[Seen]) -> Option<String> {
    let same = |(l, r): (&Seen, &Seen)| {
        let (l, r) = (masked(l), masked(r));
        let of = |s: Seen| (s.vcpu, s.event.kind, s.event.task, s.event.args);
        of(l) == of(r)
    };
    let at = left.iter().zip(right).position(|pair| !same(pair));
    let at = match at {
        Some(at) => at,
        None if left.len() == right.len() => return None,
        None => left.len().min(right.len()),
    };
    let tell = |events: &[Seen]| events.get(at).map_or("the end".to_owned(), describe);
    Some(format!(
        "event {at}: {} here, {} there",
        tell(left),
        tell(right)
    ))
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
