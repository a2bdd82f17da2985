//! Makes the address spaces of both sides alike where a case looks: the same holes, found in the same order.

use abi::layout::PAGE_SIZE;
use abi::oracle::{Area, FENCE, FENCE_GUARD};
use abi::syscall::{Errno, map, prot};

use super::interpret::{Slots, State};
use super::limits::Used;
use crate::sys::{ANONYMOUS, Sys};

/// Bytes between the heap that there is and the case's, in which nothing is mapped: more than what a case reaches below
/// the start of something.
pub(super) const APART: u64 = 1024 * PAGE_SIZE;
/// Data that a process has at least, so that brk, which compares RLIMIT_DATA with the heap alone, never is what refuses.
const BALLAST: u64 = 1 << 30;
/// Another fence above the first, because that one grows down where a case touches the guard below it: in the hole
/// between the two, where a search finds nothing either, a call ends that goes on to the first hole.
const SECOND: u64 = FENCE + PAGE_SIZE + FENCE_GUARD;
/// Sweeps over all holes before this gives up: one is enough where nobody else maps meanwhile.
const MAX_SWEEPS: usize = 16;

/// To be called once, by the process that then forks one for each case.
pub(crate) fn prepare<S: Sys>(sys: &S) -> Result<State, Errno> {
    let slots = Slots::new(sys)?;
    let reserve = ANONYMOUS | map::NORESERVE;
    sys.mmap(0, BALLAST, prot::READ | prot::WRITE, reserve)?;
    let fence = reserve | map::FIXED_NOREPLACE | map::GROWSDOWN;
    sys.mmap(FENCE, PAGE_SIZE, prot::NONE, fence)?;
    sys.mmap(SECOND, PAGE_SIZE, prot::NONE, fence)?;
    fill(sys, reserve)?;

    // A hole apart from the heap that there is: the case's begins empty, and merges with nothing.
    let used = sys.brk(0)?.next_multiple_of(PAGE_SIZE);
    let heap = used + APART;
    if sys.brk(heap)? != heap {
        return Err(Errno::ENOMEM);
    }
    sys.munmap(used, APART)?;
    Ok(State::new(heap, slots, Used::find(sys)?))
}

/// Maps all that a search from the top would find above the fence.
fn fill<S: Sys>(sys: &S, reserve: u64) -> Result<(), Errno> {
    for _ in 0..MAX_SWEEPS {
        // The highest hole; all others are below.
        let found = sys.mmap(0, PAGE_SIZE, prot::NONE, reserve)?;
        if found < FENCE {
            return sys.munmap(found, PAGE_SIZE).map(|_| ());
        }
        fill_to(sys, found, reserve)?;
    }
    Err(Errno::ENOMEM)
}

/// Maps what is not mapped between the second fence and `end`. In one pass: a program whose memory comes from mmap alone
/// has thousands of holes.
fn fill_to<S: Sys>(sys: &S, end: u64, reserve: u64) -> Result<(), Errno> {
    let fill = |from: u64, to: u64| match to.saturating_sub(from) {
        0 => Ok(0),
        len => sys.mmap(from, len, prot::NONE, reserve | map::FIXED_NOREPLACE),
    };
    let mut areas = [Area::default(); 16];
    let mut at = SECOND + PAGE_SIZE;
    while at < end {
        let found = sys.maps(at, end, &mut areas)?;
        for area in &areas[..found] {
            fill(at, area.start)?;
            at = area.end;
        }
        if found == 0 {
            fill(at, end)?;
            at = end;
        }
    }
    Ok(())
}
