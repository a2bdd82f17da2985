//! Files on the disk as programs use them, on a disk that is done at once and keeps nothing ([`super::machine`]).

use abi::layout::PAGE_SIZE;
use abi::syscall::{Errno, advice, fadvise, falloc, map, msync, nr, prot, seek, signal};

use super::life::{THREAD, WORDS, alone, machine, map_words, program};
use super::machine::{BAD_SECTOR, ON_DISK, User};

const RW: u64 = prot::READ | prot::WRITE;
/// Where programs map files.
const FILE: u64 = 0x2000_0000;
/// A buffer, after the words that tests use.
const BUFFER: u64 = WORDS + 0x1000;
const SECTORS: u64 = PAGE_SIZE / 512;
/// Sectors of which the first page can be read, and the second cannot.
const EDGE: u64 = BAD_SECTOR / SECTORS * SECTORS - SECTORS;

fn open(user: &mut User<'_>, sector: u64, pages: u64) -> u64 {
    let args = [sector, pages * PAGE_SIZE, 0, 0];
    user.call(nr::TESTBED_DISK_FILE, args).unwrap()
}

fn map_fd(user: &mut User<'_>, fd: u64, pages: u64) {
    let args = [FILE, pages * PAGE_SIZE, RW, map::SHARED | map::FIXED, fd, 0];
    assert_eq!(user.call6(nr::MMAP, args), Ok(FILE));
}

#[test]
fn a_file_on_the_disk_is_read_written_and_synced() {
    alone(|user| {
        let fd = open(user, 0, 4);
        let size = 4 * PAGE_SIZE;
        assert_eq!(user.call(nr::LSEEK, [fd, 0, seek::END, 0]), Ok(size));
        assert_eq!(user.call(nr::PREAD64, [fd, BUFFER, 600, 100]), Ok(600));
        assert_eq!(user.load(BUFFER + 596), ON_DISK);
        user.store(BUFFER, 7);
        assert_eq!(user.call(nr::PWRITE64, [fd, BUFFER, 4, 8]), Ok(4));
        map_fd(user, fd, 4);
        assert_eq!((user.load(FILE + 8), user.load(FILE + 12)), (7, ON_DISK));
        user.store(FILE + PAGE_SIZE, 9);
        for call in [nr::FSYNC, nr::FDATASYNC] {
            assert_eq!(user.call(call, [fd, 0, 0, 0]), Ok(0));
        }
        let msync = [FILE, size, msync::SYNC, 0];
        assert_eq!(user.call(nr::MSYNC, msync), Ok(0));
        // At the end of it, and over it.
        let last = size - 8;
        assert_eq!(user.call(nr::PREAD64, [fd, BUFFER, 100, last]), Ok(8));
        assert_eq!(user.call(nr::PWRITE64, [fd, BUFFER, 100, last]), Ok(8));
        let behind = user.call(nr::PWRITE64, [fd, BUFFER, 8, size]);
        assert_eq!(behind, Err(Errno::ENOSPC));
        assert_eq!(user.call(nr::PWRITE64, [fd, BUFFER, 0, size]), Ok(0));
        // What this disk keeps is seen when the pages come back.
        let drop = [fd, PAGE_SIZE, size - PAGE_SIZE, fadvise::DONTNEED];
        assert_eq!(user.call(nr::FADVISE64, drop), Ok(0));
        assert_eq!(user.load(FILE + PAGE_SIZE), 9, "mapped");
        let unmap = [FILE, size, advice::DONTNEED, 0];
        assert_eq!(user.call(nr::MADVISE, unmap), Ok(0));
        assert_eq!(user.call(nr::FADVISE64, drop), Ok(0));
        assert_eq!(user.load(FILE + PAGE_SIZE), ON_DISK);
        assert_eq!(user.load(FILE + 8), 7, "before the range");
    });
}

