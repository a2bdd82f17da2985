//! What the host reads of a guest that stands still: page tables ([`walk`]), the kernel's own objects
//! ([`objects`], [`snapshot`]), and how both are shown to a person ([`render`]).
//!
//! All of it works on [`PhysMem`](crate::memory::PhysMem) and a list of [`VcpuFacts`], so it needs no
//! machine. The guest is not believed: every address is checked, every traversal ends, and what does
//! not fit becomes an anomaly that the checkers report. Nothing here changes guest memory.

pub mod image;
pub mod objects;
pub mod render;
pub mod snapshot;
pub mod walk;

mod address_space;
mod files;
mod groups;
mod leaves;
mod read_files;
mod serde_hex;
mod swap;
mod visit;

use abi::point::Point;
use serde::Serialize;

pub use files::{FileTableView, FileView, MappingView, OpenFileView};
pub use groups::{GroupView, GroupsView};
pub use image::MemoryImage;
pub use objects::{AnonVmaView, ChainView, CpuView, FolioView, MmView, TaskView, VmaView};
pub use render::pte_flags;
pub use snapshot::{Anomaly, InspectError, Snapshot};
pub use swap::{ListView, SlotView, SwapView};
pub use walk::{Walk, translate};

/// Where a vCPU stands while it is looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stop {
    /// Between any two instructions.
    #[default]
    Anywhere,
    /// At a scheduling point.
    Point(#[serde(serialize_with = "serde_hex::point")] Point),
    /// In `hlt`, until the next interrupt.
    Halted,
    /// It has ended the run (a write to [`abi::port::EXIT`]) and will execute nothing more.
    Exited,
}

/// What the machine says about one vCPU that is paused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VcpuFacts {
    /// Its number, from 0.
    pub index: usize,
    /// Current privilege level: 3 in a user program.
    pub cpl: u8,
    /// Instruction pointer.
    #[serde(with = "serde_hex")]
    pub rip: u64,
    /// Stack pointer.
    #[serde(with = "serde_hex")]
    pub rsp: u64,
    /// Flags.
    #[serde(with = "serde_hex")]
    pub rflags: u64,
    /// Address of the last page fault.
    #[serde(with = "serde_hex")]
    pub cr2: u64,
    /// Paging root.
    #[serde(with = "serde_hex")]
    pub cr3: u64,
    /// Where it stands.
    pub stop: Stop,
}
