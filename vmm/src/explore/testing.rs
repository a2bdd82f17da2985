//! A tiny machine for tests: threads that are scripts over a few words, with the points, events, locks and
//! IPIs of the real engines. What a step touches is what its events say.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use abi::channel::{Event, EventKind};
use abi::failpoint::Failpoint;
use abi::layout::ENTRIES_PER_TABLE;
use abi::lock::LockClass;
use abi::point::Point;
use abi::syscall::nr;
use proptest::prelude::*;

use super::Schedule;
use crate::engine::{Costs, Engine, EngineError, EngineKind, Halt, Limit, Window};
use crate::inspect::VcpuFacts;
use crate::memory::{OutOfRange, PhysMem};
use crate::report::symbols::Symbols;
use crate::snapshot::Snapshot;

const LOCKS: usize = 0;
const PENDING: usize = 8;
const FRAMES: usize = 16;
const WORDS: usize = 32;

/// One line of a script.
#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    /// Sets a frame's count.
    Set(u8, u64),
    /// Doubles it.
    Double(u8),
    /// Sets the second to the first plus one.
    Copy(u8, u8),
    /// Takes a spin lock.
    Lock(u8),
    /// Drops it.
    Unlock(u8),
    /// Shoots the other CPUs of the mask down and waits for them. The handler adds 100 to frame 7.
    Shoot(u8),
    /// In user code: sets a word of the program's own.
    Signal(u8),
    /// In user code: yields until that word is set.
    Await(u8),
    /// The program says that a value is wrong if frame `0` is `1`.
    Fail(u8, u64),
    /// Goes through a point without an event for ever.
    Spin,
}

#[derive(Clone, Copy, Debug)]
enum Micro {
    Point(Point, [u64; 2]),
    Event(EventKind, [u64; 2]),
    Op(Op),
    Poll(u8),
    Synced,
    Ack(usize),
    FirstUser,
    End,
}

#[derive(Clone, Debug, Default)]
struct Cpu {
    todo: VecDeque<Micro>,
    /// Where it stands, where an IPI may be taken.
    open: bool,
    passed: u64,
    in_flight: bool,
    pending: bool,
    /// Its script is over.
    over: bool,
    ticket: u64,
}

#[derive(Clone, Debug)]
struct Words(Vec<u64>);

impl PhysMem for Words {
    fn bytes(&self) -> u64 {
        self.0.len() as u64 * 8
    }
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), OutOfRange> {
        let len = buf.len() as u64;
        let word = self.0.get(gpa as usize / 8);
        match word {
            Some(word) if len == 8 => buf.copy_from_slice(&word.to_le_bytes()),
            _ => return Err(OutOfRange { gpa, len }),
        }
        Ok(())
    }
    fn table(&self, gpa: u64) -> Result<&[AtomicU64; ENTRIES_PER_TABLE], OutOfRange> {
        Err(OutOfRange { gpa, len: 4096 })
    }
}

#[derive(Clone, Debug)]
struct State {
    cpus: Vec<Cpu>,
    words: Words,
}

/// The machine.
#[derive(Clone, Debug)]
pub(super) struct Fake {
    now: State,
    saved: State,
    /// Every how many runs one machine is unlike the others (0: none).
    pub(super) flaky: u64,
    /// What it tells of the points that it has passed, where it lies.
    pub(super) lie: Option<u64>,
    runs: u64,
}

impl Fake {
    pub(super) fn new(scripts: &[Vec<Op>]) -> Self {
        let mut cpus = vec![Cpu::default(); scripts.len()];
        for (cpu, script) in scripts.iter().enumerate() {
            let todo = &mut cpus[cpu].todo;
            let start = if cpu == 0 {
                todo.push_back(Micro::FirstUser);
                Point::TestBegin
            } else {
                Point::UserRelax
            };
            todo.push_back(Micro::Point(start, [0; 2]));
            todo.extend(enter(nr::MUNMAP));
            todo.extend(script.iter().map(|op| Micro::Op(*op)));
            todo.extend(exit(nr::MUNMAP));
            todo.push_back(Micro::End);
        }
        let words = Words(vec![0; WORDS]);
        let now = State { cpus, words };
        Self {
            saved: now.clone(),
            now,
            flaky: 0,
            lie: None,
            runs: 0,
        }
    }

    /// All that a program could look at.
    pub(super) fn outcome(&self) -> Vec<u64> {
        self.now.words.0.clone()
    }

    fn frame(&mut self, frame: u8) -> &mut u64 {
        &mut self.now.words.0[FRAMES + usize::from(frame)]
    }

