//! `stalemate inspect`: pauses a scenario in the middle, shows what is inside, and checks it.

use std::fmt::Write as _;
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::args::Inspect;
use super::exit::Exit;
use super::failure::Failure;
use super::output::Output;
use super::run::{check_disturb, facts, load, override_with, prepare, refuse_fails, seed};
use super::{interrupt, lab};
use crate::check::Outcome;
use crate::inspect::render::{
    FrameReport, MachineReport, TreeReport, folio_behind, frame, machine, tree,
};
use crate::inspect::walk::USER_HALF;
use crate::inspect::{Snapshot, Walk};
use crate::report::verdict::{Detail, Paint, format_time};
use crate::report::{HostFacts, SCHEMA, ScenarioFacts};
use crate::scenario::Scenario;
use crate::session::{self, Halt, Live, Place, Reached, Until};

/// The JSON of `inspect`.
#[derive(Serialize)]
struct Inspected {
    schema: u32,
    kind: &'static str,
    stalemate: &'static str,
    command: Vec<String>,
    host: HostFacts,
    scenario: ScenarioFacts,
    stopped_at: StoppedAt,
    exit_code: u8,
    #[serde(flatten)]
    seen: Seen,
    serial: String,
}

#[derive(Clone, Serialize)]
struct StoppedAt {
    /// Name of the scheduling point, null after a time.
    point: Option<&'static str>,
    /// vCPU that reached it.
    vcpu: Option<u32>,
    /// Which passage it was.
    nth: Option<u64>,
    /// Time from the first user instruction, where that was asked for.
    after_ns: Option<u64>,
}

/// Everything that was asked for.
#[derive(Serialize)]
struct Seen {
    machine: MachineReport,
    trees: Vec<Tree>,
    #[serde(skip_serializing_if = "Option::is_none")]
    walk: Option<Walk>,
    #[serde(skip_serializing_if = "Option::is_none")]
    frame: Option<FrameReport>,
    check: Outcome,
}

#[derive(Serialize)]
struct Tree {
    mm: u64,
    #[serde(flatten)]
    tree: TreeReport,
}

pub(super) fn inspect(name: &Path, options: &Inspect, output: &Output) -> Result<Exit, Failure> {
    let mut scenario = load(name)?;
    override_with(&mut scenario, &options.machine);
    refuse_fails(&scenario)?;
    check_disturb(&scenario)?;
    seed(&mut scenario, options.machine.seed, 0);
    check_vcpu(options, &scenario)?;
    let out = prepare(&options.out, output)?;
    let host = session::host()?;
    let kernel = options.machine.kernel.as_deref();

    let mut live = Live::boot(&scenario, kernel, interrupt::on_ctrl_c())
        .map_err(|error| Failure::of_machine(error, kernel))?;
    let place = match session::advance(&mut live, until(options), scenario.timeout)? {
        Reached::At(Some((vcpu, point))) => Place::Point(vcpu, point),
        Reached::At(None) => Place::Anywhere,
        Reached::Ended { halt, passages } => {
            return ended(&halt, passages, options, &scenario, output);
        }
    };
    let seen = see(&live, place, options)?;
    let exit = if seen.check.is_clean() {
        Exit::Held
    } else {
        Exit::Violation
    };
    let inspected = Inspected {
        schema: SCHEMA,
        kind: "inspect",
        stalemate: env!("CARGO_PKG_VERSION"),
        command: lab::own_command(),
        host,
        scenario: facts(&scenario, options.machine.seed),
        stopped_at: stopped_at(place, options),
        exit_code: exit.code(),
        seen,
        serial: live.serial(),
    };
    if let Some(out) = &out {
        let report = render(&inspected, Paint::Plain, Detail::Full);
        out.write(&inspected, &report, &inspected.serial)?;
    }
    output.json(&inspected)?;
    output.say(&render(&inspected, output.paint, output.detail));
    Ok(exit)
}

fn check_vcpu(options: &Inspect, scenario: &Scenario) -> Result<(), Failure> {
    match options.vcpu {
        Some(vcpu) if vcpu >= scenario.vcpus => Err(Failure::Usage {
            problem: format!("--vcpu: the machine has no vCPU {vcpu}"),
            help: format!("vCPUs are 0 to {}", scenario.vcpus - 1),
        }),
        _ => Ok(()),
    }
}

fn until(options: &Inspect) -> Until {
    match (options.at, options.after) {
        (Some(at), _) => Until::Passage {
            point: at.point,
            nth: at.nth,
            vcpu: options.vcpu,
        },
        (None, after) => Until::Elapsed(after.unwrap_or_default()),
    }
}

