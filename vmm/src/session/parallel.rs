//! What only a run has in which vCPUs run at once: its merged event streams, and hangs in which everybody
//! spins.

use std::time::{Duration, Instant};

use abi::channel::{Event, EventKind};
use abi::param::TlbBackEnd;
use abi::point::{Point, Wait};

use super::Place;
use crate::check;
use crate::check::stream::merge::{Judged, Merge, Shown};
use crate::control::{Machine, MachineError, Stop};
use crate::explore::probe::{Shown as WrongValue, belongs};
use crate::explore::{WaitsFor, holds_up};
use crate::report::{StreamFacts, Violation, story};

/// All events that a monitor follows. One who spins would fill the ring with its waiting.
pub(super) const MONITORED: u64 =
    !(1 << EventKind::LockWait as u32 | 1 << EventKind::RcuGpWait as u32);
/// How long a vCPU has to get to its next point when everybody is asked where it stands, before it is looked at.
const ASK: Duration = Duration::from_millis(200);

/// The merged streams of a run, judged.
pub(super) struct Streams {
    /// By vCPU: what was taken before the kernel said where its objects are.
    early: Vec<Vec<Event>>,
    merge: Option<Merge>,
    /// Whose translations the program uses.
    tlb: TlbBackEnd,
}

impl Streams {
    /// Of a machine that has not run yet: from now on a full ring stops it.
    pub(super) fn of(machine: &mut Machine, tlb: TlbBackEnd) -> Self {
        machine.set_ring_exits(true);
        Self {
            early: vec![Vec::new(); machine.nr_vcpus()],
            merge: None,
            tlb,
        }
    }

    /// Takes what the rings hold.
    pub(super) fn drain(&mut self, machine: &mut Machine) -> Result<(), MachineError> {
        for (vcpu, early) in self.early.iter_mut().enumerate() {
            early.extend(machine.take_events(vcpu)?);
        }
        if self.merge.is_some() || machine.kernel_root().is_some() {
            self.merge(machine);
        }
        Ok(())
    }

    fn merge(&mut self, machine: &Machine) -> &mut Merge {
        let merge = self.merge.get_or_insert_with(|| {
            Merge::from_boot(machine.nr_vcpus(), machine.ram(), machine.kernel_root())
        });
        for (vcpu, early) in self.early.iter_mut().enumerate() {
            merge.push(vcpu, &std::mem::take(early));
        }
        merge
    }

    /// The streams are over. Where no vCPU is in the middle of anything (`at_rest`) the state of the machine is
    /// compared with what the events told. `wrong`: what the program found wrong.
    pub(super) fn end(
        mut self,
        machine: &Machine,
        at_rest: bool,
        wrong: &[WrongValue],
    ) -> (StreamFacts, Vec<Violation>) {
        let tlb = self.tlb;
        let merge = self.merge(machine);
        let judged = match machine.kernel_root().filter(|_| at_rest) {
            Some(root) => merge.compare(machine.ram(), root),
            None => merge.judge_all(),
        };
        tell(judged, |violation| belongs(violation, wrong, tlb))
    }
}

/// `confirms`: what the processor showed of a violation. That also decides what the order of the events left open.
fn tell<'a>(
    judged: &Judged,
    confirms: impl Fn(&check::Violation) -> Option<&'a WrongValue>,
) -> (StreamFacts, Vec<Violation>) {
    let mut facts = StreamFacts {
        events: judged.events,
        unjudged: judged.unjudged,
        undecided: judged.undecided.clone(),
        given_up: judged.given_up.clone(),
        broken: judged.broken.clone(),
    };
    let mut told: Vec<Violation> = Vec::new();
    for shown in &judged.violations {
        told.push(violation(shown, confirms(&shown.violation)));
    }
    for shown in &judged.doubtful {
        let id = shown.violation.id;
        let Some(wrong) = confirms(&shown.violation) else {
            continue;
        };
        // One of an ID is told, but whatever was shown is open no more.
        if told.iter().all(|other| other.id != id) {
            told.push(violation(shown, Some(wrong)));
        }
        let count = facts.undecided.entry(id).or_default();
        *count = count.saturating_sub(1);
        // A monitor gives up once. Where only the end showed what it gave up at, that has no ticket of its own.
        let at = |ticket| shown.ticket.is_none_or(|own| own == ticket);
        facts
            .given_up
            .retain(|(given_up, ticket)| !(*given_up == id && at(*ticket)));
    }
    facts.undecided.retain(|_, count| *count > 0);
    (facts, told)
}

