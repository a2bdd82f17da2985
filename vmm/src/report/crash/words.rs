//! Numbers and symbols in a person's words.

use std::fmt::Write as _;

use abi::channel::EventKind;
use abi::objects::FrameKind;
use abi::pte::{Pte, fault};
use abi::syscall::{decode, nr};

use super::EventReport;
use super::backtrace::{Entry, SYSCALL};
use crate::inspect::pte_flags;
use crate::kvm::vcpu::Registers;

/// A demangled name without what its source line says anyway: `<impl …>` goes, the path shrinks to its
/// last two words, and to its last one inside `<…>`.
pub(super) fn brief(name: &str) -> String {
    let mut text = String::new();
    let mut rest = name;
    let mut depth = 0_usize;
    while let Some(first) = rest.chars().next() {
        if let Some(end) = rest.strip_prefix("<impl ").and_then(closing) {
            let behind = &rest["<impl ".len() + end..];
            // The path before it and the one behind it are one.
            rest = behind.strip_prefix("::").unwrap_or(behind);
            continue;
        }
        let is_path = |c: char| c.is_alphanumeric() || "_:{}#".contains(c);
        let end = rest.find(|c| !is_path(c)).unwrap_or(rest.len());
        if end == 0 {
            match first {
                '<' => depth += 1,
                '>' => depth = depth.saturating_sub(1),
                _ => {}
            }
            text.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        }
        let (path, behind) = rest.split_at(end);
        text.push_str(path);
        rest = behind;
        if depth > 0 || !rest.starts_with("<impl ") {
            shorten(&mut text, if depth == 0 { 2 } else { 1 });
        }
    }
    text
}

/// Index behind the `>` that closes what is open at the start of `text`.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 1;
    text.char_indices().find_map(|(at, c)| {
        match c {
            '<' => depth += 1,
            '>' => depth -= 1,
            _ => {}
        }
        (depth == 0).then_some(at + 1)
    })
}

/// Leaves `words` words of the path at the end of `text`.
fn shorten(text: &mut String, words: usize) {
    let path = text
        .rfind(|c: char| !(c.is_alphanumeric() || "_:{}#".contains(c)))
        .map_or(0, |at| at + 1);
    if text[path..].starts_with("::") {
        return;
    }
    if let Some((at, _)) = text[path..].rmatch_indices("::").nth(words - 1) {
        text.replace_range(path..path + at + 2, "");
    }
}

/// How the kernel was entered; by a page fault at `gva`, where that is known.
pub(super) fn entry(entry: &Entry, gva: Option<u64>) -> String {
    let (error, cpl) = (entry.error.0, entry.cpl);
    match entry.vector {
        SYSCALL => system_call(&entry.regs),
        14 => format!("#PF at CPL {cpl}: {}", page_fault(error, gva)),
        vector @ 0..32 => format!("{} at CPL {cpl}, error {error:#x}", exception(vector)),
        vector => format!("interrupt {vector:#x} at CPL {cpl}"),
    }
}

fn system_call(regs: &Registers) -> String {
    format!(
        "system call {}({:#x}, {:#x}, {:#x}, {:#x})",
        call_name(regs.rax),
        regs.rdi,
        regs.rsi,
        regs.rdx,
        regs.r10
    )
}

fn call_name(number: u64) -> String {
    nr::ALL
        .iter()
        .find(|(_, known)| *known == number)
        .map_or_else(|| format!("{number:#x}"), |(name, _)| name.to_lowercase())
}

/// What the error code of a page fault says (SDM vol. 3A, 5.7).
fn page_fault(error: u64, gva: Option<u64>) -> String {
    let access = match (error & fault::FETCH, error & fault::WRITE) {
        (0, 0) => "read",
        (0, _) => "write",
        _ => "fetch",
    };
    let why = match (error & fault::RESERVED, error & fault::PRESENT) {
        (0, 0) => "not present",
        (0, _) => "not permitted",
        _ => "reserved bit set",
    };
    let of = gva.map(|gva| format!(" of {gva:#x}")).unwrap_or_default();
    format!("{access}{of}, {why} (error {error:#x})")
}

fn exception(vector: u64) -> String {
    // SDM vol. 3A, table 6-1.
    let names = [
        "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "", "#TS", "#NP", "#SS",
        "#GP", "#PF", "", "#MF", "#AC", "#MC", "#XM", "#VE", "#CP",
    ];
    match names.get(vector as usize) {
        Some(&name) if !name.is_empty() => name.to_owned(),
        _ => format!("exception {vector}"),
    }
}

