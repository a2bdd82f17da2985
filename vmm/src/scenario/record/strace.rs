//! Reads what `strace -f -X raw -o FILE` writes.
//!
//! A call that another task's line interrupts comes as two lines, `<unfinished ...>` and `resumed>`. The
//! trace needs one moment for it: that of its completion where it gives memory (mmap, mremap, brk: the
//! address may just have become free), that of its start where it takes memory away or ends something
//! (another task may get the address before the call's end is printed) and where it starts a task (the
//! child's lines may come before its number is known).

use std::collections::HashMap;

use crate::scenario::trace::{Call, Entry, Outcome, errno_by_name, signal_by_name};

/// What strace saw.
#[derive(Debug, Default)]
pub(super) struct Recording {
    pub(super) entries: Vec<Entry>,
    pub(super) tasks: u64,
    /// Paths of the files that were mapped, by the number that mmap names.
    pub(super) files: Vec<String>,
    /// Lines without a meaning for us, and calls of tasks that nobody started.
    pub(super) not_understood: u64,
}

/// A call of a thread that is known by its number in the system.
struct Record {
    pid: u64,
    call: Call,
    outcome: Outcome,
}

/// The first line of a call in two lines.
struct Unfinished {
    /// Everything before `<unfinished ...>`.
    text: String,
    /// The call's place, where that is its start.
    place: Option<usize>,
}

#[derive(Default)]
struct Reader {
    records: Vec<Record>,
    unfinished: HashMap<u64, Unfinished>,
    files: Vec<String>,
    not_understood: u64,
}

/// Reads the log of a whole run.
pub(super) fn parse(log: &str) -> Recording {
    let mut reader = Reader::default();
    for line in log.lines().filter(|line| !line.trim().is_empty()) {
        if reader.line(line).is_none() {
            reader.not_understood += 1;
        }
    }
    number_tasks(reader)
}

impl Reader {
    /// `None` for a line that was not understood.
    fn line(&mut self, line: &str) -> Option<()> {
        let (pid, rest) = line.trim_start().split_once(' ')?;
        let pid: u64 = pid.parse().ok()?;
        let rest = rest.trim();
        if rest.starts_with("---") {
            return Some(());
        }
        if let Some(event) = rest.strip_prefix("+++ ") {
            return self.end(pid, event);
        }
        if let Some(rest) = rest.strip_prefix("<... ") {
            let (_, rest) = rest.split_once(" resumed>")?;
            let first = self.unfinished.remove(&pid)?;
            return self.finished(pid, &format!("{}{rest}", first.text), first.place);
        }
        if let Some(text) = rest.strip_suffix("<unfinished ...>") {
            let call = call(text.trim_end())?;
            let at_its_end = matches!(
                call,
                Call::Mmap { .. } | Call::Mremap { .. } | Call::Brk { .. }
            );
            let place = (!at_its_end).then(|| self.push(pid, call, Outcome::Never));
            self.unfinished.insert(
                pid,
                Unfinished {
                    text: text.to_owned(),
                    place,
                },
            );
            return Some(());
        }
        self.finished(pid, rest, None)
    }

    fn push(&mut self, pid: u64, call: Call, outcome: Outcome) -> usize {
        self.records.push(Record { pid, call, outcome });
        self.records.len() - 1
    }

    /// A whole call: `name(arguments) = result`.
    fn finished(&mut self, pid: u64, text: &str, place: Option<usize>) -> Option<()> {
        let (text, result) = text.rsplit_once(" = ")?;
        let text = text.trim_end().strip_suffix(')')?;
        let mut call = call(text)?;
        if let Call::Mmap { fd, .. } = &mut call
            && *fd >= 0
        {
            *fd = self.file(file_of(text)?);
        }
        let outcome = match outcome(result)? {
            // brk tells of a failure by returning the old end.
            Outcome::Returned(end) if matches!(call, Call::Brk { addr } if addr != 0 && addr != end) => {
                Outcome::Failed(abi::syscall::Errno::ENOMEM)
            }
            outcome => outcome,
        };
        match place {
            Some(place) => self.records[place].outcome = outcome,
            None => {
                self.push(pid, call, outcome);
            }
        }
        Some(())
    }

    /// The number of a file: a recording numbers them in the order in which they are mapped.
    fn file(&mut self, name: &str) -> i64 {
        let known = self.files.iter().position(|file| file == name);
        let number = known.unwrap_or_else(|| {
            self.files.push(name.to_owned());
            self.files.len() - 1
        });
        number as i64
    }

