//! What an operation of the kernel costs, in the guest and on the host's own Linux: the program `bench` on both.
//!
//! Times are ticks of the time-stamp counter, which both read at CPL 3. Where CPL 0 is emulated they mean nothing for the
//! guest, but KVM counts the instructions that it emulates: there the kernel's instructions are told instead.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use guest::native;
use serde::Serialize;

pub use guest::programs::bench::Op;

use crate::boot::{KernelImage, ProgramSpec};
use crate::control::{Machine, MachineConfig, MachineError, Stop};
use crate::kvm::host::{Host, HostKind};

/// KVM's statistic of instructions that it emulates.
const EMULATED: &str = "insn_emulation";
/// Far more than any host needs.
const PATIENCE: Duration = Duration::from_secs(120);

/// Ticks of the time-stamp counter over some rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Ticks {
    /// Rounds.
    pub rounds: u64,
    /// The fastest.
    pub min: u64,
    /// The median.
    pub p50: u64,
    /// Nine of ten took at most so long.
    pub p90: u64,
    /// The slowest.
    pub max: u64,
}

/// What one operation costs in the guest.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct InGuest {
    /// How long it takes.
    pub ticks: Ticks,
    /// Instructions that the kernel executes for it, on the average; only where the host emulates and counts them.
    pub instructions: Option<f64>,
    /// Frequency of the counter; unknown on some hosts.
    pub tsc_khz: Option<u32>,
}

/// The machine that operations are measured in.
#[derive(Clone, Debug, Default)]
pub struct Guest {
    /// Another kernel than the embedded one.
    pub kernel: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
}

/// Why there is no figure.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// There is no machine, or it failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The machine stopped otherwise than at the end of its program.
    #[error("{} in the guest: the machine did not come to its end: {stop}", op.name())]
    Stopped {
        /// What was measured.
        op: Op,
        /// What it came to.
        stop: String,
    },
    /// The program says something else.
    #[error("{} {place}: {text}", op.name())]
    Program {
        /// What was measured.
        op: Op,
        /// Where.
        place: &'static str,
        /// What it said.
        text: String,
    },
    /// This program cannot be started a second time, for the host's Linux.
    #[error("the process for the host's own Linux cannot be started: {0}")]
    Child(#[from] std::io::Error),
}

impl Guest {
    /// Measures `op` with so many rounds.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn measure(&self, op: Op, rounds: u64) -> Result<InGuest, BenchError> {
        let (with, emulated, tsc_khz) = self.run(op, rounds, rounds)?;
        let mut instructions = None;
        if Host::kind() == HostKind::Emulating
            && let Some(all) = emulated
        {
            // What booting and the preparations take is the same without a round.
            let (_, without, _) = self.run(op, 0, rounds)?;
            let of_rounds = all.saturating_sub(without.unwrap_or(0));
            instructions = Some(of_rounds as f64 / with.rounds.max(1) as f64);
        }
        Ok(InGuest {
            ticks: with,
            instructions,
            tsc_khz,
        })
    }

    fn run(
        &self,
        op: Op,
        rounds: u64,
        prepared: u64,
    ) -> Result<(Ticks, Option<u64>, Option<u32>), BenchError> {
        let mut machine = Machine::new(MachineConfig {
            vcpus: 1,
            cmdline: self.cmdline.clone(),
            program: ProgramSpec {
                name: "bench".into(),
                args: vec![
                    ("op".into(), op.name().into()),
                    ("rounds".into(), rounds.to_string()),
                    ("prepared".into(), prepared.to_string()),
                ],
                data: None,
            },
            kernel: match &self.kernel {
                Some(path) => KernelImage::File(path.clone()),
                None => KernelImage::Embedded,
            },
            // Nobody looks at them.
            events: 0,
            ..MachineConfig::default()
        })?;
        let stop = machine.run_until(Some(PATIENCE))?;
        let text = machine.serial_output();
        match stop {
            Stop::Exited { .. } => {}
            other => {
                return Err(BenchError::Stopped {
                    op,
                    stop: format!("{other:?}"),
                });
            }
        }
        let emulated = machine.kvm_stats().and_then(|stats| stats.total(EMULATED));
        let ticks = told(op, "in the guest", &text)?;
        Ok((ticks, emulated, machine.tsc_khz()))
    }
}

/// Measures `op` with so many rounds on the host's own Linux, in a fresh process of this program: `arguments` make it call
/// [`in_this_process`].
///
/// # Errors
/// See [`BenchError`].
pub fn on_linux(op: Op, arguments: &[String]) -> Result<Ticks, BenchError> {
    let output = Command::new(std::env::current_exe()?)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    told(op, "on Linux", &String::from_utf8_lossy(&output.stdout))
}

/// What the program says here, on the host's own Linux.
#[must_use]
pub fn in_this_process(op: Op, rounds: u64) -> String {
    let args = format!("op={}\0rounds={rounds}", op.name());
    match native::run("bench", &args, None) {
        Ok(outcome) => outcome.text,
        Err(refused) => refused.to_string(),
    }
}

/// The program's line.
fn told(op: Op, place: &'static str, text: &str) -> Result<Ticks, BenchError> {
    let parse = |line: &str| {
        let rest = line.strip_prefix("bench ")?.strip_prefix(op.name())?;
        let numbers = rest.split_whitespace().map(|word| word.parse().ok());
        let numbers: Vec<u64> = numbers.collect::<Option<_>>()?;
        let [rounds, min, p50, p90, max] = numbers.try_into().ok()?;
        Some(Ticks {
            rounds,
            min,
            p50,
            p90,
            max,
        })
    };
    text.lines()
        .find_map(parse)
        .ok_or_else(|| BenchError::Program {
            op,
            place,
            text: match text.trim() {
                "" => "nothing was measured".into(),
                text => text.into(),
            },
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_programs_line_is_read_and_anything_else_is_told() {
        let ticks = told(Op::Fault, "here", "booted\nbench fault 3 1 2 3 4\n").unwrap();
        assert_eq!((ticks.rounds, ticks.min, ticks.max), (3, 1, 4));
        for text in [
            "",
            "bench map-512 3 1 2 3 4",
            "bench fault 1 2 3 4",
            "bench fault: ENOMEM",
        ] {
            let error = told(Op::Fault, "here", text).unwrap_err().to_string();
            let said = if text.is_empty() { "nothing" } else { text };
            assert!(
                error.contains(said) && error.contains("fault here"),
                "{error}"
            );
        }
        // A name that another begins with.
        assert!(told(Op::Map, "here", "bench map-512 3 1 2 3 4").is_err());
    }

    #[test]
    fn every_operation_is_measured_on_this_linux() {
        for op in Op::ALL {
            let text = in_this_process(*op, 3);
            assert_eq!(told(*op, "here", &text).unwrap().rounds, 3);
        }
    }
}
