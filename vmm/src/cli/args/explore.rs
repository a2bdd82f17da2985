//! Arguments of `explore`, and of `snapshot` and `replay`, which go with it.

use std::path::PathBuf;
use std::time::Duration;

use abi::failpoint::Failpoint;
use clap::{Arg, Args, ValueEnum};

use super::idle::NoneIdle;
use super::values::{directory, duration, fail, failpoint, file, jobs, window};
use super::{Json, MachineOptions};
use crate::engine::Window;
use crate::scenario::{CheckWhen, Fail};

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

const CAMPAIGN_SEED: &str = "What random and pct schedules, and --fail-any, are drawn from: the same N gives the same \
                             campaign [default: from the clock]";

/// Of the options of every machine, those that are refused where schedules decide ([`super::idle`]).
fn hide_refused(option: Arg) -> Arg {
    let is_refused = ["interrupts", "kernel", "timeout"].contains(&option.get_id().as_str());
    option.hide(is_refused)
}

/// `explore`.
#[derive(Args, Debug)]
#[command(override_usage = "stalemate explore [OPTIONS] <SCENARIO>")]
#[command(mut_arg("seed", |seed| seed.help(CAMPAIGN_SEED).help_heading("Exploration")))]
#[command(mut_args(hide_refused))]
pub struct Explore {
    /// Every option has an effect.
    #[command(flatten)]
    pub checked: NoneIdle<Self>,
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
    /// Makes every Kth instruction (default 1) behind these points, up to the next point, a scheduling point too
    /// (engine kvm)
    #[arg(long, value_name = "POINT[,POINT]…[:K]", value_parser = window, help_heading = "Exploration")]
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
    /// When all invariants look at the state: at the end of every --state-every-th schedule, or at every point too
    /// [default: the scenario's]
    #[arg(long, value_enum, value_name = "WHEN", help_heading = "Checks")]
    pub check: Option<CheckWhen>,
    /// Replay every Nth schedule and compare all events (0: none)
    #[arg(long, value_name = "N", default_value_t = 100, help_heading = "Checks")]
    pub verify: u64,
    /// Look at the end of every Nth schedule with all invariants (0: none; with --fail or --fail-any: of all)
    #[arg(long, value_name = "N", default_value_t = 100, help_heading = "Checks")]
    pub state_every: u64,
    /// Where reproducers go
    #[arg(
        long,
        value_name = "DIR",
        value_parser = directory(),
        default_value = "out",
        help_heading = "Output"
    )]
    pub out: PathBuf,
    /// Write the execution as a timeline for Perfetto or chrome://tracing: the first failure, minimised, or one that is well
    #[arg(long, value_name = "FILE", value_parser = file(), help_heading = "Output")]
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
#[command(mut_args(hide_refused), mut_arg("seed", |seed| seed.hide(true)))]
pub struct Snapshot {
    /// Every option has an effect.
    #[command(flatten)]
    pub checked: NoneIdle<Self>,
    /// A scenario file, or the name of one in scenarios/
    #[arg(required_unless_present = "json")]
    pub scenario: Option<PathBuf>,
    /// Where it goes; nothing is overwritten
    #[arg(short, long, value_name = "FILE", value_parser = file())]
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
    /// What executes the kernel [default: model, and kvm for what only vCPUs can run: scheduled instructions, traces,
    /// tlb=hw or tlb=both, the program crash]
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
    #[arg(long, value_name = "FILE", value_parser = file(), help_heading = "Output")]
    pub trace: Option<PathBuf>,
    /// `--json`.
    #[command(flatten)]
    pub json: Json,
}
