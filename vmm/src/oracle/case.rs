//! A case: a short program, which can be written down for a person and for the interpreter.

use std::fmt::{self, Write as _};

use abi::layout::{HUGE_PAGE_SIZE, PAGE_SIZE};
use abi::oracle::{Arg, Mode, Op, OpKind, Residency, Returns};
use abi::syscall::{advice, nr, rlimit};

use super::calls::{CALLS, Call, index_of};
use super::recorded::Recorded;

/// An argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value {
    /// What it is relative to.
    pub mode: Mode,
    /// Which earlier result.
    pub index: u32,
    /// What is added.
    pub offset: u64,
}

impl Value {
    /// The number itself.
    #[must_use]
    pub const fn raw(offset: u64) -> Self {
        Self::new(Mode::Raw, 0, offset)
    }

    /// Relative to something.
    #[must_use]
    pub const fn new(mode: Mode, index: u32, offset: u64) -> Self {
        Self {
            mode,
            index,
            offset,
        }
    }

    /// `bytes` further.
    #[must_use]
    pub const fn plus(self, bytes: u64) -> Self {
        Self::new(self.mode, self.index, self.offset.wrapping_add(bytes))
    }

    fn arg(self) -> Arg {
        Arg {
            mode: self.mode as u32,
            index: self.index,
            value: self.offset,
        }
    }
}

/// An address as a program would write it.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mode {
            Mode::Raw => return write!(f, "{:#x}", self.offset),
            Mode::Arena => f.write_str("arena")?,
            Mode::Placed => write!(f, "placed[{}]", self.index)?,
            Mode::Heap => f.write_str("heap")?,
            Mode::Top => f.write_str("top")?,
            Mode::File => return write!(f, "file[{}]", self.index),
            Mode::Slot => write!(f, "slot[{}]", self.index)?,
            Mode::Name => return f.write_str("\"oracle\""),
        }
        let offset = self.offset.cast_signed();
        match offset {
            0 => Ok(()),
            1.. => write!(f, "+{offset:#x}"),
            _ => write!(f, "-{:#x}", offset.unsigned_abs()),
        }
    }
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A system call.
    Call {
        /// Its place in [`CALLS`].
        call: usize,
        /// Its arguments, as many as the table says.
        args: Vec<Value>,
    },
    /// Reads a word.
    Load(Value),
    /// Writes a word.
    Store(Value, u64),
    /// Reads the first word of so many pages.
    Check(Value, u64),
    /// Reads a word of a file, at this byte.
    FileLoad(Value, Value),
    /// Writes one.
    FileStore(Value, Value, u64),
    /// Sets the soft limit of a resource; of address space and data to so many bytes more than there were in the beginning.
    Limit(u64, u64),
    /// A system call of a recorded program.
    Recorded(Recorded),
    /// Forks; the child executes these and exits, and the parent waits for it.
    Fork(Vec<Step>),
}

/// Steps of a case, those of its children included.
#[must_use]
pub fn count(steps: &[Step]) -> usize {
    let inner = |step: &Step| match step {
        Step::Fork(body) => count(body),
        _ => 0,
    };
    steps.iter().map(|step| 1 + inner(step)).sum()
}

/// True where the two sides need not show the same: docs/oracle.md says why.
#[must_use]
pub fn is_open(steps: &[Step], residency: Residency) -> bool {
    let pages_out = has(steps, &|step| advises(step, advice::PAGEOUT));
    let is_open = residency == Residency::Open;
    pages_out && has(steps, &|step| advises(step, advice::FREE))
        || (pages_out || is_open) && has(steps, &|step| calls(step, nr::MINCORE).is_some())
        || is_open && has_unwritten_huge_pages(steps)
}

/// A mapping that folios of 2 MiB fit into, which is not written at once.
fn has_unwritten_huge_pages(steps: &[Step]) -> bool {
    let is_huge = |step| calls(step, nr::MMAP).is_some_and(|args| args[1].offset >= HUGE_PAGE_SIZE);
    steps.iter().enumerate().any(|(index, step)| match step {
        Step::Fork(body) => has_unwritten_huge_pages(body),
        step => is_huge(step) && !matches!(steps.get(index + 1), Some(Step::Store(..))),
    })
}

