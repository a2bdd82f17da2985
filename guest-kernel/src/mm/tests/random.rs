//! Random programs on several CPUs against a model of what they must see.

use std::collections::BTreeMap;

use abi::layout::USER_BRK_START;
use abi::objects::{Mm, Pa};
use abi::syscall::{Errno, advice, map, prot};
use proptest::prelude::*;

use super::{ANON, AT, PAGE, TestKernel, audit, teardown};
use crate::Kernel;
use crate::arch::model::testing::Machine;
use crate::mm::FaultError;

const CPUS: usize = 3;
const PROCESSES: usize = 3;
/// Pages that programs map and touch: across a boundary of every level's tables but the highest's.
const WINDOW: u64 = 24;
const BASE: u64 = AT - 10 * PAGE;

#[derive(Clone, Debug)]
enum Op {
    /// mmap at a page of the window (fixed, or as a hint) with so many pages.
    Map {
        at: u64,
        pages: u64,
        prot: u64,
        extra: u64,
    },
    Unmap(u64, u64),
    Protect(u64, u64, u64),
    Advise(u64, u64, u64),
    Brk(u64),
    /// The process becomes the parent of a new one in the slot, if it is free.
    Fork(usize),
    Exit,
    Read(u64),
    Write(u64, u64),
    Fetch(u64),
    /// The CPU goes idle; the next operation on it makes it leave lazy mode.
    Idle,
}

/// An operation of process `.1` on CPU `.0`.
type Step = (usize, usize, Op);

fn op() -> impl Strategy<Value = Op> {
    let page = 0..WINDOW + 3;
    let len = 1..9u64;
    let some_prot = prop_oneof![
        4 => Just(prot::READ | prot::WRITE),
        2 => Just(prot::READ),
        1 => Just(prot::NONE),
        1 => Just(prot::EXEC),
        1 => Just(prot::WRITE),
        1 => Just(prot::READ | prot::WRITE | prot::EXEC),
    ];
    let extra = prop_oneof![
        4 => Just(map::FIXED),
        1 => Just(map::FIXED | map::POPULATE),
        1 => Just(map::FIXED | map::NORESERVE),
        1 => Just(map::FIXED_NOREPLACE),
        1 => Just(0),
    ];
    let some_advice = prop_oneof![
        3 => Just(advice::DONTNEED),
        1 => Just(advice::SEQUENTIAL),
        1 => Just(advice::NORMAL),
        1 => Just(advice::WILLNEED),
    ];
    let map = (0..WINDOW, len.clone(), some_prot.clone(), extra);
    prop_oneof![
        6 => map.prop_map(|(at, pages, prot, extra)| Op::Map { at, pages, prot, extra }),
        4 => (0..WINDOW, len.clone()).prop_map(|(at, n)| Op::Unmap(at, n)),
        4 => (0..WINDOW, len.clone(), some_prot).prop_map(|(at, n, p)| Op::Protect(at, n, p)),
        3 => (0..WINDOW, len, some_advice).prop_map(|(at, n, a)| Op::Advise(at, n, a)),
        2 => (0..6u64).prop_map(Op::Brk),
        2 => (0..PROCESSES).prop_map(Op::Fork),
        1 => Just(Op::Exit),
        6 => page.clone().prop_map(Op::Read),
        10 => (page.clone(), 1..u64::MAX).prop_map(|(at, v)| Op::Write(at, v)),
        1 => page.prop_map(Op::Fetch),
        2 => Just(Op::Idle),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec((0..CPUS, 0..PROCESSES, op()), 1..80)
}

/// One process as it must be: access and first word of each page.
#[derive(Clone)]
struct Process {
    mm: Pa<Mm>,
    pages: BTreeMap<u64, (u64, u64)>,
    brk: u64,
}

impl Process {
    fn new(mm: Pa<Mm>) -> Self {
        Self {
            mm,
            pages: BTreeMap::new(),
            brk: USER_BRK_START,
        }
    }

    fn access(&self, gva: u64, allowed: u64) -> Result<u64, FaultError> {
        match self.pages.get(&gva) {
            None => Err(FaultError::NoMapping),
            Some(&(prot, value)) if prot & allowed != 0 => Ok(value),
            Some(_) => Err(FaultError::Access),
        }
    }

    fn unmap(&mut self, start: u64, end: u64) {
        self.pages.retain(|&gva, _| gva < start || gva >= end);
    }

    fn map(&mut self, start: u64, end: u64, prot: u64) {
        for gva in (start..end).step_by(PAGE as usize) {
            self.pages.insert(gva, (prot, 0));
        }
    }

    fn any(&self, start: u64, end: u64) -> bool {
        start < end && self.pages.range(start..end).next().is_some()
    }
}

struct World<'k> {
    kernel: &'k TestKernel,
    processes: [Option<Process>; PROCESSES],
}

