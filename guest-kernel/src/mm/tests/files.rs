//! Files and their mappings, call by call.

use abi::layout::USER_END;
use abi::objects::{File, Mm, Pa, SlabId};
use abi::pte::{Pte, PteFlags};
use abi::syscall::{Errno, advice, map, msync, prot};

use super::{AT, PAGE, RW, TestKernel, audit, maps, space, teardown};
use crate::Kernel;
use crate::arch::model::testing::Machine;
use crate::mm::{Backing, FaultError, Field, MAX_FILE_BYTES, Size, Slot};

const R: u64 = prot::READ;

/// Maps `pages` of `file` at `gva`, from page `pgoff` on.
pub(super) fn map_file(
    k: &TestKernel,
    mm: Pa<Mm>,
    gva: u64,
    pages: u64,
    prot: u64,
    sharing: u64,
    (file, pgoff): (Pa<File>, u64),
) {
    let backing = Backing::File(file, pgoff);
    let found = k.mmap_of(mm, gva, pages * PAGE, (prot, sharing | map::FIXED), backing);
    assert_eq!(found, Ok(gva));
}

/// A word of the file, read as `read` does.
pub(super) fn word(k: &TestKernel, file: Pa<File>, at: u64) -> u64 {
    let mut bytes = [0; 8];
    assert_eq!(k.file_read(file, at, &mut bytes), Ok(8));
    u64::from_le_bytes(bytes)
}

pub(super) fn put(k: &TestKernel, file: Pa<File>, at: u64, value: u64) -> Result<(), Errno> {
    let _inode = k.lock_inode(file);
    k.file_write(file, at, &value.to_le_bytes())
}

fn entry(k: &TestKernel, mm: Pa<Mm>, gva: u64) -> Pte {
    let table = k.leaf_table(k.obj(mm), gva);
    table.map_or(Pte::NONE, |table| k.read_pte(Slot::new(table, 1, gva)))
}

/// Runs `test` with a file of four pages and two mms, of CPUs 0 and 1, and expects nothing to be left.
fn with_file(test: impl FnOnce(&TestKernel, Pa<File>, [Pa<Mm>; 2])) {
    let machine = Machine::new(2, "");
    let k = machine.kernel();
    let mms = [space(k, &[0]), space(k, &[1])];
    let file = k.file_create().unwrap();
    k.file_truncate(file, 4 * PAGE);
    test(k, file, mms);
    audit(k);
    k.file_put(file);
    teardown(k, &mms);
}

#[test]
fn shared_mappings_and_the_file_are_one_memory() {
    with_file(|k, file, [a, b]| {
        map_file(k, a, AT, 4, RW, map::SHARED, (file, 0));
        map_file(k, b, AT + 8 * PAGE, 2, RW, map::SHARED, (file, 1));
        k.user_write(0, AT + PAGE, 7).unwrap();
        assert_eq!(k.user_read(1, AT + 8 * PAGE), Ok(7));
        assert_eq!(word(k, file, PAGE), 7);
        put(k, file, 2 * PAGE + 8, 9).unwrap();
        assert_eq!(k.user_read(1, AT + 9 * PAGE + 8), Ok(9));
        assert_eq!(k.user_read(0, AT + 2 * PAGE + 8), Ok(9));
        // Holes read as zeroes and take no page by read, but by a mapping.
        let pages = k.obj(file).nr_pages.get();
        assert_eq!(word(k, file, 3 * PAGE), 0);
        assert_eq!(k.obj(file).nr_pages.get(), pages);
        assert_eq!(k.user_read(0, AT + 3 * PAGE), Ok(0));
        assert_eq!(k.obj(file).nr_pages.get(), pages + 1);
        assert_eq!(k.root().slabs[SlabId::AnonVma as usize].used.get(), 0);
    });
}

#[test]
fn private_mappings_see_the_file_until_they_write() {
    with_file(|k, file, [a, b]| {
        put(k, file, 0, 1).unwrap();
        map_file(k, a, AT, 2, RW, map::PRIVATE, (file, 0));
        map_file(k, b, AT, 2, RW, map::SHARED, (file, 0));
        assert_eq!(k.user_read(0, AT), Ok(1));
        assert!(!entry(k, a, AT).flags().contains(PteFlags::WRITE));
        k.user_write(1, AT, 2).unwrap();
        assert_eq!(k.user_read(0, AT), Ok(2));
        // A present page of the file is copied; a missing one is copied at once.
        k.user_write(0, AT, 3).unwrap();
        k.user_write(0, AT + PAGE, 4).unwrap();
        assert_eq!(k.user_read(1, AT), Ok(2));
        assert_eq!(k.user_read(1, AT + PAGE), Ok(0));
        assert_eq!((word(k, file, 0), word(k, file, PAGE)), (2, 0));
        k.user_write(1, AT, 5).unwrap();
        assert_eq!(k.user_read(0, AT), Ok(3));
        // DONTNEED drops the copy, not the file's page.
        k.madvise(a, AT, PAGE, advice::DONTNEED).unwrap();
        assert_eq!(k.user_read(0, AT), Ok(5));
    });
}

