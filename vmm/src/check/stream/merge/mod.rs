//! The event streams of vCPUs that ran at once, merged into one and judged by the monitors.
//!
//! With `stamp=ticket` every event carries a number that a locked add gave, so the moments at which events
//! were *recorded* are ordered for certain. What they tell of happened a little before or after:
//!
//! - most are recorded after the fact, on the vCPU that did it, before it does anything else that is
//!   recorded: the action lies between the ticket of that vCPU's event before and its own;
//! - some announce what follows (a lock is about to be released, a frame to be freed, a call to return): the action
//!   lies between its own ticket and that of the vCPU's next event ([`Action`]).
//!
//! Two actions are in order for certain where they are of one vCPU, or where the interval of one ends before that of
//! the other begins. This covers what synchronisation orders: a lock's release is announced and its
//! acquisition recorded afterwards, so of two sections under it all that the first did has lower tickets than all
//! that the second does; an acknowledgement is recorded after the flush and before the flusher is let go.
//! The relation is transitive, so the possible true orders are exactly its linear extensions.
//!
//! **A violation is reported only if every possible order has one.** Each monitor judges the order of the tickets.
//! Where that shows a violation, [`search`] tries the other orders of the events that have to do with it. If one
//! is clean, it may have been the true one: the violation is counted as undecided and the stream goes on from there.
//! So it is where there are too many orders to try. After a report the monitor is silent: what
//! follows from a broken state explains nothing.
//!
//! Monitors are judged apart from each other: the true order is clean for each of a correct kernel's, so none is
//! blamed wrongly. An order that is clean for one and another that is clean for the second are not asked to
//! be the same: that can only hide, not invent.
//!
//! Tickets have no gaps: one that is missing is a record that its vCPU has not finished, or one that was lost. Nothing
//! behind it is judged before it is there.
//!
//! The bounds: orders differ within the last [`RELEVANT`](search) events that have to do with the violation, and at most
//! [`ORDERS`](search) are tried. Where an event that has to do with it may have happened beyond these bounds, or there
//! are more orders, it is undecided and its monitor gives up. A vCPU may have recorded nothing for longer than is waited for,
//! because the host took its CPU away in between: if what it records then would have mattered, the report is taken back.

mod line;
mod search;
mod subject;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use abi::channel::{Event, EventKind};
use abi::layout::{ENTRIES_PER_TABLE, PAGE_SIZE};
use abi::objects::KernelRoot;

use super::{Monitor, Seen};
use crate::check::Violation;
use crate::memory::{OutOfRange, PhysMem};
use line::{Line, State};
use subject::Subject;

/// Actions behind the one that is judged which are known when it is: with it they may have happened in
/// another order.
const LOOKAHEAD: usize = 4096;
/// Actions that are kept after they were judged, for the search.
const KEPT: usize = 1 << 16;
/// Undecided violations that are kept.
const DOUBTFUL: usize = 64;
/// How many are taken in before they are judged.
const BATCH: usize = 1 << 15;

/// What an event tells of, and when it may have happened. Moments are tickets plus one: 0 is the start.
#[derive(Clone, Copy, Debug)]
struct Action {
    seen: Seen,
    /// The latest moment that it certainly comes after.
    after: u64,
    /// The earliest moment that it certainly comes before.
    before: u64,
}

/// The moment at which a ticket was drawn.
fn behind(ticket: u64) -> u64 {
    ticket.saturating_add(1)
}

impl Action {
    /// True where this happened before `other` for certain; both are in ring order where of one vCPU.
    fn precedes(&self, other: &Self) -> bool {
        if self.seen.vcpu == other.seen.vcpu {
            self.seen.event.stamp < other.seen.event.stamp
        } else {
            self.before <= other.after
        }
    }
}

/// True for events that are recorded before what they tell of: who observes it, has a later ticket. A call
/// or fault is over when the program goes on.
fn announces(event: &Event) -> bool {
    use EventKind as K;
    matches!(
        EventKind::from_id(event.kind),
        Some(
            K::LockRelease
                | K::FrameFree
                | K::VmaFree
                | K::MmDestroy
                | K::MmFree
                | K::LazyEnter
                | K::WalkBegin
                | K::SyscallExit
                | K::FaultExit
                | K::IpiSend
                | K::IpiAck
                | K::RcuExit
                | K::RcuRetire
                | K::RcuGpStart
                | K::RcuFree
        )
    )
}

/// The memory of a machine before its first instruction, as far as its kernel's objects go: nothing but where its
/// folios will be, which some locks are named by.
struct Newborn {
    page: u64,
    words: Box<[AtomicU64; ENTRIES_PER_TABLE]>,
}

