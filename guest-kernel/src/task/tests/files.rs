//! Descriptors and the calls on files, as programs make them.

use abi::layout::{PAGE_SIZE, USER_END};
use abi::syscall::{Errno, clone, falloc, map, nr, prot, seek, signal};

use super::life::{THREAD, WORDS, alone, join, machine, map_words, program};
use super::machine::User;

const RW: u64 = prot::READ | prot::WRITE;
/// Where programs map files.
const FILE: u64 = 0x2000_0000;
/// A buffer, after the words that tests use.
const BUFFER: u64 = WORDS + 0x1000;
const MINUS_ONE: u64 = u64::MAX;

fn memfd(user: &mut User<'_>) -> u64 {
    // The words begin with zeroes: an empty name.
    user.call(nr::MEMFD_CREATE, [WORDS + 0x800, 0, 0, 0])
        .unwrap()
}

fn map_fd(user: &mut User<'_>, fd: u64, sharing: u64) {
    let args = [FILE, 4 * PAGE_SIZE, RW, sharing | map::FIXED, fd, 0];
    assert_eq!(user.call6(nr::MMAP, args), Ok(FILE));
}

#[test]
fn files_are_written_read_and_sought() {
    alone(|user| {
        let fd = memfd(user);
        assert_eq!(fd, 3);
        user.store(BUFFER, 0x0403_0201);
        assert_eq!(user.call(nr::WRITE, [fd, BUFFER, 4, 0]), Ok(4));
        assert_eq!(
            user.call(nr::PWRITE64, [fd, BUFFER, 2, PAGE_SIZE - 1]),
            Ok(2)
        );
        assert_eq!(
            user.call(nr::LSEEK, [fd, 0, seek::END, 0]),
            Ok(PAGE_SIZE + 1)
        );
        assert_eq!(user.call(nr::LSEEK, [fd, 1, seek::SET, 0]), Ok(1));
        assert_eq!(user.call(nr::READ, [fd, BUFFER + 4, 4, 0]), Ok(4));
        assert_eq!(user.load(BUFFER + 4), 0x0004_0302);
        assert_eq!(user.call(nr::LSEEK, [fd, MINUS_ONE, seek::CUR, 0]), Ok(4));
        // Over the page boundary, to the end.
        assert_eq!(
            user.call(nr::PREAD64, [fd, BUFFER + 8, 100, PAGE_SIZE - 2]),
            Ok(3)
        );
        assert_eq!(user.load(BUFFER + 8), 0x0002_0100);
        assert_eq!(user.call(nr::READ, [fd, BUFFER, 0, 0]), Ok(0));
        assert_eq!(
            user.call(nr::PREAD64, [fd, BUFFER, 8, 2 * PAGE_SIZE]),
            Ok(0)
        );
        // A buffer that ends in nothing takes what fits.
        let edge = WORDS + 0x4000;
        assert_eq!(user.call(nr::PREAD64, [fd, edge - 256, 1000, 0]), Ok(256));
        assert_eq!(user.call(nr::PREAD64, [fd, edge, 8, 0]), Err(Errno::EFAULT));
        assert_eq!(user.call(nr::WRITE, [fd, edge, 8, 0]), Err(Errno::EFAULT));
        // One that ends within what is copied at a time, likewise.
        assert_eq!(user.call(nr::PREAD64, [fd, edge - 3, 1000, 0]), Ok(3));
        assert_eq!(user.call(nr::PWRITE64, [fd, edge - 5, 1000, 9]), Ok(5));
        let beyond = user.call(nr::READ, [fd, USER_END - 4, 8, 0]);
        assert_eq!(beyond, Err(Errno::EFAULT));
    });
}

