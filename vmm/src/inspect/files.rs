//! Files in memory as plain values: their pages, who maps them, who has them open.

use std::sync::atomic::Ordering::Relaxed;

use abi::layout::PAGE_SHIFT;
use abi::objects::{File, FileTable, OpenFile, Vma};
use serde::Serialize;

use super::serde_hex;

/// A file.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs)] // the fields of abi's File
pub struct FileView {
    #[serde(with = "serde_hex")]
    pub gpa: u64,
    pub size: u64,
    pub inode_lock: u64,
    pub lock: u64,
    pub i_mmap_lock: u64,
    pub height: u64,
    pub nr_pages: u64,
    pub refcount: u32,
    pub generation: u32,
    pub sector: u64,
    pub on_disk: bool,
    pub write_failed: bool,
    /// The VMAs in its tree, in order.
    pub i_mmap: Vec<MappingView>,
    /// Number and frame of each page in its tree, in the order of the tree.
    pub pages: Vec<(u64, u64)>,
    /// Nodes of its tree whose count of slots in use is wrong.
    pub miscounted_nodes: Vec<u64>,
    /// Nodes of its tree.
    pub nodes: usize,
}

/// A VMA in a file's tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MappingView {
    /// The VMA.
    #[serde(with = "serde_hex")]
    pub vma: u64,
    /// The file that it says it maps.
    #[serde(with = "serde_hex")]
    pub file: u64,
    /// The first page of the file that it maps, and the one past the last.
    pub pages: (u64, u64),
    /// The VMA that led to it, 0 for the root, and the one that it says it is below.
    pub above: (u64, u64),
    /// What it leads to, 0 for none.
    pub below: [u64; 2],
    /// Where everything below it ends, as it says.
    pub subtree_end: u64,
}

impl MappingView {
    pub(super) fn new(gpa: u64, vma: &Vma, above: u64) -> Self {
        let bytes = vma.end.load(Relaxed).wrapping_sub(vma.start.load(Relaxed));
        let first = vma.pgoff.load(Relaxed);
        Self {
            vma: gpa,
            file: vma.file.get().0,
            pages: (first, first.wrapping_add(bytes >> PAGE_SHIFT)),
            above: (above, vma.parent_of_file.get().0),
            below: [&vma.left_of_file, &vma.right_of_file].map(|link| link.get().0),
            subtree_end: vma.subtree_end.load(Relaxed),
        }
    }
}

impl FileView {
    pub(super) fn new(gpa: u64, file: &File) -> Self {
        Self {
            gpa,
            size: file.size.load(Relaxed),
            inode_lock: file.inode_lock.load(Relaxed),
            lock: file.lock.load(Relaxed),
            i_mmap_lock: file.i_mmap_lock.load(Relaxed),
            height: file.height.load(Relaxed),
            nr_pages: file.nr_pages.load(Relaxed),
            refcount: file.refcount.load(Relaxed),
            generation: file.generation.load(Relaxed),
            sector: file.sector.load(Relaxed),
            on_disk: file.on_disk.load(Relaxed) != 0,
            write_failed: file.write_failed.load(Relaxed) != 0,
            i_mmap: Vec::new(),
            pages: Vec::new(),
            miscounted_nodes: Vec::new(),
            nodes: 0,
        }
    }
}

/// What descriptors refer to.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs)] // the fields of abi's OpenFile
pub struct OpenFileView {
    #[serde(with = "serde_hex")]
    pub gpa: u64,
    pub position: u64,
    pub lock: u64,
    #[serde(with = "serde_hex")]
    pub file: u64,
    pub refcount: u32,
    pub generation: u32,
}

impl OpenFileView {
    pub(super) fn new(gpa: u64, open: &OpenFile) -> Self {
        Self {
            gpa,
            position: open.position.load(Relaxed),
            lock: open.lock.load(Relaxed),
            file: open.file.get().0,
            refcount: open.refcount.load(Relaxed),
            generation: open.generation.load(Relaxed),
        }
    }
}

/// The descriptors of a process.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs)] // the fields of abi's FileTable
pub struct FileTableView {
    #[serde(with = "serde_hex")]
    pub gpa: u64,
    /// Open files by descriptor, 0 for none.
    pub open: Vec<u64>,
    pub console: u64,
    pub lock: u64,
    pub users: u32,
    pub generation: u32,
}

impl FileTableView {
    pub(super) fn new(gpa: u64, table: &FileTable) -> Self {
        Self {
            gpa,
            open: table.open.iter().map(|open| open.get().0).collect(),
            console: table.console.load(Relaxed),
            lock: table.lock.load(Relaxed),
            users: table.users.load(Relaxed),
            generation: table.generation.load(Relaxed),
        }
    }
}
