//! Addresses in JSON are strings like `"0x1f000"`: readable, and exact where a JSON reader keeps
//! numbers as doubles.

use abi::point::Point;
use abi::pte::Pte;
use serde::Serializer;

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
pub(super) fn serialize<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{value:#x}"))
}

#[allow(clippy::trivially_copy_pass_by_ref)]
pub(super) fn pte<S: Serializer>(value: &Pte, serializer: S) -> Result<S::Ok, S::Error> {
    serialize(&value.0, serializer)
}

#[allow(clippy::trivially_copy_pass_by_ref)]
pub(super) fn point<S: Serializer>(value: &Point, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(value.name())
}