fn violation(shown: &Shown, confirmed: Option<&WrongValue>) -> Violation {
    let place = shown.ticket.map_or(Place::End, Place::Event);
    let mut told = Violation::of_invariant(shown.violation.clone(), place);
    told.details.extend(confirmed.map(ToString::to_string));
    told.details.push("what led to it, by tickets:".into());
    for seen in &shown.context {
        if let Some(line) = story::line(seen) {
            let (ticket, vcpu) = (seen.event.stamp, seen.vcpu);
            told.details
                .push(format!("{ticket:>8}  vCPU {vcpu}  {line}"));
        }
    }
    told
}

/// Notices that nobody gets anywhere, though vCPUs spin and so look alive to the watchdog.
#[derive(Debug)]
pub(super) struct Lookout {
    patience: Duration,
    since: Instant,
    still: Duration,
    progress: Vec<u64>,
}

impl Lookout {
    pub(super) fn new(patience: Duration) -> Self {
        Self {
            patience,
            since: Instant::now(),
            still: Duration::ZERO,
            progress: Vec::new(),
        }
    }

    /// How long nobody may get anywhere.
    pub(super) fn patience(&self) -> Duration {
        self.patience
    }

    /// Longest time to run without a look: longer than the watchdog's, which begins anew with each run and finds the
    /// machine in which nothing moves at all.
    pub(super) fn interval(&self) -> Duration {
        self.patience + self.patience / 2
    }

    /// True where none of the counts has changed for as long as patience lasts.
    pub(super) fn is_suspicious(&mut self, progress: Vec<u64>) -> bool {
        if progress != self.progress {
            (self.progress, self.since) = (progress, Instant::now());
            self.still = Duration::ZERO;
        } else {
            self.still = self.since.elapsed();
        }
        self.still >= self.patience
    }

    /// How long nobody had got anywhere when it was looked last; zero where somebody just did.
    pub(super) fn still(&self) -> Duration {
        self.still
    }

    /// It was looked into and is none.
    pub(super) fn is_well(&mut self) {
        self.since = Instant::now();
    }
}

/// What asking everybody came to.
pub(super) enum Asked {
    /// Somebody can go on.
    Well,
    /// Something else has stopped the machine.
    Stopped(Stop),
    /// Nobody gets anywhere: who waits for what.
    Hang(Vec<WaitsFor>),
}

/// Lets every vCPU run to its next point, and says whether any of them can get further. A busy host may need up to
/// `patience` for that.
pub(super) fn ask(machine: &mut Machine, patience: Duration) -> Result<Asked, MachineError> {
    let before = machine.progress();
    // Not by their budgets: a vCPU counts its own down, and may be paused between its load and its store.
    let asked_for = machine.set_traps([u64::MAX; 4]);
    let standing = stand(machine, Instant::now() + patience);
    machine.set_traps(asked_for);
    Ok(match standing? {
        Err(stop) => Asked::Stopped(stop),
        Ok(_) if machine.progress() != before => Asked::Well,
        Ok(standing) => judge(&standing, |gpa| word(machine, gpa)).map_or(Asked::Well, Asked::Hang),
    })
}

/// Where a vCPU was last: a point with its arguments; none where it was at none.
type Standing = Option<(Point, [u64; 2])>;

/// Runs until each vCPU was at a point or is where none is, or `until`. `Err`: something else stopped the machine.
fn stand(
    machine: &mut Machine,
    until: Instant,
) -> Result<Result<Vec<Standing>, Stop>, MachineError> {
    let mut standing: Vec<Standing> = vec![None; machine.nr_vcpus()];
    let look = Instant::now() + ASK;
    while standing.iter().any(Option::is_none) {
        match machine.run_until(Some(ASK))? {
            Stop::Point { vcpu, point, args } => standing[vcpu] = Some((point, args)),
            Stop::Deadline => {}
            stop => return Ok(Err(stop)),
        }
        // One who spins stops all the time, however long another idles.
        let now = Instant::now();
        if now >= until || now >= look && passes_none(machine, &standing)? {
            break;
        }
    }
    Ok(Ok(standing))
}