    /// `+++ exited with 0 +++` and the like.
    fn end(&mut self, pid: u64, event: &str) -> Option<()> {
        let event = event.trim_end_matches("+++").trim_end();
        if event.starts_with("exited with ") {
            // The exit call itself was recorded.
            return Some(());
        }
        if let Some(signal) = event.strip_prefix("killed by ") {
            let name = signal.split(' ').next()?;
            let signal = signal_by_name(name).unwrap_or(0);
            self.push(pid, Call::Killed { signal }, Outcome::Never);
            return Some(());
        }
        if let Some(by) = event.strip_prefix("superseded by execve in pid ") {
            // The thread that executes goes on under the number of the process's first one.
            let by: u64 = by.parse().ok()?;
            if let Some(first) = self.unfinished.remove(&by) {
                if let Some(record) = first.place.and_then(|place| self.records.get_mut(place)) {
                    record.pid = pid;
                }
                self.unfinished.insert(pid, first);
            }
            self.push(by, Call::Exit { status: 0 }, Outcome::Never);
            return Some(());
        }
        None
    }
}

/// Replaces thread numbers of the system, which may be used twice, by numbers in order of start.
fn number_tasks(reader: Reader) -> Recording {
    let mut recording = Recording {
        not_understood: reader.not_understood,
        files: reader.files,
        ..Recording::default()
    };
    let mut tasks: HashMap<u64, u32> = HashMap::new();
    if let Some(first) = reader.records.first() {
        tasks.insert(first.pid, 0);
    }
    let mut next = u32::from(!tasks.is_empty());
    for Record {
        pid,
        call,
        mut outcome,
    } in reader.records
    {
        let Some(&task) = tasks.get(&pid) else {
            recording.not_understood += 1;
            continue;
        };
        if call.starts_task()
            && let Outcome::Returned(child) = outcome
        {
            tasks.insert(child, next);
            outcome = Outcome::Returned(next.into());
            next += 1;
        }
        recording.entries.push(Entry {
            line: 0,
            task,
            call,
            outcome,
        });
    }
    recording.tasks = next.into();
    recording
}

fn outcome(result: &str) -> Option<Outcome> {
    let result = result.trim();
    let first = result.split(' ').next()?;
    match first {
        "?" => Some(Outcome::Never),
        "-1" => errno_by_name(result.split(' ').nth(1)?).map(Outcome::Failed),
        _ => number(first).map(Outcome::Returned),
    }
}

/// A call without its closing parenthesis; the arguments may be cut off.
fn call(text: &str) -> Option<Call> {
    let (name, arguments) = text.split_once('(')?;
    let arguments: Vec<&str> = split(arguments);
    let number_at = |index: usize| number(arguments.get(index)?);
    // An `int` that strace prints signed.
    let signed = |index: usize| {
        let (number, _) = fd_and_path(arguments.get(index)?);
        number.parse::<i64>().ok()
    };
    let flags = || {
        let (_, flags) = text.split_once("flags=")?;
        number(&flags[..flags.find([',', ')', '}', ' ']).unwrap_or(flags.len())])
    };
    Some(match name {
        "mmap" => Call::Mmap {
            addr: number_at(0)?,
            len: number_at(1)?,
            prot: number_at(2)?,
            flags: number_at(3)?,
            fd: signed(4)?,
            offset: number_at(5)?,
        },
        "munmap" => Call::Munmap {
            addr: number_at(0)?,
            len: number_at(1)?,
        },
        "mprotect" => Call::Mprotect {
            addr: number_at(0)?,
            len: number_at(1)?,
            prot: number_at(2)?,
        },
        "mremap" => Call::Mremap {
            addr: number_at(0)?,
            old_len: number_at(1)?,
            new_len: number_at(2)?,
            flags: number_at(3)?,
            // Only there with MREMAP_FIXED.
            new_addr: number_at(4).unwrap_or(0),
        },
        "brk" => Call::Brk {
            addr: number_at(0)?,
        },
        "madvise" => Call::Madvise {
            addr: number_at(0)?,
            len: number_at(1)?,
            advice: number_at(2)?,
        },
        "clone" => Call::Clone { flags: flags()? },
        "clone3" => Call::Clone3 { flags: flags()? },
        "fork" => Call::Fork,
        "vfork" => Call::Vfork,
        "execve" => Call::Execve {
            path: string(arguments.first()?)?,
        },
        "exit" => Call::Exit { status: signed(0)? },
        "exit_group" => Call::ExitGroup { status: signed(0)? },
        _ => return None,
    })
}

/// The path, or where there is none the descriptor, of an mmap.
fn file_of(text: &str) -> Option<&str> {
    let (_, arguments) = text.split_once('(')?;
    let (number, path) = fd_and_path(split(arguments).get(4)?);
    Some(path.unwrap_or(number))
}

/// `3</a/path>`, as strace -y writes descriptors.
fn fd_and_path(text: &str) -> (&str, Option<&str>) {
    match text.split_once('<') {
        Some((number, path)) => (number, path.strip_suffix('>')),
        None => (text, None),
    }
}

