//! Running out of memory at every allocation of every operation.

use abi::boot::Segment;
use abi::layout::{USER_BRK_START, USER_STACK_TOP};
use abi::objects::{AnonVma, AnonVmaChain, FrameKind, Mm, Pa, Vma, VmaNode};
use abi::syscall::{Errno, advice, map, mremap, prot};

use super::{ANON, AT, PAGE, RW, TestKernel, audit, map_at, maps, space, teardown};
use crate::Kernel;
use crate::arch::model::testing::{Machine, SEGMENTS};
use crate::mm::{FaultError, Field, Slabbed};

/// All memory but a few frames, and every free object of every slab.
struct Starved {
    frames: Vec<u64>,
    mms: Vec<Pa<Mm>>,
    vmas: Vec<Pa<Vma>>,
    nodes: Vec<Pa<VmaNode>>,
    anons: Vec<Pa<AnonVma>>,
    chains: Vec<Pa<AnonVmaChain>>,
}

fn drain<T: Slabbed>(kernel: &TestKernel) -> Vec<Pa<T>> {
    let slab = &kernel.root().slabs[T::ID as usize];
    std::iter::from_fn(|| (slab.free.get() != 0).then(|| kernel.slab_alloc::<T>().unwrap()))
        .collect()
}

fn starve(kernel: &TestKernel, left: usize) -> Starved {
    let alloc = || kernel.alloc_frames(0, FrameKind::Stack).ok();
    let mut starved = Starved {
        mms: drain(kernel),
        vmas: drain(kernel),
        nodes: drain(kernel),
        anons: drain(kernel),
        chains: drain(kernel),
        frames: std::iter::from_fn(alloc).collect(),
    };
    for frame in starved.frames.drain(..left) {
        kernel.free_frames(frame);
    }
    starved
}

fn feed(kernel: &TestKernel, starved: Starved) {
    fn give<T: Slabbed>(kernel: &TestKernel, objects: Vec<Pa<T>>) {
        objects.into_iter().for_each(|o| kernel.slab_free(o));
    }
    starved
        .frames
        .into_iter()
        .for_each(|f| kernel.free_frames(f));
    give(kernel, starved.mms);
    give(kernel, starved.vmas);
    give(kernel, starved.nodes);
    give(kernel, starved.anons);
    give(kernel, starved.chains);
}

/// The pages of `mm`: address, permissions, contents where they can be read.
fn pages(kernel: &TestKernel, mm: Pa<Mm>) -> Vec<(u64, u64, Option<u64>)> {
    let mut pages = Vec::new();
    for (start, end, access) in maps(kernel, mm) {
        for gva in (start..end).step_by(PAGE as usize) {
            pages.push((gva, access, kernel.user_read(0, gva).ok()));
        }
    }
    pages
}

/// A process with some of everything, on CPUs 0 and 1.
fn process(kernel: &TestKernel) -> Pa<Mm> {
    let mm = space(kernel, &[0, 1]);
    map_at(kernel, mm, AT, 9, RW);
    for page in 0..8 {
        kernel.user_write(1, AT + page * PAGE, 100 + page).unwrap();
    }
    map_at(kernel, mm, AT + 20 * PAGE, 2, prot::READ);
    kernel.map_stack(mm, USER_STACK_TOP, 2 * PAGE).unwrap();
    kernel.user_write(0, USER_STACK_TOP - 8, 1).unwrap();
    mm
}

/// Runs `operation` with 0, 1, 2... frames left until it succeeds. When it fails nothing may have
/// changed for the program, whatever it has used may be gone; and everything must add up.
fn at_every_allocation<T>(
    prepare: impl Fn(&TestKernel, Pa<Mm>) -> Vec<Pa<Mm>>,
    operation: impl Fn(&TestKernel, Pa<Mm>) -> Result<T, Errno>,
    undo: impl Fn(&TestKernel, T),
) {
    let mut failures = 0;
    for left in 0.. {
        let machine = Machine::with_memory(1 << 20, 2, "pcp_batch=0");
        let kernel = machine.kernel();
        let mm = process(kernel);
        let mut mms = prepare(kernel, mm);
        mms.push(mm);
        let before = pages(kernel, mm);
        let starved = starve(kernel, left);
        let result = operation(kernel, mm);
        feed(kernel, starved);
        let failed = match result {
            Ok(done) => {
                undo(kernel, done);
                false
            }
            Err(error) => {
                assert!([Errno::ENOMEM, Errno::EAGAIN].contains(&error));
                assert_eq!(pages(kernel, mm), before, "with {left} frames left");
                true
            }
        };
        audit(kernel);
        teardown(kernel, &mms);
        if !failed {
            break;
        }
        failures += 1;
    }
    assert!(failures > 0, "the operation allocates nothing");
}

