//! How arguments are shown.

use abi::oracle::Mode;
use abi::syscall::{advice, map, prot};

use crate::oracle::case::Value;

/// How an argument is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    /// An address or a length.
    Place,
    /// `PROT_*`.
    Prot,
    /// `MAP_*`.
    Map,
    /// `MADV_*`.
    Advice,
    /// A number with a sign.
    Number,
}

impl Show {
    /// `value` as a program writes it.
    #[must_use]
    pub fn text(self, value: Value) -> String {
        let bits = |names: &[(&str, u64)], none: &str| named(value.offset, names, none);
        match self {
            _ if value.mode != Mode::Raw => value.to_string(),
            Self::Place => value.to_string(),
            Self::Number => value.offset.cast_signed().to_string(),
            Self::Prot => bits(PROT, "NONE"),
            Self::Map => bits(MAP, "0"),
            Self::Advice => ADVICE
                .iter()
                .find(|(_, advice)| *advice == value.offset)
                .map_or_else(|| value.to_string(), |(name, _)| (*name).into()),
        }
    }
}

const PROT: &[(&str, u64)] = &[
    ("READ", prot::READ),
    ("WRITE", prot::WRITE),
    ("EXEC", prot::EXEC),
];
const MAP: &[(&str, u64)] = &[
    ("SHARED_VALIDATE", map::SHARED_VALIDATE),
    ("PRIVATE", map::PRIVATE),
    ("SHARED", map::SHARED),
    ("ANONYMOUS", map::ANONYMOUS),
    ("FIXED", map::FIXED),
    ("FIXED_NOREPLACE", map::FIXED_NOREPLACE),
    ("GROWSDOWN", map::GROWSDOWN),
    ("NORESERVE", map::NORESERVE),
    ("POPULATE", map::POPULATE),
    ("NONBLOCK", map::NONBLOCK),
    ("STACK", map::STACK),
    ("LOCKED", map::LOCKED),
    ("DENYWRITE", map::DENYWRITE),
    ("EXECUTABLE", map::EXECUTABLE),
];
const ADVICE: &[(&str, u64)] = &[
    ("NORMAL", advice::NORMAL),
    ("RANDOM", advice::RANDOM),
    ("SEQUENTIAL", advice::SEQUENTIAL),
    ("WILLNEED", advice::WILLNEED),
    ("DONTNEED", advice::DONTNEED),
    ("FREE", advice::FREE),
    ("REMOVE", advice::REMOVE),
    ("DONTFORK", advice::DONTFORK),
    ("DOFORK", advice::DOFORK),
    ("MERGEABLE", advice::MERGEABLE),
    ("UNMERGEABLE", advice::UNMERGEABLE),
    ("HUGEPAGE", advice::HUGEPAGE),
    ("NOHUGEPAGE", advice::NOHUGEPAGE),
    ("DONTDUMP", advice::DONTDUMP),
    ("DODUMP", advice::DODUMP),
    ("WIPEONFORK", advice::WIPEONFORK),
    ("KEEPONFORK", advice::KEEPONFORK),
    ("COLD", advice::COLD),
    ("PAGEOUT", advice::PAGEOUT),
    ("POPULATE_READ", advice::POPULATE_READ),
    ("POPULATE_WRITE", advice::POPULATE_WRITE),
    ("DONTNEED_LOCKED", advice::DONTNEED_LOCKED),
    ("COLLAPSE", advice::COLLAPSE),
];

/// The names of the bits of `value`, and the rest as a number.
fn named(value: u64, names: &[(&str, u64)], none: &str) -> String {
    let mut rest = value;
    let mut words = Vec::new();
    for (name, bit) in names {
        if rest & bit == *bit {
            words.push((*name).to_owned());
            rest &= !bit;
        }
    }
    if rest != 0 {
        words.push(format!("{rest:#x}"));
    }
    if words.is_empty() {
        none.into()
    } else {
        words.join("|")
    }
}
