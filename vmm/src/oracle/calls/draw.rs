//! How arguments are drawn.

use abi::layout::{PAGE_SIZE, USER_END};
use abi::oracle::Mode;
use abi::syscall::{advice, prot, rlimit};
use proptest::prelude::*;
use proptest::sample::select;

use crate::oracle::case::Value;

/// A page that cases meet at again and again.
pub(in crate::oracle) fn place() -> BoxedStrategy<Value> {
    let arena = (0u64..32).prop_map(|page| Value::new(Mode::Arena, 0, page * PAGE_SIZE));
    let placed = (0u32..4, 0u64..8).prop_map(|(index, page)| {
        let back = (2 * PAGE_SIZE).wrapping_neg();
        Value::new(Mode::Placed, index, back.wrapping_add(page * PAGE_SIZE))
    });
    let heap = (0u64..20).prop_map(|page| Value::new(Mode::Heap, 0, page * PAGE_SIZE));
    let top =
        (1u64..24).prop_map(|page| Value::new(Mode::Top, 0, (page * PAGE_SIZE).wrapping_neg()));
    prop_oneof![24 => arena, 6 => placed, 2 => heap, 3 => top].boxed()
}

/// Where mmap has a choice: no hint, a good one, or one that makes no sense.
pub(super) fn anywhere() -> BoxedStrategy<Value> {
    // Not between vm.mmap_min_addr of this host and the guest's: docs/oracle.md.
    let odd = raw(&[1, PAGE_SIZE - 1, USER_END, 1 << 63, u64::MAX]);
    let inside = (place(), 1u64..PAGE_SIZE).prop_map(|(place, bytes)| place.plus(bytes));
    prop_oneof![8 => Just(Value::raw(0)), 6 => place(), 1 => inside, 1 => odd].boxed()
}

/// Places that most calls refuse.
pub(super) fn bad_place() -> BoxedStrategy<Value> {
    let inside = (place(), select(&[1, 8, 0x800, PAGE_SIZE - 1][..]))
        .prop_map(|(place, bytes)| place.plus(bytes));
    let far = raw(&[
        USER_END,
        USER_END + PAGE_SIZE,
        1 << 63,
        u64::MAX,
        u64::MAX - PAGE_SIZE + 1,
    ]);
    prop_oneof![3 => place(), 2 => inside, 2 => far].boxed()
}

/// Bytes: few pages mostly, so that splits, merges and holes are common; at times not whole pages.
pub(super) fn length() -> BoxedStrategy<Value> {
    let few = (1u64..=4).prop_map(|pages| Value::raw(pages * PAGE_SIZE));
    let more = (1u64..=20).prop_map(|pages| Value::raw(pages * PAGE_SIZE));
    let bytes = (0u64..4 * PAGE_SIZE).prop_map(Value::raw);
    prop_oneof![10 => few, 5 => more, 2 => bytes, 1 => Just(Value::raw(0))].boxed()
}

/// Lengths that wrap, or become 0 where they are rounded up to pages.
pub(super) fn wraps() -> BoxedStrategy<Value> {
    raw(&[
        u64::MAX,
        u64::MAX - PAGE_SIZE + 2,
        u64::MAX - PAGE_SIZE + 1,
        u64::MAX - 4 * PAGE_SIZE + 1,
    ])
}

/// Lengths that reach beyond the address space from wherever a case has something.
pub(super) fn beyond() -> BoxedStrategy<Value> {
    raw(&[1 << 47, 1 << 48, 1 << 62, (1 << 63) + PAGE_SIZE])
}

/// Those that depend on the processor are left out: docs/oracle.md.
pub(super) fn protection() -> BoxedStrategy<Value> {
    use prot::{EXEC, NONE, READ, WRITE};
    let common = raw(&[READ | WRITE, READ, NONE]);
    let rare = raw(&[READ | EXEC, READ | WRITE | EXEC, WRITE, WRITE | EXEC]);
    prop_oneof![6 => common, 1 => rare].boxed()
}

/// Bits that mprotect refuses, and PROT_SEM, which it ignores.
pub(super) fn any_protection() -> BoxedStrategy<Value> {
    prop_oneof![3 => protection(), 2 => raw(&[8, 9, 0x10, 0x80, 1 << 40, 0x0300_0000])].boxed()
}

pub(super) fn advices() -> BoxedStrategy<Value> {
    use advice::{
        COLD, COLLAPSE, DODUMP, DOFORK, DONTDUMP, DONTFORK, DONTNEED, DONTNEED_LOCKED, FREE,
        HUGEPAGE, KEEPONFORK, MERGEABLE, NOHUGEPAGE, NORMAL, PAGEOUT, POPULATE_READ,
        POPULATE_WRITE, RANDOM, REMOVE, SEQUENTIAL, UNMERGEABLE, WILLNEED, WIPEONFORK,
    };
    prop_oneof![
        4 => raw(&[DONTNEED, DONTNEED_LOCKED]),
        3 => raw(&[NORMAL, RANDOM, SEQUENTIAL]),
        3 => raw(&[DONTFORK, DOFORK, WIPEONFORK, KEEPONFORK]),
        2 => raw(&[DONTDUMP, DODUMP, HUGEPAGE, NOHUGEPAGE]),
        2 => raw(&[POPULATE_READ, POPULATE_WRITE]),
        2 => raw(&[WILLNEED, COLD, COLLAPSE, PAGEOUT]),
        1 => raw(&[FREE]),
        1 => raw(&[REMOVE, MERGEABLE, UNMERGEABLE]),
    ]
    .boxed()
}

pub(super) fn bad_advices() -> BoxedStrategy<Value> {
    prop_oneof![3 => advices(), 1 => raw(&[5, 6, 7, 26, 99, 1 << 32, u64::MAX])].boxed()
}

pub(in crate::oracle) fn raw(values: &[u64]) -> BoxedStrategy<Value> {
    select(values.to_vec()).prop_map(Value::raw).boxed()
}

pub(super) fn two(a: BoxedStrategy<Value>, b: BoxedStrategy<Value>) -> BoxedStrategy<Vec<Value>> {
    (a, b).prop_map(|(a, b)| vec![a, b]).boxed()
}

pub(super) fn three(
    a: BoxedStrategy<Value>,
    b: BoxedStrategy<Value>,
    c: BoxedStrategy<Value>,
) -> BoxedStrategy<Vec<Value>> {
    (a, b, c).prop_map(|(a, b, c)| vec![a, b, c]).boxed()
}

/// A limit, and bytes: of address space and data so many more than the process has.
pub(in crate::oracle) fn resource_and_limit() -> BoxedStrategy<(u64, u64)> {
    let few = || (0u64..64).prop_map(|pages| pages * PAGE_SIZE);
    let bytes = || 0u64..64 * PAGE_SIZE;
    let stack = (0u64..700).prop_map(|pages| pages * PAGE_SIZE);
    prop_oneof![
        2 => few().prop_map(|bytes| (rlimit::AS, bytes)),
        2 => few().prop_map(|bytes| (rlimit::DATA, bytes)),
        2 => few().prop_map(|bytes| (rlimit::MEMLOCK, bytes)),
        1 => bytes().prop_map(|bytes| (rlimit::MEMLOCK, bytes)),
        2 => stack.prop_map(|bytes| (rlimit::STACK, bytes)),
    ]
    .boxed()
}