#[test]
fn behind_the_end_is_a_bus_error() {
    with_file(|k, file, [a, b]| {
        k.file_truncate(file, PAGE + 1);
        map_file(k, a, AT, 4, RW, map::SHARED, (file, 0));
        map_file(k, b, AT, 4, RW, map::PRIVATE, (file, 0));
        for cpu in [0, 1] {
            assert_eq!(k.user_read(cpu, AT + PAGE + 8), Ok(0));
            assert_eq!(k.user_read(cpu, AT + 2 * PAGE), Err(FaultError::Bus));
            assert_eq!(k.user_write(cpu, AT + 2 * PAGE, 1), Err(FaultError::Bus));
            // The VMA's rights come first.
            assert_eq!(k.user_fetch(cpu, AT + 2 * PAGE), Err(FaultError::Access));
        }
        k.file_truncate(file, 3 * PAGE);
        k.user_write(0, AT + 2 * PAGE, 1).unwrap();
        assert_eq!(k.user_read(1, AT + 2 * PAGE), Ok(1));
    });
}

#[test]
fn truncate_takes_pages_from_everybody() {
    with_file(|k, file, [a, b]| {
        map_file(k, a, AT, 4, RW, map::SHARED, (file, 0));
        map_file(k, b, AT, 4, RW, map::PRIVATE, (file, 0));
        for page in 0..4 {
            k.user_write(0, AT + page * PAGE, 10 + page).unwrap();
            k.user_write(0, AT + page * PAGE + 8, 20 + page).unwrap();
        }
        k.user_read(1, AT + 2 * PAGE).unwrap();
        k.user_write(1, AT + 3 * PAGE, 99).unwrap();
        let free = k.root().free_frames.get();
        k.file_truncate(file, 2 * PAGE + 8);
        // Page 3 of the file, and the copy of it.
        assert_eq!(k.root().free_frames.get(), free + 2);
        audit(k);
        for cpu in [0, 1] {
            assert_eq!(k.user_read(cpu, AT + 3 * PAGE), Err(FaultError::Bus));
            assert_eq!(k.user_read(cpu, AT + 2 * PAGE), Ok(12));
            assert_eq!(
                k.user_read(cpu, AT + 2 * PAGE + 8),
                Ok(0),
                "the tail is zero"
            );
        }
        // What comes back is empty.
        k.file_truncate(file, 4 * PAGE);
        for cpu in [0, 1] {
            assert_eq!(k.user_read(cpu, AT + 3 * PAGE), Ok(0));
        }
        k.file_truncate(file, 0);
        assert_eq!((k.obj(file).nr_pages.get(), k.obj(a).rss.get()), (0, 0));
        assert_eq!(k.user_read(0, AT), Err(FaultError::Bus));
    });
}

#[test]
fn a_hole_takes_the_files_pages_and_leaves_copies() {
    with_file(|k, file, [a, b]| {
        map_file(k, a, AT, 4, RW, map::SHARED, (file, 0));
        map_file(k, b, AT, 4, RW, map::PRIVATE, (file, 0));
        for page in 0..4 {
            k.user_write(0, AT + page * PAGE, 1).unwrap();
            k.user_write(0, AT + page * PAGE + 2048, 2).unwrap();
        }
        k.user_write(1, AT + PAGE, 5).unwrap();
        k.user_read(1, AT + 2 * PAGE).unwrap();
        // Half of page 0, pages 1 and 2, half of page 3.
        k.file_punch(file, 2048, 3 * PAGE + 2048);
        audit(k);
        let read = |cpu, page, at| k.user_read(cpu, AT + page * PAGE + at);
        assert_eq!([0, 2048].map(|at| read(0, 0, at)), [Ok(1), Ok(0)]);
        assert_eq!([0, 2048].map(|at| read(0, 1, at)), [Ok(0), Ok(0)]);
        assert_eq!([0, 2048].map(|at| read(0, 2, at)), [Ok(0), Ok(0)]);
        assert_eq!([0, 2048].map(|at| read(0, 3, at)), [Ok(0), Ok(2)]);
        assert_eq!(read(1, 1, 0), Ok(5), "a private copy stays");
        assert_eq!(read(1, 2, 0), Ok(0), "a page of the file does not");
        assert_eq!(k.file_size(file), 4 * PAGE);
        // Inside one page, and where there is none.
        k.user_write(0, AT + 8, 3).unwrap();
        k.file_punch(file, 0, 8);
        assert_eq!([0, 8].map(|at| read(0, 0, at)), [Ok(0), Ok(3)]);
        k.file_punch(file, 100 * PAGE, 200 * PAGE);
        assert_eq!(k.file_size(file), 4 * PAGE);
    });
}

