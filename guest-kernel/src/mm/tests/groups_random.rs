//! Random programs in memory groups with small limits: whatever fails, every counter is what is charged, and every page
//! holds what was written.

use std::collections::BTreeMap;

use abi::objects::{File, MemGroup, Mm, Pa};
use abi::syscall::{Errno, advice, group, map};
use proptest::prelude::*;

use super::files::map_file;
use super::{AT, PAGE, RW, TestKernel, audit, teardown};
use crate::Kernel;
use crate::arch::model::testing::Machine;
use crate::mm::{FaultError, Field};

const CPUS: usize = 2;
const PROCESSES: usize = 3;
const WINDOW: u64 = 16;
/// Where the file is mapped.
const SHARED: u64 = AT + 64 * PAGE;

#[derive(Clone, Debug)]
enum Op {
    /// Below one of the groups, or the root.
    Create(u64, u64),
    Limit(u64, u64),
    /// Of the process, with its memory or without.
    Move(u64, bool),
    Write(u64, u64),
    Read(u64),
    /// A page of the file.
    Share(u64),
    Advise(u64, u64, u64),
    Migrate(u64, u64),
    Truncate(u64),
    Fork(usize),
    Exit,
}

/// An operation of process `.1` on CPU `.0`.
type Step = (usize, usize, Op);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let page = 0..WINDOW;
    let max = prop_oneof![
        2 => 4..30u64,
        1 => Just(MemGroup::NO_LIMIT),
    ];
    let some_advice = prop_oneof![
        3 => Just(advice::DONTNEED),
        4 => Just(advice::PAGEOUT),
        1 => Just(advice::WILLNEED),
        1 => Just(advice::COLD),
        1 => Just(advice::POPULATE_WRITE),
    ];
    let op = prop_oneof![
        1 => (0..5u64, max.clone()).prop_map(|(parent, max)| Op::Create(parent, max)),
        3 => (0..5u64, max).prop_map(|(group, max)| Op::Limit(group, max)),
        5 => (0..5u64, any::<bool>()).prop_map(|(group, all)| Op::Move(group, all)),
        14 => (page.clone(), 1..u64::MAX).prop_map(|(page, value)| Op::Write(page, value)),
        6 => page.clone().prop_map(Op::Read),
        4 => (0..6u64).prop_map(Op::Share),
        6 => (page.clone(), 1..8u64, some_advice).prop_map(|(at, n, a)| Op::Advise(at, n, a)),
        3 => (page, 1..8u64).prop_map(|(at, n)| Op::Migrate(at, n)),
        1 => (0..6u64).prop_map(Op::Truncate),
        3 => (0..PROCESSES).prop_map(Op::Fork),
        1 => Just(Op::Exit),
    ];
    prop::collection::vec((0..CPUS, 0..PROCESSES, op), 1..100)
}

/// One process, and what its pages hold.
#[derive(Clone)]
struct Process {
    mm: Pa<Mm>,
    pages: BTreeMap<u64, u64>,
}

struct World<'k> {
    kernel: &'k TestKernel,
    file: Pa<File>,
    processes: [Option<Process>; PROCESSES],
}

fn window(at: u64, pages: u64) -> (u64, u64) {
    (AT + at * PAGE, pages.min(WINDOW - at) * PAGE)
}

impl World<'_> {
    fn step(&mut self, (cpu, slot, op): &Step) -> Result<(), TestCaseError> {
        let k = self.kernel;
        let Some(mut process) = self.processes[*slot].clone() else {
            return Ok(());
        };
        let mm = process.mm;
        k.on(*cpu, |k| k.switch_mm(mm));
        match *op {
            Op::Fork(into) => {
                if self.processes[into].is_none() {
                    match k.on(*cpu, |k| k.mm_fork(mm)) {
                        Ok(child) => {
                            self.processes[into] = Some(Process {
                                mm: child,
                                pages: process.pages,
                            });
                        }
                        Err(error) => prop_assert_eq!(error, Errno::ENOMEM),
                    }
                }
                return Ok(());
            }
            Op::Exit => {
                for other in 0..CPUS {
                    if k.root().cpus[other].loaded_mm.get() == mm {
                        k.on(other, Kernel::leave_mm);
                    }
                }
                k.mm_put(mm);
                self.processes[*slot] = None;
                return Ok(());
            }
            Op::Truncate(pages) => k.on(*cpu, |k| k.file_truncate(self.file, pages * PAGE)),
            _ => k.on(*cpu, |k| call(k, *cpu, &mut process, op))?,
        }
        self.processes[*slot] = Some(process);
        Ok(())
    }
}

