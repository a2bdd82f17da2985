//! Checks on the stream of events: what no single state can show.
//!
//! A [`Monitor`] sees every event in the order in which it happened and keeps what it needs to know. The
//! same monitors judge serialised runs, event by event, and the merged streams of parallel ones.

pub mod folio;
pub mod groups;
pub mod lifetime;
pub mod locks;
pub mod merge;
pub mod migration;
mod order;
mod panel;
pub mod rcu;
pub mod rmap;
pub mod tlb;
pub mod vma_lock;
pub mod walk;
mod words;

use abi::channel::{Event, EventKind};
use abi::lock::LockClass;

use super::{Finding, Violation};
use crate::memory::PhysMem;
pub use panel::{Panel, all};

/// An event, and on which vCPU it happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// vCPU.
    pub vcpu: usize,
    /// The event.
    pub event: Event,
}

/// A set of kinds of events, and of classes of locks whose taking and dropping belong to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kinds {
    kinds: u64,
    classes: u64,
}

impl Kinds {
    /// All of them, those that nobody knows included.
    pub const ALL: Self = Self {
        kinds: u64::MAX,
        classes: u64::MAX,
    };

    /// Those of `kinds`, for locks of every class.
    #[must_use]
    pub const fn of(kinds: &[EventKind]) -> Self {
        let (mut set, mut index) = (0, 0);
        while index < kinds.len() {
            set |= bit(kinds[index] as u64);
            index += 1;
        }
        Self {
            kinds: set,
            classes: u64::MAX,
        }
    }

    /// The same, without locks of other classes than `classes`.
    #[must_use]
    pub const fn of_locks(self, classes: &[LockClass]) -> Self {
        let (mut set, mut index) = (0, 0);
        while index < classes.len() {
            set |= bit(classes[index] as u64);
            index += 1;
        }
        Self {
            classes: set,
            ..self
        }
    }

    /// True where `event` is of the set. It may be where its kind or its class is none that anybody knows.
    #[must_use]
    pub const fn has(self, event: &Event) -> bool {
        self.has_kind(event.kind) && (!is_of_lock(event.kind) || self.has_class(event.args[1]))
    }

    const fn has_kind(self, kind: u32) -> bool {
        self.kinds & bit(kind as u64) != 0
    }

    const fn has_class(self, class: u64) -> bool {
        self.classes & bit(class) != 0
    }
}

/// Numbers of kinds and of classes are small: those that are not are nobody's.
const fn bit(number: u64) -> u64 {
    1 << (number % u64::BITS as u64)
}

const fn is_of_lock(kind: u32) -> bool {
    kind == EventKind::LockAcquire as u32 || kind == EventKind::LockRelease as u32
}

/// An ID that is never reused for anything else, and what must be true.
pub type Rule = (&'static str, &'static str);

/// Every rule of every monitor.
pub fn rules() -> impl Iterator<Item = &'static Rule> {
    let families = [
        tlb::INVARIANTS,
        locks::INVARIANTS,
        order::INVARIANTS,
        lifetime::INVARIANTS,
        folio::INVARIANTS,
        walk::INVARIANTS,
        rcu::INVARIANTS,
        rmap::INVARIANTS,
        migration::INVARIANTS,
        groups::INVARIANTS,
        vma_lock::INVARIANTS,
    ];
    families.into_iter().flatten()
}

/// Who says so: by ID, or by family for those that are not listed by themselves.
const SOURCES: &[(&str, &str)] = &[
    (
        "T-10",
        "vmm/src/check/stream/tlb; abi::channel::EventKind::PteChange",
    ),
    ("T", "SDM vol. 3A, 5.10; docs/tlb-model.md"),
    (
        "K-01",
        "guest-kernel/src/sync; Linux Documentation/mm/process_addrs.rst, lock ordering",
    ),
    (
        "K-02",
        "guest-kernel/src/sync; Linux kernel/locking/lockdep.c, print_deadlock_bug",
    ),
    ("K-03", "Linux kernel/locking/lockdep.c, lockdep_sys_exit"),
    (
        "K-04",
        "Linux Documentation/locking/lockdep-design.rst; kernel/locking/lockdep.c, check_noncircular",
    ),
    ("K-05", "Linux kernel/sched/core.c, __schedule_bug"),
    (
        "O-01",
        "Linux Documentation/mm/process_addrs.rst; mm/mmap_lock.c, lock_vma_under_rcu",
    ),
    (
        "O-02",
        "Linux include/linux/mmap_lock.h, vma_assert_attached and vma_assert_detached",
    ),
    ("O-03", "Linux include/linux/mm_types.h, mm_count"),
    ("O-04", "Linux include/linux/sched/mm.h, mmgrab and mmget"),
    (
        "O-05",
        "Linux Documentation/mm/process_addrs.rst, lifetimes; CVE-2023-3269",
    ),
    (
        "O-06",
        "Linux Documentation/mm/active_mm.rst; include/linux/sched/mm.h",
    ),
    (
        "F-01",
        "guest-kernel/src/mm/folio.rs; Linux mm/rmap.c, folio_add_anon_rmap_ptes",
    ),
    (
        "F-02",
        "Linux mm/page_alloc.c, free_page_is_bad; include/linux/page_ref.h",
    ),
    ("F-03", "Linux mm/migrate.c, folio_expected_refs"),
    (
        "F-10",
        "Linux Documentation/core-api/pin_user_pages.rst; mm/gup.c, try_grab_folio",
    ),
    (
        "F-11",
        "Linux mm/memory.c, copy_present_page; mm/gup.c, gup_must_unshare",
    ),
    (
        "F-04",
        "abi::channel::EventKind::RefcountChange and MapcountChange",
    ),
    (
        "W-01",
        "Linux mm/memory.c, free_pgtables; SDM vol. 3A, 5.10.5",
    ),
    (
        "W-02",
        "Linux Documentation/mm/process_addrs.rst, page tables; mm/gup.c, gup_fast",
    ),
    (
        "U-03",
        "Linux Documentation/RCU/whatisRCU.rst; kernel/rcu/tree_plugin.h, rcu_note_context_switch",
    ),
    ("U-04", "guest-kernel/src/sync/rcu.rs"),
    ("U", "Linux Documentation/RCU/Design/Requirements"),
    ("A-01", "Linux mm/rmap.c, rmap_walk_anon"),
    (
        "S-08",
        "Linux mm/migrate.c, remove_migration_ptes; mm/mremap.c, take_rmap_locks (486cf46f3f9b)",
    ),
    (
        "G",
        "Linux mm/memcontrol.c, uncharge_folio and mem_cgroup_migrate; abi::channel::EventKind::Charge",
    ),
    (
        "N",
        "Linux include/linux/mmap_lock.h, mm/mmap_lock.c; Documentation/mm/process_addrs.rst",
    ),
    (
        "A-02",
        "Linux mm/rmap.c, folio_get_anon_vma; Documentation/mm/process_addrs.rst",
    ),
];