impl World<'_> {
    fn step(&mut self, (cpu, slot, op): &Step) -> Result<(), TestCaseError> {
        let k = self.kernel;
        let Some(process) = self.processes[*slot].clone() else {
            return Ok(());
        };
        k.on(*cpu, |k| k.switch_mm(process.mm));
        match *op {
            Op::Fork(into) if self.processes[into].is_none() => {
                let mm = k.on(*cpu, |k| k.mm_fork(process.mm)).unwrap();
                self.processes[into] = Some(Process { mm, ..process });
            }
            Op::Fork(_) => {}
            Op::Exit => {
                k.on(*cpu, |k| k.mm_put(process.mm));
                // Other CPUs of the process are idle from now on, with it loaded.
                for other in 0..CPUS {
                    let state = &k.root().cpus[other];
                    if state.loaded_mm.get() == process.mm {
                        k.on(other, Kernel::enter_lazy);
                    }
                }
                self.processes[*slot] = None;
            }
            Op::Idle => k.on(*cpu, Kernel::enter_lazy),
            ref op => {
                let process = self.processes[*slot].as_mut().unwrap();
                k.on(*cpu, |k| call(k, *cpu, process, op))?;
            }
        }
        Ok(())
    }

    /// Every page of every process reads as it must.
    fn check_contents(&self) -> Result<(), TestCaseError> {
        for process in self.processes.iter().flatten() {
            self.kernel.on(0, |k| k.switch_mm(process.mm));
            for (&gva, &(prot, value)) in &process.pages {
                let expected = if prot == 0 {
                    Err(FaultError::Access)
                } else {
                    Ok(value)
                };
                prop_assert_eq!(self.kernel.user_read(0, gva), expected, "{:#x}", gva);
            }
        }
        Ok(())
    }
}

fn window(at: u64, pages: u64) -> (u64, u64) {
    (BASE + at * PAGE, BASE + (at + pages) * PAGE)
}

