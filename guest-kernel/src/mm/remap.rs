//! mremap (Linux 6.18's mm/mremap.c): which VMAs there are afterwards. How pages get from one place to the other is
//! [`relocate`](super::relocate)'s.
//!
//! Where a move fails nothing has changed but that MREMAP_FIXED has unmapped what was at the new place, as in Linux: all
//! that can fail comes before the first entry moves.

use abi::layout::{PAGE_SHIFT, USER_END};
use abi::objects::{Mm, Pa, Vma, vma_flags};
use abi::syscall::{Errno, map, mremap};

use super::gather::Unmap;
use super::map::unmap_end;
use super::merge::{Join, Origin};
use super::populate::Populate;
use super::relocate::{Relocation, Unflushed};
use super::vma::{Area, MAX_MAP_COUNT};
use super::{Field, is_page_aligned, page_align, pages};
use crate::Kernel;
use crate::arch::Arch;

/// A call, or the part of one that is about one VMA (Linux's `vma_remap_struct`).
#[derive(Clone, Copy)]
struct Request {
    mm: Pa<Mm>,
    old: u64,
    old_len: u64,
    new_len: u64,
    flags: u64,
    /// Where to, with FIXED; a hint with DONTUNMAP.
    new: u64,
}

impl Request {
    fn has(&self, flag: u64) -> bool {
        self.flags & flag != 0
    }

    /// The pages get a new address whatever their number.
    fn always_moves(&self) -> bool {
        self.has(mremap::FIXED | mremap::DONTUNMAP)
    }

    /// A pure move, which several VMAs may make together (Linux's `vrm_move_only`).
    fn only_moves(&self) -> bool {
        self.has(mremap::FIXED) && self.old_len == self.new_len
    }

    /// Linux's `check_mremap_params`.
    fn check(&self) -> Result<(), Errno> {
        let known = mremap::MAYMOVE | mremap::FIXED | mremap::DONTUNMAP;
        let overlaps = self.old.wrapping_add(self.old_len) > self.new
            && self.new.wrapping_add(self.new_len) > self.old;
        let is_valid = self.flags & !known == 0
            && is_page_aligned(self.old)
            && self.new_len != 0
            && self.new_len <= USER_END
            && (!self.always_moves()
                || self.new <= USER_END - self.new_len
                    && is_page_aligned(self.new)
                    && self.has(mremap::MAYMOVE)
                    && (!self.has(mremap::DONTUNMAP) || self.old_len == self.new_len)
                    && !overlaps);
        if is_valid { Ok(()) } else { Err(Errno::EINVAL) }
    }
}

impl<A: Arch> Kernel<A> {
    /// mremap. Returns where the pages are then. When it returns, no CPU uses what was at the old place any more.
    ///
    /// # Errors
    /// EINVAL for bad arguments, and for an old size of 0 of a private mapping, which it would double; EFAULT for a range that
    /// is not mapped, or not by one VMA where it must be; ENOMEM where it cannot grow in place and must not move, beyond
    /// RLIMIT_AS or RLIMIT_DATA, for too many VMAs, and where memory runs out; EAGAIN beyond RLIMIT_MEMLOCK; EPERM for a
    /// place below the least address.
    pub fn mremap(
        &self,
        mm: Pa<Mm>,
        old: u64,
        (old_len, new_len): (u64, u64),
        flags: u64,
        new: u64,
    ) -> Result<u64, Errno> {
        let request = Request {
            mm,
            old,
            old_len: page_align(old_len),
            new_len: page_align(new_len),
            flags,
            new,
        };
        request.check()?;
        let space = self.obj(mm);
        let mut unflushed = Unflushed::default();
        let (result, is_locked) = {
            let _guard = self.mmap_write_lock(space);
            // Room for the splits of both ends of both ranges, before anything is unmapped.
            if request.always_moves() && space.map_count.get() + 2 >= MAX_MAP_COUNT - 3 {
                return Err(Errno::ENOMEM);
            }
            if request.only_moves() {
                (self.move_vmas(request, &mut unflushed), false)
            } else {
                self.remap_vma(request, &mut unflushed)
            }
        };
        unflushed.flush(self, mm);
        if let Ok(new) = result
            && is_locked
            && request.new_len > request.old_len
        {
            // It has succeeded, whatever becomes of this.
            let grown = (new + request.old_len, new + request.new_len);
            let _ = self.populate(mm, grown, Populate::BestEffort);
        }
        result
    }

