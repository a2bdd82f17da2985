//! What a machine costs: boot to the first user instruction, pause and resume of all vCPUs, resets, and the
//! parts of a whole `run` of an empty program. Prints tables; `--json FILE` writes them for programs.
//!
//! As with criterion, `--bench` (which `cargo bench` gives) means to measure; without it everything
//! is done a few times only, which shows that it works (`cargo test --benches`).

mod boot;
mod options;
mod pause;
mod reset;
mod run;
mod setting;
mod stats;
mod table;
mod workload;

use std::process::ExitCode;

use options::{Options, Usage};
use serde::Serialize;
use setting::Setting;

/// Everything that was measured.
#[derive(Serialize)]
struct Results {
    schema: &'static str,
    setting: Setting,
    #[serde(skip_serializing_if = "Option::is_none")]
    boot: Option<boot::Boot>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pause: Option<pause::Pause>,
    #[serde(skip_serializing_if = "Option::is_none")]
    run: Option<run::Run>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reset: Option<reset::Reset>,
}

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(Usage::Help) => {
            println!("{}", options::HELP);
            return ExitCode::SUCCESS;
        }
        Err(usage @ Usage::Wrong(_)) => {
            eprintln!("machine: {usage}\n\n{}", options::HELP);
            return ExitCode::from(2);
        }
    };
    match measure(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("machine: {failure}");
            let mut cause = failure.source();
            while let Some(error) = cause {
                eprintln!("  because: {error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn measure(options: &Options) -> Result<(), Failure> {
    let setting = Setting::look(options.quick);
    setting.print();
    let mut results = Results {
        schema: "stalemate-bench/1",
        setting,
        boot: None,
        pause: None,
        run: None,
        reset: None,
    };
    if options.wants("machine/boot") {
        let boot = boot::measure(options.quick)?;
        boot.print(&results.setting);
        results.boot = Some(boot);
    }
    if options.wants("machine/run") {
        let run = run::measure(options.quick)?;
        run.print();
        results.run = Some(run);
    }
    if options.wants("machine/reset") {
        let reset = reset::measure(options.quick)?;
        reset.print();
        results.reset = Some(reset);
    }
    results.pause = pause::measure(options)?;
    if let Some(pause) = &results.pause {
        pause.print(&results.setting);
    }
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&results)? + "\n";
        std::fs::write(file, text).map_err(|error| format!("{}: {error}", file.display()))?;
    }
    Ok(())
}
