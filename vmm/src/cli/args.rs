//! The command line: names, values and help texts. `docs/cli.md` is its manual.

use std::path::PathBuf;
use std::time::Duration;

use abi::boot::InterruptMode;
use abi::bug::Bug;
use abi::failpoint::Failpoint;
use abi::point::Point;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::engine::Window;
use crate::scenario::disturb::{Delay, IpiFault};
use crate::scenario::{CheckWhen, Fail, values};

const ABOUT: &str = "Boots a kernel that owns its whole memory-management stack, pauses it, looks inside, and judges";

const EXIT_CODES: &str = "\
Exit codes:
  0  all invariants held          3  this host cannot (says what is missing, and how to get it)
  1  a violation was found        4  the guest crashed, hung or did not finish
  2  bad input or usage           5  internal error";

const EXAMPLES: &str = "\
Examples:
  stalemate doctor                               can this host run anything, and what can it show?
  stalemate list scenarios                       the questions that are ready to be asked
  stalemate run smoke                            boot, run, check, verdict
  stalemate run unmap-race --vcpus 4 --runs 20   twenty times, until one is not clean
  stalemate inspect smoke --at pte-install:3     pause in the middle and look
  stalemate record -o ls.trace -- ls -l /        record a real program's memory calls
  scripts/lab -- run unmap-race                  the same without KVM, with TLBs that can be stale";

const RUN_EXAMPLES: &str = "\
Examples:
  stalemate run smoke --interrupts controlled --vcpus 1
  stalemate run unmap-race --bug shootdown-skip-remote --param flush_ceiling=1
  stalemate run smoke --check every-point --json result.json
  stalemate run trace-python3 --vcpus 4 --out results/python3
  stalemate run unmap-race --monitor --delay flush-dispatch@0=0..200us --seed 7
  stalemate run mprotect-race --interrupts controlled --ipi shootdown:p0.2=dup";

const INSPECT_EXAMPLES: &str = "\
Examples:
  stalemate inspect smoke --at flush-issue            before the first shootdown chooses its CPUs
  stalemate inspect smoke --at pte-install:100 --mm 1 --range 0x400000..0x500000
  stalemate inspect unmap-race --after 50ms --gva 0x7fffdffff000
  stalemate inspect cow-fork --at fork-flush --frame 0x823000 --json";

const RECORD_EXAMPLES: &str = "\
Examples:
  stalemate record -o python3.trace -- python3 -c 'print(1)'
Replay it with a scenario of program 'replay' (docs/scenarios.md).";

/// The whole command line.
#[derive(Parser, Debug)]
#[command(name = "stalemate", version, about = ABOUT, after_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"),
    arg_required_else_help = true, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// How to say it.
    #[command(flatten)]
    pub talk: Talk,
}

/// What to do.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Say what kind of host this is, what it can do and what is missing
    Doctor(Doctor),
    /// Boot a scenario, run it, check every invariant and give a verdict
    #[command(after_help = format!("{RUN_EXAMPLES}\n\n{EXIT_CODES}"))]
    Run(Run),
    /// Pause a scenario at a scheduling point or after a time and show what is inside
    #[command(after_help = INSPECT_EXAMPLES)]
    Inspect(Inspect),
    /// Try many interleavings of a scenario, one vCPU at a time, and judge every step of each
    #[command(after_help = EXPLORE_EXAMPLES)]
    Explore(Explore),
    /// Run what a reproducer file says again, step by step
    Replay(Replay),
    /// Save a scenario's machine at the start of its schedules, so that explore need not boot it
    Snapshot(Snapshot),
    /// Record the memory calls of a real program (needs strace)
    #[command(after_help = RECORD_EXAMPLES)]
    Record(Record),
    /// List what can be named: programs, params, bugs, points, failpoints, invariants, scenarios
    List(List),
}

const EXPLORE_EXAMPLES: &str = "\
Examples:
  stalemate explore litmus-unmap                                 10,000 schedules in this process
  stalemate explore litmus-unmap --bug shootdown-skip-remote     finds it, writes a reproducer
  stalemate explore litmus-cow --engine kvm --schedules 200      the same kernel on real vCPUs
  stalemate explore litmus-cow --engine both --confirm 50        in process, then confirmed on vCPUs
  stalemate explore litmus-fork --fail-any frame-alloc           one allocation of each schedule fails
  stalemate replay out/litmus-unmap-t-01.repro --times 1000      bit for bit, 1000 times

A schedule says who runs for how many scheduling points. On the model engine the kernel runs inside this
process, without KVM. docs/explore.md explains both, docs/tlb-model.md what is judged.";

