//! Campaigns of the oracle against kernels that lie: Linux itself, asked for something else than the case says.
//!
//! A process of their own: Linux's process is forked from this one, again for each case, and a process in which programs run
//! beside a hundred other tests has too much to fork.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use abi::layout::PAGE_SIZE;
use abi::oracle::{Mode, Op, OpKind, Residency};
use abi::syscall::{advice, map, nr};
use guest::native::oracle::Linux;
use vmm::engine::EngineKind;
use vmm::oracle::calls::CALLS;
use vmm::oracle::case::{self, Step, Value};
use vmm::oracle::executor::Expected;
use vmm::oracle::recorded::{self, Program};
use vmm::oracle::{
    Counts, Difference, Executor, Guest, OracleError, Outcome, Plan, Summary, campaign, report,
};
use vmm::scenario::trace;
use vmm::session::Interrupt;

/// An executor: Linux, with each step changed as `lie` says.
#[derive(Clone, Copy)]
struct Liar {
    lie: fn(&mut Op),
}

impl Executor for Liar {
    fn execute(&mut self, cases: &[Expected]) -> Result<Outcome, OracleError> {
        let mut changed: Vec<Vec<Op>> = cases.iter().map(|case| case.ops.clone()).collect();
        changed.iter_mut().flatten().for_each(self.lie);
        let slices: Vec<&[Op]> = changed.iter().map(Vec::as_slice).collect();
        let mut linux = Linux::start()?;
        for shown in linux.run(&slices)? {
            if cases[shown.case].shown(shown.step) != shown.words {
                return Ok(Outcome::Differs {
                    case: shown.case,
                    step: Some(shown.step),
                    words: shown.words.to_vec(),
                    console: String::new(),
                });
            }
        }
        Ok(Outcome::Alike)
    }
}

fn plan(cases: u64) -> Plan {
    Plan {
        first: 0,
        cases,
        ops: 30,
        seed: 1,
        batch: 50,
        jobs: 1,
        shrink: Duration::from_secs(60),
        residency: Residency::Same,
    }
}

fn against(executor: &(impl Executor + Clone + Send), cases: u64) -> (Summary, Option<Difference>) {
    let (counts, stop) = (Counts::default(), AtomicBool::new(false));
    campaign::run(&plan(cases), executor, &counts, &stop).expect("both sides can be asked")
}

/// What the liar is caught with: the steps by kind.
#[track_caller]
fn caught(lie: fn(&mut Op)) -> (Vec<&'static str>, String) {
    let (_, found) = against(&Liar { lie }, 10_000);
    let found = found.expect("it lies");
    let text = report::difference(&found);
    assert!(
        text.contains("Linux: ") && text.contains("guest: "),
        "{text}"
    );
    assert!(found.steps.len() <= found.original);
    let kinds = found.steps.iter().map(|step| match step {
        Step::Call { call, .. } => CALLS[*call].name,
        Step::Recorded(call) => call.name,
        Step::Load(_) | Step::Check(..) => "load",
        Step::Store(..) => "store",
        Step::FileLoad(..) | Step::FileStore(..) => "file",
        Step::Limit(..) => "limit",
        Step::Fork(_) => "fork",
    });
    (kinds.collect(), text)
}

fn is_call(op: &Op, number: u64) -> bool {
    op.kind == OpKind::Call as u32 && u64::from(op.nr) == number
}

#[test]
fn linux_agrees_with_itself() {
    let (summary, found) = against(&Liar { lie: |_| {} }, 100);
    assert!(found.is_none(), "{}", report::difference(&found.unwrap()));
    assert_eq!((summary.cases, summary.steps), (100, 3000));
    assert!(summary.splits > 0 && summary.merges > 0 && summary.faults > 0);
    for name in [
        "mmap", "munmap", "mprotect", "madvise", "brk", "fork", "load", "store",
    ] {
        assert!(summary.kinds.contains_key(name), "{summary:?}");
    }
    for errno in ["EINVAL", "ENOMEM", "EEXIST", "EBADF"] {
        assert!(summary.errnos.contains_key(errno), "{summary:?}");
    }
}

#[test]
fn pages_that_dontneed_does_not_drop_are_caught() {
    // The contents at the end show it: nothing needs to read.
    let (kinds, text) = caught(|op| {
        if is_call(op, nr::MADVISE) && op.args[2].value == advice::DONTNEED {
            // Which refuses the same memory.
            op.args[2].value = advice::COLD;
        }
    });
    assert_eq!(kinds.last(), Some(&"madvise"), "{text}");
    assert!(kinds.len() <= 5, "{text}");
    assert!(text.contains("the maps are the same"), "{text}");
}

