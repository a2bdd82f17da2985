//! The calls on memory.

use abi::layout::{HUGE_PAGE_SIZE as HUGE, PAGE_SIZE, USER_END};
use abi::oracle::{Mode, Returns};
use abi::syscall::{advice, map, mlock, mremap, nr};
use proptest::prelude::*;
use proptest::sample::select;

use super::draw::*;
use super::{Call, Show};
use crate::oracle::case::Value;

pub(super) const CALLS: &[Call] = &[
    Call {
        name: "mmap",
        nr: nr::MMAP,
        weight: 22,
        returns: Returns::Place,
        shows: MMAP,
        draw: || mmap(place(), length(), flags(map::FIXED)),
    },
    Call {
        name: "mmap",
        nr: nr::MMAP,
        weight: 10,
        returns: Returns::Place,
        shows: MMAP,
        draw: || mmap(anywhere(), length(), flags(0)),
    },
    Call {
        name: "mmap",
        nr: nr::MMAP,
        weight: 4,
        returns: Returns::Place,
        shows: MMAP,
        draw: || mmap(place(), length(), flags(map::FIXED_NOREPLACE)),
    },
    Call {
        name: "mmap",
        nr: nr::MMAP,
        weight: 2,
        returns: Returns::Place,
        shows: MMAP,
        draw: large_mmap,
    },
    Call {
        name: "mmap",
        nr: nr::MMAP,
        weight: 3,
        returns: Returns::Place,
        shows: MMAP,
        draw: bad_mmap,
    },
    Call {
        name: "munmap",
        nr: nr::MUNMAP,
        weight: 14,
        returns: Returns::Number,
        shows: &[Show::Place, Show::Place],
        draw: || two(place(), length()),
    },
    Call {
        name: "munmap",
        nr: nr::MUNMAP,
        weight: 2,
        returns: Returns::Number,
        shows: &[Show::Place, Show::Place],
        draw: || {
            two(
                bad_place(),
                prop_oneof![length(), wraps(), beyond()].boxed(),
            )
        },
    },
    Call {
        name: "mprotect",
        nr: nr::MPROTECT,
        weight: 18,
        returns: Returns::Number,
        shows: &[Show::Place, Show::Place, Show::Prot],
        draw: || three(place(), length(), protection()),
    },
    Call {
        name: "mprotect",
        nr: nr::MPROTECT,
        weight: 2,
        returns: Returns::Number,
        shows: &[Show::Place, Show::Place, Show::Prot],
        draw: || {
            let lengths = prop_oneof![length(), wraps(), beyond()].boxed();
            three(bad_place(), lengths, any_protection())
        },
    },
    Call {
        name: "madvise",
        nr: nr::MADVISE,
        weight: 12,
        returns: Returns::Number,
        shows: &[Show::Place, Show::Place, Show::Advice],
        draw: || three(place(), length(), advices()),
    },
    Call {
        name: "madvise",
        nr: nr::MADVISE,
        weight: 2,
        returns: Returns::Number,
        shows: &[Show::Place, Show::Place, Show::Advice],
        draw: || {
            let lengths = prop_oneof![length(), wraps()].boxed();
            three(bad_place(), lengths, bad_advices())
        },
    },
    Call {
        name: "madvise",
        nr: nr::MADVISE,
        weight: 1,
        returns: Returns::Number,
        shows: &[Show::Place, Show::Place, Show::Advice],
        draw: || {
            use advice::{COLLAPSE, DONTNEED, HUGEPAGE, NOHUGEPAGE};
            let advices =
                prop_oneof![4 => raw(&[COLLAPSE]), 1 => raw(&[DONTNEED, HUGEPAGE, NOHUGEPAGE])];
            let arena = Just(Value::new(Mode::Arena, 0, 0)).boxed();
            three(arena, raw(&[HUGE, 2 * HUGE]), advices.boxed())
        },
    },
    Call {
        name: "brk",
        nr: nr::BRK,
        weight: 5,
        returns: Returns::Address,
        shows: &[Show::Place],
        draw: || {
            let pages = (0u64..24).prop_map(|page| Value::new(Mode::Heap, 0, page * PAGE_SIZE));
            let bytes = (0u64..24 * PAGE_SIZE).prop_map(|at| Value::new(Mode::Heap, 0, at));
            let bad = raw(&[0, 1, USER_END, u64::MAX]);
            prop_oneof![6 => pages, 2 => bytes, 1 => bad]
                .prop_map(|end| vec![end])
                .boxed()
        },
    },
    Call {
        name: "mremap",
        nr: nr::MREMAP,
        weight: 6,
        returns: Returns::Place,
        shows: MREMAP,
        draw: || mremap_call(place(), raw(&[mremap::MAYMOVE, 0])),
    },
    Call {
        name: "mremap",
        nr: nr::MREMAP,
        weight: 6,
        returns: Returns::Place,
        shows: MREMAP,
        draw: || {
            let fixed = mremap::MAYMOVE | mremap::FIXED;
            mremap_call(
                place(),
                raw(&[
                    fixed,
                    fixed | mremap::DONTUNMAP,
                    mremap::MAYMOVE | mremap::DONTUNMAP,
                ]),
            )
        },
    },
    Call {
        name: "mremap",
        nr: nr::MREMAP,
        weight: 1,
        returns: Returns::Place,
        shows: MREMAP,
        draw: || {
            mremap_call(
                bad_place(),
                raw(&[mremap::FIXED, mremap::MAYMOVE | mremap::FIXED, 8, u64::MAX]),
            )
        },
    },
    Call {
        name: "mremap",
        nr: nr::MREMAP,
        weight: 2,
        returns: Returns::Place,
        shows: MREMAP,
        draw: || {
            // Another mapping of what is shared.
            let flags = raw(&[
                mremap::MAYMOVE,
                mremap::MAYMOVE | mremap::FIXED,
                mremap::MAYMOVE | mremap::DONTUNMAP,
                0,
            ]);
            (place(), length(), flags, place())
                .prop_map(|(old, len, flags, new)| vec![old, Value::raw(0), len, flags, new])
                .boxed()
        },
    },
    Call {
        name: "mlock",
        nr: nr::MLOCK,
        weight: 3,
        returns: Returns::Number,
        shows: &[Show::Place, Show::Place],
        draw: || two(place(), length()),
    },
    Call {
        name: "mlock2",
        nr: nr::MLOCK2,
        weight: 2,
        returns: Returns::Number,
        shows: &[Show::Place, Show::Place, Show::Number],
        draw: || three(place(), length(), raw(&[0, mlock::ONFAULT, 2, 1 << 32])),
    },
    Call {
        name: "munlock",
        nr: nr::MUNLOCK,
        weight: 4,
        returns: Returns::Number,
        shows: &[Show::Place, Show::Place],
        draw: || two(place(), length()),
    },
    Call {
        name: "mincore",
        nr: nr::MINCORE,
        weight: 4,
        returns: Returns::Number,
        shows: &[Show::Place, Show::Place, Show::Place],
        draw: || three(place(), length(), place()),
    },
    Call {
        name: "msync",
        nr: nr::MSYNC,
        weight: 2,
        returns: Returns::Number,
        shows: &[Show::Place, Show::Place, Show::Number],
        draw: || three(place(), length(), raw(&[0, 1, 2, 4, 5, 6, 8, 1 << 32])),
    },
];