fn nothing(_: &TestKernel, _: Pa<Mm>) -> Vec<Pa<Mm>> {
    Vec::new()
}

fn done<T>(_: &TestKernel, _: T) {}

fn killed(error: FaultError) -> Errno {
    assert_eq!(error, FaultError::NoMemory);
    Errno::ENOMEM
}

#[test]
fn mmap_and_its_relatives() {
    at_every_allocation(nothing, |k, mm| k.mmap(mm, 0, PAGE, prot::READ, ANON), done);
    let over = |k: &TestKernel, mm| k.mmap(mm, AT + 3 * PAGE, 2 * PAGE, 0, ANON | map::FIXED);
    at_every_allocation(nothing, over, done);
    at_every_allocation(nothing, |k, mm| k.munmap(mm, AT + 3 * PAGE, PAGE), done);
    let grow = |k: &TestKernel, mm| {
        let wanted = USER_BRK_START + PAGE;
        (k.brk(mm, wanted) == wanted)
            .then_some(())
            .ok_or(Errno::ENOMEM)
    };
    at_every_allocation(nothing, grow, done);
}

#[test]
fn mprotect_and_madvise() {
    let protect = |k: &TestKernel, mm| k.mprotect(mm, AT + 3 * PAGE, PAGE, prot::READ);
    at_every_allocation(nothing, protect, done);
    let advise = |k: &TestKernel, mm| k.madvise(mm, AT + PAGE, PAGE, advice::SEQUENTIAL);
    at_every_allocation(nothing, advise, done);
}

#[test]
fn mremap_and_the_locks() {
    let to = AT + (1 << 40);
    let fixed = mremap::MAYMOVE | mremap::FIXED;
    let part =
        move |k: &TestKernel, mm| k.mremap(mm, AT + 2 * PAGE, (3 * PAGE, 3 * PAGE), fixed, to);
    at_every_allocation(nothing, part, done);
    let grow = |k: &TestKernel, mm| {
        k.mmap(mm, AT + 9 * PAGE, PAGE, 0, ANON | map::FIXED)?;
        k.mremap(mm, AT, (9 * PAGE, 12 * PAGE), mremap::MAYMOVE, 0)
    };
    // The page that is in the way is part of the state.
    let blocked = |k: &TestKernel, mm: Pa<Mm>| {
        map_at(k, mm, AT + 9 * PAGE, 1, 0);
        vec![]
    };
    at_every_allocation(blocked, grow, done);
    let keep = mremap::MAYMOVE | mremap::DONTUNMAP;
    let kept = move |k: &TestKernel, mm| k.mremap(mm, AT, (9 * PAGE, 9 * PAGE), keep, to);
    at_every_allocation(nothing, kept, done);
    let lock = |k: &TestKernel, mm| k.mlock(mm, AT + 3 * PAGE, PAGE, 0);
    at_every_allocation(nothing, lock, done);
    let wipe = |k: &TestKernel, mm| k.madvise(mm, AT + PAGE, PAGE, advice::WIPEONFORK);
    at_every_allocation(nothing, wipe, done);
}

