//! `exit`: nothing. What a run of it costs is what every run costs.

use super::{Data, Program};

pub(super) const PROGRAM: Program = Program {
    name: "exit",
    help: "ends at once: the cost of a run without a workload",
    args: &[],
    data: Data::Ignored,
    has_setup: false,
};

/// Its exit status.
pub(super) const STATUS: i32 = 0;

#[cfg(test)]
mod tests {
    use crate::native;

    #[test]
    fn it_ends_at_once_and_says_nothing() {
        let outcome = native::run("exit", "", None).unwrap();
        assert_eq!(outcome.status, 0);
        assert_eq!((outcome.text.as_str(), outcome.reports), ("", Vec::new()));
    }
}
