//! Direct I/O of whole programs, on a disk that is done at once ([`super::machine`]).

use abi::disk::SECTOR_BYTES;
use abi::layout::PAGE_SIZE;
use abi::syscall::{Errno, map, nr, prot, signal};

use super::life::{THREAD, WORDS, machine, program};
use super::machine::{ON_DISK, User};

const FIXED: u64 = map::PRIVATE | map::ANONYMOUS | map::FIXED;
const RW: u64 = prot::READ | prot::WRITE;
/// More than are pinned at a time.
const PAGES: u64 = 40;
/// The disk fails here, and has nothing there.
const BAD: u64 = super::machine::BAD_SECTOR;
const NOWHERE: u64 = 1 << 40;

fn read(user: &mut User<'_>, gva: u64, len: u64, sector: u64) -> Result<u64, Errno> {
    user.call(nr::TESTBED_DIRECT_READ, [gva, len, sector, 0])
}

fn write(user: &mut User<'_>, gva: u64, len: u64, sector: u64) -> Result<u64, Errno> {
    user.call(nr::TESTBED_DIRECT_WRITE, [gva, len, sector, 0])
}

#[test]
fn what_is_moved_counts_and_errors_come_in_the_order_of_linux() {
    let outcome = machine(
        1,
        vec![program(|user| {
            let bytes = PAGES * PAGE_SIZE;
            user.call(nr::MMAP, [WORDS, bytes, RW, FIXED]).unwrap();
            // Nothing is there yet; part of a page at both ends.
            let (start, len) = (WORDS + SECTOR_BYTES, bytes - 2 * SECTOR_BYTES);
            assert_eq!(read(user, start, len, 100), Ok(len));
            for page in 0..PAGES {
                assert_eq!(user.load(WORDS + page * PAGE_SIZE + 512), ON_DISK);
            }
            assert_eq!(user.load(WORDS), 0, "before the first sector");
            assert_eq!(user.load(WORDS + bytes - 512), 0, "behind the last one");
            assert_eq!(write(user, WORDS, bytes, 100), Ok(bytes));
            assert_eq!(read(user, WORDS, 0, 0), Ok(0));

            assert_eq!(read(user, WORDS + 4, 512, NOWHERE), Err(Errno::EINVAL));
            assert_eq!(read(user, WORDS, 511, NOWHERE), Err(Errno::EINVAL));
            assert_eq!(read(user, 0x1000, 512, NOWHERE), Err(Errno::EFAULT));
            assert_eq!(read(user, u64::MAX - 511, 512, 0), Err(Errno::EFAULT));
            assert_eq!(read(user, WORDS, 512, NOWHERE), Err(Errno::EINVAL));
            assert_eq!(read(user, WORDS, 512, BAD), Err(Errno::EIO));
            assert_eq!(write(user, WORDS, 512, BAD), Err(Errno::EIO));
            // Up to the sector that fails, in a later batch; up to where nothing is mapped.
            let each = PAGE_SIZE / SECTOR_BYTES;
            assert_eq!(
                read(user, WORDS, bytes, BAD - 20 * each),
                Ok(20 * PAGE_SIZE)
            );
            let last = WORDS + bytes - PAGE_SIZE;
            assert_eq!(read(user, last, 2 * PAGE_SIZE, 0), Ok(PAGE_SIZE));

            user.call(nr::MPROTECT, [last, PAGE_SIZE, prot::READ, 0])
                .unwrap();
            assert_eq!(read(user, last, 512, 0), Err(Errno::EFAULT));
            assert_eq!(write(user, last, 512, 0), Ok(512));
            0
        })],
    );
    assert_eq!(outcome.status, 0);
}

/// On real cores: one thread has the disk write to a page while another one forks and writes the page itself. Both must
/// find what they wrote.
#[test]
fn a_device_and_a_process_that_forks_meet_in_one_page() {
    const ROUNDS: u32 = 200;
    let outcome = machine(
        3,
        vec![
            program(|user| {
                user.call(nr::MMAP, [WORDS, 2 * PAGE_SIZE, RW, FIXED])
                    .unwrap();
                user.store(WORDS + PAGE_SIZE, 0);
                user.clone(THREAD, 0, 1).unwrap();
                for round in 1..=ROUNDS {
                    let pid = user.clone(signal::SIGCHLD, 0, 2).unwrap();
                    user.store(WORDS + 1024, round);
                    assert_eq!(user.load(WORDS + 1024), round);
                    user.call(nr::WAIT4, [pid, 0, 0, 0]).unwrap();
                }
                // Until the other one is through too.
                while user.load(WORDS + PAGE_SIZE) == 0 {
                    user.call(nr::SCHED_YIELD, [0; 4]).unwrap();
                }
                0
            }),
            program(|user| {
                for _ in 0..ROUNDS {
                    user.store(WORDS, 1);
                    assert_eq!(read(user, WORDS, 512, 0), Ok(512));
                    assert_eq!(user.load(WORDS), ON_DISK, "the device wrote elsewhere");
                }
                user.store(WORDS + PAGE_SIZE, 1);
                0
            }),
            program(|_| 0),
        ],
    );
    assert_eq!(outcome.status, 0);
}