#[test]
fn fork_shares_mappings_of_files() {
    with_file(|k, file, [a, _]| {
        map_file(k, a, AT, 2, RW, map::SHARED, (file, 0));
        map_file(k, a, AT + 8 * PAGE, 2, RW, map::PRIVATE, (file, 0));
        map_file(k, a, AT + 16 * PAGE, 2, R, map::PRIVATE, (file, 0));
        k.user_write(0, AT, 1).unwrap();
        k.user_read(0, AT + 8 * PAGE).unwrap();
        k.user_write(0, AT + 9 * PAGE, 2).unwrap();
        k.user_read(0, AT + 16 * PAGE).unwrap();
        let child = k.mm_fork(a).unwrap();
        // Only the VMA with a private page is copied, that page and the file's (Linux's vma_needs_copy).
        assert_eq!(k.obj(child).rss.get(), 2);
        audit(k);
        k.on(1, |k| k.switch_mm(child));
        assert_eq!(k.user_read(1, AT), Ok(1));
        k.user_write(1, AT, 3).unwrap();
        assert_eq!(k.user_read(0, AT), Ok(3));
        assert_eq!(k.user_read(0, AT + 8 * PAGE), Ok(3));
        k.user_write(1, AT + 9 * PAGE, 4).unwrap();
        assert_eq!(k.user_read(0, AT + 9 * PAGE), Ok(2));
        k.file_truncate(file, 0);
        assert_eq!(k.user_read(0, AT + 9 * PAGE), Err(FaultError::Bus));
        assert_eq!(k.user_read(1, AT + 9 * PAGE), Err(FaultError::Bus));
        audit(k);
        k.on(1, Kernel::leave_mm);
        k.mm_put(child);
    });
}

#[test]
fn shared_anonymous_memory_is_a_file_of_its_own() {
    with_file(|k, _, [a, _]| {
        let flags = map::SHARED | map::ANONYMOUS;
        let at = k.mmap(a, 0, 2 * PAGE, RW, flags).unwrap();
        let below = k.mmap(a, 0, PAGE, RW, flags).unwrap();
        assert_eq!(below, at - PAGE);
        assert_eq!(maps(k, a).len(), 2, "two files do not merge");
        k.user_write(0, at, 5).unwrap();
        let child = k.mm_fork(a).unwrap();
        k.on(1, |k| k.switch_mm(child));
        assert_eq!(k.user_read(1, at), Ok(5));
        k.user_write(1, at + PAGE, 6).unwrap();
        assert_eq!(k.user_read(0, at + PAGE), Ok(6));
        // The file outlives each of its mappings.
        k.munmap(a, at, 2 * PAGE).unwrap();
        assert_eq!(k.user_read(1, at), Ok(5));
        audit(k);
        k.on(1, Kernel::leave_mm);
        k.mm_put(child);
    });
}

#[test]
fn a_file_goes_with_its_last_mapping() {
    let machine = Machine::new(1, "");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    let file = k.file_create().unwrap();
    k.file_truncate(file, 3 * PAGE);
    map_file(k, mm, AT, 3, RW, map::SHARED, (file, 0));
    k.user_write(0, AT + 2 * PAGE, 1).unwrap();
    k.file_put(file);
    let used = || k.root().slabs[SlabId::File as usize].used.get();
    // Both halves of what is left refer to it.
    k.munmap(mm, AT + PAGE, PAGE).unwrap();
    assert_eq!(k.user_read(0, AT + 2 * PAGE), Ok(1));
    k.munmap(mm, AT, PAGE).unwrap();
    audit(k);
    assert_eq!(used(), 1);
    k.munmap(mm, AT + 2 * PAGE, PAGE).unwrap();
    assert_eq!(used(), 0);
    teardown(k, &[mm]);
}

