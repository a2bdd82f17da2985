//! What is refused of options, and what `--help` teaches.

use super::{refused, stalemate, stderr, stdout};

/// What a file that `snapshot` wrote begins with.
const SNAPSHOT_MAGIC: &[u8] = b"STALESNP";

#[test]
fn usage_errors_are_bad_input() {
    refused(&["runn", "smoke"], &["runn", "run"]);
    refused(
        &["replay", "--json", "a.repro", "b.repro"],
        &["would overwrite"],
    );
    refused(&["replay", "no-such.repro"], &["no-such.repro"]);
    refused(
        &["run", "smoke", "--memry", "64M"],
        &["--memry", "--memory"],
    );
    refused(
        &["run", "smoke", "--quiet", "--verbose"],
        &["--quiet", "--verbose"],
    );
    refused(&["run", "smoke", "--runs", "0"], &["--runs"]);
    refused(&["run", "smoke", "--timeout", "5"], &["'5' has no unit"]);
    refused(&["record", "-o", "x.trace"], &["COMMAND"]);
}

#[test]
fn help_teaches_with_examples_and_exit_codes() {
    let output = stalemate(&["--help"]);
    assert_eq!(output.status.code(), Some(0));
    let text = stdout(&output);
    for word in [
        "doctor",
        "run",
        "inspect",
        "record",
        "list",
        "Examples:",
        "Exit codes:",
    ] {
        assert!(text.contains(word), "{word}:\n{text}");
    }
    for command in ["doctor", "run", "inspect", "record", "list"] {
        let output = stalemate(&[command, "--help"]);
        assert_eq!(output.status.code(), Some(0), "{command}");
        assert!(
            stdout(&output).contains(&format!("stalemate {command}")),
            "{}",
            stdout(&output)
        );
        assert!(stdout(&output).contains("--json"), "{}", stdout(&output));
    }
    for command in ["run", "explore", "replay", "snapshot"] {
        let text = stdout(&stalemate(&[command, "--help"]));
        let codes = text.split_once("Exit codes:").unwrap_or_default().1;
        for code in 0..=5 {
            // A set-up is not judged.
            let is_given = codes.contains(&format!("\n  {code}  "));
            assert!(
                is_given || (command, code) == ("snapshot", 1),
                "{code}: {text}"
            );
        }
        assert!(text.contains("--seed"), "{text}");
    }
    let version = stdout(&stalemate(&["--version"]));
    assert_eq!(
        version.trim(),
        concat!("stalemate ", env!("CARGO_PKG_VERSION"))
    );
    assert_eq!(stalemate(&[]).status.code(), Some(2));
}

/// The option, and the fix that is named; the words come after the scenario's.
#[test]
fn an_option_that_the_others_leave_without_effect_is_refused() {
    let explore: &[(&str, &str, &str)] = &[
        ("--interrupts", "hardware", "leave --interrupts out"),
        ("--interrupts", "controlled", "leave --interrupts out"),
        ("--kernel", "/bin/ls", "built in"),
        ("--timeout", "5s", "--time-limit"),
        ("--param", "stamp=tsc", "leave the parameter stamp out"),
        ("--preemptions", "2", "--strategy exhaustive"),
        ("--preemptions", "2 --strategy pct", "--strategy exhaustive"),
        ("--depth", "3 --strategy random", "--strategy pct"),
        ("--depth", "4 --strategy exhaustive", "--strategy pct"),
        ("--seed", "1 --strategy exhaustive", "leave --seed out"),
        ("--seed", "1 --strategy round-robin", "--fail-any"),
        (
            "--fail-any",
            "slab-alloc --strategy exhaustive",
            "--fail NAME@VCPU:N",
        ),
        ("--confirm", "3", "--engine both"),
        ("--confirm", "20 --engine kvm", "--engine both"),
        ("--trace", "t.json --engine both --confirm 0", "--confirm 1"),
        ("--window", "flush-issue", "--engine kvm"),
        ("--window", "flush-issue:2 --engine both", "--engine kvm"),
        (
            "--state-every",
            "100 --fail slab-alloc@0:1",
            "leave --state-every out",
        ),
        (
            "--state-every",
            "9 --fail-any slab-alloc",
            "leave --state-every out",
        ),
    ];
    let snapshot: &[(&str, &str, &str)] = &[
        ("--interrupts", "controlled", "leave --interrupts out"),
        ("--kernel", "/bin/ls", "built in"),
        ("--timeout", "5s", "leave --timeout out"),
        ("--seed", "1", "stalemate explore"),
        ("--param", "stamp=tsc", "leave the parameter stamp out"),
    ];
    let inspect: &[(&str, &str, &str)] = &[
        ("--force", "--at idle", "--out"),
        ("--vcpu", "0 --after 1ms", "--after"),
    ];
    let commands = [
        ("explore litmus-unmap", explore),
        ("snapshot litmus-unmap --out x.snapshot", snapshot),
        ("run smoke", &[("--force", "", "--out")]),
        ("inspect smoke", inspect),
    ];
    for (command, cases) in commands {
        for (option, rest, fix) in cases {
            let line = format!("{command} {option} {rest}");
            let words: Vec<&str> = line.split_whitespace().collect();
            let usage = format!("Usage: stalemate {}", words[0]);
            refused(&words, &[option, fix, &usage]);
        }
    }
}

#[test]
fn an_option_that_has_an_effect_is_not_refused() {
    for words in [
        "--strategy exhaustive --preemptions 0",
        "--strategy pct --depth 1 --seed 0 --state-every 1",
        "--strategy round-robin --fail-any slab-alloc --seed 1",
        "--param stamp=tsc --param stamp=ticket",
    ] {
        let line = format!("explore litmus-unmap --schedules 2 {words}");
        let output = stalemate(&line.split_whitespace().collect::<Vec<_>>());
        assert_eq!(output.status.code(), Some(0), "{line}\n{}", stderr(&output));
    }
    // A saved machine has vCPUs, whose instructions can be stepped: what is wrong is the file.
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("cut.snapshot");
    std::fs::write(&file, SNAPSHOT_MAGIC).expect("the file is written");
    let file = file.to_str().expect("UTF-8");
    for words in [&["explore", file][..], &["explore", "--json", file]] {
        let words = [words, &["--window", "flush-issue"]].concat();
        let text = stderr(&stalemate(&words));
        assert!(text.contains("cut.snapshot"), "{text}");
        assert!(!text.contains("--window"), "{text}");
    }
}

#[test]
fn explore_says_what_it_cannot_do_before_it_starts() {
    refused(
        &["explore", "litmus-unmap", "--out", "Cargo.toml"],
        &["--out Cargo.toml", "no directory"],
    );
    refused(&["explore", "litmus-unmap", "--jobs", "1000"], &["1 to 64"]);
    refused(&["explore", "litmus-unmap", "--jobs", "0"], &["1 to 64"]);
}
