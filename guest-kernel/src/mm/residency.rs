//! mincore (Linux 6.18's mm/mincore.c).

use abi::layout::PAGE_SIZE;
use abi::lock::LockClass;
use abi::objects::{Mm, Pa};
use abi::pte::Pte;
use abi::syscall::Errno;

use super::{Field, Slot, pages};
use crate::Kernel;
use crate::arch::Arch;

impl<A: Arch> Kernel<A> {
    /// Tells of the pages from `start` on which are in memory: 1 or 0 for each, as far as `vector` and the VMA there
    /// reach (Linux's `do_mincore`). Returns how many it tells of.
    ///
    /// # Errors
    /// ENOMEM where nothing is mapped at `start`.
    pub(crate) fn mincore(
        &self,
        mm: Pa<Mm>,
        start: u64,
        vector: &mut [u8],
    ) -> Result<usize, Errno> {
        let space = self.obj(mm);
        let _guard = self.read_lock(&space.mmap_lock, LockClass::MmapRead);
        let vma = self.vma_at(space, start).ok_or(Errno::ENOMEM)?;
        let area = self.obj(vma);
        let left = pages(area.end.get() - start);
        let told = vector
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        for (page, byte) in vector[..told].iter_mut().enumerate() {
            let gva = start + page as u64 * PAGE_SIZE;
            let entry = match self.leaf_table(space, gva) {
                Ok(table) => self.read_pte(Slot::new(table, 1, gva)),
                Err(_) => self
                    .leaf_told(space, gva)
                    .map_or(Pte::NONE, |(_, entry)| entry),
            };
            if !entry.is_none() {
                *byte = self.in_memory(entry).into();
                continue;
            }
            // What is not mapped may be in the page cache all the same.
            let resident = area.file.get().some().is_some_and(|file| {
                let index = area.pgoff.get() + pages(gva - area.start.get());
                self.cache_has(file, index)
            });
            *byte = resident.into();
        }
        Ok(told)
    }
}
