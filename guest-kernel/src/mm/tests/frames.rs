//! Frames and slabs.

use std::collections::BTreeMap;

use abi::objects::{FrameKind, SlabId, Vma};
use abi::syscall::Errno;
use proptest::prelude::*;

use super::{PAGE, TestKernel, audit};
use crate::arch::model::testing::{Machine, boot_info};
use crate::mm::Field;

#[test]
fn boot_tiles_memory_and_refuses_what_it_cannot_use() {
    for bytes in [1 << 20, (4 << 20) + PAGE, 64 << 20] {
        let machine = Machine::with_memory(bytes, 2, "pcp_batch=0");
        let root = machine.kernel().root();
        audit(machine.kernel());
        assert_eq!(root.nr_frames.get(), bytes / PAGE);
        let left = bytes / PAGE - root.first_frame.get();
        assert!(root.free_frames.get() > left * 9 / 10);
    }
    let machine = |line: &str| boot_info(4 << 20, 1, line);
    let check = |info: &abi::boot::BootInfo| -> Option<String> { Machine::boot(info).err() };
    assert_eq!(check(&machine("poison=off")), None);
    let mut info = machine("flush_ceiling=x");
    assert!(check(&info).unwrap().contains("flush_ceiling=x"));
    info.magic = 1;
    assert!(check(&info).unwrap().contains("magic 0x1"));
    info = machine("");
    info.layout_hash = 7;
    assert!(check(&info).unwrap().contains("layout 0x7"));
    info = machine("");
    info.cpus = 17;
    assert!(check(&info).unwrap().contains("17 CPUs"));
    info = machine("");
    info.free_start = info.memory_bytes - PAGE;
    assert!(check(&info).unwrap().contains("bytes of memory"));
    info = machine("");
    info.cmdline_len = 4096;
    assert!(check(&info).unwrap().contains("command line"));
    assert!(check(&machine("nonsense")).unwrap().contains("`nonsense`"));
    assert!(
        check(&machine("nonsense=1"))
            .unwrap()
            .contains("`nonsense`")
    );
}

#[test]
fn a_freed_frame_is_the_next_to_be_reused() {
    let machine = Machine::new(1, "");
    let kernel = machine.kernel();
    let frames: Vec<_> = (0..40)
        .map(|_| kernel.alloc_frames(0, FrameKind::Stack).unwrap())
        .collect();
    for &frame in &frames {
        kernel.free_frames(frame);
    }
    let last = *frames.last().unwrap();
    assert_eq!(kernel.alloc_frames(0, FrameKind::Stack), Ok(last));
    kernel.free_frames(last);
    audit(kernel);
}

#[test]
#[should_panic(expected = "freed")]
fn a_double_free_is_caught() {
    let machine = Machine::new(1, "");
    let frame = machine.kernel().alloc_frames(0, FrameKind::Stack).unwrap();
    machine.kernel().free_frames(frame);
    machine.kernel().free_frames(frame);
}

#[test]
fn frames_on_the_own_list_are_given_back_for_a_large_block() {
    let machine = Machine::with_memory(1 << 20, 1, "pcp_batch=16");
    let kernel = machine.kernel();
    let mut frames = Vec::new();
    while let Ok(frame) = kernel.alloc_frames(0, FrameKind::Stack) {
        frames.push(frame);
    }
    assert_eq!(kernel.root().free_frames.get(), 0);
    // An aligned run of 16 that is all ours, freed onto the per-CPU list.
    let run = *frames
        .iter()
        .find(|&&f| f % (16 * PAGE) == 0 && (0..16).all(|i| frames.contains(&(f + i * PAGE))))
        .unwrap();
    (0..16).for_each(|i| kernel.free_frames(run + i * PAGE));
    assert_eq!(kernel.this_cpu().free_count.get(), 16);
    assert_eq!(kernel.alloc_frames(4, FrameKind::Stack), Ok(run));
    assert_eq!(kernel.alloc_frames(0, FrameKind::Stack), Err(Errno::ENOMEM));
}

#[test]
fn free_objects_are_zero_but_for_link_and_generation() {
    let machine = Machine::new(1, "");
    let kernel = machine.kernel();
    let vma = kernel.slab_alloc::<Vma>().unwrap();
    kernel.obj(vma).start.set(7);
    kernel.obj(vma).flags.set(1);
    kernel.slab_free(vma);
    assert_eq!(kernel.obj(vma).generation.get(), 2);
    assert_eq!(
        (kernel.obj(vma).start.get(), kernel.obj(vma).flags.get()),
        (0, 0)
    );
    let again = kernel.slab_alloc::<Vma>().unwrap();
    assert_eq!(again, vma, "last freed, first reused");
    assert_eq!(kernel.obj(vma).generation.get(), 3);
    assert!(kernel.obj(vma).chains.get().is_null());
    let slab = &kernel.root().slabs[SlabId::Vma as usize];
    assert_eq!(
        (slab.used.get(), slab.frames.get(), slab.object_bytes.get()),
        (1, 1, size_of::<Vma>() as u64)
    );
    assert_eq!(kernel.folio(vma.0).used.get(), 1);
}

#[test]
#[should_panic(expected = "freed twice")]
fn a_double_free_of_an_object_is_caught() {
    let machine = Machine::new(1, "");
    let vma = machine.kernel().slab_alloc::<Vma>().unwrap();
    machine.kernel().slab_free(vma);
    machine.kernel().slab_free(vma);
}

#[derive(Clone, Debug)]
enum Step {
    Alloc(usize, u8),
    Free(usize, usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0..3usize, prop_oneof![4 => Just(0u8), 1 => 0..11u8])
            .prop_map(|(cpu, order)| Step::Alloc(cpu, order)),
        2 => (0..3usize, any::<usize>()).prop_map(|(cpu, which)| Step::Free(cpu, which)),
    ];
    prop::collection::vec(step, 1..300)
}

fn run(kernel: &TestKernel, steps: &[Step]) -> Result<(), TestCaseError> {
    let before = kernel.root().free_frames.get();
    let mut held = BTreeMap::new();
    for step in steps {
        match *step {
            Step::Alloc(cpu, order) => {
                let Ok(gpa) = kernel.on(cpu, |k| k.alloc_frames(order, FrameKind::Stack)) else {
                    continue;
                };
                let end = gpa + (PAGE << order);
                let overlaps = |(&g, &o): (&u64, &u8)| g < end && gpa < g + (PAGE << o);
                prop_assert!(!held.iter().any(overlaps), "{gpa:#x} given out twice");
                held.insert(gpa, order);
            }
            Step::Free(cpu, which) if !held.is_empty() => {
                let gpa = *held.keys().nth(which % held.len()).unwrap();
                held.remove(&gpa);
                kernel.on(cpu, |k| k.free_frames(gpa));
            }
            Step::Free(..) => {}
        }
        let taken: u64 = held.values().map(|&order| 1 << order).sum();
        prop_assert_eq!(kernel.root().free_frames.get(), before - taken);
    }
    audit(kernel);
    for &gpa in held.keys() {
        kernel.free_frames(gpa);
    }
    prop_assert_eq!(kernel.root().free_frames.get(), before);
    audit(kernel);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(super::cases(64)))]

    #[test]
    fn blocks_never_overlap_and_all_come_back(steps in steps(), batch in 0..20u64) {
        let machine = Machine::with_memory(3 << 20, 3, &format!("pcp_batch={batch}"));
        run(machine.kernel(), &steps)?;
    }
}
