//! An execution as a timeline for Perfetto or chrome://tracing: who runs, system calls, faults, locks, IPIs.
//!
//! The form is Chrome's Trace Event Format, the JSON array of events with `ph`. A serialised execution has no
//! times but an order: event `n` is drawn at microsecond `n`, its ticket. Each vCPU has two tracks, one of
//! tasks and what they are inside of, one of the locks that it holds or waits for.

use std::collections::HashMap;

use abi::channel::EventKind;
use abi::lock::LockClass;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::story;
use crate::check::stream::Seen;
use crate::explore::{Ending, Execution};

/// One record of the format.
#[derive(Debug, Serialize)]
struct Record {
    ph: &'static str,
    pid: u32,
    tid: usize,
    ts: u64,
    name: String,
    #[serde(skip_serializing_if = "str::is_empty")]
    cat: &'static str,
    /// Which flow.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<u64>,
    /// Scope of an instant: `t`hread or `g`lobal.
    #[serde(skip_serializing_if = "Option::is_none")]
    s: Option<&'static str>,
    /// The flow ends at the slice around it.
    #[serde(skip_serializing_if = "Option::is_none")]
    bp: Option<&'static str>,
    #[serde(skip_serializing_if = "Map::is_empty")]
    args: Map<String, Value>,
}

/// The timeline of `execution` on `vcpus` vCPUs. `about`: what it is of, shown with the trace.
#[must_use]
pub fn timeline(execution: &Execution, vcpus: usize, about: &[(&str, String)]) -> Value {
    let mut drawing = Drawing::new(vcpus);
    let times = times(&execution.events);
    for (seen, ts) in execution.events.iter().zip(&times) {
        drawing.event(seen, *ts);
    }
    let end = times.last().map_or(0, |last| last + 1);
    drawing.end(&execution.ending, end);
    let other: Map<String, Value> = about
        .iter()
        .map(|(name, value)| ((*name).to_owned(), value.clone().into()))
        .collect();
    json!({
        "displayTimeUnit": "ms",
        "otherData": other,
        "traceEvents": drawing.records,
    })
}

/// Where on the axis each event lies: its ticket, or its place where the stamps are no tickets (the guest
/// writes them).
fn times(events: &[Seen]) -> Vec<u64> {
    let stamps: Vec<u64> = events.iter().map(|seen| seen.event.stamp).collect();
    let rising = stamps.windows(2).all(|pair| pair[0] < pair[1]);
    match stamps.first() {
        Some(_) if !rising || stamps.last() == Some(&u64::MAX) => {
            (0..stamps.len() as u64).collect()
        }
        _ => stamps,
    }
}

/// Whose stack of calls it is: a task's, or that of an idle vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Who {
    Task(u32),
    Idle(usize),
}

/// What is open on a track.
#[derive(Clone, Debug)]
struct Slice {
    name: String,
    cat: &'static str,
    /// A lock's address.
    key: u64,
}

/// An IPI on its way.
#[derive(Debug)]
struct Sent {
    id: u64,
    from: usize,
    to: usize,
    vector: u64,
    at: u64,
    received: Option<u64>,
}

#[derive(Debug)]
struct Drawing {
    records: Vec<Record>,
    /// Who runs on each vCPU.
    running: Vec<Option<Who>>,
    /// What everybody is inside of; it is taken up again where they go on, on whatever vCPU.
    inside: HashMap<Who, Vec<Slice>>,
    locks: Vec<Vec<Slice>>,
    /// vCPUs in an IPI handler.
    handling: Vec<bool>,
    sent: Vec<Sent>,
    next_flow: u64,
}

/// Track of the tasks of a vCPU; that of its locks is the next one.
fn track(vcpu: usize) -> usize {
    2 * vcpu
}

impl Drawing {
    fn new(vcpus: usize) -> Self {
        let mut drawing = Self {
            records: Vec::new(),
            running: Vec::new(),
            inside: HashMap::new(),
            locks: Vec::new(),
            handling: Vec::new(),
            sent: Vec::new(),
            next_flow: 1,
        };
        drawing.name("process_name", 0, "stalemate");
        drawing.grow(vcpus);
        drawing
    }

    /// Tracks for `vcpus` vCPUs at least.
    fn grow(&mut self, vcpus: usize) {
        for vcpu in self.running.len()..vcpus {
            self.running.push(None);
            self.locks.push(Vec::new());
            self.handling.push(false);
            self.name("thread_name", track(vcpu), &format!("vCPU {vcpu}"));
            self.name(
                "thread_name",
                track(vcpu) + 1,
                &format!("vCPU {vcpu}: locks"),
            );
        }
    }

    fn name(&mut self, what: &str, tid: usize, name: &str) {
        let mut record = record("M", tid, 0, what.into(), "");
        record.args.insert("name".into(), name.into());
        self.records.push(record);
    }