    fn expand(&mut self, vcpu: usize, op: Op, events: &mut Vec<Event>) -> Option<Halt> {
        let gpa = |word: usize| word as u64 * 8;
        match op {
            Op::Set(frame, value) => {
                *self.frame(frame) = value;
                self.count(vcpu, frame, events)
            }
            Op::Double(frame) => {
                let count = self.frame(frame);
                *count = count.wrapping_mul(2);
                self.count(vcpu, frame, events)
            }
            Op::Copy(from, to) => {
                let value = self.frame(from).wrapping_add(1);
                *self.frame(to) = value;
                self.log(
                    vcpu,
                    EventKind::RefcountChange,
                    [u64::from(from) << 12, 0],
                    events,
                );
                self.count(vcpu, to, events)
            }
            Op::Lock(lock) => {
                let word = LOCKS + usize::from(lock);
                let args = [gpa(word), LockClass::Slab as u64];
                if self.now.words.0[word] == 0 {
                    self.now.words.0[word] = vcpu as u64 + 1;
                    self.log(vcpu, EventKind::LockAcquire, args, events);
                    self.stop(Point::LockAcquire, args)
                } else {
                    self.next(vcpu, &[Micro::Op(op)]);
                    self.log(vcpu, EventKind::LockWait, args, events);
                    self.stop(Point::LockWait, args)
                }
            }
            Op::Unlock(lock) => {
                let word = LOCKS + usize::from(lock);
                let args = [gpa(word), LockClass::Slab as u64];
                self.now.words.0[word] = 0;
                self.log(vcpu, EventKind::LockRelease, args, events);
                self.stop(Point::LockRelease, args)
            }
            Op::Shoot(mask) => {
                let here = (1 << self.now.cpus.len()) - 1;
                let targets = u64::from(mask) & here & !(1 << vcpu);
                self.next(vcpu, &[Micro::Synced]);
                self.now.words.0[PENDING + vcpu] = targets;
                for (cpu, state) in self.now.cpus.iter_mut().enumerate() {
                    state.in_flight |= targets & 1 << cpu != 0;
                }
                self.log(vcpu, EventKind::ShootdownBegin, [1, 0], events);
                self.log(vcpu, EventKind::IpiSend, [0xf0, targets], events);
                self.stop(Point::FlushDispatch, [1, targets])
            }
            Op::Signal(word) => {
                let [event, point] = enter(nr::MUNMAP);
                self.next(vcpu, &[Micro::Poll(word | 0x80), event, point]);
                self.next(vcpu, &exit(nr::MUNMAP));
                None
            }
            Op::Await(word) => {
                self.next(vcpu, &[Micro::Poll(word)]);
                self.next(vcpu, &exit(nr::MUNMAP));
                None
            }
            Op::Fail(frame, value) => {
                let frame_at = u64::from(frame) << 12;
                self.log(vcpu, EventKind::RefcountChange, [frame_at, 0], events);
                (*self.frame(frame) == value).then(|| {
                    Halt::Report(crate::control::ProbeReport {
                        kind: abi::channel::ReportKind::WrongResult,
                        gva: u64::from(frame),
                        expected: 0,
                        found: value,
                        task: vcpu as u64,
                    })
                })
            }
            Op::Spin => {
                self.next(vcpu, &[Micro::Op(op)]);
                self.stop(Point::VmaAttach, [0; 2])
            }
        }
    }

    /// Puts `todo` before what is left to do.
    fn next(&mut self, vcpu: usize, todo: &[Micro]) {
        for micro in todo.iter().rev() {
            self.now.cpus[vcpu].todo.push_front(*micro);
        }
    }

    fn count(&mut self, vcpu: usize, frame: u8, events: &mut Vec<Event>) -> Option<Halt> {
        let args = [u64::from(frame) << 12, *self.frame(frame)];
        self.log(vcpu, EventKind::MapcountChange, args, events);
        self.stop(Point::MapcountChange, args)
    }

    #[allow(clippy::unnecessary_wraps, clippy::unused_self)]
    fn stop(&self, point: Point, args: [u64; 2]) -> Option<Halt> {
        Some(Halt::Point { point, args })
    }

    fn log(&mut self, vcpu: usize, kind: EventKind, args: [u64; 2], events: &mut Vec<Event>) {
        let cpu = &mut self.now.cpus[vcpu];
        cpu.ticket += 1;
        let noise = u64::from(self.flaky != 0 && self.runs.is_multiple_of(self.flaky));
        events.push(Event {
            kind: kind as u32,
            task: vcpu as u32 + 1,
            args: [args[0], args[1], 0, 0, noise],
            sequence: cpu.ticket,
            stamp: 0,
        });
    }

