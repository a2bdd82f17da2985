//! VMAs: making, linking, splitting and freeing them. Under the mmap_lock held for writing.

use core::sync::atomic::Ordering::Acquire;

use abi::channel::EventKind;
use abi::layout::PAGE_SHIFT;
use abi::objects::{File, Mm, Pa, Vma, vma_flags};
use abi::point::Point;
use abi::pte::{PteFlags, fault};
use abi::syscall::{Errno, prot};

use super::rmap::Reuse;
use super::vma_tree::Reserve;
use super::{Field, pages};
use crate::Kernel;
use crate::arch::Arch;
use crate::sync::Guard;
use crate::testbed::told;

/// Most VMAs of one mm (Linux's vm.max_map_count).
pub(super) const MAX_MAP_COUNT: u64 = 65530;

/// The bits of `vma_flags` that say what an access may do.
pub(super) const ACCESS: u64 = vma_flags::READ | vma_flags::WRITE | vma_flags::EXEC;

/// A stretch of address space and what it is to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Area {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) flags: u64,
    pub(super) pgoff: u64,
    /// What it maps from page `pgoff` on; none for private anonymous memory.
    pub(super) file: Pa<File>,
}

impl Area {
    /// An anonymous area: its page offset is its address, so that neighbours may merge.
    pub(super) const fn anonymous(start: u64, end: u64, flags: u64) -> Self {
        Self {
            start,
            end,
            flags,
            pgoff: start >> PAGE_SHIFT,
            file: Pa::NULL,
        }
    }
}

/// A VMA and tree nodes set aside, for a mapping that must not fail any more.
pub(super) struct Spare {
    vma: Pa<Vma>,
    nodes: Reserve,
}

/// The locks of all walks back that may find a VMA: dropped in the reverse order.
#[must_use = "the locks are released at once"]
pub(super) struct RmapLocks<'k, A: Arch> {
    _family: Option<Guard<'k, A>>,
    _i_mmap: Option<Guard<'k, A>>,
}

/// The `vma_flags` of `PROT_*` bits, which have the same values.
pub(super) const fn prot_flags(prot: u64) -> u64 {
    prot & (prot::READ | prot::WRITE | prot::EXEC)
}

/// The flags of a leaf entry of a VMA with `flags`, but for W and D. An entry that nobody may use
/// (PROT_NONE) stays present, for the supervisor only: its folio stays mapped.
pub(super) fn leaf_flags(flags: u64) -> PteFlags {
    let mut leaf = PteFlags::PRESENT | PteFlags::ACCESSED;
    if flags & ACCESS != 0 {
        leaf |= PteFlags::USER;
    }
    if flags & vma_flags::EXEC == 0 {
        leaf |= PteFlags::NO_EXECUTE;
    }
    leaf
}

/// What an entry of a shared mapping with `flags` has besides: a write needs neither a copy nor a fault, unless somebody
/// waits for the page to be dirty (Linux's vma_wants_writenotify, false for shmem).
pub(super) fn shared_rights(flags: u64) -> PteFlags {
    if flags & (vma_flags::WRITE | vma_flags::NOTIFY) != vma_flags::WRITE {
        PteFlags::empty()
    } else {
        PteFlags::WRITE | PteFlags::DIRTY
    }
}

/// True where a VMA with `flags` permits the access of page-fault `error` (Linux's access_error:
/// whoever may write or execute may read).
pub(super) const fn permits(flags: u64, error: u64) -> bool {
    let needed = if error & fault::WRITE != 0 {
        vma_flags::WRITE
    } else if error & fault::FETCH != 0 {
        vma_flags::EXEC
    } else {
        ACCESS
    };
    flags & needed != 0
}

impl<A: Arch> Kernel<A> {
    /// Makes room for one more VMA whatever the tree looks like then.
    pub(super) fn spare(&self, mm: &Mm) -> Result<Spare, Errno> {
        let vma = self.slab_alloc::<Vma>()?;
        match self.reserve_any(mm) {
            Ok(nodes) => Ok(Spare { vma, nodes }),
            Err(error) => {
                self.slab_free(vma);
                Err(error)
            }
        }
    }

