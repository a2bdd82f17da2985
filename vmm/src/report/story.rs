//! The story of an execution: who did what in which order, one column for each vCPU.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use abi::channel::{EventKind, access, cr3, rcu_object};
use abi::disk::{DiskOp, DiskStatus};
use abi::failpoint::Failpoint;
use abi::lock::LockClass;
use abi::objects::{FrameKind, Task, VmaRefs, vma_flags};
use abi::pte::{NonPresent, Pte, PteFlags};
use abi::syscall::{decode, nr};

use crate::check::stream::Seen;
use crate::explore::{Ending, Execution};
use crate::inspect::TaskView;

/// Most lines of a story; what lies further back is left out, and said to be.
const LINES: usize = 48;
/// Characters of a column.
const WIDTH: usize = 52;

/// Tells the last part of `execution`, with what went wrong at its end.
#[must_use]
pub fn tell(execution: &Execution, vcpus: usize) -> String {
    let subject = Subject::of(&execution.ending);
    let told = |counts: &dyn Fn(&Seen) -> bool| {
        let events = || execution.events.iter().filter(|seen| counts(seen));
        let one_mm = mms(events()) < 2;
        let line = |seen: &Seen| match mm_of(seen) {
            Some(mm) if !one_mm => Some(format!("mm {mm}: {}", line(seen)?)),
            _ => line(seen),
        };
        let lines = events().filter_map(|seen| Some((seen.vcpu, line(seen)?)));
        joined(lines.collect())
    };
    // A long story is told without what has nothing to do with its end, and none with every count of every page.
    let mut lines = told(&|seen| !is_count(seen) || subject.concerns(seen));
    let all = lines.len();
    if all > LINES {
        lines = told(&|seen| subject.concerns(seen));
    }
    let skipped = lines.len().saturating_sub(LINES);
    let mut text = String::new();
    let rule = |left: &str| {
        let columns: Vec<String> = (0..vcpus)
            .map(|vcpu| format!("{left} vCPU {vcpu} "))
            .map(|head| format!("{head:─<WIDTH$}"))
            .collect();
        columns.concat()
    };
    let _ = writeln!(text, "{}", rule("──"));
    if lines.len() < all {
        let hidden = all - lines.len();
        let _ = writeln!(
            text,
            "  ({hidden} lines about other pages and locks left out)"
        );
    }
    if skipped > 0 {
        let _ = writeln!(text, "  ({skipped} earlier lines left out)");
    }
    let mut before = None;
    for (vcpu, line) in &lines[skipped..] {
        let switched = before.is_some_and(|before| before != *vcpu);
        before = Some(*vcpu);
        let mark = if switched { "▸ " } else { "  " };
        let line: String = line.chars().take(WIDTH * 2).collect();
        let _ = writeln!(text, "{:indent$}{mark}{line}", "", indent = vcpu * WIDTH);
    }
    let _ = writeln!(text, "✘ {}", ending(&execution.ending));
    text
}

/// What a failure is about.
#[derive(Default)]
struct Subject {
    mm: Option<u64>,
    vcpu: Option<usize>,
    gva: Option<u64>,
    frame: Option<u64>,
}

impl Subject {
    fn of(ending: &Ending) -> Self {
        match ending {
            Ending::Violation(violation) => {
                let place = &violation.finding.where_;
                let object = place.object.filter(|(kind, _)| *kind == "frame");
                Self {
                    mm: place.mm,
                    vcpu: place.vcpu,
                    gva: place.gva,
                    frame: place.frame.or(object.map(|(_, gpa)| gpa >> 12)),
                }
            }
            Ending::Report { report, .. } => Self {
                gva: Some(report.gva & !0xfff),
                ..Self::default()
            },
            _ => Self::default(),
        }
    }

