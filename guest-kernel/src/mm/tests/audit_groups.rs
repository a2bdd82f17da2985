//! The part of the audit that is about memory groups: every counter is the sum over what is charged.

use abi::layout::PAGE_SHIFT;
use abi::objects::{FrameKind, GROUPS, group_stat};

use crate::Kernel;
use crate::arch::Arch;
use crate::mm::Field;

/// What a group and those above it must have counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counted {
    usage: u64,
    stats: [u64; group_stat::NAMES.len()],
}

/// Checks usage and statistics of all groups against frames and slots.
pub(super) fn audit_groups<A: Arch>(kernel: &Kernel<A>) {
    let root = kernel.root();
    assert_eq!(root.groups_lock.get(), 0);
    if !kernel.has_groups() {
        assert!(root.frame_groups.get().is_null());
        return;
    }
    let mut counted = [Counted::default(); GROUPS + 1];
    for frame in 1..root.nr_frames.get() {
        let group = u64::from(kernel.frame_group(frame << PAGE_SHIFT).group.get());
        if group == 0 {
            continue;
        }
        let folio = kernel.frame_folio(frame);
        let stat = match FrameKind::from_u8(folio.kind.get()) {
            Some(FrameKind::Anon) => group_stat::ANON,
            Some(FrameKind::File) => group_stat::FILE,
            Some(FrameKind::Table | FrameKind::Retired) => group_stat::PAGETABLES,
            kind => panic!("frame {frame:#x} of kind {kind:?} is charged to group {group}"),
        };
        assert!(kernel.group(group).is_some(), "no group {group}");
        let pages = 1 << folio.order.get();
        for (above, _) in kernel.group_and_above(group) {
            counted[above as usize].usage += pages;
            counted[above as usize].stats[stat] += pages;
        }
    }
    for slot in 0..root.swap.nr_slots.get() {
        let object = kernel.swap_slot(slot);
        let (group, used) = (u64::from(object.group.get()), object.count.get() != 0);
        assert!(
            group == 0 || used || object.folio.get() != 0,
            "slot {slot} is free"
        );
        for (above, _) in kernel.group_and_above(group) {
            counted[above as usize].stats[group_stat::SWAP] += 1;
        }
    }
    for (number, counted) in counted.into_iter().enumerate().skip(1) {
        let group = &root.groups[number - 1];
        let found = Counted {
            usage: group.usage.get(),
            stats: group.stats.each_ref().map(Field::get),
        };
        assert_eq!(found, counted, "group {number}");
        assert!(group.parent.get() < number as u64);
        assert!(found.usage <= group.max.get() && found.usage <= group.watermark.get());
    }
    let mut mm = root.mms.get();
    while let Some(pa) = mm.some() {
        let group = kernel.obj(pa).group.get();
        assert!(group == 0 || kernel.group(group).is_some());
        mm = kernel.obj(pa).next.get();
    }
}