const MREMAP: &[Show] = &[
    Show::Place,
    Show::Place,
    Show::Place,
    Show::Number,
    Show::Place,
];

fn mremap_call(
    old: BoxedStrategy<Value>,
    flags: BoxedStrategy<Value>,
) -> BoxedStrategy<Vec<Value>> {
    (old, length(), length(), flags, place())
        .prop_map(|(old, old_len, new_len, flags, new)| vec![old, old_len, new_len, flags, new])
        .boxed()
}

pub(super) const MMAP: &[Show] = &[
    Show::Place,
    Show::Place,
    Show::Prot,
    Show::Map,
    Show::Number,
    Show::Place,
];

/// `MAP_ANONYMOUS`, `always`, private mostly, and at times more.
fn flags(always: u64) -> BoxedStrategy<Value> {
    let extra = prop_oneof![
        10 => Just(0),
        2 => Just(map::NORESERVE),
        2 => Just(map::GROWSDOWN),
        1 => Just(map::STACK),
        2 => Just(map::POPULATE),
        1 => Just(map::POPULATE | map::NONBLOCK),
        1 => Just(map::DENYWRITE | map::EXECUTABLE),
        1 => Just(map::GROWSDOWN | map::NORESERVE | map::STACK),
        1 => Just(1 << 27),
    ];
    let kind = prop_oneof![4 => Just(map::PRIVATE), 1 => Just(map::SHARED)];
    (extra, kind)
        .prop_map(move |(extra, kind)| Value::raw(kind | map::ANONYMOUS | always | extra))
        .boxed()
}

