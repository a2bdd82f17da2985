//! `stalemate bench`: what operations of the guest's kernel cost, against the host's own Linux.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use super::args;
use super::exit::Exit;
use super::failure::Failure;
use super::output::Output;
use crate::bench::{self, Guest, InGuest, Op, Ticks};
use crate::kvm::host::{Host, HostKind};
use crate::report::SCHEMA;
use crate::report::verdict::{Paint, format_time};
use crate::session;

/// What one operation costs.
#[derive(Serialize)]
struct Row {
    op: &'static str,
    guest: InGuest,
    linux: Ticks,
    /// The guest's median by Linux's; none where the guest's time means nothing.
    ratio: Option<f64>,
}

pub(super) fn bench(options: &args::Bench, output: &Output) -> Result<Exit, Failure> {
    if options.on_linux {
        for op in chosen(options) {
            let text = bench::in_this_process(op, rounds_of(op, options));
            output.say(&text);
        }
        return Ok(Exit::Held);
    }
    output.check_json()?;
    let guest = Guest {
        kernel: options.kernel.clone(),
        cmdline: options
            .params
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect::<Vec<_>>()
            .join(" "),
    };
    let emulates = Host::kind() == HostKind::Emulating;
    let mut rows = Vec::new();
    for op in chosen(options) {
        let rounds = rounds_of(op, options);
        let measured = guest.measure(op, rounds)?;
        let arguments = [
            "bench",
            "--on-linux",
            op.name(),
            "--rounds",
            &rounds.to_string(),
        ];
        let linux = bench::on_linux(op, &arguments.map(String::from))?;
        let ratio = measured.ticks.p50 as f64 / linux.p50.max(1) as f64;
        rows.push(Row {
            op: op.name(),
            guest: measured,
            linux,
            ratio: (!emulates).then_some(ratio),
        });
    }
    let host = session::host()?;
    output.json(&serde_json::json!({
        "schema": SCHEMA,
        "kind": "bench",
        "host": host,
        "kernel": crate::boot::kernel_hash(),
        "ops": rows,
    }))?;
    output.say(&table(&rows, emulates, output.paint));
    Ok(Exit::Held)
}

fn chosen(options: &args::Bench) -> Vec<Op> {
    if options.ops.is_empty() {
        return Op::ALL.to_vec();
    }
    options.ops.clone()
}

fn rounds_of(op: Op, options: &args::Bench) -> u64 {
    // A fork takes as long as hundreds of the others.
    let usual = match op {
        Op::Fork => 30,
        Op::Map512 => 60,
        _ => 300,
    };
    options.rounds.unwrap_or(usual)
}

fn table(rows: &[Row], emulates: bool, paint: Paint) -> String {
    let mut text = format!(
        "{} one vCPU, median of all rounds\n",
        paint.bold("what operations cost:")
    );
    let [guest, last] = if emulates {
        ["instructions", ""]
    } else {
        ["guest", "guest/Linux"]
    };
    let head = format!(
        "  {:<40}{:>8}{guest:>14}{:>12}{last:>13}\n",
        "", "rounds", "Linux"
    );
    text += &paint.dim(&head);
    for row in rows {
        let time = |ticks: u64| match row.guest.tsc_khz {
            Some(khz) if khz > 0 => {
                let nanos = ticks as f64 * 1e6 / f64::from(khz);
                format_time(Duration::from_nanos(nanos as u64))
            }
            _ => format!("{ticks} ticks"),
        };
        let guest = match (emulates, row.guest.instructions) {
            (true, Some(count)) => format!("{count:.0}"),
            (true, None) => "not counted".into(),
            (false, _) => time(row.guest.ticks.p50),
        };
        let ratio = row
            .ratio
            .map_or(String::new(), |ratio| format!("{ratio:.2}"));
        let linux = time(row.linux.p50);
        let op = Op::ALL.iter().find(|op| op.name() == row.op);
        let what = op.map_or(row.op, |op| op.describe());
        let _ = writeln!(
            text,
            "  {what:<40}{:>8}{guest:>14}{linux:>12}{ratio:>13}",
            row.linux.rounds
        );
    }
    if emulates {
        text += "  The guest's time is not told: this host emulates CPL 0. `scripts/lab -- bench` compares times.\n";
    }
    text
}