    /// Moves all VMAs of a range, with the holes between them (Linux's `remap_move`).
    fn move_vmas(&self, request: Request, unflushed: &mut Unflushed) -> Result<u64, Errno> {
        let space = self.obj(request.mm);
        let end = request.old.wrapping_add(request.old_len);
        let mut at = request.old;
        while at < end
            && let Some(vma) = self.vma_in(space, at, end)
        {
            let area = self.obj(vma);
            if at == request.old && area.start.get() > at {
                return Err(Errno::EFAULT);
            }
            at = at.max(area.start.get());
            let bytes = area.end.get().min(end) - at;
            let part = Request {
                old: at,
                old_len: bytes,
                new_len: bytes,
                new: request.new + (at - request.old),
                ..request
            };
            self.check_vma(part, vma)?;
            self.remap_to(part, unflushed)?;
            at += bytes;
        }
        if at == request.old {
            return Err(Errno::EFAULT);
        }
        Ok(request.new)
    }

    /// Any other call; says whether the memory is locked too.
    fn remap_vma(&self, request: Request, unflushed: &mut Unflushed) -> (Result<u64, Errno>, bool) {
        let space = self.obj(request.mm);
        let Some(vma) = self.vma_at(space, request.old) else {
            return (Err(Errno::EFAULT), false);
        };
        let is_locked = self.obj(vma).flags.get() & vma_flags::LOCKED != 0;
        let result = self.check_vma(request, vma).and_then(|()| {
            if request.always_moves() {
                self.remap_to(request, unflushed)
            } else if request.new_len < request.old_len {
                self.shrink(request).map(|()| request.old)
            } else if request.new_len > request.old_len {
                self.grow(request, vma, unflushed)
            } else {
                Ok(request.old)
            }
        });
        (result, is_locked)
    }

    /// Linux's `check_prep_vma`.
    fn check_vma(&self, request: Request, vma: Pa<Vma>) -> Result<(), Errno> {
        let Request {
            old,
            old_len,
            new_len,
            ..
        } = request;
        if new_len <= old_len && !request.always_moves() {
            return Ok(());
        }
        let (space, area) = (self.obj(request.mm), self.obj(vma));
        let flags = area.flags.get();
        if old_len == 0 && flags & vma_flags::SHARED == 0 {
            return Err(Errno::EINVAL);
        }
        // What a shrinking cuts off may lie in other VMAs.
        if old_len.min(new_len) > area.end.get() - old {
            return Err(Errno::EFAULT);
        }
        if new_len <= old_len {
            return Ok(());
        }
        self.may_lock(space, flags, new_len - old_len)?;
        self.may_expand(space, flags, pages(new_len - old_len))
    }

    /// Linux's `mremap_to`.
    fn remap_to(&self, request: Request, unflushed: &mut Unflushed) -> Result<u64, Errno> {
        let space = self.obj(request.mm);
        if request.has(mremap::FIXED) {
            let end = unmap_end(request.new, request.new_len)?;
            self.unmap_range(request.mm, request.new, end)?;
        }
        if request.new_len < request.old_len {
            self.shrink(request)?;
        }
        let vma = self.vma_at(space, request.old).ok_or(Errno::EFAULT)?;
        let request = Request {
            old_len: request.old_len.min(request.new_len),
            ..request
        };
        if request.has(mremap::DONTUNMAP) {
            self.may_expand(space, self.obj(vma).flags.get(), pages(request.old_len))?;
        }
        self.move_vma(request, vma, unflushed)
    }

    /// Unmaps what is beyond the new size (Linux's `shrink_vma`).
    fn shrink(&self, request: Request) -> Result<(), Errno> {
        let start = request.old + request.new_len;
        let end = unmap_end(start, request.old_len - request.new_len)?;
        self.unmap_range(request.mm, start, end)
    }

    /// Linux's `expand_vma`.
    fn grow(
        &self,
        request: Request,
        vma: Pa<Vma>,
        unflushed: &mut Unflushed,
    ) -> Result<u64, Errno> {
        let (space, area) = (self.obj(request.mm), self.obj(vma));
        let start = area.end.get();
        let more = request.new_len - request.old_len;
        let is_last = start - request.old == request.old_len;
        let fits = more <= USER_END - start && self.vma_in(space, start, start + more).is_none();
        if is_last && fits {
            let length = pages(start - area.start.get());
            let grown = Area {
                start,
                end: start + more,
                flags: area.flags.get(),
                pgoff: area.pgoff.get() + length,
                file: area.file.get(),
            };
            // It can join the VMA that it extends, if nothing else.
            self.merge_new(request.mm, grown, Join::Both, Origin::Of(vma))?;
            return Ok(request.old);
        }
        if !request.has(mremap::MAYMOVE) {
            return Err(Errno::ENOMEM);
        }
        self.move_vma(request, vma, unflushed)
    }

