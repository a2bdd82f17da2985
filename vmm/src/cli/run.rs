//! `stalemate run`: boots a scenario, as often as asked, and gives the verdict.

use std::path::Path;

use super::args::{MachineOptions, Run};
use super::exit::Exit;
use super::failure::Failure;
use super::output::Output;
use crate::report::json::{OutDirectory, Overwrite};
use crate::scenario::{Scenario, catalog};

pub(super) fn run(name: &Path, options: &Run, output: &Output) -> Result<Exit, Failure> {
    let mut scenario = Scenario::load(name)?;
    override_with(&mut scenario, &options.machine);
    let _ = output;
    Err(Failure::Usage {
        problem: "x".into(),
        help: "x".into(),
    })
}

/// What the command line says wins over what the file says.
pub(super) fn override_with(scenario: &mut Scenario, options: &MachineOptions) {
    scenario.vcpus = options.vcpus.unwrap_or(scenario.vcpus);
    scenario.memory_bytes = options.memory.unwrap_or(scenario.memory_bytes);
    scenario.interrupts = options.interrupts.map_or(scenario.interrupts, Into::into);
    scenario.timeout = options.timeout.unwrap_or(scenario.timeout);
    scenario.params.extend(options.params.iter().cloned());
    for bug in &options.bugs {
        scenario.add_bug(*bug);
    }
}
