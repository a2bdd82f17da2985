//! How the pages that are in memory can be compared, by what the guest kernel and this host may do to them without being asked.

use std::fs;

use abi::oracle::{Op, Residency};
use abi::param::{Config, Thp};
use abi::syscall::{advice, nr};

/// Linux's policy for folios of 2 MiB.
const POLICY: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// How a guest with this configuration is compared with this host.
#[must_use]
pub fn with_this_host(config: &Config) -> Residency {
    // A Linux without the file has no such folios.
    let policy = fs::read_to_string(POLICY).unwrap_or_default();
    between(config, &policy)
}

fn between(config: &Config, policy: &str) -> Residency {
    let on_linux = if policy.contains("[always]") {
        Thp::Always
    } else if policy.contains("[madvise]") {
        Thp::Madvise
    } else {
        Thp::Never
    };
    let is_same = config.thp == on_linux && config.fault_around == 1 && config.swap_slots == 0;
    if is_same {
        Residency::Same
    } else {
        Residency::Open
    }
}

/// How this case is, of a guest that is compared so.
pub(super) fn of(ops: &[Op], guest: Residency) -> Residency {
    let pages_out =
        |op: &Op| u64::from(op.nr) == nr::MADVISE && op.args[2].value == advice::PAGEOUT;
    if ops.iter().any(pages_out) {
        Residency::Open
    } else {
        guest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_in_memory_are_compared_where_nothing_moves_them_unasked() {
        let madvise = "always [madvise] never\n";
        let with = |params: &[(&'static str, &'static str)], policy| {
            let mut config = Config::default();
            for (name, value) in params {
                config.set(name, value).unwrap();
            }
            between(&config, policy)
        };
        assert_eq!(with(&[], madvise), Residency::Same);
        assert_eq!(
            with(&[("thp", "always")], "[always] madvise never"),
            Residency::Same
        );
        assert_eq!(with(&[("thp", "never")], ""), Residency::Same);
        assert_eq!(with(&[], "[always] madvise never"), Residency::Open);
        assert_eq!(with(&[("fault_around", "4")], madvise), Residency::Open);
        assert_eq!(with(&[("swap_slots", "64")], madvise), Residency::Open);
    }
}