/// Who says that rule `id` must hold.
#[must_use]
pub fn source(id: &str) -> &'static str {
    let listed = |key: &str| SOURCES.iter().find(|(known, _)| *known == key);
    let family = id.split('-').next().unwrap_or(id);
    listed(id)
        .or_else(|| listed(family))
        .map_or("", |(_, source)| source)
}

/// What breaks rule `id` of `rules`.
fn violation(rules: &[Rule], id: &'static str, finding: Finding) -> Violation {
    let rule = rules.iter().find(|(other, _)| *other == id);
    Violation {
        id,
        predicate: rule.map_or("", |(_, predicate)| predicate),
        finding,
    }
}

/// Judges a stream of events.
pub trait Monitor {
    /// Starts over from this state of the machine, in which no vCPU runs. Expensive: once a campaign.
    fn start(&mut self, memory: &dyn PhysMem, kernel_root: u64, nr_vcpus: usize);
    /// Told before [`Monitor::start`], where it is known: everything that has happened since boot, in order.
    fn since_boot(&mut self, _events: &[Seen], _nr_vcpus: usize) {}
    /// A copy that goes on from here by itself.
    fn fork(&self) -> Box<dyn Monitor>;
    /// Goes back to the state of the last [`Monitor::start`]. Cheap: once a schedule.
    fn reset(&mut self);
    /// The kinds of events that it needs to be told: so much of a schedule's time goes into telling that each is told to
    /// those only that do something with it.
    fn follows(&self) -> Kinds;
    /// Takes the next event, which is of `kind`; appends what it shows to be wrong to `found`.
    fn take(&mut self, kind: EventKind, seen: &Seen, found: &mut Vec<Violation>);
    /// Takes an event of a kind that nobody knows: only a guest that lies tells of one.
    fn take_unknown(&mut self) {}
    /// Takes the next event, of whatever kind.
    fn observe(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        match EventKind::from_id(seen.event.kind) {
            Some(kind) => self.take(kind, seen, found),
            None => self.take_unknown(),
        }
    }
    /// Takes the next `events`, all of one vCPU, up to the first that shows something to be wrong: how many that are.
    fn observe_all(&mut self, vcpu: usize, events: &[Event], found: &mut Vec<Violation>) -> usize {
        let before = found.len();
        for (index, &event) in events.iter().enumerate() {
            self.observe(&Seen { vcpu, event }, found);
            if found.len() > before {
                return index + 1;
            }
        }
        events.len()
    }
    /// Every vCPU stands at a scheduling point, and all events up to there were observed: a monitor may look at
    /// memory. Called after every step of a serialised run: most times this must do nothing.
    fn settled(&mut self, _: &dyn PhysMem, _: u64, _: &mut Vec<Violation>) {}
    /// The stream is over, or the machine stands still: compares with the state that memory shows.
    fn compare(&mut self, memory: &dyn PhysMem, kernel_root: u64, found: &mut Vec<Violation>);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_of_the_tlb_model_are_explained_with_it() {
        let document = include_str!("../../../../docs/tlb-model.md");
        for (id, predicate) in tlb::INVARIANTS {
            let row = format!("| {id} | {predicate} |");
            assert!(document.contains(&row), "{row}");
        }
    }

    #[test]
    fn every_source_is_that_of_a_rule() {
        for (key, _) in SOURCES {
            assert!(rules().any(|(id, _)| id.starts_with(key)), "{key}");
        }
    }
}
