//! Walkers of page tables on the stream (family W): a table is freed only when nobody can be inside it.
//!
//! A walk in software holds pointers to tables from its first load to its end: a fault, a copy to or from
//! user memory, an unmap, an rmap walk, fork. A walk that began before a table was unlinked may have reached it;
//! one that began later cannot. Walks by processors, lazy ones too, are the TLB model's (T-03).

use abi::channel::EventKind;
use abi::objects::FrameKind;
use abi::pte::{Pte, level_size};
use rustc_hash::FxHashMap;

use super::{Monitor, Rule, Seen, violation};
use crate::check::{Finding, Violation};
use crate::memory::PhysMem;

/// IDs and predicates.
pub const INVARIANTS: &[Rule] = &[(
    INSIDE,
    "a page-table page is freed only when no walk that began before it was unlinked goes on",
)];

const INSIDE: &str = "W-01";

/// A walk that goes on.
#[derive(Clone, Copy, Debug)]
struct Walk {
    /// Who walks: a task, which may go on on another vCPU; without one the vCPU.
    who: (u32, usize),
    mm: u64,
    gva: u64,
    began: u64,
}

/// A table that nothing refers to any more.
#[derive(Clone, Copy, Debug)]
struct Unlinked {
    mm: u64,
    start: u64,
    end: u64,
    at: u64,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Walks {
    walks: Vec<Walk>,
    unlinked: FxHashMap<u64, Unlinked>,
    /// Events so far.
    at: u64,
}

impl Walks {
    fn unlink(&mut self, args: [u64; 5]) {
        let [mm, gva, level, old, new] = args;
        let (old, new) = (Pte(old), Pte(new));
        let level = level.clamp(1, 4) as u8;
        if level < 2 || !old.is_present() || old.is_leaf(level) {
            return;
        }
        if !new.is_present() || new.address() != old.address() {
            let start = gva & !(level_size(level) - 1);
            let unlinked = Unlinked {
                mm,
                start,
                end: start.saturating_add(level_size(level)),
                at: self.at,
            };
            self.unlinked.insert(old.address(), unlinked);
        }
    }

    fn free(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [gpa, _, kind, ..] = seen.event.args;
        let Some(table) = self.unlinked.remove(&gpa) else {
            return;
        };
        if kind != FrameKind::Table as u64 {
            return;
        }
        let inside = self.walks.iter().find(|walk| {
            walk.mm == table.mm
                && walk.began < table.at
                && (table.start..table.end).contains(&walk.gva)
                && walk.who != who(seen)
        });
        if let Some(walk) = inside {
            let finding = Finding::new(format!(
                "a page-table page is freed while a walk for {:#x} may be inside it",
                walk.gva
            ))
            .expected("no walk of it that began before it was unlinked")
            .found(format!("task {} on vCPU {} walks", walk.who.0, walk.who.1))
            .object("page-table page", gpa)
            .mm(walk.mm)
            .gva(walk.gva)
            .vcpu(seen.vcpu)
            .detail(format!(
                "freed by task {} on vCPU {}",
                seen.event.task, seen.vcpu
            ));
            found.push(violation(INVARIANTS, INSIDE, finding));
        }
    }
}

impl Monitor for Walks {
    fn fork(&self) -> Box<dyn Monitor> {
        Box::new(self.clone())
    }
    fn start(&mut self, _: &dyn PhysMem, _: u64, _: usize) {
        self.reset();
    }
    fn reset(&mut self) {
        self.walks.clear();
        self.unlinked.clear();
        self.at = 0;
    }
    fn observe(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        self.at += 1;
        let args = seen.event.args;
        match EventKind::from_id(seen.event.kind) {
            Some(EventKind::WalkBegin) => self.walks.push(Walk {
                who: who(seen),
                mm: args[0],
                gva: args[1],
                began: self.at,
            }),
            Some(EventKind::WalkEnd) => {
                let me = who(seen);
                // The innermost: walks nest.
                let same = |walk: &Walk| (walk.who, walk.mm, walk.gva) == (me, args[0], args[1]);
                if let Some(at) = self.walks.iter().rposition(same) {
                    self.walks.remove(at);
                }
            }
            Some(EventKind::PteChange) => self.unlink(args),
            Some(EventKind::FrameFree) => self.free(seen, found),
            _ => {}
        }
    }
    fn compare(&mut self, _: &dyn PhysMem, _: u64, _: &mut Vec<Violation>) {}
}

fn who(seen: &Seen) -> (u32, usize) {
    match seen.event.task {
        0 => (0, seen.vcpu),
        task => (task, 0),
    }
}

#[cfg(test)]
mod tests {
    use abi::channel::Event;
    use abi::pte::PteFlags;

    use super::*;
    use EventKind as K;

    const TABLE: u64 = 0x9000;

    fn ids(steps: &[(u32, K, [u64; 5])]) -> Vec<&'static str> {
        let mut walks = Walks::default();
        let mut found = Vec::new();
        for &(task, kind, args) in steps {
            let event = Event {
                kind: kind as u32,
                task,
                args,
                ..Event::default()
            };
            walks.observe(&Seen { vcpu: 0, event }, &mut found);
        }
        found.iter().map(|violation| violation.id).collect()
    }

    #[test]
    fn a_table_freed_under_a_walk_that_may_be_inside_is_w_01() {
        let entry = Pte::new(TABLE, PteFlags::PRESENT | PteFlags::USER).0;
        let unlink = (1, K::PteChange, [1, 0x20_0000, 2, entry, 0]);
        let free = (1, K::FrameFree, [TABLE, 0, FrameKind::Table as u64, 0, 0]);
        let walk = |mm, gva| (2, K::WalkBegin, [mm, gva, 0, 0, 0]);
        let over = (2, K::WalkEnd, [1, 0x20_1000, 0, 0, 0]);
        let inside = walk(1, 0x20_1000);
        assert_eq!(ids(&[inside, unlink, free]), ["W-01"]);
        assert_eq!(
            ids(&[inside, inside, over, unlink, free]),
            ["W-01"],
            "they nest"
        );
        // Over, begun later, elsewhere, in another mm, or one's own.
        assert_eq!(ids(&[inside, over, unlink, free]), [""; 0]);
        assert_eq!(ids(&[inside, unlink, over, free]), [""; 0]);
        assert_eq!(ids(&[unlink, inside, free]), [""; 0]);
        assert_eq!(ids(&[walk(1, 0x40_0000), unlink, free]), [""; 0]);
        assert_eq!(ids(&[walk(2, 0x20_1000), unlink, free]), [""; 0]);
        let own = (1, K::WalkBegin, [1, 0x20_1000, 0, 0, 0]);
        assert_eq!(ids(&[own, unlink, free]), [""; 0]);
    }
}
