//! A process of a recording: where its mappings lie, which files it has open, and the steps that it makes.

use std::ops::Range;

use abi::layout::PAGE_SIZE;
use abi::oracle::{MAX_SLOTS, Mode, Returns};
use abi::syscall::{nr, prot};

use super::{Left, Recorded};
use crate::oracle::case::{Step, Value};
use crate::scenario::trace::{Area, Places};

/// Files that are open at a time; the guest's table has room for a few more.
const OPEN: usize = 16;
/// Addresses that the recording had by itself go into the arena: so many of their low bits.
const LOW: u64 = 1 << 39;

/// One process, and those that share its memory.
pub(super) struct Process {
    pub(super) parent: Option<usize>,
    /// Step of the parent that forks it.
    pub(super) forked_at: usize,
    pub(super) depth: usize,
    pub(super) steps: Vec<Step>,
    pub(super) places: Places,
    /// Where the recording's heap began.
    pub(super) heap: Option<u64>,
    /// Line of the call that is compiled, and of the first.
    pub(super) line: u64,
    pub(super) first_line: u64,
    /// Slots that are used.
    slots: u32,
    /// Files and the slots of their descriptors, those used last in the end.
    open: Vec<(i64, u32)>,
    /// Values that were stored.
    stored: u64,
}

/// An address that the recording did not get from a call, somewhere in the arena.
pub(super) fn far(address: u64) -> Value {
    Value::new(Mode::Arena, 0, address % LOW)
}

impl Process {
    pub(super) fn new(line: u64) -> Self {
        Self {
            parent: None,
            forked_at: 0,
            depth: 0,
            steps: Vec::new(),
            places: Places::default(),
            heap: None,
            line,
            first_line: line,
            // The first is the heap, which has no slot.
            slots: 1,
            open: Vec::new(),
            stored: 0,
        }
    }

    /// A copy that this process, which is number `number`, forks now. Both go on with the same slots: neither uses what the
    /// other one writes there.
    pub(super) fn fork(&mut self, number: usize) -> Self {
        self.steps.push(Step::Fork(Vec::new()));
        Self {
            parent: Some(number),
            forked_at: self.steps.len() - 1,
            depth: self.depth + 1,
            steps: Vec::new(),
            places: self.places.clone(),
            open: self.open.clone(),
            ..*self
        }
    }

    pub(super) fn new_slot(&mut self) -> Result<u32, Left> {
        if self.slots as usize >= MAX_SLOTS {
            return Err("more mappings than there are slots");
        }
        self.slots += 1;
        Ok(self.slots - 1)
    }

    pub(super) fn call(
        &mut self,
        name: &'static str,
        nr: u64,
        (returns, slot): (Returns, u32),
        args: Vec<Value>,
    ) {
        self.steps.push(Step::Recorded(Recorded {
            name,
            nr,
            returns,
            slot,
            args,
            line: self.line,
        }));
    }

    /// What `address` of the recording is here.
    pub(super) fn value(&self, address: u64) -> Option<Value> {
        let page = address / PAGE_SIZE * PAGE_SIZE;
        let pieces = self.places.pieces(&(page..page + PAGE_SIZE));
        let piece = pieces.first()?;
        let offset = piece.offset + (address - page);
        Some(match piece.slot {
            0 => Value::new(Mode::Heap, 0, offset),
            slot => Value::new(Mode::Slot, slot, offset),
        })
    }

    /// The parts of `range` that mappings of the recording have, each of one of them.
    pub(super) fn pieces(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let mut at = range.start;
        let mut found = Vec::new();
        for (start, area) in self.places.overlapping(range) {
            let (start, end) = (start.max(range.start), area.end.min(range.end));
            match found.last_mut() {
                Some((last, slot)) if *slot == area.slot && at == start => {
                    let last: &mut Range<u64> = last;
                    last.end = end;
                }
                _ => found.push((start..end, area.slot)),
            }
            at = end;
        }
        found.into_iter().map(|(range, _)| range).collect()
    }

    /// True where one mapping of the recording has all of `range`.
    pub(super) fn is_in_one(&self, range: &Range<u64>) -> bool {
        self.pieces(range).as_slice() == std::slice::from_ref(range)
    }

    /// The recording maps `range` now, which `slot` tells of.
    pub(super) fn put(&mut self, range: Range<u64>, slot: u32) {
        self.places.remove(&range);
        let area = Area {
            end: range.end,
            slot,
            base: range.start,
        };
        self.places.insert(range.start, area);
    }

    /// The descriptor of file `number`, opened if it is not.
    pub(super) fn open(&mut self, number: i64, bytes: u64) -> Result<Value, Left> {
        if let Some(at) = self.open.iter().position(|(file, _)| *file == number) {
            let (file, slot) = self.open.remove(at);
            self.open.push((file, slot));
            return Ok(Value::new(Mode::Slot, slot, 0));
        }
        if self.open.len() == OPEN {
            let (_, slot) = self.open.remove(0);
            let file = Value::new(Mode::Slot, slot, 0);
            self.call("close", nr::CLOSE, (Returns::Number, 0), vec![file]);
        }
        let slot = self.new_slot()?;
        let file = Value::new(Mode::Slot, slot, 0);
        let name = vec![Value::new(Mode::Name, 0, 0), Value::raw(0)];
        self.call(
            "memfd_create",
            nr::MEMFD_CREATE,
            (Returns::FileSlot, slot),
            name,
        );
        let size = vec![file, Value::raw(bytes)];
        self.call("ftruncate", nr::FTRUNCATE, (Returns::Number, 0), size);
        self.open.push((number, slot));
        Ok(file)
    }

    /// Gives the first and the last page that are about to be mapped contents.
    pub(super) fn mark(&mut self, file: Value, offset: u64, len: u64, size: u64) {
        let last = offset.saturating_add(len).min(size).saturating_sub(1) / PAGE_SIZE * PAGE_SIZE;
        for at in [offset, last] {
            if at >= offset && at < size {
                let value = self.next_value();
                self.steps
                    .push(Step::FileStore(file, Value::raw(at), value));
            }
        }
    }

    fn next_value(&mut self) -> u64 {
        self.stored += 1;
        self.line << 32 | self.stored
    }

    /// Accesses the first and the last page of `len` bytes at `address`: writes where `protection` permits it.
    pub(super) fn touch(&mut self, address: u64, len: u64, protection: u64) {
        let first = address / PAGE_SIZE * PAGE_SIZE;
        let last = (address + len.max(1) - 1) / PAGE_SIZE * PAGE_SIZE;
        let pages = if last > first {
            vec![first, last]
        } else {
            vec![first]
        };
        for page in pages {
            let Some(place) = self.value(page) else {
                continue;
            };
            if protection & prot::WRITE != 0 {
                let value = self.next_value();
                self.steps.push(Step::Store(place.plus(8), value));
            }
            self.steps.push(Step::Load(place));
        }
    }

    /// The heap is `range` now.
    pub(super) fn touch_heap(&mut self, range: Range<u64>) {
        let last = range.end - PAGE_SIZE;
        self.put(range, 0);
        self.touch(last, PAGE_SIZE, prot::READ | prot::WRITE);
    }
}