    /// Does the next thing; some where it stands at a point or halts.
    fn advance(&mut self, vcpu: usize, events: &mut Vec<Event>) -> Option<Halt> {
        let cpu = &mut self.now.cpus[vcpu];
        if cpu.open && std::mem::take(&mut cpu.pending) {
            let vector = Micro::Event(EventKind::IpiReceive, [0xf0, 0]);
            let acks = (0..self.now.cpus.len()).map(Micro::Ack);
            let point = Micro::Point(Point::IpiReceive, [0xf0, 0]);
            let handler: Vec<Micro> = [vector, point].into_iter().chain(acks).collect();
            self.next(vcpu, &handler);
        }
        self.now.cpus[vcpu].open = false;
        match self.now.cpus[vcpu].todo.pop_front().unwrap_or(Micro::End) {
            Micro::Point(point, args) => self.stop(point, args),
            Micro::Event(kind, args) => {
                self.log(vcpu, kind, args, events);
                None
            }
            Micro::Op(op) => self.expand(vcpu, op, events),
            Micro::Poll(word) if word & 0x80 != 0 => {
                *self.frame(8 + (word & 3)) = 1;
                None
            }
            Micro::Poll(word) => {
                let again = if *self.frame(8 + (word & 3)) == 0 {
                    let [yields, _] = enter(nr::SCHED_YIELD);
                    let relax = Micro::Point(Point::UserRelax, [0; 2]);
                    let [exits, point] = exit(nr::SCHED_YIELD);
                    // A point without an event, as there are on the way in the kernel.
                    let quiet = Micro::Point(Point::SwitchMm, [0; 2]);
                    vec![yields, quiet, relax, exits, point, Micro::Poll(word)]
                } else {
                    enter(nr::MUNMAP).to_vec()
                };
                self.next(vcpu, &again);
                None
            }
            Micro::Synced => {
                let word = PENDING + vcpu;
                let left = self.now.words.0[word];
                if left == 0 {
                    self.log(vcpu, EventKind::ShootdownEnd, [1, 0], events);
                    return self.stop(Point::FlushSync, [1, 0]);
                }
                self.now.cpus[vcpu].todo.push_front(Micro::Synced);
                self.stop(Point::FlushWait, [word as u64 * 8, left])
            }
            Micro::Ack(from) => {
                let pending = &mut self.now.words.0[PENDING + from];
                if *pending & 1 << vcpu == 0 {
                    return None;
                }
                *pending &= !(1 << vcpu);
                *self.frame(7) += 100;
                let count = [7 << 12, *self.frame(7)];
                self.log(vcpu, EventKind::MapcountChange, count, events);
                self.log(vcpu, EventKind::IpiAck, [from as u64, 0], events);
                self.stop(Point::IpiAck, [from as u64, 0])
            }
            Micro::FirstUser => Some(Halt::FirstUser),
            Micro::End if vcpu == 0 => {
                // The program is over when all of it is.
                let mut rest = self.now.cpus.iter().skip(1);
                if rest.all(|cpu| cpu.over) {
                    return Some(Halt::Exited { status: 0 });
                }
                self.now.cpus[0].todo.push_back(Micro::End);
                self.stop(Point::UserRelax, [0; 2])
            }
            Micro::End => {
                self.now.cpus[vcpu].over = true;
                self.stop(Point::IdleEnter, [vcpu as u64, 0])
            }
        }
    }
}

fn enter(call: u64) -> [Micro; 2] {
    [
        Micro::Event(EventKind::SyscallEnter, [call, 0]),
        Micro::Point(Point::SyscallEnter, [call, 0]),
    ]
}

fn exit(call: u64) -> [Micro; 2] {
    [
        Micro::Event(EventKind::SyscallExit, [call, 0]),
        Micro::Point(Point::SyscallExit, [call, 0]),
    ]
}

