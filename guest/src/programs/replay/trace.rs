//! The compiled trace, checked once so that the replay can trust it.

use core::fmt;

use abi::trace::{Header, MAGIC, Op, OpKind};
use zerocopy::FromBytes;

/// A well-formed compiled trace.
#[derive(Clone, Copy)]
pub(super) struct Trace<'a> {
    pub(super) tasks: usize,
    pub(super) slots: usize,
    ops: &'a [u8],
}

const OP_BYTES: usize = size_of::<Op>();
/// More than any recording has; keeps tables of a hostile blob small.
const MAX: u64 = 1 << 20;

impl<'a> Trace<'a> {
    pub(super) fn parse(blob: &'a [u8]) -> Result<Self, &'static str> {
        let Ok((header, rest)) = Header::read_from_prefix(blob) else {
            return Err("is shorter than its header");
        };
        if header.magic != MAGIC {
            return Err("is not a compiled trace");
        }
        if header.ops > MAX || header.tasks > MAX || header.slots > MAX || header.tasks == 0 {
            return Err("has a header with impossible counts");
        }
        let ops = rest
            .get(..header.ops as usize * OP_BYTES)
            .ok_or("is cut short")?;
        let trace = Self {
            tasks: header.tasks as usize,
            slots: header.slots as usize,
            ops,
        };
        trace.check()?;
        Ok(trace)
    }

    fn check(&self) -> Result<(), &'static str> {
        for op in (0..self.len()).map(|index| self.op(index)) {
            let kind = OpKind::from_u32(op.kind).ok_or("has a record of an unknown kind")?;
            let task = op.task as usize;
            if task >= self.tasks || op.slot as usize >= self.slots {
                return Err("has a record of an unknown task or slot");
            }
            let starts = matches!(kind, OpKind::Thread | OpKind::Fork);
            if starts && (op.len as usize >= self.tasks || op.len <= op.task.into()) {
                return Err("starts a task out of order");
            }
            let end = op.offset.checked_add(op.len);
            if end.is_none_or(|end| end > abi::layout::USER_END) {
                return Err("has a range outside the address space");
            }
        }
        Ok(())
    }

    /// Number of records.
    pub(super) fn len(&self) -> usize {
        self.ops.len() / OP_BYTES
    }

    pub(super) fn op(&self, index: usize) -> Op {
        // The blob may lie anywhere, so this copies.
        Op::read_from_bytes(&self.ops[index * OP_BYTES..][..OP_BYTES]).expect("whole records")
    }

    pub(super) fn kind(op: &Op) -> OpKind {
        OpKind::from_u32(op.kind).expect("checked by parse")
    }

    fn count(&self, kind: OpKind) -> usize {
        (0..self.len())
            .filter(|index| Self::kind(&self.op(*index)) == kind)
            .count()
    }
}

impl fmt::Display for Trace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = [
            (
                "mmap",
                self.count(OpKind::Map) + self.count(OpKind::MapFixed),
            ),
            ("munmap", self.count(OpKind::Unmap)),
            ("mprotect", self.count(OpKind::Protect)),
            ("madvise", self.count(OpKind::Advise)),
            ("brk", self.count(OpKind::Brk)),
            ("thread", self.count(OpKind::Thread)),
            ("fork", self.count(OpKind::Fork)),
        ];
        let calls: usize = counts.iter().map(|(_, count)| count).sum();
        write!(f, "{calls} calls:")?;
        let mut separator = "";
        for (name, count) in counts.iter().filter(|(_, count)| *count > 0) {
            write!(f, "{separator} {count} {name}")?;
            separator = ",";
        }
        Ok(())
    }
}
