//! The calls on files in memory.

use abi::layout::PAGE_SIZE;
use abi::oracle::{Mode, Returns};
use abi::syscall::{falloc, map, memfd, nr, seek};
use proptest::prelude::*;

use super::draw::*;
use super::memory::MMAP;
use super::{Call, Show};
use crate::oracle::case::Value;

const fn call(
    name: &'static str,
    nr: u64,
    weight: u32,
    shows: &'static [Show],
    draw: fn() -> BoxedStrategy<Vec<Value>>,
) -> Call {
    Call {
        name,
        nr,
        weight,
        returns: Returns::Number,
        shows,
        draw,
    }
}

const TRANSFER: &[Show] = &[Show::Place, Show::Place, Show::Place];
const TRANSFER_AT: &[Show] = &[Show::Place, Show::Place, Show::Place, Show::Place];
const ONE: &[Show] = &[Show::Place];

pub(super) const CALLS: &[Call] = &[
    Call {
        returns: Returns::File,
        ..call(
            "memfd_create",
            nr::MEMFD_CREATE,
            4,
            &[Show::Place, Show::Number],
            || two(name(), raw(&[0, memfd::CLOEXEC, memfd::ALLOW_SEALING])),
        )
    },
    Call {
        returns: Returns::File,
        ..call(
            "memfd_create",
            nr::MEMFD_CREATE,
            1,
            &[Show::Place, Show::Number],
            || {
                let flags = raw(&[0, 1 << 5, memfd::EXEC | memfd::NOEXEC_SEAL, 1 << 32]);
                two(prop_oneof![name(), place()].boxed(), flags)
            },
        )
    },
    Call {
        returns: Returns::Place,
        ..call("mmap", nr::MMAP, 12, MMAP, || mmap(place(), map::FIXED))
    },
    Call {
        returns: Returns::Place,
        ..call("mmap", nr::MMAP, 6, MMAP, || mmap(anywhere(), 0))
    },
    Call {
        returns: Returns::Place,
        ..call("mmap", nr::MMAP, 2, MMAP, bad_mmap)
    },
    call(
        "ftruncate",
        nr::FTRUNCATE,
        6,
        &[Show::Place, Show::Place],
        || two(file(), size()),
    ),
    call(
        "fallocate",
        nr::FALLOCATE,
        6,
        &[Show::Place, Show::Number, Show::Place, Show::Place],
        || {
            let good = raw(&[0, falloc::KEEP_SIZE, PUNCH, PUNCH, PUNCH]);
            let modes = prop_oneof![8 => good, 1 => raw(&[2, 4, 8, 9, 0x10, 0x20, 0x40, 1 << 32])];
            (file(), modes, offset(), length())
                .prop_map(|(file, mode, offset, len)| vec![file, mode, offset, len])
                .boxed()
        },
    ),
    call("pread64", nr::PREAD64, 4, TRANSFER_AT, || {
        (file(), place_or_byte(), length(), offset())
            .prop_map(|(file, to, len, offset)| vec![file, to, len, offset])
            .boxed()
    }),
    call("pwrite64", nr::PWRITE64, 4, TRANSFER_AT, || {
        (file(), place_or_byte(), length(), offset())
            .prop_map(|(file, from, len, offset)| vec![file, from, len, offset])
            .boxed()
    }),
    call("read", nr::READ, 2, TRANSFER, || {
        three(file(), place_or_byte(), length())
    }),
    call("write", nr::WRITE, 2, TRANSFER, || {
        three(file(), place_or_byte(), length())
    }),
    call(
        "lseek",
        nr::LSEEK,
        2,
        &[Show::Place, Show::Number, Show::Number],
        || three(file(), offset(), raw(&[seek::SET, seek::CUR, seek::END, 5])),
    ),
    call("close", nr::CLOSE, 1, ONE, || {
        file().prop_map(|file| vec![file]).boxed()
    }),
    Call {
        returns: Returns::File,
        ..call("dup", nr::DUP, 1, ONE, || {
            file().prop_map(|file| vec![file]).boxed()
        })
    },
];