#[test]
fn a_page_that_goes_back_between_its_neighbours_needs_no_memory() {
    let machine = Machine::with_memory(1 << 20, 2, "pcp_batch=0");
    let k = machine.kernel();
    let mm = process(k);
    let (at, to) = (AT + 4 * PAGE, AT + (1 << 40));
    let move_to = |from, to| {
        let fixed = mremap::MAYMOVE | mremap::FIXED;
        k.mremap(mm, from, (PAGE, PAGE), fixed, to)
    };
    let vmas = maps(k, mm);
    assert_eq!(move_to(at, to), Ok(to));
    let starved = starve(k, 0);
    assert_eq!(move_to(to, at), Ok(at));
    feed(k, starved);
    assert_eq!(maps(k, mm), vmas);
    assert_eq!(k.user_read(0, at), Ok(104));
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn locking_without_memory_for_the_pages_locks_and_fails() {
    let machine = Machine::with_memory(1 << 20, 2, "pcp_batch=0");
    let k = machine.kernel();
    let mm = process(k);
    map_at(k, mm, AT + 100 * PAGE, 4, RW);
    let starved = starve(k, 2);
    assert_eq!(
        k.mlock(mm, AT + 100 * PAGE, 4 * PAGE, 0),
        Err(Errno::EAGAIN)
    );
    let populate = k.madvise(mm, AT + 100 * PAGE, 4 * PAGE, advice::POPULATE_WRITE);
    assert_eq!(populate, Err(Errno::ENOMEM));
    feed(k, starved);
    assert_eq!(k.obj(mm).locked_vm.get(), 4);
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn a_merge_that_has_to_borrow_an_anon_vma() {
    // The untouched neighbour takes the touched one's range, and with it a chain.
    let prepare = |k: &TestKernel, mm: Pa<Mm>| {
        map_at(k, mm, AT + 31 * PAGE, 1, RW);
        k.user_write(0, AT + 31 * PAGE, 1).unwrap();
        k.mprotect(mm, AT + 31 * PAGE, PAGE, prot::READ).unwrap();
        map_at(k, mm, AT + 30 * PAGE, 1, RW);
    };
    // The reads of `pages` would touch the neighbour: nothing is compared but the audit.
    for left in 0..4 {
        let machine = Machine::with_memory(1 << 20, 2, "pcp_batch=0");
        let k = machine.kernel();
        let mm = process(k);
        prepare(k, mm);
        let starved = starve(k, left);
        let result = k.mprotect(mm, AT + 31 * PAGE, PAGE, RW);
        feed(k, starved);
        assert_eq!(result.is_err(), left == 0);
        audit(k);
        teardown(k, &[mm]);
    }
}

#[test]
fn faults() {
    let write = |gva| move |k: &TestKernel, _| k.user_write(0, gva, 5).map_err(killed);
    // The first touch of a VMA, in a region without tables.
    for left in 0..8 {
        let machine = Machine::with_memory(1 << 20, 2, "pcp_batch=0");
        let k = machine.kernel();
        let mm = process(k);
        map_at(k, mm, AT + (1 << 30), 1, RW);
        let starved = starve(k, left);
        let result = write(AT + (1 << 30))(k, mm);
        feed(k, starved);
        // Anon_vma, chain, two tables and the frame.
        assert_eq!(result.is_err(), left < 5, "with {left} frames left");
        audit(k);
        teardown(k, &[mm]);
    }
    at_every_allocation(|k, mm| vec![k.mm_fork(mm).unwrap()], write(AT), done);
    // A stack that grows stays grown if only the frame is missing, as in Linux.
    for left in 0..3 {
        let machine = Machine::with_memory(1 << 20, 2, "pcp_batch=0");
        let k = machine.kernel();
        let mm = process(k);
        let starved = starve(k, left);
        let result = write(USER_STACK_TOP - 40 * PAGE)(k, mm);
        feed(k, starved);
        assert_eq!(result.is_err(), left == 0);
        audit(k);
        teardown(k, &[mm]);
    }
}

#[test]
fn fork() {
    let fork = |k: &TestKernel, mm| k.mm_fork(mm);
    at_every_allocation(nothing, fork, Kernel::mm_put);
    // A grandchild: more chains, and an anon_vma that may be reused.
    let family = |k: &TestKernel, mm| {
        let child = k.mm_fork(mm).unwrap();
        k.user_write(0, AT, 9).unwrap();
        vec![child]
    };
    at_every_allocation(family, fork, Kernel::mm_put);
}

#[test]
fn a_parent_goes_on_after_a_failed_fork() {
    let machine = Machine::with_memory(1 << 20, 2, "");
    let k = machine.kernel();
    let mm = process(k);
    let starved = starve(k, 8);
    assert_eq!(k.mm_fork(mm), Err(Errno::ENOMEM));
    // No memory, and none needed: every folio is the parent's alone again.
    for page in 0..8 {
        k.user_write(1, AT + page * PAGE, page).unwrap();
        assert_eq!(k.user_read(0, AT + page * PAGE), Ok(page));
    }
    feed(k, starved);
    audit(k);
    teardown(k, &[mm]);
}

#[test]
fn segments_and_address_spaces() {
    at_every_allocation(nothing, |k, _| k.mm_create(), Kernel::mm_put);
    for left in 0..8 {
        let machine = Machine::with_memory(1 << 20, 2, "pcp_batch=0");
        let k = machine.kernel();
        let mm = k.mm_create().unwrap();
        let starved = starve(k, left);
        let segment = Segment {
            gva: AT,
            gpa: SEGMENTS,
            bytes: PAGE,
            prot: RW,
        };
        let result = k.map_segment(mm, &segment);
        feed(k, starved);
        assert_eq!(result.is_err(), left < 7, "{left}");
        audit(k);
        teardown(k, &[mm]);
    }
}