    fn concerns(&self, seen: &Seen) -> bool {
        let args = seen.event.args;
        let is_frame = |gpa: u64| self.frame == Some(gpa >> 12);
        match EventKind::from_id(seen.event.kind) {
            Some(EventKind::PteChange) => {
                Some(args[1]) == self.gva
                    || is_frame(Pte(args[3]).address())
                    || is_frame(Pte(args[4]).address())
            }
            Some(
                EventKind::FrameAlloc
                | EventKind::FrameFree
                | EventKind::MapcountChange
                | EventKind::RefcountChange,
            ) => is_frame(args[0]),
            Some(EventKind::TlbGen) => self.mm == Some(args[0]),
            // A vCPU that still is in the mask of the mm that it leaves is in the middle of a switch.
            Some(EventKind::CpumaskSet | EventKind::CpumaskClear) => {
                self.mm.is_some() && (self.mm == Some(args[0]) || self.vcpu == Some(seen.vcpu))
            }
            Some(EventKind::LockAcquire | EventKind::LockRelease) => false,
            Some(EventKind::VmaAttach | EventKind::VmaDetach | EventKind::VmaChange) => self
                .gva
                .is_some_and(|gva| (args[2]..args[3]).contains(&gva)),
            Some(_) => true,
            None => false,
        }
    }
}

/// Counts and masks, which change with every page and every switch.
fn is_count(seen: &Seen) -> bool {
    matches!(
        EventKind::from_id(seen.event.kind),
        Some(
            EventKind::MapcountChange
                | EventKind::RefcountChange
                | EventKind::TlbGen
                | EventKind::CpumaskSet
                | EventKind::CpumaskClear
        )
    )
}

/// The mm of an event whose line does not name it.
fn mm_of(seen: &Seen) -> Option<u64> {
    let is_of_mm = matches!(
        EventKind::from_id(seen.event.kind)?,
        EventKind::PteChange
            | EventKind::VmaAttach
            | EventKind::VmaDetach
            | EventKind::VmaChange
            | EventKind::FlushLocal
            | EventKind::ShootdownBegin
    );
    is_of_mm.then_some(seen.event.args[0])
}

/// How many mms those events are of.
fn mms<'a>(events: impl Iterator<Item = &'a Seen>) -> usize {
    events.filter_map(mm_of).collect::<BTreeSet<_>>().len()
}

/// Lines that say the same several times, as one with a count.
fn joined(lines: Vec<(usize, String)>) -> Vec<(usize, String)> {
    let mut all: Vec<(usize, String, u32)> = Vec::new();
    for (vcpu, line) in lines {
        match all.last_mut() {
            Some((v, l, count)) if *v == vcpu && *l == line => *count += 1,
            _ => all.push((vcpu, line, 1)),
        }
    }
    let told = |(vcpu, line, count): (usize, String, u32)| match count {
        1 => (vcpu, line),
        n => (vcpu, format!("{line} (×{n})")),
    };
    all.into_iter().map(told).collect()
}

/// How an execution ended, in words.
#[must_use]
pub fn ending(ending: &Ending) -> String {
    match ending {
        Ending::Finished { .. } => "nothing wrong was seen".into(),
        Ending::ScheduleOver => "the schedule ends here; nothing wrong was seen".into(),
        Ending::Violation(violation) => {
            let finding = &violation.finding;
            let mut text = format!("{}  {}", violation.id, finding.summary);
            for (name, value) in [("expected", &finding.expected), ("found", &finding.found)] {
                if !value.is_empty() {
                    let _ = write!(text, "\n    {name:<9} {value}");
                }
            }
            for detail in &finding.details {
                let _ = write!(text, "\n    {detail}");
            }
            let _ = write!(text, "\n    invariant {}", violation.predicate);
            text
        }
        Ending::Report { vcpu, report } => format!(
            "the program found, on vCPU {vcpu} at {:#x}: {}\n    expected  {:#x}\n    found     {:#x}",
            report.gva,
            report.kind.describe(),
            report.expected,
            report.found
        ),
        Ending::Deadlock(waits, asleep) => {
            let mut text = "deadlock: nobody can take a step".to_owned();
            for wait in waits {
                let _ = write!(text, "\n    vCPU {} {}", wait.vcpu, waits_for(wait));
            }
            text + &sleepers(asleep)
        }
        Ending::Livelock(standing, asleep) => {
            let mut text = "livelock: whoever can run only waits for the others".to_owned();
            for (vcpu, standing) in standing.iter().enumerate() {
                let point = standing.point.map_or("its start", |point| point.name());
                let _ = write!(text, "\n    vCPU {vcpu} stands at {point}");
            }
            text + &sleepers(asleep)
        }
        Ending::Crashed { vcpu, crash } => {
            let mut text = format!("the guest crashed on vCPU {vcpu}: {}", crash.reason);
            for detail in &crash.details {
                let _ = write!(text, "\n    {detail}");
            }
            text
        }
    }
}

