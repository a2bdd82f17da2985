//! RCU on the stream (family U): read sections, grace periods, and what is freed after them.
//!
//! A read section counts from its event to the event of its end; both lie inside of the section, so that in a
//! merged stream of vCPUs that run in parallel too a section is never longer here than it was. What is retired,
//! and when a grace period begins, is told before the CPUs are looked at.

use abi::channel::{EventKind, rcu_object};

use super::{Kinds, Monitor, Rule, Seen, violation};
use crate::check::{Finding, Violation};
use crate::map::Map;
use crate::memory::PhysMem;

/// IDs and predicates.
pub const INVARIANTS: &[Rule] = &[
    (
        FREED,
        "an object that RCU protects is freed only when every read section that was open when it was retired has ended",
    ),
    (
        GRACE,
        "a grace period ends only when every read section that was open when it began has ended",
    ),
    (
        NESTING,
        "RCU read sections nest, and none is open when its vCPU returns from a system call or switches tasks",
    ),
    (
        ONCE,
        "what was retired is retired once, and its memory goes back only through RCU",
    ),
];

const FREED: &str = "U-01";
const GRACE: &str = "U-02";
const NESTING: &str = "U-03";
const ONCE: &str = "U-04";

/// A read section, all that are nested in it included.
#[derive(Clone, Copy, Debug, Default)]
struct Section {
    nesting: u64,
    began: u64,
    task: u32,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Rcu {
    /// By vCPU.
    sections: Map<Section>,
    /// By object: what it is, and when it was retired.
    retired: Map<(u64, u64)>,
    /// By vCPU: when its grace period began.
    graces: Map<u64>,
    /// Events that it was told so far.
    at: u64,
}

impl Rcu {
    /// A section that was open before `moment` and still is.
    fn open_since_before(&self, moment: u64) -> Option<(usize, Section)> {
        let open = self
            .sections
            .iter()
            .map(|(vcpu, section)| (vcpu as usize, *section));
        open.filter(|(_, section)| section.nesting > 0 && section.began < moment)
            .min_by_key(|(vcpu, _)| *vcpu)
    }

    fn nest(&mut self, seen: &Seen, delta: i64, found: &mut Vec<Violation>) {
        let at = self.at;
        let (section, _) = self.sections.entry(seen.vcpu as u64, Section::default());
        let expected = section.nesting.checked_add_signed(delta);
        let told = seen.event.args[0];
        if expected != Some(told) {
            let expected = expected.map_or("an open section".into(), |depth| depth.to_string());
            let finding = Finding::new("RCU read sections do not nest")
                .expected(format!("a depth of {expected} after this one"))
                .found(told.to_string())
                .vcpu(seen.vcpu);
            found.push(violation(INVARIANTS, NESTING, finding));
        }
        if section.nesting == 0 {
            section.began = at;
            section.task = seen.event.task;
        }
        section.nesting = told;
    }

    fn outside(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let Some(section) = self.sections.get_mut(seen.vcpu as u64) else {
            return;
        };
        if section.nesting > 0 {
            let open = std::mem::take(&mut section.nesting);
            let kind = EventKind::from_id(seen.event.kind);
            let finding = Finding::new(format!(
                "an RCU read section is still open at a {}",
                kind.map_or("?", EventKind::name)
            ))
            .expected("a depth of 0")
            .found(open.to_string())
            .vcpu(seen.vcpu);
            found.push(violation(INVARIANTS, NESTING, finding));
        }
    }

    fn retire(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [object, kind, ..] = seen.event.args;
        if self.retired.insert(object, (kind, self.at)).is_some() {
            let name = rcu_object::name(kind);
            let finding = Finding::new(format!("the {name} is retired a second time"))
                .object(name, object)
                .vcpu(seen.vcpu);
            found.push(violation(INVARIANTS, ONCE, finding));
        }
    }

    fn free(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let object = seen.event.args[0];
        // Without it: retired before the stream began.
        let Some((kind, at)) = self.retired.remove(object) else {
            return;
        };
        if let Some((vcpu, section)) = self.open_since_before(at) {
            let name = rcu_object::name(kind);
            let finding = Finding::new(format!(
                "the {name} {object:#x} is freed inside an RCU read section that may have found it"
            ))
            .expected("the end of every section that was open when it was retired")
            .found(format!("task {} on vCPU {vcpu} is in one", section.task))
            .object(name, object)
            .vcpu(seen.vcpu)
            .detail(format!(
                "freed by task {} on vCPU {}",
                seen.event.task, seen.vcpu
            ));
            found.push(violation(INVARIANTS, FREED, finding));
        }
    }

    fn frame_freed(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let gpa = seen.event.args[0];
        if let Some((rcu_object::TABLE, _)) = self.retired.get(gpa) {
            self.retired.remove(gpa);
            let finding = Finding::new("a retired page-table page goes back without RCU")
                .object("page-table page", gpa)
                .vcpu(seen.vcpu);
            found.push(violation(INVARIANTS, ONCE, finding));
        }
    }

