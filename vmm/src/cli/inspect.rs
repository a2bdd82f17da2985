//! x
use super::{exit::Exit, failure::Failure, output::Output};
pub(super) fn inspect(
    _: &std::path::Path,
    _: &super::args::Inspect,
    _: &Output,
) -> Result<Exit, Failure> {
    Err(Failure::Usage {
        problem: "x".into(),
        help: "x".into(),
    })
}