/// How schedules are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExploreStrategy {
    /// Whoever can run, at random
    Random,
    /// Random priorities that change at few random points
    Pct,
    /// Everybody in turn, with a growing quantum
    RoundRobin,
    /// All with 0, 1, … preemptions, one of those that differ in the order of independent steps only
    Exhaustive,
}

/// Most engines at once.
const MAX_JOBS: usize = 64;

/// What executes the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Engines {
    /// The kernel inside this process
    Model,
    /// The kernel image on vCPUs
    Kvm,
    /// The model, and what it shows is compared with vCPUs
    Both,
}

/// `explore`.
#[derive(Args, Debug)]
#[command(override_usage = "stalemate explore [OPTIONS] <SCENARIO>")]
pub struct Explore {
    /// A scenario file, the name of one in scenarios/, or a file that `snapshot` wrote
    #[arg(required_unless_present = "json")]
    pub scenario: Option<PathBuf>,
    /// What executes the kernel [default: model, and kvm for a snapshot]
    #[arg(long, value_enum, help_heading = "Exploration")]
    pub engine: Option<Engines>,
    /// `--engine both`: clean schedules that are run on vCPUs too, beside all that fail [default: 20]
    #[arg(long, value_name = "N", help_heading = "Exploration")]
    pub confirm: Option<usize>,
    /// How schedules are chosen
    #[arg(long, value_enum, default_value = "pct", help_heading = "Exploration")]
    pub strategy: ExploreStrategy,
    /// PCT: ordering constraints that a bug may need
    #[arg(long, value_name = "D", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=10), help_heading = "Exploration")]
    pub depth: u64,
    /// Exhaustive: preemptions that a schedule may have; all with fewer are tried first
    #[arg(
        long,
        value_name = "P",
        default_value_t = 2,
        help_heading = "Exploration"
    )]
    pub preemptions: u32,
    /// Schedules to try [default: 10000, and all for exhaustive]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Exploration")]
    pub schedules: Option<u64>,
    /// Stop after this time: 30s, 10m
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "Exploration")]
    pub time_limit: Option<Duration>,
    /// Makes every Kth instruction behind these points a scheduling point too (engine kvm)
    #[arg(long, value_name = "POINT,…:K", value_parser = window, help_heading = "Exploration")]
    pub window: Option<Window>,
    /// Engines that run at once; an exhaustive search is split between them
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        value_parser = jobs,
        help_heading = "Exploration"
    )]
    pub jobs: usize,
    /// Go on after a failure
    #[arg(long, help_heading = "Exploration")]
    pub keep_going: bool,
    /// This passage of a failpoint fails in every schedule; repeatable (`list failpoints`)
    #[arg(long = "fail", value_name = "NAME@VCPU:N", value_parser = fail, help_heading = "Failures")]
    pub fails: Vec<Fail>,
    /// In each schedule one passage of this failpoint fails, drawn from the seed; repeatable
    #[arg(long = "fail-any", value_name = "NAME", value_parser = failpoint, help_heading = "Failures")]
    pub fail_any: Vec<Failpoint>,
    /// When all invariants look at the state: at the end of every --state-every-th schedule, or at every point
    #[arg(
        long,
        value_enum,
        value_name = "WHEN",
        default_value = "end",
        help_heading = "Checks"
    )]
    pub check: CheckWhen,
    /// Replay every Nth schedule and compare all events (0: none)
    #[arg(long, value_name = "N", default_value_t = 100, help_heading = "Checks")]
    pub verify: u64,
    /// Look at the end of every Nth schedule with all invariants (0: none)
    #[arg(long, value_name = "N", default_value_t = 100, help_heading = "Checks")]
    pub state_every: u64,
    /// Where reproducers go
    #[arg(
        long,
        value_name = "DIR",
        default_value = "out",
        help_heading = "Output"
    )]
    pub out: PathBuf,
    /// Write the execution as a timeline for Perfetto or chrome://tracing: the first failure, minimised, or one that is well
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub trace: Option<PathBuf>,
    /// Overrides.
    #[command(flatten)]
    pub machine: MachineOptions,
    /// `--json`.
    #[command(flatten)]
    pub json: Json,
}

/// `snapshot`.
#[derive(Args, Debug)]
#[command(override_usage = "stalemate snapshot [OPTIONS] --out <FILE> <SCENARIO>")]
pub struct Snapshot {
    /// A scenario file, or the name of one in scenarios/
    #[arg(required_unless_present = "json")]
    pub scenario: Option<PathBuf>,
    /// Where it goes; nothing is overwritten
    #[arg(short, long, value_name = "FILE")]
    pub out: PathBuf,
    /// Overrides.
    #[command(flatten)]
    pub machine: MachineOptions,
    /// `--json`.
    #[command(flatten)]
    pub json: Json,
}

