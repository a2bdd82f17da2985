//! The disk: a block device that moves sectors between its own contents and guest memory.
//!
//! A request is a [`DiskRequest`] in guest memory. Its GPA, in a 4-byte `out` to [`crate::port::DISK`], gives it to the
//! queue of the CPU that does so; the device reads it then and never again. When the transfer is over the device
//! stores [`DiskRequest::status`] and interrupts that CPU with [`VECTOR`]. Each CPU's queue is worked off in order, those
//! of different CPUs in any.

use core::sync::atomic::{AtomicU32, AtomicU64};
use zerocopy::{FromBytes, IntoBytes, KnownLayout};

/// Bytes of a sector.
pub const SECTOR_BYTES: u64 = 512;
/// Interrupt vector of completions.
pub const VECTOR: u8 = 0xf2;
/// Most requests that wait in the queue of one CPU.
pub const QUEUE: usize = 64;

/// Which way the data go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DiskOp {
    /// From the disk to memory.
    Read = 0,
    /// From memory to the disk.
    Write = 1,
}

impl DiskOp {
    /// The operation with number `value`.
    #[must_use]
    pub const fn from_u32(value: u32) -> Option<Self> {
        match value {
            0 => Some(Self::Read),
            1 => Some(Self::Write),
            _ => None,
        }
    }
}

/// What became of a request ([`DiskRequest::status`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DiskStatus {
    /// The device has it, or is about to get it. Written by the driver.
    Pending = 0,
    /// All data were moved.
    Done = 1,
    /// The medium failed; what of the data was moved is not known.
    Error = 2,
    /// It asks for what is not there: an operation, sectors, memory. Nothing was moved.
    Invalid = 3,
    /// The queue is full. Nothing was moved.
    Busy = 4,
}

impl DiskStatus {
    /// The status with number `value`.
    #[must_use]
    pub const fn from_u32(value: u32) -> Option<Self> {
        Some(match value {
            0 => Self::Pending,
            1 => Self::Done,
            2 => Self::Error,
            3 => Self::Invalid,
            4 => Self::Busy,
            _ => return None,
        })
    }
}

/// One request, at a multiple of 8.
#[repr(C)]
#[derive(Debug, Default, FromBytes, IntoBytes, KnownLayout)]
pub struct DiskRequest {
    /// A [`DiskOp`].
    pub op: AtomicU32,
    /// A [`DiskStatus`].
    pub status: AtomicU32,
    /// First sector.
    pub sector: AtomicU64,
    /// First byte of the data, a multiple of [`SECTOR_BYTES`].
    pub gpa: AtomicU64,
    /// Bytes of the data, a multiple of [`SECTOR_BYTES`], at most a frame and inside one.
    pub bytes: AtomicU64,
}