/// Arguments, at commas outside strings, brackets and braces.
fn split(text: &str) -> Vec<&str> {
    let mut arguments = Vec::new();
    let (mut start, mut depth, mut quoted, mut escaped) = (0, 0i32, false, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            _ if quoted => {}
            '[' | '{' | '(' => depth += 1,
            ']' | '}' | ')' => depth -= 1,
            ',' if depth == 0 => {
                arguments.push(text[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    arguments.push(text[start..].trim());
    arguments
}

/// `NULL`, decimal, hexadecimal, or several of them with `|` between.
fn number(text: &str) -> Option<u64> {
    text.split('|').try_fold(0, |sum, part| {
        let part = part.trim();
        let value = match (part, part.strip_prefix("0x")) {
            ("NULL", _) => 0,
            (_, Some(digits)) => u64::from_str_radix(digits, 16).ok()?,
            (_, None) => part.parse().ok()?,
        };
        Some(sum | value)
    })
}

/// A string literal of strace, C escapes included; bytes that are no UTF-8 become `?`.
fn string(text: &str) -> Option<String> {
    let inside = text.strip_prefix('"')?;
    let mut bytes = Vec::new();
    let mut rest = inside.bytes().peekable();
    while let Some(byte) = rest.next() {
        match byte {
            b'"' => break,
            b'\\' => match rest.next()? {
                b'n' => bytes.push(b'\n'),
                b't' => bytes.push(b'\t'),
                digit @ b'0'..=b'7' => {
                    let mut value = u32::from(digit - b'0');
                    for _ in 0..2 {
                        match rest.peek() {
                            Some(digit @ b'0'..=b'7') => {
                                value = value * 8 + u32::from(digit - b'0');
                            }
                            _ => break,
                        }
                        rest.next();
                    }
                    bytes.push(value as u8);
                }
                other => bytes.push(other),
            },
            other => bytes.push(other),
        }
    }
    Some(String::from_utf8_lossy(&bytes).replace('\u{fffd}', "?"))
}

#[cfg(test)]
mod tests {
    use abi::syscall::Errno;
    use proptest::prelude::*;

    use super::*;

    fn shown(log: &str) -> Vec<String> {
        let recording = parse(log);
        assert_eq!(recording.not_understood, 0, "{log}");
        let entries = recording.entries.iter();
        entries
            .map(
                |Entry {
                     task,
                     call,
                     outcome,
                     ..
                 }| format!("{task} {call} = {outcome}"),
            )
            .collect()
    }

    #[test]
    fn whole_calls() {
        let log = r#"
700 execve("/usr/bin/py\"\303\244", ["py", "a) = (b"], 0x7ffc8 /* 42 vars */) = 0
700 execve("/no", ["no"], 0x7ffc8 /* 42 vars */) = -1 ENOENT (No such file or directory)
700 brk(NULL)                         = 0x564612bc6000
700 brk(0x564612be7000)               = 0x564612be7000
700 brk(0x7fffffffffff)               = 0x564612be7000
700 mmap(0x7fe8c1e1c000, 1400832, 0x5, 0x812, 3</lib/libc.so.6>, 0x26000) = 0x7fe8c1e1c000
700 mmap(NULL, 0, 0x1, 0x2, -1, 0)     = -1 EINVAL (Invalid argument)
700 madvise(0x7f3244484000, 270336, 0x4) = 0
700 mremap(0x7f3244484000, 4096, 8192, 0x1) = 0x7f3244490000
700 clone(child_stack=NULL, flags=0x1200000|17, child_tidptr=0x7f64f6ad0a10) = 701
701 exit_group(-1)                     = ?
701 +++ exited with 255 +++
700 --- SIGCHLD {si_signo=SIGCHLD} ---
700 +++ killed by SIGSEGV (core dumped) +++
"#;
        let expected = r#"
0 execve("/usr/bin/py"ä") = 0
0 execve("/no") = -ENOENT
0 brk(0x0) = 0x564612bc6000
0 brk(0x564612be7000) = 0x564612be7000
0 brk(0x7fffffffffff) = -ENOMEM
0 mmap(0x7fe8c1e1c000, 1400832, PROT_READ|PROT_EXEC, MAP_PRIVATE|MAP_FIXED|MAP_DENYWRITE, 0, 0x26000) = 0x7fe8c1e1c000
0 mmap(0x0, 0, PROT_READ, MAP_PRIVATE, -1, 0x0) = -EINVAL
0 madvise(0x7f3244484000, 270336, MADV_DONTNEED) = 0
0 mremap(0x7f3244484000, 4096, 8192, 0x1, 0x0) = 0x7f3244490000
0 clone(CLONE_CHILD_CLEARTID|CLONE_CHILD_SETTID|0x11) = 1
1 exit_group(-1) = ?
0 killed(11) = ?
"#;
        let expected = expected.replace(r#"py"ä"#, r#"py\"ä"#);
        assert_eq!(shown(log), expected.trim().lines().collect::<Vec<_>>());
    }

    #[test]
    fn calls_in_two_lines_have_the_right_moment() {
        let log = "\
10 clone3({flags=0x3d0f00, child_tid=0x7f3, stack_size=0x1ffd40} <unfinished ...>
11 munmap(0x7f0000000000, 8192 <unfinished ...>
10 <... clone3 resumed> => {parent_tid=[11]}, 88) = 11
10 mmap(NULL, 8192, 0x3, 0x22, -1, 0 <unfinished ...>
11 <... munmap resumed>)             = 0
10 <... mmap resumed>)               = 0x7f0000000000
10 vfork( <unfinished ...>
12 execve(\"/bin/true\", [\"true\"], 0x7fff /* 1 var */ <unfinished ...>
10 <... vfork resumed>)              = 12
12 <... execve resumed>)             = 0
11 exit(0 <unfinished ...>
11 <... exit resumed>)               = ?
";
        let expected = [
            "0 clone3(CLONE_VM|CLONE_FS|CLONE_FILES|CLONE_SIGHAND|CLONE_THREAD|CLONE_SYSVSEM|\
             CLONE_SETTLS|CLONE_PARENT_SETTID|CLONE_CHILD_CLEARTID) = 1",
            "1 munmap(0x7f0000000000, 8192) = 0",
            "0 mmap(0x0, 8192, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0x0) = 0x7f0000000000",
            "0 vfork() = 2",
            "2 execve(\"/bin/true\") = 0",
            "1 exit(0) = ?",
        ];
        assert_eq!(shown(log), expected);
    }

    #[test]
    fn a_number_that_is_used_again_is_another_task() {
        let log = "1 fork() = 2\n2 exit(0) = ?\n1 fork() = 2\n2 exit(1) = ?\n";
        let expected = [
            "0 fork() = 1",
            "1 exit(0) = ?",
            "0 fork() = 2",
            "2 exit(1) = ?",
        ];
        assert_eq!(shown(log), expected);
    }

    #[test]
    fn a_thread_that_executes_takes_the_first_ones_number() {
        let log = "\
5 clone3({flags=0x10100}, 88) = 6
6 execve(\"/bin/a\", [\"a\"], 0x7 /* 1 var */ <unfinished ...>
5 +++ superseded by execve in pid 6 +++
5 <... execve resumed>)             = 0
5 exit_group(0)                     = ?
";
        let expected = [
            "0 clone3(CLONE_VM|CLONE_THREAD) = 1",
            "0 execve(\"/bin/a\") = 0",
            "1 exit(0) = ?",
            "0 exit_group(0) = ?",
        ];
        assert_eq!(shown(log), expected);
    }

    #[test]
    fn what_is_not_understood_is_counted() {
        let recording = parse("1 exit(0) = ?\nnonsense\n1 futex(0x1, 0x80) = 0\n9 exit(0) = ?\n");
        assert_eq!(recording.entries.len(), 1);
        assert_eq!(recording.not_understood, 3);
        let failed = parse("1 munmap(0x1, 8) = -1 EINVAL (Invalid argument)\n");
        assert_eq!(failed.entries[0].outcome, Outcome::Failed(Errno::EINVAL));
    }

    /// Text that is nearly strace's.
    fn fragments() -> impl Strategy<Value = String> {
        let fragment = prop::sample::select(vec![
            "1 ",
            "2 ",
            "mmap(",
            "munmap(",
            "clone3({flags=",
            "vfork(",
            "execve(\"",
            "exit(",
            "NULL",
            "0x1000",
            "8192",
            ", ",
            "|",
            "\"",
            "\\",
            "\\777",
            "[",
            "]",
            "}",
            ")",
            " = ",
            "-1 EINVAL",
            "?",
            " <unfinished ...>",
            "<... mmap resumed>",
            "<... vfork resumed>",
            "+++ killed by SIGKILL +++",
            "+++ superseded by execve in pid 2 +++",
            "+++ exited with 0 +++",
            "\n",
            "é",
        ]);
        prop::collection::vec(fragment, 0..60).prop_map(|fragments| fragments.concat())
    }

    proptest! {
        #[test]
        fn nearly_right_text_never_panics_and_what_is_read_prints_and_parses(log in fragments()) {
            let recording = parse(&log);
            let entries = recording.entries;
            let mut trace = crate::scenario::trace::Trace { entries, ..Default::default() };
            trace.number_lines();
            prop_assert_eq!(crate::scenario::trace::parse(&trace.to_string()), Ok(trace));
        }

        #[test]
        fn arbitrary_text_never_panics(log in any::<String>()) {
            let recording = parse(&log);
            prop_assert!(recording.not_understood <= log.lines().count() as u64);
        }
    }
}
