//! How many instructions of the guest kernel KVM emulates for each system call and page fault of a
//! program, on a host that emulates CPL 0 (`stalemate doctor` says whether this is one).
//!
//! ```text
//! cargo run -p vmm --example instructions -- smoke
//! cargo run -p vmm --example instructions -- cow-fork rounds=3
//! cargo run -p vmm --example instructions -- smoke --no-events
//! ```
//!
//! The machine has one vCPU and stops at the end of every call and fault; what KVM has emulated since
//! the stop before is one whole entry: the way out of the last one, the way in, and the work. Entries
//! that another task interrupts are left out. KVM counts a string instruction once, however long.

use std::collections::BTreeMap;
use std::error::Error;
use std::time::Duration;

use abi::point::Point;
use abi::pte::fault;
use vmm::control::{Machine, MachineConfig, ProgramSpec, Stop};

const LIMIT: Duration = Duration::from_secs(60);

fn main() -> Result<(), Box<dyn Error>> {
    let (options, words): (Vec<String>, Vec<String>) = std::env::args()
        .skip(1)
        .partition(|word| word.starts_with("--"));
    let mut config = MachineConfig::default();
    for option in &options {
        match option.as_str() {
            "--no-events" => config.events = 0,
            other => return Err(format!("{other}: the only option is --no-events").into()),
        }
    }
    let mut words = words.into_iter();
    let name = words.next().unwrap_or_else(|| "smoke".into());
    let args = words
        .filter_map(|word| {
            word.split_once('=')
                .map(|(key, value)| (key.into(), value.into()))
        })
        .collect();
    let mut machine = Machine::new(MachineConfig {
        vcpus: 1,
        program: ProgramSpec {
            name,
            args,
            data: None,
        },
        ..config
    })?;
    let counts = measure(&mut machine)?;
    println!(
        "{:<28} {:>6} {:>7} {:>7} {:>7}",
        "entry", "count", "least", "median", "most"
    );
    for (what, mut counts) in counts {
        counts.sort_unstable();
        let (least, most) = (counts[0], counts[counts.len() - 1]);
        let median = counts[counts.len() / 2];
        println!(
            "{what:<28} {:>6} {least:>7} {median:>7} {most:>7}",
            counts.len()
        );
    }
    Ok(())
}

/// Instructions of each entry, by what it was.
fn measure(machine: &mut Machine) -> Result<BTreeMap<String, Vec<u64>>, Box<dyn Error>> {
    let mut counts = BTreeMap::<String, Vec<u64>>::new();
    let mut before = None;
    let mut entry: Option<String> = None;
    for point in [
        Point::SyscallEnter,
        Point::SyscallExit,
        Point::FaultEnter,
        Point::FaultExit,
    ] {
        machine.trap_point(point, true);
    }
    loop {
        let (point, args) = match machine.run_until(Some(LIMIT))? {
            Stop::Point { point, args, .. } => (point, args),
            Stop::Exited { .. } => return Ok(counts),
            other => return Err(format!("{other:?}\n{}", machine.serial_output()).into()),
        };
        let now = machine
            .kvm_stats()
            .and_then(|stats| stats.total("insn_emulation"))
            .ok_or("this host's KVM does not count emulated instructions")?;
        match point {
            Point::SyscallEnter | Point::FaultEnter => {
                if entry.replace(describe(point, args)).is_some() {
                    before = None; // Another task came between.
                }
            }
            _ => {
                if let (Some(what), Some(before)) = (entry.take(), before) {
                    counts.entry(what).or_default().push(now - before);
                }
                before = Some(now);
            }
        }
    }
}

fn describe(point: Point, [first, second]: [u64; 2]) -> String {
    if point == Point::SyscallEnter {
        return format!("system call {first}");
    }
    let access = match second & (fault::WRITE | fault::FETCH) {
        0 => "read",
        fault::WRITE => "write",
        _ => "fetch",
    };
    let entry = match second & fault::PRESENT {
        0 => "nothing",
        _ => "a present entry",
    };
    format!("fault, {access} of {entry}")
}