    /// Maps the pages of `vma` that are asked for elsewhere (Linux's `move_vma`).
    fn move_vma(
        &self,
        request: Request,
        vma: Pa<Vma>,
        unflushed: &mut Unflushed,
    ) -> Result<u64, Errno> {
        let Request {
            mm, old, old_len, ..
        } = request;
        let space = self.obj(mm);
        let (hint, flags) = match request.flags & (mremap::FIXED | mremap::DONTUNMAP) {
            0 => (0, 0),
            flags if flags & mremap::FIXED != 0 => (request.new, map::FIXED),
            _ => (request.new, 0),
        };
        let is_private = self.obj(vma).file.get().is_null();
        let new = self.place(space, (hint, request.new_len), flags, is_private)?;
        if space.map_count.get() >= MAX_MAP_COUNT - 3 {
            return Err(Errno::ENOMEM);
        }
        // Nothing of a size of 0: a second mapping of what is shared.
        let keeps = request.has(mremap::DONTUNMAP) || old_len == 0;
        let vma = if keeps {
            vma
        } else {
            // Before anything moves: afterwards the old place must not fail to go.
            self.split_edges(mm, old, old + old_len)?;
            self.vma_at(space, old).ok_or(Errno::EFAULT)?
        };
        // What is found there now is what will move.
        self.vma_start_write(vma);
        let relocation = Relocation {
            mm,
            old,
            new,
            bytes: old_len,
        };
        let prepared = relocation.prepare(self);
        let copy = prepared.and_then(|()| self.copy_for_move(request, vma, new));
        let copy = copy.inspect_err(|_| {
            self.free_empty_tables(mm, new, new + request.new_len);
            self.vma_rejoin(mm, vma);
        })?;
        // It may have been merged with the new one.
        let source = self.vma_at(space, old).ok_or(Errno::EFAULT)?;
        relocation.run(self, source, unflushed);
        if request.has(mremap::DONTUNMAP) {
            self.keep_emptied(request, source, copy);
        } else if !keeps {
            self.unmap_vmas(mm, old, old + old_len, Unmap::Syscall);
        }
        Ok(new)
    }

    /// The VMA at the new place (Linux's `copy_vma`). Pages keep the offset that their folios' index is; where there never
    /// was one, the offset is that of the new address, so that it may merge there.
    fn copy_for_move(&self, request: Request, vma: Pa<Vma>, new: u64) -> Result<Pa<Vma>, Errno> {
        let area = self.obj(vma);
        let pgoff = if area.anon_vma.get().is_null() && area.file.get().is_null() {
            new >> PAGE_SHIFT
        } else {
            area.pgoff.get() + pages(request.old - area.start.get())
        };
        let area = Area {
            start: new,
            end: new + request.new_len,
            flags: area.flags.get() & !vma_flags::HEAP,
            pgoff,
            file: area.file.get(),
        };
        let origin = if request.has(mremap::DONTUNMAP) || request.old_len == 0 {
            Origin::Of(vma)
        } else {
            Origin::InsteadOf(vma)
        };
        match self.merge_new(request.mm, area, Join::Both, origin)? {
            Some(merged) => Ok(merged),
            None => self.vma_copy(request.mm, vma, area),
        }
    }

    /// What becomes of the old place with MREMAP_DONTUNMAP (Linux's `dontunmap_complete`): it is no longer locked, and
    /// where all of it has moved no folio is left that a walk could look for there.
    fn keep_emptied(&self, request: Request, source: Pa<Vma>, copy: Pa<Vma>) {
        let (space, area) = (self.obj(request.mm), self.obj(source));
        let flags = area.flags.get();
        self.set_vma_flags(space, source, flags & !vma_flags::LOCKED_MASK);
        if flags & vma_flags::LOCKED != 0 {
            // What has moved is locked at its new place as well.
            let before = &space.locked_before;
            before.set(before.get() + pages(area.end.get() - area.start.get()));
        }
        let is_whole =
            area.start.get() == request.old && area.end.get() == request.old + request.old_len;
        if copy != source && is_whole {
            let chains = self.unlink_chains(source, Pa::NULL);
            self.release_chains(chains);
        }
    }

    /// Gives tables back that were made for `start..end`, where nothing is mapped after all.
    fn free_empty_tables(&self, mm: Pa<Mm>, start: u64, end: u64) {
        let mut gather = self.gather(mm, Unmap::Syscall);
        let hole = self.hole_around(self.obj(mm), start, end);
        self.unlink_tables(&mut gather, (start, end), hole);
        self.gather_finish(gather);
    }
}
