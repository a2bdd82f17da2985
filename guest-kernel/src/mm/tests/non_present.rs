//! Entries of pages that are on their way to another frame, and what everybody who meets one does with it.

use abi::objects::{Mm, Pa};
use abi::point::Point;
use abi::pte::{NonPresent, Pte, PteFlags, fault};
use abi::syscall::{advice, mremap, prot};

use super::{AT, PAGE, RW, TestKernel, audit, map_at, space, teardown};
use crate::arch::model::testing::Machine;
use crate::mm::{Field, FreedTables, Slot};

fn slot(k: &TestKernel, mm: Pa<Mm>, gva: u64) -> Slot {
    Slot::new(k.leaf_table(k.obj(mm), gva).unwrap(), 1, gva)
}

fn entry(k: &TestKernel, mm: Pa<Mm>, gva: u64) -> Pte {
    k.read_pte(slot(k, mm, gva))
}

/// Replaces the entry for `gva` as a migration does that has locked the folio, and returns what was there. The
/// mapping's count and reference stay with the caller.
fn set_out(k: &TestKernel, mm: Pa<Mm>, gva: u64) -> Pte {
    let slot = slot(k, mm, gva);
    let old = k.read_pte(slot);
    let said = NonPresent::Migration {
        gpa: old.address(),
        flags: old.flags().intersection(NonPresent::KEPT),
    };
    k.folio(old.address()).lock.set(9);
    let _guard = k.lock_table(slot.table);
    k.folio_unmap(old.address());
    let old = k.set_pte(k.obj(mm), gva, slot, old, said.entry());
    k.flush_range(mm, gva, gva + PAGE, FreedTables::No);
    old
}

/// Undoes [`set_out`] at the entry for `gva`, wherever that is now.
fn come_back(k: &TestKernel, mm: Pa<Mm>, gva: u64, old: Pte) {
    let slot = slot(k, mm, gva);
    {
        let _guard = k.lock_table(slot.table);
        k.folio_map_again(old.address(), abi::channel::cause::MAP);
        k.set_pte(k.obj(mm), gva, slot, k.read_pte(slot), old);
    }
    arrive(k, old);
}

/// Gives the reference of the mapping that [`set_out`] took away back.
fn arrive(k: &TestKernel, old: Pte) {
    k.folio(old.address()).lock.set(0);
    k.folio_put(old.address(), abi::channel::cause::UNMAP);
}

fn flags(k: &TestKernel, mm: Pa<Mm>, gva: u64) -> PteFlags {
    match entry(k, mm, gva).non_present() {
        Some(NonPresent::Migration { flags, .. }) => flags,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_table_counts_it_and_so_does_rss() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 1, RW);
    k.user_write(0, AT, 7).unwrap();
    let old = set_out(k, mm, AT);
    let table = slot(k, mm, AT).table;
    assert_eq!((k.folio(table).used.get(), k.obj(mm).rss.get()), (1, 1));
    // The table stays though nothing in it is present, and goes with the entry.
    k.munmap(mm, AT, PAGE).unwrap();
    assert_eq!(k.obj(mm).rss.get(), 0);
    assert_eq!(k.obj(mm).tables.get(), 1);
    arrive(k, old);
    teardown(k, &[mm]);
}

#[test]
fn unmapping_gives_nothing_back_that_is_not_the_entrys() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 2, RW);
    k.user_write(0, AT, 7).unwrap();
    let old = set_out(k, mm, AT);
    k.madvise(mm, AT, PAGE, advice::FREE).unwrap();
    assert!(!entry(k, mm, AT).is_none(), "Linux passes it by");
    k.madvise(mm, AT, PAGE, advice::DONTNEED).unwrap();
    assert!(entry(k, mm, AT).is_none());
    let folio = k.folio(old.address());
    assert_eq!((folio.refcount.get(), folio.mapcount.get()), (1, 0));
    arrive(k, old);
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn fork_makes_it_shared_on_both_sides() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 1, RW);
    k.user_write(0, AT, 7).unwrap();
    let old = set_out(k, mm, AT);
    assert!(flags(k, mm, AT).contains(PteFlags::WRITE));
    let child = k.mm_fork(mm).unwrap();
    for mm in [mm, child] {
        let flags = flags(k, mm, AT);
        assert!(!flags.contains(PteFlags::WRITE) && flags.contains(PteFlags::COW));
        assert!(flags.contains(PteFlags::DIRTY));
        assert_eq!(k.obj(mm).rss.get(), 1);
    }
    k.munmap(child, AT, PAGE).unwrap();
    k.munmap(mm, AT, PAGE).unwrap();
    arrive(k, old);
    teardown(k, &[child, mm]);
}

#[test]
fn mprotect_takes_its_write_permission_and_needs_no_flush() {
    let machine = Machine::new(2, "");
    let k = machine.kernel();
    let mm = space(k, &[0, 1]);
    map_at(k, mm, AT, 1, RW);
    k.user_write(0, AT, 7).unwrap();
    let old = set_out(k, mm, AT);
    let generation = k.obj(mm).tlb_gen.get();
    k.on(0, |k| k.mprotect(mm, AT, PAGE, prot::READ)).unwrap();
    k.on(0, |k| k.mprotect(mm, AT, PAGE, RW)).unwrap();
    assert!(!flags(k, mm, AT).contains(PteFlags::WRITE));
    assert_eq!(k.obj(mm).tlb_gen.get(), generation);
    come_back(k, mm, AT, old);
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn mremap_moves_it_and_mincore_counts_it() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 2, RW);
    k.user_write(0, AT, 7).unwrap();
    let old = set_out(k, mm, AT);
    let to = AT + 64 * PAGE;
    let flags = mremap::MAYMOVE | mremap::FIXED;
    k.mremap(mm, AT, (2 * PAGE, 2 * PAGE), flags, to).unwrap();
    let mut vector = [9; 2];
    assert_eq!(k.mincore(mm, to, &mut vector), Ok(2));
    assert_eq!(vector, [1, 0]);
    come_back(k, mm, to, old);
    assert_eq!(k.user_read(0, to), Ok(7));
    teardown(k, &[mm]);
}

#[test]
fn a_fault_waits_until_the_page_has_arrived() {
    let machine = Machine::new(2, "");
    let k = machine.kernel();
    let mm = space(k, &[0, 1]);
    map_at(k, mm, AT, 1, RW);
    k.user_write(0, AT, 7).unwrap();
    let old = set_out(k, mm, AT);
    k.arch.at(Point::LockWait, move |k| {
        k.on(0, |k| come_back(k, mm, AT, old));
    });
    k.on(1, |k| k.fault(mm, AT, fault::USER | fault::WRITE))
        .unwrap();
    assert_eq!((k.arch.hooks_left(), entry(k, mm, AT)), (0, old));
    teardown(k, &[mm]);
}

#[test]
#[should_panic(expected = "which nobody moves")]
fn a_fault_on_one_that_nobody_moves_is_a_bug() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 1, RW);
    k.user_write(0, AT, 7).unwrap();
    let old = set_out(k, mm, AT);
    k.folio(old.address()).lock.set(0);
    let _ = k.fault(mm, AT, fault::USER);
}

#[test]
#[should_panic(expected = "says nothing that there is")]
fn an_entry_that_nobody_understands_is_a_bug() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    map_at(k, mm, AT, 1, RW);
    k.user_write(0, AT, 7).unwrap();
    let slot = slot(k, mm, AT);
    let old = k.read_pte(slot);
    k.set_pte(k.obj(mm), AT, slot, old, Pte(0x2));
    let _ = k.fault(mm, AT, fault::USER);
}
