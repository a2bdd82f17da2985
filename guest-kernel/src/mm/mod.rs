//! The MM stack.
#![allow(missing_docs, unused)]
use crate::{Kernel, arch::Arch};
use abi::boot::Segment;
use abi::objects::*;
use abi::syscall::Errno;
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultError {
    NoMapping,
    Access,
    NoMemory,
}
impl<A: Arch> Kernel<A> {
    pub fn alloc_frames(&self, order: u8, kind: FrameKind) -> Result<u64, Errno> {
        panic!()
    }
    pub fn free_frames(&self, gpa: u64) {
        panic!()
    }
    pub fn slab_alloc<T>(&self) -> Result<Pa<T>, Errno> {
        panic!()
    }
    pub fn slab_free<T>(&self, pa: Pa<T>) {
        panic!()
    }
    pub fn mm_create(&self) -> Result<Pa<Mm>, Errno> {
        panic!()
    }
    pub fn mm_fork(&self, parent: Pa<Mm>) -> Result<Pa<Mm>, Errno> {
        panic!()
    }
    pub fn mm_get(&self, mm: Pa<Mm>) {
        panic!()
    }
    pub fn mm_put(&self, mm: Pa<Mm>) {
        panic!()
    }
    pub fn map_segment(&self, mm: Pa<Mm>, s: &Segment) -> Result<(), Errno> {
        panic!()
    }
    pub fn map_stack(&self, mm: Pa<Mm>, top: u64, bytes: u64) -> Result<(), Errno> {
        panic!()
    }
    pub fn mmap(
        &self,
        mm: Pa<Mm>,
        addr: u64,
        len: u64,
        prot: u64,
        flags: u64,
    ) -> Result<u64, Errno> {
        panic!()
    }
    pub fn munmap(&self, mm: Pa<Mm>, addr: u64, len: u64) -> Result<(), Errno> {
        panic!()
    }
    pub fn mprotect(&self, mm: Pa<Mm>, addr: u64, len: u64, prot: u64) -> Result<(), Errno> {
        panic!()
    }
    pub fn madvise(&self, mm: Pa<Mm>, addr: u64, len: u64, advice: u64) -> Result<(), Errno> {
        panic!()
    }
    pub fn brk(&self, mm: Pa<Mm>, addr: u64) -> u64 {
        panic!()
    }
    pub fn handle_fault(&self, mm: Pa<Mm>, gva: u64, error: u64) -> Result<(), FaultError> {
        panic!()
    }
    pub fn switch_mm(&self, next: Pa<Mm>) {
        panic!()
    }
    pub fn enter_lazy(&self) {
        panic!()
    }
    pub fn leave_mm(&self) {
        panic!()
    }
    pub fn handle_shootdown(&self) {
        panic!()
    }
}
