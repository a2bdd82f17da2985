//! `explore` and `replay` on the model engine.

use super::{refused, stalemate};

/// The committed reproducer of a seeded bug, changed, in a file of its own.
fn changed(from: &str, to: &str) -> (tempfile::TempDir, String) {
    let source = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../scenarios/reproducers/flush-range-short.repro"
    );
    let text = std::fs::read_to_string(source).expect("it is committed");
    assert!(text.contains(from), "{text}");
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("changed.repro");
    std::fs::write(&path, text.replacen(from, to, 1)).expect("written");
    (directory, path.to_str().expect("a name").to_owned())
}

#[test]
fn a_reproducer_that_cannot_be_replayed_says_why() {
    let (_directory, path) = changed("kernel = \"", "kernel = \"00");
    refused(
        &["replay", &path],
        &["was found on kernel 00", "--any-kernel"],
    );
    let (_directory, path) = changed("schedule = \"", "schedule = \"i1 ");
    refused(
        &["replay", "--any-kernel", &path],
        &[
            "changed.repro",
            "i1 is to run, but cannot",
            "in flight",
            "explore",
        ],
    );
    let (_directory, path) = changed("schedule = \"", "schedule = \"9:1 ");
    refused(
        &["replay", "--any-kernel", &path],
        &["changed.repro:8: ", "step of 9", "2 vCPUs"],
    );
    let (_directory, path) = changed("schedule = \"", "schedule = \"x ");
    refused(
        &["replay", "--any-kernel", &path],
        &["changed.repro:8: `x` in its schedule"],
    );
    // No test has so many points.
    let (_directory, path) = changed("schedule = \"", "schedule = \"0:900000000 ");
    refused(
        &["replay", "--any-kernel", &path],
        &["changed.repro", "cannot be replayed"],
    );
    let (_directory, path) = changed("schedule = \"", "unknown = \"");
    refused(
        &["replay", "--any-kernel", &path],
        &["changed.repro:8: unknown field"],
    );
    refused(&["replay", "/dev/zero"], &["/dev/zero", "no regular file"]);
    let (_directory, path) = changed("test", "tset");
    refused(
        &["replay", "--any-kernel", &path],
        &["its scenario is refused"],
    );
}

#[test]
fn a_failure_that_does_not_come_is_not_reproduced() {
    let (_directory, path) = changed("bugs = [\"flush-range-short\"]", "bugs = []");
    let output = stalemate(&["replay", &path, "--expect", "--brief"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("not reproduced"));
    let output = stalemate(&["replay", &path, "--brief"]);
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn explore_writes_a_reproducer_that_replay_confirms() {
    let out = tempfile::tempdir().expect("a directory");
    let directory = out.path().to_str().expect("a name");
    let words = [
        "explore",
        "litmus-unmap",
        "--bug",
        "free-before-flush",
        "--seed",
        "3",
    ];
    let found = stalemate(&[&words[..], &["--out", directory]].concat());
    let text = String::from_utf8_lossy(&found.stdout).into_owned();
    assert_eq!(found.status.code(), Some(1), "{text}");
    assert!(
        text.contains("T-01") && text.contains("vCPU 1") && text.contains("munmap"),
        "{text}"
    );
    let file = std::fs::read_dir(out.path()).expect("listed").next();
    let file = file.expect("a reproducer").expect("readable").path();
    let file = file.to_str().expect("a name");
    let again = stalemate(&["replay", file, "--times", "20", "--expect", "--brief"]);
    assert_eq!(again.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&again.stdout).contains("20 of 20 identical"));
}

#[test]
fn one_seed_gives_one_campaign_whatever_the_jobs() {
    let explore = |jobs: &str| {
        let words = [
            "explore",
            "litmus-switch",
            "--seed",
            "9",
            "--schedules",
            "300",
            "--jobs",
            jobs,
        ];
        let output = stalemate(&[&words[..], &["--json"]].concat());
        assert_eq!(output.status.code(), Some(0));
        let result: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        (
            result["points"].clone(),
            result["events"].clone(),
            result["conflicting_pairs"].clone(),
        )
    };
    assert_eq!(explore("1"), explore("2"));
}

#[test]
fn what_the_model_cannot_contain_is_left_to_vcpus() {
    for scenario in ["crash", "trace-git"] {
        let output = stalemate(&["explore", scenario, "--schedules", "1"]);
        assert_eq!(output.status.code(), Some(2), "{scenario}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("use --engine kvm"));
    }
}

#[test]
fn three_members_that_wait_for_each_other_get_to_the_start() {
    let words = ["explore", "unmap-race-short", "--vcpus", "4", "--seed", "1"];
    let output = stalemate(&[&words[..], &["--schedules", "20"]].concat());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{text}");
}

#[test]
fn a_test_that_is_too_long_is_no_livelock() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("long.toml");
    let text = "[machine]\nvcpus = 1\n[program]\nname = \"cow-fork\"\nargs = { rounds = 600 }\n";
    std::fs::write(&file, text).expect("written");
    let path = file.to_str().expect("a name");
    refused(
        &["explore", path, "--schedules", "1", "--seed", "1"],
        &["not over after", "too long"],
    );
}
