//! The life of an mm: creation, references, teardown.
//!
//! Two counts, as in Linux: `users` are the tasks that use it as user memory; the last one to go tears
//! the mappings down (exit_mmap). `count` are references of any kind, one for all users together and
//! one for every CPU that has it loaded (`lazy`); the last one frees the level-4 table and the
//! object. So a CPU never has a freed table in CR3.

use core::sync::atomic::Ordering::{AcqRel, Relaxed, Release};

use abi::boot::Segment;
use abi::channel::EventKind;
use abi::layout::{PAGE_SHIFT, PAGE_SIZE, USER_BRK_START, USER_END, USER_MIN};
use abi::objects::{FrameKind, Mm, Pa, Vma, folio_state, vma_flags};
use abi::point::Point;
use abi::pte::{Pte, PteFlags};
use abi::syscall::Errno;

use super::gather::Unmap;
use super::vma::{Area, leaf_flags, prot_flags};
use super::{Field, Slot, is_page_aligned};
use crate::Kernel;
use crate::arch::Arch;
use crate::testbed::told;
use abi::lock::LockClass;
#[cfg(feature = "testbed")]
use {crate::sync::rcu::RcuReader, core::sync::atomic::Ordering::Acquire};

impl<A: Arch> Kernel<A> {
    /// An empty address space with one user and one reference.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn mm_create(&self) -> Result<Pa<Mm>, Errno> {
        let mm = self.slab_alloc::<Mm>()?;
        let pgd = match self.table_alloc(mm, 4) {
            Ok(pgd) => pgd,
            Err(error) => {
                self.slab_free(mm);
                return Err(error);
            }
        };
        self.share_kernel_half(pgd);
        let (root, space) = (self.root(), self.obj(mm));
        space.pgd.set(pgd);
        space.users.set(1);
        space.count.set(1);
        space.tlb_gen.set(1);
        space.tables.set(1);
        space.brk_start.set(USER_BRK_START);
        space.brk.set(USER_BRK_START);
        self.default_limits(space);
        let id = root.next_mm.fetch_add(1, Relaxed);
        {
            let _guard = self.lock(&root.mms_lock, LockClass::MmList);
            space.id.set(id);
            space.next.set(root.mms.get());
            // Release: pairs with the Acquire in `mm_by_id`.
            root.mms.store(mm, Release);
        }
        event!(self, EventKind::MmCreate, [id, pgd, mm.0, 0, 0]);
        Ok(mm)
    }

    /// Adds a user: a thread that shares the address space.
    pub fn mm_get(&self, mm: Pa<Mm>) {
        let space = self.obj(mm);
        let before = space.users.fetch_add(1, Relaxed);
        assert!(before > 0, "mm {mm:?} used after its end");
        let users = u64::from(before) + 1;
        event!(self, EventKind::MmUsers, [space.id.get(), users, 0, 0, 0]);
    }

    /// Removes a user; the last one unmaps everything.
    pub fn mm_put(&self, mm: Pa<Mm>) {
        let space = self.obj(mm);
        // Read first: whoever is not the last user must not touch it after this.
        let id = told(|| space.id.get());
        // AcqRel: the last user sees what all others did.
        let before = space.users.fetch_sub(1, AcqRel);
        assert!(before > 0, "mm {mm:?} put once too often");
        event!(
            self,
            EventKind::MmUsers,
            [id, u64::from(before) - 1, 0, 0, 0]
        );
        if before == 1 {
            point!(self, Point::MmExit, [space.id.get(), 0]);
            self.exit_mmap(mm);
            self.at_last_put(mm);
        }
    }

    /// Takes a reference that keeps the object and its level-4 table, not its mappings.
    pub fn mm_grab(&self, mm: Pa<Mm>) {
        point!(self, Point::RefcountChange, [mm.0, 1]);
        let space = self.obj(mm);
        let before = space.count.fetch_add(1, Relaxed);
        assert!(before > 0, "mm {mm:?} grabbed after it was freed");
        let count = u64::from(before) + 1;
        event!(self, EventKind::MmCount, [space.id.get(), count, 0, 0, 0]);
    }

    /// Gives such a reference up; the last one frees the mm.
    pub fn mm_drop(&self, mm: Pa<Mm>) {
        let space = self.obj(mm);
        point!(self, Point::RefcountChange, [mm.0, 0]);
        let id = told(|| space.id.get());
        let before = space.count.fetch_sub(1, AcqRel);
        assert!(before > 0, "mm {mm:?} dropped once too often");
        event!(
            self,
            EventKind::MmCount,
            [id, u64::from(before) - 1, 0, 0, 0]
        );
        if before > 1 {
            return;
        }
        assert!(space.users.get() == 0 && space.vmas.get().is_null());
        event!(self, EventKind::MmDestroy, [space.id.get(), 0, 0, 0, 0]);
        self.unlist_mm(mm);
        self.at_last_drop(mm);
    }

    /// Frees an mm that nobody can find any more, with its level-4 table.
    pub(crate) fn mm_free(&self, mm: Pa<Mm>) {
        let space = self.obj(mm);
        self.table_free(space.pgd.get());
        event!(self, EventKind::MmFree, [space.id.get(), 0, 0, 0, 0]);
        self.slab_free(mm);
    }

    /// The mm with number `id`, which stays what it is to the end of the section: it may be torn down, but is
    /// neither freed nor reused.
    #[cfg(feature = "testbed")]
    pub(crate) fn mm_by_id(&self, _section: &RcuReader<'_, A>, id: u64) -> Option<Pa<Mm>> {
        let mut link = &self.root().mms;
        loop {
            let mm = link.load(Acquire).some()?;
            if self.obj(mm).id.get() == id {
                return Some(mm);
            }
            link = &self.obj(mm).next;
        }
    }

    fn unlist_mm(&self, mm: Pa<Mm>) {
        let root = self.root();
        let _guard = self.lock(&root.mms_lock, LockClass::MmList);
        let mut link = &root.mms;
        while link.get() != mm {
            assert!(!link.get().is_null(), "mm {mm:?} is on no list");
            link = &self.obj(link.get()).next;
        }
        // Release: a reader comes to the next one by this link now. The mm's own link stays for readers on it.
        link.store(self.obj(mm).next.get(), Release);
    }

    /// Unmaps everything, and frees all tables but the level-4 one.
    fn exit_mmap(&self, mm: Pa<Mm>) {
        let _guard = self.mmap_write_lock(self.obj(mm));
        self.unmap_vmas(mm, 0, USER_END, Unmap::Exit);
    }

    /// Maps one piece of the first process: a VMA over frames that the host has filled, which become
    /// anonymous folios.
    ///
    /// # Errors
    /// EINVAL for a segment outside user space or guest memory, not page aligned or empty; EEXIST
    /// where something is mapped; ENOMEM.
    pub fn map_segment(&self, mm: Pa<Mm>, segment: &Segment) -> Result<(), Errno> {
        let &Segment {
            gva,
            gpa,
            bytes,
            prot,
        } = segment;
        let memory = self.root().nr_frames.get() << PAGE_SHIFT;
        let fits = |start: u64, limit: u64| start.checked_add(bytes).is_some_and(|e| e <= limit);
        if bytes == 0
            || !is_page_aligned(gva | gpa | bytes)
            || gva < USER_MIN
            || !fits(gva, USER_END)
            || gpa == 0
            || !fits(gpa, memory)
        {
            return Err(Errno::EINVAL);
        }
        let _guard = self.mmap_write_lock(self.obj(mm));
        let vma = self.map_fixed_area(mm, gva, bytes, prot_flags(prot))?;
        self.anon_vma_prepare(mm, vma)?;
        for offset in (0..bytes).step_by(PAGE_SIZE as usize) {
            self.adopt(mm, vma, gva + offset, gpa + offset)?;
        }
        self.wire_range(mm, gva, gva + bytes)
    }

    /// Maps the initial stack: `bytes` below `top`, growing down on demand.
    ///
    /// # Errors
    /// EEXIST where something is mapped; ENOMEM.
    pub fn map_stack(&self, mm: Pa<Mm>, top: u64, bytes: u64) -> Result<(), Errno> {
        let _guard = self.mmap_write_lock(self.obj(mm));
        let flags = vma_flags::READ | vma_flags::WRITE | vma_flags::GROWSDOWN;
        self.map_fixed_area(mm, top - bytes, bytes, flags)?;
        self.wire_range(mm, top - bytes, top)
    }

    fn map_fixed_area(
        &self,
        mm: Pa<Mm>,
        start: u64,
        bytes: u64,
        flags: u64,
    ) -> Result<Pa<Vma>, Errno> {
        if self.vma_in(self.obj(mm), start, start + bytes).is_some() {
            return Err(Errno::EEXIST);
        }
        let account = if flags & vma_flags::WRITE != 0 {
            vma_flags::ACCOUNT
        } else {
            0
        };
        let area = Area::anonymous(start, start + bytes, flags | account);
        self.vma_create(mm, area, None)
    }

    /// Makes the reserved frame at `gpa` an anonymous folio, mapped at `gva`.
    fn adopt(&self, mm: Pa<Mm>, vma: Pa<Vma>, gva: u64, gpa: u64) -> Result<(), Errno> {
        let table = self.leaf_table_alloc(mm, gva)?;
        let (area, folio) = (self.obj(vma), self.folio(gpa));
        let _guard = self.lock_table(table);
        folio.kind.set(FrameKind::Anon as u8);
        folio.refcount.set(1);
        // Its entries need not say so.
        folio.state.set(folio_state::DIRTY);
        folio.generation.set(folio.generation.get() + 1);
        event!(
            self,
            EventKind::FrameAlloc,
            [gpa, 0, FrameKind::Anon as u64, 0, 0],
        );
        let mut flags = leaf_flags(area.flags.get());
        if area.flags.get() & vma_flags::WRITE != 0 {
            flags |= PteFlags::WRITE | PteFlags::DIRTY;
        }
        self.folio_map_new(gpa, area.anon_vma.get(), gva >> PAGE_SHIFT);
        let slot = Slot::new(table, 1, gva);
        self.set_pte(self.obj(mm), gva, slot, Pte::NONE, Pte::new(gpa, flags));
        Ok(())
    }
}