/// True where each of the paused vCPUs that stands nowhere idles or runs its program: neither passes points.
fn passes_none(machine: &Machine, standing: &[Standing]) -> Result<bool, MachineError> {
    for (vcpu, standing) in standing.iter().enumerate() {
        if standing.is_none() {
            let state = machine.vcpu_state(vcpu)?;
            if !state.halted && state.cpl() == 0 {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Who waits for what, where nobody who stands at a point can go on and somebody spins. One who is at no point
/// idles or runs a program that does nothing else.
fn judge(standing: &[Standing], word: impl Fn(u64) -> u64) -> Option<Vec<WaitsFor>> {
    let (mut waits, nr) = (Vec::new(), standing.len());
    for (vcpu, standing) in standing.iter().enumerate() {
        let Some((point, args)) = standing else {
            continue;
        };
        let wait = point.wait(*args)?;
        let word = match wait {
            Wait::Lock { word: gpa, class } => Some(word(gpa)).filter(|it| !class.lets_in(*it))?,
            Wait::Acknowledged { word: gpa } => Some(word(gpa)).filter(|it| *it != 0)?,
            Wait::GracePeriod { first } => {
                let mask = holds_up(&word, nr, vcpu, first);
                Some(mask).filter(|it| *it != 0)?
            }
            Wait::Disk { request } => Some(word(request)).filter(|it| !Wait::disk_answered(*it))?,
            Wait::Interrupt | Wait::Anyone => 0,
        };
        waits.push(WaitsFor { vcpu, wait, word });
    }
    let spins = |wait: &WaitsFor| !matches!(wait.wait, Wait::Interrupt | Wait::Anyone);
    waits.iter().any(spins).then_some(waits)
}

/// A word of guest memory; one outside lets nobody in.
fn word(machine: &Machine, gpa: u64) -> u64 {
    machine.ram().read_value(gpa).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use abi::lock::LockClass;
    use abi::objects::{Cpu, CpuRcu};

    use super::*;
    use crate::boot::ProgramSpec;
    use crate::control::{Interrupts, MachineConfig};
    use crate::scenario::Disturb;

    const LOCK: [u64; 2] = [0x100, LockClass::PageTable as u64];
    const FLUSH: [u64; 2] = [0x200, 0b10];

    #[test]
    fn a_flush_that_nobody_acknowledges_is_a_hang_and_says_who_is_missing() {
        let standing = [
            Some((Point::FlushWait, FLUSH)),
            None,
            Some((Point::LockWait, LOCK)),
        ];
        let hung = |gpa| if gpa == 0x200 { 0b10 } else { 1 };
        let waits = judge(&standing, hung).expect("a hang");
        let told: Vec<String> = waits.iter().map(story::waits_for).collect();
        assert!(told[0].contains("mask 0b10"), "{told:?}");
        assert!(
            told[1].contains("page-table lock") && told[1].contains("vCPU 0"),
            "{told:?}"
        );
        // Acknowledged meanwhile, or the lock is free, or somebody is at a point of no wait.
        assert!(judge(&standing, |gpa| u64::from(gpa == 0x100)).is_none());
        assert!(judge(&standing, |gpa| u64::from(gpa == 0x200)).is_none());
        let works = [
            Some((Point::FlushWait, FLUSH)),
            Some((Point::PteClear, [0; 2])),
        ];
        assert!(judge(&works, hung).is_none());
        // A grace period: CPU 1 has been in the kernel since it began, or not any more.
        let pending = offset_of!(CpuRcu, pending) as u64;
        let seen = (offset_of!(CpuRcu, seen) + size_of::<u64>()) as u64;
        let watching = (size_of::<Cpu>() + offset_of!(CpuRcu, watching)) as u64;
        let grace = |now: u64| {
            move |gpa: u64| match gpa - 0x1000 {
                at if at == pending => 0b10,
                at if at == seen => 7,
                at if at == watching => now,
                _ => 0,
            }
        };
        let waits = [Some((Point::RcuWait, [0x1000, 0])), None];
        let told = judge(&waits, grace(7)).expect("a hang");
        assert_eq!(told[0].word, 0b10);
        assert!(judge(&waits, grace(9)).is_none());
        // All idle: the watchdog's business.
        assert!(judge(&[Some((Point::IdleEnter, [0; 2])), None], hung).is_none());
    }

    /// Asking must not depend on where in the code of a point the vCPUs happened to be paused.
    #[test]
    fn everybody_who_spins_is_found_however_often_one_asks() {
        ask_a_hung_machine(2, 300);
    }

    /// The third vCPU has no thread to run.
    #[test]
    fn everybody_who_spins_is_found_beside_one_who_idles() {
        ask_a_hung_machine(3, 3);
    }

    /// Two threads wait for each other: asks `times` where everybody stands.
    fn ask_a_hung_machine(vcpus: u32, times: usize) {
        let mut machine = Machine::new(MachineConfig {
            vcpus,
            interrupts: Interrupts::Controlled,
            program: ProgramSpec {
                name: "mprotect-race".into(),
                args: vec![("writers".into(), "1".into())],
                ..ProgramSpec::default()
            },
            disturb: Disturb {
                ipis: vec!["shootdown:nth20=drop".parse().expect("a rule")],
                ..Disturb::default()
            },
            // Nobody sleeps for an mmap_lock.
            cmdline: format!("lock_spins={}", u64::MAX),
            watchdog: Duration::from_secs(60),
            ..MachineConfig::default()
        })
        .unwrap_or_else(|error| panic!("this test boots a guest on /dev/kvm: {error}"));
        let mut lookout = Lookout::new(Duration::from_secs(2));
        while !lookout.is_suspicious(machine.progress()) {
            let stop = machine.run_until(Some(ASK)).expect("it runs");
            assert_eq!(stop, Stop::Deadline, "{}", machine.serial_output());
        }
        for _ in 0..times {
            match ask(&mut machine, Duration::from_secs(10)).expect("it runs") {
                Asked::Hang(waits) => assert_eq!(waits.len(), 2, "{waits:?}"),
                _ => panic!("no hang"),
            }
        }
    }

    /// A violation of `id` on `vcpu`, through the page at 0x5000.
    fn violated(id: &'static str, vcpu: usize) -> check::Violation {
        check::Violation {
            id,
            predicate: "",
            finding: check::Finding {
                where_: check::Place {
                    vcpu: Some(vcpu),
                    gva: Some(0x5000),
                    ..check::Place::default()
                },
                ..check::Finding::default()
            },
        }
    }

    /// What a program found there.
    fn wrong_value(vcpu: usize) -> WrongValue {
        WrongValue {
            vcpu,
            report: crate::control::ProbeReport {
                kind: abi::channel::ReportKind::ForeignFrame,
                gva: 0x5040,
                expected: 1,
                found: 2,
                task: 2,
            },
        }
    }

    #[test]
    fn what_the_processor_shows_is_attached_and_decides_what_is_open() {
        let open = |id, vcpu| Shown::at_start(violated(id, vcpu));
        let wrong = wrong_value(1);
        let judged = Judged {
            violations: vec![open("T-04", 1)],
            undecided: [("T-01", 3), ("T-07", 1)].into(),
            doubtful: vec![
                open("T-01", 0),
                open("T-01", 1),
                open("T-01", 1),
                open("T-07", 0),
            ],
            ..Judged::default()
        };
        let (facts, told) = tell(&judged, |it| {
            belongs(it, std::slice::from_ref(&wrong), TlbBackEnd::Hw)
        });
        let ids: Vec<_> = told.iter().map(|told| told.id.as_str()).collect();
        assert_eq!(ids, ["T-04", "T-01"]);
        for told in &told {
            let text = told.details.join("\n");
            assert!(text.contains("confirmed by hardware: vCPU 1"), "{text}");
        }
        // Both that hardware showed are decided, and only one of them is told.
        assert_eq!(facts.undecided, [("T-01", 1), ("T-07", 1)].into());
        let (facts, told) = tell(&judged, |_| None);
        assert_eq!((told.len(), facts.undecided["T-01"]), (1, 3));
        assert!(!told[0].details.join("").contains("hardware"));
    }

    #[test]
    fn a_monitor_has_not_given_up_at_what_the_processor_shows() {
        let open = |id, vcpu, ticket| {
            let mut shown = Shown::at_start(violated(id, vcpu));
            shown.ticket = ticket;
            shown
        };
        let given_up = |doubtful: Vec<Shown>| {
            let undecided = doubtful.iter().map(|shown| (shown.violation.id, 1));
            let judged = Judged {
                undecided: undecided.collect(),
                doubtful,
                given_up: vec![("T-01", 77), ("T-07", 78)],
                ..Judged::default()
            };
            let wrong = wrong_value(1);
            let (facts, told) = tell(&judged, |it| {
                belongs(it, std::slice::from_ref(&wrong), TlbBackEnd::Hw)
            });
            (facts.given_up, facts.undecided.len(), told.len())
        };
        let other = vec![("T-07", 78)];
        let at = given_up(vec![open("T-01", 1, Some(77))]);
        assert_eq!(at, (other.clone(), 0, 1));
        assert_eq!(given_up(vec![open("T-01", 1, None)]), (other, 0, 1));
        // Another one, or nobody's.
        let both = vec![("T-01", 77), ("T-07", 78)];
        let earlier = given_up(vec![open("T-01", 1, Some(50))]);
        assert_eq!(earlier, (both.clone(), 0, 1));
        assert_eq!(given_up(vec![open("T-01", 0, Some(77))]), (both, 1, 0));
    }

    #[test]
    fn only_counts_that_stand_still_long_enough_are_suspicious() {
        let mut lookout = Lookout::new(Duration::ZERO);
        assert!(lookout.is_suspicious(vec![1]));
        let mut lookout = Lookout::new(Duration::from_secs(3600));
        assert!(!lookout.is_suspicious(vec![1]) && !lookout.is_suspicious(vec![1]));
        lookout.is_well();
        assert_eq!(lookout.patience(), Duration::from_secs(3600));
    }
}
