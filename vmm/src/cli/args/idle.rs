//! Options that the others leave without effect. They are refused: a result that does not answer what was
//! asked looks like one that does.

use std::marker::PhantomData;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, Command, CommandFactory as _, Error, FromArgMatches};

use super::explore::{Engines, Explore, ExploreStrategy, Snapshot};
use super::{Cli, Inspect, Run};
use crate::snapshot::SavedMachine;

/// An option of one command that has no effect.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Whether the option is given and has none.
    applies: fn(&Given<'_>) -> bool,
    /// Names the option, and says why it has none.
    problem: &'static str,
    /// What to write instead.
    fix: &'static str,
}

/// A command with options that others can leave without effect.
pub trait Rules {
    /// Its name.
    const COMMAND: &'static str;
    /// All of them; the first that applies is told.
    const RULES: &'static [Rule];
}

/// Checks the rules of `C` where it is flattened into its arguments. As it looks at all of them, it must be the first:
/// the fields of a struct take their values out of what was parsed, one after the other.
#[derive(Debug)]
pub struct NoneIdle<C>(PhantomData<C>);

impl<C: Rules> Args for NoneIdle<C> {
    fn augment_args(command: Command) -> Command {
        command
    }

    fn augment_args_for_update(command: Command) -> Command {
        command
    }
}

impl<C: Rules> FromArgMatches for NoneIdle<C> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let given = Given(matches);
        match C::RULES.iter().find(|rule| (rule.applies)(&given)) {
            None => Ok(Self(PhantomData)),
            Some(rule) => Err(refuse(C::COMMAND, rule)),
        }
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        Self::from_arg_matches(matches).map(|_| ())
    }
}

/// In the form of clap's own errors, with the usage of the command.
fn refuse(command: &str, rule: &Rule) -> Error {
    let message = format!("{}\n\n  tip: {}", rule.problem, rule.fix);
    let mut cli = Cli::command();
    cli.build();
    let command = cli
        .find_subcommand_mut(command)
        .expect("a command that was parsed");
    command.error(ErrorKind::ArgumentConflict, message)
}

/// What was written on the command line.
#[derive(Debug)]
struct Given<'a>(&'a ArgMatches);

impl Given<'_> {
    /// Written, not a default.
    fn has(&self, id: &str) -> bool {
        self.0.value_source(id) == Some(ValueSource::CommandLine)
    }

    fn value<T: Clone + Send + Sync + 'static>(&self, id: &str) -> Option<T> {
        self.0.get_one::<T>(id).cloned()
    }

    fn strategy(&self, wanted: ExploreStrategy) -> bool {
        self.value("strategy") == Some(wanted)
    }

    fn engine(&self, wanted: Engines) -> bool {
        self.value("engine") == Some(wanted)
    }

    fn has_fails(&self) -> bool {
        self.has("fails") || self.has("fail_any")
    }

    /// The last value of a kernel parameter, which is the one that counts.
    fn param(&self, key: &str) -> Option<&str> {
        let params = self.0.get_many::<(String, String)>("params")?;
        let mut values = params.filter(|(known, _)| known == key);
        values.next_back().map(|(_, value)| value.as_str())
    }

    /// A saved machine is explored, which has vCPUs. `--json` may have swallowed its name.
    fn is_saved_machine(&self) -> bool {
        let name = self
            .value::<PathBuf>("scenario")
            .or_else(|| self.value("json"));
        name.is_some_and(|name| SavedMachine::is_one(&name))
    }
}

/// Only the schedule decides, so IPIs never pass the host by.
const INTERRUPTS: Rule = Rule {
    applies: |given| given.has("interrupts"),
    problem: "--interrupts: schedules say when an IPI arrives, so interrupts are always controlled here",
    fix: "leave --interrupts out; `stalemate run` has both modes",
};

/// Its hash is in every reproducer and snapshot.
const KERNEL: Rule = Rule {
    applies: |given| given.has("kernel"),
    problem: "--kernel: only the kernel that is built in can be explored",
    fix: "leave --kernel out; change guest-kernel/ and build again",
};

