use abi::channel::ReportKind::{ForeignFrame, WrongPermission, WrongResult};
use abi::syscall::{Errno, advice, nr, prot};
use abi::trace::{Header, MAGIC, Op, OpKind};
use zerocopy::IntoBytes;

use crate::args::UsageError;
use crate::broken::{Broken, Fault};
use crate::native;
use crate::sys::ANONYMOUS;

const RW: u32 = (prot::READ | prot::WRITE) as u32;
const PAGE: u64 = 4096;

fn op(kind: OpKind, task: u32, slot: u32, offset: u64, len: u64) -> Op {
    let flags = if matches!(kind, OpKind::Map | OpKind::MapFixed) {
        ANONYMOUS
    } else {
        0
    };
    Op {
        kind: kind as u32,
        task,
        slot,
        prot: RW,
        offset,
        len,
        flags,
        line: 0,
    }
}

fn blob(tasks: u64, slots: u64, ops: &[Op]) -> Vec<u8> {
    let mut blob = Header {
        magic: MAGIC,
        ops: ops.len() as u64,
        tasks,
        slots,
    }
    .as_bytes()
    .to_vec();
    for (index, op) in ops.iter().enumerate() {
        blob.extend_from_slice(
            Op {
                line: index as u64 + 10,
                ..*op
            }
            .as_bytes(),
        );
    }
    blob
}

/// Each kind of record, with threads and forked processes that interleave.
fn everything() -> Vec<u8> {
    use OpKind::*;
    let read_only = |op| Op {
        prot: prot::READ as u32,
        ..op
    };
    let none = |op| Op { prot: 0, ..op };
    let dontneed = |op| Op {
        flags: advice::DONTNEED,
        ..op
    };
    let mut ops = vec![
        op(Brk, 0, 0, 8 * PAGE + 24, 0),
        op(Map, 0, 1, 0, 64 * PAGE),
        read_only(op(MapFixed, 0, 1, 16 * PAGE, 16 * PAGE)),
        op(Thread, 0, 0, 0, 1),
        op(Thread, 0, 0, 0, 2),
    ];
    for round in 0..40 {
        let slot = 2 + round as u32;
        let task = round as u32 % 3;
        let other = (round as u32 + 1) % 3;
        ops.extend([
            op(Map, task, slot, 0, 4 * PAGE),
            read_only(op(Protect, other, slot, 0, 2 * PAGE)),
            none(op(Protect, task, slot, PAGE, PAGE)),
            op(Protect, other, slot, 0, 4 * PAGE),
            dontneed(op(Advise, task, slot, 0, 2 * PAGE)),
            op(Brk, other, 0, PAGE * (2 + round % 8), 0),
            op(Unmap, task, slot, 0, 4 * PAGE),
        ]);
    }
    ops.extend([
        op(Fork, 1, 0, 0, 3),
        op(Unmap, 0, 1, 0, 8 * PAGE),
        op(Map, 3, 42, 0, 3 * PAGE),
        op(Thread, 3, 0, 0, 4),
        op(Protect, 4, 1, 8 * PAGE, 56 * PAGE),
        op(Fork, 4, 0, 0, 5),
        op(Unmap, 5, 42, 0, PAGE),
        op(Unmap, 3, 1, 0, 64 * PAGE),
    ]);
    ops.extend([2, 0, 4, 5, 1, 3].map(|task| op(Exit, task, 0, 0, 0)));
    blob(6, 43, &ops)
}

#[test]
fn linux_is_clean() {
    for args in ["", "copies=3\0touch=8", "touch=0", "touch=64"] {
        let outcome = native::run("replay", args, Some(&everything())).unwrap();
        assert_eq!(outcome.reports, [], "{args:?}: {}", outcome.text);
        assert_eq!(outcome.status, 0);
        assert!(
            outcome
                .text
                .starts_with("replay: 293 calls: 43 mmap, 43 munmap, 121 mprotect"),
            "{}",
            outcome.text
        );
    }
}

