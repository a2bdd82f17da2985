//! Words of kernel objects in guest memory, for monitors: what cannot be read is 0.

use std::mem::offset_of;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use abi::layout::PAGE_SIZE;
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

/// Memory of which many words are read: it is asked for all of them once.
#[derive(Clone, Copy)]
pub(super) struct Words<'m> {
    memory: &'m dyn PhysMem,
    all: &'m [AtomicU64],
}

impl<'m> Words<'m> {
    pub(super) fn of(memory: &'m dyn PhysMem) -> Self {
        let all = memory.words();
        Self { memory, all }
    }

    /// As [`Word::field`].
    #[inline]
    pub(super) fn field(&self, gpa: u64, offset: usize) -> u64 {
        let at = gpa.wrapping_add(offset as u64) / 8;
        match self.all.get(at as usize) {
            Some(word) => word.load(Relaxed),
            None => self.memory.field(gpa, offset),
        }
    }

    /// As [`Word::half`].
    #[inline]
    pub(super) fn half(&self, gpa: u64, offset: usize) -> u32 {
        let word = self.field(gpa, offset);
        let upper = gpa.wrapping_add(offset as u64) & 4 != 0;
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