/// The arguments of an event.
pub(super) fn arguments(event: &EventReport) -> String {
    let kind = EventKind::ALL.iter().find(|kind| kind.name() == event.kind);
    let level = event.args.iter().find(|(name, _)| *name == "level");
    let level = level.map_or(1, |(_, level)| level.0.clamp(1, 4) as u8);
    let mut text = String::new();
    for (name, value) in &event.args {
        let value = value.0;
        let shown = match (kind, *name) {
            (Some(EventKind::SyscallEnter | EventKind::SyscallExit), "nr") => {
                let _ = write!(text, " {}", call_name(value));
                continue;
            }
            (Some(EventKind::SyscallExit), "result") => match decode(value) {
                Err(errno) => format!("-{errno}"),
                Ok(value) => format!("{value:#x}"),
            },
            (Some(EventKind::FrameAlloc | EventKind::FrameFree), "kind") => FrameKind::ALL
                .iter()
                .find(|kind| **kind as u64 == value)
                .map_or_else(
                    || value.to_string(),
                    |kind| format!("{kind:?}").to_lowercase(),
                ),
            (Some(EventKind::PteChange), "old" | "new") if value != 0 => {
                let pte = Pte(value);
                format!("{:#x}({})", pte.address(), pte_flags(pte, level))
            }
            (_, "order" | "level" | "mm" | "class" | "task") => value.to_string(),
            _ => format!("{value:#x}"),
        };
        let _ = write!(text, " {name}={shown}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::Hex;
    use super::*;

    #[test]
    fn a_name_keeps_its_last_words() {
        for (name, short) in [
            ("memcpy", "memcpy"),
            ("guest::programs::crash::spin", "crash::spin"),
            (
                "guest_kernel::task::testbed::<impl guest_kernel::kernel::Kernel<A>>::testbed_crash",
                "testbed::testbed_crash",
            ),
            (
                "<guest::rt::Rt<T> as guest::sys::Sys>::syscall",
                "<Rt<T> as Sys>::syscall",
            ),
            (
                "a::b::c<d::e<f::g>>::{closure#0}",
                "b::c<e<g>>::{closure#0}",
            ),
            ("a::<impl b", "a::<impl b"),
            ("a::b::entry+0x34", "b::entry+0x34"),
            ("", ""),
        ] {
            assert_eq!(brief(name), short);
        }
    }

    proptest::proptest! {
        #[test]
        fn no_name_makes_it_panic(name in "([a-c:<>]|<impl |ä){0,24}") {
            brief(&name);
        }
    }

    #[test]
    fn entries_say_what_they_are() {
        let text = |vector, error, cpl, gva| {
            let regs = Registers {
                rax: nr::MUNMAP,
                rdi: 0x1000,
                ..Registers::default()
            };
            let error = Hex(error);
            entry(
                &Entry {
                    vector,
                    error,
                    cpl,
                    regs,
                },
                gva,
            )
        };
        for (shown, expected) in [
            (
                text(SYSCALL, 0, 3, None),
                "system call munmap(0x1000, 0x0, 0x0, 0x0)",
            ),
            (
                text(14, 7, 3, None),
                "#PF at CPL 3: write, not permitted (error 0x7)",
            ),
            (
                text(14, 0x10, 0, Some(0x5000)),
                "#PF at CPL 0: fetch of 0x5000, not present (error 0x10)",
            ),
            (
                text(14, 9, 0, None),
                "#PF at CPL 0: read, reserved bit set (error 0x9)",
            ),
            (text(13, 8, 0, None), "#GP at CPL 0, error 0x8"),
            (text(31, 0, 0, None), "exception 31 at CPL 0, error 0x0"),
            (text(0xf0, 0, 0, None), "interrupt 0xf0 at CPL 0"),
        ] {
            assert_eq!(shown, expected);
        }
    }

    #[test]
    fn arguments_of_events_are_named() {
        let text = |kind: EventKind, args: &[u64]| {
            arguments(&EventReport {
                sequence: 0,
                tsc: 0,
                before_ns: None,
                task: 1,
                kind: kind.name().into(),
                args: kind
                    .arg_names()
                    .iter()
                    .copied()
                    .zip(args.iter().copied().map(Hex))
                    .collect(),
            })
        };
        assert_eq!(
            text(
                EventKind::SyscallExit,
                &[nr::MMAP, (-12_i64).cast_unsigned()]
            ),
            " mmap result=-ENOMEM"
        );
        assert_eq!(
            text(EventKind::FrameAlloc, &[0x39c000, 0, 5]),
            " frame=0x39c000 order=0 kind=anon"
        );
        assert_eq!(
            text(
                EventKind::PteChange,
                &[1, 0x2000, 1, 0, 0x8000_0000_0039_c067]
            ),
            " mm=1 gva=0x2000 level=1 old=0x0 new=0x39c000(P W U A D NX)"
        );
    }
}
