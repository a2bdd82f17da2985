//! The part of the audit that is about swap: slots, the swap cache, the LRU lists.

use std::collections::BTreeSet;

use abi::layout::{HUGE_ORDER, PAGE_SHIFT};
use abi::objects::{FrameKind, Pa, folio_state, lru};

use super::audit::Found;
use crate::Kernel;
use crate::arch::Arch;
use crate::mm::Field;

/// Slots count the entries that name them, the cache is the same from both ends, and the lists hold every anonymous
/// folio once. No transfer is under way.
pub(super) fn audit_swap<A: Arch>(kernel: &Kernel<A>, found: &Found) {
    let area = &kernel.root().swap;
    assert_eq!((area.lock.get(), kernel.root().lru_lock.get()), (0, 0));
    assert!(area.requests.iter().all(|request| request.folio.get() == 0));
    let mut used = 0;
    for slot in 0..area.nr_slots.get() {
        let object = kernel.swap_slot(slot);
        let named = found.swapped.get(&slot).copied().unwrap_or(0);
        assert_eq!(object.count.get(), named, "entries that name slot {slot}");
        let gpa = object.folio.get();
        if gpa != 0 {
            assert_eq!(kernel.slot_of(gpa), Some(slot));
            let mapped = found.mapped.contains_key(&gpa);
            assert!(
                mapped || named > 0,
                "nobody needs what slot {slot} has cached"
            );
            assert!(mapped || kernel.folio(gpa).refcount.get() == 1);
        }
        used += u64::from(gpa != 0 || named != 0);
    }
    assert_eq!(area.used.get(), used, "slots in use");
    let named = found.swapped.keys().next_back();
    assert!(named.is_none_or(|slot| *slot < area.nr_slots.get()));
    let listed = audit_lists(kernel);
    audit_split_queue(kernel);
    for frame in 1..kernel.root().nr_frames.get() {
        let folio = kernel.frame_folio(frame);
        let file = Pa::new(folio.owner.get()).some();
        let on_disk = folio.kind.get() == FrameKind::File as u8
            && file.is_some_and(|file| kernel.file_on_disk(file));
        if folio.kind.get() != FrameKind::Anon as u8 && !on_disk {
            continue;
        }
        let is_listed = listed.contains(&frame);
        assert_eq!(
            is_listed,
            kernel.has_swap(),
            "frame {frame:#x} and the lists"
        );
        if let Some(slot) = kernel.slot_of(frame << PAGE_SHIFT) {
            assert_eq!(kernel.swap_slot(slot).folio.get(), frame << PAGE_SHIFT);
        }
    }
}

/// The frames on the LRU lists.
fn audit_lists<A: Arch>(kernel: &Kernel<A>) -> BTreeSet<u64> {
    let mut listed = BTreeSet::new();
    for number in 0..lru::LISTS {
        let list = &kernel.root().lru[number];
        let (mut prev, mut frame, mut count) = (0, list.first.get(), 0);
        while frame != 0 {
            let folio = kernel.frame_folio(frame);
            assert!(listed.insert(frame), "frame {frame:#x} is listed twice");
            let kind = FrameKind::from_u8(folio.kind.get()).unwrap();
            assert!(kind.is_user(), "{kind:?}");
            assert_eq!(folio.prev.get(), prev);
            let state = folio.state.get();
            assert_ne!(state & folio_state::LRU, 0);
            assert_eq!(lru::list_of(state, kind == FrameKind::File), number);
            count += 1 << folio.order.get();
            (prev, frame) = (frame, folio.next.get());
        }
        assert_eq!((list.last.get(), list.count.get()), (prev, count));
    }
    listed
}

/// The queue holds what is partly mapped, once each.
fn audit_split_queue<A: Arch>(kernel: &Kernel<A>) {
    let queue = &kernel.root().split_queue;
    let (mut queued, mut prev, mut head) = (BTreeSet::new(), 0, queue.first.get());
    while head != 0 {
        let (folio, place) = (kernel.frame_folio(head), kernel.frame_folio(head + 1));
        assert!(queued.insert(head), "frame {head:#x} is queued twice");
        let kind = (FrameKind::from_u8(folio.kind.get()), folio.order.get());
        assert_eq!(kind, (Some(FrameKind::Anon), HUGE_ORDER));
        assert!(folio.used.get() == 0 && folio.mapcount.get() > 0);
        assert_eq!(
            (place.prev.get(), place.state.get()),
            (prev, folio_state::DEFERRED)
        );
        (prev, head) = (head, place.next.get());
    }
    let count = (queued.len() as u64) << HUGE_ORDER;
    assert_eq!((queue.last.get(), queue.count.get()), (prev, count));
    for frame in 1..kernel.root().nr_frames.get() {
        let folio = kernel.frame_folio(frame);
        let mapcount = u64::from(folio.mapcount.get());
        let is_large = folio.kind.get() == FrameKind::Anon as u8 && folio.order.get() == HUGE_ORDER;
        if is_large && folio.used.get() == 0 && (1..1 << HUGE_ORDER).contains(&mapcount) {
            assert!(queued.contains(&frame), "frame {frame:#x} is partly mapped");
        }
    }
}