    /// As [`Kernel::spare`], for one insertion at `start` next.
    fn spare_at(&self, mm: &Mm, start: u64) -> Result<Spare, Errno> {
        let vma = self.slab_alloc::<Vma>()?;
        match self.reserve_insert(mm, start) {
            Ok(nodes) => Ok(Spare { vma, nodes }),
            Err(error) => {
                self.slab_free(vma);
                Err(error)
            }
        }
    }

    pub(super) fn free_spare(&self, spare: Spare) {
        self.slab_free(spare.vma);
        self.unreserve(spare.nodes);
    }

    /// Maps `area`, which overlaps nothing, as a VMA of its own.
    ///
    /// # Errors
    /// ENOMEM without a `spare`.
    pub(super) fn vma_create(
        &self,
        mm: Pa<Mm>,
        area: Area,
        spare: Option<Spare>,
    ) -> Result<Pa<Vma>, Errno> {
        let spare = match spare {
            Some(spare) => spare,
            None => self.spare_at(self.obj(mm), area.start)?,
        };
        self.vma_fill(mm, spare.vma, area);
        let vma = self.vma_attach(mm, spare);
        if let Some(file) = area.file.some() {
            self.file_link(vma, file, None);
        }
        Ok(vma)
    }

    /// Maps `area` in a forked child, as its copy of `parent`.
    ///
    /// # Errors
    /// ENOMEM.
    pub(super) fn vma_inherit(
        &self,
        child: Pa<Mm>,
        area: Area,
        parent: Pa<Vma>,
    ) -> Result<Pa<Vma>, Errno> {
        let spare = self.spare_at(self.obj(child), area.start)?;
        self.vma_fill(child, spare.vma, area);
        let vma = self.vma_attach(child, spare);
        if let Some(file) = area.file.some() {
            self.file_link(vma, file, Some(parent));
        }
        Ok(vma)
    }

    fn vma_attach(&self, mm: Pa<Mm>, mut spare: Spare) -> Pa<Vma> {
        let (space, vma) = (self.obj(mm), spare.vma);
        self.vma_mark_attached(space, vma);
        self.tree_insert(space, vma, &mut spare.nodes);
        self.unreserve(spare.nodes);
        space.map_count.set(space.map_count.get() + 1);
        let area = self.obj(vma);
        let bytes = area.end.get() - area.start.get();
        self.account(space, area.flags.get(), bytes.cast_signed());
        event!(
            self,
            EventKind::VmaAttach,
            [
                space.id.get(),
                vma.0,
                area.start.get(),
                area.end.get(),
                area.flags.get(),
            ],
        );
        point!(self, Point::VmaAttach, [space.id.get(), area.start.get()]);
        vma
    }

    /// Takes `vma` out of its mm. Its entries and chains are the caller's business.
    pub(super) fn vma_detach(&self, mm: &Mm, vma: Pa<Vma>) {
        let area = self.obj(vma);
        self.vma_start_write(vma);
        self.tree_erase(mm, vma);
        mm.map_count.set(mm.map_count.get() - 1);
        let bytes = area.end.get() - area.start.get();
        self.account(mm, area.flags.get(), -bytes.cast_signed());
        self.vma_mark_detached(vma);
        let (start, end) = told(|| (area.start.get(), area.end.get()));
        event!(
            self,
            EventKind::VmaDetach,
            [mm.id.get(), vma.0, start, end, 0]
        );
        point!(self, Point::VmaDetach, [mm.id.get(), start]);
    }

    /// Refuses to make one VMA too many.
    pub(super) fn check_map_count(&self, mm: Pa<Mm>) -> Result<(), Errno> {
        if self.obj(mm).map_count.get() >= MAX_MAP_COUNT {
            Err(Errno::ENOMEM)
        } else {
            Ok(())
        }
    }

