//! Recorded programs as cases: every address space of a trace ([`crate::scenario::trace`]) becomes a case, in which the calls
//! of all its threads are made one after the other, each followed by a touch of what it has changed.
//!
//! Addresses are told from the mapping that they lie in, because neither kernel maps where the recording's did. A file is a
//! memfd of its size, whose pages are written where they are mapped. A process that is forked is one here too; execve begins
//! a case of its own. What cannot be told is left out, and counted.

mod process;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use abi::layout::PAGE_SIZE;
use abi::oracle::Returns;
use abi::syscall::{advice, clone, map, mremap, nr, prot};

use super::case::{Step, Value};
use crate::scenario::trace::{Call, Entry, Outcome, Trace, pages};
use process::{Process, far};

/// A system call of a recording.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// Its name.
    pub name: &'static str,
    /// Its number.
    pub nr: u64,
    /// What its result is.
    pub returns: Returns,
    /// Which slot keeps that.
    pub slot: u32,
    /// Its arguments.
    pub args: Vec<Value>,
    /// Line of the trace.
    pub line: u64,
}

/// One address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Space {
    /// Line at which it begins.
    pub line: u64,
    /// What its processes do.
    pub steps: Vec<Step>,
}

/// What a trace became.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Program {
    /// Its address spaces.
    pub spaces: Vec<Space>,
    /// Recorded calls that are made.
    pub calls: u64,
    /// What was left out, by the call's name and the reason.
    pub left_out: BTreeMap<(&'static str, &'static str), u64>,
}

/// Processes that are forked by each other, one in the other, at most: an interpreter has a stack for so many.
const MAX_DEPTH: usize = 4;
/// Steps of a case; more than all traces here have.
const MAX_STEPS: usize = 40_000;
/// Most that MAP_POPULATE makes the guest allocate.
const MAX_POPULATE: u64 = 8 << 20;

/// Makes the cases of a trace.
#[must_use]
pub fn program(trace: &Trace) -> Program {
    let mut compiler = Compiler {
        sizes: sizes(trace),
        processes: Vec::new(),
        by_task: HashMap::new(),
        program: Program::default(),
    };
    if let Some(first) = trace.entries.first() {
        compiler.by_task.insert(first.task, 0);
        compiler.processes.push(Process::new(first.line));
    }
    for entry in &trace.entries {
        match compiler.entry(entry) {
            Ok(()) => compiler.program.calls += 1,
            Err(reason) => {
                let key = (entry.call.name(), reason);
                *compiler.program.left_out.entry(key).or_default() += 1;
            }
        }
    }
    compiler.finish()
}

/// The size of each file: what the trace says, or else as far as it is mapped.
fn sizes(trace: &Trace) -> HashMap<i64, u64> {
    let mut sizes: HashMap<i64, u64> = HashMap::new();
    for entry in &trace.entries {
        if let Call::Mmap {
            fd, offset, len, ..
        } = entry.call
        {
            let end = offset.saturating_add(len).min(1 << 40);
            let size = sizes.entry(fd).or_default();
            *size = (*size).max(end);
        }
    }
    sizes.extend(trace.files.iter().map(|file| (file.number, file.bytes)));
    sizes
}

struct Compiler {
    sizes: HashMap<i64, u64>,
    processes: Vec<Process>,
    by_task: HashMap<u32, usize>,
    program: Program,
}

/// Why a call is left out.
type Left = &'static str;