/// One task, one mapping, and what each broken kernel makes of it.
fn simple() -> Vec<u8> {
    use OpKind::*;
    let ops = [
        op(Map, 0, 1, 0, 4 * PAGE),
        Op {
            prot: prot::READ as u32,
            ..op(Protect, 0, 1, 0, 4 * PAGE)
        },
        op(Protect, 0, 1, 0, 4 * PAGE),
        Op {
            flags: advice::DONTNEED,
            ..op(Advise, 0, 1, 0, 4 * PAGE)
        },
        op(Unmap, 0, 1, 0, 4 * PAGE),
        op(Exit, 0, 0, 0, 0),
    ];
    blob(1, 2, &ops)
}

#[test]
fn each_broken_call_is_caught() {
    let cases = [
        (Fault::MprotectIgnored, WrongPermission),
        (Fault::MadviseIgnored, ForeignFrame),
        (Fault::Fails(nr::MUNMAP, Errno::EINVAL), WrongResult),
        (Fault::Fails(nr::MADVISE, Errno::ENOMEM), WrongResult),
    ];
    for (fault, kind) in cases {
        let broken = |native| Broken::new(native, fault);
        let outcome = native::run_on(broken, "replay", "", Some(&simple())).unwrap();
        assert_eq!(outcome.status, 1, "{fault:?}");
        let caught = outcome.reports.iter().any(|report| report.kind == kind);
        assert!(caught, "{fault:?}: {outcome:?}");
        if kind == WrongResult {
            assert!(
                outcome.text.contains("where the recording succeeded"),
                "{}",
                outcome.text
            );
        }
    }
}

#[test]
fn a_process_that_shares_its_memory_is_caught() {
    use OpKind::*;
    // Each writes the page again after DONTNEED, with a value of its own.
    let drop_all = |task| Op {
        flags: advice::DONTNEED,
        ..op(Advise, task, 1, 0, 4 * PAGE)
    };
    let mut ops = vec![op(Map, 0, 1, 0, 4 * PAGE), op(Fork, 0, 0, 0, 1)];
    for _ in 0..50 {
        ops.extend([drop_all(0), drop_all(1)]);
    }
    ops.extend([op(Exit, 0, 0, 0, 0), op(Exit, 1, 0, 0, 0)]);
    let trace = blob(2, 2, &ops);
    let broken = |native| Broken::new(native, Fault::PrivateIsShared);
    let outcome = native::run_on(broken, "replay", "", Some(&trace)).unwrap();
    assert_eq!(outcome.status, 1);
    assert!(
        outcome
            .reports
            .iter()
            .any(|report| report.kind == ForeignFrame),
        "{outcome:?}"
    );
    assert_eq!(native::run("replay", "", Some(&trace)).unwrap().reports, []);
}

#[test]
fn malformed_blobs_are_refused() {
    let reason = |blob: Option<&[u8]>| match native::run("replay", "", blob) {
        Err(UsageError::BadData { reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    let good = simple();
    assert_eq!(reason(None), "is absent");
    assert_eq!(reason(Some(&good[..20])), "is shorter than its header");
    assert_eq!(reason(Some(&good[..good.len() - 1])), "is cut short");
    let mut bad = good.clone();
    bad[0] ^= 1;
    assert_eq!(reason(Some(&bad)), "is not a compiled trace");
    let one = |op| blob(1, 2, &[op]);
    let unknown = Op {
        kind: 77,
        ..op(OpKind::Exit, 0, 0, 0, 0)
    };
    assert_eq!(
        reason(Some(&one(unknown))),
        "has a record of an unknown kind"
    );
    let task = op(OpKind::Exit, 1, 0, 0, 0);
    assert_eq!(
        reason(Some(&one(task))),
        "has a record of an unknown task or slot"
    );
    assert_eq!(
        reason(Some(&one(op(OpKind::Fork, 0, 0, 0, 0)))),
        "starts a task out of order"
    );
    let far = op(OpKind::Unmap, 0, 1, u64::MAX, 2);
    assert_eq!(
        reason(Some(&one(far))),
        "has a range outside the address space"
    );
}
