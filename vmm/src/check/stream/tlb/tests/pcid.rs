//! PCIDs and global translations.

use super::*;

/// mm 2 is in the cpumask, and vCPU 1 loads a CR3.
fn load(cr3: u64, mm: u64) -> Seen {
    seen(1, EventKind::Cr3Load, [cr3, mm, 0, 0, 0])
}
fn listed() -> Seen {
    seen(1, EventKind::CpumaskSet, [2, 0, 0, 0, 0])
}

#[test]
fn what_a_pcid_missed_while_it_was_not_loaded_is_t_11() {
    let leave = [listed(), load(OTHER | 2, 2)];
    let back = load(TABLES[0] | cr3::NO_FLUSH, 1);
    let unmap = [pte(rw(), 0), invlpg(0), free(FrameKind::Anon, FRAME)];
    let missed = [&leave[..], &unmap].concat();
    assert_eq!(ids(&[&missed[..], &[back]].concat()), ["T-11"]);
    assert_eq!(ids(&[&missed[..], &[load(TABLES[0], 1)]].concat()), [""; 0]);
    let context = seen(1, EventKind::FlushAll, [1, flush::INVPCID_CONTEXT, 0, 0, 0]);
    assert_eq!(ids(&[&missed[..], &[context, back]].concat()), [""; 0]);
    let end = PAGE + PAGE_SIZE;
    let page = |pcid| {
        seen(
            1,
            EventKind::FlushLocal,
            [1, PAGE, end, flush::INVPCID_ADDRESS, pcid],
        )
    };
    assert_eq!(ids(&[&missed[..], &[page(0), back]].concat()), [""; 0]);
    assert_eq!(ids(&[&missed[..], &[page(2), back]].concat()), ["T-11"]);
    // Not freed yet: whoever unmaps it finds this vCPU in the cpumask.
    let early = [&leave[..], &unmap[..1], &[back]].concat();
    assert_eq!(ids(&early), [""; 0]);
    assert_eq!(ids(&[&early[..], &unmap[1..]].concat()), ["T-01"]);
}

#[test]
fn a_pcid_that_another_mm_used_is_t_11() {
    assert_eq!(ids(&[listed(), load(OTHER | cr3::NO_FLUSH, 2)]), ["T-11"]);
    assert_eq!(
        ids(&[listed(), load(OTHER | 3 | cr3::NO_FLUSH, 2)]),
        [""; 0]
    );
    assert_eq!(ids(&[listed(), load(OTHER, 2)]), [""; 0]);
    let global = Pte::new(FRAME, RW | PteFlags::GLOBAL).0;
    assert_eq!(
        ids(&[pte(rw(), global), listed(), load(OTHER, 2)]),
        ["T-11"]
    );
    let all = seen(1, EventKind::FlushAll, [1, flush::ALL_AND_GLOBAL, 0, 0, 0]);
    let kernel = load(0x9000, 0);
    assert_eq!(
        ids(&[pte(rw(), global), kernel, all, listed(), load(OTHER, 2)]),
        [""; 0]
    );
}

#[test]
fn a_table_freed_while_a_pcid_has_a_pointer_to_it_is_t_11_when_that_is_loaded() {
    let link = Pte::new(TABLES[3], TABLE).0;
    let unlink = seen(0, EventKind::PteChange, [1, PAGE, 2, link, 0]);
    let free = [
        pte(rw(), 0),
        unlink,
        invlpg(0),
        free(FrameKind::Table, TABLES[3]),
    ];
    let freed = [&[listed(), load(OTHER | 2, 2)][..], &free].concat();
    assert_eq!(ids(&freed), [""; 0]);
    let back = load(TABLES[0] | cr3::NO_FLUSH, 1);
    assert_eq!(ids(&[&freed[..], &[back]].concat()), ["T-11"]);
    assert_eq!(ids(&[&freed[..], &[load(TABLES[0], 1)]].concat()), [""; 0]);
}