fn has(steps: &[Step], is: &dyn Fn(&Step) -> bool) -> bool {
    steps.iter().any(|step| match step {
        Step::Fork(body) => has(body, is),
        step => is(step),
    })
}

fn advises(step: &Step, advice: u64) -> bool {
    calls(step, nr::MADVISE).is_some_and(|args| args[2].offset == advice)
}

/// The arguments of a step that makes this call.
fn calls(step: &Step, nr: u64) -> Option<&[Value]> {
    match step {
        Step::Call { call, args } if CALLS[*call].nr == nr => Some(args),
        _ => None,
    }
}

/// The steps as the interpreter gets them. Every process looks at its memory in the end.
#[must_use]
pub fn encode(steps: &[Step]) -> Vec<Op> {
    let mut ops = Vec::new();
    encode_into(steps, &mut ops);
    ops
}

fn encode_into(steps: &[Step], ops: &mut Vec<Op>) {
    let op = |kind: OpKind, values: &[Value]| {
        let mut op = Op {
            kind: kind as u32,
            ..Op::default()
        };
        for (arg, value) in op.args.iter_mut().zip(values) {
            *arg = value.arg();
        }
        op
    };
    for step in steps {
        match step {
            Step::Call { call, args } => ops.push(Op {
                nr: CALLS[*call].nr as u32,
                returns: CALLS[*call].returns as u32,
                ..op(OpKind::Call, args)
            }),
            Step::Recorded(call) => ops.push(Op {
                nr: call.nr as u32,
                returns: call.returns as u32,
                slot: call.slot,
                ..op(OpKind::Call, &call.args)
            }),
            Step::Load(place) => ops.push(op(OpKind::Load, &[*place])),
            Step::Store(place, value) => {
                ops.push(op(OpKind::Store, &[*place, Value::raw(*value)]));
            }
            Step::Check(place, pages) => {
                ops.push(op(OpKind::Check, &[*place, Value::raw(*pages)]));
            }
            Step::FileLoad(file, offset) => ops.push(op(OpKind::FileLoad, &[*file, *offset])),
            Step::FileStore(file, offset, value) => {
                ops.push(op(OpKind::FileStore, &[*file, *offset, Value::raw(*value)]));
            }
            Step::Limit(resource, bytes) => {
                let args = [*resource, *bytes].map(Value::raw);
                ops.push(op(OpKind::Limit, &args));
            }
            Step::Fork(body) => {
                let at = ops.len();
                ops.push(op(OpKind::Fork, &[]));
                encode_into(body, ops);
                ops[at].body = (ops.len() - at - 1) as u32;
            }
        }
    }
    ops.push(op(OpKind::Contents, &[]));
}

/// The step as a person writes it, without a fork's body.
#[must_use]
pub fn line(step: &Step) -> String {
    match step {
        Step::Call { call, args } => call_line(&CALLS[*call], args),
        Step::Recorded(it) => {
            let text = call_line(&CALLS[index_of(it.nr)], &it.args);
            let text = text.trim_end_matches(" -> placed");
            let line = it.line;
            match it.returns {
                Returns::Slot | Returns::FileSlot => {
                    format!("{text} -> slot[{}]    (line {line})", it.slot)
                }
                _ => format!("{text}    (line {line})"),
            }
        }
        Step::Load(place) => format!("load {place}"),
        Step::Store(place, value) => format!("store {place} = {value:#x}"),
        Step::Check(place, pages) => {
            format!("load {place}, every {PAGE_SIZE:#x} bytes, {pages} times")
        }
        Step::FileLoad(file, offset) => format!("{file}: load byte {offset}"),
        Step::FileStore(file, offset, value) => format!("{file}: store byte {offset} = {value:#x}"),
        Step::Limit(resource, bytes) => {
            let name = match *resource {
                rlimit::AS => "AS = used",
                rlimit::DATA => "DATA = used",
                rlimit::STACK => "STACK = 0",
                _ => "MEMLOCK = 0",
            };
            format!("limit {name}+{bytes:#x}")
        }
        Step::Fork(_) => "fork".into(),
    }
}

