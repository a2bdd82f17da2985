//! A compiled trace of memory calls, the data blob that the `replay` program executes. The text form
//! and its compiler live on the host (`vmm::scenario::trace`); the guest sees only these records.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Value of [`Header::magic`].
pub const MAGIC: u64 = u64::from_le_bytes(*b"STLTRACE");

/// Start of the blob, followed by [`Header::ops`] records [`Op`].
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: u64,
    /// Records that follow.
    pub ops: u64,
    /// Distinct tasks; the first is 0.
    pub tasks: u64,
    /// Distinct mapping slots.
    pub slots: u64,
}

/// What an [`Op`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum OpKind {
    /// mmap of `len` bytes with `prot` and `flags`; the result becomes the base of `slot`.
    Map = 1,
    /// mmap with `MAP_FIXED` at `offset` in the area of `slot`.
    MapFixed = 2,
    /// munmap of `offset..offset+len` of `slot`.
    Unmap = 3,
    /// mprotect of that range to `prot`.
    Protect = 4,
    /// madvise of that range with `flags` as the advice.
    Advise = 5,
    /// brk to the start of the heap plus `offset`.
    Brk = 6,
    /// Starts task `len` as a thread of this process.
    Thread = 7,
    /// Starts task `len` as a forked process.
    Fork = 8,
    /// The task ends.
    Exit = 9,
}

impl OpKind {
    /// The kind with number `value`.
    #[must_use]
    pub fn from_u32(value: u32) -> Option<Self> {
        Some(match value {
            1 => Self::Map,
            2 => Self::MapFixed,
            3 => Self::Unmap,
            4 => Self::Protect,
            5 => Self::Advise,
            6 => Self::Brk,
            7 => Self::Thread,
            8 => Self::Fork,
            9 => Self::Exit,
            _ => return None,
        })
    }
}

/// One recorded call. Addresses are (slot, offset), so that the replay may land elsewhere than the
/// recording did; slot 0 is the heap (`brk`).
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct Op {
    /// [`OpKind`].
    pub kind: u32,
    /// Task that made the call.
    pub task: u32,
    /// Mapping slot.
    pub slot: u32,
    /// `PROT_*`.
    pub prot: u32,
    /// Byte offset in the slot.
    pub offset: u64,
    /// Bytes, or the task that is started.
    pub len: u64,
    /// `MAP_*` flags or the advice.
    pub flags: u64,
    /// Line of the text trace, for messages.
    pub line: u64,
}
