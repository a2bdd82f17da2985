//! From recorded addresses to mapping slots.
//!
//! The replay's mmap calls return other addresses than the recording's did, so every address becomes a
//! slot (one per mmap that was not placed over another) and an offset. What the guest cannot do, or what
//! concerns memory that the recording did not map, is replaced or skipped, and counted.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Range;

use abi::layout::{PAGE_SIZE, USER_END};
use abi::syscall::{advice, clone, map};
use abi::trace::{Header, MAGIC, Op, OpKind};
use serde::Serialize;
use zerocopy::IntoBytes;

use super::places::{Area, Piece, Places, pages};
use super::{Call, Entry, Outcome, Trace};

/// A trace for the guest.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// [`abi::trace::Header`] and its records.
    pub blob: Vec<u8>,
    /// What became of the recorded calls.
    pub summary: Summary,
}

/// What became of the recorded calls.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// By the call's name.
    pub calls: BTreeMap<&'static str, CallSummary>,
    /// Tasks of the replay.
    pub tasks: u64,
    /// Mappings of the replay, the heap included.
    pub slots: u64,
    /// Records that the guest executes.
    pub records: u64,
}

/// What became of the recorded calls of one name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CallSummary {
    /// Replayed as recorded, but for addresses.
    pub as_is: u64,
    /// Replayed as something else: what, and how often.
    pub changed: BTreeMap<&'static str, u64>,
    /// Not replayed: why, and how often.
    pub skipped: BTreeMap<&'static str, u64>,
}

impl CallSummary {
    /// Calls of this name in the recording.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.as_is + self.changed.values().sum::<u64>() + self.skipped.values().sum::<u64>()
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, call) in &self.calls {
            write!(f, "{name}: {}, {} as recorded", call.total(), call.as_is)?;
            for (what, count) in &call.changed {
                write!(f, ", {count} as {what}")?;
            }
            for (why, count) in &call.skipped {
                write!(f, ", {count} skipped ({why})")?;
            }
            writeln!(f)?;
        }
        write!(
            f,
            "{} records, {} tasks, {} mappings",
            self.records, self.tasks, self.slots
        )
    }
}

