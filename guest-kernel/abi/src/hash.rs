//! A hash of every layout that the host reads, so that a kernel and a host built from different
//! sources refuse each other instead of misreading.

use core::mem::offset_of;

use crate::objects::{
    AnonVma, AnonVmaChain, Asid, Cpu, CpuRcu, Folio, KernelRoot, Khugepaged, Kswapd, LruList,
    MemGroup, Mm, Slab, SoftTlb, SwapArea, SwapRequest, SwapSlot, Task, Vma, VmaNode,
};
use crate::{boot::BootInfo, channel, point::Point};

const fn mix(hash: u64, value: usize) -> u64 {
    // FNV-1a over the value's bytes.
    let bytes = (value as u64).to_le_bytes();
    let mut hash = hash;
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x100_0000_01b3);
        i += 1;
    }
    hash
}

macro_rules! hash_layouts {
    ($($type:ty { $($field:ident),+ $(,)? })+) => {{
        let mut hash = 0xcbf2_9ce4_8422_2325;
        $(
            hash = mix(hash, size_of::<$type>());
            $(hash = mix(hash, offset_of!($type, $field));)+
        )+
        hash
    }};
}

/// Hash of the sizes and field offsets of every shared structure, and of how many points and event
/// kinds there are.
#[must_use]
pub const fn layout_hash() -> u64 {
    let hash = hash_layouts! {
        BootInfo { segments, kernel_root, cmdline }
        channel::Control { trap, event_mask, ring_head, point, report, message, fail }
        channel::Event { stamp, kind, task, args, sequence }
        KernelRoot { folios, nr_frames, buddy, slabs, swap, lru, split_queue, kswapd, khugepaged, frame_groups, groups, mms, tasks, futex_queue, lock_queue, ticket, online, cpus }
        Folio { kind, order, flags, state, refcount, mapcount, generation, owner, index, next, lock, used, pins }
        Vma { start, end, flags, pgoff, mm, refs, lock_seq, generation, anon_vma, chains, file, left_of_file, right_of_file, parent_of_file, subtree_end }
        VmaNode { level, count, slots, next_retired }
        Mm { id, pgd, users, count, cpumask, tlb_gen, mmap_lock, lock_seq, vmas, map_count, rss, tables, brk, next, flush_batched, write_protect_seq, total_vm, limits, group }
        AnonVma { root, parent, chains, refcount, degree }
        AnonVmaChain { vma, anon_vma, next_of_vma, next_of_anon }
        Task { id, process, state, mm, affinity, cpu, waits_for, stack, next_task, frame, leader, flags, threads, disk }
        Cpu { current, loaded_mm, pcid, lazy, free_list, queue, flush, idle_sp, dead, soft_tlb, rcu, asids, next_asid }
        Asid { mm, tlb_gen }
        CpuRcu { watching, nesting, retired, waiting, grace, pending, seen }
        SoftTlb { pages, tables, evictions }
        SwapArea { slots, nr_slots, used, sector, lock, requests }
        SwapSlot { count, group, folio }
        MemGroup { live, parent, usage, max, watermark, failures, stats }
        SwapRequest { disk, folio }
        LruList { first, last, count }
        Kswapd { task, min, low, high, failures, reclaiming }
        Khugepaged { task, wanted }
        Slab { object_bytes, used, retired, frames, free }
    };
    mix(mix(hash, Point::ALL.len()), channel::EventKind::ALL.len())
}
