//! The verdict for a person: one line that says it all, then what a person asks next.

use std::fmt::Write as _;
use std::time::Duration;

use super::{RunResult, Verdict, Violation};
use crate::scenario::values::format_size;

/// Whether text may carry ANSI colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paint {
    /// Never.
    Plain,
    /// A terminal that shows them.
    Colour,
}

impl Paint {
    /// Good.
    #[must_use]
    pub fn green(self, text: &str) -> String {
        self.with("1;32", text)
    }
    /// Bad.
    #[must_use]
    pub fn red(self, text: &str) -> String {
        self.with("1;31", text)
    }
    /// Neither, but worth a look.
    #[must_use]
    pub fn yellow(self, text: &str) -> String {
        self.with("33", text)
    }
    /// Headings.
    #[must_use]
    pub fn bold(self, text: &str) -> String {
        self.with("1", text)
    }
    /// What may be skipped by the eye.
    #[must_use]
    pub fn dim(self, text: &str) -> String {
        self.with("2", text)
    }
    fn with(self, code: &str, text: &str) -> String {
        match self {
            Self::Plain => text.to_owned(),
            Self::Colour => format!("\x1b[{code}m{text}\x1b[0m"),
        }
    }
}

/// How much the text says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Detail {
    /// The headline.
    Headline,
    /// What a person needs.
    Normal,
    /// Everything: every invariant, KVM's statistics, the serial output.
    Full,
}

/// The whole text.
#[must_use]
pub fn render(result: &RunResult, paint: Paint, detail: Detail) -> String {
    let mut text = format!("{}\n", headline(result, paint));
    if detail == Detail::Headline {
        return text;
    }
    machine(&mut text, result, paint);
    for violation in &result.violations {
        self::violation(&mut text, violation, paint);
    }
    if let Some(crash) = &result.crash_text {
        let _ = write!(text, "\n{}\n", crash.trim_end());
    }
    not_decided(&mut text, result, paint, detail);
    stream(&mut text, result, paint);
    trace(&mut text, result, paint);
    for note in &result.notes {
        let _ = writeln!(text, "  {} {note}", paint.yellow("note:"));
    }
    times(&mut text, result, paint);
    if detail == Detail::Full {
        everything(&mut text, result, paint);
    }
    let _ = writeln!(
        text,
        "  {} {}",
        paint.dim("repeat:"),
        shell_words(&result.command)
    );
    text
}

/// The one line.
#[must_use]
pub fn headline(result: &RunResult, paint: Paint) -> String {
    let (examined, vacuous, undecided) = result.invariant_totals();
    let mut counts = format!("{examined} invariants examined");
    for (count, what) in [
        (vacuous, "with nothing to examine"),
        (undecided, "not decided"),
    ] {
        if count > 0 {
            let _ = write!(counts, ", {count} {what}");
        }
    }
    let runs = match (result.runs, result.runs_done) {
        (1, _) => String::new(),
        (runs, done) if runs == done && result.verdict == Verdict::Held => {
            format!(" in {runs} runs")
        }
        (runs, done) => format!(" in run {done} of {runs}"),
    };
    match result.verdict {
        Verdict::Held if is_undecided(result) => format!(
            "{} {}",
            paint.yellow(&format!(
                "? no violation is certain{runs}, but some are possible"
            )),
            paint.dim(&format!("({counts})"))
        ),
        Verdict::Held => format!(
            "{} {}",
            paint.green(&format!("✔ all invariants held{runs}")),
            paint.dim(&format!("({counts})"))
        ),
        Verdict::Violation => {
            let first = result.violations.first();
            let title = first.map_or("", |violation| violation.title.as_str());
            let more = match result.violations.len() {
                0 | 1 => String::new(),
                n => format!(" (and {} more)", n - 1),
            };
            format!(
                "{} {title}{more}",
                paint.red(&format!(
                    "✘ VIOLATION {}{runs}",
                    first.map_or("", |violation| violation.id.as_str())
                ))
            )
        }
        Verdict::Crashed => {
            let reason = reason(result).unwrap_or("the guest crashed");
            format!("{} {reason}", paint.red(&format!("✘ GUEST FAILED{runs}")))
        }
        Verdict::BadInput => {
            let bad = paint.red("✘ BAD INPUT");
            match reason(result) {
                Some(reason) => format!("{bad} {reason}"),
                None => format!(
                    "{bad} program '{}' refused what it was given",
                    result.scenario.program
                ),
            }
        }
        Verdict::Interrupted => format!(
            "{} nothing wrong was found until then",
            paint.yellow(&format!("◌ INTERRUPTED{runs}"))
        ),
    }
}

/// What kept the guest from its end, in one line.
fn reason(result: &RunResult) -> Option<&str> {
    result.crash.as_ref()?.get("reason")?.as_str()
}

fn machine(text: &mut String, result: &RunResult, paint: Paint) {
    let scenario = &result.scenario;
    let _ = writeln!(
        text,
        "  {}: {} vCPU{}, {}, {} interrupts, {}",
        paint.bold(&scenario.name),
        scenario.vcpus,
        if scenario.vcpus == 1 { "" } else { "s" },
        format_size(scenario.memory_bytes),
        scenario.interrupts,
        result.host.description,
    );
    for bug in &scenario.bugs {
        let _ = writeln!(text, "  {} {bug}", paint.yellow("seeded bug on:"));
    }
}

fn violation(text: &mut String, violation: &Violation, paint: Paint) {
    let _ = writeln!(
        text,
        "\n  {} {} {}",
        paint.red(&violation.id),
        violation.title,
        paint.dim(&format!("at {}", violation.at))
    );
    for (name, value) in [
        ("expected", &violation.expected),
        ("found", &violation.found),
    ] {
        if let Some(value) = value {
            let _ = writeln!(text, "    {name:<9}{value}");
        }
    }
    for line in &violation.details {
        let _ = writeln!(text, "    {line}");
    }
}

