use abi::trace::{Header, Op, OpKind};
use proptest::prelude::*;
use zerocopy::FromBytes;

use super::*;

fn trace(lines: &str) -> Trace {
    parse(&format!("stalemate-trace 1\n{lines}")).unwrap()
}

/// `kind task slot offset len` of every record.
fn records(lines: &str) -> (Vec<String>, Summary) {
    let Compiled { blob, summary } = compile(&trace(lines));
    let (header, mut rest) = Header::read_from_prefix(&blob).unwrap();
    assert_eq!(header.magic, abi::trace::MAGIC);
    let mut records = Vec::new();
    while let Ok((op, after)) = Op::read_from_prefix(rest) {
        let Op {
            task,
            slot,
            offset,
            len,
            ..
        } = op;
        let kind = OpKind::from_u32(op.kind).unwrap();
        records.push(format!("{kind:?} {task} {slot} {offset:#x} {len:#x}"));
        rest = after;
    }
    assert_eq!(rest.len(), 0);
    assert_eq!(header.ops, records.len() as u64);
    assert_eq!(
        (summary.records, summary.tasks, summary.slots),
        (header.ops, header.tasks, header.slots)
    );
    (records, summary)
}

#[test]
fn the_documented_example_is_read_and_written() {
    let text = "stalemate-trace 1\ncommand \"true\"\nstatus 0\nfile 3 4711\n# a comment\n\n\
        0 mmap(0x0, 8192, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7f0000000000\n\
        0 clone(CLONE_VM|CLONE_THREAD) = 1\n\
        1 munmap(0x7f0000000000, 8192) = -EINVAL\n\
        1 exit(0) = ?\n";
    let trace = parse(text).unwrap();
    assert_eq!(trace.command, ["true"]);
    let file = File {
        number: 3,
        bytes: 4711,
    };
    assert_eq!(trace.files, [file]);
    assert_eq!(
        trace
            .entries
            .iter()
            .map(|entry| entry.line)
            .collect::<Vec<_>>(),
        [7, 8, 9, 10]
    );
    assert_eq!(trace.entries[2].outcome, Outcome::Failed(Errno::EINVAL));
    let without_comments = text
        .replace("# a comment\n\n", "")
        .replace("-1, 0)", "-1, 0x0)");
    assert_eq!(trace.to_string(), without_comments);
}

#[test]
fn errors_point_at_the_text() {
    let cases = [
        (
            "",
            "the end of the line",
            "`stalemate-trace 1` on the first line",
        ),
        ("stalemate-trace 2\n", "`2`", "version 1 of the format"),
        ("stalemate-trace 1\n0 mremapp(0x0)", "`mremapp`", CALLS),
        ("stalemate-trace 1\n0 munmap(0x0, 0q)", "`0q`", "a length"),
        ("stalemate-trace 1\n0 munmap(0x0)", "`)`", "`,`"),
        (
            "stalemate-trace 1\nx exit(0) = ?",
            "`x`",
            "the number of a task",
        ),
        ("stalemate-trace 1\n0 exit(0)", "the end of the line", "`=`"),
        (
            "stalemate-trace 1\n0 exit(0) = -EWHAT",
            "`-EWHAT`",
            "a result: a number, -ERRNO, or ?",
        ),
        (
            "stalemate-trace 1\n0 exit(0) = ? !",
            "`!`",
            "the end of the line",
        ),
        (
            "stalemate-trace 1\n0 execve(\"a) = 0",
            "`\"`",
            "a string with a closing `\"`",
        ),
        (
            "stalemate-trace 1\n0 mprotect(0x0, 1, PROT_LOUD) = 0",
            "`PROT_LOUD`",
            "protection: a number or names such as PROT_NONE, PROT_READ, PROT_WRITE",
        ),
    ];
    for (text, found, expected) in cases {
        let error = parse(text).unwrap_err();
        assert_eq!(
            (error.found.as_str(), error.expected.as_str()),
            (found, expected),
            "{text:?}"
        );
        let spanned = &text[error.span.clone()];
        assert!(
            spanned.is_empty() || format!("`{spanned}`") == found,
            "{text:?}: {spanned:?}"
        );
    }
    let error = parse("stalemate-trace 1\n\n  0 mmapp(").unwrap_err();
    assert_eq!((error.line, error.column, error.span), (3, 5, 23..28));
}