/// The tasks that sleep, a line each.
fn sleepers(asleep: &[TaskView]) -> String {
    let line = |task| sleeps_for(task).map(|line| format!("\n    {line}"));
    asleep.iter().filter_map(line).collect()
}

/// That a task sleeps and what for; none of one that does not, or is a thread of the kernel with nothing to do.
pub(crate) fn sleeps_for(task: &TaskView) -> Option<String> {
    let what = task.sleeps_for()?;
    if task.is_in_wait_for(Task::WAITS_FOR_WORK) {
        return None;
    }
    let (id, process) = (task.id, task.process);
    Some(format!("task {id} of process {process} sleeps, {what}"))
}

/// What a vCPU waits for, after its name.
pub(crate) fn waits_for(wait: &crate::explore::WaitsFor) -> String {
    use abi::point::Wait;
    match wait.wait {
        Wait::Lock { word, class } => {
            let holder = match class {
                class if class.is_of_task() => format!("its word is {:#x}", wait.word),
                LockClass::VmaWrite => match VmaRefs::readers(wait.word) {
                    1 => "a fault holds it".into(),
                    readers => format!("{readers} faults hold it"),
                },
                LockClass::Reclaim => format!("{} vCPUs have folios in hand", wait.word),
                _ => format!("vCPU {} holds it", wait.word.wrapping_sub(1)),
            };
            format!("waits for the {} at {word:#x}; {holder}", class.name())
        }
        Wait::Acknowledged { .. } => format!(
            "waits for the vCPUs of the mask {:#b} to acknowledge its shootdown",
            wait.word
        ),
        Wait::GracePeriod { .. } => format!(
            "waits for a grace period, which the vCPUs of the mask {:#b} hold up: each was in the kernel when it \
             began and has not been quiescent since",
            wait.word
        ),
        Wait::Disk { request } => {
            format!("waits for the disk to answer the request at {request:#x}")
        }
        Wait::Interrupt => "idles, and nothing is in flight to it".into(),
        Wait::Anyone => "waits for another thread of its program".into(),
    }
}