fn call_line(call: &Call, args: &[Value]) -> String {
    let mut text = format!("{}(", call.name);
    for (index, (arg, show)) in args.iter().zip(call.shows).enumerate() {
        let comma = if index == 0 { "" } else { ", " };
        let _ = write!(text, "{comma}{}", show.text(*arg));
    }
    if call.returns == Returns::Place {
        text += ") -> placed";
    } else {
        text.push(')');
    }
    text
}

/// The lines of a case: for each encoded step its depth and its text.
#[must_use]
pub fn lines(steps: &[Step]) -> Vec<(usize, String)> {
    let mut all = Vec::new();
    lines_into(steps, 0, &mut all);
    all
}

fn lines_into(steps: &[Step], depth: usize, all: &mut Vec<(usize, String)>) {
    for step in steps {
        all.push((depth, line(step)));
        if let Step::Fork(body) = step {
            lines_into(body, depth + 1, all);
        }
    }
    all.push((depth, "(the contents of all that is mapped)".into()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fork_is_encoded_with_its_body_and_every_process_ends_with_a_look() {
        let place = Value::new(Mode::Arena, 0, PAGE_SIZE);
        let steps = [
            Step::Fork(vec![Step::Store(place, 7), Step::Fork(vec![])]),
            Step::Load(place),
        ];
        let ops = encode(&steps);
        let kinds: Vec<_> = ops.iter().map(|op| OpKind::from_u32(op.kind)).collect();
        use OpKind::*;
        let expected = [Fork, Store, Fork, Contents, Contents, Load, Contents];
        assert_eq!(kinds, expected.map(Some));
        assert_eq!((ops[0].body, ops[2].body, count(&steps)), (4, 1, 4));
        assert_eq!(ops[1].args[0], place.arg());
        // A line for every step that is encoded.
        let lines = lines(&steps);
        assert_eq!(lines.len(), ops.len());
        assert_eq!(lines[1], (1, "store arena+0x1000 = 0x7".into()));
        assert_eq!(lines[4].0, 1);
    }

    #[test]
    fn what_need_not_be_the_same_is_known_by_its_steps() {
        let call = |nr, args: &[u64]| Step::Call {
            call: index_of(nr),
            args: args.iter().copied().map(Value::raw).collect(),
        };
        let advise = |advice| call(nr::MADVISE, &[0, PAGE_SIZE, advice]);
        let (free, out) = (advise(advice::FREE), advise(advice::PAGEOUT));
        let mincore = call(nr::MINCORE, &[0, PAGE_SIZE, 0]);
        let map = call(nr::MMAP, &[0, HUGE_PAGE_SIZE, 3, 0x22, 0, 0]);
        let store = Step::Store(Value::raw(0), 1);
        let open = |steps: &[&Step]| {
            let steps: Vec<Step> = steps.iter().copied().cloned().collect();
            [Residency::Same, Residency::Open].map(|it| is_open(&steps, it))
        };
        assert_eq!(open(&[&free, &Step::Fork(vec![out.clone()])]), [true; 2]);
        assert_eq!(open(&[&free, &free]), [false; 2]);
        assert_eq!(open(&[&out, &map, &store]), [false; 2]);
        assert_eq!(open(&[&out, &mincore]), [true; 2]);
        assert_eq!(open(&[&free, &mincore]), [false, true]);
        assert_eq!(open(&[&map, &free, &store]), [false, true]);
    }

    #[test]
    fn places_are_written_as_what_they_are_relative_to() {
        let text =
            |mode, index, offset: i64| Value::new(mode, index, offset.cast_unsigned()).to_string();
        assert_eq!(text(Mode::Arena, 0, 0), "arena");
        assert_eq!(text(Mode::Top, 0, -4096), "top-0x1000");
        assert_eq!(text(Mode::Placed, 2, 1), "placed[2]+0x1");
        assert_eq!(text(Mode::Raw, 0, -1), "0xffffffffffffffff");
        assert_eq!(text(Mode::Heap, 0, 8), "heap+0x8");
        assert_eq!(text(Mode::File, 1, 0), "file[1]");
    }
}
