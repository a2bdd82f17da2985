//! The calls on a process: what it locks and may have, how its threads meet.

use abi::oracle::Returns;
use abi::syscall::{futex, map, membarrier, mlock, nr, rlimit};
use proptest::prelude::*;

use super::draw::*;
use super::memory::{MMAP, mmap};
use super::{Call, Show};
use crate::oracle::case::Value;

const NUMBERS: &[Show] = &[Show::Number, Show::Number];

pub(super) const CALLS: &[Call] = &[
    Call {
        name: "mlockall",
        nr: nr::MLOCKALL,
        weight: 2,
        returns: Returns::Number,
        shows: &[Show::Number],
        draw: || {
            // Never what is mapped already: docs/oracle.md.
            let future = mlock::ALL_FUTURE;
            raw(&[
                future,
                future,
                future | mlock::ALL_ONFAULT,
                mlock::ALL_CURRENT,
                0,
                mlock::ALL_ONFAULT,
                8,
                1 << 32,
            ])
            .prop_map(|flags| vec![flags])
            .boxed()
        },
    },
    Call {
        name: "munlockall",
        nr: nr::MUNLOCKALL,
        weight: 1,
        returns: Returns::Number,
        shows: &[],
        draw: || Just(vec![]).boxed(),
    },
    Call {
        name: "mmap",
        nr: nr::MMAP,
        weight: 2,
        returns: Returns::Place,
        shows: MMAP,
        draw: || {
            let flags = raw(&[map::PRIVATE, map::PRIVATE | map::FIXED, map::SHARED])
                .prop_map(|kind| kind.plus(map::ANONYMOUS | map::LOCKED));
            mmap(place(), length(), flags.boxed())
        },
    },
    Call {
        name: "prlimit64",
        nr: nr::PRLIMIT64,
        weight: 1,
        returns: Returns::Number,
        shows: &[Show::Number, Show::Number, Show::Place, Show::Place],
        draw: || {
            // The limits of the others are told from what the process has: docs/oracle.md.
            let resource = raw(&[rlimit::STACK, rlimit::MEMLOCK, 99]);
            let where_to = || prop_oneof![2 => place(), 1 => Just(Value::raw(0))];
            (resource, where_to(), where_to())
                .prop_map(|(resource, new, old)| vec![Value::raw(0), resource, new, old])
                .boxed()
        },
    },
    Call {
        name: "membarrier",
        nr: nr::MEMBARRIER,
        weight: 2,
        returns: Returns::Number,
        shows: NUMBERS,
        draw: || {
            use membarrier::{
                GET_REGISTRATIONS, PRIVATE_EXPEDITED, PRIVATE_EXPEDITED_SYNC_CORE,
                REGISTER_PRIVATE_EXPEDITED, REGISTER_PRIVATE_EXPEDITED_SYNC_CORE,
            };
            let known = raw(&[
                PRIVATE_EXPEDITED,
                REGISTER_PRIVATE_EXPEDITED,
                PRIVATE_EXPEDITED_SYNC_CORE,
                REGISTER_PRIVATE_EXPEDITED_SYNC_CORE,
                GET_REGISTRATIONS,
            ]);
            let commands = prop_oneof![8 => known, 1 => raw(&[1 << 20, 3, u64::MAX])];
            two(commands.boxed(), raw(&[0, 0, 0, 1, 1 << 32]))
        },
    },
    Call {
        name: "futex",
        nr: nr::FUTEX,
        weight: 2,
        returns: Returns::Number,
        shows: &[Show::Place, Show::Number, Show::Number, Show::Place],
        draw: || {
            // A value that is never there, so that nobody sleeps.
            const NEVER: u64 = 0xdead_beef;
            let operations = raw(&[futex::WAIT, futex::WAKE]);
            let word = prop_oneof![6 => Just(0u64), 1 => Just(4), 1 => Just(2)];
            let flags = prop_oneof![2 => Just(futex::PRIVATE_FLAG), 1 => Just(0)];
            (bad_place(), word, operations, flags)
                .prop_map(|(place, word, operation, flag)| {
                    let operation = operation.plus(flag);
                    vec![
                        place.plus(word),
                        operation,
                        Value::raw(NEVER),
                        Value::raw(0),
                    ]
                })
                .boxed()
        },
    },
];