/// One event in the words of the field; none where it says nothing to a person.
pub(crate) fn line(seen: &Seen) -> Option<String> {
    let args = seen.event.args;
    let task = seen.event.task;
    Some(match EventKind::from_id(seen.event.kind)? {
        EventKind::SyscallEnter => format!("task {task}: {}", call(args)),
        EventKind::SyscallExit => match decode(args[1]) {
            Ok(value) => format!("{} returns {value:#x}", name(args[0])),
            Err(errno) => format!("{} fails: {errno}", name(args[0])),
        },
        EventKind::FaultEnter => format!(
            "task {task}: {} fault at {:#x}",
            if args[1] & 2 != 0 { "write" } else { "read" },
            args[0]
        ),
        EventKind::FaultExit => format!("fault at {:#x} handled", args[0]),
        EventKind::PteChange if args[2] > 1 => {
            let what = if Pte(args[4]).is_present() {
                "links"
            } else {
                "unlinks"
            };
            let table = if Pte(args[4]).is_present() {
                args[4]
            } else {
                args[3]
            };
            format!(
                "{what} table {:#x} (level {}, {:#x})",
                Pte(table).address(),
                args[2],
                args[1]
            )
        }
        EventKind::PteChange => format!("PTE {:#x}: {} → {}", args[1], pte(args[3]), pte(args[4])),
        EventKind::Cr3Load => match args[1] {
            0 => "loads CR3: the kernel's own tables".into(),
            mm => {
                let (pcid, keeps) = (args[0] & cr3::PCID, args[0] & cr3::NO_FLUSH != 0);
                let cached = if keeps { "kept" } else { "flushed" };
                match pcid {
                    0 => format!("loads CR3: mm {mm} (TLB {cached})"),
                    _ => format!("loads CR3: mm {mm} (PCID {pcid}, {cached})"),
                }
            }
        },
        EventKind::FlushLocal => format!("INVLPG {:#x}..{:#x}", args[1], args[2]),
        EventKind::FlushAll => format!("flushes its TLB (mm {})", args[0]),
        EventKind::ShootdownBegin => format!("shootdown of vCPUs {}", mask(args[3])),
        EventKind::ShootdownEnd => "shootdown acknowledged by all".into(),
        EventKind::IpiSend => format!("IPI {:#x} → vCPUs {}", args[0], mask(args[1])),
        EventKind::IpiReceive => format!("takes IPI {:#x}", args[0]),
        EventKind::IpiAck => format!("acknowledges vCPU {}'s shootdown", args[0]),
        EventKind::FrameFree => format!("frees frame {:#x} ({})", args[0] >> 12, kind(args[2])),
        EventKind::FrameAlloc => {
            format!("allocates frame {:#x} ({})", args[0] >> 12, kind(args[2]))
        }
        EventKind::MapcountChange => count("mapcount", args),
        EventKind::RefcountChange => count("refcount", args),
        EventKind::TlbGen => format!("TLB gen of mm {} is {} now", args[0], args[1]),
        EventKind::CpumaskSet => format!("joins the cpumask of mm {}", args[0]),
        EventKind::CpumaskClear => format!("leaves the cpumask of mm {}", args[0]),
        EventKind::VmaAttach => format!("maps {:#x}..{:#x}", args[2], args[3]),
        EventKind::VmaDetach => format!("unmaps {:#x}..{:#x}", args[2], args[3]),
        EventKind::VmaChange => format!(
            "its VMA is {:#x}..{:#x} now, {}",
            args[2],
            args[3],
            rights(args[4])
        ),
        EventKind::LockWait => format!("waits for the {}", lock(args[1])),
        EventKind::LockWake => match args[2] {
            1 => format!("wakes a task that sleeps for the {}", lock(args[1])),
            tasks => format!("wakes {tasks} tasks that sleep for the {}", lock(args[1])),
        },
        EventKind::LockAcquire if is_telling(args[1]) => format!("takes the {}", lock(args[1])),
        EventKind::LockRelease if is_telling(args[1]) => format!("drops the {}", lock(args[1])),
        EventKind::Switch => format!("switches: task {} → {}", args[0], args[1]),
        EventKind::LazyEnter => format!("goes lazy in mm {}", args[0]),
        EventKind::LazyLeave => format!("leaves lazy mode in mm {}", args[0]),
        EventKind::Access => {
            let verb = if args[3] & access::WRITE != 0 {
                "writes"
            } else {
                "reads"
            };
            if args[3] & access::FAULT != 0 {
                format!("task {task}: {verb} {:#x}: refused", args[0])
            } else {
                let stale = if args[3] & access::STALE != 0 {
                    "  ← STALE"
                } else {
                    ""
                };
                format!(
                    "task {task}: {verb} {:#x} = frame {:#x}{stale}",
                    args[0],
                    args[1] >> 12
                )
            }
        }
        EventKind::RcuEnter => "enters an RCU read section".into(),
        EventKind::RcuExit => "leaves the RCU read section".into(),
        EventKind::RcuRetire => format!("retires the {} {:#x}", rcu_object::name(args[1]), args[0]),
        EventKind::RcuFree => format!(
            "frees the retired {} {:#x}",
            rcu_object::name(args[1]),
            args[0]
        ),
        EventKind::RcuGpStart => format!("grace period {} begins", args[0]),
        EventKind::RcuGpWait => {
            format!("grace period {} waits for vCPUs {}", args[0], mask(args[1]))
        }
        EventKind::RcuGpEnd => format!("grace period {} is over", args[0]),
        EventKind::FolioSplit => format!("splits the folio at frame {:#x}", args[0] >> 12),
        EventKind::Charge => {
            let [frame, group, old, pages] = [args[0] >> 12, args[1], args[2], args[3]];
            match (frame, group, old) {
                (0, ..) => format!("memory group {group} has no room for {pages} more"),
                (_, 0, _) => format!("uncharges frame {frame:#x} from memory group {old}"),
                (_, _, 0) => format!("charges frame {frame:#x} to memory group {group}"),
                _ => {
                    format!("charges frame {frame:#x} to memory group {group} and no longer {old}")
                }
            }
        }
        EventKind::Pin if args[1] > args[2] => {
            format!("pins frame {:#x} for {:#x}", args[0] >> 12, args[3])
        }
        EventKind::Pin => format!("unpins frame {:#x}", args[0] >> 12),
        EventKind::DiskSubmit => {
            let (way, gpa) = (disk_op(args[0]), args[2]);
            format!(
                "asks the disk to {way} sector {}, frame {:#x}",
                args[1],
                gpa >> 12
            )
        }
        EventKind::DiskDone => {
            let status = u32::try_from(args[3]).ok().and_then(DiskStatus::from_u32);
            let status = status.map_or("?".into(), |it| format!("{it:?}").to_lowercase());
            format!("the disk has answered: {status}")
        }
        EventKind::FailpointHit => {
            let failpoint = Failpoint::from_id(args[0]);
            format!("failpoint {} fails", failpoint.map_or("?", |it| it.name()))
        }
        _ => return None,
    })
}