impl Compiler {
    fn entry(&mut self, entry: &Entry) -> Result<(), Left> {
        let process = *self
            .by_task
            .get(&entry.task)
            .ok_or("of a task that the trace does not start")?;
        if self.processes[process].steps.len() > MAX_STEPS {
            return Err("behind too many others");
        }
        let result = match entry.outcome {
            Outcome::Returned(value) => Ok(value),
            Outcome::Failed(errno) => Err(errno),
            Outcome::Never => {
                return match entry.call {
                    Call::Exit { .. } | Call::ExitGroup { .. } | Call::Killed { .. } => Ok(()),
                    _ => Err("never returned in the recording"),
                };
            }
        };
        let it = &mut self.processes[process];
        it.line = entry.line;
        match (&entry.call, result) {
            (Call::Mmap { .. }, _) => it.mmap(&entry.call, result.ok(), &self.sizes),
            (Call::Munmap { addr, len }, _) => {
                it.on_range("munmap", nr::MUNMAP, (*addr, *len), None)?;
                if let (Ok(_), Some(range)) = (result, pages(*addr, *len)) {
                    it.places.remove(&range);
                }
                Ok(())
            }
            (Call::Mprotect { addr, len, prot }, _) => {
                let prot = readable(*prot);
                it.on_range("mprotect", nr::MPROTECT, (*addr, *len), Some(prot))?;
                it.touch(*addr, PAGE_SIZE, prot);
                Ok(())
            }
            (Call::Madvise { addr, len, advice }, _) => {
                if matches!(*advice, advice::PAGEOUT | advice::COLLAPSE | 100..) {
                    return Err("what it does is the host's business");
                }
                it.on_range("madvise", nr::MADVISE, (*addr, *len), Some(*advice))?;
                it.touch(*addr, PAGE_SIZE, prot::READ);
                Ok(())
            }
            (Call::Mremap { .. }, Ok(result)) => it.mremap(&entry.call, result),
            (Call::Brk { addr }, Ok(result)) => it.brk(*addr, result),
            (Call::Clone { flags } | Call::Clone3 { flags }, Ok(task)) => {
                self.start(process, *flags, task)
            }
            (Call::Fork, Ok(task)) => self.start(process, 0, task),
            (Call::Vfork, Ok(task)) => self.start(process, clone::VM, task),
            (Call::Execve { .. }, Ok(_)) => {
                self.by_task.insert(entry.task, self.processes.len());
                self.processes.push(Process::new(entry.line));
                Ok(())
            }
            (Call::Exit { .. } | Call::ExitGroup { .. } | Call::Killed { .. }, _) => Ok(()),
            (_, Err(_)) => Err("failed in the recording"),
        }
    }

    /// Who shares the memory, for good or until it executes something, is a thread here.
    fn start(&mut self, parent: usize, flags: u64, task: u64) -> Result<(), Left> {
        let task = u32::try_from(task).map_err(|_| "starts a task without a number")?;
        if flags & clone::VM != 0 {
            self.by_task.insert(task, parent);
            return Ok(());
        }
        if self.processes[parent].depth == MAX_DEPTH {
            return Err("one process too many in another");
        }
        let child = self.processes[parent].fork(parent);
        self.by_task.insert(task, self.processes.len());
        self.processes.push(child);
        Ok(())
    }

    fn finish(mut self) -> Program {
        while let Some(process) = self.processes.pop() {
            match process.parent {
                Some(parent) => {
                    self.processes[parent].steps[process.forked_at] = Step::Fork(process.steps);
                }
                None if process.steps.is_empty() => {}
                None => self.program.spaces.push(Space {
                    line: process.first_line,
                    steps: process.steps,
                }),
            }
        }
        self.program.spaces.reverse();
        self.program
    }
}

/// What a load of memory that can only be executed does depends on the processor.
fn readable(prot: u64) -> u64 {
    if prot & 7 == prot::EXEC {
        prot | prot::READ
    } else {
        prot
    }
}

