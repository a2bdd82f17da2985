//! The MM stack: placeholders, good enough for the tests of `task`, until the real one is merged.
#![allow(missing_docs)]
use crate::{Kernel, arch::Arch};
use abi::boot::Segment;
use abi::objects::*;
use abi::pte::*;
use abi::syscall::Errno;
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultError {
    NoMapping,
    Access,
    NoMemory,
}
const FLAGS: PteFlags = PteFlags::PRESENT
    .union(PteFlags::WRITE)
    .union(PteFlags::USER);
impl<A: Arch> Kernel<A> {
    pub fn alloc_frames(&self, order: u8, _kind: FrameKind) -> Result<u64, Errno> {
        self.root().nr_frames.fetch_add(1, SeqCst);
        Ok(0x10_0000 + self.root().first_frame.fetch_add(0x1000 << order, SeqCst))
    }
    pub fn free_frames(&self, _gpa: u64) {
        self.root().nr_frames.fetch_sub(1, SeqCst);
    }
    pub fn slab_alloc<T>(&self) -> Result<Pa<T>, Errno> {
        let gpa = self.alloc_frames(0, FrameKind::Slab)?;
        self.root().nr_frames.fetch_sub(1, SeqCst);
        self.root().slabs[5].used.fetch_add(1, SeqCst);
        Ok(Pa::new(gpa))
    }
    pub fn slab_free<T>(&self, _pa: Pa<T>) {
        self.root().slabs[5].used.fetch_sub(1, SeqCst);
    }
    pub fn mm_create(&self) -> Result<Pa<Mm>, Errno> {
        let mm: Pa<Mm> = self.slab_alloc()?;
        self.obj(mm)
            .pgd
            .store(self.alloc_frames(0, FrameKind::Table)?, SeqCst);
        self.obj(mm).users.store(1, SeqCst);
        self.obj(mm)
            .id
            .store(self.root().next_mm.fetch_add(1, SeqCst) + 1, SeqCst);
        Ok(mm)
    }
    fn copy_table(&self, from: u64, to: u64, level: u8) {
        for i in 0..512 {
            let pte = self.pte(from, i).load(SeqCst);
            if pte == 0 {
                continue;
            }
            let new = self.alloc_frames(0, FrameKind::Table).unwrap();
            if level == 1 {
                self.arch.copy_frame(Pte(pte).address(), new);
            } else {
                self.copy_table(Pte(pte).address(), new, level - 1);
            }
            self.pte(to, i).store(Pte::new(new, FLAGS).0, SeqCst);
        }
    }
    pub fn mm_fork(&self, parent: Pa<Mm>) -> Result<Pa<Mm>, Errno> {
        let mm = self.mm_create()?;
        let pgd = |mm| self.obj::<Mm>(mm).pgd.load(SeqCst);
        self.copy_table(pgd(parent), pgd(mm), 4);
        Ok(mm)
    }
    pub fn mm_get(&self, mm: Pa<Mm>) {
        self.obj(mm).users.fetch_add(1, SeqCst);
    }
    pub fn mm_put(&self, mm: Pa<Mm>) {
        if self.obj(mm).users.fetch_sub(1, SeqCst) == 1 {
            self.slab_free(mm);
        }
    }
    pub fn map_segment(&self, _: Pa<Mm>, _: &Segment) -> Result<(), Errno> {
        Ok(())
    }
    pub fn map_stack(&self, _: Pa<Mm>, _: u64, _: u64) -> Result<(), Errno> {
        Ok(())
    }
    pub fn mmap(&self, _: Pa<Mm>, addr: u64, _: u64, _: u64, _: u64) -> Result<u64, Errno> {
        Ok(addr)
    }
    pub fn munmap(&self, _: Pa<Mm>, _: u64, _: u64) -> Result<(), Errno> {
        Ok(())
    }
    pub fn mprotect(&self, _: Pa<Mm>, _: u64, _: u64, _: u64) -> Result<(), Errno> {
        Ok(())
    }
    pub fn madvise(&self, _: Pa<Mm>, _: u64, _: u64, _: u64) -> Result<(), Errno> {
        Ok(())
    }
    pub fn brk(&self, _: Pa<Mm>, addr: u64) -> u64 {
        addr
    }
    fn pte(&self, table: u64, i: usize) -> &AtomicU64 {
        // SAFETY: a placeholder's word of a table.
        unsafe { &*self.arch.phys_to_virt(table + 8 * i as u64).cast() }
    }
    pub fn handle_fault(&self, mm: Pa<Mm>, gva: u64, _: u64) -> Result<(), FaultError> {
        if !(0x1000_0000..0x1010_0000).contains(&gva) {
            return Err(FaultError::NoMapping);
        }
        let lock = &self.obj(mm).mmap_lock;
        let _guard = self.write_lock(lock, crate::sync::LockClass::MmapWrite);
        let mut table = self.obj(mm).pgd.load(SeqCst);
        for level in (1..=4).rev() {
            let pte = self.pte(table, index(gva, level));
            if pte.load(SeqCst) == 0 {
                let new = self.alloc_frames(0, FrameKind::Table).unwrap();
                pte.store(Pte::new(new, FLAGS).0, SeqCst);
            }
            table = Pte(pte.load(SeqCst)).address();
        }
        Ok(())
    }
    pub fn switch_mm(&self, next: Pa<Mm>) {
        self.arch.load_root(self.obj(next).pgd.load(SeqCst));
    }
    pub fn enter_lazy(&self) {}
    pub fn leave_mm(&self) {}
    pub fn handle_shootdown(&self) {}
}