#[test]
fn neighbours_merge_where_file_and_page_agree() {
    with_file(|k, file, [a, _]| {
        let other = k.file_create().unwrap();
        let count = |k: &TestKernel| maps(k, a).len();
        map_file(k, a, AT, 1, RW, map::SHARED, (file, 0));
        map_file(k, a, AT + PAGE, 1, RW, map::SHARED, (file, 1));
        assert_eq!(count(k), 1);
        map_file(k, a, AT + 2 * PAGE, 1, RW, map::SHARED, (file, 3));
        assert_eq!(count(k), 2, "a page is left out");
        map_file(k, a, AT + 2 * PAGE, 1, RW, map::SHARED, (other, 2));
        assert_eq!(count(k), 2, "another file");
        map_file(k, a, AT + 2 * PAGE, 1, RW, map::PRIVATE, (file, 2));
        assert_eq!(count(k), 2, "not shared");
        map_file(k, a, AT + 2 * PAGE, 1, RW, map::SHARED, (file, 2));
        assert_eq!(count(k), 1);
        k.mprotect(a, AT + PAGE, PAGE, R).unwrap();
        assert_eq!(count(k), 3);
        audit(k);
        k.mprotect(a, AT + PAGE, PAGE, RW).unwrap();
        assert_eq!(count(k), 1);
        // Private ones with copies merge like anonymous memory.
        map_file(k, a, AT + 8 * PAGE, 2, RW, map::PRIVATE, (file, 0));
        k.user_write(0, AT + 8 * PAGE, 1).unwrap();
        map_file(k, a, AT + 10 * PAGE, 1, RW, map::PRIVATE, (file, 2));
        assert_eq!(count(k), 2);
        k.file_put(other);
    });
}

#[test]
fn mprotect_of_shared_mappings_gives_and_takes_writes() {
    with_file(|k, file, [a, b]| {
        map_file(k, a, AT, 2, R, map::SHARED, (file, 0));
        map_file(k, b, AT, 2, RW, map::SHARED, (file, 0));
        assert_eq!(k.user_read(0, AT), Ok(0));
        assert_eq!(k.user_write(0, AT, 1), Err(FaultError::Access));
        k.mprotect(a, AT, 2 * PAGE, RW).unwrap();
        audit(k);
        k.user_write(0, AT, 1).unwrap();
        k.mprotect(a, AT, 2 * PAGE, R).unwrap();
        assert_eq!(k.user_write(0, AT, 2), Err(FaultError::Access));
        assert_eq!(k.user_read(1, AT), Ok(1));
    });
}

#[test]
fn mmap_of_files_refuses_what_linux_refuses() {
    with_file(|k, file, [a, _]| {
        let call = |flags, pgoff| k.mmap_of(a, 0, PAGE, (RW, flags), Backing::File(file, pgoff));
        let last = MAX_FILE_BYTES / PAGE;
        assert_eq!(call(map::SHARED, last), Err(Errno::EOVERFLOW));
        assert!(call(map::SHARED, last - 1).is_ok());
        assert_eq!(call(0, 0), Err(Errno::EINVAL));
        assert_eq!(call(map::SHARED | map::GROWSDOWN, 0), Err(Errno::EINVAL));
        assert_eq!(call(map::PRIVATE | map::GROWSDOWN, 0), Err(Errno::EINVAL));
        let validate = map::SHARED_VALIDATE;
        assert!(call(validate | map::NORESERVE, 0).is_ok());
        assert_eq!(call(validate | 1 << 40, 0), Err(Errno::EOPNOTSUPP));
        let no_replace = validate | map::FIXED_NOREPLACE;
        let at = k.mmap_of(a, AT, PAGE, (RW, no_replace), Backing::File(file, 0));
        assert_eq!(at, Err(Errno::EOPNOTSUPP));
        let console = |flags| k.mmap_of(a, 0, PAGE, (R, flags), Backing::Unmappable);
        assert_eq!(console(map::SHARED), Err(Errno::ENODEV));
        assert_eq!(console(0), Err(Errno::EINVAL));
        // An address that is refused comes before the file's rules.
        let low = k.mmap_of(a, 0, PAGE, (R, map::FIXED), Backing::Unmappable);
        assert_eq!(low, Err(Errno::EPERM));
    });
}

