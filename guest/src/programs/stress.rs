//! `stress`: many threads do everything at once to overlapping parts of one region.
//!
//! Each thread draws one act after the other ([`acts::ACTS`]): it writes and reads, maps, unmaps, protects, drops, ages,
//! moves, forks, takes pages away for a while; has them reclaimed, migrated and collapsed. All map a [file](file), too. Word `i` of every page belongs to thread `i`: nobody else writes it, and
//! what it writes says who, when and where.
//!
//! # What is wrong
//! - *In the region.* A word holds 0, or a value that its owner has written into some page of the region: pages move, but
//!   never a word within a page. Anything else, a value that its owner has not yet written included, is a `ForeignFrame`.
//!   Any access may fault, because anybody may have unmapped or protected the page.
//! - *In what a thread has to itself*: pages that it has moved out of the region (mremap), what it has mapped for itself
//!   alone, and in a forked child the whole region. There no word may change between two looks, and a word that was
//!   written must hold what was written (`ChangedUnderneath`); what could be accessed once can be again.
//! - *In the file* a word does not hold what its owner wrote last (`ChangedUnderneath`).
//! - A call that fails and cannot on a correct kernel (`WrongResult`).
//!
//! # Why it is never a false alarm
//! *Written.* The owner stores the number of a value before it writes the value, and x86 keeps stores in order (SDM vol.
//! 3A, 9.2.2), so who sees the value sees at least that number afterwards. A child looks at no numbers: its copies of
//! them and of the region may be of different moments. *To itself.* When mremap returns, no CPU has a translation of the old
//! place to these frames, and nobody knows the new one; fork gives the child copies, and the child has one thread.
//! *Calls.* Those on the region may find holes and mappings of others, so that only the errno of a hole is legal: EFAULT of
//! mremap, ENOMEM of mprotect and madvise.

mod acts;
mod file;
mod words;

use core::sync::atomic::AtomicU64;

use abi::layout::PAGE_SIZE;
use abi::syscall::{map, prot};

use super::{Data, Program, SUBJECT_GVA};
use crate::args::{Arg, Args};
use crate::sys::{ANONYMOUS, Sys, print_line};
use crate::team::{Findings, MAX_MEMBERS, Pace, must, natural_members, team};
use words::Owner;

pub(super) const PROGRAM: Program = Program {
    name: "stress",
    help: "threads map, move, protect, drop, fork and access overlapping ranges; every value is checked",
    args: &[
        Arg {
            name: "pages",
            default: "16",
            range: 2..=1024,
            help: "pages of the region; from 512 on it has folios of 2 MiB",
        },
        Arg {
            name: "rounds",
            default: "60",
            range: 1..=10_000_000,
            help: "acts of each thread",
        },
        Arg {
            name: "threads",
            default: "auto",
            range: 1..=MAX_MEMBERS as u64,
            help: "threads beside the first (auto: one for each CPU but the first)",
        },
        Arg {
            name: "looks",
            default: "5",
            range: 1..=1_000_000,
            help: "times a thread looks at what it has to itself",
        },
        Arg {
            name: "seed",
            default: "0",
            range: 0..=u64::MAX,
            help: "what the acts are drawn from",
        },
    ],
    data: Data::Ignored,
    has_setup: true,
};

/// Threads, the first one included, and so words of a page.
const MAX_OWNERS: usize = MAX_MEMBERS + 1;

struct Shared {
    pages: u64,
    rounds: u64,
    looks: u64,
    seed: u64,
    owners: usize,
    pace: Pace,
    /// How many values each thread has written.
    written: [AtomicU64; MAX_OWNERS],
    findings: Findings,
    /// Descriptor of the file.
    fd: u64,
}

pub(super) fn run<S: Sys>(sys: &S, args: &Args<'_>) -> i32 {
    let members = args
        .auto("threads")
        .map_or_else(|| natural_members(sys), |n| n as usize);
    let file = file::map(sys);
    let shared = Shared {
        fd: file.unwrap_or(0),
        pages: args.number("pages"),
        rounds: args.number("rounds"),
        looks: args.number("looks"),
        seed: args.number("seed"),
        owners: members + 1,
        pace: Pace::of(sys, members),
        written: Default::default(),
        findings: Findings::default(),
    };
    let bytes = shared.pages * PAGE_SIZE;
    let flags = ANONYMOUS | map::FIXED_NOREPLACE;
    let base = sys.mmap(SUBJECT_GVA, bytes, prot::READ | prot::WRITE, flags);
    if !must(sys, &shared.findings, 0, 0, file.map(|_| 0))
        || !must(sys, &shared.findings, SUBJECT_GVA, SUBJECT_GVA, base)
    {
        return shared.findings.status();
    }
    let result = team(sys, &shared, members, member, || {
        sys.begin();
        Owner::new(sys, &shared, members).act_all();
    });
    must(sys, &shared.findings, 0, 0, result.map(|()| 0));
    sys.end();
    let unmapped = sys.munmap(SUBJECT_GVA, bytes);
    must(sys, &shared.findings, SUBJECT_GVA, 0, unmapped);
    let closed = file::unmap(sys, &shared);
    must(sys, &shared.findings, 0, 0, closed);
    let (rounds, pages, threads) = (shared.rounds, shared.pages, shared.owners);
    print_line(
        sys,
        format_args!("stress: {rounds} acts of each of {threads} threads, {pages} pages"),
    );
    shared.findings.status()
}

fn member<S: Sys>(sys: &S, shared: &Shared, index: usize) {
    Owner::new(sys, shared, index).act_all();
}

#[cfg(test)]
mod tests {
    use crate::broken::{Fault, assert_caught};
    use crate::native;
    use abi::channel::ReportKind::{ChangedUnderneath, WrongResult};
    use abi::syscall::{Errno, nr};

    #[test]
    fn linux_is_clean() {
        for args in [
            "rounds=2000",
            "rounds=2000\0threads=4\0pages=5\0looks=20\0seed=7",
            "rounds=1000\0threads=1\0pages=2\0seed=9",
            "rounds=300\0pages=1024\0threads=3",
        ] {
            let outcome = native::run("stress", args, None).unwrap();
            assert_eq!(outcome.reports, [], "{args:?}");
            assert_eq!(outcome.status, 0);
        }
    }

    #[test]
    fn a_fork_that_shares_memory_is_caught() {
        let args = "rounds=500\0threads=3\0pages=4\0looks=20000";
        assert_caught(Fault::PrivateIsShared, "stress", args, ChangedUnderneath);
    }

    #[test]
    fn a_call_that_fails_is_caught() {
        let fault = Fault::Fails(nr::MADVISE, Errno::EINVAL);
        assert_caught(fault, "stress", "rounds=500", WrongResult);
    }
}
