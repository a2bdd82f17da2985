//! The command line: parses it, calls the other rooms, prints, and turns every ending into an exit
//! code. The only room that prints or knows about terminals.

pub mod args;
mod bench;
mod doctor;
pub mod exit;
mod explore;
mod failure;
mod inspect;
mod interrupt;
mod lab;
mod list;
mod oracle;
mod output;
mod record;
mod run;

use std::io::IsTerminal;
use std::panic;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _, ValueEnum as _};

use args::{Cli, Command, Listed};
use exit::Exit;
use failure::Failure;
use output::Output;

use crate::report::verdict::Paint;

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    panic::set_hook(Box::new(|info| {
        output::complain(&format!(
            "internal error: {info}\n  this is a defect of stalemate, not of your input; \
             RUST_BACKTRACE=1 shows where\n  stalemate {}\n{}",
            env!("CARGO_PKG_VERSION"),
            backtrace()
        ));
    }));
    panic::catch_unwind(parse_and_run)
        .unwrap_or(Exit::Internal)
        .into()
}

fn backtrace() -> String {
    let backtrace = std::backtrace::Backtrace::capture();
    match backtrace.status() {
        std::backtrace::BacktraceStatus::Captured => format!("{backtrace}\n"),
        _ => String::new(),
    }
}

fn parse_and_run() -> Exit {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => {
            let _ = error.print();
            return Exit::BadInput;
        }
        // --help and --version are errors to clap, not to a shell.
        Err(asked_for) => return end(print_help(&asked_for)),
    };
    start_log(cli.talk.verbose);
    end(dispatch(cli))
}

fn print_help(text: &clap::Error) -> Result<Exit, Failure> {
    let text = text.render();
    let text = match output::paint(std::io::stdout().is_terminal()) {
        Paint::Colour => text.ansi().to_string(),
        Paint::Plain => text.to_string(),
    };
    output::write_stdout(&text).map_err(Failure::Stdout)?;
    Ok(Exit::Held)
}

fn end(result: Result<Exit, Failure>) -> Exit {
    result.unwrap_or_else(|failure| {
        output::report(&failure);
        failure.exit()
    })
}

fn dispatch(cli: Cli) -> Result<Exit, Failure> {
    let output = |json| Output::new(json, cli.talk);
    match cli.command {
        Command::Doctor(doctor) => {
            let output = output(&doctor.json);
            doctor::doctor(&output).and_then(|exit| output.finish(exit))
        }
        Command::Run(mut run) => {
            let path = |text: &str| Some(text.into());
            run.scenario = run.json.give_back(run.scenario, path);
            let scenario = run
                .scenario
                .clone()
                .ok_or_else(|| missing("run", "<SCENARIO>"))?;
            let output = output(&run.json);
            run::run(&scenario, &run, &output).and_then(|exit| output.finish(exit))
        }
        Command::Inspect(mut inspect) => {
            let path = |text: &str| Some(text.into());
            inspect.scenario = inspect.json.give_back(inspect.scenario, path);
            let scenario = inspect
                .scenario
                .clone()
                .ok_or_else(|| missing("inspect", "<SCENARIO>"))?;
            let output = output(&inspect.json);
            inspect::inspect(&scenario, &inspect, &output).and_then(|exit| output.finish(exit))
        }
        Command::Explore(mut explore) => {
            let path = |text: &str| Some(text.into());
            explore.scenario = explore.json.give_back(explore.scenario, path);
            let scenario = explore
                .scenario
                .clone()
                .ok_or_else(|| missing("explore", "<SCENARIO>"))?;
            let output = output(&explore.json);
            explore::explore(&scenario, &explore, &output).and_then(|exit| output.finish(exit))
        }
        Command::Replay(replay) => {
            let output = output(&replay.json);
            explore::replay(&replay, &output).and_then(|exit| output.finish(exit))
        }
        Command::Snapshot(mut snapshot) => {
            let path = |text: &str| Some(text.into());
            snapshot.scenario = snapshot.json.give_back(snapshot.scenario, path);
            let scenario = snapshot
                .scenario
                .clone()
                .ok_or_else(|| missing("snapshot", "<SCENARIO>"))?;
            let output = output(&snapshot.json);
            explore::snapshot(&scenario, &snapshot, &output).and_then(|exit| output.finish(exit))
        }
        Command::Bench(bench) => {
            let output = output(&bench.json);
            bench::bench(&bench, &output).and_then(|exit| output.finish(exit))
        }
        Command::Oracle(options) => {
            let output = output(&options.json);
            oracle::oracle(&options, &output).and_then(|exit| output.finish(exit))
        }
        Command::Record(record) => {
            let output = output(&record.json);
            record::record(&record, &output).and_then(|exit| output.finish(exit))
        }
        Command::List(mut list) => {
            let what = list
                .json
                .give_back(list.what, |text| Listed::from_str(text, false).ok());
            let what = what.ok_or_else(|| missing("list", "<WHAT>"))?;
            let output = output(&list.json);
            list::list(what, &output).and_then(|exit| output.finish(exit))
        }
    }
}

fn missing(command: &str, argument: &str) -> Failure {
    let usage = Cli::command()
        .find_subcommand_mut(command)
        .map(|command| command.render_usage().to_string())
        .unwrap_or_default();
    Failure::Usage {
        problem: format!("{argument} is missing"),
        help: usage.replace("Usage: ", ""),
    }
}

/// The log of this program's own doings; RUST_LOG chooses finer.
fn start_log(verbose: bool) {
    let default = if verbose { "debug" } else { "warn" };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .with_ansi(output::paint(std::io::stderr().is_terminal()) == Paint::Colour)
        .try_init();
}
