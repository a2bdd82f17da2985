//! What a search has come to.

/// What a search came to, bound by bound.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Explored {
    /// From 0 preemptions up; what is said of the last may be all that there was time for.
    pub bounds: Vec<Within>,
    /// Nothing within the bounds is left.
    pub exhausted: bool,
}

/// What a search came to with one bound on preemptions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Within {
    /// Preemptions that an execution may have; none: any number.
    pub preemptions: Option<u32>,
    /// Different ends of executions up to the order of independent steps, those with fewer preemptions
    /// included. Where all were tried this follows from the program alone, whoever took part in the search.
    pub schedules: u64,
    /// Executions, those that were given up included.
    pub executions: u64,
    /// Executions that were given up as equivalent to others.
    pub given_up: u64,
    /// Alternatives that were left out without running them, as equivalent to others.
    pub asleep: u64,
    /// Alternatives that would have taken more preemptions than allowed.
    pub out_of_bounds: u64,
    /// Executions longer than the bound on steps.
    pub too_long: u64,
}

impl Explored {
    pub(super) fn new(preemptions: Option<u32>) -> Self {
        let first = Within {
            preemptions,
            ..Within::default()
        };
        Self {
            bounds: vec![first],
            exhausted: false,
        }
    }

    /// The bound that it has reached.
    ///
    /// # Panics
    /// Never: a search begins with a bound.
    #[must_use]
    pub fn reached(&self) -> &Within {
        self.bounds.last().expect("there is a first bound")
    }

    pub(super) fn reached_mut(&mut self) -> &mut Within {
        self.bounds.last_mut().expect("there is a first bound")
    }

    /// The largest bound with which every execution was run, or one equivalent to it.
    #[must_use]
    pub fn complete(&self) -> Option<&Within> {
        let begun = self.bounds.len() - usize::from(!self.exhausted);
        let mut complete = self.bounds[..begun].iter();
        complete.rfind(|within| within.too_long == 0)
    }

    /// True where every execution within the bounds was run, or one equivalent to it.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.exhausted && self.reached().too_long == 0
    }

    /// Executions, of all bounds.
    #[must_use]
    pub fn executions(&self) -> u64 {
        self.bounds.iter().map(|within| within.executions).sum()
    }
}

impl Within {
    /// Executions that were left out as equivalent to others, with a run or without.
    #[must_use]
    pub fn pruned(&self) -> u64 {
        self.given_up + self.asleep
    }

    pub(super) fn add(&mut self, more: Self) {
        self.schedules += more.schedules;
        self.executions += more.executions;
        self.given_up += more.given_up;
        self.asleep += more.asleep;
        self.out_of_bounds += more.out_of_bounds;
        self.too_long += more.too_long;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_is_complete_once_the_next_is_begun_unless_some_were_too_long() {
        let mut explored = Explored::new(Some(0));
        assert!(explored.complete().is_none() && !explored.is_complete());
        explored.bounds.push(Within {
            preemptions: Some(1),
            ..Within::default()
        });
        assert_eq!(explored.complete().unwrap().preemptions, Some(0));
        explored.exhausted = true;
        assert_eq!(explored.complete().unwrap().preemptions, Some(1));
        assert!(explored.is_complete());
        explored.reached_mut().too_long = 1;
        assert_eq!(explored.complete().unwrap().preemptions, Some(0));
        assert!(!explored.is_complete());
    }
}