impl Engine for Fake {
    fn kind(&self) -> EngineKind {
        EngineKind::Model
    }
    fn nr_vcpus(&self) -> usize {
        self.now.cpus.len()
    }
    fn run(
        &mut self,
        vcpu: usize,
        limit: Limit,
        events: &mut Vec<Event>,
    ) -> Result<Halt, EngineError> {
        let mut budget = limit.points.max(1);
        loop {
            let sends = events.len();
            let halt = loop {
                if let Some(halt) = self.advance(vcpu, events) {
                    break halt;
                }
            };
            let Halt::Point { point, .. } = halt else {
                return Ok(halt);
            };
            let cpu = &mut self.now.cpus[vcpu];
            cpu.open = point.is_wait() || point == Point::SyscallExit;
            cpu.passed += 1;
            budget -= 1;
            let sent = |event: &Event| event.kind == EventKind::IpiSend as u32;
            if budget == 0 || limit.traps.has(point) || events[sends..].iter().any(sent) {
                return Ok(halt);
            }
        }
    }
    fn set_window(&mut self, _: Window) -> Result<(), EngineError> {
        Err(EngineError::Unsupported("no instructions here".into()))
    }
    fn snapshot(&self) -> Option<Arc<Snapshot>> {
        None
    }
    fn points_passed(&self, vcpu: usize) -> u64 {
        self.lie.unwrap_or(self.now.cpus[vcpu].passed)
    }
    fn in_flight(&self, vcpu: usize) -> bool {
        self.now.cpus[vcpu].in_flight
    }
    fn deliver(&mut self, vcpu: usize) {
        let cpu = &mut self.now.cpus[vcpu];
        cpu.pending |= std::mem::take(&mut cpu.in_flight);
    }
    fn pending(&self, vcpu: usize) -> bool {
        self.now.cpus[vcpu].pending
    }
    fn save(&mut self) -> Result<(), EngineError> {
        for cpu in &mut self.now.cpus {
            cpu.passed = 0;
        }
        self.saved = self.now.clone();
        Ok(())
    }
    fn reset(&mut self) -> Result<(), EngineError> {
        self.runs += 1;
        self.now = self.saved.clone();
        Ok(())
    }
    fn arm(&mut self, _: usize, _: Failpoint, _: u32) {}
    fn memory(&self) -> &dyn PhysMem {
        &self.now.words
    }
    fn kernel_root(&self) -> Option<u64> {
        None
    }
    fn vcpu_facts(&self) -> Result<Vec<VcpuFacts>, EngineError> {
        Ok(vec![VcpuFacts::default(); self.now.cpus.len()])
    }
    fn symbols(&self) -> Option<&Symbols<'_>> {
        None
    }
    fn console(&self) -> String {
        String::new()
    }
    fn costs(&self) -> Costs {
        Costs::default()
    }
}

/// A driver at the start of the scripts.
pub(super) fn driver(scripts: &[Vec<Op>]) -> super::Driver<Fake> {
    driver_of(Fake::new(scripts))
}

/// A driver of this machine.
pub(super) fn driver_of(fake: Fake) -> super::Driver<Fake> {
    super::Driver::new(fake, super::Limits::default(), true).unwrap()
}

/// A schedule from `(actor, points)`: actor 8 + n is the wire to n.
pub(super) fn schedule(steps: &[(u8, u64)]) -> Schedule {
    let mut schedule = Schedule::default();
    for &(actor, points) in steps {
        let actor = match actor {
            0..8 => super::Actor::Vcpu(actor),
            wire => super::Actor::Wire(wire - 8),
        };
        schedule.push(actor, points);
    }
    schedule
}

/// Scripts whose locks are always dropped and that always end.
pub(super) fn scripts(cpus: usize, ops: usize) -> impl Strategy<Value = Vec<Vec<Op>>> {
    of_lines(harmless(), cpus, ops)
}

/// Scripts that may also find wrong values, wait for words that nobody sets, and lock in any order.
pub(super) fn any_scripts(cpus: usize, ops: usize) -> impl Strategy<Value = Vec<Vec<Op>>> {
    let (lock, word) = (0u8..2, 0u8..2);
    let harmful = prop_oneof![
        (0u8..3, 0u64..5).prop_map(|(f, v)| vec![Op::Fail(f, v)]),
        word.clone().prop_map(|w| vec![Op::Await(w)]),
        word.prop_map(|w| vec![Op::Signal(w)]),
        (lock, 0u8..3).prop_map(|(l, f)| vec![
            Op::Lock(l),
            Op::Lock(1 - l),
            Op::Double(f),
            Op::Unlock(1 - l),
            Op::Unlock(l),
        ]),
    ];
    of_lines(prop_oneof![harmless(), harmful], cpus, ops)
}

fn harmless() -> impl Strategy<Value = Vec<Op>> {
    let frame = 0u8..3;
    prop_oneof![
        (frame.clone(), 1u64..4).prop_map(|(f, v)| vec![Op::Set(f, v)]),
        frame.clone().prop_map(|f| vec![Op::Double(f)]),
        (frame.clone(), frame.clone()).prop_map(|(a, b)| vec![Op::Copy(a, b)]),
        (0u8..2, frame).prop_map(|(l, f)| vec![Op::Lock(l), Op::Double(f), Op::Unlock(l)]),
        (1u8..4).prop_map(|mask| vec![Op::Shoot(mask)]),
    ]
}

fn of_lines(
    line: impl Strategy<Value = Vec<Op>>,
    cpus: usize,
    lines: usize,
) -> impl Strategy<Value = Vec<Vec<Op>>> {
    let script = prop::collection::vec(line, 0..=lines).prop_map(|ops| ops.concat());
    prop::collection::vec(script, cpus..=cpus)
}