#[test]
fn a_page_that_munmap_leaves_is_caught_and_shown_in_the_map() {
    let (kinds, text) = caught(|op| {
        let len = &mut op.args[1].value;
        if op.kind == OpKind::Call as u32
            && u64::from(op.nr) == nr::MUNMAP
            && (2 * PAGE_SIZE..64 * PAGE_SIZE).contains(len)
        {
            *len -= PAGE_SIZE;
        }
    });
    assert!(kinds.ends_with(&["mmap", "munmap"]), "{text}");
    assert!(kinds.len() <= 3, "{text}");
    assert!(text.contains("guest's map"), "{text}");
    assert!(text.contains("  * arena"), "{text}");
}

#[test]
fn a_wrong_value_is_caught() {
    let (kinds, text) = caught(|op| {
        if op.kind == OpKind::Store as u32 && op.args[1].value % 2 == 1 {
            op.args[1].value += 1;
        }
    });
    // A wrong value is seen where it is written, not when something reads it.
    assert_eq!(kinds, ["mmap", "store"], "{text}");
    assert!(text.contains("->   1  store arena"), "{text}");
    let seen = text.lines().find(|line| line.contains("arena  Linux: "));
    let value = |side: &str| {
        let (_, behind) = seen?.split_once(&format!("{side}: in memory, has 0x"))?;
        u64::from_str_radix(behind.split(';').next()?, 16).ok()
    };
    let (linux, guest) = (value("Linux").unwrap(), value("guest").unwrap());
    assert_eq!((linux % 2, guest), (1, linux + 1), "{text}");
}

#[test]
fn pages_that_are_not_in_memory_are_caught() {
    let (kinds, text) = caught(|op| {
        if is_call(op, nr::MMAP) {
            op.args[3].value &= !map::POPULATE;
        }
    });
    assert_eq!(kinds, ["mmap"], "{text}");
    assert!(
        text.contains("  arena  Linux: in memory, has 0x0; guest: not in memory"),
        "{text}"
    );
}

#[test]
fn the_guest_agrees_with_linux_on_the_model() {
    let interrupt = Interrupt::default();
    let guest = Guest {
        engine: EngineKind::Model,
        cmdline: "",
        residency: Residency::Same,
        timeout: Duration::from_secs(60),
        interrupt: &interrupt,
    };
    let (summary, found) = against(&guest, 100);
    assert!(found.is_none(), "{}", report::difference(&found.unwrap()));
    assert_eq!(summary.cases, 100);
}

/// What a guest with these parameters makes of one page that is written, paged out and asked for by what `more` says.
fn paged_out(cmdline: &str, more: Option<Step>) -> Option<Difference> {
    let interrupt = Interrupt::default();
    let mut guest = Guest {
        engine: EngineKind::Model,
        cmdline,
        residency: Residency::Open,
        timeout: Duration::from_secs(60),
        interrupt: &interrupt,
    };
    let call = |number: u64, args: &[Value]| Step::Call {
        call: CALLS.iter().position(|it| it.nr == number).unwrap(),
        args: args.to_vec(),
    };
    let page = Value::new(Mode::Arena, 0, 0);
    let [len, prot, flags, file] = [2 * PAGE_SIZE, 3, 0x32, u64::MAX].map(Value::raw);
    let [one, out] = [PAGE_SIZE, advice::PAGEOUT].map(Value::raw);
    let mut steps = vec![
        call(nr::MMAP, &[page, len, prot, flags, file, Value::raw(0)]),
        Step::Store(page, 7),
        call(nr::MADVISE, &[page, one, out]),
    ];
    steps.extend(more);
    let mut linux = Linux::start().unwrap();
    let (_, found) = campaign::compare(&mut guest, &mut linux, steps).unwrap();
    found
}

