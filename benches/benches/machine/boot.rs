//! From nothing to the first user instruction: 64 MiB, 2 vCPUs, the embedded kernel and programs.

use std::time::{Duration, Instant};

use abi::point::Point;
use serde::Serialize;
use vmm::control::{Machine, MachineConfig, ProgramSpec, Stop};

use crate::Failure;
use crate::setting::Setting;
use crate::stats::{Samples, Summary, count, time};
use crate::table;

/// KVM's statistic of instructions that it emulates.
const EMULATED: &str = "insn_emulation";
const MOST_INSTRUCTIONS: u64 = 300_000;
const MOST_TIME: Duration = Duration::from_millis(500);
/// Far more than any host needs.
const PATIENCE: Duration = Duration::from_secs(120);

/// Boots.
#[derive(Serialize)]
pub(crate) struct Boot {
    vcpus: u32,
    memory_bytes: u64,
    /// Instructions that KVM emulated until the first system call, on all vCPUs.
    emulated: Option<Summary>,
    /// The same on the vCPU that boots.
    emulated_first_vcpu: Option<Summary>,
    /// First resume to the first user instruction.
    first_user_ns: Summary,
    /// The same, with making the machine.
    from_nothing_ns: Summary,
    /// First resume to all vCPUs paused behind the first system call.
    first_call_ns: Summary,
}

pub(crate) fn measure(quick: bool) -> Result<Boot, Failure> {
    let config = MachineConfig {
        program: ProgramSpec {
            name: "smoke".into(),
            ..ProgramSpec::default()
        },
        ..MachineConfig::default()
    };
    let (vcpus, memory_bytes) = (config.vcpus, config.memory_bytes);
    assert_eq!(
        (vcpus, memory_bytes),
        (2, 64 << 20),
        "the figure is for this machine"
    );
    let [mut emulated, mut emulated_first_vcpu] = [Samples::new(), Samples::new()];
    let [mut first_user, mut from_nothing, mut first_call] =
        [Samples::new(), Samples::new(), Samples::new()];
    for _ in 0..if quick { 2 } else { 20 } {
        let started = Instant::now();
        let mut machine = Machine::new(config.clone())?;
        let made = started.elapsed();
        machine.trap_point(Point::SyscallEnter, true);
        let resumed = Instant::now();
        match machine.run_until(Some(PATIENCE))? {
            Stop::Point {
                point: Point::SyscallEnter,
                ..
            } => {}
            other => return Err(format!("no first system call, but {other:?}").into()),
        }
        first_call.add_time(resumed.elapsed());
        let to_user = machine
            .timings()
            .first_user
            .ok_or("a system call before the first user instruction")?;
        first_user.add_time(to_user);
        from_nothing.add_time(made + to_user);
        if let Some(stats) = machine.kvm_stats()
            && let Some(total) = stats.total(EMULATED)
        {
            emulated.add(total);
            emulated_first_vcpu.add(stats.vcpus[0].get(EMULATED).copied().unwrap_or(0));
        }
    }
    let any = |samples: &Samples| (samples.len() > 0).then(|| samples.summary());
    Ok(Boot {
        vcpus,
        memory_bytes,
        emulated: any(&emulated),
        emulated_first_vcpu: any(&emulated_first_vcpu),
        first_user_ns: first_user.summary(),
        from_nothing_ns: from_nothing.summary(),
        first_call_ns: first_call.summary(),
    })
}

impl Boot {
    pub(crate) fn print(&self, setting: &Setting) {
        let row = |what: &str, of: &Summary, text: fn(u64) -> String, figure: String| {
            [
                what.into(),
                of.samples.to_string(),
                text(of.min),
                text(of.p50),
                text(of.max),
                figure,
            ]
        };
        let mut rows = Vec::new();
        match (
            setting.counts_instructions(),
            &self.emulated,
            &self.emulated_first_vcpu,
        ) {
            (true, Some(all), Some(first)) => {
                let figure = judge(all.max < MOST_INSTRUCTIONS, &count(MOST_INSTRUCTIONS));
                rows.push(row(
                    "CPL 0 instructions to the first system call",
                    all,
                    count,
                    figure,
                ));
                rows.push(row("  of these on vCPU 0", first, count, String::new()));
            }
            _ => println!(
                "\nCPL 0 instructions are not counted here: this host does not emulate them."
            ),
        }
        let within = if setting.counts_instructions() {
            judge(
                self.first_user_ns.p50 < MOST_TIME.as_nanos() as u64,
                "500 ms",
            )
        } else {
            String::new()
        };
        rows.push(row(
            "first resume to first user instruction",
            &self.first_user_ns,
            time,
            within,
        ));
        rows.push(row(
            "the same, with making the machine",
            &self.from_nothing_ns,
            time,
            String::new(),
        ));
        rows.push(row(
            "first resume to all paused in the first system call",
            &self.first_call_ns,
            time,
            String::new(),
        ));
        table::print(
            &format!(
                "machine/boot: {} vCPUs ({} host CPUs), {} MiB",
                self.vcpus,
                setting.ratio(self.vcpus),
                self.memory_bytes >> 20
            ),
            ["", "samples", "min", "p50", "max", "figure"],
            &rows,
        );
    }
}

fn judge(reached: bool, figure: &str) -> String {
    let answer = if reached { "reached" } else { "MISSED" };
    format!("< {figure}: {answer}")
}
