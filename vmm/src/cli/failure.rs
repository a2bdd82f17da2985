//! Why a command ends without a verdict: every cause, its exit code, and the next thing to try.

use std::error::Error;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use super::exit::Exit;
use super::lab;
use crate::bench::BenchError;
use crate::boot::{BootError, ElfError};
use crate::engine::EngineError;
use crate::explore::DriverError;
use crate::inspect::InspectError;
use crate::oracle::OracleError;
use crate::report::json::WriteError;
use crate::report::verdict::Paint;
use crate::reproducer::ReproducerError;
use crate::scenario::ScenarioError;
use crate::scenario::record::RecordError;
use crate::session::MachineError;
use crate::snapshot::SnapshotError;

/// Why a command ended without a verdict.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The scenario is refused.
    #[error(transparent)]
    Scenario(#[from] ScenarioError),
    /// The command line is refused for a reason that clap cannot know.
    #[error("{problem}")]
    Usage {
        /// What is wrong.
        problem: String,
        /// What to write instead.
        help: String,
    },
    /// The machine cannot be made or cannot go on.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The file of `--kernel` is no kernel.
    #[error("--kernel {}: not a kernel that can be booted", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ElfError,
    },
    /// The guest's kernel cannot be looked into.
    #[error(transparent)]
    Inspect(#[from] InspectError),
    /// Nothing was recorded.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Nothing was measured.
    #[error(transparent)]
    Bench(#[from] BenchError),
    /// Nothing was explored to its end.
    #[error(transparent)]
    Explore(#[from] DriverError),
    /// The schedule of a reproducer is none of its scenario's.
    #[error("{}: its schedule cannot be replayed", path.display())]
    Replay {
        /// The reproducer.
        path: PathBuf,
        /// Why.
        source: DriverError,
    },
    /// A reproducer's schedule names points behind the end.
    #[error(
        "{}: its schedule cannot be replayed: its {wanted} points are more than the {passed} that \
         there are until {end}",
        path.display()
    )]
    Unreached {
        /// The reproducer.
        path: PathBuf,
        /// Points of its schedule.
        wanted: u64,
        /// Points of the execution.
        passed: u64,
        /// What came before.
        end: &'static str,
    },
    /// The reproducer is refused.
    #[error(transparent)]
    Reproducer(#[from] ReproducerError),
    /// The snapshot is refused, or not written.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Linux and the guest could not be compared.
    #[error(transparent)]
    Oracle(#[from] OracleError),
    /// A result cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// What was to be read on stdout is lost.
    #[error("cannot write to stdout: {0}")]
    Stdout(io::Error),
}

impl Failure {
    /// Why there is no machine; where `kernel` was given, that may be its fault.
    pub(super) fn of_machine(error: MachineError, kernel: Option<&Path>) -> Self {
        match (error, kernel) {
            (MachineError::BadKernel(BootError::Kernel(source)), Some(path)) => Self::Kernel {
                path: path.into(),
                source,
            },
            (error, _) => Self::Machine(error),
        }
    }

    /// The exit code of this cause.
    #[must_use]
    pub(super) fn exit(&self) -> Exit {
        match self {
            Self::Scenario(_)
            | Self::Usage { .. }
            | Self::Kernel { .. }
            | Self::Write(_)
            | Self::Stdout(_) => Exit::BadInput,
            Self::Machine(error)
            | Self::Oracle(OracleError::Engine(EngineError::Machine(error))) => {
                of_machine_error(error)
            }
            Self::Oracle(OracleError::Linux(_)) => Exit::HostCannot,
            Self::Oracle(_) => Exit::Internal,
            Self::Unreached { .. } => Exit::BadInput,
            Self::Bench(error) => match error {
                BenchError::Machine(error) => of_machine_error(error),
                BenchError::Stopped { .. } | BenchError::Program { .. } => Exit::GuestFailed,
                BenchError::Child(_) => Exit::HostCannot,
            },
            Self::Explore(error) | Self::Replay { source: error, .. } => match error {
                DriverError::Engine(EngineError::Machine(error)) => of_machine_error(error),
                DriverError::Engine(EngineError::Interrupted) | DriverError::Stopped => {
                    Exit::Interrupted
                }
                DriverError::Engine(EngineError::NoPoint { .. }) | DriverError::Hung { .. } => {
                    Exit::GuestFailed
                }
                DriverError::Engine(EngineError::Unsupported(_))
                | DriverError::Impossible { .. }
                | DriverError::TooLong { .. }
                | DriverError::SetUp(_) => Exit::BadInput,
                DriverError::Nondeterminism { .. } => Exit::Internal,
            },
            Self::Reproducer(_) => Exit::BadInput,
            Self::Snapshot(SnapshotError::Memory(_)) => Exit::Internal,
            Self::Snapshot(_) => Exit::BadInput,
            Self::Inspect(_) => Exit::GuestFailed,
            Self::Record(error) => match error {
                RecordError::NoCommand
                | RecordError::Exists(_)
                | RecordError::CommandNotFound(_)
                | RecordError::Nothing(_)
                | RecordError::File { .. } => Exit::BadInput,
                RecordError::NoStrace
                | RecordError::Strace(_)
                | RecordError::PtraceNotPermitted(_) => Exit::HostCannot,
            },
        }
    }

    /// All causes in one line, the last one's first.
    #[must_use]
    pub(super) fn line(&self) -> String {
        let mut text = self.to_string();
        let mut source = self.source();
        while let Some(cause) = source {
            let _ = write!(text, ": {cause}");
            source = cause.source();
        }
        text
    }

    /// What the lab's processor lacks too.
    fn is_for_want_of_pcid(&self) -> bool {
        match self {
            Self::Machine(error) => matches!(error, MachineError::NoPcid),
            Self::Explore(error) | Self::Replay { source: error, .. } => matches!(
                error,
                DriverError::Engine(EngineError::Machine(MachineError::NoPcid))
            ),
            _ => false,
        }
    }

    /// The text on stderr: the cause, the chain behind it, the next thing to try.
    #[must_use]
    pub(super) fn render(&self, paint: Paint) -> String {
        let mut text = match self {
            Self::Scenario(error) => scenario(error, paint),
            Self::Reproducer(ReproducerError::Scenario(error)) => scenario(error, paint),
            _ => chain(self, paint),
        };
        match self {
            Self::Usage { help, .. } => {
                let _ = writeln!(text, "  {} {help}", paint.bold("help:"));
            }
            Self::Record(RecordError::NoStrace) => {
                let _ = writeln!(text, "  {} apt-get install strace", paint.bold("help:"));
            }
            Self::Record(RecordError::Exists(_)) => {
                let _ = writeln!(text, "  {} --force replaces it", paint.bold("help:"));
            }
            Self::Unreached { .. }
            | Self::Replay {
                source: DriverError::Impossible { .. },
                ..
            } => {
                let help = "a schedule belongs to its scenario and kernel: undo what was changed in the file, or \
                            find the failure anew with explore";
                let _ = writeln!(text, "  {} {help}", paint.bold("help:"));
            }
            Self::Machine(_) | Self::Oracle(_) | Self::Explore(_) | Self::Replay { .. }
                if self.exit() == Exit::HostCannot && !self.is_for_want_of_pcid() =>
            {
                let _ = write!(text, "{}", lab::advice(paint));
            }
            _ => {}
        }
        text
    }
}

fn of_machine_error(error: &MachineError) -> Exit {
    match error {
        MachineError::NoKvm { .. }
        | MachineError::NoPermission { .. }
        | MachineError::MissingCapability { .. }
        | MachineError::NoPcid => Exit::HostCannot,
        MachineError::KernelFile(_)
        | MachineError::BadKernel(_)
        | MachineError::MemoryTooSmall { .. }
        | MachineError::BadVcpus { .. }
        | MachineError::NoSuchVcpu { .. } => Exit::BadInput,
        MachineError::Memory(_)
        | MachineError::Kvm { .. }
        | MachineError::Vcpu(_)
        | MachineError::NotSaved
        | MachineError::Timeout { .. }
        | MachineError::Io { .. } => Exit::Internal,
    }
}

fn scenario(error: &ScenarioError, paint: Paint) -> String {
    let theme = match paint {
        Paint::Plain => miette::GraphicalTheme::unicode_nocolor(),
        Paint::Colour => miette::GraphicalTheme::unicode(),
    };
    let mut text = String::new();
    let handler = miette::GraphicalReportHandler::new_themed(theme).with_width(100);
    match handler.render_report(&mut text, error) {
        Ok(()) => {
            // Our own "error:" says what its cross says.
            let text = text.trim().replacen("× ", "", 1);
            format!("{} {text}\n", paint.red("error:"))
        }
        Err(_) => chain(error, paint),
    }
}

fn chain(error: &dyn Error, paint: Paint) -> String {
    let mut text = format!("{} {error}\n", paint.red("error:"));
    let mut source = error.source();
    while let Some(cause) = source {
        let _ = writeln!(text, "  {} {cause}", paint.dim("because:"));
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn every_cause_has_its_code() {
        let usage = Failure::Usage {
            problem: "p".into(),
            help: "h".into(),
        };
        assert_eq!(usage.exit(), Exit::BadInput);
        assert!(usage.render(Paint::Plain).contains("help: h"));
        let scenario =
            crate::scenario::parse(Path::new("x.toml"), "[program]\nname = 'no'\n").unwrap_err();
        let scenario = Failure::from(scenario);
        assert_eq!(scenario.exit(), Exit::BadInput);
        let text = scenario.render(Paint::Plain);
        assert!(
            text.contains("x.toml:2:8") && text.contains("name = 'no'"),
            "{text}"
        );
        let missing = || std::io::Error::from_raw_os_error(libc::ENOENT);
        for error in [
            MachineError::NoKvm { source: missing() },
            MachineError::NoPermission { source: missing() },
            MachineError::MissingCapability {
                name: "KVM_CAP_X".into(),
            },
        ] {
            let failure = Failure::from(error);
            assert_eq!(failure.exit(), Exit::HostCannot);
            assert!(failure.render(Paint::Plain).contains("scripts/lab --"));
        }
        let no_pcid = || MachineError::NoPcid;
        let exploring = DriverError::Engine(EngineError::Machine(no_pcid()));
        for failure in [Failure::from(no_pcid()), Failure::from(exploring)] {
            assert_eq!(failure.exit(), Exit::HostCannot);
            let text = failure.render(Paint::Plain);
            assert!(text.contains("CPUID.01H:ECX bit 17"), "{text}");
            assert!(!text.contains("scripts/lab"), "{text}");
        }
        let no_point = DriverError::Engine(EngineError::NoPoint {
            vcpu: 1,
            seconds: 10.0,
            at: "rip 0x1, CPL 0".into(),
        });
        let failure = Failure::from(no_point);
        assert_eq!(failure.exit(), Exit::GuestFailed);
        let text = failure.render(Paint::Plain);
        assert!(
            text.contains("vCPU 1 has not reached a scheduling point in 10 s"),
            "{text}"
        );
    }
}