#[test]
fn a_page_that_the_guest_has_swapped_out_stays_there_until_a_step_needs_it() {
    let page = Value::new(Mode::Arena, 0, 0);
    let swap = "swap_slots=64";
    assert!(paged_out(swap, None).is_none());
    assert!(paged_out(swap, Some(Step::Load(page))).is_none());
    // The vector is in memory, where it is compared: that is why no such case is drawn.
    let mincore = Step::Call {
        call: CALLS.iter().position(|it| it.nr == nr::MINCORE).unwrap(),
        args: vec![page, Value::raw(PAGE_SIZE), page.plus(PAGE_SIZE)],
    };
    assert!(paged_out("", Some(mincore.clone())).is_none());
    let found = paged_out(swap, Some(mincore)).expect("it is on the disk");
    let text = report::difference(&found);
    assert!(
        text.contains("arena+0x1000  Linux: in memory, has 0x1; guest: in memory, has 0x0"),
        "{text}"
    );
}

const RECORDED: &str = "stalemate-trace 1\nfile 0 10000\n\
    0 execve(\"/bin/x\") = 0\n\
    0 brk(0x0) = 0x5000\n\
    0 brk(0x8000) = 0x8000\n\
    0 mmap(0x0, 12288, PROT_READ, MAP_PRIVATE, 0, 0x0) = 0x7f0000000000\n\
    0 mmap(0x7f0000001000, 4096, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_FIXED, 0, 0x1000) = 0x7f0000001000\n\
    0 mmap(0x0, 8192, PROT_READ|PROT_WRITE, MAP_SHARED|MAP_ANONYMOUS, -1, 0x0) = 0x7effffffe000\n\
    0 mprotect(0x400000, 4096, PROT_READ) = 0\n\
    0 clone(CLONE_CHILD_CLEARTID|0x11) = 1\n\
    1 munmap(0x7f0000000000, 4096) = 0\n\
    1 exit_group(0) = ?\n\
    0 vfork() = 2\n\
    2 execve(\"/bin/y\") = 0\n\
    2 mmap(0x0, 4194304, PROT_NONE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0x0) = 0x7f1000000000\n\
    0 munmap(0x7effffffe000, 8192) = 0\n\
    0 exit_group(0) = ?\n";

fn recorded() -> Program {
    recorded::program(&trace::parse(RECORDED).unwrap())
}

#[test]
fn a_recorded_program_becomes_a_case_for_each_address_space() {
    let program = recorded();
    let spaces: Vec<&Vec<Step>> = program.spaces.iter().map(|space| &space.steps).collect();
    let [first, second] = spaces[..] else {
        panic!("{program:?}");
    };
    let left: Vec<_> = program.left_out.keys().collect();
    let unknown = "memory that the recording did not map";
    assert_eq!(left, [&("mprotect", unknown)]);
    let lines: Vec<String> = case::lines(first)
        .into_iter()
        .map(|(depth, line)| format!("{depth} {line}"))
        .collect();
    for expected in [
        "0 brk(heap+0x3000)    (line 5)",
        "0 memfd_create(\"oracle\", 0) -> slot[1]    (line 6)",
        "0 ftruncate(slot[1], 0x2710)    (line 6)",
        "0 mmap(0x0, 0x3000, READ, PRIVATE, slot[1], 0x0) -> slot[2]    (line 6)",
        // In the mapping that is there; of the same file.
        "0 mmap(slot[2]+0x1000, 0x1000, READ|WRITE, PRIVATE|FIXED, slot[1], 0x1000)    (line 7)",
        "1 munmap(slot[2], 0x1000)    (line 11)",
    ] {
        assert!(
            lines.iter().any(|line| line == expected),
            "{expected}: {lines:#?}"
        );
    }
    // Who borrows the memory is a thread until it executes something.
    let mapped = &case::lines(second)[0].1;
    let whole = "mmap(0x0, 0x400000";
    assert!(second.len() > 1 && mapped.starts_with(whole), "{mapped}");
}

#[test]
fn a_kernel_that_goes_wrong_in_a_recorded_program_is_caught() {
    let mut linux = Linux::start().unwrap();
    let mut compare = |lie: fn(&mut Op)| {
        let steps = recorded().spaces.remove(0).steps;
        campaign::compare(&mut Liar { lie }, &mut linux, steps).unwrap()
    };
    let (summary, found) = compare(|_| {});
    assert!(found.is_none(), "{}", report::difference(&found.unwrap()));
    assert!(summary.errnos.is_empty(), "{summary:?}");
    let (_, found) = compare(|op| {
        if is_call(op, nr::MUNMAP) {
            op.nr = nr::MSYNC as u32;
        }
    });
    let text = report::difference(&found.expect("it lies"));
    assert!(text.contains("->") && text.contains("(line 11)"), "{text}");
}