pub(super) fn mmap(
    address: BoxedStrategy<Value>,
    length: BoxedStrategy<Value>,
    flags: BoxedStrategy<Value>,
) -> BoxedStrategy<Vec<Value>> {
    (address, length, protection(), flags)
        .prop_map(|(address, length, prot, flags)| {
            vec![
                address,
                length,
                prot,
                flags,
                Value::raw(u64::MAX),
                Value::raw(0),
            ]
        })
        .boxed()
}

/// More than there is memory: never counted against it, never populated.
fn large_mmap() -> BoxedStrategy<Vec<Value>> {
    // Multiples of 2 MiB and others, for which another place is chosen.
    let lengths = (
        select(&[2 << 20, 4 << 20, 1 << 30, 1 << 38][..]),
        select(&[0, PAGE_SIZE][..]),
    )
        .prop_map(|(bytes, more)| Value::raw(bytes + more));
    let flags = raw(&[0, map::FIXED_NOREPLACE, map::STACK])
        .prop_map(|more| more.plus(map::PRIVATE | map::ANONYMOUS | map::NORESERVE));
    mmap(anywhere(), lengths.boxed(), flags.boxed())
}

/// One thing wrong at least.
fn bad_mmap() -> BoxedStrategy<Vec<Value>> {
    let anonymous = map::PRIVATE | map::ANONYMOUS;
    let good = || (place(), length(), protection(), Just(Value::raw(anonymous)));
    let fixed = Value::raw(anonymous | map::FIXED);
    let call = |(address, length, prot, flags), fd, offset| {
        vec![
            address,
            length,
            prot,
            flags,
            Value::raw(fd),
            Value::raw(offset),
        ]
    };
    prop_oneof![
        // No type, or one that does not exist.
        (good(), select(&[0, 4, 5, 15][..])).prop_map(move |((a, l, p, _), kind)| {
            call((a, l, p, Value::raw(map::ANONYMOUS | kind)), u64::MAX, 0)
        }),
        // A file that is not open.
        good().prop_map(move |(a, l, p, _)| call((a, l, p, Value::raw(map::PRIVATE)), u64::MAX, 0)),
        good().prop_map(move |good| call(good, u64::MAX, 0x800)),
        // The offset of anonymous memory means nothing.
        good().prop_map(move |good| call(good, 77, 16 * PAGE_SIZE)),
        (bad_place(), length(), protection()).prop_map(move |(a, l, p)| call(
            (a, l, p, fixed),
            u64::MAX,
            0
        )),
        (raw(&[0, PAGE_SIZE - 1]), length(), protection()).prop_map(move |(a, l, p)| call(
            (a, l, p, fixed),
            u64::MAX,
            0
        )),
        (
            anywhere(),
            prop_oneof![wraps(), beyond(), raw(&[0, 127 << 40])],
            protection()
        )
            .prop_map(move |(a, l, p)| call((a, l, p, Value::raw(anonymous)), u64::MAX, 0)),
        (place(), prop_oneof![wraps(), beyond()], protection()).prop_map(move |(a, l, p)| call(
            (a, l, p, fixed),
            u64::MAX,
            0
        )),
    ]
    .boxed()
}
