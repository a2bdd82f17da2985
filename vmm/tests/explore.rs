//! Exploration from outside: two engines, failpoints, traces. Tests of vCPUs need /dev/kvm: without it
//! they fail and say so.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Runs `command` with `words` at the root of the repository; no terminal, no colours.
fn ran(command: &mut Command, words: &[&str]) -> Output {
    command
        .args(words)
        .current_dir(REPOSITORY)
        .env_remove("STALEMATE_HOST_KIND")
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .output()
        .expect("the command runs")
}

fn stalemate(words: &[&str]) -> Output {
    ran(&mut Command::new(env!("CARGO_BIN_EXE_stalemate")), words)
}

fn text(output: &Output) -> String {
    format!(
        "exit {:?}\n--- stdout\n{}\n--- stderr\n{}",
        output.status.code(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Runs `words`, which must end with `exit` and say each of `essential`.
#[track_caller]
fn says(exit: i32, words: &[&str], essential: &[&str]) -> String {
    let text = text(&stalemate(words));
    assert!(
        text.starts_with(&format!("exit Some({exit})\n")),
        "{words:?}: not {exit}: {text}"
    );
    for word in essential {
        assert!(
            text.contains(word),
            "{words:?} does not say '{word}': {text}"
        );
    }
    text
}

#[track_caller]
fn json(exit: i32, words: &[&str]) -> Value {
    let output = stalemate(&[words, &["--json"]].concat());
    assert_eq!(
        output.status.code(),
        Some(exit),
        "{words:?}: {}",
        text(&output)
    );
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// A directory for reproducers, and its name.
fn directory() -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().expect("a directory");
    let name = directory.path().to_str().expect("UTF-8").to_owned();
    (directory, name)
}

/// The reproducers in `directory`.
fn reproducers(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).expect("listed");
    let paths = entries.map(|entry| entry.expect("readable").path());
    paths
        .filter(|path| path.extension().is_some_and(|e| e == "repro"))
        .collect()
}

#[test]
fn what_the_model_finds_is_confirmed_on_vcpus() {
    let (out, name) = directory();
    let words = ["explore", "litmus-unmap", "--engine", "both", "--seed", "1"];
    let bug = ["--bug", "shootdown-skip-remote", "--out", &name];
    let found = json(1, &[&words[..], &bug].concat());
    let violation = &found["confirmed"]["violations"][0];
    let confirmation = &violation["confirmation"];
    assert_eq!(confirmation["same_ending"], true, "{found}");
    assert_eq!(confirmation["divergence"], Value::Null);
    assert!(confirmation["events"].as_u64() > Some(10));
    assert_eq!(confirmation["events"], confirmation["same_events"]);

    let file = reproducers(out.path()).remove(0);
    let file = file.to_str().expect("UTF-8");
    let replay = ["replay", file, "--engine", "both", "--brief", "--expect"];
    says(0, &replay, &["confirmed on vCPUs: same ending"]);
    let replayed = json(0, &replay);
    assert_eq!(replayed["replays"][0]["confirmation"], *confirmation);
}

#[test]
fn clean_schedules_are_confirmed_on_vcpus() {
    let words = [
        "explore",
        "litmus-switch",
        "--engine",
        "both",
        "--seed",
        "4",
    ];
    let more = ["--schedules", "300", "--confirm", "5"];
    let result = json(0, &[&words[..], &more].concat());
    let clean = &result["confirmed"]["clean"];
    assert_eq!(
        (&clean["asked"], &clean["compared"]),
        (&5.into(), &5.into())
    );
    assert_eq!(clean["diverged"], Value::Array(Vec::new()));
    assert!(clean["events"].as_u64() > Some(100), "{clean}");
}

#[test]
fn a_host_without_kvm_is_told_before_anything_is_explored() {
    let script = "mount -t tmpfs tmpfs /dev && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args([
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        script,
        "sh",
    ]);
    command.arg(env!("CARGO_BIN_EXE_stalemate"));
    let words = [
        "explore",
        "litmus-unmap",
        "--engine",
        "both",
        "--schedules",
        "1",
    ];
    let output = ran(&mut command, &words);
    let text = text(&output);
    assert_eq!(output.status.code(), Some(3), "{text}");
    let lab = "scripts/lab -- explore litmus-unmap --engine both";
    assert!(text.contains("no /dev/kvm") && text.contains(lab), "{text}");
    assert!(!text.contains("explored"), "{text}");
}

#[test]
fn confirm_without_a_second_engine_is_refused() {
    let words = ["explore", "litmus-unmap", "--confirm", "3"];
    says(2, &words, &["--confirm", "--engine both"]);
}