/// What becomes of one call.
enum Fate {
    AsIs,
    Changed(&'static str),
    Skipped(&'static str),
}

/// Makes the guest's records of a trace.
#[must_use]
pub fn compile(trace: &Trace) -> Compiled {
    let mut compiler = Compiler::default();
    if let Some(first) = trace.entries.first() {
        compiler.processes.push(Process::default());
        compiler.start(first.task, 0);
    }
    for entry in &trace.entries {
        compiler.line = entry.line;
        let fate = compiler.entry(entry);
        let call = compiler.summary.calls.entry(entry.call.name()).or_default();
        match fate {
            Fate::AsIs => call.as_is += 1,
            Fate::Changed(what) => *call.changed.entry(what).or_default() += 1,
            Fate::Skipped(why) => *call.skipped.entry(why).or_default() += 1,
        }
    }
    compiler.finish()
}

#[derive(Default)]
struct Compiler {
    ops: Vec<Op>,
    /// The trace's task numbers.
    by_number: HashMap<u32, usize>,
    tasks: Vec<Task>,
    processes: Vec<Process>,
    /// Slots used; 0 is the heap.
    mapped_slots: u32,
    line: u64,
    summary: Summary,
}

struct Task {
    process: usize,
    ended: bool,
}

/// An address space of the recording.
#[derive(Clone, Default)]
struct Process {
    places: Places,
    /// Where the heap starts and ends, once known.
    heap: Option<Range<u64>>,
}

impl Compiler {
    fn start(&mut self, number: u32, process: usize) -> usize {
        self.tasks.push(Task {
            process,
            ended: false,
        });
        self.by_number.insert(number, self.tasks.len() - 1);
        self.tasks.len() - 1
    }

    fn op(&mut self, kind: OpKind, task: usize, piece: &Piece, prot: u64, flags: u64) {
        self.ops.push(Op {
            kind: kind as u32,
            task: task as u32,
            slot: piece.slot,
            prot: prot as u32,
            offset: piece.offset,
            len: piece.len,
            flags,
            line: self.line,
        });
    }

    fn entry(&mut self, entry: &Entry) -> Fate {
        let Some(&task) = self.by_number.get(&entry.task) else {
            return Fate::Skipped("by a task that the trace does not start");
        };
        if self.tasks[task].ended {
            return Fate::Skipped("after the end of its task");
        }
        let result = match (entry.outcome, &entry.call) {
            (_, Call::Exit { .. }) => return self.exit(task),
            (_, Call::ExitGroup { .. } | Call::Killed { .. }) => return self.exit_group(task),
            (Outcome::Failed(_), _) => return Fate::Skipped("failed in the recording"),
            (Outcome::Never, _) => return Fate::Skipped("never returned in the recording"),
            (Outcome::Returned(value), _) => value,
        };
        match entry.call {
            Call::Mmap {
                len, prot, flags, ..
            } => self.mmap(task, result, len, prot, flags),
            Call::Munmap { addr, len } => {
                let fate = self.each_piece(task, OpKind::Unmap, addr, len, 0, 0);
                if let Some(range) = pages(addr, len) {
                    self.process(task).places.remove(&range);
                }
                fate
            }
            Call::Mprotect { addr, len, prot } => {
                self.each_piece(task, OpKind::Protect, addr, len, prot & 7, 0)
            }
            Call::Madvise { addr, len, advice } if advice <= advice::DONTNEED => {
                self.each_piece(task, OpKind::Advise, addr, len, 0, advice)
            }
            Call::Madvise { .. } => Fate::Skipped("advice that the guest kernel does not know"),
            Call::Mremap { .. } => Fate::Skipped("not supported yet"),
            Call::Brk { addr } => self.brk(task, addr, result),
            Call::Clone { flags } | Call::Clone3 { flags } => self.clone_task(task, flags, result),
            Call::Fork => self.clone_task(task, 0, result),
            Call::Vfork => self.clone_task(task, clone::VM, result),
            Call::Execve { .. } => self.execve(task),
            Call::Exit { .. } | Call::ExitGroup { .. } | Call::Killed { .. } => {
                unreachable!("handled above")
            }
        }
    }

    fn process(&mut self, task: usize) -> &mut Process {
        &mut self.processes[self.tasks[task].process]
    }

    fn mmap(&mut self, task: usize, addr: u64, len: u64, prot: u64, flags: u64) -> Fate {
        let Some(range) = pages(addr, len) else {
            return Fate::Skipped("outside the address space");
        };
        let kept = flags & (map::NORESERVE | map::POPULATE | map::STACK);
        let new_flags = map::PRIVATE | map::ANONYMOUS | kept;
        let prot = prot & 7;
        let fixed = flags & (map::FIXED | map::FIXED_NOREPLACE) != 0;
        let pieces = self.process(task).places.pieces(&range);
        for piece in &pieces {
            if fixed {
                self.op(OpKind::MapFixed, task, piece, prot, new_flags);
            } else {
                // The recording's kernel found the place free, so a call that we skip had freed it.
                self.op(OpKind::Unmap, task, piece, 0, 0);
            }
        }
        if !fixed {
            self.process(task).places.remove(&range);
        }
        for gap in self.process(task).places.gaps(&range) {
            self.mapped_slots += 1;
            let slot = self.mapped_slots;
            let piece = Piece {
                slot,
                offset: 0,
                len: gap.end - gap.start,
            };
            self.op(OpKind::Map, task, &piece, prot, new_flags);
            let area = Area {
                end: gap.end,
                slot,
                base: gap.start,
            };
            self.process(task).places.insert(gap.start, area);
        }
        if flags & map::ANONYMOUS == 0 {
            Fate::Changed("private anonymous memory instead of a file's")
        } else if flags & map::SHARED != 0 {
            Fate::Changed("private anonymous memory instead of shared")
        } else if flags & map::HUGETLB != 0 {
            Fate::Changed("small pages instead of huge ones")
        } else {
            Fate::AsIs
        }
    }

    fn each_piece(
        &mut self,
        task: usize,
        kind: OpKind,
        addr: u64,
        len: u64,
        prot: u64,
        flags: u64,
    ) -> Fate {
        let Some(range) = pages(addr, len) else {
            return Fate::Skipped("an empty range");
        };
        let pieces = self.process(task).places.pieces(&range);
        for piece in &pieces {
            self.op(kind, task, piece, prot, flags);
        }
        let covered: u64 = pieces.iter().map(|piece| piece.len).sum();
        match pieces.len() {
            0 => Fate::Skipped("memory that the recording did not map"),
            _ if covered < range.end - range.start => {
                Fate::Changed("the part of it that the recording mapped")
            }
            1 => Fate::AsIs,
            _ => Fate::Changed("one call for each mapping"),
        }
    }

    fn brk(&mut self, task: usize, addr: u64, result: u64) -> Fate {
        let Some(heap) = self.process(task).heap.clone() else {
            if addr != 0 {
                return Fate::Skipped("of a heap whose start is unknown");
            }
            let start = result.next_multiple_of(PAGE_SIZE);
            self.process(task).heap = Some(start..start);
            return Fate::Changed("the heap's start, with nothing to execute");
        };
        if addr == 0 {
            return Fate::Changed("the heap's end, with nothing to execute");
        }
        if result != addr || addr < heap.start || addr >= USER_END {
            return Fate::Skipped("failed in the recording");
        }
        let piece = Piece {
            slot: 0,
            offset: addr - heap.start,
            len: 0,
        };
        self.op(OpKind::Brk, task, &piece, 0, 0);
        self.set_heap(task, &heap, addr);
        Fate::AsIs
    }

    fn set_heap(&mut self, task: usize, heap: &Range<u64>, end: u64) {
        let pages = heap.start..end.next_multiple_of(PAGE_SIZE);
        let dropped = pages.end..heap.end.next_multiple_of(PAGE_SIZE).max(pages.end);
        let process = self.process(task);
        process.places.remove(&pages);
        process.places.remove(&dropped);
        if !pages.is_empty() {
            let area = Area {
                end: pages.end,
                slot: 0,
                base: heap.start,
            };
            process.places.insert(heap.start, area);
        }
        process.heap = Some(heap.start..end);
    }

    fn clone_task(&mut self, task: usize, flags: u64, result: u64) -> Fate {
        let Ok(number) = u32::try_from(result) else {
            return Fate::Skipped("the task that it starts has no number");
        };
        if self.by_number.contains_key(&number) {
            return Fate::Skipped("starts a task that exists already");
        }
        let thread = flags & clone::THREAD != 0;
        let process = if thread {
            self.tasks[task].process
        } else {
            let copy = self.process(task).clone();
            self.processes.push(copy);
            self.processes.len() - 1
        };
        let started = self.start(number, process);
        let kind = if thread { OpKind::Thread } else { OpKind::Fork };
        self.op(
            kind,
            task,
            &Piece {
                slot: 0,
                offset: 0,
                len: started as u64,
            },
            0,
            0,
        );
        if !thread && flags & clone::VM != 0 {
            Fate::Changed("a fork instead of a process that borrows the memory")
        } else {
            Fate::AsIs
        }
    }

    /// execve gives the process a new, empty address space and ends its other threads.
    fn execve(&mut self, task: usize) -> Fate {
        self.end_where(|compiler, other| {
            other != task && compiler.tasks[other].process == compiler.tasks[task].process
        });
        let process = std::mem::take(self.process(task));
        let heap_pages = process.heap.as_ref().is_some_and(|heap| !heap.is_empty());
        for piece in process
            .places
            .pieces(&(0..USER_END))
            .iter()
            .filter(|piece| piece.slot != 0)
        {
            self.op(OpKind::Unmap, task, piece, 0, 0);
        }
        if heap_pages {
            self.op(
                OpKind::Brk,
                task,
                &Piece {
                    slot: 0,
                    offset: 0,
                    len: 0,
                },
                0,
                0,
            );
        }
        Fate::Changed("munmap of all that the process had mapped")
    }

    fn exit(&mut self, task: usize) -> Fate {
        self.end_where(|_, other| other == task);
        Fate::AsIs
    }

    fn exit_group(&mut self, task: usize) -> Fate {
        self.end_where(|compiler, other| {
            compiler.tasks[other].process == compiler.tasks[task].process
        });
        Fate::AsIs
    }

    fn end_where(&mut self, ends: impl Fn(&Self, usize) -> bool) {
        for task in 0..self.tasks.len() {
            if !self.tasks[task].ended && ends(self, task) {
                self.tasks[task].ended = true;
                self.op(
                    OpKind::Exit,
                    task,
                    &Piece {
                        slot: 0,
                        offset: 0,
                        len: 0,
                    },
                    0,
                    0,
                );
            }
        }
    }

    fn finish(mut self) -> Compiled {
        self.end_where(|_, _| true);
        let header = Header {
            magic: MAGIC,
            ops: self.ops.len() as u64,
            tasks: self.tasks.len().max(1) as u64,
            slots: u64::from(self.mapped_slots) + 1,
        };
        let mut blob = header.as_bytes().to_vec();
        blob.extend_from_slice(self.ops.as_bytes());
        self.summary.tasks = header.tasks;
        self.summary.slots = header.slots;
        self.summary.records = header.ops;
        Compiled {
            blob,
            summary: self.summary,
        }
    }
}
