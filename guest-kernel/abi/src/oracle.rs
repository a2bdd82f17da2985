//! Cases that Linux and the guest kernel execute alike: short programs of system calls and accesses, and
//! what Linux showed after each step. They are the data blob of the user program `oracle`; the host makes
//! them (`vmm::oracle`).
//!
//! The blob: a [`Header`], then each case: a [`Case`], its [`Op`]s, a [`Span`] for each of them, and the words
//! that the spans cut into *observations*. What an observation is, only the interpreter knows
//! (`guest::programs::oracle`), which runs on both sides: here words are compared, not understood.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::layout::PAGE_SIZE;

/// Value of [`Header::magic`].
pub const MAGIC: u64 = u64::from_le_bytes(*b"STLORACL");

/// Address that [`Mode::Arena`] counts from: nothing of either executor lies within a TiB of it. Above the heap on both
/// sides, because a fault looks at the next VMA above it, whatever lies between.
pub const ARENA: u64 = 0x6000_0000_0000;
/// Above it, no hole of the address space is left that a search from the top would find first. Above all
/// that a Linux process has but its stack and its libraries, so that the top-down search comes down to here.
pub const TOP: u64 = FENCE - FENCE_GUARD;
/// A page that nobody uses, mapped with MAP_GROWSDOWN: what is mapped below it can neither touch it nor merge with it,
/// because of the guard that the search leaves below it (Linux's stack_guard_gap).
pub const FENCE: u64 = 0x7000_0000_0000;
/// Bytes of that guard.
pub const FENCE_GUARD: u64 = 256 * PAGE_SIZE;
/// Where addresses of the heap seem to lie in an observation: it starts elsewhere on both sides.
pub const HEAP: u64 = 0x1000_0000_0000;
/// Bytes of the heap that are looked at.
pub const HEAP_BYTES: u64 = 1 << 30;
/// Most words of an observation.
pub const MAX_WORDS: usize = 768;
/// Pages that are looked at in one piece: as many as a word has bits.
pub const LOOKED_AT: u64 = u64::BITS as u64;
/// Results that a case can keep by number.
pub const MAX_SLOTS: usize = 4096;

/// Start of the blob.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: u64,
    /// Cases that follow.
    pub cases: u64,
}

/// Start of a case.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct Case {
    /// [`Op`]s, and [`Span`]s, that follow.
    pub ops: u32,
    /// Words behind them.
    pub words: u32,
    /// A [`Residency`].
    pub residency: u32,
    /// Always 0.
    pub reserved: u32,
}

/// One step.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
pub struct Op {
    /// An [`OpKind`].
    pub kind: u32,
    /// System call ([`OpKind::Call`]).
    pub nr: u32,
    /// Steps behind it that are the child's ([`OpKind::Fork`]).
    pub body: u32,
    /// What the call returns: a [`Returns`].
    pub returns: u32,
    /// Which slot keeps that ([`Returns::Slot`], [`Returns::FileSlot`]); less than [`MAX_SLOTS`].
    pub slot: u32,
    /// Always 0.
    pub reserved: u32,
    /// Arguments.
    pub args: [Arg; 6],
}

/// An argument: a value, relative to something that only the executor knows.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
pub struct Arg {
    /// A [`Mode`].
    pub mode: u32,
    /// Which earlier result, the latest being 0.
    pub index: u32,
    /// What is added.
    pub value: u64,
}

/// Observation of one step: `len` words from word `start` of the case.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
pub struct Span {
    /// First word.
    pub start: u32,
    /// Words.
    pub len: u32,
}

/// What the kernel says of one VMA ([`crate::syscall::nr::TESTBED_MAPS`]).
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
pub struct Area {
    /// First address.
    pub start: u64,
    /// First address past it.
    pub end: u64,
    /// READ, WRITE, EXEC and SHARED of [`crate::objects::vma_flags`].
    pub flags: u64,
}

impl Area {
    /// `areas` as they lie in memory.
    #[must_use]
    pub fn bytes(areas: &[Self]) -> &[u8] {
        areas.as_bytes()
    }
}

/// What of a VMA is looked at after every step: its first pages and, where it has more, its last ones. Each piece is told by its
/// first address and its pages.
pub fn looked_at(start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
    let pages = end.saturating_sub(start) / PAGE_SIZE;
    let first = pages.min(LOOKED_AT);
    let last = (pages - first).min(LOOKED_AT);
    let pieces = [(start, first), (end - last * PAGE_SIZE, last)];
    pieces.into_iter().filter(|(_, pages)| *pages > 0)
}

macro_rules! numbered {
    ($(#[$outer:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $value:literal,)+ }) => {
        $(#[$outer])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum $name { $($(#[$doc])* $variant = $value,)+ }

        impl $name {
            /// The one with this number.
            #[must_use]
            pub const fn from_u32(value: u32) -> Option<Self> {
                match value { $($value => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

numbered! {
    /// What an [`Op`] does.
    OpKind {
        /// The system call `nr`.
        Call = 1,
        /// Loads the word at the first argument.
        Load = 2,
        /// Stores the second argument there.
        Store = 3,
        /// Loads the first word of each of as many pages as the second argument says, from the first on.
        Check = 4,
        /// Forks; the child executes the `body` steps that follow and exits, and the parent waits for it.
        Fork = 5,
        /// Loads the first word of the first pages of everything that is mapped readable, and reads those of the files that
        /// are open.
        Contents = 6,
        /// Reads the word of the file (first argument) at the offset (second), by pread64.
        FileLoad = 7,
        /// Writes the third argument there, by pwrite64.
        FileStore = 8,
        /// Sets the soft limit of a resource (first argument) to so many bytes (second); of address space and data, so many more
        /// than the process had when it began.
        Limit = 9,
    }
}

numbered! {
    /// How the pages that are in memory (mincore) are compared.
    Residency {
        /// They are the same.
        Same = 0,
        /// They are not, as it is each kernel's own business: the guest says what Linux has said.
        Open = 1,
    }
}

numbered! {
    /// What a result means.
    Returns {
        /// A number.
        Number = 0,
        /// An address; it may be used later ([`Mode::Placed`]).
        Place = 1,
        /// An address, never used later.
        Address = 2,
        /// A file descriptor, whose number is nobody's business; it may be used later ([`Mode::File`]).
        File = 3,
        /// An address; it is kept in a slot ([`Mode::Slot`]).
        Slot = 4,
        /// A file descriptor, likewise.
        FileSlot = 5,
    }
}

numbered! {
    /// What an [`Arg`] is relative to.
    Mode {
        /// To 0.
        Raw = 0,
        /// To [`ARENA`].
        Arena = 1,
        /// To an address that a call has returned; to [`ARENA`] where there is none.
        Placed = 2,
        /// To where the heap began.
        Heap = 3,
        /// To [`TOP`].
        Top = 4,
        /// To a file descriptor that a call has returned; to -1 where there is none.
        File = 5,
        /// To what the slot with this index keeps; to [`ARENA`] where it keeps nothing.
        Slot = 6,
        /// To the address of a short string.
        Name = 7,
    }
}