    fn grace_over(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let Some(began) = self.graces.remove(seen.vcpu as u64) else {
            return;
        };
        if let Some((vcpu, section)) = self.open_since_before(began) {
            let finding = Finding::new(
                "a grace period ends inside an RCU read section that it must wait for",
            )
            .expected("the end of every section that was open when it began")
            .found(format!("task {} on vCPU {vcpu} is in one", section.task))
            .vcpu(seen.vcpu);
            found.push(violation(INVARIANTS, GRACE, finding));
        }
    }
}

impl Rcu {
    pub(super) const FOLLOWS: Kinds = Kinds::of(&[
        EventKind::RcuEnter,
        EventKind::RcuExit,
        EventKind::SyscallExit,
        EventKind::Switch,
        EventKind::RcuRetire,
        EventKind::RcuFree,
        EventKind::FrameFree,
        EventKind::RcuGpStart,
        EventKind::RcuGpEnd,
    ]);
}

impl Monitor for Rcu {
    fn fork(&self) -> Box<dyn Monitor> {
        Box::new(self.clone())
    }
    fn start(&mut self, _: &dyn PhysMem, _: u64, _: usize) {
        self.reset();
    }
    fn reset(&mut self) {
        self.sections.clear();
        self.retired.clear();
        self.graces.clear();
        self.at = 0;
    }
    fn follows(&self) -> Kinds {
        Self::FOLLOWS
    }
    #[inline(always)]
    fn take(&mut self, kind: EventKind, seen: &Seen, found: &mut Vec<Violation>) {
        self.at += 1;
        match kind {
            EventKind::RcuEnter => self.nest(seen, 1, found),
            EventKind::RcuExit => self.nest(seen, -1, found),
            EventKind::SyscallExit | EventKind::Switch => self.outside(seen, found),
            EventKind::RcuRetire => self.retire(seen, found),
            EventKind::RcuFree => self.free(seen, found),
            EventKind::FrameFree => self.frame_freed(seen, found),
            EventKind::RcuGpStart => {
                self.graces.insert(seen.vcpu as u64, self.at);
            }
            EventKind::RcuGpEnd => self.grace_over(seen, found),
            _ => {}
        }
    }
    fn compare(&mut self, _: &dyn PhysMem, _: u64, _: &mut Vec<Violation>) {}
}

#[cfg(test)]
mod tests {
    use abi::channel::Event;

    use super::*;
    use EventKind as K;

    type Step = (usize, K, [u64; 2]);

    fn ids(steps: &[Step]) -> Vec<&'static str> {
        let mut rcu = Rcu::default();
        let mut found = Vec::new();
        for &(vcpu, kind, [a, b]) in steps {
            let event = Event {
                kind: kind as u32,
                args: [a, b, 0, 0, 0],
                ..Event::default()
            };
            rcu.observe(&Seen { vcpu, event }, &mut found);
        }
        found.iter().map(|violation| violation.id).collect()
    }

    const TABLE: [u64; 2] = [0x9000, rcu_object::TABLE];
    const RETIRE: Step = (0, K::RcuRetire, TABLE);
    const FREE: Step = (0, K::RcuFree, TABLE);
    const BEGIN: Step = (0, K::RcuGpStart, [1, 0]);
    const END: Step = (0, K::RcuGpEnd, [1, 0]);
    const ENTER: Step = (1, K::RcuEnter, [1, 0]);
    const EXIT: Step = (1, K::RcuExit, [0, 0]);

    #[test]
    fn an_object_freed_under_a_section_that_may_have_found_it_is_u_01() {
        assert_eq!(ids(&[ENTER, RETIRE, FREE]), ["U-01"]);
        assert_eq!(
            ids(&[ENTER, RETIRE, EXIT, ENTER, FREE]),
            [""; 0],
            "a later section"
        );
        assert_eq!(ids(&[RETIRE, ENTER, FREE]), [""; 0], "one that began later");
        assert_eq!(ids(&[ENTER, FREE]), [""; 0], "retired before the stream");
        // The outer section counts, whatever is nested in it.
        let (inner, back) = ((1, K::RcuEnter, [2, 0]), (1, K::RcuExit, [1, 0]));
        assert_eq!(
            ids(&[ENTER, inner, back, RETIRE, inner, back, FREE]),
            ["U-01"]
        );
    }

    #[test]
    fn a_grace_period_that_ends_under_a_section_is_u_02() {
        assert_eq!(ids(&[ENTER, BEGIN, END]), ["U-02"]);
        assert_eq!(ids(&[ENTER, BEGIN, EXIT, END]), [""; 0]);
        assert_eq!(ids(&[BEGIN, ENTER, END]), [""; 0]);
        assert_eq!(ids(&[ENTER, END]), [""; 0], "begun before the stream");
    }

    #[test]
    fn sections_that_do_not_nest_or_stay_open_are_u_03() {
        let inner = (1, K::RcuEnter, [2, 0]);
        assert_eq!(ids(&[ENTER, inner, (1, K::RcuExit, [1, 0]), EXIT]), [""; 0]);
        assert_eq!(ids(&[EXIT]), ["U-03"]);
        assert_eq!(ids(&[ENTER, ENTER]), ["U-03"]);
        assert_eq!(ids(&[ENTER, (1, K::SyscallExit, [0, 0])]), ["U-03"]);
        assert_eq!(ids(&[ENTER, (1, K::Switch, [1, 2])]), ["U-03"]);
        assert_eq!(
            ids(&[ENTER, (0, K::Switch, [1, 2])]),
            [""; 0],
            "another vCPU"
        );
    }

    #[test]
    fn memory_that_goes_back_past_rcu_or_is_retired_twice_is_u_04() {
        let frame = (0, K::FrameFree, [0x9000, 0]);
        assert_eq!(ids(&[RETIRE, FREE, frame, RETIRE, FREE, frame]), [""; 0]);
        assert_eq!(ids(&[RETIRE, frame]), ["U-04"]);
        assert_eq!(ids(&[RETIRE, RETIRE]), ["U-04"]);
    }
}
