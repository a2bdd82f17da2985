//! `crash`: fails on request, so that the host's report of it can be seen.
//!
//! The kernel fails in the system call [`nr::TESTBED_CRASH`], or the program spins for ever without
//! one, which nothing interrupts: there is no timer. A kernel that has no such call, as Linux, is told
//! to be the wrong one.

use abi::syscall::{crash, nr};

use super::{Data, Program};
use crate::args::{Arg, Args};
use crate::sys::{Sys, print_line};

pub(super) const PROGRAM: Program = Program {
    name: "crash",
    help: "fails on request, to show what the host makes of it",
    args: &[Arg {
        name: "how",
        default: "panic|wild|hang|user-spin",
        range: 0..=USER_SPIN,
        help: "the kernel panics, loads from nowhere or hangs, or CPL 3 spins without a system call",
    }],
    data: Data::Ignored,
    has_setup: false,
};

const USER_SPIN: u64 = 3;
const _: () = assert!(crash::PANIC == 0 && crash::WILD == 1 && crash::HANG == 2);
/// Exit status of a program that cannot do what it was asked (the same as the host's).
const BAD_USAGE: i32 = 2;

pub(super) fn run<S: Sys>(sys: &S, args: &Args<'_>) -> i32 {
    let how = args.number("how");
    if how == USER_SPIN {
        spin();
    }
    let result = sys.syscall(nr::TESTBED_CRASH, [how, 0, 0, 0, 0, 0]);
    print_line(
        sys,
        format_args!("crash: this kernel cannot be asked to fail: {result:?}"),
    );
    BAD_USAGE
}

/// Out of line, so that a backtrace names it.
#[inline(never)]
fn spin() -> ! {
    loop {
        core::hint::spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::native;

    #[test]
    fn a_kernel_without_the_call_refuses() {
        for how in ["panic", "wild", "hang"] {
            let outcome = native::run("crash", &format!("how={how}"), None).unwrap();
            assert_eq!(outcome.status, BAD_USAGE);
            assert!(
                outcome
                    .text
                    .contains("cannot be asked to fail: Err(ENOSYS)"),
                "{}",
                outcome.text
            );
            assert_eq!(outcome.reports, []);
        }
    }
}
