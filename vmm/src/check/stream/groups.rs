//! Memory groups on the stream (family G): a frame is charged once, and uncharged from the group that it was charged to
//! before it is free.
//!
//! Counters that are wrong at the end do not say who left them so; here it is the event that does.

use std::mem::offset_of;

use abi::channel::EventKind;
use abi::layout::PAGE_SHIFT;
use abi::objects::KernelRoot;
use rustc_hash::FxHashMap;

use super::words::Word as _;
use super::{Kinds, Monitor, Rule, Seen, violation};
use crate::check::{Finding, Violation};
use crate::memory::PhysMem;

/// IDs and predicates.
pub const INVARIANTS: &[Rule] = &[
    (KEPT, "a frame that is freed is charged to no memory group"),
    (
        LEFT,
        "what is charged was charged to no memory group, and what is uncharged or moved leaves the group that it was charged to",
    ),
    (
        EXPLAINED,
        "the events explain the memory groups of frames: they end as memory has them",
    ),
];

const KEPT: &str = "G-20";
const LEFT: &str = "G-21";
const EXPLAINED: &str = "G-22";

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Charges {
    start: FxHashMap<u64, u64>,
    /// Groups by frame, of those that are charged.
    frames: FxHashMap<u64, u64>,
}

/// What memory says: by frame its group.
fn read(memory: &dyn PhysMem, kernel_root: u64) -> FxHashMap<u64, u64> {
    let array = memory.field(kernel_root, offset_of!(KernelRoot, frame_groups));
    let frames = memory.field(kernel_root, offset_of!(KernelRoot, nr_frames));
    if array == 0 || frames > memory.bytes() {
        return FxHashMap::default();
    }
    let mut groups = vec![0; frames as usize];
    if memory.read(array, &mut groups).is_err() {
        return FxHashMap::default();
    }
    let charged = (0..).zip(groups).filter(|(_, group)| *group != 0);
    charged
        .map(|(frame, group)| (frame, group.into()))
        .collect()
}

fn name(group: u64) -> String {
    match group {
        0 => "no group".into(),
        group => format!("group {group}"),
    }
}

impl Charges {
    fn charge(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let [gpa, group, old, ..] = seen.event.args;
        let frame = gpa >> PAGE_SHIFT;
        // A charge that was refused.
        if frame == 0 {
            return;
        }
        let was = match group {
            0 => self.frames.remove(&frame),
            group => self.frames.insert(frame, group),
        };
        let was = was.unwrap_or(0);
        if was != old {
            let how = if group == 0 { "uncharged" } else { "charged" };
            let finding = about(
                seen,
                frame,
                &format!("was {how} and left another group than its own"),
            )
            .expected(format!("it leaves {}", name(was)))
            .found(format!("it leaves {}", name(old)));
            found.push(violation(INVARIANTS, LEFT, finding));
        }
    }

    fn freed(&mut self, seen: &Seen, found: &mut Vec<Violation>) {
        let frame = seen.event.args[0] >> PAGE_SHIFT;
        // Told once.
        if let Some(group) = self.frames.remove(&frame) {
            let finding = about(seen, frame, "was freed and not uncharged")
                .expected("no group")
                .found(name(group));
            found.push(violation(INVARIANTS, KEPT, finding));
        }
    }
}

fn about(seen: &Seen, frame: u64, what: &str) -> Finding {
    Finding::new(format!("frame {frame:#x} {what}"))
        .frame(frame)
        .vcpu(seen.vcpu)
        .detail(format!("by task {} on vCPU {}", seen.event.task, seen.vcpu))
}

impl Charges {
    pub(super) const FOLLOWS: Kinds = Kinds::of(&[EventKind::Charge, EventKind::FrameFree]);
}