impl Process {
    fn mmap(
        &mut self,
        call: &Call,
        result: Option<u64>,
        sizes: &HashMap<i64, u64>,
    ) -> Result<(), Left> {
        let &Call::Mmap {
            addr,
            len,
            prot,
            mut flags,
            fd,
            offset,
        } = call
        else {
            unreachable!("a call of mmap");
        };
        if flags & map::HUGETLB != 0 {
            return Err("huge pages of their own");
        }
        if len > MAX_POPULATE {
            flags &= !(map::POPULATE | map::LOCKED);
        }
        let prot = readable(prot);
        let is_file = flags & map::ANONYMOUS == 0;
        let file = match is_file {
            true => self.open(fd, sizes.get(&fd).copied().unwrap_or(0))?,
            false => Value::raw(u64::MAX),
        };
        let is_fixed = flags & (map::FIXED | map::FIXED_NOREPLACE) != 0;
        let address = match addr {
            0 => Value::raw(0),
            _ => self.value(addr).unwrap_or(far(addr)),
        };
        let range = result.and_then(|at| pages(at, len));
        let inside = range.as_ref().is_some_and(|range| self.is_in_one(range));
        let (returns, slot) = match (&range, is_fixed && inside) {
            (Some(_), false) => (Returns::Slot, self.new_slot()?),
            _ => (Returns::Address, 0),
        };
        if is_file {
            self.mark(file, offset, len, sizes.get(&fd).copied().unwrap_or(0));
        }
        let args = [
            address,
            Value::raw(len),
            Value::raw(prot),
            Value::raw(flags),
            file,
        ];
        let args = args.into_iter().chain([Value::raw(offset)]);
        self.call("mmap", nr::MMAP, (returns, slot), args.collect());
        if let Some(range) = range {
            if returns == Returns::Slot {
                self.put(range.clone(), slot);
            }
            self.touch(range.start, range.end - range.start, prot);
        }
        Ok(())
    }

    fn mremap(&mut self, call: &Call, result: u64) -> Result<(), Left> {
        let &Call::Mremap {
            addr,
            old_len,
            new_len,
            flags,
            new_addr,
        } = call
        else {
            unreachable!("a call of mremap");
        };
        let old = self
            .value(addr)
            .ok_or("memory that the recording did not map")?;
        let to = match flags & mremap::FIXED {
            0 => Value::raw(0),
            _ => self.value(new_addr).unwrap_or(far(new_addr)),
        };
        let slot = self.new_slot()?;
        let args = [
            old,
            Value::raw(old_len),
            Value::raw(new_len),
            Value::raw(flags),
            to,
        ];
        self.call("mremap", nr::MREMAP, (Returns::Slot, slot), args.to_vec());
        if let Some(range) = pages(addr, old_len)
            && flags & mremap::DONTUNMAP == 0
        {
            self.places.remove(&range);
        }
        if let Some(range) = pages(result, new_len) {
            self.put(range, slot);
        }
        self.touch(result, new_len, prot::READ);
        Ok(())
    }

    fn brk(&mut self, addr: u64, result: u64) -> Result<(), Left> {
        let start = match (self.heap, addr) {
            (Some(start), _) => start,
            (None, 0) => *self.heap.insert(result),
            (None, _) => return Err("of a heap whose start is unknown"),
        };
        let end = match addr {
            0 => Value::raw(0),
            addr => Value::new(abi::oracle::Mode::Heap, 0, addr.wrapping_sub(start)),
        };
        self.call("brk", nr::BRK, (Returns::Address, 0), vec![end]);
        if addr != 0 && addr == result {
            self.places.remove(&(start..start + (1 << 32)));
            if let Some(range) = pages(start, addr.saturating_sub(start)) {
                self.touch_heap(range);
            }
        }
        Ok(())
    }

    /// A call on `addr..addr + len`, for each mapping of the recording that lies there.
    fn on_range(
        &mut self,
        name: &'static str,
        nr: u64,
        (addr, len): (u64, u64),
        argument: Option<u64>,
    ) -> Result<(), Left> {
        let range = pages(addr, len).ok_or("an empty range")?;
        let pieces: Vec<Range<u64>> = self.pieces(&range);
        let [first, ..] = pieces.as_slice() else {
            return Err("memory that the recording did not map");
        };
        let ranges: Vec<(u64, u64)> = match pieces.len() {
            1 if *first == range => vec![(addr, len)],
            _ => pieces
                .iter()
                .map(|it| (it.start, it.end - it.start))
                .collect(),
        };
        for (addr, len) in ranges {
            let address = self
                .value(addr)
                .ok_or("memory that the recording did not map")?;
            let args = [
                Some(address),
                Some(Value::raw(len)),
                argument.map(Value::raw),
            ];
            let args = args.into_iter().flatten().collect();
            self.call(name, nr, (Returns::Number, 0), args);
        }
        Ok(())
    }
}