    /// Splits `vma` at `at`, inside it. Returns the upper part, a new VMA.
    ///
    /// # Errors
    /// ENOMEM; nothing changed.
    pub(super) fn vma_split(&self, mm: Pa<Mm>, vma: Pa<Vma>, at: u64) -> Result<Pa<Vma>, Errno> {
        let (space, lower) = (self.obj(mm), self.obj(vma));
        self.vma_start_write(vma);
        let upper = Area {
            start: at,
            end: lower.end.get(),
            flags: lower.flags.get(),
            pgoff: lower.pgoff.get() + pages(at - lower.start.get()),
            file: lower.file.get(),
        };
        let spare = self.vma_dup(mm, vma, upper)?;
        self.split_huge_at(mm, at);
        self.account(space, upper.flags, -(upper.end - at).cast_signed());
        {
            // A walk that still finds the whole VMA and the upper part sees one entry twice, never none.
            let _family = self.lock_vma_family(vma);
            self.vma_resize(vma, lower.start.get(), at);
        }
        self.tree_update(space, vma, lower.start.get());
        Ok(self.vma_attach(mm, spare))
    }

    /// Maps `area`, which overlaps nothing, as a VMA of its own for pages of `from` (the second half of Linux's copy_vma).
    ///
    /// # Errors
    /// ENOMEM; nothing changed.
    pub(super) fn vma_copy(&self, mm: Pa<Mm>, from: Pa<Vma>, area: Area) -> Result<Pa<Vma>, Errno> {
        let spare = self.vma_dup(mm, from, area)?;
        Ok(self.vma_attach(mm, spare))
    }

    /// A VMA for `area` that is on all lists that `from` is on, and all that it takes to link it in.
    fn vma_dup(&self, mm: Pa<Mm>, from: Pa<Vma>, area: Area) -> Result<Spare, Errno> {
        let spare = self.spare_at(self.obj(mm), area.start)?;
        self.vma_fill(mm, spare.vma, area);
        if let Err(error) = self.anon_vma_copy(spare.vma, from) {
            self.free_spare(spare);
            return Err(error);
        }
        if let Some(file) = area.file.some() {
            self.file_link(spare.vma, file, None);
        }
        Ok(spare)
    }

    /// All but the file, in whose tree it is not yet.
    fn vma_fill(&self, mm: Pa<Mm>, vma: Pa<Vma>, area: Area) {
        let vma = self.obj(vma);
        vma.start.set(area.start);
        vma.end.set(area.end);
        vma.flags.set(area.flags);
        vma.pgoff.set(area.pgoff);
        vma.mm.set(mm);
    }

    /// Gives `to` the anon_vma of `from`, and all its chains.
    ///
    /// # Errors
    /// ENOMEM; `to` is as it was.
    pub(super) fn anon_vma_copy(&self, to: Pa<Vma>, from: Pa<Vma>) -> Result<(), Errno> {
        let Some(anon) = self.obj(from).anon_vma.get().some() else {
            return Ok(());
        };
        // The chains come first: a folio that a fault gives to this anon_vma is found by a walk, and
        // an allocation that fails leaves nothing behind (Linux d8ab9f7b644a).
        self.anon_vma_clone(to, from, Reuse::No)?;
        let _family = self.lock_family(anon);
        self.anon_vma_activate(to, anon);
        Ok(())
    }

    /// The lock under which the bounds of a VMA that walks may find change.
    pub(super) fn lock_vma_family(&self, vma: Pa<Vma>) -> RmapLocks<'_, A> {
        let area = self.obj(vma);
        let file = area.file.get().some();
        let i_mmap = file.map(|file| self.lock_i_mmap(file));
        let anon = area.anon_vma.load(Acquire).some();
        RmapLocks {
            _family: anon.map(|anon| self.lock_family(anon)),
            _i_mmap: i_mmap,
        }
    }
}
