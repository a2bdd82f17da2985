//! The blob, checked once so that the interpreter can trust it.

use abi::oracle::{
    self, Arg, Header, MAGIC, MAX_SLOTS, Mode, Op, OpKind, Residency, Returns, Span,
};
use zerocopy::FromBytes;

/// A well-formed blob.
#[derive(Clone, Copy)]
pub(super) struct Blob<'a> {
    cases: u64,
    rest: &'a [u8],
}

/// One case of it.
#[derive(Clone, Copy)]
pub(crate) struct Case<'a> {
    ops: &'a [u8],
    spans: &'a [u8],
    words: &'a [u8],
    residency: u32,
}

/// Most processes that one case has at a time, but for the first.
const MAX_DEPTH: usize = 4;
const OP: usize = size_of::<Op>();
const SPAN: usize = size_of::<Span>();
const WORD: usize = size_of::<u64>();

impl<'a> Blob<'a> {
    pub(super) fn parse(blob: &'a [u8]) -> Result<Self, &'static str> {
        let Ok((header, rest)) = Header::read_from_prefix(blob) else {
            return Err("is shorter than its header");
        };
        if header.magic != MAGIC {
            return Err("is not a list of cases");
        }
        let mut left = rest;
        for _ in 0..header.cases {
            let (case, behind) = Case::split(left).ok_or("is cut short")?;
            if !case.is_well_formed() {
                return Err("has a malformed case");
            }
            left = behind;
        }
        Ok(Self {
            cases: header.cases,
            rest,
        })
    }

    pub(super) fn cases(self) -> impl Iterator<Item = Case<'a>> {
        let mut rest = self.rest;
        (0..self.cases).map(move |_| {
            let (case, behind) = Case::split(rest).expect("checked by parse");
            rest = behind;
            case
        })
    }
}

fn arg_holds(arg: &Arg) -> bool {
    let index = arg.index as usize;
    Mode::from_u32(arg.mode).is_some_and(|mode| mode != Mode::Slot || index < MAX_SLOTS)
}

impl<'a> Case<'a> {
    /// A case to record: without observations.
    #[cfg(any(test, feature = "native"))]
    pub(crate) fn of(ops: &'a [u8]) -> Self {
        Self {
            ops,
            spans: &[],
            words: &[],
            residency: Residency::Same as u32,
        }
    }

    fn split(from: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (header, rest) = oracle::Case::read_from_prefix(from).ok()?;
        let ops = header.ops as usize;
        let (ops, spans, words) = (ops * OP, ops * SPAN, header.words as usize * WORD);
        let (body, behind) = rest.split_at_checked(ops + spans + words)?;
        let case = Self {
            ops: &body[..ops],
            spans: &body[ops..ops + spans],
            words: &body[ops + spans..],
            residency: header.residency,
        };
        Some((case, behind))
    }

    fn is_well_formed(&self) -> bool {
        let words = self.words.len() / WORD;
        let steps_hold = (0..self.len()).all(|step| {
            let (op, span) = (self.op(step), self.span(step));
            OpKind::from_u32(op.kind).is_some()
                && Returns::from_u32(op.returns).is_some()
                && (op.slot as usize) < MAX_SLOTS
                && op.args.iter().all(arg_holds)
                && (op.body as usize) < self.len() - step
                && span.start as usize + span.len as usize <= words
        });
        // A child's steps end within its parent's.
        steps_hold && Residency::from_u32(self.residency).is_some() && self.nests(0, self.len())
    }

    fn nests(&self, from: usize, to: usize) -> bool {
        // Without recursion, whose depth a blob could choose: each body ends where an enclosing one does or before.
        let mut ends = [0; MAX_DEPTH];
        let mut depth = 0;
        for step in from..to {
            while depth > 0 && ends[depth - 1] <= step {
                depth -= 1;
            }
            let body = self.op(step).body as usize;
            if body > 0 {
                let end = step + 1 + body;
                let enclosing = if depth > 0 { ends[depth - 1] } else { to };
                if end > enclosing || depth == MAX_DEPTH {
                    return false;
                }
                ends[depth] = end;
                depth += 1;
            }
        }
        true
    }

    /// Number of steps.
    pub(super) fn len(&self) -> usize {
        self.ops.len() / OP
    }

    pub(super) fn op(&self, step: usize) -> Op {
        // The blob may lie anywhere, so this copies.
        Op::read_from_bytes(&self.ops[step * OP..][..OP]).expect("whole records")
    }

    fn span(&self, step: usize) -> Span {
        Span::read_from_bytes(&self.spans[step * SPAN..][..SPAN]).expect("whole records")
    }

    /// True where what Linux has in memory is compared.
    pub(super) fn compares_residency(&self) -> bool {
        self.residency == Residency::Same as u32
    }

    /// What Linux showed at `step`.
    fn shown(&self, step: usize) -> &'a [[u8; WORD]] {
        let span = self.span(step);
        let bytes = &self.words[span.start as usize * WORD..][..span.len as usize * WORD];
        bytes.as_chunks().0
    }

    /// Word `at` of the map that Linux showed at `step`; 0 where it has fewer.
    pub(super) fn map_at(&self, step: usize, at: usize) -> u64 {
        let mut words = self
            .shown(step)
            .iter()
            .map(|word| u64::from_le_bytes(*word));
        let result = words.next().unwrap_or(0);
        words.nth((result as usize).saturating_add(at)).unwrap_or(0)
    }

    /// True where `words` are what Linux showed at `step`.
    pub(super) fn expects(&self, step: usize, words: &[u64]) -> bool {
        let shown = self.shown(step).iter();
        shown
            .map(|word| u64::from_le_bytes(*word))
            .eq(words.iter().copied())
    }
}
