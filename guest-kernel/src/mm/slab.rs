//! Typed slabs: one list of free objects per type, in pages that are never given back, so a stale
//! reference to an object finds an object of the same type (Linux's SLAB_TYPESAFE_BY_RCU).
//!
//! A free object is zero but for its generation and its link, so what the ABI says of a free slot
//! (`Mm::id` is 0, `Vma::refs` is 0, `Task::state` is Free) holds by itself.
#![allow(unsafe_code, reason = "the words of objects in type-stable memory")]

use core::sync::atomic::{AtomicU32, AtomicU64};

use abi::channel::EventKind;
use abi::failpoint::Failpoint;
use abi::layout::PAGE_SIZE;
use abi::objects::{
    AnonVma, AnonVmaChain, CacheNode, File, FileTable, FrameKind, Mm, OpenFile, Pa, Slab, SlabId,
    Task, Vma, VmaNode,
};
use abi::syscall::Errno;

use super::Field;
use crate::Kernel;
use crate::arch::Arch;
use crate::kernel::Object;
use abi::lock::LockClass;

/// Objects that come from a slab.
pub trait Slabbed: Object + Sized {
    /// Which one.
    const ID: SlabId;
    /// The word that links a free object to the next: not one that readers of free slots look at.
    fn next_free(&self) -> u64;
    /// Sets that word.
    fn set_next_free(&self, gpa: u64);
    /// +1 at every allocation and free, for the types that have one.
    fn generation(&self) -> Option<&AtomicU32>;
}

macro_rules! slabbed {
    ($type:ident, $($link:ident).+, $generation:expr) => {
        impl Slabbed for $type {
            const ID: SlabId = SlabId::$type;
            fn next_free(&self) -> u64 {
                self.$($link).+.get().0
            }
            fn set_next_free(&self, gpa: u64) {
                self.$($link).+.set(Pa::new(gpa));
            }
            fn generation(&self) -> Option<&AtomicU32> {
                let generation: fn(&Self) -> Option<&AtomicU32> = $generation;
                generation(self)
            }
        }
    };
}
slabbed!(Mm, next, |o| Some(&o.generation));
slabbed!(Vma, chains, |o| Some(&o.generation));
slabbed!(AnonVma, chains, |o| Some(&o.generation));
slabbed!(AnonVmaChain, next_of_vma, |o| Some(&o.generation));
slabbed!(Task, next, |_| None);

slabbed!(File, pages, |o| Some(&o.generation));

/// Objects whose link to the next free one is a plain word.
macro_rules! slabbed_by_word {
    ($type:ident, $word:expr, $generation:expr) => {
        impl Slabbed for $type {
            const ID: SlabId = SlabId::$type;
            fn next_free(&self) -> u64 {
                let word: fn(&Self) -> &AtomicU64 = $word;
                word(self).get()
            }
            fn set_next_free(&self, gpa: u64) {
                let word: fn(&Self) -> &AtomicU64 = $word;
                word(self).set(gpa);
            }
            fn generation(&self) -> Option<&AtomicU32> {
                let generation: fn(&Self) -> Option<&AtomicU32> = $generation;
                generation(self)
            }
        }
    };
}
slabbed_by_word!(VmaNode, |o| &o.slots[0].child, |_| None);
slabbed_by_word!(CacheNode, |o| &o.slots[0], |_| None);
slabbed_by_word!(OpenFile, |o| &o.position, |o| Some(&o.generation));

impl Slabbed for FileTable {
    const ID: SlabId = SlabId::FileTable;
    fn next_free(&self) -> u64 {
        self.open[0].get().0
    }
    fn set_next_free(&self, gpa: u64) {
        self.open[0].set(Pa::new(gpa));
    }
    fn generation(&self) -> Option<&AtomicU32> {
        Some(&self.generation)
    }
}

impl<A: Arch> Kernel<A> {
    /// Allocates an object, all zero but for its generation.
    ///
    /// # Errors
    /// ENOMEM where the slab is empty and no frame is left.
    pub fn slab_alloc<T: Slabbed>(&self) -> Result<Pa<T>, Errno> {
        if fail!(self, Failpoint::SlabAlloc) {
            return Err(Errno::ENOMEM);
        }
        let slab = self.slab::<T>();
        loop {
            {
                let _guard = self.lock(&slab.lock, LockClass::Slab);
                if let Some(object) = Pa::<T>::new(slab.free.get()).some() {
                    slab.free.set(self.obj(object).next_free());
                    self.obj(object).set_next_free(0);
                    self.slab_count(object, 1);
                    return Ok(object);
                }
            }
            // Where memory is short, objects of this type may have become free meanwhile, for a grace period is over.
            self.slab_grow::<T>().or_else(|error| {
                if slab.free.get() == 0 {
                    Err(error)
                } else {
                    Ok(())
                }
            })?;
        }
    }