    fn event(&mut self, seen: &Seen, ts: u64) {
        let Some(kind) = EventKind::from_id(seen.event.kind) else {
            return;
        };
        let (vcpu, args) = (seen.vcpu, seen.event.args);
        self.grow(vcpu + 1);
        if self.handling[vcpu] && !is_of_handler(kind) {
            self.handling[vcpu] = false;
            self.leave(vcpu, ts, "ipi");
        }
        let who = match seen.event.task {
            0 => Who::Idle(vcpu),
            task => Who::Task(task),
        };
        self.runs(vcpu, who, ts);
        let text = story::line(seen);
        let words = || text.clone().unwrap_or_else(|| kind.name().to_owned());
        match kind {
            EventKind::SyscallEnter => self.enter(vcpu, ts, "syscall", words()),
            EventKind::SyscallExit => self.leave(vcpu, ts, "syscall"),
            EventKind::FaultEnter => self.enter(vcpu, ts, "fault", words()),
            EventKind::FaultExit => self.leave(vcpu, ts, "fault"),
            EventKind::ShootdownBegin => self.enter(vcpu, ts, "shootdown", words()),
            EventKind::ShootdownEnd => self.leave(vcpu, ts, "shootdown"),
            EventKind::LockWait => self.waits(vcpu, ts, args),
            EventKind::LockAcquire => self.acquires(vcpu, ts, args),
            EventKind::LockRelease => self.unlocks(vcpu, ts, args[0]),
            EventKind::IpiSend => {
                self.instant(seen, kind, ts, words());
                for to in (0..64).filter(|to| args[1] & 1 << to != 0) {
                    self.sent.push(Sent {
                        id: self.next_flow,
                        from: vcpu,
                        to,
                        vector: args[0],
                        at: ts,
                        received: None,
                    });
                    self.next_flow += 1;
                }
            }
            EventKind::IpiReceive => {
                if std::mem::replace(&mut self.handling[vcpu], true) {
                    self.leave(vcpu, ts, "ipi");
                }
                self.enter(vcpu, ts, "ipi", format!("IPI {:#x}", args[0]));
                self.receives(vcpu, ts, args[0]);
            }
            EventKind::IpiAck => {
                self.instant(seen, kind, ts, words());
                self.finish(ts, |sent| sent.to == vcpu && sent.from as u64 == args[0]);
            }
            _ if text.is_some() => self.instant(seen, kind, ts, words()),
            _ => {}
        }
    }

    /// Draws who runs on `vcpu` from here on.
    fn runs(&mut self, vcpu: usize, who: Who, ts: u64) {
        if self.running[vcpu] == Some(who) {
            return;
        }
        self.stops(vcpu, ts);
        // A task that goes on elsewhere stopped here, whether or not anything said so.
        if let Some(elsewhere) = self.running.iter().position(|it| *it == Some(who)) {
            self.stops(elsewhere, ts);
        }
        self.running[vcpu] = Some(who);
        let name = match who {
            Who::Task(task) => format!("task {task}"),
            Who::Idle(_) => "idle".into(),
        };
        self.begin(track(vcpu), ts, &name, "task");
        for slice in self.inside.get(&who).cloned().unwrap_or_default() {
            self.begin(track(vcpu), ts, &slice.name, slice.cat);
        }
    }

    fn stops(&mut self, vcpu: usize, ts: u64) {
        let Some(who) = self.running[vcpu].take() else {
            return;
        };
        let depth = 1 + self.inside.get(&who).map_or(0, Vec::len);
        for _ in 0..depth {
            self.finish_slice(track(vcpu), ts);
        }
    }

    fn enter(&mut self, vcpu: usize, ts: u64, cat: &'static str, name: String) {
        self.begin(track(vcpu), ts, &name, cat);
        if let Some(who) = self.running[vcpu] {
            let slice = Slice { name, cat, key: 0 };
            self.inside.entry(who).or_default().push(slice);
        }
    }

    /// Ends the last slice of this category, and whatever is left open inside of it.
    fn leave(&mut self, vcpu: usize, ts: u64, cat: &'static str) {
        let Some(who) = self.running[vcpu] else {
            return;
        };
        let Some(open) = self.inside.get_mut(&who) else {
            return;
        };
        let Some(at) = open.iter().rposition(|slice| slice.cat == cat) else {
            return; // It began before the schedule did.
        };
        let ended = open.len() - at;
        open.truncate(at);
        for _ in 0..ended {
            self.finish_slice(track(vcpu), ts);
        }
    }

    fn waits(&mut self, vcpu: usize, ts: u64, args: [u64; 5]) {
        let waiting = |slice: &Slice| slice.key == args[0] && slice.cat == "wait";
        if !self.locks[vcpu].iter().any(waiting) {
            self.holds(
                vcpu,
                ts,
                "wait",
                format!("waits for {}", lock(args[1])),
                args[0],
            );
        }
    }