#[test]
fn a_write_that_faults_at_once_makes_a_page_and_ends_the_file_there() {
    // mm/filemap.c, generic_perform_write: shmem_write_end of 0 bytes comes before the fault.
    alone(|user| {
        let fd = memfd(user);
        let edge = WORDS + 0x4000;
        let place = PAGE_SIZE + 8;
        let write = [fd, edge, 8, place];
        assert_eq!(user.call(nr::PWRITE64, write), Err(Errno::EFAULT));
        assert_eq!(user.call(nr::LSEEK, [fd, 0, seek::END, 0]), Ok(place));
        // Never shorter.
        let write = [fd, edge, 8, 0];
        assert_eq!(user.call(nr::PWRITE64, write), Err(Errno::EFAULT));
        assert_eq!(user.call(nr::LSEEK, [fd, 0, seek::END, 0]), Ok(place));
        map_fd(user, fd, map::SHARED);
        // From behind the end of the file itself, which lies elsewhere then.
        let write = [fd, FILE + 2 * PAGE_SIZE, 8, 3 * PAGE_SIZE];
        assert_eq!(user.call(nr::PWRITE64, write), Ok(8));
        let look = [FILE, 3 * PAGE_SIZE, BUFFER, 0];
        assert_eq!(user.call(nr::MINCORE, look), Ok(0));
        assert_eq!(user.load(BUFFER) & 0x00ff_ffff, 0x0001_0101);
    });
}

#[test]
fn bad_descriptors_and_arguments_are_refused_as_linux_refuses_them() {
    alone(|user| {
        let fd = memfd(user);
        let ends = i64::MAX.cast_unsigned();
        for (call, args, expected) in [
            (nr::READ, [9, BUFFER, 1, 0], Errno::EBADF),
            (nr::CLOSE, [9, 0, 0, 0], Errno::EBADF),
            (nr::CLOSE, [MINUS_ONE, 0, 0, 0], Errno::EBADF),
            (nr::DUP, [9, 0, 0, 0], Errno::EBADF),
            (nr::FTRUNCATE, [9, 0, 0, 0], Errno::EBADF),
            // The size comes before the descriptor.
            (nr::FTRUNCATE, [9, MINUS_ONE, 0, 0], Errno::EINVAL),
            (nr::FTRUNCATE, [1, 0, 0, 0], Errno::EINVAL),
            (nr::LSEEK, [1, 0, 0, 0], Errno::ESPIPE),
            (nr::LSEEK, [fd, MINUS_ONE, seek::SET, 0], Errno::EINVAL),
            (nr::LSEEK, [fd, 0, 9, 0], Errno::EINVAL),
            (nr::PREAD64, [1, BUFFER, 1, 0], Errno::ESPIPE),
            (nr::PREAD64, [9, BUFFER, 1, MINUS_ONE], Errno::EINVAL),
            (nr::PWRITE64, [fd, BUFFER, 1, ends], Errno::EINVAL),
            (nr::PREAD64, [fd, BUFFER, 8, ends - 4], Errno::EINVAL),
            (nr::PREAD64, [fd, USER_END, 8, ends], Errno::EFAULT),
            (nr::FALLOCATE, [9, 0, 0, 0], Errno::EBADF),
            (nr::FALLOCATE, [fd, 0, 0, 0], Errno::EINVAL),
            (
                nr::FALLOCATE,
                [fd, falloc::PUNCH_HOLE, 0, 1],
                Errno::EOPNOTSUPP,
            ),
            (nr::FALLOCATE, [fd, 0, ends, ends], Errno::EFBIG),
            (nr::FALLOCATE, [1, 0, 0, 1], Errno::ENODEV),
            (nr::MEMFD_CREATE, [WORDS + 0x800, 0x20, 0, 0], Errno::EINVAL),
            (nr::MEMFD_CREATE, [WORDS + 0x800, 0x18, 0, 0], Errno::EINVAL),
            (nr::MEMFD_CREATE, [0, 0, 0, 0], Errno::EFAULT),
        ] {
            assert_eq!(user.call(call, args), Err(expected), "{call} {args:x?}");
        }
        for at in (0..256).step_by(4) {
            user.store(BUFFER + at, 0x4141_4141);
        }
        let long = user.call(nr::MEMFD_CREATE, [BUFFER, 0, 0, 0]);
        assert_eq!(long, Err(Errno::EINVAL));
        let mut mmap =
            |len, flags, fd, offset| user.call6(nr::MMAP, [0, len, RW, flags, fd, offset]);
        assert_eq!(mmap(PAGE_SIZE, map::SHARED, fd, 8), Err(Errno::EINVAL));
        assert_eq!(mmap(PAGE_SIZE, map::SHARED, 9, 8), Err(Errno::EINVAL));
        assert_eq!(mmap(0, map::SHARED, 9, 0), Err(Errno::EBADF));
        assert_eq!(mmap(0, map::SHARED, fd, 0), Err(Errno::EINVAL));
        assert_eq!(mmap(PAGE_SIZE, map::SHARED, 1, 0), Err(Errno::ENODEV));
        assert_eq!(
            mmap(PAGE_SIZE, map::SHARED, MINUS_ONE, 0),
            Err(Errno::EBADF)
        );
    });
}