/// `replay`.
#[derive(Args, Debug)]
pub struct Replay {
    /// Reproducers that explore wrote
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// What executes the kernel [default: model, and kvm where instructions were scheduled]
    #[arg(long, value_enum)]
    pub engine: Option<Engines>,
    /// Replay this often and compare
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub times: u64,
    /// Try it on a kernel that it was not found on
    #[arg(long)]
    pub any_kernel: bool,
    /// The failure is what is wanted: exit 0 where it is reproduced bit for bit, 1 where it is not
    #[arg(long)]
    pub expect: bool,
    /// Without the story
    #[arg(long)]
    pub brief: bool,
    /// Write the execution as a timeline for Perfetto or chrome://tracing; of one reproducer
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub trace: Option<PathBuf>,
    /// `--json`.
    #[command(flatten)]
    pub json: Json,
}

/// How much is said.
#[derive(Args, Debug, Clone, Copy)]
pub struct Talk {
    /// Only the verdict, and errors
    #[arg(
        short,
        long,
        global = true,
        conflicts_with = "verbose",
        help_heading = "Output"
    )]
    pub quiet: bool,
    /// Each invariant, KVM's statistics, the serial output, and the log
    #[arg(short, long, global = true, help_heading = "Output")]
    pub verbose: bool,
}

/// `--json [FILE]`.
#[derive(Args, Debug, Clone)]
pub struct Json {
    /// Write the result as JSON to FILE, or to stdout; the text for people then goes to stderr
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-", help_heading = "Output")]
    pub json: Option<PathBuf>,
}

impl Json {
    /// The positional argument, which `--json` swallows where it stands right before it:
    /// `run --json smoke` means the scenario, for a file without a scenario means nothing.
    pub(super) fn give_back<T>(
        &mut self,
        positional: Option<T>,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        positional.or_else(|| {
            let swallowed = parse(self.json.as_deref()?.to_str().filter(|text| *text != "-")?)?;
            self.json = Some("-".into());
            Some(swallowed)
        })
    }
}

/// Overrides of the scenario's machine and kernel.
#[derive(Args, Debug, Clone)]
pub struct MachineOptions {
    /// vCPUs, 1 to 16
    #[arg(long, value_name = "N", value_parser = vcpus, allow_negative_numbers = true, help_heading = "Machine")]
    pub vcpus: Option<u32>,
    /// Guest memory: 64M, 1G
    #[arg(long, value_name = "SIZE", value_parser = memory, help_heading = "Machine")]
    pub memory: Option<u64>,
    /// In-kernel irqchip, or our own local APIC, where every IPI is an exit
    #[arg(long, value_enum, help_heading = "Machine")]
    pub interrupts: Option<Interrupts>,
    /// Boot this kernel ELF instead of the embedded one
    #[arg(long, value_name = "FILE", help_heading = "Machine")]
    pub kernel: Option<PathBuf>,
    /// Kernel parameter; repeatable (`list params`)
    #[arg(long = "param", value_name = "KEY=VALUE", value_parser = param, help_heading = "Kernel")]
    pub params: Vec<(String, String)>,
    /// Switch a seeded bug on; repeatable (`list bugs`)
    #[arg(long = "bug", value_name = "NAME", value_parser = bug, help_heading = "Kernel")]
    pub bugs: Vec<Bug>,
    /// Seed of the program's random choices
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Longest wall time of one run: 500ms, 30s, 2m
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub timeout: Option<Duration>,
}

/// Where results go.
#[derive(Args, Debug, Clone)]
pub struct Out {
    /// Write result.json, report.txt and serial.log into DIR
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    pub out: Option<PathBuf>,
    /// Overwrite files that stalemate did not write
    #[arg(long, help_heading = "Output")]
    pub force: bool,
}

/// `doctor`.
#[derive(Args, Debug)]
pub struct Doctor {
    /// `--json`.
    #[command(flatten)]
    pub json: Json,
}