const CALLS: &str = "a call (mmap, munmap, mprotect, mremap, brk, madvise, clone, clone3, fork, vfork, \
                     execve, exit, exit_group or killed)";

#[test]
fn addresses_become_slots_and_offsets() {
    let (records, summary) = records(
        "0 brk(0x0) = 0x1000800\n\
         0 brk(0x1003000) = 0x1003000\n\
         0 mmap(0x0, 20480, 3, 0x22, -1, 0) = 0x7f0000000000\n\
         0 mmap(0x0, 100, 1, 0x2, 3, 0) = 0x7f0000010000\n\
         0 mmap(0x7f0000001000, 4096, 1, 0x32, -1, 0) = 0x7f0000001000\n\
         0 mprotect(0x7f0000003000, 8192, 0) = 0\n\
         0 munmap(0x7f0000001000, 8192) = 0\n\
         0 madvise(0x7f0000000000, 20480, 4) = 0\n\
         0 mmap(0x7f0000002000, 8192, 3, 0x32, -1, 0) = 0x7f0000002000\n\
         0 munmap(0x7f0000000000, 69632) = 0\n\
         0 munmap(0x600000000000, 4096) = 0\n\
         0 madvise(0x7f0000000000, 4096, MADV_HUGEPAGE) = 0\n\
         0 mprotect(0x1001000, 4096, 1) = 0\n\
         0 mmap(0x0, 0, 3, 0x22, -1, 0) = -EINVAL\n",
    );
    assert_eq!(
        records,
        [
            "Brk 0 0 0x2000 0x0",
            "Map 0 1 0x0 0x5000",
            "Map 0 2 0x0 0x1000",
            "MapFixed 0 1 0x1000 0x1000",
            "Protect 0 1 0x3000 0x2000",
            "Unmap 0 1 0x1000 0x2000",
            "Advise 0 1 0x0 0x1000",
            "Advise 0 1 0x3000 0x2000",
            // Half of it lies over the first mapping, the other half where nothing is.
            "MapFixed 0 1 0x3000 0x1000",
            "Map 0 3 0x0 0x1000",
            "Unmap 0 1 0x0 0x1000",
            "Unmap 0 3 0x0 0x1000",
            "Unmap 0 1 0x3000 0x2000",
            "Unmap 0 2 0x0 0x1000",
            "Protect 0 0 0x0 0x1000",
            "Exit 0 0 0x0 0x0",
        ]
    );
    let munmap = &summary.calls["munmap"];
    assert_eq!((munmap.total(), munmap.as_is), (3, 1));
    assert_eq!(munmap.skipped["memory that the recording did not map"], 1);
    let mmap = &summary.calls["mmap"];
    assert_eq!((mmap.total(), mmap.as_is), (5, 3));
    assert_eq!(
        mmap.changed["private anonymous memory instead of a file's"],
        1
    );
    assert_eq!(mmap.skipped["failed in the recording"], 1);
    let shown = summary.to_string();
    assert!(
        shown.contains("mmap: 5, 3 as recorded, 1 as private anonymous"),
        "{shown}"
    );
}

