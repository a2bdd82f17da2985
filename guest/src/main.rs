//! The user image: what the first process executes at CPL 3.
//!
//! The kernel enters `_start` with the argument page in rdi (rsi bytes of NUL-terminated strings:
//! the program's name, then `key=value`) and the data blob in rdx (r8 bytes), 0 where there is none.
#![no_std]
#![no_main]
#![allow(
    unsafe_code,
    reason = "the entry point and what the kernel passes to it"
)]

use core::arch::global_asm;
use core::fmt::Write;

use abi::channel::ReportKind;
use abi::oracle::Area;
use abi::syscall::{Errno, decode, nr};
use guest::rt::{Rt, Testbed, Tlb, access_fixup, access_range, raw_syscall};
use guest::sys::print_line;

mod mem;

/// The testbed's own system calls.
#[derive(Clone, Copy)]
struct Kernel {
    cpus: u64,
    tlb: Tlb,
}

impl Testbed for Kernel {
    fn print(&self, text: &[u8]) {
        print(text);
    }
    fn report(&self, kind: ReportKind, gva: u64, expected: u64, found: u64) {
        raw_syscall(
            nr::TESTBED_REPORT,
            [kind as u64, gva, expected, found, 0, 0],
        );
    }
    fn tlb(&self) -> Tlb {
        self.tlb
    }
    fn maps(&self, start: u64, end: u64, areas: &mut [Area]) -> Result<usize, Errno> {
        let (buffer, room) = (areas.as_mut_ptr().expose_provenance(), areas.len());
        let args = [start, end, buffer as u64, room as u64, 0, 0];
        decode(raw_syscall(nr::TESTBED_MAPS, args)).map(|found| found as usize)
    }
    fn cpus(&self) -> u64 {
        self.cpus
    }
}

fn print(text: &[u8]) {
    let address = text.as_ptr().expose_provenance() as u64;
    raw_syscall(nr::WRITE, [1, address, text.len() as u64, 0, 0, 0]);
}

global_asm!(
    ".globl _start",
    ".type _start, @function",
    "_start:",
    "xor ebp, ebp",
    "mov rcx, r8",
    "and rsp, -16",
    "call {main}",
    "ud2",
    main = sym user_main,
);

/// Exit status of a program that cannot be started as asked (the same as the host's).
const BAD_USAGE: i32 = 2;
/// Exit status of a panic (Rust's).
const PANIC: u64 = 101;

extern "C" fn user_main(args: u64, args_len: u64, data: u64, data_len: u64) -> ! {
    let (start, end) = access_range();
    raw_syscall(
        nr::TESTBED_FAULT_FIXUP,
        [start, end, access_fixup(), 0, 0, 0],
    );
    let cpus = decode(raw_syscall(nr::TESTBED_NR_CPUS, [0; 6])).unwrap_or(1);
    let cpus = cpus.clamp(1, abi::layout::MAX_CPUS as u64);
    let tlb = Tlb::from_call(decode(raw_syscall(nr::TESTBED_TLB, [0; 6])));
    let sys = Rt::new(Kernel {
        cpus: (1 << cpus) - 1,
        tlb,
    });

    let data = (data != 0).then(|| bytes(data, data_len));
    let Ok(args) = core::str::from_utf8(bytes(args, args_len)) else {
        print_line(&sys, format_args!("the argument page is not UTF-8"));
        sys.exit(BAD_USAGE);
    };
    let (program, args) = args.split_once('\0').unwrap_or((args, ""));
    match guest::run(&sys, program, args, data) {
        Ok(status) => sys.exit(status),
        Err(error) => {
            print_line(&sys, format_args!("{error}"));
            sys.exit(BAD_USAGE)
        }
    }
}

fn bytes(address: u64, len: u64) -> &'static [u8] {
    let start = core::ptr::with_exposed_provenance(address as usize);
    // SAFETY: the kernel mapped the argument page and the data blob read-only before it entered
    // `_start` and told their addresses and lengths; no program unmaps them.
    unsafe { core::slice::from_raw_parts(start, len as usize) }
}

/// Prints as it formats: a panic must not need a stack buffer.
struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        print(text.as_bytes());
        Ok(())
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let _ = writeln!(Console, "user program: {info}");
    loop {
        raw_syscall(nr::EXIT_GROUP, [PANIC, 0, 0, 0, 0, 0]);
    }
}
