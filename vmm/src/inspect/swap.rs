//! The swap area and the LRU lists as plain values.

use std::sync::atomic::Ordering::Relaxed;

use abi::objects::{KernelRoot, LruList, SwapSlot, lru};
use serde::Serialize;
use zerocopy::FromBytes;

use super::serde_hex;
use crate::memory::PhysMem;

/// The swap area.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SwapView {
    /// Slots that there are, by the kernel's word.
    pub nr_slots: u64,
    /// Slots that are not free, likewise.
    pub used: u64,
    /// Lock word.
    pub lock: u64,
    /// What the array says; none where it does not lie in memory.
    #[serde(skip)]
    pub slots: Option<Vec<SlotView>>,
    /// Folios that are being moved from or to their slots.
    pub moving: Vec<u64>,
    /// The LRU lists by [`lru`].
    pub lists: [ListView; lru::LISTS],
    /// Folios of 2 MiB to be split when memory is short.
    pub split_queue: ListView,
    /// Lock word of the lists.
    pub lru_lock: u64,
}

/// One slot.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SlotView {
    /// Entries that name it.
    pub count: u32,
    /// Number of the memory group that it is charged to, 0 for none.
    pub group: u32,
    /// The folio that stands for it.
    #[serde(with = "serde_hex")]
    pub folio: u64,
}

/// One LRU list.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct ListView {
    /// Frame number, 0 for none.
    pub first: u64,
    /// Frame number, 0 for none.
    pub last: u64,
    /// Pages of the folios on it, by the kernel's word.
    pub count: u64,
}

impl SwapView {
    pub(super) fn read<M: PhysMem + ?Sized>(mem: &M, root: &KernelRoot) -> Self {
        let area = &root.swap;
        let requests = area.requests.iter();
        let folios = requests.map(|request| request.folio.load(Relaxed));
        Self {
            nr_slots: area.nr_slots.load(Relaxed),
            used: area.used.load(Relaxed),
            lock: area.lock.load(Relaxed),
            slots: read_slots(mem, area.slots.get().0, area.nr_slots.load(Relaxed)),
            moving: folios.filter(|folio| *folio != 0).collect(),
            lists: root.lru.each_ref().map(ListView::new),
            split_queue: ListView::new(&root.split_queue),
            lru_lock: root.lru_lock.load(Relaxed),
        }
    }

    /// True where there is swap, and so there are lists.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.nr_slots != 0
    }
}

impl ListView {
    fn new(list: &LruList) -> Self {
        Self {
            first: list.first.load(Relaxed),
            last: list.last.load(Relaxed),
            count: list.count.load(Relaxed),
        }
    }
}

fn read_slots<M: PhysMem + ?Sized>(mem: &M, array: u64, slots: u64) -> Option<Vec<SlotView>> {
    let each = size_of::<SwapSlot>();
    // What does not fit into memory is not asked for.
    let bytes = slots
        .checked_mul(each as u64)
        .filter(|bytes| *bytes <= mem.bytes())?;
    let mut raw = vec![0; usize::try_from(bytes).ok()?];
    mem.read(array, &mut raw).ok()?;
    let slots = raw.chunks_exact(each).map(|bytes| {
        let slot = SwapSlot::read_from_bytes(bytes).expect("a chunk has a slot's size");
        SlotView {
            count: slot.count.load(Relaxed),
            group: slot.group.load(Relaxed),
            folio: slot.folio.load(Relaxed),
        }
    });
    Some(slots.collect())
}
