//! What is mapped where, as /proc/self/maps says it, for programs that compare this kernel with Linux.

use abi::objects::{Mm, Pa, vma_flags};
use abi::oracle::Area;

use super::Field;
use super::vma::ACCESS;
use crate::Kernel;
use crate::arch::Arch;
use abi::lock::LockClass;

impl<A: Arch> Kernel<A> {
    /// Fills `areas` with the first VMAs that lie in `start..end`, wholly or in part, and returns how many
    /// there were.
    pub(crate) fn areas(&self, mm: Pa<Mm>, start: u64, end: u64, areas: &mut [Area]) -> usize {
        let space = self.obj(mm);
        let _guard = self.read_lock(&space.mmap_lock, LockClass::MmapRead);
        let mut at = start;
        for (found, area) in areas.iter_mut().enumerate() {
            let Some(vma) = self.vma_in(space, at, end) else {
                return found;
            };
            let vma = self.obj(vma);
            at = vma.end.get();
            *area = Area {
                start: vma.start.get(),
                end: at,
                flags: vma.flags.get() & (ACCESS | vma_flags::SHARED),
            };
        }
        areas.len()
    }
}
