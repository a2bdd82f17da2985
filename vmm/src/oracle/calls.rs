//! The calls that cases are made of. A call is added with one entry of a table: its name and number, how
//! often it is drawn, what its result is, how its arguments are drawn, how they are shown.
//!
//! # What keeps a case from hurting its own process
//! On Linux the process of a case has its code, stack and libraries where the host has put them. A call that changes
//! memory must therefore not reach beyond what cases map: lengths that do not wrap (`draw::beyond`) are given only to
//! calls that refuse them or stop at the first hole.

mod draw;
mod files;
mod memory;
mod process;
mod show;

use std::sync::LazyLock;

use abi::oracle::Returns;
use proptest::strategy::BoxedStrategy;

pub use show::Show;

pub(super) use draw::{place, resource_and_limit};
pub(super) use files::{file, offset};

use super::case::Value;

/// A way to make a call.
#[derive(Clone, Copy)]
pub struct Call {
    /// Its name.
    pub name: &'static str,
    /// Its number.
    pub nr: u64,
    /// How often it is drawn, compared with the others.
    pub weight: u32,
    /// What its result is.
    pub returns: Returns,
    /// How each argument is shown; there are as many.
    pub shows: &'static [Show],
    /// How they are drawn.
    pub draw: fn() -> BoxedStrategy<Vec<Value>>,
}

/// Calls that the guest kernel answers with ENOSYS. They stay out of all cases until it does not.
pub const NOT_YET: &[u64] = &[];

/// All ways to make calls.
pub static CALLS: LazyLock<Vec<Call>> = LazyLock::new(|| {
    let tables = [memory::CALLS, files::CALLS, process::CALLS];
    tables.concat()
});

/// Where in [`CALLS`] the first way to make call `nr` is.
pub(super) fn index_of(nr: u64) -> usize {
    let found = CALLS.iter().position(|call| call.nr == nr);
    found.expect("a call of the tables")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::strategy::{Strategy as _, ValueTree as _};
    use proptest::test_runner::TestRunner;

    #[test]
    fn every_entry_draws_as_many_arguments_as_it_shows() {
        let mut runner = TestRunner::deterministic();
        for call in CALLS.iter() {
            for _ in 0..100 {
                let args = (call.draw)().new_tree(&mut runner).unwrap().current();
                assert_eq!(args.len(), call.shows.len(), "{}", call.name);
            }
        }
    }

    #[test]
    fn flags_are_shown_by_name() {
        let text = |show: Show, value| show.text(Value::raw(value));
        assert_eq!(text(Show::Prot, 3), "READ|WRITE");
        assert_eq!(text(Show::Prot, 0), "NONE");
        assert_eq!(
            text(Show::Map, 0x32 | 1 << 27),
            "PRIVATE|ANONYMOUS|FIXED|0x8000000"
        );
        assert_eq!(text(Show::Advice, 4), "DONTNEED");
        assert_eq!(text(Show::Advice, 99), "0x63");
        assert_eq!(text(Show::Number, u64::MAX), "-1");
    }
}
