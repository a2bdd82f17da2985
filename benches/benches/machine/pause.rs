//! How long it takes to pause and to resume every vCPU of a busy machine.
//!
//! Pause: from the first request until every vCPU has left the guest and stands between two
//! instructions. Resume: from the first request until every vCPU's thread has answered and is about to
//! enter the guest.

use std::time::{Duration, Instant};

use serde::Serialize;
use vmm::control::{Machine, MachineConfig, Stop};

use crate::Failure;
use crate::options::Options;
use crate::setting::Setting;
use crate::stats::{ENOUGH_FOR_P99, Samples, Summary};
use crate::table;
use crate::workload::Workload;

const VCPUS: std::ops::RangeInclusive<u32> = 1..=8;
/// Most samples of each machine.
const SAMPLES: u64 = 1000;
/// Time for the samples of one machine; [`ENOUGH_FOR_P99`] of them get twice as much. There are 16
/// machines and two minutes.
const BUDGET: Duration = Duration::from_secs(3);
/// How long the guest runs between two pauses, at least; up to twice this, so that pauses do not fall
/// into step with what the guest does.
const STRETCH: Duration = Duration::from_micros(500);
/// Longest wait until every vCPU has something to do.
const PATIENCE: Duration = Duration::from_secs(120);

/// Pauses of every machine.
#[derive(Serialize)]
pub(crate) struct Pause(Vec<OfMachine>);

#[derive(Serialize)]
struct OfMachine {
    workload: Workload,
    vcpus: u32,
    pause_ns: Summary,
    resume_ns: Summary,
    /// Of the vCPUs at the pauses, how many were at CPL 3, at CPL 0 and halted.
    found: Found,
}

#[derive(Default, Serialize)]
struct Found {
    user: u64,
    kernel: u64,
    halted: u64,
}

/// Nothing where nothing is wanted.
pub(crate) fn measure(options: &Options) -> Result<Option<Pause>, Failure> {
    let mut all = Vec::new();
    for workload in Workload::ALL {
        for vcpus in VCPUS.filter(|vcpus| !options.quick || vcpus.is_power_of_two()) {
            if options.wants(&format!("machine/pause/{}/{vcpus}", workload.name())) {
                all.push(of_machine(workload, vcpus, options.quick)?);
            }
        }
    }
    Ok((!all.is_empty()).then_some(Pause(all)))
}

fn of_machine(workload: Workload, vcpus: u32, quick: bool) -> Result<OfMachine, Failure> {
    let mut machine = busy(workload, vcpus)?;
    let [mut pause, mut resume] = [Samples::new(), Samples::new()];
    let mut found = Found::default();
    let started = Instant::now();
    let most = if quick { 5 } else { SAMPLES };
    let mut stretches = Stretches(1);
    let in_time = |samples: u64| match samples {
        0..ENOUGH_FOR_P99 => started.elapsed() < 2 * BUDGET,
        _ => started.elapsed() < BUDGET,
    };
    while pause.len() < most && in_time(pause.len()) {
        let resumed = machine.resume_all()?;
        std::thread::sleep(stretches.next());
        let paused = machine.pause_all()?;
        for (what, timings) in [("resumed", &resumed), ("paused", &paused)] {
            if timings.each.len() != vcpus as usize {
                let only = timings.each.len();
                return Err(format!("only {only} of {vcpus} busy vCPUs were {what}").into());
            }
        }
        resume.add_time(resumed.total);
        pause.add_time(paused.total);
        found.look(&machine)?;
    }
    Ok(OfMachine {
        workload,
        vcpus,
        pause_ns: pause.summary(),
        resume_ns: resume.summary(),
        found,
    })
}

/// A machine of which every vCPU has a process of its own that never waits.
fn busy(workload: Workload, vcpus: u32) -> Result<Machine, Failure> {
    let config = MachineConfig {
        vcpus,
        // A loop at CPL 3 shows no sign of life.
        watchdog: Duration::from_secs(3600),
        ..MachineConfig::default()
    };
    let mut machine = Machine::with_user_image(config, &workload.image())?;
    let started = Instant::now();
    // A vCPU may be awake for a moment and have nothing to do yet.
    let mut awake = 0;
    while awake < 5 {
        match machine.run_until(Some(Duration::from_millis(20)))? {
            Stop::Deadline => {}
            other => return Err(format!("a busy machine stopped: {other:?}").into()),
        }
        let mut found = Found::default();
        found.look(&machine)?;
        let all_awake = machine.timings().first_user.is_some() && found.halted == 0;
        awake = if all_awake { awake + 1 } else { 0 };
        if started.elapsed() > PATIENCE {
            return Err(format!("{vcpus} vCPUs are not busy after {PATIENCE:?}").into());
        }
    }
    Ok(machine)
}

impl Found {
    fn look(&mut self, machine: &Machine) -> Result<(), Failure> {
        for vcpu in 0..machine.nr_vcpus() {
            let vcpu = machine.vcpu_state(vcpu)?;
            match (vcpu.halted, vcpu.cpl()) {
                (true, _) => self.halted += 1,
                (false, 0) => self.kernel += 1,
                (false, _) => self.user += 1,
            }
        }
        Ok(())
    }

    fn percent(&self) -> String {
        let sum = (self.user + self.kernel + self.halted).max(1);
        let of = |part: u64| (100 * part + sum / 2) / sum;
        format!(
            "{}/{}/{} %",
            of(self.user),
            of(self.kernel),
            of(self.halted)
        )
    }
}

/// Lengths of the stretches between two pauses (xorshift64: the same in every measurement).
struct Stretches(u64);

impl Stretches {
    fn next(&mut self) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        STRETCH + STRETCH.mul_f64((self.0 % 1000) as f64 / 1000.0)
    }
}

impl Pause {
    pub(crate) fn print(&self, setting: &Setting) {
        for workload in Workload::ALL {
            let rows: Vec<_> = self
                .0
                .iter()
                .filter(|machine| machine.workload == workload)
                .map(|machine| {
                    let [p50, p99, max] = machine.pause_ns.times();
                    let [resume_p50, resume_p99, resume_max] = machine.resume_ns.times();
                    [
                        machine.vcpus.to_string(),
                        setting.ratio(machine.vcpus),
                        machine.pause_ns.samples.to_string(),
                        p50,
                        p99,
                        max,
                        resume_p50,
                        resume_p99,
                        resume_max,
                        machine.found.percent(),
                    ]
                })
                .collect();
            if rows.is_empty() {
                continue;
            }
            table::print(
                &format!("machine/pause: all vCPUs {}", workload.describe()),
                [
                    "vCPUs",
                    "vCPU:CPU",
                    "samples",
                    "pause p50",
                    "p99",
                    "max",
                    "resume p50",
                    "p99",
                    "max",
                    "CPL 3/CPL 0/halted",
                ],
                &rows,
            );
        }
    }
}