impl Newborn {
    /// Of a kernel whose root is at `kernel_root`, in `memory` as it is by now. 0: its kernel never told.
    fn of(memory: &dyn PhysMem, kernel_root: u64) -> Self {
        let gpa = kernel_root.wrapping_add(offset_of!(KernelRoot, folios) as u64);
        let words = Box::new([const { AtomicU64::new(0) }; ENTRIES_PER_TABLE]);
        let page = gpa & !(PAGE_SIZE - 1);
        if kernel_root != 0
            && let Ok(now) = memory.table(page)
        {
            let at = (gpa % PAGE_SIZE / 8) as usize;
            words[at].store(now[at].load(Relaxed), Relaxed);
        }
        Self { page, words }
    }
}

impl PhysMem for Newborn {
    fn bytes(&self) -> u64 {
        0
    }
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), OutOfRange> {
        let len = buf.len() as u64;
        Err(OutOfRange { gpa, len })
    }
    fn table(&self, gpa: u64) -> Result<&[AtomicU64; ENTRIES_PER_TABLE], OutOfRange> {
        let len = PAGE_SIZE;
        let known = (gpa == self.page).then_some(&*self.words);
        known.ok_or(OutOfRange { gpa, len })
    }
}

/// A violation, and where it was seen.
#[derive(Debug)]
pub struct Shown {
    /// What every possible order violates, or, where it is undecided, the order of the tickets.
    pub violation: Violation,
    /// Ticket of the event that showed it; none where only the end did.
    pub ticket: Option<u64>,
    /// The last events that have to do with it, up to that one, in the order of their tickets.
    pub context: Vec<Seen>,
    doubt: Option<Doubt>,
}

impl Shown {
    /// One that nothing led to.
    pub(crate) fn at_start(violation: Violation) -> Self {
        Self {
            violation,
            ticket: None,
            context: Vec::new(),
            doubt: None,
        }
    }
}

/// What would cast doubt on a violation: an event that concerns it, recorded by a vCPU that had been silent for so
/// long that the event was not known when it was judged.
#[derive(Debug)]
struct Doubt {
    subject: Subject,
    /// The last ticket that was known.
    known: u64,
    /// Until when the action that showed it may have happened.
    until: u64,
}

impl Doubt {
    fn is_cast_by(&self, action: &Action) -> bool {
        action.seen.event.stamp > self.known
            && action.after < self.until
            && self.subject.concerns(action)
    }
}

/// What the merged streams showed.
#[derive(Debug, Default)]
pub struct Judged {
    /// What every possible order violates.
    pub violations: Vec<Shown>,
    /// Violations, by ID, of the order of the tickets that another possible order may not have.
    pub undecided: BTreeMap<&'static str, u64>,
    /// The first of the undecided ones: something else than the events may decide them.
    pub doubtful: Vec<Shown>,
    /// Events that were judged.
    pub events: u64,
    /// Events behind a ticket that never came: what they tell of is not judged.
    pub unjudged: u64,
    /// Violations for which there were too many orders to try, and their tickets: from there on that monitor
    /// has judged nothing.
    pub given_up: Vec<(&'static str, u64)>,
    /// Why a vCPU's stream makes no sense; nothing was judged from there on.
    pub broken: Option<String>,
}

impl Judged {
    /// Takes back what `action`, which is new, may explain.
    fn doubt(&mut self, action: &Action) {
        let cast = |shown: &mut Shown| {
            let doubt = shown.doubt.as_ref();
            doubt.is_some_and(|doubt| doubt.is_cast_by(action))
        };
        let taken_back: Vec<Shown> = self.violations.extract_if(.., cast).collect();
        for shown in taken_back {
            let id = shown.violation.id;
            self.given_up.push((id, shown.ticket.unwrap_or(u64::MAX)));
            self.leave_open(id, || shown);
        }
    }

    /// Another order may be clean of a violation of `id`, of which `shown` is made where it is kept.
    fn leave_open(&mut self, id: &'static str, shown: impl FnOnce() -> Shown) {
        *self.undecided.entry(id).or_default() += 1;
        if self.doubtful.len() < DOUBTFUL {
            self.doubtful.push(Shown {
                doubt: None,
                ..shown()
            });
        }
    }
}

/// Merges streams and judges them.
pub struct Merge {
    streams: Vec<Stream>,
    /// Actions that wait for those with the tickets before them.
    waiting: BTreeMap<u64, Action>,
    /// Actions in the order of their tickets, without gaps.
    actions: Vec<Action>,
    /// Ticket of the first of them.
    first: u64,
    /// How many of them were judged.
    judged_to: usize,
    lines: Vec<Line>,
    judged: Judged,
}

/// The last event of a vCPU.
#[derive(Clone, Copy, Default)]
struct Stream {
    ticket: Option<u64>,
    sequence: u64,
}

impl Merge {
    /// A merge of the streams of `vcpus` vCPUs from ticket `first` on, judged by `monitors`, which were
    /// [started](Monitor::start) from the state before.
    #[must_use]
    pub fn new(vcpus: usize, first: u64, monitors: Vec<Box<dyn Monitor>>) -> Self {
        Self {
            streams: vec![Stream::default(); vcpus],
            waiting: BTreeMap::new(),
            actions: Vec::new(),
            first,
            judged_to: 0,
            lines: monitors.into_iter().map(Line::new).collect(),
            judged: Judged::default(),
        }
    }