fn call(k: &TestKernel, cpu: usize, process: &mut Process, op: &Op) -> Result<(), TestCaseError> {
    let mm = process.mm;
    match *op {
        Op::Create(parent, max) => {
            let known = [Errno::EINVAL, Errno::ENOSPC];
            let created = k.group_create(parent, max);
            prop_assert!(
                created.is_ok_and(|new| new > parent) || known.contains(&created.unwrap_err())
            );
        }
        Op::Limit(number, max) => {
            let before = k.group(number).map(|group| group.max.get());
            let known = [Errno::EINVAL, Errno::EBUSY];
            match k.group_set_max(number, max) {
                Ok(()) => prop_assert_eq!(k.group(number).unwrap().max.get(), max),
                Err(error) => {
                    prop_assert!(known.contains(&error));
                    prop_assert_eq!(k.group(number).map(|group| group.max.get()), before);
                }
            }
        }
        Op::Move(number, all) => {
            let before = k.obj(mm).group.get();
            let flags = if all { group::RECHARGE } else { 0 };
            match k.group_move(mm, number, flags) {
                Ok(moved) => {
                    prop_assert_eq!(k.obj(mm).group.get(), number);
                    prop_assert!(all || moved == 0);
                }
                Err(error) => {
                    let known = [Errno::EINVAL, Errno::ENOMEM];
                    prop_assert!(known.contains(&error));
                    prop_assert!(all || error == Errno::EINVAL);
                    prop_assert_eq!(k.obj(mm).group.get(), before);
                }
            }
        }
        Op::Write(page, value) => match k.user_write(cpu, AT + page * PAGE, value) {
            Ok(()) => {
                process.pages.insert(page, value);
            }
            Err(error) => prop_assert_eq!(error, FaultError::NoMemory),
        },
        Op::Read(page) => {
            let expected = process.pages.get(&page).copied().unwrap_or(0);
            match k.user_read(cpu, AT + page * PAGE) {
                Ok(value) => prop_assert_eq!(value, expected),
                Err(error) => prop_assert_eq!(error, FaultError::NoMemory),
            }
        }
        Op::Share(page) => {
            if let Err(error) = k.user_write(cpu, SHARED + page * PAGE, 1) {
                prop_assert!([FaultError::NoMemory, FaultError::Bus].contains(&error));
            }
        }
        Op::Advise(at, pages, what) => {
            let (start, len) = window(at, pages);
            match k.madvise(mm, start, len, what) {
                Ok(()) if what == advice::DONTNEED => {
                    process
                        .pages
                        .retain(|page, _| !(at..at + pages).contains(page));
                }
                Ok(()) => {}
                Err(error) => prop_assert_eq!(error, Errno::ENOMEM),
            }
        }
        Op::Migrate(at, pages) => {
            let (start, len) = window(at, pages);
            prop_assert!(k.migrate_range(mm, start, len).is_ok());
        }
        Op::Truncate(_) | Op::Fork(_) | Op::Exit => {}
    }
    Ok(())
}

fn run(cmdline: &str, steps: &[Step]) -> Result<(), TestCaseError> {
    let machine = Machine::with_memory(2 << 20, CPUS, &format!("groups=on {cmdline}"));
    let kernel = machine.kernel();
    let (mm, file) = (kernel.mm_create().unwrap(), kernel.file_create().unwrap());
    kernel.file_truncate(file, 6 * PAGE);
    super::map_at(kernel, mm, AT, WINDOW, RW);
    map_file(kernel, mm, SHARED, 6, RW, map::SHARED, (file, 0));
    for (parent, max) in [(0, 40), (1, 16), (1, MemGroup::NO_LIMIT)] {
        kernel.group_create(parent, max).unwrap();
    }
    let first = Process {
        mm,
        pages: BTreeMap::new(),
    };
    let mut world = World {
        kernel,
        file,
        processes: [Some(first), None, None],
    };
    for step in steps {
        world.step(step)?;
        audit(kernel);
    }
    // Without limits every page can be read.
    for number in 1..=abi::objects::GROUPS as u64 {
        let _ = kernel.group_set_max(number, MemGroup::NO_LIMIT);
    }
    for process in world.processes.iter().flatten() {
        kernel.on(0, |k| k.switch_mm(process.mm));
        for (&page, &value) in &process.pages {
            prop_assert_eq!(kernel.user_read(0, AT + page * PAGE), Ok(value));
        }
    }
    let left: Vec<_> = world.processes.iter().flatten().map(|p| p.mm).collect();
    for cpu in 0..CPUS {
        kernel.on(cpu, Kernel::leave_mm);
    }
    kernel.file_put(file);
    teardown(kernel, &left);
    for group in &kernel.root().groups {
        prop_assert_eq!(group.usage.get(), 0);
        prop_assert!(group.stats.iter().all(|stat| stat.get() == 0));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(super::cases(150)))]

    #[test]
    fn counters_are_what_is_charged_whatever_happens(
        steps in steps(),
        cmdline in prop_oneof![
            Just(""),
            Just("pcp_batch=0 fault_around=8"),
            Just("swap_slots=64"),
            Just("swap_slots=64 swap_readahead=1 pcp_batch=2"),
            Just("swap_slots=12 gather_batch=2"),
            Just("swap_slots=64 fault_around=4 pcid=on asids=2"),
        ],
    ) {
        run(cmdline, &steps)?;
    }
}

/// Random programs with the audit find counts that go astray.
#[test]
fn random_programs_find_what_is_uncharged_from_another_group() {
    let caught =
        super::some_case_fails(&steps(), |steps| run("bug=uncharge-current-group", &steps));
    assert!(caught, "the bug stays hidden");
}