fn count(what: &str, [gpa, new, old, ..]: [u64; 5]) -> String {
    format!("frame {:#x}: {what} {old} → {new}", gpa >> 12)
}

fn disk_op(op: u64) -> &'static str {
    match u32::try_from(op).ok().and_then(DiskOp::from_u32) {
        Some(DiskOp::Read) => "read",
        Some(DiskOp::Write) => "write",
        None => "?",
    }
}

/// `rwx`, as far as `flags` permit it.
fn rights(flags: u64) -> String {
    let known = [
        (vma_flags::READ, 'r'),
        (vma_flags::WRITE, 'w'),
        (vma_flags::EXEC, 'x'),
    ];
    let letter = |(flag, letter)| if flags & flag != 0 { letter } else { '-' };
    known.map(letter).into_iter().collect()
}

/// Locks whose order an MM engineer asks for first.
fn is_telling(class: u64) -> bool {
    matches!(
        LockClass::from_u64(class),
        Some(
            LockClass::MmapRead
                | LockClass::MmapWrite
                | LockClass::VmaRead
                | LockClass::VmaWrite
                | LockClass::PageTable
        )
    )
}

fn lock(class: u64) -> &'static str {
    LockClass::from_u64(class).map_or("unknown lock", LockClass::name)
}

fn kind(kind: u64) -> String {
    let kind = FrameKind::from_u64(kind);
    kind.map_or("?".into(), |kind| format!("{kind:?}").to_lowercase())
}

fn mask(mask: u64) -> String {
    let vcpus = (0..64).filter(|vcpu| mask & 1 << vcpu != 0);
    vcpus
        .map(|vcpu| vcpu.to_string())
        .collect::<Vec<_>>()
        .join(",")
}

fn pte(value: u64) -> String {
    let pte = Pte(value);
    if !pte.is_present() {
        return match pte.non_present() {
            Some(NonPresent::Swap { slot, .. }) => format!("swap slot {slot:#x}"),
            Some(NonPresent::Migration { gpa, .. }) => format!("migration of {:#x}", gpa >> 12),
            None => "none".into(),
        };
    }
    let writable = if pte.flags().contains(PteFlags::WRITE) {
        "RW"
    } else {
        "RO"
    };
    format!("{:#x} {writable}", pte.address() >> 12)
}