impl Monitor for Charges {
    fn fork(&self) -> Box<dyn Monitor> {
        Box::new(self.clone())
    }
    fn start(&mut self, memory: &dyn PhysMem, kernel_root: u64, _: usize) {
        self.start = read(memory, kernel_root);
        self.reset();
    }
    fn reset(&mut self) {
        self.frames.clone_from(&self.start);
    }
    fn follows(&self) -> Kinds {
        Self::FOLLOWS
    }
    #[inline(always)]
    fn take(&mut self, kind: EventKind, seen: &Seen, found: &mut Vec<Violation>) {
        match kind {
            EventKind::Charge => self.charge(seen, found),
            EventKind::FrameFree if !self.frames.is_empty() => self.freed(seen, found),
            _ => {}
        }
    }
    fn compare(&mut self, memory: &dyn PhysMem, kernel_root: u64, found: &mut Vec<Violation>) {
        if memory.field(kernel_root, offset_of!(KernelRoot, frame_groups)) == 0 {
            return;
        }
        let now = read(memory, kernel_root);
        let mut frames: Vec<_> = now.keys().chain(self.frames.keys()).copied().collect();
        frames.sort_unstable();
        frames.dedup();
        for frame in frames {
            let [told, there] =
                [&self.frames, &now].map(|map| map.get(&frame).copied().unwrap_or(0));
            if told == there {
                continue;
            }
            let title = format!("no event says why frame {frame:#x} is charged as it is");
            let finding = Finding::new(title)
                .frame(frame)
                .expected(name(told))
                .found(name(there));
            found.push(violation(INVARIANTS, EXPLAINED, finding));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use abi::channel::Event;
    use abi::objects::{FrameKind, Pa};

    use super::*;
    use crate::check::world::{ROOT_GPA, World};

    /// A frame that is charged to group 2 when the stream begins, and one that is not.
    const CHARGED: u64 = 0x77;
    const FREE: u64 = 0x78;

    fn ids(steps: &[(EventKind, [u64; 5])]) -> Vec<&'static str> {
        let world = World::new();
        let array = world.frame_of_kind(FrameKind::Anon) << PAGE_SHIFT;
        world.memory.write(array, &[0; 0x800]).unwrap();
        world.memory.write(array + CHARGED, &[2]).unwrap();
        world.root(|root| root.frame_groups.set(Pa::new(array)));
        let mut monitor = Charges::default();
        monitor.start(&world.memory, ROOT_GPA, 2);
        let mut found = Vec::new();
        for &(kind, args) in steps {
            let event = Event {
                kind: kind as u32,
                args,
                ..Event::default()
            };
            monitor.observe(&Seen { vcpu: 1, event }, &mut found);
            // Memory goes along.
            if kind == EventKind::Charge && args[0] != 0 {
                let at = array + (args[0] >> PAGE_SHIFT);
                world.memory.write(at, &[args[1] as u8]).unwrap();
            }
        }
        monitor.compare(&world.memory, ROOT_GPA, &mut found);
        found.iter().map(|violation| violation.id).collect()
    }

    fn charge(frame: u64, group: u64, old: u64) -> (EventKind, [u64; 5]) {
        let args = [frame << PAGE_SHIFT, group, old, 1, 0];
        (EventKind::Charge, args)
    }

    fn free(frame: u64) -> (EventKind, [u64; 5]) {
        let args = [frame << PAGE_SHIFT, 0, 5, 0, 0];
        (EventKind::FrameFree, args)
    }

    #[test]
    fn a_frame_that_is_freed_and_not_uncharged_is_g_20() {
        assert_eq!(ids(&[charge(CHARGED, 0, 2), free(CHARGED)]), [""; 0]);
        assert_eq!(ids(&[free(FREE)]), [""; 0]);
        let kept = ids(&[charge(FREE, 1, 0), free(FREE)]);
        // Memory still says that it is charged.
        assert_eq!(kept, ["G-20", "G-22"]);
    }

    #[test]
    fn a_charge_that_leaves_another_group_is_g_21() {
        let there_and_back = [charge(CHARGED, 3, 2), charge(CHARGED, 0, 3)];
        assert_eq!(ids(&there_and_back), [""; 0]);
        assert_eq!(ids(&[charge(CHARGED, 0, 3)]), ["G-21"]);
        assert_eq!(ids(&[charge(CHARGED, 3, 0)]), ["G-21"]);
        assert_eq!(ids(&[charge(FREE, 0, 2)]), ["G-21"]);
        // One that was refused is no frame's.
        assert_eq!(ids(&[charge(0, 3, 0)]), [""; 0]);
    }

    #[test]
    fn a_group_that_no_event_told_is_g_22() {
        let world = World::new();
        let array = world.frame_of_kind(FrameKind::Anon) << PAGE_SHIFT;
        world.memory.write(array, &[0; 0x800]).unwrap();
        world.root(|root| root.frame_groups.set(Pa::new(array)));
        let mut monitor = Charges::default();
        monitor.start(&world.memory, ROOT_GPA, 2);
        let mut found = Vec::new();
        monitor.compare(&world.memory, ROOT_GPA, &mut found);
        assert!(found.is_empty());
        world.memory.write(array + CHARGED, &[2]).unwrap();
        monitor.compare(&world.memory, ROOT_GPA, &mut found);
        let ids: Vec<_> = found.iter().map(|violation| violation.id).collect();
        assert_eq!(ids, ["G-22"]);
        // Without groups, and with an array that there is not, there is nothing to compare.
        for array in [0, u64::MAX] {
            world.root(|root| root.frame_groups.set(Pa::new(array)));
            world.root(|root| root.groups[0].live.store(1, Relaxed));
            monitor.start(&world.memory, ROOT_GPA, 2);
            found.clear();
            monitor.compare(&world.memory, ROOT_GPA, &mut found);
            assert!(found.is_empty());
        }
    }
}
