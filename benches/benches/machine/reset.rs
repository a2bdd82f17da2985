//! What a reset of a saved machine costs, against what it cannot do without: copying the pages, and the
//! KVM calls that put the vCPUs back.
//!
//! The calls alone are a reset after which nothing has to be copied; the copying alone is that of as many pages
//! between two buffers. The pages are written by the host, so that there are exactly as many as wanted.

use std::hint::black_box;
use std::time::{Duration, Instant};

use abi::layout::PAGE_SIZE;
use serde::Serialize;
use vmm::control::{Interrupts, Machine, MachineConfig, ProgramSpec, Stop};
use vmm::memory::PhysMem;

use crate::Failure;
use crate::stats::{Samples, Summary};
use crate::table;

const PAGES: [u64; 4] = [0, 10, 100, 1_000];
const SAMPLES: u64 = 300;
/// First page that is written: behind the kernel, in memory that it has not used yet.
const FIRST: u64 = 0x200_0000 / PAGE_SIZE;

/// Resets by number of pages.
#[derive(Serialize)]
pub(crate) struct Reset(Vec<OfPages>);

#[derive(Serialize)]
struct OfPages {
    pages: u64,
    total_ns: Summary,
    find_ns: Summary,
    copy_ns: Summary,
    forget_ns: Summary,
    /// Copying as many pages between two buffers.
    plain_copy_ns: Summary,
}

pub(crate) fn measure(quick: bool) -> Result<Reset, Failure> {
    let mut machine = Machine::new(MachineConfig {
        vcpus: 2,
        interrupts: Interrupts::Controlled,
        program: ProgramSpec {
            name: "smoke".into(),
            ..ProgramSpec::default()
        },
        ..MachineConfig::default()
    })?;
    match machine.run_until(Some(Duration::from_millis(20)))? {
        Stop::Deadline | Stop::Exited { .. } => {}
        other => return Err(format!("the machine stopped: {other:?}").into()),
    }
    machine.save()?;
    let samples = if quick { 3 } else { SAMPLES };
    let all = PAGES.map(|pages| of_pages(&mut machine, pages, samples));
    Ok(Reset(all.into_iter().collect::<Result<_, _>>()?))
}

fn of_pages(machine: &mut Machine, pages: u64, samples: u64) -> Result<OfPages, Failure> {
    let [mut total, mut find, mut copy, mut forget, mut plain] = [(); 5].map(|()| Samples::new());
    let from = vec![1u8; (pages * PAGE_SIZE) as usize];
    let mut to = vec![2u8; from.len()];
    for _ in 0..samples {
        for page in 0..pages {
            machine.ram().write((FIRST + page) * PAGE_SIZE, &[1])?;
        }
        let timings = machine.reset()?;
        total.add_time(timings.total);
        find.add_time(timings.find);
        copy.add_time(timings.copy);
        forget.add_time(timings.forget);
        let started = Instant::now();
        for (from, to) in from
            .chunks(PAGE_SIZE as usize)
            .zip(to.chunks_mut(PAGE_SIZE as usize))
        {
            black_box(to).copy_from_slice(black_box(from));
        }
        plain.add_time(started.elapsed());
    }
    let mut byte = [1];
    machine.ram().read(FIRST * PAGE_SIZE, &mut byte)?;
    if byte != [0] {
        return Err("a page was not put back".into());
    }
    Ok(OfPages {
        pages,
        total_ns: total.summary(),
        find_ns: find.summary(),
        copy_ns: copy.summary(),
        forget_ns: forget.summary(),
        plain_copy_ns: plain.summary(),
    })
}

impl Reset {
    pub(crate) fn print(&self) {
        let calls = self.0[0].total_ns.p50;
        let rows: Vec<_> = self
            .0
            .iter()
            .map(|row| {
                let needed = calls + row.plain_copy_ns.p50;
                [
                    row.pages.to_string(),
                    row.total_ns.times()[0].clone(),
                    row.total_ns.times()[1].clone(),
                    row.find_ns.times()[0].clone(),
                    row.copy_ns.times()[0].clone(),
                    row.forget_ns.times()[0].clone(),
                    row.plain_copy_ns.times()[0].clone(),
                    format!("{:.2}", row.total_ns.p50 as f64 / needed.max(1) as f64),
                ]
            })
            .collect();
        table::print(
            "machine/reset: 2 vCPUs, 64 MiB; needed: the reset of 0 pages and plain copying",
            [
                "pages",
                "reset p50",
                "p99",
                "find",
                "copy",
                "forget",
                "plain copy",
                "reset/needed",
            ],
            &rows,
        );
    }
}