#[test]
fn tasks_have_address_spaces() {
    let (records, summary) = records(
        "0 mmap(0x0, 8192, 3, 0x22, -1, 0) = 0x7f0000000000\n\
         0 clone(CLONE_VM|CLONE_THREAD) = 7\n\
         7 vfork() = 9\n\
         7 munmap(0x7f0000000000, 4096) = 0\n\
         9 mprotect(0x7f0000000000, 4096, 1) = 0\n\
         9 execve(\"/bin/true\") = 0\n\
         9 munmap(0x7f0000000000, 4096) = 0\n\
         9 exit_group(0) = ?\n\
         9 exit_group(0) = ?\n\
         5 exit(0) = ?\n\
         0 exit_group(0) = ?\n",
    );
    assert_eq!(
        records,
        [
            "Map 0 1 0x0 0x2000",
            "Thread 0 0 0x0 0x1",
            "Fork 1 0 0x0 0x2",
            "Unmap 1 1 0x0 0x1000",
            "Protect 2 1 0x0 0x1000",
            "Unmap 2 1 0x0 0x2000",
            "Exit 2 0 0x0 0x0",
            "Exit 0 0 0x0 0x0",
            "Exit 1 0 0x0 0x0",
        ]
    );
    assert_eq!(
        summary.calls["exit_group"].skipped["after the end of its task"],
        1
    );
    assert_eq!(
        summary.calls["exit"].skipped["by a task that the trace does not start"],
        1
    );
    assert_eq!(summary.tasks, 3);
}

fn call() -> impl Strategy<Value = Call> {
    let n = any::<u64>;
    let path = ".{0,12}";
    prop_oneof![
        (n(), n(), n(), n(), any::<i64>(), n()).prop_map(|(addr, len, prot, flags, fd, offset)| {
            Call::Mmap {
                addr,
                len,
                prot,
                flags,
                fd,
                offset,
            }
        }),
        (n(), n()).prop_map(|(addr, len)| Call::Munmap { addr, len }),
        (n(), n(), 0..16u64).prop_map(|(addr, len, prot)| Call::Mprotect { addr, len, prot }),
        (n(), n(), n(), n(), n()).prop_map(|(addr, old_len, new_len, flags, new_addr)| {
            Call::Mremap {
                addr,
                old_len,
                new_len,
                flags,
                new_addr,
            }
        }),
        n().prop_map(|addr| Call::Brk { addr }),
        (n(), n(), 0..120u64).prop_map(|(addr, len, advice)| Call::Madvise { addr, len, advice }),
        n().prop_map(|flags| Call::Clone { flags }),
        n().prop_map(|flags| Call::Clone3 { flags }),
        Just(Call::Fork),
        Just(Call::Vfork),
        path.prop_map(|path| Call::Execve { path }),
        any::<i64>().prop_map(|status| Call::Exit { status }),
        any::<i64>().prop_map(|status| Call::ExitGroup { status }),
        n().prop_map(|signal| Call::Killed { signal }),
    ]
}

/// Calls on few, overlapping places, so that they have to do with each other.
fn crowded_call() -> impl Strategy<Value = (Call, Outcome)> {
    let addr = || (0..24u64).prop_map(|page| 0x10_0000 + page * 0x800);
    let len = || 0..0x6000u64;
    let returned = |call, value| (call, Outcome::Returned(value));
    prop_oneof![
        (addr(), len(), 0..8u64, any::<bool>()).prop_map(move |(addr, len, prot, fixed)| {
            let addr = addr & !0xfff;
            let flags = if fixed { 0x32 } else { 0x22 };
            returned(
                Call::Mmap {
                    addr,
                    len,
                    prot,
                    flags,
                    fd: -1,
                    offset: 0,
                },
                addr,
            )
        }),
        (addr(), len()).prop_map(move |(addr, len)| returned(Call::Munmap { addr, len }, 0)),
        (addr(), len())
            .prop_map(move |(addr, len)| { returned(Call::Mprotect { addr, len, prot: 1 }, 0) }),
        addr().prop_map(move |addr| returned(Call::Brk { addr }, addr)),
        (1..5u64, any::<bool>()).prop_map(move |(task, thread)| {
            returned(
                Call::Clone {
                    flags: if thread { 0x10100 } else { 0 },
                },
                task,
            )
        }),
        Just(returned(
            Call::Execve {
                path: String::new()
            },
            0
        )),
        Just((Call::Exit { status: 0 }, Outcome::Never)),
        Just((Call::ExitGroup { status: 0 }, Outcome::Never)),
    ]
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        any::<u64>().prop_map(Outcome::Returned),
        (1..=4095i64).prop_map(|errno| Outcome::Failed(Errno(errno))),
        Just(Outcome::Never),
    ]
}