    /// A merge of everything since the first instruction of a machine, judged by every monitor there is.
    /// `memory` is as it is by now; no `kernel_root`: it is not known yet.
    #[must_use]
    pub fn from_boot(vcpus: usize, memory: &dyn PhysMem, kernel_root: Option<u64>) -> Self {
        let kernel_root = kernel_root.unwrap_or(0);
        let newborn = Newborn::of(memory, kernel_root);
        let mut monitors = super::all();
        for monitor in &mut monitors {
            monitor.start(&newborn, kernel_root, vcpus);
        }
        Self::new(vcpus, 0, monitors)
    }

    /// Takes the next events of `vcpu`: all of them, in order. Only what has enough behind it is judged.
    pub fn push(&mut self, vcpu: usize, events: &[Event]) {
        for event in events {
            if self.judged.broken.is_some() {
                return;
            }
            if let Err(why) = self.take(vcpu, event) {
                self.judged.broken = Some(why);
            }
        }
        self.sort();
        if self.actions.len() - self.judged_to >= BATCH + LOOKAHEAD {
            self.judge(self.actions.len() - LOOKAHEAD);
            self.forget();
        }
    }

    /// Judges all that was taken, as if nothing came behind it, and says what was found so far.
    pub fn judge_all(&mut self) -> &Judged {
        self.judge(self.actions.len());
        self.judged.unjudged = self.waiting.len() as u64;
        &self.judged
    }

    /// All streams are over and no vCPU is in the middle of anything: compares what the events told with `memory`.
    pub fn compare(&mut self, memory: &dyn PhysMem, kernel_root: u64) -> &Judged {
        self.judge_all();
        if self.judged.unjudged == 0 && self.judged.broken.is_none() {
            let state = State {
                memory,
                kernel_root,
            };
            for line in &mut self.lines {
                line.compare(&self.actions, &state, &mut self.judged);
            }
        }
        &self.judged
    }

    fn take(&mut self, vcpu: usize, event: &Event) -> Result<(), String> {
        let ticket = event.stamp;
        let end = self.end();
        let Some(stream) = self.streams.get_mut(vcpu) else {
            return Err(format!("there is no vCPU {vcpu}"));
        };
        let last = stream.ticket;
        if last.is_some() && event.sequence != stream.sequence.wrapping_add(1) {
            return Err(format!(
                "vCPU {vcpu} has lost events between its {}th and its {}th",
                stream.sequence, event.sequence
            ));
        }
        if last.is_some_and(|last| ticket <= last) || ticket < end {
            return Err(format!(
                "vCPU {vcpu} has an event with ticket {ticket} after one with a later ticket"
            ));
        }
        *stream = Stream {
            ticket: Some(ticket),
            sequence: event.sequence,
        };
        // What the last event has announced, has happened by now.
        if let Some(announced) = last.and_then(|last| self.action(last)) {
            announced.before = announced.before.min(behind(ticket));
        }
        let announces = announces(event);
        let action = Action {
            seen: Seen {
                vcpu,
                event: *event,
            },
            after: match (announces, last) {
                (true, _) => behind(ticket),
                (false, Some(last)) => behind(last),
                (false, None) => 0,
            },
            before: if announces { u64::MAX } else { behind(ticket) },
        };
        match self.waiting.insert(ticket, action) {
            Some(_) => Err(format!("two events have the ticket {ticket}")),
            None => Ok(()),
        }
    }

    /// The ticket behind the last action.
    fn end(&self) -> u64 {
        self.first.saturating_add(self.actions.len() as u64)
    }

    fn action(&mut self, ticket: u64) -> Option<&mut Action> {
        if ticket >= self.end() {
            return self.waiting.get_mut(&ticket);
        }
        let index = ticket.checked_sub(self.first)?;
        self.actions.get_mut(usize::try_from(index).ok()?)
    }

    /// Moves what has all tickets before it to the actions.
    fn sort(&mut self) {
        while let Some(action) = self.waiting.remove(&self.end()) {
            self.judged.doubt(&action);
            self.actions.push(action);
        }
    }

    fn judge(&mut self, end: usize) {
        for line in &mut self.lines {
            line.advance(&self.actions, end, &mut self.judged);
        }
        self.judged.events += (end - self.judged_to) as u64;
        self.judged_to = end;
    }

    /// Drops what no search looks at any more.
    fn forget(&mut self) {
        let spare = self.judged_to.saturating_sub(KEPT);
        // Every line must have taken exactly these first.
        if spare > 0 && self.lines.iter().all(|line| line.took(spare)) {
            self.actions.drain(..spare);
            self.first += spare as u64;
            self.judged_to -= spare;
            for line in &mut self.lines {
                line.forget(spare);
            }
        }
    }
}
