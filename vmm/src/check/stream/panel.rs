//! All monitors, and all of them as one.
//!
//! A schedule tells of thousands of events, and three or four of the monitors follow each. To find out for every event whose turn
//! it is, and for every monitor what the event is, costs more than most of them do with it. So [`Panel`] knows both for each
//! kind when it is compiled: one jump leads to what its followers do with that kind, one after the other.

use abi::channel::EventKind;

use super::{
    Kinds, Monitor, Seen, folio, groups, is_of_lock, lifetime, locks, migration, rcu, rmap, tlb,
    vma_lock, walk,
};
use crate::check::Violation;
use crate::memory::PhysMem;

macro_rules! panel {
    ($($name:ident: $monitor:ty,)+) => {
        /// Every monitor, as one.
        #[derive(Clone, Debug, Default)]
        pub struct Panel {
            $($name: $monitor,)+
        }

        /// Every monitor there is, each by itself.
        #[must_use]
        pub fn all() -> Vec<Box<dyn Monitor>> {
            vec![$(Box::new(<$monitor>::default()),)+]
        }

        impl Panel {
            fn tell<const KIND: u32>(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
                let Some(kind) = (const { EventKind::from_id(KIND) }) else {
                    return self.take_unknown();
                };
                $(
                    if const { <$monitor>::FOLLOWS.has_kind(KIND) }
                        && (!const { is_of_lock(KIND) } || <$monitor>::FOLLOWS.has_class(seen.event.args[1]))
                    {
                        self.$name.take(kind, seen, found);
                    }
                )+
            }
        }

        impl Monitor for Panel {
            fn fork(&self) -> Box<dyn Monitor> {
                Box::new(self.clone())
            }
            fn since_boot(&mut self, events: &[Seen], nr_vcpus: usize) {
                $(self.$name.since_boot(events, nr_vcpus);)+
            }
            fn start(&mut self, memory: &dyn PhysMem, kernel_root: u64, nr_vcpus: usize) {
                $(self.$name.start(memory, kernel_root, nr_vcpus);)+
            }
            fn reset(&mut self) {
                $(self.$name.reset();)+
            }
            fn follows(&self) -> Kinds {
                Kinds::ALL
            }
            fn take(&mut self, kind: EventKind, seen: &Seen, found: &mut Vec<Violation>) {
                KINDS[kind as usize](self, seen, found);
            }
            fn observe(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
                match KINDS.get(seen.event.kind as usize) {
                    Some(tell) => tell(self, seen, found),
                    None => self.take_unknown(),
                }
            }
            fn take_unknown(&mut self) {
                $(self.$name.take_unknown();)+
            }
            fn settled(&mut self, memory: &dyn PhysMem, kernel_root: u64, found: &mut Vec<Violation>) {
                $(self.$name.settled(memory, kernel_root, found);)+
            }
            fn compare(&mut self, memory: &dyn PhysMem, kernel_root: u64, found: &mut Vec<Violation>) {
                $(self.$name.compare(memory, kernel_root, found);)+
            }
        }
    };
}

panel! {
    tlb: tlb::TlbModel,
    locks: locks::Locks,
    lifetime: lifetime::Lifetime,
    folios: folio::Folios,
    walks: walk::Walks,
    rcu: rcu::Rcu,
    rmap: rmap::Rmap,
    migrations: migration::Migrations,
    charges: groups::Charges,
    vma_locks: vma_lock::VmaLocks,
}

type Tell = fn(&mut Panel, &Seen, &mut Vec<Violation>);

macro_rules! by_number {
    ($($kind:literal)+) => { [$(Panel::tell::<$kind>,)+] };
}

/// What to do with each kind, by its number.
const KINDS: [Tell; u64::BITS as usize] = by_number!(
    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
    32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63
);
