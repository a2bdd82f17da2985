//! Words of kernel objects in guest memory, for monitors: what cannot be read is 0.

use std::mem::offset_of;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use abi::layout::{ENTRIES_PER_TABLE, PAGE_SIZE};
use abi::objects::{KernelRoot, Mm};

use crate::memory::PhysMem;

/// Most mms that are looked for: a list that the guest has tied into a loop ends all the same.
const MAX_MMS: usize = 1024;

pub(super) trait Word {
    /// The 8 bytes at `offset` of the object at `gpa`.
    fn field(&self, gpa: u64, offset: usize) -> u64;
    /// The 4 bytes there.
    fn half(&self, gpa: u64, offset: usize) -> u32;
}

impl Word for dyn PhysMem + '_ {
    fn field(&self, gpa: u64, offset: usize) -> u64 {
        let at = gpa.wrapping_add(offset as u64);
        match self.table(at & !(PAGE_SIZE - 1)) {
            Ok(words) => words[(at % PAGE_SIZE / 8) as usize].load(Relaxed),
            Err(_) => 0,
        }
    }
    fn half(&self, gpa: u64, offset: usize) -> u32 {
        let word = self.field(gpa, offset);
        let upper = gpa.wrapping_add(offset as u64) & 4 != 0;
        (if upper { word >> 32 } else { word }) as u32
    }
}

/// An object of which several words are read: the page in which it begins is looked up once.
#[derive(Clone, Copy)]
pub(super) struct Object<'m> {
    memory: &'m dyn PhysMem,
    words: Option<&'m [AtomicU64; ENTRIES_PER_TABLE]>,
    gpa: u64,
}

impl<'m> Object<'m> {
    pub(super) fn at(memory: &'m dyn PhysMem, gpa: u64) -> Self {
        let words = memory.table(gpa & !(PAGE_SIZE - 1)).ok();
        Self { memory, words, gpa }
    }

    /// As [`Word::field`].
    pub(super) fn field(&self, offset: usize) -> u64 {
        let at = (self.gpa % PAGE_SIZE) as usize + offset;
        match self.words.and_then(|words| words.get(at / 8)) {
            Some(word) => word.load(Relaxed),
            None => self.memory.field(self.gpa, offset),
        }
    }

    /// As [`Word::half`].
    pub(super) fn half(&self, offset: usize) -> u32 {
        let upper = self.gpa.wrapping_add(offset as u64) & 4 != 0;
        let word = self.field(offset);
        (if upper { word >> 32 } else { word }) as u32
    }
}

/// The kernel's list of mms.
pub(super) fn mms(memory: &dyn PhysMem, kernel_root: u64) -> impl Iterator<Item = u64> {
    let first = memory.field(kernel_root, offset_of!(KernelRoot, mms));
    let next = |mm: &u64| Some(memory.field(*mm, offset_of!(Mm, next)));
    std::iter::successors(Some(first), next)
        .take_while(|mm| *mm != 0)
        .take(MAX_MMS)
}