/// One operation of `process` on this CPU, and what it must do.
fn call(k: &TestKernel, cpu: usize, process: &mut Process, op: &Op) -> Result<(), TestCaseError> {
    let mm = process.mm;
    match *op {
        Op::Map {
            at,
            pages,
            prot,
            extra,
        } => {
            let (start, end) = window(at, pages);
            let got = k.mmap(mm, start, pages * PAGE, prot, ANON | extra);
            let taken = process.any(start, end);
            if extra == map::FIXED_NOREPLACE && taken {
                prop_assert_eq!(got, Err(Errno::EEXIST));
                return Ok(());
            }
            let found = got.unwrap();
            if extra != 0 || !taken {
                prop_assert_eq!(found, start);
            }
            if extra & map::FIXED == 0 {
                prop_assert!(!process.any(found, found + pages * PAGE));
            }
            process.unmap(found, found + pages * PAGE);
            process.map(found, found + pages * PAGE, prot);
        }
        Op::Unmap(at, pages) => {
            let (start, end) = window(at, pages);
            prop_assert_eq!(k.munmap(mm, start, pages * PAGE), Ok(()));
            process.unmap(start, end);
        }
        Op::Protect(at, pages, prot) => {
            let (start, end) = window(at, pages);
            let mapped = (start..end)
                .step_by(PAGE as usize)
                .take_while(|gva| process.pages.contains_key(gva));
            let prefix: Vec<_> = mapped.collect();
            let whole = prefix.len() as u64 == pages;
            let expected = if whole { Ok(()) } else { Err(Errno::ENOMEM) };
            prop_assert_eq!(k.mprotect(mm, start, pages * PAGE, prot), expected);
            for gva in prefix {
                process.pages.get_mut(&gva).unwrap().0 = prot;
            }
        }
        Op::Advise(at, pages, advice) => {
            let (start, end) = window(at, pages);
            let whole = process.pages.range(start..end).count() as u64 == pages;
            let expected = if whole { Ok(()) } else { Err(Errno::ENOMEM) };
            prop_assert_eq!(k.madvise(mm, start, pages * PAGE, advice), expected);
            if advice == advice::DONTNEED {
                for (_, page) in process.pages.range_mut(start..end) {
                    page.1 = 0;
                }
            }
        }
        Op::Brk(pages) => {
            let wanted = USER_BRK_START + pages * PAGE;
            let old = process.brk;
            if wanted > old && !process.any(old, wanted + PAGE) {
                process.map(old, wanted, prot::READ | prot::WRITE);
                process.brk = wanted;
            } else if wanted < old && process.any(wanted, old) {
                process.unmap(wanted, old);
                process.brk = wanted;
            }
            prop_assert_eq!(k.brk(mm, wanted), process.brk);
        }
        Op::Read(at) => {
            let gva = touched(at);
            let allowed = prot::READ | prot::WRITE | prot::EXEC;
            prop_assert_eq!(k.user_read(cpu, gva), process.access(gva, allowed));
        }
        Op::Write(at, value) => {
            let gva = touched(at);
            let expected = process.access(gva, prot::WRITE).map(|_| ());
            prop_assert_eq!(k.user_write(cpu, gva, value), expected);
            if expected.is_ok() {
                process.pages.get_mut(&gva).unwrap().1 = value;
            }
        }
        Op::Fetch(at) => {
            let gva = touched(at);
            let expected = process.access(gva, prot::EXEC).map(|_| ());
            prop_assert_eq!(k.user_fetch(cpu, gva), expected);
        }
        Op::Fork(_) | Op::Exit | Op::Idle => unreachable!("handled by the world"),
    }
    Ok(())
}

/// Pages past the window are the heap's.
fn touched(at: u64) -> u64 {
    match at.checked_sub(WINDOW) {
        None => BASE + at * PAGE,
        Some(heap) => USER_BRK_START + heap * PAGE,
    }
}

fn run(cmdline: &str, steps: &[Step]) -> Result<(), TestCaseError> {
    let machine = Machine::with_memory(2 << 20, CPUS, cmdline);
    let kernel = machine.kernel();
    let first = kernel.mm_create().unwrap();
    let mut world = World {
        kernel,
        processes: [Some(Process::new(first)), None, None],
    };
    for step in steps {
        world.step(step)?;
        audit(kernel);
    }
    world.check_contents()?;
    let left: Vec<_> = world.processes.iter().flatten().map(|p| p.mm).collect();
    teardown(kernel, &left);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(super::cases(150)))]

    #[test]
    fn programs_see_what_they_must(
        steps in steps(),
        cmdline in prop_oneof![
            Just(""),
            Just("gather_batch=1 flush_ceiling=0 pcp_batch=0"),
            Just("gather_batch=3 flush_ceiling=100 fault_around=8 poison=off"),
        ],
    ) {
        run(cmdline, &steps)?;
    }
}

/// The random programs with the audit are a net: mistakes do not slip through it.
#[test]
fn random_programs_find_missing_flushes() {
    use proptest::test_runner::{Config, TestRunner};
    for bug in ["shootdown-skip-remote", "fork-no-writeprotect-flush"] {
        let config = Config {
            cases: 300,
            failure_persistence: None,
            max_shrink_iters: 0,
            ..Config::default()
        };
        let rng = proptest::test_runner::TestRng::deterministic_rng(config.rng_algorithm);
        let result = TestRunner::new_with_rng(config, rng)
            .run(&steps(), |steps| run(&format!("bug={bug}"), &steps));
        assert!(result.is_err(), "{bug} stays hidden");
    }
}
