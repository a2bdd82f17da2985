//! Random histories of page tables and TLBs.

use proptest::prelude::*;

use super::reference::VCPUS;

/// One step of a history.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// Software writes the entry of this level for a page of mm 0 or 1, if its table is linked.
    Write {
        mm: usize,
        level: u8,
        page: u64,
        to: To,
    },
    /// The processor sets A, and D, in the entry that translates a page now.
    Use {
        mm: usize,
        page: u64,
        store: bool,
    },
    /// A vCPU loads CR3.
    Load {
        vcpu: usize,
        mm: usize,
        pcid: u64,
        keep: bool,
    },
    Invlpg {
        vcpu: usize,
        page: u64,
    },
    Invpcid {
        vcpu: usize,
        pcid: u64,
        page: u64,
    },
    Context {
        vcpu: usize,
        pcid: u64,
    },
    All {
        vcpu: usize,
        global: bool,
    },
    Fault {
        vcpu: usize,
        page: u64,
    },
}

/// What an entry becomes.
#[derive(Clone, Debug)]
pub(super) enum To {
    None,
    /// A page, of what number and with which of R/W, U/S, XD, G, A and D.
    Leaf(u64, u8),
    /// A table of the pool that is linked nowhere, with which of R/W, U/S and XD.
    Table(usize, u8),
    /// Other rights, of what is there.
    Same(u8),
}

/// Mostly histories in which tables are linked and something is cached.
pub(super) fn step() -> impl Strategy<Value = Step> {
    let vcpu = 0..VCPUS;
    let to = prop_oneof![
        2 => Just(To::None),
        4 => (0u64..2, leaf_bits()).prop_map(|(number, bits)| To::Leaf(number, bits)),
        4 => (0usize..2, table_bits()).prop_map(|(number, bits)| To::Table(number, bits)),
        3 => leaf_bits().prop_map(To::Same),
    ];
    let write = (
        prop_oneof![3 => Just(0usize), 1 => Just(1)],
        level(),
        0u64..8,
        to,
    );
    prop_oneof![
        12 => write.prop_map(|(mm, level, page, to)| Step::Write { mm, level, page, to }),
        3 => (0usize..2, 0u64..8, any::<bool>())
            .prop_map(|(mm, page, store)| Step::Use { mm, page, store }),
        5 => (vcpu.clone(), 0usize..3, 0u64..2, prop::bool::weighted(0.7))
            .prop_map(|(vcpu, mm, pcid, keep)| Step::Load { vcpu, mm, pcid, keep }),
        2 => (vcpu.clone(), 0u64..8).prop_map(|(vcpu, page)| Step::Invlpg { vcpu, page }),
        2 => (vcpu.clone(), 0u64..2, 0u64..8)
            .prop_map(|(vcpu, pcid, page)| Step::Invpcid { vcpu, pcid, page }),
        1 => (vcpu.clone(), 0u64..2).prop_map(|(vcpu, pcid)| Step::Context { vcpu, pcid }),
        1 => (vcpu.clone(), any::<bool>()).prop_map(|(vcpu, global)| Step::All { vcpu, global }),
        1 => (vcpu, 0u64..8).prop_map(|(vcpu, page)| Step::Fault { vcpu, page }),
    ]
}

fn level() -> impl Strategy<Value = u8> {
    prop_oneof![4 => Just(1u8), 3 => Just(2u8), 2 => Just(3u8), 1 => Just(4u8)]
}

/// Most are used.
fn leaf_bits() -> impl Strategy<Value = u8> {
    (0u8..64, prop::bool::weighted(0.5)).prop_map(|(bits, used)| {
        let bits = if used { bits | 1 << 4 } else { bits };
        // Few are global.
        if bits & 3 == 0 {
            bits
        } else {
            bits & !(1 << 3)
        }
    })
}

/// Most permit everything.
fn table_bits() -> impl Strategy<Value = u8> {
    prop_oneof![3 => Just(3u8), 1 => 0u8..8]
}

/// Histories that begin with linked tables and both vCPUs on mm 0.
pub(super) fn history() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(), 0..40).prop_map(|steps| {
        let mut all = begin();
        all.extend(steps);
        all
    })
}

pub(super) fn begin() -> Vec<Step> {
    let link = |level, number| Step::Write {
        mm: 0,
        level,
        page: 0,
        to: To::Table(number, 3),
    };
    let load = |vcpu| Step::Load {
        vcpu,
        mm: 0,
        pcid: 0,
        keep: false,
    };
    vec![link(4, 0), link(3, 0), link(2, 0), load(0), load(1)]
}