/// `run`.
#[derive(Args, Debug)]
#[command(override_usage = "stalemate run [OPTIONS] <SCENARIO>")]
pub struct Run {
    /// A scenario file, or the name of one in scenarios/
    #[arg(required_unless_present = "json")]
    pub scenario: Option<PathBuf>,
    /// Overrides.
    #[command(flatten)]
    pub machine: MachineOptions,
    /// When to check the invariants
    #[arg(long, value_enum, value_name = "WHEN")]
    pub check: Option<CheckWhen>,
    /// Repeat until a run is not clean, at most N times
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Record all events and judge the merged streams of all vCPUs by the TLB model and the other monitors of `explore`
    #[arg(long, help_heading = "Parallel runs")]
    pub monitor: bool,
    /// Hold vCPUs at a scheduling point while others run; repeatable: pte-clear=50us, flush-issue@0:every3=0..200us,
    /// pte-clear:p0.1=until:flush-sync@1
    #[arg(long = "delay", value_name = "POINT[@VCPU][:WHEN]=TIME", value_parser = delay, help_heading = "Parallel runs")]
    pub delays: Vec<Delay>,
    /// Delay, drop, duplicate or reorder IPIs; repeatable: any=dup, shootdown@0-1:nth3=drop, any:p0.2=delay:100us
    /// (controlled interrupts)
    #[arg(long = "ipi", value_name = "VECTOR[@FROM-TO][:WHEN]=FAULT", value_parser = ipi, help_heading = "Parallel runs")]
    pub ipis: Vec<IpiFault>,
    /// `--json`.
    #[command(flatten)]
    pub json: Json,
    /// `--out`.
    #[command(flatten)]
    pub out: Out,
}

/// `inspect`.
#[derive(Args, Debug)]
#[command(
    override_usage = "stalemate inspect [OPTIONS] <--at <POINT[:NTH]>|--after <TIME>> <SCENARIO>"
)]
#[command(group = clap::ArgGroup::new("when").required(true))]
pub struct Inspect {
    /// A scenario file, or the name of one in scenarios/
    #[arg(required_unless_present = "json")]
    pub scenario: Option<PathBuf>,
    /// Pause at the NTH passage (default 1) of a scheduling point (`list points`)
    #[arg(long, value_name = "POINT[:NTH]", value_parser = at, group = "when", help_heading = "When to pause")]
    pub at: Option<At>,
    /// Pause after this time, counted from the first user instruction
    #[arg(long, value_name = "TIME", value_parser = duration, group = "when", help_heading = "When to pause")]
    pub after: Option<Duration>,
    /// Only passages on this vCPU
    #[arg(
        long,
        value_name = "I",
        requires = "at",
        help_heading = "When to pause"
    )]
    pub vcpu: Option<u32>,
    /// Show the page-table tree of this mm only
    #[arg(long, value_name = "ID", help_heading = "What to show")]
    pub mm: Option<u64>,
    /// Show the page-table tree of these addresses only
    #[arg(long, value_name = "A..B", value_parser = range, help_heading = "What to show")]
    pub range: Option<(u64, u64)>,
    /// Show every mapping of the frame at this guest physical address
    #[arg(long, value_name = "GPA", value_parser = address, help_heading = "What to show")]
    pub frame: Option<u64>,
    /// Show the walk of this address, and the folio behind it
    #[arg(long, value_name = "GVA", value_parser = address, help_heading = "What to show")]
    pub gva: Option<u64>,
    /// Overrides.
    #[command(flatten)]
    pub machine: MachineOptions,
    /// `--json`.
    #[command(flatten)]
    pub json: Json,
    /// `--out`.
    #[command(flatten)]
    pub out: Out,
}

/// `record`.
#[derive(Args, Debug)]
pub struct Record {
    /// File of the trace
    #[arg(short, long, value_name = "FILE", default_value = "stalemate.trace")]
    pub output: PathBuf,
    /// Overwrite FILE
    #[arg(long)]
    pub force: bool,
    /// `--json`.
    #[command(flatten)]
    pub json: Json,
    /// The program and its arguments, after `--`
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<std::ffi::OsString>,
}

/// `list`.
#[derive(Args, Debug)]
#[command(override_usage = "stalemate list [OPTIONS] <WHAT>")]
pub struct List {
    /// What to list
    #[arg(value_enum, required_unless_present = "json")]
    pub what: Option<Listed>,
    /// `--json`.
    #[command(flatten)]
    pub json: Json,
}

/// What can be listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Listed {
    /// User programs that a scenario can run
    Programs,
    /// Kernel parameters
    Params,
    /// Seeded bugs
    Bugs,
    /// Scheduling points
    Points,
    /// Failpoints: operations of the kernel that can be made to fail
    Failpoints,
    /// Invariants that are checked
    Invariants,
    /// Scenario files
    Scenarios,
}

/// The interrupt modes by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Interrupts {
    /// In-kernel irqchip, x2APIC
    Hardware,
    /// Our own local APIC
    Controlled,
}

impl From<Interrupts> for InterruptMode {
    fn from(mode: Interrupts) -> Self {
        match mode {
            Interrupts::Hardware => Self::Hardware,
            Interrupts::Controlled => Self::Controlled,
        }
    }
}

