//! What an exhaustive search came to.

use crate::explore::campaign::{Plan, Summary};
use crate::explore::strategy::{Explored, Within};

/// How far it got with every bound, and whether that is all; nothing for other strategies.
pub(super) fn ending(plan: &Plan, summary: &Summary, interrupted: bool) -> String {
    let Some(explored) = &summary.explored else {
        return String::new();
    };
    let mut told = Vec::new();
    if let Some(within) = explored.complete() {
        told.push(complete(explored, within));
    }
    if !explored.is_complete() {
        let reached = explored.reached();
        told.push(format!(
            "not complete{}: {} schedules so far, {}",
            with(reached.preemptions),
            reached.schedules,
            why(plan, summary, interrupted)
        ));
    }
    let sum = |count: fn(&Within) -> u64| explored.bounds.iter().map(count).sum::<u64>();
    told.push(format!(
        "{} executions were given up, and {} not begun, as equivalent to others",
        sum(|within| within.given_up),
        sum(|within| within.asleep)
    ));
    format!("  search     {}\n", told.join("\n             "))
}

fn complete(explored: &Explored, within: &Within) -> String {
    let all = if explored.is_complete() && within.out_of_bounds == 0 {
        "complete, and more preemptions allow no more"
    } else {
        "complete"
    };
    let before = explored.bounds.iter().filter_map(|before| {
        let most = before.preemptions?;
        (Some(most) < within.preemptions).then(|| format!("{most}: {}", before.schedules))
    });
    let before: Vec<String> = before.collect();
    let before = if before.is_empty() {
        String::new()
    } else {
        format!(" (with {})", before.join(", "))
    };
    format!(
        "{all}{}: {} schedules up to the order of independent steps{before}",
        with(within.preemptions),
        within.schedules
    )
}

/// Why it ended before it was through.
fn why(plan: &Plan, summary: &Summary, interrupted: bool) -> String {
    let explored = summary.explored.as_ref();
    let late = |limit| summary.elapsed >= limit;
    if let Some(explored) = explored.filter(|explored| explored.exhausted) {
        let long = explored.reached().too_long;
        format!("{long} were too long to vary to their ends")
    } else if interrupted {
        "interrupted".into()
    } else if plan.first && !summary.found.is_empty() {
        "ended with what was found (--keep-going goes on)".into()
    } else if plan.time_limit.is_some_and(late) {
        "ended by --time-limit".into()
    } else {
        "ended by --schedules".into()
    }
}

/// Where a search is, for a line of progress.
pub(super) fn progress(within: &Within) -> String {
    let complete = match within.preemptions {
        Some(most @ 1..) => format!("complete{}; ", with(Some(most - 1))),
        _ => String::new(),
    };
    let here = with(within.preemptions);
    format!("{complete}{} so far{here}, ", within.schedules)
}

fn with(most: Option<u32>) -> String {
    most.map_or_else(String::new, |most| format!(" with {}", preemptions(most)))
}

/// A bound, in words.
pub(super) fn preemptions(most: u32) -> String {
    match most {
        0 => "no preemption".into(),
        1 => "at most 1 preemption".into(),
        most => format!("at most {most} preemptions"),
    }
}
