//! x
use super::{exit::Exit, failure::Failure, output::Output};
pub(super) fn record(_: &super::args::Record, _: &Output) -> Result<Exit, Failure> {
    Err(Failure::Usage {
        problem: "x".into(),
        help: "x".into(),
    })
}
