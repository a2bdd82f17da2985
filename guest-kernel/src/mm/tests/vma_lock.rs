//! Locks of single VMAs, and the fault path that takes them.

use abi::layout::{HUGE_PAGE_SIZE, PAGE_SIZE};
use abi::objects::{Mm, Pa, SlabId, VmaRefs};
use abi::point::Point;
use abi::pte::fault;
use abi::syscall::prot;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use super::{AT, RW, TestKernel, map_at, space, teardown, with_space};
use crate::arch::model::testing::Machine;
use crate::mm::fault_path::VMA_LOCKED;
use crate::mm::swap_in::Unfinished;
use crate::mm::{FaultError, Field};

const WRITE: u64 = fault::USER | fault::WRITE;

fn refs(k: &TestKernel, mm: Pa<Mm>, gva: u64) -> u64 {
    let vma = k.vma_at(k.obj(mm), gva).unwrap();
    k.obj(vma).refs.get()
}

/// A counter that hooks raise, and what it has come to.
fn counter() -> (Arc<AtomicU64>, Arc<AtomicU64>) {
    let counter = Arc::new(AtomicU64::new(0));
    (counter.clone(), counter)
}

#[test]
fn a_fault_holds_its_vma_and_not_the_mmap_lock() {
    with_space(|k, mm| {
        map_at(k, mm, AT, 2, RW);
        // The first anon_vma takes the mmap_lock for a moment.
        k.fault(mm, AT, WRITE).unwrap();
        let (hook, looked) = counter();
        k.arch.at(Point::PteInstall, move |k| {
            assert_eq!(k.obj(mm).mmap_lock.get(), 0);
            assert_eq!(refs(k, mm, AT), VmaRefs::ATTACHED + 1);
            hook.store(1, Relaxed);
        });
        k.fault(mm, AT + PAGE_SIZE, WRITE).unwrap();
        assert_eq!(looked.get(), 1);
        assert_eq!(refs(k, mm, AT), VmaRefs::ATTACHED);
    });
}

#[test]
fn who_writes_one_vma_keeps_faults_out_of_that_one() {
    with_space(|k, mm| {
        map_at(k, mm, AT, 1, RW);
        map_at(k, mm, AT + 2 * PAGE_SIZE, 1, RW);
        k.rcu_enter_kernel();
        let taken = |gva| k.lock_vma_under_rcu(mm, gva).is_some();
        let space = k.obj(mm);
        assert!(taken(AT) && !taken(AT + PAGE_SIZE) && taken(AT + 2 * PAGE_SIZE));
        {
            let _writer = k.mmap_write_lock(space);
            assert!(taken(AT), "the mmap_lock alone keeps nobody out");
            let vma = k.vma_at(space, AT).unwrap();
            k.vma_start_write(vma);
            k.vma_start_write(vma);
            assert!(!taken(AT) && taken(AT + 2 * PAGE_SIZE));
        }
        assert!(taken(AT));
        assert_eq!(refs(k, mm, AT), VmaRefs::ATTACHED);
        k.rcu_leave_kernel();
    });
}

#[test]
fn a_vma_that_goes_before_it_is_counted_is_looked_for_under_the_mmap_lock() {
    with_space(|k, mm| {
        map_at(k, mm, AT, 1, RW);
        k.arch.at(Point::VmaLookup, move |k| {
            k.on(1, |k| k.munmap(mm, AT, PAGE_SIZE)).unwrap();
        });
        assert_eq!(k.fault(mm, AT, fault::USER), Err(FaultError::NoMapping));
    });
}

#[test]
fn a_vma_that_has_become_another_mms_is_let_go_of() {
    let machine = Machine::new(2, "");
    let k = machine.kernel();
    let [mine, other] = [space(k, &[0]), space(k, &[1])];
    map_at(k, mine, AT, 1, RW);
    let found = k.vma_at(k.obj(mine), AT);
    k.arch.at(Point::VmaLookup, move |k| {
        k.on(1, |k| {
            k.munmap(mine, AT, PAGE_SIZE).unwrap();
            map_at(k, other, AT, 1, RW);
            assert_eq!(k.vma_at(k.obj(other), AT), found, "its memory is reused");
        });
    });
    assert_eq!(k.fault(mine, AT, fault::USER), Err(FaultError::NoMapping));
    assert_eq!(refs(k, other, AT), VmaRefs::ATTACHED);
    teardown(k, &[mine, other]);
}