fn stopped_at(place: Place, options: &Inspect) -> StoppedAt {
    let (vcpu, point) = match place {
        Place::Point(vcpu, point) => (Some(vcpu), Some(point.name())),
        Place::Anywhere | Place::End | Place::Event(_) => (None, None),
    };
    let after = options
        .after
        .map(|after| u64::try_from(after.as_nanos()).unwrap_or(u64::MAX));
    StoppedAt {
        point,
        vcpu,
        nth: options.at.map(|at| at.nth),
        after_ns: after,
    }
}

/// The run ended before the place was reached.
fn ended(
    halt: &Halt,
    passages: u64,
    options: &Inspect,
    scenario: &Scenario,
    output: &Output,
) -> Result<Exit, Failure> {
    match halt {
        Halt::Crashed(crash) => {
            output.say(&format!(
                "{} before the place to look at was reached\n\n{}\n",
                output.paint.red("✘ GUEST FAILED"),
                crash.text
            ));
            Ok(Exit::GuestFailed)
        }
        Halt::Interrupted => Ok(Exit::Interrupted),
        _ => {
            let what = match options.at {
                Some(at) => format!(
                    "'{}' ended before passage {} of {}: it was passed {passages} times",
                    scenario.name,
                    at.nth,
                    at.point.name()
                ),
                None => format!("'{}' ended before that time", scenario.name),
            };
            Err(Failure::Usage {
                problem: what,
                help: "look earlier, or give the program more to do".into(),
            })
        }
    }
}

fn see(live: &Live, place: Place, options: &Inspect) -> Result<Seen, Failure> {
    let snapshot = live.snapshot()?;
    let vcpus = live.vcpus(place)?;
    let memory = live.memory();
    let mms = mms(&snapshot, options)?;
    let only_frames = options.range.is_none()
        && options.mm.is_none()
        && (options.gva.or(options.frame).is_some());
    let range = options
        .range
        .map_or(USER_HALF, |(start, end)| start..=end - 1);
    let trees = if only_frames {
        Vec::new()
    } else {
        trees(live, &snapshot, &mms, range)
    };
    let behind = options
        .gva
        .and_then(|gva| folio_behind(memory, &snapshot, *mms.first()?, gva));
    let (walk, folio) = match behind {
        Some((walk, folio)) => (Some(walk), folio),
        None => (None, None),
    };
    let mut report = machine(memory, &snapshot, &vcpus);
    report.name_addresses(live.namer());
    Ok(Seen {
        machine: report,
        trees,
        walk,
        frame: options
            .frame
            .map(|gpa| frame(memory, &snapshot, gpa))
            .or(folio),
        check: live.outcome(&snapshot, &vcpus, place),
    })
}

/// The mms that are asked for, the most interesting first.
fn mms(snapshot: &Snapshot, options: &Inspect) -> Result<Vec<u64>, Failure> {
    let all: Vec<u64> = snapshot.mms.iter().map(|mm| mm.id).collect();
    match options.mm {
        None => Ok(all),
        Some(id) if all.contains(&id) => Ok(vec![id]),
        Some(id) => {
            let known: Vec<String> = all.iter().map(ToString::to_string).collect();
            Err(Failure::Usage {
                problem: format!("--mm: there is no mm {id} here"),
                help: format!("there is {}", known.join(", ")),
            })
        }
    }
}

fn trees(live: &Live, snapshot: &Snapshot, mms: &[u64], range: RangeInclusive<u64>) -> Vec<Tree> {
    mms.iter()
        .filter_map(|id| snapshot.mm(*id))
        .map(|mm| Tree {
            mm: mm.id,
            tree: tree(live.memory(), mm.pgd, range.clone()),
        })
        .collect()
}

fn render(inspected: &Inspected, paint: Paint, detail: Detail) -> String {
    let stop = &inspected.stopped_at;
    let place = match (stop.point, stop.vcpu, stop.nth) {
        (Some(point), Some(vcpu), Some(nth)) => {
            format!("at {point} on vCPU {vcpu} (passage {nth})")
        }
        _ => {
            let after = Duration::from_nanos(stop.after_ns.unwrap_or(0));
            format!("{} after its first user instruction", format_time(after))
        }
    };
    let mut text = format!(
        "{} {} {place}\n",
        paint.bold("paused"),
        inspected.scenario.name
    );
    if detail == Detail::Headline {
        return text;
    }
    let seen = &inspected.seen;
    let _ = write!(text, "\n{}", seen.machine);
    for tree in &seen.trees {
        let _ = write!(
            text,
            "\n{}\n{}",
            paint.bold(&format!("Page tables of mm {}", tree.mm)),
            tree.tree
        );
    }
    if let Some(walk) = &seen.walk {
        let _ = write!(text, "\n{}\n{walk}\n", paint.bold("Walk"));
    }
    if let Some(frame) = &seen.frame {
        let _ = write!(text, "\n{}\n{frame}", paint.bold("Frame"));
    }
    let _ = write!(text, "\n{}\n{}", paint.bold("Invariants"), seen.check);
    text
}
