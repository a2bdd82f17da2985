//! What a whole `stalemate run` of a program that does nothing costs, part by part.

use std::path::Path;
use std::time::Instant;

use serde::Serialize;
use vmm::report::Verdict;
use vmm::scenario;
use vmm::session::{self, Interrupt};

use crate::Failure;
use crate::stats::{Samples, Summary};
use crate::table;

const EMPTY: &str = "
name = \"empty\"
description = \"What does a run of nothing cost?\"

[machine]
vcpus = 2
memory = \"64M\"

[program]
name = \"exit\"
";

/// Runs of the empty program.
#[derive(Serialize)]
pub(crate) struct Run {
    /// From the first step to the last.
    total_ns: Summary,
    parts_ns: Vec<(&'static str, Summary)>,
}

pub(crate) fn measure(quick: bool) -> Result<Run, Failure> {
    let scenario = scenario::parse(Path::new("empty.toml"), EMPTY)?;
    let mut total = Samples::new();
    let mut parts: Vec<(&str, Samples)> = Vec::new();
    for _ in 0..if quick { 2 } else { 20 } {
        let started = Instant::now();
        let finished = session::run(&scenario, None, &Interrupt::default())?;
        total.add_time(started.elapsed());
        if finished.observed.verdict != Verdict::Held {
            return Err(format!("the empty program ended with {:?}", finished.observed).into());
        }
        for (index, (name, time)) in finished.timings.parts().into_iter().enumerate() {
            if parts.len() == index {
                parts.push((name, Samples::new()));
            }
            parts[index].1.add_time(time);
        }
    }
    Ok(Run {
        total_ns: total.summary(),
        parts_ns: parts
            .iter()
            .map(|(name, samples)| (*name, samples.summary()))
            .collect(),
    })
}

impl Run {
    pub(crate) fn print(&self) {
        let rows: Vec<_> = self
            .parts_ns
            .iter()
            .chain([&("whole run", self.total_ns)])
            .map(|(name, summary)| {
                let [p50, _, max] = summary.times();
                [
                    (*name).to_owned(),
                    summary.samples.to_string(),
                    crate::stats::time(summary.min),
                    p50,
                    max,
                ]
            })
            .collect();
        table::print(
            "machine/run: the program `exit`, 2 vCPUs, 64 MiB, invariants checked at the end",
            ["", "samples", "min", "p50", "max"],
            &rows,
        );
    }
}
