//! x
use super::{exit::Exit, failure::Failure, output::Output};
pub(super) fn doctor(_: &Output) -> Result<Exit, Failure> {
    Err(Failure::Usage {
        problem: "x".into(),
        help: "x".into(),
    })
}
