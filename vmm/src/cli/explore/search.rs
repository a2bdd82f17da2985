//! What an exhaustive search came to, in a line.

use crate::explore::campaign::{Plan, Strategy, Summary};

/// How far it got, and whether that is all; nothing for other strategies.
pub(super) fn ending(plan: &Plan, summary: &Summary, interrupted: bool) -> String {
    let (Strategy::Exhaustive { preemptions }, Some(explored)) = (plan.strategy, summary.explored)
    else {
        return String::new();
    };
    let within = |most: Option<u32>| match most {
        Some(1) => " with at most 1 preemption".into(),
        Some(most) => format!(" with at most {most} preemptions"),
        None => String::new(),
    };
    let (whole, pruned) = (explored.whole(), explored.pruned());
    let pruned = format!("({pruned} pruned as equivalent)");
    if explored.complete() {
        return line(&format!(
            "all {whole} schedules{} {pruned}",
            within(preemptions)
        ));
    }
    let why = if explored.exhausted {
        format!(
            "{} schedules were too long to vary to their ends",
            explored.too_long
        )
    } else if interrupted {
        "interrupted".into()
    } else if plan.first && !summary.found.is_empty() {
        "it ended with what was found (--keep-going goes on)".into()
    } else if plan
        .time_limit
        .is_some_and(|limit| summary.elapsed >= limit)
    {
        "--time-limit is reached".into()
    } else {
        "--schedules is reached".into()
    };
    let before = match explored.preemptions {
        Some(bound @ 1..) => format!("all schedules{} and ", within(Some(bound - 1))),
        _ => String::new(),
    };
    let reached = within(explored.preemptions);
    line(&format!(
        "not complete, {why}; tried {before}{whole}{reached} {pruned}"
    ))
}

fn line(what: &str) -> String {
    format!("  search     exhaustive: {what}\n")
}
