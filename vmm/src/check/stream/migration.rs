//! Migration on the stream (family S): nothing refers to a page that has stopped moving.
//!
//! Who moves a page replaces every entry that maps it, and finds them all again before it unlocks the old folio
//! (Linux mm/migrate.c, remove_migration_ptes). An entry that it misses refers to a frame that is about to be free, and
//! whoever touches the page then waits for nobody. Which entries there are the events tell, wherever they move
//! meanwhile; so the moment of the unlocking is judged, and not only what is left at the end.

use std::mem::offset_of;

use abi::channel::EventKind;
use abi::layout::PAGE_SHIFT;
use abi::lock::LockClass;
use abi::objects::{Folio, KernelRoot, Mm};
use abi::pte::{NonPresent, Pte};

use super::words::{Word as _, mms};
use super::{Kinds, Monitor, Rule, Seen, violation};
use crate::check::{Finding, Violation};
use crate::inspect::walk::{AddressSpace, USER_HALF};
use crate::map::Map;
use crate::memory::PhysMem;

/// IDs and predicates.
pub const INVARIANTS: &[Rule] = &[(
    LEFT,
    "no migration entry refers to a folio that is unlocked or freed",
)];

const LEFT: &str = "S-08";

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Migrations {
    start: Map<u32>,
    /// Migration entries by the frame that they refer to.
    entries: Map<u32>,
    folios: u64,
}

fn frame_of(entry: Pte) -> Option<u64> {
    match entry.non_present() {
        Some(NonPresent::Migration { gpa, .. }) => Some(gpa >> PAGE_SHIFT),
        _ => None,
    }
}

impl Migrations {
    fn pte_change(&mut self, old: Pte, new: Pte) {
        if let Some(frame) = frame_of(old)
            && let Some(count) = self.entries.get_mut(frame)
        {
            *count = count.saturating_sub(1);
        }
        if let Some(frame) = frame_of(new) {
            *self.entries.entry(frame, 0).0 += 1;
        }
    }

    fn judge(&mut self, seen: &Seen, frame: u64, how: &str, found: &mut Vec<Violation>) {
        // Told once: it stays so.
        let left = self.entries.remove(frame).unwrap_or(0);
        if left > 0 {
            let title = format!("a folio is {how}, and migration entries refer to it");
            let finding = Finding::new(format!("{title}: frame {frame:#x}"))
                .frame(frame)
                .vcpu(seen.vcpu)
                .expected("no migration entry")
                .found(left.to_string())
                .detail(format!("by task {} on vCPU {}", seen.event.task, seen.vcpu));
            found.push(violation(INVARIANTS, LEFT, finding));
        }
    }
}

impl Migrations {
    pub(super) const FOLLOWS: Kinds = Kinds::of(&[
        EventKind::PteChange,
        EventKind::LockRelease,
        EventKind::FrameFree,
    ])
    .of_locks(&[LockClass::Folio]);
}

impl Monitor for Migrations {
    fn fork(&self) -> Box<dyn Monitor> {
        Box::new(self.clone())
    }
    fn start(&mut self, memory: &dyn PhysMem, kernel_root: u64, _: usize) {
        self.folios = memory.field(kernel_root, offset_of!(KernelRoot, folios));
        self.start.clear();
        for mm in mms(memory, kernel_root) {
            let pgd = memory.field(mm, offset_of!(Mm, pgd));
            let space = AddressSpace::read(memory, pgd, USER_HALF);
            for frame in space.absent.iter().filter_map(|leaf| frame_of(leaf.entry)) {
                *self.start.entry(frame, 0).0 += 1;
            }
        }
        self.reset();
    }
    fn reset(&mut self) {
        self.entries.clone_from(&self.start);
    }
    fn follows(&self) -> Kinds {
        Self::FOLLOWS
    }
    #[inline(always)]
    fn take(&mut self, kind: EventKind, seen: &Seen, found: &mut Vec<Violation>) {
        let args = seen.event.args;
        match kind {
            EventKind::PteChange if args[2] == 1 => {
                self.pte_change(Pte(args[3]), Pte(args[4]));
            }
            _ if self.entries.is_empty() => {}
            EventKind::LockRelease if args[1] == LockClass::Folio as u64 => {
                let offset = args[0].wrapping_sub(self.folios);
                self.judge(seen, offset / size_of::<Folio>() as u64, "unlocked", found);
            }
            EventKind::FrameFree => self.judge(seen, args[0] >> PAGE_SHIFT, "freed", found),
            _ => {}
        }
    }
    fn compare(&mut self, _: &dyn PhysMem, _: u64, _: &mut Vec<Violation>) {}
}

#[cfg(test)]
mod tests {
    use abi::channel::Event;
    use abi::pte::PteFlags;

    use super::*;
    use crate::check::world::{ROOT_GPA, World};

    fn ids(steps: &[(EventKind, [u64; 5])]) -> Vec<&'static str> {
        let world = World::new();
        let mut monitor = Migrations::default();
        monitor.start(&world.memory, ROOT_GPA, 2);
        let mut found = Vec::new();
        for &(kind, args) in steps {
            let event = Event {
                kind: kind as u32,
                args,
                ..Event::default()
            };
            monitor.observe(&Seen { vcpu: 1, event }, &mut found);
        }
        found.iter().map(|violation| violation.id).collect()
    }

    #[test]
    fn an_entry_that_is_left_is_s_08() {
        use EventKind::{FrameFree, LockRelease, PteChange};
        const FRAME: u64 = 0x77;
        let there = Pte::new(FRAME << PAGE_SHIFT, PteFlags::PRESENT).0;
        let said = NonPresent::Migration {
            gpa: FRAME << PAGE_SHIFT,
            flags: PteFlags::empty(),
        };
        let out = said.entry().0;
        let folios = {
            let world = World::new();
            let memory: &dyn PhysMem = &world.memory;
            memory.field(ROOT_GPA, offset_of!(KernelRoot, folios))
        };
        let word = folios + FRAME * size_of::<Folio>() as u64 + offset_of!(Folio, lock) as u64;
        let unlock = (LockRelease, [word, LockClass::Folio as u64, 0, 0, 0]);
        let change = |gva, old, new| (PteChange, [1, gva, 1, old, new]);
        let leaves = change(0x1000, there, out);
        assert_eq!(ids(&[leaves, unlock]), ["S-08"]);
        let free = (FrameFree, [FRAME << PAGE_SHIFT, 0, 5, 0, 0]);
        assert_eq!(ids(&[leaves, free, unlock]), ["S-08"]);
        let moves = [change(0x1000, out, 0), change(0x2000, 0, out)];
        assert_eq!(ids(&[leaves, moves[0], moves[1], unlock]), ["S-08"]);
        let back = change(0x2000, out, there);
        assert_eq!(ids(&[leaves, moves[0], moves[1], back, unlock]), [""; 0]);
        // Another folio's lock.
        let other = (LockRelease, [word + 64, LockClass::Folio as u64, 0, 0, 0]);
        assert_eq!(ids(&[leaves, other]), [""; 0]);
    }
}