#[test]
fn a_permission_that_goes_before_the_vma_is_counted_is_gone() {
    with_space(|k, mm| {
        map_at(k, mm, AT, 1, RW);
        k.fault(mm, AT, WRITE).unwrap();
        k.arch.at(Point::VmaLookup, move |k| {
            k.on(1, |k| k.mprotect(mm, AT, PAGE_SIZE, prot::READ))
                .unwrap();
        });
        assert_eq!(k.fault(mm, AT, WRITE), Err(FaultError::Access));
    });
}

#[test]
fn a_first_anon_vma_is_not_waited_for_under_the_vma() {
    with_space(|k, mm| {
        map_at(k, mm, AT, 1, RW);
        let vma = k.vma_at(k.obj(mm), AT).unwrap();
        {
            let _writer = k.mmap_write_lock(k.obj(mm));
            let result = k.fault_anon_vma(mm, vma, WRITE | VMA_LOCKED);
            assert!(matches!(result, Err(Unfinished::NeedsMmapLock)));
        }
        assert!(k.fault_anon_vma(mm, vma, WRITE | VMA_LOCKED).is_ok());
        assert!(!k.obj(vma).anon_vma.get().is_null());
    });
}

#[test]
fn beside_a_vma_nothing_is_found() {
    with_space(|k, mm| {
        map_at(k, mm, AT, 1, RW);
        assert_eq!(
            k.fault(mm, AT + PAGE_SIZE, WRITE),
            Err(FaultError::NoMapping)
        );
        assert_eq!(
            k.fault(mm, AT - PAGE_SIZE, WRITE),
            Err(FaultError::NoMapping)
        );
        assert_eq!(refs(k, mm, AT), VmaRefs::ATTACHED);
    });
}

/// Nodes that are unlinked stay as long as somebody may be looking for a VMA in them.
#[test]
fn nodes_of_the_tree_stay_until_their_readers_have_left() {
    with_space(|k, mm| {
        for nth in 0..24 {
            map_at(k, mm, AT + 2 * nth * PAGE_SIZE, 1, RW);
        }
        k.on(1, |k| {
            k.rcu_enter_kernel();
            std::mem::forget(k.rcu_read());
        });
        k.rcu_enter_kernel();
        let retired = || k.root().slabs[SlabId::VmaNode as usize].retired.get();
        assert_eq!(retired(), 0);
        k.munmap(mm, AT, 48 * PAGE_SIZE).unwrap();
        k.rcu_poll();
        assert!(retired() > 1, "{} retired", retired());
        k.on(1, |k| {
            k.this_cpu().rcu.nesting.set(0);
            k.rcu_leave_kernel();
        });
        k.rcu_barrier();
        assert_eq!(retired(), 0);
        k.rcu_leave_kernel();
    });
}

/// A read that maps 2 MiB makes an anon_vma, too.
#[test]
fn a_first_anon_vma_of_2_mib_is_not_waited_for_either() {
    let machine = Machine::with_memory(32 << 20, 2, "thp=always");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, HUGE_PAGE_SIZE / PAGE_SIZE, RW);
    let vma = k.vma_at(k.obj(mm), AT).unwrap();
    let read = || k.fault_in_or_wait(mm, vma, AT, fault::USER | VMA_LOCKED);
    {
        let _writer = k.mmap_write_lock(k.obj(mm));
        assert!(matches!(read(), Err(Unfinished::NeedsMmapLock)));
        assert!(k.obj(vma).anon_vma.get().is_null());
    }
    assert!(read().is_ok());
    assert_eq!(k.obj(mm).huge.get(), 1);
    teardown(k, &[mm]);
}