const PUNCH: u64 = falloc::PUNCH_HOLE | falloc::KEEP_SIZE;
/// Pages that files have at most, but for those that calls with odd arguments make.
const PAGES: u64 = 24;

/// One of the files that were made last.
pub(in crate::oracle) fn file() -> BoxedStrategy<Value> {
    prop_oneof![6 => Just(0u32), 2 => Just(1), 1 => Just(2)]
        .prop_map(|index| Value::new(Mode::File, index, 0))
        .boxed()
}

fn name() -> BoxedStrategy<Value> {
    Just(Value::new(Mode::Name, 0, 0)).boxed()
}

/// Bytes of a file.
fn size() -> BoxedStrategy<Value> {
    let pages = (0..=PAGES).prop_map(|pages| Value::raw(pages * PAGE_SIZE));
    let bytes = (0..PAGES * PAGE_SIZE).prop_map(Value::raw);
    let odd = raw(&[1 << 40, i64::MAX as u64, u64::MAX, 1 << 63]);
    prop_oneof![10 => pages, 6 => bytes, 1 => odd].boxed()
}

/// A byte of a file.
pub(in crate::oracle) fn offset() -> BoxedStrategy<Value> {
    let pages = (0..PAGES).prop_map(|pages| Value::raw(pages * PAGE_SIZE));
    let words = (0..PAGES * PAGE_SIZE / 8).prop_map(|word| Value::raw(word * 8));
    let bytes = (0..PAGES * PAGE_SIZE).prop_map(Value::raw);
    let far = i64::MAX as u64;
    let odd = raw(&[1 << 40, far, far - 7, far & !0xfff, u64::MAX, 1 << 63]);
    prop_oneof![10 => pages, 3 => words, 3 => bytes, 1 => odd].boxed()
}

/// Where data come from or go to.
fn place_or_byte() -> BoxedStrategy<Value> {
    let byte = (place(), 1..PAGE_SIZE).prop_map(|(place, bytes)| place.plus(bytes));
    prop_oneof![3 => place(), 1 => byte].boxed()
}

fn kind() -> BoxedStrategy<u64> {
    prop_oneof![
        4 => Just(map::SHARED),
        4 => Just(map::PRIVATE),
        1 => Just(map::SHARED_VALIDATE),
        1 => Just(map::SHARED | map::POPULATE),
        1 => Just(map::PRIVATE | map::POPULATE),
        1 => Just(map::PRIVATE | map::NORESERVE),
        1 => Just(map::PRIVATE | map::LOCKED),
    ]
    .boxed()
}

fn mmap(address: BoxedStrategy<Value>, always: u64) -> BoxedStrategy<Vec<Value>> {
    let page = prop_oneof![2 => Just(0), 3 => 0..PAGES];
    (address, length(), protection(), kind(), file(), page)
        .prop_map(move |(address, len, prot, kind, file, page)| {
            let (flags, offset) = (Value::raw(kind | always), Value::raw(page * PAGE_SIZE));
            vec![address, len, prot, flags, file, offset]
        })
        .boxed()
}

/// Kinds that no file has, offsets that no page has.
fn bad_mmap() -> BoxedStrategy<Vec<Value>> {
    let kinds = raw(&[
        0,
        4,
        map::SHARED | map::GROWSDOWN,
        map::PRIVATE | map::GROWSDOWN,
        map::SHARED_VALIDATE | 1 << 27,
        map::SHARED_VALIDATE | map::FIXED_NOREPLACE,
        map::SHARED | 1 << 27,
    ]);
    let far = 0u64.wrapping_sub(4 * PAGE_SIZE);
    let offsets = raw(&[
        0,
        0,
        1,
        PAGE_SIZE / 2,
        far,
        1 << 63,
        (1 << 63) - PAGE_SIZE,
        u64::MAX,
    ]);
    (place(), length(), protection(), kinds, file(), offsets)
        .prop_map(|(address, len, prot, kind, file, offset)| {
            vec![address, len, prot, kind, file, offset]
        })
        .boxed()
}
