//! The command line: names, values and help texts. `docs/cli.md` is its manual.

mod explore;
mod help;
mod idle;
mod oracle;
mod values;

use std::path::PathBuf;
use std::time::Duration;

use abi::boot::InterruptMode;
use abi::bug::Bug;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::bench::Op;
use crate::scenario::CheckWhen;
use crate::scenario::disturb::{Delay, IpiFault};
use idle::NoneIdle;
use values::{
    address, at, bug, delay, directory, duration, file, ipi, memory, op, param, range, vcpus,
};

pub use explore::{Engines, Explore, ExploreStrategy, Replay, Snapshot};
pub use oracle::Oracle;
pub use values::At;

/// The whole command line.
#[derive(Parser, Debug)]
#[command(name = "stalemate", version, about = help::ABOUT, after_help = format!("{}\n\n{}", help::EXAMPLES, help::EXIT_CODES),
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
    #[command(after_help = help::RUN)]
    Run(Run),
    /// Pause a scenario at a scheduling point or after a time and show what is inside
    #[command(after_help = help::INSPECT)]
    Inspect(Inspect),
    /// Try many interleavings of a scenario, one vCPU at a time, and judge every step of each
    #[command(after_help = help::EXPLORE)]
    Explore(Explore),
    /// Run what a reproducer file says again, step by step
    #[command(after_help = help::REPLAY)]
    Replay(Replay),
    /// Save a scenario's machine at the start of its schedules, so that explore need not boot it
    #[command(after_help = help::SNAPSHOT)]
    Snapshot(Snapshot),
    /// Time operations of the guest's kernel, and of the host's own Linux
    #[command(after_help = help::BENCH)]
    Bench(Bench),
    /// Compare the guest kernel with this host's Linux: random memory calls, step by step
    #[command(after_help = help::ORACLE)]
    Oracle(Oracle),
    /// Record the memory calls of a real program (needs strace)
    #[command(after_help = help::RECORD)]
    Record(Record),
    /// List what can be named: programs, params, bugs, points, failpoints, invariants, scenarios
    List(List),
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
    #[arg(long, value_name = "DIR", value_parser = directory(), help_heading = "Output")]
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
    /// Every option has an effect.
    #[command(flatten)]
    pub checked: NoneIdle<Self>,
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
    /// Every option has an effect.
    #[command(flatten)]
    pub checked: NoneIdle<Self>,
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
        conflicts_with = "after",
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

/// `bench`.
#[derive(Args, Debug)]
#[command(override_usage = "stalemate bench [OPTIONS] [OP]...")]
pub struct Bench {
    /// Operations, all of them without one: getpid, fault, map, map-512, protect, fork, cow, dontneed, lookup
    #[arg(value_name = "OP", value_parser = op)]
    pub ops: Vec<Op>,
    /// Rounds of each, 1 to 4096
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=4096))]
    pub rounds: Option<u64>,
    /// Boot this kernel ELF instead of the embedded one
    #[arg(long, value_name = "FILE", help_heading = "Machine")]
    pub kernel: Option<PathBuf>,
    /// Kernel parameter; repeatable (`list params`)
    #[arg(long = "param", value_name = "KEY=VALUE", value_parser = param, help_heading = "Kernel")]
    pub params: Vec<(String, String)>,
    /// Print what the host's own Linux takes, as the program tells it
    #[arg(long, hide = true)]
    pub on_linux: bool,
    /// `--json`.
    #[command(flatten)]
    pub json: Json,
}

/// `record`.
#[derive(Args, Debug)]
pub struct Record {
    /// File of the trace
    #[arg(short, long, value_name = "FILE", value_parser = file(), default_value = "stalemate.trace")]
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_help_shows_can_be_written() {
        let texts = [
            help::EXAMPLES,
            help::RUN,
            help::INSPECT,
            help::RECORD,
            help::EXPLORE,
            help::REPLAY,
            help::SNAPSHOT,
            help::ORACLE,
        ];
        let lines = texts.iter().flat_map(|text| text.lines());
        // What is longer is broken where nobody looks.
        let long: Vec<&str> = lines
            .clone()
            .filter(|line| line.chars().count() > 100)
            .collect();
        assert!(long.is_empty(), "{long:?}");
        let examples: Vec<&str> = lines
            .filter_map(|line| line.strip_prefix("  stalemate "))
            .collect();
        assert!(examples.len() > 30, "{examples:?}");
        for example in examples {
            // A remark stands behind two blanks.
            let line = example.split("  ").next().unwrap_or_default();
            let words = ["stalemate"].into_iter().chain(line.split(' '));
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("{line}: {error}");
            }
        }
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
}