#[test]
fn descriptors_are_given_from_the_lowest_and_run_out() {
    alone(|user| {
        let first = memfd(user);
        for fd in 4..32 {
            assert_eq!(user.call(nr::DUP, [first, 0, 0, 0]), Ok(fd));
        }
        assert_eq!(user.call(nr::DUP, [first, 0, 0, 0]), Err(Errno::EMFILE));
        let full = user.call(nr::MEMFD_CREATE, [WORDS + 0x800, 0, 0, 0]);
        assert_eq!(full, Err(Errno::EMFILE));
        // The console is a descriptor like any other.
        assert_eq!(user.call(nr::CLOSE, [2, 0, 0, 0]), Ok(0));
        assert_eq!(user.call(nr::WRITE, [2, WORDS, 1, 0]), Err(Errno::EBADF));
        assert_eq!(user.call(nr::DUP, [first, 0, 0, 0]), Ok(2));
        // They share one position.
        assert_eq!(user.call(nr::WRITE, [2, WORDS, 4, 0]), Ok(4));
        assert_eq!(user.call(nr::LSEEK, [9, 0, seek::CUR, 0]), Ok(4));
        assert_eq!(user.call(nr::CLOSE, [first, 0, 0, 0]), Ok(0));
        assert_eq!(user.call(nr::LSEEK, [9, 0, seek::END, 0]), Ok(4));
    });
}

#[test]
fn a_file_outlives_its_descriptor_where_it_is_mapped() {
    alone(|user| {
        let fd = memfd(user);
        assert_eq!(user.call(nr::FTRUNCATE, [fd, PAGE_SIZE, 0, 0]), Ok(0));
        map_fd(user, fd, map::SHARED);
        user.store(FILE, 7);
        assert_eq!(user.call(nr::PREAD64, [fd, BUFFER, 4, 0]), Ok(4));
        assert_eq!(user.load(BUFFER), 7);
        assert_eq!(user.call(nr::CLOSE, [fd, 0, 0, 0]), Ok(0));
        assert_eq!(user.load(FILE), 7);
        // From the file into itself.
        let again = memfd(user);
        assert_eq!(
            user.call(nr::WRITE, [again, FILE, PAGE_SIZE, 0]),
            Ok(PAGE_SIZE)
        );
        assert_eq!(user.call(nr::READ, [0, BUFFER, 1, 0]), Ok(0));
    });
}

#[test]
fn behind_the_end_a_program_gets_sigbus() {
    let outcome = machine(
        1,
        vec![program(|user| {
            map_words(user);
            let fd = memfd(user);
            map_fd(user, fd, map::SHARED);
            user.load(FILE);
            0
        })],
    );
    assert_eq!(outcome.status, signal::SIGBUS as u32 + 128);
}