fn not_decided(text: &mut String, result: &RunResult, paint: Paint, detail: Detail) {
    let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
    for invariant in result.invariants.iter().filter(|one| one.checks == 0) {
        for reason in invariant.skipped.keys() {
            match reasons.iter_mut().find(|(known, _)| known == reason) {
                Some((_, ids)) => ids.push(invariant.id),
                None => reasons.push((reason, vec![invariant.id])),
            }
        }
    }
    if !result.violations.is_empty() || result.crash_text.is_some() {
        text.push('\n');
    }
    for (reason, ids) in reasons {
        let _ = writeln!(
            text,
            "  {} {}: {reason}",
            paint.dim("not decided:"),
            ids.join(", ")
        );
    }
    if detail == Detail::Full {
        for invariant in result.invariants.iter().filter(|one| one.checks > 0) {
            let skipped: u64 = invariant.skipped.values().sum();
            let _ = writeln!(
                text,
                "  {} {}: {} examined, {skipped} skipped",
                paint.dim("invariant"),
                invariant.id,
                invariant.examined
            );
        }
    }
}

/// A monitor of the merged streams has given up at what some order of the events violates.
fn is_undecided(result: &RunResult) -> bool {
    let stream = result.stream.as_ref();
    stream.is_some_and(|stream| !stream.given_up.is_empty() || stream.broken.is_some())
}

/// How the run was disturbed, and how far its merged streams were judged.
fn stream(text: &mut String, result: &RunResult, paint: Paint) {
    for one in &result.disturbances {
        let _ = write!(
            text,
            "  {} {}: {} of {} passages",
            paint.dim("disturbed:"),
            one.rule,
            one.hits,
            one.passages
        );
        if one.held_ns > 0 {
            let time = |ns| format_time(Duration::from_nanos(ns));
            let _ = write!(
                text,
                ", held {}, {} at most",
                time(one.held_ns),
                time(one.longest_ns)
            );
        }
        if one.timeouts > 0 {
            let _ = write!(text, ", {} in vain", one.timeouts);
        }
        text.push('\n');
    }
    let Some(stream) = &result.stream else {
        return;
    };
    let _ = write!(
        text,
        "  {} {} events judged",
        paint.dim("streams:"),
        stream.events
    );
    for (id, count) in &stream.undecided {
        let _ = write!(
            text,
            ", {count} {id} undecided (another order of the events may be clean)"
        );
    }
    if stream.unjudged > 0 {
        let _ = write!(
            text,
            ", {} not judged (one before them is missing)",
            stream.unjudged
        );
    }
    text.push('\n');
    for (id, ticket) in &stream.given_up {
        let place = match *ticket {
            u64::MAX => "the end of the run".to_owned(),
            ticket => format!("event {ticket}"),
        };
        let _ = writeln!(
            text,
            "  {} too many orders to try for {id} at {place}: its monitor is silent from there on",
            paint.yellow("note:")
        );
    }
    if let Some(why) = &stream.broken {
        let _ = writeln!(
            text,
            "  {} the streams make no sense: {why}",
            paint.yellow("note:")
        );
    }
}

fn trace(text: &mut String, result: &RunResult, paint: Paint) {
    if let Some(summary) = &result.trace {
        let _ = writeln!(text, "  {}", paint.dim("trace:"));
        for line in summary.to_string().lines() {
            let _ = writeln!(text, "    {line}");
        }
    }
}

fn times(text: &mut String, result: &RunResult, paint: Paint) {
    let parts: Vec<String> = result
        .timings_ns
        .parts()
        .into_iter()
        .filter(|(_, time)| !time.is_zero())
        .map(|(name, time)| format!("{name} {}", format_time(time)))
        .collect();
    if !parts.is_empty() {
        let _ = writeln!(text, "  {} {}", paint.dim("time:"), parts.join(", "));
    }
}

fn everything(text: &mut String, result: &RunResult, paint: Paint) {
    if !result.kvm_stats.is_empty() {
        let stats: Vec<String> = result
            .kvm_stats
            .iter()
            .filter(|(_, value)| **value != 0)
            .map(|(name, value)| format!("{name} {value}"))
            .collect();
        let _ = writeln!(
            text,
            "  {} {}",
            paint.dim("KVM statistics:"),
            stats.join(", ")
        );
    }
    if !result.serial.trim().is_empty() {
        let _ = writeln!(text, "  {}", paint.dim("serial:"));
        for line in result.serial.lines() {
            let _ = writeln!(text, "    {line}");
        }
    }
}

/// `time` to three digits in the unit that suits it.
#[must_use]
pub fn format_time(time: Duration) -> String {
    let ns = time.as_nanos();
    let (value, unit) = match ns {
        0..1_000 => return format!("{ns} ns"),
        1_000..1_000_000 => (ns as f64 / 1e3, "us"),
        1_000_000..1_000_000_000 => (ns as f64 / 1e6, "ms"),
        _ => (ns as f64 / 1e9, "s"),
    };
    let decimals = if value < 10.0 {
        2
    } else {
        usize::from(value < 100.0)
    };
    format!("{value:.decimals$} {unit}")
}

/// `words` as a shell reads them back.
#[must_use]
pub fn shell_words(words: &[String]) -> String {
    let quote = |word: &String| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
        if !word.is_empty() && word.chars().all(plain) {
            word.clone()
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    };
    words.iter().map(quote).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests;