fn name(number: u64) -> String {
    let found = nr::ALL.iter().find(|(_, other)| *other == number);
    found.map_or(format!("call {number}"), |(name, _)| name.to_lowercase())
}

fn call(args: [u64; 5]) -> String {
    let name = name(args[0]);
    match args[0] {
        nr::MMAP
        | nr::MUNMAP
        | nr::MPROTECT
        | nr::MREMAP
        | nr::MADVISE
        | nr::MLOCK
        | nr::MUNLOCK
        | nr::MSYNC => {
            format!("{name} {:#x} +{:#x}", args[1], args[2])
        }
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use abi::channel::Event;
    use abi::pte::PteFlags;

    use super::*;
    use crate::check::{Finding, Place, Violation};
    use crate::explore::Schedule;

    const PAGE: u64 = 0x20_0000;

    /// The story that `events` have where a finding about page 0x200000 of mm 1, frame 0x5 and vCPU 1 ends them.
    fn story(events: &[(usize, EventKind, [u64; 5])]) -> String {
        let finding = Finding {
            where_: Place {
                mm: Some(1),
                vcpu: Some(1),
                gva: Some(PAGE),
                frame: Some(5),
                ..Place::default()
            },
            ..Finding::default()
        };
        let seen = |&(vcpu, kind, args): &(usize, EventKind, [u64; 5])| {
            let event = Event {
                kind: kind as u32,
                args,
                ..Event::default()
            };
            Seen { vcpu, event }
        };
        let execution = Execution {
            schedule: Schedule::default(),
            fails: Vec::new(),
            ending: Ending::Violation(Box::new(Violation {
                id: "T-01",
                predicate: "",
                finding,
            })),
            events: events.iter().map(seen).collect(),
        };
        tell(&execution, 2)
    }

    fn pte(mm: u64) -> (usize, EventKind, [u64; 5]) {
        let entry = Pte::new(0x5000, PteFlags::PRESENT).0;
        (0, EventKind::PteChange, [mm, PAGE, 1, 0, entry])
    }

    #[test]
    fn counts_are_told_of_the_frame_and_the_mm_that_the_end_is_about() {
        let [gen_of, set, clear] = [
            EventKind::TlbGen,
            EventKind::CpumaskSet,
            EventKind::CpumaskClear,
        ];
        let story = story(&[
            (0, EventKind::RefcountChange, [0x5000, 1, 2, 0, 0]),
            (0, EventKind::MapcountChange, [0x5000, 0, 1, 0, 0]),
            (0, EventKind::RefcountChange, [0x6000, 7, 8, 0, 0]),
            (0, gen_of, [1, 4, 0, 0, 0]),
            (0, gen_of, [2, 9, 0, 0, 0]),
            (1, set, [1, 0, 0, 0, 0]),
            (1, clear, [2, 0, 0, 0, 0]),
            (0, set, [2, 0, 0, 0, 0]),
        ]);
        for said in [
            "frame 0x5: refcount 2 → 1",
            "frame 0x5: mapcount 1 → 0",
            "TLB gen of mm 1 is 4 now",
            "joins the cpumask of mm 1",
            "leaves the cpumask of mm 2",
        ] {
            assert!(story.contains(said), "{said}: {story}");
        }
        for other in ["frame 0x6", "TLB gen of mm 2", "joins the cpumask of mm 2"] {
            assert!(!story.contains(other), "{other}: {story}");
        }
    }

    #[test]
    fn the_mm_is_named_where_there_are_two() {
        assert!(!story(&[pte(1)]).contains("mm 1: PTE"));
        let both = story(&[pte(1), pte(2)]);
        assert!(
            both.contains("mm 1: PTE") && both.contains("mm 2: PTE"),
            "{both}"
        );
    }
}