fn any_trace() -> impl Strategy<Value = Trace> {
    let entry = (any::<u32>(), call(), outcome()).prop_map(|(task, call, outcome)| Entry {
        line: 0,
        task,
        call,
        outcome,
    });
    let command = prop::collection::vec(any::<String>(), 0..4);
    (
        command,
        any::<Option<i32>>(),
        prop::collection::vec(any::<(i64, u64)>(), 0..4),
        prop::collection::vec(entry, 0..20),
    )
        .prop_map(|(command, status, files, entries)| {
            let file = |(number, bytes)| File { number, bytes };
            let mut trace = Trace {
                command,
                status,
                files: files.into_iter().map(file).collect(),
                entries,
            };
            trace.number_lines();
            trace
        })
}

proptest! {
    #[test]
    fn what_is_printed_parses_to_the_same(trace in any_trace()) {
        prop_assert_eq!(parse(&trace.to_string()), Ok(trace));
    }

    #[test]
    fn arbitrary_text_never_panics(text in any::<String>()) {
        let with_header = format!("stalemate-trace 1\n{text}");
        for text in [&text, &with_header] {
            if let Err(error) = parse(text) {
                prop_assert!(text.get(error.span.clone()).is_some(), "{:?}", error);
            }
        }
    }

    #[test]
    fn damaged_text_never_panics(trace in any_trace(), at in any::<prop::sample::Index>(), c in any::<char>()) {
        let mut chars: Vec<char> = trace.to_string().chars().collect();
        let at = at.index(chars.len());
        chars[at] = c;
        let text: String = chars.into_iter().collect();
        if let Err(error) = parse(&text) {
            prop_assert!(text.get(error.span.clone()).is_some(), "{:?}", error);
        }
    }

    #[test]
    fn any_trace_compiles_and_every_call_is_counted(trace in any_trace()) {
        let Compiled { summary, .. } = compile(&trace);
        let counted: u64 = summary.calls.values().map(CallSummary::total).sum();
        prop_assert_eq!(counted, trace.entries.len() as u64);
    }

    /// The guest's own checks of a blob accept what the compiler makes, and Linux grants every call.
    #[test]
    fn what_is_compiled_replays_on_linux(
        calls in prop::collection::vec((0..5u32, crowded_call()), 0..60)
    ) {
        let entry = |(task, (call, outcome))| Entry { line: 0, task, call, outcome };
        let mut trace = Trace { entries: calls.into_iter().map(entry).collect(), ..Trace::default() };
        trace.number_lines();
        let Compiled { blob, .. } = compile(&trace);
        let outcome = guest::native::run("replay", "", Some(&blob)).unwrap();
        prop_assert_eq!((outcome.status, &outcome.reports[..]), (0, &[][..]), "{}{}", trace, outcome.text);
    }
}

/// The recordings in scenarios/traces, on the host's own Linux.
#[test]
fn the_committed_recordings_replay_on_linux() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenarios/traces");
    for name in ["python3", "rustc", "git"] {
        let text = std::fs::read_to_string(format!("{folder}/{name}.trace")).unwrap();
        let trace = parse(&text).unwrap();
        assert_eq!(trace.status, Some(0), "{name}");
        let Compiled { blob, summary } = compile(&trace);
        assert!(summary.records > 100, "{name}: {summary}");
        let outcome = guest::native::run("replay", "copies=2", Some(&blob)).unwrap();
        assert_eq!(outcome.reports, [], "{name}: {}", outcome.text);
        assert_eq!(outcome.status, 0, "{name}");
    }
}