    fn acquires(&mut self, vcpu: usize, ts: u64, args: [u64; 5]) {
        let waiting = |slice: &Slice| slice.key == args[0] && slice.cat == "wait";
        if self.locks[vcpu].iter().any(waiting) {
            self.unlocks(vcpu, ts, args[0]);
        }
        self.holds(vcpu, ts, "lock", lock(args[1]), args[0]);
    }

    fn holds(&mut self, vcpu: usize, ts: u64, cat: &'static str, name: String, key: u64) {
        self.begin(track(vcpu) + 1, ts, &name, cat);
        self.locks[vcpu].push(Slice { name, cat, key });
    }

    /// Slices of a track nest and locks need not: those taken later end too, and begin anew.
    fn unlocks(&mut self, vcpu: usize, ts: u64, key: u64) {
        let Some(at) = self.locks[vcpu].iter().rposition(|slice| slice.key == key) else {
            return; // Taken before the schedule began.
        };
        let above = self.locks[vcpu].split_off(at + 1);
        self.locks[vcpu].pop();
        for _ in 0..=above.len() {
            self.finish_slice(track(vcpu) + 1, ts);
        }
        for slice in &above {
            self.begin(track(vcpu) + 1, ts, &slice.name, slice.cat);
        }
        self.locks[vcpu].extend(above);
    }

    /// Interrupts that wait with one vector are one.
    fn receives(&mut self, vcpu: usize, ts: u64, vector: u64) {
        for sent in &mut self.sent {
            if sent.to == vcpu && sent.vector == vector && sent.received.is_none() {
                sent.received = Some(ts);
            }
        }
        if vector != u64::from(guest_kernel::arch::Ipi::Shootdown as u8) {
            // Nobody acknowledges it.
            self.finish(ts, |sent| sent.to == vcpu && sent.vector == vector);
        }
    }

    /// Draws the arrows of the IPIs that end here.
    fn finish(&mut self, ts: u64, ends: impl Fn(&Sent) -> bool) {
        let (ended, left) = std::mem::take(&mut self.sent)
            .into_iter()
            .partition(|sent| ends(sent));
        self.sent = left;
        let ended: Vec<Sent> = ended;
        for sent in ended {
            let name = format!("IPI {:#x}", sent.vector);
            let mut step = |ph, tid, ts| {
                let mut record = record(ph, tid, ts, name.clone(), "ipi");
                record.id = Some(sent.id);
                record.bp = (ph == "f").then_some("e");
                self.records.push(record);
            };
            step("s", track(sent.from), sent.at);
            if let Some(received) = sent.received.filter(|received| *received < ts) {
                step("t", track(sent.to), received);
            }
            step("f", track(sent.to), ts);
        }
    }

    fn instant(&mut self, seen: &Seen, kind: EventKind, ts: u64, name: String) {
        let mut record = record("i", track(seen.vcpu), ts, name, kind.name());
        record.s = Some("t");
        for (name, value) in kind.arg_names().iter().zip(seen.event.args) {
            record
                .args
                .insert((*name).into(), format!("{value:#x}").into());
        }
        self.records.push(record);
    }

    fn begin(&mut self, tid: usize, ts: u64, name: &str, cat: &'static str) {
        self.records.push(record("B", tid, ts, name.into(), cat));
    }

    fn finish_slice(&mut self, tid: usize, ts: u64) {
        self.records.push(record("E", tid, ts, String::new(), ""));
    }

    fn end(&mut self, ending: &Ending, ts: u64) {
        for vcpu in 0..self.running.len() {
            self.stops(vcpu, ts);
            for _ in 0..self.locks[vcpu].len() {
                self.finish_slice(track(vcpu) + 1, ts);
            }
        }
        if !matches!(ending, Ending::Finished { .. } | Ending::ScheduleOver) {
            let text = story::ending(ending);
            let title = text.lines().next().unwrap_or_default().to_owned();
            let mut record = record("i", 0, ts, title, "failure");
            record.s = Some("g");
            record.args.insert("text".into(), text.into());
            self.records.push(record);
        }
        // Arrows are written when they end. Stable: what is open at one time keeps its order.
        self.records.sort_by_key(|record| record.ts);
    }
}

/// What an IPI handler does; anything else comes after it.
fn is_of_handler(kind: EventKind) -> bool {
    matches!(
        kind,
        EventKind::FlushLocal
            | EventKind::FlushAll
            | EventKind::IpiAck
            | EventKind::CpumaskClear
            | EventKind::Cr3Load
    )
}

fn lock(class: u64) -> String {
    LockClass::from_u64(class).map_or_else(|| "a lock".into(), |class| class.name().into())
}

fn record(ph: &'static str, tid: usize, ts: u64, name: String, cat: &'static str) -> Record {
    Record {
        ph,
        pid: 1,
        tid,
        ts,
        name,
        cat,
        id: None,
        s: None,
        bp: None,
        args: Map::new(),
    }
}

#[cfg(test)]
#[path = "timeline_tests.rs"]
mod tests;
