//! From a schedule that fails to one with as few context switches as possible that still does.

use super::{Actor, Schedule};

/// Context switches between vCPUs.
#[must_use]
pub fn switches(schedule: &Schedule) -> usize {
    let vcpus = schedule.segments.iter().filter_map(|s| match s.actor {
        Actor::Vcpu(vcpu) => Some(vcpu),
        Actor::Wire(_) => None,
    });
    let vcpus: Vec<u8> = vcpus.collect();
    vcpus.windows(2).filter(|pair| pair[0] != pair[1]).count()
}

fn cost(schedule: &Schedule) -> (usize, usize, u64) {
    (
        switches(schedule),
        schedule.segments.len(),
        schedule.points(),
    )
}

/// Looks for a schedule that fails as `failing` does, at a lower cost: fewer context switches, then fewer
/// segments, then fewer points. `try_run` runs a candidate, as near as it can be run, and returns what was
/// really run if that failed in the same way. At most `runs` tries; the result has always been run.
///
/// # Errors
/// What `try_run` gives.
pub fn minimise<E>(
    failing: Schedule,
    runs: usize,
    mut try_run: impl FnMut(&Schedule) -> Result<Option<Schedule>, E>,
) -> Result<Schedule, E> {
    let mut best = failing;
    let mut left = runs;
    loop {
        let before = cost(&best);
        // Parts of halving size are left out, as delta debugging does (Zeller, Hildebrandt, TSE 2002).
        let mut part = (best.segments.len() / 2).max(1);
        loop {
            let mut at = 0;
            while at < best.segments.len() && left > 0 {
                let mut candidate = Schedule::default();
                for (index, segment) in best.segments.iter().enumerate() {
                    if !(at..at + part).contains(&index) {
                        candidate.push(segment.actor, segment.points);
                    }
                }
                left -= 1;
                match try_run(&candidate)? {
                    Some(ran) if cost(&ran) < cost(&best) => best = ran,
                    _ => at += part,
                }
            }
            if part == 1 || left == 0 {
                break;
            }
            part /= 2;
        }
        if left == 0 || cost(&best) >= before {
            return Ok(best);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::explore::Segment;

    /// Fails where vCPU 1 runs between two runs of vCPU 0.
    fn fails(schedule: &Schedule) -> bool {
        let order: Vec<Actor> = schedule.segments.iter().map(|s| s.actor).collect();
        let first = order.iter().position(|a| *a == Actor::Vcpu(0));
        let Some(first) = first else { return false };
        let then = order[first..].iter().position(|a| *a == Actor::Vcpu(1));
        then.is_some_and(|then| order[first + then..].contains(&Actor::Vcpu(0)))
    }

    proptest! {
        #[test]
        fn what_is_left_fails_and_has_no_switch_too_many(
            steps in prop::collection::vec((0u8..3, 1u64..5), 1..40),
        ) {
            let mut schedule = Schedule::default();
            for (vcpu, points) in steps {
                schedule.push(Actor::Vcpu(vcpu), points);
            }
            prop_assume!(fails(&schedule));
            let small = minimise(schedule, 10_000, |candidate| {
                Ok::<_, ()>(fails(candidate).then(|| candidate.clone()))
            })
            .unwrap();
            prop_assert!(fails(&small));
            prop_assert_eq!(switches(&small), 2);
            let short = |s: &Segment| s.actor != Actor::Vcpu(2);
            prop_assert!(small.segments.iter().all(short));
        }
    }
}
