//! What the kernel's locks protect, and when a lock word lets somebody in.

use crate::objects::{RwLockWord, VmaRefs};

macro_rules! classes {
    ($($variant:ident = $id:literal, $name:literal;)+) => {
        /// What a lock protects, and how it is taken.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u64)]
        pub enum LockClass { $(#[doc = $name] $variant = $id,)+ }
        impl LockClass {
            /// Every class.
            pub const ALL: &'static [LockClass] = &[$(Self::$variant,)+];
            /// The name in reports.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }
            /// The class with number `id`.
            #[inline]
            #[must_use]
            pub fn from_u64(id: u64) -> Option<Self> {
                match id { $($id => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

classes! {
    MmapRead = 1, "mmap_lock (read)";
    MmapWrite = 2, "mmap_lock (write)";
    AnonVma = 3, "anon_vma lock";
    PageTable = 4, "page-table lock";
    Buddy = 5, "buddy lock";
    Slab = 6, "slab lock";
    MmList = 7, "mm list lock";
    Sched = 8, "scheduler lock";
    Futex = 9, "futex lock";
    Position = 10, "file position lock";
    Inode = 11, "inode lock";
    Folio = 12, "folio lock";
    IMmap = 13, "i_mmap lock";
    PageCache = 14, "page cache lock";
    Files = 15, "descriptor table lock";
    VmaRead = 16, "VMA lock (read)";
    VmaWrite = 17, "VMA lock (write)";
    Swap = 30, "swap lock";
    Lru = 31, "LRU lock";
    Reclaim = 32, "reclaim in progress";
    Groups = 33, "memory groups lock";
}

impl LockClass {
    /// True where the lock belongs to a task, which may sleep while it holds it; who waits for it may sleep too. Its word is a
    /// [`RwLockWord`]. The others belong to a CPU, and whoever waits for them spins.
    #[must_use]
    pub const fn is_of_task(self) -> bool {
        matches!(
            self,
            Self::MmapRead | Self::MmapWrite | Self::Position | Self::Inode
        )
    }

    /// True where a CPU that wants the lock as this class gets it while its word is `word`: a spin
    /// lock's word is the holder's CPU plus one, a reader-writer lock's is a [`RwLockWord`], a VMA's is [`VmaRefs`].
    #[must_use]
    pub const fn lets_in(self, word: u64) -> bool {
        match self {
            Self::MmapRead => word & (RwLockWord::WRITER | RwLockWord::WAITING) == 0,
            Self::MmapWrite | Self::Position | Self::Inode => {
                word & (RwLockWord::WRITER | RwLockWord::READERS) == 0
            }
            Self::VmaRead => word & VmaRefs::EXCLUDED == 0,
            Self::VmaWrite => VmaRefs::readers(word) == 0,
            _ => word == 0,
        }
    }
}
