//! Linux as the oracle: random programs of memory calls, executed by this host's Linux and by the guest kernel, and
//! compared after every step. `docs/oracle.md` says what is compared, and what Linux leaves open.
//!
//! Top down: [`campaign`] runs cases and shrinks what differs; [`executor`] is the guest on either engine; `generate`
//! draws [`case`]s from the table of [`calls`]; [`observation`] reads what both sides showed, and [`report`] tells it.
//! The interpreter of cases is a user program (`guest::programs::oracle`), Linux's process is `guest::native::oracle`.

pub mod calls;
pub mod campaign;
pub mod case;
pub mod executor;
mod generate;
pub mod observation;
pub mod recorded;
pub mod report;
pub mod residency;
mod shrink;

pub use campaign::{Counts, Difference, Plan, Summary};
pub use executor::{Executor, Guest, Outcome};

/// Why cases cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum OracleError {
    /// Linux cannot be asked.
    #[error(transparent)]
    Linux(#[from] guest::native::oracle::LinuxError),
    /// The guest cannot be made or run.
    #[error(transparent)]
    Engine(#[from] crate::engine::EngineError),
    /// Linux's process of a case did not come to its end, so there is nothing to compare with.
    #[error("Linux's process of case {case} has not shown step {step}, {line}")]
    Incomplete {
        /// Number of the case.
        case: u64,
        /// The first step that is missing.
        step: usize,
        /// As a person writes it.
        line: String,
    },
    /// The guest program says what it cannot.
    #[error("the guest's report makes no sense: {0}")]
    Nonsense(String),
}