#[test]
fn fork_copies_descriptors_and_threads_share_them() {
    let parent = |user: &mut User<'_>| {
        map_words(user);
        let fd = memfd(user);
        assert_eq!(user.call(nr::FTRUNCATE, [fd, PAGE_SIZE, 0, 0]), Ok(0));
        map_fd(user, fd, map::SHARED);
        user.store(FILE, 1);
        let child = user.clone(signal::SIGCHLD, 0, 1).unwrap();
        let wait = [child, BUFFER, 0, 0];
        assert_eq!(user.call(nr::WAIT4, wait), Ok(child));
        assert_eq!(user.load(BUFFER), 0);
        // The child has moved the position and written through its mapping, and closed its own copy.
        assert_eq!(user.load(FILE), 2);
        assert_eq!(user.call(nr::LSEEK, [fd, 0, seek::CUR, 0]), Ok(4));
        let flags = THREAD | clone::PARENT_SETTID | clone::CHILD_CLEARTID;
        user.clone(flags, WORDS + 0x100, 2).unwrap();
        join(user, WORDS + 0x100);
        assert_eq!(user.call(nr::CLOSE, [fd, 0, 0, 0]), Err(Errno::EBADF));
        5
    };
    let child = |user: &mut User<'_>| {
        assert_eq!(user.load(FILE), 1);
        assert_eq!(user.call(nr::READ, [3, BUFFER, 4, 0]), Ok(4));
        user.store(FILE, 2);
        assert_eq!(user.call(nr::CLOSE, [3, 0, 0, 0]), Ok(0));
        0
    };
    let thread = |user: &mut User<'_>| {
        assert_eq!(user.call(nr::CLOSE, [3, 0, 0, 0]), Ok(0));
        0
    };
    for cpus in [1, 2] {
        let programs = vec![program(parent), program(child), program(thread)];
        assert_eq!(machine(cpus, programs).status, 5);
    }
}

/// Everything at once on real threads: mappings, copies, holes, sizes, forks. What is read was written.
#[test]
fn a_file_that_everybody_uses_and_changes_at_once() {
    const THREADS: u64 = 3;
    const ROUNDS: u32 = 60;
    let parent = |user: &mut User<'_>| {
        map_words(user);
        let fd = memfd(user);
        assert_eq!(user.call(nr::FTRUNCATE, [fd, 4 * PAGE_SIZE, 0, 0]), Ok(0));
        map_fd(user, fd, map::SHARED);
        for i in 0..THREADS {
            let flags = THREAD | clone::PARENT_SETTID | clone::CHILD_CLEARTID;
            user.clone(flags, WORDS + 0x100 + 4 * i, 1 + i % 2).unwrap();
        }
        for round in 0..u64::from(ROUNDS) {
            let mode = falloc::PUNCH_HOLE | falloc::KEEP_SIZE;
            let (at, len) = (round % 4 * PAGE_SIZE, PAGE_SIZE + round % 3 * 100);
            assert_eq!(user.call(nr::FALLOCATE, [fd, mode, at, len]), Ok(0));
            if round % 8 == 0 {
                let child = user.clone(signal::SIGCHLD, 0, 3).unwrap();
                assert_eq!(user.call(nr::WAIT4, [child, BUFFER, 0, 0]), Ok(child));
                assert_eq!(user.load(BUFFER), 0);
            }
        }
        for i in 0..THREADS {
            join(user, WORDS + 0x100 + 4 * i);
        }
        5
    };
    let check = |value: u32| assert!(value == 0 || value >> 16 == 0xabcd, "{value:#x}");
    let mapper = move |user: &mut User<'_>| {
        for round in 0..ROUNDS {
            let gva = FILE + u64::from(round % 4) * PAGE_SIZE;
            check(user.load(gva));
            user.store(gva, 0xabcd_0000 | round);
        }
        0
    };
    let writer = move |user: &mut User<'_>| {
        for round in 0..ROUNDS {
            let own = WORDS + 0x200;
            user.store(own, 0xabcd_0000 | round);
            let at = u64::from(round % 4) * PAGE_SIZE;
            assert_eq!(user.call(nr::PWRITE64, [3, own, 4, at]), Ok(4));
            assert_eq!(user.call(nr::PREAD64, [3, own + 8, 4, at]), Ok(4));
            check(user.load(own + 8));
        }
        0
    };
    let child = move |user: &mut User<'_>| {
        for page in 0..4 {
            check(user.load(FILE + page * PAGE_SIZE));
            user.store(FILE + page * PAGE_SIZE, 0xabcd_1000);
        }
        0
    };
    for cpus in [1, 2, 4] {
        let programs = vec![
            program(parent),
            program(mapper),
            program(writer),
            program(child),
        ];
        assert_eq!(machine(cpus, programs).status, 5);
    }
}
