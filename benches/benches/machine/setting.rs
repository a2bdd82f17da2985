//! Where and when it was measured: a figure without this means nothing.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use vmm::kvm::host::{Host, HostKind};

#[derive(Serialize)]
pub(crate) struct Setting {
    host: HostKind,
    cpu: String,
    kernel: String,
    pub(crate) cpus: usize,
    date: String,
    /// Runnable threads on this host, averaged over the minute before.
    load: Option<f64>,
    profile: &'static str,
    quick: bool,
}

impl Setting {
    pub(crate) fn look(quick: bool) -> Self {
        let host = Host::probe();
        Self {
            host: host.kind,
            cpu: host.cpu_model,
            kernel: host.kernel,
            cpus: host.cpus,
            date: today(),
            load: std::fs::read_to_string("/proc/loadavg")
                .ok()
                .and_then(|text| text.split(' ').next()?.parse().ok()),
            profile: if cfg!(debug_assertions) {
                "debug"
            } else {
                "release"
            },
            quick,
        }
    }

    pub(crate) fn print(&self) {
        println!("host     {}", self.host.describe());
        println!("kernel   Linux {}", self.kernel);
        println!("CPUs     {} x {}", self.cpus, self.cpu);
        let load = self
            .load
            .map_or("unknown".into(), |load| format!("{load:.2}"));
        println!(
            "date     {}, load average of the last minute {load}",
            self.date
        );
        let quick = if self.quick {
            ", quick: shows that it works, measures nothing"
        } else {
            ""
        };
        println!("build    {}{quick}", self.profile);
    }

    /// True where KVM counts every instruction at CPL 0, because it emulates each.
    pub(crate) fn counts_instructions(&self) -> bool {
        self.host == HostKind::Emulating
    }

    /// vCPUs for each host CPU.
    pub(crate) fn ratio(&self, vcpus: u32) -> String {
        format!("{}:{}", vcpus, self.cpus)
    }
}

fn today() -> String {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let (year, month, day) = civil(seconds / 86_400);
    format!("{year}-{month:02}-{day:02}")
}

/// The Gregorian date of a day since 1970-01-01, by years that begin in March (H. Hinnant,
/// "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`).
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // since 0000-03-01
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = (era * 400 + year, (month + 2) % 12 + 1);
    (year + u64::from(month <= 2), month, day)
}
