//! Memory groups, and what is charged to them, as plain values.

use std::sync::atomic::Ordering::Relaxed;

use abi::objects::{FrameGroup, KernelRoot, MemGroup, group_stat};
use serde::Serialize;

use super::serde_hex;
use crate::memory::PhysMem;

/// All memory groups.
#[derive(Clone, Debug, Default, Serialize)]
pub struct GroupsView {
    /// The array of the frames' groups, 0 where there are no groups.
    #[serde(with = "serde_hex")]
    pub array: u64,
    /// By frame the number of the group that it is charged to, 0 for none; none where the array does not lie in memory.
    #[serde(skip)]
    pub frames: Option<Vec<u8>>,
    /// Those that there are, by number.
    pub groups: Vec<GroupView>,
    /// Lock word of their creation and limits.
    pub lock: u64,
}

/// One group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs)] // the fields of abi's MemGroup
pub struct GroupView {
    pub number: u64,
    pub parent: u64,
    pub usage: u64,
    pub max: u64,
    pub watermark: u64,
    pub failures: u64,
    pub stats: [u64; group_stat::NAMES.len()],
}

impl GroupsView {
    pub(super) fn read<M: PhysMem + ?Sized>(mem: &M, root: &KernelRoot) -> Self {
        let array = root.frame_groups.get().0;
        let frames = match array {
            0 => Some(Vec::new()),
            array => read_frames(mem, array, root.nr_frames.load(Relaxed)),
        };
        let groups = (1..).zip(&root.groups);
        let live = groups.filter(|(_, group)| group.live.load(Relaxed) != 0);
        Self {
            array,
            frames,
            groups: live.map(|(number, group)| view(number, group)).collect(),
            lock: root.groups_lock.load(Relaxed),
        }
    }

    /// True where there may be groups.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.array != 0
    }

    /// The group with `number`; none for 0, and where there is none such.
    #[must_use]
    pub fn group(&self, number: u64) -> Option<&GroupView> {
        self.groups.iter().find(|group| group.number == number)
    }

    /// The group `number` and those above it, lowest first. The guest may have tied them into a loop: each comes once at
    /// most.
    pub fn group_and_above(&self, number: u64) -> impl Iterator<Item = &GroupView> {
        std::iter::successors(self.group(number), |below| self.group(below.parent))
            .take(self.groups.len())
    }
}

fn view(number: u64, group: &MemGroup) -> GroupView {
    GroupView {
        number,
        parent: group.parent.load(Relaxed),
        usage: group.usage.load(Relaxed),
        max: group.max.load(Relaxed),
        watermark: group.watermark.load(Relaxed),
        failures: group.failures.load(Relaxed),
        stats: group.stats.each_ref().map(|stat| stat.load(Relaxed)),
    }
}

fn read_frames<M: PhysMem + ?Sized>(mem: &M, array: u64, frames: u64) -> Option<Vec<u8>> {
    const { assert!(size_of::<FrameGroup>() == 1) };
    // What does not fit into memory is not asked for.
    let frames = usize::try_from(frames)
        .ok()
        .filter(|frames| *frames as u64 <= mem.bytes())?;
    let mut groups = vec![0; frames];
    mem.read(array, &mut groups).ok()?;
    Some(groups)
}
