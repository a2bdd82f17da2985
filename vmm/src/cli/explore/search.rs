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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Two bounds, of which the second was begun.
    fn summary(change: impl FnOnce(&mut Summary, &mut Explored)) -> Summary {
        let within = |most, schedules| Within {
            preemptions: Some(most),
            schedules,
            out_of_bounds: 1,
            given_up: 2,
            ..Within::default()
        };
        let mut explored = Explored {
            bounds: vec![within(0, 5), within(1, 70)],
            exhausted: false,
        };
        let mut summary = Summary::default();
        change(&mut summary, &mut explored);
        summary.explored = Some(explored);
        summary
    }

    #[test]
    fn what_is_complete_is_said_with_every_bound() {
        let plan = Plan::replay();
        let all = summary(|_, explored| explored.exhausted = true);
        let text = ending(&plan, &all, false);
        let whole = "complete with at most 1 preemption: 70 schedules up to the order of independent steps (with 0: 5)";
        assert!(text.contains(whole), "{text}");
        assert!(!text.contains("not complete") && text.contains("4 executions were given up"));
        let small = summary(|_, explored| {
            explored.exhausted = true;
            explored.bounds[1].out_of_bounds = 0;
        });
        assert!(ending(&plan, &small, false).contains("more preemptions allow no more"));
        assert_eq!(ending(&plan, &Summary::default(), false), "");
    }

    #[test]
    fn what_is_not_complete_says_why_and_what_is() {
        let late = Plan {
            time_limit: Some(Duration::ZERO),
            ..Plan::replay()
        };
        let long = summary(|_, explored| {
            explored.exhausted = true;
            explored.bounds[1].too_long = 3;
        });
        let cases = [
            (Plan::replay(), summary(|_, _| ()), true, "interrupted"),
            (late, summary(|_, _| ()), false, "ended by --time-limit"),
            (
                Plan::replay(),
                summary(|_, _| ()),
                false,
                "ended by --schedules",
            ),
            (
                Plan::replay(),
                long,
                false,
                "3 were too long to vary to their ends",
            ),
        ];
        for (plan, summary, interrupted, why) in cases {
            let text = ending(&plan, &summary, interrupted);
            let before = "complete with no preemption: 5 schedules";
            let rest =
                format!("not complete with at most 1 preemption: 70 schedules so far, {why}");
            assert!(text.contains(before) && text.contains(&rest), "{text}");
        }
        let told = progress(summary(|_, _| ()).explored.unwrap().reached());
        assert_eq!(
            told,
            "complete with no preemption; 70 so far with at most 1 preemption, "
        );
    }
}