/// A passage of a scheduling point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// The point.
    pub point: Point,
    /// Which passage, from 1.
    pub nth: u64,
}

fn vcpus(text: &str) -> Result<u32, String> {
    let count = text
        .parse()
        .map_err(|_| format!("'{text}' is not a number"))?;
    values::vcpus(count).map_err(|refused| refused.to_string())
}

fn memory(text: &str) -> Result<u64, String> {
    values::memory(text).map_err(|refused| refused.to_string())
}

fn jobs(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(jobs @ 1..=MAX_JOBS) => Ok(jobs),
        _ => Err(format!(
            "1 to {MAX_JOBS}: each is an engine with its own guest memory"
        )),
    }
}

fn window(text: &str) -> Result<Window, String> {
    values::window(text).map_err(|refused| refused.to_string())
}

fn duration(text: &str) -> Result<Duration, String> {
    values::duration(text).map_err(|refused| refused.to_string())
}

fn address(text: &str) -> Result<u64, String> {
    values::address(text).map_err(|refused| refused.to_string())
}

fn bug(text: &str) -> Result<Bug, String> {
    values::bug(text).map_err(|refused| refused.to_string())
}

fn fail(text: &str) -> Result<Fail, String> {
    text.parse()
        .map_err(|refused: values::Refused| refused.to_string())
}

fn delay(text: &str) -> Result<Delay, String> {
    text.parse()
        .map_err(|refused: values::Refused| refused.to_string())
}

fn ipi(text: &str) -> Result<IpiFault, String> {
    text.parse()
        .map_err(|refused: values::Refused| refused.to_string())
}

fn failpoint(text: &str) -> Result<Failpoint, String> {
    values::failpoint(text).map_err(|refused| refused.to_string())
}

fn param(text: &str) -> Result<(String, String), String> {
    let (key, value) = text
        .split_once('=')
        .ok_or_else(|| "write KEY=VALUE; `list params` shows all".to_owned())?;
    values::param(key, value).map_err(|refused| refused.to_string())?;
    Ok((key.to_owned(), value.to_owned()))
}

fn at(text: &str) -> Result<At, String> {
    let (name, nth) = text.split_once(':').unwrap_or((text, "1"));
    let point = values::point(name).map_err(|refused| refused.to_string())?;
    match nth.parse() {
        Ok(nth) if nth > 0 => Ok(At { point, nth }),
        _ => Err(format!("'{nth}' is no passage: they count from 1")),
    }
}

fn range(text: &str) -> Result<(u64, u64), String> {
    let (start, end) = text
        .split_once("..")
        .ok_or("write START..END, as 0x400000..0x500000")?;
    let (start, end) = (address(start)?, address(end)?);
    if start < end {
        Ok((start, end))
    } else {
        Err(format!("{start:#x}..{end:#x} is empty"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn json_gives_the_scenario_back() {
        let parse = |words: &[&str]| match Cli::try_parse_from(words).unwrap().command {
            Command::Run(mut run) => {
                let scenario = run.json.give_back(run.scenario, |text| Some(text.into()));
                (scenario, run.json.json)
            }
            _ => unreachable!(),
        };
        let smoke = Some(PathBuf::from("smoke"));
        assert_eq!(
            parse(&["stalemate", "run", "--json", "smoke"]),
            (smoke.clone(), Some("-".into()))
        );
        assert_eq!(
            parse(&["stalemate", "run", "smoke", "--json"]),
            (smoke.clone(), Some("-".into()))
        );
        assert_eq!(
            parse(&["stalemate", "run", "smoke", "--json", "f"]),
            (smoke.clone(), Some("f".into()))
        );
        assert_eq!(parse(&["stalemate", "run", "smoke"]), (smoke, None));
        assert_eq!(parse(&["stalemate", "run", "--json"]).0, None);
    }

    #[test]
    fn passages_and_ranges() {
        assert_eq!(
            at("pte-install"),
            Ok(At {
                point: Point::PteInstall,
                nth: 1
            })
        );
        assert_eq!(
            at("flush-sync:12"),
            Ok(At {
                point: Point::FlushSync,
                nth: 12
            })
        );
        assert!(at("flush-sync:0").unwrap_err().contains("from 1"));
        assert!(at("flush").unwrap_err().contains("flush-"));
        assert_eq!(range("0x1000..0x2000"), Ok((0x1000, 0x2000)));
        assert!(range("0x2000..0x1000").unwrap_err().contains("empty"));
        assert!(range("0x2000").is_err());
    }
}