#[test]
fn fallocate_makes_pages() {
    with_file(|k, file, _| {
        k.file_allocate(file, PAGE + 1, 2 * PAGE + 1, Size::Stays)
            .unwrap();
        assert_eq!(k.obj(file).nr_pages.get(), 2);
        assert_eq!(k.file_size(file), 4 * PAGE);
        k.file_allocate(file, 5 * PAGE, 6 * PAGE + 1, Size::Stays)
            .unwrap();
        assert_eq!(k.file_size(file), 4 * PAGE);
        k.file_allocate(file, 5 * PAGE, 6 * PAGE + 1, Size::Grows)
            .unwrap();
        assert_eq!(k.file_size(file), 6 * PAGE + 1);
        assert_eq!(k.obj(file).nr_pages.get(), 4);
        // Far away: a tree of several levels, which shrinks to nothing again.
        put(k, file, 1 << 40, 3).unwrap();
        assert_eq!(word(k, file, 1 << 40), 3);
        assert_eq!(word(k, file, 6 * PAGE), 0);
        audit(k);
        k.file_truncate(file, 0);
        assert_eq!(k.root().slabs[SlabId::CacheNode as usize].used.get(), 0);
    });
}

#[test]
fn msync_checks_and_does_nothing() {
    with_file(|k, file, [a, _]| {
        map_file(k, a, AT, 2, RW, map::SHARED, (file, 0));
        assert_eq!(k.msync(a, AT, 2 * PAGE, msync::SYNC), Ok(()));
        assert_eq!(k.msync(a, AT, 2 * PAGE, msync::ASYNC), Ok(()));
        assert_eq!(k.msync(a, AT, 2 * PAGE, 0), Ok(()));
        assert_eq!(k.msync(a, AT, 3 * PAGE, msync::SYNC), Err(Errno::ENOMEM));
        assert_eq!(k.msync(a, AT - PAGE, PAGE, msync::SYNC), Err(Errno::ENOMEM));
        assert_eq!(k.msync(a, AT - PAGE, 0, msync::SYNC), Ok(()));
        assert_eq!(k.msync(a, AT + 1, PAGE, msync::SYNC), Err(Errno::EINVAL));
        assert_eq!(k.msync(a, AT, PAGE, 5), Err(Errno::EINVAL));
        assert_eq!(k.msync(a, AT, PAGE, 8), Err(Errno::EINVAL));
        let wraps = k.msync(a, USER_END, u64::MAX - PAGE, msync::SYNC);
        assert_eq!(wraps, Err(Errno::ENOMEM));
    });
}

#[test]
fn a_read_fault_maps_what_is_cached_around_it() {
    with_file(|k, file, [a, b]| {
        k.file_truncate(file, 40 * PAGE);
        // Pages 0 to 9 and 20 are there; 30 lies behind the end.
        for page in (0..10).chain([20, 30]) {
            put(k, file, page * PAGE, page).unwrap();
        }
        k.file_truncate(file, 21 * PAGE);
        k.file_allocate(file, 30 * PAGE, 31 * PAGE, Size::Stays)
            .unwrap();
        // 16 pages from a multiple of 16 on, as far as the VMA reaches: here from its page 4 on.
        let base = AT + 4 * PAGE;
        map_file(k, a, base, 28, R, map::PRIVATE, (file, 4));
        assert_eq!(k.user_read(0, base), Ok(4));
        assert_eq!(k.obj(a).rss.get(), 6);
        audit(k);
        assert_eq!(k.user_read(0, base + 16 * PAGE), Ok(20));
        assert_eq!(k.obj(a).rss.get(), 7, "behind the end nothing is mapped");
        // A write maps one page, of a shared mapping too.
        map_file(k, b, base, 28, RW, map::SHARED, (file, 4));
        k.user_write(1, base, 1).unwrap();
        assert_eq!(k.obj(b).rss.get(), 1);
        k.user_read(1, base + PAGE).unwrap();
        assert_eq!(k.obj(b).rss.get(), 6);
        k.user_write(1, base + 2 * PAGE, 9).unwrap();
        assert_eq!(k.user_read(0, base + 2 * PAGE), Ok(9));
    });
    let machine = Machine::new(1, "file_fault_around=1");
    let k = machine.kernel();
    let mm = space(k, &[0]);
    let file = k.file_create().unwrap();
    put(k, file, 0, 1).unwrap();
    put(k, file, PAGE, 2).unwrap();
    map_file(k, mm, AT, 2, RW, map::SHARED, (file, 0));
    k.user_read(0, AT).unwrap();
    assert_eq!(k.obj(mm).rss.get(), 1);
    k.file_put(file);
    teardown(k, &[mm]);
}
