//! Where results go, and what is listed.

use std::process::{Command, Stdio};

use super::{refused, stalemate, stderr, stdout};

#[test]
fn a_result_of_another_program_is_not_overwritten() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    std::fs::write(directory.path().join("result.json"), "{}").expect("the file is written");
    let out = directory.path().to_str().expect("UTF-8");
    refused(&["run", "smoke", "--out", out], &["result.json", "--force"]);
    let kept = std::fs::read_to_string(directory.path().join("result.json")).expect("still there");
    assert_eq!(kept, "{}");
}

#[test]
fn a_file_that_is_no_result_is_not_overwritten() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("package.json");
    std::fs::write(&file, "{\"mine\": 1}").expect("the file is written");
    let path = file.to_str().expect("UTF-8");
    let explore = ["explore", "litmus-unmap", "--schedules", "1"];
    for option in ["--json", "--trace"] {
        let words = [&explore[..], &[option, path]].concat();
        refused(&words, &["package.json", "give another name"]);
    }
    let kept = std::fs::read_to_string(&file).expect("still there");
    assert_eq!(kept, "{\"mine\": 1}");
    // One of ours is.
    std::fs::remove_file(&file).expect("it is there");
    for _ in 0..2 {
        let output = stalemate(&[&explore[..], &["--json", path]].concat());
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    }
}

#[test]
fn two_options_do_not_name_one_file() {
    for words in [
        &[
            "snapshot",
            "litmus-unmap",
            "--out",
            "one.file",
            "--json",
            "./one.file",
        ][..],
        &[
            "explore",
            "litmus-unmap",
            "--trace",
            "one.json",
            "--json",
            "./one.json",
        ],
    ] {
        refused(words, &["name one file"]);
    }
    refused(
        &[
            "explore",
            "litmus-unmap",
            "--engine",
            "kvm",
            "--window",
            "pte-clear,idle",
        ],
        &["behind idle a vCPU halts"],
    );
}

/// Only `--json` goes to stdout.
#[test]
fn a_file_of_which_a_dash_is_the_name_is_asked_for_in_full() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    for line in [
        "explore litmus-unmap --schedules 1 --trace -",
        "explore litmus-unmap --schedules 1 --out -",
        "replay scenarios/reproducers/flush-range-short.repro --trace -",
        "snapshot litmus-unmap -o -",
        "snapshot litmus-unmap --out=-",
        "run smoke --out -",
        "inspect smoke --at idle --out -",
        "record -o - -- true",
        "record --output - -- true",
    ] {
        let words: Vec<&str> = line.split_whitespace().collect();
        refused(&words, &["'-'", "name one (./- for"]);
    }
    let output = Command::new(env!("CARGO_BIN_EXE_stalemate"))
        .args([
            "explore",
            "litmus-unmap",
            "--schedules",
            "1",
            "--trace",
            "./-",
        ])
        .current_dir(directory.path())
        .output()
        .expect("the binary runs");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(directory.path().join("-").exists());
}

#[test]
fn a_quiet_exploration_says_its_verdict_and_where_its_findings_are() {
    let clean = stalemate(&["explore", "litmus-unmap", "--schedules", "2", "--quiet"]);
    assert_eq!(stdout(&clean), "✔ nothing wrong was seen\n");
    let out = tempfile::tempdir().expect("a temporary directory");
    let out = out.path().to_str().expect("UTF-8");
    let words = [
        "explore",
        "litmus-unmap",
        "--bug",
        "free-before-flush",
        "--out",
        out,
    ];
    let found = stalemate(&[&words[..], &["--quiet", "--seed", "1"]].concat());
    let text = stdout(&found);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert!(
        lines[0].contains("schedules fail") && lines[1].contains(".repro"),
        "{text}"
    );
}

#[test]
fn an_output_that_cannot_be_written_is_refused_before_the_run() {
    refused(
        &["run", "smoke", "--out", "/dev/null/x"],
        &["cannot write /dev/null/x"],
    );
    refused(
        &["run", "smoke", "--json", "/dev/null/x.json"],
        &["cannot write /dev/null/x.json"],
    );
}

#[test]
fn list_shows_every_name_as_text_and_as_json() {
    let expected = [
        (
            "programs",
            vec!["smoke", "unmap-race", "cow-fork", "mprotect-race", "replay"],
        ),
        ("params", vec!["flush_ceiling", "poison", "bug"]),
        (
            "bugs",
            vec![
                "shootdown-skip-remote",
                "fork-no-writeprotect-flush",
                "free-before-flush",
            ],
        ),
        (
            "points",
            vec!["syscall-enter", "pte-install", "flush-sync", "idle"],
        ),
        ("invariants", vec!["P-01"]),
        (
            "scenarios",
            vec![
                "smoke",
                "unmap-race",
                "cow-fork",
                "mprotect-race",
                "trace-python3",
                "trace-rustc",
                "trace-git",
            ],
        ),
    ];
    for (what, names) in expected {
        let text = stalemate(&["list", what]);
        assert_eq!(text.status.code(), Some(0), "{}", stderr(&text));
        let json = stalemate(&["list", what, "--json"]);
        let entries: Vec<serde_json::Value> =
            serde_json::from_slice(&json.stdout).expect("stdout is JSON only");
        assert_eq!(
            stderr(&json),
            stdout(&text),
            "the text goes to stderr beside JSON"
        );
        for name in names {
            assert!(
                stdout(&text).lines().any(|line| line.starts_with(name)),
                "{what}: {name}"
            );
            let entry = entries.iter().find(|entry| entry["name"] == name);
            let help = entry
                .and_then(|entry| entry["help"].as_str())
                .unwrap_or_default();
            assert!(
                help.len() > 10 && !help.starts_with("invalid"),
                "{what} {name}: '{help}'"
            );
        }
        let swallowed = stalemate(&["list", "--json", what]);
        assert_eq!(swallowed.stdout, json.stdout, "list --json {what}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_stalemate"))
        .args(["list", "points"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

#[test]
fn a_result_that_is_lost_is_an_error() {
    for words in [
        &["list", "params"][..],
        &["list", "params", "--json"],
        &["list", "--help"],
        &["--version"],
    ] {
        let full = std::fs::File::create("/dev/full").expect("/dev/full is there");
        let output = Command::new(env!("CARGO_BIN_EXE_stalemate"))
            .args(words)
            .stdout(full)
            .stderr(Stdio::piped())
            .output()
            .expect("the binary runs");
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{words:?}\n{text}");
        assert!(text.contains("cannot write to stdout: No space"), "{text}");
    }
}