    /// Frees an object; its memory stays one of this type.
    ///
    /// # Panics
    /// Where it is free already.
    pub fn slab_free<T: Slabbed>(&self, object: Pa<T>) {
        let _guard = self.lock(&self.slab::<T>().lock, LockClass::Slab);
        self.slab_unuse(object);
        self.slab_give_back(object);
    }

    /// An object is in use no more that readers under RCU may still be at: it keeps its words until
    /// [`Kernel::slab_free_retired`].
    ///
    /// # Panics
    /// Where it is free already.
    pub(crate) fn slab_retire<T: Slabbed>(&self, object: Pa<T>) {
        let slab = self.slab::<T>();
        let _guard = self.lock(&slab.lock, LockClass::Slab);
        self.slab_unuse(object);
        slab.retired.set(slab.retired.get() + 1);
    }

    /// Frees what was retired: a grace period is over.
    pub(crate) fn slab_free_retired<T: Slabbed>(&self, object: Pa<T>) {
        let slab = self.slab::<T>();
        let _guard = self.lock(&slab.lock, LockClass::Slab);
        slab.retired.set(slab.retired.get() - 1);
        self.slab_give_back(object);
    }

    fn slab_unuse<T: Slabbed>(&self, object: Pa<T>) {
        let generation = self.obj(object).generation().map(Field::get);
        assert!(
            generation.is_none_or(|g| g % 2 == 1),
            "{:?} {object:?} freed twice",
            T::ID
        );
        self.slab_count(object, -1);
    }

    fn slab_give_back<T: Slabbed>(&self, object: Pa<T>) {
        let generation = self.obj(object).generation().map(Field::get);
        for word in self.words(object) {
            word.set(0);
        }
        if let (Some(field), Some(value)) = (self.obj(object).generation(), generation) {
            field.set(value);
        }
        let slab = self.slab::<T>();
        self.obj(object).set_next_free(slab.free.get());
        slab.free.set(object.0);
    }

    fn slab<T: Slabbed>(&self) -> &Slab {
        &self.root().slabs[T::ID as usize]
    }

    /// Adopts a page of free objects.
    fn slab_grow<T: Slabbed>(&self) -> Result<(), Errno> {
        let page = self.alloc_frames(0, FrameKind::Slab)?;
        self.arch.zero_frame(page);
        self.folio(page).owner.set(T::ID as u64);
        let slab = self.slab::<T>();
        let _guard = self.lock(&slab.lock, LockClass::Slab);
        let bytes = size_of::<T>() as u64;
        // Pushed from the end, so that objects are handed out in ascending order.
        for i in (0..PAGE_SIZE / bytes).rev() {
            let object = Pa::<T>::new(page + i * bytes);
            self.obj(object).set_next_free(slab.free.get());
            slab.free.set(object.0);
        }
        slab.object_bytes.set(bytes);
        slab.frames.set(slab.frames.get() + 1);
        Ok(())
    }

    fn slab_count<T: Slabbed>(&self, object: Pa<T>, delta: i64) {
        if let Some(generation) = self.obj(object).generation() {
            generation.set(generation.get().wrapping_add(1));
            if let SlabId::Vma = T::ID {
                let kind = if delta > 0 {
                    EventKind::VmaAlloc
                } else {
                    EventKind::VmaFree
                };
                event!(self, kind, [object.0, generation.get().into(), 0, 0, 0]);
            }
        }
        let (all, page) = (&self.slab::<T>().used, &self.folio(object.0).used);
        all.set(all.get().wrapping_add_signed(delta));
        page.set(page.get().wrapping_add_signed(delta as i32));
    }

    fn words<T: Slabbed>(&self, object: Pa<T>) -> &[AtomicU64] {
        const {
            assert!(size_of::<T>().is_multiple_of(8) && align_of::<T>() >= align_of::<AtomicU64>());
        }
        let first = core::ptr::from_ref(self.obj(object)).cast::<AtomicU64>();
        // SAFETY: the words are exactly the bytes of one object of a slab, aligned by the assertion;
        // all fields are atomics, any bit pattern is valid, and the memory is never given back.
        unsafe { core::slice::from_raw_parts(first, size_of::<T>() / 8) }
    }
}