/// Two runs of one schedule are compared with their stamps.
const STAMP: Rule = Rule {
    applies: |given| given.param("stamp").is_some_and(|stamp| stamp != "ticket"),
    problem: "--param stamp=tsc: runs of one schedule must give the same events, and times never are the same",
    fix: "leave the parameter stamp out: it is ticket here",
};

const FORCE: Rule = Rule {
    applies: |given| given.has("force") && !given.has("out"),
    problem: "--force: overwrites files in the directory of --out, and there is none",
    fix: "add --out DIR, or leave --force out",
};

impl Rules for Explore {
    const COMMAND: &'static str = "explore";
    const RULES: &'static [Rule] = &[
        INTERRUPTS,
        KERNEL,
        STAMP,
        Rule {
            applies: |given| given.has("timeout"),
            problem: "--timeout: ends one run of `stalemate run`; a schedule ends by itself, or is found to be too long",
            fix: "write --time-limit TIME, which ends the campaign",
        },
        Rule {
            applies: |given| given.has("depth") && !given.strategy(ExploreStrategy::Pct),
            problem: "--depth: only the strategy pct has a depth",
            fix: "write --strategy pct, or leave --depth out",
        },
        Rule {
            applies: |given| {
                given.has("preemptions") && !given.strategy(ExploreStrategy::Exhaustive)
            },
            problem: "--preemptions: only an exhaustive search counts them",
            fix: "add --strategy exhaustive, or leave --preemptions out",
        },
        Rule {
            applies: |given| given.has("seed") && given.strategy(ExploreStrategy::Exhaustive),
            problem: "--seed: an exhaustive search tries all schedules and draws none",
            fix: "leave --seed out: every such search of one scenario is the same",
        },
        Rule {
            applies: |given| {
                let round_robin = given.strategy(ExploreStrategy::RoundRobin);
                given.has("seed") && round_robin && !given.has("fail_any")
            },
            problem: "--seed: round robin draws nothing",
            fix: "leave --seed out, or let --fail-any NAME draw from it",
        },
        Rule {
            applies: |given| given.has("confirm") && !given.engine(Engines::Both),
            problem: "--confirm: runs on vCPUs what the model has run, and only one engine is asked for",
            fix: "add --engine both, or leave --confirm out",
        },
        Rule {
            applies: |given| {
                let is_none = given.value::<usize>("confirm") == Some(0);
                is_none && given.has("trace")
            },
            problem: "--trace: with --confirm 0 no clean schedule is kept that could be drawn",
            fix: "write --confirm 1, or more",
        },
        Rule {
            applies: |given| {
                let runs_on_vcpus = given.engine(Engines::Kvm) || given.is_saved_machine();
                given.has("window") && !runs_on_vcpus
            },
            problem: "--window: the model engine has no instructions to stop between",
            fix: "write --engine kvm",
        },
        Rule {
            applies: |given| given.has("fail_any") && given.strategy(ExploreStrategy::Exhaustive),
            problem: "--fail-any: an exhaustive search is of one program, not of another one each time",
            fix: "give the passage: --fail NAME@VCPU:N",
        },
        Rule {
            applies: |given| given.has("state_every") && given.has_fails(),
            problem: "--state-every: with --fail or --fail-any every end is looked at, for what the failure left behind",
            fix: "leave --state-every out",
        },
    ];
}

impl Rules for Snapshot {
    const COMMAND: &'static str = "snapshot";
    const RULES: &'static [Rule] = &[
        INTERRUPTS,
        KERNEL,
        STAMP,
        Rule {
            applies: |given| given.has("seed"),
            problem: "--seed: nothing is drawn before the schedules begin",
            fix: "give it to `stalemate explore FILE --seed N`",
        },
        Rule {
            applies: |given| given.has("timeout"),
            problem: "--timeout: ends one run of `stalemate run`; a set-up ends by itself, or is found to be too long",
            fix: "leave --timeout out",
        },
    ];
}

impl Rules for Run {
    const COMMAND: &'static str = "run";
    const RULES: &'static [Rule] = &[FORCE];
}

impl Rules for Inspect {
    const COMMAND: &'static str = "inspect";
    const RULES: &'static [Rule] = &[FORCE];
}
