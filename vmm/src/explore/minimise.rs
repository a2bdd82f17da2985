//! From a schedule that fails to one with as few context switches as possible that still does.

use rustc_hash::FxHashSet;

use super::{Actor, Schedule, Segment};

/// Context switches between vCPUs.
#[must_use]
pub fn switches(schedule: &Schedule) -> usize {
    let vcpus = schedule
        .segments
        .iter()
        .filter_map(|segment| segment.actor.vcpu());
    let (mut count, mut before) = (0, None);
    for vcpu in vcpus {
        count += usize::from(before.is_some_and(|before| before != vcpu));
        before = Some(vcpu);
    }
    count
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
/// Three kinds of change, each as long as it helps: leaving segments out (delta debugging: Zeller,
/// Hildebrandt, TSE 2002), running a segment right after the last one of its vCPU, and making a segment
/// shorter. No candidate is run twice.
///
/// # Errors
/// What `try_run` gives.
pub fn minimise<E>(
    failing: Schedule,
    runs: usize,
    try_run: impl FnMut(&Schedule) -> Result<Option<Schedule>, E>,
) -> Result<Schedule, E> {
    let mut search = Search {
        best: failing,
        left: runs,
        tried: FxHashSet::default(),
        try_run,
    };
    loop {
        let before = cost(&search.best);
        search.leave_out()?;
        search.bring_together()?;
        search.shorten()?;
        if search.left == 0 || cost(&search.best) >= before {
            return Ok(search.best);
        }
    }
}

struct Search<F> {
    best: Schedule,
    left: usize,
    tried: FxHashSet<Schedule>,
    try_run: F,
}

impl<E, F: FnMut(&Schedule) -> Result<Option<Schedule>, E>> Search<F> {
    /// Runs a candidate. True: it is the best now.
    fn try_one(&mut self, segments: impl IntoIterator<Item = Segment>) -> Result<bool, E> {
        let mut candidate = Schedule::default();
        for segment in segments {
            candidate.push(segment.actor, segment.points);
        }
        if self.left == 0 || !self.tried.insert(candidate.clone()) {
            return Ok(false);
        }
        self.left -= 1;
        match (self.try_run)(&candidate)? {
            Some(ran) if cost(&ran) < cost(&self.best) => {
                self.best = ran;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Parts of halving size are left out.
    fn leave_out(&mut self) -> Result<(), E> {
        let mut part = (self.best.segments.len() / 2).max(1);
        while self.left > 0 {
            let mut at = 0;
            while at < self.best.segments.len() && self.left > 0 {
                let old = self.best.segments.clone();
                let (head, tail) = (&old[..at], &old[(at + part).min(old.len())..]);
                if !self.try_one(head.iter().chain(tail).copied())? {
                    at += part;
                }
            }
            if part == 1 {
                break;
            }
            part /= 2;
        }
        Ok(())
    }

    /// A segment is moved to where the last one of its vCPU ends.
    fn bring_together(&mut self) -> Result<(), E> {
        let mut at = 0;
        while at < self.best.segments.len() && self.left > 0 {
            let mut segments = self.best.segments.clone();
            let actor = segments[at].actor;
            let before = segments[..at].iter().rposition(|s| s.actor == actor);
            if let Some(before) = before
                && matches!(actor, Actor::Vcpu(_))
            {
                let moved = segments.remove(at);
                segments.insert(before + 1, moved);
                if self.try_one(segments)? {
                    continue;
                }
            }
            at += 1;
        }
        Ok(())
    }

    /// Halves of what can go are taken off the end of a segment.
    fn shorten(&mut self) -> Result<(), E> {
        let mut at = 0;
        while at < self.best.segments.len() && self.left > 0 {
            let mut less = self.best.segments[at].points / 2;
            while less > 0 && at < self.best.segments.len() {
                let mut segments = self.best.segments.clone();
                less = less.min(segments[at].points.saturating_sub(1));
                segments[at].points -= less;
                if less == 0 || !self.try_one(segments)? {
                    less /= 2;
                }
            }
            at += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Fails where vCPU 1 runs for 2 points or more between two runs of vCPU 0.
    fn fails(schedule: &Schedule) -> bool {
        let of = |actor| move |s: &Segment| s.actor == Actor::Vcpu(actor);
        let all = schedule.segments.as_slice();
        let Some(first) = all.iter().position(of(0)) else {
            return false;
        };
        let Some(last) = all.iter().rposition(of(0)) else {
            return false;
        };
        all[first..=last].iter().any(|s| of(1)(s) && s.points >= 2)
    }

    fn drawn() -> impl Strategy<Value = Schedule> {
        prop::collection::vec((0u8..3, 1u64..9), 1..40).prop_map(|steps| {
            let mut schedule = Schedule::default();
            for (vcpu, points) in steps {
                schedule.push(Actor::Vcpu(vcpu), points);
            }
            schedule
        })
    }

    proptest! {
        #[test]
        fn what_is_left_fails_and_has_nothing_too_much(schedule in drawn()) {
            prop_assume!(fails(&schedule));
            let small = minimise(schedule, 10_000, |candidate| {
                Ok::<_, ()>(fails(candidate).then(|| candidate.clone()))
            })
            .unwrap();
            let mut least = Schedule::default();
            for (vcpu, points) in [(0, 1), (1, 2), (0, 1)] {
                least.push(Actor::Vcpu(vcpu), points);
            }
            prop_assert_eq!(small, least);
        }

        #[test]
        fn the_bound_is_kept_and_the_result_was_run(schedule in drawn(), runs in 0usize..30) {
            prop_assume!(fails(&schedule));
            let mut ran = vec![schedule.clone()];
            let mut search = || {
                let from = ran.len();
                let small = minimise(schedule.clone(), runs, |candidate| {
                    ran.push(candidate.clone());
                    Ok::<_, ()>(fails(candidate).then(|| candidate.clone()))
                });
                (small.unwrap(), ran.len() - from)
            };
            let (first, second) = (search(), search());
            prop_assert_eq!(&first, &second, "the same every time");
            prop_assert!(first.1 <= runs);
            prop_assert!(fails(&first.0) && ran.contains(&first.0));
            prop_assert!(cost(&first.0) <= cost(&schedule));
        }
    }

    #[test]
    fn an_error_ends_the_search() {
        let mut schedule = Schedule::default();
        schedule.push(Actor::Vcpu(0), 3);
        let failed = minimise(schedule, 10, |_| Err::<Option<Schedule>, _>("broken"));
        assert_eq!(failed, Err("broken"));
    }
}