#[test]
fn calls_on_files_on_the_disk_are_refused_as_linux_refuses_them() {
    alone(|user| {
        let fd = open(user, 0, 1);
        for (call, args, expected) in [
            (nr::FTRUNCATE, [fd, 0, 0, 0], Errno::EINVAL),
            (nr::FALLOCATE, [fd, 0, 0, 1], Errno::EOPNOTSUPP),
            (
                nr::FALLOCATE,
                [fd, falloc::PUNCH_HOLE | falloc::KEEP_SIZE, 0, 1],
                Errno::EOPNOTSUPP,
            ),
            (nr::FSYNC, [9, 0, 0, 0], Errno::EBADF),
            (nr::FSYNC, [1, 0, 0, 0], Errno::EINVAL),
            (nr::FADVISE64, [9, 0, 0, 0], Errno::EBADF),
            (nr::FADVISE64, [1, 0, 0, 0], Errno::ESPIPE),
            (nr::FADVISE64, [fd, 0, u64::MAX, 0], Errno::EINVAL),
            (nr::FADVISE64, [fd, 0, 0, 6], Errno::EINVAL),
            (nr::TESTBED_DISK_FILE, [0, 5, 0, 0], Errno::EINVAL),
        ] {
            assert_eq!(user.call(call, args), Err(expected), "{call} {args:?}");
        }
        assert_eq!(user.call(nr::FADVISE64, [fd, 0, 0, 5]), Ok(0));
    });
}

#[test]
fn a_disk_that_fails_is_eio_once_for_what_it_does_not_take() {
    alone(|user| {
        let fd = open(user, EDGE, 2);
        assert_eq!(user.call(nr::FSYNC, [fd, 0, 0, 0]), Ok(0));
        // As far as it can be read.
        let len = 2 * PAGE_SIZE;
        assert_eq!(user.call(nr::PREAD64, [fd, BUFFER, len, 0]), Ok(PAGE_SIZE));
        let bad = [fd, BUFFER, 8, PAGE_SIZE];
        assert_eq!(user.call(nr::PREAD64, bad), Err(Errno::EIO));
        assert_eq!(user.call(nr::PWRITE64, bad), Err(Errno::EIO));
        map_fd(user, fd, 2);
        assert_eq!(user.load(FILE), ON_DISK);
        let args = [FILE, len, advice::POPULATE_READ, 0];
        assert_eq!(user.call(nr::MADVISE, args), Err(Errno::EFAULT));
    });
}

#[test]
fn a_page_that_cannot_be_read_kills_who_touches_it() {
    let outcome = machine(
        1,
        vec![program(|user| {
            let fd = open(user, EDGE, 2);
            map_fd(user, fd, 2);
            user.load(FILE + PAGE_SIZE).into()
        })],
    );
    assert_eq!(outcome.status, signal::SIGBUS as u32 + 128);
}

/// On real cores: two threads write and sync the same pages, and drop what they can. Neither loses a write while the pages
/// stay mapped by the other's entries.
#[test]
fn two_threads_write_and_sync_at_once() {
    const ROUNDS: u32 = 200;
    let outcome = machine(
        2,
        vec![
            program(|user| {
                map_words(user);
                let fd = open(user, 0, 2);
                map_fd(user, fd, 2);
                user.clone(THREAD, 0, 1).unwrap();
                for _ in 0..ROUNDS {
                    user.add(FILE, 1);
                    user.add(FILE + PAGE_SIZE + 4, 1);
                    user.call(nr::FSYNC, [fd, 0, 0, 0]).unwrap();
                }
                while user.load(WORDS) == 0 {
                    user.call(nr::SCHED_YIELD, [0; 4]).unwrap();
                }
                let sums = [8, PAGE_SIZE + 4].map(|at| user.load(FILE + at) - ON_DISK);
                assert_eq!(sums, [ROUNDS; 2]);
                assert_eq!(user.load(FILE) - ON_DISK, 2 * ROUNDS);
                0
            }),
            program(|user| {
                for _ in 0..ROUNDS {
                    user.add(FILE, 1);
                    user.add(FILE + 8, 1);
                    let range = [FILE, 2 * PAGE_SIZE, msync::SYNC, 0];
                    user.call(nr::MSYNC, range).unwrap();
                }
                user.store(WORDS, 1);
                0
            }),
        ],
    );
    assert_eq!(outcome.status, 0);
}
