//! madvise (Linux's mm/madvise.c, the advice that private anonymous memory knows).

use abi::objects::{Mm, Pa, vma_flags};
use abi::syscall::{Errno, advice};

use super::gather::Unmap;
use super::{Field, is_page_aligned, page_align};
use crate::Kernel;
use crate::arch::Arch;
use abi::lock::LockClass;

/// What is done to each VMA of the range.
#[derive(Clone, Copy)]
enum Advice {
    /// Changes its flags: set these of [`READ_AHEAD`], clear the others.
    Flags(u64),
    /// Drops its pages.
    DontNeed,
    /// Nothing: anonymous memory without swap has nothing to read ahead.
    Nothing,
}

const READ_AHEAD: u64 = vma_flags::SEQ_READ | vma_flags::RAND_READ;

impl<A: Arch> Kernel<A> {
    /// madvise.
    ///
    /// # Errors
    /// EINVAL for unknown advice or a bad range; ENOMEM for a hole in the range, after the advice was
    /// applied to all that is mapped, and where memory runs out.
    pub fn madvise(&self, mm: Pa<Mm>, start: u64, len: u64, advice: u64) -> Result<(), Errno> {
        let advice = match advice {
            advice::NORMAL => Advice::Flags(0),
            advice::RANDOM => Advice::Flags(vma_flags::RAND_READ),
            advice::SEQUENTIAL => Advice::Flags(vma_flags::SEQ_READ),
            advice::WILLNEED => Advice::Nothing,
            advice::DONTNEED => Advice::DontNeed,
            _ => return Err(Errno::EINVAL),
        };
        let bytes = page_align(len);
        if !is_page_aligned(start) || bytes == 0 && len != 0 || start.checked_add(bytes).is_none() {
            return Err(Errno::EINVAL);
        }
        if bytes == 0 {
            return Ok(());
        }
        let lock = &self.obj(mm).mmap_lock;
        let _guard = match advice {
            Advice::Flags(_) => self.write_lock(lock, LockClass::MmapWrite),
            Advice::DontNeed | Advice::Nothing => self.read_lock(lock, LockClass::MmapRead),
        };
        self.advise_range(mm, start, start + bytes, advice)
    }

    fn advise_range(&self, mm: Pa<Mm>, start: u64, end: u64, advice: Advice) -> Result<(), Errno> {
        let mut at = start;
        let mut result = Ok(());
        while at < end {
            let Some(vma) = self.vma_in(self.obj(mm), at, end) else {
                return Err(Errno::ENOMEM);
            };
            let area = self.obj(vma);
            if area.start.get() > at {
                result = Err(Errno::ENOMEM);
                at = area.start.get();
            }
            let to = area.end.get().min(end);
            match advice {
                Advice::Flags(wanted) => {
                    let new = area.flags.get() & !READ_AHEAD | wanted;
                    if new != area.flags.get() {
                        self.vma_modify(mm, vma, (at, to), new)?;
                    }
                }
                Advice::DontNeed => {
                    let mut gather = self.gather(mm, Unmap::Syscall);
                    self.zap_range(&mut gather, at, to);
                    self.gather_finish(gather);
                }
                Advice::Nothing => {}
            }
            at = to;
        }
        result
    }
}
